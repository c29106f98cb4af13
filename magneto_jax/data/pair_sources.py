"""The sources of sentence pairs by name: embedded, one's own files, and prepared TFDS data sets."""

import bisect
import collections
import dataclasses
import gzip
import io
import lzma
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from magneto_jax.data import documents, files, text_files, tfds_text

Pair = tuple[str, str]

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


class PairOptions(NamedTuple):
  """What a source of pairs may read; see `sources.SourceOptions`.

  Attributes:
    source_key, target_key: languages to translate from and into, as the data set names them
      (`embedded`, TFDS).
    train_files, validation_files, test_files, validation_fraction: see `pair_files`.
    data_dir, train_split, validation_split: see `sources.SourceOptions`.
  """

  source_key: str = "en"
  target_key: str = "de"
  train_files: Sequence[str] = ()
  validation_files: Sequence[str] = ()
  test_files: Sequence[str] = ()
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
  test_files: Sequence[str] = (),
  validation_fraction: float = 0.1,
  validation_split: str = "validation",
) -> tuple[Pairs, Pairs]:
  """Pairs of one's own UTF-8 files: a source, a tab and its target a line; also of .xz and .gz.

  Args:
    train_files: paths or glob patterns; the files of a pattern come in sorted order.
    validation_files: the same; empty holds out the last lines of each training file.
    test_files: the same, of the split `test`.
    validation_fraction: in (0, 1), the part of a file's lines that is then held out.
    validation_split: what comes as validation pairs: "validation", "train" or "test".

  Returns:
    Training and validation pairs. A line that is empty, not UTF-8, or of other than two columns is
    a BadRecord when it is read.

  Raises:
    FileNotFoundError: a pattern matches no file.
    ValueError: a file is empty or in two parts, or no pair is left for one of them.
  """
  paths = text_files.of_parts(train_files, validation_files, test_files, validation_split)
  held = {part: [_lines(path) for path in paths[part]] for part in paths}
  if "validation" not in paths:
    if not 0 < validation_fraction < 1:
      raise ValueError(f"{validation_fraction=} must lie in (0, 1); or name validation_files")
    held["validation"] = []
    for i, whole in enumerate(held["train"]):
      cut = int((1 - validation_fraction) * len(whole))
      held["train"][i] = whole.part(0, cut)
      held["validation"].append(whole.part(cut, len(whole)))
  if validation_split != "train":
    _tell_shared(held["train"], held[validation_split], validation_split)
  return _of_lines(held["train"], "train"), _of_lines(held[validation_split], validation_split)


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

  def lines(self) -> Iterator[bytes]:
    """All lines without their ends, in order: much faster than one by one."""
    for line in io.BytesIO(self.content[self.bounds[0] : self.bounds[-1]]):
      yield line.removesuffix(b"\n").removesuffix(b"\r")

  def read(self, index: int) -> Pair:
    begin, end = self.bounds[index : index + 2]
    line = self.content[begin:end].tobytes().removesuffix(b"\n").removesuffix(b"\r")
    try:
      return files.two_columns(line, "a source, a tab and its target")
    except ValueError as error:
      place = self.path, self.first + index
      raise documents.BadRecord(*place, str(error), unit="line") from None


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
  if ends[-1] == (begin := text_files.text_begin(content)):
    raise ValueError(f"{path} is empty: remove it from the list of files")
  return _Lines(path, content, np.concatenate([[begin], ends]))


def _tell_shared(train: Sequence[_Lines], others: Sequence[_Lines], split: str) -> None:
  """Logs how many of a split's lines are lines of the training files, too."""
  lines = lambda parts: (line for part in parts for line in part.lines())
  times = collections.Counter(lines(others))
  if shared := sum(times[line] for line in times.keys() & lines(train)):
    logging.warning(
      "%d of the %d %s pairs are in the training files too", shared, times.total(), split
    )


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
    test_files=options.test_files,
    validation_fraction=options.validation_fraction,
    validation_split=options.validation_split,
  )


def _tfds(name: str, options: PairOptions) -> tuple[Pairs, Pairs]:
  keys = {"source_key": options.source_key, "target_key": options.target_key}
  train, validation = (
    tfds_pairs(name, split=split, data_dir=options.data_dir, **keys)
    for split in (options.train_split, options.validation_split)
  )
  return train, validation


SOURCES = {"embedded": _embedded, "pair_files": _pair_files}


def read_pairs(name: str, *, apart: bool = True, **options: Any) -> tuple[Pairs, Pairs]:
  """The training and the validation pairs of a source; nothing is ever downloaded.

  Args:
    name: a name in `SOURCES`, or a TFDS data set such as `wmt14_translate/de-en`.
    apart: whether both parts must hold other pairs.
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
  if apart and digests[0] == digests[1]:
    raise ValueError(f"{name}: training and validation pairs are the same: {dict(train.identity)}")
  return train, validation
