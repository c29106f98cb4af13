"""BEiT-3: one encoder of images, texts and pairs of both."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from magneto_jax.layers.initializers import dense_init, kernel_init
from magneto_jax.layers.patches import PatchEmbedding
from magneto_jax.models.backbone import DecodingState, padding_mask, positions_of
from magneto_jax.models.encoder import Encoder
from magneto_jax.theory import records


class BEiT3(nn.Module, kw_only=True):
  """A multiway encoder of images, texts and pairs: joint attention, an expert a modality.

  Attributes:
    encoder: with `experts=("vision", "text")`, no vocabulary and neither learned nor sinusoidal
      positions, as each modality has positions of its own here. Its `shared_attention` and
      `fusion_layers` say which of the two published forms this is; see `Encoder`.
    vocab_size: V of the texts.
    num_patches: P, patches an image.
    patch_size: p, pixels on a patch's side.
    max_text_length: how many tokens a text may have.
    position_offset: rows of both position tables before position 0; 2 in the released models.
    scale_patches: whether the recipe's scale of embeddings multiplies patches and the class token
      as it does the text's tokens, which torchscale does.

  Reference: BEiT-3 (Image as a Foreign Language), arXiv 2208.10442, section 2.1.
  """

  encoder: Encoder
  vocab_size: int
  num_patches: int
  patch_size: int = 16
  max_text_length: int = 1024
  position_offset: int = 0
  scale_patches: bool = False

  def setup(self):
    width, embedding = self.encoder.width, self.encoder.recipe.embedding
    tables = {"learned", "sinusoidal"} & set(self.encoder.position_kinds)
    if self.encoder.experts != ("vision", "text") or tables:
      raise ValueError(
        'BEiT3 needs an encoder with experts=("vision", "text") and without absolute positions'
      )
    self.text_embedding = nn.Embed(
      self.vocab_size, width, embedding_init=kernel_init(embedding.tokens)
    )
    self.patch_embedding = PatchEmbedding(
      width,
      self.patch_size,
      projection_init=dense_init(embedding.patches),
      mask_token=True,
      dtype=self.encoder.dtype,
    )
    rows = {"vision": 1 + self.num_patches, "text": self.max_text_length}
    self.position_embeddings = {
      name: nn.Embed(
        self.position_offset + length, width, embedding_init=kernel_init(embedding.positions)
      )
      for name, length in rows.items()
    }

  def __call__(
    self,
    images_BHWC: jax.Array | None = None,
    tokens_BT: jax.Array | None = None,
    *,
    mask_BT: jax.Array | None = None,
    masked_BP: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    state: DecodingState | None = None,
    recipe: records.Stack | None = None,
    **kwargs,
  ):
    """Encodes images, texts, or pairs of both.

    Args:
      images_BHWC: pixels; None for texts alone.
      tokens_BT: integers in [0, V); None for images alone.
      mask_BT: True for the text's tokens, False for its padding, on either side; see `Encoder`.
      masked_BP: True for the patches, read row by row, that the mask token replaces.
      positions_BT: of the text; by default the number of its tokens before each, -1 for padding
        (torchscale counts padding too).
      state: an image and earlier tokens (`see`), behind which texts are read; see `Encoder`.
      recipe: a record of the same structure to run instead; see `CausalLM`.
      **kwargs: `visible_BTT`, `fused`, `return_caches`, `return_hidden_states` and `deterministic`
        of `Encoder`.

    Returns:
      [B, 1 + P + T, D]: the class token, the patches and the text, of those that are there; what
      follows it, see `Encoder`.
    """
    if mask_BT is not None and tokens_BT is None:
      raise ValueError("mask_BT is of a text, and there is none")
    if state is not None and images_BHWC is not None:
      raise ValueError("a state has its image already: give the text alone")
    parts = self.embed(images_BHWC, tokens_BT, masked_BP=masked_BP, recipe=recipe)
    is_drawn = self.has_variable("params", "encoder")  # By an earlier call.
    if self.is_initializing() and len(parts) < 2 and not is_drawn:
      raise ValueError("initialise BEiT3 with an image and a text: both have parameters")
    embeddings, masks, positions = [], [], []
    behind, read = 0, 0
    if state is not None:
      behind = state.before
      read = jnp.sum(state.segment_ids_BS > 0, axis=1, keepdims=True)
      # A pair's: the image is in the state.
      kwargs = {"fused": True} | kwargs
    for name, part_BTD in parts.items():
      batch, length, _ = part_BTD.shape
      table = self.position_embeddings[name]
      if length > table.num_embeddings - self.position_offset:
        rows = table.num_embeddings
        raise ValueError(f"{length} positions do not fit the table of {name}, {rows}")
      own = padding_mask((batch, length), mask_BT, None) if name == "text" else None
      places_BT = positions_of((batch, length), own, read)
      if name == "text" and positions_BT is not None:
        places_BT = jnp.asarray(positions_BT)
      embeddings.append(part_BTD + table(jnp.maximum(places_BT + self.position_offset, 0)))
      # Where the encoder rotates, the text stands behind the image.
      before = behind + sum(mask.shape[1] for mask in masks)
      places_BT = jnp.where(places_BT < 0, -1, places_BT + before)
      positions.append(jnp.broadcast_to(places_BT, (batch, length)))
      masks.append(jnp.ones((batch, length), bool) if own is None else own)
    return self.encoder(
      embeddings_BTD=jnp.concatenate(embeddings, axis=1),
      mask_BT=None if mask_BT is None else jnp.concatenate(masks, axis=1),
      positions_BT=jnp.concatenate(positions, axis=1),
      state=state,
      recipe=recipe,
      lengths=tuple(parts[n].shape[1] if n in parts else 0 for n in self.encoder.experts),
      **kwargs,
    )

  def see(self, images_BHWC: jax.Array, length: int) -> DecodingState:
    """The state in which images have been seen, with room for `length` tokens behind them.

    No image sees a text that is read behind it; see `caption_mask`, which is the same in one call.
    """
    _, caches = self(images_BHWC, fused=True, return_caches=True)
    return self.encoder.state_behind(caches, images_BHWC.shape[0], length)

  def embed(
    self,
    images_BHWC: jax.Array | None = None,
    tokens_BT: jax.Array | None = None,
    *,
    masked_BP: jax.Array | None = None,
    recipe: records.Stack | None = None,
  ) -> dict[str, jax.Array]:
    """Embeddings [B, T, D] without positions, of `vision` and `text`, those that are there."""
    if masked_BP is not None and images_BHWC is None:
      raise ValueError("masked_BP is of an image, and there is none")
    parts, scale = {}, (self.encoder.recipe if recipe is None else recipe).embedding.scale
    if images_BHWC is not None:
      patches_BPD = self.patch_embedding(images_BHWC, masked_BP)
      patches_BPD *= scale if self.scale_patches else 1.0
      parts["vision"] = patches_BPD.astype(self.encoder.dtype)
    if tokens_BT is not None:
      parts["text"] = (self.text_embedding(tokens_BT) * scale).astype(self.encoder.dtype)
    if not parts:
      raise ValueError("give images, tokens, or both")
    return parts


def caption_mask(image_length: int, text_length: int) -> np.ndarray:
  """[1, V + T, V + T], True where the query (first) may see the key: BEiT-3's for captions.

  Images see images; a token of the text sees its image, and of the text what lies before it, and
  itself.

  Args:
    image_length: V, class token and patches.
    text_length: T.

  Example:
    >>> int(caption_mask(3, 3).sum())
    24

  Reference: BEiT-3, arXiv 2208.10442, section 3.1.2.
  """
  length = image_length + text_length
  return (np.arange(length) < image_length) | np.pad(
    np.tri(text_length, dtype=bool), ((image_length, 0), (image_length, 0))
  )[None]
