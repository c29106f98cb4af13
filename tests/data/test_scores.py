"""Corpus scores against their definitions."""

import collections
import math
import random

import pytest

from magneto_jax.data import scores


def ngrams(items, n):
  return collections.Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def bleu(translations, references):
  """arXiv 1804.08771, of texts that are tokens with spaces between, with a match of each length."""
  hits, all_ = [0] * 4, [0] * 4
  for translation, reference in zip(translations, references, strict=True):
    for n in range(1, 5):
      ours, theirs = ngrams(translation.split(), n), ngrams(reference.split(), n)
      hits[n - 1] += sum((ours & theirs).values())
      all_[n - 1] += sum(ours.values())
  lengths = [sum(len(text.split()) for text in texts) for texts in (translations, references)]
  brevity = min(0.0, 1 - lengths[1] / lengths[0])
  return 100 * math.exp(brevity + sum(math.log(h / a) for h, a in zip(hits, all_, strict=True)) / 4)


def chrf(translations, references):
  """F_2 of the mean precision and recall of characters' n-grams up to six, without spaces."""
  precision = recall = 0.0
  for n in range(1, 7):
    both = [0, 0, 0]
    for translation, reference in zip(translations, references, strict=True):
      ours, theirs = (ngrams(text.replace(" ", ""), n) for text in (translation, reference))
      counts = (ours & theirs, ours, theirs)
      both = [a + sum(b.values()) for a, b in zip(both, counts, strict=True)]
    precision += both[0] / both[1] / 6
    recall += both[0] / both[2] / 6
  return 100 * 5 * precision * recall / (4 * precision + recall)


TRANSLATIONS = ["Der Hund sitzt heute auf der alten Bank", "Das ist ein kleines rotes Haus"]
REFERENCES = ["Der Hund sitzt heute auf der neuen Bank", "Dies ist ein kleines rotes Haus am See"]


def test_scores_are_their_definitions():
  found = scores.corpus_scores(TRANSLATIONS, REFERENCES)
  assert found == {
    "bleu": pytest.approx(bleu(TRANSLATIONS, REFERENCES), rel=1e-9),
    "chrf": pytest.approx(chrf(TRANSLATIONS, REFERENCES), rel=1e-9),
  }
  assert (
    20
    < found["bleu"]
    < 80
    < 100
    == pytest.approx(scores.corpus_scores(REFERENCES, REFERENCES)["bleu"])
  )


def test_signatures_say_how():
  found = scores.signatures()
  assert found.keys() == scores.corpus_scores(TRANSLATIONS, REFERENCES).keys()
  assert "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:" in found["bleu"]
  assert "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:" in found["chrf"]


@pytest.mark.parametrize("translations", [[], ["a"]])
def test_other_numbers_of_texts_are_refused(translations):
  with pytest.raises(ValueError, match=f"{len(translations)} translations of 0 references"):
    scores.corpus_scores(translations, [])


# ---------------------------------------------------------------------------------------------
# Error rates
# ---------------------------------------------------------------------------------------------


def edits(ours, theirs):
  """Levenshtein's distance, row by row."""
  row = list(range(len(theirs) + 1))
  for i, mine in enumerate(ours, 1):
    last, row[0] = row[0], i
    for j, other in enumerate(theirs, 1):
      last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (mine != other))
  return row[-1]


def test_an_error_rate_is_of_the_whole_corpus():
  """Not a mean over utterances, which would be 41.67."""
  references, hypotheses = ["the cat sat", "a b"], ["the cat sat down", "a"]
  assert scores.word_error_rate(hypotheses, references) == pytest.approx(40.0, rel=1e-12)


def test_error_rates_are_edits_over_lengths():
  draw = random.Random(0)
  words = lambda least: " ".join(
    draw.choices(["a", "ab", "bac", "C", "é"], k=draw.randint(least, 7))
  )
  for _ in range(30):
    references, hypotheses = [words(1) for _ in range(4)], [words(0) for _ in range(4)]
    for rate, parts in (
      (scores.word_error_rate, str.split),
      (scores.character_error_rate, list),
    ):
      pairs = list(zip(map(parts, hypotheses), map(parts, references), strict=True))
      expected = 100 * sum(edits(*pair) for pair in pairs) / sum(len(theirs) for _, theirs in pairs)
      assert rate(hypotheses, references) == pytest.approx(expected, rel=1e-12)


def test_white_space_is_between_words_and_letters_are_as_they_are():
  assert scores.word_error_rate([" a\tb  c "], ["a b c"]) == 0
  assert scores.character_error_rate([" a\tb  c "], ["a b c"]) == 0
  assert scores.word_error_rate(["A b"], ["a b"]) == 50
  assert scores.word_error_rate(["a b c d"], ["a"]) == 300


@pytest.mark.parametrize("rate", (scores.word_error_rate, scores.character_error_rate))
def test_an_error_rate_of_nothing_is_refused(rate):
  for hypotheses, references, message in (
    ([], [], "0 hypotheses of 0 references"),
    (["a"], ["a", "b"], "1 hypotheses of 2 references"),
    (["a", "b"], ["a", " "], "reference 1 has no words"),
  ):
    with pytest.raises(ValueError, match=message):
      rate(hypotheses, references)
