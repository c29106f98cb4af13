"""Released BEiT-3 checkpoints: torchscale's BEiT3 under a prefix, with a task's head beside it.

| tensors beside the encoder                       | model             | of                  |
|--------------------------------------------------|-------------------|---------------------|
| `mim_head.*`                                     | `MaskedBEiT3`     | pre-training        |
| `vision_head.*`, `language_head.*`, `logit_scale`| `RetrievalBEiT3`  | retrieval           |
| `mlm_head.*`                                     | `CaptioningBEiT3` | captioning          |
| `pooler.*`, `head.0.*`, `head.1.*`, `head.3.*`   | `AnsweringBEiT3`  | question answering  |
| `head.norm1.*`, `dense1`, `norm2`, `dense2`      | `ReasoningBEiT3`  | NLVR2               |
| none, or others                                  | `BEiT3`           |                     |

Of several the first in the table is read. Tensors of other heads (`fc_norm.*` and `head.*` of image
classification, the text's head of a pre-trained model) are kept for the way back.

Reference: microsoft/unilm, beit3/ (names, and the interpolation of positions).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from magneto_jax.convert import layout, torchscale
from magneto_jax.convert.files import ConversionError, check_finite
from magneto_jax.convert.reader import Reader
from magneto_jax.layers.patches import resized_positions
from magneto_jax.models.beit3 import BEiT3
from magneto_jax.models.vision import VisionEncoder
from magneto_jax.models.vision_language import (
  AnsweringBEiT3,
  CaptioningBEiT3,
  MaskedBEiT3,
  ReasoningBEiT3,
  RetrievalBEiT3,
)

PREFIX = "beit3."
# What the names of heads begin with.
HEADS = (
  "fc_norm.",
  "head.",
  "language_head.",
  "logit_scale",
  "mim_head.",
  "mlm_head.",
  "pooler.",
  "vision_head.",
)
# Attention's heads of the released sizes, base and large, by width.
_HEADS_OF_WIDTH = {768: 12, 1024: 16}
# The mask's token of the released vocabulary, by its size.
_MASK_OF_VOCABULARY = {64010: 64001}
DEFAULTS = torchscale.DEFAULTS


class Head(NamedTuple):
  """A task's head.

  Attributes:
    model: the class; marker: the tensor that shows that it is there.
    names: our modules -> theirs; of a module that is no module there, the whole names.
    build: from the encoder and what the file holds to the model.
  """

  model: type[nn.Module]
  marker: str
  names: Mapping[str, str]
  build: Callable[[BEiT3, Reader], nn.Module]


def _retrieval(encoder: BEiT3, reader: Reader) -> RetrievalBEiT3:
  features = reader.shape("vision_head.weight")[0]
  own = features == encoder.encoder.width
  return RetrievalBEiT3(encoder=encoder, features=None if own else features)


def _captioning(encoder: BEiT3, reader: Reader) -> CaptioningBEiT3:
  known = _MASK_OF_VOCABULARY.get(encoder.vocab_size)
  if known is None:
    known = reader.need("mask_token_id", 1, "no tensor shows which token is the mask")
  mask_id = reader.get("mask_token_id", known)
  if mask_id >= encoder.vocab_size:
    raise ConversionError(f"mask_token_id={mask_id} is not in a vocabulary of {encoder.vocab_size}")
  return CaptioningBEiT3(encoder=encoder, mask_id=mask_id)


def _rows(model: type[nn.Module], field: str, tensor: str):
  """The builder of a model one of whose fields is how many rows a tensor has."""
  return lambda encoder, reader: model(encoder=encoder, **{field: reader.shape(tensor)[0]})


# In the order in which they are looked for.
TASKS = (
  Head(
    MaskedBEiT3,
    "mim_head.weight",
    {"output_embedding": "mim_head", "head_bias": "mim_head.bias"},
    _rows(MaskedBEiT3, "image_vocab_size", "mim_head.weight"),
  ),
  Head(
    RetrievalBEiT3,
    "vision_head.weight",
    {"image_head": "vision_head", "text_head": "language_head", "logit_scale": "logit_scale"},
    _retrieval,
  ),
  Head(
    CaptioningBEiT3,
    "mlm_head.weight",
    {"output_embedding": "mlm_head", "head_bias": "mlm_head.bias"},
    _captioning,
  ),
  Head(
    AnsweringBEiT3,
    "pooler.dense.weight",
    {
      "pooler_norm": "pooler.norm",
      "pooler_dense": "pooler.dense",
      "head_dense": "head.0",
      "head_norm": "head.1",
      "head_out": "head.3",
    },
    _rows(AnsweringBEiT3, "answers", "head.3.weight"),
  ),
  Head(
    ReasoningBEiT3,
    "head.dense1.weight",
    {
      "pooler_norm": "head.norm1",
      "head_dense": "head.dense1",
      "head_norm": "head.norm2",
      "head_out": "head.dense2",
    },
    _rows(ReasoningBEiT3, "classes", "head.dense2.weight"),
  ),
)
_POSITIONS = "encoder.embed_positions.A.weight"
# Rows before the patches': two that are never read, and the class token's.
_BEFORE = torchscale.OFFSET + 1


def from_beit3(
  state_dict: Mapping[str, np.ndarray],
  config: Mapping[str, Any] | None = None,
  *,
  image_size: int | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
  """The model and its variables that a released checkpoint holds, by its head one of the table.

  Args:
    state_dict: arrays by their names, with the prefix `beit3.` or without.
    config: torchscale's keywords, and `mask_token_id` of a captioning model; the released sizes
      need none.
    image_size: pixels on an image's side to use the model at, in place of its own: the patches'
      positions are interpolated bicubically, as the released code does.

  Raises:
    ConversionError: for what is missing, unknown, of another shape, not finite or contradictory.
  """
  model, variables, _ = read(state_dict, config, image_size=image_size)
  return model, variables


def read(state_dict, config=None, *, image_size: int | None = None):
  """`from_beit3`, and third the tensors that are no parameter of the model."""
  named = {name: np.asarray(tensor) for name, tensor in state_dict.items()}
  kept = {name: tensor for name, tensor in named.items() if name.startswith(HEADS)}
  check_finite(kept)
  is_prefixed = any(name.startswith(PREFIX) for name in named)
  unknown = [n for n in named if is_prefixed and not n.startswith((PREFIX, *HEADS))]
  if unknown:
    raise ConversionError(f"unknown, as all others begin with {PREFIX}: {', '.join(unknown)}")
  tensors = {name.removeprefix(PREFIX): named[name] for name in named if name not in kept}
  if not {_POSITIONS, "text_embed.weight"} <= tensors.keys():
    raise ConversionError(f"this is no BEiT-3: {_POSITIONS} and text_embed.weight are needed")
  reader = Reader(tensors, config or {})
  width = reader.shape("text_embed.weight")[1]
  known = {"encoder_attention_heads": _HEADS_OF_WIDTH[width]} if width in _HEADS_OF_WIDTH else {}
  if image_size is not None:
    patch = reader.shape("vision_embed.proj.weight", 4)[-1]
    reader.shape(_POSITIONS)
    tensors[_POSITIONS] = _resized(tensors[_POSITIONS], image_size, patch)
  encoder, variables, rest = torchscale.read(tensors, known | reader.config)
  rest = {PREFIX + name: tensor for name, tensor in rest.items()}
  head = next((head for head in TASKS if head.marker in kept), None)
  if head is None:
    return encoder, variables, kept | rest
  model = head.build(encoder, Reader(kept, reader.config))
  found = _places(model)
  names = {place.name for place in found}
  params, _ = layout.read(found, {n: t for n, t in kept.items() if n in names})
  rest |= {name: tensor for name, tensor in kept.items() if name not in names}
  return model, {"params": {"encoder": variables["params"], **params}}, rest


def to_beit3(model: nn.Module, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The state dict of a `BEiT3`, alone or with a head, by the names of the released files."""
  if isinstance(model, BEiT3):
    tensors = torchscale.to_torchscale(model, variables)
    return {PREFIX + name: tensor for name, tensor in tensors.items()}
  params = dict(variables["params"])
  found = _places(model)
  encoder = to_beit3(model.encoder, {"params": params.pop("encoder")})
  return encoder | layout.write(found, params)


def vision_of(
  model: nn.Module, variables: Mapping[str, Any]
) -> tuple[VisionEncoder, dict[str, Any]]:
  """The encoder of images that a `BEiT3`, alone or with a head, is where there is no text.

  It computes what the model does of images alone, and is what image classification starts with.

  Raises:
    ConversionError: the model scales patches, which a `VisionEncoder` does not.
  """
  params = variables["params"]
  if not isinstance(model, BEiT3):
    model, params = model.encoder, params["encoder"]
  encoder = model.encoder
  if model.scale_patches and float(encoder.recipe.embedding.scale) != 1.0:
    raise ConversionError("the model scales its patches, which an encoder of images does not")
  vision = VisionEncoder(
    encoder=encoder.clone(
      experts=(),
      shared_attention=False,
      fusion_layers=0,
      positions=("learned", *(kind for kind in encoder.position_kinds if kind != "none")),
      max_length=1 + model.num_patches,
      position_offset=model.position_offset,
    ),
    patch_size=model.patch_size,
    mask_token=True,
  )
  inner = _expert(params["encoder"], "vision")
  inner["position_embedding"] = params["position_embeddings_vision"]
  return vision, {"params": {"encoder": inner, "patch_embedding": params["patch_embedding"]}}


def _expert(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
  """Parameters with one expert's in the place of all."""
  if name in tree:
    return dict(tree[name])
  return {k: _expert(v, name) if isinstance(v, Mapping) else v for k, v in tree.items()}


def config_of(model: nn.Module) -> dict[str, Any]:
  """The configuration with which `from_beit3` reads the model."""
  if isinstance(model, BEiT3):
    return torchscale.config_of(model)
  config = torchscale.config_of(model.encoder)
  if isinstance(model, CaptioningBEiT3):
    config["mask_token_id"] = model.mask_id
  return config


@functools.lru_cache(maxsize=8)
def _places(model: nn.Module) -> list[layout.Place]:
  """Where each tensor of a model's head lies in its parameters."""
  names = next((head.names for head in TASKS if head.model is type(model)), None)
  if names is None:
    raise ConversionError(f"BEiT-3's files hold no {type(model).__name__}")

  def name_of(path: layout.Path, layer: int | None) -> str:
    *modules, leaf = path
    module = names["/".join(modules) or leaf]
    return f"{module}.{layout.LEAVES[leaf]}" if modules else module

  # In here nothing has memory: a checkpoint may show an image of any size.
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs_of(model)))["params"]
  return layout.places({name: tree for name, tree in shapes.items() if name != "encoder"}, name_of)


def inputs_of(model: nn.Module) -> tuple[jax.Array, jax.Array]:
  """Images and texts that initialise a model with a head."""
  (images, tokens), _ = torchscale.inputs_of(model.encoder)
  return jnp.stack([images, images], 1) if isinstance(model, ReasoningBEiT3) else images, tokens


def _resized(table: np.ndarray, image_size: int, patch_size: int) -> np.ndarray:
  """The table of positions for images of another size."""
  patches = table[_BEFORE:]
  old, new = math.isqrt(len(patches)), image_size // patch_size
  if old < 1 or old * old != len(patches):
    raise ConversionError(
      f"{len(patches)} patches are no square: their positions cannot be resized"
    )
  if new * patch_size != image_size or new < 1:
    raise ConversionError(f"{image_size=} must be a multiple of the patch size {patch_size}")
  before, patches = (np.asarray(rows, np.float32) for rows in (table[:_BEFORE], patches))
  return np.concatenate([before, resized_positions(patches, (old, old), (new, new))])
