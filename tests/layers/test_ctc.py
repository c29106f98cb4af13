"""The CTC loss against a list of all alignments."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.layers import ctc_loss, is_alignable
from tests import alignments
from tests.models.common import compiled

# Of each utterance: frames, and its text; with repeats, without labels, as long as it can be.
UTTERANCES = [(4, (1, 2)), (4, (1, 1)), (1, ()), (3, (2, 2)), (4, (2, 1, 2)), (1, (1,)), (2, (2,))]
T, U, V = 4, 3, 3


def batch(utterances=UTTERANCES, blank=0, seed=0):
  """(logits, frames, labels, label lengths), large numbers and labels behind what is valid."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(len(utterances), T, V)) * 2
  labels = rng.integers(0, V, (len(utterances), U)).astype(np.int32)
  for b, (frames, text) in enumerate(utterances):
    logits[b, frames:] *= 1e3
    labels[b, : len(text)] = text
  frames, lengths = np.array([(t, len(text)) for t, text in utterances], np.int32).T
  return logits, frames, labels, lengths


def value_and_gradient(logits, frames, labels, lengths, **options):
  def run(logits):
    nats, back = jax.vjp(lambda z: ctc_loss(z, frames, labels, lengths, **options), logits)
    return nats, back(jnp.ones_like(nats))[0]

  return jax.tree.map(np.asarray, compiled(run)(logits))


@pytest.mark.parametrize("blank", (0, 2))
def test_value_and_gradient_are_those_of_all_alignments(blank):
  """float64, 1e-12; each utterance of a padded batch as by itself."""
  renamed = lambda text: tuple((k + blank) % V for k in text)
  utterances = [(frames, renamed(text)) for frames, text in UTTERANCES]
  logits, *rest = batch(utterances, blank)
  with jax.enable_x64(True):
    nats, gradient = value_and_gradient(logits, *rest, blank=blank)
  for b, (frames, text) in enumerate(utterances):
    expected, d = alignments.ctc(logits[b, :frames], text, blank)
    np.testing.assert_allclose(nats[b], expected, rtol=1e-12)
    np.testing.assert_allclose(gradient[b, :frames], d, rtol=0, atol=1e-12)
    assert not gradient[b, frames:].any()


def test_cases_worked_out_by_hand():
  """float32, to seven digits; of the first, P = 0.85 by six alignments."""
  two = [[0.6, 0.4, 0.0], [0.3, 0.7, 0.0], [0.5, 0.5, 0.0]]
  three = [[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.3, 0.3, 0.4]]
  cases = [
    (two, [1], 0.1625189),
    (two, [1, 1], 2.8134107),
    (three, [1], 1.2447948),
    (three, [1, 2], 1.5232602),
    (three, [], 2.8134107),
    (three, [2, 1, 2], 3.4420194),
    (three, [1, 1], 3.3242363),
  ]
  _, *sizes = batch([(3, text) for _, text, _ in cases])
  p = np.array([p for p, *_ in cases])
  logits = np.log(np.maximum(p, 1e-30)).astype(np.float32)
  nats, gradient = value_and_gradient(logits, *sizes)
  np.testing.assert_allclose(nats, [expected for *_, expected in cases], rtol=0, atol=5e-7)
  expected = [[0, 0, 0], [0.1235294, -0.1235294, 0], [0.0176471, -0.0176471, 0]]
  np.testing.assert_allclose(gradient[0], expected, rtol=0, atol=1e-6)


def test_no_labels_at_all():
  """An array of no columns: blanks alone."""
  logits = np.log(np.array([[[0.6, 0.4], [0.3, 0.7]]]))
  nats, _ = value_and_gradient(
    logits.astype(np.float32), np.array([2]), np.zeros((1, 0), np.int32), np.array([0])
  )
  np.testing.assert_allclose(nats, [-np.log(0.6 * 0.3)], rtol=1e-6)


def test_a_text_longer_than_its_sound_costs_nothing_and_is_told():
  """Its gradient is 0, and the others' are what they were; two equal labels need three frames."""
  utterances = [(1, (1, 2)), (2, (1, 1)), (0, ()), (3, (1, 1)), (2, (1, 2)), (3, (1, 1, 2))]
  logits, frames, labels, lengths = batch(utterances)
  told = compiled(is_alignable)(frames, labels, lengths)
  np.testing.assert_array_equal(told, [False, False, False, True, True, False])
  with jax.enable_x64(True):
    nats, gradient = value_and_gradient(logits, frames, labels, lengths)
  assert not nats[~told].any() and not gradient[~told].any()
  for b in np.flatnonzero(told):
    expected, d = alignments.ctc(logits[b, : frames[b]], utterances[b][1])
    np.testing.assert_allclose(nats[b], expected, rtol=1e-12)
    np.testing.assert_allclose(gradient[b, : frames[b]], d, rtol=0, atol=1e-12)


def test_unlikely_texts_are_finite():
  """2 x 10^5 nats, beyond optax's own logarithm of 0; there float32 is rounded to 1/64."""
  logits = np.zeros((1, 40, V), np.float32)
  logits[..., 0] = 1e4
  labels = np.arange(20, dtype=np.int32)[None] % 2 + 1
  nats, gradient = value_and_gradient(logits, np.array([40]), labels, np.array([20]))
  # Each label in one frame; the alignments with more are less likely by e^-10000.
  expected = 20 * 1e4 - np.log(float(math.comb(40, 20)))
  np.testing.assert_allclose(nats, [expected], rtol=1e-6)
  np.testing.assert_allclose(gradient.sum((0, 1)), [20, -10, -10], rtol=2 / 64)


def test_bfloat16_has_a_float32_softmax():
  logits, *rest = batch()
  nats, gradient = value_and_gradient(logits.astype(jnp.bfloat16), *rest)
  same, _ = value_and_gradient(logits.astype(jnp.bfloat16).astype(np.float32), *rest)
  assert nats.dtype == np.float32 and gradient.dtype == jnp.bfloat16
  np.testing.assert_allclose(nats, same, rtol=1e-6)


def test_what_does_not_belong_together_is_refused():
  logits, frames, labels, lengths = batch()
  with pytest.raises(ValueError, match=r"frames \[6\], labels \[7, 3\]"):
    ctc_loss(logits, frames[:6], labels, lengths)
  with pytest.raises(ValueError, match="blank=-1 must be one of the 3 ids"):
    ctc_loss(logits, frames, labels, lengths, blank=-1)
