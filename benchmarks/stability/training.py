"""Part `training`: a very deep decoder, trained with each recipe at the same budget."""

import concurrent.futures
import dataclasses
import multiprocessing
import pathlib
import tempfile
from collections.abc import Callable, Sequence

from magneto_jax import config, reporting, training

RECIPES = ("magneto", "deepnet", "deepscalelm", "pre_ln", "post_ln")


@dataclasses.dataclass(frozen=True)
class Setup:
  """One model, one text, one schedule, for all recipes."""

  layers: int = 200
  width: int = 32
  ffn_width: int = 128
  heads: int = 2
  length: int = 128
  batch: int = 4
  steps: int = 400
  warmup: int = 40
  log_every: int = 5
  seed: int = 0


def config_of(setup: Setup, recipe: str, rate: float) -> config.TrainConfig:
  """The run as the library's own config; all that is not said here is at its default."""
  values = config.default_config().to_dict()
  values |= {"recipe": recipe, "seed": setup.seed, "steps": setup.steps, "sample_tokens": 0}
  values |= {"batch_size": setup.batch, "log_every": setup.log_every}
  values |= {"eval_every": setup.steps, "checkpoint_every": setup.steps, "keep_checkpoints": 1}
  values["model"] |= {
    "layers": setup.layers,
    "width": setup.width,
    "ffn_width": setup.ffn_width,
    "heads": setup.heads,
    "activation": "relu",
    "positions": "rotary",
    "remat": "full",
  }
  values["data"] |= {"tokenizer": "byte", "seq_length": setup.length}
  values["optimizer"] |= {"learning_rate": rate, "warmup_steps": setup.warmup}
  return config.from_config_dict(values)


def run(setup: Setup, recipe: str, rate: float) -> dict:
  """Trains one recipe; a loss that is not finite is a result, not an error."""
  with tempfile.TemporaryDirectory() as folder:
    summary, error = {}, None
    try:
      summary = training.train(config_of(setup, recipe, rate), folder)
    except FloatingPointError as raised:
      error = str(raised).split(":", 1)[0]
    rows = reporting.read_metrics(pathlib.Path(folder))
  rows = [row for row in rows if "train/loss" in row]
  return {
    "recipe": recipe,
    "rate": rate,
    "steps": [row["step"] for row in rows],
    "loss": [row["train/loss"] for row in rows],
    "gradient_norm": [row["train/gradient_norm"] for row in rows],
    "not_finite": error,
    "bits_per_byte": summary.get("validation_bits_per_byte"),
    "baselines": summary.get("baselines", {}).get("bits_per_byte", {}),
    "parameters": summary.get("parameters"),
    "training_seconds": summary.get("training_seconds"),
  }


def measure(
  setup: Setup,
  keep: Callable[[dict], object],
  *,
  recipes: Sequence[str] = RECIPES,
  rates: Sequence[float] = (1e-3,),
  processes: int = 1,
) -> dict:
  """Every recipe at every rate; `keep` is given what there is after each run."""
  results = {"setup": dataclasses.asdict(setup), "processes": processes, "runs": []}
  spawn = multiprocessing.get_context("spawn")
  pool = concurrent.futures.ProcessPoolExecutor(processes, spawn, max_tasks_per_child=1)
  with pool:
    wanted = [pool.submit(run, setup, recipe, rate) for rate in rates for recipe in recipes]
    for done in concurrent.futures.as_completed(wanted):
      results["runs"].append(done.result())
      keep(results)
  return results
