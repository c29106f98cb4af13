"""Documents from the user's own UTF-8 text files, indexed by byte range and read on demand."""

import glob
import os
from collections.abc import Sequence
from typing import NamedTuple

from magneto_jax.data import documents


class _Span(NamedTuple):
  """The bytes of one document, which is the file's index-th."""

  path: str
  index: int
  start: int
  stop: int


def text_files(
  *,
  train_files: Sequence[str],
  validation_files: Sequence[str] = (),
  test_files: Sequence[str] = (),
  document_separator: str = "",
  validation_fraction: float = 0.1,
  validation_split: str = "validation",
) -> tuple[documents.Documents, documents.Documents]:
  """Documents of UTF-8 text files, with a held-out part.

  Without `validation_files`, the tail of *each* training file is held out, so that every file
  is represented in both parts: the cut is the first document boundary (else the first end of
  line, else the first character) at or after `1 - validation_fraction` of the file's bytes.

  Args:
    train_files: paths or glob patterns; the files of a pattern come in sorted order.
    validation_files: the same for the held-out text; empty takes it from the training files.
    test_files: the same for the split `test`.
    document_separator: the string between two documents of one file, for example a blank line or
      "<|endoftext|>"; it belongs to neither. Empty means one document a file.
    validation_fraction: in (0, 1); part of each file's bytes, read only without
      `validation_files`.
    validation_split: what is evaluated on: `validation`, `test` (the `test_files`) or `train`.

  Returns:
    Training documents, and those of the split. Empty documents are left out; one that is not UTF-8
    is a BadRecord when it is read.

  Raises:
    FileNotFoundError: a pattern matches no file.
    TypeError: the files are one string, not a sequence of them.
    ValueError: a file is empty or in both parts, a part has no document, there is no such split,
      or `validation_fraction` is out of range.
  """
  train_paths = expand(train_files, "train_files")
  separator = document_separator.encode()
  if validation_files:
    validation_paths = expand(validation_files, "validation_files", apart_from=train_paths)
    train = [span for path in train_paths for span in _spans(path, _read(path), separator)]
    validation = [s for path in validation_paths for s in _spans(path, _read(path), separator)]
  else:
    if not 0 < validation_fraction < 1:
      raise ValueError(f"{validation_fraction=} must lie in (0, 1); or name validation_files")
    train, validation = [], []
    for path in train_paths:
      content = _read(path)
      cut = _cut(content, separator, 1 - validation_fraction)
      kept = _spans(path, content, separator, stop=cut)
      train += kept
      validation += _spans(path, content, separator, start=cut, index=len(kept))
  held = {"train": train, "validation": validation}
  if validation_split == "test":
    test_paths = expand(test_files, "test_files", apart_from=train_paths)
    held["test"] = [span for path in test_paths for span in _spans(path, _read(path), separator)]
  if validation_split not in held:
    raise ValueError(
      f"text files have no split {validation_split!r}, only train, validation and test (test_files)"
    )
  return _documents(train, "train"), _documents(held[validation_split], validation_split)


def expand(patterns: Sequence[str], argument: str, *, apart_from: Sequence[str] = ()) -> list[str]:
  """Absolute paths of the files that patterns name, in order, each once.

  Args:
    patterns: paths or glob patterns; the files of a pattern come in sorted order.
    argument: what they were given as, for messages.
    apart_from: the expanded `train_files`, none of which may be among them.
  """
  if isinstance(patterns, str):  # its letters would be taken for patterns
    raise TypeError(f"{argument} must be a sequence of paths, got the string {patterns!r}")
  if not patterns:
    raise ValueError(f"{argument} is empty: name at least one file of your own")
  paths = {}
  for pattern in patterns:
    expanded = os.path.expanduser(pattern)
    # A path that exists is meant literally: file names may hold glob characters.
    found = [expanded] if os.path.isfile(expanded) else sorted(glob.glob(expanded, recursive=True))
    files = [os.path.realpath(path) for path in found if os.path.isfile(path)]
    if not files:
      hint = f"; for the files of a folder give {pattern}/*" if os.path.isdir(expanded) else ""
      raise FileNotFoundError(f"{argument}: no file matches {pattern!r} (in {os.getcwd()}){hint}")
    paths.update(dict.fromkeys(files))
  if shared := sorted(paths.keys() & {*apart_from}):
    raise ValueError(f"train_files and {argument} must not share files: {shared}")
  return list(paths)


def _read(path: str) -> bytes:
  """The bytes of a text file, which must hold any text."""
  with open(path, "rb") as f:
    content = f.read()
  if not content.strip():
    raise ValueError(f"{path} holds no text: remove it from the list of files")
  return content


def _cut(content: bytes, separator: bytes, fraction: float) -> int:
  """Offset that splits a file: see the rule in `text_files`."""
  target = int(fraction * len(content))
  for boundary in filter(None, (separator, b"\n")):
    found = content.find(boundary, max(0, target - len(boundary)))
    if 0 <= found < len(content) - len(boundary):
      return found + len(boundary)
  while target < len(content) and content[target] & 0xC0 == 0x80:  # inside a character
    target += 1
  return target


def _spans(
  path: str,
  content: bytes,
  separator: bytes,
  start: int = 0,
  stop: int | None = None,
  index: int = 0,
) -> list[_Span]:
  """The documents of `content[start:stop]`, counted from `index`, but those without text."""
  stop = len(content) if stop is None else stop
  spans = []
  while start < stop:
    end = content.find(separator, start, stop) if separator else -1
    end = stop if end < 0 else end
    if content[start:end].strip():
      spans.append(_Span(path, index + len(spans), start, end))
    start = end + len(separator) if separator else stop
  return spans


def _documents(spans: list[_Span], split: str) -> documents.Documents:
  """Wraps spans; the identity digests the content, so moving a file changes nothing."""
  if not spans:
    raise ValueError(
      f"text_files: no {split} document is left; give more text, another validation_fraction "
      "or validation_files"
    )
  return documents.Documents(
    size=len(spans),
    read=lambda index: _text(spans[index]),
    identity={
      "source": "text_files",
      "split": split,
      "documents": len(spans),
      "sha256": documents.texts_digest(map(_read_span, spans)),
    },
  )


def _read_span(span: _Span) -> bytes:
  with open(span.path, "rb") as f:
    f.seek(span.start)
    return f.read(span.stop - span.start)


def _text(span: _Span) -> str:
  content = _read_span(span)
  if len(content) != span.stop - span.start:
    raise documents.BadRecord(span.path, span.index, "the file has become shorter since")
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    raise documents.BadRecord(
      span.path,
      span.index,
      f"not UTF-8: byte {content[error.start]:#04x} at offset {span.start + error.start}; convert"
      " it, for example with iconv -f latin1 -t utf-8",
    ) from None
