"""How a transformer is normalised, scaled and initialised, as data.

A recipe is a function `Architecture -> Recipe` (`theory/recipes.py`). It returns a small frozen
record that one residual rule reads (`layers/residual.py`):

  x <- post(skip * x + branch * out(f(in_scale * in(x))))

where f is self-attention, cross-attention or the feed-forward network; `in`, `out` and `post` are
norms at those *sites*; and the site `mid` is a norm inside f, before its output projection.

Structure and numbers are apart. The sites, what is learned, the head scale and the init families
decide which parameters exist and are static; the fields marked `NUMBER` (scales and gains) may be
a float, a tuple of one float a layer, or an array, and never change what is compiled.
"""

import dataclasses
import math
import operator
import typing
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

NUMBER = {"number": True}
Number = float | tuple[float, ...] | Any

SITES = ("in", "mid", "out", "post")
FAMILIES = ("xavier_normal", "xavier_uniform", "lecun_normal", "normal", "torch_uniform")
HEAD_SCALES = ("pre_out_proj", "post_out_proj_contiguous", "post_out_proj_interleaved")
QK_NORMS = ("head", "width")
NORMS = ("layer_norm", "rms_norm")

_RANKS = np.arange(1, 32_001)
# sum_k p_k^2 of a text whose k-th most frequent token of 32,000 has p_k ~ 1 / k (Zipf): how often
# two of its tokens are the same; about 0.0137.
ZIPF_CORRELATION = float(np.sum(1 / _RANKS**2) / np.sum(1 / _RANKS) ** 2)


def _check(name: str, value, choices) -> None:
  if value not in choices:
    raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, choices))}")


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What the papers' formulae need to know of a model.

  Attributes:
    kind: `encoder`, `decoder` or `encoder_decoder`.
    encoder_layers: N, the number of encoder layers (0 without an encoder).
    decoder_layers: M, the number of decoder layers (0 without a decoder).
    width: D, the width of the residual stream.
    ffn_width: F, the width of the feed-forward network's hidden layer.
    heads: the number of query heads.
    dropout: the rate of the dropout after each sublayer.
    token_correlation: r_0 in (0, 1], the correlation of two tokens' features at a stack's input,
      before the embedding's dropout; by default that of the tokens of a Zipf text, in one table.
    embedding_tables: how many learned tables are summed at a stack's input: 1 for tokens alone, 2
      with learned positions.
  """

  kind: str
  encoder_layers: int = 0
  decoder_layers: int = 0
  width: int = 512
  ffn_width: int = 2048
  heads: int = 8
  dropout: float = 0.0
  token_correlation: float = ZIPF_CORRELATION
  embedding_tables: int = 1

  def __post_init__(self):
    _check("kind", self.kind, ("encoder", "decoder", "encoder_decoder"))
    for stack in ("encoder", "decoder"):
      layers, present = getattr(self, f"{stack}_layers"), stack in self.kind.split("_")
      if layers < 0 or (layers > 0) != present:
        raise ValueError(f"kind={self.kind!r} does not go with {stack}_layers={layers}")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
    if not 0 < self.token_correlation <= 1:
      raise ValueError(f"token_correlation={self.token_correlation} must lie in (0, 1]")
    if self.embedding_tables < 1:
      raise ValueError(f"embedding_tables={self.embedding_tables} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Scale:
  """One of the residual rule's three scales: an initial value and what is learned.

  Attributes:
    value: the value, or the initial value if it is learned.
    learned: None, `scalar` (one parameter) or `vector` (one parameter a channel).
  """

  value: Number = dataclasses.field(default=1.0, metadata=NUMBER)
  learned: str | None = None

  def __post_init__(self):
    _check("learned", self.learned, (None, "scalar", "vector"))


@dataclasses.dataclass(frozen=True)
class Init:
  """How the kernel and the bias of one group of projections are drawn.

  | family           | distribution of the kernel                 | standard deviation         |
  |------------------|--------------------------------------------|----------------------------|
  | `xavier_normal`  | normal                                     | gain sqrt(2 / (in + out))  |
  | `xavier_uniform` | uniform on +-gain sqrt(6 / (in + out))     | gain sqrt(2 / (in + out))  |
  | `lecun_normal`   | normal                                     | gain / sqrt(in)            |
  | `torch_uniform`  | uniform on +-gain / sqrt(in)               | gain / sqrt(3 in)          |
  | `normal`         | normal                                     | gain                       |

  Attributes:
    family: one of the five above; `in` and `out` are the kernel's fan-in and fan-out.
    gain: multiplies the family's unit (for `normal` it is the standard deviation).
    bias: `zeros`, or `torch_uniform`: uniform on +-bias_gain / sqrt(in).
    bias_gain: multiplies the bias's unit.
  """

  family: str = "xavier_normal"
  gain: Number = dataclasses.field(default=1.0, metadata=NUMBER)
  bias: str = "zeros"
  bias_gain: Number = dataclasses.field(default=1.0, metadata=NUMBER)

  def __post_init__(self):
    _check("family", self.family, FAMILIES)
    _check("bias", self.bias, ("zeros", "torch_uniform"))

  def std(self, fan_in: int, fan_out: int) -> Number:
    """The standard deviation of a kernel with these fans."""
    unit = {
      "xavier_normal": math.sqrt(2 / (fan_in + fan_out)),
      "xavier_uniform": math.sqrt(2 / (fan_in + fan_out)),
      "lecun_normal": math.sqrt(1 / fan_in),
      "torch_uniform": math.sqrt(1 / (3 * fan_in)),
      "normal": 1.0,
    }[self.family]
    return unit * (np.asarray(self.gain) if isinstance(self.gain, tuple) else self.gain)

  def bias_std(self, fan_in: int) -> Number:
    """The standard deviation of the bias beside a kernel with this fan-in."""
    if self.bias == "zeros":
      return 0.0
    gain = np.asarray(self.bias_gain) if isinstance(self.bias_gain, tuple) else self.bias_gain
    return gain / math.sqrt(3 * fan_in)


@dataclasses.dataclass(frozen=True)
class Sublayer:
  """Norm sites and residual scales of one sublayer; see the module's docstring for the rule."""

  norms: frozenset[str] = frozenset({"in"})
  skip: Scale = Scale()
  branch: Scale = Scale()
  in_scale: Scale = Scale()

  def __post_init__(self):
    if not isinstance(self.norms, frozenset):
      raise TypeError(f"norms={self.norms!r} must be a frozenset of {', '.join(SITES)}")
    for site in self.norms:
      _check("norm site", site, SITES)


@dataclasses.dataclass(frozen=True)
class Attention(Sublayer):
  """An attention sublayer: its init groups, head scale and norm of queries and keys.

  Attributes:
    qk, v, out: the init groups.
    head_scale: None or one of HEAD_SCALES: where a learned factor a head is applied.
    qk_norm: None or one of QK_NORMS: whether queries and keys are normalised before the product,
      each head by itself or all heads of a token together.
  """

  qk: Init = Init()
  v: Init = Init()
  out: Init = Init()
  head_scale: str | None = None
  qk_norm: str | None = None

  def __post_init__(self):
    super().__post_init__()
    _check("head_scale", self.head_scale, (None, *HEAD_SCALES))
    _check("qk_norm", self.qk_norm, (None, *QK_NORMS))


@dataclasses.dataclass(frozen=True)
class FeedForward(Sublayer):
  """A feed-forward sublayer and its init groups: wi (D to F) and wo (F to D)."""

  wi: Init = Init()
  wo: Init = Init()


@dataclasses.dataclass(frozen=True)
class Layer:
  """The sublayers of one layer; cross-attention only in the decoder of an encoder-decoder."""

  self_attention: Attention
  ffn: FeedForward
  cross_attention: Attention | None = None

  @property
  def sublayers(self) -> dict[str, Sublayer]:
    """The sublayers there are, in the order in which they run."""
    names = ("self_attention", "cross_attention", "ffn")
    return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclasses.dataclass(frozen=True)
class Segment:
  """A pattern of layers, repeated: the unit that is scanned. Numbers hold one value a repeat."""

  pattern: tuple[Layer, ...]
  repeats: int

  def __post_init__(self):
    if self.pattern == () or self.repeats < 1:
      raise ValueError(f"a segment needs layers: pattern={self.pattern}, repeats={self.repeats}")


@dataclasses.dataclass(frozen=True)
class Embedding:
  """The front end: x_0 = norm(scale * tokens[token] + positions[position]).

  Attributes:
    tokens, positions: of the two tables.
    relative: of the table of relative position biases, where the model has one.
    patches: of the projection of image patches, where the model has one.
    scale: of the tokens.
    norm: whether there is a norm.
  """

  tokens: Init
  positions: Init
  relative: Init
  patches: Init
  scale: Number = dataclasses.field(default=1.0, metadata=NUMBER)
  norm: bool = False


@dataclasses.dataclass(frozen=True)
class Stack:
  """One stack of layers, from the embedding to the final norm.

  Attributes:
    segments: the layers, in order; one segment is the normal case.
    embedding: the front end.
    final_norm: whether a norm follows the last layer.
    norm: `layer_norm` or `rms_norm`, everywhere in the stack.
    width: D that the numbers were computed for; models of another width refuse the record.
  """

  segments: tuple[Segment, ...]
  embedding: Embedding
  final_norm: bool
  norm: str = "layer_norm"
  width: int | None = None

  def __post_init__(self):
    _check("norm", self.norm, NORMS)

  @property
  def num_layers(self) -> int:
    return sum(len(segment.pattern) * segment.repeats for segment in self.segments)

  @property
  def layers(self) -> tuple[Layer, ...]:
    """Every layer in its order, with its own numbers."""
    return tuple(
      map_numbers(operator.itemgetter(repeat), layer)
      for segment in as_arrays(self).segments
      for repeat in range(segment.repeats)
      for layer in segment.pattern
    )


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a recipe function returns: its name and a record for each stack."""

  name: str
  encoder: Stack | None = None
  decoder: Stack | None = None


RECORDS = (Scale, Init, Sublayer, Attention, FeedForward, Layer, Segment, Embedding, Stack)


# ---------------------------------------------------------------------------------------------
# Reading records
# ---------------------------------------------------------------------------------------------


def children(record: type) -> list[str]:
  """Names of the fields that hold numbers or further records; all others are structure."""

  def holds_record(annotation) -> bool:
    return annotation in RECORDS or any(map(holds_record, typing.get_args(annotation)))

  return [
    field.name
    for field in dataclasses.fields(record)
    if field.metadata == NUMBER or holds_record(field.type)
  ]


def map_numbers(fn: Callable[[Number], Number], record):
  """The same record with `fn` applied to every number in it."""
  if isinstance(record, tuple):
    return tuple(map_numbers(fn, item) for item in record)
  if not dataclasses.is_dataclass(record):
    return record
  return dataclasses.replace(
    record,
    **{
      field.name: (fn if field.metadata == NUMBER else lambda v: map_numbers(fn, v))(
        getattr(record, field.name)
      )
      for field in dataclasses.fields(record)
    },
  )


def _as_array(value: Number):
  """Arrays, perhaps traced, pass; the rest keeps float64 until it meets the computation."""
  return np.asarray(value, np.float64) if isinstance(value, float | int | tuple) else value


def per_layer(segment: Segment) -> tuple[Layer, ...]:
  """The segment's pattern with every number as an array of one value a repeat."""

  def spread(value: Number):
    array = _as_array(value)
    if array.ndim and array.shape[0] != segment.repeats:
      raise ValueError(f"{array.shape[0]} values for a segment of {segment.repeats} repeats")
    return array * np.ones((segment.repeats,), array.dtype)

  return map_numbers(spread, segment.pattern)


def as_arrays(stack: Stack) -> Stack:
  """The stack with every number as an array: its leaves are then fit to be traced or swept."""
  embedding = map_numbers(_as_array, stack.embedding)
  segments = tuple(Segment(per_layer(segment), segment.repeats) for segment in stack.segments)
  return dataclasses.replace(stack, embedding=embedding, segments=segments)


def sublayers(stack: Stack) -> Iterator[tuple[str, Sublayer]]:
  """(name, record) of each different sublayer of the stack, numbers as they were given."""
  hashable = lambda value: tuple(np.unique(np.asarray(value, np.float64)))
  seen = set()
  for segment in stack.segments:
    for layer in segment.pattern:
      for name, sublayer in layer.sublayers.items():
        key = name, map_numbers(hashable, sublayer)
        if key not in seen:
          seen.add(key)
          yield name, sublayer


def cut(stack: Stack, layer: int) -> Stack:
  """The same layers, with a segment that begins at one of them.

  A segment is scanned as a whole. Layers that differ in what no record tells, as a multiway
  encoder's top layers with one expert more do, must therefore be segments of their own.

  Args:
    layer: in [0, L]; counted from 0. The stack's ends need no cut.

  Raises:
    ValueError: there is no such layer.

  Example:
    >>> [segment.repeats for segment in cut(recipe, recipe.num_layers - 3).segments]
    [21, 3]
  """
  if not 0 <= layer <= stack.num_layers:
    raise ValueError(f"{layer=} is none of a stack of {stack.num_layers} layers")
  segments, first = [], 0
  for segment in stack.segments:
    width, repeats = len(segment.pattern), segment.repeats
    below = min(max(layer - first, 0), width * repeats)
    first += width * repeats
    # Of a repeat that is cut within its pattern, both parts are segments of one repeat.
    whole, within = divmod(below, width)
    parts = [(segment.pattern, 0, whole)]
    if within:
      halves = segment.pattern[:within], segment.pattern[within:]
      parts += [(half, whole, whole + 1) for half in halves]
    parts.append((segment.pattern, whole + (within > 0), repeats))
    segments += [_repeats(*part) for part in parts if part[1] < part[2]]
  return dataclasses.replace(stack, segments=tuple(segments))


def _repeats(pattern: tuple[Layer, ...], first: int, last: int) -> Segment:
  """The repeats [first, last) of a pattern whose numbers may hold one value a repeat."""
  take = lambda value: value[first:last] if np.ndim(value) else value
  return Segment(map_numbers(take, pattern), last - first)


def has_cross_attention(stack: Stack) -> bool:
  """Whether a layer of the stack attends to a memory."""
  return any(
    layer.cross_attention is not None for segment in stack.segments for layer in segment.pattern
  )


def with_qk_norm(stack: Stack, scope: str | None) -> Stack:
  """The stack with queries and keys of every attention normalised over `scope`; see `Attention`.

  Reference: Query-Key Normalization, arXiv 2010.04245; Scaling ViT to 22 Billion Parameters, arXiv
  2302.05442 (a head at a time); OLMo 2, arXiv 2501.00656 (all heads together).
  """

  def layer(record: Layer) -> Layer:
    attentions = {
      name: dataclasses.replace(sublayer, qk_norm=scope)
      for name, sublayer in record.sublayers.items()
      if isinstance(sublayer, Attention)
    }
    return dataclasses.replace(record, **attentions)

  segments = (Segment(tuple(map(layer, s.pattern)), s.repeats) for s in stack.segments)
  return dataclasses.replace(stack, segments=tuple(segments))


def _number_in_words(value: Number) -> str:
  values = np.unique(np.asarray(value, np.float64))
  return f"{values[0]:.4g}" if len(values) == 1 else f"{values[0]:.4g}..{values[-1]:.4g}"


def _scaled_in_words(scale: Scale, operand: str) -> str:
  number = _number_in_words(scale.value)
  factor = f"learned[{number}]" if scale.learned else ("" if number == "1" else number)
  return f"{factor} {operand}".strip()


def describe(stack: Stack) -> list[str]:
  """The stack in words: a line of equation and a line of inits for each kind of sublayer."""
  norm = {"layer_norm": "LN", "rms_norm": "RMSNorm"}[stack.norm]
  lines = []
  for name, sub in sublayers(stack):
    body = _scaled_in_words(sub.in_scale, f"{norm}(x)" if "in" in sub.norms else "x")
    body = f"{name}({body})"
    body = f"{norm}({body})" if "out" in sub.norms else body
    rule = f"{_scaled_in_words(sub.skip, 'x')} + {_scaled_in_words(sub.branch, body)}"
    rule = f"{norm}({rule})" if "post" in sub.norms else rule
    extras = [f"inner {norm} before its output projection"] if "mid" in sub.norms else []
    if getattr(sub, "head_scale", None):
      extras.append(f"learned head scale ({sub.head_scale})")
    if getattr(sub, "qk_norm", None):
      extras.append(f"{norm} of queries and keys (each {sub.qk_norm})")
    groups = [f.name for f in dataclasses.fields(sub) if isinstance(getattr(sub, f.name), Init)]
    inits = ", ".join(
      f"{group} {getattr(sub, group).family} x {_number_in_words(getattr(sub, group).gain)}"
      for group in groups
    )
    lines += [f"x <- {rule}" + "".join(f"; {extra}" for extra in extras), f"  init: {inits}"]
  if stack.embedding.norm:
    lines.append(f"embedding norm: {norm}")
  lines.append(f"final norm: {norm if stack.final_norm else 'none'}")
  return lines
