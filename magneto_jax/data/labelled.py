"""Texts, or pairs of texts, with a label each: read from where they lie, and checked."""

import collections
import csv
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from magneto_jax.data import documents, sources, text_files, tfds_text


class GlueTask(NamedTuple):
  """What TFDS's `glue/<name>` holds.

  Attributes:
    columns: the features of the one or two texts.
    classes: in the order of their numbers; none for a regression.
    metrics: those that GLUE reports; names in `tasks.text_classification.METRICS`.
  """

  columns: tuple[str, ...]
  classes: tuple[str, ...]
  metrics: tuple[str, ...]


_ENTAILED = ("entailment", "not_entailment")
_SAME = ("not_equivalent", "equivalent")
_BOTH = ("sentence1", "sentence2")

# Reference: GLUE, arXiv 1804.07461, table 1.
GLUE: Mapping[str, GlueTask] = {
  "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
  "sst2": GlueTask(("sentence",), ("negative", "positive"), ("accuracy",)),
  "mrpc": GlueTask(_BOTH, _SAME, ("accuracy", "f1")),
  "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
  "stsb": GlueTask(_BOTH, (), ("pearson", "spearman")),
  "mnli": GlueTask(
    ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",)
  ),
  "qnli": GlueTask(("question", "sentence"), _ENTAILED, ("accuracy",)),
  "rte": GlueTask(_BOTH, _ENTAILED, ("accuracy",)),
  "wnli": GlueTask(_BOTH, _ENTAILED[::-1], ("accuracy",)),
}


def glue_task(name: str) -> GlueTask | None:
  """The entry of GLUE that a data set's name means, `glue/rte:2.0.0` too; None for any other."""
  found = re.fullmatch(r"glue/(\w+)(:[\d.]+)?", name)
  return GLUE.get(found[1]) if found else None


class Row(NamedTuple):
  """One sample as it is read.

  Attributes:
    texts: one or two.
    label: the class's name, or a number.
    where: the file and the line, or what else finds it.
  """

  texts: tuple[str, ...]
  label: str | float
  where: str


class Source(NamedTuple):
  """What a source of rows is: rows of both parts, classes in order if they are known, metrics."""

  train: list[Row]
  validation: list[Row]
  classes: tuple[str, ...] | None
  metrics: tuple[str, ...]


class Table(NamedTuple):
  """Which columns hold what."""

  columns: tuple[str, ...]
  label_key: str
  regression: bool

  @property
  def metrics(self) -> tuple[str, ...]:
    return ("pearson", "spearman") if self.regression else ("accuracy", "f1")

  def row(self, values: Mapping[str, Any], where: str) -> Row:
    """The row of a mapping of columns to values; ValueError with what is wrong with it."""
    texts = tuple(values[column] for column in self.columns)
    for column, value in zip(self.columns, texts, strict=True):
      if not isinstance(value, str):
        raise ValueError(f"{column} is {value!r:.40}, not a text")
      if not value.strip():
        raise ValueError(f"{column} is empty")
    label = values[self.label_key]
    if isinstance(label, bool) or not isinstance(label, str | int | float) or label != label:
      raise ValueError(f"{self.label_key} is {label!r:.40}, neither a name nor a number")
    if not self.regression:
      if isinstance(label, float) and label.is_integer():
        label = int(label)
      if not (label := str(label).strip()):
        raise ValueError(f"{self.label_key} is empty")
      return Row(texts, label, where)
    try:
      number = float(label)
    except (ValueError, OverflowError):
      number = math.nan
    if not abs(number) <= float(np.finfo(np.float32).max):
      raise ValueError(f"{self.label_key} is {label!r:.40}, not a number that float32 holds")
    return Row(texts, number, where)


# ---------------------------------------------------------------------------------------------
# The embedded lines
# ---------------------------------------------------------------------------------------------

# Lines shorter than this say too little, and those that stand together are kept together.
_FEWEST_WORDS, _BLOCK = 5, 50
_PARTS = {4: "test", 9: "validation"}


def embedded_lines(split: str) -> list[Row]:
  """Lines of the eight training plays that ship with the package; the label is the play's title.

  What would give a play away is left out: lists of persons (all before the first act), stage
  directions, and the first line of every paragraph, which is the speaker's name. Persons who are
  spoken of in a line stay in it. Lines of fewer than five words, and lines that occur twice, by
  their letters, are left out. Of each play's lines that are left, blocks of 50 that follow each
  other go to one part: of ten, the fifth to `test`, the tenth to `validation`, others to `train`.
  So neighbours, which speak of the same things, are mostly in one part.
  """
  if split not in (known := ("train", *_PARTS.values())):
    raise ValueError(f"the embedded lines have no split {split!r}; they have {sorted(known)}")
  letters = lambda line: re.sub("[^a-z]", "", line.lower())
  of_plays = {play.partition("\n")[0]: list(_spoken(play)) for play in sources.embedded("train")}
  times = collections.Counter(letters(line) for lines in of_plays.values() for line in lines)
  return [
    Row((line,), title, f"{title}, line {number} of those spoken")
    for title, lines in of_plays.items()
    for number, line in enumerate(lines)
    if times[letters(line)] == 1 and _PARTS.get(number // _BLOCK % 10, "train") == split
  ]


def _spoken(play: str) -> Iterator[str]:
  begin = re.search(r"^act\b", play, re.MULTILINE | re.IGNORECASE).start()
  for paragraph in re.split(r"\n\s*\n", re.sub(r"\[[^\]]*\]", " ", play[begin:])):
    for line in map(str.strip, paragraph.strip().split("\n")[1:]):
      if len(line.split()) >= _FEWEST_WORDS:
        yield line


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def labelled_files(
  train_files: Sequence[str],
  validation_files: Sequence[str],
  table: Table,
  bad: documents.BadRecords,
  *,
  fraction: float,
  test_files: Sequence[str] = (),
  split: str = "validation",
) -> tuple[list[Row], list[Row]]:
  """Training rows, and those of the split; see `sentences.load_sentences`."""
  paths = text_files.of_parts(train_files, validation_files, test_files, split)
  held = {
    part: [row for path in paths[part] for row in _read_file(path, table, bad)]
    for part in paths
    if part in ("train", split)
  }
  if "validation" not in paths:
    whole, held["train"], held["validation"] = held["train"], [], []
    for row in whole:
      held["validation" if _share(row) < fraction else "train"].append(row)
  return held["train"], held[split]


def _share(row: Row) -> float:
  """A number in [0, 1) that depends on the row's texts alone."""
  digest = documents.texts_digest(text.encode() for text in row.texts)
  return int(digest[:8], 16) / 2**32


def _read_file(path: str, table: Table, bad: documents.BadRecords) -> Iterator[Row]:
  """The good rows of a file; the others are counted."""
  kind = pathlib.Path(path).suffix.lower()
  if kind not in _READERS:
    raise ValueError(f"{path} is not one of {', '.join(_READERS)}: rename it after what it is")
  with open(path, "rb") as f:
    content = f.read()
  content = content[text_files.text_begin(content) :]
  if not content.strip():
    raise ValueError(f"{path} is empty: remove it from the list of files")
  wanted = (*table.columns, table.label_key)
  none = True
  for number, values in _READERS[kind](path, _decoded(content), wanted):
    where, none = f"{path}:{number}", False
    try:
      if isinstance(values, str):  # What is wrong.
        raise ValueError(values)
      yield table.row(values, where)
    except ValueError as error:
      bad.add(f"{where}: {error}")
  if none:
    raise ValueError(f"{path} has a header and no rows: remove it from the list of files")


class _Line(NamedTuple):
  """A line without its end, and what is wrong with its bytes, if anything is."""

  text: str
  wrong: str | None


def _decoded(content: bytes) -> list[_Line]:
  lines = content.split(b"\n")
  if not lines[-1]:
    lines.pop()
  found = []
  for line in lines:
    line = line.removesuffix(b"\r")
    try:
      found.append(_Line(line.decode(), None))
    except UnicodeDecodeError as error:
      wrong = f"not UTF-8: byte {line[error.start]:#04x} at its offset {error.start}"
      found.append(_Line(line.decode(errors="replace"), wrong))
  return found


_Numbered = Iterator[tuple[int, Mapping[str, Any] | str]]


def _header(path: str, names: Sequence[str], wanted: Sequence[str]) -> None:
  for name in wanted:
    if name not in names:
      held = ", ".join(map(repr, names))
      raise ValueError(
        f"{path}:1: there is no column {name!r:.80} in the header, only {held:.200}: set"
        " data.text_key, data.second_text_key and data.label_key"
      )
  if twice := [name for name, times in collections.Counter(names).items() if times > 1]:
    raise ValueError(f"{path}:1: the header has the column {twice[0]!r:.80} twice")


def _fields(names: Sequence[str], values: Sequence[str]) -> Mapping[str, str] | str:
  if len(values) != len(names):
    return f"it has {len(values)} fields, the header {len(names)}"
  return dict(zip(names, values, strict=True))


def _tsv(path: str, lines: list[_Line], wanted: Sequence[str]) -> _Numbered:
  """Fields end at tabs, and quotes are letters, as in GLUE's files."""
  names = lines[0].text.split("\t")
  _header(path, names, wanted)
  for number, line in enumerate(lines[1:], 2):
    empty = "" if line.text.strip() else "the line is empty"
    yield number, line.wrong or empty or _fields(names, line.text.split("\t"))


def _csv(path: str, lines: list[_Line], wanted: Sequence[str]) -> _Numbered:
  """Python's csv, in which a quoted field may hold commas and ends of lines."""
  reader = csv.reader((f"{line.text}\n" for line in lines), strict=True)
  begin = 0  # The line before the row.
  try:
    names = next(reader)
    _header(path, names, wanted)
    begin = reader.line_num
    for values in reader:
      wrong = next(filter(None, (line.wrong for line in lines[begin : reader.line_num])), None)
      empty = "" if any(values) else "the line is empty"
      yield begin + 1, wrong or empty or _fields(names, values)
      begin = reader.line_num
  except csv.Error as error:  # Where the next row begins is not known.
    raise ValueError(f"{path}:{begin + 1}: not CSV from here on ({error}): repair it") from None


def _jsonl(path: str, lines: list[_Line], wanted: Sequence[str]) -> _Numbered:
  """A JSON object a line."""
  for number, line in enumerate(lines, 1):
    try:
      values = line.wrong or text_files.json_object(line.text)
    except ValueError as error:
      values = str(error)
    missing = [name for name in wanted if name not in values] if isinstance(values, dict) else []
    if missing:
      values = f"it has no {missing[0]!r:.80}, only {', '.join(map(repr, values)):.200}"
    yield number, values


_READERS: Mapping[str, Callable[[str, list[_Line], Sequence[str]], _Numbered]] = {
  ".tsv": _tsv,
  ".csv": _csv,
  ".jsonl": _jsonl,
}


# ---------------------------------------------------------------------------------------------
# TFDS
# ---------------------------------------------------------------------------------------------


def tfds_rows(
  name: str,
  splits: Sequence[str],
  data_dir: str,
  table: Table,
  glue: GlueTask | None,
  bad: documents.BadRecords,
) -> Source:
  """Rows of a data set's splits; see `sentences.load_sentences`."""
  parts = []
  for split in splits:
    examples = tfds_text.tfds_columns(
      name, split=split, text_keys=table.columns, label_key=table.label_key, data_dir=data_dir
    )
    if table.regression == bool(examples.classes):
      kind = "classes" if examples.classes else "numbers"
      raise ValueError(
        f"the labels of {name} are {kind}: set data.regression={not table.regression}"
      )
    parts.append(list(_good_rows(examples, table, bad)))
  classes = examples.classes or None
  return Source(*parts, classes, table.metrics if glue is None else glue.metrics)


def _good_rows(
  examples: tfds_text.Columns, table: Table, bad: documents.BadRecords
) -> Iterator[Row]:
  for index in range(examples.size):
    try:
      *texts, label = examples.read(index)
    except documents.BadRecord as error:
      bad.add(str(error))
      continue
    where = f"{examples.name}, example {index}"
    if not table.regression:
      if label < 0:
        raise ValueError(f"{where}: it has no label (label {label}), as GLUE's test sets: not read")
      label = examples.classes[label]
    try:
      columns = (*table.columns, table.label_key)
      yield table.row(dict(zip(columns, (*texts, label), strict=True)), where)
    except ValueError as error:
      bad.add(f"{where}: {error}")
