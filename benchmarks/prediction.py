"""The theory beside real models, for every recipe: `python -m benchmarks.prediction`.

Encoder and decoder at several depths, the mean over seeds of the stream, the tokens' correlation
and the gradient by layer, measured by `diagnostics.statistics` and predicted by
`diagnostics.predict` from the measured input and last gradient. About an hour of one core.
"""

import argparse
import itertools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import coordinator
from magneto_jax import RECIPES, Architecture, diagnostics, reporting
from magneto_jax.models import CausalLM, Encoder
from magneto_jax.theory import moments

WIDTH, FFN, HEADS, LENGTH, VOCAB, DROPOUT = 256, 1024, 4, 64, 1024, 0.1
DEPTHS, SEEDS = (12, 48, 192), 8
# Each recipe, and DeepScaleLM with its norms behind the sum.
VARIANTS = {name: (name, {}) for name in RECIPES} | {
  "deepscalelm, post": ("deepscalelm", {"placement": "post"})
}
KINDS = ("encoder", "decoder")


def build(variant: str, kind: str, depth: int):
  """A model of the package, in training mode with dropout."""
  name, options = VARIANTS[variant]
  correlation = moments.token_correlation(moments.zipf(VOCAB))
  architecture = Architecture(
    kind,
    **{f"{kind}_layers": depth},
    width=WIDTH,
    ffn_width=FFN,
    heads=HEADS,
    dropout=DROPOUT,
    token_correlation=correlation,
  )
  model = {"encoder": Encoder, "decoder": CausalLM}[kind]
  return model(
    recipe=getattr(RECIPES[name](architecture, **options), kind),
    vocab_size=VOCAB,
    width=WIDTH,
    num_heads=HEADS,
    ffn_width=FFN,
    positions="rotary",
    dropout_rate=DROPOUT,
    attention_dropout_rate=DROPOUT,
    remat="full",
  )


def measure(variant: str, kind: str, depth: int, *, seeds: int = SEEDS) -> list:
  """[(measured, predicted)] of each seed: weights, tokens by Zipf's law, dropout and loss anew."""
  model = build(variant, kind, depth)

  def call(tokens, key) -> diagnostics.Call:
    loss = diagnostics.random_projection(jax.random.fold_in(key, 1))
    return diagnostics.Call((tokens,), {}, loss, key)

  init = jax.jit(lambda key, tokens: model.init(key, tokens)["params"])
  observe = jax.jit(
    lambda params, tokens, key: diagnostics.statistics(model, params, call(tokens, key))
  )
  pairs = []
  for seed in range(seeds):
    draws = np.random.default_rng(seed).choice(VOCAB, (1, LENGTH), p=moments.zipf(VOCAB))
    tokens, key = jnp.asarray(draws), jax.random.key(seed)
    params = init(key, tokens)
    measured = diagnostics.profiles_of(model, *observe(params, tokens, jax.random.fold_in(key, 2)))
    predicted, _ = diagnostics.predict(model, measured)
    pairs.append((measured[kind], predicted[kind]))
  return pairs


def mean_profile(profiles: list) -> dict[str, np.ndarray]:
  """Over seeds: means of variance and of covariance, and of the gradient's logarithm."""
  variance = np.mean([p.variance for p in profiles], axis=0)
  covariance = np.mean([p.correlation * p.variance for p in profiles], axis=0)
  ratios = [np.log(p.gradient / p.gradient[-1]) for p in profiles]
  return {
    "variance": variance,
    "correlation": covariance / variance,
    "log_gradient": np.mean(ratios, axis=0),
  }


def errors(pairs: list) -> dict[str, float]:
  """How far the mean prediction lies from the mean measurement.

  variance_mean, variance_largest: over layers, of |predicted / measured - 1|.
  correlation, log_gradient: the largest difference over layers; of the gradient where float32 holds
    its square.
  slope_measured, slope_predicted: of the log gradient by layer, over the middle half.
  """
  measured, predicted = (mean_profile(list(side)) for side in zip(*pairs, strict=True))
  relative = np.abs(predicted["variance"] / measured["variance"] - 1)[1:]
  depth = len(relative)
  middle = slice(depth // 4, depth - depth // 4 + 1)
  layers = np.arange(depth + 1)[middle]
  slope = lambda side: float(np.polyfit(layers, side["log_gradient"][middle], 1)[0])

  def apart(name: str) -> float:
    held = np.isfinite(measured[name])
    return float(np.max(np.abs(predicted[name][held] - measured[name][held])))

  return {
    "variance_mean": float(np.mean(relative)),
    "variance_largest": float(np.max(relative)),
    "correlation": apart("correlation"),
    "log_gradient": apart("log_gradient"),
    "slope_measured": slope(measured),
    "slope_predicted": slope(predicted),
  }


def cell(variant: str, kind: str, depth: int, *, seeds: int = SEEDS) -> dict[str, Any]:
  """A row of the results: the errors, and the profiles at nine layers."""
  begin = time.perf_counter()
  pairs = measure(variant, kind, depth, seeds=seeds)
  at = np.unique(np.round(np.linspace(0, depth, 9)).astype(int))
  sides = dict(zip(("measured", "predicted"), zip(*pairs, strict=True), strict=True))
  profiles = {
    side: {name: [float(f"{v:.5g}") for v in values[at]] for name, values in mean.items()}
    for side, mean in ((s, mean_profile(list(p))) for s, p in sides.items())
  }
  return {
    "recipe": variant,
    "kind": kind,
    "layers": depth,
    "seeds": seeds,
    **errors(pairs),
    "at_layers": at.tolist(),
    **profiles,
    "seconds": time.perf_counter() - begin,
  }


def table(results: dict) -> list[str]:
  """The lines of a Markdown table: errors by kind and depth, over recipes."""
  lines = [
    "| | layers | variance: median | worst | correlation: worst | ln g: median | worst |",
    "|---|---|---|---|---|---|---|",
  ]
  by = lambda row: (row["kind"], row["layers"])
  for (kind, layers), rows in itertools.groupby(sorted(results["cells"], key=by), key=by):
    rows = list(rows)

    def worst(name, text, rows=rows):
      row = max(rows, key=lambda row: row[name])
      return f"{text(row[name])} ({row['recipe']})"

    median = lambda name, rows=rows: float(np.median([row[name] for row in rows]))
    percent, plain = (lambda value: f"{100 * value:.1f} %"), (lambda value: f"{value:.2f}")
    cells = (
      kind,
      str(layers),
      percent(median("variance_mean")),
      worst("variance_mean", percent),
      worst("correlation", plain),
      plain(median("log_gradient")),
      worst("log_gradient", plain),
    )
    lines.append(f"| {' | '.join(cells)} |")
  return lines


def main() -> None:
  """Runs the cells; writes them after each one."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  numbers = lambda text: tuple(int(part) for part in text.split(","))
  parser.add_argument("--depths", type=numbers, default=DEPTHS)
  parser.add_argument("--seeds", type=int, default=SEEDS)
  parser.add_argument("--output", type=pathlib.Path, help="a JSON file; default: in results/")
  arguments = parser.parse_args()
  results = coordinator.provenance("prediction")
  results["versions"] = reporting.versions()
  results["setting"] = {
    "width": WIDTH,
    "ffn": FFN,
    "heads": HEADS,
    "length": LENGTH,
    "vocab": VOCAB,
    "dropout": DROPOUT,
  }
  results["cells"] = []
  default = coordinator.RESULTS / f"prediction-{results['date'][:10]}.json"
  for depth, variant, kind in itertools.product(arguments.depths, VARIANTS, KINDS):
    results["cells"].append(cell(variant, kind, depth, seeds=arguments.seeds))
    print(f"{variant}, {kind}, {depth} layers: {results['cells'][-1]['seconds']:.0f} s", flush=True)
    text = json.dumps(diagnostics.jsonable(results), indent=1, allow_nan=False)
    (arguments.output or default).write_text(text + "\n")
  print("\n".join(table(results)))


if __name__ == "__main__":
  main()
