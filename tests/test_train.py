"""The train step against its definition, and runs: resumed, refused, read back."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import magneto_jax
from magneto_jax import runs, training
from magneto_jax.checkpoints import Checkpointer, abstract_like
from magneto_jax.config import ConfigError, TrainConfig, from_config_dict
from magneto_jax.tasks import TASKS

TINY = {
  "steps": 4,
  "batch_size": 4,
  "eval_every": 2,
  "eval_batches": 2,
  "log_every": 1,
  "checkpoint_every": 2,
  "sample_tokens": 4,
  "model": {"layers": 2, "width": 16, "ffn_width": 32, "heads": 2, "dropout": 0.1},
  "data": {"tokenizer": "byte", "seq_length": 32},
  "optimizer": {"warmup_steps": 2, "decay_steps": 20},
}


def tiny(**changes) -> TrainConfig:
  return from_config_dict({**TINY, **changes})


def flags(changes: dict, prefix="--config.") -> list[str]:
  found = []
  for name, value in changes.items():
    nested = isinstance(value, dict)
    found += flags(value, f"{prefix}{name}.") if nested else [f"{prefix}{name}={value}"]
  return found


def final_arrays(workdir, step):
  """Every array of a checkpoint, by path, as the run left it."""
  record = runs.read_record(workdir)
  task = TASKS[record.config.task]
  model = task.build_model(record.config, record.facts)
  optimizer, _ = training.make_optimizer(record.config.optimizer, record.config.steps)
  state = jax.eval_shape(
    lambda key: training.init_state(
      key,
      model=model,
      inputs=task.dummy_inputs(record.config),
      optimizer=optimizer,
      ema=record.config.ema,
    ),
    jax.random.key(0),
  )
  checkpointer = Checkpointer(runs.checkpoints_in(workdir), read_only=True)
  parts = checkpointer.restore(step, abstract_like(state.parts()))
  checkpointer.close()
  return jax.tree.map(np.asarray, parts)


def test_twenty_steps_equal_ten_a_new_process_and_ten(tmp_path):
  """Bit for bit: parameters, averages and optimizer, with dropout, over an epoch's border."""
  changes = {**TINY, "ema": 0.9, "eval_every": 100, "checkpoint_every": 100, "log_every": 100}
  changes["data"] = {**TINY["data"], "seq_length": 16}
  straight, resumed = tmp_path / "straight", tmp_path / "resumed"
  for workdir, steps in ((straight, 20), (resumed, 10), (resumed, 20)):
    command = [sys.executable, "-m", "magneto_jax.train", "--config=configs/gpt.py:tiny"]
    command += [f"--workdir={workdir}", *flags({**changes, "steps": steps})]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
  assert "resumed at step 10" in result.stdout
  a, b = final_arrays(straight, 20), final_arrays(resumed, 20)
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert json.loads((resumed / "summary.json").read_text())["resumed_at_step"] == 10


def test_a_run_leaves_what_it_promises(tmp_path):
  summary = training.train(tiny(), tmp_path)
  assert json.loads((tmp_path / "summary.json").read_text()) == summary
  for name in (
    "validation_loss_nats_per_token",
    "tokens_per_second",
    "steps",
    "wall_seconds",
    "sample",
  ):
    assert name in summary
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
  assert [row["step"] for row in rows if "validation/loss_nats_per_token" in row] == [2, 4]
  assert (tmp_path / "learning_curve.png").stat().st_size > 1000
  assert list((tmp_path / "tensorboard").iterdir())

  model, variables = magneto_jax.load(tmp_path)
  logits = model.apply(variables, jnp.ones((1, 8), jnp.int32))
  assert logits.shape == (1, 8, 260) and bool(jnp.isfinite(logits).all())
  with pytest.raises(FileNotFoundError, match="no step 3"):
    magneto_jax.load(tmp_path, step=3)


def test_a_finished_run_is_reported_again_as_it_was(tmp_path, capsys):
  summary = training.train(tiny(steps=2), tmp_path)
  files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
  capsys.readouterr()
  assert training.train(tiny(steps=2), tmp_path) == summary
  assert {path: path.stat().st_mtime_ns for path in files} == files
  printed = capsys.readouterr().out
  assert "is finished: to go on, set steps to more than 2" in printed
  assert f"{summary['validation_loss_nats_per_token']:.4f} nats a token" in printed


@pytest.mark.parametrize(
  "optimizer, note",
  [
    ({"warmup_steps": 1}, "the cosine schedule now ends at step 4, not 2"),
    ({"warmup_steps": 1, "decay_steps": 9}, ""),
    ({"warmup_steps": 1, "schedule": "constant"}, ""),
    ({"warmup_steps": 4, "decay_steps": 9}, "the warm-up of 4 steps does not end within the run"),
  ],
)
def test_a_learning_rate_that_surprises_is_noted(optimizer, note):
  earlier, config = (tiny(steps=steps, optimizer=optimizer) for steps in (2, 4))
  assert [note in line for line in training.schedule_notes(config, earlier)] == [True] * bool(note)
  assert training.schedule_notes(config, None) == [] or "warm-up" in note


def test_another_run_in_the_workdir_is_refused_with_its_fields(tmp_path):
  training.train(tiny(steps=2), tmp_path)
  before = sorted(path.name for path in tmp_path.iterdir())
  model = {**TINY["model"], "layers": 3}
  with pytest.raises(ConfigError, match=r"seed was 0, is 1.*model.layers was 2, is 3"):
    training.train(tiny(seed=1, model=model), tmp_path)
  with pytest.raises(ConfigError, match="data.seq_length was 32, is 64"):
    training.train(tiny(data={**TINY["data"], "seq_length": 64}), tmp_path)
  with pytest.raises(ConfigError, match="is at step 2 already"):
    training.train(tiny(steps=1), tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_dry_run_prints_and_trains_nothing(tmp_path, capsys):
  training.dry_run(tiny(), tmp_path / "run")
  printed = capsys.readouterr().out
  for words in ("first batch:", "inputs: int32[4, 32]", "memory: state", "x <- x + ffn(LN(x))"):
    assert words in printed
  assert not list(tmp_path.iterdir())


def a_step(config, batch, **options):
  task = TASKS[config.task]
  model = task.build_model(config, {"vocab_size": 260})
  optimizer, _ = training.make_optimizer(config.optimizer, config.steps)
  state = training.init_state(
    jax.random.key(0),
    model=model,
    inputs=task.dummy_inputs(config),
    optimizer=optimizer,
    ema=config.ema,
  )
  return state, *training.train_step(
    state, batch, jax.random.key(1), model=model, task=task, optimizer=optimizer, **options
  )


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


def test_averages_follow_their_recursion():
  config = tiny(ema=0.5)
  before, after, _ = a_step(config, a_batch(), ema=0.5)
  decay = min(0.5, 1 / 10)  # step 0
  jax.tree.map(
    lambda average, old, new: np.testing.assert_allclose(
      average, decay * old + (1 - decay) * new, rtol=1e-5, atol=1e-7
    ),
    after.ema_params,
    before.params,
    after.params,
  )


@pytest.mark.parametrize("recipe", list(magneto_jax.RECIPES))
def test_every_recipe_lowers_the_loss_on_one_batch(recipe):
  config = tiny(recipe=recipe, model={**TINY["model"], "dropout": 0.0})
  task = TASKS[config.task]
  before, after, metrics = a_step(config, a_batch())
  model = task.build_model(config, {"vocab_size": 260})
  loss_sum, weight_sum = task.loss(model, after.params, a_batch())
  assert float(loss_sum / weight_sum) < float(metrics["loss"])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoints(tmp_path):
  training.train(tiny(steps=2), tmp_path)
  # A rate that overflows float32 parameters, in a run that is otherwise the same.
  record = runs.read_record(tmp_path)
  optimizer = dataclasses.replace(record.config.optimizer, learning_rate=1e38)
  config = dataclasses.replace(record.config, optimizer=optimizer, steps=8)
  runs.write_record(tmp_path, record._replace(config=config))
  with pytest.raises(FloatingPointError, match="lower optimizer.learning_rate"):
    training.train(config, tmp_path)
  assert (runs.checkpoints_in(tmp_path) / "2").exists()
