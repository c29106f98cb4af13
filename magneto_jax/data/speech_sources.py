"""The sources of utterances by name: embedded, manifests of one's own, and prepared TFDS data sets.

An utterance is a sound and a text: what is said, or what it is to be translated to.
"""

import collections
import concurrent.futures
import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from magneto_jax.data import documents, files, sounds, text_files, tfds_text

Place = tuple[str, int, str]

# The embedded sounds: whose voice, and the column of the text.
_EMBEDDED = {
  "embedded/en": ("en", "transcript"),
  "embedded/fr": ("fr", "transcript"),
  "embedded/fr-en": ("fr", "en_transcript"),
}
_SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Utterances(Sequence[np.ndarray]):
  """Sounds that can be read, one at a time, as waves at the asked rate, and their texts.

  Attributes:
    wave: index -> int16 [S], see `sounds`; BadRecord if it is damaged by now.
    texts: one each.
    samples: [size], the length of each wave; of one that is too long about what it would have.
    place: index -> where an utterance lies: the file, the index in it, and what that counts.
    identity: JSON-able values that name the content exactly.
  """

  wave: Callable[[int], np.ndarray]
  texts: tuple[str, ...]
  samples: np.ndarray
  place: Callable[[int], Place]
  identity: dict[str, Any]

  def __len__(self) -> int:
    return len(self.texts)

  def __getitem__(self, index: int) -> np.ndarray:
    if not 0 <= index < len(self):
      raise IndexError(f"utterance {index} of {len(self)}")
    return self.wave(index)

  def where(self, index: int) -> str:
    """Where an utterance lies, in words."""
    file, within, unit = self.place(index)
    return f"{file}: {unit} {within}"


class SpeechOptions(NamedTuple):
  """What a source of utterances may read.

  Attributes:
    sample_rate: samples a second of a wave.
    longest: how many samples it may have.
    cache_dir: where it is kept what a TFDS data set holds.
    train_files, validation_files, test_files, validation_fraction: see `manifests`.
    audio_key, text_key: the features that hold sound and text (TFDS).
    data_dir, train_split, validation_split: see `sources.SourceOptions`. As validation_split also
      `set/split`, of another embedded or TFDS set: librispeech/default/test_other.
  """

  sample_rate: int
  longest: int
  cache_dir: str | os.PathLike[str]
  train_files: Sequence[str] = ()
  validation_files: Sequence[str] = ()
  test_files: Sequence[str] = ()
  validation_fraction: float = 0.1
  audio_key: str = "speech"
  text_key: str = "text"
  data_dir: str = ""
  train_split: str = "train"
  validation_split: str = "validation"


def read_utterances(
  name: str, options: SpeechOptions, bad: documents.BadRecords, *, apart: bool = True
) -> tuple[Utterances, Utterances]:
  """The training and the validation utterances of a source; nothing is ever downloaded.

  Args:
    name: `embedded/en`, `embedded/fr`, `embedded/fr-en`, `manifest`, or a TFDS data set.
    options: what is read.
    bad: counts what is left out.
    apart: whether both parts must hold other utterances.

  Raises:
    FileNotFoundError: the files or the data set are not on disk.
    ValueError: the name is unknown, the utterances unusable, or both parts hold the same ones.
  """
  other, _, split = options.validation_split.rpartition("/")
  if name == "manifest":
    train, validation = manifests(options, bad, split="train" if other else split)
  else:
    train = _of_split(name, options.train_split, options, bad)
    validation = train if other else _of_split(name, split, options, bad)
  if other:
    validation = _of_split(other, split, options, bad)
  for part, which in ((train, "train"), (validation, "validation")):
    if not len(part):
      raise ValueError(f"{name} has no {which} utterances: {part.identity}")
  digests = [part.identity.get("sha256", part.identity) for part in (train, validation)]
  if apart and digests[0] == digests[1]:
    raise ValueError(f"{name}: training and validation utterances are the same: {train.identity}")
  return train, validation


def _of_split(
  name: str, split: str, options: SpeechOptions, bad: documents.BadRecords
) -> Utterances:
  if name in _EMBEDDED:
    return embedded(name, split, sample_rate=options.sample_rate, longest=options.longest)
  if name.split("/")[0] == "embedded":
    raise ValueError(f"the embedded sounds are {', '.join(_EMBEDDED)}: set data.name to one")
  return _tfds(name, split, options, bad)


# ---------------------------------------------------------------------------------------------
# Embedded
# ---------------------------------------------------------------------------------------------


def embedded(name: str, split: str, *, sample_rate: int = 8000, longest: int = 32000) -> Utterances:
  """One split of the voice prompts that come with the package: at most 4 seconds each, 8 kHz.

  Args:
    name: `embedded/en` and `embedded/fr`, with what is said; `embedded/fr-en`, French sounds with
      the English text of the same prompt.
    split: `train`, `validation` or `test`.
    sample_rate, longest: see `SpeechOptions`.
  """
  if split not in _SPLITS:
    raise ValueError(f"{name} has no split {split!r}; it has {', '.join(_SPLITS)}")
  language, column = _EMBEDDED[name]
  folder = resources.files("magneto_jax.data") / "embedded" / "speech"
  table = (folder / f"{language}.tsv").read_text(encoding="utf-8").splitlines()
  blob = (folder / f"{language}.gsm.bin").read_bytes()
  rows = [
    (number, row[column], int(row["offset"]), int(row["bytes"]))
    for number, row in enumerate(csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE), 2)
    if row["split"] == split and row[column]
  ]
  frames = [blob[offset : offset + size] for _, _, offset, size in rows]
  texts = tuple(text for _, text, _, _ in rows)
  numbers = [number for number, _, _, _ in rows]
  read = functools.partial(_embedded_wave, frames, sample_rate, longest)
  return Utterances(
    wave=read,
    texts=texts,
    samples=np.array([sounds.gsm_samples(part, sample_rate) for part in frames]),
    place=lambda index: (str(folder / f"{language}.tsv"), numbers[index], "line"),
    identity={
      "source": name,
      "split": split,
      "utterances": len(rows),
      "sha256": documents.texts_digest(
        part for row in zip(frames, map(str.encode, texts), strict=True) for part in row
      ),
    },
  )


def _embedded_wave(
  frames: Sequence[bytes], sample_rate: int, longest: int, index: int
) -> np.ndarray:
  return sounds.decode_gsm(frames[index], sample_rate=sample_rate, longest=longest)


# ---------------------------------------------------------------------------------------------
# Manifests
# ---------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
  """A line of a manifest: where it is, and what it names."""

  manifest: str
  line: int
  path: str
  text: str

  def bad(self, reason: str) -> documents.BadRecord:
    """The error of a line that cannot be used."""
    return documents.BadRecord(self.manifest, self.line, reason, unit="line")


class _Sound(NamedTuple):
  """An entry whose sound can be read: how long its wave is, and the digests of wave and file.

  One that is too long has none, as nobody reads it.
  """

  entry: _Entry
  samples: int
  heard: str = ""
  digest: str = ""


def manifests(
  options: SpeechOptions, bad: documents.BadRecords, *, split: str = "validation"
) -> tuple[Utterances, Utterances]:
  """Utterances of one's own: UTF-8 files of lines `path<TAB>text`, without a header.

  A path is relative to the manifest's folder; the sounds are those of `sounds.decode`. Every one is
  read, decoded and checked by threads, so that what is bad is found before the run starts.

  Args:
    options: of which are read
      train_files, validation_files, test_files: paths of manifests, or patterns of them;
      validation_fraction: without validation_files, the share of the sounds that is held out: those
        whose files' digests are the smallest, one at least. Sounds of equal waves are in one part,
        whatever their files.
    bad: counts what is left out: lines that are none, and sounds that are missing, broken, cut
      short or silent.
    split: what is evaluated on: `train`, `validation` or `test`.

  Raises:
    FileNotFoundError: a pattern matches no file.
    ValueError: of one line: a manifest is empty or in two parts, one bad line too many, or no
      utterance is left for a part.
    OSError: the machine could not read a sound, which says nothing of it.
  """
  paths = text_files.of_parts(
    options.train_files, options.validation_files, options.test_files, split
  )
  held = {
    part: _checked([entry for path in paths[part] for entry in _entries(path, bad)], options, bad)
    for part in paths
    if part in ("train", split)
  }
  if "validation" not in paths:
    held["train"], held["validation"] = _held_out(held["train"], options.validation_fraction)
  for part in {"train", split}:
    if not held[part]:
      raise ValueError(
        f"the manifests have no {part} utterance that is left: name more of them, or"
        " validation_files"
      )
  _tell_equal(held["train"], held[split] if split != "train" else [])
  return tuple(_of_sounds(held[part], part, options) for part in ("train", split))


def _entries(path: str, bad: documents.BadRecords) -> Iterator[_Entry]:
  """The lines of a manifest that are of a path and a text; the others are counted."""
  content = pathlib.Path(path).read_bytes()
  lines = content[text_files.text_begin(content) :].split(b"\n")
  if not lines[-1]:
    lines.pop()
  if not any(line.strip() for line in lines):
    raise ValueError(f"{path} is empty: remove it from the list of files")
  for number, line in enumerate(lines, 1):
    try:
      yield _Entry(path, number, *_columns(line.removesuffix(b"\r"), path))
    except ValueError as error:
      bad.add(str(documents.BadRecord(path, number, str(error), unit="line")))


def _columns(line: bytes, manifest: str) -> tuple[str, str]:
  """The sound's path and its text; ValueError with what is wrong with a line."""
  name, text = files.two_columns(line, "a path, a tab and a text")
  if not name.strip() or "\0" in name:
    raise ValueError("its path is empty" if not name.strip() else "its path has a null character")
  path = os.path.join(os.path.dirname(manifest), os.path.expanduser(name))
  if not text.strip():
    raise ValueError(f"{path}: its text is empty")
  return path, text


def _checked(
  entries: Sequence[_Entry], options: SpeechOptions, bad: documents.BadRecords
) -> list[_Sound]:
  """The entries whose sounds can be read; the others are counted."""
  logging.info("reading and checking %d sounds", len(entries))
  check = functools.partial(_check, options)
  found = []
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    for begin in range(0, len(entries), 1024):  # Not all at once: there may be millions.
      for checked in threads.map(check, entries[begin : begin + 1024]):
        if isinstance(checked, documents.BadRecord):
          bad.add(str(checked))
        else:
          found.append(checked)
  return found


def _check(options: SpeechOptions, entry: _Entry) -> _Sound | documents.BadRecord:
  """An entry's sound, or what is wrong with it."""
  try:
    wave_S = sounds.read(entry.path, sample_rate=options.sample_rate, longest=options.longest)
    with open(entry.path, "rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
  except sounds.TooLong as error:
    return _Sound(entry, error.samples)
  except FileNotFoundError as error:
    hint = "; a manifest has no line of headings" if entry.line == 1 else ""
    return entry.bad(str(error) + hint)
  except ValueError as error:
    return entry.bad(str(error))
  return _Sound(entry, len(wave_S), hashlib.sha256(wave_S.data).hexdigest(), digest)


def _held_out(held: Sequence[_Sound], fraction: float) -> tuple[list[_Sound], list[_Sound]]:
  """Training and validation sounds. What is too long, and has no digests, trains nothing.

  A wave's place is that of the first of its files, by digest: another decoder moves none.
  """
  heard = [sound.heard for sound in sorted(held, key=lambda sound: sound.digest) if sound.heard]
  waves = [*dict.fromkeys(heard)]
  count = min(len(waves) - 1, max(1, round(fraction * len(waves))))
  out = set(waves[: max(0, count)])
  parts: tuple[list[_Sound], list[_Sound]] = [], []
  for sound in held:
    parts[sound.heard in out].append(sound)
  return parts


def _tell_equal(train: Sequence[_Sound], others: Sequence[_Sound]) -> None:
  """Logs how many sounds occur twice in training, and how many of the others occur there."""
  times = collections.Counter(sound.heard for sound in train if sound.heard)
  if twice := times.total() - len(times):
    logging.warning("%d of the %d training sounds are equal to others", twice, len(train))
  if shared := sum(sound.heard in times for sound in others):
    logging.warning("%d of the %d held-out sounds are training sounds too", shared, len(others))


def _of_sounds(held: Sequence[_Sound], part: str, options: SpeechOptions) -> Utterances:
  """Named by the files' bytes and their texts, wherever they lie."""
  entries = [sound.entry for sound in held]
  lines = (f"{sound.digest}\t{sound.entry.text}".encode() for sound in held)
  return Utterances(
    wave=functools.partial(_wave_of_entry, entries, options.sample_rate, options.longest),
    texts=tuple(entry.text for entry in entries),
    samples=np.array([sound.samples for sound in held]),
    place=lambda index: (entries[index].manifest, entries[index].line, "line"),
    identity={
      "source": "manifest",
      "part": part,
      "utterances": len(held),
      "sha256": documents.texts_digest(lines),
    },
  )


def _wave_of_entry(
  entries: Sequence[_Entry], sample_rate: int, longest: int, index: int
) -> np.ndarray:
  try:
    return sounds.read(entries[index].path, sample_rate=sample_rate, longest=longest)
  except (FileNotFoundError, ValueError) as error:
    raise entries[index].bad(str(error)) from error


# ---------------------------------------------------------------------------------------------
# TFDS
# ---------------------------------------------------------------------------------------------


# A sound of so many samples is not read whole by anybody.
_NO_LIMIT = 2**40

# What is noted of an example: the samples of its wave, and its text. Of one that cannot be used
# nothing is, and it is looked at again by each run: what was wrong may be mended.
_Noted = tuple[int, str] | None


def _tfds(name: str, split: str, options: SpeechOptions, bad: documents.BadRecords) -> Utterances:
  """One split of a prepared TFDS data set such as librispeech.

  The first time all examples are read, once: what their texts and lengths are is then kept.
  """
  spoken = tfds_text.tfds_sounds(
    name,
    split=split,
    audio_key=options.audio_key,
    text_key=options.text_key,
    convert=functools.partial(_stored_wave, options.sample_rate),
    data_dir=options.data_dir,
  )
  held, wrong = _index(spoken, options)
  for index in sorted(wrong):
    bad.add(wrong[index])
  good = [index for index in range(spoken.size) if index not in wrong]
  return Utterances(
    wave=lambda index: spoken.read(good[index])[0],
    texts=tuple(held[index][1] for index in good),
    samples=np.array([held[index][0] for index in good]),
    place=lambda index: (*spoken.place(good[index]), "record"),
    identity=spoken.identity | {"utterances": len(good)},
  )


def _stored_wave(sample_rate: int, stored: np.ndarray | bytes, rate: int) -> np.ndarray:
  """The wave of what a TFDS set holds: a file's bytes, or integers that are samples of 16 bits."""
  asked = {"sample_rate": sample_rate, "longest": _NO_LIMIT}
  if isinstance(stored, bytes):
    return sounds.decode(io.BytesIO(stored), **asked)
  sound = np.asarray(stored)
  limits = np.iinfo(np.int16)
  is_integer = np.issubdtype(sound.dtype, np.integer)
  if not is_integer or ((sound < limits.min) | (sound > limits.max)).any():
    peak = np.abs(sound.astype(np.float64)).max(initial=0)
    raise ValueError(
      f"its samples are {sound.dtype} with the peak {peak:g}, not integers of 16 bits: prepare the"
      " data set with such"
    )
  return sounds.to_wave(sound, rate, **asked)


def _index(spoken: tfds_text.Spoken, options: SpeechOptions) -> tuple[list[_Noted], dict[int, str]]:
  """What is noted of each example, and what is wrong with those of which nothing is, by index."""
  identity = spoken.identity | {"sample_rate": options.sample_rate, "shards": spoken.shards()}
  path = pathlib.Path(options.cache_dir, f"speech-{files.digest(identity)[:32]}.jsonl")
  held: list[_Noted] = [None] * spoken.size
  if path.exists():
    try:
      held = _kept_index(path, spoken.size)
    except (ValueError, TypeError) as error:
      logging.warning("%s is made anew (%s)", path, error)
  missing = [index for index, noted in enumerate(held) if noted is None]
  wrong: dict[int, str] = {}
  tell_at = time.monotonic() + 30
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    for begin in range(0, len(missing), 1024):
      part = missing[begin : begin + 1024]
      for index, noted in zip(
        part, threads.map(functools.partial(_look, spoken), part), strict=True
      ):
        if isinstance(noted, documents.BadRecord):
          wrong[index] = str(noted)
        else:
          held[index] = noted
      if time.monotonic() > tell_at:
        tell_at = time.monotonic() + 30
        logging.warning("read %d of %d utterances", begin + len(part), len(missing))
  if len(wrong) < len(missing):
    body = "".join(json.dumps(entry) + "\n" for entry in held)
    digest = hashlib.sha256(body.encode()).hexdigest()
    files.write_durably(path, f"{digest}\n{body}".encode())
  return held, wrong


def _look(spoken: tfds_text.Spoken, index: int) -> tuple[int, str] | documents.BadRecord:
  """What is noted of an example, or what is wrong with it."""
  try:
    wave_S, text = spoken.read(index)
  except documents.BadRecord as error:
    return error
  if not text.strip():
    return documents.BadRecord(*spoken.place(index), "its text is empty")
  return len(wave_S), text


def _kept_index(path: pathlib.Path, size: int) -> list[_Noted]:
  """What `_index` has written; ValueError if it is not that any more."""
  digest, _, body = path.read_text(encoding="utf-8").partition("\n")
  if hashlib.sha256(body.encode()).hexdigest() != digest:
    raise ValueError("it has been changed")
  held = [noted and (noted[0], noted[1]) for noted in map(json.loads, body.splitlines())]
  if len(held) != size:
    raise ValueError(f"it has {len(held)} entries of {size}")
  return held
