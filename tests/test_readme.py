"""The README's first two commands, (1) train, (2) test, and its example for other projects."""

import dataclasses
import inspect
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from flax import linen as nn

from magneto_jax import RECIPES, evaluation, models, multiple_choice, sharding, tasks
from magneto_jax.config import MeshConfig, field_names
from magneto_jax.data import choices
from magneto_jax.kernels import attention
from tests import simulated

ROOT = pathlib.Path(__file__).resolve().parents[1]


README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(language: str, text: str) -> list[str]:
  return [body.strip() for body in re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)]


def problems(command: str) -> list[str]:
  """Why `command` would not run as pasted into an empty terminal, at the top of a clone."""
  found = []
  if "\n" in command:
    found.append("is more than one line")
  if "git clone" in command:
    found.append("clones, but the reader has a clone")
  if not re.match(r"python3 -m venv (\S+) && \1/bin/pip install ", command):
    found.append("does not begin by making a virtual environment and installing into it")
  venv = command.split()[3] if len(command.split()) > 3 else ""
  for word in shlex.split(command.replace("&&", " ")):
    path = word.partition("=")[2] if word.startswith("-") else word
    if path.startswith(("/", "~")) or ".." in path:
      found.append(f"leaves the clone: {word}")
    if word.endswith(("/pip", "/python")) and not word.startswith(f"{venv}/bin/"):
      found.append(f"uses another environment: {word}")
  return found


@pytest.fixture
def fences() -> list[str]:
  return fenced("bash", README)


def test_first_two_commands_run_as_pasted(fences):
  assert len(fences) >= 2
  assert {command: problems(command) for command in fences[:2]} == dict.fromkeys(fences[:2], [])


def test_first_command_trains(fences):
  words = shlex.split(fences[0])
  assert "magneto_jax.train" in words
  flags = dict(word.split("=", 1) for word in words if word.startswith("--"))
  assert flags == {"--config": "configs/gpt.py:tiny", "--workdir": "runs/tiny"}
  assert (ROOT / "configs" / "gpt.py").is_file()


def test_second_command_runs_the_tests(fences):
  words = shlex.split(fences[1])
  assert ".[test]" in words and "-e" in words
  assert words[words.index("pytest") - 1] == "-m"
  assert words[words.index("pytest") + 1 :] == ["-n", "2", "-m", "not slow and not ci"]


def test_layers_serve_other_projects_as_written():
  """In Linen and in NNX, without a warning; and the init function of a recipe's group."""
  model, _, blocks = fenced("python", README)
  # The model as it is written, by its shapes: its weights take half a minute. No run to load.
  model = model.replace("model.init(", "jax.eval_shape(model.init, ")
  recipe = [line for line in model.splitlines() if "magneto_jax.load(" not in line]
  call = re.search(r"`(initializers\.kernel_init\(.*?\))`", README)[1]
  code = [blocks, *recipe, f"assert y.shape == {call}(jax.random.key(0), x.shape).shape"]
  subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(code)], check=True, cwd=ROOT)


def test_a_model_is_diagnosed_as_written(tmp_path):
  """With fewer layers, which is all that the time depends on."""
  code = fenced("python", README)[1].replace("decoder_layers=200", "decoder_layers=7")
  command = [sys.executable, "-W", "error", "-c", code]
  said = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True).stdout
  assert said.startswith("take ")
  assert (tmp_path / "deepnet.png").stat().st_size > 10_000


def test_attention_is_called_as_written():
  """The page's example, and its table of implementations."""
  page = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
  code, sharded = fenced("python", page)
  command = [sys.executable, "-W", "error", "-c"]
  said = subprocess.run([*command, code], check=True, capture_output=True, text=True).stdout
  assert said.startswith("attention by PallasTpu(") and "XlaChunked(" in said
  given = "import jax.numpy as jnp\nfrom magneto_jax import kernels, sharding\n"
  given += "q = k = v = jnp.ones((2, 8, 4, 16))\nmesh = sharding.make_mesh({})\n"
  subprocess.run([*command, given + sharded], check=True)
  table = page.split("## Implementations")[1].split("\n\n")[1]
  assert re.findall(r"^\| `(\w+)`", table, re.M) == list(attention.IMPLEMENTATIONS)


def test_a_model_is_sharded_as_written():
  """The page's example, on four devices; its axes and its knobs are those of the config."""
  page = (ROOT / "docs" / "sharding.md").read_text(encoding="utf-8")
  (code,) = fenced("python", page)
  code += "\nassert len(logits.sharding.device_set) == 4 and not logits.is_fully_replicated"
  command = [sys.executable, "-W", "error", "-c", code]
  subprocess.run(command, check=True, env=simulated.devices(4))
  axes = re.findall(r"^\| `(\w+)`[^|]*\| `(\w+)` \|", page, re.M)
  assert [axis for _, axis in axes] == list(sharding.MESH_AXES)
  assert [field for field, _ in axes] == list(dataclasses.asdict(MeshConfig()))
  knobs = re.findall(r"^\| `([\w.]+)` \| (?!`)", page.split("## Knobs")[1], re.M)
  assert len(knobs) == 6 and set(knobs) <= set(field_names())


@pytest.mark.ci
def test_a_task_is_added_as_written(tmp_path):
  """In one file and by the commands beside it; it learns, and is evaluated on its third split."""
  page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
  (code,), commands = fenced("python", page), fenced("sh", page)[0].splitlines()
  (tmp_path / "counting.py").write_text(code + "\n")
  for command in commands:
    words = [sys.executable, *shlex.split(command)[1:]]
    said = subprocess.run(words, check=True, cwd=tmp_path, capture_output=True, text=True).stdout
  summary = json.loads((tmp_path / "runs" / "counting" / "summary.json").read_text())
  baseline = summary["baselines"]["mean_squared_error"]["the training mean"]
  assert summary["validation_mean_squared_error"] < baseline / 4
  assert "on the split 'test': 256 samples" in said and "mean squared error" in said
  # Without the file the run names a task that is not known.
  words = [word for word in words if not word.startswith("--task_file")]
  result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
  assert result.returncode == 2 and result.stderr.count("\n") == 1
  assert "config.task='counting' must be one of causal_lm, " in result.stderr
  assert "docs/tasks.md" in result.stderr


def test_tasks_are_those_that_exist():
  page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
  assert re.findall(r"^\| `(\w+)`", page, re.M) == list(tasks.TASKS)


def test_questions_and_metrics_are_as_written(tmp_path):
  page = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
  (lines,) = fenced("json", page)
  (tmp_path / "questions.jsonl").write_text(lines)
  first, second = choices.read(str(tmp_path / "questions.jsonl"))
  assert first.options[0].continuation == " cup."
  assert len({option.continuation for option in second.options}) == 1
  models, questions = page.split("## Language models")[1].split("## Multiple choice")
  told = evaluation.in_other_words({"loss_nats_per_token": 1.0, "bits_per_byte": 1.0})
  assert re.findall(r"^\| `(\w+)`", models, re.M) == list(told)
  named = re.findall(r"^\| `accuracy_(\w+)`", questions, re.M)
  assert named == list(multiple_choice.NORMALISED)


def test_recipes_and_models_are_those_that_exist():
  section = README.split("## Models and recipes")[1].split("\n## ")[0]
  table, listed = section.split("Recipes: ")
  named = re.findall(r"`(\w+)`", listed.split(" A recipe's options")[0])
  assert sorted(named) == sorted(RECIPES)
  rows = re.findall(r"^\| (`.*?) \|", table, re.M)
  classes = {name for row in rows for name in re.findall(r"`(\w+)`", row) if row[1] != "m"}
  is_model = lambda value: inspect.isclass(value) and issubclass(value, nn.Module)
  public = {name for name in models.__all__ if is_model(getattr(models, name))}
  assert classes == public - {"Block", "Stack"}


def test_fences_are_found():
  text = "```bash\na && b\n```\ntext\n```python\nc\n```\n```bash\nd\ne\n```\n"
  assert fenced("bash", text) == ["a && b", "d\ne"]


@pytest.mark.parametrize(
  "command, reason",
  [
    ("pip install .", "does not begin"),
    ("python3 -m venv .v && .w/bin/pip install .", "does not begin"),
    ("git clone x && python3 -m venv .v && .v/bin/pip install .", "clones"),
    ("python3 -m venv .v && .v/bin/pip install .\nls", "more than one line"),
    ("python3 -m venv .v && .v/bin/pip install . && p --workdir=/x", "leaves the clone"),
    ("python3 -m venv .v && .v/bin/pip install . && w/bin/python x", "another environment"),
  ],
)
def test_problems_are_found(command, reason):
  assert problems("python3 -m venv .v && .v/bin/pip install . && A=b .v/bin/python -m x") == []
  assert any(reason in problem for problem in problems(command))
