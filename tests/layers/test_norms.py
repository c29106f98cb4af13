"""Norms: the papers' formulae, in the precision that is promised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.layers.norms import CHECKPOINT_NAMES, NORMS, layer_norm, norm_factory
from tests import reference

FORMULAE = {"layer_norm": reference.layer_norm, "rms_norm": reference.rms_norm}
X = np.random.default_rng(0).standard_normal((3, 5, 16)).astype(np.float32)


@pytest.mark.parametrize("kind", NORMS)
def test_norm_is_its_formula(kind):
  """The input is small, so that an epsilon of other than 1e-5 shows; float32."""
  x = X * 1e-2
  norm = norm_factory(kind)(name="norm")
  params = reference.random_params(norm, x)
  expected = FORMULAE[kind](params, x.astype(np.float64))
  np.testing.assert_allclose(norm.apply({"params": params}, x), expected, rtol=0, atol=1e-5)


def test_variance_does_not_cancel():
  """Mean 1000, deviation 1: in float32, E[x^2] - E[x]^2 would be off by 6 %, this is by 1e-4."""
  x = X + 1000
  norm = norm_factory("layer_norm")(name="norm")
  params = reference.random_params(norm, x)
  expected = reference.layer_norm(params, x.astype(np.float64))
  np.testing.assert_allclose(norm.apply({"params": params}, x), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", NORMS)
def test_bfloat16_norm_takes_statistics_in_float32(kind):
  """The result is the exact one of the rounded input, rounded once: half a unit of bfloat16."""
  x = X.astype(jnp.bfloat16)
  norm = norm_factory(kind, dtype=jnp.bfloat16)(name="norm")
  params = reference.random_params(norm, x)
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
  y = norm.apply({"params": params}, x)
  assert y.dtype == jnp.bfloat16
  expected = FORMULAE[kind](params, x.astype(np.float64))
  np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-5)


def test_unknown_norm_raises():
  with pytest.raises(ValueError, match="kind='batch_norm' must be one of layer_norm, rms_norm"):
    norm_factory("batch_norm")


@pytest.mark.parametrize("kind", NORMS)
def test_derivatives_are_those_of_the_formula(kind):
  """Backwards and forwards, by x and by the parameters: float64, against central differences."""
  rng = np.random.default_rng(1)
  with jax.enable_x64(True):
    norm = norm_factory(kind, dtype=jnp.float64)(name="norm")
    x, dx, dy = rng.standard_normal((3, 2, 7, 16))
    draw = lambda leaf: rng.standard_normal(leaf.shape)
    params = reference.random_params(norm, x, dtype=np.float64)
    dparams = jax.tree.map(draw, params)
    compute = lambda params, x: norm.apply({"params": params}, x)
    y, pull = jax.vjp(compute, params, x)
    back = pull(dy)
    _, forth = jax.jvp(compute, (params, x), (dparams, dx))
    step = 1e-5

    def moved(size):
      return jax.tree.map(lambda p, d: p + size * d, (params, x), (dparams, dx))

    ahead, behind = (FORMULAE[kind](*moved(size)) for size in (step, -step))
  expected = (ahead - behind) / (2 * step)
  np.testing.assert_allclose(forth, expected, rtol=0, atol=1e-8)
  tangents = zip(jax.tree.leaves(back), jax.tree.leaves((dparams, dx)), strict=True)
  np.testing.assert_allclose(sum(np.vdot(a, b) for a, b in tangents), np.vdot(dy, expected))


@pytest.mark.parametrize("first", [0.0, 3.0, -200.0])
def test_one_pass_of_sixteen_bits_does_not_cancel(first):
  """Around a mean of 1000 deviations, wherever the first number lies, by which the pass is shifted.

  float16, whose numbers are near enough to each other there; the result is float32, so that the
  variance is seen: a ten thousandth of it, where E[x^2] - E[x]^2 would leave nothing.
  """
  x = 64 + np.random.default_rng(2).standard_normal((4, 512)) / 16
  x[:, 0] = 64 + first / 16
  x = x.astype(np.float16)
  norm = norm_factory("layer_norm", dtype=jnp.float32)(name="norm")
  params = reference.random_params(norm, x)
  expected = reference.layer_norm(params, x.astype(np.float64))
  # By epsilon the deviation of a sixteenth counts less, in the formula as well.
  np.testing.assert_allclose(norm.apply({"params": params}, x), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", NORMS)
def test_backward_pass_keeps_nothing_wide_in_float32(kind):
  """What is left for it is the input, as it came, and a row's statistics."""
  x = X.astype(jnp.bfloat16)
  norm = norm_factory(kind, dtype=jnp.bfloat16)(name="norm")
  params = reference.random_params(norm, x)
  policy = jax.checkpoint_policies.save_only_these_names(*CHECKPOINT_NAMES)
  compute = jax.checkpoint(lambda x: norm.apply({"params": params}, x), policy=policy)
  kept = jax.tree.leaves(jax.vjp(compute, x)[1])
  wide = [leaf.shape for leaf in kept if leaf.dtype == jnp.float32 and leaf.size >= x.size]
  statistics = [leaf for leaf in kept if leaf.shape == (*x.shape[:-1], 1)]
  assert not wide
  assert len(statistics) == {"layer_norm": 2, "rms_norm": 1}[kind]


def test_numbers_too_large_to_be_squared_are_none_but_zero():
  """In one pass as in two: their variance is infinite, and what is divided by it nothing."""
  for dtype in (jnp.bfloat16, jnp.float32):
    x = jnp.asarray(X * 1e30, dtype)
    y = layer_norm(x, jnp.ones(16), jnp.zeros(16), 1e-5, jnp.float32)
    np.testing.assert_array_equal(y, np.zeros_like(y))
