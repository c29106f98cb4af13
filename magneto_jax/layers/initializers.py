"""Parameter init functions: by name, and from the records of a recipe.

An `Initializer` is called as those of `jax.nn.initializers` are, `(key, shape, dtype) -> array`,
and fits wherever they do: `nn.Dense(64, kernel_init=xavier_normal(gain=0.5))`. Leading axes of a
kernel [..., in, out] are a convolution's window: they count in both fans.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from magneto_jax.theory import recipes, records


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
  """How a recipe draws a group's kernels; see `records.Init` for the distributions.

  The gain may be a traced scalar, so that one compiled init serves every value of it.

  Example:
    stack = RECIPES["normformer"](Architecture("decoder", decoder_layers=24)).decoder
    nn.Dense(64, kernel_init=kernel_init(stack.layers[3].ffn.wo))
  """

  def draw(key, shape, dtype=jnp.float32, out_sharding=None):
    del out_sharding
    if init.family == "normal":
      std = init.std(1, 1)  # Whatever the fans: biases and scales have none.
    elif len(shape) < 2:
      raise ValueError(f"{init.family} draws kernels [..., in, out], not {shape=}")
    else:
      *window, fan_in, fan_out = shape
      std = init.std(math.prod(window) * fan_in, math.prod(window) * fan_out)
    if init.family in ("xavier_uniform", "torch_uniform"):
      unit = jax.random.uniform(key, shape, dtype, -math.sqrt(3), math.sqrt(3))
    else:
      unit = jax.random.normal(key, shape, dtype)
    return unit * jnp.asarray(std, dtype)

  return draw


def bias_init(init: records.Init) -> Callable[[int], Initializer]:
  """From the fan-in of the kernel beside it to the init function of a group's bias."""
  if init.bias == "zeros":
    return zero_bias
  return lambda fan_in: torch_bias(fan_in, init.bias_gain)


def dense_init(init: records.Init) -> DenseInit:
  """How a recipe draws a group's projections: `kernel_init` and `bias_init`."""
  return DenseInit(kernel_init(init), bias_init(init))


def xavier_normal(gain: records.Number = 1.0) -> Initializer:
  """N(0, gain^2 2 / (in + out)), not truncated as `jax.nn.initializers.xavier_normal` is.

  Reference: Glorot and Bengio, Understanding the Difficulty of Training Deep Feedforward Neural
  Networks, equation 12.
  """
  return kernel_init(records.Init("xavier_normal", gain))


def xavier_uniform(gain: records.Number = 1.0) -> Initializer:
  """Uniform on +-gain sqrt(6 / (in + out)).

  Reference: Glorot and Bengio, equation 16.
  """
  return kernel_init(records.Init("xavier_uniform", gain))


def lecun_normal(gain: records.Number = 1.0) -> Initializer:
  """N(0, gain^2 / in), not truncated as `jax.nn.initializers.lecun_normal` is.

  Reference: LeCun et al., Efficient BackProp, section 4.6.
  """
  return kernel_init(records.Init("lecun_normal", gain))


def torch_uniform(gain: records.Number = 1.0) -> Initializer:
  """Uniform on +-gain / sqrt(in): the default of torch.nn.Linear's kernel."""
  return kernel_init(records.Init("torch_uniform", gain))


def torch_bias(fan_in: int, gain: records.Number = 1.0) -> Initializer:
  """Uniform on +-gain / sqrt(fan_in): the default of torch.nn.Linear's bias."""

  def draw(key, shape, dtype=jnp.float32, out_sharding=None):
    del out_sharding
    bound = jnp.asarray(gain / math.sqrt(fan_in), dtype)
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * bound

  return draw


def normal(stddev: records.Number) -> Initializer:
  """N(0, stddev^2)."""
  return kernel_init(records.Init("normal", stddev))


def magneto(layers: int) -> Initializer:
  """Magneto's kernels of v, out, wi and wo in one stack; those of q and k are `xavier_normal()`.

  Xavier normal with gain sqrt(log(2 layers)); see `recipes.magneto`.
  """
  return kernel_init(_one_stack(recipes.magneto, layers).ffn.wo)


def deepnet(layers: int) -> Initializer:
  """DeepNet's kernels of v, out, wi and wo in one stack; those of q and k are `xavier_normal()`.

  Xavier normal with gain (8 layers)^-1/4; see `recipes.deepnet`.
  """
  return kernel_init(_one_stack(recipes.deepnet, layers).ffn.wo)


def _one_stack(
  recipe: Callable[[records.Architecture], records.Recipe], layers: int
) -> records.Layer:
  """Any layer of a recipe that treats all layers of a single stack alike."""
  return recipe(records.Architecture("decoder", decoder_layers=layers)).decoder.layers[0]
