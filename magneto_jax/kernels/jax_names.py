"""Names of JAX that were others in releases which Colab still has, each under one name.

JAX speaks of `manual_axis_type` from 0.10.0 on and of `vma` before; of `pcast` where 0.8.0 and
older had `pvary`; and 0.7 has `enable_x64` among its experiments. Once setup.cfg asks for
jax>=0.10.0 this file can go.
"""

import contextlib
from collections.abc import Iterable
from typing import Any

import jax

_HAS_AXIS_TYPE = hasattr(jax.sharding, "ManualAxisType")


def varying(aval: Any) -> frozenset[str]:
  """The axes of a shard_map's mesh over which a value differs, from its `jax.typeof`."""
  return aval.manual_axis_type.varying if _HAS_AXIS_TYPE else aval.vma


def varying_over(axes: Iterable[str] = ()) -> dict[str, Any]:
  """The keyword that says of an abstract value that it varies over `axes`, and over no others."""
  axes = frozenset(axes)
  if _HAS_AXIS_TYPE:
    return {"manual_axis_type": jax.sharding.ManualAxisType(varying=axes)}
  return {"vma": axes}


def vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """The array, marked as varying over `axes`, over none of which it varied before."""
  return (
    jax.lax.pcast(x, axes, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(x, axes)
  )


def enable_x64(enabled: bool) -> contextlib.AbstractContextManager:
  """Whether arrays may have 64 bits, within a `with`."""
  if hasattr(jax, "enable_x64"):
    return jax.enable_x64(enabled)
  from jax.experimental import enable_x64 as experimental

  return experimental(enabled)
