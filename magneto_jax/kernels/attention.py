"""Scaled dot-product attention: one signature, checked once, over a table of implementations.

Letters: B batch, T query length, S key and value length, N heads, K key/value heads, H head dim.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from magneto_jax.kernels import attention_xla, dropout, platforms, self_check
from magneto_jax.kernels.attention_chunked import XlaChunked
from magneto_jax.kernels.attention_cudnn import Cudnn
from magneto_jax.kernels.attention_gpu import PallasGpu
from magneto_jax.kernels.attention_tpu import PallasTpu
from magneto_jax.kernels.attention_xla import Xla
from magneto_jax.kernels.bias import RelativeBias, check_buckets
from magneto_jax.kernels.call import Call

_logger = logging.getLogger(__name__)


class Implementation(Protocol):
  """What the table holds: a frozen record of block sizes and the like.

  `xla` alone has neither `forward` nor `backward`: JAX differentiates it.

  Attributes:
    name: in the table.
    platforms: those it runs on, of cpu, cuda, rocm and tpu; None for all.
    is_exportable: False where `jax.export` refuses its program; need not be there otherwise.
  """

  name: str
  platforms: tuple[str, ...] | None

  def fitted(self, call: Call) -> "Implementation":
    """Itself with all that depends on the call filled in; NotImplementedError, saying why not."""

  def is_worthwhile(self, call: Call) -> bool:
    """Whether it should serve a call that names no implementation."""

  def forward(self, call: Call) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN)."""

  def backward(self, call: Call, out_BTNH, lse_BTN, dout_BTNH, dlse_BTN) -> tuple:
    """(dq_BTNH, dk_BSKH, dv_BSKH, dbias), dbias of the bias's structure (or None)."""


# Tried in this order, those of the platform that is compiled for: the first that does not raise
# NotImplementedError serves the call. (`xla_chunked` serves everything; `xla` is there to be
# named.)
IMPLEMENTATIONS: dict[str, Implementation] = {
  "pallas_tpu": PallasTpu(),
  "cudnn": Cudnn(),
  "pallas_gpu": PallasGpu(),
  "xla_chunked": XlaChunked(),
  "xla": Xla(),
}


def dot_product_attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  /,
  bias: jax.Array | RelativeBias | None = None,
  *,
  q_segment_ids: jax.Array | None = None,
  kv_segment_ids: jax.Array | None = None,
  kv_lengths: jax.Array | None = None,
  is_causal: bool = False,
  q_offset: int | jax.Array = 0,
  window: tuple[int | None, int | None] | None = None,
  logits_soft_cap: float | None = None,
  scale: float | None = None,
  dropout_rate: float = 0.0,
  dropout_key: jax.Array | None = None,
  return_lse: bool = False,
  implementation: str | Implementation | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Attends from T queries to S keys, with grouped heads, biases, masks and dropout.

  Head n reads key/value head k = n // (N / K). Query t stands at position t' = t + q_offset,
  key s at position s:

    A[n, t, s] = c tanh(scale q[t, n] . k[s, k] / c) + bias[n, t, s]  if s is visible, else -inf
    P = exp(A - lse),   lse[t, n] = log sum_s exp(A[n, t, s])
    out[t, n] = sum_s dropout(P)[n, t, s] v[s, k]

  where c is the soft cap (without one, c tanh(x / c) is x). Everything between the two products
  is done in promote_types(dtype, float32). A query that sees no key has out = 0, lse = the
  lowest finite number, and sends back zero gradients. Keys and values must be finite even where
  they are masked.

  Args:
    q_BTNH: [B, T, N, H] queries.
    k_BSKH: [B, S, K, H] keys, in the dtype of the queries; K divides N.
    v_BSKH: [B, S, K, H] values, likewise.
    bias: added to the scaled logits: [B or 1, N or 1, T or 1, S or 1], where -inf forbids a
      pair; or a `RelativeBias`, which reads positions (and so `q_offset`) itself. To forbid, take
      -inf: where all of a query's logits are finite and below some -1e5, lse, a float32, has no
      digits left for their sum, and the gradients of that query lose theirs.
    q_segment_ids: [B, T] integers; a query sees the keys of its own segment. Give both or none.
    kv_segment_ids: [B, S] integers.
    kv_lengths: [B] integers; keys from here on are padding, seen by nobody.
    is_causal: hides the keys s > t'.
    q_offset: the position of the first query, an integer or a traced scalar: the number of keys
      cached before it. At 0 the causal mask is aligned top left, also when T != S.
    window: (left, right), hides the keys outside [t' - left, t' + right]; None on a side for no
      bound. Together with `is_causal` both hold.
    logits_soft_cap: c, positive; applied before the bias, so that it cannot soften a -inf.
    scale: of the logits, a number known while tracing; H^-1/2 by default.
    dropout_rate: in [0, 1), the fraction of P to drop; the rest is divided by 1 - rate.
    dropout_key: a typed key, needed when the rate is not 0. What is dropped is a function of
      the key and of the places b, n, t, s alone, the same for every implementation. Within a
      shard_map those are a shard's own: fold `jax.lax.axis_index` into the key there, or leave the
      shard_map to `sharded_attention`, whose shards drop what the whole would.
    return_lse: whether to return lse too. It is taken before dropout.
    implementation: a name in the table of implementations, or a record with block sizes of one's
      own, as `kernels.XlaChunked(256, 256)`. None takes the first in the table that serves the call
      on the platform that is compiled for; `choose` tells which. `use_implementation` overrides it.
      All but `xla` are differentiable once, and in reverse mode only.

  Returns:
    out: [B, T, N, H] in the dtype of the queries; with `return_lse` the pair (out, lse), lse
    [B, T, N] in promote_types(dtype, float32).

  Raises:
    ValueError: if arguments contradict each other, or `implementation` does not exist.
    NotImplementedError: if the named implementation cannot serve the call.

  Example:
    >>> q, k, v = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 5, 1, 8)), jnp.ones((2, 5, 1, 8))
    >>> dot_product_attention(q, k, v, is_causal=True).shape
    (2, 5, 4, 8)

  Reference: Vaswani et al., 2017, arXiv 1706.03762, section 3.2.1; grouped heads: Ainslie et
  al., 2023, arXiv 2305.13245; soft cap: Gemma 2, arXiv 2408.00118, section 2.

  Differs from `jax.nn.dot_product_attention` in what a query without keys yields (there: the
  mean of all values), and in the segments, offset, relative bias, soft cap and dropout.
  """
  call = checked_call(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    bias,
    q_segment_ids=q_segment_ids,
    kv_segment_ids=kv_segment_ids,
    kv_lengths=kv_lengths,
    is_causal=is_causal,
    q_offset=q_offset,
    window=window,
    logits_soft_cap=logits_soft_cap,
    scale=scale,
    dropout_rate=dropout_rate,
    dropout_key=dropout_key,
    return_lse=return_lse,
  )
  out_BTNH, lse_BTN = attend(seeded(call, dropout_key), implementation)
  return (out_BTNH, lse_BTN) if return_lse else out_BTNH


def seeded(call: Call, dropout_key: jax.Array | None) -> Call:
  """With the seeds of its dropout, if there is any."""
  if call.dropout_rate == 0:
    return call
  B, _, _, N, _, _ = call.sizes
  q_seeds, kv_seeds = dropout.seeds(dropout_key, B, N)
  return dataclasses.replace(call, q_seeds=q_seeds, kv_seeds=kv_seeds)


def attend(call: Call, implementation: str | Implementation | None) -> tuple[jax.Array, jax.Array]:
  """(out_BTNH, lse_BTN) of a call, differentiable."""
  choice = choice_of(call, implementation)
  if 0 in call.sizes:  # Nothing attends, or there is nothing to attend to.
    lse_BTN = jnp.full(call.q_BTNH.shape[:3], jnp.finfo(call.dtype).min, call.dtype)
    return jnp.zeros_like(call.q_BTNH), lse_BTN
  log_once(str(choice))
  if choice.is_reference:
    return forward(choice, call)
  return _attend(choice, call.varying_alike())


@dataclasses.dataclass(frozen=True)
class Choice:
  """What serves a call: on some platforms, and on all others.

  Attributes:
    default: the implementation.
    by_platform: where another one is taken: (platform, implementation).
    refusals: (name, reason) of those in the table that come first and cannot serve the call.
  """

  default: Implementation
  by_platform: tuple[tuple[str, Implementation], ...] = ()
  refusals: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False)

  @property
  def is_reference(self) -> bool:
    """Whether it is `xla`, which has no passes: JAX differentiates it."""
    return isinstance(self.default, Xla)

  def on(self, platform: str) -> Implementation:
    """The implementation on one platform: cpu, tpu, cuda or rocm.

    Raises:
      NotImplementedError: a named one does not run there.
    """
    if platform not in platforms.PLATFORMS:
      raise ValueError(f"{platform=} is not one of {platforms.PLATFORMS}")
    implementation = dict(self.by_platform).get(platform, self.default)
    if implementation.platforms is not None and platform not in implementation.platforms:
      raise NotImplementedError(
        f"{implementation.name} runs on {' and '.join(implementation.platforms)}, and this is"
        f" compiled for {platform}: name another implementation, or none"
      )
    return implementation

  def __str__(self):
    others = "".join(f"{implementation} on {name}, " for name, implementation in self.by_platform)
    reasons = "".join(f"; not {name}: {reason}" for name, reason in self.refusals)
    return f"attention by {others}{self.default}{' elsewhere' if others else ''}{reasons}"


def choose(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  /,
  bias: jax.Array | RelativeBias | None = None,
  *,
  implementation: str | Implementation | None = None,
  **options,
) -> Choice:
  """What `dot_product_attention` would take for these arguments, without computing it.

  Arrays may be `jax.ShapeDtypeStruct`s.

  Example:
    >>> x = jax.ShapeDtypeStruct((2, 1024, 8, 64), jnp.bfloat16)
    >>> choose(x, x, x, is_causal=True).on("cpu").name
    'xla_chunked'
  """
  return choice_of(checked_call(q_BTNH, k_BSKH, v_BSKH, bias, **options), implementation)


# Part of the key of jit's caches, so that what was traced under another name is traced again.
_implementation = jax.make_user_context(None)


@contextlib.contextmanager
def use_implementation(implementation: str | Implementation | None) -> Iterator[None]:
  """All calls traced within the `with` take this implementation, whichever they name; None: theirs.

  Example:
    >>> with use_implementation("xla"):  # Forward mode needs it.
    ...   y, dy = jax.jvp(lambda x: dot_product_attention(x, x, x), (x,), (x,))
  """
  _named(implementation)
  with _implementation(implementation):
    yield


def choice_of(call: Call, implementation: str | Implementation | None) -> Choice:
  """Raises ValueError for an unknown name, NotImplementedError where a named one cannot serve."""
  named = _named(implementation if _implementation.value is None else _implementation.value)
  if 0 in call.sizes or not all(isinstance(size, int) for size in call.sizes):
    # Empty, or of sizes that are not known while tracing: there are no blocks to cut.
    return Choice(named or Xla())
  if named is not None:
    try:
      return Choice(named.fitted(call))
    except NotImplementedError as error:
      raise NotImplementedError(f"{named.name} cannot serve this call: {error}") from error
  by_platform, refusals, doubts = {}, {}, {}
  for name, candidate in IMPLEMENTATIONS.items():
    try:
      fitted = candidate.fitted(call)
    except NotImplementedError as error:
      refusals[name] = str(error)
      continue
    if not candidate.is_worthwhile(call):
      refusals[name] = "not worth it for so small a call"
    elif candidate.platforms is None:
      for platform, doubt in doubts.items():
        _warn_once(doubt, by_platform.get(platform, fitted).name)
      return Choice(fitted, tuple(by_platform.items()), tuple(refusals.items()))
    else:
      for platform in (p for p in candidate.platforms if p not in by_platform):
        doubt = self_check.doubt(candidate, platform)
        if doubt is None:
          by_platform[platform] = fitted
        else:
          doubts[platform] = refusals[name] = doubt
  raise NotImplementedError(f"no implementation can serve this call: {refusals}")


def _named(implementation: str | Implementation | None) -> Implementation | None:
  if implementation is None or dataclasses.is_dataclass(type(implementation)):
    return implementation
  if not isinstance(implementation, str) or implementation not in IMPLEMENTATIONS:
    names = list(IMPLEMENTATIONS)
    raise ValueError(f"{implementation=} is not one of {names}, nor a record of one")
  return IMPLEMENTATIONS[implementation]


@functools.cache
def log_once(message: str) -> None:
  _logger.info(message)


@functools.cache
def _warn_once(doubt: str, instead: str) -> None:
  _logger.warning("%s; %s is used instead. Please run %s", doubt, instead, self_check.COMMAND)


# Once for all implementations: what is kept for the backward pass (the arguments, the output and
# lse) is the same, so that the platform need not be known before compilation.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(choice: Choice, call: Call) -> tuple[jax.Array, jax.Array]:
  return forward(choice, call)


def forward(choice: Choice, call: Call) -> tuple[jax.Array, jax.Array]:
  """The forward pass of what serves a call, by itself: (out_BTNH, lse_BTN)."""
  if choice.is_reference:
    return attention_xla.attention(call)
  lse_BTN = jax.ShapeDtypeStruct(call.q_BTNH.shape[:3], call.dtype)
  return platforms.call(choice, "forward", (call,), (call.q_BTNH, lse_BTN))


def backward(choice: Choice, call: Call, out_BTNH, lse_BTN, dout_BTNH, dlse_BTN) -> Call:
  """The backward pass of what serves a call: a `Call` of gradients, None at what has none."""
  arguments = call, out_BTNH, lse_BTN, dout_BTNH, dlse_BTN
  like = call.q_BTNH, call.k_BSKH, call.v_BSKH, call.bias
  return call.gradient(*platforms.call(choice, "backward", arguments, like))


# The output and lse: what a checkpoint policy may keep of a call, so that the backward pass need
# not attend again (`jax.checkpoint_policies.save_only_these_names`).
CHECKPOINT_NAMES = ("attention_out", "attention_lse")


def _attend_forward(choice, call):
  out_BTNH, lse_BTN = map(checkpoint_name, _attend(choice, call), CHECKPOINT_NAMES)
  return (out_BTNH, lse_BTN), (call, out_BTNH, lse_BTN)


def _attend_backward(choice, kept, cotangents):
  return (backward(choice, *kept, *cotangents),)


_attend.defvjp(_attend_forward, _attend_backward)


def checked_call(
  q_BTNH,
  k_BSKH,
  v_BSKH,
  bias,
  *,
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
  return_lse=False,
) -> Call:
  """What the arguments of `dot_product_attention` ask for; see `seeded` for its dropout."""
  _check_arrays(q_BTNH, k_BSKH, v_BSKH, bias)
  _check_masks(q_BTNH, k_BSKH, q_segment_ids, kv_segment_ids, kv_lengths, q_offset, window)
  scale = _number("scale", q_BTNH.shape[-1] ** -0.5 if scale is None else scale)
  dropout_rate = _number("dropout_rate", dropout_rate)
  _check_dropout(dropout_rate, dropout_key)
  if logits_soft_cap is not None:
    logits_soft_cap = _number("logits_soft_cap", logits_soft_cap)
    if not logits_soft_cap > 0:
      raise ValueError(f"{logits_soft_cap=} must be positive, or None")
  left, right = (None, None) if window is None else window
  if is_causal:
    right = 0  # right >= 0: the causal bound is the closer one.
  is_static = isinstance(q_offset, (int, np.integer))
  return Call(
    q_BTNH=q_BTNH,
    k_BSKH=k_BSKH,
    v_BSKH=v_BSKH,
    bias=bias,
    q_segment_ids=q_segment_ids,
    kv_segment_ids=kv_segment_ids,
    kv_lengths=_clipped(kv_lengths, k_BSKH.shape[1]),
    static_offset=int(q_offset) if is_static else 0,
    traced_offset=None if is_static else jnp.asarray(q_offset, jnp.int32),
    window=(left, right),
    logits_soft_cap=logits_soft_cap,
    scale=scale,
    dropout_rate=dropout_rate,
    return_lse=return_lse,
  )


def _number(name: str, value) -> float:
  """A number that a program is compiled for."""
  try:
    return float(value)
  except jax.errors.ConcretizationTypeError as error:
    message = f"{name} must be known while tracing: a number, not the traced {jax.typeof(value)}"
    raise ValueError(message) from error


def _clipped(kv_lengths, S: int):
  """int32, of any dtype's numbers: one that is larger than all keys says that none is padding."""
  if kv_lengths is None or isinstance(kv_lengths, jax.ShapeDtypeStruct):
    return kv_lengths
  clip = jnp.clip if isinstance(kv_lengths, jax.Array) else np.clip
  return jnp.asarray(clip(kv_lengths, 0, S), jnp.int32)


def _check_arrays(q_BTNH, k_BSKH, v_BSKH, bias):
  """Raises unless queries, keys, values and bias fit together."""
  q, k, v = q_BTNH.shape, k_BSKH.shape, v_BSKH.shape
  if len(q) != 4 or len(k) != 4 or k != v or q[0] != k[0] or q[3] != k[3]:
    raise ValueError(f"queries {q}, keys {k}, values {v} are not [B, T, N, H] and [B, S, K, H]")
  if k[2] == 0 or q[2] % k[2]:
    raise ValueError(f"N={q[2]} query heads must be a multiple of K={k[2]} key/value heads")
  dtypes = [str(x.dtype) for x in (q_BTNH, k_BSKH, v_BSKH)]
  if len(set(dtypes)) > 1 or not jnp.issubdtype(q_BTNH.dtype, jnp.floating):
    raise ValueError(f"queries, keys and values must share one floating dtype, not {dtypes}")
  if isinstance(bias, RelativeBias):
    if len(bias.table.shape) != 2 or bias.table.shape[1] != q[2]:
      raise ValueError(f"{bias.table.shape=} is not [num_buckets, N={q[2]}]")
    check_buckets(bias.table.shape[0], bias.bidirectional, bias.max_distance)
  elif bias is not None:
    full = (q[0], q[2], q[1], k[1])
    if len(bias.shape) != 4 or any(b not in (1, f) for b, f in zip(bias.shape, full, strict=True)):
      raise ValueError(f"{bias.shape=} does not broadcast to [B, N, T, S] = {full}")
    if not jnp.issubdtype(bias.dtype, jnp.floating):
      raise ValueError(f"{bias.dtype=} must be floating; as a mask it holds 0 and -inf")


def _check_masks(q_BTNH, k_BSKH, q_segment_ids, kv_segment_ids, kv_lengths, q_offset, window):
  """Raises unless everything that hides keys fits the queries and keys."""
  (B, T), S = q_BTNH.shape[:2], k_BSKH.shape[1]
  if (q_segment_ids is None) != (kv_segment_ids is None):
    raise ValueError("give both q_segment_ids and kv_segment_ids, or neither")
  for name, array, shape in (
    ("q_segment_ids", q_segment_ids, (B, T)),
    ("kv_segment_ids", kv_segment_ids, (B, S)),
    ("kv_lengths", kv_lengths, (B,)),
    ("q_offset", q_offset, ()),
  ):
    if array is None:
      continue
    if jnp.shape(array) != shape or not jnp.issubdtype(jnp.result_type(array), jnp.integer):
      found = f"{jnp.result_type(array)}{list(jnp.shape(array))}"
      raise ValueError(f"{name} must be integers of shape {list(shape)}, not {found}")
  if window is not None and (
    not isinstance(window, tuple)
    or len(window) != 2
    or not all(side is None or (isinstance(side, int) and side >= 0) for side in window)
  ):
    raise ValueError(f"{window=} is not (left, right), each a distance >= 0 or None")


def _check_dropout(dropout_rate, dropout_key):
  """Raises unless the rate is a probability below 1, with a typed key if it is not 0."""
  if not 0 <= dropout_rate < 1:
    raise ValueError(f"{dropout_rate=} must lie in [0, 1)")
  if dropout_rate > 0:
    if dropout_key is None:
      raise ValueError(f"{dropout_rate=} needs a dropout_key")
    if not jnp.issubdtype(dropout_key.dtype, jax.dtypes.prng_key):
      raise ValueError(f"{dropout_key.dtype=} is not a typed key: make it with jax.random.key")
