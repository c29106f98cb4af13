"""An image tokenizer: images as a few words, which their pixels can be read from again.

The model is an autoencoder of patches with one code a patch in the middle
(`models.ImageTokenizer`). The loss of an image is

  mean (image' - image)^2 + mean (sg(code) - z)^2

over its pixels, normalised, and over the numbers of its patches' encodings z. No gradient moves the
codes, which follow the encodings. The tokens are the targets of masked image modelling.

Reference: BEiT v2, arXiv 2208.06366, section 2.1.
Differs: the target is the image's pixels and not a teacher's features, none being at hand.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax import sharding
from magneto_jax.config import ConfigError, TrainConfig
from magneto_jax.data import augmentation, images
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.image_tokenizer import ImageTokenizer, Reconstruction
from magneto_jax.models.vision import VisionEncoder
from magneto_jax.reporting import Row
from magneto_jax.tasks import common, image_classification
from magneto_jax.tasks.task import Batch, Facts, Task, Totals
from magneto_jax.theory import flops as theory_flops
from magneto_jax.theory import records

# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------


def depths(config: TrainConfig) -> dict[str, int]:
  """How many layers each stack has."""
  model = config.model
  return {"encoder": model.encoder_layers or model.layers, "decoder": model.layers}


def architecture(config: TrainConfig, facts: Facts, stack: str = "encoder") -> records.Architecture:
  """What the recipe needs to know of a stack: each is an encoder of its own depth.

  The correlation is that of the pixels, for the decoder too: nothing is known of codes before.
  """
  sizes = {"length": common.patches(config), "encoder_layers": depths(config)[stack]}
  return common.architecture(config, facts, "encoder", **sizes)


def stacks(config: TrainConfig, facts: Facts) -> dict[str, records.Stack]:
  """The records of both stacks of the config's recipe."""
  make = lambda name: common.recipe(config, architecture(config, facts, name)).encoder
  return {name: make(name) for name in depths(config)}


def build_model(config: TrainConfig, facts: Facts) -> ImageTokenizer:
  """Two stacks of the config's sizes, and its codes."""
  common.refuse_window(config)
  # Codes follow the weights as they are, not as they are on average.
  if config.ema:
    raise ConfigError(
      f"config.ema={config.ema} is not read with config.task={config.task!r}: leave it at 0"
    )
  if config.data.normalization != "half":
    raise ConfigError(
      f"config.data.normalization={config.data.normalization!r} is not read with"
      f" config.task={config.task!r}, whose pixels are in [-1, 1]: set data.normalization='half'"
    )
  model, sizes = config.model, common.backbone(config) | {"max_length": common.patches(config)}
  make = {name: Encoder(recipe=stack, **sizes) for name, stack in stacks(config, facts).items()}
  return ImageTokenizer(
    encoder=VisionEncoder(encoder=make["encoder"], patch_size=model.patch_size, class_token=False),
    decoder=make["decoder"],
    codes=model.image_vocab_size,
    code_width=model.codebook_width,
    decay=model.codebook_decay,
    redraw_below=model.codebook_redraw,
  )


def inputs(batch: Batch) -> tuple[tuple, dict[str, Any]]:
  """The model's arguments: images."""
  return (batch["image"],), {}


def score(found: Reconstruction, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Sum over images of squared error and commitment, and the number of images."""
  losses_B = _errors(found.images_BHWC, batch) + found.commitment_B
  return jnp.sum(losses_B * batch["weights"]), jnp.sum(batch["weights"])


def _errors(images_BHWC: jax.Array, batch: Batch) -> jax.Array:
  """[B], the mean squared error of each image."""
  return jnp.mean(jnp.square(images_BHWC - batch["image"]), axis=(1, 2, 3))


# ---------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------


def measure(model: ImageTokenizer, variables, batch: Batch) -> dict[str, jax.Array]:
  """Sums over images: of the loss and its parts, and of the errors of patches of one colour.

  And of every image its tokens.
  """
  found = model.apply(variables, batch["image"], return_tokens=True)
  loss, weight = score(found, batch)
  rows, size, p = *batch["image"].shape[:2], model.encoder.patch_size
  patches = batch["image"].reshape(rows, size // p, p, size // p, p, common.CHANNELS)
  plain = jnp.broadcast_to(jnp.mean(patches, axis=(2, 4), keepdims=True), patches.shape)
  of = lambda values_B: jnp.sum(values_B * batch["weights"])
  return {
    "loss": loss,
    "weight": weight,
    "squared_error": of(_errors(found.images_BHWC, batch)),
    "commitment": of(found.commitment_B),
    "plain_squared_error": of(_errors(plain.reshape(batch["image"].shape), batch)),
    "tokens": found.tokens_BP,
  }


def metrics(totals: Totals, data: images.ImageData, *, whole: bool) -> dict[str, float]:
  """How well pixels are restored, and how many codes that takes, of all patches.

  mean_squared_error: of normalised pixels.
  psnr_db: 10 log10(4 / mean_squared_error), as these are in [-1, 1]; left out where nothing errs.
  commitment: mean squared distance of a patch's encoding from its code, over the code's numbers.
  codebook_perplexity: exp of the entropy of the tokens' frequencies: as many codes, equally often
    used, would say as much.
  codes_used: how many there are of which some patch has one.
  mean_squared_error_of_plain_patches: where each patch is its own mean colour: the baseline.
  """
  mean = lambda name: totals[name] / totals["weight"]
  shares, error = shares_of(totals["tokens"]), mean("squared_error")
  return {
    "loss_per_sample": mean("loss"),
    "mean_squared_error": error,
    **({"psnr_db": 10 * math.log10(4 / error)} if error else {}),
    "commitment": mean("commitment"),
    "codebook_perplexity": perplexity(shares),
    "codes_used": len(shares),
    "mean_squared_error_of_plain_patches": mean("plain_squared_error"),
  }


def shares_of(tokens: np.ndarray) -> np.ndarray:
  """Which share of all tokens each one is, of those that occur."""
  counts = np.bincount(tokens.reshape(-1))
  return counts[counts > 0] / tokens.size


def perplexity(shares: np.ndarray) -> float:
  """exp of the entropy of shares."""
  return float(np.exp(-np.sum(shares * np.log(shares))))


# ---------------------------------------------------------------------------------------------
# What a person sees
# ---------------------------------------------------------------------------------------------


def sample(
  config: TrainConfig, model: ImageTokenizer, variables, data: images.ImageData, key: jax.Array
) -> str:
  """The tokens of the validation image in the middle."""
  del key
  index = len(data.validation) // 2
  encode = jax.jit(lambda v, x: sharding.replicate(model.apply(v, x, method="encode")))
  tokens_P = np.asarray(encode(variables, data.validation[index]["image"][None]))[0]
  digits = len(str(config.model.image_vocab_size - 1))
  grid = tokens_P.reshape(common.patch_grid(config))
  rows = (" ".join(f"{token:{digits}}" for token in row) for row in grid)
  return "\n".join([f"the tokens of validation image {index}", *rows])


def picture(
  config: TrainConfig, model: ImageTokenizer, variables, data: images.ImageData
) -> list[Row]:
  """Validation images, evenly apart, and below them what is read from their tokens."""
  pixels = common.shown(data.validation)[1]["image"]
  restore = jax.jit(lambda v, x: sharding.replicate(model.apply(v, x).images_BHWC))
  as_image = lambda pixels: augmentation.denormalize(pixels, config.data.normalization)
  restored = as_image(np.asarray(restore(variables, pixels)))
  return [
    Row("validation images", as_image(pixels)),
    Row(f"from {common.patches(config)} tokens each", restored),
  ]


# ---------------------------------------------------------------------------------------------


def products(config: TrainConfig) -> dict[str, int]:
  """Multiplications of an image's matrix products, forward, by part; see `theory.flops`.

  pixels: of the patches' projection. encoder: behind that, to the encodings. nearest: of these with
  the codes. decoder: from the codes to pixels.
  """
  model, patches = config.model, common.patches(config)
  sizes = common.sizes(model)
  stack = {
    name: theory_flops.stack_products(**sizes | {"layers": layers}, length=patches)
    for name, layers in depths(config).items()
  }
  pixels, dense = common.CHANNELS * model.patch_size**2 * model.width, model.width**2
  code = model.width * model.codebook_width
  return {
    "pixels": patches * pixels,
    "encoder": stack["encoder"] + patches * (dense + code),
    "nearest": patches * model.codebook_width * model.image_vocab_size,
    "decoder": stack["decoder"] + patches * (code + dense + pixels),
  }


def encoding_products(config: TrainConfig) -> int:
  """Multiplications of the products that give an image its tokens."""
  of = products(config)
  return of["pixels"] + of["encoder"] + of["nearest"]


def flops(config: TrainConfig, facts: Facts) -> int:
  """FLOPs of one step, but for the first's k-means; see `theory.flops`."""
  of = products(config)
  # Pixels need no gradient, and codes none: these are compared, then their encodings summed.
  inner = 6 * (of["encoder"] + of["decoder"]) + 4 * (of["pixels"] + of["nearest"])
  return config.batch_size * inner


def batch_spec(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """image: pixels, normalised. weights: one an image."""
  return {
    "image": common.image_spec(config),
    "weights": jax.ShapeDtypeStruct((config.batch_size,), jnp.float32),
  }


def load_data(
  config: TrainConfig, directory: str | os.PathLike, expected: Mapping[str, Any] | None = None
) -> images.ImageData:
  """Images without their labels."""
  del directory  # Nothing is derived.
  spatial = images.Spatial.of(**common.image_options(config))
  view = images.Pixels(spatial, config.data.normalization)
  return common.load_images(config, "image_tokenizer", view, expected)


TASK = Task(
  load_data=load_data,
  facts=lambda data: {"token_correlation": image_classification.correlation(data)},
  describe=lambda config, facts: [
    f"{name}: {line}"
    for name, stack in stacks(config, facts).items()
    for line in records.describe(stack)
  ],
  build_model=build_model,
  dummy_inputs=common.dummy_images,
  architecture=architecture,
  inputs=inputs,
  score=score,
  metrics=metrics,
  baselines=lambda data: {},
  flops=flops,
  planned_facts=lambda config: {"token_correlation": common.correlation_of_noise(config)},
  batch_spec=batch_spec,
  measure=measure,
  sample=sample,
  picture=picture,
  loss_name="loss_per_sample",
  best=("mean_squared_error", False),
  unit="images",
  size=lambda config: 1,
  length=common.patches,
  fact_kinds={},
)
