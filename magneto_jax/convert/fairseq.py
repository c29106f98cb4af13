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
from magneto_jax.convert.files import ConversionError
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
  "output_embedding": "weight",
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


class _Reader:
  """One state dict with its configuration."""

  def __init__(self, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]):
    self.tensors, self.config = tensors, config
    kinds = [kind for kind, prefix in PREFIXES.items() if f"{prefix}embed_tokens.weight" in tensors]
    if len(kinds) != 1 or "encoder.embed_tokens.weight" in tensors:
      raise ConversionError(
        "this is neither fairseq's decoder language model (decoder.embed_tokens.weight) nor its"
        " RoBERTa (encoder.sentence_encoder.embed_tokens.weight)"
      )
    (self.kind,) = kinds
    self.prefix = PREFIXES[self.kind]
    self.first = f"{self.prefix}layers.0."
    if f"{self.first}encoder_attn.q_proj.weight" in tensors:
      raise ConversionError("decoders with cross-attention are not supported")

  def has(self, name: str) -> bool:
    return self.prefix + name in self.tensors

  def shape(self, name: str) -> tuple[int, ...]:
    if name not in self.tensors:
      raise ConversionError(f"{name} is missing: is this a whole checkpoint of fairseq?")
    return self.tensors[name].shape

  def need(self, key: str, why: str):
    if key not in self.config:
      raise ConversionError(f"the configuration must give {key}: {why}")
    return self.config[key]

  def size(self, key: str, value: int) -> int:
    if self.config.get(key, value) != value:
      raise ConversionError(
        f"{key} is {self.config[key]} in the configuration and {value} in the tensors"
      )
    return value

  def architecture(self) -> records.Architecture:
    kind, first = self.kind, self.first
    width = self.size(f"{kind}_embed_dim", self.shape(f"{first}self_attn.q_proj.weight")[0])
    ffn = self.size(f"{kind}_ffn_embed_dim", self.shape(f"{first}fc1.weight")[0])
    layers = {int(n[len(self.prefix) :].split(".")[1]) for n in self.tensors if self._in_layer(n)}
    scale = f"{first}c_attn"
    key = f"{kind}_attention_heads"
    if scale in self.tensors:
      heads = self.size(key, self.shape(scale)[0])
    else:
      heads = self.need(key, "no tensor shows it")
    if not isinstance(heads, int) or heads < 1 or width % heads:
      raise ConversionError(f"{key}={heads!r} must divide the width {width}")
    depth = {f"{kind}_layers": self.size(f"{kind}_layers", 1 + max(layers))}
    return records.Architecture(kind, **depth, width=width, ffn_width=ffn, heads=heads)

  def _in_layer(self, name: str) -> bool:
    rest = name.removeprefix(self.prefix)
    return rest != name and rest.startswith("layers.")

  def recipe(self, architecture: records.Architecture) -> records.Stack:
    is_final = self.has("layer_norm.weight")
    is_pre = is_final or bool(
      self.need(f"{self.kind}_normalize_before", "without a final norm no tensor shows it")
    )
    placement = None
    if f"{self.first}c_attn" in self.tensors:
      placement = self.need(
        "head_scale",
        f"one of {', '.join(records.HEAD_SCALES)}; fairseq has the second since November 2021, and"
        " had the third before",
      )
      if placement not in records.HEAD_SCALES:
        choices = ", ".join(records.HEAD_SCALES)
        raise ConversionError(f"head_scale={placement!r} must be one of {choices}")

    def scale_of(name: str) -> str | None:
      tensor = self.tensors.get(self.first + name)
      return None if tensor is None else "vector" if tensor.size > 1 else "scalar"

    attention, ffn = sublayers(
      lambda name: self.first + name in self.tensors, placement, scale_of, is_pre=is_pre
    )
    stack = getattr(recipes.normformer(architecture), self.kind)
    unscaled = self.config.get("no_scale_embedding", self.kind == "encoder")
    return dataclasses.replace(
      stack,
      segments=(records.Segment((records.Layer(attention, ffn),), stack.num_layers),),
      embedding=dataclasses.replace(
        stack.embedding,
        scale=1.0 if unscaled else math.sqrt(architecture.width),
        norm=self.has("layernorm_embedding.weight"),
      ),
      final_norm=is_final,
    )

  def fields(self) -> dict[str, Any]:
    """The fields of the stack's model."""
    architecture = self.architecture()
    rows = self.shape(f"{self.prefix}embed_positions.weight")[0] if self.has(
      "embed_positions.weight"
    ) else 0
    without = "none" if self.config.get("no_token_positional_embeddings") else "sinusoidal"
    why = f"one of {', '.join(ACTIVATIONS)}; fairseq's architectures differ in it"
    activation = self.need("activation_fn", why)
    if activation not in ACTIVATIONS:
      raise ConversionError(f"activation_fn={activation!r} must be one of {', '.join(ACTIVATIONS)}")
    return {
      "recipe": self.recipe(architecture),
      "vocab_size": self.shape(f"{self.prefix}embed_tokens.weight")[0],
      "width": architecture.width,
      "num_heads": architecture.heads,
      "ffn_width": architecture.ffn_width,
      "activation": ACTIVATIONS[activation],
      "positions": "learned" if rows else without,
      "max_length": rows - OFFSET if rows else 1024,
      "position_offset": OFFSET,
    }

  def tied(self, copy: str) -> bool:
    """Whether the output table is the input's: as configured, or else as the numbers are."""
    if copy not in self.tensors:
      return True
    same = np.array_equal(self.tensors[copy], self.tensors[f"{self.prefix}embed_tokens.weight"])
    return bool(self.config.get("share_decoder_input_output_embed", same))


def is_legacy(tensors: Mapping[str, np.ndarray]) -> bool:
  """Whether the scales of the FFN's residual have their name of before November 2021."""
  return any(name.endswith(".alpha2") for name in tensors)


def build(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> nn.Module:
  """The model that a state dict is of; `config` has the names of fairseq's arguments."""
  reader = _Reader(tensors, config)
  if reader.kind == "decoder":
    tied = reader.tied("decoder.output_projection.weight")
    return CausalLM(**reader.fields(), tied=tied)
  tied = reader.tied("encoder.lm_head.weight")
  return MaskedLM(encoder=Encoder(**reader.fields()), head="dense", tied=tied)


def places(model: nn.Module, legacy: bool) -> list[layout.Place]:
  """Where each tensor of fairseq lies in the model's parameters."""
  kind = {CausalLM: "decoder", MaskedLM: "encoder"}.get(type(model))
  if kind is None or (kind == "encoder" and model.head != "dense"):
    raise ConversionError(
      f"fairseq has no counterpart for this {type(model).__name__}: only causal language models and"
      ' masked ones with head="dense"'
    )
  shapes = layout.shapes_of(model, jnp.zeros((1, 1), jnp.int32))
  return layout.places(shapes, functools.partial(_name, kind=kind, legacy=legacy))


def _copies(model: nn.Module) -> dict[str, str]:
  if not model.tied:
    return {}
  if isinstance(model, CausalLM):
    return {"decoder.output_projection.weight": "decoder.embed_tokens.weight"}
  return {"encoder.lm_head.weight": "encoder.sentence_encoder.embed_tokens.weight"}


def _is_known(name: str) -> bool:
  """The format's version, and a buffer that sinusoidal positions have."""
  return name.endswith((".version", ".embed_positions._float_tensor"))


def from_fairseq(
  state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
  """The model and its variables that a state dict of fairseq holds.

  Args:
    state_dict: arrays by fairseq's names.
    config: fairseq's arguments. Sizes, norms, learned scales and tied tables are read from the
      tensors. What no tensor shows must be given: `decoder_attention_heads` or
      `encoder_attention_heads` (unless there is a head scale), `head_scale` (one of
      `records.HEAD_SCALES`) where there is one, `decoder_normalize_before` or
      `encoder_normalize_before` where there is no final norm, and `activation_fn`.
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
  tensors = dict(state_dict)
  model = build(tensors, config or {})
  params, rest = layout.read(
    places(model, is_legacy(tensors)), tensors, copies=_copies(model), known=_is_known
  )
  return model, {"params": params}, rest


def to_fairseq(
  model: nn.Module, variables: Mapping[str, Any], *, legacy: bool = False
) -> dict[str, np.ndarray]:
  """The state dict of a model: what `from_fairseq` read, bit for bit, but for `version`.

  Args:
    model: a `CausalLM`, or a `MaskedLM` with the dense head.
    variables: its variables.
    legacy: whether a decoder's scales have the names of before November 2021; RoBERTa's have no
      others.

  Raises:
    ConversionError: if fairseq has no such model, or no name for one of the parameters.
  """
  return layout.write(places(model, legacy), variables["params"], copies=_copies(model))
