"""What attention promises beyond numbers, over every implementation; how one is chosen; its errors.

That the numbers are right is shown in `test_conformance.py`.
"""

import functools
import logging
import math
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.kernels import (
  RelativeBias,
  XlaChunked,
  attention,
  choose,
  dot_product_attention,
  platforms,
  use_implementation,
)
from tests import simulated
from tests.kernels.implementations import (
  ALL,
  ENTRIES,
  TRANSFORMED,
  TRANSFORMED_NAMES,
  Mistaken,
)

INF = math.inf


def attend(implementation, arrays, **options):
  """A jitted call, compiled once for its shapes; masks and keys are its arguments."""
  traced = {k: v for k, v in options.items() if isinstance(v, (np.ndarray, jax.Array))}
  static = tuple((k, v) for k, v in options.items() if k not in traced)
  return compiled(implementation, static)(arrays, traced)


@functools.cache
def compiled(implementation, static):
  call = functools.partial(dot_product_attention, implementation=implementation, **dict(static))
  return jax.jit(lambda arrays, traced: call(*arrays, **traced))


def normal(seed: int, *shape: int) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("name", ENTRIES)
def test_what_an_implementation_refuses_it_refuses_with_a_reason(name):
  """When it is named; and it is not chosen for it."""
  entry = ENTRIES[name]
  for dtype, reason in entry.refused_dtypes.items():
    with jax.enable_x64(dtype == "float64"):
      q = jax.ShapeDtypeStruct((1, 256, 2, 64), dtype)
      with pytest.raises(NotImplementedError, match=f"{name} cannot serve this call: .*{reason}"):
        choose(q, q, q, implementation=entry.implementation)
      assert reason in dict(choose(q, q, q).refusals)[name]


NOTHING_SEEN = {
  "offset": {"is_causal": True, "q_offset": -3, "window": (0, None)},
  "bias and lengths": {
    "bias": jnp.array([-INF, -INF, 0.0, 0.0])[None, None, None, :],
    "kv_lengths": jnp.array([2]),
  },
}


@ALL
@pytest.mark.parametrize("name", NOTHING_SEEN)
def test_query_without_keys_is_zero_and_sends_back_zero(implementation, name):
  """float32, exactly: softmax over nothing is neither NaN nor a mean over what is hidden."""
  options = dict(NOTHING_SEEN[name])
  bias = options.pop("bias", None)
  q, k, v = normal(0, 3, 1, 4, 2, 8)

  def run(q, k, v):
    return attend(implementation, (q, k, v, bias), return_lse=True, **options)

  (out, lse), pull = jax.vjp(run, q, k, v)
  np.testing.assert_array_equal(out[:, 2], 0)
  np.testing.assert_array_equal(lse[:, 2], jnp.finfo(jnp.float32).min)
  dq, dk, dv = pull((jnp.ones_like(out), jnp.ones_like(lse)))
  np.testing.assert_array_equal(dq[:, 2], 0)
  assert all(np.isfinite(d).all() for d in (dq, dk, dv))


@ALL
def test_hidden_keys_have_no_influence(implementation):
  """float32, bit for bit: neither the size of a hidden key nor that of its value is felt."""
  q, k, v = normal(0, 3, 2, 6, 2, 4)
  options = dict(kv_lengths=jnp.array([6, 2]), return_lse=True)
  wild = [x.at[1, 2:].set(size) for x, size in ((k, 1e15), (v, -1e15))]
  found = attend(implementation, (q, *wild, None), **options)
  for a, b in zip(found, attend(implementation, (q, k, v, None), **options), strict=True):
    np.testing.assert_array_equal(a, b)


@ALL
def test_large_logits_do_not_overflow(implementation):
  """float32: logits of 1e4 leave a one-hot softmax, to 1e-6."""
  q = jnp.eye(4)[None, :, None] * 1e4
  v = normal(0, 1, 4, 1, 4)
  out = attend(implementation, (q, jnp.sign(q), v, None))
  np.testing.assert_allclose(out, v, rtol=1e-6)


@ALL
def test_a_number_added_to_all_biases_is_not_felt(implementation):
  """Also if exp of it overflows or vanishes, and where blocks are padded: to 1e-4.

  One number a head. The biases lose eps / 2 x 200, 1e-5, where it is added.
  """
  q, k, v = normal(0, 3, 2, 5, 2, 4)
  table = normal(1, 8, 2)

  def out(number, q, k, v, table):
    bias = RelativeBias(table + number * jnp.array([[1, -1]]), True, 6)
    return dot_product_attention(q, k, v, bias, implementation=implementation)

  found, expected = (
    jax.vjp(jax.jit(functools.partial(out, number)), q, k, v, table) for number in (200.0, 0.0)
  )
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-4)
  for a, b in zip(found[1](q), expected[1](q), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@TRANSFORMED
def test_decoding_equals_full_causal_forward(implementation):
  """One query at a time over a cache whose unwritten part is wild; float32 to 1e-6."""
  B, T, N, H = 2, 7, 2, 4
  q, k, v = normal(0, 3, B, T, N, H)
  bias = RelativeBias(normal(1, 8, N), False, 6)
  options = dict(is_causal=True, window=(3, None))
  full = attend(implementation, (q, k, v, bias), **options)

  def step(cache, inputs):
    t, q_t, k_t, v_t = inputs
    cache = tuple(c.at[:, t].set(x) for c, x in zip(cache, (k_t, v_t), strict=True))
    arrays = q_t[:, None], *cache, bias
    out = dot_product_attention(*arrays, q_offset=t, implementation=implementation, **options)
    return cache, out[:, 0]

  steps = (jnp.arange(T), *(x.swapaxes(0, 1) for x in (q, k, v)))
  _, stepped = jax.lax.scan(step, (jnp.full_like(k, 9e9),) * 2, steps)
  np.testing.assert_allclose(stepped.swapaxes(0, 1), full, rtol=1e-6, atol=1e-6)


@ALL
def test_halves_of_the_keys_merge_by_lse(implementation):
  """What ring attention does: out = sum_i exp(lse_i - lse) out_i; float32 to 1e-6.

  Of one row of the batch the second half of the keys is hidden, of another both are.
  """
  q, k, v = normal(0, 3, 3, 6, 2, 4)
  lengths = jnp.array([6, 2, 0])
  run = functools.partial(attend, implementation, return_lse=True)
  whole, whole_lse = run((q, k, v, None), kv_lengths=lengths)
  parts = [
    run((q, k[:, i : i + 3], v[:, i : i + 3], None), kv_lengths=n)
    for i, n in ((0, lengths.clip(0, 3)), (3, (lengths - 3).clip(0, 3)))
  ]
  lse = jnp.logaddexp(parts[0][1], parts[1][1])
  merged = sum(jnp.exp(part_lse - lse)[..., None] * out for out, part_lse in parts)
  np.testing.assert_allclose(merged, whole, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(lse, whole_lse, rtol=1e-6, atol=1e-6)


@ALL
def test_infinite_bias_masks(implementation):
  """A bias of -inf is a mask: the causal output to 1e-6, and exactly no gradient for the bias."""
  q, k, v = normal(0, 3, 2, 5, 2, 4)
  hidden = np.triu(np.ones((5, 5), bool), 1)[None, None]
  bias = jnp.where(hidden, -INF, 0)
  out, pull = jax.vjp(lambda bias: attend(implementation, (q, k, v, bias)), bias)
  causal = attend(implementation, (q, k, v, None), is_causal=True)
  np.testing.assert_allclose(out, causal, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(pull(q)[0][hidden], 0)


@TRANSFORMED
def test_composes_with_transformations(implementation):
  """jit, vmap, scan and remat give what a call for each gives, with its gradients; to 1e-5.

  What is batched: arrays, the table of a bias, lengths, segments, offset and the dropout key.
  """
  q, k, v = normal(0, 3, 3, 2, 5, 2, 4)
  tables = normal(1, 3, 8, 2)
  batched = (
    jnp.array([[5, 3], [0, 5], [4, 4]]),
    jnp.sort(jax.random.randint(jax.random.key(2), (3, 2, 5), 0, 2)),
    jnp.array([0, 2, -1]),
    jax.random.split(jax.random.key(3), 3),
  )

  def one(q, k, v, table, lengths, ids, offset, key):
    return dot_product_attention(
      q,
      k,
      v,
      RelativeBias(table, True, 6),
      is_causal=True,
      kv_lengths=lengths,
      q_segment_ids=ids,
      kv_segment_ids=ids,
      q_offset=offset,
      dropout_rate=0.3,
      dropout_key=key,
      implementation=implementation,
    )

  def scanned(*arrays):
    body = jax.checkpoint(lambda carry, x: (carry, one(*x)))
    return jax.lax.scan(body, None, arrays)[1]

  def looped(*arrays):
    return jnp.stack([jitted(*x) for x in zip(*arrays, strict=True)])

  def value_and_gradients(f):
    def loss(*arrays):
      return (f(*arrays, *batched) ** 2).sum()

    return jax.tree.leaves(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(q, k, v, tables))

  jitted = jax.jit(one)
  expected = value_and_gradients(looped)
  for f in (jax.jit(jax.vmap(one)), jax.jit(scanned)):
    for a, b in zip(value_and_gradients(f), expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@TRANSFORMED
def test_vmap_over_one_argument_alone(implementation):
  """The others are shared: what is batched may differ from array to array; float32 to 1e-6."""
  q, k, v = normal(0, 3, 2, 5, 2, 4)
  bias = normal(1, 2, 2, 1, 1, 5)
  run = functools.partial(dot_product_attention, implementation=implementation)
  by_query = jax.vmap(lambda q: run(q[None], k[:1], v[:1], bias[0, :1]))(q)
  np.testing.assert_allclose(
    by_query[1, 0], run(q[1:], k[:1], v[:1], bias[0, :1])[0], rtol=1e-6, atol=1e-6
  )
  by_bias = jax.vmap(lambda bias: run(q, k, v, bias))(bias)
  np.testing.assert_allclose(by_bias[1], run(q, k, v, bias[1]), rtol=1e-6, atol=1e-6)


@TRANSFORMED_NAMES
def test_shards_over_batch_and_heads(name):
  """On 2 and 4 virtual devices; see `sharded.py`."""
  known = "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"  # As in setup.cfg.
  command = [sys.executable, "-W", "error", "-W", known, "-m", "tests.kernels.sharded", name]
  result = subprocess.run(command, env=simulated.devices(4), capture_output=True, text=True)
  assert result.returncode == 0, result.stderr


def test_a_short_call_is_one_block():
  """At most block_q block_kv pairs, whatever their shape, are computed without a loop."""
  run = functools.partial(dot_product_attention, is_causal=True, implementation=XlaChunked(4, 4))
  for S, is_one_block in ((8, True), (9, False)):
    q, k = jnp.ones((1, 2, 1, 4)), jnp.ones((1, S, 1, 4))
    assert ("while" not in jax.jit(run).lower(q, k, k).as_text()) == is_one_block


def test_absent_masks_cost_nothing():
  """The reference builds neither positions nor a mask where nothing is hidden."""
  q = jnp.ones((1, 4, 2, 8))
  plain = str(
    jax.make_jaxpr(functools.partial(dot_product_attention, implementation="xla"))(q, q, q)
  )
  assert "iota" not in plain
  assert "-inf" not in plain


Q, KV = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 5, 2, 8))
IDS = jnp.ones((2, 3), jnp.int32), jnp.ones((2, 5), jnp.int32)
ERRORS = {
  "window_float": ((Q, KV, KV), {"window": (2.5, None)}, r"window=\(2.5, None\)"),
  "max_distance": ((Q, KV, KV, RelativeBias(jnp.ones((8, 4)), True, 16.0)), {}, "an integer"),
  "class": ((Q, KV, KV), {"implementation": XlaChunked}, "nor a record"),
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
  "implementation": ((Q, KV, KV), {"implementation": "cuda"}, "'cuda' is not one of .*'xla'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_show_the_values(name):
  args, options, message = ERRORS[name]
  with pytest.raises(ValueError, match=message):
    dot_product_attention(*args, **options)


Q4 = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float32)
# What scales is told from what does not by its output.
QUARTER_MORE = Mistaken("scales", platforms=None)


def with_table(monkeypatch, **entries):
  """Puts entries before the table's."""
  table = {**entries, "xla_chunked": XlaChunked(), "xla": attention.IMPLEMENTATIONS["xla"]}
  monkeypatch.setattr(attention, "IMPLEMENTATIONS", table)
  attention.log_once.cache_clear()
  attention._warn_once.cache_clear()


def test_falls_through_to_the_first_that_serves(monkeypatch):
  with_table(monkeypatch, picky=Mistaken("refuses"), idle=Mistaken("is idle"), right=QUARTER_MORE)
  choice = choose(Q4, Q4, Q4)
  assert choice.default == choice.on("cpu") == choice.on("tpu") == QUARTER_MORE
  assert choice.refusals == (
    ("picky", "it needs a head dim of 77"),
    ("idle", "not worth it for so small a call"),
  )
  assert "; not picky: it needs a head dim of 77" in str(choice)


def test_naming_one_that_cannot_serve_says_why(monkeypatch):
  with_table(monkeypatch, picky=Mistaken("refuses"))
  with pytest.raises(NotImplementedError, match="mistaken cannot serve .* a head dim of 77"):
    choose(Q4, Q4, Q4, implementation="picky")
  # Whether it is worth it is for those to judge who name it.
  idle = Mistaken("is idle")
  assert choose(Q4, Q4, Q4, implementation=idle).default == idle


def test_nothing_that_serves_is_an_error(monkeypatch):
  monkeypatch.setattr(attention, "IMPLEMENTATIONS", {"picky": Mistaken("refuses")})
  with pytest.raises(NotImplementedError, match="'picky': 'it needs a head dim of 77'"):
    choose(Q4, Q4, Q4)


def test_the_choice_follows_the_platform_compiled_for(monkeypatch):
  """Not the machine that compiles: lowered for cpu and tpu, the program holds what is theirs.

  The first that serves a platform has it, also of one that has others besides.
  """
  first = Mistaken("scales", platforms=("tpu",))
  second = Mistaken("refuses me not", platforms=("cuda", "tpu"))
  with_table(monkeypatch, first=first, second=second)
  choice = choose(Q4, Q4, Q4)
  assert (choice.on("tpu"), choice.on("cuda")) == (first, second)
  assert choice.on("cpu") == choice.on("rocm") == choice.default == XlaChunked(4, 4)
  traced = jax.jit(dot_product_attention).trace(Q4, Q4, Q4)
  for platform, is_there in (("tpu", True), ("cpu", False)):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("1.250000e+00" in text) == is_there, platform


def test_a_kernel_for_a_gpu_that_is_not_known_is_replaced(monkeypatch, caplog):
  """With one warning that says what to do; whoever names it gets an error that does."""
  kernel = Mistaken("needs a GPU", platforms=("cuda",))
  with_table(monkeypatch, first=kernel)
  platforms._warn_once.cache_clear()
  what_to_do = "trace and lower under jax.sharding.use_abstract_mesh"
  loss = lambda q, **named: dot_product_attention(q, q, q, **named).sum()
  jax.jit(jax.grad(loss)).trace(Q4).lower(lowering_platforms=("cuda",))
  (record,) = caplog.records
  assert record.levelno == logging.WARNING
  assert what_to_do in record.getMessage()
  assert "xla_chunked serves instead" in record.getMessage()
  named = jax.jit(functools.partial(loss, implementation=kernel)).trace(Q4)
  with pytest.raises(NotImplementedError, match=what_to_do):
    named.lower(lowering_platforms=("cuda",))


def test_another_error_of_a_kernel_is_not_hidden(monkeypatch):
  with_table(monkeypatch, first=Mistaken("is broken", platforms=("cuda",)))
  # A function of its own: what is traced of one is kept, whatever the table is by then.
  traced = jax.jit(lambda q: dot_product_attention(q, q, q)).trace(Q4)
  with pytest.raises(RuntimeError, match="out of registers"):
    traced.lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("platforms", [("cpu", "tpu"), ("tpu",), ("cpu",), ("cuda", "cpu")])
def test_one_export_holds_the_program_of_each_platform(platforms):
  """With the kernel for TPUs among them, in both passes, and nothing of it where there is none."""
  q = jnp.ones((1, 256, 2, 64))
  loss = lambda q: dot_product_attention(q, q, q, is_causal=True).sum()
  exported = jax.export.export(jax.jit(jax.value_and_grad(loss)), platforms=platforms)(q)
  assert exported.mlir_module().count("tpu_custom_call") == 2 * ("tpu" in platforms)
  if "cpu" in platforms:
    for a, b in zip(exported.call(q), jax.value_and_grad(loss)(q), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_named_one_is_refused_where_it_does_not_run():
  """When the platform is known: asked for it, called, and lowered; elsewhere it is served."""
  q = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.float32)
  run = jax.jit(functools.partial(dot_product_attention, implementation="pallas_tpu"))
  choice = choose(q, q, q, implementation="pallas_tpu")
  for refused in (
    lambda: choice.on("cpu"),
    lambda: run.trace(q, q, q).lower(lowering_platforms=("cpu",)),
    lambda: jax.export.export(run, platforms=("tpu", "cpu"))(q, q, q),
  ):
    with pytest.raises(NotImplementedError, match="pallas_tpu runs on tpu, and .* for cpu: name"):
      refused()
  assert choice.on("tpu").name == "pallas_tpu"
  assert "tpu_custom_call" in run.trace(q, q, q).lower(lowering_platforms=("tpu",)).as_text()
  with pytest.raises(ValueError, match="platform='gpu' is not one of"):
    choice.on("gpu")


def test_vmap_within_vmap():
  """Over axes of different sizes, with gradients: as a call for each; float32 to 1e-5."""
  q, k = normal(0, 2, 3, 1, 5, 2, 4), normal(1, 3, 1, 5, 2, 4)
  loss = lambda q, k: dot_product_attention(q, k, k, is_causal=True).var()
  gradient = jax.grad(loss, (0, 1))
  found = jax.vmap(jax.vmap(gradient), (0, None))(q, k)
  for i, j in np.ndindex(2, 3):
    for a, b in zip(found, gradient(q[i, j], k[j]), strict=True):
      np.testing.assert_allclose(a[i, j], b, rtol=1e-5, atol=1e-6)


def test_sizes_that_are_not_known_while_tracing():
  """Are served by the reference, as one program for all of them."""
  B, T = jax.export.symbolic_shape("B, T")
  run = functools.partial(dot_product_attention, is_causal=True)
  q = jax.ShapeDtypeStruct((B, T, 2, 8), jnp.float32)
  exported = jax.export.export(jax.jit(run))(q, q, q)
  for x in (normal(0, 2, 5, 2, 8), normal(1, 1, 9, 2, 8)):
    np.testing.assert_allclose(exported.call(x, x, x), run(x, x, x), rtol=1e-5, atol=1e-6)


@ALL
@pytest.mark.parametrize("sizes", [(0, 3, 3), (2, 0, 3), (2, 3, 0)], ids=str)
def test_nothing_to_attend_to(implementation, sizes):
  """Empty arrays give empty ones; without keys, all queries see none."""
  B, T, S = sizes
  arrays = normal(0, B, T, 2, 4), normal(1, B, S, 2, 4), normal(2, B, S, 2, 4)
  bias = RelativeBias(normal(3, 8, 2), True, 6)
  run = functools.partial(dot_product_attention, return_lse=True, implementation=implementation)
  (out, lse), pull = jax.vjp(run, *arrays, bias)
  assert (out.shape, lse.shape) == ((B, T, 2, 4), (B, T, 2))
  assert (out == 0).all() and (lse == jnp.finfo(jnp.float32).min).all()
  gradients = jax.tree.leaves(pull((jnp.ones_like(out), jnp.ones_like(lse))))
  assert all((gradient == 0).all() for gradient in gradients)


@ALL
def test_integers_of_any_dtype(implementation):
  """An offset of few bits does not wrap; a length beyond all numbers hides nothing."""
  q, k, v = normal(0, 3, 2, 150, 2, 8)
  run = functools.partial(
    dot_product_attention,
    q,
    k,
    v,
    RelativeBias(normal(1, 8, 2), True, 20),
    implementation=implementation,
  )
  for offset in (jnp.uint8(200), jnp.int8(100)):
    np.testing.assert_allclose(run(q_offset=offset), run(q_offset=int(offset)), rtol=1e-6)
  for lengths in (np.full(2, np.iinfo(np.int64).max), np.full(2, np.iinfo(np.uint32).max)):
    np.testing.assert_array_equal(run(kv_lengths=lengths), run())


@ALL
def test_a_bias_of_the_lowest_number_forbids_nothing(implementation):
  """All pairs at the lowest finite number: the mean of all values, whatever the scale."""
  q, k, v = 1e-3 * normal(0, 3, 1, 5, 2, 8)
  table = jnp.full((8, 2), jnp.finfo(jnp.float32).min)
  out = dot_product_attention(q, k, v, RelativeBias(table), implementation=implementation)
  np.testing.assert_allclose(out, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-5)


def test_second_derivatives_say_what_to_do():
  q = normal(0, 1, 300, 2, 8)
  slope = jax.grad(lambda s: dot_product_attention(s * q, q, q).sum())
  with pytest.raises(NotImplementedError, match="differentiable once.*implementation='xla'"):
    jax.grad(slope)(1.0)
  with use_implementation("xla"):
    assert np.isfinite(jax.grad(slope)(1.0))


def test_choose_takes_shapes_and_all_options():
  q = jax.ShapeDtypeStruct((2, 1024, 8, 64), jnp.bfloat16)
  bias = RelativeBias(jax.ShapeDtypeStruct((32, 8), jnp.float32))
  lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
  choice = choose(q, q, q, bias, is_causal=True, kv_lengths=lengths, return_lse=True)
  assert choice.on("cpu").name == "xla_chunked"
  assert choice.on("tpu").name == "pallas_tpu"
  assert choice.on("tpu").block_q > 0
  with pytest.raises(ValueError, match="multiple of K=3"):
    choose(q, *[jax.ShapeDtypeStruct((2, 5, 3, 64), jnp.bfloat16)] * 2)


def test_what_was_chosen_is_logged_once(monkeypatch, caplog):
  with_table(monkeypatch, picky=Mistaken("refuses"))
  q = jnp.ones(Q4.shape)
  with caplog.at_level(logging.INFO, "magneto_jax.kernels"):
    dot_product_attention(q, q, q)
    dot_product_attention(2 * q, q, q)
  (record,) = caplog.records
  assert record.levelno == logging.INFO
  assert (
    record.getMessage() == f"attention by {XlaChunked(4, 4)}; not picky: it needs a head dim of 77"
  )


def test_use_implementation_reaches_through_jit():
  """What was traced under one name is traced again under another, and found again later."""
  q = normal(0, *Q4.shape)
  count = []

  @jax.jit
  def run(q):
    count.append(1)
    return dot_product_attention(q, q, q)

  plain = run(q)
  with use_implementation(QUARTER_MORE):
    np.testing.assert_allclose(run(q), 1.25 * plain, rtol=1e-6)
    with use_implementation("xla"):
      np.testing.assert_allclose(run(q), plain, rtol=1e-6)
    with use_implementation(None):
      np.testing.assert_array_equal(run(q), plain)
    named = jax.jit(functools.partial(dot_product_attention, implementation="xla"))(q, q, q)
    np.testing.assert_allclose(named, 1.25 * plain, rtol=1e-6)
    np.testing.assert_allclose(run(q), 1.25 * plain, rtol=1e-6)
  np.testing.assert_array_equal(run(q), plain)
  assert len(count) == 3


def test_use_implementation_ends_with_an_error_too():
  with pytest.raises(KeyError), use_implementation("xla"):
    raise KeyError
  assert choose(Q4, Q4, Q4).default.name == "xla_chunked"


def test_use_implementation_allows_forward_mode():
  """Which only the reference offers; the others say so."""
  q = normal(0, *Q4.shape)
  run = lambda q: dot_product_attention(q, q, q)
  with use_implementation("xla"):
    value, slope = jax.jvp(run, (q,), (q,))
  difference = (run(q * 1.01) - run(q * 0.99)) / 0.02
  np.testing.assert_allclose(slope, difference, rtol=1e-2, atol=1e-2)
  with pytest.raises(TypeError, match="custom_vjp"):
    jax.jvp(run, (q,), (q,))


def test_use_implementation_of_an_unknown_name():
  with pytest.raises(ValueError, match="'cuda' is not one of .*'xla'"), use_implementation("cuda"):
    pass
  assert choose(Q4, Q4, Q4).default.name == "xla_chunked"


@pytest.mark.parametrize("sides", [(0, 3), (3, -1), (2.0, 3)])
def test_blocks_are_positive_integers(sides):
  with pytest.raises(ValueError, match="must be a positive integer"):
    XlaChunked(*sides)


@pytest.mark.parametrize("name", ["scale", "logits_soft_cap", "dropout_rate"])
def test_numbers_are_known_while_tracing(name):
  """A JAX scalar is a number outside of jit, and an error within, which says so."""
  options = {"dropout_key": jax.random.key(0)} if name == "dropout_rate" else {}
  run = lambda x: dot_product_attention(Q, KV, KV, **{name: x}, **options)
  np.testing.assert_array_equal(run(jnp.float32(0.5)), run(0.5))
  with pytest.raises(ValueError, match=f"{name} must be known while tracing"):
    jax.jit(run)(0.5)
