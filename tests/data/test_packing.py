"""Packing: every token scored once, nothing seen across documents, caches that are whole or not."""

import copy
import json
import os

import numpy as np
import pytest

from magneto_jax.data import documents, packing, tokenizers

PAD, BOS, EOS = 0, 1, 2


def _stream(lengths, seed=0):
  """A stream of documents with `lengths` text tokens each, and its offsets."""
  draw = np.random.default_rng(seed)
  parts = [[BOS, *draw.integers(4, 1000, n), EOS] for n in lengths]
  offsets = np.cumsum([0, *map(len, parts)])
  return np.concatenate(parts).astype(np.uint16), offsets


def _cases():
  """Lengths around the window: empty documents, one long, many short, exact multiples."""
  draw = np.random.default_rng(1)
  yield from ([0], [0, 0, 0], [1], [50], [6, 6, 6], [5, 0, 0, 13, 1, 0, 30])
  for _ in range(20):
    yield draw.integers(0, 12, draw.integers(1, 9)).tolist()


CASES = list(_cases())
LENGTHS = (1, 2, 3, 8, 17, 1000)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_token_but_bos_is_scored_exactly_once(length):
  """Brute force over token positions, and over the scored (input, target) pairs in order."""
  for lengths in CASES:
    tokens, offsets = _stream(lengths)
    dataset = packing.PackedDataset(tokens, offsets, length, keep_tail=True)
    scored = np.zeros(len(tokens))
    pairs = []
    for i in range(len(dataset)):
      sample = dataset[i]
      for t in np.flatnonzero(sample["weights"]):
        scored[i * length + t + 1] += sample["weights"][t]
        pairs.append((sample["inputs"][t], sample["targets"][t]))
    np.testing.assert_array_equal(scored, tokens != BOS)
    expected = [(a, b) for a, b in zip(tokens, tokens[1:], strict=False) if b != BOS]
    assert pairs == expected
    assert len(pairs) == sum(lengths) + len(lengths)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("keep_tail", [False, True])
def test_samples_match_a_token_by_token_transcription(length, keep_tail):
  for lengths in CASES:
    tokens, offsets = _stream(lengths)
    dataset = packing.PackedDataset(tokens, offsets, length, keep_tail)
    for i in range(len(dataset)):
      expected = {key: [] for key in dataset[i]}
      segment, position = 1, -1
      for t in range(i * length, (i + 1) * length):
        if t + 1 >= len(tokens):
          row = (PAD, PAD, 0, 0, 0)
        else:
          new = tokens[t] == BOS and t > i * length
          segment, position = (segment + 1, 0) if new else (segment, position + 1)
          row = (tokens[t], tokens[t + 1], segment, position, float(tokens[t + 1] != BOS))
        for key, value in zip(
          ("inputs", "targets", "segment_ids", "positions", "weights"), row, strict=True
        ):
          expected[key].append(value)
      for key, values in dataset[i].items():
        np.testing.assert_array_equal(values, expected[key], err_msg=key)


def test_dtypes_and_shapes_are_the_same_for_whole_and_padded_samples():
  dataset = packing.PackedDataset(*_stream([20, 3]), 8, keep_tail=True)
  for i in range(len(dataset)):
    kinds = {key: (value.dtype.name, value.shape) for key, value in dataset[i].items()}
    integers = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), ("int32", (8,)))
    assert kinds == integers | {"weights": ("float32", (8,))}
    assert all(type(value) is np.ndarray for value in dataset[i].values())


def test_training_windows_overlap_by_one_token_and_are_whole():
  tokens, offsets = _stream([30, 4, 11])
  dataset = packing.PackedDataset(tokens, offsets, 8)
  assert len(dataset) == (len(tokens) - 1) // 8
  for i in range(len(dataset)):
    sample = dataset[i]
    np.testing.assert_array_equal(sample["inputs"], tokens[8 * i : 8 * i + 8])
    np.testing.assert_array_equal(sample["targets"], tokens[8 * i + 1 : 8 * i + 9])
    assert (sample["segment_ids"] > 0).all()


def test_a_sample_depends_on_its_own_window_only():
  """No leakage: changing every token outside the window changes nothing in the sample."""
  tokens, offsets = _stream([30, 4, 11])
  for i in range(len(tokens) // 8):
    outside = tokens + 1000
    outside[8 * i : 8 * i + 9] = tokens[8 * i : 8 * i + 9]
    before, after = (packing.PackedDataset(x, offsets, 8, True)[i] for x in (tokens, outside))
    for key in before:
      np.testing.assert_array_equal(before[key], after[key])


def test_samples_are_copies():
  tokens, offsets = _stream([30])
  dataset = packing.PackedDataset(tokens, offsets, 8)
  dataset[0]["inputs"][:] = 0
  assert dataset[0]["inputs"][0] == BOS


def test_index_out_of_range_and_bad_length_are_refused():
  dataset = packing.PackedDataset(*_stream([30]), 8)
  for index in (-1, len(dataset)):
    with pytest.raises(IndexError, match=f"sample {index} of 3"):
      dataset[index]
  with pytest.raises(ValueError, match="seq_length=0 must be at least 1"):
    packing.PackedDataset(*_stream([30]), 0)


TEXTS = ["To be\nor not", "", "ünïcödé 😀", "x" * 300]


def _documents(texts=TEXTS, name="test"):
  return documents.Documents(len(texts), list(texts).__getitem__, {"name": name})


def _cache(folder):
  (cache,) = folder.iterdir()
  return cache


def test_stream_is_bos_text_eos_a_document(tmp_path):
  byte = tokenizers.ByteTokenizer()
  stream = packing.tokenize(_documents(), byte, tmp_path)
  spans = zip(stream.offsets, stream.offsets[1:], strict=False)
  pieces = [np.asarray(stream.tokens[a:b]) for a, b in spans]
  assert [byte.decode(piece) for piece in pieces] == TEXTS
  assert all(piece[0] == BOS and piece[-1] == EOS for piece in pieces)
  assert stream.text_bytes == sum(len(text.encode()) for text in TEXTS)
  assert stream.tokens.dtype == np.uint16 and stream.offsets.dtype == np.int64


class _LargeTokenizer(tokenizers.ByteTokenizer):
  """Bytes, moved to the top of a vocabulary of the given size."""

  def __init__(self, vocab_size):
    self.vocab_size = vocab_size
    self.identity = {"kind": "large", "vocab_size": vocab_size}

  def encode(self, text):
    return super().encode(text) + self.vocab_size - 260


@pytest.mark.parametrize(
  ("vocab_size", "dtype"), [(2**16 - 1, "uint16"), (2**16 + 1, "uint32"), (300_000, "uint32")]
)
def test_ids_are_stored_without_loss(tmp_path, vocab_size, dtype):
  tokenizer = _LargeTokenizer(vocab_size)
  stream = packing.tokenize(_documents(["\xff"]), tokenizer, tmp_path)
  assert stream.tokens.dtype == dtype
  assert stream.tokens.tolist() == [BOS, *tokenizer.encode("\xff"), EOS]


def test_second_call_reads_the_cache_and_no_document(tmp_path):
  byte = tokenizers.ByteTokenizer()
  first = packing.tokenize(_documents(), byte, tmp_path)

  def read(index):
    raise AssertionError("the cache was not used")

  unread = documents.Documents(len(TEXTS), read, {"name": "test"})
  second = packing.tokenize(unread, byte, tmp_path)
  np.testing.assert_array_equal(first.tokens, second.tokens)
  np.testing.assert_array_equal(first.offsets, second.offsets)
  assert first.text_bytes == second.text_bytes


def test_other_text_other_tokenizer_or_other_format_is_another_cache(tmp_path, monkeypatch):
  packing.tokenize(_documents(), tokenizers.ByteTokenizer(), tmp_path)
  packing.tokenize(_documents(name="other"), tokenizers.ByteTokenizer(), tmp_path)
  packing.tokenize(_documents(), _LargeTokenizer(300), tmp_path)
  monkeypatch.setattr(packing, "_FORMAT", packing._FORMAT + 1)
  packing.tokenize(_documents(), tokenizers.ByteTokenizer(), tmp_path)
  assert len(list(tmp_path.iterdir())) == 4


def test_a_failure_while_tokenising_leaves_nothing(tmp_path):
  def read(index):
    if index == 2:
      raise OSError("disk gone")
    return TEXTS[index]

  broken = documents.Documents(len(TEXTS), read, {"name": "test"})
  with pytest.raises(OSError, match="disk gone"):
    packing.tokenize(broken, tokenizers.ByteTokenizer(), tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_a_crash_while_tokenising_leaves_no_cache_that_is_found(tmp_path, monkeypatch):
  """A killed process runs no clean-up: what it leaves must not be taken for a cache."""
  byte = tokenizers.ByteTokenizer()
  with monkeypatch.context() as patch:
    patch.setattr(packing.shutil, "rmtree", lambda *args, **kwargs: None)
    patch.setattr(packing.files, "write_durably", lambda *args: (_ for _ in ()).throw(OSError()))
    with pytest.raises(OSError):
      packing.tokenize(_documents(), byte, tmp_path)
  assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
  stream = packing.tokenize(_documents(), byte, tmp_path)
  assert byte.decode(stream.tokens) == "".join(TEXTS)


def _truncate(name):
  return lambda cache: os.truncate(cache / name, (cache / name).stat().st_size - 2)


def _edit(**changes):
  def damage(cache):
    header = json.loads((cache / "header.json").read_bytes())
    (cache / "header.json").write_text(json.dumps(header | changes))

  return damage


def _flip(name, bit):
  """A bit, counted from the end if negative: the cheapest damage, which no length shows."""

  def damage(cache):
    content = bytearray((cache / name).read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    (cache / name).write_bytes(content)

  return damage


_BITS = (0, 37, -1)
DAMAGES = {
  "tokens_short": _truncate("tokens.bin"),
  "offsets_short": _truncate("offsets.bin"),
  "header_short": _truncate("header.json"),
  "tokens_missing": lambda cache: (cache / "tokens.bin").unlink(),
  "header_missing": lambda cache: (cache / "header.json").unlink(),
  "header_is_no_object": lambda cache: (cache / "header.json").write_text("[]"),
  "header_edited": _edit(text_bytes=7),
  "header_of_other_text": _edit(identity={}),
  **{
    f"{part}_bit_{bit}": _flip(f"{part}.bin", bit)
    for part in ("tokens", "offsets")
    for bit in _BITS
  },
  "offsets_zeroed": lambda cache: (cache / "offsets.bin").write_bytes(bytes(8 * 5)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_anew(tmp_path, damage):
  byte = tokenizers.ByteTokenizer()
  whole = packing.tokenize(_documents(), byte, tmp_path / "whole")
  packing.tokenize(_documents(), byte, tmp_path / "damaged")
  DAMAGES[damage](_cache(tmp_path / "damaged"))
  for _ in range(2):  # made anew, then read
    stream = packing.tokenize(_documents(), byte, tmp_path / "damaged")
    np.testing.assert_array_equal(stream.tokens, whole.tokens)
    np.testing.assert_array_equal(stream.offsets, whole.offsets)
    assert stream.text_bytes == whole.text_bytes


def test_digests_do_not_depend_on_the_blocks_a_file_is_hashed_in(tmp_path, monkeypatch):
  """But see every byte, also of a last, shorter block."""
  path = tmp_path / "file"
  monkeypatch.setattr(packing, "_BLOCK", 4)
  seen = set()
  for content in (
    b"abcdefghij",
    b"abcdefghik",
    b"bbcdefghij",
    b"abcdefghi",
    b"abcd",
    b"efghabcdij",
  ):
    path.write_bytes(content)
    seen.add(packing._sha256(path))
  assert len(seen) == 6


def _with_bad(bad):
  """TEXTS, some of which cannot be read."""

  def read(index):
    if index in bad:
      raise documents.BadRecord("a/shard", index, "hash mismatch")
    return TEXTS[index]

  return documents.Documents(len(TEXTS), read, {"name": "test"})


def test_a_damaged_document_ends_it_with_file_and_index_and_leaves_nothing(tmp_path):
  message = r"^a/shard: record 2 cannot be read \(hash mismatch\): repair it, or set data\.skip_bad"
  with pytest.raises(ValueError, match=message):
    packing.tokenize(_with_bad({2, 3}), tokenizers.ByteTokenizer(), tmp_path)
  with pytest.raises(ValueError, match="record 3 .*; 1 others were left out"):
    packing.tokenize(
      _with_bad({2, 3}), tokenizers.ByteTokenizer(), tmp_path, documents.BadRecords(1)
    )
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left_out", [{0}, {1, 3}, {0, 1, 2}])
def test_the_stream_without_damaged_documents_is_that_of_the_others(tmp_path, left_out):
  """And the cache remembers which they were, though no document is read any more."""
  byte = tokenizers.ByteTokenizer()
  others = [text for i, text in enumerate(TEXTS) if i not in left_out]
  expected = packing.tokenize(_documents(others), byte, tmp_path / "others")
  for source in (_with_bad(left_out), _documents()):
    bad = documents.BadRecords(3)
    stream = packing.tokenize(source, byte, tmp_path / "cache", bad)
    np.testing.assert_array_equal(stream.tokens, expected.tokens)
    np.testing.assert_array_equal(stream.offsets, expected.offsets)
    assert stream.text_bytes == expected.text_bytes
    assert set(stream.left_out) == left_out
    assert [int(record.split()[2]) for record in bad.found] == sorted(left_out)


def test_a_cache_without_too_many_documents_is_made_anew(tmp_path):
  """They may have been repaired since; a run that may leave out none must not train on it."""
  byte = tokenizers.ByteTokenizer()
  packing.tokenize(_with_bad({2}), byte, tmp_path, documents.BadRecords(1))
  with pytest.raises(ValueError, match="record 2 cannot be read"):
    packing.tokenize(_with_bad({2}), byte, tmp_path)
  packing.tokenize(_with_bad({2}), byte, tmp_path, documents.BadRecords(1))
  stream = packing.tokenize(_documents(), byte, tmp_path)
  assert byte.decode(stream.tokens) == "".join(TEXTS) and stream.left_out == ()


def test_documents_of_which_none_can_be_read_are_refused(tmp_path):
  with pytest.raises(ValueError, match="none of the 4 documents can be read"):
    packing.tokenize(
      _with_bad({0, 1, 2, 3}), tokenizers.ByteTokenizer(), tmp_path, documents.BadRecords(9)
    )
  assert list(tmp_path.iterdir()) == []


def test_losing_the_race_to_make_a_cache_uses_the_winners(tmp_path):
  """The documents' reader makes the same cache meanwhile, as another process would."""
  byte = tokenizers.ByteTokenizer()

  def read(index):
    packing.tokenize(_documents(), byte, tmp_path)
    return TEXTS[index]

  racing = documents.Documents(len(TEXTS), read, {"name": "test"})
  stream = packing.tokenize(racing, byte, tmp_path)
  assert byte.decode(stream.tokens) == "".join(TEXTS)
  assert len(list(tmp_path.iterdir())) == 1


def test_a_memory_map_travels_to_workers_as_a_file_name(tmp_path):
  """Grain sends the dataset's state to each spawned worker: names, not the tokens."""
  stream = packing.tokenize(_documents(["x" * 10**5]), tokenizers.ByteTokenizer(), tmp_path)
  dataset = packing.PackedDataset(stream.tokens, stream.offsets, 8)
  assert len(repr(dataset.__getstate__())) < 1000
  assert not any(isinstance(value, np.ndarray) for value in dataset.__getstate__().values())
  received = copy.copy(dataset)
  np.testing.assert_array_equal(received[7]["inputs"], dataset[7]["inputs"])
  part = packing.PackedDataset(stream.tokens[:50], stream.offsets, 8)
  assert len(copy.copy(part)) == len(part) == 6


# ---------------------------------------------------------------------------------------------
# Windows behind a bos
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS[1:])
@pytest.mark.parametrize("keep_tail", [False, True])
def test_marked_windows_match_a_token_by_token_transcription(length, keep_tail):
  """Every token in one window, behind a bos that is its document's or else the window's."""
  for lengths in CASES:
    tokens, offsets = _stream(lengths)
    dataset = packing.MarkedDataset(tokens, offsets, length, keep_tail)
    step = length - 1
    assert len(dataset) == (-(-len(tokens) // step) if keep_tail else len(tokens) // step)
    for i in range(len(dataset)):
      inputs, segments, positions = [], [], []
      for token in tokens[i * step : (i + 1) * step]:
        if token == BOS:
          segments.append(1 + max(segments, default=0))
          positions.append(0)
        else:
          if not inputs:
            inputs.append(BOS)
            segments.append(1)
            positions.append(0)
          segments.append(segments[-1])
          positions.append(positions[-1] + 1)
        inputs.append(token)
      sample, rest = dataset[i], length - len(inputs)
      np.testing.assert_array_equal(sample["inputs"], inputs + [PAD] * rest)
      np.testing.assert_array_equal(sample["segment_ids"], segments + [0] * rest)
      np.testing.assert_array_equal(sample["positions"], positions + [0] * rest)
      assert {values.dtype for values in sample.values()} == {np.dtype(np.int32)}


def test_marked_windows_need_room_for_a_token():
  with pytest.raises(ValueError, match="seq_length=1 must be at least 2"):
    packing.MarkedDataset(*_stream([5]), 1)
