"""Every task's tiny config, trained by the real command, beside what trivial models score.

`python -m benchmarks.tiny_runs [--only=causal_lm,...]` trains them one after the other, each in a
new workdir, and keeps the latest run of every task in results/tiny_runs.json, in the list `runs`.
Tasks that others need come first; `--needed=DIR` takes them from an earlier call's `--workdirs`.
Its exit code is 1 if a run misses its target or is no better than its baseline; `--table` prints
what the file holds. A task is one row of ENTRIES.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence

from benchmarks import (
  coordinator,
  image_baselines,
  speech_baselines,
  text_baselines,
  translation_baselines,
)
from magneto_jax import runs as runs_lib

PATH = coordinator.RESULTS / "tiny_runs.json"


@dataclasses.dataclass(frozen=True)
class Entry:
  """A task's tiny run.

  Attributes:
    config: the `--config` of the command.
    metric: by which it is judged.
    split: what it is judged on, by the last checkpoint; by default what the run is validated on.
    target: set before the run, and stated in the config file.
    higher_is_better: whether more of the metric is.
    baselines: `(summary.json of the run, its workdir) -> {name: value}` of the metric; the best is
      the one to beat.
    beside: likewise, printed and kept, and no mark.
    least: further metrics, and what they must be at least.
    most: by split, further metrics, and what they may be at most.
    needs: tasks whose runs come first.
    flags: `{task: workdir} of the runs so far -> further flags` of the command.
  """

  config: str
  metric: str
  target: float
  higher_is_better: bool
  baselines: Callable[[Mapping, pathlib.Path], Mapping[str, float]]
  beside: Callable[[Mapping, pathlib.Path], Mapping[str, float]] = lambda summary, workdir: {}
  least: Mapping[str, float] = dataclasses.field(default_factory=dict)
  most: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
  needs: tuple[str, ...] = ()
  flags: Callable[[Mapping[str, pathlib.Path]], Sequence[str]] = lambda workdirs: ()
  split: str = "validation"


def _of_pairs(score: Callable, workdir: pathlib.Path):
  """A score of the run's training and validation pairs, and its tokenizer."""
  data = translation_baselines.tiny_data(runs_lib.data_in(workdir))
  return score(data.train_pairs, data.validation_pairs, data.tokenizer)


# What recognisers of the embedded prompts are judged by: those that they have not heard, and those
# that they have.
_HEARD = {
  "metric": "character_error_rate",
  "target": 60.0,
  "higher_is_better": False,
  "baselines": lambda summary, workdir: speech_baselines.embedded("embedded/en"),
  "most": {"train": {"character_error_rate": 5.0}},
}

# Of tasks of images and texts: masked data modelling comes before them.
_AFTER_PRETRAINING = {
  "needs": ("masked_data",),
  "flags": lambda workdirs: [f"--config.init_from={workdirs['masked_data']}"],
}

ENTRIES: dict[str, Entry] = {
  "causal_lm": Entry(
    config="configs/gpt.py:tiny",
    metric="bits_per_byte",
    target=2.456,
    higher_is_better=False,
    # Of bytes: unigrams, bigrams, and xz -9e, which is given the training text.
    baselines=lambda summary, workdir: summary["baselines"]["bits_per_byte"],
  ),
  "masked_lm": Entry(
    config="configs/bert.py:tiny",
    metric="masked_accuracy",
    target=0.15,
    higher_is_better=True,
    baselines=lambda summary, workdir: summary["baselines"]["masked_accuracy"],
  ),
  "text_classification": Entry(
    config="configs/text_classification.py:tiny",
    metric="accuracy",
    target=0.33,
    higher_is_better=True,
    # The commonest class, a draw, and a logistic regression on counts of words.
    baselines=lambda summary, workdir: summary["baselines"]["accuracy"] | text_baselines.embedded(),
    needs=("masked_lm",),
    flags=lambda workdirs: [f"--config.init_from={workdirs['masked_lm']}"],
  ),
  "translation": Entry(
    config="configs/translation.py:tiny",
    metric="loss_nats_per_token",
    target=2.8,
    higher_is_better=False,
    # Of the training targets' tokens, and of a dictionary learnt with IBM model 1.
    baselines=lambda summary, workdir: _of_pairs(translation_baselines.nats_per_token, workdir),
    # What the dictionary and copying the source score where the model's own text is judged.
    beside=lambda summary, workdir: {
      f"{metric} of {name}": value
      for name, values in {
        "the model": {metric: summary[f"validation_{metric}"] for metric in ("bleu", "chrf")},
        **_of_pairs(lambda train, other, _: translation_baselines.scores(train, other), workdir),
      }.items()
      for metric, value in values.items()
    },
  ),
  "image_classification": Entry(
    config="configs/vit.py:mnist",
    metric="accuracy",
    target=0.96,
    higher_is_better=True,
    split="test",
    # The commonest class, a draw, and a logistic regression on pixels.
    baselines=lambda summary, workdir: image_baselines.embedded("embedded/mnist5k"),
  ),
  "image_classification_emoji": Entry(
    config="configs/vit.py:emoji",
    metric="accuracy",
    target=0.55,
    higher_is_better=True,
    split="test",
    baselines=lambda summary, workdir: image_baselines.embedded("embedded/emoji"),
  ),
  "image_tokenizer": Entry(
    config="configs/image_tokenizer.py:mnist",
    metric="mean_squared_error",
    target=0.08,
    higher_is_better=False,
    # Each patch in its own mean colour.
    baselines=lambda summary, workdir: {
      "plain_patches": summary["validation_mean_squared_error_of_plain_patches"]
    },
    # A quarter of the codes.
    least={"codebook_perplexity": 16.0},
  ),
  "masked_image": Entry(
    config="configs/beit.py:tiny",
    metric="masked_accuracy",
    target=0.3,
    higher_is_better=True,
    baselines=lambda summary, workdir: {
      name: summary[f"validation_{name}"]
      for name in ("commonest_token", "commonest_token_of_the_place")
    },
    # A quarter of the codes: of one token alone all would be right.
    least={"codebook_perplexity": 16.0},
    needs=("image_tokenizer",),
    flags=lambda workdirs: [f"--config.image_tokenizer={workdirs['image_tokenizer']}"],
  ),
  "image_tokenizer_emoji": Entry(
    config="configs/image_tokenizer.py:emoji",
    metric="mean_squared_error",
    target=0.08,
    higher_is_better=False,
    baselines=lambda summary, workdir: {
      "plain_patches": summary["validation_mean_squared_error_of_plain_patches"]
    },
    least={"codebook_perplexity": 32.0},
  ),
  "masked_data": Entry(
    config="configs/beit3.py:tiny",
    metric="pair_text_accuracy",
    target=0.25,
    higher_is_better=True,
    # The commonest token, and the model itself where it is given another image, or none.
    baselines=lambda summary, workdir: {
      "commonest_token": summary["validation_pair_text_commonest_token"],
      "another_image": summary["validation_pair_text_accuracy_with_another_image"],
      "without_image": summary["validation_pair_text_accuracy_without_image"],
    },
    beside=lambda summary, workdir: {
      name: summary[f"validation_pair_image_{name}"]
      for name in (
        "accuracy",
        "accuracy_with_another_text",
        "accuracy_without_text",
        "commonest_token_of_the_place",
      )
    },
    needs=("image_tokenizer_emoji",),
    flags=lambda workdirs: [f"--config.image_tokenizer={workdirs['image_tokenizer_emoji']}"],
  ),
  "image_text_retrieval": Entry(
    config="configs/beit3.py:retrieval_tiny",
    metric="image_recall_at_10",
    target=19.2,
    higher_is_better=True,
    # A random order of all images.
    baselines=lambda summary, workdir: summary["baselines"]["image_recall_at_10"],
    least={"text_recall_at_10": 19.2},
    **_AFTER_PRETRAINING,
  ),
  "image_captioning": Entry(
    config="configs/beit3.py:captioning_tiny",
    metric="keyword_f1",
    target=8.0,
    higher_is_better=True,
    # Captions that are the same for all images.
    baselines=lambda summary, workdir: summary["baselines"]["keyword_f1"],
    beside=lambda summary, workdir: {
      "keyword_f1 of the model's captions of other images": summary[
        "validation_keyword_f1_of_other_images"
      ],
      **{f"chrf of {name}": value for name, value in summary["baselines"]["chrf"].items()},
    },
    least={"chrf": 16.0},
    **_AFTER_PRETRAINING,
  ),
  "visual_question_answering": Entry(
    config="configs/beit3.py:vqa_tiny",
    metric="accuracy",
    target=0.55,
    higher_is_better=True,
    # The commonest answer of each type of question.
    baselines=lambda summary, workdir: summary["baselines"]["accuracy"],
    beside=lambda summary, workdir: {
      f"{metric} of {name}": value
      for metric, others in summary["baselines"].items()
      for name, value in {"the model": summary[f"validation_{metric}"], **others}.items()
    },
    **_AFTER_PRETRAINING,
  ),
  "visual_reasoning": Entry(
    config="configs/beit3.py:reasoning_tiny",
    metric="accuracy",
    target=0.6,
    higher_is_better=True,
    # Either answer, whichever the kind of statement has more often.
    baselines=lambda summary, workdir: summary["baselines"]["accuracy"],
  ),
  "speech_recognition_ctc": Entry(config="configs/speech.py:ctc", **_HEARD),
  "speech_recognition_transducer": Entry(config="configs/speech.py:transducer", **_HEARD),
  "speech_translation": Entry(
    config="configs/speech.py:translation",
    metric="chrf",
    target=20.0,
    higher_is_better=True,
    baselines=lambda summary, workdir: speech_baselines.embedded("embedded/fr-en"),
  ),
}


def _metrics(split: str, summary: Mapping, workdir: pathlib.Path) -> Mapping[str, float]:
  """A run's metrics on a split, by the last checkpoint."""
  if split == "validation":
    prefix = "validation_"
    return {n.removeprefix(prefix): x for n, x in summary.items() if n.startswith(prefix)}
  output = workdir / f"{split}.json"
  asked = [f"--workdir={workdir}", f"--split={split}", f"--output={output}"]
  coordinator.command("magneto_jax.evaluate", asked)
  return json.loads(output.read_text())["metrics"]


def ordered(names: Sequence[str]) -> list[str]:
  """The tasks, with those that they need before them, each once."""
  found: dict[str, None] = {}
  for name in names:
    found |= dict.fromkeys([*ordered(ENTRIES[name].needs), name])
  return list(found)


def best(values: Mapping[str, float], higher_is_better: bool) -> str:
  """The name of the best value; of equals the first."""
  return (max if higher_is_better else min)(values, key=values.get)


def run(name: str, workdirs: Mapping[str, pathlib.Path]) -> dict:
  """Trains a task's config, and judges it.

  Raises:
    SystemExit: if the command fails; its own words are on the terminal.
  """
  entry, workdir = ENTRIES[name], workdirs[name]
  provenance = coordinator.provenance("tiny_runs", coordinator.README_VARIABLES)
  asked = [f"--config={entry.config}", f"--workdir={workdir}", *entry.flags(workdirs)]
  coordinator.command("magneto_jax.train", asked)
  summary = json.loads((workdir / "summary.json").read_text())
  found = {
    split: _metrics(split, summary, workdir)
    for split in dict.fromkeys([entry.split, "validation", *entry.most])
  }
  baselines = dict(entry.baselines(summary, workdir))
  strongest = best(baselines, entry.higher_is_better)
  return {
    "task": name,
    "config": entry.config,
    "metric": entry.metric,
    "split": entry.split,
    "value": found[entry.split][entry.metric],
    "target": entry.target,
    "higher_is_better": entry.higher_is_better,
    "baseline": baselines[strongest],
    "baseline_name": strongest,
    "baselines": baselines,
    "beside": dict(entry.beside(summary, workdir)),
    "least": {n: [found["validation"][n], bound] for n, bound in entry.least.items()},
    "most": {
      f"{n} of {split}": [found[split][n], bound]
      for split, bounds in entry.most.items()
      for n, bound in bounds.items()
    },
    "seconds": summary["wall_seconds"],
    "training_seconds": summary["training_seconds"],
    "device": summary["device"],
    "versions": summary["versions"],
    **{key: provenance[key] for key in ("date", "machine", "git_commit", "git_clean")},
    "load_average_at_start": provenance["load_average_at_start"],
  }


def marks(result: Mapping) -> list[dict]:
  """The target, which is to be reached, the baseline, which is to be beaten, and what else is."""
  at_most, value = not result["higher_is_better"], result["value"]
  of = f"{result['task']}, {result['metric']}"
  beaten = coordinator.mark(
    f"{of}, against {result['baseline_name']}", value, result["baseline"], at_most=at_most
  )
  beaten["met"] = beaten["met"] and value != result["baseline"]
  more = [
    coordinator.mark(f"{result['task']}, {name}", *values, at_most=kind == "most")
    for kind in ("least", "most")
    for name, values in result.get(kind, {}).items()
  ]
  return [coordinator.mark(of, value, result["target"], at_most=at_most), beaten, *more]


def read(path: pathlib.Path) -> list[dict]:
  """The runs that a results file holds; none where there is no file."""
  return json.loads(path.read_text())["runs"] if path.exists() else []


def keep(result: dict, path: pathlib.Path) -> None:
  """Puts a run in the place of its task's last one; the order is that of ENTRIES."""
  runs = {run["task"]: run for run in read(path)} | {result["task"]: result}
  order = [*ENTRIES, *(name for name in runs if name not in ENTRIES)]
  kept = [runs[name] for name in order if name in runs]
  path.parent.mkdir(parents=True, exist_ok=True)
  scratch = path.with_suffix(".tmp")
  scratch.write_text(json.dumps({"benchmark": "tiny_runs", "runs": kept}, indent=1) + "\n")
  scratch.replace(path)


def show(results: Sequence[Mapping]) -> bool:
  """Prints the table and the marks; whether all are met."""
  rows = [
    [
      result["task"],
      f"{result['metric']} {'↑' if result['higher_is_better'] else '↓'}",
      *(f"{result[name]:.4g}" for name in ("value", "target", "baseline")),
      result["baseline_name"],
      f"{result['seconds']:.0f}",
      result["date"][:10],
    ]
    for result in results
  ]
  columns = ["task", "metric", "value", "target", "baseline", "which", "seconds", "date"]
  told = [mark for result in results for mark in marks(result)]
  beside = [
    f"beside {result['task']}: "
    + ", ".join(f"{name} {value:.4f}" for name, value in result["beside"].items())
    for result in results
    if result["beside"]
  ]
  words = [coordinator.mark_in_words(mark, digits=4) for mark in told]
  coordinator.show(columns, rows, [*beside, *words])
  return all(mark["met"] for mark in told)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", default=",".join(ENTRIES), help="tasks, separated by commas")
  parser.add_argument("--table", action="store_true", help="print what the results file holds")
  parser.add_argument("--workdirs", type=pathlib.Path, help="a new folder that keeps the runs")
  parser.add_argument("--output", type=pathlib.Path, default=PATH, help="the results file")
  parser.add_argument("--needed", type=pathlib.Path, help="what holds finished runs of the others")
  args = parser.parse_args(arguments)
  names = [name.strip() for name in args.only.split(",") if name.strip()]
  if unknown := [name for name in names if name not in ENTRIES]:
    parser.error(f"--only={unknown[0]} is not one of {', '.join(ENTRIES)}")
  if args.table:
    results = [result for result in read(args.output) if result["task"] in names]
    if not results:
      parser.error(f"{args.output} holds no run of {', '.join(names)}: run them first")
    return 0 if show(results) else 1
  if args.workdirs and args.workdirs.exists():
    parser.error(f"--workdirs={args.workdirs} exists: name a new folder, as a run would resume")
  there = [name for name in ordered(names) if args.needed and name not in names]
  if missing := [name for name in there if not (args.needed / name / "summary.json").exists()]:
    parser.error(f"--needed={args.needed} holds no finished run of {missing[0]}")
  results = []
  with tempfile.TemporaryDirectory() as scratch:
    workdirs = {name: args.needed.absolute() / name for name in there}
    for name in ordered(names):
      if name in there:
        continue
      workdirs[name] = (args.workdirs or pathlib.Path(scratch)).absolute() / name
      results.append(run(name, workdirs))
      keep(results[-1], args.output)
  return 0 if show(results) else 1


if __name__ == "__main__":
  sys.exit(main())
