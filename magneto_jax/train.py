"""Trains a model: `python -m magneto_jax.train --config=configs/gpt.py:tiny --workdir=DIR`."""

import contextlib
import functools
import itertools
import json
import math
import os
import pathlib
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import linen as nn
from flax import struct

import magneto_jax
from magneto_jax import cli, decoding, optimizers, reporting, runs
from magneto_jax.checkpoints import Checkpointer, abstract_like
from magneto_jax.config import ConfigError, OptimizerConfig, TrainConfig
from magneto_jax.data import pipelines
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
    optimizer: the optimizer's state.
    averages: an exponential moving average of the parameters, or None.
  """

  step: jax.Array
  params: Any
  optimizer: Any
  averages: Any

  @property
  def evaluated(self):
    """The parameters that evaluation and checkpoints' readers use."""
    return self.params if self.averages is None else self.averages

  def parts(self) -> dict[str, Any]:
    """The state as a checkpoint's parts; `averages` only where there are any."""
    parts = {"params": self.params, "optimizer": {"step": self.step, "state": self.optimizer}}
    return parts if self.averages is None else {**parts, "averages": self.averages}

  @classmethod
  def from_parts(cls, parts: dict[str, Any]) -> "TrainState":
    """The state that `parts` took apart."""
    optimizer = parts["optimizer"]
    return cls(optimizer["step"], parts["params"], optimizer["state"], parts.get("averages"))


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
  averages = jax.tree.map(jnp.copy, params) if ema else None
  return TrainState(jnp.int32(0), params, optimizer.init(params), averages)


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
    ema: decay of the averages; early on it is (1 + step) / (10 + step), so that they forget the
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

  updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
  params = optax.apply_updates(state.params, updates)
  averages = state.averages
  if ema:
    decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
    averages = optax.incremental_update(params, averages, 1 - decay)
  metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}
  return TrainState(state.step + 1, params, optimizer_state, averages), metrics


def evaluate(eval_step, params, batches) -> tuple[float, float]:
  """Sums of losses and of weights over batches, in float64."""
  sums = [eval_step(params, batch) for batch in batches]
  return tuple(np.sum(np.asarray(sums, np.float64), axis=0))


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


def train(config: TrainConfig, workdir: str | os.PathLike, *, dry_run: bool = False) -> dict:
  """Trains, evaluates, saves and reports; a workdir that holds the same run is gone on with.

  Args:
    config: the run.
    workdir: made if it does not exist; see `runs` for what it holds.
    dry_run: whether to print shapes, parameters, memory and the first batch, and stop.

  Returns:
    What `summary.json` holds; after a dry run an empty dict.

  Raises:
    ConfigError: if the workdir holds another run, or one that is past the config's steps.
    FloatingPointError: if the loss is no longer finite; the checkpoints are kept.
  """
  started = time.perf_counter()
  console = reporting.make_console()
  workdir = pathlib.Path(workdir)
  earlier = runs.read_record(workdir)
  if earlier is not None:
    # Before the data is read: with other data settings, reading it would fail less clearly.
    runs.refuse_if_different(workdir, earlier, earlier._replace(config=config))
  workdir.mkdir(parents=True, exist_ok=True)

  # ------------------------------------------------------------------------------------- Data
  task = TASKS[config.task]
  data = task.load_data(config.data, runs.data_in(workdir))
  record = runs.Record(config, json.loads(json.dumps(data.identity)), task.facts(data))
  if earlier is not None:
    runs.refuse_if_different(workdir, earlier, record)
  iterator = pipelines.train_iterator(
    data.train, batch_size=config.batch_size, seed=config.seed, num_workers=config.data.workers
  )
  tokens_per_step = config.batch_size * config.data.seq_length

  # ---------------------------------------------------------------- Model, optimizer and steps
  root_key = jax.random.key(config.seed)
  parameter_key, dropout_key, sample_key = (jax.random.fold_in(root_key, i) for i in range(3))
  model = task.build_model(config, record.facts)
  optimizer, schedule = make_optimizer(config.optimizer, config.steps)
  init = functools.partial(
    init_state, model=model, inputs=task.dummy_inputs(config), optimizer=optimizer, ema=config.ema
  )
  step_fn = functools.partial(
    train_step,
    model=model,
    task=task,
    optimizer=optimizer,
    accumulation=config.accumulation,
    ema=config.ema,
  )
  abstract_state = abstract_like(jax.eval_shape(init, parameter_key))
  abstract_batch = {
    name: jax.ShapeDtypeStruct((config.batch_size, *array.shape), array.dtype)
    for name, array in data.train[0].items()
  }
  compiling = time.perf_counter()
  compiled_step = (
    jax.jit(step_fn, donate_argnums=0).lower(abstract_state, abstract_batch, dropout_key).compile()
  )
  compile_seconds = time.perf_counter() - compiling
  eval_step = jax.jit(lambda params, batch: task.loss(model, params, batch))

  def validate(params) -> dict[str, float]:
    batches = pipelines.eval_batches(data.validation, config.batch_size)
    totals = evaluate(eval_step, params, itertools.islice(batches, config.eval_batches or None))
    return task.metrics(*totals, data, whole=not config.eval_batches)

  # ------------------------------------------------------------------------- What will be run
  step_flops = task.flops(config, data)
  for line in _overview(config, task, data, abstract_state, compiled_step, step_flops):
    console.print(line, highlight=False, soft_wrap=True)
  console.print(f"compiled in {compile_seconds:.1f} s", highlight=False)
  if dry_run:
    console.print(reporting.parameter_table(abstract_state.params))
    for line in _first_batch(next(iterator), data):
      console.print(line, highlight=False, soft_wrap=True, markup=False)
    return {}

  # ------------------------------------------------------------------- Checkpoints and resuming
  checkpointer = Checkpointer(runs.checkpoints_in(workdir), keep=config.keep_checkpoints)
  start = max(checkpointer.steps, default=0)
  if start > config.steps:
    raise ConfigError(
      f"{workdir} is at step {start} already: set steps to more than {config.steps}"
    )
  if start:
    state = TrainState.from_parts(checkpointer.restore(start, abstract_state.parts(), iterator))
    console.print(f"resumed at step {start:,}", highlight=False)
  else:
    state = jax.jit(init)(parameter_key)
    console.print(reporting.parameter_table(state.params))
  runs.write_record(workdir, record)
  writer = reporting.MetricWriter(workdir, after_step=start)

  def save(step: int) -> None:
    checkpointer.save(step, state.parts(), iterator, runs.as_json(record))

  # --------------------------------------------------------------------------------- The steps
  stopwatch = reporting.Stopwatch()
  validation: dict[str, float] = {}

  def report(step: int, metrics: dict[str, jax.Array]) -> None:
    """Reads a step's metrics, which waits for the step; so it is called one step late."""
    loss = float(metrics["loss"])
    if not math.isfinite(loss):
      raise FloatingPointError(
        f"the loss is {loss} at step {step}: lower optimizer.learning_rate or set"
        f" optimizer.clip_norm; checkpoints up to the last are kept in {workdir}"
      )
    rate = (step - start) * tokens_per_step / stopwatch.seconds
    progress.step(step, loss=loss, tokens_per_second=rate)
    if step % config.log_every == 0 or step == config.steps:
      row = {
        "train/loss": loss,
        "train/gradient_norm": float(metrics["gradient_norm"]),
        "train/learning_rate": float(schedule(step - 1)),
        "tokens_per_second": rate,
      }
      writer.write(step, row)
      left = reporting.duration((config.steps - step) * stopwatch.seconds / (step - start))
      progress.line(
        f"step {step:,}/{config.steps:,}  loss {loss:.3f}  {rate:,.0f} tokens/s  {left} left",
        terminal=False,
      )

  with (
    contextlib.closing(checkpointer),  # Waits for the last checkpoint, also when the run fails.
    contextlib.closing(writer),
    reporting.Progress(console, start=start, total=config.steps) as progress,
  ):
    unread = None
    for step in range(start + 1, config.steps + 1):
      state, metrics = compiled_step(state, next(iterator), dropout_key)
      if unread is not None:
        report(*unread)
      unread = step, metrics
      last = step == config.steps
      if last or step % config.eval_every == 0 or step % config.checkpoint_every == 0:
        report(*unread)
        unread = None
        with stopwatch.paused():
          if last or step % config.eval_every == 0:
            validation = validate(state.evaluated)
            writer.write(step, {f"validation/{k}": v for k, v in validation.items()})
            progress.line(f"step {step:,}/{config.steps:,}  validation: {_in_words(validation)}")
          if last or step % config.checkpoint_every == 0:
            save(step)

    training_seconds = stopwatch.seconds

  # ----------------------------------------------------------------------------------- Summary
  validation = validation or validate(state.evaluated)
  steps_taken = config.steps - start
  device = jax.devices()[0]
  peak = reporting.peak_flops(device.device_kind)
  flops_per_second = step_flops * steps_taken / training_seconds
  baselines = task.baselines(data)
  summary = {
    **{f"validation_{name}": value for name, value in validation.items()},
    "baselines": baselines,
    "tokens_per_second": steps_taken * tokens_per_step / training_seconds,
    "steps": config.steps,
    "resumed_at_step": start,
    "wall_seconds": time.perf_counter() - started,
    "training_seconds": training_seconds,
    "compile_seconds": compile_seconds,
    "parameters": reporting.count(state.params),
    "flops_per_step": step_flops,
    "flops_per_second": flops_per_second,
    "share_of_peak": flops_per_second / peak if peak else None,
    "device": device.device_kind,
    "recipe": config.recipe,
    "seed": config.seed,
    "versions": {
      "magneto_jax": magneto_jax.__version__,
      "jax": jax.__version__,
      "python": platform.python_version(),
    },
  }
  summary["sample"] = _sample(config, model, state.evaluated, data, sample_key)
  curve = reporting.draw_learning_curve(workdir, title=_title(config), unit="nats a token")
  (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
  for line in _closing(summary, workdir, curve):
    console.print(line, highlight=False, soft_wrap=True, markup=False)
  return summary


# ---------------------------------------------------------------------------------------------
# What a person reads
# ---------------------------------------------------------------------------------------------


def _title(config: TrainConfig) -> str:
  model = config.model
  return f"{config.recipe}, {model.layers} layers of width {model.width}, {config.data.name} text"


def _overview(config, task, data, abstract_state, compiled_step, step_flops) -> list[str]:
  """The recipe in words, and what a step costs."""
  memory = compiled_step.memory_analysis()
  device = jax.devices()[0]
  peak = reporting.peak_flops(device.device_kind)
  bound = f", at least {1e3 * step_flops / peak:.3g} ms at the device's peak" if peak else ""
  state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state))
  parameters = reporting.count(abstract_state.params)
  return [
    f"[bold]{_title(config)}[/bold] on {device.device_kind}",
    *(f"  {line}" for line in task.describe(config)),
    f"{parameters:,} parameters; a step: {config.batch_size} x {config.data.seq_length} tokens, "
    f"{reporting.in_units(step_flops, 'FLOP')}{bound}",
    f"data: {len(data.train):,} training and {len(data.validation):,} validation samples of "
    f"{config.data.seq_length} tokens, {data.tokenizer.vocab_size:,} in the vocabulary",
    f"memory: state {reporting.in_units(state_bytes, 'B', base=1024)}, a step's temporaries "
    f"{reporting.in_units(memory.temp_size_in_bytes, 'B', base=1024)}",
  ]


def _first_batch(batch, data) -> list[str]:
  """The first batch: shapes, and the start of its first sample as text."""
  lines = ["first batch:"]
  lines += [f"  {name}: {array.dtype}{list(array.shape)}" for name, array in batch.items()]
  return [*lines, f"  starts with {data.tokenizer.decode(batch['inputs'][0][:48])!r}"]


def _in_words(values: dict[str, float], digits: int = 4) -> str:
  return ", ".join(f"{value:.{digits}f} {name.replace('_', ' ')}" for name, value in values.items())


def _sample(config, model, params, data, key) -> str | None:
  """A continuation of the config's prompt; None if none is wanted."""
  if not config.sample_tokens:
    return None
  tokenizer = data.tokenizer
  prompt = [tokenizer.bos_id, *tokenizer.encode(config.sample_prompt)]
  (tokens,) = decoding.generate(
    model,
    {"params": params},
    [prompt],
    max_new_tokens=config.sample_tokens,
    key=key,
    temperature=config.sample_temperature,
    eos_id=tokenizer.eos_id,
    pad_id=tokenizer.pad_id,
  )
  return config.sample_prompt + tokenizer.decode(tokens)


def _closing(summary: dict, workdir: pathlib.Path, curve: pathlib.Path) -> list[str]:
  """What stands at the end of a run."""
  lines = []
  if summary["sample"] is not None:
    lines += ["", "sample:", *(f"  | {line}" for line in summary["sample"].splitlines()), ""]
  share = summary["share_of_peak"]
  speed = f"{reporting.in_units(summary['flops_per_second'], 'FLOP/s')}"
  speed += f", {share:.1%} of the device's peak" if share else ""
  bits = summary.get("validation_bits_per_byte")
  return [
    *lines,
    f"validation loss  {summary['validation_loss_nats_per_token']:.4f} nats a token"
    + (f", {bits:.4f} bits a byte" if bits else ""),
    *([f"for comparison   {_in_words(summary['baselines'], 2)}"] if summary["baselines"] else []),
    f"speed            {summary['tokens_per_second']:,.0f} tokens a second ({speed})",
    f"time             {reporting.duration(summary['training_seconds'])} of training, "
    f"{reporting.duration(summary['wall_seconds'])} in all",
    f"checkpoints      {runs.checkpoints_in(workdir)}",
    f"metrics          {workdir / 'metrics.jsonl'}, {workdir / 'tensorboard'}",
    f"picture          {curve}",
    f"summary          {workdir / 'summary.json'}",
  ]


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------

_CONFIG = cli.define_config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run's files go.", required=True)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would be run, and stop.")


def main(argv: list[str]) -> None:
  del argv
  train(cli.typed_config(_CONFIG), _WORKDIR.value, dry_run=_DRY_RUN.value)


if __name__ == "__main__":
  cli.run(main)
