"""What the tasks that BEiT-3 is for share: the inputs of its heads, their data and costs.

The model is the multiway encoder of `tasks.beit3` with a head of the task's. A text is its tokens
between bos and eos. A run may start with the encoder of another one, of masked data modelling or of
another of these tasks, or of a released model (`init_from`); positions of patches are interpolated
where an image has another number of them.

Reference: BEiT-3 (Image as a Foreign Language), arXiv 2208.10442, and its released code.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax.config import ConfigError, TrainConfig
from magneto_jax.data import augmentation, captions
from magneto_jax.tasks import beit3, common
from magneto_jax.tasks.task import Batch, Facts
from magneto_jax.theory import flops as theory_flops
from magneto_jax.theory import records


def length(config: TrainConfig) -> int:
  """How many tokens a pair is: class token, patches and text."""
  return 1 + common.patches(config) + config.data.seq_length


def refuse(config: TrainConfig, *names: str) -> None:
  """Raises ConfigError if one of these fields, which a task does not read, is set."""
  for name in names:
    if value := getattr(config, name):
      raise ConfigError(
        f"config.{name}={value} is not read with config.task={config.task!r}: leave it at 0"
      )


def describe(config: TrainConfig, facts: Facts) -> list[str]:
  """The recipe of the encoder."""
  return records.describe(beit3.recipe(config, facts))


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


def options(config: TrainConfig) -> dict[str, Any]:
  """The fields of the data that the task reads, as its loader takes them."""
  values = common.data_options(config.data, config.task)
  masks = ("mask_rate", "mask_keep", "mask_random")
  for name in ("augment", "normalization", "eval_crop", *masks):  # The view's.
    values.pop(name, None)
  return values | {"view": captions.PictureView.of(**common.image_options(config))}


def see(config: TrainConfig) -> Callable[[np.ndarray], np.ndarray]:
  """From an image, uint8 [H, W, 3] of any size, to what a model reads: float32 [S, S, 3]."""
  view = captions.PictureView.of(**common.image_options(config))
  return lambda image: view.evaluation({"image": image})["image"]


def as_shown(config: TrainConfig, images: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Images of any size as a person is shown what a model reads of them, uint8 [S, S, 3]."""
  seen = map(see(config), images)
  return [augmentation.denormalize(x, config.data.normalization) for x in seen]


def facts(data: Any) -> Facts:
  """What the model must know of its data, which have `train.tokens` and a tokenizer.

  vocab_size: V + 1, the tokenizer's ids and the mask's, which all models of images and texts have,
    so that one can start with another.
  token_correlation: sum_k p_k^2 of the frequencies of the training texts' tokens, marks included.
  """
  counts = np.bincount(data.train.tokens[: common.COUNTED_TOKENS])
  frequencies = counts / counts.sum()
  return {
    "vocab_size": data.tokenizer.vocab_size + 1,
    "token_correlation": float(np.sum(frequencies**2)),
  }


def planned_facts(config: TrainConfig) -> Facts:
  """Likewise without the data; see `common.planned_facts`."""
  known = common.planned_facts(config)
  return {**known, "vocab_size": known["vocab_size"] + 1}


def batch_spec(
  config: TrainConfig, **own: tuple[tuple[int, ...], Any]
) -> dict[str, jax.ShapeDtypeStruct]:
  """text, mask: tokens, and True for those that are not padding. weights: one a sample.

  Args:
    config: the run.
    **own: further arrays, (shape of a sample, dtype), and others in place of these.
  """
  shape = (config.data.seq_length,)
  shapes = {"text": (shape, jnp.int32), "mask": (shape, bool), "weights": ((), jnp.float32)}
  return {
    name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype)
    for name, (shape, dtype) in (shapes | own).items()
  }


def image_shape(config: TrainConfig) -> tuple[tuple[int, ...], Any]:
  """Of a sample's image, for `batch_spec`."""
  spec = common.image_spec(config)
  return spec.shape[1:], spec.dtype


def dummy_inputs(config: TrainConfig) -> tuple:
  """An image and a text that initialise a model."""
  (image_BHWC,) = common.dummy_images(config)
  return image_BHWC, jnp.zeros((1, config.data.seq_length), jnp.int32)


def pair_inputs(batch: Batch) -> tuple[tuple, dict[str, Any]]:
  """A model's arguments: images, texts, and which tokens of these are not padding."""
  return (batch["image"], batch["text"]), {"mask_BT": batch["mask"]}


# ---------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------


def products(config: TrainConfig, tokens: int) -> int:
  """Multiplications of a row of so many tokens in the encoder."""
  return theory_flops.stack_products(length=tokens, **common.sizes(config.model))


def step_flops(config: TrainConfig, row: int, *, images: int = 1) -> int:
  """FLOPs of a step: `row` products of a sample, whose images' pixels need no gradient."""
  pixels = images * common.CHANNELS * config.model.image_size**2 * config.model.width
  return config.batch_size * (6 * row + 4 * pixels)
