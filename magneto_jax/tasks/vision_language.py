"""What the tasks that BEiT-3 is for share: the inputs of its heads, their data and costs.

The model is the multiway encoder of `tasks.beit3` with a head of the task's. A text is its tokens
between bos and eos. A run may start with the encoder of another one, of masked data modelling or of
another of these tasks, or of a released model (`init_from`), but of question answering, whose
encoder has no final norm, with its own kind alone; positions of patches are interpolated where an
image has another number of them.

Reference: BEiT-3 (Image as a Foreign Language), arXiv 2208.10442, and its released code.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax.config import TrainConfig
from magneto_jax.data import augmentation, captions, questions
from magneto_jax.tasks import beit3, common
from magneto_jax.tasks.task import Batch, Facts
from magneto_jax.theory import flops as theory_flops
from magneto_jax.theory import records


def length(config: TrainConfig) -> int:
  """How many tokens a pair is: class token, patches and text."""
  return 1 + common.patches(config) + config.data.seq_length


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
  frequencies_V = frequencies(data)
  return {
    "vocab_size": len(frequencies_V) + 1,
    "token_correlation": float(np.sum(frequencies_V**2)),
  }


def frequencies(data: Any) -> np.ndarray:
  """The shares of the tokenizer's V ids among the training texts' tokens, [V]."""
  counts = common.token_counts(data)
  return counts / counts.sum()


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
# Answers
# ---------------------------------------------------------------------------------------------


def by_kind(right_N: np.ndarray, data: questions.QuestionData) -> dict[str, float]:
  """How right answers are in the mean: `accuracy`, and of each kind that has a name its own.

  Args:
    right_N: of the validation questions, or statements, that were read, the first, in [0, 1].
    data: which say what kind each is of.
  """
  kinds_N = np.array(data.kinds[1][: len(right_N)])
  found = {"accuracy": float(np.mean(right_N))}
  for kind in _named(kinds_N):
    found[_of_kind(kind)] = float(np.mean(right_N[kinds_N == kind]))
  return found


def trivial_answers(data: questions.QuestionData) -> dict[str, dict[str, float]]:
  """What answers score, by `by_kind`'s names, that need not be about image and question both.

  majority_of_the_type: that which is the commonest of the type in training.
  subgroup_of_the_image: of the emoji, that which is the commonest of the type and of images of the
    same of Unicode's subgroups, for a reader of images, perfect so far, that reads no question; of
    two images there is none, as pairs of subgroups hardly recur.
  """
  trivial = {"majority_of_the_type": data.majority()}
  if not data.is_of_two and (of_images := data.majority_of_the_image()):
    trivial["subgroup_of_the_image"] = of_images
  kinds = {"accuracy": ""} | {_of_kind(k): k for k in _named(trivial["majority_of_the_type"])}
  return {
    metric: {name: scored[kind] for name, scored in trivial.items()}
    for metric, kind in kinds.items()
  }


def _named(kinds: Iterable[str]) -> list[str]:
  """The kinds that have a name, each once."""
  return sorted({str(kind) for kind in kinds} - {""})


def _of_kind(kind: str) -> str:
  """The accuracy of a kind, as a metric's name."""
  return "accuracy_" + "_".join(kind.split())


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
