"""Documents as one stream of tokens on disk, and windows of that stream as samples.

A document lies in the stream as `[bos] tokens [eos]`. Sample i is a pure function of the stream
and i: tokens `[i T, (i + 1) T]`, the first T of them inputs and the last T targets.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from magneto_jax.data import documents as documents_lib
from magneto_jax.data import files, tokenizers

_FORMAT = 2  # of the cache; raise it when the files or the rule that makes the stream change
_HEADER, _TOKENS, _OFFSETS = "header.json", "tokens.bin", "offsets.bin"
_BLOCK = 2**24  # bytes of a file that have a digest of their own, so that all cores can check them


class TokenStream(NamedTuple):
  """Tokenised documents, end to end.

  Attributes:
    tokens: [tokens], uint16 or uint32, memory-mapped.
    offsets: [documents + 1], int64: where each document starts, and the end.
    text_bytes: UTF-8 bytes of the raw text, the denominator of bits per byte.
    left_out: the indices of the documents that are not in the stream: those that are damaged.
  """

  tokens: np.ndarray
  offsets: np.ndarray
  text_bytes: int
  left_out: tuple[int, ...] = ()


class Mapped:
  """A record whose memory maps travel to worker processes as file names, not as gigabytes."""

  def __getstate__(self) -> dict[str, Any]:
    return {name: _detached(value) for name, value in vars(self).items()}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update({name: _attached(value) for name, value in state.items()})


class _Windows(Mapped):
  """Windows of a token stream: a random-access data source for Grain.

  Attributes:
    tokens: [tokens], the stream.
    offsets: [documents + 1], int64 document starts and the end.
    seq_length: T.
    keep_tail: whether a last, shorter window is kept and padded (evaluation) or dropped
      (training).
  """

  def __init__(
    self, tokens: np.ndarray, offsets: np.ndarray, seq_length: int, keep_tail: bool = False
  ):
    if seq_length < self._shortest:
      raise ValueError(f"{seq_length=} must be at least {self._shortest}")
    self.tokens = tokens
    self.offsets = offsets
    self.seq_length = seq_length
    self.keep_tail = keep_tail

  def _start(self, index: int, step: int) -> int:
    """Where window `index` starts, if there is one; each starts `step` tokens after the last."""
    if not 0 <= index < len(self):
      raise IndexError(f"sample {index} of {len(self)}")
    return int(index) * step

  def _count(self, tokens: int, step: int) -> int:
    """How many windows so many tokens make."""
    return -(-tokens // step) if self.keep_tail else tokens // step

  def _documents(self, start: int, length: int, before: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions of the tokens [start, start + length), and of `before` in front.

    What stands in front belongs to the first document.
    """
    begins = np.zeros(before + length, bool)
    first, last = np.searchsorted(self.offsets[:-1], [start + 1, start + length])
    begins[np.asarray(self.offsets[first:last]) - start + before] = True
    segments = 1 + np.cumsum(begins, dtype=np.int32)
    steps = np.arange(len(begins), dtype=np.int32)
    return segments, steps - np.maximum.accumulate(np.where(begins, steps, 0))


class PackedDataset(_Windows):
  """Windows to predict each token from those before it; attributes see `_Windows`.

  Every token but a document's bos is the target of exactly one window, so with `keep_tail` the
  sum of weighted losses over all samples is the loss of the whole text. A window's first target
  is predicted from one token: the score is that of a model whose memory is cut every
  `seq_length` tokens, an upper bound of the loss with full context.
  """

  _shortest = 1

  def __len__(self) -> int:
    return self._count(len(self.tokens) - 1, self.seq_length)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns sample `index`, arrays of shape [T].

    Args:
      index: in [0, len(self)).

    Returns:
      inputs: int32 tokens.
      targets: int32, the token after each input.
      segment_ids: int32, 1, 2, ... a document of the window; 0 for padding. Attention must stay
        within a segment.
      positions: int32, counted from the document's start or, if it started earlier, from the
        window's.
      weights: float32, 1 where the target is of the same document as the input, else 0 (a next
        document's bos, padding).
    """
    start = self._start(index, self.seq_length)
    window = np.array(self.tokens[start : start + self.seq_length + 1], np.int32)
    segments, positions = self._documents(start, len(window))
    sample = {
      "inputs": window[:-1],
      "targets": window[1:],
      "segment_ids": segments[:-1],
      "positions": positions[:-1],
      "weights": (segments[1:] == segments[:-1]).astype(np.float32),
    }
    # Zero is the pad id, the segment of padding and its weight.
    return _filled_up(sample, self.seq_length)


class MarkedDataset(_Windows):
  """Windows to read as a whole, each behind a bos; attributes see `_Windows`.

  Every token of the stream is in exactly one window, of T - 1 of them. A window that starts with a
  document's own bos has no second one, and ends in padding.
  """

  _shortest = 2

  def __len__(self) -> int:
    return self._count(len(self.tokens), self.seq_length - 1)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns sample `index`, arrays of shape [T].

    Args:
      index: in [0, len(self)).

    Returns:
      inputs: int32 tokens.
      segment_ids, positions: see `PackedDataset`; positions count the window's bos.
    """
    start = self._start(index, self.seq_length - 1)
    window = np.array(self.tokens[start : start + self.seq_length - 1], np.int32)
    mark = [] if window[0] == tokenizers.BOS_ID else [tokenizers.BOS_ID]
    segments, positions = self._documents(start, len(window), before=len(mark))
    inputs = np.concatenate([np.array(mark, np.int32), window])
    sample = {"inputs": inputs, "segment_ids": segments, "positions": positions}
    return _filled_up(sample, self.seq_length)


def _filled_up(sample: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
  """The arrays with zeros behind, up to a length."""
  missing = length - len(sample["inputs"])
  return {n: np.pad(x, (0, missing)) for n, x in sample.items()} if missing else sample


class _MappedFile(NamedTuple):
  path: str
  dtype: str


def _detached(value: Any) -> Any:
  # A slice of a map also has the file's name, so compare sizes.
  if isinstance(value, np.memmap) and value.nbytes == os.path.getsize(value.filename):
    return _MappedFile(str(value.filename), value.dtype.str)
  return value


def _attached(value: Any) -> Any:
  return np.memmap(*value, mode="r") if isinstance(value, _MappedFile) else value


def tokenize(
  documents: documents_lib.Documents,
  tokenizer: tokenizers.Tokenizer,
  cache_dir: str | os.PathLike[str],
  bad: documents_lib.BadRecords | None = None,
) -> TokenStream:
  """Returns the token stream of documents, from the cache if it is there.

  The cache's directory is named after a digest of both identities, so another text or tokenizer
  never meets an old cache. It is written under another name, made durable and then renamed: a
  crash leaves no half cache, at most a hidden directory that may be deleted. Each time a cache is
  opened it is read once and held against digests in its header; one that is damaged, if only by a
  bit, is made anew, and so is one that was made without more documents than may be left out now.

  Args:
    documents: the texts, read once, one at a time.
    tokenizer: see `Tokenizer`.
    cache_dir: directory of all caches; made if missing.
    bad: what counts the damaged documents, which are left out; None: none may be damaged. A cache
      remembers them.

  Returns:
    The stream, memory-mapped.

  Raises:
    ValueError: one damaged document too many; its file and its index in it are named.
  """
  bad = documents_lib.BadRecords() if bad is None else bad
  identity = {
    "format": _FORMAT,
    "documents": dict(documents.identity),
    "tokenizer": dict(tokenizer.identity),
  }
  final = pathlib.Path(cache_dir) / files.digest(identity)[:32]
  is_replaced = False
  if final.exists():
    try:
      return _open(final, identity, bad)
    except _Damaged as error:
      logging.warning("the token cache %s is made anew (%s)", final, error)
      is_replaced = True
  temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
  temporary.mkdir(parents=True)
  try:
    _write(temporary, documents, tokenizer, identity, bad)
    if is_replaced:  # Only now: another run may read what this one cannot make.
      shutil.rmtree(final, ignore_errors=True)
    try:
      temporary.rename(final)
    except OSError:
      if not final.exists():  # else another process has made the same cache meanwhile
        raise
    files.sync(final.parent)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return _open(final, identity, bad)


class _Damaged(Exception):
  """Why a cache cannot be used."""


def _write(
  directory: pathlib.Path,
  documents: documents_lib.Documents,
  tokenizer: tokenizers.Tokenizer,
  identity: dict[str, Any],
  bad: documents_lib.BadRecords,
) -> None:
  """Writes the three files of a cache; the header, which vouches for the others, comes last."""
  dtype = np.dtype("<u2" if tokenizer.vocab_size < 2**16 else "<u4")
  offsets, text_bytes, tell_at = [0], 0, time.monotonic() + 30
  left_out: dict[int, str] = {}
  with open(directory / _TOKENS, "wb") as f:
    for texts in _batches(bad.readable(documents, left_out=left_out)):
      for text, ids in zip(texts, tokenizer.encode_all(texts), strict=True):
        tokens = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]).astype(dtype)
        f.write(tokens.tobytes())
        offsets.append(offsets[-1] + len(tokens))
        text_bytes += len(text.encode())
      if time.monotonic() > tell_at:
        done, tell_at = len(offsets) - 1, time.monotonic() + 30
        logging.warning(f"tokenised {done:,} of {len(documents):,} documents")
    f.flush()
    os.fsync(f.fileno())
  if len(offsets) == 1:
    raise ValueError(f"none of the {len(documents)} documents can be read: {documents.identity}")
  files.write_durably(directory / _OFFSETS, np.asarray(offsets, "<i8").tobytes())
  header = {
    "identity": identity,
    "dtype": dtype.str,
    "tokens": offsets[-1],
    "documents": len(offsets) - 1,
    "text_bytes": text_bytes,
    "left_out": list(left_out.items()),
    "files": {name: _sha256(directory / name) for name in (_TOKENS, _OFFSETS)},
  }
  header["sha256"] = files.digest(header)
  files.write_durably(directory / _HEADER, json.dumps(header, indent=2).encode())


def _sha256(path: pathlib.Path) -> str:
  """A digest of a file: SHA-256 of the SHA-256 of its blocks, which all cores compute together."""
  content = np.memmap(path, np.uint8, mode="r")
  blocks = [content[start : start + _BLOCK] for start in range(0, len(content), _BLOCK)]
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
    digests = threads.map(lambda block: hashlib.sha256(block).digest(), blocks)
  return hashlib.sha256(b"".join(digests)).hexdigest()


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
  """Consecutive documents, at least a million characters at a time: work for every core."""
  batch, size = [], 0
  for text in documents:
    batch.append(text)
    size += len(text)
    if size >= 1_000_000:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _open(
  directory: pathlib.Path, identity: dict[str, Any], bad: documents_lib.BadRecords
) -> TokenStream:
  """Maps a cache, once its files are seen to be those that were written; else _Damaged."""
  try:
    header = files.read_json(directory / _HEADER)
    sha256 = header.pop("sha256")
    if sha256 != files.digest(header) or header["identity"] != identity:
      raise _Damaged(f"{_HEADER} has been changed")
    for name, expected in header["files"].items():
      if _sha256(directory / name) != expected:
        raise _Damaged(f"{name} has been changed")
    tokens = np.memmap(directory / _TOKENS, np.dtype(header["dtype"]), mode="r")
    offsets = np.memmap(directory / _OFFSETS, np.dtype("<i8"), mode="r")
  except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
    raise _Damaged(f"unreadable: {error!r}") from None
  left_out = dict(header["left_out"])
  if len({*bad.found, *left_out.values()}) > max(bad.most, len(bad.found)):
    raise _Damaged(f"it was made without {len(left_out)} documents that were damaged")
  for record in left_out.values():
    bad.add(record)
  return TokenStream(tokens, offsets, header["text_bytes"], tuple(left_out))
