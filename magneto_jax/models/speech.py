"""Speech recognition and translation: an encoder of sounds, and three heads that say what it heard.

All heads have one call, `nats_B = model(waves_BS, wave_lengths_B, targets_BU, target_lengths_B)`,
-log p(targets | sound) of each utterance, and encode sounds by `encode`. Targets have no marks of a
beginning or an end; id 0 is none of them, and is the blank.

Letters: B batch, S samples, T vectors of the encoder, U labels of a text, V vocabulary with the
blank, D width, J width of the joiner, P of the predictor.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax.layers.ctc import ctc_loss, is_alignable
from magneto_jax.layers.initializers import dense_init, lecun_normal
from magneto_jax.layers.log_mel import frame_counts, frame_mask, log_mel, normalize_mel
from magneto_jax.layers.spec_augment import SpecAugment, spec_augment
from magneto_jax.layers.subsampling import Conv2dSubsampling, ConvSubsampling, VGGSubsampling
from magneto_jax.layers.transducer import fused_transducer_loss
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.language import CausalLM, DecodingState
from magneto_jax.models.predictors import START, LSTMPredictor, StatelessPredictor
from magneto_jax.theory import records

FRONT_ENDS = {"conv": ConvSubsampling, "vgg": VGGSubsampling, "conv2d": Conv2dSubsampling}


class SpeechEncoder(nn.Module, kw_only=True):
  """h = encoder(front_end(augment(normalize_mel(log_mel(sound))))).

  Each utterance's h is a function of its own samples: how far the batch is padded, and with what,
  changes nothing. A sound too short for one vector has none: no h of it means anything.

  The front end's last projection is drawn as the recipe draws that of an image's patches, so that
  the stack starts with what the recipe takes for granted; positions are the encoder's.

  Attributes:
    encoder: without a vocabulary.
    sample_rate: samples a second.
    mel_bins: M of `layers.log_mel`.
    subsampling: which front end, one of FRONT_ENDS; all make a vector of 4 frames of 10 ms.
    augment: what training hides of the spectrogram; None: nothing.

  Reference: fairseq S2T, arXiv 2010.05171; Foundation Transformers, arXiv 2210.06423.
  """

  encoder: Encoder
  sample_rate: int = 16_000
  mel_bins: int = 80
  subsampling: str = "conv"
  augment: SpecAugment | None = None

  def lengths(self, samples):
    """T, how many vectors a sound becomes, of an integer or of integers."""
    frames = frame_counts(samples, sample_rate=self.sample_rate)
    return self._front_end_type().lengths(frames)

  @nn.compact
  def __call__(
    self,
    waves_BS: jax.Array,
    wave_lengths_B: jax.Array,
    *,
    recipe: records.Stack | None = None,
    return_hidden_states: bool = False,
    deterministic: bool = True,
  ):
    """Encodes sounds.

    Args:
      waves_BS: samples, int16 or floats in [-1, 1]; see `layers.log_mel`.
      wave_lengths_B: integers in [0, S], how many of them are each sound's.
      recipe, return_hidden_states: see `Encoder`.
      deterministic: False switches dropout and SpecAugment on, and needs an rng named `dropout`.

    Returns:
      (h [B, T, D], how many of them are each utterance's [B]); if asked for, then the stream.

    Raises:
      ValueError: all S samples are too few for one vector.
    """
    front_end_type, encoder = self._front_end_type(), self.encoder
    if waves_BS.ndim == 2 and self.lengths(waves_BS.shape[1]) < 1:
      raise ValueError(
        f"sounds of {waves_BS.shape[1]} samples at {self.sample_rate} a second are too short for"
        f" one vector of the front end {self.subsampling!r}: pad them"
      )
    mel_BTM = log_mel(waves_BS, sample_rate=self.sample_rate, mel_bins=self.mel_bins)
    frames_B = frame_counts(wave_lengths_B, sample_rate=self.sample_rate)
    mel_BTM = normalize_mel(mel_BTM, frames_B)
    if self.augment is not None and not deterministic:
      mel_BTM = spec_augment(self.make_rng("dropout"), mel_BTM, frames_B, self.augment)
    embedding = (encoder.recipe if recipe is None else recipe).embedding
    front_end = front_end_type(
      encoder.width,
      projection_init=dense_init(embedding.patches),
      dtype=encoder.dtype,
      name="front_end",
    )
    x_BTD, frames_B = front_end(mel_BTM, frames_B)
    out = encoder(
      embeddings_BTD=x_BTD,
      mask_BT=frame_mask(frames_B, x_BTD.shape[1]),
      recipe=recipe,
      return_hidden_states=return_hidden_states,
      deterministic=deterministic,
    )
    return (out[0], frames_B, out[1]) if return_hidden_states else (out, frames_B)

  def _front_end_type(self):
    if self.subsampling not in FRONT_ENDS:
      raise ValueError(f"subsampling={self.subsampling!r} must be one of {', '.join(FRONT_ENDS)}")
    return FRONT_ENDS[self.subsampling]


class _Headed(nn.Module, kw_only=True):
  """What models of speech with a head have in common."""

  encoder: SpeechEncoder

  def encode(self, waves_BS: jax.Array, wave_lengths_B: jax.Array, **kwargs):
    """(h [B, T, D], how many of them are each utterance's [B]); see `SpeechEncoder`."""
    return self.encoder(waves_BS, wave_lengths_B, **kwargs)

  def is_scored(self, wave_lengths_B, targets_BU, target_lengths_B) -> jax.Array:
    """[B]: whether the sound has a vector."""
    del targets_BU, target_lengths_B
    return self.encoder.lengths(wave_lengths_B) > 0


class CTCRecognizer(_Headed, kw_only=True):
  """p(y | sound) = sum over alignments a of prod_t softmax(W h_t + b)_{a_t}, h = encoder(sound).

  Attributes:
    encoder: of sounds.
    vocab_size: V.

  Reference: Graves et al., Connectionist temporal classification, ICML 2006.
  """

  vocab_size: int

  def setup(self):
    self.ctc_head = _ctc_head(self.vocab_size, self.encoder.encoder.dtype)

  def __call__(
    self,
    waves_BS: jax.Array,
    wave_lengths_B: jax.Array,
    targets_BU: jax.Array | None = None,
    target_lengths_B: jax.Array | None = None,
    *,
    return_hidden_states: bool = False,
    **kwargs,
  ):
    """-log p(targets | sound) [B] in nats, float32 or wider.

    Args:
      waves_BS, wave_lengths_B: see `SpeechEncoder`.
      targets_BU: integers in [1, V) and any behind them.
      target_lengths_B: integers in [0, U].
      return_hidden_states: whether to return the stream as well.
      **kwargs: see `SpeechEncoder`.

    Returns:
      What each utterance costs; 0, without a gradient, where `is_scored` does not hold. Without
      targets the logits [B, T, V]. If asked for, then the encoder's stream.
    """
    h_BTD, frames_B, *hidden = self.encode(
      waves_BS, wave_lengths_B, return_hidden_states=return_hidden_states, **kwargs
    )
    logits_BTV = self.ctc_head(h_BTD)
    if targets_BU is None:
      return (logits_BTV, *hidden) if hidden else logits_BTV
    nats_B = ctc_loss(logits_BTV, frames_B, targets_BU, target_lengths_B)
    return (nats_B, *hidden) if hidden else nats_B

  def log_probs(self, h_BTD: jax.Array) -> jax.Array:
    """log p(label or blank) [B, T, V] of each vector."""
    return jax.nn.log_softmax(self.ctc_head(h_BTD))

  def is_scored(self, wave_lengths_B, targets_BU, target_lengths_B) -> jax.Array:
    """[B]: whether the sound has a vector for each label, and for the blank between equal ones."""
    return is_alignable(self.encoder.lengths(wave_lengths_B), targets_BU, target_lengths_B)


class Transducer(_Headed, kw_only=True):
  """p(y | sound), the sum over alignments of labels and blanks; see `layers.transducer`.

  After u labels, at vector t, the next symbol is drawn from

    softmax(W_o tanh(W_e h_t + b + W_p g_u) + b_o),   h = encoder(sound),   g = predictor(y)

  Attributes:
    encoder: of sounds.
    predictor: whose vocab_size is V.
    joint_width: J.
    ctc_weight: w; in training an utterance costs 1 - w of this and w of a CTC on h, whose matrix is
      its own, where it has an alignment for that too. An evaluation's costs are of this alone.
    chunk: vectors whose logits are held at a time; see `fused_transducer_loss`.

  Reference: Graves, arXiv 1211.3711; Foundation Transformers, arXiv 2210.06423;
  auxiliary CTC: Boyer et al., ASRU 2021.
  """

  predictor: LSTMPredictor | StatelessPredictor
  joint_width: int = 640
  ctc_weight: float = 0.0
  chunk: int = 4

  def setup(self):
    dtype = self.encoder.encoder.dtype
    dense = functools.partial(nn.Dense, kernel_init=lecun_normal(), dtype=dtype)
    self.joiner_encoder = dense(self.joint_width)
    self.joiner_predictor = dense(self.joint_width, use_bias=False)
    self.joiner_out = _Output(self.joint_width, self.predictor.vocab_size)
    if self.ctc_weight:
      self.ctc_head = _ctc_head(self.predictor.vocab_size, dtype)

  def __call__(
    self,
    waves_BS: jax.Array,
    wave_lengths_B: jax.Array,
    targets_BU: jax.Array | None = None,
    target_lengths_B: jax.Array | None = None,
    *,
    return_hidden_states: bool = False,
    deterministic: bool = True,
    **kwargs,
  ):
    """-log p(targets | sound) [B] in nats, float32 or wider; see `CTCRecognizer`.

    Without targets what the joiner reads of the sound, [B, T, J].
    """
    h_BTD, frames_B, *hidden = self.encode(
      waves_BS,
      wave_lengths_B,
      return_hidden_states=return_hidden_states,
      deterministic=deterministic,
      **kwargs,
    )
    e_BTJ = self.project(h_BTD)
    if targets_BU is None:
      return (e_BTJ, *hidden) if hidden else e_BTJ
    # Behind a text there may be ids that no embedding has.
    targets_BU = jnp.where(frame_mask(target_lengths_B, targets_BU.shape[1]), targets_BU, 0)
    labels_BU = jnp.pad(targets_BU, ((0, 0), (1, 0)), constant_values=START)
    p_BUJ = self.joiner_predictor(self.predictor(labels_BU, deterministic=deterministic))
    targets = frames_B, targets_BU, target_lengths_B
    nats_B = fused_transducer_loss(e_BTJ, p_BUJ, *self.joiner_out(), *targets, chunk=self.chunk)
    if self.ctc_weight and (self.is_initializing() or not deterministic):
      nats_B = _mixed(self.ctc_weight, nats_B, self.ctc_head(h_BTD), *targets)
    return (nats_B, *hidden) if hidden else nats_B

  def project(self, h_BTD: jax.Array) -> jax.Array:
    """e = W_e h + b [B, T, J], which `join` takes."""
    return self.joiner_encoder(h_BTD)

  def init_predictor(self, batch: int):
    """The predictor's state before its first step, whose label is START for all."""
    return self.predictor.init_state(batch)

  def predict(self, state, labels_B: jax.Array):
    """W_p g [B, J] after one more label each, and the predictor's state."""
    state, g_BP = self.predictor.step(state, labels_B)
    return self.joiner_predictor(g_BP), state

  def join(self, e_BJ: jax.Array, p_BJ: jax.Array) -> jax.Array:
    """Logits [..., V] of e [..., J] of `project` and W_p g [..., J] of `predict`."""
    hidden_BJ = jnp.tanh(e_BJ + p_BJ)
    kernel_JV, bias_V = self.joiner_out()
    wide = jnp.promote_types(hidden_BJ.dtype, jnp.float32)
    kernel_JV = kernel_JV.astype(hidden_BJ.dtype)
    logits = jnp.einsum("...j,jv->...v", hidden_BJ, kernel_JV, preferred_element_type=wide)
    bias = bias_V.astype(wide).reshape((1,) * (logits.ndim - 1) + bias_V.shape)
    return logits + bias


class SpeechToText(_Headed, kw_only=True):
  """p(y | sound) = prod_u decoder(y_u | y_<u, h), h = encoder(sound), y between two marks.

  Both stacks come from one recipe of an architecture of the kind `encoder_decoder`.

  Attributes:
    encoder: of sounds.
    decoder: of a recipe with cross-attention.
    end_id: the mark, which is no target.
    ctc_weight: see `Transducer`.

  Reference: fairseq S2T, arXiv 2010.05171; hybrid CTC and attention: Watanabe et al., IEEE JSTSP
  11(8).
  """

  decoder: CausalLM
  end_id: int = 2
  ctc_weight: float = 0.0

  def setup(self):
    if self.ctc_weight:
      self.ctc_head = _ctc_head(self.decoder.vocab_size, self.encoder.encoder.dtype)

  def __call__(
    self,
    waves_BS: jax.Array,
    wave_lengths_B: jax.Array,
    targets_BU: jax.Array | None = None,
    target_lengths_B: jax.Array | None = None,
    *,
    return_hidden_states: bool = False,
    deterministic: bool = True,
    **kwargs,
  ):
    """-log p(targets and the end | sound) [B] in nats, float32 or wider; see `CTCRecognizer`.

    In training the decoder's label smoothing is in them. Without targets the logits [B, 1, V] of
    the first label. If asked for, then the streams of the encoder and of the decoder.
    """
    has_targets = targets_BU is not None
    if not has_targets:
      targets_BU = jnp.zeros((len(waves_BS), 0), jnp.int32)
      target_lengths_B = jnp.zeros((len(waves_BS),), jnp.int32)
    h_BTD, frames_B, *hidden = self.encode(
      waves_BS,
      wave_lengths_B,
      return_hidden_states=return_hidden_states,
      deterministic=deterministic,
      **kwargs,
    )
    inputs_BU = jnp.pad(targets_BU, ((0, 0), (1, 0)), constant_values=self.end_id)
    place_1U = jnp.arange(inputs_BU.shape[1])[None]
    mask_BU = place_1U <= target_lengths_B[:, None]
    is_end_BU = place_1U == target_lengths_B[:, None]
    out = self.decode(
      jnp.where(mask_BU, inputs_BU, 0),
      mask_BT=mask_BU,
      memory_BSD=h_BTD,
      memory_mask_BS=frame_mask(frames_B, h_BTD.shape[1]),
      targets_BT=jnp.where(is_end_BU, self.end_id, jnp.pad(targets_BU, ((0, 0), (0, 1))))
      if has_targets
      else None,
      return_hidden_states=return_hidden_states,
      deterministic=deterministic,
    )
    if not has_targets:
      logits_B1V, *of_decoder = out if return_hidden_states else (out,)
      return (logits_B1V, *hidden, *of_decoder) if hidden else logits_B1V
    nats_BU, *of_decoder = out if return_hidden_states else (out,)
    nats_B = jnp.sum(jnp.where(mask_BU & (frames_B > 0)[:, None], nats_BU, 0), axis=1)
    if self.ctc_weight and (self.is_initializing() or not deterministic):
      ctc = self.ctc_head(h_BTD), frames_B, targets_BU, target_lengths_B
      nats_B = _mixed(self.ctc_weight, nats_B, *ctc)
    return (nats_B, *hidden, *of_decoder) if hidden else nats_B

  def memory(self, waves_BS: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a decoder reads of sounds [B, T, D], and whether it is each one's own [B, T]."""
    h_BTD, frames_B = self.encode(waves_BS, lengths_B)
    return h_BTD, frame_mask(frames_B, h_BTD.shape[1])

  def decode(self, tokens_BT: jax.Array, **kwargs):
    """Scores and, with a state, the new state; keywords are those of `CausalLM`."""
    return self.decoder(tokens_BT, **kwargs)

  def init_state(self, batch: int, length: int, memory_length: int) -> DecodingState:
    """An empty decoding state for `length` tokens and a memory; see `EncoderDecoder`."""
    return self.decoder.init_state(batch, length, memory_length)


class _Output(nn.Module):
  """W_o [J, V] and b_o [V], for a loss that multiplies by them itself."""

  width: int
  vocab_size: int

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array]:
    return (
      self.param("kernel", lecun_normal(), (self.width, self.vocab_size)),
      self.param("bias", nn.initializers.zeros, (self.vocab_size,)),
    )


def _ctc_head(vocab_size: int, dtype) -> nn.Dense:
  """Logits, summed in float32 or wider."""
  wide = jnp.promote_types(dtype, jnp.float32)
  product = functools.partial(jax.lax.dot_general, preferred_element_type=wide)
  return nn.Dense(vocab_size, kernel_init=lecun_normal(), dtype=dtype, dot_general=product)


def _mixed(weight: float, nats_B, logits_BTV, frames_B, targets_BU, target_lengths_B) -> jax.Array:
  """1 - w of the head's nats and w of a CTC's, where the CTC has an alignment."""
  targets = frames_B, targets_BU, target_lengths_B
  mixed_B = (1 - weight) * nats_B + weight * ctc_loss(logits_BTV, *targets)
  return jnp.where(is_alignable(*targets), mixed_B, nats_B)
