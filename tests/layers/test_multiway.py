"""Multiway layers: which expert sees which tokens."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.layers.multiway import multiway
from magneto_jax.layers.norms import norm_factory
from tests import reference

B, T, D = 2, 6, 8
X = np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)
EXPERTS = ("vision", "text")
LENGTHS = ((0, T), (2, 4), (5, 1), (T, 0))
FACTORIES = {
  "projection": (functools.partial(nn.DenseGeneral, (2, 3)), lambda p, x: heads(p, x)),
  "norm": (norm_factory("layer_norm"), reference.layer_norm),
}


def heads(p, x):
  return np.einsum("btd,dnh->btnh", x, p["kernel"]) + p["bias"]


def run(kind, params, lengths, x=X):
  return multiway(FACTORIES[kind][0], EXPERTS, lengths)(name="layer").apply({"params": params}, x)


@pytest.mark.parametrize("kind", FACTORIES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_each_part_passes_through_its_expert(kind, lengths):
  """Also where a modality is missing, and then its expert may be missing too; float32."""
  params = reference.random_params(multiway(FACTORIES[kind][0], EXPERTS, (T, 0))(), X)
  assert set(params) == set(EXPERTS)
  formula = FACTORIES[kind][1]
  first, second = X[:, : lengths[0]], X[:, lengths[0] :]
  expected = np.concatenate([formula(params["vision"], first), formula(params["text"], second)], 1)
  np.testing.assert_allclose(run(kind, params, lengths), expected, rtol=0, atol=1e-5)
  present = {n: params[n] for n, length in zip(EXPERTS, lengths, strict=True) if length}
  np.testing.assert_allclose(run(kind, present, lengths), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_gradients_reach_the_experts_whose_tokens_are_there(lengths):
  params = reference.random_params(multiway(FACTORIES["projection"][0], EXPERTS, (T, 0))(), X)
  gradient = jax.grad(lambda params: jnp.sum(run("projection", params, lengths) ** 2))(params)
  for name, length in zip(EXPERTS, lengths, strict=True):
    assert np.any(gradient[name]["kernel"]) == (length > 0)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_expert_is_drawn_and_by_itself(lengths):
  """Whatever parts the initialising call holds: the trees are the same, the draws are not."""
  layer = multiway(functools.partial(nn.Dense, 64), EXPERTS, lengths)()
  y, variables = layer.init_with_output(jax.random.key(0), X)
  assert y.shape == (B, T, 64)
  kernels = [variables["params"][name]["kernel"].ravel() for name in EXPERTS]
  # Of 512 numbers each: a correlation of two independent draws is 0.04.
  assert abs(np.corrcoef(kernels)[0, 1]) < 0.2


@pytest.mark.parametrize("lengths", ((2, 3), (T,), (2, 2, 2), (T + 2, -2)))
def test_lengths_that_do_not_add_up_raise(lengths):
  with pytest.raises(ValueError, match="do not add up to 6 tokens"):
    run("norm", {}, lengths)
