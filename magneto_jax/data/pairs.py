"""Sentence pairs in one call: texts and their translations, tokenizer, packed rows of pairs.

A row holds several pairs: their sources side by side in one array of T tokens and their targets in
another, each pair a segment of its own in both. All rows are of one shape, and few of their tokens
are padding. Which pairs share a row is a function of the data alone.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from magneto_jax.data import documents, packing, pair_sources, text, tokenizers
from magneto_jax.data.pair_sources import Pair

# Pairs among which rows are filled: enough that the last rows, which stay open, are few.
_WINDOW = 4096
_PACKING = 1  # of rows; raise it when the rule changes that says which pairs share one


def pack(lengths_P2: np.ndarray, room: int, window: int = _WINDOW) -> list[list[int]]:
  """Which pairs share a row: among so many consecutive ones, first fit, the longest first.

  Args:
    lengths_P2: tokens of each pair's source and target, at most `room`.
    room: tokens of a row's sources, and of its targets.
    window: pairs among which rows are filled.

  Returns:
    The pairs of each row; every pair is in exactly one.
  """
  rows: list[list[int]] = []
  for start in range(0, len(lengths_P2), window):
    part = lengths_P2[start : start + window]
    # Sources and targets apart: a reduction over two columns would take most of the time.
    sources, targets = (np.full(len(part), room) for _ in range(2))
    members: list[list[int]] = []
    for pair in np.argsort(-part.max(axis=1), kind="stable").tolist():
      source, target = part[pair]
      # A new row is the last.
      seen = len(members) + 1
      row = int(np.argmax((sources[:seen] >= source) & (targets[:seen] >= target)))
      if row == len(members):
        members.append([])
      members[row].append(start + pair)
      sources[row] -= source
      targets[row] -= target
    rows += members
  return rows


class PackedPairs(packing.Mapped):
  """Rows of pairs: a random-access data source for Grain.

  Every pair is in exactly one row, and every token of its target, its eos included, the target of
  one place of weight 1: the sum of weighted losses over rows is that over pairs.

  Attributes:
    tokens: [tokens], the stream of all sources, then of all targets.
    offsets: [2 pairs + 1], where each text starts, and the end.
    pairs: the pairs of all rows, row by row; starts: [rows + 1], where each row's begin.
    seq_length: T, tokens of a row's sources and of its targets.
  """

  def __init__(
    self, tokens: np.ndarray, offsets: np.ndarray, rows: Sequence[Sequence[int]], seq_length: int
  ):
    self.tokens = tokens
    self.offsets = offsets
    self.pairs = np.asarray([pair for row in rows for pair in row], np.int64)
    self.starts = np.cumsum([0, *map(len, rows)])
    self.seq_length = seq_length

  def __len__(self) -> int:
    return len(self.starts) - 1

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns row `index`, arrays of shape [T].

    Args:
      index: in [0, len(self)).

    Returns:
      source: int32, the sources, each with its eos.
      inputs: int32, what the decoder is given: each target behind an eos, without its own.
      targets: int32, the token after each input, the eos at last.
      source_segment_ids, segment_ids: int32, 1, 2, ... a pair of the row; 0 for padding.
      source_positions, positions: int32, counted from the pair's start.
      weights: float32, 1 for a target, 0 for padding.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"sample {index} of {len(self)}")
    integers = ("source", "inputs", "targets")
    integers += ("source_segment_ids", "source_positions", "segment_ids", "positions")
    row = {name: np.zeros(self.seq_length, np.int32) for name in integers}
    row["weights"] = np.zeros(self.seq_length, np.float32)
    begin = target_begin = 0
    for segment, pair in enumerate(self.pairs[self.starts[index] : self.starts[index + 1]], 1):
      source, target = self._text(pair), self._text(pair + len(self.offsets) // 2)
      at = slice(begin, begin := begin + len(source) - 1)
      row["source"][at] = source[1:]
      row["source_segment_ids"][at] = segment
      row["source_positions"][at] = np.arange(len(source) - 1)
      at = slice(target_begin, target_begin := target_begin + len(target) - 1)
      row["inputs"][at] = [tokenizers.EOS_ID, *target[1:-1]]
      row["targets"][at] = target[1:]
      row["segment_ids"][at] = segment
      row["positions"][at] = np.arange(len(target) - 1)
      row["weights"][at] = 1.0
    return row

  def _text(self, index: int) -> np.ndarray:
    """A text of the stream: bos, tokens, eos."""
    return self.tokens[self.offsets[index] : self.offsets[index + 1]]


@dataclasses.dataclass(frozen=True)
class PairData:
  """Packed pairs, ready for the pipelines.

  Attributes:
    train: rows of the training pairs.
    validation: rows of the validation pairs.
    tokenizer: of both languages, trained on the training pairs only, or loaded.
    train_pairs, validation_pairs: the texts of all pairs but the damaged ones.
    padding: the share of both rows' tokens that is padding.
    too_long: how many of the training and of the validation pairs are too long for a row.
    bad_records: the damaged pairs that were left out: file, line in it, and what is wrong.
    identity: see `text.TextData`.
    augment, mix: nothing: a row is read as it is.
  """

  train: PackedPairs
  validation: PackedPairs
  tokenizer: tokenizers.Tokenizer
  train_pairs: Sequence[Pair]
  validation_pairs: Sequence[Pair]
  padding: tuple[float, float]
  too_long: tuple[int, int]
  bad_records: tuple[str, ...]
  identity: Mapping[str, Any]
  augment: None = None
  mix: None = None

  def describe(self) -> str:
    """Pairs, rows, padding and pieces."""
    parts = [
      f"{len(rows.pairs):,} {which} pairs in {len(rows):,} rows (padding {padding:.1%} of tokens)"
      for which, rows, padding in zip(
        ("training", "validation"), (self.train, self.validation), self.padding, strict=True
      )
    ]
    length, skipped = self.train.seq_length, sum(self.too_long)
    skipped = f"; {skipped:,} pairs of more than {length} tokens skipped" if skipped else ""
    return (
      f"{' and '.join(parts)} of {length} + {length} tokens{skipped},"
      f" {self.tokenizer.vocab_size:,} in the vocabulary"
    )

  def show(self, sample: Mapping[str, np.ndarray]) -> str:
    """The first pair of a row, as text."""
    of = lambda name, ids: self.tokenizer.decode(sample[name][sample[ids] == 1])
    source, target = of("source", "source_segment_ids"), of("targets", "segment_ids")
    return f"starts with {source!r} -> {target!r}"


def load_pairs(
  *,
  workdir: str | os.PathLike[str],
  name: str = "embedded",
  tokenizer: str = "sentencepiece",
  vocab_size: int = 1024,
  tokenizer_file: str = "",
  seq_length: int = 256,
  cache_dir: str = "",
  skip_bad: int = 0,
  too_long: str = "refuse",
  expected: Mapping[str, Any] | None = None,
  **options: Any,
) -> PairData:
  """Loads, tokenises and packs a source of pairs.

  Args:
    workdir, tokenizer, vocab_size, tokenizer_file, cache_dir: see `text.load_text`; one tokenizer
      is of both sides.
    name: see `pair_sources.read_pairs`.
    seq_length: T, tokens of a row's sources and of its targets: what the longest pair may have on
      a side, its eos included.
    skip_bad: how many damaged pairs may be left out, of training and validation together.
    too_long: what is done with a longer pair: "refuse" or "skip".
    expected: the `identity` of an earlier call, whose pairs these must be: others are refused
      before anything is written.
    **options: the fields of `pair_sources.PairOptions`.

  Returns:
    The packed pairs.

  Raises:
    FileNotFoundError: pairs or tokenizer are not on disk.
    ValueError: a value is out of range, `workdir` holds the tokenizer of other texts, the pairs are
      not the expected ones, one is longer than `seq_length` and may not be skipped, or more than
      `skip_bad` are damaged.

  Example:
    >>> data = load_pairs(workdir="/tmp/run", vocab_size=4000, seq_length=128)
    >>> len(data.train_pairs), data.validation_pairs[0][0]
    (5265, 'But DROP is far more secure, so it is clearly a better choice.')
  """
  if tokenizer not in text.TOKENIZERS:
    raise ValueError(f"{tokenizer=} must be one of {sorted(text.TOKENIZERS)}")
  if too_long not in ("refuse", "skip"):
    raise ValueError(f"{too_long=} must be refuse or skip")
  pairs = pair_sources.read_pairs(name, apart=expected is None, **options)
  identities = {
    part: dict(of.identity) for part, of in zip(("train", "validation"), pairs, strict=True)
  }
  text.refuse_others(identities, expected)
  bad = documents.BadRecords(skip_bad)
  train, validation = (part.texts() for part in pairs)
  made = text.TOKENIZERS[tokenizer](
    train,
    pathlib.Path(workdir),
    vocab_size,
    tokenizer_file,
    None if expected is None else expected.get("tokenizer", {}),
    bad,
  )
  cache = cache_dir or pathlib.Path(workdir) / "cache"
  streams = [packing.tokenize(part, made, cache, bad) for part in (train, validation)]
  parts = [
    _Part.of(stream, of, seq_length, skip=too_long == "skip")
    for stream, of in zip(streams, pairs, strict=True)
  ]
  skipped = tuple(part.too_long for part in parts)
  if any(skipped):
    logging.warning(
      "skipped as they have more than %d tokens on a side: %d training and %d validation pairs",
      *(seq_length, *skipped),
    )
  left_out = {
    which: [i for i in stream.left_out if i < of.size]
    for which, stream, of in zip(identities, streams, pairs, strict=True)
  }
  return PairData(
    train=parts[0].rows,
    validation=parts[1].rows,
    tokenizer=made,
    train_pairs=parts[0].pairs,
    validation_pairs=parts[1].pairs,
    padding=tuple(part.padding for part in parts),
    too_long=skipped,
    bad_records=tuple(bad.found),
    identity={
      **identities,
      "tokenizer": dict(made.identity),
      "seq_length": seq_length,
      "packing": _PACKING,
      **({"left_out": left_out} if bad.found else {}),
    },
  )


class _Part(NamedTuple):
  """The rows of a part, its readable pairs, the padding, and how many pairs no row can hold."""

  rows: PackedPairs
  pairs: pair_sources.Chosen
  padding: float
  too_long: int

  @classmethod
  def of(
    cls, stream: packing.TokenStream, pairs: pair_sources.Pairs, seq_length: int, *, skip: bool
  ) -> "_Part":
    # Without the mark of a beginning, which neither side is read with.
    lengths_P2 = (np.diff(stream.offsets) - 1).reshape(2, -1).T
    is_long = (lengths_P2 > seq_length).any(axis=1)
    (long,), (short,) = np.nonzero(is_long), np.nonzero(~is_long)
    # The stream's pairs among all.
    kept = np.delete(np.arange(pairs.size), [i for i in stream.left_out if i < pairs.size])
    if long.size and not skip:
      file, index, unit = pairs.place(int(kept[long[0]]))
      raise ValueError(
        f"{file}: {unit} {index} has {lengths_P2[long[0]].max()} tokens on a side, more than"
        f" {seq_length=}, as {long.size:,} of {len(kept):,} pairs do: set data.seq_length to at"
        f" least {lengths_P2.max()}, or data.too_long=skip"
      )
    if not short.size:
      raise ValueError(f"all pairs have more than {seq_length=} tokens on a side")
    rows = [[int(short[i]) for i in row] for row in pack(lengths_P2[short], seq_length)]
    padding = 1 - int(lengths_P2[short].sum()) / (2 * seq_length * len(rows))
    packed = PackedPairs(stream.tokens, stream.offsets, rows, seq_length)
    return cls(packed, pair_sources.Chosen(pairs, kept.tolist()), padding, int(long.size))
