"""Multi-head attention: its formula, grouped heads, head scales, masks, cache and dropout."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.kernels import RelativeBias
from magneto_jax.layers.attention import Attention, KVCache
from magneto_jax.layers.initializers import DenseInit
from magneto_jax.layers.norms import norm_factory
from magneto_jax.layers.positions import ROTATIONS
from magneto_jax.theory.records import HEAD_SCALES
from tests import reference

B, T, N, D = 2, 6, 4, 16
X = np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)


def params_of(layer, **options):
  return reference.random_params(layer, X, **options)


def attend(layer, params, x=X, **inputs):
  """The output, float32: agreement to 1e-5 is some ten roundings of numbers of order 1 to 10."""
  return np.asarray(jax.jit(layer.apply)({"params": params}, x, **inputs)[0])


def reference_attention(params, x, *, visible=None, head_scale=None, mid_norm=False):
  outputs = reference.heads(params, x, visible=visible)
  if head_scale == "pre_out_proj":
    outputs = outputs * np.repeat(params["head_scale"], outputs.shape[-1] // N)
  if mid_norm:
    outputs = reference.layer_norm(params["mid_norm"], outputs)
  y = reference.dense(params["out"], outputs)
  if head_scale == "post_out_proj_contiguous":
    y = y * np.repeat(params["head_scale"], D // N)
  if head_scale == "post_out_proj_interleaved":
    z, y = y, np.empty_like(y)
    for i in range(N):
      for d in range(D // N):
        y[..., d * N + i] = params["head_scale"][i] * z[..., i * (D // N) + d]
  return y


@pytest.mark.parametrize("mid_norm", (False, True))
@pytest.mark.parametrize("head_scale", (None, *HEAD_SCALES))
def test_layer_is_its_formula(head_scale, mid_norm):
  """float64, 1e-12. The mid norm is one norm over all heads, behind the head scale before W_o."""
  norm = norm_factory("layer_norm", dtype=jnp.float64) if mid_norm else None
  with jax.enable_x64(True):
    layer = Attention(N, head_scale=head_scale, mid_norm=norm, is_causal=True, dtype=jnp.float64)
    params = params_of(layer, dtype=np.float64)
    y = attend(layer, params, X.astype(np.float64))
  x = X.astype(np.float64)
  expected = reference_attention(params, x, head_scale=head_scale, mid_norm=mid_norm)
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)


def test_heads_may_be_wider_than_their_share():
  layer = Attention(N, head_dim=6, is_causal=True, mid_norm=norm_factory("layer_norm"))
  params = params_of(layer)
  assert params["query"]["kernel"].shape == (D, N, 6)
  assert params["out"]["kernel"].shape == (N, 6, D)
  assert params["mid_norm"]["scale"].shape == (N * 6,)
  expected = reference_attention(params, X, mid_norm=True)
  np.testing.assert_allclose(attend(layer, params), expected, rtol=0, atol=1e-5)


def test_inits_read_flattened_fans():
  """Fans of the whole matrices D to N H and N H to D, as the papers count, not a head's."""
  seen = {}

  def recording(name):
    def kernel(key, shape, dtype):
      seen[name] = shape
      return jnp.zeros(shape, dtype)

    def bias(fan_in):
      seen[f"{name} bias"] = fan_in
      return lambda key, shape, dtype: jnp.zeros(shape, dtype)

    return DenseInit(kernel, bias)

  layer = Attention(
    N,
    head_dim=6,
    num_kv_heads=2,
    qk_init=recording("qk"),
    v_init=recording("v"),
    out_init=recording("out"),
  )
  layer.init(jax.random.key(0), X)
  assert seen == {
    "qk": (D, 12),  # The key's, after the query's.
    "qk bias": D,
    "v": (D, 12),
    "v bias": D,
    "out": (24, D),
    "out bias": 24,
  }


# ---------------------------------------------------------------------------------------------
# Memory, norms of queries and keys, biases
# ---------------------------------------------------------------------------------------------

MEMORY = np.random.default_rng(1).standard_normal((B, 5, D)).astype(np.float32)


def test_cross_attention_is_its_formula():
  """float64, 1e-12: queries of x, keys and values of the memory, all of which every query sees."""
  visible = np.array([[1, 1, 1, 0, 1], [0, 1, 1, 1, 1]], bool)
  ids = (np.ones((B, T), int), visible.astype(int))
  x, memory = X.astype(np.float64), MEMORY.astype(np.float64)
  with jax.enable_x64(True):
    norm = norm_factory("layer_norm", dtype=jnp.float64)
    layer = Attention(N, is_cross=True, mid_norm=norm, dtype=jnp.float64)
    params = reference.random_params(layer, x, memory, dtype=np.float64)
    run = jax.jit(layer.apply)
    y, _ = run({"params": params}, x, memory)
    masked, _ = run({"params": params}, x, memory, segment_ids=ids)

  def expected(visible):
    outputs = reference.heads(params, x, memory, visible=visible)
    return reference.dense(params["out"], reference.layer_norm(params["mid_norm"], outputs))

  np.testing.assert_allclose(y, expected(np.ones((T, 5), bool)), rtol=0, atol=1e-12)
  np.testing.assert_allclose(masked, expected(visible[:, None, None]), rtol=0, atol=1e-12)


def test_cross_attentions_cache_is_filled_once_and_filled_anew():
  """Without a memory a call reads the cache; with one it replaces what the cache held.

  What it holds says nothing of where the queries stand, which T5's bias reads.
  """
  layer = Attention(N, num_kv_heads=2, is_cross=True)
  params = reference.random_params(layer, X, MEMORY)
  table = np.random.default_rng(2).standard_normal((8, N)).astype(np.float32)
  bias = RelativeBias(jnp.asarray(table), max_distance=10)
  run = jax.jit(functools.partial(layer.apply, bias=bias))
  cache = KVCache.empty(B, 5, 2, D // N, dtype=jnp.float32)
  for memory in (MEMORY, MEMORY[::-1]):
    expected, none = run({"params": params}, X, memory)
    assert none is None
    y, cache = run({"params": params}, X, memory, cache=cache)
    again, after = run({"params": params}, X, cache=cache)
    for result in (y, again):
      np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)  # float32
    np.testing.assert_array_equal(after.k_LBKSH, cache.k_LBKSH)
    assert cache.length == MEMORY.shape[1]


@pytest.mark.parametrize("scope", ("head", "width"))
@pytest.mark.parametrize("kind", ("layer_norm", "rms_norm"))
def test_qk_norm_is_before_the_rotation_in_float64(kind, scope):
  """Each head by itself, or all heads of a token; 1e-12."""
  norm = functools.partial(getattr(reference, kind))
  scoped = {"head": reference.each_head, "width": reference.all_heads}[scope](norm)
  x = X.astype(np.float64)
  with jax.enable_x64(True):
    layer = Attention(
      N,
      qk_norm=norm_factory(kind, dtype=jnp.float64),
      qk_norm_scope=scope,
      is_causal=True,
      rotation=ROTATIONS["xpos"],
      dtype=jnp.float64,
    )
    params = params_of(layer, dtype=np.float64)
    y = attend(layer, params, x)
  size = D // N if scope == "head" else D
  assert params["query_norm"]["scale"].shape == params["key_norm"]["scale"].shape == (size,)
  outputs = reference.heads(params, x, qk_norm=scoped, turn=reference.torchscale_xpos)
  np.testing.assert_allclose(y, reference.dense(params["out"], outputs), rtol=0, atol=1e-12)


def test_keys_norm_with_fewer_heads_has_its_own_width():
  layer = Attention(N, num_kv_heads=2, qk_norm=norm_factory("rms_norm"), qk_norm_scope="width")
  params = params_of(layer)
  assert params["query_norm"]["scale"].shape == (D,)
  assert params["key_norm"]["scale"].shape == (D // 2,)


def test_bias_is_added_to_the_logits():
  """As an array, where -inf forbids; and as T5's, where q_offset moves the queries."""
  bias = np.random.default_rng(2).standard_normal((B, N, T, T)).astype(np.float32)
  forbidden = np.random.default_rng(3).random((1, 1, T, T)) < 0.4
  table = np.random.default_rng(4).standard_normal((8, N)).astype(np.float32)
  layer = Attention(N)
  params = params_of(layer)
  for given, offset, expected, visible in (
    (np.where(forbidden, -np.inf, bias), 0, bias, ~forbidden | np.eye(T, dtype=bool)),
    (
      RelativeBias(table, max_distance=10),
      0,
      reference.t5_bias(table, T, T, max_distance=10),
      None,
    ),
    (
      RelativeBias(table, max_distance=10),
      3,
      reference.t5_bias(table, T + 3, T, max_distance=10)[:, :, 3:],
      None,
    ),
  ):
    if visible is not None:
      given = np.where(np.eye(T, dtype=bool), bias, given)
    y = attend(layer, params, bias=given, q_offset=offset)
    seen = np.ones((T, T), bool) if visible is None else visible
    outputs = reference.heads(params, X, visible=seen, bias=expected)
    np.testing.assert_allclose(y, reference.dense(params["out"], outputs), rtol=0, atol=1e-5)


def test_causality_reads_the_offset():
  """With 3 positions before x, query t sees the keys up to t + 3."""
  layer = Attention(N, is_causal=True)
  params = params_of(layer)
  expected = reference_attention(params, X, visible=np.tri(T, k=3, dtype=bool))
  np.testing.assert_allclose(attend(layer, params, q_offset=3), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv_heads", (1, 2))
def test_grouped_queries_are_repeated_key_heads(kv_heads):
  grouped = Attention(N, num_kv_heads=kv_heads, is_causal=True, rotation=ROTATIONS["rotary"])
  params = params_of(grouped)
  repeat = lambda leaf: np.repeat(leaf, N // kv_heads, axis=-2)
  repeated = params | {name: jax.tree.map(repeat, params[name]) for name in ("key", "value")}
  full = Attention(N, is_causal=True, rotation=ROTATIONS["rotary"])
  np.testing.assert_allclose(attend(grouped, params), attend(full, repeated), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", ((1, None), (0, 2), (None, 1), (2, 0)))
@pytest.mark.parametrize("is_causal", (False, True))
def test_window_and_causality_hide_keys(is_causal, window):
  distance = np.arange(T)[:, None] - np.arange(T)
  left, right = (T if side is None else side for side in window)
  visible = (distance <= left) & (-distance <= right) & (~np.bool(is_causal) | (distance >= 0))
  layer = Attention(N, is_causal=is_causal, window=window)
  params = params_of(layer)
  expected = reference_attention(params, X, visible=visible)
  np.testing.assert_allclose(attend(layer, params), expected, rtol=0, atol=1e-5)


def test_segments_hide_other_segments():
  ids = np.array([[0, 0, 1, 1, 0, 2]])
  layer = Attention(N)
  params = params_of(layer)
  y = attend(layer, params, segment_ids=(np.repeat(ids, B, 0), np.repeat(ids, B, 0)))
  expected = reference_attention(params, X, visible=ids.T == ids)
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


def test_a_query_without_keys_is_finite():
  """It yields W_o's bias, and gradients that are finite everywhere and 0 to the masked keys."""
  layer = Attention(N)
  params = params_of(layer)
  ids = (np.ones((B, T), int), np.zeros((B, T), int))

  def loss(params, x):
    y, _ = layer.apply({"params": params}, x, segment_ids=ids)
    return jnp.sum(y**2), y

  gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, X)
  np.testing.assert_allclose(y, np.broadcast_to(params["out"]["bias"], y.shape), atol=1e-6)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
  assert not np.any(gradients[1])


def test_soft_cap_bounds_logits():
  """A large cap changes nothing; a small one makes the attention a mean of the values."""
  layer = lambda cap: Attention(N, logits_soft_cap=cap)
  params = params_of(layer(None))
  plain = attend(layer(None), params)
  np.testing.assert_allclose(attend(layer(1e4), params), plain, rtol=0, atol=1e-5)
  values = np.einsum("btd,dnh->btnh", X, params["value"]["kernel"]) + params["value"]["bias"]
  mean = np.broadcast_to(values.mean(1, keepdims=True), values.shape).reshape(X.shape)
  expected = reference.dense(params["out"], mean)
  np.testing.assert_allclose(attend(layer(1e-6), params), expected, rtol=0, atol=1e-5)
  assert np.abs(plain - expected).max() > 0.1


def test_rotation_is_by_the_given_positions():
  """Relative positions alone count: a shift changes nothing, a stretch does."""
  layer = Attention(N, rotation=ROTATIONS["rotary"])
  params = params_of(layer)
  plain = attend(layer, params)
  shifted, stretched = (
    attend(layer, params, positions_BT=positions[None])
    for positions in (np.arange(T) + 9, 2 * np.arange(T))
  )
  np.testing.assert_allclose(shifted, plain, rtol=0, atol=1e-5)
  assert np.abs(stretched - plain).max() > 0.01
  assert np.abs(attend(Attention(N), params) - plain).max() > 0.01


def test_cache_writes_its_layer_behind_its_length():
  """Layer 1 of 3, 2 rows behind 5: all else stays as it was, and the length grows by 2."""
  k = np.random.default_rng(0).standard_normal((3, B, N, 8, 4)).astype(np.float32)
  cache = KVCache(jnp.asarray(k), jnp.asarray(-k), layer=jnp.int32(1), length=jnp.int32(5))
  rows = np.ones((B, 2, N, 4), np.float32)
  extended = cache.extend(rows, 2 * rows)
  for written, before, row in ((extended.k_LBKSH, k, 1), (extended.v_LBKSH, -k, 2)):
    expected = before.copy()
    expected[1, :, :, 5:7] = row
    np.testing.assert_array_equal(written, expected)
  np.testing.assert_array_equal(extended.read()[0], extended.k_LBKSH[1].swapaxes(1, 2))
  np.testing.assert_array_equal(extended.read()[1], extended.v_LBKSH[1].swapaxes(1, 2))
  assert (extended.layer, extended.length) == (1, 7)


@pytest.mark.parametrize("rotation", (None, *ROTATIONS))
def test_cached_calls_match_one_call(rotation):
  """The layer by itself: the cache that a call returns is what the next one takes."""
  layer = Attention(N, num_kv_heads=2, is_causal=True, rotation=ROTATIONS.get(rotation))
  params = params_of(layer)
  cache, parts = KVCache.empty(B, T, 2, D // N, dtype=jnp.float32), []
  for start, stop in ((0, 3), (3, 4), (4, T)):
    y, cache = layer.apply({"params": params}, X[:, start:stop], cache=cache)
    parts.append(y)
  np.testing.assert_allclose(np.concatenate(parts, 1), attend(layer, params), rtol=0, atol=1e-5)


def test_a_prefix_stands_before_the_cache_and_sees_itself_both_ways():
  """3 tokens in one call that fills their cache, then 3 more behind them: as under the mask of that
  in one call; positions and relative biases count on. float32."""
  bias = RelativeBias(np.random.default_rng(3).standard_normal((8, N)).astype(np.float32))
  options = {"num_kv_heads": 2, "rotation": ROTATIONS["rotary"]}
  both, causal = Attention(N, **options), Attention(N, is_causal=True, **options)
  params = params_of(both)
  visible = np.tri(T, dtype=bool)
  visible[:3, :3] = True
  mask = bias.materialize(T, T) + np.where(visible, 0.0, -np.inf)[None, None]
  expected = attend(both, params, bias=mask.astype(np.float32))
  empty = lambda rows: KVCache.empty(B, rows, 2, D // N, dtype=jnp.float32)
  first, prefix = both.apply({"params": params}, X[:, :3], bias=bias, cache=empty(3))
  parts, cache = [first], empty(4)
  for start, stop in ((3, 5), (5, T)):
    y, cache = causal.apply(
      {"params": params}, X[:, start:stop], bias=bias, cache=cache, prefix=prefix
    )
    parts.append(y)
  np.testing.assert_allclose(np.concatenate(parts, 1), expected, rtol=0, atol=1e-5)
  with pytest.raises(ValueError, match="a prefix is of self-attention"):
    jax.eval_shape(
      lambda: Attention(N, is_cross=True).init(jax.random.key(0), X, MEMORY, prefix=prefix)
    )


def test_dropout_is_of_probabilities_and_unbiased():
  """4096 draws: the mean is off by about 1 / 64 of a draw's deviation; 6 of those are allowed."""
  layer = Attention(N, is_causal=True, dropout_rate=0.5)
  params = params_of(layer)
  draw = lambda key: layer.apply({"params": params}, X, deterministic=False, rngs={"dropout": key})[
    0
  ]
  draws = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4096)))
  assert np.all(np.abs(draws.mean(0) - attend(layer, params)) <= 6 / 64 * draws.std(0) + 1e-5)
  # The first token sees itself alone: each head is dropped or doubled, 2^4 cases.
  assert len(np.unique(draws[:, 0, 0].round(4), axis=0)) == 2**N


def test_bfloat16_attention_keeps_float32_parameters():
  layer = Attention(N, is_causal=True, dtype=jnp.bfloat16, head_scale="pre_out_proj")
  params = params_of(layer)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), X.astype(jnp.bfloat16))
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
  y = attend(layer, params, X.astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  expected = reference_attention(params, X, head_scale="pre_out_proj")
  # bfloat16's 2^-8 a rounding: input, projections, their results, probabilities, output.
  error = y.astype(np.float32) - expected
  assert math.sqrt((error**2).mean()) < 0.02 * expected.std()


def test_projections_may_go_without_bias():
  params = params_of(Attention(N, use_bias=False))
  assert all(set(params[name]) == {"kernel"} for name in ("query", "key", "value", "out"))


@pytest.mark.parametrize(
  ("options", "message"),
  (
    ({"num_heads": 3}, "num_heads=3 must divide width=16; or give head_dim"),
    ({"num_heads": 4, "num_kv_heads": 3}, "N=4 query heads must be a multiple of K=3"),
    ({"num_heads": 4, "head_dim": 3, "rotation": ROTATIONS["rotary"]}, "head_dim=3 must be even"),
    ({"num_heads": 4, "head_scale": "after"}, "head_scale='after' must be one of None, pre_out"),
    (
      {"num_heads": 3, "head_dim": 4, "head_scale": "post_out_proj_contiguous"},
      "num_heads=3 must divide width=16 for 'post_out_proj_contiguous'",
    ),
    ({"num_heads": 4, "qk_norm_scope": "token"}, "qk_norm_scope='token' must be one of head, wid"),
    ({"num_heads": 4, "is_cross": True, "is_causal": True}, "is_cross goes with neither"),
    ({"num_heads": 4, "is_cross": True, "rotation": ROTATIONS["xpos"]}, "is_cross goes with nei"),
    ({"num_heads": 4, "is_cross": True}, "needs a memory, or a cache that holds one"),
  ),
)
def test_wrong_options_raise(options, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(Attention(**options).init, jax.random.key(0), X)


@pytest.mark.parametrize(
  ("options", "memory", "cache", "message"),
  (
    ({"is_causal": True, "num_kv_heads": 2}, None, (B, T, N, D // N), "do not fit a cache of"),
    ({"is_causal": True}, None, (B, T - 1, N, D // N), "do not fit a cache of"),
    ({"is_causal": True}, None, (B + 1, T, N, D // N), "do not fit a cache of"),
    ({}, None, (B, T + 1, N, D // N), "a cache needs is_causal=True, or to be filled"),
    ({"is_cross": True}, MEMORY, (B, MEMORY.shape[1] + 1, N, D // N), "must fill its cache of"),
  ),
)
def test_caches_that_do_not_fit_raise(options, memory, cache, message):
  """Else rows or heads of zeros would be attended to."""
  layer = Attention(N, **options)
  cache = KVCache.empty(*cache, dtype=jnp.float32)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: layer.init(jax.random.key(0), X, memory, cache=cache))


def test_inputs_of_other_ranks_raise():
  with pytest.raises(ValueError, match=r"is not \[B, T, D\]"):
    jax.eval_shape(Attention(N).init, jax.random.key(0), X[None])


def test_a_memory_without_cross_attention_raises():
  """Else it would go unread."""
  with pytest.raises(ValueError, match="a memory needs is_cross=True"):
    jax.eval_shape(Attention(N).init, jax.random.key(0), X, MEMORY)
