"""Masked data modelling on pairs of an image and a text, as BEiT-3 is trained.

Of each pair patches and tokens are masked, and each part is restored from what is left of both: the
patches' tokens, which an image tokenizer gave the whole image, and the text's own. The model is a
multiway encoder. How much each position counts is the batch's to say (`weights`): 0 where nothing
was masked; the weights of a part over their sum are that part's share of the loss.

Reference: BEiT-3 (Image as a Foreign Language), arXiv 2208.10442, section 2.2.
Differs: attention has an expert a modality too, as in the released models, and there is no expert
of both; of the paper's three kinds of data (images, texts, pairs) a batch holds pairs.
"""

from typing import Any

import jax
import jax.numpy as jnp

from magneto_jax.config import ConfigError, TrainConfig
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.multimodal import BEiT3, MaskedBEiT3
from magneto_jax.tasks import common
from magneto_jax.tasks.task import Batch, Facts
from magneto_jax.theory import flops as theory_flops
from magneto_jax.theory import records


def architecture(config: TrainConfig, facts: Facts) -> records.Architecture:
  """What the recipe needs to know of the encoder; the correlation is the text's."""
  return common.architecture(config, facts, "encoder", encoder_layers=config.model.layers)


def recipe(config: TrainConfig, facts: Facts) -> records.Stack:
  """The encoder stack's record of the config's recipe."""
  return common.recipe(config, architecture(config, facts)).encoder


def build_model(config: TrainConfig, facts: Facts) -> MaskedBEiT3:
  """The config's multiway encoder over the text's vocabulary and the patches'."""
  common.refuse_window(config)
  model = config.model
  if model.positions != "learned":
    raise ConfigError(
      "config.task='beit3' has a table of positions for each modality: set"
      f" model.positions='learned', not {model.positions!r}"
    )
  if not model.tied_embeddings:
    raise ConfigError(
      "config.task='beit3' writes texts with the table that reads them: set"
      " model.tied_embeddings=True"
    )
  if config.mesh.sequence != 1:
    raise ConfigError(
      f"config.mesh.sequence={config.mesh.sequence} cannot cut an image's patches, its class token"
      " and a text alike: with config.task='beit3' use mesh.fsdp or mesh.tensor"
    )
  encoder = Encoder(
    recipe=recipe(config, facts),
    experts=("vision", "text"),
    **common.backbone(config) | {"positions": "none"},
  )
  return MaskedBEiT3(
    encoder=BEiT3(
      encoder=encoder,
      vocab_size=facts["vocab_size"],
      num_patches=common.patches(config),
      patch_size=model.patch_size,
      max_text_length=config.data.seq_length,
    ),
    image_vocab_size=model.image_vocab_size,
    **common.scoring(config),
  )


def inputs(batch: Batch) -> tuple[tuple, dict[str, Any]]:
  """The model's arguments: images and texts, what of them is masked or padding, and targets."""
  keywords = {"masked_BP": "image_masked", "mask_BT": "mask", "targets_BT": "targets"}
  return (batch["image"], batch["text"]), {k: batch[name] for k, name in keywords.items()}


def flops(config: TrainConfig, facts: Facts) -> int:
  """FLOPs of one step, every patch and token scored; see `theory.flops`."""
  model = config.model
  return theory_flops.masked_pairs_step_flops(
    vocab_size=facts["vocab_size"],
    image_vocab_size=model.image_vocab_size,
    patches=common.patches(config),
    patch_pixels=common.CHANNELS * model.patch_size**2,
    seq_length=config.data.seq_length,
    batch_size=config.batch_size,
    **common.sizes(model),
  )


def batch_spec(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """image, image_masked: pixels, and True for the patches, read row by row, that are masked.
  text, mask: tokens, some of them the mask's, and True for those that are not padding.
  targets, weights: of the patches, then of the text: what each was, and how much it counts.
  """
  length, count = config.data.seq_length, common.patches(config)
  shapes = {
    "image_masked": ((count,), bool),
    "text": ((length,), jnp.int32),
    "mask": ((length,), bool),
    "targets": ((count + length,), jnp.int32),
    "weights": ((count + length,), jnp.float32),
  }
  return {
    "image": common.image_spec(config),
    **{
      name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype)
      for name, (shape, dtype) in shapes.items()
    },
  }


def dummy_inputs(config: TrainConfig) -> tuple:
  """An image and a text that initialise the model."""
  spec = batch_spec(config)
  return tuple(jnp.zeros((1, *spec[n].shape[1:]), spec[n].dtype) for n in ("image", "text"))


TASK = common.without_data(
  "beit3",
  describe=lambda config, facts: records.describe(recipe(config, facts)),
  build_model=build_model,
  dummy_inputs=dummy_inputs,
  architecture=architecture,
  inputs=inputs,
  flops=flops,
  batch_spec=batch_spec,
)
