"""Checkpoints of fairseq: decoder language models and RoBERTa, with and without NormFormer.

Reference: facebookresearch/fairseq 3d262bb2, and its branch normformer2 (9e80e19e), whose names and
head scale are older. Encoder-decoders are not read.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from magneto_jax.convert import layout
from magneto_jax.convert.facts import check_same
from magneto_jax.convert.files import ConversionError
from magneto_jax.convert.reader import Reader
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.language import CausalLM, MaskedLM
from magneto_jax.theory import recipes, records

# Positions of real tokens are counted from the index of the padding token plus one.
PAD = 1
OFFSET = PAD + 1
ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_accurate": "gelu_tanh",
  "relu": "relu",
  "relu_squared": "relu_squared",
}
# fairseq's defaults of what the tensors do not show; RoBERTa's embeddings are not scaled.
DEFAULTS = {"no_scale_embedding": False, "no_token_positional_embeddings": False}
PREFIXES = {"decoder": "decoder.", "encoder": "encoder.sentence_encoder."}
OUTPUTS = {"decoder": "decoder.output_projection.weight", "encoder": "encoder.lm_head.weight"}
# What says whether the output table is the input's.
TIES = {"decoder": "share_decoder_input_output_embed", "encoder": "untie_weights_roberta"}

LAYER = {
  f"{ours}/{module}": f"{theirs}.{name}"
  for ours, theirs in (("self_attention", "self_attn"), ("cross_attention", "encoder_attn"))
  for module, name in (
    ("query", "q_proj"),
    ("key", "k_proj"),
    ("value", "v_proj"),
    ("out", "out_proj"),
  )
} | {
  "self_attention_residual/out_norm": "attn_ln",
  "ffn/wi": "fc1",
  "ffn/wo": "fc2",
  "ffn/mid_norm": "ffn_layernorm",
}
for _site in ("in_norm", "post_norm"):
  LAYER[f"self_attention_residual/{_site}"] = "self_attn_layer_norm"
  LAYER[f"cross_attention_residual/{_site}"] = "encoder_attn_layer_norm"
  LAYER[f"ffn_residual/{_site}"] = "final_layer_norm"
# Learned scales; before November 2021 those of the residuals had other names.
_SCALES = {
  ("self_attention", "head_scale"): ("c_attn", "c_attn"),
  ("self_attention_residual", "skip"): ("alpha1", "alpha1"),
  ("ffn_residual", "skip"): ("w_resid", "alpha2"),
}
_STACK = {
  "token_embedding": "embed_tokens",
  "position_embedding": "embed_positions",
  "output_embedding": "output_projection",
  "embedding_norm": "layernorm_embedding",
  "stack/final_norm": "layer_norm",
}
_HEAD = {
  "head_dense/kernel": "dense.weight",
  "head_dense/bias": "dense.bias",
  "head_norm/scale": "layer_norm.weight",
  "head_norm/bias": "layer_norm.bias",
  "head_bias": "bias",
  "output_embedding/embedding": "weight",
}


def layer_name(path: layout.Path, *, legacy: bool) -> str:
  """The name, inside a layer, of a parameter of a block."""
  *modules, leaf = path
  if (*modules, leaf) in _SCALES:
    return _SCALES[(*modules, leaf)][legacy]
  return f"{LAYER['/'.join(modules)]}.{layout.LEAVES[leaf]}"


def _name(path: layout.Path, layer: int | None, *, kind: str, legacy: bool) -> str:
  if kind == "encoder" and path[0] != "encoder":
    return f"encoder.lm_head.{_HEAD['/'.join(path)]}"
  path = path[1:] if kind == "encoder" else path
  if layer is not None:
    # Only the old branch has these scales in its encoder.
    name = layer_name(path[1:], legacy=legacy or kind == "encoder")
    return f"{PREFIXES[kind]}layers.{layer}.{name}"
  *modules, leaf = path
  return f"{PREFIXES[kind]}{_STACK['/'.join(modules)]}.{layout.LEAVES[leaf]}"


def sublayers(
  has, heads_scaled: str | None, scale_of, *, is_pre: bool
) -> tuple[records.Attention, records.FeedForward]:
  """The records of a layer's self-attention and FFN, with NormFormer's init.

  Args:
    has: whether a layer has a tensor of this name.
    heads_scaled: where the head scale is applied, if it has one.
    scale_of: what is learned of the residual that the scale of this name multiplies.
    is_pre: whether norms are before the sublayers.
  """
  architecture = records.Architecture("encoder", 1)
  (layer,) = recipes.normformer(architecture).encoder.segments[0].pattern
  outer = {"in" if is_pre else "post"}
  attention = dataclasses.replace(
    layer.self_attention,
    norms=frozenset(outer | ({"out"} if has("attn_ln.weight") else set())),
    head_scale=heads_scaled,
    skip=records.Scale(1.0, scale_of("alpha1")),
  )
  ffn = dataclasses.replace(
    layer.ffn,
    norms=frozenset(outer | ({"mid"} if has("ffn_layernorm.weight") else set())),
    skip=records.Scale(1.0, scale_of("w_resid") or scale_of("alpha2")),
  )
  return attention, ffn


def _kind(reader: Reader) -> str:
  """Which stack of fairseq's the tensors are of; raises for all that is neither model."""
  kinds = [kind for kind, prefix in PREFIXES.items() if reader.has(f"{prefix}embed_tokens.weight")]
  if len(kinds) != 1 or reader.has("encoder.embed_tokens.weight"):
    raise ConversionError(
      "this is neither fairseq's decoder language model (decoder.embed_tokens.weight) nor its"
      " RoBERTa (encoder.sentence_encoder.embed_tokens.weight)"
    )
  if reader.has("decoder.layers.0.encoder_attn.q_proj.weight"):
    raise ConversionError("decoders with cross-attention are not supported")
  return kinds[0]


def _architecture(reader: Reader, kind: str) -> records.Architecture:
  first = f"{PREFIXES[kind]}layers.0."
  width = reader.shape(f"{first}self_attn.q_proj.weight")[1]
  ffn = reader.shape(f"{first}fc1.weight")[0]
  scale = f"{first}c_attn"
  shown = reader.shape(scale, 1)[0] if reader.holds(f"{PREFIXES[kind]}layers.", ".c_attn") else None
  depth = reader.agreed(f"{kind}_layers", reader.depth(PREFIXES[kind]))
  return records.Architecture(
    kind,
    **{f"{kind}_layers": depth},
    width=reader.agreed(f"{kind}_embed_dim", width),
    ffn_width=reader.agreed(f"{kind}_ffn_embed_dim", ffn),
    heads=reader.heads(f"{kind}_attention_heads", width, shown),
  )


def _recipe(reader: Reader, kind: str, architecture: records.Architecture) -> records.Stack:
  prefix = PREFIXES[kind]
  first = f"{prefix}layers.0."
  is_final, before = reader.holds(f"{prefix}layer_norm."), f"{kind}_normalize_before"
  if is_final:
    is_pre = reader.agreed(before, True)
  else:
    is_pre = reader.need(before, True, "without a final norm no tensor shows it")
  # Of any layer, and the weight or the bias: if one is missing, it is named as such.
  has = lambda name: reader.holds(f"{prefix}layers.", f".{name.removesuffix('weight')}")
  placement = None
  if has("c_attn"):
    # The second since November 2021, the third before: the tensors do not say it.
    placement = reader.choice("head_scale", records.HEAD_SCALES)

  def scale_of(name: str) -> str | None:
    if not has(name):
      return None
    return "vector" if reader.shape(first + name, 1) != (1,) else "scalar"

  attention, ffn = sublayers(has, placement, scale_of, is_pre=is_pre)
  stack = getattr(recipes.normformer(architecture), kind)
  unscaled = reader.get("no_scale_embedding", kind == "encoder")
  return dataclasses.replace(
    stack,
    segments=(records.Segment((records.Layer(attention, ffn),), stack.num_layers),),
    embedding=dataclasses.replace(
      stack.embedding,
      scale=1.0 if unscaled else math.sqrt(architecture.width),
      norm=reader.agreed("layernorm_embedding", reader.holds(f"{prefix}layernorm_embedding.")),
    ),
    final_norm=is_final,
  )


def _fields(reader: Reader, kind: str) -> dict[str, Any]:
  """The fields of the stack's model."""
  prefix = PREFIXES[kind]
  architecture = _architecture(reader, kind)
  table, fields = f"{prefix}embed_positions.weight", {"positions": "sinusoidal"}
  if reader.has(table) or reader.get(f"{kind}_learned_pos", False):
    fields = {"positions": "learned", "max_length": reader.positions(table, OFFSET)}
  elif reader.get("no_token_positional_embeddings", False):
    fields = {"positions": "none"}
  return fields | {
    "recipe": _recipe(reader, kind, architecture),
    "vocab_size": reader.shape(f"{prefix}embed_tokens.weight")[0],
    "width": architecture.width,
    "num_heads": architecture.heads,
    "ffn_width": architecture.ffn_width,
    "activation": ACTIVATIONS[reader.choice("activation_fn", ACTIVATIONS)],
    "position_offset": OFFSET,
  }


def is_legacy(tensors: Mapping[str, np.ndarray]) -> bool:
  """Whether the scales of the FFN's residual have their name of before November 2021."""
  return any(name.endswith(".alpha2") for name in tensors)


def build(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> nn.Module:
  """The model that a state dict is of; `config` has the names of fairseq's arguments."""
  reader = Reader(tensors, config)
  kind = _kind(reader)
  key = TIES[kind]
  says_tied = kind == "decoder"
  is_configured = reader.get(key, not says_tied) == says_tied
  tokens, how = f"{PREFIXES[kind]}embed_tokens.weight", f"{key}={str(says_tied).lower()}"
  tied = reader.tied(OUTPUTS[kind], tokens, is_configured, how)
  fields = _fields(reader, kind)
  if kind == "decoder":
    return CausalLM(**fields, tied=tied)
  return MaskedLM(encoder=Encoder(**fields), head="dense", tied=tied)


def _kind_of(model: nn.Module) -> str:
  if isinstance(model, CausalLM):
    return "decoder"
  if isinstance(model, MaskedLM) and model.head == "dense":
    return "encoder"
  raise ConversionError(
    f"fairseq has no counterpart for this {type(model).__name__}: only causal language models and"
    ' masked ones with head="dense"'
  )


@functools.lru_cache(maxsize=8)
def places(model: nn.Module, legacy: bool) -> list[layout.Place]:
  """Where each tensor of fairseq lies in the model's parameters."""
  name_of = functools.partial(_name, kind=_kind_of(model), legacy=legacy)
  return layout.places(layout.shapes_of(model, jnp.zeros((1, 1), jnp.int32)), name_of)


def _copies(model: nn.Module) -> dict[str, str]:
  kind = _kind_of(model)
  return {OUTPUTS[kind]: f"{PREFIXES[kind]}embed_tokens.weight"} if model.tied else {}


# The format's version, and a buffer that sinusoidal positions have.
BUFFERS = {
  f"{prefix}{name}"
  for prefix in PREFIXES.values()
  for name in ("version", "embed_positions._float_tensor")
}


def config_of(model: nn.Module) -> dict[str, Any]:
  """fairseq's arguments with which `from_fairseq` reads the model."""
  kind = _kind_of(model)
  stack = model if kind == "decoder" else model.encoder
  attention = stack.recipe.layers[0].self_attention
  spelt = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
  return {
    f"{kind}_attention_heads": stack.num_heads,
    f"{kind}_normalize_before": "in" in attention.norms,
    "activation_fn": spelt.get(stack.activation, stack.activation),
    "no_scale_embedding": float(stack.recipe.embedding.scale) == 1.0,
    "no_token_positional_embeddings": stack.positions == "none",
    TIES[kind]: model.tied == (kind == "decoder"),
  } | ({"head_scale": attention.head_scale} if attention.head_scale else {})


def from_fairseq(
  state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
  """The model and its variables that a state dict of fairseq holds.

  Args:
    state_dict: arrays by fairseq's names.
    config: fairseq's arguments. Sizes, norms, learned scales and tied tables are read from the
      tensors, which the arguments must not contradict. What no tensor shows must be given:
      `decoder_attention_heads` or `encoder_attention_heads` (unless there is a head scale),
      `head_scale` (one of `records.HEAD_SCALES`) where there is one, `decoder_normalize_before`
      or `encoder_normalize_before` where there is no final norm, and `activation_fn`.
      `no_scale_embedding` (False; True for RoBERTa) and `no_token_positional_embeddings` (False)
      have fairseq's defaults.

  Returns:
    (model, variables): a `CausalLM`, or a `MaskedLM` with the dense head. Give its calls
    `mask_BT=tokens != 1` where there is padding: positions then count as fairseq's do.

  Raises:
    ConversionError: for what is missing, unknown, of another shape, not finite or contradictory.
  """
  model, variables, _ = read(state_dict, config)
  return model, variables


def read(state_dict, config=None) -> tuple[nn.Module, dict[str, Any], dict[str, np.ndarray]]:
  """`from_fairseq`, and third the known tensors that are no parameters of the model."""
  tensors = {name: np.asarray(tensor) for name, tensor in state_dict.items()}
  model = build(tensors, config or {})
  params, rest = layout.read(
    places(model, is_legacy(tensors)), tensors, copies=_copies(model), known=BUFFERS.__contains__
  )
  return model, {"params": params}, rest


def to_fairseq(
  model: nn.Module, variables: Mapping[str, Any], *, legacy: bool = False
) -> dict[str, np.ndarray]:
  """The state dict of a model, in float32: what `from_fairseq` read, but for fairseq's buffers.

  `config_of` has the arguments that go with it. A table of learned positions that begins with
  position 0 is written behind the two rows that fairseq skips.

  Args:
    model: a `CausalLM`, or a `MaskedLM` with the dense head.
    variables: its variables.
    legacy: whether a decoder's scales have the names of before November 2021; RoBERTa's have no
      others.

  Raises:
    ConversionError: if fairseq has no such model, or no name for one of the parameters.
  """
  tensors = layout.write(places(model, legacy), variables["params"], copies=_copies(model))
  kind = _kind_of(model)
  stack = model if kind == "decoder" else model.encoder
  layout.begin_positions_at(
    tensors, f"{PREFIXES[kind]}embed_positions.", stack.position_offset, OFFSET
  )
  check_same(model, build(tensors, config_of(model)), "fairseq")
  return tensors
