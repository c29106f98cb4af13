"""A run that is ready to start: its data loaded, its step compiled, and both in words."""

import dataclasses
import json
import pathlib
from types import MappingProxyType
from typing import NamedTuple

import grain
import jax
import numpy as np

from magneto_jax import distributed, hardware, reporting, runs, sharding
from magneto_jax.config import SCHEDULES, TrainConfig, batch_ranges, config_errors
from magneto_jax.data import feed, pipelines
from magneto_jax.memory import held
from magneto_jax.program import Program, lower_step
from magneto_jax.tasks import TASKS
from magneto_jax.tasks.task import Data, Facts

# Damaged documents that are named where a run is described; the log names all.
_SHOWN_RECORDS = 5


class Job(NamedTuple):
  """A run, ready to start.

  Attributes:
    data: the task's, loaded.
    record: what the workdir keeps of the run.
    batches: the training batches, of which this host reads its rows: an endless iterator.
    program: the compiled step.
  """

  data: Data
  record: runs.Record
  batches: feed.Feed
  program: Program


def prepare(
  config: TrainConfig,
  directory: pathlib.Path,
  earlier: runs.Record | None = None,
  program: Program | None = None,
  *,
  tokenizer_file: str = "",
  facts: Facts = MappingProxyType({}),
) -> Job:
  """Loads the data, builds the model and compiles the step for all devices there are.

  Args:
    config: the run.
    directory: where what is derived from the data is kept.
    earlier: the record of the run that is resumed, if any: other data are then refused before
      anything is written.
    program: the compiled step, of a run that differs in nothing but its data's order, if any.
    tokenizer_file: of the model that the run starts with; empty: as the config says.
    facts: what the model must know beside what the data say; of a run that is resumed those of its
      record are known.

  Raises:
    ConfigError: if the data cannot be had, or the model not be built, or hosts differ.
    FileNotFoundError: likewise, for files that are not there.
    OutOfMemory: if the step needs more than its devices have.
  """
  task = TASKS[config.task]
  with config_errors():
    mesh = sharding.make_mesh(config.mesh.sizes())
    rows = sharding.rows_of_process(mesh, config.batch_size)
    asked = config
    if tokenizer_file:
      data_config = dataclasses.replace(config.data, tokenizer_file=tokenizer_file)
      asked = dataclasses.replace(config, data=data_config)
    # The first host leaves the tokenizer and the token files where the others find them.
    data = distributed.on_first(lambda: task.load_data(asked, directory, earlier and earlier.data))
  # As JSON gives it back: tuples are lists.
  identity, rewinds = json.loads(json.dumps(data.identity)), earlier.rewinds if earlier else ()
  before = earlier.facts if earlier else {}
  record = runs.Record(config, identity, {**before, **facts, **task.facts(data)}, rewinds)
  with config_errors():
    distributed.agree("run", runs.as_json(record))

  def batches(start: int) -> grain.DatasetIterator:
    return pipelines.train_iterator(
      data.train,
      batch_size=config.batch_size,
      seed=config.seed,
      augment=data.augment,
      mix=data.mix,
      num_workers=config.data.workers,
      rows=rows,
      skip=batch_ranges(config.skip_batches),
      start=start,
    )

  with config_errors():
    batches(0).close()  # What cannot be had is said before anything is compiled.
  if program is None:
    lowered = lower_step(config, record.facts, mesh)
    with lowered.memory_in_words():
      program = lowered.compile()
      program.refuse_if_too_large()
  ahead = feed.Feed(batches, program.put, ahead=config.data.prefetch)
  return Job(data, record, ahead, program)


# ---------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------


def title(config: TrainConfig) -> str:
  """What a run is, in a line."""
  model = config.model
  shape = f"{model.layers} layers of width {model.width}"
  return f"{config.recipe}, {shape}, {config.task} on {config.data.name}"


def overview(job: Job) -> list[str]:
  """The recipe, and what a step costs."""
  program, data = job.program, job.data
  config, mesh, task = program.config, program.mesh, program.task
  memory = program.step.memory_analysis()
  kind = mesh.devices.flat[0].device_kind
  peak = hardware.peak_flops(kind)
  least = peak and 1e3 * program.flops / (peak * mesh.size)
  bound = f", at least {least:.3g} ms at the devices' peak" if peak else ""
  cut = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
  devices = f"{mesh.size} x {kind} ({cut}; {jax.process_count()} hosts)" if cut else kind
  each = " on each device" if cut else ""
  state_bytes = held(program.state)
  left_out = len(data.bad_records)
  size = task.size(config)
  counted = f"{config.batch_size} {f'x {size} ' if size > 1 else ''}{task.unit}"
  return [
    f"{title(config)} on {devices}",
    *(f"  {line}" for line in task.describe(config, job.record.facts)),
    f"{reporting.count(program.state.params):,} parameters; a step: {counted}, "
    f"{reporting.in_units(program.flops, 'FLOP')}{bound}",
    f"data: {data.describe()}",
    *(f"left out: {record}" for record in data.bad_records[:_SHOWN_RECORDS]),
    *([f"left out: {left_out:,} damaged documents in all"] if left_out > _SHOWN_RECORDS else []),
    f"memory{each}: state {reporting.in_units(state_bytes, 'B', base=1024)}, a step's temporaries "
    f"{reporting.in_units(memory.temp_size_in_bytes, 'B', base=1024)}",
    f"compiled in {program.lower_seconds + program.compile_seconds:.1f} s",
  ]


def first_batch(job: Job) -> list[str]:
  """The first batch: shapes, and its first sample."""
  batch = next(job.batches)
  lines = ["first batch:"]
  lines += [f"  {name}: {array.dtype}{list(array.shape)}" for name, array in batch.items()]
  sample = {n: np.asarray(x.addressable_shards[0].data)[0] for n, x in batch.items()}
  return [*lines, f"  {job.data.show(sample)}"]


def schedule_notes(config: TrainConfig, earlier: TrainConfig | None) -> list[str]:
  """What a person may not expect of the learning rate; `earlier` is what is resumed, if any."""
  notes = []
  schedule, warmup = config.optimizer.schedule, config.optimizer.warmup_steps
  end = config.optimizer.decay_steps or config.steps
  if warmup >= min(end, config.steps):
    notes.append(f"note: the warm-up of {warmup:,} steps does not end within the run")
  if earlier and "decay_steps" in SCHEDULES[schedule] and not config.optimizer.decay_steps:
    if (before := earlier.steps) != end:
      notes.append(
        f"note: the {schedule} schedule now ends at step {end:,}, not {before:,}, so the rest runs"
        " at another learning rate; to fix its end beforehand set optimizer.decay_steps"
      )
  return notes
