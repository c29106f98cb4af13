"""Linen modules in other people's NNX models, without a mesh: the same bits, trained as NNX is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from magneto_jax.interop import to_nnx
from magneto_jax.layers import Attention, FeedForward, KVCache, Residual
from magneto_jax.models.language import CausalLM
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import Architecture
from tests import reference
from tests.foreign import KERNELS, LAYERS, SUBLAYER, X
from tests.models import common


def output(y):
  return y[0] if isinstance(y, tuple) else y


def params_of(module):
  return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def others_of(linen):
  """What a layer keeps beside its parameters, as it is drawn from the seed 0."""
  drawn = linen.init(nnx.Rngs(0).params(), X)
  return {name: tree for name, tree in drawn.items() if name != "params"}


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_computes_what_linen_computes(layer):
  """With its own parameters and with given ones, called as it is and under jit: the same bits."""
  linen = LAYERS[layer]()
  others = others_of(linen)
  given = {**others, "params": reference.random_params(linen, X)}
  for module in (
    to_nnx(linen, X, rngs=nnx.Rngs(0)),
    to_nnx(linen, variables=given, rngs=nnx.Rngs(0)),
  ):
    params = params_of(module)
    apply = lambda params, x: output(linen.apply({**others, "params": params}, x))
    np.testing.assert_array_equal(output(module(X)), apply(params, X))
    compiled = nnx.jit(lambda m, x: output(m(x)))
    np.testing.assert_array_equal(compiled(module, X), jax.jit(apply)(params, X))
  jax.tree.map(np.testing.assert_array_equal, params, given["params"])


@pytest.mark.parametrize("layer", common.main_and_slow(LAYERS, ("Attention", "FeedForward")))
def test_gradients_are_linens(layer):
  linen = LAYERS[layer]()
  others = others_of(linen)
  given = {**others, "params": reference.random_params(linen, X)}
  module = to_nnx(linen, variables=given, rngs=nnx.Rngs(0))
  loss = lambda y: jnp.sum(jnp.square(output(y) + X))
  gradients = nnx.to_pure_dict(nnx.grad(lambda m: loss(m(X)))(module))
  of = lambda params: loss(linen.apply({**others, "params": params}, X))
  expected = jax.grad(of)(params_of(module))
  jax.tree.map(np.testing.assert_array_equal, gradients, expected)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_parameters_are_drawn_from_the_rngs():
  make = lambda **streams: params_of(to_nnx(FeedForward(16), X, rngs=nnx.Rngs(**streams)))
  first = make(params=0, dropout=1)
  jax.tree.map(np.testing.assert_array_equal, first, make(params=0, dropout=2))
  assert np.abs(first["wi"]["kernel"] - make(params=1, dropout=1)["wi"]["kernel"]).max() > 0.1
  shared = nnx.Rngs(0)
  twins = [params_of(to_nnx(FeedForward(16), X, rngs=shared)) for _ in range(2)]
  assert np.abs(twins[0]["wi"]["kernel"] - twins[1]["wi"]["kernel"]).max() > 0.1


@pytest.mark.parametrize(
  "linen", (Attention(2, dropout_rate=0.5), FeedForward(16, dropout_rate=0.5))
)
@pytest.mark.parametrize("streams", ({"params": 0, "dropout": 1}, {"default": 0}))
def test_dropout_draws_from_the_rngs(linen, streams):
  """Each call anew, the same from the same seed, and from the rngs of a call if it has some."""

  def calls():
    module = to_nnx(linen, X, rngs=nnx.Rngs(**streams))
    step = nnx.jit(lambda m: output(m(X, deterministic=False)))
    own = [step(module) for _ in range(2)]
    given = [output(module(X, deterministic=False, rngs=nnx.Rngs(dropout=s))) for s in (2, 3, 2)]
    return *own, *given

  first, second, *given = calls()
  assert np.abs(first - second).max() > 1e-3
  assert np.abs(given[0] - given[1]).max() > 1e-3
  np.testing.assert_array_equal(given[0], given[2])
  jax.tree.map(np.testing.assert_array_equal, (first, second, *given), calls())


def test_decoding_with_a_cache_is_the_whole_at_once():
  module = to_nnx(Attention(2, is_causal=True), X, rngs=nnx.Rngs(0))
  step = nnx.jit(lambda m, x, cache: m(x, cache=cache))
  cache = KVCache.empty(2, 5, 2, 4, dtype=jnp.float32)
  rows = []
  for t in range(X.shape[1]):
    y, cache = step(module, X[:, t : t + 1], cache)
    rows.append(y)
  assert cache.length == X.shape[1]
  np.testing.assert_allclose(np.concatenate(rows, 1), module(X)[0], rtol=0, atol=1e-5)  # float32


class Block(nnx.Module):
  """Somebody's NNX block: our layers and theirs, and our residual rule around both."""

  def __init__(self, x, *, rngs: nnx.Rngs):
    self.attention = to_nnx(Attention(2, dropout_rate=0.1), x, rngs=rngs)
    self.rule = to_nnx(Residual(), x, lambda h: (h, None), SUBLAYER, rngs=rngs)
    self.out = nnx.Linear(8, 8, rngs=rngs)

  def __call__(self, x, deterministic=True):
    def f(h):
      y, cache = self.attention(h, deterministic=deterministic)
      return self.out(y), cache

    return self.rule(x, f, SUBLAYER)[0]


def test_nnx_trains_it_beside_its_own_layers():
  block = Block(X, rngs=nnx.Rngs(0))
  before = params_of(block)
  assert set(before) == {"attention", "rule", "out"}
  optimizer = nnx.Optimizer(block, optax.adam(1e-2), wrt=nnx.Param)

  @nnx.jit
  def step(block, optimizer):
    loss = lambda block: jnp.mean(jnp.square(block(X, deterministic=False) - X[::-1]))
    value, gradients = nnx.value_and_grad(loss)(block)
    optimizer.update(block, gradients)
    return value

  losses = [float(step(block, optimizer)) for _ in range(20)]
  assert losses[-1] < 0.5 * losses[0]
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, params_of(block))
  assert min(jax.tree.leaves(moved)) > 0


def test_layers_are_stacked_and_scanned_by_nnx():
  """Three made under nnx.vmap and run under nnx.scan are the three one after the other."""
  linen = FeedForward(16, dropout_rate=0.5)
  make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: to_nnx(linen, X, rngs=rngs)))
  stacked = make(nnx.Rngs(0))
  run = nnx.scan(lambda m, x: m(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
  expected = X
  for i in range(3):
    params = jax.tree.map(lambda leaf, i=i: leaf[i], params_of(stacked))
    expected = linen.apply({"params": params}, expected)
  np.testing.assert_allclose(run(stacked, X), expected, rtol=0, atol=1e-5)  # float32
  kernels = stacked.wi["kernel"]
  assert np.abs(kernels[0] - kernels[1]).max() > 0.1

  drop = lambda m, x: (x, m(x, deterministic=False))
  _, dropped = nnx.scan(drop, in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0))(stacked, X)
  assert np.abs(dropped[0] - dropped[1]).max() > 1e-3


def test_nnx_rematerialises_it():
  module = to_nnx(FeedForward(16), X, rngs=nnx.Rngs(0))
  call = lambda m, x: jnp.sum(jnp.square(m(x)))
  gradients = [nnx.to_pure_dict(nnx.grad(f)(module, X)) for f in (call, nnx.remat(call))]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)  # float32
  jax.tree.map(close, *gradients)


def test_annotated_kernels_need_no_mesh():
  """Somebody's dense layer may carry names of axes; they are kept, and nothing is sharded."""

  def dense(*args, kernel_init, **kwargs):
    annotated = nn.with_partitioning(kernel_init, (None, "model"))
    return nn.DenseGeneral(*args, kernel_init=annotated, **kwargs)

  linen = FeedForward(16, dense=dense)
  module = to_nnx(linen, X, rngs=nnx.Rngs(0))
  names = module.wi["kernel"].get_metadata()
  # In flax 0.12.0 by an older name.
  assert names.get("out_sharding", names.get("sharding_names")) == (None, "model")
  optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)
  optimizer.update(module, nnx.grad(lambda m: jnp.sum(m(X)))(module))
  np.testing.assert_array_equal(module(X), linen.apply({"params": params_of(module)}, X))


def test_other_collections_come_along():
  class Counter(nn.Module):
    @nn.compact
    def __call__(self, x):
      count = self.variable("batch_stats", "count", lambda: jnp.zeros(()))
      count.value += 1.0
      return nn.Dense(3)(x) * count.value

  module = to_nnx(Counter(), X, rngs=nnx.Rngs(0))
  before = float(module.count[...])
  module(X, mutable=["batch_stats"])
  assert isinstance(module.count, nnx.BatchStat)
  assert float(module.count[...]) == before + 1


@pytest.mark.parametrize("name", ("train", "eval", "sow", "rngs", "module"))
def test_names_that_nnx_takes_are_refused(name):
  class Wrapper(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3, name=name)(x)

  with pytest.raises(ValueError, match=f"attributes of its own named {name}"):
    to_nnx(Wrapper(), X, rngs=nnx.Rngs(0))


def test_example_inputs_and_variables_exclude_each_other():
  variables = FeedForward(16).init(jax.random.key(0), X)
  with pytest.raises(TypeError, match="give one of the two"):
    to_nnx(FeedForward(16), X, variables=variables, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("init", KERNELS)
def test_init_functions_serve_nnx_layers(init):
  layer = nnx.Linear(4, 8, kernel_init=KERNELS[init], rngs=nnx.Rngs(0))
  expected = KERNELS[init](nnx.Rngs(0).params(), (4, 8), jnp.float32)
  np.testing.assert_array_equal(layer.kernel[...], expected)


SLOW_RECIPES = [pytest.param(n, marks=pytest.mark.slow) for n in RECIPES if n != "normformer"]


@pytest.mark.parametrize("name", ["normformer", *SLOW_RECIPES])
def test_model_runs_in_nnx(name):
  recipe = RECIPES[name](Architecture("decoder", 0, 2, 8, 16, 2)).decoder
  model = CausalLM(
    recipe=recipe, vocab_size=11, width=8, num_heads=2, ffn_width=16, dropout_rate=0.1
  )
  tokens = jnp.arange(6).reshape(2, 3)
  module = to_nnx(model, tokens, rngs=nnx.Rngs(0, dropout=1))
  expected = model.apply({"params": params_of(module)}, tokens)
  np.testing.assert_array_equal(module(tokens), expected)
  dropped = module(tokens, deterministic=False, rngs=nnx.Rngs(dropout=2))
  assert np.abs(dropped - expected).max() > 1e-3
