"""The reference attention, in plain jax.numpy: it defines what every other kernel must compute.

Letters: B batch, T query length, S key and value length, N heads, K key/value heads,
G = N / K heads a key/value head, H head dim.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


def relative_buckets(
  relative_position: jax.Array, num_buckets: int, bidirectional: bool, max_distance: int
) -> jax.Array:
  """T5's bucket of a relative position: exact when near, logarithmic when far.

  With r = key position - query position, n = num_buckets // 2 if bidirectional else
  num_buckets, e = n // 2 and D = max_distance, bucket(r) = n [r > 0] + g(|r|) if bidirectional,
  and g(max(-r, 0)) if not, where

    g(m) = m  if m < e,  else  min(n - 1, e + floor(log(m / e) / log(D / e) * (n - e))).

  Args:
    relative_position: integers of any shape, key position minus query position.
    num_buckets: how many buckets there are, both directions together.
    bidirectional: whether keys ahead of the query have buckets of their own (encoders); if not,
      they share bucket 0 (decoders).
    max_distance: the distance from which on all keys share the last bucket.

  Returns:
    int32 buckets in [0, num_buckets), shaped like `relative_position`.

  Raises:
    ValueError: if there are too few buckets, or `max_distance` lies among the exact ones.

  Example:
    >>> relative_buckets(jnp.array([-200, -9, -1, 0, 1, 9, 200]), 32, True, 128).tolist()
    [15, 8, 1, 0, 17, 24, 31]

  Reference: Raffel et al., 2020, arXiv 1910.10683, section 2.1 and its released code.

  Differs from T5's code, which takes the logarithm on the device: here it is taken once, on the
  host, in float32, so that an approximate device logarithm cannot move a bucket's edge.
  """
  directional = num_buckets // 2 if bidirectional else num_buckets
  exact = directional // 2
  if exact < 1:
    raise ValueError(f"{num_buckets=} leaves no exact bucket ({bidirectional=})")
  if max_distance <= exact:
    raise ValueError(f"{max_distance=} must exceed the {exact} exact buckets ({num_buckets=})")
  distance = np.arange(max_distance + 1)
  log_ratio = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
  log_range = np.float32(math.log(max_distance / exact))
  far = exact + (log_ratio / log_range * np.float32(directional - exact)).astype(np.int32)
  bucket_of_distance = np.where(distance < exact, distance, np.minimum(far, directional - 1))
  behind = jnp.abs(relative_position) if bidirectional else jnp.maximum(-relative_position, 0)
  buckets = jnp.asarray(bucket_of_distance, jnp.int32)[jnp.minimum(behind, max_distance)]
  return buckets + directional * (relative_position > 0) if bidirectional else buckets


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["table"],
  meta_fields=["bidirectional", "max_distance"],
)
@dataclasses.dataclass(frozen=True)
class RelativeBias:
  """T5's relative position bias, by its table: bias[n, t, s] = table[bucket(s - t), n].

  A pytree whose only leaf is the table. Kernels never see the [N, T, S] bias: they build the
  tiles they need from the table, and return its gradient.

  Attributes:
    table: [num_buckets, N], shared by whoever shares the record (T5: all layers of a stack).
    bidirectional: whether keys ahead of the query have buckets of their own.
    max_distance: the distance from which on all keys share the last bucket.

  Reference: Raffel et al., 2020, arXiv 1910.10683, section 2.1; see `relative_buckets`.
  """

  table: jax.Array
  bidirectional: bool = True
  max_distance: int = 128

  def materialize(self, T: int, S: int, q_offset: int | jax.Array = 0) -> jax.Array:
    """The bias [1, N, T, S] of queries q_offset .. q_offset + T - 1 and keys 0 .. S - 1."""
    num_buckets, N = self.table.shape
    # It depends on s - t alone: look up its T + S - 1 values, then slide a window of S over them.
    # Backwards, the table then sees T + S - 1 updates instead of T S.
    relative_position = jnp.arange(1 - T, S) - q_offset
    buckets = relative_buckets(
      relative_position, num_buckets, self.bidirectional, self.max_distance
    )
    values_NL = jnp.asarray(self.table)[buckets].T

    def row_NS(t):
      return jax.lax.dynamic_slice(values_NL, (0, T - 1 - t), (N, S))

    return jax.vmap(row_NS, out_axes=1)(jnp.arange(T))[None]


def attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  bias: jax.Array | RelativeBias | None,
  *,
  q_segment_ids: jax.Array | None,
  kv_segment_ids: jax.Array | None,
  kv_lengths: jax.Array | None,
  window: tuple[int | None, int | None],
  q_offset: int | jax.Array,
  logits_soft_cap: float | None,
  scale: float,
  dropout_rate: float,
  dropout_key: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns (out_BTNH, lse_BTN); see `dot_product_attention`, which checks the arguments."""
  B, T, N, H = q_BTNH.shape
  _, S, K, _ = k_BSKH.shape
  dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
  lowest = jnp.finfo(dtype).min

  # Heads first: on CPU both products and the softmax then run over contiguous rows. The R = G T
  # queries of a key/value head are the rows of one product: nothing is repeated, and a fifth
  # dimension would cost XLA:CPU copies (34 against 18 MiB at B8 T256 N4 H64, and 1.2x the time).
  q_BKRH = q_BTNH.swapaxes(1, 2).reshape(B, K, N // K * T, H)
  k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
  logits_BKRS = jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, k_BKSH, preferred_element_type=dtype)
  logits_BNTS = logits_BKRS.reshape(B, N, T, S) * scale
  if logits_soft_cap is not None:
    logits_BNTS = logits_soft_cap * jnp.tanh(logits_BNTS / logits_soft_cap)
  if isinstance(bias, RelativeBias):
    bias = bias.materialize(T, S, q_offset)
  if bias is not None:
    logits_BNTS += bias.astype(dtype)
  mask = _mask(T, S, q_segment_ids, kv_segment_ids, kv_lengths, window, q_offset)
  if mask is not None:
    logits_BNTS = jnp.where(mask, logits_BNTS, -jnp.inf)

  # The maximum is bounded from below, so a row without keys has weights exp(-inf) = 0, not NaN.
  # It is a constant to the gradient: the result does not depend on it.
  max_BNT1 = jnp.max(jax.lax.stop_gradient(logits_BNTS), axis=-1, keepdims=True, initial=lowest)
  weights_BNTS = jnp.exp(logits_BNTS - max_BNT1)
  sum_BNT1 = jnp.sum(weights_BNTS, axis=-1, keepdims=True)
  empty_BNT1 = sum_BNT1 == 0
  sum_BNT1 = jnp.where(empty_BNT1, 1, sum_BNT1)
  lse_BNT1 = jnp.where(empty_BNT1, lowest, max_BNT1 + jnp.log(sum_BNT1))
  if dropout_rate > 0:
    keep_BNTS = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights_BNTS.shape)
    weights_BNTS = jnp.where(keep_BNTS, weights_BNTS / (1 - dropout_rate), 0)

  # Divided by the sum after the product: H numbers a row instead of S, and the backward pass
  # needs only the weights and the output.
  weights_BKRS = weights_BNTS.astype(v_BSKH.dtype).reshape(B, K, N // K * T, S)
  out_BKRH = jnp.einsum("BKRS,BKSH->BKRH", weights_BKRS, v_BKSH, preferred_element_type=dtype)
  out_BNTH = (out_BKRH.reshape(B, N, T, H) / sum_BNT1).astype(q_BTNH.dtype)
  return out_BNTH.swapaxes(1, 2), lse_BNT1[..., 0].swapaxes(1, 2)


def _mask(T, S, q_segment_ids, kv_segment_ids, kv_lengths, window, q_offset) -> jax.Array | None:
  """Which keys a query may attend to, broadcastable to [B, N, T, S]; None for all of them."""
  if window == (None, None) and q_segment_ids is None and kv_lengths is None:
    return None
  query = jnp.arange(T)[None, None, :, None] + q_offset
  key = jnp.arange(S)[None, None, None, :]
  left, right = window
  terms = []
  if left is not None:
    terms.append(key >= query - left)
  if right is not None:
    terms.append(key <= query + right)
  if q_segment_ids is not None:
    terms.append(q_segment_ids[:, None, :, None] == kv_segment_ids[:, None, None, :])
  if kv_lengths is not None:
    terms.append(key < kv_lengths[:, None, None, None])
  return functools.reduce(jnp.logical_and, terms)
