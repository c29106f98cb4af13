"""Downstream tasks from a pre-trained BEiT-3, beside training from scratch with the same budget.

`python -m benchmarks.vision_language_pretraining --beit3=DIR` takes the run of configs/beit3.py:
tiny in DIR (task masked_data), and trains retrieval_tiny, captioning_tiny and vqa_tiny with several
seeds from it and from scratch: the same steps of the same batches, of its tokens. From scratch all
layers have the same learning rate (no layer_decay), and of `--learning_rates` each is tried in
both; that the best of them is the least or the largest is told. Scores are of the test part, after
the last step, which nothing is chosen by; the pre-training is not counted in the budget, and is
told beside it.
"""

import pathlib
import sys
import tempfile
from collections.abc import Sequence

from benchmarks import coordinator, starts
from magneto_jax import runs as runs_lib
from magneto_jax.data import text

# The metric of each variant of configs/beit3.py.
METRICS = {
  "retrieval_tiny": "mean_recall",
  "captioning_tiny": "keyword_f1",
  "vqa_tiny": "accuracy",
}


def show(results: dict) -> None:
  """Prints a table for each task."""
  for variant, rows in results["rows"].items():
    metric = METRICS[variant]
    print(variant)
    cells = [starts.cells(row, metric) for row in rows]
    coordinator.show(starts.columns(metric), cells, starts.at_the_edge(rows, metric))
  print(f"pre-training: {results['pretraining']['training_seconds']:.0f} s more")


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = starts.parser(__doc__, flag="--beit3", rates="5e-4,1e-3,2e-3")
  parser.add_argument("--only", default=",".join(METRICS), help="variants, separated by commas")
  args = parser.parse_args(arguments)
  only = [name.strip() for name in args.only.split(",")]
  if unknown := [name for name in only if name not in METRICS]:
    parser.error(f"--only={unknown[0]} is not one of {', '.join(METRICS)}")
  config = "configs/beit3.py"
  summary = starts.summary_of(parser, "--beit3", args.beit3, "masked_data", f"{config}:tiny")
  seeds, rates = starts.numbers(args)
  results = coordinator.provenance("vision_language_pretraining", coordinator.README_VARIABLES)
  kept = [name for name in summary if name.startswith("validation_")]
  kept += ["training_seconds", "steps", "versions"]
  results |= {"config": config, "seeds": seeds, "steps": args.steps}
  results["pretraining"] = {name: summary[name] for name in kept}
  folder = args.beit3.absolute()
  tokenizer = runs_lib.data_in(folder) / text.TOKENIZER_FILE
  steps = starts.budget(args)
  compared = {
    "masked_data": [f"--config.init_from={folder}", *steps],
    "scratch": [
      "--config.optimizer.layer_decay=1.0",
      f"--config.data.tokenizer_file={tokenizer}",
      *steps,
    ],
  }
  with tempfile.TemporaryDirectory() as scratch:
    results["rows"] = {
      name: starts.compare(
        f"{config}:{name}", METRICS[name], compared, pathlib.Path(scratch) / name, seeds, rates
      )
      for name in only
    }
  coordinator.save(results, args, "_".join(only))
  show(results)
  return 0


if __name__ == "__main__":
  sys.exit(main())
