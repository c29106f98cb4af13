"""The feed-forward network."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax import sharding
from magneto_jax.layers.initializers import DenseInit
from magneto_jax.layers.norms import NormFactory


def gelu(x: jax.Array) -> jax.Array:
  """x Phi(x), Phi the normal distribution's; Hendrycks and Gimpel, 2016, arXiv 1606.08415.

  By erf, in float32 or wider, as torch has it. `jax.nn.gelu` takes erfc, which is exact to the last
  digit also where the result is next to nothing; but XLA has one instruction for erf and some forty
  for erfc, which it rather writes to memory, in float32, than computes twice.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": gelu,
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
  "swiglu": jax.nn.silu,
}
GATED = ("swiglu",)


class FeedForward(nn.Module):
  """y = W_o mid_norm(dropout(act(W_i x + b_i))) + b_o.

  With `swiglu`, act(W_i x) is silu(W_g x) * (W_i x) and W_g is drawn as W_i is.

  Attributes:
    ffn_width: F, the width of the hidden layer.
    activation: one of ACTIVATIONS; computed in float32 or wider.
    wi_init: init functions of W_i, b_i (and of the gate).
    wo_init: init functions of W_o, b_o.
    mid_norm: factory `(name=...) -> norm` of the norm before W_o; None for no norm.
    dense: factory of the projections, called as nn.DenseGeneral is.
    dropout_rate: of the hidden layer, before the norm.
    dtype: of the computation; parameters are float32.

  Reference: Foundation Transformers, arXiv 2210.06423, equations 3-4 (with the norm);
  GLU Variants Improve Transformer, arXiv 2002.05202 (swiglu).
  """

  ffn_width: int
  activation: str = "gelu"
  wi_init: DenseInit = DenseInit()
  wo_init: DenseInit = DenseInit()
  mid_norm: NormFactory | None = None
  dense: Callable[..., nn.Module] = nn.DenseGeneral
  use_bias: bool = True
  dropout_rate: float = 0.0
  dtype: jnp.dtype | None = None

  @nn.compact
  def __call__(self, x_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
    """Maps [B, T, D] to [B, T, D]; `deterministic=False` needs an rng named `dropout`."""
    if self.activation not in ACTIVATIONS:
      raise ValueError(f"{self.activation=} must be one of {', '.join(ACTIVATIONS)}")

    def dense(x, features, init, name):
      project = self.dense(
        features,
        use_bias=self.use_bias,
        kernel_init=init.kernel,
        bias_init=init.bias(x.shape[-1]),
        dtype=self.dtype,
        name=name,
      )
      return project(x)

    act = ACTIVATIONS[self.activation]
    wide = jnp.promote_types(self.dtype or x_BTD.dtype, jnp.float32)
    h_BTF = dense(x_BTD, self.ffn_width, self.wi_init, "wi")
    if self.activation in GATED:
      gate_BTF = dense(x_BTD, self.ffn_width, self.wi_init, "wi_gate")
      h_BTF = act(gate_BTF.astype(wide)).astype(h_BTF.dtype) * h_BTF
    else:
      h_BTF = act(h_BTF.astype(wide)).astype(h_BTF.dtype)
    h_BTF = sharding.constrain(h_BTF, "batch", "length", "ffn")
    h_BTF = nn.Dropout(self.dropout_rate)(h_BTF, deterministic=deterministic)
    if self.mid_norm is not None:
      h_BTF = self.mid_norm(name="mid_norm")(h_BTF)
    return dense(h_BTF, x_BTD.shape[-1], self.wo_init, "wo")
