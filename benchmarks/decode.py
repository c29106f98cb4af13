"""Greedy decoding against other libraries: `python -m benchmarks.decode`."""

import os

from benchmarks import coordinator
from benchmarks.shapes import SHAPES

VARIANTS = ("magneto_jax", "magneto_jax-unrolled", "torchscale", "x-transformers")
BASELINE = "torchscale"


def measure(
  variants, shape, requests: list[dict], *, rounds: int, calls: int, threads: int, variables
) -> dict:
  """{variant: its parameters, versions, memory, and every round's turns, one a request}.

  A request is what `decode` is called with: batch_size, prompt_length, new_tokens.
  """
  results = {}
  with coordinator.loaded(variants, shape, threads, variables) as (processes, answers):
    for name, process in processes.items():
      first = {
        _name(request): process.ask(do="turn", call="decode", count=1, options=request)
        for request in requests
      }
      results[name] = answers[name] | {"first": first, "rounds": []}
    for _ in range(rounds):
      for name, process in processes.items():
        turns = {
          _name(request): coordinator.turn(process, "decode", calls, **request)
          for request in requests
        }
        turns["load_average"] = os.getloadavg()[0]
        results[name]["rounds"].append(turns)
        results[name]["peak_rss_mib"] = turns[_name(requests[-1])]["peak_rss_mib"]
  return results


def _name(request: dict) -> str:
  return f"batch {request['batch_size']}"


def summary(results: dict, requests: list[dict]) -> dict:
  """Medians, tokens a second and ratios of every variant, from the rounds alone."""
  figures = {}
  for name, result in results.items():
    figures[name] = {}
    for request in requests:
      call = _name(request)
      entry = coordinator.medians(result["rounds"], call)
      new_tokens = result["first"][call]["value"][0]
      entry["tokens_per_second"] = new_tokens / entry["wall_ms"] * 1e3
      if BASELINE in results:
        # Speed is the inverse of time: here the baseline's time stands above.
        theirs = results[BASELINE]["rounds"]
        entry["speedup"] = {
          kind: coordinator.ratios(theirs, result["rounds"], call, kind)
          for kind in ("wall_ms", "cpu_ms")
        }
      figures[name][call] = entry
  return figures


def marks(figures: dict) -> list[dict]:
  """What this library has set itself; measured alone on the machine, or they mean nothing."""
  if not {BASELINE, "magneto_jax"} <= set(figures):
    return []
  return [
    coordinator.mark(
      f"tokens a second over {BASELINE}'s, {call}",
      figures["magneto_jax"][call]["speedup"]["wall_ms"]["median"],
      bound,
      at_most=False,
    )
    for call, bound in (("batch 1", 2.0), ("batch 8", 1.2))
    if call in figures[BASELINE]
  ]


def show(results: dict, figures: dict, notes: list[str]) -> None:
  """Prints a table for each request."""
  requests = list(next(iter(figures.values())))
  for call in requests:
    rows = []
    for name, calls in figures.items():
      entry = calls[call]
      speedup = entry.get("speedup", {})
      row = [name] + [f"{entry[k]:.0f}" for k in ("wall_ms", "best_wall_ms", "cpu_ms")]
      row += [f"{entry['tokens_per_second']:,.0f}"]
      row += [coordinator.in_words(speedup.get(kind)) for kind in ("wall_ms", "cpu_ms")]
      row += [f"{results[name]['first'][call]['wall_ms'][0] / 1e3:.1f}"]
      rows.append([*row, f"{results[name]['peak_rss_mib']:.0f}"])
    columns = [call, "ms", "best ms", "CPU ms", "tokens/s", "speed-up", "by CPU ms"]
    columns += ["first call s", "peak RSS MiB"]
    coordinator.show(columns, rows, notes if call == requests[-1] else ())


def main() -> None:
  parser = coordinator.parser(__doc__, variants=VARIANTS, shape="gpt-tiny", rounds=5)
  parser.add_argument("--calls", type=int, default=2, help="timed calls a turn")
  parser.add_argument("--batch_sizes", default="1,8", help="separated by commas")
  parser.add_argument("--prompt_length", type=int, default=16)
  parser.add_argument("--new_tokens", type=int, default=128)
  args = parser.parse_args()
  shape = SHAPES[args.shape]
  variables = coordinator.environment(args.threads, huge_pages=args.huge_pages)
  head = coordinator.record("decode", args, shape, variables)
  requests = [
    {
      "batch_size": int(batch_size),
      "prompt_length": args.prompt_length,
      "new_tokens": args.new_tokens,
    }
    for batch_size in args.batch_sizes.split(",")
  ]
  results = measure(
    args.variants.split(","),
    shape,
    requests,
    rounds=args.rounds,
    calls=args.calls,
    threads=args.threads,
    variables=variables,
  )
  figures = summary(results, requests)
  checked = marks(figures)
  contents = {"requests": requests, "summary": figures, "marks": checked, "variants": results}
  path = coordinator.save(head | contents, args)
  notes = [
    f"{args.shape}: {args.prompt_length} prompt and {args.new_tokens} new tokens a row, greedy; "
    f"speed-up over {BASELINE}: median (least-largest) of rounds",
    f"load average at start {head['load_average_at_start']:.1f}; written to {path}",
  ]
  show(results, figures, notes + [coordinator.mark_in_words(entry) for entry in checked])


if __name__ == "__main__":
  main()
