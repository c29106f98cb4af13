"""Position encodings: their formulae, and what they make attention depend on."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.layers.positions import rotary, sinusoidal

X = np.random.default_rng(0).standard_normal((2, 5, 3, 8)).astype(np.float32)
POSITIONS = np.array([[0, 1, 2, 3, 4], [7, 9, 2, 100, 1000]])


@pytest.mark.parametrize("width", (8, 9, 2))
def test_sinusoidal_is_fairseqs_formula(width):
  """half = D // 2, f_i = exp(-i ln(10000) / (half - 1)), [sin(p f) | cos(p f)], odd D: zero.

  float32: an angle of 1000 is rounded by 3e-5.
  """
  half = width // 2
  expected = np.zeros((*POSITIONS.shape, width))
  for i in range(half):
    frequency = math.exp(-i * math.log(10_000) / (half - 1)) if half > 1 else 1.0
    expected[..., i] = np.sin(POSITIONS * frequency)
    expected[..., half + i] = np.cos(POSITIONS * frequency)
  encoding = sinusoidal(POSITIONS, width)
  assert encoding.dtype == jnp.float32
  np.testing.assert_allclose(encoding, expected, rtol=0, atol=1e-4)


def test_rotary_is_its_formula():
  """Channels i and i + H/2 are a complex number, turned by p 10000^(-2i/H); float32."""
  angles = POSITIONS[..., None, None] * 10_000.0 ** (-2 * np.arange(4) / 8)
  turned = (X[..., :4] + 1j * X[..., 4:]) * np.exp(1j * angles)
  expected = np.concatenate([turned.real, turned.imag], axis=-1)
  np.testing.assert_allclose(rotary(X, POSITIONS), expected, rtol=0, atol=2e-4)


def test_rotary_scores_depend_on_relative_positions_only():
  """All pairs q_t k_s at positions t + c and s + c score alike for every shift c; float32."""
  score = lambda shift: np.einsum(
    "btnh,bsnh->bnts", rotary(X, POSITIONS + shift), rotary(X[::-1], POSITIONS + shift)
  )
  np.testing.assert_allclose(score(13), score(0), rtol=0, atol=1e-3)
  one_sided = np.einsum("btnh,bsnh->bnts", rotary(X, POSITIONS + 13), rotary(X[::-1], POSITIONS))
  assert np.abs(one_sided - score(0)).max() > 0.1


def test_rotary_keeps_position_zero_and_all_lengths():
  np.testing.assert_array_equal(rotary(X, np.zeros((2, 5), int)), X)
  norms = np.linalg.norm(rotary(X, POSITIONS), axis=-1)
  np.testing.assert_allclose(norms, np.linalg.norm(X, axis=-1), rtol=1e-6)  # float32


def test_rotary_of_bfloat16_has_float32_angles():
  """Position 1000 is no bfloat16 number: the result is the exact one, rounded once (2^-8)."""
  x = X.astype(jnp.bfloat16)
  rotated = rotary(x, POSITIONS)
  assert rotated.dtype == jnp.bfloat16
  expected = rotary(x.astype(np.float32), POSITIONS)
  np.testing.assert_allclose(rotated.astype(np.float32), expected, rtol=2**-8, atol=1e-6)


def test_positions_broadcast_over_the_batch():
  np.testing.assert_array_equal(rotary(X, POSITIONS[:1]), rotary(X, POSITIONS[[0, 0]]))


def test_odd_head_width_raises():
  with pytest.raises(ValueError, match="head_dim=7 must be even"):
    rotary(X[..., :7], POSITIONS)
