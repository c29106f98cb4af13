"""What a model computes apart from its weights, to hold two models against each other."""

import dataclasses
import math
from typing import Any

from flax import linen as nn

from magneto_jax.convert.files import ConversionError
from magneto_jax.models.backbone import Backbone
from magneto_jax.models.beit3 import BEiT3
from magneto_jax.models.language import CausalLM
from magneto_jax.theory import records


def check_same(ours: nn.Module, theirs: nn.Module, library: str) -> None:
  """Raises ConversionError, naming each difference, unless both compute the same."""
  own, other = facts(ours), facts(theirs)
  different = [
    f"{name} would be {other.get(name)!r}, not {own.get(name)!r}"
    for name in own | other
    if not _equal(own.get(name), other.get(name))
  ]
  if different:
    raise ConversionError(f"{library} has no such model: {'; '.join(different)}")


def facts(model: nn.Module) -> dict[str, Any]:
  """What distinguishes one model from another, by name; inits and training's choices do not."""
  if isinstance(model, Backbone):
    return _stack_facts(model)
  # What a library takes as it is: where tables begin, whether they are shared, a scale of 1.
  unused = {"parent", "name", "position_offset", "tied", "shared_embedding"}
  if isinstance(model, BEiT3) and float(model.encoder.recipe.embedding.scale) == 1.0:
    unused.add("scale_patches")
  found = {}
  for field in dataclasses.fields(model):
    value = getattr(model, field.name)
    if field.name in unused:
      continue
    if isinstance(value, nn.Module):
      found |= {f"{field.name}.{name}": fact for name, fact in facts(value).items()}
    else:
      found[field.name] = value
  return found


def _stack_facts(model: Backbone) -> dict[str, Any]:
  """Of one stack; what is not in use is left out, and defaults are what they stand for."""
  kinds = model.position_kinds
  found = {
    "vocab_size": model.vocab_size,
    "width": model.width,
    "num_heads": model.num_heads,
    "num_kv_heads": model.num_kv_heads or model.num_heads,
    "head_dim": model.head_dim or model.width // model.num_heads,
    "ffn_width": model.ffn_width,
    "use_bias": model.use_bias,
    "activation": model.activation,
    "positions": tuple(sorted(kind for kind in kinds if kind != "none")),
    "relative_buckets": model.relative_buckets,
    "relative_cross": model.relative_cross,
    "window": model.window,
    "logits_soft_cap": model.logits_soft_cap,
    "norm_epsilon": model.norm_epsilon,
    "experts": getattr(model, "experts", None),
    "shared_attention": getattr(model, "shared_attention", False),
    "fusion_layers": getattr(model, "fusion_layers", 0),
  }
  if "learned" in kinds:
    found["max_length"] = model.max_length
  if "sinusoidal" in kinds:
    found["position_offset"] = model.position_offset
  if "xpos" in kinds:
    found["xpos_scale_base"] = model.xpos_scale_base
  if model.relative_buckets:
    both = model.relative_bidirectional
    found["relative_max_distance"] = model.relative_max_distance
    found["relative_bidirectional"] = not isinstance(model, CausalLM) if both is None else both
  return found | _recipe_facts(model.recipe)


def _recipe_facts(stack: records.Stack) -> dict[str, Any]:
  # Of norms, the kind and the sites that share a name; whether they are there is in the weights.
  found = {
    "norm": stack.norm,
    "embedding scale": float(stack.embedding.scale),
    "layers": stack.num_layers,
  }
  for number, layer in enumerate(stack.layers):
    for name, sublayer in layer.sublayers.items():
      at = f"layer {number} {name}"
      found[f"{at} norms"] = tuple(sorted(sublayer.norms))
      for scale in ("skip", "branch", "in_scale"):
        record = getattr(sublayer, scale)
        found[f"{at} {scale}"] = record.learned or float(record.value)
      for choice in ("head_scale", "qk_norm"):
        found[f"{at} {choice}"] = getattr(sublayer, choice, None)
  return found


def _equal(one, other) -> bool:
  if isinstance(one, float) and isinstance(other, float):
    return math.isclose(one, other, rel_tol=1e-6)
  return one == other
