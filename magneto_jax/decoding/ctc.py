"""Texts from a CTC's probabilities: the best alignment, and a beam of texts.

Letters: B batch, T frames, V the vocabulary with the blank, U the longest text; W beams.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from magneto_jax.layers.ctc import check_blank


class Transcripts(NamedTuple):
  """The texts found for each utterance, the best first.

  Attributes:
    tokens_BWU: labels, with 0 behind the last.
    lengths_BW: how many labels each text has.
    scores_BW: the logarithm of the probability of all its alignments that the search has followed;
      -inf where fewer texts were found.
  """

  tokens_BWU: jax.Array
  lengths_BW: jax.Array
  scores_BW: jax.Array


class Texts(NamedTuple):
  """Label sequences on their way: of the beams of an utterance, or one of each utterance.

  Attributes:
    tokens_WU: the labels, -1 behind the last.
    lengths_W: how many.
  """

  tokens_WU: jax.Array
  lengths_W: jax.Array

  @classmethod
  def empty(cls, width: int, longest: int) -> "Texts":
    return cls(jnp.full((width, longest), -1, jnp.int32), jnp.zeros((width,), jnp.int32))

  def take(self, rows: jax.Array) -> "Texts":
    return Texts(self.tokens_WU[rows], self.lengths_W[rows])

  def said(self, labels_W: jax.Array, says_W: jax.Array) -> "Texts":
    """Those that say a label are longer by it; all must have room."""
    at_WU = jnp.arange(self.tokens_WU.shape[1])[None] == self.lengths_W[:, None]
    tokens_WU = jnp.where(at_WU & says_W[:, None], labels_W[:, None], self.tokens_WU)
    return Texts(tokens_WU, self.lengths_W + says_W)

  @property
  def last_W(self) -> jax.Array:
    """The last label; -1 of an empty text."""
    at_WU = jnp.arange(self.tokens_WU.shape[1])[None] == self.lengths_W[:, None] - 1
    return jnp.sum(jnp.where(at_WU, self.tokens_WU + 1, 0), axis=1) - 1

  @property
  def shorter(self) -> "Texts":
    """Without the last label; an empty text becomes one that is equal to none."""
    at_WU = jnp.arange(self.tokens_WU.shape[1])[None] >= self.lengths_W[:, None] - 1
    return Texts(jnp.where(at_WU, -1, self.tokens_WU), self.lengths_W - 1)

  def equals(self, other: "Texts") -> jax.Array:
    """[W, W]: whether a text is another's."""
    tokens_WW = jnp.all(self.tokens_WU[:, None] == other.tokens_WU[None], axis=-1)
    return tokens_WW & (self.lengths_W[:, None] == other.lengths_W[None])

  def transcripts(self, scores_W: jax.Array) -> Transcripts:
    """Of one utterance, the best first."""
    order_W = jnp.argsort(-scores_W, stable=True)
    tokens_WU, lengths_W = self.take(order_W)
    return Transcripts(jnp.maximum(tokens_WU, 0), lengths_W, scores_W[order_W])


@functools.partial(jax.jit, static_argnames=("max_length", "blank"))
def ctc_greedy(
  log_p_BTV: jax.Array, frames_B: jax.Array, *, max_length: int | None = None, blank: int = 0
) -> Transcripts:
  """The text of the alignment that takes the likeliest symbol of each frame, [B, 1, U].

  Once a text has `max_length` labels, of the symbols that do not extend it: the blank, and its last
  label while that goes on.

  Args:
    log_p_BTV: log-probabilities of each frame.
    frames_B: how many frames each utterance has.
    max_length: U; by default T, the most there can be.
    blank: the id of the blank.

  Returns:
    One text each, scored by its one alignment.

  Raises:
    ValueError: less than one label, or a blank that is none of V.
  """
  longest = _longest(log_p_BTV, max_length, blank)
  log_p_TBV = jnp.moveaxis(_wide(log_p_BTV), 1, 0)
  length, batch, vocab_size = log_p_TBV.shape
  ids_1V = jnp.arange(vocab_size, dtype=jnp.int32)[None]

  def step(carry, frame):
    texts, before_B, scores_B = carry
    t, log_p_BV = frame
    extends_BV = (ids_1V != blank) & (ids_1V != before_B[:, None])
    is_full_B1 = (texts.lengths_W == longest)[:, None]
    log_p_BV = jnp.where(extends_BV & is_full_B1, -jnp.inf, log_p_BV)
    within_B = t < frames_B
    best_B = jnp.where(within_B, jnp.argmax(log_p_BV, axis=-1).astype(jnp.int32), blank)
    scores_B += jnp.where(within_B, jnp.max(log_p_BV, axis=-1), 0)
    texts = texts.said(best_B, (best_B != blank) & (best_B != before_B))
    return (texts, best_B, scores_B), None

  start = jnp.full((batch,), blank, jnp.int32), jnp.zeros((batch,), log_p_TBV.dtype)
  carry = (Texts.empty(batch, longest), *start)
  (texts, _, scores_B), _ = jax.lax.scan(step, carry, (jnp.arange(length), log_p_TBV))
  tokens_BU = jnp.maximum(texts.tokens_WU, 0)
  return Transcripts(tokens_BU[:, None], texts.lengths_W[:, None], scores_B[:, None])


@functools.partial(jax.jit, static_argnames=("width", "max_length", "blank"))
def ctc_beam_search(
  log_p_BTV: jax.Array,
  frames_B: jax.Array,
  *,
  width: int,
  max_length: int | None = None,
  blank: int = 0,
) -> Transcripts:
  """The texts that a beam search finds the most probable, each the sum of its alignments.

  A beam is a text with how it ends, in its last label or in a blank: these two go on differently,
  as a label that is repeated at once is no new one. Of a frame all beams are followed by all
  symbols, what makes the same text with the same end is added, and the k best go on, equal ones in
  the order of beams and then of ids. At last the two ends of a text are added.

  So with k = 1 the search follows the likeliest symbol of each frame, as `ctc_greedy` does; with
  as many beams as there are texts and ends, the scores are exact. (Prefix search that keeps both
  ends of k texts corresponds to 2 k beams.)

  Args:
    log_p_BTV: log-probabilities of each frame.
    frames_B: how many frames each utterance has.
    width: k.
    max_length: U, beyond which a text is not extended; by default T, the most there can be.
    blank: the id of the blank.

  Returns:
    At most k texts each, [B, k, U], all different.

  Raises:
    ValueError: fewer than one beam or one label, or a blank that is none of V.

  Reference: Graves et al., Connectionist temporal classification, ICML 2006, section 3.2; Hannun et
  al., arXiv 1408.2873, algorithm 1.

  Example:
    >>> found = ctc_beam_search(log_p_BTV, frames_B, width=8)
    >>> best = found.tokens_BWU[0, 0, : found.lengths_BW[0, 0]]
  """
  if width < 1:
    raise ValueError(f"{width=} must be at least 1")
  longest = _longest(log_p_BTV, max_length, blank)
  search = functools.partial(_search, width=width, longest=longest, blank=blank)
  return jax.vmap(search)(_wide(log_p_BTV), frames_B)


def _longest(log_p_BTV: jax.Array, max_length: int | None, blank: int) -> int:
  _, length, vocab_size = log_p_BTV.shape
  longest = length if max_length is None else max_length
  if longest < 1:
    raise ValueError(f"{max_length=} must be at least 1")
  check_blank(blank, vocab_size)
  return longest


def _wide(log_p_BTV: jax.Array) -> jax.Array:
  return log_p_BTV.astype(jnp.promote_types(log_p_BTV.dtype, jnp.float32))


class _Beams(NamedTuple):
  """The search of one utterance.

  Attributes:
    texts: W texts.
    in_label_W: whether they end in their last label, and not in a blank.
    scores_W: logarithms of the sums of their alignments, -inf where there are fewer.
  """

  texts: Texts
  in_label_W: jax.Array
  scores_W: jax.Array


def _search(log_p_TV, frames, *, width: int, longest: int, blank: int) -> Transcripts:
  none_W = jnp.full((width,), -jnp.inf, log_p_TV.dtype)
  beams = _Beams(Texts.empty(width, longest), jnp.zeros((width,), bool), none_W.at[0].set(0))

  def step(beams, frame):
    t, log_p_V = frame
    following = _follow(beams, log_p_V, blank)
    return jax.tree.map(lambda a, b: jnp.where(t < frames, a, b), following, beams), None

  beams, _ = jax.lax.scan(step, beams, (jnp.arange(len(log_p_TV)), log_p_TV))
  texts, in_label_W, scores_W = beams
  other_W, has_other_W = _twin(beams)
  both_W = jnp.logaddexp(scores_W, jnp.where(has_other_W, scores_W[other_W], -jnp.inf))
  return texts.transcripts(jnp.where(in_label_W & has_other_W, -jnp.inf, both_W))


def _twin(beams: _Beams) -> tuple[jax.Array, jax.Array]:
  """Of each beam the one with the same text and the other end, and whether it is there."""
  texts, in_label_W, scores_W = beams
  is_live_W = scores_W > -jnp.inf
  is_twin_WW = texts.equals(texts) & (in_label_W[:, None] != in_label_W[None])
  is_twin_WW &= is_live_W[:, None] & is_live_W[None]
  return jnp.argmax(is_twin_WW, axis=1), jnp.any(is_twin_WW, axis=1)


def _follow(beams: _Beams, log_p_V: jax.Array, blank: int) -> _Beams:
  """The best beams after a frame.

  In each row of the candidates [W, V], the column of the blank is the row's text with a blank
  behind it; that of its last label, if it ends in it, is the text as it was; and any other is the
  text with one more label.
  """
  texts, in_label_W, scores_W = beams
  width, vocab_size = len(scores_W), len(log_p_V)
  total_WV = scores_W[:, None] + log_p_V[None]
  ids_1V = jnp.arange(vocab_size)[None]
  last_W = texts.last_W
  repeats_WV = in_label_W[:, None] & (ids_1V == last_W[:, None])
  extends_WV = (ids_1V != blank) & ~repeats_WV
  is_full_W = texts.lengths_W == texts.tokens_WU.shape[1]
  total_WV = jnp.where(extends_WV & is_full_W[:, None], -jnp.inf, total_WV)

  # What both ends of a text lead to, the row of the blank end holds.
  twin_W, has_twin_W = _twin(beams)
  moves_WV = (in_label_W & has_twin_W)[:, None] & ~repeats_WV
  moved_WV = jnp.where(moves_WV, total_WV, -jnp.inf)[twin_W]
  gains_W1 = (~in_label_W & has_twin_W)[:, None]
  total_WV = jnp.where(gains_W1, jnp.logaddexp(total_WV, moved_WV), total_WV)
  total_WV = jnp.where(moves_WV, -jnp.inf, total_WV)

  # A beam that ends in its last label is also what the text without it leads to by that label.
  is_live_W = scores_W > -jnp.inf
  holds_WW = texts.shorter.equals(texts) & extends_WV[:, last_W].T
  holds_WW &= (is_live_W & in_label_W)[:, None] & (is_live_W & ~(in_label_W & has_twin_W))[None]
  parent_W, has_parent_W = jnp.argmax(holds_WW, axis=1), jnp.any(holds_WW, axis=1)
  rows_W = jnp.arange(width)
  amount_W = jnp.where(has_parent_W, total_WV[parent_W, last_W], -jnp.inf)
  # Indices beyond the array are dropped.
  gone_W = jnp.where(has_parent_W, parent_W, width)
  total_WV = total_WV.at[gone_W, last_W].set(-jnp.inf, mode="drop")
  own_W = jnp.where(has_parent_W, rows_W, width)
  repeat_W = jnp.logaddexp(total_WV[rows_W, last_W], amount_W)
  total_WV = total_WV.at[own_W, last_W].set(repeat_W, mode="drop")

  scores_W, index_W = jax.lax.top_k(total_WV.reshape(-1), width)
  from_W, ids_W = index_W // vocab_size, index_W % vocab_size
  texts = texts.take(from_W).said(ids_W, extends_WV[from_W, ids_W] & (scores_W > -jnp.inf))
  return _Beams(texts, ids_W != blank, scores_W)
