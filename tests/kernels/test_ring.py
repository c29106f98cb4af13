"""Attention over a mesh is attention: on 8 simulated devices, and compiled for 4 chips.

All cases run in one subprocess, this file run as a module: how many devices there are is fixed when
JAX starts.
"""

import dataclasses
import functools
import json
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax import kernels

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
    hops: how many times keys are sent forwards, in the program; None to leave it unchecked.
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
  "plain": Case(EIGHT, (1, 16, 16, 2, 2, 4)),
  "causal, relative, dropout": Case(
    EIGHT, (2, 16, 16, 2, 1, 4), (8, True, 6), (), CAUSAL | DROPOUT
  ),
  "causal, padding, dense": Case(
    TWO_BY_FOUR, (2, 12, 12, 4, 2, 4), (2, 4, 12, 12), ("segments", "lengths"), CAUSAL
  ),
  "padding, soft cap, T != S": Case(
    TWO_BY_FOUR, (4, 8, 20, 2, 2, 4), (4, 1, 1, 20), ("lengths",), {"logits_soft_cap": 2.0}
  ),
}


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
    # A row of the batch sees all keys, another one none.
    rest["kv_lengths"] = jnp.asarray(np.resize([S, 0, S // 2 + 1, 3], B), jnp.int32)
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
    (jax.sharding.AxisType.Auto,) * 3,
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


def run_all() -> None:
  for name, case in CASES.items():
    if len(sys.argv) > 2 and name not in sys.argv[2:]:
      continue
    start = time.perf_counter()
    try:
      with jax.enable_x64(case.dtype == "float64"):
        found = differences(case)
    except Exception as error:
      import traceback

      traceback.print_exc()
      found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({"name": name} | found | {"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
  run_all()
