"""Ring attention: over a sequence that is cut among the devices of a mesh axis, in a shard_map.

Every device keeps its queries. Keys, values and their segment ids travel around the ring, the next
ones while a device attends to those it has; partial results are joined by their log-sum-exp. The
backward pass goes round once more, with the output and lse of the whole; the gradients of keys and
values travel with them.

Letters: B batch, T query length, S key and value length, N heads, K key/value heads, H head dim; T
and S are a device's own.

Reference: Liu et al., 2023, arXiv 2310.01889 (ring attention).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from magneto_jax.kernels import attention, dropout
from magneto_jax.kernels.bias import RelativeBias
from magneto_jax.kernels.call import Call, varying_like


def part(
  call: Call, q_start: int | jax.Array, kv_start: int | jax.Array, distance: int | jax.Array
) -> Call:
  """A call of some queries and keys as the part of a whole that it is.

  Args:
    call: queries, keys, their segment ids and the rows of a dense bias are the part's own; the
      offset, the lengths, the seeds and the columns of a dense bias are those of the whole.
    q_start, kv_start: where in the whole the part begins.
    distance: q_start - kv_start, an integer where that is known while tracing.
  """
  _, _, S, _, _, _ = call.sizes
  # Where nothing reads positions the kernels need not know them either.
  reads_positions = call.window != (None, None) or isinstance(call.bias, RelativeBias)
  offset = call.q_offset + distance if reads_positions else 0
  is_static = isinstance(offset, int)
  changes = {
    "static_offset": offset if is_static else 0,
    "traced_offset": None if is_static else jnp.asarray(offset, jnp.int32),
  }
  if call.kv_lengths is not None:
    changes["kv_lengths"] = jnp.clip(call.kv_lengths - kv_start, 0, S)
  if _has_columns(call, S):
    changes["bias"] = jax.lax.dynamic_slice_in_dim(call.bias, kv_start, S, 3)
  if call.dropout_rate > 0:
    changes["q_seeds"] = dropout.moved(call.q_seeds, q_start)
    changes["kv_seeds"] = dropout.moved(call.kv_seeds, kv_start)
  return dataclasses.replace(call, **changes).varying_alike()


def attend(
  call: Call, axis: str, implementation: str | attention.Implementation | None
) -> tuple[jax.Array, jax.Array]:
  """(out_BTNH, lse_BTN) of a device's own queries and the keys of all devices of a mesh axis.

  Args:
    call: queries, keys, their segment ids and the rows of a dense bias are the device's own; the
      offset, the lengths, the seeds and the columns of a dense bias are those of the whole.
    axis: of the mesh; the sequence is cut among its devices in order.
    implementation: as in `dot_product_attention`, of every step.
  """
  call = call.varying_alike()
  parts = jax.lax.axis_size(axis)
  place = functools.partial(_meeting, axis, parts, call, _keys(call))
  own, other = (attention.choice_of(place(shift), implementation) for shift in (0, 1))
  ring = _Ring(axis, parts, own, other, ways(call, parts))
  attention.log_once(f"ring of {parts}: {own}" + (f", then {other}" if other != own else ""))
  # What JAX differentiates itself can then be differentiated as often as that.
  return (_forward if own.is_reference else _attend)(ring, call)


@dataclasses.dataclass(frozen=True)
class _Ring:
  """What is static of a ring.

  Attributes:
    axis, parts: of the mesh, and how many devices it has.
    own, other: what serves a device's queries with its own keys, and with those of another one.
    ways: ((by, steps), ..): to which device keys are sent at each step, and how often.
  """

  axis: str
  parts: int
  own: attention.Choice
  other: attention.Choice
  ways: tuple[tuple[int, int], ...]

  def rotated(self, tree, by: int):
    """What the device `by` places before this one has."""
    pairs = [(source, (source + by) % self.parts) for source in range(self.parts)]
    return jax.lax.ppermute(tree, self.axis, pairs)

  def meeting(self, call, keys, shift) -> Call:
    return _meeting(self.axis, self.parts, call, keys, shift)

  def with_bias(self, total, call, dbias, shift):
    """The gradient of a bias, with that of the keys of the device `shift` places before."""
    _, _, S, _, _, _ = call.sizes
    if not _has_columns(call, S):
      return jax.tree.map(jnp.add, total, dbias)
    start = _there(self.axis, self.parts, shift) * S
    before = jax.lax.dynamic_slice_in_dim(total, start, S, 3)
    return jax.lax.dynamic_update_slice_in_dim(total, before + dbias, start, 3)

  def travel(self, keys, by: int, steps: int, meet, carry):
    """`meet(carry, keys, shift)` for the keys of the devices `by`, 2 `by`, .. places before.

    The next keys are on their way while these are attended to; after the last step none are.
    """

    def step(state, number):
      keys, carry = state
      arriving = self.rotated(keys, by)
      return (arriving, meet(carry, keys, by * number)), None

    state = self.rotated(keys, by), carry
    if steps > 1:
      state, _ = jax.lax.scan(step, state, jnp.arange(1, steps, dtype=jnp.int32))
    keys, carry = state
    return meet(carry, keys, by * steps)


class _Keys(NamedTuple):
  """What travels around the ring."""

  k_BSKH: jax.Array
  v_BSKH: jax.Array
  kv_segment_ids: jax.Array | None


def _keys(call: Call) -> _Keys:
  return _Keys(call.k_BSKH, call.v_BSKH, call.kv_segment_ids)


def _meeting(axis: str, parts: int, call: Call, keys: _Keys, shift: int | jax.Array) -> Call:
  """The call of this device's queries and of the keys of the device `shift` places before."""
  _, T, S, _, _, _ = call.sizes
  here, there = jax.lax.axis_index(axis), _there(axis, parts, shift)
  is_level = T == S and isinstance(shift, int) and shift == 0
  distance = 0 if is_level else here * T - there * S
  return part(dataclasses.replace(call, **keys._asdict()), here * T, there * S, distance)


def _there(axis: str, parts: int, shift: int | jax.Array) -> jax.Array:
  """Which device is `shift` places before this one."""
  return (jax.lax.axis_index(axis) - shift) % parts


def _has_columns(call: Call, S: int) -> bool:
  """Whether a dense bias has columns of which S keys see some."""
  is_dense = call.bias is not None and not isinstance(call.bias, RelativeBias)
  return is_dense and call.bias.shape[3] not in (1, S)


def ways(call: Call, parts: int) -> tuple[tuple[int, int], ...]:
  """The least number of steps, forth and back, that brings keys to all queries that may see them.

  Whoever needs keys of `shift` places before gets them by as many steps forth, or by the others
  back. Of two equal ways all is done forth.
  """
  (B, T, N, H), (_, S, K, _) = call.q_BTNH.shape, call.k_BSKH.shape
  shifts = range(1, parts)
  if call.traced_offset is None:
    whole = Call(
      q_BTNH=jax.ShapeDtypeStruct((B, parts * T, N, H), call.q_BTNH.dtype),
      k_BSKH=jax.ShapeDtypeStruct((B, parts * S, K, H), call.k_BSKH.dtype),
      v_BSKH=jax.ShapeDtypeStruct((B, parts * S, K, H), call.v_BSKH.dtype),
      static_offset=call.static_offset,
      window=call.window,
    )
    seen_by, seen = np.nonzero(whole.block_states(T, S)[0])
    shifts = {int(shift) for shift in (seen_by - seen) % parts} - {0}
  back = [parts - min([s for s in shifts if s > forth], default=parts) for forth in range(parts)]
  forth = min(reversed(range(parts)), key=lambda forth: forth + back[forth])
  return tuple((by, steps) for by, steps in ((1, forth), (-1, back[forth])) if steps)


def _forward(ring: _Ring, call: Call) -> tuple[jax.Array, jax.Array]:
  keys = _keys(call)
  out_BTNH, lse_BTN = attention.forward(ring.own, ring.meeting(call, keys, 0))

  def meet(total, keys, shift):
    return _joined(total, attention.forward(ring.other, ring.meeting(call, keys, shift)))

  total = out_BTNH.astype(call.dtype), lse_BTN
  for by, steps in ring.ways:
    total = ring.travel(keys, by, steps, meet, total)
  out_BTNH, lse_BTN = total
  return out_BTNH.astype(call.q_BTNH.dtype), lse_BTN


def _joined(one, other):
  """(out, lse) of the keys of both: out = sum_i out_i exp(lse_i - lse), lse = log sum_i exp(lse_i).

  Who saw no key has out 0 and the lowest lse, and weighs nothing; two of them make another.
  """
  (out, lse), (other_out, other_lse) = one, other
  both = jnp.logaddexp(lse, other_lse)
  weights, other_weights = (jnp.exp(x - both)[..., None] for x in (lse, other_lse))
  return out * weights + other_out.astype(out.dtype) * other_weights, both


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, call: Call) -> tuple[jax.Array, jax.Array]:
  return _forward(ring, call)


def _attend_forward(ring, call):
  out_BTNH, lse_BTN = map(checkpoint_name, _forward(ring, call), attention.CHECKPOINT_NAMES)
  return (out_BTNH, lse_BTN), (call, out_BTNH, lse_BTN)


def _attend_backward(ring, kept, cotangents):
  """Of each part of the keys the weights are exp(logits - lse), with the lse of the whole.

  Gradients are summed as they travel, in promote_types(dtype, float32).
  """
  call, *results = kept
  own_keys, dtype = _keys(call), call.dtype

  def gradient(choice, keys, shift):
    met = ring.meeting(call, keys, shift)
    found = attention.backward(choice, met, *results, *cotangents)
    return jax.tree.map(lambda x: x.astype(dtype), found)

  def meet(carry, keys, shift, by):
    dk, dv, dq, dbias = carry
    dk, dv = ring.rotated((dk, dv), by)
    found = gradient(ring.other, keys, shift)
    dbias = ring.with_bias(dbias, call, found.bias, shift)
    return dk + found.k_BSKH, dv + found.v_BSKH, dq + found.q_BTNH, dbias

  found = gradient(ring.own, own_keys, 0)
  dbias = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), call.bias)
  dbias = ring.with_bias(varying_like(dbias, call), call, found.bias, 0)
  dk, dv, dq = found.k_BSKH, found.v_BSKH, found.q_BTNH
  for by, steps in ring.ways:
    meet_by, carry = functools.partial(meet, by=by), (dk, dv, dq, dbias)
    dk, dv, dq, dbias = ring.travel(own_keys, by, steps, meet_by, carry)
    dk, dv = ring.rotated((dk, dv), -by * steps)  # Home.
  like = call.q_BTNH, call.k_BSKH, call.v_BSKH, call.bias
  gradients = jax.tree.map(lambda x, like: x.astype(like.dtype), (dq, dk, dv, dbias), like)
  return (call.gradient(*gradients),)


_attend.defvjp(_attend_forward, _attend_backward)
