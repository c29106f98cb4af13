"""Images as sequences of patches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from magneto_jax.layers.initializers import DenseInit


class PatchEmbedding(nn.Module):
  """Cuts images into patches of p x p pixels, projects each, and puts a class token before them.

  Attributes:
    width: D.
    patch_size: p.
    projection_init: init functions of the projection.
    class_token: whether there is a class token.
    mask_token: whether patches can be masked.
    dtype: of the computation; parameters are float32.

  Reference: An Image is Worth 16x16 Words, arXiv 2010.11929, section 3.1; BEiT, arXiv 2106.08254,
  section 2.3 (the mask token).
  """

  width: int
  patch_size: int
  projection_init: DenseInit = DenseInit()
  class_token: bool = True
  mask_token: bool = False
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, images_BHWC: jax.Array, masked_BP: jax.Array | None = None) -> jax.Array:
    """Embeds images.

    Args:
      images_BHWC: pixels; height and width are multiples of p.
      masked_BP: True where a patch, of those read row by row, is replaced by the mask token.

    Returns:
      [B, 1 + P, D] with P = HW / p^2 patches; [B, P, D] without a class token.
    """
    if images_BHWC.ndim != 4:
      raise ValueError(f"images {list(images_BHWC.shape)} are not [B, H, W, C]")
    batch, height, width, channels = images_BHWC.shape
    p = self.patch_size
    if p < 1 or height % p or width % p:
      raise ValueError(f"images of {height} x {width} pixels are not whole patches of {p} x {p}")

    rows, columns = height // p, width // p
    x_BhpwpC = images_BHWC.reshape(batch, rows, p, columns, p, channels)
    x_BPppC = x_BhpwpC.swapaxes(2, 3).reshape(batch, rows * columns, p, p, channels)
    # A product, and not a convolution of strides p: the same kernel [p, p, C, D], but on a mesh
    # that cuts both patches and D, XLA gives a convolution's kernel a wrong gradient.
    x_BPD = nn.DenseGeneral(
      self.width,
      axis=(-3, -2, -1),
      kernel_init=self.projection_init.kernel,
      bias_init=self.projection_init.bias(p * p * channels),
      dtype=self.dtype,
      name="projection",
    )(x_BPppC)
    if self.mask_token:
      token_D = self.param("mask_token", nn.initializers.zeros, (self.width,))
      if masked_BP is not None:
        if jnp.shape(masked_BP) != x_BPD.shape[:2]:
          raise ValueError(f"{jnp.shape(masked_BP)=} is not [B, P] = {list(x_BPD.shape[:2])}")
        token = token_D.astype(x_BPD.dtype).reshape(1, 1, -1)
        x_BPD = jnp.where(jnp.asarray(masked_BP, bool)[..., None], token, x_BPD)
    elif masked_BP is not None:
      raise ValueError("masked patches need mask_token=True")
    if self.class_token:
      token_D = self.param("class_token", nn.initializers.zeros, (self.width,))
      first_B1D = jnp.broadcast_to(token_D.astype(x_BPD.dtype), (batch, 1, self.width))
      x_BPD = jnp.concatenate([first_B1D, x_BPD], axis=1)
    return x_BPD


def resized_positions(
  table_PD: np.ndarray, old: tuple[int, int], new: tuple[int, int]
) -> np.ndarray:
  """A table of learned positions of patches, read row by row, for another grid of them.

  Bicubic, channel by channel, each grid spread over the same image, and the kernel not widened
  where there are fewer patches; the same table for the same grid. As the released code of ViT's
  heirs, BEiT-3's among them, has it from PyTorch's `interpolate`: pixels' centres lie at half
  integers (align_corners=False), beyond the edge the last row repeats, and Keys's kernel (1981) is
  that of a = -0.75, where `jax.image.resize` has -0.5.

  Args:
    table_PD: [hw, D] without a class token's row.
    old, new: (h, w), patches on an image's sides.

  Reference: An Image is Worth 16x16 Words, arXiv 2010.11929, section 3.2; BEiT-3's released code.
  """
  if tuple(old) == tuple(new):
    return table_PD
  image_HWD = table_PD.reshape(*old, -1)
  down, right = (_bicubic(side, to) for side, to in zip(old, new, strict=True))
  resized = np.einsum("yi,xj,ijd->yxd", down, right, image_HWD, optimize=True)
  return resized.reshape(-1, table_PD.shape[-1]).astype(table_PD.dtype)


def _bicubic(old: int, new: int, a: float = -0.75) -> np.ndarray:
  """Weights [new, old] of bicubic interpolation along one axis."""
  weights = np.zeros((new, old))
  for row, centre in enumerate((np.arange(new) + 0.5) * old / new - 0.5):
    for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
      t = abs(centre - tap)
      near = (a + 2) * t**3 - (a + 3) * t**2 + 1
      far = a * (t**3 - 5 * t**2 + 8 * t - 4)
      weights[row, min(max(tap, 0), old - 1)] += near if t <= 1 else far if t < 2 else 0.0
  return weights
