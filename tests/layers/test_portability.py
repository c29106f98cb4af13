"""Every public layer and init function in code that has never heard of them, under Linen's lifts.

In NNX: see tests/test_interop.py.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from magneto_jax import initializers, layers
from magneto_jax.layers.attention import Attention
from tests.foreign import BIASES, KERNELS, LAYERS, Foreign, X

# One weight an output, so that no gradient is zero by a norm's symmetry.
WEIGHTS = np.random.default_rng(1).standard_normal(X.shape).astype(np.float32)
STACKED = {"variable_axes": {"params": 0, "state": 0}, "split_rngs": {"params": True}}


class ScanBody(nn.Module):
  layer: str

  @nn.compact
  def __call__(self, x, _):
    return Foreign(self.layer, name="foreign")(x), None


def member(variables, i):
  return jax.tree.map(lambda leaf: leaf[i], variables)


def plain(layer, variables, x):
  return Foreign(layer).apply(variables, x)


def scanned(layer):
  """Two repeats, and the layer twice."""
  module = nn.scan(ScanBody, length=2, **STACKED)(layer)

  def loop(variables):
    inner = {name: tree["foreign"] for name, tree in variables.items()}
    step = lambda x, i: plain(layer, member(inner, i), x)
    return functools.reduce(step, range(2), X)

  return module, lambda variables: module.apply(variables, X, None)[0], loop


def mapped(layer):
  """An ensemble of two, and the two one by one."""
  module = nn.vmap(Foreign, in_axes=None, axis_size=2, **STACKED)(layer)
  one_by_one = lambda variables: jnp.stack(
    [plain(layer, member(variables, i), X) for i in range(2)]
  )
  return module, lambda variables: module.apply(variables, X), one_by_one


def rematerialised(layer):
  module = nn.remat(Foreign)(layer)
  return module, lambda variables: module.apply(variables, X), lambda v: plain(layer, v, X)


LIFTS = {"scan": scanned, "vmap": mapped, "remat": rematerialised}


def test_every_public_layer_and_init_function_has_an_entry():
  """One that is added without it would be offered to others untried."""
  is_layer = lambda value: inspect.isclass(value) and issubclass(value, nn.Module)
  public = {name for name in layers.__all__ if is_layer(getattr(layers, name))}
  assert public == set(LAYERS) - {"norm_factory"}
  functions = inspect.getmembers(initializers, inspect.isfunction)
  own = {name for name, f in functions if f.__module__ == initializers.__name__}
  assert {name for name in own if not name.startswith("_")} == set(KERNELS | BIASES)


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_runs_in_a_foreign_module(layer):
  """With arrays as parameters, in no boxes with names of axes: those break in others' lifts."""
  module = Foreign(layer)
  variables = module.init(jax.random.key(0), X)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))
  assert jax.tree.structure(variables) == jax.tree.structure(nn.unbox(variables))
  assert module.apply(variables, X).shape == X.shape


@pytest.mark.parametrize(
  ("lift", "layer"),
  [
    pytest.param(lift, layer, marks=[pytest.mark.slow] * (lift != "scan" and layer != "Attention"))
    for lift in LIFTS
    for layer in LAYERS
  ],
)
def test_layer_under_a_foreign_lift_is_the_layer(lift, layer):
  """Its output and the gradient of every parameter, float32, of sums of at most 96 numbers."""
  module, lifted, unlifted = LIFTS[lift](layer)
  inputs = (X, None) if lift == "scan" else (X,)
  variables = jax.jit(module.init)(jax.random.key(0), *inputs)

  def run(apply):
    def loss(params):
      y = apply({**variables, "params": params})
      return jnp.sum(y * np.broadcast_to(WEIGHTS, y.shape)), y

    gradients, y = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    return y, gradients

  (y, gradients), (expected, expected_gradients) = run(lifted), run(unlifted)
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  jax.tree.map(close, gradients, expected_gradients)


class Drawn(nn.Module):
  """Somebody's module with a dense layer for each init function."""

  @nn.compact
  def __call__(self, x, _):
    for name, init in KERNELS.items():
      x = nn.Dense(64, kernel_init=init, name=name)(x)
    for name, init in BIASES.items():
      x = nn.Dense(64, bias_init=init, name=name)(x)
    return x, None


DRAWN = {
  "plain": Drawn,
  "scan": nn.scan(Drawn, length=2, **STACKED),
  "vmap": nn.vmap(Drawn, in_axes=None, axis_size=2, **STACKED),
  "remat": nn.remat(Drawn),
}


@pytest.mark.parametrize("lift", DRAWN)
def test_init_functions_serve_a_foreign_module(lift):
  """Stacked ones are drawn apart, each with the deviation of one by itself.

  Of 4,096 draws of a kernel it is off by 1 %, of 64 of a bias by 6 %.
  """
  params = jax.jit(DRAWN[lift]().init)(jax.random.key(0), np.zeros((1, 64), np.float32), None)
  for name, init in (KERNELS | BIASES).items():
    leaf, shape, rtol = ("kernel", (64, 64), 0.06) if name in KERNELS else ("bias", (64,), 0.35)
    drawn = np.asarray(params["params"][name][leaf]).reshape(-1, *shape)
    assert len(drawn) == (2 if lift in ("scan", "vmap") else 1)
    single = np.asarray(init(jax.random.key(1), shape)).std()
    np.testing.assert_allclose([each.std() for each in drawn], single, rtol=rtol, err_msg=name)
    if single:
      assert len(np.unique(drawn[:, 0])) == drawn[:, 0].size, name


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
