"""The commands' border: config flags, and every mistake as one line."""

import contextlib
import difflib
import errno
import importlib.resources
import importlib.util
import os
import pathlib
import re
import signal
import sys
import tempfile
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from magneto_jax.memory import OutOfMemory, exhausted
from magneto_jax.preemption import Preempted

# What a command ends with, beside 0; docs/launch.md explains them.
UNEXPECTED = 1
USAGE_EXIT_CODE = 2
DIVERGED = 65  # EX_DATAERR of sysexits.h.
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again.
INTERRUPTED = 130

# What to do about what the system says.
_FULL = "free some of the disk, or name a path on another; what is saved stays"
_FOLDER = "a file stands where a folder is needed: move it, or name another path"
_ACCESS = "change its permissions, or name another path"
_ADVICE = {
  errno.EACCES: _ACCESS,
  errno.EPERM: _ACCESS,
  errno.EROFS: "name a path on another disk",
  errno.EEXIST: _FOLDER,
  errno.ENOTDIR: _FOLDER,
  errno.EISDIR: "name a file",
  errno.ENOENT: "check how it is spelt",
  errno.ENOSPC: _FULL,
  errno.EDQUOT: _FULL,
}
_DEBUG = "Show the traceback of an error, before its line."


def define_config_flag() -> flags.FlagHolder:
  """Defines `--config=FILE.py[:variant]` and, with it, an override for each of its fields."""
  return config_flags.DEFINE_config_file("config", None, "A config file, e.g. configs/gpt.py:tiny.")


def typed_config(flag: flags.FlagHolder) -> TrainConfig:
  """The typed record of the parsed config flag; ConfigError if it cannot be run."""
  if not flag.present:
    raise ConfigError(_no_config())
  if not isinstance(flag.value, ml_collections.ConfigDict | dict):
    raise ConfigError(f"the config file must return a config, not {flag.value!r}")
  return from_config_dict(flag.value)


def config_of(config: TrainConfig | Mapping[str, Any] | str | os.PathLike) -> TrainConfig:
  """The typed record of whatever names a run's config; no flags are read.

  Args:
    config: the record itself; a ConfigDict, as `get_config("tiny")` of `magneto_jax.configs.gpt`
      returns one; or a config file with its variant, "configs/gpt.py:tiny", which is run.

  Raises:
    ConfigError: in a line, if it cannot be run.
  """
  if isinstance(config, TrainConfig):
    return config
  if not isinstance(config, str | os.PathLike):
    return from_config_dict(config)
  try:
    path, *variant = _resolved(f"--config={os.fspath(config)}").partition("=")[2].split(":", 1)
    found = _run_file(path).get_config(*variant)
  except Exception as error:  # Whatever the user's config file does.
    raise ConfigError(_parse_error(error)) from error
  if not isinstance(found, ml_collections.ConfigDict | dict):
    raise ConfigError(f"the config file must return a config, not {found!r}")
  return from_config_dict(found)


@contextlib.contextmanager
def errors_in_a_line() -> Iterator[None]:
  """What a command called from Python raises for what its user can mend: ConfigError, in a line."""
  try:
    yield
  except (OSError, BadRecord) as error:
    raise ConfigError(in_words(error)) from error


def in_words(error: Exception) -> str:
  """What went wrong; of what the system refused, the path and what to do about it."""
  if isinstance(error, OSError) and error.errno in _ADVICE:
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{where}{error.strerror.lower()}: {_ADVICE[error.errno]}"
  return str(error)


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
    _run_file(path)

  return run_it


def _run_file(path: str | os.PathLike) -> types.ModuleType:
  """A Python file of the user's, run as a module that nothing else can import."""
  spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


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

  Numbers that are no longer finite end in a line and DIVERGED. What nobody expects ends in a line,
  which says where its traceback is, and UNEXPECTED; Ctrl-C in the error's own words, if it has any.
  With `--debug` the traceback comes first.

  Args:
    main: the command.
    words: whether it takes what is no flag, as a list; else there may be none.
  """
  flags.DEFINE_bool("debug", False, _DEBUG)

  def guarded(argv):
    logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell every step of theirs at INFO.
    # Orbax tells with a traceback what it then raises.
    logging.get_absl_logger().addFilter(lambda r: not (r.exc_info and "orbax" in r.pathname))
    try:
      if argv[1:] and not words:
        raise ConfigError(f"{argv[1]!r} is not a flag: flags are --name=value")
      main(*[argv[1:]] if words else [])
    except (ConfigError, OSError, BadRecord) as error:
      fail(in_words(error))
    except FloatingPointError as error:
      fail(str(error), DIVERGED)
    except OutOfMemory as error:
      _show_traceback()
      print(f"error: {error}", file=sys.stderr)  # In a few lines: what would help is a table.
      distributed.leave(USAGE_EXIT_CODE)
    except Preempted as notice:
      # All processes are here. A launcher that sees the first of them end signals the others again,
      # which now wait for each other.
      signal.signal(signal.SIGTERM, signal.SIG_IGN)
      if distributed.is_first():
        print(notice, file=sys.stderr)
      sys.exit(PREEMPTED)
    except KeyboardInterrupt as error:
      fail(str(error) or "interrupted", INTERRUPTED)
    except Exception as error:
      if (sizes := exhausted(error)) is not None:
        needed = f" of {sizes[0]:,} bytes" if sizes[0] else ""
        fail(f"there is no memory for an array{needed}: ask for less at a time")
      fail(_unexpected(error), UNEXPECTED)

  for stream in (sys.stdout, sys.stderr):
    # A sample may hold any character, a terminal may not.
    stream.reconfigure(errors="replace")
  app.run(guarded, flags_parser=_parse)


def fail(message: str, code: int = USAGE_EXIT_CODE) -> None:
  """Ends the process with one line, in which no file's words can move the terminal's cursor."""
  _show_traceback()
  line = "".join(x if x.isprintable() else "\ufffd" for x in " ".join(message.split()))
  print(f"error: {line}", file=sys.stderr)
  distributed.leave(code)


def _show_traceback() -> None:
  """With `--debug`, that of what is handled now; the other arguments need not be ones."""
  known = flags.FlagValues()
  flags.DEFINE_bool("debug", False, _DEBUG, flag_values=known)
  with contextlib.suppress(flags.Error):
    known(sys.argv, known_only=True)
    if known.debug and sys.exc_info()[0] is not None:
      traceback.print_exc()


def _unexpected(error: Exception) -> str:
  """The error in a line, with the place of its traceback, which a person can send on."""
  if jax.distributed.is_initialized():  # The machine may be gone when somebody looks.
    traceback.print_exc()
    return f"{type(error).__name__}: {error}"
  with tempfile.NamedTemporaryFile("w", prefix="magneto_jax-", suffix=".log", delete=False) as file:
    traceback.print_exc(file=file)
  frame = traceback.extract_tb(error.__traceback__)[-1]
  said = f"{type(error).__name__}: {str(error)[:500]} ({frame.filename}:{frame.lineno})"
  return f"{said}; no mistake that is known: its traceback is in {file.name}"


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
    if isinstance(error, AttributeError) and "attribute 'get_config'" in text:
      return "the config file has no function get_config, which returns the config"
    if named and named.group(1) not in field_names():
      return f"in the config file: {unknown_field(named.group(1))}"
  if "Traceback (most recent call last)" in text:
    # ml_collections puts the whole traceback into its message.
    text = re.sub(r"^[\w.]*(ConfigError|ValueError): ", "", text.strip().splitlines()[-1])
  if isinstance(error, flags.IllegalFlagValueError):
    return _illegal_value(text)
  if isinstance(error, flags.Error | ConfigError | FileNotFoundError):
    return text
  frames = traceback.extract_tb(error.__traceback__)
  line = getattr(error, "lineno", None) or frames[-1].lineno
  file = getattr(error, "filename", None) or frames[-1].filename
  return f"the config file cannot be run: {type(error).__name__}: {text} ({file}:{line})"


def _illegal_value(text: str) -> str:
  """What absl says of a flag's value, as a person would."""
  match = re.fullmatch(r"flag (--([\w.]+)=.*?): (.*)", text, re.S)
  if match is None:
    return text
  flag, name, why = match.groups()
  if "must have a value other than None" in why:
    return f"give --{name}=...: {flags.FLAGS[name].help}"
  if "invalid literal for int" in why:
    return f"{flag} must be an integer"
  if "could not convert string to float" in why:
    return f"{flag} must be a number"
  if "as a ConfigDict" in why:
    group = name.removeprefix("config.") + "."
    first = next(field for field in field_names() if field.startswith(group))
    return f"--{name} is a group of fields: set one, as --config.{first}=..."
  return text


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
  match = re.fullmatch(r"(--?config=)([^:]*)(:.*)?", argument)
  if match is None:
    return argument
  prefix, path, variant = match.groups()
  if not path:
    raise ConfigError(_no_config())
  if pathlib.Path(path).is_file() and path.endswith(".py"):
    return argument
  own = _configs() / pathlib.Path(path).name
  if pathlib.Path(path).parent.name not in ("", "configs") or not own.is_file():
    what = "is no Python file" if pathlib.Path(path).exists() else "does not exist"
    raise FileNotFoundError(f"config file {path} {what} ({_shipped()})")
  return f"{prefix}{own}{variant or ''}"


def _no_config() -> str:
  return f"give --config, e.g. --config=configs/gpt.py:tiny ({_shipped()})"


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
  first, dot, rest = name.partition(".")
  near = difflib.get_close_matches(first, list(flags.FLAGS), n=1)
  hint = f"did you mean --{near[0]}{dot}{rest}?" if near else "--helpfull lists those there are"
  return f"unknown flag --{name}; {hint}"
