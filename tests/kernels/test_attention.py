"""Every attention implementation against one brute force: NumPy float64, a Python loop a logit."""

import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.kernels import (
  RelativeBias,
  XlaChunked,
  attention,
  dot_product_attention,
  relative_buckets,
)

INF = math.inf
TINY = XlaChunked(block_q=2, block_kv=3)
ALL = pytest.mark.parametrize("implementation", ["xla", "xla_chunked", TINY], ids=str)

# name: (B, T, S, N, K, H) and the options; `bias` is a shape, or the arguments of a RelativeBias
# with its number of buckets.
PACKED = {
  "q_segment_ids": np.array([[1, 1, 2, 2, 3], [7, 7, 7, 7, 0]]),
  "kv_segment_ids": np.array([[1, 1, 2, 2, 3], [0, 7, 7, 7, 7]]),
}
CASES = {
  "plain": ((2, 5, 5, 2, 2, 4), {}),
  "one_query": ((2, 1, 6, 2, 2, 4), {}),
  "cross": ((2, 3, 7, 2, 2, 4), {}),
  "scale": ((2, 5, 5, 2, 2, 4), {"scale": 1.7}),
  "soft_cap": ((2, 5, 5, 2, 2, 4), {"logits_soft_cap": 0.7}),
  "soft_cap_bias": ((2, 5, 5, 2, 2, 4), {"logits_soft_cap": 0.7, "bias": (2, 2, 5, 5)}),
  "gqa": ((2, 5, 6, 6, 3, 4), {}),
  "mqa_causal": ((2, 5, 5, 4, 1, 4), {"is_causal": True}),
  "causal": ((2, 5, 5, 2, 2, 4), {"is_causal": True}),
  "causal_more_keys": ((2, 3, 6, 2, 2, 4), {"is_causal": True}),
  "causal_more_queries": ((2, 6, 3, 2, 2, 4), {"is_causal": True}),
  "causal_offset": ((2, 3, 8, 2, 2, 4), {"is_causal": True, "q_offset": 4}),
  "causal_offset_negative": ((2, 5, 4, 2, 2, 4), {"is_causal": True, "q_offset": -2}),
  "window": ((2, 6, 6, 2, 2, 4), {"window": (2, 1)}),
  "window_left": ((2, 6, 6, 2, 2, 4), {"window": (1, None)}),
  "window_right": ((2, 6, 6, 2, 2, 4), {"window": (None, 0)}),
  "window_self": ((2, 6, 6, 2, 2, 4), {"window": (0, 0)}),
  "window_causal": ((2, 6, 6, 2, 2, 4), {"window": (2, 3), "is_causal": True}),
  "window_offset": ((2, 4, 7, 2, 2, 4), {"window": (1, 1), "q_offset": 2}),
  "segments": ((2, 5, 5, 2, 2, 4), PACKED),
  "segments_causal": ((2, 5, 5, 2, 2, 4), PACKED | {"is_causal": True}),
  "lengths": ((2, 4, 6, 2, 2, 4), {"kv_lengths": np.array([6, 2])}),
  "lengths_zero": ((2, 4, 6, 2, 2, 4), {"kv_lengths": np.array([0, 3])}),
  "bias": ((2, 4, 5, 2, 2, 4), {"bias": (2, 2, 4, 5)}),
  "bias_shared_batch": ((2, 4, 5, 2, 2, 4), {"bias": (1, 2, 4, 5)}),
  "bias_shared_heads": ((2, 4, 5, 4, 2, 4), {"bias": (2, 1, 4, 5)}),
  "bias_per_key": ((2, 4, 5, 2, 2, 4), {"bias": (2, 1, 1, 5)}),
  "bias_per_query": ((2, 4, 5, 2, 2, 4), {"bias": (1, 2, 4, 1)}),
  "bias_gqa": ((2, 4, 5, 4, 2, 4), {"bias": (1, 4, 4, 5)}),
  "relative": ((2, 9, 9, 2, 2, 4), {"bias": (8, True, 6)}),
  "relative_unidirectional": ((2, 9, 9, 2, 2, 4), {"bias": (8, False, 6), "is_causal": True}),
  "relative_ahead": ((2, 6, 6, 2, 2, 4), {"bias": (8, False, 6)}),
  "relative_cross": ((2, 3, 12, 4, 2, 4), {"bias": (8, True, 6)}),
  "relative_offset": ((2, 3, 9, 2, 2, 4), {"bias": (8, True, 6), "q_offset": 5}),
  "everything": (
    (2, 5, 5, 4, 2, 4),
    PACKED
    | {
      "bias": (8, True, 6),
      "kv_lengths": np.array([4, 5]),
      "is_causal": True,
      "window": (2, None),
      "logits_soft_cap": 2.0,
      "scale": 0.9,
      "q_offset": 1,
    },
  ),
}


def brute_bucket(r, num_buckets, bidirectional, max_distance):
  """T5's bucket in exact integers: log(m/e) / log(D/e) (n-e) >= j  iff  (m/e)^(n-e) >= (D/e)^j."""
  n = num_buckets // 2 if bidirectional else num_buckets
  base = n if bidirectional and r > 0 else 0
  m = abs(r) if bidirectional else max(-r, 0)
  e = n // 2
  if m < e:
    return base + m
  j = 0
  while e + j < n - 1 and m ** (n - e) * e ** (j + 1) >= max_distance ** (j + 1) * e ** (n - e):
    j += 1
  return base + e + j


def brute_force(
  q,
  k,
  v,
  bias=None,
  *,
  q_segment_ids=None,
  kv_segment_ids=None,
  kv_lengths=None,
  is_causal=False,
  q_offset=0,
  window=None,
  logits_soft_cap=None,
  scale=None,
  keep=None,
  dropout_rate=0.0,
):
  """The definition, one query of one head at a time; `keep` [B, N, T, S] is the dropout mask."""
  (B, T, N, H), (_, S, K, _) = q.shape, k.shape
  out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), -INF)
  for b, t, n in np.ndindex(B, T, N):
    position, kv_head = t + q_offset, n * K // N
    logits = {}
    for s in range(S):
      if is_causal and s > position:
        continue
      if window is not None and window[0] is not None and s < position - window[0]:
        continue
      if window is not None and window[1] is not None and s > position + window[1]:
        continue
      if q_segment_ids is not None and q_segment_ids[b, t] != kv_segment_ids[b, s]:
        continue
      if kv_lengths is not None and s >= kv_lengths[b]:
        continue
      x = sum(float(q[b, t, n, h]) * float(k[b, s, kv_head, h]) for h in range(H))
      x *= 1 / math.sqrt(H) if scale is None else scale
      if logits_soft_cap is not None:
        x = logits_soft_cap * math.tanh(x / logits_soft_cap)
      if isinstance(bias, RelativeBias):
        num_buckets = bias.table.shape[0]
        bucket = brute_bucket(s - position, num_buckets, bias.bidirectional, bias.max_distance)
        x += float(bias.table[bucket, n])
      elif bias is not None:
        b_, n_, t_, s_ = (i % size for i, size in zip((b, n, t, s), bias.shape, strict=True))
        x += float(bias[b_, n_, t_, s_])
      if x > -INF:
        logits[s] = x
    if logits:
      top = max(logits.values())
      lse[b, t, n] = top + math.log(sum(math.exp(x - top) for x in logits.values()))
    for s, x in logits.items():
      p = math.exp(x - lse[b, t, n])
      if keep is not None:
        p *= keep[b, n, t, s] / (1 - dropout_rate)
      out[b, t, n] += p * v[b, s, kv_head].astype(np.float64)
  return out, lse


def make_case(name, dtype):
  """The arrays (q, k, v, bias) of a case, drawn from its name, and its options."""
  (B, T, S, N, K, H), options = CASES[name]
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  options = dict(options)
  q, k, v = (rng.normal(size=s).astype(dtype) for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
  bias = options.pop("bias", None)
  if bias is not None and len(bias) == 3:
    num_buckets, bidirectional, max_distance = bias
    bias = RelativeBias(
      rng.normal(size=(num_buckets, N)).astype(dtype), bidirectional, max_distance
    )
  elif bias is not None:
    bias = rng.normal(size=bias).astype(dtype)
  return (q, k, v, bias), options


def attend(implementation, arrays, options):
  """A jitted call; an implementation may refuse a case, but the reference serves them all."""
  static = {k: v for k, v in options.items() if not isinstance(v, (np.ndarray, jax.Array))}
  traced = {k: jnp.asarray(v) for k, v in options.items() if k not in static}
  call = functools.partial(dot_product_attention, implementation=implementation, **static)
  try:
    return jax.jit(lambda arrays, traced: call(*arrays, **traced))(
      jax.tree.map(jnp.asarray, arrays), traced
    )
  except NotImplementedError as error:
    if implementation == "xla":
      raise
    pytest.skip(str(error))


def assert_matches(found, expected, tolerance):
  """Compares (out, lse) with the brute force, whose lse of an empty row is -inf."""
  out, lse = (np.asarray(x) for x in found)
  expected_out, expected_lse = expected
  np.testing.assert_allclose(out.astype(np.float64), expected_out, rtol=tolerance, atol=tolerance)
  empty = np.isneginf(expected_lse)
  np.testing.assert_array_equal(lse[empty], np.finfo(lse.dtype).min)
  np.testing.assert_array_equal(out[empty], 0)
  np.testing.assert_allclose(lse[~empty], expected_lse[~empty], rtol=tolerance, atol=tolerance)


@ALL
@pytest.mark.parametrize("name", CASES)
def test_matches_brute_force(implementation, name):
  """float32 to 2e-6: a few roundings of 6e-8 on values around 1."""
  arrays, options = make_case(name, np.float32)
  found = attend(implementation, arrays, options | {"return_lse": True})
  assert found[0].dtype == found[1].dtype == jnp.float32
  assert_matches(found, brute_force(*arrays, **options), 2e-6)


@ALL
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["gqa", "causal", "bias_shared_batch", "everything"])
def test_half_precision(implementation, name, dtype):
  """bfloat16 and float16 to 2 eps for the output; logits and lse are float32, to 1e-5."""
  arrays, options = make_case(name, dtype)
  out, lse = attend(implementation, arrays, options | {"return_lse": True})
  assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
  expected_out, expected_lse = brute_force(*arrays, **options)
  tolerance = 2 * float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(np.float64(out), expected_out, rtol=tolerance, atol=tolerance)
  seen = ~np.isneginf(expected_lse)
  np.testing.assert_allclose(lse[seen], expected_lse[seen], rtol=1e-5, atol=1e-5)


@ALL
@pytest.mark.parametrize("name", CASES)
def test_float64_values_and_gradients_match_brute_force(implementation, name):
  """float64: values to 1e-13, which one float32 step on the way would miss by a factor of 1e5.

  Gradients along a random direction of each array, against differences of the brute force, which
  are themselves good to 1e-9.
  """
  arrays, options = make_case(name, np.float64)
  rng = np.random.default_rng(0)
  expected = brute_force(*arrays, **options)
  empty = np.isneginf(expected[1])
  weights = rng.normal(size=empty.shape + arrays[0].shape[-1:]), rng.normal(size=empty.shape)
  weights[1][empty] = 0

  @jax.jit
  def result_and_gradient(arrays):
    call = functools.partial(attend, implementation, options=options | {"return_lse": True})
    result, pull = jax.vjp(call, arrays)
    return result, pull(jax.tree.map(jnp.asarray, weights))[0]

  with jax.enable_x64(True):
    found, gradient = result_and_gradient(jax.tree.map(jnp.asarray, arrays))
    assert found[0].dtype == found[1].dtype == jnp.float64
    assert_matches(found, expected, 1e-13)
    leaves, treedef = jax.tree.flatten(arrays)
    for i, (leaf, slope) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
      direction = rng.normal(size=leaf.shape)
      values = []
      for step in (1e-5, -1e-5):
        moved = treedef.unflatten([*leaves[:i], leaf + step * direction, *leaves[i + 1 :]])
        out, lse = brute_force(*moved, **options)
        values.append((weights[0] * out).sum() + (weights[1] * np.where(empty, 0, lse)).sum())
      difference = (values[0] - values[1]) / 2e-5
      found_slope = (np.asarray(slope) * direction).sum()
      np.testing.assert_allclose(found_slope, difference, rtol=1e-7, atol=1e-8)


NOTHING_SEEN = {
  "segments": {
    "q_segment_ids": jnp.array([[1, 1, 9, 1]]),
    "kv_segment_ids": jnp.array([[1, 1, 1, 1]]),
  },
  "offset": {"is_causal": True, "q_offset": -3, "window": (0, None)},
  "bias": {"bias": jnp.array([0.0, 0.0, -INF, 0.0])[None, None, :, None]},
  "bias_and_lengths": {
    "bias": jnp.array([-INF, -INF, 0.0, 0.0])[None, None, None, :],
    "kv_lengths": jnp.array([2]),
  },
}


@ALL
@pytest.mark.parametrize("name", NOTHING_SEEN)
def test_query_without_keys_is_zero_and_sends_back_zero(implementation, name):
  """float32, exactly: softmax over nothing is neither NaN nor a mean over what is hidden."""
  options = dict(NOTHING_SEEN[name])
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 4, 2, 8))

  def run(q, k, v):
    options_ = options | {"return_lse": True}
    return attend(implementation, (q, k, v, options_.pop("bias", None)), options_)

  out, lse = run(q, k, v)
  np.testing.assert_array_equal(out[:, 2], 0)
  np.testing.assert_array_equal(lse[:, 2], jnp.finfo(jnp.float32).min)
  dq, dk, dv = jax.grad(lambda *a: sum(x.sum() for x in run(*a)), argnums=(0, 1, 2))(q, k, v)
  np.testing.assert_array_equal(dq[:, 2], 0)
  assert all(np.isfinite(d).all() for d in (dq, dk, dv))


@ALL
def test_hidden_keys_have_no_influence(implementation):
  """float32, bit for bit: neither the size of a hidden key and value nor its bias is felt."""
  arrays, options = make_case("lengths", np.float32)
  options = options | {"return_lse": True}
  (q, k, v, _), hidden = arrays, (slice(1, 2), slice(2, None))
  k_wild, v_wild = k.copy(), v.copy()
  k_wild[hidden], v_wild[hidden] = 1e15, -1e15
  for a, b in zip(
    attend(implementation, (q, k, v, None), options),
    attend(implementation, (q, k_wild, v_wild, None), options),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


@ALL
def test_large_logits_do_not_overflow(implementation):
  """float32: logits of 1e4 leave a one-hot softmax, to 1e-6."""
  q = jnp.eye(4)[None, :, None] * 1e4
  v = jax.random.normal(jax.random.key(0), (1, 4, 1, 4))
  out = attend(implementation, (q, jnp.sign(q), v, None), {})
  np.testing.assert_allclose(out, v, rtol=1e-6)


@ALL
@pytest.mark.parametrize(
  "name", ["causal_offset", "window_offset", "relative_offset", "everything"]
)
def test_traced_offset_equals_static(implementation, name):
  """float32 to 1e-6."""
  arrays, options = make_case(name, np.float32)
  static = attend(implementation, arrays, options)
  traced = attend(implementation, arrays, options | {"q_offset": jnp.int32(options["q_offset"])})
  np.testing.assert_allclose(traced, static, rtol=1e-6, atol=1e-6)


@ALL
@pytest.mark.parametrize("bias", [None, (8, True, 6), (8, False, 6)])
def test_decoding_equals_full_causal_forward(implementation, bias):
  """One query at a time over a cache whose unwritten part is wild; float32 to 1e-6."""
  B, T, N, H = 2, 7, 2, 4
  q, k, v = jax.random.normal(jax.random.key(0), (3, B, T, N, H))
  if bias is not None:
    bias = RelativeBias(jax.random.normal(jax.random.key(1), (bias[0], N)), *bias[1:])
  window = (3, None)
  full = attend(implementation, (q, k, v, bias), {"is_causal": True, "window": window})

  def step(cache, inputs):
    t, q_t, k_t, v_t = inputs
    cache = tuple(c.at[:, t].set(x) for c, x in zip(cache, (k_t, v_t), strict=True))
    out = dot_product_attention(
      q_t[:, None],
      *cache,
      bias,
      is_causal=True,
      window=window,
      q_offset=t,
      implementation=implementation,
    )
    return cache, out[:, 0]

  steps = (jnp.arange(T), *(x.swapaxes(0, 1) for x in (q, k, v)))
  _, stepped = jax.lax.scan(step, (jnp.full_like(k, 9e9),) * 2, steps)
  np.testing.assert_allclose(stepped.swapaxes(0, 1), full, rtol=1e-6, atol=1e-6)


@ALL
@pytest.mark.parametrize("lengths", [(6, 6), (2, 6), (0, 4)])
def test_halves_of_the_keys_merge_by_lse(implementation, lengths):
  """What ring attention does: out = sum_i exp(lse_i - lse) out_i; float32 to 1e-6.

  With lengths 2 the second half of the keys is hidden, with 0 both are.
  """
  (q, k, v, _), _ = make_case("lengths", np.float32)
  lengths = np.array(lengths)
  options = {"return_lse": True, "kv_lengths": lengths}
  whole, whole_lse = attend(implementation, (q, k, v, None), options)
  parts = [
    attend(implementation, (q, k[:, i : i + 3], v[:, i : i + 3], None), options | {"kv_lengths": n})
    for i, n in ((0, np.clip(lengths, 0, 3)), (3, np.clip(lengths - 3, 0, 3)))
  ]
  lse = jnp.logaddexp(parts[0][1], parts[1][1])
  merged = sum(jnp.exp(part_lse - lse)[..., None] * out for out, part_lse in parts)
  np.testing.assert_allclose(merged, whole, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(lse, whole_lse, rtol=1e-6, atol=1e-6)


def probabilities(implementation, key, rate, arrays, **options):
  """P [B, T, N, S] after dropout, read off with the unit vectors as values."""
  q, k = arrays
  B, S, K, H = k.shape
  assert S == H
  v = jnp.broadcast_to(jnp.eye(S)[:, None], (B, S, K, H))
  options = options | {"dropout_rate": rate, "dropout_key": key}
  return attend(implementation, (q, k, v, None), options)


@ALL
def test_dropout_keeps_its_fraction_everywhere(implementation):
  """8192 draws: 4 standard deviations are 0.02; no two heads, queries or batch rows agree."""
  q, k = jax.random.normal(jax.random.key(0), (2, 2, 32, 4, 32))
  kept = np.asarray(probabilities(implementation, jax.random.key(1), 0.3, (q, k)) > 0)
  assert abs(kept.mean() - 0.7) < 0.02
  assert len(np.unique(kept.reshape(-1, 32), axis=0)) == 2 * 32 * 4


@ALL
def test_dropout_is_a_function_of_the_key(implementation):
  """What one q, k drops, another drops too; another key drops something else."""
  q, k = jax.random.normal(jax.random.key(0), (2, 2, 32, 4, 32))
  key = jax.random.key(1)
  kept = probabilities(implementation, key, 0.3, (q, k)) > 0
  np.testing.assert_array_equal(kept, probabilities(implementation, key, 0.3, (k, 2 * q)) > 0)
  other = probabilities(implementation, jax.random.key(2), 0.3, (q, k)) > 0
  assert (kept != other).any()


@ALL
def test_dropout_multiplies_the_probabilities(implementation):
  """At rate 1/2, bit for bit: P is doubled where kept, and neither it nor lse is renormalised."""
  q, k = jax.random.normal(jax.random.key(0), (2, 2, 8, 4, 8))
  key = jax.random.key(1)
  whole, lse = probabilities(implementation, None, 0.0, (q, k), return_lse=True)
  dropped, dropped_lse = probabilities(implementation, key, 0.5, (q, k), return_lse=True)
  np.testing.assert_array_equal(dropped, np.where(dropped > 0, 2 * whole, 0))
  np.testing.assert_array_equal(dropped_lse, lse)


@ALL
def test_dropout_matches_brute_force_with_gradients(implementation):
  """The mask read off one call, put into the brute force for another; float64, as without it."""
  rng = np.random.default_rng(0)
  q, k, v = rng.normal(size=(3, 2, 4, 2, 4))
  rate, key = 0.3, jax.random.key(1)
  with jax.enable_x64(True):
    kept = np.asarray(probabilities(implementation, key, rate, (k, v)) > 0).swapaxes(1, 2)
    run = functools.partial(brute_force, keep=kept, dropout_rate=rate)
    options = {"dropout_rate": rate, "dropout_key": key}
    out, pull = jax.vjp(
      lambda *qkv: attend(implementation, (*qkv, None), options), *map(jnp.asarray, (q, k, v))
    )
    np.testing.assert_allclose(out, run(q, k, v)[0], rtol=1e-13, atol=1e-13)
    weight, directions = rng.normal(size=out.shape), rng.normal(size=(3, *q.shape))
    found = sum((d * g).sum() for d, g in zip(directions, pull(jnp.asarray(weight)), strict=True))
    ahead, behind = (
      run(*(x + h * d for x, d in zip((q, k, v), directions, strict=True)))[0]
      for h in (1e-5, -1e-5)
    )
    np.testing.assert_allclose(found, (weight * (ahead - behind)).sum() / 2e-5, rtol=1e-7)


@ALL
def test_dropout_has_the_right_expectation(implementation):
  """The mean over 2000 keys lies within 5 standard errors of the output without dropout."""
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 4, 2, 8))
  run = functools.partial(dot_product_attention, q, k, v, implementation=implementation)
  draws = jax.jit(jax.vmap(lambda key: run(dropout_rate=0.2, dropout_key=key)))(
    jax.random.split(jax.random.key(1), 2000)
  )
  assert (abs(draws.mean(0) - run()) < 5 * draws.std(0) / math.sqrt(2000)).all()


@ALL
def test_composes_with_transformations(implementation):
  """vmap, scan and remat give what a call for each gives, with its gradients; float32 to 1e-5."""
  q, k, v = jax.random.normal(jax.random.key(0), (3, 3, 2, 5, 2, 4))
  tables = jax.random.normal(jax.random.key(1), (3, 8, 2))

  def one(q, k, v, table):
    bias = RelativeBias(table, True, 6)
    options = {"is_causal": True, "kv_lengths": jnp.array([5, 3]), "implementation": implementation}
    return dot_product_attention(q, k, v, bias, **options)

  def scanned(*arrays):
    body = jax.checkpoint(lambda carry, x: (carry, one(*x)))
    return jax.lax.scan(body, None, arrays)[1]

  def looped(*arrays):
    return jnp.stack([one(*x) for x in zip(*arrays, strict=True)])

  def value_and_gradients(f):
    def loss(*arrays):
      return (f(*arrays) ** 2).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, tables)

  expected = jax.tree.leaves(value_and_gradients(looped))
  for f in (jax.vmap(one), scanned):
    for a, b in zip(jax.tree.leaves(value_and_gradients(f)), expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@ALL
def test_infinite_bias_masks(implementation):
  """A bias of -inf is a mask: bit for bit the causal output, and zero bias gradient there."""
  (q, k, v, _), _ = make_case("causal", np.float32)
  hidden = np.triu(np.ones((5, 5), bool), 1)[None, None]
  bias = jnp.where(hidden, -INF, 0)

  def run(bias):
    return attend(implementation, (q, k, v, bias), {})

  np.testing.assert_array_equal(
    run(bias), attend(implementation, (q, k, v, None), {"is_causal": True})
  )
  gradient = jax.grad(lambda bias: (run(bias) * q).sum())(bias)
  np.testing.assert_array_equal(gradient[hidden], 0)


def test_absent_masks_cost_nothing():
  """The reference builds neither positions nor a mask where nothing is hidden."""
  q = jnp.ones((1, 4, 2, 8))
  plain = str(jax.make_jaxpr(dot_product_attention)(q, q, q))
  assert "iota" not in plain
  assert "-inf" not in plain


BUCKETS = [(8, 16), (8, 6), (32, 128), (16, 64), (64, 256), (6, 100), (10, 20), (128, 1000)]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), BUCKETS)
def test_relative_buckets_match_exact_arithmetic(num_buckets, max_distance, bidirectional):
  r = np.arange(-1010, 1011)
  if max_distance <= num_buckets // (4 if bidirectional else 2):
    pytest.skip("no logarithmic buckets")
  found = relative_buckets(jnp.asarray(r), num_buckets, bidirectional, max_distance)
  expected = [brute_bucket(int(i), num_buckets, bidirectional, max_distance) for i in r]
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, expected)


def test_relative_bias_is_a_pytree_of_its_table():
  """So it can be an argument of jit and grad, and its structure keys the compilation cache."""
  bias = RelativeBias(jnp.ones((8, 2)), False, 64)
  assert len(jax.tree.leaves(bias)) == 1
  doubled = jax.jit(lambda b: jax.tree.map(lambda x: 2 * x, b))(bias)
  assert (doubled.bidirectional, doubled.max_distance) == (False, 64)
  np.testing.assert_array_equal(doubled.table, 2)


Q, KV = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 5, 2, 8))
IDS = jnp.ones((2, 3), jnp.int32), jnp.ones((2, 5), jnp.int32)
ERRORS = {
  "rank": ((Q[0], KV, KV), {}, r"queries \(3, 4, 8\), keys \(2, 5, 2, 8\)"),
  "keys_values": ((Q, KV, KV[:, :4]), {}, r"values \(2, 4, 2, 8\)"),
  "batch": ((Q[:1], KV, KV), {}, r"queries \(1, 3, 4, 8\)"),
  "head_dim": ((Q[..., :4], KV, KV), {}, r"queries \(2, 3, 4, 4\)"),
  "groups": ((Q[:, :, :3], KV, KV), {}, "N=3 query heads must be a multiple of K=2"),
  "dtypes": ((Q, KV, KV.astype(jnp.bfloat16)), {}, "'float32', 'float32', 'bfloat16'"),
  "integers": ((Q.astype(int), KV.astype(int), KV.astype(int)), {}, "one floating dtype"),
  "bias_rank": ((Q, KV, KV, jnp.ones((3, 5))), {}, r"bias.shape=\(3, 5\)"),
  "bias_shape": ((Q, KV, KV, jnp.ones((2, 4, 3, 4))), {}, r"= \(2, 4, 3, 5\)"),
  "bias_mask": ((Q, KV, KV, jnp.ones((1, 1, 3, 5), bool)), {}, "it holds 0 and -inf"),
  "table": ((Q, KV, KV, RelativeBias(jnp.ones((8, 2)))), {}, r"\(8, 2\) is not .*N=4"),
  "few_buckets": ((Q, KV, KV, RelativeBias(jnp.ones((3, 4)))), {}, "num_buckets=3"),
  "near": ((Q, KV, KV, RelativeBias(jnp.ones((64, 4)), True, 16)), {}, "max_distance=16"),
  "one_segments": ((Q, KV, KV), {"q_segment_ids": IDS[0]}, "or neither"),
  "segments": (
    (Q, KV, KV),
    {"q_segment_ids": IDS[0], "kv_segment_ids": IDS[0]},
    r"kv_segment_ids must be integers of shape \[2, 5\], not int32\[2, 3\]",
  ),
  "lengths": ((Q, KV, KV), {"kv_lengths": jnp.ones(2)}, r"shape \[2\], not float32\[2\]"),
  "offset": ((Q, KV, KV), {"q_offset": jnp.arange(2)}, r"q_offset .* shape \[\], not int32\[2\]"),
  "window_int": ((Q, KV, KV), {"window": 3}, "window=3"),
  "window_negative": ((Q, KV, KV), {"window": (-1, None)}, r"window=\(-1, None\)"),
  "soft_cap": ((Q, KV, KV), {"logits_soft_cap": 0.0}, "logits_soft_cap=0.0"),
  "rate": ((Q, KV, KV), {"dropout_rate": 1.0}, "dropout_rate=1.0"),
  "no_key": ((Q, KV, KV), {"dropout_rate": 0.1}, "dropout_rate=0.1 needs a dropout_key"),
  "raw_key": (
    (Q, KV, KV),
    {"dropout_rate": 0.1, "dropout_key": jnp.zeros(2, jnp.uint32)},
    "uint32.* jax.random.key",
  ),
  "implementation": ((Q, KV, KV), {"implementation": "cuda"}, "'cuda' is not one of .'xla'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_show_the_values(name):
  args, options, message = ERRORS[name]
  with pytest.raises(ValueError, match=message):
    dot_product_attention(*args, **options)


def test_falls_through_to_the_next_implementation(monkeypatch):
  def refuse(*args, **options):
    raise NotImplementedError("needs a head dim of 128")

  table = {"picky": refuse, **attention.IMPLEMENTATIONS}
  monkeypatch.setattr(attention, "IMPLEMENTATIONS", table)
  assert dot_product_attention(Q, KV, KV).shape == Q.shape
  with pytest.raises(NotImplementedError, match="'picky': 'needs a head dim of 128'"):
    dot_product_attention(Q, KV, KV, implementation="picky")
