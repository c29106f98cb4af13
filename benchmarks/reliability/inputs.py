"""Inputs that are damaged, hostile or misspelt: R10, R11 and R12."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import statistics
import string
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

import magneto_jax
from benchmarks.reliability.rows import Row
from magneto_jax import config as config_lib
from magneto_jax import convert, runs, seals
from magneto_jax.data import files as data_files
from magneto_jax.data import text, tokenizers

# What one attempt may take before it counts as a hang; a usual one takes under a second.
_PATIENCE = 120.0
_DATASET = "plain_lines"


class Outcome(NamedTuple):
  """What came of reading something, in a process of its own.

  Attributes:
    kind: "read", "refused" (an error that a command shows as one line), "traceback" (any other),
      "crash" or "hang".
    value: what was read, or the error's text.
  """

  kind: str
  value: Any


class Reader:
  """Calls functions in a spawned process, whose death or silence is an outcome, too.

  Spawned, because ArrayRecord's threads do not survive a fork.
  """

  def __init__(self):
    self._pool = None

  def __enter__(self) -> "Reader":
    return self

  def __exit__(self, *exc_info) -> None:
    self._end()

  def __call__(self, function: Callable, *args, **kwargs) -> Outcome:
    if self._pool is None:
      spawn = multiprocessing.get_context("spawn")
      self._pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn)
    future = self._pool.submit(_outcome, function, args, kwargs)
    try:
      return future.result(_PATIENCE)
    except concurrent.futures.process.BrokenProcessPool as error:
      self._pool = None
      return Outcome("crash", str(error))
    except concurrent.futures.TimeoutError:
      for process in multiprocessing.active_children():
        process.kill()
      self._end()
      return Outcome("hang", f"no answer in {_PATIENCE:.0f} s")

  def _end(self) -> None:
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)
      self._pool = None


def _outcome(function: Callable, args: tuple, kwargs: dict) -> Outcome:
  try:
    return Outcome("read", function(*args, **kwargs))
  except (ValueError, OSError) as error:  # What the commands turn into one line.
    return Outcome("refused", str(error))
  except Exception as error:
    return Outcome("traceback", f"{type(error).__name__}: {error}")


def _command(*argv: str, cwd: pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
  """A command of the package, as a person starts it."""
  root = pathlib.Path(magneto_jax.__file__).parents[1]
  paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
  return subprocess.run(
    [sys.executable, "-m", *argv],
    cwd=cwd,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths, **environment},
    capture_output=True,
    text=True,
    timeout=10 * _PATIENCE,
  )


def _one_line(result: subprocess.CompletedProcess, *parts: str) -> bool:
  """Whether a command ended as one does that was used wrongly, and its line has these parts."""
  lines = result.stderr.splitlines()
  errors = [line for line in lines if line.startswith("error: ")]
  return (
    result.returncode == 2
    and len(errors) == 1
    and "Traceback" not in result.stderr
    and all(part in errors[0] for part in parts)
  )


# ---------------------------------------------------------------------------------------------
# R10: damaged data
# ---------------------------------------------------------------------------------------------


def _texts(count: int, seed: int) -> list[str]:
  """Documents of a kilobyte that compress badly, so that any byte of their files is of one."""
  draw = random.Random(seed)
  letters = string.ascii_letters + string.digits + " \n"
  return [f"{i} of {count}: " + "".join(draw.choices(letters, k=1000)) for i in range(count)]


@functools.cache
def _builder_class():
  import tensorflow_datasets as tfds

  tfds.disable_progress_bar()

  class PlainLines(tfds.core.GeneratorBasedBuilder):
    """Documents that are handed to it, in two splits."""

    VERSION = tfds.core.Version("1.0.0")
    TEXTS: Mapping[str, list[str]] = {}

    def _info(self):
      features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
      return {name: self._generate_examples(texts) for name, texts in self.TEXTS.items()}

    def _generate_examples(self, texts):
      for i, document in enumerate(texts):
        yield i, {"text": document}

  return PlainLines


def _prepare(folder: pathlib.Path, records: int, shards: int, seed: int) -> list[pathlib.Path]:
  """A TFDS data set of `records` training documents; returns its training shards."""
  import tensorflow_datasets as tfds

  builder_class = _builder_class()
  builder_class.TEXTS = {"train": _texts(records, seed), "validation": _texts(4, seed + 1)}
  builder = builder_class(data_dir=folder, file_format="array_record")
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards))
  return sorted(folder.rglob("*-train.array_record-*"))


def _load(data_dir: str, workdir: str, skip_bad: int = 0, **options) -> dict[str, Any]:
  """What the token files of a data set hold."""
  data = text.load_text(
    workdir=workdir,
    name=options.pop("name", _DATASET),
    data_dir=data_dir,
    tokenizer="byte",
    seq_length=64,
    skip_bad=skip_bad,
    **options,
  )
  streams = {"train": data.train, "validation": data.validation}
  return {
    "tokens": {k: hashlib.sha256(v.tokens.tobytes()).hexdigest() for k, v in streams.items()},
    "left_out": list(data.identity.get("left_out", {}).get("train", ())),
    "bad_records": list(data.bad_records),
    "identity": json.loads(json.dumps(data.identity)),
  }


def _tokens_without(documents: list[str], left_out: list[int]) -> str:
  """The digest that the byte tokens of all other documents have, by the rule of the format."""
  tokens = []
  for i, document in enumerate(documents):
    if i not in left_out:
      tokens += [1, *(4 + byte for byte in document.encode()), 2]
  return hashlib.sha256(np.array(tokens, "<u2").tobytes()).hexdigest()


def _documents(data_dir: str) -> list[str]:
  from magneto_jax.data import tfds_text

  return list(tfds_text.tfds_text(_DATASET, split="train", data_dir=data_dir))


MUTATIONS = ("flip", "truncate", "zero", "empty", "delete")


def mutate(path: pathlib.Path, kind: str, draw: random.Random) -> str:
  """Damages a file in one of the ways of MUTATIONS; returns what was done, in words."""
  content = bytearray(path.read_bytes())
  at = draw.randrange(max(len(content), 1))
  if kind == "delete":
    path.unlink()
    return "deleted"
  if kind == "flip" and content:
    content[at] ^= 1 << draw.randrange(8)
  elif kind == "truncate":
    del content[at:]
  elif kind == "zero":
    content[at : at + 512] = bytes(len(content[at : at + 512]))
  elif kind == "empty":
    content.clear()
  path.write_bytes(content)
  return f"{kind} at {at}"


def mutated_shards(mutations: int, seed: int, folder: pathlib.Path) -> Row:
  """R10: files of data sets, of token caches and of texts are damaged, one at a time.

  A damaged shard must stop a strict run with its name and the record's index, and a lenient one
  must hold exactly the tokens of the other documents, or nothing may have changed. A damaged token
  file must have been made anew. A text that a run was started with must be refused or be the same.
  """
  draw = random.Random(seed)
  data_dir = folder / "tfds"
  shards = _prepare(data_dir, records=120, shards=2, seed=seed)
  own = folder / "own.txt"
  own.write_text("\n\n".join(_texts(20, seed + 2)))
  texts = {
    "name": "text_files",
    "train_files": (str(own),),
    "document_separator": "\n\n",
  }
  counts = dict.fromkeys(("refused", "left out", "made anew", "harmless"), 0)
  failures = []
  with Reader() as read:
    documents = read(_documents, str(data_dir)).value
    whole = read(_load, str(data_dir), str(folder / "whole")).value
    whole_text = read(_load, "", str(folder / "whole"), **texts).value
    if whole["tokens"]["train"] != _tokens_without(documents, []):
      failures.append("the undamaged tokens are not those of the documents")
    caches = sorted((folder / "whole" / "cache").glob("*/*"))
    for number in range(mutations):
      kind = MUTATIONS[number % len(MUTATIONS)]
      # Shards twice as often as the rest.
      target = draw.choice(["shard", "shard", "cache", "text"])
      path = draw.choice({"shard": shards, "cache": caches, "text": [own]}[target])
      kept = path.read_bytes()
      did = f"{path.name}: {mutate(path, kind, draw)}"
      fresh = str(folder / f"run{number}")
      verdict = "harmless"
      if target == "shard":
        strict = read(_load, str(data_dir), fresh)
        lenient = read(_load, str(data_dir), fresh, skip_bad=len(documents))
        named = rf"{re.escape(str(path))}\S*: record \d+ cannot be read \("
        if strict.kind == "refused" and re.match(named, strict.value):
          verdict = "left out"
          if lenient.kind == "read":
            left_out = lenient.value["left_out"]
            held = len(left_out) == len(lenient.value["bad_records"]) > 0
            held &= all(re.match(named, record) for record in lenient.value["bad_records"])
            held &= lenient.value["tokens"]["train"] == _tokens_without(documents, left_out)
          else:
            # Damage that takes all of a shard's records leaves those of the other.
            held = False
        else:
          held = strict.kind == "read" and strict.value["tokens"] == whole["tokens"]
        outcomes = [strict, lenient]
      else:
        options = {} if target == "cache" else texts | {"expected": whole_text["identity"]}
        where = fresh if target == "text" else str(folder / "whole")
        outcome = read(_load, str(data_dir), where, **options)
        outcomes = [outcome]
        expected = whole if target == "cache" else whole_text
        held = outcome.kind == "read" and outcome.value["tokens"] == expected["tokens"]
        if target == "cache" and (not path.exists() or path.read_bytes() != kept):
          held = read(_load, "", where, **texts).kind == "read" and held
        if target == "cache":
          verdict = "made anew"
        elif outcome.kind == "refused":
          verdict, held = "refused", True
      counts[verdict] += 1
      if not held:
        failures.append(f"{did}: {[(o.kind, str(o.value)[:200]) for o in outcomes]}")
      path.write_bytes(kept)
      shutil.rmtree(fresh, ignore_errors=True)
  figures = ", ".join(f"{count} {name}" for name, count in counts.items())
  return Row(
    "R10",
    f"{mutations} damaged shards, token files and texts: 0 crashes, hangs or silent changes",
    f"{len(failures)} failed; {figures}",
    not failures,
    {"counts": counts, "failures": failures},
  )


def _damage_records(path: pathlib.Path, data_dir: str, wanted: int, read, draw) -> list[int]:
  """Flips bits of a shard until so many of its records cannot be read; returns which."""
  left_out: list[int] = []
  while len(left_out) < wanted:
    kept = path.read_bytes()
    mutate(path, "flip", draw)
    outcome = read(_unreadable, data_dir)
    if outcome.kind != "read" or len(outcome.value) > wanted:
      path.write_bytes(kept)
    else:
      left_out = outcome.value
  return left_out


def _unreadable(data_dir: str) -> list[int]:
  from magneto_jax.data import documents, tfds_text

  left_out: dict[int, str] = {}
  texts = tfds_text.tfds_text(_DATASET, split="train", data_dir=data_dir)
  for _ in documents.BadRecords(len(texts)).readable(texts, left_out=left_out):
    pass
  return list(left_out)


_TINY = (
  *("--config.model.layers=1", "--config.model.width=16", "--config.model.heads=1"),
  *("--config.batch_size=4", "--config.data.seq_length=32", "--config.data.tokenizer=byte"),
  *("--config.eval_every=1000", "--config.eval_batches=1", "--config.checkpoint_every=1000"),
  *("--config.log_every=1", "--config.sample_tokens=0", f"--config.data.name={_DATASET}"),
)


def _losses(workdir: pathlib.Path) -> dict[int, float]:
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def skipped_records(records: int, seed: int, folder: pathlib.Path) -> Row:
  """R10: one record in a hundred is damaged; the train command is strict, or leaves them out.

  It must stop by default, and reading must above its cap, naming file and record; below it every
  bad record is logged and counted, and a run of two and two steps is one of four.
  """
  draw = random.Random(seed)
  data_dir, bad = folder / "tfds", max(1, records // 100)
  (shard,) = _prepare(data_dir, records=records, shards=1, seed=seed)
  with Reader() as read:
    left_out = _damage_records(shard, str(data_dir), bad, read, draw)
    capped = read(_load, str(data_dir), str(folder / "capped"), skip_bad=bad - 1)

  def train(name: str, *more: str) -> subprocess.CompletedProcess:
    return _command(
      "magneto_jax.train",
      "--config=configs/gpt.py:tiny",
      f"--workdir={folder / name}",
      *_TINY,
      f"--config.data.data_dir={data_dir}",
      *more,
      cwd=folder,
    )

  enough = f"--config.data.skip_bad={bad}"
  strict = train("strict")
  straight = train("straight", enough, "--config.steps=4", "--config.optimizer.schedule=constant")
  parts = [
    train("parts", enough, f"--config.steps={steps}", "--config.optimizer.schedule=constant")
    for steps in (2, 4)
  ]
  found = {
    "strict": _one_line(strict, f"{shard}: record {left_out[0]} cannot be read"),
    "capped": capped.kind == "refused" and f"{shard}: record {left_out[-1]} " in capped.value,
    "finished": [run.returncode for run in (straight, *parts)] == [0, 0, 0],
  }
  if found["finished"]:
    named = [f"{shard}: record {index} cannot be read" for index in left_out]
    for name, output in {"logged": straight.stderr, "resumed": parts[1].stderr}.items():
      found[name] = all(line in output for line in named)
    summaries = [runs.read_summary(folder / name) for name in ("straight", "parts")]
    found["counted"] = [summary["bad_records"] for summary in summaries] == [bad, bad]
    found["same stream"] = _losses(folder / "straight") == _losses(folder / "parts")
    found["same stream"] &= len(_losses(folder / "straight")) == 4
  failures = [name for name, held in found.items() if not held]
  outputs = {
    name: run.stderr[-1000:]
    for name, run in {"strict": strict, "straight": straight, "parts": parts[-1]}.items()
    if failures
  }
  return Row(
    "R10",
    f"{bad} of {records} records bad: strict by default, else counted, capped, logged with file and"
    " index; the same stream after a resume",
    f"{len(found) - len(failures)} of {len(found)} held",
    not failures,
    {"left_out": left_out, "held": found, "failures": failures, "outputs": outputs},
  )


# ---------------------------------------------------------------------------------------------
# R11: misspelt fields and impossible numbers
# ---------------------------------------------------------------------------------------------


def typos(name: str, draw: random.Random) -> dict[str, str]:
  """Five misspellings of a field's dotted name; without those that are names of other fields."""
  *groups, leaf = name.split(".")
  at, pair = draw.randrange(len(leaf)), draw.randrange(max(len(leaf) - 1, 1))
  letter = draw.choice((string.ascii_lowercase + "_").replace(leaf[at], ""))
  wrong = {
    "drop": leaf[:at] + leaf[at + 1 :],
    "double": leaf[:at] + leaf[at] + leaf[at:],
    "swap": leaf[:pair] + leaf[pair + 1 : pair + 2] + leaf[pair] + leaf[pair + 2 :],
    "replace": leaf[:at] + letter + leaf[at + 1 :],
  }
  wrong = {kind: ".".join([*groups, part]) for kind, part in wrong.items()}
  others = {"", *(full.rpartition(".")[0] for full in config_lib.field_names())} - {
    ".".join(groups)
  }
  wrong["group"] = ".".join(filter(None, [draw.choice(sorted(others)), leaf]))
  taken = {*config_lib.field_names(), *others, ".".join(groups)}
  return {kind: typo for kind, typo in wrong.items() if typo not in taken}


def impossible(field: dataclasses.Field) -> list[Any]:
  """Values that a number's field must refuse, of its type or not."""
  bounds = field.metadata
  values: list[Any] = ["3", None, True, [1], {}]
  if field.type is int:
    return values + [1.5, bounds["min"] - 1, bounds["max"] + 1, 10**30, -(10**30)]
  values += [math.nan, math.inf, -math.inf, 1e39, -1e39, 10**400]
  lower = bounds.get("above", bounds.get("min"))
  return values + [math.nextafter(lower, -math.inf) if lower else -1e-30]


def number_fields() -> dict[str, dataclasses.Field]:
  """All fields that are numbers, by their dotted names."""
  found = {}

  def walk(record, prefix: str) -> None:
    for field in dataclasses.fields(record):
      if dataclasses.is_dataclass(field.type):
        walk(field.type, f"{prefix}{field.name}.")
      elif field.type in (int, float):
        found[prefix + field.name] = field

  walk(config_lib.TrainConfig, "")
  return found


# Sizes that do not go together, by dotted names.
_TOGETHER = (
  {"model.width": 100, "model.heads": 3},
  {"model.heads": 4, "model.kv_heads": 3},
  {"model.layers": 6, "model.unroll": 4},
  {"model.image_size": 224, "model.patch_size": 15},
  {"batch_size": 16, "accumulation": 3},
  {"batch_size": 2**24, "data.seq_length": 2**24},
)


def _answer_to(fields: Mapping[str, Any]) -> str:
  """What a config with these fields is answered."""
  values: dict[str, Any] = {}
  for name, value in fields.items():
    *groups, leaf = name.split(".")
    functools.reduce(lambda group, part: group.setdefault(part, {}), groups, values)[leaf] = value
  try:
    config_lib.from_config_dict(values)
  except config_lib.ConfigError as error:
    return str(error)
  return ""


def misspelt_fields(commands: int, seed: int, folder: pathlib.Path) -> Row:
  """R11: every field of a config with five typos, every number with impossible values.

  All are given to the function that makes the typed config of a command; `commands` of the typos
  also to the command itself, on a platform that does not exist: it must not get as far.
  """
  draw = random.Random(seed)
  asked, missed, accepted = [], [], []
  for name in config_lib.field_names():
    for typo in typos(name, draw).values():
      asked.append((name, typo))
      if not _answer_to({typo: 1}).endswith(f"does not exist; did you mean config.{name}?"):
        missed.append(f"{typo}: {_answer_to({typo: 1})}")
  numbers = number_fields()
  for name, field in numbers.items():
    for value in impossible(field):
      answer = _answer_to({name: value})
      if f"config.{name}" not in answer or "\n" in answer:
        accepted.append(f"{name}={value!r:.40}: {answer}")
  for fields in _TOGETHER:
    answer = _answer_to(fields)
    if not all(f"{name.rpartition('.')[2]}=" in answer for name in fields) or "\n" in answer:
      accepted.append(f"{fields}: {answer}")
  failed, seconds = [], []
  for name, typo in draw.sample(asked, commands):
    begin = time.monotonic()
    result = _command(
      "magneto_jax.train",
      "--config=configs/gpt.py:tiny",
      "--workdir=run",
      f"--config.{typo}=1",
      cwd=folder,
      JAX_PLATFORMS="none_such",
    )
    if result.stderr.count("\n") != 1 or not _one_line(result, f"config.{typo} does not exist"):
      failed.append(f"{typo} for {name}: exit {result.returncode}, {result.stderr[-500:]}")
    seconds.append(time.monotonic() - begin)
  share = 1 - len(missed) / len(asked)
  return Row(
    "R11",
    "every field with 5 typos: >= 99 % answered with the right field, by a sample of commands with"
    " exit 2, no traceback, before devices start; every number has a range, and sizes must divide",
    f"{share:.1%} of {len(asked)} typos; {len(numbers)} numbers and {len(_TOGETHER)} pairs of"
    f" sizes, {len(accepted)} impossible ones accepted; {commands - len(failed)} of {commands}"
    f" commands, in {statistics.median(seconds):.1f} s (median)",
    share >= 0.99 and not accepted and not failed,
    {"missed": missed, "accepted": accepted, "failed": failed, "seconds": seconds},
  )


# ---------------------------------------------------------------------------------------------
# R12: hostile files
# ---------------------------------------------------------------------------------------------


def _payload(canary: pathlib.Path) -> bytes:
  """A pickle that makes a folder when it is loaded without care."""
  return b"cos\nmkdir\n(V" + str(canary).encode() + b"\ntR."


def _npy(descr: str, shape: tuple[int, ...], content: bytes) -> bytes:
  header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape!r}, }}".encode()
  header += b" " * (-(len(header) + 11) % 64) + b"\n"
  return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def _zip(path: pathlib.Path, members: Mapping[str, bytes], claimed: int | None = None) -> None:
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in members.items():
      archive.writestr(name, content)
    if claimed is not None:
      for member in archive.filelist:  # Written into the directory at the end.
        member.file_size = claimed


def _tar(path: pathlib.Path, members: Mapping[str, bytes]) -> None:
  with tarfile.open(path, "w") as archive:
    for name, content in members.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
    link = tarfile.TarInfo("storages")
    link.type, link.linkname = tarfile.SYMTYPE, "/"
    archive.addfile(link)


def _safetensors(path: pathlib.Path, tensors: Any, size: int = 8, length: int | None = None):
  header = json.dumps(tensors).encode()
  length = len(header) if length is None else length
  path.write_bytes(struct.pack("<Q", length) + header + bytes(size))


def _tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
  return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _run_config(**changes) -> str:
  record = {"config": {}, "data": {}, "facts": {"vocab_size": 260}} | changes
  return json.dumps(record)


def _hostile(folder: pathlib.Path, canary: pathlib.Path) -> dict[str, tuple[Callable, str]]:
  """Makes the files; {name: (what reads it, its path)}."""
  payload, zeros = _payload(canary), _npy("<f4", (2,), bytes(8))
  files: dict[str, tuple[Callable, str]] = {}

  def weights(name: str, suffix: str) -> pathlib.Path:
    path = folder / f"{name.replace(' ', '_')}{suffix}"
    files[name] = convert.read_state_dict, str(path)
    return path

  def run(name: str, config: str | None) -> pathlib.Path:
    path = folder / name.replace(" ", "_")
    path.mkdir()
    if config is not None:
      (path / "config.json").write_text(config)
    files[name] = _load_run, str(path)
    return path

  weights("pickle as torch", ".pt").write_bytes(payload)
  _zip(weights("pickle in a torch zip", ".pt"), {"a/version": b"3\n", "a/data.pkl": payload})
  weights("pickle as safetensors", ".safetensors").write_bytes(payload)
  weights("pickle as npz", ".npz").write_bytes(payload)
  weights("object npy", ".npz").write_bytes(_npy("|O", (1,), payload))
  _zip(weights("object in an npz", ".npz"), {"w.npy": _npy("|O", (1,), payload)})
  _zip(weights("npz that climbs", ".npz"), {"../w.npy": zeros})
  _zip(weights("npz from the root", ".npz"), {f"{canary}/w.npy": zeros})
  _zip(weights("zip bomb", ".npz"), {"w.npy": zeros}, claimed=2**40)
  _zip(weights("npz of a huge shape", ".npz"), {"w.npy": _npy("<f4", (2**45,), bytes(8))})
  _tar(weights("tar that climbs", ".pt"), {"../climbed": b"x", str(canary): b"x"})
  whole = {"w": _tensor(0, 8, [2])}
  _safetensors(weights("endless header", ".safetensors"), whole, length=2**62)
  _safetensors(weights("header beyond the file", ".safetensors"), whole, length=10**6)
  _safetensors(
    weights("overlapping tensors", ".safetensors"), {**whole, "x": _tensor(4, 12, [2])}, size=12
  )
  _safetensors(weights("tensor beyond the file", ".safetensors"), {"w": _tensor(0, 2**40, [2**38])})
  _safetensors(weights("huge shape", ".safetensors"), {"w": _tensor(0, 8, [2**40, 2**40])})
  _safetensors(weights("unknown dtype", ".safetensors"), {"w": _tensor(0, 8, [2], "PICKLE")})
  yaml = folder / "model.yaml"
  yaml.write_text(f"!!python/object/apply:os.mkdir ['{canary}']\n")
  files["yaml as a config"] = _read_config, str(yaml)
  run("deep config", "[" * 100_000)
  run("config of other types", _run_config(config={"model": [1], "steps": "many"}))
  run("config with NaN", _run_config(config={"optimizer": {"learning_rate": math.nan}}))
  run("config of huge numbers", _run_config(config={"model": {"width": 10**300}}))
  run("facts that are none", _run_config(facts=[260]))
  outside = folder / "outside.json"
  outside.write_text(_run_config())
  (run("config that is a link", None) / "config.json").symlink_to(outside)
  os.mkfifo(run("config that is a pipe", None) / "config.json")
  linked = run("metrics that are a link", None)
  (linked / "metrics.jsonl").symlink_to(folder / "elsewhere.jsonl")
  files["metrics that are a link"] = _resumable, str(linked)
  elsewhere = {"params/../../../x": {"bytes": 1}}
  for name, listed in {"nothing": {}, "files elsewhere": elsewhere}.items():
    sealed = run(f"seal of {name}", _run_config()) / "checkpoints" / "1"
    sealed.mkdir(parents=True)
    values = {"step": 1, "arrays": {"params": {}}, "files": listed}
    values |= {"format": seals.FORMAT} if listed else {}
    seal = {**values, "seal": data_files.digest(values)}
    (sealed / seals.NAME).write_text(json.dumps(seal))
  (piped := run("seal that is a pipe", _run_config()) / "checkpoints" / "1").mkdir(parents=True)
  os.mkfifo(piped / seals.NAME)
  model = run("model of any class", None)
  (model / "model.json").write_text('{"model": {"class": "os.system"}, "origin": {}}')
  tokenizer = folder / "tokenizer.model"
  tokenizer.write_bytes(payload)
  files["pickle as a tokenizer"] = tokenizers.SentencePieceTokenizer.load, str(tokenizer)
  dataset = folder / "tfds" / _DATASET / "1.0.0"
  dataset.mkdir(parents=True)
  (folder / "planted.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
  (dataset / "features.json").write_text('{"pythonClassName": "planted.Text"}')
  (dataset / "dataset_info.json").write_text("{}")
  files["data set that imports"] = _load_tfds, str(folder)
  return files


def _load_run(path: str) -> None:
  magneto_jax.load(path)


def _resumable(path: str) -> None:
  runs.resumable(path, config_lib.TrainConfig())


def _read_config(path: str) -> None:
  data_files.read_json(path)


def _load_tfds(folder: str) -> None:
  sys.path.insert(0, folder)  # As `python -m` does with the folder that it is started in.
  text.load_text(workdir=f"{folder}/run", name=_DATASET, data_dir=f"{folder}/tfds")


def hostile_files(commands: int, seed: int, folder: pathlib.Path) -> Row:
  """R12: files that would run code, fill the memory or lead elsewhere are refused in one line.

  Each is read in a process of its own; `commands` of the weights and runs also by a command.
  """
  draw = random.Random(seed)
  inside, canary = folder / "hostile", folder / "canary"
  inside.mkdir()
  files = _hostile(inside, canary)
  before = set(folder.rglob("*"))
  failures, answers = {}, {}
  with Reader() as read:
    for name, (function, path) in files.items():
      outcome = read(function, path)
      line = outcome.value if isinstance(outcome.value, str) else ""
      answers[name] = line.replace(str(inside), "")
      if outcome.kind != "refused" or "\n" in line or len(line) > 1000:
        failures[name] = f"{outcome.kind}: {str(outcome.value)[:300]}"
      if new := set(folder.rglob("*")) - before:
        failures[name] = f"made {sorted(map(str, new))}"
        before |= new
  readers = {
    convert.read_state_dict: lambda path: (
      *("magneto_jax.convert", "--from=torchscale", f"--input={path}", "--output=made"),
    ),
    _load_run: lambda path: ("magneto_jax.generate", f"--workdir={path}"),
  }
  able = sorted(name for name, (function, _) in files.items() if function in readers)
  for name in draw.sample(able, min(commands, len(able))):
    function, path = files[name]
    result = _command(*readers[function](path), cwd=folder)
    if not _one_line(result) or canary.exists():
      failures[f"{name}, by command"] = f"exit {result.returncode}: {result.stderr[-300:]}"
  return Row(
    "R12",
    f"{len(files)} hostile files are refused in one line, and no code of theirs runs",
    f"{len(files) - len(failures)} of {len(files)}; {min(commands, len(able))} also by command",
    not failures,
    {"answers": answers, "failures": failures},
  )
