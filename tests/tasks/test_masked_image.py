"""Masked image modelling: its batches, its metrics, the tokenizer that it holds, and the chain."""

import dataclasses
import json
import math
import types

import jax
import numpy as np
import pytest

import magneto_jax
from magneto_jax import pretrained, runs, sharding, training
from magneto_jax.checkpoints import Checkpointer
from magneto_jax.config import ConfigError, from_config_dict
from magneto_jax.tasks import TASKS, common, masked_image
from tests.models.common import compiled

TASK = TASKS["masked_image"]
V, SIDE = 12, 28
IMAGES = {"image_size": SIDE, "patch_size": 7, "image_vocab_size": V}
SMALL = {"layers": 1, "width": 16, "ffn_width": 16, "heads": 2, **IMAGES}
DATA = {"name": "embedded/mnist5k", "mask_rate": 0.4, "mask_block": 2}
HIDDEN = 6  # Of 4 x 4 patches.


def config_of(*, model=None, data=None, **fields):
  given = {"task": "masked_image", "batch_size": 3, "data": DATA | (data or {})}
  return from_config_dict({**given, "model": SMALL | (model or {}), **fields})


def tokenizer_config(*, model=None, data=None, **fields):
  given = {"task": "image_tokenizer", "data": {"name": "embedded/mnist5k"} | (data or {})}
  return from_config_dict({**given, "model": SMALL | {"width": 8} | (model or {}), **fields})


def tokenizer_record(**fields):
  config = tokenizer_config(**fields)
  return runs.Record(config, {}, TASKS["image_tokenizer"].planned_facts(config))


def facts_of(config, record):
  return {**TASK.planned_facts(config), **pretrained.ImageTokenizer("runs/tokens", record).facts()}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  config = config_of()
  return config, TASK.load_data(config, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def built():
  """A model that holds a tokenizer of another width, and its variables."""
  config = config_of(model={"relative_patches": True, "pooling": "mean"})
  model = TASK.build_model(config, facts_of(config, tokenizer_record()))
  return config, model, drawn(TASK, config, model)


def drawn(task, config, model):
  """Variables of random numbers, flags and counters 0."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *task.dummy_inputs(config))

  def draw(leaf):
    is_float = np.issubdtype(leaf.dtype, np.floating)
    noise = rng.normal(size=leaf.shape, scale=0.3) if is_float else np.zeros(leaf.shape)
    return jax.numpy.asarray(noise.astype(leaf.dtype))

  return jax.tree.map(draw, shapes)


def batch_of(data, indices):
  samples = [data.validation[i] for i in indices]
  return {name: np.stack([x[name] for x in samples]) for name in samples[0]}


# ---------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_spec(loaded):
  """In training and in validation; no label is among them."""
  config, data = loaded
  assert TASK.batch_spec(config).keys() == {"image", "masked", "places", "weights"}
  for sample in (data.augment(data.train[0], np.random.default_rng(0)), data.validation[0]):
    assert TASK.batch_spec(config) == {
      name: jax.ShapeDtypeStruct((3, *np.shape(x)), np.asarray(x).dtype)
      for name, x in sample.items()
    }
    assert sample["masked"].sum() == HIDDEN and -1 <= sample["image"].min() < 0


def test_masks_are_anew_in_training_and_fixed_in_validation(loaded):
  _, data = loaded
  draw = lambda seed: data.augment(data.train[0], np.random.default_rng(seed))["masked"]
  np.testing.assert_array_equal(draw(0), draw(0))
  assert (draw(0) != draw(1)).any()
  np.testing.assert_array_equal(data.validation[3]["masked"], data.validation[3]["masked"])
  assert (data.validation[3]["masked"] != data.validation[4]["masked"]).any()
  assert data.identity["masks"] == {"grid": (4, 4), "count": HIDDEN, "smallest": 2}
  assert json.dumps(data.identity) and len(data.validation) == 500


def test_a_share_that_hides_no_patch_is_refused(tmp_path):
  config = config_of(data={"mask_rate": 0.01})
  with pytest.raises(ValueError, match=r"data\.mask_rate=0\.01 hides 0 of an image's 16 patches"):
    TASK.load_data(config, tmp_path)


# ---------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------


def test_what_is_measured_is_of_the_hidden_patches(loaded, built):
  """From the logits and tokens of all patches, by hand."""
  _, model, variables = built
  batch = batch_of(loaded[1], range(3))

  @compiled
  def run(variables):
    return (
      model.apply(variables, batch["image"], masked_BP=batch["masked"]),
      model.apply(variables, batch["image"], method="tokens"),
      TASK.measured(model, variables, batch),
      TASK.loss(model, variables, batch),
    )

  logits, tokens, measured, loss = jax.tree.map(np.asarray, run(variables))
  nats = 0.0
  for b in range(3):
    for k, place in enumerate(np.flatnonzero(batch["masked"][b])):
      z = logits[b, place].astype(np.float64)
      nats += np.log(np.exp(z).sum()) - z[tokens[b, place]]
      assert measured["targets"][b, k] == tokens[b, place]
      assert measured["answers"][b, k] == z.argmax()
  np.testing.assert_allclose(loss, (nats, 3 * HIDDEN), rtol=1e-5)
  np.testing.assert_allclose((measured["loss"], measured["weight"]), loss, rtol=1e-5)
  assert len(np.unique(tokens)) > 1


def test_metrics_are_what_their_names_say():
  """Eight hidden patches of four images: token 5 four times, 2 twice, 0 and 7 once."""
  targets = np.array([[5, 2], [5, 5], [5, 0], [2, 7]])
  places = np.array([[0, 1], [0, 3], [1, 3], [0, 1]])
  answers = np.array([[5, 5], [5, 2], [5, 0], [5, 1]])
  totals = {"loss": 12.0, "weight": 8.0, "targets": targets, "answers": answers, "places": places}
  found = TASK.metrics(totals, None, whole=True)
  entropy = math.log(2) / 2 + math.log(4) / 4 + 2 * math.log(8) / 8
  assert found == pytest.approx(
    {
      "loss_nats_per_patch": 1.5,
      "masked_accuracy": 0.5,
      "codebook_perplexity": math.exp(entropy),
      "commonest_token": 0.5,
      # Of place 0: 5 twice of three; of 1: once of three; of 3: once of two.
      "commonest_token_of_the_place": 0.5,
    }
  )


def test_all_tokens_alike_have_a_perplexity_of_one():
  same = np.full((3, 2), 4)
  totals = {"loss": 0.0, "weight": 6.0, "targets": same, "answers": same, "places": same}
  found = TASK.metrics(totals, None, whole=True)
  assert found["codebook_perplexity"] == found["commonest_token"] == 1


def test_the_sample_marks_every_patch(loaded, built):
  """With a head whose bias answers one token whatever is seen."""
  config, model, variables = built
  data, index = loaded[1], 285  # The fifth of eight.
  batch = batch_of(data, [index])
  indices, both = common.shown(data.validation)
  assert indices.tolist() == [0, 71, 142, 213, 285, 356, 427, 499]
  tokens = np.asarray(masked_image.answered(model, variables, both)["tokens"])[4]
  answer = tokens[batch["masked"][0]][0]
  params = variables["params"] | {"head_bias": 1e4 * (np.arange(V) == answer)}
  shown = TASK.sample(config, model, variables | {"params": params}, data, None)
  rows = [line.split() for line in shown.splitlines()[1:]]
  assert f"validation image {index}" in shown and [len(row) for row in rows] == [4] * 4
  for p, mark in enumerate(np.array(rows).reshape(-1)):
    right = "o" if tokens[p] == answer else "x"
    assert mark == (right if batch["masked"][0, p] else "·")


def test_only_hidden_patches_are_answered_and_only_they_are_drawn_anew(loaded, built):
  config, model, variables = built
  _, batch = common.shown(loaded[1].validation)
  found = jax.tree.map(np.asarray, masked_image.answered(model, variables, batch))
  seen = ~batch["masked"]
  np.testing.assert_array_equal(found["filled"][seen], found["tokens"][seen])
  assert (found["filled"] != found["tokens"]).any()
  rows = [row.images for row in TASK.picture(config, model, variables, loaded[1])]
  assert {(x.dtype.name, x.shape) for x in rows} == {("uint8", (8, SIDE, SIDE, 3))}
  whole, visible, answered, pictures, restored = rows
  hidden = batch["masked"].reshape(8, 4, 4).repeat(7, 1).repeat(7, 2)
  assert (visible[hidden] == 96).all() and (answered[hidden] == pictures[hidden]).all()
  for row in (visible, answered):
    np.testing.assert_array_equal(row[~hidden], whole[~hidden])
  assert (pictures != restored).any()


# ---------------------------------------------------------------------------------------------
# The tokenizer that it holds
# ---------------------------------------------------------------------------------------------


def test_the_tokenizer_is_built_from_its_own_runs_config(built):
  """Of the run's width; without a run, to plan, of the model's."""
  config, model, variables = built
  held = lambda variables: variables["state"]["image_tokenizer"]["params"]
  width = lambda tree: tree["encoder"]["patch_embedding"]["projection"]["bias"].shape
  assert width(held(variables)) == (8,)
  planned = TASK.build_model(config, TASK.planned_facts(config))
  shapes = jax.eval_shape(planned.init, jax.random.key(0), *TASK.dummy_inputs(config))
  assert width(held(shapes)) == (16,)
  assert model.tokenizer.module.codes == planned.tokenizer.module.codes == V


def test_the_images_tokens_are_the_tokenizers_and_no_step_changes_them(loaded, built):
  config, model, variables = built
  batch = batch_of(loaded[1], range(3))
  held = variables["state"]["image_tokenizer"]

  @compiled
  def run(variables):
    return (
      model.apply(variables, batch["image"], method="tokens"),
      model.tokenizer.module.apply(held, batch["image"], method="encode"),
      TASK.loss_and_state(model, variables, batch, jax.random.key(0))[1],
    )

  tokens, own, changed = run(variables)
  np.testing.assert_array_equal(tokens, own)
  jax.tree.map(np.testing.assert_array_equal, changed, variables["state"])


def tokenizer_run(folder, **fields):
  """A run of a tokenizer with random weights at its step 7; returns its variables."""
  record = tokenizer_record(**fields)
  task = TASKS["image_tokenizer"]
  model = task.build_model(record.config, record.facts)
  variables = drawn(task, record.config, model)
  runs.write_record(folder, record)
  trees = {"params": variables["params"], "variables": variables["state"]}
  with Checkpointer(runs.checkpoints_in(folder)) as checkpointer:
    nowhere = types.SimpleNamespace(get_state=lambda: {})
    checkpointer.save(7, trees, nowhere, runs.as_json(record))
  return variables


@pytest.mark.ci
def test_a_run_starts_with_the_tokenizer_and_draws_the_rest(tmp_path):
  """Its variables, all of them, where the drawn ones were; and its config, in the run's facts."""
  expected = tokenizer_run(tmp_path / "tokens")
  config = config_of(image_tokenizer=str(tmp_path / "tokens"))
  source = pretrained.find(config)
  assert source.tokenizer_file == ""
  model = TASK.build_model(config, {**TASK.planned_facts(config), **source.facts()})
  state = jax.eval_shape(model.init, jax.random.key(0), *TASK.dummy_inputs(config))["state"]
  where = sharding.replicated(sharding.make_mesh({}, jax.devices()[:1]))
  held = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state)
  run = types.SimpleNamespace(
    config=config, model=model, task=TASK, state=types.SimpleNamespace(variables=held)
  )
  source.refuse_others(run, {})
  before = dataclasses.make_dataclass("State", ["params", "variables"])("drawn", state)
  after = source.into(before, run)
  assert after.params == "drawn" and after.variables.keys() == {"image_tokenizer"}
  found = after.variables["image_tokenizer"]
  jax.tree.map(np.testing.assert_array_equal, found, dict(expected))
  assert source.in_words(run) == f"its targets are the tokens of {tmp_path / 'tokens'}"


@pytest.mark.parametrize(
  "model, data, message",
  [
    ({"image_size": 14}, {}, r"config.model.image_size does not .*: it must be 28, not 14"),
    ({"patch_size": 14}, {}, r"config.model.patch_size does not .*: it must be 7, not 14"),
    ({"image_vocab_size": 9}, {}, r"config.model.image_vocab_size .*: it must be 12, not 9"),
    ({}, {"normalization": "imagenet"}, r"config.data.normalization .* 'half', not 'imagenet'"),
  ],
)
def test_other_images_than_the_tokenizers_are_refused(model, data, message, tmp_path, monkeypatch):
  runs.write_record(tmp_path, tokenizer_record())
  monkeypatch.setattr(runs, "last_step", lambda folder: 3)
  pretrained.find(config_of(image_tokenizer=str(tmp_path)))
  with pytest.raises(ConfigError, match=message) as error:
    pretrained.find(config_of(image_tokenizer=str(tmp_path), model=model, data=data))
  assert f"image_tokenizer={tmp_path}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("data", [{"mask_block": 7}, {"mask_block": 10, "mask_rate": 0.8}])
def test_blocks_that_cannot_be_hidden_are_refused(data, tmp_path):
  """More than the six hidden patches, or than 3 x 3, the largest block of a grid of 4 x 4."""
  with pytest.raises(ConfigError, match="mask_block=.* is more than the [69] patches that a block"):
    TASK.load_data(config_of(data=data), tmp_path)


def test_without_a_tokenizers_run_it_says_what_to_train_first(tmp_path):
  for folder in ("", str(tmp_path / "none")):
    with pytest.raises(ConfigError, match="as with --config=configs/image_tokenizer.py:"):
      pretrained.find(config_of(image_tokenizer=folder))


def test_a_run_of_another_task_is_no_tokenizer(tmp_path, monkeypatch):
  runs.write_record(
    tmp_path, runs.Record(config_of(), {}, facts_of(config_of(), tokenizer_record()))
  )
  monkeypatch.setattr(runs, "last_step", lambda folder: 3)
  with pytest.raises(ConfigError, match="holds a run of task 'masked_image': give the workdir of"):
    pretrained.find(config_of(image_tokenizer=str(tmp_path)))


@pytest.mark.parametrize(
  "fact",
  [None, 3, "x", [], {}, {"config": {}}, {"config": {"model": 3}, "facts": {}}, {"facts": {}}],
)
def test_a_strangers_tokenizer_is_checked_in_all_its_parts(fact, tmp_path):
  config = config_of()
  facts = TASK.planned_facts(config)
  given = facts if fact is None else {**facts, "image_tokenizer": fact}
  runs.write_record(tmp_path, runs.Record(config, {}, given))
  with pytest.raises(ConfigError, match="does not hold the config of a run") as error:
    runs.read_record(tmp_path)
  assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------
# The chain
# ---------------------------------------------------------------------------------------------


@pytest.mark.ci
def test_the_chain_from_tokens_to_classes(tmp_path, monkeypatch):
  """Tokenizer, masked images, fine-tuning; a run that is resumed ends as one that was not, also
  where the tokenizer's folder is gone."""
  monkeypatch.chdir(tmp_path)
  often = {"eval_every": 2, "checkpoint_every": 2, "log_every": 1, "eval_batches": 2}
  optimizer = {"optimizer": {"learning_rate": 1e-2, "schedule": "constant"}}
  training.train(tokenizer_config(steps=2, batch_size=8, **often), "tokens")
  config = lambda steps: config_of(
    steps=steps,
    image_tokenizer="tokens",
    batch_size=8,
    model={"dropout": 0.1, "relative_patches": True, "pooling": "mean"},
    **often,
    **optimizer,
  )
  whole = training.train(config(4), "whole")
  training.train(config(2), "parts")
  tokens = magneto_jax.load("tokens").variables
  (tmp_path / "tokens").rename("moved")
  parts = training.train(config(4), "parts")
  assert parts["resumed_at_step"] == 2
  assert {k: v for k, v in parts.items() if k.startswith("validation")} == {
    k: v for k, v in whole.items() if k.startswith("validation")
  }
  one, other = (magneto_jax.load(name).variables for name in ("whole", "parts"))
  jax.tree.map(np.testing.assert_array_equal, one, other)
  jax.tree.map(np.testing.assert_array_equal, one["state"]["image_tokenizer"], dict(tokens))
  with pytest.raises(ConfigError, match="image_tokenizer='tokens' holds no run with a checkpoint"):
    training.train(config(4), "late")
  fine = from_config_dict(
    {
      "task": "image_classification",
      "init_from": "whole",
      "steps": 1,
      "batch_size": 8,
      "data": {"name": "embedded/mnist5k"},
      "model": {name: value for name, value in SMALL.items() if name != "image_vocab_size"}
      | {"relative_patches": True, "pooling": "mean"},
      "optimizer": {"learning_rate": 1e-12},
      "eval_batches": 2,
    }
  )
  training.train(fine, "fine")
  tuned = dict(magneto_jax.load("fine").variables["params"]["encoder"])
  source = dict(one["params"]["encoder"])
  source["patch_embedding"] = {
    name: tree for name, tree in source["patch_embedding"].items() if name != "mask_token"
  }
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), tuned, source)
