"""Attention alone, forward and backward, against other libraries: `python -m benchmarks.attention`.

Each length, with and without a relative bias and dropout: time, share of the machine's own rate of
matrix products, and memory. A case that a variant does not run has the reason in its place.
"""

import dataclasses
import itertools
import math
import os
import pathlib
import re

from benchmarks import attention_gpu, coordinator
from benchmarks.shapes import Attention
from benchmarks.stability import pictures
from magneto_jax import reporting

OURS = "magneto_jax"
VARIANTS = {
  "cpu": (OURS, "jax.nn-xla", "torch", "torchscale"),
  "tpu": (OURS, "jax.nn-xla"),
}
CALLS = {"forward": "forward", "gradient": "forward and backward"}
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
DROPOUT = 0.1
# The largest temporaries (and arrays of scores) that a case may need.
MEMORY_GIB = {"cpu": 3.0, "tpu": 8.0}
# Batch, heads, head dim, dtype.
SIZES = {"cpu": (1, 4, 64, "float32")}
ACCELERATOR_SIZES = (8, 16, 64, "bfloat16")
# Sides of the square products whose rate is the peak.
PRODUCT = {"cpu": 2048}
ACCELERATOR_PRODUCT = 8192
# Options of the measurement of one shape by length.
OF_ONE_SHAPE = ("lengths", "batch", "heads", "head_dim", "dtype", "bidirectional", "plain")
PICTURE = coordinator.ROOT / "docs" / "attention.png"


def cases(args) -> list[Attention]:
  """Every length without and with bias and dropout."""
  extras = [(False, 0.0)] if args.plain else itertools.product((False, True), (0.0, DROPOUT))
  return [
    Attention(
      batch=args.batch,
      length=length,
      heads=args.heads,
      head_dim=args.head_dim,
      causal=not args.bidirectional,
      dtype=args.dtype,
      bias=bias,
      dropout=rate,
    )
    for bias, rate in extras
    for length in map(int, args.lengths.split(","))
  ]


def start(variants, args, variables) -> tuple[dict, dict]:
  """({variant: its process}, {variant: what loading it answered}).

  A variant is a process, but on a TPU, which only one process can hold.
  """
  processes, answers = {}, {}
  for variant in variants:
    name, _, folder = variant.partition("@")
    if args.platform == "tpu" and processes:
      processes[variant] = next(iter(processes.values()))
    else:
      folder = pathlib.Path(folder) if folder else coordinator.ROOT
      processes[variant] = coordinator.Process(variables, folder)
    answers[variant] = processes[variant].ask(
      do="load_attention", variant=name, threads=args.threads
    )
  return processes, answers


def measure_peak(processes, args) -> dict:
  """{variant: GFLOP a second of its library's matrix product, the best of all rounds}."""
  size = PRODUCT.get(args.platform, ACCELERATOR_PRODUCT)
  best = dict.fromkeys(processes, math.inf)
  for _ in range(args.rounds):
    for name, process in processes.items():
      turn = coordinator.turn(process, "product", 2, size=size, dtype=args.dtype)
      best[name] = min(best[name], *turn["wall_ms"])
  return {name: 2 * size**3 / 1e6 / ms for name, ms in best.items()}


def measure(processes, case: Attention, args) -> dict:
  """{variant: what preparing the case answered, and every round's turns if it was not refused}."""
  results = {}
  for variant, process in processes.items():
    name = variant.partition("@")[0]
    request = {"variant": name, "case": dataclasses.asdict(case), "memory_gib": args.memory_gib}
    results[variant] = process.ask(do="prepare", **request)
  running = {variant: result for variant, result in results.items() if "refused" not in result}
  check_agreement(running, case)
  counts = {}
  for variant, result in running.items():
    for call in CALLS:
      options = {"variant": variant.partition("@")[0]}
      trial = processes[variant].ask(do="turn", call=call, count=1, options=options)
      # Of short calls many: a turn takes a fifth of a second.
      counts[variant, call] = max(1, min(20, round(200 / trial["wall_ms"][0])))
    result["rounds"] = []
  for _ in range(args.rounds):
    for variant, result in running.items():
      turns = {
        call: coordinator.turn(
          processes[variant], call, counts[variant, call], variant=variant.partition("@")[0]
        )
        for call in CALLS
      }
      result["rounds"].append(turns | {"load_average": os.getloadavg()[0]})
  return results


def check_agreement(results: dict, case: Attention) -> None:
  """Raises unless all computed the same: the norms of output and gradients (without dropout)."""
  tolerance = 1e-3 if case.dtype == "float32" else 2e-2
  expected = next(iter(results.values()))["norms"] if results else ()
  for variant, result in results.items():
    near = (
      math.isclose(a, b, rel_tol=tolerance) for a, b in zip(result["norms"], expected, strict=True)
    )
    if not case.dropout and not all(near):
      raise RuntimeError(f"{variant} computes something else: {result['norms']}, not {expected}")


def summary(case: Attention, results: dict, peak: dict) -> list[dict]:
  """A cell a variant: medians, ratios, share of the peak and memory, from the rounds alone."""
  cells = []
  ours = results.get(OURS, {}).get("rounds")
  for variant, result in results.items():
    cell = {"length": case.length, "bias": case.bias, "dropout": case.dropout, "variant": variant}
    if "refused" in result:
      cells.append(cell | {"refused": result["refused"]})
      continue
    for call in CALLS:
      entry = coordinator.medians(result["rounds"], call)
      entry["share_of_peak"] = case.flops[call] / 1e6 / entry["wall_ms"] / peak[variant]
      entry["peak_memory_mib"] = result["peak_memory_mib"][call]
      if ours and variant != OURS:
        entry["ours_over"] = {
          kind: coordinator.ratios(ours, result["rounds"], call, kind)
          for kind in ("wall_ms", "cpu_ms")
        }
      cell[call] = entry
    cells.append(cell)
  return cells


def marks(cells: list[dict]) -> list[dict]:
  """What this library has set itself, at B1 N4 H64, causal, float32, on a CPU."""
  plain = {
    (c["length"], c["variant"]): c["gradient"]
    for c in cells
    if not c["bias"] and not c["dropout"] and "gradient" in c
  }
  checked = []
  for (length, variant), entry in plain.items():
    bound = {"jax.nn-xla": 1.0 if length < 1024 else 0.5, "torchscale": 1.0}.get(variant)
    if bound is None or "ours_over" not in entry or (variant == "torchscale" and length < 2048):
      continue
    name = f"T={length}, forward and backward over {variant}'s"
    checked.append(coordinator.mark(name, entry["ours_over"]["wall_ms"]["median"], bound))
  if (4096, OURS) in plain:
    value = plain[4096, OURS]["peak_memory_mib"]
    checked.append(coordinator.mark("T=4096, MiB of temporaries", value, 150))
  return checked


def in_words(bias: bool, dropout: float) -> str:
  extras = (["relative bias"] if bias else []) + ([f"dropout {dropout:g}"] if dropout else [])
  return " and ".join(extras) or "no bias, no dropout"


def groups(cells: list[dict]) -> dict[str, list[dict]]:
  """The cells by what they have beside a mask."""
  by_words = {}
  for cell in cells:
    by_words.setdefault(in_words(cell["bias"], cell["dropout"]), []).append(cell)
  return by_words


def show(cells: list[dict], notes: list[str]) -> None:
  """Prints a table for each of the groups, and why cells are missing."""
  columns = ["T", "variant"]
  for call in CALLS:
    name = {"forward": "fwd", "gradient": "fwd+bwd"}[call]
    columns += [f"{name} ms", "ours over it", "of peak", "MiB"]
  for words, group in groups(cells).items():
    rows, reasons = [], {}
    for cell in group:
      row = [str(cell["length"]), cell["variant"]]
      if "refused" in cell:
        reasons.setdefault((cell["variant"], cell["refused"]), []).append(str(cell["length"]))
      for call in CALLS:
        entry = cell.get(call)
        if entry is None:
          row += ["-"] * 4
          continue
        over = entry.get("ours_over", {}).get("wall_ms")
        row += [f"{entry['wall_ms']:.2f}", coordinator.in_words(over)]
        row += [f"{entry['share_of_peak']:.0%}", f"{entry['peak_memory_mib']:.1f}"]
      rows.append(row)
    why = [
      f"  not run: {variant} at T={', '.join(lengths)}: {reason}"
      for (variant, reason), lengths in reasons.items()
    ]
    print(f"\n{words}")
    coordinator.show(columns, rows, why)
  for note in notes:
    print(note)


def draw(cells: list[dict], path: pathlib.Path, title: str) -> None:
  """Above the time of forward and backward by length, below the memory; a column for each group."""
  grouped = groups(cells)
  styles = reporting.line_styles(list(dict.fromkeys(cell["variant"] for cell in cells)))
  figure, grid = pictures.panels(2, len(grouped), title=title, width=4.2, height=3.4)
  for axes, (words, group) in zip(grid.T, grouped.items(), strict=True):
    for variant, style in styles.items():
      ran = [c for c in group if c["variant"] == variant and "gradient" in c]
      for panel, measure_name in zip(axes, ("wall_ms", "peak_memory_mib"), strict=True):
        # A logarithmic axis has no place for a call that needs no memory at all.
        points = [(c["length"], c["gradient"][measure_name] or math.nan) for c in ran]
        panel.plot([x for x, _ in points], [y for _, y in points], lw=1.4, ms=4.5, **style)
    for panel, label in zip(axes, ("ms", "MiB of temporaries"), strict=True):
      lengths = sorted({c["length"] for c in cells})
      panel.set_xscale("log", base=2)
      panel.set_xticks(lengths, [str(n) for n in lengths], rotation=45)
      panel.set_yscale("log")
      pictures.tidy(panel, title=words, xlabel="length", ylabel=label)
  pictures.save(figure, path, pictures.handles(styles))


def main() -> None:
  parser = coordinator.parser(__doc__, variants=(), shape=None, rounds=5)
  parser.set_defaults(variants=None)
  parser.add_argument("--platform", default="cpu", choices=(*VARIANTS, "cuda"))
  parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="separated by commas")
  parser.add_argument("--batch", type=int)
  parser.add_argument("--heads", type=int)
  parser.add_argument("--head-dim", type=int)
  parser.add_argument("--dtype")
  parser.add_argument("--bidirectional", action="store_true")
  parser.add_argument("--plain", action="store_true", help="neither bias nor dropout")
  parser.add_argument("--memory-gib", type=float, help="cases with larger temporaries are not run")
  parser.add_argument("--cases", default="", help="cuda: a pattern of the names of what is run")
  parser.add_argument("--quick", action="store_true", help="cuda: a few cases")
  parser.add_argument("--seconds", type=float, help="cuda: after these no case is begun")
  args = parser.parse_args()
  if args.platform == "cuda":
    coordinator.refuse(parser, args, OF_ONE_SHAPE, "--platform=cuda has cases of its own: --cases")
    attention_gpu.run(args)
    return
  coordinator.refuse(parser, args, ("cases", "quick", "seconds"), "they go with --platform=cuda")
  sizes = SIZES.get(args.platform, ACCELERATOR_SIZES)
  for name, value in zip(("batch", "heads", "head_dim", "dtype"), sizes, strict=True):
    if getattr(args, name) is None:
      setattr(args, name, value)
  if args.memory_gib is None:
    args.memory_gib = MEMORY_GIB[args.platform]
  variants = args.variants.split(",") if args.variants else VARIANTS[args.platform]
  variables = coordinator.environment(
    args.threads, huge_pages=args.huge_pages, platform=args.platform
  )
  head = coordinator.provenance("attention", variables)

  processes, answers = start(variants, args, variables)
  try:
    peak = measure_peak(processes, args)
    measured, cells = [], []
    for case in cases(args):
      results = measure(processes, case, args)
      measured.append({"case": dataclasses.asdict(case), "variants": results})
      cells += summary(case, results, peak)
  finally:
    for process in dict.fromkeys(processes.values()):
      process.close()

  device = "cpu" if args.platform == "cpu" else answers[variants[0]]["device"]
  shape = {name: getattr(args, name) for name in ("batch", "heads", "head_dim", "dtype")}
  shape["causal"] = not args.bidirectional
  is_marked = args.platform == "cpu" and shape == dict(
    zip(("batch", "heads", "head_dim", "dtype", "causal"), (*SIZES["cpu"], True), strict=True)
  )
  checked = marks(cells) if is_marked else []
  head |= {
    "threads": args.threads,
    "device": device,
    "shape": shape,
    "memory_limit_gib": args.memory_gib,
    "flops": "4 B N T T H forward, 3 times that with backward, also under a causal mask",
    "peak_gflop_per_second": peak,
    "versions": {variant: answer["versions"] for variant, answer in answers.items()},
  }
  slug = re.sub(r"\W+", "-", device.lower()).strip("-")
  path = coordinator.save(
    head | {"summary": cells, "marks": checked, "cases": measured}, args, slug
  )
  picture = path.with_suffix(".png") if args.output else coordinator.ROOT / "docs" / "attention.png"
  words = f"B{args.batch} N{args.heads} H{args.head_dim}, {args.dtype}"
  words += ", bidirectional" if args.bidirectional else ", causal"
  draw(cells, picture, f"Attention, forward and backward, on {device}: {words}")
  rates = ", ".join(f"{name} {rate:.0f}" for name, rate in peak.items())
  notes = [
    f"{words}, on {device}; peak: GFLOP a second of {args.dtype} matrix products: {rates}",
    "FLOPs are counted for all T x T scores, also under a causal mask; with backward three times",
    "ours over it: median (least-largest) over rounds of our time over theirs",
    f"load average at start {head['load_average_at_start']:.1f}; written to {path} and {picture}",
  ]
  show(cells, notes + [coordinator.mark_in_words(entry) for entry in checked])


if __name__ == "__main__":
  main()
