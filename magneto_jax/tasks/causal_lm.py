"""Causal language modelling: predict each token from those before it."""

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax import decoding
from magneto_jax.config import DataConfig, TrainConfig
from magneto_jax.data import baselines as data_baselines
from magneto_jax.data import documents, text
from magneto_jax.models.language import CausalLM
from magneto_jax.tasks import common
from magneto_jax.tasks.task import Batch, Facts, Task, Totals, mean_nats, weighted_sums
from magneto_jax.theory import flops as theory_flops
from magneto_jax.theory import records

# Above this size of the text its baselines are left out: xz alone would take a minute.
_BASELINE_BYTES = 16 * 2**20
# So many are counted in a tenth of a second, and settle the frequencies.
_COUNTED_TOKENS = 10_000_000


def architecture(config: TrainConfig, facts: Facts) -> records.Architecture:
  """What the recipe needs to know of the decoder."""
  return common.architecture(config, facts, "decoder", decoder_layers=config.model.layers)


def decoder_recipe(config: TrainConfig, facts: Facts) -> records.Stack:
  """The decoder stack's record of the config's recipe."""
  return common.recipe(config, architecture(config, facts)).decoder


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
  return CausalLM(
    recipe=decoder_recipe(config, facts),
    vocab_size=facts["vocab_size"],
    tied=config.model.tied_embeddings,
    **common.scoring(config),
    **common.backbone(config),
  )


def inputs(batch: Batch) -> tuple[tuple, dict[str, Any]]:
  """The model's arguments: packed tokens, each document with positions of its own; targets."""
  keywords = {"positions_BT": "positions", "segment_ids_BT": "segment_ids", "targets_BT": "targets"}
  return (batch["inputs"],), {keyword: batch[name] for keyword, name in keywords.items()}


def metrics(totals: Totals, data: text.TextData, *, whole: bool) -> dict[str, float]:
  """Nats a token; over the whole validation text also bits a byte, whatever the tokenizer."""
  values = mean_nats(totals, data, whole=whole)
  if whole:
    values["bits_per_byte"] = totals["loss"] / math.log(2) / data.validation_bytes
  return values


def sample(
  config: TrainConfig, model: CausalLM, variables, data: text.TextData, key: jax.Array
) -> str | None:
  """A continuation of the config's prompt; None if none is wanted."""
  if not config.sample_tokens:
    return None
  tokenizer = data.tokenizer
  prompt = [tokenizer.bos_id, *tokenizer.encode(config.sample_prompt)]
  new_tokens, longest = config.sample_tokens, model.longest
  if longest is not None:  # A table of positions ends somewhere.
    prompt = [prompt[0], *prompt[1:][-(longest - 2) :]]
    new_tokens = min(new_tokens, longest - len(prompt))
  (tokens,) = decoding.generate(
    model,
    variables,
    [prompt],
    max_new_tokens=new_tokens,
    key=key,
    temperature=config.sample_temperature,
    eos_id=tokenizer.eos_id,
    pad_id=tokenizer.pad_id,
  )
  return config.sample_prompt + tokenizer.decode(tokens)


def baselines(data: text.TextData) -> dict[str, dict[str, float]]:
  """Bits a byte of simpler models, for texts that they take seconds to read."""
  if data.train_bytes + data.validation_bytes > _BASELINE_BYTES:
    return {}
  # What was left out of the tokens has been told; at the end of a run nothing of this is fatal.
  left_out = documents.BadRecords(sum(map(len, data.documents)), known=data.bad_records)
  return {"bits_per_byte": data_baselines.bits_per_byte(*map(left_out.readable, data.documents))}


def flops(config: TrainConfig, facts: Facts) -> int:
  """FLOPs of one step; see `theory.flops`."""
  return theory_flops.train_step_flops(
    vocab_size=facts["vocab_size"],
    seq_length=config.data.seq_length,
    batch_size=config.batch_size,
    **common.sizes(config.model),
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
  values = common.data_options(config, "causal_lm")
  return text.load_text(workdir=directory, expected=expected, **values)


TASK = Task(
  load_data=load_data,
  facts=facts,
  describe=lambda config, facts: records.describe(decoder_recipe(config, facts)),
  build_model=build_model,
  dummy_inputs=lambda config: (jnp.zeros((1, config.data.seq_length), jnp.int32),),
  architecture=architecture,
  inputs=inputs,
  score=weighted_sums,
  metrics=metrics,
  baselines=baselines,
  flops=flops,
  planned_facts=common.planned_facts,
  batch_spec=batch_spec,
  sample=sample,
)
