"""Floating-point operations of a train step, counted from a model's sizes.

Those of the matrix products of one forward and backward pass: a product of [m, k] and [k, n] counts
2 m k n, the backward pass twice the forward. Attention counts the full scores, also under a causal
mask (the convention of PaLM, arXiv 2204.02311, appendix B). Recomputation (remat) and elementwise
work are not counted.
"""


def train_step_flops(
  *, vocab_size: int, seq_length: int, batch_size: int, layers: int, width: int, **sizes
) -> int:
  """FLOPs of one step of a causal language model.

  Args:
    vocab_size, layers, width: of the model.
    seq_length: T.
    batch_size: sequences.
    **sizes: see `stack_products`.
  """
  stack = stack_products(layers=layers, width=width, length=seq_length, **sizes)
  return 6 * batch_size * (stack + seq_length * width * vocab_size)


def masked_step_flops(
  *,
  vocab_size: int,
  seq_length: int,
  places: int,
  batch_size: int,
  layers: int,
  width: int,
  **sizes,
) -> int:
  """FLOPs of one step of a masked language model with a dense head.

  Args:
    places: tokens of a row that are scored.
    **sizes: and the others: see `train_step_flops`.
  """
  stack = stack_products(layers=layers, width=width, length=seq_length, **sizes)
  return 6 * batch_size * (stack + places * width * (width + vocab_size))


def encoder_decoder_step_flops(
  *,
  vocab_size: int,
  source_length: int,
  seq_length: int,
  batch_size: int,
  encoder_layers: int,
  layers: int,
  width: int,
  **sizes,
) -> int:
  """FLOPs of one step of an encoder-decoder whose stacks have one width; see `train_step_flops`."""
  encoder = stack_products(layers=encoder_layers, width=width, length=source_length, **sizes)
  decoder = stack_products(
    layers=layers, width=width, length=seq_length, memory_length=source_length, **sizes
  )
  return 6 * batch_size * (encoder + decoder + seq_length * width * vocab_size)


def masked_pairs_step_flops(
  *,
  vocab_size: int,
  image_vocab_size: int,
  patches: int,
  patch_pixels: int,
  seq_length: int,
  batch_size: int,
  layers: int,
  width: int,
  **sizes,
) -> int:
  """FLOPs of one step of masked data modelling on pairs, every patch and token scored.

  Args:
    patches: an image's; a class token stands before them.
    patch_pixels: numbers that a patch is made of, p^2 times the channels.
    **sizes: and the others: see `train_step_flops`. An expert a modality costs what one costs.
  """
  stack = stack_products(layers=layers, width=width, length=1 + patches + seq_length, **sizes)
  heads = patches * width * image_vocab_size + seq_length * width * vocab_size
  # Pixels need no gradient: two products, not three.
  return batch_size * (6 * (stack + heads) + 4 * patches * patch_pixels * width)


def image_step_flops(
  *,
  classes: int,
  length: int,
  patches: int,
  patch_pixels: int,
  batch_size: int,
  layers: int,
  width: int,
  **sizes,
) -> int:
  """FLOPs of one step of a classifier of images, with a linear head on one vector.

  Args:
    length: tokens of an image, with the class token if there is one.
    patches, patch_pixels: see `masked_pairs_step_flops`.
    **sizes: and the others: see `train_step_flops`.
  """
  stack = stack_products(layers=layers, width=width, length=length, **sizes)
  # Pixels need no gradient: two products, not three.
  return batch_size * (6 * (stack + width * classes) + 4 * patches * patch_pixels * width)


def stack_products(
  *,
  layers: int,
  width: int,
  ffn_width: int,
  heads: int,
  kv_heads: int,
  head_dim: int,
  length: int,
  memory_length: int = 0,
  gated: bool = False,
) -> int:
  """Multiplications of a stack's matrix products, forward, for one row.

  Args:
    layers, width, ffn_width, heads, kv_heads, head_dim: of the stack.
    length: tokens of the row.
    memory_length: tokens that its cross-attention reads; 0 without one.
    gated: whether the feed-forward network has a gate (swiglu).
  """
  reading, written = 2 * width * heads * head_dim, 2 * width * kv_heads * head_dim
  ffn = (3 if gated else 2) * width * ffn_width
  attention = length * (reading + written + 2 * length * heads * head_dim)
  if memory_length:
    attention += length * (reading + 2 * memory_length * heads * head_dim)
    attention += memory_length * written
  return layers * (attention + length * ffn)
