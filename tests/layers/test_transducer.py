"""The transducer's loss against a list of all alignments, and what of it lives at a time."""

import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.layers import fused_transducer_loss, transducer_loss
from magneto_jax.layers.transducer import occupancies
from tests import alignments, simulated
from tests.models.common import compiled

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Of each utterance: frames and labels; no labels, one frame, more labels than frames.
SIZES = [(4, 3), (1, 0), (4, 0), (1, 3), (2, 1), (3, 3), (4, 2), (2, 3)]
T, U, V, J = 4, 3, 5, 6


def value_and_gradient(loss, *inputs, weights_B=None):
  """(nats, the gradient of their sum, or of a weighted one) of what `loss` makes of the inputs."""

  def run(*inputs):
    nats_B, back = jax.vjp(loss, *inputs)
    weights = jnp.ones_like(nats_B) if weights_B is None else weights_B.astype(nats_B.dtype)
    return nats_B, back(weights)

  return jax.tree.map(np.asarray, compiled(run)(*inputs))


def of_one(logits, labels, **options):
  """The same of one utterance, in float64."""
  with jax.enable_x64(True):
    logits = np.asarray(logits, np.float64)[None]
    frames, lengths = np.array([logits.shape[1]]), np.array([len(labels)])
    labels = np.array([labels], np.int32).reshape(1, -1)
    loss = lambda z: transducer_loss(z, frames, labels, lengths, **options)
    nats_B, (d_BTXV,) = value_and_gradient(loss, logits)
  return nats_B[0], d_BTXV[0]


def batch(blank=0, seed=0):
  """(logits, frames, labels, label lengths), large numbers and labels behind what is valid."""
  rng = np.random.default_rng(seed)
  frames, lengths = np.array(SIZES, np.int32).T
  logits = rng.normal(size=(len(SIZES), T, U + 1, V)) * 2
  labels = rng.choice([k for k in range(V) if k != blank], (len(SIZES), U)).astype(np.int32)
  for b, (t, u) in enumerate(SIZES):
    logits[b, t:] = rng.normal(size=logits[b, t:].shape) * 1e3
    logits[b, :, u + 1 :] = rng.normal(size=logits[b, :, u + 1 :].shape) * 1e3
  return logits, frames, labels, lengths


@pytest.mark.parametrize("blank", (0, 3))
def test_value_and_gradient_are_those_of_all_alignments(blank):
  """float64, 1e-12; each utterance of a padded batch as by itself, whatever lies behind."""
  logits, frames, labels, lengths = batch(blank)
  for b, (t, u) in enumerate(SIZES):
    logits[b, t:, 0], logits[b, t:, 1] = np.inf, np.nan
    labels[b, u:] = 99
  weights = np.linspace(-1, 2, len(SIZES))
  with jax.enable_x64(True):
    loss = lambda z: transducer_loss(z, frames, labels, lengths, blank=blank)
    nats, (gradient,) = value_and_gradient(loss, logits, weights_B=weights)
  for b, (t, u) in enumerate(SIZES):
    expected, d, *_ = alignments.transducer(logits[b, :t, : u + 1], labels[b, :u], blank)
    np.testing.assert_allclose(nats[b], expected, rtol=1e-12)
    whole = np.zeros(logits.shape[1:])
    whole[:t, : u + 1] = d * weights[b]
    np.testing.assert_allclose(gradient[b], whole, rtol=0, atol=1e-12)


def test_occupancies_are_those_of_all_alignments():
  """Of every label they sum to 1 over the frames, of every frame's blank over the columns."""
  logits, frames, labels, lengths = batch()
  log_p = alignments.log_softmax(logits)
  padded = np.pad(labels, ((0, 0), (0, 1)))
  label = np.take_along_axis(log_p, padded[:, None, :, None], axis=-1)[..., 0]
  with jax.enable_x64(True):
    found = compiled(occupancies)(log_p[..., 0], label, frames, lengths)
    found = jax.tree.map(np.asarray, found)
  for b, (t, u) in enumerate(SIZES):
    _, _, blanks, says = alignments.transducer(logits[b, :t, : u + 1], labels[b, :u])
    for plane, expected in ((found.blank_BTX[b], blanks), (found.label_BTX[b], says)):
      np.testing.assert_allclose(plane[:t, : u + 1], expected, rtol=0, atol=1e-12)
      assert not plane[t:].any() and not plane[:, u + 1 :].any()
    np.testing.assert_allclose(found.blank_BTX[b, :t].sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(found.label_BTX[b, :, :u].sum(0), 1, rtol=1e-12)


# ---------------------------------------------------------------------------------------------
# Cases with known answers
# ---------------------------------------------------------------------------------------------

TWO_FRAMES = np.log([[[0.6, 0.4], [0.7, 0.3]], [[0.5, 0.5], [0.8, 0.2]]])


def test_two_frames_and_a_label():
  """P = 0.4 0.7 0.8 + 0.6 0.5 0.8."""
  nats, d = of_one(TWO_FRAMES, [1])
  np.testing.assert_allclose(nats, -math.log(0.464), rtol=1e-12)
  expected = [
    [[0.0827586, -0.0827586], [-0.1448276, 0.1448276]],
    [[0.2586207, -0.2586207], [-0.2, 0.2]],
  ]
  np.testing.assert_allclose(d, expected, rtol=0, atol=1e-7)


def test_an_empty_text_is_blanks_alone():
  np.testing.assert_allclose(of_one(TWO_FRAMES[:, :1], [])[0], -math.log(0.3), rtol=1e-12)


def test_the_case_that_implementations_publish():
  """Of warp-transducer and those after it."""
  logits = [
    [[0.1, 0.6, 0.1, 0.1, 0.1], [0.1, 0.1, 0.6, 0.1, 0.1], [0.1, 0.1, 0.2, 0.8, 0.1]],
    [[0.1, 0.6, 0.1, 0.1, 0.1], [0.1, 0.1, 0.2, 0.1, 0.1], [0.7, 0.1, 0.2, 0.1, 0.1]],
  ]
  nats, d = of_one(logits, [1, 2])
  np.testing.assert_allclose(nats, 4.4956668, rtol=0, atol=1e-7)
  first = [-0.131167, -0.399927, 0.177031, 0.177031, 0.177031]
  last = [-0.692588, 0.168711, 0.186455, 0.168711, 0.168711]
  np.testing.assert_allclose(d[0, 0], first, rtol=0, atol=1e-6)
  np.testing.assert_allclose(d[1, 2], last, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  "length, labels, vocab_size", [(2, 1, 2), (3, 2, 3), (4, 3, 5), (10, 4, 5)]
)
def test_of_equal_logits_it_counts_the_alignments(length, labels, vocab_size):
  """(T + U) log V - log C(T - 1 + U, U); of (4, 3, 5), 8.2703331."""
  nats, _ = of_one(np.zeros((length, labels + 1, vocab_size)), [1] * labels)
  paths = math.comb(length - 1 + labels, labels)
  expected = (length + labels) * math.log(vocab_size) - math.log(paths)
  np.testing.assert_allclose(nats, expected, rtol=1e-12)


# ---------------------------------------------------------------------------------------------
# What cannot be, and what is long
# ---------------------------------------------------------------------------------------------


def test_an_impossible_text_costs_infinity_and_one_without_frames_nothing():
  """Neither has a gradient; and they reach the others as little as what is not a number."""
  logits, frames, labels, lengths = batch()
  expected = alignments.transducer(logits[0, :, :], labels[0])
  logits[4, :, :, labels[4, 0]] = -np.inf
  logits[6, 1, 1] = np.nan
  frames[[5, 2]] = 0
  with jax.enable_x64(True):
    loss = lambda z: transducer_loss(z, frames, labels, lengths)
    nats, (gradient,) = value_and_gradient(loss, logits)
  assert np.isnan(nats[6]) and nats[4] == np.inf and nats[5] == nats[2] == 0
  assert not gradient[[4, 5, 2]].any()
  np.testing.assert_allclose(nats[0], expected[0], rtol=1e-12)
  np.testing.assert_allclose(gradient[0], expected[1], rtol=0, atol=1e-12)


def test_long_lattices_are_as_exact_in_float32():
  """-log P is in the thousands, whose rounding alone would be 1e-4 of each occupancy."""
  rng = np.random.default_rng(0)
  planes = rng.normal(-9.0, 2.0, size=(2, 2, 250, 41)).astype(np.float32)
  sizes = np.array([250, 200], np.int32), np.array([40, 33], np.int32)
  # What is likelier by thousands behind the last label must not be what the rest is measured by.
  planes[0, 1, :, 34:] = planes[1, 1, :, 33:] = 0
  found = compiled(occupancies)(*planes, *sizes)
  with jax.enable_x64(True):
    expected = compiled(occupancies)(*planes.astype(np.float64), *sizes)
  assert found.nats_B[0] > 2000
  np.testing.assert_allclose(found.nats_B, expected.nats_B, rtol=2e-7)
  for a, b in zip(found[1:], expected[1:], strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# By chunks of frames
# ---------------------------------------------------------------------------------------------


def joiner(seed=0, length=T, dtype=np.float64):
  """(e, g, W, b)."""
  rng = np.random.default_rng(seed)
  shapes = ((len(SIZES), length, J), (len(SIZES), U + 1, J), (J, V), (V,))
  return [(rng.normal(size=shape) * 1.5).astype(dtype) for shape in shapes]


def of_all_logits(frames, labels, lengths, **options):
  """The loss of the same joiner, with its gradient by autodiff."""

  def loss(e, g, kernel, bias):
    hidden = jnp.tanh(e[:, :, None] + g[:, None])
    wide = jnp.promote_types(e.dtype, jnp.float32)
    kernel = kernel.astype(e.dtype)
    logits = jnp.einsum("btxj,jv->btxv", hidden, kernel, preferred_element_type=wide)
    logits += bias.astype(wide)[None, None, None]
    return transducer_loss(logits, frames, labels, lengths, **options)

  return loss


@pytest.mark.parametrize("chunk", (1, 3, 99))
def test_chunks_change_nothing(chunk):
  """Values and all gradients, float64, to 1e-12; also where the last chunk is padded.

  So with logits that are larger by a constant, whose exponential is infinite: to 1e-9.
  """
  _, *rest = batch(blank=3)
  weights = np.linspace(-1, 2, len(SIZES))
  *given, bias = joiner(length=T + 1)
  with jax.enable_x64(True):
    whole = of_all_logits(*rest, blank=3)
    expected = value_and_gradient(whole, *given, bias, weights_B=weights)
    by_chunks = lambda *given: fused_transducer_loss(*given, *rest, blank=3, chunk=chunk)
    found = value_and_gradient(by_chunks, *given, bias, weights_B=weights)
    large = value_and_gradient(by_chunks, *given, bias + 1e3, weights_B=weights)
  for a, b in zip(jax.tree.leaves(large), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_padding_changes_nothing():
  """More frames, more columns and other chunks around the same utterances; its gradient is 0."""
  _, frames, labels, lengths = batch()
  e, g, kernel, bias = joiner()
  with jax.enable_x64(True):
    loss = lambda *given: fused_transducer_loss(*given, frames, labels, lengths, chunk=2)
    expected = value_and_gradient(loss, e, g, kernel, bias)
    more = lambda x, count: np.pad(x, ((0, 0), (0, count), (0, 0)), constant_values=7.0)
    wider = np.pad(labels, ((0, 0), (0, 2)), constant_values=2)
    loss = lambda *given: fused_transducer_loss(*given, frames, wider, lengths, chunk=3)
    found = value_and_gradient(loss, more(e, 3), more(g, 2), kernel, bias)
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
  (de, dg, *params), (de_0, dg_0, *params_0) = found[1], expected[1]
  assert not de[:, T:].any() and not dg[:, U + 1 :].any()
  pairs = [(de[:, :T], de_0), (dg[:, : U + 1], dg_0), *zip(params, params_0, strict=True)]
  for a, b in pairs:
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_bfloat16_has_a_float32_softmax():
  """And float32 logits; gradients against float64, as tanh and the logits' gradient are rounded."""
  _, *rest = batch()
  inputs = joiner(dtype=jnp.bfloat16)
  loss = lambda *given: fused_transducer_loss(*given, *rest, chunk=2)
  nats, gradients = value_and_gradient(loss, *inputs)
  assert nats.dtype == np.float32
  assert {a.dtype for a in gradients} == {jnp.bfloat16.dtype}
  same, _ = value_and_gradient(of_all_logits(*rest), *inputs)
  np.testing.assert_allclose(nats, same, rtol=1e-6)
  with jax.enable_x64(True):
    wide = [np.asarray(x, np.float64) for x in inputs]
    _, expected = value_and_gradient(of_all_logits(*rest), *wide)
  for a, b in zip(gradients, expected, strict=True):
    atol = 0.02 * np.abs(b).max()
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=atol)


def test_no_more_than_a_chunk_of_logits_lives():
  """Temporaries of the gradient: a few chunks' logits, beside numbers by cell; not two of T."""
  sizes = dict(batch=2, length=64, columns=16, width=8, vocab_size=512)
  B, frames, X, width, vocab = sizes.values()

  def temporaries(loss):
    shapes = ((B, frames, width), (B, X, width), (width, vocab), (vocab,))
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    counts = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((B,), (B, X - 1), (B,))]
    step = compiled(jax.grad(lambda *given: loss(*given).sum(), (0, 1, 2, 3)))
    return step.lower(*given, *counts).compile().memory_analysis().temp_size_in_bytes

  whole = lambda *given: of_all_logits(*given[4:])(*given[:4])
  logits = B * frames * X * vocab * 4
  assert temporaries(whole) > 2 * logits
  small = temporaries(lambda *given: fused_transducer_loss(*given, chunk=4))
  assert small < 4 * logits * 4 / frames + 40 * B * frames * X * 4


def test_on_a_mesh_no_logits_cross_it_within_the_loops():
  """On 4 simulated devices; see `tests/layers/sharded_transducer.py`."""
  command = [sys.executable, "-m", "tests.layers.sharded_transducer"]
  subprocess.run(command, check=True, cwd=ROOT, env=simulated.devices(4))


def test_it_is_differentiated_once_and_backwards_only():
  logits, *rest = batch()
  call = lambda z: transducer_loss(z, *rest).sum()
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jit(lambda z: jax.jvp(call, (z,), (z,))).lower(logits)
  with pytest.raises(TypeError, match="a transducer's loss can be differentiated once"):
    jax.eval_shape(jax.grad(lambda z: jnp.sum(jax.grad(call)(z) ** 2)), logits)
  fused = lambda e, *others: fused_transducer_loss(e, *others, *rest).sum()
  e, *others = joiner(dtype=np.float32)
  with pytest.raises(TypeError, match="a transducer's loss can be differentiated once"):
    jax.eval_shape(jax.hessian(lambda kernel: fused(e, others[0], kernel, others[2])), others[1])
  # Computed again, it is differentiated once all the same.
  jax.eval_shape(jax.grad(jax.checkpoint(call)), logits)


def test_what_does_not_belong_together_is_refused():
  logits, frames, labels, lengths = batch()
  with pytest.raises(ValueError, match=r"labels \[8, 2\] must be \[8, 3\]"):
    transducer_loss(logits, frames, labels[:, :2], lengths)
  with pytest.raises(ValueError, match=r"frames \[7\] and label lengths \[8\] must be \[8\]"):
    transducer_loss(logits, frames[:7], labels, lengths)
  with pytest.raises(ValueError, match="blank=5 must be one of the 5 ids"):
    transducer_loss(logits, frames, labels, lengths, blank=5)
  with pytest.raises(ValueError, match="chunk=0 must be at least one frame"):
    fused_transducer_loss(*joiner(), frames, labels, lengths, chunk=0)
  e, g, kernel, bias = joiner()
  with pytest.raises(ValueError, match=r"kernel \[6, 5\] and bias \[4\] must be"):
    fused_transducer_loss(e, g, kernel, bias[:4], frames, labels, lengths)
