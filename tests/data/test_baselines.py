"""Baselines against literal counts and a real compressor."""

import collections
import lzma
import math

import pytest

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
