"""What the commands of this folder share."""

import argparse
import difflib
import re
import sys
import traceback
from collections.abc import Callable

import jax


class Parser(argparse.ArgumentParser):
  """With errors of one line, and `--debug`."""

  def __init__(self, **options):
    super().__init__(**options)
    self.add_argument("--debug", action="store_true", help="show the traceback of an error")

  def error(self, message):
    if unknown := re.match(r"unrecognized arguments: (--?[\w-]+)", message):
      near = difflib.get_close_matches(unknown[1], re.findall(r"--[\w-]+", self.format_usage()))
      message += f"; did you mean {near[0]}?" if near else f"; {self.prog} --help lists them"
    self.exit(2, f"error: {message}\n")


def run(main: Callable[[], int | None]) -> int:
  """The exit status of a command, which ends in a line also where it cannot go on."""
  try:
    return main() or 0
  except KeyboardInterrupt:
    _say("interrupted")
    return 130
  except (OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
    reason = " ".join(str(error).split())[:300]
    is_full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in reason
    _say(f"{reason}{'; measure a smaller call, of a smaller batch or length' if is_full else ''}")
    return 2


def _say(line: str) -> None:
  if "--debug" in sys.argv:
    traceback.print_exc()
  print(f"error: {line}", file=sys.stderr)
