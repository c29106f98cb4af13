"""Multi-head attention with a key/value cache."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax import kernels, sharding
from magneto_jax.layers.initializers import DenseInit
from magneto_jax.layers.norms import NormFactory
from magneto_jax.layers.positions import Rotation
from magneto_jax.theory import records


class KVCache(NamedTuple):
  """Keys and values of a scanned segment's layers, and where the next ones go.

  One array holds all layers, so that a decode step writes its one row in place instead of
  copying the layer; `layer` says which slice this call reads and writes. Heads come before rows,
  the order in which attention reads them.
  """

  k_LBKSH: jax.Array
  v_LBKSH: jax.Array
  layer: jax.Array
  length: jax.Array

  @classmethod
  def empty(
    cls, batch: int, length: int, kv_heads: int, head_dim: int, *, layers: int = 1, dtype
  ) -> "KVCache":
    """Room for `length` rows."""
    zeros = jnp.zeros((layers, batch, kv_heads, length, head_dim), dtype)
    return cls(zeros, zeros, layer=jnp.int32(0), length=jnp.int32(0))

  def extend(self, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "KVCache":
    """Writes T new rows behind the first `length`, which grows by T.

    There must be room: XLA moves a write that would pass the end back over earlier rows.
    """
    _, batch, kv_heads, length, head_dim = self.k_LBKSH.shape
    (B, T, K, H), fits = k_BTKH.shape, (batch, kv_heads, head_dim)
    if (B, K, H) != fits or T > length:
      raise ValueError(
        f"keys [B, T, K, H] = {list(k_BTKH.shape)} do not fit a cache of {batch=}, {length=},"
        f" {kv_heads=}, {head_dim=}"
      )
    # Of one dtype: with 64-bit mode on, a literal 0 and the scan's index are int64.
    start = [jnp.asarray(i, jnp.int32) for i in (self.layer, 0, 0, self.length, 0)]

    def write(cache, rows):
      rows_BKTH = rows.swapaxes(1, 2).astype(cache.dtype)
      return jax.lax.dynamic_update_slice(cache, rows_BKTH[None], start)

    return self._replace(
      k_LBKSH=write(self.k_LBKSH, k_BTKH),
      v_LBKSH=write(self.v_LBKSH, v_BTKH),
      length=self.length + k_BTKH.shape[1],
    )

  def read(self) -> tuple[jax.Array, jax.Array]:
    """This layer's keys and values [B, S, K, H]."""
    at = lambda cache: jax.lax.dynamic_index_in_dim(cache, self.layer, 0, False).swapaxes(1, 2)
    return at(self.k_LBKSH), at(self.v_LBKSH)


class Attention(nn.Module):
  """y = W_o mid_norm(concat_i softmax(q_i k_i^T / sqrt(H) + masks) v_i) + b_o.

  Attributes:
    num_heads: N; head_dim: H, D / N by default.
    num_kv_heads: K, a divisor of N (grouped queries); N by default.
    qk_init: init functions of the query and key projections.
    v_init: init functions of the value projection.
    out_init: init functions of the output projection.
    mid_norm: factory `(name=...) -> norm` of the norm over the heads before W_o, or None.
    qk_norm: factory of the norms of queries and of keys, before the rotation; None for no norms.
    qk_norm_scope: `head` (each head by itself, one gain for all) or `width` (all heads of a token).
    head_scale: a learned factor for each head: None, `pre_out_proj` (on the head's output), or one
      of fairseq's two forms after W_o, on contiguous or interleaved channels (see `records`).
    dense: factory of the projections, called as nn.DenseGeneral is.
    is_cross: whether keys and values come from a memory, as in an encoder-decoder's decoder.
    is_causal: whether position t attends to positions <= t only.
    window: (left, right) reach of the attention, None for no bound on a side.
    logits_soft_cap: c in logits <- c tanh(logits / c), or None.
    rotation: `(queries, keys, positions) -> (queries, keys)`, as in `positions.ROTATIONS`, or None.
    dropout_rate: of the attention probabilities.
    dtype: of the computation; parameters are float32.
    implementation: of `kernels.dot_product_attention`; None chooses.

  Reference: Foundation Transformers, arXiv 2210.06423, equations 1-2 (with the norm).
  """

  num_heads: int
  num_kv_heads: int | None = None
  head_dim: int | None = None
  qk_init: DenseInit = DenseInit()
  v_init: DenseInit = DenseInit()
  out_init: DenseInit = DenseInit()
  mid_norm: NormFactory | None = None
  qk_norm: NormFactory | None = None
  qk_norm_scope: str = "head"
  head_scale: str | None = None
  dense: Callable[..., nn.Module] = nn.DenseGeneral
  use_bias: bool = True
  is_cross: bool = False
  is_causal: bool = False
  window: tuple[int | None, int | None] | None = None
  logits_soft_cap: float | None = None
  rotation: Rotation | None = None
  dropout_rate: float = 0.0
  dtype: jnp.dtype | None = None
  implementation: str | None = None

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    memory_BSD: jax.Array | None = None,
    *,
    positions_BT: jax.Array | None = None,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    bias: jax.Array | kernels.RelativeBias | None = None,
    q_offset: int | jax.Array | None = None,
    cache: KVCache | None = None,
    prefix: KVCache | None = None,
    deterministic: bool = True,
  ) -> tuple[jax.Array, KVCache | None]:
    """Attends from x to itself, or to a memory.

    Args:
      x_BTD: what the queries are made of; in self-attention keys and values too.
      memory_BSD: what keys and values are made of in cross-attention. May be left out once a cache
        holds them.
      positions_BT: positions for the rotation; by default 0 .. T-1, counted on from the cache's
        length.
      segment_ids: integers [B, T] of the queries and [B, S] of the keys: a query attends to keys
        of its own segment only (packed documents; padding is a segment of its own).
      bias: added to the logits; see `kernels.dot_product_attention`. -inf forbids a pair.
      q_offset: how many positions lie before x; by default the rows of the prefix and the cache's
        length in self-attention. Read by causality, window and a relative bias.
      cache: earlier keys and values (`KVCache.empty` at first). Self-attention, which must be
        causal unless x fills the cache, writes the new ones behind them; cross-attention writes
        those of the memory, in whose place later calls give none.
      prefix: keys and values of self-attention that stand before those of the cache, all of its
        rows, and are only read: what several sequences have in common. Of keys, `segment_ids` and
        `bias` are of the prefix's rows and then the cache's.
      deterministic: False drops probabilities and needs an rng named `dropout`.

    Returns:
      [B, T, D] and the cache, with what was written (None without one).
    """
    self._check(x_BTD, memory_BSD, cache, prefix)
    width = x_BTD.shape[-1]
    heads, kv_heads = self.num_heads, self.num_kv_heads or self.num_heads
    head_dim = self.head_dim or width // heads

    def dense(x, features, init, name):
      axes = tuple(range(2, x.ndim))
      project = self.dense(
        features,
        axis=axes,
        use_bias=self.use_bias,
        kernel_init=init.kernel,
        bias_init=init.bias(math.prod(x.shape[2:])),
        dtype=self.dtype,
        name=name,
      )
      return project(x)

    def normed(x_BTNH, name):
      if self.qk_norm is None:
        return x_BTNH
      batch, length, *features = shape = x_BTNH.shape
      if self.qk_norm_scope == "width":
        shape = (batch, length, math.prod(features))
      return self.qk_norm(name=name)(x_BTNH.reshape(shape)).reshape(x_BTNH.shape)

    q_BTNH = normed(dense(x_BTD, (heads, head_dim), self.qk_init, "query"), "query_norm")
    source_BSD = memory_BSD if self.is_cross else x_BTD
    if source_BSD is not None:
      k_BSKH = normed(dense(source_BSD, (kv_heads, head_dim), self.qk_init, "key"), "key_norm")
      v_BSKH = dense(source_BSD, (kv_heads, head_dim), self.v_init, "value")
    if q_offset is None:
      q_offset = 0 if cache is None or self.is_cross else cache.length
      q_offset += 0 if prefix is None else prefix.k_LBKSH.shape[-2]
    if self.rotation is not None:
      if positions_BT is None:
        positions_BT = jnp.arange(x_BTD.shape[1])[None] + q_offset
      q_BTNH, k_BSKH = self.rotation(q_BTNH, k_BSKH, positions_BT)
    if cache is not None:
      if self.is_cross:
        cache = cache._replace(length=jnp.zeros_like(cache.length))
      if source_BSD is not None:
        cache = cache.extend(k_BSKH, v_BSKH)
      k_BSKH, v_BSKH = cache.read()
    if prefix is not None:
      before = (rows.astype(k_BSKH.dtype) for rows in prefix.read())
      k_BSKH, v_BSKH = (
        jnp.concatenate(parts, axis=1) for parts in zip(before, (k_BSKH, v_BSKH), strict=True)
      )

    attend = kernels.dot_product_attention
    if (mesh := sharding.current()) is not None:
      axes = sharding.ACTIVATION_AXES
      (length,) = axes["length"]
      attend = functools.partial(
        kernels.sharded_attention,
        mesh=mesh,
        batch=axes["batch"],
        heads=axes["heads"],
        length=length,
      )
    dropout_rate = 0.0 if deterministic else self.dropout_rate
    o_BTNH = attend(
      q_BTNH,
      k_BSKH.astype(q_BTNH.dtype),
      v_BSKH.astype(q_BTNH.dtype),
      bias,
      q_segment_ids=None if segment_ids is None else segment_ids[0],
      kv_segment_ids=None if segment_ids is None else segment_ids[1],
      is_causal=self.is_causal,
      q_offset=q_offset,
      window=self.window,
      logits_soft_cap=self.logits_soft_cap,
      dropout_rate=dropout_rate,
      dropout_key=_typed(self.make_rng("dropout")) if dropout_rate else None,
      implementation=self.implementation,
    )
    if self.head_scale is not None:
      gamma_N = self.param("head_scale", nn.initializers.ones, (heads,)).astype(o_BTNH.dtype)
    if self.head_scale == "pre_out_proj":
      o_BTNH = o_BTNH * gamma_N.reshape(1, 1, heads, 1)
    if self.mid_norm is not None:
      # One norm over all heads of a token, as in the paper, not one a head.
      o_BTNH = self.mid_norm(name="mid_norm")(o_BTNH.reshape(*o_BTNH.shape[:2], heads * head_dim))
      o_BTNH = o_BTNH.reshape(*o_BTNH.shape[:2], heads, head_dim)
    y_BTD = dense(o_BTNH, width, self.out_init, "out")
    if self.head_scale not in (None, "pre_out_proj"):
      y_BTD = _scale_blocks(y_BTD, gamma_N, self.head_scale)
    return y_BTD, cache

  def _check(self, x_BTD, memory_BSD, cache, prefix):
    """Raises where attributes and arguments contradict each other."""
    if x_BTD.ndim != 3:
      raise ValueError(f"x {list(x_BTD.shape)} is not [B, T, D]")
    width, heads = x_BTD.shape[-1], self.num_heads
    if self.head_dim is None and width % heads:
      raise ValueError(f"num_heads={heads} must divide {width=}; or give head_dim")
    if self.head_scale not in (None, *records.HEAD_SCALES):
      choices = ", ".join(map(str, (None, *records.HEAD_SCALES)))
      raise ValueError(f"head_scale={self.head_scale!r} must be one of {choices}")
    if self.head_scale not in (None, "pre_out_proj") and width % heads:
      raise ValueError(f"num_heads={heads} must divide {width=} for {self.head_scale!r}")
    if self.qk_norm_scope not in records.QK_NORMS:
      raise ValueError(f"{self.qk_norm_scope=} must be one of {', '.join(records.QK_NORMS)}")
    if self.is_cross and (self.is_causal or self.rotation is not None):
      raise ValueError("is_cross goes with neither is_causal nor a rotation: both read positions")
    if not self.is_cross and memory_BSD is not None:
      raise ValueError("a memory needs is_cross=True: this attention is to x itself")
    if prefix is not None and self.is_cross:
      raise ValueError("a prefix is of self-attention: cross-attention reads a memory")
    fills = cache is not None and cache.k_LBKSH.shape[-2] == x_BTD.shape[1]
    if cache is not None and not (self.is_cross or self.is_causal or fills):
      raise ValueError(
        "a cache needs is_causal=True, or to be filled by one call: rows that are not yet written"
        " must be hidden"
      )
    if self.is_cross and cache is not None and memory_BSD is not None:
      rows = cache.k_LBKSH.shape[-2]
      if memory_BSD.shape[1] != rows:
        raise ValueError(f"a memory of {memory_BSD.shape[1]} must fill its cache of {rows} rows")
    if self.is_cross and memory_BSD is None and cache is None:
      raise ValueError("cross-attention needs a memory, or a cache that holds one")


def _typed(key: jax.Array) -> jax.Array:
  """The key as a typed one: Flax hands on what it is given, and takes `jax.random.PRNGKey` too."""
  is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
  return key if is_typed else jax.random.wrap_key_data(key)


def _scale_blocks(y_BTD: jax.Array, gamma_N: jax.Array, placement: str) -> jax.Array:
  """fairseq's head scale after W_o; until November 2021 it also transposed (head, channel)."""
  y_BTNH = y_BTD.reshape(*y_BTD.shape[:2], gamma_N.shape[0], -1)
  y_BTNH = y_BTNH * gamma_N.reshape(1, 1, -1, 1)
  if placement == "post_out_proj_interleaved":
    y_BTNH = y_BTNH.swapaxes(-1, -2)
  return y_BTNH.reshape(y_BTD.shape)
