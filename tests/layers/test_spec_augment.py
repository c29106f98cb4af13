"""SpecAugment: what is drawn, from which ranges, and what it depends on."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from magneto_jax.layers import SpecAugment, spec_augment

BINS = 12
augmented = jax.jit(spec_augment, static_argnums=3)


@functools.lru_cache
def draws(policy, frames, *, count=3000, length=40, bins=BINS):
  """[count, T, M]: what is hidden of spectrograms of ones, each with a key of its own."""
  keys = jax.random.split(jax.random.key(0), count)
  one = lambda key: spec_augment(key, jnp.ones((1, length, bins)), jnp.array([frames]), policy)[0]
  return np.asarray(jax.jit(jax.vmap(one))(keys)) == 0


def is_uniform(values, among):
  """Of a chi-square test; once in 10,000 it would be wrong of other keys."""
  counts = np.bincount(values, minlength=among)
  assert len(counts) == among, counts
  return among == 1 or scipy.stats.chisquare(counts).pvalue > 1e-4


def ends(hidden_NS):
  """(width, start) of the one band of each row; rows of no band have none."""
  widths = hidden_NS.sum(1)
  some = widths > 0
  return widths, np.argmax(hidden_NS[some], axis=1), widths[some]


def test_a_band_of_frequencies_is_drawn_from_its_ranges():
  """f of 0 .. F-1, and f_0 of 0 .. M-f-1, all as likely; every frame hides the same."""
  hidden = draws(SpecAugment(frequency_masks=1, frequency_width=5), 40)
  assert np.all(hidden == hidden[:, :1])
  widths, starts, of_starts = ends(hidden[:, 0])
  assert is_uniform(widths, 5)
  for width in range(1, 5):
    assert is_uniform(starts[of_starts == width], BINS - width)


@pytest.mark.parametrize(
  ("width", "share", "frames", "widest"),
  [(6, 1.0, 30, 6), (100, 0.2, 30, 6), (0, 0.2, 30, 6), (100, 1.0, 7, 7), (0, 0.05, 40, 2)],
)
def test_a_band_of_time_is_drawn_from_its_ranges(width, share, frames, widest):
  """t of 0 .. min(T, floor(p tau)) - 1, and t_0 of 0 .. tau-t-1, all as likely."""
  policy = SpecAugment(time_masks=1, time_width=width, time_share=share)
  hidden = draws(policy, frames)
  assert np.all(hidden == hidden[:, :, :1]) and not hidden[:, frames:].any()
  widths, starts, of_starts = ends(hidden[..., 0])
  assert is_uniform(widths, widest)
  for t in range(1, widest):
    assert is_uniform(starts[of_starts == t], frames - t)


@pytest.mark.parametrize(
  ("policy", "frames", "bands", "widest"),
  [
    (SpecAugment(time_masks=3, time_width=5), 40, 3, 5),
    (SpecAugment(time_masks=20, time_width=5, time_mask_share=0.1), 40, 4, 5),
    (SpecAugment(time_masks=2, time_width=5, time_mask_share=0.1), 40, 2, 5),
    (SpecAugment(time_masks=20, time_width=0, time_share=0.1, time_mask_share=0.1), 39, 3, 3),
    (SpecAugment(time_masks=20, time_width=0, time_share=0.04, time_mask_share=0.04), 24, 0, 0),
    (SpecAugment(frequency_masks=2, frequency_width=5), 40, 2, 5),
  ],
)
def test_there_are_as_many_bands_as_the_policy_has(policy, frames, bands, widest):
  """By how often each place is hidden: 1 - (1 - q)^n, with q that of one band; 5 deviations."""
  hidden = draws(policy, frames)
  of_time = bool(policy.time_masks)
  size = frames if of_time else BINS
  found = (hidden[:, :frames, 0] if of_time else hidden[:, 0]).mean(0)
  one = np.zeros(size)
  for width in range(widest):
    for start in range(size - width):
      one[start : start + width] += 1 / widest / (size - width)
  expected = 1 - (1 - one) ** bands
  deviation = np.sqrt(np.maximum(expected * (1 - expected), 1e-12) / len(hidden))
  assert np.all(np.abs(found - expected) <= 5 * deviation)


def test_each_utterance_is_drawn_by_itself_and_by_its_own_length():
  """No two rows of a batch hide the same, and none behind its frames, of which it may have none."""
  policy = SpecAugment(2, 5, time_masks=4, time_width=0, time_share=0.5)
  mel = np.random.default_rng(0).normal(size=(4, 40, BINS)).astype(np.float32)
  frames = np.array([40, 40, 10, 0])
  found = np.asarray(augmented(jax.random.key(1), mel, frames, policy))
  hidden = found == 0
  assert np.array_equal(found[~hidden], mel[~hidden])
  assert np.any(hidden[0] != hidden[1])
  assert not np.all(hidden[2, 10:], axis=-1).any()
  # Of no frames: no band of time.
  assert np.all(hidden[3] == hidden[3, :1])


def test_what_is_hidden_is_a_function_of_key_and_length():
  """The same again, compiled or not, however far the batch is padded; not by another key."""
  policy = SpecAugment(2, 5, time_masks=20, time_width=7, time_share=0.9, time_mask_share=0.2)
  mel, frames = np.ones((3, 40, BINS), np.float32), np.array([40, 31, 5])
  found = spec_augment(jax.random.key(3), mel, frames, policy)
  np.testing.assert_array_equal(augmented(jax.random.key(3), mel, frames, policy), found)
  longer = np.ones((3, 64, BINS), np.float32)
  padded = augmented(jax.random.key(3), longer, frames, policy)
  np.testing.assert_array_equal(padded[:, :40], found)
  assert np.any(augmented(jax.random.key(4), mel, frames, policy) != found)


def test_shares_are_of_whole_frames_for_every_length():
  """floor(p tau) as in float64: the widest band that is drawn is one less."""
  length = 400
  keys = jax.random.split(jax.random.key(0), 200)
  frames = np.array([100, 140, 200, 300, 400])
  policy = SpecAugment(time_masks=1, time_width=0, time_share=0.05)
  one = lambda key: spec_augment(key, jnp.ones((len(frames), length, 1)), frames, policy)
  widths = np.asarray(jax.jit(jax.vmap(one))(keys) == 0).sum((2, 3))
  assert widths.max(0).tolist() == [math.floor(0.05 * n) - 1 for n in frames]


def test_nothing_is_hidden_by_default_and_a_gradient_passes_where_nothing_is():
  mel = np.random.default_rng(0).normal(size=(2, 9, BINS)).astype(np.float32)
  frames = np.array([9, 4])
  np.testing.assert_array_equal(augmented(jax.random.key(0), mel, frames, SpecAugment()), mel)
  policy = SpecAugment(1, 8, time_masks=1, time_width=5)
  hidden = augmented(jax.random.key(0), mel, frames, policy) == 0
  gradient = jax.grad(lambda m: jnp.sum(augmented(jax.random.key(0), m, frames, policy)))(mel)
  np.testing.assert_array_equal(gradient, ~hidden)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"time_masks": 1.5}, "must have counts and widths that are integers"),
    ({"time_masks": -1}, "must have counts of at least 0"),
    ({"time_share": 0.0}, "and shares of at most 1"),
    ({"time_mask_share": 1.1}, "and shares of at most 1"),
    ({"frequency_masks": 1, "frequency_width": 13}, "frequency_width=13 is more than the 12 bins"),
  ],
)
def test_a_policy_that_cannot_be_raises(fields, message):
  with pytest.raises(ValueError, match=message):
    spec_augment(jax.random.key(0), jnp.ones((1, 4, BINS)), jnp.array([4]), SpecAugment(**fields))
