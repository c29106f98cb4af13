"""The papers' claims about depth, measured: `python -m benchmarks.stability`."""

import argparse
from collections.abc import Callable

from benchmarks.stability import files, page, rate, text, training, update


def measure(part: str, keep: Callable[[dict], object], args: argparse.Namespace) -> None:
  """Runs one part; `keep` is given its results whenever there are more of them."""
  if part == "training":
    rates = [float(rate) for rate in args.training_rates.split(",")]
    training.measure(training.Setup(), keep, rates=rates, processes=args.processes)
  elif part == "rate":
    rate.measure(text.Setup(), keep, processes=args.processes)
  elif part == "update":
    update.measure(update.Setup(), keep, processes=args.processes)
  else:
    module, _ = page.PARTS[part]
    module.measure(module.Setup(), keep)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "--parts", default=",".join(page.PARTS), help="separated by commas; may be empty"
  )
  parser.add_argument("--processes", type=int, default=1, help="measurements at a time")
  parser.add_argument("--training_rates", default="1e-3,4e-3", help="separated by commas")
  args = parser.parse_args()
  for part in filter(None, args.parts.split(",")):
    head = files.head(part)
    measure(part, lambda results, head=head: files.save(head | results), args)
  print(f"written: {page.write(page.results_of())}")


if __name__ == "__main__":
  main()
