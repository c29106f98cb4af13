"""Processes killed while they save, and what is then on the disk."""

import pathlib
import random
import time
from collections.abc import Callable

import jax

from benchmarks.reliability import saver
from benchmarks.reliability.rows import Row
from magneto_jax.checkpoints import Checkpointer

KEEP = 3
_LIMIT = 300  # Seconds that a save may take before it has hung.
_PROMISE = (
  "kill -9 at random moments: no committed step is lost, every listed one is read and is right, and"
  " nothing unfinished is left after the restart"
)


def killed(kills: int, processes: int, seed: int, folder: pathlib.Path) -> Row:
  """Kills what saves, a random process first and then the others, and reads all that is there."""
  counts, failed = {"kills": 0, "commits": 0, "reads": 0}, []

  def look() -> None:
    problems, reads = _problems(folder)
    failed.extend(f"kill {counts['kills']}: {problem}" for problem in problems)
    counts["kills"] += 1
    counts["reads"] += reads

  kill_at_random(saver.save_forever, kills, processes, random.Random(seed), folder, look)
  counts["commits"] = len(_ledger(folder))
  figure = "{kills} kills, {commits} commits, {reads} restores".format(**counts)
  name = "1 process" if processes == 1 else f"{processes} processes"
  return Row(
    "R1",
    f"{name}: {_PROMISE}",
    f"{figure}: {len(failed)} failures",
    held=not failed and counts["kills"] == kills and counts["reads"] > 0,
    details={**counts, "failures": failed},
  )


def kill_at_random(
  save: Callable,
  kills: int,
  processes: int,
  draw: random.Random,
  folder: pathlib.Path,
  look: Callable[[], None],
) -> None:
  """Starts what saves, kills it in a save, a random process first, and looks, again and again."""
  (folder / "ledger").touch()
  for _ in range(kills):
    (folder / "started").unlink(missing_ok=True)
    running = saver.start(save, str(folder), KEEP, processes=processes)
    # In the first save of the process, or in a later one; then anywhere in it.
    _wait_for(folder, len(_ledger(folder)) + draw.randrange(3), running)
    time.sleep(draw.uniform(0, 0.5))
    draw.shuffle(running)
    for process in running:
      process.kill()
      process.join()
    look()


def _ledger(folder: pathlib.Path) -> list[int]:
  """The steps that were committed; the last line may have been cut short."""
  return [int(line) for line in (folder / "ledger").read_text().split("\n")[:-1]]


def _wait_for(folder: pathlib.Path, commits: int, running) -> None:
  """Until a save has begun, and so many are committed."""
  deadline = time.monotonic() + _LIMIT
  while not (folder / "started").exists() or len(_ledger(folder)) < commits:
    if time.monotonic() > deadline:
      raise RuntimeError(f"nothing is saved in {_LIMIT} s")
    if not all(process.is_alive() for process in running):
      raise RuntimeError("a process that saves has ended by itself")
    time.sleep(0.01)


def _problems(folder: pathlib.Path) -> tuple[list[str], int]:
  """What is wrong after a kill, and how many steps were read."""
  committed = _ledger(folder)
  problems, data, mesh = [], saver.batches(), saver.mesh_of((jax.device_count(), 1))
  with Checkpointer(folder / "checkpoints", keep=KEEP) as checkpointer:
    steps = checkpointer.steps
    newest = max(steps, default=0)
    problems += [
      f"step {step} was committed and is gone"
      for step in committed
      if step > newest - KEEP and step not in steps
    ]
    for step in steps:
      try:
        found = checkpointer.restore(step, saver.abstract(mesh), data)
        problems += [f"step {step}: {name} is wrong" for name in saver.wrong(found, step)]
        if checkpointer.config(step) != {"step": step}:
          problems.append(f"step {step}: its config is wrong")
      except OSError as error:
        problems.append(str(error))
  names = {path.name for path in (folder / "checkpoints").iterdir()}
  problems += [f"{name} is left" for name in sorted(names - {str(step) for step in steps})]
  return problems, len(steps)
