"""Which attention probabilities are dropped: a hash of the key and of each one's place.

It depends on nothing else, neither on the size of a block nor on the device, so that every
implementation drops the same ones, forwards and backwards, and none has to remember them.
"""

import jax
import jax.numpy as jnp

# 2^32 over the golden ratio, odd: multiples of it are spread over all 32 bits.
_SPREAD = 0x9E3779B9


def seeds(key: jax.Array, B: int, N: int) -> tuple[jax.Array, jax.Array]:
  """Those of the queries and those of the keys, uint32 [B, N], from a typed key of any generator.

  A head and row of the batch has a head_key; its queries have the seed head_key, and its keys the
  seed mix(head_key), a sequence of their own: on that of the queries, heads whose keys lie close
  would drop alike, but for a shift along the diagonal.
  """
  seed = jax.random.bits(key, (2,), jnp.uint32)
  batch = _mix(seed[0] ^ _spread(jax.lax.broadcasted_iota(jnp.uint32, (B, 1), 0)))
  head = seed[1] + _spread(jax.lax.broadcasted_iota(jnp.uint32, (1, N), 1))
  head_key = _mix(batch ^ head)
  return head_key, _mix(head_key)


def moved(seed: jax.Array, start: int | jax.Array) -> jax.Array:
  """The seed of a part of the queries, or keys, that counts from 0 what is `start` in the whole."""
  return seed + _spread(jnp.asarray(start))


def head_key(q_seed: jax.Array, kv_seed: jax.Array) -> jax.Array:
  """One number of both seeds: of those of `seeds` the head_key, another one once they moved."""
  return q_seed + (kv_seed - _mix(q_seed))


def of_queries(seed: jax.Array, query: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(r, 2 mix(r) + 1), what `bits` needs to know of queries; see there.

  Args:
    seed: of the queries; broadcasts with them.
    query: int32, counted from where the seed was `moved` to.
  """
  r = _mix(seed + _spread(query))
  return r, 2 * _mix(r) + 1


def of_keys(seed: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(k, mix(k)), what `bits` needs to know of keys, as in `of_queries`."""
  k = _mix(seed + _spread(key))
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


def _spread(index: jax.Array) -> jax.Array:
  return index.astype(jnp.uint32) * jnp.uint32(_SPREAD)


def _mix(x: jax.Array) -> jax.Array:
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)
