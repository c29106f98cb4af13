"""Masked image models: what the patches of an image that are hidden were, in an image tokenizer's
words."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax.layers.cross_entropy import scores_of
from magneto_jax.models.backbone import TokenTable
from magneto_jax.models.image_tokenizer import Frozen, HoldsTokenizer
from magneto_jax.models.vision import VisionEncoder
from magneto_jax.theory import records

# Of the head, as BEiT draws all.
_HEAD_INIT = records.Init("normal", 0.02)


class MaskedImageModel(HoldsTokenizer, kw_only=True):
  """p(token of a hidden patch | the patches that are not hidden) = softmax(W h + b).

  h is the encoder's output at the patch, whose embedding the mask token replaces. The token is the
  one that a trained image tokenizer, which the model holds, gives the patch of the whole image.

  Attributes:
    encoder: with a mask token.
    tokenizer: of images of the same grid of patches.
    vocab_size: V, how many tokens there are.
    vocab_chunk, label_smoothing: see `CausalLM`.

  Reference: BEiT, arXiv 2106.08254, section 2.3; BEiT v2, arXiv 2208.06366, section 2.2.
  Differs: W is drawn from N(0, 0.02^2) uncut, where BEiT's released code cuts at one deviation.
  BEiT v2's second path, which predicts from an earlier layer's patches and the class token, is not
  there.
  """

  encoder: VisionEncoder
  tokenizer: Frozen
  vocab_size: int = 8192
  vocab_chunk: int = 0
  label_smoothing: float = 0.0

  @nn.compact
  def __call__(
    self,
    images_BHWC: jax.Array,
    *,
    masked_BP: jax.Array | None = None,
    places_BK: jax.Array | None = None,
    targets: bool = False,
    return_hidden_states: bool = False,
    deterministic: bool = True,
    **kwargs,
  ):
    """Scores patches.

    Args:
      images_BHWC: pixels, scaled as the tokenizer was trained.
      masked_BP: True for the patches, read row by row, that are hidden.
      places_BK: integers in [0, P): these patches alone go through the head; by default all, K = P.
      targets: whether the tokenizer's tokens are the targets: then -log p of them comes out.
      return_hidden_states: whether to return the stream as well.
      deterministic: False switches dropout on and needs an rng named `dropout`.
      **kwargs: see `Encoder`.

    Returns:
      Logits [B, K, V], or nats [B, K] (in training with the model's smoothing), in float32 or
      wider; if asked for, then also the stream.
    """
    if self.encoder.mask_token is False:
      raise ValueError("a masked image model needs an encoder with mask_token=True")
    self._hold_tokenizer(images_BHWC)
    out = self.encoder(
      images_BHWC,
      masked_BP=masked_BP,
      return_hidden_states=return_hidden_states,
      deterministic=deterministic,
      **kwargs,
    )
    h_BTD, hidden_LBTD = out if return_hidden_states else (out, None)
    h_BKD = h_BTD[:, 1:] if self.encoder.class_token else h_BTD
    if places_BK is not None:
      h_BKD = jnp.take_along_axis(h_BKD, places_BK[..., None], axis=1)
    table = TokenTable(self.vocab_size, h_BKD.shape[-1], name="output_embedding")
    bias_V = self.param("head_bias", nn.initializers.zeros, (self.vocab_size,))
    targets_BK = None
    if targets:
      targets_BK = self.tokens(images_BHWC)
      if places_BK is not None:
        targets_BK = jnp.take_along_axis(targets_BK, places_BK, axis=1)
    scores = scores_of(
      h_BKD,
      table(_HEAD_INIT),
      targets_BK,
      bias_V,
      chunk=self.vocab_chunk,
      smoothing=0.0 if deterministic else self.label_smoothing,
    )
    return (scores, hidden_LBTD) if return_hidden_states else scores
