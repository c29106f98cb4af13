"""The encoder-decoder: formulae, padding of both sides, decoding, sharing, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.models.encoder import Encoder
from magneto_jax.models.encoder_decoder import EncoderDecoder
from magneto_jax.models.language import CausalLM
from tests import reference
from tests.models import common
from tests.models.common import HEADS, KINDS, LENGTH, PAPERS, SIZES, VOCAB, WIDTH, in_float64, run

S, T = 6, LENGTH
SOURCE = np.random.default_rng(0).integers(0, VOCAB, (3, S))
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (3, T))
SOURCE_MASK = np.array([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1] * S])
MASK = np.array([[1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1], [1] * T])
MASKS = {"source_mask_BS": SOURCE_MASK, "mask_BT": MASK}
INPUTS = (SOURCE, TOKENS)


def both(name="magneto", *, shared=False, tied=True, decoder=(), **options) -> EncoderDecoder:
  """A model whose two stacks have the same options but for those of the decoder alone."""
  recipe = common.recipe(name, "encoder_decoder")
  sizes = {"vocab_size": VOCAB} | SIZES | options
  return EncoderDecoder(
    encoder=Encoder(recipe=recipe.encoder, **sizes),
    decoder=CausalLM(recipe=recipe.decoder, tied=tied, **sizes | dict(decoder)),
    shared_embedding=shared,
  )


# ---------------------------------------------------------------------------------------------
# Formulae
# ---------------------------------------------------------------------------------------------

MAIN = ("magneto", "deepnet", "normformer")


@pytest.mark.parametrize("name", common.main_and_slow(PAPERS, MAIN))
def test_model_is_its_papers_in_float64(name):
  """1e-11 of the logits: the encoder's output, its final norm included, is the memory as it is."""
  model = both(name, positions="learned", dtype=jnp.float64)
  logits, params = in_float64(model, *INPUTS, source_mask_BS=SOURCE_MASK[[0, 0, 2]])
  layer, cross, final_norm = PAPERS[name]
  mask = SOURCE_MASK[[0, 0, 2]] == 1
  # arXiv 2203.00555, figure 2: alpha is 0.81 (N^4 M)^1/16 in the encoder, (3M)^1/4 in the decoder.
  of = lambda alpha: functools.partial(layer, alpha=alpha) if layer is reference.deepnet else layer
  options = common.embedding_of(name) | {"final_norm": final_norm}
  memory = reference.encoder(
    params["encoder"], SOURCE, [(of(0.81 * 2 ** (5 / 16)),)], mask=mask, **options
  )
  expected = reference.causal_lm(
    params["decoder"],
    TOKENS,
    [(of(6 ** (1 / 4)),)],
    cross=functools.partial(cross, memory=memory, visible=mask[:, None, None]),
    **options,
  )
  assert logits.dtype == np.float64
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("cross", (True, False))
def test_relative_biases_are_t5s_in_float64(cross):
  """The decoder's own is of what lies behind, that of the memory of both directions; 1e-11."""
  options = common.RELATIVE | {"dtype": jnp.float64}
  model = both("pre_ln", decoder={"relative_cross": cross}, **options)
  logits, params = in_float64(model, *INPUTS)
  assert ("cross_relative_bias" in params["decoder"]) == cross
  assert "cross_relative_bias" not in params["encoder"]
  bias = functools.partial(reference.t5_bias, max_distance=10)
  embedding = common.embedding_of("pre_ln") | {"final_norm": reference.layer_norm}
  memory = reference.encoder(
    params["encoder"],
    SOURCE,
    [(reference.pre_ln,)],
    mask=np.ones(SOURCE.shape, bool),
    bias=bias(params["encoder"]["relative_bias"], S, S),
    **embedding,
  )
  to_memory = {"memory": memory, "visible": np.ones((T, S), bool)}
  if cross:
    to_memory["bias"] = bias(params["decoder"]["cross_relative_bias"], T, S)
  expected = reference.causal_lm(
    params["decoder"],
    TOKENS,
    [(reference.pre_ln,)],
    cross=functools.partial(reference.cross_pre_ln, **to_memory),
    bias=bias(params["decoder"]["relative_bias"], T, T, bidirectional=False),
    **embedding,
  )
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-11)


def test_xpos_is_torchscales_in_both_stacks_and_not_across_in_float64():
  model = both("pre_ln", positions="xpos", dtype=jnp.float64)
  logits, params = in_float64(model, *INPUTS)
  options = common.embedding_of("pre_ln") | {"final_norm": reference.layer_norm}
  options["turn"] = reference.torchscale_xpos
  layers, mask = [(reference.pre_ln,)], np.ones(SOURCE.shape, bool)
  memory = reference.encoder(params["encoder"], SOURCE, layers, mask=mask, **options)
  cross = functools.partial(reference.cross_pre_ln, memory=memory, visible=np.ones((T, S), bool))
  expected = reference.causal_lm(params["decoder"], TOKENS, layers, cross=cross, **options)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-11)


# ---------------------------------------------------------------------------------------------
# Padding
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", common.main_and_slow(KINDS, ("learned", "relative")))
def test_hugging_faces_attention_masks_with_padding_on_either_side(kind):
  """1 is a token, 0 is padding, in the source and in the target; as alone, float32."""
  model = both(**KINDS[kind])
  params = reference.random_params(model, *INPUTS)
  source, tokens = SOURCE * SOURCE_MASK, TOKENS * MASK
  source[0, :4], tokens[0, :5] = source[1, 2:], tokens[1, 3:]
  logits = run(model, params, source, tokens, **MASKS)
  alone = run(model, params, source[:1, :4], tokens[:1, :5])[0]
  np.testing.assert_allclose(logits[0, :5], alone, rtol=0, atol=1e-5)
  np.testing.assert_allclose(logits[1, 3:], alone, rtol=0, atol=1e-5)


def test_padding_reaches_no_token_and_rows_of_it_are_finite():
  """Whatever it holds: to the bit, with no gradient, finite where a source or a target is empty."""
  model = both(positions="learned", relative_buckets=8, decoder={"relative_cross": True})
  params = reference.random_params(model, *INPUTS)
  memory = np.random.default_rng(2).standard_normal((*SOURCE.shape, WIDTH)).astype(np.float32)

  def forward(params, source, tokens, memory, source_mask, mask):
    encode = functools.partial(model.apply, method="encode")
    encoded = encode({"params": params}, source, mask_BT=source_mask)
    logits = model.apply(
      {"params": params},
      tokens,
      memory_BSD=encoded + memory,
      memory_mask_BS=source_mask,
      mask_BT=mask,
      method="decode",
    )
    return jnp.sum(jnp.sin(logits) * mask[..., None]), logits

  backward = common.compiled(jax.grad(forward, argnums=(0, 3), has_aux=True))
  (_, to_memory), logits = backward(params, *INPUTS, memory, SOURCE_MASK, MASK)
  other = np.where(SOURCE_MASK == 0, (SOURCE + 5) % VOCAB, SOURCE)
  others = np.where(MASK == 0, (TOKENS + 5) % VOCAB, TOKENS)
  changed = np.where(SOURCE_MASK[..., None] == 0, memory + 5, memory)
  _, again = backward(params, other, others, changed, SOURCE_MASK, MASK)
  np.testing.assert_array_equal(logits[MASK == 1], again[MASK == 1])
  assert not to_memory[SOURCE_MASK == 0].any()
  assert (np.abs(to_memory[SOURCE_MASK == 1]).max(-1) > 0).all()
  empty = np.arange(3)[:, None] == np.arange(2)
  source_mask, mask = (
    np.where(row, 0, m) for row, m in ((empty[:, :1], SOURCE_MASK), (empty[:, 1:], MASK))
  )
  results = backward(params, *INPUTS, memory, source_mask, mask)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


def test_targets_see_the_whole_memory_and_no_other_target_than_their_window():
  """By changing one row at a time: a window of 0 is of the decoder's self-attention alone."""
  model = both(decoder={"window": (0, None)})
  params = reference.random_params(model, *INPUTS)
  memory = np.random.default_rng(2).standard_normal((1, S, WIDTH)).astype(np.float32)
  call = common.compiled(
    lambda tokens, memory: model.apply(
      {"params": params}, tokens, memory_BSD=memory, method="decode"
    )
  )
  plain = call(TOKENS[:1], memory)
  for s in range(S):
    changed = memory + (np.arange(S) == s).reshape(1, S, 1) * memory
    assert (np.abs(call(TOKENS[:1], changed) - plain)[0].max(-1) > 1e-4).all()
  for t in range(T):
    tokens = TOKENS[:1].copy()
    tokens[0, t] = (tokens[0, t] + 1) % VOCAB
    changed = np.any(np.asarray(call(tokens, memory) != plain)[0], axis=-1)
    np.testing.assert_array_equal(changed, np.arange(T) == t)


@pytest.mark.parametrize("kind", common.main_and_slow(KINDS, ("learned",)))
def test_packed_pairs_are_scored_as_alone(kind):
  """Two pairs in a row, the shorter source with the longer target, then padding; float32."""
  model = both(**KINDS[kind])
  params = reference.random_params(model, *INPUTS)
  ids, source_ids = np.array([[1, 1, 1, 2, 2, 2, 2, 0]]), np.array([[1, 1, 1, 2, 2, 0]])
  packed = {
    "source_segment_ids_BS": source_ids,
    "source_positions_BS": np.array([[0, 1, 2, 0, 1, 0]]),
    "segment_ids_BT": ids,
    "positions_BT": np.array([[0, 1, 2, 0, 1, 2, 3, 0]]),
  }
  logits = run(model, params, SOURCE[:1], TOKENS[:1], **packed)
  # Each in a row of its own, where the other is padding.
  segments = np.array([[1], [2]])
  twice = np.concatenate([SOURCE[:1]] * 2), np.concatenate([TOKENS[:1]] * 2)
  masks = {"source_mask_BS": source_ids == segments, "mask_BT": ids == segments}
  alone = run(model, params, *twice, **masks)
  for row, segment in enumerate((1, 2)):
    at = ids[0] == segment
    np.testing.assert_allclose(logits[0, at], alone[row, at], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------

RELATIVE_CROSS = common.RELATIVE | {"decoder": {"relative_cross": True}}


@pytest.mark.parametrize("kind", common.main_and_slow(KINDS, ("relative",)))
def test_decoding_with_a_memory_given_once_matches_full_forward(kind):
  """Padded sources, prompts padded on the left, four tokens, then 1, 1 and 2 more; float32.

  What a later call is given of a memory replaces the first: here it is the same.
  """
  model = both(**RELATIVE_CROSS if kind == "relative" else KINDS[kind])
  params = reference.random_params(model, *INPUTS)
  mask = np.array([[1] * T, MASK[1], [0] * 1 + [1] * (T - 1)])
  expected = run(model, params, *INPUTS, source_mask_BS=SOURCE_MASK, mask_BT=mask)
  memory = run(model, params, SOURCE, mask_BT=SOURCE_MASK, method="encode")
  decode = common.compiled(
    lambda tokens, **inputs: model.apply({"params": params}, tokens, method="decode", **inputs)
  )
  state = model.apply({"params": params}, 3, T, S, method="init_state")
  first = {"memory_BSD": memory, "memory_mask_BS": SOURCE_MASK, "mask_BT": mask[:, :4]}
  logits, state = decode(TOKENS[:, :4], state=state, **first)
  parts = [logits]
  for start, stop, again in ((4, 5, {}), (5, 6, {}), (6, T, first | {"mask_BT": None})):
    logits, state = decode(TOKENS[:, start:stop], state=state, **again)
    parts.append(logits)
  assert state.length == T
  np.testing.assert_array_equal(state.memory_ids_BS, SOURCE_MASK)
  actual = np.concatenate(parts, 1)
  np.testing.assert_allclose(actual[mask == 1], expected[mask == 1], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Sharing and hidden states
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", common.main_and_slow((True, False), (True,)))
def test_a_shared_embedding_is_the_encoders_table(tied):
  """The decoder has none of its own, reads with it and, if tied, writes with it."""
  shared, apart = both(shared=True, tied=tied), both(tied=tied)
  params = reference.random_params(shared, *INPUTS)
  decoder = params["decoder"]
  assert "token_embedding" not in decoder
  assert ("output_embedding" in decoder) == (not tied)
  own = decoder | {"token_embedding": params["encoder"]["token_embedding"]}
  expected = run(apart, params | {"decoder": own}, *INPUTS)
  np.testing.assert_allclose(run(shared, params, *INPUTS), expected, rtol=0, atol=1e-5)


def test_both_streams_are_returned_if_asked_for():
  model = both()
  params = reference.random_params(model, *INPUTS)
  options = MASKS | {"return_hidden_states": True}
  logits, encoder_hidden, decoder_hidden = run(model, params, *INPUTS, **options)
  assert (encoder_hidden.shape, decoder_hidden.shape) == ((3, 3, S, WIDTH), (3, 3, T, WIDTH))
  memory = run(model, params, SOURCE, mask_BT=SOURCE_MASK, method="encode")
  norms = {side: params[side]["stack"]["final_norm"] for side in ("encoder", "decoder")}
  last = reference.layer_norm(norms["encoder"], encoder_hidden[-1])
  np.testing.assert_allclose(last, memory, rtol=0, atol=1e-5)  # float32
  table = params["decoder"]["token_embedding"]["embedding"]
  last = reference.layer_norm(norms["decoder"], decoder_hidden[-1]) @ table.T
  np.testing.assert_allclose(last, logits, rtol=0, atol=2e-5)


def test_dropout_is_in_both_stacks():
  """The hidden states of both differ from key to key, and one key drops the same again."""
  model = both(dropout_rate=0.3)
  params = reference.random_params(model, *INPUTS)
  call = common.compiled(
    lambda key: model.apply(
      {"params": params},
      *INPUTS,
      return_hidden_states=True,
      deterministic=False,
      rngs={"dropout": key},
    )
  )
  first, again, other = (call(jax.random.key(seed)) for seed in (0, 0, 1))
  for stream in range(3):
    np.testing.assert_array_equal(first[stream], again[stream])
    assert np.abs(first[stream] - other[stream]).max() > 0.01


def test_a_state_without_a_memory_scores_nan():
  """Forgotten at the first call, it would be a memory of zeros; given once, it is kept."""
  model = decoder()
  variables = {"params": reference.random_params(model, TOKENS, memory_BSD=MEMORY)}
  call = common.compiled(functools.partial(model.apply, variables))
  logits, state = call(TOKENS[:, :2], state=model.init_state(3, T, S))
  assert np.isnan(logits).all()
  logits, state = call(TOKENS[:, :2], memory_BSD=MEMORY, state=model.init_state(3, T, S))
  assert np.isfinite(logits).all()
  assert np.isfinite(call(TOKENS[:, 2:4], state=state)[0]).all()


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------

MEMORY = np.zeros((3, S, WIDTH), np.float32)
IDS = np.ones((3, S), np.int32)


def decoder(kind="encoder_decoder", **options) -> CausalLM:
  return CausalLM(recipe=common.recipe(kind=kind).decoder, vocab_size=VOCAB, **SIZES | options)


def init(model, *args, **inputs):
  return jax.eval_shape(lambda: model.init(jax.random.key(0), *args, **inputs))


@pytest.mark.parametrize(
  ("call", "message"),
  (
    (lambda: init(decoder(), TOKENS), "this recipe has cross-attention: give memory_BSD"),
    (
      lambda: init(decoder("decoder"), TOKENS, memory_BSD=MEMORY),
      "this recipe has no cross-attention: it cannot read a memory",
    ),
    (
      lambda: init(decoder(), TOKENS, memory_BSD=MEMORY, state=decoder().init_state(3, T, S - 1)),
      r"a memory of 6 does not fit the state's \(3, 5\)",
    ),
    (
      lambda: init(decoder(), TOKENS, memory_BSD=MEMORY, memory_mask_BS=np.ones((3, S))),
      "memory_mask_BS must be of booleans, or of integers",
    ),
    (
      lambda: init(decoder("decoder"), TOKENS, memory_mask_BS=np.ones((3, S), int)),
      "this recipe has no cross-attention: it cannot read a memory",
    ),
    (
      lambda: init(
        decoder(), TOKENS, memory_mask_BS=np.ones((3, S), int), state=decoder().init_state(3, T, S)
      ),
      "memory_mask_BS goes with memory_BSD",
    ),
    (
      lambda: init(decoder(), TOKENS, memory_BSD=MEMORY, memory_segment_ids_BS=IDS),
      "memory_segment_ids_BS goes with segment_ids_BT",
    ),
    (
      lambda: init(
        decoder(),
        TOKENS,
        memory_BSD=MEMORY,
        memory_segment_ids_BS=IDS,
        segment_ids_BT=np.ones_like(TOKENS),
        state=decoder().init_state(3, T, S),
      ),
      "and with no state",
    ),
    (
      lambda: init(
        decoder(),
        TOKENS,
        memory_BSD=MEMORY,
        memory_segment_ids_BS=IDS[:1],
        segment_ids_BT=np.ones_like(TOKENS),
      ),
      r"memory_segment_ids_BS must be of shape \[3, 6\], not \[1, 6\]",
    ),
    (
      lambda: init(decoder("decoder"), TOKENS, memory_segment_ids_BS=IDS),
      "this recipe has no cross-attention: it cannot read a memory",
    ),
    (
      lambda: init(decoder(), TOKENS, memory_BSD=MEMORY, embedding_VD=np.zeros((2, WIDTH))),
      r"the table \[2, 16\] is not \[V, D\] = \[\d+, 16\]",
    ),
    (lambda: init(decoder(), TOKENS[0], memory_BSD=MEMORY), r"tokens \[8\] are not \[B, T\]"),
    (lambda: decoder().init_state(3, T), "a decoder with cross-attention needs the memory_len"),
    (
      lambda: init(both(positions="learned", max_length=T - 1), *INPUTS),
      "8 positions do not fit the learned table",
    ),
    (lambda: init(both(num_heads=5), *INPUTS), "num_heads=5 must divide width=16"),
  ),
)
def test_wrong_arguments_raise(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_bfloat16_model_keeps_float32_parameters_and_logits():
  model = both(dtype=jnp.bfloat16)
  variables = init(model, *INPUTS)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
  encode = functools.partial(model.apply, method="encode")
  assert jax.eval_shape(encode, variables, SOURCE).dtype == jnp.bfloat16
  assert jax.eval_shape(model.apply, variables, *INPUTS).dtype == jnp.float32
  caches = decoder(dtype=jnp.bfloat16, num_kv_heads=1).init_state(3, T, S).caches
  block = caches[0][0]
  for cache, length in ((block.self_attention, T), (block.cross_attention, S)):
    assert (cache.k_LBKSH.dtype, cache.k_LBKSH.shape) == (
      jnp.bfloat16,
      (2, 3, 1, length, WIDTH // HEADS),
    )
