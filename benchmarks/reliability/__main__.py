"""What a run survives: `python -m benchmarks.reliability`.

Every trial does the real thing (kill -9, bit flips, full disks, SIGTERM, NaN, hostile files) and
says whether a promise was kept; docs/reliability.md explains them. All take an hour or two of two
cores; `--quick` takes some minutes and keeps nothing. `--table` prints the table of the page.
"""

import argparse
import concurrent.futures
import concurrent.futures.process
import json
import multiprocessing
import sys

from benchmarks import coordinator
from benchmarks.reliability import trials

RESULT = coordinator.RESULTS / "reliability.json"


def table(rows: list[dict]) -> str:
  """Markdown, a line a row."""
  lines = ["| | promise | seen | kept |", "|---|---|---|---|"]
  for row in rows:
    cells = (row["id"], row["promise"], row["figure"], "yes" if row["held"] else "**no**")
    lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
  return "\n".join(lines)


def main() -> None:
  """Makes all trials, or those that are named; the results of others are kept."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.reliability", description=__doc__.splitlines()[0]
  )
  parser.add_argument("--only", default="", help="ids of rows, as R1,R12, or orbax")
  parser.add_argument("--quick", action="store_true", help="few trials; nothing is kept")
  parser.add_argument("--table", action="store_true", help="print the table; nothing is tried")
  arguments = parser.parse_args()
  kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
  if arguments.table:
    print(table(kept["rows"]))
    return
  wanted = arguments.only.split(",") if arguments.only else []
  names = [
    name for name in trials.trials(arguments.quick) if not wanted or name.split()[0] in wanted
  ]
  compared = [name for name in trials.comparisons(True) if not wanted or "orbax" in wanted]
  if not names and not compared:
    parser.error(f"--only={arguments.only} names no row")
  head = coordinator.provenance("reliability")
  when = {name: head[name] for name in ("date", "git_commit", "machine")}
  rows = {row["trial"]: row for row in kept.get("rows", ())}
  bare = {row["fault"]: row for row in kept.get("bare_orbax", ())}

  def keep() -> None:
    if arguments.quick:
      return
    found = {
      "rows": [rows[name] for name in trials.trials(False) if name in rows],
      "bare_orbax": [bare[name] for name in trials.comparisons(False) if name in bare],
    }
    coordinator.RESULTS.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(head | found, indent=1) + "\n")

  broken = 0
  for name in names:
    try:
      row = _alone(trials.run, name, arguments.quick)
    except concurrent.futures.process.BrokenProcessPool as error:
      row = trials.not_tried(name, error)
    print(f"{'kept  ' if row['held'] else 'BROKEN'} {name}: {row['figure']}", flush=True)
    rows[name] = row | when
    broken += not row["held"]
    keep()
  for name in compared:
    bare[name] = _alone(trials.compare, name, arguments.quick) | when
    print(f"Orbax alone, {name}: {bare[name]['figure']}", flush=True)
    keep()
  sys.exit(bool(broken))


def _alone(function, *args):
  """What a function returns in a process of its own."""
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as process:
    return process.submit(function, *args).result()


if __name__ == "__main__":
  main()
