"""A model at its start, measured beside what the theory says of its recipe.

`measure` takes the statistics of `layers.probes` from one forward and backward pass of the real
model; `predict` gives the same numbers from `theory.propagation`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from magneto_jax.layers import probes
from magneto_jax.models.backbone import Backbone
from magneto_jax.models.language import CausalLM
from magneto_jax.theory import propagation, records, stability
from magneto_jax.theory.moments import Gradient, Moments

# ---------------------------------------------------------------------------------------------
# The stacks of a model
# ---------------------------------------------------------------------------------------------


class Part(NamedTuple):
  """One stack of a model.

  Attributes:
    path: the names of the modules around it in the tree of parameters.
    backbone: the module that holds it.
  """

  path: tuple[str, ...]
  backbone: Backbone

  @property
  def is_causal(self) -> bool:
    return isinstance(self.backbone, CausalLM)

  def of(self, collection: Mapping[str, Any]) -> Any:
    """The stack's part of a collection of variables."""
    for name in (*self.path, "stack"):
      collection = collection[name]
    return collection


def parts_of(model: nn.Module) -> dict[str, Part]:
  """The stacks of a model: `encoder`, `decoder`, or both, in the order in which they run."""
  if isinstance(model, Backbone):
    part = Part((), model)
    return {"decoder" if part.is_causal else "encoder": part}
  inner = ((f.name, getattr(model, f.name, None)) for f in dataclasses.fields(model))
  parts = [Part((name,), module) for name, module in inner if isinstance(module, Backbone)]
  named = {"decoder" if part.is_causal else "encoder": part for part in parts}
  if not parts or len(named) < len(parts):
    raise TypeError(
      f"{type(model).__name__} has no stack of layers that can be measured: give a model of"
      " magneto_jax.models, or a module that holds one"
    )
  return {kind: named[kind] for kind in ("encoder", "decoder") if kind in named}


# ---------------------------------------------------------------------------------------------
# Measurement
# ---------------------------------------------------------------------------------------------


class Measured(NamedTuple):
  """One stack, at its input and after each of its L layers.

  Attributes:
    variance, correlation, gradient, gradient_correlation: [L + 1]; see `theory.propagation`.
    largest: [L + 1], the largest absolute value in the stream.
    tokens: how many tokens a sample has.
  """

  variance: np.ndarray
  correlation: np.ndarray
  gradient: np.ndarray
  gradient_correlation: np.ndarray
  largest: np.ndarray
  tokens: int


def layers_of(tree: Mapping[str, Any], stack: records.Stack, name: str) -> np.ndarray:
  """[L + 1, fields]: the statistics at the input and after the last sublayer of each layer."""
  rows = [np.asarray(tree["input"], np.float64)[None]]
  for i, segment in enumerate(stack.segments):
    blocks = [
      np.asarray(tree[f"segment_{i}"][f"block_{j}"][f"{list(layer.sublayers)[-1]}_residual"][name])
      for j, layer in enumerate(segment.pattern)
    ]
    rows.append(np.stack(blocks, axis=1).reshape(-1, len(probes.FIELDS)).astype(np.float64))
  return np.concatenate(rows)


def profiles_of(model: nn.Module, stream, gradient) -> dict[str, Measured]:
  """The collections of `layers.probes` as one record a stack."""
  profiles = {}
  for kind, part in parts_of(model).items():
    stack = part.backbone.recipe
    forward = layers_of(part.of(stream), stack, "sum")
    backward = layers_of(part.of(gradient), stack, "out")
    with np.errstate(invalid="ignore", divide="ignore"):
      profiles[kind] = Measured(
        variance=forward[:, 0],
        correlation=forward[:, 1] / forward[:, 0],
        gradient=backward[:, 0],
        gradient_correlation=backward[:, 1] / backward[:, 0],
        largest=forward[:, 2],
        tokens=int(forward[0, 3]),
      )
  return profiles


def random_projection(key: jax.Array) -> Callable[[Any], jax.Array]:
  """A loss of any output, its mean product with noise: a gradient without correlation."""

  def loss(output):
    leaves = jax.tree.leaves(output)
    return sum(
      jnp.mean(leaf * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype))
      for i, leaf in enumerate(leaves)
    )

  return loss


class Call(NamedTuple):
  """How a model is run in training, and what its loss is.

  Attributes:
    args, kwargs: of the model's call, arrays [B, ...] and what is static.
    loss: `output -> number`, the mean over targets.
    rng: of the dropout.
  """

  args: tuple
  kwargs: Mapping[str, Any]
  loss: Callable[[Any], jax.Array]
  rng: jax.Array

  def apply(self, model: nn.Module, variables, **options):
    """The model's output in training mode."""
    rngs = {"dropout": self.rng}
    return model.apply(
      variables, *self.args, deterministic=False, rngs=rngs, **self.kwargs, **options
    )


def statistics(model: nn.Module, params, call: Call):
  """(stream, gradient): the two collections of `layers.probes`; pure, to be jitted."""
  shapes = jax.eval_shape(
    lambda: call.apply(model, {"params": params}, mutable=[probes.GRADIENT])[1][probes.GRADIENT]
  )
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

  def objective(zeros):
    variables = {"params": params, probes.GRADIENT: zeros}
    output, taken = call.apply(model, variables, mutable=[probes.STREAM])
    return call.loss(output), taken[probes.STREAM]

  gradient, stream = jax.grad(objective, has_aux=True)(zeros)
  return stream, gradient


def is_matrix(path: tuple) -> bool:
  """Whether a parameter is a matrix of a layer: what the papers' bounds of the update move."""
  return is_of_a_layer(path) and path[-1].key == "kernel"


def is_of_a_layer(path: tuple) -> bool:
  """Whether a parameter is of a layer: its matrices, norms, scales and biases."""
  return any(key.key.startswith("segment_") for key in path)


def first_update(
  model: nn.Module, params, call: Call, on: Call | None = None
) -> propagation.Update:
  """How far a step of SGD moves the output, over the learning rate, as that goes to 0.

  The root mean square over outputs of J g, g the gradient of the loss with respect to the layers'
  matrices, or to all of the layers' parameters (others rest), and J the output's Jacobian. Pure,
  to be jitted.

  Args:
    model, params: as they start.
    call: the batch of the step, and its loss.
    on: where the output is read, if not on that batch: J is that of `on.loss(output)`, which may
      be any tree of arrays.
  """
  run = lambda params: call.apply(model, {"params": params})
  read = run if on is None else lambda params: on.loss(on.apply(model, {"params": params}))
  gradient = jax.grad(lambda params: call.loss(run(params)))(params)

  # Both steps at once: the pass through the model is the same.
  steps = jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.stack([leaf * is_matrix(path), leaf * is_of_a_layer(path)]), gradient
  )
  changes = jax.vmap(lambda step: jax.jvp(read, (params,), (step,))[1])(steps)
  leaves = [leaf.reshape(2, -1).astype(jnp.float32) for leaf in jax.tree.leaves(changes)]
  moved = jnp.sqrt(jnp.mean(jnp.square(jnp.concatenate(leaves, axis=1)), axis=1))
  return propagation.Update(moved[0], moved[1])


# ---------------------------------------------------------------------------------------------
# Prediction
# ---------------------------------------------------------------------------------------------


def setting_of(part: Part, length: int) -> propagation.Setting:
  """What the theory needs to know of a stack, in training mode."""
  backbone = part.backbone
  head_dim = backbone.head_dim or backbone.width // backbone.num_heads
  rotates = {"rotary", "xpos"} & set(backbone.position_kinds)
  relative = float(backbone.recipe.embedding.relative.std(1, 1)) if backbone.relative_buckets else 0
  left, right = backbone.window or (None, None)
  reach = None
  if left is not None and (part.is_causal or right is not None):
    reach = left + 1 + (0 if part.is_causal else right)
  return propagation.Setting(
    width=backbone.width,
    ffn_width=backbone.ffn_width,
    heads=backbone.num_heads,
    kv_heads=backbone.num_kv_heads,
    head_dim=head_dim,
    length=length,
    is_causal=part.is_causal,
    reach=reach,
    activation=backbone.activation,
    use_bias=backbone.use_bias,
    dropout=backbone.dropout_rate,
    attention_dropout=backbone.attention_dropout_rate,
    activation_dropout=backbone.activation_dropout_rate,
    drop_path=backbone.drop_path_rate,
    epsilon=backbone.norm_epsilon,
    rotation=propagation.rotation(length, head_dim) if rotates else 1.0,
    bias_variance=relative**2,
    soft_cap=backbone.logits_soft_cap,
  )


def predict(
  model: nn.Module, measured: Mapping[str, Measured]
) -> tuple[dict[str, propagation.Profile], propagation.Update]:
  """What the theory says of the measured model, given its measured input and top gradient."""
  parts = {
    kind: (part.backbone.recipe, setting_of(part, measured[kind].tokens))
    for kind, part in parts_of(model).items()
  }
  starts = {
    kind: Moments(0.0, m.variance[0], m.correlation[0] * m.variance[0])
    for kind, m in measured.items()
  }
  last = list(measured.values())[-1]
  top = Gradient(last.gradient[-1], last.gradient[-1] * last.gradient_correlation[-1])
  return propagation.propagate_all(parts, starts, top), propagation.first_update(parts, starts, top)


# ---------------------------------------------------------------------------------------------
# Diagnosis
# ---------------------------------------------------------------------------------------------


class Diagnosis(NamedTuple):
  """A model at its start: what was measured, what was predicted, what it means.

  Attributes:
    name: of the recipe, or whatever the caller calls it.
    measured, predicted: of each stack, by `encoder` and `decoder`.
    update, predicted_update: the first update, measured and predicted.
    update_ratio: the measured update of the matrices over that of the baseline; NaN without one.
    findings: about the measured figures, with the stack's name where there are two.
    notes: of the prediction: where it is known to be worse.
  """

  name: str
  measured: dict[str, Measured]
  predicted: dict[str, propagation.Profile]
  update: propagation.Update
  predicted_update: propagation.Update
  update_ratio: float
  findings: tuple[stability.Finding, ...]
  notes: tuple[str, ...]

  def as_json(self) -> dict[str, Any]:
    """The diagnosis as JSON-able values; what is not finite is None."""
    stacks = {
      kind: {
        "measured": self.measured[kind]._asdict(),
        "predicted": {
          name: value
          for name, value in self.predicted[kind]._asdict().items()
          if isinstance(value, np.ndarray)
        },
      }
      for kind in self.measured
    }
    return _jsonable(
      {
        "recipe": self.name,
        "stacks": stacks,
        "first_update": {
          "measured": self.update._asdict(),
          "predicted": self.predicted_update._asdict(),
          "over_pre_ln_of_6_layers": self.update_ratio,
        },
        "findings": [finding._asdict() for finding in self.findings],
        "notes": list(self.notes),
      }
    )


def _jsonable(value):
  if isinstance(value, dict):
    return {name: _jsonable(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [_jsonable(item) for item in value]
  if isinstance(value, np.ndarray):
    return _jsonable(value.tolist())
  if isinstance(value, float | np.floating | jax.Array):
    return float(value) if np.isfinite(value) else None
  return value


def first_row(tree):
  """The first sample of arrays [B, ...]; what is no array, or has no rows, stays."""
  return jax.tree.map(lambda leaf: leaf[:1] if getattr(leaf, "ndim", 0) else leaf, tree)


def diagnose(
  model: nn.Module,
  *args,
  name: str = "model",
  loss: Callable[[Any], jax.Array] | None = None,
  seed: int = 0,
  baseline: float = math.nan,
  **kwargs,
) -> Diagnosis:
  """Draws a model's parameters, measures it on a batch, and says what the figures mean.

  Args:
    model: any model of `magneto_jax.models`. With `remat="full"` memory hardly grows with depth.
    *args: of the model's call: a real batch, rows of equal length without padding.
    name: how the diagnosis is called.
    loss: `output -> number`; by default a random projection of the output.
    seed: of the parameters, the dropout and the random projection.
    baseline: the measured first update (`matrices`) of Pre-LN with 6 layers; without it nothing is
      said about the update's size.
    **kwargs: of the model's call.

  Returns:
    The diagnosis. The first update is that of the batch's first sample.

  Example:
    >>> model = magneto_jax.CausalLM(recipe=recipe, ..., remat="full")
    >>> print(diagnostics.diagnose(model, tokens_BT).findings)
  """
  init_key, dropout_key, noise_key = (jax.random.fold_in(jax.random.key(seed), i) for i in range(3))
  static = {key: value for key, value in kwargs.items() if not hasattr(value, "shape")}
  arrays = {key: value for key, value in kwargs.items() if key not in static}
  loss = random_projection(noise_key) if loss is None else loss

  def call_on(args, arrays) -> Call:
    return Call(args, {**arrays, **static}, loss, dropout_key)

  params = jax.jit(lambda: model.init(init_key, *args, **kwargs)["params"])()
  observe = jax.jit(lambda params, *batch: statistics(model, params, call_on(*batch)))
  measured = profiles_of(model, *observe(params, args, arrays))
  move = jax.jit(lambda params, *batch: first_update(model, params, call_on(*batch)))
  update = propagation.Update(*map(float, move(params, *first_row((args, arrays)))))
  return conclude(name, model, measured, update, baseline=baseline)


def conclude(
  name: str,
  model: nn.Module,
  measured: dict[str, Measured],
  update: propagation.Update,
  *,
  baseline: float = math.nan,
) -> Diagnosis:
  """The diagnosis of what was measured."""
  predicted, predicted_update = predict(model, measured)
  findings = []
  for kind, m in measured.items():
    found = stability.judge(gradient=m.gradient, correlation=m.correlation, largest=m.largest)
    prefix = f"{kind}: " if len(measured) > 1 else ""
    findings += [f._replace(text=prefix + f.text) for f in found]
  ratio = update.matrices / baseline
  findings += stability.update_findings(ratio)
  notes = tuple(dict.fromkeys(note for profile in predicted.values() for note in profile.notes))
  return Diagnosis(
    name, measured, predicted, update, predicted_update, ratio, tuple(findings), notes
  )
