"""Block, Stack and its caches: a recipe's layers, scanned over depth."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn

from magneto_jax.layers.attention import KVCache
from magneto_jax.layers.initializers import dense_init
from magneto_jax.layers.norms import NormFactory, norm_factory
from magneto_jax.layers.residual import Residual
from magneto_jax.theory import records

# What the forward pass of a layer leaves for its backward pass: all, nothing, or matrix products.
REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Context(NamedTuple):
  """What every layer is given beside the stream; see `Attention.__call__`."""

  positions_BT: jax.Array | None = None
  segment_ids: tuple[jax.Array, jax.Array] | None = None


class Block(nn.Module):
  """One layer: self-attention, then the feed-forward network, each under the residual rule.

  Attributes:
    attention: factory of the attention; called with inits, norm, head scale and name.
    feed_forward: factory of the feed-forward network; called with inits, norm and name.
    norm: factory of all norms.
    dropout_rate: of both branches.
  """

  attention: Callable[..., nn.Module]
  feed_forward: Callable[..., nn.Module]
  norm: NormFactory = norm_factory("layer_norm")
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    layer: records.Layer,
    context: Context = Context(),
    *,
    cache: KVCache | None = None,
    drop_path_rate: jax.Array | float | None = None,
    deterministic: bool = True,
  ) -> tuple[jax.Array, KVCache | None]:
    """Runs the layer that the record describes; its numbers are scalars, perhaps traced."""
    if layer.cross_attention is not None:
      raise ValueError("this block has no cross-attention: the record is of an encoder-decoder")

    def residual(name, f, x, sublayer):
      rule = Residual(self.norm, self.dropout_rate, name=f"{name}_residual")
      options = {"drop_path_rate": drop_path_rate, "deterministic": deterministic}
      return rule(x, f, sublayer, **options)

    def inner(sublayer):
      return self.norm if "mid" in sublayer.norms else None

    sub = layer.self_attention
    attention = self.attention(
      qk_init=dense_init(sub.qk),
      v_init=dense_init(sub.v),
      out_init=dense_init(sub.out),
      mid_norm=inner(sub),
      head_scale=sub.head_scale,
      name="self_attention",
    )

    def attend(h):
      return attention(h, **context._asdict(), cache=cache, deterministic=deterministic)

    x_BTD, cache = residual("self_attention", attend, x_BTD, sub)

    sub = layer.ffn
    ffn = self.feed_forward(
      wi_init=dense_init(sub.wi), wo_init=dense_init(sub.wo), mid_norm=inner(sub), name="ffn"
    )
    x_BTD, _ = residual("ffn", lambda h: (ffn(h, deterministic=deterministic), None), x_BTD, sub)
    return x_BTD, cache


class _Repeat(nn.Module):
  """The body of the scan: a segment's pattern of layers, once."""

  block: Callable[..., Block]
  deterministic: bool

  @nn.compact
  def __call__(self, carry, repeat, context: Context):
    x_BTD, caches = carry
    pattern, drop_path_rates, index = repeat
    updated = []
    for i, layer in enumerate(pattern):
      cache = None if caches is None else caches[i]._replace(layer=index)
      x_BTD, cache = self.block(name=f"block_{i}")(
        x_BTD,
        layer,
        context,
        cache=cache,
        drop_path_rate=None if drop_path_rates is None else drop_path_rates[i],
        deterministic=self.deterministic,
      )
      # Every repeat writes its own layer, behind the same rows.
      if cache is not None:
        cache = cache._replace(layer=caches[i].layer, length=caches[i].length)
      updated.append(cache)
    return (x_BTD, None if caches is None else tuple(updated)), None


class Stack(nn.Module):
  """A recipe's segments, each scanned over its repeats, and the final norm.

  Parameters lie under `segment_<i>/block_<j>/...` with a leading axis of the segment's repeats,
  whether the scan is a loop (`unroll=1`) or unrolled: one tree, equal up to rounding.

  Attributes:
    block: factory `(name=...) -> Block`.
    norm: factory of the final norm.
    drop_path_rate: of the last layer; the first has 0, those between lie on the line.
    remat: one of REMAT.
    unroll: how many repeats the scan's body holds; -1 for all.
  """

  block: Callable[..., Block]
  norm: NormFactory = norm_factory("layer_norm")
  drop_path_rate: float = 0.0
  remat: str = "none"
  unroll: int = 1

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    recipe: records.Stack,
    context: Context = Context(),
    *,
    caches: tuple[tuple[KVCache, ...], ...] | None = None,
    deterministic: bool = True,
  ) -> tuple[jax.Array, tuple[tuple[KVCache, ...], ...] | None]:
    """Runs all layers.

    Args:
      x_BTD: the stream after the embedding.
      recipe: the stack's record; its numbers may be traced (`records.as_arrays`).
      context: positions and segment ids.
      caches: one a block of each segment's pattern (`init_caches`), or None.
      deterministic: False needs an rng named `dropout`.

    Returns:
      The stream [B, T, D] and the caches, extended by T rows.
    """
    if self.remat not in REMAT:
      raise ValueError(f"remat={self.remat!r} must be one of {', '.join(REMAT)}")
    body = _Repeat
    if self.remat != "none":
      body = nn.remat(body, prevent_cse=False, policy=REMAT[self.remat])
    rates = iter(np.linspace(0.0, self.drop_path_rate, recipe.num_layers, dtype=np.float32))
    updated = []
    for i, segment in enumerate(recipe.segments):
      drop_path_rates = None
      if self.drop_path_rate:
        table = np.array([[next(rates) for _ in segment.pattern] for _ in range(segment.repeats)])
        drop_path_rates = tuple(table.T)
      run = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=segment.repeats,
        unroll=segment.repeats if self.unroll == -1 else self.unroll,
      )(self.block, deterministic, name=f"segment_{i}")
      carry = (x_BTD, None if caches is None else caches[i])
      repeat = (records.per_layer(segment), drop_path_rates, np.arange(segment.repeats))
      (x_BTD, extended), _ = run(carry, repeat, context)
      updated.append(extended)
    if recipe.final_norm:
      x_BTD = self.norm(name="final_norm")(x_BTD)
    return x_BTD, None if caches is None else _advance(tuple(updated), x_BTD.shape[1])


def _advance(caches, steps: int):
  is_cache = lambda node: isinstance(node, KVCache)
  advance = lambda cache: cache._replace(length=cache.length + steps)
  return jax.tree.map(advance, caches, is_leaf=is_cache)


def init_caches(
  recipe: records.Stack, *, batch: int, length: int, kv_heads: int, head_dim: int, dtype
) -> tuple[tuple[KVCache, ...], ...]:
  """Empty caches for `length` tokens, one a block of each segment's pattern."""

  def empty(layers):
    return KVCache.empty(batch, length, kv_heads, head_dim, layers=layers, dtype=dtype)

  return tuple(
    tuple(empty(segment.repeats) for _ in segment.pattern) for segment in recipe.segments
  )
