"""Fine-tuning from a masked image model, beside training from scratch with the same budget.

`python -m benchmarks.masked_image_finetuning --beit=DIR` takes the run of configs/beit.py:tiny in
DIR, and trains configs/beit.py:finetune_tiny with several seeds from it and from scratch: the same
steps of the same batches. From scratch all layers have the same learning rate (no layer_decay), and
of `--learning_rates` each is tried in both. Accuracies are of the test part, after the last step,
which nothing is chosen by; the pre-training is not counted in the budget, and is told beside it.
"""

import pathlib
import sys
import tempfile
from collections.abc import Sequence

from benchmarks import coordinator, starts

_CONFIG = "configs/beit.py:finetune_tiny"


def show(results: dict) -> None:
  """Prints the table."""
  rows = [starts.cells(row, "accuracy") for row in results["rows"]]
  before = results["pretraining"]
  notes = [f"pre-training: {before['training_seconds']:.0f} s more"]
  coordinator.show(starts.columns("accuracy"), rows, notes)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = starts.parser(__doc__, flag="--beit", rates="7.5e-4,1.5e-3,3e-3")
  args = parser.parse_args(arguments)
  summary = starts.summary_of(parser, "--beit", args.beit, "masked_image", "configs/beit.py:tiny")
  seeds, rates = starts.numbers(args)
  results = coordinator.provenance("masked_image_finetuning", coordinator.README_VARIABLES)
  kept = ("training_seconds", "steps", "validation_masked_accuracy", "validation_commonest_token")
  kept += ("validation_codebook_perplexity", "versions")
  results |= {"config": _CONFIG, "seeds": seeds, "steps": args.steps}
  results["pretraining"] = {name: summary[name] for name in kept}
  compared = {
    "masked_image": [f"--config.init_from={args.beit.absolute()}", *starts.budget(args)],
    "scratch": ["--config.optimizer.layer_decay=1.0", *starts.budget(args)],
  }
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    results["rows"] = starts.compare(_CONFIG, "accuracy", compared, folder, seeds, rates)
  coordinator.save(results, args, "tiny")
  show(results)
  return 0


if __name__ == "__main__":
  sys.exit(main())
