"""Checkpoints of torchscale: Encoder, Decoder, EncoderDecoder and BEiT3.

Reference: microsoft/torchscale 4d1e0e8, architecture/ and model/BEiT3.py. Mixture of experts,
RetNet and LongNet are not read.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from magneto_jax.convert import layout
from magneto_jax.convert.files import ConversionError
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.encoder_decoder import EncoderDecoder
from magneto_jax.models.language import CausalLM, MaskedLM
from magneto_jax.models.multimodal import BEiT3
from magneto_jax.theory import recipes, records

# Position tables begin with two rows that are never read.
OFFSET = 2
EXPERTS = {"vision": ".A", "text": ".B"}
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "swish": "silu"}

# Our modules -> torchscale's; {e} is the expert's letter. In a layer:
_LAYER = {
  f"{ours}/{module}": f"{theirs}.{name}{expert}"
  for ours, theirs, expert in (
    ("self_attention", "self_attn", "{e}"),
    ("cross_attention", "encoder_attn", ""),
  )
  for module, name in (
    ("query", "q_proj"),
    ("key", "k_proj"),
    ("value", "v_proj"),
    ("out", "out_proj"),
    ("mid_norm", "inner_attn_ln"),
  )
} | {
  "ffn/wi": "ffn{e}.fc1",
  "ffn/wo": "ffn{e}.fc2",
  "ffn/mid_norm": "ffn{e}.ffn_layernorm",
}
for _site in ("in_norm", "post_norm"):
  _LAYER[f"self_attention_residual/{_site}"] = "self_attn_layer_norm{e}"
  _LAYER[f"cross_attention_residual/{_site}"] = "encoder_attn_layer_norm"
  _LAYER[f"ffn_residual/{_site}"] = "final_layer_norm{e}"
# Beside the layers:
_STACK = {
  "token_embedding": "embed_tokens",
  "position_embedding": "embed_positions",
  "output_embedding": "output_projection",
  "embedding_norm": "layernorm_embedding{e}",
  "stack/final_norm": "layer_norm{e}",
}
_BEIT3 = {
  "text_embedding/embedding": "text_embed.weight",
  "patch_embedding/projection/kernel": "vision_embed.proj.weight",
  "patch_embedding/projection/bias": "vision_embed.proj.bias",
  "patch_embedding/class_token": "vision_embed.cls_token",
  "patch_embedding/mask_token": "vision_embed.mask_token",
  "position_embeddings_vision/embedding": "encoder.embed_positions.A.weight",
  "position_embeddings_text/embedding": "encoder.embed_positions.B.weight",
}
_RELATIVE = {
  ("encoder", "relative_bias"): "relative_position",
  ("decoder", "relative_bias"): "self_attn_relative_position",
  ("decoder", "cross_relative_bias"): "cross_attn_relative_position",
}


def _stack_name(path: layout.Path, layer: int | None, kind: str) -> str:
  """The name of a parameter of one stack, without the stack's own prefix."""
  *modules, leaf = path
  letter = "".join(EXPERTS.get(module, "") for module in modules)
  key = "/".join(module for module in modules if module not in EXPERTS)
  if (kind, leaf) in _RELATIVE:
    return f"{_RELATIVE[kind, leaf]}.relative_attention_bias.weight"
  if leaf == "output_embedding":
    return "output_projection.weight"
  if layer is None:
    return f"{_STACK[key].format(e=letter)}.{layout.LEAVES[leaf]}"
  name = _LAYER[key.removeprefix("stack/")].format(e=letter)
  return f"layers.{layer}.{name}.{layout.LEAVES[leaf]}"


def _name(path: layout.Path, layer: int | None, model: str) -> str:
  if model == "Decoder":
    return _stack_name(path, layer, "decoder")
  if model == "Encoder":
    return _stack_name(path[1:] if path[0] == "encoder" else path, layer, "encoder")
  if model == "BEiT3" and "/".join(path) in _BEIT3:
    return _BEIT3["/".join(path)]
  return f"{path[0]}.{_stack_name(path[1:], layer, path[0])}"


# ---------------------------------------------------------------------------------------------
# What is in a state dict
# ---------------------------------------------------------------------------------------------


def _layers(tensors: Mapping[str, Any], prefix: str) -> int:
  found = (re.match(re.escape(prefix) + r"layers\.(\d+)\.", name) for name in tensors)
  return 1 + max((int(match[1]) for match in found if match), default=-1)


def _model(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> str:
  """Which of torchscale's classes the tensors are of."""
  if "vision_embed.proj.weight" in tensors:
    return "BEiT3"
  stacks = {kind for kind in ("encoder", "decoder") if _layers(tensors, f"{kind}.")}
  if len(stacks) == 2:
    return "EncoderDecoder"
  if stacks or not _layers(tensors, ""):
    raise ConversionError(
      "this is no state dict of torchscale: it needs layers.0..., or both encoder.layers.0... and"
      " decoder.layers.0..."
    )
  if "self_attn_relative_position.relative_attention_bias.weight" in tensors:
    return "Decoder"
  named = [kind for kind in ("encoder", "decoder") if f"{kind}_attention_heads" in config]
  if len(named) != 1:
    raise ConversionError(
      "the configuration must give encoder_attention_heads or decoder_attention_heads, one of them:"
      " the names of the tensors do not say which stack they are of"
    )
  return named[0].capitalize()


# torchscale's defaults of what the tensors do not show.
DEFAULTS = {
  "activation_fn": "gelu",
  "no_scale_embedding": True,
  "layernorm_eps": 1e-5,
  "deepnorm": False,
  "subln": True,
  "max_rel_pos": 0,
  "xpos_scale_base": 512,
}
# What is read besides: sizes, which the tensors show and must not contradict, and switches.
_TRUE = {"encoder_normalize_before", "decoder_normalize_before", "normalize_output"}


class _Reader:
  """One state dict with its configuration, asked for one fact after the other."""

  def __init__(self, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]):
    self.tensors, self.config = tensors, config
    if config.get("moe_freq"):
      raise ConversionError("moe_freq > 0: mixture of experts is not supported")
    if any(".moe_layer." in name for name in tensors):
      raise ConversionError("moe_layer: mixture of experts is not supported")

  def has(self, name: str) -> bool:
    return name in self.tensors

  def shape(self, name: str) -> tuple[int, ...]:
    if name not in self.tensors:
      raise ConversionError(f"{name} is missing: is this a whole checkpoint of torchscale?")
    return self.tensors[name].shape

  def get(self, key: str):
    return self.config.get(key, DEFAULTS[key])

  def size(self, key: str, value: int) -> int:
    """A size that the tensors show; the configuration must agree where it speaks of it."""
    if self.config.get(key, value) != value:
      raise ConversionError(
        f"{key} is {self.config[key]} in the configuration and {value} in the tensors"
      )
    return value

  def heads(self, kind: str, width: int, table: str) -> int:
    key = f"{kind}_attention_heads"
    if self.has(table):
      return self.size(key, self.shape(table)[1])
    if key not in self.config:
      raise ConversionError(f"the configuration must give {key}: no tensor shows it")
    heads = self.config[key]
    if not isinstance(heads, int) or heads < 1 or width % heads:
      raise ConversionError(f"{key}={heads!r} must divide the width {width}")
    return heads

  def tied(self, key: str, copy: str, original: str) -> bool:
    """Whether one table is a copy of another: as configured, or else as the numbers are."""
    if not self.has(copy):
      return True
    same = self.has(original) and np.array_equal(self.tensors[copy], self.tensors[original])
    return bool(self.config.get(key, same))

  def stack(self, kind: str, prefix: str, architecture: records.Architecture, *, multiway: bool):
    """The fields of a stack's model."""
    has = lambda name: self.has(prefix + name)
    first = f"{prefix}layers.0."
    a = ".A" if multiway else ""
    is_subln = self.has(f"{first}self_attn.inner_attn_ln{a}.weight")
    is_final = has(f"layer_norm{a}.weight")
    if kind == "decoder":
      is_pre = is_final
    else:
      is_pre = is_final or is_subln or self._is_pre_without_norms()
    table = "relative_position" if kind == "encoder" else "self_attn_relative_position"
    table = f"{prefix}{table}.relative_attention_bias.weight"
    cross = f"{prefix}cross_attn_relative_position.relative_attention_bias.weight"
    buckets = self.shape(table)[0] if self.has(table) else 0
    if buckets and not self.get("max_rel_pos"):
      raise ConversionError("the configuration must give max_rel_pos: no tensor shows it")
    rows = self.shape(f"{prefix}embed_positions.weight")[0] if has("embed_positions.weight") else 0
    kinds = ["learned"] if rows else []
    if self.has(f"{first}self_attn.xpos.scale") or self.config.get("xpos_rel_pos"):
      kinds.append("xpos")
    activation = self.get("activation_fn")
    if activation not in ACTIVATIONS:
      raise ConversionError(f"activation_fn={activation!r} must be one of {', '.join(ACTIVATIONS)}")
    width = architecture.width
    return {
      "recipe": _recipe(
        architecture,
        kind,
        is_pre=is_pre,
        is_subln=is_subln,
        is_deepnorm=self._is_deepnorm(is_subln),
        final_norm=is_final,
        embedding_norm=has(f"layernorm_embedding{a}.weight"),
        scale=1.0 if self.get("no_scale_embedding") else math.sqrt(width),
      ),
      "width": width,
      "num_heads": architecture.heads,
      "ffn_width": architecture.ffn_width,
      "activation": ACTIVATIONS[activation],
      "positions": tuple(kinds) if len(kinds) > 1 else "".join(kinds) or "none",
      "max_length": rows - OFFSET if rows else 1024,
      "position_offset": OFFSET,
      "xpos_scale_base": float(self.get("xpos_scale_base")),
      "relative_buckets": buckets,
      "relative_max_distance": self.get("max_rel_pos") or 128,
      "relative_bidirectional": True,
      "relative_cross": self.has(cross),
      "norm_epsilon": self.get("layernorm_eps"),
    }

  def _is_deepnorm(self, is_subln: bool) -> bool:
    is_deepnorm = bool(self.get("deepnorm"))
    if is_deepnorm and is_subln:
      raise ConversionError("deepnorm is set, but the tensors have Sub-LN's inner norms")
    return is_deepnorm

  def _is_pre_without_norms(self) -> bool:
    """Whether an encoder without final and inner norms is a Pre-LN one: only the config knows."""
    switches = ("encoder_normalize_before", "deepnorm", "subln")
    if not any(key in self.config for key in switches):
      raise ConversionError(
        "the configuration must give encoder_normalize_before and deepnorm: no tensor shows whether"
        " this is Post-LN, DeepNorm, or Pre-LN without a final norm"
      )
    if self.get("deepnorm"):
      return False
    return bool(self.config.get("encoder_normalize_before", True))

  def architecture(self, kind: str, prefixes: dict[str, str], *, multiway: bool):
    """The sizes of one of the model's stacks, and the depths of all."""
    prefix, a = prefixes[kind], ".A" if multiway else ""
    first = f"{prefix}layers.0."
    width = self.shape(f"{first}self_attn.q_proj{a}.weight")[0]
    ffn = f"{first}ffn{a}.fc1.weight"
    table = "relative_position" if kind == "encoder" else "self_attn_relative_position"
    layers = {f"{k}_layers": _layers(self.tensors, p) for k, p in prefixes.items()}
    for key, value in layers.items():
      self.size(key, value)
    return records.Architecture(
      "_".join(prefixes),
      **layers,
      width=self.size(f"{kind}_embed_dim", width),
      ffn_width=self.size(f"{kind}_ffn_embed_dim", self.shape(ffn)[0]),
      heads=self.heads(kind, width, f"{prefix}{table}.relative_attention_bias.weight"),
    )


def _recipe(
  architecture: records.Architecture,
  kind: str,
  *,
  is_pre: bool,
  is_subln: bool,
  is_deepnorm: bool,
  final_norm: bool,
  embedding_norm: bool,
  scale: float,
) -> records.Stack:
  """The record of a stack as torchscale builds and draws it.

  Norms and residual weights are independent of each other: the code has an error (of HEAD) that
  makes a decoder with deepnorm=True a Pre-LN one with DeepNorm's numbers.
  """
  base = recipes.deepnet_torchscale if is_deepnorm else recipes.magneto_torchscale
  stack = getattr(base(architecture), kind)
  outer = frozenset({"in" if is_pre else "post"})

  def changed(name: str, sublayer: records.Sublayer) -> records.Sublayer:
    inner = frozenset({"mid"}) if is_subln and name != "cross_attention" else frozenset()
    sublayer = dataclasses.replace(sublayer, norms=outer | inner)
    if is_subln or is_deepnorm:
      return sublayer
    inits = {
      field.name: dataclasses.replace(getattr(sublayer, field.name), gain=1.0, bias_gain=1.0)
      for field in dataclasses.fields(sublayer)
      if isinstance(getattr(sublayer, field.name), records.Init)
    }
    return dataclasses.replace(sublayer, **inits)

  (segment,) = stack.segments
  (layer,) = segment.pattern
  sublayers = {name: changed(name, sublayer) for name, sublayer in layer.sublayers.items()}
  return dataclasses.replace(
    stack,
    segments=(records.Segment((records.Layer(**sublayers),), segment.repeats),),
    embedding=dataclasses.replace(stack.embedding, scale=scale, norm=embedding_norm),
    final_norm=final_norm,
  )


def build(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> nn.Module:
  """The model that a state dict is of; `config` has the keywords of torchscale's configuration."""
  reader = _Reader(tensors, config)
  model = _model(tensors, config)
  prefixes = {
    "Encoder": {"encoder": ""},
    "Decoder": {"decoder": ""},
    "EncoderDecoder": {"encoder": "encoder.", "decoder": "decoder."},
    "BEiT3": {"encoder": "encoder."},
  }[model]
  multiway = any(".self_attn.q_proj.A." in name for name in tensors)
  if multiway and model not in ("Encoder", "BEiT3"):
    raise ConversionError("multiway decoders are not supported: only encoders have two experts")

  stacks = {}
  for kind, prefix in prefixes.items():
    architecture = reader.architecture(kind, prefixes, multiway=multiway)
    fields = reader.stack(kind, prefix, architecture, multiway=multiway)
    if reader.has(f"{prefix}embed_tokens.weight"):
      fields["vocab_size"] = reader.shape(f"{prefix}embed_tokens.weight")[0]
    elif kind == "decoder":
      raise ConversionError(f"{prefix}embed_tokens.weight is missing: a decoder reads tokens")
    if kind == "decoder":
      output = f"{prefix}output_projection.weight"
      keys = ("share_all_embeddings", "share_decoder_input_output_embed")
      key = next((key for key in keys if config.get(key)), keys[1])
      fields["tied"] = reader.tied(key, output, f"{prefix}embed_tokens.weight")
      stacks[kind] = CausalLM(**fields)
    else:
      fields["experts"] = tuple(EXPERTS) if multiway else ()
      stacks[kind] = Encoder(**fields)

  if model == "EncoderDecoder":
    shared = reader.tied(
      "share_all_embeddings", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight"
    )
    return EncoderDecoder(**stacks, shared_embedding=shared)
  if model == "BEiT3":
    rows = {e: reader.shape(f"encoder.embed_positions.{e}.weight")[0] for e in "AB"}
    return BEiT3(
      encoder=stacks["encoder"],
      vocab_size=reader.shape("text_embed.weight")[0],
      num_patches=rows["A"] - OFFSET - 1,
      patch_size=reader.shape("vision_embed.proj.weight")[-1],
      max_text_length=rows["B"] - OFFSET,
      position_offset=OFFSET,
    )
  if model == "Encoder" and reader.has("output_projection.weight"):
    tied = reader.tied(
      "share_encoder_input_output_embed", "output_projection.weight", "embed_tokens.weight"
    )
    return MaskedLM(encoder=stacks["encoder"], head="linear", tied=tied)
  return stacks[model.lower()]


# ---------------------------------------------------------------------------------------------
# There and back
# ---------------------------------------------------------------------------------------------


def _class(model: nn.Module) -> str:
  """The name of torchscale's class; raises for models that it has no class for."""
  if isinstance(model, MaskedLM) and model.head != "linear":
    raise ConversionError('torchscale has no head but head="linear": this model cannot be written')
  classes = {Encoder: "Encoder", MaskedLM: "Encoder", CausalLM: "Decoder"}
  classes |= {EncoderDecoder: "EncoderDecoder", BEiT3: "BEiT3"}
  if type(model) not in classes:
    raise ConversionError(f"torchscale has no class for a {type(model).__name__}")
  return classes[type(model)]


def _inputs(model: nn.Module) -> tuple[tuple, dict]:
  """Arguments that initialise a model."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  if isinstance(model, EncoderDecoder):
    return (tokens, tokens), {}
  if isinstance(model, BEiT3):
    side = model.patch_size * math.isqrt(model.num_patches)
    return (jnp.zeros((1, side, side, 3)), tokens), {}
  if isinstance(model, Encoder):
    lengths = {"lengths": (1, *(0 for _ in model.experts[1:]))} if model.experts else {}
    if model.vocab_size is None:
      return (), {"embeddings_BTD": jnp.zeros((1, 1, model.width)), **lengths}
  return (tokens,), {}


def places(model: nn.Module) -> list[layout.Place]:
  """Where each tensor of torchscale lies in the model's parameters."""
  args, kwargs = _inputs(model)
  shapes = layout.shapes_of(model, *args, **kwargs)
  return layout.places(shapes, functools.partial(_name, model=_class(model)))


def _copies(model: nn.Module) -> dict[str, str]:
  """Names that torchscale keeps beside the tensor they share."""
  copies = {}
  if isinstance(model, EncoderDecoder):
    if model.shared_embedding:
      copies["decoder.embed_tokens.weight"] = "encoder.embed_tokens.weight"
    if model.decoder.tied:
      stack = "encoder" if model.shared_embedding else "decoder"
      copies["decoder.output_projection.weight"] = f"{stack}.embed_tokens.weight"
  elif isinstance(model, CausalLM | MaskedLM) and model.tied:
    copies["output_projection.weight"] = "embed_tokens.weight"
  return copies


def _buffers(model: nn.Module, names) -> dict[str, np.ndarray]:
  """xPos's scales, which torchscale keeps in each layer: no parameters, but numbers that we have."""
  scales = {}
  stacks = {"": model}
  if isinstance(model, EncoderDecoder):
    stacks = {"encoder.": model.encoder, "decoder.": model.decoder}
  elif isinstance(model, MaskedLM | BEiT3):
    stacks = {"encoder." if isinstance(model, BEiT3) else "": model.encoder}
  for prefix, stack in stacks.items():
    positions = stack.positions if isinstance(stack.positions, tuple) else (stack.positions,)
    if "xpos" in positions:
      head_dim = stack.width // stack.num_heads
      zeta = (np.arange(0, head_dim, 2, dtype=np.float32) + np.float32(0.4 * head_dim)) / np.float32(
        1.4 * head_dim
      )
      for layer in range(stack.recipe.num_layers):
        scales[f"{prefix}layers.{layer}.self_attn.xpos.scale"] = zeta
  return scales


def from_torchscale(
  state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
  """The model and its variables that a state dict of torchscale holds.

  Args:
    state_dict: arrays by torchscale's names.
    config: the keywords of its EncoderConfig, DecoderConfig or EncoderDecoderConfig. Sizes, norms,
      multiway, tied tables and relative positions are read from the tensors, which the keywords
      must not contradict; the number of heads must be given; what else no tensor shows
      (`activation_fn`, `deepnorm`, `no_scale_embedding`, `layernorm_eps`, `xpos_scale_base`) has
      torchscale's defaults.

  Returns:
    (model, variables): a `CausalLM`, an `Encoder` or `MaskedLM` (with an output projection), an
    `EncoderDecoder` or a `BEiT3`. torchscale counts positions without regard to padding: give
    `positions_BT` for sequences padded on the left.

  Raises:
    ConversionError: for what is missing, unknown, of another shape, not finite or contradictory.
  """
  model, variables, _ = read(state_dict, config)
  return model, variables


def read(state_dict, config=None) -> tuple[nn.Module, dict[str, Any], dict[str, np.ndarray]]:
  """`from_torchscale`, and third the known tensors that are no parameters of the model."""
  tensors = dict(state_dict)
  model = build(tensors, config or {})
  buffers = _buffers(model, tensors)
  params, rest = layout.read(
    places(model), tensors, copies=_copies(model), known=buffers.__contains__
  )
  for name, tensor in rest.items():
    if not np.allclose(tensor, buffers[name], rtol=1e-5):
      raise ConversionError(f"{name} has not xPos's values: this is another position encoding")
  return model, {"params": params}, rest


def to_torchscale(model: nn.Module, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The state dict of a model: what `from_torchscale` read, bit for bit.

  Raises:
    ConversionError: if torchscale has no such model, or no name for one of the parameters.
  """
  tensors = layout.write(places(model), variables["params"], copies=_copies(model))
  return tensors | _buffers(model, tensors)
