"""Evaluates a run: `python -m magneto_jax.evaluate --workdir=DIR [--split=test]`.

By the metrics of its task, on any split of its data; with `--choices=FILE.jsonl` by its accuracy in
multiple choice. See docs/evaluate.md.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

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

  def start() -> None:
    join_hosts()
    run_task_file()
    run(
      workdir.value,
      split=split.value,
      choices=asked.value,
      step=step.value,
      batch_size=rows.value,
      output=output.value,
      changes=changes(),
    )

  cli.run(start)


def run(
  workdir: str | os.PathLike,
  *,
  split: str = "validation",
  choices: str = "",
  step: int | Literal["best"] | None = None,
  batch_size: int | None = None,
  output: str | os.PathLike = "",
  changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Evaluates a run and prints what came out: the command, from Python or a notebook.

  Args:
    workdir: of the run, which may go on meanwhile.
    split: of its data.
    choices: a JSONL file of questions, or a TFDS data set, in place of the data's own metrics.
    step: of the checkpoint; the newest by default; "best": see `runs.load`.
    batch_size: rows at a time; by default as many as a train step holds.
    output: a file for the results, as JSON; empty: none.
    changes: values of `evaluation.CHANGEABLE` fields, by dotted name, in place of the run's.

  Returns:
    What `output` holds: the metrics, and what they are of.

  Raises:
    ConfigError: in a line, if that cannot be evaluated.

  Example:
    >>> magneto_jax.evaluate.run("runs/tiny", split="test")["metrics"]
  """
  with cli.errors_in_a_line():
    if not split:
      raise ConfigError("--split must name a part of the data, e.g. --split=test")
    if output and pathlib.Path(output).is_dir():
      raise ConfigError(f"--output={output} is a folder: name a file")
    if output:
      # Better known now than when all is evaluated.
      folder = next(path for path in pathlib.Path(output).absolute().parents if path.exists())
      if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"--output={output}: {folder} is no folder that can be written")
    opened = evaluation.open_run(workdir, step=step, batch_size=batch_size, changes=changes)
    console = reporting.make_console(quiet=not distributed.is_first())
    on = choices or f"the split {split!r}"
    line = f"evaluating step {opened.step:,} of {opened.workdir} on {on}"
    reporting.say(console, [line])
    if choices:
      result = multiple_choice.evaluate(opened, choices, split)
    else:
      result = evaluation.evaluate(opened, split)
    if distributed.is_first():
      report(result)
      if output:
        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
        files.write_durably(output, text.encode())
  return result


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
  reporting.say(console, [f"{title(result)}, in {took}", ""])
  console.print(table(result))
  signatures = result.get("signatures", {})
  if signatures:
    reporting.say(console, [f"{reporting.words_of(name)}: {x}" for name, x in signatures.items()])


if __name__ == "__main__":
  main()
