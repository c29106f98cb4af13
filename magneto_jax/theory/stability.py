"""What figures of a stack mean for its training: findings in words, and which recipe to take.

A finding is a figure beyond a limit. The limits are ours: round numbers between what papers report
to train and what they report to fail. They are stated with each finding, so that a reader may draw
the line elsewhere.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from magneto_jax.theory import propagation, records
from magneto_jax.theory.recipes import RECIPES

# Of the gradient's norm at a layer over that at the last one, and the inverse.
GRADIENT_LIMIT = 100.0
# Of the correlation of tokens: what tells them apart is then 7 % of a token's norm.
CORRELATION_LIMIT = 0.995
# The largest number of float16, and how near a value at the start may come to it: streams grow
# several times in training.
FLOAT16_MAX = 65504.0
FLOAT16_MARGIN = 8.0
# Of the first update of the matrices over that of Pre-LN with SHALLOW layers of the same sizes, at
# which a learning rate that suits a shallow model no longer fits.
UPDATE_LIMIT = 50.0
SHALLOW = 6
# Below this one matrices hardly move at first: LayerScale's and ReZero's, by design.
UPDATE_FLOOR = 1e-4
# Below this one it is told: DeepNet's is 0.03 in the decoder that benchmarks.stability trains.
UPDATE_SMALL = 1 / 20
_SLOW = (
  f"so small a first update, below {UPDATE_SMALL:g}, is soundness at the start, not speed of"
  " training: with deepnet's a decoder of 200 layers ended last of the four recipes that trained"
  " at a peak rate of 0.001, and learned frequencies alone at 0.004, where magneto and deepscalelm"
  " trained (docs/stability.md)"
)


class Finding(NamedTuple):
  """A figure beyond its limit.

  Attributes:
    figure: `gradient`, `correlation`, `float16` or `update`.
    layer: the first layer, or with the gradient the last, where it holds; None for the update.
    text: what it means, in words.
  """

  figure: str
  layer: int | None
  text: str


def judge(
  *,
  gradient: np.ndarray,
  correlation: np.ndarray,
  largest: np.ndarray,
  update_ratio: float = math.nan,
) -> list[Finding]:
  """The findings about one stack.

  Args:
    gradient: [L + 1], the gradient's variance at the input and after each layer.
    correlation: [L + 1], of two tokens.
    largest: [L + 1], the largest absolute value in the stream, measured or expected.
    update_ratio: the first update over that of Pre-LN with SHALLOW layers; NaN if not known.
  """
  return [
    *_gradient_findings(np.asarray(gradient, np.float64)),
    *_first_beyond(
      "correlation",
      np.asarray(correlation) > CORRELATION_LIMIT,
      "tokens collapse into one: their correlation exceeds "
      f"{CORRELATION_LIMIT} from layer {{layer}} on",
    ),
    *_float16_findings(np.asarray(largest, np.float64)),
    *update_findings(update_ratio),
  ]


def _gradient_findings(gradient: np.ndarray) -> Iterator[Finding]:
  # The input is left out: what lies below the first layer is the embedding's own scale.
  norms = np.sqrt(gradient[1:])
  broken = np.flatnonzero(~np.isfinite(norms))
  if len(broken) or norms[-1] == 0:
    layer = 1 + int(broken[-1]) if len(broken) else len(norms)
    yield Finding("gradient", layer, f"the gradient is not finite, or zero, at layer {layer}")
    return
  ratios = norms / norms[-1]
  for beyond, verb, bound in (
    (ratios > GRADIENT_LIMIT, "explodes", f"more than {GRADIENT_LIMIT:g} times"),
    (ratios < 1 / GRADIENT_LIMIT, "vanishes", f"less than 1/{GRADIENT_LIMIT:g} of"),
  ):
    if np.any(beyond):
      layer = 1 + int(np.flatnonzero(beyond)[-1])
      extreme = ratios[np.argmax(np.abs(np.log(np.maximum(ratios, 1e-300))))]
      yield Finding(
        "gradient",
        layer,
        f"the gradient {verb} towards the input: from layer {layer} down its norm is {bound} the"
        f" last layer's ({extreme:.3g} times at its extreme)",
      )


def _first_beyond(figure: str, beyond: np.ndarray, text: str) -> Iterator[Finding]:
  if np.any(beyond):
    layer = int(np.argmax(beyond))
    yield Finding(figure, layer, text.format(layer=layer))


def _float16_findings(largest: np.ndarray) -> Iterator[Finding]:
  overflows = ~(largest < FLOAT16_MAX)
  if np.any(overflows):
    yield from _first_beyond(
      "float16",
      overflows,
      f"the stream overflows float16 ({FLOAT16_MAX:g}) from layer {{layer}} on: use bfloat16",
    )
    return
  yield from _first_beyond(
    "float16",
    largest > FLOAT16_MAX / FLOAT16_MARGIN,
    f"the stream comes within {FLOAT16_MARGIN:g} times of float16's largest number at layer"
    f" {{layer}} (it reaches {largest.max():.3g}), and streams grow in training: use bfloat16",
  )


def update_findings(ratio: float) -> Iterator[Finding]:
  """What the first update, over that of Pre-LN with SHALLOW layers, means."""
  if ratio > UPDATE_LIMIT:
    yield Finding(
      "update",
      None,
      f"the first update is {ratio:.3g} times that of Pre-LN with {SHALLOW} layers: at learning"
      " rates that suit a shallow model training explodes",
    )


def first_over_last(gradient: np.ndarray) -> float:
  """The gradient's norm at the first layer over that at the last one, from its variance [L + 1]."""
  return math.sqrt(gradient[1] / gradient[-1]) if gradient[-1] else math.nan


def expected_largest(variance: np.ndarray, count: int) -> np.ndarray:
  """The largest of `count` normal numbers: sqrt(2 log(count) S)."""
  return np.sqrt(2 * math.log(max(count, 2)) * np.asarray(variance))


# ---------------------------------------------------------------------------------------------
# Which recipe
# ---------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
  """What the theory says of one recipe.

  Attributes:
    name: of the recipe.
    findings: of the theory, of all its stacks.
    gradient_ratio: the gradient's norm furthest from the last layer's, over that.
    correlation: of the tokens after the last layer.
    largest: the largest absolute value expected in the stream.
    update_ratio: the first update over that of Pre-LN with SHALLOW layers.
    used: how much of its limits the recipe uses, on a logarithmic scale: below 1 within all. It is
      above 1 without a finding where matrices hardly move at first (UPDATE_FLOOR).
    notes: of the prediction.
  """

  name: str
  findings: tuple[Finding, ...]
  gradient_ratio: float
  correlation: float
  largest: float
  update_ratio: float
  used: float
  notes: tuple[str, ...]


class Recommendation(NamedTuple):
  """The candidates, best first; `str()` of it is the answer in words."""

  architecture: records.Architecture
  candidates: tuple[Candidate, ...]

  @property
  def name(self) -> str:
    """The recipe to take."""
    return self.candidates[0].name

  @property
  def caution(self) -> str:
    """What its soundness does not say of the recipe to take; empty if there is nothing to say."""
    best = self.candidates[0]
    return _SLOW if not best.findings and best.update_ratio < UPDATE_SMALL else ""

  def __str__(self) -> str:
    best, *others = self.candidates
    lines = [
      f"take {best.name}: its gradient stays within {best.gradient_ratio:.3g} times the last"
      f" layer's, its first update is {best.update_ratio:.3g} times that of Pre-LN with {SHALLOW}"
      f" layers, its stream stays below {best.largest:.3g}",
    ]
    if best.findings:
      lines = [f"no recipe is sound; the nearest is {best.name}: {_in_words(best.findings)}"]
    if self.caution:
      lines.append(f"note: {self.caution}")
    if sound := [c.name for c in others if not c.findings]:
      lines.append(f"also sound, best first: {', '.join(sound)}")
    lines += [f"not {c.name}: {_in_words(c.findings)}" for c in others if c.findings]
    return "\n".join(lines)


def _in_words(findings: Sequence[Finding]) -> str:
  return "; ".join(finding.text for finding in findings)


def _check_name(name: str) -> None:
  if name not in RECIPES:
    raise ValueError(f"recipe={name!r} must be one of {', '.join(RECIPES)}")


def candidate(
  name: str, architecture: records.Architecture, *, length: int = 256, **options
) -> Candidate:
  """What the theory says of a recipe; arguments are those of `propagation.parts_of`."""
  _check_name(name)
  parts, starts = propagation.parts_of(
    RECIPES[name](architecture), architecture, length=length, **options
  )
  profiles = propagation.propagate_all(parts, starts)
  ratio = update_ratio(name, architecture, length=length, **options)
  findings, ratios, correlations, largest, notes = [], [], [], [], []
  for kind, profile in profiles.items():
    peak = expected_largest(profile.variance, length * architecture.width)
    found = judge(gradient=profile.gradient, correlation=profile.correlation, largest=peak)
    prefix = f"{kind}: " if len(profiles) > 1 else ""
    findings += [f._replace(text=prefix + f.text) for f in found]
    # An encoder under a decoder is compared with its own last layer: what the memory lets
    # through is common to all its layers.
    norms = np.clip(np.sqrt(profile.gradient[1:]), 1e-150, 1e150)
    ratios.append(math.exp(np.max(np.abs(np.log(norms / norms[-1])))))
    correlations.append(float(profile.correlation[-1]))
    largest.append(float(peak.max()))
    notes += profile.notes
  findings += update_findings(ratio)
  used = max(
    _share(max(ratios), GRADIENT_LIMIT),
    _share(1 - max(correlations), 1 - CORRELATION_LIMIT),
    _share(max(largest), FLOAT16_MAX / FLOAT16_MARGIN),
    _share(ratio, UPDATE_LIMIT if ratio > 1 else UPDATE_FLOOR),
  )
  return Candidate(
    name=name,
    findings=tuple(findings),
    gradient_ratio=max(ratios),
    correlation=max(correlations),
    largest=max(largest),
    update_ratio=ratio,
    used=used,
    notes=tuple(dict.fromkeys(notes)),
  )


def shallow(architecture: records.Architecture) -> records.Architecture:
  """The same with SHALLOW layers a stack."""
  depths = {f"{kind}_layers": SHALLOW for kind in architecture.kind.split("_")}
  return dataclasses.replace(architecture, **depths)


def update_ratio(name: str, architecture: records.Architecture, **options) -> float:
  """The predicted first update of the matrices, over that of Pre-LN with SHALLOW layers."""
  base = shallow(architecture)
  own, reference = (
    propagation.first_update(*propagation.parts_of(RECIPES[recipe](sizes), sizes, **options))
    for recipe, sizes in ((name, architecture), ("pre_ln", base))
  )
  return own.matrices / reference.matrices


def _share(value: float, limit: float) -> float:
  """How far a value is from 1 to its limit, on a logarithmic scale."""
  return math.log(min(max(value, 1e-300), 1e300)) / math.log(limit)


def recommend(
  architecture: records.Architecture,
  *,
  recipes: Sequence[str] = tuple(RECIPES),
  length: int = 256,
  **options,
) -> Recommendation:
  """Which recipe to take at this depth, from the theory alone, in seconds and without a device.

  A recipe is sound if no figure of its prediction is beyond its limit (`judge`); of the sound ones
  the one comes first that uses least of its limits. What a recipe is worth once it trains, the
  theory does not say; a first update below UPDATE_SMALL is told with a note.

  Args:
    architecture: sizes, depths and dropout; see `Architecture`.
    recipes: the names to choose from.
    length: tokens a sample.
    **options: other fields of `propagation.Setting`.

  Example:
    >>> print(recommend(Architecture("decoder", decoder_layers=200, width=512, ffn_width=2048)))
  """
  recipes = (recipes,) if isinstance(recipes, str) else recipes
  if not recipes:
    raise ValueError("recommend needs recipes to choose from")
  for name in recipes:
    _check_name(name)
  found = [candidate(name, architecture, length=length, **options) for name in recipes]
  order = lambda c: (len(c.findings) > 0, c.used)
  return Recommendation(architecture, tuple(sorted(found, key=order)))
