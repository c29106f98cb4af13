"""The seal of a checkpoint: what it holds, written last, so that damage is seen when it is read.

<folder>/sealed.json names the step, the digest of every array, and every file of the parts with its
size and, unless it is large, its SHA-256; large ones hold arrays alone, whose digests tell. What
has no seal was never finished.
"""

import errno
import hashlib
import json
import os
import pathlib
from collections.abc import Collection
from typing import Any

from magneto_jax.data import files

NAME = "sealed.json"
FORMAT = 1

# Larger files are not read a second time.
_HASHED = 2**20


class Damaged(Exception):
  """What is wrong with a checkpoint; its text begins with the file or the array."""


def write(folder: pathlib.Path, step: int, arrays: dict[str, dict[str, str]]) -> None:
  """Makes all of a folder durable, then seals it.

  Args:
    folder: of the checkpoint, with a folder for each part.
    step: of the checkpoint.
    arrays: {part: {path: digest}} of the parts that hold arrays.
  """
  listed = {}
  for where, _, names in os.walk(folder, topdown=False):
    for name in sorted(names):
      path = pathlib.Path(where, name)
      files.sync(path)
      relative = path.relative_to(folder)
      if len(relative.parts) > 1:  # What lies beside the parts, Orbax writes and nobody reads.
        listed[relative.as_posix()] = _described(path)
    files.sync(where)
  values = {"format": FORMAT, "step": step, "arrays": arrays, "files": listed}
  text = json.dumps({**values, "seal": files.digest(values)}, indent=1)
  files.write_durably(folder / NAME, text.encode())


def read(folder: pathlib.Path, step: int) -> dict[str, Any]:
  """What `write` has written; Damaged if it is not that."""
  try:
    values = files.read_json(folder / NAME)
    is_whole = values.pop("seal") == files.digest(values) and values["step"] == step
  except FileNotFoundError:
    raise Damaged(f"{NAME} is missing") from None
  except PermissionError:
    raise
  except OSError as error:
    raise Damaged(f"{NAME} cannot be read ({error.strerror})") from None
  except (ValueError, KeyError, TypeError, AttributeError):
    is_whole = False
  if not is_whole or not _is_seal(values):
    raise Damaged(f"{NAME} is not what was written")
  if values["format"] > FORMAT:
    raise OSError(f"{folder} was written by a newer magneto_jax: update this one to read it")
  return values


def _is_seal(values: dict[str, Any]) -> bool:
  """Whether values, which anyone can seal, are of the types of a seal, and name files inside."""

  def is_inside(name: str) -> bool:
    path = pathlib.PurePosixPath(name)
    return len(path.parts) > 1 and not path.is_absolute() and ".." not in path.parts

  def is_described(held: Any) -> bool:
    if not isinstance(held, dict) or not isinstance(held.get("bytes"), int):
      return False
    return held.keys() <= {"bytes", "sha256"} and isinstance(held.get("sha256", ""), str)

  arrays, listed = values.get("arrays"), values.get("files")
  return (
    isinstance(values.get("format"), int)
    and isinstance(arrays, dict)
    and isinstance(listed, dict)
    and all(isinstance(part, dict) for part in arrays.values())
    and all(isinstance(text, str) for part in arrays.values() for text in part.values())
    and all(is_inside(name) and is_described(held) for name, held in listed.items())
  )


def parts(seal: dict[str, Any]) -> set[str]:
  """The names of the parts that were sealed."""
  return {_part(name) for name in seal["files"]}


def check_files(folder: pathlib.Path, seal: dict[str, Any], parts: Collection[str]) -> None:
  """Raises Damaged unless the files of these parts are those that were sealed."""
  for name, held in seal["files"].items():
    if _part(name) not in parts:
      continue
    try:
      found = _described(folder / name)
    except FileNotFoundError:
      raise Damaged(f"{name} is missing") from None
    except PermissionError:
      raise
    except OSError as error:  # A sector of the disk, perhaps.
      raise Damaged(f"{name} cannot be read ({error.strerror})") from None
    if found["bytes"] != held["bytes"]:
      raise Damaged(f"{name} has {found['bytes']:,} bytes, not {held['bytes']:,}")
    if found != held:
      raise Damaged(f"{name} is not what was written")


def _part(name: str) -> str:
  return name.split("/")[0]


def _described(path: pathlib.Path) -> dict[str, Any]:
  if path.exists() and not path.is_file():  # A pipe or a device would be read for ever.
    raise OSError(errno.EINVAL, "it is not a regular file")
  size = path.stat().st_size
  if size > _HASHED:
    return {"bytes": size}
  return {"bytes": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
