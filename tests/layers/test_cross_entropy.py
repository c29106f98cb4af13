"""The loss over a vocabulary, against a loop in float64, and what of it lives at a time."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from magneto_jax.layers import binary_cross_entropy, cross_entropy, vocabulary_logits
from tests import simulated
from tests.models.common import compiled

ROOT = pathlib.Path(__file__).resolve().parents[2]
B, T, D = 2, 3, 5


def brute_force(x, table, targets, bias, dnats, smoothing=0.0):
  """(nats, dx, dtable, dbias) in float64, a token at a time."""
  x, table, bias, dnats = (np.asarray(a, np.float64) for a in (x, table, bias, dnats))
  V = len(table)
  nats = np.zeros(targets.shape)
  dx, dtable, dbias = np.zeros_like(x), np.zeros_like(table), np.zeros_like(bias)
  for b, t in np.ndindex(*targets.shape):
    z = table @ x[b, t] + bias
    log_p = z - z.max() - np.log(np.sum(np.exp(z - z.max())))
    q = np.full(V, smoothing / (V - 1))
    q[targets[b, t]] = 1 - smoothing
    nats[b, t] = -q @ log_p
    dz = (np.exp(log_p) - q) * dnats[b, t]
    dx[b, t] = dz @ table
    dtable += np.outer(dz, x[b, t])
    dbias += dz
  return nats, dx, dtable, dbias


def arrays(V, dtype=np.float64, scale=1.0, seed=0):
  """(x, table, targets, bias, dnats); what the products take is exact in the dtype."""
  rng = np.random.default_rng(seed)
  x, table = rng.normal(size=(B, T, D)) * scale, rng.normal(size=(V, D))
  x, table = (a.astype(dtype).astype(np.float64) for a in (x, table))
  targets = rng.integers(0, V, (B, T)).astype(np.int32)
  return x, table, targets, rng.normal(size=V), rng.normal(size=(B, T))


def values_and_gradients(x, table, targets, bias, dnats, **options):
  def call(x, table, bias):
    return cross_entropy(x, table, targets, bias, **options)

  def run(x, table, bias, dnats):
    nats, back = jax.vjp(call, x, table, bias)
    return nats, *back(dnats.astype(nats.dtype))

  return compiled(run)(x, table, bias, dnats)


# (V, rows of a chunk, parts, smoothing): all at once; one chunk; a divisor of V, and none; a row a
# chunk; more rows than there are; parts, with a divisor of theirs and without.
CUTS = [
  *((14, 0, 1, 0.0), (14, 0, 1, 0.1)),
  *((14, 14, 1, 0.0), (14, 7, 1, 0.0), (14, 4, 1, 0.1), (14, 1, 1, 0.0), (14, 99, 1, 0.0)),
  *((14, 7, 2, 0.0), (14, 4, 2, 0.1), (20, 3, 4, 0.0)),
]


@pytest.mark.parametrize("V, chunk, parts, smoothing", CUTS)
def test_values_and_gradients_are_those_of_the_definition(V, chunk, parts, smoothing):
  """float64, 1e-12; the first and the last token of the vocabulary among the targets."""
  given = arrays(V)
  given[2][0, :2] = 0, V - 1
  expected = brute_force(*given, smoothing)
  with jax.enable_x64(True):
    found = values_and_gradients(*given, chunk=chunk, parts=parts, smoothing=smoothing)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", (np.float32, jnp.bfloat16))
def test_logits_of_any_size_and_targets_all_in_the_last_chunk(dtype):
  """Logits to +-10^4, of which exp overflows; the features' rounding is that of their dtype."""
  given = arrays(14, dtype, scale=4000.0)
  given[2][:] = 13, 12, 13
  expected = brute_force(*given)
  assert 1e4 < np.abs(expected[0]).max() < 1e5
  x, *others = (a if a.dtype == np.int32 else a.astype(np.float32) for a in given)
  found = values_and_gradients(x.astype(dtype), *others, chunk=4, parts=2)
  assert found[0].dtype == np.float32
  assert [a.dtype for a in found[1:]] == [dtype, np.float32, np.float32]
  rounding = float(jnp.finfo(dtype).eps)
  for a, b, r in zip(found, expected, (1e-6, rounding, rounding, 1e-6), strict=True):
    a = np.asarray(a, np.float64)
    np.testing.assert_allclose(a, b, rtol=0, atol=2 * r * np.abs(b).max())


@pytest.mark.parametrize("dtype", (np.float32, jnp.bfloat16))
def test_chunks_change_nothing_but_rounding(dtype):
  """Of all logits at once, which is the loss of optax to the bit."""
  x, table, targets, bias, dnats = arrays(200, dtype)
  table, bias, dnats = (a.astype(np.float32) for a in (table, bias, dnats))
  x = x.astype(dtype)
  whole = values_and_gradients(x, table, targets, bias, dnats)
  logits = vocabulary_logits(x, table, bias)
  expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  np.testing.assert_array_equal(cross_entropy(x, table, targets, bias), expected)
  found = values_and_gradients(x, table, targets, bias, dnats, chunk=30, parts=2)
  eps = float(jnp.finfo(dtype).eps)
  for a, b, r in zip(found, whole, (1e-6, eps, eps, 1e-6), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    a, b = (np.asarray(array, np.float64) for array in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=2 * r * np.abs(b).max())


def test_words_that_cannot_be_said():
  """A bias of -inf, for all of the first chunk."""
  x, table, targets, bias, dnats = arrays(14)
  bias[:5], targets[:] = -np.inf, 9
  with jax.enable_x64(True):
    found = values_and_gradients(x, table, targets, bias, dnats, chunk=4, parts=2)
  expected = brute_force(x, table[5:], targets - 5, bias[5:], dnats)
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
  np.testing.assert_allclose(found[1], expected[1], rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(found[2][5:], expected[2], rtol=1e-12, atol=1e-12)
  assert not found[2][:5].any()


def test_no_more_than_a_chunk_of_logits_lives():
  """Temporaries of the gradient: two chunks of logits beside the features, not two of V."""
  tokens, width, V = 64, 8, 32_768

  def temporaries(chunk: int) -> int:
    shapes = ((1, tokens, width), (V, width))
    x, table = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    loss = lambda x, table, targets: cross_entropy(x, table, targets, chunk=chunk).sum()
    step = compiled(jax.grad(loss, (0, 1)))
    lowered = step.lower(x, table, jax.ShapeDtypeStruct((1, tokens), jnp.int32))
    return lowered.compile().memory_analysis().temp_size_in_bytes

  logits = tokens * V * 4
  assert temporaries(0) > logits
  small, large = temporaries(1024), temporaries(4096)
  # Of the table there may be one copy: the gradient that the loop carries.
  assert large < logits / 8 * 2.5 + V * width * 4 and small < logits / 32 * 2.5 + V * width * 4
  assert small < large / 2


def test_it_is_differentiated_once_and_backwards_only():
  x, table, targets, _, _ = arrays(14, np.float32)
  x, table = x.astype(np.float32), table.astype(np.float32)
  call = lambda x: cross_entropy(x, table, targets, chunk=4).sum()
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(call, (x,), (x,))


def test_parts_that_do_not_divide_the_vocabulary_are_refused():
  x, table, targets, _, _ = arrays(14, np.float32)
  with pytest.raises(ValueError, match="3 parts of a vocabulary must divide its 14 rows"):
    cross_entropy(x, table, targets, chunk=4, parts=3)


def test_on_a_mesh_nothing_of_the_stream_crosses_it_within_the_loop():
  """On 8 simulated devices; see `tests/layers/sharded_cross_entropy.py`."""
  command = [sys.executable, "-m", "tests.layers.sharded_cross_entropy"]
  subprocess.run(command, check=True, cwd=ROOT, env=simulated.devices(8))


def test_answers_that_are_each_right_or_wrong():
  """Known values; and of logits so far out that a sigmoid is 0 or 1, what is left of them."""
  tiny = binary_cross_entropy(np.float32([[2, -1, 0]]), np.float32([[1, 0.3, 0]]))
  assert float(tiny[0]) == pytest.approx(1.4333369, abs=1e-6)
  even = binary_cross_entropy(jnp.zeros((2, 3129), jnp.bfloat16), np.ones((2, 3129), np.float32))
  assert even.shape == (2,) and even.dtype == jnp.float32
  np.testing.assert_allclose(even, 2168.8575, rtol=1e-6)
  far = binary_cross_entropy(np.float32([[200, -200, 200]]), np.float32([[1, 0, 0]]))
  assert float(far[0]) == 200.0
