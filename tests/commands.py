"""A command run in this process, as a person would start it: imports cost once."""

import sys
from typing import NamedTuple

from absl import flags


class Ended(NamedTuple):
  """How a command ended: its exit code, and what it wrote."""

  code: int
  out: str
  err: str


def run(module, *arguments: str, monkeypatch, capfd) -> Ended:
  """Runs `module.main()` with these arguments; the flags that it defines are gone afterwards."""
  before = set(flags.FLAGS)
  monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
  capfd.readouterr()
  try:
    module.main()
    code = 0
  except SystemExit as end:
    code = end.code or 0
  finally:
    flags.FLAGS.unparse_flags()
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)
  return Ended(code, *capfd.readouterr())
