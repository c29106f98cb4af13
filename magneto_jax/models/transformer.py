"""Block, Stack and its caches: a recipe's layers, scanned over depth."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from magneto_jax import kernels, sharding
from magneto_jax.kernels import RelativeBias
from magneto_jax.layers import norms, probes
from magneto_jax.layers.attention import KVCache
from magneto_jax.layers.initializers import dense_init
from magneto_jax.layers.norms import NormFactory, norm_factory
from magneto_jax.layers.residual import Residual
from magneto_jax.theory import records

# What the forward pass of a layer leaves for its backward pass: all, matrix products (those within
# attention as one) and the statistics of norms, attention's outputs alone, or nothing.
REMAT = {
  "none": None,
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(
      *kernels.CHECKPOINT_NAMES, *norms.CHECKPOINT_NAMES
    ),
  ),
  "attention": jax.checkpoint_policies.save_only_these_names(*kernels.CHECKPOINT_NAMES),
  "full": jax.checkpoint_policies.nothing_saveable,
}


class Context(NamedTuple):
  """What every layer is given beside the stream; see `Attention.__call__`.

  Attributes:
    positions_BT, segment_ids, bias, q_offset: of the self-attention.
    memory_BSD, memory_segment_ids, memory_bias: of the cross-attention.
  """

  positions_BT: jax.Array | None = None
  segment_ids: tuple[jax.Array, jax.Array] | None = None
  bias: jax.Array | RelativeBias | None = None
  q_offset: jax.Array | None = None
  memory_BSD: jax.Array | None = None
  memory_segment_ids: tuple[jax.Array, jax.Array] | None = None
  memory_bias: jax.Array | RelativeBias | None = None


class BlockCaches(NamedTuple):
  """The caches of a block's attentions.

  Attributes:
    self_attention: of the tokens that are written one after the other.
    cross_attention: of a memory; None where there is none.
    prefix: of tokens that stand before all those of `self_attention`, written by an earlier call
      and read only; None where there are none.
  """

  self_attention: KVCache
  cross_attention: KVCache | None = None
  prefix: KVCache | None = None

  def at(self, layer: jax.Array) -> "BlockCaches":
    """The caches with their slice set: `layer` of the scanned segment."""
    return BlockCaches(*(None if cache is None else cache._replace(layer=layer) for cache in self))


Caches = tuple[tuple[BlockCaches, ...], ...]


class Block(nn.Module):
  """One layer: the record's sublayers in their order, each under the residual rule.

  Attributes:
    attention: factory of the self-attention; called with inits, norms, head scale and name.
    feed_forward: factory of the feed-forward network; called with inits, norm and name.
    cross_attention: factory of the cross-attention, likewise; None if no layer has one.
    norm: factory of all norms, but for what `ffn_norm` makes.
    ffn_norm: factory of the norms around and within the feed-forward network; None: `norm`.
    dropout_rate: of all branches.
  """

  attention: Callable[..., nn.Module]
  feed_forward: Callable[..., nn.Module]
  cross_attention: Callable[..., nn.Module] | None = None
  norm: NormFactory = norm_factory("layer_norm")
  ffn_norm: NormFactory | None = None
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    layer: records.Layer,
    context: Context = Context(),
    *,
    caches: BlockCaches | None = None,
    drop_path_rate: jax.Array | float | None = None,
    deterministic: bool = True,
  ) -> tuple[jax.Array, BlockCaches | None]:
    """Runs the layer that the record describes; its numbers are scalars, perhaps traced."""
    arguments = {
      "self_attention": {
        "positions_BT": context.positions_BT,
        "segment_ids": context.segment_ids,
        "bias": context.bias,
        "prefix": None if caches is None else caches.prefix,
      },
      "cross_attention": {
        "memory_BSD": context.memory_BSD,
        "segment_ids": context.memory_segment_ids,
        "bias": context.memory_bias,
      },
    }
    for name, sublayer in layer.sublayers.items():
      if name == "ffn":
        ffn = self._feed_forward(sublayer)
        f = lambda h, ffn=ffn: (ffn(h, deterministic=deterministic), None)
      else:
        f = functools.partial(
          self._attention(name, sublayer),
          **arguments[name],
          q_offset=context.q_offset,
          cache=None if caches is None else getattr(caches, name),
          deterministic=deterministic,
        )
      x_BTD, cache = Residual(self._norm(name), self.dropout_rate, name=f"{name}_residual")(
        x_BTD, f, sublayer, drop_path_rate=drop_path_rate, deterministic=deterministic
      )
      x_BTD = sharding.constrain(x_BTD, "batch", "length", None)
      if cache is not None:
        caches = caches._replace(**{name: cache})
    return x_BTD, caches

  def _attention(self, name: str, sublayer: records.Attention) -> nn.Module:
    make = self.attention if name == "self_attention" else self.cross_attention
    if make is None:
      raise ValueError(f"this block has no {name}: the record is of an encoder-decoder")
    return make(
      qk_init=dense_init(sublayer.qk),
      v_init=dense_init(sublayer.v),
      out_init=dense_init(sublayer.out),
      mid_norm=self._inner(name, sublayer),
      qk_norm=self.norm if sublayer.qk_norm else None,
      qk_norm_scope=sublayer.qk_norm or "head",
      head_scale=sublayer.head_scale,
      name=name,
    )

  def _feed_forward(self, sublayer: records.FeedForward) -> nn.Module:
    return self.feed_forward(
      wi_init=dense_init(sublayer.wi),
      wo_init=dense_init(sublayer.wo),
      mid_norm=self._inner("ffn", sublayer),
      name="ffn",
    )

  def _norm(self, name: str) -> NormFactory:
    return self.norm if name != "ffn" or self.ffn_norm is None else self.ffn_norm

  def _inner(self, name: str, sublayer: records.Sublayer) -> NormFactory | None:
    return self._norm(name) if "mid" in sublayer.norms else None


class _Repeat(nn.Module):
  """The body of the scan: a segment's pattern of layers, once."""

  block: Callable[..., Block]
  deterministic: bool
  return_hidden_states: bool

  @nn.compact
  def __call__(self, carry, repeat, context: Context):
    x_BTD, caches = carry
    pattern, drop_path_rates, index = repeat
    updated, streams = [], []
    for i, layer in enumerate(pattern):
      x_BTD, extended = self.block(name=f"block_{i}")(
        x_BTD,
        layer,
        context,
        caches=None if caches is None else caches[i].at(index),
        drop_path_rate=None if drop_path_rates is None else drop_path_rates[i],
        deterministic=self.deterministic,
      )
      streams.append(x_BTD)
      if caches is not None:
        # Every repeat writes its own layer, behind the same rows.
        own = extended.self_attention._replace(length=caches[i].self_attention.length)
        updated.append(extended._replace(self_attention=own).at(caches[i].self_attention.layer))
    carry = x_BTD, None if caches is None else tuple(updated)
    return carry, jnp.stack(streams) if self.return_hidden_states else None


class StackOutput(NamedTuple):
  """What a stack returns.

  Attributes:
    x_BTD: the stream after the final norm.
    caches: extended by T rows; None without caches.
    hidden_LBTD: the stream before the first layer and after each one, L + 1 in all and without the
      final norm; None unless asked for.
  """

  x_BTD: jax.Array
  caches: Caches | None
  hidden_LBTD: jax.Array | None


class Stack(nn.Module):
  """A recipe's segments, each scanned over its repeats, and the final norm.

  Parameters lie under `segment_<i>/block_<j>/...` with a leading axis of the segment's repeats,
  whether the scan is a loop (`unroll=1`) or unrolled: one tree, equal up to rounding.

  Attributes:
    block: factory `(name=...) -> Block`, or a tuple of one for each segment.
    norm: factory of the final norm.
    drop_path_rate: of the last layer; the first has 0, those between lie on the line.
    remat: one of REMAT.
    unroll: how many repeats the scan's body holds; -1 for all.
  """

  block: Callable[..., Block] | tuple[Callable[..., Block], ...]
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
    caches: Caches | None = None,
    return_hidden_states: bool = False,
    deterministic: bool = True,
  ) -> StackOutput:
    """Runs all layers.

    Args:
      x_BTD: the stream after the embedding.
      recipe: the stack's record; its numbers may be traced (`records.as_arrays`).
      context: positions, segment ids, biases and memory.
      caches: one a block of each segment's pattern (`init_caches`), or None.
      return_hidden_states: whether the stream after each layer is kept.
      deterministic: False needs an rng named `dropout`.
    """
    if self.remat not in REMAT:
      raise ValueError(f"remat={self.remat!r} must be one of {', '.join(REMAT)}")
    body = _Repeat
    if self.remat != "none":
      body = nn.remat(body, prevent_cse=False, policy=REMAT[self.remat])
    probes.observe_stream(self, "input", x_BTD)
    x_BTD = probes.observe_gradient(self, "input", x_BTD)
    rates = iter(np.linspace(0.0, self.drop_path_rate, recipe.num_layers, dtype=np.float32))
    updated, streams = [], [x_BTD[None]]
    blocks = self.block
    if not isinstance(blocks, tuple):
      blocks = (blocks,) * len(recipe.segments)
    for i, (segment, block) in enumerate(zip(recipe.segments, blocks, strict=True)):
      drop_path_rates = None
      if self.drop_path_rate:
        table = np.array([[next(rates) for _ in segment.pattern] for _ in range(segment.repeats)])
        drop_path_rates = tuple(table.T)
      run = nn.scan(
        body,
        variable_axes={"params": 0} | dict.fromkeys(probes.COLLECTIONS, 0),
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=segment.repeats,
        unroll=segment.repeats if self.unroll == -1 else self.unroll,
      )(block, deterministic, return_hidden_states, name=f"segment_{i}")
      carry = (x_BTD, None if caches is None else caches[i])
      repeat = (records.per_layer(segment), drop_path_rates, np.arange(segment.repeats))
      (x_BTD, extended), hidden = run(carry, repeat, context)
      updated.append(extended)
      if return_hidden_states:
        streams.append(hidden.reshape(-1, *x_BTD.shape))
    if recipe.final_norm:
      x_BTD = self.norm(name="final_norm")(x_BTD)
    return StackOutput(
      x_BTD,
      None if caches is None else _advance(tuple(updated), x_BTD.shape[1]),
      jnp.concatenate(streams) if return_hidden_states else None,
    )


def _advance(caches: Caches, steps: int) -> Caches:
  def advance(block: BlockCaches) -> BlockCaches:
    own = block.self_attention
    return block._replace(self_attention=own._replace(length=own.length + steps))

  return tuple(tuple(map(advance, blocks)) for blocks in caches)


def init_caches(
  recipe: records.Stack,
  *,
  batch: int,
  length: int,
  kv_heads: int,
  head_dim: int,
  dtype,
  memory_length: int | None = None,
  prefix: Caches | None = None,
) -> Caches:
  """Empty caches for `length` tokens and a memory, one a block of each segment's pattern.

  Those of the `prefix`, caches of the same layers, stand before them.
  """

  def empty(layer: records.Layer, layers: int, before: BlockCaches | None) -> BlockCaches:
    prefix = None if before is None else before.self_attention
    make = functools.partial(KVCache.empty, batch, layers=layers, dtype=dtype)
    sizes = {"kv_heads": kv_heads, "head_dim": head_dim}
    if layer.cross_attention is None:
      return BlockCaches(make(length=length, **sizes), prefix=prefix)
    if memory_length is None:
      raise ValueError("a decoder with cross-attention needs the memory_length")
    return BlockCaches(make(length=length, **sizes), make(length=memory_length, **sizes), prefix)

  none = tuple((None,) * len(segment.pattern) for segment in recipe.segments)
  return tuple(
    tuple(
      empty(layer, segment.repeats, before)
      for layer, before in zip(segment.pattern, blocks, strict=True)
    )
    for segment, blocks in zip(recipe.segments, prefix or none, strict=True)
  )
