"""Texts, or pairs of texts, with a label each: read, checked, and tokenised into rows.

A row is `<s> a </s>`, of a pair `<s> a </s></s> b </s>`, padded to the model's length: RoBERTa's
input (arXiv 1907.11692), in which nothing else says where a text ends.
"""

import collections
import csv
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from magneto_jax.data import documents, sources, text, text_files, tfds_text, tokenizers


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
  "wnli": GlueTask(_BOTH, _SAME[::-1], ("accuracy",)),
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


class _Source(NamedTuple):
  """What a source of rows is: rows of both parts, classes in order if they are known, metrics."""

  train: list[Row]
  validation: list[Row]
  classes: tuple[str, ...] | None
  metrics: tuple[str, ...]


class EncodedRows(Sequence):
  """Rows of tokens and targets: a random-access data source for Grain.

  Attributes:
    tokens: the rows end to end, without padding, int32.
    offsets: where each begins, and the end, int64.
    targets: [rows], int32 classes or float32 numbers.
    seq_length: T.
  """

  def __init__(self, rows: Sequence[np.ndarray], targets: np.ndarray, seq_length: int):
    self.tokens = np.concatenate([np.zeros(0, np.int32), *rows])
    self.offsets = np.cumsum([0, *map(len, rows)])
    self.targets, self.seq_length = targets, seq_length

  def __len__(self) -> int:
    return len(self.targets)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Sample `index`.

    Returns:
      inputs: int32 [T], padded behind with id 0.
      mask: bool [T], False for padding.
      targets: int32 [] or float32 [].
      weights: float32 [], 1.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"sample {index} of {len(self)}")
    row = self.tokens[self.offsets[index] : self.offsets[index + 1]]
    padding = (0, self.seq_length - len(row))
    return {
      "inputs": np.pad(row, padding),
      "mask": np.pad(np.ones(len(row), bool), padding),
      "targets": self.targets[index],
      "weights": np.float32(1),
    }


@dataclasses.dataclass(frozen=True)
class SentenceData:
  """Labelled texts, ready for the pipelines.

  Attributes:
    train, validation: the samples.
    tokenizer: trained on the training texts only, or loaded.
    classes: their names, by number; none for a regression.
    label_scale: what a regression's targets were divided by.
    metrics: names in `tasks.text_classification.METRICS`.
    truncated: how many rows of both parts were too long, and are cut.
    shared: how many validation samples are, text by text, in the training set too.
    bad_records: the rows that were left out: file, line, and what is wrong.
    identity: JSON-able values that name all of this exactly.
    augment: nothing: a row is read as it is.
  """

  train: EncodedRows
  validation: EncodedRows
  tokenizer: tokenizers.Tokenizer
  classes: tuple[str, ...]
  label_scale: float
  metrics: tuple[str, ...]
  truncated: int
  shared: int
  bad_records: tuple[str, ...]
  identity: Mapping[str, Any]
  augment: None = None

  def describe(self) -> str:
    """Samples, classes, padding, and what a person may not expect of them."""
    length, rows = self.train.seq_length, len(self.train)
    padding = 1 - len(self.train.tokens) / (rows * length)
    kinds = f"{len(self.classes)} classes" if self.classes else "numbers"
    words = (
      f"{rows:,} training and {len(self.validation):,} validation samples of {length} tokens"
      f" ({padding:.0%} padding), {kinds}, {self.tokenizer.vocab_size:,} in the vocabulary"
    )
    if self.truncated:
      words += f"; {self.truncated:,} were longer, and are cut"
    if self.shared:
      words += f"; {self.shared:,} of the validation samples are in the training set too"
    return words

  def label(self, target: float) -> str:
    """A target in words: the class's name, or the number as it was read."""
    if self.classes:
      return self.classes[int(target)]
    return f"{float(target) * self.label_scale:g}"

  def show(self, sample: Mapping[str, np.ndarray]) -> str:
    """A sample's text and its label."""
    ids = sample["inputs"][sample["mask"]]
    return f"{self.tokenizer.decode(ids)!r:.200} is {self.label(sample['targets'])!r}"


def load_sentences(
  *,
  workdir: str | os.PathLike[str],
  name: str = "embedded",
  text_key: str = "text",
  second_text_key: str = "",
  label_key: str = "label",
  regression: bool = False,
  label_scale: float = 1.0,
  too_long: str = "refuse",
  tokenizer: str = "sentencepiece",
  vocab_size: int = 1024,
  tokenizer_file: str = "",
  seq_length: int = 128,
  skip_bad: int = 0,
  train_files: Sequence[str] = (),
  validation_files: Sequence[str] = (),
  validation_fraction: float = 0.1,
  data_dir: str = "",
  train_split: str = "train",
  validation_split: str = "validation",
  expected: Mapping[str, Any] | None = None,
) -> SentenceData:
  """Reads labelled texts and tokenises them.

  Args:
    workdir: where the tokenizer is kept; see `text.load_text`.
    name: `embedded` (`embedded_lines`), `text_files` (`labelled_files`), `glue/<name>`, or another
      TFDS data set.
    text_key, second_text_key: the columns of the texts; a second one makes pairs. GLUE's are known.
    label_key: the column of the label.
    regression: whether labels are numbers to be met, and not classes.
    label_scale: what such numbers are divided by.
    too_long: of a row of more than `seq_length` tokens: `refuse`, as other bad rows, or `truncate`:
      tokens are taken from the end of the longer text of a pair until both fit.
    tokenizer, vocab_size, tokenizer_file: see `text.load_text`.
    seq_length: T, tokens of a row, its marks included.
    skip_bad: how many bad rows may be left out, of training and validation together.
    train_files, validation_files: paths or globs of .tsv, .csv or .jsonl files (`text_files`).
    validation_fraction: without validation_files, about which part of the rows is held out: by a
      digest of their texts, so that equal rows are in one part (`text_files`).
    data_dir, train_split, validation_split: of TFDS; `embedded` has the splits train, validation
      and test.
    expected: the `identity` of an earlier call, whose rows these must be: others are refused before
      anything is written.

  Raises:
    FileNotFoundError: files, data set or tokenizer are not on disk.
    ValueError: of one line: a column is missing, a file is empty, there are fewer than two classes,
      or there are more than `skip_bad` bad rows: empty ones, such as are not UTF-8, have other
      fields than the header or an unknown label, or are too long. It names the file and the line.
  """
  bad = documents.BadRecords(skip_bad)
  glue = glue_task(name)
  if glue is not None:
    if (text_key, second_text_key) != ("text", ""):
      raise ValueError(f"{name} has the texts {', '.join(glue.columns)}: leave data.text_key alone")
    columns, regression = glue.columns, not glue.classes
  else:
    columns = tuple(filter(None, (text_key, second_text_key)))
  if label_scale != 1 and not regression:
    raise ValueError(f"{label_scale=} is of numbers, and {name} has classes: set regression=True")
  table = _Table(columns, label_key, regression)
  splits = train_split, validation_split
  if name == "embedded":
    if regression or second_text_key:
      raise ValueError("the embedded lines are single, and of classes: name files of your own")
    train, validation = (embedded_lines(split) for split in splits)
    source = _Source(train, validation, tuple(sorted({row.label for row in train})), ("accuracy",))
  elif name == "text_files":
    fraction = validation_fraction
    rows = labelled_files(train_files, validation_files, table, bad, fraction=fraction)
    source = _Source(*rows, None, table.metrics)
  else:
    source = _tfds(name, splits, data_dir, table, glue, bad)
  return _encoded(
    source,
    table,
    workdir=workdir,
    name=name,
    label_scale=label_scale,
    too_long=too_long,
    tokenizer=(tokenizer, vocab_size, tokenizer_file),
    seq_length=seq_length,
    bad=bad,
    expected=expected,
  )


class _Table(NamedTuple):
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
    if isinstance(label, bool) or not isinstance(label, str | int | float):
      raise ValueError(f"{self.label_key} is {label!r:.40}, neither a name nor a number")
    if not self.regression:
      if not (label := str(label).strip()):
        raise ValueError(f"{self.label_key} is empty")
      return Row(texts, label, where)
    try:
      number = float(label)
    except ValueError:
      raise ValueError(f"{self.label_key} is {label!r:.40}, not a number") from None
    if not math.isfinite(number):
      raise ValueError(f"{self.label_key} is {number}")
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
  table: _Table,
  bad: documents.BadRecords,
  *,
  fraction: float,
) -> tuple[list[Row], list[Row]]:
  """Rows of both parts; see `load_sentences`."""
  train_paths = text_files.expand(train_files, "train_files")
  train = [row for path in train_paths for row in _read_file(path, table, bad)]
  if not validation_files:
    parts: tuple[list[Row], list[Row]] = [], []
    for row in train:
      parts[_share(row) < fraction].append(row)
    return parts
  paths = text_files.expand(validation_files, "validation_files")
  if shared := sorted(set(train_paths) & set(paths)):
    raise ValueError(f"train_files and validation_files must not share files: {shared}")
  return train, [row for path in paths for row in _read_file(path, table, bad)]


def _share(row: Row) -> float:
  """A number in [0, 1) that depends on the row's texts alone."""
  digest = documents.texts_digest(text.encode() for text in row.texts)
  return int(digest[:8], 16) / 2**32


def _read_file(path: str, table: _Table, bad: documents.BadRecords) -> Iterator[Row]:
  """The good rows of a file; the others are counted."""
  kind = pathlib.Path(path).suffix.lower()
  if kind not in _READERS:
    raise ValueError(f"{path} is not one of {', '.join(_READERS)}: rename it after what it is")
  with open(path, "rb") as f:
    content = f.read()
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
  lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
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
    if line.wrong or not line.text.strip():
      yield number, line.wrong or "the line is empty"
      continue
    try:
      values = json.loads(line.text)
    except (ValueError, RecursionError) as error:
      yield number, f"not JSON: {error}"
      continue
    if not isinstance(values, dict):
      yield number, f"{values!r:.40} is not a JSON object"
    elif missing := [name for name in wanted if name not in values]:
      yield number, f"it has no {missing[0]!r:.80}, only {', '.join(map(repr, values)):.200}"
    else:
      yield number, values


_READERS: Mapping[str, Callable[[str, list[_Line], Sequence[str]], _Numbered]] = {
  ".tsv": _tsv,
  ".csv": _csv,
  ".jsonl": _jsonl,
}


# ---------------------------------------------------------------------------------------------
# TFDS
# ---------------------------------------------------------------------------------------------


def _tfds(
  name: str,
  splits: Sequence[str],
  data_dir: str,
  table: _Table,
  glue: GlueTask | None,
  bad: documents.BadRecords,
) -> _Source:
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
    parts.append(list(_tfds_rows(examples, table, bad)))
  classes = examples.classes or None
  return _Source(*parts, classes, table.metrics if glue is None else glue.metrics)


def _tfds_rows(
  examples: tfds_text.Columns, table: _Table, bad: documents.BadRecords
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


# ---------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------


def _encoded(
  source: _Source,
  table: _Table,
  *,
  workdir: str | os.PathLike[str],
  name: str,
  label_scale: float,
  too_long: str,
  tokenizer: tuple[str, int, str],
  seq_length: int,
  bad: documents.BadRecords,
  expected: Mapping[str, Any] | None,
) -> SentenceData:
  """Rows as tokens and targets."""
  kind, vocab_size, tokenizer_file = tokenizer
  if kind not in text.TOKENIZERS:
    raise ValueError(f"tokenizer={kind!r} must be one of {sorted(text.TOKENIZERS)}")
  parts = {"train": source.train, "validation": source.validation}
  for part, rows in parts.items():
    if not rows:
      raise ValueError(f"{name} has no {part} rows")
  classes = () if table.regression else source.classes or _classes(source.train)
  identities = {part: _identity(rows, classes) for part, rows in parts.items()}
  for part, identity in identities.items():
    if expected is not None and expected.get(part) != identity:
      raise ValueError(
        f"the {part} rows are not those that this run was started with: bring them back, or use"
        " another workdir"
      )
  train_texts = documents.Documents(
    size=len(source.train),
    read=lambda index: "\n".join(source.train[index].texts),
    identity=identities["train"],
  )
  made = text.TOKENIZERS[kind](
    train_texts,
    pathlib.Path(workdir),
    vocab_size,
    tokenizer_file,
    None if expected is None else expected.get("tokenizer", {}),
    bad,
  )
  numbers = {label: number for number, label in enumerate(classes)}
  encoder = _Encoder(made, seq_length, too_long == "truncate", len(table.columns), bad)
  encoded = {}
  for part, rows in parts.items():
    known = rows if table.regression else list(_of_known_classes(rows, numbers, bad))
    kept, tokens = encoder(known)
    if not kept:
      raise ValueError(f"{name} has no {part} rows that are left")
    if table.regression:
      targets = np.array([row.label for row in kept]) / label_scale
      targets = targets.astype(np.float32)
    else:
      targets = np.array([numbers[row.label] for row in kept], np.int32)
    encoded[part] = EncodedRows(tokens, targets, seq_length)
  seen = {row.texts for row in source.train}
  return SentenceData(
    train=encoded["train"],
    validation=encoded["validation"],
    tokenizer=made,
    classes=classes,
    label_scale=label_scale,
    metrics=source.metrics,
    truncated=encoder.truncated,
    shared=sum(row.texts in seen for row in source.validation),
    bad_records=tuple(bad.found),
    identity={
      **identities,
      "tokenizer": dict(made.identity),
      "seq_length": seq_length,
      **({"left_out": len(bad.found)} if bad.found else {}),
    },
  )


def _classes(rows: Sequence[Row]) -> tuple[str, ...]:
  """The labels that occur, numbers by their size and names by their letters."""
  found = {row.label for row in rows}
  if len(found) < 2:
    raise ValueError(
      f"{rows[0].where}: all {len(rows):,} training rows have the label {rows[0].label!r:.80}: there"
      " is nothing to tell apart"
    )
  if all(re.fullmatch(r"-?\d{1,15}", label) for label in found):
    return tuple(sorted(found, key=int))
  return tuple(sorted(found))


def _identity(rows: Sequence[Row], classes: Sequence[str]) -> dict[str, Any]:
  hashed = hashlib.sha256()
  for row in rows:
    hashed.update(json.dumps([*row.texts, row.label]).encode() + b"\n")
  return {"rows": len(rows), "classes": list(classes), "sha256": hashed.hexdigest()}


def _of_known_classes(
  rows: Iterable[Row], numbers: Mapping[str, int], bad: documents.BadRecords
) -> Iterator[Row]:
  for row in rows:
    if row.label in numbers:
      yield row
    else:
      held = ", ".join(map(repr, numbers))
      bad.add(f"{row.where}: no training row has the label {row.label!r:.80}, only {held:.200}")


class _Encoder:
  """From texts to rows of tokens with their marks, none longer than the model's length.

  Attributes:
    truncated: how many were cut.
  """

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    seq_length: int,
    truncate: bool,
    texts: int,
    bad: documents.BadRecords,
  ):
    self._tokenizer, self._truncate, self._bad = tokenizer, truncate, bad
    # <s> and </s> of each text, but that of a second one begins with </s>.
    self._room, self._length, self.truncated = seq_length - 2 * texts, seq_length, 0
    if self._room < texts:
      raise ValueError(f"data.seq_length={seq_length} leaves no room for {texts} texts: set more")

  def __call__(self, rows: Sequence[Row]) -> tuple[list[Row], list[np.ndarray]]:
    """The rows that are kept, and their tokens."""
    columns = [self._tokenizer.encode_all(texts) for texts in zip(*(r.texts for r in rows))]
    kept, tokens = [], []
    for row, parts in zip(rows, zip(*columns), strict=True):
      if sum(map(len, parts)) > self._room:
        if not self._truncate:
          length = sum(map(len, parts)) + self._length - self._room
          self._bad.add(
            f"{row.where}: it has {length} tokens, more than data.seq_length={self._length}"
            " (data.too_long='truncate' cuts such rows)"
          )
          continue
        self.truncated += 1
        parts = _cut(parts, self._room)
      kept.append(row)
      tokens.append(self._marked(parts))
    return kept, tokens

  def _marked(self, parts: Sequence[np.ndarray]) -> np.ndarray:
    bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
    marks = [bos, *[eos] * (len(parts) - 1)]
    return np.concatenate(
      [np.array([mark, *part, eos], np.int32) for mark, part in zip(marks, parts, strict=True)]
    )


def _cut(parts: Sequence[np.ndarray], room: int) -> list[np.ndarray]:
  """Texts of at most `room` tokens together, the ends taken from the longer one first."""
  if len(parts) == 1:
    return [parts[0][:room]]
  first, second = parts
  second = second[: max(room // 2, room - len(first))]
  return [first[: room - len(second)], second]
