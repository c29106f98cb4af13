"""Labelled texts as rows of tokens: their marks, what is cut, and what a run may go on with."""

import numpy as np
import pytest

from magneto_jax.data import sentences
from magneto_jax.data.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()


def load(folder, rows, validation=None, *, header=("text", "label"), **options):
  """Rows as TSV files, by bytes."""
  validation = rows if validation is None else validation
  files = {}
  for part, lines in (("train", rows), ("validation", validation)):
    path = folder / f"{part}.tsv"
    path.write_text("\n".join("\t".join(map(str, line)) for line in (header, *lines)))
    files[f"{part}_files"] = (str(path),)
  given = {"tokenizer": "byte", "seq_length": 12} | files | options
  return sentences.load_sentences(workdir=folder / "run", name="text_files", **given)


def ids(text):
  return BYTES.encode(text).tolist()


def test_a_row_is_its_marks_its_tokens_and_padding(tmp_path):
  data = load(tmp_path, [("abc", "no"), ("d", "yes")])
  sample = data.train[0]
  assert sample["inputs"].tolist() == [1, *ids("abc"), 2] + [0] * 7
  assert sample["mask"].tolist() == [True] * 5 + [False] * 7
  assert (sample["targets"], sample["weights"]) == (0, 1)
  assert data.classes == ("no", "yes") and data.metrics == ("accuracy", "f1")
  dtypes = {name: array.dtype.name for name, array in sample.items()}
  assert dtypes == {"inputs": "int32", "mask": "bool", "targets": "int32", "weights": "float32"}
  assert data.show(sample) == "'abc' is 'no'"
  assert "2 training and 2 validation samples of 12 tokens (67% padding), 2 cl" in data.describe()
  assert "2 of the validation samples are in the training set too" in data.describe()


def test_a_pair_has_two_marks_between_its_texts(tmp_path):
  """<s> a </s></s> b </s>, as fairseq makes it."""
  header = ("a", "b", "y")
  keys = {"text_key": "a", "second_text_key": "b", "label_key": "y"}
  data = load(tmp_path, [("p", "qr", 10), ("s", "t", 9)], header=header, **keys)
  assert data.train[0]["inputs"].tolist() == [1, *ids("p"), 2, 2, *ids("qr"), 2] + [0] * 5
  assert data.classes == ("9", "10")  # By their size.


def popped(a, b, room):
  """BERT's rule as it is written there: one token at a time from the longer one."""
  a, b = list(a), list(b)
  while len(a) + len(b) > room:
    (a if len(a) > len(b) else b).pop()
  return a, b


def test_the_longer_text_is_cut_first():
  """By brute force, all lengths and rooms."""
  for first in range(9):
    for second in range(9):
      for room in range(2, first + second):
        a, b = np.arange(first), 100 + np.arange(second)
        cut = [part.tolist() for part in sentences.cut((a, b), room)]
        assert cut == [*popped(a, b, room)], (first, second, room)
  assert sentences.cut((np.arange(5),), 3)[0].tolist() == [0, 1, 2]


def test_what_is_too_long_is_refused_skipped_or_cut_and_counted(tmp_path):
  rows = [("abcdefghijk", 1), ("short", 0), ("short too", 1)]
  said = r"train.tsv:2: it has 13 tokens, more than data.seq_length=12 \(data.too_long='truncate'"
  with pytest.raises(ValueError, match=said) as error:
    load(tmp_path, rows, rows[1:])
  assert "\n" not in str(error.value)
  data = load(tmp_path, rows, rows[1:], skip_bad=1)
  assert len(data.train) == 2 and len(data.bad_records) == 1 and data.truncated == (0, 0)
  data = load(tmp_path, rows, [*rows[1:], ("x" * 11, 0), ("y" * 20, 1)], too_long="truncate")
  assert data.train[0]["inputs"].tolist() == [1, *ids("abcdefghij"), 2]
  assert data.truncated == (1, 2) and "3 were longer, and are cut" in data.describe()
  with pytest.raises(ValueError, match="seq_length=4 leaves no room for 2 texts"):
    load(tmp_path, rows, text_key="text", second_text_key="label", label_key="label", seq_length=4)


def test_labels_of_validation_are_those_of_training(tmp_path):
  rows = [("p", "a"), ("q", "b")]
  with pytest.raises(ValueError, match=r"validation.tsv:3: no training row has the label 'c', onl"):
    load(tmp_path, rows, [("r", "a"), ("s", "c")])
  data = load(tmp_path, rows, [("r", "a"), ("s", "c")], skip_bad=1)
  assert len(data.validation) == 1 and "'c'" in data.bad_records[0]
  with pytest.raises(ValueError, match="all 2 training rows have the label 'a': there is nothing"):
    load(tmp_path, [("p", "a"), ("q", "a")])


def test_numbers_are_divided_by_their_scale_and_told_as_they_were(tmp_path):
  data = load(tmp_path, [("p", 5), ("q", 2.5)], regression=True, label_scale=5.0)
  assert [float(data.train[i]["targets"]) for i in (0, 1)] == [1.0, 0.5]
  assert data.train[0]["targets"].dtype == np.float32 and data.classes == ()
  assert data.metrics == ("pearson", "spearman")
  assert data.show(data.train[1]) == "'q' is '2.5'"
  with pytest.raises(ValueError, match="label_scale=5.0 is of numbers"):
    load(tmp_path, [("p", 5), ("q", 2)], label_scale=5.0)


def test_a_run_goes_on_with_the_same_rows_only(tmp_path):
  rows = [("to be or not to be", "a"), ("that is the question", "b")] * 20
  options = {"tokenizer": "sentencepiece", "vocab_size": 280, "seq_length": 32}
  data = load(tmp_path, rows, **options)
  again = load(tmp_path, rows, expected=data.identity, **options)
  assert again.identity == data.identity
  np.testing.assert_array_equal(again.train.tokens, data.train.tokens)
  for changed in ([*rows[:-1], ("that is the question", "a")], rows[:-1]):
    with pytest.raises(ValueError, match="the train rows are not those that this run was started"):
      load(tmp_path, changed, rows, expected=data.identity, **options)


def test_glue_has_columns_of_its_own_and_the_embedded_lines_one(tmp_path):
  with pytest.raises(
    ValueError, match="glue/rte has the texts sentence1, sentence2: leave data.te"
  ):
    sentences.load_sentences(workdir=tmp_path, name="glue/rte", text_key="premise")
  with pytest.raises(ValueError, match="the embedded lines are single"):
    sentences.load_sentences(workdir=tmp_path, second_text_key="b")
