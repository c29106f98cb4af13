"""The sources of images with texts by name: embedded emoji, JSONL of one's own, prepared TFDS sets.

An image may have several texts. Images are known by their bytes: lines of a file that name equal
images are of one image.
"""

import collections
import concurrent.futures
import csv
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from magneto_jax.data import documents, image_files, images, text_files, tfds_text
from magneto_jax.data.text import plain

# By the name of the embedded emoji with texts: the languages of these.
EMOJI_LANGUAGES: Mapping[str, tuple[str, ...]] = {
  "embedded/emoji/en": ("en",),
  "embedded/emoji/de": ("de",),
  "embedded/emoji/en+de": ("en", "de"),
}
_EMOJI = "embedded/emoji"
# How many digests there are: SHA-256.
_DIGESTS = 2**256


class Options(NamedTuple):
  """What a source of images with texts may read.

  Attributes:
    keywords: see `emoji`.
    train_files, validation_files, test_files, validation_fraction: see `read_lines`.
    image_key, text_key: the TFDS features that hold image and texts; `captions/text` is the feature
      `text` of each of the `captions`.
    data_dir, train_split, validation_split: see `sources.SourceOptions`. As validation_split also
      `set/split`, of another embedded or TFDS set: embedded/emoji/de/test.
  """

  keywords: bool = False
  train_files: Sequence[str] = ()
  validation_files: Sequence[str] = ()
  test_files: Sequence[str] = ()
  validation_fraction: float = 0.1
  image_key: str = "image"
  text_key: str = "text"
  data_dir: str = ""
  train_split: str = "train"
  validation_split: str = "validation"


@dataclasses.dataclass(frozen=True)
class Captioned:
  """Images and their texts.

  Attributes:
    images: the different images.
    texts: all texts; owners: int32 [texts], the image of each.
    where: index of a text -> where it lies, in words.
    keywords: of each image the texts that a caption's words are held against, `scores.keyword_f1`.
    digests: of each image one of its content, or none where that is not known without reading.
    identity: JSON-able values that name the content exactly.
  """

  images: images.Images
  texts: tuple[str, ...]
  owners: np.ndarray
  where: Callable[[int], str]
  keywords: tuple[tuple[str, ...], ...]
  digests: tuple[str, ...]
  identity: Mapping[str, Any]


def read_captioned(
  name: str, options: Options, bad: documents.BadRecords, *, apart: bool = True
) -> tuple[Captioned, Captioned]:
  """The training and the validation part of a source; nothing is ever downloaded.

  Args:
    name: a name in `EMOJI_LANGUAGES`, `pairs_jsonl` (see `read_lines`), or a TFDS data set such as
      `coco_captions/2014`.
    options: what is read.
    bad: counts what is left out.
    apart: whether both parts must hold others.

  Raises:
    FileNotFoundError: the files or the data set are not on disk.
    ValueError: the name is unknown, the data unusable, or both parts hold the same.
  """
  other, _, split = options.validation_split.rpartition("/")
  if name == "pairs_jsonl":
    parts = read_lines(options, bad, _caption, split="train" if other else split)
    train, validation = (_of_lines(part) for part in parts)
  else:
    train = _of_split(name, options.train_split, options, bad)
    validation = train if other else _of_split(name, split, options, bad)
  if other:
    validation = _of_split(other, split, options, bad)
  for part, which in ((train, "train"), (validation, "validation")):
    if not part.texts:
      raise ValueError(f"{name} has no {which} texts: {dict(part.identity)}")
  if apart and train.identity == validation.identity:
    raise ValueError(f"{name}: training and validation data are the same: {dict(train.identity)}")
  return train, validation


def nothing() -> Captioned:
  """No images and no texts, as a part of what reads none."""
  identity = {"texts": 0}
  pictures = images.Images(0, functools.partial(_of_path, ()), identity)
  return Captioned(pictures, (), np.zeros(0, np.int32), str, (), (), identity)


def _of_split(name: str, split: str, options: Options, bad: documents.BadRecords) -> Captioned:
  if name in EMOJI_LANGUAGES:
    return emoji(name, split, keywords=options.keywords)
  if name.split("/")[0] == "embedded":
    raise ValueError(
      f"the embedded images with texts are {', '.join(EMOJI_LANGUAGES)}: set data.name to one"
    )
  return _tfds(name, split, options, bad)


def shared_images(train: Sequence[str], validation: Sequence[str]) -> int:
  """How many of the validation images, by their digests, are training images too."""
  seen = {*train}
  shared = sum(digest in seen for digest in validation)
  if shared:
    logging.warning("%d of the %d validation images are training images", shared, len(validation))
  return shared


# ---------------------------------------------------------------------------------------------
# Embedded
# ---------------------------------------------------------------------------------------------


class Emoji(NamedTuple):
  """What the table says of an emoji.

  Attributes:
    line: of the table, from 1.
    group, subgroup: Unicode's.
    names: by language.
    keywords: by language, the name not among them.
  """

  line: int
  group: str
  subgroup: str
  names: Mapping[str, str]
  keywords: Mapping[str, tuple[str, ...]]


def emoji_table(split: str) -> list[Emoji]:
  """The emoji of a split, in the order of `images.embedded`.

  Args:
    split: `train`, `validation` or `test`.

  Raises:
    ValueError: it is none of them.
  """
  path = resources.files("magneto_jax.data") / "embedded" / "emoji" / "emoji.tsv"
  lines = path.read_text(encoding="utf-8").splitlines()
  found = []
  for line, row in enumerate(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), 2):
    if row["split"] != split:
      continue
    names = {language: plain(row[f"name_{language}"]) for language in ("en", "de")}
    keywords = {
      language: tuple(
        word for word in map(plain, row[f"keywords_{language}"].split(" | ")) if word != name
      )
      for language, name in names.items()
    }
    found.append(Emoji(line, row["group"], row["subgroup"], names, keywords))
  if not found:
    raise ValueError(f"split={split!r} is not one of train, validation, test")
  return found


def emoji(name: str, split: str, *, keywords: bool = False) -> Captioned:
  """One split of the emoji that come with the package, with their Unicode names.

  Args:
    name: a name in `EMOJI_LANGUAGES`.
    split: `train`, `validation` or `test`.
    keywords: whether an emoji with keywords has another text a language, which lists them: "face,
      grin". Its name, which Unicode gives as a keyword too, is left out of that.

  Returns:
    The emoji. A caption's words are held against those of name and keywords, of each language
    apart, whether keywords are a text or not.
  """
  languages = EMOJI_LANGUAGES[name]
  pictures = images.embedded(_EMOJI, split)
  rows = emoji_table(split)
  texts: list[str] = []
  owners: list[int] = []
  for owner, row in enumerate(rows):
    for language in languages:
      own = [row.names[language]]
      if keywords and row.keywords[language]:
        own.append(", ".join(row.keywords[language]))
      texts += own
      owners += [owner] * len(own)
  lines = [rows[owner].line for owner in owners]
  return Captioned(
    images=pictures,
    texts=tuple(texts),
    owners=np.array(owners, np.int32),
    where=lambda index: f"emoji.tsv: line {lines[index]}",
    keywords=tuple(
      tuple(" ".join((row.names[lang], *row.keywords[lang])) for lang in languages) for row in rows
    ),
    digests=pictures.digests,
    identity={
      "source": name,
      "split": split,
      "images": dict(pictures.identity),
      "texts": len(texts),
      "sha256": _texts_digest(texts, owners),
    },
  )


def _texts_digest(texts: Sequence[str], owners: Sequence[int]) -> str:
  """Of texts and of which image each is."""
  return documents.texts_digest(
    f"{owner}\t{text}".encode() for text, owner in zip(texts, owners, strict=True)
  )


# ---------------------------------------------------------------------------------------------
# JSONL of one's own
# ---------------------------------------------------------------------------------------------


class Line(NamedTuple):
  """A line of a file: where it is, its images' paths, and what the task reads of it.

  Attributes:
    path, number: the file, and the line in it from 1.
    paths: of its images.
    content: texts, questions, ...: JSON-able.
    name: its `id`; None: it has none.
    digests: of its images' bytes; none until they have been read.
  """

  path: str
  number: int
  paths: tuple[str, ...]
  content: Any
  name: str | None
  digests: tuple[str, ...] = ()

  def bad(self, reason: str) -> documents.BadRecord:
    """The error of a line that cannot be used."""
    return documents.BadRecord(self.path, self.number, reason, unit="line")


class Read(NamedTuple):
  """What a task reads of a line.

  Attributes:
    keys: all that a line may have; others are named in a warning and not read.
    convert: `values -> (names of images, content)`; ValueError with what is wrong with them.
  """

  keys: tuple[str, ...]
  convert: Callable[[Mapping[str, Any]], tuple[tuple[str, ...], Any]]


def read_lines(
  options: Options, bad: documents.BadRecords, read: Read, *, split: str = "validation"
) -> tuple[list[Line], list[Line]]:
  """Lines of JSON objects of one's own: paths of images, relative to the file, and what they show.

  Every image is read and checked by threads, so that what is bad is found before the run starts.

  Args:
    options: of which are read
      train_files, validation_files, test_files: paths of files, or patterns of them;
      validation_fraction: x; without validation_files about which share of the lines' first images
        is held out: those whose bytes' digests, as numbers, are below x 2^256, in every file; one
        at least, and one at least is left.
    bad: counts what is left out: lines that are no such objects, whose images are missing or
      broken, or whose `id` another line has.
    read: what of a line is read.
    split: what is evaluated on: `train`, `validation` or `test`.

  Raises:
    FileNotFoundError: a pattern matches no file.
    ValueError: of one line: a file is empty or in two parts, one bad line too many, or no line is
      left for a part.
    OSError: the machine could not read an image, which says nothing of it.
  """
  paths = text_files.of_parts(
    options.train_files, options.validation_files, options.test_files, split
  )
  names: dict[str, Line] = {}
  held = {
    part: _checked(
      [line for path in paths[part] for line in _lines_of(path, read, names, bad)], bad
    )
    for part in paths
    if part in ("train", split)
  }
  if "validation" not in paths:
    held["train"], held["validation"] = _held_out(held["train"], options.validation_fraction)
  for part in {"train", split}:
    if not held[part]:
      raise ValueError(
        f"the files have no {part} line that is left: name more of them, or validation_files"
      )
  return held["train"], held[split]


def _lines_of(
  path: str, read: Read, names: dict[str, Line], bad: documents.BadRecords
) -> Iterator[Line]:
  """The usable lines of a file; the others are counted. `names` are the ids seen so far."""
  content = pathlib.Path(path).read_bytes()
  content = content[text_files.text_begin(content) :]
  if not content.strip():
    raise ValueError(f"{path} is empty: remove it from the list of files")
  lines = content.split(b"\n")
  if not lines[-1]:
    lines.pop()
  unknown: collections.Counter[str] = collections.Counter()
  for number, encoded in enumerate(lines, 1):
    try:
      line, others = _line(path, number, encoded, read)
      if line.name is not None:
        first = names.setdefault(line.name, line)
        if first is not line:
          raise ValueError(f"its id {line.name!r:.80} is that of {first.path}: line {first.number}")
    except ValueError as error:
      bad.add(str(documents.BadRecord(path, number, str(error), unit="line")))
      continue
    unknown.update(others)
    yield line
  if unknown:
    logging.warning(
      "%s: keys that are not read: %s; those that are: %s",
      path,
      ", ".join(f"{key!r:.40} ({times} lines)" for key, times in unknown.most_common(5)),
      ", ".join(read.keys),
    )


def _line(path: str, number: int, encoded: bytes, read: Read) -> tuple[Line, list[str]]:
  """A line and its unknown keys; ValueError with what is wrong with it."""
  try:
    values = text_files.json_object(encoded.decode())
  except UnicodeDecodeError as error:
    raise ValueError(f"not UTF-8: its byte {error.start} is {encoded[error.start]:#04x}") from None
  names, content = read.convert(values)
  name = values.get("id")
  if isinstance(name, bool) or not isinstance(name, (str, int, type(None))):
    raise ValueError(f"its id is {name!r:.40}, neither a text nor an integer")
  folder = os.path.dirname(path)
  paths = tuple(os.path.join(folder, os.path.expanduser(image)) for image in names)
  others = [key for key in values if key not in (*read.keys, "id")]
  return Line(path, number, paths, content, None if name is None else str(name)), others


def value_of(values: Mapping[str, Any], key: str) -> Any:
  """What a line has of a key; ValueError, with the keys that it has, if there is none."""
  if key not in values:
    raise ValueError(f"it has no {key!r}, only {', '.join(map(repr, values)):.200}")
  return values[key]


def text_of(value: Any, key: str) -> str:
  """A text of a line, `plain`; ValueError if it is none, or empty."""
  if not isinstance(value, str):
    raise ValueError(f"its {key} is {value!r:.40}, not a text")
  if not (words := plain(value)):
    raise ValueError(f"its {key} is empty")
  return words


def path_of(value: Any, key: str = "image") -> str:
  """The path of an image; ValueError if it is none."""
  if not isinstance(value, str) or not value.strip() or "\0" in value:
    raise ValueError(f"its {key} is {value!r:.40}, not the path of an image")
  return value


def _caption_of(values: Mapping[str, Any]) -> tuple[tuple[str, ...], list[str]]:
  path = path_of(value_of(values, "image"))
  held = value_of(values, "text")
  if held == []:
    raise ValueError("its text is an empty list")
  return (path,), [text_of(text, "text") for text in (held if isinstance(held, list) else [held])]


_caption = Read(("image", "text"), _caption_of)


def _checked(lines: Sequence[Line], bad: documents.BadRecords) -> list[Line]:
  """The lines whose images can be read, with their digests; the others are counted.

  An image that many lines name is read once.
  """
  paths = [*dict.fromkeys(path for line in lines for path in line.paths)]
  logging.info("reading and checking %d images", len(paths))
  seen: dict[str, tuple[str, str | None]] = {}
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    for begin in range(0, len(paths), 1024):  # Not all at once: there may be millions.
      part = paths[begin : begin + 1024]
      seen.update(zip(part, threads.map(image_files.check, part), strict=True))
  kept = []
  for line in lines:
    wrong = [f"{path}: {seen[path][1]}" for path in line.paths if seen[path][1]]
    if wrong:
      bad.add(str(line.bad(wrong[0])))
    else:
      kept.append(line._replace(digests=tuple(seen[path][0] for path in line.paths)))
  return kept


def _held_out(lines: Sequence[Line], fraction: float) -> tuple[list[Line], list[Line]]:
  """Training and held-out lines: those of an image are in one part.

  A digest tells by itself in which one, whatever else the files hold: so that an image that is held
  out of one file is not trained on in another. Only where a part would be empty the next is taken.
  """
  digests = sorted({line.digests[0] for line in lines})
  below = sum(int(digest, 16) < fraction * _DIGESTS for digest in digests)
  out = {*digests[: min(len(digests) - 1, max(1, below))]}
  parts: tuple[list[Line], list[Line]] = [], []
  for line in lines:
    parts[line.digests[0] in out].append(line)
  return parts


def images_of(lines: Sequence[Line]) -> tuple[images.Images, dict[str, int], tuple[str, ...]]:
  """The different images of lines, in their order; their numbers by digest; and the digests."""
  paths: dict[str, str] = {}
  for line in lines:
    for path, digest in zip(line.paths, line.digests, strict=True):
      paths.setdefault(digest, path)
  digests = tuple(paths)
  identity = {
    "images": len(digests),
    "sha256": hashlib.sha256("\n".join(digests).encode()).hexdigest(),
  }
  read = functools.partial(_of_path, tuple(paths.values()))
  numbers = {digest: number for number, digest in enumerate(digests)}
  return images.Images(len(digests), read, identity), numbers, digests


def _of_path(paths: Sequence[str], index: int) -> tuple[np.ndarray, int]:
  return image_files.read(paths[index]), -1


def lines_digest(lines: Sequence[Line]) -> str:
  """Of what lines say and of their images' bytes, wherever files and images lie."""
  return documents.texts_digest(
    json.dumps([line.digests, line.content], ensure_ascii=False).encode() for line in lines
  )


def _of_lines(lines: Sequence[Line]) -> Captioned:
  pictures, numbers, digests = images_of(lines)
  rows = [(text, line) for line in lines for text in line.content]
  texts: list[list[str]] = [[] for _ in digests]
  for text, line in rows:
    texts[numbers[line.digests[0]]].append(text)
  return Captioned(
    images=pictures,
    texts=tuple(text for text, _ in rows),
    owners=np.array([numbers[line.digests[0]] for _, line in rows], np.int32),
    where=lambda index: f"{rows[index][1].path}: line {rows[index][1].number}",
    keywords=tuple(map(tuple, texts)),
    digests=digests,
    identity={"source": "pairs_jsonl", "texts": len(rows), "sha256": lines_digest(lines)},
  )


# ---------------------------------------------------------------------------------------------
# TFDS
# ---------------------------------------------------------------------------------------------


def _tfds(name: str, split: str, options: Options, bad: documents.BadRecords) -> Captioned:
  """One split of a prepared TFDS data set such as coco_captions/2014.

  All examples are read once for their texts, whenever a run starts; images are decoded when they
  are used. An example without a text, or with one that is empty, is bad.
  """
  held = tfds_text.tfds_captions(
    name,
    split=split,
    image_key=options.image_key,
    text_key=options.text_key,
    decode=image_files.decode,
    data_dir=options.data_dir,
  )
  kept: list[int] = []
  texts: list[tuple[str, ...]] = []
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    for begin in range(0, held.size, 1024):
      part = range(begin, min(begin + 1024, held.size))
      found = threads.map(functools.partial(_texts_at, held), part)
      for index, own in zip(part, found, strict=True):
        if isinstance(own, documents.BadRecord):
          bad.add(str(own))
        else:
          kept.append(index)
          texts.append(own)
  owners = [owner for owner, own in enumerate(texts) for _ in own]
  whole = [text for own in texts for text in own]
  identity = held.identity | {
    "kept": len(kept),
    "texts": len(whole),
    "sha256": _texts_digest(whole, owners),
  }
  return Captioned(
    images=images.Images(len(kept), lambda index: (held.image(kept[index]), -1), identity),
    texts=tuple(whole),
    owners=np.array(owners, np.int32),
    where=lambda index: "{}: record {}".format(*held.place(kept[owners[index]])),
    keywords=tuple(texts),
    digests=(),
    identity=identity,
  )


def _texts_at(
  held: tfds_text.CaptionedPictures, index: int
) -> tuple[str, ...] | documents.BadRecord:
  """An example's texts, or what is wrong with it."""
  try:
    found = tuple(map(plain, held.texts(index)))
  except documents.BadRecord as error:
    return error
  if not found or not all(found):
    return documents.BadRecord(
      *held.place(index), "one of its texts is empty" if found else "it has no text"
    )
  return found
