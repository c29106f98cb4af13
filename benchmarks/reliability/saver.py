"""Processes that save and restore checkpoints, for others to disturb.

A state is a pure function of the step, so that whoever reads a checkpoint knows what must be there.
"""

import json
import multiprocessing
import os
import pathlib
import socket
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from magneto_jax import distributed
from magneto_jax.checkpoints import Checkpointer
from magneto_jax.data import pipelines

BATCH, SAMPLES = 8, 40

# Processes are forked from one that has imported this already, which uses no device.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])


def start(target: Callable, *args, processes: int = 1, devices: int = 1):
  """Starts `target(*args)` in processes that have joined each other, with devices of their own."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  started = []
  for index in range(processes):
    own = (target, args, (address, processes, index), devices)
    started.append(_CONTEXT.Process(target=_joined, args=own, daemon=True))
    started[-1].start()
  return started


def _joined(target: Callable, args: tuple, processes: tuple, devices: int) -> None:
  os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
  if processes[1] > 1:
    distributed.initialize(*processes)
  target(*args)


# ---------------------------------------------------------------------------------------------
# What is saved
# ---------------------------------------------------------------------------------------------


def state(step: int, rows: int = 64) -> dict[str, dict[str, np.ndarray]]:
  """The parts of a step: random bits of several dtypes; `rows` of 1 KiB in the largest array."""
  random = np.random.default_rng(step)
  return {
    "params": {
      "kernel": random.normal(size=(rows, 256)).astype(np.float32),
      "half": random.normal(size=(8, 64)).astype(jnp.bfloat16),
    },
    "optimizer": {"step": np.int32(step), "mask": random.integers(0, 2, (8, 8)).astype(bool)},
  }


def mesh_of(shape: tuple[int, int]) -> Mesh:
  """Of all devices."""
  return Mesh(np.array(jax.devices()).reshape(shape), ("a", "b"))


def abstract(mesh: Mesh, rows: int = 64):
  """The shapes of a state, cut over a mesh in both dimensions."""

  def place(x):
    where = NamedSharding(mesh, PartitionSpec(*("a", "b")[: x.ndim]))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return jax.tree.map(place, state(0, rows))


def placed(tree, mesh: Mesh, rows: int = 64):
  """A state on the devices."""
  put = lambda x, spec: jax.make_array_from_callback(spec.shape, spec.sharding, lambda at: x[at])
  return jax.tree.map(put, tree, abstract(mesh, rows))


def wrong(found, step: int, rows: int = 64) -> list[str]:
  """The arrays that are not bit for bit what the step's state is; of this process's devices."""
  wanted = jax.tree.leaves(state(step, rows))
  return [
    jax.tree_util.keystr(path)
    for (path, leaf), x in zip(jax.tree_util.tree_leaves_with_path(found), wanted, strict=True)
    for shard in leaf.addressable_shards
    if np.asarray(shard.data).tobytes() != np.ascontiguousarray(x[shard.index]).tobytes()
  ]


def batches(rows: list[int] | None = None):
  """An iterator over numbered samples, of which this process reads some rows."""
  samples = [{"id": np.int32(i)} for i in range(SAMPLES)]
  return pipelines.train_iterator(samples, batch_size=BATCH, seed=1, rows=rows)


# ---------------------------------------------------------------------------------------------
# What the processes do
# ---------------------------------------------------------------------------------------------


def save_forever(folder: str, keep: int) -> None:
  """Saves step after step; the ledger names those that are committed."""
  folder = pathlib.Path(folder)
  mesh, data = mesh_of((jax.device_count(), 1)), batches()
  with Checkpointer(folder / "checkpoints", keep=keep) as checkpointer:
    step = max(checkpointer.steps, default=0)
    while True:
      step += 1
      checkpointer.save(step, placed(state(step), mesh), data, {"step": step})
      if distributed.is_first():
        (folder / "started").touch()
      time.sleep(0.02)  # The steps of a run.
      checkpointer.wait()
      if distributed.is_first():
        with (folder / "ledger").open("a") as ledger:
          ledger.write(f"{step}\n")
          ledger.flush()
          os.fsync(ledger.fileno())


def save_forever_bare(folder: str, keep: int) -> None:
  """`save_forever` with Orbax's own manager."""
  folder = pathlib.Path(folder)
  mesh = mesh_of((1, 1))
  options = ocp.CheckpointManagerOptions(max_to_keep=keep)
  with ocp.CheckpointManager(folder / "checkpoints", options=options) as manager:
    step = max(manager.all_steps(), default=0)
    while True:
      step += 1
      save_bare(manager, step, mesh)
      (folder / "started").touch()
      time.sleep(0.02)
      manager.wait_until_finished()
      with (folder / "ledger").open("a") as ledger:
        ledger.write(f"{step}\n")


def save_bare(manager: ocp.CheckpointManager, step: int, mesh: Mesh, rows: int = 64) -> None:
  """A step's state, with Orbax's own manager."""
  parts = placed(state(step, rows), mesh, rows)
  items = {name: ocp.args.StandardSave(tree) for name, tree in parts.items()}
  items["data"] = ocp.args.JsonSave(batches().get_state())
  items["config"] = ocp.args.JsonSave({"step": step})
  manager.save(step, args=ocp.args.Composite(**items))


def save_once(folder: str, rows: int = 64) -> None:
  """Saves two steps, of which one is kept: the second deletes the first."""
  mesh = mesh_of((jax.device_count(), 1))
  with Checkpointer(folder, keep=1) as checkpointer:
    for step in (1, 2):
      checkpointer.save(step, placed(state(step, rows), mesh), batches(), {"step": step})


def go_on(folder: str, report: str, shape: tuple[int, int], rewind: bool) -> None:
  """Restores the newest step onto a mesh, reads three batches and saves what comes of it.

  Args:
    folder: of the checkpoints; the first of all is made if there is none.
    report: a file for what was seen: wrong arrays of each process, and sample ids by step.
    shape: of the mesh.
    rewind: whether nothing is saved, so that others can do the same.
  """
  mesh, processes = mesh_of(shape), jax.process_count()
  own = [row for row in range(BATCH) if row % processes == jax.process_index()]
  data, step, bad = batches(own), 0, []
  with Checkpointer(folder) as checkpointer:
    if checkpointer.steps:
      step, found = checkpointer.restore_newest(abstract(mesh), data, fall_back=True, say=print)
      bad = wrong(found, step)
    read = [next(data)["id"].tolist() for _ in range(3)]
    step += 3
    if not rewind:
      checkpointer.save(step, placed(state(step), mesh), data, {"step": step})
  told = distributed.everywhere({"wrong": bad, "own": own, "read": read})
  if distributed.is_first():
    ids = [[None] * BATCH for _ in range(3)]
    for process in told:
      for row, found in zip(ids, process["read"], strict=True):
        for place, value in zip(process["own"], found, strict=True):
          row[place] = value
    values = {"step": step - 3, "wrong": [process["wrong"] for process in told], "ids": ids}
    pathlib.Path(report).write_text(json.dumps(values))
