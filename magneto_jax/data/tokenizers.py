"""Text to ids and back: bytes, characters, sentencepiece of the text at hand, or XLM-R's."""

import hashlib
import io
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import sentencepiece

from magneto_jax.data import documents, files

PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
SPECIALS = 4  # how many ids are special: those below it
# Where the sentencepiece models of XLM-R's kind have their own marks.
_XLMR_IDS = {"pad": -1, "bos": 1, "eos": 2, "unk": 0}
_MOST_BYTES = 2**30  # of a model, more than a protocol buffer of a million pieces
_SPACE = "\u2581"  # what sentencepiece writes for a space

# Training sentences: parts of lines, cut after at most 1,000 characters (at a space if there is
# one), because sentencepiece drops sentences over 4,192 bytes. Its reserved characters (null, its
# space and its unknown mark) are left out; they are encoded as bytes.
_BREAK = r"\n\0\u2581\u2585"
_SENTENCE = re.compile(rf"[^{_BREAK}]{{1,1000}}(?=[ {_BREAK}]|$)|[^{_BREAK}]{{1,1000}}")


class Tokenizer(Protocol):
  """What the packing and the decoding need of a tokenizer.

  Attributes:
    vocab_size: number of ids, specials included.
    pad_id, bos_id, eos_id, unk_id: 0, 1, 2, 3; of `XLMRTokenizer` 1, 0, 2, 3. No text is encoded
      with the first three of them, so that a model may mean something else by 0, as CTC's and a
      transducer's blank.
    identity: JSON-able values that name the mapping from text to ids exactly.
  """

  vocab_size: int
  pad_id: int
  bos_id: int
  eos_id: int
  unk_id: int
  identity: Mapping[str, Any]

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of a text, int32 of shape [tokens], without specials."""
    ...

  def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids of every text, as `encode` does, on all cores where that is faster."""
    ...

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of ids: specials are skipped, invalid UTF-8 becomes U+FFFD."""
    ...


class ByteTokenizer:
  """One id a UTF-8 byte, `4 + byte`: lossless on every text, nothing to train; 260 ids."""

  pad_id, bos_id, eos_id, unk_id = PAD_ID, BOS_ID, EOS_ID, UNK_ID
  vocab_size = SPECIALS + 256
  identity = {"kind": "byte", "vocab_size": vocab_size}

  def encode(self, text: str) -> np.ndarray:
    """See `Tokenizer.encode`."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + SPECIALS

  def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
    """See `Tokenizer.encode_all`."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """See `Tokenizer.decode`."""
    kept = _without_specials(ids, self.vocab_size)
    return bytes(i - SPECIALS for i in kept).decode(errors="replace")


class SentencePieceTokenizer:
  """A sentencepiece BPE model that gives every text back exactly.

  Lossless because nothing is normalised, spaces stay as they are, a newline is a piece of its
  own, and what has no piece is spelt in bytes. One character needs help: sentencepiece writes a
  space as U+2581 and would decode a literal U+2581 as a space, so `encode` spells it in bytes.

  BPE rather than unigram: on the held-out embedded play it needs 3 % fewer tokens (45,132 against
  46,621 at 1,024 pieces; 39,323 against 40,304 at 2,048) and trains 15 times as fast.
  """

  pad_id, bos_id, eos_id, unk_id = PAD_ID, BOS_ID, EOS_ID, UNK_ID

  def __init__(self, model: bytes, name: str = "model"):
    """Wraps the bytes of a sentencepiece model.

    Args:
      model: the serialised model.
      name: what errors call it.

    Raises:
      ValueError: not a sentencepiece model, or not one with our special ids and byte pieces.
    """
    self._processor = p = _processor(model, name)
    ids, wanted = _ids(p), {"pad": PAD_ID, "bos": BOS_ID, "eos": EOS_ID, "unk": UNK_ID}
    if ids != wanted or not p.is_byte(p.piece_to_id("<0xE2>")):
      raise ValueError(
        f"{name} has the ids {ids}; a tokenizer for this library has {wanted} and is trained "
        "with byte_fallback=true"
        + ("; tokenizer='xlmr' reads this one as XLM-R and BEiT-3 do" if ids == _XLMR_IDS else "")
      )
    self.model = model
    self._space_ids = [p.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
    self.vocab_size = p.get_piece_size()
    self.identity = {
      "kind": "sentencepiece",
      "vocab_size": self.vocab_size,
      "sha256": _digest(model),
    }

  @classmethod
  def load(cls, path: str | os.PathLike[str], expected: Any = None) -> "SentencePieceTokenizer":
    """Reads a model file; see `__init__` for what it must hold.

    Unless it has the identity `expected`, if that is given, it is a ValueError before it is parsed.
    """
    return cls(_model_of(path, expected), str(path))

  @classmethod
  def train(
    cls,
    texts: Sequence[str],
    vocab_size: int,
    path: str | os.PathLike[str],
    max_sentences: int = 1_000_000,
    bad: documents.BadRecords | None = None,
  ) -> "SentencePieceTokenizer":
    """Trains on texts, writes the model to `path` and returns it.

    Deterministic: the same texts and arguments give the same bytes, whatever the machine's load
    or number of cores.

    Args:
      texts: the documents, read one at a time.
      vocab_size: number of ids; 4 specials, 256 bytes and the newline are among them.
      path: the file to write.
      max_sentences: a bound on the lines trained on, and so on memory and time. A larger
        corpus is sampled evenly: documents at equal distances, lines at equal distances
        within each.
      bad: what counts the damaged documents, which are left out; None: none may be damaged.

    Returns:
      The trained tokenizer.

    Raises:
      ValueError: the texts have more characters or fewer distinct pieces than `vocab_size`, or one
        is damaged.
    """
    if vocab_size < 1:
      raise ValueError(f"{vocab_size=} must be positive")
    model = io.BytesIO()
    failed = []

    def sentences() -> Iterator[str]:
      try:
        yield from _sentences(texts, max_sentences, bad or documents.BadRecords())
      except Exception as error:
        failed.append(error)
        raise

    try:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        pad_id=PAD_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        unk_id=UNK_ID,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n"],
        character_coverage=0.9999,  # rarer characters are spelt in bytes
        num_threads=1,  # with more, the order of the counts is up to the scheduler
        minloglevel=2,
      )
    except RuntimeError as error:
      if failed:  # A text cannot be read; sentencepiece wraps the error in several lines.
        raise failed[0] from None
      if message := _size_error(str(error), vocab_size):
        raise ValueError(message) from None
      raise
    files.write_durably(path, model.getvalue())
    return cls(model.getvalue(), str(path))

  def encode(self, text: str) -> np.ndarray:
    """See `Tokenizer.encode`."""
    (ids,) = self.encode_all([text])
    return ids

  def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
    """See `Tokenizer.encode_all`."""
    split = [text.split(_SPACE) for text in texts]
    encoded = iter(self._processor.encode(list(itertools.chain.from_iterable(split))))
    ids = []
    for parts in split:
      first, *rest = itertools.islice(encoded, len(parts))
      ids.append(np.asarray(sum(([*self._space_ids, *part] for part in rest), first), np.int32))
    return ids

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """See `Tokenizer.decode`."""
    return self._processor.decode(_without_specials(ids, self.vocab_size))


class XLMRTokenizer:
  """A sentencepiece model with fairseq's ids, as XLM-R and the released BEiT-3 read texts.

    id = 3 of the unknown piece, k + 1 of any other piece k of the model,

  behind <s> 0, <pad> 1, </s> 2 and <unk> 3. With n pieces, the model's own three marks among them,
  which lie at 0 (<unk>), 1 (<s>) and 2 (</s>), there are n + 1 ids, and the mask's, which no text
  is encoded with, is the one behind them, n + 1: 64,001 of BEiT-3's 64,000 pieces. It is never
  trained here. Texts are normalised as the model says, and not always given back exactly.

  Reference: XLM-R, arXiv 1911.02116, and its code in fairseq; BEiT-3's released code, `beit3.spm`.
  """

  bos_id, pad_id, eos_id, unk_id = 0, 1, EOS_ID, UNK_ID

  def __init__(self, model: bytes, name: str = "model"):
    """Wraps the bytes of a sentencepiece model; `name` is what errors call it.

    Raises:
      ValueError: not a sentencepiece model, or its own marks lie elsewhere.
    """
    self._processor = _processor(model, name)
    ids = _ids(self._processor)
    if ids != _XLMR_IDS:
      raise ValueError(f"{name} has the ids {ids}; one of XLM-R's kind has {_XLMR_IDS}")
    self.model = model
    self.vocab_size = self._processor.get_piece_size() + 1
    self.identity = {"kind": "xlmr", "vocab_size": self.vocab_size, "sha256": _digest(model)}

  @classmethod
  def load(cls, path: str | os.PathLike[str], expected: Any = None) -> "XLMRTokenizer":
    """Reads a model file; see `SentencePieceTokenizer.load`."""
    return cls(_model_of(path, expected), str(path))

  def encode(self, text: str) -> np.ndarray:
    """See `Tokenizer.encode`; what has no piece is `unk_id`."""
    (ids,) = self.encode_all([text])
    return ids

  def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
    """See `Tokenizer.encode_all`."""
    unknown = _XLMR_IDS["unk"]
    pieces = (np.asarray(own, np.int32) for own in self._processor.encode(list(texts)))
    return [np.where(own == unknown, UNK_ID, own + 1).astype(np.int32) for own in pieces]

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """See `Tokenizer.decode`."""
    return self._processor.decode([i - 1 for i in _without_specials(ids, self.vocab_size)])


class CharTokenizer:
  """One id a character of the text that it was made of, `4 + place in their order`.

  A character is a Unicode code point. Others are not lossless: each becomes the unknown id, which
  no text is decoded to.
  """

  pad_id, bos_id, eos_id, unk_id = PAD_ID, BOS_ID, EOS_ID, UNK_ID

  def __init__(self, characters: str):
    """Takes the characters, each once and in their order; ValueError if they are not so."""
    if not characters or list(characters) != sorted({*characters}):
      raise ValueError(f"{characters!r:.40} are not characters in their order, each once")
    if re.search("[\ud800-\udfff]", characters):
      raise ValueError(
        f"{characters!r:.40} are not valid text: halves of characters are among them"
      )
    self.characters = characters
    self.vocab_size = SPECIALS + len(characters)
    # What a file holds of it.
    self.content = json.dumps({"characters": characters}).encode()
    self.identity = {
      "kind": "char",
      "vocab_size": self.vocab_size,
      "sha256": _digest(self.content),
    }
    self._ids = {character: SPECIALS + place for place, character in enumerate(characters)}

  @classmethod
  def of(cls, texts: Iterable[str]) -> "CharTokenizer":
    """That of all characters of texts; ValueError if they have none."""
    characters: set[str] = set()
    for text in texts:
      characters.update(text)
    if not characters:
      raise ValueError("the training text is empty: it has no characters")
    return cls("".join(sorted(characters)))

  @classmethod
  def load(cls, path: str | os.PathLike[str], expected: Any = None) -> "CharTokenizer":
    """Reads what `content` was written to; see `SentencePieceTokenizer.load` for `expected`."""
    path = pathlib.Path(path)
    if not path.exists():
      raise FileNotFoundError(f"tokenizer_file: {path} does not exist")
    held = files.read_json(path)
    characters = held.get("characters") if isinstance(held, dict) else None
    if not isinstance(characters, str):
      raise ValueError(f"tokenizer_file: {path} holds no characters of a tokenizer")
    try:
      made = cls(characters)
    except ValueError as error:
      raise ValueError(f"tokenizer_file: {path}: {error}") from None
    _refuse_other(path, made.identity["sha256"], expected)
    return made

  def encode(self, text: str) -> np.ndarray:
    """See `Tokenizer.encode`; what has no id is `unk_id`."""
    return np.array([self._ids.get(character, UNK_ID) for character in text], np.int32)

  def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
    """See `Tokenizer.encode_all`."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """See `Tokenizer.decode`."""
    kept = _without_specials(ids, self.vocab_size)
    return "".join(self.characters[i - SPECIALS] for i in kept)


def _processor(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
  """What reads a serialised model; ValueError, which calls it so, if it is none."""
  try:
    return sentencepiece.SentencePieceProcessor(model_proto=model)
  except RuntimeError:
    raise ValueError(f"{name} is not a sentencepiece model ({len(model)} bytes)") from None


def _ids(p: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
  """Where a model has its own marks; -1 for none."""
  return {"pad": p.pad_id(), "bos": p.bos_id(), "eos": p.eos_id(), "unk": p.unk_id()}


def _model_of(path: str | os.PathLike[str], expected: Any) -> bytes:
  """The bytes of a model file; an error unless it has the identity `expected`, if that is given."""
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(f"tokenizer_file: {path} does not exist")
  if not path.is_file() or path.stat().st_size > _MOST_BYTES:
    raise ValueError(f"tokenizer_file: {path} is not a sentencepiece model")
  model = path.read_bytes()
  _refuse_other(path, _digest(model), expected)
  return model


def _refuse_other(path: pathlib.Path, digest: str, expected: Any) -> None:
  """Raises ValueError if a run had another tokenizer, of which `expected` is the identity."""
  held = expected.get("sha256") if isinstance(expected, Mapping) else None
  if expected is not None and digest != held:
    raise ValueError(
      f"{path} is not the tokenizer that this run was started with: bring that back, or use"
      " another workdir"
    )


def _digest(model: bytes) -> str:
  return hashlib.sha256(model).hexdigest()


def _without_specials(ids: Sequence[int] | np.ndarray, vocab_size: int) -> list[int]:
  """Plain ints without specials, checked to be in the vocabulary."""
  array = np.asarray(ids).reshape(-1)
  if array.size and not 0 <= array.min() <= array.max() < vocab_size:
    raise ValueError(f"ids must lie in [0, {vocab_size}), got {array.min()} to {array.max()}")
  return [int(i) for i in array if i >= SPECIALS]


def _sentences(texts: Sequence[str], limit: int, bad: documents.BadRecords) -> Iterator[str]:
  """At most `limit` training sentences, evenly spread over the documents."""
  visited = min(len(texts), limit)
  indices = [k * len(texts) // visited for k in range(visited)]
  for k, text in enumerate(bad.readable(texts, indices)):
    sentences = _SENTENCE.findall(text)
    quota = min(-(-limit // (visited - k)), len(sentences))
    for i in range(quota):
      yield sentences[i * len(sentences) // quota]
    limit -= quota  # what a short document leaves goes to the later ones


def _size_error(message: str, vocab_size: int) -> str:
  """Our line for what sentencepiece says of sizes; empty for anything else."""
  if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
    return f"{vocab_size=} is too small for the characters of this text: use >= {found[1]}"
  if found := re.search(r"set it to a value <= (\d+)", message):
    return f"{vocab_size=} is more than this text has pieces for: use <= {found[1]}"
  if "sentences_.empty()" in message:
    return "the training text is empty: a tokenizer cannot be trained on it"
  return ""
