"""Corpus scores against their definitions."""

import collections
import math

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
