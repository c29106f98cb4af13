"""The loss on a mesh: `python -m tests.layers.sharded_transducer`, where there are 4 devices.

The batch lies over `data` and `fsdp`, or over `data` and the vocabulary over `tensor`. Values and
gradients are those of one device, also outside of a mesh's context. Within it, in the loops nothing
crosses the parts of the batch, and of the vocabulary's parts neither logits nor the kernel.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from magneto_jax import sharding
from magneto_jax.layers import fused_transducer_loss
from tests.layers.sharded_cross_entropy import collectives_in_loops
from tests.models.common import compiled

B, T, U, J, V = 8, 6, 3, 8, 32


def step(*given):
  loss = lambda *joiner: fused_transducer_loss(*joiner, *given[4:], chunk=2).sum()
  return jax.value_and_grad(loss, (0, 1, 2, 3))(*given[:4])


def inputs():
  rng = np.random.default_rng(0)
  shapes = ((B, T, J), (B, U + 1, J), (J, V), (V,))
  labels = rng.integers(1, V, (B, U)).astype(np.int32)
  rows = np.arange(B, dtype=np.int32)
  joiner = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
  return [*joiner, rows % T + 1, labels, rows % (U + 1)]


def crossing(axes: dict[str, int], *, in_context: bool = True) -> list[tuple[int, ...]]:
  """What crosses a mesh in the loops; values and gradients are compared, float32 to 1e-5."""
  mesh, given = sharding.make_mesh(axes), inputs()
  expected = jax.tree.leaves(compiled(step)(*given))
  on = lambda *spec: NamedSharding(mesh, P(*spec))
  rows = on(("data", "fsdp"))
  laid_out = (rows, rows, on(None, "tensor"), on("tensor"), rows, rows, rows)
  # Traced anew, not taken from the cache.
  sharded = compiled(lambda *given: step(*given), in_shardings=laid_out)
  with sharding.use_mesh(mesh if in_context else None):
    program = sharded.lower(*given).compile()
  found = jax.tree.leaves(program(*given))
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  assert " all-reduce" in program.as_text(), "the kernel's gradient is a sum over the batch"
  return collectives_in_loops(program.as_text())


if __name__ == "__main__":
  assert len(jax.devices()) == 4 and jnp.zeros(()).dtype == jnp.float32
  assert crossing({"data": 2, "fsdp": 2}) == []
  crossing({"data": 2, "fsdp": 2}, in_context=False)
  of_parts = crossing({"data": 2, "tensor": 2})
  assert of_parts and not {V, V // 2} & {shape[-1] for shape in of_parts if shape}, of_parts
