"""What a translating model writes: its translator, and the scores of that."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Protocol

import jax
from jax.sharding import Mesh

from magneto_jax import sharding
from magneto_jax.config import TrainConfig
from magneto_jax.data import scores
from magneto_jax.data.tokenizers import Tokenizer
from magneto_jax.decoding import Translator
from magneto_jax.models.encoder_decoder import EncoderDecoder

# Of the validation set's pairs, how many a sample shows.
_SHOWN = 3


class Pairs(Protocol):
  """What `judge` reads of the task's data.

  Attributes:
    validation_pairs: raw texts, each with its translation.
    tokenizer: of both.
  """

  validation_pairs: Sequence[tuple[str, str]]
  tokenizer: Tokenizer


def translator(
  config: TrainConfig, model: EncoderDecoder, variables, tokenizer: Tokenizer
) -> Translator:
  """What translates as `config.beam` says, texts of at most as many tokens as the model learned."""
  return Translator(
    model, variables, tokenizer, longest=config.data.seq_length, **dataclasses.asdict(config.beam)
  )


def sample(
  config: TrainConfig, model: EncoderDecoder, variables, data: Pairs, key: jax.Array
) -> str | None:
  """Some of the validation set's sources, translated, and what they should be."""
  del key  # The best are written.
  if not config.sample_tokens:
    return None
  translate = translator(config, model, variables, data.tokenizer)
  texts, references = zip(*itertools.islice(data.validation_pairs, _SHOWN), strict=True)
  found = translate.translate([translate.cut(source) for source in translate.encode(texts)])
  return "\n".join(
    f"{text}\n  {best.text}\n  (reference: {reference})"
    for text, (best, *_), reference in zip(texts, found, references, strict=True)
  )


def judge(
  config: TrainConfig, model: EncoderDecoder, variables, data: Pairs, mesh: Mesh | None
) -> dict[str, float]:
  """BLEU and chrF of the validation set's translations; of sources that are too long, cut.

  See `data.scores.signatures` for how they are computed.
  """
  translate = translator(config, model, variables, data.tokenizer)
  texts, references = zip(*data.validation_pairs, strict=True)
  with sharding.use_mesh(mesh):
    found = translate.translate([translate.cut(source) for source in translate.encode(texts)])
  return scores.corpus_scores([best.text for best, *_ in found], references)
