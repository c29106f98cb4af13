"""Checkpoints of torchscale: Encoder, Decoder, EncoderDecoder and BEiT3.

Reference: microsoft/torchscale 4d1e0e8, architecture/ and model/BEiT3.py. Mixture of experts,
RetNet and LongNet are not read.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from magneto_jax.convert import layout
from magneto_jax.convert.facts import check_same
from magneto_jax.convert.files import ConversionError
from magneto_jax.convert.reader import Reader
from magneto_jax.models.beit3 import BEiT3
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.encoder_decoder import EncoderDecoder
from magneto_jax.models.language import CausalLM, MaskedLM
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
# A stack's tables of relative biases, of its self-attention and of its cross-attention.
RELATIVE = {
  kind: tuple(f"{name}.relative_attention_bias.weight" for name in names)
  for kind, names in {
    "encoder": ("relative_position", "cross_attn_relative_position"),
    "decoder": ("self_attn_relative_position", "cross_attn_relative_position"),
  }.items()
}


def _stack_name(path: layout.Path, layer: int | None, kind: str) -> str:
  """The name of a parameter of one stack, without the stack's own prefix."""
  *modules, leaf = path
  letter = "".join(EXPERTS.get(module, "") for module in modules)
  key = "/".join(module for module in modules if module not in EXPERTS)
  if leaf in ("relative_bias", "cross_relative_bias"):
    return RELATIVE[kind][leaf == "cross_relative_bias"]
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


def _model(reader: Reader) -> str:
  """Which of torchscale's classes the tensors are of."""
  if reader.holds("vision_embed."):
    return "BEiT3"
  if reader.depth("encoder.") and reader.depth("decoder."):
    return "EncoderDecoder"
  if not reader.depth(""):
    raise ConversionError(
      "this is no state dict of torchscale: it needs layers.0..., or both encoder.layers.0... and"
      " decoder.layers.0..., and released BEiT-3 files --from=beit3"
    )
  for kind, (table, _) in RELATIVE.items():
    if reader.has(table):
      return kind.capitalize()
  named = [kind for kind in RELATIVE if f"{kind}_attention_heads" in reader.config]
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
  "xpos_scale_base": 512.0,
}


def _get(reader: Reader, key: str):
  return reader.get(key, DEFAULTS[key])


def _norms(reader: Reader, kind: str, *, is_subln: bool, is_final: bool) -> tuple[bool, bool]:
  """Whether a stack is pre-norm, and whether it has DeepNorm's residual weights.

  The tensors show the inner and the final norms. torchscale's default is Sub-LN, so where there are
  no inner norms the configuration of the model speaks of it, or is not whole.
  """
  before = f"{kind}_normalize_before"
  is_deepnorm = _get(reader, "deepnorm")
  if is_subln:
    if is_deepnorm:
      raise ConversionError("deepnorm is set, but the tensors have Sub-LN's inner norms")
    reader.agreed("subln", True)
    if kind == "encoder":
      reader.agreed("normalize_output", is_final)
    elif reader.get(before, False):
      reader.agreed(before, is_final)
    # Of HEAD, a decoder with Sub-LN can be post-norm.
    return is_final or kind == "encoder", False
  if not {"deepnorm", "subln"} & reader.config.keys():
    raise ConversionError(
      "the configuration must give deepnorm: no tensor shows whether there is DeepNorm"
    )
  if is_deepnorm:
    # Of HEAD, a decoder with DeepNorm can be pre-norm.
    if is_final and kind == "encoder":
      raise ConversionError("deepnorm is set, but the tensors have a final norm")
    return is_final, True
  reader.agreed("subln", False)
  if kind == "decoder" or is_final:
    return reader.agreed(before, is_final), False
  if before not in reader.config and reader.get("normalize_output", True):
    raise ConversionError(
      f"the configuration must give {before}: no tensor shows whether this is Post-LN, or Pre-LN"
      " without a final norm"
    )
  return reader.get(before, True), False


def _stack(reader: Reader, kind: str, prefixes: dict[str, str], *, multiway: bool):
  """The fields of the model of one stack."""
  prefix, a = prefixes[kind], ".A" if multiway else ""
  first = f"{prefix}layers.0."
  table = prefix + RELATIVE[kind][0]
  is_relative = all(reader.get(key, 0) for key in ("rel_pos_buckets", "max_rel_pos"))
  buckets, shown = reader.shape(table) if is_relative or reader.has(table) else (0, None)
  # Half of the buckets are of keys ahead, and half of the others are of one distance each.
  distance = reader.need("max_rel_pos", 1, "no tensor shows it") if buckets else 128
  if buckets and (buckets < 4 or distance <= buckets // 4):
    raise ConversionError(f"max_rel_pos={distance} must exceed a quarter of {buckets} buckets")
  width = reader.agreed(f"{kind}_embed_dim", reader.shape(f"{first}self_attn.q_proj{a}.weight")[1])
  layers = {f"{k}_layers": reader.depth(p) for k, p in prefixes.items()}
  architecture = records.Architecture(
    "_".join(prefixes),
    **{key: reader.agreed(key, value) for key, value in layers.items()},
    width=width,
    ffn_width=reader.agreed(f"{kind}_ffn_embed_dim", reader.shape(f"{first}ffn{a}.fc1.weight")[0]),
    heads=reader.heads(f"{kind}_attention_heads", width, shown),
  )
  activation = reader.choice("activation_fn", ACTIVATIONS, DEFAULTS["activation_fn"])
  # Of any layer, and the weight or the bias: if one is missing, it is named as such.
  inner = (".inner_attn_ln.", ".ffn_layernorm.")
  is_subln = any(reader.holds(f"{prefix}layers.", part) for part in inner)
  is_final = reader.holds(f"{prefix}layer_norm.")
  is_pre, is_deepnorm = _norms(reader, kind, is_subln=is_subln, is_final=is_final)
  positions = f"{prefix}embed_positions.weight"
  rows = reader.positions(positions, OFFSET) if reader.has(positions) else 0
  kinds = ("learned",) if rows else ()
  if reader.agreed("xpos_rel_pos", reader.holds(f"{prefix}layers.", ".xpos.")):
    kinds += ("xpos",)
  return {
    "recipe": _recipe(
      architecture,
      kind,
      is_pre=is_pre,
      is_subln=is_subln,
      is_deepnorm=is_deepnorm,
      final_norm=is_final,
      embedding_norm=reader.agreed(
        "layernorm_embedding", reader.holds(f"{prefix}layernorm_embedding.")
      ),
      scale=1.0 if _get(reader, "no_scale_embedding") else math.sqrt(width),
    ),
    "width": width,
    "num_heads": architecture.heads,
    "ffn_width": architecture.ffn_width,
    "activation": ACTIVATIONS[activation],
    "positions": kinds if len(kinds) > 1 else "".join(kinds) or "none",
    "max_length": rows or 1024,
    "position_offset": OFFSET,
    "xpos_scale_base": float(_get(reader, "xpos_scale_base")),
    "relative_buckets": reader.agreed("rel_pos_buckets", buckets) if buckets else 0,
    "relative_max_distance": distance,
    "relative_bidirectional": True,
    "relative_cross": kind == "decoder" and len(prefixes) > 1 and buckets > 0,
    "norm_epsilon": float(_get(reader, "layernorm_eps")),
  }


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
  reader = Reader(tensors, config)
  if reader.get("moe_freq", 0) or any(".moe_layer." in name for name in tensors):
    raise ConversionError("mixture of experts (moe_freq > 0) is not supported")
  model = _model(reader)
  prefixes = {
    "Encoder": {"encoder": ""},
    "Decoder": {"decoder": ""},
    "EncoderDecoder": {"encoder": "encoder.", "decoder": "decoder."},
    "BEiT3": {"encoder": "encoder."},
  }[model]
  multiway = reader.agreed("multiway", any(".self_attn.q_proj.A." in name for name in tensors))
  if multiway and "decoder" in prefixes:
    raise ConversionError("multiway decoders are not supported: only encoders have two experts")

  stacks = {}
  shared = model == "EncoderDecoder" and _is_tied(
    reader, "decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "share_all_embeddings"
  )
  for kind, prefix in prefixes.items():
    fields = _stack(reader, kind, prefixes, multiway=multiway)
    tokens, output = f"{prefix}embed_tokens.weight", f"{prefix}output_projection.weight"
    if kind == "decoder":
      tokens = "encoder.embed_tokens.weight" if shared else tokens
      fields["vocab_size"] = _vocabulary(reader, tokens)
      fields["tied"] = _is_tied(
        reader, output, tokens, "share_decoder_input_output_embed", "share_all_embeddings"
      )
      stacks[kind] = CausalLM(**fields)
    else:
      # Alone, an encoder may be of embeddings.
      if reader.has(tokens) or reader.has(output) or len(prefixes) > 1:
        fields["vocab_size"] = reader.shape(tokens)[0]
      stacks[kind] = Encoder(**fields, experts=tuple(EXPERTS) if multiway else ())

  if model == "EncoderDecoder":
    return EncoderDecoder(**stacks, shared_embedding=shared)
  if model == "BEiT3":
    return _beit3(reader, stacks["encoder"])
  if model == "Encoder" and reader.has("output_projection.weight"):
    tokens, output = "embed_tokens.weight", "output_projection.weight"
    tied = _is_tied(reader, output, tokens, "share_encoder_input_output_embed")
    return MaskedLM(encoder=stacks["encoder"], head="linear", tied=tied)
  return stacks[model.lower()]


def _is_tied(reader: Reader, copy: str, original: str, *keys: str) -> bool:
  """Whether one table is another, which each of the keywords would make it."""
  is_configured = any(reader.get(key, False) for key in keys)
  return reader.tied(copy, original, is_configured, " or ".join(keys))


def _vocabulary(reader: Reader, table: str) -> int:
  """The rows of a table; a configuration of -1 leaves them to whoever gives the table."""
  rows = reader.shape(table)[0]
  return rows if reader.config.get("vocab_size") == -1 else reader.agreed("vocab_size", rows)


def _beit3(reader: Reader, encoder: Encoder) -> BEiT3:
  return BEiT3(
    encoder=encoder,
    vocab_size=_vocabulary(reader, "text_embed.weight"),
    num_patches=reader.positions("encoder.embed_positions.A.weight", OFFSET + 1),
    patch_size=reader.agreed("patch_size", reader.shape("vision_embed.proj.weight", 4)[-1]),
    max_text_length=reader.positions("encoder.embed_positions.B.weight", OFFSET),
    position_offset=OFFSET,
    scale_patches=True,
  )


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
  stack = next(stack for _, stack in _stacks(model).values())
  if getattr(stack, "shared_attention", False) or getattr(stack, "fusion_layers", 0):
    raise ConversionError(
      "torchscale has neither shared attention nor fusion layers: this model cannot be written"
    )
  return classes[type(model)]


def inputs_of(model: nn.Module) -> tuple[tuple, dict]:
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


@functools.lru_cache(maxsize=8)
def places(model: nn.Module) -> list[layout.Place]:
  """Where each tensor of torchscale lies in the model's parameters."""
  name_of = functools.partial(_name, model=_class(model))

  def init():
    # In here nothing has memory: a checkpoint may show an image of any size.
    args, kwargs = inputs_of(model)
    return model.init(jax.random.key(0), *args, **kwargs)["params"]

  return layout.places(jax.eval_shape(init), name_of)


def _stacks(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
  """(prefix, stack) of each kind of stack that a model has."""
  if isinstance(model, EncoderDecoder):
    return {"encoder": ("encoder.", model.encoder), "decoder": ("decoder.", model.decoder)}
  if isinstance(model, BEiT3):
    return {"encoder": ("encoder.", model.encoder)}
  if isinstance(model, CausalLM):
    return {"decoder": ("", model)}
  return {"encoder": ("", model.encoder if isinstance(model, MaskedLM) else model)}


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


def _buffers(model: nn.Module) -> dict[str, np.ndarray]:
  """xPos's scales, which torchscale keeps in each layer: no parameters, but known numbers."""
  scales = {}
  for prefix, stack in _stacks(model).values():
    if "xpos" not in stack.position_kinds:
      continue
    head_dim = stack.width // stack.num_heads
    zeta = (np.arange(0, head_dim, 2, dtype=np.float32) + np.float32(0.4 * head_dim)) / np.float32(
      1.4 * head_dim
    )
    for layer in range(stack.recipe.num_layers):
      scales[f"{prefix}layers.{layer}.self_attn.xpos.scale"] = zeta
  return scales


def config_of(model: nn.Module) -> dict[str, Any]:
  """The keywords of torchscale's configuration with which `from_torchscale` reads the model."""
  spelt = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
  config = {}
  for kind, (_, stack) in _stacks(model).items():
    sublayer = stack.recipe.layers[0].self_attention
    config |= {
      f"{kind}_attention_heads": stack.num_heads,
      f"{kind}_normalize_before": "in" in sublayer.norms,
      "subln": "mid" in sublayer.norms,
      "deepnorm": sublayer.skip.learned is None and float(sublayer.skip.value) != 1.0,
      "no_scale_embedding": float(stack.recipe.embedding.scale) == 1.0,
      "activation_fn": spelt.get(stack.activation, stack.activation),
      "layernorm_eps": stack.norm_epsilon,
    }
    if stack.relative_buckets:
      config["max_rel_pos"] = stack.relative_max_distance
    if "xpos" in stack.position_kinds:
      config["xpos_scale_base"] = stack.xpos_scale_base
  if isinstance(model, EncoderDecoder):
    config["share_all_embeddings"] = model.shared_embedding and model.decoder.tied
    config["share_decoder_input_output_embed"] = model.decoder.tied
  if isinstance(model, CausalLM):
    config["share_decoder_input_output_embed"] = model.tied
  if isinstance(model, MaskedLM):
    config["share_encoder_input_output_embed"] = model.tied
  return config


def from_torchscale(
  state_dict: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
  """The model and its variables that a state dict of torchscale holds.

  Args:
    state_dict: arrays, or anything that NumPy takes for one, by torchscale's names.
    config: the keywords of its EncoderConfig, DecoderConfig or EncoderDecoderConfig. Sizes, norms,
      multiway, tied tables and relative positions are read from the tensors, which the keywords
      must not contradict. What no tensor shows must be given: the number of heads;
      `max_rel_pos` where there are relative positions; `deepnorm` where there is no Sub-LN, and
      `encoder_normalize_before` where there is no final norm either. The rest (`activation_fn`,
      `no_scale_embedding`, `layernorm_eps`, `xpos_scale_base`) has torchscale's defaults.

  Returns:
    (model, variables): a `CausalLM`, an `Encoder` or `MaskedLM` (with an output projection), an
    `EncoderDecoder` or a `BEiT3`. Parameters are float32. torchscale counts positions without
    regard to padding: give `positions_BT` for sequences with padding before tokens.

  Raises:
    ConversionError: for what is missing, unknown, of another shape, not finite or contradictory.
  """
  model, variables, _ = read(state_dict, config)
  return model, variables


def read(state_dict, config=None) -> tuple[nn.Module, dict[str, Any], dict[str, np.ndarray]]:
  """`from_torchscale`, and third the known tensors that are no parameters of the model."""
  tensors = {name: np.asarray(tensor) for name, tensor in state_dict.items()}
  model = build(tensors, config or {})
  buffers = _buffers(model)
  params, rest = layout.read(
    places(model), tensors, copies=_copies(model), known=buffers.__contains__
  )
  for name, tensor in rest.items():
    if tensor.shape != buffers[name].shape or not np.allclose(tensor, buffers[name], rtol=1e-3):
      raise ConversionError(f"{name} has not xPos's values: this is another position encoding")
  return model, {"params": params}, rest


def to_torchscale(model: nn.Module, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The state dict of a model, in float32: what `from_torchscale` read, number for number.

  `config_of` has the configuration that goes with it. A table of learned positions that begins with
  position 0 is written behind the two rows that torchscale skips.

  Raises:
    ConversionError: if torchscale has no such model, or no name for one of the parameters.
  """
  tensors = layout.write(places(model), variables["params"], copies=_copies(model))
  for prefix, stack in _stacks(model).values():
    owner = model if isinstance(model, BEiT3) else stack
    layout.begin_positions_at(tensors, f"{prefix}embed_positions.", owner.position_offset, OFFSET)
  tensors |= _buffers(model)
  check_same(model, build(tensors, config_of(model)), "torchscale")
  return tensors
