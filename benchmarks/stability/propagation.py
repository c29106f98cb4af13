"""Part `propagation`: the stream and its gradient through 192 layers, measured and predicted."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax import diagnostics
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
