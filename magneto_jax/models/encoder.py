"""The bidirectional encoder, of tokens or of embeddings, plain or multiway."""

import functools
import itertools

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax.layers.multiway import multiway
from magneto_jax.models.backbone import (
  Backbone,
  DecodingState,
  TokenTable,
  Ways,
  as_mask,
  look_up,
  padding_mask,
  positions_of,
  visibility,
)
from magneto_jax.models.transformer import Caches, Context
from magneto_jax.theory import records

# The expert of the top layers that all tokens of a pair pass.
FUSION = "fusion"


class Encoder(Backbone, kw_only=True):
  """h = stack(embed(x)), every token attending to every token.

  Attributes:
    vocab_size: V of the tokens that can be read; None for an encoder of embeddings only.
    experts: names of the modalities that have norms and projections of their own in every layer
      (a multiway encoder); none for a plain encoder.
    shared_attention: whether the modalities share the attention and the norms around it, so that
      experts are feed-forward networks alone, with their norms.
    fusion_layers: of how many of the top layers the feed-forward network has one expert more, which
      all tokens pass where several modalities are there. They are whole segments of the recipe
      (`records.cut`).
    All others: see `Backbone`.

  Reference: Foundation Transformers, arXiv 2210.06423, section 2.2; BEiT-3, arXiv 2208.10442,
  section 2.1 (multiway; the paper shares attention and has 3 fusion layers, the released models
  have neither).
  """

  vocab_size: int | None = None
  experts: tuple[str, ...] = ()
  shared_attention: bool = False
  fusion_layers: int = 0

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
    fused: bool | None = None,
    state: DecodingState | None = None,
    return_caches: bool = False,
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
      fused: whether all tokens pass the fusion layers' own expert; by default where several
        modalities are there.
      state: earlier tokens (`state_behind`). A new one sees them all, and of the new ones those
        before it and itself. Needs positions; does not go with biases and `visible_BTT`.
      return_caches: whether to return the keys and values of all tokens as well, what stands before
        others in `state_behind`; without a state.
      recipe: a record of the same structure to run instead; see `CausalLM`.
      return_hidden_states: whether to return the stream as well.
      deterministic: False switches dropout on and needs an rng named `dropout`.

    Returns:
      [B, T, D]; with a state also the new one, or, if asked for, the caches; if asked for, also the
      stream [L + 1, B, T, D] before the first layer and after each, without the final norm.
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
    if state is not None and (
      positions_BT is None or return_caches or (visible_BTT, bias_BNTT) != (None, None)
    ):
      raise ValueError("a state goes with positions, and not with biases or return_caches")
    shape = embeddings_BTD.shape[:2]
    mask_BT = padding_mask(shape, mask_BT, segment_ids_BT)
    if positions_BT is None:
      self._check_length(shape[1])
      positions_BT = positions_of(shape, mask_BT)
    ways = self._ways(lengths, fused)
    norm = self._norm(ways.around)
    x_BTD = self._start(
      embeddings_BTD, positions_BT, recipe, norm, mask_BT, deterministic=deterministic
    )
    if visible_BTT is not None:
      rows = 1 if jnp.shape(visible_BTT)[:1] == (1,) else shape[0]
      visible_BTT = as_mask(visible_BTT, (rows, shape[1], shape[1]), "visible_BTT")
      hidden = jnp.where(visible_BTT, 0.0, -jnp.inf)[:, None]
      bias_BNTT = hidden if bias_BNTT is None else bias_BNTT + hidden
    segment_ids = visibility(shape, mask_BT, segment_ids_BT)
    caches = self._caches(*shape) if return_caches else None
    if state is not None:
      segment_ids = state.written(shape, segment_ids)
      caches = state.caches
    out = self._run(
      x_BTD,
      recipe,
      Context(
        positions_BT=positions_BT,
        segment_ids=segment_ids if state is None else _behind(state.before, *segment_ids),
        bias=bias_BNTT,
      ),
      is_causal=state is not None,
      is_bidirectional=True,
      ways=ways,
      caches=caches,
      return_hidden_states=return_hidden_states,
      deterministic=deterministic,
    )
    results = (out.x_BTD,)
    if state is not None:
      results += (DecodingState(out.caches, segment_ids[1]),)
    if return_caches:
      results += (out.caches,)
    if return_hidden_states:
      results += (out.hidden_LBTD,)
    return results if len(results) > 1 else out.x_BTD

  def _ways(self, lengths: tuple[int, ...] | None, fused: bool | None) -> Ways:
    """What is multiway of a call, and how many tokens each expert has."""
    if not self.experts:
      if self.shared_attention or self.fusion_layers:
        raise ValueError("shared_attention and fusion_layers are of experts, and there are none")
      return Ways()
    own = functools.partial(multiway, experts=self.experts, lengths=lengths)
    ways = Ways(own, own, (own,))
    if self.shared_attention:
      ways = ways._replace(attention=lambda factory: factory)
    if not self.fusion_layers:
      return ways
    depths = [len(segment.pattern) * segment.repeats for segment in self.recipe.segments]
    firsts = list(itertools.accumulate(depths, initial=0))[:-1]
    top = sum(depths) - self.fusion_layers
    if top not in firsts:
      raise ValueError(
        f"fusion_layers={self.fusion_layers} must be whole segments of the recipe: give"
        f" records.cut(recipe, {top})"
      )
    if fused is None:
      fused = sum(length > 0 for length in lengths) > 1
    fusion = functools.partial(
      multiway,
      experts=(*self.experts, FUSION),
      lengths=(*(0 for _ in lengths), sum(lengths)) if fused else (*lengths, 0),
    )
    return ways._replace(ffn=tuple(own if first < top else fusion for first in firsts))

  def state_behind(self, prefix: Caches, batch: int, length: int) -> DecodingState:
    """An empty state for `length` tokens behind others, whose caches an earlier call returned."""
    caches = self._caches(batch, length, prefix=prefix)
    return DecodingState(caches, jnp.zeros((batch, length), jnp.int32))


def _behind(count: int, q_BT: jax.Array, kv_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Segment ids of queries, and of keys with `count` others before them that all of these see."""
  return q_BT, jnp.pad(kv_BS, ((0, 0), (count, 0)), constant_values=1)
