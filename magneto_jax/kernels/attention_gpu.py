"""Attention for NVIDIA GPUs, in Pallas through Triton: tensor cores of sm_80 and newer.

Letters: B batch, T query length, S key and value length, N heads, K key/value heads, H head dim,
W the width of a head in the kernels: H padded to a power of two.

Kernels. One for the output; one that walks down the queries, for the gradients of keys and values;
one that walks along the keys, for that of the queries. Nothing is added up across programs, so that
the same call gives the same bits. The gradient of a bias that has both queries and keys is a fourth
kernel, which walks over what the bias is broadcast over: what is not asked for is not computed.

Orientation. Scores are queries by keys (q, s) where a program owns queries, keys by queries where
it owns keys: what leaves the softmax is then the left factor of the next product as it lies in
registers.

What is hidden. For each block that a program owns there are the bounds of the others that it sees,
made before the kernel runs: blocks outside are not visited, and only those within that are seen in
part are masked.

Relative bias. Beyond `max_distance` all pairs of a side share one number, which is added as such;
nearer, a pair looks its own up in the strip of distances, a row of numbers that stays in the cache.
The gradient is summed up the same way: far pairs as numbers, near ones in tiles along the diagonal.

Units. Softmax is taken in powers of two. What all pairs share is kept out of the square: the scale
goes into the exponential's argument, and with dropout's 1 / (1 - rate) into the sums at the end.

Reference: Dao et al., 2022, arXiv 2205.14135; Dao, 2023, arXiv 2307.08691.
"""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from magneto_jax.kernels import dropout, jax_names, platforms
from magneto_jax.kernels.bias import RelativeBias, toeplitz
from magneto_jax.kernels.call import FULL, SKIP, Call, pad
from magneto_jax.kernels.pallas import Refs, matmul

_LOG2E = math.log2(math.e)
_LOWEST = float(jnp.finfo(jnp.float32).min)
KERNELS = ("out", "dkv", "dq", "dbias")
# The arrays that dropout's bits are made of.
_OF_QUERIES, _OF_KEYS = ("drop_q", "drop_q_factor"), ("drop_k", "drop_k_summand")
TABLE = pathlib.Path(__file__).with_name("attention_gpu_blocks.json")


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How a kernel is cut.

  Attributes:
    q, kv: queries and keys of a block, powers of two of at least 16.
    warps: of a program, a power of two.
    stages: how many blocks of the inner loop are in flight.
  """

  q: int
  kv: int
  warps: int = 4
  stages: int = 2

  def __post_init__(self):
    for name, least in (("q", 16), ("kv", 16), ("warps", 1), ("stages", 1)):
      value = getattr(self, name)
      is_integer = isinstance(value, int) and not isinstance(value, bool)
      is_power = is_integer and value > 0 and value & (value - 1) == 0
      if not (is_power or name == "stages" and is_integer) or value < least:
        kind = "an integer" if name == "stages" else "a power of two"
        raise ValueError(f"{name}={value!r} must be {kind} of at least {least}")


@dataclasses.dataclass(frozen=True)
class PallasGpu:
  """The implementation `pallas_gpu`: bfloat16, float16 and float32, every feature.

  float32 is not rounded to a format of the tensor cores, and so is not fast.

  Attributes:
    out: how the kernel of the output is cut; None for what suits the call.
    dkv: that of the gradients of keys and values.
    dq: that of the gradient of the queries.
    dbias: that of the gradient of a bias; square, if the bias is relative.
    interpret: runs the kernels on any platform, slowly, as JAX programs.
  """

  out: Blocks | None = None
  dkv: Blocks | None = None
  dq: Blocks | None = None
  dbias: Blocks | None = None
  interpret: bool = False

  name = "pallas_gpu"
  # JAX promises of Triton's calls no more than that it can compile them itself.
  is_exportable = False

  def __post_init__(self):
    for name in KERNELS:
      value = getattr(self, name)
      if not (value is None or isinstance(value, Blocks)):
        raise ValueError(f"{name}={value!r} must be kernels.Blocks(..), or None")

  @property
  def platforms(self) -> tuple[str, ...] | None:
    """All (None) where it is interpreted."""
    return None if self.interpret else ("cuda",)

  def fitted(self, call: Call) -> "PallasGpu":
    """With all blocks filled in, if it can serve the call; else NotImplementedError."""
    if call.q_BTNH.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
      raise NotImplementedError(f"{call.q_BTNH.dtype} is not bfloat16, float16 or float32")
    _, T, S, _, _, H = call.sizes
    if H > 256:
      raise NotImplementedError(f"a head of {H} numbers does not fit into registers; 256 do")
    fitted = {}
    for name, preferred in _preferred(call).items():
      blocks = getattr(self, name) or preferred
      q, kv = min(blocks.q, _power(T)), min(blocks.kv, _power(S))
      if name == "dbias" and isinstance(call.bias, RelativeBias):
        q = kv = max(q, kv)  # Its tiles slide along the diagonal.
      fitted[name] = dataclasses.replace(blocks, q=q, kv=kv)
    return dataclasses.replace(self, **fitted)

  def is_worthwhile(self, call: Call) -> bool:
    """Whether a kernel has anything to gain: decoding and short rows are left to XLA."""
    _, T, S, _, _, _ = call.sizes
    return T * S >= 128 * 128 and min(T, S) >= 64

  def forward(self, call: Call) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN)."""
    return self.kernel("out", call)()

  def backward(self, call: Call, out_BTNH, lse_BTN, dout_BTNH, dlse_BTN) -> tuple:
    """(dq_BTNH, dk_BSKH, dv_BSKH, dbias)."""
    dot_BTN = jnp.einsum("BTNH,BTNH->BTN", out_BTNH, dout_BTNH, preferred_element_type=jnp.float32)
    given = lse_BTN, dot_BTN - dlse_BTN, dout_BTNH
    dk, dv, by_key = self.kernel("dkv", call)(*given)
    dq, by_query = self.kernel("dq", call)(*given)
    if call.bias is None:
      return dq, dk, dv, None
    if isinstance(call.bias, RelativeBias):
      return dq, dk, dv, self.kernel("dbias", call)(*given, by_query)
    if call.bias.shape[3] == 1:
      return dq, dk, dv, _summed(by_query[..., None], call.bias)
    if call.bias.shape[2] == 1:
      return dq, dk, dv, _summed(by_key[..., None, :], call.bias)
    return dq, dk, dv, self.kernel("dbias", call)(*given)

  def kernel(self, name: str, call: Call):
    """One of `KERNELS` for a call, a function of what the backward pass is given."""
    kernel = _Kernel(call, getattr(self.fitted(call), name), self.interpret, name == "dkv")
    if name == "dbias":
      relative = isinstance(call.bias, RelativeBias)
      return kernel.relative_gradient if relative else kernel.dense_gradient
    return {"out": kernel.forward, "dkv": kernel.key_gradients, "dq": kernel.query_gradient}[name]


def _power(length: int) -> int:
  """The least power of two that is not less, of those that a product can have as a side."""
  return max(16, 1 << (length - 1).bit_length())


def _feature(call: Call) -> str:
  """What of a call decides how kernels are best cut: its bias."""
  if call.bias is None:
    return "none"
  return "relative" if isinstance(call.bias, RelativeBias) else "dense"


def _preferred(call: Call) -> dict[str, Blocks]:
  """By kernel: what was measured, on the kind of device if there is an entry for it."""
  W = _power(call.sizes[-1])
  if call.q_BTNH.dtype == jnp.float32:
    return dict.fromkeys(KERNELS, Blocks(32, 32, 4, 1) if W <= 128 else Blocks(16, 16, 4, 1))
  table, width, kind = blocks_table(), str(max(64, W)), _feature(call)
  measured = table.get(_capability(), {}).get(width, {}).get(kind, {})
  found = table[""][width][kind] | measured
  return {name: Blocks(*blocks) for name, blocks in found.items()}


@functools.cache
def blocks_table() -> dict:
  """{compute capability, or "" for all others: {width of a head: {feature: {kernel: Blocks}}}}.

  A file, as it is written by a program: `python -m magneto_jax.kernels.tune --write`.
  """
  return json.loads(TABLE.read_text(encoding="utf-8"))


@functools.cache
def _capability() -> str:
  """Of the GPU that is used; "" where it is compiled for from elsewhere, and not known here."""
  return str(jax.local_devices()[0].compute_capability) if platforms.here() == "cuda" else ""


# Programs that keep every multiprocessor of a large GPU busy.
_PROGRAMS = 512


def _summed(dbias_BNTS, like):
  """Over what a bias is broadcast over, in its dtype."""
  axes = tuple(axis for axis in range(4) if like.shape[axis] == 1 and dbias_BNTS.shape[axis] > 1)
  return dbias_BNTS.sum(axes, keepdims=True).astype(like.dtype)


@dataclasses.dataclass(frozen=True)
class _Tile:
  """What is known of a block of scores.

  Attributes:
    is_whole: whether all its pairs are visible.
    side: of a relative bias, that all its pairs are far on: 0 behind, 1 ahead; None if not known.
    bias: of a dense bias, its part, if it has been fetched.
  """

  is_whole: bool
  side: int | None = None
  bias: jax.Array | None = None


class _Kernel:
  """A call, cut into blocks for one kernel."""

  def __init__(self, call: Call, blocks: Blocks, interpret: bool, of_keys: bool = False):
    self._blocks, self._interpret, self._of_keys = blocks, interpret, of_keys
    self._B, self._T, self._S, self._N, self._K, self._H = call.sizes
    self._W = _power(self._H)
    self._rows, self._columns = -(-self._T // blocks.q), -(-self._S // blocks.kv)
    self._padded_T, self._padded_S = self._rows * blocks.q, self._columns * blocks.kv
    if self._padded_S > self._S:
      # Padded keys are hidden as keys past the length are; padded queries are cut off in the end.
      call = call.hiding_padding()
    self._call = call
    self._relative = isinstance(call.bias, RelativeBias)
    self._dense = call.bias is not None and not self._relative
    # Logits are held in powers of two; with a dense bias as they are, so that the lowest finite
    # number stays one. A product (or tanh) times `multiple` is a logit in these units.
    self._unit = 1.0 if self._dense else 1 / _LOG2E
    multiple = call.scale if call.logits_soft_cap is None else call.logits_soft_cap
    self._multiple = multiple / self._unit
    # On which sides of a relative bias there are whole blocks far away: 0 behind, 1 ahead.
    self._far_sides = ()
    if self._relative:
      near = [x is not None and x < self._reach for x in call.window]
      self._far_sides = tuple(side for side in (0, 1) if not near[side])

  # The arrays.

  def _inputs(self) -> dict[str, jax.Array]:
    call, bq, bk = self._call, self._blocks.q, self._blocks.kv
    inputs = {
      "q": self._padded(call.q_BTNH, bq),
      "k": self._padded(call.k_BSKH, bk),
      "v": self._padded(call.v_BSKH, bk),
    }
    if call.q_segment_ids is not None:
      inputs["q_ids"] = pad(call.q_segment_ids.astype(jnp.int32), 1, bq)
      inputs["kv_ids"] = pad(call.kv_segment_ids.astype(jnp.int32), 1, bk)
    if call.kv_lengths is not None:
      inputs["lengths"] = call.kv_lengths.astype(jnp.int32)
    if call.traced_offset is not None:
      inputs["offset"] = call.traced_offset.reshape(1)
    if call.dropout_rate > 0:
      # What is mixed is a query's or a key's own: made once, outside of the square.
      lengths = self._padded_T, self._padded_S
      query, key = (jax.lax.broadcasted_iota(jnp.int32, (1, 1, n), 2) for n in lengths)
      of_queries = dropout.of_queries(call.q_seeds[:, :, None], query)
      of_keys = dropout.of_keys(call.kv_seeds[:, :, None], key)
      inputs |= dict(zip(_OF_QUERIES + _OF_KEYS, of_queries + of_keys, strict=True))
    if self._relative:
      inputs["strip"] = self._strip(call.bias)
    if self._dense:
      bias = call.bias
      for axis, block in ((2, bq), (3, bk)):
        bias = pad(bias, axis, block) if bias.shape[axis] > 1 else bias
      # As the scores lie: turning it round in every block would cost more.
      inputs["bias"] = bias.swapaxes(2, 3) if self._of_keys else bias
    return inputs

  def _strip(self, bias: RelativeBias):
    """Of all distances and, at the end, of those far behind and far ahead: [N, T + S - 1 + 2].

    In units; finite numbers stay finite: -inf forbids a pair, and the lowest number does not.
    """
    first = 1 - self._padded_T - self._call.q_offset
    distance = np.arange(self._far_at) + first
    far = np.array([-self._reach, self._reach])
    table = bias.table.astype(jnp.float32)
    limits = jnp.finfo(jnp.float32)
    scaled = jnp.clip(table / self._unit, limits.min, limits.max)
    table = jnp.where(jnp.isinf(table), table, scaled)
    return table[bias.buckets(jnp.concatenate([distance, far]))].T

  @property
  def _far_at(self) -> int:
    """Where the far numbers are in the strip."""
    return self._padded_T + self._padded_S - 1

  def _gradient_inputs(self, lse_BTN, delta_BTN, dout_BTNH) -> dict[str, jax.Array]:
    """Of the backward pass, given lse and delta = sum_h out dout - dlse."""
    # exp(logits - fill) is 0 for the queries of the padding.
    fill = float(jnp.finfo(jnp.float32).max)
    kept = 1 - self._call.dropout_rate

    def rows(x_BTN, value=0.0):
      return pad(x_BTN.swapaxes(1, 2), 2, self._blocks.q, value)

    return self._inputs() | {
      "dout": self._padded(dout_BTNH, self._blocks.q),
      "lse": rows(jnp.maximum(lse_BTN / self._unit, -fill), fill),
      "delta": rows(delta_BTN * kept),
    }

  def _padded(self, x, block):
    return pad(pad(x, 3, self._W), 1, block)

  # The blocks that are visited.

  @property
  def _runs(self) -> tuple[int | None, ...]:
    """The side of each run of whole blocks, in the order in which they are met."""
    if not self._relative:
      return (None,)
    # Along the queries, what is ahead comes before what is behind.
    return self._far_sides[::-1] if self._of_keys else self._far_sides

  @property
  def _visits_all(self) -> bool:
    return self._call.hides_nothing and not self._relative

  def _bounds(self):
    """int32 [B or 1, blocks of a program, 2 + 2 runs]: first, (start, end) of each run, end.

    A run is of blocks that are visible as a whole and, of a relative bias, far on one side.
    """
    call, bq, bk = self._call, self._blocks.q, self._blocks.kv
    states = call.block_states(bq, bk)
    xp = np if isinstance(states, np.ndarray) else jnp
    runs = [states == FULL]
    if self._relative:
      first_q = np.arange(self._rows)[None, :, None] * bq
      first_k = np.arange(self._columns)[None, None, :] * bk
      nearest, farthest = first_k - (first_q + bq - 1), first_k + bk - 1 - first_q
      far = (
        farthest - call.q_offset <= -self._reach,
        nearest - call.q_offset >= self._reach,
      )
      runs = [runs[0] & far[side] for side in self._runs]
    seen = states > SKIP
    if self._of_keys:
      seen, *runs = (x.swapaxes(1, 2) for x in (seen, *runs))
    count = seen.shape[2]
    first = xp.argmax(seen, axis=2)
    end = xp.where(seen.any(2), count - xp.argmax(seen[:, :, ::-1], axis=2), first)
    bounds = [first]
    for n, run in enumerate(runs):
      start = xp.argmax(run, axis=2)
      later = ~run & (np.arange(count)[None, None, :] > start[..., None])
      stop = xp.where(later.any(2), xp.argmax(later, axis=2), count)
      # An empty run lies where it is in nobody's way.
      nowhere = first if n == 0 else end
      is_there = run.any(2)
      bounds += [xp.where(is_there, start, nowhere), xp.where(is_there, stop, nowhere)]
    return jnp.asarray(xp.stack([*bounds, end], axis=2), jnp.int32)

  def _visit(self, refs, b, own, step, carry):
    """`step(tile, other, carry)` for all blocks that block `own` sees: whole ones first."""
    if self._visits_all:
      count = self._rows if self._of_keys else self._columns
      return jax.lax.fori_loop(0, count, functools.partial(step, _Tile(True)), carry)
    row = b if refs.bounds.shape[0] > 1 else 0
    first, *runs, end = (refs.bounds[row, own, c] for c in range(refs.bounds.shape[2]))
    starts, stops = runs[::2], runs[1::2]
    for side, start, stop in zip(self._runs, starts, stops, strict=True):
      carry = jax.lax.fori_loop(start, stop, functools.partial(step, _Tile(True, side)), carry)

    # What lies between the runs, in one loop: each body of a loop is compiled.
    def rest(m, carry):
      other = first + m
      for start, stop in zip(starts, stops, strict=True):
        other += jnp.where(other >= start, stop - start, 0)
      return step(_Tile(self._call.hides_nothing), other, carry)

    count = end - first
    for start, stop in zip(starts, stops, strict=True):
      count -= stop - start
    return jax.lax.fori_loop(0, count, rest, carry)

  # A block of scores.

  def _indices(self, i, j):
    """The queries and keys of a block, as a column and a row (or the other way round)."""
    query = i * self._blocks.q + jax.lax.iota(jnp.int32, self._blocks.q)
    key = j * self._blocks.kv + jax.lax.iota(jnp.int32, self._blocks.kv)
    return self._of_query(query), self._of_key(key)

  def _of_query(self, x):
    return x[None, :] if self._of_keys else x[:, None]

  def _of_key(self, x):
    return x[:, None] if self._of_keys else x[None, :]

  def _slices(self, i, j):
    bq, bk = self._blocks.q, self._blocks.kv
    return pl.ds(i * bq, bq), pl.ds(j * bk, bk)

  def _pairs(self, of_queries, of_keys):
    """The products of all queries with all keys of a block, in the kernel's orientation."""
    left, right = (of_keys, of_queries) if self._of_keys else (of_queries, of_keys)
    return matmul(left, right, ((1,), (1,)))

  def _scores(self, refs, b, n, i, j, tile, dot):
    """(x, factor, shift): the logits in units are x factor + shift; the soft cap's slope or None.

    The factor is positive; x is -inf where a pair is hidden.
    """
    call, slope = self._call, None
    if call.logits_soft_cap is not None:
      dot = jnp.tanh(dot * (call.scale / call.logits_soft_cap))
      slope = 1 - dot * dot
    factor, shift = self._multiple, 0.0
    if tile.side is not None:
      shift = refs.strip[n, self._far_at + tile.side]
    elif self._relative:
      dot, factor = self._fma(dot, factor, self._relative_bias(refs, n, i, j)), 1.0
    elif self._dense:
      bias = self._dense_bias(refs, b, n, i, j) if tile.bias is None else tile.bias
      dot, factor = self._fma(dot, factor, bias.astype(jnp.float32)), 1.0
    if factor <= 0:
      dot, factor = dot * factor, 1.0
    if not tile.is_whole:
      dot = jnp.where(self._visible(refs, b, i, j), dot, -jnp.inf)
    return (dot, factor, shift), slope

  @property
  def _reach(self) -> int:
    """The distance from which on a relative bias is the same."""
    return self._call.bias.max_distance

  def _distance(self, refs, i, j):
    """Key minus query of the pairs of a block."""
    query, key = self._indices(i, j)
    return key - query - self._offset(refs)

  def _relative_bias(self, refs, n, i, j):
    """Of a block that may be anywhere: what is seen in part is not sorted by distance."""
    bq, bk = self._blocks.q, self._blocks.kv
    query, key = self._indices(i, j)
    nearest = j * bk - i * bq - (bq - 1) - self._offset(refs)
    is_ahead = nearest >= self._reach
    is_near = (nearest + bq + bk - 2 > -self._reach) & ~is_ahead
    shape = jnp.broadcast_shapes(query.shape, key.shape)
    # A branch also keeps the compiler from fetching the numbers ahead, one by one: they would take
    # the shared memory that keys and values need.
    return jax.lax.cond(
      is_near,
      lambda: refs.strip[n, key - query + (self._padded_T - 1)],
      lambda: jnp.broadcast_to(refs.strip[n, self._far_at + is_ahead.astype(jnp.int32)], shape),
    )

  def _dense_bias(self, refs, b, n, i, j):
    rows, columns = self._slices(i, j)
    shape = self._call.bias.shape
    b, n = b if shape[0] > 1 else 0, n if shape[1] > 1 else 0
    at = rows if shape[2] > 1 else 0, columns if shape[3] > 1 else 0
    bias = refs.bias[b, n, *(at[::-1] if self._of_keys else at)]
    if shape[2] > 1 and shape[3] > 1:
      return bias
    if shape[2] > 1:
      return self._of_query(bias)
    return self._of_key(bias) if shape[3] > 1 else bias

  def _offset(self, refs):
    return self._call.static_offset if self._call.traced_offset is None else refs.offset[0]

  def _visible(self, refs, b, i, j):
    """Which pairs of a block are visible."""
    call, (query, key) = self._call, self._indices(i, j)
    rows, columns = self._slices(i, j)
    left, right = call.window
    position = query + self._offset(refs)
    terms = []
    if left is not None:
      terms.append(key >= position - min(left, _FAR))
    if right is not None:
      terms.append(key <= position + min(right, _FAR))
    if call.kv_lengths is not None:
      terms.append(key < refs.lengths[b])
    if call.q_segment_ids is not None:
      own = self._of_query(refs.q_ids[b, rows]), self._of_key(refs.kv_ids[b, columns])
      terms.append(own[0] == own[1])
    shape = jnp.broadcast_shapes(query.shape, key.shape)
    return functools.reduce(jnp.logical_and, (jnp.broadcast_to(x, shape) for x in terms))

  def _exp(self, logits, minus):
    """exp(logits - minus) of what `_scores` yields, `minus` in units as well."""
    x, factor, shift = logits
    if self._unit == 1:
      return self._exp2((x - minus) * _LOG2E)
    return self._exp2(self._fma(x, factor, shift - minus))

  def _exp2(self, x):
    # The library's function takes three instructions more, for results below 2^-126.
    return self._instruction("ex2.approx.ftz.f32 $0, $1;", jnp.exp2, x)

  def _fma(self, x, factor: float, y):
    """x factor + y, which XLA does not make one instruction by itself."""
    if factor == 1:
      return x + y
    x, y = jnp.broadcast_arrays(x, y)
    number = np.float32(factor).view(np.uint32)
    text = f"fma.rn.f32 $0, $1, 0f{number:08X}, $2;"
    return self._instruction(text, lambda x, y: x * factor + y, x, y)

  def _instruction(self, text, function, *args):
    """One instruction, elementwise; where it is interpreted, the function that it computes."""
    if self._interpret:
      return function(*args)
    (result,) = plt.elementwise_inline_asm(
      text,
      args=args,
      constraints=",".join(["=f", *("f" if x.dtype == jnp.float32 else "r" for x in args)]),
      pack=1,
      result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
    )
    return result

  def _random_bits(self, refs, b, n, i, j):
    """uint32, of a block; None without dropout."""
    if self._call.dropout_rate == 0:
      return None
    rows, columns = self._slices(i, j)
    queries = [self._of_query(getattr(refs, name)[b, n, rows]) for name in _OF_QUERIES]
    keys = [self._of_key(getattr(refs, name)[b, n, columns]) for name in _OF_KEYS]
    return dropout.bits(queries, keys)

  def _drop(self, bits, weights):
    """Zeros where they do not stay; the others as they are, without the factor 1 / (1 - rate)."""
    if bits is None:
      return weights
    # One instruction of two: a comparison by itself is packed into bytes and unpacked again.
    threshold = dropout.threshold(self._call.dropout_rate)
    text = (
      "{ .reg .pred stays; "
      f"setp.hs.u32 stays, $2, 0x{threshold:08X}; selp.f32 $0, $1, 0f00000000, stays; }}"
    )
    choose = lambda weights, bits: jnp.where(bits >= jnp.uint32(threshold), weights, 0.0)
    return self._instruction(text, choose, weights, bits)

  def _key_head(self, n):
    return jax.lax.div(n, jnp.int32(self._N // self._K))

  # The forward pass.

  def forward(self):
    """(out_BTNH, lse_BTN)."""
    bq, W, call = self._blocks.q, self._W, self._call

    def body(refs):
      i, n, b = self._own_block(), pl.program_id(1), pl.program_id(2)
      rows, kv_head = pl.ds(i * bq, bq), self._key_head(n)
      q = refs.q[b, rows, n, :]

      def attend(tile, j, carry):
        acc, total, top = carry
        columns = self._slices(i, j)[1]
        dot = self._pairs(q, refs.k[b, columns, kv_head, :])
        logits, _ = self._scores(refs, b, n, i, j, tile, dot)
        x, factor, shift = logits
        # Bounded from below, so that a row without keys has weights exp(-inf) = 0, not NaN.
        new_top = jnp.maximum(top, x.max(axis=1) * factor + shift)
        weights = self._exp(logits, new_top[:, None])
        shrink = self._exp2((top - new_top) * (self._unit * _LOG2E))
        total = total * shrink + weights.sum(axis=1)
        weights = self._drop(self._random_bits(refs, b, n, i, j), weights)
        v = refs.v[b, columns, kv_head, :]
        acc = acc * shrink[:, None] + matmul(weights.astype(v.dtype), v)
        return acc, total, new_top

      start = jnp.zeros((bq, W), jnp.float32), jnp.zeros(bq, jnp.float32)
      carry = *start, jnp.full(bq, _LOWEST, jnp.float32)
      acc, total, top = self._visit(refs, b, i, attend, carry)
      empty = total == 0
      total = jnp.where(empty, 1.0, total)
      lse = jnp.where(empty, _LOWEST, top * self._unit + jnp.log(total))
      refs.lse[b, n, rows] = lse
      out = acc / (total * (1 - call.dropout_rate))[:, None]
      refs.out[b, rows, n, :] = out.astype(refs.out.dtype)

    out, lse = self._pallas(
      body,
      "attention_forward",
      grid=(self._rows, self._N, self._B),
      inputs=self._inputs(),
      outputs={
        "out": ((self._B, self._padded_T, self._N, W), call.q_BTNH.dtype),
        "lse": ((self._B, self._N, self._padded_T), jnp.float32),
      },
    )
    return out[:, : self._T, :, : self._H], lse[:, :, : self._T].swapaxes(1, 2)

  def _own_block(self):
    """Of a program: the longest ones begin first, so that none is left alone at the end."""
    own, count = pl.program_id(0), self._columns if self._of_keys else self._rows
    # Under a causal mask the last queries see most keys, and the last keys are seen by fewest.
    is_growing = self._call.window[1] is not None and not self._of_keys
    return count - 1 - own if is_growing else own

  # The backward pass. The gradient at the logits is P (dropout'(dout v) - delta). The factor
  # 1 / (1 - rate) and the scale are left to the end.

  def _gradient(self, refs, b, n, i, j, tile, dot, dweights):
    """(kept weights, gradient at the logits, the same times the slope of the soft cap)."""
    logits, slope = self._scores(refs, b, n, i, j, tile, dot)
    rows = self._slices(i, j)[0]
    weights = self._exp(logits, self._of_query(refs.lse[b, n, rows]))
    bits = self._random_bits(refs, b, n, i, j)
    delta = self._of_query(refs.delta[b, n, rows])
    dlogits = weights * (self._drop(bits, dweights) - delta)
    return self._drop(bits, weights), dlogits, dlogits if slope is None else dlogits * slope

  def key_gradients(self, lse_BTN, delta_BTN, dout_BTNH):
    """(dk_BSKH, dv_BSKH, sums of the logits' gradient over queries, for a bias without them)."""
    call, bk, W = self._call, self._blocks.kv, self._W
    rest = 1 / (1 - call.dropout_rate)
    is_summed = self._dense and call.bias.shape[2] == 1 and call.bias.shape[3] > 1

    def body(refs):
      j, n, b = self._own_block(), pl.program_id(1), pl.program_id(2)
      columns, kv_head = pl.ds(j * bk, bk), self._key_head(n)
      k, v = refs.k[b, columns, kv_head, :], refs.v[b, columns, kv_head, :]

      def gather(tile, i, carry):
        dk, dv, *sums = carry
        rows = self._slices(i, j)[0]
        q, dout = refs.q[b, rows, n, :], refs.dout[b, rows, n, :]
        dot, dweights = self._pairs(q, k), self._pairs(dout, v)
        weights, dlogits, sloped = self._gradient(refs, b, n, i, j, tile, dot, dweights)
        dv += matmul(weights.astype(v.dtype), dout)
        dk += matmul(sloped.astype(k.dtype), q)
        return dk, dv, *(x + dlogits.sum(axis=1) for x in sums)

      zeros = jnp.zeros((bk, W), jnp.float32)
      sums = [jnp.zeros(bk, jnp.float32)] * is_summed
      dk, dv, *sums = self._visit(refs, b, j, gather, (zeros, zeros, *sums))
      refs.dk[b, columns, n, :] = (dk * (call.scale * rest)).astype(refs.dk.dtype)
      refs.dv[b, columns, n, :] = (dv * rest).astype(refs.dv.dtype)
      if is_summed:
        refs.by_key[b, n, columns] = sums[0] * rest

    group, dtype = self._N // self._K, call.k_BSKH.dtype
    # Heads that share keys leave a gradient each, added up in float32.
    dkv = (self._B, self._padded_S, self._N, W), dtype if group == 1 else jnp.float32
    outputs = {"dk": dkv, "dv": dkv}
    if is_summed:
      outputs["by_key"] = (self._B, self._N, self._padded_S), jnp.float32
    dk, dv, *sums = self._pallas(
      body,
      "attention_backward_keys",
      grid=(self._columns, self._N, self._B),
      inputs=self._gradient_inputs(lse_BTN, delta_BTN, dout_BTNH),
      outputs=outputs,
    )
    dk, dv = (x[:, : self._S, :, : self._H] for x in (dk, dv))
    if group > 1:
      shape = (self._B, self._S, self._K, group, self._H)
      dk, dv = (x.reshape(shape).sum(3).astype(dtype) for x in (dk, dv))
    return dk, dv, sums[0][:, :, : self._S] if sums else None

  def query_gradient(self, lse_BTN, delta_BTN, dout_BTNH):
    """(dq_BTNH, sums of the logits' gradient over keys, for a bias).

    The sums are [B, N, T] over all keys, if a dense bias has no keys; for a relative bias those
    over the keys of each of the far sides, [sides, B, N, T]; else None.
    """
    call, bq, W = self._call, self._blocks.q, self._W
    rest = 1 / (1 - call.dropout_rate)
    is_summed = self._dense and call.bias.shape[3] == 1
    count = len(self._far_sides) if self._relative else int(is_summed)

    def body(refs):
      i, n, b = self._own_block(), pl.program_id(1), pl.program_id(2)
      rows, kv_head = pl.ds(i * bq, bq), self._key_head(n)
      q, dout = refs.q[b, rows, n, :], refs.dout[b, rows, n, :]

      def gather(tile, j, carry):
        dq, *sums = carry
        columns = self._slices(i, j)[1]
        k, v = refs.k[b, columns, kv_head, :], refs.v[b, columns, kv_head, :]
        dot, dweights = self._pairs(q, k), self._pairs(dout, v)
        _, dlogits, sloped = self._gradient(refs, b, n, i, j, tile, dot, dweights)
        dq += matmul(sloped.astype(k.dtype), k)
        if is_summed:
          sums[0] += dlogits.sum(axis=1)
        elif tile.side is not None:
          sums[self._far_sides.index(tile.side)] += dlogits.sum(axis=1)
        elif sums:
          distance = self._distance(refs, i, j)
          for number, side in enumerate(self._far_sides):
            is_far = distance >= self._reach if side else distance <= -self._reach
            sums[number] += jnp.where(is_far, dlogits, 0.0).sum(axis=1)
        return dq, *sums

      sums = [jnp.zeros(bq, jnp.float32)] * count
      carry = jnp.zeros((bq, W), jnp.float32), *sums
      dq, *sums = self._visit(refs, b, i, gather, carry)
      refs.dq[b, rows, n, :] = (dq * (call.scale * rest)).astype(refs.dq.dtype)
      for number, x in enumerate(sums):
        refs.by_query[number, b, n, rows] = x * rest

    outputs = {"dq": ((self._B, self._padded_T, self._N, W), call.q_BTNH.dtype)}
    if count:
      outputs["by_query"] = (count, self._B, self._N, self._padded_T), jnp.float32
    dq, *sums = self._pallas(
      body,
      "attention_backward_queries",
      grid=(self._rows, self._N, self._B),
      inputs=self._gradient_inputs(lse_BTN, delta_BTN, dout_BTNH),
      outputs=outputs,
    )
    by_query = sums[0][..., : self._T] if sums else None
    return dq[:, : self._T, :, : self._H], by_query[0] if is_summed else by_query

  def dense_gradient(self, lse_BTN, delta_BTN, dout_BTNH):
    """Of a bias that has queries and keys, [B or 1, N or 1, T, S]."""
    bias = self._call.bias
    over_b = self._B if bias.shape[0] == 1 else 1
    over_n = self._N if bias.shape[1] == 1 else 1
    tiles = self._rows * self._columns * bias.shape[0] * bias.shape[1]
    parts = _parts(over_b * over_n, tiles)
    length = -(-over_b * over_n // parts)

    def body(refs):
      number, head, part = (pl.program_id(axis) for axis in range(3))
      i, j = _divmod(number, self._columns)
      own_b, own_n = _divmod(head, bias.shape[1])

      def place(m):
        b, n = _divmod(m, over_n)
        return own_b + b, own_n + n, i, j

      # The same for all that it is broadcast over.
      tile = _Tile(self._call.hides_nothing, bias=self._dense_bias(refs, own_b, own_n, i, j))
      total = self._tile_sum(refs, tile, part * length, over_b * over_n, length, place)
      rows, columns = self._slices(i, j)
      refs.dbias[part, own_b, own_n, rows, columns] = total.astype(refs.dbias.dtype)

    (dbias,) = self._pallas(
      body,
      "attention_backward_bias",
      grid=(self._rows * self._columns, bias.shape[0] * bias.shape[1], parts),
      inputs=self._gradient_inputs(lse_BTN, delta_BTN, dout_BTNH),
      outputs={
        "dbias": (
          (parts, *bias.shape[:2], self._padded_T, self._padded_S),
          bias.dtype if parts == 1 else jnp.float32,
        )
      },
    )
    return dbias.sum(0)[:, :, : self._T, : self._S].astype(bias.dtype)

  def _tile_sum(self, refs, tile, first, end, length, place):
    """The gradient at the logits, summed over the blocks place(first) .. place(first + length - 1).

    Those from `end` on do not exist, nor those that `place` puts outside.
    """
    bq, bk = self._blocks.q, self._blocks.kv

    def add(m, total):
      b, n, i, j = place(m)
      is_there = (0 <= i) & (i < self._rows) & (0 <= j) & (j < self._columns)
      i, j = jnp.clip(i, 0, self._rows - 1), jnp.clip(j, 0, self._columns - 1)
      rows, columns = self._slices(i, j)
      kv_head = self._key_head(n)
      dot = self._pairs(refs.q[b, rows, n, :], refs.k[b, columns, kv_head, :])
      dweights = self._pairs(refs.dout[b, rows, n, :], refs.v[b, columns, kv_head, :])
      _, dlogits, _ = self._gradient(refs, b, n, i, j, tile, dot, dweights)
      return total + jnp.where(is_there, dlogits, 0.0)

    start = jnp.zeros((bq, bk), jnp.float32)
    total = jax.lax.fori_loop(first, jnp.minimum(first + length, end), add, start)
    return total * (1 / (1 - self._call.dropout_rate))

  def relative_gradient(self, lse_BTN, delta_BTN, dout_BTNH, far_sums):
    """Of a relative bias, given `query_gradient`'s sums: a RelativeBias, as that of the call."""
    call, bias, step = self._call, self._call.bias, self._blocks.q
    # Distances behind and ahead at which pairs are near, and may be visible.
    behind, ahead = (self._reach if x is None else min(self._reach, x + 1) for x in call.window)
    # The corner of tile n lies at distance n step - offset; its pairs, less than a step around it.
    reach = behind + step - 1
    first_tile = -((reach - call.q_offset - 1) // step)
    count = (behind + ahead + 2 * (step - 1) - 1) // step + 1
    # Of all these tiles, those that are there.
    larger = max if call.traced_offset is None else jnp.maximum
    first_tile = larger(first_tile, 1 - self._rows)
    count = min(count, self._rows + self._columns - 1)
    every = self._B * self._rows
    parts = _parts(every, self._N * count)
    length = -(-every // parts)

    def body(refs):
      number, n, part = (pl.program_id(axis) for axis in range(3))

      def place(m):
        b, i = _divmod(m, self._rows)
        return b, n, i, i + number + refs.first_tile[0]

      tile = _Tile(self._call.hides_nothing)
      refs.dtiles[part, n, number] = self._tile_sum(refs, tile, part * length, every, length, place)

    inputs = self._gradient_inputs(lse_BTN, delta_BTN, dout_BTNH)
    (dtiles,) = self._pallas(
      body,
      "attention_backward_bias",
      grid=(count, self._N, parts),
      inputs=inputs | {"first_tile": jnp.asarray(first_tile, jnp.int32).reshape(1)},
      outputs={"dtiles": ((parts, self._N, count, step, step), jnp.float32)},
    )
    width = 2 * step - 1
    strips = jax.ShapeDtypeStruct((self._N, count, width), jnp.float32)
    skew = jax.linear_transpose(lambda x: toeplitz(x, step, step), strips)
    (dstrips,) = skew(dtiles.sum(0))

    # From distances to buckets by a product, which has a fixed order; a scatter has none on a GPU.
    starts = (first_tile + np.arange(count)) * step - call.q_offset - step + 1
    distance = starts[:, None] + np.arange(width)[None, :]
    near = jnp.where(abs(distance) < self._reach, bias.buckets(distance), -1)
    sums = dstrips.reshape(self._N, -1)
    places = near.reshape(-1)
    if far_sums is not None:
      far = bias.buckets(np.array([-self._reach, self._reach])[list(self._far_sides)])
      sums = jnp.concatenate([sums, far_sums.sum((1, 3)).T], axis=1)
      places = jnp.concatenate([places, far])
    table = bias.table
    rows = np.arange(table.shape[0])[:, None]
    members = (places[None, :] == rows).astype(jnp.float32)
    dtable = jnp.einsum("kd,nd->kn", members, sums, precision=jax.lax.Precision.HIGHEST)
    return dataclasses.replace(bias, table=dtable.astype(table.dtype))

  def _pallas(self, body, name, *, grid, inputs, outputs):
    """One kernel: `body(refs)` sees all arrays, whole, by name.

    Args:
      inputs: name to array; outputs: name to (shape, dtype).
    """
    if not self._visits_all:
      inputs = inputs | {"bounds": self._bounds()}
    names = [*inputs, *outputs]
    kernel = pl.pallas_call(
      lambda *refs: body(Refs(zip(names, refs, strict=True))),
      grid=grid,
      # The program is one device's, whatever shard_map it is part of; see `platforms`.
      out_shape=[
        jax.ShapeDtypeStruct(*output, **jax_names.varying_over()) for output in outputs.values()
      ],
      compiler_params=plt.CompilerParams(
        num_warps=self._blocks.warps, num_stages=self._blocks.stages
      ),
      interpret=self._interpret,
      name=name,
    )
    return kernel(*inputs.values())


# Windows wider than this hide nothing, and positions plus this stay in 32 bits.
_FAR = 2**30


def _divmod(x, divisor: int):
  divisor = jnp.int32(divisor)
  return jax.lax.div(x, divisor), jax.lax.rem(x, divisor)


def _parts(count: int, programs: int) -> int:
  """In how many parts a sum of `count` blocks is made, so that all multiprocessors have work."""
  return max(1, min(count, -(-_PROGRAMS // programs)))
