"""Sounds as waves: how files of any rate and any number of channels are read, and what is refused.

A wave is int16 [S], one channel at the asked rate: full scale is 2^15.
"""

import io
import os
import re
import zlib

import numpy as np

# As libsndfile calls them.
_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
_KINDS = "WAV, FLAC, Ogg (Vorbis or Opus) or MP3"
# Seconds below which a sound is no utterance: front ends of 40 ms have no frame for it.
SHORTEST = 0.1
_LOWEST_RATE = 1000
# What is more is not read to be checked.
_MOST_OGG = 2**28
# GSM 06.10: 33 bytes are 20 ms.
_GSM_RATE, _GSM_BYTES, _GSM_SAMPLES = 8000, 33, 160


class TooLong(ValueError):
  """A sound is longer than was asked for; it has not been decoded if its header says so.

  Attributes:
    samples: its length at the asked rate.
  """

  def __init__(self, samples: int, longest: int, sample_rate: int, file: str = ""):
    super().__init__(samples, longest, sample_rate, file)
    self.samples = samples

  def __str__(self) -> str:
    samples, longest, rate, file = self.args
    words = f"it has {samples / rate:.2f} seconds, more than {longest / rate:g}: cut it into parts"
    return f"{file}: {words}" if file else words


def read(path: str | os.PathLike[str], *, sample_rate: int, longest: int) -> np.ndarray:
  """The wave of a file, as `decode` has it.

  Raises:
    FileNotFoundError: there is none.
    TooLong, ValueError: as `decode`, or it is no regular file; the line begins with the path.
  """
  if not os.path.exists(path):
    raise FileNotFoundError(f"{path}: there is no such file")
  if not os.path.isfile(path):  # A pipe or a device would be read for ever.
    raise ValueError(f"{path}: it is not a regular file")
  try:
    with open(path, "rb", buffering=0) as file:
      return decode(file, sample_rate=sample_rate, longest=longest)
  except TooLong as error:
    raise TooLong(*error.args[:-1], os.fspath(path)) from None
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def decode(file: io.FileIO | io.BytesIO, *, sample_rate: int, longest: int) -> np.ndarray:
  """The wave of a WAV, FLAC, Ogg (Vorbis or Opus) or MP3 file, whatever its name.

  Channels are averaged; another rate becomes `sample_rate` by soxr at its high quality, which
  leaves nothing above half of that rate; values are rounded, and clipped where they do not fit.

  Args:
    file: at its beginning, and without a buffer.
    sample_rate: samples a second of the wave.
    longest: how many samples it may have.

  Returns:
    int16 [S], S >= `SHORTEST` seconds and at most `longest`.

  Raises:
    TooLong: it has more; where its header says so, nothing is decoded.
    ValueError: of one line: it is none of these, broken, cut short (of an MP3 without a note of its
      length that cannot be seen), shorter than `SHORTEST`, not finite, or silent: all of its
      samples are equal.
  """
  import soundfile  # Few runs read sounds.

  if file.read(4) == b"OggS":
    file.seek(0)
    if len(content := file.read(_MOST_OGG + 1)) > _MOST_OGG:
      raise ValueError(f"it has more than the {_MOST_OGG:,} bytes of a sound")
    _check_pages(content)
  file.seek(0)
  try:
    # By a number, as the name may say what it is not; by another one, as libsndfile 1.2.0 closes
    # what it cannot open.
    opened = file if isinstance(file, io.BytesIO) else os.dup(file.fileno())
    with soundfile.SoundFile(opened) as sound:
      if sound.format not in _FORMATS:
        raise ValueError(f"it is {sound.format_info}, not {_KINDS}")
      _check_length(sound.frames, sound.samplerate, sample_rate, longest)
      if sound.format in ("WAV", "WAVEX"):
        _check_chunk(sound.extra_info)
      sound_SC = sound.read(dtype="float32", always_2d=True)
      if len(sound_SC) != sound.frames:
        raise ValueError(
          f"it is broken or cut short: {len(sound_SC):,} of {sound.frames:,} samples can be decoded"
        )
      rate = sound.samplerate
  except soundfile.LibsndfileError as error:
    reason = " ".join(error.error_string.split()).removeprefix("Error : ").rstrip(".")
    raise ValueError(f"it is no {_KINDS}, or broken: {reason:.120}") from error
  return to_wave(sound_SC * 2**15, rate, sample_rate=sample_rate, longest=longest)


def decode_gsm(frames: bytes, *, sample_rate: int, longest: int) -> np.ndarray:
  """The wave of frames of GSM 06.10 without a header: 33 bytes for 20 ms, one channel at 8 kHz.

  Raises:
    TooLong, ValueError: as `decode`, or there is a part of a frame.
  """
  import soundfile

  if len(frames) % _GSM_BYTES:
    raise ValueError(f"it has {len(frames)} bytes, not frames of {_GSM_BYTES}")
  _check_length(gsm_samples(frames, _GSM_RATE), _GSM_RATE, sample_rate, longest)
  options = {"format": "RAW", "subtype": "GSM610", "samplerate": _GSM_RATE, "channels": 1}
  wave_S, _ = soundfile.read(io.BytesIO(frames), dtype="int16", **options)
  return to_wave(wave_S, _GSM_RATE, sample_rate=sample_rate, longest=longest)


def gsm_samples(frames: bytes, sample_rate: int) -> int:
  """How many samples `decode_gsm` gives, or one fewer."""
  return len(frames) // _GSM_BYTES * _GSM_SAMPLES * sample_rate // _GSM_RATE


def to_wave(sound: np.ndarray, rate: int, *, sample_rate: int, longest: int) -> np.ndarray:
  """The wave of samples; see `decode`.

  Args:
    sound: [S] or [S, channels], integers or floats whose full scale is 2^15.
    rate: its samples a second.
    sample_rate, longest: see `decode`.
  """
  _check_length(len(sound), rate, sample_rate, longest)
  mono_S = sound.reshape(len(sound), -1).astype(np.float32).mean(axis=1)
  if not np.isfinite(mono_S).all():
    raise ValueError("it has samples that are not finite")
  if not np.ptp(np.rint(mono_S)):
    raise ValueError(f"it is silent: all of its {len(sound):,} samples are equal")
  if rate != sample_rate:
    mono_S = _resample(mono_S, rate, sample_rate)
  wave_S = _to_int16(mono_S)
  if not np.ptp(wave_S):
    raise ValueError(f"it is silent: nothing of it is heard at {sample_rate} samples a second")
  return wave_S[:longest]  # Rounding may have added one.


def change_speed(wave_S: np.ndarray, factor: float) -> np.ndarray:
  """A wave played `factor` times as fast, pitch included: int16 [about S / factor].

  Reference: Audio Augmentation for Speech Recognition, Ko et al., Interspeech 2015, section 2.3.
  """
  return _to_int16(_resample(wave_S.astype(np.float32), factor, 1.0))


def _resample(mono_S: np.ndarray, rate: float, sample_rate: float) -> np.ndarray:
  import soxr

  return soxr.resample(mono_S, rate, sample_rate)


def _to_int16(mono_S: np.ndarray) -> np.ndarray:
  limits = np.iinfo(np.int16)
  return np.rint(mono_S).clip(limits.min, limits.max).astype(np.int16)


def _check_length(samples: int, rate: int, sample_rate: int, longest: int) -> None:
  """Raises if so many samples at a rate are no utterance, or too long a one."""
  if not samples:
    raise ValueError("it has no samples")
  if rate < _LOWEST_RATE:
    raise ValueError(f"it has {rate} samples a second, fewer than {_LOWEST_RATE}")
  seconds = samples / rate
  if seconds < SHORTEST:
    raise ValueError(f"it has {seconds:.3f} seconds, fewer than {SHORTEST}")
  if (length := samples * sample_rate // rate) > longest:
    raise TooLong(length, longest, sample_rate)


def _check_chunk(log: str) -> None:
  """Raises ValueError if a WAV file, by libsndfile's log, holds less than its header says."""
  found = re.search(r"^data : (\d+) \(should be (\d+)\)", log, re.MULTILINE)
  # 2^32 - 1 is written where the length was not known yet: into a pipe.
  if found and int(found[2]) < int(found[1]) < 2**32 - 1:
    raise ValueError(
      f"it is cut short: it has {int(found[2]):,} bytes of sound, its header says {int(found[1]):,}"
    )


# The bits of each byte from the other end.
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _check_pages(content: bytes) -> None:
  """Raises ValueError if a page of an Ogg file is damaged, or the last one missing.

  Reference: RFC 3533, section 6.
  """
  begin, is_last = 0, False
  while begin < len(content):
    header = content[begin : begin + 27]
    if len(header) < 27 or header[:4] != b"OggS":
      raise ValueError(f"it is broken or cut short: no page of Ogg begins at its byte {begin:,}")
    sizes = content[begin + 27 : begin + 27 + header[26]]
    end = begin + 27 + header[26] + sum(sizes)
    if end > len(content):
      raise ValueError(f"it is cut short, in the page of Ogg from its byte {begin:,} on")
    page = header[:22] + bytes(4) + content[begin + 26 : end]
    # zlib's CRC-32 is the same polynomial's, of mirrored bits, inverted at both ends.
    mirrored = zlib.crc32(page.translate(_MIRRORED), 2**32 - 1) ^ (2**32 - 1)
    if int(f"{mirrored:032b}"[::-1], 2) != int.from_bytes(header[22:26], "little"):
      raise ValueError(f"it is broken: the checksum of its page of Ogg at byte {begin:,} is wrong")
    begin, is_last = end, bool(header[5] & 4)
  if not is_last:
    raise ValueError("it is cut short: its last page of Ogg is not the end of the stream")
