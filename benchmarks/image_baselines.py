"""What needs no neural network: how well pixels alone tell labelled images apart.

  python -m benchmarks.image_baselines

prints, as JSON, the accuracies on the test parts of the embedded images (`images.embedded`) of the
commonest class of training, of a draw among all classes, and of a logistic regression on pixels
(scikit-learn's LogisticRegression, up to 2000 iterations, on pixels of mean 0 and variance 1 over
the training images, of which those that are always the same are left out). It is fitted to the
training images alone; its C is that of CS which does best on the validation part.
"""

import json

import numpy as np

from magneto_jax.data import images

CS = (1e-4, 1e-3, 1e-2, 1e-1)
NAMES = ("embedded/mnist5k", "embedded/emoji")


def accuracies(
  train: images.Images, validation: images.Images, test: images.Images
) -> dict[str, float]:
  """Of labelled images of one size: accuracy on `test` by model."""
  from sklearn.linear_model import LogisticRegression

  pixels, other, asked = map(_pixels, (train, validation, test))
  mean, deviation = pixels.mean(0), pixels.std(0)
  kept = deviation > 0
  pixels, other, asked = ((x - mean)[:, kept] / deviation[kept] for x in (pixels, other, asked))
  models = (LogisticRegression(C=c, max_iter=2000).fit(pixels, train.labels) for c in CS)
  model = max(models, key=lambda model: model.score(other, validation.labels))
  classes, counts = np.unique(train.labels, return_counts=True)
  return {
    "majority_class": float(np.mean(test.labels == classes[counts.argmax()])),
    "chance": 1 / len(classes),
    "logistic_regression": float(model.score(asked, test.labels)),
  }


def _pixels(part: images.Images) -> np.ndarray:
  """[images, numbers]; of grey images one channel."""
  pixels = np.stack([part[i]["image"] for i in range(len(part))]).astype(np.float64)
  is_grey = (pixels == pixels[..., :1]).all()
  return pixels[..., : 1 if is_grey else 3].reshape(len(pixels), -1)


def embedded(name: str) -> dict[str, float]:
  """Of the embedded images of a name, on their test part."""
  return accuracies(*(images.embedded(name, split) for split in ("train", "validation", "test")))


if __name__ == "__main__":
  print(json.dumps({name: embedded(name) for name in NAMES}, indent=2))
