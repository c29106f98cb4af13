"""What a run leaves in its workdir, and how to read it back.

<workdir>/config.json          the run's config, and the identity and facts of its data
<workdir>/checkpoints/<step>/  see `checkpoints.Checkpointer`
<workdir>/data/                the tokenizer and the token files
<workdir>/metrics.jsonl, tensorboard/, learning_curve.png, summary.json
"""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from magneto_jax.checkpoints import Checkpointer, abstract_like
from magneto_jax.config import ConfigError, TrainConfig, differing_fields, from_config_dict
from magneto_jax.data import tokenizers
from magneto_jax.tasks import TASKS


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
  facts: dict[str, int]


def checkpoints_in(workdir: str | pathlib.Path) -> pathlib.Path:
  """Where the run's checkpoints lie."""
  return pathlib.Path(workdir) / "checkpoints"


def data_in(workdir: str | pathlib.Path) -> pathlib.Path:
  """Where the run's tokenizer and token files lie."""
  return pathlib.Path(workdir) / "data"


def as_json(record: Record) -> dict[str, Any]:
  """The record as JSON-able values."""
  return {**record._asdict(), "config": dataclasses.asdict(record.config)}


def write_record(workdir: pathlib.Path, record: Record) -> None:
  """Leaves the record where `read_record` finds it, whole or not at all."""
  temporary = workdir / "config.json.tmp"
  temporary.write_text(json.dumps(as_json(record), indent=2) + "\n")
  temporary.replace(workdir / "config.json")


def read_record(workdir: str | pathlib.Path) -> Record | None:
  """The record of the run in a workdir; None if there is none."""
  path = pathlib.Path(workdir) / "config.json"
  if not path.exists():
    return None
  try:
    values = json.loads(path.read_text())
    return Record(from_config_dict(values["config"]), values["data"], values["facts"])
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(f"{path} is not the config of a run: {error}") from None


def refuse_if_different(workdir, old: Record, new: Record) -> None:
  """Raises ConfigError, naming the fields, unless `new` may go on where `old` stopped."""
  different = differing_fields(old.config, new.config)
  for name in sorted(old.data.keys() | new.data.keys()):
    before, after = old.data.get(name), new.data.get(name)
    if before != after and not different:
      different[f"data ({name})"] = before, after
  if different:
    fields = ", ".join(f"{name} was {a!r}, is {b!r}" for name, (a, b) in different.items())
    raise ConfigError(f"{workdir} holds another run: {fields}; use another workdir, or delete it")


def _read(workdir: str | pathlib.Path) -> Record:
  record = read_record(workdir)
  if record is None:
    raise FileNotFoundError(
      f"{workdir} holds no run (no config.json): give a workdir that magneto_jax.train has filled"
    )
  return record


def load(workdir: str | pathlib.Path, *, step: int | None = None) -> Run:
  """The model of a run and its variables, ready for `model.apply(variables, ...)`.

  The weights are the run's averages if it kept any, else its last ones.

  Args:
    workdir: of the run.
    step: of the checkpoint; the newest by default.

  Returns:
    The pair (model, variables).

  Raises:
    FileNotFoundError: if the workdir holds no run, or no such checkpoint.

  Example:
    >>> model, variables = magneto_jax.load("runs/tiny")
    >>> logits = model.apply(variables, tokens_BT)
  """
  record = _read(workdir)
  task = TASKS[record.config.task]
  model = task.build_model(record.config, record.facts)
  checkpointer = Checkpointer(checkpoints_in(workdir), read_only=True)
  try:
    steps = checkpointer.steps
    step = max(steps, default=None) if step is None else step
    if step not in steps:
      raise FileNotFoundError(f"{checkpoints_in(workdir)} has no step {step}, only {steps}")
    part = "averages" if "averages" in checkpointer.parts(step) else "params"
    inputs = task.dummy_inputs(record.config)
    abstract = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    params = checkpointer.restore(step, {part: abstract_like(abstract)})[part]
  finally:
    checkpointer.close()
  return Run(model, {"params": params})


def load_tokenizer(workdir: str | pathlib.Path) -> tokenizers.Tokenizer:
  """The tokenizer of a text run."""
  data = _read(workdir).config.data
  if data.tokenizer == "byte":
    return tokenizers.ByteTokenizer()
  path = data.tokenizer_file or data_in(workdir) / "tokenizer.model"
  return tokenizers.SentencePieceTokenizer.load(path)
