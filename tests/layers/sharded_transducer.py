"""The loss on a mesh: `python -m tests.layers.sharded_transducer`, where there are 4 devices.

The batch lies over `data` and `fsdp`. Values and gradients are those of one device, also outside
of a mesh's context; within it nothing crosses the mesh in the loops.
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

B, T, U, J, V = 8, 6, 3, 8, 16


def step(*given):
  loss = lambda *joiner: fused_transducer_loss(*joiner, *given[4:], chunk=2).sum()
  return jax.value_and_grad(loss, (0, 1, 2, 3))(*given[:4])


def check() -> None:
  """float32 to 1e-5."""
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2})
  rng = np.random.default_rng(0)
  shapes = ((B, T, J), (B, U + 1, J), (J, V), (V,))
  given = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
  given.append(rng.integers(1, V, (B, U)).astype(np.int32))
  given += [np.arange(B, dtype=np.int32) % T + 1, np.arange(B, dtype=np.int32) % (U + 1)]
  expected = jax.tree.leaves(compiled(step)(*given))
  rows, whole = (NamedSharding(mesh, spec) for spec in (P(("data", "fsdp")), P()))
  laid_out = (rows, rows, whole, whole, rows, rows, rows)
  for context in (mesh, None):
    # Traced anew, not taken from the cache.
    sharded = compiled(lambda *given: step(*given), in_shardings=laid_out)
    with sharding.use_mesh(context):
      program = sharded.lower(*given).compile()
    found = jax.tree.leaves(program(*given))
    for a, b in zip(found, expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    if context is not None:
      hlo = program.as_text()
      assert " all-reduce" in hlo, "the gradient of the kernel has to be summed over the batch"
      assert not collectives_in_loops(hlo), collectives_in_loops(hlo)


if __name__ == "__main__":
  assert len(jax.devices()) == 4 and jnp.zeros(()).dtype == jnp.float32
  check()
