"""The command that says whether a config's model will train: figures, picture, and mistakes."""

import dataclasses
import functools
import json
import math
import pathlib
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from magneto_jax import diagnose, reporting
from magneto_jax.config import ConfigError, TrainConfig, from_config_dict
from magneto_jax.theory.recipes import RECIPES

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIZES = {"layers": 2, "width": 16, "heads": 2, "ffn_width": 32, "positions": "rotary"}
TINY = {"tokenizer": "byte", "seq_length": 16}


def command(*flags, cwd) -> subprocess.CompletedProcess:
  """`python -m magneto_jax.diagnose`, as a person starts it."""
  line = [sys.executable, "-m", "magneto_jax.diagnose", *flags]
  return subprocess.run(line, capture_output=True, text=True, cwd=cwd, timeout=600)


def config_file(directory: pathlib.Path) -> str:
  """A config of a byte tokenizer and a width of 16."""
  lines = [
    "from magneto_jax.config import default_config",
    "def get_config():",
    "  config = default_config()",
    *(f"  config.model.{name} = {value!r}" for name, value in SIZES.items()),
    *(f"  config.data.{name} = {value!r}" for name, value in TINY.items()),
    "  config.batch_size = 2",
    "  return config",
  ]
  path = directory / "tiny_config.py"
  path.write_text("\n".join(lines) + "\n")
  return f"--config={path}"


def config(**model) -> TrainConfig:
  return from_config_dict({"model": SIZES | model, "data": TINY, "batch_size": 2})


def refuse(constant):
  raise ValueError(f"{constant} is no JSON")


def read(directory: pathlib.Path) -> dict:
  text = (directory / "diagnosis.json").read_text()
  return json.loads(text, parse_constant=refuse)


def check_picture(path: pathlib.Path) -> None:
  """Four panels: 2 x 2 of 5.4 by 4 inches at 120 dots each, and the legend; not blank."""
  pixels = matplotlib.image.imread(path)
  assert pixels.shape[:2] == (round((2 * 4.0 + 0.9) * 120), round(2 * 5.4 * 120))
  assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20
  # Each quarter holds a panel.
  for half in np.array_split(pixels[..., :3], 2):
    for quarter in np.array_split(half, 2, axis=1):
      assert (quarter < 0.5).any(axis=-1).mean() > 0.002


@pytest.mark.slow
def test_the_command_prints_and_leaves_what_it_found(tmp_path):
  """Two recipes, another depth: what the JSON holds is what the table shows."""
  output = tmp_path / "new" / "folder"
  flags = (config_file(tmp_path), "--recipes=pre_ln, deepnet", "--layers=1", f"--output={output}")
  result = command(*flags, cwd=tmp_path)
  assert result.returncode == 0 and not result.stderr, result.stderr
  check_picture(output / "diagnosis.png")
  written = read(output)
  assert [d["recipe"] for d in written["diagnoses"]] == ["pre_ln", "deepnet"]
  assert written["config"]["model"]["layers"] == 1
  assert written["versions"] == reporting.versions()
  rows = {line.split()[0]: line for line in result.stdout.splitlines() if "(" in line}
  for found in written["diagnoses"]:
    (stack,) = found["stacks"].values()
    figure = lambda of, field, i, stack=stack: stack[of][field][i]
    assert len(stack["measured"]["variance"]) == 2
    shown = rows[found["recipe"]]
    for field in ("variance", "correlation"):
      both = [figure(of, field, -1) for of in ("measured", "predicted")]
      assert f"{both[0]:.3g} ({both[1]:.3g})" in shown
    assert f"{max(stack['measured']['largest']):.3g}" in shown
    update = found["first_update"]
    ratios = update["matrices_over_baseline"], update["predicted_matrices_over_baseline"]
    assert f"{ratios[0]:.3g} ({ratios[1]:.3g})" in shown
    assert found["verdict"] in result.stdout
  assert "1 (1)" in rows["pre_ln"]
  first = written["recommended"].splitlines()[0]
  assert f"recommended: {first}" in result.stdout
  assert "measured in" in result.stdout


MISTAKES = {
  "recipe": (["--recipes=pre_ln,preln"], "--recipes: 'preln' must be one of all, pre_ln,"),
  "layers": (["--layers=0"], "layers"),
  "no number": (["--layers=many"], "layers"),
  "flag": (["--recipe=pre_ln"], "unknown flag --recipe"),
  "width": (["--config.model.width=15"], "width"),
}


@pytest.mark.parametrize(
  "name", [n if n == "recipe" else pytest.param(n, marks=pytest.mark.slow) for n in MISTAKES]
)
def test_a_mistake_ends_in_one_line(name, tmp_path):
  flags, message = MISTAKES[name]
  result = command(config_file(tmp_path), *flags, cwd=tmp_path)
  assert result.returncode == 2, result.stderr
  assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
  assert message in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--config=nowhere.py",)])
def test_a_missing_config_ends_in_one_line(flags, tmp_path):
  result = command(*flags, cwd=tmp_path)
  assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
  assert "config" in result.stderr


@pytest.mark.slow
def test_an_output_that_cannot_be_written_ends_in_one_line(tmp_path):
  """And before anything is measured, which may take minutes."""
  (tmp_path / "file").write_text("")
  flags = (config_file(tmp_path), "--layers=1", f"--output={tmp_path / 'file'}")
  result = command(*flags, cwd=tmp_path)
  assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
  assert str(tmp_path / "file") in result.stderr
  assert not result.stdout


@pytest.mark.slow
def test_all_recipes_are_compared(tmp_path):
  output = tmp_path / "out"
  flags = (config_file(tmp_path), "--recipes=all", "--layers=3", f"--output={output}")
  result = command(*flags, cwd=tmp_path)
  assert result.returncode == 0, result.stderr
  assert [d["recipe"] for d in read(output)["diagnoses"]] == list(RECIPES)
  check_picture(output / "diagnosis.png")


@pytest.mark.slow
def test_width_alone_is_a_valid_override(tmp_path):
  """Of configs/gpt.py:tiny: heads and the feed-forward width follow."""
  flags = ("--config=configs/gpt.py:tiny", "--config.model.width=64", "--layers=1")
  result = command(*flags, f"--output={tmp_path / 'out'}", cwd=ROOT)
  assert result.returncode == 0, result.stderr
  model = read(tmp_path / "out")["config"]["model"]
  assert (model["width"], model["layers"]) == (64, 1)
  assert 64 % model["heads"] == 0 and model["ffn_width"] == 4 * 64


# ---------------------------------------------------------------------------------------------
# Parts of the command
# ---------------------------------------------------------------------------------------------


def test_recipes_are_named():
  assert diagnose.chosen("all") == tuple(RECIPES)
  assert diagnose.chosen("") == ()
  assert diagnose.chosen(" deepnet,pre_ln ,") == ("deepnet", "pre_ln")
  # A recipe that is named twice is measured once.
  assert diagnose.chosen("pre_ln,deepnet,pre_ln") == ("pre_ln", "deepnet")
  with pytest.raises(ConfigError, match="--recipes: 'none' must be one of all, pre_ln"):
    diagnose.chosen("pre_ln,none")


def test_a_variant_keeps_all_but_recipe_and_depth():
  given = config(width=32, unroll=2)
  own = diagnose.variant(given, given.recipe, 7)
  assert (own.model.layers, own.model.width, own.model.remat, own.model.unroll) == (
    7,
    32,
    "full",
    1,
  )
  assert own.recipe_options == given.recipe_options
  assert diagnose.variant(given, "keel", 7).recipe == "keel"


@functools.cache
def unsound() -> diagnose.Diagnoses:
  """Of made-up figures: a recipe whose gradient explodes and one that is sound."""
  from magneto_jax import diagnostics
  from magneto_jax.theory import propagation, stability

  flat = np.ones(3)
  measured = lambda gradient: diagnostics.Measured(flat, 0.1 * flat, gradient, 0 * flat, flat, 4)
  profile = propagation.Profile(flat, 0.1 * flat, flat, 0 * flat, 1.0, 1.0)
  found = []
  for name, gradient, largest in (
    ("post_ln", np.array([1e12, 1e12, 1.0]), 1.0),
    ("pre_ln", flat, 1.0),
    ("keel", flat, 1e9),
  ):
    own = {"decoder": measured(gradient)._replace(largest=largest * flat)}
    findings = diagnostics.findings_of(own)
    update = propagation.Update(1.0, 2.0)
    figures = (own, {"decoder": profile}, update, update, 1.0, 1.0, findings, ("a note",))
    found.append(diagnostics.Diagnosis(name, *figures))
  given = config(layers=2)
  architecture = stability.records.Architecture("decoder", 0, 2, width=16, ffn_width=32, heads=2)
  recommendation = stability.recommend(architecture, length=16)
  bounds = {name: propagation.Bound(math.nan, "no bound") for name in ("post_ln", "pre_ln", "keel")}
  return diagnose.Diagnoses(given, tuple(found), bounds, recommendation, 61.0)


def test_a_verdict_names_what_breaks_and_what_would_mend_it():
  found = unsound()
  bad, good, large = (diagnose.verdict(d, found) for d in found.diagnoses)
  assert bad.startswith("post_ln: unstable: the gradient explodes towards the input")
  assert "; sound at this depth: " in bad and "post_ln" not in bad.split("depth: ")[1]
  assert good == "pre_ln: stable at its start: no figure is beyond its limit"
  assert large.startswith("keel: runs out of float16: ") and "sound at" not in large


def test_a_report_holds_table_verdicts_notes_and_time(capsys, tmp_path):
  diagnose.report(unsound())
  text = capsys.readouterr().out
  for part in ("post_ln: unstable", "note, keel: a note", "recommended: take ", "1 min 01 s"):
    assert part in text
  # The gradient's norm at the first layer over the last one's: 1e6.
  assert "1e+06 (1)" in text
  diagnose.leave(unsound(), tmp_path)
  assert [d["findings"][0]["figure"] for d in read(tmp_path)["diagnoses"] if d["findings"]] == [
    "gradient",
    "float16",
  ]
  check_picture(tmp_path / "diagnosis.png")


def test_a_report_tells_of_a_small_first_update(capsys):
  """That of the recipe which is recommended."""
  found = unsound()
  candidates = [c for c in found.recommendation.candidates if c.name == "deepnet"]
  own = found.recommendation._replace(candidates=tuple(candidates))
  diagnose.report(dataclasses.replace(found, recommendation=own))
  said = capsys.readouterr().out
  assert "recommended: take deepnet: " in said and f"note: {own.caution}" in " ".join(said.split())
  diagnose.report(found)
  assert "not speed of training" not in capsys.readouterr().out


def test_a_model_of_two_stacks_is_refused_in_a_line():
  data = {"tokenizer": "byte", "seq_length": 256, "too_long": "skip"}
  pairs = from_config_dict({"task": "translation", "model": SIZES, "data": data})
  with pytest.raises(ConfigError, match="'translation' has encoder and decoder: train with") as e:
    diagnose.diagnose(pairs)
  assert "\n" not in str(e.value)
