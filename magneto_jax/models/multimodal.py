"""BEiT-3: one encoder of images, texts and pairs of both."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax.layers.cross_entropy import scores_of
from magneto_jax.layers.initializers import dense_init, kernel_init
from magneto_jax.layers.patches import PatchEmbedding
from magneto_jax.models.backbone import TokenTable, padding_mask, positions_of
from magneto_jax.models.encoder import Encoder
from magneto_jax.theory import records


class BEiT3(nn.Module, kw_only=True):
  """A multiway encoder of images, texts and pairs: joint attention, an expert a modality.

  Attributes:
    encoder: with `experts=("vision", "text")`, no vocabulary and neither learned nor sinusoidal
      positions, as each modality has positions of its own here.
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
      recipe: a record of the same structure to run instead; see `CausalLM`.
      **kwargs: `visible_BTT`, `return_hidden_states`, `deterministic` of `Encoder`.

    Returns:
      [B, 1 + P + T, D]: the class token, the patches and the text, of those that are there; if
      asked for, then also the stream.
    """
    if mask_BT is not None and tokens_BT is None:
      raise ValueError("mask_BT is of a text, and there is none")
    parts = self.embed(images_BHWC, tokens_BT, masked_BP=masked_BP, recipe=recipe)
    if self.is_initializing() and len(parts) < 2:
      raise ValueError("initialise BEiT3 with an image and a text: both have parameters")
    embeddings, masks, positions = [], [], []
    for name, part_BTD in parts.items():
      batch, length, _ = part_BTD.shape
      table = self.position_embeddings[name]
      if length > table.num_embeddings - self.position_offset:
        rows = table.num_embeddings
        raise ValueError(f"{length} positions do not fit the table of {name}, {rows}")
      own = padding_mask((batch, length), mask_BT, None) if name == "text" else None
      places_BT = positions_of((batch, length), own)
      if name == "text" and positions_BT is not None:
        places_BT = jnp.asarray(positions_BT)
      embeddings.append(part_BTD + table(jnp.maximum(places_BT + self.position_offset, 0)))
      # Where the encoder rotates, the text stands behind the image.
      before = sum(mask.shape[1] for mask in masks)
      places_BT = jnp.where(places_BT < 0, -1, places_BT + before)
      positions.append(jnp.broadcast_to(places_BT, (batch, length)))
      masks.append(jnp.ones((batch, length), bool) if own is None else own)
    return self.encoder(
      embeddings_BTD=jnp.concatenate(embeddings, axis=1),
      mask_BT=None if mask_BT is None else jnp.concatenate(masks, axis=1),
      positions_BT=jnp.concatenate(positions, axis=1),
      recipe=recipe,
      lengths=tuple(parts[n].shape[1] if n in parts else 0 for n in self.encoder.experts),
      **kwargs,
    )

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


class MaskedBEiT3(nn.Module, kw_only=True):
  """Masked data modelling: p(what a patch or token was | all that is not masked of both).

  Of a patch it is softmax(W_I h) over the tokens that an image tokenizer gives patches, of a text's
  token softmax(W h) with W the table of the text's embeddings. The paper does not state the heads:
  these are linear.

  Attributes:
    encoder: a `BEiT3`.
    image_vocab_size: how many tokens there are for patches.
    vocab_chunk, label_smoothing: see `CausalLM`.

  Reference: BEiT-3, arXiv 2208.10442, section 2.2; BEiT v2, arXiv 2208.06366 (tokens of patches).
  """

  encoder: BEiT3
  image_vocab_size: int = 8192
  vocab_chunk: int = 0
  label_smoothing: float = 0.0

  @nn.compact
  def __call__(
    self,
    images_BHWC: jax.Array,
    tokens_BT: jax.Array,
    *,
    masked_BP: jax.Array | None = None,
    mask_BT: jax.Array | None = None,
    targets_BT: jax.Array | None = None,
    recipe: records.Stack | None = None,
    return_hidden_states: bool = False,
    deterministic: bool = True,
  ):
    """Scores the patches and tokens of pairs.

    Args:
      images_BHWC, tokens_BT, masked_BP, mask_BT, recipe: see `BEiT3`; tokens that are masked are
        the mask's token.
      targets_BT: [B, P + T], the tokens of the patches, then those of the text.
      return_hidden_states: whether to return the stream as well.
      deterministic: False switches dropout on and needs an rng named `dropout`.

    Returns:
      Logits of the patches [B, P, V_I] and of the text [B, T, V], in float32 or wider; or, with
      targets, what these cost, [B, P + T] in nats. If asked for, then also the stream.
    """
    encoder, stack = self.encoder, self.encoder.encoder
    out = encoder(
      images_BHWC,
      tokens_BT,
      masked_BP=masked_BP,
      mask_BT=mask_BT,
      recipe=recipe,
      return_hidden_states=return_hidden_states,
      deterministic=deterministic,
    )
    x_BTD, hidden_LBTD = out if return_hidden_states else (out, None)
    table = TokenTable(self.image_vocab_size, stack.width, name="output_embedding")
    image_table_VD = table((stack.recipe if recipe is None else recipe).embedding.tokens)
    ends = 1 + encoder.num_patches  # Behind the class token.
    parts = (
      (x_BTD[:, 1:ends], image_table_VD, slice(None, encoder.num_patches)),
      (x_BTD[:, ends:], encoder.text_embedding.embedding, slice(encoder.num_patches, None)),
    )
    smoothing = 0.0 if deterministic else self.label_smoothing
    scores = tuple(
      scores_of(
        part_BTD,
        table_VD,
        None if targets_BT is None else targets_BT[:, places],
        chunk=self.vocab_chunk,
        smoothing=smoothing,
      )
      for part_BTD, table_VD, places in parts
    )
    if targets_BT is not None:
      scores = jnp.concatenate(scores, axis=1)
    return (scores, hidden_LBTD) if return_hidden_states else scores
