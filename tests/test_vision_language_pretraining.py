"""The benchmark of pre-trained and fresh starts of three tasks: what it asks for, and keeps."""

import json

import pytest

from benchmarks import coordinator, starts
from benchmarks import vision_language_pretraining as benchmark
from configs import beit3

SUMMARY = {
  "task": "masked_data",
  "training_seconds": 200.0,
  "steps": 900,
  "validation_text_accuracy": 0.4,
  "versions": {},
}


def run_of(folder, **changes):
  folder.mkdir()
  (folder / "summary.json").write_text(json.dumps(SUMMARY | changes))
  return folder


def test_all_tasks_have_both_starts_of_the_same_seeds_and_rates(tmp_path, monkeypatch, capsys):
  asked = []

  def train(config, metric, workdir, seeds, rate, flags):
    asked.append((config, metric, seeds, rate, flags))
    for seed in seeds:
      folder = workdir / f"seed_{seed}"
      folder.mkdir(parents=True)
      (folder / "summary.json").write_text(json.dumps({"training_seconds": 10.0 + seed}))
    return {"mean": 0.25, "std": None, "median": 0.25, "values": [0.25]}

  monkeypatch.setattr(starts, "train", train)
  before, output = run_of(tmp_path / "pre"), tmp_path / "results.json"
  options = [f"--beit3={before}", f"--output={output}", "--seeds=4", "--learning_rates=1e-3"]
  options += ["--steps=70"]
  assert benchmark.main(options) == 0
  both = (
    [f"--config.init_from={before}", "--config.steps=70"],
    [
      "--config.optimizer.layer_decay=1.0",
      f"--config.data.tokenizer_file={before}/data/tokenizer.model",
      "--config.steps=70",
    ],
  )
  assert asked == [
    (f"configs/beit3.py:{variant}", metric, [4], 1e-3, flags)
    for variant, metric in benchmark.METRICS.items()
    for flags in both
  ]
  kept = json.loads(output.read_text())
  assert kept["rows"].keys() == benchmark.METRICS.keys() <= beit3.VARIANTS.keys()
  assert [row["start"] for row in kept["rows"]["vqa_tiny"]] == ["masked_data", "scratch"]
  assert kept["steps"] == 70
  assert kept["pretraining"]["validation_text_accuracy"] == 0.4
  assert "pre-training: 200 s more" in capsys.readouterr().out


def test_a_best_rate_at_the_edge_of_those_tried_is_told():
  row = lambda start, rate, mean: {"start": start, "learning_rate": rate, "f1": {"mean": mean}}
  inner = [row("a", 1e-3, 3.0), row("a", 2e-3, 1.0), row("a", 5e-4, 2.0)]
  upper = [row("b", 5e-4, 1.0), row("b", 2e-3, 3.0), row("b", 1e-3, 2.0)]
  lower, alone = [row("c", 5e-4, 2.0), row("c", 1e-3, 1.0)], [row("d", 1e-3, 1.0)]
  assert starts.at_the_edge(inner + upper + lower + alone, "f1") == [
    "the best rate of b, 0.002, is the largest that was tried: try more",
    "the best rate of c, 0.0005, is the least that was tried: try more",
  ]


@pytest.mark.parametrize(
  ("changes", "options", "message"),
  [
    ({"task": "causal_lm"}, [], "a run of task causal_lm, not masked_data"),
    ({}, ["--only=vqa"], "--only=vqa is not one of retrieval_tiny"),
  ],
)
def test_a_mistake_is_told(changes, options, message, tmp_path, capsys):
  folder = run_of(tmp_path / "run", **changes)
  with pytest.raises(SystemExit) as error:
    benchmark.main([f"--beit3={folder}", *options])
  assert error.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_the_documentation_has_what_was_measured():
  """A row a task: each start at its best rate, the mean and the seeds."""
  page = (coordinator.ROOT / "docs" / "vision_language.md").read_text(encoding="utf-8")
  found = {}
  for path in sorted(coordinator.RESULTS.glob("vision_language_pretraining-*.json")):
    results = json.loads(path.read_text(encoding="utf-8"))
    for variant, rows in results["rows"].items():
      metric = benchmark.METRICS[variant]
      cells = []
      for start in ("masked_data", "scratch"):
        own = [row[metric] for row in rows if row["start"] == start]
        best = max(own, key=lambda values: values["mean"])
        cells.append(f"{best['mean']:.3g} ({', '.join(f'{x:.3g}' for x in best['values'])})")
      found[variant] = f"| `{variant}` | `{metric}` | {' | '.join(cells)} |"
  assert {"retrieval_tiny", "captioning_tiny"} <= found.keys()
  assert all(row in page.splitlines() for row in found.values()), found
