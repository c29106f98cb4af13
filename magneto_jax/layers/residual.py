"""The residual rule: the one place where a recipe's norm sites and scales are run."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax.layers import probes
from magneto_jax.layers.norms import NormFactory, norm_factory
from magneto_jax.theory import records

# theory/ imports no jax, so its records become pytrees here: numbers are leaves, records in records
# are nodes, and all other fields are structure, which jit and scan treat as static.
for _record in records.RECORDS:
  _children = records.children(_record)
  _static = [f.name for f in dataclasses.fields(_record) if f.name not in _children]
  jax.tree_util.register_dataclass(_record, data_fields=_children, meta_fields=_static)


def drop_path(x: jax.Array, rate: jax.Array | float, key: jax.Array) -> jax.Array:
  """Stochastic depth: zeroes whole samples of [B, ...] with probability `rate`, rescales the rest.

  Reference: Deep Networks with Stochastic Depth, arXiv 1603.09382.
  """
  shape = (x.shape[0],) + (1,) * (x.ndim - 1)
  keep = 1.0 - jnp.asarray(rate, jnp.float32)
  scale = jax.random.bernoulli(key, keep, shape) / jnp.maximum(keep, jnp.finfo(jnp.float32).tiny)
  return x * scale.astype(x.dtype)


class Residual(nn.Module):
  """x <- post(skip * x + branch * drop_path(dropout(out(f(in_scale * in(x)))))).

  Which norms and scales exist is read from a recipe's `Sublayer`; its numbers may be traced.
  The sum is taken in float32 or wider and cast back, so a bfloat16 stream stays bfloat16.
  `layers.probes` can be asked for statistics of the sum, before a norm at the site post, and of the
  gradient with respect to the output.

  Attributes:
    norm: factory `(name=...) -> norm` of the norms at the sites in, out and post.
    dropout_rate: of the branch, after its norm.
  """

  norm: NormFactory = norm_factory("layer_norm")
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    f: Callable[[jax.Array], tuple[jax.Array, Any]],
    sublayer: records.Sublayer,
    *,
    drop_path_rate: jax.Array | float | None = None,
    deterministic: bool = True,
  ) -> tuple[jax.Array, Any]:
    """Applies the rule around `f`.

    Args:
      x: the residual stream [B, ..., D].
      f: the sublayer `h -> (y, aux)`, both of x's shape; aux is handed through.
      sublayer: the record that is read.
      drop_path_rate: the probability of dropping a sample's branch; None for no drop-path.
      deterministic: False needs an rng named `dropout`.

    Returns:
      The new stream, in x's dtype, and f's aux.
    """
    dtype, wide = x.dtype, jnp.promote_types(x.dtype, jnp.float32)

    def scaled(array, scale: records.Scale, name: str):
      if scale.learned is None:
        value = jnp.asarray(scale.value, wide)
      else:
        shape = () if scale.learned == "scalar" else (x.shape[-1],)
        init = lambda key, shape: jnp.full(shape, scale.value, jnp.float32)
        value = self.param(name, init, shape).astype(wide)
      return array.astype(wide) * value.reshape((1,) * (array.ndim - value.ndim) + value.shape)

    def normed(array, site: str):
      return self.norm(name=f"{site}_norm")(array) if site in sublayer.norms else array

    h = scaled(normed(x, "in"), sublayer.in_scale, "in_scale").astype(dtype)
    y, aux = f(h)
    y = nn.Dropout(self.dropout_rate)(normed(y, "out"), deterministic=deterministic)
    if drop_path_rate is not None and not deterministic:
      y = drop_path(y, drop_path_rate, self.make_rng("dropout"))
    x = scaled(x, sublayer.skip, "skip") + scaled(y, sublayer.branch, "branch")
    probes.observe_stream(self, "sum", x)
    # The norm may promote, by its own dtype or its parameters': the stream must not.
    x = normed(x.astype(dtype), "post").astype(dtype)
    return probes.observe_gradient(self, "out", x), aux
