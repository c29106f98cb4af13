"""Says what commands there are, and where to begin: `python -m magneto_jax`."""

import difflib
import sys
from collections.abc import Sequence

# By module, in the order in which a person meets them.
COMMANDS = {
  "train": "trains a model from a config file, or goes on with a run",
  "generate": "continues, translates, writes down sounds, captions images, with a run's model",
  "evaluate": "scores a run on any split of its data, or by multiple choice",
  "search": "ranks a folder's images for a text, or by an image, with a run's model",
  "diagnose": "measures a config's model before training: will it be stable?",
  "plan": "compiles a config's step for a machine that need not be there: will it fit?",
  "convert": "reads weights of torchscale, fairseq and BEiT-3, and writes them",
  "kernels.check": "runs the conformance suite of attention on this device",
  "kernels.tune": "times attention's block sizes on this device",
}

BEGIN = """\
To begin, where two CPU cores suffice for some minutes:

  python -m magneto_jax.train --config=configs/gpt.py:tiny --workdir=runs/tiny
  python -m magneto_jax.generate --workdir=runs/tiny --prompt="PROSPERO. "

COMMAND --help lists a command's flags; --debug shows the traceback of an error. In Python:
magneto_jax.train.run(config, workdir), magneto_jax.evaluate.run(workdir),
magneto_jax.diagnose.run(config), magneto_jax.load(workdir)."""


def text() -> str:
  """The commands, one a line, and where to begin."""
  width = max(map(len, COMMANDS))
  lines = [f"  python -m magneto_jax.{name:{width}}  {does}" for name, does in COMMANDS.items()]
  return "\n".join(["magneto_jax: foundation transformers in JAX and Flax", "", *lines, "", BEGIN])


def main(arguments: Sequence[str]) -> int:
  """Prints the commands; the exit status is 2 if one was asked for here."""
  if not arguments or arguments[0] in ("-h", "--help", "help"):
    print(text())
    return 0
  near = difflib.get_close_matches(arguments[0], COMMANDS, n=1) or ["COMMAND"]
  print(
    f"error: {arguments[0]!r} is not read here: python -m magneto_jax.{near[0]} runs a command, and"
    " python -m magneto_jax lists them",
    file=sys.stderr,
  )
  return 2


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
