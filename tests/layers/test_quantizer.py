"""Codes against the figures of the released code's formulae, and against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.layers import VectorQuantizer, quantizer

Z = np.array([(3, 1), (2, 2.1), (1, 0)])
Z /= np.linalg.norm(Z, axis=1, keepdims=True)


def built(codes=3, width=4, of=5, **options):
  """A quantizer, its variables, and vectors that are tokens of two images."""
  module = VectorQuantizer(codes=codes, width=width, **options)
  x = np.random.default_rng(0).normal(size=(2, 6, of)).astype(np.float32)
  return module, module.init(jax.random.key(0), x), x


def moved(module, variables, x, seed=1):
  """What a call that changes the codes gives, and the variables after it."""
  found, changed = module.apply(
    variables, x, mutable=["state"], rngs={"dropout": jax.random.key(seed)}
  )
  return found, {**variables, **changed}


def through_identity(codes, z, **options):
  """A quantizer of 2-vectors whose projections leave their directions alone, with given codes."""
  module = VectorQuantizer(codes=len(codes), width=2, **options)
  variables = module.init(jax.random.key(0), z)
  # tanh(x / 1000) is x / 1000 but for a millionth.
  dense = {"kernel": jnp.eye(2) / 1000, "bias": jnp.zeros(2)}
  params = {"hidden": dense, "projection": {**dense, "kernel": jnp.eye(2)}}
  state = {**variables["state"], "codes": jnp.asarray(codes, jnp.float32)}
  return module, {"params": params, "state": {**state, "started": jnp.array(True)}}


def test_codes_and_their_step_are_the_published_formulae():
  """Of two unit codes and three vectors, in figures that were computed by hand in float64."""
  module, variables = through_identity(np.eye(2), Z)
  distances = 2 - 2 * Z @ np.eye(2)
  np.testing.assert_allclose(distances[0], [0.102633, 1.367544], atol=1e-6)
  found, after = moved(module, variables, Z)
  assert found.tokens.tolist() == [0, 1, 0]
  np.testing.assert_allclose(found.codes, np.eye(2)[[0, 1, 0]], atol=1e-6)
  np.testing.assert_allclose(found.commitment[0], 0.102633 / 2, atol=1e-5)
  np.testing.assert_allclose(jnp.mean(found.commitment), 0.1090596, atol=1e-5)
  expected = [[0.9999987, 0.0016020], [0.0069155, 0.9999761]]
  np.testing.assert_allclose(after["state"]["codes"], expected, atol=1e-6)
  np.testing.assert_allclose(after["state"]["usage"], [0.01 * 2 / 3, 0.01 / 3], atol=1e-7)


def test_a_call_that_may_change_nothing_changes_nothing_and_is_the_same():
  module, variables, x = built()
  first, variables = moved(module, variables, x)
  found = jax.jit(module.apply)(variables, x)
  again, _ = moved(module, variables, x)
  np.testing.assert_allclose(found.codes, again.codes, atol=1e-6)
  np.testing.assert_array_equal(found.tokens, again.tokens)
  looked_up = module.apply(variables, found.tokens, method="look_up")
  np.testing.assert_allclose(looked_up, found.codes, atol=1e-6)
  assert first.codes.shape == (2, 6, 4) and first.tokens.shape == first.commitment.shape == (2, 6)


def test_gradients_pass_as_if_nothing_was_rounded_and_no_code_has_any():
  """Of a loss of the codes alone; the commitment's is that of its formula."""
  z = jnp.asarray(Z, jnp.float32)
  module, variables = through_identity(np.eye(2), z)
  weight = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)

  def of(variables, x, part):
    found = module.apply(variables, x)
    return jnp.sum(weight * found.codes) if part == "codes" else jnp.sum(found.commitment)

  expected = {"codes": weight, "commitment": z - jnp.eye(2)[jnp.array([0, 1, 0])]}
  for part, of_z in expected.items():
    by_variables, by_x = jax.grad(of, (0, 1), allow_int=True)(variables, z, part)
    # Through l2: of vectors that are units already what stands upright on them.
    np.testing.assert_allclose(by_x, of_z - z * jnp.sum(of_z * z, -1, keepdims=True), atol=1e-5)
    assert not np.any(by_variables["state"]["codes"])
    assert np.any(by_variables["params"]["projection"]["kernel"])


def test_the_first_call_that_may_finds_codes_among_its_vectors():
  """Around three directions, wherever codes were: each becomes the direction of its vectors."""
  rng = np.random.default_rng(0)
  centres = np.array([(1, 0), (-0.6, 0.8), (-0.6, -0.8)])
  z = np.repeat(centres, 20, axis=0) + 0.05 * rng.normal(size=(60, 2))
  z /= np.linalg.norm(z, axis=1, keepdims=True)
  module, variables = through_identity(np.tile([(0.0, 1.0)], (3, 1)), z, decay=0.999)
  variables["state"]["started"] = jnp.array(False)
  _, after = moved(module, variables, z)
  codes, state = np.asarray(after["state"]["codes"]), after["state"]
  sums = [z[20 * i : 20 * i + 20].sum(0) for i in range(3)]
  means = np.array([s / np.linalg.norm(s) for s in sums])
  order = np.argmax(means @ codes.T, axis=1)
  assert sorted(order.tolist()) == [0, 1, 2]
  np.testing.assert_allclose(codes[order], means, atol=1e-4)
  np.testing.assert_allclose(state["usage"], [1 / 3] * 3, atol=1e-6)
  assert bool(state["started"]) and not bool(variables["state"]["started"])
  # The next call goes on from there, and does not begin again.
  turned = z @ np.array([(0.0, 1.0), (-1.0, 0.0)])
  _, later = moved(module, after, turned)
  assert np.abs(np.asarray(later["state"]["codes"]) - codes).max() < 0.01


@pytest.mark.parametrize("redraw_below", [0.0, 0.5])
def test_a_code_that_nothing_chooses_stays_or_is_drawn_anew(redraw_below):
  codes = np.array([(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)])
  module, variables = through_identity(codes, Z, redraw_below=redraw_below)
  variables["state"]["usage"] = jnp.array([0.6, 0.39, 0.01])
  _, after = moved(module, variables, Z)
  found = np.asarray(after["state"]["codes"])
  usage = 0.99 * np.array([0.6, 0.39, 0.01]) + 0.01 * np.array([2, 1, 0]) / 3
  if redraw_below:
    assert np.abs(Z - found[2]).max(axis=1).min() < 1e-6
    usage[2] = 1 / 3
  else:
    np.testing.assert_allclose(found[2], codes[2], atol=1e-6)
  np.testing.assert_allclose(after["state"]["usage"], usage, atol=1e-6)
  assert np.abs(found[:2] - codes[:2]).max() < 0.01


def test_k_means_agrees_with_numpy():
  rng = np.random.default_rng(1)
  z = rng.normal(size=(50, 3))
  z /= np.linalg.norm(z, axis=1, keepdims=True)
  codes = z[:7].copy()
  for _ in range(10):
    tokens = np.argmax(z @ codes.T, axis=1)
    for k in range(7):
      if np.any(tokens == k):
        total = z[tokens == k].sum(0)
        codes[k] = total / np.linalg.norm(total)
  found = jax.jit(quantizer.k_means)(jnp.asarray(z, jnp.float32), jnp.asarray(z[:7], jnp.float32))
  np.testing.assert_allclose(found, codes, atol=1e-5)


@pytest.mark.parametrize("codes", [1, 30])
def test_fewer_vectors_than_codes_and_one_code_alone(codes):
  """Some of the codes then start at the same vector, and those that lose are drawn anew."""
  module, variables, x = built(codes, redraw_below=0.5)
  for seed in (1, 2):
    found, variables = moved(module, variables, x, seed)
  state = variables["state"]
  np.testing.assert_allclose(np.linalg.norm(state["codes"], axis=1), 1, rtol=1e-5)
  assert np.all(state["usage"] >= 0.5 / codes) and found.tokens.max() < codes


def test_codes_of_half_precision_are_chosen_in_full():
  module, variables, x = built(dtype=jnp.bfloat16)
  found = module.apply(variables, x.astype(jnp.bfloat16))
  assert found.codes.dtype == found.commitment.dtype == jnp.float32


def test_sizes_are_checked():
  for sizes in ({"codes": 0}, {"codes": 2, "width": 0}):
    with pytest.raises(ValueError, match="must be at least 1"):
      VectorQuantizer(**sizes).init(jax.random.key(0), Z)
