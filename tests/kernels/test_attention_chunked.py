"""How attention by blocks is cut into blocks; what it computes is the conformance suite's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.kernels import RelativeBias, XlaChunked, dot_product_attention
from magneto_jax.kernels.call import Call


def sides(B, T, S, N, *, causal=True, implementation=None):
  """What a call of these sizes is cut into."""
  q, k = (jax.ShapeDtypeStruct((B, n, N, 64), jnp.float32) for n in (T, S))
  call = Call(q_BTNH=q, k_BSKH=k, v_BSKH=k, window=(None, 0 if causal else None))
  return (implementation or XlaChunked())._sides(call)


@pytest.mark.parametrize(
  "sizes, expected",
  [
    ((1, 4096, 4096, 4), (512, 256)),
    ((8, 4096, 4096, 4), (128, 128)),  # More heads at once, smaller blocks.
    ((1, 512, 512, 4), (512, 512)),  # Short rows are one block,
    ((8, 197, 197, 2), (99, 99)),  # as even as they can be if not.
    ((1, 520, 700, 4), (260, 350)),
    ((8, 1, 16000, 16), (1, 16000)),  # Decoding: one query makes a long block.
    ((8, 1, 20000, 16), (1, 10000)),
  ],
)
def test_blocks_suit_the_call(sizes, expected):
  assert sides(*sizes) == expected


def test_rows_without_hidden_blocks_are_cut_later():
  assert sides(8, 256, 256, 4, causal=False) == (256, 256)
  assert sides(8, 256, 256, 4, causal=True) == (128, 128)


def test_sides_that_are_given_are_the_largest():
  assert sides(1, 7, 7, 1, implementation=XlaChunked(2, 3)) == (2, 3)
  assert sides(1, 9, 8, 1, implementation=XlaChunked(4, 6)) == (3, 4)
  assert sides(1, 4, 6, 1, implementation=XlaChunked(4, 6)) == (4, 6)
  # One of them alone leaves the other to the call.
  assert sides(8, 4096, 4096, 4, implementation=XlaChunked(block_q=512)) == (512, 128)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("bfloat16", 3e-2)])
def test_uneven_lengths_and_grouped_heads(dtype, tolerance):
  """Three by three blocks that the call chose, two queries' heads a key's: as the reference."""
  B, T, S, N, K, H = 2, 300, 330, 4, 2, 16
  rng = np.random.default_rng(0)
  q, dout = (jnp.asarray(rng.standard_normal((B, T, N, H)), dtype) for _ in range(2))
  k, v = (jnp.asarray(rng.standard_normal((B, S, K, H)), dtype) for _ in range(2))
  table = jnp.asarray(rng.standard_normal((32, N)), jnp.float32)
  assert sides(B, T, S, N) == (100, 110)

  def compute(implementation):
    def attend(q, k, v, table):
      bias = RelativeBias(table, bidirectional=False)
      options = {"is_causal": True, "q_offset": S - T, "implementation": implementation}
      return dot_product_attention(q, k, v, bias, **options)

    out, pull = jax.vjp(attend, q, k, v, table)
    return out, *pull(dout)

  for a, b in zip(jax.jit(compute, static_argnums=0)("xla_chunked"), compute("xla"), strict=True):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()
