"""Digests and crash-safe writes, shared by the tokenizer files and the token caches."""

import hashlib
import json
import os
import pathlib
import uuid
from typing import Any


def digest(value: Any) -> str:
  """Returns the SHA-256, in hex, of a JSON-able value; the order of keys does not matter."""
  text = json.dumps(value, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()


def sync_directory(path: str | os.PathLike[str]) -> None:
  """Makes the names inside a directory durable; a file's own fsync does not cover its name."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def write_durably(path: str | os.PathLike[str], content: bytes) -> None:
  """Writes a file so that after a crash it is there in full or not at all.

  Args:
    path: where to write; missing parent directories are made, an old file is replaced.
    content: all of the file's bytes.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # A name of its own, because several hosts may write the same file at the same time.
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
  try:
    with open(temporary, "xb") as f:
      f.write(content)
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  sync_directory(path.parent)
