"""What every source of text returns: a random-access sequence of documents that can be named."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging


class BadRecord(ValueError):
  """A document that cannot be read; its text names the file, the index in it, and what is wrong.

  The index counts records from 0, or a file's lines from 1; None: the file is the record.
  """

  def __init__(self, file: str, index: int | None, reason: str, *, unit: str = "record"):
    super().__init__(file, index, reason)  # Of these it is made again, where a worker raised it.
    self.unit = unit

  def __str__(self) -> str:
    file, index, reason = self.args
    what = file if index is None else f"{file}: {self.unit} {index}"
    return f"{what} cannot be read ({reason})"


@dataclasses.dataclass(frozen=True)
class Documents(Sequence[str]):
  """A sequence of texts, read one at a time.

  Attributes:
    size: number of documents.
    read: index in [0, size) -> text of that document; BadRecord if it is damaged.
    identity: JSON-able values that name the content exactly: two sequences with equal
      identities hold the same texts in the same order. Caches are keyed by it, and a resumed
      run compares it with the one it was started with.
  """

  size: int
  read: Callable[[int], str]
  identity: Mapping[str, Any]

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> str:
    if not 0 <= index < self.size:
      raise IndexError(f"document {index} of {self.size}")
    return self.read(index)


class BadRecords:
  """The bad records of a run, which are left out of its data: a few, or none.

  What is left out is decided by the documents alone, and so the same on every host and after a
  resume. A record that is met twice (by the tokenizer's training, then by the tokens') counts once.

  Attributes:
    most: how many are left out before one ends the run.
    found: their errors' texts, in the order in which they were met, as the keys of a dict; with
      those that were known from the start.
  """

  def __init__(self, most: int = 0, known: Iterable[str] = ()):
    self.most = most
    self.found: dict[str, None] = dict.fromkeys(known)

  def add(self, record: str) -> None:
    """Counts and logs a bad record; raises ValueError if it is one too many."""
    if record in self.found:
      return
    if len(self.found) >= self.most:
      others = f"; {len(self.found)} others were left out" if self.found else ""
      raise ValueError(
        f"{record}{others}: repair it, or set data.skip_bad to how many may be left out"
      )
    self.found[record] = None
    logging.warning("left out, %d of at most %d: %s", len(self.found), self.most, record)

  def readable(
    self,
    texts: Sequence[str],
    indices: Iterable[int] | None = None,
    left_out: dict[int, str] | None = None,
  ) -> Iterator[str]:
    """The documents that can be read.

    Args:
      texts: documents.
      indices: which of them; None: all.
      left_out: is filled with the others: their errors' texts by index.
    """
    for index in range(len(texts)) if indices is None else indices:
      try:
        text = texts[index]
      except BadRecord as error:
        self.add(str(error))
        if left_out is not None:
          left_out[index] = str(error)
        continue
      yield text


def texts_digest(texts: Iterable[bytes]) -> str:
  """SHA-256 over documents in order; the lengths keep two splits of one text apart."""
  hashed = hashlib.sha256()
  for text in texts:
    hashed.update(len(text).to_bytes(8, "little"))
    hashed.update(text)
  return hashed.hexdigest()
