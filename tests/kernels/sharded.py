"""Attention under shard_map: `python -m tests.kernels.sharded NAME`, where there are 4 devices.

Rows of the batch and heads on different devices give what one device gives, with all gradients.
A kernel that is interpreted has to do so without check_vma, which JAX's interpreter does not know;
with it, the kernel has to be traced and lowered for its platform.
"""

import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from magneto_jax.kernels import RelativeBias, dot_product_attention
from tests.kernels import elsewhere
from tests.kernels.implementations import ENTRIES


def check(entry) -> None:
  """float32 to 1e-5, on meshes of batch by heads devices."""
  rng = np.random.default_rng(0)
  B, T, N, K, H = 4, 5, 4, 2, 4
  q = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32)
  k, v = jnp.asarray(rng.normal(size=(2, B, T, K, H)), jnp.float32)
  shared = jnp.asarray(rng.normal(size=(2, B, T, 1, H)), jnp.float32)
  table = jnp.asarray(rng.normal(size=(8, N)), jnp.float32)
  dense = jnp.asarray(rng.normal(size=(1, N, T, T)), jnp.float32)
  ids = jnp.asarray(np.sort(rng.integers(0, 2, (B, T))), jnp.int32)
  lengths = jnp.array([5, 3, 0, 4])
  tokens, by_head = P("batch", None, "heads"), P(None, "heads")

  def attend(q, k, v, shared, table, dense, ids, lengths, implementation=entry.small):
    options = dict(is_causal=True, implementation=implementation)
    first = dot_product_attention(
      q, k, v, RelativeBias(table, False, 6), q_segment_ids=ids, kv_segment_ids=ids, **options
    )
    second = dot_product_attention(first, k, v, dense, kv_lengths=lengths, **options)
    # Keys that all devices of a row of heads share.
    return dot_product_attention(second, *shared, **options)

  arrays = q, k, v, shared, table, dense

  def value_and_gradients(f):
    loss = lambda *arrays: (f(*arrays, ids, lengths) ** 2).sum()
    return jax.jit(jax.value_and_grad(loss, argnums=range(6)))

  expected = jax.tree.leaves(value_and_gradients(attend)(*arrays))
  specs = (tokens, tokens, tokens, P(None, "batch"), by_head, by_head, P("batch"), P("batch"))
  for sides, check_vma in (((2, 1), True), ((2, 2), True), ((2, 2), False)):
    names, auto = ("batch", "heads"), (jax.sharding.AxisType.Auto,) * 2
    shard = functools.partial(jax.shard_map, in_specs=specs, out_specs=tokens, check_vma=check_vma)
    if check_vma and entry.compiled is not None:
      (platform,) = entry.compiled.platforms
      compiled = functools.partial(attend, implementation=entry.compiled)
      sharded = shard(compiled, mesh=elsewhere.mesh(platform, sides, names))
      value_and_gradients(sharded).trace(*arrays).lower(lowering_platforms=(platform,))
      continue
    devices = jax.devices()[: math.prod(sides)]
    mesh = jax.make_mesh(sides, names, axis_types=auto, devices=devices)
    found = jax.tree.leaves(value_and_gradients(shard(attend, mesh=mesh))(*arrays))
    for a, b in zip(found, expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
  assert len(jax.devices()) == 4
  check(ENTRIES[sys.argv[1]])
