"""Sources of text: the embedded plays, and what every source has in common."""

import hashlib
import json
import subprocess
import sys

import pytest

from magneto_jax.data import documents, sources


def test_embedded_parts_are_the_plays_of_each_split():
  train, validation = sources.load_documents("embedded")
  assert len(train) == 8 and len(validation) == 1
  assert train[0].startswith("HAMLET, PRINCE OF DENMARK\n")
  assert validation[0].startswith("THE TEMPEST\n")
  assert validation[0].endswith("set me free.\n")
  assert len(validation[0].encode()) == 98_295
  assert sources.embedded("test")[0].startswith("JULIUS CAESAR\n")


def test_embedded_splits_make_up_the_whole_file():
  """10 plays, 9 separating newlines: no character is lost or in two splits."""
  texts = [text for split in ("train", "validation", "test") for text in sources.embedded(split)]
  assert sum(map(len, texts)) + 9 == 1_271_172
  assert len({hashlib.sha256(text.encode()).digest() for text in texts}) == 10


def test_documents_iterate_in_order_and_end():
  texts = documents.Documents(3, ["a", "b", "c"].__getitem__, {})
  assert list(texts) == ["a", "b", "c"]
  with pytest.raises(IndexError, match="document 3 of 3"):
    texts[3]


def test_bad_records_are_counted_once_and_up_to_the_limit():
  def read(index):
    if index % 2:
      raise documents.BadRecord("file", index, "odd")
    return str(index)

  texts, bad, left_out = documents.Documents(6, read, {}), documents.BadRecords(3), {}
  for _ in range(2):
    assert list(bad.readable(texts, left_out=left_out)) == ["0", "2", "4"]
  assert list(bad.readable(texts, [5, 0, 1])) == ["0"]
  assert list(left_out) == [1, 3, 5] and list(bad.found) == list(left_out.values())
  with pytest.raises(ValueError, match=r"^other; 3 others were left out: repair it, or set"):
    bad.add("other")


def test_digest_tells_documents_apart_that_join_to_one_text():
  assert documents.texts_digest([b"ab", b"c"]) != documents.texts_digest([b"a", b"bc"])


def test_identity_is_json_and_names_the_split():
  train, validation = sources.load_documents("embedded")
  assert json.loads(json.dumps(train.identity)) == train.identity
  assert train.identity != validation.identity


def test_unknown_split_lists_the_splits():
  with pytest.raises(ValueError, match=r"no split 'dev'; it has \['test', 'train', 'validation'\]"):
    sources.load_documents("embedded", validation_split="dev")


def test_validating_on_the_training_text_is_refused():
  with pytest.raises(ValueError, match="training and validation text are the same"):
    sources.load_documents("embedded", validation_split="train")


def test_misspelt_option_is_refused():
  with pytest.raises(TypeError, match="train_file"):
    sources.load_documents("embedded", train_file=("a.txt",))


def test_import_loads_neither_tfds_nor_tensorflow():
  code = (
    "import sys; from magneto_jax import data; data.load_documents('embedded');"
    "assert not {'tensorflow_datasets', 'tensorflow'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
