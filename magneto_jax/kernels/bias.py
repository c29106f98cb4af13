"""The relative position bias: a table of buckets by heads, and what it stands for.

Letters: N heads, T query length, S key length.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


def relative_buckets(
  relative_position: jax.Array, num_buckets: int, bidirectional: bool, max_distance: int
) -> jax.Array:
  """T5's bucket of a relative position: exact when near, logarithmic when far.

  With r = key position - query position, n = num_buckets // 2 if bidirectional else
  num_buckets, e = n // 2 and D = max_distance, bucket(r) = n [r > 0] + g(|r|) if bidirectional,
  and g(max(-r, 0)) if not, where

    g(m) = m  if m < e,  else  min(n - 1, e + floor(log(m / e) / log(D / e) * (n - e))).

  Args:
    relative_position: integers of any shape, key position minus query position.
    num_buckets: how many buckets there are, both directions together.
    bidirectional: whether keys ahead of the query have buckets of their own (encoders); if not,
      they share bucket 0 (decoders).
    max_distance: the distance from which on all keys share the last bucket.

  Returns:
    int32 buckets in [0, num_buckets), shaped like `relative_position`.

  Raises:
    ValueError: if there are too few buckets, or `max_distance` lies among the exact ones.

  Example:
    >>> relative_buckets(jnp.array([-200, -9, -1, 0, 1, 9, 200]), 32, True, 128).tolist()
    [15, 8, 1, 0, 17, 24, 31]

  Reference: Raffel et al., 2020, arXiv 1910.10683, section 2.1 and its released code.

  Differs from T5's code, which takes the logarithm on the device: here it is taken once, on the
  host, in float32, so that an approximate device logarithm cannot move a bucket's edge.
  """
  check_buckets(num_buckets, bidirectional, max_distance)
  directional = num_buckets // 2 if bidirectional else num_buckets
  exact = directional // 2
  distance = np.arange(max_distance + 1)
  log_ratio = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
  log_range = np.float32(math.log(max_distance / exact))
  far = exact + (log_ratio / log_range * np.float32(directional - exact)).astype(np.int32)
  bucket_of_distance = np.where(distance < exact, distance, np.minimum(far, directional - 1))
  behind = jnp.abs(relative_position) if bidirectional else jnp.maximum(-relative_position, 0)
  buckets = jnp.asarray(bucket_of_distance, jnp.int32)[jnp.minimum(behind, max_distance)]
  return buckets + directional * (relative_position > 0) if bidirectional else buckets


def check_buckets(num_buckets: int, bidirectional: bool, max_distance: int) -> None:
  """Raises ValueError where `relative_buckets` does."""
  exact = (num_buckets // 2 if bidirectional else num_buckets) // 2
  if exact < 1:
    raise ValueError(f"{num_buckets=} leaves no exact bucket ({bidirectional=})")
  if not isinstance(max_distance, int) or max_distance <= exact:
    raise ValueError(
      f"{max_distance=} must be an integer beyond the {exact} exact buckets ({num_buckets=})"
    )


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["table"],
  meta_fields=["bidirectional", "max_distance"],
)
@dataclasses.dataclass(frozen=True)
class RelativeBias:
  """T5's relative position bias, by its table: bias[n, t, s] = table[bucket(s - t), n].

  A pytree whose only leaf is the table. Kernels never see the [N, T, S] bias: they build the
  tiles they need from the table, and return its gradient.

  Attributes:
    table: [num_buckets, N], shared by whoever shares the record (T5: all layers of a stack).
    bidirectional: whether keys ahead of the query have buckets of their own.
    max_distance: the distance from which on all keys share the last bucket.

  Reference: Raffel et al., 2020, arXiv 1910.10683, section 2.1; see `relative_buckets`.
  """

  table: jax.Array
  bidirectional: bool = True
  max_distance: int = 128

  def buckets(self, relative_position: jax.Array) -> jax.Array:
    """The row of the table of each relative position."""
    return relative_buckets(
      relative_position, self.table.shape[0], self.bidirectional, self.max_distance
    )

  def strip(self, start: int | jax.Array, length: int) -> jax.Array:
    """The bias [N, length] of the relative positions start, start + 1, ...; start may be traced."""
    return jnp.asarray(self.table)[self.buckets(jnp.arange(length) + start)].T

  def materialize(self, T: int, S: int, q_offset: int | jax.Array = 0) -> jax.Array:
    """The bias [1, N, T, S] of queries q_offset .. q_offset + T - 1 and keys 0 .. S - 1."""
    return toeplitz(self.strip(1 - T - q_offset, T + S - 1), T, S)[None]


def toeplitz(strip: jax.Array, rows: int, columns: int) -> jax.Array:
  """The matrices [..., rows, columns] whose entry (i, j) is strip[..., j - i + rows - 1].

  A row is the one above it, moved by one: rows of rows + columns numbers, read again as rows of one
  number less, slide by themselves. So neither this nor its gradient (sums along the diagonals)
  gathers or scatters.

  Args:
    strip: [..., rows + columns - 1].
  """
  period = rows + columns
  *batch, _ = strip.shape
  padded = jnp.concatenate([strip, jnp.zeros_like(strip[..., :1])], axis=-1)
  repeated = jnp.broadcast_to(padded[..., None, :], (*batch, rows, period))
  flat = repeated.reshape(*batch, rows * period)[..., rows - 1 : rows * period - 1]
  return flat.reshape(*batch, rows, period - 1)[..., :columns]
