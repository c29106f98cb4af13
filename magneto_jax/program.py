"""The train step and its state, compiled for a mesh of devices, here or elsewhere."""

import functools
import math
import socket
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from magneto_jax import distributed, memory, optimizers, sharding
from magneto_jax.config import OptimizerConfig, TrainConfig, config_errors
from magneto_jax.tasks import TASKS, Task
from magneto_jax.tasks.task import Facts

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
    skipped: of the steps, how many have changed nothing, as their numbers were not finite.
    skipped_in_a_row: how many of those were the last ones.
    variables: the model's collection `state`: what it keeps beside its parameters, and changes
      itself while it trains, by no gradient; None of a model that has none.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  ema_params: Any
  skipped: jax.Array
  skipped_in_a_row: jax.Array
  variables: Any = None

  @property
  def live_variables(self) -> dict[str, Any]:
    """What the next step applies the model to."""
    return _variables(self.params, self.variables)

  @property
  def eval_variables(self) -> dict[str, Any]:
    """What evaluation and checkpoints' readers apply it to."""
    params = self.params if self.ema_params is None else self.ema_params
    return _variables(params, self.variables)

  def parts(self) -> dict[str, Any]:
    """The state as a checkpoint's parts; `ema_params` and `variables` only where there are any."""
    counts = {
      "step": self.step,
      "skipped": self.skipped,
      "skipped_in_a_row": self.skipped_in_a_row,
    }
    parts = {"params": self.params, "optimizer": {**counts, "state": self.opt_state}}
    others = {"ema_params": self.ema_params, "variables": self.variables}
    return parts | {name: tree for name, tree in others.items() if tree is not None}

  @classmethod
  def from_parts(cls, parts: dict[str, Any]) -> "TrainState":
    """The state that `parts` took apart."""
    optimizer = dict(parts["optimizer"])
    return cls(
      params=parts["params"],
      opt_state=optimizer.pop("state"),
      ema_params=parts.get("ema_params"),
      variables=parts.get("variables"),
      **optimizer,
    )


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
    layer_decay=config.layer_decay,
    head_rate=config.head_rate,
  )
  return optimizer, schedule


def init_state(key: jax.Array, *, model: nn.Module, inputs: tuple, optimizer, ema: float):
  """The state before the first step."""
  variables = model.init(key, *inputs)
  params = variables["params"]
  # A copy: the step donates its arguments, and one buffer cannot be donated twice.
  ema_params = jax.tree.map(jnp.copy, params) if ema else None
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optimizer.init(params),
    ema_params=ema_params,
    skipped=jnp.int32(0),
    skipped_in_a_row=jnp.int32(0),
    variables=variables.get("state"),
  )


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
  weights_dtype: jnp.dtype | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimizer step on the mean loss of a batch; pure, to be jitted with `state` donated.

  A step whose loss or gradient norm is not finite is skipped: of the state only the counters of
  steps change, so that later steps draw the dropout that they would have drawn, and the learning
  rate follows the optimizer's own count, of the steps that were taken.

  Args:
    state: the state.
    batch: arrays [batch, ...]; `weights` say how much each target counts.
    dropout_key: the run's; the step's own is folded from it and the step.
    model, task, optimizer: static.
    accumulation: parts that the batch is cut into, so that only one part's activations live at a
      time: part i is the rows i, i + accumulation, ..., of which every device has some. The
      gradient is that of the whole batch's mean, however its weights fall. The model's `state` goes
      from part to part.
    ema: decay of `ema_params`; early on it is (1 + step) / (10 + step), so that they forget the
      initial parameters.
    weights_dtype: to which kernels are cast once; None leaves it to each layer, at each use. It
      changes no number where it is the dtype of the model.

  Returns:
    The new state, and the metrics `loss` (mean over weights), `loss_<name>` of each of the task's
    `parts`, `gradient_norm`, and the state's `skipped` and `skipped_in_a_row`.
  """
  batch = task.weigh(model, batch)
  weight_sum = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
  dropout_key = jax.random.fold_in(dropout_key, state.step)

  def mean_loss(params, variables, part, index):
    key = jax.random.fold_in(dropout_key, index)
    given = _variables(params, variables)
    (loss_sum, _), variables, parts = task.loss_and_state(model, given, part, key)
    means = {f"loss_{name}": sum_of_part / weight_sum for name, sum_of_part in parts.items()}
    return loss_sum / weight_sum, (variables, means)

  weights = state.params if weights_dtype is None else _cast_kernels(state.params, weights_dtype)
  grad = jax.value_and_grad(mean_loss, has_aux=True)
  if accumulation == 1:
    (loss, (variables, means)), gradients = grad(weights, state.variables, batch, 0)
    gradients = optax.tree.cast_like(gradients, state.params)
  else:

    def cut(x):
      # Not in consecutive parts: each would be on some of the devices alone.
      parts = x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)
      return sharding.constrain(parts, None, "batch", *[None] * (x.ndim - 1))

    def add(carry, part):
      total, variables = carry
      (loss, (variables, means)), gradients = grad(weights, variables, *part)
      return (jax.tree.map(jnp.add, total, (loss, gradients)), variables), means

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
    cuts = (jax.tree.map(cut, batch), jnp.arange(accumulation))
    ((loss, gradients), variables), means = jax.lax.scan(add, (zero, state.variables), cuts)
    means = jax.tree.map(jnp.sum, means)
  gradients = sharding.constrain_parameters(gradients)

  gradient_norm = optax.tree.norm(gradients)
  finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)

  def take(params, opt_state, ema_params, _):
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    params = optax.apply_updates(params, updates)
    if ema:
      decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
      ema_params = optax.incremental_update(params, ema_params, 1 - decay)
    return params, opt_state, ema_params, variables

  # A branch and no `where`: XLA updates the donated state in place, and rounds as if there were no
  # branch. The flag is of sums over all devices, so that they take the same one.
  parts = state.params, state.opt_state, state.ema_params, state.variables
  *parts, variables = jax.lax.cond(finite, take, lambda *unchanged: unchanged, *parts)
  counters = {
    "skipped": state.skipped + ~finite,
    "skipped_in_a_row": jnp.where(finite, 0, state.skipped_in_a_row + 1),
  }
  metrics = {"loss": loss, **means, "gradient_norm": gradient_norm, **counters}
  return TrainState(state.step + 1, *parts, **counters, variables=variables), metrics


def _variables(params, state) -> dict[str, Any]:
  """What a model is applied to: its parameters and, where it has one, its collection `state`."""
  return {"params": params} if state is None else {"params": params, "state": state}


def _cast_kernels(params, dtype):
  """Kernels in the dtype to which layers cast them themselves; tables are looked up in full.

  Laid out as before: devices cast what they hold, then exchange it.
  """

  def cast(path, leaf):
    return leaf.astype(dtype) if path[-1].key == "kernel" else leaf

  return sharding.constrain_parameters(jax.tree_util.tree_map_with_path(cast, params))


# ---------------------------------------------------------------------------------------------
# Compiled for a mesh
# ---------------------------------------------------------------------------------------------


class Program(NamedTuple):
  """A train step for a mesh: first traced and lowered (`lower_step`), then compiled.

  Attributes:
    config, mesh: of what, for what.
    task, model: the task and its module.
    schedule: learning rate by step.
    state, batch, key: shapes of the step's arguments, with their shardings.
    step: lowered; once compiled, `(state, batch, dropout key) -> (state, metrics)`, which donates
      the state.
    flops: of one step, all devices together.
    lower_seconds, compile_seconds: how long tracing and lowering took, and compiling.
  """

  config: TrainConfig
  mesh: jax.sharding.Mesh
  task: Task
  model: nn.Module
  schedule: optax.Schedule
  state: TrainState
  batch: dict[str, jax.ShapeDtypeStruct]
  key: jax.ShapeDtypeStruct
  step: jax.stages.Lowered | jax.stages.Compiled
  flops: int
  lower_seconds: float
  compile_seconds: float | None = None

  def compile(self) -> "Program":
    """What runs. On a machine that it does not fit XLA may say so instead."""
    begin = time.perf_counter()
    options = compiler_options(self.device.platform, deterministic=self.config.deterministic)
    compiled = self.step.compile(compiler_options=options)
    return self._replace(step=compiled, compile_seconds=time.perf_counter() - begin)

  @property
  def sizes(self) -> memory.Sizes:
    """What estimates of memory go by."""
    state, length = self.state, self.task.length(self.config)
    row_bytes = self.task.row_bytes(self.config, self.model)
    return memory.Sizes(
      state.params, self.batch, self.mesh.size, state.variables, length, row_bytes
    )

  @property
  def device(self) -> jax.Device:
    """One of the mesh's."""
    return self.mesh.devices.flat[0]

  def memory_by_part(self) -> memory.Memory:
    """What the compiled step needs of each device."""
    return memory.of_program(self.step, self.state, self.batch)

  def memory_in_words(self):
    """Where it is compiled or run: see `memory.in_words`."""
    return memory.in_words(self.config, self.sizes, self.device)

  def refuse_if_too_large(self) -> None:
    """Raises OutOfMemory if this machine's devices have not what the compiled step needs."""
    there = memory.available(self.device, self._sharing())
    # What the poorest host has: either all refuse, or none.
    there = min(distributed.everywhere(math.inf if there is None else there))
    needed = self.memory_by_part().peak
    memory.refuse_if_too_large(needed, there, self.config, self.sizes, self.device)

  def _sharing(self) -> int:
    """Devices that share the memory that this process sees: all CPUs of a host, of any process."""
    if self.device.platform != "cpu":
      return 1
    name = socket.gethostname()
    hosts = distributed.everywhere([name, jax.local_device_count()])
    return sum(count for host, count in hosts if host == name)

  def init(self, key: jax.Array) -> TrainState:
    """The state before the first step, made where it lies: no host ever holds all of it."""
    optimizer, _ = make_optimizer(self.config.optimizer, self.config.steps)
    init = _init(self.config, self.task, self.model, optimizer)
    with sharding.use_mesh(self.mesh):
      return jax.jit(init, out_shardings=sharding.of(self.state))(key)

  def put(self, rows: dict[str, Any]) -> dict[str, jax.Array]:
    """The global batch, of which this process gives the rows of `sharding.rows_of_process`."""
    return {
      name: jax.make_array_from_process_local_data(spec.sharding, rows[name], spec.shape)
      for name, spec in self.batch.items()
    }


def compiler_options(platform: str, *, deterministic: bool) -> dict[str, bool]:
  """What XLA is asked for: on a GPU it else adds up gradients of tables in the order they come."""
  if platform != "gpu" or not deterministic:
    return {}
  return {"xla_gpu_exclude_nondeterministic_ops": True}


def compile_step(config: TrainConfig, facts: Facts, mesh: jax.sharding.Mesh) -> Program:
  """The config's train step, compiled for a mesh; see `lower_step`."""
  return lower_step(config, facts, mesh).compile()


def lower_step(config: TrainConfig, facts: Facts, mesh: jax.sharding.Mesh) -> Program:
  """The config's train step for a mesh, whose devices need not be there.

  Args:
    config: the run.
    facts: of its data; see `tasks.Task`.
    mesh: of `sharding.make_mesh`.

  Raises:
    ConfigError: if the model cannot be built, or not be cut as the mesh asks.
  """
  task = TASKS[config.task]
  optimizer, schedule = make_optimizer(config.optimizer, config.steps)
  with config_errors(), sharding.use_mesh(mesh):
    # Each part of the batch is cut as the whole is.
    sharding.rows_of_process(mesh, config.batch_size // config.accumulation)
    model = task.build_model(config, facts)
    whole = sharding.replicated(mesh)
    state = jax.eval_shape(_init(config, task, model, optimizer), jax.random.key(0))
    state = _placed(state, state_shardings(state, optimizer, mesh))
    batch = task.spec(config, facts)
    rows_apart = {name: sharding.batch_sharding(mesh, len(x.shape)) for name, x in batch.items()}
    batch = _placed(batch, rows_apart)
    key = _placed(jax.eval_shape(jax.random.key, 0), whole)
    step = functools.partial(
      train_step,
      model=model,
      task=task,
      optimizer=optimizer,
      accumulation=config.accumulation,
      ema=config.ema,
      weights_dtype=jnp.dtype(config.model.dtype) if config.cast_weights else None,
    )
    step = jax.jit(step, donate_argnums=0, out_shardings=(sharding.of(state), whole))
    begin = time.perf_counter()
    with sharding.use_mesh(mesh, strict=True):
      lowered = step.lower(state, batch, key)
    lower_seconds = time.perf_counter() - begin
  return Program(
    config=config,
    mesh=mesh,
    task=task,
    model=model,
    schedule=schedule,
    state=state,
    batch=batch,
    key=key,
    step=lowered,
    flops=task.flops(config, facts),
    lower_seconds=lower_seconds,
  )


def _init(config: TrainConfig, task: Task, model: nn.Module, optimizer):
  """`key -> the state before the first step`."""
  inputs = task.dummy_inputs(config)
  return functools.partial(
    init_state, model=model, inputs=inputs, optimizer=optimizer, ema=config.ema
  )


def state_shardings(state: TrainState, optimizer, mesh: jax.sharding.Mesh) -> TrainState:
  """Where a state lies: what is kept for a parameter lies with it, the rest is on every device."""
  places = sharding.variable_shardings(state.live_variables, mesh)
  params, whole = places["params"], sharding.replicated(mesh)
  return TrainState(
    step=whole,
    params=params,
    opt_state=optax.tree.map_params(
      optimizer,
      lambda _, where: where,
      state.opt_state,
      params,
      transform_non_params=lambda _: whole,
    ),
    ema_params=None if state.ema_params is None else params,
    skipped=whole,
    skipped_in_a_row=whole,
    variables=places.get("state"),
  )


def _placed(tree, shardings):
  place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  return jax.tree.map(place, tree, shardings)
