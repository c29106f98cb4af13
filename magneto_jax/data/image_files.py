"""Images in files: how their bytes become pixels, and a folder of one's own that holds them."""

import concurrent.futures
import contextlib
import hashlib
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from PIL import Image, ImageOps

from magneto_jax.data import documents, files

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
ENDINGS_IN_WORDS = ", ".join(_ENDINGS)
_PARTS = ("train", "validation", "test")
# What a folder of a data set's parts holds, not of its classes.
_NAMES_OF_PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}
# Of a file: what is larger would be read whole before it is known for what it is.
_MOST_BYTES = 2**28


class File(NamedTuple):
  """An image's file.

  Attributes:
    path: absolute.
    name: its path in the folder, with `/`.
    label: the name of its class; empty where there are none.
    digest: SHA-256 of its bytes.
  """

  path: str
  name: str
  label: str
  digest: str


# ---------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------


def decode(content: bytes) -> np.ndarray:
  """The pixels of a JPEG, PNG, WebP, BMP or GIF file, uint8 [H, W, 3]: red, green, blue.

  Of several frames the first. The image is turned as its EXIF data say; grey values, palettes and
  CMYK become colours; what is transparent lies on white; of 16 bits the upper eight are kept,
  rounded in grey images.

  Raises:
    ValueError: the bytes are no such image, are cut short, or are of more pixels than Pillow takes
      for safe (`PIL.Image.MAX_IMAGE_PIXELS`); its text has one line.
  """
  with _opened(content) as image:
    return _rgb(ImageOps.exif_transpose(image))


def verify(content: bytes) -> None:
  """Raises ValueError where `decode` would; of a JPEG in a fraction of its time."""
  with _opened(content) as image:
    image.draft(None, (1, 1))  # A JPEG's bytes are all read, and its pixels computed 8 x 8 smaller.
    ImageOps.exif_transpose(image).load()


@contextlib.contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
  """A Pillow image of bytes; whatever goes wrong with it is a ValueError of one line."""
  try:
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
      most = Image.MAX_IMAGE_PIXELS  # Above it Pillow itself warns, and raises above twice that.
      if most and image.width * image.height > most:
        raise Image.DecompressionBombError(f"{image.width:,} x {image.height:,} pixels")
      yield image
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    size, most = str(error).partition(" exceeds")[0], Image.MAX_IMAGE_PIXELS
    raise ValueError(f"{size}: more than {most:,} pixels, make it smaller") from error
  except Image.UnidentifiedImageError as error:
    raise ValueError(f"it is no {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} image") from error
  except MemoryError:
    raise
  except Exception as error:  # Pillow's plugins have no common one, and there is no disk here.
    raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split()):.120}") from error


def _rgb(image: Image.Image) -> np.ndarray:
  if image.mode.startswith("I"):  # Grey values of 16 bits, which Pillow would cut off at 255.
    grey = (np.asarray(image).astype(np.int64) + 128) // 257
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)
  if image.has_transparency_data:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  return np.asarray(image.convert("RGB"))


def read(path: str) -> np.ndarray:
  """The pixels of a file, as `decode` has them; BadRecord, with its name, if it has none."""
  with open(path, "rb") as f:
    content = f.read()
  try:
    return decode(content)
  except ValueError as error:
    raise documents.BadRecord(path, None, str(error)) from error


# ---------------------------------------------------------------------------------------------
# A folder of one's own
# ---------------------------------------------------------------------------------------------


class Folders(NamedTuple):
  """What the folders hold: the classes in order, and the files of both parts in order of names."""

  classes: tuple[str, ...]
  train: list[File]
  validation: list[File]


def find(
  train_files: Sequence[str],
  validation_files: Sequence[str],
  test_files: Sequence[str],
  bad: documents.BadRecords,
  *,
  labelled: bool,
  fraction: float,
  split: str,
) -> Folders:
  """The images of folders: `class_name/file.jpg`, or at any depth below `class_name`.

  Every file is read and checked (`verify`) by threads, so that what is bad is found before the run
  starts. Endings are those of the formats of `decode`, in small or large letters. Hidden files and
  folders (whose names begin with a dot) are no part of the folder; links to files are followed.

  Args:
    train_files, validation_files, test_files: one folder each, or none; the last is the split
      `test`.
    bad: counts what is left out: files that are no images, or broken.
    labelled: whether folders are classes. If not, images may lie anywhere, and are of one class
      without a name.
    fraction: without validation_files, the share of each class's images that is held out: those
      whose digests are the smallest, one at least, where the class has two. Equal files are in one
      part.
    split: what is evaluated on: `train`, `validation` or `test`.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: of one line: a folder is none, is named twice, or has no images or no classes, a
      class has no images, there is one class only, or validation images are of other classes.
  """
  if split not in _PARTS:
    raise ValueError(f"image folders have no split {split!r}, only {', '.join(_PARTS)}")
  given = {"train": train_files}
  if validation_files:
    given["validation"] = validation_files
  if split == "test":
    given["test"] = test_files
  folders = {part: _folder(names, f"{part}_files") for part, names in given.items()}
  for part, other in itertools.combinations(folders, 2):
    if os.path.commonpath((folders[part], folders[other])) in (folders[part], folders[other]):
      raise ValueError(
        f"{part}_files and {other}_files must not be the same folder, nor one in the other:"
        f" {folders[part]} and {folders[other]}"
      )
  held = {
    part: _files(folder, labelled, bad)
    for part, folder in folders.items()
    if part in ("train", split)
  }
  if "validation" not in folders:
    held["train"], held["validation"] = _held_out(held["train"], fraction)
    if split == "validation" and not held["validation"]:
      raise ValueError(
        f"{folders['train']} has no class of two different images, of which one could be held out:"
        " name validation_files"
      )
  classes = sorted({file.label for file in held["train"]})
  if labelled and len(classes) < 2:
    raise ValueError(
      f"{folders['train']} has the class {classes[0]!r} only: there is nothing to tell apart"
    )
  for file in held[split]:
    if file.label not in classes:
      raise ValueError(
        f"{file.path}: no training image is of the class {file.label!r}, only of"
        f" {', '.join(map(repr, classes)):.200}"
      )
  return Folders(tuple(classes), held["train"], held[split])


def _folder(names: Sequence[str], argument: str) -> str:
  if isinstance(names, str):
    raise TypeError(f"{argument} must be a sequence of paths, got the string {names!r}")
  if len(names) != 1:
    raise ValueError(f"{argument} must be one folder of images, not {len(names)}")
  folder = os.path.realpath(os.path.expanduser(names[0]))
  if not os.path.exists(folder):
    raise FileNotFoundError(f"{argument}: there is no folder {names[0]!r} (in {os.getcwd()})")
  if not os.path.isdir(folder):
    raise ValueError(f"{argument}: {names[0]!r} is a file: name the folder that holds the images")
  return folder


def _files(folder: str, labelled: bool, bad: documents.BadRecords) -> list[File]:
  """The good images of a folder; the others are counted."""
  names = sorted(_names(folder, ""))
  if labelled:
    if loose := [name for name in names if "/" not in name and _is_image(name)]:
      raise ValueError(
        f"{os.path.join(folder, loose[0])} is in no folder of a class: name the folder that holds"
        " a folder for each class"
      )
    names = [name for name in names if "/" in name]
    classes = sorted(name for name in _visible(folder) if os.path.isdir(os.path.join(folder, name)))
    if len(classes) > 1 and _NAMES_OF_PARTS >= {name.lower() for name in classes}:
      raise ValueError(
        f"{folder} holds {', '.join(classes)}, which are parts and no classes: name these folders,"
        " train_files the first, and validation_files another"
      )
    if not classes:
      raise ValueError(f"{folder} has no folders of classes: put the images of each into one")
  logging.info("reading and checking %d files of %s", len(names), folder)
  files = []
  for name, (digest, wrong) in zip(names, _checks(folder, names), strict=True):
    path = os.path.join(folder, name)
    if wrong:
      bad.add(str(documents.BadRecord(path, None, wrong)))
    else:
      files.append(File(path, name, name.split("/")[0] if labelled else "", digest))
  if labelled:
    for label in classes:
      if label not in {file.label for file in files}:
        raise ValueError(f"{os.path.join(folder, label)} has no images: fill it or remove it")
  if not files:
    raise ValueError(f"{folder} has no images ({ENDINGS_IN_WORDS})")
  return files


def _visible(folder: str) -> list[str]:
  return [name for name in os.listdir(folder) if not name.startswith(".")]


def names(folder: str) -> list[str]:
  """Paths below a folder, at any depth and with `/`, of all files that end as an image's do.

  In their order. Hidden ones are none; see `find`.
  """
  return sorted(name for name in _names(folder, "") if _is_image(name))


def _is_image(name: str) -> bool:
  return name.lower().endswith(_ENDINGS)


def _names(folder: str, prefix: str) -> Iterator[str]:
  """Paths of all that is no folder. Links to folders are followed at the top alone: no circle."""
  for name in _visible(folder):
    path = os.path.join(folder, name)
    if os.path.isdir(path) and (not prefix or not os.path.islink(path)):
      yield from _names(path, f"{prefix}{name}/")
    else:
      yield prefix + name


def _checks(folder: str, names: Sequence[str]) -> Iterator[tuple[str, str | None]]:
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    for begin in range(0, len(names), 1024):  # Not all at once: there may be millions.
      yield from threads.map(lambda name: _check(folder, name), names[begin : begin + 1024])


def _check(folder: str, name: str) -> tuple[str, str | None]:
  """The digest of a file, and what is wrong with it."""
  if not _is_image(name):
    return "", f"its name does not end in {ENDINGS_IN_WORDS}"
  return check(os.path.join(folder, name))


def check(path: str) -> tuple[str, str | None]:
  """The SHA-256 of an image file's bytes, and what is wrong with it: None if `read` can read it.

  Raises:
    OSError: the machine cannot read it, which says nothing of the file.
  """
  try:
    size = files.size(path)
  except (FileNotFoundError, ValueError):
    return "", "it is missing, a link to nothing, or no regular file"
  try:
    if size > _MOST_BYTES:
      raise ValueError(f"it has {size:,} bytes, more than the {_MOST_BYTES:,} of an image")
    with open(path, "rb") as f:
      content = f.read()
    verify(content)
  except ValueError as error:
    return "", str(error)
  return hashlib.sha256(content).hexdigest(), None


def _held_out(files: Sequence[File], fraction: float) -> tuple[list[File], list[File]]:
  """Training and validation files, of every class."""
  digests: dict[str, set[str]] = {}
  for file in files:
    digests.setdefault(file.label, set()).add(file.digest)
  out = {
    label: set(sorted(found)[: min(len(found) - 1, max(1, round(fraction * len(found))))])
    for label, found in digests.items()
  }
  parts: tuple[list[File], list[File]] = [], []
  for file in files:
    parts[file.digest in out[file.label]].append(file)
  return parts
