"""What figures mean: each limit at, above and below it; and which recipe is recommended."""

import dataclasses
import functools
import json
import math
import re

import numpy as np
import pytest

from benchmarks.coordinator import RESULTS
from benchmarks.stability import training
from magneto_jax.theory import moments, propagation, stability
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import Architecture

KINDS = ("encoder", "decoder", "encoder_decoder")


def architecture(kind, layers, **sizes):
  depths = {f"{stack}_layers": layers for stack in kind.split("_")}
  return Architecture(kind, **depths, **{"width": 256, "ffn_width": 1024, "heads": 4} | sizes)


def figures(found):
  return [(finding.figure, finding.layer) for finding in found]


# ---------------------------------------------------------------------------------------------
# Findings
# ---------------------------------------------------------------------------------------------

SOUND = {"gradient": [5.0, 2, 1.5, 1], "correlation": [0.1, 0.2, 0.3, 0.4], "largest": [4, 5, 6, 7]}


def judged(**figures):
  return stability.judge(**{**SOUND, **{name: np.array(v, float) for name, v in figures.items()}})


def test_a_sound_stack_has_no_findings():
  assert judged(update_ratio=1.0) == []
  assert stability.judge(**SOUND) == []


G, C, F = stability.GRADIENT_LIMIT, stability.CORRELATION_LIMIT, stability.FLOAT16_MAX
NEAR = F / stability.FLOAT16_MARGIN
ABOVE, BELOW = 1 + 1e-9, 1 - 1e-9


@pytest.mark.parametrize(
  "given, expected",
  [
    ({"gradient": [1, G**2, 1, 1]}, []),
    ({"gradient": [1, (G * ABOVE) ** 2, 1, 1]}, [("gradient", 1)]),
    ({"gradient": [1, (2 * G) ** 2, (2 * G) ** 2, 1]}, [("gradient", 2)]),
    ({"gradient": [1, G**-2, 1, 1]}, []),
    ({"gradient": [1, (G * ABOVE) ** -2, 1, 1]}, [("gradient", 1)]),
    # Both, each with its own layer.
    ({"gradient": [1, (2 * G) ** 2, (2 * G) ** -2, 1]}, [("gradient", 1), ("gradient", 2)]),
    # The embedding's own gradient does not count.
    ({"gradient": [1e12, 1, 1, 1]}, []),
    ({"gradient": [math.inf, math.inf, math.nan, 1]}, [("gradient", 2)]),
    ({"gradient": [1, 1, 1, math.nan]}, [("gradient", 3)]),
    ({"gradient": [1, 1, 1, 0]}, [("gradient", 3)]),
    ({"gradient": [0, 0, 1, 1]}, [("gradient", 1)]),
    ({"correlation": [0, C, C, C]}, []),
    ({"correlation": [0, C, C * ABOVE, 1]}, [("correlation", 2)]),
    ({"correlation": [1, 1, 1, 1]}, [("correlation", 0)]),
    ({"correlation": [0, math.nan, math.nan, 0]}, []),
    ({"largest": [1, 1, NEAR, NEAR]}, []),
    ({"largest": [1, 1, NEAR * ABOVE, F * BELOW]}, [("float16", 2)]),
    ({"largest": [1, NEAR * ABOVE, F, 1]}, [("float16", 2)]),
    ({"largest": [1, 1, 1, math.inf]}, [("float16", 3)]),
    ({"largest": [math.nan, 1, 1, 1]}, [("float16", 0)]),
    ({"update_ratio": stability.UPDATE_LIMIT}, []),
    ({"update_ratio": stability.UPDATE_LIMIT * ABOVE}, [("update", None)]),
    ({"update_ratio": math.inf}, [("update", None)]),
    ({"update_ratio": math.nan}, []),
    ({"update_ratio": 0.0}, []),
  ],
)
def test_a_finding_is_a_figure_beyond_its_limit(given, expected):
  found = judged(**given)
  assert figures(found) == expected
  for finding in found:
    assert finding.text and "{" not in finding.text
    if finding.layer is not None:
      assert f"layer {finding.layer}" in finding.text


def test_findings_of_several_kinds_come_together():
  found = judged(gradient=[1, 1e9, 1, 1], correlation=[0, 1, 1, 1], largest=[1, 1, 1, 1e9])
  assert figures(found) == [("gradient", 1), ("correlation", 1), ("float16", 3)]
  assert "explodes" in found[0].text
  assert "vanishes" in judged(gradient=[1, 1e-9, 1, 1])[0].text
  # A stream that overflows is not said to come near.
  assert "overflows" in found[2].text


def test_the_largest_of_normal_numbers_is_what_they_reach():
  """Of a million draws, four times: within 15 %, sqrt(2 log n) being an upper bound."""
  draws = np.random.default_rng(0).standard_normal((4, 1_000_000)) * 3
  expected = stability.expected_largest(np.array(9.0), draws.shape[1])
  assert np.abs(draws).max(axis=1).mean() == pytest.approx(expected, rel=0.15)
  assert stability.expected_largest(np.array([0.0, 1.0]), 1).shape == (2,)


# ---------------------------------------------------------------------------------------------
# Recommendations
# ---------------------------------------------------------------------------------------------


@functools.cache
def recommended(kind, layers):
  return stability.recommend(architecture(kind, layers), length=64)


DEPTHS = [
  pytest.param(kind, layers, marks=[pytest.mark.slow] if layers > 12 else [])
  for kind in KINDS
  for layers in (12, 100, 1000)
]


@pytest.mark.parametrize("kind, layers", DEPTHS)
def test_a_sound_recipe_is_recommended_at_every_depth(kind, layers):
  found = recommended(kind, layers)
  best = found.candidates[0]
  assert best.findings == () and found.name == best.name
  assert best.used < 1
  assert sorted(c.name for c in found.candidates) == sorted(RECIPES)
  # The sound ones first, by what they use of their limits.
  order = [(bool(c.findings), c.used) for c in found.candidates]
  assert order == sorted(order)
  for candidate in found.candidates:
    # Whoever is within its limits uses less than all of them. Below the update's floor, which
    # costs no finding, more than all may be used.
    if candidate.update_ratio > stability.UPDATE_FLOOR:
      assert (candidate.used < 1) == (not candidate.findings), candidate


FIRST = [
  pytest.param(width, layers, marks=[pytest.mark.slow] if (width, layers) > (64, 12) else [])
  for width in (64, 512)
  for layers in (12, 48, 200, 1000)
]


@pytest.mark.parametrize("width, layers", FIRST)
def test_deepscalelm_simple_comes_first_where_docs_choosing_says_so(width, layers):
  sizes = Architecture("decoder", decoder_layers=layers, width=width, ffn_width=4 * width, heads=2)
  assert stability.recommend(sizes).name == "deepscalelm_simple"


def test_a_recommendation_names_each_recipe_once():
  text = str(recommended("encoder", 12))
  for name in RECIPES:
    assert len(re.findall(rf"\b{name}\b", text)) == 1, (name, text)
  assert text.startswith(f"take {recommended('encoder', 12).name}: ")


@pytest.mark.parametrize(
  "ratio, told", [(1.0, False), (stability.UPDATE_SMALL, False), (0.04, True), (0.0, True)]
)
def test_a_small_first_update_is_told_of_the_recipe_to_take(ratio, told):
  """Below its limit alone, of the first alone, and not where nothing is sound."""
  sizes = architecture("decoder", 200)
  own = stability.Candidate("deepnet", (), 1.0, 0.5, 5.0, ratio, 0.5, ())
  other = own._replace(name="magneto", update_ratio=1.0)
  found = stability.Recommendation(sizes, (own, other))
  assert bool(found.caution) == told
  assert (f"\nnote: {found.caution}\n" in str(found)) == told
  assert "soundness at the start, not speed of training" in found.caution or not told
  assert not stability.Recommendation(sizes, (other, own)).caution
  unsound = own._replace(findings=tuple(stability.update_findings(99.0)))
  assert not stability.Recommendation(sizes, (unsound,)).caution


def test_what_is_told_of_a_small_first_update_is_what_was_measured():
  """DeepNet's is small where it was trained, and ended last, or where it had begun."""
  held = json.loads(max(RESULTS.glob("stability-training-*.json")).read_text())
  own = held["setup"]
  sizes = Architecture(
    "decoder",
    decoder_layers=own["layers"],
    width=own["width"],
    ffn_width=own["ffn_width"],
    heads=own["heads"],
  )
  ratio = stability.update_ratio("deepnet", sizes, length=own["length"], activation="relu")
  assert round(ratio, 2) == 0.03 < stability.UPDATE_SMALL
  at = lambda rate: {r["recipe"]: r["bits_per_byte"] for r in held["runs"] if r["rate"] == rate}
  learned = held["runs"][0]["baselines"]["unigram"] - training.TRAINED
  assert sorted(name for name, bits in at(0.001).items() if bits < learned) == sorted(
    ("pre_ln", "magneto", "deepscalelm", "deepnet")
  )
  assert at(0.001)["deepnet"] == sorted(at(0.001).values())[3]
  assert {name: bits < learned for name, bits in at(0.004).items()} == {
    "magneto": True,
    "deepscalelm": True,
    "deepnet": False,
  }


def test_what_is_not_sound_is_said_to_be_so():
  """Of recipes that all fail the nearest is named, not taken."""
  deep = architecture("encoder", 200)
  found = stability.recommend(deep, recipes=("post_ln",), length=64)
  assert str(found).startswith("no recipe is sound; the nearest is post_ln: ")
  (finding, *_) = found.candidates[0].findings
  assert finding.text in str(found)


@pytest.mark.parametrize("dropout", (0.0, 0.1))
@pytest.mark.parametrize("kind", KINDS)
def test_deep_post_ln_is_not_sound(kind, dropout):
  """Tokens collapse; where dropout keeps them apart, the update or the gradient is at fault."""
  found = stability.candidate("post_ln", architecture(kind, 200, dropout=dropout), length=64)
  assert ("correlation" in {finding.figure for finding in found.findings}) == (dropout == 0)
  assert found.findings


def test_shallow_post_ln_and_deep_deepnet_are_sound():
  assert not stability.candidate("post_ln", architecture("encoder", 6), length=64).findings
  deepnet = stability.candidate("deepnet", architecture("encoder", 200), length=64)
  assert not deepnet.findings and deepnet.gradient_ratio < 3


def test_pre_ln_of_the_shallow_depth_is_the_unit_of_the_update():
  for kind in KINDS:
    shallow = architecture(kind, stability.SHALLOW)
    assert stability.update_ratio("pre_ln", shallow, length=64) == 1.0
  sizes = stability.shallow(architecture("encoder_decoder", 9))
  assert (sizes.encoder_layers, sizes.decoder_layers) == (stability.SHALLOW,) * 2
  sizes = stability.shallow(dataclasses.replace(architecture("decoder", 4), dropout=0.1))
  assert (sizes.encoder_layers, sizes.decoder_layers, sizes.dropout) == (0, stability.SHALLOW, 0.1)


def test_findings_of_two_stacks_say_whose_they_are():
  deep = architecture("encoder_decoder", 200)
  texts = [f.text for f in stability.candidate("post_ln", deep, length=32).findings]
  stacks = [text.split(": ")[0] for text in texts if not text.startswith("the first update")]
  assert stacks and set(stacks) <= {"encoder", "decoder"}


@pytest.mark.parametrize("recipes", [("pre_ln", "preln"), ("",)])
def test_a_name_that_is_no_recipe_is_refused_with_the_names(recipes):
  with pytest.raises(ValueError, match=f"recipe='{recipes[-1]}' must be one of pre_ln, post_ln"):
    stability.recommend(architecture("encoder", 2), recipes=recipes)
  with pytest.raises(ValueError, match="must be one of pre_ln"):
    stability.candidate(recipes[-1], architecture("encoder", 2))


def test_no_recipes_are_refused():
  with pytest.raises(ValueError, match="needs recipes"):
    stability.recommend(architecture("encoder", 2), recipes=())


@pytest.mark.parametrize("name", ["pre_ln", "magneto", "deepnet", "out_norm"])
def test_the_ratio_is_of_a_loss_at_the_output(name):
  """A gradient of unit variance behind the final norm, which divides it on its way back."""
  deep = architecture("decoder", 40)
  parts, starts = propagation.parts_of(RECIPES[name](deep), deep, length=64)
  ((kind, (stack, setting)),) = parts.items()
  variance = propagation.propagate_all(parts, starts)[kind].variance[-1] + setting.epsilon
  top = moments.Gradient(1 / variance if stack.final_norm else 1.0, 0.0)
  update = propagation.first_update(parts, starts, top).matrices
  shallow = stability.shallow(deep)
  base = propagation.parts_of(RECIPES["pre_ln"](shallow), shallow, length=64)
  expected = update / propagation.first_update(*base).matrices
  assert stability.update_ratio(name, deep, length=64) == pytest.approx(expected)
