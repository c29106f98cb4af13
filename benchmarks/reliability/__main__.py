"""What a run survives: `python -m benchmarks.reliability`.

Every trial does the real thing (kill -9, bit flips, full disks, SIGTERM, NaN, hostile files) and
says whether a promise was kept; docs/reliability.md explains them. All take an hour or two of two
cores; `--quick` takes some minutes and keeps nothing. `--table` prints the table of the page.
"""

import argparse
import concurrent.futures
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
  parser.add_argument("--only", default="", help="ids of rows, as R1,R12; the others are kept")
  parser.add_argument("--quick", action="store_true", help="few trials; nothing is kept")
  parser.add_argument("--table", action="store_true", help="print the table; nothing is tried")
  arguments = parser.parse_args()
  kept = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
  if arguments.table:
    print(table(kept))
    return
  wanted = arguments.only.split(",") if arguments.only else []
  names = [
    name for name in trials.trials(arguments.quick) if not wanted or name.split()[0] in wanted
  ]
  if not names:
    parser.error(f"--only={arguments.only} names no row")
  found = {row["trial"]: row for row in kept}
  head, broken = coordinator.provenance("reliability"), 0
  for name in names:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as process:
      row = process.submit(trials.run, name, arguments.quick).result()
    row |= {"date": head["date"], "git_commit": head["git_commit"]}
    print(f"{'kept  ' if row['held'] else 'BROKEN'} {name}: {row['figure']}", flush=True)
    if not arguments.quick:
      found[name] = row
      rows = [found[each] for each in trials.trials(False) if each in found]
      coordinator.RESULTS.mkdir(exist_ok=True)
      RESULT.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
    broken += not row["held"]
  sys.exit(bool(broken))


if __name__ == "__main__":
  main()
