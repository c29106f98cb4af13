"""What needs no neural network: how well counts of words tell labelled texts apart.

  python -m benchmarks.text_baselines

prints, as JSON, the accuracies on the embedded lines (`labelled.embedded_lines`) of the commonest
class of training, of a draw among all classes, and of a logistic regression on counts of words
(scikit-learn's CountVectorizer and LogisticRegression with their defaults, up to 1000 iterations,
fitted to the training lines alone).
"""

import json
from collections.abc import Sequence

import numpy as np

from magneto_jax.data import labelled


def accuracies(train: Sequence[labelled.Row], test: Sequence[labelled.Row]) -> dict[str, float]:
  """Of labelled single texts: accuracy on `test` by model."""
  from sklearn.feature_extraction.text import CountVectorizer
  from sklearn.linear_model import LogisticRegression

  (train_texts, train_labels), (texts, labels) = (
    ([row.texts[0] for row in rows], np.array([row.label for row in rows]))
    for rows in (train, test)
  )
  classes, counts = np.unique(train_labels, return_counts=True)
  words = CountVectorizer()
  model = LogisticRegression(max_iter=1000).fit(words.fit_transform(train_texts), train_labels)
  return {
    "majority_class": float(np.mean(labels == classes[counts.argmax()])),
    "chance": 1 / len(classes),
    "bag_of_words": float(model.score(words.transform(texts), labels)),
  }


def embedded(split: str = "validation") -> dict[str, float]:
  """Of the embedded lines."""
  return accuracies(labelled.embedded_lines("train"), labelled.embedded_lines(split))


if __name__ == "__main__":
  found = {split: embedded(split) for split in ("validation", "test")}
  print(json.dumps(found, indent=2))
