"""Attention by blocks, in plain jax.numpy: memory linear in the length, hidden blocks not computed.

The softmax is taken online, block by block of the keys, and the backward pass computes the
probabilities again from the logarithm of their sum. Any platform runs it; on CPUs a block of the
scores stays in the cache, which the whole square does not.

Letters: B batch, T query length, S key and value length, N heads, K key/value heads,
G = N / K heads a key/value head, H head dim; q and s the queries and keys of one block, R = G q.

Reference: Rabe and Staats, 2021, arXiv 2112.05682 (by blocks); Dao et al., 2022, arXiv 2205.14135
(the backward pass).
"""

import dataclasses

import jax
import jax.numpy as jnp

from magneto_jax.kernels import dropout
from magneto_jax.kernels.bias import RelativeBias, toeplitz
from magneto_jax.kernels.call import Call, pad


@dataclasses.dataclass(frozen=True)
class XlaChunked:
  """The implementation `xla_chunked`: serves every call, on every platform.

  Attributes:
    block_q, block_kv: the largest sides of a block, None for what suits the call. A call of at
      most block_q block_kv pairs is one block.
  """

  block_q: int | None = None
  block_kv: int | None = None

  name = "xla_chunked"
  platforms = None

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if value is not None and not (isinstance(value, int) and value > 0):
        raise ValueError(f"{name}={value!r} must be a positive integer, or None")

  def fitted(self, call: Call) -> "XlaChunked":
    """With its blocks as they are cut; it refuses nothing."""
    return XlaChunked(*self._sides(call))

  def is_worthwhile(self, call: Call) -> bool:
    """Always."""
    return True

  def forward(self, call: Call) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN)."""
    T = call.sizes[1]
    blocks = _Blocks(call, *self._sides(call))
    out, lse = blocks.map_queries(blocks.attend)
    out_BNTH, lse_BNT = blocks.join(out)[:, :, :T], blocks.join(lse)[:, :, :T]
    return out_BNTH.swapaxes(1, 2), lse_BNT.swapaxes(1, 2)

  def backward(self, call: Call, out_BTNH, lse_BTN, dout_BTNH, dlse_BTN) -> tuple:
    """(dq_BTNH, dk_BSKH, dv_BSKH, dbias)."""
    blocks = _Blocks(call, *self._sides(call))
    dot_BTN = jnp.einsum("BTNH,BTNH->BTN", out_BTNH, dout_BTNH, preferred_element_type=call.dtype)
    delta_BTN = dot_BTN - dlse_BTN
    return blocks.gradients(*(x.swapaxes(1, 2) for x in (lse_BTN, delta_BTN, dout_BTNH)))

  def _sides(self, call: Call) -> tuple[int, int]:
    _, T, S, _, _, _ = call.sizes
    # Measured on CPUs, with 4 to 32 heads in all: one block has no loop, and XLA gives a product to
    # several cores only from 512 x 256 on.
    block_q, block_kv, pairs = 512, 256, 512**2
    if self.block_q or self.block_kv:
      block_q, block_kv = self.block_q or block_q, self.block_kv or block_kv
      pairs = block_q * block_kv
    # Few queries, as in decoding, or few keys make a long block.
    block_q, block_kv = max(block_q, pairs // S), max(block_kv, pairs // T)
    return (T, S) if T * S <= pairs else (_even(T, block_q), _even(S, block_kv))


def _even(length: int, block: int) -> int:
  """The side of as many blocks as `block` makes of the length, with the least padding."""
  return -(-length // -(-length // block))


class _Blocks:
  """The arrays of a call, heads first, cut into blocks (the last ones padded)."""

  def __init__(self, call: Call, block_q: int, block_kv: int):
    self._call = call
    self._B, self._T, self._S, self._N, self._K, self._H = call.sizes
    self._block_q, self._block_kv = block_q, block_kv
    self._rows, self._columns = -(-self._T // block_q), -(-self._S // block_kv)
    self._q = pad(call.q_BTNH.swapaxes(1, 2), 2, block_q)
    self._k = pad(call.k_BSKH.swapaxes(1, 2), 2, block_kv)
    self._v = pad(call.v_BSKH.swapaxes(1, 2), 2, block_kv)
    self._bias = self._cut_bias(call.bias)
    if call.dropout_rate > 0:
      # Before the loops, or XLA hashes them again for every pair. [B, N, blocks, q or s]: the start
      # of a slice would go into each pair's address, which keeps XLA from vectorising it.
      query = jnp.arange(self._rows * block_q).reshape(1, 1, -1, block_q)
      key = jnp.arange(self._columns * block_kv).reshape(1, 1, -1, block_kv)
      self._of_queries = dropout.of_queries(call.q_seeds[:, :, None, None], query)
      self._of_keys = dropout.of_keys(call.kv_seeds[:, :, None, None], key)
    # Padded queries are cut off in the end; padded keys are hidden as keys past the length are.
    masked, hidden = call.hiding_padding() if self._S % block_kv else call, {}
    if call.q_segment_ids is not None:
      hidden["q_segment_ids"] = pad(call.q_segment_ids, 1, block_q)
      hidden["kv_segment_ids"] = pad(call.kv_segment_ids, 1, block_kv)
    self._masked = dataclasses.replace(masked, **hidden)

  def _cut_bias(self, bias) -> jax.Array | None:
    """A dense bias as it is, padded; a relative one as the strip [N, T + S] of its distances."""
    T, S = self._rows * self._block_q, self._columns * self._block_kv
    if bias is None:
      return None
    bias = jax.tree.map(lambda x: x.astype(self._call.dtype), bias)
    if isinstance(bias, RelativeBias):
      return bias.strip(1 - T - self._call.q_offset, T + S - 1)
    for axis, block in ((2, self._block_q), (3, self._block_kv)):
      bias = pad(bias, axis, block) if bias.shape[axis] > 1 else bias
    return bias

  def map_queries(self, attend):
    """`attend(i, first, end)` of all blocks of queries i, which see the blocks first .. end - 1."""
    return _scan(lambda _, x: (None, attend(*x)), None, self._rows, self._seen_from(axis=2))[1]

  def join(self, blocks: jax.Array) -> jax.Array:
    """[blocks, B, N, q, ...] as [B, N, blocks q, ...]."""
    joined = jnp.moveaxis(blocks, 0, 2)
    return joined.reshape(*joined.shape[:2], -1, *joined.shape[4:])

  def _seen_from(self, axis: int) -> tuple[jax.Array, jax.Array]:
    """For each row (axis 2) or column (axis 1) of blocks the first one seen, and the end."""
    # One batch row that sees a block makes all compute it.
    seen = jnp.asarray(self._masked.block_states(self._block_q, self._block_kv) > 0).any(0)
    if axis == 1:
      seen = seen.T
    count = seen.shape[1]
    first = jnp.argmax(seen, axis=1)
    end = jnp.where(seen.any(1), count - jnp.argmax(seen[:, ::-1], axis=1), first)
    return first.astype(jnp.int32), end.astype(jnp.int32)

  def attend(self, i, first, end):
    """The output [B, N, q, H] and lse [B, N, q] of the block of queries i."""
    dtype, lowest = self._call.dtype, jnp.finfo(self._call.dtype).min
    q = self._queries(self._q, i)

    def step(j, carry):
      acc, total, top = carry
      # Bounded from below, so that a row without keys has weights exp(-inf) = 0, not NaN.
      logits, _ = self._logits(q, i, j)
      new_top = jnp.maximum(top, logits.max(-1, keepdims=True))
      weights, shrink = jnp.exp(logits - new_top), jnp.exp(top - new_top)
      total = total * shrink + weights.sum(-1, keepdims=True)
      product = self._product("BKRS,BKSH->BKRH", self._drop(weights, i, j), self._keys(self._v, j))
      product = product.reshape(acc.shape)
      # Without a loop there is nothing to add to, which XLA cannot know.
      return product if self._columns == 1 else acc * shrink + product, total, new_top

    rows = (self._B, self._N, self._block_q)
    start = (
      jnp.zeros((*rows, self._H), dtype),
      jnp.zeros((*rows, 1), dtype),
      jnp.full((*rows, 1), lowest, dtype),
    )
    acc, total, top = self._loop(first, end, self._columns, step, start)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, lowest, top + jnp.log(total))
    return (acc / total).astype(self._call.q_BTNH.dtype), lse[..., 0]

  def gradients(self, lse, delta, dout):
    """(dq_BTNH, dk_BSKH, dv_BSKH, dbias), given lse, delta [B, N, T] and dout [B, N, T, H].

    With P = exp(A - lse), and delta = sum_h out dout - dlse, the gradient at A is
    P (dropout'(dout v^T) - delta), which serves the bias as it is, queries and keys through the
    soft cap and the scale.
    """
    call, dtype = self._call, self._call.dtype
    # Padded queries have the weights exp(-inf) = 0: a relative bias reaches them, however large.
    lse = pad(lse, 2, self._block_q, jnp.inf)
    delta, dout = (pad(x, 2, self._block_q) for x in (delta, dout))
    dbias = None if self._bias is None else jnp.zeros(self._bias.shape, dtype)
    dq = jnp.zeros((self._B, self._N, self._rows * self._block_q, self._H), dtype)
    q_HR, dout_HR = self._transposed(self._q), self._transposed(dout)

    def column(carry, x):
      j, first, end = x
      k, v = self._keys(self._k, j), self._keys(self._v, j)

      def step(i, carry):
        dq, dbias, dk, dv = carry
        q, do = self._queries(self._q, i), self._queries(dout, i)
        logits, slope = self._logits(q, i, j)
        weights = jnp.exp(logits - self._queries(lse, i)[..., None])
        dv += self._product("BKHR,BKRS->BKHS", dout_HR[i], self._drop(weights, i, j))
        dweights = self._product("BKRH,BKSH->BKRS", do, v).reshape(logits.shape)
        dlogits = weights * (self._drop(dweights, i, j) - self._queries(delta, i)[..., None])
        dbias = self._add_to_bias(dbias, dlogits, i, j)
        dlogits = dlogits * call.scale if slope is None else dlogits * call.scale * slope
        dk += self._product("BKHR,BKRS->BKHS", q_HR[i], dlogits)
        dq_block = self._product("BKRS,BKSH->BKRH", dlogits, k)
        dq = _add_at(
          dq, dq_block.reshape(self._B, self._N, -1, self._H), (0, 0, i * self._block_q, 0)
        )
        return dq, dbias, dk, dv

      keys = (self._B, self._K, self._H, self._block_kv)
      start = *carry, jnp.zeros(keys, dtype), jnp.zeros(keys, dtype)
      dq, dbias, dk, dv = self._loop(first, end, self._rows, step, start)
      return (dq, dbias), tuple(x.astype(k.dtype).swapaxes(2, 3) for x in (dk, dv))

    (dq, dbias), dkv = _scan(column, (dq, dbias), self._columns, self._seen_from(axis=1))
    dk, dv = (self.join(x)[:, :, : self._S].swapaxes(1, 2) for x in dkv)
    dq = dq[:, :, : self._T].swapaxes(1, 2).astype(call.q_BTNH.dtype)
    if dbias is not None:
      (dbias,) = jax.vjp(self._cut_bias, call.bias)[1](dbias)
    return dq, dk, dv, dbias

  def _queries(self, x, i):
    """A block of [B, N, T, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, i * self._block_q, self._block_q, 2)

  def _transposed(self, x):
    """The blocks of [B, N, T, H], each as [B, K, H, R]."""
    x = x.reshape(self._B, self._K, -1, self._rows, self._block_q, self._H)
    x = x.transpose(3, 0, 1, 5, 2, 4)
    return x.reshape(self._rows, self._B, self._K, self._H, -1)

  def _keys(self, x, j):
    """A block of [B, K, S, H]."""
    return jax.lax.dynamic_slice_in_dim(x, j * self._block_kv, self._block_kv, 2)

  def _product(self, equation, left, right):
    """One product a key/value head: R = G q rows, whichever of the two are the queries'."""
    dtype = self._call.q_BTNH.dtype
    grouped = [
      x.astype(dtype).reshape(self._B, self._K, -1, x.shape[-1]) if x.shape[1] == self._N else x
      for x in (left, right)
    ]
    return jnp.einsum(equation, *grouped, preferred_element_type=self._call.dtype)

  def _logits(self, q, i, j):
    """[B, N, q, s] of a block, -inf where hidden, and the soft cap's slope (None without one)."""
    call = self._call
    k = self._keys(self._k, j)
    logits = self._product("BKRH,BKSH->BKRS", q, k) * call.scale
    logits = logits.reshape(self._B, self._N, self._block_q, self._block_kv)
    slope = None
    if call.logits_soft_cap is not None:
      capped = jnp.tanh(logits / call.logits_soft_cap)
      logits, slope = call.logits_soft_cap * capped, 1 - jnp.square(capped)
    if self._bias is not None:
      logits += self._bias_block(i, j)
    if not self._masked.hides_nothing:
      logits = jnp.where(self._masked.visible(*self._indices(i, j)), logits, -jnp.inf)
    return logits, slope

  def _indices(self, i, j):
    query = i * self._block_q + jnp.arange(self._block_q)
    return query, j * self._block_kv + jnp.arange(self._block_kv)

  def _drop(self, weights, i, j):
    rate = self._call.dropout_rate
    if rate == 0:
      return weights
    of_queries = [x[:, :, i, :, None] for x in self._of_queries]
    of_keys = [x[:, :, j, None] for x in self._of_keys]
    kept = dropout.kept(dropout.bits(of_queries, of_keys), rate)
    return jnp.where(kept, weights / (1 - rate), 0)

  def _strip_start(self, i, j):
    """Where the distances of a block begin in the strip of a relative bias."""
    return (self._rows - 1 - i) * self._block_q + j * self._block_kv

  def _bias_slices(self, i, j):
    """Start and size of a block of the dense bias; dimensions that broadcast have size 1."""
    sizes = (*self._bias.shape[:2], self._block_q, self._block_kv)
    sizes = tuple(min(a, b) for a, b in zip(sizes, self._bias.shape, strict=True))
    q0 = i * self._block_q if self._bias.shape[2] > 1 else 0
    return (0, 0, q0, j * self._block_kv if self._bias.shape[3] > 1 else 0), sizes

  def _bias_block(self, i, j):
    if isinstance(self._call.bias, RelativeBias):
      length = self._block_q + self._block_kv - 1
      strip = jax.lax.dynamic_slice_in_dim(self._bias, self._strip_start(i, j), length, 1)
      return toeplitz(strip, self._block_q, self._block_kv)[None]
    start, sizes = self._bias_slices(i, j)
    return jax.lax.dynamic_slice(self._bias, _int32(start), sizes)

  def _add_to_bias(self, dbias, dlogits, i, j):
    """Adds a block's gradient: along the diagonals, or over what the dense bias broadcasts."""
    if dbias is None:
      return None
    if isinstance(self._call.bias, RelativeBias):
      length = self._block_q + self._block_kv - 1
      tile = jnp.zeros((self._N, length), dlogits.dtype)
      along = jax.linear_transpose(lambda s: toeplitz(s, self._block_q, self._block_kv), tile)
      return _add_at(dbias, along(dlogits.sum(0))[0], (0, self._strip_start(i, j)))
    start, sizes = self._bias_slices(i, j)
    axes = tuple(a for a, size in enumerate(sizes) if size == 1 and dlogits.shape[a] > 1)
    return _add_at(dbias, dlogits.sum(axes, keepdims=True), start)

  def _loop(self, first, end, count, step, carry):
    """`step(index, carry)` over first .. end - 1, of which there are at most `count`."""
    return step(0, carry) if count == 1 else jax.lax.fori_loop(first, end, step, carry)


def _scan(body, carry, count, bounds):
  """A scan over (index, first, end), without a loop if there is one index."""
  if count == 1:
    carry, y = body(carry, (0, *(x[0] for x in bounds)))
    return carry, jax.tree.map(lambda x: x[None], y)
  return jax.lax.scan(body, carry, (jnp.arange(count, dtype=jnp.int32), *bounds))


def _add_at(total, update, start):
  old = jax.lax.dynamic_slice(total, _int32(start), update.shape)
  return jax.lax.dynamic_update_slice(total, old + update, _int32(start))


def _int32(indices):
  """One dtype for indices known while tracing and others, also where integers have 64 bits."""
  return tuple(jnp.int32(i) for i in indices)
