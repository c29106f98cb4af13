"""A disk that fills while checkpoints are saved, and what reaches it in which order."""

import contextlib
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.reliability import saver
from benchmarks.reliability.rows import Row
from magneto_jax import seals
from magneto_jax.checkpoints import Checkpointer, CheckpointError, refuse_if_no_room

_MIB = 2**20
_ROWS = 2048  # A checkpoint of 2 MiB.


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: int) -> Iterator[pathlib.Path]:
  """A file system of `size` bytes, in memory; PermissionError where one may not be mounted."""
  folder.mkdir(parents=True)
  mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
  result = subprocess.run(mount, capture_output=True, text=True)
  if result.returncode:
    raise PermissionError(f"no file system can be mounted here: {result.stderr.strip()}")
  try:
    yield folder
  finally:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def filled(times: int, seed: int, folder: pathlib.Path) -> Row:
  """Fills the disk before a save, `times` times, and frees it again."""
  mesh, failed, errors = saver.mesh_of((1, 1)), [], []

  def save(checkpointer: Checkpointer, step: int) -> None:
    parts = saver.placed(saver.state(step, _ROWS), mesh, _ROWS)
    checkpointer.save(step, parts, saver.batches(), {"step": step})
    checkpointer.wait()

  with small_disk(folder / "disk", 16 * _MIB) as disk:
    directory, filler = disk / "checkpoints", disk / "filler"
    with Checkpointer(directory, keep=2) as checkpointer:
      save(checkpointer, 1)
      save(checkpointer, 2)
    for time in range(times):
      step = 3 + time
      # From nothing at all to not quite enough, for the files of one kind after the other.
      left = (seed + time) % times * 2 * _MIB // times
      _fill(filler, left)
      try:
        refuse_if_no_room(directory, saver.abstract(mesh, _ROWS), 2)
        failed.append(f"{left} bytes free: not refused at the start")
      except CheckpointError:
        pass
      error = None
      with contextlib.suppress(CheckpointError), Checkpointer(directory, keep=2) as checkpointer:
        try:
          save(checkpointer, step)
          failed.append(f"{left} bytes free: the step was saved")
        except CheckpointError as raised:
          error = str(raised)
      errors.append(error)
      if not re.search(
        r"the disk is full: up to [\d,]+ bytes are needed and [\d,]+ are", str(error)
      ):
        failed.append(f"{left} bytes free: it is said {error!r}")
      names = {path.name for path in directory.iterdir()}
      if names != {str(step - 1), str(step - 2)}:
        failed.append(f"{left} bytes free: there lie {sorted(names)}")
      filler.unlink()
      with Checkpointer(directory, keep=2) as checkpointer:
        save(checkpointer, step)
        for kept in (step - 1, step):
          found = checkpointer.restore(kept, saver.abstract(mesh, _ROWS))
          failed += [f"step {kept}: {name}" for name in saver.wrong(found, kept, _ROWS)]
  return Row(
    "R8",
    "full disk: refused at the start; no good checkpoint is damaged, the error names needed and"
    " free bytes, nothing unfinished stays, and saving works again once there is room",
    f"{times} full disks: {len(failed)} failures",
    held=not failed,
    details={"errors": errors, "failures": failed},
  )


def _fill(path: pathlib.Path, left: int) -> None:
  """Writes until the disk is full, then gives some bytes back."""
  with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
    while file.write(bytes(4096)):
      pass
  with path.open("ab") as file:
    file.truncate(path.stat().st_size - left)


def committed(folder: pathlib.Path) -> Row:
  """The system calls of two saves, the second of which deletes the first; strace must be there."""
  trace, checkpoints = folder / "trace", folder / "checkpoints"
  code = "import sys; from benchmarks.reliability import saver; saver.save_once(sys.argv[1])"
  calls = "fsync,fdatasync,write,pwrite64,writev,pwritev,rename,renameat,renameat2,unlink,unlinkat"
  strace = ["strace", "-f", "-y", "-s", "0", "-qq", "-o", str(trace), "-e", f"trace={calls}"]
  command = [*strace, sys.executable, "-c", code, str(checkpoints)]
  subprocess.run(command, check=True, capture_output=True)
  problems, synced = unordered(trace.read_text(), checkpoints)
  return Row(
    "R15",
    "every file and directory of a step is on the disk before its seal, the seal before the step"
    " has its name, and the name before the old step goes",
    f"{synced} files and directories: {len(problems)} out of order",
    held=not problems and synced > 10,
    details={"failures": problems},
  )


def unordered(trace: str, checkpoints: pathlib.Path) -> tuple[list[str], int]:
  """What strace saw out of order in the commit of step 2, and how many paths were synced."""
  events, pending = [], {}
  for line in trace.splitlines():
    process, _, call = line.partition(" ")
    call = call.strip()
    if call.endswith("<unfinished ...>"):
      pending[process] = call.removesuffix("<unfinished ...>")
      continue
    if resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", call):
      call = pending.pop(process) + resumed[1]
    events.append(call)
  final = checkpoints / "2"
  listed = seals.read(final, 2)["files"]
  folders = {path.as_posix() for name in listed for path in pathlib.PurePosixPath(name).parents}
  # While they are written the step has another name.
  inside = lambda name: rf"{re.escape(str(final))}\.orbax-checkpoint-tmp[^/>\"]*/?{name}"
  at = lambda pattern: [i for i, call in enumerate(events) if re.match(pattern, call)]
  rename = r"rename\w*\((?:AT_FDCWD\S*, )?"
  sealed = at(rename + rf'.*{inside(re.escape(seals.NAME))}"')
  named = at(rename + rf'"{inside("")}", (?:AT_FDCWD\S*, )?"{re.escape(str(final))}"')
  gone = at(rename + rf'"{re.escape(str(checkpoints / "1"))}"')
  if not len(sealed) == len(named) == len(gone) == 1:
    return [f"{len(sealed)} seals, {len(named)} renames, {len(gone)} deletions"], 0
  problems = []
  for name in sorted({*listed, *folders} - {"."}) + [""]:
    synced = at(rf"f(?:data)?sync\(\d+<{inside(re.escape(name))}>")
    written = at(rf"p?writev?(?:64)?\(\d+<{inside(re.escape(name))}>")
    if (
      not synced
      or min(synced) > sealed[0]
      or max(written, default=-1) > max(i for i in synced if i < sealed[0])
    ):
      problems.append(f"{name or 'the step'} is not synced before the seal")
  of_seal = at(rf"fsync\(\d+<{inside('')}>")
  if not any(sealed[0] < i < named[0] for i in of_seal):
    problems.append("the seal is not synced before the step is named")
  of_name = at(rf"fsync\(\d+<{re.escape(str(checkpoints))}>")
  if not any(named[0] < i < gone[0] for i in of_name):
    problems.append("the name is not synced before the old step goes")
  return problems, len(listed) + len(folders)
