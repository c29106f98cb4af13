"""Causal language modelling: predict each token from those before it."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax.config import ConfigError, DataConfig, ModelConfig, TrainConfig
from magneto_jax.data import baselines as data_baselines
from magneto_jax.data import text
from magneto_jax.layers.feed_forward import GATED
from magneto_jax.models.language import CausalLM
from magneto_jax.tasks.task import Batch, Facts, Task
from magneto_jax.theory import flops as theory_flops
from magneto_jax.theory import recipes, records

# Above this size of the text its baselines are left out: xz alone would take a minute.
_BASELINE_BYTES = 16 * 2**20
# So many are counted in a tenth of a second, and settle the frequencies.
_COUNTED_TOKENS = 10_000_000
# The recipes whose formulae are of a text; no other is given its correlation, so that a run whose
# tokens were never counted can still be read.
OF_A_TEXT = ("deepscalelm", "deepscalelm_simple")


def architecture(config: TrainConfig, facts: Facts) -> records.Architecture:
  """What the recipe needs to know of the decoder."""
  model = config.model
  of_text = {}
  if config.recipe in OF_A_TEXT:
    of_text["token_correlation"] = input_correlation(config, facts)
  return records.Architecture(
    kind="decoder",
    decoder_layers=model.layers,
    width=model.width,
    ffn_width=model.ffn_width,
    heads=model.heads,
    dropout=model.dropout,
    embedding_tables=_tables(model),
    **of_text,
  )


def _tables(model: ModelConfig) -> int:
  """How many learned tables are summed at the stack's input."""
  return 2 if model.positions == "learned" else 1


def input_correlation(config: TrainConfig, facts: Facts) -> float:
  """r_0, the correlation of two tokens of a sample at DeepScaleLM's input, before its dropout.

  Two rows of a table agree if they are the same row: in s = sum_k p_k^2 of the text's pairs of
  tokens, and in none of a sample's pairs of positions. So r_0 = s, and s / 2 with learned
  positions. With sinusoidal ones, of the variance v = 1/2 and the covariance c between two
  positions, r_0 = ((1 - p) s + c) / ((1 - p) + v): tokens have the variance 1 - p. Samples count
  as one document each.

  Raises:
    ConfigError: if the facts are of a run that did not count its tokens.
  """
  if "token_correlation" not in facts:
    raise ConfigError(
      f"this run has no token_correlation, which config.recipe={config.recipe!r} goes by: it was"
      " not started with that recipe; start another in a new workdir"
    )
  same, model = facts["token_correlation"], config.model
  if model.positions != "sinusoidal":
    return same / _tables(model)
  variance, covariance = _sinusoidal_moments(config.data.seq_length, model.width)
  tokens = 1 - model.dropout
  return (tokens * same + covariance) / (tokens + variance)


def _sinusoidal_moments(length: int, width: int) -> tuple[float, float]:
  """Mean square of a channel of `layers.sinusoidal`, and mean product over pairs of positions.

  With e_t the encoding of t < T: |e_t|^2 = h = width // 2, and the products of all pairs t != u sum
  to |sum_t e_t|^2 - T h.
  """
  half = width // 2
  frequencies = 10_000.0 ** (-np.arange(half) / max(half - 1, 1))
  turns = np.exp(1j * np.arange(length)[:, None] * frequencies).sum(0)
  pairs = np.sum(np.abs(turns) ** 2) - length * half
  return half / width, float(pairs) / (length * (length - 1) * width)


def decoder_recipe(config: TrainConfig, facts: Facts) -> records.Stack:
  """The decoder stack's record of the config's recipe."""
  model, options = config.model, config.recipe_options.chosen()
  stack = recipes.RECIPES[config.recipe](architecture(config, facts), **options).decoder
  if model.qk_norm:
    stack = records.with_qk_norm(stack, None if model.qk_norm == "none" else model.qk_norm)
  return dataclasses.replace(stack, norm=model.norm) if model.norm else stack


def facts(data: text.TextData) -> Facts:
  """What the model must know of its data.

  vocab_size: V.
  token_correlation: sum_k p_k^2 of the frequencies of the training text's first ten million tokens:
    how often two of them are the same, which is the correlation of their embeddings.
  """
  counts = np.bincount(data.train.tokens[:_COUNTED_TOKENS])
  frequencies = counts / counts.sum()
  return {
    "vocab_size": data.tokenizer.vocab_size,
    "token_correlation": float(np.sum(frequencies**2)),
  }


def build_model(config: TrainConfig, facts: Facts) -> CausalLM:
  """The config's decoder over the data's vocabulary."""
  model = config.model
  return CausalLM(
    recipe=decoder_recipe(config, facts),
    vocab_size=facts["vocab_size"],
    width=model.width,
    num_heads=model.heads,
    ffn_width=model.ffn_width,
    num_kv_heads=model.kv_heads or None,
    head_dim=model.head_dim or None,
    activation=model.activation,
    use_bias=model.use_bias,
    positions=model.positions,
    max_length=config.data.seq_length,
    xpos_scale_base=model.xpos_scale_base,
    relative_buckets=model.relative_buckets,
    relative_max_distance=model.relative_max_distance,
    tied=model.tied_embeddings,
    vocab_chunk=config.vocab_chunk,
    window=(model.window, 0) if model.window else None,
    logits_soft_cap=model.logits_soft_cap or None,
    dropout_rate=model.dropout,
    attention_dropout_rate=model.attention_dropout,
    activation_dropout_rate=model.activation_dropout,
    drop_path_rate=model.drop_path,
    remat=model.remat,
    unroll=model.unroll,
    dtype=jnp.dtype(model.dtype),
    attention_implementation=model.attention_implementation or None,
  )


def inputs(batch: Batch) -> tuple[tuple, dict[str, Any]]:
  """The model's arguments: packed tokens, each document with positions of its own; targets."""
  keywords = {"positions_BT": "positions", "segment_ids_BT": "segment_ids", "targets_BT": "targets"}
  return (batch["inputs"],), {keyword: batch[name] for keyword, name in keywords.items()}


def score(nats_BT, batch: Batch):
  """Sum over tokens of -log p(target) (nats) and the number of tokens, both weighted."""
  return jnp.sum(nats_BT * batch["weights"]), jnp.sum(batch["weights"])


def metrics(
  loss_sum: float, weight_sum: float, data: text.TextData, *, whole: bool
) -> dict[str, float]:
  """Nats a token; over the whole validation text also bits a byte, whatever the tokenizer."""
  values = {"loss_nats_per_token": loss_sum / weight_sum}
  if whole:
    values["bits_per_byte"] = loss_sum / math.log(2) / data.validation_bytes
  return values


def baselines(data: text.TextData) -> dict[str, dict[str, float]]:
  """Bits a byte of simpler models, for texts that they take seconds to read."""
  if data.train_bytes + data.validation_bytes > _BASELINE_BYTES:
    return {}
  return {"bits_per_byte": data_baselines.bits_per_byte(*data.documents)}


def flops(config: TrainConfig, facts: Facts) -> int:
  """FLOPs of one step; see `theory.flops`."""
  model = config.model
  return theory_flops.train_step_flops(
    layers=model.layers,
    width=model.width,
    ffn_width=model.ffn_width,
    heads=model.heads,
    kv_heads=model.kv_heads or model.heads,
    head_dim=model.head_dim or model.width // model.heads,
    vocab_size=facts["vocab_size"],
    seq_length=config.data.seq_length,
    batch_size=config.batch_size,
    gated=model.activation in GATED,
  )


def batch_spec(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """Packed tokens; see `data.packing`."""
  shape = config.batch_size, config.data.seq_length
  spec = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), jnp.int32)
  return {
    name: jax.ShapeDtypeStruct(shape, dtype)
    for name, dtype in (spec | {"weights": jnp.float32}).items()
  }


def load_data(
  config: DataConfig, directory: str | os.PathLike, expected: Mapping[str, Any] | None = None
) -> text.TextData:
  """Documents, tokenizer and token windows; what is derived is kept in `directory`."""
  values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
  del values["workers"], values["prefetch"]  # The pipeline's, not the text's.
  for name in ("train_files", "validation_files"):
    values[name] = tuple(part.strip() for part in values[name].split(",") if part.strip())
  return text.load_text(workdir=directory, expected=expected, **values)


TASK = Task(
  load_data=load_data,
  facts=facts,
  describe=lambda config, facts: records.describe(decoder_recipe(config, facts)),
  build_model=build_model,
  dummy_inputs=lambda config: (jnp.zeros((1, config.data.seq_length), jnp.int32),),
  architecture=architecture,
  inputs=inputs,
  score=score,
  metrics=metrics,
  baselines=baselines,
  flops=flops,
  batch_spec=batch_spec,
)
