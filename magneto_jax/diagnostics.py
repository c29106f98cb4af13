"""A model at its start, measured beside what the theory says of its recipe.

`measurer` takes the statistics of `layers.probes` from a forward and a backward pass of the real
model; `predict` gives the same numbers from `theory.propagation`.
"""

import dataclasses
import math
import pathlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from magneto_jax import kernels, reporting, sharding
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
  parts = list(_stacks(model, ()))
  is_decoder = lambda part: part.is_causal or part.path[-1:] == ("decoder",)
  named = {"decoder" if is_decoder(part) else "encoder": part for part in parts}
  if not parts or len(named) < len(parts):
    raise TypeError(
      f"{type(model).__name__} has no stack of layers that can be measured: give a model of"
      " magneto_jax.models, or a module that holds one"
    )
  return {kind: named[kind] for kind in ("encoder", "decoder") if kind in named}


def _stacks(model: nn.Module, path: tuple[str, ...]) -> Iterator[Part]:
  """The module, if it is a stack, or those in its fields."""
  if isinstance(model, Backbone):
    yield Part(path, model)
    return
  for name in (f.name for f in dataclasses.fields(model) if f.name != "parent"):
    if isinstance(inner := getattr(model, name, None), nn.Module):
      yield from _stacks(inner, (*path, name))


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


# Of a model that reads its parameters alone.
_NONE: Mapping[str, Any] = types.MappingProxyType({})


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

  def without_targets(self) -> "Call":
    """The call whose output is what is scored, logits, and not already the targets' nats."""
    kwargs = {n: value for n, value in self.kwargs.items() if not n.startswith("targets")}
    return self._replace(kwargs=kwargs)


def statistics(model: nn.Module, params, call: Call, others: Mapping[str, Any] = _NONE):
  """(stream, gradient): the two collections of `layers.probes`; pure, to be jitted.

  `others` are the collections that the model reads beside its parameters.
  """
  given = {**others, "params": params}
  shapes = jax.eval_shape(
    lambda: call.apply(model, given, mutable=[probes.GRADIENT])[1][probes.GRADIENT]
  )
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

  def objective(zeros):
    output, taken = call.apply(model, {**given, probes.GRADIENT: zeros}, mutable=[probes.STREAM])
    return call.loss(output), taken[probes.STREAM]

  gradient, stream = jax.grad(objective, has_aux=True)(zeros)
  return stream, gradient


def measurer(
  model: nn.Module, calls: Callable[[Any, jax.Array], Call], batch, key: jax.Array
) -> Callable[[Any], tuple[dict[str, Measured], propagation.Update]]:
  """`variables -> (figures of each stack, first update)`, compiled once; arguments: `examine`'s."""

  def of(variables, batch):
    others = {name: tree for name, tree in variables.items() if name != "params"}
    return {"params": variables["params"], "call": calls(batch, key), "others": others}

  @jax.jit
  def observe(variables, batch):
    return sharding.replicate(statistics(model, **of(variables, batch)))

  @jax.jit
  def move(variables, batch):
    return sharding.replicate(first_update(model, **of(variables, batch)))

  first = jax.tree.map(lambda leaf: leaf[:1], batch)

  def measure(variables):
    update = propagation.Update(*map(float, move(variables, first)))
    return profiles_of(model, *observe(variables, batch)), update

  return measure


def calls_of(task, model: nn.Module) -> Callable[[Any, jax.Array], Call]:
  """How a task calls its model on what it has `observed` of a batch, for `examine`."""

  def call(batch, rng: jax.Array) -> Call:
    batch = task.weigh(model, task.observed(batch))

    def mean_loss(output):
      loss_sum, weight_sum = task.score(output, batch)
      return loss_sum / weight_sum

    return Call(*task.inputs(batch), mean_loss, rng)

  return call


# So many tokens suffice: the mean over them is within a per cent.
_TOKENS = 1024


def first_samples(data, rows: int, length: int) -> dict[str, np.ndarray]:
  """The first training samples as a batch: some thousand tokens, at most `rows` of `length`.

  `data` are a task's. What is drawn anew each time that a sample is read is a function of the
  sample's index here.

  Raises:
    ValueError: there is none.
  """
  dataset = data.train
  if not len(dataset):
    raise ValueError(f"the training set has no sample of {length} tokens: give more text")
  rows = min(rows, max(1, _TOKENS // length), len(dataset))
  samples = [dataset[i] for i in range(rows)]
  if data.augment is not None:
    samples = [data.augment(x, np.random.default_rng(i)) for i, x in enumerate(samples)]
  return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def is_matrix(path: tuple) -> bool:
  """Whether a parameter is a matrix of a layer: what the papers' bounds of the update move."""
  return is_of_a_layer(path) and path[-1].key == "kernel"


def is_of_a_layer(path: tuple) -> bool:
  """Whether a parameter is of a layer: its matrices, norms, scales and biases."""
  return any(key.key.startswith("segment_") for key in path)


def first_update(
  model: nn.Module,
  params,
  call: Call,
  on: Call | None = None,
  others: Mapping[str, Any] = _NONE,
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
    others: the collections that the model reads beside its parameters.
  """
  given = lambda params: {**others, "params": params}
  gradient = jax.grad(lambda params: call.loss(call.apply(model, given(params))))(params)
  output = call.without_targets()
  read = lambda params: output.apply(model, given(params))
  if on is not None:
    read = lambda params: on.loss(on.apply(model, given(params)))

  # Both steps at once: the pass through the model is the same.
  steps = jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.stack([leaf * is_matrix(path), leaf * is_of_a_layer(path)]), gradient
  )
  # In forward mode, of all implementations of attention, `xla` alone is differentiable.
  with kernels.use_implementation("xla"):
    changes = jax.vmap(lambda step: jax.jvp(read, (params,), (step,))[1])(steps)
  leaves = [leaf.reshape(2, -1).astype(jnp.float32) for leaf in jax.tree.leaves(changes)]
  moved = jnp.sqrt(jnp.mean(jnp.square(jnp.concatenate(leaves, axis=1)), axis=1))
  return propagation.Update(moved[0], moved[1])


def input_correlation(model: nn.Module, *args, seed: int = 0, **kwargs) -> dict[str, float]:
  """The correlation of two tokens at each stack's input, before its dropout, of a real batch.

  What `Architecture.token_correlation` wants where it does not follow from token frequencies, as
  for images and audio. It depends on the front end and the data, not on the recipe of the layers.

  Args:
    model: with any recipe.
    *args, **kwargs: of the model's call.
    seed: of the parameters.

  Returns:
    {"encoder": ..., "decoder": ...}, those there are.
  """

  @jax.jit
  def stream(args):
    variables = model.init(jax.random.key(seed), *args, **kwargs)
    return model.apply(variables, *args, mutable=[probes.STREAM], **kwargs)[1][probes.STREAM]

  rows = {kind: part.of(stream(args))["input"] for kind, part in parts_of(model).items()}
  return {kind: float(row[1] / row[0]) for kind, row in rows.items()}


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
  model: nn.Module, measured: Mapping[str, Measured], samples: int = 1
) -> tuple[dict[str, propagation.Profile], propagation.Update]:
  """What the theory says of the measured model, given its measured input and top gradient.

  Of an encoder and a decoder that no cross-attention joins, given both of each; of the update of
  such a model nothing.

  Args:
    model: that was measured.
    measured: of each stack.
    samples: of the measured batch. The update is that of one sample, whose own mean loss has
      `samples` times the gradient that the sample has in the batch's.
  """
  parts = {
    kind: (part.backbone.recipe, setting_of(part, measured[kind].tokens))
    for kind, part in parts_of(model).items()
  }
  starts = {
    kind: Moments(0.0, *_moments(m.variance[0], m.correlation[0])) for kind, m in measured.items()
  }
  tops = {
    kind: Gradient(*_moments(m.gradient[-1], m.gradient_correlation[-1]))
    for kind, m in measured.items()
  }
  top = list(tops.values())[-1]
  if not np.all(np.isfinite([*top, *(value for start in starts.values() for value in start)])):
    unknown = {kind: _unknown(m) for kind, m in measured.items()}
    return unknown, propagation.Update(math.nan, math.nan)
  if len(parts) > 1 and not records.has_cross_attention(parts["decoder"][0]):
    # What joins them is nothing that the theory knows: each from its own ends.
    alone = lambda kind: propagation.propagate(*parts[kind], starts[kind], top=tops[kind])
    return {kind: alone(kind) for kind in parts}, propagation.Update(math.nan, math.nan)
  own = Gradient(samples**2 * top.variance, samples**2 * top.covariance)
  update = propagation.first_update(parts, starts, own)
  readout = _readout(list(parts_of(model).values())[-1])
  return propagation.propagate_all(parts, starts, top), propagation.Update(
    *(readout * change for change in update)
  )


def _readout(part: Part) -> float:
  """How large a change of a language model's logits is, over that of its last layer's output."""
  table = part.backbone.recipe.embedding.tokens
  return float(table.std(1, 1)) * math.sqrt(part.backbone.width) if part.is_causal else 1.0


def _moments(variance: float, correlation: float) -> tuple[float, float]:
  """(variance, covariance); what is zero has none, and rounding makes no correlation above 1."""
  variance, correlation = float(variance), float(correlation)
  if variance == 0:
    return 0.0, 0.0
  if math.isfinite(correlation):
    correlation = min(max(correlation, -1.0), 1.0)
  return variance, variance * correlation


def _unknown(measured: Measured) -> propagation.Profile:
  """The profile where the measured input or top gradient is not finite."""
  nothing = np.full_like(measured.variance, math.nan)
  note = "nothing is predicted: the measured input, or the last layer's gradient, is not finite"
  return propagation.Profile(*[nothing] * 4, math.nan, math.nan, notes=(note,))


# ---------------------------------------------------------------------------------------------
# Diagnosis
# ---------------------------------------------------------------------------------------------


class Diagnosis(NamedTuple):
  """A model at its start: what was measured, what was predicted, what it means.

  Attributes:
    name: of the recipe, or whatever the caller calls it.
    measured, predicted: of each stack, by `encoder` and `decoder`.
    update, predicted_update: the first update, measured and predicted.
    update_ratio, predicted_update_ratio: that of the matrices over the baseline's; NaN without one.
    findings: about the measured figures, with the stack's name where there are two.
    notes: of the prediction: where it is known to be worse.
  """

  name: str
  measured: dict[str, Measured]
  predicted: dict[str, propagation.Profile]
  update: propagation.Update
  predicted_update: propagation.Update
  update_ratio: float
  predicted_update_ratio: float
  findings: tuple[stability.Finding, ...]
  notes: tuple[str, ...]

  def as_json(self) -> dict[str, Any]:
    """The diagnosis as JSON-able values; what is not finite is None."""
    arrays = lambda record: {k: v for k, v in record._asdict().items() if isinstance(v, np.ndarray)}
    stacks = {
      kind: {"measured": arrays(m), "predicted": arrays(self.predicted[kind])}
      for kind, m in self.measured.items()
    }
    update = {
      "measured": self.update._asdict(),
      "predicted": self.predicted_update._asdict(),
      "matrices_over_baseline": self.update_ratio,
      "predicted_matrices_over_baseline": self.predicted_update_ratio,
    }
    findings = [finding._asdict() for finding in self.findings]
    named = {"recipe": self.name, "stacks": stacks, "first_update": update}
    return jsonable({**named, "findings": findings, "notes": list(self.notes)})


def jsonable(value):
  """Arrays as lists, and None for what is not finite."""
  if isinstance(value, dict):
    return {name: jsonable(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [jsonable(item) for item in value]
  if isinstance(value, np.ndarray):
    return jsonable(value.tolist())
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  return value


def diagnose(
  model: nn.Module,
  *args,
  name: str = "model",
  loss: Callable[[Any], jax.Array] | None = None,
  seed: int = 0,
  baseline: Diagnosis | None = None,
  **kwargs,
) -> Diagnosis:
  """Draws a model's parameters, measures it on a batch, and says what the figures mean.

  Args:
    model: any model of `magneto_jax.models`. With `remat="full"` memory hardly grows with depth.
    *args: of the model's call: a real batch, rows of equal length without padding.
    name: how the diagnosis is called.
    loss: `output -> number`; by default a random projection of the output.
    seed: of the parameters, the dropout and the random projection.
    baseline: of Pre-LN with 6 layers of the same sizes; without it nothing is said about the
      update's size.
    **kwargs: of the model's call.

  Example:
    >>> model = magneto_jax.CausalLM(recipe=recipe, ..., remat="full")
    >>> print(diagnostics.diagnose(model, tokens_BT).findings)
  """
  is_array = lambda value: hasattr(value, "shape")
  static = {key: value for key, value in kwargs.items() if not is_array(value)}
  arrays = {key: value for key, value in kwargs.items() if is_array(value)}
  noise_key = jax.random.fold_in(jax.random.key(seed), 2)
  loss = random_projection(noise_key) if loss is None else loss
  calls = lambda batch, rng: Call(batch[0], {**batch[1], **static}, loss, rng)
  return examine(model, calls, (args, arrays), name=name, seed=seed, baseline=baseline)


def examine(
  model: nn.Module,
  calls: Callable[[Any, jax.Array], Call],
  batch,
  *,
  name: str,
  seed: int = 0,
  baseline: Diagnosis | None = None,
) -> Diagnosis:
  """`diagnose` for calls of any kind.

  Args:
    model: see `diagnose`.
    calls: `(batch, key of the dropout) -> Call`.
    batch: a tree of arrays [B, ...]; the first update is that of its first sample.
    name, seed, baseline: see `diagnose`.
  """
  init_key, dropout_key = (jax.random.fold_in(jax.random.key(seed), i) for i in range(2))

  def init(batch):
    call = calls(batch, dropout_key)
    return model.init(init_key, *call.args, **call.kwargs)

  measured, update = measurer(model, calls, batch, dropout_key)(jax.jit(init)(batch))
  samples = max(leaf.shape[0] for leaf in jax.tree.leaves(batch))
  predicted, predicted_update = predict(model, measured, samples)
  ratio = predicted_ratio = math.nan
  if baseline is not None:
    ratio = update.matrices / baseline.update.matrices
    predicted_ratio = predicted_update.matrices / baseline.predicted_update.matrices
  findings = findings_of(measured) + tuple(stability.update_findings(ratio))
  notes = [note for profile in predicted.values() for note in profile.notes]
  segments = calls(batch, dropout_key).kwargs.get("segment_ids_BT")
  if segments is not None and np.any(np.asarray(segments) != np.asarray(segments)[:, :1]):
    notes.append("samples hold several documents, and are predicted as if they were one")
  notes = tuple(dict.fromkeys(notes))
  return Diagnosis(
    name,
    measured,
    predicted,
    update,
    predicted_update,
    ratio,
    predicted_ratio,
    findings,
    notes,
  )


def findings_of(measured: Mapping[str, Measured]) -> tuple[stability.Finding, ...]:
  """What the figures of the stacks mean, the update left out."""
  findings = []
  for kind, m in measured.items():
    found = stability.judge(gradient=m.gradient, correlation=m.correlation, largest=m.largest)
    prefix = f"{kind}: " if len(measured) > 1 else ""
    findings += [f._replace(text=prefix + f.text) for f in found]
  return tuple(findings)


def draw(
  diagnoses: Sequence[Diagnosis], path: str | pathlib.Path, *, title: str = ""
) -> pathlib.Path:
  """Draws stream, correlation and gradient by layer, and the first update, into a picture."""
  panels = []
  for kind in diagnoses[0].measured:
    pairs = {d.name: (d.measured[kind], d.predicted[kind]) for d in diagnoses}
    panels += _panels(kind, pairs, alone=len(diagnoses[0].measured) == 1)
  ratios = {d.name: (d.update_ratio, d.predicted_update_ratio) for d in diagnoses}
  bars = reporting.Bars("first update by SGD", "over that of Pre-LN with 6 layers", ratios)
  if not all(math.isfinite(measured) for measured, _ in ratios.values()):
    updates = {d.name: (d.update.matrices, d.predicted_update.matrices) for d in diagnoses}
    bars = reporting.Bars("first update by SGD", "change of the output / learning rate", updates)
  return reporting.draw_by_layer(pathlib.Path(path), panels, bars, title=title)


def draw_run(
  measured: Mapping[str, Mapping[str, Measured]],
  predicted: Mapping[str, propagation.Profile],
  path: pathlib.Path,
  *,
  title: str,
) -> pathlib.Path:
  """Draws measurements of one model at several times; a prediction is of the first."""
  first, panels = next(iter(measured)), []
  for kind in measured[first]:
    pairs = {
      name: (stacks[kind], predicted.get(kind) if name == first else None)
      for name, stacks in measured.items()
    }
    panels += _panels(kind, pairs, alone=len(measured[first]) == 1)
  return reporting.draw_by_layer(path, panels, title=title)


def _panels(
  kind: str,
  pairs: Mapping[str, tuple[Measured, propagation.Profile | None]],
  *,
  alone: bool,
) -> list[reporting.Panel]:
  """A panel for each quantity of one stack."""
  prefix = "" if alone else f"{kind}: "

  # The input and the last layer's gradient are given: errors gather on the way from there.
  way = np.linspace(0, 1, len(next(iter(pairs.values()))[0].variance))

  def panel(title: str, label: str, read, band=lambda profile: 1.0, *, log: bool = True):
    curves = {
      name: reporting.Curve(read(m), None if p is None else read(p), 1.0 if p is None else band(p))
      for name, (m, p) in pairs.items()
    }
    return reporting.Panel(prefix + title, label, curves, log)

  norm = lambda profile: np.sqrt(profile.gradient / profile.gradient[-1])
  return [
    panel(
      "stream",
      "variance, before a norm behind the sum",
      lambda p: p.variance,
      lambda p: propagation.VARIANCE_BAND**way,
    ),
    panel("tokens", "correlation of two tokens", lambda p: p.correlation, log=False),
    panel("gradient", "norm, over the last layer's", norm, lambda p: p.gradient_band ** way[::-1]),
  ]
