"""Sentence pairs in one call: texts and their translations, tokenizer, packed rows of pairs.

A row holds several pairs: their sources side by side in one array of T tokens and their targets in
another, each pair a segment of its own in both. All rows are of one shape, and few of their tokens
are padding. Which pairs share a row is a function of the data alone.
"""

import bisect
import dataclasses
import gzip
import lzma
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from magneto_jax.data import documents, packing, text, text_files, tfds_text, tokenizers

Pair = tuple[str, str]

# Pairs among which rows are filled: enough that the last rows, which stay open, are few.
_WINDOW = 4096
_PACKING = 1  # of rows; raise it when the rule changes that says which pairs share one
_LANGUAGES = ("en", "de")  # columns of the embedded pairs
_SPLITS = {"train": (0, 5265), "validation": (5265, 5565), "test": (5565, 5865)}  # and their lines
_COMPRESSED = {".xz": lzma.open, ".gz": gzip.open}


@dataclasses.dataclass(frozen=True)
class Pairs(Sequence[Pair]):
  """A sequence of texts and their translations, read one pair at a time.

  Attributes:
    size: number of pairs.
    read: index in [0, size) -> source and target; BadRecord if the pair is damaged.
    place: index -> where a pair lies: the file, the index in it, and what that counts.
    identity: see `documents.Documents`.
  """

  size: int
  read: Callable[[int], Pair]
  place: Callable[[int], tuple[str, int, str]]
  identity: Mapping[str, Any]

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> Pair:
    if not 0 <= index < self.size:
      raise IndexError(f"pair {index} of {self.size}")
    pair = self.read(index)
    for side, words in zip(("source", "target"), pair, strict=True):
      if not words.strip():
        raise self.bad(index, f"its {side} is empty")
    return pair

  def bad(self, index: int, reason: str) -> documents.BadRecord:
    """The error of a pair that cannot be used."""
    file, within, unit = self.place(index)
    return documents.BadRecord(file, within, reason, unit=unit)

  def texts(self) -> documents.Documents:
    """All sources, then all targets; both of a damaged pair are damaged."""
    return documents.Documents(
      size=2 * self.size,
      read=lambda index: self[index % self.size][index // self.size],
      identity={"pairs": dict(self.identity), "order": "sources, targets"},
    )


@dataclasses.dataclass(frozen=True)
class Chosen(Sequence[Pair]):
  """Some of the pairs, by their indices, in order."""

  pairs: Pairs
  indices: Sequence[int]

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> Pair:
    return self.pairs[self.indices[index]]


# ---------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------


class PairOptions(NamedTuple):
  """What a source of pairs may read; see `sources.SourceOptions`.

  Attributes:
    source_key, target_key: languages to translate from and into, as the data set names them
      (`embedded`, TFDS).
    train_files, validation_files, validation_fraction: see `pair_files`.
    data_dir, train_split, validation_split: see `sources.SourceOptions`.
  """

  source_key: str = "en"
  target_key: str = "de"
  train_files: Sequence[str] = ()
  validation_files: Sequence[str] = ()
  validation_fraction: float = 0.1
  data_dir: str = ""
  train_split: str = "train"
  validation_split: str = "validation"


def embedded(split: str, source_key: str = "en", target_key: str = "de") -> Pairs:
  """One split of the English-German pairs that come with the package, in either direction."""
  if split not in _SPLITS:
    raise ValueError(f"the embedded pairs have no split {split!r}; they have {sorted(_SPLITS)}")
  if {source_key, target_key} != {*_LANGUAGES}:
    raise ValueError(
      f"the embedded pairs are of {' and '.join(_LANGUAGES)}: data.source_key={source_key!r} and"
      f" data.target_key={target_key!r} must be these two"
    )
  path = resources.files("magneto_jax.data") / "embedded" / "translation" / "handbook.en-de.tsv.xz"
  lines = lzma.decompress(path.read_bytes()).decode().splitlines()
  begin, end = _SPLITS[split]
  first, second = (_LANGUAGES.index(key) for key in (source_key, target_key))
  columns = [line.split("\t") for line in lines[begin:end]]
  return Pairs(
    size=end - begin,
    read=lambda index: (columns[index][first], columns[index][second]),
    place=lambda index: (path.name, begin + index + 1, "line"),
    identity={
      "source": "embedded",
      "split": split,
      "languages": [source_key, target_key],
      "pairs": end - begin,
      "sha256": documents.texts_digest(line.encode() for line in lines[begin:end]),
    },
  )


def pair_files(
  *,
  train_files: Sequence[str],
  validation_files: Sequence[str] = (),
  validation_fraction: float = 0.1,
) -> tuple[Pairs, Pairs]:
  """Pairs of one's own UTF-8 files: a source, a tab and its target a line; also of .xz and .gz.

  Args:
    train_files: paths or glob patterns; the files of a pattern come in sorted order.
    validation_files: the same; empty holds out the last lines of each training file.
    validation_fraction: in (0, 1), the part of a file's lines that is then held out.

  Returns:
    Training and validation pairs. A line that is empty, not UTF-8, or of other than two columns is
    a BadRecord when it is read.

  Raises:
    FileNotFoundError: a pattern matches no file.
    ValueError: a file is empty or in both parts, or no pair is left for one of them.
  """
  paths = text_files.expand(train_files, "train_files")
  held_out = text_files.expand(validation_files, "validation_files") if validation_files else []
  if shared := sorted({*paths} & {*held_out}):
    raise ValueError(f"train_files and validation_files must not share files: {shared}")
  train = [_lines(path) for path in paths]
  validation = [_lines(path) for path in held_out]
  if not held_out:
    if not 0 < validation_fraction < 1:
      raise ValueError(f"{validation_fraction=} must lie in (0, 1); or name validation_files")
    for i, whole in enumerate(train):
      cut = int((1 - validation_fraction) * len(whole))
      train[i] = whole.part(0, cut)
      validation.append(whole.part(cut, len(whole)))
  return _of_lines(train, "train"), _of_lines(validation, "validation")


@dataclasses.dataclass(frozen=True)
class _Lines:
  """Consecutive lines of a file, of which the first is the `first`-th, from 1.

  Line i is the bytes [bounds[i], bounds[i + 1]) of the content, with its end.
  """

  path: str
  content: np.ndarray
  bounds: np.ndarray
  first: int = 1

  def __len__(self) -> int:
    return len(self.bounds) - 1

  def part(self, begin: int, end: int) -> "_Lines":
    return dataclasses.replace(self, bounds=self.bounds[begin : end + 1], first=self.first + begin)

  def read(self, index: int) -> Pair:
    begin, end = self.bounds[index : index + 2]
    line = self.content[begin:end].tobytes().removesuffix(b"\n").removesuffix(b"\r")

    def bad(reason: str) -> documents.BadRecord:
      return documents.BadRecord(self.path, self.first + index, reason, unit="line")

    if not line:
      raise bad("it is empty")
    try:
      columns = line.decode().split("\t")
    except UnicodeDecodeError as error:
      raise bad(
        f"not UTF-8: its byte {error.start} is {line[error.start]:#04x}; convert the file, for"
        " example with iconv -f latin1 -t utf-8"
      ) from None
    if len(columns) != 2:
      count = "one column" if len(columns) == 1 else f"{len(columns)} columns"
      raise bad(f"it has {count}, not a source, a tab and its target")
    return columns[0], columns[1]


def _lines(path: str) -> _Lines:
  if not os.path.getsize(path):
    raise ValueError(f"{path} is empty: remove it from the list of files")
  opened = _COMPRESSED.get(pathlib.Path(path).suffix)
  if opened is None:
    content = np.memmap(path, np.uint8, mode="r")
  else:
    try:
      with opened(path) as file:
        content = np.frombuffer(file.read(), np.uint8)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
      raise ValueError(f"{path} cannot be decompressed: {error}") from None
  ends = np.flatnonzero(content == ord("\n")) + 1
  if not ends.size or ends[-1] < len(content):  # The last line has no end.
    ends = np.append(ends, len(content))
  if not ends[-1]:
    raise ValueError(f"{path} is empty: remove it from the list of files")
  return _Lines(path, content, np.concatenate([[0], ends]))


def _of_lines(parts: Sequence[_Lines], split: str) -> Pairs:
  """Pairs of several files; the identity digests the content, so moving a file changes nothing."""
  starts = np.cumsum([0, *map(len, parts)]).tolist()
  if not starts[-1]:
    raise ValueError(
      f"pair_files: no {split} pair is left; give more lines, another validation_fraction or"
      " validation_files"
    )

  def at(index: int) -> tuple[_Lines, int]:
    part = bisect.bisect_right(starts, index) - 1
    return parts[part], index - starts[part]

  def read(index: int) -> Pair:
    part, within = at(index)
    return part.read(within)

  def place(index: int) -> tuple[str, int, str]:
    part, within = at(index)
    return part.path, part.first + within, "line"

  contents = (part.content[part.bounds[0] : part.bounds[-1]] for part in parts)
  return Pairs(
    size=starts[-1],
    read=read,
    place=place,
    identity={
      "source": "pair_files",
      "split": split,
      "pairs": starts[-1],
      "sha256": documents.texts_digest(content.tobytes() for content in contents),
    },
  )


def tfds_pairs(
  name: str, *, split: str, source_key: str, target_key: str, data_dir: str = ""
) -> Pairs:
  """Pairs of one split of a prepared TFDS data set such as `wmt17_translate/de-en`.

  Args:
    name, split, data_dir: see `tfds_text.tfds_text`, which says what is raised, too.
    source_key, target_key: the features, of which each holds a language.
  """
  keys = {"source_key": source_key, "target_key": target_key}
  examples = tfds_text.texts_of(name, split=split, keys=keys, data_dir=data_dir)
  return Pairs(
    size=examples.size,
    read=examples.read,
    place=lambda index: (*examples.place(index), "record"),
    identity=examples.identity | {"languages": [source_key, target_key], "pairs": examples.size},
  )


def _embedded(options: PairOptions) -> tuple[Pairs, Pairs]:
  languages = options.source_key, options.target_key
  return embedded(options.train_split, *languages), embedded(options.validation_split, *languages)


def _pair_files(options: PairOptions) -> tuple[Pairs, Pairs]:
  languages = options.source_key, options.target_key
  if languages != (PairOptions().source_key, PairOptions().target_key):
    raise ValueError(
      "data.source_key and data.target_key are not read with data.name='pair_files', whose lines"
      " hold the source first: leave them as they are"
    )
  return pair_files(
    train_files=options.train_files,
    validation_files=options.validation_files,
    validation_fraction=options.validation_fraction,
  )


def _tfds(name: str, options: PairOptions) -> tuple[Pairs, Pairs]:
  keys = {"source_key": options.source_key, "target_key": options.target_key}
  train, validation = (
    tfds_pairs(name, split=split, data_dir=options.data_dir, **keys)
    for split in (options.train_split, options.validation_split)
  )
  return train, validation


SOURCES = {"embedded": _embedded, "pair_files": _pair_files}


def read_pairs(name: str, **options: Any) -> tuple[Pairs, Pairs]:
  """The training and the validation pairs of a source; nothing is ever downloaded.

  Args:
    name: a name in `SOURCES`, or a TFDS data set such as `wmt14_translate/de-en`.
    **options: the fields of `PairOptions`.

  Raises:
    FileNotFoundError: the files or the data set are not on disk.
    ValueError: the name is unknown, the pairs unusable, or both parts hold the same pairs.
  """
  record = PairOptions(**options)
  source = SOURCES.get(name)
  train, validation = source(record) if source else _tfds(name, record)
  for part, which in ((train, "train"), (validation, "validation")):
    if not part:
      raise ValueError(f"{name} has no {which} pairs: {dict(part.identity)}")
  digests = [part.identity.get("sha256", part.identity) for part in (train, validation)]
  if digests[0] == digests[1]:
    raise ValueError(f"{name}: training and validation pairs are the same: {dict(train.identity)}")
  return train, validation


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


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
    train_pairs, validation_pairs: the texts of the pairs that the rows hold.
    padding: the share of both rows' tokens that is padding.
    too_long: how many training and validation pairs were skipped as too long.
    bad_records: the damaged pairs that were left out: file, line in it, and what is wrong.
    identity: see `text.TextData`.
    augment: nothing: a row is read as it is.
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
    name: a name in `SOURCES` or a TFDS data set, see `read_pairs`.
    seq_length: T, tokens of a row's sources and of its targets: what the longest pair may have on
      a side, its eos included.
    skip_bad: how many damaged pairs may be left out, of training and validation together.
    too_long: what is done with a longer pair: "refuse" or "skip".
    expected: the `identity` of an earlier call, whose pairs these must be: others are refused
      before anything is written.
    **options: the fields of `PairOptions`.

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
  pairs = read_pairs(name, **options)
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
      **({"too_long": skipped} if any(skipped) else {}),
      **({"left_out": left_out} if bad.found else {}),
    },
  )


class _Part(NamedTuple):
  """The rows of a part, the pairs in them, the padding, and how many pairs were too long."""

  rows: PackedPairs
  pairs: Chosen
  padding: float
  too_long: int

  @classmethod
  def of(cls, stream: packing.TokenStream, pairs: Pairs, seq_length: int, *, skip: bool) -> "_Part":
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
    return cls(packed, Chosen(pairs, kept[short].tolist()), padding, int(long.size))
