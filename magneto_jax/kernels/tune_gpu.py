"""Times how the kernels of `pallas_gpu` may be cut, each kernel by itself, and writes the table.

Called by `python -m magneto_jax.kernels.tune`. Candidates are compiled by several processes at
once; one at a time is timed.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax.kernels import dropout
from magneto_jax.kernels.attention_gpu import KERNELS, Blocks, PallasGpu
from magneto_jax.kernels.bias import RelativeBias
from magneto_jax.kernels.call import Call

# What the multiprocessors have of memory for a program, at most; more is not worth compiling.
_SHARED_BYTES = 227 * 2**10
# A turn takes at least as many milliseconds, of as many calls as that needs.
_TURN = 5.0


@dataclasses.dataclass(frozen=True)
class Shape:
  """A call, by its sizes.

  Attributes:
    feature: none, relative or dense: its bias.
  """

  batch: int
  length: int
  heads: int
  kv_heads: int
  head_dim: int
  dtype: str = "bfloat16"
  is_causal: bool = False
  feature: str = "none"
  dropout_rate: float = 0.0


# A process is sent the same shape again and again.
@functools.lru_cache(maxsize=1)
def _call(shape: Shape) -> Call:
  rng = np.random.default_rng(0)

  def draw(*sizes):
    return jnp.asarray(rng.standard_normal(sizes, np.float32), shape.dtype)

  heads = shape.heads, shape.kv_heads, shape.kv_heads
  q, k, v = (draw(shape.batch, shape.length, n, shape.head_dim) for n in heads)
  bias = None
  if shape.feature == "relative":
    bias = RelativeBias(draw(32, shape.heads).astype(jnp.float32), not shape.is_causal)
  elif shape.feature == "dense":
    bias = draw(1, shape.heads, shape.length, shape.length)
  q_seeds, kv_seeds = None, None
  if shape.dropout_rate:
    q_seeds, kv_seeds = dropout.seeds(jax.random.key(0), shape.batch, shape.heads)
  return Call(
    q_BTNH=q,
    k_BSKH=k,
    v_BSKH=v,
    bias=bias,
    window=(None, 0 if shape.is_causal else None),
    scale=shape.head_dim**-0.5,
    q_seeds=q_seeds,
    kv_seeds=kv_seeds,
    dropout_rate=shape.dropout_rate,
  )


@functools.lru_cache(maxsize=1)
def _given(shape: Shape) -> tuple:
  """What the backward pass is given, with the far sums of a relative bias."""
  out, lse = jax.jit(PallasGpu().forward)(_call(shape))
  dout = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
  delta = jnp.einsum("BTNH,BTNH->BTN", out, dout, preferred_element_type=jnp.float32)
  sides = 1 if shape.is_causal else 2
  far = jnp.zeros((sides, shape.batch, shape.heads, shape.length), jnp.float32)
  return jax.block_until_ready((lse, delta, dout, far))


# What `--write` measures: by the width of a head and the bias.
STANDARD = tuple(
  Shape(4, 4096, 1024 // width, 1024 // width, width, feature=feature)
  for width in (64, 128, 256)
  for feature in ("none", "relative", "dense")
)


def candidates(kernel: str, shape: Shape) -> Iterator[Blocks]:
  """Ways to cut a kernel that are worth compiling."""
  W = 1 << (shape.head_dim - 1).bit_length()
  own_is_q = kernel != "dkv"
  is_square = kernel == "dbias" and shape.feature == "relative"
  for own, other, warps, stages in itertools.product(
    (64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)
  ):
    q, kv = (own, other) if own_is_q else (other, own)
    # What a thread holds: sums as wide as a head, and two squares.
    sums = {"out": own * W, "dq": own * W, "dkv": 2 * own * W, "dbias": 0}[kernel]
    registers = (sums + (1 if kernel == "out" else 2) * q * kv) / (32 * warps)
    streamed = 2 * other * W
    shared = 2 * (own * W * (1 if kernel == "out" else 2) + stages * streamed + q * kv)
    if kernel == "dbias":
      shared = 2 * stages * 2 * (own + other) * W
    if registers > 224 or registers < 48 or shared > _SHARED_BYTES:
      continue
    if is_square and q != kv:
      continue
    if stages == (4 if kernel != "out" else 1):
      continue
    yield Blocks(q, kv, warps, stages)


def measure(shape: Shape, kernel: str, blocks: Blocks, rounds: int, lock: str) -> list[float]:
  """Milliseconds of a call of the kernel, one for each round. Raises what the compiler raises."""
  record = PallasGpu(**{kernel: blocks})
  with _held(lock):  # What is being timed is alone on the device.
    call, given = _call(shape), () if kernel == "out" else _given(shape)
  if kernel != "dbias" or shape.feature != "relative":
    given = given[:3]
  run = (
    jax.jit(lambda call, given: record.kernel(kernel, call)(*given)).lower(call, given).compile()
  )
  with _held(lock):
    jax.block_until_ready(run(call, given))
    count = max(2, math.ceil(_TURN / _turn(run, call, given, 2)))
    return [_turn(run, call, given, count) for _ in range(rounds)]


def _turn(run, call, given, count: int) -> float:
  start = time.perf_counter()
  for _ in range(count):
    result = run(call, given)
  jax.block_until_ready(result)
  return 1e3 * (time.perf_counter() - start) / count


@contextlib.contextmanager
def _held(path: str):
  with open(path, "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def tune(shapes, rounds: int, jobs: int, report=print) -> dict:
  """{shape: {kernel: {blocks: milliseconds or why not}}}."""
  tasks = [
    (shape, kernel, blocks)
    for shape in shapes
    for kernel in KERNELS
    if kernel != "dbias" or shape.feature != "none"
    for blocks in candidates(kernel, shape)
  ]
  results = {shape: {} for shape in shapes}
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # The processes share the device.
  with (
    tempfile.TemporaryDirectory() as folder,
    concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool,
  ):
    lock = str(pathlib.Path(folder) / "lock")
    futures = {pool.submit(measure, *task, rounds, lock): task for task in tasks}
    for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
      shape, kernel, blocks = futures[future]
      error = future.exception()
      if isinstance(error, concurrent.futures.BrokenExecutor):
        raise SystemExit("a process died, perhaps for memory: try again with fewer --jobs")
      found = f"{type(error).__name__}: {error}".splitlines()[0] if error else future.result()
      results[shape].setdefault(kernel, {})[blocks] = found
      if done % 50 == 0:
        report(f"{done} of {len(tasks)}")
  return results


def fastest(found: Mapping[Blocks, list[float] | str]) -> list[Blocks]:
  """Those that ran, in order of their median."""
  ran = {blocks: statistics.median(ms) for blocks, ms in found.items() if not isinstance(ms, str)}
  return sorted(ran, key=ran.get)


def write(results: dict, capability: str, path: pathlib.Path) -> None:
  """Puts the fastest of each kernel into the table."""
  table = json.loads(path.read_text(encoding="utf-8"))
  own = table.setdefault(capability, {})
  for shape, kernels in results.items():
    width = str(max(64, 1 << (shape.head_dim - 1).bit_length()))
    row = own.setdefault(width, {}).setdefault(shape.feature, {})
    for kernel in KERNELS:
      ranked = fastest(kernels.get(kernel, {}))
      if ranked:
        row[kernel] = dataclasses.astuple(ranked[0])
  path.write_text(_dumped(table), encoding="utf-8")


def _dumped(table: dict) -> str:
  """JSON with a line for each feature."""
  lines = [
    f'  "{capability}": {{\n'
    + ",\n".join(
      f'    "{width}": {{\n'
      + ",\n".join(f'      "{name}": {json.dumps(row)}' for name, row in rows.items())
      + "\n    }"
      for width, rows in widths.items()
    )
    + "\n  }"
    for capability, widths in table.items()
  ]
  return "{\n" + ",\n".join(lines) + "\n}\n"


def as_json(results: dict) -> list[dict]:
  """All that was measured."""
  return [
    dataclasses.asdict(shape)
    | {"kernel": kernel}
    | {
      "milliseconds": {
        " ".join(map(str, dataclasses.astuple(blocks))): ms for blocks, ms in found.items()
      }
    }
    for shape, kernels in results.items()
    for kernel, found in kernels.items()
  ]
