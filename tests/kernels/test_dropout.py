"""The hash behind dropout: its bits and their statistics, the same in every implementation."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.kernels import (
  Blocks,
  PallasGpu,
  PallasTpu,
  XlaChunked,
  conformance,
  dot_product_attention,
  dropout,
)
from tests.kernels.implementations import ALL

SIZES = B, N, T, S = 2, 3, 256, 320
RATE = 0.3


@functools.cache
def drawn(seed: int, sizes=SIZES) -> np.ndarray:
  """uint32 [B, N, T, S]."""
  B, N, T, S = sizes
  return np.asarray(bits(*dropout.seeds(jax.random.key(seed), B, N), T, S))


def bits(q_seeds, kv_seeds, T, S):
  """Of T queries and S keys, counted from 0: [B, N, T, S]."""
  of_queries = dropout.of_queries(q_seeds[:, :, None, None], jnp.arange(T)[None, None, :, None])
  of_keys = dropout.of_keys(kv_seeds[:, :, None, None], jnp.arange(S)[None, None, None, :])
  return dropout.bits(of_queries, of_keys)


def mix(x):
  x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
  x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
  return x ^ (x >> 16)


def test_bits_are_those_of_the_formula():
  """In Python's integers, at some places; they never change, so that a run can be repeated."""
  first, second = (int(x) for x in jax.random.bits(jax.random.key(5), (2,), jnp.uint32))
  c = 0x9E3779B9
  for b, n, t, s in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 2, 0, 0), (0, 0, 255, 0), (1, 2, 77, 319)]:
    head = mix(mix(first ^ (b * c % 2**32)) ^ ((second + n * c) % 2**32))
    query, key = mix((head + t * c) % 2**32), mix((mix(head) + s * c) % 2**32)
    expected = ((2 * mix(query) + 1) * key + query + mix(key)) % 2**32
    assert drawn(5)[b, n, t, s] == expected
  assert drawn(0)[0, 0, 0, :3].tolist() == [3129254449, 306766722, 2744639090]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1 - 1e-12])
def test_a_place_is_kept_iff_its_bits_reach_the_rate(rate):
  kept = dropout.kept(jnp.asarray(drawn(1)), rate)
  np.testing.assert_array_equal(kept, drawn(1) / 2**32 >= min(rate, 1 - 2**-32))
  mask = conformance.dropout_mask(jax.random.key(1), B, N, T, S, min(rate, 1 - 2**-32))
  np.testing.assert_array_equal(kept, mask)


def kept_by(implementation, key, sizes, rate=RATE):
  """What an implementation keeps [B, N, T, S], read off with the unit vectors as values."""
  B, N, T, S = sizes
  q, k = jnp.zeros((B, T, N, S)), jnp.zeros((B, S, N, S))
  v = jnp.broadcast_to(jnp.eye(S)[:, None], (B, S, N, S))
  options = dict(dropout_rate=rate, dropout_key=key, implementation=implementation)
  return np.asarray(dot_product_attention(q, k, v, **options) > 0).swapaxes(1, 2)


@pytest.mark.parametrize(
  "implementation",
  [
    "xla",
    "xla_chunked",
    XlaChunked(2, 3),
    XlaChunked(16, 9),
    pytest.param(PallasTpu(interpret=True), marks=pytest.mark.slow),
    pytest.param(PallasGpu(interpret=True), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_implementations_drop_the_same(implementation):
  """Bit for bit what the suite's reference drops, whatever the size of a block."""
  sizes, key = (2, 3, 20, 32), jax.random.key(7)
  expected = conformance.dropout_mask(key, *sizes, RATE)
  np.testing.assert_array_equal(kept_by(implementation, key, sizes), expected)


@pytest.mark.slow
@pytest.mark.parametrize("block_q, block_kv", [(128, 128), (128, 256), (256, 128), (384, 384)])
def test_interpreted_blocks_drop_the_same(block_q, block_kv):
  sizes, key = (1, 2, 300, 290), jax.random.key(7)
  sides = block_q, block_kv, block_kv, block_q
  kept = kept_by(PallasTpu(*sides, interpret=True), key, sizes)
  np.testing.assert_array_equal(kept, conformance.dropout_mask(key, *sizes, RATE))


@pytest.mark.slow
@pytest.mark.parametrize("q, kv", [(16, 64), (64, 16), (32, 128)])
def test_interpreted_blocks_for_gpus_drop_the_same(q, kv):
  sizes, key = (1, 2, 150, 140), jax.random.key(7)
  kept = kept_by(PallasGpu(Blocks(q, kv), interpret=True), key, sizes)
  np.testing.assert_array_equal(kept, conformance.dropout_mask(key, *sizes, RATE))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_frequencies(seed, rate):
  """Overall, of every row, column, head and row of the batch: standard normal once normed.

  Of thousands of sums none lies 5 standard deviations off, and their variance is 1.
  """
  centred = ((drawn(seed) >= rate * 2**32) - (1 - rate)) / math.sqrt(rate * (1 - rate))
  for axes in [(0, 1, 2, 3), (3,), (2,), (2, 3), (1, 2, 3), (0, 2, 3)]:
    summed = math.prod(centred.shape[axis] for axis in axes)
    z = centred.sum(axes) / math.sqrt(summed)
    assert np.abs(z).max() < 5
    assert abs(np.mean(z**2) - 1) < 5 * math.sqrt(2 / z.size) or z.size == 1


SHIFTS = {
  "next key": (0, 0, 0, 1),
  "next query": (0, 0, 1, 0),
  "along the diagonal": (0, 0, 1, 1),
  "across the diagonal": (0, 0, 1, -1),
  "next head": (0, 1, 0, 0),
  "next row of the batch": (1, 0, 0, 0),
  "power of two of keys": (0, 0, 0, 128),
  "power of two of queries": (0, 0, 64, 0),
}


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
def test_neighbours_are_uncorrelated(shift):
  """Each of the 16 high bits with each of its neighbour's: 256 correlations, none beyond 5.5
  deviations. Lower bits decide once in 65536 times.
  """
  here = drawn(0)
  there = np.roll(here, shift, axis=(0, 1, 2, 3))
  np.testing.assert_array_less(correlations(here, there), 5.5)


def test_seeds_are_uncorrelated():
  np.testing.assert_array_less(correlations(drawn(0), drawn(1)), 5.5)


def test_a_bit_is_uncorrelated_with_the_others():
  z = correlations(drawn(0), drawn(0))
  np.testing.assert_array_less(z[~np.eye(16, dtype=bool)], 5.5)


def correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """|z| [16, 16] of the agreement of high bit i of x with high bit j of y."""
  signs = [
    np.float32(
      2.0 * np.unpackbits((a.reshape(-1, 1) >> 16).astype(">u2").view(np.uint8), axis=1) - 1
    )
    for a in (x, y)
  ]
  return np.abs(signs[0].T @ signs[1]) / math.sqrt(x.size)


@pytest.mark.parametrize("shift", [16, 24])
def test_bytes_are_uniform(shift):
  """Chi-square with 255 degrees of freedom, mean 255 and variance 510: within 5 deviations.

  Also of a byte together with the next key's, at 4 bits each.
  """
  values = (drawn(3) >> np.uint32(shift)) & np.uint32(255)
  high = values >> 4
  pairs = 16 * high[..., ::2] + high[..., 1::2]
  for numbers in (values, pairs):
    counts = np.bincount(numbers.ravel(), minlength=256)
    expected = numbers.size / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 255) < 5 * math.sqrt(510)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_squares_are_of_independent_places(rate):
  """The 16 outcomes of 2 queries by 2 keys, adjacent and any, are as frequent as the rate says.

  Chi-square with 15 degrees of freedom, of a million squares that share no place: within 5
  deviations. A sum of a query's number and a key's fails: of its four the last follows.
  """
  kept = np.concatenate([drawn(seed) >= rate * 2**32 for seed in range(8)])
  rng = np.random.default_rng(0)
  for places in (kept, kept[:, :, rng.permutation(T)][..., rng.permutation(S)]):
    squares = [places[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
    counts = np.bincount(sum(x.ravel() << i for i, x in enumerate(squares)), minlength=16)
    bits = np.array([i.bit_count() for i in range(16)])
    expected = counts.sum() * (1 - rate) ** bits * rate ** (4 - bits)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 15) < 5 * math.sqrt(30)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_a_head_is_a_matrix_of_independent_places(rate):
  """Pairs of rows and of columns, all of them, are as correlated as random ones, and no more.

  So the singular values end where those of such a matrix do, at sqrt(T) + sqrt(S) and within
  a few of their deviations, some T^-1/6: a structure of low rank would stick out.
  """
  for head in drawn(4).reshape(-1, T, S):
    centred = ((head >= rate * 2**32) - (1 - rate)) / math.sqrt(rate * (1 - rate))
    for rows in (centred, centred.T):
      z = (rows @ rows.T)[np.triu_indices(len(rows), 1)] / math.sqrt(rows.shape[1])
      assert np.abs(z).max() < 6.5
      assert abs(np.mean(z**2) - 1) < 6 * math.sqrt(2 / z.size)
    largest = np.linalg.norm(centred, 2)
    assert abs(largest - math.sqrt(T) - math.sqrt(S)) < 5 * T ** (-1 / 6)


# Of a row's number r, or a column's, and another's.
RELATIONS = {
  **{f"{n} r": lambda r, n=n: n * r for n in (-3, -2, -1, 2, 3, 5)},
  **{f"r + 2^{n}": lambda r, n=n: r + 2**n for n in (0, 8, 16, 24, 29, 30, 31)},
  "not r": lambda r: ~r,
}


@pytest.mark.parametrize("other", RELATIONS.values(), ids=RELATIONS)
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_related_rows_and_columns_are_uncorrelated(other, rate):
  """Rows whose numbers are as simply related as chance makes some, and columns likewise: 256 pairs
  by 4096 places each. Those of a product of the two numbers would be 20 deviations off.
  """
  mine, against = np.split(np.random.default_rng(1).integers(0, 2**32, 256 + 4096), [256])
  theirs = other(mine) % 2**32
  of_queries = lambda r: (np.uint32(r), np.uint32((2 * mix(r) + 1) % 2**32))
  of_keys = lambda k: (np.uint32(k), np.uint32(mix(k)))
  for of_rows, of_columns in ((of_queries, of_keys), (of_keys, of_queries)):
    here, there = (
      (dropout.bits([x[:, None] for x in of_rows(numbers)], of_columns(against)) >= rate * 2**32)
      - (1 - rate)
      for numbers in (mine, theirs)
    )
    z = (here * there).sum(1) / (rate * (1 - rate) * math.sqrt(against.size))
    assert np.abs(z).max() < 6 and abs(z.mean()) < 5 / math.sqrt(z.size)


def test_queries_and_keys_have_numbers_of_their_own():
  """Else a head's mask would be symmetric, and heads whose keys are neighbours drop alike."""
  (q_seed, kv_seed), index = dropout.seeds(jax.random.key(0), 1, 1), jnp.arange(4096)
  queries, _ = dropout.of_queries(q_seed[0], index)
  keys, _ = dropout.of_keys(kv_seed[0], index)
  assert len(np.unique(np.concatenate([queries, keys]))) == 2 * 4096


def test_heads_and_batch_rows_have_seeds_of_their_own():
  seeds = np.asarray(dropout.seeds(jax.random.key(0), 64, 64))
  assert len(np.unique(seeds)) == 2 * 64 * 64


def test_a_part_draws_what_the_whole_does_there():
  """Of the queries from 100 on and the keys from 30 on, counted from 0, with moved seeds."""
  q_seeds, kv_seeds = dropout.seeds(jax.random.key(0), B, N)
  part = bits(dropout.moved(q_seeds, 100), dropout.moved(kv_seeds, jnp.int32(30)), 7, 9)
  np.testing.assert_array_equal(part, drawn(0)[:, :, 100:107, 30:39])


def test_both_seeds_make_the_head_key_and_others_once_they_moved():
  """What seeds a chip's own generator: no two of 32 x 32 parts draw alike."""
  q_seeds, kv_seeds = dropout.seeds(jax.random.key(0), B, N)
  np.testing.assert_array_equal(dropout.head_key(q_seeds, kv_seeds), q_seeds)
  starts = range(0, 32 * 512, 512)
  numbers = [
    dropout.head_key(dropout.moved(q_seeds, q), dropout.moved(kv_seeds, kv))
    for q in starts
    for kv in starts
  ]
  assert len(np.unique(numbers)) == B * N * 32 * 32


def test_keys_are_of_any_generator():
  for name in ("threefry2x32", "rbg"):
    for seeds in dropout.seeds(jax.random.key(0, impl=name), 2, 3):
      assert (seeds.dtype, seeds.shape) == (jnp.uint32, (2, 3))


@ALL
def test_dropout_multiplies_the_probabilities(implementation):
  """At rate 1/2, bit for bit: P is doubled where kept, and neither it nor lse is renormalised."""
  q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 8, 4, 8))
  v = jnp.broadcast_to(jnp.eye(8)[:, None], v.shape)
  run = functools.partial(
    dot_product_attention, q, k, v, return_lse=True, implementation=implementation
  )
  whole, lse = run()
  dropped, dropped_lse = run(dropout_rate=0.5, dropout_key=jax.random.key(1))
  np.testing.assert_array_equal(dropped, np.where(dropped > 0, 2 * whole, 0))
  np.testing.assert_array_equal(dropped_lse, lse)


@pytest.mark.parametrize("implementation", ["xla", XlaChunked(2, 3)], ids=str)
def test_dropout_has_the_right_expectation(implementation):
  """The mean over 2000 keys lies within 5 standard errors of the output without dropout."""
  q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 4, 2, 8))
  run = functools.partial(dot_product_attention, q, k, v, implementation=implementation)
  draws = jax.jit(jax.vmap(lambda key: run(dropout_rate=0.2, dropout_key=key)))(
    jax.random.split(jax.random.key(1), 2000)
  )
  assert (abs(draws.mean(0) - run()) < 5 * draws.std(0) / math.sqrt(2000)).all()


@pytest.mark.parametrize("implementation", ["xla", XlaChunked(2, 3)], ids=str)
def test_gradient_matches_differences_with_a_fixed_key(implementation):
  """float64, along a random direction; differences are good to 1e-8."""
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    q, k, v, dq, dk, dv = jnp.asarray(rng.normal(size=(6, 2, 5, 2, 4)))
    weight = jnp.asarray(rng.normal(size=q.shape))

    @jax.jit
    def value(step):
      out = dot_product_attention(
        q + step * dq,
        k + step * dk,
        v + step * dv,
        is_causal=True,
        dropout_rate=0.3,
        dropout_key=jax.random.key(1),
        implementation=implementation,
      )
      return (weight * out).sum()

    difference = (value(1e-5) - value(-1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(value)(0.0), difference, rtol=1e-7)
