"""Hiding tokens of a text, which a masked language model restores: masks drawn anew, or fixed ones.

Reference: BERT, arXiv 1810.04805, section 3.1; RoBERTa, arXiv 1907.11692, section 4.1 (a new mask
each time a text is read).
Differs: neither spans nor whole words can be hidden as one.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from magneto_jax.data import packing, text, tokenizers

Sample = dict[str, np.ndarray]

# How a person reads the special ids; see `Tokenizer`.
_MARKS = ("[pad]", "[bos]", "[eos]", "[unk]")
# So many places fit devices that share them, and a TPU's registers.
_PLACES = 8


class Masking(NamedTuple):
  """Draws a mask: which tokens of a sample are to be predicted, and what is read in their place.

  Of L tokens, padding not counted, n = floor(rate L + r) are chosen, r ~ U[0, 1), all different
  and each as likely: rate L on average. Each of them is then left as it is with the probability
  `keep`, replaced by a random token with `random`, and else by the mask's id. Whatever is read, the
  chosen token is the target. No token is spared: the marks of a text's start and end can be chosen.

  Attributes:
    rate: share of the tokens that are chosen.
    keep, random: see above.
    vocab_size: V of the tokenizer. The mask's id is V, so that a model has V + 1; random tokens are
      of [4, V), all ids but the special ones.

  Reference: fairseq's `MaskTokensDataset`.
  Differs: there the mask's id can be a random token, too.
  """

  rate: float
  keep: float
  random: float
  vocab_size: int

  @property
  def mask_id(self) -> int:
    """What is read in place of a hidden token."""
    return self.vocab_size

  def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
    """The sample of a `MarkedDataset`, masked.

    Args:
      sample: inputs, segment_ids and positions [T], padding behind.
      rng: all that the mask depends on.

    Returns:
      The sample with other inputs, and, K being `places_of`:
      places: int32 [K], the chosen positions in their order, then 0.
      targets: int32 [K], what stood there, then 0.
      weights: float32 [K], 1 for each chosen position, then 0.
    """
    tokens, length = sample["inputs"], np.count_nonzero(sample["segment_ids"])
    count = min(int(self.rate * length + rng.random()), length)
    places = np.sort(rng.choice(length, count, replace=False))
    targets, fate = tokens[places], rng.random(count)
    drawn = rng.integers(tokenizers.SPECIALS, self.vocab_size, count)
    read = np.where(fate < self.keep + self.random, drawn, self.mask_id)
    inputs = tokens.copy()
    inputs[places] = np.where(fate < self.keep, targets, read)
    fill = lambda values: np.pad(values, (0, places_of(self.rate, len(tokens)) - count))
    return sample | {
      "inputs": inputs,
      "places": fill(places.astype(np.int32)),
      "targets": fill(targets),
      "weights": fill(np.ones(count, np.float32)),
    }

  def frequencies(self, plain_V: np.ndarray) -> np.ndarray:
    """How often each of V + 1 ids is read where the text has ids with the frequencies `plain_V`."""
    read = plain_V * (1 - self.rate * (1 - self.keep))
    read[tokenizers.SPECIALS :] += self.rate * self.random / (len(plain_V) - tokenizers.SPECIALS)
    return np.append(read, self.rate * (1 - self.keep - self.random))


def places_of(rate: float, length: int) -> int:
  """K, the places of a sample of T tokens: at least ceil(rate T) + 1, in eights.

  That many because rate T + r may be rounded up to the next number.
  """
  return -(-(math.ceil(rate * length) + 1) // _PLACES) * _PLACES


class FixedMasks(Sequence[Sample]):
  """Samples with masks that are a function of the index alone: those of every run and epoch."""

  def __init__(self, samples: packing.MarkedDataset, masking: Masking):
    self.samples = samples
    self.masking = masking

  def __len__(self) -> int:
    return len(self.samples)

  def __getitem__(self, index: int) -> Sample:
    sample = self.samples[index]
    return self.masking(sample, np.random.default_rng(int(index)))


class MaskedText(text.TextData):
  """A text whose tokens are hidden: windows of a `MarkedDataset`.

  Attributes:
    train: the windows as they are, whole ones.
    validation: `FixedMasks` of windows that hold every token of the validation text once.
    augment: the `Masking`, which draws a new mask each time a training window is read.
    All others: see `TextData`.
  """

  @classmethod
  def of(cls, data: text.TextData, *, rate: float, keep: float, random: float) -> "MaskedText":
    """The text with this masking.

    Raises:
      ValueError: not one token of the validation text is hidden.
    """
    masking = Masking(rate, keep, random, data.tokenizer.vocab_size)
    train, validation = (
      packing.MarkedDataset(part.tokens, part.offsets, part.seq_length, part.keep_tail)
      for part in (data.train, data.validation)
    )
    fixed = FixedMasks(validation, masking)
    if not any(sample["weights"].any() for sample in fixed):
      raise ValueError(
        f"not one of the validation text's {len(validation.tokens)} tokens is hidden with"
        f" data.mask_rate={rate}: give a longer text, or set data.mask_rate to more"
      )
    values = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    identity = data.identity | {"masking": {"rate": rate, "keep": keep, "random": random}}
    changed = {"train": train, "validation": fixed, "augment": masking, "identity": identity}
    return cls(**values | changed)

  def show(self, sample: Sample) -> str:
    """The start of a window, as it is read."""
    return f"starts with {self.words(sample['inputs'][:48])!r}"

  def words(self, ids: np.ndarray, instead: dict[int, str] | None = None) -> str:
    """See `words_of`."""
    return words_of(self.tokenizer, ids, instead)


def words_of(
  tokenizer: tokenizers.Tokenizer,
  ids: np.ndarray,
  instead: dict[int, str] | None = None,
  *,
  specials: bool = True,
) -> str:
  """The text of ids, with marks for special ids and `[mask]` where one is hidden.

  Args:
    tokenizer: of V ids; V is the mask's.
    ids: in [0, V].
    instead: by index, what stands there in place of the id's own text.
    specials: whether padding, start, end and unknown have marks; else they are as the tokenizer
      decodes them, the first three as nothing.
  """
  instead = {} if instead is None else instead
  marks = {tokenizer.vocab_size: "[mask]"} | (dict(enumerate(_MARKS)) if specials else {})
  parts, plain = [], []
  for i, token in enumerate([*map(int, ids), None]):
    mark = instead.get(i, marks.get(token))
    if mark is None and token is not None:
      plain.append(token)
      continue
    # Together: a letter may be several bytes.
    parts.append(tokenizer.decode(plain))
    parts.append(mark or "")
    plain = []
  return "".join(parts)
