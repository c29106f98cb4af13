"""Log-mel spectrograms against SciPy in float64, on real utterances; frames and their counts."""

import csv
import importlib.resources
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import soundfile

from magneto_jax.layers import frame_counts, log_mel, normalize_mel
from magneto_jax.layers.log_mel import mel_filters

# A short one, one with loud and silent parts, and a long one.
NAMES = {"en": ("activated", "followme/sorry"), "fr": ("activated",)}


# Compiled, in which all of it is one program.
compiled = jax.jit(log_mel, static_argnames=("sample_rate", "mel_bins"))


def utterances():
  """Samples int16 at 8 kHz of prompts that the package has."""
  folder = importlib.resources.files("magneto_jax") / "data" / "embedded" / "speech"
  found = []
  for language, names in NAMES.items():
    blob = (folder / f"{language}.gsm.bin").read_bytes()
    text = (folder / f"{language}.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    for row in rows:
      if row["name"] in names:
        start = int(row["offset"])
        sound = io.BytesIO(blob[start : start + int(row["bytes"])])
        options = {"format": "RAW", "subtype": "GSM610", "samplerate": 8000, "channels": 1}
        found.append(soundfile.read(sound, dtype="int16", **options)[0])
  assert len(found) == sum(map(len, NAMES.values()))
  return found


def by_scipy(wave, sample_rate, bins):
  """The energies [T, M] of float64 samples in [-1, 1], window by window."""
  window, hop = sample_rate // 40, sample_rate // 100
  povey = np.array(
    [(0.5 - 0.5 * math.cos(2 * math.pi * n / (window - 1))) ** 0.85 for n in range(window)]
  )
  size = 2 ** math.ceil(math.log2(window))
  mel = lambda hertz: 1127 * math.log(1 + hertz / 700)
  low, high = mel(20), mel(sample_rate / 2)
  width = (high - low) / (bins + 1)
  filters = np.zeros((size // 2 + 1, bins))
  for f in range(size // 2 + 1):
    at = mel(f * sample_rate / size)
    for m in range(bins):
      left, peak, right = (low + (m + i) * width for i in range(3))
      if left < at <= peak:
        filters[f, m] = (at - left) / (peak - left)
      elif peak < at < right:
        filters[f, m] = (right - at) / (right - peak)
  energies = []
  for start in range(0, len(wave) - window + 1, hop):
    x = wave[start : start + window].astype(np.float64)
    x = x - x.mean()
    y = x.copy()
    y[1:] -= 0.97 * x[:-1]
    y[0] -= 0.97 * x[0]
    energies.append(np.abs(scipy.fft.rfft(y * povey, size)) ** 2 @ filters)
  return np.array(energies)


@pytest.mark.parametrize(("sample_rate", "bins"), [(8000, 80), (16000, 40)])
def test_it_is_scipys_in_float64(sample_rate, bins):
  """Of real utterances, whatever rate they are taken for; 1e-9."""
  for wave in utterances()[:2]:
    wave = wave / 2**15
    with jax.enable_x64(True):
      found = compiled(jnp.asarray(wave)[None], sample_rate=sample_rate, mel_bins=bins)[0]
    assert found.dtype == jnp.float64
    expected = np.log(np.maximum(by_scipy(wave, sample_rate, bins), 1e-10))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_it_is_scipys_in_float32():
  """Of int16 samples: to 1e-5 where a bin has a thousandth of its frame's largest, or more.

  An error of the last bit of a frame's largest amplitude is more of the smallest ones: all are off
  by 1e-3 at most, and by 1e-5 on average.
  """
  longest = max(utterances(), key=len)
  energies = by_scipy(longest / 2**15, 8000, 80)
  found = compiled(longest[None], sample_rate=8000)[0]
  assert found.dtype == jnp.float32 and found.shape == energies.shape
  off = np.abs(np.asarray(found, np.float64) - np.log(np.maximum(energies, 1e-10)))
  large = energies >= 1e-3 * energies.max(axis=1, keepdims=True)
  assert large.mean() > 0.2
  assert off[large].max() < 1e-5
  assert off.max() < 1e-3 and off.mean() < 1e-5


def test_a_tone_is_loudest_in_its_bin():
  """With M + 1 equal steps of mel from 20 Hz to half the rate, the m-th peak is m + 1 steps up."""
  mel = lambda hertz: 1127 * math.log(1 + hertz / 700)
  step = (mel(4000) - mel(20)) / 24
  times = np.arange(8000) / 8000
  for bin_ in (5, 12, 20):
    hertz = 700 * (math.exp((mel(20) + (bin_ + 1) * step) / 1127) - 1)
    wave = 0.5 * np.sin(2 * np.pi * hertz * times).astype(np.float32)
    found = compiled(wave[None], sample_rate=8000, mel_bins=23)[0]
    assert set(np.argmax(found, axis=1).tolist()) == {bin_}


def test_a_frame_reads_its_window_alone():
  wave = np.random.default_rng(0).normal(size=(1, 1000)).astype(np.float32) / 10
  sums = lambda wave: jnp.sum(log_mel(wave, sample_rate=8000, mel_bins=23)[0], axis=1)
  reads = np.abs(jax.jit(jax.jacrev(sums))(wave)[:, 0]) > 0
  assert reads.shape[0] == 11
  for t, row in enumerate(reads):
    places = np.flatnonzero(row)
    assert (places.min(), places.max()) == (80 * t, 80 * t + 199)


def test_silence_is_the_floor_and_int16_are_parts_of_one():
  silence = compiled(np.zeros((2, 400), np.int16), sample_rate=8000)
  np.testing.assert_allclose(silence, math.log(1e-10), rtol=1e-6)
  wave = np.random.default_rng(0).integers(-(2**15), 2**15, (2, 400)).astype(np.int16)
  as_floats = (wave / 2**15).astype(np.float32)
  both = [compiled(x, sample_rate=8000) for x in (wave, as_floats)]
  np.testing.assert_array_equal(*both)


@pytest.mark.parametrize(
  ("sample_rate", "samples", "frames"),
  [
    *((16000, 16000, 98), (16000, 400, 1), (16000, 399, 0), (16000, 0, 0)),
    *((16000, 559, 1), (16000, 560, 2), (8000, 200, 1), (8000, 280, 2), (8000, 32000, 398)),
    (22050, 22050, 1 + (22050 - 551) // 220),
  ],
)
def test_frames_are_counted_as_there_are(sample_rate, samples, frames):
  """Of an integer, of integers, and of traced ones."""
  count = lambda n: frame_counts(n, sample_rate=sample_rate)
  assert count(samples) == frames and isinstance(count(samples), int)
  assert count(np.array([samples, 0])).tolist() == [frames, 0]
  assert jax.jit(count)(jnp.array([samples])).tolist() == [frames]
  wave = jax.ShapeDtypeStruct((2, samples), jnp.int16)
  found = jax.eval_shape(lambda x: log_mel(x, sample_rate=sample_rate, mel_bins=23), wave)
  assert found.shape == (2, frames, 23)


def test_filters_rise_and_fall_and_leave_no_frequency_out():
  """Between the first and the last peak every frequency's parts sum to 1."""
  filters = mel_filters(16000, 40, 512)
  assert filters.min() == 0 and filters.max() <= 1
  with pytest.raises(ValueError, match="read-only"):
    filters[:] = 0
  peaks = np.argmax(filters, axis=0)
  assert np.all(np.diff(peaks) > 0)
  np.testing.assert_allclose(filters[peaks[0] + 1 : peaks[-1]].sum(1), 1, atol=1e-12)


def test_utterances_are_normalised_over_their_own_frames():
  """Mean 0 and variance 1 of each bin, 0 behind them, whatever lies there."""
  rng = np.random.default_rng(0)
  mel = rng.normal(3, 2, (3, 30, 5)).astype(np.float32)
  frames = np.array([30, 12, 0])
  found = np.asarray(jax.jit(normalize_mel)(mel, frames))
  for b, count in enumerate(frames):
    own = mel[b, :count].astype(np.float64)
    if count:
      expected = (own - own.mean(0)) / own.std(0)
      np.testing.assert_allclose(found[b, :count], expected, rtol=0, atol=1e-5)
    assert not found[b, count:].any()
  other = np.where(np.arange(30)[None, :, None] < frames[:, None, None], mel, np.nan)
  np.testing.assert_array_equal(jax.jit(normalize_mel)(other, frames), found)


def test_what_does_not_vary_is_0_and_float64_stays():
  silence = np.full((2, 300, 4), math.log(1e-10), np.float32)
  assert np.abs(jax.jit(normalize_mel)(silence, np.array([300, 1]))).max() < 1e-2
  with jax.enable_x64(True):
    found = jax.eval_shape(normalize_mel, jnp.ones((1, 2, 3), jnp.float64), jnp.array([2]))
  assert found.dtype == jnp.float64
  found = jax.eval_shape(normalize_mel, jnp.ones((1, 2, 3), jnp.bfloat16), jnp.array([2]))
  assert found.dtype == jnp.float32


@pytest.mark.parametrize(
  ("wave", "options", "message"),
  [
    (np.zeros((1, 400), np.int32), {}, "must be of int16, or of floats in .*, not int32"),
    (np.zeros(400, np.int16), {}, r"waves \[400\] are not \[B, S\]"),
    (np.zeros((1, 400), np.int16), {"mel_bins": 160}, "mel_bins=160 are too many at sample_rate="),
    (np.zeros((1, 400), np.int16), {"mel_bins": 0}, "mel_bins=0 must be at least 1"),
    (np.zeros((1, 400), np.int16), {"hop": 0.0}, "hop=0.0 are too short"),
  ],
)
def test_what_has_no_spectrogram_raises(wave, options, message):
  with pytest.raises(ValueError, match=message):
    log_mel(wave, sample_rate=8000, **options)
