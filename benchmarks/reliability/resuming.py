"""Runs that are stopped and go on in another process, beside runs that are left alone."""

import pathlib
import random
import time

from benchmarks.reliability import preemption
from benchmarks.reliability.rows import Row
from magneto_jax import runs

STEPS = 20
# Of a run that is killed: so many that it is not over before.
_LONG = 300
_MESH = ("--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.tensor=2")


def resumed(
  processes: int, devices: int, workers: int, *, killed: bool, seed: int, folder: pathlib.Path
) -> Row:
  """R3: 20 steps against 10, a new process and 10 more, with dropout; or a run that is killed.

  Args:
    processes, devices: how many run together, and the simulated devices of each.
    workers: processes of each that prepare batches.
    killed: whether the first process is killed with -9, once it has a checkpoint, and does not end
      by itself.
    seed: of what is random.
    folder: for the runs.

  Returns:
    The row.
  """
  mesh = _MESH if processes * devices == 8 else ()
  # A run evaluates where it ends, too.
  every = ("--config.checkpoint_every=10", f"--config.eval_every={100 if killed else 10}")
  flags = (f"--config.data.workers={workers}", *every, *mesh)
  workdir = folder / f"resumed_{processes}x{devices}_{workers}_{killed}"
  total = _LONG if killed else STEPS
  steps = total if killed else STEPS // 2
  with preemption.Hosts(
    workdir, processes, f"--config.steps={steps}", *flags, devices=devices
  ) as hosts:
    if killed:
      hosts.wait_for("step 12/")
      while not runs.last_step(workdir) and hosts.processes[0].poll() is None:
        time.sleep(0.01)
      time.sleep(random.Random(seed).uniform(0, 0.3))
      for process in hosts.processes:
        process.kill()
    else:
      codes = hosts.codes()
      if codes != [0] * processes:
        raise RuntimeError(f"the first half ends with {codes}: {hosts.said()[-2000:]}")
  stopped_at = runs.last_step(workdir)
  different = preemption.differing(workdir, processes, total, *flags, devices=devices)
  how = "kill -9 and a new process" if killed else "10 steps, a new process and 10"
  return Row(
    "R3",
    f"{processes} x {devices} processes x devices, {workers} workers, dropout: {how} is bit for bit"
    f" the run of {total} steps: parameters, optimizer, place in the data, metrics",
    f"{'equal' if not different else 'not equal'}; stopped at step {stopped_at}",
    not different and (0 < stopped_at < total if killed else stopped_at == STEPS // 2),
    {"differing": different, "stopped_at": stopped_at},
  )
