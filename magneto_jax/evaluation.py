"""Evaluation of a model by its task's metrics, over the devices of a mesh.

While a run trains (`training`) its validation set is scored by the same `Evaluator` as any split of
its data afterwards (`evaluate`, whose command is `evaluate.py`).
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from magneto_jax import distributed, reporting, runs, sharding
from magneto_jax.config import (
  RESUMABLE,
  ConfigError,
  TrainConfig,
  config_errors,
  flatten,
  from_config_dict,
)
from magneto_jax.convert import saved
from magneto_jax.data import files, pipelines
from magneto_jax.tasks import TASKS
from magneto_jax.tasks.task import Data, Sample, Totals

# Fields of a run's config that an evaluation may change: where its data lie, what is left out of
# them, the devices, and how texts are searched.
CHANGEABLE = tuple(name for name in RESUMABLE if name.startswith(("beam.", "data.", "mesh.")))
CHANGEABLE += ("data.too_long",)

# What a metric is in other words, that do not depend on the tokenizer or are those of papers.
_IN_OTHER_WORDS: dict[str, tuple[str, Callable[[float], float]]] = {
  "loss_nats_per_token": ("perplexity_per_token", np.exp),
  "bits_per_byte": ("perplexity_per_byte", np.exp2),
}


class Evaluator:
  """What is measured of the samples of data sets; compiled once for each shape of a batch."""

  def __init__(
    self,
    measure: Callable[[Any, Any], dict[str, jax.Array]],
    mesh: jax.sharding.Mesh,
    rows: int,
  ):
    """Takes a function to the devices of a mesh.

    Args:
      measure: `(variables, batch) -> {name: array}`, as `Task.measured` is of a model: numbers, and
        arrays with a row for each of the batch's.
      mesh: of `sharding.make_mesh`; to be used by the caller (`sharding.use_mesh`).
      rows: of a batch, over all hosts together.

    Raises:
      ValueError: if the mesh cannot cut as many rows.
    """
    self._mesh, self._rows = mesh, rows
    self._held = sharding.rows_of_process(mesh, rows)
    self._measure = jax.jit(measure, out_shardings=sharding.replicated(mesh))

  def totals(
    self,
    variables,
    dataset: Sequence[Sample],
    *,
    batches: int = 0,
    before_each: Callable[[], None] = lambda: None,
  ) -> Totals:
    """Of the numbers their sums, in float64; of the arrays all rows, in the samples' order.

    Args:
      variables: the measure's.
      dataset: random-access samples of equal shapes.
      batches: how many are read at most; 0: all.
      before_each: is called before each of them.
    """
    sums: dict[str, float] = {}
    rows: dict[str, list[np.ndarray]] = {}

    def take(measured) -> None:
      for name, value in jax.device_get(measured).items():
        if np.ndim(value):
          rows.setdefault(name, []).append(value)
        else:
          sums[name] = sums.get(name, 0.0) + float(value)

    unread: dict[str, jax.Array] = {}
    read = pipelines.eval_batches(dataset, self._rows, rows=self._held)
    for batch in itertools.islice(read, batches or None):
      before_each()
      # One batch late: the next one is prepared meanwhile, and no more of them wait on the devices.
      coming = self._measure(variables, {name: self._put(held) for name, held in batch.items()})
      take(unread)
      unread = coming
    take(unread)
    # The last batch is filled up.
    joined = {name: np.concatenate(parts)[: len(dataset)] for name, parts in rows.items()}
    return sums | joined

  def _put(self, held: np.ndarray) -> jax.Array:
    """The batch's array, of which this process gives the rows that it holds."""
    place = sharding.batch_sharding(self._mesh, held.ndim)
    shape = (self._rows, *held.shape[1:])
    return jax.make_array_from_process_local_data(place, held, shape)


def in_other_words(scores: Mapping[str, float]) -> dict[str, float]:
  """The metrics with perplexities, a token (exp of its nats) and a byte (2 to its bits).

  Those of different tokenizers can be compared by the byte alone. A task that names a perplexity of
  its own is given none, nor is a loss whose perplexity is beyond float64.
  """
  if any("perplexity" in name for name in scores):
    return dict(scores)
  told = {}
  for name, value in scores.items():
    told[name] = value
    if name in _IN_OTHER_WORDS:
      other, function = _IN_OTHER_WORDS[name]
      with np.errstate(over="ignore"):
        perplexity = float(function(value))
      if math.isfinite(perplexity):
        told[other] = perplexity
  return told


# ---------------------------------------------------------------------------------------------
# A run's model
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Opened:
  """A run's model, laid out over the devices of a mesh.

  Attributes:
    workdir: of the run.
    record: of the run; its config is the one to evaluate with.
    step: of the checkpoint.
    run: the model and its variables.
    mesh: over which they lie.
    rows: of a batch.
    digest: SHA-256 of the record as the workdir has it.
  """

  workdir: str
  record: runs.Record
  step: int
  run: runs.Run
  mesh: jax.sharding.Mesh
  rows: int
  digest: str

  def result(self, started: float, **found: Any) -> dict[str, Any]:
    """What is known of an evaluation that began at a time of `time.perf_counter`."""
    return {
      "workdir": self.workdir,
      "step": self.step,
      "task": self.record.config.task,
      **found,
      "seconds": time.perf_counter() - started,
      "device": jax.devices()[0].device_kind,
      "devices": self.mesh.size,
      "versions": reporting.versions(),
      "config_sha256": self.digest,
    }


def open_run(
  workdir: str | os.PathLike[str],
  *,
  step: int | Literal["best"] | None = None,
  batch_size: int | None = None,
  changes: Mapping[str, Any] | None = None,
) -> Opened:
  """Reads a run, which may go on meanwhile, and writes nothing.

  Args:
    workdir: of the run.
    step: of the checkpoint; the newest complete one by default; "best": see `runs.load`.
    batch_size: rows that are evaluated at a time; by default as many as a train step holds.
    changes: values of CHANGEABLE fields, by dotted name, in place of the run's.

  Raises:
    ConfigError: if a field may not be changed, or the devices are not those of the mesh.
    FileNotFoundError: if there is no run, or no such checkpoint.
  """
  if saved.holds_model(workdir):
    raise ConfigError(
      f"{workdir} is a converted model, which has neither a tokenizer nor data to evaluate on: give"
      " the workdir of a run"
    )
  record = runs.held_record(workdir)
  config = changed(record.config, changes or {})
  rows = batch_size or config.batch_size // config.accumulation
  with config_errors():
    mesh = sharding.make_mesh(config.mesh.sizes())
    sharding.rows_of_process(mesh, rows)
  # The first host's newest: another may see one more.
  step = distributed.everywhere(runs.chosen_step(workdir, record, step))[0]
  run = runs.load(workdir, step=step, place=functools.partial(_placed, mesh))
  digest = files.digest(runs.as_json(record))
  return Opened(str(workdir), record._replace(config=config), step, run, mesh, rows, digest)


def _placed(mesh: jax.sharding.Mesh, abstract):
  """The shapes of a model's variables with the places that they have on a mesh."""
  with config_errors():
    places = sharding.variable_shardings(abstract, mesh)
  place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
  return jax.tree.map(place, abstract, places)


def changed(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
  """The config with other values of CHANGEABLE fields.

  Raises:
    ConfigError: if the model was trained with a field, or there is none of that name.
  """
  values = dataclasses.asdict(config)
  for name, value in changes.items():
    if name in flatten(config) and name not in CHANGEABLE:
      raise ConfigError(
        f"config.{name} is the run's own and cannot be changed in an evaluation, only where its"
        " data lie, what is too long, how many devices share it and how texts are searched:"
        f" {', '.join(CHANGEABLE)}"
      )
    *groups, leaf = name.split(".")
    inner = values
    for group in groups:
      inner = inner.setdefault(group, {})
    inner[leaf] = value
  return from_config_dict(values)


def load_split(opened: Opened, split: str) -> Data:
  """The run's data, with the samples of a split as `validation`.

  What is derived from a split that the run did not read itself (its tokens) is kept beside what the
  run keeps of its own.

  Args:
    opened: the run.
    split: `validation`: what the run is validated on; `train`; or another that the data have.

  Raises:
    ConfigError: if the data are not the run's, or have no such split.
  """
  config, record = opened.record.config, opened.record
  task, expected, asked = TASKS[config.task], record.data, config
  # Of another split it is not the run's validation set that is expected.
  others = () if split == "validation" else ("validation", "left_out")
  if others:
    named = config.data.train_split if split == "train" else split
    data_config = dataclasses.replace(config.data, validation_split=named)
    asked = dataclasses.replace(config, data=data_config)
  expected = {name: value for name, value in expected.items() if name not in others}
  directory = runs.data_in(opened.workdir)
  with config_errors():
    data = distributed.on_first(lambda: task.load_data(asked, directory, expected))
  # As JSON gives it back: tuples are lists.
  identity = json.loads(json.dumps(data.identity))
  identity = {name: value for name, value in identity.items() if name not in others}
  runs.refuse_if_different(
    opened.workdir, record._replace(data=expected), record._replace(data=identity)
  )
  return data


def evaluate(opened: Opened, split: str = "validation") -> dict[str, Any]:
  """A run's metrics on a split, with those of what the model writes by itself.

  Returns:
    JSON-able: `metrics`, the `signatures` of some and, where texts are searched, the `beam`; what
    they are of (workdir, step, task, split, counts, bad_records); `seconds`, devices, versions, and
    a digest of the run's record.

  Raises:
    ConfigError: see `load_split`.
    FloatingPointError: if the loss, or another metric, is not finite.
  """
  started = time.perf_counter()
  data, config, (model, variables) = load_split(opened, split), opened.record.config, opened.run
  task = TASKS[config.task]
  with config_errors(), sharding.use_mesh(opened.mesh):
    evaluator = Evaluator(functools.partial(task.measured, model), opened.mesh, opened.rows)
    totals = evaluator.totals(variables, data.validation)
    refuse_unless_finite(totals["loss"], f"the loss of the split {split!r}", opened)
    scores, counts = task.metrics(totals, data, whole=True), task.counts(data)
    if task.judge is not None:
      judged, texts = task.judge(config, model, variables, data, opened.mesh)
      scores, counts = scores | judged, counts | {"judged": texts}
  for name, value in scores.items():
    refuse_unless_finite(value, f"{name} of the split {split!r}", opened)
  searches = task.translator or task.transcriber or task.captioner
  return opened.result(
    started,
    split=split,
    metrics=in_other_words(scores),
    signatures=task.signatures(config),
    **({"beam": dataclasses.asdict(config.beam)} if searches else {}),
    counts=counts,
    bad_records=len(data.bad_records),
  )


def refuse_unless_finite(value: float, what: str, opened: Opened) -> None:
  """Raises FloatingPointError, naming the checkpoint, for a number that is not finite."""
  if not math.isfinite(value):
    raise FloatingPointError(
      f"{what} is {value} with the weights of step {opened.step}: evaluate an earlier one with"
      " --step"
    )
