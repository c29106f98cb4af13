"""Every public layer inside code that has never heard of this library: Linen's lifts, and NNX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

from magneto_jax.layers.attention import Attention
from magneto_jax.layers.feed_forward import FeedForward
from magneto_jax.layers.norms import norm_factory
from magneto_jax.layers.positions import rotate_both
from magneto_jax.layers.residual import Residual
from magneto_jax.models.language import CausalLM
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import Architecture, Scale, Sublayer
from tests import reference

X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
SUBLAYER = Sublayer(frozenset({"in", "out", "post"}), skip=Scale(1.0, "vector"))


class Wrapped(nn.Module):
  """Somebody's residual block."""

  @nn.compact
  def __call__(self, x):
    ffn = FeedForward(16, name="ffn")
    return Residual(name="rule")(x, lambda h: (ffn(h), None), SUBLAYER)[0]


LAYERS = {
  "attention": functools.partial(
    Attention,
    2,
    head_scale="pre_out_proj",
    mid_norm=norm_factory("layer_norm"),
    rotation=rotate_both,
  ),
  "feed_forward": functools.partial(FeedForward, 16, "swiglu", mid_norm=norm_factory("rms_norm")),
  "residual": Wrapped,
  "norm": norm_factory("layer_norm"),
}


class Foreign(nn.Module):
  """Somebody's model: one of the layers, and a layer of its own."""

  layer: str

  @nn.compact
  def __call__(self, x):
    y = LAYERS[self.layer](name="layer")(x)
    return nn.Dense(x.shape[-1])(y[0] if isinstance(y, tuple) else y)


class ScanBody(nn.Module):
  layer: str

  @nn.compact
  def __call__(self, x, _):
    return Foreign(self.layer, name="foreign")(x), None


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_runs_in_a_foreign_module(layer):
  module = Foreign(layer)
  variables = module.init(jax.random.key(0), X)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))
  assert module.apply(variables, X).shape == X.shape


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_runs_in_a_foreign_scan(layer):
  """Three repeats under somebody's nn.scan are the layer three times, float32."""
  lift = functools.partial(nn.scan, variable_axes={"params": 0}, split_rngs={"params": True})
  module = lift(ScanBody, length=3)(layer)
  variables = module.init(jax.random.key(0), X, None)
  y, _ = module.apply(variables, X, None)
  expected = X
  for repeat in range(3):
    params = jax.tree.map(lambda leaf, i=repeat: leaf[i], variables["params"]["foreign"])
    expected = Foreign(layer).apply({"params": params}, expected)
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_runs_in_a_foreign_vmap(layer):
  """An ensemble of two under somebody's nn.vmap, float32."""
  module = nn.vmap(
    Foreign, in_axes=None, axis_size=2, variable_axes={"params": 0}, split_rngs={"params": True}
  )(layer)
  variables = module.init(jax.random.key(0), X)
  y = module.apply(variables, X)
  for member in range(2):
    params = jax.tree.map(lambda leaf, i=member: leaf[i], variables)
    expected = Foreign(layer).apply(params, X)
    np.testing.assert_allclose(y[member], expected, rtol=0, atol=1e-5)
  assert np.abs(y[0] - y[1]).max() > 0.01


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_runs_in_a_foreign_remat(layer):
  plain, remat = Foreign(layer), nn.remat(Foreign)(layer)
  params = reference.random_params(plain, X)
  gradients = [
    jax.jit(jax.grad(lambda p, m=module: m.apply({"params": p}, X).sum()))(params)
    for module in (plain, remat)
  ]
  # float32, of sums of 48 numbers.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  jax.tree.map(close, *gradients)


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_runs_through_the_nnx_bridge(layer):
  module = bridge.ToNNX(Foreign(layer), rngs=nnx.Rngs(0))
  bridge.lazy_init(module, X)
  y = module(X)
  params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
  expected = Foreign(layer).apply({"params": params}, X)
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)  # float32


@pytest.mark.parametrize("make_key", (jax.random.key, jax.random.PRNGKey))
def test_dropout_takes_the_keys_that_linen_takes(make_key):
  """Typed ones and raw ones alike, under somebody's nn.scan; each repeat drops otherwise."""

  class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      y, _ = Attention(2, dropout_rate=0.5, name="attention")(x, deterministic=False)
      return x, y

  splits = {"params": False, "dropout": True}
  module = nn.scan(Body, variable_broadcast="params", split_rngs=splits, length=2)()
  rngs = {"params": make_key(0), "dropout": make_key(1)}
  variables = module.init(rngs, X, None)
  apply = lambda seed: module.apply(variables, X, None, rngs={"dropout": make_key(seed)})[1]
  first, second = apply(2)
  assert np.abs(first - second).max() > 1e-3
  np.testing.assert_array_equal(apply(2), apply(2))
  assert np.abs(apply(2) - apply(3)).max() > 1e-3


SLOW_RECIPES = [pytest.param(n, marks=pytest.mark.slow) for n in RECIPES if n != "normformer"]


@pytest.mark.parametrize("name", ["normformer", *SLOW_RECIPES])
def test_model_runs_through_the_nnx_bridge(name):
  recipe = RECIPES[name](Architecture("decoder", 0, 2, 8, 16, 2)).decoder
  model = CausalLM(
    recipe=recipe, vocab_size=11, width=8, num_heads=2, ffn_width=16, dropout_rate=0.1
  )
  tokens = jnp.arange(6).reshape(2, 3)
  module = bridge.ToNNX(model, rngs=nnx.Rngs(0, dropout=1))
  bridge.lazy_init(module, tokens)
  params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
  expected = model.apply({"params": params}, tokens)
  np.testing.assert_allclose(module(tokens), expected, rtol=0, atol=1e-5)  # float32
  dropped = module(tokens, deterministic=False, rngs=nnx.Rngs(dropout=2))
  assert np.abs(dropped - expected).max() > 1e-3
