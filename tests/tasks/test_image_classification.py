"""Classification of images as a task: what is scored, on what, and what a run does with it."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax import diagnostics, evaluation, training
from magneto_jax.config import ConfigError, from_config_dict
from magneto_jax.tasks import TASKS, common, image_classification
from tests.models.common import compiled

TASK = TASKS["image_classification"]
FACTS = {"classes": 4, "token_correlation": 0.5}
SMALL = {"layers": 1, "width": 8, "ffn_width": 16, "heads": 2, "image_size": 28, "patch_size": 7}


def config_of(*, model=None, **fields):
  data = {"name": "embedded/mnist5k"} | fields.pop("data", {})
  model = SMALL | (model or {})
  return from_config_dict({"task": "image_classification", "data": data, "model": model, **fields})


# ---------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------


def data_of(classes, *, train=(), validation=(), name="a"):
  """Labels alone, and of which data set the validation images are."""
  part = lambda labels: types.SimpleNamespace(labels=np.array(labels, np.int32))
  return types.SimpleNamespace(
    classes=tuple(map(str, range(classes))),
    train=part(train),
    validation=types.SimpleNamespace(images=part(validation)),
    identity={
      "train": {"source": "tfds", "name": "a"},
      "validation": {"source": "tfds", "name": name},
    },
  )


def measured(scores, labels):
  """What an evaluation keeps of these scores."""
  model = types.SimpleNamespace(
    classes=scores.shape[1], apply=lambda variables, images: jnp.asarray(scores)
  )
  labels = jnp.asarray(labels)
  ones = jnp.ones(len(labels))
  batch = {"image": None, "label": labels, "other_label": labels, "share": ones, "weights": ones}
  return jax.tree.map(np.asarray, TASK.measure(model, {}, batch))


def ranks(scores, labels, among=None):
  """How many classes come before the right one, equal ones in their order."""
  among = np.arange(scores.shape[1]) if among is None else among
  order = among[np.argsort(-scores[:, among], axis=1, kind="stable")]
  return np.array([list(row).index(label) for row, label in zip(order, labels, strict=True)])


def test_the_metrics_are_of_the_classes_order():
  """Top-1, top-5 and nats by hand; equal scores rank as argmax has them."""
  rng = np.random.default_rng(0)
  scores = rng.integers(0, 6, (200, 11)).astype(np.float32)
  labels = rng.integers(0, 11, 200)
  found = TASK.metrics(measured(scores, labels), data_of(11), whole=True)
  expected = ranks(scores, labels)
  assert found["accuracy"] == np.mean(expected == 0) == np.mean(scores.argmax(1) == labels)
  assert found["top5_accuracy"] == np.mean(expected < 5)
  wide = scores.astype(np.float64)
  nats = np.log(np.exp(wide).sum(1)) - wide[np.arange(200), labels]
  assert found["loss_nats_per_sample"] == pytest.approx(nats.mean(), rel=1e-5)  # float32
  assert TASK.best == ("accuracy", True)


def test_another_set_is_scored_among_the_classes_that_occur_in_it():
  """As ImageNet-A and -R are; the loss is of all. The run's own data always have all classes."""
  rng = np.random.default_rng(1)
  scores = rng.normal(size=(100, 20)).astype(np.float32)
  present = np.array([1, 4, 5, 9, 12, 13, 17])
  labels = rng.choice(present, 100)
  kept = measured(scores, labels)
  own = TASK.metrics(kept, data_of(20), whole=True)
  other = TASK.metrics(kept, data_of(20, name="b"), whole=True)
  assert own["accuracy"] == np.mean(ranks(scores, labels) == 0)
  among = ranks(scores, labels, present)
  assert other["accuracy"] == np.mean(among == 0) > own["accuracy"]
  assert other["top5_accuracy"] == np.mean(among < 5)
  assert own["loss_nats_per_sample"] == other["loss_nats_per_sample"]
  # Of a part of it, in which by chance fewer classes may occur, among all.
  assert TASK.metrics(kept, data_of(20, name="b"), whole=False)["accuracy"] == own["accuracy"]
  of_another = TASK.baselines(data_of(20, train=[1], validation=[1], name="b"))
  assert of_another == {"accuracy": {"majority_class": 1.0}}


def test_labels_are_asked_for(tmp_path):
  with pytest.raises(ConfigError, match="config.data.label_key is empty, and .*: set it to the"):
    TASK.load_data(config_of(data={"label_key": ""}), tmp_path)


def test_scores_that_are_not_numbers_are_not_right():
  scores = np.array([[np.nan] * 3, [0, np.nan, 0], [1, 0, 0]], np.float32)
  found = TASK.metrics(measured(scores, [0, 1, 0]), data_of(3), whole=True)
  assert found["accuracy"] == pytest.approx(1 / 3)
  assert "top5_accuracy" not in found  # Of three classes all are among the best five.


def test_baselines_are_counted():
  data = data_of(4, train=[2, 2, 1], validation=[2, 1, 0, 2])
  assert TASK.baselines(data) == {"accuracy": {"majority_class": 0.5, "chance": 0.25}}
  data.train.labels = None  # As of images that would have to be read.
  assert TASK.baselines(data) == {"accuracy": {"chance": 0.25}}


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


def test_planned_facts_and_batches_are_those_of_the_data(tmp_path):
  config = config_of(batch_size=3, data={"augment": {"crop_scale": 0.5, "mixup": 0.8}})
  data = TASK.load_data(config, tmp_path)
  facts, planned = TASK.facts(data), TASK.planned_facts(config)
  assert planned.keys() == facts.keys() == {"classes", "token_correlation"}
  assert planned["classes"] == facts["classes"] == 10
  assert 0 < planned["token_correlation"] < facts["token_correlation"] < 1
  a, b = (data.augment(data.train[i], np.random.default_rng(i)) for i in (0, 1))
  mixed = data.mix(a, b, np.random.default_rng(2))
  for sample in (a, mixed, data.validation[0]):
    assert TASK.batch_spec(config) == {
      name: jax.ShapeDtypeStruct((3, *array.shape), array.dtype) for name, array in sample.items()
    }
  with pytest.raises(ConfigError, match="classes of data.name='flowers' are not known without"):
    TASK.planned_facts(config_of(data={"name": "flowers"}))


@pytest.mark.parametrize(("name", "size"), [("embedded/mnist5k", 28), ("embedded/emoji", 32)])
def test_the_correlation_of_patches_is_that_of_their_embeddings(name, size, tmp_path):
  """Of patches of two sizes, beside the products of all pairs of an image: to a twentieth."""
  config = config_of(data={"name": name}, model={"image_size": size, "patch_size": 4})
  data = TASK.load_data(config, tmp_path)
  pixels = np.stack([data.validation[i]["image"] for i in range(100)])
  found = image_classification.patch_correlation(pixels)
  for side in (size // 4, 4):
    p = size // side
    x = pixels.reshape(100, side, p, side, p, 3).swapaxes(2, 3).reshape(100, side * side, -1)
    energy = np.sum(x**2, axis=(1, 2))
    pairs = (np.sum(x.sum(1) ** 2, axis=-1) - energy) / (side**2 - 1)
    assert found == pytest.approx(pairs.mean() / energy.mean(), rel=0.05)
  assert image_classification.patch_correlation(np.zeros((2, 4, 4, 3))) == 1


def test_the_recipe_that_asks_is_given_the_patches_correlation():
  """Halved by learned positions; no other recipe reads it."""
  of = lambda **fields: TASK.architecture(config_of(**fields), FACTS).token_correlation
  learned = {"positions": "learned"}
  assert of(recipe="deepscalelm", model={"positions": "none"}) == 0.5
  assert of(recipe="deepscalelm", model=learned) == 0.25
  assert of(recipe="magneto", model=learned) == of(recipe="pre_ln", model={})


# ---------------------------------------------------------------------------------------------
# Models and runs
# ---------------------------------------------------------------------------------------------


def test_fields_reach_the_model_or_are_refused():
  fields = {"pooling": "mean", "relative_patches": True, "dropout": 0.2, "positions": "learned"}
  built = TASK.build_model(config_of(model=fields, label_smoothing=0.1), FACTS)
  assert (built.pooling, built.dropout_rate, built.label_smoothing) == ("mean", 0.2, 0.1)
  assert (built.classes, built.encoder.patch_size, built.encoder.relative_grid) == (4, 7, (4, 4))
  assert (built.encoder.class_token, built.encoder.encoder.max_length) == (False, 16)
  first = TASK.build_model(config_of(model={"positions": "learned"}), FACTS).encoder
  assert (first.class_token, first.relative_grid, first.encoder.max_length) == (True, None, 17)
  assert TASK.length(config_of()) == 17
  for fields, message in (
    ({"vocab_chunk": 3}, "config.vocab_chunk is not read"),
    ({"model": {"window": 3}}, "model.window=3 is of earlier tokens"),
  ):
    with pytest.raises(ConfigError, match=message):
      TASK.build_model(config_of(**fields), FACTS)


def test_the_loss_is_of_mixed_targets_and_smooth_in_training_alone():
  config = config_of(label_smoothing=0.3, batch_size=2, model={"pooling": "mean"})
  model = TASK.build_model(config, FACTS)
  pixels = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)
  batch = {
    "image": pixels,
    "label": np.array([0, 3]),
    "other_label": np.array([1, 3]),
    "share": np.array([0.25, 1], np.float32),
    "weights": np.array([1, 0.5], np.float32),
  }

  @compiled
  def run(params):
    losses = [TASK.loss(model, params, batch, key)[0] for key in (None, jax.random.key(0))]
    return TASK.measure(model, params, batch)["loss"], losses, model.apply(params, pixels)

  params = compiled(model.init)(jax.random.key(0), pixels)
  kernel = params["params"]["head_out"]["kernel"]
  params["params"]["head_out"]["kernel"] = 1e5 * kernel
  measured, losses, scores = run(params)
  log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
  q = np.array([[0.25, 0.75, 0, 0], [0, 0, 0, 1]])
  for loss, e in zip([measured, *losses], [0, 0, 0.3], strict=True):
    expected = np.sum(-((1 - e) * q + e / 4) * np.asarray(log_p), axis=-1) @ batch["weights"]
    assert float(loss) == pytest.approx(expected, rel=1e-5)  # float32


def test_the_stack_of_a_classifier_is_found_and_its_targets_left_out():
  """What diagnoses go by."""
  model = TASK.build_model(config_of(), FACTS)
  parts = diagnostics.parts_of(model)
  assert tuple(parts) == ("encoder",) and parts["encoder"].path == ("encoder", "encoder")
  spec = TASK.batch_spec(config_of(batch_size=2))
  call = diagnostics.calls_of(TASK, model)(spec, jax.random.key(0)).without_targets()
  assert not call.kwargs


def test_a_person_sees_what_the_model_is_given_and_what_it_answers(tmp_path):
  """Mixed images with what they are mixed of, and validation images with the wrong answers."""
  config = config_of(data={"augment": {"mixup": 1.0, "mix_rate": 1.0}})
  data = TASK.load_data(config, tmp_path, None)
  is_even = lambda images: images[:, 14, 14, 0] > 0
  scores = lambda variables, images: jnp.stack([is_even(images), ~is_even(images)], axis=-1)
  train, validation = TASK.picture(config, types.SimpleNamespace(apply=scores), {}, data)
  assert all("%" in caption for caption in train.captions)
  for row in (train, validation):
    assert len(row.images) == len(row.captions) == 8
    assert all(image.shape == (28, 28, 3) and image.dtype == np.uint8 for image in row.images)
  indices, batch = common.shown(data.validation)
  assert list(indices) == sorted(set(indices)) and indices[0] == 0 and indices[-1] == 499
  answers = np.where(np.asarray(validation.images)[:, 14, 14, 0] > 127, 0, 1)
  both = zip(batch["label"], answers, strict=True)
  told = [f"{x}" if x == y else f"{x}, answered {y}" for x, y in both]
  assert list(validation.captions) == told


@pytest.mark.ci
def test_a_run_learns_and_is_evaluated_on_a_split_that_it_never_saw(tmp_path):
  """Digits by a small model in some seconds: far above chance, on the test part too."""
  config = config_of(
    model={"layers": 1, "width": 32, "ffn_width": 64, "positions": "learned", "pooling": "mean"},
    data={"augment": {"crop_scale": 0.8}},
    **{"steps": 60, "batch_size": 64, "eval_every": 60, "checkpoint_every": 60},
    label_smoothing=0.1,
    optimizer={"learning_rate": 1e-2, "warmup_steps": 10, "layer_decay": 0.9},
  )
  summary = training.train(config, tmp_path)
  assert summary["validation_accuracy"] > 0.3
  assert summary["baselines"]["accuracy"]["chance"] == pytest.approx(0.1)
  opened = evaluation.open_run(tmp_path)
  found = evaluation.evaluate(opened, "test")
  json.dumps(found)
  assert found["counts"] == {"samples": 500}
  assert found["metrics"]["accuracy"] > 0.3 and found["metrics"]["top5_accuracy"] > 0.7
  with pytest.raises(ConfigError, match="emoji does not name the classes of embedded/mnist5k"):
    evaluation.evaluate(opened, "embedded/emoji/test")
  own = evaluation.evaluate(opened, "embedded/mnist5k/test")
  assert own["metrics"] == found["metrics"]
  assert dataclasses.asdict(opened.record.config) == dataclasses.asdict(config)
