"""The contrastive loss: known numbers, its gradient, precision, and errors. See also
`tests/layers/sharded_cross_entropy.py`, where it is of a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.layers import contrastive_loss


def features(similarities, scale):
  """Nats both ways of these similarities: the identity's rows as texts."""
  z = np.asarray(similarities, np.float64)
  return contrastive_loss(z, np.eye(len(z)), scale)


def test_known_values():
  """tasks' numbers: right answers at 1 and wrong ones at 0; all alike; and a table by hand."""
  with jax.enable_x64(True):
    for nats in features(np.eye(2), 1 / 0.07):
      np.testing.assert_allclose(nats, 6.2487e-7, rtol=1e-4)
    alike = np.ones((3072, 1), np.float32)
    for nats in contrastive_loss(alike, alike, 10.0):
      np.testing.assert_allclose(nats, 8.0301, atol=1e-4)
    to_texts, to_images = map(np.asarray, features([[0.8, 0.2], [0.4, 0.6]], 10.0))
  assert to_texts.mean() == pytest.approx(0.0647018, abs=1e-7)
  assert to_images.mean() == pytest.approx(0.0181499, abs=1e-7)
  assert (to_texts.mean() + to_images.mean()) / 2 == pytest.approx(0.0414259, abs=1e-7)


def test_the_gradient_is_that_of_finite_differences():
  """Of features of both kinds and of the scale, in float64, to 1e-6."""
  rng = np.random.default_rng(0)
  x, y, scale = rng.standard_normal((3, 4)), rng.standard_normal((3, 4)), np.float64(2.0)

  def loss(x, y, scale):
    first, second = contrastive_loss(x, y, scale)
    return jnp.mean(first) + 2 * jnp.mean(second)

  with jax.enable_x64(True):
    call, gradient = jax.jit(loss), jax.jit(jax.grad(loss, (0, 1, 2)))(x, y, scale)
    for place, found in enumerate(gradient):
      for index in np.ndindex(found.shape):
        given, ends = [x, y, scale], []
        for step in (1e-6, -1e-6):
          moved = np.array(given[place])
          moved[index] += step
          ends.append(float(call(*given[:place], moved, *given[place + 1 :])))
        assert float(found[index]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-6)


def test_rows_that_fill_a_batch_up_are_nobodys_wrong_answers():
  """What the others cost is what they cost without them; and no gradient of theirs is infinite."""
  rng = np.random.default_rng(0)
  x, y = rng.standard_normal((2, 5, 4)).astype(np.float32)
  mask = np.array([True, False, True, True, False])

  def loss(x, y):
    both = contrastive_loss(x, y, 3.0, mask)
    return sum(jnp.sum(nats * mask) for nats in both), both

  (_, found), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, y)
  for nats, alone in zip(found, contrastive_loss(x[mask], y[mask], 3.0), strict=True):
    np.testing.assert_allclose(nats[mask], alone, rtol=1e-6)  # float32
  for gradient in gradients:
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[~mask].any()


def test_bfloat16_features_cost_float32():
  x = jnp.eye(3, dtype=jnp.bfloat16)
  assert all(nats.dtype == jnp.float32 for nats in contrastive_loss(x, x, 100.0))


def test_products_are_not_rounded_on_any_device():
  """Where the default is less: a program that a TPU would run says that float32 is multiplied."""
  x = jnp.eye(3)
  with jax.default_matmul_precision("bfloat16"):
    program = str(jax.make_jaxpr(jax.grad(lambda x: sum(contrastive_loss(x, x, 1.0))[0]))(x))
  assert "dot_general" in program and "precision=(Precision.HIGHEST" in program
  assert "precision=bfloat16" not in program.lower() and "precision=None" not in program


def test_parts_of_a_batch_cost_something_else():
  """So that a batch is not cut."""
  x, y = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
  mean = lambda rows: float(jnp.mean(sum(contrastive_loss(x[rows], y[rows], 1.0))))
  whole, parts = mean(slice(None)), (mean(slice(2)) + mean(slice(2, 4))) / 2
  assert whole > parts + 0.1


def test_features_of_other_shapes_are_refused():
  with pytest.raises(ValueError, match=r"\[3, 2\] and of texts \[2, 2\] must be of one shape"):
    contrastive_loss(np.ones((3, 2)), np.ones((2, 2)), 1.0)
