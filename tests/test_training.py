"""The train step against its definition, and runs: resumed, refused, read back."""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
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
from benchmarks.reliability import numbers, states
from magneto_jax import (
  checkpoints,
  decoding,
  evaluation,
  jobs,
  memory,
  monitor,
  program,
  reporting,
  runs,
  training,
)
from magneto_jax.checkpoints import Checkpointer, CheckpointError, DamagedError
from magneto_jax.config import ConfigError, TrainConfig, from_config_dict
from magneto_jax.data import feed, pipelines
from magneto_jax.preemption import Preempted
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


@pytest.mark.ci
def test_twenty_steps_equal_ten_a_new_process_and_ten(tmp_path):
  """Bit for bit: parameters, averages and optimizer, with dropout, over an epoch's border."""
  changes = {**TINY, "ema": 0.9, "eval_every": 100, "checkpoint_every": 100, "log_every": 100}
  changes["data"] = {**TINY["data"], "seq_length": 16}
  straight, resumed = tmp_path / "straight", tmp_path / "resumed"
  for workdir, steps in ((straight, 20), (resumed, 10), (resumed, 20)):
    command = [sys.executable, "-m", "magneto_jax.train", "--config=configs/gpt.py:tiny"]
    command += [f"--workdir={workdir}", *numbers.flags({**changes, "steps": steps})]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
  assert "resumed at step 10" in result.stdout
  a, b = states.arrays(straight, 20), states.arrays(resumed, 20)
  jax.tree.map(np.testing.assert_array_equal, a, b)
  summary = json.loads((resumed / "summary.json").read_text())
  assert summary["resumed_at_step"] == 10
  tokens = summary["tokens_per_second"] * summary["training_seconds"]
  assert tokens == pytest.approx(10 * 4 * 16)
  rows = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows if "train/loss" in row] == [10, 20]


def start_run(workdir, changes, *flags, devices: int, processes: int = 1) -> list[str]:
  """What each process of a run prints."""
  command = [sys.executable, "-m", "magneto_jax.train", "--config=configs/gpt.py:tiny"]
  command += [f"--workdir={workdir}", *numbers.flags(changes), *flags]
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
  timed = {"tokens_per_second", "input_share", "goodput"}
  for a, b in zip(*rows, strict=True):
    assert a.keys() == b.keys()
    for name in a.keys() - timed:
      assert a[name] == pytest.approx(b[name], rel=1e-4), (a["step"], name)
  summaries = [json.loads((workdir / "summary.json").read_text()) for workdir in (one, two)]
  assert summaries[0]["sample"] == summaries[1]["sample"]
  assert [s["devices"] for s in summaries] == [4, 4]
  measured = [0, 2, 4, 6] if diagnostics_every else []
  assert [row["step"] for row in monitor.read(two)] == measured


@pytest.mark.slow
def test_seeds_of_a_pretrained_encoder_are_on_two_hosts_those_of_one(tmp_path):
  model = {**TINY["model"], "positions": "learned"}
  bert, one, two = tmp_path / "bert", tmp_path / "one", tmp_path / "two"
  start_run(bert, {**TINY, "task": "masked_lm", "model": model, "steps": 2}, devices=1)
  data = {**TINY["data"], "too_long": "truncate"}
  own = {"task": "text_classification", "init_from": str(bert), "keep_best": True}
  changes = {**TINY, **own, "model": model, "data": data}
  start_run(one, changes, "--seeds=0,1", devices=2)
  first, second = start_run(two, changes, "--seeds=0,1", devices=1, processes=2)
  assert "2 seeds: 0, 1" in first and "seeds" not in second
  a, b = (json.loads((workdir / "seeds.json").read_text()) for workdir in (one, two))
  assert a["seeds"] == b["seeds"] == [0, 1]
  name = "validation_loss_per_sample"
  values = a["metrics"][name]["values"]
  assert values == pytest.approx(b["metrics"][name]["values"], rel=1e-4)
  assert values[0] != values[1]


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


def replayed(config, workdir, skip=()):
  """The run from its definition: the data, the last state, and the metrics of every step."""
  task = TASKS[config.task]
  data = task.load_data(config, runs.data_in(workdir))
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
  left = (b for k, b in enumerate(batches) if not any(a <= k < end for a, end in skip))
  for batch in itertools.islice(left, config.steps):
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
    for name in ("loss", "gradient_norm"):
      value = metrics[row["step"] - 1][name]
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


def test_damaged_documents_end_a_run_or_are_counted_wherever_it_is_described(
  bigrams, tmp_path, capsys
):
  """Also when it is resumed, with another limit."""
  texts, workdir = tmp_path / "texts.txt", tmp_path / "run"
  texts.write_bytes(b"|".join(b"\xff" * (i % 4 == 0) + b"some words. " * 20 for i in range(28)))

  def train(skip_bad, steps):
    data = {**TINY["data"], "name": "text_files", "train_files": str(texts), "skip_bad": skip_bad}
    config = tiny(steps=steps, data={**data, "document_separator": "|"})
    return training.train(config, workdir)

  with pytest.raises(ConfigError, match="texts.txt: record 0 cannot be read .*set data.skip_bad"):
    train(0, 2)
  with pytest.raises(ConfigError, match="texts.txt: record 24 .*; 6 others were left out"):
    train(6, 2)
  for skip_bad, steps in ((7, 2), (8, 4)):
    assert train(skip_bad, steps)["bad_records"] == 7
    printed = capsys.readouterr().out
    assert printed.count(f"left out: {texts}: record ") == 5
    assert "left out: 7 damaged documents in all" in printed
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [row["bad_records"] for row in rows if "train/loss" in row] == [7] * 4
  # What is left out has changed.
  texts.write_bytes(texts.read_bytes().replace(b"\xff", b"x", 1))
  with pytest.raises(ConfigError, match="the train text is not the one that this run"):
    train(7, 6)


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


def test_what_scores_are_computed_by_is_quoted_with_them(tmp_path):
  """Of a summary that was left before there was any such thing, too."""
  summary = {"sample": None, "validation_bleu": 7.0, "baselines": {}, "flops_per_second": None}
  summary |= {"training_seconds": 1, "wall_seconds": 2}
  without = training._closing(summary, tmp_path)
  lines = training._closing(summary | {"signatures": {"bleu": "nrefs:1|tok:13a"}}, tmp_path)
  assert lines.pop(1) == "as measured      bleu: nrefs:1|tok:13a"
  assert lines == without
  lines = training._closing(summary | {"judged": 1300}, tmp_path)
  assert lines.pop(1) == "judged           1,300 texts that the model wrote"
  assert lines == without


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
  assert [note in line for line in jobs.schedule_notes(config, earlier)] == [True] * bool(note)
  assert jobs.schedule_notes(config, None) == [] or "warm-up" in note


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
  needed = jobs.prepare(config, runs.data_in(tmp_path)).program.memory_by_part().peak
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
  monkeypatch.setattr(jobs, "overview", lambda job: [])
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
  tokens = np.asarray(TASKS["causal_lm"].load_data(config, runs.data_in(tmp_path)).train.tokens)
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
  with pytest.raises(training.Diverged, match="lower optimizer.learning_rate"):
    training.train(config, tmp_path)
  assert runs.last_step(tmp_path) == 2


def test_a_step_that_is_skipped_is_told_counted_and_moves_no_learning_rate(
  bigrams, tmp_path, capsys
):
  config = tiny(steps=5, sample_tokens=0, optimizer={**TINY["optimizer"], "warmup_steps": 4})
  with numbers.faults({2: numbers.GRADIENT_NAN}, config):
    summary = training.train(config, tmp_path)
  assert (summary["skipped_steps"], summary["rewinds"]) == (1, [])
  assert capsys.readouterr().out.count("warning: step 3 is skipped, as its loss is ") == 1
  rows = [row for row in reporting.read_metrics(tmp_path) if "train/skipped_steps" in row]
  assert [row["train/skipped_steps"] for row in rows] == [0, 0, 1, 1, 1]
  assert ["train/loss" in row for row in rows] == [True, True, False, True, True]
  rates = [row["train/learning_rate"] * 4 / 1e-3 for row in rows]
  assert rates == pytest.approx([1, 2, 0, 3, 4], rel=1e-6)  # float32
  assert int(states.arrays(tmp_path, 5)["optimizer"]["skipped"]) == 1


SPIKES = {"factor": 50, "window": 8, "rewind_steps": 4, "skip_batches": 5, "limit": 1}


def test_a_run_with_spikes_goes_back_by_itself_so_often_and_no_more(bigrams, tmp_path, capsys):
  config = tiny(
    steps=40, checkpoint_every=2, keep_checkpoints=4, eval_every=50, spike=SPIKES, sample_tokens=0
  )
  with numbers.faults({14: numbers.SPIKE, 30: numbers.SPIKE}, config):
    with pytest.raises(training.Diverged, match=r"a spike at step 26 \(.*, after 1 rewinds; "):
      training.train(config, tmp_path)
    assert "a spike at step 15: " in capsys.readouterr().out
    record = runs.read_record(tmp_path)
    assert record.rewinds == ({"to": 10, "spike": 15, "skip_batches": "10:15"},)
    assert record.config.skip_batches == "10:15"
    moved = {path.name for path in (tmp_path / "rewound" / "1").iterdir()}
    assert moved == {"12", "14", "metrics.jsonl"}
    # The same command goes on from the last checkpoint, with the batches that the run left out.
    with pytest.raises(ConfigError, match=r"'3:4,10:15' names batches that the run had taken by"):
      training.train(dataclasses.replace(config, skip_batches="3:4"), tmp_path)
    summary = training.train(dataclasses.replace(config, steps=25), tmp_path)
  assert (summary["resumed_at_step"], len(summary["rewinds"])) == (24, 1)
  assert runs.read_record(tmp_path).config.skip_batches == "10:15"


def test_a_spike_before_the_first_checkpoint_is_gone_back_from_to_the_start(bigrams, tmp_path):
  spike = {**SPIKES, "rewind_steps": 8}
  config = tiny(
    steps=16, checkpoint_every=14, keep_checkpoints=2, eval_every=50, spike=spike, sample_tokens=0
  )
  with numbers.faults({10: numbers.SPIKE}, config):
    summary = training.train(config, tmp_path)
  assert summary["rewinds"] == [{"to": 0, "spike": 11, "skip_batches": "0:11"}]
  rows = [row["train/loss"] for row in reporting.read_metrics(tmp_path) if "train/loss" in row]
  _, _, metrics = replayed(config, tmp_path, skip=((0, 11),))
  assert rows == pytest.approx([values["loss"] for values in metrics], rel=1e-5)  # float32


@pytest.mark.ci
def test_a_run_that_is_stopped_between_spike_and_rewind_goes_on_as_if_it_had_not_been(
  bigrams, tmp_path, monkeypatch
):
  """SIGTERM when the rewind is written down, and once before: so early the watch remembers."""
  config = tiny(
    steps=24, checkpoint_every=4, keep_checkpoints=4, eval_every=50, spike=SPIKES, sample_tokens=0
  )
  alone, broken = tmp_path / "alone", tmp_path / "broken"
  rewind = runs.rewind

  def interrupted(*args):
    record = rewind(*args)
    os.kill(os.getpid(), signal.SIGTERM)
    return record

  with numbers.faults({14: numbers.SPIKE}, config):
    expected = training.train(config, alone)
    training.train(dataclasses.replace(config, steps=12), broken)
    with monkeypatch.context() as patched:
      patched.setattr(runs, "rewind", interrupted)
      with pytest.raises(Preempted):
        training.train(config, broken)
    assert runs.read_record(broken).config.skip_batches == "8:15"
    summary = training.train(config, broken)
  assert (
    summary["rewinds"] == expected["rewinds"] == [{"to": 8, "spike": 15, "skip_batches": "8:15"}]
  )
  chex.assert_trees_all_equal(states.arrays(broken, 24), states.arrays(alone, 24))


def test_a_run_that_is_refused_has_taken_nothing_back(bigrams, tmp_path):
  training.train(tiny(steps=4, keep_checkpoints=2, sample_tokens=0), tmp_path)
  with runs.the_only_one(tmp_path), pytest.raises(ConfigError, match="another run is writing"):
    training.train(tiny(steps=4, sample_tokens=0), tmp_path, rewind_to=2)
  assert (runs.last_step(tmp_path), runs.read_record(tmp_path).rewinds) == (4, ())


@pytest.mark.ci
def test_a_run_goes_on_with_another_number_of_workers(bigrams, tmp_path):
  training.train(tiny(steps=2, sample_tokens=0), tmp_path)
  config = tiny(steps=4, sample_tokens=0, data={**TINY["data"], "workers": 1})
  training.train(config, tmp_path)
  rows = [row["train/loss"] for row in reporting.read_metrics(tmp_path) if "train/loss" in row]
  _, _, metrics = replayed(config, tmp_path)
  assert rows == pytest.approx([values["loss"] for values in metrics], rel=1e-5)  # float32


def test_a_run_is_taken_back_by_hand_once_for_the_same_command(bigrams, tmp_path, capsys):
  config = tiny(steps=4, keep_checkpoints=2, sample_tokens=0)
  with pytest.raises(ConfigError, match="has no checkpoint of step 2 to rewind to: it has none"):
    training.train(config, tmp_path, rewind_to=2)
  training.train(config, tmp_path)
  with pytest.raises(ConfigError, match="step 3 to rewind to: it has those of 2, 4, and 0 for th"):
    training.train(config, tmp_path, rewind_to=3)
  config = dataclasses.replace(config, skip_batches="1:3")
  back = training.train(config, tmp_path, rewind_to=0)
  assert back["resumed_at_step"] == 0
  assert {path.name for path in (tmp_path / "rewound" / "1").glob("[0-9]*")} == {"2", "4"}
  # Finished, and so reported again as it was.
  capsys.readouterr()
  assert training.train(config, tmp_path, rewind_to=0) == back
  assert "note: the run was taken back to step 0 already, and goes on" in capsys.readouterr().out
  with pytest.raises(ConfigError, match=r"names batches that the run had taken by step 2"):
    training.train(dataclasses.replace(config, skip_batches="0:1"), tmp_path, rewind_to=2)
  rows = [row["train/loss"] for row in reporting.read_metrics(tmp_path) if "train/loss" in row]
  _, _, metrics = replayed(config, tmp_path, skip=((1, 3),))
  assert rows == pytest.approx([values["loss"] for values in metrics], rel=1e-5)  # float32


@pytest.mark.ci
def test_a_run_that_is_preempted_at_every_turn_ends_as_if_it_had_not_been(
  bigrams, tmp_path, monkeypatch
):
  """Weights, metrics and sample. Half an evaluation is not written, and made up for."""
  config, alone, broken = tiny(checkpoint_every=100), tmp_path / "alone", tmp_path / "broken"
  expected = training.train(config, alone)

  def trained(where, name):
    """Runs on; SIGTERM comes at the first call of a function."""
    real, calls = getattr(where, name), itertools.count()

    def interrupted(*args, **kwargs):
      if next(calls) == 0:
        os.kill(os.getpid(), signal.SIGTERM)
      return real(*args, **kwargs)

    with monkeypatch.context() as patched:
      patched.setattr(where, name, interrupted)
      return training.train(config, broken)

  for where, name, saved in (
    (jobs, "prepare", 0),
    (evaluation.Evaluator, "totals", 2),
    (feed.Feed, "__next__", 3),
    (evaluation.Evaluator, "totals", 4),
  ):
    with pytest.raises(Preempted) as caught:
      trained(where, name)
    assert caught.value.step == runs.last_step(broken) == saved
    assert not reporting.has_validation(broken, saved)
  # From here on nothing is lost that a run could save.
  summary = trained(decoding, "generate")
  assert summary["resumed_at_step"] == 4
  assert summary["sample"] == expected["sample"]
  chex.assert_trees_all_equal(states.arrays(broken, 4), states.arrays(alone, 4))
  timed = {"tokens_per_second", "input_share", "goodput"}
  rows = [
    [{name: row[name] for name in row.keys() - timed} for row in reporting.read_metrics(workdir)]
    for workdir in (alone, broken)
  ]
  assert rows[0] == rows[1]


@pytest.mark.ci
def test_a_damaged_checkpoint_is_gone_back_from_and_the_run_is_the_same(bigrams, tmp_path, capsys):
  """Its metrics are there once; with on_damage=stop nothing is touched."""
  whole, damaged = tmp_path / "whole", tmp_path / "damaged"
  options = {"checkpoint_every": 2, "sample_tokens": 0, "eval_every": 100, "ema": 0.9}
  training.train(tiny(**options, steps=4), whole)
  shutil.copytree(whole, damaged)
  (victim,) = (runs.checkpoints_in(damaged) / "4" / "optimizer").glob("_METADATA")
  victim.write_bytes(b"x")
  before = sorted(damaged.rglob("*"))
  stop = tiny(**options, steps=6, on_damage="stop")
  with pytest.raises(DamagedError, match="/4 is damaged: optimizer/_METADATA .* from step 2"):
    training.train(stop, damaged)
  assert {*damaged.rglob("*")} - {*before} <= {damaged / ".lock"}
  with pytest.raises(DamagedError, match="params/_METADATA is missing.* from step 2"):
    (runs.checkpoints_in(damaged) / "4" / "ema_params" / "_METADATA").unlink()
    magneto_jax.load(damaged)

  capsys.readouterr()
  summary = training.train(tiny(**options, steps=6), damaged)
  printed = capsys.readouterr().out
  assert printed.count("step 4 is damaged (") == 1
  assert ": going on from step 2; the damaged one lies in " in printed
  assert summary["resumed_at_step"] == 2
  training.train(tiny(**options, steps=6), whole)
  chex.assert_trees_all_equal(states.arrays(whole, 6), states.arrays(damaged, 6))
  rows = [row["step"] for row in reporting.read_metrics(damaged) if "train/loss" in row]
  assert rows == [1, 2, 3, 4, 5, 6]
  assert {path.name for path in runs.checkpoints_in(damaged).iterdir()} == {*"246", "damaged"}


def test_two_runs_in_a_workdir_are_refused(bigrams, tmp_path):
  with runs.the_only_one(tmp_path):
    with pytest.raises(ConfigError, match="another run is writing in .*: wait for its end"):
      training.train(tiny(steps=1, sample_tokens=0), tmp_path)
  assert runs.last_step(tmp_path) == 0
  with runs.the_only_one(tmp_path):  # The first has let go of it.
    pass


def test_a_disk_without_room_for_the_checkpoints_is_refused(bigrams, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)
  with pytest.raises(
    CheckpointError, match="no room for checkpoints: 3 are kept .* 1,000 are free"
  ):
    training.train(tiny(steps=1), tmp_path)
  assert runs.last_step(tmp_path) == 0


@pytest.mark.ci
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
  chex.assert_trees_all_equal(states.arrays(plain, 3), states.arrays(measured, 3))
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
