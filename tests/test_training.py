"""The train step against its definition, and runs: resumed, refused, read back."""

import dataclasses
import functools
import itertools
import json
import socket
import subprocess
import sys

import chex
import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

import magneto_jax
from magneto_jax import decoding, memory, monitor, program, reporting, runs, training
from magneto_jax.checkpoints import Checkpointer, abstract_like
from magneto_jax.config import ConfigError, TrainConfig, from_config_dict
from magneto_jax.data import pipelines
from magneto_jax.tasks import TASKS
from tests import simulated

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
  optimizer, _ = program.make_optimizer(record.config.optimizer, record.config.steps)
  state = jax.eval_shape(
    lambda key: program.init_state(
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


@pytest.mark.ci
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
  summary = json.loads((resumed / "summary.json").read_text())
  assert summary["resumed_at_step"] == 10
  tokens = summary["tokens_per_second"] * summary["training_seconds"]
  assert tokens == pytest.approx(10 * 4 * 16)
  rows = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows if "train/loss" in row] == [10, 20]


def start_run(workdir, changes, *, devices: int, processes: int = 1) -> list[str]:
  """What each process of a run prints."""
  command = [sys.executable, "-m", "magneto_jax.train", "--config=configs/gpt.py:tiny"]
  command += [f"--workdir={workdir}", *flags(changes)]
  environment = simulated.devices(devices)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  own = [[]]
  if processes > 1:
    joined = [f"--coordinator_address={address}", f"--num_processes={processes}"]
    own = [[*joined, f"--process_id={i}"] for i in range(processes)]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  started = [subprocess.Popen([*command, *more], env=environment, **pipes) for more in own]
  said = [process.communicate(timeout=500) for process in started]
  assert [process.returncode for process in started] == [0] * processes, said
  return [out for out, _ in said]


@pytest.mark.slow
@pytest.mark.parametrize("diagnostics_every", [0, 2])
def test_a_run_of_two_hosts_is_that_of_one_and_goes_on_on_another_number(
  diagnostics_every, tmp_path
):
  """Same metrics, validation and sample; one host prints and writes; the data go on in place."""
  mesh = {"fsdp": 2, "tensor": 2, "data": 1}
  changes = {**TINY, "mesh": mesh, "diagnostics_every": diagnostics_every, "eval_batches": 3}
  changes["optimizer"] = {"learning_rate": 1e-3, "warmup_steps": 2, "decay_steps": 20}
  one, two = tmp_path / "one", tmp_path / "two"
  start_run(one, {**changes, "steps": 6}, devices=4)
  first, second = start_run(two, {**changes, "steps": 4}, devices=2, processes=2)
  assert "step 4/4" in first and "2 hosts" in first
  assert not [line for line in second.splitlines() if "[Gloo]" not in line and "Rank" not in line]
  (last,) = start_run(two, {**changes, "steps": 6}, devices=4)
  assert "resumed at step 4" in last
  rows = [reporting.read_metrics(workdir) for workdir in (one, two)]
  assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
  timed = {"tokens_per_second", "input_share"}
  for a, b in zip(*rows, strict=True):
    assert a.keys() == b.keys()
    for name in a.keys() - timed:
      assert a[name] == pytest.approx(b[name], rel=1e-4), (a["step"], name)
  summaries = [json.loads((workdir / "summary.json").read_text()) for workdir in (one, two)]
  assert summaries[0]["sample"] == summaries[1]["sample"]
  assert [s["devices"] for s in summaries] == [4, 4]
  measured = [0, 2, 4, 6] if diagnostics_every else []
  assert [row["step"] for row in monitor.read(two)] == measured


@pytest.mark.ci
def test_hosts_that_differ_end_together_in_a_line_before_anything_is_read(tmp_path):
  command = [sys.executable, "-m", "magneto_jax.train", "--config=configs/gpt.py:tiny"]
  command += [f"--workdir={tmp_path / 'run'}", "--num_processes=2"]
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    command.append(f"--coordinator_address=127.0.0.1:{free.getsockname()[1]}")
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  started = [
    subprocess.Popen([*command, f"--process_id={i}", f"--config.seed={i}"], **pipes)
    for i in range(2)
  ]
  for process in started:
    _, errors = process.communicate(timeout=120)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and len(lines) == 1, errors
    assert "differ in config.seed" in lines[0] and "Traceback" not in errors
  assert not (tmp_path / "run").exists()


class Bigrams(nn.Module):
  """A language model that compiles in no time: the next token from the last one."""

  vocab_size: int
  longest = None

  @nn.compact
  def __call__(self, tokens_BT, *, targets_BT=None, state=None, deterministic=True, **unused):
    x_BTD = nn.Embed(self.vocab_size, 16, name="token_embedding")(tokens_BT)
    x_BTD = nn.Dropout(0.5)(x_BTD, deterministic=deterministic)
    logits_BTV = nn.Dense(self.vocab_size, name="head_dense")(x_BTD)
    if targets_BT is not None:
      return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    return logits_BTV if state is None else (logits_BTV, state)

  def init_state(self, batch, length):
    del batch, length
    return ()


@pytest.fixture
def bigrams(monkeypatch):
  """The task with that model."""
  task = TASKS["causal_lm"]._replace(build_model=lambda config, facts: Bigrams(facts["vocab_size"]))
  monkeypatch.setitem(TASKS, "causal_lm", task)


def replayed(config, workdir):
  """The run from its definition: the data, the last state, and the metrics of every step."""
  task = TASKS[config.task]
  data = task.load_data(config.data, runs.data_in(workdir))
  model = task.build_model(config, task.facts(data))
  optimizer, _ = program.make_optimizer(config.optimizer, config.steps)
  options = {"model": model, "optimizer": optimizer, "ema": config.ema}
  key = jax.random.key(config.seed)
  init = functools.partial(program.init_state, inputs=task.dummy_inputs(config), **options)
  state = jax.jit(init)(jax.random.fold_in(key, 0))
  step = functools.partial(
    program.train_step, task=task, accumulation=config.accumulation, **options
  )
  step, dropout_key, metrics = jax.jit(step), jax.random.fold_in(key, 1), []
  batches = pipelines.train_iterator(data.train, batch_size=config.batch_size, seed=config.seed)
  for batch in itertools.islice(batches, config.steps):
    state, values = step(state, batch, dropout_key)
    metrics.append({name: float(value) for name, value in values.items()})
  return data, state, metrics


def mean_loss(model, variables, samples):
  """Nats a weighted token, from the model's logits."""
  batch = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
  logits = jax.jit(model.apply)(
    variables,
    batch["inputs"],
    positions_BT=batch["positions"],
    segment_ids_BT=batch["segment_ids"],
  )
  p = np.exp(np.asarray(logits, np.float64))
  p = np.take_along_axis(p, batch["targets"][..., None], -1)[..., 0] / p.sum(-1)
  return -np.average(np.log(p), weights=batch["weights"])


def test_a_run_leaves_what_it_promises(bigrams, tmp_path):
  """Its figures are those of its definition, of the right step, parameters and data."""
  config = tiny(
    steps=5,
    seed=3,
    accumulation=2,
    ema=0.9,
    log_every=3,
    keep_checkpoints=2,
    sample_prompt="PROSPERO",
    sample_tokens=16,
    sample_temperature=0.0,
    optimizer={**TINY["optimizer"], "learning_rate": 0.3},
  )
  summary = training.train(config, tmp_path)
  assert json.loads((tmp_path / "summary.json").read_text()) == summary
  data, state, metrics = replayed(config, tmp_path)

  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  trained = [row for row in rows if "train/loss" in row]
  assert [row["step"] for row in trained] == [3, 5]
  for row in trained:
    for name, value in metrics[row["step"] - 1].items():
      assert row[f"train/{name}"] == pytest.approx(value, rel=1e-5)  # float32
    decayed = (row["step"] - 1 - 2) / (20 - 2)  # Two steps of warm-up, and the first is step 0.
    rate = 0.3 * (1 + np.cos(np.pi * decayed)) / 2
    assert row["train/learning_rate"] == pytest.approx(rate, rel=1e-5)  # float32
  validated = [row for row in rows if "validation/loss_nats_per_token" in row]
  assert [row["step"] for row in validated] == [2, 4, 5]
  assert (tmp_path / "learning_curve.png").stat().st_size > 1000
  assert list((tmp_path / "tensorboard").iterdir())

  checkpointer = Checkpointer(runs.checkpoints_in(tmp_path), read_only=True)
  assert checkpointer.steps == [4, 5]
  assert checkpointer.parts(5) == {"params", "ema_params", "optimizer", "data", "config"}
  checkpointer.close()

  model, variables = magneto_jax.load(tmp_path)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)  # float32
  jax.tree.map(close, variables["params"], state.ema_params)
  with pytest.raises(FileNotFoundError, match="no step 3"):
    magneto_jax.load(tmp_path, step=3)

  loss = mean_loss(model, variables, [data.validation[i] for i in range(2 * 4)])
  prompt = [1, *data.tokenizer.encode("PROSPERO")]
  continue_prompt = functools.partial(
    decoding.generate, prompts=[prompt], max_new_tokens=16, temperature=0, eos_id=2
  )
  (new,), (of_the_last,) = (
    continue_prompt(model, values) for values in (variables, {"params": state.params})
  )
  assert new.tolist() != of_the_last.tolist()
  expected = {
    "validation_loss_nats_per_token": pytest.approx(loss, rel=1e-5),  # float32
    "steps": 5,
    "resumed_at_step": 0,
    "parameters": 260 * 16 + 16 * 260 + 260,
    "recipe": "magneto",
    "seed": 3,
    "sample": "PROSPERO" + data.tokenizer.decode(new),
  }
  assert {name: summary[name] for name in expected} == expected
  assert "validation_bits_per_byte" not in summary  # That is of the whole text only.
  seconds = summary["training_seconds"]
  assert 0 < seconds + summary["compile_seconds"] < summary["wall_seconds"]
  assert summary["tokens_per_second"] * seconds == pytest.approx(5 * 4 * 32)
  assert summary["flops_per_second"] * seconds == pytest.approx(5 * summary["flops_per_step"])


def test_a_finished_run_is_reported_again_as_it_was(bigrams, tmp_path, capsys):
  summary = training.train(tiny(steps=2), tmp_path)
  files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
  capsys.readouterr()
  assert training.train(tiny(steps=2), tmp_path) == summary
  assert {path: path.stat().st_mtime_ns for path in files} == files
  printed = capsys.readouterr().out
  assert "is finished: to go on, set steps to more than 2" in printed
  # The summary of a shorter run, left by one that was stopped before it wrote its own, is not it.
  runs.write_summary(tmp_path, {**summary, "steps": 1})
  again = training.train(tiny(steps=2), tmp_path)
  assert (again["steps"], again["resumed_at_step"], again["tokens_per_second"]) == (2, 2, None)
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


def test_another_run_in_the_workdir_is_refused_with_its_fields(bigrams, tmp_path):
  training.train(tiny(steps=2), tmp_path)
  before = sorted(path.name for path in tmp_path.iterdir())
  model = {**TINY["model"], "layers": 3}
  with pytest.raises(ConfigError, match=r"seed was 0, is 1.*model.layers was 2, is 3"):
    training.train(tiny(seed=1, model=model), tmp_path)
  with pytest.raises(ConfigError, match="data.seq_length was 32, is 64"):
    training.train(tiny(data={**TINY["data"], "seq_length": 64}), tmp_path)
  with pytest.raises(ConfigError, match="is at step 2 already: set steps to more than 2"):
    training.train(tiny(steps=1), tmp_path)
  record = runs.read_record(tmp_path)
  runs.write_record(tmp_path, record._replace(data={**record.data, "train": "other text"}))
  with pytest.raises(
    ConfigError, match="the train text is not the one that this run was started with"
  ):
    training.train(tiny(steps=3), tmp_path)
  runs.write_record(tmp_path, record)
  # Another config is noticed without its file too: the checkpoint has a copy.
  (tmp_path / "config.json").rename(tmp_path / "elsewhere")
  with pytest.raises(ConfigError, match="seed was 0, is 1"):
    training.train(tiny(seed=1), tmp_path)
  (tmp_path / "elsewhere").rename(tmp_path / "config.json")
  assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_dry_run_prints_and_trains_nothing(tmp_path, capsys):
  training.dry_run(tiny(), tmp_path / "run")
  printed = capsys.readouterr().out
  for words in ("first batch:", "inputs: int32[4, 32]", "memory: state", "x <- x + ffn(LN(x))"):
    assert words in printed
  assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused_before_it_runs_with_what_would_help(tmp_path, monkeypatch):
  config = tiny()
  monkeypatch.setattr(memory, "available", lambda *_: 200_000)
  with pytest.raises(memory.OutOfMemory) as caught:
    training.train(config, tmp_path)
  monkeypatch.undo()
  needed = training.prepare(config, runs.data_in(tmp_path)).program.memory_by_part().peak
  assert caught.value.needed == needed > 200_000
  first, _, *knobs = str(caught.value).splitlines()
  assert first.startswith(f"out of memory on cpu: {needed / 2**20:.1f} MiB needed, ")
  assert len(knobs) == 3 and all("--config." in knob and " saves " in knob for knob in knobs)
  assert not runs.checkpoints_in(tmp_path).exists()


def test_memory_that_runs_out_in_a_step_is_said_in_words(bigrams, tmp_path, monkeypatch):
  def step(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.")

  compiled = program.Program.compile
  monkeypatch.setattr(program.Program, "compile", lambda self: compiled(self)._replace(step=step))
  monkeypatch.setattr(program.Program, "refuse_if_too_large", lambda self: None)
  monkeypatch.setattr(training, "_overview", lambda job: [])
  with pytest.raises(memory.OutOfMemory, match=r"(?s)out of memory .*what would help") as caught:
    training.train(tiny(), tmp_path)
  assert caught.value.needed == 12345


@pytest.mark.slow
def test_a_recipe_of_the_runs_text_is_loaded_as_it_was_trained(tmp_path):
  """The text's correlation is kept with the run."""
  options = {"recipe": "deepscalelm", "sample_tokens": 0, "steps": 1}
  config = tiny(**options, model={**TINY["model"], "layers": 3, "positions": "learned"})
  training.train(config, tmp_path)
  record = runs.read_record(tmp_path)
  tokens = np.asarray(
    TASKS["causal_lm"].load_data(config.data, runs.data_in(tmp_path)).train.tokens
  )
  same = np.sum((np.unique(tokens, return_counts=True)[1] / len(tokens)) ** 2)
  assert record.facts == {"vocab_size": 260, "token_correlation": pytest.approx(same, rel=1e-12)}
  loaded, _ = runs.load(tmp_path)
  architecture = magneto_jax.Architecture(
    *("decoder", 0, 3, 16, 32, 2),
    dropout=0.1,
    token_correlation=record.facts["token_correlation"] / 2,
    embedding_tables=2,
  )
  assert loaded.recipe == magneto_jax.RECIPES["deepscalelm"](architecture).decoder


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoints(bigrams, tmp_path):
  training.train(tiny(steps=2), tmp_path)
  # A rate that overflows float32 parameters, in a run that is otherwise the same.
  record = runs.read_record(tmp_path)
  optimizer = dataclasses.replace(record.config.optimizer, learning_rate=1e38)
  config = dataclasses.replace(record.config, optimizer=optimizer, steps=8)
  runs.write_record(tmp_path, record._replace(config=config))
  with pytest.raises(FloatingPointError, match="lower optimizer.learning_rate"):
    training.train(config, tmp_path)
  assert runs.last_step(tmp_path) == 2


def test_the_sample_ends_where_the_table_of_positions_does(tmp_path):
  """Learned positions of 32 rows, and a sample of 128 tokens: the run's figures come first."""
  model = {**TINY["model"], "positions": "learned", "layers": 1}
  summary = training.train(
    tiny(steps=1, sample_tokens=128, sample_prompt="a", model=model), tmp_path
  )
  assert 1 <= len(summary["sample"].encode()) <= 3 * 32


# ---------------------------------------------------------------------------------------------
# Diagnostics
# ---------------------------------------------------------------------------------------------


@pytest.mark.ci
def test_measuring_a_run_changes_nothing_of_it(tmp_path):
  """Measured at the start, every second step and at the end; the weights are the same bits."""
  plain, measured = tmp_path / "plain", tmp_path / "measured"
  training.train(tiny(steps=3), plain)
  summary = training.train(tiny(steps=3, diagnostics_every=2), measured)
  chex.assert_trees_all_equal(final_arrays(plain, 3), final_arrays(measured, 3))
  assert not (plain / monitor.FILE).exists()
  assert [row["step"] for row in monitor.read(measured)] == [0, 2, 3]
  rows = [row for row in reporting.read_metrics(measured) if "diagnostics/first_update" in row]
  assert [row["step"] for row in rows] == [0, 2, 3]
  figures = summary["diagnostics"]["decoder: stream variance"]
  last = monitor.read(measured)[-1]["stacks"]["decoder"]["variance"]
  assert figures["last"] == last[-1] == rows[-1]["diagnostics/decoder/variance"]
  assert figures["predicted"] == pytest.approx(figures["first"], rel=0.5)
  assert (measured / "diagnostics.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_measurements(tmp_path):
  """Lines after the checkpoint, of a run cut short, are measured anew; none is there twice."""
  training.train(tiny(steps=2, diagnostics_every=1), tmp_path)
  before = monitor.read(tmp_path)
  with (tmp_path / monitor.FILE).open("a") as file:
    file.write(json.dumps({**before[-1], "step": 3}) + '\n{"step": 4, "sta')
  training.train(tiny(steps=4, diagnostics_every=1), tmp_path)
  assert [row["step"] for row in monitor.read(tmp_path)] == [0, 1, 2, 3, 4]
  assert monitor.read(tmp_path)[:3] == before


@pytest.mark.slow
def test_a_run_that_is_measured_late_is_not_compared_with_its_start(tmp_path):
  """Nor is it an error to measure one that is at its end already."""
  training.train(tiny(steps=2), tmp_path)
  summary = training.train(tiny(steps=3, diagnostics_every=5), tmp_path)
  assert [row["step"] for row in monitor.read(tmp_path)] == [2, 3]
  assert summary["diagnostics"]["steps"] == [2, 3]
  assert summary["diagnostics"]["decoder: stream variance"]["predicted"] is None
  for path in ("summary.json", monitor.FILE):
    (tmp_path / path).unlink()
  training.train(tiny(steps=3, diagnostics_every=5), tmp_path)
  assert [row["step"] for row in monitor.read(tmp_path)] == [3]
