"""Sounds: what is read of files, whichever they are, and what becomes of bad ones."""

import contextlib
import errno
import io
import os

import numpy as np
import pytest
import soundfile

from magneto_jax.data import sounds

RATE = 16000
WAVES = {"sample_rate": RATE, "longest": 10 * RATE}


def tones(*frequencies, seconds=1.0, rate=RATE):
  """A sum of sines of the amplitude 0.2 each, float in [-1, 1]."""
  time_S = np.arange(round(seconds * rate)) / rate
  return sum(0.2 * np.sin(2 * np.pi * frequency * time_S) for frequency in frequencies)


def encoded(sound, kind="WAV", subtype=None, rate=RATE):
  """The bytes of a file."""
  written = io.BytesIO()
  soundfile.write(written, sound, rate, format=kind, subtype=subtype)
  return written.getvalue()


def decoded(content, **options):
  return sounds.decode(io.BytesIO(content), **WAVES | options)


def correlation(first, second):
  return np.corrcoef(first.astype(float), second.astype(float))[0, 1]


# ---------------------------------------------------------------------------------------------
# What is read
# ---------------------------------------------------------------------------------------------

FORMATS = {
  "wav": ("WAV", "PCM_16"),
  "wav, 24 bits": ("WAV", "PCM_24"),
  "wav, float": ("WAV", "FLOAT"),
  "wav, GSM 06.10": ("WAV", "GSM610"),
  "wav, ADPCM": ("WAV", "G721_32"),
  "wavex": ("WAVEX", "PCM_16"),
  "flac": ("FLAC", "PCM_16"),
  "vorbis": ("OGG", "VORBIS"),
  "opus": ("OGG", "OPUS"),
  "mp3": ("MP3", "MPEG_LAYER_III"),
}
# Samples of silence that fill up the last block.
FILLED = {"wav, ADPCM": 80}
EXACT = ("wav", "wav, 24 bits", "wav, float", "wavex", "flac")


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_any_format_is_the_wave_that_it_was_made_of(name, tmp_path):
  """To the last bit where the format keeps it; from a path, and whatever that is called."""
  wave_S = np.rint(2**15 * tones(300, 1000)).astype(np.int16)
  sound = wave_S / 2**15 if name == "wav, float" else wave_S
  content = encoded(sound, *FORMATS[name])
  (path := tmp_path / "sound.raw").write_bytes(content)
  for found in (decoded(content), sounds.read(path, **WAVES)):
    assert found.dtype == np.int16 and found.shape == (RATE + FILLED.get(name, 0),)
    found = found[:RATE]
    if name in EXACT:
      np.testing.assert_array_equal(found, wave_S)
    else:
      assert correlation(found, wave_S) > 0.99


def test_channels_are_averaged():
  left, right = tones(300), tones(700)
  found = decoded(encoded(np.stack([left, right], axis=1), subtype="FLOAT"))
  np.testing.assert_allclose(found, 2**14 * (left + right), atol=0.51)


@pytest.mark.parametrize("rate", (8000, 11025, 44100, 48000))
def test_another_rate_keeps_what_both_can_hold(rate):
  """Tones stay where they are; what is above half the new rate is gone, and does not come back."""
  found = decoded(encoded(tones(440, 2500, rate=rate), subtype="FLOAT", rate=rate))
  assert abs(len(found) - RATE) <= 1
  expected = 2**15 * tones(440, 2500)[: len(found)]
  inner = slice(1000, -1000)  # Filters are not at rest at the ends.
  np.testing.assert_allclose(found[inner], expected[inner], atol=8)
  if rate > RATE:
    found = decoded(encoded(tones(440, 9000, rate=rate), subtype="FLOAT", rate=rate))
    np.testing.assert_allclose(found[inner], 2**15 * tones(440)[: len(found)][inner], atol=8)


def test_what_does_not_fit_is_clipped():
  found = decoded(encoded(8 * tones(440), subtype="FLOAT"))
  assert found.max() == 2**15 - 1 and found.min() == -(2**15)
  assert not np.any((tones(440) > 0.01) & (found < 0))


def test_gsm_is_what_soundfile_reads():
  """Of frames alone, a file of which cannot say what it is."""
  written = encoded(tones(300, rate=8000), "WAV", "GSM610", rate=8000)
  with soundfile.SoundFile(io.BytesIO(written)) as file:
    frames = -(-file.frames // 160)
  content = b"\xd8" + bytes(32) + (b"\xd2" + bytes(range(32))) * (frames - 1)
  found = sounds.decode_gsm(content, sample_rate=8000, longest=80000)
  expected, _ = soundfile.read(
    *(io.BytesIO(content),),
    format="RAW",
    subtype="GSM610",
    samplerate=8000,
    channels=1,
    dtype="int16",
  )
  np.testing.assert_array_equal(found, expected)
  assert len(found) == sounds.gsm_samples(content, 8000) == 160 * frames
  other = sounds.decode_gsm(content, sample_rate=11025, longest=11025 * 10)
  assert 0 <= len(other) - sounds.gsm_samples(content, 11025) <= 1
  with pytest.raises(ValueError, match="it has 34 bytes, not frames of 33"):
    sounds.decode_gsm(content[:34], sample_rate=8000, longest=80000)


@pytest.mark.parametrize("factor", (0.9, 1.1, 1.5))
def test_a_speed_moves_pitch_and_length_together(factor):
  wave_S = np.rint(2**15 * tones(440)).astype(np.int16)
  found = sounds.change_speed(wave_S, factor)
  assert abs(len(found) - RATE / factor) <= 1 and found.dtype == np.int16
  expected = 2**15 * tones(440 * factor)[: len(found)]
  np.testing.assert_allclose(found[500 : len(expected) - 500], expected[500:-500], atol=8)


# ---------------------------------------------------------------------------------------------
# What is wrong
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", (0.3, 0.66, 0.97))
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_cut_short_is_refused(name, keep, tmp_path):
  """Libsndfile itself gives the beginning of some of them, without a word."""
  noise = np.random.default_rng(0).standard_normal(RATE)
  content = encoded(0.1 * noise, *FORMATS[name])
  (path := tmp_path / "sound").write_bytes(content[: int(keep * len(content))])
  with pytest.raises(ValueError) as error:
    sounds.read(path, **WAVES)
  line = str(error.value)
  assert (
    line.startswith(f"{path}: it is ") and "\n" not in line and len(line) < 300 + len(str(path))
  )


def test_an_ogg_file_ends_with_its_last_page():
  """Without it, libsndfile gives what is left."""
  content = encoded(tones(300, 1000, seconds=3.0), "OGG", "VORBIS")
  assert len(decoded(content)) == 3 * RATE
  cut = content[: content.rindex(b"OggS")]
  with pytest.raises(ValueError, match="it is cut short: its last page of Ogg is not the end"):
    decoded(cut)


@pytest.mark.parametrize("name", ("flac", "vorbis", "opus"))
def test_a_file_with_a_checksum_may_not_differ_by_a_bit(name):
  """Where there are none, as in WAV, a changed bit is another sound."""
  content = encoded(tones(300, 1000), *FORMATS[name])
  for place in np.linspace(len(content) // 3, len(content) - 20, 8).astype(int):
    damaged = bytearray(content)
    damaged[place] ^= 1
    with pytest.raises(ValueError, match=r"^it is .*broken|^it is cut short"):
      decoded(bytes(damaged))


@pytest.mark.parametrize("noted", (0x7FFFF000, 0x7FFFFFFF, 0x80000000, 2**32 - 37, 2**32 - 1))
def test_a_wav_whose_length_was_not_known_is_read(noted):
  """As it is written into a pipe, or before a recording: its header says that it has so many."""
  content = bytearray(encoded(tones(300)))
  place = content.index(b"data") + 4
  content[place : place + 4] = content[4:8] = noted.to_bytes(4, "little")
  np.testing.assert_array_equal(decoded(bytes(content)), decoded(encoded(tones(300))))
  content[place : place + 4] = bytes(4)
  with pytest.raises(ValueError, match="it has no samples, or a header that was never completed"):
    decoded(bytes(content))


def without_length(flac):
  """A FLAC file as it is written into a pipe."""
  content = bytearray(flac)
  content[21] &= 0xF0
  content[22:26] = bytes(4)
  return bytes(content)


def test_a_flac_whose_length_is_not_known_is_read_to_its_end():
  """Of the one that is too long no more than is needed to see it."""
  noise = 0.1 * np.random.default_rng(0).standard_normal((10 * RATE, 2))
  flac = encoded(noise, "FLAC")
  np.testing.assert_array_equal(decoded(without_length(flac)), decoded(flac))
  with pytest.raises(sounds.TooLong, match="more than 1: cut it") as error:
    decoded(without_length(flac), longest=RATE)
  assert RATE < error.value.samples < 6 * RATE
  with pytest.raises(ValueError, match="or broken: flac decoder lost sync"):
    decoded(without_length(flac)[:-5000])


def without_note(mp3):
  """An MP3 file without its first frame, which says how many there are."""
  begin = mp3.find(mp3[:2], 4)
  assert b"Xing" in mp3[:begin] or b"Info" in mp3[:begin]
  return mp3[begin:]


@pytest.mark.parametrize("channels", (1, 2))
@pytest.mark.parametrize("rate", (8000, 16000, 24000, 44100, 48000))
def test_an_mp3_without_a_note_is_read_to_its_end(rate, channels):
  """Bit rates differ from frame to frame, and libsndfile takes the first one for all."""
  rng = np.random.default_rng(0)
  quiet, loud = np.zeros(rate), 0.3 * rng.standard_normal(rate)
  for parts in ((loud, quiet, loud), (quiet, loud, quiet)):
    sound = np.repeat(np.concatenate(parts)[:, None], channels, axis=1)
    mp3 = encoded(sound, "MP3", rate=rate)
    whole, found = decoded(mp3), decoded(without_note(mp3))
    assert len(whole) == 3 * RATE and 0 <= len(found) - len(whole) < 0.4 * RATE
    shift = int(np.argmax(np.correlate(found[:40000].astype(float), whole[8000:32000], "valid")))
    assert correlation(found[shift : shift + 24000], whole[8000:32000]) > 0.9


@pytest.mark.parametrize("tag", (b"TAG" + bytes(125), b"APETAGEX" + bytes(99), bytes(300)))
def test_an_mp3_may_have_tags(tag):
  mp3, before = encoded(tones(300), "MP3"), b"ID3\x03\0\0\0\0\1\2" + bytes(130)
  np.testing.assert_array_equal(decoded(before + mp3 + tag), decoded(mp3))
  bare = without_note(mp3)
  np.testing.assert_array_equal(decoded(before + bare + tag), decoded(bare))


@pytest.mark.parametrize("keep", (0.3, 0.66, 0.97))
def test_an_mp3_without_a_note_that_is_cut_short_is_refused(keep):
  bare = without_note(encoded(0.1 * np.random.default_rng(0).standard_normal(RATE), "MP3"))
  with pytest.raises(ValueError, match="it is cut short: the last of its"):
    decoded(bare[: int(keep * len(bare))])
  with pytest.raises(ValueError, match="or cut short: no frame of MP3 begins at its byte"):
    decoded(bare[: len(bare) // 2] + bytes(400) + bare[len(bare) // 2 + 400 :])


@pytest.mark.parametrize("name", ("wav", "flac", "vorbis", "opus", "mp3"))
def test_files_that_were_joined_are_refused(name):
  """Of some of them libsndfile gives the first part alone, without a word."""
  first, second = encoded(tones(300), *FORMATS[name]), encoded(tones(500), *FORMATS[name])
  with pytest.raises(ValueError, match="joined|it is no WAV.* No 'RIFF' chunk"):
    decoded(first + second)
  if name == "mp3":  # Whole without a note; and not, with a tag between.
    assert abs(len(decoded(without_note(first) + without_note(second))) - 2 * RATE) < RATE // 4
    with pytest.raises(ValueError, match="joined"):
      decoded(first + b"TAG" + bytes(125) + second)


BAD = {
  "no file": (b"", "it is no WAV, FLAC, Ogg .*or MP3, or broken: Format not recognised"),
  "text": (b"hello world " * 99, "it is no WAV, FLAC, Ogg .*or broken"),
  "another format": (encoded(tones(300), "AIFF"), "it is AIFF .*, not WAV, FLAC, Ogg"),
  "no samples": (encoded(np.zeros(0)), "it has no samples"),
  "zeros": (encoded(np.zeros(RATE)), "it is silent: all of its 16,000 samples are equal"),
  "a constant": (encoded(np.full(RATE, 0.25)), "it is silent: all"),
  "a constant of another rate": (encoded(np.full(8000, 0.25), rate=8000), "it is silent: all"),
  "next to nothing": (encoded(1e-6 * tones(300), subtype="FLOAT"), "it is silent: all"),
  "too high": (
    encoded(np.hanning(RATE) * tones(7000), subtype="FLOAT"),
    "it is silent: nothing of it is heard",
  ),
  "too short": (encoded(tones(300, seconds=0.09)), "it has 0.090 seconds, fewer than 0.1"),
  "too slow": (encoded(tones(3), rate=500), "it has 500 samples a second, fewer than 1000"),
  "channels that cancel out": (
    encoded(np.stack([tones(300), -tones(300)], axis=1)),
    "its channels cancel out when they are averaged: keep one",
  ),
  "not finite": (encoded(np.full(RATE, np.nan), subtype="FLOAT"), "samples that are not finite"),
}


@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD)
def test_what_is_no_sound_is_one_line(content, message):
  options = {"sample_rate": 8000} if "nothing of" in message else {}
  with pytest.raises(ValueError, match=message) as error:
    decoded(content, **options)
  assert "\n" not in str(error.value)


def test_a_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="none.wav: there is no such file"):
    sounds.read(tmp_path / "none.wav", **WAVES)
  with pytest.raises(ValueError, match=f"{tmp_path}: it is not a regular file"):
    sounds.read(tmp_path, **WAVES)
  os.mkfifo(tmp_path / "pipe.wav")
  with pytest.raises(ValueError, match="pipe.wav: it is not a regular file"):
    sounds.read(tmp_path / "pipe.wav", **WAVES)


@pytest.mark.parametrize("content", (encoded(tones(300)), b"no sound", encoded(np.zeros(0))))
def test_files_are_closed(tmp_path, content):
  """Good or bad, and none that is somebody else's."""
  (path := tmp_path / "sound.wav").write_bytes(content)
  before = set(os.listdir("/dev/fd"))
  with open(path, "rb", buffering=0) as file:
    for _ in range(3):
      with contextlib.suppress(ValueError):
        sounds.decode(file, **WAVES)
      file.seek(0)
  with contextlib.suppress(ValueError):
    sounds.read(path, **WAVES)
  assert set(os.listdir("/dev/fd")) == before


def test_the_limit_is_kept_to_the_sample():
  for rate, samples in ((RATE, RATE), (8000, 8000), (44100, 44100)):
    wave = tones(300, seconds=1.1, rate=rate)
    assert len(decoded(encoded(wave[:samples], rate=rate), longest=RATE)) <= RATE
    if rate > RATE:  # Less than a sample more, which rounding makes one of.
      for longest, found in ((RATE, RATE), (RATE + 1, RATE + 1)):
        assert len(decoded(encoded(wave[: samples + 2], rate=rate), longest=longest)) == found
    more = samples + rate // 1000
    with pytest.raises(sounds.TooLong, match="it has 1.01 seconds, more than 1: cut it") as error:
      decoded(encoded(wave[:more], rate=rate), longest=RATE)
    assert error.value.samples == more * RATE // rate


def test_what_is_too_long_is_not_decoded(tmp_path, monkeypatch):
  """A header is enough: a day of a low tone as FLAC is a small file, and 5.5 GB of samples."""
  (path := tmp_path / "long.flac").write_bytes(encoded(tones(300, seconds=11), "FLAC"))
  monkeypatch.setattr(soundfile.SoundFile, "read", lambda *args, **kwargs: pytest.fail("read"))
  with pytest.raises(sounds.TooLong, match=f"^{path}: it has 11 seconds, more than 10: cut"):
    sounds.read(path, **WAVES)


def test_a_long_ogg_is_too_long_and_not_checked(monkeypatch):
  monkeypatch.setattr(sounds, "_check_pages", lambda file: pytest.fail("read"))
  with pytest.raises(sounds.TooLong, match="it has 11 seconds"):
    decoded(encoded(tones(300, seconds=11), "OGG", "VORBIS"))


def test_a_huge_mp3_is_too_long_and_not_read(monkeypatch):
  """By its size, as 320 kbit/s are the most."""
  monkeypatch.setattr(sounds, "_MOST_TAG", 100)
  monkeypatch.setattr(sounds, "_with_count", lambda file: pytest.fail("read"))
  with pytest.raises(sounds.TooLong, match="it has 2 seconds, more than 1"):
    decoded(encoded(tones(300), "MP3") + bytes(85_000), longest=RATE)


@pytest.mark.parametrize("number", (errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES))
def test_what_the_machine_cannot_do_is_said_of_no_file(number, tmp_path, monkeypatch):
  """Neither of a look at it, nor of opening it."""
  (path := tmp_path / "sound.wav").write_bytes(encoded(tones(300)))

  def fail(*args, **kwargs):
    raise OSError(number, os.strerror(number))

  for name in ("stat", "dup"):
    with monkeypatch.context() as patch:
      patch.setattr(os, name, fail)
      with pytest.raises(OSError) as error:
        sounds.read(path, **WAVES)
      assert error.value.errno == number


def test_a_disk_that_fails_within_a_file_is_said_of_no_file(tmp_path, monkeypatch):
  (path := tmp_path / "sound.wav").write_bytes(encoded(tones(300)))

  def fail(*args, **kwargs):
    raise soundfile.LibsndfileError(2)

  monkeypatch.setattr(soundfile.SoundFile, "read", fail)
  with pytest.raises(OSError, match="a sound could not be read: System error"):
    sounds.read(path, **WAVES)
