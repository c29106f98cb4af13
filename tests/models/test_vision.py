"""The vision encoder and the classifier of images: formulae, masked patches, and options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.models.encoder import Encoder
from magneto_jax.models.vision import (
  ImageClassifier,
  VisionEncoder,
  relative_rows,
  soft_cross_entropy,
)
from tests import reference
from tests.models import common
from tests.models.common import SIZES, WIDTH, compiled, in_float64, run

IMAGES = np.random.default_rng(0).standard_normal((2, 4, 6, 3)).astype(np.float32)
MASKED = np.array([[1, 0, 0, 1, 0, 0], [0, 1, 1, 1, 0, 1]], bool)
PATCHES = MASKED.shape[1]


def vision(name="magneto", positions="learned", **options) -> VisionEncoder:
  sizes = SIZES | {"max_length": PATCHES + 1}
  dtype = options.pop("dtype", jnp.float32)
  recipe = common.recipe(name).encoder
  encoder = Encoder(recipe=recipe, positions=positions, dtype=dtype, **sizes)
  return VisionEncoder(encoder=encoder, **{"patch_size": 2} | options)


@pytest.mark.parametrize("class_token", (True, False))
def test_encoder_of_patches_is_its_formula_in_float64(class_token):
  """Patches row by row behind the class token, positions from 0 at the first, Magneto; 1e-11."""
  model = vision(class_token=class_token, mask_token=True, dtype=jnp.float64)
  h, params = in_float64(model, IMAGES.astype(np.float64), masked_BP=MASKED)
  x = reference.patches(params["patch_embedding"], IMAGES.astype(np.float64), 2, MASKED)
  x = x + params["encoder"]["position_embedding"]["embedding"][: x.shape[1]]
  visible = np.ones((x.shape[1],) * 2, bool)
  expected = reference.stack(
    params["encoder"]["stack"],
    x,
    [(reference.magneto,)],
    final_norm=reference.layer_norm,
    visible=visible,
  )
  np.testing.assert_allclose(h, expected, rtol=0, atol=1e-11)


def test_tokens_are_parameters_only_where_they_are_asked_for():
  for class_token in (True, False):
    for mask_token in (True, False):
      model = vision(class_token=class_token, mask_token=mask_token)
      params = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
      names = {"projection", *["class_token"] * class_token, *["mask_token"] * mask_token}
      assert set(params["patch_embedding"]) == names
      assert "token_embedding" not in params["encoder"]


def test_patches_without_positions_are_a_set():
  """Exchanging two of an image's patches exchanges their outputs, and leaves the class token's."""
  model = vision(positions="none")
  params = reference.random_params(model, IMAGES)
  exchanged = IMAGES.copy()
  exchanged[:, :2, :2], exchanged[:, 2:, 4:] = IMAGES[:, 2:, 4:], IMAGES[:, :2, :2]
  h = run(model, params, np.concatenate([IMAGES, exchanged]))
  order = [0, 6, 2, 3, 4, 5, 1]
  np.testing.assert_allclose(h[2:], h[:2, order], rtol=0, atol=1e-5)  # float32


def test_keywords_are_the_encoders():
  """A padding mask over class token and patches, and the stream."""
  model = vision()
  params = reference.random_params(model, IMAGES)
  mask = np.array([[1] * 5 + [0] * 2, [1] * 7])
  changed = IMAGES.copy()
  changed[0, 2:, 2:] += 1
  h, hidden = run(
    model,
    params,
    np.concatenate([IMAGES, changed]),
    mask_BT=np.concatenate([mask, mask]),
    return_hidden_states=True,
  )
  assert hidden.shape == (3, 4, 7, WIDTH)
  np.testing.assert_array_equal(h[0, :5], h[2, :5])
  np.testing.assert_array_equal(h[1], h[3])


@pytest.mark.parametrize(
  "name", common.main_and_slow(("magneto", "magneto_torchscale"), ("magneto_torchscale",))
)
def test_patches_are_drawn_as_the_record_says(name):
  """Xavier for the linear map of a patch; torchscale: torch's uniform default, biases too."""
  model = vision(name, patch_size=32)
  images = jnp.zeros((1, 32, 32, 3))
  projection = jax.jit(model.init)(jax.random.key(0), images)["params"]["patch_embedding"][
    "projection"
  ]
  fan_in, fan_out = 32 * 32 * 3, WIDTH
  torch = name == "magneto_torchscale"
  std = (3 * fan_in) ** -0.5 if torch else (2 / (fan_in + fan_out)) ** 0.5
  # 49,152 numbers: their deviation is off by 0.3 %.
  assert projection["kernel"].std() == pytest.approx(std, rel=0.02)
  assert projection["bias"].any() == torch


@pytest.mark.parametrize(
  ("options", "inputs", "message"),
  (
    ({"patch_size": 3}, {}, "images of 4 x 6 pixels are not whole patches of 3 x 3"),
    ({}, {"masked_BP": MASKED}, "masked patches need mask_token=True"),
    ({"patch_size": 1}, {}, "25 positions do not fit the learned table"),
    ({}, {"tokens_BT": np.zeros((2, 7), int)}, "give tokens or embeddings, one of the two"),
  ),
)
def test_wrong_arguments_raise(options, inputs, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: vision(**options).init(jax.random.key(0), IMAGES, **inputs))


# ---------------------------------------------------------------------------------------------
# Relative position biases of two dimensions
# ---------------------------------------------------------------------------------------------


def test_relative_rows_are_beits():
  """Its index matrix of 2 x 2 patches; of any grid, by what tells two pairs apart."""
  assert relative_rows(2, 2, class_token=True).tolist() == [
    [11, 9, 9, 9, 9],
    [10, 4, 3, 1, 0],
    [10, 5, 4, 2, 1],
    [10, 7, 6, 4, 3],
    [10, 8, 7, 5, 4],
  ]
  h, w = 3, 4
  rows = relative_rows(h, w, class_token=False)
  offsets = {}
  for query in range(h * w):
    for key in range(h * w):
      offset = np.subtract(divmod(query, w), divmod(key, w))
      offsets.setdefault(tuple(offset), set()).add(rows[query, key])
  assert len(offsets) == (2 * h - 1) * (2 * w - 1) == rows.max() + 1
  assert sorted(row for found in offsets.values() for row in found) == list(range(rows.max() + 1))
  with_class = relative_rows(h, w, class_token=True)
  np.testing.assert_array_equal(with_class[1:, 1:], rows)
  assert with_class.max() + 1 == rows.max() + 1 + 3


@pytest.mark.parametrize("class_token", (True, False))
def test_the_table_of_relative_biases_is_added_in_every_layer_in_float64(class_token):
  """1e-11."""
  options = {"class_token": class_token, "positions": "none", "dtype": jnp.float64}
  model = vision(relative_grid=(2, 3), **options)
  images = IMAGES.astype(np.float64)
  h, params = in_float64(model, images)
  assert np.ptp(params["patch_relative_bias"]) > 0  # Drawn by `in_float64`.
  rows = relative_rows(2, 3, class_token=class_token)
  bias = params["patch_relative_bias"][rows].transpose(2, 0, 1)[None]
  x = reference.patches(params["patch_embedding"], images, 2)
  expected = reference.stack(
    params["encoder"]["stack"],
    x,
    [(reference.magneto,)],
    final_norm=reference.layer_norm,
    visible=np.ones((x.shape[1],) * 2, bool),
    bias=bias,
  )
  np.testing.assert_allclose(h, expected, rtol=0, atol=1e-11)


def test_the_table_of_relative_biases_starts_at_0():
  params = compiled(vision(relative_grid=(2, 3)).init)(jax.random.key(0), IMAGES)["params"]
  assert params["patch_relative_bias"].shape == (3 * 5 + 3, 2)
  assert not params["patch_relative_bias"].any()


def test_a_bias_and_hidden_pairs_go_together():
  """A pair that is hidden stays hidden, whatever its bias."""
  model = vision(positions="none", relative_grid=(2, 3), class_token=False)
  params = reference.random_params(model, IMAGES)
  visible = np.eye(PATCHES, dtype=bool)[None]
  alone = run(model, params, IMAGES, visible_BTT=visible)
  params["patch_relative_bias"] = -3 * params["patch_relative_bias"]
  found = run(model, params, IMAGES, visible_BTT=visible)
  np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)  # float32


# ---------------------------------------------------------------------------------------------
# The classifier
# ---------------------------------------------------------------------------------------------


def classifier(name="magneto", *, pooling="mean", classes=3, smoothing=0.0, **options):
  encoder = vision(name, **{"class_token": pooling == "first"} | options)
  return ImageClassifier(
    encoder=encoder, classes=classes, pooling=pooling, label_smoothing=smoothing
  )


@pytest.mark.parametrize(("pooling", "class_token"), [("first", True), ("mean", True)])
def test_the_head_reads_what_the_pooling_says_in_float64(pooling, class_token):
  """The class token, or the norm of the patches' mean without it; 1e-11."""
  model = classifier(pooling=pooling, class_token=class_token, dtype=jnp.float64)
  images = IMAGES.astype(np.float64)
  scores, params = in_float64(model, images)
  h = in_float64_of(model.encoder, params["encoder"], images)
  pooled = h[:, 0]
  if pooling == "mean":
    pooled = reference.layer_norm(params["head_norm"], h[:, 1:].mean(1))
  expected = reference.dense(params["head_out"], pooled)
  np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-11)


def in_float64_of(module, params, *args):
  with jax.enable_x64(True):
    return run(module, params, *map(jnp.asarray, args))


def test_what_targets_cost_is_timms_soft_cross_entropy():
  """q = (1 - e)(s onehot + (1 - s) onehot) + e / C in training, e = 0 else: NumPy, 1e-6."""
  model = classifier(smoothing=0.1, classes=5)
  params = reference.random_params(model, IMAGES)
  scores = run(model, params, IMAGES).astype(np.float64)
  labels, others, shares = np.array([4, 1]), np.array([0, 1]), np.array([0.3, 1.0], np.float32)
  mixed = shares[:, None] * np.eye(5)[labels] + (1 - shares[:, None]) * np.eye(5)[others]
  log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
  for smoothing, deterministic in ((0.1, False), (0.0, True)):
    q = (1 - smoothing) * mixed + smoothing / 5
    np.testing.assert_allclose(q.sum(-1), 1, rtol=1e-6)
    nats = run(
      model,
      params,
      IMAGES,
      targets=(labels, others, shares),
      deterministic=deterministic,
      rngs={"dropout": jax.random.key(0)},
    )
    np.testing.assert_allclose(nats, -(q * log_p).sum(-1), rtol=1e-6)  # float32


def test_smoothing_is_timms_at_a_thousand_classes():
  """Off 1e-4, on 0.9001, of e = 0.1: by what the costs' derivatives are at even scores."""
  target = jnp.array([7]), jnp.array([7]), jnp.ones(1)
  cost = lambda scores: soft_cross_entropy(scores, *target, smoothing=0.1)[0]
  q = 1 / 1000 - jax.grad(cost)(jnp.zeros((1, 1000)))[0]
  np.testing.assert_allclose(q[7:9], [0.9001, 1e-4], rtol=1e-3)


FIRST = {("magneto", "mean")}
STARTS = [
  pytest.param(name, pooling, marks=() if (name, pooling) in FIRST else pytest.mark.slow)
  for name in common.PAPERS
  for pooling in ("first", "mean")
]


@pytest.mark.parametrize(("name", "pooling"), STARTS)
def test_every_recipe_starts_with_all_classes_alike(name, pooling):
  """And sends a finite gradient that is not 0 back through every layer."""
  model = classifier(name, pooling=pooling, classes=4, relative_grid=(2, 3))
  params = compiled(model.init)(jax.random.key(0), IMAGES)["params"]
  targets = np.array([0, 3]), np.array([1, 3]), np.array([0.5, 1.0], np.float32)
  cost = lambda params: jnp.mean(model.apply({"params": params}, IMAGES, targets=targets))
  loss, gradient = compiled(jax.value_and_grad(cost))(params)
  assert float(loss) == pytest.approx(np.log(4), abs=1e-2)
  ffn = gradient["encoder"]["encoder"]["stack"]["segment_0"]["block_0"]["ffn"]["wi"]["kernel"]
  if name != "rezero":  # Whose branches start at 0.
    assert np.isfinite(ffn).all() and all(np.abs(layer).max() > 0 for layer in ffn)


@pytest.mark.parametrize(
  ("options", "message"),
  (
    ({"pooling": "last"}, "pooling='last' must be one of first, mean"),
    ({"pooling": "first", "class_token": False}, "reads the class token: set class_token=True"),
    ({"classes": 0}, "classes=0 must be at least 1"),
    ({"relative_grid": (3, 3)}, r"images of \(2, 3\) patches do not fit self.relative_grid=\(3, 3"),
  ),
)
def test_a_classifier_that_cannot_be_raises(options, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: classifier(**options).init(jax.random.key(0), IMAGES))
