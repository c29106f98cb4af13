"""Classification of images: a ViT of any recipe, from scratch or fine-tuned.

The model is a vision encoder with a head on its class token or on the mean of its patches
(`models.ImageClassifier`). The loss is the cross-entropy of the classes, a mean over images.

A split of another data set that has the same classes can be evaluated on, by its name and the
split's (`--split=imagenet_r/test`). Its images are scored among the classes that occur in it, as
the sets that test robustness are (200 of ImageNet's 1,000 in ImageNet-A and -R); the loss is that
of all classes.

Reference: An Image is Worth 16x16 Words, arXiv 2010.11929; Foundation Transformers, arXiv
2210.06423, section 4.5; ImageNet-A, arXiv 1907.07174; ImageNet-R, arXiv 2006.16241.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax import sharding
from magneto_jax.config import ConfigError, TrainConfig
from magneto_jax.data import augmentation, images
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.vision import ImageClassifier, VisionEncoder, soft_cross_entropy
from magneto_jax.reporting import Row
from magneto_jax.tasks import common
from magneto_jax.tasks.task import Batch, Facts, Task, Totals, weighted_sums
from magneto_jax.theory import flops as theory_flops
from magneto_jax.theory import records

# Known without reading them.
CLASSES = {
  "embedded/mnist5k": 10,
  "embedded/emoji": 8,
  "cifar10": 10,
  "cifar100": 100,
  "imagenet2012": 1000,
}
# Of how many images the correlation is: it is settled to a few per cent.
_COUNTED_IMAGES = 256
_TOP = 5


# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------


def length(config: TrainConfig) -> int:
  """T, how many tokens an image is: its patches, and the class token that `first` reads."""
  return common.patches(config) + (config.model.pooling == "first")


def architecture(config: TrainConfig, facts: Facts) -> records.Architecture:
  """What the recipe needs to know of the encoder."""
  return common.architecture(
    config, facts, "encoder", length=length(config), encoder_layers=config.model.layers
  )


def recipe(config: TrainConfig, facts: Facts) -> records.Stack:
  """The encoder stack's record of the config's recipe."""
  return common.recipe(config, architecture(config, facts)).encoder


def vision_encoder(config: TrainConfig, facts: Facts, **options: Any) -> VisionEncoder:
  """The config's encoder of images; with a class token where the pooling reads it."""
  common.refuse_window(config)
  model = config.model
  sizes = common.backbone(config) | {"max_length": length(config)}
  return VisionEncoder(
    encoder=Encoder(recipe=recipe(config, facts), **sizes),
    patch_size=model.patch_size,
    class_token=model.pooling == "first",
    relative_grid=common.patch_grid(config) if model.relative_patches else None,
    **options,
  )


def build_model(config: TrainConfig, facts: Facts) -> ImageClassifier:
  """The config's encoder with a head over the data's classes; dropout is the encoder's."""
  return ImageClassifier(
    encoder=vision_encoder(config, facts),
    classes=facts["classes"],
    pooling=config.model.pooling,
    dropout_rate=config.model.dropout,
    label_smoothing=config.label_smoothing,
  )


def inputs(batch: Batch) -> tuple[tuple, dict[str, Any]]:
  """The model's arguments: images, and the classes that they are mixed of."""
  return (batch["image"],), {"targets": _targets(batch)}


def _targets(batch: Batch) -> tuple[jax.Array, ...]:
  return tuple(batch[name] for name in ("label", "other_label", "share"))


# ---------------------------------------------------------------------------------------------
# Facts and metrics
# ---------------------------------------------------------------------------------------------


def facts(data: images.ImageData) -> Facts:
  """What the model must know of its data.

  classes: C.
  token_correlation: see `correlation`.
  """
  return {"classes": len(data.classes), "token_correlation": correlation(data)}


def correlation(data: images.ImageData) -> float:
  """The `patch_correlation` of the first validation images."""
  counted = range(min(_COUNTED_IMAGES, len(data.validation)))
  return patch_correlation(data.validation[i]["image"] for i in counted)


def patch_correlation(images_HWC: Iterable[np.ndarray]) -> float:
  """The correlation of two of an image's patches, each projected by one random matrix.

  Such a matrix keeps the products of what it projects, up to a factor. Those of two patches x, y
  come to sum_o x_o y_o over the pixels o of a patch, and with many patches and no pixel that
  stands out their mean over an image's pairs is that of two of its pixels: with m the means of an
  image's channels, of any size of patches, r = E |m|^2 / E |x|^2.
  """
  agreeing = energy = 0.0
  for image_HWC in images_HWC:
    wide = image_HWC.astype(np.float64)
    agreeing += np.mean(wide.mean(axis=(0, 1)) ** 2)
    energy += np.mean(wide**2)
  # Images of nothing but zeros agree entirely.
  return float(agreeing / energy) if energy else 1.0


def planned_facts(config: TrainConfig) -> Facts:
  """The facts that a run of the config would have, with the correlation of images of noise.

  Raises:
    ConfigError: the classes are not known without reading the data.
  """
  name = config.data.name.partition(":")[0]
  if name not in CLASSES:
    raise ConfigError(
      f"the classes of data.name={config.data.name!r} are not known without reading it: to plan,"
      f" set data.name to one with as many, of {', '.join(CLASSES)}"
    )
  return {"classes": CLASSES[name], "token_correlation": common.correlation_of_noise(config)}


def measure(model: ImageClassifier, variables, batch: Batch) -> dict[str, jax.Array]:
  """The loss's sums, and of every image its class and which classes score above it, as bits.

  Of classes of equal scores the first is above, as argmax has it; one that is not a number is.
  """
  scores_BC = model.apply(variables, batch["image"])
  labels_B = batch["label"]
  own_B1 = jnp.take_along_axis(scores_BC, labels_B[:, None], axis=-1)
  earlier_BC = jnp.arange(model.classes)[None] < labels_B[:, None]
  later_BC = jnp.arange(model.classes)[None] > labels_B[:, None]
  above_BC = earlier_BC & ~(scores_BC < own_B1) | later_BC & ~(scores_BC <= own_B1)
  loss, weight = weighted_sums(soft_cross_entropy(scores_BC, *_targets(batch)), batch)
  return {
    "loss": loss,
    "weight": weight,
    "labels": labels_B,
    "above": jnp.packbits(above_BC, axis=-1),
  }


def metrics(totals: Totals, data: images.ImageData, *, whole: bool) -> dict[str, float]:
  """The mean loss, and the share of images whose class scores best, and is among the best five.

  The latter only where there are more classes. Of the whole split of another data set those classes
  compete that occur in it; see above.
  """
  labels_N = totals["labels"]
  above_NC = np.unpackbits(totals["above"], axis=-1, count=len(data.classes)).astype(bool)
  if whole and _is_of_another_set(data):
    above_NC = above_NC[:, np.unique(labels_N)]
  better_N = above_NC.sum(axis=-1)
  found = {"accuracy": float(np.mean(better_N < 1))}
  if above_NC.shape[1] > _TOP:
    found["top5_accuracy"] = float(np.mean(better_N < _TOP))
  return {"loss_nats_per_sample": totals["loss"] / totals["weight"], **found}


def _is_of_another_set(data: images.ImageData) -> bool:
  train, validation = (data.identity[part] for part in ("train", "validation"))
  return any(train.get(name) != validation.get(name) for name in ("source", "name"))


def baselines(data: images.ImageData) -> dict[str, dict[str, float]]:
  """The accuracy of a draw among all classes, and of the commonest one in training.

  The latter where labels are known without reading all images; the former not of another data set,
  of which fewer classes may compete.
  """
  found = {} if _is_of_another_set(data) else {"chance": 1 / len(data.classes)}
  labels, train_labels = data.validation.images.labels, data.train.labels
  if labels is not None and train_labels is not None:
    found["majority_class"] = float(np.mean(labels == np.bincount(train_labels).argmax()))
  return {"accuracy": found} if found else {}


# ---------------------------------------------------------------------------------------------
# What a person sees
# ---------------------------------------------------------------------------------------------


def picture(
  config: TrainConfig, model: ImageClassifier, variables, data: images.ImageData
) -> list[Row]:
  """Training images as the model sees them, with their classes, and answers to validation ones."""
  generator = np.random.default_rng(config.seed)
  seen = [data.augment(data.train[i], generator) for i in common.evenly_apart(len(data.train))]
  if data.mix is not None:
    seen = [data.mix(x, y, generator) for x, y in zip(seen, reversed(seen), strict=True)]
  _, batch = common.shown(data.validation)
  score = jax.jit(lambda v, x: sharding.replicate(model.apply(v, x)))
  answers = np.asarray(score(variables, batch["image"])).argmax(-1)
  told = [
    data.classes[label] + ("" if label == answer else f", answered {data.classes[answer]}")
    for label, answer in zip(batch["label"], answers, strict=True)
  ]
  as_image = lambda pixels: augmentation.denormalize(pixels, config.data.normalization)
  return [
    Row(
      "training images, as the model sees them",
      [as_image(x["image"]) for x in seen],
      [data.caption(x) for x in seen],
    ),
    Row("validation images", as_image(batch["image"]), told),
  ]


# ---------------------------------------------------------------------------------------------


def flops(config: TrainConfig, facts: Facts) -> int:
  """FLOPs of one step; see `theory.flops`."""
  model = config.model
  return theory_flops.image_step_flops(
    classes=facts["classes"],
    length=length(config),
    patches=common.patches(config),
    patch_pixels=common.CHANNELS * model.patch_size**2,
    batch_size=config.batch_size,
    **common.sizes(model),
  )


def batch_spec(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """image: pixels, normalised. label, other_label, share: two classes, and how much of the image
  is of the first: 1 unless images were mixed. weights: one an image.
  """
  rows = config.batch_size
  return {
    "image": common.image_spec(config),
    "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
    "other_label": jax.ShapeDtypeStruct((rows,), jnp.int32),
    "share": jax.ShapeDtypeStruct((rows,), jnp.float32),
    "weights": jax.ShapeDtypeStruct((rows,), jnp.float32),
  }


def load_data(
  config: TrainConfig, directory: str | os.PathLike, expected: Mapping[str, Any] | None = None
) -> images.ImageData:
  """Images and their classes."""
  del directory  # Nothing is derived.
  if not config.data.label_key:
    raise ConfigError(
      f"config.data.label_key is empty, and config.task={config.task!r} learns labels: set it to"
      " the feature that holds them"
    )
  view = images.Classification.of(**common.image_options(config))
  return common.load_images(config, "image_classification", view, expected)


TASK = Task(
  load_data=load_data,
  facts=facts,
  describe=lambda config, facts: records.describe(recipe(config, facts)),
  build_model=build_model,
  dummy_inputs=common.dummy_images,
  architecture=architecture,
  inputs=inputs,
  score=weighted_sums,
  metrics=metrics,
  baselines=baselines,
  flops=flops,
  planned_facts=planned_facts,
  batch_spec=batch_spec,
  measure=measure,
  picture=picture,
  loss_name="loss_nats_per_sample",
  best=("accuracy", True),
  unit="images",
  size=lambda config: 1,
  length=length,
  fact_kinds={"classes": int},
  pretrained="encoder",
)
