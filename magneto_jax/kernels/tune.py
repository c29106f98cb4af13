"""Times the block sizes of an attention implementation: `python -m magneto_jax.kernels.tune`.

For one shape, on the user's own device: all sizes take turns, so that what else the machine does
falls on all of them, and the fastest record is printed as the expression to pass.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Iterable, Sequence

import jax

from magneto_jax.kernels import attention_gpu, command_line, platforms, tune_gpu
from magneto_jax.kernels.attention import IMPLEMENTATIONS, choose, dot_product_attention
from magneto_jax.kernels.bias import RelativeBias

_DTYPES = ("bfloat16", "float16", "float32")
# The sides of a block that are tried, by implementation: those of the forward pass.
_SIDES = {"xla_chunked": (64, 128, 256, 512, 1024), "pallas_tpu": (128, 256, 512, 1024)}
_PASSES = ("forward", "both")
# What is cut kernel by kernel, each in its own way.
_BY_KERNEL = "pallas_gpu"


def _positive(text: str) -> int:
  number = int(text) if text.isdecimal() else 0
  if number < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
  return number


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = command_line.Parser(
    prog="python -m magneto_jax.kernels.tune", description=__doc__.splitlines()[0]
  )
  for flag, default in (("batch", 1), ("length", 2048), ("heads", 8), ("head-dim", 64)):
    parser.add_argument(f"--{flag}", type=_positive, default=default, help=f"default: {default}")
  parser.add_argument("--kv-heads", type=_positive, help="default: as many as heads")
  parser.add_argument("--dtype", choices=_DTYPES, help="default: bfloat16, float32 on a CPU")
  parser.add_argument("--causal", action="store_true")
  parser.add_argument("--relative", action="store_true", help="with a relative position bias")
  parser.add_argument("--dropout", type=float, default=0.0, help="rate, default: 0")
  names = (*_SIDES, _BY_KERNEL)
  parser.add_argument("--implementation", choices=names, help="default: the device's own")
  parser.add_argument("--sides", help="of blocks, separated by commas; default: by implementation")
  parser.add_argument("--rounds", type=_positive, default=5, help="default: 5")
  parser.add_argument("--output", type=pathlib.Path, help="a JSON file")
  parser.add_argument("--jobs", type=_positive, default=4, help="processes that compile, on a GPU")
  parser.add_argument(
    "--write",
    action="store_true",
    help="measures the standard shapes instead, and puts the fastest blocks into the table that "
    "pallas_gpu reads, under this device's compute capability",
  )
  args = parser.parse_args(argv)
  if args.write and platforms.here() != "cuda":
    parser.error(f"--write needs an NVIDIA GPU, and this is a {platforms.here()}")
  of_the_call = "batch length heads head_dim kv_heads dtype causal relative dropout".split()
  given = [name for name in of_the_call if getattr(args, name) != parser.get_default(name)]
  if args.write and given:
    parser.error(f"--write measures its own calls: leave out {', '.join(given)}")
  if args.write:
    args.implementation = _BY_KERNEL
  if args.output:
    try:
      args.output.parent.mkdir(parents=True, exist_ok=True)
      args.output.touch()
    except OSError as error:
      parser.error(f"--output={args.output}: {error.strerror}")
  args.kv_heads = args.kv_heads or args.heads
  args.dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
  try:
    args.sides = args.sides and tuple(_positive(side) for side in args.sides.split(","))
    _call(args, shapes_only=True)
    if args.sides and args.implementation == _BY_KERNEL:
      raise ValueError(f"--sides: {_BY_KERNEL} has sides of its own for each kernel")
  except (argparse.ArgumentTypeError, NotImplementedError, ValueError) as error:
    parser.error(str(error))
  return args


def _call(args: argparse.Namespace, *, shapes_only: bool = False) -> tuple[list, dict]:
  """(q, k, v and perhaps the bias), options; and sets `args.implementation`."""
  shapes = [(args.batch, args.length, n, args.head_dim) for n in (args.heads, args.kv_heads)]
  shapes.append(shapes[1])
  keys = jax.random.split(jax.random.key(0), 5)
  options = {"is_causal": args.causal, "dropout_rate": args.dropout}
  if args.dropout:
    options["dropout_key"] = keys[3]
  if shapes_only:
    arrays = [jax.ShapeDtypeStruct(shape, args.dtype) for shape in shapes]
  else:
    arrays = [jax.random.normal(k, s, args.dtype) for k, s in zip(keys, shapes, strict=False)]
  if args.relative:
    table = jax.random.normal(keys[4], (32, args.heads))
    arrays.append(RelativeBias(table, bidirectional=not args.causal))
  if args.implementation is None:
    serving = choose(*arrays, **options).on(platforms.here()).name
    if serving not in (*_SIDES, _BY_KERNEL):
      raise ValueError(f"{serving} serves this call, which has no blocks to tune")
    args.implementation = serving
  choose(*arrays, implementation=args.implementation, **options).on(platforms.here())
  return arrays, options


def _records(args: argparse.Namespace, arrays, options) -> tuple[list, list[str]]:
  """The records to be timed, each once, and why others are not."""
  own = IMPLEMENTATIONS[args.implementation]
  sides = args.sides or _SIDES[args.implementation]
  found, refused = {}, []
  for block_q, block_kv in itertools.product(sides, sides):
    blocks = {"block_q": block_q, "block_kv": block_kv}
    if args.implementation == "pallas_tpu":
      blocks |= {f"{name}_backward": side for name, side in blocks.items()}
    try:
      record = dataclasses.replace(own, **blocks)
      choose(*arrays, implementation=record, **options)
    except (NotImplementedError, ValueError) as error:
      refused.append(f"{block_q} x {block_kv}: {error}")
      continue
    # Sides beyond the length are cut to it.
    found.setdefault((min(block_q, args.length), min(block_kv, args.length)), record)
  return list(found.values()), refused


def _compiled(record, arrays, options) -> dict:
  """{pass: a function without arguments that waits for its result}."""

  def forward(arrays):
    return dot_product_attention(*arrays, implementation=record, **options)

  def both(arrays):
    out, vjp = jax.vjp(forward, arrays)
    return out, vjp(out)

  functions = (jax.jit(function).lower(arrays).compile() for function in (forward, both))
  return {
    name: lambda function=function: jax.block_until_ready(function(arrays))
    for name, function in zip(_PASSES, functions, strict=True)
  }


def _milliseconds(function) -> float:
  start = time.perf_counter()
  function()
  return 1e3 * (time.perf_counter() - start)


def tune(records: Iterable, arrays, options, rounds: int) -> tuple[dict, list[str]]:
  """({record: {pass: milliseconds a round}}, what could not be compiled).

  The rounds are interleaved; the first calls, which touch memory for the first time, do not count.
  """
  functions, refused = {}, []
  for record in records:
    try:
      functions[record] = _compiled(record, arrays, options)
    except jax.errors.JaxRuntimeError as error:
      refused.append(f"{record}: {str(error).splitlines()[0]}")
  times = {record: {name: [] for name in _PASSES} for record in functions}
  for turn in range(rounds + 1):
    for record, passes in functions.items():
      for name, function in passes.items():
        milliseconds = _milliseconds(function)
        if turn > 0:
          times[record][name].append(milliseconds)
  return times, refused


def _expression(record) -> str:
  """The record as one writes it: what is the default is left out."""
  changed = [
    f"{field.name}={getattr(record, field.name)!r}"
    for field in dataclasses.fields(record)
    if field.name.startswith("block") or getattr(record, field.name) != field.default
  ]
  return f"kernels.{type(record).__name__}({', '.join(changed)})"


def _spread(milliseconds: Sequence[float]) -> str:
  middle = statistics.median(milliseconds)
  return f"{middle:9.2f} ({min(milliseconds):.2f}-{max(milliseconds):.2f})"


def _tune_kernels(args: argparse.Namespace) -> None:
  """Of a GPU: every kernel by itself, at the shape that is asked for or the standard ones."""
  shapes = tune_gpu.STANDARD
  if not args.write:
    shapes = [
      tune_gpu.Shape(
        batch=args.batch,
        length=args.length,
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        dtype=args.dtype,
        is_causal=args.causal,
        feature="relative" if args.relative else "none",
        dropout_rate=args.dropout,
      )
    ]
  results = tune_gpu.tune(shapes, args.rounds, args.jobs)
  device = jax.local_devices()[0]
  print(f"pallas_gpu on {device.device_kind}, {args.rounds} rounds, ms: median (least-largest)")
  for shape, kernels in results.items():
    print(shape)
    chosen = {}
    for kernel, found in kernels.items():
      ranked = tune_gpu.fastest(found)
      chosen |= {kernel: ranked[0]} if ranked else {}
      for blocks in ranked[:3]:
        print(f"  {kernel:>6}  {_spread(found[blocks])}  {blocks}")
      refused = [(blocks, ms) for blocks, ms in found.items() if isinstance(ms, str)]
      for blocks, why in refused[:3]:
        print(f"  {kernel:>6}  not timed: {blocks}: {why[:200]}")
    cut = ", ".join(f"{kernel}=Blocks{dataclasses.astuple(b)}" for kernel, b in chosen.items())
    print(f"implementation=kernels.PallasGpu({cut})")
  if args.output:
    head = {"device": device.device_kind, "jax": jax.__version__, "rounds": args.rounds}
    text = json.dumps(head | {"results": tune_gpu.as_json(results)}, indent=1)
    args.output.write_text(text + "\n", encoding="utf-8")
  if args.write:
    tune_gpu.write(results, str(device.compute_capability), attention_gpu.TABLE)
    print(f"written to {attention_gpu.TABLE}")


def main(argv: Sequence[str] | None = None) -> None:
  args = _arguments(argv)
  if args.implementation == _BY_KERNEL:
    _tune_kernels(args)
    return
  arrays, options = _call(args)
  records, refused = _records(args, arrays, options)
  times, uncompiled = tune(records, arrays, options, args.rounds)
  refused += uncompiled
  for line in refused:
    print(f"not timed: {line}")
  if not times:
    raise SystemExit("nothing to time: no block size serves this call")
  device = jax.devices()[0].device_kind
  print(f"{args.implementation} on {device}, {args.rounds} rounds, ms: median (least-largest)")
  print(f"{'queries x keys':>16}  {'forward':>26}  {'forward and backward':>26}")
  ranked = sorted(times, key=lambda record: statistics.median(times[record]["both"]))
  for record in ranked:
    cells = "  ".join(f"{_spread(times[record][name]):>26}" for name in _PASSES)
    print(f"{f'{record.block_q} x {record.block_kv}':>16}  {cells}")
  print(f"implementation={_expression(ranked[0])}")
  if args.output:
    results = {
      "device": device,
      "jax": jax.__version__,
      "arguments": {k: v for k, v in vars(args).items() if k not in ("output", "debug")},
      "milliseconds": {_expression(record): times[record] for record in ranked},
      "fastest": _expression(ranked[0]),
      "refused": refused,
    }
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  sys.exit(command_line.run(main))
