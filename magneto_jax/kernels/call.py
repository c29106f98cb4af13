"""One call of attention, checked: what every implementation is given.

Letters: B batch, T query length, S key and value length, N heads, K key/value heads, H head dim.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax.kernels import jax_names
from magneto_jax.kernels.bias import RelativeBias

# What a block of queries has to do with a block of keys.
SKIP, PARTIAL, FULL = 0, 1, 2


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    "q_BTNH",
    "k_BSKH",
    "v_BSKH",
    "bias",
    "q_segment_ids",
    "kv_segment_ids",
    "kv_lengths",
    "traced_offset",
    "q_seeds",
    "kv_seeds",
  ],
  meta_fields=[
    "static_offset",
    "window",
    "logits_soft_cap",
    "scale",
    "dropout_rate",
    "return_lse",
  ],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """The arguments of `dot_product_attention`, causality folded into the window.

  A pytree: its arrays are leaves, the rest is static. The offset of the queries is an array or,
  where it is known while tracing, static. Of the dropout's key it holds the `dropout.seeds`, uint32
  [B, N] each, which can be cut along batch and heads as the queries are, and moved along queries
  and keys. Without `return_lse` the cotangent of lse is zero.
  """

  q_BTNH: jax.Array
  k_BSKH: jax.Array
  v_BSKH: jax.Array
  bias: jax.Array | RelativeBias | None = None
  q_segment_ids: jax.Array | None = None
  kv_segment_ids: jax.Array | None = None
  kv_lengths: jax.Array | None = None
  traced_offset: jax.Array | None = None
  q_seeds: jax.Array | None = None
  kv_seeds: jax.Array | None = None
  static_offset: int = 0
  window: tuple[int | None, int | None] = (None, None)
  logits_soft_cap: float | None = None
  scale: float = 1.0
  dropout_rate: float = 0.0
  return_lse: bool = False

  @property
  def sizes(self) -> tuple[int, int, int, int, int, int]:
    """B, T, S, N, K, H."""
    (B, T, N, H), (_, S, K, _) = self.q_BTNH.shape, self.k_BSKH.shape
    return B, T, S, N, K, H

  @property
  def q_offset(self) -> int | jax.Array:
    return self.static_offset if self.traced_offset is None else self.traced_offset

  @property
  def dtype(self) -> jnp.dtype:
    """In which everything between the two products is done."""
    return jnp.promote_types(self.q_BTNH.dtype, jnp.float32)

  @property
  def hides_nothing(self) -> bool:
    """Whether every query sees every key, but for a bias of -inf."""
    return self.window == (None, None) and self.q_segment_ids is None and self.kv_lengths is None

  def hiding_padding(self) -> "Call":
    """With lengths that hide what padding puts behind the keys, as they hide padded keys."""
    B, _, S, _, _, _ = self.sizes
    lengths = S if self.kv_lengths is None else jnp.minimum(self.kv_lengths, S)
    lengths = jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), (B,))
    return dataclasses.replace(self, kv_lengths=lengths)

  def gradient(self, dq_BTNH, dk_BSKH, dv_BSKH, dbias) -> "Call":
    """Its cotangent: of the call's structure, but for None at what has no gradient."""
    nothing = dict.fromkeys(
      ("q_segment_ids", "kv_segment_ids", "kv_lengths", "traced_offset", "q_seeds", "kv_seeds")
    )
    return dataclasses.replace(
      self, q_BTNH=dq_BTNH, k_BSKH=dk_BSKH, v_BSKH=dv_BSKH, bias=dbias, **nothing
    )

  def varying_alike(self) -> "Call":
    """With all arrays marked as varying over the mesh axes over which one varies, in a shard_map.

    A gradient then varies as its array does; where the array did not vary before, what the devices
    send back is summed by JAX.
    """
    return varying_like(self, self)

  def visible(self, query: jax.Array, key: jax.Array) -> jax.Array:
    """Which keys a query sees, broadcastable to [B, N, query, key], where any may be hidden.

    Args:
      query, key: int32 vectors, the indices of the queries and keys that are asked for, in
        increasing order without gaps.
    """
    left, right = self.window
    first_query, first_key = query[0], key[0]
    key = key[None, None, None, :]
    distance = key - query[None, None, :, None] - self.q_offset
    terms = []
    if left is not None:
      terms.append(distance >= -left)
    if right is not None:
      terms.append(distance <= right)
    if self.q_segment_ids is not None:
      q_ids = jax.lax.dynamic_slice_in_dim(self.q_segment_ids, first_query, distance.shape[2], 1)
      kv_ids = jax.lax.dynamic_slice_in_dim(self.kv_segment_ids, first_key, distance.shape[3], 1)
      terms.append(q_ids[:, None, :, None] == kv_ids[:, None, None, :])
    if self.kv_lengths is not None:
      terms.append(key < self.kv_lengths[:, None, None, None])
    return functools.reduce(jnp.logical_and, terms)

  def block_states(self, block_q: int, block_kv: int) -> np.ndarray | jax.Array:
    """SKIP, PARTIAL or FULL [B or 1, T / block_q, S / block_kv] (rounded up): what a block hides.

    A NumPy array where it is known while tracing. Segments are compared by the range of their
    numbers within a block: that may visit a block for nothing, and never skips one.
    """
    _, T, S, _, _, _ = self.sizes
    xp = np if self.traced_offset is None else jnp
    first_q = np.arange(0, T, block_q)[None, :, None]
    first_k = np.arange(0, S, block_kv)[None, None, :]
    last_q, last_k = np.minimum(first_q + block_q, T) - 1, np.minimum(first_k + block_kv, S) - 1
    nearest, farthest = first_k - last_q - self.q_offset, last_k - first_q - self.q_offset
    left, right = self.window
    seen = whole = xp.ones(nearest.shape, bool)
    if left is not None:
      seen, whole = seen & (farthest >= -left), whole & (nearest >= -left)
    if right is not None:
      seen, whole = seen & (nearest <= right), whole & (farthest <= right)
    if self.kv_lengths is not None:
      lengths = self.kv_lengths[:, None, None]
      seen, whole = seen & (first_k < lengths), whole & (first_k + block_kv <= lengths)
    if self.q_segment_ids is not None:
      q_low, q_high = _ranges(self.q_segment_ids, block_q)
      k_low, k_high = _ranges(self.kv_segment_ids, block_kv)
      q_low, q_high = q_low[:, :, None], q_high[:, :, None]
      k_low, k_high = k_low[:, None, :], k_high[:, None, :]
      seen = seen & (q_low <= k_high) & (k_low <= q_high)
      whole = whole & (q_low == k_high) & (q_high == k_low)
    return seen.astype(np.int32) * (1 + whole.astype(np.int32))


def pad(x: jax.Array, axis: int, multiple: int, value: float = 0) -> jax.Array:
  """With one value behind the others along an axis, up to the next multiple of a length."""
  missing = -x.shape[axis] % multiple
  if missing == 0:
    return x
  widths = [(0, missing if a == axis else 0) for a in range(x.ndim)]
  return jnp.pad(x, widths, constant_values=value)


def varying_like(tree, like):
  """Arrays, marked as varying over the mesh axes over which any of `like` varies, and their own."""
  axes = frozenset().union(*map(_varying, jax.tree.leaves(like)))

  def vary(x):
    missing = tuple(axes - _varying(x))
    return jax_names.vary(x, missing) if missing else x

  return jax.tree.map(vary, tree)


def _varying(x: jax.Array) -> frozenset[str]:
  """The mesh axes of an enclosing shard_map over which an array differs."""
  return jax_names.varying(jax.typeof(x))


def _ranges(ids: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
  """The least and the largest id of each block: twice [B, blocks]."""
  B, length = ids.shape
  padded = jnp.pad(ids, ((0, 0), (0, -length % block)), mode="edge").reshape(B, -1, block)
  return padded.min(-1), padded.max(-1)
