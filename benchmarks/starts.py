"""What comparisons of starts share: a config trained by the real command, from a run and from
scratch, with the same seeds, learning rates, steps and batches."""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence

from benchmarks import coordinator


def parser(doc: str, *, flag: str, rates: str) -> argparse.ArgumentParser:
  """The arguments that such a comparison has; `flag` names the run to start from."""
  made = argparse.ArgumentParser(description=doc.splitlines()[0])
  made.add_argument(flag, type=pathlib.Path, required=True, help="the run to start from")
  made.add_argument("--seeds", default="0,1,2", help="separated by commas")
  made.add_argument("--learning_rates", default=rates, help="likewise")
  made.add_argument("--steps", type=int, help="of every run; those of the config by default")
  made.add_argument("--output", type=pathlib.Path, help="a JSON file; default: in results/")
  return made


def summary_of(parser, flag: str, folder: pathlib.Path, task: str, config: str) -> dict:
  """summary.json of the run to start from; if it is none of that task, the command ends."""
  path = folder / "summary.json"
  if not path.exists():
    parser.error(f"{flag}={folder} holds no finished run: train {config} there")
  summary = json.loads(path.read_text())
  if summary["task"] != task:
    parser.error(f"{flag}={folder} holds a run of task {summary['task']}, not {task}")
  return summary


def budget(args: argparse.Namespace) -> list[str]:
  """The flags of the steps that are asked for, which all starts have."""
  return [] if args.steps is None else [f"--config.steps={args.steps}"]


def numbers(args: argparse.Namespace) -> tuple[list[int], list[float]]:
  """The seeds and the learning rates that are asked for."""
  split = lambda text, kind: [kind(part) for part in text.split(",")]
  return split(args.seeds, int), split(args.learning_rates, float)


def train(
  config: str,
  metric: str,
  workdir: pathlib.Path,
  seeds: Sequence[int],
  learning_rate: float,
  flags: Sequence[str],
) -> dict:
  """What `seeds.json` says of a metric of the test part: values, mean, deviation.

  Raises:
    SystemExit: if the command fails; its own words are on the terminal.
  """
  asked = [f"--config={config}", f"--workdir={workdir}", f"--seeds={','.join(map(str, seeds))}"]
  asked += [f"--config.optimizer.learning_rate={learning_rate}"]
  asked += ["--config.data.validation_split=test", *flags]
  coordinator.command("magneto_jax.train", asked)
  return json.loads((workdir / "seeds.json").read_text())["metrics"][f"validation_{metric}"]


def seconds_of(workdir: pathlib.Path, seeds: Sequence[int]) -> float:
  """Mean seconds of training of the seeds' runs."""
  summaries = (json.loads((workdir / f"seed_{s}" / "summary.json").read_text()) for s in seeds)
  return sum(summary["training_seconds"] for summary in summaries) / len(seeds)


def compare(
  config: str,
  metric: str,
  starts: Mapping[str, Sequence[str]],
  scratch: pathlib.Path,
  seeds: Sequence[int],
  rates: Sequence[float],
) -> list[dict]:
  """All starts, by name with their flags, at each learning rate; `metric` is a key of the rows."""
  rows = []
  for rate in rates:
    for start, flags in starts.items():
      workdir = scratch / f"{start}_{rate:g}"
      found = train(config, metric, workdir, seeds, rate, flags)
      seconds = seconds_of(workdir, seeds)
      rows.append(
        {"start": start, "learning_rate": rate, metric: found, "training_seconds": seconds}
      )
  return rows


def at_the_edge(rows: Sequence[Mapping], metric: str) -> list[str]:
  """A line for each start whose best rate is the least or the largest of several that were tried.

  More of the metric is better. What such a start can reach is not known.
  """
  found = []
  for start in dict.fromkeys(row["start"] for row in rows):
    own = [row for row in rows if row["start"] == start]
    rates = sorted(row["learning_rate"] for row in own)
    best = max(own, key=lambda row: row[metric]["mean"])["learning_rate"]
    if len(rates) > 1 and best in (rates[0], rates[-1]):
      edge = "largest" if best == rates[-1] else "least"
      found.append(f"the best rate of {start}, {best:g}, is the {edge} that was tried: try more")
  return found


def cells(row: Mapping, metric: str) -> list[str]:
  """A row of a table: start, rate, mean, deviation, each seed's, seconds; see `columns`."""
  found = row[metric]
  return [
    row["start"],
    f"{row['learning_rate']:g}",
    f"{found['mean']:.4f}",
    "-" if found["std"] is None else f"{found['std']:.4f}",
    ", ".join(f"{value:.4f}" for value in found["values"]),
    f"{row['training_seconds']:.0f}",
  ]


def columns(metric: str) -> list[str]:
  """The names of `cells`."""
  return ["start", "learning rate", f"test {metric}", "deviation", "of each seed", "seconds"]
