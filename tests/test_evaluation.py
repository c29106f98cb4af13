"""Evaluation of a run against the same losses summed by hand, and its command."""

import dataclasses
import json
import math
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from magneto_jax import evaluation, runs, sharding, training
from magneto_jax.checkpoints import Checkpointer
from magneto_jax.config import ConfigError, from_config_dict
from magneto_jax.convert import saved
from magneto_jax.data import pipelines, tokenizers
from magneto_jax.tasks import TASKS
from tests import simulated

TEXTS = {
  "train": "To be, or not to be, that is the question.\n" * 4,
  "validation": "Whether 'tis nobler in the mind to suffer. ",
  "test": "The slings and arrows of outrageous förtune,\nor to take arms.",
}
T = 16


def write_run(workdir, texts, *, scales=(1.0,)) -> None:
  """A run on three files, as training leaves it: its record, and a checkpoint for each scale."""
  files = {name: workdir.parent / f"{name}.txt" for name in texts}
  for name, text in texts.items():
    files[name].write_text(text)
  data = {"name": "text_files", "tokenizer": "byte", "seq_length": T}
  data |= {f"{name}_files": str(path) for name, path in files.items()}
  sizes = {"layers": 1, "width": 16, "ffn_width": 16, "heads": 2}
  config = from_config_dict({"model": sizes, "data": data, "batch_size": 4, "accumulation": 2})
  task = TASKS[config.task]
  loaded = task.load_data(config, runs.data_in(workdir))
  record = runs.Record(config, dict(loaded.identity), task.facts(loaded))
  runs.write_record(workdir, record)
  model = task.build_model(config, record.facts)
  variables = jax.jit(model.init)(jax.random.key(0), *task.dummy_inputs(config))
  iterator = pipelines.train_iterator([{"x": np.zeros(1)}], batch_size=1, seed=0)
  checkpointer = Checkpointer(runs.checkpoints_in(workdir))
  for step, scale in enumerate(scales, 4):
    params = jax.tree.map(lambda x, scale=scale: scale * x, variables["params"])
    checkpointer.save(step, {"params": params}, iterator, runs.as_json(record))
  checkpointer.close()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run with the checkpoints 4 and 5, of which the first is the better."""
  folder = tmp_path_factory.mktemp("evaluated") / "run"
  write_run(folder, TEXTS, scales=(1.0, 2.0))
  return folder


def by_hand(workdir, text: str, step: int) -> tuple[float, int]:
  """Summed nats and tokens of one document, window after window, each alone, from its logits."""
  model, variables = runs.load(workdir, step=step)
  logits = jax.jit(model.apply)
  tokenizer = tokenizers.ByteTokenizer()
  tokens = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
  nats = 0.0
  for start in range(0, len(tokens) - 1, T):
    window = tokens[start : start + T + 1]
    count = len(window) - 1
    # What follows changes nothing before it.
    logits_TV = logits(variables, np.pad(window[:-1], (0, T - count))[None])[0]
    log_p_TV = special.log_softmax(np.asarray(logits_TV, np.float64)[:count], axis=-1)
    nats -= np.sum(log_p_TV[np.arange(count), window[1:]])
  return nats, len(tokens) - 1


@pytest.mark.parametrize(
  "split, step", [("validation", None), ("test", 4), pytest.param("train", 4, marks=pytest.mark.ci)]
)
def test_a_split_is_scored_as_by_hand(split, step, workdir):
  """Every token once; the newest checkpoint by default; perplexities of both units."""
  opened = evaluation.open_run(workdir, step=step, batch_size=3)
  result = evaluation.evaluate(opened, split)
  nats, tokens = by_hand(workdir, TEXTS[split], step or 5)
  bits = nats / math.log(2) / len(TEXTS[split].encode())
  assert result["metrics"] == pytest.approx(
    {
      "loss_nats_per_token": nats / tokens,
      "perplexity_per_token": math.exp(nats / tokens),
      "bits_per_byte": bits,
      "perplexity_per_byte": 2**bits,
    },
    rel=1e-5,  # float32
  )
  assert (result["split"], result["step"]) == (split, step or 5)
  assert result["counts"] == {"samples": -(-tokens // T)}
  json.dumps(result, allow_nan=False)


def test_evaluating_leaves_a_run_as_it_is(workdir):
  """Also what a save that is not finished has written so far is neither read nor removed."""
  (runs.checkpoints_in(workdir) / "6.orbax-checkpoint-tmp").mkdir()
  held = lambda: {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  before = held()
  assert evaluation.evaluate(evaluation.open_run(workdir))["step"] == 5
  assert held() == before


def test_a_converted_model_and_no_run_are_refused(tmp_path, workdir):
  with pytest.raises(FileNotFoundError, match="holds no run"):
    evaluation.open_run(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"no step 7, only \[4, 5\]"):
    evaluation.open_run(workdir, step=7)
  (tmp_path / saved.MODEL).touch()
  with pytest.raises(ConfigError, match="is a converted model, which has neither a tokenizer nor"):
    evaluation.open_run(tmp_path)


def test_the_best_checkpoint_can_be_asked_for(tmp_path):
  """By name, and the result has its number."""
  write_run(tmp_path / "run", TEXTS, scales=(1.0, 2.0))
  record = runs.held_record(tmp_path / "run")
  config = dataclasses.replace(record.config, keep_best=True)
  runs.write_record(tmp_path / "run", record._replace(config=config))
  rows = [{"step": step, "validation/loss_nats_per_token": nats} for step, nats in ((4, 1), (5, 2))]
  (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
  assert evaluation.open_run(tmp_path / "run", step="best").step == 4
  assert evaluation.open_run(tmp_path / "run").step == 5


def test_another_text_is_refused_before_anything_is_computed(tmp_path, workdir):
  other = tmp_path / "other.txt"
  other.write_text("Words, words, words.")
  opened = evaluation.open_run(workdir, changes={"data.validation_files": str(other)})
  with pytest.raises(ConfigError, match="the validation text is not the one that this run was"):
    evaluation.evaluate(opened)
  # Of another split only the training text, to which the facts belong, must be the run's.
  evaluation.load_split(opened, "test")
  opened = evaluation.open_run(workdir, changes={"data.train_files": str(other)})
  with pytest.raises(ConfigError, match="the train text is not the one that this run was started"):
    evaluation.load_split(opened, "test")


def test_data_may_lie_elsewhere_and_nothing_else_may_differ(tmp_path, workdir):
  moved = tmp_path / "moved.txt"
  moved.write_text(TEXTS["validation"])
  opened = evaluation.open_run(workdir, changes={"data.validation_files": str(moved)})
  assert evaluation.load_split(opened, "validation").validation_bytes == len(TEXTS["validation"])
  for changes, message in (
    ({"model.width": 8}, "config.model.width is the run's own and cannot be changed"),
    ({"data.seq_length": 8}, "config.data.seq_length is the run's own and cannot"),
    ({"data.workrs": 8}, "config.data.workrs does not exist; did you mean config.data.workers"),
    ({"mesh.fsdp": 3}, "the mesh data=-1 x fsdp=3 does not fit"),
  ):
    with pytest.raises(ConfigError, match=message) as error:
      evaluation.open_run(workdir, changes=changes)
    assert "\n" not in str(error.value)


def test_files_have_no_split_but_those_that_are_named(workdir):
  opened = evaluation.open_run(workdir, changes={"data.test_files": ""})
  with pytest.raises(ConfigError, match="test_files is empty: name at least one file of your own"):
    evaluation.load_split(opened, "test")
  with pytest.raises(
    ConfigError, match="files of one's own have no split 'dev', only train, validation a"
  ):
    evaluation.load_split(opened, "dev")
  opened = evaluation.open_run(
    workdir, changes={"data.test_files": str(workdir.parent / "train.txt")}
  )
  with pytest.raises(ConfigError, match="train_files and test_files must not share files"):
    evaluation.load_split(opened, "test")


def test_what_a_model_writes_by_itself_is_judged_too(workdir, monkeypatch):
  """And a loss that is not finite ends in a line, before that is done."""
  task, opened = TASKS["causal_lm"], evaluation.open_run(workdir)
  judge = lambda config, model, variables, data, mesh: ({"bleu": float(len(data.validation))}, 7)
  measure = lambda model, params, batch: {"loss": jnp.sum(batch["weights"]) * loss, "weight": 1.0}
  task = task._replace(judge=judge, measure=measure)
  monkeypatch.setitem(TASKS, "causal_lm", task)
  loss = 1.0
  found = evaluation.evaluate(opened, "test")
  assert found["counts"] == {"samples": found["metrics"]["bleu"], "judged": 7}
  loss = math.nan
  with pytest.raises(FloatingPointError, match="'test' is nan with the weights of step 5"):
    evaluation.evaluate(opened, "test")


def test_perplexities_are_those_of_the_metrics():
  told = evaluation.in_other_words({"loss_nats_per_token": math.log(50.0), "bits_per_byte": 3.0})
  assert told == pytest.approx(
    {
      "loss_nats_per_token": math.log(50.0),
      "perplexity_per_token": 50.0,
      "bits_per_byte": 3.0,
      "perplexity_per_byte": 8.0,
    }
  )
  assert evaluation.in_other_words({"accuracy": 0.5}) == {"accuracy": 0.5}
  own = {"loss_nats_per_token": 1.0, "pseudo_perplexity": 2.0}
  assert evaluation.in_other_words(own) == own
  assert evaluation.in_other_words({"loss_nats_per_token": 1e4}) == {"loss_nats_per_token": 1e4}


def test_rows_come_back_in_order_without_those_that_fill_up():
  """Numbers are summed, arrays joined, and at most so many batches are read."""
  samples = [{"x": np.full(2, i, np.float32)} for i in range(1, 8)]
  measure = lambda params, batch: {
    "sum": params * batch["x"].sum(),
    "rows": batch["x"][:, 0],
    "both": batch["x"],
  }
  mesh, calls = sharding.make_mesh({}), []
  evaluator = evaluation.Evaluator(measure, mesh, 3)
  totals = evaluator.totals(2.0, samples, before_each=lambda: calls.append(0))
  assert totals["sum"] == 2 * 2 * 28 and len(calls) == 3
  np.testing.assert_array_equal(totals["rows"], np.arange(1.0, 8.0))
  np.testing.assert_array_equal(totals["both"], np.repeat(np.arange(1.0, 8.0), 2).reshape(7, 2))
  assert evaluator.totals(1.0, samples, batches=2)["rows"].tolist() == [1, 2, 3, 4, 5, 6]


def evaluated(*flags, devices=1):
  command = [sys.executable, "-m", "magneto_jax.evaluate", *flags]
  return subprocess.run(command, capture_output=True, text=True, env=simulated.devices(devices))


def test_the_command_tells_and_writes_the_same(tmp_path, workdir):
  output = tmp_path / "results" / "test.json"
  result = evaluated(f"--workdir={workdir}", "--split=test", "--step=4", f"--output={output}")
  assert result.returncode == 0 and not result.stderr, result.stderr
  written, expected = (
    json.loads(output.read_text()),
    evaluation.evaluate(evaluation.open_run(workdir, step=4), "test"),
  )
  assert written.pop("seconds") > 0 and expected.pop("seconds") > 0
  assert written["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
  assert written | {"metrics": 0} == expected | {"metrics": 0}
  assert "step 4, on the split 'test': 4 samples, in " in result.stdout
  assert re.search(f"^bits a byte +{written['metrics']['bits_per_byte']:.4f}$", result.stdout, re.M)


@pytest.mark.ci
@pytest.mark.parametrize(
  "flags, message",
  [
    (["--split=dev"], "files of one's own have no split 'dev', only train, validation and test"),
    (["--config.modle.width=2"], "did you mean config.model.width?"),
    (["--config.model.width=2"], "config.model.width is the run's own"),
    (["--output=."], "--output=. is a folder: name a file"),
    (["--step=last"], "flag --step=last: it must be the number of a step, or best"),
    (["--step=best"], "kept no best checkpoint: train with config.keep_best=True"),
  ],
)
def test_a_mistake_ends_in_one_line(flags, message, workdir):
  result = evaluated(f"--workdir={workdir}", *flags)
  assert result.returncode == 2, result.stderr
  assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.ci
def test_any_mesh_gives_the_same_numbers(tmp_path, workdir):
  """Weights cut over four devices, and rows too."""
  flags = ["--batch_size=4", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
  output = tmp_path / "four.json"
  result = evaluated(f"--workdir={workdir}", *flags, f"--output={output}", devices=4)
  assert result.returncode == 0, result.stderr
  written = json.loads(output.read_text())
  alone = evaluation.evaluate(evaluation.open_run(workdir))["metrics"]
  assert written["devices"] == 4
  assert written["metrics"] == pytest.approx(alone, rel=1e-5)  # float32


@pytest.mark.slow
def test_two_hosts_give_the_same_numbers_and_one_tells_them(tmp_path, workdir):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  output = tmp_path / "two.json"
  command = [sys.executable, "-m", "magneto_jax.evaluate", f"--workdir={workdir}", "--batch_size=4"]
  command += ["--config.mesh.fsdp=2", "--config.mesh.data=2", f"--output={output}"]
  command += [f"--coordinator_address={address}", "--num_processes=2"]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  started = [
    subprocess.Popen([*command, f"--process_id={i}"], env=simulated.devices(2), **pipes)
    for i in range(2)
  ]
  told = [process.communicate(timeout=500) for process in started]
  assert [process.returncode for process in started] == [0, 0], told
  assert ["bits a byte" in out for out, _ in told] == [True, False]
  alone = evaluation.evaluate(evaluation.open_run(workdir))["metrics"]
  assert json.loads(output.read_text())["metrics"] == pytest.approx(alone, rel=1e-5)  # float32


@pytest.mark.ci
def test_a_finished_run_is_evaluated_to_what_it_wrote(tmp_path, workdir):
  """Averaged weights, when the run kept them."""
  config = runs.held_record(workdir).config
  config = dataclasses.replace(config, steps=2, ema=0.5, sample_tokens=0)
  summary = training.train(config, tmp_path / "run")
  found = evaluation.evaluate(evaluation.open_run(tmp_path / "run"))["metrics"]
  assert found["loss_nats_per_token"] == summary["validation_loss_nats_per_token"]
  assert found["bits_per_byte"] == summary["validation_bits_per_byte"]
