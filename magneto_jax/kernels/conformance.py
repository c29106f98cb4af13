"""What an implementation of attention must compute: cases as data, and a float64 reference.

The same suite runs in the tests, where kernels are interpreted, and on the user's own device, by
`python -m magneto_jax.kernels.check`. The reference is written from the equation in the docstring
of `dot_product_attention`, in NumPy, and shares no code with what it judges.

Letters: B batch, T query length, S key and value length, N heads, K key/value heads,
G = N / K heads a key/value head, H head dim.
"""

import dataclasses
import itertools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax.kernels import jax_names, platforms
from magneto_jax.kernels.attention import Implementation, choose, dot_product_attention
from magneto_jax.kernels.bias import RelativeBias

# The names of what is compared, in the order of `dot_product_attention`'s results and arguments.
RESULTS = ("out", "lse", "dq", "dk", "dv", "dbias")

# name: which of [B, N, T, S] a dense bias has; in the others it has size 1.
DENSE_BIASES = {
  "per head": (False, True, True, True),
  "full": (True, True, True, True),
  "per key": (True, False, False, True),
  "per query": (False, True, True, False),
  "shared": (False, False, True, True),
  "number a head": (False, True, False, False),
  # A third of the pairs is forbidden, and all pairs of one row.
  "forbidding": (True, False, True, True),
}
# name: bidirectional, of T5's bias.
RELATIVE_BIASES = {"relative": True, "relative causal": False}


@dataclasses.dataclass(frozen=True)
class Case:
  """One call with its gradients; its arrays are drawn from its name.

  Attributes:
    name: unique in a suite.
    B, T, S, N, K, H: the sizes.
    dtype: of queries, keys and values. A dense bias has it too; the table of a relative one, a
      parameter, has promote_types(dtype, float32).
    bias: "" or a name of `DENSE_BIASES` or `RELATIVE_BIASES`.
    num_buckets, max_distance: of a relative bias.
    is_causal, window, q_offset, logits_soft_cap, scale, dropout_rate: as in
      `dot_product_attention`.
    traced_offset: whether the offset is an argument of the jitted function.
    segments: "" for none; "packed" for documents one after another and padding at the end;
      "hidden" for the same, where one document's queries and all padding see nothing.
    kv_lengths: one for each row of the batch, or ().
    lse_cotangent: whether lse takes part in the gradients.
  """

  name: str
  B: int = 2
  T: int = 256
  S: int = 256
  N: int = 4
  K: int = 4
  H: int = 64
  dtype: str = "float32"
  bias: str = ""
  num_buckets: int = 32
  max_distance: int = 100
  is_causal: bool = False
  window: tuple[int | None, int | None] | None = None
  q_offset: int = 0
  traced_offset: bool = False
  segments: str = ""
  kv_lengths: tuple[int, ...] = ()
  logits_soft_cap: float | None = None
  scale: float | None = None
  dropout_rate: float = 0.0
  lse_cotangent: bool = True

  def __post_init__(self):
    if self.bias not in ("", *DENSE_BIASES, *RELATIVE_BIASES):
      raise ValueError(f"{self.bias=} is not one of {[*DENSE_BIASES, *RELATIVE_BIASES]} or empty")
    if self.segments not in ("", "packed", "hidden"):
      raise ValueError(f"{self.segments=} is neither 'packed' nor 'hidden' nor empty")
    if self.kv_lengths and len(self.kv_lengths) != self.B:
      raise ValueError(f"{self.kv_lengths=} are not {self.B=}")

  def arrays(self) -> tuple:
    """(q_BTNH, k_BSKH, v_BSKH, bias), NumPy arrays in the case's dtype."""
    rng = self._rng("arrays")
    q, k, v = (self._normal(rng, L, n) for L, n in ((self.T, self.N), *[(self.S, self.K)] * 2))
    return q, k, v, self._draw_bias(rng)

  def options(self) -> tuple[dict, dict]:
    """The static and the traced options of `dot_product_attention`."""
    static = {
      "is_causal": self.is_causal,
      "window": self.window,
      "logits_soft_cap": self.logits_soft_cap,
      "scale": self.scale,
      "dropout_rate": self.dropout_rate,
    }
    traced = {}
    offset = traced if self.traced_offset else static
    offset["q_offset"] = np.int32(self.q_offset) if self.traced_offset else self.q_offset
    if self.segments:
      traced["q_segment_ids"], traced["kv_segment_ids"] = self._draw_segments()
    if self.kv_lengths:
      traced["kv_lengths"] = np.array(self.kv_lengths, np.int32)
    if self.dropout_rate > 0:
      traced["dropout_key"] = jax.random.key(zlib.crc32(self.name.encode()))
    return static, traced

  def cotangents(self) -> tuple[np.ndarray, np.ndarray]:
    """(dout_BTNH, dlse_BTN), in the dtypes of out and lse."""
    rng = self._rng("cotangents")
    dout = self._normal(rng, self.T, self.N)
    dlse = rng.normal(size=dout.shape[:3]) * self.lse_cotangent
    return dout, dlse.astype(compute_dtype(self.dtype))

  def _rng(self, purpose: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(f"{purpose} of {self.name}".encode()))

  def _normal(self, rng, length, heads):
    return rng.normal(size=(self.B, length, heads, self.H)).astype(jnp.dtype(self.dtype))

  def _draw_bias(self, rng):
    if not self.bias:
      return None
    if self.bias in RELATIVE_BIASES:
      table = rng.normal(size=(self.num_buckets, self.N)).astype(compute_dtype(self.dtype))
      return RelativeBias(table, RELATIVE_BIASES[self.bias], self.max_distance)
    full = (self.B, self.N, self.T, self.S)
    shape = [size if has else 1 for has, size in zip(DENSE_BIASES[self.bias], full, strict=True)]
    bias = rng.normal(size=shape)
    if self.bias == "forbidding":
      bias[rng.random(shape) < 1 / 3] = -np.inf
      bias[0, :, self.T // 2] = -np.inf
    return bias.astype(jnp.dtype(self.dtype))

  def _draw_segments(self) -> tuple[np.ndarray, np.ndarray]:
    rng = self._rng("segments")
    q_ids = _documents(rng, self.B, self.T)
    kv_ids = q_ids.copy() if self.T == self.S else _documents(rng, self.B, self.S)
    if self.segments == "hidden":
      q_ids[(q_ids == 2) | (q_ids == 0)] = -1
      q_ids[0, -1] = -1
      q_ids[1:, -1] = kv_ids[1:, 0]  # Not all of them, even if there is one query.
    return q_ids, kv_ids


def _documents(rng, B: int, length: int) -> np.ndarray:
  """int32 [B, length]: documents 1 to 4, an eighth of padding (0) behind them."""
  cuts = rng.integers(0, length + 1, (B, 3))
  ids = 1 + (np.arange(length)[None, :, None] >= cuts[:, None, :]).sum(-1)
  ids[:, length - length // 8 :] = 0
  return ids.astype(np.int32)


def compute_dtype(dtype) -> jnp.dtype:
  """In which everything between the two products is done."""
  return jnp.promote_types(dtype, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Result:
  """What is to come out in float64, and how large the terms are of which it is the sum.

  A sum is computed as well as it can be if its error is a few roundings of its terms, not of
  itself: the terms may cancel. `size` is the same sum over absolute values; where it is 0 there are
  no terms, and the value must be 0 exactly.
  """

  value: np.ndarray
  size: np.ndarray


def tolerance(dtype, logit_size: float) -> tuple[float, float]:
  """Of out and the gradients, and of lse, in units of a `Result`'s size.

    2 eps(dtype) + 4 (1 + L) eps(compute dtype),   4 (1 + L) eps(compute dtype)

  Between the arguments and a gradient lie at most four roundings to the dtype, each of eps / 2: of
  out (or of dout v), of P or dA where they enter a product, and of the result. Everything else is
  done in the compute dtype. There a logit, the sum of terms of together L in size, is wrong by some
  eps L, and exp makes of it a relative error of P; exp, log, tanh and the sums over keys or queries
  count as one unit more. The 4 stands for sums and functions that are not rounded correctly.
  """
  fine = 4 * (1 + logit_size) * float(jnp.finfo(compute_dtype(dtype)).eps)
  return 2 * float(jnp.finfo(dtype).eps) + fine, fine


def least_size(dtype) -> float:
  """Of what is rounded to a dtype, be it a factor or a result: `tolerance` takes eps of it.

  Below the least normal number a rounding is one of it; or all of the number, where it is flushed
  to zero, as XLA:CPU does with all but float16.
  """
  flushed = float(jnp.finfo(compute_dtype(dtype)).tiny)
  subnormal = float(jnp.finfo(dtype).smallest_subnormal)
  return max(flushed, subnormal) / float(jnp.finfo(dtype).eps)


def buckets(relative_position: np.ndarray, n: int, bidirectional: bool, D: int) -> np.ndarray:
  """T5's buckets in exact integers: e + floor(log(m/e) / log(D/e) (n - e)) counts the j >= 1 with

  (m / e)^(n - e) >= (D / e)^j.
  """
  ahead = bidirectional * (relative_position > 0)
  n = n // 2 if bidirectional else n
  e = n // 2
  edges = range(1, n - e)
  near = [
    m if m < e else e + sum(m ** (n - e) * e**j >= D**j * e ** (n - e) for j in edges)
    for m in range(D + 1)
  ]
  distance = abs(relative_position) if bidirectional else np.maximum(-relative_position, 0)
  return np.array(near)[np.minimum(distance, D)] + n * ahead


def dropout_mask(key: jax.Array, B: int, N: int, T: int, S: int, rate: float) -> np.ndarray:
  """What is kept, bool [B, N, T, S], by the hash of `kernels.dropout` in NumPy."""

  def mix(x):
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))

  b, n, t, s = (i.astype(np.uint32) * np.uint32(0x9E3779B9) for i in np.ogrid[0:B, 0:N, 0:T, 0:S])
  first, second = np.asarray(jax.random.bits(key, (2,), jnp.uint32))
  head = mix(mix(first ^ b) ^ (second + n))
  query, key, two = mix(head + t), mix(mix(head) + s), np.uint32(2)
  bits = (two * mix(query) + np.uint32(1)) * key + query + mix(key)
  return bits >= round(rate * 2**32)


def reference(
  q_BTNH,
  k_BSKH,
  v_BSKH,
  bias=None,
  *,
  cotangents=None,
  q_segment_ids=None,
  kv_segment_ids=None,
  kv_lengths=None,
  is_causal=False,
  q_offset=0,
  window=None,
  logits_soft_cap=None,
  scale=None,
  dropout_rate=0.0,
  dropout_key=None,
) -> tuple[dict[str, Result], float]:
  """Attention and its gradients in float64, by name in `RESULTS`, and the largest size of a logit.

  With A, P and lse as in `dot_product_attention`, D = dropout(1), X = scale q k, and the cotangents
  (dout, dlse):

    dA = P (D (dout v) - sum_s P D (dout v) + dlse),   dX = dA (1 - tanh(X / c)^2) scale
    dq = sum_s dX k,   dk = sum_t dX q,   dv = sum_t P D dout,   dbias = dA,

  summed over what the bias is broadcast over, or over the pairs of a bucket. lse of a query that
  sees no key is -inf. There are gradients if there are cotangents, and dbias if there is a bias.
  """
  (B, T, N, H), (_, S, K, _), dtype = q_BTNH.shape, k_BSKH.shape, q_BTNH.dtype
  q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BSKH, v_BSKH))
  q = q.reshape(B, T, K, N // K, H)
  scale = H**-0.5 if scale is None else scale
  tiny = least_size(dtype)

  def both(equation, *pairs):
    """An einsum of the values, and of the sizes."""
    return [np.einsum(equation, *x, optimize=True) for x in zip(*pairs, strict=True)]

  def sized(x):
    return x, abs(x)

  def grouped(x):
    return x.reshape(B, K, N // K, T, S)

  X, X_size = (scale * x for x in both("btkgh,bskh->bkgts", sized(q), sized(k)))
  X, X_size = X.reshape(B, N, T, S), abs(X_size).reshape(B, N, T, S)
  A, slope, slope_size = X, 1.0, 1.0
  if logits_soft_cap is not None:
    capped = np.tanh(X / logits_soft_cap)
    A, slope, slope_size = logits_soft_cap * capped, 1 - capped**2, 1 + capped**2

  distance = np.arange(S) - np.arange(T)[:, None] - int(q_offset)
  dense = bias
  if isinstance(bias, RelativeBias):
    table = np.asarray(bias.table, np.float64)
    bucket = buckets(distance, table.shape[0], bias.bidirectional, bias.max_distance)
    dense = table[bucket].transpose(2, 0, 1)[None]
  if bias is not None:
    dense = np.broadcast_to(np.asarray(dense, np.float64), A.shape)
    A, X_size = A + dense, X_size + abs(dense)

  left, right = window or (None, None)
  visible = ~np.isneginf(A)
  visible &= distance <= 0 if is_causal else True
  visible &= distance >= -left if left is not None else True
  visible &= distance <= right if right is not None else True
  if q_segment_ids is not None:
    q_ids, kv_ids = np.asarray(q_segment_ids), np.asarray(kv_segment_ids)
    visible &= q_ids[:, None, :, None] == kv_ids[:, None, None, :]
  if kv_lengths is not None:
    visible &= (np.arange(S) < np.asarray(kv_lengths)[:, None])[:, None, None, :]
  A = np.where(visible, A, -np.inf)
  logit_size = float(np.max(X_size, where=visible, initial=0.0))

  top = A.max(-1, keepdims=True)
  top = np.where(np.isneginf(top), 0, top)
  with np.errstate(divide="ignore"):
    lse = top + np.log(np.exp(A - top).sum(-1, keepdims=True))
  P = np.exp(A - np.where(np.isneginf(lse), 0, lse))
  D = 1.0
  if dropout_rate > 0:
    D = dropout_mask(dropout_key, B, N, T, S, dropout_rate) / (1 - dropout_rate)

  PD = grouped(P * D), grouped(P * D + tiny * visible)
  out, out_size = both("bkgts,bskh->btkgh", PD, sized(v))
  lse_BTN = lse[..., 0].transpose(0, 2, 1)
  results = {
    "out": Result(out.reshape(q_BTNH.shape), out_size.reshape(q_BTNH.shape)),
    "lse": Result(lse_BTN, 1.0 * ~np.isneginf(lse_BTN)),
  }
  if cotangents is None:
    return results, logit_size

  dout, dlse = (np.asarray(x, np.float64) for x in cotangents)
  dout, dlse = dout.reshape(q.shape), dlse.transpose(0, 2, 1)[..., None]
  dP, dP_size = (
    D * x.reshape(B, N, T, S) for x in both("btkgh,bskh->bkgts", sized(dout), sized(v))
  )
  delta, delta_size = ((P * x).sum(-1, keepdims=True) for x in (dP, dP_size))
  dA, dA_size = P * (dP - delta + dlse), P * (dP_size + delta_size + abs(dlse)) + tiny * visible
  dX = grouped(dA * slope * scale), grouped(dA_size * slope_size * abs(scale) + tiny * visible)
  dq, dq_size = both("bkgts,bskh->btkgh", dX, sized(k))
  results |= {
    "dq": Result(dq.reshape(q_BTNH.shape), dq_size.reshape(q_BTNH.shape)),
    "dk": Result(*both("bkgts,btkgh->bskh", dX, sized(q))),
    "dv": Result(*both("bkgts,btkgh->bskh", PD, sized(dout))),
  }
  if isinstance(bias, RelativeBias):
    member = bucket.ravel() == np.arange(table.shape[0])[:, None]
    sums = (member @ x.sum(0).reshape(N, T * S).T for x in (dA, dA_size))
    results["dbias"] = Result(*sums)
  elif bias is not None:
    axes = tuple(i for i, size in enumerate(bias.shape) if size == 1)
    results["dbias"] = Result(*(x.sum(axes, keepdims=True) for x in (dA, dA_size)))
  return results, logit_size


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How an implementation did on a case.

  Attributes:
    name: of the case.
    errors: by name in `RESULTS`, the largest error in units of the tolerance; infinite where a
      number is none or not the 0 it must be, or where shape or dtype is wrong.
    refused: why it does not serve the case; empty if it does.
    raised: what else it raised instead of serving it; empty if nothing.
  """

  name: str
  errors: Mapping[str, float] = dataclasses.field(default_factory=dict)
  refused: str = ""
  raised: str = ""

  @property
  def passed(self) -> bool:
    return bool(self.errors) and all(error <= 1 for error in self.errors.values())

  def __str__(self):
    if self.refused:
      return f"refused: {self.refused}"
    if self.raised:
      return f"FAILED: {self.raised}"
    errors = " ".join(f"{name} {error:.2g}" for name, error in self.errors.items())
    return f"{'passed' if self.passed else 'FAILED'}: {errors}"


def run(case: Case, implementation: str | Implementation) -> Outcome:
  """Computes a case, jitted, on the default device, and compares it with the reference.

  Products of float32 are asked for in full precision: a device may round their factors otherwise.
  An implementation that serves the case only without lse is compared without it.
  """
  with (
    jax_names.enable_x64(case.dtype == "float64"),
    jax.default_matmul_precision("highest"),
  ):
    arrays, (static, traced), (dout, dlse) = case.arrays(), case.options(), case.cotangents()
    for return_lse in (True, False):
      asked = {"return_lse": return_lse, "implementation": implementation}
      try:
        choose(*arrays, **static, **traced, **asked).on(platforms.here())
      except NotImplementedError as error:
        refused = str(error)
      else:
        break
    else:
      return Outcome(case.name, refused=refused)

    @jax.jit
    def compute(arrays, traced, cotangents):
      def attend(arrays):
        return dot_product_attention(*arrays, **static, **traced, **asked)

      results, pull = jax.vjp(attend, arrays)
      (gradients,) = pull(cotangents)
      return *(results if return_lse else (results, None)), *gradients

    found = compute(arrays, traced, (dout, dlse) if return_lse else dout)
    found = jax.tree.map(np.asarray, found)
  cotangents = dout, dlse * return_lse
  expected, logit_size = reference(*arrays, cotangents=cotangents, **static, **traced)
  if not return_lse:
    del expected["lse"]
  return Outcome(case.name, _errors(case, arrays, found, expected, logit_size))


def _errors(case, arrays, found, expected, logit_size) -> dict[str, float]:
  """The largest error of each result over its tolerance."""
  coarse, fine = tolerance(case.dtype, logit_size)
  wide = compute_dtype(case.dtype)
  dtypes = dict(
    zip(RESULTS, (case.dtype, wide, *[x.dtype for x in jax.tree.leaves(arrays)]), strict=False)
  )
  errors = {}
  for name, x in zip(RESULTS, found, strict=True):
    if name not in expected:
      continue
    if isinstance(x, RelativeBias):
      x = x.table
    value, size = expected[name].value, expected[name].size
    if name == "lse":
      value = np.where(np.isneginf(value), float(jnp.finfo(wide).min), value)
    if x.shape != value.shape or x.dtype != dtypes[name]:
      errors[name] = math.inf
      continue
    error = abs(np.asarray(x, np.float64) - value)
    unit = fine if name == "lse" else coarse
    allowed = np.where(size > 0, unit * (size + least_size(case.dtype)), 0)
    exact = np.where(error == 0, 0.0, np.inf)
    ratio = np.divide(error, allowed, out=exact, where=allowed > 0)
    errors[name] = float(np.max(np.where(np.isnan(ratio), np.inf, ratio), initial=0.0))
  return errors


# feature: level: what it says of a case. Where a level needs the lengths, it is a function of them.
FEATURES = {
  "dtype": {name: {"dtype": name} for name in ("float32", "bfloat16", "float16")},
  "lengths": {
    "blocks": {"T": 256, "S": 256},
    "ragged": {"T": 300, "S": 200},
    "cross": {"T": 128, "S": 384},
    "one query": {"T": 1, "S": 300},
    "one key": {"T": 300, "S": 1},
  },
  "heads": {
    "4": {"N": 4, "K": 4},
    "4 on 2": {"N": 4, "K": 2},
    "3 on 1": {"N": 3, "K": 1},
  },
  "head dim": {str(H): {"H": H} for H in (40, 64, 80, 128, 256)},
  "bias": {
    "none": {"bias": ""},
    **{
      name: {"bias": name}
      for name in ("per head", "full", "per key", "forbidding", *RELATIVE_BIASES)
    },
  },
  "mask": {
    "none": {},
    "causal": {"is_causal": True},
    "window": {"window": (70, 40)},
    "offset": lambda T, S: {"is_causal": True, "q_offset": max(S - T, 7), "traced_offset": True},
    "packed": {"segments": "packed"},
    "lengths": lambda T, S: {"kv_lengths": (0, -(-2 * S // 3))},
    "hidden": {"segments": "hidden", "is_causal": True},
  },
  "soft cap": {"no": {}, "yes": {"logits_soft_cap": 2.0}},
  "dropout": {"no": {}, "yes": {"dropout_rate": 0.2}},
}


def covering(levels: Sequence[int], strength: int) -> list[tuple[int, ...]]:
  """Rows of levels such that any `strength` features meet in all combinations of their levels.

  Greedy: a row begins with the first combination that is missing; then one feature after the other
  takes the level that adds most, of equal ones the least used.

  Args:
    levels: how many there are of each feature.
    strength: 1 for every level once, 2 for every pair.
  """
  features = range(len(levels))
  missing = dict.fromkeys(
    tuple(zip(group, choice, strict=True))
    for group in itertools.combinations(features, strength)
    for choice in itertools.product(*(range(levels[f]) for f in group))
  )
  used = {(f, level): 0 for f in features for level in range(levels[f])}
  rows = []
  while missing:
    row = dict(next(iter(missing)))
    for feature in features:
      if feature in row:
        continue
      gain = dict.fromkeys(range(levels[feature]), 0)
      for group in missing:
        own = dict(group)
        level = own.pop(feature, None)
        if level is not None and all(row.get(f) == x for f, x in own.items()):
          gain[level] += 1
      row[feature] = min(gain, key=lambda x: (-gain[x], used[feature, x]))
    for cell in row.items():
      used[cell] += 1
    rows.append(tuple(row[f] for f in features))
    for group in itertools.combinations(sorted(row.items()), strength):
      missing.pop(group, None)
  return rows


# What kernels of few features serve too.
FEW_FEATURES = {
  "dtype": {name: FEATURES["dtype"][name] for name in ("bfloat16", "float16")},
  **{feature: FEATURES[feature] for feature in ("lengths", "heads", "head dim")},
  "visible": {
    "causal window": {"is_causal": True, "window": (70, None)},
    "causal and lengths": lambda T, S: {"is_causal": True, "kv_lengths": (0, -(-2 * S // 3))},
    **{name: FEATURES["mask"][name] for name in ("causal", "lengths", "none")},
  },
}


def _cases(strength: int, features: Mapping[str, Mapping] = FEATURES) -> Iterator[Case]:
  for row in covering([len(levels) for levels in features.values()], strength):
    names = [list(levels)[i] for levels, i in zip(features.values(), row, strict=True)]
    yield combine(dict(zip(features, names, strict=True)), features)


def combine(names: Mapping[str, str], features: Mapping[str, Mapping] = FEATURES) -> Case:
  """The case of one level of each feature."""
  said = {feature: features[feature][name] for feature, name in names.items()}
  lengths = said["lengths"]
  fields = [x(**lengths) if callable(x) else x for x in said.values()]
  name = ", ".join(
    f"{feature} {name}" for feature, name in names.items() if name not in ("none", "no")
  )
  return Case(name, **{key: value for field in fields for key, value in field.items()})


# Every level of every feature, and every pair of them.
EACH = tuple(_cases(1))
PAIRWISE = tuple(_cases(2))
FEW_EACH = tuple(_cases(1, FEW_FEATURES))
FEW_PAIRWISE = tuple(_cases(2, FEW_FEATURES))

# What the features do not say.
SPECIAL = (
  Case("window to the left", T=300, S=300, window=(0, None)),
  Case("window to the right", T=200, S=300, window=(None, 0), q_offset=-20),
  Case("window and causal", T=300, S=300, window=(140, 3), is_causal=True),
  Case("offset, known", T=130, S=300, is_causal=True, q_offset=100, bias="relative causal"),
  Case("offset before all keys", T=300, S=200, is_causal=True, q_offset=-150, traced_offset=True),
  Case(
    "offset behind all keys", T=130, S=200, window=(100, None), q_offset=220, traced_offset=True
  ),
  Case("bias of queries", T=200, S=300, bias="per query", N=4, K=2),
  Case("bias of all heads", T=200, S=300, bias="shared", N=4, K=2),
  Case("bias of heads", T=200, S=300, bias="number a head", N=4, K=2),
  Case("far buckets", T=700, S=300, H=40, N=2, K=2, bias="relative", max_distance=40),
  Case("near buckets", H=40, bias="relative", max_distance=500, q_offset=300, traced_offset=True),
  Case("scale", scale=-0.3, logits_soft_cap=0.5),
  Case("large logits", scale=40.0, bias="per head"),
  Case("out alone", lse_cotangent=False, is_causal=True, dropout_rate=0.5),
  Case("lengths beyond the keys", T=200, S=300, kv_lengths=(0, 1_000), is_causal=True),
  Case("nothing seen", T=200, S=300, kv_lengths=(0, 0), bias="relative"),
  # Longer than the largest block of any heuristic.
  Case("long", B=1, T=1100, S=1300, N=2, K=1, is_causal=True, q_offset=200, bias="relative"),
  Case(
    "everything",
    T=700,
    S=1100,
    N=2,
    K=1,
    bias="relative",
    is_causal=True,
    window=(600, None),
    q_offset=300,
    traced_offset=True,
    segments="hidden",
    kv_lengths=(1000, 1100),
    logits_soft_cap=3.0,
    scale=0.2,
    dropout_rate=0.1,
  ),
)
SUITE = PAIRWISE + FEW_PAIRWISE + SPECIAL
QUICK = EACH + FEW_EACH
