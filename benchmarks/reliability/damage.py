"""Files of a finished checkpoint changed, and whether that is ever missed."""

import collections
import pathlib
import random

from benchmarks.reliability import meshes, saver
from benchmarks.reliability.rows import Row
from magneto_jax.checkpoints import Checkpointer, DamagedError

# In KiB: the data file of the array is larger than those that are read twice.
ROWS = 1536


def mutated(mutations: int, seed: int, folder: pathlib.Path) -> Row:
  """Changes one file of the newer of two checkpoints at a time, and restores it.

  Every file of the checkpoint is changed before any is changed again.
  """
  mesh, directory = saver.mesh_of((1, 1)), folder / "checkpoints"
  with Checkpointer(directory) as checkpointer:
    for step in (1, 2):
      parts = saver.placed(saver.state(step, ROWS), mesh, ROWS)
      checkpointer.save(step, parts, saver.batches(), {"step": step})
  draw, seen, failed = random.Random(seed), collections.Counter(), []
  paths = sorted(path for path in (directory / "2").rglob("*") if path.is_file())
  queue: list[pathlib.Path] = []
  for _ in range(mutations):
    queue = queue or draw.sample(paths, len(paths))
    path, kind = queue.pop(), draw.choice(sorted(KINDS))
    whole = path.read_bytes()
    changed = KINDS[kind](whole, draw)
    path.unlink() if changed is None else path.write_bytes(changed)
    outcome, problem = _outcome(directory, path, mesh)
    seen[outcome] += 1
    if problem:
      failed.append(f"{kind} of {path.relative_to(directory)}: {problem}")
    _put_back(directory)
    path.write_bytes(whole)
  figure = f"{mutations} mutations of {len(paths)} files: "
  figure += ", ".join(f"{count} {outcome}" for outcome, count in sorted(seen.items()))
  return Row(
    "R2",
    "a file of a checkpoint bit-flipped, cut, zeroed, emptied or deleted: never silently wrong; the"
    " error names step, file and the older good step, and the run goes on from that by itself",
    figure,
    held=not failed and seen["detected"] > 0,
    details={**seen, "files": len(paths), "failures": failed},
  )


def gone_back(folder: pathlib.Path) -> Row:
  """Two processes go on where their newest checkpoint is damaged: from the same older step."""
  hosts = meshes.Hosts(2, 2, (4, 1))
  seen = [meshes.seen_by(hosts, folder, rewind=False) for _ in range(2)]
  data = [path for path in (folder / "checkpoints/6/params").rglob("d/*") if path.is_file()]
  largest = max(data, key=lambda path: path.stat().st_size)
  largest.write_bytes(_flip(largest.read_bytes(), random.Random(0)))
  seen.append(meshes.seen_by(hosts, folder, rewind=True))
  steps = [each and each["step"] for each in seen]
  held = steps == [0, 3, 3] and not any(map(any, (each["wrong"] for each in seen)))
  return Row(
    "R2",
    "2 processes go on from the same older step",
    f"from step {steps[-1]}",
    held=held and seen[1]["ids"] == seen[2]["ids"],
    details={"seen": seen},
  )


def _flip(content: bytes, draw: random.Random) -> bytes:
  at = draw.randrange(8 * len(content))
  changed = bytearray(content)
  changed[at // 8] ^= 1 << at % 8
  return bytes(changed)


def _zero(content: bytes, draw: random.Random) -> bytes:
  at = 4096 * draw.randrange(-(-len(content) // 4096))
  zeros = bytes(min(4096, len(content) - at))
  return content[:at] + zeros + content[at + 4096 :]


# What becomes of a file; None: it is deleted.
KINDS = {
  "bit flip": _flip,
  "cut": lambda content, draw: content[: draw.randrange(len(content))],
  "zeros": _zero,
  "emptied": lambda content, draw: b"",
  "deleted": lambda content, draw: None,
}


def _outcome(directory: pathlib.Path, path: pathlib.Path, mesh) -> tuple[str, str | None]:
  """`detected` or `harmless`, and what is wrong with that."""
  abstract, data = saver.abstract(mesh, ROWS), saver.batches()
  with Checkpointer(directory, read_only=True) as checkpointer:
    try:
      found = checkpointer.restore(2, abstract, data)
      wrong = saver.wrong(found, 2, ROWS)
      if checkpointer.config(2) != {"step": 2}:
        wrong.append("config")
      return "harmless", f"silently wrong: {wrong}" if wrong else None
    except DamagedError as error:
      text, named = str(error), error.what.split(" ")[0].rstrip(":")
      if str(directory / "2") not in text or "go on from step 1" not in text or "\n" in text:
        return "detected", f"not named in {text!r}"
      if not path.relative_to(directory / "2").as_posix().startswith(named):
        return "detected", f"{named} is named"
    except Exception as error:
      return "detected", f"{type(error).__name__}: {error}"
  said: list[str] = []
  with Checkpointer(directory) as checkpointer:
    step, found = checkpointer.restore_newest(abstract, data, fall_back=True, say=said.append)
  if (
    step != 1 or saver.wrong(found, 1, ROWS) or len(said) != 1 or "step 2 is damaged" not in said[0]
  ):
    return "detected", f"went on from step {step}, saying {said}"
  return "detected", None


def _put_back(directory: pathlib.Path) -> None:
  moved = directory / "damaged" / "2"
  if moved.exists():
    moved.rename(directory / "2")
