"""BEiT-3: its formula, its modalities alone and together, padding, masks, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.models.beit3 import BEiT3
from magneto_jax.models.encoder import Encoder
from tests import reference
from tests.models import common
from tests.models.common import SIZES, VOCAB, WIDTH, in_float64, run

IMAGES = np.random.default_rng(0).standard_normal((3, 4, 6, 3)).astype(np.float32)
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (3, 5))
MASK = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1] * 5])
RELATIVE = {"relative_buckets": 8}
MASKED = np.array([[1, 0, 0, 1, 0, 0], [0, 1, 1, 1, 0, 1], [0] * 6], bool)
V, T = 1 + MASKED.shape[1], TOKENS.shape[1]
PAIR = (IMAGES, TOKENS)


def beit3(encoder=(), name="magneto", **options) -> BEiT3:
  experts = {"experts": ("vision", "text"), "positions": "none"}
  sizes = SIZES | experts | dict(encoder)
  own = {"vocab_size": VOCAB, "num_patches": V - 1, "patch_size": 2, "max_text_length": T}
  recipe = common.recipe(name).encoder
  return BEiT3(encoder=Encoder(recipe=recipe, **sizes), **own | options)


@functools.cache
def model_and_params():
  model = beit3(position_offset=2)
  return model, reference.random_params(model, *PAIR)


# ---------------------------------------------------------------------------------------------
# Formula
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", (0, 2))
def test_model_is_its_formula_in_float64(offset):
  """Patches, scaled tokens, positions of each from `offset` on, multiway Magneto; 1e-11."""
  model = beit3({"dtype": jnp.float64}, position_offset=offset)
  images = IMAGES.astype(np.float64)
  h, params = in_float64(model, images, TOKENS, masked_BP=MASKED, mask_BT=MASK)
  tables = {name: params[f"position_embeddings_{name}"]["embedding"] for name in ("vision", "text")}
  assert (len(tables["vision"]), len(tables["text"])) == (V + offset, T + offset)
  vision = reference.patches(params["patch_embedding"], images, 2, MASKED)
  text = WIDTH**0.5 * params["text_embedding"]["embedding"][TOKENS]
  mask = np.concatenate([np.ones((3, V), bool), MASK == 1], axis=1)
  before = np.stack([[row[:t].sum() for t in range(T)] for row in MASK])
  text += tables["text"][offset + before]
  x = np.concatenate([vision + tables["vision"][offset:], text], axis=1)
  x = reference.stack(
    params["encoder"]["stack"],
    x * mask[..., None],
    [(reference.multiway_magneto,)],
    final_norm=None,
    split=V,
    visible=mask[:, None, None],
  )
  norms = params["encoder"]["stack"]["final_norm"]
  expected = np.concatenate(
    [
      reference.layer_norm(norms["vision"], x[:, :V]),
      reference.layer_norm(norms["text"], x[:, V:]),
    ],
    axis=1,
  )
  np.testing.assert_allclose(h[mask], expected[mask], rtol=0, atol=1e-11)


def test_experts_with_equal_parameters_are_a_plain_encoder():
  """Of the same embeddings, with a norm behind them as well (Peri-LN); float32."""
  make = functools.partial(Encoder, recipe=common.recipe("peri_ln").encoder, positions="none")
  plain, experts = make(**SIZES), make(**SIZES, experts=("vision", "text"))
  x = np.random.default_rng(1).standard_normal((3, V + T, WIDTH)).astype(np.float32)
  params = reference.random_params(plain, embeddings_BTD=x)

  def doubled(p):
    if not isinstance(next(iter(p.values())), dict):
      return {"vision": p, "text": p}
    return {name: doubled(child) for name, child in p.items()}

  multiway = doubled(params)
  expected = run(plain, params, embeddings_BTD=x)
  for lengths in ((V, T), (0, V + T)):
    h = run(experts, multiway, embeddings_BTD=x, lengths=lengths)
    np.testing.assert_allclose(h, expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Each modality
# ---------------------------------------------------------------------------------------------


def blocks(*, text_sees_image=False, image_sees_text=False, causal=False):
  """A mask over class token, patches and text."""
  allowed = np.zeros((V + T, V + T), int)
  allowed[:V, :V], allowed[:V, V:], allowed[V:, :V] = 1, image_sees_text, text_sees_image
  allowed[V:, V:] = np.tri(T) if causal else 1
  return allowed


def test_a_pair_that_does_not_see_each_other_is_its_parts_alone():
  """The image alone, the text alone, and both behind a block-diagonal mask; float32."""
  model, params = model_and_params()
  pair = run(model, params, *PAIR, visible_BTT=blocks()[None], mask_BT=MASK)
  image = run(model, params, IMAGES)
  text = run(model, params, None, TOKENS, mask_BT=MASK)
  assert (image.shape, text.shape) == ((3, V, WIDTH), (3, T, WIDTH))
  np.testing.assert_allclose(pair[:, :V], image, rtol=0, atol=1e-5)
  np.testing.assert_allclose(pair[:, V:][MASK == 1], text[MASK == 1], rtol=0, atol=1e-5)
  joint = run(model, params, *PAIR, mask_BT=MASK)
  assert np.abs(joint[:, :V] - image).max() > 0.01
  assert np.abs(joint[:, V:] - text)[MASK == 1].max() > 0.01


def test_captioning_mask():
  """A text that sees the image and what lies behind; the image sees itself: as alone."""
  model, params = model_and_params()
  mask = blocks(text_sees_image=True, causal=True)
  changed = TOKENS.copy()
  changed[:, 3] = (changed[:, 3] + 1) % VOCAB
  call = common.compiled(
    lambda images, tokens: model.apply({"params": params}, images, tokens, visible_BTT=mask[None])
  )
  h, later, other = call(*PAIR), call(IMAGES, changed), call(IMAGES[::-1], TOKENS)
  np.testing.assert_allclose(h[:, :V], run(model, params, IMAGES), rtol=0, atol=1e-5)  # float32
  np.testing.assert_array_equal(h[:, : V + 3], later[:, : V + 3])
  assert (np.abs(h - later)[:, V + 3 :].max((0, 2)) > 1e-3).all()
  assert (np.abs(h - other)[:, V:].max((0, 2)) > 1e-3).all()


def test_an_expert_touches_its_modality_alone():
  """In a pair whose modalities do not see each other, gradients to the other expert are zero."""
  model, params = model_and_params()

  def loss(params, part):
    h = model.apply({"params": params}, *PAIR, visible_BTT=blocks()[None])
    return jnp.sum(jnp.where(part, jnp.sin(h), 0))

  backward = common.compiled(jax.grad(loss))
  for name, part in (("vision", np.arange(V + T) < V), ("text", np.arange(V + T) >= V)):
    gradient = backward(params, part.reshape(1, -1, 1))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
      expert = {key.key for key in path} & {"vision", "text"}
      if expert:
        # A key's bias moves all scores of a query alike: its gradient is rounding.
        is_key_bias = path[-1].key == "bias" and path[-3].key == "key"
        assert np.any(leaf) == (expert == {name}) or is_key_bias, path
    assert np.any(gradient["text_embedding"]["embedding"]) == (name == "text")
    assert np.any(gradient["patch_embedding"]["class_token"]) == (name == "vision")


def test_every_expert_is_drawn_by_itself():
  """Once, from a pair: no two kernels of a projection are alike, and all are the record's draws."""
  model = beit3(name="magneto_torchscale")
  params = jax.jit(model.init)(jax.random.key(0), *PAIR)["params"]
  block = params["encoder"]["stack"]["segment_0"]["block_0"]
  for layer, names in (("self_attention", ("query", "key", "value", "out")), ("ffn", ("wi", "wo"))):
    for name in names:
      first, second = (block[layer][name][expert]["kernel"] for expert in ("vision", "text"))
      # 512 numbers and more: a deviation is off by 3 %, a correlation by 0.04.
      assert first.std() == pytest.approx(float(second.std()), rel=0.2)
      assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.25
  # torchscale's tables: a deviation of 112 numbers and more is off by 7 %.
  for name, std in (
    ("text_embedding", WIDTH**-0.5),
    ("position_embeddings_vision", 1.0),
    ("position_embeddings_text", 1.0),
  ):
    assert float(params[name]["embedding"].std()) == pytest.approx(std, rel=0.3)
  bound = 12**-0.5
  assert 0.8 * bound < np.abs(params["patch_embedding"]["projection"]["kernel"]).max() <= bound
  for name in ("out", "mid_norm", "query"):
    assert set(block["self_attention"][name]) == {"vision", "text"}
  for place in (block["ffn"]["mid_norm"], block["ffn_residual"]["in_norm"]):
    assert set(place) == {"vision", "text"}
  assert set(params["encoder"]["stack"]["final_norm"]) == {"vision", "text"}


# ---------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, side", (({}, "right"), ({}, "left"), (RELATIVE, "right")))
def test_hugging_faces_attention_mask_with_padding_on_either_side(options, side):
  """Of the text, behind an image: the image and the tokens come out as without the padding.

  A relative bias is one of places, and padding between image and text moves the text.
  """
  model = beit3(options)
  params = reference.random_params(model, *PAIR)
  shift = 0 if side == "right" else TOKENS.shape[1] - 3
  tokens, mask = np.roll(TOKENS[:1], shift, axis=1), np.roll(MASK[:1], shift, axis=1)
  h = run(model, params, IMAGES[:1], tokens, mask_BT=mask)[0]
  h = np.concatenate([h[:V], h[V + shift : V + shift + 3]])
  alone = run(model, params, IMAGES[:1], TOKENS[:1, :3])
  np.testing.assert_allclose(h, alone[0], rtol=0, atol=1e-5)  # float32


def test_padding_reaches_no_token_and_a_text_of_it_is_finite():
  model, params = model_and_params()

  def loss(params, tokens, mask):
    h = model.apply({"params": params}, IMAGES, tokens, mask_BT=mask)
    real = jnp.concatenate([jnp.ones((3, V), int), mask], axis=1)
    return jnp.sum(jnp.sin(h) * real[..., None]), h

  backward = common.compiled(jax.grad(loss, has_aux=True))
  # The token 16 stands in padding only.
  tokens = np.where(MASK == 0, VOCAB - 1, TOKENS % (VOCAB - 1))
  gradient, h = backward(params, tokens, MASK)
  _, other = backward(params, np.where(MASK == 0, 3, tokens), MASK)
  real = np.concatenate([np.ones((3, V), int), MASK], axis=1) == 1
  np.testing.assert_array_equal(h[real], other[real])
  assert not gradient["text_embedding"]["embedding"][VOCAB - 1].any()
  results = backward(params, tokens, MASK * [[0], [1], [1]])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


def test_masked_patches_are_not_seen():
  """They enter as the mask token: their pixels change nothing, the token does."""
  model, params = model_and_params()
  call = common.compiled(
    lambda params, images: model.apply({"params": params}, images, TOKENS, masked_BP=MASKED)
  )
  hidden = np.kron(MASKED.reshape(3, 2, 3), np.ones((2, 2), bool))[..., None]
  h = call(params, IMAGES)
  np.testing.assert_array_equal(h, call(params, np.where(hidden, IMAGES + 1, IMAGES)))
  patches = params["patch_embedding"]
  token = params | {"patch_embedding": patches | {"mask_token": -patches["mask_token"]}}
  moved = np.abs(call(token, IMAGES) - h).max((1, 2)) > 0.01
  np.testing.assert_array_equal(moved, MASKED.any(1))


def test_hidden_states_and_parts_are_those_of_the_encoder():
  model, params = model_and_params()
  h, hidden = run(model, params, *PAIR, return_hidden_states=True)
  assert hidden.shape == (3, 3, V + T, WIDTH)
  norms = params["encoder"]["stack"]["final_norm"]
  expected = reference.layer_norm(norms["text"], hidden[-1, :, V:])
  np.testing.assert_allclose(h[:, V:], expected, rtol=0, atol=1e-5)  # float32
  parts = model.apply({"params": params}, *PAIR, method="embed")
  assert {name: part.shape for name, part in parts.items()} == {
    "vision": (3, V, WIDTH),
    "text": (3, T, WIDTH),
  }


def test_bfloat16_model_keeps_float32_parameters():
  model = beit3({"dtype": jnp.bfloat16})
  variables = jax.eval_shape(model.init, jax.random.key(0), *PAIR)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
  assert jax.eval_shape(model.apply, variables, *PAIR).dtype == jnp.bfloat16


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("options", "inputs", "message"),
  (
    ({}, (), "give images, tokens, or both"),
    ({}, (IMAGES, None, {"mask_BT": MASK}), "mask_BT is of a text, and there is none"),
    ({}, (None, TOKENS, {"masked_BP": MASKED}), "masked_BP is of an image, and there is none"),
    ({}, (IMAGES,), "initialise BEiT3 with an image and a text"),
    ({}, (None, TOKENS), "initialise BEiT3 with an image and a text"),
    ({"encoder": {"experts": ("text", "vision")}}, PAIR, r"experts=\(\"vision\", \"text\"\)"),
    ({"encoder": {"experts": ()}}, PAIR, "BEiT3 needs an encoder with experts="),
    ({"encoder": {"positions": "learned"}}, PAIR, "and without absolute positions"),
    ({"encoder": {"positions": ("rotary", "sinusoidal")}}, PAIR, "without absolute positions"),
    ({"max_text_length": T - 1}, PAIR, "5 positions do not fit the table of text"),
    ({"num_patches": V - 2}, PAIR, "7 positions do not fit the table of vision"),
    ({"position_offset": 2, "max_text_length": T - 1}, PAIR, "5 positions do not fit"),
  ),
)
def test_wrong_arguments_raise(options, inputs, message):
  *inputs, keywords = inputs if inputs and isinstance(inputs[-1], dict) else (*inputs, {})
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: beit3(**options).init(jax.random.key(0), *inputs, **keywords))


@pytest.mark.parametrize("positions", ("none", "xpos"))
def test_positions_of_the_text_can_be_given(positions):
  """Those it has by default, and others; also where the encoder rotates."""
  model = beit3({"positions": positions})
  params = reference.random_params(model, *PAIR)
  h = run(model, params, *PAIR)
  given = lambda places: run(model, params, *PAIR, positions_BT=places[None])
  np.testing.assert_array_equal(given(np.arange(T)), h)
  assert np.abs(given(np.arange(T)[::-1]) - h).max() > 0.01


def test_a_calls_recipe_scales_the_text():
  model, params = model_and_params()
  recipe = model.encoder.recipe
  scaled = dataclasses.replace(recipe, embedding=dataclasses.replace(recipe.embedding, scale=3.0))
  own = model.clone(encoder=model.encoder.clone(recipe=scaled))
  expected = run(own, params, *PAIR)
  np.testing.assert_allclose(run(model, params, *PAIR, recipe=scaled), expected, rtol=0, atol=1e-5)
  assert np.abs(expected - run(model, params, *PAIR)).max() > 0.01
