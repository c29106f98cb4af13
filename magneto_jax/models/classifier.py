"""A classifier of texts: an encoder and a head on one vector."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax.layers.initializers import dense_init
from magneto_jax.models.backbone import padding_mask
from magneto_jax.models.encoder import Encoder
from magneto_jax.theory import records

POOLINGS = ("first", "mean")


class TextClassifier(nn.Module, kw_only=True):
  """y = W drop(tanh(W_d drop(p) + b_d)) + b, p = pool(h), h = encoder(x).

    | pooling | p                            | of                     |
    |---------|------------------------------|------------------------|
    | `first` | h_0, of the first token      | BERT, RoBERTa, fairseq |
    | `mean`  | the mean of h_t over tokens  |                        |

  Both matrices are drawn as `MaskedLM` draws its head's, with the recipe's init of tokens.

  Attributes:
    encoder: an `Encoder` with a vocabulary.
    classes: C, or 1 for a number.
    pooling: one of POOLINGS.
    dropout_rate: of the head.

  Reference: RoBERTa, arXiv 1907.11692, section 3; BERT, arXiv 1810.04805, section 4.1.
  """

  encoder: Encoder
  classes: int
  pooling: str = "first"
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array,
    *,
    mask_BT: jax.Array | None = None,
    recipe: records.Stack | None = None,
    return_hidden_states: bool = False,
    deterministic: bool = True,
    **kwargs,
  ):
    """Scores [B, C], in float32 or wider, and, if asked for, the stream.

    Args:
      tokens_BT: rows that begin with the mark of a beginning; see `Encoder`.
      mask_BT: True for tokens, False for padding; with `first` behind the tokens only. The mean is
        of tokens alone.
      deterministic: False switches dropout on and needs an rng named `dropout`.
      **kwargs: and the others: see `Encoder`.
    """
    if self.pooling not in POOLINGS:
      raise ValueError(f"pooling={self.pooling!r} must be one of {', '.join(POOLINGS)}")
    if self.classes < 1:
      raise ValueError(f"classes={self.classes} must be at least 1")
    encoder = self.encoder
    out = encoder(
      tokens_BT,
      mask_BT=mask_BT,
      recipe=recipe,
      return_hidden_states=return_hidden_states,
      deterministic=deterministic,
      **kwargs,
    )
    h_BTD, hidden_LBTD = out if return_hidden_states else (out, None)
    wide = jnp.promote_types(encoder.dtype, jnp.float32)
    if self.pooling == "first":
      p_BD = h_BTD[:, 0]
    else:
      mask_BT = padding_mask(tokens_BT.shape, mask_BT, kwargs.get("segment_ids_BT"))
      mask_BT = jnp.ones(tokens_BT.shape, bool) if mask_BT is None else mask_BT
      count_B1 = jnp.maximum(jnp.sum(mask_BT, axis=1, keepdims=True), 1)
      p_BD = jnp.sum(jnp.where(mask_BT[..., None], h_BTD.astype(wide), 0), axis=1) / count_B1
      p_BD = p_BD.astype(encoder.dtype)
    embedding = (encoder.recipe if recipe is None else recipe).embedding
    drop = nn.Dropout(self.dropout_rate, deterministic=deterministic)
    init = dense_init(embedding.tokens).kernel
    dense = nn.Dense(encoder.width, kernel_init=init, dtype=encoder.dtype, name="head_dense")
    out = nn.Dense(self.classes, kernel_init=init, dtype=encoder.dtype, name="head_out")
    scores_BC = out(drop(jnp.tanh(dense(drop(p_BD))))).astype(wide)
    return (scores_BC, hidden_LBTD) if return_hidden_states else scores_BC
