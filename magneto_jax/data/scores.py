"""Corpus scores: of translations by sacreBLEU, of what was heard by jiwer, of images and texts."""

import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np


def _metrics(lowercase: bool) -> dict[str, Any]:
  """By name, as WMT computes them: tokens of 13a, exponential smoothing."""
  from sacrebleu import metrics  # Few runs read it.

  return {
    "bleu": metrics.BLEU(lowercase=lowercase),
    "chrf": metrics.CHRF(lowercase=lowercase),
  }


def corpus_scores(
  translations: Sequence[str],
  references: Sequence[str] | Sequence[Sequence[str]],
  *,
  lowercase: bool = False,
) -> dict[str, float]:
  """BLEU and chrF, in percent, of a corpus of raw texts.

  Args:
    translations: or captions.
    references: one each, or several each, of which some may have more than others.
    lowercase: whether case is not to count; in WMT it does.

  Raises:
    ValueError: if there are none, or not as many of both.

  Reference: A Call for Clarity in Reporting BLEU Scores, arXiv 1804.08771; chrF: character n-gram
  F-score for automatic MT evaluation, doi 10.18653/v1/W15-3049.
  """
  if not translations or len(translations) != len(references):
    raise ValueError(f"{len(translations)} translations of {len(references)} references")
  each = [[held] if isinstance(held, str) else held for held in references]
  # One list of every text's first, one of every text's second, ...
  streams = [list(stream) for stream in itertools.zip_longest(*each)]
  return {
    name: metric.corpus_score(list(translations), streams).score
    for name, metric in _metrics(lowercase).items()
  }


def signatures(*, lowercase: bool = False, several: bool = False) -> dict[str, str]:
  """How each of `corpus_scores` is computed: what is to be quoted with it.

  Args:
    lowercase: as there.
    several: whether texts may have several references.
  """
  signed = {}
  for name, metric in _metrics(lowercase).items():
    # Only what has scored knows how many references there are.
    metric.corpus_score(["a", "b"], [["a", "b"], ["a", None]] if several else [["a", "b"]])
    signed[name] = str(metric.get_signature())
  return signed


def word_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> float:
  """100 * (substitutions + deletions + insertions) / words of the references, of a whole corpus.

  Words stand between white space; letters count as they are, so lower both where case is not to be
  judged. More than 100 where more is inserted than there is.

  Raises:
    ValueError: if there are none, not as many of both, or a reference has no words.
  """
  import jiwer  # Few runs read it.

  return 100 * jiwer.wer(*_compared(hypotheses, references))


def character_error_rate(hypotheses: Sequence[str], references: Sequence[str]) -> float:
  """The same of characters, among them the spaces between words, of which several count as one.

  Raises:
    ValueError: see `word_error_rate`.
  """
  import jiwer

  return 100 * jiwer.cer(*_compared(hypotheses, references))


def _compared(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[list[str], list[str]]:
  """References and hypotheses, each with one space between words, and none at its ends."""
  if not references or len(hypotheses) != len(references):
    raise ValueError(f"{len(hypotheses)} hypotheses of {len(references)} references")
  spaced = [[" ".join(text.split()) for text in texts] for texts in (references, hypotheses)]
  if "" in spaced[0]:
    raise ValueError(f"reference {spaced[0].index('')} has no words")
  return spaced[0], spaced[1]


def words_of(text: str) -> frozenset[str]:
  """The different words of a text: runs of letters and digits, in small letters (casefold, NFC)."""
  return frozenset(re.findall(r"\w+", unicodedata.normalize("NFC", text).casefold()))


def keyword_f1(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
  """How many words of captions are those of their images' references, in percent.

    F1 = mean over images of max over references of 2 |c & r| / (|c| + |r|),

  c and r being the sets of words (`words_of`) of a caption and of a reference, such as an emoji's
  name and keywords in a language: order and repetition do not count. A caption without words has 0.

  Args:
    captions: one each image.
    references: of each image at least one, with a word.

  Raises:
    ValueError: if there are no captions, not as many of both, or references without words.
  """
  if not captions or len(captions) != len(references):
    raise ValueError(f"{len(captions)} captions of {len(references)} images")
  found = []
  for image, (caption, texts) in enumerate(zip(captions, references, strict=True)):
    words, sets = words_of(caption), [words_of(text) for text in texts]
    if not sets or not all(sets):
      raise ValueError(f"image {image} has a reference without words, or none")
    found.append(max(2 * len(words & own) / (len(words) + len(own)) for own in sets))
  return 100 * float(np.mean(found))


def retrieval_recalls(
  similarities_IT: np.ndarray, image_of_T: np.ndarray, ranks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
  """Recall at k of retrieval both ways, in percent; images may have several texts.

  A query finds at k if one of what belongs to it is among the k likest: an image one of its texts,
  a text its image. Of equal similarities those of others come first, so that a model to which all
  are alike finds nothing; one that is not a number is below all others.

  Args:
    similarities_IT: of every image and text.
    image_of_T: int [T], the image of each text; every image has one.
    ranks: k.

  Returns:
    {"text_recall_at_1", ...}: images that find a text; {"image_recall_at_1", ...}: texts that find
    their image.

  Raises:
    ValueError: shapes do not fit, or an image has no text.

  Reference: as VSE++ has them, arXiv 1707.05612, section 4; ties are not spoken of there.
  """
  images, texts = similarities_IT.shape
  image_of_T = np.asarray(image_of_T)
  if image_of_T.shape != (texts,) or {*image_of_T.tolist()} != {*range(images)}:
    raise ValueError(
      f"{image_of_T.shape=} must name one of {images} images for each of {texts} texts, and every"
      " image once at least"
    )
  likeness_IT = np.where(np.isnan(similarities_IT), -np.inf, similarities_IT)
  own_IT = image_of_T == np.arange(images)[:, None]
  # How many of others are at least as like as the likest of its own.
  best_I1 = np.where(own_IT, likeness_IT, -np.inf).max(axis=1, keepdims=True)
  before_I = (~own_IT & (likeness_IT >= best_I1)).sum(axis=1)
  own_T = likeness_IT[image_of_T, np.arange(texts)]
  before_T = (~own_IT & (likeness_IT >= own_T)).sum(axis=0)
  found = {"text": before_I, "image": before_T}
  return {
    f"{what}_recall_at_{k}": 100 * float(np.mean(before < k))
    for what, before in found.items()
    for k in ranks
  }
