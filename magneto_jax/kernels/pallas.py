"""What the Pallas kernels of all platforms share."""

import jax
import jax.numpy as jnp


class Refs:
  """References by name."""

  def __init__(self, items):
    self.__dict__.update(items)


def matmul(left, right, dims=((1,), (0,))):
  """A product with float32 sums; float32 factors are not rounded to a shorter format."""
  exact = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(
    left, right, (dims, ((), ())), precision=exact, preferred_element_type=jnp.float32
  )
