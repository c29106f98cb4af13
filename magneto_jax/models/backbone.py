"""What every model made of a recipe's stack shares: sizes, the front end, masks, the stack."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax import sharding
from magneto_jax.kernels import RelativeBias
from magneto_jax.layers import positions as position_layers
from magneto_jax.layers.attention import Attention
from magneto_jax.layers.feed_forward import FeedForward
from magneto_jax.layers.initializers import kernel_init
from magneto_jax.layers.norms import norm_factory
from magneto_jax.models.transformer import (
  Block,
  Caches,
  Context,
  Stack,
  StackOutput,
  init_caches,
)
from magneto_jax.theory import records

# In a state's memory_ids_BS: no memory has been given yet.
UNWRITTEN = -1


class DecodingState(NamedTuple):
  """What decoding carries from one call to the next.

  Attributes:
    caches: keys and values of every layer.
    segment_ids_BS: of the tokens written so far; 0 where nothing lies, not positive for padding.
    memory_ids_BS: 1 where the memory holds a token, 0 for its padding, UNWRITTEN before its first
      call; None without cross-attention.
  """

  caches: Caches
  segment_ids_BS: jax.Array
  memory_ids_BS: jax.Array | None = None

  @property
  def length(self) -> jax.Array:
    """How many tokens of each row have been written (padding included)."""
    return self.caches[0][0].self_attention.length

  @property
  def before(self) -> int:
    """How many rows a prefix has that stands before all tokens."""
    prefix = self.caches[0][0].prefix
    return 0 if prefix is None else prefix.k_LBKSH.shape[-2]

  def without_last(self) -> "DecodingState":
    """The state as it was before its last token: what is read next is written in its place."""
    length = self.length - 1
    is_left_1S = jnp.arange(self.segment_ids_BS.shape[1])[None] < length

    def shortened(block):
      return block._replace(self_attention=block.self_attention._replace(length=length))

    return self._replace(
      caches=tuple(tuple(map(shortened, blocks)) for blocks in self.caches),
      segment_ids_BS=jnp.where(is_left_1S, self.segment_ids_BS, 0),
    )

  def written(self, shape: tuple[int, int], segment_ids) -> tuple[jax.Array, jax.Array]:
    """Segment ids of new tokens [B, T] as queries, and of all tokens with the new ones among them.

    Args:
      shape: [B, T].
      segment_ids: of the new tokens, as `visibility` has them.

    Raises:
      ValueError: there are more of them than there is room for.
    """
    written_BS = self.segment_ids_BS
    if shape[1] > written_BS.shape[1]:
      raise ValueError(f"{shape[1]} tokens do not fit a state of {written_BS.shape[1]}")
    ones_BT = jnp.ones(shape, written_BS.dtype)
    q_BT, kv_BT = (ones_BT, ones_BT) if segment_ids is None else segment_ids
    kv_BT = jnp.asarray(kv_BT, written_BS.dtype)
    return (
      jnp.asarray(q_BT, written_BS.dtype),
      jax.lax.dynamic_update_slice_in_dim(written_BS, kv_BT, self.length, axis=1),
    )


class Ways(NamedTuple):
  """Factory -> factory, by place: what turns projections and norms into multiway ones.

  Attributes:
    around: of the norms of the embedding and of the last layer's output.
    attention: of the attention and the norms around it.
    ffn: of the feed-forward networks and the norms around them, one for each segment of the recipe,
      or one for all.
  """

  around: Callable[[Callable], Callable] = lambda factory: factory
  attention: Callable[[Callable], Callable] = lambda factory: factory
  ffn: tuple[Callable[[Callable], Callable], ...] = (lambda factory: factory,)


class Backbone(nn.Module, kw_only=True):
  """The sizes and choices of one stack; `CausalLM` and `Encoder` add what goes in and comes out.

  Attributes:
    recipe: the stack's record, e.g. `RECIPES["magneto"](architecture).decoder`; its numbers are
      floats or tuples, as modules must be hashable.
    width: D; num_heads: N; ffn_width: F.
    num_kv_heads: K, a divisor of N; N by default.
    head_dim: H; D / N by default.
    activation: of the feed-forward network.
    use_bias: whether projections have biases.
    positions: `learned`, `sinusoidal`, `rotary`, `xpos` or `none`, or a tuple of several.
    max_length: how many positions the learned table holds.
    position_offset: the row (or the angle) of position 0; torchscale's learned positions and
      fairseq's of both kinds start at 2.
    xpos_scale_base: see `layers.xpos`.
    relative_buckets: rows of the table of relative position biases that all layers share, as in
      T5; 0 for no such bias.
    relative_max_distance: from which on all distances share a row.
    relative_bidirectional: whether keys ahead have rows of their own; None: unless causal.
    relative_cross: whether cross-attention has such a table too. It counts rows, padding included,
      so that both sides should be padded behind.
    window, logits_soft_cap: of the self-attention; see `Attention`.
    dropout_rate: of the embedding and of every branch.
    attention_dropout_rate: of the attention probabilities.
    activation_dropout_rate: of the feed-forward network's hidden layer.
    drop_path_rate, remat, unroll: see `Stack`.
    norm_epsilon: added to the variance in every norm.
    dtype: of the computation; parameters, norm statistics and logits are float32.
    attention_implementation: see `kernels.dot_product_attention`.
  """

  recipe: records.Stack
  width: int
  num_heads: int
  ffn_width: int
  num_kv_heads: int | None = None
  head_dim: int | None = None
  activation: str = "gelu"
  use_bias: bool = True
  positions: str | tuple[str, ...] = "sinusoidal"
  max_length: int = 1024
  position_offset: int = 0
  xpos_scale_base: float = 512.0
  relative_buckets: int = 0
  relative_max_distance: int = 128
  relative_bidirectional: bool | None = None
  relative_cross: bool = False
  window: tuple[int | None, int | None] | None = None
  logits_soft_cap: float | None = None
  dropout_rate: float = 0.0
  attention_dropout_rate: float = 0.0
  activation_dropout_rate: float = 0.0
  drop_path_rate: float = 0.0
  remat: str = "none"
  unroll: int = 1
  norm_epsilon: float = 1e-5
  dtype: jnp.dtype = jnp.float32
  attention_implementation: str | None = None

  @property
  def longest(self) -> int | None:
    """How many tokens the model can read at most; None where there is no bound."""
    return self.max_length if "learned" in self.position_kinds else None

  @property
  def position_kinds(self) -> tuple[str, ...]:
    """The kinds of position encodings, however `positions` gives them."""
    kinds = (self.positions,) if isinstance(self.positions, str) else self.positions
    for kind in kinds:
      if kind not in position_layers.KINDS:
        raise ValueError(f"positions={kind!r} must be one of {', '.join(position_layers.KINDS)}")
    return kinds

  def _check_length(self, length: int):
    """Raises if the learned table is too short: a look-up outside it would be NaN."""
    if self.longest is not None and length > self.longest:
      raise ValueError(f"{length} positions do not fit the learned table of {self.max_length=}")

  def _checked(self, recipe: records.Stack | None) -> records.Stack:
    """The record to run, if it has the parameters of the model's own."""
    recipe = self.recipe if recipe is None else recipe
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

  def _start(
    self, x_BTD, positions_BT, recipe: records.Stack, norm, mask_BT=None, *, deterministic
  ) -> jax.Array:
    """The stream's start: embeddings with positions, then norm, dropout and, if given, a mask."""
    rows_BT = jnp.maximum(positions_BT + self.position_offset, 0)
    if "sinusoidal" in self.position_kinds:
      encoding_BTD = position_layers.sinusoidal(rows_BT, self.width)
      x_BTD += jnp.where(positions_BT[..., None] < 0, 0.0, encoding_BTD)
    if "learned" in self.position_kinds:
      table = nn.Embed(
        self.max_length + self.position_offset,
        self.width,
        embedding_init=kernel_init(recipe.embedding.positions),
        name="position_embedding",
      )
      x_BTD += table(rows_BT)
    x_BTD = x_BTD.astype(self.dtype)
    if recipe.embedding.norm:
      x_BTD = norm(name="embedding_norm")(x_BTD)
    x_BTD = nn.Dropout(self.dropout_rate)(x_BTD, deterministic=deterministic)
    if mask_BT is not None:
      x_BTD = jnp.where(mask_BT[..., None], x_BTD, 0)
    return sharding.constrain(x_BTD, "batch", "length", None)

  def _relative_bias(self, init: records.Init, name: str, *, is_bidirectional: bool):
    """T5's bias from a table of this model; None if it has none."""
    if not self.relative_buckets:
      return None
    both = self.relative_bidirectional
    return RelativeBias(
      self.param(name, kernel_init(init), (self.relative_buckets, self.num_heads)),
      bidirectional=is_bidirectional if both is None else both,
      max_distance=self.relative_max_distance,
    )

  def _caches(self, batch: int, length: int, **options) -> Caches:
    """Empty caches of this stack; see `init_caches`."""
    return init_caches(
      self.recipe,
      batch=batch,
      length=length,
      kv_heads=self.num_kv_heads or self.num_heads,
      head_dim=self.head_dim or self.width // self.num_heads,
      dtype=self.dtype,
      **options,
    )

  def _norm(self, wrap: Callable = lambda factory: factory):
    return wrap(norm_factory(self.recipe.norm, epsilon=self.norm_epsilon, dtype=self.dtype))

  def _run(
    self,
    x_BTD: jax.Array,
    recipe: records.Stack,
    context: Context,
    *,
    is_causal: bool,
    is_bidirectional: bool | None = None,
    ways: Ways = Ways(),
    caches: Caches | None = None,
    return_hidden_states: bool = False,
    deterministic: bool = True,
  ) -> StackOutput:
    """The stack; relative biases are bidirectional by default unless it is causal."""
    attention = functools.partial(
      Attention,
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads,
      head_dim=self.head_dim,
      dense=ways.attention(nn.DenseGeneral),
      use_bias=self.use_bias,
      logits_soft_cap=self.logits_soft_cap,
      dropout_rate=self.attention_dropout_rate,
      dtype=self.dtype,
      implementation=self.attention_implementation,
    )
    rotations = [kind for kind in self.position_kinds if kind in position_layers.ROTATIONS]
    if len(rotations) > 1:
      raise ValueError(f"{self.positions=}: queries and keys can be rotated in one way only")
    rotation = position_layers.ROTATIONS[rotations[0]] if rotations else None
    if "xpos" in rotations:
      rotation = functools.partial(rotation, scale_base=self.xpos_scale_base)
    block_of = lambda way: functools.partial(
      Block,
      attention=functools.partial(
        attention, is_causal=is_causal, window=self.window, rotation=rotation
      ),
      cross_attention=functools.partial(attention, is_cross=True),
      feed_forward=functools.partial(
        FeedForward,
        ffn_width=self.ffn_width,
        activation=self.activation,
        dense=way(nn.DenseGeneral),
        use_bias=self.use_bias,
        dropout_rate=self.activation_dropout_rate,
        dtype=self.dtype,
      ),
      norm=self._norm(ways.attention),
      ffn_norm=self._norm(way),
      dropout_rate=self.dropout_rate,
    )
    blocks = tuple(map(block_of, ways.ffn))
    relative = recipe.embedding.relative
    is_bidirectional = not is_causal if is_bidirectional is None else is_bidirectional
    bias = self._relative_bias(relative, "relative_bias", is_bidirectional=is_bidirectional)
    if bias is not None and context.bias is not None:
      bias = bias.materialize(x_BTD.shape[1], context.bias.shape[-1]) + context.bias
    if bias is not None:
      context = context._replace(bias=bias)
    if self.relative_cross and records.has_cross_attention(recipe):
      bias = self._relative_bias(relative, "cross_relative_bias", is_bidirectional=True)
      context = context._replace(memory_bias=bias)
    stack = Stack(
      blocks if len(blocks) > 1 else blocks[0],
      self._norm(ways.around),
      self.drop_path_rate,
      self.remat,
      self.unroll,
      name="stack",
    )
    return stack(
      x_BTD,
      recipe,
      context,
      caches=caches,
      return_hidden_states=return_hidden_states,
      deterministic=deterministic,
    )


class TokenTable(nn.Module):
  """The table [V, D] of token embeddings, drawn as the record of the call says."""

  vocab_size: int
  width: int

  @nn.compact
  def __call__(self, init: records.Init) -> jax.Array:
    return self.param("embedding", kernel_init(init), (self.vocab_size, self.width))


def look_up(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
  """The rows [B, T, D] of tokens.

  On a mesh devices exchange the channels of their rows of the table first: left to itself XLA
  exchanges all of the looked-up stream.
  """
  table_VD = sharding.constrain(table_VD, "vocab", None)
  return sharding.constrain(jnp.take(table_VD, tokens_BT, axis=0), "batch", "length", None)


def as_mask(mask, shape: tuple[int, ...], name: str) -> jax.Array:
  """The mask as booleans, if it is one of this shape.

  Floats are refused: they would be additive masks, 0 for what is seen, the opposite of ours.
  """
  mask = jnp.asarray(mask)
  if mask.shape != shape:
    raise ValueError(f"{name} must be of shape {list(shape)}, not {list(mask.shape)}")
  if not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)):
    raise ValueError(f"{name} must be of booleans, or of integers 0 and 1, not {mask.dtype}")
  return mask.astype(bool)


def padding_mask(shape, mask_BT, segment_ids_BT) -> jax.Array | None:
  """True for tokens: as it is given, or else where the segment ids are positive."""
  if mask_BT is not None:
    return as_mask(mask_BT, shape, "mask_BT")
  return None if segment_ids_BT is None else segment_ids_BT > 0


def visibility(shape, mask_BT, segment_ids_BT) -> tuple[jax.Array, jax.Array] | None:
  """Segment ids of queries and of keys; None if every query sees every key.

  Padding is a segment that no query is in: padded tokens are seen by nobody, and without segments
  of its own see the real ones.
  """
  if mask_BT is None:
    return None
  ids_BT = jnp.ones(shape, jnp.int32) if segment_ids_BT is None else jnp.asarray(segment_ids_BT)
  return ids_BT, jnp.where(mask_BT, ids_BT, jnp.iinfo(ids_BT.dtype).min)


def positions_of(shape, mask_BT, start=0) -> jax.Array:
  """Positions of tokens: how many real ones lie before each; -1 for padding."""
  if mask_BT is None:
    return jnp.arange(shape[1])[None] + start
  return jnp.where(mask_BT, jnp.cumsum(mask_BT, axis=1) - 1 + start, -1)
