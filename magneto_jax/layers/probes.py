"""Statistics of the residual stream and of its gradient, taken from the live model.

They cost nothing until a call asks for them, by two collections of variables:

  STREAM    if it is mutable, the statistics of the stream are left in it;
  GRADIENT  if it is mutable, zeros of its shape are left in it; if it is given, the loss's gradient
            with respect to it holds the statistics of the loss's gradient.

Only these numbers are kept, so that a thousand layers fit where their training step does.
`diagnostics.statistics` takes both from one forward and backward pass.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

STREAM = "stream"
GRADIENT = "stream_gradient"
COLLECTIONS = (STREAM, GRADIENT)

# What a vector of statistics holds, in this order.
FIELDS = ("second_moment", "covariance", "largest", "tokens")


def statistics(x: jax.Array) -> jax.Array:
  """[E x^2, covariance, max |x|, T] of [B, ..., D] with T tokens a sample, in float32.

  The covariance is the mean of x_i x_j over features and over pairs of different tokens i, j of
  a sample (0 where there is one token), without removing means: kernels of zero mean leave none.
  """
  x_BTD = x.reshape(x.shape[0], -1, x.shape[-1]).astype(jnp.float32)
  batch, tokens, width = x_BTD.shape
  squares = jnp.sum(jnp.square(x_BTD))
  pairs = jnp.sum(jnp.square(jnp.sum(x_BTD, axis=1))) - squares
  return jnp.stack(
    [
      squares / x_BTD.size,
      pairs / max(batch * width * tokens * (tokens - 1), 1),
      jnp.max(jnp.abs(x_BTD)),
      jnp.float32(tokens),
    ]
  )


def observe_stream(module: nn.Module, name: str, x: jax.Array) -> None:
  """Leaves the statistics of x in the collection STREAM, if the call asks for it."""
  if module.is_mutable_collection(STREAM) and not module.is_initializing():
    replace = {"init_fn": lambda: None, "reduce_fn": lambda _, new: new}
    module.sow(STREAM, name, statistics(x), **replace)


def observe_gradient(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
  """x; the loss's gradient with respect to the probe of this name is statistics(dloss/dx)."""
  if module.is_initializing():
    return x
  if module.is_mutable_collection(GRADIENT):
    module.variable(GRADIENT, name, jnp.zeros, (len(FIELDS),), jnp.float32)
  elif module.has_variable(GRADIENT, name):
    return _probed(x, module.get_variable(GRADIENT, name))
  return x


@jax.custom_vjp
def _probed(x: jax.Array, probe: jax.Array) -> jax.Array:
  del probe
  return x


def _forward(x, probe):
  del probe
  return x, None


def _backward(_, g):
  return g, statistics(g)


_probed.defvjp(_forward, _backward)
