"""What is measured: sizes, the same for every library, and random inputs."""

import dataclasses

import numpy as np

from magneto_jax.theory.flops import train_step_flops


@dataclasses.dataclass(frozen=True)
class Shape:
  """A language model and its batch.

  Attributes:
    layers, width, heads, ffn_width, vocab_size: L, D, N, F, V.
    seq_length, batch_size: T, B.
    causal: a decoder; if not, a bidirectional encoder over rows padded to T (50 to 100 % full).
    max_length: rows of the learned position table.
  """

  layers: int
  width: int
  heads: int
  ffn_width: int
  vocab_size: int
  seq_length: int
  batch_size: int
  causal: bool = True
  max_length: int = 256

  @property
  def tokens(self) -> int:
    return self.batch_size * self.seq_length

  @property
  def step_flops(self) -> int:
    """Of the matrix products of a train step; the forward pass alone has a third of them."""
    return train_step_flops(
      layers=self.layers,
      width=self.width,
      ffn_width=self.ffn_width,
      heads=self.heads,
      kv_heads=self.heads,
      head_dim=self.width // self.heads,
      vocab_size=self.vocab_size,
      seq_length=self.seq_length,
      batch_size=self.batch_size,
    )

  def batch(self, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs and targets [B, T], and how many tokens of each row are real [B]."""
    rng = np.random.default_rng(seed)
    inputs, targets = rng.integers(0, self.vocab_size, (2, self.batch_size, self.seq_length))
    fill = np.linspace(1.0, 1.0 if self.causal else 0.5, self.batch_size)
    lengths = np.round(fill * self.seq_length)
    arrays = {"inputs": inputs, "targets": targets, "lengths": lengths}
    return {name: array.astype(np.int32) for name, array in arrays.items()}


@dataclasses.dataclass(frozen=True)
class Attention:
  """One attention between its projections: T queries and as many keys.

  Attributes:
    batch, length, heads, head_dim: B, T, N, H.
    causal: whether keys ahead of the query are hidden.
    dtype: of queries, keys and values.
    bias: whether there is a relative position bias.
    dropout: the fraction of the probabilities to drop.
    bias_gradient: whether the bias is learned.
    padding: whether the rows are 50 to 100 % full.
  """

  batch: int
  length: int
  heads: int
  head_dim: int
  causal: bool = True
  dtype: str = "float32"
  bias: bool = False
  dropout: float = 0.0
  bias_gradient: bool = False
  padding: bool = False

  @property
  def name(self) -> str:
    """`T1024 H64 B16 causal bias+padding`."""
    flags = {"bias": self.bias, "gradient": self.bias_gradient}
    flags |= {"padding": self.padding, "dropout": self.dropout > 0}
    features = "+".join(name for name, has in flags.items() if has) or "plain"
    kind = "causal" if self.causal else "full"
    return f"T{self.length} H{self.head_dim} B{self.batch} {kind} {features}"

  @property
  def flops(self) -> dict[str, int]:
    """Of the two products: all T x T scores, also under a causal mask; backward twice forward.

    The conventions of `train_step_flops`. So whoever skips hidden blocks can exceed a share of 1,
    and scores computed again in the backward pass count once.
    """
    forward = 4 * self.batch * self.heads * self.length**2 * self.head_dim
    return {"forward": forward, "gradient": 3 * forward}

  @property
  def visible_share(self) -> float:
    """The share of the T x T scores that neither the causal mask nor padding hides."""
    keys = np.minimum(np.arange(self.length) + 1, self.lengths()[:, None])
    if not self.causal:
      keys = np.broadcast_to(self.lengths()[:, None], keys.shape)
    return float(keys.mean() / self.length)

  def lengths(self) -> np.ndarray:
    """How many keys of each row are real [B], int32."""
    fill = np.linspace(1.0, 0.5 if self.padding else 1.0, self.batch)
    return np.round(fill * self.length).astype(np.int32)

  def scores_bytes(self, itemsize: int) -> int:
    """Of one array of all T x T scores."""
    return self.batch * self.heads * self.length**2 * itemsize

  def inputs(self, seed: int = 0) -> np.ndarray:
    """Queries, keys, values and the output's gradient [4, B, T, N, H], float32, unit variance."""
    shape = (4, self.batch, self.length, self.heads, self.head_dim)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)

  def bias_table(self, seed: int = 1) -> np.ndarray:
    """A table [32, N] of T5's buckets, float32."""
    return np.random.default_rng(seed).standard_normal((32, self.heads), np.float32)


@dataclasses.dataclass(frozen=True)
class Transducer:
  """The loss of a transducer, from the joiner's projections on.

  Attributes:
    batch, frames, labels, vocab_size, width: B, T, U, V, J.
    timed: whether it is run, and not compiled alone.
  """

  batch: int
  frames: int
  labels: int
  vocab_size: int
  width: int
  timed: bool = True

  @property
  def name(self) -> str:
    """`B8 T400 U60 V5000 J512`."""
    return f"B{self.batch} T{self.frames} U{self.labels} V{self.vocab_size} J{self.width}"

  @property
  def logits_mib(self) -> float:
    """Of all logits in float32."""
    return self.batch * self.frames * (self.labels + 1) * self.vocab_size * 4 / 2**20

  def shapes(self) -> list[tuple[int, ...]]:
    """Of encoder's and predictor's projections, kernel and bias."""
    columns = self.labels + 1
    rows = [(self.batch, length, self.width) for length in (self.frames, columns)]
    return [*rows, (self.width, self.vocab_size), (self.vocab_size,)]

  def inputs(self, seed: int = 0) -> list[np.ndarray]:
    """What `shapes` says, frames, labels and label lengths, from whole to half."""
    rng = np.random.default_rng(seed)
    joiner = [rng.standard_normal(shape, np.float32) for shape in self.shapes()]
    joiner[2] /= np.float32(self.width**0.5)
    labels = rng.integers(1, self.vocab_size, (self.batch, self.labels))
    fill = np.linspace(1.0, 0.5, self.batch)
    frames, lengths = (np.round(fill * size) for size in (self.frames, self.labels))
    return [*joiner, *(x.astype(np.int32) for x in (frames, labels, lengths))]


def normals(seed: int = 0) -> np.ndarray:
  """A prime number of normals, float32: what arrays too large to send are read from, round and
  round, so that every library makes the same ones on its device."""
  return np.random.default_rng(seed).standard_normal(1_000_003, np.float32)


_TINY = Shape(
  layers=6, width=256, heads=4, ffn_width=1024, vocab_size=8192, seq_length=256, batch_size=8
)
_SMOKE = Shape(
  layers=2, width=16, heads=2, ffn_width=32, vocab_size=64, seq_length=24, batch_size=2
)
SHAPES = {
  "gpt-tiny": _TINY,
  "bert-tiny": dataclasses.replace(_TINY, causal=False),
  # GPT-3 XL's size with heads of a width that tensor cores like, and GPT-2's vocabulary in full
  # blocks of 128. The batch is what a card of 80 GB holds.
  "gpt-1b3": Shape(
    layers=24,
    width=2048,
    heads=16,
    ffn_width=8192,
    vocab_size=50304,
    seq_length=2048,
    batch_size=8,
    max_length=2048,
  ),
  # Where only depth is of interest.
  "narrow": Shape(
    layers=12, width=64, heads=4, ffn_width=256, vocab_size=1024, seq_length=128, batch_size=4
  ),
  # Small enough for tests of the benchmarks themselves.
  "smoke": _SMOKE,
  "smoke-encoder": dataclasses.replace(_SMOKE, causal=False),
}
