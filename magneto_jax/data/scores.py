"""Corpus scores: of translations by sacreBLEU, of what was heard by jiwer."""

from collections.abc import Sequence
from typing import Any


def _metrics(lowercase: bool) -> dict[str, Any]:
  """By name, as WMT computes them: tokens of 13a, exponential smoothing."""
  from sacrebleu import metrics  # Few runs read it.

  return {
    "bleu": metrics.BLEU(lowercase=lowercase),
    "chrf": metrics.CHRF(lowercase=lowercase),
  }


def corpus_scores(
  translations: Sequence[str], references: Sequence[str], *, lowercase: bool = False
) -> dict[str, float]:
  """BLEU and chrF, in percent, of a corpus of raw texts, one reference each.

  Case counts, as WMT has it, unless `lowercase`.

  Raises:
    ValueError: if there are none, or not as many of both.

  Reference: A Call for Clarity in Reporting BLEU Scores, arXiv 1804.08771; chrF: character n-gram
  F-score for automatic MT evaluation, doi 10.18653/v1/W15-3049.
  """
  if not translations or len(translations) != len(references):
    raise ValueError(f"{len(translations)} translations of {len(references)} references")
  return {
    name: metric.corpus_score(list(translations), [list(references)]).score
    for name, metric in _metrics(lowercase).items()
  }


def signatures(*, lowercase: bool = False) -> dict[str, str]:
  """How each of `corpus_scores` is computed: what is to be quoted with it."""
  signed = {}
  for name, metric in _metrics(lowercase).items():
    # Only what has scored knows how many references there are.
    metric.corpus_score(["a"], [["a"]])
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
