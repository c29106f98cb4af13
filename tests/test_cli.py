"""What commands share: each mistake ends in one line, and each is called from Python."""

import dataclasses
import errno
import os
import pathlib
import signal
import subprocess
import sys
import types

import pytest
import rich.console

import magneto_jax
from magneto_jax import __main__ as overview
from magneto_jax import cli, diagnose, evaluate, generate, memory, plan, reporting, train, training
from magneto_jax.config import ConfigError, TrainConfig, from_config_dict
from magneto_jax.configs import gpt
from magneto_jax.convert import __main__ as convert
from magneto_jax.data.documents import BadRecord
from tests import commands
from tests.test_structure import LEVELS

ROOT = pathlib.Path(__file__).resolve().parents[1]

# ml_collections' own, up to Python 3.14.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CONFIG = "--config=configs/gpt.py:tiny"
BYTES = "--config.data.tokenizer=byte"
RUN = (CONFIG, BYTES, "--workdir=run")
MISTAKES = {
  "no workdir": (train, [CONFIG], "give --workdir=...: Where the run's files go"),
  "an empty workdir": (train, [CONFIG, "--workdir="], "--workdir must name a folder"),
  "no config": (train, ["--workdir=run"], "give --config, e.g. --config=configs/gpt.py:tiny"),
  "an empty config": (train, ["--config=", "--workdir=run"], "give --config, e.g. --config="),
  "no such config": (
    train,
    ["--config=my/gpt.py", "--workdir=run"],
    "my/gpt.py does not exist (the",
  ),
  "a folder as config": (train, ["--config=empty", "--workdir=run"], "empty is no Python file"),
  "a text as config": (train, ["--config=file", "--workdir=run"], "file is no Python file"),
  "no such variant": (
    train,
    ["--config=configs/gpt.py:big", "--workdir=run"],
    "only tiny, magneto",
  ),
  "a config that ends early": (train, ["--config=syntax.py", "--workdir=run"], "(syntax.py:1)"),
  "a config that fails": (train, ["--config=fails.py", "--workdir=run"], "by zero (fails.py:2)"),
  "a misspelt flag": (
    train,
    [*RUN, "--wrokdir=x"],
    "unknown flag --wrokdir; did you mean --workdir",
  ),
  "a flag like no other": (train, [*RUN, "--nope"], "unknown flag --nope; --helpfull lists those"),
  "a word that is no flag": (train, [*RUN, "more"], "'more' is not a flag: flags are --name=value"),
  "a misspelt field": (train, [*RUN, "--config.model.layer=2"], "did you mean config.model.layers"),
  "a word for an integer": (train, [*RUN, "--config.steps=many"], "steps=many must be an integer"),
  "a word for a number": (
    train,
    [*RUN, "--config.model.dropout=no"],
    "dropout=no must be a number",
  ),
  "a number for a group": (
    train,
    [*RUN, "--config.model=2"],
    "set one, as --config.model.layers=..",
  ),
  "too few devices": (train, [*RUN, "--config.mesh.data=16"], "does not fit 1 devices: 16 must be"),
  "a mesh that cuts nothing": (
    train,
    [*RUN, "--config.mesh.fsdp=3"],
    "fit 1 devices: 3 must divide",
  ),
  "a file as workdir": (
    train,
    [CONFIG, "--workdir=file"],
    "file: file exists: a file stands where a",
  ),
  "a workdir in a file": (
    train,
    [CONFIG, "--workdir=file/run"],
    "file/run: not a directory: a file",
  ),
  "no files named": (
    train,
    [*RUN, "--config.data.name=text_files"],
    "train_files is empty: name at least one file of your own, as --config.data.train_files=",
  ),
  "no files": (
    train,
    [*RUN, "--config.data.name=text_files", "--config.data.train_files=no/*.txt"],
    "train_files: no file matches 'no/*.txt'",
  ),
  "a data set that is not there": (
    train,
    [*RUN, "--config.data.name=lm1b"],
    "Prepare it once, with",
  ),
  "no checkpoint to rewind to": (
    train,
    [*RUN, "--rewind_to=3"],
    "no checkpoint of step 3 to rewind",
  ),
  "seeds that are none": (train, [*RUN, "--seeds=1,x"], "--seeds=1,x must be different numbers"),
  "no run to start from": (
    train,
    ["--config=configs/text_classification.py:tiny", "--workdir=run", "--config.init_from=empty"],
    "init_from=empty holds neither a run with a checkpoint nor a converted model: give",
  ),
  "evaluate nothing": (evaluate, [], "give --workdir=...: A workdir that train has filled"),
  "evaluate no run": (evaluate, ["--workdir=empty"], "empty holds no run (no config.json): give"),
  "evaluate a file": (evaluate, ["--workdir=file"], "file holds no run (no config.json): give a"),
  "a step that is none": (
    evaluate,
    ["--workdir=empty", "--step=last"],
    "the number of a step, or be",
  ),
  "results into a folder": (
    evaluate,
    ["--workdir=x", "--output=empty"],
    "is a folder: name a file",
  ),
  "results to nowhere": (
    evaluate,
    ["--workdir=x", "--output=file/x"],
    "file is no folder that can be",
  ),
  "a misspelt split": (evaluate, ["--workdir=x", "--spilt=test"], "did you mean --split?"),
  "write with no run": (generate, ["--workdir=none"], "none holds no run (no config.json): give a"),
  "a misspelt prompt": (generate, ["--workdir=none", "--promt=x"], "did you mean --prompt?"),
  "more than can be counted": (
    generate,
    ["--workdir=x", "--tokens=9999999999"],
    "--tokens=9999999999",
  ),
  "diagnose nothing": (diagnose, [], "give --config, e.g. --config=configs/gpt.py:tiny"),
  "an unknown recipe": (
    diagnose,
    [CONFIG, "--recipes=magnet"],
    "'magnet' must be one of all, pre_ln",
  ),
  "no layers": (diagnose, [CONFIG, "--layers=0"], "--layers=0: 0 is not a positive integer"),
  "a file for a folder": (diagnose, [CONFIG, "--output=file"], "file: file exists: a file stands"),
  "no machine to plan for": (plan, [CONFIG], "give --topology=...: The machine: v5e:16x16"),
  "no such machine": (
    plan,
    [CONFIG, "--topology=v9:2x2"],
    "--topology=v9:2x2 is not one of v5e:16x16",
  ),
  "a plan into a folder": (
    plan,
    [CONFIG, "--topology=cpu:2", "--json=empty"],
    "is a directory: name",
  ),
  "a plan to nowhere": (
    plan,
    [CONFIG, "--topology=cpu:2", "--json=no/x"],
    "no such file or directory",
  ),
  "convert nothing": (convert, [], "give --input=...: A checkpoint (--from), or a folder (--to)."),
  "from nowhere": (
    convert,
    ["--input=file", "--output=new"],
    "give --from (torchscale, fairseq, be",
  ),
  "an unknown library": (
    convert,
    ["--from=torch", "--input=file", "--output=new"],
    "--from=torch: value should be one of <torchscale|fairseq|beit3>",
  ),
  "no checkpoint": (
    convert,
    ["--from=beit3", "--input=no.pt", "--output=new"],
    "no.pt: does not exist",
  ),
  "no weights": (
    convert,
    ["--from=beit3", "--input=file", "--output=new"],
    "is none of .safetensors",
  ),
  "convert no run": (convert, ["--to=torchscale", "--input=empty", "--output=new"], "holds no run"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The current folder, with what is not what it should be."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "file").write_text("neither a config nor weights")
  (tmp_path / "empty").mkdir()
  (tmp_path / "syntax.py").write_text("def get_config(:\n")
  (tmp_path / "fails.py").write_text("def get_config():\n  return 1 / 0\n")
  return tmp_path


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line(name, folder, monkeypatch, capfd):
  """Exit code 2, what to do next, no traceback, and nothing left behind."""
  module, arguments, message = MISTAKES[name]
  there = {path.name for path in folder.iterdir()}
  ended = commands.run(module, *arguments, monkeypatch=monkeypatch, capfd=capfd)
  assert ended.code == cli.USAGE_EXIT_CODE
  assert ended.err.startswith("error: ") and ended.err.count("\n") == 1 and message in ended.err
  assert {path.name for path in folder.iterdir()} - {"__pycache__"} == there


@pytest.mark.parametrize("flag", ["--debug", "--debug=true"])
@pytest.mark.parametrize(
  "arguments, last",
  [
    (["--config=fails.py", "--workdir=run"], "ZeroDivisionError"),
    ([*RUN, "--config.mesh.data=16"], "ConfigError"),
    ([*RUN, "--wrokdir=x"], "UnrecognizedFlagError"),
  ],
)
def test_debug_shows_the_traceback_before_the_line(
  flag, arguments, last, folder, monkeypatch, capfd
):
  ended = commands.run(train, *arguments, flag, monkeypatch=monkeypatch, capfd=capfd)
  *traceback, line = ended.err.splitlines()
  assert ended.code == cli.USAGE_EXIT_CODE and line.startswith("error: ")
  assert traceback[0].startswith("Traceback") and last in traceback[-1]
  quiet = commands.run(train, *arguments, "--nodebug", monkeypatch=monkeypatch, capfd=capfd)
  assert quiet.err == line + "\n"


def failing(error: BaseException) -> types.ModuleType:
  """A command that fails so."""

  def fail():
    raise error

  module = types.ModuleType("failing")
  module.main = lambda: cli.run(fail)
  return module


class JaxRuntimeError(RuntimeError):
  """Of the name of JAX's, which cannot be made here with a text of its own on every version."""


@pytest.mark.parametrize(
  "error, code, line",
  [
    (ConfigError("one\ntwo"), 2, "one two"),
    (
      BadRecord("texts.tsv", 3, "no field text", unit="line"),
      2,
      "texts.tsv: line 3 cannot be read",
    ),
    (KeyboardInterrupt(), cli.INTERRUPTED, "interrupted"),
    (KeyboardInterrupt("stopped; go on"), cli.INTERRUPTED, "stopped; go on"),
    (FloatingPointError("at step 3"), cli.DIVERGED, "at step 3"),
    (OSError(errno.ENOSPC, "No space left", "run/x"), 2, "run/x: no space left: free some of the"),
    (
      OSError(errno.EROFS, "Read-only", "run/x"),
      2,
      "run/x: read-only: name a path on another disk",
    ),
    (
      OSError(errno.EACCES, "Denied", b"run/x"),
      2,
      "run/x: denied: change its permissions, or name",
    ),
    (OSError(errno.ENOSPC, "No space left"), 2, "no space left: free some of the disk, or name"),
    (OSError("of no number"), 2, "of no number"),
    (MemoryError("17 TiB"), 2, "there is no memory for an array: ask for less at a time"),
    (memory.OutOfMemory("needs 3 GiB:\n  lower it", 3), 2, "needs 3 GiB:"),
    (
      JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5000 bytes."),
      2,
      "there is no memory for an array of 5,000 bytes: ask for less",
    ),
  ],
)
def test_what_ends_a_command_is_told_in_a_line(error, code, line, monkeypatch, capfd):
  ended = commands.run(failing(error), monkeypatch=monkeypatch, capfd=capfd)
  assert ended.code == code and ended.err.startswith(f"error: {line}")
  assert ended.err.count("\n") == (2 if isinstance(error, memory.OutOfMemory) else 1)


def test_what_nobody_expects_is_a_line_too_and_its_traceback_a_file(monkeypatch, capfd, tmp_path):
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  error = KeyError("what no command expects")
  ended = commands.run(failing(error), monkeypatch=monkeypatch, capfd=capfd)
  (log,) = tmp_path.iterdir()
  assert ended.code == cli.UNEXPECTED and ended.err.count("\n") == 1
  assert f"({__file__}:" in ended.err and ended.err.endswith(f"its traceback is in {log}\n")
  assert log.read_text().startswith("Traceback") and "what no command expects" in log.read_text()
  loud = commands.run(failing(error), "--debug", monkeypatch=monkeypatch, capfd=capfd)
  assert loud.err.startswith("Traceback")


# ---------------------------------------------------------------------------------------------
# From Python
# ---------------------------------------------------------------------------------------------


def test_a_config_is_a_record_a_config_dict_or_a_file(folder, monkeypatch):
  """All the same, whatever the program's own command line says."""
  monkeypatch.setattr(sys, "argv", ["ipykernel", "--config.steps=99", "-f", "kernel.json"])
  config = gpt.get_config("tiny")
  record = cli.config_of(config)
  assert record == from_config_dict(config) and record.steps == 750
  assert cli.config_of(record) is record
  assert cli.config_of("configs/gpt.py:tiny") == record
  assert cli.config_of("configs/gpt.py") == record
  mine = folder / "mine.py"
  mine.write_text("def get_config(name='a'):\n  return {'steps': {'a': 3, 'b:c': 4}[name]}\n")
  assert cli.config_of(mine) == dataclasses.replace(TrainConfig(), steps=3)
  assert cli.config_of(f"{mine}:b:c").steps == 4
  # One file's names are not another's.
  (folder / "empty.py").write_text("")
  with pytest.raises(ConfigError, match="the config file has no function get_config, which"):
    cli.config_of("empty.py")
  assert "mine" not in sys.modules


@pytest.mark.parametrize(
  "config, message",
  [
    ("configs/gpt.py:big", "configs/gpt.py has no 'big', only tiny, "),
    ("gtp.py", "config file gtp.py does not exist"),
    ("fails.py", r"ZeroDivisionError: division by zero \(.*fails.py:2\)"),
    ("syntax.py", r"SyntaxError: .*syntax.py:1\)"),
    (3, "a config is a group of fields, not 3"),
    ({"steps": "many"}, "config.steps='many' must be of type int"),
    ({"step": 3}, "did you mean config.steps"),
  ],
)
def test_a_config_that_is_none_is_an_error_in_a_line(config, message, folder):
  for command in (lambda: train.run(config, "run"), lambda: diagnose.run(config)):
    with pytest.raises(ConfigError, match=message) as error:
      command()
    assert "\n" not in str(error.value)
  assert not (folder / "run").exists()


def test_training_is_called_from_python(monkeypatch, tmp_path):
  """As the command calls it; with seeds once for each."""
  called = []

  def fake(config, workdir, *, rewind_to=None):
    called.append((config.seed, pathlib.Path(workdir).name, rewind_to))
    return {"validation_loss": float(config.seed)}

  monkeypatch.setattr(training, "train", fake)
  config = gpt.get_config("tiny")
  assert magneto_jax.train.run(config, tmp_path / "run", rewind_to=3) == {"validation_loss": 0.0}
  found = magneto_jax.train.run(config, tmp_path, seeds=[2, 4])
  assert called == [(0, "run", 3), (2, "seed_2", None), (4, "seed_4", None)]
  assert found["metrics"]["validation_loss"]["mean"] == 3.0
  with pytest.raises(ConfigError, match="leave out --rewind_to"):
    train.run(config, tmp_path, seeds=[1], rewind_to=3)


def test_commands_from_python_fail_in_a_line(folder):
  """What the system refuses, and what is not there."""
  for command in (
    lambda: train.run("configs/gpt.py:tiny", "file/run"),
    lambda: diagnose.run("configs/gpt.py:tiny", output="file/x"),
    lambda: evaluate.run("empty"),
    lambda: evaluate.run("empty", output="empty"),
  ):
    with pytest.raises(ConfigError) as error:
      command()
    assert "\n" not in str(error.value)
  with pytest.raises(ConfigError, match="^file/x: not a directory: a file stands where a folder"):
    diagnose.run("configs/gpt.py:tiny", output="file/x")


# ---------------------------------------------------------------------------------------------
# In a notebook
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch):
  """What a notebook is given: a list of outputs, each the list of its states."""
  import IPython.display

  outputs = []

  def display(value, display_id=False, **_):
    outputs.append([value])
    return types.SimpleNamespace(update=outputs[-1].append) if display_id else None

  monkeypatch.setattr(IPython.display, "display", display)
  return outputs


def test_progress_in_a_notebook_is_one_output(shown, monkeypatch):
  """Redrawn in its place, twice a second at most, and complete at the end."""
  now = [100.0]
  monkeypatch.setattr(reporting.time, "perf_counter", lambda: now[0])
  console = rich.console.Console(force_jupyter=True)
  with reporting.Progress(console, start=0, total=1000) as progress:
    for step in range(1, 1001):
      now[0] += 0.01
      progress.step(step, f"loss {step}")
      progress.line(f"step {step}", terminal=False)
  (states,) = shown
  assert 10.0 / 0.5 - 2 <= len(states) <= 10.0 / 0.5 + 2
  html = states[-1]._repr_mimebundle_(None, None)["text/html"]
  assert "1,000/1,000" in html and "loss 1000" in html


def test_lines_in_a_notebook_are_one_output(shown):
  reporting.say(rich.console.Console(force_jupyter=True), ["[a]", "b" * 200])
  assert len(shown) == 1
  (state,) = shown[0]
  assert "[a]\n" + "b" * 200 in state._repr_mimebundle_(None, None)["text/html"]


# ---------------------------------------------------------------------------------------------
# Which there are
# ---------------------------------------------------------------------------------------------


def test_the_package_lists_its_commands(capsys):
  top = max(LEVELS.values())
  there = {name.removesuffix(".__main__") for name, level in LEVELS.items() if level == top}
  kernels = {f"kernels.{p.stem}" for p in (ROOT / "magneto_jax/kernels").glob("*.py") if runs(p)}
  assert set(overview.COMMANDS) == there - {"__main__"} | kernels
  assert overview.main([]) == 0
  text = capsys.readouterr().out
  assert all(f"python -m magneto_jax.{name} " in text for name in overview.COMMANDS)
  assert max(map(len, text.splitlines())) <= 120
  assert overview.main(["trian"]) == 2
  said = capsys.readouterr().err
  assert "python -m magneto_jax.train runs a command" in said and said.count("\n") == 1


def runs(path: pathlib.Path) -> bool:
  return "__name__ ==" in path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_ctrl_c_ends_a_run_in_a_line(tmp_path):
  """While it trains; what is saved stays."""
  command = [sys.executable, "-m", "magneto_jax.train", CONFIG, BYTES, "--workdir=run"]
  command += ["--config.log_every=1", "--config.batch_size=1"]
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  with subprocess.Popen(command, cwd=tmp_path, env=os.environ, **pipes) as process:
    for line in process.stdout:
      if line.startswith("step 2/"):
        process.send_signal(signal.SIGINT)
        break
    _, errors = process.communicate(timeout=300)
  assert process.returncode == cli.INTERRUPTED
  assert errors == (
    "error: interrupted; what is saved stays, and the same command goes on from it\n"
  )
