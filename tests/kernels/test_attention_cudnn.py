"""cuDNN's attention without a GPU: what is asked of it, and all that is done around it.

cuDNN itself is emulated by its contract, in plain jax.numpy on the CPU; elsewhere programs are
lowered for CUDA and read.
"""

import contextlib
import json
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from magneto_jax.kernels import (
  Cudnn,
  RelativeBias,
  attention,
  attention_cudnn,
  choose,
  conformance,
  dot_product_attention,
  platforms,
  self_check,
)

BINDINGS = attention_cudnn._bindings()


@pytest.fixture
def found(monkeypatch):
  """A process whose GPU serves every head dim."""
  monkeypatch.setattr(attention_cudnn, "_check_device", lambda call: None)
  platforms._warn_once.cache_clear()


def logits(query, key, kv_seqlen, scale, mask_type, sliding_window_length):
  """(logits [B, N, T, S], where they count), as cuDNN defines both."""
  (_, T, N, _), (_, S, K, _) = query.shape, key.shape
  key = jnp.repeat(key, N // K, 2)
  A_BNTS = scale * jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
  key_index = jnp.arange(S)[None, None, None]
  distance = jnp.arange(T)[None, None, :, None] - key_index
  visible = jnp.ones((1, 1, T, S), bool)
  if "CAUSAL" in mask_type.name:
    visible &= distance >= 0
  if "PADDING" in mask_type.name:
    visible &= key_index < kv_seqlen[:, None, None, None]
  if sliding_window_length is not None:
    visible &= distance < sliding_window_length
  return A_BNTS, visible


def emulated_forward(query, key, value, kv_seqlen, *, scale, mask_type, **rest):
  """Rows that see nothing are no numbers."""
  check(query, rest)
  A, visible = logits(query, key, kv_seqlen, scale, mask_type, rest["sliding_window_length"])
  A = jnp.where(visible, A, -jnp.inf)
  lse = jax.nn.logsumexp(A, -1)
  value = jnp.repeat(value, query.shape[2] // value.shape[2], 2).astype(jnp.float32)
  out = jnp.einsum("bnts,bsnh->btnh", jnp.exp(A - lse[..., None]), value)
  return [out.astype(query.dtype), lse]


def emulated_backward(query, key, value, kv_seqlen, *, scale, mask_type, **rest):
  """What cuDNN leaves in the gradients of padding is no number."""
  check(query, rest)
  K, G = key.shape[2], query.shape[2] // key.shape[2]
  A, visible = logits(query, key, kv_seqlen, scale, mask_type, rest["sliding_window_length"])
  P = jnp.where(visible, jnp.exp(A - rest["activation"][..., None]), 0)
  q, k, v, out, dout = (
    x.astype(jnp.float32)
    for x in (query, jnp.repeat(key, G, 2), jnp.repeat(value, G, 2))
    + (rest["fwd_output"], rest["grad_output"])
  )
  dP = jnp.einsum("btnh,bsnh->bnts", dout, v)
  dA = P * (dP - jnp.einsum("btnh,btnh->bnt", dout, out)[..., None]) * scale
  dq = jnp.einsum("bnts,bsnh->btnh", dA, k)
  dk, dv = jnp.einsum("bnts,btnh->bsnh", dA, q), jnp.einsum("bnts,btnh->bsnh", P, dout)
  dk, dv = (x.reshape(*x.shape[:2], K, G, -1).sum(3) for x in (dk, dv))
  if "PADDING" in mask_type.name:
    padding = jnp.arange(key.shape[1])[None, :, None, None] >= kv_seqlen[:, None, None, None]
    dk, dv = jnp.where(padding, jnp.nan, dk), jnp.where(padding, jnp.nan, dv)
  return [x.astype(query.dtype) for x in (dq, dk, dv)]


def check(query, rest):
  """That no feature is asked for that the emulation lacks."""
  B, T, _, _ = query.shape
  assert (rest["dropout_rate"], rest["variadic_args"]) == (0, (False, False))
  assert rest["layout"] == BINDINGS.AttentionLayout.BTNH.value
  assert rest.get("is_training", True) and not rest.get("score_mod")
  assert all(rest[name].size == 0 for name in ("bias", "q_offsets", "page_table_k"))
  assert rest["q_seqlen"].shape in ((0,), (B,))


@pytest.fixture
def emulated(monkeypatch, found):
  """CuDNN on this platform."""
  monkeypatch.setattr(Cudnn, "platforms", (platforms.here(),))
  monkeypatch.setattr(BINDINGS, "_dot_product_attention_fwd_impl", emulated_forward)
  monkeypatch.setattr(BINDINGS, "_dot_product_attention_bwd_impl", emulated_backward)


def by_name(cases):
  return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def passes(case):
  """Out and gradients; lse is not asked for, as there would be no gradient of it."""
  outcome = conformance.run(case, "cudnn")
  assert outcome.passed, str(outcome)
  assert list(outcome.errors) == ["out", "dq", "dk", "dv"]


@by_name(conformance.FEW_EACH)
def test_every_feature(emulated, case):
  passes(case)


@pytest.mark.slow
@by_name(conformance.SUITE)
def test_every_pair_of_features(emulated, case):
  """Of those it has; of the rest of the suite, it refuses each case for a reason."""
  outcome = conformance.run(case, "cudnn")
  assert outcome.passed or outcome.refused.startswith("cudnn cannot serve this call: ")


def test_it_serves_most_of_its_part_of_the_suite(found):
  """So that the command on a GPU shows something."""
  served = 0
  for case in conformance.FEW_PAIRWISE:
    static, traced = case.options()
    with contextlib.suppress(NotImplementedError):
      choose(*case.arrays(), implementation="cudnn", **static, **traced)
      served += 1
  assert served >= 25


def test_first_use_is_checked_without_what_it_lacks(emulated, monkeypatch):
  """And finds a mistake there."""
  monkeypatch.setattr(self_check, "_found", {})
  (device, *_) = jax.devices()
  assert self_check.self_check(Cudnn(), device) is None

  def wrong(*arrays, scale, **rest):
    return emulated_backward(*arrays, scale=1.2 * scale, **rest)

  monkeypatch.setattr(self_check, "_found", {})
  monkeypatch.setattr(BINDINGS, "_dot_product_attention_bwd_impl", wrong)
  assert self_check.self_check(Cudnn(), device).startswith("differs from xla in dq by")


def test_vmap_is_a_call_with_more_rows(emulated):
  """Over all arrays or some of them: as a call for each, to two roundings to bfloat16."""
  rng = np.random.default_rng(0)
  q = jnp.asarray(rng.normal(size=(2, 3, 2, 7, 4, 8)), jnp.bfloat16)
  k, v = jnp.asarray(rng.normal(size=(2, 2, 2, 7, 2, 8)), jnp.bfloat16)
  lengths = jnp.array([[7, 3], [0, 5], [4, 4]])

  def loss(q, k, v, lengths):
    options = dict(is_causal=True, kv_lengths=lengths, implementation="cudnn")
    return (dot_product_attention(q, k, v, **options).astype(jnp.float32) ** 2).sum()

  gradient = jax.grad(loss, (0, 1, 2))
  both = jax.vmap(jax.vmap(gradient, (0, None, None, 0)), (0, 0, 0, None))
  found = jax.jit(both)(q, k, v, lengths)
  single = jax.jit(gradient)
  for i, j in np.ndindex(2, 3):
    for a, b in zip(found, single(q[i, j], k[i], v[i], lengths[j]), strict=True):
      a, b = (np.asarray(x, np.float32) for x in (a[i, j], b))
      np.testing.assert_allclose(a, b, rtol=2**-7, atol=2**-7)
      np.testing.assert_array_equal(a[np.asarray(lengths[j]) == 0], 0)


Q = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
KV = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)


def like(x, **fields):
  """A shape with other sizes or dtype: T, H, dtype."""
  B, T, N, H = x.shape
  shape = B, fields.get("T", T), N, fields.get("H", H)
  return jax.ShapeDtypeStruct(shape, fields.get("dtype", x.dtype))


LENGTHS = jax.ShapeDtypeStruct((2,), jnp.int32)
IDS = jax.ShapeDtypeStruct((2, 256), jnp.int32)
SERVED = {
  "plain": {},
  "grouped, more keys": dict(q=like(Q, T=128), is_causal=True),
  "fewer keys": dict(q=like(Q, T=300), is_causal=True),
  "lengths": dict(kv_lengths=LENGTHS),
  "window": dict(is_causal=True, window=(9, None)),
  "window, more keys": dict(q=like(Q, T=128), is_causal=True, window=(9, 3)),
  "offset that hides nothing": dict(q_offset=3),
  "float16": dict(q=like(Q, dtype=jnp.float16), k=like(KV, dtype=jnp.float16)),
}
REFUSED = {
  "float32": (
    dict(q=like(Q, dtype=jnp.float32), k=like(KV, dtype=jnp.float32)),
    "float32 is neither bfloat16 nor float16",
  ),
  "head dim": (dict(q=like(Q, H=60), k=like(KV, H=60)), "head dim 60 is not a multiple of 8"),
  "dense bias": (dict(bias=jnp.zeros((1, 1, 256, 256))), "slow with a bias"),
  "relative bias": (dict(bias=RelativeBias(jnp.zeros((32, 4)))), "slow with a bias"),
  "dropout": (dict(dropout_rate=0.1, dropout_key=jax.random.key(0)), "other probabilities"),
  "soft cap": (dict(logits_soft_cap=3.0), "no soft cap"),
  "segments": (dict(q_segment_ids=IDS, kv_segment_ids=IDS), "no segments"),
  "offset": (dict(is_causal=True, q_offset=3), "no offset"),
  "traced offset": (dict(is_causal=True, q_offset=jnp.int32(0)), "no offset"),
  "window": (dict(window=(9, 9)), r"window \(9, 9\) ends elsewhere"),
  "window to the left": (dict(window=(9, None)), r"window \(9, None\) ends elsewhere"),
  "window and lengths": (
    dict(is_causal=True, window=(9, None), kv_lengths=LENGTHS),
    r"window \(9, 0\) may end behind the last key",
  ),
  "window and fewer keys": (
    dict(q=like(Q, T=300), is_causal=True, window=(9, None)),
    r"window \(9, 0\) may end behind the last key",
  ),
  "scale": (dict(scale=-0.1), "scale -0.1 is not positive"),
  "lse": (dict(return_lse=True), "takes no gradient of lse"),
}


def chosen(q=Q, k=KV, bias=None, **options):
  return choose(q, k, k, bias, **options)


@pytest.mark.parametrize("name", SERVED)
def test_what_it_serves(found, name):
  """By default too: on CUDA, and there alone."""
  assert chosen(**SERVED[name], implementation="cudnn").on("cuda") == Cudnn()
  choice = chosen(**SERVED[name])
  assert choice.on("cuda") == Cudnn()
  assert {choice.on(name).name for name in ("cpu", "rocm")} == {"xla_chunked"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_refuses(found, name):
  """With a reason; others serve."""
  options, reason = REFUSED[name]
  with pytest.raises(NotImplementedError, match=f"cudnn cannot serve this call: .*{reason}"):
    chosen(**options, implementation="cudnn")
  choice = chosen(**options)
  assert choice.on("cuda").name != "cudnn"
  assert re.search(reason, dict(choice.refusals)["cudnn"])


def test_small_calls_are_left_to_others(found):
  q = jax.ShapeDtypeStruct((2, 127, 2, 64), jnp.bfloat16)
  assert choose(q, q, q).on("cuda").name != "cudnn"


class Device:
  """For what asks no more of it."""

  def __init__(self, capability):
    self.compute_capability = capability


@pytest.mark.parametrize(
  "here, capability, H, refusal",
  [
    ("cuda", "9.0", 256, None),
    ("cuda", "8.0", 128, None),
    ("cuda", "12.0", 128, None),
    ("cuda", "8.9", 136, "head dim 136 is over 128, at compute capability 8.9"),
    ("cuda", "9.0", 264, "head dim 264 is over 256"),
    ("cuda", "10.0", 256, "head dim 256 is over 128"),
    ("cuda", "7.5", 64, "compute capability 7.5 is below 8.0"),
    ("cuda", "10.3", 64, "compute capability 10.3 needs cuDNN 9.11, and this is 91000"),
    ("cpu", None, 64, "only a process with an NVIDIA GPU"),
    ("rocm", None, 64, "only a process with an NVIDIA GPU"),
  ],
)
def test_the_device_decides(monkeypatch, here, capability, H, refusal):
  monkeypatch.setattr(platforms, "here", lambda: here)
  monkeypatch.setattr(jax, "local_devices", lambda: [Device(capability)])
  monkeypatch.setattr(BINDINGS, "check_cudnn_version", lambda: 91000)
  context = contextlib.nullcontext()
  if refusal is not None:
    context = pytest.raises(NotImplementedError, match=refusal)
  with context:
    chosen(q=like(Q, H=H), k=like(KV, H=H), implementation="cudnn")


def test_without_cudnn_others_serve(monkeypatch):
  def missing():
    raise RuntimeError("cuDNN is not detected.")

  monkeypatch.setattr(platforms, "here", lambda: "cuda")
  monkeypatch.setattr(BINDINGS, "check_cudnn_version", missing)
  assert dict(chosen().refusals)["cudnn"] == "cuDNN is not detected."


@pytest.mark.parametrize(
  "name, changed",
  [
    ("_dot_product_attention_fwd_impl", lambda query, key, value: None),
    ("_dot_product_attention_bwd_impl", None),
    ("MaskType", None),
    ("check_cudnn_version", None),
  ],
)
def test_another_interface_is_refused(monkeypatch, name, changed):
  """Whatever a later JAX changes or takes away; what the installed one has is known."""
  if changed is None:
    monkeypatch.delattr(BINDINGS, name)
  else:
    monkeypatch.setattr(BINDINGS, name, changed)
  with pytest.raises(NotImplementedError, match=f"jax {jax.__version__} has another interface"):
    attention_cudnn._bindings.__wrapped__()


CUSTOM_CALL = re.compile(r'custom_call @(\S*cudnn\S*?)\((.*?)\).*?backend_config = "(\{.*?\})"')


def lowered(function, *arrays) -> list[tuple]:
  """(target, number of arrays, mask, window, scale, B) of each call of cuDNN, for CUDA."""
  text = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
  calls = []
  for target, operands, config in CUSTOM_CALL.findall(text):
    config = json.loads(config.replace(r"\22", '"'))["cudnn_fmha_backend_config"]
    B = int(config["intermediate_tensor_shape"]["dimensions"][0])
    said = (config[name] for name in ("mask_type", "sliding_window_length", "fmha_scale"))
    calls.append((target, operands.count("%"), *said, B))
  return calls


FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


def gradient(**options):
  def loss(q, k, lengths=None):
    given = options if lengths is None else options | {"kv_lengths": lengths}
    return dot_product_attention(q, k, k, **given).astype(jnp.float32).sum()

  return jax.grad(loss, (0, 1))


@pytest.mark.parametrize(
  "options, mask, window",
  [
    ({}, "NO_MASK", 0),
    ({"is_causal": True, "scale": 0.5}, "CAUSAL", 0),
    ({"is_causal": True, "window": (9, 3)}, "CAUSAL", 10),
    ({"lengths": True}, "PADDING", 0),
    ({"lengths": True, "is_causal": True}, "PADDING_CAUSAL", 0),
  ],
)
def test_what_cudnn_is_asked_for(found, options, mask, window):
  """In both passes; the forward pass is not run again in the second."""
  arrays = (Q, KV, LENGTHS) if options.pop("lengths", False) else (Q, KV)
  lengths = 2 * (len(arrays) == 3)
  asked = mask, window, options.get("scale", 0.125), 2
  expected = [(FORWARD, 3 + lengths, *asked), (BACKWARD, 6 + lengths, *asked)]
  assert lowered(gradient(**options), *arrays) == expected


def batched(x, *sizes):
  return jax.ShapeDtypeStruct((*sizes, *x.shape), x.dtype)


def sharded(function):
  mesh = jax.sharding.AbstractMesh((2,), ("rows",), (jax.sharding.AxisType.Auto,))
  return jax.shard_map(function, mesh=mesh, in_specs=P("rows"), out_specs=P("rows"))


TRANSFORMED = {
  "vmap": (jax.vmap(jax.vmap(gradient(), (0, None))), (batched(Q, 3, 5), batched(KV, 3)), 30),
  "scan of remat": (
    jax.grad(
      lambda q, k: jax.lax.scan(
        jax.checkpoint(lambda c, q: (c + dot_product_attention(q, k, k).sum(), None)),
        jnp.zeros((), q.dtype),
        q,
      )[0]
    ),
    (batched(Q, 3), KV),
    2,
  ),
  "shard_map": (sharded(gradient()), (Q, KV), 1),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_it_is_lowered_within_transformations(found, name):
  function, arrays, rows = TRANSFORMED[name]
  calls = lowered(function, *arrays)
  assert {call[0] for call in calls} == {FORWARD, BACKWARD}
  assert {call[-1] for call in calls} == {rows}


def test_several_devices_without_shard_map_are_served_by_another(found, caplog):
  """Which XLA can divide, with one warning; whoever names it gets an error."""
  mesh = jax.sharding.AbstractMesh((2,), ("rows",), (jax.sharding.AxisType.Auto,))
  q, k = (
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, P("rows")))
    for x in (Q, KV)
  )
  assert lowered(gradient(), q, k) == []
  (record,) = caplog.records
  assert "cudnn among several devices" in record.getMessage()
  assert "xla_chunked serves instead" in record.getMessage()
  with pytest.raises(NotImplementedError, match="cudnn among several devices.*jax.shard_map"):
    lowered(gradient(implementation="cudnn"), q, k)


def test_an_export_holds_another(found, caplog):
  """As JAX refuses to export calls of cuDNN."""
  exported = jax.export.export(jax.jit(gradient()), platforms=("cuda", "cpu"))(Q, KV)
  assert "custom_call" not in exported.mlir_module()
  assert "cannot export cudnn; xla_chunked serves instead" in caplog.text
  with pytest.raises(NotImplementedError, match="cannot export cudnn"):
    named = jax.jit(gradient(implementation="cudnn"))
    jax.export.export(named, platforms=("cuda",))(Q, KV)


def test_it_comes_before_what_serves_everything():
  names = list(attention.IMPLEMENTATIONS)
  assert names.index("cudnn") < names.index("xla_chunked")
