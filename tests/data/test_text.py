"""`load_text`: from a name to packed windows, and the same again on resumption."""

import json

import numpy as np
import pytest

from magneto_jax.data import pipelines, sources, text


def _load(workdir, **options):
  return text.load_text(**{"workdir": workdir, "vocab_size": 512, "seq_length": 64} | options)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  return _load(tmp_path_factory.mktemp("run"))


def test_bytes_are_those_of_the_raw_text(loaded):
  train, validation = sources.load_documents("embedded")
  assert loaded.validation_bytes == 98_295 == sum(len(t.encode()) for t in validation)
  assert loaded.train_bytes == sum(len(t.encode()) for t in train)


def test_evaluation_scores_every_token_of_the_validation_text(loaded):
  (play,) = sources.load_documents("embedded")[1]
  batches = list(pipelines.eval_batches(loaded.validation, 32))
  weights = np.concatenate([batch["weights"].ravel() for batch in batches])
  targets = np.concatenate([batch["targets"].ravel() for batch in batches])[weights > 0]
  assert targets[-1] == loaded.tokenizer.eos_id
  assert loaded.tokenizer.decode(targets) == play


def test_the_tokenizer_is_trained_on_the_training_text_only(tmp_path):
  """The validation file's letters are in no piece longer than a byte."""
  (tmp_path / "train.txt").write_text("the cat sat on the mat and ran\n" * 20)
  (tmp_path / "validation.txt").write_text("ЖЖЖЖ" * 500)
  files = {f"{s}_files": (str(tmp_path / f"{s}.txt"),) for s in ("train", "validation")}
  data = _load(tmp_path, name="text_files", vocab_size=300, **files)
  assert len(data.tokenizer.encode("ЖЖ")) == 4
  assert len(data.tokenizer.encode("the cat")) < 7
  assert data.validation_bytes == 4000


def test_loading_again_is_identical_and_reads_what_is_there(tmp_path):
  first = _load(tmp_path)
  stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
  second = _load(tmp_path)
  assert first.identity == second.identity
  np.testing.assert_array_equal(first.train.tokens, second.train.tokens)
  assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


def test_identity_is_json_and_changes_with_each_part(tmp_path, loaded):
  assert json.loads(json.dumps(loaded.identity)) == loaded.identity
  others = [
    _load(tmp_path / "a", vocab_size=600),
    _load(tmp_path / "b", tokenizer="byte"),
    _load(tmp_path / "c", seq_length=32),
    _load(tmp_path / "d", validation_split="test"),
  ]
  assert all(other.identity != loaded.identity for other in others)


def test_a_shared_cache_is_used_by_other_runs(tmp_path):
  cache = tmp_path / "cache"
  _load(tmp_path / "a", cache_dir=str(cache))
  before = sorted(cache.iterdir())
  _load(tmp_path / "b", cache_dir=str(cache))
  assert sorted(cache.iterdir()) == before and not (tmp_path / "b" / "cache").exists()


def test_a_workdir_with_the_tokenizer_of_other_text_is_refused(tmp_path):
  _load(tmp_path)
  with pytest.raises(ValueError, match=r"tokenizer\.model was trained on other text or with"):
    _load(tmp_path, vocab_size=513)
  with pytest.raises(ValueError, match="choose another workdir, or set tokenizer_file="):
    _load(tmp_path, train_split="test")


def test_other_texts_are_refused_before_anything_is_written(tmp_path, loaded):
  with pytest.raises(ValueError, match="the train text is not the one that"):
    _load(tmp_path / "a", train_split="test", expected=loaded.identity)
  assert not list(tmp_path.iterdir())
  assert _load(tmp_path / "a", expected=loaded.identity).identity == loaded.identity


def test_a_runs_tokenizer_outlives_its_file_and_is_not_replaced(tmp_path, loaded):
  _load(tmp_path / "a")
  file, other = tmp_path / "own.model", tmp_path / "other"
  (tmp_path / "a" / "tokenizer.model").rename(file)
  run = lambda: _load(tmp_path / "b", tokenizer_file=str(file), expected=loaded.identity)
  kept = tmp_path / "b" / "tokenizer.model"
  run()
  before = kept.read_bytes()
  file.unlink()
  assert run().identity == loaded.identity
  _load(other, vocab_size=513)
  (other / "tokenizer.model").rename(file)
  with pytest.raises(ValueError, match="is not the one that this run was started with"):
    run()
  assert kept.read_bytes() == before


def test_a_tokenizer_file_is_used_as_it_is(tmp_path, loaded):
  _load(tmp_path / "a")
  file = tmp_path / "a" / "tokenizer.model"
  data = _load(tmp_path / "b", tokenizer_file=str(file), vocab_size=7, train_split="test")
  assert data.tokenizer.identity == loaded.tokenizer.identity
  # The run keeps a copy, and so does not need the file again.
  assert (tmp_path / "b" / "tokenizer.model").read_bytes() == file.read_bytes()


def test_byte_tokens_need_no_training(tmp_path):
  data = _load(tmp_path, tokenizer="byte")
  assert data.tokenizer.vocab_size == 260
  assert len(data.train.tokens) == data.train_bytes + 2 * 8
  assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("tokenizer", ["byte", "sentencepiece"])
def test_damaged_documents_are_left_out_of_tokens_and_tokenizer(tmp_path, tokenizer):
  """The run is that of the other documents; the damaged ones of both parts count together."""
  lines = [b"the cat sat on the mat %d\n" % i * 9 for i in range(8)]
  damaged = [line if i not in (1, 7) else b"\xff" + line[1:] for i, line in enumerate(lines)]

  def load(workdir, content, skip_bad, **options):
    path = tmp_path / "text.txt"
    path.write_bytes(b"|".join(content))
    return _load(
      tmp_path / workdir,
      name="text_files",
      train_files=(str(path),),
      document_separator="|",
      tokenizer=tokenizer,
      vocab_size=280,
      validation_fraction=0.25,
      skip_bad=skip_bad,
      **options,
    )

  for skip_bad, index in ((0, 1), (1, 7)):
    with pytest.raises(
      ValueError, match=f"text.txt: record {index} cannot be read .*data.skip_bad"
    ):
      load("strict", damaged, skip_bad)
  data = load("run", damaged, 2)
  assert [record.split("text.txt")[1][:9] for record in data.bad_records] == [
    ": record ",
    ": record ",
  ]
  assert data.identity["left_out"] == {"train": (1,), "validation": (1,)}
  others = load(
    "others",
    [lines[i] for i in (0, 2, 3, 4, 5, 6)],
    0,
  )
  np.testing.assert_array_equal(data.train.tokens, others.train.tokens)
  identity = json.loads(json.dumps(data.identity))
  again = load("run", damaged, 2, expected=identity)
  assert again.bad_records == data.bad_records
  assert json.loads(json.dumps(again.identity)) == identity


def test_no_identity_speaks_of_documents_that_were_not_left_out(loaded):
  """So that runs from before there was a choice can be resumed."""
  assert "left_out" not in loaded.identity and loaded.bad_records == ()


def test_a_damaged_tokenizer_of_a_run_is_named_before_it_is_parsed(tmp_path, loaded):
  _load(tmp_path)
  model = tmp_path / "tokenizer.model"
  content = bytearray(model.read_bytes())
  content[len(content) // 2] ^= 1
  model.write_bytes(content)
  with pytest.raises(ValueError, match=r"tokenizer\.model is not the tokenizer that this run was"):
    _load(tmp_path, expected=loaded.identity)
  with pytest.raises(ValueError, match="the train text is not the one"):
    _load(tmp_path, expected={})


def test_bad_choices_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"tokenizer='bpe' must be one of \['byte', 'sentencep"):
    _load(tmp_path, tokenizer="bpe")
  with pytest.raises(ValueError, match="set tokenizer='sentencepiece'"):
    _load(tmp_path, tokenizer="byte", tokenizer_file="a.model")
  with pytest.raises(TypeError, match="train_file"):
    _load(tmp_path, train_file=("a",))
