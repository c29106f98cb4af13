"""Part `propagation`: the stream and its gradient through 192 layers, measured and predicted."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.stability import words
from magneto_jax import diagnostics, reporting
from magneto_jax.models.encoder import Encoder
from magneto_jax.theory import recipes, records

# Name: (recipe, options, dropout).
LINES = {
  "pre_ln, dropout 0": ("pre_ln", {}, 0.0),
  "pre_ln, dropout 0.1": ("pre_ln", {}, 0.1),
  "post_ln, dropout 0": ("post_ln", {}, 0.0),
  "post_ln, dropout 0.1": ("post_ln", {}, 0.1),
  "deepscalelm": ("deepscalelm", {}, 0.1),
  "deepscalelm, post": ("deepscalelm", {"placement": "post"}, 0.1),
  "deepscalelm_simple": ("deepscalelm_simple", {}, 0.1),
}
FIGURES = ("variance", "correlation", "gradient", "gradient_correlation")


@dataclasses.dataclass(frozen=True)
class Setup:
  """An encoder of embeddings that have BERT's correlation, as in the authors' figures."""

  layers: int = 192
  width: int = 256
  ffn_width: int = 1024
  heads: int = 4
  length: int = 64
  batch: int = 2
  correlation: float = 0.221


def model_of(setup: Setup, line: str) -> Encoder:
  """The encoder of one line, in training mode with its dropout."""
  recipe, options, dropout = LINES[line]
  architecture = records.Architecture(
    "encoder",
    encoder_layers=setup.layers,
    width=setup.width,
    ffn_width=setup.ffn_width,
    heads=setup.heads,
    dropout=dropout,
    token_correlation=setup.correlation,
    embedding_tables=3,
  )
  return Encoder(
    recipe=recipes.RECIPES[recipe](architecture, **options).encoder,
    width=setup.width,
    num_heads=setup.heads,
    ffn_width=setup.ffn_width,
    activation="relu",
    positions="none",
    dropout_rate=dropout,
    attention_dropout_rate=dropout,
    remat="full",
  )


def embeddings(setup: Setup, key: jax.Array, variance: float) -> jax.Array:
  """[B, T, D] of this variance, whose tokens have the setup's correlation within a sample."""
  shape = (setup.batch, setup.length, setup.width)
  common_key, own_key = jax.random.split(key)
  common = jax.random.normal(common_key, (setup.batch, 1, setup.width))
  own = jax.random.normal(own_key, shape)
  r = setup.correlation
  return jnp.sqrt(variance) * (jnp.sqrt(r) * common + jnp.sqrt(1 - r) * own)


def measured(setup: Setup, line: str, seeds: Sequence[int]) -> list[diagnostics.Measured]:
  """One forward and backward pass a seed, of a loss whose gradient has no correlation."""
  model, dropout = model_of(setup, line), LINES[line][2]

  def batch(key):
    # The stack's own dropout brings the variance to 1.
    return embeddings(setup, jax.random.fold_in(key, 0), 1 - dropout)

  @jax.jit
  def observe(seed):
    key = jax.random.key(seed)
    x_BTD = batch(key)
    params = model.init(jax.random.fold_in(key, 1), embeddings_BTD=x_BTD)["params"]
    loss = diagnostics.random_projection(jax.random.fold_in(key, 2))
    call = diagnostics.Call((), {"embeddings_BTD": x_BTD}, loss, jax.random.fold_in(key, 3))
    return diagnostics.statistics(model, params, call)

  return [diagnostics.profiles_of(model, *observe(seed))["encoder"] for seed in seeds]


def summary(setup: Setup, line: str, draws: Sequence[diagnostics.Measured]) -> dict:
  """Means over seeds beside the prediction for them; gradients in units of the last layer's."""
  means = {name: np.mean([getattr(draw, name) for draw in draws], axis=0) for name in FIGURES}
  relative = [draw.gradient / draw.gradient[-1] for draw in draws]
  # Of a product of many factors, the typical draw is the geometric mean.
  means["gradient"] = np.exp(np.mean(np.log(relative), axis=0))
  mean = draws[0]._replace(**means)
  profiles, _ = diagnostics.predict(model_of(setup, line), {"encoder": mean})
  profile = profiles["encoder"]
  return {
    "measured": {name: means[name].tolist() for name in FIGURES},
    "predicted": {name: getattr(profile, name).tolist() for name in FIGURES},
    "notes": list(profile.notes),
  }


def measure(
  setup: Setup,
  keep: Callable[[dict], object],
  *,
  lines: Sequence[str] = tuple(LINES),
  seeds: int = 2,
) -> dict:
  """Every line; `keep` is given what there is after each."""
  results = {"setup": dataclasses.asdict(setup), "seeds": seeds, "lines": {}}
  for line in lines:
    results["lines"][line] = summary(setup, line, measured(setup, line, range(seeds)))
    keep(results)
  return results


# ---------------------------------------------------------------------------------------------
# The picture and the page
# ---------------------------------------------------------------------------------------------


PAPER = (
  "The authors' own figures have 192 layers of width 1024 and 256 tokens at dropout 0.1: with"
  " Xavier's init Pre-LN's variance grows linearly, and Post-LN's gradient norm by 1.024 a layer"
  " (in g, its square, by exp(0.047)); the axes of DeepScaleLM's end at twice the first value."
)


def draw(results: dict, path: pathlib.Path) -> None:
  """Stream variance, correlation and gradient: vanilla stacks above, DeepScaleLM below."""
  titles = {
    "variance": ("Variance of the stream", "E x^2"),
    "correlation": ("Correlation of two tokens", "E x_i x_j / E x^2"),
    "gradient": ("Gradient", "(dloss/dx)^2 over the last layer's"),
  }
  vanilla = [line for line in results["lines"] if not line.startswith("deepscalelm")]
  scaled = [line for line in results["lines"] if line not in vanilla]
  panels = []
  for kind, lines in (("Xavier", vanilla), ("DeepScaleLM", scaled)):
    for figure, (title, label) in titles.items():
      curves = {}
      for line in lines:
        entry = results["lines"][line]
        arrays = (np.array(entry[k][figure], np.float64) for k in ("measured", "predicted"))
        curves[line] = reporting.Curve(*arrays)
      logarithmic = figure != "correlation" and kind == "Xavier" or figure == "gradient"
      panels.append(reporting.Panel(f"{title}, {kind}", label, curves, logarithmic))
  layers = results["setup"]["layers"]
  reporting.draw_by_layer(path, panels, title=f"An encoder of {layers} layers at its start")


def errors(entry: dict, figure: str) -> float:
  """The median over layers of |log(measured / predicted)|, as a factor."""
  measured, predicted = (np.array(entry[k][figure], np.float64) for k in ("measured", "predicted"))
  return float(np.exp(np.nanmedian(np.abs(np.log(measured[1:] / predicted[1:])))))


def last(entry: dict, figure: str, kind: str = "measured") -> float:
  return entry[kind][figure][-1]


def slope(entry: dict, kind: str = "measured") -> float:
  """d log(gradient) / d layer over the middle half."""
  gradient = np.array(entry[kind]["gradient"], np.float64)
  low, high = len(gradient) // 4, 3 * len(gradient) // 4
  fitted = float(np.polyfit(np.arange(low, high), np.log(gradient[low:high]), 1)[0])
  # What a fit of a constant leaves is rounding, which differs between versions.
  return round(fitted, 9) + 0.0


def judged(results: dict) -> list[words.Claim]:
  """DeepScaleLM's claims."""
  lines, layers = results["lines"], results["setup"]["layers"]
  pre, post = lines["pre_ln, dropout 0.1"], lines["post_ln, dropout 0.1"]
  half = pre["measured"]["variance"][layers // 2] / last(pre, "variance")
  entries = [
    words.Claim(
      "Pre-LN's variance grows linearly with depth (half of it at half the depth, within 15 %)",
      f"{words.number(last(pre, 'variance'))} at the end, {words.number(half)} of it halfway",
      0.425 <= half <= 0.575,
    ),
    words.Claim(
      "Post-LN's gradient vanishes exponentially (with dropout; at least 1.01 times less a layer)",
      f"exp({words.number(slope(post))}) a layer, predicted"
      f" exp({words.number(slope(post, 'predicted'))})",
      slope(post) >= 0.01,
    ),
    *(
      words.Claim(
        f"without dropout tokens collapse into one in {name} (correlation above 0.99 at the end)",
        words.number(last(lines[f"{name}, dropout 0"], "correlation")),
        last(lines[f"{name}, dropout 0"], "correlation") > 0.99,
      )
      for name in ("post_ln", "pre_ln")
    ),
  ]
  for name in ("deepscalelm", "deepscalelm, post"):
    entry = lines[name]
    variance = entry["measured"]["variance"][1:]
    gradient = entry["measured"]["gradient"][1:]
    entries += [
      words.Claim(
        f"{name}: the variance stays near 1 through all layers (between 1/2 and 2)",
        f"{words.number(min(variance))} to {words.number(max(variance))}",
        0.5 <= min(variance) and max(variance) <= 2,
      ),
      words.Claim(
        f"{name}: the gradient neither vanishes nor explodes (within a factor of 10)",
        f"{words.number(min(gradient))} to {words.number(max(gradient))} of the last layer's",
        0.1 <= min(gradient) and max(gradient) <= 10,
      ),
      words.Claim(
        f"{name}: tokens stay apart (correlation below 0.95 at the end)",
        words.number(last(entry, "correlation")),
        last(entry, "correlation") < 0.95,
      ),
    ]
  return entries


def section(results: dict) -> list[str]:
  """The page's text and tables."""
  setup = results["setup"]
  rows = []
  for name, entry in results["lines"].items():
    cells = []
    for figure, at in (("variance", -1), ("correlation", -1), ("gradient", 1)):
      pair = [words.number(entry[kind][figure][at]) for kind in ("measured", "predicted")]
      cells += [f"{pair[0]} ({pair[1]})", words.number(errors(entry, figure))]
    rows.append([name, *cells, f"{slope(entry):.3g} ({slope(entry, 'predicted'):.3g})"])
  columns = ["", "variance", "off by", "correlation", "off by", "gradient", "off by", "slope"]
  return [
    f"An encoder of {setup['layers']} layers, width {setup['width']}, FFN {setup['ffn_width']} with"
    f" ReLU, {setup['heads']} heads, {setup['batch']} samples of {setup['length']} tokens whose"
    f" embeddings have the correlation {setup['correlation']} (BERT's, in the authors' code),"
    f" {results['seeds']} seeds; dropout, where there is any, of attention too. Predictions are"
    " `theory.propagation`'s, from the measured input. DeepScaleLM has dropout 0.1 throughout.",
    "",
    PAPER,
    "",
    *words.claims(judged(results)),
    "",
    "**Measured (predicted)**: variance and correlation after the last layer, gradient after the"
    " first one over the last one's, and its slope d ln g / d layer over the middle half. `off by`"
    " is the factor by which the prediction errs, the median over layers.",
    "",
    *words.table(columns, rows),
  ]
