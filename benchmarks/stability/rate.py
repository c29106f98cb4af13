"""Part `rate`: the largest learning rate at which training does not diverge."""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from benchmarks.stability import pictures, pool, text, words
from magneto_jax import reporting

RECIPES = ("pre_ln", "post_ln", "magneto", "deepnet", "normformer", "deepscalelm", "peri_ln")
DEPTHS = (6, 24)
# A model that is stuck at the frequencies of bytes is as good as one that exploded, and batches are
# noisy: to count as trained, it must end this far (nats a token) below them.
MARGIN = 0.05
# Below it no recipe has the time to learn more than the frequencies.
LOWEST = 5e-4


def largest_rate(
  trains: Callable[[float], bool], *, start: float, lowest: float = LOWEST, highest: float = 10.0
) -> float | None:
  """The largest rate that trains, to a factor of sqrt 2, if larger rates never train again.

  From `start` it doubles or halves until the answer changes, then tries the rate between. None if
  no rate from `lowest` on trains.
  """
  rate = start
  if trains(rate):
    while rate * 2 <= highest and trains(rate * 2):
      rate *= 2
  else:
    rate /= 2
    while rate >= lowest and not trains(rate):
      rate /= 2
    if rate < lowest:
      return None
  between = rate * 2**0.5
  return between if between <= highest and trains(between) else rate


def search(setup: text.Setup, recipe: str, layers: int, seeds: int, start: float) -> dict:
  """The largest rate at which every seed trains, and all runs that were made to find it."""
  drawn = [text.batches(setup, seed) for seed in range(seeds)]
  threshold = text.unigram(np.stack([targets for _, targets in drawn])) - MARGIN
  p = text.frequencies(drawn[0][1])
  vocab_size = 1 + max(int(array.max()) for pair in drawn for array in pair)
  model = text.model_of(setup, recipe, layers, vocab_size, float(np.sum(p**2)))
  init = jax.jit(lambda key: model.init(key, drawn[0][0][0])["params"])
  parameters = [init(jax.random.key(seed)) for seed in range(seeds)]
  train = jax.jit(text.trainer(model, lambda gradients: ()))
  runs, begin = [], time.perf_counter()

  def trains(rate: float) -> bool:
    for seed, (params, batches) in enumerate(zip(parameters, drawn, strict=True)):
      losses, _ = train(params, *batches, rate)
      final = text.last_tenth(losses)
      runs.append({"rate": rate, "seed": seed, "final_loss": final})
      if not final < threshold:
        return False
    return True

  found = largest_rate(trains, start=start)
  return {
    "largest_rate": found,
    "threshold": threshold,
    "runs": runs,
    "seconds": time.perf_counter() - begin,
  }


def measure(
  setup: text.Setup,
  keep: Callable[[dict], object],
  *,
  recipes: Sequence[str] = RECIPES,
  depths: Sequence[int] = DEPTHS,
  seeds: int = 1,
  start: float = 1.6e-2,
  processes: int = 1,
) -> dict:
  """Every recipe at every depth; `keep` is given what there is after each search."""
  results = {
    "setup": dataclasses.asdict(setup),
    "depths": list(depths),
    "seeds": seeds,
    "margin": MARGIN,
    "lowest": LOWEST,
    "recipes": {recipe: {} for recipe in recipes},
  }
  tasks = [(setup, recipe, layers, seeds, start) for layers in depths for recipe in recipes]
  for (_, recipe, layers, *_), found in pool.completed(search, tasks, processes):
    results["recipes"][recipe][str(layers)] = found
    keep(results)
  return results


# ---------------------------------------------------------------------------------------------
# The picture and the page
# ---------------------------------------------------------------------------------------------


PAPER = (
  "Magneto's own figures (tables 9 and 10; 750 and 10,000 steps of warm-up, widths 1024 and 768):"
  " causal language models of 24 layers train at 1e-3 where Pre-LN and NormFormer diverge and need"
  " 5e-4, those of 48 and 72 layers at 1.2e-3; masked ones of 12 layers train at 3e-3, where"
  " Pre-LN diverges at 2e-3 and Post-LN at 1e-3."
)


def searched(results: dict, recipe: str) -> dict[int, dict]:
  """The searches of a recipe that there are, by depth."""
  return {int(layers): found for layers, found in results["recipes"][recipe].items()}


def draw(results: dict, path: pathlib.Path) -> None:
  """Left the largest rates by depth, then at each depth the final loss at each rate tried."""
  depths = sorted({n for recipe in results["recipes"] for n in searched(results, recipe)})
  styles = reporting.line_styles(list(results["recipes"]))
  title = "The largest learning rate of Adam, without warm-up, that does not diverge"
  figure, grid = pictures.panels(1, 1 + len(depths), title=title, width=4.6)
  tried = [
    run["rate"]
    for recipe in results["recipes"]
    for found in searched(results, recipe).values()
    for run in found["runs"]
  ]
  for name, style in styles.items():
    found = searched(results, name)
    rates = [found[n]["largest_rate"] or math.nan if n in found else math.nan for n in depths]
    grid[0, 0].plot(depths, rates, lw=1.4, ms=5, **style)
    for axes, layers in zip(grid[0, 1:], depths, strict=True):
      losses = by_rate(found[layers]) if layers in found else {}
      axes.plot(losses.keys(), losses.values(), lw=1.4, ms=5, **style)
  pictures.depth_axis(grid[0, 0], depths)
  grid[0, 0].set_yscale("log")
  pictures.tidy(grid[0, 0], title="largest rate", xlabel="layers", ylabel="learning rate")
  for axes, layers in zip(grid[0, 1:], depths, strict=True):
    threshold = next(
      searched(results, r)[layers]["threshold"]
      for r in results["recipes"]
      if layers in searched(results, r)
    )
    axes.axhline(threshold, color="#666666", lw=1, linestyle=":")
    axes.set(xscale="log", xlim=(min(tried) / 1.5, max(tried) * 1.5))
    axes.set_ylim(threshold - 1.0, threshold + 1.2)
    pictures.tidy(
      axes,
      title=f"{layers} layers",
      xlabel="learning rate",
      ylabel="final loss, nats a byte",
    )
  kinds = {"dots: above it a run counts as diverged": {"lw": 1, "linestyle": ":"}}
  pictures.save(figure, path, pictures.handles(styles, **kinds), columns=4)


def by_rate(found: dict) -> dict[float, float]:
  """The worst seed's final loss at each rate; NaN where one is not finite."""
  losses: dict[float, list[float]] = {}
  for run in found["runs"]:
    losses.setdefault(run["rate"], []).append(run["final_loss"])
  return {
    rate: math.nan if None in values else max(values) for rate, values in sorted(losses.items())
  }


def judged(results: dict) -> list[words.Claim]:
  """Magneto's and DeepNet's claims, at each depth; a rate of 0 means that none trained."""
  entries = []

  def rate(recipe: str, layers: int) -> float | None:
    found = searched(results, recipe).get(layers)
    return None if found is None else found["largest_rate"] or 0.0

  def compare(claim: str, a: str, b: str, holds: Callable[[float], bool], layers: int):
    first, second = rate(a, layers), rate(b, layers)
    here, supported = "", None
    if first is not None and second is not None and first + second > 0:
      named = [words.number(value) if value else "none" for value in (first, second)]
      ratio = first / second if second else math.inf
      supported, here = holds(ratio), " against ".join(named)
      here += f", {words.number(ratio)} times" if first and second else ""
    entries.append(words.Claim(f"{claim}, {layers} layers", here, supported))

  for layers in results["depths"]:
    compare(
      "Magneto's is at least twice Pre-LN's (Magneto, section 4: 1e-3 or 1.2e-3 against 5e-4)",
      "magneto",
      "pre_ln",
      lambda ratio: ratio >= 1.99,
      layers,
    )
  for layers in results["depths"]:
    compare(
      "Post-LN's is below Pre-LN's (Magneto, section 4.2)",
      "post_ln",
      "pre_ln",
      lambda ratio: ratio < 1,
      layers,
    )
    compare(
      "DeepNet's is above Post-LN's (DeepNet, figure 7)",
      "deepnet",
      "post_ln",
      lambda ratio: ratio > 1,
      layers,
    )
    compare(
      "NormFormer's is Pre-LN's (Magneto, section 4.1; within a factor of sqrt 2)",
      "normformer",
      "pre_ln",
      lambda ratio: 0.7 < ratio < 1.42,
      layers,
    )
  return entries


def section(results: dict) -> list[str]:
  """The page's text and tables."""
  setup, depths = results["setup"], results["depths"]
  rows, best = [], []
  largest = lambda search: (
    words.number(search["largest_rate"]) if search["largest_rate"] else "none"
  )
  for recipe in results["recipes"]:
    found = searched(results, recipe)
    rows.append([recipe, *(largest(found[n]) if n in found else "-" for n in depths)])
    lowest = [
      min((v for v in by_rate(found[n]).values() if v == v), default=None) if n in found else None
      for n in depths
    ]
    best.append([recipe, *map(words.number, lowest)])
  columns = ["layers", *map(str, depths)]
  seeds = results["seeds"]
  who = "one seed" if seeds == 1 else f"each of {seeds} seeds"
  return [
    f"Decoders of width {setup['width']} on the bytes of the embedded text, {setup['batch']}"
    f" samples of {setup['length']} a step, {setup['steps']} steps of the library's Adam at a"
    " constant rate: no warm-up, no clipping, no weight decay."
    f" A rate counts if with {who} (parameters and order"
    " of the data, the same for all recipes) the mean loss of the last tenth is finite and"
    f" {results['margin']} nats below what the frequencies of the bytes alone give: a model that"
    " is stuck there has learned no more than they. Rates are doubled or halved, and at the edge"
    " tried to a factor of sqrt 2; that larger ones never train again is assumed.",
    "",
    PAPER,
    "",
    *words.claims(judged(results)),
    "",
    "**The largest rate** that trains. The recipes with a norm before each sublayer worsen"
    " gradually towards it, so that theirs hang on the criterion; Post-LN and DeepNet are stuck at"
    f" the frequencies beyond it. None: at no rate from {results['lowest']:g} on.",
    "",
    *words.table(columns, rows),
    "",
    "**The lowest final loss** of all rates tried (nats a byte): the rates tried are"
    " near the edge, and the edge is far above the best rate.",
    "",
    *words.table(columns, best),
  ]
