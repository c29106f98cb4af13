"""BEiT-3's two forms and its heads: which expert reads what, masks, formulae, states, errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.models import (
  AnsweringBEiT3,
  BEiT3,
  CaptioningBEiT3,
  Encoder,
  Frozen,
  MaskedBEiT3,
  ReasoningBEiT3,
  RetrievalBEiT3,
  caption_mask,
)
from magneto_jax.theory import records
from tests import reference
from tests.models import common
from tests.models.common import SIZES, VOCAB, WIDTH, compiled, run

P, T, MASK_ID = 2, 4, 3
RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((2, 2, 4, 3)).astype(np.float32)
# Each token once, so that a table's gradient tells of which place it is.
TOKENS = RNG.permutation(VOCAB)[: 2 * T].reshape(2, T).astype(np.int32)
PAIR = (IMAGES, TOKENS)
RELEASED, PAPER = {}, {"shared_attention": True, "fusion_layers": 1}
FORMS = {"released": RELEASED, "paper": PAPER}
# tests/models/test_beit3.py has the released form's masks and experts.
BOTH = common.main_and_slow(FORMS, ("paper",))


def beit3(form=RELEASED, name="magneto", *, length=T, dtype=jnp.float32, **encoder) -> BEiT3:
  recipe = common.recipe(name).encoder
  recipe = records.cut(recipe, recipe.num_layers - form.get("fusion_layers", 0))
  return BEiT3(
    encoder=Encoder(
      recipe=recipe,
      experts=("vision", "text"),
      **SIZES | {"positions": "none", "dtype": dtype} | form | encoder,
    ),
    vocab_size=VOCAB,
    num_patches=P,
    patch_size=2,
    max_text_length=length,
  )


@functools.cache
def masked(form):
  model = MaskedBEiT3(encoder=beit3(FORMS[form]), image_vocab_size=5)
  return model, reference.random_params(model, *PAIR)


def nats(logits, targets):
  """-log p of targets, by hand."""
  logits = np.asarray(logits, np.float64)
  own = np.take_along_axis(logits, np.asarray(targets)[..., None], axis=-1)[..., 0]
  return np.log(np.exp(logits).sum(-1)) - own


# ---------------------------------------------------------------------------------------------
# Experts
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", BOTH)
def test_an_expert_that_nothing_passes_has_a_gradient_of_exactly_zero(form):
  """Of images alone, of texts alone, and of pairs, through the heads of masked data modelling."""
  model, params = masked(form)

  def loss(params, images, tokens):
    parts = model.apply({"params": params}, images, tokens)
    return sum(jnp.sum(jnp.sin(part)) for part in parts if part is not None)

  of_image = {"vision", "position_embeddings_vision", "patch_embedding", "output_embedding"}
  of_text = {"text", "position_embeddings_text", "text_embedding"}
  calls = {
    "image": ((IMAGES, None), of_text | {"fusion"}),
    "text": ((None, TOKENS), of_image | {"fusion", "head_bias"}),
    "pair": (PAIR, set()),
  }
  for name, (inputs, without) in calls.items():
    gradient = compiled(jax.grad(loss))(params, *inputs)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
      keys = {key.key for key in path}
      # All tokens of a pair pass the fusion layers' own expert.
      is_idle = bool(keys & without)
      if name == "pair" and form == "paper" and "segment_1" in keys:
        is_idle = bool(keys & {"vision", "text"})
      # A key's bias moves all scores of a query alike, and no patch is masked.
      if "mask_token" in keys or ("key" in keys and "bias" in keys):
        continue
      assert np.any(leaf) != is_idle, (name, path)


def test_the_papers_form_shares_attention_and_has_one_expert_more_above():
  _, params = masked("paper")
  stack = params["encoder"]["encoder"]["stack"]
  for segment, experts in (("segment_0", set()), ("segment_1", {"fusion"})):
    block = stack[segment]["block_0"]
    assert set(block["self_attention"]["query"]) == {"kernel", "bias"}
    assert set(block["self_attention"]["mid_norm"]) == {"scale", "bias"}
    assert set(block["self_attention_residual"]["in_norm"]) == {"scale", "bias"}
    for place in (block["ffn"]["wi"], block["ffn"]["mid_norm"], block["ffn_residual"]["in_norm"]):
      assert set(place) == {"vision", "text"} | experts


@pytest.mark.slow
def test_the_papers_form_with_equal_experts_is_a_plain_encoder():
  """Of the same embeddings, alone and as a pair; with a norm behind them (Peri-LN); float32."""
  make = functools.partial(Encoder, positions="none", **SIZES)
  stack = common.recipe("peri_ln").encoder
  plain = make(recipe=stack)
  form = make(recipe=records.cut(stack, 1), experts=("vision", "text"), **PAPER)
  x = RNG.standard_normal((2, 7, WIDTH)).astype(np.float32)
  params = reference.random_params(plain, embeddings_BTD=x)
  abstract = jax.eval_shape(
    lambda: form.init(jax.random.key(0), embeddings_BTD=x, lengths=(3, 4))["params"]
  )

  def copied(path, leaf):
    """The plain encoder's array, or its layer."""
    keys = [key.key for key in path if key.key not in ("vision", "text", "fusion")]
    layer = next((k for k in keys if k.startswith("segment_")), None)
    found = functools.reduce(
      lambda tree, key: tree[key], [k if k != "segment_1" else "segment_0" for k in keys], params
    )
    return found if layer is None else found[[int(layer[-1])]].reshape(leaf.shape)

  multiway = jax.tree_util.tree_map_with_path(copied, abstract)
  expected = run(plain, params, embeddings_BTD=x)
  for lengths in ((3, 4), (0, 7)):
    h = run(form, multiway, embeddings_BTD=x, lengths=lengths)
    np.testing.assert_allclose(h, expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------


def test_24_of_36_pairs_of_places_are_open_to_a_caption():
  mask = caption_mask(3, 3)
  assert mask.shape == (1, 6, 6) and mask.sum() == 24
  assert mask[0, :3, :3].all() and not mask[0, :3, 3:].any() and mask[0, 3:, :3].all()
  np.testing.assert_array_equal(mask[0, 3:, 3:], np.tri(3))


@pytest.mark.parametrize("form", BOTH)
def test_a_caption_sees_its_image_and_what_lies_before_and_its_image_no_text(form):
  """By the gradient of every place with respect to every token's row, and to the pixels."""
  model = CaptioningBEiT3(encoder=beit3(FORMS[form]), mask_id=MASK_ID)
  params = reference.random_params(model, *PAIR)

  def places(table_VD, images):
    encoder = params["encoder"]
    encoder = {**encoder, "text_embedding": {"embedding": table_VD}}
    h = model.encoder.apply(
      {"params": encoder}, images, TOKENS[:1], visible_BTT=caption_mask(1 + P, T)
    )
    return jnp.sum(jnp.sin(h[0]), axis=-1)

  table = params["encoder"]["text_embedding"]["embedding"]
  of_table, of_pixels = compiled(jax.jacrev(places, (0, 1)))(table, IMAGES[:1])
  read = np.any(of_table, axis=-1)[:, TOKENS[0]]
  np.testing.assert_array_equal(read, caption_mask(1 + P, T)[0, :, 1 + P :])
  assert np.any(of_pixels, axis=(1, 2, 3, 4)).all()


def test_what_is_masked_reaches_nothing():
  """The pixels of a masked patch have no gradient, all others have one; nor has padding."""
  model, params = masked("paper")
  masked_BP = np.array([[True, False], [False, True]])
  mask_BT = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)

  def loss(images, table):
    encoder = {**params["encoder"], "text_embedding": {"embedding": table}}
    h = model.encoder.apply(
      {"params": encoder}, images, TOKENS, masked_BP=masked_BP, mask_BT=mask_BT
    )
    return jnp.sum(jnp.where(np.pad(mask_BT, ((0, 0), (1 + P, 0)), constant_values=1)[..., None],
                             jnp.sin(h), 0))  # fmt: skip

  table = params["encoder"]["text_embedding"]["embedding"]
  of_pixels, of_table = compiled(jax.grad(loss, (0, 1)))(IMAGES, table)
  hidden = masked_BP.repeat(2, axis=1)[:, None, :, None]
  np.testing.assert_array_equal(of_pixels != 0, np.broadcast_to(~hidden, IMAGES.shape))
  np.testing.assert_array_equal(np.any(of_table, axis=-1)[TOKENS], mask_BT)


# ---------------------------------------------------------------------------------------------
# Masked data modelling
# ---------------------------------------------------------------------------------------------


def test_each_part_is_scored_by_itself():
  """Logits are those of images and texts; nats are theirs, at places too; float32."""
  model, params = masked("released")
  call = compiled(lambda *args, **kwargs: model.apply({"params": params}, *args, **kwargs))
  logits = call(*PAIR)
  assert logits.image.shape == (2, P, 5) and logits.text.shape == (2, T, VOCAB)
  targets_BP, targets_BT = RNG.integers(0, 5, (2, P)), RNG.integers(0, VOCAB, (2, T))
  both = call(*PAIR, targets_BP=targets_BP, targets_BT=targets_BT)
  np.testing.assert_allclose(both.image, nats(logits.image, targets_BP), rtol=0, atol=1e-5)
  np.testing.assert_allclose(both.text, nats(logits.text, targets_BT), rtol=0, atol=1e-5)
  at = {"image_places_BK": np.array([[1], [0]]), "text_places_BK": np.array([[3, 1], [0, 3]])}
  some = call(*PAIR, targets_BP=targets_BP, targets_BT=targets_BT, **at)
  for name in ("image", "text"):
    expected = np.take_along_axis(getattr(both, name), at[f"{name}_places_BK"], axis=1)
    np.testing.assert_allclose(getattr(some, name), expected, rtol=0, atol=1e-5)
  alone = call(IMAGES), call(None, TOKENS)
  assert alone[0].text is None and alone[1].image is None
  assert alone[0].image.shape == (2, P, 5) and alone[1].text.shape == (2, T, VOCAB)
  assert np.abs(alone[0].image - logits.image).max() > 1e-3
  assert np.abs(alone[1].text - logits.text).max() > 1e-3


class Brightness:
  """A tokenizer whose token of a patch is whether it is bright; it has no parameters."""

  def init(self, key, images):
    return {}

  def apply(self, variables, images_BHWC, *, method):
    assert method == "encode"
    rows = images_BHWC.reshape(images_BHWC.shape[0], 1, 2, P, 2, 3)
    return (rows.mean((2, 4, 5)) > 0).astype(jnp.int32).reshape(-1, P)


def test_a_held_tokenizer_gives_the_targets_of_whole_images():
  """Also of the patches that are masked; nothing of it is trained."""
  own, params = masked("released")
  model = own.clone(tokenizer=Frozen(Brightness()))
  variables = {"params": params, "state": {"image_tokenizer": {}}}
  masked_BP = np.ones((2, P), bool)
  of = lambda model, variables, targets: compiled(
    lambda: model.apply(variables, *PAIR, masked_BP=masked_BP, targets_BP=targets)
  )()
  found = of(model, variables, True)
  tokens = model.apply(variables, IMAGES, method="tokens")
  expected = of(own, {"params": params}, tokens)
  np.testing.assert_array_equal(found.image, expected.image)
  assert len(np.unique(tokens)) == 2
  shapes = jax.eval_shape(model.init, jax.random.key(0), *PAIR)
  assert set(shapes) == {"params", "state"}


# ---------------------------------------------------------------------------------------------
# Heads. What they compute is also held against NumPy in tests/convert/test_beit3.py.
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_features_are_of_images_and_texts_alone_and_of_length_one():
  """The class token, or the first of a text, through a matrix; float32."""
  model = RetrievalBEiT3(encoder=beit3(PAPER), features=3)
  params = reference.random_params(model, *PAIR)
  params["logit_scale"] = np.float32(math.log(1 / 0.07))
  mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
  call = compiled(lambda *args, **kw: model.apply({"params": params}, *args, **kw))
  both = call(*PAIR, mask_BT=mask)
  images, texts = call(IMAGES), call(None, TOKENS, mask_BT=mask)
  assert images.texts_BE is None and texts.images_BE is None
  np.testing.assert_allclose(both.images_BE, images.images_BE, rtol=0, atol=1e-6)
  np.testing.assert_allclose(both.texts_BE, texts.texts_BE, rtol=0, atol=1e-6)
  assert both.scale == pytest.approx(1 / 0.07, rel=1e-6)
  inner = functools.partial(compiled(model.encoder.apply), {"params": params["encoder"]})
  for found, head, h in (
    (both.images_BE, "image_head", inner(IMAGES)),
    (both.texts_BE, "text_head", inner(None, TOKENS, mask_BT=mask)),
  ):
    expected = np.asarray(h[:, 0], np.float64) @ params[head]["kernel"]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_scale_begins_at_clips_and_ends_at_the_largest():
  """Below it the slope of exp(s) is exp(s); beyond, where nothing bounds s, there is none."""
  model = RetrievalBEiT3(encoder=beit3(), scale_max=100.0)
  # All else is left out of the program.
  drawn = compiled(lambda: model.init(jax.random.key(0), *PAIR)["params"]["logit_scale"])()
  assert float(drawn) == pytest.approx(2.65926, abs=1e-5)
  params = reference.random_params(model, *PAIR)
  scale = lambda s: model.apply({"params": params | {"logit_scale": s}}, None, TOKENS).scale
  found = compiled(jax.value_and_grad(scale))
  value, slope = found(jnp.float32(5.0))
  assert float(value) == pytest.approx(100.0) and float(slope) == 0.0
  value, slope = found(jnp.float32(4.0))
  assert float(value) == pytest.approx(math.exp(4)) and float(slope) == pytest.approx(math.exp(4))


def mlp(params, x):
  """A head's two layers, in float64."""
  x = reference.layer_norm(params["head_norm"], reference.dense(params["head_dense"], x))
  return reference.dense(params["head_out"], reference.gelu(x))


@pytest.mark.slow
def test_an_answer_is_its_formula():
  """The class token through the pooler and two layers, and what soft answers cost; float32."""
  model = AnsweringBEiT3(encoder=beit3(), answers=3)
  params = reference.random_params(model, *PAIR)
  targets = np.array([[1, 0.3, 0], [0, 0, 0.6]], np.float32)
  call = compiled(lambda **options: model.apply({"params": params}, *PAIR, **options))
  h = run(model.encoder, params["encoder"], *PAIR).astype(np.float64)[:, 0]
  pooled = reference.dense(params["pooler_dense"], reference.layer_norm(params["pooler_norm"], h))
  expected = mlp(params, np.tanh(pooled))
  assert params["head_dense"]["kernel"].shape == (WIDTH, 2 * WIDTH)
  np.testing.assert_allclose(call(), expected, rtol=0, atol=1e-5)
  p = 1 / (1 + np.exp(-expected))
  costs = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum(1)
  np.testing.assert_allclose(call(targets=targets), costs, rtol=1e-5)


@pytest.mark.slow
def test_a_statement_is_judged_by_two_pairs():
  """Each of the images with the text: class token and bos of both; float32."""
  model = ReasoningBEiT3(encoder=beit3(PAPER))
  images = np.stack([IMAGES, IMAGES[::-1] + 1], axis=1)
  mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
  params = reference.random_params(model, images, TOKENS)
  call = compiled(lambda **options: model.apply(
    {"params": params}, images, TOKENS, mask_BT=mask, **options))  # fmt: skip
  inner = compiled(lambda images: model.encoder.apply(
    {"params": params["encoder"]}, images, TOKENS, mask_BT=mask))  # fmt: skip
  pairs = [np.asarray(inner(images[:, i]), np.float64)[:, [0, 1 + P]] for i in range(2)]
  h = np.concatenate([pair.reshape(2, -1) for pair in pairs], axis=1)
  expected = mlp(params, reference.layer_norm(params["pooler_norm"], h))
  assert h.shape == (2, 4 * WIDTH) and expected.shape == (2, 2)
  np.testing.assert_allclose(call(), expected, rtol=0, atol=1e-5)
  labels = np.array([1, 0])
  np.testing.assert_allclose(call(targets=labels), nats(expected, labels), rtol=1e-4)


@pytest.mark.slow
def test_a_caption_is_scored_where_the_mask_stands():
  """Logits, nats, at places, and smoothed in training alone; float32."""
  model = CaptioningBEiT3(encoder=beit3(), mask_id=MASK_ID, label_smoothing=0.1)
  params = reference.random_params(model, *PAIR)
  apply = functools.partial(model.apply, {"params": params}, *PAIR)
  call = compiled(apply, static_argnames="deterministic")
  logits, targets = call(), RNG.integers(0, VOCAB, (2, T))
  own = nats(logits, targets)
  np.testing.assert_allclose(call(targets_BT=targets), own, rtol=1e-5)
  places = np.array([[2], [3]])
  found = call(targets_BT=targets, places_BK=places)
  np.testing.assert_allclose(found, np.take_along_axis(own, places, axis=1), rtol=1e-5)
  every = np.stack([nats(logits, np.full((2, T), v)) for v in range(VOCAB)])
  smooth = 0.9 * own + 0.1 * (every.sum(0) - own) / (VOCAB - 1)
  trained = call(targets_BT=targets, deterministic=False)
  np.testing.assert_allclose(trained, smooth, rtol=1e-5)


# ---------------------------------------------------------------------------------------------
# States
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "form, encoder",
  [
    ("paper", {}),
    pytest.param("released", {"relative_buckets": 8}, marks=pytest.mark.slow),
    pytest.param("released", {"positions": "xpos"}, marks=pytest.mark.slow),
  ],
)
def test_a_state_gives_what_the_whole_caption_would(form, encoder):
  """Step by step, with beginnings of two lengths: to 1e-5 of all anew with a mask behind; what
  does not fit is NaN."""
  model = CaptioningBEiT3(encoder=beit3(FORMS[form], length=6, **encoder), mask_id=MASK_ID)
  params = {"params": reference.random_params(model, *PAIR)}
  anew = compiled(lambda tokens, image: model.apply(params, image, tokens)[:, -1])
  see = compiled(lambda images: model.apply(params, images, T, method="see"))
  step = compiled(
    lambda tokens, state, mask=None: model.apply(
      params, tokens, state=state, mask_BT=mask, method="decode"
    )
  )
  # The first row's beginning is a token shorter, and padded in front where rows count alone.
  skips = (0, 0) if "relative_buckets" in encoder else (1, 0)
  mask = np.arange(2)[None] >= np.array(skips)[:, None]
  logits, state = step(TOKENS[:, :2], see(IMAGES), mask)
  for length in range(2, T + 1):
    assert logits.shape == (2, 1, VOCAB) and int(state.length) == length
    for row, skip in enumerate(skips):
      tokens = np.append(TOKENS[row, skip:length], MASK_ID)[None]
      expected = anew(tokens, IMAGES[[row]])[0]
      np.testing.assert_allclose(logits[row, 0], expected, rtol=0, atol=1e-5)
    token = TOKENS[:, length % T : length % T + 1]
    logits, state = step(token, state)
  assert np.isnan(logits).all()


def test_a_models_longest_caption_leaves_room_for_the_mask():
  model = CaptioningBEiT3(encoder=beit3(), mask_id=MASK_ID)
  assert (model.longest, model.vocab_size) == (T - 1, VOCAB)


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------

WRONG = {
  "whole segments": (
    lambda: beit3().clone(encoder=beit3().encoder.clone(fusion_layers=1)),
    PAIR,
    {},
    r"whole segments of the recipe: give records.cut\(recipe, 1\)",
  ),
  "no experts": (
    lambda: Encoder(recipe=common.recipe().encoder, shared_attention=True, **SIZES),
    (),
    {"embeddings_BTD": np.zeros((1, 2, WIDTH), np.float32)},
    "are of experts, and there are none",
  ),
  "no image's targets": (
    lambda: masked("released")[0],
    (None, TOKENS),
    {"targets_BP": np.zeros((2, P), int)},
    "targets_BP is of an image, and there is none",
  ),
  "no text's targets": (
    lambda: masked("released")[0],
    (IMAGES,),
    {"targets_BT": TOKENS},
    "targets_BT is of a text, and there is none",
  ),
  "no tokenizer": (
    lambda: masked("released")[0],
    PAIR,
    {"targets_BP": True},
    "is what the model's tokenizer gives, and it has none",
  ),
  "nothing": (lambda: RetrievalBEiT3(encoder=beit3()), (), {}, "give images, tokens, or both"),
  "one image": (lambda: ReasoningBEiT3(encoder=beit3()), PAIR, {}, r"are not \[B, 2, H, W, C\]"),
  "no answers": (lambda: AnsweringBEiT3(encoder=beit3(), answers=0), PAIR, {}, "at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_raise(name):
  make, args, kwargs, message = WRONG[name]
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: make().init(jax.random.key(0), *args, **kwargs))


def test_a_state_has_its_image_and_room():
  model = CaptioningBEiT3(encoder=beit3(), mask_id=MASK_ID)
  params = reference.random_params(model, *PAIR)
  see = lambda: model.apply({"params": params}, IMAGES, 2, method="see")
  with pytest.raises(ValueError, match="3 tokens and a mask do not fit a state of 3"):
    jax.eval_shape(
      lambda: model.apply({"params": params}, TOKENS[:, :3], state=see(), method="decode")
    )
  with pytest.raises(ValueError, match="a state has its image already"):
    jax.eval_shape(lambda: model.encoder.apply({"params": params["encoder"]}, *PAIR, state=see()))
