"""Fine-tuning from a masked image model, beside training from scratch with the same budget.

`python -m benchmarks.masked_image_finetuning --beit=DIR` takes the run of configs/beit.py:tiny in
DIR, and trains configs/beit.py:finetune_tiny with several seeds from it and from scratch: the same
steps of the same batches. From scratch all layers have the same learning rate (no layer_decay), and
of `--learning_rates` each is tried in both. Accuracies are of the test part, after the last step,
which nothing is chosen by; the pre-training is not counted in the budget, and is told beside it.
"""

import argparse
import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from benchmarks import coordinator

_CONFIG = "configs/beit.py:finetune_tiny"


def train(
  workdir: pathlib.Path, seeds: Sequence[int], learning_rate: float, flags: Sequence[str]
) -> dict:
  """What `seeds.json` says of the test part's accuracy: values, mean, deviation.

  Raises:
    SystemExit: if the command fails; its own words are on the terminal.
  """
  asked = [f"--config={_CONFIG}", f"--workdir={workdir}", f"--seeds={','.join(map(str, seeds))}"]
  asked += [f"--config.optimizer.learning_rate={learning_rate}"]
  asked += ["--config.data.validation_split=test", *flags]
  coordinator.command("magneto_jax.train", asked)
  return json.loads((workdir / "seeds.json").read_text())["metrics"]["validation_accuracy"]


def seconds_of(workdir: pathlib.Path, seeds: Sequence[int]) -> float:
  """Mean seconds of training of the seeds' runs."""
  summaries = (json.loads((workdir / f"seed_{s}" / "summary.json").read_text()) for s in seeds)
  return sum(summary["training_seconds"] for summary in summaries) / len(seeds)


def compare(
  beit: pathlib.Path, scratch: pathlib.Path, seeds: Sequence[int], rates: Sequence[float]
) -> list[dict]:
  """Both starts at each learning rate."""
  starts = {
    "masked_image": [f"--config.init_from={beit}"],
    "scratch": ["--config.optimizer.layer_decay=1.0"],
  }
  rows = []
  for rate in rates:
    for start, flags in starts.items():
      workdir = scratch / f"{start}_{rate:g}"
      accuracy = train(workdir, seeds, rate, flags)
      seconds = seconds_of(workdir, seeds)
      rows.append(
        {"start": start, "learning_rate": rate, "accuracy": accuracy, "training_seconds": seconds}
      )
  return rows


def show(results: dict) -> None:
  """Prints the table."""
  rows = [
    [
      row["start"],
      f"{row['learning_rate']:g}",
      f"{row['accuracy']['mean']:.4f}",
      "-" if row["accuracy"]["std"] is None else f"{row['accuracy']['std']:.4f}",
      ", ".join(f"{value:.4f}" for value in row["accuracy"]["values"]),
      f"{row['training_seconds']:.0f}",
    ]
    for row in results["rows"]
  ]
  columns = ["start", "learning rate", "test accuracy", "deviation", "of each seed", "seconds"]
  before = results["pretraining"]
  coordinator.show(columns, rows, [f"pre-training: {before['training_seconds']:.0f} s more"])


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--beit", type=pathlib.Path, required=True, help="the masked image run")
  parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
  parser.add_argument("--learning_rates", default="7.5e-4,1.5e-3,3e-3", help="likewise")
  parser.add_argument("--output", type=pathlib.Path, help="a JSON file; default: in results/")
  args = parser.parse_args(arguments)
  path = args.beit / "summary.json"
  if not path.exists():
    parser.error(f"--beit={args.beit} holds no finished run: train configs/beit.py:tiny there")
  summary = json.loads(path.read_text())
  if summary["task"] != "masked_image":
    parser.error(f"--beit={args.beit} holds a run of task {summary['task']}, not masked_image")
  seeds = [int(seed) for seed in args.seeds.split(",")]
  rates = [float(rate) for rate in args.learning_rates.split(",")]
  results = coordinator.provenance("masked_image_finetuning", coordinator.README_VARIABLES)
  kept = ("training_seconds", "steps", "validation_masked_accuracy", "validation_commonest_token")
  kept += ("validation_codebook_perplexity", "versions")
  results |= {"config": _CONFIG, "seeds": seeds, "pretraining": {k: summary[k] for k in kept}}
  with tempfile.TemporaryDirectory() as scratch:
    results["rows"] = compare(args.beit.absolute(), pathlib.Path(scratch), seeds, rates)
  coordinator.save(results, args, "tiny")
  show(results)
  return 0


if __name__ == "__main__":
  sys.exit(main())
