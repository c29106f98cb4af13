"""Evaluates a run: `python -m magneto_jax.evaluate --workdir=DIR [--split=test]`.

By the metrics of its task, on any split of its data; with `--choices=FILE.jsonl` by its accuracy in
multiple choice. See docs/evaluate.md.
"""

import json
import pathlib
from typing import Any

import rich.table
from absl import flags

from magneto_jax import cli, distributed, evaluation, multiple_choice, reporting
from magneto_jax.config import ConfigError
from magneto_jax.data import files


def main() -> None:
  """Defines the flags and runs the command."""
  workdir = cli.define_workdir_flag("A workdir that train has filled, or is filling.")
  split = flags.DEFINE_string("split", "validation", "What to evaluate on: test, train, ...")
  asked = flags.DEFINE_string("choices", "", "A JSONL file of questions, or a TFDS data set.")
  step = cli.define_step_flag()
  rows = flags.DEFINE_integer(
    "batch_size", None, "Rows at a time; by default as many as a train step holds.", lower_bound=1
  )
  output = flags.DEFINE_string("output", "", "A file for the results, as JSON.")
  changes = cli.define_changes_flag()
  run_task_file = cli.define_task_file_flag()
  join_hosts = cli.define_hosts_flags()

  def run() -> None:
    join_hosts()
    run_task_file()
    if not split.value:
      raise ConfigError("--split must name a part of the data, e.g. --split=test")
    if output.value and pathlib.Path(output.value).is_dir():
      raise ConfigError(f"--output={output.value} is a folder: name a file")
    opened = evaluation.open_run(
      workdir.value, step=step.value, batch_size=rows.value, changes=changes()
    )
    console = reporting.make_console(quiet=not distributed.is_first())
    on = asked.value or f"the split {split.value!r}"
    line = f"evaluating step {opened.step:,} of {opened.workdir} on {on}"
    console.print(line, highlight=False, soft_wrap=True, markup=False)
    if asked.value:
      result = multiple_choice.evaluate(opened, asked.value, split.value)
    else:
      result = evaluation.evaluate(opened, split.value)
    if distributed.is_first():
      report(result)
      if output.value:
        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
        files.write_durably(output.value, text.encode())

  cli.run(run)


def table(result: dict[str, Any]) -> rich.table.Table:
  """A row for each metric; of an accuracy with its standard error."""
  metrics = result["metrics"]
  errors = {n.replace("standard_error", "accuracy"): e for n, e in metrics.items() if _error(n)}
  shown = rich.table.Table(box=None, pad_edge=False)
  shown.add_column("metric")
  shown.add_column("value", justify="right")
  if errors:
    shown.add_column("standard error", justify="right")
  for name, value in metrics.items():
    if not _error(name):
      error = [f"{errors[name]:.4f}" if name in errors else ""] if errors else []
      shown.add_row(reporting.words_of(name), f"{value:,.4f}", *error)
  return shown


def _error(name: str) -> bool:
  return name.startswith("standard_error_")


def title(result: dict[str, Any]) -> str:
  """What was evaluated, in a line."""
  where = result.get("choices") or f"the split {result['split']!r}"
  counts = result["counts"] | {"bad_records": result.get("bad_records", 0)}
  what = ", ".join(f"{n:,} {reporting.words_of(name)}" for name, n in counts.items() if n)
  return f"{result['workdir']}, step {result['step']:,}, on {where}: {what}"


def report(result: dict[str, Any]) -> None:
  """Prints what was evaluated, what that took, the table, and how what is in it is computed."""
  console = reporting.make_console()
  took = f"{reporting.duration(result['seconds'])} on {result['devices']} x {result['device']}"
  console.print(f"{title(result)}, in {took}\n", highlight=False, soft_wrap=True, markup=False)
  console.print(table(result))
  for metric, signature in result.get("signatures", {}).items():
    line = f"{reporting.words_of(metric)}: {signature}"
    console.print(line, highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
  main()
