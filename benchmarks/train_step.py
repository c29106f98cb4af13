"""Train step and forward pass against other libraries: `python -m benchmarks.train_step`."""

import math
import os

from benchmarks import coordinator, train_step_gpu
from benchmarks.shapes import SHAPES

VARIANTS = ("magneto_jax", "magneto_jax-unrolled", "torchscale", "x-transformers", "torch")
BASELINE = "torchscale"
CALLS = ("step", "forward")


def measure(variants, shape, *, rounds: int, steps: int, threads: int, variables) -> dict:
  """{variant: its parameters, versions, first step, memory, and every round's turns}."""
  results = {}
  with coordinator.loaded(variants, shape, threads, variables) as (processes, answers):
    for name, process in processes.items():
      first = {call: process.ask(do="turn", call=call, count=1, options={}) for call in CALLS}
      results[name] = answers[name] | {"first": first, "rounds": []}
    for _ in range(rounds):
      for name, process in processes.items():
        turns = {call: coordinator.turn(process, call, steps) for call in CALLS}
        turns["load_average"] = os.getloadavg()[0]
        results[name]["rounds"].append(turns)
        results[name]["peak_rss_mib"] = turns["forward"]["peak_rss_mib"]
  return results


def summary(results: dict, shape) -> dict:
  """Medians and ratios of every variant, from the rounds alone."""
  figures = {}
  for name, result in results.items():
    rounds = result["rounds"]
    entry = {call: coordinator.medians(rounds, call) for call in CALLS}
    seconds = entry["step"]["wall_ms"] / 1e3
    entry["tokens_per_second"] = shape.tokens / seconds
    entry["gflop_per_second"] = shape.step_flops / 1e9 / seconds
    entry["first_step_s"] = result["first"]["step"]["wall_ms"][0] / 1e3
    if BASELINE in results:
      theirs = results[BASELINE]["rounds"]
      entry["over_baseline"] = {
        f"{call} {kind}": coordinator.ratios(rounds, theirs, call, kind)
        for call in CALLS
        for kind in ("wall_ms", "cpu_ms")
      }
    figures[name] = entry
  return figures


def marks(figures: dict) -> list[dict]:
  """What this library has set itself; measured alone on the machine, or they mean nothing."""
  if not {BASELINE, "magneto_jax"} <= set(figures):
    return []
  over = figures["magneto_jax"]["over_baseline"]
  return [
    coordinator.mark(f"{what} over {BASELINE}'s", over[f"{call} wall_ms"]["median"], bound)
    for what, call, bound in (("train step", "step", 1.25), ("forward pass", "forward", 1.05))
  ]


def show(results: dict, figures: dict, notes: list[str]) -> None:
  """Prints a table for each call, and one of what is counted once."""
  for call in CALLS:
    rows = []
    for name, entry in figures.items():
      timed, over = entry[call], entry.get("over_baseline", {})
      row = [name] + [f"{timed[k]:.1f}" for k in ("wall_ms", "best_wall_ms", "cpu_ms")]
      row += [coordinator.in_words(over.get(f"{call} {kind}")) for kind in ("wall_ms", "cpu_ms")]
      rows.append([*row, f"{timed['page_faults'] / 1e3:.1f}"])
    columns = [call, "ms", "best ms", "CPU ms", "ratio of ms", "of CPU ms", "1000 page faults"]
    coordinator.show(columns, rows)
  rows = [
    [
      name,
      f"{results[name]['parameters']:,}",
      f"{results[name]['first']['step']['value'][0]:.3f}",
      f"{entry['first_step_s']:.1f}",
      f"{results[name]['peak_rss_mib']:.0f}",
      f"{entry['tokens_per_second']:,.0f}",
      f"{entry['gflop_per_second']:.0f}",
    ]
    for name, entry in figures.items()
  ]
  columns = ["", "parameters", "first loss", "first step s", "peak RSS MiB", "tokens/s", "GFLOP/s"]
  coordinator.show(columns, rows, notes)


def main() -> None:
  parser = coordinator.parser(__doc__, variants=(), shape="gpt-tiny", rounds=5)
  parser.set_defaults(variants=None)
  parser.add_argument("--steps", type=int, default=3, help="timed steps a turn")
  parser.add_argument(
    "--platform", choices=("cpu", "cuda"), help="by default cuda for gpt-1b3, cpu for the others"
  )
  train_step_gpu.add_options(parser)
  args = parser.parse_args()
  args.platform = args.platform or ("cuda" if args.shape == "gpt-1b3" else "cpu")
  if args.platform == "cuda":
    train_step_gpu.run(args)
    return
  coordinator.refuse(parser, args, train_step_gpu.OPTIONS, "they go with --platform=cuda")
  shape = SHAPES[args.shape]
  variables = coordinator.environment(args.threads, huge_pages=args.huge_pages)
  head = coordinator.record("train_step", args, shape, variables)
  results = measure(
    args.variants.split(",") if args.variants else VARIANTS,
    shape,
    rounds=args.rounds,
    steps=args.steps,
    threads=args.threads,
    variables=variables,
  )
  figures = summary(results, shape)
  checked = marks(figures)
  path = coordinator.save(head | {"summary": figures, "marks": checked, "variants": results}, args)
  notes = [
    f"{args.shape}: {head['gflop_per_step']:.1f} GFLOP a step, log V = "
    f"{math.log(shape.vocab_size):.3f}; ratios to {BASELINE}: median (least-largest) of rounds",
    f"load average at start {head['load_average_at_start']:.1f}; written to {path}",
  ]
  show(results, figures, notes + [coordinator.mark_in_words(entry) for entry in checked])


if __name__ == "__main__":
  main()
