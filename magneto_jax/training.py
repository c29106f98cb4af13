"""The train step, and the run around it; `train.py` is its command."""

import contextlib
import functools
import itertools
import json
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct

from magneto_jax import decoding, diagnostics, optimizers, reporting, runs
from magneto_jax.checkpoints import Checkpointer, abstract_like
from magneto_jax.config import ConfigError, OptimizerConfig, TrainConfig, config_errors
from magneto_jax.data import pipelines
from magneto_jax.monitor import Monitor
from magneto_jax.tasks import TASKS, Task

# ---------------------------------------------------------------------------------------------
# State and step
# ---------------------------------------------------------------------------------------------


@struct.dataclass
class TrainState:
  """All that a step changes.

  Attributes:
    step: how many steps have been taken.
    params: the parameters.
    opt_state: the optimizer's.
    ema_params: an exponential moving average of the parameters, or None.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  ema_params: Any

  @property
  def eval_params(self):
    """The parameters that evaluation and checkpoints' readers use."""
    return self.params if self.ema_params is None else self.ema_params

  def parts(self) -> dict[str, Any]:
    """The state as a checkpoint's parts; `ema_params` only where there are any."""
    parts = {"params": self.params, "optimizer": {"step": self.step, "state": self.opt_state}}
    return parts if self.ema_params is None else {**parts, "ema_params": self.ema_params}

  @classmethod
  def from_parts(cls, parts: dict[str, Any]) -> "TrainState":
    """The state that `parts` took apart."""
    optimizer = parts["optimizer"]
    return cls(optimizer["step"], parts["params"], optimizer["state"], parts.get("ema_params"))


def make_optimizer(config: OptimizerConfig, steps: int):
  """The optimizer and its schedule for a run of this many steps."""
  schedule = optimizers.schedule(
    config.schedule,
    peak=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=config.decay_steps or steps,
    power=config.power,
    end_factor=config.end_factor,
  )
  optimizer = optimizers.adamw(
    schedule,
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    clip_norm=config.clip_norm,
    decay=config.decay_mask,
  )
  return optimizer, schedule


def init_state(key: jax.Array, *, model: nn.Module, inputs: tuple, optimizer, ema: float):
  """The state before the first step."""
  params = model.init(key, *inputs)["params"]
  # A copy: the step donates its arguments, and one buffer cannot be donated twice.
  ema_params = jax.tree.map(jnp.copy, params) if ema else None
  return TrainState(jnp.int32(0), params, optimizer.init(params), ema_params)


def train_step(
  state: TrainState,
  batch: dict[str, jax.Array],
  dropout_key: jax.Array,
  *,
  model: nn.Module,
  task: Task,
  optimizer: optax.GradientTransformation,
  accumulation: int = 1,
  ema: float = 0.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimizer step on the mean loss of a batch; pure, to be jitted with `state` donated.

  Args:
    state: the state.
    batch: arrays [batch, ...]; `weights` say how much each target counts.
    dropout_key: the run's; the step's own is folded from it and the step.
    model, task, optimizer: static.
    accumulation: parts that the batch is cut into, so that only one part's activations live at a
      time. The gradient is that of the whole batch's mean, however its weights fall.
    ema: decay of `ema_params`; early on it is (1 + step) / (10 + step), so that they forget the
      initial parameters.

  Returns:
    The new state, and the metrics `loss` (mean over weights) and `gradient_norm`.
  """
  weight_sum = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
  dropout_key = jax.random.fold_in(dropout_key, state.step)

  def mean_loss(params, part, index):
    loss_sum, _ = task.loss(model, params, part, jax.random.fold_in(dropout_key, index))
    return loss_sum / weight_sum

  grad = jax.value_and_grad(mean_loss)
  if accumulation == 1:
    loss, gradients = grad(state.params, batch, 0)
  else:
    parts = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)

    def add(total, part):
      return jax.tree.map(jnp.add, total, grad(state.params, *part)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
    (loss, gradients), _ = jax.lax.scan(add, zero, (parts, jnp.arange(accumulation)))

  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema_params = state.ema_params
  if ema:
    decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
    ema_params = optax.incremental_update(params, ema_params, 1 - decay)
  metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
  return TrainState(state.step + 1, params, opt_state, ema_params), metrics


def evaluate(eval_step, params, batches) -> tuple[float, float]:
  """Sums of losses and of weights over batches, in float64."""
  sums = [eval_step(params, batch) for batch in batches]
  return tuple(np.sum(np.asarray(sums, np.float64), axis=0))


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


class Job(NamedTuple):
  """A run, ready to start.

  Attributes:
    config, task: what is run.
    data: the task's, loaded.
    record: what the workdir keeps of it.
    batches: the training batches, an endless Grain iterator.
    model: the module.
    schedule: learning rate by step.
    init: `key -> TrainState`.
    abstract_state: the shapes of the state.
    step: the compiled `(state, batch, dropout key) -> (state, metrics)`; donates the state.
    compile_seconds: how long that took.
    flops: of one step.
  """

  config: TrainConfig
  task: Task
  data: Any
  record: runs.Record
  batches: Any
  model: nn.Module
  schedule: optax.Schedule
  init: Callable[[jax.Array], TrainState]
  abstract_state: TrainState
  step: Callable
  compile_seconds: float
  flops: int


def prepare(
  config: TrainConfig, directory: pathlib.Path, earlier: runs.Record | None = None
) -> Job:
  """Loads the data, builds the model and compiles the step.

  Args:
    config: the run.
    directory: where what is derived from the data is kept.
    earlier: the record of the run that is resumed, if any: other data are then refused before
      anything is written.

  Raises:
    ConfigError: if the data cannot be had, or the model not be built.
    FileNotFoundError: likewise, for files that are not there.
  """
  task = TASKS[config.task]
  with config_errors():
    data = task.load_data(config.data, directory, earlier and earlier.data)
    batches = pipelines.train_iterator(
      data.train, batch_size=config.batch_size, seed=config.seed, num_workers=config.data.workers
    )
  # As JSON gives it back: tuples are lists.
  record = runs.Record(config, json.loads(json.dumps(data.identity)), task.facts(data))
  optimizer, schedule = make_optimizer(config.optimizer, config.steps)
  with config_errors():
    model = task.build_model(config, record.facts)
    init = functools.partial(
      init_state, model=model, inputs=task.dummy_inputs(config), optimizer=optimizer, ema=config.ema
    )
    abstract_state = abstract_like(jax.eval_shape(init, jax.random.key(0)))
  abstract_batch = {
    name: jax.ShapeDtypeStruct((config.batch_size, *array.shape), array.dtype)
    for name, array in data.train[0].items()
  }
  step = functools.partial(
    train_step,
    model=model,
    task=task,
    optimizer=optimizer,
    accumulation=config.accumulation,
    ema=config.ema,
  )
  begin = time.perf_counter()
  compiled = (
    jax.jit(step, donate_argnums=0)
    .lower(abstract_state, abstract_batch, jax.random.key(0))
    .compile()
  )
  return Job(
    config=config,
    task=task,
    data=data,
    record=record,
    batches=batches,
    model=model,
    schedule=schedule,
    init=init,
    abstract_state=abstract_state,
    step=compiled,
    compile_seconds=time.perf_counter() - begin,
    flops=task.flops(config, data),
  )


def dry_run(config: TrainConfig, workdir: str | os.PathLike) -> None:
  """Prints what `train` would run: recipe, parameters, memory, the first batch; leaves nothing."""
  console = reporting.make_console()
  with tempfile.TemporaryDirectory() as scratch:
    earlier = runs.resumable(workdir, config)
    job = prepare(config, runs.data_in(workdir if earlier else scratch), earlier)
    if earlier:
      runs.refuse_if_different(workdir, earlier, job.record)
    _print(console, _overview(job))
    console.print(reporting.parameter_table(job.abstract_state.params))
    _print(console, _first_batch(next(job.batches), job.data))


def train(config: TrainConfig, workdir: str | os.PathLike) -> dict:
  """Trains, evaluates, saves and reports; a run that the workdir holds already is resumed.

  Args:
    config: the run.
    workdir: made if it does not exist; see `runs` for what it holds.

  Returns:
    What `summary.json` holds.

  Raises:
    ConfigError: if the config cannot be run, or the workdir holds another run, or one that is past
      the config's steps.
    FloatingPointError: if a loss or gradient is not finite; the checkpoints are kept.
  """
  started = time.perf_counter()
  console = reporting.make_console()
  workdir = pathlib.Path(workdir)

  # ------------------------------------------------------------------------ Where the run stands
  # Before the data is read: with other data settings, reading it would fail less clearly.
  earlier = runs.resumable(workdir, config)
  start = runs.last_step(workdir)
  if start > config.steps:
    raise ConfigError(
      f"{workdir} is at step {start} already: set steps to more than {start}, or use another"
      " workdir"
    )
  summary = runs.read_summary(workdir)
  if start == config.steps and summary and summary["steps"] == start:
    _print(console, [f"{workdir} is finished: to go on, set steps to more than {config.steps}"])
    _print(console, _closing(summary, workdir))
    return summary

  # ------------------------------------------------------------------------- What will be run
  job = prepare(config, runs.data_in(workdir), earlier)
  if earlier:
    runs.refuse_if_different(workdir, earlier, job.record)
  _print(console, [*_overview(job), *schedule_notes(config, earlier and earlier.config)])
  root_key = jax.random.key(config.seed)
  parameter_key, dropout_key, sample_key = (jax.random.fold_in(root_key, i) for i in range(3))
  eval_step = jax.jit(lambda params, batch: job.task.loss(job.model, params, batch))
  tokens_per_step = config.batch_size * config.data.seq_length

  def validate(params) -> dict[str, float]:
    batches = pipelines.eval_batches(job.data.validation, config.batch_size)
    totals = evaluate(eval_step, params, itertools.islice(batches, config.eval_batches or None))
    if not all(map(math.isfinite, totals)):
      raise FloatingPointError(
        f"the validation loss is {totals[0]}: in another workdir, lower optimizer.learning_rate"
      )
    return job.task.metrics(*totals, job.data, whole=not config.eval_batches)

  # ------------------------------------------------------------------- Checkpoints and resuming
  with contextlib.ExitStack() as opened:
    # Closing waits for the last checkpoint, also when the run fails.
    checkpointer = opened.enter_context(
      Checkpointer(runs.checkpoints_in(workdir), keep=config.keep_checkpoints)
    )
    if start:
      parts = checkpointer.restore(start, job.abstract_state.parts(), job.batches)
      state = TrainState.from_parts(parts)
      _print(console, [f"resumed at step {start:,}"])
    else:
      state = jax.jit(job.init)(parameter_key)
      console.print(reporting.parameter_table(state.params))
    runs.write_record(workdir, job.record)
    runs.remove_summary(workdir)
    writer = opened.enter_context(
      contextlib.closing(reporting.MetricWriter(workdir, after_step=start))
    )
    opened = opened.pop_all()

  monitor = None
  if config.diagnostics_every:
    # No more rows than a step holds at a time.
    rows, length = config.batch_size // config.accumulation, config.data.seq_length
    batch = diagnostics.first_samples(job.data.train, rows, length)
    calls = diagnostics.calls_of(job.task)
    monitor = Monitor(workdir, job.model, calls, batch, after_step=start)

  def diagnose(step: int) -> None:
    if step not in monitor.steps:
      writer.write(step, monitor.record(step, state.params))

  def save(step: int) -> None:
    checkpointer.save(step, state.parts(), job.batches, runs.as_json(job.record))

  # --------------------------------------------------------------------------------- The steps
  stopwatch = reporting.Stopwatch()
  validation: dict[str, float] = {}

  def report(step: int, metrics: dict[str, jax.Array]) -> None:
    """Reads a step's metrics, which waits for the step; so it is called one step late."""
    loss, gradient_norm = float(metrics["loss"]), float(metrics["gradient_norm"])
    if not math.isfinite(loss + gradient_norm):
      raise FloatingPointError(
        f"at step {step} the loss is {loss} and its gradient's norm {gradient_norm}: in another"
        " workdir, lower optimizer.learning_rate or set optimizer.clip_norm; the checkpoints before"
        f" it are kept in {workdir}"
      )
    rate = (step - start) * tokens_per_step / stopwatch.seconds
    progress.step(step, loss=loss, tokens_per_second=rate)
    if step % config.log_every == 0 or step == config.steps:
      row = {
        "train/loss": loss,
        "train/gradient_norm": gradient_norm,
        "train/learning_rate": float(job.schedule(step - 1)),
        "tokens_per_second": rate,
      }
      writer.write(step, row)
      left = reporting.duration((config.steps - step) * stopwatch.seconds / (step - start))
      progress.line(
        f"step {step:,}/{config.steps:,}  loss {loss:.3f}  {rate:,.0f} tokens/s  {left} left",
        terminal=False,
      )

  with opened, reporting.Progress(console, start=start, total=config.steps) as progress:
    if monitor is not None and (start == 0 or not monitor.steps):
      with stopwatch.paused():
        diagnose(start)
    unread = None
    for step in range(start + 1, config.steps + 1):
      state, metrics = job.step(state, next(job.batches), dropout_key)
      if unread is not None:
        report(*unread)
      unread = step, metrics
      last = step == config.steps
      if monitor is not None and (last or step % config.diagnostics_every == 0):
        # Before the checkpoint: what is saved has been measured.
        with stopwatch.paused():
          diagnose(step)
      if last or step % config.eval_every == 0 or step % config.checkpoint_every == 0:
        report(*unread)
        unread = None
        with stopwatch.paused():
          if last or step % config.eval_every == 0:
            validation = validate(state.eval_params)
            writer.write(step, {f"validation/{k}": v for k, v in validation.items()})
            progress.line(f"step {step:,}/{config.steps:,}  validation: {_in_words(validation)}")
          if last or step % config.checkpoint_every == 0:
            save(step)

    training_seconds = stopwatch.seconds

  # ----------------------------------------------------------------------------------- Summary
  summary = {
    **{f"validation_{k}": v for k, v in (validation or validate(state.eval_params)).items()},
    "baselines": job.task.baselines(job.data),
    **_speed(job, config.steps - start, training_seconds),
    "steps": config.steps,
    "resumed_at_step": start,
    "wall_seconds": time.perf_counter() - started,
    "training_seconds": training_seconds,
    "compile_seconds": job.compile_seconds,
    "parameters": reporting.count(state.params),
    "device": jax.devices()[0].device_kind,
    "recipe": config.recipe,
    "seed": config.seed,
    "versions": reporting.versions(),
    "sample": _sample(job, state.eval_params, sample_key),
  }
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
  config, data = job.config, job.data
  memory = job.step.memory_analysis()
  device = jax.devices()[0]
  peak = reporting.peak_flops(device.device_kind)
  bound = f", at least {1e3 * job.flops / peak:.3g} ms at the device's peak" if peak else ""
  leaves = jax.tree.leaves(job.abstract_state)
  state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  return [
    f"{_title(config)} on {device.device_kind}",
    *(f"  {line}" for line in job.task.describe(config, job.record.facts)),
    f"{reporting.count(job.abstract_state.params):,} parameters; a step: {config.batch_size} x "
    f"{config.data.seq_length} tokens, {reporting.in_units(job.flops, 'FLOP')}{bound}",
    f"data: {len(data.train):,} training and {len(data.validation):,} validation samples of "
    f"{config.data.seq_length} tokens, {data.tokenizer.vocab_size:,} in the vocabulary",
    f"memory: state {reporting.in_units(state_bytes, 'B', base=1024)}, a step's temporaries "
    f"{reporting.in_units(memory.temp_size_in_bytes, 'B', base=1024)}",
    f"compiled in {job.compile_seconds:.1f} s",
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


def _speed(job: Job, steps: int, seconds: float) -> dict[str, float | None]:
  """Tokens and FLOPs a second; None where no step was taken."""
  tokens = job.config.batch_size * job.config.data.seq_length
  peak = reporting.peak_flops(jax.devices()[0].device_kind)
  flops_per_second = job.flops * steps / seconds if steps else None
  return {
    "tokens_per_second": tokens * steps / seconds if steps else None,
    "flops_per_step": job.flops,
    "flops_per_second": flops_per_second,
    "share_of_peak": flops_per_second / peak if steps and peak else None,
  }


def _first_batch(batch, data) -> list[str]:
  """The first batch: shapes, and the start of its first sample as text."""
  lines = ["first batch:"]
  lines += [f"  {name}: {array.dtype}{list(array.shape)}" for name, array in batch.items()]
  return [*lines, f"  starts with {data.tokenizer.decode(batch['inputs'][0][:48])!r}"]


def _in_words(validation: dict[str, float]) -> str:
  """`3.7076 nats per token, 2.4560 bits per byte`."""
  units = {name: name.removeprefix("loss_").replace("_", " ") for name in validation}
  return ", ".join(f"{value:.4f} {units[name]}" for name, value in validation.items())


def _sample(job: Job, params, key: jax.Array) -> str | None:
  """A continuation of the config's prompt; None if none is wanted."""
  config, tokenizer = job.config, job.data.tokenizer
  if not config.sample_tokens:
    return None
  prompt = [tokenizer.bos_id, *tokenizer.encode(config.sample_prompt)]
  new_tokens, longest = config.sample_tokens, job.model.longest
  if longest is not None:  # A table of positions ends somewhere.
    prompt = [prompt[0], *prompt[1:][-(longest - 2) :]]
    new_tokens = min(new_tokens, longest - len(prompt))
  (tokens,) = decoding.generate(
    job.model,
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
      + (f", {share:.1%} of the device's peak)" if share else ")")
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
