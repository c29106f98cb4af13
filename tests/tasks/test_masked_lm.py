"""Masked language modelling: what is scored, what a place sees, and what is reported."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax import reporting, runs, training
from magneto_jax.config import ConfigError, from_config_dict
from magneto_jax.data import masking
from magneto_jax.tasks import TASKS, masked_lm
from tests import reference
from tests.models.common import compiled

TASK = TASKS["masked_lm"]
V = 24  # of the tokenizer; the mask's id
LENGTH = 12
SMALL = {"layers": 1, "width": 16, "ffn_width": 16, "heads": 2}


def config_of(*, model=None, data=None, **fields):
  data = {"seq_length": LENGTH, "mask_rate": 0.3} | (data or {})
  return from_config_dict(
    {"task": "masked_lm", "model": SMALL | (model or {}), "data": data} | fields
  )


def drawing(**fields):
  rates = {"rate": 0.3, "keep": 0.0, "random": 0.0} | fields
  return masking.Masking(**rates, vocab_size=V)


def row(*documents, seed=0, mask=None):
  """A masked row of documents, each behind a bos, and padding."""
  sample = {name: np.zeros(LENGTH, np.int32) for name in ("inputs", "segment_ids", "positions")}
  start = 0
  for segment, tokens in enumerate(documents, 1):
    where = slice(start, start := start + 1 + len(tokens))
    sample["inputs"][where] = [1, *tokens]
    sample["segment_ids"][where], sample["positions"][where] = segment, range(1 + len(tokens))
  return (mask or drawing())(sample, np.random.default_rng(seed))


def stacked(*rows):
  return {name: np.stack([r[name] for r in rows]) for name in rows[0]}


BLANK = {name: np.zeros_like(values) for name, values in row([4]).items()}


@pytest.fixture(scope="module")
def built():
  """An untied model of one layer, and random parameters."""
  config = config_of(model={"tied_embeddings": False, "positions": "learned"})
  model = TASK.build_model(config, {"vocab_size": V + 1})
  return model, reference.random_params(model, *TASK.dummy_inputs(config))


@pytest.fixture(scope="module")
def nats(built):
  """`(params, batch) -> -log p [B, K]` of the chosen tokens, and its summed gradient."""
  model, _ = built

  def cost(params, batch):
    args, keywords = TASK.inputs(batch)
    found = model.apply({"params": params}, *args, **keywords)
    return jnp.sum(found * batch["weights"]), found

  return compiled(jax.value_and_grad(cost, has_aux=True))


A, B, C = row([5, 6, 7, 8, 9]), row([9, 4, 7], [11, 12, 13, 14], seed=1), row([20], seed=2)


# ---------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", (0.0, 0.2))
def test_the_loss_is_of_the_chosen_tokens_alone(built, smoothing):
  """From the logits of all places, by hand: a sum over targets, and their number; smooth or not."""
  model, params = built
  batch = stacked(A, B, C)
  args, keywords = TASK.inputs(batch)
  whole = {name: keywords[name] for name in ("segment_ids_BT", "positions_BT")}
  smooth = model.clone(label_smoothing=smoothing, vocab_chunk=7 if smoothing else 0)

  @compiled
  def run(params):
    logits = model.apply({"params": params}, *args, **whole)
    right = jnp.take_along_axis(jnp.argmax(logits, -1), batch["places"], axis=1)
    return (
      logits,
      TASK.loss(smooth, {"params": params}, batch, jax.random.key(0)),
      TASK.measured(model, {"params": params}, batch),
      TASK.measured(model, {"params": params}, batch | {"targets": right}),
    )

  logits, loss, measured, of_right = run(params)
  total = plain = count = correct = 0
  for b, x in enumerate((A, B, C)):
    for k in np.flatnonzero(x["weights"]):
      z = np.asarray(logits, np.float64)[b, x["places"][k]]
      costs = np.log(np.exp(z).sum()) - z
      own = costs[x["targets"][k]]
      plain += own
      total += (1 - smoothing) * own + smoothing * (costs.sum() - own) / V
      count += 1
      correct += int(np.argmax(z) == x["targets"][k])
  np.testing.assert_allclose(loss, (total, count), rtol=1e-5)
  assert {name: float(value) for name, value in measured.items()} == pytest.approx(
    {"loss": plain, "weight": count, "correct": correct}, rel=1e-5
  )
  assert of_right["correct"] == count > 4


@pytest.mark.parametrize("vocab_size, expected", [(50_265, 10.8251), (64_000, 11.0666)])
def test_a_uniform_answer_costs_the_logarithm_of_the_vocabulary(vocab_size, expected):
  config = config_of(model={"width": 8, "ffn_width": 8})
  model = TASK.build_model(config, {"vocab_size": vocab_size})
  shapes = jax.eval_shape(model.init, jax.random.key(0), *TASK.dummy_inputs(config))["params"]
  params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
  totals = compiled(lambda params: TASK.measured(model, {"params": params}, stacked(A)))(params)
  found = TASK.metrics({k: float(v) for k, v in totals.items()}, None, whole=True)
  assert found["loss_nats_per_token"] == pytest.approx(expected, abs=1e-4)
  assert found["pseudo_perplexity"] == pytest.approx(vocab_size, rel=1e-4)


def test_metrics_are_means_over_the_chosen_tokens():
  found = TASK.metrics({"loss": 6.0, "weight": 4.0, "correct": 3.0}, None, whole=False)
  expected = {"loss_nats_per_token": 1.5, "masked_accuracy": 0.75}
  assert found == pytest.approx(expected | {"pseudo_perplexity": math.exp(1.5)})
  # Past a float64 there is no number to write down.
  found = TASK.metrics({"loss": 4000.0, "weight": 4.0, "correct": 0.0}, None, whole=True)
  assert found == {"loss_nats_per_token": 1000.0, "masked_accuracy": 0.0}


# ---------------------------------------------------------------------------------------------
# What a place sees
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("random", (0.0, 1.0))
def test_a_hidden_token_is_not_seen(built, nats, random):
  """No gradient reaches its embedding, wherever it is not read; all that is read has one."""
  _, params = built
  tokens = [5, 6, 7, 8, 9, 10, 11, 12]
  x = row(tokens, mask=drawing(random=random), seed=3)
  (_, _), gradient = nats(params, stacked(x, BLANK, BLANK))
  moved = np.abs(gradient["encoder"]["token_embedding"]["embedding"]).max(axis=1)
  read = set(x["inputs"][x["segment_ids"] > 0])
  hidden = {int(t) for t in x["targets"][x["weights"] > 0]} - {1}
  assert hidden - read and (V in read) == (random == 0)
  assert all(moved[token] == 0 for token in hidden - read)
  assert all(moved[token] > 1e-4 for token in read)


def test_another_answer_changes_no_prediction(built):
  """Texts that differ in their hidden tokens alone are read alike."""
  model, params = built
  x = row([5, 6, 7, 8, 9, 10, 11, 12], seed=3)
  other = [5, 6, 7, 8, 9, 10, 11, 12]
  for place in x["places"][x["weights"] > 0]:
    if place:
      other[place - 1] = 20
  y = row(other, seed=3)
  for name in ("inputs", "places", "weights"):
    np.testing.assert_array_equal(x[name], y[name])
  assert (x["targets"] != y["targets"]).any()


def test_documents_of_a_window_do_not_see_each_other(built, nats):
  """What the first one's hidden tokens cost does not depend on the second."""
  _, params = built
  mask = drawing(rate=0.6)
  one = row([9, 4, 7], [11, 12, 13, 14], seed=1, mask=mask)
  two = one | {"inputs": np.where(one["segment_ids"] == 2, 18, one["inputs"])}
  (_, costs), _ = nats(params, stacked(one, two, one))
  first = one["segment_ids"][one["places"]] == 1
  chosen = one["weights"] > 0
  np.testing.assert_array_equal(costs[0][first & chosen], costs[1][first & chosen])
  assert (np.abs(costs[0] - costs[1])[~first & chosen] > 1e-4).all()
  assert (first & chosen).any() and (~first & chosen).any()


def test_padding_is_not_seen_and_gets_no_gradient(built, nats):
  """Whatever stands there: ids that nothing else has, and places that no target is at."""
  _, params = built
  padded = A | {"inputs": np.where(A["segment_ids"] > 0, A["inputs"], 21)}
  filled = A | {"targets": np.where(A["weights"] > 0, A["targets"], 22)}
  (plain, _), plain_gradient = nats(params, stacked(A, BLANK, BLANK))
  for changed in (padded, filled):
    (loss, _), gradient = nats(params, stacked(changed, BLANK, BLANK))
    assert loss == plain
    assert not gradient["encoder"]["token_embedding"]["embedding"][21:23].any()
    jax.tree.map(np.testing.assert_array_equal, gradient, plain_gradient)


def test_a_batchs_other_rows_change_no_result(built, nats):
  """Of a row alone, and in other places among others: 1e-5."""
  _, params = built
  costs = [nats(params, stacked(*rows))[0][1] for rows in ((A, BLANK, BLANK), (B, C, A), (C, A, B))]
  chosen = A["weights"] > 0
  found = [np.asarray(c)[i][chosen] for c, i in zip(costs, (0, 2, 1), strict=True)]
  for other in found[1:]:
    np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-5)


def test_the_likelihood_of_one_hidden_token_at_a_time(built):
  """By a call for each token, from the logits of all places."""
  model, params = built
  tokens = np.array([1, 5, 6, 7, 5])
  apply = compiled(model.apply)
  total = 0.0
  for t in range(1, 5):
    logits = apply({"params": params}, np.where(np.arange(5) == t, V, tokens)[None])
    z = np.asarray(logits, np.float64)[0, t]
    total += z[tokens[t]] - np.log(np.exp(z).sum())
  found = masked_lm.pseudo_log_likelihood(model, {"params": params}, tokens)
  assert found == pytest.approx(total, rel=1e-5)


# ---------------------------------------------------------------------------------------------
# A text
# ---------------------------------------------------------------------------------------------


def text_config(directory, **fields):
  (directory / "a.txt").write_text("to be or not to be, that is the question.\n" * 60)
  (directory / "b.txt").write_text("see the trees, she said; we need the bees." * 3)
  files = {f"{s}_files": f"{directory}/{n}.txt" for s, n in (("train", "a"), ("validation", "b"))}
  data = {"name": "text_files", "tokenizer": "byte", "mask_rate": 0.15} | files
  return config_of(data=data, **fields)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  directory = tmp_path_factory.mktemp("text")
  config = text_config(directory, batch_size=3)
  return config, TASK.load_data(config, directory / "run")


def test_planned_facts_and_batches_are_those_of_the_data(loaded):
  """One id more than the tokenizer's; of a batch, the names, shapes and types."""
  config, data = loaded
  facts, planned = TASK.facts(data), TASK.planned_facts(config)
  assert facts.keys() == planned.keys()
  assert facts["vocab_size"] == planned["vocab_size"] == 261
  assert 0 < planned["token_correlation"] < facts["token_correlation"] < 1
  # The mask alone is 0.12 of what is read.
  assert planned["token_correlation"] == pytest.approx(0.12**2 + 0.88**2 / 260, rel=0.01)
  samples = data.augment(data.train[0], np.random.default_rng(0)), data.validation[0]
  for sample in samples:
    assert TASK.batch_spec(config) == {
      name: jax.ShapeDtypeStruct((3, *values.shape), values.dtype)
      for name, values in sample.items()
    }


def test_the_configs_shares_reach_the_masks(tmp_path):
  data = {"mask_rate": 0.4, "mask_keep": 0.2, "mask_random": 0.3, "tokenizer": "byte"}
  config = config_of(data=data)
  found = TASK.load_data(config, tmp_path).augment
  assert found == masking.Masking(0.4, 0.2, 0.3, 260)


def test_baselines_are_of_the_same_hidden_tokens(loaded):
  """By a loop over them."""
  _, data = loaded
  train = list(data.train.tokens)
  commonest = max(range(260), key=train.count)
  costs, hits = [], []
  for sample in data.validation:
    for target, weight in zip(sample["targets"], sample["weights"], strict=True):
      if weight:
        costs.append(-math.log((1 + train.count(target)) / (260 + len(train))))
        hits.append(int(target) == commonest)
  assert TASK.baselines(data) == {
    "masked_accuracy": {"commonest_token": pytest.approx(np.mean(hits))},
    "loss_nats_per_token": {"unigram": pytest.approx(np.mean(costs))},
  }


def test_baselines_of_a_long_text_are_left_out(loaded, monkeypatch):
  monkeypatch.setattr(masked_lm, "_BASELINE_TOKENS", 10)
  assert TASK.baselines(loaded[1]) == {}


def test_the_sample_shows_what_is_read_answered_and_true(loaded):
  """Of a model that always answers e."""
  config, data = loaded
  config = config_of(sample_tokens=9)
  model = TASK.build_model(config, TASK.facts(data))
  params = reference.random_params(model, *TASK.dummy_inputs(config))
  params["head_bias"] = 1e3 * (np.arange(261) == data.tokenizer.encode("e")[0])
  shown = TASK.sample(config, model, {"params": params}, data, jax.random.key(0))
  window = data.validation[len(data.validation) // 2]
  truth = window["inputs"].copy()
  chosen = window["weights"] > 0
  truth[window["places"][chosen]] = window["targets"][chosen]
  read, answered = ["".join(part.split(":\n")[1:]) for part in shown.split("\n\n")]
  expected = ""
  for place, token in enumerate(truth[:9]):
    word = data.words([token])
    both = "e" if word == "e" else f"e|{word}"
    expected += f"[{both}]" if place in window["places"][chosen] else word
  assert answered == expected and "[e" in expected
  assert read == data.words(window["inputs"][:9])
  config = config_of(sample_tokens=0)
  assert TASK.sample(config, model, {"params": params}, data, jax.random.key(0)) is None


@pytest.mark.ci
def test_a_run_that_is_resumed_ends_as_one_that_was_not(tmp_path, monkeypatch):
  """Over the end of an epoch, to the bit; and what a run leaves can be read."""
  monkeypatch.chdir(tmp_path)
  fields = {"batch_size": 64, "eval_every": 2, "checkpoint_every": 2, "log_every": 1}
  fields |= {"model": SMALL | {"dropout": 0.1}}
  fields |= {"optimizer": {"learning_rate": 1e-2, "schedule": "constant"}}
  config = lambda steps: text_config(tmp_path, steps=steps, **fields)
  whole = training.train(config(8), "whole")
  training.train(config(4), "parts")
  parts = training.train(config(8), "parts")
  assert parts["resumed_at_step"] == 4
  losses = [
    {row["step"]: row["train/loss"] for row in reporting.read_metrics(name) if "train/loss" in row}
    for name in map(pathlib.Path, ("whole", "parts"))
  ]
  assert losses[0] == losses[1] and losses[0].keys() == set(range(1, 9))
  assert {k: v for k, v in parts.items() if k.startswith("validation")} == {
    k: v for k, v in whole.items() if k.startswith("validation")
  }
  model, variables = runs.load(tmp_path / "whole")
  assert model.encoder.vocab_size == 261
  assert masked_lm.pseudo_log_likelihood(model, variables, [1, 70, 71]) < 0
  names = {"loss_nats_per_token", "masked_accuracy", "pseudo_perplexity"}
  assert {f"validation_{name}" for name in names} <= whole.keys()
  assert whole["validation_masked_accuracy"] > 0
  assert set(whole["baselines"]) == {"masked_accuracy", "loss_nats_per_token"}


# ---------------------------------------------------------------------------------------------
# What cannot be
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "model, message",
  [
    ({"window": 3}, "model.window=3 is of earlier tokens"),
    ({"activation": "swiglu"}, "the dense head has no gate"),
  ],
)
def test_what_a_model_cannot_have_is_refused(model, message):
  config = config_of(model=model)
  with pytest.raises((ConfigError, ValueError), match=message) as error:
    built = TASK.build_model(config, {"vocab_size": V + 1})
    jax.eval_shape(built.init, jax.random.key(0), *TASK.dummy_inputs(config))
  assert "\n" not in str(error.value)
