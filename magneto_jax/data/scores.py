"""Corpus scores of translations, by sacreBLEU."""

from collections.abc import Sequence
from typing import Any


def _metrics() -> dict[str, Any]:
  """By name, as WMT computes them: tokens of 13a, case kept, exponential smoothing."""
  from sacrebleu import metrics  # Few runs read it.

  return {"bleu": metrics.BLEU(), "chrf": metrics.CHRF()}


def corpus_scores(translations: Sequence[str], references: Sequence[str]) -> dict[str, float]:
  """BLEU and chrF, in percent, of a corpus of raw texts, one reference each.

  Raises:
    ValueError: if there are none, or not as many of both.

  Reference: A Call for Clarity in Reporting BLEU Scores, arXiv 1804.08771; chrF: character n-gram
  F-score for automatic MT evaluation, doi 10.18653/v1/W15-3049.
  """
  if not translations or len(translations) != len(references):
    raise ValueError(f"{len(translations)} translations of {len(references)} references")
  return {
    name: metric.corpus_score(list(translations), [list(references)]).score
    for name, metric in _metrics().items()
  }


def signatures() -> dict[str, str]:
  """How each of `corpus_scores` is computed: what is to be quoted with it."""
  signed = {}
  for name, metric in _metrics().items():
    # Only what has scored knows how many references there are.
    metric.corpus_score(["a"], [["a"]])
    signed[name] = str(metric.get_signature())
  return signed
