"""Classification of texts as a task: its losses, its metrics, and what a run keeps of it."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import magneto_jax
from magneto_jax import reporting, runs, train, training
from magneto_jax.config import ConfigError, from_config_dict
from magneto_jax.data import labelled
from magneto_jax.tasks import TASKS, text_classification

TASK = TASKS["text_classification"]
FACTS = {"vocab_size": 260, "token_correlation": 0.05, "classes": 3}
# TP 6, TN 3, FP 2, FN 1.
COUNTS = {(1, 1): 6, (0, 0): 3, (0, 1): 2, (1, 0): 1}
TARGETS, PREDICTIONS = np.array([pair for pair, n in COUNTS.items() for _ in range(n)]).T


def config_of(**fields):
  return from_config_dict({"task": "text_classification", **fields})


# ---------------------------------------------------------------------------------------------
# Losses and metrics
# ---------------------------------------------------------------------------------------------


def test_the_loss_of_classes_is_their_nats_and_of_numbers_the_squared_error():
  scores = np.random.default_rng(0).normal(size=(4, 3))
  classes, weights = np.array([2, 0, 1, 1]), np.array([1.0, 1.0, 1.0, 0.0], np.float32)
  nats = [np.log(np.exp(row).sum()) - row[c] for row, c in zip(scores, classes, strict=True)]
  batch = {"targets": jnp.asarray(classes), "weights": jnp.asarray(weights)}
  loss, weight = TASK.score(jnp.asarray(scores), batch)
  assert (float(loss), weight) == (pytest.approx(sum(nats[:3]), rel=1e-6), 3)
  numbers = np.array([0.2, 1.0, 0.5, 9.0], np.float32)
  loss, weight = TASK.score(jnp.asarray(scores[:, :1]), batch | {"targets": jnp.asarray(numbers)})
  assert float(loss) == pytest.approx(np.sum((scores[:3, 0] - numbers[:3]) ** 2), rel=1e-6)
  assert weight == 3


def test_metrics_are_the_known_values():
  metric = lambda name: text_classification.METRICS[name](TARGETS, PREDICTIONS, 2)
  assert metric("matthews_correlation") == pytest.approx(0.478091, abs=1e-6)
  assert metric("f1") == pytest.approx(0.8)
  assert metric("accuracy") == pytest.approx(0.75)
  three = np.array([0, 1, 2, 2]), np.array([0, 2, 2, 1])
  # Of the classes 1, 0 and 1/2.
  assert text_classification.METRICS["f1"](*three, 3) == pytest.approx(0.5)
  x, y = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 1.0, 4.0, 9.0])
  by_hand = np.mean((x - 1.5) * (y - 3.5)) / (x.std() * y.std())
  assert text_classification.METRICS["pearson"](x, y, 0) == pytest.approx(by_hand)
  assert text_classification.METRICS["spearman"](x, y, 0) == pytest.approx(1.0)
  assert text_classification.METRICS["spearman"](x, -y, 0) == pytest.approx(-1.0)


def test_a_constant_prediction_correlates_with_nothing():
  constant = np.ones(4, np.float32)
  for name in ("pearson", "spearman"):
    assert text_classification.METRICS[name](np.arange(4.0), constant, 0) == 0
  ones = np.ones(12, int)
  assert text_classification.METRICS["matthews_correlation"](TARGETS, ones, 2) == 0
  assert text_classification.METRICS["f1"](TARGETS, 0 * ones, 2) == 0


def test_f1_is_of_the_datas_classes_whichever_occur():
  """Of 2/3 and 4/5, and of 0 for each class without rows."""
  targets, predictions = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
  f1 = lambda classes: text_classification.METRICS["f1"](targets, predictions, classes)
  mean = (2 / 3 + 4 / 5) / 3
  assert [f1(2), f1(3), f1(4)] == pytest.approx([4 / 5, mean, 3 / 4 * mean])


@pytest.mark.parametrize("name", labelled.GLUE)
def test_the_score_is_the_mean_of_glues_metrics(name):
  metrics = labelled.GLUE[name].metrics
  data = types.SimpleNamespace(metrics=metrics, classes=labelled.GLUE[name].classes)
  totals = {"loss": 6.0, "weight": 12.0, "targets": TARGETS, "predictions": PREDICTIONS}
  found = TASK.metrics(totals, data, whole=True)
  assert found.keys() == {"loss_per_sample", *metrics, "score"}
  assert found["loss_per_sample"] == 0.5
  assert found["score"] == pytest.approx(np.mean([found[name] for name in metrics]))


def test_baselines_are_counted():
  rows = lambda *targets: types.SimpleNamespace(targets=np.array(targets, np.int32))
  data = types.SimpleNamespace(
    metrics=("accuracy", "f1"), classes=("a", "b", "c"), train=rows(1, 1, 2), validation=rows(1, 2)
  )
  assert TASK.baselines(data) == {"accuracy": {"majority_class": 0.5, "chance": 1 / 3}}
  assert TASK.baselines(types.SimpleNamespace(metrics=("pearson", "spearman"))) == {}


# ---------------------------------------------------------------------------------------------
# Models and plans
# ---------------------------------------------------------------------------------------------


def test_fields_reach_the_model_or_are_refused():
  model = {"layers": 3, "width": 16, "dropout": 0.2, "pooling": "mean"}
  built = TASK.build_model(config_of(model=model), FACTS)
  assert (built.pooling, built.dropout_rate, built.classes) == ("mean", 0.2, 3)
  assert (built.encoder.recipe.num_layers, built.encoder.vocab_size) == (3, 260)
  for fields, message in (
    ({"label_smoothing": 0.1}, "label_smoothing is not read with"),
    ({"vocab_chunk": 3}, "vocab_chunk is not read with"),
    ({"model": {"window": 3}}, "model.window=3 is of earlier tokens"),
  ):
    with pytest.raises(ConfigError, match=message):
      TASK.build_model(config_of(**fields), FACTS)


def test_planned_facts_and_batches_are_those_of_the_data(tmp_path):
  config = config_of(batch_size=3, data={"tokenizer": "byte", "seq_length": 96})
  data = TASK.load_data(config, tmp_path)
  facts, planned = TASK.facts(data), TASK.planned_facts(config)
  assert planned.keys() == facts.keys() and facts["classes"] == planned["classes"] == 8
  assert facts["vocab_size"] == planned["vocab_size"] == 260
  counted = np.concatenate(
    [sample["inputs"][sample["mask"]] for sample in map(data.train.__getitem__, range(50))]
  )
  assert 1 in counted and 2 in counted and 0 not in counted
  spec = TASK.batch_spec(config)
  assert spec == {
    name: jax.ShapeDtypeStruct((3, *array.shape), array.dtype)
    for name, array in data.train[0].items()
  }
  plan = lambda **data: TASK.planned_facts(config_of(data={"tokenizer": "byte", **data}))
  assert plan(name="glue/mnli")["classes"] == 3
  assert plan(name="glue/stsb")["classes"] == plan(name="x", regression=True)["classes"] == 1
  assert TASK.batch_spec(config_of(data={"name": "glue/stsb"}))["targets"].dtype == jnp.float32
  with pytest.raises(ConfigError, match="the classes of data.name='imdb_reviews' are not known"):
    plan(name="imdb_reviews")


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


class Bag(nn.Module):
  """A classifier that compiles in no time: a sum over tokens."""

  classes: int

  @nn.compact
  def __call__(self, tokens_BT, *, mask_BT=None, deterministic=True):
    x_BTD = nn.Embed(260, 16, name="token_embedding")(tokens_BT)
    x_BTD = nn.Dropout(0.5)(x_BTD, deterministic=deterministic)
    if mask_BT is not None:
      x_BTD = jnp.where(mask_BT[..., None], x_BTD, 0)
    return nn.Dense(self.classes, name="head_out")(x_BTD.sum(1))


@pytest.fixture
def bags(monkeypatch):
  """The task with that model."""
  task = TASK._replace(build_model=lambda config, facts: Bag(facts["classes"]), pretrained="")
  monkeypatch.setitem(TASKS, "text_classification", task)


def small(folder, **fields):
  """Random letters: there is nothing to learn, so that scores go up and down."""
  rng = np.random.default_rng(0)
  for part, count in (("train", 60), ("validation", 30)):
    rows = ["".join(rng.choice(list("abcdef"), 6)) + f"\t{rng.integers(3)}" for _ in range(count)]
    (folder / f"{part}.tsv").write_text("text\tlabel\n" + "\n".join(rows))
  data = {f"{part}_files": f"{folder}/{part}.tsv" for part in ("train", "validation")}
  data |= {"name": "text_files", "tokenizer": "byte", "seq_length": 8}
  given = {"steps": 12, "batch_size": 8, "eval_every": 2, "checkpoint_every": 2, "log_every": 6}
  given |= {"keep_best": True, "keep_checkpoints": 1, "data": data}
  given |= {"optimizer": {"learning_rate": 0.5, "schedule": "constant"}}
  return config_of(**given | fields)


def scores_by_step(workdir):
  rows = reporting.read_metrics(workdir)
  return {row["step"]: row["validation/score"] for row in rows if "validation/score" in row}


def test_the_best_checkpoint_is_kept_beside_the_newest(bags, tmp_path, capsys):
  """The first of equal ones; its weights score what is told of them."""
  config = small(tmp_path)
  workdir = tmp_path / "run"
  summary = training.train(config, workdir)
  scores = scores_by_step(workdir)
  assert list(scores) == [2, 4, 6, 8, 10, 12]
  best = max(scores, key=scores.__getitem__)
  assert best < 12 and scores[best] > scores[12]  # Else this shows nothing: take another seed.
  folders = runs.checkpoints_in(workdir).iterdir()
  assert {int(folder.name) for folder in folders if folder.name.isdecimal()} == {best, 12}
  assert (summary["best_step"], summary["best_score"]) == (best, scores[best])
  assert summary["validation_score"] == scores[12]
  assert summary["scored_weights"] == "params of step 12"
  assert f"score, at step {best}: magneto_jax.load(" in capsys.readouterr().out

  model, variables = magneto_jax.load(workdir, step="best")
  data = TASK.load_data(config, runs.data_in(workdir))
  measure = functools.partial(TASK.measured, model, variables)
  batch = {
    name: np.stack([data.validation[i][name] for i in range(30)]) for name in data.validation[0]
  }
  found = {name: np.asarray(value) for name, value in jax.jit(measure)(batch).items()}
  assert TASK.metrics(found, data, whole=True)["score"] == pytest.approx(scores[best])


@pytest.mark.ci
def test_a_run_that_is_resumed_keeps_the_best_of_all(bags, tmp_path):
  config, workdir, stopped = small(tmp_path), tmp_path / "run", tmp_path / "stopped"
  summary = training.train(config, workdir)
  training.train(small(tmp_path, steps=6), stopped)
  again = training.train(config, stopped)
  assert scores_by_step(stopped) == scores_by_step(workdir)
  for name in ("best_step", "best_score"):
    assert again[name] == summary[name]


def test_the_best_is_only_had_where_it_was_kept(tmp_path):
  for keep_best, message in (
    (False, "kept no best checkpoint: train with"),
    (True, "no checkpoint"),
  ):
    record = runs.Record(small(tmp_path, keep_best=keep_best), {}, FACTS)
    runs.write_record(tmp_path, record)
    with pytest.raises(FileNotFoundError, match=message):
      magneto_jax.load(tmp_path, step="best")


@pytest.mark.ci
def test_seeds_are_runs_of_their_own_and_come_to_mean_and_spread(bags, tmp_path, capsys):
  config, workdir = small(tmp_path, steps=4), tmp_path / "runs"
  found = train.train_seeds(config, workdir, [3, 1])
  assert json.loads((workdir / "seeds.json").read_text()) == found
  said = capsys.readouterr().out.split("2 seeds: 3, 1")[1]
  assert found["seeds"] == [3, 1]
  summaries = [json.loads((workdir / f"seed_{s}" / "summary.json").read_text()) for s in (3, 1)]
  assert [summary["seed"] for summary in summaries] == [3, 1]
  assert found["metrics"].keys() >= {"validation_score", "best_score"}
  for name, figures in found["metrics"].items():
    values = np.array([summary[name] for summary in summaries])
    assert figures["values"] == values.tolist()
    assert figures["mean"] == pytest.approx(values.mean())
    assert figures["std"] == pytest.approx(values.std(ddof=1))
    assert figures["median"] == np.median(values)
    assert f"{values.mean():.4f}" in said and name in said
  # What is finished is not run again.
  before = {p: p.stat().st_mtime_ns for p in workdir.glob("seed_*/**/*") if p.is_file()}
  assert train.train_seeds(config, workdir, [3, 1]) == found
  after = {p: p.stat().st_mtime_ns for p in workdir.glob("seed_*/**/*") if p.is_file()}
  assert after == before


def test_what_was_cut_of_the_validation_set_is_counted():
  data = types.SimpleNamespace(validation=[0, 1, 2], truncated=(5, 2))
  assert TASK.counts(data) == {"samples": 3, "truncated": 2}


def test_what_a_seed_lacks_and_what_is_no_metric_has_no_mean():
  """A perplexity beyond float64, say; and the step of the best."""
  first = {"validation_loss": 1.0, "validation_perplexity": 3.0, "best_loss": 0.5, "best_step": 4}
  found = reporting.spread([first, {"validation_loss": 2.0, "best_loss": 0.5, "best_step": 8}])
  assert {name: figures["mean"] for name, figures in found.items()} == {
    "validation_loss": 1.5,
    "best_loss": 0.5,
  }


def test_one_seed_has_no_spread():
  found = reporting.spread([{"validation_score": 0.5, "steps": 3}])
  assert found == {"validation_score": {"mean": 0.5, "std": None, "median": 0.5, "values": [0.5]}}
