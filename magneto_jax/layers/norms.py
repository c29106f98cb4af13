"""The norms a recipe may name: functions with derivatives of their own, and factories of modules.

Derivatives are written out because what JAX makes of the formulae by itself keeps, and writes to
memory, several wide arrays in float32: on a GPU a norm then costs more than twice what it must.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

NormFactory = Callable[..., nn.Module]

# The statistics of a row, two numbers: what a checkpoint policy may keep for next to nothing.
CHECKPOINT_NAMES = ("norm_mean", "norm_rstd")


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def layer_norm(x, scale, bias, epsilon: float, dtype) -> jax.Array:
  """scale (x - mean(x)) / sqrt(var(x) + epsilon) + bias over the last axis.

  Args:
    x: [..., D].
    scale, bias: [D].
    epsilon, dtype: of the result. All else is done in promote_types(x.dtype, float32).

  Reference: Ba et al., 2016, arXiv 1607.06450, equation 4.
  """
  wide, mean, rstd = _moments(x, epsilon)
  scale, bias = _as_rows((scale, bias), x)
  return ((wide - mean) * (rstd * scale) + bias).astype(dtype)


@layer_norm.defjvp
def _(epsilon, dtype, primals, tangents):
  """With h = (x - mean) / std:  dh = (dx - mean(dx) - h mean(h dx)) / std."""
  (x, scale, bias), (dx, dscale, dbias) = primals, tangents
  wide, mean, rstd = _moments(x, epsilon)
  h, dx = (wide - mean) * rstd, dx.astype(wide.dtype)
  dh = rstd * (dx - _mean(dx) - h * _mean(h * dx))
  y = layer_norm(x, scale, bias, epsilon, dtype)
  scale, dscale, dbias = _as_rows((scale, dscale, dbias), x)
  return y, (dh * scale + h * dscale + dbias).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def rms_norm(x, scale, epsilon: float, dtype) -> jax.Array:
  """scale x / sqrt(mean(x^2) + epsilon) over the last axis; as `layer_norm` otherwise.

  Reference: Zhang and Sennrich, 2019, arXiv 1910.07467, equation 4.
  """
  wide, rstd = _rms(x, epsilon)
  (scale,) = _as_rows((scale,), x)
  return (wide * (rstd * scale)).astype(dtype)


@rms_norm.defjvp
def _(epsilon, dtype, primals, tangents):
  """With h = x / rms:  dh = (dx - h mean(h dx)) / rms."""
  (x, scale), (dx, dscale) = primals, tangents
  wide, rstd = _rms(x, epsilon)
  h, dx = wide * rstd, dx.astype(wide.dtype)
  y = rms_norm(x, scale, epsilon, dtype)
  scale, dscale = _as_rows((scale, dscale), x)
  return y, (rstd * (dx - h * _mean(h * dx)) * scale + h * dscale).astype(dtype)


def _as_rows(parameters, x):
  """[D] as [1, .., D], of the rank of x."""
  return [jnp.expand_dims(p, range(x.ndim - 1)) for p in parameters]


def _mean(x):
  return x.mean(axis=-1, keepdims=True)


def _rms(x, epsilon):
  """(x in the dtype of statistics, 1 / sqrt(mean(x^2) + epsilon)), over the last axis."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  rstd = jax.lax.rsqrt(_mean(wide * wide) + epsilon)
  return wide, checkpoint_name(rstd, CHECKPOINT_NAMES[1])


def _moments(x, epsilon):
  """(x in the dtype of statistics, its mean, 1 / sqrt(var + epsilon)), over the last axis.

  Where x has 16 bits, both moments are taken in one pass, of the distances to the row's first
  number. Their cancellation costs eps (1 + z^2) of the variance, if that number lies z deviations
  off the mean: less than the rounding of x, up to a z of 200. Wider ones take two passes.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  if x.dtype.itemsize < 4:
    distance = wide - wide[..., :1]
    shift = _mean(distance)
    mean, square = wide[..., :1] + shift, _mean(distance * distance)
    # What is too large to be squared has an infinite variance, as it has in two passes.
    var = jnp.where(jnp.isinf(square), square, jnp.maximum(square - shift * shift, 0))
  else:
    mean = _mean(wide)
    var = _mean(jnp.square(wide - mean))
  statistics = mean, jax.lax.rsqrt(var + epsilon)
  return wide, *map(checkpoint_name, statistics, CHECKPOINT_NAMES)


class LayerNorm(nn.Module):
  """`layer_norm` with its parameters, float32; the result has `dtype`, None promotes."""

  epsilon: float = 1e-5
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:])
    return layer_norm(x, scale, bias, self.epsilon, self.dtype or jnp.result_type(x, scale))


class RMSNorm(nn.Module):
  """`rms_norm` with its parameter, float32; the result has `dtype`, None promotes."""

  epsilon: float = 1e-5
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:])
    return rms_norm(x, scale, self.epsilon, self.dtype or jnp.result_type(x, scale))


NORMS: dict[str, NormFactory] = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}


def norm_factory(kind: str, *, epsilon: float = 1e-5, dtype=None) -> NormFactory:
  """A factory `(name=...) -> norm` with float32 parameters and the papers' epsilon.

  Args:
    kind: `layer_norm` or `rms_norm`.
    epsilon: added to the variance (or the mean square) before its square root.
    dtype: of the result; None promotes the input's with the parameters' float32.
  """
  if kind not in NORMS:
    raise ValueError(f"{kind=} must be one of {', '.join(NORMS)}")
  return functools.partial(NORMS[kind], epsilon=epsilon, dtype=dtype)
