"""Vectors as one of a few codes, and the codes that follow the vectors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax.layers.initializers import lecun_normal

# Of k-means, by which codes start.
_K_MEANS_STEPS = 10
# So small a square of a length counts as none.
_TINY = 1e-24


class Quantized(NamedTuple):
  """What is left of vectors [..., D].

  Attributes:
    codes: [..., H], the nearest codes; their gradient goes to the vectors as if nothing had been
      rounded.
    tokens: [...], int32, which codes these are.
    commitment: [...], mean over H of the square of what was rounded away, a loss of the vectors.
  """

  codes: jax.Array
  tokens: jax.Array
  commitment: jax.Array


class VectorQuantizer(nn.Module):
  """The code nearest to z = l2(W_2 tanh(W_1 x + b_1) + b_2), of K unit vectors e_k.

    token = argmax_k z . e_k          commitment = mean_h (sg(e_token) - z)^2
    codes = z + sg(e_token - z)       l2(v) = v / |v|

  No gradient reaches the codes, which the variables of the collection `state` hold. Where a call
  may change that (`mutable=["state"]`), it moves each code towards the vectors that chose it,

    e_k <- l2(d e_k + (1 - d) l2(sum of z with token k)),

  all codes that were not chosen staying; the sum is over the whole batch, of all devices. Before
  the first such call the codes are random. It starts with k-means by the cosine on its own vectors:
  from K of them, in 10 steps.

  A code that nothing is near stays unused for ever. With `redraw_below` = r > 0 a code whose share
  of the vectors, on average over calls (with the decay d), is below r / K becomes one of the
  batch's vectors, drawn at random, and has the share 1 / K again.

  Attributes:
    codes: K.
    width: H, of a code.
    decay: d.
    redraw_below: r.
    dtype: of the computation of W_1; parameters, z and the codes are float32 or wider.

  Reference: BEiT v2, arXiv 2208.06366, section 2.1, and its released code; VQ-VAE, arXiv
  1711.00937. Codes that are drawn anew: Jukebox, arXiv 2005.00341, section 3.1.
  Differs: the paper's formula has the sum over h in the commitment; the released code, as here, the
  mean. Neither draws codes anew, and r = 0 by default.

  Example:
    >>> quantizer = VectorQuantizer(codes=8192)
    >>> variables = quantizer.init(key, x_BPD)
    >>> tokens_BP = quantizer.apply(variables, x_BPD).tokens
    >>> found, changed = quantizer.apply(
    ...   variables, x_BPD, mutable=["state"], rngs={"dropout": another_key}
    ... )
    >>> variables = variables | changed
  """

  codes: int
  width: int = 32
  decay: float = 0.99
  redraw_below: float = 0.0
  dtype: jnp.dtype | None = None

  def setup(self):
    if self.codes < 1 or self.width < 1:
      raise ValueError(f"codes={self.codes} of width={self.width} must be at least 1 each")

    def draw():
      return l2(jax.random.normal(self.make_rng("params"), (self.codes, self.width)))

    self.codes_KH = self.variable("state", "codes", draw)
    self.usage_K = self.variable("state", "usage", jnp.zeros, (self.codes,))
    self.started = self.variable("state", "started", jnp.zeros, (), bool)

  @nn.compact
  def __call__(self, x: jax.Array) -> Quantized:
    """Quantizes vectors [..., D]; a call that changes the codes needs an rng named `dropout`."""
    x = jnp.asarray(x)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    dense = lambda width, dtype, name: nn.Dense(
      width, kernel_init=lecun_normal(), dtype=dtype, name=name
    )
    hidden = jnp.tanh(dense(x.shape[-1], self.dtype, "hidden")(x))
    z = l2(dense(self.width, wide, "projection")(hidden.astype(wide)))
    fixed = jax.lax.stop_gradient(z)
    moves = self.is_mutable_collection("state") and not self.is_initializing()
    if moves:
      self._start(fixed)
    codes_KH = self.codes_KH.value.astype(wide)
    tokens = nearest(fixed, codes_KH)
    chosen = jax.lax.stop_gradient(codes_KH[tokens])
    if moves:
      self._follow(fixed, tokens)
    commitment = jnp.mean(jnp.square(chosen - z), axis=-1)
    return Quantized(z + (chosen - fixed), tokens, commitment)

  def look_up(self, tokens: jax.Array) -> jax.Array:
    """The codes [..., H] of tokens [...]."""
    return self.codes_KH.value[tokens]

  def _start(self, z: jax.Array) -> None:
    """Codes, and how often each is chosen, by k-means, if this is the first call."""
    key = self.make_rng("dropout")

    def first(*_):
      codes_KH = k_means(z, _some(key, z, self.codes))
      return codes_KH, centres(z, nearest(z, codes_KH), codes_KH)[1]

    self._set(*jax.lax.cond(self.started.value, lambda *old: old, first, *self._held(z.dtype)))
    self.started.value = jnp.array(True)

  def _follow(self, z: jax.Array, tokens: jax.Array) -> None:
    """Codes, and how often each is chosen, after a call."""
    codes_KH, usage_K = self._held(z.dtype)
    centres_KH, shares_K = centres(z, tokens, codes_KH)
    codes_KH = l2(self.decay * codes_KH + (1 - self.decay) * centres_KH)
    usage_K = self.decay * usage_K + (1 - self.decay) * shares_K
    if self.redraw_below:
      dead_K = usage_K < self.redraw_below / self.codes
      drawn_KH = _some(self.make_rng("dropout"), z, self.codes)
      codes_KH = jnp.where(dead_K[:, None], drawn_KH, codes_KH)
      usage_K = jnp.where(dead_K, 1 / self.codes, usage_K)
    self._set(codes_KH, usage_K)

  def _held(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    return self.codes_KH.value.astype(dtype), self.usage_K.value.astype(dtype)

  def _set(self, codes_KH: jax.Array, usage_K: jax.Array) -> None:
    for held, new in ((self.codes_KH, codes_KH), (self.usage_K, usage_K)):
      held.value = new.astype(held.value.dtype)


# ---------------------------------------------------------------------------------------------
# Codes
# ---------------------------------------------------------------------------------------------


def l2(x: jax.Array) -> jax.Array:
  """x / |x| over the last axis; 0 of 0."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), _TINY))


def nearest(z: jax.Array, codes_KH: jax.Array) -> jax.Array:
  """Which code has the largest product with each of z [..., H]: the nearest, if all are units."""
  # In full precision: else a TPU would round both to bfloat16 first.
  products = jnp.einsum("...h,kh->...k", z, codes_KH, precision="highest")
  return jnp.argmax(products, axis=-1).astype(jnp.int32)


def centres(z: jax.Array, tokens: jax.Array, codes_KH: jax.Array) -> tuple[jax.Array, jax.Array]:
  """[K, H]: the directions of the sums of z by token, or the codes of tokens that nothing has.

  And [K], the share of z that has each token. By a product: what is scattered would be added up in
  another order each time.
  """
  chosen_NK = jax.nn.one_hot(tokens.reshape(-1), len(codes_KH), dtype=z.dtype)
  z_NH = z.reshape(-1, z.shape[-1])
  sums_KH = jnp.einsum("nk,nh->kh", chosen_NK, z_NH, precision="highest")
  shares_K = jnp.mean(chosen_NK, axis=0)
  return jnp.where(shares_K[:, None] > 0, l2(sums_KH), codes_KH), shares_K


def k_means(z: jax.Array, codes_KH: jax.Array) -> jax.Array:
  """Codes [K, H] after ten steps of k-means by the cosine on z [..., H]."""
  step = lambda _, codes_KH: centres(z, nearest(z, codes_KH), codes_KH)[0]
  return jax.lax.fori_loop(0, _K_MEANS_STEPS, step, codes_KH)


def _some(key: jax.Array, z: jax.Array, count: int) -> jax.Array:
  """[count, H], so many of z [..., H] at random, all different if there are as many."""
  z_NH = z.reshape(-1, z.shape[-1])
  return z_NH[jax.random.choice(key, len(z_NH), (count,), replace=len(z_NH) < count)]
