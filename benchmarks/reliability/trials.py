"""All trials by name, in full and in short."""

import functools
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from benchmarks import coordinator
from benchmarks.reliability import (
  bare,
  crashes,
  damage,
  disk,
  goodput,
  inputs,
  meshes,
  numbers,
  preemption,
  resuming,
)
from benchmarks.reliability.rows import Row


def tested(row: str, promise: str, tests: int, *arguments: str, folder: pathlib.Path) -> Row:
  """A promise that so many tests hold."""
  command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
  done = subprocess.run(
    [*command, f"--basetemp={folder / 'tests'}"],
    cwd=coordinator.ROOT,
    capture_output=True,
    text=True,
  )
  last = done.stdout.strip().splitlines()[-1]
  counts = ", ".join(re.findall(r"\d+ (?:passed|failed|errors?|skipped)", last))
  details = {"tests": " ".join(arguments), "output": done.stdout[-2000:] if done.returncode else ""}
  return Row(row, promise, f"tests: {counts}", counts == f"{tests} passed", details)


def trials(quick: bool) -> dict[str, Callable[..., Row]]:
  """{id of a row, and what tells it from others of the same: the trial, given its folder}."""
  size = lambda full, short: short if quick else full
  of = functools.partial
  tests_of_meshes = [
    "tests/test_sharding.py",
    "-k",
    "of_one_device_in_float32 or several_processes",
  ]
  return {
    "R1 1 process": of(crashes.killed, size(300, 15), 1, 0),
    "R1 2 processes": of(crashes.killed, size(60, 3), 2, 0),
    "R2": of(damage.mutated, size(1000, 50), 0),
    "R2 hosts": damage.gone_back,
    "R3": of(resuming.resumed, 1, 1, 0, killed=False, seed=0),
    "R3 workers": of(resuming.resumed, 1, 1, 2, killed=False, seed=0),
    "R3 killed": of(resuming.resumed, 1, 1, 0, killed=True, seed=0),
    "R3 hosts": of(resuming.resumed, 2, 4, 0, killed=False, seed=0),
    "R4": of(
      tested,
      "R4",
      "1x1, 1x8, 2x4 and 4x2 processes x devices: parameters within 1e-12 in float64, 1e-4 in"
      " float32 (losses 1e-5); the same topology twice, bits",
      5,
      *tests_of_meshes,
    ),
    "R5": of(meshes.moved, meshes.RESTORED_BY, meshes.CHAIN),
    "R6 1 process": of(preemption.preempted, 1, size(12, 3), 1),
    "R6 2 processes": of(preemption.preempted, 2, size(9, 1), 1),
    "R6 4 processes": of(preemption.preempted, 4, size(6, 1), 1),
    "R7 2 processes": of(preemption.dead_hosts, 2, size(4, 1), 0),
    "R7 4 processes": of(preemption.dead_hosts, 4, size(2, 1), 0),
    "R8": of(disk.filled, size(5, 2), 0),
    "R9 skipped": of(numbers.skipped, size(50, 5), 0),
    "R9 ended": of(numbers.ended, 12, 0),
    "R9 rewound": of(numbers.rewound, 100, 0),
    "R10 shards": of(inputs.mutated_shards, size(300, 20), 0),
    "R10 records": of(inputs.skipped_records, 300, 0),
    "R11": of(inputs.misspelt_fields, size(20, 1), 0),
    "R12": of(inputs.hostile_files, size(20, 1), 0),
    "R14 stall": of(goodput.stall, 256, size(8, 2), 60.0),
    "R14 overhead": of(goodput.overhead, size(100, 20)),
    "R14 goodput": of(goodput.goodput, size(600, 60), 0, 100),
    "R14 killed": of(goodput.goodput, size(600, 100), size(3, 1), 10),
    "R15": disk.committed,
    "R16": of(
      tested,
      "R16",
      "a checkpoint of every released version is read bit for bit, and its run goes on",
      3,
      "tests/test_released.py",
    ),
  }


def comparisons(quick: bool) -> dict[str, Callable[..., str]]:
  """{a kind of fault: what it does to Orbax's own `CheckpointManager`, given a folder}."""
  size = lambda full, short: short if quick else full
  return {
    "kill -9 while it saves": functools.partial(bare.killed, size(120, 5), 0),
    "a file changed": functools.partial(bare.mutated, size(300, 20), 0),
  }


def compare(name: str, quick: bool) -> dict:
  """What came of one, as JSON. In a process of its own."""
  with tempfile.TemporaryDirectory() as folder:
    figure = comparisons(quick)[name](folder=pathlib.Path(folder))
  return {"fault": name, "figure": figure, "orbax": importlib.metadata.version("orbax-checkpoint")}


def run(name: str, quick: bool) -> dict:
  """A row as JSON, with the seconds that the trial took. In a process of its own."""
  trial, begin = trials(quick)[name], time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    try:
      row = {"trial": name, **trial(folder=pathlib.Path(folder))._asdict()}
    except Exception as error:  # A trial that cannot be made is not held, and the next one is.
      row = not_tried(name, error)
  return {**row, "seconds": round(time.monotonic() - begin, 1)}


def not_tried(name: str, error: Exception) -> dict:
  """The row of a trial that could not be made."""
  said = f"not tried: {type(error).__name__}: {error}"
  return {"trial": name, **Row(name.split()[0], "", said[:500], False, {})._asdict()}
