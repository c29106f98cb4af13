"""Part `gradients`: the gradient by layer, at the start and early on (NormFormer, figure 3)."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.stability import pictures, text, words
from magneto_jax import reporting

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


# ---------------------------------------------------------------------------------------------
# The picture and the page
# ---------------------------------------------------------------------------------------------

PAPER = (
  "The paper's own figure 3 has the layers 0, 1, 6, 10 and 11 of a model of 12 and width 768, early"
  " in training: Post-LN's norms grow with depth, Pre-LN's shrink, NormFormer's are closer to flat."
  " Here the recipes differ in their init too (Xavier's, and NormFormer's own): in fairseq, with"
  " one init, NormFormer's largest over smallest was 2.31 and Pre-LN's 1.95, against the claim."
)
WHEN = {"step_0": "step 0", "mean": "mean over the first steps"}


def norms_of(results: dict, recipe: str, when: str, norm: str = "mean_abs") -> np.ndarray:
  """[L], the mean over seeds."""
  return np.mean([run[when][norm] for run in results["recipes"][recipe]], axis=0)


def mismatch(results: dict, recipe: str, when: str, norm: str = "mean_abs") -> tuple[float, float]:
  """The first layer's over the last one's, and the largest over the smallest."""
  norms_L = norms_of(results, recipe, when, norm)
  return float(norms_L[0] / norms_L[-1]), float(norms_L.max() / norms_L.min())


def draw(results: dict, path: pathlib.Path) -> None:
  """Two rows, mean |g| and L2; two columns, step 0 and the mean over steps."""
  styles = reporting.line_styles(list(results["recipes"]))
  title = "Gradient of the FFN's second matrix by layer (marks: mean of the seeds; thin: each seed)"
  figure, grid = pictures.panels(2, 2, title=title, height=3.6, width=5.4)
  for row, (norm, label) in enumerate((("mean_abs", "mean |g|"), ("l2", "L2 norm"))):
    for axes, (when, words_of) in zip(grid[row], WHEN.items(), strict=True):
      for name, style in styles.items():
        for run in results["recipes"][name]:
          axes.plot(run[when][norm], lw=0.6, alpha=0.4, color=style["color"])
        axes.plot(norms_of(results, name, when, norm), lw=1.6, ms=5, **style)
      axes.set_yscale("log")
      pictures.tidy(axes, title=words_of, xlabel="layer, from the input", ylabel=label)
  pictures.save(figure, path, pictures.handles(styles))


def judged(results: dict) -> list[words.Claim]:
  """NormFormer's claims."""
  figures = {name: mismatch(results, name, "mean") for name in results["recipes"]}
  start = {name: mismatch(results, name, "step_0") for name in results["recipes"]}
  first = lambda name: f"{words.number(figures[name][0])} of the last layer's"
  flat = f"{words.number(figures['normformer'][1])} against {words.number(figures['pre_ln'][1])}"
  flat0 = f"{words.number(start['normformer'][1])} against {words.number(start['pre_ln'][1])}"
  return [
    words.Claim(
      "Post-LN's gradients grow with depth early in training (NormFormer, figure 3; the first"
      " layer's is below the last one's)",
      first("post_ln"),
      figures["post_ln"][0] < 1,
    ),
    words.Claim(
      "Pre-LN's shrink with depth (the first layer's is above the last one's)",
      first("pre_ln"),
      figures["pre_ln"][0] > 1,
    ),
    words.Claim(
      "NormFormer's are flatter than Pre-LN's (largest over smallest, mean over steps)",
      flat,
      figures["normformer"][1] < figures["pre_ln"][1],
    ),
    words.Claim("the same at step 0", flat0, start["normformer"][1] < start["pre_ln"][1]),
  ]


def section(results: dict) -> list[str]:
  """The page's text and tables."""
  setup = results["setup"]
  rows = []
  for name, runs in results["recipes"].items():
    cells = []
    for when in WHEN:
      ratio, largest = mismatch(results, name, when)
      other = results["others"][when][name]
      l2, _ = mismatch(results, name, when, "l2")
      cells += [f"{words.number(ratio)} ({words.number(other)})", words.number(largest)]
      cells += [words.number(l2)]
    losses = np.mean([run["losses"] for run in runs], axis=0)
    rows.append([name, *cells, f"{losses[0]:.2f} -> {losses[1]:.2f}"])
  columns = ["", "step 0: first / last", "max / min", "L2 first / last"]
  columns += ["mean: first / last", "max / min", "L2 first / last", "loss"]
  return [
    f"A decoder of {setup['layers']} layers of width {setup['width']} on the bytes of the embedded"
    f" text, {setup['batch']} samples of {setup['length']} a step, {setup['steps']} steps of Adam"
    f" at {setup['rate']:g} without warm-up, {results['seeds']} seeds. The figure is the mean of"
    " |g| of the FFN's second matrix, layer by layer: the paper's is its L1 norm, which differs by"
    " a constant. In brackets: such models in fairseq, one seed, with a short warm-up.",
    "",
    PAPER,
    "",
    *words.claims(judged(results)),
    "",
    *words.table(columns, rows),
  ]
