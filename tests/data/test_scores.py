"""Corpus scores against their definitions."""

import collections
import math
import random

import numpy as np
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


def test_a_text_may_have_several_references():
  """Of which the best counts; of texts with one each it is what a plain list of them gives."""
  texts = ["the cat sat on the mat", "a dog is in the house"]
  first = ["a bird flew over it", "a dog was at home"]
  alone = scores.corpus_scores(texts, first)
  assert scores.corpus_scores(texts, [[reference] for reference in first]) == alone
  several = scores.corpus_scores(texts, [[first[0], texts[0], "no"], first[1:]])
  best = scores.corpus_scores(texts, [texts[0], first[1]])
  assert several["chrf"] == pytest.approx(best["chrf"]) and several["chrf"] > alone["chrf"] + 20
  signed = scores.signatures(several=True)
  assert all("nrefs:var" in text for text in signed.values()) and signed.keys() == best.keys()


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


# ---------------------------------------------------------------------------------------------
# Images and texts
# ---------------------------------------------------------------------------------------------


def test_the_words_of_a_caption_are_held_against_the_best_reference():
  """By hand: 2 of 2 + 3 words in common; 2 of 2 + 2; none; 1 of 1 + 3, the other reference less."""
  captions = ["Grinning FACE", "roter Apfel!", "", "hund"]
  references = [["face, grin, grinning"], ["red apple fruit", "apfel roter roter"], ["a b"]]
  references += [["ein Hund bellt", "a dog barks loud"]]
  found = scores.keyword_f1(captions, references)
  assert found == pytest.approx(25 * (4 / 5 + 1 + 0 + 2 / 4))
  assert scores.words_of("O’Clock: cafe\u0301, CAFÉ 12-hour") == {
    "o",
    "clock",
    "café",
    "12",
    "hour",
  }


def test_keywords_are_counted_as_by_hand():
  """F1 of precision and recall of words, on random captions of a few words."""
  draw = random.Random(0)
  sentence = lambda: " ".join(draw.choices("abcdefg", k=draw.randint(1, 6)))
  captions = [sentence() for _ in range(50)]
  references = [[sentence() for _ in range(draw.randint(1, 3))] for _ in captions]
  total = 0.0
  for caption, texts in zip(captions, references, strict=True):
    best = 0.0
    for text in texts:
      common = len({*caption.split()} & {*text.split()})
      if common:
        precision, recall = common / len({*caption.split()}), common / len({*text.split()})
        best = max(best, 2 * precision * recall / (precision + recall))
    total += best
  assert scores.keyword_f1(captions, references) == pytest.approx(100 * total / 50)
  for wrong in ((["a"], []), ([], []), (["a"], [[]]), (["a"], [["b", "!"]])):
    with pytest.raises(ValueError, match="captions of|has a reference without words"):
      scores.keyword_f1(*wrong)


@pytest.mark.parametrize("values", (1000, 3))
def test_recalls_of_retrieval_are_those_of_ranked_lists(values):
  """With several texts an image, and with many equal similarities, of which others come first."""
  rng = np.random.default_rng(values)
  images, texts = 12, 30
  owner = np.concatenate([np.arange(images), rng.integers(images, size=texts - images)])
  rng.shuffle(owner)
  likeness = rng.integers(values, size=(images, texts)).astype(np.float32)
  expected = {}
  for k in (1, 5, 10):
    by_image = [
      sorted(range(texts), key=lambda t: (-likeness[i, t], owner[t] == i)) for i in range(images)
    ]
    by_text = [
      sorted(range(images), key=lambda i: (-likeness[i, t], owner[t] == i)) for t in range(texts)
    ]
    hits = [any(owner[t] == i for t in found[:k]) for i, found in enumerate(by_image)]
    expected[f"text_recall_at_{k}"] = 100 * sum(hits) / images
    hits = [owner[t] in found[:k] for t, found in enumerate(by_text)]
    expected[f"image_recall_at_{k}"] = 100 * sum(hits) / texts
  assert scores.retrieval_recalls(likeness, owner) == pytest.approx(expected)
  assert 0 < expected["image_recall_at_5"] < 100


def test_a_model_to_which_all_are_alike_finds_nothing():
  owner = np.arange(20)
  for alike in (np.zeros((20, 20)), np.full((20, 20), np.nan)):
    assert {*scores.retrieval_recalls(alike, owner).values()} == {0.0}
  one = np.eye(20)
  assert {*scores.retrieval_recalls(one, owner).values()} == {100.0}
  one[3, 3] = np.nan
  assert scores.retrieval_recalls(one, owner, (1,)) == {
    "text_recall_at_1": 95.0,
    "image_recall_at_1": 95.0,
  }
  for wrong in (np.arange(19), np.zeros(20, int), np.arange(1, 21)):
    with pytest.raises(ValueError, match="must name one of 20 images for each of 20 texts"):
      scores.retrieval_recalls(one, wrong)
