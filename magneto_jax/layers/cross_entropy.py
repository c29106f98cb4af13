"""The loss over a vocabulary: all logits at once, or never more than a chunk of them.

Letters: B batch, T length, D width, V the vocabulary; P parts that a mesh axis cuts it into, of R
rows each; C rows of a chunk.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from magneto_jax import sharding

# Sizes of a chunk are multiples of it where they can be: a row of an accelerator's registers.
_LANES = 128


def vocabulary_logits(
  x_BTD: jax.Array, table_VD: jax.Array, bias_V: jax.Array | None = None
) -> jax.Array:
  """x W^T + b [B, T, V] with W of the dtype of x, summed in float32 or wider."""
  wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
  logits_BTV = jnp.einsum(
    "btd,vd->btv", x_BTD, table_VD.astype(x_BTD.dtype), preferred_element_type=wide
  )
  logits_BTV = sharding.constrain(logits_BTV, "batch", "length", "vocab")
  return logits_BTV if bias_V is None else logits_BTV + bias_V.astype(wide).reshape(1, 1, -1)


def scores_of(x_BTD, table_VD, targets_BT=None, bias_V=None, **options) -> jax.Array:
  """What a model puts out: logits [B, T, V], or, given targets, their `cross_entropy` [B, T]."""
  if targets_BT is None:
    return vocabulary_logits(x_BTD, table_VD, bias_V)
  return cross_entropy(x_BTD, table_VD, targets_BT, bias_V, **options)


def cross_entropy(
  x_BTD: jax.Array,
  table_VD: jax.Array,
  targets_BT: jax.Array,
  bias_V: jax.Array | None = None,
  *,
  smoothing: float = 0.0,
  chunk: int = 0,
  parts: int | None = None,
) -> jax.Array:
  """-log p(target) [B, T] in nats, p = softmax(x W^T + b), in float32 or wider.

  With smoothing e it is -sum_v q_v log p_v, where the target has q = 1 - e and each of the others
  e / (V - 1).

  By chunks, the logarithm of the sum is taken online, and the backward pass computes each chunk's
  logits again: at no time more than B T P C logits live. There the gradient with respect to the
  logits is rounded to the dtype of x before its products, which are summed in float32 or wider. In
  this form it can be differentiated once, in reverse mode only.

  Args:
    x_BTD: features.
    table_VD: W; cast to the dtype of x.
    targets_BT: integers in [0, V).
    bias_V: b.
    smoothing: e, in [0, 1).
    chunk: rows of the vocabulary (of each part of it) whose logits are held at a time; 0: all.
    parts: P, how many contiguous parts of equal size the vocabulary lies in, on different devices;
      as the present mesh cuts it by default. Chunks are cut within each part, so that none needs
      another device's rows.

  Raises:
    ValueError: the parts do not divide the vocabulary.

  Reference: Szegedy et al., arXiv 1512.00567, section 7, with fairseq's e / (V - 1) (smoothing);
  Milakov and Gimelshein, arXiv 1805.02867, algorithm 3 (the online sum).
  """
  vocab_size = table_VD.shape[0]
  parts = sharding.parts("vocab") if parts is None else parts
  if chunk:
    if vocab_size % parts:
      raise ValueError(f"{parts} parts of a vocabulary must divide its {vocab_size} rows")
    rows = vocab_size // parts
    # As many chunks as are needed, of one size.
    even = -(-rows // -(-rows // chunk))
    cut = _Cut(parts, min(chunk, rows, -(-even // _LANES) * _LANES))
    lse_BT, picked_BT = _by_chunks(cut, x_BTD, table_VD, bias_V, targets_BT)
  else:
    logits_BTV = vocabulary_logits(x_BTD, table_VD, bias_V)
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
  if not smoothing:
    return lse_BT - picked_BT
  other = smoothing / (vocab_size - 1)
  # The sum of all logits, of which none has to be held.
  wide = lse_BT.dtype
  row_D = jnp.sum(table_VD.astype(x_BTD.dtype), axis=0, dtype=wide)
  total_BT = jnp.einsum("btd,d->bt", x_BTD, row_D, preferred_element_type=wide)
  if bias_V is not None:
    total_BT += jnp.sum(bias_V, dtype=wide)
  return lse_BT - (1 - smoothing - other) * picked_BT - other * total_BT


def binary_cross_entropy(logits_BA: jax.Array, targets_BA: jax.Array) -> jax.Array:
  """-sum_a t_a log s(y_a) + (1 - t_a) log(1 - s(y_a)) [B] in nats, s the logistic function.

  Each of A answers is right or wrong by itself; targets between say how much. In float32 or wider.

  Args:
    logits_BA: y.
    targets_BA: t, in [0, 1].

  Reference: BEiT-3's released code, which means over B A and multiplies by A: the mean of this.
  """
  logits_BA = logits_BA.astype(jnp.promote_types(logits_BA.dtype, jnp.float32))
  # log s(y) = y + log s(-y), so that no difference of two large numbers is taken.
  nats_BA = jax.nn.softplus(logits_BA) - targets_BA.astype(logits_BA.dtype) * logits_BA
  return jnp.sum(nats_BA, axis=-1)


@dataclasses.dataclass(frozen=True)
class _Cut:
  """How a vocabulary is cut: into P parts on different devices, each into chunks of C rows.

  The last chunk of a part ends where the part ends; rows that the one before had are hidden in it.

  Attributes:
    parts, size: P and C.
  """

  parts: int
  size: int

  def parted(self, array_V: jax.Array) -> jax.Array:
    """[V, ...] as [P, R, ...]: each part on its devices, whole."""
    array_PR = array_V.reshape(self.parts, -1, *array_V.shape[1:])
    return sharding.constrain(array_PR, "vocab", *(None,) * (array_PR.ndim - 1))

  def scan(self, step, carry, rows: int):
    """The carry after `step(carry, start, seen)` of all chunks, (start, seen) see `_chunk`."""
    count = -(-rows // self.size)
    body = lambda carry, i: (step(carry, *self._chunk(i, rows)), None)
    return jax.lax.scan(body, carry, jnp.arange(count))[0]

  def _chunk(self, i, rows: int):
    """First row of a part's chunk i; [1, 1, 1, C], whether no earlier chunk had the row."""
    start = jnp.minimum(i * self.size, rows - self.size)
    seen_C = start + jnp.arange(self.size) >= i * self.size
    return start, seen_C.reshape(1, 1, 1, -1)

  def take(self, array_PR: jax.Array, start) -> jax.Array:
    """The chunk [P, C, ...] of an array [P, R, ...]."""
    return jax.lax.dynamic_slice_in_dim(array_PR, start, self.size, axis=1)

  def add(self, total_PR: jax.Array, chunk_PC: jax.Array, start) -> jax.Array:
    """The array [P, R, ...] with a chunk [P, C, ...] added."""
    chunk_PC = chunk_PC.astype(total_PR.dtype) + self.take(total_PR, start)
    return jax.lax.dynamic_update_slice_in_dim(total_PR, chunk_PC, start, axis=1)

  def logits(self, x_BTD, table_PRD, bias_PR, start) -> jax.Array:
    """[B, T, P, C] in float32 or wider."""
    wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
    logits_BTPC = jnp.einsum(
      "btd,pcd->btpc", x_BTD, self.take(table_PRD, start), preferred_element_type=wide
    )
    if bias_PR is not None:
      logits_BTPC += self.take(bias_PR, start)[None, None].astype(wide)
    return sharding.constrain(logits_BTPC, "batch", "length", "vocab", None)

  def is_target(self, targets_BT, start, rows: int) -> jax.Array:
    """[B, T, P, C]: by comparison, as a look-up would have to reach into other parts."""
    ids_PC = start + jnp.arange(self.size)[None] + rows * jnp.arange(self.parts)[:, None]
    return targets_BT[..., None, None] == ids_PC[None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_chunks(cut: _Cut, x_BTD, table_VD, bias_V, targets_BT):
  """(log sum_v exp z_v, z of the target), both [B, T], of the logits z."""
  table_PRD = cut.parted(table_VD.astype(x_BTD.dtype))
  bias_PR = None if bias_V is None else cut.parted(bias_V)
  rows = table_PRD.shape[1]

  def step(carry, start, seen):
    top_BTP, sum_BTP, picked_BTP = carry
    logits_BTPC = cut.logits(x_BTD, table_PRD, bias_PR, start)
    picked = seen & cut.is_target(targets_BT, start, rows)
    picked_BTP += jnp.where(picked, logits_BTPC, 0).sum(-1)
    logits_BTPC = jnp.where(seen, logits_BTPC, -jnp.inf)
    new_BTP = jnp.maximum(top_BTP, logits_BTPC.max(-1))
    sum_BTP = sum_BTP * jnp.exp(top_BTP - new_BTP)
    sum_BTP += jnp.exp(logits_BTPC - new_BTP[..., None]).sum(-1)
    return new_BTP, sum_BTP, picked_BTP

  wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
  zeros_BTP = jnp.zeros((*targets_BT.shape, cut.parts), wide)
  zeros_BTP = sharding.constrain(zeros_BTP, "batch", "length", "vocab")
  # Bounded from below, so that a chunk of logits that are all -inf adds exp(-inf) = 0, not NaN.
  lowest_BTP = jnp.full_like(zeros_BTP, jnp.finfo(wide).min)
  top_BTP, sum_BTP, picked_BTP = cut.scan(step, (lowest_BTP, zeros_BTP, zeros_BTP), rows)
  # The parts meet here, after the loop.
  return jax.nn.logsumexp(top_BTP, axis=-1, b=sum_BTP), picked_BTP.sum(-1)


def _forward(cut: _Cut, x_BTD, table_VD, bias_V, targets_BT):
  lse_BT, picked_BT = _by_chunks(cut, x_BTD, table_VD, bias_V, targets_BT)
  return (lse_BT, picked_BT), (x_BTD, table_VD, bias_V, targets_BT, lse_BT)


def _backward(cut: _Cut, kept, cotangents):
  """dz_v = softmax(z)_v dlse + [v is the target] dpicked, chunk by chunk."""
  x_BTD, table_VD, bias_V, targets_BT, lse_BT = kept
  dlse, dpicked = (d_BT[..., None, None] for d_BT in cotangents)
  table_PRD = cut.parted(table_VD.astype(x_BTD.dtype))
  bias_PR = None if bias_V is None else cut.parted(bias_V)
  rows, wide = table_PRD.shape[1], lse_BT.dtype

  def step(carry, start, seen):
    dx_PBTD, dtable_PRD, dbias_PR = carry
    logits_BTPC = cut.logits(x_BTD, table_PRD, bias_PR, start)
    d_BTPC = jnp.exp(logits_BTPC - lse_BT[..., None, None]) * dlse
    d_BTPC += jnp.where(cut.is_target(targets_BT, start, rows), dpicked, 0)
    d_BTPC = jnp.where(seen, d_BTPC, 0)
    if dbias_PR is not None:
      dbias_PR = cut.add(dbias_PR, d_BTPC.sum((0, 1)), start)
    d_BTPC = d_BTPC.astype(x_BTD.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    dx_PBTD += product("btpc,pcd->pbtd", d_BTPC, cut.take(table_PRD, start))
    dtable_PRD = cut.add(dtable_PRD, product("btpc,btd->pcd", d_BTPC, x_BTD), start)
    return dx_PBTD, dtable_PRD, dbias_PR

  batch, length, width = x_BTD.shape
  # Each part sums its own; they meet after the loop.
  dx_PBTD = jnp.zeros((cut.parts, batch, length, width), wide)
  dx_PBTD = sharding.constrain(dx_PBTD, "vocab", "batch", "length", None)
  dtable_PRD = jnp.zeros(table_PRD.shape, table_VD.dtype)
  dbias_PR = None if bias_V is None else jnp.zeros(bias_PR.shape, bias_V.dtype)
  dx_PBTD, dtable_PRD, dbias_PR = cut.scan(step, (dx_PBTD, dtable_PRD, dbias_PR), rows)
  dx_BTD = dx_PBTD.sum(0).astype(x_BTD.dtype)
  dbias_V = None if bias_V is None else dbias_PR.reshape(-1)
  return dx_BTD, dtable_PRD.reshape(table_VD.shape), dbias_V, None


_by_chunks.defvjp(_forward, _backward)
