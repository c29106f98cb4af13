"""Labelled texts, or pairs of texts, as rows of tokens for a model that classifies them.

A row is `<s> a </s>`, of a pair `<s> a </s></s> b </s>`, padded to the model's length: RoBERTa's
input (arXiv 1907.11692), in which nothing else says where a text ends.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from magneto_jax.data import documents, labelled, text, tokenizers


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
    truncated: how many of the training and of the validation rows were too long, and are cut.
    shared: how many validation samples are, text by text, in the training set too.
    bad_records: the rows that were left out: file, line, and what is wrong.
    identity: JSON-able values that name all of this exactly.
    augment, mix: nothing: a row is read as it is.
  """

  train: EncodedRows
  validation: EncodedRows
  tokenizer: tokenizers.Tokenizer
  classes: tuple[str, ...]
  label_scale: float
  metrics: tuple[str, ...]
  truncated: tuple[int, int]
  shared: int
  bad_records: tuple[str, ...]
  identity: Mapping[str, Any]
  augment: None = None
  mix: None = None

  def describe(self) -> str:
    """Samples, classes, padding, and what a person may not expect of them."""
    length, rows = self.train.seq_length, len(self.train)
    padding = 1 - len(self.train.tokens) / (rows * length)
    kinds = f"{len(self.classes)} classes" if self.classes else "numbers"
    words = (
      f"{rows:,} training and {len(self.validation):,} validation samples of {length} tokens"
      f" ({padding:.0%} padding), {kinds}, {self.tokenizer.vocab_size:,} in the vocabulary"
    )
    if any(self.truncated):
      words += f"; {sum(self.truncated):,} were longer, and are cut"
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
  test_files: Sequence[str] = (),
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
    train_files, validation_files, test_files: paths or globs of .tsv, .csv or .jsonl files
      (`text_files`), of which the last are the split `test`.
    validation_fraction: without validation_files, about which part of the rows is held out: by a
      digest of their texts, so that equal rows are in one part (`text_files`).
    data_dir, train_split, validation_split: of TFDS; `embedded` and `text_files` have the splits
      train, validation and test.
    expected: the `identity` of an earlier call, whose rows these must be: others are refused before
      anything is written.

  Raises:
    FileNotFoundError: files, data set or tokenizer are not on disk.
    ValueError: of one line: a column is missing, a file is empty, there are fewer than two classes,
      or there are more than `skip_bad` bad rows: empty ones, such as are not UTF-8, have other
      fields than the header or an unknown label, or are too long. It names the file and the line.
  """
  if too_long not in ("refuse", "truncate"):
    raise ValueError(f"{too_long=} must be refuse or truncate")
  bad = documents.BadRecords(skip_bad)
  glue = labelled.glue_task(name)
  if glue is not None:
    if (text_key, second_text_key) != ("text", ""):
      raise ValueError(f"{name} has the texts {', '.join(glue.columns)}: leave data.text_key alone")
    columns, regression = glue.columns, not glue.classes
  else:
    columns = tuple(filter(None, (text_key, second_text_key)))
  if label_scale != 1 and not regression:
    raise ValueError(f"{label_scale=} is of numbers, and {name} has classes: set regression=True")
  table = labelled.Table(columns, label_key, regression)
  splits = train_split, validation_split
  if name == "embedded":
    if regression or second_text_key:
      raise ValueError("the embedded lines are single, and of classes: name files of your own")
    train, validation = (labelled.embedded_lines(split) for split in splits)
    source = labelled.Source(
      train, validation, tuple(sorted({row.label for row in train})), ("accuracy",)
    )
  elif name == "text_files":
    parts = labelled.labelled_files(
      train_files,
      validation_files,
      table,
      bad,
      fraction=validation_fraction,
      test_files=test_files,
      split=validation_split,
    )
    source = labelled.Source(*parts, None, table.metrics)
  else:
    source = labelled.tfds_rows(name, splits, data_dir, table, glue, bad)
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


def _encoded(
  source: labelled.Source,
  table: labelled.Table,
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
  if part := text.changed_part(identities, expected):
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
  encoded, truncated = {}, []
  for part, rows in parts.items():
    known = rows if table.regression else list(_of_known_classes(rows, numbers, bad))
    kept, tokens, cut_rows = encoder(known)
    truncated.append(cut_rows)
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
    truncated=tuple(truncated),
    shared=sum(row.texts in seen for row in source.validation),
    bad_records=tuple(bad.found),
    identity={
      **identities,
      "tokenizer": dict(made.identity),
      "seq_length": seq_length,
      **({"left_out": len(bad.found)} if bad.found else {}),
    },
  )


def _classes(rows: Sequence[labelled.Row]) -> tuple[str, ...]:
  """The labels that occur, numbers by their size and names by their letters."""
  found = {row.label for row in rows}
  if len(found) < 2:
    raise ValueError(
      f"{rows[0].where}: all {len(rows):,} training rows have the label {rows[0].label!r:.80}:"
      " there is nothing to tell apart"
    )
  if all(re.fullmatch(r"-?\d{1,15}", label) for label in found):
    return tuple(sorted(found, key=int))
  return tuple(sorted(found))


def _identity(rows: Sequence[labelled.Row], classes: Sequence[str]) -> dict[str, Any]:
  hashed = hashlib.sha256()
  for row in rows:
    hashed.update(json.dumps([*row.texts, row.label]).encode() + b"\n")
  return {"rows": len(rows), "classes": list(classes), "sha256": hashed.hexdigest()}


def _of_known_classes(
  rows: Iterable[labelled.Row], numbers: Mapping[str, int], bad: documents.BadRecords
) -> Iterator[labelled.Row]:
  for row in rows:
    if row.label in numbers:
      yield row
    else:
      held = ", ".join(map(repr, numbers))
      bad.add(f"{row.where}: no training row has the label {row.label!r:.80}, only {held:.200}")


class _Encoder:
  """From texts to rows of tokens with their marks, none longer than the model's length."""

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
    self._room, self._length, self._texts = seq_length - 2 * texts, seq_length, texts
    if self._room < texts:
      raise ValueError(f"data.seq_length={seq_length} leaves no room for {texts} texts: set more")

  def __call__(
    self, rows: Sequence[labelled.Row]
  ) -> tuple[list[labelled.Row], list[np.ndarray], int]:
    """The rows that are kept, their tokens, and how many of them were cut."""
    every = self._tokenizer.encode_all([text for row in rows for text in row.texts])
    kept, tokens, truncated, each = [], [], 0, self._texts
    for number, row in enumerate(rows):
      parts = every[number * each : (number + 1) * each]
      if sum(map(len, parts)) > self._room:
        if not self._truncate:
          length = sum(map(len, parts)) + self._length - self._room
          self._bad.add(
            f"{row.where}: it has {length} tokens, more than data.seq_length={self._length}"
            " (data.too_long='truncate' cuts such rows)"
          )
          continue
        truncated += 1
        parts = cut(parts, self._room)
      kept.append(row)
      tokens.append(self._marked(parts))
    return kept, tokens, truncated

  def _marked(self, parts: Sequence[np.ndarray]) -> np.ndarray:
    bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
    marks = [bos, *[eos] * (len(parts) - 1)]
    return np.concatenate(
      [np.array([mark, *part, eos], np.int32) for mark, part in zip(marks, parts, strict=True)]
    )


def cut(parts: Sequence[np.ndarray], room: int) -> list[np.ndarray]:
  """Texts of at most `room` tokens together, the ends taken from the longer one first."""
  if len(parts) == 1:
    return [parts[0][:room]]
  first, second = parts
  second = second[: max(room // 2, room - len(first))]
  return [first[: room - len(second)], second]
