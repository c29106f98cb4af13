"""The vision encoder: its formula, masked patches, and what its options change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.models.encoder import Encoder
from magneto_jax.models.vision import VisionEncoder
from tests import reference
from tests.models import common
from tests.models.common import SIZES, WIDTH, in_float64, run

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
