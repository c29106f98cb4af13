"""Trains a model: `python -m magneto_jax.train --config=configs/gpt.py:tiny --workdir=DIR`.

With `--seeds=0,1,2` as many, one after the other, each in a workdir of its own, DIR/seed_0 and so
on; DIR/seeds.json then has what their metrics come to. The same command goes on where it stopped.
"""

import dataclasses
import gc
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from magneto_jax import cli, distributed, reporting, runs, training
from magneto_jax.config import ConfigError, TrainConfig


def run(
  config: TrainConfig | Mapping[str, Any] | str | os.PathLike,
  workdir: str | os.PathLike,
  *,
  seeds: Sequence[int] = (),
  rewind_to: int | None = None,
) -> dict[str, Any]:
  """Trains a model: the command, from Python or a notebook. A run that is there goes on.

  Args:
    config: a record, a ConfigDict, or a config file with its variant; see `cli.config_of`.
    workdir: where the run's files go; made if it does not exist.
    seeds: of several runs, in `workdir/seed_<seed>`.
    rewind_to: the step of a checkpoint to go on from; see `training.train`.

  Returns:
    What `summary.json` holds; of several runs, what `seeds.json` does.

  Raises:
    ConfigError: in a line, if the config cannot be run, or the workdir holds another run.
    Diverged, OutOfMemory, Preempted: see `training.train`.

  Example:
    >>> from magneto_jax.configs import gpt
    >>> config = gpt.get_config("tiny")
    >>> config.recipe = "deepnet"
    >>> magneto_jax.train.run(config, "runs/deepnet")["validation_loss_nats_per_token"]
  """
  with cli.errors_in_a_line():
    if seeds and rewind_to is not None:
      raise ConfigError("--seeds is of whole runs: leave out --rewind_to")
    typed = cli.config_of(config)
    if seeds:
      return train_seeds(typed, workdir, seeds)
    return training.train(typed, workdir, rewind_to=rewind_to)


def train_seeds(config: TrainConfig, workdir: str | pathlib.Path, seeds: Sequence[int]) -> dict:
  """Trains with each seed in `workdir/seed_<seed>`, unless that is done; what they come to.

  Returns:
    What `workdir/seeds.json` holds: the seeds, and `reporting.spread` of their metrics.
  """
  workdir, summaries = pathlib.Path(workdir), []
  for seed in seeds:
    of_seed = dataclasses.replace(config, seed=seed)
    summaries.append(training.train(of_seed, workdir / f"seed_{seed}"))
    gc.collect()  # Devices may hold no second state.
  found = {"seeds": list(seeds), "metrics": reporting.spread(summaries)}
  if distributed.is_first():
    runs.write_json(workdir / "seeds.json", found)
    title = f"{len(seeds)} seeds: {', '.join(map(str, seeds))}"
    reporting.make_console().print(reporting.spread_table(found["metrics"], title=title))
  return found


def _seeds(texts: Sequence[str]) -> list[int]:
  """The seeds of the flag; whether each can be one is the config's to say."""
  if not all(text.isdecimal() for text in texts) or len(set(texts)) < len(texts):
    raise ConfigError(f"--seeds={','.join(texts)} must be different numbers, e.g. 0,1,2")
  return list(map(int, texts))


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
  seeds = flags.DEFINE_list(
    "seeds", [], "Seeds of several runs, in DIR/seed_<seed>; mean and spread in DIR/seeds.json."
  )
  join_hosts = cli.define_hosts_flags()

  def start() -> None:
    typed = cli.typed_config(config)
    if dry_run.value and rewind_to.value is not None:
      raise ConfigError("--dry_run changes nothing: leave out --rewind_to")
    if seeds.value and (dry_run.value or rewind_to.value is not None):
      raise ConfigError("--seeds is of whole runs: leave out --dry_run and --rewind_to")
    numbers = _seeds(seeds.value)
    join_hosts()
    if dry_run.value:
      training.dry_run(typed, workdir.value)
      return
    try:
      run(typed, workdir.value, seeds=numbers, rewind_to=rewind_to.value)
    except KeyboardInterrupt:
      said = "interrupted; what is saved stays, and the same command goes on from it"
      raise KeyboardInterrupt(said) from None

  cli.run(start)


if __name__ == "__main__":
  main()
