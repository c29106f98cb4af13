"""Floating-point operations of a decoder, counted from its sizes."""


def train_step_flops(
  *,
  layers: int,
  width: int,
  ffn_width: int,
  heads: int,
  kv_heads: int,
  head_dim: int,
  vocab_size: int,
  seq_length: int,
  batch_size: int,
  gated: bool = False,
) -> int:
  """FLOPs of the matrix products of one forward and backward pass of a causal language model.

  A product of [m, k] and [k, n] counts 2 m k n, the backward pass twice the forward. Attention
  counts the full T x T scores, also under a causal mask (the convention of PaLM, arXiv
  2204.02311, appendix B). Recomputation (remat) and elementwise work are not counted.

  Args:
    layers, width, ffn_width, heads, kv_heads, head_dim, vocab_size: of the model.
    seq_length: T.
    batch_size: sequences.
    gated: whether the feed-forward network has a gate (swiglu).
  """
  projections = 2 * width * heads * head_dim + 2 * width * kv_heads * head_dim
  ffn = (3 if gated else 2) * width * ffn_width
  attention = 2 * seq_length * heads * head_dim
  per_token = layers * (projections + ffn + attention) + width * vocab_size
  return 3 * 2 * per_token * seq_length * batch_size
