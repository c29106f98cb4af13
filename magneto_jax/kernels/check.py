"""Runs the conformance suite of attention on this device: `python -m magneto_jax.kernels.check`.

One line a case: passed, with the largest errors in units of their tolerance; refused, and why; or
FAILED. The exit status is 1 if a case failed, 2 if the command line is wrong.
"""

import argparse
import datetime
import sys
import time
from collections.abc import Sequence

import jax

from magneto_jax.kernels import attention, conformance, platforms, self_check


def main(arguments: Sequence[str] | None = None) -> int:
  """Returns the exit status."""
  parser = argparse.ArgumentParser(
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
  options = parser.parse_args(arguments)
  table = attention.IMPLEMENTATIONS
  unknown = [name for name in options.implementation or () if name not in table]
  if unknown:
    print(f"--implementation={unknown[0]!r} is not one of {list(table)}", file=sys.stderr)
    return 2
  names = options.implementation or [
    name
    for name, implementation in table.items()
    if implementation.platforms is None or platforms.here() in implementation.platforms
  ]
  device = jax.local_devices()[0]
  suite = conformance.QUICK if options.quick else conformance.SUITE
  failed = []
  for name in names:
    print(f"{name} on {device.device_kind}: {len(suite)} cases")
    start, outcomes = time.perf_counter(), []
    for case in suite:
      outcomes.append(_run(case, name))
      print(f"  {case.name}: {outcomes[-1]}", flush=True)
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
    elif not options.quick:
      today = datetime.date.today().isoformat()
      print(f"to record it: {(name, device.device_kind, jax.__version__, today)}")
  return 1 if failed else 0


def _run(case: conformance.Case, name: str) -> conformance.Outcome:
  """What a compiler or a device raises is the failure of one case, not the end of the check."""
  try:
    return conformance.run(case, name)
  except Exception as error:
    return conformance.Outcome(case.name, raised=self_check.one_line(error))


if __name__ == "__main__":
  sys.exit(main())
