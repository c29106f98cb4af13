"""The transducer's loss: of all logits at once, or never of more than a chunk of frames.

Letters: B batch, T frames, U labels of a text, X = U + 1 the lattice's columns, V the vocabulary
with the blank, J the joiner's width; N = T + U diagonals of the lattice; C frames of a chunk, P
parts of the batch on different devices.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from magneto_jax import sharding
from magneto_jax.layers.ctc import check_blank


def transducer_loss(
  logits_BTXV: jax.Array,
  frames_B: jax.Array,
  labels_BU: jax.Array,
  label_lengths_B: jax.Array,
  blank: int = 0,
) -> jax.Array:
  """-log P(labels) [B] in nats, float32 or wider, P the sum over all alignments.

  An alignment begins at frame t = 0 with no label said, u = 0. From (t, u) it says label y_{u+1}
  and goes to (t, u + 1), or the blank and goes to (t + 1, u); it ends with the blank that leaves
  the last frame with all labels said. With p_{t,u} = softmax(z_{t,u}) and
  beta_{t,u} = log P(what follows (t, u)),

    beta_{t,u} = log(p_{t,u}(blank) exp beta_{t+1,u} + p_{t,u}(y_{u+1}) exp beta_{t,u+1}),
    beta_{T,U} = 0,   log P = beta_{0,0}.

  The gradient is exact and closed, dL/dz_{t,u,k} = gamma p(k) - o_b [k = blank] - o_y [k = y_{u+1}]
  with the `occupancies` o and gamma = o_b + o_y: nothing of the size of the logits is kept but the
  logits themselves. It can be differentiated once, in reverse mode only; twice is refused.

  Beyond an utterance's frames and labels there may be any numbers, and the gradient is 0. A text
  may be empty. An utterance without frames costs 0, with the gradient 0, whatever its text: nothing
  can be learned from it. One whose text is impossible (by logits of -inf) costs infinity, with the
  gradient 0.

  Args:
    logits_BTXV: z, of each frame after each number of labels.
    frames_B: integers in [0, T], how many frames each utterance has.
    labels_BU: y, integers in [0, V).
    label_lengths_B: integers in [0, U], how many labels.
    blank: the id of the blank.

  Raises:
    ValueError: shapes that do not belong together, or a blank that is none of V.
    TypeError: a gradient of the gradient is asked for.

  Reference: Graves, arXiv 1211.3711, section 2.4 and 2.5.
  """
  batch, length, columns, vocab_size = logits_BTXV.shape
  _check((batch, length, columns), vocab_size, frames_B, labels_BU, label_lengths_B, blank)
  return _of_logits(blank, logits_BTXV, frames_B, labels_BU, label_lengths_B)


def fused_transducer_loss(
  encoded_BTJ: jax.Array,
  predicted_BXJ: jax.Array,
  kernel_JV: jax.Array,
  bias_V: jax.Array,
  frames_B: jax.Array,
  labels_BU: jax.Array,
  label_lengths_B: jax.Array,
  blank: int = 0,
  *,
  chunk: int = 4,
) -> jax.Array:
  """`transducer_loss` of z_{t,u} = W^T tanh(e_t + g_u) + b, of which a chunk exists at a time.

  Of the whole lattice only numbers by cell are kept, [B, T, U + 1]: the logarithm of the softmax's
  sum and the occupancies. The backward pass computes each chunk's logits again: at no time more
  than B C (U + 1) V of them live. There the gradient with respect to the logits is rounded to the
  dtype of e before its products, which are summed in float32 or wider. On a mesh that cuts the
  batch nothing crosses it within the loops: each part sums its own gradient of W and b.

  Args:
    encoded_BTJ: e, the encoder's states, projected.
    predicted_BXJ: g, the predictor's states after 0 .. U labels, projected.
    kernel_JV: W; cast to the dtype of e.
    bias_V: b.
    frames_B, labels_BU, label_lengths_B, blank: as in `transducer_loss`; but what e and g have
      beyond must be finite.
    chunk: C, how many frames' logits are held at a time.

  Raises:
    ValueError: as `transducer_loss`; or less than one frame a chunk.

  Reference: as `transducer_loss`. The joiner: arXiv 1303.5778, section 3.2.

  Example:
    >>> nats_B = fused_transducer_loss(
    ...   encoded_BTJ, predicted_BXJ, kernel_JV, bias_V, frames_B, labels_BU, label_lengths_B
    ... )
    >>> loss = nats_B.sum() / label_lengths_B.sum()
  """
  batch, length, width = encoded_BTJ.shape
  if predicted_BXJ.shape[::2] != (batch, width) or kernel_JV.shape != (width, len(bias_V)):
    raise ValueError(
      f"encoded {list(encoded_BTJ.shape)}, predicted {list(predicted_BXJ.shape)}, kernel"
      f" {list(kernel_JV.shape)} and bias {list(bias_V.shape)} must be [B, T, J], [B, U + 1, J],"
      " [J, V] and [V]"
    )
  if chunk < 1:
    raise ValueError(f"{chunk=} must be at least one frame")
  lattice = (batch, length, predicted_BXJ.shape[1])
  _check(lattice, len(bias_V), frames_B, labels_BU, label_lengths_B, blank)
  options = (blank, min(chunk, max(1, length)))
  joiner = (encoded_BTJ, predicted_BXJ, kernel_JV, bias_V)
  return _of_joiner(options, *joiner, frames_B, labels_BU, label_lengths_B)


def _check(lattice, vocab_size, frames_B, labels_BU, label_lengths_B, blank) -> None:
  """Raises ValueError unless shapes are those of one batch."""
  batch, length, columns = lattice
  if labels_BU.shape != (batch, columns - 1):
    raise ValueError(
      f"labels {list(labels_BU.shape)} must be [{batch}, {columns - 1}]: the lattice"
      f" {list(lattice)} has a column more than there are labels"
    )
  if not frames_B.shape == label_lengths_B.shape == (batch,) or not length:
    raise ValueError(
      f"frames {list(frames_B.shape)} and label lengths {list(label_lengths_B.shape)} must be"
      f" [{batch}], and the {length} frames at least 1"
    )
  check_blank(blank, vocab_size)


# ---------------------------------------------------------------------------------------------
# The lattice
# ---------------------------------------------------------------------------------------------


class Occupancies(NamedTuple):
  """How probable each step of an alignment is, given the text.

  Attributes:
    nats_B: -log P of each text.
    blank_BTX, label_BTX: o_b and o_y, the probabilities that the alignment leaves (t, u) by the
      blank, and by label u + 1. Of each label they sum to 1 over the frames, and of each frame's
      blank over the columns.
  """

  nats_B: jax.Array
  blank_BTX: jax.Array
  label_BTX: jax.Array


def occupancies(
  blank_BTX: jax.Array, label_BTX: jax.Array, frames_B: jax.Array, label_lengths_B: jax.Array
) -> Occupancies:
  """The lattice's forward-backward recursion, with alpha_{t,u} = log P(what leads to (t, u)):

    o_b = exp(alpha_{t,u} + log p_{t,u}(blank) + beta_{t+1,u}) / P,
    o_y = exp(alpha_{t,u} + log p_{t,u}(y_{u+1}) + beta_{t,u+1}) / P.

  It goes by the N = T + U diagonals t + u = n, alpha from the first and beta from the last in the
  same step of one loop, which is one vector operation on [B, X] each; by frames, a step would hold
  a scan over u, or its log2 U levels. Every alignment makes exactly one step from each of its
  diagonals. So a diagonal's occupancies sum to 1, and alpha and beta may be shifted by any number a
  diagonal: their largest is kept 0, without which float32 had to tell apart probabilities whose
  logarithms are thousands.

  Args:
    blank_BTX, label_BTX: log p_{t,u} of the blank, and of label u + 1; float32 or wider.
    frames_B, label_lengths_B: as in `transducer_loss`, for what lies outside, too.
  """
  _, length, columns = blank_BTX.shape
  t_T1 = jnp.arange(length)[None, :, None]
  u_1X = jnp.arange(columns)[None]
  has_frame_BTX = t_T1 < frames_B[:, None, None]
  has_label_BTX = has_frame_BTX & (u_1X < label_lengths_B[:, None])[:, None]
  planes = tuple(
    _diagonals(jnp.where(known, plane, -jnp.inf))
    for known, plane in ((has_frame_BTX, blank_BTX), (has_label_BTX, label_BTX))
  )

  # The point that the last blank leads to, which ends an alignment.
  end_BX = jnp.where(u_1X == label_lengths_B[:, None], 0.0, -jnp.inf).astype(blank_BTX.dtype)
  start_BX = jnp.where(u_1X == 0, jnp.zeros_like(end_BX), -jnp.inf)
  numbers_N = jnp.arange(length + columns - 1)
  ended_NB = numbers_N[:, None] >= (frames_B + label_lengths_B)[None]

  def step(carry, diagonal):
    alpha_BX, beta_BX = carry
    (blank_BX, label_BX), (late_blank_BX, late_label_BX), ended_B = diagonal
    next_BX = jnp.logaddexp(alpha_BX + blank_BX, _right(alpha_BX + label_BX))
    before_BX = jnp.logaddexp(beta_BX + late_blank_BX, _left(beta_BX) + late_label_BX)
    before_BX, top_B = _rescaled(jnp.where(ended_B[:, None], end_BX, before_BX))
    return (_rescaled(next_BX)[0], before_BX), (alpha_BX, beta_BX, top_B)

  last_first = functools.partial(jnp.flip, axis=0)
  late = tuple(map(last_first, planes))
  (_, first_BX), (alpha_NBX, beta_NBX, top_NB) = jax.lax.scan(
    step, (start_BX, end_BX), (planes, late, last_first(ended_NB))
  )
  # Of the diagonal that follows each.
  beta_NBX = last_first(beta_NBX)
  nats_B = jnp.where(frames_B > 0, -(jnp.sum(top_NB, axis=0) + first_BX[:, 0]), 0)

  blank_NBX = alpha_NBX + planes[0] + beta_NBX
  label_NBX = alpha_NBX + planes[1] + _left(beta_NBX)
  top_NB1 = jnp.max(jnp.maximum(blank_NBX, label_NBX), axis=-1, keepdims=True)
  top_NB1 = jnp.where(top_NB1 == -jnp.inf, 0, top_NB1)
  blank_NBX, label_NBX = jnp.exp(blank_NBX - top_NB1), jnp.exp(label_NBX - top_NB1)
  sum_NB1 = jnp.sum(blank_NBX + label_NBX, axis=-1, keepdims=True)
  # Where no alignment passes, 0 / 1.
  sum_NB1 = jnp.where(sum_NB1 == 0, 1, sum_NB1)
  o_BTX = (_frames(plane_NBX / sum_NB1, length) for plane_NBX in (blank_NBX, label_NBX))
  return Occupancies(nats_B, *o_BTX)


def _diagonals(plane_BTX: jax.Array) -> jax.Array:
  """[N, B, X]: cell (t, u) at (t + u, u), elsewhere -inf.

  Each column, lengthened by X, begins one place later when rows are read as one shorter.
  """
  batch, length, columns = plane_BTX.shape
  pad = ((0, 0), (0, 0), (0, columns))
  plane_BXT = jnp.pad(jnp.swapaxes(plane_BTX, 1, 2), pad, constant_values=-jnp.inf)
  flat = plane_BXT.reshape(batch, -1)[:, :-columns]
  return jnp.moveaxis(flat.reshape(batch, columns, length + columns - 1), 2, 0)


def _frames(plane_NBX: jax.Array, length: int) -> jax.Array:
  """[B, T, X] of what `_diagonals` makes."""
  _, batch, columns = plane_NBX.shape
  flat = jnp.moveaxis(plane_NBX, 0, 2).reshape(batch, -1)
  plane_BXT = jnp.pad(flat, ((0, 0), (0, columns))).reshape(batch, columns, length + columns)
  return jnp.swapaxes(plane_BXT[..., :length], 1, 2)


def _right(x: jax.Array) -> jax.Array:
  """x [..., X] one column later, -inf in the first."""
  pad = ((0, 0),) * (x.ndim - 1)
  return jnp.pad(x[..., :-1], (*pad, (1, 0)), constant_values=-jnp.inf)


def _left(x: jax.Array) -> jax.Array:
  """x [..., X] one column earlier, -inf in the last."""
  pad = ((0, 0),) * (x.ndim - 1)
  return jnp.pad(x[..., 1:], (*pad, (0, 1)), constant_values=-jnp.inf)


def _rescaled(x_BX: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x less its largest, and that, [B]; x and 0 where all are -inf."""
  top_B1 = jnp.max(x_BX, axis=-1, keepdims=True)
  top_B1 = jnp.where(top_B1 == -jnp.inf, 0, top_B1)
  return x_BX - top_B1, top_B1[:, 0]


# ---------------------------------------------------------------------------------------------
# Logits
# ---------------------------------------------------------------------------------------------


def _normalised(logits_BTXV: jax.Array, labels_BX: jax.Array, blank: int):
  """(log of the softmax's sum, log p of the blank, log p of the next label), each [B, T, X]."""
  lse_BTX = jax.nn.logsumexp(logits_BTXV, axis=-1)
  label_BTX1 = jnp.take_along_axis(logits_BTXV, labels_BX[:, None, :, None], axis=-1)
  return lse_BTX, logits_BTXV[..., blank] - lse_BTX, label_BTX1[..., 0] - lse_BTX


def _gradient(logits_BTXV, lse_BTX, blank_BTX, label_BTX, labels_BX, blank: int) -> jax.Array:
  """dL/dz, given o_b and o_y, each times dL/dnats."""
  ids_111V = jnp.arange(logits_BTXV.shape[-1])[None, None, None]
  gamma_BTX1 = (blank_BTX + label_BTX)[..., None]
  # Where no alignment passes, the softmax may be of anything, and its sum of nothing.
  p_BTXV = jnp.where(gamma_BTX1 == 0, 0, jnp.exp(logits_BTXV - lse_BTX[..., None]))
  d_BTXV = gamma_BTX1 * p_BTXV
  # By comparison, in one pass: to scatter, accelerators would go over it again.
  d_BTXV -= jnp.where(ids_111V == blank, blank_BTX[..., None], 0)
  return d_BTXV - jnp.where(ids_111V == labels_BX[:, None, :, None], label_BTX[..., None], 0)


def _next_labels(labels_BU: jax.Array) -> jax.Array:
  """[B, X]: what each column's label is; of the last column, which has none, 0."""
  return jnp.pad(labels_BU, ((0, 0), (0, 1)))


@jax.custom_jvp
def _once(x):
  """x, arrays that a loss keeps for its gradient, which has no gradient itself."""
  return x


@_once.defjvp
def _refuse(primals, tangents):
  raise TypeError("a transducer's loss can be differentiated once: its gradient is a closed form")


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# ---------------------------------------------------------------------------------------------
# Of all logits
# ---------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_logits(blank, logits_BTXV, frames_B, labels_BU, label_lengths_B):
  return _of_logits_forward(blank, logits_BTXV, frames_B, labels_BU, label_lengths_B)[0]


def _of_logits_forward(blank, logits_BTXV, frames_B, labels_BU, label_lengths_B):
  logits_BTXV = _once(logits_BTXV)
  lse_BTX, *planes = _normalised(_wide(logits_BTXV), _next_labels(labels_BU), blank)
  nats_B, *o_BTX = occupancies(*planes, frames_B, label_lengths_B)
  return nats_B, (logits_BTXV, labels_BU, lse_BTX, *o_BTX)


def _of_logits_backward(blank, kept, dnats_B):
  logits_BTXV, labels_BU, lse_BTX, *o_BTX = kept
  o_BTX = (plane_BTX * dnats_B[:, None, None] for plane_BTX in o_BTX)
  d_BTXV = _gradient(_wide(logits_BTXV), lse_BTX, *o_BTX, _next_labels(labels_BU), blank)
  return d_BTXV.astype(logits_BTXV.dtype), None, None, None


_of_logits.defvjp(_of_logits_forward, _of_logits_backward)


# ---------------------------------------------------------------------------------------------
# By chunks of frames
# ---------------------------------------------------------------------------------------------


def _chunks(x_BT: jax.Array, chunk: int) -> jax.Array:
  """[B, T, ...] as [T / C, B, C, ...], with zeros behind the last frame."""
  batch, length = x_BT.shape[:2]
  count = -(-length // chunk)
  # As many chunks as are needed, of one size.
  size = -(-length // count)
  pad = ((0, 0), (0, count * size - length), *((0, 0),) * (x_BT.ndim - 2))
  return jnp.moveaxis(jnp.pad(x_BT, pad).reshape(batch, count, size, *x_BT.shape[2:]), 1, 0)


def _whole(x_NBC: jax.Array, length: int) -> jax.Array:
  """[B, T, ...] of what `_chunks` makes."""
  x_BNC = jnp.moveaxis(x_NBC, 0, 1)
  return x_BNC.reshape(len(x_BNC), -1, *x_BNC.shape[3:])[:, :length]


def _joined(e_BCJ, g_BXJ, kernel_JV, bias_V):
  """(tanh(e + g) [B, C, X, J], the logits [B, C, X, V] in float32 or wider)."""
  hidden_BCXJ = jnp.tanh(e_BCJ[:, :, None] + g_BXJ[:, None])
  wide = jnp.promote_types(hidden_BCXJ.dtype, jnp.float32)
  logits_BCXV = jnp.einsum(
    "bcxj,jv->bcxv",
    hidden_BCXJ,
    kernel_JV.astype(hidden_BCXJ.dtype),
    preferred_element_type=wide,
  )
  logits_BCXV += bias_V.astype(wide)[None, None, None]
  return hidden_BCXJ, sharding.constrain(logits_BCXV, "batch", None, None, "vocab")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_joiner(options, e_BTJ, g_BXJ, kernel_JV, bias_V, frames_B, labels_BU, label_lengths_B):
  joiner = (e_BTJ, g_BXJ, kernel_JV, bias_V)
  return _of_joiner_forward(options, *joiner, frames_B, labels_BU, label_lengths_B)[0]


def _of_joiner_forward(
  options, e_BTJ, g_BXJ, kernel_JV, bias_V, frames_B, labels_BU, label_lengths_B
):
  blank, chunk = options
  e_BTJ, g_BXJ, kernel_JV, bias_V = _once((e_BTJ, g_BXJ, kernel_JV, bias_V))
  labels_BX = _next_labels(labels_BU)

  def step(_, e_BCJ):
    return None, _normalised(_joined(e_BCJ, g_BXJ, kernel_JV, bias_V)[1], labels_BX, blank)

  _, planes = jax.lax.scan(step, None, _chunks(e_BTJ, chunk))
  lse_BTX, *planes = (_whole(plane, e_BTJ.shape[1]) for plane in planes)
  nats_B, *o_BTX = occupancies(*planes, frames_B, label_lengths_B)
  return nats_B, (e_BTJ, g_BXJ, kernel_JV, bias_V, labels_BU, lse_BTX, *o_BTX)


def _of_joiner_backward(options, kept, dnats_B):
  blank, chunk = options
  e_BTJ, g_BXJ, kernel_JV, bias_V, labels_BU, lse_BTX, *o_BTX = kept
  o_BTX = (plane_BTX * dnats_B[:, None, None] for plane_BTX in o_BTX)
  labels_BX, wide = _next_labels(labels_BU), dnats_B.dtype
  # Each part of the batch sums its own; they meet after the loop.
  parts = sharding.parts("batch")
  parts = parts if len(e_BTJ) % parts == 0 else 1
  by_part = lambda x_B: x_B.reshape(parts, -1, x_B.shape[-1])
  product = functools.partial(jnp.einsum, preferred_element_type=wide)

  def step(carry, inputs):
    dg_BXJ, dkernel_PJV, dbias_PV = carry
    e_BCJ, *planes = inputs
    hidden_BCXJ, logits_BCXV = _joined(e_BCJ, g_BXJ, kernel_JV, bias_V)
    d_BCXV = _gradient(logits_BCXV, *planes, labels_BX, blank)
    dbias_PV += by_part(d_BCXV).sum(1)
    d_BCXV = d_BCXV.astype(hidden_BCXJ.dtype)
    dkernel_PJV += product("pnj,pnv->pjv", by_part(hidden_BCXJ), by_part(d_BCXV))
    du_BCXJ = product("bcxv,jv->bcxj", d_BCXV, kernel_JV.astype(d_BCXV.dtype))
    du_BCXJ *= 1 - jnp.square(hidden_BCXJ.astype(wide))
    return (dg_BXJ + du_BCXJ.sum(1), dkernel_PJV, dbias_PV), du_BCXJ.sum(2)

  by_parts = lambda shape: sharding.constrain(
    jnp.zeros((parts, *shape), wide), "batch", *(None,) * (len(shape) - 1), "vocab"
  )
  carry = (jnp.zeros(g_BXJ.shape, wide), by_parts(kernel_JV.shape), by_parts(bias_V.shape))
  chunks = tuple(_chunks(x_BT, chunk) for x_BT in (e_BTJ, lse_BTX, *o_BTX))
  (dg_BXJ, dkernel_PJV, dbias_PV), de_NBCJ = jax.lax.scan(step, carry, chunks)
  return (
    _whole(de_NBCJ, e_BTJ.shape[1]).astype(e_BTJ.dtype),
    dg_BXJ.astype(g_BXJ.dtype),
    dkernel_PJV.sum(0).astype(kernel_JV.dtype),
    dbias_PV.sum(0).astype(bias_V.dtype),
    None,
    None,
    None,
  )


_of_joiner.defvjp(_of_joiner_forward, _of_joiner_backward)
