"""Norms: the papers' formulae, in the precision that is promised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.layers.norms import NORMS, norm_factory
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
