"""Sounds as log-mel spectrograms, and spectrograms with the scale of each utterance taken out.

Letters: B batch, S samples, T frames, N samples of a window, F frequencies, M mel bins.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

# Seconds of a window, and from one to the next.
FRAME_LENGTH, HOP = 0.025, 0.010
# Hz, where the lowest filter begins; the highest ends at half the sample rate.
_LOWEST = 20.0
_PRE_EMPHASIS = 0.97
_POVEY = 0.85
# The least energy of a bin, of samples in [-1, 1]. Sounds of the last bit of 16 alone are partly
# below it, in low bins above all, which the pre-emphasis takes 30 dB from.
_FLOOR = 1e-10
# A bin that varies less over an utterance counts as one that does not vary.
_LEAST_VARIANCE = 1e-5


def frame_counts(samples, *, sample_rate: int, frame_length: float = FRAME_LENGTH, hop=HOP):
  """How many frames a sound has: 1 + (S - N) // H of whole windows, none if it is shorter than one.

  Args:
    samples: S, an integer or integers of any shape, traced or not.
    sample_rate: samples a second.
    frame_length, hop: seconds; N and H are these in samples, rounded to the nearest.

  Returns:
    What `samples` is: an integer, or as many.
  """
  window, step = _sizes(sample_rate, frame_length, hop)
  return at_least_0(1 + (samples - window) // step)


def at_least_0(count):
  """An integer, or an array of them, where it is above 0, else 0."""
  return count * (count > 0)


def frame_mask(frames_B: jax.Array, length: int) -> jax.Array:
  """[B, T], True for each utterance's own frames, of `length` that the batch has."""
  return jnp.arange(length)[None] < jnp.asarray(frames_B)[:, None]


def log_mel(
  waves_BS: jax.Array,
  *,
  sample_rate: int,
  mel_bins: int = 80,
  frame_length: float = FRAME_LENGTH,
  hop: float = HOP,
) -> jax.Array:
  """The logarithms [B, T, M] of sounds' energy by time and mel frequency.

  Of each window x of N samples, the next H behind it, without padding:

    y_n = x_n - mean(x)                          v_n = w_n (y_n - 0.97 y_max(n-1, 0))
    w_n = (1/2 - 1/2 cos(2 pi n / (N - 1)))^0.85      (Povey's window)
    energy_m = log max(1e-10, sum_f filter_fm |DFT(v)_f|^2)

  with the natural logarithm and a DFT of the next power of two. See `mel_filters`.

  Args:
    waves_BS: samples, int16 (which are divided by 2^15) or floats in [-1, 1].
    sample_rate: samples a second.
    mel_bins: M.
    frame_length, hop: seconds; see `frame_counts`.

  Returns:
    Of float32, or float64 where the samples are; T = 0 of sounds that are shorter than a window.

  Raises:
    ValueError: samples of another type or shape, or more bins than the DFT can tell apart.

  Reference: Kaldi's `compute-fbank-feats`, which fairseq's speech tasks take, without dither.
  Differs from Kaldi in the scale of samples, 1 and not 2^15, and so in its floor; of frames whose
  length is no whole number of samples Kaldi drops the rest.

  Example:
    >>> mel_BTM = log_mel(waves_BS, sample_rate=16_000)
    >>> frames_B = frame_counts(lengths_B, sample_rate=16_000)
    >>> mel_BTM = normalize_mel(mel_BTM, frames_B)
  """
  waves_BS = jnp.asarray(waves_BS)
  if waves_BS.ndim != 2:
    raise ValueError(f"waves {list(waves_BS.shape)} are not [B, S]")
  if waves_BS.dtype == jnp.int16:
    waves_BS = waves_BS.astype(jnp.float32) / 2**15
  elif not jnp.issubdtype(waves_BS.dtype, jnp.floating):
    raise ValueError(f"waves must be of int16, or of floats in [-1, 1], not {waves_BS.dtype}")
  wide = jnp.promote_types(waves_BS.dtype, jnp.float32)
  window, step = _sizes(sample_rate, frame_length, hop)
  size = 1 << (window - 1).bit_length()
  filters_FM = jnp.asarray(mel_filters(sample_rate, mel_bins, size), wide)
  sizes = {"sample_rate": sample_rate, "frame_length": frame_length, "hop": hop}
  count = frame_counts(waves_BS.shape[1], **sizes)
  if not count:
    return jnp.zeros((len(waves_BS), 0, mel_bins), wide)
  cut = lambda start: jax.lax.dynamic_slice_in_dim(waves_BS.astype(wide), start, window, axis=1)
  x_BTN = jax.vmap(cut, out_axes=1)(step * np.arange(count, dtype=np.int32))
  y_BTN = x_BTN - jnp.mean(x_BTN, axis=-1, keepdims=True)
  before_BTN = jnp.concatenate([y_BTN[..., :1], y_BTN[..., :-1]], axis=-1)
  turns_N = 2 * math.pi * np.arange(window) / (window - 1)
  window_N = jnp.asarray((0.5 - 0.5 * np.cos(turns_N)) ** _POVEY, wide)
  v_BTN = (y_BTN - _PRE_EMPHASIS * before_BTN) * window_N.reshape(1, 1, -1)
  spectrum_BTF = jnp.fft.rfft(v_BTN, n=size)
  energy_BTF = jnp.square(spectrum_BTF.real) + jnp.square(spectrum_BTF.imag)
  # In full: accelerators would round the energies to 8 bits.
  energy_BTM = jnp.einsum(
    "btf,fm->btm", energy_BTF, filters_FM, precision=jax.lax.Precision.HIGHEST
  )
  return jnp.log(jnp.maximum(energy_BTM, _FLOOR))


@functools.lru_cache
def mel_filters(sample_rate: int, mel_bins: int, size: int) -> np.ndarray:
  """What each frequency of a DFT gives to each bin [F, M], F = size / 2 + 1, in float64.

  Triangles over mel(f) = 1127 log(1 + f / 700), whose corners divide the mels between 20 Hz and
  half the sample rate into M + 1 equal parts: each rises from the peak of the one before to 1 at
  its own, and falls to the peak of the next.

  Raises:
    ValueError: a triangle lies between two frequencies of the DFT.
  """
  if mel_bins < 1 or sample_rate <= 2 * _LOWEST:
    raise ValueError(f"{mel_bins=} must be at least 1, and {sample_rate=} above {2 * _LOWEST:g}")
  mel = lambda hertz: 1127 * np.log1p(hertz / 700)
  corners = np.linspace(mel(_LOWEST), mel(sample_rate / 2), mel_bins + 2)
  mels_F = mel(np.arange(size // 2 + 1) * sample_rate / size)
  rising_FM = (mels_F[:, None] - corners[None, :-2]) / (corners[1] - corners[0])
  filters_FM = np.maximum(0, np.minimum(rising_FM, 2 - rising_FM))
  if empty := int(np.sum(~filters_FM.any(axis=0))):
    raise ValueError(
      f"{mel_bins=} are too many at {sample_rate=}: {empty} of them lie between two of the"
      f" {size // 2 + 1} frequencies; take fewer bins"
    )
  filters_FM.setflags(write=False)  # It is kept, and given to all.
  return filters_FM


def normalize_mel(mel_BTM: jax.Array, frames_B: jax.Array) -> jax.Array:
  """(x - mean) / std [B, T, M] of each bin over an utterance's own frames, and 0 behind them.

  Computed in float32 or wider. It comes before SpecAugment, so that what is masked with 0 has the
  mean. A bin that does not vary, as in digital silence or in a single frame, becomes 0.

  Args:
    mel_BTM: spectrograms.
    frames_B: how many frames each has; it may be none.

  Reference: fairseq's `utterance_cmvn`. Differs: the variance is at least 1e-5; there 1e-10,
  by which the rounding of the mean would be magnified.
  """
  wide = jnp.promote_types(mel_BTM.dtype, jnp.float32)
  own_BT1 = frame_mask(frames_B, mel_BTM.shape[1])[..., None]
  count_B11 = jnp.maximum(frames_B, 1).astype(wide)[:, None, None]
  mean = lambda x_BTM: jnp.sum(jnp.where(own_BT1, x_BTM, 0), axis=1, keepdims=True) / count_B11
  x_BTM = mel_BTM.astype(wide)
  x_BTM = jnp.where(own_BT1, x_BTM - mean(x_BTM), 0)
  return x_BTM * jax.lax.rsqrt(jnp.maximum(mean(jnp.square(x_BTM)), _LEAST_VARIANCE))


def _sizes(sample_rate: int, frame_length: float, hop: float) -> tuple[int, int]:
  """Samples of a window, and from one to the next."""
  window, step = round(sample_rate * frame_length), round(sample_rate * hop)
  if window < 2 or step < 1:
    raise ValueError(f"{frame_length=} and {hop=} are too short for samples at {sample_rate=}")
  return window, step
