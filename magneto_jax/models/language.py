"""Language models: the causal decoder and the masked one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax.layers.feed_forward import ACTIVATIONS
from magneto_jax.layers.initializers import dense_init, kernel_init
from magneto_jax.layers.norms import norm_factory
from magneto_jax.models.backbone import (
  Backbone,
  padding_mask,
  positions_of,
  token_embedding,
  visibility,
)
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.transformer import Caches, Context, init_caches
from magneto_jax.theory import records


class DecodingState(NamedTuple):
  """What decoding carries from one call to the next.

  Attributes:
    caches: keys and values of every layer.
    segment_ids_BS: of the tokens written so far; 0 where nothing lies, not positive for padding.
    memory_ids_BS: 1 where the memory holds a token, as far as there is a memory.
  """

  caches: Caches
  segment_ids_BS: jax.Array
  memory_ids_BS: jax.Array | None = None

  @property
  def length(self) -> jax.Array:
    """How many tokens of each row have been written (padding included)."""
    return self.caches[0][0].self_attention.length


def _logits(x_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
  """x W^T with W of the dtype of x, summed in float32 or wider."""
  wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
  return jnp.einsum("btd,vd->btv", x_BTD, table_VD.astype(x_BTD.dtype), preferred_element_type=wide)


class CausalLM(Backbone, kw_only=True):
  """A decoder: p(x_t | x_<t) = softmax(W h_t), h = stack(embed(x)).

  With a recipe that has cross-attention, p(x_t | x_<t, memory): the decoder of an
  `EncoderDecoder`.

  Attributes:
    vocab_size: V.
    tied: whether W is the embedding table; else W is drawn as the table is.
    All others: see `Backbone`.

  Reference: Foundation Transformers, arXiv 2210.06423, section 2.2.
  """

  vocab_size: int
  tied: bool = True

  def setup(self):
    init = self._checked(None).embedding.tokens
    self.token_embedding = token_embedding(self.vocab_size, self.width, init)
    if not self.tied:
      self.output_embedding = token_embedding(self.vocab_size, self.width, init)

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array,
    *,
    mask_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    memory_BSD: jax.Array | None = None,
    memory_mask_BS: jax.Array | None = None,
    state: DecodingState | None = None,
    recipe: records.Stack | None = None,
    embedding: nn.Embed | None = None,
    return_hidden_states: bool = False,
    deterministic: bool = True,
  ):
    """Scores tokens.

    Args:
      tokens_BT: integers in [0, V).
      mask_BT: True (or 1) for tokens, False for padding, on either side: Hugging Face's
        `attention_mask`, and the opposite of torchscale's and fairseq's padding masks. Nobody sees
        padding; logits at padding mean nothing.
      positions_BT: by default the number of tokens before each, those in the state included, and
        -1 for padding.
      segment_ids_BT: tokens attend within their segment only (packed documents). Positive; where
        no mask is given, 0 is padding.
      memory_BSD: what cross-attention attends to. With a state, only its first call needs it.
      memory_mask_BS: True for the memory's tokens, False for its padding.
      state: earlier tokens (`init_state`); the new ones are scored behind them.
      recipe: a record of the same structure to run instead, whose numbers may be traced: a sweep
        over them compiles once (`records.as_arrays` turns numbers into leaves).
      embedding: a table of tokens to use in place of the model's own, as encoder-decoders share.
      return_hidden_states: whether to return the stream as well.
      deterministic: False switches dropout on and needs an rng named `dropout`.

    Returns:
      Logits [B, T, V] in float32 or wider; then, with a state, the new state; then, if asked for,
      the stream [L + 1, B, T, D] before the first layer and after each, without the final norm.
      Tokens that do not fit the state are lost, and all logits of the call are NaN.
    """
    recipe = self._checked(recipe)
    mask_BT = padding_mask(mask_BT, segment_ids_BT)
    if positions_BT is None:
      self._check_length(tokens_BT.shape[1])
      before = 0 if state is None else jnp.sum(state.segment_ids_BS > 0, axis=1, keepdims=True)
      positions_BT = positions_of(tokens_BT.shape, mask_BT, before)
    tokens = self.token_embedding if embedding is None else embedding
    x_BTD = self._start(
      tokens(tokens_BT) * recipe.embedding.scale,
      positions_BT,
      recipe,
      self._norm(),
      deterministic=deterministic,
    )

    segment_ids = visibility(tokens_BT.shape, mask_BT, segment_ids_BT)
    if state is not None:
      segment_ids = self._written(tokens_BT, segment_ids, state)
    memory = self._memory(tokens_BT.shape, memory_BSD, memory_mask_BS, state)
    offset = None if state is None else state.length
    out = self._run(
      x_BTD,
      recipe,
      Context(positions_BT, segment_ids, None, offset, memory_BSD, memory),
      is_causal=True,
      caches=None if state is None else state.caches,
      return_hidden_states=return_hidden_states,
      deterministic=deterministic,
    )
    table = tokens if self.tied else self.output_embedding
    logits_BTV = _logits(out.x_BTD, table.embedding)
    results = (logits_BTV,)
    if state is not None:
      # The length may be traced, so this cannot raise; XLA would clamp, and overwrite others.
      fits = state.length + tokens_BT.shape[1] <= state.segment_ids_BS.shape[1]
      memory_ids = None if memory is None else memory[1]
      new = DecodingState(out.caches, segment_ids[1], memory_ids)
      results = jnp.where(fits, logits_BTV, jnp.nan), new
    if return_hidden_states:
      results += (out.hidden_LBTD,)
    return results if len(results) > 1 else logits_BTV

  def _written(self, tokens_BT, segment_ids, state: DecodingState):
    """Segment ids of the queries, and of the state's tokens with the new ones behind them."""
    written_BS = state.segment_ids_BS
    if tokens_BT.shape[1] > written_BS.shape[1]:
      raise ValueError(f"{tokens_BT.shape[1]} tokens do not fit a state of {written_BS.shape[1]}")
    q_BT, kv_BT = (jnp.ones_like(tokens_BT),) * 2 if segment_ids is None else segment_ids
    kv_BT = jnp.asarray(kv_BT, written_BS.dtype)
    return (
      jnp.asarray(q_BT, written_BS.dtype),
      jax.lax.dynamic_update_slice_in_dim(written_BS, kv_BT, state.length, axis=1),
    )

  def _memory(self, shape, memory_BSD, memory_mask_BS, state: DecodingState | None):
    """Segment ids of queries and memory; None without cross-attention."""
    if not records.has_cross_attention(self.recipe):
      if memory_BSD is not None:
        raise ValueError("this recipe has no cross-attention: it cannot read a memory")
      return None
    if memory_BSD is None and state is None:
      raise ValueError("this recipe has cross-attention: give memory_BSD, an encoder's output")
    if memory_BSD is None:
      return jnp.ones(shape, jnp.int32), state.memory_ids_BS
    batch, length = memory_BSD.shape[:2]
    if state is not None and length != state.memory_ids_BS.shape[1]:
      raise ValueError(f"a memory of {length} does not fit the state's {state.memory_ids_BS.shape}")
    mask_BS = jnp.ones((batch, length), bool) if memory_mask_BS is None else memory_mask_BS
    return jnp.ones(shape, jnp.int32), jnp.asarray(mask_BS, bool).astype(jnp.int32)

  def init_state(self, batch: int, length: int, memory_length: int | None = None) -> DecodingState:
    """An empty decoding state for `length` tokens, prompt included, and a memory."""
    self._check_length(length)
    has_memory = records.has_cross_attention(self.recipe)
    caches = init_caches(
      self.recipe,
      batch=batch,
      length=length,
      kv_heads=self.num_kv_heads or self.num_heads,
      head_dim=self.head_dim or self.width // self.num_heads,
      dtype=self.dtype,
      memory_length=memory_length,
    )
    memory = jnp.zeros((batch, memory_length), jnp.int32) if has_memory else None
    return DecodingState(caches, jnp.zeros((batch, length), jnp.int32), memory)


HEADS = ("linear", "dense")


class MaskedLM(nn.Module, kw_only=True):
  """A masked language model: p(x_t | all tokens that are not masked) = softmax(head(h_t)).

    | head     | logits                                   | of                     |
    |----------|------------------------------------------|------------------------|
    | `linear` | W h                                      | torchscale             |
    | `dense`  | W LN(act(W_d h + b_d)) + b               | BERT, RoBERTa, fairseq |

  Attributes:
    encoder: an `Encoder` with a vocabulary.
    head: one of HEADS; the dense one has the encoder's activation and norm.
    tied: whether W is the encoder's table of tokens; else W is drawn as the table is.

  Reference: BERT, arXiv 1810.04805, section 3.1.
  """

  encoder: Encoder
  head: str = "dense"
  tied: bool = True

  @nn.compact
  def __call__(self, tokens_BT: jax.Array, *, return_hidden_states: bool = False, **kwargs):
    """Logits [B, T, V], in float32 or wider, and, if asked for, the stream; see `Encoder`."""
    encoder, recipe = self.encoder, self.encoder.recipe
    if self.head not in HEADS:
      raise ValueError(f"{self.head=} must be one of {', '.join(HEADS)}")
    out = encoder(tokens_BT, return_hidden_states=return_hidden_states, **kwargs)
    h_BTD, hidden_LBTD = out if return_hidden_states else (out, None)
    if self.head == "dense":
      init = dense_init(recipe.embedding.tokens)
      dense = nn.Dense(
        encoder.width, kernel_init=init.kernel, dtype=encoder.dtype, name="head_dense"
      )
      norm = norm_factory(recipe.norm, epsilon=encoder.norm_epsilon, dtype=encoder.dtype)
      h_BTD = norm(name="head_norm")(ACTIVATIONS[encoder.activation](dense(h_BTD)))
    if self.tied:
      table_VD = encoder.token_embedding.embedding
    else:
      shape = (encoder.vocab_size, encoder.width)
      table_VD = self.param("output_embedding", kernel_init(recipe.embedding.tokens), shape)
    logits_BTV = _logits(h_BTD, table_VD)
    if self.head == "dense":
      bias_V = self.param("head_bias", nn.initializers.zeros, (encoder.vocab_size,))
      logits_BTV += bias_V.astype(logits_BTV.dtype).reshape(1, 1, -1)
    return (logits_BTV, hidden_LBTD) if return_hidden_states else logits_BTV
