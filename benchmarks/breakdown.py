"""Where the time of a train step goes: `python -m benchmarks.breakdown`."""

import os
import statistics

from benchmarks import coordinator
from benchmarks.shapes import SHAPES

PARTS = ("step", "gradient", "forward", "layers_gradient", "attention_gradient", "optimizer")


def measure(shape, *, rounds: int, calls: int, threads: int, variables) -> dict:
  """Every round's turn of each part, from one process."""
  with coordinator.loaded(["magneto_jax"], shape, threads, variables) as (processes, _):
    process = processes["magneto_jax"]
    for part in PARTS:
      process.ask(do="turn", call=part, count=1, options={})
    return {part: [coordinator.turn(process, part, calls) for _ in range(rounds)] for part in PARTS}


def summary(results: dict, layers: int) -> dict[str, dict[str, float]]:
  """Median milliseconds of what a step consists of, and their share of it."""
  times = {
    part: statistics.median(ms for turn in turns for ms in turn["wall_ms"])
    for part, turns in results.items()
  }
  attention = layers * times["attention_gradient"]
  parts = {
    "embedding, output and loss": times["gradient"] - times["layers_gradient"],
    "attention, without its projections": attention,
    "the other parts of the layers": times["layers_gradient"] - attention,
    "optimizer": times["optimizer"],
  }
  parts["not accounted for"] = times["step"] - sum(parts.values())
  rows = {"step": times["step"], "of which forward": times["forward"]} | parts
  return {name: {"ms": ms, "share": ms / times["step"]} for name, ms in rows.items()}


def main() -> None:
  parser = coordinator.parser(__doc__, variants=("magneto_jax",), shape="gpt-tiny", rounds=5)
  parser.add_argument("--calls", type=int, default=3, help="timed calls a turn")
  args = parser.parse_args()
  shape = SHAPES[args.shape]
  variables = coordinator.environment(args.threads, huge_pages=args.huge_pages)
  head = coordinator.record("breakdown", args, shape, variables)
  results = measure(
    shape, rounds=args.rounds, calls=args.calls, threads=args.threads, variables=variables
  )
  figures = summary(results, shape.layers)
  path = coordinator.save(head | {"summary": figures, "parts": results}, args)
  rows = [[name, f"{row['ms']:.0f}", f"{row['share']:.0%}"] for name, row in figures.items()]
  notes = [
    "parts are compiled and timed by themselves, forward and backward: their sum is not exact",
    f"{args.shape}; load average now {os.getloadavg()[0]:.1f}; written to {path}",
  ]
  coordinator.show(["part", "ms", "share"], rows, notes)


if __name__ == "__main__":
  main()
