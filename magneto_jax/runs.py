"""What a run leaves in its workdir, and how to read it back.

<workdir>/config.json          the run's config, and the identity and facts of its data
<workdir>/checkpoints/<step>/  see `checkpoints.Checkpointer`
<workdir>/rewound/<n>/<step>/  checkpoints after the step to which the run was taken back
<workdir>/data/                the tokenizer and the token files
<workdir>/metrics.jsonl, tensorboard/, learning_curve.png, summary.json
<workdir>/examples.png         of a task that draws what its model makes of some samples
<workdir>/.lock                held by the run that writes all this
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from magneto_jax import distributed, reporting
from magneto_jax.checkpoints import Checkpointer, abstract_like
from magneto_jax.config import (
  ConfigError,
  TrainConfig,
  batch_ranges,
  config_errors,
  differing_fields,
  from_config_dict,
)
from magneto_jax.convert import saved
from magneto_jax.data import files, pipelines, text, tokenizers
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
    rewinds: for each time the run was taken back, the step `to` which, that of the `spike` for
      which, None if by hand, and the `skip_batches` that were asked for.
  """

  config: TrainConfig
  data: dict[str, Any]
  facts: Facts
  rewinds: tuple[dict[str, Any], ...] = ()


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
  made = not path.parent.exists()
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
    # A command that was refused leaves no folder.
    if made and os.listdir(path.parent) == [path.name]:
      shutil.rmtree(path.parent)
    os.close(handle)


def as_json(record: Record) -> dict[str, Any]:
  """The record as JSON-able values."""
  return {**record._asdict(), "config": dataclasses.asdict(record.config)}


def write_record(workdir: pathlib.Path, record: Record) -> None:
  """Leaves the record where `read_record` finds it, whole or not at all, with its own digest."""
  values = as_json(record)
  write_json(workdir / "config.json", {**values, "sha256": files.digest(values)})


def rewind(
  workdir: pathlib.Path, held: Record | None, config: TrainConfig, to: int, spike: int | None = None
) -> Record:
  """Takes a run back to an earlier checkpoint; the later ones are moved to `rewound/`.

  By hand, what was done last by hand is not done again: a command that says so can be run again.

  Args:
    workdir: of the run, held by this process or by the first of those that call this together.
    held: its record.
    config: with what it is to go on.
    to: the checkpoint's step; 0: the run's start.
    spike: the step for which it is taken back; None if by hand.

  Returns:
    The record with this rewind, and with the batches that are left out from now on; `held` if this
    was done before.

  Raises:
    ConfigError: if there is no such checkpoint.
  """
  this = {"to": to, "spike": spike, "skip_batches": config.skip_batches}
  if held is None and spike is not None:  # Before its first checkpoint.
    held = read_record(workdir)
  # All have read, before the first one writes.
  steps = distributed.everywhere(_steps(workdir))[0]
  if held is not None and spike is None:
    if [rewind for rewind in held.rewinds if rewind["spike"] is None][-1:] == [this]:
      return held
  if held is None or to not in (0, *steps):
    kept = f"those of {', '.join(map(str, steps))}, and 0 for the start" if steps else "none"
    raise ConfigError(f"{workdir} has no checkpoint of step {to} to rewind to: it has {kept}")
  before = dataclasses.replace(held.config, skip_batches=config.skip_batches)
  config = with_batches_left_out(before, held, to)
  record = held._replace(config=config, rewinds=(*held.rewinds, this))

  def move() -> None:
    folders = [path for path in checkpoints_in(workdir).iterdir() if path.name.isdecimal()]
    number = 1 + sum(1 for _ in _rewound_in(workdir).glob("*"))
    aside = _rewound_in(workdir) / str(number)
    aside.mkdir(parents=True)
    if (metrics := workdir / "metrics.jsonl").exists():
      shutil.copy(metrics, aside)
    # The newest first, and the record last: broken off between, the run is one that was stopped.
    for folder in sorted(folders, key=lambda path: -int(path.name)):
      if int(folder.name) > to:
        folder.rename(aside / folder.name)
    write_record(workdir, record)

  with config_errors():
    distributed.on_first(lambda: move() if distributed.is_first() else None)
  return record


def with_batches_left_out(config: TrainConfig, held: Record | None, start: int) -> TrainConfig:
  """The config with all batches that the run leaves out: those of its record, and the config's.

  Raises:
    ConfigError: if some of the config's were taken before the step `start`.
  """
  if held is None:
    return config
  before = held.config.skip_batches
  both = ",".join(filter(None, (before, config.skip_batches)))
  config = dataclasses.replace(config, skip_batches=both)
  last = [
    pipelines.batch_of_step(start - 1, batch_ranges(text)) for text in (before, config.skip_batches)
  ]
  if start and last[0] != last[1]:
    raise ConfigError(
      f"skip_batches={config.skip_batches!r} names batches that the run had taken by step {start}:"
      " add --rewind_to, with the step of an earlier checkpoint"
    )
  return config


def write_summary(workdir: pathlib.Path, summary: dict[str, Any]) -> None:
  """Leaves the summary of a finished run."""
  write_json(workdir / "summary.json", summary)


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  """Leaves a file of JSON, whole or not at all."""
  files.write_durably(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def remove_summary(workdir: pathlib.Path) -> None:
  """What an earlier, shorter run left is not this one's."""
  (workdir / "summary.json").unlink(missing_ok=True)


def read_summary(workdir: str | pathlib.Path) -> dict[str, Any] | None:
  """The summary of the run in a workdir; None if it has not come to its end."""
  try:
    summary = files.read_json(pathlib.Path(workdir) / "summary.json")
  except (FileNotFoundError, ValueError):
    return None
  return summary if isinstance(summary, dict) else None


def last_step(workdir: str | pathlib.Path) -> int:
  """The newest step with a complete checkpoint; 0 if there is none."""
  return max(_steps(workdir), default=0)


def _steps(workdir: str | pathlib.Path) -> list[int]:
  """The steps with a complete checkpoint, oldest first."""
  if not checkpoints_in(workdir).exists():
    return []
  with Checkpointer(checkpoints_in(workdir), read_only=True) as checkpointer:
    return checkpointer.steps


def _rewound_in(workdir: str | pathlib.Path) -> pathlib.Path:
  return pathlib.Path(workdir) / "rewound"


def read_record(workdir: str | pathlib.Path) -> Record | None:
  """The record of the run in a workdir, of which checkpoints have a copy; None if there is none."""
  path = pathlib.Path(workdir) / "config.json"
  with config_errors():
    files.refuse_links_out(workdir)
  try:
    if path.exists():
      values = files.read_json(path)
    elif step := last_step(workdir):
      with Checkpointer(checkpoints_in(workdir), read_only=True) as checkpointer:
        values = checkpointer.config(step)
    else:
      return None
    if values.pop("sha256", None) not in (None, files.digest(values)):
      raise ValueError("it has been changed")
    config, rewinds = from_config_dict(values["config"]), tuple(values.get("rewinds", ()))
    return _checked(Record(config, values["data"], values["facts"], rewinds))
  except (ValueError, KeyError, TypeError) as error:
    held = path if path.exists() else checkpoints_in(workdir)
    raise ConfigError(f"{held} does not hold the config of a run: {error}") from None


def _checked(record: Record) -> Record:
  """The record, if its data and facts, which may be a stranger's, are of the right types."""
  if not isinstance(record.data, dict) or not isinstance(record.facts, dict):
    raise TypeError(
      f"data and facts must be objects, not {record.data!r:.40}, {record.facts!r:.40}"
    )
  for rewind in record.rewinds:
    spike = rewind["spike"]
    if not isinstance(rewind["to"], int) or not (spike is None or isinstance(spike, int)):
      raise TypeError(f"its rewind {rewind!r:.80} is none")
    batch_ranges(rewind["skip_batches"])
  kinds = TASKS[record.config.task].fact_kinds
  if missing := kinds.keys() - record.facts.keys():
    raise ValueError(f"it has no fact {min(missing)}")
  for name, fact in record.facts.items():
    kind = kinds.get(name, float)
    if kind is dict:  # Of a model within the model.
      _checked(Record(from_config_dict(fact["config"]), {}, fact["facts"]))
    elif not isinstance(fact, kind | int) or isinstance(fact, bool) or not 0 < fact < 2**31:
      raise ValueError(f"its fact {name[:40]}={fact!r:.40} must be a positive {kind.__name__}")
  return record


def resumable(workdir: str | pathlib.Path, config: TrainConfig) -> Record | None:
  """The record of the run that the config would resume; None if the workdir holds no checkpoint.

  A run that was taken back to its start has none either, and is one.

  Raises:
    ConfigError: if it holds another run.
  """
  with config_errors():  # Of a folder without a run, too: it is written into.
    files.refuse_links_out(workdir)
  rewound = _rewound_in(workdir).exists()
  held = read_record(workdir) if rewound or last_step(workdir) else None
  if held is None:
    return None
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


def held_record(workdir: str | pathlib.Path) -> Record:
  """The record of the run in a workdir; FileNotFoundError if it holds none."""
  record = read_record(workdir)
  if record is None:
    raise FileNotFoundError(
      f"{workdir} holds no run (no config.json): give a workdir that magneto_jax.train has filled"
    )
  return record


def model_of(record: Record) -> nn.Module:
  """The module of a run."""
  return TASKS[record.config.task].build_model(record.config, record.facts)


def best(workdir: str | pathlib.Path, task: str, steps: Sequence[int]) -> tuple[int, float] | None:
  """Of these steps the one with the best validation metric, the first of several, and the metric.

  By metrics.jsonl, which says what each evaluation has found; None if it says nothing of them.
  """
  name, more = TASKS[task].best
  scores = {
    row["step"]: row[f"validation/{name}"]
    for row in reporting.read_metrics(pathlib.Path(workdir))
    if f"validation/{name}" in row
  }
  known = [step for step in steps if step in scores]
  if not known:
    return None
  step = (max if more else min)(known, key=scores.__getitem__)
  return step, scores[step]


def load(
  workdir: str | pathlib.Path,
  *,
  step: int | Literal["best"] | None = None,
  place: Callable[[Any], Any] = abstract_like,
) -> Run:
  """The model of a run and its variables, ready for `model.apply(variables, ...)`.

  The weights are the run's moving average if it kept one, else its last ones.

  Args:
    workdir: of the run; or a folder that `magneto_jax.convert` has written.
    step: of the checkpoint; the newest by default; "best" for that with the best validation metric,
      of a run with `keep_best`.
    place: from the shapes of the variables to the same with shardings, or to those collections
      that are wanted; by default all are on the first device.

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
      model, variables = saved.load(workdir)
    placed = place(variables)
    return Run(model, {name: jax.tree.map(_put, variables[name], placed[name]) for name in placed})
  record = held_record(workdir)
  with config_errors():
    model = model_of(record)
  with Checkpointer(checkpoints_in(workdir), read_only=True) as checkpointer:
    steps = checkpointer.steps
    step = chosen_step(workdir, record, step, steps)
    if step not in steps:
      held = f"no step {step}, only {steps}" if steps else "no complete checkpoint yet"
      raise FileNotFoundError(f"{checkpoints_in(workdir)} has {held}")
    part = "ema_params" if "ema_params" in checkpointer.parts(step) else "params"
    inputs = TASKS[record.config.task].dummy_inputs(record.config)
    abstract = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    # Where a checkpoint has what collection.
    part_of = {"params": part, "state": "variables"}
    placed = place({name: abstract[name] for name in part_of if name in abstract})
    found = checkpointer.restore(step, {part_of[name]: tree for name, tree in placed.items()})
  return Run(model, {name: found[part_of[name]] for name in placed})


def chosen_step(
  workdir: str | pathlib.Path,
  record: Record,
  step: int | Literal["best"] | None,
  steps: Sequence[int] | None = None,
) -> int | None:
  """The step that `load` is asked for; None if there is no checkpoint.

  Args:
    workdir, step: see `load`.
    record: of the run.
    steps: with a complete checkpoint; by default those that the workdir has now.
  """
  if step not in (None, "best"):
    return step
  steps = _steps(workdir) if steps is None else steps
  if step is None:
    return max(steps, default=None)
  if not record.config.keep_best:
    raise FileNotFoundError(f"{workdir} kept no best checkpoint: train with config.keep_best=True")
  found = best(workdir, record.config.task, steps)
  if found is None:
    raise FileNotFoundError(f"{workdir} has no checkpoint that was evaluated yet")
  return found[0]


def _put(array: jax.Array, where: jax.ShapeDtypeStruct) -> jax.Array:
  """The array where it is to lie; each host has all of it."""
  held = np.asarray(array)
  return jax.make_array_from_callback(held.shape, where.sharding, lambda index: held[index])


def load_tokenizer(workdir: str | pathlib.Path) -> tokenizers.Tokenizer:
  """The tokenizer of a text run.

  Raises:
    FileNotFoundError: if the workdir holds no run, or the tokenizer is gone.
    ConfigError: if it is not the one that the run was trained with.
  """
  record = held_record(workdir)
  if record.config.data.tokenizer == "byte":
    return tokenizers.ByteTokenizer()
  kept = text.KEPT[record.config.data.tokenizer]
  with config_errors():
    return kept.kind.load(data_in(workdir) / kept.file, record.data.get("tokenizer", {}))
