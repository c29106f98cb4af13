"""What BEiT-3 is pre-trained on: images, texts and pairs of both, with hidden patches and tokens.

A row of a batch has some pairs, some images alone and some texts alone. What is hidden of them is
drawn anew each time that a training row is read, and is always the same in validation.

Reference: BEiT-3, arXiv 2208.10442, section 2.2 and table 11.
Differs: which tokens of a text are chosen, and what is read in their place, the paper does not say;
it is as in its code for captions (`captions.TextMasks`).
"""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from magneto_jax.data import (
  caption_sources,
  captions,
  documents,
  images,
  masking,
  packing,
  patch_masks,
  sources,
  text,
  tokenizers,
)

Sample = dict[str, np.ndarray]

# Of so many documents, at most, it is told whether they hold the texts of validation pairs.
_COMPARED = 1_000_000
# So many tokens of each kind of text tell how frequent they are.
_COUNTED = 10_000_000


class Composition(NamedTuple):
  """What a row is of: p pairs, m images alone and n texts alone; 0 leaves a part out."""

  pairs: int = 1
  images: int = 1
  texts: int = 1


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


class TextRows(Sequence):
  """The texts of pairs, without their images.

  Attributes:
    tokens: int32, of all of them.
  """

  def __init__(self, rows: captions.Rows):
    self._encoded = rows.encoded
    self.tokens = rows.tokens

  def __len__(self) -> int:
    return len(self._encoded)

  def __getitem__(self, index: int) -> Sample:
    """text: int32 [T]; mask: bool [T]; see `captions.Texts.row`."""
    return self._encoded.row(index)


class TextWindows(packing.Mapped, Sequence):
  """Windows of long texts: a bos and at most T - 1 tokens, all of one document.

  A document of n tokens with its eos is cut into ceil(n / (T - 1)) pieces as even as can be, so
  that nothing is read of another document, and the shortest one makes a window.

  Attributes:
    tokens: of all documents, with their marks.
  """

  def __init__(self, stream: packing.TokenStream, seq_length: int, tokenizer: tokenizers.Tokenizer):
    self.tokens, self._offsets, self._seq_length = stream.tokens, stream.offsets, seq_length
    self._bos_id, self._pad_id = tokenizer.bos_id, tokenizer.pad_id
    behind_bos = np.diff(stream.offsets) - 1
    # How many windows there are up to the end of each document.
    self._ends = np.cumsum(-(-behind_bos // (seq_length - 1)))

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: int) -> Sample:
    """text: int32 [T]; mask: bool [T]; see `captions.padded`."""
    if not 0 <= index < len(self):
      raise IndexError(f"window {index} of {len(self)}")
    document = int(np.searchsorted(self._ends, index, side="right"))
    first = int(self._ends[document - 1]) if document else 0
    begin, end = int(self._offsets[document]) + 1, int(self._offsets[document + 1])
    pieces, piece = int(self._ends[document]) - first, int(index) - first
    cut = lambda k: begin + (end - begin) * k // pieces
    ids = [self._bos_id, *self.tokens[cut(piece) : cut(piece + 1)]]
    return captions.padded(ids, self._seq_length, self._pad_id)


class Composed(Sequence):
  """Rows of raw pairs, images and texts: a random-access data source for Grain.

  There are as many rows as hold all of the largest part. In training a smaller part begins anew,
  and images and texts alone come in orders of their own, another one each time that they begin
  anew, so that a row's are not those of its pairs, or by chance only. In validation every one comes
  once, and None is in the place of what would be more.

  What is together in a row stays so in every epoch: the pipeline shuffles rows. It changes no loss,
  as nothing of a row is compared with what else is in it.

  Attributes:
    parts: {"pairs", "images", "texts"} -> the samples, of those parts that a row has.
    counts: likewise how many of them a row has.
    endless: whether a part begins anew.
  """

  def __init__(self, parts: Mapping[str, Sequence], composition: Composition, *, endless: bool):
    self.counts = {name: count for name, count in composition._asdict().items() if count}
    self.parts = {name: parts[name] for name in self.counts}
    self.endless = endless

  def __len__(self) -> int:
    return max(-(-len(part) // self.counts[name]) for name, part in self.parts.items())

  def __getitem__(self, index: int) -> dict[str, list]:
    """What `Masks` reads: by part, the raw samples of row `index`, or None."""
    if not 0 <= index < len(self):
      raise IndexError(f"row {index} of {len(self)}")
    row = {}
    for name, part in self.parts.items():
      first = index * self.counts[name]
      row[name] = [self._at(name, part, i) for i in range(first, first + self.counts[name])]
    return row

  def _at(self, name: str, part: Sequence, index: int) -> Any:
    if not self.endless:
      return part[index] if index < len(part) else None
    return part[index % len(part) if name == "pairs" else int(self._orders[name][index])]

  @functools.cached_property
  def _orders(self) -> dict[str, grain.MapDataset]:
    """An endless order of each part, another one each time that it begins anew."""
    return {
      name: grain.MapDataset.range(len(part)).seed(seed).shuffle().repeat()
      for seed, (name, part) in enumerate(self.parts.items())
    }


# ---------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------


class Masks(NamedTuple):
  """What is seen of a row of `Composed`, and what is hidden of it.

  Attributes:
    view: what is seen of images.
    training: whether they are augmented.
    patches: the masks of images, alone and in pairs.
    texts, pair_texts: the masks of texts, alone and in pairs.
    seq_length: T.
  """

  view: captions.PictureView
  training: bool
  patches: patch_masks.PatchMasks
  texts: captions.TextMasks
  pair_texts: captions.TextMasks
  seq_length: int

  def __call__(self, row: Mapping[str, list], rng: np.random.Generator) -> Sample:
    """Draws the masks of a row.

    Args:
      row: of `Composed`.
      rng: all that views and masks depend on.

    Returns:
      Of p pairs, with K_I hidden patches, and K_T hidden tokens at most:
        pair_image: float32 [p, S, S, 3], whole; pair_masked: bool [p, P], True for the patches,
          read row by row, that are hidden.
        pair_text: int32 [p, T], with tokens hidden; pair_mask: bool [p, T], True for what is no
          padding; pair_targets: int32 [p, T], what stood at the hidden tokens, and 0 at others.
        pair_image_places: int32 [p, K_I], where hidden patches are, and pair_text_places
          [p, K_T], where hidden tokens, in their order, then 0; pair_image_weights and
          pair_text_weights: float32 of the same shapes, 1 for each of them, then 0.
      Of m images: image, image_masked, image_places, image_weights. Of n texts: text, text_mask,
      text_targets, text_places, text_weights.
      Parts that a row has not are left out. What fills up the last rows of a validation is zeros:
      no patch is hidden, all of a text is padding, and no target counts.
    """
    sample = {}
    made = {
      "pairs": lambda pair: {
        **self._image(pair["image"], rng, "pair_image", "pair_masked"),
        **self._text(pair, rng, self.pair_texts, "pair_text", ("pair_mask", "pair_targets")),
      },
      "images": lambda image: self._image(image["image"], rng, "image", "image_masked"),
      "texts": lambda words: self._text(
        words, rng, self.texts, "text", ("text_mask", "text_targets")
      ),
    }
    for name, members in row.items():
      found = [self._blank(name) if member is None else made[name](member) for member in members]
      sample |= {key: np.stack([x[key] for x in found]) for key in found[0]}
    return sample

  def _image(
    self, image: np.ndarray, rng: np.random.Generator, part: str, masked_name: str
  ) -> Sample:
    raw = {"image": image}
    seen = self.view.training(raw, rng) if self.training else self.view.evaluation(raw)
    masked_P = self.patches.draw(rng)
    hidden = _hidden(part, np.flatnonzero(masked_P), self.patches.count)
    return {part: seen["image"], masked_name: masked_P, **hidden}

  def _text(
    self,
    words: Sample,
    rng: np.random.Generator,
    masks: captions.TextMasks,
    part: str,
    names: tuple[str, str],
  ) -> Sample:
    inputs_T, targets_T, weights_T = masks.draw(words["text"], words["mask"], rng)
    hidden = _hidden(part, np.flatnonzero(weights_T), masks.count(self.seq_length))
    return {part: inputs_T, **dict(zip(names, (words["mask"], targets_T), strict=True)), **hidden}

  def _blank(self, name: str) -> Sample:
    """What stands in the place of a pair, an image or a text."""
    side, length = self.view.spatial.image_size, self.seq_length
    empty, patches = np.zeros(0, np.intp), math.prod(self.patches.grid)
    image = {"image": np.zeros((side, side, 3), np.float32), "masked": np.zeros(patches, bool)}
    words = {
      "text": np.zeros(length, np.int32),
      "mask": np.zeros(length, bool),
      "targets": np.zeros(length, np.int32),
    }
    if name == "images":
      masked = {"image": image["image"], "image_masked": image["masked"]}
      return {**masked, **_hidden("image", empty, self.patches.count)}
    if name == "texts":
      read = {"text": words.pop("text"), **{f"text_{key}": x for key, x in words.items()}}
      return {**read, **_hidden("text", empty, self.texts.count(length))}
    return {
      **{f"pair_{key}": x for key, x in {**image, **words}.items()},
      **_hidden("pair_image", empty, self.patches.count),
      **_hidden("pair_text", empty, self.pair_texts.count(length)),
    }


def _hidden(part: str, places: np.ndarray, count: int) -> Sample:
  """Places and weights of what is hidden of a part, filled up to a number of them."""
  filled = np.zeros(count, np.int32)
  filled[: len(places)] = places
  weights = (np.arange(count) < len(places)).astype(np.float32)
  return {f"{part}_places": filled, f"{part}_weights": weights}


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MaskedPairData:
  """Images, texts and pairs to restore, ready for the pipelines.

  Attributes:
    train: raw rows, of which `augment` makes samples.
    validation: samples.
    tokenizer: of all texts. The id V = `tokenizer.vocab_size` is the mask's.
    augment: `Masks`.
    pairs: the pairs as they are, as retrieval has them.
    composition: what a row is of.
    leaked: of images and texts alone that are of other sources, how many of the pairs' validation
      images and texts are among the training ones; None: not known. An image is known by its bytes,
      a text is met where it is a whole line.
    bad_records: what was left out: file, line in it, and what is wrong.
    identity: see `text.TextData`.
    mix: nothing.
  """

  train: Composed
  validation: masking.FixedMasks
  tokenizer: tokenizers.Tokenizer
  augment: Masks
  pairs: captions.CaptionData
  composition: Composition
  leaked: Mapping[str, int | None]
  bad_records: tuple[str, ...]
  identity: Mapping[str, Any]
  mix: None = None

  def describe(self) -> str:
    """Rows, what they are of, ids, and what a person may not expect of them."""
    parts = [
      f"{len(rows):,} {which} rows ("
      + ", ".join(f"{len(part):,} {name}" for name, part in rows.parts.items())
      + ")"
      for which, rows in (("training", self.train), ("validation", self.validation.samples))
    ]
    row = ", ".join(
      f"{count} {name if count > 1 else name.removesuffix('s')}"
      for name, count in self.train.counts.items()
    )
    words = f"{' and '.join(parts)}, {row} a row, {self.tokenizer.vocab_size:,} in the vocabulary"
    return words + self.pairs.caveats() + "".join(self._leaks())

  def _leaks(self) -> Iterator[str]:
    """What a validation of pairs may owe to images and texts alone."""
    for kind, count in self.leaked.items():
      if count is None:
        yield f"; whether validation {kind} of pairs are among the {kind} alone is not known"
      elif count:
        yield f"; {count:,} of the validation {kind} of pairs are among the {kind} alone"

  def frequencies(self) -> np.ndarray:
    """[V + 1], how often each id is read in the texts of a training row, the mask's the last.

    Those of pairs and those alone, each with its masks, by how many tokens a row has of them; of
    the first ten million tokens of each. Without texts all zeros.
    """
    read_V = np.zeros(self.tokenizer.vocab_size + 1)
    for name, masks in (("pairs", self.augment.pair_texts), ("texts", self.augment.texts)):
      if name in self.train.parts:
        part = self.train.parts[name]
        counted = part.tokens[:_COUNTED]
        counts = np.bincount(counted, minlength=self.tokenizer.vocab_size).astype(float)
        rows = len(part) * len(counted) / len(part.tokens)
        # Every row has a start, also a window that no document begins with.
        counts[tokenizers.BOS_ID] = rows
        tokens_a_row = self.train.counts[name] * counts.sum() / rows
        read_V += tokens_a_row * masks.frequencies(counts / counts.sum())
    return read_V / max(read_V.sum(), 1)

  def show(self, sample: Mapping[str, np.ndarray]) -> str:
    """The first texts of a row, as they are read."""
    words = [
      f"{name} {masking.words_of(self.tokenizer, sample[name][0], specials=False)!r:.200}"
      for name in ("pair_text", "text")
      if name in sample
    ]
    return ", ".join(words) or f"{len(sample['image'])} images"


def load_masked_pairs(
  *,
  workdir: str | os.PathLike[str],
  view: captions.PictureView,
  masks: patch_masks.PatchMasks,
  name: str = "embedded/emoji/en",
  composition: Mapping[str, int] | None = None,
  text_mask_rate: float = 0.15,
  pair_text_mask_rate: float = 0.5,
  mask_keep: float = 0.1,
  mask_random: float = 0.1,
  text_source: str = "",
  text_source_files: Sequence[str] = (),
  image_source: str = "",
  image_source_files: Sequence[str] = (),
  cache_dir: str = "",
  skip_bad: int = 0,
  expected: Mapping[str, Any] | None = None,
  **options: Any,
) -> MaskedPairData:
  """Finds pairs of images and texts, images alone and texts alone, and hides parts of them.

  Args:
    workdir, view, name, expected, **options: see `captions.load_captions`.
    masks: of the patches of images.
    composition: the fields of `Composition`; None: one of each. What rows have none of is not read:
      neither a source of its own, nor, where both others have theirs, the pairs.
    text_mask_rate, pair_text_mask_rate: about which share of the tokens of a text is hidden, alone
      and in a pair.
    mask_keep, mask_random: see `captions.TextMasks`.
    text_source: of the texts alone, see `sources.load_documents`: windows of its documents, see
      `TextWindows`, whose splits are train and validation; empty: the texts of the pairs.
    text_source_files: of text_source="text_files".
    image_source: of the images alone, see `images.load_images`, likewise; empty: the images of the
      pairs.
    image_source_files: the folder of image_source="image_folder".
    cache_dir: where tokens of text_source are kept; empty means `workdir/cache`.
    skip_bad: how many bad lines, documents or files may be left out; of images alone so many again.

  Raises:
    FileNotFoundError: data or tokenizer are not on disk.
    ValueError: of one line: see `captions.load_captions`, `sources.load_documents` and
      `images.load_images`; the composition is of nothing.

  Example:
    >>> view = captions.PictureView(images.Spatial(32))
    >>> masks = patch_masks.PatchMasks((8, 8), 26, 4)
    >>> data = load_masked_pairs(workdir="/tmp/run", view=view, masks=masks, tokenizer="byte")
    >>> {name: values.shape for name, values in data.validation[0].items()}["pair_text"]
    (1, 64)
  """
  row = Composition(**(composition or {}))
  if min(row) < 0 or not any(row):
    raise ValueError(f"{row} must have a pair, an image or a text")
  bad = documents.BadRecords(skip_bad)
  read, how = captions.chosen(options)
  # What no row has is not read, nor the pairs if neither rows nor the tokenizer are of them.
  text_source, image_source = text_source * (row.texts > 0), image_source * (row.images > 0)
  if row.pairs or not text_source or (row.images and not image_source):
    found = caption_sources.read_captioned(name, read, bad, apart=expected is None)
  else:
    found = caption_sources.nothing(), caption_sources.nothing()
  captions.refuse_others([part.identity for part in found], expected)
  alone: dict[str, dict[str, Any]] = {}
  words = None
  if text_source:
    words = sources.load_documents(
      text_source,
      apart=expected is None,
      train_files=tuple(text_source_files),
      validation_fraction=read.validation_fraction,
      data_dir=read.data_dir,
    )
    alone["texts"] = {
      part: dict(of.identity) for part, of in zip(("train", "validation"), words, strict=True)
    }
  pictures = None
  if image_source:
    pictures = images.load_images(
      name=image_source,
      view=images.Pixels(view.spatial, view.normalization),
      train_files=image_source_files,
      validation_fraction=read.validation_fraction,
      data_dir=read.data_dir,
      skip_bad=skip_bad if image_source == "image_folder" else 0,
    )
    alone["images"] = {part: pictures.identity[part] for part in ("train", "validation")}
  _refuse_others(alone, expected)
  encoded = captions.encode(
    [captions.held_of(part) for part in found],
    view,
    how,
    workdir=workdir,
    bad=bad,
    expected=expected,
    also=words[0] if words else None,
  )
  pairs = captions.of_encoded(encoded, found, view, bad, cut=how.too_long == "truncate")
  # Images are shown by the masks, augmented or not.
  rows = [captions.Rows(r.pictures, r.image_of, r.texts, r.encoded) for r in encoded[:2]]
  parts = [{"pairs": r, "images": r.pictures, "texts": TextRows(r)} for r in rows]
  if words:
    cache = cache_dir or pathlib.Path(workdir) / "cache"
    for part, of in zip(parts, words, strict=True):
      stream = packing.tokenize(of, encoded.tokenizer, cache, bad)
      part["texts"] = TextWindows(stream, how.seq_length, encoded.tokenizer)
  if pictures:
    parts[0]["images"], parts[1]["images"] = pictures.train, pictures.validation.images
  leaked: dict[str, int | None] = {}
  if row.pairs and words:
    leaked["texts"] = _lines_among(encoded.validation.texts, words[0], bad)
  if row.pairs and pictures:
    digests = found[1].digests, pictures.train.digests
    leaked["images"] = len({*digests[0]} & {*digests[1]}) if all(digests) else None
  hiding = functools.partial(captions.TextMasks, keep=mask_keep, random=mask_random)
  vocab_size = encoded.tokenizer.vocab_size
  drawing = Masks(
    view=view,
    training=True,
    patches=masks,
    texts=hiding(text_mask_rate, vocab_size=vocab_size),
    pair_texts=hiding(pair_text_mask_rate, vocab_size=vocab_size),
    seq_length=how.seq_length,
  )
  train, validation = (Composed(of, row, endless=of is parts[0]) for of in parts)
  found_bad = (*bad.found, *(pictures.bad_records if pictures else ()))
  return MaskedPairData(
    train=train,
    validation=masking.FixedMasks(validation, drawing._replace(training=False)),
    tokenizer=encoded.tokenizer,
    augment=drawing,
    pairs=pairs,
    composition=row,
    leaked=leaked,
    bad_records=found_bad,
    identity={
      **encoded.identity,
      **alone,
      "composition": row._asdict(),
      "masks": {
        "patches": {**masks._asdict(), "grid": list(masks.grid)},
        "texts": drawing.texts._asdict(),
        "pair_texts": drawing.pair_texts._asdict(),
      },
      **({"left_out": len(found_bad)} if found_bad else {}),
    },
  )


def _lines_among(
  texts: Sequence[str], within: documents.Documents, bad: documents.BadRecords
) -> int | None:
  """How many texts are lines of documents; None where these are too many to be read for it."""
  if len(within) > _COMPARED:
    return None
  wanted, met = {*texts}, set()
  for document in bad.readable(within):
    met |= wanted.intersection(map(caption_sources.plain, document.splitlines()))
  return sum(words in met for words in texts)


def _refuse_others(
  alone: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Any] | None
) -> None:
  """Raises ValueError if a run had other texts or images alone before."""
  if expected is None:
    return
  for kind in ("texts", "images"):
    before, now = expected.get(kind), alone.get(kind)
    if before is not None and now is not None:
      # Where another split is evaluated on, nothing is expected of it.
      before = before if "validation" in expected else {"train": before["train"]}
      part = text.changed_part(now, before)
    else:
      part = "train" if before != now else None
    if part:
      raise ValueError(
        f"the {part} {kind} alone are not those that this run was started with: bring them back,"
        " or use another workdir"
      )
