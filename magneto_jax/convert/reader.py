"""A checkpoint under question: what its tensors show, and what its configuration must say."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from magneto_jax.convert.files import ConversionError


class Reader:
  """A state dict and its configuration, asked for one fact after the other.

  Neither is trusted: every answer is of the type and the rank that was asked for, or an error.
  Entries of the configuration that are None count as absent, as argparse leaves them.

  Attributes:
    tensors: arrays by their names.
    config: the configuration.
  """

  def __init__(self, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]):
    self.tensors = tensors
    self.config = {key: value for key, value in config.items() if value is not None}

  def has(self, name: str) -> bool:
    return name in self.tensors

  def holds(self, prefix: str, part: str = "") -> bool:
    """Whether any name begins so, and has this part."""
    return any(name.startswith(prefix) and part in name for name in self.tensors)

  def shape(self, name: str, rank: int = 2) -> tuple[int, ...]:
    """The shape of a tensor that must be there."""
    if name not in self.tensors:
      raise ConversionError(f"missing: {name}: is this a whole checkpoint, and of this library?")
    shape = self.tensors[name].shape
    if len(shape) != rank or 0 in shape:
      raise ConversionError(f"wrong shape: {name} {list(shape)}, expected {rank} axes")
    return shape

  def positions(self, name: str, before: int) -> int:
    """How many positions a table has behind its first rows, `before`, which are none."""
    rows = self.shape(name)[0]
    if rows <= before:
      raise ConversionError(f"wrong shape: {name} has {rows} rows, expected more than {before}")
    return rows - before

  def depth(self, prefix: str) -> int:
    """How many layers there are of those named `<prefix>layers.<number>.`, without a gap."""
    pattern = re.compile(re.escape(prefix) + r"layers\.([0-9]{1,6})\.")
    layers = {int(match[1]) for match in map(pattern.match, self.tensors) if match}
    gap = next((layer for layer in range(len(layers)) if layer not in layers), None)
    if gap is not None:
      raise ConversionError(f"missing: {prefix}layers.{gap}.*, but there are layers beyond it")
    return len(layers)

  def get(self, key: str, default):
    """An entry of the configuration, of the type of its default."""
    value = self.config.get(key, default)
    kinds = (int, float) if isinstance(default, float) else type(default)
    is_bool = isinstance(default, bool)
    if not isinstance(value, kinds) or isinstance(value, bool) != is_bool:
      raise ConversionError(f"{key}={value!r} must be of the type of {default!r}")
    if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
      raise ConversionError(f"{key}={value!r} must be finite and not negative")
    return value

  def need(self, key: str, like, why: str):
    """An entry that must be given, of the type of `like`."""
    if key not in self.config:
      raise ConversionError(f"the configuration must give {key}: {why}")
    return self.get(key, like)

  def choice(self, key: str, choices: Collection[str], default: str | None = None) -> str:
    """An entry that must be one of `choices`; without a default it must be given."""
    names = ", ".join(choices)
    value = self.need(key, "", f"one of {names}") if default is None else self.get(key, default)
    if value not in choices:
      raise ConversionError(f"{key}={value!r} must be one of {names}")
    return value

  def agreed(self, key: str, value):
    """What the tensors show; the configuration must agree where it speaks of it."""
    if self.config.get(key, value) != value:
      raise ConversionError(
        f"{key} is {self.config[key]!r} in the configuration and {value!r} in the tensors"
      )
    return value

  def heads(self, key: str, width: int, shown: int | None) -> int:
    """The number of heads, from the tensors if they show it."""
    heads = self.need(key, 1, "no tensor shows it") if shown is None else self.agreed(key, shown)
    if heads < 1 or width % heads:
      raise ConversionError(f"{key}={heads!r} must divide the width {width}")
    return heads

  def tied(self, copy: str, original: str, is_configured: bool, how: str) -> bool:
    """Whether a table is another one: if it is left out as configured, or has the same numbers.

    torchscale's option for encoders cannot be set, and whoever builds a model can give it a tied
    table whatever its configuration is: that two tables are not tied is no statement of theirs.

    Args:
      copy, original: their names.
      is_configured: whether the configuration says so.
      how: the entry with which it does.
    """
    if not self.has(copy):
      if is_configured:
        return True
      raise ConversionError(
        f"missing: {copy}; if it is {original}, the configuration must set {how}"
      )
    one, other = self.tensors[copy], self.tensors.get(original)
    # Or one object: NaN is equal to nothing.
    is_same = one is other or (other is not None and np.array_equal(one, other))
    if is_configured and not is_same:
      raise ConversionError(f"{copy} is not {original}, but the configuration sets {how}")
    return is_same
