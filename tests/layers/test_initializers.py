"""Init functions: the distributions of `records.Init`, also with traced numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax import initializers
from magneto_jax.layers.initializers import DenseInit, bias_init, dense_init, kernel_init
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import FAMILIES, Architecture, Init

SHAPE = (200, 600)
# The paper's deviation of a kernel with fans 200 and 600, and how far its draws reach (None: on).
DISTRIBUTIONS = {
  "xavier_normal": (math.sqrt(2 / 800), None),
  "xavier_uniform": (math.sqrt(2 / 800), math.sqrt(6 / 800)),
  "lecun_normal": (1 / math.sqrt(200), None),
  "torch_uniform": (1 / math.sqrt(3 * 200), 1 / math.sqrt(200)),
  "normal": (1.0, None),
}


@pytest.mark.parametrize("gain", (1.0, 0.3))
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_have_their_familys_distribution(family, gain):
  """120,000 draws: their deviation is off by 0.2 %; a normal's largest is near 4.4 deviations."""
  kernel = np.asarray(kernel_init(Init(family, gain))(jax.random.key(0), SHAPE))
  std, reach = DISTRIBUTIONS[family]
  assert kernel.std() == pytest.approx(gain * std, rel=0.01)
  assert abs(kernel.mean()) < 0.02 * gain * std
  largest = np.abs(kernel).max()
  if reach is None:
    assert 4 * gain * std < largest < 6 * gain * std
  else:
    assert 0.999 * gain * reach < largest <= gain * reach * (1 + 1e-6)


def test_windows_of_convolutions_count_in_both_fans():
  """As in jax.nn.initializers, which draws with the same key and shape."""
  shape = (3, 4, 5, 60)
  expected = jax.nn.initializers.xavier_normal()(jax.random.key(0), shape).std()
  got = kernel_init(Init("xavier_normal"))(jax.random.key(0), shape).std()
  # 3,600 draws of each: off by some 2 %.
  assert float(got) == pytest.approx(float(expected), rel=0.08)


@pytest.mark.parametrize("family", FAMILIES)
def test_traced_gain_equals_static_gain(family):
  init = jax.jit(lambda gain: kernel_init(Init(family, gain))(jax.random.key(0), SHAPE))
  expected = kernel_init(Init(family, 0.3))(jax.random.key(0), SHAPE)
  np.testing.assert_allclose(init(0.3), expected, rtol=1e-6, atol=1e-8)  # float32


def test_biases_start_at_zero_or_at_torchs_default():
  assert not bias_init(Init())(200)(jax.random.key(0), (600,)).any()
  init = Init(bias="torch_uniform", bias_gain=0.5)
  bias = np.asarray(bias_init(init)(200)(jax.random.key(0), (60_000,)))
  bound = 0.5 / math.sqrt(200)
  assert bias.std() == pytest.approx(bound / math.sqrt(3), rel=0.01)
  assert 0.999 * bound < np.abs(bias).max() <= bound


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_draws_come_in_the_dtype_asked_for(dtype):
  init = dense_init(Init("torch_uniform", gain=np.float32(2), bias="torch_uniform"))
  assert init.kernel(jax.random.key(0), SHAPE, dtype).dtype == dtype
  assert init.bias(200)(jax.random.key(0), (600,), dtype).dtype == dtype


def test_the_default_is_xavier_normal_with_zero_bias():
  kernel = DenseInit().kernel(jax.random.key(0), SHAPE, jnp.float32)
  assert kernel.std() == pytest.approx(math.sqrt(2 / 800), rel=0.01)
  assert not DenseInit().bias(200)(jax.random.key(0), (600,), jnp.float32).any()


variance_scaling = jax.nn.initializers.variance_scaling
# How jax.nn.initializers says it, with gain g.
THEIRS = {
  "xavier_normal": lambda g: variance_scaling(g**2, "fan_avg", "normal"),
  "xavier_uniform": lambda g: variance_scaling(g**2, "fan_avg", "uniform"),
  "lecun_normal": lambda g: variance_scaling(g**2, "fan_in", "normal"),
  "torch_uniform": lambda g: variance_scaling(g**2 / 3, "fan_in", "uniform"),
  "normal": jax.nn.initializers.normal,
}


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("shape", (SHAPE, (3, 4, 5, 60)))
@pytest.mark.parametrize("name", THEIRS)
def test_named_ones_draw_what_jax_draws(name, shape, dtype):
  """The same numbers from the same key, up to rounding."""
  draw = lambda init: init(jax.random.key(0), shape, dtype)
  drawn, expected = draw(getattr(initializers, name)(0.3)), draw(THEIRS[name](0.3))
  assert drawn.dtype == dtype
  # Near 0, a uniform is a difference of two larger numbers.
  tolerance = 4 * float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(
    drawn.astype(float), expected.astype(float), rtol=tolerance, atol=tolerance * expected.std()
  )


@pytest.mark.parametrize("name", sorted(THEIRS.keys() - {"normal"}))
def test_gains_are_1_by_default(name):
  make, key = getattr(initializers, name), jax.random.key(0)
  np.testing.assert_array_equal(make()(key, SHAPE), make(1.0)(key, SHAPE))


def test_torchs_bias_has_torchs_bound():
  bias = np.asarray(initializers.torch_bias(200)(jax.random.key(0), (60_000,)))
  assert bias.std() == pytest.approx(1 / math.sqrt(3 * 200), rel=0.01)
  assert 0.999 / math.sqrt(200) < np.abs(bias).max() <= 1 / math.sqrt(200)


@pytest.mark.parametrize("layers", (1, 24, 48))
@pytest.mark.parametrize("kind", ("encoder", "decoder"))
@pytest.mark.parametrize("name", ("magneto", "deepnet"))
def test_shorthands_are_the_recipes_groups(name, kind, layers):
  """Of v, out, wi and wo in every layer of a single stack, by the papers' formulae."""
  gain = {"magneto": math.sqrt(math.log(2 * layers)), "deepnet": (8 * layers) ** -0.25}[name]
  stack = getattr(RECIPES[name](Architecture(kind, **{f"{kind}_layers": layers})), kind)
  draw = lambda init: np.asarray(init(jax.random.key(0), (8, 16), jnp.float32))
  drawn = draw(getattr(initializers, name)(layers))
  np.testing.assert_allclose(drawn, draw(initializers.xavier_normal(gain)), rtol=1e-6)
  for layer in stack.layers:
    for group in (layer.self_attention.v, layer.self_attention.out, layer.ffn.wi, layer.ffn.wo):
      np.testing.assert_array_equal(drawn, draw(kernel_init(group)))
    np.testing.assert_array_equal(
      draw(kernel_init(layer.self_attention.qk)), draw(initializers.xavier_normal())
    )


def test_normal_draws_arrays_of_any_rank():
  """Biases and scales as well, which have no fans; the others say that they draw kernels."""
  assert initializers.normal(2.0)(jax.random.key(0), (4096,)).std() == pytest.approx(2.0, rel=0.1)
  with pytest.raises(ValueError, match=r"xavier_normal draws kernels \[..., in, out\], not shape"):
    initializers.xavier_normal()(jax.random.key(0), (8,))
