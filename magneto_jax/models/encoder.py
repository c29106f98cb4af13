"""The bidirectional encoder, of tokens or of embeddings, plain or multiway."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax.layers.multiway import multiway
from magneto_jax.models.backbone import (
  Backbone,
  TokenTable,
  as_mask,
  look_up,
  padding_mask,
  positions_of,
  visibility,
)
from magneto_jax.models.transformer import Context
from magneto_jax.theory import records


class Encoder(Backbone, kw_only=True):
  """h = stack(embed(x)), every token attending to every token.

  Attributes:
    vocab_size: V of the tokens that can be read; None for an encoder of embeddings only.
    experts: names of the modalities that have norms and projections of their own in every layer
      (a multiway encoder); none for a plain encoder.
    All others: see `Backbone`.

  Reference: Foundation Transformers, arXiv 2210.06423, section 2.2; BEiT-3, arXiv 2208.10442,
  section 2.1 (multiway).
  """

  vocab_size: int | None = None
  experts: tuple[str, ...] = ()

  def setup(self):
    if self.vocab_size is not None:
      self.token_embedding = TokenTable(self.vocab_size, self.width)

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array | None = None,
    *,
    embeddings_BTD: jax.Array | None = None,
    mask_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    visible_BTT: jax.Array | None = None,
    bias_BNTT: jax.Array | None = None,
    lengths: tuple[int, ...] | None = None,
    recipe: records.Stack | None = None,
    return_hidden_states: bool = False,
    deterministic: bool = True,
  ):
    """Encodes tokens or embeddings.

    Args:
      tokens_BT: integers in [0, V); or give embeddings.
      embeddings_BTD: taken as they are; positions are added.
      mask_BT: True (or 1) for tokens, False for padding, on either side: Hugging Face's
        `attention_mask`, and the opposite of torchscale's and fairseq's padding masks. Padding
        enters as zeros and nobody sees it; what comes out there means nothing.
      positions_BT: by default the number of tokens before each, -1 for padding.
      segment_ids_BT: tokens attend within their segment only. Positive; where no mask is given,
        0 is padding.
      visible_BTT: [B, T, T] or [1, T, T]; True where the query (first) may see the key.
      bias_BNTT: [B, N, T, T] or [1, N, T, T], added to the logits of every layer's attention.
      lengths: how many of the T tokens belong to each expert, in their order.
      recipe: a record of the same structure to run instead; see `CausalLM`.
      return_hidden_states: whether to return the stream as well.
      deterministic: False switches dropout on and needs an rng named `dropout`.

    Returns:
      [B, T, D]; if asked for, also the stream [L + 1, B, T, D] before the first layer and after
      each, without the final norm.
    """
    recipe = self._checked(recipe)
    if records.has_cross_attention(recipe):
      raise ValueError("an encoder has no memory: this recipe has cross-attention, a decoder's")
    if (tokens_BT is None) == (embeddings_BTD is None):
      raise ValueError("give tokens or embeddings, one of the two")
    if tokens_BT is not None:
      if self.vocab_size is None:
        raise ValueError("this encoder has no vocabulary: give embeddings, or set vocab_size")
      table_VD = self.token_embedding(recipe.embedding.tokens)
      embeddings_BTD = look_up(table_VD, tokens_BT) * recipe.embedding.scale
    if bool(self.experts) != (lengths is not None):
      raise ValueError("lengths go with experts: one for each, or neither")
    if embeddings_BTD.ndim != 3 or embeddings_BTD.shape[-1] != self.width:
      found = list(embeddings_BTD.shape)
      raise ValueError(f"embeddings {found} are not [B, T, D] with D = {self.width}")
    shape = embeddings_BTD.shape[:2]
    mask_BT = padding_mask(shape, mask_BT, segment_ids_BT)
    if positions_BT is None:
      self._check_length(shape[1])
      positions_BT = positions_of(shape, mask_BT)
    wrap = lambda factory: factory
    if self.experts:
      wrap = functools.partial(multiway, experts=self.experts, lengths=lengths)
    x_BTD = self._start(
      embeddings_BTD, positions_BT, recipe, self._norm(wrap), mask_BT, deterministic=deterministic
    )
    if visible_BTT is not None:
      rows = 1 if jnp.shape(visible_BTT)[:1] == (1,) else shape[0]
      visible_BTT = as_mask(visible_BTT, (rows, shape[1], shape[1]), "visible_BTT")
      hidden = jnp.where(visible_BTT, 0.0, -jnp.inf)[:, None]
      bias_BNTT = hidden if bias_BNTT is None else bias_BNTT + hidden
    out = self._run(
      x_BTD,
      recipe,
      Context(
        positions_BT=positions_BT,
        segment_ids=visibility(shape, mask_BT, segment_ids_BT),
        bias=bias_BNTT,
      ),
      is_causal=False,
      wrap=wrap,
      return_hidden_states=return_hidden_states,
      deterministic=deterministic,
    )
    return (out.x_BTD, out.hidden_LBTD) if return_hidden_states else out.x_BTD
