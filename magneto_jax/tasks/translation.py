"""Translation: predict each token of a text from those before it and from its source.

The model is an encoder-decoder whose stacks are of one width and share the table of tokens;
`layers` is the decoder's depth and `encoder_layers` the encoder's. A batch holds sources and
targets that are padded to `data.seq_length`.

Reference: Attention Is All You Need, arXiv 1706.03762; DeepNet, arXiv 2203.00555.
"""

from typing import Any

import jax
import jax.numpy as jnp

from magneto_jax.config import TrainConfig
from magneto_jax.data import scores
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.encoder_decoder import EncoderDecoder
from magneto_jax.models.language import CausalLM
from magneto_jax.tasks import common, translations
from magneto_jax.tasks.task import Batch, Facts
from magneto_jax.theory import flops as theory_flops
from magneto_jax.theory import records


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
  """The model's arguments: sources, the decoder's inputs, their masks, and targets."""
  keywords = {"source_mask_BS": "source_mask", "mask_BT": "mask", "targets_BT": "targets"}
  return (batch["source"], batch["inputs"]), {k: batch[name] for k, name in keywords.items()}


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
  """source, source_mask: tokens to read, True for those that are not padding.
  inputs, mask: what the decoder is given, which begins with the mark of an end.
  targets, weights: the token after each, and how much it counts: 0 for padding.
  """
  dtypes = {"source": jnp.int32, "source_mask": bool, "inputs": jnp.int32, "mask": bool}
  dtypes |= {"targets": jnp.int32, "weights": jnp.float32}
  shape = config.batch_size, config.data.seq_length
  return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}


def dummy_inputs(config: TrainConfig) -> tuple:
  """A source and a target that initialise the model."""
  return (jnp.zeros((1, config.data.seq_length), jnp.int32),) * 2


TASK = common.without_data(
  "translation",
  describe=describe,
  build_model=build_model,
  dummy_inputs=dummy_inputs,
  architecture=architecture,
  inputs=inputs,
  flops=flops,
  batch_spec=batch_spec,
  judge=translations.judge,
  translator=translations.translator,
  signatures=scores.signatures,
)
