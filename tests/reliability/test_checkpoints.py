"""Checkpoints under faults, in short; the long form is benchmarks/reliability/."""

import json
import shutil
import subprocess
import sys

import pytest

from benchmarks.reliability import crashes, damage, disk, meshes, rows


@pytest.mark.ci
@pytest.mark.parametrize("kills, processes", [(15, 1), (3, 2)])
def test_what_is_killed_loses_nothing(kills, processes, tmp_path):
  row = crashes.killed(kills, processes, 0, tmp_path)
  assert row.held, row


@pytest.mark.ci
def test_no_damage_is_missed(tmp_path):
  """In a process of its own: what Orbax leaves undone at an error would fail a later test."""
  code = "import json, pathlib, sys; from benchmarks.reliability import damage;"
  code += "print(json.dumps(damage.mutated(50, 0, pathlib.Path(sys.argv[1]))))"
  command = [sys.executable, "-c", code, str(tmp_path)]
  result = subprocess.run(command, capture_output=True, text=True)
  row = rows.Row(*json.loads(result.stdout)) if result.returncode == 0 else None
  assert row is not None and row.held, (row, result.stderr)


@pytest.mark.ci
def test_all_hosts_go_back_together(tmp_path):
  row = damage.gone_back(tmp_path)
  assert row.held, row


@pytest.mark.ci
# What tensorstore tells of a save that has failed may find Orbax's loop closed already.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_damages_nothing(tmp_path):
  try:
    row = disk.filled(2, 0, tmp_path)
  except PermissionError as error:
    pytest.skip(str(error))
  assert row.held, row


@pytest.mark.ci
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_seal_is_written_last(tmp_path):
  trial = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, text=True)
  if trial.returncode:
    pytest.skip(f"processes may not be traced here: {trial.stderr}")
  row = disk.committed(tmp_path)
  assert row.held, row


@pytest.mark.ci
def test_a_run_moves_from_two_hosts_to_one(tmp_path):
  row = meshes.moved(meshes.RESTORED_BY[2:3], meshes.CHAIN[:2], tmp_path)
  assert row.held, row


@pytest.mark.slow
def test_checkpoints_move_to_all_meshes(tmp_path):
  row = meshes.moved(meshes.RESTORED_BY, meshes.CHAIN, tmp_path)
  assert row.held, row


# ---------------------------------------------------------------------------------------------
# What strace saw, read
# ---------------------------------------------------------------------------------------------


def test_what_comes_too_late_is_found(tmp_path):
  """A trace in order, and each of its lines left out or moved behind the seal."""
  checkpoints = tmp_path / "checkpoints"
  (checkpoints / "2" / "params").mkdir(parents=True)
  (checkpoints / "2" / "params" / "x").write_text("x")
  disk.seals.write(checkpoints / "2", 2, {})
  unfinished = f"{checkpoints}/2.orbax-checkpoint-tmp"
  trace = [
    f"7 write(3<{unfinished}/params/x>, ..., 1) = 1",
    f"7 fsync(3<{unfinished}/params/x> <unfinished ...>",
    "8 write(4</elsewhere>, ..., 1) = 1",
    "7 <... fsync resumed>) = 0",
    f"7 fsync(3<{unfinished}/params>) = 0",
    f"7 fsync(3<{unfinished}>) = 0",
    f'7 rename("{unfinished}/.sealed.json.1", "{unfinished}/sealed.json") = 0',
    f"7 fsync(3<{unfinished}>) = 0",
    f'7 rename("{unfinished}", "{checkpoints}/2") = 0',
    f"7 fsync(3<{checkpoints}>) = 0",
    f'7 rename("{checkpoints}/1", "{checkpoints}/.trash/1") = 0',
  ]
  problems = lambda lines: disk.unordered("\n".join(lines), checkpoints)[0]
  assert problems(trace) == []
  for line in (4, 5, 7, 9):
    assert len(problems(trace[:line] + trace[line + 1 :])) == 1, trace[line]
    assert problems(trace[:line] + trace[line + 1 :] + [trace[line]]), trace[line]
  assert problems([*trace[1:6], trace[0], *trace[6:]]) == ["params/x is not synced before the seal"]
