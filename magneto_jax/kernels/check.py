"""Runs the conformance suite of attention on this device: `python -m magneto_jax.kernels.check`.

One line a case: passed, with the largest errors in units of their tolerance; refused, and why; or
FAILED. The exit status is 1 if a case failed, 2 if the command line is wrong.
"""

import concurrent.futures
import contextlib
import datetime
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence

import jax

from magneto_jax.kernels import attention, command_line, conformance, platforms, self_check


def main(arguments: Sequence[str] | None = None) -> int:
  """Returns the exit status."""
  parser = command_line.Parser(
    prog="python -m magneto_jax.kernels.check",
    description="Runs the conformance suite of attention on this device.",
  )
  parser.add_argument(
    "--implementation",
    action="append",
    metavar="NAME",
    help="one to check, may be repeated; by default all that run on this platform",
  )
  parser.add_argument(
    "--quick", action="store_true", help="a few cases that show every feature once"
  )
  parser.add_argument(
    "--jobs",
    type=int,
    default=1,
    help="processes that share the device, as on a GPU they can: what takes time is compiling",
  )
  options = parser.parse_args(arguments)
  if options.jobs < 1:
    parser.error(f"--jobs={options.jobs} must be at least 1")
  table = attention.IMPLEMENTATIONS
  unknown = [name for name in options.implementation or () if name not in table]
  if unknown:
    parser.error(f"--implementation={unknown[0]!r} is not one of {list(table)}")
  here = platforms.here()
  serving = [name for name, x in table.items() if x.platforms is None or here in x.platforms]
  names = options.implementation or serving
  elsewhere = [name for name in names if name not in serving]
  if elsewhere:
    parser.error(f"--implementation={elsewhere[0]!r} does not run on a {here}")
  if options.jobs > 1:
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  device = jax.local_devices()[0]
  suite = conformance.QUICK if options.quick else conformance.SUITE
  failed = []
  for name in names:
    print(f"{name} on {device.device_kind}: {len(suite)} cases")
    start, outcomes = time.perf_counter(), []
    with _mapped(options.jobs) as mapped:
      for outcome in mapped(functools.partial(_run, name=name), suite):
        outcomes.append(outcome)
        print(f"  {outcome.name}: {outcome}", flush=True)
    counts = {
      "passed": sum(outcome.passed for outcome in outcomes),
      "refused": sum(bool(outcome.refused) for outcome in outcomes),
    }
    counts["FAILED"] = len(outcomes) - sum(counts.values())
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    seconds = time.perf_counter() - start
    print(f"{name} on {device.device_kind}, jax {jax.__version__}: {said}, {seconds:.0f} s")
    if counts["FAILED"]:
      failed.append(name)
    elif counts["passed"] and not options.quick:
      today = datetime.date.today().isoformat()
      print(f"to record it: {(name, device.device_kind, jax.__version__, today)}")
  return 1 if failed else 0


@contextlib.contextmanager
def _mapped(jobs: int):
  """`map`, by so many processes."""
  if jobs == 1:
    yield map
    return
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
    yield pool.map


def _run(case: conformance.Case, name: str) -> conformance.Outcome:
  """What a compiler or a device raises is the failure of one case, not the end of the check."""
  try:
    return conformance.run(case, name)
  except Exception as error:
    return conformance.Outcome(case.name, raised=self_check.one_line(error))


if __name__ == "__main__":
  sys.exit(command_line.run(main))
