"""Texts in answer to sounds, by the search of each kind of model, in few shapes."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from magneto_jax import sharding
from magneto_jax.data.tokenizers import Tokenizer
from magneto_jax.decoding.beam import beam_search
from magneto_jax.decoding.ctc import Transcripts, ctc_beam_search, ctc_greedy
from magneto_jax.decoding.transducer import transducer_beam_search, transducer_greedy
from magneto_jax.decoding.translator import Translation, divisible, in_batches
from magneto_jax.models.speech import CTCRecognizer, SpeechToText, Transducer

# Seconds of the shortest of the shapes; the others are twice as long each.
_SHORTEST = 1.0


@dataclasses.dataclass(frozen=True)
class Transcriber:
  """Writes what any number of sounds say, or what that means, with a few compiled programs.

  Sounds are sorted by length, padded to 1, 2, 4, ... seconds, or to the longest there may be, and
  searched `rows` at a time: one program for each of these. What a sound becomes does not depend on
  the others, nor on the padding.

  A `CTCRecognizer` and a `Transducer` are searched by `ctc_beam_search` and
  `transducer_beam_search`, with one beam greedily; a text's score is the logarithm of its
  probability, as far as the search has followed its alignments. A `SpeechToText` is searched by
  `beam_search`.

  Attributes:
    model: one of these; variables: its variables; tokenizer: of the texts.
    longest: S, the most samples of a sound.
    most: the most tokens of a text.
    size: k, beams.
    max_symbols: the most labels that a transducer says at a vector, which is 40 ms.
    length_penalty, penalty, min_length: of a `SpeechToText`, see `beam_search`.
    max_ratio, max_extra: likewise; of T vectors it writes at most max_ratio T + max_extra tokens.
    rows: how many sounds are searched together, or the next number that the mesh divides.

  Example:
    >>> ((best, *others),) = transcriber([wave_S])
  """

  model: CTCRecognizer | Transducer | SpeechToText
  variables: Any
  tokenizer: Tokenizer
  longest: int
  most: int
  size: int = 5
  max_symbols: int = 5
  length_penalty: float = 1.0
  penalty: str = "length"
  min_length: int = 1
  max_ratio: float = 1.2
  max_extra: int = 10
  rows: int = 32

  def __call__(self, waves: Sequence[np.ndarray]) -> list[list[Translation]]:
    """At most `size` texts of each sound, the best first, in the sounds' order.

    Args:
      waves: int16 [S] each, at the model's rate.

    Raises:
      ValueError: if one is longer than `longest`, or too short for a vector.
      FloatingPointError: if the model's scores are not finite.
    """
    for index, wave in enumerate(waves):
      if len(wave) > self.longest or self.model.encoder.lengths(len(wave)) < 1:
        raise ValueError(
          f"sound {index} has {len(wave)} samples: more than {self.longest}, or too few for one"
          " vector of the model"
        )
    found: list[list[Translation]] = [[] for _ in waves]
    search = self._beam_search if isinstance(self.model, SpeechToText) else self._sum_search
    for width, indices in in_batches(list(map(len, waves)), self._width, self.rows):
      ranked = search([waves[i] for i in indices], width)
      for index, texts in zip(indices, ranked, strict=False):
        found[index] = [Translation(self.tokenizer.decode(ids), score) for ids, score in texts]
    return found

  def _width(self, length: int) -> int:
    width = round(_SHORTEST * self.model.encoder.sample_rate)
    while width < length:
      width *= 2
    return min(width, self.longest)

  def _filled(self, waves: list[np.ndarray]) -> list[np.ndarray]:
    """As many sounds as there are rows."""
    return waves + waves[:1] * (divisible(self.rows) - len(waves))

  def _sum_search(self, waves: list[np.ndarray], width: int):
    """By sums over alignments: what is found for each sound, and for rows that fill up."""
    filled = self._filled(waves)
    waves_BS = np.stack([np.pad(wave, (0, width - len(wave))) for wave in filled])
    lengths_B = np.array(list(map(len, filled)), np.int32)
    sizes = {"size": self.size, "most": self.most}
    if isinstance(self.model, Transducer):
      found = _transducer(
        self.model, self.variables, waves_BS, lengths_B, max_symbols=self.max_symbols, **sizes
      )
    else:
      found = _ctc(self.model, self.variables, waves_BS, lengths_B, **sizes)
    for row in zip(*map(np.asarray, found), strict=True):
      texts = [
        (ids[:length], float(score))
        for ids, length, score in zip(*row, strict=True)
        if np.isfinite(score)
      ]
      if not texts:
        raise FloatingPointError(
          "no text of a sound has a finite score: the model's are not numbers"
        )
      yield texts

  def _beam_search(self, waves: list[np.ndarray], width: int):
    """By a decoder: the same."""
    end, filled = self.tokenizer.eos_id, self._filled(waves)
    limits = [self._limit(len(wave)) for wave in waves]
    return beam_search(
      self.model,
      self.variables,
      [[end]] * len(filled),
      sources=filled,
      size=self.size,
      max_length=limits + [0] * (len(filled) - len(limits)),
      eos_id=end,
      pad_id=self.tokenizer.pad_id,
      min_length=self.min_length,
      length_penalty=self.length_penalty,
      penalty=self.penalty,
      compiled_for=(width, self._limit(width)),
    )

  def _limit(self, samples: int) -> int:
    """The most tokens of a decoder's text, before its eos."""
    vectors = self.model.encoder.lengths(samples)
    return min(int(self.max_ratio * vectors + self.max_extra), self.most)


@functools.partial(jax.jit, static_argnames=("model", "size", "most"))
def _ctc(model, variables, waves_BS, lengths_B, *, size: int, most: int) -> Transcripts:
  h_BTD, frames_B = model.apply(variables, _cut(waves_BS), lengths_B, method="encode")
  log_p_BTV = model.apply(variables, h_BTD, method="log_probs")
  if size == 1:
    return sharding.replicate(ctc_greedy(log_p_BTV, frames_B, max_length=most))
  found = ctc_beam_search(log_p_BTV, frames_B, width=size, max_length=most)
  return sharding.replicate(found)


@functools.partial(jax.jit, static_argnames=("model", "size", "most", "max_symbols"))
def _transducer(
  model, variables, waves_BS, lengths_B, *, size: int, most: int, max_symbols: int
) -> Transcripts:
  of = functools.partial(model.apply, variables)
  h_BTD, frames_B = of(_cut(waves_BS), lengths_B, method="encode")

  given = (
    functools.partial(of, method="predict"),
    functools.partial(of, method="join"),
    of(len(waves_BS), method="init_predictor"),
    of(h_BTD, method="project"),
    frames_B,
  )
  limits = {"max_symbols": max_symbols, "max_length": most}
  if size == 1:
    return sharding.replicate(transducer_greedy(*given, **limits))
  return sharding.replicate(transducer_beam_search(*given, width=size, **limits))


def _cut(waves_BS: jax.Array) -> jax.Array:
  return sharding.constrain(waves_BS, "batch", None)
