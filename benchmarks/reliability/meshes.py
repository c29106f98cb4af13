"""Checkpoints that go on with other processes, devices and meshes than wrote them."""

import json
import pathlib
from typing import NamedTuple

from benchmarks.reliability import saver
from benchmarks.reliability.rows import Row


class Hosts(NamedTuple):
  """Processes, the devices of each, and the mesh of all devices."""

  processes: int
  devices: int
  mesh: tuple[int, int]


SAVED_BY = Hosts(2, 4, (4, 2))
RESTORED_BY = (
  Hosts(2, 4, (4, 2)),
  Hosts(1, 8, (2, 4)),
  Hosts(1, 4, (2, 2)),
  Hosts(1, 4, (4, 1)),
  Hosts(4, 1, (1, 4)),
  Hosts(1, 1, (1, 1)),
)
# One after the other.
CHAIN = (Hosts(2, 1, (2, 1)), Hosts(1, 1, (1, 1)), Hosts(4, 1, (2, 2)))


def moved(restored_by: tuple[Hosts, ...], chain: tuple[Hosts, ...], folder: pathlib.Path) -> Row:
  """Restores a checkpoint on all `restored_by`; and a run goes on from each of a chain to the next.

  Whoever restores compares the digests of its arrays with those that were sealed, and the bits of
  what lies on its devices with what was saved.
  """
  failed = []
  (folder / "apart").mkdir()
  first = seen_by(SAVED_BY, folder / "apart", rewind=False)
  for hosts in restored_by:
    seen = seen_by(hosts, folder / "apart", rewind=True)
    if seen is None or seen["step"] != 3 or any(seen["wrong"]) or seen["ids"] != _ids(3):
      failed.append(f"{hosts}: {seen}")
  (folder / "chain").mkdir()
  for place, hosts in enumerate(chain):
    seen = seen_by(hosts, folder / "chain", rewind=False)
    if seen is None or seen["step"] != 3 * place or seen["ids"] != _ids(3 * place):
      failed.append(f"{hosts} of the chain: {seen}")
    if seen is None or any(seen["wrong"]):
      break
  if first is None or first["ids"] != _ids(0):
    failed.append(f"{SAVED_BY}: {first}")
  counts = " -> ".join(str(hosts.processes) for hosts in chain)
  return Row(
    "R5",
    "saved by 2 processes of 4 devices: restored on other meshes, devices and processes with the"
    " same digest and bits; the same samples of every step whatever the number of hosts",
    f"{len(restored_by)} meshes, {counts} hosts: {len(failed)} failures",
    held=not failed,
    details={"failures": failed},
  )


def seen_by(hosts: Hosts, folder: pathlib.Path, *, rewind: bool) -> dict | None:
  """What the processes report; None if they have failed."""
  report = folder / "report"
  report.unlink(missing_ok=True)
  arguments = str(folder / "checkpoints"), str(report), hosts.mesh, rewind
  started = saver.start(saver.go_on, *arguments, processes=hosts.processes, devices=hosts.devices)
  for process in started:
    process.join(300)
  if any(process.exitcode for process in started) or not report.exists():
    for process in started:
      process.kill()
    return None
  return json.loads(report.read_text())


def _ids(step: int) -> list[list[int]]:
  """The samples of the three batches after a step, from one process that reads all."""
  data = saver.batches()
  read = [next(data)["id"].tolist() for _ in range(step + 3)]
  return read[step:]
