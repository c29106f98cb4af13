"""Part `gradients`: the gradient by layer, at the start and early on (NormFormer, figure 3)."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.stability import text

RECIPES = ("pre_ln", "post_ln", "normformer")
# mean|g| of the FFN's second matrix, layer 0 over layer 11, of such models in fairseq.
OTHERS = {
  "step_0": {"post_ln": 1.55, "pre_ln": 2.29, "normformer": 2.88},
  "mean": {"post_ln": 0.26, "pre_ln": 1.75, "normformer": 2.31},
}


@dataclasses.dataclass(frozen=True)
class Setup(text.Setup):
  """The figure's depth, at toy size."""

  layers: int = 12
  width: int = 64
  ffn_width: int = 256
  heads: int = 4
  steps: int = 60
  rate: float = 1e-3


def norms(gradients: dict) -> jax.Array:
  """[2, L]: mean |g| and the L2 norm of the FFN's second kernel, layer by layer."""
  g_LFD = gradients["stack"]["segment_0"]["block_0"]["ffn"]["wo"]["kernel"]
  axes = tuple(range(1, g_LFD.ndim))
  return jnp.stack([jnp.mean(jnp.abs(g_LFD), axes), jnp.sqrt(jnp.sum(jnp.square(g_LFD), axes))])


def run(setup: Setup, recipe: str, seed: int) -> dict:
  """One training: the norms at step 0 and their mean over all steps."""
  inputs, targets = text.batches(setup, seed)
  p = text.frequencies(targets)
  vocab_size = 1 + int(max(inputs.max(), targets.max()))
  model = text.model_of(setup, recipe, setup.layers, vocab_size, float(np.sum(p**2)))
  params = jax.jit(lambda: model.init(jax.random.key(seed), inputs[0])["params"])()
  losses, by_step = jax.jit(text.trainer(model, norms))(params, inputs, targets, setup.rate)
  by_step = np.asarray(by_step, np.float64)
  figures = {"step_0": by_step[0], "mean": by_step.mean(0)}
  return {"losses": [float(losses[0]), text.last_tenth(losses)]} | {
    when: {"mean_abs": rows[0].tolist(), "l2": rows[1].tolist()} for when, rows in figures.items()
  }


def measure(
  setup: Setup,
  keep: Callable[[dict], object],
  *,
  recipes: Sequence[str] = RECIPES,
  seeds: int = 3,
) -> dict:
  """Every recipe and seed; `keep` is given what there is after each recipe."""
  results = {"setup": dataclasses.asdict(setup), "seeds": seeds, "others": OTHERS, "recipes": {}}
  for recipe in recipes:
    results["recipes"][recipe] = [run(setup, recipe, seed) for seed in range(seeds)]
    keep(results)
  return results
