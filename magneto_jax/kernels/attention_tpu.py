"""Attention for TPUs, in Pallas: a forward kernel, and one backward kernel for everything.

Letters: B batch, T query length, S key and value length, N heads, K key/value heads, H head dim.
A *lane block* is what one step of a kernel reads of a token: L lanes (a multiple of 128) that hold
P heads, P = 2 at H = 64. J = N / P lane blocks of the queries.

Layout. Queries, keys and values stay as the projections leave them, [B, T, N H]: a block of them is
never padded in HBM, nor copied. A head's lanes are singled out by zeroing the others' in one factor
of a product, which costs the matrix unit nothing: it is 128 lanes deep either way.

Orientation. Scores are held transposed, keys by queries (s, q): the sums of the softmax then run
over sublanes, which are plain additions of registers, and the statistics of a query are one row,
not a register of 128 equal lanes. Outputs and gradients are summed transposed too, lanes by tokens,
where a lane block holds several heads: a head's product is then its own rows alone.

Factors. What all pairs share is kept out of the square: the scale goes into the exponential's
argument, which is multiplied anyway, and with dropout's 1 / (1 - rate) into the sums at the end.

What is hidden. For every block of queries there is a list of the blocks of keys it sees, made
before the kernel runs and prefetched: hidden blocks are neither fetched nor computed, and only
those that are seen in part are masked.

Relative bias. A tile of it depends on its distance from the diagonal alone. Near the diagonal there
are a few different ones, which stay in VMEM for all blocks of a head; farther than `max_distance`
all pairs of a side share one number. The gradient is summed up the same way.

Reference: Dao et al., 2022, arXiv 2205.14135; the block lists and the single backward kernel are
also those of JAX's splash attention.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from magneto_jax.kernels import dropout, jax_names
from magneto_jax.kernels.bias import RelativeBias, toeplitz
from magneto_jax.kernels.call import FULL, PARTIAL, Call, pad
from magneto_jax.kernels.pallas import Refs, matmul

_LANES = 128
# Queries that go through the softmax together: a matrix unit each for 128 of them, and scores that
# do not crowd out everything else. A larger block is cut into strips.
_STRIP = 512
# What our estimate may come to, and what the compiler may use, which knows better. Both fit the
# smallest of the chips: v5p and tpu7x have 64 MiB.
_VMEM_BYTES, _VMEM_LIMIT = 48 * 2**20, 56 * 2**20
# Scalar memory for the lists of blocks; a core has 1 MiB.
_SMEM_BYTES = 512 * 2**10


@dataclasses.dataclass(frozen=True)
class PallasTpu:
  """The implementation `pallas_tpu`: bfloat16 and float32, every feature.

  Attributes:
    block_q, block_kv: the sides of a block of the forward pass, multiples of 128; None for what
      suits the call. A block covers at most the (padded) length.
    block_q_backward, block_kv_backward: of the backward pass.
    random: "hash", the same bits as everywhere, or "hardware": the chip's generator, which is
      faster; its bits depend on the generation of the chip, and no other implementation has them.
    interpret: runs the kernels on any platform, slowly, as JAX programs.
  """

  block_q: int | None = None
  block_kv: int | None = None
  block_q_backward: int | None = None
  block_kv_backward: int | None = None
  random: str = "hash"
  interpret: bool = False

  name = "pallas_tpu"

  def __post_init__(self):
    for name in _SIDES:
      value = getattr(self, name)
      if value is not None and not (isinstance(value, int) and value > 0 and value % _LANES == 0):
        raise ValueError(f"{name}={value!r} must be a positive multiple of {_LANES}, or None")
    if self.random not in ("hash", "hardware"):
      raise ValueError(f"random={self.random!r} must be hash or hardware")

  @property
  def platforms(self) -> tuple[str, ...] | None:
    """All (None) where it is interpreted."""
    return None if self.interpret else ("tpu",)

  def fitted(self, call: Call) -> "PallasTpu":
    """With all block sizes filled in, if it can serve the call; else NotImplementedError."""
    if call.q_BTNH.dtype not in (jnp.bfloat16, jnp.float32):
      raise NotImplementedError(f"{call.q_BTNH.dtype} is neither bfloat16 nor float32")
    if self.interpret and self.random == "hardware" and call.dropout_rate > 0:
      raise NotImplementedError("the hardware's random bits cannot be interpreted")
    fitted = self
    for names in (_SIDES[:2], _SIDES[2:]):
      backward = names != _SIDES[:2]
      # The first blocks that leave room for the tiles of a relative bias.
      for blocks in _preferred(call):
        own = (getattr(self, name) for name in names)
        sides = [mine or block for mine, block in zip(own, blocks, strict=True)]
        layout = _Layout(call, *sides)
        if layout.vmem_bytes(backward) <= _VMEM_BYTES:
          break
      else:
        raise NotImplementedError(
          f"the {'backward' if backward else 'forward'} pass in blocks of "
          f"{layout.block_q} queries by {layout.block_kv} keys needs "
          f"{layout.vmem_bytes(backward) >> 20} MiB of vector memory, {_VMEM_BYTES >> 20} are safe"
        )
      fitted = dataclasses.replace(fitted, **dict(zip(names, sides, strict=True)))
    return fitted

  def is_worthwhile(self, call: Call) -> bool:
    """Whether a kernel has anything to gain: decoding and short rows are left to XLA."""
    _, T, S, _, _, _ = call.sizes
    return T * S >= _LANES * _LANES

  def forward(self, call: Call) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN)."""
    fitted = self.fitted(call)
    return _Kernel(call, fitted.block_q, fitted.block_kv, self.random, self.interpret).forward()

  def backward(self, call: Call, out_BTNH, lse_BTN, dout_BTNH, dlse_BTN) -> tuple:
    """(dq_BTNH, dk_BSKH, dv_BSKH, dbias)."""
    fitted = self.fitted(call)
    sides = fitted.block_q_backward, fitted.block_kv_backward
    dot_BTN = jnp.einsum("BTNH,BTNH->BTN", out_BTNH, dout_BTNH, preferred_element_type=jnp.float32)
    kernel = _Kernel(call, *sides, self.random, self.interpret)
    return kernel.backward(lse_BTN, dot_BTN - dlse_BTN, dout_BTNH)


_SIDES = ("block_q", "block_kv", "block_q_backward", "block_kv_backward")
# Blocks (queries, keys) in order of preference, ranked by the kernels' static cost
# (`python -m benchmarks.tpu_static_cost`). Two strips of queries overlap: a lane block of one head
# needs a larger block for that, one of two heads has two already. Larger ones still gain up to a
# tenth where the matrix unit is 256 deep and wide, so that it waits for the vector unit; elsewhere
# it is a fiftieth, not worth twice the code.
_SMALL, _LARGE = (512, 512), (1024, 512)
_SMALLER = ((256, 512), (256, 256), (128, 256), (128, 128))
# By the start of `device_kind`: for lane blocks of one head and of more; first the default.
_PREFERRED = {
  "": ((_LARGE, _SMALL), (_SMALL,)),
  "TPU v6": ((_LARGE, _SMALL), (_LARGE, _SMALL)),
  "TPU7": ((_LARGE, _SMALL), (_LARGE, _SMALL)),
}


def _preferred(call: Call) -> tuple[tuple[int, int], ...]:
  _, T, _, N, _, H = call.sizes
  kinds = [kind for kind in _PREFERRED if _device_kind().startswith(kind)]
  one, more = _PREFERRED[kinds[-1]]
  blocks = more if H <= _LANES // 2 and N > 1 else one
  if call.q_BTNH.dtype == jnp.float32 or H > _LANES:
    # Their products are many instructions as it is.
    blocks = (_SMALL,)
  if call.window != (None, None):
    # A larger share of large blocks is computed only to be masked.
    blocks = [block for block in blocks if block[0] <= max(512, T // 8)]
  return (*blocks, *_SMALLER)


@functools.cache
def _device_kind() -> str:
  """Of the TPU that is used; "" where it is compiled for from elsewhere, and not known here."""
  return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else ""


class _Layout:
  """How a call is cut into blocks, and what they need: known from shapes alone."""

  def __init__(self, call: Call, block_q: int, block_kv: int):
    self._call = call
    self._B, self._T, self._S, self._N, self._K, self._H = call.sizes
    self.block_q, self._rows = _split(self._T, block_q)
    self.block_kv, self._columns = _split(self._S, block_kv)
    self._padded_T, self._padded_S = self.block_q * self._rows, self.block_kv * self._columns

    # Heads of 64 lie two in a lane block. Each other head dim is padded, as are 64 lanes left over.
    self._width = max(32, 1 << (self._H - 1).bit_length())
    if self._H > _LANES or self._N % max(1, _LANES // self._width):
      self._width = -(-self._H // _LANES) * _LANES
    self._P = max(1, _LANES // self._width)
    self._L = self._P * self._width
    self._J = self._N // self._P
    # Lane blocks of queries that read the same lane block of keys. Two heads of a lane block read
    # the same one if it holds a key/value head twice; else the heads are repeated.
    group = self._N // self._K
    self._shared = group // self._P if group % self._P == 0 else 1
    self._relative = isinstance(call.bias, RelativeBias)
    self._dense = call.bias is not None and not self._relative
    # Logits are held divided by this, which saves their multiplication by the scale: that of the
    # exponential's argument is needed anyway. (A dense bias may be too large to be divided.)
    unit = call.scale if call.logits_soft_cap is None else call.logits_soft_cap
    self._unit = 1.0 if self._dense or unit <= 0 else unit

  def vmem_bytes(self, backward: bool) -> int:
    """What the blocks of a step need, twice where they are fetched ahead, with its temporaries."""
    itemsize = self._call.q_BTNH.dtype.itemsize
    rows, columns = self.block_q * self._L, self.block_kv * self._L
    square = 4 * self.block_q * self.block_kv
    bias = 0
    if self._relative:
      bias = (4 if backward else 2) * self._P * self._tile_count() * square
    elif self._dense:
      bias = 2 * self._P * square
    if backward:
      dq = self._padded_T * self._L * (4 + 2 * itemsize)
      blocks = 2 * itemsize * (2 * rows + 4 * columns) + 2 * 4 * columns
      return dq + blocks + bias + 6 * square
    return 2 * itemsize * (2 * rows + 2 * columns) + 4 * rows + bias + 4 * square

  def _tile_step(self) -> int:
    return math.gcd(self.block_q, self.block_kv)

  def _phase(self):
    """The distance key - query at the corner of a tile, modulo the step from tile to tile."""
    return -self._call.q_offset % self._tile_step()

  def _first_tile(self) -> int:
    """The number of the first tile that is not all behind: its corner is phase + number step."""
    step, static = self._tile_step(), self._call.traced_offset is None
    reach = self._call.bias.max_distance + self.block_kv - 1
    first = (-reach - (self._phase() if static else step - 1)) // step + 1
    if static:  # None is farther behind than the first key is from the last block of queries.
      first = max(first, (-(self._rows - 1) * self.block_q - self._call.q_offset) // step)
    return first

  def _tile_count(self) -> int:
    step, static = self._tile_step(), self._call.traced_offset is None
    reach = self._call.bias.max_distance + self.block_q - 1
    last = -((self._phase() if static else 0) - reach) // step
    last -= (reach - (self._phase() if static else 0)) % step == 0
    if static:
      last = min(last, ((self._columns - 1) * self.block_kv - self._call.q_offset) // step)
    return max(1, last - self._first_tile() + 1)


class _Kernel(_Layout):
  """The two passes of a call at one size of blocks."""

  def __init__(self, call: Call, block_q: int, block_kv: int, random: str, interpret: bool):
    super().__init__(call, block_q, block_kv)
    self._random, self._interpret = random, interpret
    if self._padded_S > self._S:
      # Padded keys are hidden as keys past the length are; padded queries are cut off in the end.
      self._call = call.hiding_padding()

  # The layout: linear maps of the arguments, so that gradients come back through their transposes.

  def _queries(self, x_BTNH):
    """[B, T, N, H] as [B, padded T, J L]."""
    x = pad(pad(x_BTNH, 3, self._width), 1, self.block_q)
    return x.reshape(self._B, -1, self._J * self._L)

  def _keys(self, x_BSKH):
    """[B, S, K, H] as [B, padded S, J / shared L]."""
    x = pad(pad(x_BSKH, 3, self._width), 1, self.block_kv)
    group = self._N // self._K
    copies = self._P if group % self._P == 0 and group > 1 else group
    if copies > 1:
      x = jnp.broadcast_to(x[:, :, :, None], (*x.shape[:3], copies, x.shape[3]))
    return x.reshape(self._B, x.shape[1], -1)

  def _statistics(self, x_BTN, fill=0.0):
    """[B, T, N] as [B, J, P, padded T]."""
    missing = self._padded_T - self._T
    x = jnp.pad(x_BTN, ((0, 0), (0, missing), (0, 0)), constant_values=fill)
    return x.swapaxes(1, 2).reshape(self._B, self._J, self._P, -1)

  def _ids(self, ids, block):
    """[B, length] as [B, 1, padded length]."""
    return pad(ids.astype(jnp.int32), 1, block)[:, None]

  # The bias.

  def _tiles(self, bias: RelativeBias):
    """The tiles near the diagonal [J, P, tiles, s, q], the numbers far behind and ahead [N 2]."""
    bias = jax.tree.map(self._in_units, bias)
    step, count, width = self._tile_step(), self._tile_count(), self.block_q + self.block_kv - 1
    start = self._phase() + self._first_tile() * step - self.block_q + 1
    strip = bias.strip(start, (count - 1) * step + width)[:, ::-1]
    tiles = [
      toeplitz(strip[:, i * step : i * step + width], self.block_kv, self.block_q)
      for i in reversed(range(count))
    ]
    far = [bias.strip(side * bias.max_distance, 1) for side in (-1, 1)]
    shape = (self._J, self._P, count, self.block_kv, self.block_q)
    return jnp.stack(tiles, axis=1).reshape(shape), jnp.concatenate(far, axis=1).reshape(-1)

  def _in_units(self, table):
    """Finite numbers stay finite: -inf forbids a pair, and the lowest number does not."""
    table = table.astype(jnp.float32)
    limits = jnp.finfo(jnp.float32)
    return jnp.where(jnp.isinf(table), table, jnp.clip(table / self._unit, limits.min, limits.max))

  def _dense_bias(self, bias):
    """[B', N', T', S'] padded; a bias of one number a query lies along its last axis."""
    if bias.shape[3] == 1:
      bias = jnp.broadcast_to(bias, (*bias.shape[:2], self._T, 1)).swapaxes(2, 3)
      return pad(bias, 3, self.block_q)
    bias = pad(bias, 2, self.block_q) if bias.shape[2] > 1 else bias
    return pad(bias, 3, self.block_kv)

  # The lists of blocks.

  def _states(self):
    """What a block hides, int32 [B or 1, rows, columns]: no more than scalar memory holds."""
    states = self._call.block_states(self.block_q, self.block_kv)
    if 4 * math.prod(states.shape) > _SMEM_BYTES:
      # The same for the whole batch: what one row sees, all compute.
      whole = jnp.where((states == FULL).all(0), FULL, PARTIAL)
      states = jnp.where((states > 0).any(0), whole, 0)[None]
    return states

  def _visits(self, of_keys: bool):
    """For each block of queries the blocks of keys that it sees; `of_keys` the other way round.

    Returns:
      int32 [B or 1, blocks, steps], flat: 4 (index of the block) + its state, first those that are
      seen, in order; then the last one again with state SKIP, which fetches nothing. And strides.
    """
    states = self._states()
    if of_keys:
      states = states.swapaxes(1, 2)
    xp = np if isinstance(states, np.ndarray) else jnp
    seen = states > 0
    count = seen.sum(-1, keepdims=True)
    # Where hidden blocks are known while tracing, there are no steps for them.
    steps = max(1, int(count.max())) if xp is np else states.shape[2]
    order = xp.argsort(~seen, axis=-1, stable=True)
    at = xp.minimum(xp.arange(steps)[None, None], xp.maximum(count - 1, 0))
    index = xp.take_along_axis(order, at, axis=-1)
    state = xp.where(xp.arange(steps)[None, None] < count, xp.take_along_axis(states, index, -1), 0)
    visits = (4 * index + state).astype(np.int32)
    batch_stride = visits.shape[1] * steps if visits.shape[0] > 1 else 0
    return jnp.asarray(visits.reshape(-1)), steps, batch_stride

  def _scalars(self, visits) -> dict[str, jax.Array]:
    """What is prefetched into scalar memory, by name."""
    call = self._call
    scalars = {"visits": visits, "offset": jnp.asarray(call.q_offset, jnp.int32).reshape(1)}
    if call.kv_lengths is not None:
      scalars["lengths"] = call.kv_lengths.astype(jnp.int32)
    if self._relative:
      # Tiles are numbered from here: corner / step is a whole number once the phase is taken off.
      number = (call.q_offset + self._phase()) // self._tile_step() + self._first_tile()
      scalars["first_tile"] = jnp.asarray(number, jnp.int32).reshape(1)
    if call.dropout_rate > 0:
      for name in ("q_seeds", "kv_seeds"):
        scalars[name] = jax.lax.bitcast_convert_type(getattr(call, name), jnp.int32).reshape(-1)
    return scalars

  # What both passes read, as (array, block, index map of (j, b, i, kv)).

  def _inputs(self) -> dict:
    call, L, bq, bk = self._call, self._L, self.block_q, self.block_kv
    shared = self._shared
    lane_block = (lambda j: j) if shared == 1 else (lambda j: jax.lax.div(j, jnp.int32(shared)))
    inputs = {
      "q": (self._queries(call.q_BTNH), (None, bq, L), lambda j, b, i, kv: (b, i, j)),
      "k": (self._keys(call.k_BSKH), (None, bk, L), lambda j, b, i, kv: (b, kv, lane_block(j))),
      "v": (self._keys(call.v_BSKH), (None, bk, L), lambda j, b, i, kv: (b, kv, lane_block(j))),
    }
    if call.q_segment_ids is not None:
      q_ids, kv_ids = self._ids(call.q_segment_ids, bq), self._ids(call.kv_segment_ids, bk)
      inputs["q_ids"] = (q_ids, (None, 1, bq), lambda j, b, i, kv: (b, 0, i))
      inputs["kv_ids"] = (kv_ids, (None, 1, bk), lambda j, b, i, kv: (b, 0, kv))
    if self._relative:
      tiles, far = self._tiles(call.bias)
      # The last block index is constant: fetched once for all blocks of all rows of the batch.
      inputs["tiles"] = (tiles, (None, *tiles.shape[1:]), lambda j, b, i, kv: (j, 0, 0, 0, 0))
      inputs["far"] = far
    elif self._dense:
      inputs["bias"] = (self._dense_bias(call.bias), *self._dense_spec())
    return inputs

  def _dense_spec(self):
    """Block and index map of the dense bias, by what it broadcasts over."""
    batch, heads, rows, columns = (size > 1 for size in self._call.bias.shape)
    P = self._P if heads else 1
    if not columns:
      block = (None, P, 1, self.block_q)
      last = lambda i, kv: (0, i)
    elif not rows:
      block = (None, P, 1, self.block_kv)
      last = lambda i, kv: (0, kv)
    else:
      block = (None, P, self.block_q, self.block_kv)
      last = lambda i, kv: (i, kv)
    return block, lambda j, b, i, kv: (b if batch else 0, j if heads else 0, *last(i, kv))

  # One block of scores, keys by queries.

  def _heads(self, x):
    """The P copies of a lane block in each of which one head's lanes are left, the others zero."""
    if self._P == 1:
      return [x]
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, self._L), 1)
    kept = [(lane >= h * self._width) & (lane < (h + 1) * self._width) for h in range(self._P)]
    return [jnp.where(keep, x, jnp.zeros_like(x)) for keep in kept]

  def _own(self, h):
    """The lanes of a head in its lane block."""
    return slice(h * self._width, (h + 1) * self._width)

  def _strips(self, refs, at, partial):
    """Yields the strips of a block: of every head, some of its queries."""
    heads = self._heads(refs.q[...])
    for start in range(0, self.block_q, _STRIP):
      cols = slice(start, min(start + _STRIP, self.block_q))
      visible = self._visible(refs, at, cols) if partial else None
      for h, q in enumerate(heads):
        yield _Strip(h, cols, q[cols], visible)

  def _add(self, total, h, x_sq, y_qL, y_Lq):
    """Adds x y, keys by lanes, to a sum that lies as it is the cheapest.

    With several heads in a lane block, as the transpose: its rows are then those of the head alone,
    while the product with all lanes would compute zeros for the other heads.
    """
    if self._P == 1:
      total[...] += matmul(x_sq, y_qL, ((1,), (0,)))
    else:
      total[self._own(h)] += matmul(y_Lq, x_sq, ((1,), (1,)))

  def _indices(self, at, cols):
    """The query of each column [1, q] of a strip and the key of each row [s, 1]."""
    query = jax.lax.broadcasted_iota(jnp.int32, (1, cols.stop - cols.start), 1)
    key = jax.lax.broadcasted_iota(jnp.int32, (self.block_kv, 1), 0)
    return query + (at.i * self.block_q + cols.start), key + at.kv * self.block_kv

  def _visible(self, refs, at, cols):
    query, key = self._indices(at, cols)
    left, right = self._call.window
    terms = []
    # Sums of a row of numbers, not of a square of them; longer windows reach as far.
    position = query + refs.offset[0]
    terms += [key >= position - min(left, 2**30)] if left is not None else []
    terms += [key <= position + min(right, 2**30)] if right is not None else []
    if self._call.kv_lengths is not None:
      terms.append(key < refs.lengths[at.b])
    if self._call.q_segment_ids is not None:
      terms.append(refs.kv_ids[...].T == refs.q_ids[:, cols])
    mask = functools.reduce(jnp.logical_and, terms)
    return jnp.broadcast_to(mask, (self.block_kv, cols.stop - cols.start))

  def _scores(self, refs, at, strip, dot, near):
    """(logits / unit, slope of the soft cap or None) of a strip: [s, q]."""
    call, slope = self._call, None
    logits = dot if self._unit == call.scale else dot * (call.scale / self._unit)
    if call.logits_soft_cap is not None:
      logits = jnp.tanh(logits * (self._unit / call.logits_soft_cap))
      slope = 1 - logits * logits
      logits = logits if self._unit == call.logits_soft_cap else logits * call.logits_soft_cap
    if self._relative:
      h, cols = strip.h, strip.cols
      logits += refs.tiles[h, at.tile, :, cols] if near else refs.far[self._far_at(at, h)]
    elif self._dense:
      logits += self._dense_strip(refs, strip.h, strip.cols)
    if strip.visible is not None:
      logits = jnp.where(strip.visible, logits, -jnp.inf)
    return logits, slope

  def _far_at(self, at, h):
    return 2 * (at.j * self._P + h) + at.is_ahead

  def _dense_strip(self, refs, h, cols):
    _, heads, rows, columns = self._call.bias.shape
    h = h if heads > 1 else 0
    if columns == 1:
      return refs.bias[h, :, cols].astype(jnp.float32)
    return refs.bias[h, cols if rows > 1 else slice(None)].astype(jnp.float32).T

  def _kept(self, refs, at, strip):
    """Whether the weights [s, q] of a strip stay; None without dropout."""
    if self._call.dropout_rate == 0:
      return None
    cols = strip.cols
    head = at.b * self._N + at.j * self._P + strip.h
    q_seed, kv_seed = (x[head].astype(jnp.uint32) for x in (refs.q_seeds, refs.kv_seeds))
    query, _ = self._indices(at, cols)
    if self._random == "hash":
      # Keys are hashed along lanes: 128 a register, not 8 as in the column that they become.
      key = jax.lax.broadcasted_iota(jnp.int32, (1, self.block_kv), 1) + at.kv * self.block_kv
      of_keys = [x.T for x in dropout.of_keys(kv_seed, key)]
      bits = dropout.bits(dropout.of_queries(q_seed, query), of_keys)
      return dropout.kept(bits, self._call.dropout_rate)

    # Seeded by squares of fixed size, so that blocks of all sizes draw the same.
    head_key = dropout.head_key(q_seed, kv_seed).astype(jnp.int32)

    def square(row, column):
      row += at.kv * (self.block_kv // _LANES)
      column += at.i * (self.block_q // _LANES) + cols.start // _LANES
      number = (row << 16) | column
      pltpu.prng_seed(head_key, number)
      return pltpu.bitcast(pltpu.prng_random_bits((_LANES, _LANES)), jnp.uint32)

    rows, columns = self.block_kv // _LANES, (cols.stop - cols.start) // _LANES
    bits = [
      jnp.concatenate([square(row, column) for column in range(columns)], axis=1)
      for row in range(rows)
    ]
    return dropout.kept(jnp.concatenate(bits, axis=0), self._call.dropout_rate)

  def _exp(self, x):
    """exp(unit x)."""
    return jnp.exp2(x * (self._unit * math.log2(math.e)))

  def _at_block(self, refs, j, b, i, kv, state):
    """Where a step is, and its relation to the tiles of a relative bias."""
    at = _At(j=j, b=b, i=i, kv=kv, state=state)
    if not self._relative:
      return at
    step = self._tile_step()
    tile = kv * (self.block_kv // step) - i * (self.block_q // step) - refs.first_tile[0]
    is_ahead, count = (tile >= self._tile_count()).astype(jnp.int32), self._tile_count()
    near = (tile >= 0) & (tile < count)
    return dataclasses.replace(at, tile=jnp.clip(tile, 0, count - 1), near=near, is_ahead=is_ahead)

  def _each_kind(self, refs, at, step) -> None:
    """Runs `step(partial, near)` as the block's state and distance ask, compiled for each kind."""
    hides = not self._call.hides_nothing
    for partial in (False, True) if hides else (False,):
      for near in (True, False) if self._relative else (False,):
        is_kind = (at.state == (PARTIAL if partial else FULL)) if hides else at.state > 0
        if self._relative:
          is_kind &= at.near if near else jnp.logical_not(at.near)

        @pl.when(is_kind)
        def _(partial=partial, near=near):
          step(partial, near)

  # The forward pass.

  def forward(self):
    visits, steps, batch_stride = self._visits(of_keys=False)
    P, L, bq = self._P, self._L, self.block_q
    lowest = float(jnp.finfo(jnp.float32).min)

    def visit(refs, b, i, step):
      return refs.visits[b * batch_stride + i * steps + step]

    def body(refs):
      j, b, i, step = (pl.program_id(axis) for axis in range(4))
      entry = visit(refs, b, i, step)
      at = self._at_block(refs, j, b, i, entry >> 2, entry & 3)

      @pl.when(step == 0)
      def _():
        refs.top[...] = jnp.full(refs.top.shape, lowest, jnp.float32)
        refs.total[...] = jnp.zeros(refs.total.shape, jnp.float32)
        refs.acc[...] = jnp.zeros(refs.acc.shape, jnp.float32)

      def attend(partial, near):
        k, v_t = refs.k[...], refs.v[...].T

        def product(strip):
          return matmul(k, strip.q, ((1,), (1,)))

        def softmax(strip, dot):
          h, cols = strip.h, strip.cols
          logits, _ = self._scores(refs, at, strip, dot, near)
          top = refs.top[h : h + 1, cols]
          # Bounded from below, so that a row without keys has weights exp(-inf) = 0, not NaN.
          new_top = jnp.maximum(top, logits.max(axis=0, keepdims=True))
          weights, shrink = self._exp(logits - new_top), self._exp(top - new_top)
          refs.top[h : h + 1, cols] = new_top
          total = refs.total[h : h + 1, cols]
          refs.total[h : h + 1, cols] = total * shrink + weights.sum(axis=0, keepdims=True)
          weights = _drop(self._kept(refs, at, strip), weights).astype(v_t.dtype)
          own = self._own(h)
          summand = matmul(v_t[own], weights, ((1,), (0,)))
          refs.acc[own, cols] = refs.acc[own, cols] * shrink + summand

        _overlapped(self._strips(refs, at, partial), product, softmax)

      self._each_kind(refs, at, attend)

      @pl.when(step == steps - 1)
      def _():
        total = refs.total[...]
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        refs.lse[...] = jnp.where(empty, lowest, refs.top[...] * self._unit + jnp.log(total))
        total *= 1 - self._call.dropout_rate
        for h in range(P):
          own = self._own(h)
          refs.acc[own] = refs.acc[own] * (1 / total[h : h + 1])
        refs.out[...] = refs.acc[...].T.astype(refs.out.dtype)

    dtype = self._call.q_BTNH.dtype
    out, lse = self._pallas(
      body,
      "attention_forward",
      grid=(self._J, self._B, self._rows, steps),
      to_block=lambda refs, j, b, i, step: (j, b, i, visit(refs, b, i, step) >> 2),
      scalars=self._scalars(visits),
      inputs=self._inputs(),
      outputs={
        "out": (
          (self._B, self._padded_T, self._J * L),
          dtype,
          (None, bq, L),
          lambda j, b, i, kv: (b, i, j),
        ),
        "lse": (
          (self._B, self._J, P, self._padded_T),
          jnp.float32,
          (None, None, P, bq),
          lambda j, b, i, kv: (b, j, 0, i),
        ),
      },
      scratch={"top": (P, bq), "total": (P, bq), "acc": (L, bq)},
      parallel=3,
    )
    out_BTNH = out.reshape(self._B, self._padded_T, self._N, self._width)
    lse_BNT = lse.reshape(self._B, self._N, self._padded_T)
    return out_BTNH[:, : self._T, :, : self._H], lse_BNT[:, :, : self._T].swapaxes(1, 2)

  # The backward pass.

  def backward(self, lse_BTN, delta_BTN, dout_BTNH):
    """(dq, dk, dv, dbias), given lse and delta = sum_h out dout - dlse.

    The gradient at the logits is P (dropout'(v dout) - delta). Blocks of keys are the outer loop:
    their gradients are summed in place, and those of all queries of a lane block in vector memory.
    """
    visits, steps, batch_stride = self._visits(of_keys=True)
    L, bq, bk, P = self._L, self.block_q, self.block_kv, self._P
    # exp(logits - fill) is 0 for the queries of the padding.
    fill = float(jnp.finfo(jnp.float32).max)
    # What is the same for all pairs is left out of them: gradients are multiplied in the end.
    kept = 1 - self._call.dropout_rate
    rest, scale = 1 / kept, self._call.scale / kept
    statistic = (None, None, P, bq), lambda j, b, i, kv: (b, j, 0, i)
    inputs = self._inputs() | {
      "dout": (self._queries(dout_BTNH), (None, bq, L), lambda j, b, i, kv: (b, i, j)),
      "lse": (self._statistics(jnp.maximum(lse_BTN / self._unit, -fill), fill), *statistic),
      "delta": (self._statistics(delta_BTN * kept), *statistic),
    }

    def visit(refs, b, kv, step):
      return refs.visits[b * batch_stride + kv * steps + step]

    def body(refs):
      j, b, kv, step = (pl.program_id(axis) for axis in range(4))
      entry = visit(refs, b, kv, step)
      at = self._at_block(refs, j, b, entry >> 2, kv, entry & 3)
      is_first, is_last = (kv == 0) & (step == 0), (kv == self._columns - 1) & (step == steps - 1)

      @pl.when(is_first)
      def _():
        refs.dq_t[...] = jnp.zeros(refs.dq_t.shape, jnp.float32)

      @pl.when(step == 0)
      def _():
        refs.dk_sum[...] = jnp.zeros(refs.dk_sum.shape, jnp.float32)
        refs.dv_sum[...] = jnp.zeros(refs.dv_sum.shape, jnp.float32)

      if self._relative:

        @pl.when(is_first & (b == 0))
        def _():
          refs.dtiles[...] = jnp.zeros(refs.dtiles.shape, jnp.float32)
          refs.dfar[...] = jnp.zeros(refs.dfar.shape, jnp.float32)

      def gather(partial, near):
        k, v = refs.k[...], refs.v[...]
        k_t, q_t, dout_t = k.T, refs.q[...].T, refs.dout[...].T
        douts = self._heads(refs.dout[...])

        def products(strip):
          dout = douts[strip.h][strip.cols]
          return matmul(k, strip.q, ((1,), (1,))), matmul(v, dout, ((1,), (1,)))

        def gradients(strip, dots):
          h, cols = strip.h, strip.cols
          own = self._own(h)
          weights, dlogits, slope = self._gradient(refs, at, strip, *dots, near)
          weights = weights.astype(v.dtype)
          self._add(refs.dv_sum, h, weights, douts[h][cols], dout_t[own, cols])
          if self._relative and near:
            refs.dtiles[h, at.tile, :, cols] += dlogits
          elif self._relative:
            row = pl.ds(2 * h + at.is_ahead, 1)
            refs.dfar[row, cols] += dlogits.sum(axis=0, keepdims=True)
          dlogits = (dlogits if slope is None else dlogits * slope).astype(k.dtype)
          self._add(refs.dk_sum, h, dlogits, strip.q, q_t[own, cols])
          refs.dq_t[at.i, own, cols] += matmul(k_t[own], dlogits, ((1,), (0,)))

        _overlapped(self._strips(refs, at, partial), products, gradients)

      self._each_kind(refs, at, gather)

      @pl.when(step == steps - 1)
      def _():
        upright = (lambda x: x) if self._P == 1 else (lambda x: x.T)
        refs.dk[...] = (upright(refs.dk_sum[...]) * scale).astype(refs.dk.dtype)
        refs.dv[...] = (upright(refs.dv_sum[...]) * rest).astype(refs.dv.dtype)

      @pl.when(is_last)
      def _():
        @pl.loop(0, self._rows)
        def _(i):
          rows = pl.ds(pl.multiple_of(i * bq, _LANES), bq)
          refs.dq[rows] = (refs.dq_t[i].T * scale).astype(refs.dq.dtype)

    dtype = self._call.q_BTNH.dtype
    # Lane blocks that share keys leave a gradient each, added up in float32.
    dkv = (
      (self._B, self._padded_S, self._J * L),
      dtype if self._shared == 1 else jnp.float32,
      (None, bk, L),
      lambda j, b, i, kv: (b, kv, j),
    )
    outputs = {
      "dq": (
        (self._B, self._padded_T, self._J * L),
        dtype,
        (None, self._padded_T, L),
        lambda j, b, i, kv: (b, 0, j),
      ),
      "dk": dkv,
      "dv": dkv,
    }
    keys = (bk, L) if P == 1 else (L, bk)
    scratch = {"dq_t": (self._rows, L, bq), "dk_sum": keys, "dv_sum": keys}
    if self._relative:
      count = self._tile_count()
      outputs |= {
        "dtiles": (
          (self._J, P, count, bk, bq),
          jnp.float32,
          (None, P, count, bk, bq),
          lambda j, b, i, kv: (j, 0, 0, 0, 0),
        ),
        "dfar": (
          (self._J, 2 * P, bq),
          jnp.float32,
          (None, 2 * P, bq),
          lambda j, b, i, kv: (j, 0, 0),
        ),
      }
    dq, dk, dv, *dbias = self._pallas(
      body,
      "attention_backward",
      grid=(self._J, self._B, self._columns, steps),
      to_block=lambda refs, j, b, kv, step: (j, b, visit(refs, b, kv, step) >> 2, kv),
      scalars=self._scalars(visits),
      inputs=inputs,
      outputs=outputs,
      scratch=scratch,
      # The gradient of a bias is summed over the batch.
      parallel=1 if self._relative else 2,
    )
    call = self._call
    (dq,) = jax.linear_transpose(self._queries, call.q_BTNH)(dq)
    if self._shared > 1:
      shape = (self._B, self._padded_S, self._J // self._shared, self._shared, L)
      dk, dv = (x.reshape(shape).sum(3).reshape(*shape[:2], -1).astype(dtype) for x in (dk, dv))
    (dk,), (dv,) = (jax.linear_transpose(self._keys, call.k_BSKH)(x) for x in (dk, dv))
    if self._relative:
      dtiles, dfar = dbias
      dtiles, dfar = dtiles * (rest * self._unit), dfar.sum(-1).reshape(-1) * (rest * self._unit)
      return dq, dk, dv, jax.vjp(self._tiles, call.bias)[1]((dtiles, dfar))[0]
    return dq, dk, dv, self._dense_gradient(inputs, rest) if self._dense else None

  def _gradient(self, refs, at, strip, dot, dweights, near):
    """(kept weights, gradient at the logits, slope of the soft cap) of a strip [s, q].

    The first two lack the factor 1 / (1 - dropout rate).
    """
    row = slice(strip.h, strip.h + 1)
    logits, slope = self._scores(refs, at, strip, dot, near)
    weights = self._exp(logits - refs.lse[row, strip.cols])
    kept = self._kept(refs, at, strip)
    dlogits = weights * (_drop(kept, dweights) - refs.delta[row, strip.cols])
    return _drop(kept, weights), dlogits, slope

  def _dense_gradient(self, inputs, rest):
    """Of a dense bias, by a kernel of its own: what is not asked for is not computed.

    Its blocks are the outer loop, and what it broadcasts over the inner one, so that no array is
    larger than the bias.
    """
    call = self._call
    states = jnp.asarray(self._states(), jnp.int32)
    batch_stride = self._rows * self._columns if states.shape[0] > 1 else 0
    sizes = {"b": self._B, "j": self._J, "i": self._rows, "kv": self._columns}
    broadcast = dict(zip(sizes, (size == 1 for size in call.bias.shape), strict=True))
    broadcast["i"] &= not broadcast["kv"]  # A bias without keys is laid out by queries.
    order = sorted(sizes, key=broadcast.get)
    summed = [axis for axis in order if broadcast[axis]]
    block, index = self._dense_spec()

    def body(refs):
      place = {axis: pl.program_id(n) for n, axis in enumerate(order)}
      j, b, i, kv = (place[axis] for axis in "j b i kv".split())
      state = refs.visits[b * batch_stride + i * self._columns + kv]
      at = self._at_block(refs, j, b, i, kv, state)

      if summed:
        first = functools.reduce(jnp.logical_and, [place[axis] == 0 for axis in summed])

        @pl.when(first)
        def _():
          refs.dbias[...] = jnp.zeros(refs.dbias.shape, jnp.float32)
      else:
        refs.dbias[...] = jnp.zeros(refs.dbias.shape, jnp.float32)

      def gather(partial, near):
        k, v = refs.k[...], refs.v[...]
        douts = self._heads(refs.dout[...])
        for strip in self._strips(refs, at, partial):
          cols, head = strip.cols, 0 if broadcast["j"] else strip.h
          dweights = matmul(v, douts[strip.h][cols], ((1,), (1,)))
          dot = matmul(k, strip.q, ((1,), (1,)))
          _, dlogits, _ = self._gradient(refs, at, strip, dot, dweights, near)
          if broadcast["kv"]:
            refs.dbias[head, :, cols] += dlogits.sum(axis=0, keepdims=True)
          elif broadcast["i"]:
            refs.dbias[head] += dlogits.T.sum(axis=0, keepdims=True)
          else:
            refs.dbias[head, cols] += dlogits.T

      self._each_kind(refs, at, gather)

    (dbias,) = self._pallas(
      body,
      "attention_backward_bias",
      grid=tuple(sizes[axis] for axis in order),
      to_block=lambda refs, *ids: tuple(ids[order.index(axis)] for axis in ("j", "b", "i", "kv")),
      scalars=self._scalars(states.reshape(-1)),
      inputs=inputs,
      outputs={"dbias": (inputs["bias"][0].shape, jnp.float32, block, index)},
      scratch={},
      parallel=len(order) - len(summed),
    )
    return jax.linear_transpose(self._dense_bias, call.bias)(
      (dbias * rest).astype(call.bias.dtype)
    )[0]

  def _pallas(self, body, name, *, grid, to_block, scalars, inputs, outputs, scratch, parallel):
    """One kernel: `body(refs)` sees all its references by name.

    Args:
      to_block: `(refs, *grid indices)` to the (j, b, i, kv) that index maps are functions of.
      scalars: name to array, prefetched. A bare array among the inputs becomes one of them.
      inputs: name to (array, block, index map); outputs: name to (shape, dtype, block, index map).
      scratch: name to shape, float32.
      parallel: how many of the grid's first dimensions may run in any order.
    """
    scalars = scalars | {k: v for k, v in inputs.items() if not isinstance(v, tuple)}
    inputs = {k: v for k, v in inputs.items() if isinstance(v, tuple)}

    def spec(block, index):
      def index_map(*ids_and_scalars):
        ids, refs = ids_and_scalars[: len(grid)], ids_and_scalars[len(grid) :]
        return index(*to_block(Refs(zip(scalars, refs, strict=True)), *ids))

      return pl.BlockSpec(block, index_map)

    arrays = [*scalars.values(), *(array for array, _, _ in inputs.values())]
    names = [*scalars, *inputs, *outputs, *scratch]
    kernel = pl.pallas_call(
      lambda *refs: body(Refs(zip(names, refs, strict=True))),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(scalars),
        grid=grid,
        in_specs=[spec(block, index) for _, block, index in inputs.values()],
        out_specs=[spec(block, index) for _, _, block, index in outputs.values()],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
      ),
      # The program is one device's, whatever shard_map it is part of; see `platforms`.
      out_shape=[
        jax.ShapeDtypeStruct(*output[:2], **jax_names.varying_over()) for output in outputs.values()
      ],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel),
        vmem_limit_bytes=_VMEM_LIMIT,
      ),
      interpret=self._interpret,
      name=name,
    )
    return kernel(*arrays)


@dataclasses.dataclass(frozen=True)
class _At:
  """Where a step of a kernel is: lane block, row of the batch, block of queries, block of keys."""

  j: jax.Array
  b: jax.Array
  i: jax.Array
  kv: jax.Array
  state: jax.Array
  tile: jax.Array | None = None
  near: jax.Array | None = None
  is_ahead: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class _Strip:
  """Some queries of a block, of one head: its place, the queries, and which pairs are visible.

  Attributes:
    q: [q, L], zero in the lanes of other heads.
    visible: [s, q], or None if all are.
  """

  h: int
  cols: slice
  q: jax.Array
  visible: jax.Array | None


def _overlapped(strips, first, second) -> None:
  """`second(strip, first(strip))` for every strip, after the `first` of the next one.

  In this order the compiler has the matrix unit work on the next strip's products while the vector
  unit is busy with the exponentials of this one.
  """
  before = None
  for strip in strips:
    products = first(strip)
    if before is not None:
      second(*before)
    before = strip, products
  second(*before)


def _drop(kept, weights):
  """Zeros where they do not stay; the others as they are, without the factor 1 / (1 - rate)."""
  return weights if kept is None else jnp.where(kept, weights, 0.0)


def _split(length: int, block: int) -> tuple[int, int]:
  """The side of a block, a multiple of 128 of at most `block`, and how many: as even as may be."""
  count = -(-length // block)
  side = -(-length // (count * _LANES)) * _LANES
  return side, -(-length // side)
