"""Sounds as waves: how files of any rate and any number of channels are read, and what is refused.

A wave is int16 [S], one channel at the asked rate: full scale is 2^15.
"""

import io
import os
import re
import struct
import zlib
from typing import Any

import numpy as np

from magneto_jax.data import files

# As libsndfile calls them.
_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
_KINDS = "WAV, FLAC, Ogg (Vorbis or Opus) or MP3"
# Seconds below which a sound is no utterance: front ends of 40 ms have no frame for it.
SHORTEST = 0.1
_LOWEST_RATE = 1000
# From here on a length in a WAV's header is none: 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF
# are what is written where it is not known yet, into a pipe or at a recording's start.
_UNKNOWN_BYTES = 2**31 - 2**12
# Bytes of tags before or behind an MP3's frames, in which pictures are, and of a second of it.
_MOST_TAG, _MOST_MP3 = 2**24, 40_000
# Samples that are decoded at once where it is not known how many there are.
_BLOCK = 2**16
# libsndfile's code of what the machine could not do.
_SYSTEM_ERROR = 2
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
    seconds = rounded_up(samples, rate)
    words = f"it has {seconds:.10g} seconds, more than {longest / rate:g}: cut it into parts"
    return f"{file}: {words}" if file else words


def rounded_up(count: int, unit: int) -> float:
  """`count / unit` to the next hundredth: what is above a limit is so in words too."""
  return -(-100 * int(count) // unit) / 100


def read(path: str | os.PathLike[str], *, sample_rate: int, longest: int) -> np.ndarray:
  """The wave of a file, as `decode` has it.

  Raises:
    FileNotFoundError: there is none.
    TooLong, ValueError: as `decode`, or it is no regular file; the line begins with the path.
    OSError: any other one is the machine's, and says nothing of the file.
  """
  files.size(path)  # A pipe or a device would be read for ever.
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
    ValueError: of one line: it is none of these, broken, cut short (of a FLAC file without its
      length, or a WAV file with a placeholder for it, that cannot be seen), several that were
      joined, shorter than `SHORTEST`, not finite, or silent: all of its samples are equal.
    OSError: it could not be read.
  """
  import soundfile  # Few runs read sounds.

  asked = {"sample_rate": sample_rate, "longest": longest}
  try:
    with _open(file) as sound:
      kind, rate, log, is_known = sound.format, sound.samplerate, sound.extra_info, _is_known(sound)
      if kind not in _FORMATS:
        raise ValueError(f"it is {sound.format_info}, not {_KINDS}")
      if is_known and kind != "MP3":  # There it may be a guess.
        _check_header(sound.frames, rate, **asked)
    if kind in ("WAV", "WAVEX"):
      _check_chunk(log)
    elif kind == "OGG":
      _check_pages(file)
    elif kind == "FLAC":
      _check_single(file)
    else:
      least = max(0, file.seek(0, io.SEEK_END) - 2 * _MOST_TAG) // _MOST_MP3 * sample_rate
      if least > longest:
        raise TooLong(least, longest, sample_rate)
      file = _with_count(file)
    with _open(file) as sound:
      if is_known:
        _check_length(sound.frames, rate, **asked)
        sound_SC = sound.read(sound.frames, dtype="float32", always_2d=True)
      else:
        sound_SC = _read_on(sound, (longest + 1) * rate // sample_rate + 1)
      if is_known and len(sound_SC) != sound.frames:
        raise ValueError(
          f"it is broken or cut short: {len(sound_SC):,} of {sound.frames:,} samples can be decoded"
        )
  except soundfile.LibsndfileError as error:
    reason = " ".join(error.error_string.split()).removeprefix("Error : ").rstrip(".")
    if error.code == _SYSTEM_ERROR:
      raise OSError(f"a sound could not be read: {reason}") from error
    raise ValueError(f"it is no {_KINDS}, or broken: {reason:.120}") from error
  return to_wave(sound_SC * 2**15, rate, **asked)


def _open(file: io.FileIO | io.BytesIO) -> Any:
  """A file as soundfile's, from its beginning."""
  import soundfile

  file.seek(0)
  # By a number, as the name may say what it is not; by another one, as libsndfile 1.2.0 closes
  # what it cannot open.
  return soundfile.SoundFile(file if isinstance(file, io.BytesIO) else os.dup(file.fileno()))


def _is_known(sound: Any) -> bool:
  """Whether a sound says how long it is: a FLAC file that was written into a pipe does not."""
  return sound.frames < 2**62


def _read_on(sound: Any, most: int) -> np.ndarray:
  """What a sound of unknown length holds, [S, channels]; of what is longer at least `most`."""
  sound._info.seekable = 0  # Else soundfile moves to where it is, which takes a length.
  blocks, held = [], 0
  while held < most and len(block_SC := sound.read(_BLOCK, dtype="float32", always_2d=True)):
    blocks.append(block_SC)
    held += len(block_SC)
  return np.concatenate(blocks) if blocks else np.zeros((0, 1), np.float32)


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
    if sound.ndim > 1 and np.ptp(sound, axis=0).max() >= 1:
      raise ValueError("its channels cancel out when they are averaged: keep one of them")
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
    raise ValueError("it has no samples, or a header that was never completed")
  _check_header(samples, rate, sample_rate, longest)
  if samples / rate < SHORTEST:
    seconds = 1000 * samples // rate / 1000
    raise ValueError(f"it has {seconds:.3f} seconds, fewer than {SHORTEST}")


def _check_header(samples: int, rate: int, sample_rate: int, longest: int) -> None:
  """Raises if what follows need not be looked at."""
  if rate < _LOWEST_RATE:
    raise ValueError(f"it has {rate} samples a second, fewer than {_LOWEST_RATE}")
  if (length := samples * sample_rate // rate) > longest:
    raise TooLong(length, longest, sample_rate)


def _check_chunk(log: str) -> None:
  """Raises ValueError if a WAV file, by libsndfile's log, holds less than its header says."""
  found = re.search(r"^data : (\d+) \(should be (\d+)\)", log, re.MULTILINE)
  if found and int(found[2]) < int(found[1]) < _UNKNOWN_BYTES:
    raise ValueError(
      f"it is cut short: it has {int(found[2]):,} bytes of sound, its header says {int(found[1]):,}"
    )


def _check_single(file: io.FileIO | io.BytesIO) -> None:
  """Raises ValueError if another FLAC file begins in one: the first alone would be decoded.

  Reference: RFC 9639, sections 6 and 8.2.
  """
  file.seek(4)
  begin, held = 4, b""
  while part := file.read(2**20):
    held += part
    if found := re.search(rb"fLaC[\x00\x80]\x00\x00\x22", held):
      begin += found.start()
      raise ValueError(f"it is of several files, joined: one begins at byte {begin:,}, split it")
    begin, held = begin + len(held[:-7]), held[-7:]


# The bits of each byte from the other end.
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _check_pages(file: io.FileIO | io.BytesIO) -> None:
  """Raises ValueError if a page of an Ogg file is damaged, the last one missing, or not the last.

  Reference: RFC 3533, section 6.
  """
  file.seek(0)
  begin, is_last, stream = 0, False, b""
  while header := file.read(27):
    if len(header) < 27 or header[:4] != b"OggS":
      raise ValueError(f"it is broken or cut short: no page of Ogg begins at its byte {begin:,}")
    stream = stream or header[14:18]
    if is_last or header[14:18] != stream:
      raise ValueError(
        f"it is of several streams, joined: one has the page at its byte {begin:,}, split it"
      )
    sizes = file.read(header[26])
    page = header[:22] + bytes(4) + header[26:] + sizes + file.read(sum(sizes))
    if len(page) < 27 + header[26] + sum(sizes):
      raise ValueError(f"it is cut short, in the page of Ogg from its byte {begin:,} on")
    # zlib's CRC-32 is the same polynomial's, of mirrored bits, inverted at both ends.
    mirrored = zlib.crc32(page.translate(_MIRRORED), 2**32 - 1) ^ (2**32 - 1)
    if int(f"{mirrored:032b}"[::-1], 2) != int.from_bytes(header[22:26], "little"):
      raise ValueError(f"it is broken: the checksum of its page of Ogg at byte {begin:,} is wrong")
    begin, is_last = begin + len(page), bool(header[5] & 4)
  if not is_last:
    raise ValueError("it is cut short: its last page of Ogg is not the end of the stream")


# By the version of MPEG (3: 1, 2: 2, 0: 2.5): kbit/s, samples a second, samples of a frame / 8, and
# the bytes before a note in a frame of one channel and of two.
_HALF_KBITS = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_MPEG = {
  3: (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (44100, 48000, 32000),
    144,
    (21, 36),
  ),
  2: (_HALF_KBITS, (22050, 24000, 16000), 72, (13, 21)),
  0: (_HALF_KBITS, (11025, 12000, 8000), 72, (13, 21)),
}


def _mpeg(header: bytes) -> tuple[int, int] | None:
  """Bytes of the frame of an MP3 that a header begins, and where in it a note may be, or None."""
  if len(header) < 4:
    return None
  (bits,) = struct.unpack(">I", header)
  version, kbit, rate = bits >> 19 & 3, bits >> 12 & 15, bits >> 10 & 3
  # 11 bits of synchronisation, layer III, and no number that is reserved.
  if bits >> 21 != 2**11 - 1 or bits >> 17 & 3 != 1 or version == 1 or rate == 3:
    return None
  if kbit in (0, 15):
    return None
  kbits, rates, scale, places = _MPEG[version]
  size = scale * 1000 * kbits[kbit] // rates[rate] + (bits >> 9 & 1)
  return size, places[bits >> 6 & 3 != 3]


def _with_count(file: io.FileIO | io.BytesIO) -> io.FileIO | io.BytesIO:
  """An MP3 file whose first frame says how many there are: itself, or a copy that is given one.

  Without that, libsndfile takes the first frames' bit rate for all, and so a wrong length. Frames
  are found by their headers, and must fill the file but for tags: ID3, APE or Lyrics3.

  Reference: ISO/IEC 11172-3, section 2.4.1; of the note, the MP3 Info Tag of LAME.

  Raises:
    ValueError: it is cut short, broken, or of several that were joined.
  """
  file.seek(0)
  content = file.read()
  first = 0
  while content[first : first + 3] == b"ID3":
    sizes = content[first + 6 : first + 10]
    first += 10 + sum((size & 127) << 7 * place for place, size in enumerate(reversed(sizes)))
  first += len(content[first:]) - len(content[first:].lstrip(b"\0"))  # Behind a tag.
  place, count = first, 0
  while found := _mpeg(content[place : place + 4]):
    place, count = place + found[0], count + 1
  if place > len(content):
    raise ValueError(f"it is cut short: the last of its {count:,} frames has not all of its bytes")
  rest = content[place:].lstrip(b"\0")
  if not count or (rest and not rest.startswith((b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3"))):
    raise ValueError(f"it is broken or cut short: no frame of MP3 begins at its byte {place:,}")
  if rest.startswith(b"ID3") or len(rest) > (128 if rest.startswith(b"TAG") else _MOST_TAG):
    raise ValueError(f"it is of several files, joined: more begins at its byte {place:,}, split it")
  size, note = _mpeg(content[first : first + 4])
  frame = content[first : first + size]
  if frame[note : note + 4] in (b"Xing", b"Info") and frame[note + 7] & 1:
    noted = int.from_bytes(frame[note + 8 : note + 12], "big")
    if noted not in (count - 1, count):  # Some count the note's own frame.
      raise ValueError(
        f"it is cut short, or of several files, joined: it has {count - 1:,} frames, its note says"
        f" {noted:,}"
      )
    return file
  # The first frame's header without a checksum, and of enough bits for the note.
  header = bytes((frame[0], frame[1] | 1, frame[2] & 0x0C | 0x90, frame[3]))
  size, note = _mpeg(header)
  noted = header + bytes(note - 4) + b"Xing" + struct.pack(">II", 1, count)
  return io.BytesIO(noted.ljust(size, b"\0") + content[first:place])
