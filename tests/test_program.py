"""The train step against its definition."""

import functools
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import magneto_jax
from magneto_jax import program, sharding
from magneto_jax.config import OptimizerConfig, TrainConfig, from_config_dict
from magneto_jax.tasks import TASKS

TINY = {
  "steps": 4,
  "batch_size": 4,
  "model": {"layers": 2, "width": 16, "ffn_width": 32, "heads": 2, "dropout": 0.1},
  "data": {"tokenizer": "byte", "seq_length": 32},
  "optimizer": {"warmup_steps": 2, "decay_steps": 20},
}


def tiny(**changes) -> TrainConfig:
  return from_config_dict({**TINY, **changes})


FACTS = {"vocab_size": 260, "token_correlation": 0.02}


def a_step(config, batch, **options):
  task = TASKS[config.task]
  model = task.build_model(config, FACTS)
  optimizer, _ = program.make_optimizer(config.optimizer, config.steps)
  state = program.init_state(
    jax.random.key(0),
    model=model,
    inputs=task.dummy_inputs(config),
    optimizer=optimizer,
    ema=config.ema,
  )
  step = functools.partial(
    program.train_step, model=model, task=task, optimizer=optimizer, **options
  )
  return state, *jax.jit(step)(state, batch, jax.random.key(1))


def a_batch(seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(4, 260, (4, 33)).astype(np.int32)
  return {
    "inputs": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "positions": np.tile(np.arange(32, dtype=np.int32), (4, 1)),
    "segment_ids": np.ones((4, 32), np.int32),
    "weights": (rng.random((4, 32)) < 0.7).astype(np.float32),
  }


def test_accumulation_is_the_gradient_of_the_whole_batch():
  """Also where the parts hold different numbers of weighted targets.

  With a large epsilon Adam's update is in proportion to the gradient; else it would turn rounding
  noise, as in the key biases whose gradient is zero, into steps of full size.
  """
  model = {**TINY["model"], "dropout": 0.0}
  config = tiny(model=model, optimizer={"eps": 1.0, "schedule": "constant", "weight_decay": 0.0})
  before, whole, metrics = a_step(config, a_batch())
  _, parts, metrics_of_parts = a_step(config, a_batch(), accumulation=4)
  for name in metrics:
    np.testing.assert_allclose(metrics[name], metrics_of_parts[name], rtol=1e-5)  # float32
  jax.tree.map(
    lambda old, a, b: np.testing.assert_allclose(a - old, b - old, rtol=0, atol=1e-7),
    before.params,
    whole.params,
    parts.params,
  )


def drawn(model, variables, batch, dropout_key):
  """A loss whose gradient is what is drawn for each row, if the rows are one-hot."""
  del model
  params = variables["params"]
  noise_B = jax.random.uniform(dropout_key, batch["weights"].shape)
  nats_B = noise_B * (batch["x"] @ params["w"])
  loss, first = jnp.sum(batch["weights"] * nats_B), jnp.sum(batch["x"][:, 0] * nats_B)
  return (loss, None), None, {"first": first, "others": loss - first}


def steps_on_draws(count, **options):
  """All states of `count` steps of rate 1/2 on one batch of that loss, and their metrics."""
  optimizer, params = optax.sgd(0.5), {"w": jnp.arange(1.0, 5.0)}
  task = types.SimpleNamespace(loss_and_state=drawn, weigh=lambda model, batch: batch)
  step = functools.partial(
    program.train_step, model=None, task=task, optimizer=optimizer, **options
  )
  step = jax.jit(step)
  none = jnp.int32(0)
  first = program.TrainState(none, params, optimizer.init(params), params, none, none)
  states, metrics = [first], []
  for _ in range(count):
    batch = {"x": jnp.eye(4), "weights": jnp.ones((4,))}
    state, values = step(states[-1], batch, jax.random.key(1))
    states.append(state)
    metrics.append(values)
  return states, metrics


@pytest.mark.parametrize("accumulation", [1, 4])
def test_every_step_and_every_part_draws_its_own_dropout(accumulation):
  states, metrics = steps_on_draws(3, accumulation=accumulation)
  gradients = [2 * (old.params["w"] - new.params["w"]) for old, new in itertools.pairwise(states)]
  assert len(set(np.round(np.ravel(gradients), 4).tolist())) == 12
  norms = [float(values["gradient_norm"]) for values in metrics]
  np.testing.assert_allclose(norms, np.linalg.norm(gradients, axis=1), rtol=1e-5)  # float32
  # The loss is linear in w: a row's share of it is its gradient times its w.
  for gradient, old, values in zip(gradients, states, metrics, strict=False):
    shares = gradient * old.params["w"]
    found = [values[f"loss{name}"] for name in ("", "_first", "_others")]
    np.testing.assert_allclose(found, [shares.sum(), shares[0], shares[1:].sum()], rtol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_only_its_counters(accumulation, value):
  """Of whichever row; what follows is as if its update had been left out."""
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
  params, task = (
    {"w": jnp.arange(1.0, 5.0)},
    types.SimpleNamespace(loss_and_state=drawn, weigh=lambda model, batch: batch),
  )
  options = {"model": None, "task": task, "optimizer": optimizer, "ema": 0.5}
  step = jax.jit(functools.partial(program.train_step, accumulation=accumulation, **options))
  none = jnp.int32(0)
  state = program.TrainState(none, params, optimizer.init(params), params, none, none)
  batch = {"x": jnp.eye(4), "weights": jnp.ones((4,))}
  bad = {"x": jnp.eye(4).at[2, 2].set(value), "weights": jnp.ones((4,))}
  key = jax.random.key(1)
  state, _ = step(state, batch, key)
  moved = state.replace(step=state.step + 2, skipped=none + 2, skipped_in_a_row=none + 2)
  for count in (1, 2):
    state, metrics = step(state, bad, key)
    assert not np.isfinite(metrics["gradient_norm"])
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (count, count)
  jax.tree.map(np.testing.assert_array_equal, state, moved)
  (state, metrics), (expected, _) = step(state, batch, key), step(moved, batch, key)
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (2, 0)


class Centred(nn.Module):
  """(x - mean) w, with the mean of all x that it has been trained on, later ones counting more."""

  @nn.compact
  def __call__(self, x_BD, *, deterministic=True):
    mean_D = self.variable("state", "mean", jnp.zeros, x_BD.shape[1:])
    w_D = self.param("w", nn.initializers.ones, x_BD.shape[1:])
    if self.is_mutable_collection("state") and not self.is_initializing():
      mean_D.value = (mean_D.value + x_BD.mean(0)) / 2
    return (x_BD - mean_D.value[None]) @ w_D


CENTRED = TASKS["causal_lm"]._replace(
  inputs=lambda batch: ((batch["x"],), {}),
  score=lambda y_B, batch: (jnp.sum(y_B * batch["weights"]), jnp.sum(batch["weights"])),
)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_models_own_state_goes_from_part_to_part_and_from_step_to_step(accumulation):
  """And stays where a step is skipped, as the rest does; without training nothing changes it."""
  optimizer, x = optax.sgd(0.5), np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
  make = {"model": Centred(), "inputs": (x,), "optimizer": optimizer, "ema": 0.0}
  state = program.init_state(jax.random.key(0), **make)
  assert state.variables["mean"].tolist() == [0.0, 0.0, 0.0]
  step = functools.partial(
    program.train_step,
    model=Centred(),
    task=CENTRED,
    optimizer=optimizer,
    accumulation=accumulation,
  )
  step, key = jax.jit(step), jax.random.key(1)
  batch = {"x": x, "weights": np.ones(4, np.float32)}
  mean, w = np.zeros(3), np.ones(3)
  for _ in range(2):
    state, metrics = step(state, batch, key)
    losses, gradient = [], np.zeros(3)
    for part in range(accumulation):
      rows = x[part::accumulation].astype(np.float64)
      mean = (mean + rows.mean(0)) / 2
      losses.append(np.sum((rows - mean) @ w) / 4)
      gradient += np.sum(rows - mean, axis=0) / 4
    w -= 0.5 * gradient
    np.testing.assert_allclose(state.variables["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], sum(losses), rtol=1e-4, atol=1e-6)
  bad = {**batch, "weights": np.array([1, 1, np.nan, 1], np.float32)}
  skipped, _ = step(state, bad, key)
  jax.tree.map(np.testing.assert_array_equal, skipped.eval_variables, state.eval_variables)
  measured = CENTRED.measured(Centred(), state.eval_variables, batch)
  np.testing.assert_allclose(measured["loss"], np.sum((x - mean) @ w), rtol=1e-4)


def test_a_state_is_put_together_from_its_parts():
  for more in itertools.product((None, {"w": jnp.int32(5)}), (None, {"mean": jnp.int32(6)})):
    numbers = map(jnp.int32, range(5))
    step, w, moment, skipped, in_a_row = numbers
    ema_params, variables = more
    state = program.TrainState(step, {"w": w}, (moment,), ema_params, skipped, in_a_row, variables)
    parts = state.parts()
    assert program.TrainState.from_parts(parts) == state
    assert len(parts) == 2 + sum(tree is not None for tree in more)


@pytest.mark.parametrize(
  "ema, decays", [(0.5, (1 / 10, 2 / 11, 3 / 12)), (0.15, (0.1, 0.15, 0.15))]
)
def test_averages_follow_their_recursion(ema, decays):
  """Of the parameters after each step, with a decay that rises to `ema`."""
  states, _ = steps_on_draws(3, ema=ema)
  average = np.arange(1.0, 5.0)
  for state, decay in zip(states[1:], decays, strict=True):
    average = decay * average + (1 - decay) * np.asarray(state.params["w"], np.float64)
    np.testing.assert_allclose(state.ema_params["w"], average, rtol=1e-5)  # float32


def test_the_optimizer_is_that_of_its_config():
  """Adam behind a clip, every field other than its default, in NumPy's float64."""
  config = OptimizerConfig(
    learning_rate=0.3,
    b1=0.7,
    b2=0.8,
    eps=0.05,
    weight_decay=0.2,
    decay_mask="all",
    clip_norm=1.5,
    schedule="polynomial",
    power=2.0,
    warmup_steps=2,
    decay_steps=6,
    end_factor=0.1,
  )
  rates = [0.15, 0.3, 0.3, *(0.3 * (0.1 + 0.9 * (1 - p) ** 2) for p in (1 / 4, 2 / 4))]
  optimizer, schedule = program.make_optimizer(config, steps=100)
  np.testing.assert_allclose([schedule(step) for step in range(5)], rates, rtol=1e-5)  # float32
  gradients = np.random.default_rng(0).normal(size=(5, 6)) * np.array([[0.1, 1, 1, 0.2, 5]]).T
  params = {"kernel": jnp.ones((3,)), "bias": jnp.ones((3,))}
  x, m, v, state = np.ones(6), np.zeros(6), np.zeros(6), optimizer.init(params)
  update = jax.jit(optimizer.update)
  for i, (rate, g) in enumerate(zip(rates, gradients, strict=True), 1):
    tree = {"kernel": jnp.float32(g[:3]), "bias": jnp.float32(g[3:])}
    updates, state = update(tree, state, params)
    params = optax.apply_updates(params, updates)
    g = g * min(1, 1.5 / np.linalg.norm(g))
    m, v = 0.7 * m + 0.3 * g, 0.8 * v + 0.2 * g**2
    adam = (m / (1 - 0.7**i)) / (np.sqrt(v / (1 - 0.8**i)) + 0.05)
    x = x - rate * (adam + 0.2 * x)
    got = np.concatenate([params["kernel"], params["bias"]])
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-6)  # float32


FIRST = ("magneto", "post_ln", "normformer")
LATER = [pytest.param(n, marks=pytest.mark.slow) for n in magneto_jax.RECIPES if n not in FIRST]


@pytest.mark.parametrize("recipe", [*FIRST, *LATER])
def test_every_recipe_lowers_the_loss_on_one_batch(recipe):
  config = tiny(recipe=recipe, model={**TINY["model"], "dropout": 0.0})
  task = TASKS[config.task]
  before, after, metrics = a_step(config, a_batch())
  model = task.build_model(config, FACTS)
  loss_sum, weight_sum = task.loss(model, {"params": after.params}, a_batch())
  assert float(loss_sum / weight_sum) < float(metrics["loss"])


def test_weights_cast_once_are_those_that_layers_cast():
  """To the bit; what is no kernel, and the state, stays float32."""
  config = tiny(model=TINY["model"] | {"dtype": "bfloat16"}, optimizer={"schedule": "constant"})
  _, once, metrics = a_step(config, a_batch(), weights_dtype=jnp.bfloat16)
  _, each, expected = a_step(config, a_batch())
  assert metrics["loss"] == expected["loss"]
  jax.tree.map(np.testing.assert_array_equal, once.params, each.params)
  assert {leaf.dtype for leaf in jax.tree.leaves(once)} == {jnp.dtype(d) for d in ("f4", "i4")}


def test_a_compiled_step_is_the_step_and_its_state_is_where_it_says():
  """On a mesh of one device; `tests/test_sharding.py` has larger ones."""
  config = tiny()
  mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
  compiled = program.compile_step(config, FACTS, mesh)
  state = compiled.init(jax.random.key(0))
  jax.tree.map(lambda x, spec: np.testing.assert_equal(x.shape, spec.shape), state, compiled.state)
  key = jax.random.key(1)
  found, metrics = compiled.step(state, compiled.put(a_batch()), key)
  _, expected, expected_metrics = a_step(config, a_batch())
  np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-3), found.params, expected.params
  )


def test_a_gpu_is_asked_for_the_same_bits_each_time_by_default():
  asked = {
    (platform, deterministic): program.compiler_options(platform, deterministic=deterministic)
    for platform in ("cpu", "gpu", "tpu")
    for deterministic in (True, False)
  }
  options = asked.pop(("gpu", TrainConfig().deterministic))
  assert options and not any(asked.values())
  # XLA refuses names that it does not know, here also those of other platforms.
  jax.jit(jnp.sin).lower(1.0).compile(compiler_options=options)


def test_a_program_is_compiled_with_its_options(monkeypatch):
  lowered = program.lower_step(tiny(), FACTS, sharding.make_mesh({"data": 1}, jax.devices()[:1]))
  options = {("cpu", True): {"of_no_compiler": True}}
  find = lambda platform, deterministic: options[platform, deterministic]
  monkeypatch.setattr(program, "compiler_options", find)
  with pytest.raises(jax.errors.JaxRuntimeError, match="of_no_compiler"):
    lowered.compile()


def test_cast_weights_casts_whole_stacks_of_kernels():
  """Before the scan over layers, not each layer's in it."""
  mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
  cast = {}
  for chosen in (False, True):
    config = tiny(model=TINY["model"] | {"dtype": "bfloat16"}, cast_weights=chosen)
    text = program.lower_step(config, FACTS, mesh).step.as_text()
    cast[chosen] = len(re.findall(r"tensor<2x16x32xf32>\) -> tensor<2x16x32xbf16>", text))
  assert cast == {False: 0, True: 1}
