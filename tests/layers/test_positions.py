"""Position encodings: their formulae, and what they make attention depend on."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.layers.positions import KINDS, ROTATIONS, rotate, sinusoidal, xpos
from tests import reference

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
  np.testing.assert_allclose(rotate(X, POSITIONS), expected, rtol=0, atol=2e-4)


def test_rotary_scores_depend_on_relative_positions_only():
  """All pairs q_t k_s at positions t + c and s + c score alike for every shift c; float32."""
  score = lambda shift: np.einsum(
    "btnh,bsnh->bnts", rotate(X, POSITIONS + shift), rotate(X[::-1], POSITIONS + shift)
  )
  np.testing.assert_allclose(score(13), score(0), rtol=0, atol=1e-3)
  one_sided = np.einsum("btnh,bsnh->bnts", rotate(X, POSITIONS + 13), rotate(X[::-1], POSITIONS))
  assert np.abs(one_sided - score(0)).max() > 0.1


def test_rotary_keeps_position_zero_and_all_lengths():
  np.testing.assert_array_equal(rotate(X, np.zeros((2, 5), int)), X)
  norms = np.linalg.norm(rotate(X, POSITIONS), axis=-1)
  np.testing.assert_allclose(norms, np.linalg.norm(X, axis=-1), rtol=1e-6)  # float32


def test_rotary_of_bfloat16_has_float32_angles():
  """Position 1000 is no bfloat16 number: the result is the exact one, rounded once (2^-8)."""
  x = X.astype(jnp.bfloat16)
  rotated = rotate(x, POSITIONS)
  assert rotated.dtype == jnp.bfloat16
  expected = rotate(x.astype(np.float32), POSITIONS)
  np.testing.assert_allclose(rotated.astype(np.float32), expected, rtol=2**-8, atol=1e-6)


def test_positions_broadcast_over_the_batch():
  np.testing.assert_array_equal(rotate(X, POSITIONS[:1]), rotate(X, POSITIONS[[0, 0]]))


def test_odd_head_width_raises():
  with pytest.raises(ValueError, match="head_dim=7 must be even"):
    rotate(X[..., :7], POSITIONS)


# ---------------------------------------------------------------------------------------------
# xPos
# ---------------------------------------------------------------------------------------------


def scores(q_BTNH, k_BSNH):
  return np.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH)


@pytest.mark.parametrize("base", (512.0, 4.0))
def test_xpos_scores_are_torchscales(base):
  """float64, 1e-12: it centres the positions of a call, which cancels in the scores."""
  q, k = X.astype(np.float64), X[::-1].astype(np.float64)
  with jax.enable_x64(True):
    ours = scores(*xpos(q, k, np.arange(5)[None], scale_base=base))
  theirs = reference.torchscale_xpos(q.swapaxes(1, 2), k.swapaxes(1, 2), base)
  expected = theirs[0] @ theirs[1].swapaxes(-1, -2)
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


def test_xpos_is_its_formula():
  """(x_2i + j x_2i+1) exp(j p f_i) zeta_i^(p / base), the key's scale inverted; float32."""
  i = np.arange(4)
  p = POSITIONS[..., None, None] % 100
  zeta = (2 * i + 0.4 * 8) / (1.4 * 8)
  turn, scale = np.exp(1j * p * 10_000.0 ** (-2 * i / 8)), zeta ** (p / 512)
  for turned, factor in zip(xpos(X, X, POSITIONS % 100), (scale, 1 / scale), strict=True):
    expected = (X[..., 0::2] + 1j * X[..., 1::2]) * turn * factor
    np.testing.assert_allclose(turned[..., 0::2], expected.real, rtol=0, atol=1e-4)
    np.testing.assert_allclose(turned[..., 1::2], expected.imag, rtol=0, atol=1e-4)


def test_xpos_scores_depend_on_relative_positions_only():
  positions = np.array([[0, 1, 2, 3, 4], [7, 9, 2, 30, 11]])
  score = lambda shift: scores(*xpos(X, X[::-1], positions + shift))
  np.testing.assert_allclose(score(13), score(0), rtol=0, atol=1e-4)  # float32
  one_sided = scores(xpos(X, X, positions + 13)[0], xpos(X, X[::-1], positions)[1])
  assert np.abs(one_sided - score(0)).max() > 0.1


def test_xpos_scores_decay_with_the_distance():
  """Of one vector with itself, far apart: they fall, the faster the smaller the base."""
  ones, positions = np.ones((1, 64, 1, 8), np.float32), np.arange(64)[None]

  def share(base):
    q, k = xpos(ones, ones, positions, scale_base=base)
    plain = scores(*ROTATIONS["rotary"](ones, ones, positions))[0, 0, :, 0]
    return np.abs(scores(q, k)[0, 0, 32:, 0]).mean() / np.abs(plain[32:]).mean()

  assert share(16.0) < share(64.0) < share(512.0) < 1.0


def test_xpos_is_finite_as_far_as_it_says():
  """About 70 times the base, in float32; zeta is smallest, 2 / 7, in the first pair."""
  q, k = xpos(X, X, np.full((1, 5), 69 * 512))
  assert np.isfinite(q).all() and np.isfinite(k).all()


@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotations_keep_dtype_position_zero_and_each_head(kind):
  rotate = ROTATIONS[kind]
  for turned in rotate(X, X, np.zeros((1, 5), int)):
    np.testing.assert_array_equal(turned, X)
  q, k = rotate(X.astype(jnp.bfloat16), X[:, :, :1].astype(jnp.bfloat16), POSITIONS)
  assert q.dtype == k.dtype == jnp.bfloat16
  assert (q.shape, k.shape) == (X.shape, X[:, :, :1].shape)
  wide = rotate(*(x.astype(jnp.bfloat16).astype(np.float32) for x in (X, X[:, :, :1])), POSITIONS)
  for rounded, exact in zip((q, k), wide, strict=True):
    np.testing.assert_allclose(rounded.astype(np.float32), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotations_of_odd_heads_raise(kind):
  with pytest.raises(ValueError, match="head_dim=7 must be even"):
    ROTATIONS[kind](X[..., :7], X[..., :7], POSITIONS)


def test_rotations_are_kinds_of_positions():
  assert set(ROTATIONS) < set(KINDS)
