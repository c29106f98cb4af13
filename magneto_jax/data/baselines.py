"""What needs no neural network: how well counts of bytes and a compressor predict a text."""

import lzma
from collections.abc import Iterable

import numpy as np


def bits_per_byte(train: Iterable[str], validation: Iterable[str]) -> dict[str, float]:
  """Bits a byte of the validation text for three models of the training text.

    unigram   -mean log2 p(y_t),          p(y) = (1 + n(y)) / sum_y (1 + n(y))
    bigram    -mean log2 p(y_t | y_t-1),  likewise with the counts of pairs
    xz        8 (|xz(train validation)| - |xz(train)|) / |validation|, at `xz -9e`

  Counts n are of the training text's bytes; a bigram's mean leaves out the first byte. Texts are
  joined by a blank line and held in memory, which xz needs ten times over: for megabytes.

  Args:
    train: the training documents.
    validation: the validation documents.

  Returns:
    {"unigram", "bigram", "xz"}: bits a byte; nothing for a validation text of one byte or none.
  """
  train, validation = ("\n\n".join(texts).encode() for texts in (train, validation))
  if len(validation) < 2:
    return {}
  x, y = (np.frombuffer(text, np.uint8).astype(np.int64) for text in (train, validation))
  single = 1.0 + np.bincount(x, minlength=256)
  pairs = 1.0 + np.bincount(256 * x[:-1] + x[1:], minlength=256 * 256).reshape(256, 256)
  log2_single = np.log2(single / single.sum())
  log2_pairs = np.log2(pairs / pairs.sum(axis=1, keepdims=True))
  return {
    "unigram": float(-np.mean(log2_single[y])),
    "bigram": float(-np.mean(log2_pairs[y[:-1], y[1:]])),
    "xz": 8 * (_xz_bytes(train + validation) - _xz_bytes(train)) / len(validation),
  }


def _xz_bytes(text: bytes) -> int:
  return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
