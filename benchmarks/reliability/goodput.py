"""What reliability costs: saving, the loop around the step, and work that is done twice.

Steps take time and compute nothing, as an accelerator's do beside the host: one is asked for while
the last is under way, and what it has found is waited for. On a CPU what runs beside a step takes
its cores, so that nothing would be measured but that.
"""

import contextlib
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from unittest import mock

import jax
import numpy as np

from benchmarks.reliability.rows import Row
from magneto_jax import program, reporting, runs, training
from magneto_jax.checkpoints import Checkpointer
from magneto_jax.config import from_config_dict

SMALL = {
  "batch_size": 4,
  "eval_every": 100_000,
  "eval_batches": 1,
  "sample_tokens": 0,
  "model": {"layers": 1, "width": 16, "ffn_width": 32, "heads": 2},
  "data": {"tokenizer": "byte", "seq_length": 32},
}


class _Place:
  """Of the data: none are read."""

  def get_state(self) -> dict[str, int]:
    return {"next": 0}


def stall(mebibytes: int, saves: int, interval: float, folder: pathlib.Path) -> Row:
  """R14: how long `save` blocks the loop, of a state of that size saved every so many seconds."""
  names = [f"layer_{i}" for i in range(8)]
  rows = mebibytes * 2**20 // 4 // len(names) // 1024
  state = {name: jax.random.normal(jax.random.key(i), (rows, 1024)) for i, name in enumerate(names)}
  state = jax.block_until_ready(state)
  blocked, whole = [], []
  with Checkpointer(folder / "checkpoints", keep=2) as checkpointer:
    for step in range(1, saves + 2):
      begin = time.perf_counter()
      checkpointer.save(step, {"params": state}, _Place(), {})
      blocked.append(time.perf_counter() - begin)
      checkpointer.wait()
      whole.append(time.perf_counter() - begin)
  # The first compiles the digests.
  blocked, whole = blocked[1:], whole[1:]
  block, all_of_it = statistics.median(blocked), statistics.median(whole)
  return Row(
    "R14",
    f"a save of {mebibytes} MiB blocks the loop for at most 2 % of its interval ({interval:g} s)"
    " and 10 % of the time that the whole save takes",
    f"{1e3 * block:.0f} ms ({block / interval:.2%} of the interval, {block / all_of_it:.1%} of the"
    f" save's {all_of_it:.2f} s); median of {saves}, at most {1e3 * max(blocked):.0f} ms",
    block <= 0.02 * interval and block <= 0.1 * all_of_it,
    {"blocked_seconds": blocked, "whole_seconds": whole, "interval": interval},
  )


class _Late:
  """A number that can be read from a time on."""

  def __init__(self, value: float, at: float):
    self._value, self._at = value, at

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del copy
    time.sleep(max(0.0, self._at - time.perf_counter()))
    return np.asarray(self._value, dtype)


@contextlib.contextmanager
def waiting_steps(seconds: float) -> Iterator[list[float]]:
  """Within, a run's steps take that long and compute nothing; yields seconds between them."""
  compile_program, between, ended = program.Program.compile, [], []

  def compiled(self):
    found = compile_program(self)
    values = {"loss": 1.0, "gradient_norm": 1.0, "skipped": 0, "skipped_in_a_row": 0}
    advance = jax.jit(lambda state: dataclasses.replace(state, step=state.step + 1))
    advance = advance.lower(self.state).compile()

    def step(state, batch, key):
      del batch, key
      state = advance(state)
      # It begins when it is asked for, or when the last one is over.
      begin = max([time.perf_counter(), *ended])
      between.extend(begin - end for end in ended)
      ended[:] = [begin + seconds]
      return state, {name: _Late(value, ended[0]) for name, value in values.items()}

    # What is asked of a compiled program beside being called.
    step.memory_analysis, step.as_text = found.step.memory_analysis, found.step.as_text
    return found._replace(step=step)

  with (
    mock.patch.object(program.Program, "compile", compiled),
    mock.patch.object(program.Program, "refuse_if_too_large", lambda self: None),
  ):
    yield between


def overhead(steps: int, folder: pathlib.Path) -> Row:
  """R14: what the loop adds to a step of 100 ms: reading, reporting, batches, checks."""
  config = from_config_dict({**SMALL, "steps": steps, "checkpoint_every": 100_000})
  with waiting_steps(0.1) as between:
    training.train(config, folder / "run")
  added = float(np.mean(between))
  return Row(
    "R14",
    "the loop adds at most 1 % to steps of 100 ms, which run beside it",
    f"{1e3 * added:.2f} ms ({added / 0.1:.2%}), mean of {len(between)} steps",
    added <= 0.001,
    {"added_seconds": between},
  )


def goodput(steps: int, kills: int, every: int, folder: pathlib.Path) -> Row:
  """R14: the share of the time in which steps were taken that count, steps of 100 ms.

  Beginning and compiling is counted apart, as it does not grow with the run. A run that is killed
  takes the steps after its last checkpoint, one every so many, again.
  """
  workdir, told = folder / f"goodput_{kills}", folder / f"steps_{kills}.txt"
  command = [sys.executable, "-m", "benchmarks.reliability.goodput", str(steps)]
  command += [str(every), str(workdir), str(told)]
  told.touch()
  for kill in range(kills + 1):
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
      until = (kill + 1) * steps / (kills + 1) + 5
      while process.poll() is None:
        lines = told.read_text().split("\n")[:-1]
        if kill < kills and lines and json.loads(lines[-1])["step"] >= until:
          process.kill()
        time.sleep(0.02)
  rows = [json.loads(line) for line in told.read_text().split("\n")[:-1]]
  # Seconds in the loops, from the first step of each process to its end.
  starts = [row for row in rows if row["first"]]
  loops = [max(r["at"] for r in rows if r["process"] == s["process"]) - s["at"] for s in starts]
  spent = sum(loops) + 0.1 * len(starts)
  share = 0.1 * steps / spent
  bound = 0.95 if kills else 0.99
  return Row(
    "R14",
    f"goodput of {steps} steps of 100 ms, a checkpoint every {every}: at least {bound:.0%}"
    + (f" with {kills} kills" if kills else " without faults"),
    f"{share:.2%}: {len(rows)} steps taken for {steps}, {spent:.1f} s in the loop",
    share >= bound and runs.last_step(workdir) == steps,
    {"loops_seconds": loops, "steps_taken": len(rows)},
  )


def main() -> None:
  """A run of `goodput`: appends a line for each step that it begins."""
  steps, every, workdir, told = sys.argv[1:]
  config = from_config_dict({**SMALL, "steps": int(steps), "checkpoint_every": int(every)})
  progress_step, process = reporting.Progress.step, time.time_ns()
  with open(told, "a") as file, waiting_steps(0.1):
    first = True

    def step(self, number, status):
      nonlocal first
      row = {"process": process, "step": number, "first": first, "at": time.perf_counter()}
      first = False
      file.write(json.dumps(row) + "\n")
      file.flush()
      progress_step(self, number, status)

    with mock.patch.object(reporting.Progress, "step", step):
      training.train(config, workdir)


if __name__ == "__main__":
  main()
