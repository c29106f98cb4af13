"""The Pallas kernels for TPUs through the TPU compiler itself, ahead of time and without a TPU.

All compilations of a topology take place in one subprocess, this file run as a module: libtpu takes
seconds to load, and reads its environment once.
"""

import dataclasses
import functools
import importlib.util
import json
import re
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from magneto_jax import kernels
from tests.kernels import elsewhere

# The smallest of each generation.
# Which compiles all of a topology's at once, for one worker.
pytestmark = elsewhere.ONE_AT_A_TIME
TOPOLOGIES = [
  pytest.param("v5e:2x2", marks=pytest.mark.ci),
  *(pytest.param(name, marks=pytest.mark.slow) for name in ("v5:2x2x1", "v6e:2x2", "tpu7x:2x2x1")),
]
FORWARD, BACKWARD, BIAS = "attention_forward", "attention_backward", "attention_backward_bias"


@dataclasses.dataclass(frozen=True)
class Case(elsewhere.Case):
  """Also how it is served.

  Attributes:
    block: of both passes; None for the table's own choice, `implementation=None`.
    random: of `PallasTpu`.
  """

  block: int | None = 128
  random: str = "hash"

  @property
  def implementation(self):
    block = self.block
    return block and kernels.PallasTpu(block, block, block, block, random=self.random)

  @property
  def kernels(self) -> list[str]:
    dense = self.bias is not None and len(self.bias) == 4
    return [BACKWARD, *[BIAS] * (dense and self.bias_gradient), FORWARD]


CAUSAL, DROPOUT = {"is_causal": True}, {"dropout_rate": 0.1}
T5 = (32, True, 128)
CASES = {
  # The table's own choice, at its own block sizes.
  "default": Case((2, 512, 512, 4, 4, 64), block=None),
  "default_long": Case((1, 8192, 8192, 2, 2, 64), T5, block=None),
  "default_128": Case((1, 1024, 1024, 2, 1, 128), None, (), CAUSAL, block=None),
  "default_256_float32": Case((1, 512, 512, 1, 1, 256), block=None, dtype="float32"),
  # Everything at once, and each feature with others than there.
  "all": Case((2, 384, 384, 4, 2, 64), T5, ("segments", "lengths", "offset"), CAUSAL | DROPOUT),
  "all_hardware": Case(
    (2, 300, 500, 4, 1, 128), T5, ("segments",), CAUSAL | DROPOUT, random="hardware"
  ),
  "ragged_float32": Case((2, 300, 200, 3, 1, 64), None, ("lengths",), dtype="float32"),
  "head_dim_40": Case(
    (2, 256, 256, 6, 2, 40), None, (), {"window": (100, 50)}, dtype="float32", block=256
  ),
  "head_dim_80": Case((2, 200, 300, 4, 4, 80), None, ("lengths",), {"logits_soft_cap": 30.0}),
  "head_dim_256": Case((1, 256, 256, 2, 1, 256), (1, 2, 256, 256)),
  "window_offset": Case(
    (2, 256, 384, 4, 4, 64), None, ("offset",), CAUSAL | {"window": (64, None)}
  ),
  "segments": Case((2, 256, 256, 4, 4, 64), None, ("segments",), block=256),
  "hash": Case((2, 256, 256, 4, 4, 64), None, (), DROPOUT),
  "hardware": Case((2, 256, 256, 4, 4, 64), None, ("offset",), DROPOUT, random="hardware"),
  "relative_float32": Case((2, 256, 256, 2, 2, 128), (16, False, 64), dtype="float32", block=256),
  "relative_far": Case((1, 2048, 2048, 2, 2, 64), (64, True, 600), block=256),
  # Every way to broadcast a dense bias.
  "dense": Case((2, 256, 256, 4, 4, 64), (2, 4, 256, 256), (), CAUSAL),
  "dense_batch": Case((2, 200, 300, 4, 2, 64), (1, 4, 200, 300), (), DROPOUT),
  "dense_heads": Case((2, 256, 256, 4, 4, 64), (2, 1, 256, 256), (), {"logits_soft_cap": 30.0}),
  "dense_keys": Case((2, 256, 256, 4, 4, 64), (2, 1, 1, 256), ("segments",)),
  "dense_queries": Case((2, 256, 256, 4, 4, 64), (1, 4, 256, 1), (), DROPOUT, random="hardware"),
  "dense_number": Case((2, 256, 256, 2, 2, 128), (1, 1, 1, 1), dtype="float32"),
  "dense_constant": Case((2, 256, 256, 4, 4, 64), (1, 4, 256, 256), bias_gradient=False),
}


def compile_all(topology: str) -> None:
  """Prints one line of JSON a case: its kernels, and the bytes of its temporaries; or its error."""
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  sharding = jax.sharding.SingleDeviceSharding(devices[0])
  for name, case in CASES.items():
    try:
      lowered = jax.jit(case.passes).lower(case.arguments(sharding))
      compiled = lowered.compile()
      calls = [x for x in compiled.as_text().splitlines() if '"tpu_custom_call"' in x]
      found = {
        "kernels": [re.findall(r"attention_[a-z]+(?:_[a-z]+)*", call)[-1] for call in calls],
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
      }
    except Exception as error:  # Whatever it is: the case's own test shows it.
      found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({"name": name} | found), flush=True)
  for name, lines in compiled_for_several(devices).items():
    print(json.dumps({"name": name} | lines), flush=True)


def compiled_for_several(devices) -> dict[str, dict]:
  """Attention of a batch on two chips: divided by XLA, and within a shard_map."""
  mesh = jax.sharding.Mesh(np.array(devices[:2]), ("data",))
  rows = jax.sharding.PartitionSpec("data")
  sharding = jax.sharding.NamedSharding(mesh, rows)
  x = jax.ShapeDtypeStruct((4, 512, 2, 64), jnp.bfloat16, sharding=sharding)
  attend = functools.partial(kernels.dot_product_attention, is_causal=True)
  mapped = jax.shard_map(attend, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows)
  found = {}
  for name, function in (("by XLA", attend), ("by shard_map", mapped)):
    gradient = jax.grad(lambda q, k, v, function=function: function(q, k, v).sum(), (0, 1, 2))
    text = jax.jit(gradient).lower(x, x, x).compile().as_text()
    found[name] = {"kernels": text.count('"tpu_custom_call"'), "gathers": "all-gather" in text}
  return found


@functools.cache
def compiled(topology: str) -> dict[str, dict]:
  """What `compile_all` printed, by case."""
  assert importlib.util.find_spec("libtpu"), "no TPU compiler: pip install -e '.[tpu]'"
  return elsewhere.compiled_apart(
    "tests.kernels.test_attention_tpu_compiles", topology, elsewhere.LIBTPU, timeout=1200
  )


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", CASES)
def test_compiles(topology, name):
  """One kernel forwards, one backwards; a dense bias's gradient is a third, if asked for."""
  found = compiled(topology)[name]
  assert "error" not in found, found["error"]
  assert sorted(found["kernels"]) == CASES[name].kernels


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_nothing_is_copied_to_be_padded(topology):
  """At head dim 64, half a register's lanes: no temporary is as large as the queries.

  But for v5p, where XLA keeps the float32 product of output and cotangent, before their sum over a
  head. Padded copies of queries, keys and values alone would be six times the queries.
  """
  B, T, _, N, _, H = CASES["default"].sizes
  queries = 2 * B * T * N * H
  bound = 2.5 * queries if topology == "v5:2x2x1" else queries
  assert compiled(topology)["default"]["temporaries"] < bound


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_relative_bias_is_never_expanded(topology):
  _, T, S, N, _, _ = CASES["default_long"].sizes
  # Even one byte a pair of one head would be this much.
  assert compiled(topology)["default_long"]["temporaries"] < T * S


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_several_chips_share_a_batch(topology):
  """Each by its kernel within a shard_map; and without one by a program that XLA can divide."""
  found = compiled(topology)
  assert found["by shard_map"] == {"kernels": 2, "gathers": False}
  assert found["by XLA"] == {"kernels": 0, "gathers": False}


def test_platform_compiled_for_decides():
  """Wherever it is lowered: here, on a CPU."""
  case = CASES["all"]
  case = dataclasses.replace(case, block=None)
  function = jax.jit(case.passes)

  def kernels_for(platform):
    return jax.export.export(function, platforms=[platform])(case.arguments()).mlir_module()

  assert kernels_for("tpu").count("tpu_custom_call") == 2
  assert "tpu_custom_call" not in kernels_for("cpu")
  assert "tpu_custom_call" not in function.lower(case.arguments()).as_text()


def test_blocks_too_large_are_refused_in_one_line():
  """By the record itself: the compiler's own words name no block size."""
  x = jax.ShapeDtypeStruct((1, 8192, 2, 64), jnp.bfloat16)
  for sides, part in (((4096, 4096), "4096 queries"), ((None, None, 4096, 4096), "backward")):
    with pytest.raises(NotImplementedError, match="MiB of vector memory") as refusal:
      kernels.choose(x, x, x, implementation=kernels.PallasTpu(*sides))
    assert part in str(refusal.value) and "\n" not in str(refusal.value)


if __name__ == "__main__":
  compile_all(sys.argv[1])
