"""TFDS without TensorFlow and without a network: a tiny real data set, and a mocked real one."""

import json
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from magneto_jax.data import documents, sentences, sources, tfds_text


class TinyText(tfds.core.GeneratorBasedBuilder):
  """30 + 5 short documents."""

  VERSION = tfds.core.Version("1.2.0")

  def _info(self):
    features = {"text": tfds.features.Text(), "title": tfds.features.Text(), "number": np.int64}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(30), "validation": self._generate_examples(5)}

  def _generate_examples(self, size):
    for i in range(size):
      yield i, {"text": f"döcument {i} of {size}", "title": f"title {i}", "number": i}


with tfds.core.registered.skip_registration():

  class Glue(tfds.core.GeneratorBasedBuilder):
    """Two of GLUE's tasks under their names: four pairs to train on, two to test on."""

    VERSION = tfds.core.Version("2.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("rte", "stsb")]

    def _info(self):
      label = tfds.features.ClassLabel(names=["entailment", "not_entailment"])
      if self.builder_config.name == "stsb":
        label = tfds.features.Scalar(np.float32)
      features = {"sentence1": tfds.features.Text(), "sentence2": tfds.features.Text()}
      features |= {"label": label, "idx": np.int32}
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {
        "train": self._generate_examples([0, 1, 1, 0]),
        "validation": self._generate_examples([1, 0]),
        "test": self._generate_examples([-1, -1]),
      }

    def _generate_examples(self, labels):
      for i, label in enumerate(labels):
        yield i, {"sentence1": f"ä {i}", "sentence2": f"b {i}", "label": label, "idx": i}


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
  """A data_dir with that as ArrayRecord."""
  data_dir = tmp_path_factory.mktemp("glue")
  for name in ("rte", "stsb"):
    Glue(config=name, data_dir=data_dir, file_format="array_record").download_and_prepare()
  return str(data_dir)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A data_dir with TinyText as ArrayRecord."""
  data_dir = tmp_path_factory.mktemp("tfds")
  TinyText(data_dir=data_dir, file_format="array_record").download_and_prepare()
  return data_dir


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError(f"network access: {args}")

  for name in ("connect", "connect_ex"):
    monkeypatch.setattr(socket.socket, name, refuse)
  for name in ("getaddrinfo", "create_connection"):
    monkeypatch.setattr(socket, name, refuse)


def _copy_with_format(prepared, tmp_path, **changes):
  """A copy of the prepared data whose metadata says another format."""
  shutil.copytree(prepared / "tiny_text", tmp_path / "tiny_text")
  path = tmp_path / "tiny_text" / "1.2.0" / "dataset_info.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  return str(tmp_path)


def test_prepared_data_reads_as_text(prepared):
  train, validation = sources.load_documents("tiny_text", data_dir=str(prepared))
  assert sorted(train) == sorted(f"döcument {i} of 30" for i in range(30))
  assert sorted(validation) == sorted(f"döcument {i} of 5" for i in range(5))
  assert train.identity == {
    "source": "tfds",
    "name": "tiny_text/1.2.0",
    "split": "train",
    "text_key": "text",
    "documents": 30,
    "split_bytes": train.identity["split_bytes"],
  }
  assert json.loads(json.dumps(train.identity)) == train.identity


def test_slices_versions_and_other_features(prepared):
  texts = tfds_text.tfds_text(
    "tiny_text:1.2.0", split="train[:3]", text_key="title", data_dir=str(prepared)
  )
  assert len(texts) == 3 and all(text.startswith("title ") for text in texts)


def test_data_prepared_again_with_other_content_has_another_identity(prepared, tmp_path):
  path = prepared / "tiny_text" / "1.2.0" / "dataset_info.json"
  splits = json.loads(path.read_text())["splits"]
  splits[0]["numBytes"] = str(int(splits[0]["numBytes"]) + 1)
  other = _copy_with_format(prepared, tmp_path, splits=splits)
  before, after = (
    tfds_text.tfds_text("tiny_text", split="train", data_dir=folder).identity
    for folder in (str(prepared), other)
  )
  assert before != after


def test_unknown_feature_lists_the_text_features(prepared):
  with pytest.raises(ValueError, match=r"text feature 'number'; .* \['text', 'title'\]"):
    tfds_text.tfds_text("tiny_text", split="train", text_key="number", data_dir=str(prepared))


@pytest.mark.parametrize("split", ["test", "train[:5"])
def test_unknown_split_lists_the_splits(prepared, split):
  with pytest.raises(ValueError, match=r"has no split .*; it has \['train', 'validation'\]"):
    tfds_text.tfds_text("tiny_text", split=split, data_dir=str(prepared))


@pytest.mark.parametrize(
  "name", ["lm1b", "c4/en", "wikipedia/20230601.en", "wmt14_translate/de-en"]
)
def test_unprepared_data_says_how_to_prepare_it_at_once_and_offline(tmp_path, name):
  """TFDS itself searches the network here, for 205 s where there is none."""
  began = time.monotonic()
  with pytest.raises(FileNotFoundError) as caught:
    sources.load_documents(name, data_dir=str(tmp_path))
  assert time.monotonic() - began < 10
  message = str(caught.value)
  assert f"{name} is not prepared under {tmp_path}" in message
  assert (
    f"tfds.builder('{name}', data_dir='{tmp_path}', file_format='array_record')"
    ".download_and_prepare()" in message
  )
  assert "data.name=embedded" in message and "\n" not in message


def test_the_command_of_the_message_runs(prepared):
  """On data that is prepared already, where it has nothing left to download."""
  message = str(tfds_text._not_prepared("lm1b", str(prepared)))
  command = message.split('python -c "')[1].split('"')[0].replace("'lm1b'", "'tiny_text'")
  subprocess.run([sys.executable, "-c", command], check=True)


NEAREST = {
  "embeded": "embedded",
  "lm1bb": "lm1b",
  "wikipedi/en": "wikipedia",
  "pair_file": "pair_files",
  "pair_files": "text_files",
}


@pytest.mark.parametrize("name, nearest", NEAREST.items())
def test_unknown_name_lists_the_nearest_others(tmp_path, name, nearest):
  """Also one that is known where texts are of another kind."""
  with pytest.raises(ValueError, match=f"no data set is called '{name}'; .*'{nearest}'") as error:
    sources.load_documents(name, data_dir=str(tmp_path))
  assert str(error.value).count(f"'{name}'") == 1


def test_other_formats_say_how_to_convert(prepared, tmp_path):
  data_dir = _copy_with_format(prepared, tmp_path, fileFormat="tfrecord")
  with pytest.raises(ValueError, match="stored as tfrecord.*convert_format --dataset_version_dir="):
    tfds_text.tfds_text("tiny_text", split="train", data_dir=data_dir)


def test_converted_data_beside_the_original_is_found(prepared, tmp_path):
  data_dir = _copy_with_format(
    prepared, tmp_path, fileFormat="tfrecord", alternativeFileFormats=["array_record"]
  )
  assert len(tfds_text.tfds_text("tiny_text", split="train", data_dir=data_dir)) == 30


def test_mocked_lm1b_reads_as_text(prepared, tmp_path):
  """`mock_data` fills in random text for a real name; it needs only the metadata files."""
  folder = tmp_path / "lm1b" / "1.1.0"
  folder.mkdir(parents=True)
  for file in ("dataset_info.json", "features.json"):
    text = pathlib.Path(prepared, "tiny_text", "1.2.0", file).read_text()
    folder.joinpath(file).write_text(text.replace("tiny_text", "lm1b").replace("1.2.0", "1.1.0"))
  policy = tfds.testing.MockPolicy.USE_FILES
  with tfds.testing.mock_data(num_examples=4, policy=policy, data_dir=str(tmp_path)):
    texts = tfds_text.tfds_text("lm1b", split="train")
    assert texts.identity["name"] == "lm1b/1.1.0"
    assert len(texts) == 4 and all(isinstance(text, str) and text for text in texts)


def test_a_damaged_record_is_named_and_the_others_are_read(prepared, tmp_path):
  """Each bit flip loses at most one record, and reading goes on behind it."""
  data_dir = _copy_with_format(prepared, tmp_path)
  (shard,) = pathlib.Path(data_dir).rglob("*-train.array_record-*")
  whole = list(tfds_text.tfds_text("tiny_text", split="train", data_dir=data_dir))
  content = shard.read_bytes()
  lost = 0
  for at in range(100, 3000, 150):
    damaged = bytearray(content)
    damaged[at] ^= 1
    shard.write_bytes(damaged)
    bad, left_out = documents.BadRecords(30), {}
    texts = tfds_text.tfds_text("tiny_text", split="train[2:]", data_dir=data_dir)
    read = list(bad.readable(texts, left_out=left_out))
    assert read == [text for i, text in enumerate(whole[2:]) if i not in left_out]
    # The index is that in the file, of which the split leaves out two.
    for index, record in left_out.items():
      assert record.startswith(f"{shard}: record {index + 2} cannot be read (RuntimeError: Corrupt")
    assert len(left_out) <= 1
    lost += len(left_out)
  assert lost > 5


def test_metadata_that_are_damaged_or_name_code_are_one_line(prepared, tmp_path, monkeypatch):
  """TFDS would import the module of a class that features.json names."""
  data_dir = _copy_with_format(prepared, tmp_path)
  folder = tmp_path / "tiny_text" / "1.2.0"
  (tmp_path / "planted_module.py").write_text("raise SystemExit('planted code was run')")
  monkeypatch.syspath_prepend(tmp_path)
  cases = {
    "features.json": [
      ('{"pythonClassName": "planted_module.Text"}', "names the class planted_module.Text"),
      ('{"x": [{"p\\u0079thonClassName": "planted_module.X"}]}', "names the class planted_m"),
      ('{"python_class_name": "planted_module.Text"}', "names the class planted_module"),
      ('{"type": "planted_module.Text", "content": {}}', "names the class planted_module"),
      ("[" * 100_000, "features.json cannot be read"),
      ("{}", "cannot be read .*: prepare it anew"),
    ],
    "dataset_info.json": [("{", "cannot be read .*: prepare it anew")],
  }
  for name, contents in cases.items():
    whole = (folder / name).read_text()
    for content, error in contents:
      (folder / name).write_text(content)
      with pytest.raises(ValueError, match=error) as caught:
        tfds_text.tfds_text("tiny_text", split="train", data_dir=data_dir)
      assert "\n" not in str(caught.value)
    (folder / name).write_text(whole)


# ---------------------------------------------------------------------------------------------
# Labelled texts
# ---------------------------------------------------------------------------------------------


def load(data_dir, name, tmp_path, **options):
  given = {"tokenizer": "byte", "seq_length": 16, "data_dir": data_dir} | options
  return sentences.load_sentences(workdir=tmp_path, name=name, **given)


def test_glue_is_read_by_its_name(glue, tmp_path):
  data = load(glue, "glue/rte", tmp_path)
  assert data.classes == ("entailment", "not_entailment") and data.metrics == ("accuracy",)
  shown = sorted(data.show(data.train[i]) for i in range(4))
  assert shown == [
    "'ä 0b 0' is 'entailment'",
    "'ä 1b 1' is 'not_entailment'",
    "'ä 2b 2' is 'not_entailment'",
    "'ä 3b 3' is 'entailment'",
  ]
  assert data.train[0]["inputs"][0] == 1 and list(data.train[0]["inputs"]).count(2) == 3
  data = load(glue, "glue/stsb", tmp_path)
  assert data.classes == () and data.metrics == ("pearson", "spearman")
  assert data.train.targets.dtype == np.float32


def test_labels_that_are_not_public_are_not_read(glue, tmp_path):
  with pytest.raises(
    ValueError, match=r"glue/rte/2.0.0, test, example 0: it has no label \(label -1"
  ):
    load(glue, "glue/rte", tmp_path, validation_split="test")


def test_columns_of_any_data_set_are_named(glue, prepared, tmp_path):
  keys = {"text_key": "title", "second_text_key": "text", "label_key": "number"}
  data = load(str(prepared), "tiny_text", tmp_path, regression=True, seq_length=64, **keys)
  assert len(data.train) == 30 and data.metrics == ("pearson", "spearman")
  for changed, message in (
    ({"regression": False}, "the labels of tiny_text are numbers: set data.regression=True"),
    ({"label_key": "lable"}, r"has no label 'lable'; data.label_key can be one of \['number'"),
    ({"text_key": "titel"}, r"has no text feature 'titel'; data.text_key can be \['text', 'title'"),
  ):
    with pytest.raises(ValueError, match=message):
      load(str(prepared), "tiny_text", tmp_path, **{"regression": True} | keys | changed)
