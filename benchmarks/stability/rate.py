"""Part `rate`: the largest learning rate at which training does not diverge."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from benchmarks.stability import text

RECIPES = ("pre_ln", "post_ln", "magneto", "deepnet", "normformer", "deepscalelm", "peri_ln")
DEPTHS = (6, 24, 48)
# A model that is stuck at the frequencies of bytes is as good as one that exploded, and batches are
# noisy: to count as trained, it must end this far (nats a token) below them.
MARGIN = 0.1


def largest_rate(
  trains: Callable[[float], bool], *, start: float, lowest: float = 1e-5, highest: float = 10.0
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


def search(setup: text.Setup, recipe: str, layers: int, *, seeds: int, start: float) -> dict:
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
  seeds: int = 2,
  start: float = 8e-3,
) -> dict:
  """Every recipe at every depth; `keep` is given what there is after each search."""
  results = {
    "setup": dataclasses.asdict(setup),
    "depths": list(depths),
    "seeds": seeds,
    "margin": MARGIN,
    "recipes": {recipe: {} for recipe in recipes},
  }
  for layers in depths:
    for recipe in recipes:
      found = search(setup, recipe, layers, seeds=seeds, start=start)
      results["recipes"][recipe][str(layers)] = found
      keep(results)
  return results
