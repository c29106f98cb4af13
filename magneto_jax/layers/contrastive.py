"""The contrastive loss of pairs: which text of a batch is of which image, and the reverse."""

import jax
import jax.numpy as jnp

from magneto_jax import sharding


def contrastive_loss(
  images_BE: jax.Array,
  texts_BE: jax.Array,
  scale: jax.Array | float,
  mask_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """What it costs in nats to tell the text of each image, and the image of each text.

    a_i = -log softmax_j(z_ij) at j = i,  b_j = -log softmax_i(z_ij) at i = j,  z = scale f g^T

  of features f of images and g of texts of the same rows. All other rows are wrong answers, of the
  whole batch, on whichever devices these lie; also those that are other texts of the same image.
  The loss of a batch is the mean of both. It is not the mean of its parts' losses, which compare
  fewer rows, so that a batch cannot be accumulated. In float32 or wider.

  Args:
    images_BE, texts_BE: features, of length 1 if products are to be cosines.
    scale: what products are multiplied by.
    mask_B: True for rows that are pairs; others, which fill a batch up, are nobody's wrong answers,
      and what they cost means nothing.

  Returns:
    (a, b), each [B].

  Reference: CLIP, arXiv 2103.00020, section 2.3; BEiT-3, arXiv 2208.10442, section 3.1.5.
  """
  if images_BE.ndim != 2 or images_BE.shape != texts_BE.shape:
    raise ValueError(
      f"features of images {list(images_BE.shape)} and of texts {list(texts_BE.shape)} must be of"
      " one shape [B, E]"
    )
  wide = jnp.promote_types(jnp.result_type(images_BE, texts_BE), jnp.float32)
  # Each device compares its images with all texts.
  texts_BE = sharding.constrain(texts_BE, None, None)
  # A TPU would round features to bfloat16, and cosines of near pairs differ by less than that.
  z_BB = jnp.einsum(
    "be,ce->bc", images_BE, texts_BE, precision="highest", preferred_element_type=wide
  )
  z_BB = sharding.constrain(z_BB * jnp.asarray(scale, wide), "batch", None)
  own_B = jnp.diagonal(z_BB)
  texts_BB = images_BB = z_BB
  if mask_B is not None:
    # Of its own row a filler keeps what is there, so that nothing is infinite.
    is_own_BB = jnp.eye(len(own_B), dtype=bool)
    texts_BB = jnp.where(mask_B[None] | is_own_BB, z_BB, -jnp.inf)
    images_BB = jnp.where(mask_B[:, None] | is_own_BB, z_BB, -jnp.inf)
  texts_of_B = jax.nn.logsumexp(texts_BB, axis=1) - own_B
  images_of_B = jax.nn.logsumexp(images_BB, axis=0) - own_B
  return texts_of_B, images_of_B
