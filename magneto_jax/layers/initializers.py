"""Parameter init functions from the records of a recipe."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from magneto_jax.theory import records


def zero_bias(fan_in: int) -> Initializer:
  """Biases start at zero, whatever the fan-in."""
  del fan_in
  return jax.nn.initializers.zeros


class DenseInit(NamedTuple):
  """How one projection is drawn.

  Attributes:
    kernel: an init function `(key, shape [fan_in, fan_out], dtype) -> array`.
    bias: from the kernel's fan-in to the init function of the bias.
  """

  kernel: Initializer = jax.nn.initializers.xavier_normal()
  bias: Callable[[int], Initializer] = zero_bias


def kernel_init(init: records.Init) -> Initializer:
  """The init function of a kernel [..., in, out]; see `records.Init` for the distributions.

  Leading axes are a convolution's window: they count in both fans, as in `jax.nn.initializers`.
  The gain may be a traced scalar, so that one compiled init serves every value of it.
  """

  def draw(key, shape, dtype=jnp.float32, out_sharding=None):
    del out_sharding
    *window, fan_in, fan_out = shape
    std = init.std(math.prod(window) * fan_in, math.prod(window) * fan_out)
    if init.family in ("xavier_uniform", "torch_uniform"):
      unit = jax.random.uniform(key, shape, dtype, -math.sqrt(3), math.sqrt(3))
    else:
      unit = jax.random.normal(key, shape, dtype)
    return unit * jnp.asarray(std, dtype)

  return draw


def bias_init(init: records.Init) -> Callable[[int], Initializer]:
  """From the fan-in of the kernel beside it to the bias's init function."""
  if init.bias == "zeros":
    return zero_bias

  def from_fan_in(fan_in: int) -> Initializer:
    def draw(key, shape, dtype=jnp.float32, out_sharding=None):
      del out_sharding
      bound = jnp.asarray(init.bias_gain / math.sqrt(fan_in), dtype)
      return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * bound

    return draw

  return from_fan_in


def dense_init(init: records.Init) -> DenseInit:
  """The init functions of a projection from a recipe's record."""
  return DenseInit(kernel_init(init), bias_init(init))
