"""What a run leaves in its workdir, and how to read it back.

<workdir>/config.json          the run's config, and the identity and facts of its data
<workdir>/checkpoints/<step>/  see `checkpoints.Checkpointer`
<workdir>/data/                the tokenizer and the token files
<workdir>/metrics.jsonl, tensorboard/, learning_curve.png, summary.json
<workdir>/.lock                held by the run that writes all this
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from magneto_jax.checkpoints import Checkpointer, abstract_like
from magneto_jax.config import (
  ConfigError,
  TrainConfig,
  config_errors,
  differing_fields,
  from_config_dict,
)
from magneto_jax.convert import saved
from magneto_jax.data import files, text, tokenizers
from magneto_jax.tasks import TASKS
from magneto_jax.tasks.task import Facts


class Run(NamedTuple):
  """A trained model: `model, variables = magneto_jax.load(workdir)`."""

  model: nn.Module
  variables: dict[str, Any]


class Record(NamedTuple):
  """What config.json holds.

  Attributes:
    config: of the run.
    data: JSON-able values that name the run's data exactly.
    facts: what the model must know of the data; see `tasks.Task`.
  """

  config: TrainConfig
  data: dict[str, Any]
  facts: Facts


def checkpoints_in(workdir: str | pathlib.Path) -> pathlib.Path:
  """Where the run's checkpoints lie."""
  return pathlib.Path(workdir) / "checkpoints"


def data_in(workdir: str | pathlib.Path) -> pathlib.Path:
  """Where the run's tokenizer and token files lie."""
  return pathlib.Path(workdir) / "data"


@contextlib.contextmanager
def the_only_one(workdir: str | pathlib.Path) -> Iterator[None]:
  """While this is entered, no other run can write in the workdir; to be entered by one process.

  The system lets go of it when the process ends, however that happens.

  Raises:
    ConfigError: if another run has entered it.
  """
  import fcntl  # Not on Windows.

  path = pathlib.Path(workdir) / ".lock"
  path.parent.mkdir(parents=True, exist_ok=True)
  handle = os.open(path, os.O_RDWR | os.O_CREAT)
  try:
    with contextlib.suppress(OSError):  # Some file systems know no locks.
      try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise ConfigError(
          f"another run is writing in {workdir}: wait for its end, or use another workdir"
        ) from None
    yield
  finally:
    os.close(handle)


def as_json(record: Record) -> dict[str, Any]:
  """The record as JSON-able values."""
  return {**record._asdict(), "config": dataclasses.asdict(record.config)}


def write_record(workdir: pathlib.Path, record: Record) -> None:
  """Leaves the record where `read_record` finds it, whole or not at all."""
  _write_json(workdir / "config.json", as_json(record))


def write_summary(workdir: pathlib.Path, summary: dict[str, Any]) -> None:
  """Leaves the summary of a finished run."""
  _write_json(workdir / "summary.json", summary)


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  files.write_durably(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def remove_summary(workdir: pathlib.Path) -> None:
  """What an earlier, shorter run left is not this one's."""
  (workdir / "summary.json").unlink(missing_ok=True)


def read_summary(workdir: str | pathlib.Path) -> dict[str, Any] | None:
  """The summary of the run in a workdir; None if it has not come to its end."""
  path = pathlib.Path(workdir) / "summary.json"
  try:
    return json.loads(path.read_text())
  except (FileNotFoundError, ValueError):
    return None


def last_step(workdir: str | pathlib.Path) -> int:
  """The newest step with a complete checkpoint; 0 if there is none."""
  if not checkpoints_in(workdir).exists():
    return 0
  with Checkpointer(checkpoints_in(workdir), read_only=True) as checkpointer:
    return max(checkpointer.steps, default=0)


def read_record(workdir: str | pathlib.Path) -> Record | None:
  """The record of the run in a workdir, of which checkpoints have a copy; None if there is none."""
  path = pathlib.Path(workdir) / "config.json"
  try:
    if path.exists():
      values = json.loads(path.read_text())
    elif step := last_step(workdir):
      with Checkpointer(checkpoints_in(workdir), read_only=True) as checkpointer:
        values = checkpointer.config(step)
    else:
      return None
    return Record(from_config_dict(values["config"]), values["data"], values["facts"])
  except (ValueError, KeyError, TypeError) as error:
    held = path if path.exists() else checkpoints_in(workdir)
    raise ConfigError(f"{held} does not hold the config of a run: {error}") from None


def resumable(workdir: str | pathlib.Path, config: TrainConfig) -> Record | None:
  """The record of the run that the config would resume; None if the workdir holds no checkpoint.

  Raises:
    ConfigError: if it holds another run.
  """
  if not last_step(workdir):
    return None
  held = read_record(workdir)
  refuse_if_different(workdir, held, held._replace(config=config))
  return held


def refuse_if_different(workdir, old: Record, new: Record) -> None:
  """Raises ConfigError, naming the fields, unless `new` may go on where `old` stopped."""
  different = [
    f"{name} was {before!r}, is {after!r}"
    for name, (before, after) in differing_fields(old.config, new.config).items()
  ]
  if not different:
    # Identities are digests, which say nothing to a reader.
    names = sorted(old.data.keys() | new.data.keys())
    changed = [name for name in names if old.data.get(name) != new.data.get(name)]
    different = [f"its data have changed ({name})" for name in changed]
  if different:
    raise ConfigError(
      f"{workdir} holds another run: {', '.join(different)}; use another workdir, or delete it"
    )


def _read(workdir: str | pathlib.Path) -> Record:
  record = read_record(workdir)
  if record is None:
    raise FileNotFoundError(
      f"{workdir} holds no run (no config.json): give a workdir that magneto_jax.train has filled"
    )
  return record


def load(workdir: str | pathlib.Path, *, step: int | None = None) -> Run:
  """The model of a run and its variables, ready for `model.apply(variables, ...)`.

  The weights are the run's moving average if it kept one, else its last ones.

  Args:
    workdir: of the run; or a folder that `magneto_jax.convert` has written.
    step: of the checkpoint; the newest by default.

  Returns:
    The pair (model, variables).

  Raises:
    FileNotFoundError: if the workdir holds no run, or no such checkpoint.

  Example:
    >>> model, variables = magneto_jax.load("runs/tiny")
    >>> logits = model.apply(variables, tokens_BT)
  """
  if saved.holds_model(workdir):
    if step is not None:
      raise FileNotFoundError(f"{workdir} is a converted model, it has no steps")
    with config_errors():
      return Run(*saved.load(workdir))
  record = _read(workdir)
  task = TASKS[record.config.task]
  model = task.build_model(record.config, record.facts)
  with Checkpointer(checkpoints_in(workdir), read_only=True) as checkpointer:
    steps = checkpointer.steps
    step = max(steps, default=None) if step is None else step
    if step not in steps:
      held = f"no step {step}, only {steps}" if steps else "no complete checkpoint yet"
      raise FileNotFoundError(f"{checkpoints_in(workdir)} has {held}")
    part = "ema_params" if "ema_params" in checkpointer.parts(step) else "params"
    inputs = task.dummy_inputs(record.config)
    abstract = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    params = checkpointer.restore(step, {part: abstract_like(abstract)})[part]
  return Run(model, {"params": params})


def load_tokenizer(workdir: str | pathlib.Path) -> tokenizers.Tokenizer:
  """The tokenizer of a text run.

  Raises:
    FileNotFoundError: if the workdir holds no run, or the tokenizer is gone.
    ConfigError: if it is not the one that the run was trained with.
  """
  record = _read(workdir)
  if record.config.data.tokenizer == "byte":
    return tokenizers.ByteTokenizer()
  path = data_in(workdir) / text.TOKENIZER_FILE
  with config_errors():
    tokenizer = tokenizers.SentencePieceTokenizer.load(path)
  if tokenizer.identity != record.data["tokenizer"]:
    raise ConfigError(f"{path} is not the tokenizer that this run was trained with")
  return tokenizer
