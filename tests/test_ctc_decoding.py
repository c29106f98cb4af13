"""CTC's search against its rule written out, and against all texts there are."""

import functools
import itertools

import jax
import numpy as np
import pytest

from magneto_jax.decoding import ctc_beam_search, ctc_greedy
from tests import alignments


def tables(batch, length, vocab_size, seed=0):
  """Log-probabilities [B, T, V] in float32."""
  logits = np.random.default_rng(seed).normal(size=(batch, length, vocab_size)) * 1.5
  return alignments.log_softmax(logits).astype(np.float32)


def by_the_rule(log_p_TV, width, longest, blank=0):
  """{text: score}: the search as its docstring says it."""
  beams = {((), False): 0.0}
  for log_p_V in np.asarray(log_p_TV, np.float64):
    found = {}
    for (text, in_label), score in beams.items():
      for k, log_p in enumerate(log_p_V):
        says = k != blank and not (in_label and text[-1] == k)
        if says and len(text) == longest:
          continue
        key = ((*text, k) if says else text), k != blank
        found[key] = np.logaddexp(found.get(key, -np.inf), score + log_p)
    beams = dict(sorted(found.items(), key=lambda entry: -entry[1])[:width])
  return added(beams)


def added(beams):
  texts = {}
  for (text, _), score in beams.items():
    texts[text] = np.logaddexp(texts.get(text, -np.inf), score)
  return texts


def as_dict(found, b):
  """{text: score} of utterance b, the best first; every text once."""
  rows = zip(found.tokens_BWU[b], found.lengths_BW[b], found.scores_BW[b], strict=True)
  pairs = [(tuple(tokens[:n].tolist()), float(s)) for tokens, n, s in rows if s > -np.inf]
  assert len(dict(pairs)) == len(pairs)
  assert [s for _, s in pairs] == sorted((s for _, s in pairs), reverse=True)
  return dict(pairs)


def assert_same(found, expected, atol=1e-5):
  assert set(found) == set(expected)
  for text, score in expected.items():
    np.testing.assert_allclose(found[text], score, rtol=0, atol=atol)


@pytest.mark.parametrize("blank", (0, 2))
def test_with_beams_for_all_texts_scores_are_sums_over_all_alignments(blank):
  """And utterances of other lengths in the batch do not matter."""
  log_p, frames = tables(3, 4, 3), np.array([4, 2, 3], np.int32)
  found = ctc_beam_search(log_p, frames, width=80, blank=blank)
  for b, length in enumerate(frames):
    expected = {
      text: np.logaddexp.reduce([total for total, _ in ways])
      for text, ways in alignments.ctc_texts(log_p[b, :length], blank).items()
    }
    assert_same(as_dict(found, b), expected)


@pytest.mark.parametrize("width, longest", [(2, 9), (3, 9), (8, 9), (8, 2), (1, 2)])
def test_the_search_is_its_rule(width, longest):
  log_p, frames = tables(20, 9, 4, seed=1), np.full((20,), 9, np.int32)
  found = ctc_beam_search(log_p, frames, width=width, max_length=longest)
  assert found.tokens_BWU.shape == (20, width, longest)
  for b in range(20):
    assert_same(as_dict(found, b), by_the_rule(log_p[b], width, longest), atol=1e-4)


@pytest.mark.parametrize("longest", (None, 1, 3))
def test_one_beam_is_greedy_which_is_the_best_of_each_frame(longest):
  """Many utterances of several lengths, also where symbols tie; texts and scores.

  Once a text is full, the best that does not extend it.
  """
  log_p = tables(60, 12, 4, seed=2)
  log_p[:20] = np.round(log_p[:20])
  frames = np.arange(60, dtype=np.int32) % 13
  beam = ctc_beam_search(log_p, frames, width=1, max_length=longest)
  greedy = ctc_greedy(log_p, frames, max_length=longest)
  assert greedy.tokens_BWU.shape == (60, 1, longest or 12)
  np.testing.assert_array_equal(beam.tokens_BWU, greedy.tokens_BWU)
  np.testing.assert_array_equal(beam.lengths_BW, greedy.lengths_BW)
  np.testing.assert_allclose(beam.scores_BW, greedy.scores_BW, rtol=1e-5)
  for b, length in enumerate(frames):
    best = log_p[b, :length].argmax(-1).tolist()
    if longest and len(alignments.collapsed(best)) > longest:
      expected = by_the_rule(log_p[b, :length], 1, longest)
    else:
      score = sum(log_p[b, t, k] for t, k in enumerate(best))
      expected = {alignments.collapsed(best): score}
    assert_same(as_dict(greedy, b), expected)


def test_behind_the_texts_nothing_is_written():
  """A silent utterance has the empty text, and fewer texts than beams have no score."""
  log_p = np.log(np.array([[[1.0, 0.0], [1.0, 0.0]]], np.float32) + np.float32(1e-30))
  found = ctc_beam_search(log_p, np.array([0]), width=3)
  assert not found.tokens_BWU.any() and not found.lengths_BW.any()
  np.testing.assert_array_equal(found.scores_BW, [[0, -np.inf, -np.inf]])
  assert not ctc_greedy(log_p, np.array([2])).tokens_BWU.any()


def test_more_beams_find_texts_that_are_more_probable():
  """Not each time, but in sum; and none more probable than it is."""
  log_p, frames = tables(30, 5, 3, seed=3), np.full((30,), 5, np.int32)
  best = [
    np.asarray(ctc_beam_search(log_p, frames, width=width).scores_BW[:, 0]) for width in (1, 4, 60)
  ]
  assert best[0].sum() < best[1].sum() <= best[2].sum() + 1e-4
  for narrow, b in itertools.product(best[:2], range(30)):
    assert narrow[b] <= best[2][b] + 1e-5


def test_sizes_below_one_and_blanks_of_no_vocabulary_are_refused():
  log_p = tables(1, 2, 2)
  with jax.disable_jit(), pytest.raises(ValueError, match="width=0 must be at least 1"):
    ctc_beam_search(log_p, np.array([2]), width=0)
  for search in (ctc_greedy, functools.partial(ctc_beam_search, width=1)):
    with pytest.raises(ValueError, match="max_length=0 must be at least 1"):
      search(log_p, np.array([2]), max_length=0)
    with pytest.raises(ValueError, match="blank=2 must be one of the 2 ids 0 .. 1"):
      search(log_p, np.array([2]), blank=2)
