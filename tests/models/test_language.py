"""The causal language model: what it sees, how it decodes, its dropout and its precision."""

import dataclasses
import functools
import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.layers import positions as position_layers
from magneto_jax.models.language import CausalLM
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import Architecture, Segment
from tests import reference
from tests.models import common

WIDTH, HEADS, FFN, VOCAB, LENGTH = 32, 4, 64, 17, 8
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH))


def decoder(name="magneto", layers=2):
  return RECIPES[name](Architecture("decoder", 0, layers, WIDTH, FFN, HEADS)).decoder


def language_model(name="magneto", **options) -> CausalLM:
  record = name if not isinstance(name, str) else decoder(name)
  sizes = dict(vocab_size=VOCAB, width=WIDTH, num_heads=HEADS, ffn_width=FFN)
  return CausalLM(recipe=record, **sizes | options)


RELATIVE = {"positions": "none", "relative_buckets": 8, "relative_max_distance": 10}
KINDS = {kind: {"positions": kind} for kind in position_layers.KINDS} | {"relative": RELATIVE}


def several_segments(*patterns):
  """A stack of the named layers, each pattern repeated as often as it says."""
  layer = lambda name: decoder(name).segments[0].pattern[0]
  segments = [Segment(tuple(map(layer, names)), repeats) for names, repeats in patterns]
  return dataclasses.replace(decoder("pre_ln"), segments=tuple(segments))


MIX_LN = several_segments((("post_ln",), 1), (("pre_ln",), 2))
PATTERN = several_segments((("magneto", "normformer"), 2))


def slow(*case):
  """A case of a table that `pytest -m slow` runs."""
  return pytest.param(*case, marks=pytest.mark.slow)


def score(model, params, tokens, **inputs):
  return np.asarray(common.compiled(model.apply)({"params": params}, tokens, **inputs))


# ---------------------------------------------------------------------------------------------
# What a position sees
# ---------------------------------------------------------------------------------------------

WINDOWS = (None, (2, None), (0, None), (1, 5))
REACHES = [("magneto", "sinusoidal", None), ("post_ln", "learned", None)]
REACHES += [("normformer", "rotary", (2, None)), ("magneto", "xpos", (1, 5))]
ALL_REACHES = [
  (name, kind, window) for name in RECIPES for kind in position_layers.KINDS for window in WINDOWS
]
SLOW_REACHES = [slow(*case) for case in ALL_REACHES if case not in REACHES]


@pytest.mark.parametrize(("name", "kind", "window"), REACHES + SLOW_REACHES)
def test_causality(name, kind, window):
  """d logits[t] / d embedding[s] is exactly 0 for the tokens s that t cannot reach, else not.

  All tokens of the row differ and the output table is its own, so that a row of the embedding's
  gradient belongs to one position. Two layers reach as far as two windows, end to end.
  """
  tokens = np.arange(LENGTH)[None]
  model = language_model(name, positions=kind, window=window, tied=False, max_length=LENGTH)
  params = reference.random_params(model, tokens)
  weights = np.random.default_rng(1).standard_normal(VOCAB).astype(np.float32)

  def scores(table):
    changed = params | {"token_embedding": {"embedding": table}}
    return model.apply({"params": changed}, tokens)[0] @ weights

  gradient = common.compiled(jax.jacrev(scores))(params["token_embedding"]["embedding"])
  reached = np.any(np.asarray(gradient)[:, :LENGTH] != 0, axis=-1)
  distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
  left = LENGTH if window is None else window[0]
  np.testing.assert_array_equal(reached, (distance >= 0) & (distance <= 2 * left))


@pytest.mark.parametrize(
  "kind", common.main_and_slow(position_layers.KINDS, ("sinusoidal", "rotary"))
)
def test_packed_documents_do_not_leak(kind):
  """Two documents in a row are scored as they are alone, to float32's last bits."""
  model = language_model(positions=kind, max_length=LENGTH)
  params = reference.random_params(model, TOKENS)
  ids = np.array([[1, 1, 1, 2, 2, 2, 2, 2]] * 2)
  positions = np.array([[0, 1, 2, 0, 1, 2, 3, 4]] * 2)
  packed = score(model, params, TOKENS, segment_ids_BT=ids, positions_BT=positions)
  apart = [score(model, params, TOKENS[:, part]) for part in (slice(0, 3), slice(3, 8))]
  np.testing.assert_allclose(packed, np.concatenate(apart, 1), rtol=0, atol=1e-5)


def test_padding_does_not_leak():
  """Whatever lies in the padding, the tokens score the same to the bit, and send it no gradient."""
  model = language_model()
  ids = np.array([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]])
  other = np.where(ids == 0, (TOKENS + 5) % VOCAB, TOKENS)
  params = reference.random_params(model, TOKENS)
  first, second = (score(model, params, t, segment_ids_BT=ids) for t in (TOKENS, other))
  np.testing.assert_array_equal(first[ids == 1], second[ids == 1])
  assert np.abs(first - second)[ids == 0].max() > 0.1


@pytest.mark.parametrize("kind", [k if k in ("learned", "relative") else slow(k) for k in KINDS])
def test_hugging_faces_attention_mask_with_padding_on_either_side(kind):
  """1 is a token, 0 is padding: the tokens are scored as from the sequence alone, float32."""
  model = language_model(**KINDS[kind], max_length=LENGTH)
  params = reference.random_params(model, TOKENS)
  mask = np.array([[1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]])
  tokens = np.where(mask == 0, 0, TOKENS)
  tokens[0, :5] = tokens[1, 3:]
  logits = score(model, params, tokens, mask_BT=mask)
  alone = score(model, params, tokens[:1, :5])[0]
  np.testing.assert_allclose(logits[0, :5], alone, rtol=0, atol=1e-5)
  np.testing.assert_allclose(logits[1, 3:], alone, rtol=0, atol=1e-5)


def test_a_row_of_padding_is_finite():
  model = language_model()
  params = reference.random_params(model, TOKENS)
  ids = np.array([[0] * LENGTH, [1] * LENGTH])

  def loss(params):
    logits = model.apply({"params": params}, TOKENS, segment_ids_BT=ids)
    return jnp.sum(logits[1] ** 2), logits

  gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
  assert np.isfinite(logits).all()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


# ---------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------

MODELS = {name: language_model(name) for name in RECIPES} | {
  "learned": language_model(positions="learned", max_length=LENGTH),
  "rotary": language_model(positions="rotary"),
  "no positions": language_model(positions="none"),
  "grouped queries": language_model(positions="rotary", num_kv_heads=2),
  "one key head": language_model(num_kv_heads=1),
  "window": language_model(window=(2, None)),
  "soft cap": language_model(logits_soft_cap=0.5),
  "mix_ln": language_model(MIX_LN),
  "a pattern of two": language_model(PATTERN, positions="rotary"),
  "unrolled": language_model(unroll=-1),
  "xpos": language_model(positions="xpos"),
  "relative bias": language_model(**RELATIVE),
  "wide heads": language_model(head_dim=16),
  "untied swiglu": language_model(tied=False, activation="swiglu"),
}


def decode(model, params, tokens, chunks, **inputs):
  """Logits of the tokens, scored chunk by chunk behind a cache."""
  step = common.compiled(
    lambda state, tokens, inputs: model.apply(v, tokens, state=state, **inputs)
  )
  v, state, logits, start = {"params": params}, model.init_state(*tokens.shape), [], 0
  for size in chunks:
    part = {name: array[:, start : start + size] for name, array in inputs.items()}
    scores, state = step(state, tokens[:, start : start + size], part)
    logits.append(scores)
    start += size
    assert state.length == start
  return np.concatenate(logits, 1)


DECODED = ("normformer", "grouped queries", "window", "a pattern of two", "xpos", "relative bias")


@pytest.mark.parametrize("name", common.main_and_slow(MODELS, DECODED))
def test_decoding_by_token_matches_full_forward(name):
  """float32: 1e-5 absolute, some ten roundings of logits of order 1 to 10."""
  model = MODELS[name]
  params = reference.random_params(model, TOKENS)
  stepwise = decode(model, params, TOKENS, [1] * LENGTH)
  np.testing.assert_allclose(stepwise, score(model, params, TOKENS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ("grouped queries", "window", "mix_ln"))
def test_decoding_by_chunk_matches_full_forward(name):
  model = MODELS[name]
  params = reference.random_params(model, TOKENS)
  chunked = decode(model, params, TOKENS, [3, 1, 4])
  np.testing.assert_allclose(chunked, score(model, params, TOKENS), rtol=0, atol=1e-5)  # float32


def test_the_models_differ():
  """Else a decoder that ignores an option would pass: each option moves the logits by > 0.01."""
  plain = language_model()
  params = reference.random_params(plain, TOKENS)
  expected = score(plain, params, TOKENS)
  for name in ("rotary", "no positions", "window", "soft cap"):
    assert np.abs(score(MODELS[name], params, TOKENS) - expected).max() > 0.01, name


PADDED = [("learned", "segment_ids_BT"), ("xpos", "mask_BT")]
ALL_PADDED = [(kind, name) for kind in KINDS for name in ("mask_BT", "segment_ids_BT")]


@pytest.mark.parametrize(
  ("kind", "name"), PADDED + [slow(*case) for case in ALL_PADDED if case not in PADDED]
)
def test_left_padded_rows_decode_as_alone(kind, name):
  """The prompts of a batch end together; the shorter one is padded in front, by mask or segment 0.

  Positions are those of the tokens alone, with nothing said about them.
  """
  model = language_model(**KINDS[kind], max_length=LENGTH)
  params = reference.random_params(model, TOKENS)
  real = np.array([[0, 0, 0, 1, 1, 1, 1, 1], [1] * LENGTH])
  logits = decode(model, params, TOKENS, [4, 1, 3], **{name: real})
  short, long = score(model, params, TOKENS[:1, 3:]), score(model, params, TOKENS[1:])
  np.testing.assert_allclose(logits[:1, 3:], short, rtol=0, atol=1e-5)  # float32
  np.testing.assert_allclose(logits[1:], long, rtol=0, atol=1e-5)


def test_tokens_decoded_without_ids_join_segment_1():
  model = language_model(positions="rotary")
  params = reference.random_params(model, TOKENS)
  ids = np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
  apply = functools.partial(model.apply, {"params": params})
  _, state = apply(TOKENS[:, :4], state=model.init_state(2, LENGTH), segment_ids_BT=ids)
  logits, state = apply(TOKENS[:, 4:], state=state)
  expected = score(model, params, TOKENS[:1, 2:])
  np.testing.assert_allclose(logits[:1], expected[:, 2:], rtol=0, atol=1e-5)  # float32
  np.testing.assert_array_equal(state.segment_ids_BS > 0, [[0, 0] + [1] * 6, [1] * 8])


@pytest.mark.parametrize("dtype", (np.int8, np.int64))
def test_decoding_takes_ids_of_any_integer_dtype(dtype):
  """With 64-bit mode on, Python's and NumPy's integers are wider than the state's."""
  with jax.enable_x64(True):
    model = language_model(dtype=jnp.float64)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    ids = np.ones(TOKENS.shape, dtype)
    apply = functools.partial(model.apply, state=model.init_state(2, LENGTH))
    before = jax.eval_shape(lambda: model.init_state(2, LENGTH))
    for inputs in ({}, {"segment_ids_BT": ids}):
      logits, state = jax.eval_shape(functools.partial(apply, **inputs), shapes, TOKENS)
      assert logits.dtype == jnp.float64
      assert state == before


def test_decoding_state_does_not_depend_on_unwritten_rows():
  """Rows behind the tokens are never seen, so a longer cache scores the same."""
  model = language_model()
  params = reference.random_params(model, TOKENS)
  apply = jax.jit(lambda state: model.apply({"params": params}, TOKENS, state=state)[0])
  exact, longer = (apply(model.init_state(2, length)) for length in (LENGTH, 2 * LENGTH))
  np.testing.assert_allclose(longer, exact, rtol=0, atol=1e-5)  # float32


def test_tokens_past_the_end_of_the_state_score_nan():
  """Never a silent overwrite of what was written: XLA clamps the place of a write."""
  model = language_model()
  params = reference.random_params(model, TOKENS)
  apply = jax.jit(lambda state, tokens: model.apply({"params": params}, tokens, state=state))
  logits, state = apply(model.init_state(2, LENGTH), TOKENS)
  assert np.isfinite(logits).all()
  assert np.isnan(apply(state, TOKENS[:, :1])[0]).all()
  with pytest.raises(ValueError, match="9 tokens do not fit a state of 8"):
    apply(model.init_state(2, LENGTH), np.zeros((2, LENGTH + 1), int))


# ---------------------------------------------------------------------------------------------
# Embedding and output
# ---------------------------------------------------------------------------------------------


def test_stream_starts_as_scaled_tokens_and_positions():
  """sqrt(D) E[token] + P[position], held against the reference's stack, float32."""
  model = language_model("pre_ln")
  params = reference.random_params(model, TOKENS)
  table = params["token_embedding"]["embedding"]
  half = np.arange(WIDTH // 2)
  angles = np.arange(LENGTH)[:, None] * np.exp(-half * math.log(10_000) / (WIDTH // 2 - 1))
  positions = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
  x = math.sqrt(WIDTH) * table[TOKENS] + positions
  stream = reference.stack(
    params["stack"], x, [(reference.pre_ln,)], final_norm=reference.layer_norm
  )
  np.testing.assert_allclose(score(model, params, TOKENS), stream @ table.T, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", common.main_and_slow(position_layers.KINDS, ("learned", "rotary")))
def test_scores_read_the_given_positions(kind):
  """Rotary models see differences of positions only; those without positions see none."""
  model = language_model(positions=kind, max_length=2 * LENGTH)
  params = reference.random_params(model, TOKENS)
  plain = score(model, params, TOKENS)
  default = np.arange(LENGTH)[None] * np.ones((2, 1), int)
  given = score(model, params, TOKENS, positions_BT=default)
  np.testing.assert_allclose(given, plain, rtol=0, atol=1e-5)  # float32
  shifted = score(model, params, TOKENS, positions_BT=default + 5)
  stretched = score(model, params, TOKENS, positions_BT=default * 2)
  assert (np.abs(shifted - plain).max() > 0.01) == (kind in ("learned", "sinusoidal"))
  assert (np.abs(stretched - plain).max() > 0.01) == (kind != "none")


@pytest.mark.parametrize("kind", ("learned", "sinusoidal"))
def test_position_offset_shifts_the_first_position(kind):
  """Position 0 reads row (or angle) 2, as fairseq's; the table holds the rows before it too."""
  model = language_model(positions=kind, max_length=LENGTH, position_offset=2)
  params = reference.random_params(model, TOKENS)
  plain = language_model(positions=kind, max_length=LENGTH + 2)
  positions = np.arange(LENGTH)[None] + 2
  expected = score(plain, params, TOKENS, positions_BT=positions)
  np.testing.assert_allclose(score(model, params, TOKENS), expected, rtol=0, atol=1e-5)  # float32


def test_logits_state_and_stream_are_returned_in_this_order():
  """The stream of a call with a state is that of its tokens, behind those of the state."""
  model = language_model()
  params = reference.random_params(model, TOKENS)
  apply = jax.jit(
    lambda tokens, state=None: model.apply(
      {"params": params}, tokens, state=state, return_hidden_states=True
    )
  )
  logits, hidden = apply(TOKENS)
  first, state, _ = apply(TOKENS[:, :5], model.init_state(2, LENGTH))
  second, state, stream = apply(TOKENS[:, 5:], state)
  assert state.length == LENGTH
  np.testing.assert_allclose(np.concatenate([first, second], 1), logits, rtol=0, atol=1e-5)
  np.testing.assert_allclose(stream, hidden[:, :, 5:], rtol=0, atol=1e-5)  # float32
  last = reference.layer_norm(params["stack"]["final_norm"], np.asarray(hidden[-1]))
  expected = last @ params["token_embedding"]["embedding"].T
  np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


def test_tied_output_is_the_embedding():
  tied, untied = language_model(), language_model(tied=False)
  params = reference.random_params(untied, TOKENS)
  same = params | {"output_embedding": params["token_embedding"]}
  without = {name: leaf for name, leaf in params.items() if name != "output_embedding"}
  logits = score(tied, without, TOKENS)
  np.testing.assert_array_equal(score(untied, same, TOKENS), logits)
  assert np.abs(score(untied, params, TOKENS) - logits).max() > 0.1
  shapes = jax.eval_shape(tied.init, jax.random.key(0), TOKENS)["params"]
  assert "output_embedding" not in shapes


# ---------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------

RATES = ("dropout_rate", "attention_dropout_rate", "activation_dropout_rate", "drop_path_rate")


@pytest.mark.parametrize("rate", RATES)
def test_each_dropout_is_active_and_only_in_training(rate):
  model = language_model(**{rate: 0.5})
  params = reference.random_params(model, TOKENS)
  run = jax.jit(
    lambda key: model.apply({"params": params}, TOKENS, deterministic=False, rngs={"dropout": key})
  )
  first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
  plain = score(language_model(), params, TOKENS)
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 0.01
  assert np.abs(first - plain).max() > 0.01
  np.testing.assert_array_equal(score(model, params, TOKENS), plain)


def test_embedding_is_dropped():
  """With both branches at 0 and no final norm, the logits see nothing but the embedding."""
  record = decoder("pre_ln")
  model = language_model(dataclasses.replace(record, final_norm=False), dropout_rate=0.5)
  params = reference.random_params(model, TOKENS)
  for layer, projection in (("self_attention", "out"), ("ffn", "wo")):
    block = params["stack"]["segment_0"]["block_0"][layer]
    block[projection] = jax.tree.map(np.zeros_like, block[projection])
  params["token_embedding"]["embedding"] = np.eye(VOCAB, WIDTH, dtype=np.float32)
  model = model.clone(positions="none")
  rngs = {"dropout": jax.random.key(0)}
  logits = model.apply({"params": params}, TOKENS, deterministic=False, rngs=rngs)
  scores = np.take_along_axis(np.asarray(logits), TOKENS[..., None], axis=-1)
  # sqrt(D) is either dropped or doubled.
  np.testing.assert_allclose(np.unique(scores), [0, 2 * math.sqrt(WIDTH)], rtol=1e-6)


def test_training_without_a_key_raises():
  model = language_model(dropout_rate=0.5)
  params = reference.random_params(model, TOKENS)
  with pytest.raises(flax.errors.InvalidRngError, match="needs PRNG for"):
    model.apply({"params": params}, TOKENS, deterministic=False)


# ---------------------------------------------------------------------------------------------
# Precision and errors
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", position_layers.KINDS)
def test_bfloat16_model_keeps_float32_parameters_and_logits(kind):
  model = language_model(positions=kind, dtype=jnp.bfloat16)
  variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
  assert jax.eval_shape(model.apply, variables, TOKENS).dtype == jnp.float32
  state = model.init_state(2, LENGTH)
  assert state.caches[0][0].self_attention.k_LBKSH.dtype == jnp.bfloat16
  step = functools.partial(model.apply, state=state)
  logits, after = jax.eval_shape(step, variables, TOKENS)
  assert logits.dtype == jnp.float32
  assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


def test_bfloat16_logits_are_near_float32():
  """bfloat16 has 8 bits, 0.4 %; an RMS error below 3 % through 2 layers and the embedding."""
  model, half = language_model(), language_model(dtype=jnp.bfloat16)
  params = reference.random_params(model, TOKENS)
  exact, rounded = score(model, params, TOKENS), score(half, params, TOKENS)
  assert np.sqrt(np.mean((rounded - exact) ** 2)) < 0.03 * exact.std()
  # Logits are sums in float32, not bfloat16 numbers: the low 16 bits of some are set.
  assert np.any(rounded.view(np.uint32) & 0xFFFF)


@pytest.mark.parametrize(
  ("options", "message"),
  (
    ({"positions": "relative"}, "positions='relative' must be one of learned, sinusoidal"),
    ({"activation": "swish"}, "activation='swish' must be one of gelu"),
    ({"remat": "some"}, "remat='some' must be one of none"),
    ({"positions": ("rotary", "xpos")}, "can be rotated in one way only"),
    ({"num_kv_heads": 3}, "N=4 query heads must be a multiple of K=3"),
    ({"window": (-1, None)}, "window"),
    ({"logits_soft_cap": 0.0}, "logits_soft_cap=0.0 must be positive"),
    ({"attention_implementation": "cuda"}, "implementation='cuda' is not one of"),
    ({"positions": "learned", "max_length": 4}, "8 positions .*max_length=4"),
    ({"positions": "rotary", "head_dim": 3}, "head_dim=3 must be even"),
  ),
)
def test_wrong_options_raise(options, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(language_model(**options).init, jax.random.key(0), TOKENS)


def test_heads_that_do_not_divide_the_width_raise():
  model = language_model(num_heads=5)
  with pytest.raises(ValueError, match="num_heads=5 must divide width=32; or give head_dim"):
    jax.eval_shape(model.init, jax.random.key(0), TOKENS)


@pytest.mark.parametrize("recipe", (None, RECIPES["magneto"](Architecture("decoder", 0, 2))))
def test_a_recipe_that_is_no_stack_raises(recipe):
  """A `Recipe` has a stack for each side; an encoder's has None for the decoder."""
  with pytest.raises(TypeError, match="recipe must be a Stack, as `Recipe.decoder` is, not"):
    jax.eval_shape(language_model(recipe).init, jax.random.key(0), TOKENS)


def test_a_call_with_a_recipe_of_another_structure_raises():
  """Else Magneto's parameters would run as Pre-LN, its inner norms unread, unnoticed."""
  model = language_model("magneto")
  variables = {"params": reference.random_params(model, TOKENS)}
  for other in (decoder("pre_ln"), dataclasses.replace(decoder(), norm="rms_norm")):
    with pytest.raises(ValueError, match="of another structure than the model's"):
      model.apply(variables, TOKENS, recipe=other)


def test_a_recipe_for_another_width_raises():
  """Its embedding would be drawn with another deviation."""
  record = RECIPES["magneto"](Architecture("decoder", 0, 2)).decoder
  with pytest.raises(ValueError, match="recipe is for width 512, the model has self.width=32"):
    jax.eval_shape(language_model(record).init, jax.random.key(0), TOKENS)


def test_an_encoder_decoders_record_raises():
  architecture = Architecture("encoder_decoder", 2, 2, WIDTH, FFN, HEADS)
  model = language_model(RECIPES["magneto"](architecture).decoder)
  with pytest.raises(ValueError, match="this recipe has cross-attention: give memory_BSD"):
    jax.eval_shape(model.init, jax.random.key(0), TOKENS)


def test_decoding_past_the_position_table_raises():
  model = language_model(positions="learned", max_length=4)
  with pytest.raises(ValueError, match="8 positions .*max_length=4"):
    model.init_state(1, 8)


def test_relative_bias_trains_without_a_square_of_the_length():
  """8,192 tokens: all temporary memory is a quarter of one float32 a head, query and key."""
  model = language_model(**RELATIVE, remat="full")
  tokens = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
  gradient = jax.jit(jax.grad(lambda variables, tokens: model.apply(variables, tokens).sum()))
  memory = gradient.lower(variables, tokens).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * HEADS * 8192**2 / 4
