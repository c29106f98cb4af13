"""The parts of `benchmarks.stability` at toy sizes, and the page written from their files."""

import json
import math

import jax
import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from benchmarks.stability import (
  files,
  glance,
  gradients,
  page,
  propagation,
  rate,
  text,
  training,
  update,
  words,
)
from magneto_jax import diagnostics
from magneto_jax.theory import recipes

TINY = update.Setup(vocab_size=8, length=4, batch=2)


@pytest.mark.slow
def test_an_update_is_that_of_diagnostics():
  """Of the same parameters and batches; and read on the step's own batch, that of one call."""
  (drawn,) = update.measured(TINY, "pre_ln", 2, [1])
  model = update.model_of(TINY, "pre_ln", 2)
  init_key, batch_key = update.keys(1)
  step, read = update.calls(TINY, model, batch_key)
  own = step._replace(loss=lambda logits: logits)

  @update.fast_jit
  def updates():
    params = model.init(init_key, *step.args)["params"]
    return [diagnostics.first_update(model, params, step, on) for on in (read, own, None)]

  on_another, on_its_own, by_default = updates()
  np.testing.assert_allclose(drawn, on_another, rtol=1e-4)
  np.testing.assert_allclose(on_its_own, by_default, rtol=1e-4)
  assert abs(on_another.matrices / by_default.matrices - 1) > 0.01


@pytest.mark.slow
def test_an_update_is_the_limit_of_a_finite_step():
  found = update.finite_step(TINY, "post_ln", 2, seed=0, rate=1e-5)
  for row in update.ROWS:
    np.testing.assert_allclose(found["finite_step"][row], found["derivative"][row], rtol=1e-3)


@pytest.mark.parametrize("line", ["pre_ln", "olmo2"])
def test_features_are_what_the_output_projection_reads(line):
  model = update.model_of(TINY, line, 1)
  _, read = update.calls(TINY, model, jax.random.key(0))

  @update.fast_jit
  def both():
    params = model.init(jax.random.key(1), *read.args)["params"]
    output = read.apply(model, {"params": params})
    table_VD = params["output_embedding"]["embedding"]
    return update.features(model, output) @ table_VD.T, output[0]

  np.testing.assert_allclose(*both(), rtol=1e-4, atol=1e-5)


def test_every_recipe_has_a_line():
  assert set(recipes.RECIPES) <= {name for name, _ in update.LINES.values()}


@pytest.mark.parametrize("edge", [6e-4, 1e-3, 3e-3, 8e-3, 0.1, 3.0])
def test_the_largest_rate_is_found(edge):
  """Of a loss that diverges above the edge, to a factor of sqrt 2."""
  found = rate.largest_rate(lambda tried: tried <= edge, start=8e-3)
  assert found <= edge < found * 2**0.5 * (1 + 1e-9)


def test_the_largest_rate_stays_within_its_bounds():
  assert rate.largest_rate(lambda tried: False, start=8e-3) is None
  found = rate.largest_rate(lambda tried: True, start=8e-3, highest=1.0)
  assert 0.5 <= found <= 1.0


def test_a_run_counts_by_its_last_tenth():
  assert text.last_tenth([9.0] * 18 + [1.0, 3.0]) == 2.0
  assert text.last_tenth([1.0, math.nan, 1.0]) == math.inf
  assert text.last_tenth([5.0]) == 5.0


def test_the_frequencies_of_bytes_are_a_model():
  assert text.unigram(np.array([[0, 1], [1, 0]])) == pytest.approx(math.log(2))
  assert text.unigram(np.array([[3, 3]])) == pytest.approx(0)


def test_a_search_keeps_its_runs():
  """In two steps no rate learns the bytes' frequencies, so all are tried and none is found."""
  setup = text.Setup(width=8, ffn_width=16, length=8, batch=2, steps=2)
  results = rate.measure(setup, lambda results: None, recipes=["pre_ln"], depths=[1], start=1e-3)
  found = results["recipes"]["pre_ln"]["1"]
  assert found["largest_rate"] is None
  assert [run["rate"] for run in found["runs"]] == [1e-3, 5e-4]
  assert all(run["final_loss"] > found["threshold"] for run in found["runs"])


def test_gradients_are_measured_layer_by_layer():
  kernel_LFD = np.stack([np.full((4, 3), 2.0), np.full((4, 3), -0.5)])
  tree = {"stack": {"segment_0": {"block_0": {"ffn": {"wo": {"kernel": kernel_LFD}}}}}}
  expected = [[2.0, 0.5], [2 * math.sqrt(12), 0.5 * math.sqrt(12)]]
  np.testing.assert_allclose(gradients.norms(tree), expected, rtol=1e-6)


def test_the_mismatch_is_first_over_last_and_largest_over_smallest():
  run = {"mean": {"mean_abs": [4.0, 1.0, 2.0]}}
  assert gradients.mismatch({"recipes": {"pre_ln": [run, run]}}, "pre_ln", "mean") == (2.0, 4.0)


def test_embeddings_have_the_correlation_they_are_drawn_with():
  setup = propagation.Setup(width=4096, length=8, batch=8)
  x_BTD = np.asarray(propagation.embeddings(setup, jax.random.key(0), 0.9), np.float64)
  products_BTT = np.einsum("btd,bud->btu", x_BTD, x_BTD) / setup.width
  apart = ~np.eye(setup.length, dtype=bool)
  assert np.mean(np.square(x_BTD)) == pytest.approx(0.9, rel=0.02)
  assert np.mean(products_BTT[:, apart]) == pytest.approx(0.9 * setup.correlation, rel=0.1)


def test_a_training_is_the_librarys_own():
  setup = training.Setup(layers=3, steps=7)
  run = training.config_of(setup, "deepnet", 2e-3)
  assert (run.recipe, run.model.layers, run.steps, run.optimizer.learning_rate) == (
    "deepnet",
    3,
    7,
    2e-3,
  )
  assert run.data.tokenizer == "byte"


def test_what_is_not_finite_is_null(tmp_path):
  results = {"part": "rate", "date": "2026-01-02T03:04", "x": [math.inf, {"y": math.nan}, 1 / 3]}
  path = files.save(results, tmp_path)
  assert path.name == "stability-rate-2026-01-02.json"
  assert json.loads(path.read_text())["x"] == [None, {"y": None}, 0.333333]
  files.save(results | {"date": "2025-12-31", "x": 0}, tmp_path)
  assert files.newest("rate", tmp_path)["x"] != 0
  assert files.newest("update", tmp_path) is None


def test_numbers_have_three_digits():
  assert [words.number(v) for v in (None, 0.012345, 12.345, 12345.6)] == [
    "-",
    "0.0123",
    "12.3",
    "12,346",
  ]


def test_the_page_is_what_its_results_say():
  """Nothing on it is written by hand, and every picture is there."""
  found = page.results_of()
  assert set(found) == set(page.PARTS)
  assert (files.DOCS / "stability.md").read_text(encoding="utf-8") == page.text(found)
  for part in found:
    assert (files.DOCS / f"stability-{part}.png").stat().st_size > 10_000


def test_pictures_can_be_drawn_anew(tmp_path):
  found = page.results_of()
  page.write({"gradients": found["gradients"]}, tmp_path)
  assert (tmp_path / "stability-gradients.png").exists()


def test_the_readmes_picture_fits_light_and_dark_pages(tmp_path, monkeypatch):
  """Of two parts' results; its ground is the page's, and its ink can be read on it."""
  found = page.results_of()
  for module in (update, propagation):
    monkeypatch.setattr(module, "draw", lambda results, path: None)
  page.write({part: found[part] for part in glance.PARTS}, tmp_path)
  for theme, colours in glance.THEMES.items():
    drawn = matplotlib.image.imread(tmp_path / f"depth-{theme}.png")[..., :3]
    ground, ink = (np.array(to_rgb(colours[name])) for name in ("page", "ink"))
    assert np.abs(drawn[[0, 0, -1, -1], [0, -1, 0, -1]] - ground).max() < 0.01
    assert np.abs(ground - ink).min() > 0.7
    assert (np.abs(drawn - ink).max(-1) < 0.02).sum() > 2000
    there = matplotlib.image.imread(files.DOCS / f"depth-{theme}.png")
    assert there.shape[:2] == drawn.shape[:2]
