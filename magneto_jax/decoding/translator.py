"""Texts in answer to texts, by beam search in few shapes."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from magneto_jax import sharding
from magneto_jax.data.tokenizers import Tokenizer
from magneto_jax.decoding.beam import beam_search
from magneto_jax.models.encoder_decoder import EncoderDecoder

# The narrowest of the shapes; the others are twice as wide each.
_NARROWEST = 16


class Translation(NamedTuple):
  """A text, and what beam search scores it."""

  text: str
  score: float


def divisible(rows: int) -> int:
  """As many rows, or the next number that the mesh divides."""
  parts = sharding.parts("batch")
  return -(-rows // parts) * parts


def in_batches(
  lengths: Sequence[int], width: Callable[[int], int], rows: int
) -> Iterator[tuple[int, tuple[int, ...]]]:
  """Widths, and which sources are searched at each, at most `divisible(rows)` of them at a time.

  The longest first, as they need the most.

  Args:
    lengths: of the sources.
    width: `length -> width` of the program for it, rising with it.
    rows: see `Translator`.
  """
  order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
  for wide, group in itertools.groupby(order, lambda i: width(lengths[i])):
    while batch := tuple(itertools.islice(group, divisible(rows))):
      yield wide, batch


@dataclasses.dataclass(frozen=True)
class Translator:
  """Translates any number of texts with a few compiled programs.

  Sources are their tokens and the eos; the decoder begins with the eos. They are sorted by length,
  padded to 16, 32, 64, ... tokens, or to the longest there may be, and searched `rows` at a time:
  one program for each width. What a text becomes does not depend on the others.

  Attributes:
    model: an encoder-decoder; variables: its variables; tokenizer: of both sides.
    longest: the most tokens of a source, the eos included, and of the decoder's input.
    size, length_penalty, penalty, min_length: see `beam_search`.
    max_ratio, max_extra: a translation of n tokens, the eos included, has at most max_ratio n +
      max_extra before its own.
    rows: how many sources are searched together, or the next number that the mesh divides.

  Example:
    >>> ((best, *others),) = translator(["Save the file."])
  """

  model: EncoderDecoder
  variables: Any
  tokenizer: Tokenizer
  longest: int
  size: int = 5
  length_penalty: float = 1.0
  penalty: str = "length"
  min_length: int = 1
  max_ratio: float = 1.2
  max_extra: int = 10
  rows: int = 32

  def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    """The sources of texts, however long."""
    end = np.array([self.tokenizer.eos_id], np.int32)
    return [np.concatenate([tokens, end]) for tokens in self.tokenizer.encode_all(texts)]

  def cut(self, source: np.ndarray) -> np.ndarray:
    """The source without what is too long of it: the tokens before its eos."""
    if len(source) <= self.longest:
      return source
    return np.append(source[: self.longest - 1], source[-1:])

  def __call__(self, texts: Sequence[str]) -> list[list[Translation]]:
    """See `translate`."""
    return self.translate(self.encode(texts))

  def translate(self, sources: Sequence[np.ndarray]) -> list[list[Translation]]:
    """At most `size` translations of each source, the best first, in the sources' order.

    Raises:
      ValueError: if one is longer than `longest`.
      FloatingPointError: if the model's scores are not finite.
    """
    for index, source in enumerate(sources):
      if len(source) > self.longest:
        raise ValueError(
          f"source {index} has {len(source)} tokens, the eos included, more than {self.longest}"
        )
    translated: list[list[Translation]] = [[] for _ in sources]
    for width, indices in in_batches(list(map(len, sources)), self._width, self.rows):
      found = self._search([sources[i] for i in indices], width)
      for index, ranked in zip(indices, found[: len(indices)], strict=True):
        translated[index] = [Translation(self.tokenizer.decode(y), score) for y, score in ranked]
    return translated

  def _width(self, length: int) -> int:
    return min(max(_NARROWEST, 1 << (length - 1).bit_length()), self.longest)

  def _most(self, length: int) -> int:
    """The most tokens of a translation, before its eos."""
    return min(int(self.max_ratio * length + self.max_extra), self.longest - 1)

  def _search(self, sources: Sequence[np.ndarray], width: int):
    """What is found for at most as many sources as there are rows; other rows end at once."""
    end, rows = self.tokenizer.eos_id, divisible(self.rows)
    filling = rows - len(sources)
    return beam_search(
      self.model,
      self.variables,
      [[end]] * rows,
      sources=[*sources, *[[end]] * filling],
      size=self.size,
      max_length=[*(self._most(len(source)) for source in sources), *[0] * filling],
      eos_id=end,
      pad_id=self.tokenizer.pad_id,
      min_length=self.min_length,
      length_penalty=self.length_penalty,
      penalty=self.penalty,
      compiled_for=(width, self._most(width)),
    )
