"""A run: from its newest checkpoint to its end, and what it leaves; `train.py` is its command."""

import contextlib
import dataclasses
import functools
import gc
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import rich.console

from magneto_jax import (
  diagnostics,
  distributed,
  evaluation,
  hardware,
  jobs,
  preemption,
  pretrained,
  reporting,
  runs,
  sharding,
)
from magneto_jax.checkpoints import Checkpointer, refuse_if_no_room
from magneto_jax.config import ConfigError, TrainConfig, config_errors
from magneto_jax.monitor import Monitor
from magneto_jax.program import Program, TrainState
from magneto_jax.spikes import Diverged, Watch, restart


def dry_run(config: TrainConfig, workdir: str | os.PathLike) -> None:
  """Prints what `train` would run: recipe, parameters, memory, the first batch; leaves nothing."""
  console = _console()
  with config_errors():
    distributed.agree("config", dataclasses.asdict(config))
  with tempfile.TemporaryDirectory() as scratch:
    earlier = runs.resumable(workdir, config)
    start = None if runs.last_step(workdir) else pretrained.find(config)
    job = _prepared(config, runs.data_in(workdir if earlier else scratch), earlier, None, start)
    if earlier:
      runs.refuse_if_different(workdir, earlier, job.record)
    reporting.say(console, jobs.overview(job))
    console.print(reporting.parameter_table(job.program.state.params))
    with contextlib.closing(job.batches):
      reporting.say(console, jobs.first_batch(job))


def _prepared(
  config: TrainConfig,
  directory: pathlib.Path,
  earlier: runs.Record | None,
  program: Program | None,
  source: pretrained.Source | None,
) -> jobs.Job:
  """The job, which the model that it starts with, if any, has been held against."""
  given = {}
  if source is not None:
    given = {"tokenizer_file": source.tokenizer_file, "facts": source.facts()}
  job = jobs.prepare(config, directory, earlier, program, **given)
  if source is not None:
    source.refuse_others(job.program, job.record.data.get("tokenizer", {}))
  return job


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
  workdir, console = pathlib.Path(workdir), _console()
  with config_errors():
    distributed.agree("config", {**dataclasses.asdict(config), "rewind_to": rewind_to})
    distributed.refuse_unless_shared(workdir)
  spike = program = None
  with preemption.watched() as notice, contextlib.ExitStack() as stack:
    hold = lambda: distributed.is_first() and stack.enter_context(runs.the_only_one(workdir))
    with config_errors():
      distributed.on_first(hold)
    while True:
      try:
        return _train(config, workdir, notice, console, rewind_to, spike, program)
      except _Rewind as rewind:
        spike, rewind_to, program = rewind.spike, rewind.to, rewind.program
        config = dataclasses.replace(config, skip_batches=rewind.skip)
      # The state that is left behind, of which devices may hold no second one.
      gc.collect()


def _train(
  config: TrainConfig,
  workdir: pathlib.Path,
  notice: preemption.Notice,
  console: rich.console.Console,
  rewind_to: int | None,
  spike: int | None,
  program: Program | None,
) -> dict:
  """`train` to the end or the next spike, after the rewind for the last one, if any."""
  started = time.perf_counter()
  # Before the data is read: with other data settings, reading it would fail less clearly.
  earlier = held = runs.resumable(workdir, config)
  if rewind_to is not None:
    earlier = runs.rewind(workdir, held, config, rewind_to, spike)
  start = runs.last_step(workdir)
  if rewind_to is not None and earlier is held:
    reporting.say(
      console, [f"note: the run was taken back to step {rewind_to} already, and goes on"]
    )
  if start > config.steps:
    raise ConfigError(
      f"{workdir} is at step {start} already: set steps to more than {start}, or use another"
      " workdir"
    )
  config = runs.with_batches_left_out(config, earlier, start)
  summary = runs.read_summary(workdir)
  if start == config.steps and summary and summary.get("steps") == start:
    reporting.say(
      console, [f"{workdir} is finished: to go on, set steps to more than {config.steps}"]
    )
    reporting.say(console, _closing(summary, workdir))
    return summary

  source = None if start else pretrained.find(config)
  job = _prepared(config, runs.data_in(workdir), earlier, program, source)
  if earlier:
    runs.refuse_if_different(workdir, earlier, job.record)
  with config_errors():
    directory, parts = runs.checkpoints_in(workdir), job.program.state.parts()
    kept = config.keep_checkpoints + config.keep_best
    distributed.on_first(lambda: refuse_if_no_room(directory, parts, kept))
  notes = jobs.schedule_notes(config, earlier and earlier.config)
  reporting.say(console, [*jobs.overview(job), *notes])

  loop = _Loop(job, workdir, notice, console, source)
  with loop.opened(start):
    loop.run()
  summary = loop.summary() | {"wall_seconds": time.perf_counter() - started}
  if distributed.is_first():
    reporting.draw_learning_curve(
      workdir, title=jobs.title(config), loss_name=job.program.task.loss_name
    )
    runs.write_summary(workdir, summary)
  reporting.say(console, [*loop.diagnosis, *_closing(summary, workdir)])
  return summary


class _Loop:
  """The steps of a run, and all that happens between them."""

  def __init__(
    self,
    job: jobs.Job,
    workdir: pathlib.Path,
    notice: preemption.Notice,
    console: rich.console.Console,
    source: pretrained.Source | None,
  ):
    self.source = source
    self.job, self.workdir, self.notice, self.console = job, workdir, notice, console
    # A program outlives a rewind, and with it the batches that are left out.
    self.config, self.program = job.record.config, job.program
    self.task, program = job.program.task, job.program
    self.is_first = distributed.is_first()

    def make_keys() -> list[jax.Array]:
      root_key = jax.random.key(self.config.seed)
      return [jax.random.fold_in(root_key, i) for i in range(3)]

    # Compiled, as a host can only put arrays on its own devices.
    whole = program.key.sharding
    keys = jax.jit(make_keys, out_shardings=whole)()
    self.parameter_key, self.dropout_key, self.sample_key = keys
    # As many rows at a time as the step has.
    rows = self.config.batch_size // self.config.accumulation
    self.evaluator = evaluation.Evaluator(
      functools.partial(self.task.measured, program.model), program.mesh, rows
    )
    self.learning_rate = jax.jit(program.schedule)
    self.learning_rate(0)  # Compiled before the steps begin.
    self.watch = Watch(self.config.spike.factor, self.config.spike.window)
    self.monitor: Monitor | None = None
    self.scores: dict[str, float] = {}  # Of the last step's evaluation.
    self.diagnosis: list[str] = []
    self.saving_seconds = 0.0

  # ------------------------------------------------------------------- Checkpoints and resuming

  @contextlib.contextmanager
  def opened(self, start: int) -> Iterator[None]:
    """While this is entered, the workdir is this run's, which stands where its last one stopped.

    Args:
      start: the newest checkpoint's step; 0 if there is none.
    """
    config, program, directory = self.config, self.program, runs.checkpoints_in(self.workdir)
    with contextlib.ExitStack() as stack:
      # Closing waits for the last checkpoint, also when the run fails.
      self.checkpointer = stack.enter_context(
        Checkpointer(directory, keep=config.keep_checkpoints, best=self.best_of)
      )
      stack.enter_context(program.memory_in_words())
      stack.enter_context(contextlib.closing(self.job.batches))
      stack.enter_context(sharding.use_mesh(program.mesh))
      # There may have been an hour of preparing the data, and of compiling.
      self.notice.check(start)
      if start:
        start, parts = self.checkpointer.restore_newest(
          program.state.parts(),
          self.job.batches,
          fall_back=config.on_damage == "fallback",
          say=lambda line: reporting.say(self.console, [line]),
        )
        self.state = TrainState.from_parts(parts)
        self.watch.restore(self.checkpointer.config(start).get("watch", {}))
        reporting.say(self.console, [f"resumed at step {start:,}"])
      else:
        self.state = program.init(self.parameter_key)
        self.checkpointer.prepare(self.state.parts())
        if self.source is not None:
          self.state = self.source.into(self.state, program)
          reporting.say(self.console, [self.source.in_words(program)])
        self.console.print(reporting.parameter_table(self.state.params))
      self.start = self.saved = start
      if self.is_first:
        runs.write_record(self.workdir, self.job.record)
        runs.remove_summary(self.workdir)
      kept_in = self.workdir if self.is_first else None
      self.writer = reporting.MetricWriter(kept_in, after_step=start)
      stack.enter_context(contextlib.closing(self.writer))
      if config.diagnostics_every:
        # No more rows than a step holds at a time.
        rows, length = config.batch_size // config.accumulation, self.task.length(config)
        self.monitor = Monitor(
          self.workdir,
          program.model,
          diagnostics.calls_of(self.task, program.model),
          diagnostics.first_samples(self.job.data, rows, length),
          after_step=start,
          writes=self.is_first,
        )
      yield

  def best_of(self, steps: list[int]) -> int | None:
    """Of the checkpoints of these steps the one that is kept as the best."""
    if not self.config.keep_best:
      return None
    found = runs.best(self.workdir, self.config.task, steps)
    return found and found[0]

  def save(self, step: int) -> None:
    """A checkpoint, which is written while the next steps run."""
    begin = time.perf_counter()
    self.saved = step
    record = {**runs.as_json(self.job.record), "watch": self.watch.values}
    self.checkpointer.save(step, self.state.parts(), self.job.batches, record)
    self.saving_seconds += time.perf_counter() - begin

  # --------------------------------------------------------------------------------- The steps

  def run(self) -> None:
    """From the start to the config's last step.

    Raises:
      Diverged: see `train`.
      Preempted: likewise.
      _Rewind: at a spike.
    """
    config = self.config
    self.stopwatch = reporting.Stopwatch()
    self.waited = self.read_at = 0.0  # Seconds of waiting for input, of running, at the last line.
    self.progress = reporting.Progress(self.console, start=self.start, total=config.steps)
    with self.progress:
      step, unread = self.start, None
      try:
        with self.stopwatch.paused():
          self.catch_up()
        for step in range(self.start + 1, config.steps + 1):
          batch = next(self.job.batches)
          self.state, metrics = self.program.step(self.state, batch, self.dropout_key)
          if unread is not None:
            self.report(*unread)
          unread = step, metrics
          self.notice.check(self.saved)
          if self.monitor is not None and self.is_due(step, config.diagnostics_every):
            # Before the checkpoint: what is saved has been measured.
            with self.stopwatch.paused():
              self.diagnose(step)
          if self.is_due(step, config.eval_every) or self.is_due(step, config.checkpoint_every):
            self.report(*unread)
            unread = None
            with self.stopwatch.paused():
              if self.is_due(step, config.eval_every):
                self.assess(step)
              if self.is_due(step, config.checkpoint_every):
                self.save(step)
      except preemption.Preempted:
        if unread is not None:
          self.report(*unread)
        if step > self.saved:
          self.save(step)
        raise preemption.Preempted(step) from None
      self.training_seconds = self.stopwatch.seconds

  def is_due(self, step: int, every: int) -> bool:
    """Whether what is done every so many steps, and after the last one, is done after this one."""
    return step == self.config.steps or step % every == 0

  def catch_up(self) -> None:
    """What a fresh run is compared with, and what was due where an earlier one was broken off."""
    start, config = self.start, self.config
    if self.monitor is not None:
      if self.is_due(start, config.diagnostics_every) or not self.monitor.steps:
        self.diagnose(start)
    if start and self.is_due(start, config.eval_every):
      if not distributed.everywhere(reporting.has_validation(self.workdir, start))[0]:
        self.assess(start)

  def report(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Reads a step's metrics, which waits for the step; so it is called one step late."""
    read = jax.device_get(metrics)
    skipped, in_a_row = int(read.pop("skipped")), int(read.pop("skipped_in_a_row"))
    found = {name: float(value) for name, value in read.items()}
    loss, gradient_norm = found["loss"], found["gradient_norm"]
    self.refuse_or_rewind(step, loss, gradient_norm, in_a_row)
    config, unit, seconds = self.config, self.task.unit, self.stopwatch.seconds
    done = step - self.start
    rate = done * config.batch_size * self.task.size(config) / seconds
    self.progress.step(step, f"loss {loss:.3f}  {rate:,.0f} {unit}/s")
    if not self.is_due(step, config.log_every):
      return
    # A step waits for the host that waits the longest.
    waiting = max(distributed.everywhere(self.job.batches.waited()))
    # A step that was skipped has no numbers that JSON knows.
    taken = {} if in_a_row else {f"train/{name}": value for name, value in found.items()}
    rate_now = 0.0 if in_a_row else float(self.learning_rate(step - 1 - skipped))
    self.waited += waiting
    row = {
      **taken,
      "train/learning_rate": rate_now,
      "train/skipped_steps": skipped,
      f"{unit}_per_second": rate,
      "input_share": waiting / (seconds - self.read_at),
      "goodput": self.goodput(),
    }
    if config.data.skip_bad:
      row["bad_records"] = len(self.job.data.bad_records)
    self.read_at = seconds
    self.writer.write(step, row)
    left = reporting.duration((config.steps - step) * seconds / done)
    of = {n.removeprefix("loss_"): v for n, v in found.items() if n.startswith("loss_")}
    of = [f"{reporting.words_of(name)} {value:.3f}" for name, value in of.items()]
    said = f"loss {loss:.3f}" + (f" ({', '.join(of)})" if of else "")
    # A bar has no room for the parts.
    self.progress.line(
      f"step {step:,}/{config.steps:,}  {said}  {rate:,.0f} {unit}/s  {left} left",
      terminal=bool(of),
    )

  def goodput(self) -> float:
    """The share of steps in the time of steps, of waiting for input, and of saving."""
    running = self.stopwatch.seconds
    return (running - self.waited) / (running + self.saving_seconds)

  def refuse_or_rewind(self, step: int, loss: float, gradient_norm: float, in_a_row: int) -> None:
    """What follows from a step that was skipped, or from a spike."""
    mend = (
      f"the checkpoint of step {self.saved} is kept: go on from an earlier one with --rewind_to and"
      " --config.skip_batches, or in another workdir lower optimizer.learning_rate or set"
      " optimizer.clip_norm"
    )
    config = self.config
    if in_a_row:
      self.progress.line(
        f"warning: step {step:,} is skipped, as its loss is {loss} and its gradient's norm"
        f" {gradient_norm}"
      )
      if in_a_row >= config.max_skipped:
        raise Diverged(
          f"at step {step} the loss is {loss} and its gradient's norm {gradient_norm}, and"
          f" {in_a_row} steps in a row were skipped; {mend}"
        )
    elif found := self.watch.spike(loss, gradient_norm):
      before = sum(rewind["spike"] is not None for rewind in self.job.record.rewinds)
      if before >= config.spike.limit:
        raise Diverged(f"a spike at step {step} ({found}), after {before} rewinds; {mend}")
      self.checkpointer.wait()  # Whether the newest counts must not hang on the disk.
      to, skip = restart(step, distributed.everywhere(self.checkpointer.steps)[0], config)
      self.progress.line(
        f"warning: a spike at step {step:,}: {found}; back to step {to:,}, without batches {skip}"
        f" (rewind {before + 1} of at most {config.spike.limit})"
      )
      raise _Rewind(step, to, skip, self.program)

  def diagnose(self, step: int) -> None:
    """Stream and gradient by layer."""
    if step not in self.monitor.steps:
      self.writer.write(step, self.monitor.record(step, self.state.live_variables))

  # -------------------------------------------------------------------------------- Evaluation

  def assess(self, step: int) -> None:
    """An evaluation, written down."""
    self.scores = self.validate()
    self.writer.write(step, {f"validation/{k}": v for k, v in self.scores.items()})
    said = reporting.in_words(self.scores)
    self.progress.line(f"step {step:,}/{self.config.steps:,}  validation: {said}")

  def validate(self) -> dict[str, float]:
    """The validation set's metrics."""
    config, data = self.config, self.job.data
    totals = self.evaluator.totals(
      self.state.eval_variables,
      data.validation,
      batches=config.accumulation * config.eval_batches,
      before_each=lambda: self.notice.check(self.saved),
    )
    if not all(map(math.isfinite, (totals["loss"], totals["weight"]))):
      raise Diverged(
        f"the validation loss is {totals['loss']}; the checkpoint of step {self.saved} is kept: in"
        " another workdir, lower optimizer.learning_rate"
      )
    return self.task.metrics(totals, data, whole=not config.eval_batches)

  # ----------------------------------------------------------------------------------- Summary

  def summary(self) -> dict[str, Any]:
    """What the run has come to, once it is over."""
    config, program, task, data = self.config, self.program, self.task, self.job.data
    variables = self.state.eval_variables
    with sharding.use_mesh(program.mesh), program.memory_in_words():
      scores, judged = self.scores or self.validate(), {}
      if task.judge is not None:
        written, texts = task.judge(config, program.model, variables, data, program.mesh)
        scores, judged = scores | written, {"judged": texts}
      sample = task.sample(config, program.model, variables, data, self.sample_key)
      if task.picture is not None:
        rows = task.picture(config, program.model, variables, data)
        if rows and self.is_first:
          reporting.draw_examples(self.workdir, rows, title=jobs.title(config))
    summary = {
      **{f"validation_{k}": v for k, v in scores.items()},
      **judged,
      "signatures": task.signatures(config),
      "scored_weights": f"{'params' if self.state.ema_params is None else 'ema_params'} of step"
      f" {config.steps}",
      **self.best(),
      "baselines": task.baselines(data),
      "bad_records": len(data.bad_records),
      **self.speed(),
      "goodput": self.goodput(),
      "steps": config.steps,
      "resumed_at_step": self.start,
      "skipped_steps": int(self.state.skipped),
      "rewinds": list(self.job.record.rewinds),
      "training_seconds": self.training_seconds,
      "compile_seconds": program.compile_seconds + program.lower_seconds,
      "parameters": reporting.count(self.state.params),
      "device": jax.devices()[0].device_kind,
      "devices": jax.device_count(),
      "hosts": jax.process_count(),
      "task": config.task,
      "recipe": config.recipe,
      "seed": config.seed,
      "versions": reporting.versions(),
      "sample": sample,
    }
    if self.is_first and self.monitor is not None:
      summary["diagnostics"], lines = self.monitor.report()
      self.diagnosis = ["", *lines, f"diagnostics      {self.workdir / 'diagnostics.png'}"]
    return summary

  def best(self) -> dict[str, float]:
    """The step of the checkpoint that was kept as the best, and its metric."""
    if not self.config.keep_best:
      return {}
    found = runs.best(self.workdir, self.config.task, self.checkpointer.steps)
    return {} if found is None else {"best_step": found[0], f"best_{self.task.best[0]}": found[1]}

  def speed(self) -> dict[str, float | None]:
    """Units and FLOPs a second, and the share of waiting; None where no step was taken."""
    config, program, seconds = self.config, self.program, self.training_seconds
    steps = config.steps - self.start
    units = config.batch_size * self.task.size(config)
    peak = hardware.peak_flops(jax.devices()[0].device_kind)
    flops_per_second = program.flops * steps / seconds if steps else None
    return {
      f"{self.task.unit}_per_second": units * steps / seconds if steps else None,
      "flops_per_step": program.flops,
      "flops_per_second": flops_per_second,
      "share_of_peak": flops_per_second / (peak * program.mesh.size) if steps and peak else None,
      "input_share": self.waited / seconds if steps else None,
    }


# ---------------------------------------------------------------------------------------------
# What a person reads
# ---------------------------------------------------------------------------------------------


def _console() -> rich.console.Console:
  """Of several processes the first prints."""
  return reporting.make_console(quiet=not distributed.is_first())


def _closing(summary: dict, workdir: pathlib.Path) -> list[str]:
  """What stands at the end of a run."""
  lines = []
  if summary["sample"] is not None:
    lines += ["", "sample:", *(f"  | {line}" for line in summary["sample"].splitlines()), ""]
  scores = {
    name.removeprefix("validation_"): value
    for name, value in summary.items()
    if name.startswith("validation_")
  }
  lines.append(f"validation       {reporting.in_words(scores)}")
  # Summaries from before there were any have none.
  if "judged" in summary:
    lines.append(f"judged           {summary['judged']:,} texts that the model wrote")
  for metric, signature in summary.get("signatures", {}).items():
    lines.append(f"as measured      {reporting.words_of(metric)}: {signature}")
  if "best_step" in summary:
    best = {k.removeprefix("best_"): v for k, v in summary.items() if k.startswith("best_")}
    step = best.pop("step")
    lines.append(
      f"best             {reporting.in_words(best)}, at step {step:,}:"
      f" magneto_jax.load({str(workdir)!r}, step='best')"
    )
  for metric, others in summary["baselines"].items():
    lines.append(f"for comparison   {reporting.words_of(metric)}: {reporting.in_words(others)}")
  if summary["flops_per_second"]:
    share = summary["share_of_peak"]
    (unit,) = (name.removesuffix("_per_second") for name in summary if _is_rate(name))
    lines.append(
      f"speed            {summary[f'{unit}_per_second']:,.0f} {unit} a second "
      f"({reporting.in_units(summary['flops_per_second'], 'FLOP/s')}"
      + (f", {share:.1%} of the devices' peak)" if share else ")")
      + f", {summary['input_share']:.1%} of the time waiting for input"
      + (f", goodput {summary['goodput']:.1%}" if "goodput" in summary else "")
    )
  return [
    *lines,
    f"time             {reporting.duration(summary['training_seconds'])} of training, "
    f"{reporting.duration(summary['wall_seconds'])} in all",
    f"checkpoints      {runs.checkpoints_in(workdir)}",
    f"metrics          {workdir / 'metrics.jsonl'}, {workdir / 'tensorboard'}",
    f"picture          {workdir / 'learning_curve.png'}",
    *([f"examples         {drawn}"] if (drawn := workdir / reporting.EXAMPLES).exists() else []),
    f"summary          {workdir / 'summary.json'}",
  ]


def _is_rate(name: str) -> bool:
  return name.endswith("_per_second") and not name.startswith("flops")
