"""Baselines against literal counts and a real compressor."""

import collections
import lzma
import math

import numpy as np
import pytest

from magneto_jax.data import baselines, scores
from magneto_jax.data.baselines import bits_per_byte
from magneto_jax.data.sources import load_documents


def test_baselines_are_their_definitions():
  train, validation = ["abab", "ba\u00e9"], ["abba", "b"]
  x, y = "abab\n\nba\u00e9".encode(), b"abba\n\nb"
  single, pairs = collections.Counter(x), collections.Counter(zip(x, x[1:], strict=False))
  firsts = collections.Counter(x[:-1])
  got = bits_per_byte(train, validation)
  unigram = -sum(math.log2((1 + single[b]) / (256 + len(x))) for b in y) / len(y)
  bigram = [
    -math.log2((1 + pairs[a, b]) / (256 + firsts[a])) for a, b in zip(y, y[1:], strict=False)
  ]
  assert got["unigram"] == pytest.approx(unigram, rel=1e-12)
  assert got["bigram"] == pytest.approx(sum(bigram) / len(bigram), rel=1e-12)
  options = dict(preset=9 | lzma.PRESET_EXTREME)
  size = lambda text: 8 * len(lzma.compress(text, **options))
  assert got["xz"] == (size(x + y) - size(x)) / len(y)


def test_too_little_text_has_no_baselines():
  assert bits_per_byte(["abc"], ["a"]) == {}


def test_baselines_of_the_embedded_text():
  got = bits_per_byte(*load_documents("embedded"))
  assert {name: round(value, 2) for name, value in got.items()} == {
    "unigram": 4.88,
    "bigram": 3.69,
    "xz": 2.65,
  }


TEXTS = ("a red heart", "red", "the sun, hot", "a moon", "red")
KEYWORDS = (("red heart love", "rot Herz"), ("red circle",), ("sun", "hot sun sky"), ("moon sky",))


def test_what_a_constant_caption_scores_is_what_the_scores_say():
  """Of each caption as that of every image, by the corpus scores themselves."""
  f1 = [scores.keyword_f1([text] * len(KEYWORDS), KEYWORDS) for text in TEXTS]
  np.testing.assert_allclose(baselines.keyword_f1_of_constants(TEXTS, KEYWORDS), f1)
  # Of texts with letters twice, shorter than the longest n-grams, and with nothing in common.
  captions = (*TEXTS, "aaaa", "x", "sun")
  chrf = [scores.corpus_scores([text] * len(TEXTS), TEXTS)["chrf"] for text in captions]
  np.testing.assert_allclose(baselines.chrf_of_constants(captions, TEXTS), chrf)
  assert min(chrf) == 0 and max(chrf) > 20


def test_constant_captions_are_the_best_of_training():
  found = baselines.constant_captions(TEXTS, KEYWORDS)
  f1 = lambda text: scores.keyword_f1([text] * len(KEYWORDS), KEYWORDS)
  assert found["commonest_caption"] == "red"
  assert f1(found["best_caption_by_keyword_f1"]) == max(map(f1, TEXTS))
  by_chrf = lambda text: scores.corpus_scores([text] * len(TEXTS), TEXTS)["chrf"]
  assert by_chrf(found["best_caption_by_chrf"]) == max(map(by_chrf, TEXTS))
  # In two images each; others in one.
  words = found["commonest_keywords"].split(", ")
  assert {*words[:2]} == {"red", "sky"} and f1(found["commonest_keywords"]) >= f1("red, sky")
