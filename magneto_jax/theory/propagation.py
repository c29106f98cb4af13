"""What a recipe will do before it is trained: its stream and its gradient, layer by layer.

`layers/residual.py` runs a recipe's records, `propagate` reads the same records and predicts, in
closed form, the mean over random weights of four numbers at every layer:

  variance               S = E x^2 of the residual sum, before a norm at the site post
  correlation            r = E x_i x_j / S of two tokens i, j of a sample
  gradient               g = E (dloss/dx)^2 with respect to the layer's output
  gradient_correlation   E g_i g_j / g

Sublayer by sublayer, with the moments (variance, covariance) of what it adds to the stream,

  S <- skip^2 S + branch^2 var,   C <- skip^2 C + branch^2 cov,   then post,
  g <- skip^2 g + branch^2 (the gradient through the branch),     backwards.

Assumptions: weights are independent, of zero mean, and wide (errors of order 1/D); tokens are
exchangeable (one correlation for all pairs); gradients are independent of the forward pass; scales
that are learned have their initial values. A prediction that is known to be bad comes with a note;
how good the others are stands in docs/theory.md.

References: Kedia et al., Transformers Get Stable, arXiv 2403.09635 (the moments); Noci et al.,
Signal Propagation in Transformers, arXiv 2206.03126 (rank collapse); DeepNet, arXiv 2203.00555, and
Foundation Transformers, arXiv 2210.06423 (the bounds of the first update).
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from magneto_jax.theory import moments, records
from magneto_jax.theory.moments import Gradient, Moments

UNIT_GRADIENT = Gradient(1.0, 0.0)

# The factor by which the stream's variance is known to err (benchmarks.prediction).
VARIANCE_BAND = 1.1

# Gradients' variances above it are not followed.
_OVERFLOW = 1e250
# Nor streams' above it, whose scores' variance, S^2, a gradient may be multiplied by.
_STREAM_OVERFLOW = 1e25


@dataclasses.dataclass(frozen=True)
class Setting:
  """What a prediction needs to know beside the record.

  Attributes:
    width: D; ffn_width: F; heads: N; kv_heads: K, N by default; head_dim: H, D / N by default.
    length: how many tokens a sample has.
    memory_length: how many the memory has, where there is cross-attention.
    is_causal: whether a token attends to itself and earlier ones only.
    reach: how many tokens a query sees at most (a window); None for all.
    activation: of the feed-forward network: a name in `moments.ACTIVATIONS`, or a record as there
      for any other function.
    use_bias: whether projections have biases.
    dropout, attention_dropout, activation_dropout, drop_path: rates, drop_path that of the last
      layer.
    epsilon: of the norms.
    rotation: the correlation that rotary positions leave of two tokens' keys (`rotation` below);
      1 without them.
    bias_variance: of relative position biases, between the keys of a query.
    soft_cap: of the attention logits; None for none.
  """

  width: int
  ffn_width: int
  heads: int
  length: int
  kv_heads: int | None = None
  head_dim: int | None = None
  memory_length: int | None = None
  is_causal: bool = False
  reach: int | None = None
  activation: str | moments.Activation = "gelu"
  use_bias: bool = True
  dropout: float = 0.0
  attention_dropout: float = 0.0
  activation_dropout: float = 0.0
  drop_path: float = 0.0
  epsilon: float = 1e-5
  rotation: float = 1.0
  bias_variance: float = 0.0
  soft_cap: float | None = None

  @property
  def query_features(self) -> int:
    return self.heads * (self.head_dim or self.width // self.heads)

  @property
  def kv_features(self) -> int:
    return (self.kv_heads or self.heads) * (self.head_dim or self.width // self.heads)


def rotation(length: int, head_dim: int, *, base: float = 10_000.0) -> float:
  """The mean over pairs of different positions, and over angles, of cos(angle * distance).

  The covariance of two rotated keys is that of the keys times this number.
  """
  if length < 2:
    return 1.0
  distances = np.arange(1, length)
  angles = base ** (-np.arange(0, head_dim, 2) / head_dim)
  cosines = np.cos(distances[:, None] * angles).mean(axis=1)
  return float(np.average(cosines, weights=length - distances))


class Profile(NamedTuple):
  """The four numbers at the stack's input (index 0) and after each of its L layers.

  Attributes:
    variance, correlation, gradient, gradient_correlation: arrays [L + 1].
    matrices: the expected squared norm of one sample's gradient with respect to all matrices.
    others: the same of biases and norms.
    memory_gradient: with respect to the memory; None without one.
    gradient_band: the factor by which the gradient's norm is known to err (benchmarks.prediction):
      1.3 without a causal mask. With one gradients gather on the first tokens, which a theory of
      exchangeable tokens misses: 2, and 5 for plain Post-LN.
    notes: what is not known, or known badly.
  """

  variance: np.ndarray
  correlation: np.ndarray
  gradient: np.ndarray
  gradient_correlation: np.ndarray
  matrices: float
  others: float
  memory_gradient: Gradient | None = None
  gradient_band: float = 1.0
  notes: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------
# One sublayer
# ---------------------------------------------------------------------------------------------


class _Back(NamedTuple):
  """The gradient on its way back through a part of a layer.

  Attributes:
    g: with respect to the part's input.
    memory: with respect to the memory; None where there is none.
    matrices: the expected squared norm of the gradient with respect to the part's matrices.
    others: the same of its biases and norms.
  """

  g: Gradient
  memory: Gradient | None
  matrices: float
  others: float


class _Branch(NamedTuple):
  """What f adds, and how the gradient of it comes back."""

  y: Moments
  backward: Callable[[Gradient], _Back]


def _plus(a: Gradient, b: Gradient) -> Gradient:
  return Gradient(a.variance + b.variance, a.covariance + b.covariance)


def _times(factor: float, g: Gradient) -> Gradient:
  return Gradient(factor * g.variance, factor * g.covariance)


def _scaled(x: Moments, factor: float) -> Moments:
  return Moments(factor * x.mean, factor**2 * x.variance, factor**2 * x.covariance)


def _norm(kind: str, x: Moments, setting: Setting) -> Moments:
  norm = {"layer_norm": moments.layer_norm, "rms_norm": moments.rms_norm}[kind]
  return norm(x, epsilon=setting.epsilon)


def _energy(size: int, x: Moments | None, g: Gradient, tokens: int) -> float:
  """E |dloss/dW|^2 = size sum_ij E x_i x_j E g_i g_j, over all pairs of tokens i, j.

  `size` counts W's elements; a bias has x = 1 (None).
  """
  alike, apart = (1.0, 1.0) if x is None else (x.second, x.second_covariance)
  return size * tokens * (alike * g.variance + (tokens - 1) * apart * g.covariance)


class _Norm(NamedTuple):
  """A norm that was met: LN divides by the deviation over features, RMSNorm by the root of the
  second moment, and both have a gain; LN has a bias too."""

  kind: str
  x: Moments
  features: int
  setting: Setting

  def backward(self, g: Gradient) -> tuple[Gradient, float]:
    """The gradient with respect to the input, and the energy of gain and bias."""
    tokens = self.setting.length
    energy = _energy(self.features, _norm(self.kind, self.x, self.setting), g, tokens)
    if self.kind == "layer_norm":
      energy += _energy(self.features, None, g, tokens)
    back = moments.norm_gradient(g, self.x, epsilon=self.setting.epsilon, norm=self.kind)
    return back, energy


def _weights(init: records.Init, fan_in: int, fan_out: int) -> float:
  return float(init.std(fan_in, fan_out)) ** 2


def _linear(
  init: records.Init, x: Moments, fan_in: int, fan_out: int, setting: Setting
) -> tuple[Moments, Callable[[Gradient], tuple[Gradient, float, float]]]:
  """y = W x + b, and the way back: the gradient, and the energies of W and of b."""
  weight_variance = _weights(init, fan_in, fan_out)
  bias_variance = float(init.bias_std(fan_in)) ** 2 if setting.use_bias else 0.0
  y = moments.linear(x, fan_in=fan_in, weight_variance=weight_variance, bias_variance=bias_variance)

  def backward(g: Gradient) -> tuple[Gradient, float, float]:
    matrix = _energy(fan_in * fan_out, x, g, setting.length)
    bias = _energy(fan_out, None, g, setting.length) if setting.use_bias else 0.0
    back = moments.linear_gradient(g, fan_out=fan_out, weight_variance=weight_variance)
    return back, matrix, bias

  return y, backward


def _feed_forward(sub: records.FeedForward, norm: str, x: Moments, setting: Setting) -> _Branch:
  """W_o mid(dropout(act(W_i x)))."""
  width, ffn_width = setting.width, setting.ffn_width
  h, back_wi = _linear(sub.wi, x, width, ffn_width, setting)
  a = moments.activation(setting.activation, h)
  dropped = moments.dropout(a, setting.activation_dropout)
  out = _norm(norm, dropped, setting) if "mid" in sub.norms else dropped
  y, back_wo = _linear(sub.wo, out, ffn_width, width, setting)

  def backward(g: Gradient) -> _Back:
    g, matrices, others = back_wo(g)
    if "mid" in sub.norms:
      g, gain = _Norm(norm, dropped, ffn_width, setting).backward(g)
      others += gain
    g = moments.dropout_gradient(g, setting.activation_dropout)
    # Of a gated activation this is the sum over its two matrices, and so are their energies.
    g = moments.activation_gradient(setting.activation, g, h)
    g, matrix, bias = back_wi(g)
    return _Back(g, None, matrices + matrix, others + bias)

  return _Branch(y, backward)


def _attention(
  sub: records.Attention, norm: str, x: Moments, setting: Setting, memory: Moments | None
) -> _Branch:
  """W_o mid(softmax(q k^T / sqrt(H)) v), of x with itself or with a memory."""
  width, is_cross = setting.width, memory is not None
  source = memory if is_cross else x
  # The memory's tokens are counted as its length.
  there = dataclasses.replace(setting, length=setting.memory_length) if is_cross else setting
  q_features, kv_features = setting.query_features, setting.kv_features
  q_raw, back_q = _linear(sub.qk, x, width, q_features, setting)
  k_raw, back_k = _linear(sub.qk, source, width, kv_features, there)
  v, back_v = _linear(sub.v, source, width, kv_features, there)
  q, k = (_norm(norm, m, setting) if sub.qk_norm else m for m in (q_raw, k_raw))
  scores = _positioned(moments.scores(q, k), setting, is_cross)
  keys = there.length if is_cross else min(setting.length, setting.reach or setting.length)
  mixing = {
    "keys": keys,
    "causal": setting.is_causal and not is_cross,
    "dropout": setting.attention_dropout,
    "width": width,
    "input_correlation": source.correlation,
    "form": "integral",
  }
  _note_scores(scores, mixing, setting)
  mixed = moments.attention_mixing(v, scores, **mixing)
  if mixing["causal"] and sub.norms & {"mid", "out"}:
    dropped = {"dropout": setting.attention_dropout, "form": "integral"}
    r = moments.causal_correlation(v, scores, keys=keys, **dropped)
    mixed = mixed._replace(covariance=r * mixed.variance)
  out = _norm(norm, mixed, setting) if "mid" in sub.norms else mixed
  y, back_out = _linear(sub.out, out, q_features, width, setting)
  # All query heads send a gradient to W_v's rows, each to those of its group.
  value_gain = q_features * _weights(sub.v, width, kv_features)
  q_gain, k_gain = (n * _weights(sub.qk, width, n) for n in (q_features, kv_features))

  def backward(g: Gradient) -> _Back:
    g, matrices, others = back_out(g)
    if "mid" in sub.norms:
      g, gain = _Norm(norm, mixed, q_features, setting).backward(g)
      others += gain
    if sub.head_scale:
      others += _energy(q_features, mixed, g, setting.length)
    queries = setting.length if is_cross else keys
    paths = moments.attention_mixing_gradient(g, scores, queries=queries, **mixing)
    value, query, key = (_times(value_gain * g.variance, path) for path in paths)
    # Scores' gradient is in units of the source; the queries' input has a variance of its own.
    query = _times(source.second / x.second, query) if x.second else query
    for path, gain, back in (
      (value, kv_features * value_gain / q_features, back_v),
      (query, q_gain, back_q),
      (key, k_gain, back_k),
    ):
      if gain:
        _, matrix, bias = back(_times(1 / gain, path))
        matrices, others = matrices + matrix, others + bias
    if is_cross:
      return _Back(query, _plus(value, key), matrices, others)
    return _Back(_plus(value, _plus(query, key)), None, matrices, others)

  return _Branch(y, backward)


def _note_scores(scores: moments.Scores, mixing: dict, setting: Setting) -> None:
  """Warns where attention is known to be predicted worse."""
  spread = (1 - scores.key_correlation) * scores.variance
  if mixing["keys"] > 1 and spread > 0.5 * math.log(mixing["keys"]):
    _warn("attention's scores have a variance at which the gradient is predicted badly")
  if mixing["causal"] and mixing["keys"] < setting.length:
    _warn("a causal window is predicted as a sample of its length: too much of its tokens alike")


def _warn(text: str) -> None:
  warnings.warn(text, moments.OutsideValidity, stacklevel=3)


def _positioned(scores: moments.Scores, setting: Setting, is_cross: bool) -> moments.Scores:
  """The scores with what positions and the soft cap do to them."""
  variance, key, query = scores
  if not is_cross:
    key, query = key * setting.rotation, query * setting.rotation
    total = variance + setting.bias_variance
    share = variance / total if total else 1.0
    variance, key, query = total, key * share, query * share
  if setting.soft_cap:
    cap = setting.soft_cap
    capped = moments.quadrature(lambda s: cap * np.tanh(s / cap), Moments(0.0, variance, 0.0))
    variance = float(capped.second)
  return moments.Scores(variance, key, query)


# ---------------------------------------------------------------------------------------------
# A stack
# ---------------------------------------------------------------------------------------------


class _Step(NamedTuple):
  """A sublayer of the running stack: the new stream, its sum before the site post, and back."""

  stream: Moments
  total: Moments
  backward: Callable[[Gradient], _Back]


def _step(
  name: str,
  sub: records.Sublayer,
  norm: str,
  x: Moments,
  setting: Setting,
  memory: Moments | None,
  drop_path: float,
) -> _Step:
  """The residual rule on moments; see `layers.residual`."""
  in_scale, skip, branch = (float(s.value) for s in (sub.in_scale, sub.skip, sub.branch))
  normed = _norm(norm, x, setting) if "in" in sub.norms else x
  h = _scaled(normed, in_scale)
  if name == "ffn":
    f = _feed_forward(sub, norm, h, setting)
  else:
    f = _attention(sub, norm, h, setting, memory if name == "cross_attention" else None)
  y = _norm(norm, f.y, setting) if "out" in sub.norms else f.y
  y = moments.dropout(y, setting.dropout)
  # Whole samples are dropped: tokens of one sample together.
  kept = 1 / (1 - drop_path) if drop_path < 1 else 0.0
  y = Moments(0.0, kept * y.variance, kept * y.covariance)
  total = moments.residual(x, y, skip=skip, branch=branch)
  stream = _norm(norm, total, setting) if "post" in sub.norms else total

  def backward(g: Gradient) -> _Back:
    others = 0.0

    def through(site: str, g: Gradient, x: Moments) -> Gradient:
      nonlocal others
      if site not in sub.norms:
        return g
      g, energy = _Norm(norm, x, setting.width, setting).backward(g)
      others += energy
      return g

    g = through("post", g, total)
    into = moments.dropout_gradient(_times(kept * branch**2, g), setting.dropout)
    back = f.backward(through("out", into, f.y))
    for scale, scaled, arriving in (
      (sub.skip, x, g),
      (sub.branch, y, g),
      (sub.in_scale, normed, back.g),
    ):
      if scale.learned:
        others += _energy(setting.width, scaled, arriving, setting.length)
    into = through("in", _times(in_scale**2, back.g), x)
    return back._replace(g=_plus(_times(skip**2, g), into), others=back.others + others)

  return _Step(stream, total, backward)


def propagate(
  stack: records.Stack,
  setting: Setting,
  start: Moments,
  *,
  memory: Moments | None = None,
  top: Gradient = UNIT_GRADIENT,
) -> Profile:
  """The profile of a stack.

  Args:
    stack: its record.
    setting: sizes, rates and positions.
    start: the moments of the stack's input (with its norm and dropout); `start_of` predicts them.
    memory: those of what cross-attention attends to.
    top: the gradient with respect to the last layer's output, before the final norm.
  """
  if not np.all(np.isfinite([*start, *top])):
    raise ValueError(f"{start=} and {top=} must be finite")
  layers = stack.layers
  rates = np.linspace(0.0, setting.drop_path, len(layers))
  x, totals, backwards = start, [start], []
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", moments.OutsideValidity)
    for layer, rate in zip(layers, rates, strict=True):
      steps = []
      if not x.variance < _STREAM_OVERFLOW:
        totals.append(Moments(0.0, math.inf, math.nan))
        backwards.append(None)
        continue
      for name, sub in layer.sublayers.items():
        step = _step(name, sub, stack.norm, x, setting, memory, float(rate))
        x = step.stream
        steps.append(step.backward)
      totals.append(step.total)
      backwards.append(steps)
    notes = list(dict.fromkeys(str(warning.message) for warning in caught))
    gradients, to_memory, matrices, others = [top], Gradient(0.0, 0.0), 0.0, 0.0
    for steps in reversed(backwards):
      g = gradients[-1] if steps else Gradient(math.nan, math.nan)
      for backward in reversed(steps or ()):
        if not g.variance < _OVERFLOW:
          g = Gradient(g.variance if math.isnan(g.variance) else math.inf, math.nan)
          break
        g, part, matrix, other = backward(g)
        to_memory = to_memory if part is None else _plus(to_memory, part)
        matrices, others = matrices + matrix, others + other
      gradients.append(g)
  gradients.reverse()
  if not all(backwards):
    notes.append("the stream overflows: it is infinite above some layer, the gradient not known")
    matrices = others = math.nan
  elif not gradients[0].variance < _OVERFLOW:
    notes.append("the gradient overflows: it is infinite below some layer")
    matrices = others = math.inf
  band = _gradient_band(layers[-1], setting)
  if band > 2:
    notes.append("gradients of causal Post-LN gather on the first tokens, which is not predicted")
  ratio = lambda a, b: a / b if b else math.nan
  return Profile(
    variance=np.array([m.second for m in totals]),
    correlation=np.array([ratio(m.second_covariance, m.second) for m in totals]),
    gradient=np.array([g.variance for g in gradients]),
    gradient_correlation=np.array([ratio(g.covariance, g.variance) for g in gradients]),
    matrices=matrices,
    others=others,
    memory_gradient=None if memory is None else to_memory,
    gradient_band=band,
    notes=tuple(notes),
  )


def _gradient_band(layer: records.Layer, setting: Setting) -> float:
  if not setting.is_causal:
    return 1.3
  sublayers = layer.sublayers.values()
  is_plain = all("post" in sub.norms and sub.skip.value == sub.branch.value for sub in sublayers)
  return 5.0 if is_plain else 2.0


# ---------------------------------------------------------------------------------------------
# A recipe
# ---------------------------------------------------------------------------------------------


def start_of(
  stack: records.Stack,
  setting: Setting,
  correlation: float,
  *,
  position_variance: float = 0.0,
) -> Moments:
  """The moments of the stack's input: tokens and positions, normed, dropped.

  Args:
    stack: its record, whose embedding is read.
    setting: for the norm and the dropout.
    correlation: of two tokens' sums of embeddings.
    position_variance: of the positions that are added: 1/2 for sinusoidal ones, the table's for
      learned ones.
  """
  embedding = stack.embedding
  variance = (embedding.tokens.std(1, 1) * embedding.scale) ** 2 + position_variance
  x = Moments(0.0, variance, correlation * variance)
  if embedding.norm:
    x = _norm(stack.norm, x, setting)
  return moments.dropout(x, setting.dropout)


def output_of(stack: records.Stack, setting: Setting, profile: Profile) -> Moments:
  """The moments of what the stack returns, after its last norm."""
  variance = float(profile.variance[-1])
  x = Moments(0.0, variance, float(profile.correlation[-1]) * variance)
  has_post = "post" in list(stack.segments[-1].pattern[-1].sublayers.values())[-1].norms
  for applies in (has_post, stack.final_norm):
    x = _norm(stack.norm, x, setting) if applies else x
  return x


def parts_of(
  recipe: records.Recipe, architecture: records.Architecture, *, length: int = 256, **options
) -> tuple[dict[str, tuple[records.Stack, Setting]], dict[str, Moments]]:
  """The arguments of `propagate_all` and of `first_update`, from the architecture alone.

  Args:
    recipe: what the recipe's function returned for the architecture.
    architecture: its sizes, its dropout and its tokens' correlation.
    length: tokens a sample, of the source too.
    **options: other fields of `Setting`.
  """
  setting = Setting(
    width=architecture.width,
    ffn_width=architecture.ffn_width,
    heads=architecture.heads,
    length=length,
    dropout=architecture.dropout,
    **options,
  )
  stacks = {"encoder": recipe.encoder, "decoder": recipe.decoder}
  parts = {
    kind: (stack, dataclasses.replace(setting, is_causal=kind == "decoder"))
    for kind, stack in stacks.items()
    if stack is not None
  }
  starts = {}
  for kind, (stack, own) in parts.items():
    # A second table is that of learned positions.
    tables = architecture.embedding_tables - 1
    positions = tables * float(stack.embedding.positions.std(1, 1)) ** 2
    r0 = architecture.token_correlation
    starts[kind] = start_of(stack, own, r0, position_variance=positions)
  return parts, starts


def predict(
  recipe: records.Recipe, architecture: records.Architecture, **options
) -> dict[str, Profile]:
  """The profiles of a recipe's stacks, from the architecture alone; see `parts_of`.

  Returns:
    {"encoder": ..., "decoder": ...}, those there are. Gradients are in units of the one with
    respect to the last layer's output: the decoder's, where there is one.
  """
  return propagate_all(*parts_of(recipe, architecture, **options))


def propagate_all(
  parts: dict[str, tuple[records.Stack, Setting]],
  starts: dict[str, Moments],
  top: Gradient = UNIT_GRADIENT,
) -> dict[str, Profile]:
  """The profiles of an encoder, of a decoder, or of both, joined by cross-attention.

  Args:
    parts: the record and the setting of `encoder`, `decoder` or both.
    starts: the moments of their inputs.
    top: the gradient with respect to the last layer's output of the last of them.
  """
  if len(parts) == 1:
    ((kind, (stack, setting)),) = parts.items()
    return {kind: propagate(stack, setting, starts[kind], top=top)}
  encoder, encoder_setting = parts["encoder"]
  decoder, decoder_setting = parts["decoder"]
  forward = propagate(encoder, encoder_setting, starts["encoder"])
  memory = output_of(encoder, encoder_setting, forward)
  decoder_setting = dataclasses.replace(decoder_setting, memory_length=encoder_setting.length)
  profile = propagate(decoder, decoder_setting, starts["decoder"], memory=memory, top=top)
  into = profile.memory_gradient
  if encoder.final_norm:
    last = float(forward.variance[-1])
    x = Moments(0.0, last, float(forward.correlation[-1]) * last)
    into, _ = _Norm(encoder.norm, x, encoder_setting.width, encoder_setting).backward(into)
  backward = propagate(encoder, encoder_setting, starts["encoder"], top=into)
  return {"encoder": backward, "decoder": profile}


# ---------------------------------------------------------------------------------------------
# The first update
# ---------------------------------------------------------------------------------------------


class Update(NamedTuple):
  """The root mean square change of the output over the learning rate, after a step of SGD.

  Attributes:
    matrices: if the layers' matrices move alone, as in the papers' theorems.
    everything: if their biases and norms move too.
  """

  matrices: float
  everything: float


def first_update(
  parts: dict[str, tuple[records.Stack, Setting]],
  starts: dict[str, Moments],
  top: Gradient | None = None,
) -> Update:
  """The first update that the moments predict, of one sample, as the learning rate goes to 0.

  To first order the output at token t moves by -eta sum_s K_ts g_s, with g the gradient with
  respect to the last layer's output and K = sum_l J_l J_l^T the tangent kernel, which for wide
  layers is a number for t = s and another for t != s. The loss's gradient with respect to all
  weights has the squared norm g^T K g, which `propagate` predicts for any correlation of g: 0 and 1
  give the two numbers. A final norm divides the change by the stream's deviation.

  Weights' fluctuations, of order depth over width, are left out: of deep Post-LN stacks single
  draws lie far above it (their gradients are heavy-tailed).

  Args:
    parts, starts: of `propagate_all`.
    top: the loss's gradient with respect to the last layer's output; by default the one that has
      unit variance and no correlation behind the final norm.

  Reference: Jacot et al., Neural Tangent Kernel, arXiv 1806.07572.
  """
  last_stack, last = list(parts.values())[-1]
  tokens, count = last.length, last.length * last.width
  apart, alike = (propagate_all(parts, starts, Gradient(1.0, rho)) for rho in (0.0, 1.0))
  scale = 1.0
  if last_stack.final_norm:
    scale = 1 / (float(list(apart.values())[-1].variance[-1]) + last.epsilon)
  # A final norm divides the gradient on its way back, too.
  top = Gradient(scale, 0.0) if top is None else top
  rho = top.correlation

  def change(energy: Callable[[Profile], float]) -> float:
    zero, one = (sum(map(energy, profiles.values())) / count for profiles in (apart, alike))
    own, other = zero, (one - zero) / max(tokens - 1, 1)
    if not math.isfinite(own + other):
      return math.inf
    variance = own**2 + (tokens - 1) * other * (other + rho * (2 * own + (tokens - 2) * other))
    return math.sqrt(max(top.variance * variance * scale, 0.0))

  return Update(change(lambda p: p.matrices), change(lambda p: p.matrices + p.others))


class Bound(NamedTuple):
  """A paper's bound of the first update, up to a constant; NaN with the reason without one."""

  value: float
  reason: str = ""


def update_bound(recipe: records.Recipe, architecture: records.Architecture) -> Bound:
  """How |F(x, theta - eta grad) - F(x, theta)| / eta grows with depth under SGD, up to a constant.

  v_l and w_l are the scales of the second and the first matrix of sublayer l (out and value, wo
  and wi) in units of Xavier's deviation; sums run over sublayers.

    | norms   | bound                                                   | with                    |
    |---------|---------------------------------------------------------|-------------------------|
    | post    | sum_l (v_l^2 + w_l^2) / alpha_l^2                       |                         |
    | in      | sum_l (v_l^2 + w_l^2) / S_n (1 + sum_k a_k / S_{k-1})   | a = v^2 w^2             |
    | in, mid | sum_l (1 + v_l^2 / w_l^2) / S_n (1 + sum_k a_k / S_{k-1}) | a = v^2               |

  where S_k is the sum of a up to sublayer k, of n in all.
  In an encoder-decoder the encoder's bound is added, times what cross-attention lets through:
  sum_j v_j w_j / alpha_j (post), or sum_j a_j / S_n (1 + sum_k a_k / S_{k-1}) (in), over the
  cross-attentions j.

  Reference: DeepNet, arXiv 2203.00555, theorems 4.2 and 4.3; Foundation Transformers, arXiv
  2210.06423, theorems of section 2.4 and appendix A.
  """
  bounds = {}
  for kind, stack in (("encoder", recipe.encoder), ("decoder", recipe.decoder)):
    if stack is not None:
      bounds[kind] = _stack_bound(stack, architecture)
      if math.isnan(bounds[kind][0].value):
        return bounds[kind][0]
  (last, through) = bounds.get("decoder", bounds.get("encoder"))
  if len(bounds) == 1:
    return last
  return Bound(last.value + through * bounds["encoder"][0].value)


def _stack_bound(stack: records.Stack, architecture: records.Architecture) -> tuple[Bound, float]:
  """A stack's bound, and what its cross-attention lets through."""
  subs = [pair for layer in stack.layers for pair in layer.sublayers.items()]
  placements = {sub.norms & {"in", "post", "out"} for _, sub in subs}
  if any(sub.skip.learned or sub.branch.learned or sub.in_scale.learned for _, sub in subs):
    return Bound(math.nan, "no paper bounds the update with learned scales"), math.nan
  if any(np.any(np.asarray(s.value) != 1) for _, sub in subs for s in (sub.branch, sub.in_scale)):
    return Bound(math.nan, "no paper bounds the update with scaled branches"), math.nan
  if placements not in ({frozenset({"in"})}, {frozenset({"post"})}):
    return Bound(math.nan, "no paper bounds the update with these norms"), math.nan
  is_post = placements == {frozenset({"post"})}
  skips = np.array([float(sub.skip.value) for _, sub in subs])
  if not is_post and np.any(skips != 1.0):
    return Bound(math.nan, "no paper bounds the update of a scaled skip without a norm"), math.nan
  scales = np.array([_scales(sub, architecture) for _, sub in subs])
  v, w = scales.T
  crosses = np.array([name == "cross_attention" for name, _ in subs])
  if is_post:
    bound = np.sum((v**2 + w**2) / skips**2)
    return Bound(float(bound)), float(np.sum((v * w / skips)[crosses]))
  has_mid = np.array(["mid" in sub.norms for _, sub in subs])
  # With the norm before it, the output's size no longer depends on the first matrix.
  added = np.where(has_mid, v**2, v**2 * w**2)
  moved = np.where(has_mid, 1 + v**2 / w**2, v**2 + w**2)
  total = np.sum(added)
  later = 1 + np.sum(added[1:] / np.cumsum(added)[:-1])
  return Bound(float(np.sum(moved) / total * later)), float(np.sum(added[crosses]) / total * later)


def _scales(sub: records.Sublayer, architecture: records.Architecture) -> tuple[float, float]:
  """(v, w) of a sublayer in units of Xavier's deviation."""
  width, ffn_width = architecture.width, architecture.ffn_width
  if isinstance(sub, records.FeedForward):
    second, first, fans = sub.wo, sub.wi, (width, ffn_width)
  else:
    second, first, fans = sub.out, sub.v, (width, width)
  xavier = math.sqrt(2 / sum(fans))
  return float(second.std(*fans[::-1])) / xavier, float(first.std(*fans)) / xavier
