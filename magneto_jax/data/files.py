"""Digests and crash-safe writes, shared by all that is kept in files."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import stat
import uuid
from collections.abc import Callable, Iterator
from typing import Any

_MOST_JSON = 64 * 2**20
# What a path is wrong by; by other errors of a look at it the machine is.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def digest(value: Any) -> str:
  """Returns the SHA-256, in hex, of a JSON-able value; the order of keys does not matter."""
  text = json.dumps(value, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()


def size(path: str | os.PathLike[str]) -> int:
  """Bytes of a regular file, links followed.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is something else: a folder, a pipe, a device.
    OSError: the machine cannot tell.
  """
  try:
    found = os.stat(path)
  except OSError as error:
    if error.errno not in _NO_FILE:
      raise
    raise FileNotFoundError(f"{path}: there is no such file") from None
  if not stat.S_ISREG(found.st_mode):
    raise ValueError(f"{path}: it is not a regular file")
  return found.st_size


def read_json(
  path: str | os.PathLike[str], *, object_pairs_hook: Callable[[list], Any] | None = None
) -> Any:
  """What a JSON file holds, which may be a stranger's: it is read as data, and never for long.

  Raises:
    FileNotFoundError: there is nothing.
    ValueError: it is no regular file, of more than 64 MiB, or not JSON; its text names the file.
  """
  path = pathlib.Path(path)
  try:
    size = path.stat().st_size
    if not path.is_file():  # A pipe or a device would be read for ever.
      raise ValueError("it is not a regular file")
    if size > _MOST_JSON:
      raise ValueError(f"it has {size:,} bytes, more than {_MOST_JSON:,}")
    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=object_pairs_hook)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} cannot be read: {error}") from error


def refuse_links_out(folder: str | os.PathLike[str]) -> None:
  """Raises ValueError if a link below the folder leads out of it.

  What is written into a stranger's folder must not end up in a file elsewhere, nor what lies
  elsewhere be read as if it were the stranger's.
  """
  root = os.path.realpath(folder)
  for where, folders, names in os.walk(root):
    for name in folders + names:
      path = os.path.join(where, name)
      if os.path.islink(path) and not os.path.realpath(path).startswith(root + os.sep):
        raise ValueError(f"{path} is a link that leads out of {folder}: copy what it means there")


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


def two_columns(line: bytes, expected: str) -> tuple[str, str]:
  """What stands before and behind a line's tab; ValueError with what is wrong with it.

  Args:
    line: without its end.
    expected: what its columns are, in words.
  """
  if not line:
    raise ValueError("it is empty")
  try:
    columns = line.decode().split("\t")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"not UTF-8: its byte {error.start} is {line[error.start]:#04x}; convert the file, for"
      " example with iconv -f latin1 -t utf-8"
    ) from None
  if len(columns) != 2:
    count = "one column" if len(columns) == 1 else f"{len(columns)} columns"
    raise ValueError(f"it has {count}, not {expected}")
  return columns[0], columns[1]
