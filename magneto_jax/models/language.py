"""Language models: the causal decoder."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax.layers import positions as position_layers
from magneto_jax.layers.attention import Attention, KVCache
from magneto_jax.layers.feed_forward import FeedForward
from magneto_jax.layers.initializers import kernel_init
from magneto_jax.layers.norms import norm_factory
from magneto_jax.models.transformer import Block, Context, Stack, init_caches
from magneto_jax.theory import records


class DecodingState(NamedTuple):
  """What decoding carries from one call to the next.

  Attributes:
    caches: keys and values of every layer.
    segment_ids_BS: of the tokens written so far; 0 where nothing or padding lies.
  """

  caches: tuple[tuple[KVCache, ...], ...]
  segment_ids_BS: jax.Array

  @property
  def length(self) -> jax.Array:
    """How many tokens of each row have been written (padding included)."""
    return self.caches[0][0].length


class CausalLM(nn.Module):
  """A decoder language model: p(x_t | x_<t) = softmax(W h_t), h = stack(embed(x)).

  Attributes:
    recipe: the decoder stack's record, e.g. `RECIPES["magneto"](architecture).decoder`; its numbers
      are floats or tuples, as modules must be hashable.
    vocab_size: V; width: D; num_heads: N; ffn_width: F.
    num_kv_heads: K, a divisor of N; N by default.
    head_dim: H; D / N by default.
    activation: of the feed-forward network.
    positions: `learned`, `sinusoidal`, `rotary` or `none`.
    max_length: rows of the learned position table.
    tied: whether W is the embedding table; else W is drawn as the table is.
    window, logits_soft_cap: of the attention; see `Attention`.
    dropout_rate: of the embedding and of every branch.
    attention_dropout_rate: of the attention probabilities.
    activation_dropout_rate: of the feed-forward network's hidden layer.
    drop_path_rate, remat, unroll: see `Stack`.
    dtype: of the computation; parameters, norm statistics and logits are float32.
    attention_implementation: see `kernels.dot_product_attention`.

  Reference: Foundation Transformers, arXiv 2210.06423, section 2.2.
  """

  recipe: records.Stack
  vocab_size: int
  width: int
  num_heads: int
  ffn_width: int
  num_kv_heads: int | None = None
  head_dim: int | None = None
  activation: str = "gelu"
  positions: str = "sinusoidal"
  max_length: int = 1024
  tied: bool = True
  window: tuple[int | None, int | None] | None = None
  logits_soft_cap: float | None = None
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  activation_dropout_rate: float = 0.0
  drop_path_rate: float = 0.0
  remat: str = "none"
  unroll: int = 1
  dtype: jnp.dtype = jnp.float32
  attention_implementation: str | None = None

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array,
    *,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    state: DecodingState | None = None,
    recipe: records.Stack | None = None,
    deterministic: bool = True,
  ):
    """Scores tokens.

    Args:
      tokens_BT: integers in [0, V).
      positions_BT: positions; by default 0 .. T-1, counted on from the state's length.
      segment_ids_BT: tokens attend within their segment only (packed documents, padding).
      state: earlier tokens (`init_state`); the new ones are scored behind them.
      recipe: a record of the same structure to run instead, whose numbers may be traced: a sweep
        over them compiles once (`records.as_arrays` turns numbers into leaves).
      deterministic: False switches dropout on and needs an rng named `dropout`.

    Returns:
      Logits [B, T, V] in float32 or wider; with a state, the pair of logits and new state. Tokens
      that do not fit the state are lost, and all logits of the call are NaN.
    """
    recipe = self._checked(self.recipe if recipe is None else recipe)
    if positions_BT is None:
      self._check_length(tokens_BT.shape[1])
      positions_BT = jnp.arange(tokens_BT.shape[1])[None] + (0 if state is None else state.length)
    norm = norm_factory(recipe.norm, dtype=self.dtype)

    x_BTD, table_VD = self._embed(tokens_BT, positions_BT, recipe.embedding)
    x_BTD = nn.Dropout(self.dropout_rate)(x_BTD, deterministic=deterministic)

    segment_ids = None if segment_ids_BT is None else (segment_ids_BT, segment_ids_BT)
    if state is not None:
      written_BS = state.segment_ids_BS
      if tokens_BT.shape[1] > written_BS.shape[1]:
        raise ValueError(f"{tokens_BT.shape[1]} tokens do not fit a state of {written_BS.shape[1]}")
      ids = jnp.ones_like(tokens_BT) if segment_ids_BT is None else segment_ids_BT
      segment_ids_BT = jnp.asarray(ids, written_BS.dtype)
      written_BS = jax.lax.dynamic_update_slice_in_dim(
        written_BS, segment_ids_BT, state.length, axis=1
      )
      segment_ids = (segment_ids_BT, written_BS)
    block = functools.partial(
      Block,
      attention=functools.partial(
        Attention,
        num_heads=self.num_heads,
        num_kv_heads=self.num_kv_heads,
        head_dim=self.head_dim,
        is_causal=True,
        window=self.window,
        logits_soft_cap=self.logits_soft_cap,
        rotary=self.positions == "rotary",
        dropout_rate=self.attention_dropout_rate,
        dtype=self.dtype,
        implementation=self.attention_implementation,
      ),
      feed_forward=functools.partial(
        FeedForward,
        ffn_width=self.ffn_width,
        activation=self.activation,
        dropout_rate=self.activation_dropout_rate,
        dtype=self.dtype,
      ),
      norm=norm,
      dropout_rate=self.dropout_rate,
    )
    stack = Stack(block, norm, self.drop_path_rate, self.remat, self.unroll, name="decoder")
    x_BTD, caches = stack(
      x_BTD,
      recipe,
      Context(positions_BT, segment_ids),
      caches=None if state is None else state.caches,
      deterministic=deterministic,
    )
    wide = jnp.promote_types(self.dtype, jnp.float32)
    logits_BTV = jnp.einsum(
      "btd,vd->btv", x_BTD, table_VD.astype(self.dtype), preferred_element_type=wide
    )
    if state is None:
      return logits_BTV
    # The length may be traced, so this cannot raise; XLA would clamp, and overwrite what is there.
    fits = state.length + tokens_BT.shape[1] <= written_BS.shape[1]
    return jnp.where(fits, logits_BTV, jnp.nan), DecodingState(caches, written_BS)

  def _checked(self, recipe: records.Stack) -> records.Stack:
    """The record to run, if it has the parameters of the model's own."""
    for record in (self.recipe, recipe):
      if not isinstance(record, records.Stack):
        raise TypeError(f"recipe must be a Stack, as `Recipe.decoder` is, not {record!r:.60}")
      if record.width not in (None, self.width):
        raise ValueError(f"recipe is for width {record.width}, the model has {self.width=}")
    own, other = (jax.tree.structure(records.as_arrays(r)) for r in (self.recipe, recipe))
    if own != other:
      raise ValueError(
        "the recipe given to the call is of another structure than the model's: only numbers may"
        " differ; for other norms, learned scales, inits or depths build another model"
      )
    return recipe

  @property
  def longest(self) -> int | None:
    """How many tokens the model can score at most; None where there is no bound."""
    return self.max_length if self.positions == "learned" else None

  def _check_length(self, length: int):
    """Raises if the learned table is too short: a look-up outside it would be NaN."""
    if self.longest is not None and length > self.longest:
      raise ValueError(f"{length} positions do not fit the learned table of {self.max_length=}")

  def _embed(self, tokens_BT, positions_BT, embedding: records.Embedding):
    """The stream's start [B, T, D] and the output table [V, D]."""
    if self.positions not in position_layers.KINDS:
      raise ValueError(f"{self.positions=} must be one of {', '.join(position_layers.KINDS)}")

    def table(rows, init, name):
      return nn.Embed(rows, self.width, embedding_init=kernel_init(init), name=name)

    tokens = table(self.vocab_size, embedding.tokens, "token_embedding")
    x_BTD = tokens(tokens_BT) * embedding.scale
    if self.positions == "sinusoidal":
      x_BTD += position_layers.sinusoidal(positions_BT, self.width)
    if self.positions == "learned":
      x_BTD += table(self.max_length, embedding.positions, "position_embedding")(positions_BT)
    output = tokens if self.tied else table(self.vocab_size, embedding.tokens, "output_embedding")
    return x_BTD.astype(self.dtype), output.embedding

  def init_state(self, batch: int, length: int) -> DecodingState:
    """An empty decoding state for `length` tokens, prompt included."""
    self._check_length(length)
    caches = init_caches(
      self.recipe,
      batch=batch,
      length=length,
      kv_heads=self.num_kv_heads or self.num_heads,
      head_dim=self.head_dim or self.width // self.num_heads,
      dtype=self.dtype,
    )
    return DecodingState(caches, jnp.zeros((batch, length), jnp.int32))
