"""Plans a run on a machine that need not be there.

`python -m magneto_jax.plan --config=configs/gpt.py:gpt_1b3 --topology=v5e:16x16` compiles the
config's train step for that machine and prints its memory by part, FLOPs, collectives and roofline;
see docs/plan.md. The exit code is 0 if the step fits, 3 if it does not, 2 if it cannot be planned.
"""

import json
import pathlib
import sys

import jax
from absl import flags

from magneto_jax import cli, planning, reporting

DOES_NOT_FIT = 3


def main() -> None:
  """Defines the flags and runs the command."""
  config = cli.define_config_flag()
  topology = flags.DEFINE_string(
    "topology",
    None,
    "The machine: v5e:16x16, v5p:8x8x8, v6e:2x2, tpu7x:2x2x1 or cpu:8.",
    required=True,
  )
  path = flags.DEFINE_string("json", None, "A file to write the plan to.")

  def run() -> None:
    # No accelerator is started, also where there is one.
    jax.config.update("jax_platforms", "cpu")
    typed = cli.typed_config(config)
    if path.value:
      pathlib.Path(path.value).write_text("")  # That it cannot be written is better known now.
    try:
      plan = planning.make_plan(typed, topology.value)
    except BaseException:
      if path.value:
        pathlib.Path(path.value).unlink()
      raise
    if path.value:
      text = json.dumps(planning.as_json(plan), indent=2, allow_nan=False)
      pathlib.Path(path.value).write_text(text + "\n")
    planning.show(plan, reporting.make_console())
    if not plan.attempt.fits:
      sys.exit(DOES_NOT_FIT)

  cli.run(run)


if __name__ == "__main__":
  main()
