"""Texts from a transducer, of which two functions are given: greedily, and by a beam of texts.

Letters: B batch, T frames, U the longest text, V the vocabulary with the blank; W beams, N rows
that a function is asked for at once.

Both are to be called under `jax.jit`: the functions may hold traced parameters.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from magneto_jax.decoding.ctc import Texts, Transcripts
from magneto_jax.layers.ctc import check_blank

# (state, labels [N]) -> (what the joiner reads of it, state): the predictor takes in a label a row.
# All leaves of both have the rows as their first axis.
Predict = Callable
# (encoder's states [N, ...], the predictor's answer) -> logits [N, V].
Join = Callable


def transducer_greedy(
  predict: Predict,
  join: Join,
  state,
  h_BTD: jax.Array,
  frames_B: jax.Array,
  *,
  max_symbols: int,
  max_length: int,
  blank: int = 0,
) -> Transcripts:
  """The text of the alignment that takes the likeliest symbol each time, [B, 1, U].

  A label is said and the predictor told; a blank leads on to the next frame. A frame in which
  `max_symbols` labels have been said, and a text of `max_length` labels, are followed by a blank,
  however likely it is. Each utterance goes its own way: as many rounds are run as the longest has
  symbols.

  Args:
    predict: `(state, labels_N) -> (g, state)`: the predictor's answer after a label, and after the
      blank, which is told first.
    join: `(h_ND, g) -> logits [N, V]`.
    state: the predictor's first, a tree of arrays [B, ...].
    h_BTD: the encoder's states, or what the joiner makes of them.
    frames_B: how many frames each utterance has.
    max_symbols: the most labels said in a frame.
    max_length: U.
    blank: the id of the blank.

  Returns:
    One text each, scored by its one alignment.

  Raises:
    ValueError: fewer than one label a frame or a text, or a blank that is none of V.

  Reference: Graves, arXiv 1211.3711, section 2.6.
  """
  _check(1, max_symbols, max_length)
  batch, length = h_BTD.shape[:2]
  log_p = functools.partial(_log_p, join, blank)
  g, state = predict(state, jnp.full((batch,), blank, jnp.int32))
  zeros_B = jnp.zeros((batch,), jnp.int32)
  at = lambda t_B: jax.vmap(lambda h_TD, t: h_TD[t])(h_BTD, jnp.minimum(t_B, length - 1))
  scores_B = jnp.zeros((batch,), jax.eval_shape(log_p, at(zeros_B), g).dtype)

  def goes_on(carry):
    return jnp.any(carry[0] < frames_B)

  def advance(carry):
    t_B, said_B, texts, scores_B, g, state = carry
    log_p_BV = log_p(at(t_B), g)
    must_move_B = (said_B == max_symbols) | (texts.lengths_W == max_length)
    best_B = jnp.where(must_move_B, blank, jnp.argmax(log_p_BV, axis=-1)).astype(jnp.int32)
    goes_B = t_B < frames_B
    moves_B, says_B = goes_B & (best_B == blank), goes_B & (best_B != blank)
    picked_B = jnp.take_along_axis(log_p_BV, best_B[:, None], axis=-1)[:, 0]
    scores_B += jnp.where(goes_B, picked_B, 0)
    g, state = _where(says_B, predict(state, best_B), (g, state))
    said_B = jnp.where(moves_B, 0, said_B + says_B)
    return t_B + moves_B, said_B, texts.said(best_B, says_B), scores_B, g, state

  carry = (zeros_B, zeros_B, Texts.empty(batch, max_length), scores_B, g, state)
  _, _, texts, scores_B, *_ = jax.lax.while_loop(goes_on, advance, carry)
  tokens_BU = jnp.maximum(texts.tokens_WU, 0)
  return Transcripts(tokens_BU[:, None], texts.lengths_W[:, None], scores_B[:, None])


def transducer_beam_search(
  predict: Predict,
  join: Join,
  state,
  h_BTD: jax.Array,
  frames_B: jax.Array,
  *,
  width: int,
  max_symbols: int,
  max_length: int,
  blank: int = 0,
) -> Transcripts:
  """The texts that a search frame by frame finds the most probable, as sums of their alignments.

  A beam is a text, and whether it is through with the frame. In each round those that are not are
  followed by all symbols, by the blank they are through; what makes the same text is added; and the
  k best of all go on, equal ones in the order of beams and then of ids. After `max_symbols` labels
  in a frame, and `max_length` in all, only the blank follows. Once all are through, the next frame
  begins.

  So with k = 1 the search follows the likeliest symbol each time, as `transducer_greedy` does; with
  as many beams as there are texts, twice, and `max_symbols` = U, the scores are exact.

  Args:
    predict, join, state, h_BTD, frames_B, max_length, blank: as in `transducer_greedy`.
    width: k.
    max_symbols: the most labels that a text gets in a frame.

  Returns:
    At most k texts each, [B, k, U], all different.

  Raises:
    ValueError: fewer than one beam, or label a frame or a text; or a blank that is none of V.

  Reference: Saon, Tueske and Audhkhasi, Alignment-length synchronous decoding for RNN transducer,
  ICASSP 2020 (time-synchronous decoding).
  Differs: there the texts that are through compete among themselves alone, so that with one beam
  the search need not follow the likeliest symbol.

  Example:
    >>> @jax.jit
    ... def transcribe(variables, waves_BS, wave_lengths_B):
    ...   of = functools.partial(model.apply, variables)
    ...   h_BTD, frames_B = of(waves_BS, wave_lengths_B, method="encode")
    ...   predict, join = (functools.partial(of, method=name) for name in ("predict", "join"))
    ...   state = of(len(waves_BS), method="init_predictor")
    ...   e_BTJ = of(h_BTD, method="project")
    ...   options = dict(width=4, max_symbols=3, max_length=100)
    ...   return transducer_beam_search(predict, join, state, e_BTJ, frames_B, **options)
  """
  _check(width, max_symbols, max_length)
  batch, length = h_BTD.shape[:2]
  log_p = functools.partial(_log_p, join, blank)
  g, state = predict(state, jnp.full((batch,), blank, jnp.int32))
  rows = lambda tree: jax.tree.map(lambda x_B: jnp.repeat(x_B, width, axis=0), tree)
  dtype = jax.eval_shape(log_p, h_BTD[:, 0], g).dtype
  scores_BW = jnp.full((batch, width), -jnp.inf, dtype).at[:, 0].set(0)
  texts = jax.tree.map(
    lambda x_W: jnp.broadcast_to(x_W, (batch, *x_W.shape)), Texts.empty(width, max_length)
  )
  live_BW = jnp.zeros((batch, width), bool)
  beams = _Beams(texts, live_BW, scores_BW)
  choose = jax.vmap(functools.partial(_choose, blank=blank), (0, 0, None))

  def round_(h_ND, carry):
    said, beams, g, state = carry
    log_p_BWV = log_p(h_ND, g).reshape(batch, width, -1)
    beams, from_BW, ids_BW, says_BW = choose(beams, log_p_BWV, said < max_symbols)
    from_N = (from_BW + jnp.arange(batch)[:, None] * width).reshape(-1)
    g, state = jax.tree.map(lambda x_N: x_N[from_N], (g, state))
    told = predict(state, ids_BW.reshape(-1))
    return said + 1, beams, *_where(says_BW.reshape(-1), told, (g, state))

  def step(carry, frame):
    beams, g, state = carry
    t, h_BD = frame
    has_frame_B1 = (t < frames_B)[:, None]
    beams = beams._replace(live_BW=has_frame_B1 & (beams.scores_BW > -jnp.inf))
    goes_on = lambda carry: jnp.any(carry[1].live_BW)
    _, *carry = jax.lax.while_loop(
      goes_on, functools.partial(round_, rows(h_BD)), (jnp.int32(0), beams, g, state)
    )
    return tuple(carry), None

  frames = (jnp.arange(length), jnp.moveaxis(h_BTD, 1, 0))
  (beams, *_), _ = jax.lax.scan(step, (beams, *rows((g, state))), frames)
  return jax.vmap(Texts.transcripts)(beams.texts, beams.scores_BW)


class _Beams(NamedTuple):
  """The search of a batch, or of one utterance, without the B.

  Attributes:
    texts: W texts.
    live_BW: whether they are not yet through with the frame.
    scores_BW: logarithms of the sums of their alignments, -inf where there are fewer.
  """

  texts: Texts
  live_BW: jax.Array
  scores_BW: jax.Array


def _choose(beams: _Beams, log_p_WV: jax.Array, may_say: jax.Array, *, blank: int):
  """A round of one utterance: (beams, the rows they come from, their symbols, whether labels).

  In each row of the candidates [W, V] the column of the blank is the row's text, through with the
  frame; any other is the text with one more label.
  """
  texts, live_W, scores_W = beams
  width, vocab_size = log_p_WV.shape
  is_blank_1V = jnp.arange(vocab_size)[None] == blank
  may_say_W = live_W & may_say & (texts.lengths_W < texts.tokens_WU.shape[1])
  log_p_WV = jnp.where(live_W[:, None], log_p_WV, 0)
  log_p_WV = jnp.where(is_blank_1V | may_say_W[:, None], log_p_WV, -jnp.inf)
  total_WV = scores_W[:, None] + log_p_WV

  # A text that is through and the same one that goes on: the earlier row holds the sum.
  is_there_W = scores_W > -jnp.inf
  twins_WW = texts.equals(texts) & ~jnp.eye(width, dtype=bool)
  twins_WW &= is_there_W[:, None] & is_there_W[None]
  twin_W, has_twin_W = jnp.argmax(twins_WW, axis=1), jnp.any(twins_WW, axis=1)
  through_W = total_WV[:, blank]
  sum_W = jnp.logaddexp(through_W, jnp.where(has_twin_W, through_W[twin_W], -jnp.inf))
  sum_W = jnp.where(has_twin_W & (twin_W < jnp.arange(width)), -jnp.inf, sum_W)
  total_WV = jnp.where(is_blank_1V, sum_W[:, None], total_WV)

  scores_W, index_W = jax.lax.top_k(total_WV.reshape(-1), width)
  from_W, ids_W = index_W // vocab_size, (index_W % vocab_size).astype(jnp.int32)
  says_W = (ids_W != blank) & (scores_W > -jnp.inf)
  return _Beams(texts.take(from_W).said(ids_W, says_W), says_W, scores_W), from_W, ids_W, says_W


def _log_p(join: Join, blank: int, h_ND: jax.Array, g) -> jax.Array:
  logits_NV = join(h_ND, g)
  check_blank(blank, logits_NV.shape[1])
  return jax.nn.log_softmax(logits_NV.astype(jnp.promote_types(logits_NV.dtype, jnp.float32)))


def _where(is_N: jax.Array, new, old):
  """Rows of `new` where it is so, else of `old`: of all arrays of a tree."""
  choose = lambda a, b: jnp.where(is_N.reshape(-1, *(1,) * (a.ndim - 1)), a, b)
  return jax.tree.map(choose, new, old)


def _check(width: int, max_symbols: int, max_length: int) -> None:
  if min(width, max_symbols, max_length) < 1:
    raise ValueError(f"{width=}, {max_symbols=} and {max_length=} must be at least 1")
