"""What BEiT-3 is for: masked data modelling, and the heads of its tasks on images and texts."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax.layers.cross_entropy import binary_cross_entropy, scores_of
from magneto_jax.layers.feed_forward import gelu
from magneto_jax.layers.initializers import dense_init
from magneto_jax.layers.norms import norm_factory
from magneto_jax.models.backbone import DecodingState, TokenTable
from magneto_jax.models.beit3 import BEiT3, caption_mask
from magneto_jax.models.image_tokenizer import Frozen, HoldsTokenizer
from magneto_jax.theory import records

# CLIP's temperature to begin with.
_SCALE = 1 / 0.07


class Parts(NamedTuple):
  """What a model says of an input's patches and of its text; None of what is not there."""

  image: jax.Array | None = None
  text: jax.Array | None = None


class MaskedBEiT3(HoldsTokenizer, kw_only=True):
  """Masked data modelling: p(what a patch or token was | all that is not masked of both).

  Of a patch it is softmax(W_I h + b) over the tokens that an image tokenizer gives patches, of a
  text's token softmax(W h) with W the table of the text's embeddings. Images, texts and pairs of
  both go through one model, in a call each. The paper does not state the heads: these are linear.

  Attributes:
    encoder: a `BEiT3`.
    image_vocab_size: how many tokens there are for patches.
    tokenizer: of images of the same grid of patches, held as `HoldsTokenizer` says; None for a
      model that is given all targets.
    vocab_chunk, label_smoothing: see `CausalLM`.

  Reference: BEiT-3, arXiv 2208.10442, section 2.2; BEiT v2, arXiv 2208.06366 (tokens of patches).
  """

  encoder: BEiT3
  image_vocab_size: int = 8192
  tokenizer: Frozen | None = None
  vocab_chunk: int = 0
  label_smoothing: float = 0.0

  @nn.compact
  def __call__(
    self,
    images_BHWC: jax.Array | None = None,
    tokens_BT: jax.Array | None = None,
    *,
    masked_BP: jax.Array | None = None,
    mask_BT: jax.Array | None = None,
    image_places_BK: jax.Array | None = None,
    text_places_BK: jax.Array | None = None,
    targets_BP: jax.Array | bool | None = None,
    targets_BT: jax.Array | None = None,
    recipe: records.Stack | None = None,
    return_hidden_states: bool = False,
    deterministic: bool = True,
  ):
    """Scores the patches and tokens of images, of texts, or of pairs of both.

    Args:
      images_BHWC, tokens_BT, masked_BP, mask_BT, recipe: see `BEiT3`; tokens that are masked are
        the mask's token. An image and a text initialise the model.
      image_places_BK: integers in [0, P): these patches alone go through the head; by default all.
      text_places_BK: integers in [0, T): likewise of the text's tokens.
      targets_BP: [B, P] integers, the tokens of all patches, or True for those that the tokenizer
        gives.
      targets_BT: [B, T] integers, those of the text, all of them.
      return_hidden_states: whether to return the stream as well.
      deterministic: False switches dropout on and needs an rng named `dropout`.

    Returns:
      `Parts` of logits, of the image [B, P, V_I] and of the text [B, T, V], in float32 or wider;
      of a part with targets what these cost in nats, [B, P] and [B, T]; K in place of P and T where
      places are given. If asked for, then also the stream.
    """
    encoder, stack = self.encoder, self.encoder.encoder
    if targets_BP is not None and images_BHWC is None:
      raise ValueError("targets_BP is of an image, and there is none")
    if targets_BT is not None and tokens_BT is None:
      raise ValueError("targets_BT is of a text, and there is none")
    if targets_BP is True and self.tokenizer is None:
      raise ValueError("targets_BP=True is what the model's tokenizer gives, and it has none")
    if self.tokenizer is not None and images_BHWC is not None:
      self._hold_tokenizer(images_BHWC)
    out = encoder(
      images_BHWC,
      tokens_BT,
      masked_BP=masked_BP,
      mask_BT=mask_BT,
      recipe=recipe,
      return_hidden_states=return_hidden_states,
      deterministic=deterministic,
    )
    x_BTD, hidden_LBTD = out if return_hidden_states else (out, None)
    options = {
      "chunk": self.vocab_chunk,
      "smoothing": 0.0 if deterministic else self.label_smoothing,
    }
    patches, image, text = 0, None, None
    if images_BHWC is not None:
      patches = x_BTD.shape[1] - (0 if tokens_BT is None else tokens_BT.shape[1]) - 1
      table = TokenTable(self.image_vocab_size, stack.width, name="output_embedding")
      table_VD = table((stack.recipe if recipe is None else recipe).embedding.tokens)
      bias_V = self.param("head_bias", nn.initializers.zeros, (self.image_vocab_size,))
      targets_BP = self.tokens(images_BHWC) if targets_BP is True else targets_BP
      # Behind the class token.
      h_BPD, targets_BP = _at(image_places_BK, x_BTD[:, 1 : 1 + patches], targets_BP)
      image = scores_of(h_BPD, table_VD, targets_BP, bias_V, **options)
    if tokens_BT is not None:
      h_BTD, targets_BT = _at(text_places_BK, x_BTD[:, -tokens_BT.shape[1] :], targets_BT)
      text = scores_of(h_BTD, encoder.text_embedding.embedding, targets_BT, **options)
    scores = Parts(image, text)
    return (scores, hidden_LBTD) if return_hidden_states else scores

  def each(
    self,
    *calls: Mapping[str, jax.Array],
    targets: Sequence[Mapping[str, jax.Array | bool]] | None = None,
    deterministic: bool = True,
  ) -> tuple[Parts, ...]:
    """Several calls, one after the other: of pairs, of images alone and of texts alone.

    Args:
      calls: the keywords of each: images, tokens, and what of them is masked.
      targets: likewise its `targets_BP` and `targets_BT`; None for logits.
      deterministic: see `__call__`.
    """
    scored = ({},) * len(calls) if targets is None else targets
    return tuple(
      self(**call, **of_call, deterministic=deterministic)
      for call, of_call in zip(calls, scored, strict=True)
    )


class Features(NamedTuple):
  """What `RetrievalBEiT3` makes of images and texts.

  Attributes:
    images_BE, texts_BE: of length 1, in float32 or wider; None of what is not there.
    scale: what their products are multiplied by.
  """

  images_BE: jax.Array | None
  texts_BE: jax.Array | None
  scale: jax.Array


class RetrievalBEiT3(nn.Module, kw_only=True):
  """Images and texts as vectors, near where one says what the other shows.

    f = W_I h_cls / |W_I h_cls|,  g = W_T h_0 / |W_T h_0|,  similarity = exp(s) f . g

  with h_cls of the class token of an image alone, h_0 of the first token of a text alone, and s
  learned, log(1 / 0.07) at first; see `layers.contrastive_loss`. W_I and W_T are drawn as the
  recipe draws tokens.

  Attributes:
    encoder: a `BEiT3`, with its final norm.
    features: E; D by default.
    scale_max: the largest scale, min(exp(s), scale_max), 100 in CLIP; None, as in BEiT-3: any.

  Reference: BEiT-3, arXiv 2208.10442, section 3.1.5; CLIP, arXiv 2103.00020, section 2.5.
  Differs: CLIP cuts s itself after each step, so that a later gradient can lower it; here s beyond
  the largest has no gradient, and stays where the last step has brought it.
  """

  encoder: BEiT3
  features: int | None = None
  scale_max: float | None = None

  @nn.compact
  def __call__(
    self,
    images_BHWC: jax.Array | None = None,
    tokens_BT: jax.Array | None = None,
    *,
    mask_BT: jax.Array | None = None,
    recipe: records.Stack | None = None,
    deterministic: bool = True,
  ) -> Features:
    """The features of images, of texts, or of both, which need not be as many.

    Args:
      images_BHWC, tokens_BT, mask_BT, recipe: see `BEiT3`; padding stands behind a text. An image
        and a text initialise the model.
      deterministic: False switches dropout on and needs an rng named `dropout`.
    """
    if images_BHWC is None and tokens_BT is None:
      raise ValueError("give images, tokens, or both")
    options = {"recipe": recipe, "deterministic": deterministic}
    if self.is_initializing():
      # The encoder draws what is of images and of texts in one call.
      self.encoder(images_BHWC, tokens_BT, **options)
    images_BE = texts_BE = None
    if images_BHWC is not None:
      images_BE = self._features("image_head", self.encoder(images_BHWC, **options), recipe)
    if tokens_BT is not None:
      h_BTD = self.encoder(None, tokens_BT, mask_BT=mask_BT, **options)
      texts_BE = self._features("text_head", h_BTD, recipe)
    s = self.param("logit_scale", nn.initializers.constant(math.log(_SCALE)), ())
    if self.scale_max is not None:
      s = jnp.minimum(s, math.log(self.scale_max))
    return Features(images_BE, texts_BE, jnp.exp(s))

  def _features(self, name: str, h_BTD: jax.Array, recipe: records.Stack | None) -> jax.Array:
    width = self.features or self.encoder.encoder.width
    f_BE = _dense(self.encoder, recipe, width, name, use_bias=False)(h_BTD[:, 0])
    f_BE = f_BE.astype(jnp.promote_types(f_BE.dtype, jnp.float32))
    # torch's: a vector of nothing stays nothing, and has a gradient.
    square_B1 = jnp.sum(jnp.square(f_BE), axis=-1, keepdims=True)
    return f_BE * jax.lax.rsqrt(jnp.maximum(square_B1, 1e-24))


class CaptioningBEiT3(nn.Module, kw_only=True):
  """p(x_t | image, x_<t) = softmax(W h_t + b), h_t where the mask stands in the place of x_t.

  The image sees itself, the text sees the image and what lies before (`caption_mask`). In training
  some tokens of a caption are the mask, or others, and these are scored. To write one, each step
  reads the last token and a mask behind it, and scores what the mask stands for, which then is
  forgotten; an image is seen once for all steps.

  Attributes:
    encoder: a `BEiT3`, with its final norm.
    mask_id: the mask's token.
    vocab_chunk, label_smoothing: see `CausalLM`. BEiT-3 smooths by 0.1.

  Reference: BEiT-3, arXiv 2208.10442, section 3.1.2, and its released code.
  """

  encoder: BEiT3
  mask_id: int
  vocab_chunk: int = 0
  label_smoothing: float = 0.0

  def setup(self):
    self.output_embedding = TokenTable(self.vocab_size, self.encoder.encoder.width)
    self.head_bias = self.param("head_bias", nn.initializers.zeros, (self.vocab_size,))

  @property
  def vocab_size(self) -> int:
    """V."""
    return self.encoder.vocab_size

  @property
  def longest(self) -> int:
    """How many tokens a caption may have, with room for the mask behind them."""
    return self.encoder.max_text_length - 1

  def __call__(
    self,
    images_BHWC: jax.Array,
    tokens_BT: jax.Array,
    *,
    mask_BT: jax.Array | None = None,
    places_BK: jax.Array | None = None,
    targets_BT: jax.Array | None = None,
    recipe: records.Stack | None = None,
    return_hidden_states: bool = False,
    deterministic: bool = True,
  ):
    """Scores what stands at each place of a caption, given the image and what lies before.

    Args:
      images_BHWC, recipe: see `BEiT3`.
      tokens_BT: captions from their bos on, some tokens masked.
      mask_BT: True for tokens, False for padding, which stands behind them.
      places_BK: integers in [0, T): these tokens alone go through the head; by default all, K = T.
      targets_BT: [B, T] integers in [0, V), what stood at each place: then -log p of it comes out,
        in training with the model's smoothing.
      return_hidden_states: whether to return the stream as well.
      deterministic: False switches dropout on and needs an rng named `dropout`.

    Returns:
      Logits [B, K, V], or nats [B, K], in float32 or wider; if asked for, then also the stream.
    """
    length = tokens_BT.shape[1]
    out = self.encoder(
      images_BHWC,
      tokens_BT,
      mask_BT=mask_BT,
      visible_BTT=caption_mask(1 + self.encoder.num_patches, length),
      recipe=recipe,
      return_hidden_states=return_hidden_states,
      deterministic=deterministic,
    )
    x_BTD, hidden_LBTD = out if return_hidden_states else (out, None)
    h_BKD, targets_BK = _at(places_BK, x_BTD[:, -length:], targets_BT)
    smoothing = 0.0 if deterministic else self.label_smoothing
    scores = self._scores(h_BKD, targets_BK, recipe, chunk=self.vocab_chunk, smoothing=smoothing)
    return (scores, hidden_LBTD) if return_hidden_states else scores

  def see(self, images_BHWC: jax.Array, length: int) -> DecodingState:
    """The state in which images have been seen, with room for captions of `length` tokens."""
    return self.encoder.see(images_BHWC, length + 1)

  def decode(
    self, tokens_BT: jax.Array, *, state: DecodingState, mask_BT: jax.Array | None = None
  ) -> tuple[jax.Array, DecodingState]:
    """Scores [B, 1, V] of what comes behind tokens, and the state in which these have been read.

    Args:
      tokens_BT: at first a caption's beginning, from its bos on; then what was chosen, T = 1.
      state: `see`'s, or an earlier call's.
      mask_BT: False for padding, which stands before a beginning.

    Where the tokens do not fit the state, they are lost and the scores are NaN.
    """
    batch, length = tokens_BT.shape
    room = state.segment_ids_BS.shape[1]
    if length >= room:
      raise ValueError(f"{length} tokens and a mask do not fit a state of {room}")
    fits = state.length + length < room
    tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, 1)), constant_values=self.mask_id)
    if mask_BT is not None:
      mask_BT = jnp.pad(jnp.asarray(mask_BT, bool), ((0, 0), (0, 1)), constant_values=True)
    h_BTD, state = self.encoder(None, tokens_BT, mask_BT=mask_BT, state=state)
    logits_B1V = self._scores(h_BTD[:, -1:], None, None)
    return jnp.where(fits, logits_B1V, jnp.nan), state.without_last()

  def _scores(self, h_BTD, targets_BT, recipe, **options) -> jax.Array:
    stack = self.encoder.encoder.recipe if recipe is None else recipe
    table_VD = self.output_embedding(stack.embedding.tokens)
    return scores_of(h_BTD, table_VD, targets_BT, self.head_bias, **options)


class AnsweringBEiT3(nn.Module, kw_only=True):
  """Answers questions about images by one of A answers: visual question answering.

    y = W_o gelu(norm(W_h p + b_h)) + b_o,  p = tanh(W_p norm(h_cls) + b_p)

  of the class token h_cls of the pair, with W_h h twice as wide as p. The matrices are drawn as the
  recipe draws tokens.

  Attributes:
    encoder: a `BEiT3`, in the released models without a final norm.
    answers: A.

  Reference: BEiT-3, arXiv 2208.10442, section 3.1.1, and its released code.
  """

  encoder: BEiT3
  answers: int

  @nn.compact
  def __call__(
    self,
    images_BHWC: jax.Array,
    tokens_BT: jax.Array,
    *,
    mask_BT: jax.Array | None = None,
    targets: jax.Array | None = None,
    recipe: records.Stack | None = None,
    return_hidden_states: bool = False,
    deterministic: bool = True,
  ):
    """Scores [B, A], in float32 or wider; if asked for, then also the stream.

    With `targets` [B, A], how right each answer is, in [0, 1], their `binary_cross_entropy` [B] in
    place of the scores. All else: see `BEiT3`.
    """
    if self.answers < 1:
      raise ValueError(f"answers={self.answers} must be at least 1")
    h_BTD, hidden = _encoded(
      self.encoder, images_BHWC, tokens_BT, mask_BT, recipe, return_hidden_states, deterministic
    )
    width = self.encoder.encoder.width
    p_BD = _norm(self.encoder, "pooler_norm")(h_BTD[:, 0])
    p_BD = jnp.tanh(_dense(self.encoder, recipe, width, "pooler_dense")(p_BD))
    scores_BA = _head(self.encoder, recipe, p_BD, self.answers)
    if targets is not None:
      scores_BA = binary_cross_entropy(scores_BA, targets)
    return (scores_BA, *hidden) if hidden else scores_BA


class ReasoningBEiT3(nn.Module, kw_only=True):
  """Whether a text is true of two images: NLVR2.

    y = W_o gelu(norm(W_h norm([c_a; t_a; c_b; t_b]) + b_h)) + b_o

  with c and t of the class token and of the text's first token of two pairs, each an image with the
  text. W_h h is of width 2 D. The matrices are drawn as the recipe draws tokens.

  Attributes:
    encoder: a `BEiT3`, with its final norm.
    classes: how many answers there are.

  Reference: BEiT-3, arXiv 2208.10442, section 3.1.3, and its released code.
  """

  encoder: BEiT3
  classes: int = 2

  @nn.compact
  def __call__(
    self,
    images_B2HWC: jax.Array,
    tokens_BT: jax.Array,
    *,
    mask_BT: jax.Array | None = None,
    targets: jax.Array | None = None,
    recipe: records.Stack | None = None,
    return_hidden_states: bool = False,
    deterministic: bool = True,
  ):
    """Scores [B, C], in float32 or wider; if asked for, then also the stream, of [2 B] pairs.

    With `targets` [B], integers in [0, C), -log p of them [B] in place of the scores. All else: see
    `BEiT3`; padding stands behind a text.
    """
    if images_B2HWC.ndim != 5 or images_B2HWC.shape[1] != 2:
      raise ValueError(f"images {list(images_B2HWC.shape)} are not [B, 2, H, W, C]")
    batch = tokens_BT.shape[0]
    # Rows of one sample are neighbours, so that on a mesh they are on one device.
    twice = lambda x_BT: None if x_BT is None else jnp.repeat(jnp.asarray(x_BT), 2, axis=0)
    h_BTD, hidden = _encoded(
      self.encoder,
      images_B2HWC.reshape(-1, *images_B2HWC.shape[2:]),
      twice(tokens_BT),
      twice(mask_BT),
      recipe,
      return_hidden_states,
      deterministic,
    )
    first = 1 + self.encoder.num_patches
    p_BE = jnp.stack([h_BTD[:, 0], h_BTD[:, first]], axis=1).reshape(batch, -1)
    p_BE = _norm(self.encoder, "pooler_norm")(p_BE)
    scores_BC = _head(self.encoder, recipe, p_BE, self.classes)
    if targets is not None:
      nats_BC = -jax.nn.log_softmax(scores_BC)
      scores_BC = jnp.take_along_axis(nats_BC, targets[:, None], axis=-1)[:, 0]
    return (scores_BC, *hidden) if hidden else scores_BC


def _encoded(encoder, images, tokens, mask, recipe, return_hidden_states, deterministic):
  """What comes out of pairs, and a tuple of the stream, if it is asked for."""
  out = encoder(
    images,
    tokens,
    mask_BT=mask,
    recipe=recipe,
    return_hidden_states=return_hidden_states,
    deterministic=deterministic,
  )
  return (out[0], out[1:]) if return_hidden_states else (out, ())


def _at(places_BK: jax.Array | None, x_BTD: jax.Array, targets_BT: jax.Array | None):
  """Features and targets at places; all of them where there are none."""
  if places_BK is None:
    return x_BTD, targets_BT
  x_BKD = jnp.take_along_axis(x_BTD, places_BK[..., None], axis=1)
  return x_BKD, None if targets_BT is None else jnp.take_along_axis(targets_BT, places_BK, axis=1)


def _dense(encoder: BEiT3, recipe: records.Stack | None, width: int, name: str, **options):
  """A matrix of a head, drawn as the recipe draws tokens."""
  stack = encoder.encoder
  init = dense_init((stack.recipe if recipe is None else recipe).embedding.tokens).kernel
  return nn.Dense(width, kernel_init=init, dtype=stack.dtype, name=name, **options)


def _norm(encoder: BEiT3, name: str) -> nn.Module:
  stack = encoder.encoder
  return norm_factory(stack.recipe.norm, epsilon=stack.norm_epsilon, dtype=stack.dtype)(name=name)


def _head(encoder: BEiT3, recipe: records.Stack | None, p_BE: jax.Array, classes: int) -> jax.Array:
  """W_o gelu(norm(W_h p + b_h)) + b_o, with W_h p twice as wide as the model."""
  width = encoder.encoder.width
  h_BF = _norm(encoder, "head_norm")(_dense(encoder, recipe, 2 * width, "head_dense")(p_BE))
  scores_BC = _dense(encoder, recipe, classes, "head_out")(gelu(h_BF))
  return scores_BC.astype(jnp.promote_types(scores_BC.dtype, jnp.float32))
