"""Masked image modelling: what the hidden patches of an image were, in an image tokenizer's words.

A sample is a view of an image of which the same number of patches is always hidden, by blocks: anew
each time that it is read in training, and always the same in validation (`data.patch_masks`). The
targets are the tokens that a trained image tokenizer gives those patches of the whole view. The
tokenizer is part of the model and rests; `config.image_tokenizer` names the run that trained it.

Reference: BEiT, arXiv 2106.08254; BEiT v2, arXiv 2208.06366; Foundation Transformers, arXiv
2210.06423, section 4.5.
Differs: model and tokenizer are given the same pixels, in [-1, 1].
"""

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from magneto_jax import sharding
from magneto_jax.config import ConfigError, ModelConfig, TrainConfig, from_config_dict
from magneto_jax.data import augmentation, images, patch_masks
from magneto_jax.models import Frozen, MaskedImageModel
from magneto_jax.reporting import Row
from magneto_jax.tasks import common, image_classification, image_tokenizer
from magneto_jax.tasks.task import Batch, Facts, Task, Totals, weighted_sums
from magneto_jax.theory import flops as theory_flops
from magneto_jax.theory import records

# What a tokenizer is given of the model's sizes where no run says its own.
_TOKENIZER_SIZES = ("layers", "width", "ffn_width", "heads", "image_size", "patch_size")
_TOKENIZER_SIZES += ("image_vocab_size", "dtype")
# BEiT v2's, also for its large model: ViT-B's.
_LARGEST = {"width": 768, "ffn_width": 3072, "heads": 12}
_MOST_LAYERS = 12
# Of hidden patches that are drawn.
GREY = 96
# How a person reads a patch that can be seen, one that is answered right, and one that is not.
_SEEN, _RIGHT, _WRONG = "·", "o", "x"


def masks(config: TrainConfig) -> patch_masks.PatchMasks:
  """The masks that the config asks for."""
  count = patch_masks.count_of(config.data.mask_rate, common.patches(config))
  return patch_masks.PatchMasks(common.patch_grid(config), count, config.data.mask_block)


def masks_of_blocks(config: TrainConfig) -> patch_masks.PatchMasks:
  """Likewise, where they are drawn.

  Raises:
    ConfigError: no block can be hidden, so that all masks would be of single patches.
  """
  drawing = masks(config)
  most = min(drawing.count, (drawing.grid[0] - 1) * (drawing.grid[1] - 1))
  if drawing.smallest > most:
    raise ConfigError(
      f"config.data.mask_block={drawing.smallest} is more than the {most} patches that a block can"
      " have of this grid and data.mask_rate: set it to less"
    )
  return drawing


def load_data(
  config: TrainConfig, directory: str | os.PathLike, expected: Mapping[str, Any] | None = None
) -> images.ImageData:
  """Images without their labels, with masks of their patches; see `masks_of_blocks`."""
  data = image_tokenizer.load_data(config, directory, expected)
  return patch_masks.masked(data, masks_of_blocks(config))


# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------


def tokenizer(config: TrainConfig, facts: Facts) -> tuple[TrainConfig, Facts]:
  """Config and facts of the tokenizer's run; by the facts, which hold both where there was one.

  To plan and to diagnose none is needed: then it is one of the model's own sizes, as BEiT v2's is,
  and like that no larger than ViT-B.
  """
  if "image_tokenizer" in facts:
    held = facts["image_tokenizer"]
    return from_config_dict(held["config"]), held["facts"]
  sizes = {name: getattr(config.model, name) for name in _TOKENIZER_SIZES}
  sizes |= _LARGEST if sizes["width"] > _LARGEST["width"] else {}
  model = ModelConfig(**sizes | {"layers": min(sizes["layers"], _MOST_LAYERS)})
  own = TrainConfig(task="image_tokenizer", model=model)
  return own, image_tokenizer.TASK.planned_facts(own)


def build_model(config: TrainConfig, facts: Facts) -> MaskedImageModel:
  """The config's encoder of images, and the tokenizer."""
  return MaskedImageModel(
    encoder=image_classification.vision_encoder(config, facts, mask_token=True),
    tokenizer=Frozen(image_tokenizer.TASK.build_model(*tokenizer(config, facts))),
    vocab_size=config.model.image_vocab_size,
    **common.scoring(config),
  )


def inputs(batch: Batch) -> tuple[tuple, dict[str, Any]]:
  """The model's arguments: images, what of them is hidden, and that it is to be scored."""
  return (batch["image"],), {**_hidden(batch), "targets": True}


def _hidden(batch: Batch) -> dict[str, jax.Array]:
  return {"masked_BP": batch["masked"], "places_BK": batch["places"]}


# ---------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------


def measure(model: MaskedImageModel, variables, batch: Batch) -> dict[str, jax.Array]:
  """The loss's sums, and of every image the hidden patches' tokens, and what is answered."""
  logits_BKV = model.apply(variables, batch["image"], **_hidden(batch))
  tokens_BP = model.apply(variables, batch["image"], method="tokens")
  targets_BK = jnp.take_along_axis(tokens_BP, batch["places"], axis=1)
  nats_BK = optax.softmax_cross_entropy_with_integer_labels(logits_BKV, targets_BK)
  loss, weight = weighted_sums(nats_BK, batch)
  return {
    "loss": loss,
    "weight": weight,
    "targets": targets_BK,
    "answers": jnp.argmax(logits_BKV, axis=-1),
    "places": batch["places"],
  }


def metrics(totals: Totals, data: images.ImageData, *, whole: bool) -> dict[str, float]:
  """What the hidden patches of the validation images cost, beside what answers nothing cost.

  loss_nats_per_patch: mean -log p of their tokens.
  masked_accuracy: share of them that the model puts first.
  codebook_perplexity: exp of the entropy of their frequencies: how many tokens are in use. No
    answer that is the same everywhere costs less than its logarithm.
  commonest_token: share of them that are the commonest of them: what always answering that one
    scores, which the model's accuracy is to be held against.
  commonest_token_of_the_place: the same, of each place of the grid its own.
  Of both the commonest is that of the very patches that are scored: more than can be known before.
  """
  targets, places = totals["targets"], totals["places"]
  shares = image_tokenizer.shares_of(targets)
  by_place = np.zeros((places.max() + 1, targets.max() + 1), np.int64)
  np.add.at(by_place, (places, targets), 1)
  return {
    "loss_nats_per_patch": totals["loss"] / totals["weight"],
    "masked_accuracy": float(np.mean(totals["answers"] == targets)),
    "codebook_perplexity": image_tokenizer.perplexity(shares),
    "commonest_token": float(shares.max()),
    "commonest_token_of_the_place": float(by_place.max(axis=1).sum() / targets.size),
  }


# ---------------------------------------------------------------------------------------------
# What a person sees
# ---------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="model")
def answered(model: MaskedImageModel, variables, batch: Batch) -> dict[str, jax.Array]:
  """The model's answers to images of which patches are hidden.

  Returns:
    tokens: [B, P], the tokenizer's of the whole images.
    filled: [B, P], the same, where patches are hidden the model's.
    pictures, restored: [B, H, W, C], the tokenizer's of `filled`, and of its own tokens.
  """
  tokens_BP = model.apply(variables, batch["image"], method="tokens")
  logits_BPV = model.apply(variables, batch["image"], masked_BP=batch["masked"])
  filled_BP = jnp.where(batch["masked"], jnp.argmax(logits_BPV, axis=-1), tokens_BP)
  draw = lambda tokens_BP: model.apply(variables, tokens_BP, method="pixels")
  pictures = {"pictures": draw(filled_BP), "restored": draw(tokens_BP)}
  return sharding.replicate({"tokens": tokens_BP, "filled": filled_BP, **pictures})


def sample(
  config: TrainConfig, model: MaskedImageModel, variables, data: images.ImageData, key: jax.Array
) -> str:
  """One of the images of the picture, patch by patch: seen, answered right, or wrong."""
  del key
  indices, batch = common.shown(data.validation)
  one, found = len(indices) // 2, answered(model, variables, batch)
  right_P = np.asarray(found["tokens"] == found["filled"])[one]
  marks = np.where(batch["masked"][one], np.where(right_P, _RIGHT, _WRONG), _SEEN)
  rows = "\n".join(" ".join(row) for row in marks.reshape(common.patch_grid(config)))
  return (
    f"the patches of validation image {indices[one]}: {_SEEN} seen, {_RIGHT} hidden and answered"
    f" right, {_WRONG} wrong\n{rows}"
  )


def picture(
  config: TrainConfig, model: MaskedImageModel, variables, data: images.ImageData
) -> list[Row]:
  """Validation images; what is seen of them; what is answered; and what could be."""
  _, batch = common.shown(data.validation)
  found = answered(model, variables, batch)
  as_image = lambda pixels: augmentation.denormalize(np.asarray(pixels), config.data.normalization)
  whole, pictures = as_image(batch["image"]), as_image(found["pictures"])
  size, grid = config.model.patch_size, common.patch_grid(config)
  hidden = batch["masked"].reshape(-1, *grid, 1).repeat(size, 1).repeat(size, 2)
  return [
    Row("validation images", whole),
    Row("what is seen", np.where(hidden, np.uint8(GREY), whole)),
    Row("hidden patches answered, the others as they are", np.where(hidden, pictures, whole)),
    Row("all patches from tokens, the hidden ones' answered", pictures),
    Row("all patches from tokens, nothing hidden", as_image(found["restored"])),
  ]


# ---------------------------------------------------------------------------------------------


def facts(data: images.ImageData) -> Facts:
  """What the model must know of its data; the tokenizer's facts are added to them.

  token_correlation: see `image_classification.patch_correlation`.
  """
  return {"token_correlation": image_classification.facts(data)["token_correlation"]}


def flops(config: TrainConfig, facts: Facts) -> int:
  """FLOPs of one step, the tokenizer's encoder among them; see `theory.flops`."""
  model, count = config.model, masks(config).count
  length = image_classification.length(config)
  stack = theory_flops.stack_products(length=length, **common.sizes(model))
  head = count * model.width * model.image_vocab_size
  pixels = model.image_size**2 * common.CHANNELS * model.width
  encoding = image_tokenizer.encoding_products(tokenizer(config, facts)[0])
  # Pixels need no gradient: two products, not three; the tokenizer needs none at all.
  return config.batch_size * (6 * (stack + head) + 4 * pixels + 2 * encoding)


def batch_spec(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """image: pixels. masked, places, weights: see `data.patch_masks`."""
  drawing = masks(config)
  shapes = {
    "masked": ((common.patches(config),), bool),
    "places": ((drawing.count,), jnp.int32),
    "weights": ((drawing.count,), jnp.float32),
  }
  return {
    "image": common.image_spec(config),
    **{
      name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype)
      for name, (shape, dtype) in shapes.items()
    },
  }


def planned_facts(config: TrainConfig) -> Facts:
  """The facts that a run of the config would have, with the correlation of images of noise."""
  return {"token_correlation": common.correlation_of_noise(config)}


def describe(config: TrainConfig, facts: Facts) -> list[str]:
  """The recipe, and what is hidden and answered."""
  drawing, model = masks(config), config.model
  hidden = (
    f"hides {drawing.count} of {drawing.grid[0]} x {drawing.grid[1]} patches, by blocks of at least"
    f" {drawing.smallest}; answers with {model.image_vocab_size:,} tokens"
  )
  return [*records.describe(image_classification.recipe(config, facts)), hidden]


TASK = Task(
  load_data=load_data,
  facts=facts,
  describe=describe,
  build_model=build_model,
  dummy_inputs=common.dummy_images,
  architecture=image_classification.architecture,
  inputs=inputs,
  score=weighted_sums,
  metrics=metrics,
  # Of tokens, which the model knows: they are among the metrics.
  baselines=lambda data: {},
  flops=flops,
  planned_facts=planned_facts,
  batch_spec=batch_spec,
  measure=measure,
  sample=sample,
  picture=picture,
  loss_name="loss_nats_per_patch",
  best=("loss_nats_per_patch", False),
  unit="images",
  size=lambda config: 1,
  length=image_classification.length,
  fact_kinds={"image_tokenizer": dict},
)
