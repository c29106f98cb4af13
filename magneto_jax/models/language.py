"""Language models: the causal decoder and the masked one."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax.layers.cross_entropy import scores_of
from magneto_jax.layers.feed_forward import ACTIVATIONS, GATED
from magneto_jax.layers.initializers import dense_init
from magneto_jax.layers.norms import norm_factory
from magneto_jax.models.backbone import (
  UNWRITTEN,
  Backbone,
  DecodingState,
  TokenTable,
  as_mask,
  look_up,
  padding_mask,
  positions_of,
  visibility,
)
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.transformer import Context
from magneto_jax.theory import records


class CausalLM(Backbone, kw_only=True):
  """A decoder: p(x_t | x_<t) = softmax(W h_t), h = stack(embed(x)).

  With a recipe that has cross-attention, p(x_t | x_<t, memory): the decoder of an
  `EncoderDecoder`.

  Attributes:
    vocab_size: V.
    tied: whether W is the embedding table; else W is drawn as the table is.
    vocab_chunk: rows of W whose logits are held at a time where targets are given; 0: all. See
      `layers.cross_entropy`.
    label_smoothing: likewise where targets are given, in training alone.
    All others: see `Backbone`.

  Reference: Foundation Transformers, arXiv 2210.06423, section 2.2.
  """

  vocab_size: int
  tied: bool = True
  vocab_chunk: int = 0
  label_smoothing: float = 0.0

  def setup(self):
    self.token_embedding = TokenTable(self.vocab_size, self.width)
    if not self.tied:
      self.output_embedding = TokenTable(self.vocab_size, self.width)

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
    memory_segment_ids_BS: jax.Array | None = None,
    state: DecodingState | None = None,
    recipe: records.Stack | None = None,
    embedding_VD: jax.Array | None = None,
    targets_BT: jax.Array | None = None,
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
      memory_segment_ids_BS: tokens read the memory's tokens of their own segment only (packed
        pairs). Positive; where no mask is given, 0 is padding. Not with a state.
      state: earlier tokens (`init_state`); the new ones are scored behind them.
      recipe: a record of the same structure to run instead, whose numbers may be traced: a sweep
        over them compiles once (`records.as_arrays` turns numbers into leaves).
      embedding_VD: a table of tokens to use in place of the model's own, as encoder-decoders share.
      targets_BT: integers in [0, V), the token after each: then -log p of them (in training with
        the model's smoothing) comes out in place of the logits.
      return_hidden_states: whether to return the stream as well.
      deterministic: False switches dropout on and needs an rng named `dropout`.

    Returns:
      Logits [B, T, V], or the targets' nats [B, T], in float32 or wider; then, with a state, the
      new state; then, if asked for, the stream [L + 1, B, T, D] before the first layer and after
      each, without the final norm. Tokens that do not fit the state are lost, and all scores of the
      call are NaN, as they are while the state has no memory that the recipe reads. A window and
      relative biases count the rows of the state, padding too: pad prompts in front.
    """
    recipe = self._checked(recipe)
    if tokens_BT.ndim != 2:
      raise ValueError(f"tokens {list(tokens_BT.shape)} are not [B, T]")
    mask_BT = padding_mask(tokens_BT.shape, mask_BT, segment_ids_BT)
    if positions_BT is None:
      self._check_length(tokens_BT.shape[1])
      before = 0 if state is None else jnp.sum(state.segment_ids_BS > 0, axis=1, keepdims=True)
      positions_BT = positions_of(tokens_BT.shape, mask_BT, before)
    init = recipe.embedding.tokens
    if embedding_VD is None:
      embedding_VD = self.token_embedding(init)
    if embedding_VD.shape != (self.vocab_size, self.width):
      found, wanted = list(embedding_VD.shape), [self.vocab_size, self.width]
      raise ValueError(f"the table {found} is not [V, D] = {wanted}")
    x_BTD = self._start(
      look_up(embedding_VD, tokens_BT) * recipe.embedding.scale,
      positions_BT,
      recipe,
      self._norm(),
      deterministic=deterministic,
    )

    segment_ids = visibility(tokens_BT.shape, mask_BT, segment_ids_BT)
    if state is not None:
      segment_ids = state.written(tokens_BT.shape, segment_ids)
    given = memory_BSD, memory_mask_BS, memory_segment_ids_BS
    memory = self._memory(tokens_BT.shape, segment_ids_BT, *given, state)
    offset = None if state is None else state.length
    out = self._run(
      x_BTD,
      recipe,
      Context(
        positions_BT=positions_BT,
        segment_ids=segment_ids,
        q_offset=offset,
        memory_BSD=memory_BSD,
        memory_segment_ids=memory,
      ),
      is_causal=True,
      caches=None if state is None else state.caches,
      return_hidden_states=return_hidden_states,
      deterministic=deterministic,
    )
    table_VD = embedding_VD if self.tied else self.output_embedding(init)
    scores = scores_of(
      out.x_BTD,
      table_VD,
      targets_BT,
      chunk=self.vocab_chunk,
      smoothing=0.0 if deterministic else self.label_smoothing,
    )
    results = (scores,)
    if state is not None:
      # The length may be traced, so this cannot raise; XLA would clamp, and overwrite rows.
      fits = state.length + tokens_BT.shape[1] <= state.segment_ids_BS.shape[1]
      memory_ids = None if memory is None else memory[1]
      if memory is not None:
        fits &= jnp.all(memory_ids != UNWRITTEN)
      new = DecodingState(out.caches, segment_ids[1], memory_ids)
      results = jnp.where(fits, scores, jnp.nan), new
    if return_hidden_states:
      results += (out.hidden_LBTD,)
    return results if len(results) > 1 else scores

  def _memory(
    self,
    shape,
    segment_ids_BT,
    memory_BSD,
    memory_mask_BS,
    memory_ids_BS,
    state: DecodingState | None,
  ):
    """Segment ids of queries and memory; None without cross-attention."""
    if not records.has_cross_attention(self.recipe):
      if any(given is not None for given in (memory_BSD, memory_mask_BS, memory_ids_BS)):
        raise ValueError("this recipe has no cross-attention: it cannot read a memory")
      return None
    if memory_ids_BS is not None and (state is not None or segment_ids_BT is None):
      raise ValueError(
        "memory_segment_ids_BS goes with segment_ids_BT of the tokens that read it, and with no"
        " state"
      )
    if memory_BSD is None and memory_mask_BS is not None:
      raise ValueError("memory_mask_BS goes with memory_BSD: a state keeps the mask it was given")
    if memory_BSD is None and state is None:
      raise ValueError("this recipe has cross-attention: give memory_BSD, an encoder's output")
    if memory_BSD is None:
      return jnp.ones(shape, jnp.int32), state.memory_ids_BS
    batch, length = memory_BSD.shape[:2]
    if state is not None and length != state.memory_ids_BS.shape[1]:
      raise ValueError(f"a memory of {length} does not fit the state's {state.memory_ids_BS.shape}")
    mask_BS = jnp.ones((batch, length), bool)
    if memory_mask_BS is not None:
      mask_BS = as_mask(memory_mask_BS, (batch, length), "memory_mask_BS")
    if memory_ids_BS is None:
      return jnp.ones(shape, jnp.int32), mask_BS.astype(jnp.int32)
    if memory_ids_BS.shape != (batch, length):
      raise ValueError(
        f"memory_segment_ids_BS must be of shape {[batch, length]}, not {list(memory_ids_BS.shape)}"
      )
    return segment_ids_BT, jnp.where(mask_BS, memory_ids_BS, 0)

  def init_state(self, batch: int, length: int, memory_length: int | None = None) -> DecodingState:
    """An empty decoding state for `length` tokens, prompt included, and a memory."""
    self._check_length(length)
    has_memory = records.has_cross_attention(self.recipe)
    caches = self._caches(batch, length, memory_length=memory_length)
    memory = jnp.full((batch, memory_length), UNWRITTEN, jnp.int32) if has_memory else None
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
    vocab_chunk, label_smoothing: see `CausalLM`.

  Reference: BERT, arXiv 1810.04805, section 3.1.
  """

  encoder: Encoder
  head: str = "dense"
  tied: bool = True
  vocab_chunk: int = 0
  label_smoothing: float = 0.0

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array,
    *,
    mask_BT: jax.Array | None = None,
    recipe: records.Stack | None = None,
    places_BK: jax.Array | None = None,
    targets_BT: jax.Array | None = None,
    return_hidden_states: bool = False,
    deterministic: bool = True,
    **kwargs,
  ):
    """Logits [B, T, V], in float32 or wider, and, if asked for, the stream; see `Encoder`.

    With `places_BK`, integers in [0, T), only these positions of each row go through the head, and
    K stands for T in what comes out. With `targets_BT`, integers in [0, V), one for each position
    that does, -log p of them [B, T] (in training with the model's smoothing) in place of the
    logits.
    """
    encoder = self.encoder
    if self.head not in HEADS:
      raise ValueError(f"head={self.head!r} must be one of {', '.join(HEADS)}")
    if self.head == "dense" and encoder.activation in GATED:
      raise ValueError(f"the dense head has no gate for activation={encoder.activation!r}")
    out = encoder(
      tokens_BT,
      mask_BT=mask_BT,
      recipe=recipe,
      return_hidden_states=return_hidden_states,
      deterministic=deterministic,
      **kwargs,
    )
    recipe = encoder.recipe if recipe is None else recipe
    h_BTD, hidden_LBTD = out if return_hidden_states else (out, None)
    if places_BK is not None:
      h_BTD = jnp.take_along_axis(h_BTD, places_BK[..., None], axis=1)
    if self.head == "dense":
      init = dense_init(recipe.embedding.tokens)
      dense = nn.Dense(
        encoder.width, kernel_init=init.kernel, dtype=encoder.dtype, name="head_dense"
      )
      norm = norm_factory(recipe.norm, epsilon=encoder.norm_epsilon, dtype=encoder.dtype)
      wide = jnp.promote_types(encoder.dtype, jnp.float32)
      h_BTD = ACTIVATIONS[encoder.activation](dense(h_BTD).astype(wide)).astype(encoder.dtype)
      h_BTD = norm(name="head_norm")(h_BTD)
    if self.tied:
      table_VD = encoder.token_embedding(recipe.embedding.tokens)
    else:
      table = TokenTable(encoder.vocab_size, encoder.width, name="output_embedding")
      table_VD = table(recipe.embedding.tokens)
    bias_V = None
    if self.head == "dense":
      bias_V = self.param("head_bias", nn.initializers.zeros, (encoder.vocab_size,))
    scores = scores_of(
      h_BTD,
      table_VD,
      targets_BT,
      bias_V,
      chunk=self.vocab_chunk,
      smoothing=0.0 if deterministic else self.label_smoothing,
    )
    return (scores, hidden_LBTD) if return_hidden_states else scores
