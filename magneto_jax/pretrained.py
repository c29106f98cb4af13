"""What a run starts with, where that is not drawn: a pre-trained encoder, an image tokenizer."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from magneto_jax import runs, sharding
from magneto_jax.config import ConfigError, TrainConfig, config_errors, tasks_reading
from magneto_jax.convert import saved
from magneto_jax.convert.facts import facts
from magneto_jax.data import text
from magneto_jax.models.masked_image import TOKENIZER
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
}
_TOKENS = ("token_embedding", "embedding")
_POSITIONS = ("position_embedding", "embedding")


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
  `CausalLM`). Tables may be longer than the run's: of tokens by one row, which a masked model has
  for its mask behind the tokenizer's; of learned positions by any number. Then the first rows are
  taken, of positions those from the model's first one on.

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
    return inner if isinstance(inner, nn.Module) else self.model

  def facts(self) -> Facts:
    """None: the encoder's sizes are the config's."""
    return {}

  def in_words(self, program: Program) -> str:
    """Which part of the model starts with what."""
    return f"its {program.task.pretrained} starts with {self.folder}"

  def refuse_others(self, program: Program, tokenizer: Mapping[str, Any]) -> None:
    """Raises ConfigError, naming the field, unless the run's encoder computes what this one does.

    Args:
      program: the run's step.
      tokenizer: the identity of its tokenizer.
    """
    config, ours = program.config, getattr(program.model, program.task.pretrained)
    if self.tokenizer is not None and dict(self.tokenizer) != dict(tokenizer):
      raise ConfigError(
        f"config.data.tokenizer_file={config.data.tokenizer_file!r} is not the tokenizer of"
        f" init_from={self.folder}: leave it empty to have that"
      )
    theirs = self.encoder
    if getattr(theirs, "vocab_size", None) is None:
      raise ConfigError(f"the model of init_from={self.folder} has no encoder that reads tokens")
    own, other = facts(ours), facts(theirs)
    for name in own | other:
      mine, its = own.get(name), other.get(name)
      # Of tables see below; () and None: no experts, no window.
      if name in ("vocab_size", "max_length", "position_offset") or not (mine or its):
        continue
      if mine == its or _are_close(mine, its):
        continue
      what = "" if name in _FIELDS else f": its {name}"
      raise ConfigError(
        f"config.{_FIELDS.get(name, 'recipe')} does not agree with init_from={self.folder}{what}:"
        f" it must be {its!r:.80}, not {mine!r:.80}"
      )
    if theirs.vocab_size - ours.vocab_size not in (0, 1):
      raise ConfigError(
        f"the vocabulary of init_from={self.folder} has {theirs.vocab_size:,} tokens, and the run's"
        f" {ours.vocab_size:,}: set config.data.tokenizer_file to the model's own tokenizer"
      )
    if theirs.longest is not None and theirs.longest < ours.longest:
      raise ConfigError(
        f"config.data.seq_length={ours.longest} is more than the {theirs.longest} learned positions"
        f" of init_from={self.folder}"
      )
    if theirs.longest is None and getattr(theirs, "position_offset", 0) != ours.position_offset:
      raise ConfigError(f"the positions of init_from={self.folder} begin at another number")

  def into(self, state: TrainState, program: Program) -> TrainState:
    """The state with this model's encoder, laid out as it was; all else stays as it was drawn.

    Raises:
      ConfigError: the encoder has other parameters.
    """
    name = program.task.pretrained
    wanted = traverse_util.flatten_dict(dict(program.state.params[name]))
    prefix = () if self.encoder is self.model else ("encoder",)
    whole = sharding.replicated(program.mesh)

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
        mine = wanted.get(path[len(prefix) :]) if path[: len(prefix)] == prefix else None
        same = mine is not None and mine.shape == leaf.shape
        where = mine.sharding if same else whole
        placed[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
      return {"params": traverse_util.unflatten_dict(placed)}

    with config_errors():
      source = runs.load(self.folder, place=place).variables["params"]
    flat = traverse_util.flatten_dict(dict(source))
    taken = {path: flat[(*prefix, *path)] for path in wanted}
    shapes = {path: leaf.shape for path, leaf in wanted.items()}
    first = getattr(self.encoder, "position_offset", 0)

    def cut(arrays):
      begin = {_POSITIONS: first}
      rows = lambda path: slice(begin.get(path, 0), begin.get(path, 0) + shapes[path][0])
      return {
        path: array[rows(path)] if path in (_TOKENS, _POSITIONS) else array
        for path, array in arrays.items()
      }

    for path, leaf in jax.eval_shape(cut, taken).items():
      if leaf.shape != shapes[path]:
        raise ConfigError(
          f"config.recipe does not agree with init_from={self.folder}: {'/'.join(path)} is"
          f" {list(leaf.shape)} there, and {list(shapes[path])} here"
        )
    places = {path: leaf.sharding for path, leaf in wanted.items()}
    params = {
      **state.params,
      name: traverse_util.unflatten_dict(jax.jit(cut, out_shardings=places)(taken)),
    }
    if state.ema_params is None:
      return dataclasses.replace(state, params=params)
    # As in `program.init_state`: one buffer cannot be donated twice.
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    return dataclasses.replace(state, params=params, ema_params=copy(params))


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
    """Raises ConfigError, naming the field, unless images, patches and tokens are the run's."""
    own, other = program.config.model, self.record.config.model
    for name in ("image_size", "patch_size", "image_vocab_size"):
      mine, its = getattr(own, name), getattr(other, name)
      if mine != its:
        raise ConfigError(
          f"config.model.{name} does not agree with image_tokenizer={self.folder}: it must be"
          f" {its}, not {mine}"
        )

  def into(self, state: TrainState, program: Program) -> TrainState:
    """The state with the tokenizer's variables; of a run with `ema`, those of its average."""
    wanted = program.state.variables[TOKENIZER]

    def place(abstract):
      put = lambda leaf, mine: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=mine.sharding)
      return jax.tree.map(put, dict(abstract), dict(wanted))

    with config_errors():
      found = runs.load(self.folder, place=place).variables
    return dataclasses.replace(state, variables={**state.variables, TOKENIZER: found})


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
  """The run that `image_tokenizer` names."""
  folder, record = config.image_tokenizer, None
  if folder:
    record = runs.read_record(folder)
  if record is None or not runs.last_step(folder):
    raise ConfigError(
      f"image_tokenizer={folder!r} holds no run with a checkpoint, and config.task={config.task!r}"
      " learns an image tokenizer's tokens: train one with configs/image_tokenizer.py, and give its"
      " workdir"
    )
  if record.config.task != "image_tokenizer":
    raise ConfigError(
      f"image_tokenizer={folder} holds a run of task {record.config.task!r}: give the workdir of"
      " one of task 'image_tokenizer'"
    )
  return ImageTokenizer(folder, record)


def _encoder(config: TrainConfig) -> Start:
  """The model that `init_from` names.

  Raises:
    ConfigError: there is none, or its tokens are of another kind.
  """
  folder, data = config.init_from, config.data
  if saved.holds_model(folder):
    with config_errors():
      return Start(folder, runs.load(folder).model, None, "")
  record = runs.read_record(folder)
  if record is None or not runs.last_step(folder):
    raise ConfigError(
      f"init_from={folder} holds neither a run with a checkpoint nor a converted model: give the"
      " workdir of one, or leave it empty"
    )
  if record.config.data.tokenizer != data.tokenizer:
    raise ConfigError(
      f"config.data.tokenizer={data.tokenizer!r} is not that of init_from={folder}: set"
      f" data.tokenizer={record.config.data.tokenizer!r}"
    )
  kept = ""
  if data.tokenizer != "byte":
    kept = data.tokenizer_file or str(pathlib.Path(runs.data_in(folder)) / text.TOKENIZER_FILE)
  with config_errors():
    model = runs.model_of(record)
  return Start(folder, model, record.data.get("tokenizer"), kept)
