"""The vision encoder."""

import jax
from flax import linen as nn

from magneto_jax.layers.initializers import dense_init
from magneto_jax.layers.patches import PatchEmbedding
from magneto_jax.models.encoder import Encoder


class VisionEncoder(nn.Module, kw_only=True):
  """h = encoder(patches(image)): a ViT without a head.

  Attributes:
    encoder: without a vocabulary. With learned positions its max_length is the number of patches,
      and one more for the class token.
    patch_size: p, pixels on a patch's side.
    class_token: whether a class token stands before the patches.
    mask_token: whether patches can be masked, as masked image modelling does.

  Reference: An Image is Worth 16x16 Words, arXiv 2010.11929, section 3.1; BEiT, arXiv 2106.08254.
  """

  encoder: Encoder
  patch_size: int = 16
  class_token: bool = True
  mask_token: bool = False

  @nn.compact
  def __call__(self, images_BHWC: jax.Array, *, masked_BP: jax.Array | None = None, **kwargs):
    """Encodes images.

    Args:
      images_BHWC: pixels, scaled as the model was trained.
      masked_BP: True for the patches, read row by row, that the mask token replaces.
      **kwargs: see `Encoder`; masks and positions count the class token as the first.

    Returns:
      [B, 1 + P, D] (without a class token [B, P, D]) and, if asked for, the stream.
    """
    patches = PatchEmbedding(
      self.encoder.width,
      self.patch_size,
      projection_init=dense_init(self.encoder.recipe.embedding.patches),
      class_token=self.class_token,
      mask_token=self.mask_token,
      dtype=self.encoder.dtype,
      name="patch_embedding",
    )
    return self.encoder(embeddings_BTD=patches(images_BHWC, masked_BP), **kwargs)
