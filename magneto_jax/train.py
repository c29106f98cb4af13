"""Trains a model: `python -m magneto_jax.train --config=configs/gpt.py:tiny --workdir=DIR`."""

from absl import flags

from magneto_jax import cli, training


def main() -> None:
  """Defines the flags and runs the command."""
  config = cli.define_config_flag()
  workdir = cli.define_workdir_flag("Where the run's files go.")
  dry_run = flags.DEFINE_bool("dry_run", False, "Print what would be run, and stop.")
  join_hosts = cli.define_hosts_flags()

  def run() -> None:
    start = training.dry_run if dry_run.value else training.train
    typed = cli.typed_config(config)
    join_hosts()
    start(typed, workdir.value)

  cli.run(run)


if __name__ == "__main__":
  main()
