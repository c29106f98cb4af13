"""How the kernels for NVIDIA GPUs are cut; that they compute the right numbers is the suite's."""

import math

import jax
import jax.numpy as jnp
import pytest

from magneto_jax.kernels import Blocks, PallasGpu, RelativeBias, attention_gpu, choose, conformance
from magneto_jax.kernels.call import Call
from magneto_jax.kernels.conformance import Case


def call(T, S, H=64, bias=None, dtype=jnp.bfloat16) -> Call:
  q, k = (jax.ShapeDtypeStruct((1, n, 2, H), dtype) for n in (T, S))
  return Call(q_BTNH=q, k_BSKH=k, v_BSKH=k, bias=bias)


@pytest.mark.parametrize(
  "sides, message",
  [
    ((48, 64), "q=48 must be a power of two of at least 16"),
    ((64, 8), "kv=8 must be a power of two of at least 16"),
    ((64, 64.0), "kv=64.0 must be a power of two"),
    ((64, 64, 3), "warps=3 must be a power of two of at least 1"),
    ((64, 64, 4, 0), "stages=0 must be an integer of at least 1"),
    ((64, 64, 4, 1.5), "stages=1.5 must be an integer of at least 1"),
  ],
)
def test_blocks_that_cannot_be(sides, message):
  with pytest.raises(ValueError, match=message):
    Blocks(*sides)
  assert Blocks(16, 64, 1, 3).stages == 3


def test_blocks_are_no_longer_than_the_call():
  """Nor shorter than a side of a product of tensor cores; a relative bias's are square."""
  given = PallasGpu(*[Blocks(128, 64)] * 4)
  fitted = given.fitted(call(3, 40))
  assert {(x.q, x.kv) for x in (fitted.out, fitted.dkv, fitted.dq)} == {(16, 64)}
  fitted = given.fitted(call(500, 40, bias=RelativeBias(jnp.zeros((8, 2)), True, 20)))
  assert (fitted.out.q, fitted.out.kv) == (128, 64)
  assert (fitted.dbias.q, fitted.dbias.kv) == (128, 128)


def test_blocks_are_blocks():
  with pytest.raises(ValueError, match=r"dq=\(64, 64\) must be kernels.Blocks\(..\), or None"):
    PallasGpu(dq=(64, 64))
  with pytest.raises(ValueError, match="warps=True must be a power of two"):
    Blocks(64, 64, True)


@pytest.mark.parametrize("T, S, serves", [(1, 16384, False), (63, 4096, False), (64, 256, True)])
def test_decoding_is_left_to_xla(T, S, serves):
  """However long the cache is."""
  assert PallasGpu().is_worthwhile(call(T, S)) == serves


@pytest.mark.parametrize("traced", [False, True])
def test_a_far_max_distance_takes_no_memory(traced):
  """No more tiles of the bias's gradient than the lengths have diagonals of blocks."""
  q = jnp.zeros((1, 256, 2, 16), jnp.bfloat16)
  program = jax.make_jaxpr(PallasGpu(interpret=True).backward)
  given = Call(
    q_BTNH=q,
    k_BSKH=q,
    v_BSKH=q,
    bias=RelativeBias(jnp.zeros((32, 2)), True, 10**7),
    traced_offset=jnp.int32(5) if traced else None,
    static_offset=0 if traced else 5,
  )
  lse = jnp.zeros((1, 256, 2))
  sizes = [
    math.prod(out.aval.shape)
    for equation in program(given, q, lse, q, lse).jaxpr.eqns
    for out in equation.outvars
  ]
  assert max(sizes) < 2**21


def test_heads_too_wide_are_refused():
  q = jax.ShapeDtypeStruct((1, 512, 2, 264), jnp.bfloat16)
  with pytest.raises(NotImplementedError, match="a head of 264 numbers does not fit .*; 256 do"):
    choose(q, q, q, implementation="pallas_gpu")


def test_the_table_has_blocks_for_every_call():
  """Whatever the GPU; and what it says of one is of kernels that are there."""
  table = attention_gpu.blocks_table()
  kernels = dict.fromkeys(("relative", "dense"), attention_gpu.KERNELS)
  kernels |= {"none": tuple(x for x in attention_gpu.KERNELS if x != "dbias")}
  for capability, widths in table.items():
    assert set(widths) <= {"64", "128", "256"}
    assert capability or set(widths) == {"64", "128", "256"}
    for features in widths.values():
      assert set(features) <= set(kernels)
      assert capability or set(features) == set(kernels)
      for feature, found in features.items():
        assert set(found) <= set(kernels[feature])
        assert capability or set(found) == set(kernels[feature])
        assert all(Blocks(*blocks) for blocks in found.values())


def test_the_table_is_asked_for_the_gpu_that_is_there(monkeypatch):
  """Of a kind that has no entry, or where there is none, it is the entry for all."""
  table = attention_gpu.blocks_table()
  for capability, entry in (("9.0", "9.0"), ("12.1", ""), ("", "")):
    monkeypatch.setattr(attention_gpu, "_capability", lambda capability=capability: capability)
    expected = table[""]["64"]["none"] | table[entry]["64"]["none"]
    fitted = PallasGpu().fitted(call(4096, 4096))
    assert {name: getattr(fitted, name) for name in expected} == {
      name: Blocks(*blocks) for name, blocks in expected.items()
    }


# Each kernel cut otherwise, in blocks that are longer one way or the other.
OBLONG = PallasGpu(Blocks(64, 16), Blocks(16, 64), Blocks(32, 128), Blocks(32, 32), interpret=True)
TURNED = PallasGpu(Blocks(16, 64), Blocks(64, 16), Blocks(128, 32), Blocks(64, 64), interpret=True)
BASE = dict(B=1, T=150, S=170, N=2, K=1, H=16, max_distance=40)
CUT = [
  Case(f"cut, {name}", **BASE | fields)
  for name, fields in {
    "bias": dict(bias="per head", dropout_rate=0.2),
    "relative": dict(bias="relative", dropout_rate=0.2),
    "relative causal": dict(bias="relative causal", is_causal=True, q_offset=20),
    # A window whose last distance is the first that is far, and one that ends before it.
    "window as far": dict(bias="relative", window=(40, 40)),
    "window not as far": dict(bias="relative", window=(39, 39)),
    "window to the right": dict(bias="relative", window=(None, 25), q_offset=-30),
    # Every distance below the last has a bucket of its own: a bound that is off by one is felt.
    "all near": dict(bias="relative", max_distance=9, num_buckets=32),
    "all near, causal": dict(
      bias="relative causal", max_distance=17, is_causal=True, traced_offset=True, q_offset=9
    ),
    # Blocks whose nearest pair is the last that is near.
    "blocks at the bounds": dict(T=128, S=128, bias="relative", max_distance=34, num_buckets=132),
    "documents": dict(segments="packed", kv_lengths=(100,), is_causal=True),
    # More rows of blocks than parts of the bias's sum, and not a multiple of them.
    "farther than the lengths": dict(bias="relative", max_distance=5_000, q_offset=-60),
    "farther, traced": dict(
      bias="relative causal", max_distance=5_000, q_offset=90, traced_offset=True
    ),
    "many parts": dict(B=8, N=4, K=2, bias="relative", window=(20, 20)),
    "parts of a dense bias": dict(B=3, N=7, K=7, bias="shared"),
  }.items()
]


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [OBLONG, TURNED], ids=["oblong", "turned"])
@pytest.mark.parametrize("case", CUT, ids=lambda case: case.name)
def test_any_blocks_serve(implementation, case):
  outcome = conformance.run(case, implementation)
  assert outcome.passed, str(outcome)
