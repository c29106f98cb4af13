"""The sources of text by name: `SOURCES`, and every TFDS data set that is already on disk."""

import csv
import dataclasses
import lzma
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from magneto_jax.data import documents, text_files, tfds_text

Parts = tuple[documents.Documents, documents.Documents]


@dataclasses.dataclass(frozen=True)
class SourceOptions:
  """What `load_documents` takes beside the name; a source reads the fields it needs.

  Attributes:
    train_files: paths or globs of UTF-8 text (`text_files`).
    validation_files: the same; empty holds out a part of `train_files` (`text_files`).
    test_files: the same, of the split `test` (`text_files`).
    document_separator: between documents of one file; empty: one document a file (`text_files`).
    validation_fraction: the part held out of each file, in (0, 1) (`text_files`).
    data_dir: where TFDS keeps its data; empty means its default (TFDS).
    train_split: split to train on (`embedded`, TFDS).
    validation_split: split to validate on.
    text_key: the feature that holds the text (TFDS).
  """

  train_files: tuple[str, ...] = ()
  validation_files: tuple[str, ...] = ()
  test_files: tuple[str, ...] = ()
  document_separator: str = ""
  validation_fraction: float = 0.1
  data_dir: str = ""
  train_split: str = "train"
  validation_split: str = "validation"
  text_key: str = "text"


def load_documents(name: str, *, apart: bool = True, **options: Any) -> Parts:
  """Returns the training and the validation documents of a source of text.

  Nothing is ever downloaded: a data set that is not on disk is an error that says how to prepare
  it.

  Args:
    name: a name in `SOURCES` (`embedded`, `text_files`), or a TFDS data set such as `lm1b`,
      `c4/en` or `wikipedia/20230601.en`.
    apart: whether both parts must differ.
    **options: the fields of `SourceOptions`.

  Returns:
    Training and validation documents.

  Raises:
    FileNotFoundError: the files or the data set are not on disk.
    ValueError: the name is unknown, the text unusable, or both parts hold the same text.

  Example:
    >>> train, validation = load_documents("embedded")
    >>> len(train), validation[0][:11]
    (8, 'THE TEMPEST')
  """
  record = SourceOptions(**options)
  source = SOURCES.get(name)
  train, validation = source(record) if source else _tfds(name, record)
  for part, which in ((train, "train"), (validation, "validation")):
    if not part:
      raise ValueError(f"{name} has no {which} documents: {dict(part.identity)}")
  digests = [part.identity.get("sha256", part.identity) for part in (train, validation)]
  if apart and digests[0] == digests[1]:
    raise ValueError(f"{name}: training and validation text are the same: {dict(train.identity)}")
  return train, validation


def embedded(split: str) -> documents.Documents:
  """One split of the ten plays of Shakespeare that come with the package; a document a play."""
  folder = resources.files("magneto_jax.data") / "embedded" / "text"
  rows = (folder / "plays.tsv").read_text(encoding="utf-8").splitlines()
  plays = list(csv.DictReader(rows, delimiter="\t"))
  if split not in (splits := sorted({play["split"] for play in plays})):
    raise ValueError(f"the embedded text has no split {split!r}; it has {splits}")
  whole = lzma.decompress((folder / "shakespeare.txt.xz").read_bytes()).decode()
  texts = [
    whole[int(play["start"]) : int(play["start"]) + int(play["length"])]
    for play in plays
    if play["split"] == split
  ]
  return documents.Documents(
    size=len(texts),
    read=texts.__getitem__,
    identity={
      "source": "embedded",
      "split": split,
      "documents": len(texts),
      "sha256": documents.texts_digest(text.encode() for text in texts),
    },
  )


def _embedded(options: SourceOptions) -> Parts:
  return embedded(options.train_split), embedded(options.validation_split)


def _text_files(options: SourceOptions) -> Parts:
  return text_files.text_files(
    train_files=options.train_files,
    validation_files=options.validation_files,
    test_files=options.test_files,
    document_separator=options.document_separator,
    validation_fraction=options.validation_fraction,
    validation_split=options.validation_split,
  )


def _tfds(name: str, options: SourceOptions) -> Parts:
  train, validation = (
    tfds_text.tfds_text(name, split=split, text_key=options.text_key, data_dir=options.data_dir)
    for split in (options.train_split, options.validation_split)
  )
  return train, validation


SOURCES: Mapping[str, Callable[[SourceOptions], Parts]] = {
  "embedded": _embedded,
  "text_files": _text_files,
}
