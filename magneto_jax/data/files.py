"""Digests and crash-safe writes, shared by all that is kept in files."""

import contextlib
import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any


def digest(value: Any) -> str:
  """Returns the SHA-256, in hex, of a JSON-able value; the order of keys does not matter."""
  text = json.dumps(value, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()


def sync(path: str | os.PathLike[str]) -> None:
  """Makes a file's bytes durable, or the names inside a directory: neither covers the other."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


@contextlib.contextmanager
def durable_path(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Where to write a file instead, so that after a crash `path` is there in full or not at all.

  Args:
    path: what the written file becomes at the end of the block; missing parent directories are
      made, an old file is replaced. If the block raises, nothing has changed.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # A name of its own, because several hosts may write the same file at the same time.
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
  try:
    yield temporary
    sync(temporary)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  sync(path.parent)


def write_durably(path: str | os.PathLike[str], content: bytes) -> None:
  """Writes all of a file's bytes to `durable_path(path)`."""
  with durable_path(path) as temporary:
    temporary.write_bytes(content)
