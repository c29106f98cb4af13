"""The transducer's search against its rule written out, and against all texts there are."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.decoding import transducer_beam_search, transducer_greedy
from tests import alignments
from tests.test_ctc_decoding import as_dict, assert_same

B, T, D, ROWS = 3, 3, 4, 101
FRAMES = np.array([3, 1, 2], np.int32)


class Model:
  """Logits by the frame and by all labels so far, which the state is a number of."""

  def __init__(self, vocab_size, blank=0, seed=0, batch=B, length=T):
    rng = np.random.default_rng(seed)
    self.vocab_size, self.blank = vocab_size, blank
    self.h_BTD = rng.normal(size=(batch, length, D)).astype(np.float32)
    self.table = rng.normal(size=(ROWS, D)).astype(np.float32)
    self.kernel = (rng.normal(size=(D, vocab_size)) * 2).astype(np.float32)

  def predict(self, state, labels_N):
    number_N1, told_N = state
    number_N1 = (number_N1 * 7 + labels_N[:, None] + 1) % ROWS
    return {"g": jnp.asarray(self.table)[number_N1[:, 0]]}, (number_N1, told_N + 1)

  def join(self, h_ND, g):
    return jnp.tanh(h_ND + g["g"]) @ self.kernel

  def log_p(self, b, t, text):
    """Of the next symbol, by numpy."""
    number = 0
    for label in (self.blank, *text):
      number = (number * 7 + label + 1) % ROWS
    return alignments.log_softmax(np.tanh(self.h_BTD[b, t] + self.table[number]) @ self.kernel)

  def search(self, function, frames_B, **options):
    batch = len(self.h_BTD)
    state = jnp.zeros((batch, 1), jnp.int32), jnp.zeros((batch,), jnp.int32)
    call = functools.partial(function, self.predict, self.join, blank=self.blank, **options)
    return jax.jit(call)(state, self.h_BTD, frames_B)

  def likelihood(self, b, length, text):
    """log P of a text, the sum over all its alignments."""
    prefixes = [text[:u] for u in range(len(text) + 1)]
    lattice = [[self.log_p(b, t, prefix) for prefix in prefixes] for t in range(length)]
    return -alignments.transducer(np.array(lattice), text, self.blank)[0]


def by_the_rule(model, b, length, width, max_symbols, longest):
  """{text: score}: the search as its docstring says it."""
  beams = {(): 0.0}
  for t in range(length):
    live, through = beams, {}
    for said in itertools.count():
      found = {(text, True): score for text, score in through.items()}
      for text, score in live.items():
        for k, log_p in enumerate(model.log_p(b, t, text)):
          key = (text, True) if k == model.blank else ((*text, k), False)
          if k == model.blank or (said < max_symbols and len(text) < longest):
            found[key] = np.logaddexp(found.get(key, -np.inf), score + log_p)
      best = sorted(found.items(), key=lambda entry: -entry[1])[:width]
      through = {text: score for (text, is_through), score in best if is_through}
      live = {text: score for (text, is_through), score in best if not is_through}
      if not live:
        break
    beams = through
  return beams


def greedily(model, b, length, max_symbols, longest):
  text, score = (), 0.0
  for t in range(length):
    for said in itertools.count():
      log_p = model.log_p(b, t, text)
      moves = said == max_symbols or len(text) == longest or log_p.argmax() == model.blank
      k = model.blank if moves else int(log_p.argmax())
      score += log_p[k]
      if moves:
        break
      text = (*text, k)
  return {text: score}


@pytest.mark.parametrize("blank", (0, 1))
def test_with_beams_for_all_texts_scores_are_the_model_s_own(blank):
  """Of every text of at most two labels, and so of its alignments with at most two a frame."""
  model = Model(3, blank)
  options = dict(width=16, max_symbols=2, max_length=2)
  found = model.search(transducer_beam_search, FRAMES, **options)
  labels = [k for k in range(3) if k != blank]
  texts = [text for n in range(3) for text in itertools.product(labels, repeat=n)]
  for b, length in enumerate(FRAMES):
    expected = {text: model.likelihood(b, length, text) for text in texts}
    assert_same(as_dict(found, b), expected)


@pytest.mark.parametrize(
  "width, max_symbols, longest", [(2, 3, 9), (3, 1, 9), (5, 2, 3), (6, 3, 9)]
)
def test_the_search_is_its_rule(width, max_symbols, longest):
  model = Model(4, batch=12, length=5, seed=1)
  frames = np.arange(12, dtype=np.int32) % 6
  options = dict(max_symbols=max_symbols, max_length=longest)
  found = model.search(transducer_beam_search, frames, width=width, **options)
  assert found.tokens_BWU.shape == (12, width, longest)
  for b, length in enumerate(frames):
    expected = by_the_rule(model, b, length, width, max_symbols, longest)
    assert_same(as_dict(found, b), expected, atol=1e-4)


@pytest.mark.parametrize("max_symbols, longest", [(1, 9), (3, 20), (3, 4)])
def test_one_beam_is_greedy_which_is_the_likeliest_symbol_each_time(max_symbols, longest):
  model = Model(4, batch=16, length=6, seed=2)
  frames = np.arange(16, dtype=np.int32) % 7
  options = dict(max_symbols=max_symbols, max_length=longest)
  beam = model.search(transducer_beam_search, frames, width=1, **options)
  greedy = model.search(transducer_greedy, frames, **options)
  np.testing.assert_array_equal(beam.tokens_BWU, greedy.tokens_BWU)
  np.testing.assert_array_equal(beam.lengths_BW, greedy.lengths_BW)
  np.testing.assert_allclose(beam.scores_BW, greedy.scores_BW, rtol=1e-5, atol=1e-6)
  for b, length in enumerate(frames):
    expected = greedily(model, b, length, max_symbols, longest)
    assert_same(as_dict(greedy, b), expected, atol=1e-4)
  assert greedy.lengths_BW.max() > min(longest, 3) - 1


def test_ties_go_to_the_smaller_id():
  """Of equal logits: the blank, in both searches."""
  model = Model(3)
  model.kernel[:] = 0
  options = dict(max_symbols=2, max_length=3)
  for found in (
    model.search(transducer_greedy, FRAMES, **options),
    model.search(transducer_beam_search, FRAMES, width=1, **options),
  ):
    assert not found.lengths_BW.any()
    np.testing.assert_allclose(found.scores_BW[:, 0], -FRAMES * np.log(3), rtol=1e-6)


def test_sizes_below_one_and_blanks_of_no_vocabulary_are_refused():
  model = Model(3)
  with pytest.raises(ValueError, match="max_symbols=0 and max_length=2 must be at least 1"):
    model.search(transducer_greedy, FRAMES, max_symbols=0, max_length=2)
  with pytest.raises(ValueError, match="width=0"):
    model.search(transducer_beam_search, FRAMES, width=0, max_symbols=1, max_length=2)
  other = Model(3, blank=3)
  for search, options in ((transducer_greedy, {}), (transducer_beam_search, {"width": 2})):
    with pytest.raises(ValueError, match="blank=3 must be one of the 3 ids 0 .. 2"):
      other.search(search, FRAMES, max_symbols=1, max_length=2, **options)
