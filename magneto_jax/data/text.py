"""Text for language modelling in one call: documents, tokenizer, packed training and held-out."""

import dataclasses
import json
import os
import pathlib
import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from magneto_jax.data import documents, files, packing, sources, tokenizers

TOKENIZER_FILE = "tokenizer.model"
CHARACTERS_FILE = "characters.json"


def plain(words: str) -> str:
  """A text in Unicode's form NFC, with single spaces in it and none around it."""
  return " ".join(unicodedata.normalize("NFC", words).split())


@dataclasses.dataclass(frozen=True)
class TextData:
  """Tokenised text, ready for the pipelines.

  Attributes:
    train: whole windows of the training text.
    validation: windows that hold every token of the validation text once, the last one padded.
    tokenizer: trained on the training text only, or loaded.
    train_bytes: UTF-8 bytes of the raw training text.
    validation_bytes: UTF-8 bytes of the raw validation text: summed nats / (bytes * ln 2) is bits
      per byte, which compares tokenizers.
    documents: the raw training and validation documents.
    bad_records: the damaged documents that were left out: file, index in it, and what is wrong.
    identity: JSON-able values that name all of this exactly; keep them in the checkpoint and
      refuse to resume when they differ.
    augment, mix: nothing: a window is read as it is.
  """

  train: packing.PackedDataset
  validation: packing.PackedDataset
  tokenizer: tokenizers.Tokenizer
  train_bytes: int
  validation_bytes: int
  documents: tuple[documents.Documents, documents.Documents]
  bad_records: tuple[str, ...]
  identity: Mapping[str, Any]
  augment: None = None
  mix: None = None

  def describe(self) -> str:
    """Windows, tokens and pieces."""
    return (
      f"{len(self.train):,} training and {len(self.validation):,} validation samples of"
      f" {self.train.seq_length} tokens, {self.tokenizer.vocab_size:,} in the vocabulary"
    )

  def show(self, sample: Mapping[str, np.ndarray]) -> str:
    """The start of a window, as text."""
    return f"starts with {self.tokenizer.decode(sample['inputs'][:48])!r}"


def load_text(
  *,
  workdir: str | os.PathLike[str],
  name: str = "embedded",
  tokenizer: str = "sentencepiece",
  vocab_size: int = 1024,
  tokenizer_file: str = "",
  seq_length: int = 256,
  cache_dir: str = "",
  skip_bad: int = 0,
  expected: Mapping[str, Any] | None = None,
  **source_options: Any,
) -> TextData:
  """Loads, tokenises and packs a source of text.

  Args:
    workdir: where the tokenizer is kept as `tokenizer.model`; a later call with the same directory
      loads it instead of training again.
    name: a name in `SOURCES` or a TFDS data set, see `load_documents`.
    tokenizer: a name in `TOKENIZERS`: "sentencepiece" or "byte".
    vocab_size: ids of a trained tokenizer; bytes and loaded models have their own number.
    tokenizer_file: a sentencepiece model to load instead of training one.
    seq_length: T, tokens of a sample.
    cache_dir: where token streams are cached; empty means `workdir/cache`. Runs that share it
      tokenise a text once.
    skip_bad: how many damaged documents may be left out, of training and validation together.
    expected: the `identity` of an earlier call, whose texts these must be: others are refused
      before anything is written. Without its `validation` any text may be evaluated on, that of the
      training too.
    **source_options: the fields of `SourceOptions`, such as `train_files` or `data_dir`.

  Returns:
    The packed data.

  Raises:
    FileNotFoundError: text or tokenizer are not on disk.
    ValueError: a value is out of range, `workdir` holds the tokenizer of other text, the texts are
      not the expected ones, or more than `skip_bad` documents are damaged.

  Example:
    >>> data = load_text(workdir="/tmp/run", tokenizer="byte")
    >>> data.validation_bytes
    98295
  """
  if tokenizer not in TOKENIZERS:
    raise ValueError(f"{tokenizer=} must be one of {sorted(TOKENIZERS)}")
  train, validation = sources.load_documents(name, apart=expected is None, **source_options)
  refuse_others({"train": train.identity, "validation": validation.identity}, expected)
  bad = documents.BadRecords(skip_bad)
  made = TOKENIZERS[tokenizer](
    train,
    pathlib.Path(workdir),
    vocab_size,
    tokenizer_file,
    None if expected is None else expected.get("tokenizer", {}),
    bad,
  )
  cache = cache_dir or pathlib.Path(workdir) / "cache"
  train_stream = packing.tokenize(train, made, cache, bad)
  validation_stream = packing.tokenize(validation, made, cache, bad)
  # By the indices: a file may be elsewhere when the run is resumed. Nothing where all can be read,
  # so that a run from before there was any such choice goes on.
  left_out = {"train": train_stream.left_out, "validation": validation_stream.left_out}
  return TextData(
    train=packing.PackedDataset(train_stream.tokens, train_stream.offsets, seq_length),
    validation=packing.PackedDataset(
      validation_stream.tokens, validation_stream.offsets, seq_length, keep_tail=True
    ),
    tokenizer=made,
    train_bytes=train_stream.text_bytes,
    validation_bytes=validation_stream.text_bytes,
    documents=(train, validation),
    bad_records=tuple(bad.found),
    identity={
      "train": dict(train.identity),
      "validation": dict(validation.identity),
      "tokenizer": dict(made.identity),
      "seq_length": seq_length,
      **({"left_out": left_out} if bad.found else {}),
    },
  )


def refuse_others(
  identities: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Any] | None
) -> None:
  """Raises ValueError if a run had other texts before; see `changed_part`."""
  if part := changed_part(identities, expected):
    raise ValueError(
      f"the {part} text is not the one that this run was started with: bring that back, or use"
      " another workdir"
    )


def changed_part(
  identities: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Any] | None
) -> str | None:
  """The first part that is not what a run had before; None if there is none.

  Of a new one nothing is expected; and nothing of the validation part where that is another split.
  """
  for part, identity in identities.items():
    if expected is None or (part == "validation" and part not in expected):
      continue
    if files.digest(expected.get(part)) != files.digest(dict(identity)):
      return part
  return None


class Kept(NamedTuple):
  """A tokenizer that a run keeps: its class, and its file's name."""

  kind: type
  file: str


# By the name of the tokenizer; of bytes there is nothing to keep.
KEPT = {
  "sentencepiece": Kept(tokenizers.SentencePieceTokenizer, TOKENIZER_FILE),
  "xlmr": Kept(tokenizers.XLMRTokenizer, TOKENIZER_FILE),
  "char": Kept(tokenizers.CharTokenizer, CHARACTERS_FILE),
}


def _kept(
  kind: type,
  kept: pathlib.Path,
  tokenizer_file: str,
  expected: Mapping[str, Any],
) -> tokenizers.Tokenizer:
  """The tokenizer that a run keeps; the file it came from may be gone, but not be another."""
  loaded = kind.load(kept, expected)
  if tokenizer_file and os.path.exists(tokenizer_file):
    given = kind.load(tokenizer_file)
    if given.identity != loaded.identity:
      raise ValueError(f"{tokenizer_file=} is not the one that this run was started with")
  return loaded


def _given(
  kind: type[tokenizers.SentencePieceTokenizer] | type[tokenizers.XLMRTokenizer],
  tokenizer_file: str,
  kept: pathlib.Path,
) -> tokenizers.Tokenizer:
  """The user's model, of which the run keeps a copy."""
  loaded = kind.load(tokenizer_file)
  files.write_durably(kept, loaded.model)
  return loaded


def _byte(
  train: documents.Documents,
  workdir: pathlib.Path,
  vocab_size: int,
  tokenizer_file: str,
  expected: Mapping[str, Any] | None,
  bad: documents.BadRecords,
) -> tokenizers.Tokenizer:
  del train, workdir, vocab_size, expected, bad  # nothing to train
  if tokenizer_file:
    raise ValueError(f"{tokenizer_file=} is a sentencepiece model: set tokenizer='sentencepiece'")
  return tokenizers.ByteTokenizer()


def _sentencepiece(
  train: documents.Documents,
  workdir: pathlib.Path,
  vocab_size: int,
  tokenizer_file: str,
  expected: Mapping[str, Any] | None,
  bad: documents.BadRecords,
) -> tokenizers.Tokenizer:
  """The user's model, of which the run keeps a copy; or the run's own; or one trained for it."""
  model, note = workdir / TOKENIZER_FILE, workdir / "tokenizer.json"
  if expected is not None and model.exists():
    return _kept(tokenizers.SentencePieceTokenizer, model, tokenizer_file, expected)
  if tokenizer_file:
    note.unlink(missing_ok=True)
    return _given(tokenizers.SentencePieceTokenizer, tokenizer_file, model)
  trained_on = {"documents": dict(train.identity), "vocab_size": vocab_size}
  if not model.exists():
    # The note goes first: a model without one would be of unknown origin.
    files.write_durably(note, json.dumps(trained_on, indent=2).encode())
    return tokenizers.SentencePieceTokenizer.train(train, vocab_size, model, bad=bad)
  if not note.exists() or files.read_json(note) != trained_on:
    raise ValueError(
      f"{model} was trained on other text or with another vocab_size than {vocab_size}: delete it"
      f" if nothing needs it, choose another workdir, or set tokenizer_file={str(model)!r} to use"
      " it as it is"
    )
  return tokenizers.SentencePieceTokenizer.load(model)


def _xlmr(
  train: documents.Documents,
  workdir: pathlib.Path,
  vocab_size: int,
  tokenizer_file: str,
  expected: Mapping[str, Any] | None,
  bad: documents.BadRecords,
) -> tokenizers.Tokenizer:
  """The user's model, of which the run keeps a copy."""
  del train, vocab_size, bad  # Nothing is trained.
  kept = workdir / TOKENIZER_FILE
  if expected is not None and kept.exists():
    return _kept(tokenizers.XLMRTokenizer, kept, tokenizer_file, expected)
  if not tokenizer_file:
    raise ValueError(
      "tokenizer='xlmr' is not trained here: set data.tokenizer_file to a sentencepiece model of"
      " its kind, such as the beit3.spm that is released beside BEiT-3's checkpoints"
    )
  return _given(tokenizers.XLMRTokenizer, tokenizer_file, kept)


def _char(
  train: documents.Documents,
  workdir: pathlib.Path,
  vocab_size: int,
  tokenizer_file: str,
  expected: Mapping[str, Any] | None,
  bad: documents.BadRecords,
) -> tokenizers.Tokenizer:
  """The characters of a file of the user's, of which the run keeps a copy; or the text's own."""
  del vocab_size  # The text's.
  kept = workdir / CHARACTERS_FILE
  if expected is not None and kept.exists():
    return _kept(tokenizers.CharTokenizer, kept, tokenizer_file, expected)
  if tokenizer_file:
    made = tokenizers.CharTokenizer.load(tokenizer_file)
  else:
    made = tokenizers.CharTokenizer.of(bad.readable(train))
    if kept.exists() and tokenizers.CharTokenizer.load(kept).identity != made.identity:
      raise ValueError(
        f"{kept} holds the characters of other text: delete it if nothing needs it, choose another"
        f" workdir, or set tokenizer_file={str(kept)!r} to use it as it is"
      )
  files.write_durably(kept, made.content)
  return made


TOKENIZERS = {"byte": _byte, "sentencepiece": _sentencepiece}
# Of texts that are recognised or written, which need not be given back exactly.
SPEECH_TOKENIZERS = {**TOKENIZERS, "char": _char}
# Of texts with images, which a released model may have been trained on.
PICTURE_TOKENIZERS = {**SPEECH_TOKENIZERS, "xlmr": _xlmr}
