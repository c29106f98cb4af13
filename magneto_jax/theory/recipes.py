"""The named recipes: one function `Architecture -> Recipe` a paper, in the table RECIPES.

What the records say, and the residual rule that reads them: see `theory/records.py`.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable

from magneto_jax.theory import moments
from magneto_jax.theory.records import (
  Architecture,
  Attention,
  Embedding,
  FeedForward,
  Init,
  Layer,
  Recipe,
  Scale,
  Segment,
  Stack,
)

PRE = frozenset({"in"})
POST = frozenset({"post"})
SUB_LN = frozenset({"in", "mid"})


def _embedding(architecture: Architecture) -> Embedding:
  """Tables of N(0, 1/D) with tokens scaled by sqrt(D): unit variance into the stack.

  Patches are projected by a Xavier kernel: of order one for pixels of unit variance.
  """
  table = Init("normal", gain=architecture.width**-0.5)
  return Embedding(
    table,
    positions=table,
    relative=table,
    patches=Init(),
    scale=math.sqrt(architecture.width),
  )


def _recipe(name: str, architecture: Architecture, layer, *, final_norm: bool) -> Recipe:
  """Fills each stack the architecture has from `layer(stack's name) -> Layer`."""

  def stack(kind: str, depth: int) -> Stack | None:
    if depth == 0:
      return None
    return Stack(
      (Segment((layer(kind),), depth),),
      _embedding(architecture),
      final_norm,
      width=architecture.width,
    )

  return Recipe(
    name,
    encoder=stack("encoder", architecture.encoder_layers),
    decoder=stack("decoder", architecture.decoder_layers),
  )


def _with(recipe: Recipe, **fields) -> Recipe:
  """The recipe with these fields in each of its stacks."""
  stacks = {"encoder": recipe.encoder, "decoder": recipe.decoder}
  changed = {kind: dataclasses.replace(s, **fields) for kind, s in stacks.items() if s is not None}
  return dataclasses.replace(recipe, **changed)


def _cross(architecture: Architecture, kind: str, sublayer: Attention) -> Attention | None:
  """The cross-attention record where there is one: the decoder of an encoder-decoder."""
  return sublayer if (architecture.kind, kind) == ("encoder_decoder", "decoder") else None


def _same(name: str, architecture: Architecture, sublayer, *, final_norm: bool) -> Recipe:
  """One pair of `sublayer(depth of the stack) -> (Attention, FeedForward)` for every layer."""
  depths = {"encoder": architecture.encoder_layers, "decoder": architecture.decoder_layers}

  def layer(kind):
    attention, ffn = sublayer(depths[kind])
    return Layer(attention, ffn, _cross(architecture, kind, attention))

  return _recipe(name, architecture, layer, final_norm=final_norm)


def _both(norms: frozenset[str], **fields) -> tuple[Attention, FeedForward]:
  return Attention(norms, **fields), FeedForward(norms, **fields)


def pre_ln(architecture: Architecture) -> Recipe:
  """Pre-LN: x <- x + f(LN(x)), with a final LN; Xavier init with gain 1.

  Reference: On Layer Normalization in the Transformer Architecture, arXiv 2002.04745.
  """
  return _same("pre_ln", architecture, lambda depth: _both(PRE), final_norm=True)


def post_ln(architecture: Architecture) -> Recipe:
  """Post-LN: x <- LN(x + f(x)), without a final LN; Xavier init with gain 1.

  Reference: Attention Is All You Need, arXiv 1706.03762, section 3.1.
  """
  return _same("post_ln", architecture, lambda depth: _both(POST), final_norm=False)


def magneto(architecture: Architecture) -> Recipe:
  """Magneto's Sub-LN: x <- x + W_out LN(g(LN(x))), with a final LN.

  g is all of the sublayer before its output projection W_out. Kernels of v, out, wi and wo are
  Xavier normal with gain gamma, those of q and k with gain 1:

    | architecture       | encoder                       | decoder        |
    |--------------------|-------------------------------|----------------|
    | one stack of N     | sqrt(log 2N)                  | sqrt(log 2N)   |
    | encoder N, decoder M | sqrt(log(3M) log(2N) / 3)   | sqrt(log 3M)   |

  Cross-attention has one LN, before it, and gain 1.

  Reference: Foundation Transformers, arXiv 2210.06423, equations 1-5 and figure 2.
  Differs from torchscale, which draws from torch.nn.Linear's uniform default and scales biases.
  """
  gamma = _magneto_gains(architecture)

  def layer(kind):
    scaled = Init(gain=gamma[kind])
    return Layer(
      Attention(SUB_LN, v=scaled, out=scaled),
      FeedForward(SUB_LN, wi=scaled, wo=scaled),
      _cross(architecture, kind, Attention(PRE)),
    )

  return _recipe("magneto", architecture, layer, final_norm=True)


def _magneto_gains(architecture: Architecture) -> dict[str, float]:
  """gamma of each stack."""
  n, m = architecture.encoder_layers, architecture.decoder_layers
  if architecture.kind != "encoder_decoder":
    return {architecture.kind: math.sqrt(math.log(2 * (n + m)))}
  return {
    "encoder": math.sqrt(math.log(3 * m) * math.log(2 * n) / 3),
    "decoder": math.sqrt(math.log(3 * m)),
  }


def deepnet(architecture: Architecture) -> Recipe:
  """DeepNet's DeepNorm: x <- LN(alpha x + f(x)), without a final LN.

  Kernels of v, out, wi and wo (of cross-attention too) are Xavier normal with gain beta, those of
  q and k with gain 1:

    | architecture     | alpha encoder      | beta encoder        | alpha decoder | beta decoder |
    |------------------|--------------------|---------------------|---------------|--------------|
    | one stack of N   | (2N)^1/4           | (8N)^-1/4           | (2N)^1/4      | (8N)^-1/4    |
    | encoder N, decoder M | 0.81 (N^4 M)^1/16 | 0.87 (N^4 M)^-1/16 | (3M)^1/4      | (12M)^-1/4   |

  Reference: DeepNet, arXiv 2203.00555, figure 2.
  Differs from torchscale, whose encoder gain in an encoder-decoder is 1.15 (N^4 M)^-1/16.
  """
  alpha, beta = _deepnet_numbers(architecture, encoder_gain=0.87)

  def layer(kind):
    skip, scaled = Scale(alpha[kind]), Init(gain=beta[kind])
    attention = Attention(POST, skip=skip, v=scaled, out=scaled)
    ffn = FeedForward(POST, skip=skip, wi=scaled, wo=scaled)
    return Layer(attention, ffn, _cross(architecture, kind, attention))

  return _recipe("deepnet", architecture, layer, final_norm=False)


def _deepnet_numbers(
  architecture: Architecture, *, encoder_gain: float
) -> tuple[dict[str, float], dict[str, float]]:
  """alpha and beta of each stack; `encoder_gain` is beta's constant in an encoder-decoder."""
  n, m = architecture.encoder_layers, architecture.decoder_layers
  if architecture.kind != "encoder_decoder":
    kind = architecture.kind
    return {kind: (2 * (n + m)) ** 0.25}, {kind: (8 * (n + m)) ** -0.25}
  depth = (n**4 * m) ** (1 / 16)
  return (
    {"encoder": 0.81 * depth, "decoder": (3 * m) ** 0.25},
    {"encoder": encoder_gain / depth, "decoder": (12 * m) ** -0.25},
  )


def normformer(
  architecture: Architecture,
  *,
  head_scale: str | None = "pre_out_proj",
  residual_scale: str | None = None,
  attention_residual_scale: str | None = None,
) -> Recipe:
  """NormFormer: Pre-LN with a head scale and two more norms, and a final LN.

    x <- mu * x + LN(W_o concat_i(gamma_i head_i(LN(x))))
    x <- lambda * x + W_2 LN(act(W_1 LN(x)))

  gamma has one value a head and, where they exist, lambda and mu one a channel; all are learned
  and start at 1. The init is the released code's: q, k, v Xavier uniform with gain 1/sqrt(2) and
  torch's uniform bias, out Xavier uniform with a zero bias, wi and wo torch's uniform default for
  kernel and bias.

  Args:
    architecture: the model's sizes.
    head_scale: where gamma is applied, one of `records.HEAD_SCALES`, or None for no gamma, as in
      the released masked language model.
    residual_scale: lambda: None, `vector` or `scalar` (one a layer, as early code could); the paper
      has a vector in the 125M and 355M models only.
    attention_residual_scale: mu, likewise; only the released masked language model has it.

  Reference: NormFormer, arXiv 2110.09456, section 2.
  Differs from fairseq, which applies gamma after W_o: `post_out_proj_contiguous`, and before
  November 2021, in the paper's own runs, `post_out_proj_interleaved`.
  """
  qkv = Init("xavier_uniform", gain=2**-0.5, bias="torch_uniform")
  dense = Init("torch_uniform", bias="torch_uniform")
  scale = lambda learned: Scale(1.0, learned)

  def layer(kind):
    plain = Attention(PRE, qk=qkv, v=qkv, out=Init("xavier_uniform"))
    attention = dataclasses.replace(
      plain,
      norms=PRE | {"out"},
      head_scale=head_scale,
      skip=scale(attention_residual_scale),
    )
    ffn = FeedForward(SUB_LN, skip=scale(residual_scale), wi=dense, wo=dense)
    return Layer(attention, ffn, _cross(architecture, kind, plain))

  return _recipe("normformer", architecture, layer, final_norm=True)


# ---------------------------------------------------------------------------------------------
# As torchscale's code has them
# ---------------------------------------------------------------------------------------------


def _torch_linear(gain: float = 1.0) -> Init:
  """torch.nn.Linear's default, kernel and bias both multiplied."""
  return Init("torch_uniform", gain=gain, bias="torch_uniform", bias_gain=gain)


def _bert_linear(gain: float = 1.0) -> Init:
  """N(0, 0.02^2), multiplied, and biases of zero."""
  return Init("normal", gain=0.02 * gain)


def _torchscale(
  name: str, architecture: Architecture, layer, *, final_norm: bool, bert_init: bool
) -> Recipe:
  """With torchscale's embeddings, unscaled: tokens N(0, 1/D), positions and biases N(0, 1).

  With `bert_init` all of them are N(0, 0.02^2).
  """
  recipe = _recipe(name, architecture, layer, final_norm=final_norm)
  tokens, unit = Init("normal", gain=architecture.width**-0.5), Init("normal")
  if bert_init:
    tokens = unit = _bert_linear()
  embedding = Embedding(tokens, positions=unit, relative=unit, patches=_torch_linear())
  return _with(recipe, embedding=embedding)


def magneto_torchscale(architecture: Architecture, *, bert_init: bool = False) -> Recipe:
  """Magneto as torchscale builds it: the paper's norms and gains on torch's default init.

  Kernels and biases of v, out, wi and wo are uniform on +-gamma / sqrt(fan-in), those of q, k and
  of cross-attention on +-1 / sqrt(fan-in), with the gamma of `magneto`. Tokens are N(0, 1/D) and
  not scaled, positions N(0, 1).

  Args:
    architecture: the model's sizes.
    bert_init: draw kernels from N(0, 0.02^2) before the gains, tables too, and biases as zeros.

  Reference: microsoft/torchscale 4d1e0e8, architecture/encoder.py and decoder.py.
  Differs from the paper, which draws Xavier normal kernels and does not speak of biases.
  """
  gamma = _magneto_gains(architecture)
  linear = _bert_linear if bert_init else _torch_linear

  def layer(kind):
    plain, scaled = linear(), linear(gamma[kind])
    return Layer(
      Attention(SUB_LN, qk=plain, v=scaled, out=scaled),
      FeedForward(SUB_LN, wi=scaled, wo=scaled),
      _cross(architecture, kind, Attention(PRE, qk=plain, v=plain, out=plain)),
    )

  return _torchscale(
    "magneto_torchscale", architecture, layer, final_norm=True, bert_init=bert_init
  )


def deepnet_torchscale(architecture: Architecture, *, bert_init: bool = False) -> Recipe:
  """DeepNet as torchscale builds it: the paper's alpha, and beta on torch's default init.

  Kernels and biases of v, out, wi and wo (of cross-attention too) are uniform on +-beta /
  sqrt(fan-in), those of q and k on +-1 / sqrt(fan-in). In an encoder-decoder the encoder's beta is
  1.15 (N^4 M)^-1/16. Embeddings, and `bert_init`, are those of `magneto_torchscale`.

  Reference: microsoft/torchscale 4d1e0e8, architecture/encoder.py and decoder.py.
  Differs from the paper, whose encoder has 0.87 where the code has 1.15, and see
  `magneto_torchscale`.
  """
  alpha, beta = _deepnet_numbers(architecture, encoder_gain=1.15)
  linear = _bert_linear if bert_init else _torch_linear

  def layer(kind):
    skip, plain, scaled = Scale(alpha[kind]), linear(), linear(beta[kind])
    attention = Attention(POST, skip=skip, qk=plain, v=scaled, out=scaled)
    ffn = FeedForward(POST, skip=skip, wi=scaled, wo=scaled)
    return Layer(attention, ffn, _cross(architecture, kind, attention))

  return _torchscale(
    "deepnet_torchscale", architecture, layer, final_norm=False, bert_init=bert_init
  )


# ---------------------------------------------------------------------------------------------
# Variants that papers compare with
# ---------------------------------------------------------------------------------------------


def _branches(architecture: Architecture, kind: str) -> int:
  """How many residual branches a stack has: two a layer, three with cross-attention."""
  if kind == "encoder":
    return 2 * architecture.encoder_layers
  return (3 if architecture.kind == "encoder_decoder" else 2) * architecture.decoder_layers


def pre_ln_scaled_init(architecture: Architecture) -> Recipe:
  """Pre-LN as GPT-2 and Megatron-LM draw it: N(0, 0.02^2), the last product of a branch smaller.

  W_o and the FFN's second kernel have the deviation 0.02 / sqrt(R), with R branches in the stack:
  2L, or 3M in the decoder of an encoder-decoder. Biases are zero.

  Reference: GPT-2, section 2.3; Megatron-LM, arXiv 1909.08053, section 3.
  Differs from both in the embedding, which is that of the other recipes.
  """
  draw = Init("normal", gain=0.02)

  def layer(kind):
    last = Init("normal", gain=0.02 / math.sqrt(_branches(architecture, kind)))
    attention = Attention(PRE, qk=draw, v=draw, out=last)
    ffn = FeedForward(PRE, wi=draw, wo=last)
    return Layer(attention, ffn, _cross(architecture, kind, attention))

  return _recipe("pre_ln_scaled_init", architecture, layer, final_norm=True)


def sandwich_ln(architecture: Architecture) -> Recipe:
  """Sandwich-LN: x <- x + LN(f(LN(x))), with a final LN.

  Reference: CogView, arXiv 2105.13290, section 2.4.
  """
  sublayer = lambda depth: _both(PRE | {"out"})
  return _same("sandwich_ln", architecture, sublayer, final_norm=True)


def peri_ln(architecture: Architecture) -> Recipe:
  """Peri-LN: x <- x + LN(f(LN(x))), with an LN after the embedding and a final LN.

  Reference: Peri-LN, arXiv 2502.02732.
  """
  sandwich = sandwich_ln(architecture)
  embedding = dataclasses.replace(_embedding(architecture), norm=True)
  return dataclasses.replace(_with(sandwich, embedding=embedding), name="peri_ln")


def olmo2(architecture: Architecture) -> Recipe:
  """OLMo 2: x <- x + RMSNorm(f(x)), queries and keys normalised over all heads, N(0, 0.02^2).

  A final norm follows. The published models have no biases (`use_bias=False`) and rotary positions.

  Reference: OLMo 2, arXiv 2501.00656, section 3.
  """
  draw, branch = Init("normal", gain=0.02), frozenset({"out"})

  def layer(kind):
    attention = Attention(branch, qk=draw, v=draw, out=draw, qk_norm="width")
    ffn = FeedForward(branch, wi=draw, wo=draw)
    return Layer(attention, ffn, _cross(architecture, kind, attention))

  recipe = _recipe("olmo2", architecture, layer, final_norm=True)
  embedding = Embedding(tokens=draw, positions=draw, relative=draw, patches=draw)
  return _with(recipe, norm="rms_norm", embedding=embedding)


def out_norm(architecture: Architecture) -> Recipe:
  """Norm on the branch alone: x <- x + LN(f(x)), with a final LN.

  Reference: Swin Transformer V2 (res-post-norm), arXiv 2111.09883, section 3.2.
  """
  sublayer = lambda depth: _both(frozenset({"out"}))
  return _same("out_norm", architecture, sublayer, final_norm=True)


def layernorm_scaling(architecture: Architecture) -> Recipe:
  """LayerNorm Scaling: x <- x + f(LN(x) / sqrt(l)) in layer l = 1, 2, ..., with a final LN.

  Reference: The Curse of Depth, arXiv 2502.05795, section 4.
  """

  def sublayer(depth):
    return _both(PRE, in_scale=Scale(tuple((l + 1) ** -0.5 for l in range(depth))))

  return _same("layernorm_scaling", architecture, sublayer, final_norm=True)


def layer_scale(architecture: Architecture) -> Recipe:
  """LayerScale: x <- x + s * f(LN(x)), s a learned vector over channels, with a final LN.

  It starts at 0.1 up to 18 layers, at 1e-5 up to 24, and at 1e-6 beyond.

  Reference: Going Deeper with Image Transformers (CaiT), arXiv 2103.17239, section 2.
  """

  def sublayer(depth):
    start = 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6
    return _both(PRE, branch=Scale(start, "vector"))

  return _same("layer_scale", architecture, sublayer, final_norm=True)


def rezero(architecture: Architecture) -> Recipe:
  """ReZero: x <- x + a f(x), a a learned number that starts at 0, without any norm.

  Reference: ReZero is All You Need, arXiv 2003.04887, section 3.
  """
  sublayer = lambda depth: _both(frozenset(), branch=Scale(0.0, "scalar"))
  return _same("rezero", architecture, sublayer, final_norm=False)


def depth_mup(architecture: Architecture) -> Recipe:
  """Depth-muP's residual multiplier: x <- x + f(LN(x)) / sqrt(L), with a final LN.

  Reference: Feature Learning in Infinite-Depth Neural Networks, arXiv 2310.02244. Its rules for
  the optimizer are not part of a recipe.
  """
  sublayer = lambda depth: _both(PRE, branch=Scale(depth**-0.5))
  return _same("depth_mup", architecture, sublayer, final_norm=True)


def completep(architecture: Architecture) -> Recipe:
  """CompleteP's residual multiplier: x <- x + f(LN(x)) / L, with a final LN.

  Reference: CompleteP, arXiv 2505.01618. Its rules for the optimizer are not part of a recipe.
  """
  sublayer = lambda depth: _both(PRE, branch=Scale(1.0 / depth))
  return _same("completep", architecture, sublayer, final_norm=True)


def keel(architecture: Architecture) -> Recipe:
  """KEEL: x <- LN(a x + f(LN(x))), a the number of the stack's sublayers, without a final LN.

  Reference: arXiv 2601.19895.
  """

  def layer(kind):
    attention, ffn = _both(PRE | POST, skip=Scale(float(_branches(architecture, kind))))
    return Layer(attention, ffn, _cross(architecture, kind, attention))

  return _recipe("keel", architecture, layer, final_norm=False)


# ---------------------------------------------------------------------------------------------
# DeepScaleLM
# ---------------------------------------------------------------------------------------------


def _beta_squared(
  architecture: Architecture, depth_unit: str, beta_squared: float | None
) -> dict[str, float]:
  """beta^2 of each stack: what is given, or 2 / n and at most 1, for n layers or blocks."""
  if depth_unit not in ("layers", "blocks"):
    raise ValueError(f"{depth_unit=} must be one of layers, blocks")
  if beta_squared is not None and not 0 < beta_squared < 1:
    raise ValueError(f"{beta_squared=} must lie in (0, 1)")

  def of(kind: str) -> float:
    if beta_squared is not None:
      return beta_squared
    layers = getattr(architecture, f"{kind}_layers")
    return 2 / max(2, layers if depth_unit == "layers" else _branches(architecture, kind))

  return {kind: of(kind) for kind in ("encoder", "decoder")}


def _correlations(
  architecture: Architecture, kind: str, beta_squared: float
) -> tuple[tuple[float, ...], float]:
  """DeepScaleLM's schedule: r as it enters each layer of a stack, and at the stack's end.

  Every block has unit variance, and lambda^2 + beta^2 = 1, so that the stream keeps it. Attention
  averages all that differs between tokens away; what is left is its dropout's: r = 1 - p. The FFN
  turns r into (1 - p) kappa(r). Sizes are large; attention's own dropout does not count.
  """
  keep, entering = 1 - architecture.dropout, []
  cross = kind == "decoder" and architecture.kind == "encoder_decoder"
  r = keep * architecture.token_correlation
  for _ in range(getattr(architecture, f"{kind}_layers")):
    entering.append(r)
    for _ in range(2 if cross else 1):
      r += beta_squared * (keep - r)
    r += beta_squared * (keep * float(moments.kappa(r)) - r)
  return tuple(entering), r


def _ffn_init(architecture: Architecture) -> Init:
  """N(0, sqrt(2 (1 - p) / (D F))): behind its dropout, a ReLU FFN of unit variance."""
  sizes = architecture.width * architecture.ffn_width
  return Init("normal", gain=(2 * (1 - architecture.dropout) / sizes) ** 0.25)


def _deepscalelm(
  name: str,
  architecture: Architecture,
  values: dict[str, Init],
  *,
  placement: str,
  beta_squared: dict[str, float],
) -> Recipe:
  """What both recipes share; `values` draw v and out of each stack and of the `memory`."""
  if placement not in ("pre", "post"):
    raise ValueError(f"{placement=} must be one of pre, post")
  norms, ffn = PRE if placement == "pre" else POST, _ffn_init(architecture)

  def layer(kind):
    beta2 = beta_squared[kind]
    scales = {"skip": Scale(math.sqrt(1 - beta2)), "branch": Scale(math.sqrt(beta2))}

    def attention(init):
      return Attention(norms, qk=Init("lecun_normal"), v=init, out=init, **scales)

    return Layer(
      attention(values[kind]),
      FeedForward(norms, wi=ffn, wo=ffn, **scales),
      _cross(architecture, kind, attention(values["memory"])),
    )

  keep = 1 - architecture.dropout
  std = math.sqrt(keep / architecture.embedding_tables)
  embedding = dataclasses.replace(
    _embedding(architecture),
    positions=Init("normal", gain=std),
    patches=Init("lecun_normal", gain=std),
    scale=math.sqrt(architecture.width) * std,
    norm=placement == "post",
  )
  recipe = _recipe(name, architecture, layer, final_norm=placement == "pre")
  return _with(recipe, embedding=embedding)


def deepscalelm(
  architecture: Architecture,
  *,
  placement: str = "pre",
  depth_unit: str = "layers",
  beta_squared: float | None = None,
) -> Recipe:
  """DeepScaleLM: x <- lambda x + beta f(LN(x)), lambda^2 + beta^2 = 1, with a final LN.

  beta^2 = 2 / N; up to N = 2 it is 1, and lambda 0. With p the architecture's dropout, which is
  that of training, e its embedding tables and r_l the correlation of two tokens as it enters layer
  l, the kernels are normal and biases zero:

    | group         | variance                        |                                  |
    |---------------|---------------------------------|----------------------------------|
    | q, k          | 1 / D                           |                                  |
    | v, out        | sqrt((1 - p) / r_l) / D         | whatever the heads               |
    | wi, wo        | sqrt(2 (1 - p) / (D F))         | sqrt((1 - p) / 2) / D at F = 4 D |
    | tables        | (1 - p) / e                     |                                  |
    | patches       | (1 - p) / (e * their fan-in)    |                                  |

  so that every block, and the stream behind the embedding's dropout, has variance 1. r starts at
  (1 - p) token_correlation. In each layer attention makes it lambda^2 r + beta^2 (1 - p), then the
  FFN lambda^2 r + beta^2 (1 - p) kappa(r), with kappa(r) = r + (sqrt(1 - r^2) - r acos r) / pi.

  Assumes a ReLU in the FFN, features and weights that are independent, and sizes that are large.
  Sinusoidal positions add a variance of 1/2 to the stream, which the formulae do not know of.

  The table of tokens is N(0, 1 / D) and its rows are multiplied by sqrt(D (1 - p) / e): the
  stream is that of a table with the variance above, and logits of a tied one have unit variance.
  The authors' code has that table and divides its logits by sqrt(D (1 - p) / e): the same
  function; only the optimizer sees another unit.

  Args:
    architecture: the model's sizes, its dropout, token_correlation and embedding_tables.
    placement: `pre`, or `post`: x <- LN(lambda x + beta f(x)), with an LN after the embedding and
      no final one. That first LN stands before the embedding's dropout, which leaves a variance of
      1 / (1 - p) up to the next LN.
    depth_unit: whether N counts the stack's `layers`, or its residual `blocks`: two a layer, three
      with cross-attention.
    beta_squared: beta^2 in (0, 1), in place of 2 / N.

  Reference: Transformers Get Stable, arXiv 2403.09635 (ICML 2024); code
  akhilkedia/TranformersGetStable 7f48e64.
  Ours: the choice of `depth_unit`, as the code's figures of 192 layers have lambda^2 = 0.995, that
  is, 2 / N over blocks (or 1 / N over layers); and cross-attention. It is scaled too, which the
  code does not do: beta as in its stack, v and out with the r that leaves the encoder, and r
  behind it as behind self-attention.
  """
  beta2 = _beta_squared(architecture, depth_unit, beta_squared)
  schedules = {kind: _correlations(architecture, kind, beta2[kind]) for kind in beta2}
  gain = lambda r: ((1 - architecture.dropout) / r) ** 0.25
  values = {
    kind: Init("lecun_normal", gain=tuple(map(gain, entering)))
    for kind, (entering, _) in schedules.items()
  }
  _, memory = schedules["encoder"]
  values["memory"] = Init("lecun_normal", gain=gain(memory))
  return _deepscalelm("deepscalelm", architecture, values, placement=placement, beta_squared=beta2)


def deepscalelm_simple(
  architecture: Architecture,
  *,
  placement: str = "pre",
  depth_unit: str = "layers",
  beta_squared: float | None = None,
) -> Recipe:
  """DeepScaleLM with v and out drawn as the FFN is, whatever the correlation of tokens.

  All else, options too, is `deepscalelm`'s. Attention's variance is then r / 2 at F = 4 D, and the
  stream's falls with depth to a value that depends on r.

  Reference: that of `deepscalelm`.
  Ours: also cross-attention's v and out are drawn so.
  """
  beta2 = _beta_squared(architecture, depth_unit, beta_squared)
  values = dict.fromkeys(("encoder", "decoder", "memory"), _ffn_init(architecture))
  return _deepscalelm(
    "deepscalelm_simple", architecture, values, placement=placement, beta_squared=beta2
  )


RECIPES: dict[str, Callable[..., Recipe]] = {
  "pre_ln": pre_ln,
  "post_ln": post_ln,
  "magneto": magneto,
  "deepnet": deepnet,
  "normformer": normformer,
  "magneto_torchscale": magneto_torchscale,
  "deepnet_torchscale": deepnet_torchscale,
  "pre_ln_scaled_init": pre_ln_scaled_init,
  "sandwich_ln": sandwich_ln,
  "peri_ln": peri_ln,
  "out_norm": out_norm,
  "olmo2": olmo2,
  "layernorm_scaling": layernorm_scaling,
  "layer_scale": layer_scale,
  "rezero": rezero,
  "depth_mup": depth_mup,
  "completep": completep,
  "keel": keel,
  "deepscalelm": deepscalelm,
  "deepscalelm_simple": deepscalelm_simple,
}


def options(name: str) -> dict[str, object]:
  """The options of a recipe, the keywords of its function, with their defaults."""
  parameters = inspect.signature(RECIPES[name]).parameters.values()
  return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
