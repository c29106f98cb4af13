"""The README's first two commands, (1) train, (2) test, and its example for other projects."""

import dataclasses
import importlib.util
import inspect
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from flax import linen as nn

from benchmarks import tiny_runs
from magneto_jax import (
  RECIPES,
  cli,
  evaluation,
  models,
  multiple_choice,
  pretrained,
  sharding,
  tasks,
)
from magneto_jax.config import ConfigError, MeshConfig, field_names, tasks_reading
from magneto_jax.data import choices
from magneto_jax.kernels import attention
from tests import simulated
from tests.pages import fenced

ROOT = pathlib.Path(__file__).resolve().parents[1]


README = (ROOT / "README.md").read_text(encoding="utf-8")


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
  """In Linen and in NNX, ten lines each, without a warning; and the init function of a group."""
  diagnosed, linen, of_nnx, _ = fenced("python", README)
  for code in (linen, of_nnx):
    assert sum(bool(line.strip()) and "import" not in line for line in code.splitlines()) <= 10
  recipe = [
    line for line in diagnosed.splitlines() if line.startswith(("import", "deep", "recipe"))
  ]
  call = re.search(r"`(initializers\.kernel_init\(.*?\))`", README)[1]
  code = [linen, of_nnx, *recipe, f"assert y.shape == {call}(jax.random.key(0), x.shape).shape"]
  subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(code)], check=True, cwd=ROOT)


def test_a_model_is_diagnosed_as_written(tmp_path):
  """With fewer layers, which is all that the time depends on."""
  code = fenced("python", README)[0].replace("decoder_layers=200", "decoder_layers=7")
  command = [sys.executable, "-W", "error", "-c", code]
  said = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True).stdout
  assert said.startswith("take ")
  assert (tmp_path / "deepnet.png").stat().st_size > 10_000


@pytest.mark.ci
def test_a_run_is_started_from_python_as_written(tmp_path):
  """With another size and fewer steps."""
  *_, code = fenced("python", README)
  small = {"steps": 1, "eval_batches": 1, "sample_tokens": 1, "model.layers": 1, "batch_size": 1}
  small |= {"data.tokenizer": "'byte'", "data.seq_length": 8, "optimizer.warmup_steps": 0}
  lines = [f"config.{name} = {value}" for name, value in small.items()]
  code = code.replace("summary =", "\n".join([*lines, "summary ="]))
  code += "\nassert summary['recipe'] == 'deepscalelm' and 'params' in variables"
  subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)


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


def section(title: str) -> str:
  return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(table: str) -> list[list[str]]:
  """The cells of a table's rows, without its head."""
  lines = [line for line in table.splitlines() if line.startswith("| ")]
  return [re.split(r" \| ", line.strip("| ")) for line in lines[1:]]


def test_recipes_are_those_that_exist():
  named = [re.fullmatch(r"`(\w+)`", cells[0])[1] for cells in rows(section("Recipes"))]
  assert sorted(named) == sorted(RECIPES)
  assert len(RECIPES) - 4 == 16 and "Pre-LN and sixteen others" in README
  assert len(RECIPES) - 2 == 18 and "eighteen more recipes" in README


def test_tasks_models_and_configs_are_those_that_exist():
  table = rows(section("Tasks"))
  assert {re.match(r"`(\w+)`", cells[0])[1] for cells in table} == set(tasks.TASKS)
  named = {name for cells in table for name in re.findall(r"`([A-Z]\w+)`", cells[0])}
  is_model = lambda value: inspect.isclass(value) and issubclass(value, nn.Module)
  public = {name for name in models.__all__ if is_model(getattr(models, name))}
  assert named == public - {"Block", "Stack"}
  for task, config, _ in table:
    assert cli.config_of(first_of(config)).task == re.match(r"`(\w+)`", task)[1]


def first_of(cell: str) -> str:
  """The config of a row; others that it comes after stand behind it."""
  return re.match(r"`([^`]+)`", cell)[1]


def encoder_of(config: str) -> str:
  """The config with whose run's encoder its row's run of `benchmarks.tiny_runs` started."""
  (entry,) = (x for x in tiny_runs.ENTRIES.values() if x.config == config)
  flags = entry.flags(dict.fromkeys(entry.needs, "DIR"))
  return tiny_runs.ENTRIES[entry.needs[-1]].config if "--config.init_from=DIR" in flags else ""


def test_rows_that_need_another_run_name_its_config():
  """Those alone; it is the one that the run itself would name."""
  assert "`--config.image_tokenizer=DIR`" in section("Tasks")
  for _, cell, _ in rows(section("Tasks")):
    needs = cli.config_of(first_of(cell))
    if needs.task not in tasks_reading("image_tokenizer"):
      start = encoder_of(first_of(cell))
      assert cell == f"`{first_of(cell)}`" + (f", from `{start}`" if start else "")
      continue
    named = re.fullmatch(r"`[^`]+`, after `([^`]+)`", cell)[1]
    with pytest.raises(ConfigError, match=f"--config={named} "):
      pretrained.find(needs)


RESULTS = ROOT / "benchmarks" / "results"


def results(file: str) -> dict:
  return json.loads((RESULTS / file).read_text(encoding="utf-8"))


def test_what_came_out_of_each_task_is_what_its_results_say():
  """Value and baseline, to the digits that are written."""
  runs = {run["config"]: run for run in results("tiny_runs.json")["runs"]}
  for _, config, came_out in rows(section("Tasks")):
    if came_out == "not yet measured":
      continue
    run = runs[first_of(config)]
    value, baseline = re.fullmatch(r"([\d.]+) .*? ([\d.]+)\)", came_out).groups()
    for written, found in ((value, run["value"]), (baseline, run["baseline"])):
      assert float(written) == round(found, len(written.partition(".")[2])), config


def test_the_first_run_takes_as_long_as_is_written():
  """From what its config tells of one machine to what the results do of another."""
  (found,) = (run for run in results("tiny_runs.json")["runs"] if run["task"] == "causal_lm")
  assert round(found["seconds"] / 60) == 7 and round(found["value"], 2) == 2.45
  assert "after 4 min 15 s" in (ROOT / "configs" / "gpt.py").read_text(encoding="utf-8")
  for name in ("README.md", "docs/getting_started.md", "colab/quickstart.ipynb"):
    assert "four to seven minutes" in (ROOT / name).read_text(encoding="utf-8"), name


def mark(file: str, name: str) -> float:
  """The value of the mark whose name begins so."""
  (found,) = (x["value"] for x in results(file)["marks"] if x["name"].startswith(name))
  return found


def trials(row: str) -> list[str]:
  """The figures of a row of the reliability's trials, as they are written there."""
  held = [x for x in results("reliability.json")["rows"] if x["id"] == row]
  assert all(x["held"] for x in held)
  return [x["figure"] for x in held]


def bare_orbax(fault: str) -> list[str]:
  """Of how many trials how many went wrong without this library."""
  (text,) = (x["figure"] for x in results("reliability.json")["bare_orbax"] if x["fault"] == fault)
  of, wrong = re.match(r"(\d+) \w+: (?:after )?(\d+)", text).groups()
  return [f"{wrong} of {of}"]


def measured() -> list[tuple[str, list[str]]]:
  """For each row of `Measured`: the file that it is from, and what that file says in its words."""
  rates = []
  for kind in ("", "-deterministic"):
    file = f"train_step-gpt-1b3{kind}-nvidia-h200-2026-11-28.json"
    found = results(file)["summary"]["magneto_jax"]
    said = [f"{found['tokens_per_second']:,.0f} tokens", f"{100 * found['mfu']:.1f} %"]
    rates.append((file, said + [f"{found['over_pre_ln']['median']:.2f} times a Pre-LN's"]))
  bias, step = "attention-nvidia-h200-2026-11-27.json", "train_step-gpt-tiny-2026-11-25.json"
  cudnn = "bias+gradient, forward and backward: jax.nn-cudnn's time"
  decode, depth = "decode-gpt-tiny-2026-11-25.json", "compile_time-narrow-2026-11-25.json"
  decoding = "tokens a second over torchscale's, batch 1"
  kills = sum(int(re.match(r"(\d+) kills", figure)[1]) for figure in trials("R1"))
  assert all(figure.endswith("0 failures") for figure in trials("R1"))
  damaged, detected, harmless = map(int, re.findall(r"(\d+) [mdh]", trials("R2")[0]))
  assert damaged == detected + harmless
  goodput = float(trials("R14")[-1].partition("%")[0])
  return [
    *rates,
    (
      bias,
      [
        f"{mark(bias, f'T4096 H64 B4 full {cudnn}'):.2f} times cuDNN's speed (heads of 64)",
        f"{mark(bias, f'T4096 H128 B4 causal {cudnn}'):.2f} times (heads of 128, causal)",
      ],
    ),
    (step, [f"{mark(step, 'train step over torchscale'):.2f} times its time"]),
    (decode, [f"{mark(decode, decoding):.2f} times its tokens a second"]),
    (depth, [f"{mark(depth, 'trace and compile, 192 over 12'):.2f} times what 12 take"]),
    ("reliability.json", [f"{kills} kills", *bare_orbax("kill -9 while it saves")]),
    ("reliability.json", [f"{damaged:,} times, never", *bare_orbax("a file changed")]),
    ("reliability.json", [f"{goodput} %"]),
  ]


def test_every_figure_is_that_of_its_file_and_has_its_command():
  """No number stands there that is not in the file which is linked."""
  for (_, said, command, link), (file, figures) in zip(
    rows(section("Measured")), measured(), strict=True
  ):
    assert link == f"[JSON](benchmarks/results/{file})"
    for figure in figures:
      assert figure in said, (figure, said)
      said = said.replace(figure, "", 1)
    assert not re.search(r"\d", said), said
    if "the same with" not in command:
      module = re.match(r"`python -m benchmarks\.(\w+)", command)[1]
      assert module == results(file)["benchmark"]
      assert importlib.util.find_spec(f"benchmarks.{module}")


def test_the_picture_is_there_for_light_and_for_dark_pages():
  targets = re.findall(r'(?:src|srcset)="([^"]+)"', README)
  assert len(targets) == 2 and all((ROOT / target).is_file() for target in targets)


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
