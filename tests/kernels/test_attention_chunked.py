"""How attention by blocks is cut into blocks; what it computes is the conformance suite's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.kernels import RelativeBias, XlaChunked, dot_product_attention
from magneto_jax.kernels.call import Call


def sides(B, T, S, N, implementation=None):
  """What a call of these sizes is cut into."""
  q, k = (jax.ShapeDtypeStruct((B, n, N, 64), jnp.float32) for n in (T, S))
  fitted = (implementation or XlaChunked()).fitted(Call(q_BTNH=q, k_BSKH=k, v_BSKH=k))
  return fitted.block_q, fitted.block_kv


@pytest.mark.parametrize(
  "sizes, expected",
  [
    ((1, 4096, 4096, 4), (512, 256)),
    ((1, 512, 512, 4), (512, 512)),  # Short rows are one block,
    ((1, 520, 700, 4), (260, 350)),  # others cut as evenly as they can be.
    ((8, 1, 200_000, 16), (1, 200_000)),  # Decoding: one query makes a long block.
    ((8, 2, 200_000, 16), (2, 100_000)),
  ],
)
def test_blocks_suit_the_call(sizes, expected):
  assert sides(*sizes) == expected


def test_sides_that_are_given_are_the_largest():
  assert sides(1, 7, 7, 1, XlaChunked(2, 3)) == (2, 3)
  assert sides(1, 9, 8, 1, XlaChunked(4, 6)) == (3, 4)
  assert sides(1, 4, 6, 1, XlaChunked(4, 6)) == (4, 6)
  # One of them alone leaves the other to the call.
  assert sides(8, 4096, 4096, 4, XlaChunked(block_q=128)) == (128, 256)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("bfloat16", 3e-2)])
def test_uneven_lengths_and_grouped_heads(dtype, tolerance):
  """Three by three blocks, two queries' heads a key's: as the reference."""
  B, T, S, N, K, H = 2, 300, 330, 4, 2, 16
  rng = np.random.default_rng(0)
  q, dout = (jnp.asarray(rng.standard_normal((B, T, N, H)), dtype) for _ in range(2))
  k, v = (jnp.asarray(rng.standard_normal((B, S, K, H)), dtype) for _ in range(2))
  table = jnp.asarray(rng.standard_normal((32, N)), jnp.float32)
  record = XlaChunked(128, 128)
  assert sides(B, T, S, N, record) == (100, 110)

  def compute(implementation):
    def attend(q, k, v, table):
      bias = RelativeBias(table, bidirectional=False)
      options = {"is_causal": True, "q_offset": S - T, "implementation": implementation}
      return dot_product_attention(q, k, v, bias, **options)

    out, pull = jax.vjp(attend, q, k, v, table)
    return out, *pull(dout)

  for a, b in zip(jax.jit(compute, static_argnums=0)(record), compute("xla"), strict=True):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()
