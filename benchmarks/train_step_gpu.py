"""The train step on one GPU: what `python -m benchmarks.train_step --platform=cuda` runs.

bfloat16 with float32 parameters and AdamW. Our variants share a process and take turns; torch comes
after them, when their memory is free again. Results are written after each.
"""

import dataclasses
import pathlib
import statistics

from benchmarks import attention_gpu, coordinator
from benchmarks.shapes import SHAPES, Attention, Shape

VARIANTS = ("magneto_jax", "magneto_jax-pre_ln", "torchscale-compiled")
OURS, PRE_LN = VARIANTS[:2]
OPTIONS = ("batch", "torch_batch", "remat", "unroll", "segments", "implementation")
# Seconds after which a step is taken to hang: torch compiles in less.
PATIENCE_S = 280
# The part of the device's memory that JAX may take.
MEMORY_FRACTION = "0.93"


def add_options(parser) -> None:
  """OPTIONS: what only a GPU's run reads."""
  group = parser.add_argument_group("with --platform=cuda")
  group.add_argument("--batch", type=int, help="rows of our batch; by default the shape's")
  group.add_argument(
    "--torch-batch", type=int, help="rows of torch's, halved until they fit; by default half ours"
  )
  group.add_argument("--remat", default="dots", choices=("none", "full", "dots"))
  group.add_argument("--unroll", type=int, default=1)
  group.add_argument(
    "--no-segments",
    dest="segments",
    action="store_false",
    help="do not tell our attention of documents, as torchscale's never is",
  )
  group.add_argument("--implementation", help="of our attention; by default chosen for the call")


def measure_ours(variants, shape: Shape, args, variables) -> dict:
  """{variant: its parameters, versions, compilation, memory and turns}, or why it failed."""
  results = {name: {} for name in variants}
  options = {"dtype": "bfloat16", "remat": args.remat, "unroll": args.unroll}
  options |= {"segments": args.segments, "attention_implementation": args.implementation}
  process = coordinator.Process(variables, patience_s=PATIENCE_S)
  try:
    for name, result in results.items():
      try:
        request = {"variant": name, "shape": dataclasses.asdict(shape), "threads": args.threads}
        result |= process.ask(do="load", **request, options=options)
        result |= process.ask(do="tell", variant=name, method="compile", options={})
        result["first"] = _turn(process, name, 1)
      except RuntimeError as error:
        result["failed"] = attention_gpu.last_line(error)
    _take_turns(process, results, args)
  finally:
    process.close()
  return results


def measure_torch(variant: str, shape: Shape, args, variables) -> dict:
  """The same of a variant of torch, at the largest batch that fits."""
  batch_size = args.torch_batch or max(1, shape.batch_size // 2)
  while True:
    process = coordinator.Process(variables, patience_s=PATIENCE_S)
    result = {"batch_size": batch_size}
    try:
      own = dataclasses.asdict(dataclasses.replace(shape, batch_size=batch_size))
      result |= process.ask(do="load", variant=variant, shape=own, threads=args.threads)
      # The second step may compile again, when there are gradients to be written over.
      result["first"] = _turn(process, variant, 2)
      result["compile_s"] = sum(result["first"]["wall_ms"]) / 1e3
      _take_turns(process, {variant: result}, args)
      result |= process.ask(do="tell", variant=variant, method="memory", options={})
      return result
    except RuntimeError as error:
      if "out of memory" not in str(error) or batch_size == 1:
        return result | {"failed": attention_gpu.last_line(error)}
      batch_size //= 2
    finally:
      process.close()


def _take_turns(process, results: dict, args) -> None:
  """Rounds of all that have not failed; one that fails here drops out."""
  for _ in range(args.rounds):
    for name, result in results.items():
      if "failed" in result:
        continue
      try:
        _turn(process, name, 1)
        result.setdefault("rounds", []).append({"step": _turn(process, name, args.steps)})
      except RuntimeError as error:
        result["failed"] = attention_gpu.last_line(error)


def _turn(process, variant: str, count: int) -> dict:
  return process.ask(do="turn", variant=variant, call="step", count=count, options={})


MFU_IN_WORDS = (
  "mfu counts all T x T scores (theory.flops, PaLM's convention), mfu_visible those that a causal"
  " mask leaves; both as a share of the measured product of matrices"
)


def summary(results: dict, shape: Shape, peak: float) -> dict:
  """{variant: its figures}, from the rounds alone; `peak` in TFLOP a second. See MFU_IN_WORDS."""
  figures = {}
  for name, result in results.items():
    if "failed" in result:
      figures[name] = {"failed": result["failed"]}
      continue
    own = dataclasses.replace(shape, batch_size=result.get("batch_size", shape.batch_size))
    times = [ms for turns in result["rounds"] for ms in turns["step"]["wall_ms"]]
    ms = statistics.median(times)
    attention = Attention(
      own.batch_size, own.seq_length, own.heads, own.width // own.heads, causal=own.causal
    )
    scores = own.layers * attention.flops["gradient"]
    visible = own.step_flops - scores * (1 - attention.visible_share)
    tflops = own.step_flops / 1e9 / ms
    figures[name] = {
      "batch_size": own.batch_size,
      "ms": ms,
      "min_ms": min(times),
      "max_ms": max(times),
      "tokens_per_second": 1e3 * own.tokens / ms,
      "tflop_per_second": tflops,
      "mfu": tflops / peak,
      "mfu_visible": visible / 1e9 / ms / peak,
      "memory_gib": result["memory_gib"],
      "compile_s": result["compile_s"],
      "loss": result["rounds"][-1]["step"]["value"][-1],
    }
  if {OURS, PRE_LN} <= {name for name, entry in figures.items() if "ms" in entry}:
    rounds = (results[name]["rounds"] for name in (OURS, PRE_LN))
    figures[OURS]["over_pre_ln"] = coordinator.ratios(*rounds, "step", "wall_ms")
  return figures


def marks(figures: dict) -> list[dict]:
  """What this library has set itself, on an H200."""
  ours, checked = figures.get(OURS, {}), []
  if "mfu" in ours:
    name = f"{OURS}, share of the measured rate of products, all scores counted"
    checked.append(coordinator.mark(name, ours["mfu"], 0.45, at_most=False))
  if "over_pre_ln" in ours:
    name = "Sub-LN's step over Pre-LN's"
    checked.append(coordinator.mark(name, ours["over_pre_ln"]["median"], 1.03))
  return checked


def show(figures: dict, notes: list[str]) -> None:
  """Prints a row a variant."""
  columns = ["step", "rows", "ms (least-largest)", "tokens/s", "TFLOP/s", "MFU", "MFU, visible"]
  columns += ["GiB", "compile s", "loss"]
  rows, reasons = [], []
  for name, entry in figures.items():
    if "failed" in entry:
      reasons.append(f"failed: {name}: {entry['failed']}")
      continue
    row = [name, str(entry["batch_size"])]
    row += [f"{entry['ms']:.1f} ({entry['min_ms']:.1f}-{entry['max_ms']:.1f})"]
    row += [f"{entry['tokens_per_second']:,.0f}", f"{entry['tflop_per_second']:.1f}"]
    row += [f"{entry['mfu']:.1%}", f"{entry['mfu_visible']:.1%}", f"{entry['memory_gib']:.1f}"]
    rows.append([*row, f"{entry['compile_s']:.1f}", f"{entry['loss']:.3f}"])
  coordinator.show(columns, rows, reasons + notes)


def run(args, platform: str = "cuda") -> pathlib.Path:
  """Measures what `args` asks for; returns the results file.

  Args:
    args: the command line's.
    platform: another one, to see the benchmark itself run.
  """
  shape = SHAPES[args.shape]
  shape = dataclasses.replace(shape, batch_size=args.batch or shape.batch_size)
  variants = args.variants.split(",") if args.variants else VARIANTS
  variables = attention_gpu.environment(platform)
  variables |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY_FRACTION}
  head = coordinator.record("train_step", args, shape, variables)
  head |= {"driver": attention_gpu.driver()}
  names = ["jax"] + ["torch"] * any("magneto_jax" not in name for name in variants)
  devices, head["missing"] = attention_gpu.start(names, variables)
  try:
    products = attention_gpu.measure_product(devices, args.rounds, platform)
    head |= {
      "device": devices["jax"].facts["device"],
      "versions": {name: x.facts["versions"] for name, x in devices.items()},
    }
  finally:
    for device in devices.values():
      device.close()
  peak = max(products.values())
  head |= {
    "peak": attention_gpu.PEAK_IN_WORDS,
    "peak_tflop_per_second": products,
    "mfu": MFU_IN_WORDS,
    "options": {
      name: getattr(args, name) for name in ("remat", "unroll", "segments", "implementation")
    },
  }
  results = {}
  ours = [name for name in variants if name.startswith("magneto_jax")]
  for group in (ours, *([name] for name in variants if name not in ours)):
    if not group:
      continue
    if group == ours:
      results |= measure_ours(ours, shape, args, variables)
    else:
      results[group[0]] = measure_torch(group[0], shape, args, variables)
    figures = summary(results, shape, peak)
    checked = marks(figures)
    path = coordinator.save(
      head | {"summary": figures, "marks": checked, "variants": results}, args
    )
  notes = [
    f"{head['device']}; TFLOP a second of bfloat16 matrix products: "
    + ", ".join(f"{name} {rate:.0f}" for name, rate in products.items()),
    "MFU counts all T x T scores; visible: those that the causal mask leaves",
    f"written to {path}",
  ]
  show(figures, notes + [coordinator.mark_in_words(entry) for entry in checked])
  return path
