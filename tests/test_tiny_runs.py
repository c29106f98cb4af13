"""The benchmark of all tasks' tiny configs: what it runs, judges, keeps and tells."""

import dataclasses
import importlib
import json
import re

import pytest

from benchmarks import tiny_runs

RESULT = {
  "task": "causal_lm",
  "config": "configs/gpt.py:tiny",
  "metric": "bits_per_byte",
  "value": 2.4,
  "target": 2.5,
  "higher_is_better": False,
  "baseline": 2.6,
  "baseline_name": "xz",
  "beside": {"copy": 3.0},
  "seconds": 250.0,
  "date": "2026-11-27T00:00:00+00:00",
}


def test_a_target_is_the_one_that_the_config_states():
  for name, entry in tiny_runs.ENTRIES.items():
    file, _, variant = entry.config.partition(":")
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    # Another figure that begins alike is no target.
    assert re.search(rf"Target: (an? [a-z ]+ of )?{entry.target:g}(?![\d.]\d)", module.__doc__), (
      name
    )
    # A task's second entry has its name and more.
    assert name.startswith(module.get_config(variant).task)


@pytest.mark.parametrize(
  "changes, met",
  [
    ({}, [True, True]),
    ({"value": 2.55}, [False, True]),
    ({"value": 2.6, "target": 2.7}, [True, False]),  # As good as the baseline.
    ({"higher_is_better": True}, [False, False]),
    ({"higher_is_better": True, "value": 2.7}, [True, True]),
    ({"least": {"use": [16.0, 16.0], "more": [3.0, 4.0]}}, [True, True, True, False]),
    ({"most": {"rate of train": [5.0, 5.0], "more": [5.1, 5.0]}}, [True, True, True, False]),
  ],
)
def test_a_run_reaches_its_target_and_beats_its_baseline(changes, met, tmp_path, capsys):
  result = RESULT | changes
  assert [mark["met"] for mark in tiny_runs.marks(result)] == met
  tiny_runs.keep(result, tmp_path / "runs.json")
  code = tiny_runs.main(["--table", f"--output={tmp_path / 'runs.json'}"])
  assert code == (0 if all(met) else 1)
  assert capsys.readouterr().out.count("MISSED") == met.count(False)


def test_the_latest_run_of_every_task_is_kept(tmp_path, monkeypatch):
  entry = tiny_runs.ENTRIES["causal_lm"]
  monkeypatch.setattr(tiny_runs, "ENTRIES", {"first": entry, "second": entry})
  path = tmp_path / "results" / "runs.json"
  for task, value in (("second", 1), ("first", 2), ("gone", 3), ("second", 4)):
    tiny_runs.keep(RESULT | {"task": task, "value": value}, path)
  assert [(run["task"], run["value"]) for run in tiny_runs.read(path)] == [
    ("first", 2),
    ("second", 4),
    ("gone", 3),
  ]


def test_what_a_task_needs_comes_before_it(monkeypatch):
  entry = tiny_runs.ENTRIES["causal_lm"]
  needing = dataclasses.replace(entry, needs=("b", "a"))
  entries = {"a": entry, "b": dataclasses.replace(entry, needs=("a",)), "c": needing}
  monkeypatch.setattr(tiny_runs, "ENTRIES", entries)
  assert tiny_runs.ordered(["c"]) == ["a", "b", "c"]
  assert tiny_runs.ordered(["c", "a"]) == ["a", "b", "c"]


def test_runs_that_are_there_are_not_made_again(tmp_path, monkeypatch, capsys):
  """Of what is needed alone; what is asked for is run."""
  entry = tiny_runs.ENTRIES["causal_lm"]
  entries = {"a": entry, "b": dataclasses.replace(entry, needs=("a",))}
  monkeypatch.setattr(tiny_runs, "ENTRIES", entries)
  made = []

  def run(name, workdirs):
    made.append((name, dict(workdirs)))
    return RESULT | {"task": name}

  monkeypatch.setattr(tiny_runs, "run", run)
  options = [f"--output={tmp_path / 'runs.json'}", f"--needed={tmp_path}", "--only=b"]
  with pytest.raises(SystemExit):
    tiny_runs.main(options)
  assert f"--needed={tmp_path} holds no finished run of a" in capsys.readouterr().err
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "summary.json").touch()
  tiny_runs.main([*options, f"--workdirs={tmp_path / 'new'}"])
  assert made == [("b", {"a": tmp_path / "a", "b": tmp_path / "new" / "b"})]
  tiny_runs.main([*options[:2], "--only=a,b"])
  assert [name for name, _ in made[1:]] == ["a", "b"]


@pytest.mark.parametrize("arguments", [["--only=casual_lm"], ["--table"], ["--workdirs=."]])
def test_a_mistake_is_told(arguments, tmp_path, capsys):
  with pytest.raises(SystemExit) as error:
    tiny_runs.main([*arguments, f"--output={tmp_path / 'runs.json'}"])
  assert error.value.code == 2
  last = capsys.readouterr().err.splitlines()[-1]
  assert any(words in last for words in ("not one of causal_lm", "holds no run of", "exists: name"))


@pytest.mark.ci
def test_a_run_is_made_by_the_real_command(tmp_path, monkeypatch, capfd):
  """Another needs its workdir; a command that fails ends the benchmark."""
  small = ["--config.steps=2", "--config.model.layers=1", "--config.model.width=16"]
  small += ["--config.data.tokenizer=byte", "--config.eval_batches=0", "--config.sample_tokens=0"]
  entry = dataclasses.replace(tiny_runs.ENTRIES["causal_lm"], flags=lambda workdirs: small)
  broken = dataclasses.replace(
    entry, needs=("causal_lm",), flags=lambda workdirs: [f"--confg={workdirs['causal_lm']}"]
  )
  monkeypatch.setattr(tiny_runs, "ENTRIES", {"causal_lm": entry, "broken": broken})
  path, workdirs = tmp_path / "runs.json", tmp_path / "runs"
  with pytest.raises(SystemExit, match="the command ended with 2: -m magneto_jax.train .*broken"):
    tiny_runs.main(["--only=broken", f"--output={path}", f"--workdirs={workdirs}"])
  (kept,) = tiny_runs.read(path)
  summary = json.loads((workdirs / "causal_lm" / "summary.json").read_text())
  assert kept["value"] == summary["validation_bits_per_byte"]
  assert kept["baselines"] == summary["baselines"]["bits_per_byte"]
  assert kept["baseline"] == min(kept["baselines"].values()) and kept["baseline_name"] == "xz"
  assert {"date", "machine", "git_commit", "versions", "seconds"} <= kept.keys()
  assert tiny_runs.main(["--table", "--only=causal_lm", f"--output={path}"]) == 1
  assert "MISSED" in capfd.readouterr().out
