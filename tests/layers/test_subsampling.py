"""Front ends of speech models against NumPy's loops: values, lengths, and what padding changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.layers import Conv2dSubsampling, ConvSubsampling, VGGSubsampling
from magneto_jax.layers.initializers import DenseInit, lecun_normal, normal
from tests import reference
from tests.models.common import compiled, in_float64, main_and_slow, run

WIDTH, BINS = 6, 11
KINDS = {
  "conv": ConvSubsampling(WIDTH, hidden=8),
  "vgg": VGGSubsampling(WIDTH, channels=(3, 4)),
  "conv2d": Conv2dSubsampling(WIDTH),
}
# Of the last row nothing is left.
FRAMES = np.array([17, 10, 1])


def spectrograms(frames=17, bins=BINS, rows=3):
  return np.random.default_rng(0).normal(size=(rows, frames, bins)).astype(np.float32)


# ---------------------------------------------------------------------------------------------
# NumPy's loops, of one utterance [T, M] without padding
# ---------------------------------------------------------------------------------------------


def conv1d(p, x, stride, zeros):
  kernel = p["kernel"]
  x = np.pad(x, ((zeros, zeros), (0, 0)))
  rows = []
  for start in range(0, len(x) - len(kernel) + 1, stride):
    window = x[start : start + len(kernel)]
    rows.append(sum(window[i] @ kernel[i] for i in range(len(kernel))) + p["bias"])
  return np.array(rows)


def conv2d(p, x, stride, zeros):
  kernel = p["kernel"]
  x = np.pad(x, ((zeros, zeros), (zeros, zeros), (0, 0)))
  places = [range(0, size - 2, stride) for size in x.shape[:2]]
  return np.array(
    [
      [
        sum(x[t + i, m + j] @ kernel[i, j] for i in range(3) for j in range(3)) + p["bias"]
        for m in places[1]
      ]
      for t in places[0]
    ]
  )


def maximum(x):
  t, m, c = x.shape
  x = x[: t // 2 * 2, : m // 2 * 2].reshape(t // 2, 2, m // 2, 2, c)
  return x.max((1, 3))


# Convolutions, their stride, and zeros on both sides.
PLANES = {
  "vgg": (("vgg_0", "vgg_1", "vgg_2", "vgg_3"), 1, 1),
  "conv2d": (("conv_0", "conv_1"), 2, 0),
}


def by_loops(kind, p, x):
  if kind == "conv":
    for name in ("conv_0", "projection"):
      values, gates = np.split(conv1d(p[name], x, 2, 2), 2, axis=-1)
      x = 1.8460 * values / (1 + np.exp(-gates))
    return x
  x = x[..., None]
  names, stride, zeros = PLANES[kind]
  for i, name in enumerate(names):
    x = np.maximum(conv2d(p[name], x, stride, zeros), 0)
    if kind == "vgg" and i % 2:
      x = maximum(x)
  return x.reshape(len(x), -1) @ p["projection"]["kernel"] + p["projection"]["bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_utterance_is_numpys_alone_in_float64(kind):
  """Whatever stands behind its frames in the batch, and however much of it; 1e-11."""
  module, x = KINDS[kind].clone(dtype=jnp.float64), spectrograms().astype(np.float64)
  (found, lengths), params = in_float64(module, x, FRAMES)
  assert lengths.tolist() == [module.lengths(n) for n in FRAMES.tolist()]
  for row, frames, length in zip(range(3), FRAMES, lengths, strict=True):
    if length:
      expected = by_loops(kind, params, x[row, :frames])
      assert expected.shape == (length, WIDTH)
      np.testing.assert_allclose(found[row, :length], expected, rtol=0, atol=1e-11)
    assert not found[row, length:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_neither_a_value_nor_a_gradient(kind):
  """Of other lengths, and of numbers that are none; a gradient of what is padding is 0."""
  module, x = KINDS[kind], spectrograms()
  params = reference.random_params(module, x, FRAMES)
  weights = np.random.default_rng(1).normal(size=(3, 17, WIDTH)).astype(np.float32)

  @compiled
  def both(params, x):
    def cost(params, x):
      y, lengths = module.apply({"params": params}, x, FRAMES)
      return jnp.sum(y * weights[:, : y.shape[1]]), (y, lengths)

    return jax.grad(cost, (0, 1), has_aux=True)(params, x)

  (of_params, of_x), (y, lengths) = both(params, x)
  own = np.arange(17)[None] < FRAMES[:, None]
  assert not np.asarray(of_x)[~own].any()
  padded = np.full((3, 23, BINS), np.nan, np.float32)
  padded[:, :17][own] = x[own]
  (again, _), (longer, same) = both(params, padded)
  np.testing.assert_array_equal(same, lengths)
  np.testing.assert_allclose(longer[:, : y.shape[1]], y, rtol=0, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), again, of_params)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_params))


@pytest.mark.parametrize(
  ("kind", "of_98", "of_1000"), [("conv", 25, 250), ("vgg", 24, 250), ("conv2d", 23, 249)]
)
def test_lengths_are_the_published_ones(kind, of_98, of_1000):
  """Of integers, arrays and traced ones; and of each number of frames as many as come out."""
  module = KINDS[kind]
  assert (module.lengths(98), module.lengths(1000)) == (of_98, of_1000)
  assert isinstance(module.lengths(98), int) and module.lengths(0) == 0
  assert module.lengths(np.array([98, 1000, 0, 1])).tolist()[:3] == [of_98, of_1000, 0]
  assert jax.jit(module.lengths)(jnp.array([98, 1000])).tolist() == [of_98, of_1000]
  for frames in range(9, 26):
    x = jax.ShapeDtypeStruct((1, frames, BINS), jnp.float32)
    given = jax.ShapeDtypeStruct((1,), jnp.int32)
    (y, _), _ = jax.eval_shape(lambda *a: module.init_with_output(jax.random.key(0), *a), x, given)
    assert y.shape == (1, module.lengths(frames), WIDTH)


@pytest.mark.parametrize("kind", main_and_slow(KINDS, ("conv",)))
def test_what_goes_in_with_unit_variance_comes_out_so(kind):
  """At the start, by a projection that keeps variances; off what zeros and maxima change."""
  init = DenseInit(lecun_normal())
  sizes = {"conv": {"hidden": 256}, "vgg": {"channels": (16, 32)}, "conv2d": {}}[kind]
  module = type(KINDS[kind])(128, projection_init=init, **sizes)
  x = np.random.default_rng(0).normal(size=(2, 64, 40)).astype(np.float32)
  frames = np.array([64, 64])
  params = compiled(module.init)(jax.random.key(0), x, frames)["params"]
  y, _ = run(module, params, x, frames)
  low, high = {"conv": (0.7, 1.3), "vgg": (0.8, 6), "conv2d": (0.7, 1.3)}[kind]
  assert low < np.mean(np.square(y[:, 2:-2])) < high


def test_the_projection_is_drawn_as_it_is_told():
  for kind, module in KINDS.items():
    told = module.clone(projection_init=DenseInit(normal(3.0), lambda fan_in: normal(fan_in)))
    x = spectrograms(frames=17)
    projection = compiled(told.init)(jax.random.key(0), x, FRAMES)["params"]["projection"]
    assert np.std(projection["kernel"]) == pytest.approx(3, rel=0.2), kind
    fan_in = np.prod(projection["kernel"].shape[:-1])
    assert np.std(projection["bias"]) == pytest.approx(fan_in, rel=0.7), kind


def test_half_precision_stays_half():
  for module in KINDS.values():
    half = module.clone(dtype=jnp.bfloat16)
    init = lambda x, m=half: m.init_with_output(jax.random.key(0), x, FRAMES)
    (y, _), variables = jax.eval_shape(init, spectrograms())
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
  ("module", "shape", "message"),
  [
    (KINDS["vgg"], (1, 3, BINS), "3 frames are too few"),
    (KINDS["conv2d"], (1, 6, BINS), "6 frames are too few"),
    (KINDS["conv2d"], (1, 9, 6), "6 bins are too few"),
    (KINDS["conv"], (1, 0, BINS), "0 frames are too few"),
    (KINDS["conv"], (1, 9), r"spectrograms \[1, 9\] are not \[B, T, M\]"),
    (ConvSubsampling(4, kernel_size=4), (1, 9, BINS), "kernel_size=4 must be odd"),
    (ConvSubsampling(4, hidden=5), (1, 9, BINS), "hidden=5 even"),
  ],
)
def test_what_makes_no_vector_raises(module, shape, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape), jnp.array([1]))
