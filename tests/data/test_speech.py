"""Utterances: their sources, what is wrong with them, and the samples that they become."""

import collections
import csv
import dataclasses
import errno
import hashlib
import inspect
import json
import os
import pathlib
import re
import shutil
import socket

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from magneto_jax.config import DataConfig, tasks_reading
from magneto_jax.data import documents, pipelines, sounds, speech, speech_sources, tokenizers

RATE = 8000
FOLDER = pathlib.Path(speech.__file__).parent / "embedded" / "speech"


def wave(number, seconds=0.3, rate=RATE):
  """A sound that no other number has, int16."""
  time_S = np.arange(round(seconds * rate)) / rate
  return np.rint(9000 * np.sin(2 * np.pi * (200 + 7 * number) * time_S)).astype(np.int16)


def write(folder, rows, name="train.tsv", end="\n"):
  """A manifest of `(path, text)` or of lines as they are."""
  lines = ["\t".join(row) if isinstance(row, tuple) else row for row in rows]
  content = b"".join((x if isinstance(x, bytes) else x.encode()) + end.encode() for x in lines)
  (folder / name).write_bytes(content)
  return str(folder / name)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
  """A folder of twenty sounds, `00.wav` to `19.wav`."""
  folder = tmp_path_factory.mktemp("sounds")
  for i in range(20):
    soundfile.write(folder / f"{i:02}.wav", wave(i), RATE)
  return folder


def rows(numbers, text="number {}"):
  return [(f"{i:02}.wav", text.format(i)) for i in numbers]


@pytest.fixture
def own(recorded, tmp_path):
  """`own(training rows, validation rows, ...)`: manifests beside the twenty sounds."""
  for file in recorded.iterdir():
    (tmp_path / file.name).symlink_to(file)

  def load(train, validation=None, workdir="run", end="\n", **options):
    files = {"train_files": (write(tmp_path, train, end=end),)}
    if validation is not None:
      files["validation_files"] = (write(tmp_path, validation, "validation.tsv", end),)
    given = {
      "workdir": tmp_path / workdir,
      "name": "manifest",
      "seq_length": 32,
      "max_seconds": 1.0,
    }
    return speech.load_speech(**given | files | options)

  return load


def samples(part):
  return [part[i] for i in range(len(part))]


def same(first, second):
  assert len(first) == len(second)
  for one, other in zip(first, second, strict=True):
    assert one.keys() == other.keys()
    for name, values in one.items():
      np.testing.assert_array_equal(values, other[name])


# ---------------------------------------------------------------------------------------------
# The embedded utterances
# ---------------------------------------------------------------------------------------------

SIZES = {
  "embedded/en": {"train": 388, "validation": 49, "test": 45},
  "embedded/fr": {"train": 346, "validation": 43, "test": 41},
  "embedded/fr-en": {"train": 345, "validation": 43, "test": 41},
}


def table(language):
  with open(FOLDER / f"{language}.tsv", encoding="utf-8") as file:
    return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.mark.parametrize("name", SIZES)
def test_the_embedded_utterances_are_those_of_the_tables(name):
  """By the rule of their README: a prompt is in one split, the same in both languages."""
  language = name.split("/")[1][:2]
  column = "en_transcript" if name == "embedded/fr-en" else "transcript"
  held = table(language)
  for split, size in SIZES[name].items():
    part = speech_sources.embedded(name, split)
    of_split = [row for row in held if row["split"] == split and row[column]]
    assert len(part) == size and part.texts == tuple(row[column] for row in of_split)
    for row in of_split:
      share = int(hashlib.sha256(row["name"].encode()).hexdigest(), 16) % 10
      assert split == ("train" if share < 8 else "validation" if share == 8 else "test")
    for i in (0, size // 2, size - 1):
      assert len(part[i]) == part.samples[i] == int(of_split[i]["bytes"]) // 33 * 160
      assert abs(len(part[i]) / RATE - float(of_split[i]["seconds"])) < 0.01
      assert np.std(part[i].astype(float)) > 100
      line = part.where(i).removeprefix(f"{FOLDER / language}.tsv: line ")
      assert held[int(line) - 2] == of_split[i]
  with pytest.raises(ValueError, match=f"{name} has no split 'dev'; it has train, validation, te"):
    speech_sources.embedded(name, "dev")


SHARED = {
  "embedded/en": (set(), {"first", "minutes", "IAX"}),
  "embedded/fr": (set(), {"premier", "minutes"}),
  "embedded/fr-en": (set(), {"first", "minutes"}),
}
SHARED_LOWER = {
  "embedded/en": ({"Seconds"}, SHARED["embedded/en"][1]),
  "embedded/fr": ({"heure", "Secondes"}, SHARED["embedded/fr"][1]),
  "embedded/fr-en": ({"Seconds"}, SHARED["embedded/fr-en"][1]),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_texts_that_are_in_training_too_are_those_of_the_docs(name):
  parts = {split: speech_sources.embedded(name, split).texts for split in SIZES[name]}
  for shared, cased in ((SHARED, str), (SHARED_LOWER, str.lower)):
    trained = set(map(cased, parts["train"]))
    for split, words in zip(("validation", "test"), shared[name], strict=True):
      found = [text for text in parts[split] if cased(text) in trained]
      assert sorted(found) == sorted(words)
  docs = pathlib.Path(speech.__file__).parents[2] / "docs" / "speech.md"
  readme = (FOLDER / "README.md").read_text(encoding="utf-8")
  for text in SHARED[name][1]:
    assert f'"{text}"' in readme and f'"{text}"' in docs.read_text(encoding="utf-8")
  assert all(f'"{text}"' in readme for text in SHARED_LOWER[name][0])


def test_the_embedded_recordings_are_all_there_and_carry_their_licence():
  for language, seconds in (("en", 12.68 * 60), ("fr", 11.43 * 60)):
    held = table(language)
    ends = [int(row["offset"]) + int(row["bytes"]) for row in held]
    begins = [int(row["offset"]) for row in held]
    assert begins == [0, *ends[:-1]] and ends[-1] == (FOLDER / f"{language}.gsm.bin").stat().st_size
    assert abs(sum(float(row["seconds"]) for row in held) - seconds) < 1
  assert "Attribution-ShareAlike 3.0" in (FOLDER / "LICENSE").read_text(encoding="utf-8")
  readme = (FOLDER / "README.md").read_text(encoding="utf-8")
  assert "CC-BY-SA-3.0" in readme and "Allison Smith" in readme and "June Wallack" in readme


def test_english_in_one_call(tmp_path):
  data = speech.load_speech(workdir=tmp_path, seq_length=80, text_case="lower")
  assert data.describe() == (
    "388 training utterances (10.0 minutes) and 49 validation utterances (1.3 minutes) at 8,000"
    " samples a second, 46 in the vocabulary; 3 have characters that are read as unknown; 1 of the"
    " validation texts are training texts too"
  )
  assert data.augment is None and data.too_long == (0, 0) and data.bad_records == ()
  sample = data.validation[0]
  assert {name: (value.shape, value.dtype.name) for name, value in sample.items()} == {
    "waves": ((32000,), "int16"),
    "wave_lengths": ((), "int32"),
    "tokens": ((80,), "int32"),
    "token_lengths": ((), "int32"),
    "weights": ((), "float32"),
  }
  for part in (data.train, data.validation):
    for i in range(0, len(part), 20):
      sample = part[i]
      length, count = int(sample["wave_lengths"]), int(sample["token_lengths"])
      np.testing.assert_array_equal(sample["waves"][:length], part.utterances[i])
      assert not sample["waves"][length:].any() and not sample["tokens"][count:].any()
      assert (sample["tokens"][:count] > 2).all() and sample["weights"] == 1
      assert length == part.samples[i]
      words = part.utterances.texts[i].lower()
      assert part.texts[i] == words and count == len(words)
      assert data.show(sample) == f"{length / RATE:.2f} seconds: {words!r}"
  batch = next(pipelines.train_iterator(data.train, batch_size=4, seed=0))
  assert batch["waves"].shape == (4, 32000) and batch["tokens"].shape == (4, 80)


def test_a_rate_of_ones_own(tmp_path):
  """Twice the samples, of what is at 8,000 a second: soxr's at half of it."""
  data = speech.load_speech(workdir=tmp_path / "16000", sample_rate=16000)
  slow = speech.load_speech(workdir=tmp_path / "8000")
  for i in range(0, len(data.train), 50):
    sample, expected = data.train[i], slow.train.utterances[i].astype(float)
    length = int(sample["wave_lengths"])
    assert sample["waves"].shape == (64000,)
    assert abs(length - data.train.samples[i]) <= 1 and abs(length - 2 * len(expected)) <= 1
    half = sample["waves"][:length:2][: len(expected)].astype(float)
    assert np.corrcoef(half, expected[: len(half)])[0, 1] > 0.99


def test_other_names_are_refused(tmp_path):
  load = lambda **options: speech.load_speech(workdir=tmp_path, **options)
  for name in ("embedded", "embedded/de"):
    with pytest.raises(
      ValueError, match="sounds are embedded/en, embedded/fr, embedded/fr-en: set"
    ):
      load(name=name)
  with pytest.raises(ValueError, match="nearest names: .*'manifest'"):
    load(name="manifests", data_dir=str(tmp_path))
  for options, message in (
    ({"validation_split": "train"}, "training and validation utterances are the same"),
    ({"tokenizer": "bpe"}, r"tokenizer='bpe' must be one of \['byte', 'char', 'sentencepiece'\]"),
    ({"too_long": "truncate"}, "too_long='truncate' must be refuse or skip"),
    ({"text_case": "upper"}, r"text_case='upper' must be one of \['keep', 'lower'\]"),
    ({"sample_rate": 0}, "sample_rate=0 must be 1000 to 384000"),
    ({"max_seconds": 0.05}, "max_seconds=0.05 must be 0.1 to 3600"),
    ({"max_seconds": float("nan")}, "max_seconds=nan must be 0.1 to"),
    ({"speed_change": 1.0}, "speed_change=1.0 must be 0 to 0.5"),
    ({"speed_change": -0.1}, "speed_change=-0.1 must be 0 to 0.5"),
    ({"validation_fraction": 1.5}, "validation_fraction=1.5 must be 0 to 1"),
  ):
    with pytest.raises(ValueError, match=message):
      load(**options)
  assert not list(tmp_path.iterdir())
  with pytest.raises(TypeError, match="audio"):
    load(audio="x")


def test_the_split_of_another_set_can_be_evaluated_on(tmp_path):
  data = speech.load_speech(workdir=tmp_path, validation_split="embedded/fr/test")
  assert len(data.validation) == 41 and data.identity["validation"]["source"] == "embedded/fr"
  again = speech.load_speech(
    workdir=tmp_path,
    validation_split="train",
    expected={k: v for k, v in data.identity.items() if k != "validation"},
  )
  assert again.validation.texts == again.train.texts


# ---------------------------------------------------------------------------------------------
# Manifests
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ("\n", "\r\n"))
def test_a_manifest_names_sounds_beside_it(own, tmp_path, end):
  """Whatever ends its lines; absolute paths too; it is the bytes that count, not where they lie."""
  train = [*rows(range(8)), (str(tmp_path / "08.wav"), "ä b")]
  data = own(train, rows(range(10, 13)), end=end)
  assert data.train.texts == tuple(text for _, text in train)
  for i in range(9):
    np.testing.assert_array_equal(data.train.utterances[i], wave(i))
  assert data.train.utterances.where(3) == f"{tmp_path / 'train.tsv'}: line 4"
  (other := tmp_path / "elsewhere").mkdir()
  for file in tmp_path.glob("*.wav"):
    shutil.copy(file, other / f"moved{file.name}")
  moved = write(other, [(f"moved{i:02}.wav", text) for i, (_, text) in enumerate(train)])
  again = own(train, rows(range(10, 13)), workdir="other", train_files=(moved,))
  assert again.identity == data.identity
  changed = own(rows(range(9)), rows(range(10, 13)), workdir="third")
  assert changed.identity["train"] != data.identity["train"]


def test_sounds_of_any_format_rate_and_channels_are_one_wave(own, tmp_path):
  both = np.stack([wave(0, 1.0, 44100) / 2**15] * 2, axis=1)
  for name, subtype in (("a.flac", None), ("a.ogg", "VORBIS"), ("a.mp3", None), ("a.wav", None)):
    soundfile.write(tmp_path / name, both, 44100, subtype=subtype)
  data = own([(name, "a") for name in ("a.flac", "a.ogg", "a.mp3", "a.wav")], rows([1]))
  for i in range(4):
    found, expected = data.train.utterances[i], wave(0, 1.0)
    assert abs(len(found) - len(expected)) <= 1
    assert np.corrcoef(found[500:7500], expected[500:7500])[0, 1] > 0.99


def test_a_part_is_held_out_by_the_sounds(own, tmp_path, caplog):
  """Not by names or order, and equal ones are in one part."""
  data = own(rows(range(20)), validation_fraction=0.2)
  assert (len(data.train), len(data.validation)) == (16, 4)
  held = {*data.validation.texts}
  again = own(rows(range(20))[::-1], workdir="other", validation_fraction=0.2)
  assert {*again.validation.texts} == held and "equal" not in caplog.text
  number = int(data.validation.texts[0].split()[1])
  more = [*rows(range(20)), (f"{number:02}.wav", "again")]
  twice = own(more, workdir="third", validation_fraction=0.2)
  assert {"again", f"number {number}"} <= {*twice.validation.texts}
  digests = [hashlib.sha256((tmp_path / f"{i:02}.wav").read_bytes()).digest() for i in range(20)]
  assert held == {f"number {i}" for i in np.argsort(digests)[:4]}
  with pytest.raises(ValueError, match="no validation utterance that is left"):
    own(rows([0]), workdir="fourth")


def test_equal_waves_are_held_out_together(own, tmp_path, caplog):
  """Whatever files they are in: the same sound in FLAC is no other utterance."""
  for i in range(20):
    soundfile.write(tmp_path / f"{i:02}.flac", wave(i), RATE)
  both = [*rows(range(20)), *((f"{i:02}.flac", f"number {i}") for i in range(20))]
  data = own(both, validation_fraction=0.2)
  assert len(data.validation) == 8 and data.shared == 0
  assert "16 of the 32 training sounds are equal to others" in caplog.text


def test_a_fault_of_the_machine_ends_the_run(own, monkeypatch):
  """It is no bad record: with another one left out, the run would be another."""

  def fail(*args, **kwargs):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

  monkeypatch.setattr(sounds, "decode", fail)
  with pytest.raises(OSError, match="Too many open files"):
    own(rows(range(8)), rows([9]), skip_bad=9)


def test_texts_differ_by_what_is_heard_alone(own):
  """Two ways to write an accent, and spaces, are none."""
  train = [("00.wav", "caf\u00e9  au\u00a0lait "), ("01.wav", "b")]
  data = own(train, [("09.wav", " cafe\u0301 au lait")])
  assert data.train.texts[0] == data.validation.texts[0] == "caf\u00e9 au lait"
  assert data.unknown == (0, 0) and data.shared == 1


def test_a_limit_is_passed_in_words_too(own, tmp_path):
  soundfile.write(tmp_path / "long.wav", wave(41, 1.0 + 1 / RATE), RATE)
  with pytest.raises(ValueError, match="has 1.01 seconds, more than data.max_seconds=1, .* 1.01,"):
    own([*rows(range(4)), ("long.wav", "b")], rows([9]))


def test_equal_sounds_are_told(own, caplog):
  own([*rows(range(6)), *rows([2, 2])], [*rows(range(10, 13)), *rows([4, 5])])
  assert "2 of the 8 training sounds are equal to others" in caplog.text
  assert "2 of the 5 held-out sounds are training sounds too" in caplog.text


def test_the_test_files_are_a_split(own, tmp_path):
  test = write(tmp_path, rows(range(13, 17)), "test.tsv")
  data = own(rows(range(9)), rows(range(10, 12)), test_files=(test,), validation_split="test")
  assert data.validation.texts == tuple(f"number {i}" for i in range(13, 17))
  with pytest.raises(ValueError, match="no split 'dev', only train, validation and test"):
    own(rows(range(9)), validation_split="dev", workdir="other")


BAD = {
  "empty": ("", "it is empty"),
  "one column": ("00.wav", "it has one column, not a path, a tab and a text"),
  "three columns": ("00.wav\ta\tb", "it has 3 columns, not a path, a tab and a text"),
  "no path": ("\ta", "its path is empty"),
  "null": ("00\0.wav\ta", "its path has a null character"),
  "no text": ("00.wav\t ", "{folder}/00.wav: its text is empty"),
  "not UTF-8": (b"00.wav\tgr\xfcn", "not UTF-8: its byte 9 is 0xfc; convert the file"),
  "missing": ("none.wav\ta", "{folder}/none.wav: there is no such file"),
  "broken": ("broken.wav\ta", "{folder}/broken.wav: it is no WAV, FLAC, Ogg"),
  "cut short": ("cut.wav\ta", "{folder}/cut.wav: it is cut short: it has 4,500 bytes of sound"),
  "no samples": ("empty.wav\ta", "{folder}/empty.wav: it has no samples"),
  "silent": ("silent.wav\ta", "{folder}/silent.wav: it is silent: all of its 4,000 samples are eq"),
}


@pytest.fixture
def bad_sounds(tmp_path):
  (tmp_path / "broken.wav").write_bytes(b"RIFF nothing")
  soundfile.write(tmp_path / "cut.wav", wave(30), RATE)
  whole = (tmp_path / "cut.wav").read_bytes()
  (tmp_path / "cut.wav").write_bytes(whole[: 44 + 4500])
  soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
  soundfile.write(tmp_path / "silent.wav", np.full(4000, 0.1), RATE)


@pytest.mark.parametrize("line, reason", BAD.values(), ids=BAD)
def test_a_bad_line_is_named_by_its_number(own, bad_sounds, tmp_path, line, reason):
  """In either part; in one line; nothing is skipped unasked."""
  good = rows(range(8))
  for part, given in (
    ("train.tsv", (([*good[:2], line, *good[2:]]), rows([9]))),
    ("validation.tsv", (good, [*rows([9, 10]), line])),
  ):
    with pytest.raises(ValueError) as error:
      own(*given)
    expected = f"{tmp_path / part}: line 3 cannot be read ({reason.format(folder=tmp_path)}"
    assert str(error.value).startswith(expected)
    assert "data.skip_bad" in str(error.value) and "\n" not in str(error.value)


def test_bad_lines_may_be_left_out_and_are_counted(own, bad_sounds):
  """The rest is as if they were not there."""
  good, bad = rows(range(8)), [line for line, _ in BAD.values()]
  lines = [*good[:3], *bad, *good[3:]]
  with pytest.raises(ValueError, match=f"; {len(bad) - 1} others were left out: repair it"):
    own(lines, rows([9]), skip_bad=len(bad) - 1)
  data = own(lines, rows([9]), skip_bad=len(bad))
  assert len(data.bad_records) == data.identity["left_out"] == len(bad)
  same(samples(data.train), samples(own(good, rows([9]), workdir="other").train))
  expected = json.loads(json.dumps(data.identity))
  again = own(lines, rows([9]), skip_bad=len(bad), expected=expected)
  assert again.bad_records == data.bad_records


def test_a_line_of_headings_is_none(own):
  with pytest.raises(ValueError, match=r"line 1 .*no such file; a manifest has no line of heading"):
    own([("path", "text"), *rows(range(4))])


def test_a_manifest_that_holds_nothing_is_refused(own):
  for lines in ([], ["", ""]):
    with pytest.raises(ValueError, match="train.tsv is empty: remove it from the list of files"):
      own(lines, rows([9]))
  with pytest.raises(FileNotFoundError, match="train_files: no file matches 'none.tsv'"):
    own(rows(range(4)), train_files=("none.tsv",))


def test_a_sound_that_goes_bad_is_named(own, tmp_path):
  data = own(rows(range(4)), rows([9]))
  (tmp_path / "02.wav").unlink()
  with pytest.raises(
    documents.BadRecord, match=r"train.tsv: line 3 cannot be .*02.wav: there is n"
  ):
    data.train[2]


def test_what_is_too_long_is_named_or_skipped_and_told(own, tmp_path, caplog):
  """Sounds and texts; the limits themselves fit."""
  soundfile.write(tmp_path / "fits.wav", wave(40, 1.0), RATE)
  soundfile.write(tmp_path / "long.wav", wave(41, 1.25), RATE)
  good, fits = rows(range(4)), ("fits.wav", "x" * 32)
  long, wordy = ("long.wav", "b"), ("05.wav", "y" * 33)
  with pytest.raises(ValueError) as error:
    own([*good, fits, long], rows([9]))
  assert str(error.value) == (
    f"{tmp_path / 'train.tsv'}: line 6 has 1.25 seconds, more than data.max_seconds=1, as 1 of 6"
    " utterances do: set data.max_seconds to at least 1.25, or data.too_long=skip"
  )
  with pytest.raises(
    ValueError, match=r"line 2 has 33 tokens, more than data.seq_length=32, as 1 "
  ):
    own(good, [*rows([9]), wordy], workdir="a")
  data = own([*good, long, fits, wordy], [long, *rows([9]), wordy], workdir="b", too_long="skip")
  assert data.too_long == (2, 2) and data.validation.texts == ("number 9",)
  assert data.train.texts == (*(text for _, text in good), "x" * 32)
  assert "; 4 are too long and skipped" in data.describe()
  assert "1 seconds or 32 tokens: 2 of 7 utterances, first " in caplog.text
  assert f"{tmp_path / 'train.tsv'}: line 5" in caplog.text
  assert int(data.train[4]["wave_lengths"]) == RATE and int(data.train[4]["token_lengths"]) == 32
  np.testing.assert_array_equal(data.train[4]["waves"], wave(40, 1.0))
  with pytest.raises(ValueError, match="all utterances are longer than 1 seconds or 3 tokens"):
    own(good, rows([9]), workdir="c", seq_length=3, too_long="skip")


def test_a_run_goes_on_with_its_own_utterances_only(own, tmp_path):
  data = own(rows(range(8)), rows([9]))
  expected = json.loads(json.dumps(data.identity))
  assert own(rows(range(8)), rows([9]), expected=expected).identity == data.identity
  for part, given in (
    ("train", (rows(range(7)), rows([9]))),
    ("train", (rows(range(8), "other {}"), rows([9]))),
    ("validation", (rows(range(8)), rows([10]))),
  ):
    with pytest.raises(
      ValueError, match=f"the {part} utterances are not those that this run was s"
    ):
      own(*given, expected=expected)
  (tmp_path / "03.wav").unlink()
  soundfile.write(tmp_path / "03.wav", wave(33), RATE)
  with pytest.raises(ValueError, match="the train utterances are not those"):
    own(rows(range(8)), rows([9]), expected=expected)


# ---------------------------------------------------------------------------------------------
# TFDS
# ---------------------------------------------------------------------------------------------


class TinySpeech(tfds.core.GeneratorBasedBuilder):
  """Sounds and texts in the form in which TFDS's librispeech keeps them."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {
      "speech": tfds.features.Tensor(shape=(None,), dtype=np.int16),
      "file": tfds.features.Text(),
      "text": tfds.features.Text(),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train_clean": self._generate_examples(range(9)), "dev": self._generate_examples([9])}

  def _generate_examples(self, numbers):
    for i in numbers:
      sound = np.zeros(4000, np.int16) if i == 4 else wave(i, 0.3 + 0.1 * i, 2 * RATE)
      yield i, {"speech": sound, "file": "", "text": f"NUMBER {i}" if i != 5 else " "}


@pytest.fixture
def prepared(tmp_path, monkeypatch):
  """That, prepared, as one that TensorFlow would be needed to read."""
  for name in ("connect", "getaddrinfo"):
    monkeypatch.setattr(
      *((socket.socket, name) if name == "connect" else (socket, name)),
      lambda *args, **kwargs: pytest.fail("network"),
    )
  folder = tmp_path / "tfds"
  TinySpeech(data_dir=folder, file_format="array_record").download_and_prepare()
  as_audio(folder, sampleRate=str(2 * RATE), fileFormat="flac")
  return folder


def as_audio(folder, **noted):
  """Says of the sounds that they are TFDS's Audio."""
  (path,) = folder.rglob("features.json")
  held = json.loads(path.read_text())
  kept = held["featuresDict"]["features"]["speech"]
  kept = kept.get("tensor") or kept["audio"]
  held["featuresDict"]["features"]["speech"] = {
    "pythonClassName": "tensorflow_datasets.core.features.audio_feature.Audio",
    "audio": {k: v for k, v in kept.items() if k in ("shape", "dtype", "encoding")} | noted,
  }
  path.write_text(json.dumps(held))


def load_tfds(folder, workdir="run", **options):
  given = {"train_split": "train_clean", "validation_split": "dev", "data_dir": str(folder)}
  return speech.load_speech(
    workdir=folder.parent / workdir,
    **{"name": "tiny_speech", "max_seconds": 2.0, "skip_bad": 2} | given | options,
  )


def test_prepared_tfds_sounds_are_read_without_tensorflow(prepared, monkeypatch):
  """At the asked rate; bad ones are named by their file, and known without reading them again."""
  data = load_tfds(prepared, text_case="lower", sample_rate=2 * RATE)
  found = dict(zip(data.train.texts, map(data.train.utterances.__getitem__, range(7)), strict=True))
  assert found.keys() == {f"number {i}" for i in range(9) if i not in (4, 5)}
  for i in (0, 8):
    np.testing.assert_array_equal(found[f"number {i}"], wave(i, 0.3 + 0.1 * i, 2 * RATE))
  (shard,) = prepared.rglob("*-train_clean.array_record-*")
  assert all(record.startswith(f"{shard}: record ") for record in data.bad_records)
  reasons = sorted(record.partition("(")[2] for record in data.bad_records)
  assert reasons[0].startswith("ValueError: it is silent: all of its 4,000 samples are equal")
  assert reasons[1] == "its text is empty)"
  lower = load_tfds(prepared, workdir="lower")
  assert abs(lower.train.samples.sum() - data.train.samples.sum() / 2) <= 7
  read, to_wave = [], sounds.to_wave
  monkeypatch.setattr(sounds, "to_wave", lambda *args, **kw: read.append(1) or to_wave(*args, **kw))
  again = load_tfds(prepared, text_case="lower", sample_rate=2 * RATE)
  assert len(read) == 2  # Those that could not be used, lest they have been mended.
  assert again.identity == data.identity and again.bad_records == data.bad_records


def test_what_is_noted_of_a_set_is_made_anew_if_it_was_changed(prepared, caplog):
  data = load_tfds(prepared)
  (noted,) = (
    path
    for path in (prepared.parent / "run" / "cache").iterdir()
    if len(path.read_text().splitlines()) > 3
  )
  whole = noted.read_text()
  for content in (whole.replace("NUMBER 1", "NUMBER 7"), whole[:-20], "", "\udcff"):
    noted.write_bytes(content.encode(errors="surrogateescape"))
    assert load_tfds(prepared).train.texts == data.train.texts
    assert "is made anew" in caplog.text and noted.read_text() == whole
    caplog.clear()


def test_a_damaged_set_that_is_mended_is_read(prepared, monkeypatch):
  """Nothing of what is wrong is kept: neither with a record, nor with the machine."""
  (shard,) = prepared.rglob("*-train_clean.array_record-*")
  whole, times = shard.read_bytes(), shard.stat()
  damaged = bytearray(whole)
  for place in range(len(damaged) // 3, len(damaged) // 3 + 3000):
    damaged[place] ^= 0x55
  shard.write_bytes(bytes(damaged))
  found = load_tfds(prepared, skip_bad=9, tokenizer="byte")
  assert len(found.bad_records) > 2
  shard.write_bytes(whole)
  os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
  data = load_tfds(prepared, tokenizer="byte")
  assert len(data.bad_records) == 2 and len(data.train) == 7

  def fail(*args, **kwargs):
    raise ImportError("No module named 'soxr'")

  with monkeypatch.context() as patch:
    patch.setattr(sounds, "to_wave", fail)
    with pytest.raises(ImportError, match="soxr"):
      load_tfds(prepared, workdir="other")
  assert load_tfds(prepared, workdir="other").train.texts == data.train.texts


def test_files_of_a_set_that_changed_are_read_anew(prepared):
  data = load_tfds(prepared)
  (shard,) = prepared.rglob("*-dev.array_record-*")
  kept = {path.name for path in (prepared.parent / "run" / "cache").iterdir()}
  os.utime(shard, ns=(1, 1))
  assert load_tfds(prepared).validation.texts == data.validation.texts
  now = {path.name for path in (prepared.parent / "run" / "cache").iterdir()}
  assert len(now - kept) == 1 and kept < now


def test_a_long_sound_of_a_set_is_skipped(prepared, monkeypatch):
  """What is noted serves every limit."""
  load_tfds(prepared, validation_split="train_clean[1:]")
  read, to_wave = [], sounds.to_wave
  monkeypatch.setattr(sounds, "to_wave", lambda *args, **kw: read.append(1) or to_wave(*args, **kw))
  data = load_tfds(prepared, max_seconds=1.0, too_long="skip", validation_split="train_clean[1:]")
  assert data.too_long[0] == 1 and "NUMBER 8" not in data.train.texts
  # Of both parts what could not be used.
  assert len(read) <= 4 and data.train.samples.max() <= RATE


@pytest.mark.parametrize("dtype, scale", (("int32", 2**16), ("float32", 2**-15), ("int32", 1)))
def test_samples_that_do_not_fit_16_bits_are_refused(dtype, scale):
  """Louder ones would be clipped, floats rounded to silence; wide integers that fit are read."""
  stored = wave(3, rate=2 * RATE).astype(dtype) * np.dtype(dtype).type(scale)
  if scale == 1:
    found = speech_sources._stored_wave(2 * RATE, stored, 2 * RATE)
    np.testing.assert_array_equal(found, wave(3, rate=2 * RATE))
    return
  peak = f"{np.abs(stored).max().astype(float):g}"
  with pytest.raises(
    ValueError, match=re.escape(f"its samples are {dtype} with the peak {peak}, not i")
  ):
    speech_sources._stored_wave(2 * RATE, stored, 2 * RATE)


def test_sounds_that_are_kept_as_files_are_read(tmp_path):
  """As librispeech/lazy_decode does; the rate is then the file's."""

  with tfds.core.registered.skip_registration():

    class LazySpeech(TinySpeech):
      def _info(self):
        features = {"speech": tfds.features.Tensor(shape=(), dtype=np.str_)}
        features |= {"text": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

      def _generate_examples(self, numbers):
        for i in numbers:
          soundfile.write(path := tmp_path / "sound.flac", wave(i, rate=2 * RATE), 2 * RATE)
          yield i, {"speech": path.read_bytes(), "text": f"NUMBER {i}"}

  LazySpeech(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
  as_audio(tmp_path / "tfds", lazyDecode=True, fileFormat="flac", dtype="int16")
  data = load_tfds(tmp_path / "tfds", sample_rate=2 * RATE, name="lazy_speech")
  (place,) = (i for i, text in enumerate(data.train.texts) if text == "NUMBER 3")
  np.testing.assert_array_equal(data.train.utterances[place], wave(3, rate=2 * RATE))


def test_features_that_are_not_there_are_named(prepared):
  for options, message in (
    ({"audio_key": "text"}, r"has no Audio 'text'; data.audio_key can be one of \['speech'\]"),
    ({"text_key": "speech"}, r"no text feature 'speech'; data.text_key can be \['file', 'text'\]"),
    ({"train_split": "train"}, r"has no split 'train'; it has \['dev', 'train_clean'\]"),
  ):
    with pytest.raises(ValueError, match=message):
      load_tfds(prepared, **options)
  as_audio(prepared)
  with pytest.raises(ValueError, match="does not say how many samples a second 'speech' has"):
    load_tfds(prepared)
  with pytest.raises(FileNotFoundError, match="librispeech is not prepared under .*embedded/en"):
    speech.load_speech(workdir=prepared, name="librispeech", data_dir=str(prepared))


# ---------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ("char", "byte", "sentencepiece"))
def test_no_text_has_the_id_of_a_blank(tmp_path, tokenizer):
  """Nor those of a start and an end, whatever the tokens; and every training text comes back."""
  data = speech.load_speech(workdir=tmp_path, tokenizer=tokenizer, vocab_size=400)
  assert (data.tokenizer.pad_id, data.tokenizer.bos_id, data.tokenizer.eos_id) == (0, 1, 2)
  for part in (data.train, data.validation):
    assert min(ids.min() for ids in part.tokens) > 2
    assert max(ids.max() for ids in part.tokens) < data.tokenizer.vocab_size
  for ids, words in zip(data.train.tokens, data.train.texts, strict=True):
    assert data.tokenizer.decode(ids) == words
  again = speech.load_speech(
    workdir=tmp_path, tokenizer=tokenizer, vocab_size=400, expected=data.identity
  )
  same(samples(again.validation)[:3], samples(data.validation)[:3])


def test_characters_that_no_training_text_has_are_unknown_and_told(own, tmp_path, caplog):
  data = own(rows(range(8)), [("09.wav", "number 1"), ("10.wav", "zebra 9"), ("11.wav", "z")])
  assert data.unknown == (0, 2) and data.tokenizer.characters == " 01234567bemnru"
  assert "2 of 3 validation texts have characters that the tokenizer has not" in caplog.text
  assert f"('9' 'a' 'z'), first {tmp_path / 'validation.tsv'}: line 2" in caplog.text
  ids = data.validation.tokens[1]
  assert ids.tolist().count(tokenizers.UNK_ID) == 3 and data.tokenizer.decode(ids) == "ebr "
  assert "; 2 have characters that are read as unknown" in data.describe()


def test_characters_are_kept_with_the_run(own, tmp_path):
  data = own(rows(range(8)), rows([9]))
  kept = tmp_path / "run" / "characters.json"
  expected = json.loads(json.dumps(data.identity))
  with pytest.raises(
    ValueError, match="characters.json holds the characters of other text: delete"
  ):
    own(rows(range(8), "other {}"), rows([9]))
  given = own(rows(range(4), "other {}"), rows([9]), workdir="given", tokenizer_file=str(kept))
  assert given.tokenizer.identity == data.tokenizer.identity and given.unknown[0] == 4
  assert (tmp_path / "given" / "characters.json").read_bytes() == kept.read_bytes()
  kept.write_text('{"characters": "abc"}')
  with pytest.raises(ValueError, match="characters.json is not the tokenizer that this run was st"):
    own(rows(range(8)), rows([9]), expected=expected)


# ---------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------


def test_speeds_are_drawn_alike_and_by_the_generator(own):
  data = own(rows(range(8)), rows([9]), speed_change=0.1)
  sample = data.train[0]
  seen = collections.Counter()
  for seed in range(300):
    found = data.augment(sample, np.random.default_rng(seed))
    length = int(found["wave_lengths"])
    seen[length] += 1
    assert found["waves"].shape == sample["waves"].shape and not found["waves"][length:].any()
    assert found.keys() == sample.keys() and (found["tokens"] == sample["tokens"]).all()
    if length == 2400:
      np.testing.assert_array_equal(found["waves"], sample["waves"])
    elif seen[length] == 1:
      expected = sounds.change_speed(wave(0), 2400 / length)
      np.testing.assert_allclose(found["waves"][100:2000], expected[100:2000], atol=600)
  assert sorted(seen) == [2182, 2400, 2667] and min(seen.values()) > 70
  same(*([data.augment(sample, np.random.default_rng(3))] for _ in range(2)))


def test_a_speed_at_which_a_sound_would_not_fit_is_not_drawn(own, tmp_path):
  """Neither longer than the array nor too short to be one."""
  soundfile.write(tmp_path / "long.wav", wave(1, 0.95), RATE)
  soundfile.write(tmp_path / "short.wav", wave(2, 0.105), RATE)
  data = own([("long.wav", "a"), ("short.wav", "b")], rows([9]), speed_change=0.1)
  lengths = [
    {int(data.augment(sample, np.random.default_rng(seed))["wave_lengths"]) for seed in range(40)}
    for sample in samples(data.train)
  ]
  assert lengths == [{7600, 6909}, {840, 933}]


def test_speeds_are_drawn_anew_each_epoch_and_go_on_where_they_were(own):
  data = own(rows(range(4)), rows([9]), speed_change=0.2)
  feed = lambda start=0: pipelines.train_iterator(
    data.train, batch_size=4, seed=1, augment=data.augment, start=start
  )
  iterator = feed()
  batches = [next(iterator) for _ in range(4)]
  assert len({tuple(sorted(batch["wave_lengths"])) for batch in batches}) > 1
  same([next(feed(3))], batches[3:])


@pytest.mark.slow
@pytest.mark.parametrize("source", ("embedded", "manifest", "tfds"))
def test_workers_give_the_same_batches_and_resume(source, own, prepared, tmp_path):
  if source == "embedded":
    data = speech.load_speech(workdir=tmp_path / "run", speed_change=0.1)
  elif source == "manifest":
    data = own(rows(range(12)), rows([13]), speed_change=0.1)
  else:
    data = load_tfds(prepared, speed_change=0.1)

  def feed(**options):
    return pipelines.train_iterator(
      data.train, batch_size=3, seed=2, augment=data.augment, **options
    )

  whole, iterator = feed(), feed(num_workers=2)
  batches = [next(whole) for _ in range(7)]
  same([next(iterator) for _ in range(4)], batches[:4])
  state = json.loads(json.dumps(iterator.get_state()))
  iterator.close()
  resumed = feed(num_workers=2)
  resumed.set_state(state)
  same([next(resumed) for _ in range(3)], batches[4:])
  resumed.close()


def test_a_config_has_what_is_read_and_nothing_else():
  """By name and by default, but for those that a task's config sets anyway."""
  fields = {field.name: field.default for field in dataclasses.fields(DataConfig)}
  read = {
    name: default
    for name, default in fields.items()
    if "speech_recognition" in (tasks_reading(f"data.{name}") or ("speech_recognition",))
    and name not in ("workers", "prefetch")
  }
  options = speech_sources.SpeechOptions._field_defaults
  parameters = inspect.signature(speech.load_speech).parameters.values()
  given = options | {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
  assert read.keys() == given.keys() - {"workdir", "expected"}
  files = {"train_files", "validation_files", "test_files"}
  different = {name for name in read if read[name] != given[name]}
  assert different == {"name", "tokenizer", *files}
  assert DataConfig.__dataclass_fields__["text_case"].metadata["choices"] == (*speech.TEXT_CASES,)


def test_the_data_are_what_a_task_reads(own):
  names = {field.name for field in dataclasses.fields(speech.SpeechData)}
  assert {"train", "validation", "augment", "mix", "bad_records", "identity"} <= names
  data = own(rows(range(4)), rows([9]))
  assert re.match(r"4 training utterances \(0.0 minutes\) and 1 validation ut", data.describe())
  with pytest.raises(IndexError, match="utterance 4 of 4"):
    data.train[4]
  (batch,) = pipelines.eval_batches(data.validation, 3)
  assert batch["weights"].tolist() == [1, 0, 0] and batch["wave_lengths"].tolist() == [2400, 0, 0]
