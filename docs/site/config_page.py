"""Writes docs/config.md from magneto_jax/config.py: `python docs/site/config_page.py`."""

import dataclasses
import importlib
import pathlib
import sys
from collections.abc import Iterator

from magneto_jax import config

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "config.md"

HEAD = """\
# Config reference

Every field of a run, written from `magneto_jax/config.py` by `python docs/site/config_page.py`. A
field is set in a config file, which starts from `config.default_config()`, or by a flag behind it:
`--config.model.width=512`, a truth value by `--config.data.regression` or
`--noconfig.data.regression`. Whatever does not exist, has another type, lies outside its bounds, or
is not read by the task ends a command in one line before devices start; for a misspelt field the
line names the nearest one.

```python
from magneto_jax.config import default_config, from_config_dict

config = default_config()
config.model.layers = 12
config.recipe = "deepnet"
typed = from_config_dict(config)  # Checked: a frozen record of the same fields.
print(typed.model.heads, typed.model.ffn_width)  # What follows from the width is written out.
```

`python -m magneto_jax.train --config=... --workdir=... --dry_run` prints what a config comes to.
Whole numbers are at most 2,147,483,647 and others at most what float32 holds, where no bound is
given.

## Config files

A config file is Python, one experiment a file; behind a colon stands the variant. `configs/NAME.py`
also names the installed package's own, wherever the command is started.

| file | variants |
|---|---|
"""

TABLE = """
| field | default | what it is | allowed | read by |
|---|---|---|---|---|
"""

RESUMED = """
## What may differ when a run goes on

The same command in the same workdir resumes. These fields may then have other values; any other
that differs is named, with both of its values, and the run is refused:

"""


def groups(record: type = config.TrainConfig, prefix: str = "") -> Iterator[tuple[str, type]]:
  """(dotted prefix, record) of each group of fields, the run's own first."""
  yield prefix, record
  for field in dataclasses.fields(record):
    if dataclasses.is_dataclass(field.type):
      yield from groups(field.type, f"{prefix}{field.name}.")


def allowed(field: dataclasses.Field) -> str:
  """The field's choices or bounds, in words; bounds of its kind of number go without saying."""
  bounds = field.metadata
  if "choices" in bounds:
    return ", ".join(code(choice) for choice in bounds["choices"])
  words = [
    f"{sign} {bounds[key]:,}"
    for key, sign in (("min", "≥"), ("above", ">"), ("max", "≤"), ("below", "<"))
    if key in bounds and abs(bounds[key]) < 2**31 - 1
  ]
  if field.type is bool:
    return "true, false"
  return ", ".join(words) or {int: "a whole number", float: "a number", str: "text"}[field.type]


def code(value: object) -> str:
  """A value as code; an empty text is a pair of quotes."""
  return f"`{value if value != '' else repr('')}`"


def row(prefix: str, field: dataclasses.Field) -> str:
  """The field's line of the table."""
  name = prefix + field.name
  reading = config.tasks_reading(name)
  tasks = "all" if reading is None else ", ".join(map(code, reading))
  cells = (code(name), code(field.default), field.metadata["doc"], allowed(field), tasks)
  return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def page() -> str:
  """The page; a function of the fields and of the config files' variants."""
  text = HEAD
  for path in sorted((ROOT / "configs").glob("[a-z]*.py")):
    variants = importlib.import_module(f"configs.{path.stem}").VARIANTS
    text += f"| `configs/{path.name}` | {', '.join(map(code, variants))} |\n"
  for prefix, record in groups():
    title = f"`{prefix[:-1]}`" if prefix else "The run"
    text += f"\n## {title}\n\n{' '.join(record.__doc__.split())}\n{TABLE}"
    own = (f for f in dataclasses.fields(record) if not dataclasses.is_dataclass(f.type))
    text += "".join(row(prefix, field) for field in own)
  return text + RESUMED + ", ".join(map(code, config.RESUMABLE)) + ".\n"


if __name__ == "__main__":
  sys.path.insert(0, str(ROOT))
  PAGE.write_text(page(), encoding="utf-8")
