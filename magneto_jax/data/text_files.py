"""Documents from the user's own UTF-8 text files, indexed by byte range and read on demand.

With what every source of one's own files shares: which files are meant, and how they begin.
"""

import codecs
import glob
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

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
    ValueError: a file is empty or in two parts, a part has no document, there is no such split,
      or `validation_fraction` is out of range.
  """
  paths = of_parts(train_files, validation_files, test_files, validation_split)
  separator = document_separator.encode()
  held: dict[str, list[_Span]] = {"train": [], "validation": []}
  if "validation" not in paths:
    if not 0 < validation_fraction < 1:
      raise ValueError(f"{validation_fraction=} must lie in (0, 1); or name validation_files")
    for path in paths.pop("train"):
      content = _read(path)
      cut = _cut(content, separator, 1 - validation_fraction)
      kept = _spans(path, content, separator, stop=cut)
      held["train"] += kept
      held["validation"] += _spans(path, content, separator, start=cut, index=len(kept))
  for part in paths:
    held[part] = [s for path in paths[part] for s in _spans(path, _read(path), separator)]
  return _documents(held["train"], "train"), _documents(held[validation_split], validation_split)


# ---------------------------------------------------------------------------------------------
# Files of one's own
# ---------------------------------------------------------------------------------------------


def of_parts(
  train_files: Sequence[str],
  validation_files: Sequence[str],
  test_files: Sequence[str],
  split: str,
) -> dict[str, list[str]]:
  """Absolute paths by part, each once and in one part: `train`, and those that are named.

  Args:
    train_files: paths or glob patterns; the files of a pattern come in sorted order.
    validation_files: the same; empty: there is no such part here.
    test_files: the same of the part `test`, which is there if it is the split.
    split: what is evaluated on: `train`, `validation` or `test`.
  """
  if split not in ("train", "validation", "test"):
    raise ValueError(
      f"files of one's own have no split {split!r}, only train, validation and test (test_files)"
    )
  named = {"train": train_files}
  if validation_files:
    named["validation"] = validation_files
  if split == "test":
    named["test"] = test_files
  parts: dict[str, list[str]] = {}
  for part, patterns in named.items():
    found = _expand(patterns, f"{part}_files")
    for other, paths in parts.items():
      if shared := sorted({*paths} & {*found}):
        raise ValueError(f"{other}_files and {part}_files must not share files: {shared}")
    parts[part] = found
  return parts


def _expand(patterns: Sequence[str], argument: str) -> list[str]:
  """Absolute paths of the files that patterns name, given as `argument`, in order, each once."""
  if isinstance(patterns, str):  # its letters would be taken for patterns
    raise TypeError(f"{argument} must be a sequence of paths, got the string {patterns!r}")
  if not patterns:
    raise ValueError(
      f"{argument} is empty: name at least one file of your own, as"
      f" --config.data.{argument}='texts/*.txt'"
    )
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
  return list(paths)


def text_begin(content: bytes | np.ndarray) -> int:
  """Where a file's text begins: behind its mark of byte order, if it has one."""
  mark = codecs.BOM_UTF8
  return len(mark) if bytes(content[: len(mark)]) == mark else 0


def json_object(line: str) -> dict[str, Any]:
  """The object that a line of JSON is; ValueError with what is wrong with it."""
  if not line.strip():
    raise ValueError("the line is empty")
  try:
    values = json.loads(line)
    json.dumps(values, ensure_ascii=False).encode()
  except UnicodeEncodeError as error:  # JSON's escapes can say what is no text.
    half = error.object[error.start]
    raise ValueError(f"not text: it holds {half!r}, which is half a character") from None
  except (ValueError, RecursionError) as error:
    raise ValueError(f"not JSON: {error}") from None
  if not isinstance(values, dict):
    raise ValueError(f"{values!r:.40} is not a JSON object")
  return values


# ---------------------------------------------------------------------------------------------


def _read(path: str) -> bytes:
  """The bytes of a text file, which must hold any text."""
  with open(path, "rb") as f:
    content = f.read()
  if not content[text_begin(content) :].strip():
    raise ValueError(f"{path} holds no text: remove it from the list of files")
  return content


def _cut(content: bytes, separator: bytes, fraction: float) -> int:
  """Offset that splits a file: see the rule in `text_files`."""
  begin = text_begin(content)
  target = begin + int(fraction * (len(content) - begin))
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
  start = max(start, text_begin(content))
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
    offset = span.start + error.start
    with open(span.path, "rb") as f:
      line = f.read(offset).count(b"\n") + 1
    raise documents.BadRecord(
      span.path,
      span.index,
      f"not UTF-8: byte {content[error.start]:#04x} in line {line}, at offset {offset}; convert it,"
      " for example with iconv -f latin1 -t utf-8",
    ) from None
