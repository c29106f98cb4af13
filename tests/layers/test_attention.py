"""Multi-head attention: its formula, grouped heads, head scales, masks, cache and dropout."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
  outputs = reference.heads(params, x, visible)
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
  ),
)
def test_wrong_options_raise(options, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(Attention(**options).init, jax.random.key(0), X)
