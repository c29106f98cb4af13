"""A transducer's loss and gradient, three ways: `python -m benchmarks.transducer`.

Memory and time by the number of labels and by the vocabulary: the plain loss by autodiff on all
logits, ours on all logits, and ours fused with the joiner, which holds a chunk of frames at a time.
"""

import dataclasses
import math
import os

from benchmarks import coordinator
from benchmarks.shapes import Transducer

BASELINE, FUSED = "autodiff", "fused"
VARIANTS = (BASELINE, "logits", FUSED)
_BASE = Transducer(batch=4, frames=100, labels=20, vocab_size=500, width=128)
# Of a recogniser with 5,000 subwords: compiled alone.
_LARGEST = Transducer(batch=8, frames=400, labels=60, vocab_size=5000, width=512, timed=False)
_WIDEST = dataclasses.replace(_BASE, vocab_size=5000)
CASES = [
  _BASE,
  *(dataclasses.replace(_BASE, labels=labels) for labels in (40, 80)),
  *(dataclasses.replace(_BASE, vocab_size=size) for size in (1000, 2000)),
  _WIDEST,
  _LARGEST,
]
SMOKE = [Transducer(batch=2, frames=6, labels=3, vocab_size=11, width=4)]


def measure(processes, case: Transducer, *, rounds: int, memory_gib: float) -> dict:
  """{variant: what preparing it answered, and every round's turns if it was run}."""
  results = {}
  for variant, process in processes.items():
    options = {"variant": variant, "case": dataclasses.asdict(case), "memory_gib": memory_gib}
    results[variant] = process.ask(do="tell", method="prepare", options=options)
  running = {name: result for name, result in results.items() if "refused" not in result}
  check_agreement(running)
  counts = {}
  for variant, result in running.items():
    trial = processes[variant].ask(do="turn", call="gradient", count=1, options={})
    # Of short calls many: a turn takes a fifth of a second.
    counts[variant] = max(1, min(20, round(200 / trial["wall_ms"][0])))
    result["rounds"] = []
  for _ in range(rounds):
    for variant, result in running.items():
      turn = coordinator.turn(processes[variant], "gradient", counts[variant])
      result["rounds"].append({"gradient": turn, "load_average": os.getloadavg()[0]})
  return results


def check_agreement(results: dict) -> None:
  """Raises unless all computed the same loss, and gradients of the same norms."""
  expected = next(iter(results.values()))["norms"] if results else ()
  for variant, result in results.items():
    near = (
      math.isclose(a, b, rel_tol=1e-3) for a, b in zip(result["norms"], expected, strict=True)
    )
    if not all(near):
      raise RuntimeError(f"{variant} computes something else: {result['norms']}, not {expected}")


def summary(case: Transducer, results: dict) -> list[dict]:
  """A cell a variant: medians, ratios to the baseline and memory."""
  cells = []
  theirs = results.get(BASELINE, {}).get("rounds")
  for variant, result in results.items():
    cell = {"case": case.name, "variant": variant, "logits_mib": case.logits_mib}
    cell |= {key: result[key] for key in ("peak_memory_mib", "compile_s")}
    if "rounds" in result:
      cell |= coordinator.medians(result["rounds"], "gradient")
      if theirs and variant != BASELINE:
        cell["over_baseline"] = {
          kind: coordinator.ratios(result["rounds"], theirs, "gradient", kind)
          for kind in ("wall_ms", "cpu_ms")
        }
    cells.append(cell)
  return cells


def marks(cells: list[dict]) -> list[dict]:
  """What this library has set itself: memory of the largest case, and time where V is largest."""
  by_name = {(cell["case"], cell["variant"]): cell for cell in cells}
  checked = []
  ours, theirs = (by_name.get((_LARGEST.name, variant)) for variant in (FUSED, BASELINE))
  if ours and theirs:
    share = ours["peak_memory_mib"] / theirs["peak_memory_mib"]
    checked.append(coordinator.mark(f"{_LARGEST.name}, fused memory over autodiff's", share, 0.1))
  ours = by_name.get((_WIDEST.name, FUSED), {}).get("over_baseline")
  if ours:
    name = f"{_WIDEST.name}, fused CPU time over autodiff's"
    checked.append(coordinator.mark(name, ours["cpu_ms"]["median"], 1.0))
  return checked


def show(cells: list[dict], notes: list[str]) -> None:
  """Prints a row for each case and variant."""
  rows = []
  for cell in cells:
    over = cell.get("over_baseline", {})
    row = [cell["case"], cell["variant"], f"{cell['logits_mib']:.0f}"]
    row += [f"{cell['peak_memory_mib']:.1f}", f"{cell['compile_s']:.1f}"]
    row += [f"{cell['wall_ms']:.1f}" if "wall_ms" in cell else "-"]
    rows.append([*row, *(coordinator.in_words(over.get(kind)) for kind in ("wall_ms", "cpu_ms"))])
  columns = ["case", "variant", "logits MiB", "MiB", "compile s", "ms", "over autodiff"]
  coordinator.show([*columns, "by CPU ms"], rows, notes)


def main() -> None:
  parser = coordinator.parser(__doc__, variants=VARIANTS, shape=None, rounds=3)
  parser.add_argument("--memory-gib", type=float, default=3.0, help="the most that a case may need")
  parser.add_argument("--smoke", action="store_true", help="one small case")
  args = parser.parse_args()
  variables = coordinator.environment(args.threads, huge_pages=args.huge_pages)
  head = coordinator.provenance("transducer", variables) | {"threads": args.threads}
  cases, measured, cells = SMOKE if args.smoke else CASES, {}, []
  processes = {variant: coordinator.Process(variables) for variant in args.variants.split(",")}
  try:
    for process in processes.values():
      head |= process.ask(do="load_transducer")
    for case in cases:
      results = measure(processes, case, rounds=args.rounds, memory_gib=args.memory_gib)
      measured[case.name] = results
      cells += summary(case, results)
      checked = marks(cells)
      contents = {"summary": cells, "marks": checked, "cases": measured}
      # What was measured outlives a case that takes too long.
      path = coordinator.save(head | contents, args, "cpu")
  finally:
    for process in processes.values():
      process.close()
  notes = [
    "MiB: temporaries of the compiled value and gradient; over autodiff: median (least-largest)",
    f"load average at start {head['load_average_at_start']:.1f}; written to {path}",
    *map(coordinator.mark_in_words, checked),
  ]
  show(cells, notes)


if __name__ == "__main__":
  main()
