"""The encoder and the masked language model: formulae, padding, masks, hidden states, errors."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.layers import positions as position_layers
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.language import MaskedLM
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import Architecture, Segment
from tests import reference
from tests.models import common
from tests.models.common import KINDS, LENGTH, PAPERS, RELATIVE, VOCAB, WIDTH, in_float64, run

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (3, LENGTH))
MASK = np.array([[1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1], [1] * LENGTH])


def record(name="magneto", layers=None):
  return common.recipe(name, layers=layers).encoder


def encoder(recipe=None, **options) -> Encoder:
  return Encoder(recipe=recipe or record(), **{"vocab_size": VOCAB} | common.SIZES | options)


def slow(*case):
  """A case of a table that `pytest -m slow` runs."""
  return pytest.param(*case, marks=pytest.mark.slow)


# ---------------------------------------------------------------------------------------------
# Formulae
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", common.main_and_slow(PAPERS, ("magneto", "deepnet", "peri_ln")))
def test_encoder_is_its_papers_in_float64(name):
  """1e-11, at the tokens: padding enters as zeros, behind the embedding's norm, unseen by all."""
  model = encoder(record(name), positions="learned", dtype=jnp.float64)
  # Padding on the right, where positions do not count it either way.
  mask = np.array([MASK[0], MASK[0], MASK[2]])
  (h, hidden), params = in_float64(model, TOKENS, mask_BT=mask, return_hidden_states=True)
  layer, _, final_norm = PAPERS[name]
  expected = reference.encoder(
    params,
    TOKENS,
    [(layer,)],
    final_norm=final_norm,
    mask=mask.astype(bool),
    **common.embedding_of(name),
  )
  assert h.dtype == np.float64
  np.testing.assert_allclose(h[mask == 1], expected[mask == 1], rtol=0, atol=1e-11)
  assert not hidden[0][mask == 0].any()


def test_deepscalelm_is_drawn_as_its_record_says():
  """Kernels of 2^14 numbers and more, whose deviation is off by 0.6 %; rows of 2^14, likewise."""
  sizes = {"width": 128, "ffn_width": 512}
  architecture = Architecture(
    "encoder", 3, **sizes, heads=4, dropout=0.1, token_correlation=0.2, embedding_tables=2
  )
  stack = RECIPES["deepscalelm"](architecture).encoder
  sizes |= {"num_heads": 4, "vocab_size": 256, "max_length": 128, "positions": "learned"}
  model = Encoder(recipe=stack, **sizes)
  params = common.compiled(model.init)(jax.random.key(0), TOKENS)["params"]
  block = params["stack"]["segment_0"]["block_0"]
  for number, layer in enumerate(stack.layers):
    attention, ffn = layer.self_attention, layer.ffn
    for sublayer, projection, init, fan_in in (
      ("self_attention", "query", attention.qk, 128),
      ("self_attention", "key", attention.qk, 128),
      ("self_attention", "value", attention.v, 128),
      ("self_attention", "out", attention.out, 128),
      ("ffn", "wi", ffn.wi, 128),
      ("ffn", "wo", ffn.wo, 512),
    ):
      kernel = block[sublayer][projection]["kernel"][number]
      assert kernel.std() == pytest.approx(init.std(fan_in, 1), rel=0.03)
  # sqrt((1 - p) / r_0) of the first layer's v and out, r_0 = 0.2 (1 - p).
  first = np.std(block["self_attention"]["value"]["kernel"][0])
  assert 128 * first**2 == pytest.approx(0.2**-0.5, rel=0.06)
  tokens, positions = (params[f"{of}_embedding"]["embedding"] for of in ("token", "position"))
  assert stack.embedding.scale * tokens.std() == pytest.approx(math.sqrt(0.9 / 2), rel=0.03)
  assert positions.std() == pytest.approx(math.sqrt(0.9 / 2), rel=0.03)


@pytest.mark.parametrize("bidirectional", (None, False))
def test_relative_bias_is_t5s_in_float64(bidirectional):
  """One table for all layers, by brute force over pairs; with an attention mask too. 1e-11."""
  options = RELATIVE | {"relative_bidirectional": bidirectional}
  model = encoder(**options, dtype=jnp.float64)
  allowed = np.random.default_rng(1).random((LENGTH, LENGTH)) < 0.7
  allowed |= np.eye(LENGTH, dtype=bool)
  h, params = in_float64(model, TOKENS, visible_BTT=allowed[None])
  assert params["relative_bias"].shape == (8, common.HEADS)
  bias = reference.t5_bias(
    params["relative_bias"],
    LENGTH,
    LENGTH,
    bidirectional=bidirectional is None,
    max_distance=10,
  )
  x = math.sqrt(WIDTH) * params["token_embedding"]["embedding"][TOKENS]
  expected = reference.stack(
    params["stack"],
    x,
    [(reference.magneto,)],
    final_norm=reference.layer_norm,
    visible=allowed,
    bias=bias,
  )
  np.testing.assert_allclose(h, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("base", common.main_and_slow((512.0, 3.0), (3.0,)))
def test_xpos_encoder_is_torchscales_in_float64(base):
  """Which centres the positions of each call; 1e-11."""
  model = encoder(positions="xpos", xpos_scale_base=base, dtype=jnp.float64)
  h, params = in_float64(model, TOKENS)
  expected = reference.stack(
    params["stack"],
    math.sqrt(WIDTH) * params["token_embedding"]["embedding"][TOKENS],
    [(reference.magneto,)],
    final_norm=reference.layer_norm,
    visible=np.ones((LENGTH, LENGTH), bool),
    turn=functools.partial(reference.torchscale_xpos, base=base),
  )
  np.testing.assert_allclose(h, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
  ("head", "tied"),
  (("linear", True), ("dense", False), slow("linear", False), slow("dense", True)),
)
def test_masked_language_models_heads_are_their_formulae_in_float64(head, tied):
  """W h; or W LN(gelu(W_d h + b_d)) + b, as BERT's; W the table of tokens, if tied. 1e-11."""
  inner = encoder(positions="none", dtype=jnp.float64)
  logits, params = in_float64(MaskedLM(encoder=inner, head=head, tied=tied), TOKENS)
  with jax.enable_x64(True):
    h = run(inner, params["encoder"], TOKENS)
  expected_names = {"encoder"} | ({"output_embedding"} - {"output_embedding" if tied else ""})
  if head == "dense":
    h = reference.gelu(reference.dense(params["head_dense"], h))
    h = reference.layer_norm(params["head_norm"], h)
    expected_names |= {"head_dense", "head_norm", "head_bias"}
  assert set(params) == expected_names
  table = (
    params["encoder"]["token_embedding"]["embedding"]
    if tied
    else params["output_embedding"]["embedding"]
  )
  expected = h @ table.T + (params["head_bias"] if head == "dense" else 0)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-11)


def test_masked_language_model_hands_on_what_the_encoder_takes_and_returns():
  model = MaskedLM(encoder=encoder(dtype=jnp.bfloat16), head="linear")
  variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
  call = functools.partial(model.apply, mask_BT=MASK, return_hidden_states=True)
  logits, hidden = jax.eval_shape(call, variables, TOKENS)
  assert (logits.dtype, logits.shape) == (jnp.float32, (*TOKENS.shape, VOCAB))
  assert (hidden.dtype, hidden.shape) == (jnp.bfloat16, (3, *TOKENS.shape, WIDTH))


# ---------------------------------------------------------------------------------------------
# Padding
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", common.main_and_slow(KINDS, ("learned", "xpos", "relative")))
def test_hugging_faces_attention_mask_with_padding_on_either_side(kind):
  """1 is a token, 0 is padding: the tokens come out as from the sequence alone, float32."""
  model = encoder(**KINDS[kind])
  params = reference.random_params(model, TOKENS)
  tokens = np.where(MASK == 0, 0, TOKENS)
  tokens[0, :5] = tokens[1, 3:]
  h = run(model, params, tokens, mask_BT=MASK)
  alone = run(model, params, tokens[:1, :5])[0]
  np.testing.assert_allclose(h[0, :5], alone, rtol=0, atol=1e-5)
  np.testing.assert_allclose(h[1, 3:], alone, rtol=0, atol=1e-5)


def test_padding_reaches_no_token_and_a_row_of_it_is_finite():
  """Whatever it holds: to the bit, with a gradient of zero, and finite where all is padding."""
  model = encoder(positions="learned", relative_buckets=8, dropout_rate=0.0)
  params = reference.random_params(model, TOKENS)
  x = np.random.default_rng(1).standard_normal((*TOKENS.shape, WIDTH)).astype(np.float32)

  @common.compiled
  def forward_and_backward(params, x, mask):
    def loss(params, x):
      h = model.apply({"params": params}, embeddings_BTD=x, mask_BT=mask)
      return jnp.sum(jnp.sin(h) * mask[..., None]), h

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

  (_, to_x), h = forward_and_backward(params, x, MASK)
  changed = np.where(MASK[..., None] == 0, x + 5, x)
  _, h_changed = forward_and_backward(params, changed, MASK)
  np.testing.assert_array_equal(h[MASK == 1], h_changed[MASK == 1])
  assert not to_x[MASK == 0].any()
  assert (np.abs(to_x[MASK == 1]).max(-1) > 0).all()
  results = forward_and_backward(params, x, np.array([[0] * LENGTH, *MASK[:2]]))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


def test_segments_are_encoded_as_alone_and_segment_0_is_padding():
  """With positions from 0 in each; a mask, where one is given, says what is padding instead."""
  model = encoder(positions="learned", relative_buckets=8)
  params = reference.random_params(model, TOKENS)
  ids = np.array([[1, 1, 1, 2, 2, 2, 2, 2]] * 2 + [[0, 0, 0, 3, 3, 3, 3, 3]])
  positions = np.array([[0, 1, 2, 0, 1, 2, 3, 4]] * 2 + [[-1, -1, -1, 0, 1, 2, 3, 4]])
  h = run(model, params, TOKENS, segment_ids_BT=ids, positions_BT=positions)
  first, second = run(model, params, TOKENS[:, :3]), run(model, params, TOKENS[:, 3:])
  np.testing.assert_allclose(h[:2, :3], first[:2], rtol=0, atol=1e-5)  # float32
  np.testing.assert_allclose(h[:, 3:], second, rtol=0, atol=1e-5)
  every = np.ones_like(ids)
  masked = run(model, params, TOKENS, segment_ids_BT=ids, positions_BT=positions, mask_BT=every)
  np.testing.assert_allclose(masked[2, 3:], h[2, 3:], rtol=0, atol=1e-5)
  assert np.abs(masked[2, :3] - h[2, :3]).max() > 0.1


# ---------------------------------------------------------------------------------------------
# What a token sees
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", common.main_and_slow((None, (1, 0)), ((1, 0),)))
def test_every_token_sees_every_token(window):
  """And with a window those in two layers' reach of it: the gradient is 0 from all others."""
  model = encoder(record(layers=2), window=window)
  params = reference.random_params(model, TOKENS)
  x = np.random.default_rng(1).standard_normal((1, LENGTH, WIDTH)).astype(np.float32)
  weights = np.random.default_rng(2).standard_normal(WIDTH).astype(np.float32)
  scores = lambda x: model.apply({"params": params}, embeddings_BTD=x)[0] @ weights
  reached = np.any(np.asarray(common.compiled(jax.jacrev(scores))(x))[:, 0] != 0, axis=-1)
  distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
  expected = True if window is None else (distance >= 0) & (distance <= 2)
  np.testing.assert_array_equal(reached, np.broadcast_to(expected, reached.shape))


@pytest.mark.parametrize("kind", common.main_and_slow(KINDS, ("none", "relative", "rotary")))
def test_without_positions_the_order_of_tokens_does_not_matter(kind):
  """The encodings are permuted as the tokens are; with positions of any kind they are not."""
  model = encoder(**KINDS[kind])
  params = reference.random_params(model, TOKENS)
  order = np.random.default_rng(1).permutation(LENGTH)
  both = run(model, params, np.concatenate([TOKENS, TOKENS[:, order]]))
  difference = np.abs(both[3:] - both[:3, order]).max()
  assert (difference < 1e-5) == (kind == "none")  # float32
  assert difference < 1e-5 or difference > 0.01


def test_attention_mask_forbids_exactly_what_it_says():
  """[1, T, T] for all rows or [B, T, T], the query first; one layer, held against the reference."""
  model = encoder(record("pre_ln", layers=1), positions="none")
  params = reference.random_params(model, TOKENS)
  rng = np.random.default_rng(1)
  each = (rng.random((3, LENGTH, LENGTH)) < 0.5) | np.eye(LENGTH, dtype=bool)
  x = math.sqrt(WIDTH) * params["token_embedding"]["embedding"][TOKENS]
  for allowed, padding in ((each[:1], None), (each.astype(int), None), (each, MASK)):
    h = run(model, params, TOKENS, visible_BTT=allowed, mask_BT=padding)
    visible = allowed.astype(bool)[:, None]
    mask = np.ones_like(MASK) if padding is None else padding
    expected = reference.stack(
      params["stack"],
      x * mask[..., None],
      [(reference.pre_ln,)],
      final_norm=reference.layer_norm,
      visible=visible & (mask[:, None, None] == 1) | np.eye(LENGTH, dtype=bool),
    )
    np.testing.assert_allclose(h[mask == 1], expected[mask == 1], rtol=0, atol=1e-5)  # float32


def test_embeddings_are_taken_as_they_are():
  """Scaled by the caller; positions are added."""
  model = encoder()
  params = reference.random_params(model, TOKENS)
  x = math.sqrt(WIDTH) * params["token_embedding"]["embedding"][TOKENS]
  np.testing.assert_allclose(
    run(model, params, embeddings_BTD=x), run(model, params, TOKENS), rtol=0, atol=1e-5
  )
  without = {name: leaf for name, leaf in params.items() if name != "token_embedding"}
  shapes = jax.eval_shape(
    lambda: encoder(vocab_size=None).init(jax.random.key(0), embeddings_BTD=x)
  )
  assert jax.tree.structure(shapes["params"]) == jax.tree.structure(without)


# ---------------------------------------------------------------------------------------------
# Hidden states, dropout, numbers of a call
# ---------------------------------------------------------------------------------------------


def several():
  """A segment of one layer, then a pattern of two, twice: five layers."""
  first, second = (record(name).segments[0].pattern[0] for name in ("post_ln", "magneto"))
  segments = (Segment((first,), 1), Segment((second, first), 2))
  return dataclasses.replace(record("pre_ln"), segments=segments)


def test_hidden_states_are_the_stream_before_and_after_each_layer():
  """Each is the stack so far, without the final norm, whatever remat and unroll are; float32."""
  model = encoder(several())
  params = reference.random_params(model, TOKENS)
  h, hidden = run(model, params, TOKENS, mask_BT=MASK, return_hidden_states=True)
  np.testing.assert_allclose(
    h, reference.layer_norm(params["stack"]["final_norm"], hidden[-1]), rtol=0, atol=1e-5
  )
  model = model.clone(remat="dots", unroll=-1)
  changed = run(model, params, TOKENS, mask_BT=MASK, return_hidden_states=True)
  np.testing.assert_allclose(changed[1], hidden, rtol=0, atol=1e-5)
  visible = MASK[:, None, None, :] == 1
  layers = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1)]
  assert len(hidden) == len(layers) + 1
  table = params["token_embedding"]["embedding"]
  sines = position_layers.sinusoidal(np.maximum(np.cumsum(MASK, 1) - 1, 0), WIDTH)
  start = np.where(MASK[..., None], math.sqrt(WIDTH) * table[TOKENS] + sines, 0)
  np.testing.assert_allclose(hidden[0], start, rtol=0, atol=1e-5)
  for before, after, (segment, block, repeat) in zip(hidden, hidden[1:], layers, strict=False):
    p = params["stack"][f"segment_{segment}"][f"block_{block}"]
    p = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], p)
    layer = reference.magneto if (segment, block) == (1, 0) else reference.post_ln
    expected = layer(p, before, 5, visible=visible)
    np.testing.assert_allclose(after[MASK == 1], expected[MASK == 1], rtol=0, atol=1e-5)


def test_embedding_is_dropped_behind_its_norm():
  """Channels of the first hidden state are dropped or doubled, padding stays zero."""
  model = encoder(record("peri_ln"), dropout_rate=0.5)
  params = reference.random_params(model, TOKENS)
  call = functools.partial(run, model, params, TOKENS, mask_BT=MASK, return_hidden_states=True)
  plain = call()[1][0]
  jitted = common.compiled(
    lambda key: model.apply(
      {"params": params},
      TOKENS,
      mask_BT=MASK,
      return_hidden_states=True,
      deterministic=False,
      rngs={"dropout": key},
    )
  )
  dropped = np.asarray(jitted(jax.random.key(0))[1][0])
  kept = dropped != 0
  np.testing.assert_allclose(dropped[kept], 2 * plain[kept], rtol=1e-6)
  assert 0.4 < kept[MASK == 1].mean() < 0.6 and not kept[MASK == 0].any()


def test_numbers_of_a_call_reach_the_embedding_and_the_layers():
  """DeepNet's record run as Post-LN's is Post-LN; the scale of tokens is the call's as well."""
  post, deep = record("post_ln"), record("deepnet")
  params = reference.random_params(encoder(post), TOKENS)
  expected = run(encoder(post), params, TOKENS)
  np.testing.assert_allclose(
    run(encoder(deep), params, TOKENS, recipe=post), expected, rtol=0, atol=1e-5
  )  # float32
  half = dataclasses.replace(post, embedding=dataclasses.replace(post.embedding, scale=2.0))
  _, hidden = run(encoder(post, positions="none"), params, TOKENS, recipe=half, **STREAM)
  expected = 2 * params["token_embedding"]["embedding"][TOKENS]
  np.testing.assert_allclose(hidden[0], expected, rtol=1e-6)


STREAM = {"return_hidden_states": True}

# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------

EMBEDDINGS = np.zeros((3, LENGTH, WIDTH), np.float32)


@pytest.mark.parametrize(
  ("options", "inputs", "message"),
  (
    ({}, {}, "give tokens or embeddings, one of the two"),
    ({}, {"tokens_BT": TOKENS, "embeddings_BTD": EMBEDDINGS}, "give tokens or embeddings"),
    ({"vocab_size": None}, {"tokens_BT": TOKENS}, "this encoder has no vocabulary: give embed"),
    ({}, {"tokens_BT": TOKENS, "lengths": (8, 0)}, "lengths go with experts: one for each"),
    ({"experts": ("a", "b")}, {"tokens_BT": TOKENS}, "lengths go with experts"),
    (
      {"vocab_size": None},
      {"embeddings_BTD": EMBEDDINGS[..., :8]},
      r"are not \[B, T, D\] with D = ",
    ),
    ({}, {"tokens_BT": TOKENS, "mask_BT": MASK[:, :3]}, r"mask_BT must be of shape \[3, 8\], not"),
    (
      {},
      {"tokens_BT": TOKENS, "mask_BT": MASK * 1.0},
      "mask_BT must be of booleans, or of integers",
    ),
    ({}, {"tokens_BT": TOKENS, "visible_BTT": MASK}, r"visible_BTT must be of shape \[3, 8, 8\]"),
    (
      {"experts": ("a", "b")},
      {"tokens_BT": TOKENS, "lengths": (4, 3)},
      r"self.lengths=\(4, 3\) .* do not add up to 8 tokens",
    ),
    ({"positions": "learned", "max_length": 7}, {"tokens_BT": TOKENS}, "8 positions do not fit"),
    ({"positions": "alibi"}, {"tokens_BT": TOKENS}, "positions='alibi' must be one of learned"),
    ({"relative_buckets": 2}, {"tokens_BT": TOKENS}, "num_buckets=2 leaves no exact bucket"),
    ({}, {"tokens_BT": TOKENS, "recipe": record("pre_ln")}, "of another structure than the mod"),
  ),
)
def test_wrong_arguments_raise(options, inputs, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: encoder(**options).init(jax.random.key(0), **inputs))


def test_unknown_heads_of_masked_language_models_raise():
  model = MaskedLM(encoder=encoder(), head="pooled")
  with pytest.raises(ValueError, match="head='pooled' must be one of linear, dense"):
    jax.eval_shape(model.init, jax.random.key(0), TOKENS)


def test_a_decoders_record_with_cross_attention_raises():
  model = encoder(common.recipe(kind="encoder_decoder").decoder)
  with pytest.raises(ValueError, match="an encoder has no memory: this recipe has cross-attention"):
    jax.eval_shape(model.init, jax.random.key(0), TOKENS)
