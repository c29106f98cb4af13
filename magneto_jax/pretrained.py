"""What a run starts with, where that is not drawn: a pre-trained encoder, an image tokenizer."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from scipy import interpolate, optimize

from magneto_jax import distributed, runs, sharding
from magneto_jax.config import ConfigError, TrainConfig, config_errors, flatten, tasks_reading
from magneto_jax.convert import saved
from magneto_jax.convert.facts import facts
from magneto_jax.data import text
from magneto_jax.layers.patches import resized_positions
from magneto_jax.models.backbone import Backbone
from magneto_jax.models.beit3 import BEiT3
from magneto_jax.models.image_tokenizer import TOKENIZER
from magneto_jax.models.speech import SpeechEncoder
from magneto_jax.models.vision import VisionEncoder
from magneto_jax.models.vision_language import ReasoningBEiT3
from magneto_jax.program import Program, TrainState
from magneto_jax.tasks.task import Facts

# Of a model's facts: the config's field that decides them. All others are of the recipe.
_FIELDS = {
  "layers": "model.layers",
  "width": "model.width",
  "ffn_width": "model.ffn_width",
  "num_heads": "model.heads",
  "num_kv_heads": "model.kv_heads",
  "head_dim": "model.head_dim",
  "norm": "model.norm",
  "activation": "model.activation",
  "positions": "model.positions",
  "xpos_scale_base": "model.xpos_scale_base",
  "relative_buckets": "model.relative_buckets",
  "relative_max_distance": "model.relative_max_distance",
  "relative_bidirectional": "model.relative_buckets",
  "use_bias": "model.use_bias",
  "window": "model.window",
  "logits_soft_cap": "model.logits_soft_cap",
  "shared_attention": "model.shared_attention",
  "fusion_layers": "model.fusion_layers",
}
_TOKENS = ("token_embedding", "embedding")
_POSITIONS = ("position_embedding", "embedding")
_INNER_POSITIONS = ("encoder", *_POSITIONS)
_PATCH_BIASES = ("patch_relative_bias",)
# Of encoders of images and texts.
_TEXT_TOKENS = ("text_embedding", "embedding")
_TEXT_POSITIONS = ("position_embeddings_text", "embedding")
_VISION_POSITIONS = ("position_embeddings_vision", "embedding")
# Rows of the released BEiT-3's table of tokens behind those of its tokenizer.
_SPARE_ROWS = 8
# Of encoders of sounds: the config's field that decides what two must have in common.
_OF_SOUNDS = {
  "data.sample_rate": "sample_rate",
  "model.mel_bins": "mel_bins",
  "model.front_end": "subsampling",
}
# What an image tokenizer and what learns its tokens read alike.
_OF_IMAGES = ("model.image_size", "model.patch_size", "model.image_vocab_size")
_OF_IMAGES += ("data.normalization",)


class Source(Protocol):
  """What a fresh run is given of another one.

  Attributes:
    folder: the other run's workdir, or a converted model's folder.
    tokenizer_file: the tokenizer of texts that the run is given; empty for the config's own.
  """

  folder: str
  tokenizer_file: str

  def facts(self) -> Facts:
    """What the run's model must know of it, beside what its data say."""

  def refuse_others(self, program: Program, tokenizer: Mapping[str, Any]) -> None:
    """Raises ConfigError, naming the field, unless it fits the run.

    Args:
      program: the run's step.
      tokenizer: the identity of its tokenizer of texts.
    """

  def into(self, state: TrainState, program: Program) -> TrainState:
    """The state with what is taken, laid out as it was; all else stays as it was drawn."""

  def in_words(self, program: Program) -> str:
    """What is taken."""


class Start(NamedTuple):
  """A pre-trained model that a run starts with.

  Its encoder is its module `encoder`, or itself, where it is one stack (an `Encoder`, a
  `CausalLM`), a `VisionEncoder` or a `BEiT3`. Of texts, tables may be longer than the run's: of
  tokens by one row, which a masked model has for its mask behind the tokenizer's (by a few, of a
  converted BEiT-3); of learned positions, as of sounds, by any number. Then the first rows are
  taken, of positions those from the model's first one on. Of images, tables may be of another grid
  of patches: then they are interpolated (`resized_positions`, `resized_biases`), and what they hold
  of a class token is left out where the run has none. Where both models read images and texts for
  the same task, the heads' arrays of the same name and shape are taken, too (`heads`).

  Attributes:
    folder: the run's workdir, or a converted model's folder.
    model: its module.
    tokenizer: the identity of the run's tokenizer; None for a converted model.
    tokenizer_file: the tokenizer that the run is given; empty for the config's own.
  """

  folder: str
  model: nn.Module
  tokenizer: Mapping[str, Any] | None
  tokenizer_file: str

  @property
  def encoder(self) -> nn.Module:
    """The module whose weights are taken."""
    inner = getattr(self.model, "encoder", None)
    is_whole = isinstance(self.model, VisionEncoder | BEiT3) or not isinstance(inner, nn.Module)
    return self.model if is_whole else inner

  def facts(self) -> Facts:
    """None: the encoder's sizes are the config's."""
    return {}

  def in_words(self, program: Program) -> str:
    """Which parts of the model start with what, and of models of images and texts the others."""
    said = f"its {program.task.pretrained} starts with {self.folder}"
    if not isinstance(self.encoder, BEiT3):
      return said
    taken = dict.fromkeys(path[0] for path in self.heads(program))
    drawn = [name for name in program.state.params if name not in {program.task.pretrained, *taken}]
    said += f", and so do {', '.join(taken)}" if taken else ""
    return said + (f"; drawn are {', '.join(drawn)}" if drawn else "")

  def heads(self, program: Program) -> list[tuple[str, ...]]:
    """The paths of a head's arrays that are taken as they are.

    They are those of the same name and shape, where both are models of images and texts for the
    same task. What an answer's number means is taken to be the same where there are as many.
    """
    if not isinstance(self.encoder, BEiT3) or type(self.model) is not type(program.model):
      return []
    side = self.encoder.patch_size * math.isqrt(self.encoder.num_patches)
    image = jnp.zeros((1, *[2] * isinstance(self.model, ReasoningBEiT3), side, side, 3))
    tokens_BT = jnp.zeros((1, self.encoder.max_text_length), jnp.int32)
    theirs = jax.eval_shape(self.model.init, jax.random.key(0), image, tokens_BT)["params"]
    theirs = traverse_util.flatten_dict(dict(theirs))
    ours = traverse_util.flatten_dict(dict(program.state.params))
    return [
      path
      for path, leaf in ours.items()
      if path[0] != program.task.pretrained and path in theirs and theirs[path].shape == leaf.shape
    ]

  def refuse_others(self, program: Program, tokenizer: Mapping[str, Any]) -> None:
    """Raises ConfigError, naming the field, unless the run's encoder computes what this one does.

    Args:
      program: the run's step.
      tokenizer: the identity of its tokenizer; nothing where it reads images.
    """
    config, ours = program.config, getattr(program.model, program.task.pretrained)
    if isinstance(ours, VisionEncoder):
      self._refuse_other_patches(config, ours)
      return
    if isinstance(ours, SpeechEncoder):
      self._refuse_other_sounds(config, ours)
      return
    if isinstance(ours, BEiT3) and not isinstance(self.encoder, BEiT3):
      raise ConfigError(
        f"the model of init_from={self.folder} has no encoder that reads images and texts"
      )
    if self.tokenizer is not None and dict(self.tokenizer) != dict(tokenizer):
      raise ConfigError(
        f"config.data.tokenizer_file={config.data.tokenizer_file!r} is not the tokenizer of"
        f" init_from={self.folder}: leave it empty to have that"
      )
    if isinstance(ours, BEiT3):
      self._refuse_other_pairs(config, ours)
      return
    theirs = self.encoder
    if not isinstance(theirs, Backbone) or theirs.vocab_size is None:
      raise ConfigError(f"the model of init_from={self.folder} has no encoder that reads tokens")
    self._refuse_another_stack(ours, theirs)
    self._refuse_another_vocabulary(ours.vocab_size, theirs.vocab_size, 1)
    if theirs.longest is not None and theirs.longest < ours.longest:
      raise ConfigError(
        f"config.data.seq_length={ours.longest} is more than the {theirs.longest} learned positions"
        f" of init_from={self.folder}"
      )

  def _refuse_another_vocabulary(self, own: int, other: int, spare: int) -> None:
    """The same of the numbers of tokens, of which the other may have a few more."""
    if not 0 <= other - own <= spare:
      raise ConfigError(
        f"the vocabulary of init_from={self.folder} has {other:,} tokens, and the run's {own:,}:"
        " set config.data.tokenizer_file to the model's own tokenizer"
      )

  def _refuse_other_pairs(self, config: TrainConfig, ours: BEiT3) -> None:
    """The same of two encoders of images and texts, whose grids may differ."""
    theirs = self.encoder
    if ours.patch_size != theirs.patch_size:
      raise ConfigError(
        f"config.model.patch_size does not agree with init_from={self.folder}: it must be"
        f" {theirs.patch_size}, not {ours.patch_size}"
      )
    self._refuse_another_stack(ours.encoder, theirs.encoder)
    if ours.encoder.recipe.final_norm and not theirs.encoder.recipe.final_norm:
      raise ConfigError(
        f"the encoder of init_from={self.folder} has no norm behind its last layer (final_norm), as"
        f" those of visual_question_answering, and config.task={config.task!r} has one: start with"
        " a run of masked_data or of another task of images and texts"
      )
    is_scaled = float(ours.encoder.recipe.embedding.scale) != 1
    if is_scaled and ours.scale_patches != theirs.scale_patches:
      raise ConfigError(
        f"config.recipe does not agree with init_from={self.folder}: its patches are scaled as its"
        " tokens are"
      )
    # A run's has at most the mask behind its tokenizer's.
    spare = 1 if self.tokenizer is not None else _SPARE_ROWS
    self._refuse_another_vocabulary(ours.vocab_size, theirs.vocab_size, spare)
    if theirs.max_text_length < ours.max_text_length:
      raise ConfigError(
        f"config.data.seq_length={ours.max_text_length} is more than the {theirs.max_text_length}"
        f" learned positions of init_from={self.folder}"
      )

  def _refuse_another_stack(self, ours: Backbone, theirs: Backbone) -> None:
    """The same of two stacks, whatever the sizes of their tables."""
    own, other = facts(ours), facts(theirs)
    for name in own | other:
      mine, its = own.get(name), other.get(name)
      # () and None: no experts, no window.
      if name in ("vocab_size", "max_length", "position_offset") or not (mine or its):
        continue
      if mine == its or _are_close(mine, its):
        continue
      what = "" if name in _FIELDS else f": its {name}"
      raise ConfigError(
        f"config.{_FIELDS.get(name, 'recipe')} does not agree with init_from={self.folder}{what}:"
        f" it must be {its!r:.80}, not {mine!r:.80}"
      )
    # All other kinds go by tables, whose rows are chosen, or by distances.
    of_numbers = "sinusoidal" in theirs.position_kinds
    if of_numbers and theirs.position_offset != ours.position_offset:
      raise ConfigError(f"the positions of init_from={self.folder} begin at another number")

  def _refuse_other_patches(self, config: TrainConfig, ours: VisionEncoder) -> None:
    """The same of two encoders of images, whose grids may differ."""
    theirs = self.encoder
    if not isinstance(theirs, VisionEncoder):
      raise ConfigError(f"the model of init_from={self.folder} has no encoder that reads images")
    wanted = {
      "patch_size": (ours.patch_size, theirs.patch_size),
      "relative_patches": (ours.relative_grid is not None, theirs.relative_grid is not None),
    }
    for name, (mine, its) in wanted.items():
      if mine != its:
        raise ConfigError(
          f"config.model.{name} does not agree with init_from={self.folder}: it must be {its}, not"
          f" {mine}"
        )
    if ours.class_token and not theirs.class_token:
      raise ConfigError(
        f"config.model.pooling={config.model.pooling!r} reads a class token, which"
        f" init_from={self.folder} has not: set model.pooling='mean'"
      )
    self._refuse_another_stack(ours.encoder, theirs.encoder)

  def _refuse_other_sounds(self, config: TrainConfig, ours: SpeechEncoder) -> None:
    """The same of two encoders of sounds, of which one may have learned longer ones."""
    theirs = self.encoder
    if not isinstance(theirs, SpeechEncoder):
      raise ConfigError(f"the model of init_from={self.folder} has no encoder that reads sounds")
    for field, name in _OF_SOUNDS.items():
      mine, its = getattr(ours, name), getattr(theirs, name)
      if mine != its:
        raise ConfigError(
          f"config.{field} does not agree with init_from={self.folder}: it must be {its!r}, not"
          f" {mine!r}"
        )
    self._refuse_another_stack(ours.encoder, theirs.encoder)
    longest = theirs.encoder.longest
    if longest is not None and longest < ours.encoder.longest:
      raise ConfigError(
        f"config.data.max_seconds={config.data.max_seconds:g} makes {ours.encoder.longest} vectors,"
        f" more than the {longest} learned positions of init_from={self.folder}"
      )

  def _on_our_grid(self, ours: VisionEncoder, taken: Mapping[tuple, jax.Array]) -> dict:
    """Of an encoder's arrays those that go by the grid of patches, for the run's grid."""
    theirs, found = self.encoder, {}
    if _INNER_POSITIONS not in taken and _PATCH_BIASES not in taken:
      return found
    old, new = map(self._grid, (theirs, ours))
    if _INNER_POSITIONS in taken:
      table = np.asarray(taken[_INNER_POSITIONS])[theirs.encoder.position_offset :]
      patches = resized_positions(table[int(theirs.class_token) :], old, new)
      found[_INNER_POSITIONS] = np.concatenate([table[: int(ours.class_token)], patches])
    if _PATCH_BIASES in taken:
      table, offsets = np.asarray(taken[_PATCH_BIASES]), math.prod(2 * side - 1 for side in old)
      of_class = table[offsets : offsets + 3 * ours.class_token]
      found[_PATCH_BIASES] = np.concatenate([resized_biases(table[:offsets], old, new), of_class])
    return found

  def _on_our_patches(self, ours: BEiT3, table_RD: np.ndarray) -> np.ndarray:
    """The table of an image's positions, for the run's grid of patches."""
    theirs = self.encoder
    first = theirs.position_offset + 1
    patches = table_RD[first:]
    if ours.num_patches != theirs.num_patches:
      old, new = (self._square(model.num_patches) for model in (theirs, ours))
      patches = resized_positions(patches, old, new)
    return np.concatenate([table_RD[first - 1 - ours.position_offset : first], patches])

  def _grid(self, vision: VisionEncoder) -> tuple[int, int]:
    """Patches on an image's sides, by the sizes of the tables that go by them."""
    if vision.relative_grid is not None:
      return vision.relative_grid
    return self._square(vision.encoder.max_length - vision.class_token)

  def _square(self, patches: int) -> tuple[int, int]:
    """The sides of a square of patches."""
    side = math.isqrt(patches)
    if side * side != patches:
      raise ConfigError(
        f"the {patches} learned positions of init_from={self.folder} are no square of patches, and"
        " cannot be interpolated"
      )
    return side, side

  def into(self, state: TrainState, program: Program) -> TrainState:
    """The state with this model's encoder and `heads`, laid out as it was; all else is as drawn.

    Raises:
      ConfigError: the encoder has other parameters.
    """
    name = program.task.pretrained
    wanted = traverse_util.flatten_dict(dict(program.state.params[name]))
    prefix = () if self.encoder is self.model else ("encoder",)
    whole = sharding.replicated(program.mesh)
    drawn = traverse_util.flatten_dict(dict(state.params))
    heads = {path: drawn[path] for path in self.heads(program)}

    def place(abstract):
      """Where a source's arrays are read to: to their place, where the run has such an array.

      What it keeps beside its parameters is not read.
      """
      flat = traverse_util.flatten_dict(dict(abstract["params"]))
      held = {path[len(prefix) :]: path for path in flat if path[: len(prefix)] == prefix}
      if missing := sorted("/".join(path) for path in wanted.keys() - held.keys()):
        raise ConfigError(
          f"config.recipe does not agree with init_from={self.folder}, whose encoder has no"
          f" {missing[0]}"
        )
      placed = {}
      for path, leaf in flat.items():
        own = path[len(prefix) :]
        mine = wanted.get(own) if path[: len(prefix)] == prefix else None
        mine = heads.get(path, mine)
        same = mine is not None and mine.shape == leaf.shape
        # Every host interpolates these, or finds that they stay.
        same = same and own not in (_INNER_POSITIONS, _PATCH_BIASES, _VISION_POSITIONS)
        where = mine.sharding if same else whole
        placed[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
      return {"params": traverse_util.unflatten_dict(placed)}

    source = _load(self.folder, place)["params"]
    flat = traverse_util.flatten_dict(dict(source))
    taken = {path: flat[(*prefix, *path)] for path in wanted}
    if isinstance(ours := getattr(program.model, name), VisionEncoder):
      taken |= self._on_our_grid(ours, taken)
    if isinstance(ours, BEiT3):
      table = np.asarray(taken[_VISION_POSITIONS])
      taken[_VISION_POSITIONS] = self._on_our_patches(ours, table)
    shapes = {path: leaf.shape for path, leaf in wanted.items()}
    begin = {_TOKENS: 0, _POSITIONS: getattr(self.encoder, "position_offset", 0)}
    if isinstance(ours, SpeechEncoder):
      begin = {_INNER_POSITIONS: self.encoder.encoder.position_offset}
    if isinstance(ours, BEiT3):
      first = self.encoder.position_offset - ours.position_offset
      begin = {_TEXT_TOKENS: 0, _TEXT_POSITIONS: first}

    def cut(arrays):
      rows = lambda path: slice(begin[path], begin[path] + shapes[path][0])
      return {path: array[rows(path)] if path in begin else array for path, array in arrays.items()}

    for path, leaf in jax.eval_shape(cut, taken).items():
      if leaf.shape != shapes[path]:
        raise ConfigError(
          f"config.recipe does not agree with init_from={self.folder}: {'/'.join(path)} is"
          f" {list(leaf.shape)} there, and {list(shapes[path])} here"
        )
    places = {path: leaf.sharding for path, leaf in wanted.items()}
    params = {
      **traverse_util.unflatten_dict(drawn | {path: flat[path] for path in heads}),
      name: traverse_util.unflatten_dict(jax.jit(cut, out_shardings=places)(taken)),
    }
    if state.ema_params is None:
      return dataclasses.replace(state, params=params)
    # As in `program.init_state`: one buffer cannot be donated twice.
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    return dataclasses.replace(state, params=params, ema_params=copy(params))


def resized_biases(table_RN: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
  """A table of relative position biases of patches for another grid of them, as in BEiT.

  What was of an offset of k patches along a side of h is taken to be of 1 + q + ... + q^(k - 1),
  with q so that the farthest of the old grid, h - 1, becomes the farthest of the new one: near
  offsets stay what they were, and far ones are spread. Between them lies a cubic spline of both
  dimensions. Of a smaller grid all offsets are among the old ones, and stay what they were.

  Args:
    table_RN: [(2h - 1)(2w - 1), N] without a class token's rows; see `vision.relative_rows`.
    old, new: (h, w), patches on an image's sides.

  Raises:
    ConfigError: the old grid is one patch wide, so that it tells of no distance.

  Reference: BEiT, arXiv 2106.08254, its released code.
  """
  if tuple(old) == tuple(new):
    return table_RN
  if min(old) < 2:
    raise ConfigError(f"biases of {old} patches cannot be interpolated to {new}: sides need two")
  down, right = (_spread(h, to) for h, to in zip(old, new, strict=True))
  degrees = {"kx": min(3, len(down) - 1), "ky": min(3, len(right) - 1)}
  wanted = [np.arange(1 - to, to) for to in new]
  tables = table_RN.T.astype(np.float64).reshape(-1, len(down), len(right))
  splines = (interpolate.RectBivariateSpline(down, right, x, **degrees) for x in tables)
  resized = np.stack([spline(*wanted) for spline in splines], axis=-1)
  return resized.reshape(-1, resized.shape[-1]).astype(table_RN.dtype)


def _spread(old: int, new: int) -> np.ndarray:
  """Where the offsets 1 - old .. old - 1 come to lie in a grid whose farthest is new - 1."""
  if new <= old:
    return np.arange(1.0 - old, old)
  if old == 2:  # Only one distance, which is the farthest.
    steps = np.array([new - 1.0])
  else:
    excess = lambda q: np.polyval(np.ones(old - 1), q) - (new - 1)
    steps = np.cumsum(optimize.brentq(excess, 1, new, xtol=1e-12) ** np.arange(old - 1))
  return np.concatenate([-steps[::-1], [0], steps])


def _are_close(one, other) -> bool:
  floats = isinstance(one, float) and isinstance(other, float)
  return floats and math.isclose(one, other, rel_tol=1e-6)


class ImageTokenizer(NamedTuple):
  """A trained image tokenizer, which a masked image model holds and does not change.

  Attributes:
    folder: the workdir of its run.
    record: of that run.
  """

  folder: str
  record: runs.Record
  tokenizer_file: str = ""

  def facts(self) -> Facts:
    """Its config and facts, so that the run's own record says all of its model."""
    record = runs.as_json(self.record)
    return {TOKENIZER: {name: record[name] for name in ("config", "facts")}}

  def in_words(self, program: Program) -> str:
    """Whose tokens are learnt."""
    return f"its targets are the tokens of {self.folder}"

  def refuse_others(self, program: Program, tokenizer: Mapping[str, Any]) -> None:
    """None: `find` has held the configs against each other, before anything is compiled."""

  def into(self, state: TrainState, program: Program) -> TrainState:
    """The state with the tokenizer's variables; of a run with `ema`, those of its average."""
    wanted = program.state.variables[TOKENIZER]

    def place(abstract):
      put = lambda leaf, mine: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=mine.sharding)
      return jax.tree.map(put, dict(abstract), dict(wanted))

    found = _load(self.folder, place)
    return dataclasses.replace(state, variables={**state.variables, TOKENIZER: found})


def _load(folder: str, place) -> Mapping[str, Any]:
  """The variables of a run's newest checkpoint, or of a converted model; see `runs.load`.

  Raises:
    ConfigError: it cannot be read, or is not the same on all processes, as where one sees a
      checkpoint that another does not see yet.
  """
  step = None if saved.holds_model(folder) else runs.last_step(folder)
  with config_errors():
    distributed.agree(f"the newest checkpoint of {folder}", step)
    return runs.load(folder, step=step, place=place).variables


def find(config: TrainConfig) -> Source | None:
  """What a fresh run of the config starts with; None if it draws all.

  Raises:
    ConfigError: there is no such model, or one of another kind, or none is named where one is
      needed.
  """
  if config.task in (tasks_reading("image_tokenizer") or ()):
    return _image_tokenizer(config)
  return _encoder(config) if config.init_from else None


def _image_tokenizer(config: TrainConfig) -> ImageTokenizer:
  """The run that `image_tokenizer` names; its images, patches and tokens are the config's."""
  folder, record = config.image_tokenizer, None
  if folder:
    record = runs.read_record(folder)
  if record is None or not runs.last_step(folder):
    raise ConfigError(
      f"image_tokenizer={folder!r} holds no run with a checkpoint, and config.task={config.task!r}"
      " learns an image tokenizer's tokens: train one, as with"
      f" --config=configs/image_tokenizer.py:{_tokenizer_of(config)} --workdir=runs/tokens, whose"
      f" images, patches and codes have to be of the same sizes ({_sizes_of(config)}), and give"
      " --config.image_tokenizer=runs/tokens"
    )
  if record.config.task != "image_tokenizer":
    raise ConfigError(
      f"image_tokenizer={folder} holds a run of task {record.config.task!r}: give the workdir of"
      " one of task 'image_tokenizer'"
    )
  own, other = flatten(config), flatten(record.config)
  for name in _OF_IMAGES:
    if own[name] != other[name]:
      raise ConfigError(
        f"config.{name} does not agree with image_tokenizer={folder}: it must be {other[name]!r},"
        f" not {own[name]!r}"
      )
  return ImageTokenizer(folder, record)


def _sizes_of(config: TrainConfig) -> str:
  """What a run's image tokenizer has to agree on."""
  own = flatten(config)
  return ", ".join(f"{name}={own[name]}" for name in _OF_IMAGES)


def _tokenizer_of(config: TrainConfig) -> str:
  """The variant of configs/image_tokenizer.py that is of a config's images, or the nearest one."""
  images = config.data.image_source or config.data.name
  shipped = {"embedded/mnist5k": "mnist", "embedded/emoji": "emoji"}
  return next((own for name, own in shipped.items() if images.startswith(name)), "base")


def _encoder(config: TrainConfig) -> Start:
  """The model that `init_from` names.

  Raises:
    ConfigError: there is none, or its tokens are of another kind.
  """
  folder, data = config.init_from, config.data
  if saved.holds_model(folder):
    with config_errors():
      start = Start(folder, runs.load(folder).model, None, "")
    _refuse_other_inputs(config, start)
    return start
  record = runs.read_record(folder)
  if record is None or not runs.last_step(folder):
    raise ConfigError(
      f"init_from={folder} holds neither a run with a checkpoint nor a converted model: give the"
      " workdir of one, or leave it empty"
    )
  if config.task in (tasks_reading("data.sample_rate") or ()):
    # Whatever the texts are: the encoder reads none.
    with config_errors():
      return Start(folder, runs.model_of(record), None, "")
  if config.task not in (tasks_reading("data.tokenizer") or (config.task,)):
    _refuse_other_pixels(folder, record.config.data.normalization, data.normalization)
    with config_errors():
      return Start(folder, runs.model_of(record), None, "")
  if record.config.data.tokenizer != data.tokenizer:
    raise ConfigError(
      f"config.data.tokenizer={data.tokenizer!r} is not that of init_from={folder}: set"
      f" data.tokenizer={record.config.data.tokenizer!r}"
    )
  if config.task in (tasks_reading("data.normalization") or ()):
    _refuse_other_pixels(folder, record.config.data.normalization, data.normalization)
  kept = ""
  if data.tokenizer in text.KEPT:
    own = pathlib.Path(runs.data_in(folder)) / text.KEPT[data.tokenizer].file
    kept = data.tokenizer_file or str(own)
  with config_errors():
    model = runs.model_of(record)
  return Start(folder, model, record.data.get("tokenizer"), kept)


def _refuse_other_inputs(config: TrainConfig, start: Start) -> None:
  """Raises ConfigError unless a run reads images and texts as a converted model has.

  All models of images that are converted are BEiT-3's.
  """
  data = config.data
  if config.task in (tasks_reading("data.normalization") or ()):
    _refuse_other_pixels(start.folder, "half", data.normalization)
  reads_both = config.task in (tasks_reading("model.fusion_layers") or ())
  if reads_both and isinstance(start.encoder, BEiT3) and data.tokenizer != "xlmr":
    raise ConfigError(
      f"config.data.tokenizer={data.tokenizer!r} has other tokens than the converted BEiT-3 of"
      f" init_from={start.folder}: set data.tokenizer='xlmr', and data.tokenizer_file to the"
      " beit3.spm that is released beside it"
    )


def _refuse_other_pixels(folder: str, theirs: str, ours: str) -> None:
  """Raises ConfigError unless pixels are scaled as those that the encoder has read."""
  if theirs != ours:
    raise ConfigError(
      f"config.data.normalization={ours!r} is not that of init_from={folder}: set"
      f" data.normalization={theirs!r}"
    )
