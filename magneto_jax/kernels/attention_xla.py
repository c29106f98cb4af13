"""The reference attention, in plain jax.numpy: it defines what every other kernel must compute.

Letters: B batch, T query length, S key and value length, N heads, K key/value heads,
G = N / K heads a key/value head, H head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from magneto_jax.kernels import dropout
from magneto_jax.kernels.bias import RelativeBias
from magneto_jax.kernels.call import Call


@dataclasses.dataclass(frozen=True)
class Xla:
  """The implementation `xla`: serves every call on every platform; its memory is that of T x S.

  JAX differentiates it, in forward mode and repeatedly as well, which the others do not offer.
  """

  name = "xla"
  platforms = None

  def fitted(self, call: Call) -> "Xla":
    """Itself: it refuses nothing."""
    return self

  def is_worthwhile(self, call: Call) -> bool:
    """Always."""
    return True


def attention(call: Call) -> tuple[jax.Array, jax.Array]:
  """Returns (out_BTNH, lse_BTN); see `dot_product_attention`."""
  B, T, S, N, K, H = call.sizes
  dtype = call.dtype
  lowest = jnp.finfo(dtype).min

  # Heads first: on CPU both products and the softmax then run over contiguous rows. The R = G T
  # queries of a key/value head are the rows of one product: nothing is repeated, and a fifth
  # dimension would cost XLA:CPU copies (34 against 18 MiB at B8 T256 N4 H64, and 1.2x the time).
  q_BKRH = call.q_BTNH.swapaxes(1, 2).reshape(B, K, N // K * T, H)
  k_BKSH, v_BKSH = call.k_BSKH.swapaxes(1, 2), call.v_BSKH.swapaxes(1, 2)
  logits_BKRS = jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, k_BKSH, preferred_element_type=dtype)
  logits_BNTS = logits_BKRS.reshape(B, N, T, S) * call.scale
  if call.logits_soft_cap is not None:
    logits_BNTS = call.logits_soft_cap * jnp.tanh(logits_BNTS / call.logits_soft_cap)
  bias = call.bias
  if isinstance(bias, RelativeBias):
    bias = bias.materialize(T, S, call.q_offset)
  if bias is not None:
    logits_BNTS += bias.astype(dtype)
  if not call.hides_nothing:
    logits_BNTS = jnp.where(call.visible(jnp.arange(T), jnp.arange(S)), logits_BNTS, -jnp.inf)

  # The maximum is bounded from below, so a row without keys has weights exp(-inf) = 0, not NaN.
  # It is a constant to the gradient: the result does not depend on it.
  max_BNT1 = jnp.max(jax.lax.stop_gradient(logits_BNTS), axis=-1, keepdims=True, initial=lowest)
  weights_BNTS = jnp.exp(logits_BNTS - max_BNT1)
  sum_BNT1 = jnp.sum(weights_BNTS, axis=-1, keepdims=True)
  empty_BNT1 = sum_BNT1 == 0
  sum_BNT1 = jnp.where(empty_BNT1, 1, sum_BNT1)
  lse_BNT1 = jnp.where(empty_BNT1, lowest, max_BNT1 + jnp.log(sum_BNT1))
  if call.dropout_rate > 0:
    q_seeds, kv_seeds = (x[:, :, None, None] for x in (call.q_seeds, call.kv_seeds))
    of_queries = dropout.of_queries(q_seeds, jnp.arange(T)[None, None, :, None])
    of_keys = dropout.of_keys(kv_seeds, jnp.arange(S)[None, None, None, :])
    kept_BNTS = dropout.kept(dropout.bits(of_queries, of_keys), call.dropout_rate)
    weights_BNTS = jnp.where(kept_BNTS, weights_BNTS / (1 - call.dropout_rate), 0)

  # Divided by the sum after the product: H numbers a row instead of S, and the backward pass
  # needs only the weights and the output.
  weights_BKRS = weights_BNTS.astype(v_BKSH.dtype).reshape(B, K, N // K * T, S)
  out_BKRH = jnp.einsum("BKRS,BKSH->BKRH", weights_BKRS, v_BKSH, preferred_element_type=dtype)
  out_BNTH = (out_BKRH.reshape(B, N, T, H) / sum_BNT1).astype(call.q_BTNH.dtype)
  return out_BNTH.swapaxes(1, 2), lse_BNT1[..., 0].swapaxes(1, 2)
