"""Masked image models: their formula, what a hidden patch reaches, and the tokenizer that rests."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from magneto_jax.models import Frozen, MaskedImageModel
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.vision import VisionEncoder
from tests import reference
from tests.models import common
from tests.models.common import SIZES, WIDTH, compiled

V, SIDE, GRID = 11, 8, 4
PATCHES = GRID * GRID
rng = np.random.default_rng(0)
IMAGES = rng.standard_normal((2, SIDE, SIDE, 3)).astype(np.float32)
PLACES = np.sort(np.stack([rng.choice(PATCHES, 6, replace=False) for _ in IMAGES]), axis=1)
MASKED = np.stack([np.isin(np.arange(PATCHES), places) for places in PLACES])


class Brightness(nn.Module):
  """A tokenizer of the stand-in: how bright a patch is, in V levels from `low` on, step `step`."""

  def setup(self):
    self.low = self.param("low", nn.initializers.constant(-1.0), ())
    self.step = self.variable("state", "step", lambda: jnp.float32(0.2))

  def __call__(self, images_BHWC):
    return self.decode(self.encode(images_BHWC))

  def encode(self, images_BHWC):
    size = images_BHWC.shape[1] // GRID
    cut = images_BHWC.reshape(-1, GRID, size, GRID, size, 3)
    levels_BP = (cut.mean((2, 4, 5)).reshape(-1, PATCHES) - self.low) / self.step.value
    return jnp.clip(jnp.floor(levels_BP), 0, V - 1).astype(jnp.int32)

  def decode(self, tokens_BP):
    bright_BP = tokens_BP * self.step.value + self.low
    small = bright_BP.reshape(-1, GRID, GRID, 1).repeat(2, 1).repeat(2, 2)
    return jnp.broadcast_to(small, (*small.shape[:3], 3))


STATE = {"image_tokenizer": {"params": {"low": -1.0}, "state": {"step": 0.2}}}


def levels(images):
  """The stand-in's tokens, by loops."""
  found = np.zeros((len(images), PATCHES), int)
  for b, image in enumerate(images):
    for p in range(PATCHES):
      y, x = 2 * (p // GRID), 2 * (p % GRID)
      found[b, p] = np.clip((image[y : y + 2, x : x + 2].mean() + 1) // 0.2, 0, V - 1)
  return found


def masked_model(dtype=jnp.float32, class_token=True, mask_token=True, **options):
  encoder = Encoder(
    recipe=common.recipe().encoder,
    positions="learned",
    dtype=dtype,
    **SIZES | {"max_length": PATCHES + 1},
  )
  vision = VisionEncoder(
    encoder=encoder, patch_size=2, class_token=class_token, mask_token=mask_token
  )
  return MaskedImageModel(encoder=vision, tokenizer=Frozen(Brightness()), vocab_size=V, **options)


@pytest.mark.parametrize("class_token", (True, False))
def test_the_model_is_its_formula_in_float64(class_token):
  """Hidden patches are the mask token; the head reads them alone; the loss is of the tokenizer's
  tokens of the whole image: 1e-11."""
  with jax.enable_x64(True):
    model = masked_model(jnp.float64, class_token)
    images = IMAGES.astype(np.float64)
    params = reference.random_params(model, images, dtype=np.float64)
    inputs = {"masked_BP": MASKED, "places_BK": PLACES}

    @compiled
    def both(params):
      variables = {"params": params, "state": STATE}
      return [
        model.apply(variables, images, **inputs, targets=targets) for targets in (False, True)
      ]

    logits, nats = map(np.asarray, both(params))
  own = params["encoder"]
  x = reference.patches(own["patch_embedding"], images, 2, MASKED)
  x = x + own["encoder"]["position_embedding"]["embedding"][: x.shape[1]]
  h = reference.stack(
    own["encoder"]["stack"],
    x,
    [(reference.magneto,)],
    final_norm=reference.layer_norm,
    visible=np.ones((x.shape[1],) * 2, bool),
  )
  h = np.stack([h[b, PLACES[b] + class_token] for b in range(2)])
  z = h @ params["output_embedding"]["embedding"].T + params["head_bias"]
  np.testing.assert_allclose(logits, z, rtol=0, atol=1e-11)
  targets = np.stack([levels(IMAGES)[b, PLACES[b]] for b in range(2)])
  assert len(np.unique(targets)) > 3
  costs = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, targets[..., None], -1)[..., 0]
  np.testing.assert_allclose(nats, costs, rtol=0, atol=1e-11)


@pytest.fixture(scope="module")
def drawn():
  model = masked_model()
  return model, reference.random_params(model, IMAGES)


def test_a_hidden_patch_reaches_nothing(drawn):
  """Of its pixels every output's gradient is 0, and so is the loss's; of seen ones it is not."""
  model, params = drawn
  variables = {"params": params, "state": STATE}
  noise = np.random.default_rng(1).standard_normal((2, PATCHES, V)).astype(np.float32)

  @compiled
  def gradients(images):
    all_of = lambda x: jnp.sum(model.apply(variables, x, masked_BP=MASKED) * noise)
    loss = lambda x: jnp.sum(
      model.apply(variables, x, masked_BP=MASKED, places_BK=PLACES, targets=True)
    )
    return jax.grad(all_of)(images), jax.grad(loss)(images)

  hidden = MASKED.reshape(2, GRID, GRID).repeat(2, 1).repeat(2, 2)
  for gradient in map(np.asarray, gradients(IMAGES)):
    assert not gradient[hidden].any()
    assert (np.abs(gradient[~hidden]) > 0).all()


def test_the_loss_is_of_the_hidden_patches_tokens(drawn):
  """Another image behind the mask changes no logit, and the loss by its tokens alone."""
  model, params = drawn
  variables = {"params": params, "state": STATE}
  hidden = MASKED.reshape(2, GRID, GRID, 1).repeat(2, 1).repeat(2, 2)
  other = np.where(hidden, -IMAGES, IMAGES)
  inputs = {"masked_BP": MASKED, "places_BK": PLACES}
  run = compiled(
    lambda x: [model.apply(variables, x, **inputs, targets=targets) for targets in (False, True)]
  )
  (logits, nats), (others, other_nats) = run(IMAGES), run(other)
  np.testing.assert_array_equal(logits, others)
  assert (levels(IMAGES) != levels(other))[MASKED].any()
  assert (np.asarray(nats) != np.asarray(other_nats)).any()


def test_the_tokenizer_rests(drawn):
  """It is state, with all of its variables, and no parameter; as it is drawn, it is its own."""
  model, params = drawn
  variables = compiled(model.init)(jax.random.key(0), IMAGES)
  assert set(params) == set(variables["params"]) == {"encoder", "output_embedding", "head_bias"}
  assert jax.tree.map(float, variables["state"]) == {
    "image_tokenizer": {"params": {"low": -1.0}, "state": {"step": pytest.approx(0.2)}}
  }
  tokens = compiled(lambda v: model.apply(v, IMAGES, method="tokens"))(variables)
  np.testing.assert_array_equal(tokens, levels(IMAGES))
  assert model.apply(variables, tokens, method="pixels").shape == IMAGES.shape


def test_at_the_start_the_loss_is_that_of_a_uniform_answer():
  """log 8192: with W ~ N(0, 0.02^2) and normed h logits have the deviation 0.02 sqrt(D) = 0.08."""
  model = masked_model().clone(vocab_size=8192)

  @compiled
  def loss(key):
    variables = model.init(key, IMAGES)
    return jnp.mean(
      model.apply(variables, IMAGES, masked_BP=MASKED, places_BK=PLACES, targets=True)
    )

  assert math.log(8192) == pytest.approx(9.0109, abs=1e-4) and WIDTH**0.5 * 0.02 <= 0.08
  assert float(loss(jax.random.key(0))) == pytest.approx(9.0109, abs=0.02)


@pytest.mark.ci
def test_smoothing_is_of_training_alone(drawn):
  model, params = drawn
  variables = {"params": params, "state": STATE}
  smooth = model.clone(label_smoothing=0.3, vocab_chunk=4)
  inputs = {"masked_BP": MASKED, "places_BK": PLACES, "targets": True}
  rngs = {"dropout": jax.random.key(0)}

  @compiled
  def run():
    plain = [m.apply(variables, IMAGES, **inputs) for m in (model, smooth)]
    return *plain, smooth.apply(variables, IMAGES, **inputs, deterministic=False, rngs=rngs)

  one, two, trained = map(np.asarray, run())
  np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)
  assert np.abs(trained - one).max() > 1e-2


def test_an_encoder_that_cannot_hide_patches_is_refused():
  model = masked_model(mask_token=False)
  with pytest.raises(ValueError, match="needs an encoder with mask_token=True"):
    jax.eval_shape(model.init, jax.random.key(0), IMAGES)
