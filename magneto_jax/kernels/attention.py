"""Scaled dot-product attention: one signature, checked once, over a table of implementations.

Letters: B batch, T query length, S key and value length, N heads, K key/value heads, H head dim.
"""

import jax
import jax.numpy as jnp

from magneto_jax.kernels import attention_xla
from magneto_jax.kernels.attention_xla import RelativeBias

# Tried in this order; the first that does not raise NotImplementedError serves the call. Each
# takes checked arguments, causality folded into the window, and returns (out_BTNH, lse_BTN).
IMPLEMENTATIONS = {
  "xla": attention_xla.attention,
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
  implementation: str | None = None,
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
      pair; or a `RelativeBias`, which reads positions (and so `q_offset`) itself.
    q_segment_ids: [B, T] integers; a query sees the keys of its own segment. Give both or none.
    kv_segment_ids: [B, S] integers.
    kv_lengths: [B] integers; keys from here on are padding, seen by nobody.
    is_causal: hides the keys s > t'.
    q_offset: the position of the first query, an integer or a traced scalar: the number of keys
      cached before it. At 0 the causal mask is aligned top left, also when T != S.
    window: (left, right), hides the keys outside [t' - left, t' + right]; None on a side for no
      bound. Together with `is_causal` both hold.
    logits_soft_cap: c, positive; applied before the bias, so that it cannot soften a -inf.
    scale: of the logits; H^-1/2 by default.
    dropout_rate: in [0, 1), the fraction of P to drop; the rest is divided by 1 - rate.
    dropout_key: a typed key, needed when the rate is not 0. What is dropped is a function of
      the key and the shapes alone.
    return_lse: whether to return lse too. It is taken before dropout.
    implementation: a name in the table of implementations, or None for the first that can
      serve the call.

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
  if scale is None:
    scale = q_BTNH.shape[-1] ** -0.5
  _check_arrays(q_BTNH, k_BSKH, v_BSKH, bias)
  _check_masks(q_BTNH, k_BSKH, q_segment_ids, kv_segment_ids, kv_lengths, q_offset, window)
  _check_dropout(dropout_rate, dropout_key)
  if logits_soft_cap is not None and not logits_soft_cap > 0:
    raise ValueError(f"{logits_soft_cap=} must be positive, or None")
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    raise ValueError(f"{implementation=} is not one of {list(IMPLEMENTATIONS)}")

  left, right = (None, None) if window is None else window
  reasons = {}
  for name in IMPLEMENTATIONS if implementation is None else [implementation]:
    try:
      out_BTNH, lse_BTN = IMPLEMENTATIONS[name](
        q_BTNH,
        k_BSKH,
        v_BSKH,
        bias,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        kv_lengths=kv_lengths,
        window=(left, 0 if is_causal else right),
        q_offset=q_offset,
        logits_soft_cap=logits_soft_cap,
        scale=scale,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
      )
    except NotImplementedError as error:
      reasons[name] = str(error)
    else:
      return (out_BTNH, lse_BTN) if return_lse else out_BTNH
  raise NotImplementedError(f"no implementation of attention can serve this call: {reasons}")


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
    or any(side is not None and side < 0 for side in window)
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
