"""Converts weights: `python -m magneto_jax.convert --from=torchscale --input=FILE --output=DIR`."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import flags

from magneto_jax import cli, runs
from magneto_jax.config import ConfigError
from magneto_jax.convert import beit3, fairseq, saved, torchscale
from magneto_jax.convert.files import read_state_dict, write_state_dict
from magneto_jax.data import files


class Library(NamedTuple):
  """What the command asks of each library.

  Attributes:
    read: from tensors and configuration to a model, its variables, and what is no parameter.
    write: from a model and its variables to tensors.
    config_of: the configuration of a model.
    defaults: of what the tensors do not show.
  """

  read: Callable
  write: Callable
  config_of: Callable
  defaults: Mapping[str, Any]


SOURCES = {
  "torchscale": Library(
    torchscale.read, torchscale.to_torchscale, torchscale.config_of, torchscale.DEFAULTS
  ),
  "fairseq": Library(fairseq.read, fairseq.to_fairseq, fairseq.config_of, fairseq.DEFAULTS),
  "beit3": Library(beit3.read, beit3.to_beit3, beit3.config_of, beit3.DEFAULTS),
}
TARGETS = (*SOURCES, "safetensors")


def main() -> None:
  """Defines the flags and runs the command."""
  flags.DEFINE_enum(
    "from", None, list(SOURCES), "Whose checkpoint --input is; --output is a new folder."
  )
  flags.DEFINE_enum("to", None, TARGETS, "What --output is; --input is a folder or a workdir.")
  flags.DEFINE_string("input", None, "A checkpoint (--from), or a folder (--to).", required=True)
  flags.DEFINE_string("output", None, "A new folder (--from), or a file (--to).", required=True)
  flags.DEFINE_string(
    "model_config", "", "A JSON file of the model's arguments, by the source's names."
  )
  flags.DEFINE_integer(
    "image_size", None, "Pixels on a side; interpolates BEiT-3's positions.", lower_bound=1
  )
  flags.DEFINE_bool(
    "vision",
    False,
    "Whether of BEiT-3 only its encoder of images is converted, to classify images.",
  )
  flags.DEFINE_integer("step", None, "The workdir's checkpoint; by default the newest.")
  cli.run(lambda: run(flags.FLAGS))


def run(args) -> None:
  """Converts what the flags ask for, and says what it was."""
  source, target = args["from"].value, args["to"].value
  if (source is None) == (target is None):
    raise ConfigError(
      f"give --from ({', '.join(SOURCES)}) to read a checkpoint, or --to ({', '.join(TARGETS)}) to"
      " write one"
    )
  # Where each flag goes that does not go everywhere.
  allowed = {"model_config": source, "step": target}
  allowed |= dict.fromkeys(("image_size", "vision"), source == "beit3")
  for flag, is_allowed in allowed.items():
    if args[flag].present and not is_allowed:
      raise ConfigError(
        f"--{flag} does not go with --{'from' if source else 'to'}={source or target}"
      )
  try:
    import_(args, source) if source else export(args, target)
  except ValueError as error:
    raise ConfigError(str(error)) from error


def import_(args, source: str) -> None:
  """From a checkpoint to a folder."""
  tensors, config = read_state_dict(args.input, finite=False)
  config = _config(args.model_config, config)
  options = {"image_size": args.image_size} if source == "beit3" else {}
  model, variables, kept = SOURCES[source].read(tensors, config, **options)
  if args.vision:
    model, variables = beit3.vision_of(model, variables)
    saved.save(args.output, model, variables)
    print(saved.describe(model, variables))
    print(f'written to {args.output}: magneto_jax.load("{args.output}")')
    return
  others = {name: t.dtype.name for name, t in tensors.items() if t.dtype != np.float32}
  origin = {"from": source, "config": config, "dtypes": others}
  origin["legacy"] = source == "fairseq" and fairseq.is_legacy(tensors)
  saved.save(args.output, model, variables, origin=origin, kept=kept)
  print(saved.describe(model, variables))
  assumed = [f"{k}={v}" for k, v in SOURCES[source].defaults.items() if k not in config]
  if assumed:
    print(f"not in the configuration, so the defaults of {source}: {', '.join(assumed)}")
  if kept:
    print(f"kept beside the model: {', '.join(sorted(kept))}")
  print(f'written to {args.output}: magneto_jax.load("{args.output}")')


def export(args, target: str) -> None:
  """From a folder, or a run's workdir, to a file."""
  kept, origin = {}, {}
  if saved.holds_model(args.input) and args.step is None:
    model, variables, origin, kept = saved.read(args.input)
  else:
    model, variables = runs.load(args.input, step=args.step)
  if pathlib.Path(args.output).exists():
    raise ConfigError(f"{args.output} exists: give another --output")
  if target == "safetensors":
    if pathlib.Path(args.output).suffix != ".safetensors":
      raise ConfigError(f"--output={args.output} must end in .safetensors")
    tensors, config = saved.flat(variables), None
  else:
    library = SOURCES[target]
    options = {"legacy": origin.get("legacy", False)} if target == "fairseq" else {}
    tensors, config = library.write(model, variables, **options), library.config_of(model)
  if origin.get("from") == target:
    # As the checkpoint was: what is no parameter, the configuration, half precision.
    tensors, config = tensors | kept, config | origin["config"]
    dtypes = origin["dtypes"]
    tensors = {name: t.astype(jnp.dtype(dtypes.get(name, t.dtype))) for name, t in tensors.items()}
  write_state_dict(args.output, tensors, config)
  print(saved.describe(model, variables))
  print(f"written to {args.output}: {len(tensors)} tensors")


def _config(path: str, own: dict | None) -> dict:
  """The file's object, or else what the checkpoint itself holds."""
  if path:
    try:
      own = files.read_json(path)
    except (OSError, ValueError) as error:
      raise ConfigError(f"--model_config={path} cannot be read: {error}") from None
  # A configuration as torchscale completed it.
  own = {} if own is None else own.get("resolved", own) if isinstance(own, dict) else own
  if not isinstance(own, dict):
    raise ConfigError(f"--model_config={path} must hold a JSON object")
  return own


if __name__ == "__main__":
  main()
