"""Translation: predict each token of a text from those before it and from its source.

The model is an encoder-decoder whose stacks are of one width and share the table of tokens;
`layers` is the decoder's depth and `encoder_layers` the encoder's. A row of a batch holds several
pairs, each of which reads its own source and itself only. The decoder's input begins with the mark
of an end, and what it writes ends with one.

Reference: Attention Is All You Need, arXiv 1706.03762; DeepNet, arXiv 2203.00555.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from magneto_jax import sharding
from magneto_jax.config import TrainConfig
from magneto_jax.data import pairs, scores
from magneto_jax.data.tokenizers import Tokenizer
from magneto_jax.decoding import Translator
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.encoder_decoder import EncoderDecoder
from magneto_jax.models.language import CausalLM
from magneto_jax.tasks import common
from magneto_jax.tasks.task import Batch, Facts, Task, Totals, mean_nats, weighted_sums
from magneto_jax.theory import flops as theory_flops
from magneto_jax.theory import records

# Of the validation set's pairs, how many a sample shows.
_SHOWN = 3


def load_data(
  config: TrainConfig, directory: str | os.PathLike, expected: Mapping[str, Any] | None = None
) -> pairs.PairData:
  """Pairs, tokenizer and packed rows; what is derived is kept in `directory`."""
  values = common.data_options(config.data, "translation")
  return pairs.load_pairs(workdir=directory, expected=expected, **values)


def facts(data: pairs.PairData) -> Facts:
  """What the model must know of its data; see `causal_lm.facts`.

  The correlation is that of what both stacks read, sources and targets counted together.
  """
  tokens, offsets = data.train.tokens, data.train.offsets
  middle, most = offsets[len(offsets) // 2], common.COUNTED_TOKENS // 2
  size = data.tokenizer.vocab_size
  sides = (tokens[:middle][:most], tokens[middle:][:most])
  counts = sum(np.bincount(side, minlength=size) for side in sides)
  counts[data.tokenizer.bos_id] = 0  # Only in the stream; an end is read once by each stack.
  return {
    "vocab_size": size,
    "token_correlation": float(np.sum((counts / counts.sum()) ** 2)),
  }


def architecture(config: TrainConfig, facts: Facts) -> records.Architecture:
  """What the recipe needs to know of both stacks."""
  layers = {"encoder_layers": _encoder_layers(config), "decoder_layers": config.model.layers}
  return common.architecture(config, facts, "encoder_decoder", **layers)


def _encoder_layers(config: TrainConfig) -> int:
  return config.model.encoder_layers or config.model.layers


def recipe(config: TrainConfig, facts: Facts) -> records.Recipe:
  """The records of both stacks of the config's recipe."""
  return common.recipe(config, architecture(config, facts))


def describe(config: TrainConfig, facts: Facts) -> list[str]:
  """The recipe in words, each stack's."""
  stacks = recipe(config, facts)
  named = {"encoder": stacks.encoder, "decoder": stacks.decoder}
  return [f"{kind}: {line}" for kind, stack in named.items() for line in records.describe(stack)]


def build_model(config: TrainConfig, facts: Facts) -> EncoderDecoder:
  """The config's encoder-decoder over the data's vocabulary, which both sides share."""
  common.refuse_window(config)
  stacks = recipe(config, facts)
  shared = {"vocab_size": facts["vocab_size"], **common.backbone(config)}
  return EncoderDecoder(
    encoder=Encoder(recipe=stacks.encoder, **shared),
    decoder=CausalLM(
      recipe=stacks.decoder,
      tied=config.model.tied_embeddings,
      **common.scoring(config),
      **shared,
    ),
    shared_embedding=True,
  )


def inputs(batch: Batch) -> tuple[tuple, dict[str, Any]]:
  """The model's arguments: sources, the decoder's inputs, whose pairs they are, and targets."""
  keywords = {
    "source_positions_BS": "source_positions",
    "source_segment_ids_BS": "source_segment_ids",
    "positions_BT": "positions",
    "segment_ids_BT": "segment_ids",
    "targets_BT": "targets",
  }
  return (batch["source"], batch["inputs"]), {k: batch[name] for k, name in keywords.items()}


def metrics(totals: Totals, data: pairs.PairData, *, whole: bool) -> dict[str, float]:
  """Nats a token, without smoothing, and their exponential, perplexity, where float64 has it."""
  values = mean_nats(totals, data, whole=whole)
  nats = values["loss_nats_per_token"]
  return values | ({"perplexity": math.exp(nats)} if nats < 700 else {})


def baselines(data: pairs.PairData) -> dict[str, dict[str, float]]:
  """Nats a token of the targets without their sources: by how often each token is in training."""
  own = lambda rows, first: rows.tokens[rows.offsets[first] : rows.offsets[-1]]
  size = data.tokenizer.vocab_size
  train, validation = (
    np.bincount(own(rows, len(rows.offsets) // 2), minlength=size)
    for rows in (data.train, data.validation)
  )
  train[data.tokenizer.bos_id] = validation[data.tokenizer.bos_id] = 0  # Given, not predicted.
  log_p = np.log((1 + train) / np.sum(1 + train))
  return {"loss_nats_per_token": {"unigram": float(-validation @ log_p / validation.sum())}}


def flops(config: TrainConfig, facts: Facts) -> int:
  """FLOPs of one step, padding included; see `theory.flops`."""
  return theory_flops.encoder_decoder_step_flops(
    vocab_size=facts["vocab_size"],
    source_length=config.data.seq_length,
    seq_length=config.data.seq_length,
    batch_size=config.batch_size,
    encoder_layers=_encoder_layers(config),
    **common.sizes(config.model),
  )


def batch_spec(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """Rows of pairs; see `data.pairs.PackedPairs`."""
  integers = ("source", "source_positions", "source_segment_ids")
  integers += ("inputs", "positions", "segment_ids", "targets")
  dtypes = dict.fromkeys(integers, jnp.int32) | {"weights": jnp.float32}
  shape = config.batch_size, config.data.seq_length
  return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}


def dummy_inputs(config: TrainConfig) -> tuple:
  """A source and a target that initialise the model."""
  return (jnp.zeros((1, config.data.seq_length), jnp.int32),) * 2


def translator(
  config: TrainConfig, model: EncoderDecoder, variables, tokenizer: Tokenizer
) -> Translator:
  """What translates as `config.beam` says, texts of at most as many tokens as the model learned."""
  search = dataclasses.asdict(config.beam)
  del search["judged"], search["max_symbols"]
  return Translator(model, variables, tokenizer, longest=config.data.seq_length, **search)


def sample(
  config: TrainConfig, model: EncoderDecoder, variables, data: pairs.PairData, key: jax.Array
) -> str | None:
  """Some of the validation set's sources, translated, and what they should be."""
  del key  # The best are written.
  if not config.sample_tokens:
    return None
  translate = translator(config, model, variables, data.tokenizer)
  texts, references = zip(*itertools.islice(data.validation_pairs, _SHOWN), strict=True)
  found = translate.translate([translate.cut(source) for source in translate.encode(texts)])
  return "\n".join(
    f"{text}\n  {best.text}\n  (reference: {reference})"
    for text, (best, *_), reference in zip(texts, found, references, strict=True)
  )


def judge(
  config: TrainConfig, model: EncoderDecoder, variables, data: pairs.PairData, mesh: Mesh | None
) -> tuple[dict[str, float], int]:
  """BLEU and chrF of translations of the validation set, and of how many pairs they are.

  Of all that can be read, or of the first `config.beam.judged`. A source that is too long is cut,
  its reference is not. See `data.scores.signatures` for how they are computed.
  """
  translate = translator(config, model, variables, data.tokenizer)
  first = itertools.islice(data.validation_pairs, config.beam.judged or None)
  texts, references = zip(*first, strict=True)
  with sharding.use_mesh(mesh):
    found = translate.translate([translate.cut(source) for source in translate.encode(texts)])
  return scores.corpus_scores([best.text for best, *_ in found], references), len(texts)


def counts(data: pairs.PairData) -> dict[str, int]:
  """Pairs that the loss is of, and those that are too long for it."""
  return {"pairs": len(data.validation.pairs), "too_long": data.too_long[1]}


TASK = Task(
  load_data=load_data,
  facts=facts,
  describe=describe,
  build_model=build_model,
  dummy_inputs=dummy_inputs,
  architecture=architecture,
  inputs=inputs,
  score=weighted_sums,
  metrics=metrics,
  baselines=baselines,
  flops=flops,
  planned_facts=common.planned_facts,
  batch_spec=batch_spec,
  sample=sample,
  counts=counts,
  judge=judge,
  translator=translator,
  signatures=lambda config: scores.signatures(),
)
