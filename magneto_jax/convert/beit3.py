"""Released BEiT-3 checkpoints: torchscale's BEiT3 under a prefix, with heads beside it.

Reference: microsoft/unilm, beit3/ (names, and the interpolation of positions).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from magneto_jax.convert import torchscale
from magneto_jax.convert.files import ConversionError, check_finite
from magneto_jax.convert.reader import Reader
from magneto_jax.models.multimodal import BEiT3

PREFIX = "beit3."
# Of the fine-tuned and pre-trained models; kept for the way back, and no part of BEiT3.
HEADS = (
  "fc_norm.",
  "head.",
  "language_head.",
  "logit_scale",
  "mim_head.",
  "mlm_head.",
  "pooler.",
  "vision_head.",
)
# Heads of the released sizes, base and large, by width.
_HEADS_OF_WIDTH = {768: 12, 1024: 16}
_POSITIONS = "encoder.embed_positions.A.weight"
# Rows before the patches': two that are never read, and the class token's.
_BEFORE = torchscale.OFFSET + 1


def from_beit3(
  state_dict: Mapping[str, np.ndarray],
  config: Mapping[str, Any] | None = None,
  *,
  image_size: int | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
  """The `BEiT3` and its variables that a released checkpoint holds.

  Args:
    state_dict: arrays by their names, with the prefix `beit3.` or without. Task heads beside the
      model are left out.
    config: torchscale's keywords; the released sizes need none.
    image_size: pixels on an image's side to use the model at, in place of its own: the patches'
      positions are interpolated bicubically, as the released code does.

  Raises:
    ConversionError: for what is missing, unknown, of another shape, not finite or contradictory.
  """
  model, variables, _ = read(state_dict, config, image_size=image_size)
  return model, variables


def read(state_dict, config=None, *, image_size: int | None = None):
  """`from_beit3`, and third the tensors of task heads."""
  named = {name: np.asarray(tensor) for name, tensor in state_dict.items()}
  kept = {name: tensor for name, tensor in named.items() if name.startswith(HEADS)}
  check_finite(kept)
  is_prefixed = any(name.startswith(PREFIX) for name in named)
  unknown = [n for n in named if is_prefixed and not n.startswith((PREFIX, *HEADS))]
  if unknown:
    raise ConversionError(f"unknown, as all others begin with {PREFIX}: {', '.join(unknown)}")
  tensors = {name.removeprefix(PREFIX): named[name] for name in named if name not in kept}
  if not {_POSITIONS, "text_embed.weight"} <= tensors.keys():
    raise ConversionError(f"this is no BEiT-3: {_POSITIONS} and text_embed.weight are needed")
  reader = Reader(tensors, config or {})
  width = reader.shape("text_embed.weight")[1]
  known = {"encoder_attention_heads": _HEADS_OF_WIDTH[width]} if width in _HEADS_OF_WIDTH else {}
  if image_size is not None:
    patch = reader.shape("vision_embed.proj.weight", 4)[-1]
    reader.shape(_POSITIONS)
    tensors[_POSITIONS] = _resized(tensors[_POSITIONS], image_size, patch)
  model, variables, rest = torchscale.read(tensors, known | reader.config)
  return model, variables, kept | {PREFIX + name: tensor for name, tensor in rest.items()}


def to_beit3(model: nn.Module, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The state dict of a `BEiT3`, with the prefix of the released files."""
  if not isinstance(model, BEiT3):
    raise ConversionError(f"BEiT-3's files hold no {type(model).__name__}")
  tensors = torchscale.to_torchscale(model, variables)
  return {PREFIX + name: tensor for name, tensor in tensors.items()}


def _resized(table: np.ndarray, image_size: int, patch_size: int) -> np.ndarray:
  """The table of positions for images of another size."""
  patches = table[_BEFORE:]
  old, new = math.isqrt(len(patches)), image_size // patch_size
  if old < 1 or old * old != len(patches):
    raise ConversionError(
      f"{len(patches)} patches are no square: their positions cannot be resized"
    )
  if new * patch_size != image_size or new < 1:
    raise ConversionError(f"{image_size=} must be a multiple of the patch size {patch_size}")
  grid = np.asarray(patches, np.float32).reshape(old, old, -1)
  weights = _bicubic(old, new)
  grid = np.einsum("yi,xj,ijd->yxd", weights, weights, grid, dtype=np.float32)
  return np.concatenate([np.asarray(table[:_BEFORE], np.float32), grid.reshape(new * new, -1)])


def _bicubic(old: int, new: int, a: float = -0.75) -> np.ndarray:
  """Weights [new, old] of bicubic interpolation along one axis, as PyTorch's `interpolate` has it.

  Pixel centres lie at half integers (align_corners=False), nothing is smoothed when shrinking, and
  beyond the edge the last row repeats. The kernel is Keys's (1981) with a = -0.75, where
  `jax.image.resize` has -0.5.
  """
  if old == new:
    return np.eye(old, dtype=np.float32)
  centres = (np.arange(new) + 0.5) * old / new - 0.5
  weights = np.zeros((new, old))
  for row, centre in enumerate(centres):
    for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
      t = abs(centre - tap)
      near = (a + 2) * t**3 - (a + 3) * t**2 + 1
      far = a * (t**3 - 5 * t**2 + 8 * t - 4)
      weights[row, min(max(tap, 0), old - 1)] += near if t <= 1 else far if t < 2 else 0.0
  return weights.astype(np.float32)
