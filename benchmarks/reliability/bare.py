"""The same faults with Orbax's `CheckpointManager` as it comes, for comparison."""

import collections
import pathlib
import random

import orbax.checkpoint as ocp

from benchmarks.reliability import crashes, damage, saver

_PARTS = ("params", "optimizer")


def killed(kills: int, seed: int, folder: pathlib.Path) -> str:
  """Processes that save with it are killed with -9; what is then listed, and cannot be read."""
  counts: collections.Counter[str] = collections.Counter()

  def look() -> None:
    mesh = saver.mesh_of((1, 1))
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
      wrong = [step for step in manager.all_steps() if _outcome(manager, step, mesh) != "whole"]
      counts["reads"] += len(manager.all_steps())
    counts["kills with such a step"] += bool(wrong)
    for step in wrong:  # Else it would count again.
      (folder / "unreadable").mkdir(exist_ok=True)
      (folder / "checkpoints" / str(step)).rename(folder / "unreadable" / f"{len(counts)}_{step}")
      counts["steps"] += 1

  crashes.kill_at_random(saver.save_forever_bare, kills, 1, random.Random(seed), folder, look)
  return (
    f"{kills} kills: after {counts['kills with such a step']} a step is listed that cannot be read"
    f" or is wrong ({counts['reads']} restores)"
  )


def mutated(mutations: int, seed: int, folder: pathlib.Path) -> str:
  """Files of its checkpoint are changed, one at a time, as in `damage.mutated`."""
  mesh, directory = saver.mesh_of((1, 1)), folder / "checkpoints"
  with ocp.CheckpointManager(directory) as manager:
    saver.save_bare(manager, 1, mesh, damage.ROWS)
    manager.wait_until_finished()
  draw, seen, queue = random.Random(seed), collections.Counter(), []
  paths = sorted(path for path in (directory / "1").rglob("*") if path.is_file())
  for _ in range(mutations):
    queue = queue or draw.sample(paths, len(paths))
    path, kind = queue.pop(), draw.choice(sorted(damage.KINDS))
    whole = path.read_bytes()
    changed = damage.KINDS[kind](whole, draw)
    path.unlink() if changed is None else path.write_bytes(changed)
    with ocp.CheckpointManager(directory) as manager:
      seen[_outcome(manager, 1, mesh, damage.ROWS)] += 1
    path.write_bytes(whole)
  return f"{mutations} mutations: {seen['wrong']} silently wrong, {seen['error']} errors"


def _outcome(manager: ocp.CheckpointManager, step: int, mesh, rows: int = 64) -> str:
  """`whole`, `wrong` or `error`."""
  shapes = saver.abstract(mesh, rows)
  args = {part: ocp.args.StandardRestore(shapes[part]) for part in _PARTS}
  args |= {part: ocp.args.JsonRestore() for part in ("data", "config")}
  try:
    found = manager.restore(step, args=ocp.args.Composite(**args))
  except Exception:  # Whatever it is: it has been noticed.
    return "error"
  is_wrong = saver.wrong({part: found[part] for part in _PARTS}, step, rows)
  texts = {"data": saver.batches().get_state(), "config": {"step": step}}
  return "wrong" if is_wrong or any(found[k] != v for k, v in texts.items()) else "whole"
