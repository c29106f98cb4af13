"""Will it train? `python -m magneto_jax.diagnose --config=configs/gpt.py:tiny --output=DIR`.

Builds the config's model, measures it at its start on a batch of its own data, and lays the figures
beside what the theory says of the recipe: stream, token correlation and gradient layer by layer,
and the first update. `--recipes=all` (or names, separated by commas) compares recipes, `--layers`
changes the depth. DIR gets `diagnosis.png` and `diagnosis.json`.
"""

import dataclasses
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import rich.table
from absl import flags

from magneto_jax import cli, diagnostics, reporting
from magneto_jax.config import ConfigError, RecipeConfig, TrainConfig, config_errors
from magneto_jax.data import files
from magneto_jax.tasks import TASKS
from magneto_jax.theory import propagation, stability
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.recipes import options as options_of


def main() -> None:
  """Defines the flags and runs the command."""
  config = cli.define_config_flag()
  recipes = flags.DEFINE_string("recipes", "", "Recipes, separated by commas, or all.")
  layers = flags.DEFINE_integer("layers", None, "Another number of layers.", lower_bound=1)
  output = flags.DEFINE_string("output", "", "Where diagnosis.png and diagnosis.json go.")

  cli.run(
    lambda: run(
      cli.typed_config(config), recipes=recipes.value, layers=layers.value, output=output.value
    )
  )


def run(
  config: TrainConfig | Mapping[str, Any] | str | os.PathLike,
  *,
  recipes: str | Sequence[str] = (),
  layers: int | None = None,
  output: str | os.PathLike = "",
) -> "Diagnoses":
  """Measures the config's model and prints the verdicts: the command, from Python or a notebook.

  Args:
    config: a record, a ConfigDict, or a config file with its variant; see `cli.config_of`.
    recipes: names, or "all"; the config's own by default.
    layers: another depth.
    output: a folder for diagnosis.png and diagnosis.json; empty: none.

  Returns:
    What `diagnose` does.

  Raises:
    ConfigError: in a line, if the data cannot be had, or a model not be built.

  Example:
    >>> magneto_jax.diagnose.run("configs/gpt.py:tiny", recipes=["magneto", "post_ln"], layers=48)
  """
  with cli.errors_in_a_line():
    given, names = cli.config_of(config), chosen(recipes)
    if output:
      # A folder that cannot be made is told before minutes are spent.
      pathlib.Path(output).mkdir(parents=True, exist_ok=True)
    found = diagnose(given, recipes=names, layers=layers)
    report(found)
    if output:
      leave(found, pathlib.Path(output))
  return found


def chosen(names: str | Sequence[str]) -> tuple[str, ...]:
  """The recipes of these names, or of a text with commas between them; none: the config's own."""
  parts = names.split(",") if isinstance(names, str) else names
  listed = tuple(name.strip() for name in parts if name.strip())
  if "all" in listed:
    return tuple(RECIPES)
  for name in listed:
    if name not in RECIPES:
      raise ConfigError(f"--recipes: {name!r} must be one of all, {', '.join(RECIPES)}")
  return tuple(dict.fromkeys(listed))


def variant(config: TrainConfig, recipe: str, layers: int) -> TrainConfig:
  """The config with another recipe and depth, its layers scanned and recomputed."""
  # Of the options that are given a recipe takes those it has.
  taken = {
    name: value
    for name, value in dataclasses.asdict(config.recipe_options).items()
    if name in options_of(recipe)
  }
  options = RecipeConfig(**taken)
  model = dataclasses.replace(config.model, layers=layers, remat="full", unroll=1)
  return dataclasses.replace(config, recipe=recipe, recipe_options=options, model=model)


@dataclasses.dataclass(frozen=True)
class Diagnoses:
  """What the command found.

  Attributes:
    config: as it was given, with the depth that was measured.
    diagnoses: one a recipe.
    bounds: the papers' bounds of each recipe's first update; see `propagation.update_bound`.
    recommendation: what the theory recommends for this architecture.
    seconds: how long it took.
  """

  config: TrainConfig
  diagnoses: tuple[diagnostics.Diagnosis, ...]
  bounds: dict[str, propagation.Bound]
  recommendation: stability.Recommendation
  seconds: float

  @property
  def title(self) -> str:
    model = self.config.model
    return f"{model.layers} layers of width {model.width} at their start, {self.config.data.name}"


def diagnose(
  config: TrainConfig, *, recipes: tuple[str, ...] = (), layers: int | None = None
) -> Diagnoses:
  """Measures the config's model, once with each recipe.

  Args:
    config: a run's.
    recipes: names; the config's own by default.
    layers: another depth.

  Raises:
    ConfigError: if the data cannot be had, or a model not be built.
  """
  started = time.perf_counter()
  depth = layers or config.model.layers
  config = variant(config, config.recipe, depth)
  task = TASKS[config.task]
  with tempfile.TemporaryDirectory() as scratch, config_errors():
    data = task.load_data(config, pathlib.Path(scratch), None)
    facts = task.facts(data)
    parts = diagnostics.parts_of(task.build_model(config, facts))
    if len(parts) != 1:
      raise ConfigError(
        f"this command compares models of one stack, and config.task={config.task!r} has"
        f" {' and '.join(parts)}: train with config.diagnostics_every, or call"
        " magneto_jax.diagnostics.diagnose"
      )
    batch = diagnostics.first_samples(data, config.batch_size, task.length(config))

    def measured(recipe: str, layers: int, **options) -> diagnostics.Diagnosis:
      model = task.build_model(variant(config, recipe, layers), facts)
      calls = diagnostics.calls_of(task, model)
      return diagnostics.examine(model, calls, batch, name=recipe, seed=config.seed, **options)

    shallow = measured("pre_ln", stability.SHALLOW)
    found = tuple(measured(name, depth, baseline=shallow) for name in recipes or (config.recipe,))
    # The text's own correlation, as it was measured before the embedding's dropout.
    ((kind, first),) = shallow.measured.items()
    correlation = first.correlation[0] / (1 - config.model.dropout)
    architecture = task.architecture(config, facts)
    if 0 < correlation <= 1:
      architecture = dataclasses.replace(architecture, token_correlation=float(correlation))
    part = parts[kind]
    setting = dataclasses.asdict(diagnostics.setting_of(part, first.tokens))
    # What the architecture says itself.
    for name in ("width", "ffn_width", "heads", "dropout", "is_causal", "memory_length"):
      del setting[name]
    bounds = {
      d.name: propagation.update_bound(RECIPES[d.name](architecture), architecture) for d in found
    }
    recommendation = stability.recommend(architecture, **setting)
  return Diagnoses(config, found, bounds, recommendation, time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------
# What a person reads
# ---------------------------------------------------------------------------------------------


def _pair(measured: float, predicted: float) -> str:
  return f"{measured:.3g} ({predicted:.3g})"


def table(found: Diagnoses) -> rich.table.Table:
  """A row for each stack: the figures at its end, measured and, in brackets, predicted."""
  result = rich.table.Table(
    title=f"{found.title}: measured (predicted)", title_justify="left", box=None, pad_edge=False
  )
  result.add_column("recipe")
  for column in (
    "stream variance",
    "token correlation",
    "gradient norm, first layer / last",
    "largest value",
    "first update / Pre-LN's of 6 layers",
  ):
    result.add_column(column, justify="right")
  for diagnosis in found.diagnoses:
    for kind, m in diagnosis.measured.items():
      p = diagnosis.predicted[kind]
      ratio = [stability.first_over_last(profile.gradient) for profile in (m, p)]
      name = diagnosis.name if len(diagnosis.measured) == 1 else f"{diagnosis.name}, {kind}"
      result.add_row(
        name,
        _pair(m.variance[-1], p.variance[-1]),
        _pair(m.correlation[-1], p.correlation[-1]),
        _pair(*ratio),
        f"{m.largest.max():.3g}",
        _pair(diagnosis.update_ratio, diagnosis.predicted_update_ratio),
      )
  return result


def verdict(diagnosis: diagnostics.Diagnosis, found: Diagnoses) -> str:
  """Stable, or what breaks where and which recipe would mend it."""
  if not diagnosis.findings:
    return f"{diagnosis.name}: stable at its start: no figure is beyond its limit"
  unsound = {d.name for d in found.diagnoses if d.findings}
  sound = [c.name for c in found.recommendation.candidates if not c.findings]
  others = [name for name in sound if name not in unsound][:3]
  texts = "; ".join(finding.text for finding in diagnosis.findings)
  broken = {finding.figure for finding in diagnosis.findings}
  word = "runs out of float16" if broken == {"float16"} else "unstable"
  mend = f"; sound at this depth: {', '.join(others)}" if others and word == "unstable" else ""
  return f"{diagnosis.name}: {word}: {texts}{mend}"


def report(found: Diagnoses) -> None:
  """Prints the table and the verdicts."""
  console = reporting.make_console()
  console.print(table(found))
  lines = ["", *(verdict(d, found) for d in found.diagnoses)]
  notes = dict.fromkeys(f"note, {d.name}: {note}" for d in found.diagnoses for note in d.notes)
  lines += [*notes, f"recommended: {found.recommendation}".splitlines()[0]]
  if found.recommendation.caution:
    lines.append(f"note: {found.recommendation.caution}")
  lines.append(f"measured in {reporting.duration(found.seconds)}")
  reporting.say(console, lines)


def leave(found: Diagnoses, directory: pathlib.Path) -> None:
  """Writes the picture and the figures."""
  directory.mkdir(parents=True, exist_ok=True)
  diagnostics.draw(found.diagnoses, directory / "diagnosis.png", title=found.title)
  values = {
    "config": dataclasses.asdict(found.config),
    "diagnoses": [
      {
        **d.as_json(),
        "update_bound": diagnostics.jsonable(found.bounds[d.name]._asdict()),
        "verdict": verdict(d, found),
      }
      for d in found.diagnoses
    ],
    "recommended": str(found.recommendation),
    "seconds": found.seconds,
    "versions": reporting.versions(),
  }
  text = json.dumps(values, indent=1, allow_nan=False) + "\n"
  files.write_durably(directory / "diagnosis.json", text.encode())


if __name__ == "__main__":
  main()
