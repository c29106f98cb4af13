"""Numbers that go wrong in training: steps that are skipped, runs that end, and rewinds.

`python -m benchmarks.reliability.numbers '{"12": 5}' FLAGS` is `magneto_jax.train` with FLAGS, and
a loss that is not finite in batch 12.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.reliability.rows import Row
from magneto_jax import cli, program, reporting, runs, sharding, train, training
from magneto_jax.checkpoints import Checkpointer
from magneto_jax.config import TrainConfig, from_config_dict
from magneto_jax.data import pipelines
from magneto_jax.tasks import TASKS

# What the largest weight of a batch brings about, where it is more than 1.
SPIKE, GRADIENT_NAN, GRADIENT_INF, LOSS_NAN, LOSS_INF = 2, 3, 4, 5, 6
_OF_LOSS = {SPIKE: 100.0, LOSS_NAN: np.nan, LOSS_INF: np.inf}
_OF_GRADIENT = {GRADIENT_NAN: np.nan, GRADIENT_INF: np.inf}
NOT_FINITE = (*_OF_GRADIENT, LOSS_NAN, LOSS_INF)

SMALL = {
  "batch_size": 4,
  "eval_every": 10_000,
  "eval_batches": 1,
  "log_every": 1,
  "sample_tokens": 0,
  "model": {"layers": 1, "width": 16, "ffn_width": 32, "heads": 2, "dropout": 0.1},
  "data": {"tokenizer": "byte", "seq_length": 16},
  "optimizer": {"schedule": "constant", "warmup_steps": 8, "clip_norm": 1.0},
}


# ---------------------------------------------------------------------------------------------
# A task with faults
# ---------------------------------------------------------------------------------------------


@jax.custom_vjp
def _with_gradient(x, factor):
  """x, whose gradient is multiplied by the factor."""
  del factor
  return x


_with_gradient.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, None))


def _score(nats_BT, batch):
  mark = jnp.max(batch["weights"])
  pick = lambda table: sum((jnp.where(mark == m, v, 0.0) for m, v in table.items()), 0.0)
  of_loss = jnp.where(jnp.isin(mark, jnp.array(list(_OF_LOSS), mark.dtype)), pick(_OF_LOSS), 1.0)
  is_of_gradient = jnp.isin(mark, jnp.array(list(_OF_GRADIENT), mark.dtype))
  of_gradient = jnp.where(is_of_gradient, pick(_OF_GRADIENT), 1.0)
  weights = jnp.minimum(batch["weights"], 1.0)
  loss_sum = _with_gradient(jnp.sum(nats_BT * weights) * of_loss, of_gradient)
  return loss_sum, jnp.sum(weights)


class _Marked:
  """Samples, some of which carry a mark."""

  def __init__(self, samples, marks: Mapping[int, int]):
    self._samples, self._marks = samples, marks

  def __getattr__(self, name):
    return getattr(self._samples, name)

  def __len__(self) -> int:
    return len(self._samples)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    sample = self._samples[index]
    if index not in self._marks:
      return sample
    weights = sample["weights"].copy()
    weights[0] = self._marks[index]
    return {**sample, "weights": weights}


class _Indices:
  """As many samples, each its own index."""

  def __init__(self, count: int):
    self._count = count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return {"index": np.int64(index)}


@contextlib.contextmanager
def faults(marks: Mapping[int, int], config: TrainConfig = None) -> Iterator[None]:
  """Within, causal language models are trained with faults in the marked batches of a run.

  Args:
    marks: what happens, by the index of the batch.
    config: of the run, whose order of the data decides what is in a batch; the small one's order
      if there is none.
  """
  config = config or from_config_dict(SMALL)
  task = TASKS["causal_lm"]

  def load_data(*args):
    data = task.load_data(*args)
    order = pipelines.train_iterator(
      _Indices(len(data.train)), batch_size=config.batch_size, seed=config.seed
    )
    samples = {}
    for k in range(max(marks, default=-1) + 1):
      batch = next(order)
      if k in marks:
        # Of one part of a batch that is accumulated.
        samples[int(batch["index"][0])] = marks[k]
    return dataclasses.replace(data, train=_Marked(data.train, samples))

  with mock.patch.dict(TASKS, {"causal_lm": task._replace(load_data=load_data, score=_score)}):
    yield


# ---------------------------------------------------------------------------------------------
# The trials
# ---------------------------------------------------------------------------------------------


def _same(a, b) -> bool:
  """Whether two trees hold the same bits."""
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


def _finite(tree) -> bool:
  return all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in jax.tree.leaves(tree))


def skipped(positions: int, seed: int, folder: pathlib.Path) -> Row:
  """A loss or gradient that is not finite at each of the first steps in turn, warm-up included.

  The reference goes on from the state before the bad step, with only its counters of steps moved.
  One compiled program serves all; a batch is accumulated of two parts, one of which is bad.
  """
  del folder
  steps = positions + 3
  config = from_config_dict({**SMALL, "steps": steps, "accumulation": 2, "ema": 0.9})
  rng = np.random.default_rng(seed)
  with faults({}):
    facts = TASKS[config.task].planned_facts(config)
    mesh = sharding.make_mesh(config.mesh.sizes())
    compiled = program.compile_step(config, facts, mesh)
  shape = config.batch_size, config.data.seq_length

  def draw() -> dict[str, np.ndarray]:
    tokens = rng.integers(4, 260, (shape[0], shape[1] + 1)).astype(np.int32)
    return {
      "inputs": tokens[:, :-1],
      "targets": tokens[:, 1:],
      "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
      "segment_ids": np.ones(shape, np.int32),
      "weights": np.ones(shape, np.float32),
    }

  batches = [draw() for _ in range(steps)]
  key = jax.device_put(jax.random.key(seed + 1), compiled.key.sharding)
  state = compiled.init(jax.random.key(seed))
  take = lambda state, batch: compiled.step(state, compiled.put(batch), key)
  copy = functools.partial(jax.tree.map, jnp.copy)

  def rest(state, begin: int):
    finite = True
    for batch in batches[begin:]:
      state, _ = take(state, batch)
      finite &= _finite(state.eval_variables)
    return state, finite

  failed = []
  for position in range(positions):
    mark = NOT_FINITE[position % len(NOT_FINITE)]
    weights = batches[position]["weights"].copy()
    weights[position % shape[0], 0] = mark
    bad, metrics = take(copy(state), {**batches[position], "weights": weights})
    values = np.array([metrics["loss"], metrics["gradient_norm"]])
    parts = lambda state: (state.params, state.opt_state, state.ema_params, state.variables)
    reference = copy(state)
    moved = {"skipped": reference.skipped + 1, "skipped_in_a_row": reference.skipped_in_a_row + 1}
    reference = reference.replace(step=reference.step + 1, **moved)
    checks = {
      "a value was not finite": not np.isfinite(values).all(),
      "nothing changed": _same(parts(bad), parts(state)) and _finite(parts(bad)),
      "counted": int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == 1,
    }
    (after, finite), (expected, _) = rest(bad, position + 1), rest(reference, position + 1)
    checks["finite after"] = finite
    checks["as without it"] = _same(after, expected)
    checks["one skipped"] = (int(after.skipped), int(after.skipped_in_a_row)) == (1, 0)
    failed += [{"step": position, "mark": mark, "check": n} for n, ok in checks.items() if not ok]
    state, _ = take(state, batches[position])
  bad = len({(failure["step"]) for failure in failed})
  return Row(
    "R9",
    f"a NaN or Inf in the loss or gradient at each of {positions} steps: parameters always finite,"
    " exactly that step skipped, all after it as without it, bit for bit",
    f"{positions - bad} of {positions}",
    not failed,
    {"positions": positions, "warmup_steps": config.optimizer.warmup_steps, "failed": failed},
  )


def flags(config: Mapping[str, Any], prefix: str = "--config.") -> list[str]:
  """The command's flags for fields of a config."""
  found = []
  for name, value in config.items():
    nested = isinstance(value, Mapping)
    found += flags(value, f"{prefix}{name}.") if nested else [f"{prefix}{name}={value}"]
  return found


def _params(workdir: pathlib.Path, step: int):
  """The parameters of a checkpoint."""
  return runs.load(workdir, step=step).variables


def ended(bad_from: int, seed: int, folder: pathlib.Path) -> Row:
  """A process whose every loss from one batch on is NaN."""
  workdir, limit = folder / "ended", 10
  config = {**SMALL, "seed": seed, "steps": 200, "checkpoint_every": 5, "keep_checkpoints": 3}
  marks = dict.fromkeys(range(bad_from, bad_from + limit + 2), LOSS_NAN)
  command = [sys.executable, "-m", "benchmarks.reliability.numbers", json.dumps(marks)]
  command += ["--config=configs/gpt.py:tiny", f"--workdir={workdir}", *flags(config)]
  root = str(pathlib.Path(__file__).resolve().parents[2])
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, *sys.path)))}
  result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
  said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
  last = bad_from + limit  # Batch k is that of step k + 1.
  with Checkpointer(runs.checkpoints_in(workdir), read_only=True) as checkpointer:
    kept = checkpointer.steps
  checks = {
    "exit code": result.returncode == cli.DIVERGED,
    "one line": len(said) == 1 and "Traceback" not in result.stderr,
    "names the step": f"at step {last} " in "".join(said),
    "names the checkpoint": f"the checkpoint of step {max(kept, default=None)} is kept" in said[0]
    if said
    else False,
    "each was told": result.stdout.count(" is skipped, as its loss is nan") == limit,
    "checkpoints are kept": len(kept) == 3,
    "checkpoints are finite": all(_finite(_params(workdir, step)) for step in kept),
  }
  failed = [name for name, ok in checks.items() if not ok]
  return Row(
    "R9",
    f"after {limit} such steps in a row the run ends with exit code {cli.DIVERGED}, one line, and"
    " finite checkpoints",
    f"exit code {result.returncode} at step {last}, checkpoints {kept}",
    not failed,
    {"failed": failed, "stderr": result.stderr[-2000:] if failed else ""},
  )


def rewound(back: int, seed: int, folder: pathlib.Path) -> Row:
  """A spike: a run that goes back by itself, one taken back by hand, and one without the batches.

  Args:
    back: how many steps it goes back at least.
    seed: of the runs.
    folder: for their workdirs.
  """
  every, window = 20, 20
  spike = back + 2 * every + 1  # The step; its batch is the one before.
  steps = spike + every - 1
  kept = back // every + 3
  common = {**SMALL, "seed": seed, "checkpoint_every": every, "keep_checkpoints": kept}
  rules = {"window": window, "rewind_steps": back, "skip_batches": back + every}
  ruled = from_config_dict({**common, "steps": steps, "spike": {**rules, "factor": 50.0}})
  plain = lambda steps, skip: from_config_dict({**common, "steps": steps, "skip_batches": skip})
  marks = {spike - 1: SPIKE}
  with faults(marks, ruled):
    summary = training.train(ruled, folder / "itself")
    told = summary["rewinds"]
    to = told[0]["to"] if told else 0
    skip = told[0]["skip_batches"] if told else ""
    training.train(plain(spike + 2, ""), folder / "hand")
    training.train(plain(steps, skip), folder / "hand", rewind_to=to)
    training.train(plain(steps, skip), folder / "anew")

  def end(name: str) -> Any:
    workdir = folder / name
    rows = reporting.read_metrics(workdir)
    return _params(workdir, steps), [row["train/loss"] for row in rows if "train/loss" in row]

  (itself, losses), (hand, hand_losses), (anew, anew_losses) = map(end, ("itself", "hand", "anew"))
  (aside,) = (folder / "itself" / "rewound").iterdir()
  moved = sorted(int(path.name) for path in aside.iterdir() if path.is_dir())
  checks = {
    "one rewind": len(told) == 1 and told[0]["spike"] == spike,
    "far enough": spike - to >= back,
    "as by hand": _same(itself, hand) and losses == hand_losses,
    "as from the start": _same(itself, anew) and losses == anew_losses,
    "nothing deleted": moved == list(range(to + every, spike, every)),
    "the spike is gone": max(losses) < 10,
  }
  failed = [name for name, ok in checks.items() if not ok]
  return Row(
    "R9",
    f"a spike: back by at least {back} steps without a range of batches, by itself, by hand and"
    " from the start alike, bit for bit",
    f"from step {spike} to {to}, without batches {skip}",
    not failed,
    {"failed": failed, "rewinds": told, "moved": moved},
  )


def main() -> None:
  """The command: `magneto_jax.train` with faults."""
  marks = {int(k): mark for k, mark in json.loads(sys.argv.pop(1)).items()}
  (seed,) = [int(arg.split("=")[1]) for arg in sys.argv if arg.startswith("--config.seed=")]
  with faults(marks, from_config_dict({**SMALL, "seed": seed})):
    train.main()


if __name__ == "__main__":
  main()
