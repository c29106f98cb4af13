"""Prediction networks of transducers: what is known of the next label from those before it."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax.layers.initializers import normal

# The id that stands before the first label: the blank's, which is no label.
START = 0


class LSTMPredictor(nn.Module, kw_only=True):
  """g_u = LSTM(E y_0, ..., E y_u), y_0 = 0: of all labels so far.

  Attributes:
    vocab_size: V, with the blank.
    width: P, of the embeddings and of every layer.
    layers: how many.
    dropout_rate: of the embeddings, and of what each layer puts out.
    dtype: of the computation; parameters are float32, states float32 or wider.

  Reference: Graves, arXiv 1211.3711, section 2.2. The cell: Gers et al., Learning to Forget, Neural
  Computation 12(10).
  """

  vocab_size: int
  width: int
  layers: int = 1
  dropout_rate: float = 0.0
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    if self.layers < 1:
      raise ValueError(f"layers={self.layers} must be at least 1")
    self.token_embedding = _embedding(self)
    self.lstm = [nn.OptimizedLSTMCell(self.width, dtype=self.dtype) for _ in range(self.layers)]

  @nn.compact
  def __call__(self, labels_BU: jax.Array, *, deterministic: bool = True) -> jax.Array:
    """g [B, U, P] after each of the labels [B, U], the first of which is START."""
    drop = nn.Dropout(self.dropout_rate, deterministic=deterministic)
    g_BUP = drop(self.token_embedding(labels_BU))
    for cell, carry in zip(self.lstm, self.init_state(len(labels_BU)), strict=True):
      g_BUP = drop(nn.RNN(cell)(g_BUP, initial_carry=carry))
    return g_BUP

  def init_state(self, batch: int) -> tuple:
    """The state before START: (c, h), each [B, P], of every layer."""
    zeros_BP = jnp.zeros((batch, self.width), jnp.promote_types(self.dtype, jnp.float32))
    return ((zeros_BP, zeros_BP),) * self.layers

  def step(self, state: tuple, labels_B: jax.Array) -> tuple[tuple, jax.Array]:
    """The state after one more label, and g [B, P]."""
    g_BP, new = self.token_embedding(labels_B), []
    for cell, carry in zip(self.lstm, state, strict=True):
      carry, g_BP = cell(carry, g_BP)
      new.append(carry)
    return tuple(new), g_BP


class StatelessPredictor(nn.Module, kw_only=True):
  """g_u = [E y_{u-c+1}; ...; E y_u], y_u = 0 for u <= 0: of the last c labels alone.

  Attributes:
    vocab_size: V, with the blank.
    width: P, of the embeddings; g is of width c P.
    context: c.
    dropout_rate: of the embeddings.
    dtype: of the computation; parameters are float32.

  Reference: Ghodsi et al., RNN-Transducer with Stateless Prediction Network, ICASSP 2020.
  """

  vocab_size: int
  width: int
  context: int = 2
  dropout_rate: float = 0.0
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    if self.context < 1:
      raise ValueError(f"context={self.context} must be at least 1")
    self.token_embedding = _embedding(self)

  @nn.compact
  def __call__(self, labels_BU: jax.Array, *, deterministic: bool = True) -> jax.Array:
    """g [B, U, c P] after each of the labels [B, U], the first of which is START."""
    drop = nn.Dropout(self.dropout_rate, deterministic=deterministic)
    count = labels_BU.shape[1]
    padded = jnp.pad(labels_BU, ((0, 0), (self.context - 1, 0)), constant_values=START)
    return drop(self._read([padded[:, i : i + count] for i in range(self.context)]))

  def init_state(self, batch: int) -> jax.Array:
    """The state before START: the last c - 1 labels."""
    return jnp.full((batch, self.context - 1), START, jnp.int32)

  def step(self, state: jax.Array, labels_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The state after one more label, and g [B, c P]."""
    last_BC = jnp.concatenate([state, labels_B[:, None].astype(state.dtype)], axis=1)
    return last_BC[:, 1:], self._read(list(last_BC.T))

  def _read(self, labels: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(list(map(self.token_embedding, labels)), axis=-1)


def _embedding(module: LSTMPredictor | StatelessPredictor) -> nn.Embed:
  """Embeddings of unit variance."""
  return nn.Embed(module.vocab_size, module.width, embedding_init=normal(1.0), dtype=module.dtype)
