"""Texts of images, by beam search in one shape."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from magneto_jax.data.text import plain
from magneto_jax.data.tokenizers import Tokenizer
from magneto_jax.decoding.beam import beam_search
from magneto_jax.decoding.translator import Translation, divisible
from magneto_jax.models.vision_language import CaptioningBEiT3


@dataclasses.dataclass(frozen=True)
class Captioner:
  """Writes what any number of images show, `rows` of them at a time, with one compiled program.

  What an image's caption becomes does not depend on the others.

  Attributes:
    model: a `CaptioningBEiT3`; variables: its variables; tokenizer: of the captions.
    most: the most tokens that are written, before the eos.
    size, length_penalty, penalty, min_length: see `beam_search`. BEiT-3 writes with 3 beams, and
      0.6 of `with_bos`.
    rows: how many images are searched together, or the next number that the mesh divides.

  Example:
    >>> ((best, *others),) = captioner([image_HWC])
    >>> ((continued, *_),) = captioner([image_HWC], prefix="a drawing of")

  Reference: BEiT-3's released code.
  Differs: a beam that has ended stays in the list until there are as many as beams, where BEiT-3's
  search stops once no open one can win; and at the longest length the eos follows the last word,
  where BEiT-3 puts it in the word's place.
  """

  model: CaptioningBEiT3
  variables: Any
  tokenizer: Tokenizer
  most: int
  size: int = 3
  length_penalty: float = 0.6
  penalty: str = "with_bos"
  min_length: int = 1
  rows: int = 32

  def __call__(self, images: Sequence[np.ndarray], *, prefix: str = "") -> list[list[Translation]]:
    """At most `size` captions of each image, the best first, in the images' order.

    Args:
      images: [H, W, C] each, floats, scaled as the model was trained.
      prefix: what all captions begin with, made `plain`, as captions are that were learned; the
        score is of what is written behind it.

    Raises:
      ValueError: the prefix and `most` tokens behind it are more than the model can hold, or the
        images are not of one size.
      FloatingPointError: if the model's scores are not finite.
    """
    prompt = [self.tokenizer.bos_id, *map(int, self.tokenizer.encode(plain(prefix)))]
    rows, found = divisible(self.rows), []
    for start in range(0, len(images), rows):
      some = list(images[start : start + rows])
      filling = rows - len(some)
      ranked = beam_search(
        self.model,
        self.variables,
        [prompt] * rows,
        sources=some + some[:1] * filling,
        size=self.size,
        # Rows that fill up end at once.
        max_length=[self.most] * len(some) + [0] * filling,
        eos_id=self.tokenizer.eos_id,
        pad_id=self.tokenizer.pad_id,
        min_length=self.min_length,
        length_penalty=self.length_penalty,
        penalty=self.penalty,
        compiled_for=(len(some[0]), self.most),
      )
      found += [[self._read(prompt, *caption) for caption in row] for row in ranked[: len(some)]]
    return found

  def _read(self, prompt: list[int], tokens: np.ndarray, score: float) -> Translation:
    """The text of what was written; a mask, which the model may write, is no text."""
    written = [*prompt[1:], *(int(token) for token in tokens if token != self.model.mask_id)]
    return Translation(self.tokenizer.decode(written), score)
