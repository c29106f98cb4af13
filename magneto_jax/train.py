"""Trains a model: `python -m magneto_jax.train --config=configs/gpt.py:tiny --workdir=DIR`."""

from absl import flags

from magneto_jax import cli, training
from magneto_jax.config import ConfigError


def main() -> None:
  """Defines the flags and runs the command."""
  config = cli.define_config_flag()
  workdir = cli.define_workdir_flag("Where the run's files go.")
  dry_run = flags.DEFINE_bool("dry_run", False, "Print what would be run, and stop.")
  rewind_to = flags.DEFINE_integer(
    "rewind_to",
    None,
    "Go on from the checkpoint of this step, 0 for the start; later ones are moved to rewound/.",
    lower_bound=0,
  )
  join_hosts = cli.define_hosts_flags()

  def run() -> None:
    typed = cli.typed_config(config)
    if dry_run.value and rewind_to.value is not None:
      raise ConfigError("--dry_run changes nothing: leave out --rewind_to")
    join_hosts()
    if dry_run.value:
      training.dry_run(typed, workdir.value)
    else:
      training.train(typed, workdir.value, rewind_to=rewind_to.value)

  cli.run(run)


if __name__ == "__main__":
  main()
