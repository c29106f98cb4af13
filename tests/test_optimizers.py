"""Schedules and the decay mask."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from magneto_jax import optimizers


@pytest.mark.parametrize("kind", optimizers.SCHEDULES)
def test_schedule_follows_its_formula(kind):
  peak, warmup, end, e, power = 2e-3, 10, 110, 0.1, 2.0
  schedule = optimizers.schedule(
    kind, peak=peak, warmup_steps=warmup, decay_steps=end, power=power, end_factor=e
  )
  for step in (0, 4, 9, 10, 11, 60, 109, 110, 500):
    p = min(max((step - warmup) / (end - warmup), 0), 1)
    tail = {
      "cosine": e + (1 - e) * (1 + np.cos(np.pi * p)) / 2,
      "linear": e + (1 - e) * (1 - p),
      "polynomial": e + (1 - e) * (1 - p) ** power,
      "inverse_sqrt": np.sqrt(warmup / (step + 1)),
      "constant": 1.0,
    }[kind]
    want = peak * ((step + 1) / warmup if step < warmup else tail)
    np.testing.assert_allclose(float(schedule(step)), want, rtol=1e-5)  # float32


def test_the_inverse_square_root_is_fairseqs():
  """At update n, from 1: its values for a peak of 5e-4 after 4,000 updates, from a rate of 0."""
  schedule = optimizers.schedule("inverse_sqrt", peak=5e-4, warmup_steps=4000, decay_steps=7)
  for n, rate in (
    *((1, 1.25e-7), (2000, 2.5e-4), (4000, 5e-4)),
    *((8000, 3.5355339e-4), (16_000, 2.5e-4), (100_000, 1e-4)),
  ):
    assert float(schedule(n - 1)) == pytest.approx(rate, rel=1e-6, abs=1e-10)  # float32
  without = optimizers.schedule("inverse_sqrt", peak=2.0, warmup_steps=0, decay_steps=7)
  assert [float(without(step)) for step in (0, 3, 24)] == pytest.approx([2.0, 1.0, 0.4])


def test_only_matrices_decay():
  params = {
    "token_embedding": {"embedding": jnp.ones((4, 2))},
    "segment_0": {
      "wi": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))},
      "mid_norm": {"scale": jnp.ones((3, 2)), "bias": jnp.ones((3, 2))},
      "self_attention": {"head_scale": jnp.ones((3, 2))},
    },
  }
  transform = optimizers.adamw(optax.constant_schedule(0.1), weight_decay=0.5)
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = transform.update(zero, transform.init(params), params)
  moved = {
    name: float(jnp.abs(leaf).max())
    for name, leaf in (
      ("embedding", updates["token_embedding"]["embedding"]),
      ("kernel", updates["segment_0"]["wi"]["kernel"]),
      ("bias", updates["segment_0"]["wi"]["bias"]),
      ("gain", updates["segment_0"]["mid_norm"]["scale"]),
      ("head_scale", updates["segment_0"]["self_attention"]["head_scale"]),
    )
  }
  assert moved["embedding"] == moved["kernel"] == pytest.approx(0.05)  # rate x decay x 1
  assert moved["bias"] == moved["gain"] == moved["head_scale"] == 0.0


def test_clipping_bounds_the_global_norm():
  transform = optimizers.adamw(optax.constant_schedule(1.0), clip_norm=1.0, b1=0.0, eps=1.0)
  params = {"kernel": jnp.zeros((2, 2))}
  state = transform.init(params)
  large, _ = transform.update({"kernel": jnp.full((2, 2), 50.0)}, state, params)
  unit, _ = transform.update({"kernel": jnp.full((2, 2), 0.5)}, state, params)
  np.testing.assert_allclose(large["kernel"], unit["kernel"], rtol=1e-5)  # float32
