"""Images with texts in one call: what retrieval and captioning read, a text and its image a row.

Reference: BEiT-3, arXiv 2208.10442, section 3.1, and its released code.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from magneto_jax.data import (
  augmentation,
  caption_sources,
  documents,
  images,
  masking,
  text,
  tokenizers,
)

Sample = dict[str, np.ndarray]

_PARTS = ("train", "validation")
TOO_LONG = ("refuse", "skip", "truncate")
# A random token may be any from here on: as in BEiT-3, all but padding, start and end.
_FIRST_RANDOM = tokenizers.UNK_ID


# ---------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------


class PictureView(NamedTuple):
  """What training and evaluation see of the images of a row; its other values stay as they are.

  A row has `image`, one image, or `images`, several, of which each is augmented by itself; they
  become float32 [S, S, 3], or [n, S, S, 3].

  Attributes:
    spatial: the pixels that are seen.
    normalization: a name in `augmentation.NORMALIZATIONS`.
  """

  spatial: images.Spatial
  normalization: str = "half"

  @classmethod
  def of(
    cls, *, image_size: int, normalization: str, eval_crop: float, augment: Mapping[str, Any]
  ) -> "PictureView":
    """That of a config's values; `augment` are the fields of `config.AugmentConfig`."""
    spatial = images.Spatial.of(
      image_size=image_size, normalization=normalization, eval_crop=eval_crop, augment=augment
    )
    return cls(spatial, normalization)

  def training(self, sample: Mapping[str, Any], generator: np.random.Generator) -> Sample:
    """The row with augmented images."""
    return self._seen(sample, lambda image: self.spatial.training(image, generator))

  def evaluation(self, sample: Mapping[str, Any]) -> Sample:
    """The row with central squares."""
    return self._seen(sample, self.spatial.evaluation)

  def _seen(self, sample: Mapping[str, Any], spatial: Callable[[np.ndarray], np.ndarray]) -> Sample:
    pixels = lambda image: augmentation.normalize(spatial(image), self.normalization)
    if "image" in sample:
      return {**sample, "image": pixels(sample["image"])}
    return {**sample, "images": np.stack([pixels(image) for image in sample["images"]])}


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


class Texts(NamedTuple):
  """Texts as tokens: bos, the text's, eos.

  Attributes:
    tokens: int32, of all texts one after the other.
    offsets: [texts + 1], where each begins, and the end.
    seq_length: T, tokens of a row with its padding.
    pad_id: what the padding is.
  """

  tokens: np.ndarray
  offsets: np.ndarray
  seq_length: int
  pad_id: int

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def row(self, index: int) -> Sample:
    """Its tokens; see `padded`."""
    ids = self.tokens[self.offsets[index] : self.offsets[index + 1]]
    return padded(ids, self.seq_length, self.pad_id)


def padded(ids: Sequence[int], seq_length: int, pad_id: int) -> Sample:
  """text: int32 [T], padded behind; mask: bool [T], True for what is no padding."""
  filled = np.full(seq_length, pad_id, np.int32)
  filled[: len(ids)] = ids
  return {"text": filled, "mask": np.arange(seq_length) < len(ids)}


class Rows(Sequence):
  """A text and its image, or images, a row: a random-access data source for Grain.

  Attributes:
    pictures: the different images.
    image_of: int32 [rows], the image of each; [rows, n], where a row has several.
    texts: what the rows say, as it was read; encoded: the same as tokens.
    values: arrays [rows, ...], whose rows a sample has beside text and image.
    evaluation: what an evaluation sees of a row; None: the images are uint8 [H, W, 3], of any size.
  """

  def __init__(
    self,
    pictures: images.Images,
    image_of: np.ndarray,
    texts: Sequence[str],
    encoded: Texts,
    values: Mapping[str, np.ndarray] | None = None,
    evaluation: Callable[[Mapping[str, Any]], Sample] | None = None,
  ):
    self.pictures, self.image_of = pictures, np.asarray(image_of, np.int32)
    self.texts, self.encoded = tuple(texts), encoded
    self.values, self.evaluation = dict(values or {}), evaluation

  def __len__(self) -> int:
    return len(self.texts)

  @property
  def tokens(self) -> np.ndarray:
    """Those of all texts, with their marks."""
    return self.encoded.tokens

  def __getitem__(self, index: int) -> Sample:
    """Row `index`.

    Returns:
      image, image_id: the image, and int32 [] its number among the different ones; `images` where
        a row has several.
      text: int32 [T]; mask: bool [T]; see `Texts.row`.
      weights: float32 [], 1.
      What `values` has.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"row {index} of {len(self)}")
    image = self.image_of[index]
    if image.ndim:
      sample: dict[str, Any] = {"images": [self.pictures[int(i)]["image"] for i in image]}
    else:
      sample = {"image": self.pictures[int(image)]["image"], "image_id": image}
    sample |= self.encoded.row(index)
    sample |= {name: of_rows[index] for name, of_rows in self.values.items()}
    sample["weights"] = np.float32(1)
    return sample if self.evaluation is None else self.evaluation(sample)

  def first_rows(self) -> np.ndarray:
    """The first row of each different image that has one, in the order of the images."""
    return np.unique(self.image_of, return_index=True)[1]


class Held(NamedTuple):
  """Rows of a part before they are tokens.

  Attributes:
    pictures, image_of, texts, values: see `Rows`.
    where: index of a row -> where it lies, in words.
    identity: JSON-able values that name the content exactly.
  """

  pictures: images.Images
  image_of: np.ndarray
  texts: tuple[str, ...]
  values: Mapping[str, np.ndarray]
  where: Callable[[int], str]
  identity: Mapping[str, Any]


class Encoded(NamedTuple):
  """Both parts as rows, and what was met on the way.

  Attributes:
    train, validation: the rows; the latter as an evaluation sees them.
    kept: of both parts the rows that are left, by their indices in `Held`.
    tokenizer: trained on the training texts only, or loaded.
    too_long: how many texts of both parts have more than T - 2 tokens.
    unknown: how many validation texts have characters that no training text has.
    identity: of both parts, the tokenizer and the length.
  """

  train: Rows
  validation: Rows
  kept: tuple[np.ndarray, np.ndarray]
  tokenizer: tokenizers.Tokenizer
  too_long: tuple[int, int]
  unknown: int
  identity: dict[str, Any]


class Tokens(NamedTuple):
  """How texts become tokens.

  Attributes:
    tokenizer, vocab_size, tokenizer_file: see `text.load_text`; the tokenizer may be "char" or
      "xlmr", too.
    seq_length: T; at most T - 2 tokens of a text are kept.
    too_long: what is done with a longer one: "refuse", "skip", or "truncate": its end is cut off.
  """

  tokenizer: str = "sentencepiece"
  vocab_size: int = 1024
  tokenizer_file: str = ""
  seq_length: int = 64
  too_long: str = "refuse"


def chosen(options: Mapping[str, Any]) -> tuple[caption_sources.Options, Tokens]:
  """What a source reads, and how its texts become tokens, of the fields of both."""
  of_tokens = {name: options[name] for name in Tokens._fields if name in options}
  others = {name: value for name, value in options.items() if name not in of_tokens}
  return caption_sources.Options(**others), Tokens(**of_tokens)


def refuse_others(
  identities: Sequence[Mapping[str, Any]], expected: Mapping[str, Any] | None
) -> None:
  """Raises ValueError if a run had other data before, of both parts; see `text.changed_part`."""
  if part := text.changed_part(dict(zip(_PARTS, identities, strict=True)), expected):
    raise ValueError(
      f"the {part} data are not those that this run was started with: bring them back, or use"
      " another workdir"
    )


def encode(
  held: Sequence[Held],
  view: PictureView,
  how: Tokens,
  *,
  workdir: str | os.PathLike[str],
  bad: documents.BadRecords,
  expected: Mapping[str, Any] | None,
  also: documents.Documents | None = None,
) -> Encoded:
  """Makes or loads the tokenizer, and rows of tokens.

  Args:
    held: the rows of both parts.
    view: what is seen of images.
    how: the tokens.
    workdir: where the tokenizer is kept.
    bad: what counts what is left out.
    expected: the `identity` of an earlier call, whose rows these must be.
    also: other texts that a tokenizer is trained on.

  Raises:
    ValueError: a value is out of range, the rows are not the expected ones, a text is too long and
      may neither be skipped nor cut, or no row is left.
  """
  if how.tokenizer not in text.PICTURE_TOKENIZERS:
    known = sorted(text.PICTURE_TOKENIZERS)
    raise ValueError(f"tokenizer={how.tokenizer!r} must be one of {known}")
  if how.too_long not in TOO_LONG:
    raise ValueError(f"too_long={how.too_long!r} must be one of {', '.join(TOO_LONG)}")
  if how.seq_length < 3:
    raise ValueError(
      f"seq_length={how.seq_length} has no room for a token between start and end: set 3 or more"
    )
  refuse_others([part.identity for part in held], expected)
  made = text.PICTURE_TOKENIZERS[how.tokenizer](
    _training_texts(held[0], also),
    pathlib.Path(workdir),
    how.vocab_size,
    how.tokenizer_file,
    None if expected is None else expected.get("tokenizer", {}),
    bad,
  )
  rows, kept, longer = [], [], []
  for part, of, evaluation in zip(_PARTS, held, (None, view.evaluation), strict=True):
    ids = made.encode_all(of.texts)
    longer.append(sum(len(own) > how.seq_length - 2 for own in ids))
    fit = _fitting(part, ids, of.where, how.seq_length, how.too_long)
    encoded = marked([ids[i] for i in fit], made, how.seq_length)
    values = {name: values.take(fit, axis=0) for name, values in of.values.items()}
    texts = [of.texts[i] for i in fit]
    rows.append(Rows(of.pictures, of.image_of[fit], texts, encoded, values, evaluation))
    kept.append(fit)
  unknown = _tell_unknown(rows[0].texts, rows[1].texts, made, lambda i: held[1].where(kept[1][i]))
  identity = {
    **{part: dict(of.identity) for part, of in zip(_PARTS, held, strict=True)},
    "tokenizer": dict(made.identity),
    "seq_length": how.seq_length,
    "too_long": how.too_long,
  }
  return Encoded(*rows, tuple(kept), made, tuple(longer), unknown, identity)


def _training_texts(held: Held, also: documents.Documents | None) -> documents.Documents:
  """What a tokenizer is trained on."""
  own = documents.Documents(len(held.texts), held.texts.__getitem__, held.identity)
  if also is None:
    return own
  return documents.Documents(
    size=len(own) + len(also),
    read=lambda index: own[index] if index < len(own) else also[index - len(own)],
    identity={"pairs": dict(own.identity), "texts": dict(also.identity)},
  )


def marked(ids: Sequence[np.ndarray], tokenizer: tokenizers.Tokenizer, seq_length: int) -> Texts:
  """Texts between their marks, their ends cut off where they are too long."""
  bos, eos = tokenizer.bos_id, tokenizer.eos_id
  marked = [np.array([bos, *own[: seq_length - 2], eos], np.int32) for own in ids]
  offsets = np.cumsum([0, *map(len, marked)])
  tokens = np.concatenate([np.zeros(0, np.int32), *marked])
  return Texts(tokens, offsets, seq_length, tokenizer.pad_id)


def _fitting(
  part: str, ids: Sequence[np.ndarray], where: Callable[[int], str], seq_length: int, too_long: str
) -> np.ndarray:
  """The texts that are kept; where long ones may neither be skipped nor cut, ValueError."""
  lengths, room = np.array([len(own) for own in ids]), seq_length - 2
  is_long = lengths > room
  if not is_long.any():
    return np.arange(len(ids))
  first = int(np.argmax(is_long))
  if too_long == "refuse":
    raise ValueError(
      f"{where(first)}: its text has {lengths[first]} tokens, more than the {room} between start"
      f" and end of data.seq_length={seq_length}, as {is_long.sum():,} of {len(ids):,} texts do:"
      f" set data.seq_length to at least {lengths.max() + 2}, or data.too_long to skip or truncate"
    )
  if is_long.all() and too_long == "skip":
    raise ValueError(f"all {part} texts have more than {room} tokens: set data.seq_length to more")
  logging.warning(
    "%s as they have more than %d tokens: %d of %d %s texts, first %s",
    "skipped" if too_long == "skip" else "cut off",
    *(room, is_long.sum(), len(ids), part, where(first)),
  )
  return np.flatnonzero(~is_long) if too_long == "skip" else np.arange(len(ids))


def _tell_unknown(
  train: Sequence[str],
  validation: Sequence[str],
  tokenizer: tokenizers.Tokenizer,
  where: Callable[[int], str],
) -> int:
  """How many validation texts have characters that no training text has; they are logged."""
  known = set().union(*train)
  others = [i for i, words in enumerate(validation) if not known.issuperset(words)]
  if others:
    foreign = sorted(set().union(*(validation[i] for i in others)) - known)
    read = {tokenizers.CharTokenizer: "as unknown", tokenizers.XLMRTokenizer: "as its model does"}
    logging.warning(
      "%d of %d validation texts have characters that no training text has, and that are read %s:"
      " %s, first %s",
      *(len(others), len(validation)),
      read.get(type(tokenizer), "as bytes of which little is learned"),
      *(" ".join(map(repr, foreign[:20])), where(others[0])),
    )
  return len(others)


# ---------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CaptionData:
  """Images with texts, ready for the pipelines.

  Attributes:
    train: raw rows, of which `augment` makes samples; see `Rows`.
    validation: samples; rows: the same, whatever is masked of them. Those of an image follow each
      other if they do in the source.
    tokenizer: of all texts. The id V = `tokenizer.vocab_size` is the mask's.
    keywords: of each validation image, by its `image_id`, what a caption's words are held against;
      see `scores.keyword_f1`; train_keywords: likewise of the training images.
    augment: that of the view.
    too_long: how many training and validation texts have more tokens than there is room for.
    cut: whether these are cut off, and not left out.
    unknown: how many validation texts have characters that no training text has.
    shared: how many validation images are training images too; None: not known (TFDS).
    repeated: how many validation texts are training texts too.
    bad_records: what was left out: file, line in it, and what is wrong.
    identity: see `text.TextData`.
    mix: nothing.
  """

  train: Rows
  validation: Sequence[Sample]
  rows: Rows
  tokenizer: tokenizers.Tokenizer
  keywords: tuple[tuple[str, ...], ...]
  train_keywords: tuple[tuple[str, ...], ...]
  augment: Callable[[Sample, np.random.Generator], Sample]
  too_long: tuple[int, int]
  cut: bool
  unknown: int
  shared: int | None
  repeated: int
  bad_records: tuple[str, ...]
  identity: Mapping[str, Any]
  mix: None = None

  def references(self) -> list[list[str]]:
    """The validation texts of each image, by its `image_id`; none of an image without a row."""
    found: list[list[str]] = [[] for _ in range(len(self.rows.pictures))]
    for image, words in zip(self.rows.image_of, self.rows.texts, strict=True):
      found[image].append(words)
    return found

  def describe(self) -> str:
    """Images, texts, ids, and what a person may not expect of them."""
    parts = [
      f"{len(rows):,} {which} texts of {len(rows.first_rows()):,} images"
      for which, rows in (("training", self.train), ("validation", self.rows))
    ]
    words = f"{' and '.join(parts)}, {self.tokenizer.vocab_size:,} in the vocabulary"
    return words + self.caveats()

  def caveats(self) -> str:
    """What a person may not expect of them, to be put behind a description."""
    words = told(self)
    if self.repeated:
      words += f"; {self.repeated:,} of the validation texts are training texts too"
    return words

  def show(self, sample: Mapping[str, np.ndarray]) -> str:
    """A sample's size and its text."""
    height, width, _ = sample["image"].shape
    words = masking.words_of(self.tokenizer, sample["text"], specials=False)
    return f"{height} x {width} pixels: {words!r:.200}"


def told(data: Any) -> str:
  """What a person may not expect of data that are `encode`d, to be put behind their description."""
  words = ""
  if any(data.too_long):
    is_done = "are cut off" if data.cut else "are skipped"
    words += f"; {sum(data.too_long):,} texts are too long and {is_done}"
  if data.unknown:
    words += f"; {data.unknown:,} validation texts have characters that no training text has"
  if data.shared:
    words += f"; {data.shared:,} of the validation images are training images too"
  return words


def load_captions(
  *,
  workdir: str | os.PathLike[str],
  view: PictureView,
  name: str = "embedded/emoji/en",
  skip_bad: int = 0,
  expected: Mapping[str, Any] | None = None,
  **options: Any,
) -> CaptionData:
  """Finds the images of a source and their texts, and shows them as pixels and tokens.

  Texts are in Unicode's form NFC, with single spaces in them and none around them. A row is a text
  and its image, so that an image of five texts is in five rows.

  Args:
    workdir: where the tokenizer is kept.
    view: what is seen of images.
    name: see `caption_sources.read_captioned`.
    skip_bad: how many bad lines or examples may be left out, of training and validation together.
    expected: the `identity` of an earlier call, whose data these must be: others are refused before
      a tokenizer is made. Without its `validation` any may be evaluated on.
    **options: the fields of `Tokens` and of `caption_sources.Options`; one tokenizer is of all
      languages.

  Returns:
    The data. A validation text with characters that no training text has, of another script
    perhaps, is read all the same: in bytes ("byte", "sentencepiece"), as unknown ("char") or as its
    model does ("xlmr"); how many there are is told, and the first is named.

  Raises:
    FileNotFoundError: data or tokenizer are not on disk.
    ValueError: of one line: see `encode` and `caption_sources.read_captioned`.

  Example:
    >>> view = PictureView(images.Spatial(32))
    >>> data = load_captions(workdir="/tmp/run", view=view, tokenizer="byte")
    >>> len(data.train), data.validation.texts[0]
    (1265, 'grinning face with smiling eyes')
  """
  bad = documents.BadRecords(skip_bad)
  read, how = chosen(options)
  found = caption_sources.read_captioned(name, read, bad, apart=expected is None)
  encoded = encode(
    [held_of(part) for part in found], view, how, workdir=workdir, bad=bad, expected=expected
  )
  return of_encoded(encoded, found, view, bad, cut=how.too_long == "truncate")


def held_of(found: caption_sources.Captioned) -> Held:
  """A part of a source as rows."""
  return Held(found.images, found.owners, found.texts, {}, found.where, found.identity)


def of_encoded(
  encoded: Encoded,
  found: tuple[caption_sources.Captioned, caption_sources.Captioned],
  view: PictureView,
  bad: documents.BadRecords,
  *,
  cut: bool,
) -> CaptionData:
  """The data of rows, and of the sources that they are of."""
  digests = [of.digests for of in found]
  trained = {*encoded.train.texts}
  return CaptionData(
    train=encoded.train,
    validation=encoded.validation,
    rows=encoded.validation,
    tokenizer=encoded.tokenizer,
    keywords=found[1].keywords,
    train_keywords=found[0].keywords,
    augment=view.training,
    too_long=encoded.too_long,
    cut=cut,
    unknown=encoded.unknown,
    shared=caption_sources.shared_images(*digests) if all(digests) else None,
    repeated=sum(words in trained for words in encoded.validation.texts),
    bad_records=tuple(bad.found),
    identity={**encoded.identity, **({"left_out": len(bad.found)} if bad.found else {})},
  )


# ---------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------


class TextMasks(NamedTuple):
  """Draws which tokens of a text are hidden, never the first.

  Of n tokens with start and end, k = clamp(floor(n rate + 1/2), 1, n - 1) of the positions
  1 ... n - 1 are chosen, all different and each as likely: the end may be, the start is not. Each
  of them is then left as it is with the probability `keep`, replaced by a random token with
  `random`, and else by the mask's id. Whatever is read, the chosen token is the target.

  Attributes:
    rate: about which share of the tokens is chosen.
    keep, random: see above.
    vocab_size: V of the tokenizer. The mask's id is V, so that a model has V + 1; random tokens are
      of [3, V), all ids but those of padding, start and end.

  Reference: BEiT-3's code, `beit3/datasets.py` (captioning).
  """

  rate: float
  keep: float
  random: float
  vocab_size: int

  @property
  def mask_id(self) -> int:
    """What is read in place of a hidden token."""
    return self.vocab_size

  def count(self, length: int) -> int:
    """k of n tokens; see `hidden_of`."""
    return hidden_of(self.rate, length)

  def frequencies(self, plain_V: np.ndarray) -> np.ndarray:
    """How often each of V + 1 ids is read where texts have ids with the frequencies `plain_V`.

    As if the share `rate` of all tokens was hidden, none of them a start.
    """
    hidden_V = plain_V.copy()
    hidden_V[tokenizers.BOS_ID] = 0
    hidden_V *= self.rate / max(hidden_V.sum(), np.finfo(float).tiny)
    read_V = plain_V - hidden_V * (1 - self.keep)
    read_V[_FIRST_RANDOM:] += self.rate * self.random / (len(plain_V) - _FIRST_RANDOM)
    return np.append(read_V, self.rate * (1 - self.keep - self.random))

  def draw(
    self, text_T: np.ndarray, mask_T: np.ndarray, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hides tokens of a text.

    Args:
      text_T: int32 [T], padded behind.
      mask_T: bool [T], True for what is no padding.
      rng: all that the masks depend on.

    Returns:
      int32 [T], what is read; int32 [T], what stood at the chosen positions, and 0 at others;
      float32 [T], 1 at the chosen positions, and 0 at others.
    """
    length = int(np.count_nonzero(mask_T))
    count = self.count(length)
    places = 1 + rng.choice(max(length - 1, 0), count, replace=False)
    fate = rng.random(count)
    drawn = rng.integers(_FIRST_RANDOM, self.vocab_size, count)
    read = np.where(fate < self.keep + self.random, drawn, self.mask_id)
    inputs_T = text_T.copy()
    inputs_T[places] = np.where(fate < self.keep, text_T[places], read)
    targets_T, weights_T = np.zeros_like(text_T), np.zeros(len(text_T), np.float32)
    targets_T[places], weights_T[places] = text_T[places], 1
    return inputs_T, targets_T, weights_T

  def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
    """The sample with `inputs`, `targets` and `weights` [T], see `draw`; its `text` stays whole."""
    inputs_T, targets_T, weights_T = self.draw(sample["text"], sample["mask"], rng)
    return sample | {"inputs": inputs_T, "targets": targets_T, "weights": weights_T}


def hidden_of(rate: float, length: int) -> int:
  """k = clamp(floor(n rate + 1/2), 1, n - 1) of n tokens, never less of more; 0 of one or none."""
  return min(max(math.floor(length * rate + 0.5), 1), length - 1) if length > 1 else 0


class MaskedView(NamedTuple):
  """An augmentation of a whole row, and then a mask.

  Attributes:
    view: `(sample, generator) -> sample`.
    masks: the masks.
  """

  view: Callable[[Sample, np.random.Generator], Sample]
  masks: TextMasks

  def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
    return self.masks(self.view(sample, rng), rng)


def masked(data: CaptionData, *, rate: float, keep: float, random: float) -> CaptionData:
  """Captions with hidden tokens: in training anew each time, in validation of the index alone."""
  masks = TextMasks(rate, keep, random, data.tokenizer.vocab_size)
  return dataclasses.replace(
    data,
    augment=MaskedView(data.augment, masks),
    validation=masking.FixedMasks(data.validation, masks),
    identity={**data.identity, "masks": masks._asdict()},
  )
