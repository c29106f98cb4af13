"""Trains a model: `python -m magneto_jax.train --config=configs/gpt.py:tiny --workdir=DIR`."""

from absl import flags

from magneto_jax import cli, training


def main() -> None:
  """Defines the flags and runs the command."""
  config = cli.define_config_flag()
  workdir = cli.define_workdir_flag("Where the run's files go.")
  dry_run = flags.DEFINE_bool("dry_run", False, "Print what would be run, and stop.")

  def run() -> None:
    start = training.dry_run if dry_run.value else training.train
    start(cli.typed_config(config), workdir.value)

  cli.run(run)


if __name__ == "__main__":
  main()
