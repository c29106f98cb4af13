"""The residual rule, over every set of norm sites and every kind of scale."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.layers.norms import norm_factory
from magneto_jax.layers.residual import Residual, drop_path
from magneto_jax.theory.records import SITES, Scale, Sublayer
from tests import reference

D = 8
X = np.random.default_rng(0).standard_normal((2, 3, D)).astype(np.float32)
SITE_SETS = [frozenset(s) for n in range(len(SITES) + 1) for s in itertools.combinations(SITES, n)]
SCALES = ("skip", "branch", "in_scale")


def f(h):
  """A sublayer that is linear in no part, so that a scale inside it is not one outside."""
  return jnp.tanh(h) + 0.1 * h[..., ::-1], None


def rule(p, x, sublayer, norm=reference.layer_norm):
  """x <- post(skip x + branch out(f(in_scale in(x)))), literally."""
  at = lambda site, x: norm(p[f"{site}_norm"], x) if site in sublayer.norms else x
  skip, branch, in_scale = (
    p[name] if getattr(sublayer, name).learned else getattr(sublayer, name).value for name in SCALES
  )
  h = in_scale * at("in", x)
  y = at("out", np.tanh(h) + 0.1 * h[..., ::-1])
  return at("post", skip * x + branch * y)


def run(sublayer, x=X, *, dtype=None, params=None, **options):
  module = Residual(norm_factory("layer_norm", dtype=dtype), **options)
  apply = lambda params: module.apply({"params": params}, x, f, sublayer)[0]
  return np.asarray(jax.jit(apply)(params))


def params_of(sublayer, **options):
  return reference.random_params(Residual(), X, f=f, sublayer=sublayer, **options)


@pytest.mark.parametrize("sites", SITE_SETS, ids=lambda sites: "+".join(sorted(sites)) or "none")
def test_rule_is_its_equation_at_every_set_of_sites(sites):
  """float64: 1e-13. The site mid is inside f and not the rule's."""
  sublayer = Sublayer(sites, skip=Scale(1.5), branch=Scale(0.7), in_scale=Scale(0.4))
  with jax.enable_x64(True):
    params = params_of(sublayer, dtype=np.float64)
    assert set(params) == {f"{site}_norm" for site in sites - {"mid"}}
    y = run(sublayer, X.astype(np.float64), dtype=jnp.float64, params=params)
  np.testing.assert_allclose(y, rule(params, np.float64(X), sublayer), rtol=0, atol=1e-13)


@pytest.mark.parametrize("learned", ("scalar", "vector"))
@pytest.mark.parametrize("name", SCALES)
def test_learned_scales_stand_where_fixed_ones_do(name, learned):
  sublayer = Sublayer(frozenset({"in", "post"}), **{name: Scale(0.3, learned)})
  with jax.enable_x64(True):
    params = params_of(sublayer, dtype=np.float64)
    assert params[name].shape == (() if learned == "scalar" else (D,))
    y = run(sublayer, X.astype(np.float64), dtype=jnp.float64, params=params)
  np.testing.assert_allclose(y, rule(params, np.float64(X), sublayer), rtol=0, atol=1e-13)


@pytest.mark.parametrize("learned", ("scalar", "vector"))
@pytest.mark.parametrize("name", SCALES)
def test_learned_scales_start_at_their_value(name, learned):
  """Also at a traced one, as LayerScale's 1e-5 may be swept."""
  init = jax.jit(
    lambda value: Residual().init(
      jax.random.key(0), X, f, Sublayer(frozenset(), **{name: Scale(value, learned)})
    )
  )
  params = init(0.25)["params"]
  assert params[name].dtype == jnp.float32
  np.testing.assert_array_equal(params[name], 0.25)


@pytest.mark.parametrize("norm_dtype", (None, jnp.bfloat16, jnp.float32))
@pytest.mark.parametrize("sites", SITE_SETS[::3], ids=lambda s: "+".join(sorted(s)) or "none")
@pytest.mark.parametrize("learned", (None, "vector"))
def test_stream_keeps_its_dtype(sites, learned, norm_dtype):
  """Whatever the norms' own dtype: float32 parameters and numbers must not widen the stream."""
  sublayer = Sublayer(
    sites, skip=Scale(jnp.float32(1.5), learned), branch=Scale(jnp.float32(2.0), learned)
  )
  module = Residual(norm_factory("layer_norm", dtype=norm_dtype))
  x = jnp.asarray(X, jnp.bfloat16)
  heard = []

  def listen(h):
    heard.append(h.dtype)
    return f(h)

  init = functools.partial(module.init_with_output, f=listen, sublayer=sublayer)
  (y, _), variables = jax.eval_shape(init, jax.random.key(0), x)
  assert y.dtype == jnp.bfloat16
  assert set(heard) == {jnp.dtype(jnp.bfloat16)}
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_sum_is_taken_in_float32():
  """256 + 0.75 + 0.75 in bfloat16, whose step there is 2: rounded once, 1.5 counts; twice, not."""
  x = jnp.full((1, 1, D), 256.0, jnp.bfloat16)
  sublayer = Sublayer(frozenset(), skip=Scale(1 + 2**-9))
  y, _ = Residual().apply({}, x, lambda h: (jnp.full_like(h, 0.75), None), sublayer)
  np.testing.assert_array_equal(np.asarray(y, np.float32), 258.0)


def test_aux_is_handed_through():
  y, aux = Residual().apply({}, X, lambda h: (h, "aux"), Sublayer(frozenset()))
  assert aux == "aux"
  np.testing.assert_array_equal(y, 2 * X)


def test_dropout_falls_on_the_branch_behind_its_norm():
  """The skip is never dropped; the branch's channels are 0 or doubled after the norm."""
  sublayer = Sublayer(frozenset({"out"}), branch=Scale(0.5))
  params = params_of(sublayer)
  module = Residual(dropout_rate=0.5)
  rngs = {"dropout": jax.random.key(0)}
  y, _ = module.apply({"params": params}, X, f, sublayer, deterministic=False, rngs=rngs)
  plain, _ = module.apply({"params": params}, X, f, sublayer)
  ratio = (np.asarray(y) - X) / (np.asarray(plain) - X)
  np.testing.assert_allclose(ratio, 2 * (ratio > 1), atol=1e-4)
  assert 0.2 < (ratio > 1).mean() < 0.8


def test_drop_path_drops_samples_and_keeps_the_mean():
  """4096 samples at 0.25: the mean is off by 1 %, 4 % are allowed."""
  x = jnp.ones((4096, 2, 3))
  y = np.asarray(drop_path(x, 0.25, jax.random.key(0)))
  np.testing.assert_allclose(np.unique(y), [0, 4 / 3], rtol=1e-6)
  assert np.all(y.reshape(4096, -1).std(1) == 0)
  assert y.mean() == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("rate", (0.0, 1.0))
def test_drop_path_at_its_ends_is_exact(rate):
  y = drop_path(jnp.asarray(X), rate, jax.random.key(0))
  np.testing.assert_array_equal(y, X * (1 - rate))


def test_drop_path_keeps_bfloat16():
  y = drop_path(jnp.asarray(X, jnp.bfloat16), jnp.float32(0.5), jax.random.key(0))
  assert y.dtype == jnp.bfloat16


def test_drop_path_acts_in_training_only():
  module = Residual()
  sublayer = Sublayer(frozenset())
  apply = functools.partial(module.apply, {}, X, f, sublayer, drop_path_rate=1.0)
  rngs = {"dropout": jax.random.key(0)}
  np.testing.assert_array_equal(apply(deterministic=False, rngs=rngs)[0], X)
  assert np.abs(apply()[0] - X).max() > 0.1
