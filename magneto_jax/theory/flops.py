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


def masked_data_step_flops(
  *,
  pairs: int,
  images: int,
  texts: int,
  vocab_size: int,
  image_vocab_size: int,
  image_places: int,
  text_places: int,
  pair_text_places: int,
  patches: int,
  patch_pixels: int,
  seq_length: int,
  layers: int,
  width: int,
  encoding: int = 0,
  **sizes,
) -> int:
  """FLOPs of one step of masked data modelling.

  Args:
    pairs, images, texts: how many pairs, images alone and texts alone a step has.
    image_places, text_places, pair_text_places: of how many patches of an image, tokens of a text
      alone and tokens of a pair's text scores are made.
    patches: an image's; a class token stands before them.
    patch_pixels: numbers that a patch is made of, p^2 times the channels.
    encoding: multiplications by which a tokenizer that rests gives an image its tokens.
    **sizes: and the others: see `train_step_flops`. An expert a modality costs what one costs.
  """
  stack = lambda length: stack_products(layers=layers, width=width, length=length, **sizes)
  seen = pairs + images
  trained = pairs * stack(1 + patches + seq_length)
  trained += images * stack(1 + patches) + texts * stack(seq_length)
  scored = pairs * pair_text_places + texts * text_places
  trained += seen * image_places * width * image_vocab_size + scored * width * vocab_size
  # Pixels need no gradient: two products, not three; the tokenizer needs none at all.
  return 6 * trained + seen * (4 * patches * patch_pixels * width + 2 * encoding)


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
    patches, patch_pixels: see `masked_data_step_flops`.
    **sizes: and the others: see `train_step_flops`.
  """
  stack = stack_products(layers=layers, width=width, length=length, **sizes)
  # Pixels need no gradient: two products, not three.
  return batch_size * (6 * (stack + width * classes) + 4 * patches * patch_pixels * width)


def speech_step_flops(
  *,
  head: str,
  vocab_size: int,
  samples: int,
  seq_length: int,
  batch_size: int,
  encoder_layers: int,
  layers: int,
  width: int,
  sample_rate: int,
  mel_bins: int,
  front_end: str,
  joint_width: int = 0,
  predictor_layers: int = 0,
  predictor_width: int = 0,
  with_ctc: bool = False,
  **sizes,
) -> int:
  """FLOPs of one step of a model of speech, of a transducer those of the whole lattice.

  Args:
    head: `ctc`, `transducer` or `decoder`.
    samples: of a sound.
    seq_length: U, labels of a text, without marks.
    encoder_layers, layers: of the encoder, and of the decoder if there is one.
    sample_rate, mel_bins, front_end: of the front end, `conv`, `vgg` or `conv2d`, as they are by
      default.
    joint_width, predictor_layers, predictor_width: of a transducer; no layers: its predictor is
      stateless, of two labels.
    with_ctc: whether a CTC is trained beside a transducer or a decoder.
    **sizes: and the others: see `train_step_flops`.
  """
  mel, first, rest, length = _front_end_products(
    samples=samples, sample_rate=sample_rate, mel_bins=mel_bins, front_end=front_end, width=width
  )
  products = stack_products(layers=encoder_layers, width=width, length=length, **sizes)
  columns = seq_length + 1
  if head == "decoder":
    products += stack_products(
      layers=layers, width=width, length=columns, memory_length=length, **sizes
    )
    products += columns * width * vocab_size
  elif head == "transducer":
    read = predictor_width if predictor_layers else 2 * predictor_width
    products += columns * predictor_layers * 8 * predictor_width**2
    products += (length * width + columns * read) * joint_width
    products += length * columns * joint_width * vocab_size
  if with_ctc or head == "ctc":
    products += length * width * vocab_size
  # A spectrogram needs no gradient: one product of its own, and two of what reads it.
  return batch_size * (2 * mel + 4 * first + 6 * (rest + products))


def _front_end_products(
  *, samples: int, sample_rate: int, mel_bins: int, front_end: str, width: int
) -> tuple[int, int, int, int]:
  """Multiplications of one sound's front end, forward, and T, how many vectors it makes.

  Those of the spectrogram, of what reads it, and of the rest.
  """
  window, hop = round(sample_rate * 0.025), round(sample_rate * 0.010)
  frames = 1 + (samples - window) // hop
  frequencies = (1 << (window - 1).bit_length()) // 2 + 1
  mel = frames * frequencies * mel_bins
  if front_end == "conv":
    half, length = (frames + 1) // 2, ((frames + 1) // 2 + 1) // 2
    return mel, half * 5 * mel_bins * 1024, length * 5 * 512 * 2 * width, length
  if front_end == "conv2d":
    half, bins = (frames - 1) // 2, (mel_bins - 1) // 2
    length, left = (half - 1) // 2, (bins - 1) // 2
    return mel, half * bins * 9 * width, length * left * (9 + 1) * width**2, length
  half, length, bins, left = frames // 2, frames // 2 // 2, mel_bins // 2, mel_bins // 2 // 2
  rest = frames * mel_bins * 9 * 64 * 64 + half * bins * 9 * (64 * 128 + 128 * 128)
  return mel, frames * mel_bins * 9 * 64, rest + length * left * 128 * width, length


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
