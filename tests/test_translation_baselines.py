"""IBM model 1 and the trivial translators, against plain loops."""

import collections
import math

import numpy as np
import pytest

from benchmarks import translation_baselines as baselines
from magneto_jax.data.tokenizers import ByteTokenizer

TOY = [("the house", "das Haus"), ("the book", "das Buch"), ("a book", "ein Buch")]


def model_1(pairs, iterations):
  """t[e, g] by the definition, word by word; e is None for the empty word."""
  t = {(e, g): 1.0 for source, target in pairs for e in (None, *source) for g in target}
  for _ in range(iterations):
    count, total = collections.Counter(), collections.Counter()
    for source, target in pairs:
      for g in target:
        norm = sum(t[e, g] for e in (None, *source))
        for e in (None, *source):
          count[e, g] += t[e, g] / norm
          total[e] += t[e, g] / norm
    t = {link: count[link] / total[link[0]] for link in t}
  return t


@pytest.mark.parametrize("iterations", (1, 4))
def test_model_1_is_its_definition(iterations):
  """On random sentences, some words twice in one; a source's words give probabilities."""
  rng = np.random.default_rng(0)
  side = lambda: rng.integers(1, 8, rng.integers(1, 6)).tolist()
  pairs = [(side(), side()) for _ in range(12)]
  learnt = baselines.Model1.learn(pairs, 9, iterations)
  found = {
    (e or None, g): chance
    for e, g, chance in zip(*(column.tolist() for column in learnt), strict=True)
  }
  assert found == pytest.approx(model_1(pairs, iterations), rel=1e-12)
  np.testing.assert_allclose(np.bincount(learnt.sources, learnt.chances), 1.0)


def test_the_dictionary_learns_which_word_is_which():
  assert baselines.dictionary(TOY) == {"the": "das", "house": "Haus", "book": "Buch", "a": "ein"}


def test_trivial_translators():
  """The commonest target; word for word, what is unknown left alone; and the source."""
  found = baselines.translations([*TOY, ("a house", "das Haus")], ["The book, a /path-1."])
  assert found == {
    "commonest": ["das Haus"],
    "dictionary": ["das Buch, ein /path-1."],
    "copy": ["The book, a /path-1."],
  }
  scores = baselines.scores(TOY, [("the house of the book", "das Haus das Buch das Haus")])
  assert scores["dictionary"]["chrf"] > scores["copy"]["chrf"]
  assert baselines.scores(TOY, [("x", "das Haus das Haus")])["copy"]["bleu"] == 0.0


def test_nats_are_of_the_likelihood():
  """By the definition, in bytes, ends included; zero is the empty word's alone."""
  tokenizer, held_out = ByteTokenizer(), ("the boat", "das Boot")
  ids = lambda words: [*tokenizer.encode(words).tolist(), tokenizer.eos_id]
  pairs = [tuple(map(ids, pair)) for pair in TOY]
  t = model_1(pairs, 10)
  seen = collections.Counter(g for _, target in pairs for g in target)
  u = lambda g: (1 + seen[g]) / (tokenizer.vocab_size + sum(seen.values()))
  source, target = map(ids, held_out)
  mixed = lambda g: (
    0.9 * sum(t.get((e, g), 0.0) for e in (None, *source)) / (1 + len(source)) + 0.1 * u(g)
  )
  expected = {
    "unigram": -sum(math.log(u(g)) for g in target) / len(target),
    "dictionary": -sum(math.log(mixed(g)) for g in target) / len(target),
  }
  found = baselines.nats_per_token(TOY, [held_out], tokenizer)
  assert found == pytest.approx(expected, rel=1e-6)  # float32
