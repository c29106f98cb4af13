"""The image tokenizer: its formula, the order of its patches, and what trains it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.models import Encoder, ImageTokenizer, VisionEncoder
from tests.models import common
from tests.models.common import SIZES, compiled

IMAGES = np.random.default_rng(0).standard_normal((3, 4, 6, 3)).astype(np.float32)
PATCHES = 6


def tokenizer(positions="none", **options) -> ImageTokenizer:
  sizes = SIZES | {"max_length": PATCHES, "positions": positions}
  make = lambda name: Encoder(recipe=common.recipe(name).encoder, **sizes)
  encoder = VisionEncoder(encoder=make("magneto"), patch_size=2, class_token=False)
  return ImageTokenizer(
    encoder=encoder, decoder=make("pre_ln"), **{"codes": 7, "code_width": 4} | options
  )


@pytest.fixture(scope="module")
def built():
  """A tokenizer and its variables after a step's call."""
  model = tokenizer()
  variables = compiled(model.init)(jax.random.key(0), IMAGES)
  call = lambda variables: model.apply(
    variables, IMAGES, mutable=["state"], rngs={"dropout": jax.random.key(1)}
  )
  return model, variables | compiled(call)(variables)[1]


@pytest.fixture(scope="module")
def call(built):
  """The model's methods, compiled."""
  return lambda x, **options: compiled(lambda variables: built[0].apply(variables, x, **options))(
    built[1]
  )


def test_tokens_are_the_nearest_codes_and_images_those_of_the_tokens(built, call):
  model, variables = built
  params, codes = variables["params"], np.asarray(variables["state"]["quantizer"]["codes"])
  encode = lambda params: model.encoder.apply({"params": params}, IMAGES)
  h = np.asarray(compiled(encode)(params["encoder"]), np.float64)
  layer = lambda name, x: x @ np.asarray(params["quantizer"][name]["kernel"], np.float64)
  z = layer("projection", np.tanh(layer("hidden", h)))  # Biases start at 0.
  z /= np.linalg.norm(z, axis=-1, keepdims=True)
  tokens = np.argmin(np.sum((z[..., None, :] - codes) ** 2, axis=-1), axis=-1)
  found = call(IMAGES, return_tokens=True)
  np.testing.assert_array_equal(found.tokens_BP, tokens)
  np.testing.assert_array_equal(call(IMAGES, method="encode"), tokens)
  assert len(np.unique(tokens)) > 2
  commitment = np.mean((z - codes[tokens]) ** 2, axis=(1, 2))
  np.testing.assert_allclose(found.commitment_B, commitment, rtol=1e-4)
  decoded = call(found.tokens_BP, method="decode", grid=(2, 3))
  np.testing.assert_allclose(decoded, found.images_BHWC, atol=1e-5)
  assert call(IMAGES).tokens_BP is None and decoded.shape == IMAGES.shape


def test_a_patch_of_the_image_is_the_pixels_of_its_own_token(built, call):
  """Without positions the decoder gives the exchange of two tokens back as that of two patches."""
  tokens = call(IMAGES, method="encode")[:1]
  tokens = tokens.at[0, :2].set(jnp.array([1, 2]))
  other = tokens.at[0, :2].set(jnp.array([2, 1]))
  a, b = (np.asarray(call(x, method="decode", grid=(2, 3)))[0] for x in (tokens, other))
  exchanged = a.copy()
  exchanged[:2, :2], exchanged[:2, 2:4] = a[:2, 2:4], a[:2, :2]
  np.testing.assert_allclose(b, exchanged, atol=1e-5)
  assert np.abs(a - b).max() > 1e-3


def test_pixels_of_a_patch_are_read_row_by_row(built):
  model, variables = built
  head = {"kernel": jnp.zeros((16, 12)), "bias": jnp.arange(12.0)}
  params = variables["params"] | {"head_out": head}
  image = model.apply({**variables, "params": params}, IMAGES).images_BHWC[0]
  np.testing.assert_array_equal(image[2:, 4:], np.arange(12).reshape(2, 2, 3))
  np.testing.assert_array_equal(image[:2, :2], np.arange(12).reshape(2, 2, 3))


def test_both_stacks_learn_of_the_pixels_and_the_codes_do_not(built):
  model, variables = built

  def loss(variables):
    found = model.apply(variables, IMAGES)
    return jnp.mean(jnp.square(found.images_BHWC - IMAGES))

  gradient = compiled(jax.grad(loss, allow_int=True))(variables)
  assert not np.any(gradient["state"]["quantizer"]["codes"])
  for name, of_part in gradient["params"].items():
    assert any(np.any(leaf) for leaf in jax.tree.leaves(of_part)), name


def test_what_does_not_fit_is_refused():
  vision = tokenizer().encoder.clone(class_token=True)
  with pytest.raises(ValueError, match="class_token=False"):
    tokenizer().clone(encoder=vision).init(jax.random.key(0), IMAGES)
  model = tokenizer()
  variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
  tokens = np.zeros((1, 6), np.int32)
  for options in ({}, {"grid": (2, 2)}):
    with pytest.raises(ValueError, match="6 tokens do not fill"):
      jax.eval_shape(lambda v, o=options: model.apply(v, tokens, method="decode", **o), variables)
