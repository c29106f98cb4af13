"""Position encodings: sinusoidal and rotary (learned ones are an ordinary `nn.Embed`)."""

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("learned", "sinusoidal", "rotary", "none")


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


def rotary(x_BTNH: jax.Array, positions_BT: jax.Array, *, max_period: float = 10_000.0):
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
  head_dim = x_BTNH.shape[-1]
  if head_dim % 2:
    raise ValueError(f"{head_dim=} must be even for rotary positions")
  half = head_dim // 2
  dtype = jnp.promote_types(x_BTNH.dtype, jnp.float32)
  frequencies = max_period ** (-np.arange(half) / half)
  angles = positions_BT[..., None, None].astype(dtype) * jnp.asarray(frequencies, dtype).reshape(
    1, 1, 1, half
  )
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x_BTNH.astype(dtype), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x_BTNH.dtype)
