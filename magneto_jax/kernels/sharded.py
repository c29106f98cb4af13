"""Attention over a mesh of devices: `dot_product_attention` of arrays that are cut among them.

Letters: B batch, T query length, S key and value length, N heads, K key/value heads, H head dim.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import PartitionSpec

from magneto_jax.kernels import attention, ring
from magneto_jax.kernels.bias import RelativeBias
from magneto_jax.kernels.call import Call


def sharded_attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  /,
  bias: jax.Array | RelativeBias | None = None,
  *,
  mesh: jax.sharding.Mesh,
  batch: Sequence[str] = (),
  heads: Sequence[str] = (),
  length: str | None = None,
  dropout_key: jax.Array | None = None,
  return_lse: bool = False,
  implementation: str | attention.Implementation | None = None,
  **options,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """`dot_product_attention` of whole arrays, each device of a mesh attending for a part of them.

  To be called within a jit, of arrays of any placement; it is one `jax.shard_map` over the mesh,
  in which every device runs the kernel of its platform. What it computes is what one device would
  compute, dropout included, but for the order of sums; see `dot_product_attention` for it.

  Batch and heads need no communication. Along the length, with more than one part, it is ring
  attention: part i of P has the queries i T/P .. (i + 1) T/P - 1, the keys likewise, and keys and
  values travel around the ring, the next ones while these are attended to. Partial results are
  joined by their lse:

    out = sum_i out_i exp(lse_i - lse),   lse = log sum_i exp(lse_i)

  Backwards they travel once more, with their gradients, which are summed in
  promote_types(dtype, float32). With a window keys travel only as far as somebody sees them. Under
  a causal mask alone the first part sees 1/P of the keys and the last one all: the ring takes up to
  twice the time that it would if the work were even.

  An axis whose parts do not divide a dimension is left out there, and its devices all compute the
  same: of the batch and heads the axes are taken in order while they divide; key/value heads that
  are fewer than the parts of the heads are not cut, each device reading its own; a length that
  divides T but not S cuts the queries alone, and one that does not divide T nothing. This changes
  where a result is computed, never the result.

  Args:
    q_BTNH, k_BSKH, v_BSKH, bias: as of `dot_product_attention`. A dense bias is cut by batch, heads
      and queries; its columns stay whole.
    mesh: all its axes become manual.
    batch, heads: names of axes of the mesh, over which B, and N and K, are cut.
    length: the name of the axis over which T and S are cut.
    dropout_key, return_lse, implementation, options: as of `dot_product_attention`.

  Returns:
    out, or with `return_lse` (out, lse), as `dot_product_attention` does, cut as the queries are.

  Raises:
    ValueError: if an axis is not one of the mesh, or is given twice, or as in
      `dot_product_attention`.
    NotImplementedError: if the named implementation cannot serve a device's part of the call.

  Example:
    >>> auto = (jax.sharding.AxisType.Auto,) * 2
    >>> mesh = jax.make_mesh((1, 1), ("data", "sequence"), axis_types=auto)
    >>> q = jax.numpy.ones((2, 8, 4, 16))
    >>> sharded_attention(q, q, q, mesh=mesh, batch=("data",), length="sequence").shape
    (2, 8, 4, 16)

  Reference: Liu et al., 2023, arXiv 2310.01889 (ring attention).

  Differs from `dot_product_attention` in one case: lse tells the ring what a part weighs, so that
  where all of a query's logits are finite and below some -1e5 the output is as inexact as lse is.
  """
  given = (*batch, *heads, *([] if length is None else [length]))
  if not set(given) <= set(mesh.axis_names) or len(set(given)) < len(given):
    raise ValueError(f"{batch=}, {heads=}, {length=} must be different axes of {mesh.axis_names}")
  call = attention.checked_call(
    q_BTNH, k_BSKH, v_BSKH, bias, dropout_key=dropout_key, return_lse=return_lse, **options
  )
  call = attention.seeded(call, dropout_key)
  cut = _Cut.of(call, mesh, batch, heads, length)

  def local(call: Call) -> tuple[jax.Array, jax.Array]:
    call = cut.with_own_heads(call)
    if cut.keys is not None:
      return ring.attend(call, cut.length, implementation)
    if cut.length is not None:
      start = jax.lax.axis_index(cut.length) * call.sizes[1]
      call = ring.part(call, start, 0, start)
    return attention.attend(call, implementation)

  specs = cut.specs(call)
  rows = PartitionSpec(cut.batch, cut.length, cut.heads)
  mapped = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=(rows, rows))
  out_BTNH, lse_BTN = mapped(call)
  return (out_BTNH, lse_BTN) if return_lse else out_BTNH


@dataclasses.dataclass(frozen=True)
class _Cut:
  """The axes over which each dimension of a call is cut.

  Attributes:
    batch, heads: of B and N.
    kv_heads: of K: those of the heads, or none.
    parts, groups: how many of the heads, and K.
    length, keys: of T and of S; None where it is not cut.
  """

  batch: tuple[str, ...]
  heads: tuple[str, ...]
  kv_heads: tuple[str, ...]
  parts: int
  groups: int
  length: str | None
  keys: str | None

  @classmethod
  def of(cls, call: Call, mesh, batch, heads, length) -> "_Cut":
    B, T, S, N, K, _ = call.sizes
    count = lambda axes: math.prod(mesh.shape[axis] for axis in axes)

    def dividing(axes, divides: Callable[[int], bool]) -> tuple[str, ...]:
      taken = ()
      for axis in axes:
        taken += (axis,) if divides(count((*taken, axis))) else ()
      return taken

    batch = dividing(batch, lambda parts: B % parts == 0)
    # Of fewer key/value heads than parts, all heads of a part read one.
    heads = dividing(heads, lambda n: N % n == 0 and (K % n == 0 or n % K == 0))
    parts = count(heads)
    if length is not None and (mesh.shape[length] == 1 or T % mesh.shape[length] or T * S == 0):
      length = None
    keys = length if length is not None and S % mesh.shape[length] == 0 else None
    return cls(batch, heads, heads if K % parts == 0 else (), parts, K, length, keys)

  def specs(self, call: Call) -> Call:
    """The call with a PartitionSpec for each array."""
    P = PartitionSpec
    keys, by_head = P(self.batch, self.keys, self.kv_heads), P(self.batch, self.heads)
    bias = None
    if isinstance(call.bias, RelativeBias):
      bias = dataclasses.replace(call.bias, table=P(None, self.heads))
    elif call.bias is not None:
      axes = self.batch, self.heads, self.length, None
      bias = P(*(x if n > 1 else None for x, n in zip(axes, call.bias.shape, strict=True)))
    specs = {
      "q_BTNH": P(self.batch, self.length, self.heads),
      "k_BSKH": keys,
      "v_BSKH": keys,
      "bias": bias,
      "q_segment_ids": P(self.batch, self.length),
      "kv_segment_ids": P(self.batch, self.keys),
      "kv_lengths": P(self.batch),
      "traced_offset": P(),
      "q_seeds": by_head,
      "kv_seeds": by_head,
    }
    given = {name: spec for name, spec in specs.items() if getattr(call, name) is not None}
    return dataclasses.replace(call, **given)

  def with_own_heads(self, call: Call) -> Call:
    """Of key/value heads that are not cut, but for queries that are, the one that is read."""
    if self.kv_heads == self.heads:
      return call
    own = jax.lax.axis_index(self.heads) * self.groups // self.parts
    k, v = (jax.lax.dynamic_slice_in_dim(x, own, 1, 2) for x in (call.k_BSKH, call.v_BSKH))
    return dataclasses.replace(call, k_BSKH=k, v_BSKH=v)
