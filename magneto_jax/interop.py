"""Linen modules as NNX modules."""

from collections.abc import Mapping
from typing import Any

import flax
from flax import linen as nn


def to_nnx(module: nn.Module, *args, rngs, variables: Mapping[str, Any] | None = None, **kwargs):
  """The Linen module as an NNX module, initialised and ready for use; no mesh is needed.

  It computes what `module.apply` computes, bit for bit, and is called in the same way: a call with
  `deterministic=False` draws from `rngs`, or from those it is given as `rngs=`. Its parameters are
  `nnx.Param`s at the same paths as in Linen.

  Args:
    module: any Linen module, of this library or not.
    *args: example inputs, as `module.init` takes them; their values do not matter.
    rngs: an `nnx.Rngs`, as NNX layers take it; its stream `params` initialises, and `dropout` is
      drawn from in calls (`default` stands in for those that are missing).
    variables: of the Linen module (`{"params": ...}`), instead of example inputs.
    **kwargs: further example inputs.

  Returns:
    An `nnx.bridge.ToNNX`.

  Example:
    ffn = to_nnx(FeedForward(ffn_width=256), jnp.zeros((1, 1, 64)), rngs=nnx.Rngs(0, dropout=1))
    y_BTD = ffn(x_BTD, deterministic=False)
  """
  # A fifth of the package's import time, which only NNX models need to spend.
  from flax import nnx
  from flax.nnx.bridge import variables as bridge_variables

  if variables is None:
    variables = module.init(rngs.params(), *args, **kwargs)
  elif args or kwargs:
    raise TypeError("example inputs beside variables: give one of the two")
  wrapped = nnx.bridge.ToNNX(module, rngs)
  # Kernels that are annotated with axes (nn.with_partitioning) would ask for a mesh.
  with _without_sharding(nnx):
    attributes = bridge_variables.linen_vars_to_nnx_attrs(variables)
  if taken := [name for name in attributes if hasattr(nnx.bridge.ToNNX, name)]:
    raise ValueError(f"an NNX module has attributes of its own named {', '.join(taken)}; rename")
  for name, value in attributes.items():
    setattr(wrapped, name, value)
  return wrapped


def _without_sharding(nnx):
  """Within it NNX variables are made without a mesh, whatever their annotations."""
  if hasattr(nnx, "use_eager_sharding"):
    return nnx.use_eager_sharding(False)
  # Of flax 0.12.0, the last for jax 0.7: the switch above is of 0.12.1 and newer.
  return flax.config.temp_flip_flag("always_shard_variable", False)
