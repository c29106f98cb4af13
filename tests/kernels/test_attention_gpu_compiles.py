"""The Pallas kernels for NVIDIA GPUs, lowered and compiled where there is none.

In `ci` they are lowered, which needs JAX alone. The `slow` tests download NVIDIA's compiler and
JAX's plugin and compile for an H100, as far as machine code: in one subprocess, this file run as a
module, as JAX looks for plugins once.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

from magneto_jax import kernels
from magneto_jax.kernels import attention_gpu, platforms
from tests.kernels import elsewhere

FORWARD = "attention_forward"
KEYS, QUERIES = "attention_backward_keys", "attention_backward_queries"
BIAS = "attention_backward_bias"


@dataclasses.dataclass(frozen=True)
class Case(elsewhere.Case):
  """Served by name, in the table's own blocks."""

  implementation: str | None = "pallas_gpu"

  @property
  def kernels(self) -> list[str]:
    """In the order of their names; a bias with both queries and keys has its gradient's own."""
    has_both = self.bias is not None and (len(self.bias) == 3 or 1 not in self.bias[2:])
    return [*[BIAS] * has_both, KEYS, QUERIES, FORWARD]


CAUSAL, DROPOUT, LSE = {"is_causal": True}, {"dropout_rate": 0.1}, {"return_lse": True}
T5 = (32, True, 128)
CASES = {
  "plain": Case((2, 512, 512, 4, 4, 64)),
  "plain_128": Case((2, 512, 512, 4, 4, 128)),
  "causal": Case((2, 512, 512, 4, 2, 64), None, (), CAUSAL),
  "causal_128": Case((2, 512, 512, 4, 1, 128), None, (), CAUSAL | LSE),
  "long": Case((1, 8192, 8192, 2, 2, 64), T5),
  "relative": Case((2, 512, 512, 4, 4, 64), T5),
  "relative_128": Case((2, 512, 512, 4, 4, 128), T5),
  "relative_causal": Case((2, 512, 512, 4, 4, 64), (32, False, 128), (), CAUSAL),
  "relative_causal_128": Case((2, 512, 512, 4, 2, 128), (32, False, 128), ("offset",), CAUSAL),
  "relative_far": Case((1, 2048, 2048, 2, 2, 64), (64, True, 600)),
  "lengths": Case((2, 500, 300, 4, 4, 64), None, ("lengths",)),
  "lengths_128": Case((2, 500, 300, 4, 4, 128), None, ("lengths",)),
  "segments": Case((2, 512, 512, 4, 4, 64), None, ("segments",)),
  "segments_128": Case((2, 512, 512, 4, 4, 128), None, ("segments",), CAUSAL),
  "dropout": Case((2, 512, 512, 4, 4, 64), None, (), DROPOUT),
  "dropout_128": Case((2, 512, 512, 4, 4, 128), None, (), CAUSAL | DROPOUT),
  "window": Case((2, 512, 768, 4, 4, 64), None, (), {"window": (100, 50), "q_offset": 256}),
  "window_offset": Case(
    (2, 512, 768, 4, 4, 128), None, ("offset",), CAUSAL | {"window": (64, None)}
  ),
  "soft_cap": Case((2, 512, 512, 4, 4, 64), None, (), {"logits_soft_cap": 30.0}),
  "soft_cap_128": Case((2, 512, 512, 4, 4, 128), None, (), CAUSAL | {"logits_soft_cap": 30.0}),
  "all": Case((2, 512, 512, 4, 2, 64), T5, ("segments", "lengths", "offset"), CAUSAL | DROPOUT),
  "all_128": Case((2, 512, 512, 4, 4, 128), T5, ("lengths",), DROPOUT | LSE),
  # Every way to broadcast a dense bias.
  "dense": Case((2, 512, 512, 4, 4, 64), (2, 4, 512, 512), (), CAUSAL),
  "dense_128": Case((2, 512, 512, 4, 4, 128), (2, 4, 512, 512), (), DROPOUT),
  "dense_batch": Case((2, 500, 300, 4, 2, 64), (1, 4, 500, 300), (), DROPOUT),
  "dense_batch_128": Case((2, 512, 512, 4, 4, 128), (1, 4, 512, 512), ("lengths",)),
  "dense_heads": Case((2, 512, 512, 4, 4, 64), (2, 1, 512, 512), (), {"logits_soft_cap": 30.0}),
  "dense_shared": Case((2, 512, 512, 4, 4, 64), (1, 1, 512, 512), ("lengths",)),
  "dense_keys": Case((2, 512, 512, 4, 4, 64), (2, 1, 1, 512), ("segments",)),
  "dense_queries": Case((2, 512, 512, 4, 4, 64), (1, 4, 512, 1), (), DROPOUT),
  "dense_number": Case((2, 512, 512, 4, 4, 128), (1, 4, 1, 1)),
  # Other head dims and dtypes.
  "head_dim_40": Case((2, 256, 256, 6, 2, 40), T5, (), {"window": (100, 50)}),
  "head_dim_80": Case((2, 200, 300, 4, 4, 80), None, ("lengths",), {"logits_soft_cap": 30.0}),
  "head_dim_256": Case((1, 256, 256, 2, 1, 256), T5, (), CAUSAL | DROPOUT),
  "dense_256": Case((1, 256, 256, 2, 1, 256), (1, 2, 256, 256)),
  "float16": Case((2, 512, 512, 4, 4, 64), T5, ("lengths",), DROPOUT, dtype="float16"),
  "float32": Case((2, 256, 256, 2, 2, 64), T5, (), CAUSAL, dtype="float32"),
  "float32_128": Case((2, 300, 200, 3, 1, 128), (2, 3, 300, 200), dtype="float32"),
  "float32_256": Case((1, 256, 256, 1, 1, 256), None, ("segments",), DROPOUT, dtype="float32"),
}


def called(text: str) -> list[str]:
  """The names of Triton's kernels that a module calls, sorted."""
  calls = [line for line in text.splitlines() if "@__gpu$xla.gpu.triton" in line]
  return sorted(re.search(r'name = "(\w+)"', line)[1] for line in calls)


@pytest.mark.ci
@pytest.mark.parametrize("name", CASES)
def test_lowers(name):
  """One kernel forwards, two backwards; a third for a bias with both queries and keys."""
  case = CASES[name]
  assert called(elsewhere.lowered("cuda", case.passes, case.arguments())) == case.kernels


@pytest.mark.ci
def test_relative_bias_is_never_expanded():
  """Outside of the kernels no array has as many numbers as one head has pairs."""
  case = CASES["long"]
  _, T, S, _, _, _ = case.sizes
  text = elsewhere.lowered("cuda", case.passes, case.arguments())
  shapes = re.findall(r"tensor<((?:\d+x)+)\w+>", text)
  assert max(math.prod(map(int, x.split("x")[:-1])) for x in shapes) < T * S


@pytest.mark.ci
def test_lowers_within_vmap():
  """Also of vmap, over more axes than a GPU's grid has: as many kernels as without."""
  case = CASES["all"]
  axes = {name: 0 if name in "qkv" else None for name in case.arguments()}
  more = {
    name: jax.ShapeDtypeStruct((3, *x.shape), x.dtype) if name in "qkv" else x
    for name, x in case.arguments().items()
  }
  assert called(elsewhere.lowered("cuda", jax.vmap(case.passes, (axes,)), more)) == case.kernels


@pytest.mark.ci
def test_several_devices_share_a_batch():
  """Each by its kernels within a shard_map; and without one by a program that XLA can divide."""
  mesh, rows = elsewhere.mesh("cuda", (2,), ("data",)), P("data")
  attend = functools.partial(kernels.dot_product_attention, is_causal=True)
  mapped = jax.shard_map(attend, mesh=mesh, in_specs=rows, out_specs=rows)
  sharding = jax.sharding.NamedSharding(mesh, rows)
  x = jax.ShapeDtypeStruct((4, 512, 2, 64), jnp.bfloat16, sharding=sharding)
  for function, found in ((attend, []), (mapped, [KEYS, QUERIES, FORWARD])):
    gradient = jax.grad(lambda q, function=function: function(q, q, q).sum())
    lowered = jax.jit(gradient).trace(x).lower(lowering_platforms=("cuda",))
    assert called(lowered.as_text()) == found


@pytest.mark.ci
def test_a_gpu_that_is_not_named(caplog):
  """Is none that JAX 0.11 and later compile kernels for: then the next in the table serves."""
  case = CASES["plain"]
  is_named = jax.jit(case.passes).trace(case.arguments())
  free = jax.jit(dataclasses.replace(case, implementation=None).passes).trace(case.arguments())
  if jax.__version_info__ < (0, 11):
    assert called(is_named.lower(lowering_platforms=("cuda",)).as_text()) == case.kernels
    assert called(free.lower(lowering_platforms=("cuda",)).as_text()) == case.kernels
    return
  with pytest.raises(NotImplementedError, match="pallas_gpu .* jax.sharding.use_abstract_mesh"):
    is_named.lower(lowering_platforms=("cuda",))
  platforms._warn_once.cache_clear()
  assert called(free.lower(lowering_platforms=("cuda",)).as_text()) == []
  assert caplog.text.count("xla_chunked serves instead") == 1


# What is downloaded: JAX's plugin of its own version, and NVIDIA's compiler.
VERSION = jax.__version__
PACKAGES = [
  f"jax-cuda13-plugin=={VERSION}",
  f"jax-cuda13-pjrt=={VERSION}",
  *("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-nvjitlink"),
  *("nvidia-cuda-runtime", "nvidia-cuda-crt"),
]

# An H100, as far as the compiler asks for it.
H100 = """
gpu_device_info {
  threads_per_warp: 32
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647
  cuda_compute_capability { major: 9 }
}
"""


def compile_all(dump: pathlib.Path) -> None:
  """Prints one line of JSON a case: its kernels, and the bytes of its temporaries; or its error."""
  # The blocks are those of the device that is compiled for.
  attention_gpu._capability = lambda: "9.0"
  topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
  sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
  for name, case in CASES.items():
    try:
      with jax.sharding.use_abstract_mesh(elsewhere.mesh("cuda")):
        compiled = jax.jit(case.passes).lower(case.arguments(sharding)).compile()
      found = {
        "kernels": dict(kernel for path in dump.glob("*.ptx") for kernel in assembled(path)),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
      }
    except Exception as error:  # Whatever it is: the case's own test shows it.
      found = {"error": f"{type(error).__name__}: {error}"}
    for path in dump.glob("*.ptx"):
      path.unlink()
    print(json.dumps({"name": name} | found), flush=True)


def assembled(path: pathlib.Path) -> list[tuple[str, dict[str, int]]]:
  """(name, what it takes) of our kernels in a file of PTX."""
  text = path.read_text(encoding="utf-8")
  if not re.search(r"\.entry attention_", text):
    return []
  command = ["ptxas", "-arch=sm_90a", "-v", path, "-o", os.devnull]
  said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
  (name,) = re.findall(r"\.entry (\w+)", text)
  ((stores, loads),) = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
  (registers,) = re.findall(r"Used (\d+) registers", said)
  return [
    (
      name,
      {
        "registers": int(registers),
        "spilled": int(stores) + int(loads),
        "wgmma": text.count("wgmma.mma_async"),
      },
    )
  ]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict]:
  """What `compile_all` printed, by case."""
  packages, dump = tmp_path_factory.mktemp("packages"), tmp_path_factory.mktemp("dump")
  install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", packages, *PACKAGES]
  result = subprocess.run(install, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  home = packages / "nvidia" / "cu13"
  flags = f"--xla_gpu_cuda_data_dir={home} --xla_gpu_autotune_level=0 --xla_dump_to={dump}"
  if jax.__version_info__ >= (0, 11):
    flags += " --xla_dump_emitter_re=.*"  # Later ones write PTX only if asked to.
  variables = {
    "JAX_PLATFORMS": "cpu",
    # No driver and no cuDNN is there, nor is any needed.
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
    "XLA_FLAGS": flags,
    "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": os.pathsep.join([str(packages), *sys.path]),
  }
  return elsewhere.compiled_apart(
    "tests.kernels.test_attention_gpu_compiles", dump, variables, timeout=1800
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compiles_without_spills(compiled, name):
  """bfloat16 of head dims 64 and 128 keeps all in registers, and multiplies by warp groups.

  Of the others it is printed what they spill.
  """
  case, found = CASES[name], compiled[name]
  assert "error" not in found, found["error"]
  assert sorted(found["kernels"]) == case.kernels
  print(found["kernels"])
  if case.dtype == "bfloat16" and case.sizes[-1] in (64, 128):
    assert {kernel: x["spilled"] for kernel, x in found["kernels"].items() if x["spilled"]} == {}
    assert all(x["wgmma"] for x in found["kernels"].values())


@pytest.mark.slow
def test_relative_bias_takes_no_memory(compiled):
  _, T, S, N, _, _ = CASES["long"].sizes
  # Even one byte a pair of one head would be this much.
  assert compiled["long"]["temporaries"] < T * S


if __name__ == "__main__":
  compile_all(pathlib.Path(sys.argv[1]))
