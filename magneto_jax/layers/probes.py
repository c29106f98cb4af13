"""Statistics of the residual stream and of its gradient, taken from the live model.

They cost nothing until they are asked for, by the two variable collections of a call:

  _, taken = model.apply(variables, ..., mutable=[probes.STREAM])      # forward statistics
  zeros = probes.gradient_probes(model, variables, ...)                # then differentiate the loss
  loss({**variables, probes.GRADIENT: zeros})                          # with respect to the zeros

Nothing but these numbers is kept, and nothing of them under remat, so that a thousand layers fit
where their training step does.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

STREAM = "stream"
GRADIENT = "stream_gradient"
COLLECTIONS = (STREAM, GRADIENT)

# What a vector of statistics holds, in this order.
FIELDS = ("second_moment", "covariance", "largest")


def statistics(x: jax.Array) -> jax.Array:
  """[E x^2, covariance, max |x|] of [B, ..., D], in float32.

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


def gradient_probes(model: nn.Module, variables, *args, **kwargs):
  """The zeros to differentiate with respect to: the collection GRADIENT of a call."""
  run = lambda: model.apply(variables, *args, mutable=[GRADIENT], **kwargs)[1][GRADIENT]
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run))


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
