"""The benchmark of fine-tuning from masked images: what it asks for, and what it keeps."""

import json

import pytest

from benchmarks import masked_image_finetuning as benchmark
from benchmarks import starts

SUMMARY = {
  "task": "masked_image",
  "training_seconds": 300.0,
  "steps": 1200,
  "validation_masked_accuracy": 0.4,
  "validation_commonest_token": 0.1,
  "validation_codebook_perplexity": 30.0,
  "versions": {},
}


def run_of(folder, **changes):
  folder.mkdir()
  (folder / "summary.json").write_text(json.dumps(SUMMARY | changes))
  return folder


def test_both_starts_have_the_same_seeds_rates_and_steps(tmp_path, monkeypatch, capsys):
  """All flags but those of the start itself."""
  asked = []

  def train(config, metric, workdir, seeds, rate, flags):
    assert (config, metric) == ("configs/beit.py:finetune_tiny", "accuracy")
    asked.append((seeds, rate, flags))
    for seed in seeds:
      folder = workdir / f"seed_{seed}"
      folder.mkdir(parents=True)
      (folder / "summary.json").write_text(json.dumps({"training_seconds": 10.0 + seed}))
    mean = 0.9 if "layer_decay" in flags[0] else 0.95
    return {"mean": mean, "std": 0.01, "median": mean, "values": [mean] * 2}

  monkeypatch.setattr(starts, "train", train)
  beit, output = run_of(tmp_path / "beit"), tmp_path / "results.json"
  options = [f"--beit={beit}", f"--output={output}", "--seeds=3,5", "--learning_rates=1e-3,2e-3"]
  assert benchmark.main(options) == 0
  assert [(seeds, rate) for seeds, rate, _ in asked] == [
    ([3, 5], rate) for rate in (1e-3, 1e-3, 2e-3, 2e-3)
  ]
  both = [f"--config.init_from={beit}"], ["--config.optimizer.layer_decay=1.0"]
  assert [flags for _, _, flags in asked] == [*both, *both]
  kept = json.loads(output.read_text())
  assert [(row["start"], row["learning_rate"]) for row in kept["rows"]] == [
    (start, rate) for rate in (1e-3, 2e-3) for start in ("masked_image", "scratch")
  ]
  assert kept["rows"][0]["accuracy"]["mean"] == 0.95
  assert kept["rows"][0]["training_seconds"] == 14.0
  assert kept["pretraining"]["training_seconds"] == 300.0
  assert {"date", "machine", "git_commit", "seeds"} <= kept.keys()
  shown = capsys.readouterr().out
  assert "0.9500" in shown and "pre-training: 300 s more" in shown


def test_what_is_no_masked_image_run_is_told(tmp_path, capsys):
  for folder in (tmp_path / "none", run_of(tmp_path / "other", task="causal_lm")):
    with pytest.raises(SystemExit) as error:
      benchmark.main([f"--beit={folder}"])
    assert error.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "holds no finished run" in last or "a run of task causal_lm" in last
