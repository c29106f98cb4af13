"""Which attention probabilities are dropped: a hash of the key and of each one's place.

It depends on nothing else, neither on the size of a block nor on the device, so that every
implementation drops the same ones, forwards and backwards, and none has to remember them.
"""

import jax
import jax.numpy as jnp

# 2^32 over the golden ratio, odd: multiples of it are spread over all 32 bits.
_SPREAD = 0x9E3779B9


def head_keys(key: jax.Array, B: int, N: int) -> jax.Array:
  """uint32[B, N] from a typed key of any generator: one a head and row of the batch."""
  seed = jax.random.bits(key, (2,), jnp.uint32)
  batch = _mix(seed[0] ^ _spread(jax.lax.broadcasted_iota(jnp.uint32, (B, 1), 0)))
  head = seed[1] + _spread(jax.lax.broadcasted_iota(jnp.uint32, (1, N), 1))
  return _mix(batch ^ head)


def of_queries(head_key: jax.Array, query: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(r, 2 mix(r) + 1), what `bits` needs to know of queries; see there.

  Args:
    head_key: of `head_keys`; broadcasts with the queries.
    query: int32, counted from 0.
  """
  r = _mix(head_key + _spread(query))
  return r, 2 * _mix(r) + 1


def of_keys(head_key: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(k, mix(k)), what `bits` needs to know of keys, as in `of_queries`."""
  # Keys have a sequence of their own: on that of the queries, heads whose keys lie close would drop
  # alike, but for a shift along the diagonal.
  k = _mix(_mix(head_key) + _spread(key))
  return k, _mix(k)


def bits(of_queries: tuple, of_keys: tuple) -> jax.Array:
  """uint32, uniform, for each query and key: two sums and one product a pair, or fewer.

    r = mix(head_key + query c),   k = mix(mix(head_key) + key c)
    bits = (2 mix(r) + 1) k + r + mix(k)

  modulo 2^32, with c an odd constant and mix a bijection of 32 bits. Whatever the product, a
  uniform r makes uniform bits. Of products the lower bits depend on the lower ones of the factors
  alone: the bits are to be compared, from the highest on, not taken apart.

  Why the sums: of products r k alone, two rows whose r stand in a small ratio are correlated
  (r' = 3 r: by 1/3), as some pair of rows is in one head of 50 at 4096 queries. With mix(k) two
  rows are so only if the difference of their factors is a multiple of a high power of two, and
  even then by no more than the rest of it leaves.

  Args:
    of_queries, of_keys: of the functions of these names; all broadcast together.

  Reference: the mix is "lowbias32", Chris Wellons, 2018, nullprogram.com/blog/2018/07/31.
  """
  (r, factor), (k, summand) = of_queries, of_keys
  return factor * k + (r + summand)


def kept(drawn: jax.Array, rate: float) -> jax.Array:
  """Which uniform uint32 say that a probability stays: those of at least `threshold(rate)`."""
  return drawn >= jnp.uint32(threshold(rate))


def threshold(rate: float) -> int:
  """rate 2^32, rounded, of a rate in [0, 1): 0 drops nothing, the largest keeps one in 2^32."""
  return min(round(rate * 2**32), 2**32 - 1)


def keep(head_key: jax.Array, query: jax.Array, key: jax.Array, rate: float) -> jax.Array:
  """Whether the probability of a query and a key stays, by `bits`; all three broadcast together."""
  return kept(bits(of_queries(head_key, query), of_keys(head_key, key)), rate)


def _spread(index: jax.Array) -> jax.Array:
  return index.astype(jnp.uint32) * jnp.uint32(_SPREAD)


def _mix(x: jax.Array) -> jax.Array:
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)
