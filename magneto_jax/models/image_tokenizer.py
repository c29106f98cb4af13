"""An image tokenizer: an autoencoder of patches whose middle is one code a patch."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax.layers.initializers import lecun_normal
from magneto_jax.layers.quantizer import Quantized, VectorQuantizer
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.vision import VisionEncoder


class Reconstruction(NamedTuple):
  """What a tokenizer makes of images.

  Attributes:
    images_BHWC: pixels, scaled as those that were given, in float32 or wider.
    commitment_B: the mean over patches of the quantizer's commitment.
    tokens_BP: int32; None unless asked for.
  """

  images_BHWC: jax.Array
  commitment_B: jax.Array
  tokens_BP: jax.Array | None = None


class ImageTokenizer(nn.Module, kw_only=True):
  """tokens = argmax_k z . e_k, z = quantizer(encoder(image)); image' = head(decoder(W_e e_tokens)).

  The head is W_2 tanh(W_1 h + b_1) + b_2, the pixels of a patch. Encoder and decoder are stacks
  that see all patches, with any recipe; they may differ in everything but the patches. What trains
  both is that image' be image; the codes follow the encoder (see `VectorQuantizer`), and are in the
  collection `state`.

  Attributes:
    encoder: without a class token.
    decoder: without a vocabulary; with learned positions its max_length is the number of patches.
    codes: K, how many tokens there are.
    code_width, decay, redraw_below: the quantizer's width, decay and redraw_below.

  Reference: BEiT v2, arXiv 2208.06366, section 2.1.
  Differs: the paper restores features of a teacher, CLIP or DINO, by their cosine; here the pixels
  are restored, as no teacher is at hand, so that tokens tell colours and edges more than meanings.

  Example:
    >>> tokens_BP = model.apply(variables, images_BHWC, method="encode")
    >>> images_BHWC = model.apply(variables, tokens_BP, method="decode")
  """

  encoder: VisionEncoder
  decoder: Encoder
  codes: int = 8192
  code_width: int = 32
  decay: float = 0.99
  redraw_below: float = 0.0

  def setup(self):
    if self.encoder.class_token:
      raise ValueError("an image tokenizer has a code for each patch alone: set class_token=False")
    pixels = 3 * self.encoder.patch_size**2
    dense = lambda width: nn.Dense(width, kernel_init=lecun_normal(), dtype=self.decoder.dtype)
    self.quantizer = VectorQuantizer(
      codes=self.codes,
      width=self.code_width,
      decay=self.decay,
      redraw_below=self.redraw_below,
      dtype=self.encoder.encoder.dtype,
    )
    self.code_embedding = dense(self.decoder.width)
    self.head_dense, self.head_out = dense(self.decoder.width), dense(pixels)

  def __call__(
    self, images_BHWC: jax.Array, *, return_tokens: bool = False, deterministic: bool = True
  ) -> Reconstruction:
    """Takes images apart and puts them together again.

    Args:
      images_BHWC: pixels of three colours, scaled as the model was trained.
      return_tokens: whether to return the tokens as well.
      deterministic: False switches dropout on and needs an rng named `dropout`.
    """
    found = self._quantized(images_BHWC, deterministic)
    grid = tuple(side // self.encoder.patch_size for side in images_BHWC.shape[1:3])
    images = self._pictured(found.codes, grid, deterministic)
    commitment_B = jnp.mean(found.commitment, axis=1)
    return Reconstruction(images, commitment_B, found.tokens if return_tokens else None)

  def encode(self, images_BHWC: jax.Array) -> jax.Array:
    """The tokens [B, P] of images, int32 in [0, K): patches are read row by row."""
    return self._quantized(images_BHWC, True).tokens

  def decode(self, tokens_BP: jax.Array, *, grid: tuple[int, int] | None = None) -> jax.Array:
    """The images [B, H, W, 3] of tokens [B, P] on a grid of patches, square by default."""
    side = round(tokens_BP.shape[1] ** 0.5)
    grid = (side, side) if grid is None else grid
    if grid[0] * grid[1] != tokens_BP.shape[1]:
      raise ValueError(f"{tokens_BP.shape[1]} tokens do not fill a grid of {grid}: give their grid")
    return self._pictured(self.quantizer.look_up(tokens_BP), grid, True)

  def _quantized(self, images_BHWC: jax.Array, deterministic: bool) -> Quantized:
    return self.quantizer(self.encoder(images_BHWC, deterministic=deterministic))

  def _pictured(
    self, codes_BPH: jax.Array, grid: tuple[int, int], deterministic: bool
  ) -> jax.Array:
    embeddings_BTD = self.code_embedding(codes_BPH.astype(self.decoder.dtype))
    h_BTD = self.decoder(embeddings_BTD=embeddings_BTD, deterministic=deterministic)
    pixels = self.head_out(jnp.tanh(self.head_dense(h_BTD)))
    (rows, columns), p = grid, self.encoder.patch_size
    pixels = pixels.astype(jnp.promote_types(pixels.dtype, jnp.float32))
    pixels = pixels.reshape(-1, rows, columns, p, p, 3).transpose(0, 1, 3, 2, 4, 5)
    return pixels.reshape(-1, rows * p, columns * p, 3)


# Under which name a held tokenizer's variables are in a model's `state`.
TOKENIZER = "image_tokenizer"


@dataclasses.dataclass(frozen=True)
class Frozen:
  """A module that another model holds and never trains; its variables are that model's `state`.

  Attributes:
    module: an `ImageTokenizer`, or whatever has its methods `encode` and `decode`.
  """

  module: nn.Module


class HoldsTokenizer(nn.Module):
  """What models share that learn the tokens of an image tokenizer.

  The tokenizer is part of the model, so that a checkpoint needs nothing else, and rests: its
  variables are in the collection `state`, under `image_tokenizer`, as `{"params": ..., "state":
  ...}`. Such a model has the attribute `tokenizer`, a `Frozen`.
  """

  def tokens(self, images_BHWC: jax.Array) -> jax.Array:
    """The tokenizer's tokens [B, P] of whole images, in [0, V): patches row by row."""
    return self._of_tokenizer("encode", images_BHWC)

  def pixels(self, tokens_BP: jax.Array) -> jax.Array:
    """The tokenizer's picture [B, H, W, C] of tokens [B, P]."""
    return self._of_tokenizer("decode", tokens_BP)

  def _hold_tokenizer(self, images_BHWC: jax.Array) -> None:
    """Draws the tokenizer where nothing is given, so that shapes are known."""
    module = self.tokenizer.module
    self.variable("state", TOKENIZER, lambda: module.init(self.make_rng("params"), images_BHWC[:1]))

  def _of_tokenizer(self, method: str, x: jax.Array) -> jax.Array:
    frozen = jax.lax.stop_gradient(self.get_variable("state", TOKENIZER))
    return self.tokenizer.module.apply(frozen, x, method=method)
