"""Runs that are told to stop, and runs that lose a host: what the others do, and what is kept."""

import contextlib
import itertools
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.reliability import states
from benchmarks.reliability.rows import Row
from magneto_jax import cli, reporting, runs

LIMIT = 500  # Seconds that anything may take before it has hung.
EVAL_EVERY = 8
FLAGS = (
  "--config=configs/gpt.py:tiny",
  "--config.batch_size=4",
  f"--config.eval_every={EVAL_EVERY}",
  "--config.eval_batches=200",
  "--config.log_every=1",
  "--config.sample_tokens=0",
  "--config.model.layers=1",
  "--config.model.width=16",
  "--config.model.ffn_width=32",
  "--config.model.heads=2",
  "--config.model.dropout=0.1",
  "--config.data.tokenizer=byte",
  "--config.data.seq_length=32",
  "--config.optimizer.warmup_steps=2",
  "--config.optimizer.decay_steps=1000",
)
MOMENTS = ("steps", "evaluation", "compilation")


class Hosts:
  """The processes of one run, and what they have said so far."""

  def __init__(
    self,
    workdir: pathlib.Path,
    count: int,
    *flags: str,
    compiles: bool = False,
    devices: int = 1,
  ):
    """Starts them.

    Args:
      workdir: of the run; what they say lies beside it.
      count: how many.
      flags: beside FLAGS.
      devices: of each, simulated.
      compiles: whether everything is compiled, and said, or taken from what runs beside it have
        compiled.
    """
    self._said = [workdir.with_name(f"{workdir.name}_{i}") for i in range(count)]
    joined: list[list[str]] = [[]]
    if count > 1:
      with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"--coordinator_address=127.0.0.1:{free.getsockname()[1]}"
      joined = [[address, f"--num_processes={count}", f"--process_id={i}"] for i in range(count)]
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_LOG_COMPILES": str(compiles).lower(),
      "JAX_ENABLE_COMPILATION_CACHE": str(not compiles).lower(),
      "JAX_COMPILATION_CACHE_DIR": str(workdir.with_name("cache")),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
      "PYTHONUNBUFFERED": "1",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", "magneto_jax.train", *FLAGS, f"--workdir={workdir}", *flags]
    self.processes = []
    for own, path in zip(joined, self._said, strict=True):
      with path.open("w") as said:
        options = {"stdout": said, "stderr": said, "env": environment}
        self.processes.append(subprocess.Popen([*command, *own], **options))

  def __enter__(self) -> "Hosts":
    return self

  def __exit__(self, *exc_info) -> None:
    for process in self.processes:
      process.kill()
      process.wait()

  def said(self, host: int = 0) -> str:
    """What one has printed, on either stream."""
    return self._said[host].read_text()

  def wait_for(self, text: str, host: int = 0) -> None:
    """Waits until one has printed a text."""
    deadline = time.monotonic() + LIMIT
    while text not in self.said(host):
      if self.processes[host].poll() is not None or time.monotonic() > deadline:
        raise RuntimeError(f"host {host} has not come to {text!r}: {self.said(host)[-2000:]}")
      time.sleep(0.01)

  def codes(self, hosts: Sequence[int] | None = None) -> list[int | None]:
    """Waits for the end of some, by default of all; None for one that has hung."""
    deadline, codes = time.monotonic() + LIMIT, []
    for host in range(len(self.processes)) if hosts is None else hosts:
      try:
        codes.append(self.processes[host].wait(max(0, deadline - time.monotonic())))
      except subprocess.TimeoutExpired:
        codes.append(None)
    return codes

  @contextlib.contextmanager
  def halted(self) -> Iterator[None]:
    """They stand still: what they have said is where they are."""
    for process in self.processes:
      process.send_signal(signal.SIGSTOP)
    yield
    for process in self.processes:
      process.send_signal(signal.SIGCONT)

  def step(self) -> int:
    """The newest step that is reported, which is one late; 0 before the first."""
    return max(map(int, re.findall(r"^step (\d+)/", self.said(), re.MULTILINE)), default=0)


def preempted(processes: int, signals: int, seed: int, folder: pathlib.Path) -> Row:
  """R6: a run is preempted again and again, and is compared with one that is left alone.

  Args:
    processes: how many run together.
    signals: how many times, in turn in the steps, in evaluation and in compilation, at a random
      moment there. One random process is signalled, or all of them.
    seed: of what is random.
    folder: for the runs.

  Returns:
    The row.
  """
  draw = random.Random(seed)
  steps = 2 + 12 * signals
  workdir = folder / f"preempted_{processes}"
  seen = []
  for moment in itertools.islice(itertools.cycle(MOMENTS), signals):
    targets = draw.choice([[i] for i in range(processes)] + [list(range(processes))])
    seen.append(_preempt(workdir, processes, steps, moment, targets, draw))
  different = differing(workdir, processes, steps)
  bad = [one for one in seen if one["wrong"]]
  after = [one["steps_after"] for one in seen if one["moment"] == "steps"]
  return Row(
    "R6",
    f"SIGTERM, {processes} process(es), in steps, evaluation and compilation: exit code"
    f" {cli.PREEMPTED} on all, one saved step, at most 2 after the signal; goes on bit for bit",
    f"{signals - len(bad)} of {signals} so, at most {max(after, default=0)} steps later,"
    f" {max(one['seconds'] for one in seen):.0f} s at most from signal to end;"
    f" {'equal' if not different else 'not equal'} to the run that was left alone",
    not bad and not different,
    {"signals": seen, "differing": different},
  )


def _preempt(workdir, processes, steps, moment, targets, draw) -> dict[str, Any]:
  """Starts a run, signals it at a moment, and says what came of it."""
  start = runs.last_step(workdir)
  compiles = moment == "compilation"
  flags = (f"--config.steps={steps}", *_RARELY)
  with Hosts(workdir, processes, *flags, compiles=compiles) as hosts:
    if compiles:
      hosts.wait_for(_COMPILING, targets[0])
    elif moment == "evaluation":
      # The line of the step is the last one before it.
      hosts.wait_for(f"step {(start // EVAL_EVERY + 1) * EVAL_EVERY}/")
    else:
      hosts.wait_for(f"step {start + draw.randint(1, 4)}/")
    time.sleep(draw.uniform(0, 0.05))
    with hosts.halted():
      reported, compiled = hosts.step(), _COMPILED in hosts.said(targets[0])
      began = time.monotonic()
      for target in targets:
        hosts.processes[target].send_signal(signal.SIGTERM)
    codes = hosts.codes()
    seconds = time.monotonic() - began
    said = [hosts.said(i) for i in range(processes)]
  saved = runs.last_step(workdir)
  # While a step is reported the next one is under way.
  after = saved - max(reported + 1, start)
  wrong = []
  if codes != [cli.PREEMPTED] * processes:
    wrong.append(f"exit codes {codes}")
  line = f"preempted: saved at step {saved:,};" if saved else "preempted before the first step"
  if "".join(said).count("preempted") != 1 or line not in said[0]:
    wrong.append(f"not said once: {line}")
  if moment == "steps" and not after <= 2:
    wrong.append(f"{after} more steps")
  if moment == "evaluation" and saved != reported:
    wrong.append(f"saved at {saved}, in the evaluation of step {reported}")
  if compiles and (saved != start or compiled):
    wrong.append("not in compilation")
  if moment == "evaluation" and reporting.has_validation(workdir, saved):
    wrong.append("not broken off, or half an evaluation is written")
  return {
    "moment": moment,
    "targets": targets,
    "start": start,
    "reported": reported,
    "saved": saved,
    "steps_after": after,
    "seconds": round(seconds, 1),
    "codes": codes,
    "wrong": wrong,
  }


def dead_hosts(
  processes: int,
  kills: int,
  seed: int,
  folder: pathlib.Path,
  *,
  heartbeat: int = 10,
  slack: float = 5,
) -> Row:
  """R7: one process of a run is lost, the first or another.

  It is killed with -9, whereupon its connections break; or it stands still (SIGSTOP), as a machine
  that has vanished: of that only the missing heartbeat tells.

  Args:
    processes: how many run together.
    kills: how many times; in turn another is killed, the first is killed, another stands still, and
      the first does.
    seed: of what is random.
    folder: for the runs.
    heartbeat: `--heartbeat_timeout`, in seconds.
    slack: seconds beyond it that the others may take to end.

  Returns:
    The row.
  """
  draw = random.Random(seed)
  every = 3
  steps = 2 + 30 * kills  # It must not be over while a checkpoint is waited for.
  workdir = folder / f"dead_{processes}"
  flags = [f"--config.steps={steps}", f"--config.checkpoint_every={every}"]
  seen = []
  for kill in range(kills):
    victim = 0 if kill % 2 else draw.randrange(1, processes)
    signum = signal.SIGSTOP if kill % 4 >= 2 else signal.SIGKILL
    others = [i for i in range(processes) if i != victim]
    start = runs.last_step(workdir)
    with Hosts(workdir, processes, *flags, f"--heartbeat_timeout={heartbeat}") as hosts:
      hosts.wait_for(f"step {start + every + draw.randint(1, 2)}/")
      # Steps are faster than the disk: there must be something to go on from.
      while runs.last_step(workdir) <= start and hosts.processes[0].poll() is None:
        time.sleep(0.01)
      began = time.monotonic()
      hosts.processes[victim].send_signal(signum)
      codes = hosts.codes(others)
      seconds = time.monotonic() - began
    saved = runs.last_step(workdir)
    wrong = []
    if not all(codes):  # 0, or None.
      wrong.append(f"exit codes {codes}")
    if seconds > heartbeat + slack:
      wrong.append(f"{seconds:.1f} s")
    if not saved > start:
      wrong.append(f"last step {saved}")
    seen.append(
      {
        "victim": victim,
        "signal": signum.name,
        "start": start,
        "saved": saved,
        "seconds": round(seconds, 1),
        "codes": codes,
        "wrong": wrong,
      }
    )
  different = differing(workdir, processes, steps)
  bad = [one for one in seen if one["wrong"]]
  return Row(
    "R7",
    f"one of {processes} processes killed, or frozen: the others end, not with 0, in the heartbeat"
    f" ({heartbeat} s) and {slack:g} s more; goes on bit for bit",
    f"{kills - len(bad)} of {kills} so, after {max(one['seconds'] for one in seen):.1f} s at most;"
    f" {'equal' if not different else 'not equal'} to the run that was left alone",
    not bad and not different,
    {"kills": seen, "differing": different},
  )


_RARELY = ("--config.checkpoint_every=100000",)
_COMPILING = "Compiling jit(train_step)"
_COMPILED = "Finished XLA compilation of jit(train_step)"


def differing(
  workdir: pathlib.Path, processes: int, steps: int, *flags: str, devices: int = 1
) -> list[str]:
  """What of a run, once it is brought to its end, is not that of a run that is left alone."""
  alone = workdir.with_name(f"{workdir.name}_alone")
  for path in (workdir, alone):
    options = (f"--config.steps={steps}", *(flags or _RARELY))
    with Hosts(path, processes, *options, devices=devices) as hosts:
      codes = hosts.codes()
      if codes != [0] * processes:
        return [f"{path.name} ends with {codes}: {hosts.said()[-2000:]}"]
  found = [_results(path, steps) for path in (workdir, alone)]
  names = sorted(found[0].keys() | found[1].keys())
  return [name for name in names if not _same(found[0].get(name), found[1].get(name))]


def _same(a: Any, b: Any) -> bool:
  if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
  return a == b


def _results(workdir: pathlib.Path, steps: int) -> dict[str, Any]:
  """{name: value} of every array of a run's last checkpoint, and of every metric but times."""
  arrays = states.arrays(workdir, steps)
  results = {
    jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
  }
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    row = json.loads(line)
    for name in row.keys() - {"step", "tokens_per_second", "input_share", "goodput"}:
      key = f"{name} at step {row['step']}"
      results[key] = "twice" if key in results else row[name]
  return results
