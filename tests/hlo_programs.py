"""Programs whose cost is known: `python -m tests.hlo_programs [TOPOLOGY]` prints what is read.

Without a topology on the 8 simulated devices of its environment, which also run them.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from magneto_jax import hlo

SIZES = {"data": 2, "tensor": 4}
N = 512  # Numbers that a device sends, 4 bytes each.


@dataclasses.dataclass(frozen=True)
class Program:
  """A function of the mesh's devices, and what one device does in it.

  Attributes:
    function: `mesh -> function`.
    shapes: of its arguments, float32.
    specs: how they are cut.
    flops: of products.
    moved: {(axes, kind): (times, bytes in all)}.
    bytes: (least, most) to and from main memory; None where it is not known by heart.
    unknown: how many loops turn an unknown number of times.
  """

  function: Callable
  shapes: tuple[tuple[int, ...], ...]
  specs: tuple[P, ...] = ()
  flops: int = 0
  moved: dict = dataclasses.field(default_factory=dict)
  bytes: tuple[int, int] | None = None
  unknown: int = 0


def repeated(step, turns: int):
  """`step`, so many times in a scan."""
  return lambda x, *rest: jax.lax.scan(lambda x, _: (step(x, *rest), None), x, length=turns)[0]


WHOLE = P()


def mapped(body, *, out=WHOLE):
  """A shard_map over both axes, of an array that all devices hold."""
  options = dict(in_specs=WHOLE, out_specs=out, check_vma=False)
  return lambda mesh: jax.shard_map(body, mesh=mesh, **options)


def plain(function):
  """One that knows no mesh."""
  return lambda mesh: function


def convolve(x, w):
  """[B, T, C] with [5, C, F], three places apart, zeros around."""
  numbers = ("NWC", "WIO", "NWC")
  return jax.lax.conv_general_dilated(x, w, (3,), [(2, 2)], dimension_numbers=numbers)


def until(x):
  """A loop that ends when the data say so."""
  return jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x @ x, x)


def either(x):
  """Of two products one is done."""
  return jax.lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: x @ (x @ x), x)


def stacked(x):
  """A scan that leaves a result a turn."""
  return jax.lax.scan(lambda c, _: (jnp.sin(c), jnp.cos(c)), x, length=64)[1]


def sliced(x, rows):
  """A scan that reads a row a turn."""
  return jax.lax.scan(lambda c, row: (jnp.sin(c + row), None), x, rows)[0]


def fsdp(mesh):
  """Layers in a scan, each gathered for its turn; the batch is cut along both axes."""
  rows = NamedSharding(mesh, P(("data", "tensor")))

  def run(x, w):
    layer = lambda x, w: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None)
    return jax.lax.scan(layer, x, w)[0]

  return run


def ring(x):
  """Passes its part on to the next device along the axis of 4."""
  return jax.lax.ppermute(x, "tensor", [(i, (i + 1) % 4) for i in range(4)])


psum, gather = jax.lax.psum, functools.partial(jax.lax.all_gather, tiled=True)
scatter = functools.partial(jax.lax.psum_scatter, tiled=True)
exchange = functools.partial(jax.lax.all_to_all, split_axis=0, concat_axis=0, tiled=True)
BOTH = ("data", "tensor")

PROGRAMS = {
  "product": Program(plain(jnp.matmul), ((64, 32), (32, 16)), flops=2 * 64 * 32 * 16),
  "batched": Program(
    plain(lambda x, y: jnp.einsum("bij,bkj->bik", x, y)),
    ((3, 8, 16), (3, 4, 16)),
    flops=2 * 3 * 8 * 4 * 16,
  ),
  "scan": Program(plain(repeated(jnp.matmul, 5)), ((16, 32), (32, 32)), flops=5 * 2 * 16 * 32 * 32),
  "nested": Program(
    plain(repeated(repeated(jnp.matmul, 3), 5)), ((16, 32), (32, 32)), flops=15 * 2 * 16 * 32 * 32
  ),
  # Outputs at 0, 3, 6, 9, 12 of 13 places, windows from -2 to 14: 3, 5, 5, 5 and 3 taps inside.
  "convolution": Program(
    plain(convolve), ((2, 13, 8), (5, 8, 6)), flops=2 * 2 * 6 * 8 * (3 + 5 + 5 + 5 + 3)
  ),
  "until": Program(plain(until), ((8, 8),), flops=2 * 8 * 8 * 8, unknown=1),
  "either": Program(plain(either), ((8, 8),), flops=3 * 2 * 8 * 8 * 8),
  # Read and written once.
  "elementwise": Program(
    plain(lambda x: 2 * jnp.sin(x) + 1), ((1000,),), bytes=(2 * 4000, 2 * 4000)
  ),
  # A turn reads the carry, writes the next one and its own row of the result, not all of it.
  "stacked": Program(plain(stacked), ((10_000,),), bytes=(64 * 3 * 40_000, 64 * 8 * 40_000)),
  # Likewise: the carry, the row, the next carry.
  "sliced": Program(
    plain(sliced), ((10_000,), (64, 10_000)), bytes=(64 * 3 * 40_000, 64 * 6 * 40_000)
  ),
  "all-reduce": Program(
    mapped(lambda x: psum(x, "data")), ((N,),), moved={(("data",), "all-reduce"): (1, 4 * N)}
  ),
  "all-reduce of all": Program(
    mapped(lambda x: psum(x, BOTH)), ((N,),), moved={(BOTH, "all-reduce"): (1, 4 * N)}
  ),
  "all-gather": Program(
    mapped(lambda x: gather(x, "tensor")),
    ((N,),),
    moved={(("tensor",), "all-gather"): (1, 4 * 4 * N)},
  ),
  "reduce-scatter": Program(
    mapped(lambda x: scatter(x, "tensor"), out=P("tensor")),
    ((N,),),
    moved={(("tensor",), "reduce-scatter"): (1, 4 * N)},
  ),
  "all-to-all": Program(
    mapped(lambda x: exchange(x, "data"), out=P("data")),
    ((N,),),
    moved={(("data",), "all-to-all"): (1, 4 * N)},
  ),
  "collective-permute": Program(
    mapped(ring), ((N,),), moved={(("tensor",), "collective-permute"): (1, 4 * N)}
  ),
  "in loops": Program(
    mapped(repeated(lambda x: ring(psum(jnp.sin(x), "data")), 7)),
    ((N,),),
    moved={
      (("data",), "all-reduce"): (7, 7 * 4 * N),
      (("tensor",), "collective-permute"): (7, 7 * 4 * N),
    },
  ),
  "fsdp": Program(
    fsdp,
    ((64, 512), (6, 512, 512)),
    (P(BOTH), P(None, "tensor")),
    flops=6 * 2 * (64 // 8) * 512 * 512,
    moved={(("tensor",), "all-gather"): (6, 6 * 4 * 512 * 512)},
  ),
}


def read(program: Program, mesh) -> dict:
  """What `hlo.cost` finds."""
  specs = program.specs or (P(),) * len(program.shapes)
  arguments = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    for shape, spec in zip(program.shapes, specs, strict=True)
  ]
  text = jax.jit(program.function(mesh)).lower(*arguments).compile().as_text()
  cost = hlo.cost(text, dict(mesh.shape))
  moved = [
    (axes, kind, sum(x.times for x in group), sum(x.times * x.bytes for x in group))
    for (axes, kind), group in hlo.by_axes(cost.collectives)
  ]
  unknown = len(cost.unknown_loops)
  return {"flops": cost.matrix_flops, "bytes": cost.bytes, "moved": moved, "unknown": unknown}


def main(topology: str | None = None) -> None:
  """Prints one line of JSON a program."""
  if topology is None:
    devices, sizes, names = jax.devices(), SIZES, list(PROGRAMS)
  else:
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    devices, sizes = described.devices, {"data": 1, "tensor": len(described.devices)}
    names = ["nested", "in loops", "fsdp"]
  auto = (jax.sharding.AxisType.Auto,) * len(sizes)
  array = np.array(devices).reshape(tuple(sizes.values()))
  mesh = jax.sharding.Mesh(array, tuple(sizes), axis_types=auto)
  for name in names:
    print(json.dumps({"name": name} | read(PROGRAMS[name], mesh)), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
