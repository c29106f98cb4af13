"""Several processes as one run: how they find each other, and what they must agree on.

JAX runs one process a host (or a GPU), all with the same program; together they see all devices.
Everything here is a no-op where there is only one.
"""

import functools
import importlib.util
import json
import os
import pathlib
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

# Seconds without a sign of life after which a process is taken for dead, and the others end.
HEARTBEAT_TIMEOUT = 30

# ---------------------------------------------------------------------------------------------
# Start
# ---------------------------------------------------------------------------------------------

# How processes are started: JAX's name of the way to detect it, the variable that holds how many
# there are, and variables that must be there too. The first that has several is taken: MPI before
# SLURM, because what `mpirun` starts inherits the variables of SLURM's step that started it.
_LAUNCHERS = (
  ("ompi", "OMPI_COMM_WORLD_SIZE", ("OMPI_MCA_orte_hnp_uri",)),
  # Open MPI from 5 on, and MPICH's Hydra, which only mpi4py knows how to ask.
  ("mpi4py", "OMPI_COMM_WORLD_SIZE", ()),
  ("mpi4py", "PMI_SIZE", ("MPI_LOCALNRANKS",)),
  # A batch script that is not started by `srun` is no step, and one process however many tasks.
  (
    "slurm",
    "SLURM_STEP_NUM_TASKS",
    ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
  ),
  ("mpi4py", "PMI_SIZE", ()),
)


def initialize(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> None:
  """Joins this process to those that run with it; to be called before devices are first used.

  Without arguments the processes are found as JAX finds them: on TPU VMs, on GKE, under `srun` and
  under `mpirun`. One process alone (a laptop, Colab, a SLURM job of one task) starts nothing.

  Args:
    coordinator_address: `host:port` of process 0, the same on all: it listens there.
    num_processes: how many there are.
    process_id: which this is, from 0.
    heartbeat_timeout: seconds without a sign of life after which a process is taken for dead; JAX
      then ends the others, wherever they wait.

  Raises:
    ValueError: if some of the arguments are given and not all, or they cannot be; or if MPI has
      started the processes, and mpi4py, by which JAX asks it, is not installed.
  """
  given = (coordinator_address, num_processes, process_id)
  if jax.distributed.is_initialized():
    return
  join = functools.partial(_join, heartbeat_timeout_seconds=heartbeat_timeout)
  if given != (None, None, None):
    _check(*given)
    join(*given, cluster_detection_method="deactivate")
    return
  method = launcher(os.environ, jax.config.jax_platforms or "")
  if method == "mpi4py" and importlib.util.find_spec("mpi4py") is None:
    raise ValueError(
      "MPI has started several processes, and JAX asks it by mpi4py: pip install mpi4py, or give"
      " --coordinator_address, --num_processes and --process_id"
    )
  if method == "gcetpu":
    # A machine with TPUs: whether it is one of several, JAX asks the metadata of the machine.
    try:
      join()
    except ValueError as error:
      # What JAX says where it finds nothing, as on Colab.
      if "coordinator_address" not in str(error):
        raise
  elif method is not None:
    local = local_devices(os.environ, _gpus()) if method == "slurm" else None
    join(cluster_detection_method=method, local_device_ids=local)


def _join(*args, **kwargs) -> None:
  """`jax.distributed.initialize`, but for JAX's preemption service.

  It would catch SIGTERM, for those who ask it; `preemption` does that itself.
  """
  has_option = hasattr(jax.config, "jax_enable_preemption_service")
  if has_option:
    jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(*args, **kwargs)
  # JAX 0.8.0 and older always have it: what Python does at the signal is put back in its place.
  if not has_option and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)


def _check(coordinator_address, num_processes, process_id) -> None:
  if None in (coordinator_address, num_processes, process_id):
    raise ValueError(
      "--coordinator_address, --num_processes and --process_id go together: give all three, or none"
    )
  if not re.fullmatch(r".+:\d+", coordinator_address):
    raise ValueError(f"{coordinator_address=} must be host:port, e.g. 10.0.0.1:1234")
  if not 0 <= process_id < num_processes:
    raise ValueError(f"{process_id=} must lie in [0, {num_processes=})")


def launcher(environ: Mapping[str, str], platforms: str) -> str | None:
  """How JAX should find the other processes; None if this is the only one.

  Reads the environment alone.

  Args:
    environ: of the process.
    platforms: JAX's, as `jax.config.jax_platforms` has them: on a machine with TPUs JAX itself puts
      `tpu` there.

  Returns:
    A `cluster_detection_method` of `jax.distributed.initialize`. "gcetpu" where only the machine's
    metadata can tell.
  """
  for method, count, needed in _LAUNCHERS:
    if int(environ.get(count) or 1) > 1 and all(name in environ for name in needed):
      return method
  if "tpu" not in platforms.split(","):
    return None
  # GKE tells every pod its slice's workers; of one slice with one worker there is nothing to join.
  workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
  if workers:
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    return "gketpu" if slices * len(workers.split(",")) > 1 else None
  # Set by JAX where the machine has no TPU, and by whoever knows that there is nobody to ask.
  return None if "TPU_SKIP_MDS_QUERY" in environ else "gcetpu"


def local_devices(environ: Mapping[str, str], present: int = 0) -> list[int] | None:
  """The GPUs of a SLURM task among those that it sees, where JAX's own choice is not meant.

  JAX gives task i of a node its i-th GPU. A task that is alone on its node, or sees just one GPU
  (`--gpus-per-task=1`), is meant to have all that it sees.

  Args:
    environ: of the task.
    present: how many GPUs the node has: all are seen where SLURM does not say which.
  """
  named = environ.get("CUDA_VISIBLE_DEVICES")
  seen = present if named is None else len([gpu for gpu in named.split(",") if gpu])
  alone = environ.get("SLURM_STEP_NUM_TASKS") == environ.get("SLURM_STEP_NUM_NODES")
  return list(range(seen)) if seen and (alone or seen == 1) else None


def _gpus() -> int:
  """How many of NVIDIA's this machine has, as its driver lists them."""
  return len(list(pathlib.Path("/proc/driver/nvidia/gpus").glob("*")))


# ---------------------------------------------------------------------------------------------
# Together
# ---------------------------------------------------------------------------------------------


def is_first() -> bool:
  """Whether this is process 0: the one that writes logs and prints."""
  return jax.process_index() == 0


def everywhere(value: Any) -> list[Any]:
  """A JSON-able value of every process, in their order."""
  return [json.loads(text) for text in _gather(json.dumps(value))]


def agree(name: str, value: Any) -> None:
  """Raises unless the JSON-able `value` is the same on every process.

  Raises:
    ValueError: on every process alike, of one line: what differs and on which hosts.
  """
  texts = _gather(json.dumps(value, sort_keys=True))
  if len(set(texts)) == 1:
    return
  hosts = _gather(socket.gethostname())
  values = [_flatten(json.loads(text), name) for text in texts]
  names = {key: None for flat in values for key in flat}
  different = [key for key in names if len({flat.get(key) for flat in values}) > 1]
  holders: dict[str, list[str]] = {}
  for process, (host, flat) in enumerate(zip(hosts, values, strict=True)):
    held = flat.get(different[0], "absent")
    holders.setdefault(held, []).append(f"process {process} ({host})")
  said = "; ".join(f"{held:.80} on {_first_few(where)}" for held, where in holders.items())
  more = f" (and {_first_few(different[1:])})" if different[1:] else ""
  raise ValueError(f"the processes of this run differ in {different[0]}{more}: it is {said}")


def on_first(f: Callable[[], T]) -> T:
  """Calls `f` on process 0, and when that is done on all others: for files on a shared disk.

  Process 0 writes them, and the others find them. They wait in a collective operation, so what
  takes an hour is better prepared before the run.

  Returns:
    What `f` returned on this process.

  Raises:
    ValueError: if `f` has failed on another process, where its own error goes on; so none waits for
      one that is gone.
  """
  result = failure = None
  for turn in (True, False):
    if is_first() == turn:
      try:
        result = f()
      except Exception as error:
        failure = error
    told = _gather("" if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
      raise failure
    for process, message in enumerate(told):
      if message:
        raise ValueError(f"process {process} has failed: {message}")
  return result


def refuse_unless_shared(folder: pathlib.Path) -> None:
  """Raises unless all processes see in a folder what process 0 leaves there.

  Raises:
    ValueError: on every process alike.
  """
  if jax.process_count() == 1:
    return
  mark = folder / f".shared-{everywhere(secrets.token_hex(8))[0]}"

  def look() -> bool:
    if is_first():
      folder.mkdir(parents=True, exist_ok=True)
      mark.touch()
    return mark.exists()

  seen = everywhere(on_first(look))
  hosts = everywhere(socket.gethostname())
  if is_first():
    mark.unlink()
  if not all(seen):
    others = ", ".join(sorted({h for h, found in zip(hosts, seen, strict=True) if not found}))
    raise ValueError(
      f"{folder} is not the same folder on all hosts (not on {others}): give one that they share"
    )


def leave(code: int) -> NoReturn:
  """Ends this process, of several at once: they wait for each other at their end, perhaps in vain.

  The others are told by JAX that it is gone.
  """
  if not jax.distributed.is_initialized():
    sys.exit(code)
  sys.stdout.flush()
  sys.stderr.flush()
  if is_first():
    time.sleep(2)  # Others that end for the same reason say so first.
  os._exit(code)


def _gather(text: str) -> list[str]:
  """The texts of all processes."""
  if jax.process_count() == 1:
    return [text]
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(data.size))
  padded = np.zeros(max(sizes.max(), 1), np.uint8)
  padded[: data.size] = data
  gathered = multihost_utils.process_allgather(padded)
  return [bytes(row[:size]).decode() for row, size in zip(gathered, sizes, strict=True)]


def _flatten(value: Any, name: str) -> dict[str, str]:
  """{dotted name: JSON} of a JSON value; lists are taken whole."""
  if not isinstance(value, dict) or not value:
    return {name: json.dumps(value)}
  return {k: v for key, part in value.items() for k, v in _flatten(part, f"{name}.{key}").items()}


def _first_few(names: Sequence[str], count: int = 4) -> str:
  more = [f"{len(names) - count} more"] if len(names) > count else []
  return ", ".join([*names[:count], *more])
