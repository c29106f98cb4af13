"""The image tokenizer's task: its loss and metrics by NumPy, and whole runs."""

import jax
import numpy as np
import pytest

import magneto_jax
from magneto_jax import diagnostics, evaluation, reporting, runs, training
from magneto_jax.config import ConfigError, from_config_dict
from magneto_jax.tasks import TASKS, image_tokenizer
from tests.models.common import compiled
from tests.theory.test_flops import product_flops

TASK = TASKS["image_tokenizer"]
FACTS = {"token_correlation": 0.3}
TINY = {
  "task": "image_tokenizer",
  "steps": 4,
  "batch_size": 8,
  "eval_every": 2,
  "checkpoint_every": 2,
  "model": {
    "layers": 1,
    "width": 16,
    "ffn_width": 16,
    "heads": 2,
    "positions": "learned",
    "image_size": 16,
    "patch_size": 8,
    "image_vocab_size": 6,
    "codebook_width": 4,
  },
  "data": {"name": "embedded/emoji", "augment": {"crop_scale": 0.5, "flip": 0.5}},
}


def config_of(*, model=None, data=None, **fields):
  parts = {"model": TINY["model"] | (model or {}), "data": TINY["data"] | (data or {})}
  return from_config_dict(TINY | parts | fields)


@pytest.fixture(scope="module")
def measured():
  """A model's variables, a batch of which one image does not count, and what is measured of it."""
  config = config_of()
  model = TASK.build_model(config, FACTS)
  variables = compiled(model.init)(jax.random.key(0), *TASK.dummy_inputs(config))
  images = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
  batch = {"image": images, "weights": np.array([1, 0, 1], np.float32)}

  @compiled
  def run(variables, batch):
    found = model.apply(variables, batch["image"], return_tokens=True)
    return found, TASK.measured(model, variables, batch), TASK.loss(model, variables, batch)

  return batch, *jax.tree.map(np.asarray, run(variables, batch))


def test_loss_and_errors_are_those_of_the_images_that_count(measured):
  batch, found, values, (loss, weight) = measured
  errors = np.mean((found.images_BHWC - batch["image"]) ** 2, axis=(1, 2, 3))
  expected = {
    "loss": errors[[0, 2]].sum() + found.commitment_B[[0, 2]].sum(),
    "weight": 2,
    "squared_error": errors[[0, 2]].sum(),
    "commitment": found.commitment_B[[0, 2]].sum(),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(values[name], value, rtol=1e-5)
  np.testing.assert_allclose([loss, weight], [expected["loss"], 2], rtol=1e-5)
  np.testing.assert_array_equal(values["tokens"], found.tokens_BP)


def test_the_baseline_gives_each_patch_its_mean_colour(measured):
  batch, _, values, _ = measured
  error = 0.0
  for image in batch["image"][[0, 2]]:
    for row in (0, 8):
      for column in (0, 8):
        patch = image[row : row + 8, column : column + 8].astype(np.float64)
        error += np.sum((patch - patch.mean((0, 1))) ** 2) / image.size
  np.testing.assert_allclose(values["plain_squared_error"], error, rtol=1e-5)


def test_metrics_count_the_codes_of_all_patches():
  """Of equally frequent codes the perplexity is their number; a constant answer has one."""
  sums = {"loss": 6.0, "weight": 4.0, "squared_error": 0.16, "commitment": 2.0}
  totals = sums | {"plain_squared_error": 1.0, "tokens": np.array([[0, 3], [5, 9], [0, 3], [5, 9]])}
  found = TASK.metrics(totals, None, whole=True)
  assert found == pytest.approx(
    {
      "loss_per_sample": 1.5,
      "mean_squared_error": 0.04,
      "psnr_db": 20.0,
      "commitment": 0.5,
      "codebook_perplexity": 4.0,
      "codes_used": 4,
      "mean_squared_error_of_plain_patches": 0.25,
    }
  )
  totals |= {"tokens": np.array([[7, 7, 7, 2]]), "squared_error": 0.0}
  found = TASK.metrics(totals, None, whole=True)
  assert found["codebook_perplexity"] == pytest.approx(4 / 27**0.25) and found["codes_used"] == 2
  assert "psnr_db" not in found


def test_the_stacks_have_depths_of_their_own_and_are_found():
  config = config_of(model={"layers": 2, "encoder_layers": 3})
  model = TASK.build_model(config, FACTS)
  assert model.encoder.encoder.recipe.num_layers == 3 and model.decoder.recipe.num_layers == 2
  parts = diagnostics.parts_of(model)
  assert {kind: part.path for kind, part in parts.items()} == {
    "encoder": ("encoder", "encoder"),
    "decoder": ("decoder",),
  }
  assert {line.split(":")[0] for line in TASK.describe(config, FACTS)} == {"encoder", "decoder"}
  model = TASK.build_model(config_of(model={"layers": 2}), FACTS)
  assert model.encoder.encoder.recipe.num_layers == 2


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"label_smoothing": 0.1}, "config.label_smoothing is not read with"),
    ({"vocab_chunk": 8}, "config.vocab_chunk is not read with"),
    ({"ema": 0.9}, "ema=0.9 is not read with"),
    ({"data": {"normalization": "imagenet"}}, "set data.normalization='half'"),
    ({"model": {"window": 3}}, "set model.window=0"),
  ],
)
def test_what_the_model_cannot_have_is_refused(fields, message):
  with pytest.raises(ConfigError, match=message) as error:
    TASK.build_model(config_of(**fields), FACTS)
  assert "\n" not in str(error.value)


def test_flops_are_those_of_a_steps_products():
  """To the last one, as the step is traced, but for the k-means of the first."""
  config = config_of(model={"encoder_layers": 2, "attention_implementation": "xla"})
  model = TASK.build_model(config, FACTS)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *TASK.dummy_inputs(config))

  def loss(params, state, batch):
    variables = {"params": params, "state": state}
    (loss, _), state, _ = TASK.loss_and_state(model, variables, batch, jax.random.key(0))
    return loss, state

  step = jax.value_and_grad(loss, has_aux=True)
  args = shapes["params"], shapes["state"], TASK.batch_spec(config)
  patches, width, codes = 8 * 4, 4, 6
  # Ten rounds of nearest codes and sums, and one more for the shares.
  k_means = 11 * 2 * (2 * patches * width * codes)
  assert product_flops(jax.make_jaxpr(step)(*args).jaxpr) == TASK.flops(config, FACTS) + k_means
  of = image_tokenizer.products(config)
  assert image_tokenizer.encoding_products(config) == sum(of.values()) - of["decoder"]


def test_data_are_pixels_without_labels(tmp_path):
  config = config_of()
  data = TASK.load_data(config, tmp_path)
  generator = np.random.default_rng(0)
  spec = TASK.batch_spec(config)
  for sample in (data.augment(data.train[0], generator), data.validation[0]):
    assert {k: (8, *np.shape(v)) for k, v in sample.items()} == {
      k: v.shape for k, v in spec.items()
    }
    assert sample["image"].dtype == np.float32 and np.abs(sample["image"]).max() <= 1
  assert not data.classes and data.mix is None
  assert 0 < TASK.facts(data)["token_correlation"] < 1


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_kept_whole_with_its_codes(tmp_path):
  """Broken off and resumed it is the same to the bit; what is loaded scores what the run did."""
  fields = {"model": {"codebook_redraw": 0.5}, "ema": 0.9, "diagnostics_every": 4}
  fields["optimizer"] = {"decay_steps": 4}
  config = config_of(**fields)
  whole = training.train(config, tmp_path / "whole")
  for steps in (2, 4):
    parted = training.train(config_of(**fields, steps=steps), tmp_path / "parted")
  metrics = {name for name in whole if name.startswith("validation_")}
  assert len(metrics) == 7 and {n: whole[n] for n in metrics} == {n: parted[n] for n in metrics}
  model, variables = magneto_jax.load(tmp_path / "whole")
  assert set(variables) == {"params", "state"} and bool(variables["state"]["quantizer"]["started"])
  parts = {"params", "ema_params", "variables", "optimizer", "data", "config"}
  with runs.Checkpointer(runs.checkpoints_in(tmp_path / "whole"), read_only=True) as checkpointer:
    assert checkpointer.parts(4) == parts
  first = magneto_jax.load(tmp_path / "whole", step=2).variables["state"]["quantizer"]["codes"]
  assert np.any(first != variables["state"]["quantizer"]["codes"])
  found = evaluation.evaluate(evaluation.open_run(tmp_path / "whole"))["metrics"]
  for name, value in found.items():
    assert whole[f"validation_{name}"] == pytest.approx(value, rel=1e-5), name
  assert whole["sample"].splitlines()[0] == "the tokens of validation image 78"
  assert (tmp_path / "whole" / reporting.EXAMPLES).stat().st_size > 10_000
  images = TASK.load_data(config, tmp_path).validation[0]["image"][None]
  tokens = model.apply(variables, images, method="encode")
  assert tokens.shape == (1, 4) and model.apply(variables, tokens, method="decode").shape == (
    1,
    16,
    16,
    3,
  )
