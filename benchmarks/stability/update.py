"""Part `update`: one SGD step's update of the output against depth (DeepNet, figure 5)."""

import dataclasses
import functools
import math
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.stability import pictures, pool, words
from magneto_jax import diagnostics, reporting
from magneto_jax.layers.positions import sinusoidal
from magneto_jax.models.language import CausalLM
from magneto_jax.theory import moments, propagation, recipes, records

# DeepNet's tiny Transformers (64-128-2), as decoders.
SIZES = {"width": 64, "ffn_width": 128, "heads": 2}
DEPTHS = (6, 12, 24, 48, 96, 200, 400, 1000)
# Draws at each depth, of the recipes that the papers make claims about and of the others: deep
# stacks take longest, and compiling each depth takes most.
SEEDS = {"claimed": (3, 3, 3, 3, 3, 2, 1, 1), "others": (2, 0, 2, 0, 2, 0, 0, 1)}
# What moves: the layers' matrices, as in the theorems, or all of the layers' parameters.
ROWS = ("matrices", "everything")
# rms(dF) / eta of such a decoder in torchscale and fairseq, in float64 with eta = 1e-4, at 6, 24
# and 96 layers; other text, and where the init differs, other numbers.
OTHERS = {
  "layers": [6, 24, 96],
  "matrices": {
    "post_ln": [17.1, 173, 3238],
    "deepnet": [0.293, 0.251, 0.234],
    "pre_ln": [3.30, 9.65, 16.6],
    "normformer": [11.8, 19.0, 26.3],
  },
  "everything": {
    "post_ln": [19.4, 216, 2220],
    "deepnet": [0.85, 2.34, 8.41],
    "pre_ln": [3.83, 12.1, 24.2],
    "normformer": [12.1, 24.2, 51.2],
  },
}
# All recipes as they are by default, those of the papers first, and DeepScaleLM's other placement.
CLAIMED = ("pre_ln", "post_ln", "magneto", "deepnet", "normformer", "deepscalelm")
LINES: Mapping[str, tuple[str, dict]] = {
  **{name: (name, {}) for name in CLAIMED},
  "deepscalelm, post": ("deepscalelm", {"placement": "post"}),
  **{name: (name, {}) for name in reversed(recipes.RECIPES) if name not in CLAIMED},
  "deepscalelm_simple, post": ("deepscalelm_simple", {"placement": "post"}),
}


@dataclasses.dataclass(frozen=True)
class Setup:
  """Two batches of uniformly random tokens: one for the step, one on which F is read."""

  vocab_size: int = 64
  length: int = 16
  batch: int = 4
  activation: str = "relu"


def start_moments(setup: Setup, variance: float = 1.0) -> tuple[float, float]:
  """Variance of the stack's input, and correlation of two of its tokens.

  Two random tokens are the same once in V; sinusoidal positions have moments of their own.
  """
  table_TD = np.asarray(sinusoidal(jnp.arange(setup.length), SIZES["width"]), np.float64)
  square = np.mean(np.square(table_TD))
  products = table_TD @ table_TD.T / SIZES["width"]
  pairs = setup.length * (setup.length - 1)
  product = (products.sum() - np.trace(products)) / pairs
  total = variance + square
  return float(total), float((variance / setup.vocab_size + product) / total)


def architecture(setup: Setup, layers: int) -> records.Architecture:
  """The decoder's sizes."""
  correlation = start_moments(setup)[1]
  return records.Architecture(
    "decoder", decoder_layers=layers, **SIZES, token_correlation=correlation
  )


def recipe_of(setup: Setup, line: str, layers: int) -> records.Recipe:
  """The record of one line of the figure."""
  name, options = LINES[line]
  return recipes.RECIPES[name](architecture(setup, layers), **options)


def model_of(setup: Setup, line: str, layers: int, dtype=jnp.float32) -> CausalLM:
  """The decoder of one line of the figure."""
  return CausalLM(
    recipe=recipe_of(setup, line, layers).decoder,
    vocab_size=setup.vocab_size,
    width=SIZES["width"],
    num_heads=SIZES["heads"],
    ffn_width=SIZES["ffn_width"],
    activation=setup.activation,
    positions="sinusoidal",
    tied=False,
    remat="full",
    dtype=dtype,
  )


def features(model: CausalLM, output) -> jax.Array:
  """What the output projection reads, at the model's start: the final norm has no gain yet."""
  _, hidden_LBTD = output
  x_BTD = hidden_LBTD[-1]
  if not model.recipe.final_norm:
    return x_BTD
  norm = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}[model.recipe.norm]
  plain = {"use_scale": False} | ({"use_bias": False} if norm is nn.LayerNorm else {})
  return norm(epsilon=model.norm_epsilon, dtype=model.dtype, **plain).apply({}, x_BTD)


def calls(setup: Setup, model: CausalLM, key: jax.Array) -> tuple[diagnostics.Call, ...]:
  """The call of the step, with the cross-entropy of random targets, and the one that reads F."""
  shape = (setup.batch, setup.length)
  first, targets, second = (
    jax.random.randint(jax.random.fold_in(key, i), shape, 0, setup.vocab_size) for i in range(3)
  )

  def loss(logits):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

  step = diagnostics.Call((first,), {}, loss, key)
  read = {"return_hidden_states": True}
  return step, diagnostics.Call((second,), read, lambda out: features(model, out), key)


def keys(seed: int) -> tuple[jax.Array, jax.Array]:
  """Of the parameters and of the batches."""
  return tuple(jax.random.fold_in(jax.random.key(seed), i) for i in range(2))


# Compiling takes most of the time here.
fast_jit = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  },
)


def measured(setup: Setup, line: str, layers: int, seeds: Sequence[int]) -> list[list[float]]:
  """[matrices, everything] for each seed: rms(J g), as the learning rate goes to 0."""
  model = model_of(setup, line, layers)

  @fast_jit
  def update(seed):
    init_key, batch_key = keys(seed)
    step, read = calls(setup, model, batch_key)
    params = model.init(init_key, *step.args)["params"]
    return diagnostics.first_update(model, params, step, read)

  return [[float(value) for value in update(seed)] for seed in seeds]


def predicted(setup: Setup, line: str, layers: int) -> dict[str, float]:
  """What the theory says of the same, of one sample and itself, and the papers' bound."""
  recipe, sizes = recipe_of(setup, line, layers), architecture(setup, layers)
  parts, _ = propagation.parts_of(recipe, sizes, length=setup.length, activation=setup.activation)
  stack, setting = parts["decoder"]
  embedding = stack.embedding
  tokens = float((embedding.tokens.std(1, 1) * embedding.scale) ** 2)
  _, correlation = start_moments(setup, tokens)
  start = propagation.start_of(stack, setting, correlation, position_variance=0.5)
  # The loss's gradient is of one size where the output projection reads; a final norm divides it
  # by the stream's deviation on its way to the last layer.
  last = propagation.propagate(stack, setting, start).variance[-1] if stack.final_norm else 1.0
  top = moments.Gradient(1 / float(last), 0.0)
  update = propagation.first_update(parts, {"decoder": start}, top)
  bound = propagation.update_bound(recipe, sizes)
  return {**update._asdict(), "bound": bound.value, "no_bound": bound.reason}


def finite_step(setup: Setup, line: str, layers: int, *, seed: int, rate: float) -> dict:
  """A real step in float64, rms(F(after) - F(before)) / rate, beside the derivative in float32."""
  init_key, batch_key = keys(seed)
  narrow = model_of(setup, line, layers)
  step, read = calls(setup, narrow, batch_key)
  params = jax.jit(lambda: narrow.init(init_key, *step.args)["params"])()
  derivative = fast_jit(lambda p: diagnostics.first_update(narrow, p, step, read))(params)
  # Drawn in 32 bits, as 64 would bring other tokens.
  model = model_of(setup, line, layers, jnp.float64)
  step, read = calls(setup, model, batch_key)
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
    run = jax.jit(lambda params: read.loss(read.apply(model, {"params": params})))
    gradient = jax.jit(jax.grad(lambda p: step.loss(step.apply(model, {"params": p}))))(wide)
    before, moved = run(wide), []
    for moves in (diagnostics.is_matrix, diagnostics.is_of_a_layer):
      after = jax.tree_util.tree_map_with_path(
        lambda path, p, g, moves=moves: p - rate * g if moves(path) else p, wide, gradient
      )
      moved.append(float(jnp.sqrt(jnp.mean(jnp.square(run(after) - before)))) / rate)
  return {
    "line": line,
    "layers": layers,
    "derivative": dict(zip(ROWS, map(float, derivative), strict=True)),
    "finite_step": dict(zip(ROWS, moved, strict=True)),
  }


def line_of(setup: Setup, line: str, depths: Sequence[int], seeds: Sequence[int]) -> dict:
  """A line of the figure: at each depth the draws, their mean, the prediction and the bound."""
  entry = {kind: {row: [] for row in ROWS} for kind in ("measured", "draws", "predicted")}
  entry["bound"] = []
  for layers, count in zip(depths, seeds, strict=True):
    draws = measured(setup, line, layers, range(count)) if count else []
    theory = predicted(setup, line, layers)
    for i, row in enumerate(ROWS):
      values = [draw[i] for draw in draws]
      entry["draws"][row].append(values)
      # Draws are heavy-tailed: the geometric mean is what a single one is like.
      entry["measured"][row].append(geometric_mean(values))
      entry["predicted"][row].append(theory[row])
    entry["bound"].append(theory["bound"])
    entry["no_bound"] = theory["no_bound"]
  return entry


def measure(
  setup: Setup,
  keep: Callable[[dict], object],
  *,
  lines: Sequence[str] = tuple(LINES),
  depths: Sequence[int] = DEPTHS,
  seeds: Mapping[str, Sequence[int]] = SEEDS,
  processes: int = 1,
) -> dict:
  """Every line at every depth; `keep` is given what there is after each line."""
  results = {
    "setup": dataclasses.asdict(setup) | SIZES,
    "depths": list(depths),
    "seeds": {group: list(counts) for group, counts in seeds.items()},
    "finite_steps": [],
    "lines": {},
    "others": OTHERS,
  }
  done = {}
  claimed = lambda line: "claimed" if LINES[line][0] in CLAIMED else "others"
  tasks = [(setup, line, depths, seeds[claimed(line)]) for line in lines]
  for (_, line, *_), entry in pool.completed(line_of, tasks, processes):
    done[line] = entry
    results["lines"] = {line: done[line] for line in lines if line in done}
    keep(results)
  for line in ("post_ln", "deepnet", "pre_ln"):
    for layers in depths[:3:2]:
      results["finite_steps"].append(finite_step(setup, line, layers, seed=0, rate=1e-4))
  keep(results)
  return results


def geometric_mean(values: Sequence[float]) -> float | None:
  """exp(mean log); 0 if any is 0, None of nothing."""
  if not values:
    return None
  return math.exp(statistics.fmean(map(math.log, values))) if all(values) else 0.0


# ---------------------------------------------------------------------------------------------
# The picture and the page
# ---------------------------------------------------------------------------------------------


PAPER = (
  "DeepNet's own figure 5 has encoder-decoders of the same sizes on IWSLT-14, 6 + 6 to 100 + 100"
  " layers, and finite steps early in training: Post-LN's update rises from 0.02 at 6 layers to 0.1"
  " and more from 50 on, DeepNet's stays below 0.01 and nearly flat. Magneto has a bound only."
)


def scaled(values: Sequence[float | None], measured: Sequence[float | None]) -> list[float]:
  """A prediction times what makes its first figure the measured one; NaN where there is none."""
  wide = [math.nan if value is None else value for value in values]
  first = math.nan if measured[0] is None else measured[0]
  return [value * first / wide[0] if wide[0] else math.nan for value in wide]


def draw(results: dict, path: pathlib.Path) -> None:
  """Two rows, what moves; three columns of recipes."""
  names, depths = list(results["lines"]), results["depths"]
  claimed = [name for name in names if name in (*CLAIMED, "deepscalelm, post")]
  others = [name for name in names if name not in claimed]
  half = -(-len(others) // 2)
  groups = [group for group in (claimed, others[:half], others[half:]) if group]
  title = "First update of the output against depth: one step of SGD, rms(dF) / learning rate"
  figure, grid = pictures.panels(2, len(groups), title=title, width=5.4, height=4.1)
  moving = {"matrices": "only the layers' matrices move", "everything": "all of the layers move"}
  for column, group in enumerate(groups):
    styles = reporting.line_styles(group)
    for axes, row in zip(grid[:, column], ROWS, strict=True):
      for name, style in styles.items():
        entry, colour = results["lines"][name], style["color"]
        figures = [math.nan if not v else v for v in entry["measured"][row]]
        axes.plot(depths, figures, lw=0, ms=5, color=colour, marker=style["marker"])
        theory = scaled(entry["predicted"][row], entry["measured"][row])
        axes.plot(depths, theory, lw=1.4, color=colour, linestyle=style["linestyle"])
        if row == "matrices":
          bound = scaled(entry["bound"], entry["measured"][row])
          axes.plot(depths, bound, lw=2.2, color=colour, linestyle=(0, (1, 1.5)), alpha=0.6)
      pictures.depth_axis(axes, depths)
      axes.set_yscale("log")
      pictures.tidy(axes, title=moving[row], xlabel="layers", ylabel="rms(dF) / learning rate")
    axes.legend(
      handles=pictures.handles(styles),
      loc="upper center",
      bbox_to_anchor=(0.5, -0.16),
      ncols=3,
      frameon=False,
    )
  kinds = {
    "marks: measured": {"marker": "o", "lw": 0, "ms": 5},
    "line: the theory's prediction, set to the measured figure at the first depth": {"lw": 1.4},
    "dots: the papers' bound, likewise": {"lw": 2.2, "linestyle": (0, (1, 1.5))},
  }
  pictures.save(figure, path, pictures.handles({}, **kinds), columns=3)


def growth(values: Sequence[float | None]) -> float | None:
  """The last figure over the first."""
  return values[-1] / values[0] if values[0] and values[-1] else None


def spread(values: Sequence[float | None]) -> float:
  """The largest figure over the smallest; infinite if any is missing or 0."""
  return max(values) / min(values) if all(values) else math.inf


def judged(results: dict) -> list[words.Claim]:
  """DeepNet's and Magneto's claims."""
  lines, depths = results["lines"], results["depths"]
  matrices = {name: entry["measured"]["matrices"] for name, entry in lines.items()}
  everything = {name: entry["measured"]["everything"] for name, entry in lines.items()}
  says = lambda name, row: f"{name}: {words.number(growth(row[name]))} times"
  ends = f"from {depths[0]} to {depths[-1]} layers"
  deepnet, sub, pre = matrices["deepnet"], matrices["magneto"], matrices["pre_ln"]
  shallower = [n for n, a, b in zip(depths, sub, pre, strict=True) if a is None or not a < b]
  return [
    words.Claim(
      f"Post-LN's update explodes with depth (DeepNet, figure 5; at least 10 times {ends})",
      says("post_ln", matrices),
      (growth(matrices["post_ln"]) or math.inf) >= 10,
    ),
    words.Claim(
      "DeepNet's does not depend on depth (section 4.3; largest over smallest at most 2)",
      f"{words.number(spread(deepnet))} with the matrices of the theorem moving",
      spread(deepnet) <= 2,
    ),
    words.Claim(
      "the same if norms and biases move too, as they do in training",
      f"{words.number(spread(everything['deepnet']))}",
      spread(everything["deepnet"]) <= 2,
    ),
    words.Claim(
      "Magneto's does not depend on depth (theorem of section 2.4; at most 2)",
      f"{words.number(spread(sub))}",
      spread(sub) <= 2,
    ),
    words.Claim(
      f"Magneto's grows less than Pre-LN's, whose bound is log L ({ends})",
      f"{says('magneto', matrices)}, {says('pre_ln', matrices)}",
      (growth(sub) or math.inf) < (growth(pre) or math.inf),
    ),
    words.Claim(
      "Magneto's is smaller than Pre-LN's (at every depth)",
      f"not at {', '.join(map(str, shallower))} layers" if shallower else "at every depth",
      not shallower,
    ),
  ]


def section(results: dict) -> list[str]:
  """The page's text and tables."""
  depths, setup, lines = results["depths"], results["setup"], results["lines"]
  seeds = {
    group: ", ".join(f"{count} at {n}" for count, n in zip(counts, depths, strict=True) if count)
    for group, counts in results["seeds"].items()
  }
  text = [
    f"A decoder of width {setup['width']} with an FFN of {setup['ffn_width']} and"
    f" {setup['heads']} heads (DeepNet's tiny Transformers), ReLU,"
    f" sinusoidal positions, {setup['batch']} samples of {setup['length']} random tokens out of"
    f" {setup['vocab_size']}. One step of SGD on one batch; F is what the output projection reads,"
    " on another batch. The figure is rms(dF) over the learning rate as that goes to 0, so nothing"
    " saturates. Draws of the"
    f" recipes that the papers make claims about: {seeds['claimed']} layers; of the others:"
    f" {seeds['others']}. Their geometric mean, as deep Post-LN's are heavy-tailed; a"
    " dash: not measured, or not finite in float32.",
    "",
    PAPER,
    "",
    *words.claims(judged(results)),
  ]
  for row, title in (
    ("matrices", "Only the layers' matrices move"),
    ("everything", "All of the layers' parameters move"),
  ):
    shown = [
      [name, *map(words.number, e["measured"][row]), words.number(growth(e["measured"][row]))]
      for name, e in lines.items()
    ]
    columns = ["layers", *map(str, depths), "last / first"]
    text += ["", f"**{title}**, measured:", "", *words.table(columns, shown)]
  shown = [
    [
      name,
      words.number(growth(e["measured"]["matrices"])),
      words.number(growth(e["predicted"]["matrices"])),
      words.number(growth(e["bound"])),
      words.number(growth(e["measured"]["everything"])),
      words.number(growth(e["predicted"]["everything"])),
    ]
    for name, e in lines.items()
  ]
  columns = ["", "matrices: measured", "predicted", "bound", "all: measured", "predicted"]
  text += [
    "",
    f"**Growth from {depths[0]} to {depths[-1]} layers**, beside the theory's"
    " (`theory.propagation.first_update`: of a sample and itself) and the papers' bound (a dash:"
    " none is stated).",
    "",
    *words.table(columns, shown),
  ]
  others = results["others"]
  shared = [str(n) for n in others["layers"] if n in depths]
  shown = []
  for row in ROWS:
    for name in others[row]:
      ours = dict(zip(depths, lines[name]["measured"][row], strict=True)) if name in lines else {}
      pairs = zip(others["layers"], others[row][name], strict=True)
      cells = [f"{words.number(ours[n])} ({words.number(v)})" for n, v in pairs if n in ours]
      shown.append([f"{name}, {row}", *cells])
  text += [
    "",
    "**Beside the papers' own code** (in brackets: torchscale and fairseq, one real step in float64"
    " on other tokens; their Pre-LN has fairseq's init, ours Xavier's):",
    "",
    *words.table(["layers", *shared], shown),
  ]
  shown = [
    [f"{c['line']}, {c['layers']} layers"]
    + [words.number(c[kind][row]) for row in ROWS for kind in ("finite_step", "derivative")]
    for c in results["finite_steps"]
  ]
  columns = ["", "matrices: finite step", "derivative", "all: finite step", "derivative"]
  text += [
    "",
    "**Cross-check**: a real step of 1e-4 in float64 beside the derivative in float32, one draw:",
    "",
    *words.table(columns, shown),
  ]
  return text
