"""The papers' claims about depth, measured: `python -m benchmarks.stability`."""

import argparse
from collections.abc import Callable

from benchmarks.stability import files, training


def _training(args: argparse.Namespace, keep: Callable[[dict], object]) -> None:
  rates = [float(rate) for rate in args.training_rates.split(",")]
  training.measure(training.Setup(), keep, rates=rates, processes=args.processes)


PARTS = {"training": _training}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--parts", default=",".join(PARTS), help="separated by commas")
  parser.add_argument("--processes", type=int, default=1, help="trainings at a time")
  parser.add_argument("--training_rates", default="1e-3,4e-3", help="separated by commas")
  args = parser.parse_args()
  for part in args.parts.split(","):
    head = files.head(part)
    PARTS[part](args, lambda results, head=head: files.save(head | results))


if __name__ == "__main__":
  main()
