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
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(ConfigError, match="does not hold the config of a run"):
    runs.read_record(tmp_path)


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
