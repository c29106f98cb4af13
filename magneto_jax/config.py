"""Configs at the border: from an ml_collections.ConfigDict to typed, range-checked records.

A config file starts from `default_config()`, a locked ConfigDict of every field below, and sets
what its experiment sets. `from_config_dict` turns it into the records that the rest of the package
takes; everything wrong with it is one `ConfigError` of one line, raised before devices start.
"""

import contextlib
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_collections
import numpy as np

from magneto_jax.theory import recipes, records


class ConfigError(ValueError):
  """A config that cannot be run; its text is one line that says what to change."""


@contextlib.contextmanager
def config_errors() -> Iterator[None]:
  """Where a config's values are used for the first time: what is wrong with them is its error."""
  try:
    yield
  except (ValueError, NotImplementedError) as error:
    raise ConfigError(str(error)) from error


# Devices count and multiply in int32 and float32: what is larger would overflow there.
_LARGEST = {int: 2**31 - 1, float: float(np.finfo(np.float32).max)}


def _field(default, doc: str, **bounds):
  """A field with its meaning and bounds: min, max, above, below (both exclusive), choices.

  Numbers that are given no upper bound have that of their kind on a device.
  """
  if type(default) in _LARGEST and "below" not in bounds:
    bounds.setdefault("max", _LARGEST[type(default)])
  return dataclasses.field(default=default, metadata={"doc": doc, **bounds})


def _positive(default: int, doc: str, max: int = _LARGEST[int]):
  return _field(default, doc, min=1, max=max)


def _rate(default: float, doc: str):
  return _field(default, doc, min=0.0, below=1.0)


# Far more than any model has; products of such sizes still fit 64 bits.
_MOST_LAYERS, _WIDEST, _LONGEST = 100_000, 2**20, 2**24


class _Checked:
  """A record whose fields are checked against their types and bounds when it is made."""

  _group = ""

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if not dataclasses.is_dataclass(field.type):
        value = _checked(field, getattr(self, field.name), self._group + field.name)
        object.__setattr__(self, field.name, value)


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Checked):
  """The sizes and choices of a model."""

  _group = "model."

  layers: int = _positive(
    6, "L, the number of layers; of an encoder-decoder's decoder", _MOST_LAYERS
  )
  encoder_layers: int = _field(
    0,
    "the number of layers of the encoder, where there is a decoder; 0: as many as layers",
    min=0,
    max=_MOST_LAYERS,
  )
  width: int = _positive(256, "D, the width of the residual stream", _WIDEST)
  ffn_width: int = _field(
    0, "F, the width of the FFN's hidden layer; 0: 4 x width", min=0, max=4 * _WIDEST
  )
  heads: int = _field(
    0,
    "N, attention heads; 0: one for each 64 of the width, or each 32 below a width of 256",
    min=0,
    max=_WIDEST,
  )
  kv_heads: int = _field(
    0, "K, the number of key/value heads; 0: as many as heads", min=0, max=_WIDEST
  )
  head_dim: int = _field(0, "H, the width of a head; 0: width / heads", min=0, max=_WIDEST)
  norm: str = _field("", "kind of every norm; empty: the recipe's", choices=("", *records.NORMS))
  activation: str = _field(
    "gelu",
    "of the feed-forward network",
    choices=("gelu", "gelu_tanh", "relu", "silu", "relu_squared", "swiglu"),
  )
  positions: str = _field(
    "sinusoidal",
    "position encoding",
    choices=("learned", "sinusoidal", "rotary", "xpos", "none"),
  )
  xpos_scale_base: float = _field(512.0, "of xPos: a larger one decays slower", above=0.0)
  relative_buckets: int = _field(
    0, "rows of a table of relative position biases, as in T5; 0: none", min=0, max=_LONGEST
  )
  relative_max_distance: int = _positive(128, "from which on distances share a bias", _LONGEST)
  qk_norm: str = _field(
    "",
    "norm of queries and keys, of each head or of all together; empty: the recipe's",
    choices=("", "none", *records.QK_NORMS),
  )
  use_bias: bool = _field(True, "whether projections have biases")
  tied_embeddings: bool = _field(True, "whether the output projection is the embedding table")
  image_size: int = _positive(224, "pixels on an image's side", 2**16)
  patch_size: int = _positive(16, "pixels on a patch's side", 2**16)
  image_vocab_size: int = _positive(
    8192, "how many tokens there are for patches of images", _LONGEST
  )
  shared_attention: bool = _field(
    False,
    "whether images and texts share the attention, as in BEiT-3's paper; in its released models"
    " each has its own",
  )
  fusion_layers: int = _field(
    0,
    "of how many of the top layers the feed-forward network has an expert more, which both parts of"
    " a pair pass; 3 in BEiT-3's paper, 0 in its released models",
    min=0,
    max=_MOST_LAYERS,
  )
  codebook_width: int = _positive(32, "numbers in a code of an image tokenizer", _WIDEST)
  codebook_decay: float = _rate(0.99, "of a code towards what chooses it, a step")
  codebook_redraw: float = _rate(
    0.0,
    "a code that is chosen less often than this, times the mean, becomes one of the batch's"
    " encodings; 0: never",
  )
  relative_patches: bool = _field(
    False, "whether layers share a table of two-dimensional relative position biases, as in BEiT"
  )
  pooling: str = _field(
    "first",
    "what a classifier reads: the first token, which images have with `first` alone, or the mean",
    choices=("first", "mean"),
  )
  scale_max: float = _field(
    0.0, "the most that products of features are multiplied by, 100 in CLIP; 0: any", min=0.0
  )
  speech_head: str = _field(
    "ctc",
    "what says what an encoder of sounds has heard; a translation is written by a decoder",
    choices=("ctc", "transducer", "decoder"),
  )
  mel_bins: int = _positive(80, "M, bins of a spectrogram", 1024)
  front_end: str = _field(
    "conv",
    "what makes a vector of each 4 frames of a spectrogram: fairseq's two convolutions over time, a"
    " VGG network, or ESPnet's two convolutions of stride 2",
    choices=("conv", "vgg", "conv2d"),
  )
  joint_width: int = _positive(640, "J, of a transducer's joiner", _WIDEST)
  joint_chunk: int = _positive(
    4, "vectors of a sound whose logits a transducer's loss holds at a time", _LONGEST
  )
  predictor: str = _field(
    "lstm",
    "what a transducer's prediction network is: an LSTM, or the last two labels' embeddings",
    choices=("lstm", "stateless"),
  )
  predictor_layers: int = _positive(1, "of the LSTM", 1024)
  predictor_width: int = _positive(512, "P, of the LSTM, or of an embedding", _WIDEST)
  ctc_weight: float = _rate(
    0.0, "share of a CTC of the encoder in the loss of a transducer or a decoder, in training alone"
  )
  window: int = _field(0, "how many earlier tokens attention reaches; 0: all", min=0, max=_LONGEST)
  logits_soft_cap: float = _field(0.0, "cap of the attention logits; 0: none", min=0.0)
  dropout: float = _rate(0.0, "after the embedding and every sublayer")
  attention_dropout: float = _rate(0.0, "of the attention probabilities")
  activation_dropout: float = _rate(0.0, "of the feed-forward network's hidden layer")
  drop_path: float = _rate(0.0, "drop-path rate of the last layer, rising from 0 at the first")
  dtype: str = _field(
    "float32", "of the computation; parameters are float32", choices=("float32", "bfloat16")
  )
  remat: str = _field(
    "none", "what the backward pass recomputes", choices=("none", "dots", "attention", "full")
  )
  unroll: int = _field(1, "layers in the scan's body; -1: all, no loop", min=-1, max=_MOST_LAYERS)
  attention_implementation: str = _field("", "of the attention kernel; empty: chosen for the call")

  def __post_init__(self):
    super().__post_init__()
    # What follows from the width is written out: a run's config says what was run.
    if not self.ffn_width:
      object.__setattr__(self, "ffn_width", 4 * self.width)
    if not self.heads:
      head_width = self.head_dim or (64 if self.width >= 256 else min(32, self.width))
      if self.width % head_width:
        raise ConfigError(f"set model.heads: {head_width} does not divide model.width={self.width}")
      object.__setattr__(self, "heads", self.width // head_width)
    kv_heads = self.kv_heads or self.heads
    if not self.head_dim and self.width % self.heads:
      raise ConfigError(
        f"model.heads={self.heads} must divide model.width={self.width}, or set model.head_dim"
      )
    if self.heads % kv_heads:
      raise ConfigError(f"model.kv_heads={kv_heads} must divide model.heads={self.heads}")
    head_dim = self.head_dim or self.width // self.heads
    if self.positions in ("rotary", "xpos") and head_dim % 2:
      raise ConfigError(
        f"{self.positions} positions need an even head width, not {head_dim}: see model.heads"
      )
    for name in ("layers", "encoder_layers"):
      layers = getattr(self, name)
      if self.unroll == 0 or (self.unroll > 0 and layers % self.unroll):
        raise ConfigError(f"model.unroll={self.unroll} must divide model.{name}={layers}, or be -1")
    if self.image_size % self.patch_size:
      raise ConfigError(
        f"model.patch_size={self.patch_size} must divide model.image_size={self.image_size}"
      )


_LANGUAGE_MODELS = ("causal_lm", "masked_lm")
_TEXT_TASKS = (*_LANGUAGE_MODELS, "text_classification", "translation")
_IMAGE_TASKS = ("image_classification", "image_tokenizer", "masked_image")
_SPEECH_TASKS = ("speech_recognition", "speech_translation")
# Of captions: images and texts, which may be of one source; and of questions and statements.
_CAPTION_TASKS = ("masked_data", "image_text_retrieval", "image_captioning")
_PICTURE_TASKS = (*_CAPTION_TASKS, "visual_question_answering", "visual_reasoning")
# What masked data modelling is for.
_DOWNSTREAM_TASKS = tuple(name for name in _PICTURE_TASKS if name != "masked_data")
# All that have a tokenizer, and the tokenizers that only some of them have.
_TOKEN_TASKS = (*_TEXT_TASKS, *_SPEECH_TASKS, *_PICTURE_TASKS)
_OF_SOME_TOKENS = {"char": (*_SPEECH_TASKS, *_PICTURE_TASKS), "xlmr": _PICTURE_TASKS}

# All whose tokens, of texts or of patches, are answered over a vocabulary.
_VOCABULARY_TASKS = (*_LANGUAGE_MODELS, "translation", "masked_image", "masked_data")
_VOCABULARY_TASKS += ("image_captioning", *_SPEECH_TASKS)

# Fields, or groups of them, that some tasks alone read, and which.
OF_SOME_TASKS: dict[str, tuple[str, ...]] = {
  "init_from": (
    "text_classification",
    "image_classification",
    *_SPEECH_TASKS,
    *_DOWNSTREAM_TASKS,
  ),
  "vocab_chunk": _VOCABULARY_TASKS,
  "label_smoothing": (*_VOCABULARY_TASKS, "image_classification"),
  "sample_prompt": ("causal_lm",),
  "sample_temperature": ("causal_lm",),
  "beam": ("translation", *_SPEECH_TASKS, "image_captioning"),
  "beam.max_ratio": ("translation", *_SPEECH_TASKS),
  "beam.max_extra": ("translation", *_SPEECH_TASKS),
  "beam.max_symbols": ("speech_recognition",),
  "model.encoder_layers": ("translation", "image_tokenizer", *_SPEECH_TASKS),
  "model.image_size": (*_IMAGE_TASKS, *_PICTURE_TASKS),
  "model.patch_size": (*_IMAGE_TASKS, *_PICTURE_TASKS),
  "model.image_vocab_size": ("image_tokenizer", "masked_image", "masked_data"),
  "model.shared_attention": _PICTURE_TASKS,
  "model.scale_max": ("image_text_retrieval",),
  "model.fusion_layers": _PICTURE_TASKS,
  "model.codebook_width": ("image_tokenizer",),
  "model.codebook_decay": ("image_tokenizer",),
  "model.codebook_redraw": ("image_tokenizer",),
  "model.relative_patches": ("image_classification", "masked_image"),
  "model.pooling": ("text_classification", "image_classification", "masked_image"),
  "model.speech_head": ("speech_recognition",),
  "model.mel_bins": _SPEECH_TASKS,
  "model.front_end": _SPEECH_TASKS,
  "model.joint_width": ("speech_recognition",),
  "model.joint_chunk": ("speech_recognition",),
  "model.predictor": ("speech_recognition",),
  "model.predictor_layers": ("speech_recognition",),
  "model.predictor_width": ("speech_recognition",),
  "model.ctc_weight": _SPEECH_TASKS,
  "spec_augment": _SPEECH_TASKS,
  "model.tied_embeddings": (*_LANGUAGE_MODELS, "translation", "masked_data", *_SPEECH_TASKS),
  "image_tokenizer": ("masked_image", "masked_data"),
  "data.mask_rate": ("masked_lm", "masked_image", "masked_data", "image_captioning"),
  "data.mask_block": ("masked_image", "masked_data"),
  "data.mask_keep": ("masked_lm", "masked_data", "image_captioning"),
  "data.mask_random": ("masked_lm", "masked_data", "image_captioning"),
  "data.text_mask_rate": ("masked_data",),
  "data.pair_text_mask_rate": ("masked_data",),
  "data.composition": ("masked_data",),
  "data.text_source": ("masked_data",),
  "data.text_source_files": ("masked_data",),
  "data.image_source": ("masked_data",),
  "data.image_source_files": ("masked_data",),
  "data.keywords": _CAPTION_TASKS,
  "data.least_answers": ("visual_question_answering",),
  "data.document_separator": _LANGUAGE_MODELS,
  "data.cache_dir": (*_LANGUAGE_MODELS, "translation", *_SPEECH_TASKS, "masked_data"),
  "data.tokenizer": _TOKEN_TASKS,
  "data.vocab_size": _TOKEN_TASKS,
  "data.tokenizer_file": _TOKEN_TASKS,
  "data.seq_length": _TOKEN_TASKS,
  "data.text_key": (
    *_LANGUAGE_MODELS,
    "text_classification",
    *_SPEECH_TASKS,
    *_CAPTION_TASKS,
  ),
  "data.text_case": _SPEECH_TASKS,
  "data.audio_key": _SPEECH_TASKS,
  "data.sample_rate": _SPEECH_TASKS,
  "data.max_seconds": _SPEECH_TASKS,
  "data.speed_change": _SPEECH_TASKS,
  "data.source_key": ("translation",),
  "data.target_key": ("translation",),
  "data.second_text_key": ("text_classification",),
  "data.label_key": ("text_classification", "image_classification"),
  "data.label_scale": ("text_classification",),
  "data.regression": ("text_classification",),
  "data.too_long": ("text_classification", "translation", *_SPEECH_TASKS, *_PICTURE_TASKS),
  "data.image_key": (*_IMAGE_TASKS, *_CAPTION_TASKS),
  "data.normalization": (*_IMAGE_TASKS, *_PICTURE_TASKS),
  "data.eval_crop": (*_IMAGE_TASKS, *_PICTURE_TASKS),
  "data.augment": (*_IMAGE_TASKS, *_PICTURE_TASKS),
  "data.augment.erase": ("image_classification",),
  "data.augment.mixup": ("image_classification",),
  "data.augment.cutmix": ("image_classification",),
  "data.augment.mix_rate": ("image_classification",),
  "data.augment.cutmix_share": ("image_classification",),
}


def tasks_reading(name: str) -> tuple[str, ...] | None:
  """The tasks that alone read a field, or the group that it is in; None if all do."""
  while name not in OF_SOME_TASKS and "." in name:
    name = name.rpartition(".")[0]
  return OF_SOME_TASKS.get(name)


def reads(task: str, name: str) -> bool:
  """Whether a task reads a field; what one of one's own reads is not known, and so may be any."""
  tasks = tasks_reading(name)
  return tasks is None or task in tasks or task not in _SHIPPED_TASKS


# Fields at which a part would stand for a whole, the tasks of which that is refused, and why.
_OF_WHOLES: dict[str, tuple[tuple[str, ...], str]] = {
  "accumulation": (
    ("image_text_retrieval",),
    "cuts the batch whose pairs a contrastive loss compares: set accumulation=1; for memory,"
    " model.remat or more devices help",
  ),
  "eval_batches": (
    ("image_text_retrieval", "visual_question_answering", "visual_reasoning"),
    "reads a part of the validation set, which is judged as a whole, beside what is trivial on all"
    " of it: set eval_batches=0, and eval_every to more if that takes long",
  ),
}


# Names of data that are the user's own files, and the tasks that read such.
OWN_FILES = {
  "text_files": (*_LANGUAGE_MODELS, "text_classification"),
  "pair_files": ("translation",),
  "image_folder": _IMAGE_TASKS,
  "manifest": _SPEECH_TASKS,
  "pairs_jsonl": _PICTURE_TASKS,
}


@dataclasses.dataclass(frozen=True)
class RecipeConfig(_Checked):
  """What a recipe leaves open; see the recipe's function. Empty: the recipe's own choice."""

  _group = "recipe_options."

  head_scale: str = _field(
    "",
    "where NormFormer's head scale is applied",
    choices=("", "none", *records.HEAD_SCALES),
  )
  residual_scale: str = _field(
    "", "NormFormer's learned scale of the FFN's residual", choices=("", "none", "vector", "scalar")
  )
  attention_residual_scale: str = _field(
    "", "the same of the attention's residual", choices=("", "none", "vector", "scalar")
  )
  bert_init: bool = _field(False, "whether torchscale's recipes draw from N(0, 0.02^2)")
  placement: str = _field(
    "", "DeepScaleLM's norms, before or after a sublayer", choices=("", "pre", "post")
  )
  depth_unit: str = _field("", "what DeepScaleLM's depth counts", choices=("", "layers", "blocks"))
  beta_squared: float = _rate(0.0, "DeepScaleLM's beta^2; 0: by the depth")

  def chosen(self) -> dict[str, Any]:
    """The keywords of the recipe's function that are set."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {n: None if value == "none" else value for n, value in values.items() if value}


@dataclasses.dataclass(frozen=True)
class AugmentConfig(_Checked):
  """How training images are changed; by default they are not. See `data.images.Spatial`."""

  _group = "data.augment."

  crop_scale: float = _field(
    1.0,
    "least share of an image's area that a random crop keeps; 1: no random crop, the evaluation's",
    above=0.0,
    max=1.0,
  )
  flip: float = _field(0.0, "share of images that are mirrored", min=0.0, max=1.0)
  color_jitter: float = _field(
    0.0, "brightness, contrast and saturation are changed by 1 -+ this; 0: not", min=0.0, max=1.0
  )
  rand_augment: int = _field(0, "operations of RandAugment on an image; 0: none", min=0, max=16)
  rand_augment_set: str = _field(
    "full", "of which it draws: all 15, or BEiT-3's ten", choices=("full", "beit3")
  )
  rand_augment_magnitude: float = _field(9.0, "their mean strength, of 10", min=0.0, max=10.0)
  rand_augment_std: float = _field(0.5, "its deviation", min=0.0, max=10.0)
  erase: float = _field(0.0, "share of images in which a box becomes noise", min=0.0, max=1.0)
  mixup: float = _field(
    0.0, "alpha of the Beta distribution of mixup's shares; 0: no mixup", min=0.0, max=1e3
  )
  cutmix: float = _field(0.0, "the same of cutmix", min=0.0, max=1e3)
  mix_rate: float = _field(1.0, "share of batches that are mixed", min=0.0, max=1.0)
  cutmix_share: float = _field(
    0.5, "share of those for cutmix, where there is mixup too", min=0.0, max=1.0
  )

  def __post_init__(self):
    super().__post_init__()
    mixed = self.mixup or self.cutmix
    for name, read, needed in (
      ("rand_augment_set", self.rand_augment, "data.augment.rand_augment"),
      ("rand_augment_magnitude", self.rand_augment, "data.augment.rand_augment"),
      ("rand_augment_std", self.rand_augment, "data.augment.rand_augment"),
      ("mix_rate", mixed, "data.augment.mixup or data.augment.cutmix"),
      ("cutmix_share", self.mixup and self.cutmix, "data.augment.mixup and data.augment.cutmix"),
    ):
      default = AugmentConfig.__dataclass_fields__[name].default
      if not read and getattr(self, name) != default:
        raise ConfigError(
          f"config.data.augment.{name} is not read without {needed}: set that, or leave it"
        )


@dataclasses.dataclass(frozen=True)
class CompositionConfig(_Checked):
  """What a row of a batch of masked data is of; 0 leaves a part out. See `data.masked_pairs`."""

  _group = "data.composition."

  pairs: int = _field(1, "pairs of an image and a text in a row", min=0, max=2**16)
  images: int = _field(1, "images alone", min=0, max=2**16)
  texts: int = _field(1, "texts alone", min=0, max=2**16)

  def __post_init__(self):
    super().__post_init__()
    if not (self.pairs or self.images or self.texts):
      raise ConfigError(
        "config.data.composition has neither pairs nor images nor texts: set one to 1 at least"
      )


@dataclasses.dataclass(frozen=True)
class DataConfig(_Checked):
  """Where texts and images come from, how texts become tokens and images arrays."""

  _group = "data."

  name: str = _field(
    "embedded",
    "`embedded`, `text_files`, `pair_files` (translation), `embedded/mnist5k`, `embedded/emoji`,"
    " `image_folder` (images), `embedded/en`, `embedded/fr`, `embedded/fr-en`, `manifest` (speech),"
    " `embedded/emoji/en`, `embedded/emoji/de`, `embedded/emoji/en+de`, `pairs_jsonl` (images with"
    " texts), or the name of a TFDS data set",
  )
  train_files: str = _field(
    "",
    "files or globs of name=text_files, pair_files, manifest or pairs_jsonl, separated by commas;"
    " of name=image_folder a folder that holds a folder for each class",
  )
  validation_files: str = _field("", "the same; empty: a part of the training data")
  test_files: str = _field("", "the same, of the split `test` (magneto_jax.evaluate)")
  document_separator: str = _field("", "splits a text file into documents; empty: one a file")
  validation_fraction: float = _field(
    0.1, "part held out when there are no validation_files", above=0.0, below=1.0
  )
  data_dir: str = _field("", "where TFDS data sets lie prepared; empty: TFDS's own default")
  train_split: str = _field("train", "TFDS split to train on")
  validation_split: str = _field("validation", "split to evaluate on")
  text_key: str = _field("text", "TFDS feature, or column of a file, that holds the text")
  second_text_key: str = _field("", "the same of a pair's second text; empty: texts are single")
  label_key: str = _field("label", "the same of the label")
  regression: bool = _field(False, "whether labels are numbers to be met, and not classes")
  label_scale: float = _field(1.0, "what such numbers are divided by", above=0.0)
  source_key: str = _field("en", "language, as the data set names it, to translate from")
  target_key: str = _field("de", "language to translate into")
  too_long: str = _field(
    "refuse",
    "what is done with a text of more than seq_length tokens, or a sound of more than max_seconds:"
    " end the run, skip it and tell how many there are (translation, speech, images with texts), or"
    " truncate it (images with texts), the longer of two first (classification)",
    choices=("refuse", "skip", "truncate"),
  )
  tokenizer: str = _field(
    "sentencepiece",
    "kind of tokens; `char`, the characters of the training texts, is of speech and of images with"
    " texts; `xlmr`, the released BEiT-3's, is of images with texts and needs tokenizer_file",
    choices=("sentencepiece", "byte", "char", "xlmr"),
  )
  vocab_size: int = _field(1024, "pieces to train (sentencepiece)", min=8, max=_LONGEST)
  tokenizer_file: str = _field(
    "",
    "a sentencepiece model to load instead of training one; of `char` a run's characters.json, of"
    " `xlmr` beit3.spm, or another of its kind",
  )
  seq_length: int = _field(256, "T, tokens a sample", min=2, max=_LONGEST)
  text_case: str = _field(
    "keep", "letters of a spoken text: as they are, or all of them small", choices=("keep", "lower")
  )
  audio_key: str = _field("speech", "TFDS feature that holds the sound")
  sample_rate: int = _field(
    8000, "samples a second of a sound; others are resampled", min=1000, max=384_000
  )
  max_seconds: float = _field(4.0, "the longest sound, in seconds", min=0.1, max=3600.0)
  speed_change: float = _field(
    0.0,
    "training sounds are played 1 - this, 1 and 1 + this times as fast",
    min=0.0,
    max=0.5,
  )
  image_key: str = _field("image", "TFDS feature that holds the image")
  normalization: str = _field(
    "half",
    "of pixels: (x / 255 - 1/2) / (1/2), or by ImageNet's means and deviations",
    choices=("half", "imagenet"),
  )
  eval_crop: float = _field(
    1.0,
    "share of an image's short side that an evaluation's central square has; 0: all of the image,"
    " squeezed into a square, as in BEiT-3",
    min=0.0,
    max=1.0,
  )
  augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
  mask_rate: float = _field(
    0.15,
    "share of a masked model's or a caption's tokens, or of an image's patches, that are predicted",
    above=0.0,
    below=1.0,
  )
  mask_keep: float = _field(0.1, "share of those that are read as they are", min=0.0, max=1.0)
  mask_random: float = _field(
    0.1, "share of those that are read as a random token; the rest are hidden", min=0.0, max=1.0
  )
  mask_block: int = _positive(
    16, "patches of the smallest block of an image that is hidden as one", _LONGEST
  )
  text_mask_rate: float = _field(
    0.15, "share of the tokens of a text without an image", above=0.0, below=1.0
  )
  pair_text_mask_rate: float = _field(
    0.5, "share of the tokens of a pair's text", above=0.0, below=1.0
  )
  composition: CompositionConfig = dataclasses.field(default_factory=CompositionConfig)
  text_source: str = _field(
    "", "as `name`, of the texts alone: one of texts or of TFDS; empty: the texts of the pairs"
  )
  text_source_files: str = _field("", "files or globs of text_source=text_files")
  image_source: str = _field(
    "", "as `name`, of the images alone: one of images or of TFDS; empty: the images of the pairs"
  )
  image_source_files: str = _field("", "the folder of image_source=image_folder")
  keywords: bool = _field(
    False, "whether an emoji's keywords are a text of it, too, beside its name"
  )
  least_answers: int = _field(
    0,
    "how many training questions have an answer that is known, at least; 0: 9 of one's own"
    " questions, as of VQAv2, and 1 of generated ones",
    min=0,
  )
  cache_dir: str = _field(
    "", "where token files, and what TFDS sounds hold, are kept; empty: in the workdir"
  )
  workers: int = _field(
    0, "processes that prepare batches; 0: threads of this one", min=0, max=1024
  )
  prefetch: int = _field(2, "batches placed on the devices ahead of the step", min=0, max=1024)
  skip_bad: int = _field(
    0, "damaged samples that are left out, counted and logged; one more ends the run", min=0
  )

  def __post_init__(self):
    super().__post_init__()
    for name in ("train_files", "validation_files", "test_files"):
      if self.name not in OWN_FILES and getattr(self, name):
        raise ConfigError(
          f"data.{name} are not read with data.name={self.name!r}: set"
          f" data.name={' or '.join(OWN_FILES)}"
        )
    for kind, own in (("text", "text_files"), ("image", "image_folder")):
      source, names = getattr(self, f"{kind}_source"), getattr(self, f"{kind}_source_files")
      if bool(names) != (source == own):
        raise ConfigError(
          f"data.{kind}_source_files={names!r} and data.{kind}_source={source!r} do not agree,"
          f" as {own} needs files and no other source reads any"
        )
    if self.mask_keep + self.mask_random > 1:
      raise ConfigError(
        f"data.mask_keep={self.mask_keep} and data.mask_random={self.mask_random} are shares of the"
        " same tokens: together they must be at most 1"
      )


# What follows the warm-up, and which fields of the optimizer it reads.
SCHEDULES: dict[str, tuple[str, ...]] = {
  "cosine": ("decay_steps", "end_factor"),
  "linear": ("decay_steps", "end_factor"),
  "polynomial": ("decay_steps", "end_factor", "power"),
  "inverse_sqrt": (),
  "constant": (),
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(_Checked):
  """AdamW and its learning-rate schedule."""

  _group = "optimizer."

  learning_rate: float = _field(1e-3, "peak learning rate", above=0.0)
  b1: float = _rate(0.9, "decay of the first moment")
  b2: float = _rate(0.98, "decay of the second moment")
  eps: float = _field(1e-8, "added to the root of the second moment", above=0.0)
  weight_decay: float = _field(0.01, "decoupled, times the learning rate", min=0.0)
  decay_mask: str = _field(
    "matrices",
    "what decays: kernels and embedding tables, all parameters (as fairseq does), or what decays in"
    " BEiT (no tables of positions, but those of relative biases and the mask token)",
    choices=("matrices", "all", "beit"),
  )
  layer_decay: float = _field(
    1.0,
    "factor of the updates from each layer to the one below it, down to the embedding; 1: none",
    above=0.0,
    max=1.0,
  )
  head_rate: float = _field(
    1.0, "factor of the updates of a model's head, on top of its encoder; 1: none", above=0.0
  )
  clip_norm: float = _field(0.0, "global gradient norm to clip at; 0: no clipping", min=0.0)
  schedule: str = _field("cosine", "after the warm-up", choices=tuple(SCHEDULES))
  power: float = _field(1.0, "exponent of the polynomial schedule", above=0.0)
  warmup_steps: int = _field(0, "steps of linear warm-up", min=0)
  decay_steps: int = _field(0, "step at which the schedule ends; 0: the run's steps", min=0)
  end_factor: float = _field(0.0, "last learning rate over the peak", min=0.0, max=1.0)

  def __post_init__(self):
    super().__post_init__()
    for field in dataclasses.fields(self):
      reading = [schedule for schedule, names in SCHEDULES.items() if field.name in names]
      if reading and self.schedule not in reading and getattr(self, field.name) != field.default:
        raise ConfigError(
          f"config.optimizer.{field.name} is not read with"
          f" config.optimizer.schedule={self.schedule!r}, only with"
          f" {' and '.join(map(repr, reading))}"
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig(_Checked):
  """How many devices share what; their product is the number of devices. See `sharding`."""

  _group = "mesh."

  slices: int = _field(1, "slices, or islands, joined by the data centre's network alone", min=1)
  data: int = _field(-1, "copies of the model, each with rows of its own; -1: what is left", min=-1)
  fsdp: int = _field(
    1, "devices that share a copy's weights and optimizer state, each with rows of its own", min=-1
  )
  sequence: int = _field(1, "devices that share the positions of a row (ring attention)", min=-1)
  tensor: int = _field(1, "devices that share heads, hidden channels and vocabulary", min=-1)

  def __post_init__(self):
    super().__post_init__()
    sizes = dataclasses.asdict(self)
    for name in (name for name, size in sizes.items() if size == 0):
      raise ConfigError(f"config.mesh.{name}=0 must be at least 1, or -1 for what is left")
    if len(left := [f"mesh.{name}" for name, size in sizes.items() if size == -1]) > 1:
      raise ConfigError(f"{' and '.join(left)} are -1: what is left can go to one of them only")

  def sizes(self) -> dict[str, int]:
    """By the names of the mesh's axes."""
    sizes = dataclasses.asdict(self)
    return {"slice": sizes.pop("slices"), **sizes}


@dataclasses.dataclass(frozen=True)
class SpikeConfig(_Checked):
  """When a run goes back before a spike of its loss by itself, and how far. See `spikes`."""

  _group = "spike."

  factor: float = _field(
    0.0, "median deviations above the median at which a loss is a spike; 0: none is", min=0.0
  )
  window: int = _field(100, "steps whose losses and gradient norms are compared", min=8)
  rewind_steps: int = _positive(100, "how many steps it goes back at least")
  skip_batches: int = _positive(200, "batches that are then left out")
  limit: int = _positive(3, "how often, before the run ends")


# What `task` may be: the keys of `tasks.TASKS`, to which `tasks.register` adds.
TASK_NAMES = [
  "causal_lm",
  "masked_lm",
  "text_classification",
  "translation",
  "image_classification",
  "image_tokenizer",
  "masked_image",
  "masked_data",
  "image_text_retrieval",
  "image_captioning",
  "visual_question_answering",
  "visual_reasoning",
  "speech_recognition",
  "speech_translation",
]
# Of which it is known what they read.
_SHIPPED_TASKS = tuple(TASK_NAMES)


@dataclasses.dataclass(frozen=True)
class BeamConfig(_Checked):
  """How a model's texts are searched. See `decoding.beam_search`, and its siblings of sounds."""

  _group = "beam."

  size: int = _positive(5, "how many beams", 1024)
  length_penalty: float = _field(
    1.0, "power of the length that a score is divided by; 0: sums", min=0.0, max=100.0
  )
  penalty: str = _field(
    "length",
    "of the length: |y|^p, GNMT's, or (1 + |y|)^p, which counts the bos",
    choices=("length", "gnmt", "with_bos"),
  )
  min_length: int = _field(1, "tokens before the end, at least", min=0, max=_LONGEST)
  max_ratio: float = _field(
    1.2, "the same at most, for each token of the source, or vector of a sound", min=0.0, max=1e3
  )
  max_extra: int = _field(10, "what is added to that", min=0, max=_LONGEST)
  max_symbols: int = _positive(
    5, "the most labels that a transducer says at a vector of a sound", 1024
  )
  rows: int = _positive(32, "sources that are searched together", 2**16)
  judged: int = _field(
    0,
    "how many of a split's pairs, or utterances, the first, are answered and judged; 0: all",
    min=0,
  )


@dataclasses.dataclass(frozen=True)
class SpecAugmentConfig(_Checked):
  """What training hides of a spectrogram; by default nothing. See `layers.SpecAugment`."""

  _group = "spec_augment."

  frequency_masks: int = _field(0, "how many bands of frequencies; 0: none", min=0, max=1024)
  frequency_width: int = _positive(27, "F: a band has fewer bins than this", 1024)
  time_masks: int = _field(0, "how many bands of time, at most; 0: none", min=0, max=1024)
  time_width: int = _field(
    100, "a band has fewer frames than this; 0: time_share alone bounds it", min=0, max=_LONGEST
  )
  time_share: float = _field(
    1.0, "a band has fewer frames than this share of the utterance's", above=0.0, max=1.0
  )
  time_mask_share: float = _field(
    0.0,
    "there are at most as many bands of time as this share of the utterance's frames; 0: time_masks"
    " of them, however long it is",
    min=0.0,
    max=1.0,
  )

  def __post_init__(self):
    super().__post_init__()
    for name in ("frequency_width", "time_width", "time_share", "time_mask_share"):
      masks, default = f"{name.partition('_')[0]}_masks", self.__dataclass_fields__[name].default
      if not getattr(self, masks) and getattr(self, name) != default:
        raise ConfigError(
          f"config.spec_augment.{name} is not read without spec_augment.{masks}: set that, or leave"
          " it"
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Checked):
  """One run."""

  task: str = _field(
    "causal_lm",
    "what is learned",
    choices=TASK_NAMES,
    hint="; a task of your own is first registered by its file (docs/tasks.md)",
  )
  recipe: str = _field(
    "magneto", "how the model is normalised, scaled and initialised", choices=tuple(recipes.RECIPES)
  )
  recipe_options: RecipeConfig = dataclasses.field(default_factory=RecipeConfig)
  init_from: str = _field(
    "",
    "a pre-trained run's workdir, or a converted model's folder, whose encoder a fresh run starts"
    " with; empty: none",
  )
  image_tokenizer: str = _field(
    "",
    "the workdir of a run of task image_tokenizer, whose tokens a fresh run's targets are",
  )
  seed: int = _field(0, "of the parameters, the data's order and dropout", min=0, max=2**32 - 1)
  steps: int = _positive(1000, "optimizer steps")
  batch_size: int = _positive(16, "sequences a step", _LONGEST)
  accumulation: int = _positive(1, "parts a batch is split into, one after the other", _LONGEST)
  vocab_chunk: int = _field(
    0,
    "rows of the vocabulary whose logits are held at a time in the loss; 0: all",
    min=0,
    max=_LONGEST,
  )
  label_smoothing: float = _rate(
    0.0, "share of the targets' probability that other tokens are given in training"
  )
  cast_weights: bool = _field(
    False,
    "whether kernels are cast to model.dtype once a step, and not where each is used",
  )
  deterministic: bool = _field(
    True,
    "whether a GPU's steps give the same bits each time: if not, XLA may add in any order, which"
    " takes less time",
  )
  ema: float = _rate(0.0, "decay of an average of the weights that evaluation uses; 0: none")
  eval_every: int = _positive(250, "steps between evaluations")
  eval_batches: int = _field(0, "batches an evaluation reads; 0: the whole validation set", min=0)
  log_every: int = _positive(10, "steps between lines of metrics")
  checkpoint_every: int = _positive(250, "steps between checkpoints")
  diagnostics_every: int = _field(
    0, "steps between measurements of stream and gradient by layer; 0: none", min=0
  )
  keep_checkpoints: int = _positive(3, "how many checkpoints are kept")
  keep_best: bool = _field(
    False, "whether the checkpoint of the best validation metric is kept beside the newest"
  )
  max_skipped: int = _positive(
    10, "steps in a row, skipped as their numbers are not finite, at which the run ends"
  )
  skip_batches: str = _field("", "batches that are left out: ranges a:b, separated by commas")
  on_damage: str = _field(
    "fallback",
    "where the newest checkpoint is damaged: go on from the newest good one, or stop",
    choices=("fallback", "stop"),
  )
  sample_prompt: str = _field("", "start of the sample that is printed at the end")
  sample_tokens: int = _field(128, "tokens of that sample; 0: no sample", min=0, max=_LONGEST)
  sample_temperature: float = _field(0.8, "of that sample; 0: greedy", min=0.0)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  spike: SpikeConfig = dataclasses.field(default_factory=SpikeConfig)
  beam: BeamConfig = dataclasses.field(default_factory=BeamConfig)
  spec_augment: SpecAugmentConfig = dataclasses.field(default_factory=SpecAugmentConfig)

  def __post_init__(self):
    super().__post_init__()
    ranges = (f"{begin}:{end}" for begin, end in batch_ranges(self.skip_batches))
    object.__setattr__(self, "skip_batches", ",".join(ranges))
    # The oldest checkpoint that is kept for certain.
    age = self.checkpoint_every * (self.keep_checkpoints - 1)
    if self.spike.factor and age < self.spike.rewind_steps:
      raise ConfigError(
        f"keep_checkpoints={self.keep_checkpoints}, with checkpoint_every={self.checkpoint_every},"
        f" may reach back {age} steps only, not spike.rewind_steps={self.spike.rewind_steps}: set"
        " one of the first two to more"
      )
    if self.batch_size % self.accumulation:
      raise ConfigError(
        f"accumulation={self.accumulation} must divide batch_size={self.batch_size}"
      )
    if (tokens := self.batch_size * self.data.seq_length) > _LARGEST[int]:
      raise ConfigError(
        f"batch_size={self.batch_size} times data.seq_length={self.data.seq_length} is {tokens:,}"
        f" tokens a step, which must be at most {_LARGEST[int]:,}"
      )
    if self.task in _SPEECH_TASKS:
      self._check_sounds()
    self._check_speech()
    augment, bins = self.spec_augment, self.model.mel_bins
    if augment.frequency_masks and augment.frequency_width > bins:
      raise ConfigError(
        f"config.spec_augment.frequency_width={augment.frequency_width} must be at most"
        f" model.mel_bins={bins}"
      )
    values, defaults = flatten(self), defaults_by_name()
    for name, value in values.items():
      if value != defaults[name] and not reads(self.task, name):
        raise ConfigError(
          f"config.{name} is not read with config.task={self.task!r}, only with"
          f" {' and '.join(map(repr, tasks_reading(name)))}"
        )
    for name, (tasks, why) in _OF_WHOLES.items():
      if self.task in tasks and values[name] != defaults[name]:
        raise ConfigError(f"config.{name}={values[name]} with config.task={self.task!r} {why}")
    reading = OWN_FILES.get(self.data.name, TASK_NAMES)
    if self.task in _SHIPPED_TASKS and self.task not in reading:
      own = [name for name, tasks in OWN_FILES.items() if self.task in tasks]
      raise ConfigError(
        f"config.data.name={self.data.name!r} is not read with config.task={self.task!r}, only with"
        f" {' and '.join(map(repr, reading))}" + "".join(f": set data.name={name}" for name in own)
      )
    reading = _OF_SOME_TOKENS.get(self.data.tokenizer, _SHIPPED_TASKS)
    if self.task in set(_SHIPPED_TASKS) - set(reading):
      raise ConfigError(
        f"config.data.tokenizer={self.data.tokenizer!r} is not read with config.task={self.task!r},"
        f" only with {' and '.join(map(repr, reading))}: set sentencepiece or byte"
      )
    if self.keep_best and self.eval_every % self.checkpoint_every:
      raise ConfigError(
        "keep_best needs a checkpoint of every evaluation:"
        f" checkpoint_every={self.checkpoint_every} must divide eval_every={self.eval_every}"
      )
    for name in self.recipe_options.chosen():
      if name not in recipes.options(self.recipe):
        having = [recipe for recipe in recipes.RECIPES if name in recipes.options(recipe)]
        raise ConfigError(
          f"config.recipe={self.recipe!r} has no option {name}: it is of {', '.join(having)}"
        )
    refuse_far_xpos(self.model, self.data.seq_length, "config.data.seq_length")
    if re.search("[\ud800-\udfff]", self.sample_prompt):  # Bytes that were not UTF-8.
      raise ConfigError(f"sample_prompt={self.sample_prompt!r} is not valid text")

  def _check_sounds(self):
    """Raises for sounds that are too large together, or that would lose a part of their text."""
    seconds = self.data.max_seconds
    if (samples := self.batch_size * round(seconds * self.data.sample_rate)) > _LARGEST[int]:
      raise ConfigError(
        f"batch_size={self.batch_size} times data.max_seconds={seconds:g} times data.sample_rate="
        f"{self.data.sample_rate} is {samples:,} samples a step, which must be at most"
        f" {_LARGEST[int]:,}"
      )
    if self.data.too_long == "truncate":
      raise ConfigError(
        f"config.data.too_long='truncate' is not read with config.task={self.task!r}, as half a"
        " text is not what is heard: set refuse or skip"
      )

  def _check_speech(self):
    """Raises for a field that this head, or this predictor, of a model of speech does not read."""
    head = speech_head(self)
    transducer, decoder = head == "transducer", head == "decoder"
    needs = {
      "model.joint_width": (transducer, "speech_head='transducer'"),
      "model.joint_chunk": (transducer, "speech_head='transducer'"),
      "beam.max_symbols": (transducer, "speech_head='transducer'"),
      "model.predictor": (transducer, "speech_head='transducer'"),
      "model.predictor_width": (transducer, "speech_head='transducer'"),
      "model.predictor_layers": (
        transducer and self.model.predictor == "lstm",
        "predictor='lstm'",
      ),
      "model.ctc_weight": (head != "ctc", "speech_head='transducer' or 'decoder'"),
    }
    if self.task in _SPEECH_TASKS:
      needs |= dict.fromkeys(_OF_DECODERS, (decoder, "speech_head='decoder'"))
    values, defaults = flatten(self), defaults_by_name()
    for name, (read, needed) in needs.items():
      if not read and values[name] != defaults[name]:
        raise ConfigError(f"config.{name} is not read without config.model.{needed}")


# Of a model of speech.
_OF_DECODERS = ("label_smoothing", "vocab_chunk", "model.encoder_layers", "model.tied_embeddings")
_OF_DECODERS += ("beam.length_penalty", "beam.penalty", "beam.min_length")
_OF_DECODERS += ("beam.max_ratio", "beam.max_extra")


def refuse_far_xpos(model: ModelConfig, length: int, name: str) -> None:
  """Raises where xPos's scales would overflow float32 at the last of as many positions."""
  longest = 70 * model.xpos_scale_base
  if model.positions == "xpos" and length > longest:
    raise ConfigError(
      f"config.model.xpos_scale_base={model.xpos_scale_base} serves {longest:.0f} positions, and"
      f" {name}={length}: xPos's scales would overflow"
    )


def speech_head(config: TrainConfig) -> str:
  """What a config's model of speech says with what it has heard: a translation's is a decoder."""
  return "decoder" if config.task == "speech_translation" else config.model.speech_head


def batch_ranges(text: str) -> tuple[tuple[int, int], ...]:
  """The ranges [a, b) of `skip_batches`, in their order; those that touch are one.

  Raises:
    ConfigError: if the text is something else.
  """
  merged: list[tuple[int, int]] = []
  found = re.fullmatch(r"(\d{1,12}:\d{1,12}(,|$))*", text.replace(" ", ""), re.ASCII)
  ranges = [tuple(map(int, part.split(":"))) for part in text.split(",") if part] if found else []
  if not found or any(begin >= end for begin, end in ranges):
    raise ConfigError(
      f"config.skip_batches={text!r} must be ranges of batches, from the first to before the last,"
      " e.g. 200:400,1000:1010"
    )
  for begin, end in sorted(ranges):
    if merged and begin <= merged[-1][1]:
      begin, end = merged[-1][0], max(end, merged.pop()[1])
    merged.append((begin, end))
  return tuple(merged)


# Fields that may differ when a run is resumed: how long it runs, how often it reports, and where
# files lie. Others change what is computed, if only by rounding.
RESUMABLE = (
  "steps",
  "eval_every",
  "eval_batches",
  "log_every",
  "checkpoint_every",
  "diagnostics_every",
  "keep_checkpoints",
  "keep_best",
  "max_skipped",
  "on_damage",
  "sample_prompt",
  "sample_tokens",
  "sample_temperature",
  "data.cache_dir",
  "data.data_dir",
  "data.workers",
  "data.prefetch",
  # Which documents are left out is compared with the data.
  "data.skip_bad",
  # Moved, perhaps; the texts themselves are compared.
  "data.train_files",
  "data.validation_files",
  "data.test_files",
  "data.text_source_files",
  "data.image_source_files",
  "data.tokenizer_file",
  # A run may go on on other machines: what is computed is the same up to the order of sums.
  "mesh.slices",
  "mesh.data",
  "mesh.fsdp",
  "mesh.sequence",
  "mesh.tensor",
  # Ranges may be added for batches to come, or with a rewind.
  "skip_batches",
  # When a run goes back; what it then leaves out is kept as `skip_batches`.
  "spike.factor",
  "spike.window",
  "spike.rewind_steps",
  "spike.skip_batches",
  "spike.limit",
  # How a trained model is used.
  "beam.size",
  "beam.length_penalty",
  "beam.penalty",
  "beam.min_length",
  "beam.max_ratio",
  "beam.max_extra",
  "beam.max_symbols",
  "beam.rows",
  "beam.judged",
)


def default_config() -> ml_collections.ConfigDict:
  """A locked ConfigDict of every field at its default: what a config file starts from.

  Sizes that follow from the width are left at 0, so that they follow from the one that is set.
  """
  return ml_collections.ConfigDict(_defaults(TrainConfig)).lock()


def config_of_variant(
  variants: Mapping[str, Callable[[ml_collections.ConfigDict], None]], variant: str, file: str
) -> ml_collections.ConfigDict:
  """The default config as a variant of a config file changes it: what its `get_config` returns."""
  if variant not in variants:
    raise ConfigError(f"{file} has no {variant!r}, only {', '.join(variants)}")
  config = default_config()
  variants[variant](config)
  return config


def _defaults(record_type: type) -> dict[str, Any]:
  """The fields' defaults as they stand, before any follows from another."""
  return {
    f.name: _defaults(f.type) if dataclasses.is_dataclass(f.type) else f.default
    for f in dataclasses.fields(record_type)
  }


def from_config_dict(config: ml_collections.ConfigDict | dict[str, Any]) -> TrainConfig:
  """The typed record of a config.

  Raises:
    ConfigError: an unknown field (the nearest one is named), a value of the wrong type, outside
      its range or not finite, or fields that do not go together.
  """
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  if not isinstance(config, dict):
    raise ConfigError(f"a config is a group of fields, not {config!r:.80}")
  return _typed(TrainConfig, config, "")


def differing_fields(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
  """The fields, by dotted name, in which a run may not differ from the one it resumes."""
  before, after = flatten(old), flatten(new)
  return {
    name: (before[name], after[name])
    for name in before
    if name not in RESUMABLE and before[name] != after[name]
  }


def flatten(record, prefix: str = "") -> dict[str, Any]:
  """{dotted name: value} of a record and the records in it."""
  flat = {}
  for field in dataclasses.fields(record):
    value = getattr(record, field.name)
    if dataclasses.is_dataclass(value):
      flat |= flatten(value, f"{prefix}{field.name}.")
    else:
      flat[prefix + field.name] = value
  return flat


def defaults_by_name(record_type: type = TrainConfig, prefix: str = "") -> dict[str, Any]:
  """{dotted name: default} of all fields, before any follows from another."""
  flat = {}
  for field in dataclasses.fields(record_type):
    if dataclasses.is_dataclass(field.type):
      flat |= defaults_by_name(field.type, f"{prefix}{field.name}.")
    else:
      flat[prefix + field.name] = field.default
  return flat


def field_names(record_type: type = TrainConfig, prefix: str = "") -> list[str]:
  """Dotted names of all fields."""
  names = []
  for field in dataclasses.fields(record_type):
    if dataclasses.is_dataclass(field.type):
      names += field_names(field.type, f"{prefix}{field.name}.")
    else:
      names.append(prefix + field.name)
  return names


def nearest_field(name: str) -> str | None:
  """The existing field that a misspelt dotted name most likely means."""
  names = field_names()
  # The right leaf in the wrong group (`model.steps`).
  misplaced = [full for full in names if full.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
  if misplaced:
    return difflib.get_close_matches(name, misplaced, n=1, cutoff=0.0)[0]
  # The start of a leaf (`clip`), where just one leaf starts so.
  started = [full for full in names if full.rsplit(".", 1)[-1].startswith(name)]
  if len(started) == 1:
    return started[0]
  if found := difflib.get_close_matches(name, names, n=1, cutoff=0.6):
    return found[0]
  # A misspelt leaf without its group (`lerning_rate`).
  leaves = {full.rsplit(".", 1)[-1]: full for full in names}
  found = difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.6)
  if not found:
    return next(iter(difflib.get_close_matches(name, _groups(), n=1)), None)
  return leaves[found[0]]


def unknown_field(name: str) -> ConfigError:
  """The error for a field that does not exist."""
  name = name[:80]  # A stranger's file may hold anything.
  nearest = nearest_field(name)
  hint = f"did you mean config.{nearest}?" if nearest else f"groups: {', '.join(_groups())}"
  return ConfigError(f"config.{name} does not exist; {hint}")


def _groups() -> list[str]:
  return [f.name for f in dataclasses.fields(TrainConfig) if dataclasses.is_dataclass(f.type)]


def _typed(record_type: type, values: dict[str, Any], prefix: str):
  fields = {field.name: field for field in dataclasses.fields(record_type)}
  for name in values:
    if name not in fields:
      raise unknown_field(prefix + name)
  typed = {}
  for name, value in values.items():
    field = fields[name]
    if dataclasses.is_dataclass(field.type):
      if not isinstance(value, dict):
        raise ConfigError(f"config.{prefix}{name} is a group of fields, not {value!r:.80}")
      value = _typed(field.type, value, f"{prefix}{name}.")
    typed[name] = value
  return record_type(**typed)


def _checked(field: dataclasses.Field, value, name: str):
  """The value as the field's type, if it lies within the field's bounds."""
  kind = field.type
  is_bool = isinstance(value, bool)
  if kind is float and isinstance(value, int) and not is_bool and abs(value) < 2**1023:
    value = float(value)
  if not isinstance(value, kind) or (kind is int and is_bool):
    # Shortened: a stranger's file may hold anything.
    raise ConfigError(f"config.{name}={value!r:.80} must be of type {kind.__name__}")
  bounds = field.metadata
  if kind is float and not math.isfinite(value):
    raise ConfigError(f"config.{name}={value} must be finite")
  if "choices" in bounds and value not in bounds["choices"]:
    near = difflib.get_close_matches(value[:80], bounds["choices"], n=1)
    hint = f"; did you mean {near[0]}?" if near else bounds.get("hint", "")
    choices = ", ".join(choice or "''" for choice in bounds["choices"])
    raise ConfigError(f"config.{name}={value!r:.80} must be one of {choices}{hint}")
  # As a device sees it, too, to which 1 - 1e-12 is 1 and 1e-50 is 0.
  with np.errstate(over="ignore"):
    seen = (value, float(np.float32(value))) if kind is float else (value,)
  wrong = [
    f"{word} {bounds[key]}"
    for key, word, fails in (
      ("min", "at least", lambda x, bound: x < bound),
      ("max", "at most", lambda x, bound: x > bound),
      ("above", "above", lambda x, bound: x <= bound),
      ("below", "below", lambda x, bound: x >= bound),
    )
    if key in bounds and any(fails(x, bounds[key]) for x in seen)
  ]
  if wrong:
    raise ConfigError(f"config.{name}={value!r:.40} must be {' and '.join(wrong)}")
  return value
