"""The commands' border: config flags, and every mistake as one line."""

import difflib
import importlib.resources
import importlib.util
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from magneto_jax import distributed
from magneto_jax.config import (
  ConfigError,
  TrainConfig,
  config_errors,
  default_config,
  field_names,
  from_config_dict,
  unknown_field,
)
from magneto_jax.data import image_files
from magneto_jax.data.documents import BadRecord
from magneto_jax.preemption import Preempted

# What a command ends with, beside 0; docs/launch.md explains them.
USAGE_EXIT_CODE = 2
DIVERGED = 65  # EX_DATAERR of sysexits.h.
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again.
INTERRUPTED = 130


def define_config_flag() -> flags.FlagHolder:
  """Defines `--config=FILE.py[:variant]` and, with it, an override for each of its fields."""
  return config_flags.DEFINE_config_file("config", None, "A config file, e.g. configs/gpt.py:tiny.")


def typed_config(flag: flags.FlagHolder) -> TrainConfig:
  """The typed record of the parsed config flag; ConfigError if it cannot be run."""
  if not flag.present:
    raise ConfigError(f"give --config, e.g. --config=configs/gpt.py:tiny ({_shipped()})")
  if not isinstance(flag.value, ml_collections.ConfigDict | dict):
    raise ConfigError(f"the config file must return a config, not {flag.value!r}")
  return from_config_dict(flag.value)


def define_changes_flag() -> Callable[[], dict[str, Any]]:
  """Defines `--config.field=VALUE` without `--config`: changes to the config of a run.

  Returns:
    What gives those that are set, by dotted name, once the flags are parsed.
  """
  try:
    # ml_collections reads the command line here already.
    _check_overrides(sys.argv)
    config_flags.DEFINE_config_dict("config", default_config())
  except Exception as error:
    fail(_parse_error(error))
  return lambda: config_flags.get_override_values(flags.FLAGS["config"])


def define_task_file_flag() -> Callable[[], None]:
  """Defines `--task_file=FILE.py`; returns what runs that file, once the flags are parsed."""
  holder = flags.DEFINE_string(
    "task_file", "", "A Python file that registers a task of your own (docs/tasks.md); it is run."
  )

  def run_it() -> None:
    if not holder.value:
      return
    path = pathlib.Path(holder.value)
    if path.suffix != ".py" or not path.is_file():
      raise ConfigError(f"--task_file={path} is not a Python file that is there")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))

  return run_it


def define_workdir_flag(doc: str) -> flags.FlagHolder:
  """Defines `--workdir=DIR`, which must be given and not be empty."""
  holder = flags.DEFINE_string("workdir", None, doc, required=True)
  flags.register_validator("workdir", lambda path: path != "", "--workdir must name a folder")
  return holder


class _StepParser(flags.ArgumentParser):
  """A number, or `best`."""

  def parse(self, argument: str) -> int | str:
    if argument != "best" and not argument.isdecimal():
      raise ValueError("it must be the number of a step, or best")
    return argument if argument == "best" else int(argument)


def define_step_flag() -> flags.FlagHolder:
  """Defines `--step=N`, or `best`: which of a run's checkpoints is read."""
  doc = "The checkpoint's step, or best (of a run with keep_best); by default the newest."
  return flags.DEFINE(_StepParser(), "step", None, doc)


def define_hosts_flags() -> Callable[[], None]:
  """Defines the flags that name the processes of a run; returns what joins this one to them.

  That is to be called once the flags are parsed, before devices are used; without the flags it asks
  the environment, and does nothing where there is only one process.
  """
  address = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, where none is found by itself."
  )
  count = flags.DEFINE_integer("num_processes", None, "How many processes run together.")
  index = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
  heartbeat = flags.DEFINE_integer(
    "heartbeat_timeout",
    distributed.HEARTBEAT_TIMEOUT,
    "Seconds without a sign of life after which a process is taken for dead, and the others end.",
    lower_bound=5,
    upper_bound=3600,
  )

  def join() -> None:
    with config_errors():
      distributed.initialize(
        address.value, count.value, index.value, heartbeat_timeout=heartbeat.value
      )

  return join


def read_image(path: str) -> np.ndarray:
  """The pixels, uint8 [H, W, 3], of a file that a person named; ConfigError if it has none."""
  try:
    return image_files.read(path)
  except FileNotFoundError:
    raise ConfigError(f"{path}: there is no such file") from None
  except IsADirectoryError:
    raise ConfigError(f"{path} is a folder: name a file") from None
  except (BadRecord, OSError) as error:
    raise ConfigError(str(error)) from None


def run(main: Callable[..., None], *, words: bool = False) -> None:
  """Runs a command; what the user can mend ends in one line on stderr and exit code 2.

  Numbers that are no longer finite end in a line and DIVERGED.

  Args:
    main: the command.
    words: whether it takes what is no flag, as a list; else there may be none.
  """

  def guarded(argv):
    logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell every step of theirs at INFO.
    # Orbax tells with a traceback what it then raises.
    logging.get_absl_logger().addFilter(lambda r: not (r.exc_info and "orbax" in r.pathname))
    try:
      if argv[1:] and not words:
        raise ConfigError(f"{argv[1]!r} is not a flag: flags are --name=value")
      main(*[argv[1:]] if words else [])
    except (ConfigError, OSError, BadRecord) as error:
      fail(str(error))
    except FloatingPointError as error:
      fail(str(error), DIVERGED)
    except MemoryError as error:
      print(f"error: {error}", file=sys.stderr)  # In a few lines: what would help is a table.
      distributed.leave(USAGE_EXIT_CODE)
    except Preempted as notice:
      # All processes are here. A launcher that sees the first of them end signals the others again,
      # which now wait for each other.
      signal.signal(signal.SIGTERM, signal.SIG_IGN)
      if distributed.is_first():
        print(notice, file=sys.stderr)
      sys.exit(PREEMPTED)
    except KeyboardInterrupt:
      fail("interrupted; what is saved stays, and the same command goes on from it", INTERRUPTED)
    except Exception:
      if jax.distributed.is_initialized():
        traceback.print_exc()
        distributed.leave(1)
      raise

  for stream in (sys.stdout, sys.stderr):
    # A sample may hold any character, a terminal may not.
    stream.reconfigure(errors="replace")
  app.run(guarded, flags_parser=_parse)


def fail(message: str, code: int = USAGE_EXIT_CODE) -> None:
  """Ends the process with one line, in which no file's words can move the terminal's cursor."""
  line = "".join(x if x.isprintable() else "\ufffd" for x in " ".join(message.split()))
  print(f"error: {line}", file=sys.stderr)
  distributed.leave(code)


def _parse(argv: Sequence[str]) -> Sequence[str]:
  try:
    argv = [_resolved(argument) for argument in _joined(argv)]
    _check_overrides(argv)
    return flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    fail(_unknown_flag(error.flagname))
  except Exception as error:  # Whatever the user's config file does.
    fail(_parse_error(error))


def _parse_error(error: Exception) -> str:
  """What is wrong with the flags or the config file, without the traceback."""
  text = str(error)
  if isinstance(error, KeyError | AttributeError):
    # A config file that sets a field which default_config() does not have.
    named = re.search(r'instead of "(\w+)"', text) or re.search(r'"(\w+)"', text)
    if named and named.group(1) not in field_names():
      return f"in the config file: {unknown_field(named.group(1))}"
  if "Traceback (most recent call last)" in text:
    # ml_collections puts the whole traceback into its message.
    text = re.sub(r"^[\w.]*(ConfigError|ValueError): ", "", text.strip().splitlines()[-1])
  if isinstance(error, flags.Error | ConfigError | FileNotFoundError):
    return text
  frames = traceback.extract_tb(error.__traceback__)
  line = getattr(error, "lineno", None) or frames[-1].lineno
  file = getattr(error, "filename", None) or frames[-1].filename
  return f"the config file cannot be run: {type(error).__name__}: {text} ({file}:{line})"


def _joined(argv: Sequence[str]) -> list[str]:
  """`--config FILE` as `--config=FILE`."""
  joined = []
  for argument in argv:
    if joined and joined[-1] in ("--config", "-config"):
      joined[-1] += f"={argument}"
    else:
      joined.append(argument)
  return joined


def _resolved(argument: str) -> str:
  """`--config=configs/x.py` also names the package's own file where there is no such path."""
  match = re.fullmatch(r"(--?config=)([^:]+)(:.*)?", argument)
  if match is None or pathlib.Path(match.group(2)).exists():
    return argument
  prefix, path, variant = match.groups()
  own = _configs() / pathlib.Path(path).name
  if pathlib.Path(path).parent.name not in ("", "configs") or not own.exists():
    raise FileNotFoundError(f"config file {path} does not exist ({_shipped()})")
  return f"{prefix}{own}{variant or ''}"


def _configs() -> pathlib.Path:
  return pathlib.Path(str(importlib.resources.files("magneto_jax.configs")))


def _shipped() -> str:
  files = sorted(path.name for path in _configs().glob("*.py") if path.name != "__init__.py")
  return "the package has " + ", ".join(f"configs/{name}" for name in files)


def _check_overrides(argv: Sequence[str]) -> None:
  """Misspelt `--config.field` flags, before ml_collections reports them as a traceback."""
  groups = {name.rsplit(".", 1)[0] for name in field_names() if "." in name}
  for argument in argv[1:]:
    match = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
    if match and match.group(1) not in {*field_names(), *groups}:
      raise unknown_field(match.group(1))


def _unknown_flag(name: str) -> str:
  near = difflib.get_close_matches(name.split(".")[0], list(flags.FLAGS), n=1)
  hint = f"; did you mean --{near[0]}{name[len(name.split('.')[0]) :]}?" if near else ""
  return f"unknown flag --{name}{hint}"
