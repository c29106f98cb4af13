"""The relative position bias and the matrices that it makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.kernels import RelativeBias, relative_buckets
from magneto_jax.kernels.bias import toeplitz
from tests.kernels.brute_force import brute_bucket

BUCKETS = [(8, 16), (8, 6), (32, 128), (16, 64), (64, 256), (6, 100), (10, 20), (128, 1000)]


@pytest.mark.parametrize(
  "num_buckets, max_distance, bidirectional",
  [(n, D, both) for both in (True, False) for n, D in BUCKETS if D > n // (4 if both else 2)],
)
def test_relative_buckets_match_exact_arithmetic(num_buckets, max_distance, bidirectional):
  r = np.arange(-1010, 1011)
  found = relative_buckets(jnp.asarray(r), num_buckets, bidirectional, max_distance)
  expected = [brute_bucket(int(i), num_buckets, bidirectional, max_distance) for i in r]
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, expected)


def test_relative_bias_is_a_pytree_of_its_table():
  """So it can be an argument of jit and grad, and its structure keys the compilation cache."""
  bias = RelativeBias(jnp.ones((8, 2)), False, 64)
  assert len(jax.tree.leaves(bias)) == 1
  doubled = jax.jit(lambda b: jax.tree.map(lambda x: 2 * x, b))(bias)
  assert (doubled.bidirectional, doubled.max_distance) == (False, 64)
  np.testing.assert_array_equal(doubled.table, 2)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("offset", [0, 5, -3])
def test_materialized_bias_is_the_table_at_each_pair(bidirectional, offset):
  """Whether the offset is known or traced; float32, bit for bit."""
  table = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
  bias, T, S = RelativeBias(jnp.asarray(table), bidirectional, 6), 4, 9
  expected = np.empty((1, 2, T, S), np.float32)
  for n, t, s in np.ndindex(2, T, S):
    expected[0, n, t, s] = table[brute_bucket(s - t - offset, 8, bidirectional, 6), n]
  np.testing.assert_array_equal(bias.materialize(T, S, offset), expected)
  traced = jax.jit(lambda offset: bias.materialize(T, S, offset))(jnp.int32(offset))
  np.testing.assert_array_equal(traced, expected)


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 5), (5, 1), (4, 7), (7, 4), (6, 6)])
def test_toeplitz_and_its_gradient(rows, columns):
  """Entry (i, j) is strip[j - i + rows - 1]; its gradient sums along the diagonals."""
  rng = np.random.default_rng(0)
  strip = rng.integers(-99, 99, (2, rows + columns - 1)).astype(np.float32)
  matrix, pull = jax.vjp(lambda x: toeplitz(x, rows, columns), jnp.asarray(strip))
  weight = rng.integers(-99, 99, matrix.shape).astype(np.float32)
  gradient = np.zeros_like(strip)
  for i, j in np.ndindex(rows, columns):
    np.testing.assert_array_equal(matrix[:, i, j], strip[:, j - i + rows - 1])
    gradient[:, j - i + rows - 1] += weight[:, i, j]
  np.testing.assert_array_equal(pull(jnp.asarray(weight))[0], gradient)


def test_toeplitz_neither_gathers_nor_scatters():
  def loss(strip):
    return (toeplitz(strip, 8, 8) ** 2).sum()

  text = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones(15)))
  assert "gather" not in text and "scatter" not in text
