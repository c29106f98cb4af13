"""Time and memory of compiling a train step over depth: `python -m benchmarks.compile_time`."""

import dataclasses
import statistics

from benchmarks import coordinator
from benchmarks.shapes import SHAPES, Shape

REMAT = ("none", "dots", "full")


def compiled(shape: Shape, variables, variant: str = "magneto_jax", **options) -> dict:
  """What one fresh process answers; without the persistent cache (see `environment`)."""
  process = coordinator.Process(variables)
  try:
    shape = dataclasses.asdict(shape)
    return process.ask(do="compile", variant=variant, shape=shape, options=options)
  finally:
    process.close()


def measure(shape: Shape, depths: list[int], *, rounds: int, variables) -> dict:
  """{"time": {depth: an answer a round}, "remat": {depth: {policy: an answer}}}."""
  at = {depth: dataclasses.replace(shape, layers=depth) for depth in depths}
  time = {depth: [] for depth in depths}
  for _ in range(rounds):
    for depth in depths:
      time[depth].append(compiled(at[depth], variables))
  # Memory does not vary from run to run.
  remat = {
    depth: {policy: compiled(at[depth], variables, remat=policy) for policy in REMAT}
    for depth in depths
  }
  return {"time": time, "remat": remat}


def summary(results: dict) -> dict:
  """Medians by depth, and the deepest over the shallowest by round."""
  seconds = {
    depth: [answer["trace_s"] + answer["compile_s"] for answer in answers]
    for depth, answers in results["time"].items()
  }
  shallow, deep = min(seconds), max(seconds)
  per_round = [a / b for a, b in zip(seconds[deep], seconds[shallow], strict=True)]
  return {
    "seconds": {depth: statistics.median(values) for depth, values in seconds.items()},
    "deepest_over_shallowest": {
      "rounds": per_round,
      "median": statistics.median(per_round),
      "min": min(per_round),
      "max": max(per_round),
    },
    "temporaries_mib": {
      depth: {policy: answer["temporaries_mib"] for policy, answer in policies.items()}
      for depth, policies in results["remat"].items()
    },
  }


def show(results: dict, figures: dict, notes: list[str]) -> None:
  """Prints a row for each depth."""
  rows = []
  for depth, answers in results["time"].items():
    row = [str(depth)]
    row += [f"{statistics.median(a[k] for a in answers):.2f}" for k in ("trace_s", "compile_s")]
    row += [f"{figures['seconds'][depth]:.2f}", f"{answers[0]['hlo_lines']:,}"]
    row += [f"{statistics.median(a['peak_rss_mib'] for a in answers):.0f}"]
    rows.append([*row, *(f"{figures['temporaries_mib'][depth][p]:.1f}" for p in REMAT)])
  columns = ["layers", "trace s", "compile s", "both", "HLO lines", "peak RSS MiB"]
  coordinator.show([*columns, *(f"MiB, remat {policy}" for policy in REMAT)], rows, notes)


def main() -> None:
  parser = coordinator.parser(__doc__, variants=("magneto_jax",), shape="narrow", rounds=5)
  parser.add_argument("--depths", default="12,48,192", help="separated by commas")
  args = parser.parse_args()
  shape = SHAPES[args.shape]
  variables = coordinator.environment(args.threads, huge_pages=args.huge_pages)
  head = coordinator.record("compile_time", args, shape, variables)
  depths = [int(depth) for depth in args.depths.split(",")]
  results = measure(shape, depths, rounds=args.rounds, variables=variables)
  figures = summary(results)
  ratio = figures["deepest_over_shallowest"]
  name = f"trace and compile, {max(depths)} over {min(depths)} layers"
  checked = [coordinator.mark(name, ratio["median"], 1.15)]
  path = coordinator.save(head | {"summary": figures, "marks": checked} | results, args)
  notes = [
    f"{args.shape}; deepest over shallowest: {coordinator.in_words(ratio)}",
    f"load average at start {head['load_average_at_start']:.1f}; written to {path}",
    *map(coordinator.mark_in_words, checked),
  ]
  show(results, figures, notes)


if __name__ == "__main__":
  main()
