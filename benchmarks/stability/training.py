"""Part `training`: a very deep decoder, trained with each recipe at the same budget."""

import dataclasses
import math
import pathlib
import tempfile
from collections.abc import Callable, Sequence

from benchmarks.stability import pictures, pool, words
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
  tasks = [(setup, recipe, rate) for rate in rates for recipe in recipes]
  for _, found in pool.completed(run, tasks, processes):
    results["runs"].append(found)
    keep(results)
  return results


# ---------------------------------------------------------------------------------------------
# The picture and the page
# ---------------------------------------------------------------------------------------------


# Bits a byte below the frequencies' that count as trained; a model that is stuck there has learned
# no more than they.
TRAINED = 0.15
PAPER = (
  "The papers' own: DeepNet translates with 100 + 100 layers (table 1) and 500 + 500, where Post-LN"
  " diverges from 18 + 18 on and Pre-LN trains but scores lower; DeepScaleLM's abstract has 192 and"
  " 1,000 layers; Magneto's deepest language model has 72."
)


def by_rate(results: dict) -> dict[float, dict[str, dict]]:
  """{rate: {recipe: run}}, in the order of RECIPES."""
  runs = {(run["rate"], run["recipe"]): run for run in results["runs"]}
  return {
    rate: {recipe: runs[rate, recipe] for recipe in RECIPES if (rate, recipe) in runs}
    for rate in sorted({rate for rate, _ in runs})
  }


def draw(results: dict, path: pathlib.Path) -> None:
  """The loss curves, a panel for each rate."""
  styles, grouped = reporting.line_styles(RECIPES), by_rate(results)
  setup = results["setup"]
  title = f"A decoder of {setup['layers']} layers of width {setup['width']}: training loss"
  figure, grid = pictures.panels(1, len(grouped), title=title, width=6.0, height=4.2)
  baselines = next((r["baselines"] for r in results["runs"] if r["baselines"]), {})
  for axes, (rate, runs) in zip(grid[0], grouped.items(), strict=True):
    for name, run in runs.items():
      every = max(len(run["steps"]) // 12, 1)
      losses = [math.nan if loss is None else loss for loss in run["loss"]]
      axes.plot(run["steps"], losses, lw=1.3, ms=5, markevery=every, **styles[name])
    for name, bits in baselines.items():
      if name != "xz":
        axes.axhline(bits * math.log(2), color="#666666", lw=1, linestyle=":")
        axes.annotate(f" {name}", (0, bits * math.log(2)), color="#444444", fontsize=8, va="bottom")
    axes.set_ylim(2.0, 5.8)
    pictures.tidy(
      axes, title=f"peak rate {rate:g}", xlabel="optimizer step", ylabel="loss, nats a byte"
    )
  pictures.save(figure, path, pictures.handles({n: styles[n] for n in RECIPES}))


def judged(results: dict) -> list[words.Claim]:
  """What the papers say of such depths: trained is below the frequencies' bits a byte."""
  baselines = next((r["baselines"] for r in results["runs"] if r["baselines"]), {})
  unigram, layers = baselines.get("unigram", math.nan), results["setup"]["layers"]
  entries = []
  for rate, runs in by_rate(results).items():
    bits = {n: r["bits_per_byte"] for n, r in runs.items()}
    trains = {n: b is not None and b < unigram - TRAINED for n, b in bits.items()}
    for name, claim in (
      ("magneto", "Magneto trains"),
      ("deepnet", "DeepNet trains (figure 6: to 1,000 layers)"),
      ("deepscalelm", "DeepScaleLM trains (to 1,000 layers)"),
    ):
      holds = trains.get(name)
      here = f"{words.number(bits[name])} bits a byte" if name in bits else ""
      entries.append(words.Claim(f"{claim}, {layers} layers, peak rate {rate:g}", here, holds))
    entries.append(
      words.Claim(
        f"Post-LN does not train (DeepNet, table 1), {layers} layers, peak rate {rate:g}",
        f"{words.number(bits['post_ln'])} bits a byte" if "post_ln" in bits else "",
        None if "post_ln" not in trains else not trains["post_ln"],
      )
    )
    pair = bits.get("magneto"), bits.get("pre_ln")
    entries.append(
      words.Claim(
        f"Magneto ends below Pre-LN, peak rate {rate:g}",
        "" if None in pair else f"{words.number(pair[0])} against {words.number(pair[1])}",
        None if None in pair else pair[0] < pair[1],
      )
    )
  return entries


def section(results: dict) -> list[str]:
  """The page's text and tables."""
  setup = results["setup"]
  baselines = next((r["baselines"] for r in results["runs"] if r["baselines"]), {})
  rows = []
  for rate, runs in by_rate(results).items():
    for name, run in runs.items():
      finite = [loss for loss in run["loss"] if loss is not None]
      seconds = run["training_seconds"]
      end = run["not_finite"] or "finite"
      cells = [f"{rate:g}", words.number(run["bits_per_byte"]), f"{max(finite):.2f}"]
      cells += [f"{finite[-1]:.2f}", "-" if seconds is None else f"{seconds / 60:.1f}", end]
      rows.append([name, *cells])
  missing = [
    f"{name} at {rate:g}"
    for rate, runs in by_rate(results).items()
    for name in RECIPES
    if name not in runs
  ]
  left_out = [f"Not run, for want of time: {', '.join(missing)}.", ""] if missing else []
  columns = ["", "peak rate", "validation, bits a byte", "highest loss", "last loss", "minutes"]
  listed = ", ".join(f"{name} {words.number(bits)}" for name, bits in baselines.items())
  return [
    f"A decoder of {setup['layers']} layers, width {setup['width']}, FFN {setup['ffn_width']} with"
    f" ReLU, {setup['heads']} heads, rotary positions, on the bytes of the embedded text:"
    f" {setup['steps']} steps of {setup['batch']} samples of {setup['length']} through the"
    f" library's own `training.train`, AdamW at its defaults, {setup['warmup']} steps of warm-up,"
    " then a cosine to 0, one seed, remat `full`. The same for all recipes;"
    f" {results['processes']} runs at a time on a machine that did other work, so the minutes only"
    f" show what it took. Trained means at least {TRAINED} bits a byte below the frequencies of"
    f" bytes. Baselines, bits a byte: {listed}.",
    "",
    PAPER,
    "",
    *words.claims(judged(results)),
    "",
    *left_out,
    *words.table([*columns, "losses"], rows),
  ]
