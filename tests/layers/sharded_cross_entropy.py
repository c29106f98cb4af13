"""Losses on a mesh: `python -m tests.layers.sharded_cross_entropy`, where there are 8 devices.

The batch lies over `data` and `fsdp`, the vocabulary over `tensor`, the table's width over `fsdp`.
Values and gradients are those of one device; within the loops over chunks no more crosses the mesh
than each chunk of the table's gradient, once. The contrastive loss is of the whole batch.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from magneto_jax import sharding
from magneto_jax.layers import contrastive_loss, cross_entropy
from tests.models.common import compiled

B, T, D, V, CHUNK = 4, 8, 16, 512, 48


def collectives_in_loops(hlo: str) -> list[tuple[int, ...]]:
  """Shapes of what crosses devices in the bodies of a program's loops."""
  bodies, found, computation = set(re.findall(r"body=%?([\w.\-]+)", hlo)), [], None
  kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
  for line in hlo.splitlines():
    if begin := re.match(r"%?([\w.\-]+) \(", line):
      computation = begin.group(1)
    if computation in bodies and re.search(rf" ({kinds})(-start)?\(", line):
      result = line.split(" = ")[1].split(" all-")[0]
      found += [tuple(map(int, s.split(","))) for s in re.findall(r"\[([\d,]+)\]", result)]
  return found


def check() -> None:
  """float32 to 1e-5."""
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  on = lambda *axes: NamedSharding(mesh, P(*axes))
  rng = np.random.default_rng(0)
  x = rng.normal(size=(B, T, D)).astype(np.float32)
  table = rng.normal(size=(V, D)).astype(np.float32)
  targets = rng.integers(0, V, (B, T)).astype(np.int32)

  def step(**options):
    loss = lambda x, table, targets: cross_entropy(x, table, targets, **options).sum()
    return jax.value_and_grad(loss, (0, 1))

  expected = jax.tree.leaves(compiled(step())(x, table, targets))
  rows, cut = on(("data", "fsdp")), on("tensor", "fsdp")
  sharded = compiled(
    step(chunk=CHUNK),
    in_shardings=(rows, cut, rows),
    out_shardings=(on(), (rows, cut)),
  )
  with sharding.use_mesh(mesh):
    program = sharded.lower(x, table, targets).compile()
  found = jax.tree.leaves(program(x, table, targets))
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  hlo = program.as_text()
  assert len(re.findall(r"body=", hlo)) == 2
  crossing = collectives_in_loops(hlo)
  assert crossing, "the table's gradient has to be summed over the batch"
  for shape in crossing:
    assert shape[:2] == (1, CHUNK) and shape[2] in (D, D // 2), crossing


def check_contrastive() -> None:
  """Rows of other devices are wrong answers, too; float32 to 1e-5."""
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  x, y = np.random.default_rng(0).normal(size=(2, 8, D)).astype(np.float32)

  def loss(x, y, scale):
    return sum(nats.mean() for nats in contrastive_loss(x, y, scale))

  step = jax.value_and_grad(loss, (0, 1, 2))
  expected = jax.tree.leaves(compiled(step)(x, y, np.float32(3.0)))
  rows, whole = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P())
  places = {"in_shardings": (rows, rows, whole), "out_shardings": (whole, (rows, rows, whole))}
  with sharding.use_mesh(mesh):
    found = jax.tree.leaves(compiled(step, **places)(x, y, np.float32(3.0)))
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
  assert len(jax.devices()) == 8 and jnp.zeros(()).dtype == jnp.float32
  check()
  check_contrastive()
