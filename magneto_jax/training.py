"""A run: data in, the program around which it turns, what it reports; `train.py` is its command."""

import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import math
import os
import pathlib
import tempfile
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from magneto_jax import (
  decoding,
  diagnostics,
  distributed,
  hardware,
  preemption,
  reporting,
  runs,
  sharding,
)
from magneto_jax.checkpoints import Checkpointer, refuse_if_no_room
from magneto_jax.config import ConfigError, TrainConfig, batch_ranges, config_errors
from magneto_jax.data import feed, pipelines
from magneto_jax.memory import held
from magneto_jax.monitor import Monitor
from magneto_jax.program import Program, TrainState, lower_step
from magneto_jax.spikes import Diverged, Watch, restart
from magneto_jax.tasks import TASKS

# Damaged documents that are named where a run is described; the log names all.
_SHOWN_RECORDS = 5


def evaluate(eval_step, params, batches) -> tuple[float, float]:
  """Sums of losses and of weights over batches, in float64."""
  sums, unread = np.zeros(2), np.zeros(2)
  for batch in batches:
    # One batch late: the next one is prepared meanwhile, and no more of them wait on the devices.
    coming = eval_step(params, batch)
    sums += np.asarray(unread, np.float64)
    unread = coming
  return tuple(sums + np.asarray(unread, np.float64))


class Job(NamedTuple):
  """A run, ready to start.

  Attributes:
    data: the task's, loaded.
    record: what the workdir keeps of the run.
    batches: the training batches, of which this host reads its rows: an endless iterator.
    program: the compiled step.
  """

  data: Any
  record: runs.Record
  batches: feed.Feed
  program: Program


def prepare(
  config: TrainConfig,
  directory: pathlib.Path,
  earlier: runs.Record | None = None,
  program: Program | None = None,
) -> Job:
  """Loads the data, builds the model and compiles the step for all devices there are.

  Args:
    config: the run.
    directory: where what is derived from the data is kept.
    earlier: the record of the run that is resumed, if any: other data are then refused before
      anything is written.
    program: the compiled step, of a run that differs in nothing but its data's order, if any.

  Raises:
    ConfigError: if the data cannot be had, or the model not be built, or hosts differ.
    FileNotFoundError: likewise, for files that are not there.
    OutOfMemory: if the step needs more than its devices have.
  """
  task = TASKS[config.task]
  with config_errors():
    mesh = sharding.make_mesh(config.mesh.sizes())
    rows = sharding.rows_of_process(mesh, config.batch_size)
    # The first host leaves the tokenizer and the token files where the others find them.
    data = distributed.on_first(
      lambda: task.load_data(config.data, directory, earlier and earlier.data)
    )
  # As JSON gives it back: tuples are lists.
  identity, rewinds = json.loads(json.dumps(data.identity)), earlier.rewinds if earlier else ()
  record = runs.Record(config, identity, task.facts(data), rewinds)
  with config_errors():
    distributed.agree("run", runs.as_json(record))
  with config_errors():
    batches = pipelines.train_iterator(
      data.train,
      batch_size=config.batch_size,
      seed=config.seed,
      num_workers=config.data.workers,
      rows=rows,
      skip=batch_ranges(config.skip_batches),
    )
  if program is None:
    lowered = lower_step(config, record.facts, mesh)
    with lowered.memory_in_words():
      program = lowered.compile()
      program.refuse_if_too_large()
  ahead = feed.Feed(batches, program.put, ahead=config.data.prefetch)
  return Job(data, record, ahead, program)


def dry_run(config: TrainConfig, workdir: str | os.PathLike) -> None:
  """Prints what `train` would run: recipe, parameters, memory, the first batch; leaves nothing."""
  console = reporting.make_console(quiet=not distributed.is_first())
  with config_errors():
    distributed.agree("config", dataclasses.asdict(config))
  with tempfile.TemporaryDirectory() as scratch:
    earlier = runs.resumable(workdir, config)
    job = prepare(config, runs.data_in(workdir if earlier else scratch), earlier)
    if earlier:
      runs.refuse_if_different(workdir, earlier, job.record)
    _print(console, _overview(job))
    console.print(reporting.parameter_table(job.program.state.params))
    with contextlib.closing(job.batches):
      _print(console, _first_batch(job))


class _Rewind(Exception):
  """A spike: from which step to go on, and without which batches."""

  def __init__(self, spike: int, to: int, skip: str, program: Program):
    super().__init__(spike, to, skip)
    self.spike, self.to, self.skip, self.program = spike, to, skip, program


def train(config: TrainConfig, workdir: str | os.PathLike, *, rewind_to: int | None = None) -> dict:
  """Trains, evaluates, saves and reports; a run that the workdir holds already is resumed.

  A step whose loss or gradient is not finite is skipped. With `config.spike` a run whose loss rises
  suddenly goes on from an earlier checkpoint, without the batches around the spike: just as one
  that is stopped, and started again with `rewind_to` and those `skip_batches`.

  Args:
    config: the run.
    workdir: made if it does not exist; see `runs` for what it holds.
    rewind_to: the step of a checkpoint to go on from, 0 for the start; None for the newest.

  Returns:
    What `summary.json` holds.

  Raises:
    ConfigError: if the config cannot be run, or the workdir holds another run, or one that is past
      the config's steps.
    Diverged: after `max_skipped` steps in a row that were skipped, or `spike.limit` rewinds, or a
      validation loss that is not finite; the checkpoints are kept.
    Preempted: on every process, if one of them receives SIGTERM: after at most two more steps, once
      the last is saved.
  """
  spike = program = None
  with preemption.watched() as notice:
    while True:
      try:
        return _train(config, pathlib.Path(workdir), notice, rewind_to, spike, program)
      except _Rewind as rewind:
        spike, rewind_to, program = rewind.spike, rewind.to, rewind.program
        both = ",".join(filter(None, (program.config.skip_batches, rewind.skip)))
        config = dataclasses.replace(config, skip_batches=both)
      # The state that is left behind, of which devices may hold no second one.
      gc.collect()


def _train(
  config: TrainConfig,
  workdir: pathlib.Path,
  notice: preemption.Notice,
  rewind_to: int | None,
  spike: int | None,
  program: Program | None,
) -> dict:
  """`train` to the end or the next spike, after the rewind for the last one, if any."""
  started = time.perf_counter()
  is_first = distributed.is_first()
  console = reporting.make_console(quiet=not is_first)

  # ------------------------------------------------------------------------ Where the run stands
  # Before the data is read: with other data settings, reading it would fail less clearly.
  with config_errors():
    distributed.agree("config", {**dataclasses.asdict(config), "rewind_to": rewind_to})
    distributed.refuse_unless_shared(workdir)
  earlier = runs.resumable(workdir, config)
  if rewind_to is not None:
    earlier = runs.rewind(workdir, earlier, config, rewind_to, spike)
  start = runs.last_step(workdir)
  if start > config.steps:
    raise ConfigError(
      f"{workdir} is at step {start} already: set steps to more than {start}, or use another"
      " workdir"
    )
  config = runs.with_batches_left_out(config, earlier, start)
  summary = runs.read_summary(workdir)
  if start == config.steps and summary and summary.get("steps") == start:
    _print(console, [f"{workdir} is finished: to go on, set steps to more than {config.steps}"])
    _print(console, _closing(summary, workdir))
    return summary

  # ------------------------------------------------------------------------- What will be run
  job = prepare(config, runs.data_in(workdir), earlier, program)
  program, task, model = job.program, job.program.task, job.program.model
  if earlier:
    runs.refuse_if_different(workdir, earlier, job.record)
  with config_errors():
    directory, parts = runs.checkpoints_in(workdir), program.state.parts()
    distributed.on_first(lambda: refuse_if_no_room(directory, parts, config.keep_checkpoints))
  _print(console, [*_overview(job), *schedule_notes(config, earlier and earlier.config)])

  def make_keys() -> list[jax.Array]:
    root_key = jax.random.key(config.seed)
    return [jax.random.fold_in(root_key, i) for i in range(3)]

  # Compiled, as a host can only put arrays on its own devices.
  whole = program.key.sharding
  parameter_key, dropout_key, sample_key = jax.jit(make_keys, out_shardings=whole)()
  eval_step = jax.jit(lambda params, batch: task.loss(model, params, batch), out_shardings=whole)
  tokens_per_step = config.batch_size * config.data.seq_length
  saved = start

  def noticing(batches):
    for batch in batches:
      notice.check(saved)
      yield batch

  def validate(params) -> dict[str, float]:
    # As many rows at a time as the step has.
    parts = config.accumulation
    size = config.batch_size // parts
    rows = sharding.rows_of_process(program.mesh, size)
    batches = pipelines.eval_batches(job.data.validation, size, rows=rows)
    batches = itertools.islice(batches, parts * config.eval_batches or None)
    put = functools.partial(program.put, parts=parts)
    totals = evaluate(eval_step, params, map(put, noticing(batches)))
    if not all(map(math.isfinite, totals)):
      raise Diverged(
        f"the validation loss is {totals[0]}; the checkpoint of step {saved} is kept: in another"
        " workdir, lower optimizer.learning_rate"
      )
    return task.metrics(*totals, job.data, whole=not config.eval_batches)

  # ------------------------------------------------------------------- Checkpoints and resuming
  with contextlib.ExitStack() as opened:
    with config_errors():
      distributed.on_first(lambda: is_first and opened.enter_context(runs.the_only_one(workdir)))
    # Closing waits for the last checkpoint, also when the run fails.
    checkpointer = opened.enter_context(
      Checkpointer(runs.checkpoints_in(workdir), keep=config.keep_checkpoints)
    )
    opened.enter_context(program.memory_in_words())
    opened.enter_context(contextlib.closing(job.batches))
    opened.enter_context(sharding.use_mesh(program.mesh))
    notice.check(start)  # There may have been an hour of preparing the data, and of compiling.
    if start:
      start, parts = checkpointer.restore_newest(
        program.state.parts(),
        job.batches,
        fall_back=config.on_damage == "fallback",
        say=lambda line: _print(console, [line]),
      )
      saved = start
      state = TrainState.from_parts(parts)
      _print(console, [f"resumed at step {start:,}"])
    else:
      state = program.init(parameter_key)
      console.print(reporting.parameter_table(state.params))
    if is_first:
      runs.write_record(workdir, job.record)
      runs.remove_summary(workdir)
    writer = opened.enter_context(
      contextlib.closing(reporting.MetricWriter(workdir if is_first else None, after_step=start))
    )
    opened = opened.pop_all()

  monitor = None
  if config.diagnostics_every:
    # No more rows than a step holds at a time.
    rows, length = config.batch_size // config.accumulation, config.data.seq_length
    batch = diagnostics.first_samples(job.data.train, rows, length)
    calls = diagnostics.calls_of(task)
    monitor = Monitor(workdir, model, calls, batch, after_step=start, writes=is_first)

  def is_due(step: int, every: int) -> bool:
    return step == config.steps or step % every == 0

  def diagnose(step: int) -> None:
    if step not in monitor.steps:
      writer.write(step, monitor.record(step, state.params))

  def save(step: int) -> None:
    nonlocal saved
    saved = step
    checkpointer.save(step, state.parts(), job.batches, runs.as_json(job.record))

  # --------------------------------------------------------------------------------- The steps
  stopwatch = reporting.Stopwatch()
  waited = read_at = 0.0  # Seconds of waiting for input, and of running, at the last line.
  validation: dict[str, float] = {}
  watch = Watch(config.spike.factor, config.spike.window)

  def refuse_or_rewind(step: int, loss: float, gradient_norm: float, in_a_row: int) -> None:
    """What follows from a step that was skipped, or from a spike."""
    mend = (
      f"the checkpoint of step {saved} is kept: go on from an earlier one with --rewind_to and"
      " --config.skip_batches, or in another workdir lower optimizer.learning_rate or set"
      " optimizer.clip_norm"
    )
    if in_a_row:
      progress.line(
        f"warning: step {step:,} is skipped, as its loss is {loss} and its gradient's norm"
        f" {gradient_norm}"
      )
      if in_a_row >= config.max_skipped:
        raise Diverged(
          f"at step {step} the loss is {loss} and its gradient's norm {gradient_norm}, and"
          f" {in_a_row} steps in a row were skipped; {mend}"
        )
    elif found := watch.spike(loss, gradient_norm):
      before = sum(rewind["spike"] is not None for rewind in job.record.rewinds)
      if before >= config.spike.limit:
        raise Diverged(f"a spike at step {step} ({found}), after {before} rewinds; {mend}")
      to, skip = restart(step, checkpointer.steps, config)
      progress.line(
        f"warning: a spike at step {step:,}: {found}; back to step {to:,}, without batches {skip}"
        f" (rewind {before + 1} of at most {config.spike.limit})"
      )
      raise _Rewind(step, to, skip, program)

  def report(step: int, metrics: dict[str, jax.Array]) -> None:
    """Reads a step's metrics, which waits for the step; so it is called one step late."""
    read = jax.device_get(metrics)
    loss, gradient_norm = float(read["loss"]), float(read["gradient_norm"])
    skipped, in_a_row = int(read["skipped"]), int(read["skipped_in_a_row"])
    refuse_or_rewind(step, loss, gradient_norm, in_a_row)
    nonlocal waited, read_at
    seconds = stopwatch.seconds
    rate = (step - start) * tokens_per_step / seconds
    progress.step(step, loss=loss, tokens_per_second=rate)
    if step % config.log_every == 0 or step == config.steps:
      # A step waits for the host that waits the longest.
      waiting = max(distributed.everywhere(job.batches.waited()))
      # A step that was skipped has no numbers that JSON knows.
      taken = {} if in_a_row else {"train/loss": loss, "train/gradient_norm": gradient_norm}
      row = {
        **taken,
        "train/learning_rate": 0.0 if in_a_row else float(program.schedule(step - 1 - skipped)),
        "train/skipped_steps": skipped,
        "tokens_per_second": rate,
        "input_share": waiting / (seconds - read_at),
      }
      if config.data.skip_bad:
        row["bad_records"] = len(job.data.bad_records)
      waited, read_at = waited + waiting, seconds
      writer.write(step, row)
      left = reporting.duration((config.steps - step) * seconds / (step - start))
      progress.line(
        f"step {step:,}/{config.steps:,}  loss {loss:.3f}  {rate:,.0f} tokens/s  {left} left",
        terminal=False,
      )

  def assess(step: int) -> None:
    nonlocal validation
    validation = validate(state.eval_params)
    writer.write(step, {f"validation/{k}": v for k, v in validation.items()})
    progress.line(f"step {step:,}/{config.steps:,}  validation: {_in_words(validation)}")

  with opened, reporting.Progress(console, start=start, total=config.steps) as progress:
    step, unread = start, None
    try:
      with stopwatch.paused():
        # What a fresh run is compared with, and what was due where an earlier one was broken off.
        if monitor is not None and (is_due(start, config.diagnostics_every) or not monitor.steps):
          diagnose(start)
        if start and is_due(start, config.eval_every):
          if not distributed.everywhere(reporting.has_validation(workdir, start))[0]:
            assess(start)
      for step in range(start + 1, config.steps + 1):
        state, metrics = program.step(state, next(job.batches), dropout_key)
        if unread is not None:
          report(*unread)
        unread = step, metrics
        notice.check(saved)
        if monitor is not None and is_due(step, config.diagnostics_every):
          # Before the checkpoint: what is saved has been measured.
          with stopwatch.paused():
            diagnose(step)
        if is_due(step, config.eval_every) or is_due(step, config.checkpoint_every):
          report(*unread)
          unread = None
          with stopwatch.paused():
            if is_due(step, config.eval_every):
              assess(step)
            if is_due(step, config.checkpoint_every):
              save(step)
    except preemption.Preempted:
      if unread is not None:
        report(*unread)
      if step > saved:
        save(step)
      raise preemption.Preempted(step) from None

    training_seconds = stopwatch.seconds

  # ----------------------------------------------------------------------------------- Summary
  with sharding.use_mesh(program.mesh), program.memory_in_words():
    scores = validation or validate(state.eval_params)
    sample = _sample(job, state.eval_params, sample_key)
  summary = {
    **{f"validation_{k}": v for k, v in scores.items()},
    "baselines": task.baselines(job.data),
    "bad_records": len(job.data.bad_records),
    **_speed(program, config.steps - start, training_seconds, waited),
    "steps": config.steps,
    "resumed_at_step": start,
    "skipped_steps": int(state.skipped),
    "rewinds": list(job.record.rewinds),
    "wall_seconds": time.perf_counter() - started,
    "training_seconds": training_seconds,
    "compile_seconds": program.compile_seconds + program.lower_seconds,
    "parameters": reporting.count(state.params),
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "hosts": jax.process_count(),
    "recipe": config.recipe,
    "seed": config.seed,
    "versions": reporting.versions(),
    "sample": sample,
  }
  if is_first:
    reporting.draw_learning_curve(workdir, title=_title(config), unit="nats a token")
    if monitor is not None:
      summary["diagnostics"], lines = monitor.report()
      _print(console, ["", *lines, f"diagnostics      {workdir / 'diagnostics.png'}"])
    runs.write_summary(workdir, summary)
  _print(console, _closing(summary, workdir))
  return summary


# ---------------------------------------------------------------------------------------------
# What a person reads
# ---------------------------------------------------------------------------------------------


def _title(config: TrainConfig) -> str:
  model = config.model
  return f"{config.recipe}, {model.layers} layers of width {model.width}, {config.data.name} text"


def _print(console, lines: list[str]) -> None:
  """Plain lines: nothing in them is read as markup, cut or coloured."""
  for line in lines:
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def _overview(job: Job) -> list[str]:
  """The recipe in words, and what a step costs."""
  program, data = job.program, job.data
  config, mesh = program.config, program.mesh
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
  return [
    f"{_title(config)} on {devices}",
    *(f"  {line}" for line in program.task.describe(config, job.record.facts)),
    f"{reporting.count(program.state.params):,} parameters; a step: {config.batch_size} x "
    f"{config.data.seq_length} tokens, {reporting.in_units(program.flops, 'FLOP')}{bound}",
    f"data: {len(data.train):,} training and {len(data.validation):,} validation samples of "
    f"{config.data.seq_length} tokens, {data.tokenizer.vocab_size:,} in the vocabulary",
    *(f"left out: {record}" for record in data.bad_records[:_SHOWN_RECORDS]),
    *([f"left out: {left_out:,} damaged documents in all"] if left_out > _SHOWN_RECORDS else []),
    f"memory{each}: state {reporting.in_units(state_bytes, 'B', base=1024)}, a step's temporaries "
    f"{reporting.in_units(memory.temp_size_in_bytes, 'B', base=1024)}",
    f"compiled in {program.lower_seconds + program.compile_seconds:.1f} s",
  ]


def schedule_notes(config: TrainConfig, earlier: TrainConfig | None) -> list[str]:
  """What a person may not expect of the learning rate; `earlier` is what is resumed, if any."""
  notes = []
  schedule, warmup = config.optimizer.schedule, config.optimizer.warmup_steps
  end = config.optimizer.decay_steps or config.steps
  if warmup >= min(end, config.steps):
    notes.append(f"note: the warm-up of {warmup:,} steps does not end within the run")
  if earlier and schedule != "constant" and not config.optimizer.decay_steps:
    if (before := earlier.steps) != end:
      notes.append(
        f"note: the {schedule} schedule now ends at step {end:,}, not {before:,}, so the rest runs"
        " at another learning rate; to fix its end beforehand set optimizer.decay_steps"
      )
  return notes


def _speed(program: Program, steps: int, seconds: float, waited: float) -> dict[str, float | None]:
  """Tokens and FLOPs a second, and the share of waiting; None where no step was taken."""
  tokens = program.config.batch_size * program.config.data.seq_length
  peak = hardware.peak_flops(jax.devices()[0].device_kind)
  flops_per_second = program.flops * steps / seconds if steps else None
  return {
    "tokens_per_second": tokens * steps / seconds if steps else None,
    "flops_per_step": program.flops,
    "flops_per_second": flops_per_second,
    "share_of_peak": flops_per_second / (peak * program.mesh.size) if steps and peak else None,
    "input_share": waited / seconds if steps else None,
  }


def _first_batch(job: Job) -> list[str]:
  """The first batch: shapes, and the start of its first sample as text."""
  batch = next(job.batches)
  lines = ["first batch:"]
  lines += [f"  {name}: {array.dtype}{list(array.shape)}" for name, array in batch.items()]
  (first, *_) = batch["inputs"].addressable_shards
  starts = job.data.tokenizer.decode(np.asarray(first.data)[0, :48])
  return [*lines, f"  starts with {starts!r}"]


def _in_words(validation: dict[str, float]) -> str:
  """`3.7076 nats per token, 2.4560 bits per byte`."""
  units = {name: name.removeprefix("loss_").replace("_", " ") for name in validation}
  return ", ".join(f"{value:.4f} {units[name]}" for name, value in validation.items())


def _sample(job: Job, params, key: jax.Array) -> str | None:
  """A continuation of the config's prompt; None if none is wanted."""
  config, model, tokenizer = job.program.config, job.program.model, job.data.tokenizer
  if not config.sample_tokens:
    return None
  prompt = [tokenizer.bos_id, *tokenizer.encode(config.sample_prompt)]
  new_tokens, longest = config.sample_tokens, model.longest
  if longest is not None:  # A table of positions ends somewhere.
    prompt = [prompt[0], *prompt[1:][-(longest - 2) :]]
    new_tokens = min(new_tokens, longest - len(prompt))
  (tokens,) = decoding.generate(
    model,
    {"params": params},
    [prompt],
    max_new_tokens=new_tokens,
    key=key,
    temperature=config.sample_temperature,
    eos_id=tokenizer.eos_id,
    pad_id=tokenizer.pad_id,
  )
  return config.sample_prompt + tokenizer.decode(tokens)


def _closing(summary: dict, workdir: pathlib.Path) -> list[str]:
  """What stands at the end of a run."""
  lines = []
  if summary["sample"] is not None:
    lines += ["", "sample:", *(f"  | {line}" for line in summary["sample"].splitlines()), ""]
  bits = summary.get("validation_bits_per_byte")
  loss = f"{summary['validation_loss_nats_per_token']:.4f} nats a token"
  lines.append(f"validation loss  {loss}" + (f", {bits:.4f} bits a byte" if bits else ""))
  for metric, scores in summary["baselines"].items():
    listed = ", ".join(f"{name} {score:.2f}" for name, score in scores.items())
    lines.append(f"for comparison   {listed} {metric.replace('_', ' ')}")
  if summary["tokens_per_second"]:
    share = summary["share_of_peak"]
    lines.append(
      f"speed            {summary['tokens_per_second']:,.0f} tokens a second "
      f"({reporting.in_units(summary['flops_per_second'], 'FLOP/s')}"
      + (f", {share:.1%} of the devices' peak)" if share else ")")
      + f", {summary['input_share']:.1%} of the time waiting for input"
    )
  return [
    *lines,
    f"time             {reporting.duration(summary['training_seconds'])} of training, "
    f"{reporting.duration(summary['wall_seconds'])} in all",
    f"checkpoints      {runs.checkpoints_in(workdir)}",
    f"metrics          {workdir / 'metrics.jsonl'}, {workdir / 'tensorboard'}",
    f"picture          {workdir / 'learning_curve.png'}",
    f"summary          {workdir / 'summary.json'}",
  ]
