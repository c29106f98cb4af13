"""What a workdir holds, read back."""

import pytest

from magneto_jax import runs
from magneto_jax.config import ConfigError, from_config_dict
from magneto_jax.data import documents, tokenizers


def record(**data):
  facts = {"vocab_size": 1, "token_correlation": 0.1}
  return runs.Record(from_config_dict({"data": data}), {"train": "a", "seq_length": 8}, facts)


def test_a_record_is_read_as_it_was_written(tmp_path):
  assert runs.read_record(tmp_path) is None
  runs.write_record(tmp_path, record(tokenizer="byte", seq_length=8))
  assert runs.read_record(tmp_path) == record(tokenizer="byte", seq_length=8)
  path = tmp_path / "config.json"
  path.write_text(path.read_text().replace('"seq_length": 8', '"seq_length": 9', 1))
  with pytest.raises(ConfigError, match="does not hold the config of a run: it has been changed"):
    runs.read_record(tmp_path)
  path.write_text("{}")
  with pytest.raises(ConfigError, match="does not hold the config of a run"):
    runs.read_record(tmp_path)


@pytest.mark.parametrize(
  "text, error",
  [
    ("[" * 100_000, "cannot be read: maximum recursion"),
    ("[]", "does not hold the config of a run"),
    ('{"config": [], "data": {}, "facts": {"vocab_size": 9}}', "a config is a group of fields"),
    ('{"config": {"model": 3}, "data": {}, "facts": {"vocab_size": 9}}', "model is a group"),
    ('{"config": {"ema": NaN}, "data": {}, "facts": {"vocab_size": 9}}', "ema=nan must be finite"),
    ('{"config": {"steps": 1e400}, "data": {}, "facts": {"vocab_size": 9}}', "of type int"),
    ('{"config": {}, "data": [], "facts": {"vocab_size": 9}}', "data and facts must be objects"),
    ('{"config": {}, "data": {}, "facts": "x"}', "data and facts must be objects"),
    ('{"config": {}, "data": {}, "facts": {}}', "it has no fact vocab_size"),
    ('{"config": {}, "data": {}, "facts": {"vocab_size": 9.5}}', "must be a positive int"),
    ('{"config": {}, "data": {}, "facts": {"vocab_size": true}}', "must be a positive int"),
    ('{"config": {}, "data": {}, "facts": {"vocab_size": 1e400}}', "must be a positive int"),
    (
      '{"config": {}, "data": {}, "facts": {"vocab_size": 9}, "rewinds": [{}]}',
      "does not hold the config of a run",
    ),
    (
      '{"config": {}, "data": {}, "facts": {"vocab_size": 9, "token_correlation": NaN}}',
      "token_correlation=nan must be a positive float",
    ),
  ],
)
def test_a_strangers_record_is_checked_in_all_its_parts(text, error, tmp_path):
  (tmp_path / "config.json").write_text(text)
  for read in (runs.read_record, runs.load, runs.load_tokenizer):
    with pytest.raises(ConfigError, match=error) as caught:
      read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_link_that_leads_out_of_a_workdir_is_refused_before_it_is_followed(tmp_path):
  """Also in a folder without a run, into which one is about to be written."""
  workdir, outside = tmp_path / "run", tmp_path / "outside"
  workdir.mkdir()
  runs.write_record(outside, record())
  (workdir / "metrics.jsonl").symlink_to(outside / "any.jsonl")
  with pytest.raises(ConfigError, match="metrics.jsonl is a link that leads out"):
    runs.resumable(workdir, record().config)
  (workdir / "metrics.jsonl").unlink()
  (workdir / "config.json").symlink_to(outside / "config.json")
  for read in (runs.read_record, runs.load, runs.load_tokenizer):
    with pytest.raises(ConfigError, match="config.json is a link that leads out"):
      read(workdir)


def test_a_summary_that_is_none_is_no_summary(tmp_path):
  for text in ("[1]", "{", "[" * 100_000):
    (tmp_path / "summary.json").write_text(text)
    assert runs.read_summary(tmp_path) is None


def test_other_data_are_another_run(tmp_path):
  old = record()
  runs.refuse_if_different(tmp_path, old, old)
  with pytest.raises(ConfigError, match=r"its data have changed \(train\); use another workdir"):
    runs.refuse_if_different(tmp_path, old, old._replace(data={**old.data, "train": "b"}))


def test_a_model_of_a_text_is_not_had_without_the_texts_correlation(tmp_path):
  """One that was never counted is not made up."""
  config = from_config_dict({"recipe": "deepscalelm"})
  runs.write_record(tmp_path, record()._replace(config=config, facts={"vocab_size": 260}))
  with pytest.raises(ConfigError, match="this run has no token_correlation"):
    runs.load(tmp_path)


def test_the_tokenizer_is_the_runs(tmp_path):
  """Bytes, or the model that the run keeps; another in its place is refused."""
  runs.write_record(tmp_path, record(tokenizer="byte"))
  assert runs.load_tokenizer(tmp_path).identity == tokenizers.ByteTokenizer.identity
  texts = documents.Documents(1, lambda i: "to be or not to be " * 99, {})
  kept = runs.data_in(tmp_path) / "tokenizer.model"
  own = tokenizers.SentencePieceTokenizer.train(texts, 270, kept)
  data = {**record().data, "tokenizer": own.identity}
  runs.write_record(tmp_path, record(tokenizer_file="gone.model")._replace(data=data))
  assert runs.load_tokenizer(tmp_path).identity == own.identity
  tokenizers.SentencePieceTokenizer.train(texts, 272, kept)
  with pytest.raises(ConfigError, match="is not the tokenizer that this run was started with"):
    runs.load_tokenizer(tmp_path)
  kept.write_bytes(b"damaged")
  with pytest.raises(ConfigError, match="is not the tokenizer that this run was started with"):
    runs.load_tokenizer(tmp_path)
