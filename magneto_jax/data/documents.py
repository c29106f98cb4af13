"""What every source of text returns: a random-access sequence of documents that can be named."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Documents(Sequence[str]):
  """A sequence of texts, read one at a time.

  Attributes:
    size: number of documents.
    read: index in [0, size) -> text of that document.
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


def texts_digest(texts: Iterable[bytes]) -> str:
  """SHA-256 over documents in order; the lengths keep two splits of one text apart."""
  hashed = hashlib.sha256()
  for text in texts:
    hashed.update(len(text).to_bytes(8, "little"))
    hashed.update(text)
  return hashed.hexdigest()
