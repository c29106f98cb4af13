"""A model and its weights in a folder, without the run that made them.

<folder>/model.json         the model: its class, sizes and recipe
<folder>/model.safetensors  its parameters by their paths, and tensors kept for the way back; in its
                            metadata the same JSON, so that files of two models are told apart
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from magneto_jax.convert.files import ConversionError, read_state_dict, write_state_dict
from magneto_jax.data import files
from magneto_jax.models.backbone import Backbone
from magneto_jax.models.beit3 import BEiT3
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.encoder_decoder import EncoderDecoder
from magneto_jax.models.language import CausalLM, MaskedLM
from magneto_jax.models.vision import VisionEncoder
from magneto_jax.models.vision_language import (
  AnsweringBEiT3,
  CaptioningBEiT3,
  MaskedBEiT3,
  ReasoningBEiT3,
  RetrievalBEiT3,
)
from magneto_jax.theory import records

MODEL, WEIGHTS = "model.json", "model.safetensors"
MODELS = (
  *(AnsweringBEiT3, BEiT3, CaptioningBEiT3, CausalLM, Encoder, EncoderDecoder, MaskedBEiT3),
  *(MaskedLM, ReasoningBEiT3, RetrievalBEiT3, VisionEncoder),
)
_CLASSES = {cls.__name__: cls for cls in (*MODELS, *records.RECORDS)}
# Names of kept tensors begin with it; a parameter's path cannot.
_KEPT = "kept:"


def save(
  folder: str | pathlib.Path,
  model: nn.Module,
  variables: Mapping[str, Any],
  *,
  origin: Mapping[str, Any] = {},
  kept: Mapping[str, np.ndarray] = {},
) -> None:
  """Writes a model into a new or empty folder.

  Args:
    folder: made if it does not exist.
    model: one of MODELS.
    variables: its variables.
    origin: JSON-able values that say where the weights come from.
    kept: tensors that the model has no place for.
  """
  folder = pathlib.Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ConversionError(f"{folder} is not an empty folder: give another --output")
  description = {"model": _encoded(model), "origin": dict(origin)}
  text = json.dumps(description, indent=2)
  tensors = flat(variables) | {_KEPT + name: tensor for name, tensor in kept.items()}
  write_state_dict(folder / WEIGHTS, tensors, description)
  # Last: a folder without it holds no model.
  files.write_durably(folder / MODEL, text.encode())


def load(folder: str | pathlib.Path) -> tuple[nn.Module, dict[str, Any]]:
  """The model of a folder that `save` has written, and its variables."""
  model, variables, _, _ = read(folder)
  return model, variables


def read(folder: str | pathlib.Path):
  """(model, variables, origin, kept tensors); see `save`."""
  folder = pathlib.Path(folder)
  try:
    files.refuse_links_out(folder)
    description = files.read_json(folder / MODEL)
    model, origin = _decoded(description["model"]), description["origin"]
    if not isinstance(model, MODELS):
      raise TypeError(f"its model is a {type(model).__name__}")
  except FileNotFoundError:
    raise ConversionError(f"{folder} holds no converted model: {MODEL} is missing") from None
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise ConversionError(f"{folder / MODEL} is damaged: {error}") from None
  tensors, written_with = read_state_dict(folder / WEIGHTS, finite=False)
  if written_with != description:
    raise ConversionError(f"{folder / WEIGHTS} was not written with the {MODEL} beside it")
  kept = {
    name.removeprefix(_KEPT): tensors.pop(name) for name in list(tensors) if name.startswith(_KEPT)
  }
  paths = {tuple(name.split("/")): jnp.asarray(tensor) for name, tensor in tensors.items()}
  return model, {"params": traverse_util.unflatten_dict(paths)}, origin, kept


def flat(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The parameters by their paths, joined with slashes."""
  leaves = traverse_util.flatten_dict(variables["params"], sep="/")
  return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def holds_model(folder: str | pathlib.Path) -> bool:
  """Whether `load` reads this folder."""
  return (pathlib.Path(folder) / MODEL).exists()


def _encoded(value):
  """Modules and records as JSON: objects with their class; sets and dtypes likewise."""
  if type(value).__name__ in _CLASSES:
    names = [field.name for field in dataclasses.fields(value)]
    own = [name for name in names if name not in ("parent", "name")]
    return {"class": type(value).__name__} | {n: _encoded(getattr(value, n)) for n in own}
  if isinstance(value, frozenset):
    return {"class": "set", "items": sorted(value)}
  if isinstance(value, tuple):
    return [_encoded(item) for item in value]
  if value is None or isinstance(value, bool | int | float | str):
    return value
  if isinstance(value, np.dtype) or (isinstance(value, type) and value is not Any):
    return {"class": "dtype", "name": jnp.dtype(value).name}
  raise ConversionError(f"a model with {value!r} cannot be written")


def _decoded(value):
  if isinstance(value, list):
    return tuple(_decoded(item) for item in value)
  if not isinstance(value, dict):
    return value
  kind = value.get("class")
  if kind == "set":
    return frozenset(value["items"])
  if kind == "dtype":
    if not jnp.issubdtype(dtype := jnp.dtype(value["name"]), jnp.floating):
      raise ValueError(f"its dtype is {dtype}")
    return dtype
  if kind not in _CLASSES:
    raise ValueError(f"it has an unknown class {kind!r}")
  return _CLASSES[kind](**{k: _decoded(v) for k, v in value.items() if k != "class"})


def describe(model: nn.Module, variables: Mapping[str, Any]) -> str:
  """The model in a line."""
  count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
  inner = model
  while not isinstance(getattr(inner, "encoder", inner), Backbone):
    inner = inner.encoder
  stacks = {k: getattr(inner, k) for k in ("encoder", "decoder") if hasattr(inner, k)} or {
    "": inner
  }
  words = [
    f"{name} {stack.recipe.num_layers} layers, width {stack.width}, {stack.num_heads} heads, FFN"
    f" {stack.ffn_width}".strip()
    for name, stack in stacks.items()
  ]
  return f"{type(model).__name__}: {'; '.join(words)}; {count:,} parameters"
