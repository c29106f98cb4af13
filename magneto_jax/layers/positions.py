"""Position encodings: sinusoidal, rotary and xPos (learned ones are an ordinary `nn.Embed`)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def sinusoidal(positions: jax.Array, width: int, *, max_period: float = 10_000.0) -> jax.Array:
  """The sinusoidal encoding [sin(p f_0) ... sin(p f_h-1), cos(p f_0) ... cos(p f_h-1)].

  With h = width // 2 and f_i = max_period^(-i / (h - 1)), as in tensor2tensor and fairseq.

  Args:
    positions: integers of any shape [...].
    width: the number of channels; an odd width ends in a zero.
    max_period: the longest wavelength over 2 pi.

  Returns:
    float32 [..., width].

  Reference: Attention Is All You Need, arXiv 1706.03762, section 3.5.
  Differs from the paper, whose sines and cosines alternate and whose exponent is -2i / width.
  """
  half = width // 2
  frequencies = max_period ** (-np.arange(half, dtype=np.float32) / max(half - 1, 1))
  angles = positions[..., None].astype(jnp.float32) * frequencies.reshape(
    (1,) * positions.ndim + (half,)
  )
  encoding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
  return jnp.pad(encoding, [(0, 0)] * positions.ndim + [(0, width % 2)])


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, *, max_period: float = 10_000.0):
  """Rotates the channel pairs (i, i + H/2) of queries or keys by the angle p max_period^(-2i/H).

  A query at p and a key at q then meet in a score that depends on p and q only by p - q.

  Args:
    x_BTNH: queries or keys; H must be even.
    positions_BT: integers.
    max_period: the longest wavelength over 2 pi.

  Returns:
    The rotated array, in the dtype of x; angles are computed in float32 or wider.

  Reference: RoFormer, arXiv 2104.09864, section 3.2.2.
  Differs from the paper, which pairs the channels (2i, 2i + 1): a permutation of the channels.
  """
  wide, cos, sin = _rotation(x_BTNH, positions_BT, max_period)
  first, second = jnp.split(x_BTNH.astype(wide), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x_BTNH.dtype)


def _rotation(x_BTNH, positions_BT, max_period: float):
  """The dtype to compute in, and cosine and sine [B, T, 1, H/2] of p max_period^(-2i/H)."""
  head_dim = x_BTNH.shape[-1]
  if head_dim % 2:
    raise ValueError(f"{head_dim=} must be even for rotary positions")
  half = head_dim // 2
  wide = jnp.promote_types(x_BTNH.dtype, jnp.float32)
  frequencies = max_period ** (-np.arange(half) / half)
  angles = positions_BT[..., None, None].astype(wide) * jnp.asarray(frequencies, wide).reshape(
    1, 1, 1, half
  )
  return wide, jnp.cos(angles), jnp.sin(angles)


def rotary(q_BTNH: jax.Array, k_BTKH: jax.Array, positions_BT: jax.Array):
  """Rotary positions, as `Attention.rotation` takes them: `rotate` on queries and keys."""
  return rotate(q_BTNH, positions_BT), rotate(k_BTKH, positions_BT)


def xpos(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  positions_BT: jax.Array,
  *,
  scale_base: float = 512.0,
  max_period: float = 10_000.0,
) -> tuple[jax.Array, jax.Array]:
  """xPos: rotates the pairs (2i, 2i + 1), and lets scores decay with the distance.

  With zeta_i = (2i + 0.4 H) / (1.4 H), a query at p is rotated by p max_period^(-2i/H) and scaled
  by zeta_i^(p / scale_base), a key at q is scaled by zeta_i^(-q / scale_base): their score depends
  on p and q only by p - q, and decays with it as zeta_i^((p - q) / scale_base).

  Args:
    q_BTNH: queries; H must be even.
    k_BTKH: keys.
    positions_BT: integers. float32 and bfloat16 hold the scales up to 70 scale_base, float16 up to
      8 scale_base; beyond they overflow.
    scale_base: a larger one decays slower.
    max_period: the longest wavelength over 2 pi.

  Returns:
    Queries and keys, in their dtypes; angles and scales are computed in float32 or wider.

  Reference: A Length-Extrapolatable Transformer, arXiv 2212.10554, algorithm 1.
  Differs from torchscale, which centres the positions of each call: the scores are the same, but
  its keys cannot be cached after the rotation.
  """
  wide, cos, sin = _rotation(q_BTNH, positions_BT, max_period)
  half, head_dim = q_BTNH.shape[-1] // 2, q_BTNH.shape[-1]
  zeta = (2 * np.arange(half) + 0.4 * head_dim) / (1.4 * head_dim)
  exponents = positions_BT[..., None, None].astype(wide) / scale_base
  scale = jnp.exp(exponents * jnp.asarray(np.log(zeta), wide).reshape(1, 1, 1, half))

  def rotated(x_BTNH, scale):
    pairs = x_BTNH.astype(wide).reshape(*x_BTNH.shape[:-1], half, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    pairs = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return (pairs * scale[..., None]).reshape(x_BTNH.shape).astype(x_BTNH.dtype)

  return rotated(q_BTNH, scale), rotated(k_BTKH, 1 / scale)


# (queries, keys, positions) -> (queries, keys), as `Attention.rotation` takes it.
Rotation = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
ROTATIONS: dict[str, Rotation] = {"rotary": rotary, "xpos": xpos}
KINDS = ("learned", "sinusoidal", *ROTATIONS, "none")
