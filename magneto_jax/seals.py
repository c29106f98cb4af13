"""The seal of a checkpoint: what it holds, written last, so that damage is seen when it is read.

<folder>/sealed.json names the step, the digest of every array, and every file of the parts with its
size and, unless it is large, its SHA-256; large ones hold arrays alone, whose digests tell. What
has no seal was never finished.
"""

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
    values = json.loads((folder / NAME).read_bytes())
    is_whole = values.pop("seal") == files.digest(values) and values["step"] == step
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    is_whole = False
  except FileNotFoundError:
    raise Damaged(f"{NAME} is missing") from None
  if not is_whole:
    raise Damaged(f"{NAME} is not what was written")
  if values["format"] > FORMAT:
    raise OSError(f"{folder} was written by a newer magneto_jax: update this one to read it")
  return values


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
    if found["bytes"] != held["bytes"]:
      raise Damaged(f"{name} has {found['bytes']:,} bytes, not {held['bytes']:,}")
    if found != held:
      raise Damaged(f"{name} is not what was written")


def _part(name: str) -> str:
  return name.split("/")[0]


def _described(path: pathlib.Path) -> dict[str, Any]:
  size = path.stat().st_size
  if size > _HASHED:
    return {"bytes": size}
  return {"bytes": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
