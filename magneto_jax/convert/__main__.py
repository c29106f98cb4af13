"""Converts weights: `python -m magneto_jax.convert --from=torchscale --input=FILE --output=DIR`."""

import json
import pathlib

from absl import flags

from magneto_jax import cli, runs
from magneto_jax.config import ConfigError
from magneto_jax.convert import beit3, fairseq, saved, torchscale
from magneto_jax.convert.files import ConversionError, read_state_dict, write_state_dict

SOURCES = ("torchscale", "fairseq", "beit3")
TARGETS = (*SOURCES, "safetensors")


def main() -> None:
  """Defines the flags and runs the command."""
  flags.DEFINE_enum("from", None, SOURCES, "Whose checkpoint --input is; --output is a new folder.")
  flags.DEFINE_enum("to", None, TARGETS, "What --output is; --input is a folder or a workdir.")
  flags.DEFINE_string("input", None, "A checkpoint (--from), or a folder (--to).", required=True)
  flags.DEFINE_string("output", None, "A new folder (--from), or a file (--to).", required=True)
  flags.DEFINE_string(
    "model_config", "", "A JSON file of the model's arguments, by the source's names."
  )
  flags.DEFINE_integer(
    "image_size", None, "Pixels on a side; interpolates BEiT-3's positions.", lower_bound=1
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
  try:
    import_(args, source) if source else export(args, target)
  except ConversionError as error:
    raise ConfigError(str(error)) from error


def import_(args, source: str) -> None:
  """From a checkpoint to a folder."""
  if args.image_size is not None and source != "beit3":
    raise ConfigError("--image_size goes with --from=beit3 only")
  tensors, config = read_state_dict(args.input, finite=False)
  config = _config(args.model_config, config)
  if source == "beit3":
    read = beit3.read(tensors, config, image_size=args.image_size)
  else:
    read = {"torchscale": torchscale, "fairseq": fairseq}[source].read(tensors, config)
  model, variables, kept = read
  legacy = source == "fairseq" and fairseq.is_legacy(tensors)
  origin = {"from": source, "config": config, "legacy": legacy}
  saved.save(args.output, model, variables, origin=origin, kept=kept)
  print(saved.describe(model, variables))
  defaults = fairseq.DEFAULTS if source == "fairseq" else torchscale.DEFAULTS
  assumed = [f"{key}={value}" for key, value in defaults.items() if key not in config]
  if assumed:
    print(f"not in the configuration, so the defaults of {source}: {', '.join(assumed)}")
  if kept:
    print(f"kept beside the model: {', '.join(sorted(kept))}")
  print(f'written to {args.output}: magneto_jax.load("{args.output}")')


def export(args, target: str) -> None:
  """From a folder, or a run's workdir, to a file."""
  kept, origin = {}, {}
  if saved.holds_model(args.input):
    model, variables, origin, kept = saved.read(args.input)
  else:
    model, variables = runs.load(args.input, step=args.step)
  if pathlib.Path(args.output).exists():
    raise ConfigError(f"{args.output} exists: give another --output")
  if target == "safetensors":
    if pathlib.Path(args.output).suffix != ".safetensors":
      raise ConfigError(f"--output={args.output} must end in .safetensors")
    tensors, kept = saved.flat(variables), {}
  elif target == "fairseq":
    tensors = fairseq.to_fairseq(model, variables, legacy=origin.get("legacy", False))
  else:
    write = {"torchscale": torchscale.to_torchscale, "beit3": beit3.to_beit3}[target]
    tensors = write(model, variables)
  if origin.get("from") != target:
    kept = {}
  write_state_dict(args.output, tensors | kept, origin.get("config"))
  print(saved.describe(model, variables))
  print(f"written to {args.output}: {len(tensors | kept)} tensors")


def _config(path: str, own: dict | None) -> dict:
  """The file's object, or else what the checkpoint itself holds."""
  if path:
    try:
      own = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
      raise ConfigError(f"--model_config={path} cannot be read: {error}") from None
    if not isinstance(own, dict):
      raise ConfigError(f"--model_config={path} must hold a JSON object")
  own = own or {}
  # A configuration as torchscale completed it.
  return own.get("resolved", own)


if __name__ == "__main__":
  main()
