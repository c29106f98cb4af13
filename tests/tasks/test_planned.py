"""What a plan needs of every task, and the models and the loss of pairs of texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.config import OF_SOME_TASKS, ConfigError, from_config_dict
from magneto_jax.tasks import TASKS
from tests import reference
from tests.models.common import compiled

SMALL = {"layers": 2, "width": 16, "ffn_width": 24, "heads": 2}
PLANNED = {
  "causal_lm": {},
  "masked_lm": {},
  "text_classification": {},
  "translation": {"encoder_layers": 3},
  "image_classification": {},
  "image_tokenizer": {"image_size": 8, "patch_size": 4, "image_vocab_size": 11},
  "masked_image": {"image_size": 8, "patch_size": 2, "image_vocab_size": 11},
  "masked_data": {
    "positions": "learned",
    "image_size": 8,
    "patch_size": 4,
    "image_vocab_size": 11,
  },
  **dict.fromkeys(
    (
      "image_text_retrieval",
      "image_captioning",
      "visual_question_answering",
      "visual_reasoning",
    ),
    {"positions": "learned", "image_size": 8, "patch_size": 4},
  ),
  "speech_recognition": {"mel_bins": 8},
  "speech_translation": {"mel_bins": 8},
}


def config_of(name, *, model=None, **fields):
  model = SMALL | PLANNED[name] | (model or {})
  data = {"seq_length": 6, "vocab_size": 40}
  return from_config_dict({"task": name, "batch_size": 4, "model": model, "data": data} | fields)


def batch_of(config, rng):
  """Random values of the batch's spec, no padding, half of the positions counting."""
  batch = {}
  for name, spec in TASKS[config.task].batch_spec(config).items():
    values = rng.integers(0, 8, spec.shape)
    if spec.dtype == jnp.float32:
      values = rng.normal(size=spec.shape) if name == "image" else values % 2
    batch[name] = np.ones(spec.shape, bool) if name.endswith("mask") else values.astype(spec.dtype)
    if name.endswith("segment_ids"):
      batch[name][:] = 1
    if name.endswith("places"):
      batch[name] %= 4  # The patches of the smallest grid.
    if name.endswith("positions"):
      batch[name][:] = range(spec.shape[1])
  return batch


def test_every_task_can_be_planned():
  assert TASKS.keys() == PLANNED.keys()
  assert {task for tasks in OF_SOME_TASKS.values() for task in tasks} <= TASKS.keys()


# ---------------------------------------------------------------------------------------------
# Facts and batches without data
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer, size", (("byte", 260), ("sentencepiece", 300)))
def test_planned_facts_and_batches_are_those_of_the_data(tokenizer, size, tmp_path):
  """Of the data that a run of the config loads: the same names, sizes and types."""
  (tmp_path / "a.txt").write_text("to be or not to be, that is the question. " * 40)
  files = {"name": "text_files", "train_files": f"{tmp_path}/a.txt", "validation_fraction": 0.3}
  files |= {"tokenizer": tokenizer, "vocab_size": 300, "seq_length": 16}
  config = from_config_dict({"batch_size": 3, "data": files})
  task = TASKS["causal_lm"]
  data = task.load_data(config, tmp_path / "run")
  facts, planned = task.facts(data), task.planned_facts(config)
  assert planned.keys() == facts.keys()
  assert planned["vocab_size"] == facts["vocab_size"] == size
  # Of tokens that are all as frequent: the least that a text's can be.
  assert planned["token_correlation"] == pytest.approx(1 / size) and (
    planned["token_correlation"] < facts["token_correlation"]
  )
  spec = task.batch_spec(config)
  assert spec == {
    name: jax.ShapeDtypeStruct((3, *array.shape), array.dtype)
    for name, array in data.train[0].items()
  }


def test_a_vocabulary_that_is_a_file_cannot_be_planned():
  config = from_config_dict({"data": {"tokenizer_file": "my.model"}})
  with pytest.raises(ConfigError, match="tokenizer_file='my.model' is not known without") as error:
    TASKS["causal_lm"].planned_facts(config)
  assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------
# Models and losses
# ---------------------------------------------------------------------------------------------


def test_the_encoder_has_a_depth_of_its_own():
  build = lambda config: TASKS["translation"].build_model(config, {"vocab_size": 40})
  model = build(config_of("translation", vocab_chunk=9, label_smoothing=0.1))
  assert (model.encoder.recipe.num_layers, model.decoder.recipe.num_layers) == (3, 2)
  assert (model.decoder.vocab_chunk, model.decoder.label_smoothing) == (9, 0.1)
  assert model.shared_embedding and model.decoder.tied
  model = build(config_of("translation", model={"encoder_layers": 0}))
  assert model.encoder.recipe.num_layers == 2


def test_the_recipes_know_both_depths():
  """DeepNet's alpha: 0.81 (N^4 M)^(1/16) in the encoder and (3M)^(1/4) in the decoder."""
  config = config_of("translation", recipe="deepnet")
  model = TASKS["translation"].build_model(config, {"vocab_size": 40})
  skips = [part.recipe.layers[0].ffn.skip.value for part in (model.encoder, model.decoder)]
  assert skips == pytest.approx([0.81 * (3**4 * 2) ** (1 / 16), 6**0.25])
  lines = TASKS["translation"].describe(config, {"vocab_size": 40})
  assert {line.split(":")[0] for line in lines} == {"encoder", "decoder"}


def test_a_window_of_an_encoder_is_refused():
  with pytest.raises(ConfigError, match="model.window=3 is of earlier tokens") as error:
    config = config_of("translation", model={"window": 3})
    TASKS["translation"].build_model(config, {"vocab_size": 40})
  assert "\n" not in str(error.value)


def test_the_loss_is_of_what_counts_and_smooth_in_training_alone():
  """From the model's logits, by hand: sum of w_i (-log p_i), and in training of q . (-log p)."""
  config, smooth = (
    config_of("translation", **fields)
    for fields in ({}, {"label_smoothing": 0.2, "vocab_chunk": 7})
  )
  task, facts = TASKS["translation"], {"vocab_size": 40}
  batch = batch_of(config, np.random.default_rng(0))
  model, smoothed = (task.build_model(c, facts) for c in (config, smooth))
  params = reference.random_params(model, *task.dummy_inputs(config))
  args, keywords = task.inputs(batch)
  keywords = {name: x for name, x in keywords.items() if not name.startswith("targets")}

  @compiled
  def run(params):
    losses = [
      task.loss(model, {"params": params}, batch),
      task.loss(smoothed, {"params": params}, batch),
      task.loss(smoothed, {"params": params}, batch, jax.random.key(1)),
    ]
    return model.apply({"params": params}, *args, **keywords), losses

  logits, losses = run(params)
  logits = np.asarray(logits, np.float64)
  costs = np.log(np.exp(logits).sum(-1, keepdims=True)) - logits
  nats = np.take_along_axis(costs, batch["targets"][..., None], -1)[..., 0]
  uniform = (costs.sum(-1) - nats) / (logits.shape[-1] - 1)
  assert nats.shape == batch["weights"].shape
  plain = np.sum(nats * batch["weights"])
  trained = np.sum((0.8 * nats + 0.2 * uniform) * batch["weights"])
  count = batch["weights"].sum()
  np.testing.assert_allclose(losses, [(plain, count), (plain, count), (trained, count)], rtol=1e-5)
  found = task.metrics({"loss": plain, "weight": count}, None, whole=True)
  assert found["loss_nats_per_token"] == plain / count
