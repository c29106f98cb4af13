"""The encoder-decoder."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax.models.encoder import Encoder
from magneto_jax.models.language import CausalLM, DecodingState


class EncoderDecoder(nn.Module, kw_only=True):
  """p(y_t | y_<t, x) = decoder(y_<t, encoder(x)).

  Both stacks come from one recipe of an architecture of the kind `encoder_decoder`. Decoding fills
  the cross-attention's keys and values once: encode, then `decode` with the memory and a state,
  then `decode` with the state alone.

  Attributes:
    encoder: with a vocabulary.
    decoder: of a recipe with cross-attention.
    shared_embedding: whether the decoder reads (and, if tied, writes) with the encoder's table.

  Reference: Attention Is All You Need, arXiv 1706.03762, section 3.1.
  """

  encoder: Encoder
  decoder: CausalLM
  shared_embedding: bool = False

  def __call__(
    self,
    source_BS: jax.Array,
    tokens_BT: jax.Array,
    *,
    source_mask_BS: jax.Array | None = None,
    source_positions_BS: jax.Array | None = None,
    source_segment_ids_BS: jax.Array | None = None,
    mask_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    targets_BT: jax.Array | None = None,
    return_hidden_states: bool = False,
    deterministic: bool = True,
  ):
    """Scores tokens given a source.

    Args:
      source_BS: integers in the encoder's vocabulary.
      tokens_BT: the decoder's input, which begins with the start token.
      source_mask_BS: True for tokens, False for padding; see `Encoder`.
      source_positions_BS, source_segment_ids_BS: of packed sources; see `Encoder`.
      mask_BT, positions_BT, segment_ids_BT: likewise of the decoder's input; see `CausalLM`. Its
        segments read the memory's of the same ids.
      targets_BT: the token after each; see `CausalLM`.
      return_hidden_states: whether to return both streams as well.
      deterministic: False switches dropout on and needs an rng named `dropout`.

    Returns:
      Logits [B, T, V], or the targets' nats [B, T]; if asked for, then the streams of the encoder
      and of the decoder.
    """
    options = {"return_hidden_states": return_hidden_states, "deterministic": deterministic}
    memory = self.encode(
      source_BS,
      mask_BT=source_mask_BS,
      positions_BT=source_positions_BS,
      segment_ids_BT=source_segment_ids_BS,
      **options,
    )
    memory_BSD, encoder_hidden = memory if return_hidden_states else (memory, None)
    out = self.decode(
      tokens_BT,
      memory_BSD=memory_BSD,
      memory_mask_BS=source_mask_BS,
      memory_segment_ids_BS=source_segment_ids_BS,
      mask_BT=mask_BT,
      positions_BT=positions_BT,
      segment_ids_BT=segment_ids_BT,
      targets_BT=targets_BT,
      **options,
    )
    return (out[0], encoder_hidden, out[1]) if return_hidden_states else out

  def encode(self, source_BS: jax.Array, **kwargs):
    """The memory [B, S, D]; keywords are those of `Encoder`."""
    return self.encoder(source_BS, **kwargs)

  def memory(self, source_BS: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the decoder reads of sources [B, S, D], and whether it is each one's own [B, S]."""
    mask_BS = jnp.arange(source_BS.shape[1])[None] < lengths_B[:, None]
    return self.encode(source_BS, mask_BT=mask_BS), mask_BS

  def decode(self, tokens_BT: jax.Array, **kwargs):
    """Scores and, with a state, the new state; keywords are those of `CausalLM`."""
    embedding_VD = None
    if self.shared_embedding:
      embedding_VD = self.encoder.token_embedding(self.encoder.recipe.embedding.tokens)
    return self.decoder(tokens_BT, embedding_VD=embedding_VD, **kwargs)

  def init_state(self, batch: int, length: int, memory_length: int) -> DecodingState:
    """An empty decoding state for `length` tokens and a memory."""
    return self.decoder.init_state(batch, length, memory_length)
