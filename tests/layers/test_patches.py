"""Patch embedding: its formula, its two tokens and its init."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.layers.initializers import dense_init
from magneto_jax.layers.patches import PatchEmbedding, resized_positions
from magneto_jax.theory.records import Init
from tests import reference

IMAGES = np.random.default_rng(0).standard_normal((2, 4, 6, 3)).astype(np.float32)
MASKED = np.array([[1, 0, 0, 1, 0, 0], [0, 1, 1, 1, 0, 1]], bool)


@pytest.mark.parametrize("class_token", (False, True))
@pytest.mark.parametrize("mask_token", (False, True))
def test_layer_is_its_formula(mask_token, class_token):
  """float64, 1e-12, against loops over patches, rows, columns and channels of 4 x 6 pixels."""
  with jax.enable_x64(True):
    layer = PatchEmbedding(8, 2, class_token=class_token, mask_token=mask_token, dtype=jnp.float64)
    images = IMAGES.astype(np.float64)
    params = reference.random_params(layer, images, dtype=np.float64)
    for masked in (None, MASKED) if mask_token else (None,):
      x = layer.apply({"params": params}, images, masked)
      assert (x.shape, x.dtype) == ((2, 6 + class_token, 8), jnp.float64)
      expected = reference.patches(params, images, 2, masked)
      np.testing.assert_allclose(x, expected, rtol=0, atol=1e-12)


def test_masked_pixels_are_not_seen():
  """The mask, of 0 and 1 as well, hides its patches to the bit; the class token is never masked."""
  layer = PatchEmbedding(8, 2, mask_token=True)
  params = reference.random_params(layer, IMAGES)
  run = lambda images, masked: layer.apply({"params": params}, images, masked)
  hidden = np.kron(MASKED.reshape(2, 2, 3), np.ones((2, 2), bool))[..., None]
  changed = np.where(hidden, IMAGES + 1, IMAGES)
  x = run(IMAGES, MASKED.astype(int))
  np.testing.assert_array_equal(x, run(changed, MASKED))
  assert np.abs(x - run(changed, None)).max() > 0.1
  np.testing.assert_array_equal(x[:, 1:][MASKED], np.tile(params["mask_token"], (6, 1)))
  np.testing.assert_array_equal(x[:, 0], np.tile(params["class_token"], (2, 1)))


def test_projection_is_drawn_with_the_fans_of_the_whole_patch():
  """In: p^2 C = 192; out: D = 64, those of the linear map it is; the two tokens are zeros."""
  for family, bound in (("torch_uniform", 192**-0.5), ("xavier_uniform", (6 / 256) ** 0.5)):
    init = dense_init(Init(family, bias="torch_uniform"))
    layer = PatchEmbedding(64, 8, projection_init=init, mask_token=True)
    params = layer.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    assert 0.9 * bound < np.abs(params["projection"]["kernel"]).max() <= bound
    assert 0.9 * 192**-0.5 < np.abs(params["projection"]["bias"]).max() <= 192**-0.5
  assert not params["class_token"].any() and not params["mask_token"].any()


def test_bfloat16_patches_keep_float32_parameters():
  layer = PatchEmbedding(8, 2, mask_token=True, dtype=jnp.bfloat16)
  variables = jax.eval_shape(layer.init, jax.random.key(0), IMAGES, MASKED)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
  assert jax.eval_shape(layer.apply, variables, IMAGES, MASKED).dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ("options", "inputs", "message"),
  (
    ({"patch_size": 4}, (IMAGES,), "images of 4 x 6 pixels are not whole patches of 4 x 4"),
    ({"patch_size": 3}, (IMAGES,), "images of 4 x 6 pixels are not whole patches of 3 x 3"),
    ({}, (IMAGES[0],), r"images \[4, 6, 3\] are not \[B, H, W, C\]"),
    ({"mask_token": True}, (IMAGES, MASKED[:, :1]), r"is not \[B, P\] = \[2, 6\]"),
    ({"mask_token": False}, (IMAGES, MASKED), "masked patches need mask_token=True"),
  ),
)
def test_wrong_arguments_raise(options, inputs, message):
  layer = PatchEmbedding(8, **{"patch_size": 2} | options)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(layer.init, jax.random.key(0), *inputs)


def test_positions_are_resized_along_each_side_by_itself():
  """A product of two lines stays one, of other sides; `tests/convert/test_beit3.py` has torch's."""
  down, right = np.random.default_rng(0).standard_normal((2, 5))
  line = lambda x, to: resized_positions(x[:, None], (len(x), 1), (to, 1))[:, 0]
  table = np.outer(down[:3], right).reshape(-1, 1)
  found = resized_positions(table, (3, 5), (4, 2))
  expected = np.outer(line(down[:3], 4), line(right, 2)).reshape(-1, 1)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
  assert found.dtype == np.float64
  assert resized_positions(table.astype(np.float32), (3, 5), (4, 2)).dtype == np.float32
  np.testing.assert_array_equal(resized_positions(table, (3, 5), (3, 5)), table)


def test_a_ramp_of_positions_stays_one_to_a_tenth_of_a_step():
  """Away from the rim: each grid is spread over the same image. Between two rows the kernel is off
  by less; a third more rows, and a third fewer."""
  y, x = np.indices((14, 14)) + 0.5
  for side in (21, 10):
    found = resized_positions(np.stack([y, x], -1).reshape(-1, 2), (14, 14), (side, side))
    wanted = np.moveaxis((np.indices((side, side)) + 0.5) * 14 / side, 0, -1)
    inner = (slice(4, -4), slice(4, -4))
    np.testing.assert_allclose(found.reshape(side, side, 2)[inner], wanted[inner], rtol=0, atol=0.1)
