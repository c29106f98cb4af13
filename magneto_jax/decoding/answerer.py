"""Answers to questions about images, and whether a statement is true of two, in one shape."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from magneto_jax import sharding
from magneto_jax.data.captions import marked
from magneto_jax.data.text import plain
from magneto_jax.data.tokenizers import Tokenizer
from magneto_jax.decoding.translator import Translation, divisible
from magneto_jax.models.vision_language import AnsweringBEiT3, ReasoningBEiT3


@dataclasses.dataclass(frozen=True)
class Answerer:
  """Answers a question about any number of images, by one compiled program.

  An `AnsweringBEiT3` is asked about each image; an answer's score is its own probability, 1 / (1 +
  exp(-y)), as answers do not exclude each other. A `ReasoningBEiT3` is asked whether a statement is
  true of two images; the scores of both answers sum to 1.

  Attributes:
    model: one of these, its variables are `variables`; tokenizer: of the questions.
    answers: A texts, in the order of the model's scores.
    see: from an image, uint8 [H, W, 3] of any size, to what the model reads.
    longest: T, tokens of a question, its bos and eos among them.
    size: how many answers are given, at most, the likeliest first.
    rows: how many are answered together, or the next number that the mesh divides.

  Example:
    >>> ((best, *others),) = answerer([pixels], "What animal is this?")
  """

  model: AnsweringBEiT3 | ReasoningBEiT3
  variables: Any
  tokenizer: Tokenizer
  answers: Sequence[str]
  see: Callable[[np.ndarray], np.ndarray]
  longest: int
  size: int = 1
  rows: int = 32

  @property
  def images(self) -> int:
    """How many images a question is about."""
    return 2 if isinstance(self.model, ReasoningBEiT3) else 1

  def __call__(
    self, images: Sequence[np.ndarray] | Sequence[Sequence[np.ndarray]], question: str
  ) -> list[list[Translation]]:
    """The answers, with their scores, in the images' order.

    Args:
      images: uint8 [H, W, 3] each, or pairs of such.
      question: or statement, which is made `plain`, as those are that were learned.

    Raises:
      ValueError: the question is too long.
      FloatingPointError: if the model's scores are not finite.
    """
    ids = self.tokenizer.encode(plain(question))
    if len(ids) > self.longest - 2:
      raise ValueError(
        f"the question has {len(ids)} tokens, and the model reads {self.longest - 2}: make it"
        " shorter"
      )
    asked, rows, found = (
      marked([ids], self.tokenizer, self.longest).row(0),
      divisible(self.rows),
      [],
    )
    tokens_BT, mask_BT = (np.repeat(asked[name][None], rows, 0) for name in ("text", "mask"))
    for begin in range(0, len(images), rows):
      part = [self._seen(image) for image in images[begin : begin + rows]]
      filled = np.stack(part + part[:1] * (rows - len(part)))
      p_BA = probabilities(self.model, self.variables, filled, tokens_BT, mask_BT)
      found += list(np.asarray(p_BA)[: len(part)])
    if not np.isfinite(found).all():
      raise FloatingPointError("the model's scores are not numbers")
    return [self._ranked(p_A) for p_A in found]

  def _seen(self, image) -> np.ndarray:
    return self.see(image) if self.images == 1 else np.stack([self.see(each) for each in image])

  def _ranked(self, p_A: np.ndarray) -> list[Translation]:
    order = np.argsort(-p_A, kind="stable")[: self.size]
    return [Translation(self.answers[i], float(p_A[i])) for i in order]


@functools.partial(jax.jit, static_argnames="model")
def probabilities(
  model: AnsweringBEiT3 | ReasoningBEiT3, variables, images, tokens_BT, mask_BT
) -> jax.Array:
  """Of every answer, [B, A], in float32 or wider; see `Answerer`.

  Args:
    model: its variables are `variables`.
    images: [B, S, S, 3] as the model reads them, or [B, 2, S, S, 3] of two.
    tokens_BT: questions between bos and eos; mask_BT: False for their padding.
  """
  images = sharding.constrain(images, "batch", *[None] * (images.ndim - 1))
  tokens_BT, mask_BT = (sharding.constrain(x, "batch", None) for x in (tokens_BT, mask_BT))
  scores_BA = model.apply(variables, images, tokens_BT, mask_BT=mask_BT)
  is_one_of = isinstance(model, ReasoningBEiT3)
  return sharding.replicate(jax.nn.softmax(scores_BA) if is_one_of else jax.nn.sigmoid(scores_BA))
