"""Utterances in one call: sounds and their texts as waves and tokens of equal shapes."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from magneto_jax.data import documents, sounds, speech_sources, text, tokenizers

Sample = dict[str, np.ndarray]

TEXT_CASES = {"keep": lambda words: words, "lower": str.lower}
# Of `load_speech`: the least and the most that each may be.
_BOUNDS = {
  "sample_rate": (1000, 384_000),
  "max_seconds": (sounds.SHORTEST, 3600.0),
  "speed_change": (0.0, 0.5),
  "validation_fraction": (0.0, 1.0),
}


class SpokenTokens(Sequence):
  """Utterances as waves and tokens: a random-access data source for Grain.

  Attributes:
    utterances: all that can be read; chosen: [size], the indices of those that are neither too long
      nor left out.
    tokens: of each of these, without marks; texts: what they are tokens of.
    longest: S, samples of a wave with its padding.
    seq_length: U, the same of tokens.
  """

  def __init__(
    self,
    utterances: speech_sources.Utterances,
    chosen: Sequence[int],
    tokens: Sequence[np.ndarray],
    texts: Sequence[str],
    *,
    longest: int,
    seq_length: int,
  ):
    self.utterances, self.chosen, self.tokens = utterances, np.asarray(chosen), list(tokens)
    self.texts = tuple(texts)
    self.longest, self.seq_length = longest, seq_length

  def __len__(self) -> int:
    return len(self.chosen)

  @property
  def samples(self) -> np.ndarray:
    """[size], the length of each wave."""
    return self.utterances.samples[self.chosen]

  def __getitem__(self, index: int) -> Sample:
    """Utterance `index`.

    Returns:
      waves: int16 [S], padded behind with 0.
      wave_lengths: int32 [], in samples.
      tokens: int32 [U], those of the text without a start or an end, padded behind with 0.
      token_lengths: int32 [].
      weights: float32 [], 1.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"utterance {index} of {len(self)}")
    tokens = self.tokens[index]
    return {
      **_padded(self.utterances[int(self.chosen[index])], self.longest),
      "tokens": np.pad(tokens, (0, self.seq_length - len(tokens))),
      "token_lengths": np.int32(len(tokens)),
      "weights": np.float32(1),
    }


def _padded(wave_S: np.ndarray, longest: int) -> Sample:
  waves = np.pad(wave_S, (0, longest - len(wave_S)))
  return {"waves": waves, "wave_lengths": np.int32(len(wave_S))}


def vary_speed(
  sample: Sample, generator: np.random.Generator, *, change: float, shortest: int
) -> Sample:
  """A sample at one of the speeds 1 - change, 1 and 1 + change, each as likely.

  Of these only where the sound then fits: it is neither longer than the array nor shorter than
  `shortest` samples.
  """
  longest, length = len(sample["waves"]), int(sample["wave_lengths"])
  # Rounding may add a sample.
  speeds = [
    speed
    for speed in (1.0, 1 - change, 1 + change)
    if speed == 1 or shortest < length / speed < longest
  ]
  speed = speeds[generator.integers(len(speeds))]
  if speed == 1:
    return sample
  return sample | _padded(sounds.change_speed(sample["waves"][:length], speed), longest)


@dataclasses.dataclass(frozen=True)
class SpeechData:
  """Utterances, ready for the pipelines.

  Attributes:
    train, validation: the samples; `validation.texts` are what an answer is held against.
    tokenizer: trained on the training texts only, or loaded. No text has the id 0, which is padding
      and a transducer's or CTC's blank.
    sample_rate: samples a second of a wave.
    augment: changes the speed of training samples, or None.
    too_long: how many of the training and of the validation utterances are left out, as the sound
      or the text is too long.
    unknown: how many have characters that the tokenizer has not; they are read as `unk_id`.
    shared: how many of the validation texts are training texts too.
    alignable: whether the model has an alignment for each of the training, and of the validation
      utterances; None: it has for all.
    marks: which ids a model adds to every text.
    bad_records: the utterances that were left out: file, line in it, and what is wrong.
    identity: see `text.TextData`.
    mix: nothing.
  """

  train: SpokenTokens
  validation: SpokenTokens
  tokenizer: tokenizers.Tokenizer
  sample_rate: int
  augment: Callable[[Sample, np.random.Generator], Sample] | None
  too_long: tuple[int, int]
  unknown: tuple[int, int]
  shared: int
  bad_records: tuple[str, ...]
  identity: Mapping[str, Any]
  alignable: tuple[np.ndarray, np.ndarray] | None = None
  marks: tuple[int, ...] = ()
  mix: None = None

  def describe(self) -> str:
    """Utterances, minutes, ids, and what a person may not expect of them."""
    parts = [
      f"{len(part):,} {which} utterances ({part.samples.sum() / self.sample_rate / 60:.1f} minutes)"
      for which, part in (("training", self.train), ("validation", self.validation))
    ]
    words = (
      f"{' and '.join(parts)} at {self.sample_rate:,} samples a second,"
      f" {self.tokenizer.vocab_size:,} in the vocabulary"
    )
    if any(self.too_long):
      words += f"; {sum(self.too_long):,} are too long and skipped"
    if any(self.unknown):
      words += f"; {sum(self.unknown):,} have characters that are read as unknown"
    if self.alignable and (without := sum(int(np.sum(~part)) for part in self.alignable)):
      words += f"; {without:,} have more to say than a CTC has vectors for, and are left out"
    if self.shared:
      words += f"; {self.shared:,} of the validation texts are training texts too"
    return words

  def show(self, sample: Mapping[str, np.ndarray]) -> str:
    """A sample's length and its text."""
    ids = sample["tokens"][: int(sample["token_lengths"])]
    seconds = int(sample["wave_lengths"]) / self.sample_rate
    return f"{seconds:.2f} seconds: {self.tokenizer.decode(ids)!r:.200}"


def load_speech(
  *,
  workdir: str | os.PathLike[str],
  name: str = "embedded/en",
  sample_rate: int = 8000,
  max_seconds: float = 4.0,
  speed_change: float = 0.0,
  text_case: str = "keep",
  tokenizer: str = "char",
  vocab_size: int = 1024,
  tokenizer_file: str = "",
  seq_length: int = 256,
  cache_dir: str = "",
  skip_bad: int = 0,
  too_long: str = "refuse",
  expected: Mapping[str, Any] | None = None,
  **options: Any,
) -> SpeechData:
  """Finds the utterances of a source, and shows them as waves and tokens.

  Texts are in Unicode's form NFC, with single spaces in them and none around them.

  Args:
    workdir: where the tokenizer is kept, and what is noted of TFDS sets.
    name: see `speech_sources.read_utterances`.
    sample_rate: samples a second of the waves; sounds of other rates are resampled.
    max_seconds: the longest sound; S = round(max_seconds * sample_rate).
    speed_change: training sounds are played at the speeds 1 - this, 1 and 1 + this.
    text_case: "keep", or "lower": texts in small letters.
    tokenizer: "char" (the characters of the training texts), "byte" or "sentencepiece".
    vocab_size, tokenizer_file: see `text.load_text`; of "char" a run's `characters.json`.
    seq_length: U, the most tokens of a text.
    cache_dir: where it is noted what TFDS sets hold; empty means `workdir/cache`.
    skip_bad: how many damaged utterances may be left out, of training and validation together.
    too_long: what is done with a sound longer than `max_seconds`, or a text of more than
      `seq_length` tokens: "refuse" or "skip", in both parts.
    expected: the `identity` of an earlier call, whose utterances these must be: others are refused
      before a tokenizer is made. Without its `validation` any may be evaluated on.
    **options: the fields of `speech_sources.SpeechOptions`.

  Returns:
    The samples. Characters of a text that the tokenizer has not, of held-out texts in the main, are
    read as unknown; how many texts have some is told, and the first of them named.

  Raises:
    FileNotFoundError: utterances or tokenizer are not on disk.
    ValueError: a value is out of range, `workdir` holds the tokenizer of other texts, the
      utterances are not the expected ones, one is too long and may not be skipped, or more than
      `skip_bad` are damaged.

  Example:
    >>> data = load_speech(workdir="/tmp/run", name="embedded/en", text_case="lower")
    >>> len(data.train), data.validation.texts[0]
    (388, 'login incorrect.')
  """
  given = {
    "sample_rate": sample_rate,
    "max_seconds": max_seconds,
    "speed_change": speed_change,
    "validation_fraction": options.get("validation_fraction", 0.1),
  }
  for field, value in given.items():
    least, most = _BOUNDS[field]
    if not least <= value <= most:  # Nor is what is no number.
      raise ValueError(f"{field}={value} must be {least:g} to {most:g}")
  if tokenizer not in text.SPEECH_TOKENIZERS:
    raise ValueError(f"{tokenizer=} must be one of {sorted(text.SPEECH_TOKENIZERS)}")
  if too_long not in ("refuse", "skip"):
    raise ValueError(f"{too_long=} must be refuse or skip")
  if text_case not in TEXT_CASES:
    raise ValueError(f"{text_case=} must be one of {sorted(TEXT_CASES)}")
  longest = round(max_seconds * sample_rate)
  cache = cache_dir or pathlib.Path(workdir) / "cache"
  read = speech_sources.SpeechOptions(sample_rate, longest, cache, **options)
  bad = documents.BadRecords(skip_bad)
  found = speech_sources.read_utterances(name, read, bad, apart=expected is None)
  identities = dict(zip(("train", "validation"), (part.identity for part in found), strict=True))
  if part := text.changed_part(identities, expected):
    raise ValueError(
      f"the {part} utterances are not those that this run was started with: bring them back, or use"
      " another workdir"
    )
  texts = [tuple(plain(words, text_case) for words in part.texts) for part in found]
  made = text.SPEECH_TOKENIZERS[tokenizer](
    documents.Documents(
      size=len(texts[0]),
      read=texts[0].__getitem__,
      identity={"utterances": identities["train"], "text_case": text_case},
    ),
    pathlib.Path(workdir),
    vocab_size,
    tokenizer_file,
    None if expected is None else expected.get("tokenizer", {}),
    bad,
  )
  parts, skipped, unknown = [], [], []
  for which, utterances, of_part in zip(identities, found, texts, strict=True):
    limits = {"longest": longest, "seq_length": seq_length}
    tokens = made.encode_all(of_part)
    chosen = _fitting(utterances, tokens, sample_rate, skip=too_long == "skip", **limits)
    skipped.append(len(of_part) - len(chosen))
    kept = [[values[i] for i in chosen] for values in (tokens, of_part)]
    unknown.append(_tell_unknown(which, utterances, chosen, *kept, made))
    parts.append(SpokenTokens(utterances, chosen, *kept, **limits))
  seen = set(parts[0].texts)
  shortest = round(sounds.SHORTEST * sample_rate)
  return SpeechData(
    train=parts[0],
    validation=parts[1],
    tokenizer=made,
    sample_rate=sample_rate,
    augment=functools.partial(vary_speed, change=speed_change, shortest=shortest)
    if speed_change
    else None,
    too_long=tuple(skipped),
    unknown=tuple(unknown),
    shared=sum(words in seen for words in parts[1].texts),
    bad_records=tuple(bad.found),
    identity={
      **identities,
      "tokenizer": dict(made.identity),
      "sample_rate": sample_rate,
      "longest": longest,
      "seq_length": seq_length,
      **({"left_out": len(bad.found)} if bad.found else {}),
    },
  )


def plain(words: str, text_case: str) -> str:
  """A text of which nothing differs that nobody can hear, as it is learned and judged."""
  return text.plain(TEXT_CASES[text_case](words))


def _fitting(
  utterances: speech_sources.Utterances,
  tokens: Sequence[np.ndarray],
  sample_rate: int,
  *,
  longest: int,
  seq_length: int,
  skip: bool,
) -> list[int]:
  """The utterances that are not too long; where they may not be skipped, ValueError for others."""
  lengths = np.array([len(ids) for ids in tokens])
  is_short = np.ones(len(lengths), bool)
  for sizes, most, scale, unit, limit in (
    (utterances.samples, longest, sample_rate, "seconds", "data.max_seconds"),
    (lengths, seq_length, 1, "tokens", "data.seq_length"),
  ):
    is_long = sizes > most
    if is_long.any() and not skip:
      first = int(np.argmax(is_long))
      size, largest = (sounds.rounded_up(value, scale) for value in (sizes[first], sizes.max()))
      raise ValueError(
        f"{utterances.where(first)} has {size:.10g} {unit}, more than"
        f" {limit}={most / scale:g}, as {is_long.sum():,} of {len(sizes):,} utterances do: set"
        f" {limit} to at least {largest:.10g}, or data.too_long=skip"
      )
    is_short &= ~is_long
  limits = longest / sample_rate, seq_length
  if not is_short.any():
    raise ValueError("all utterances are longer than {:g} seconds or {} tokens".format(*limits))
  if not is_short.all():
    logging.warning(
      "skipped as they are longer than %g seconds or %d tokens: %d of %d utterances, first %s",
      *limits,
      np.sum(~is_short),
      len(is_short),
      utterances.where(int(np.argmin(is_short))),
    )
  return np.flatnonzero(is_short).tolist()


def _tell_unknown(
  which: str,
  utterances: speech_sources.Utterances,
  chosen: Sequence[int],
  tokens: Sequence[np.ndarray],
  texts: Sequence[str],
  tokenizer: tokenizers.Tokenizer,
) -> int:
  """How many texts have characters without an id; they are logged."""
  has_unknown = lambda ids: bool((ids == tokenizer.unk_id).any())
  without = [i for i, ids in enumerate(tokens) if has_unknown(ids)]
  if without:
    characters = sorted({*"".join(texts[i] for i in without)})
    logging.warning(
      "%d of %d %s texts have characters that the tokenizer has not, and that are read as unknown"
      " (%s), first %s",
      len(without),
      len(texts),
      which,
      " ".join(repr(c) for c in characters if has_unknown(tokenizer.encode(c))),
      utterances.where(chosen[without[0]]),
    )
  return len(without)
