"""The feed-forward network: each activation's formula, the inner norm, dropout, precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.layers.feed_forward import ACTIVATIONS, FeedForward
from magneto_jax.layers.norms import norm_factory
from tests import reference

X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
FFN = 16


def silu(x):
  return x / (1 + np.exp(-x))


def gelu_tanh(x):
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# The hidden layer from W_i x + b_i and W_g x + b_g.
FORMULAE = {
  "gelu": lambda h, g: reference.gelu(h),
  "gelu_tanh": lambda h, g: gelu_tanh(h),
  "relu": lambda h, g: np.maximum(h, 0),
  "silu": lambda h, g: silu(h),
  "relu_squared": lambda h, g: np.maximum(h, 0) ** 2,
  "swiglu": lambda h, g: silu(g) * h,
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gelu_of_sixteen_bits_is_rounded_once(dtype):
  """Also where 1 + erf nearly cancels: float32 leaves a thousandth of the result there."""
  x = jnp.linspace(-4, 4, 801).astype(dtype)
  expected = reference.gelu(np.asarray(x, np.float64))
  eps = float(jnp.finfo(dtype).eps)
  y = np.asarray(ACTIVATIONS["gelu"](x), np.float64)
  np.testing.assert_allclose(y, expected, rtol=eps + 2e-3, atol=1e-7)


@pytest.mark.parametrize("mid_norm", (None, "layer_norm", "rms_norm"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_network_is_its_formula(activation, mid_norm):
  """float64: 1e-12, so that the erf and the tanh form of gelu are told apart (by 5e-4)."""
  norm = mid_norm and norm_factory(mid_norm, dtype=jnp.float64)
  with jax.enable_x64(True):
    layer = FeedForward(FFN, activation, mid_norm=norm, dtype=jnp.float64)
    params = reference.random_params(layer, X, dtype=np.float64)
    y = layer.apply({"params": params}, X.astype(np.float64))
  x = X.astype(np.float64)
  gate = reference.dense(params["wi_gate"], x) if activation == "swiglu" else None
  hidden = FORMULAE[activation](reference.dense(params["wi"], x), gate)
  if mid_norm:
    hidden = getattr(reference, mid_norm)(params["mid_norm"], hidden)
  expected = reference.dense(params["wo"], hidden)
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)


def test_inner_norm_comes_after_dropout():
  """As in torchscale: the norm sees what dropout left, and so keeps unit variance in training."""
  layer = FeedForward(FFN, "relu", mid_norm=norm_factory("layer_norm"), dropout_rate=0.5)
  params = reference.random_params(layer, X)
  params["mid_norm"] = {"scale": np.ones(FFN, np.float32), "bias": np.zeros(FFN, np.float32)}
  # W_o picks out the hidden layer's first channels.
  params["wo"] = {"kernel": np.eye(FFN, 8, dtype=np.float32), "bias": np.zeros(8, np.float32)}
  rngs = {"dropout": jax.random.key(0)}
  _, state = layer.apply(
    {"params": params}, X, deterministic=False, rngs=rngs, capture_intermediates=True
  )
  normed = state["intermediates"]["mid_norm"]["__call__"][0]
  np.testing.assert_allclose(normed.mean(-1), 0, atol=1e-6)
  np.testing.assert_allclose(normed.var(-1), 1, atol=1e-3)


def test_dropout_has_the_right_expectation():
  """4096 draws: the mean is off by about 1 / 64 of a draw's deviation; 6 of those are allowed."""
  layer = FeedForward(FFN, dropout_rate=0.5)
  params = reference.random_params(layer, X)
  draw = lambda key: layer.apply({"params": params}, X, deterministic=False, rngs={"dropout": key})
  draws = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4096))
  plain = layer.apply({"params": params}, X)
  assert np.all(np.abs(draws.mean(0) - plain) <= 6 / 64 * draws.std(0))
  assert np.all(draws.std(0) > 0.1)


def test_bfloat16_activation_is_computed_in_float32():
  layer = FeedForward(FFN, "gelu", dtype=jnp.bfloat16)
  params = reference.random_params(layer, X)
  y = layer.apply({"params": params}, X.astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  program = str(
    jax.make_jaxpr(lambda x: layer.apply({"params": params}, x))(X.astype(jnp.bfloat16))
  )
  (line,) = [line for line in program.splitlines() if " erf" in line]
  assert ":f32[" in line
  hidden = reference.gelu(reference.dense(params["wi"], X))
  expected = reference.dense(params["wo"], hidden)
  # Of bfloat16's 2^-8 a rounding: the input, two kernels, the hidden layer, the result.
  np.testing.assert_allclose(y.astype(np.float32), expected, rtol=0, atol=0.05)


def test_unknown_activation_raises():
  with pytest.raises(ValueError, match="activation='swish' must be one of gelu, gelu_tanh, relu"):
    jax.eval_shape(FeedForward(FFN, "swish").init, jax.random.key(0), X)
