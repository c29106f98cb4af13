"""Attention over a mesh is attention: on 8 simulated devices, and compiled for 4 chips.

All cases run in one subprocess, this file run as a module: how many devices there are is fixed when
JAX starts.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from magneto_jax import kernels
from magneto_jax.kernels import attention, jax_names, ring
from tests import simulated
from tests.kernels import elsewhere
from tests.kernels.implementations import ENTRIES

AXES = ("data", "tensor", "sequence")


@dataclasses.dataclass(frozen=True)
class Case:
  """A call, over a mesh and on one device.

  Attributes:
    mesh: devices along data, tensor and sequence.
    sizes: B, T, S, N, K, H.
    bias: the shape of a dense one, or the arguments of a RelativeBias with its number of buckets.
    masks: which arrays hide something: segments, lengths.
    options: of `dot_product_attention`.
    offset: of the queries, traced.
    implementation: of the mesh; the one device has `xla`.
  """

  mesh: tuple[int, int, int]
  sizes: tuple[int, int, int, int, int, int]
  bias: tuple | None = None
  masks: tuple[str, ...] = ()
  options: dict = dataclasses.field(default_factory=dict)
  offset: int | None = None
  implementation: object = "xla_chunked"
  dtype: str = "float64"


CAUSAL, DROPOUT = {"is_causal": True}, {"dropout_rate": 0.3}
EIGHT, FOUR_BY_TWO, TWO_BY_FOUR = (1, 1, 8), (1, 2, 4), (2, 1, 4)
CASES = {
  "causal, relative, dropout": Case(
    EIGHT, (2, 16, 16, 2, 1, 4), (8, True, 6), (), CAUSAL | DROPOUT
  ),
  "causal, padding, dense": Case(
    TWO_BY_FOUR, (2, 12, 12, 4, 2, 4), (2, 4, 12, 12), ("segments", "lengths"), CAUSAL
  ),
  "soft cap, more keys": Case(
    TWO_BY_FOUR, (4, 8, 20, 2, 2, 4), (4, 1, 1, 20), ("lengths",), {"logits_soft_cap": 2.0}
  ),
  "one key head, window": Case(
    FOUR_BY_TWO, (2, 12, 12, 4, 1, 4), (8, False, 5), ("segments",), DROPOUT | {"window": (2, 2)}
  ),
  "float32": Case(
    EIGHT, (1, 32, 32, 2, 2, 8), options=CAUSAL, implementation=None, dtype="float32"
  ),
}
MORE = {
  "plain": Case(EIGHT, (1, 16, 16, 2, 2, 4)),
  "window": Case(EIGHT, (1, 16, 16, 2, 1, 4), (1, 2, 16, 16), (), {"window": (3, 0)} | DROPOUT),
  "traced offset": Case(
    TWO_BY_FOUR, (2, 8, 16, 2, 1, 4), (8, True, 6), ("lengths",), CAUSAL | DROPOUT, offset=5
  ),
  "known offset": Case(
    TWO_BY_FOUR, (2, 16, 8, 2, 1, 4), (1, 1, 16, 1), (), CAUSAL | {"q_offset": -2, "scale": 0.7}
  ),
  "differentiated by JAX": Case(
    FOUR_BY_TWO,
    (2, 12, 12, 4, 2, 4),
    (8, True, 6),
    ("segments", "lengths"),
    CAUSAL | DROPOUT,
    implementation="xla",
  ),
  "keys not cut": Case(
    FOUR_BY_TWO,
    (1, 8, 10, 4, 2, 4),
    (8, True, 6),
    ("segments",),
    CAUSAL | DROPOUT | {"q_offset": 2},
  ),
  "two key heads for four": Case((1, 4, 2), (1, 8, 8, 8, 2, 4), (1, 8, 1, 1), (), DROPOUT),
  "heads that do not fit": Case((1, 4, 2), (1, 8, 8, 12, 3, 4), (8, True, 6), (), DROPOUT),
  "nothing cut": Case((2, 2, 2), (3, 1, 5, 3, 3, 4), None, (), CAUSAL | DROPOUT | {"q_offset": 4}),
}
for _name in ("pallas_tpu", "pallas_gpu"):
  MORE[f"{_name}, interpreted"] = Case(
    (1, 1, 3),
    (2, 12, 12, 2, 1, 4),
    (8, True, 6),
    ("segments", "lengths"),
    CAUSAL | DROPOUT,
    implementation=ENTRIES[_name].small,
    dtype="float32",
  )
SUITES = {"cases": CASES, "more": MORE}


def arrays_of(case: Case) -> tuple[dict, dict]:
  """What is differentiated, and what is not."""
  rng = np.random.default_rng(0)
  B, T, S, N, K, H = case.sizes
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), case.dtype)
  arrays = {"q": normal(B, T, N, H), "k": normal(B, S, K, H), "v": normal(B, S, K, H)}
  if case.bias is not None and len(case.bias) == 4:
    arrays["bias"] = normal(*case.bias)
    # Some pairs are forbidden, but not all of a query's.
    arrays["bias"] = jnp.where(arrays["bias"] < -1, -jnp.inf, arrays["bias"])
  elif case.bias is not None:
    buckets, *rest = case.bias
    arrays["bias"] = kernels.RelativeBias(normal(buckets, N), *rest)
  rest = {}
  if "segments" in case.masks:
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (B, max(T, S)))), jnp.int32)
    rest |= {"q_segment_ids": ids[:, :T], "kv_segment_ids": ids[:, :S]}
  if "lengths" in case.masks:
    # Some keys, none, all.
    rest["kv_lengths"] = jnp.asarray(np.resize([S // 2 + 1, 0, S, 3], B), jnp.int32)
  if case.offset is not None:
    rest["q_offset"] = jnp.int32(case.offset)
  if "dropout_rate" in case.options:
    rest["dropout_key"] = jax.random.key(3)
  return arrays, rest


def differences(case: Case) -> dict[str, float]:
  """Relative, in norm, of the results and of the gradients of q, k, v and the bias."""
  arrays, rest = arrays_of(case)
  B, T, _, N, _, H = case.sizes
  rng = np.random.default_rng(1)
  cotangents = jnp.asarray(rng.normal(size=(B, T, N, H)), case.dtype), rng.normal(size=(B, T, N))
  mesh = jax.make_mesh(
    case.mesh,
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=jax.devices()[: math.prod(case.mesh)],
  )
  over_mesh = functools.partial(
    kernels.sharded_attention,
    mesh=mesh,
    batch=("data",),
    heads=("tensor",),
    length="sequence",
    implementation=case.implementation,
  )
  on_one = functools.partial(kernels.dot_product_attention, implementation="xla")

  @functools.partial(jax.jit, static_argnums=0)
  def passes(attention, arrays, rest):
    def attend(arrays):
      q, k, v, bias = (arrays.get(name) for name in ("q", "k", "v", "bias"))
      return attention(q, k, v, bias, **rest, **case.options, return_lse=True)

    (out, lse), vjp = jax.vjp(attend, arrays)
    # Queries that see nothing have the lowest lse, which is the same and too large for a norm.
    seen = lse > jnp.finfo(lse.dtype).min
    (gradients,) = vjp((cotangents[0], jnp.asarray(cotangents[1], lse.dtype)))
    return {"out": out, "lse": jnp.where(seen, lse, 0), "seen": seen} | gradients

  found, expected = passes(over_mesh, arrays, rest), passes(on_one, arrays, rest)
  np.testing.assert_array_equal(found.pop("seen"), expected.pop("seen"))

  def difference(a, b):
    (a,), (b,) = (map(np.asarray, jax.tree.leaves(x)) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))

  return {name: difference(found[name], expected[name]) for name in expected}


def run(suite: str) -> None:
  """Prints one line of JSON a case: what differs by how much, or its error."""
  for name, case in SUITES[suite].items():
    try:
      with jax_names.enable_x64(case.dtype == "float64"):
        found = differences(case)
    except Exception as error:  # Whatever it is: the case's own test shows it.
      found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({"name": name} | found), flush=True)


@functools.cache
def measured(suite: str) -> dict[str, dict]:
  """What `run` printed, by case."""
  variables = simulated.devices(8)
  return elsewhere.compiled_apart("tests.kernels.test_ring", suite, variables, timeout=1200)


# One worker has all, which one process computes.
@pytest.mark.xdist_group("ring")
@pytest.mark.parametrize(
  "suite, name",
  [
    pytest.param(suite, name, id=name, marks=[pytest.mark.ci] * (suite == "more"))
    for suite, cases in SUITES.items()
    for name in cases
  ],
)
def test_a_mesh_computes_what_one_device_does(suite, name):
  """Results and gradients, in norm: float64 to 1e-13, float32 to 1e-6."""
  found = measured(suite)[name]
  assert "error" not in found, found["error"]
  tolerance = {"float64": 1e-13, "float32": 1e-6}[SUITES[suite][name].dtype]
  assert all(difference < tolerance for difference in found.values()), found


# T, S, parts, options: ways.
WAYS = {
  "everybody sees all": ((2, 2, 8, {}), ((1, 7),)),
  "causal": ((2, 2, 8, CAUSAL), ((1, 7),)),
  "causal, one part back": ((4, 4, 8, CAUSAL | {"window": (4, None)}), ((1, 1),)),
  "causal, a key further": ((4, 4, 8, CAUSAL | {"window": (5, None)}), ((1, 2),)),
  "itself alone": ((4, 4, 8, CAUSAL | {"window": (0, None)}), ()),
  "both sides": ((4, 4, 8, {"window": (3, 5)}), ((1, 1), (-1, 2))),
  "ahead": ((4, 4, 8, {"window": (0, 4)}), ((-1, 1),)),
  "both sides meet": ((4, 4, 4, {"window": (5, 4)}), ((1, 3),)),
  "traced": ((4, 4, 4, {"window": (4, 0), "q_offset": jnp.int32(0)}), ((1, 3),)),
  "offset of two parts": ((4, 4, 8, {"window": (0, 0), "q_offset": -8}), ((1, 2),)),
}


@pytest.mark.parametrize("given, ways", WAYS.values(), ids=WAYS)
def test_keys_travel_as_far_as_they_are_seen(given, ways):
  T, S, parts, options = given
  q, k = jnp.zeros((1, T, 1, 4)), jnp.zeros((1, S, 1, 4))
  assert ring.ways(attention.checked_call(q, k, k, None, **options), parts) == ways


def one_device():
  auto = (jax.sharding.AxisType.Auto,) * 3
  return jax.make_mesh((1, 1, 1), AXES, axis_types=auto, devices=jax.devices()[:1])


def test_nothing_to_attend_to_is_as_without_a_mesh():
  q, k = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 0, 4, 8))
  run = functools.partial(kernels.sharded_attention, mesh=one_device(), length="sequence")
  out, lse = run(q, k, k, return_lse=True)
  assert not out.any() and (lse == jnp.finfo(jnp.float32).min).all()


@pytest.mark.parametrize(
  "axes",
  [{"batch": ("rows",)}, {"batch": ("data",), "length": "data"}, {"heads": ("tensor", "tensor")}],
  ids=str,
)
def test_axes_must_be_there_and_differ(axes):
  q = jnp.ones((2, 3, 4, 8))
  with pytest.raises(ValueError, match="must be different axes of .'data', 'tensor', 'sequence'."):
    kernels.sharded_attention(q, q, q, mesh=one_device(), **axes)


CHIPS = "v5e:2x2"


def compile_for_chips() -> None:
  """Prints, of a causal ring of 4 chips, forwards and backwards, what its program holds."""
  devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS).devices
  mesh = jax.sharding.Mesh(np.array(devices), ("sequence",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "sequence"))
  x = jax.ShapeDtypeStruct((1, 2048, 2, 128), jnp.bfloat16, sharding=sharding)

  def loss(q, k, v, key):
    options = dict(mesh=mesh, length="sequence", dropout_rate=0.1, dropout_key=key)
    return kernels.sharded_attention(q, k, v, is_causal=True, **options).sum()

  gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
  text = gradient.lower(x, x, x, jax.random.key(0)).compile().as_text()
  # Of each loop's body, in the order of execution, what is sent or attended.
  event = re.compile(r" (collective-permute-(?:start|done)|custom-call)\(")
  bodies = [
    [found[0] for line in body.splitlines() if (found := event.findall(line))]
    for body in re.findall(r"^%[^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
  ]
  found = {
    "kernels": text.count('"tpu_custom_call"'),
    "permutes": text.count(" collective-permute-start("),
    "others": [x for x in ("all-gather", "all-to-all", "all-reduce") if f" {x}" in text],
    "bodies": [body for body in bodies if "collective-permute-start" in body],
  }
  print(json.dumps({"name": CHIPS} | found))


@pytest.mark.ci
@elsewhere.ONE_AT_A_TIME
def test_chips_send_the_next_keys_while_they_attend():
  """Each pass: its own keys, the loop, the last ones. In each loop all that is sent is on its way
  while the kernel runs: keys and values, and backwards their gradients.
  """
  assert importlib.util.find_spec("libtpu"), "no TPU compiler: pip install -e '.[tpu]'"
  module = "tests.kernels.test_ring"
  found = elsewhere.compiled_apart(module, CHIPS, elsewhere.LIBTPU, timeout=600)[CHIPS]
  assert (found["kernels"], found["others"]) == (6, [])
  starts, dones = (f"collective-permute-{x}" for x in ("start", "done"))
  assert found["bodies"] == [[starts] * n + ["custom-call"] + [dones] * n for n in (2, 4)]


if __name__ == "__main__":
  compile_for_chips() if sys.argv[1] == CHIPS else run(sys.argv[1])
