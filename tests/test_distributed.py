"""Several processes: how they are found, what they agree on, and which rows each reads.

Two real ones talk over 127.0.0.1; this file is also what they run.
"""

import ctypes
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from magneto_jax import cli, distributed, sharding
from magneto_jax.data import feed, packing, pipelines
from tests import simulated

BATCH, LENGTH, DEVICES = 8, 4, 2  # Devices of each process.

# Devices 0 and 1 are of process 0, and 2 and 3 of process 1. {name: (devices by mesh axes data and
# sequence, the rows that each process reads)}.
MESHES = {
  "data": ([[0], [1], [2], [3]], (range(4), range(4, 8))),
  "data, as on a torus": ([[0], [2], [1], [3]], ([0, 1, 4, 5], [2, 3, 6, 7])),
  "sequence within a host": ([[0, 1], [2, 3]], (range(4), range(4, 8))),
  "sequence across hosts": ([[0, 2], [1, 3]], (range(8), range(8))),
  "sequence": ([[0, 1, 2, 3]], (range(8), range(8))),
}


def _dataset():
  tokens = np.arange(4, 4 + 20 * LENGTH + 2, dtype=np.uint16)
  return packing.PackedDataset(tokens, np.array([0, len(tokens)]), LENGTH, False)


# ---------------------------------------------------------------------------------------------
# What the two processes do
# ---------------------------------------------------------------------------------------------


def _refused(f, *args):
  try:
    f(*args)
  except ValueError as error:
    return str(error)


def _global_batches(devices):
  """This process's rows, and three global batches as they lie on all devices."""
  ids = {device.id: device for device in jax.devices()}
  array = np.array([[ids[sorted(ids)[i]] for i in row] for row in devices])
  data, sequence = array.shape
  mesh = Mesh(array.reshape(1, data, 1, sequence, 1), sharding.MESH_AXES)
  rows = sharding.rows_of_process(mesh, BATCH)
  laid_out = NamedSharding(mesh, P("data", "sequence"))

  def put(batch):
    place = jax.make_array_from_process_local_data
    return {name: place(laid_out, values, (BATCH, LENGTH)) for name, values in batch.items()}

  options = {"batch_size": BATCH, "seed": 1, "rows": rows}
  start = lambda k: pipelines.train_iterator(_dataset(), **options, start=k)
  batches = feed.Feed(start, put)
  gathered = [
    multihost_utils.process_allgather(next(batches)["inputs"], tiled=True) for _ in range(3)
  ]
  batches.close()
  return {"rows": rows, "batches": [batch.tolist() for batch in gathered]}


def _work(join, folder):
  """Everything that one of the two does; returns what it has seen."""
  join()
  join()  # A second time does nothing.
  me, other = jax.process_index(), 1 - jax.process_index()
  seen = {
    "processes": jax.process_count(),
    "devices": [jax.device_count(), jax.local_device_count()],
    "first": distributed.is_first(),
  }

  time.sleep(0.5 * other)  # Process 0 comes late.
  (folder / f"here_{me}").touch()
  seen["everywhere"] = distributed.everywhere({"process": me})
  seen["waited"] = (folder / f"here_{other}").exists()

  def prepare():
    found = (folder / "prepared").exists()
    time.sleep(0.5)
    (folder / "prepared").touch()
    return found

  seen["found"] = distributed.on_first(prepare)

  def failing(on):
    def f():
      (folder / f"tried_{on}_on_{me}").touch()
      if me == on:
        raise OSError("the disk is full")

    return f

  seen["failures"] = []
  for on in range(2):
    try:
      distributed.on_first(failing(on))
    except Exception as error:
      seen["failures"].append(f"{type(error).__name__}: {error}")
  seen["tried"] = sorted(path.name for path in folder.glob("tried_*"))

  distributed.agree("config", {"seed": 0, "model": {"layers": [2, 3]}, "é": None})
  seen["disagree"] = [
    _refused(distributed.agree, "config", value)
    for value in (
      {"seed": me, "model": {"layers": 2, "width": 16 * (me + 1)}},
      {"model": {"layers": 2, **({"width": 3} if me else {})}},
      {"model": {} if me else None},
      me,
      "x" * (200 * (me + 1)),
    )
  ]
  seen["meshes"] = [_global_batches(devices) for devices, _ in MESHES.values()]
  distributed.refuse_unless_shared(folder / "workdir")
  seen["apart"] = _refused(distributed.refuse_unless_shared, folder / f"workdir_{me}")
  multihost_utils.sync_global_devices("end")
  seen["shared"] = [path.name for path in (folder / "workdir").iterdir()]
  return seen


def _main():
  folder = pathlib.Path(os.environ["TEST_FOLDER"])
  join = cli.define_hosts_flags()

  def run():
    print(json.dumps(_work(join, folder)))

  cli.run(run)


# ---------------------------------------------------------------------------------------------
# What they have seen
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """What each of two processes has seen."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  environ = {
    **simulated.devices(DEVICES),
    "TEST_FOLDER": str(tmp_path_factory.mktemp("shared")),
  }
  command = [sys.executable, "-m", "tests.test_distributed", "--num_processes=2"]
  command.append(f"--coordinator_address={address}")
  processes = [
    subprocess.Popen(
      [*command, f"--process_id={i}"],
      env=environ,
      cwd=pathlib.Path(__file__).parents[1],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=120) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], outputs
  return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def test_flags_join_the_processes(two):
  assert [seen["processes"] for seen in two] == [2, 2]
  assert [seen["devices"] for seen in two] == [[2 * DEVICES, DEVICES]] * 2
  assert [seen["first"] for seen in two] == [True, False]


def test_values_of_all_are_told_to_all_when_the_last_is_there(two):
  assert [seen["waited"] for seen in two] == [True, True]
  assert [seen["everywhere"] for seen in two] == [[{"process": 0}, {"process": 1}]] * 2


def test_a_folder_that_is_not_shared_is_refused_on_all(two):
  assert [seen["shared"] for seen in two] == [[], []]
  said = [seen["apart"] for seen in two]
  assert all("is not the same folder on all hosts" in line for line in said)


def test_the_first_prepares_and_the_others_find_it(two):
  assert [seen["found"] for seen in two] == [False, True]


def test_where_one_fails_the_others_are_told_and_behind_the_first_do_not_try(two):
  own = "OSError: the disk is full"
  assert two[0]["failures"] == [own, f"ValueError: process 1 has failed: {own}"]
  assert two[1]["failures"] == [f"ValueError: process 0 has failed: {own}", own]
  assert two[0]["tried"] == ["tried_0_on_0", "tried_1_on_0", "tried_1_on_1"]


def test_a_difference_is_one_line_with_the_values_and_hosts(two):
  assert two[0]["disagree"] == two[1]["disagree"]
  host = socket.gethostname()
  said = [f"on process {i} ({host})" for i in range(2)]
  differ = "the processes of this run differ in "
  assert two[0]["disagree"][:4] == [
    f"{differ}config.model.width (and config.seed): it is 16 {said[0]}; 32 {said[1]}",
    f"{differ}config.model.width: it is absent {said[0]}; 3 {said[1]}",
    f"{differ}config.model: it is null {said[0]}; {{}} {said[1]}",
    f"{differ}config: it is 0 {said[0]}; 1 {said[1]}",
  ]
  assert len(two[0]["disagree"][4]) < 300


@pytest.mark.parametrize("mesh", range(len(MESHES)), ids=MESHES)
def test_the_mesh_decides_the_rows_and_the_batch_is_that_of_one_process(two, mesh):
  rows = list(MESHES.values())[mesh][1]
  assert [seen["meshes"][mesh]["rows"] for seen in two] == [list(r) for r in rows]
  iterator = pipelines.train_iterator(_dataset(), batch_size=BATCH, seed=1)
  for batches in zip(*(seen["meshes"][mesh]["batches"] for seen in two), strict=True):
    expected = next(iterator)["inputs"]
    for batch in batches:
      np.testing.assert_array_equal(batch, expected)


def test_one_process_alone_waits_for_nobody():
  assert distributed.everywhere(2) == [2]
  distributed.refuse_unless_shared(pathlib.Path("nowhere"))
  distributed.agree("config", {"seed": 0})
  assert distributed.on_first(lambda: 3) == 3
  assert distributed.is_first()


# ---------------------------------------------------------------------------------------------
# How processes are found
# ---------------------------------------------------------------------------------------------

SLURM = {
  "SLURM_JOB_ID": "123",
  "SLURM_STEP_NODELIST": "node[1-2]",
  "SLURM_NTASKS": "4",
  "SLURM_PROCID": "2",
  "SLURM_LOCALID": "0",
  "SLURM_STEP_NUM_TASKS": "4",
  "SLURM_STEP_NUM_NODES": "2",
}
ONE_TASK = {**SLURM, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
BATCH_SCRIPT = {k: v for k, v in SLURM.items() if not k.startswith("SLURM_STEP")}
OMPI_5 = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}
OMPI_4 = {**OMPI_5, "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2"}
GKE = {
  "TPU_WORKER_HOSTNAMES": "pod-0.service,pod-1.service",
  "TPU_WORKER_ID": "1",
  "TPU_SKIP_MDS_QUERY": "true",
  "KUBERNETES_SERVICE_HOST": "10.0.0.1",
}
GKE_ONE = {**GKE, "TPU_WORKER_HOSTNAMES": "localhost"}

ENVIRONMENTS = {
  "laptop": ({}, "", None),
  "laptop with a TPU's library": ({"TPU_SKIP_MDS_QUERY": "1"}, "tpu,cpu", None),
  "slurm, 1 task": (ONE_TASK, "", None),
  "slurm, 4 tasks": (SLURM, "cuda", "slurm"),
  "slurm, batch script of 4 tasks": (BATCH_SCRIPT, "", None),
  "open mpi 4": (OMPI_4, "", "ompi"),
  "open mpi 5": (OMPI_5, "", "mpi4py"),
  "open mpi 4 in a slurm job": ({**SLURM, **OMPI_4}, "", "ompi"),
  "open mpi, 1 process": ({**OMPI_4, "OMPI_COMM_WORLD_SIZE": "1"}, "", None),
  "mpich": (HYDRA, "", "mpi4py"),
  "mpich in a slurm job": ({**SLURM, **HYDRA}, "", "mpi4py"),
  "slurm with pmi2": ({**SLURM, "PMI_SIZE": "4", "PMI_RANK": "2"}, "", "slurm"),
  "another launcher with pmi": ({"PMI_SIZE": "4", "PMI_RANK": "2"}, "", "mpi4py"),
  "mpich, 1 process": ({**HYDRA, "PMI_SIZE": "1"}, "", None),
  "gke, 2 workers": (GKE, "tpu,cpu", "gketpu"),
  "gke, 2 workers, told to use CPUs": (GKE, "cpu", None),
  "gke, 1 worker": (GKE_ONE, "tpu,cpu", None),
  "gke, 2 slices": ({**GKE, "MEGASCALE_NUM_SLICES": "2"}, "tpu,cpu", "gketpu"),
  "gke, 2 slices of 1 worker": ({**GKE_ONE, "MEGASCALE_NUM_SLICES": "2"}, "tpu,cpu", "gketpu"),
  "kubernetes without TPUs": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "cuda", None),
  "tpu vm": ({}, "tpu,cpu", "gcetpu"),
}


@pytest.mark.parametrize("environ, platforms, method", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_processes_are_found_by_their_environment(environ, platforms, method):
  assert distributed.launcher(environ, platforms) == method


@pytest.mark.parametrize("environ, platforms, method", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_jax_is_asked_to_join_what_was_found_and_nothing_else(
  environ, platforms, method, monkeypatch
):
  """With no flags; whether mpi4py is there decides nothing but MPI."""
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
  monkeypatch.setattr(os, "environ", dict(environ))
  monkeypatch.setattr(jax, "config", FakeConfig(platforms))
  distributed.initialize()
  heartbeat = {"heartbeat_timeout_seconds": 30}
  options = {"cluster_detection_method": method, "local_device_ids": None, **heartbeat}
  expected = {None: [], "gcetpu": [((), heartbeat)]}.get(method, [((), options)])
  assert calls == expected
  # JAX's own service would catch SIGTERM.
  assert jax.config.jax_enable_preemption_service == (not calls)


class FakeConfig:
  """What of JAX's config is read and set."""

  def __init__(self, platforms):
    self.jax_platforms = platforms or None
    self.jax_enable_preemption_service = True

  def update(self, name, value):
    assert name == "jax_enable_preemption_service"
    self.jax_enable_preemption_service = value


def test_an_older_jax_does_not_keep_sigterm(monkeypatch):
  """JAX 0.8.0 and older have no option: its handler is taken away, and the process's put back."""
  before = signal.signal(signal.SIGTERM, signal.default_int_handler)
  jaxs = []

  def initialize(*args, **kwargs):
    jaxs.append(ctypes.pythonapi.PyOS_setsig(signal.SIGTERM, 1))  # As C code does, unseen.

  ctypes.pythonapi.PyOS_setsig.restype = ctypes.c_void_p
  ctypes.pythonapi.PyOS_setsig.argtypes = (ctypes.c_int, ctypes.c_void_p)
  config = types.SimpleNamespace(jax_platforms=None)
  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  monkeypatch.setattr(jax, "config", config)
  try:
    distributed.initialize("10.0.0.1:1234", 2, 1)
    assert jaxs and signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGTERM)
  finally:
    signal.signal(signal.SIGTERM, before)


def test_what_is_given_is_taken_and_nothing_is_looked_for(monkeypatch):
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
  monkeypatch.setattr(os, "environ", dict(SLURM))
  distributed.initialize("10.0.0.1:1234", 2, 1, heartbeat_timeout=7)
  options = {"cluster_detection_method": "deactivate", "heartbeat_timeout_seconds": 7}
  assert calls == [(("10.0.0.1:1234", 2, 1), options)]


def test_mpi_without_mpi4py_is_one_line(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr(os, "environ", dict(HYDRA))
  with pytest.raises(ValueError, match="pip install mpi4py, or give --coordinator_address"):
    distributed.initialize()


@pytest.mark.parametrize("error, refused", [("coordinator_address should", False), ("x", True)])
def test_a_tpu_vm_alone_is_no_error(error, refused, monkeypatch):
  def initialize(**options):
    raise ValueError(error)

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  monkeypatch.setattr(os, "environ", {})
  monkeypatch.setattr(jax, "config", FakeConfig("tpu,cpu"))
  assert _refused(distributed.initialize) == (error if refused else None)


@pytest.mark.parametrize(
  "visible, changes, devices",
  [
    (None, {}, None),
    ("0,1", {}, None),
    ("3", {}, [0]),
    ("0,1,2,3", {"SLURM_STEP_NUM_TASKS": "2"}, [0, 1, 2, 3]),
    ("", {"SLURM_STEP_NUM_TASKS": "2"}, None),
  ],
  ids=["cpu", "a task a GPU", "--gpus-per-task=1", "a task a node", "a task a node, cpu"],
)
def test_a_slurm_task_uses_the_gpus_that_are_its_own(visible, changes, devices):
  """Of two nodes; None leaves JAX its choice, the GPU of the task's number on its node."""
  environ = {**SLURM, **changes}
  if visible is not None:
    environ["CUDA_VISIBLE_DEVICES"] = visible
  assert distributed.local_devices(environ) == devices


def test_a_slurm_task_alone_on_its_node_uses_all_gpus_where_slurm_names_none():
  alone = {**SLURM, "SLURM_STEP_NUM_TASKS": "2"}
  assert distributed.local_devices(alone, 8) == [*range(8)]
  assert distributed.local_devices(SLURM, 8) is None  # One of several: its own.
  assert distributed.local_devices({**alone, "CUDA_VISIBLE_DEVICES": ""}, 8) is None


@pytest.mark.parametrize(
  "given, message",
  [
    (("127.0.0.1:1", None, None), "give all three, or none"),
    ((None, 2, 0), "give all three, or none"),
    (("127.0.0.1", 2, 0), "coordinator_address='127.0.0.1' must be host:port"),
    (("127.0.0.1:1", 2, 2), r"process_id=2 must lie in \[0, num_processes=2\)"),
    (("127.0.0.1:1", 2, -1), "process_id=-1 must lie in"),
  ],
)
def test_half_an_answer_is_refused(given, message, monkeypatch):
  monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: pytest.fail("started"))
  with pytest.raises(ValueError, match=message):
    distributed.initialize(*given)


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--num_processes=2", "give all three, or none"),
    ("--heartbeat_timeout=1", "heartbeat_timeout=1: 1 is not an integer in the range [5, 3600]"),
  ],
)
def test_the_command_refuses_what_cannot_be_in_one_line(flag, message, tmp_path):
  command = [sys.executable, "-m", "magneto_jax.train", "--config=configs/gpt.py:tiny"]
  command += [f"--workdir={tmp_path / 'run'}", flag]
  result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  assert result.returncode == 2, result.stderr
  assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr
  assert not (tmp_path / "run").exists()


if __name__ == "__main__":
  _main()
