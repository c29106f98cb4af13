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


def bits(head_key: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
  """uint32, uniform, for each query and key.

    row = mix(head_key + query c),   bits = mix(row ^ key c)

  with c an odd constant and mix a bijection of 32 bits. All of a row's keys see one `row`: a pair
  costs one exclusive or and one mix, which has two products.

  Args:
    head_key: of `head_keys`.
    query, key: int32, counted from 0; all three broadcast together.

  Reference: the mix is "lowbias32", Chris Wellons, 2018, nullprogram.com/blog/2018/07/31.
  """
  row = _mix(head_key + _spread(query))
  return _mix(row ^ _spread(key))


def kept(drawn: jax.Array, rate: float) -> jax.Array:
  """Which uniform uint32 say that a probability stays: those >= rate 2^32, for a rate in [0, 1)."""
  # The least number of 32 bits drops nothing, the largest keeps one in 2^32.
  return drawn >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def keep(head_key: jax.Array, query: jax.Array, key: jax.Array, rate: float) -> jax.Array:
  """Whether the probability of a query and a key stays, by `bits`."""
  return kept(bits(head_key, query, key), rate)


def _spread(index: jax.Array) -> jax.Array:
  return index.astype(jnp.uint32) * jnp.uint32(_SPREAD)


def _mix(x: jax.Array) -> jax.Array:
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)
