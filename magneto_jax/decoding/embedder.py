"""Features of images and of texts, by which one is found by the other, in few shapes."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from magneto_jax import sharding
from magneto_jax.data.captions import marked
from magneto_jax.data.text import plain
from magneto_jax.data.tokenizers import Tokenizer
from magneto_jax.decoding.translator import divisible
from magneto_jax.models.vision_language import RetrievalBEiT3


@dataclasses.dataclass(frozen=True)
class Embedder:
  """Makes vectors of length 1 of any number of images and texts, with a program for each kind.

  The product of two is their cosine. What a vector is does not depend on the others. One that is
  not finite is told as a FloatingPointError.

  Attributes:
    model: its variables are `variables`; tokenizer: of the texts.
    see: from an image, uint8 [H, W, 3] of any size, to what the model reads.
    longest: T, tokens of a text, its bos and eos among them.
    rows: how many are read together, or the next number that the mesh divides.

  Example:
    >>> embedder.images([pixels]) @ embedder.texts(["a red heart", "a cat"]).T
  """

  model: RetrievalBEiT3
  variables: Any
  tokenizer: Tokenizer
  see: Callable[[np.ndarray], np.ndarray]
  longest: int
  rows: int = 32

  def images(self, images: Iterable[np.ndarray]) -> np.ndarray:
    """[N, E], float32, of images that are read a part at a time."""
    parts = self._in_parts(map(self.see, images))
    return self._joined(
      np.asarray(_of_images(self.model, self.variables, np.stack(part)))[:count]
      for part, count in parts
    )

  def texts(
    self, texts: Sequence[str], places: Sequence[str] = (), *, cut: bool = False
  ) -> np.ndarray:
    """[N, E], float32, of texts.

    Args:
      texts: any number, in any spelling of those that were learned: they are made `plain`.
      places: what errors call each; by default the text itself.
      cut: whether the end of one that is too long is cut off.

    Raises:
      ValueError: one is too long, and may not be cut.
    """
    tokens = self.tokenizer.encode_all([plain(words) for words in texts])
    for index, ids in enumerate(tokens):
      if len(ids) > self.longest - 2 and not cut:
        what = places[index] if places else repr(texts[index])[:80]
        raise ValueError(
          f"{what} has {len(ids)} tokens, and the model reads {self.longest - 2}: make it shorter"
        )
    if not tokens:
      return self._joined([])
    rows = marked(tokens, self.tokenizer, self.longest)
    parts = self._in_parts(map(rows.row, range(len(rows))))
    return self._joined(np.asarray(self._of_texts(part))[:count] for part, count in parts)

  def _of_texts(self, rows: Sequence[Mapping[str, np.ndarray]]) -> jax.Array:
    given = (np.stack([row[name] for row in rows]) for name in ("text", "mask"))
    return _of_texts(self.model, self.variables, *given)

  def _in_parts(self, given: Iterable) -> Iterator[tuple[list, int]]:
    """As many at a time as there are rows, the last of them filled up; and how many were given."""
    rows, given = divisible(self.rows), iter(given)
    while part := list(itertools.islice(given, rows)):
      yield part + part[:1] * (rows - len(part)), len(part)

  def _joined(self, parts: Iterable[np.ndarray]) -> np.ndarray:
    found = list(parts)
    if not found:
      width = self.model.features or self.model.encoder.encoder.width
      return np.zeros((0, width), np.float32)
    features_NE = np.concatenate(found)
    if not np.isfinite(features_NE).all():
      raise FloatingPointError("the model's features are not numbers")
    return features_NE


@functools.partial(jax.jit, static_argnames="model")
def _of_images(model, variables, images_BHWC) -> jax.Array:
  images_BHWC = sharding.constrain(images_BHWC, "batch", None, None, None)
  return sharding.replicate(model.apply(variables, images_BHWC).images_BE)


@functools.partial(jax.jit, static_argnames="model")
def _of_texts(model, variables, tokens_BT, mask_BT) -> jax.Array:
  tokens_BT, mask_BT = (sharding.constrain(x, "batch", None) for x in (tokens_BT, mask_BT))
  return sharding.replicate(model.apply(variables, None, tokens_BT, mask_BT=mask_BT).texts_BE)
