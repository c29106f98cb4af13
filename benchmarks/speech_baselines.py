"""What needs no neural network: how well one text serves as the answer to every sound.

  python -m benchmarks.speech_baselines

prints, as JSON, of the embedded sounds' validation parts: of `embedded/en` the character error rate
(%) of the constant text that has the least, and of `embedded/fr-en` the chrF of that which has the
most. Constant texts are those of the training part, each once, with the empty one; the best is
chosen on the part that it is judged on, so that no other of them does better there.
"""

import json
from collections.abc import Callable, Sequence

from magneto_jax.data import scores, speech, speech_sources


def best_constant(
  texts: Sequence[str],
  references: Sequence[str],
  score: Callable[[Sequence[str], Sequence[str]], float],
  *,
  higher_is_better: bool,
) -> tuple[str, float]:
  """The text that scores best as the answer to everything, and its score; of equals the first."""
  found = {text: score([text] * len(references), references) for text in dict.fromkeys(texts)}
  best = (max if higher_is_better else min)(found, key=found.get)
  return best, found[best]


def embedded(name: str, *, text_case: str = "lower") -> dict[str, float]:
  """Of the embedded sounds of a name: the score of the best constant text."""
  train, validation = (
    [speech.plain(words, text_case) for words in speech_sources.embedded(name, split).texts]
    for split in ("train", "validation")
  )
  translated = "-" in name
  score = (
    (lambda found, references: scores.corpus_scores(found, references)["chrf"])
    if translated
    else scores.character_error_rate
  )
  _, value = best_constant(["", *train], validation, score, higher_is_better=translated)
  return {"constant": value}


if __name__ == "__main__":
  print(json.dumps({name: embedded(name) for name in ("embedded/en", "embedded/fr-en")}, indent=2))
