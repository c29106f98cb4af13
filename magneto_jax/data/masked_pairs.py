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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


class TextWindows(Sequence):
  """Windows of long texts: a bos and T - 1 tokens, which may be of several documents.

  Attributes:
    tokens: int32, of all of them.
  """

  def __init__(self, windows: packing.MarkedDataset):
    self._windows = windows
    self.tokens = windows.tokens

  def __len__(self) -> int:
    return len(self._windows)

  def __getitem__(self, index: int) -> Sample:
    """text: int32 [T]; mask: bool [T], True for what is no padding."""
    window = self._windows[index]
    return {"text": window["inputs"], "mask": window["segment_ids"] > 0}


class Composed(Sequence):
  """Rows of raw pairs, images and texts: a random-access data source for Grain.

  There are as many rows as hold all of the largest part. In training a smaller part begins anew,
  and images and texts alone come in an order of their own, so that a row's are not those of its
  pairs; in validation every one comes once, and None is in the place of what would be more.

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

  @property
  def tokens(self) -> np.ndarray:
    """The first tokens of texts in pairs and of those alone, with their marks."""
    held = [part.tokens[:_COUNTED] for name, part in self.parts.items() if name != "images"]
    return np.concatenate(held) if held else np.zeros(0, np.int32)

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
    place = index % len(part)
    return part[place if name == "pairs" else int(self._orders[name][place])]

  @functools.cached_property
  def _orders(self) -> dict[str, np.ndarray]:
    """An order of each part: of the number of its samples alone."""
    return {
      name: np.random.default_rng([seed, len(part)]).permutation(len(part))
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
      Of p pairs:
        pair_image: float32 [p, S, S, 3], whole; pair_masked: bool [p, P], True for the patches,
          read row by row, that are hidden.
        pair_text: int32 [p, T], with tokens hidden; pair_mask: bool [p, T], True for what is no
          padding; pair_targets: int32 [p, T] and pair_weights: float32 [p, T], see
          `captions.TextMasks.draw`.
      Of m images: image, image_masked. Of n texts: text, text_mask, text_targets, text_weights.
      Parts that a row has not are left out. What fills up the last rows of a validation is zeros:
      no patch is hidden, all of a text is padding, and no target counts.
    """
    sample = {}
    made = {
      "pairs": lambda pair: {
        **self._image(pair["image"], rng, "pair_image", "pair_masked"),
        **self._text(pair, rng, self.pair_texts, ("pair_text", "pair_mask", "pair")),
      },
      "images": lambda image: self._image(image["image"], rng, "image", "image_masked"),
      "texts": lambda words: self._text(words, rng, self.texts, ("text", "text_mask", "text")),
    }
    for name, members in row.items():
      found = [self._blank(name) if member is None else made[name](member) for member in members]
      sample |= {key: np.stack([x[key] for x in found]) for key in found[0]}
    return sample

  def _image(
    self, image: np.ndarray, rng: np.random.Generator, name: str, mask_name: str
  ) -> Sample:
    raw = {"image": image}
    seen = self.view.training(raw, rng) if self.training else self.view.evaluation(raw)
    return {name: seen["image"], mask_name: self.patches.draw(rng)}

  def _text(
    self,
    words: Sample,
    rng: np.random.Generator,
    masks: captions.TextMasks,
    names: tuple[str, str, str],
  ) -> Sample:
    name, mask_name, prefix = names
    inputs_T, targets_T, weights_T = masks.draw(words["text"], words["mask"], rng)
    scored = {f"{prefix}_targets": targets_T, f"{prefix}_weights": weights_T}
    return {name: inputs_T, mask_name: words["mask"], **scored}

  def _blank(self, name: str) -> Sample:
    """What stands in the place of a pair, an image or a text."""
    side, length = self.view.spatial.image_size, self.seq_length
    patches = math.prod(self.patches.grid)
    image = {"image": np.zeros((side, side, 3), np.float32)}
    words = {
      "text": np.zeros(length, np.int32),
      "mask": np.zeros(length, bool),
      "targets": np.zeros(length, np.int32),
      "weights": np.zeros(length, np.float32),
    }
    hidden = np.zeros(patches, bool)
    if name == "images":
      return {**image, "image_masked": hidden}
    if name == "texts":
      return {"text": words.pop("text"), **{f"text_{key}": x for key, x in words.items()}}
    return {f"pair_{key}": x for key, x in {**image, "masked": hidden, **words}.items()}


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
    return words + captions.told(self.pairs)

  def show(self, sample: Mapping[str, np.ndarray]) -> str:
    """The first texts of a row, as they are read."""
    words = [
      f"{name} {captions.words_of(self.tokenizer, sample[name][0])!r:.200}"
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
    composition: the fields of `Composition`; None: one of each.
    text_mask_rate, pair_text_mask_rate: about which share of the tokens of a text is hidden, alone
      and in a pair.
    mask_keep, mask_random: see `captions.TextMasks`.
    text_source: of the texts alone, see `sources.load_documents`: windows of its documents, whose
      splits are train and validation; empty: the texts of the pairs.
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
  found = caption_sources.read_captioned(name, read, bad, apart=expected is None)
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
      windows = packing.MarkedDataset(
        stream.tokens, stream.offsets, how.seq_length, keep_tail=part is parts[1]
      )
      part["texts"] = TextWindows(windows)
  if pictures:
    parts[0]["images"], parts[1]["images"] = pictures.train, pictures.validation.images
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
