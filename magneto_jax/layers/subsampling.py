"""Spectrograms as a quarter as many vectors: the front ends of speech models.

Each is called with spectrograms [B, T, M] and how many frames each utterance has, and gives vectors
[B, T', D] and how many of them are the utterance's own. These do not depend on how far the batch is
padded: before every convolution all that lies behind an utterance is 0.

At the start a convolution, with its gates or its ReLU, puts out on average the mean square of what
it reads; the last product is the `projection_init`'s affair. VGG's maxima make more of it.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax import sharding
from magneto_jax.layers.initializers import DenseInit, lecun_normal
from magneto_jax.layers.log_mel import at_least_0, frame_mask

# 1 / sqrt(E sigmoid(b)^2) of b ~ N(0, 1): a gated unit of unit inputs then has a unit variance.
_GATED = 1.8460
# Of a ReLU, which halves the mean square.
_RELU = math.sqrt(2)


class ConvSubsampling(nn.Module):
  """Two convolutions over time, of stride 2 and with gates: 4 frames become a vector.

    x <- c a * sigmoid(b),   [a, b] = conv(x),   c = 1.846

  with windows of k frames, (k - 1) / 2 zeros on both sides. The first has `hidden` channels, which
  its gates halve, the second 2 D.

  Attributes:
    width: D.
    hidden: channels of the first, before its gates.
    kernel_size: k, odd.
    projection_init: init functions of the second convolution.
    dtype: of the computation; parameters are float32.

  Reference: fairseq's `Conv1dSubsampler`; fairseq S2T, arXiv 2010.05171.
  Differs: fairseq has no c, and torch's default init, by which variances fall: it multiplies what
  comes out by sqrt(D).
  """

  width: int
  hidden: int = 1024
  kernel_size: int = 5
  projection_init: DenseInit = DenseInit()
  dtype: jnp.dtype | None = None

  @staticmethod
  def lengths(frames):
    """T', twice floor((T - 1) / 2) + 1, of an integer or of integers."""
    return _halved(_halved(frames))

  @nn.compact
  def __call__(self, x_BTM: jax.Array, frames_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors [B, T', D], and how many each utterance has."""
    _check(x_BTM, self.lengths)
    k, half = self.kernel_size, self.hidden // 2
    if k % 2 == 0 or self.hidden % 2:
      raise ValueError(f"kernel_size={k} must be odd, and hidden={self.hidden} even")
    inits = (
      ("conv_0", self.hidden, DenseInit(lecun_normal()), k * x_BTM.shape[-1]),
      ("projection", 2 * self.width, self.projection_init, k * half),
    )
    x = x_BTM
    for name, features, init, fan_in in inits:
      conv = nn.Conv(
        features,
        (k,),
        strides=2,
        padding=k // 2,
        kernel_init=init.kernel,
        bias_init=init.bias(fan_in),
        dtype=self.dtype,
        name=name,
      )
      values, gates = jnp.split(conv(_own(x, frames_B)), 2, axis=-1)
      x, frames_B = _GATED * values * nn.sigmoid(gates), _halved(frames_B)
    return _own(x, frames_B), frames_B


class VGGSubsampling(nn.Module):
  """Two blocks of two convolutions of 3 x 3 and a maximum over 2 x 2, then a matrix.

  A remainder of a frame, or of a bin, is dropped by the maxima: T' = (T // 2) // 2.

  Attributes:
    width: D.
    channels: of the two blocks.
    projection_init: init functions of the matrix, of (M // 2 // 2) channels[1] inputs.
    dtype: of the computation; parameters are float32.

  Reference: Foundation Transformers, arXiv 2210.06423 (a VGG front end from 10 to 40 ms), by the
  layers of ESPnet's `VGG2L`.
  Differs from that one, whose first maximum is over 3 frames and which makes a vector of 6.
  """

  width: int
  channels: tuple[int, int] = (64, 128)
  projection_init: DenseInit = DenseInit()
  dtype: jnp.dtype | None = None

  @staticmethod
  def lengths(frames):
    """T' of an integer or of integers."""
    return frames // 2 // 2

  @nn.compact
  def __call__(self, x_BTM: jax.Array, frames_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors [B, T', D], and how many each utterance has."""
    _check(x_BTM, self.lengths)
    x_BTMC = x_BTM[..., None]
    for i, features in enumerate(c for c in self.channels for _ in range(2)):
      conv = nn.Conv(
        features,
        (3, 3),
        padding=1,
        kernel_init=lecun_normal(_RELU),
        dtype=self.dtype,
        name=f"vgg_{i}",
      )
      x_BTMC = nn.relu(conv(_own(x_BTMC, frames_B)))
      if i % 2:
        x_BTMC, frames_B = nn.max_pool(x_BTMC, (2, 2), strides=(2, 2)), frames_B // 2
    return _own(_flat(self, x_BTMC), frames_B), frames_B


class Conv2dSubsampling(nn.Module):
  """Two convolutions of 3 x 3 and stride 2 without padding, of D channels, then a matrix.

  T' = ((T - 1) // 2 - 1) // 2.

  Attributes:
    width: D.
    projection_init: init functions of the matrix, of D ((M - 1) // 2 - 1) // 2 inputs.
    dtype: of the computation; parameters are float32.

  Reference: ESPnet's `Conv2dSubsampling`; Speech-Transformer, Dong et al., ICASSP 2018.
  """

  width: int
  projection_init: DenseInit = DenseInit()
  dtype: jnp.dtype | None = None

  @staticmethod
  def lengths(frames):
    """T' of an integer or of integers; 0 below 7."""
    return at_least_0(((frames - 1) // 2 - 1) // 2)

  @nn.compact
  def __call__(self, x_BTM: jax.Array, frames_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors [B, T', D], and how many each utterance has."""
    _check(x_BTM, self.lengths)
    x_BTMC = _own(x_BTM[..., None], frames_B)
    for i in range(2):
      conv = nn.Conv(
        self.width,
        (3, 3),
        strides=(2, 2),
        padding="VALID",
        kernel_init=lecun_normal(_RELU),
        dtype=self.dtype,
        name=f"conv_{i}",
      )
      x_BTMC = nn.relu(conv(_whole(x_BTMC)))
    frames_B = self.lengths(frames_B)
    return _own(_flat(self, x_BTMC), frames_B), frames_B


def _halved(frames):
  """What a convolution of stride 2 and half a window of padding leaves of frames."""
  return (frames - 1) // 2 + 1


def _check(x_BTM: jax.Array, lengths) -> None:
  """Raises unless there is a vector to come out."""
  if x_BTM.ndim != 3:
    raise ValueError(f"spectrograms {list(x_BTM.shape)} are not [B, T, M]")
  for what, size in zip(("frames", "bins"), x_BTM.shape[1:], strict=True):
    if lengths(size) < 1:
      raise ValueError(f"{size} {what} are too few: the front end makes nothing of them")


def _whole(x: jax.Array) -> jax.Array:
  """x with its rows alone cut over a mesh.

  On a mesh that cuts both a convolution's positions and its channels, XLA gives the kernel of one
  with strides a wrong gradient.
  """
  return sharding.constrain(x, "batch", *(None,) * (x.ndim - 1))


def _own(x: jax.Array, frames_B: jax.Array) -> jax.Array:
  """x [B, T, ...] with 0 behind each utterance's frames."""
  own_BT = frame_mask(frames_B, x.shape[1])
  return _whole(jnp.where(own_BT.reshape(*own_BT.shape, *(1,) * (x.ndim - 2)), x, 0))


def _flat(module: VGGSubsampling | Conv2dSubsampling, x_BTMC: jax.Array) -> jax.Array:
  """The projection [B, T, D] of all channels of all bins of a frame."""
  x_BTF = _whole(x_BTMC.reshape(*x_BTMC.shape[:2], -1))
  projection = nn.Dense(
    module.width,
    kernel_init=module.projection_init.kernel,
    bias_init=module.projection_init.bias(x_BTF.shape[-1]),
    dtype=module.dtype,
    name="projection",
  )
  return projection(x_BTF)
