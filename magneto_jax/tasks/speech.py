"""What tasks of speech share: from a config's fields to models of sounds, their costs and texts.

A model is an encoder of sounds with one of three heads: a CTC, a transducer, or a decoder
(`model.speech_head`; a translation has a decoder). Utterances cost -log p(text | sound), and a loss
is their sum over the number of the texts' tokens, of a decoder with the end of each. `layers` is
the depth of the encoder; with a decoder it is the decoder's, and `encoder_layers` the encoder's.

Reference: Foundation Transformers, arXiv 2210.06423, section 4.6; fairseq S2T, arXiv 2010.05171.
"""

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from magneto_jax import sharding
from magneto_jax.config import ConfigError, TrainConfig, refuse_far_xpos, speech_head
from magneto_jax.data import speech, speech_sources
from magneto_jax.data.tokenizers import EOS_ID, CharTokenizer, Tokenizer
from magneto_jax.decoding import Transcriber
from magneto_jax.layers.log_mel import frame_counts, log_mel, normalize_mel
from magneto_jax.layers.spec_augment import SpecAugment
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.language import CausalLM
from magneto_jax.models.predictors import LSTMPredictor, StatelessPredictor
from magneto_jax.models.speech import (
  FRONT_ENDS,
  CTCRecognizer,
  SpeechEncoder,
  SpeechToText,
  Transducer,
)
from magneto_jax.reporting import Row
from magneto_jax.tasks import common
from magneto_jax.tasks.task import Batch, Facts, Totals, mean_nats
from magneto_jax.theory import flops as theory_flops
from magneto_jax.theory import records

Recognizer = CTCRecognizer | Transducer | SpeechToText

# The correlation of two vectors of a sound at the stack's input, by the front end, as it is drawn.
# Two frames of a normalised spectrogram have none, as its mean is 0. The gated units of `conv`
# leave it so; a ReLU makes 1 / pi of it, as what it keeps is positive, and every further one more.
# Measured on embedded/en, where it agrees with the closed form of two ReLUs (0.49) for `conv2d`.
FRAME_CORRELATION = {"conv": 0.04, "conv2d": 0.5, "vgg": 0.72}
# Of the validation set's utterances, how many a sample shows; how many in a row of a picture.
_SHOWN, _IN_A_ROW = 3, 2
# Deviations from the mean at which a picture's colours end.
_LOUDEST = 2.5


# ---------------------------------------------------------------------------------------------
# Sizes, and the model
# ---------------------------------------------------------------------------------------------


def samples(config: TrainConfig) -> int:
  """S, samples of a sound with its padding."""
  return round(config.data.max_seconds * config.data.sample_rate)


def length(config: TrainConfig) -> int:
  """T, how many vectors the longest sound becomes."""
  frames = frame_counts(samples(config), sample_rate=config.data.sample_rate)
  return FRONT_ENDS[config.model.front_end].lengths(frames)


def _has_decoder(config: TrainConfig) -> bool:
  return speech_head(config) == "decoder"


def _encoder_layers(config: TrainConfig) -> int:
  model = config.model
  return model.encoder_layers or model.layers if _has_decoder(config) else model.layers


def architecture(config: TrainConfig, facts: Facts) -> records.Architecture:
  """What the recipe needs to know of the stack, or of both.

  The correlation of its input is that of the encoder's, FRAME_CORRELATION.
  """
  known = {**facts, "token_correlation": FRAME_CORRELATION[config.model.front_end]}
  layers = {"encoder_layers": _encoder_layers(config)}
  if _has_decoder(config):
    layers["decoder_layers"] = config.model.layers
  kind = "encoder_decoder" if _has_decoder(config) else "encoder"
  return common.architecture(config, known, kind, length=length(config), **layers)


def recipe(config: TrainConfig, facts: Facts) -> records.Recipe:
  """The records of the config's recipe."""
  return common.recipe(config, architecture(config, facts))


def describe(config: TrainConfig, facts: Facts) -> list[str]:
  """The recipe in words; where there are two stacks, each one's."""
  stacks = recipe(config, facts)
  if stacks.decoder is None:
    return records.describe(stacks.encoder)
  named = {"encoder": stacks.encoder, "decoder": stacks.decoder}
  return [f"{kind}: {line}" for kind, stack in named.items() for line in records.describe(stack)]


def build_model(config: TrainConfig, facts: Facts) -> Recognizer:
  """The config's encoder of sounds with its head over the data's vocabulary."""
  common.refuse_window(config)
  refuse_far_xpos(config.model, length(config), "vectors of config.data.max_seconds")
  model, stacks, size = config.model, recipe(config, facts), facts["vocab_size"]
  policy = SpecAugment(**dataclasses.asdict(config.spec_augment))
  sizes = common.backbone(config)
  encoder = SpeechEncoder(
    encoder=Encoder(recipe=stacks.encoder, **sizes | {"max_length": length(config)}),
    sample_rate=config.data.sample_rate,
    mel_bins=model.mel_bins,
    subsampling=model.front_end,
    augment=policy if policy.frequency_masks or policy.time_masks else None,
  )
  head = speech_head(config)
  if head == "ctc":
    return CTCRecognizer(encoder=encoder, vocab_size=size)
  if head == "transducer":
    return Transducer(
      encoder=encoder,
      predictor=_predictor(config, size),
      joint_width=model.joint_width,
      ctc_weight=model.ctc_weight,
      chunk=model.joint_chunk,
    )
  decoder = CausalLM(
    recipe=stacks.decoder,
    vocab_size=size,
    tied=model.tied_embeddings,
    **common.scoring(config),
    # The mark of a beginning, and a text.
    **sizes | {"max_length": config.data.seq_length + 1},
  )
  return SpeechToText(encoder=encoder, decoder=decoder, end_id=EOS_ID, ctc_weight=model.ctc_weight)


def _predictor(config: TrainConfig, vocab_size: int) -> LSTMPredictor | StatelessPredictor:
  model = config.model
  shared = {
    "vocab_size": vocab_size,
    "width": model.predictor_width,
    "dropout_rate": model.dropout,
    "dtype": jnp.dtype(model.dtype),
  }
  if model.predictor == "stateless":
    return StatelessPredictor(**shared)
  return LSTMPredictor(layers=model.predictor_layers, **shared)


def flops(config: TrainConfig, facts: Facts) -> int:
  """FLOPs of one step, padding included; see `theory.flops`."""
  model = config.model
  of_transducer = {
    "joint_width": model.joint_width,
    "predictor_layers": model.predictor_layers if model.predictor == "lstm" else 0,
    "predictor_width": model.predictor_width,
  }
  return theory_flops.speech_step_flops(
    head=speech_head(config),
    vocab_size=facts["vocab_size"],
    samples=samples(config),
    seq_length=config.data.seq_length,
    batch_size=config.batch_size,
    encoder_layers=_encoder_layers(config),
    sample_rate=config.data.sample_rate,
    mel_bins=model.mel_bins,
    front_end=model.front_end,
    with_ctc=bool(model.ctc_weight),
    **of_transducer,
    **common.sizes(model),
  )


def row_bytes(config: TrainConfig, model: Recognizer) -> int:
  """About what a train step holds of a row beside its tokens; see `Task`.

  Three times the front end's maps, for what functions make of them and for gradients; and of a
  transducer a chunk of the lattice's logits in float32, 2.3 times, as a compiled gradient holds.
  """
  sizes = config.model
  front_end = FRONT_ENDS[sizes.front_end](sizes.width, dtype=jnp.dtype(sizes.dtype))
  frames = frame_counts(samples(config), sample_rate=config.data.sample_rate)
  mel_BTM = jax.ShapeDtypeStruct((1, frames, sizes.mel_bins), jnp.float32)
  run = lambda x_BTM: front_end.init_with_output(
    jax.random.key(0), x_BTM, jnp.array([frames]), capture_intermediates=True
  )
  maps = jax.tree.leaves(jax.eval_shape(run, mel_BTM)[1]["intermediates"])
  found = 3 * sum(x.size * x.dtype.itemsize for x in maps)
  if isinstance(model, Transducer):
    cells = min(model.chunk, length(config)) * (config.data.seq_length + 1)
    found += int(2.3 * 4 * cells * model.predictor.vocab_size)
  return found


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


def load_data(
  config: TrainConfig, directory: str | os.PathLike, expected: Mapping[str, Any] | None = None
) -> speech.SpeechData:
  """Utterances and tokenizer; what is derived is kept in `directory`.

  Raises:
    ConfigError: of a part no utterance has an alignment with its text; see `layers.is_alignable`.
  """
  values = common.data_options(config.data, config.task)
  data = speech.load_speech(workdir=directory, expected=expected, **values)
  if _has_decoder(config):
    return dataclasses.replace(data, marks=(data.tokenizer.eos_id,))
  if config.model.speech_head != "ctc":
    return data
  alignable = tuple(_alignable(config, part) for part in (data.train, data.validation))
  for which, of_part in zip(("training", "validation"), alignable, strict=True):
    if not of_part.any():
      raise ConfigError(
        f"no {which} utterance has an alignment with its text: each has fewer vectors, of 40 ms,"
        " than tokens; set data.tokenizer='sentencepiece' or model.speech_head='transducer'"
      )
  return dataclasses.replace(data, alignable=alignable)


def _alignable(config: TrainConfig, part: speech.SpokenTokens) -> np.ndarray:
  """[size], as `layers.is_alignable`: whether a sound has a vector for each token, and a blank."""
  frames = frame_counts(part.samples, sample_rate=config.data.sample_rate)
  vectors = FRONT_ENDS[config.model.front_end].lengths(frames)
  needed = [len(ids) + int(np.sum(ids[1:] == ids[:-1])) for ids in part.tokens]
  return (vectors >= np.array(needed)) & (vectors > 0)


def facts(data: speech.SpeechData) -> Facts:
  """What the model must know of its data: V, the tokenizer's ids with the blank."""
  return {"vocab_size": data.tokenizer.vocab_size}


def planned_facts(config: TrainConfig) -> Facts:
  """The facts that a run of the config would have.

  Raises:
    ConfigError: they are not known without reading the data.
  """
  data = config.data
  if data.tokenizer != "char":
    return {"vocab_size": common.planned_facts(config)["vocab_size"]}
  if data.tokenizer_file or not data.name.startswith("embedded/"):
    raise ConfigError(
      f"the characters of data.name={data.name!r} are not known without reading it: to plan, set"
      " data.tokenizer=sentencepiece, and data.vocab_size to as many"
    )
  train = speech_sources.embedded(data.name, data.train_split)
  tokenizer = CharTokenizer.of(speech.plain(words, data.text_case) for words in train.texts)
  return {"vocab_size": tokenizer.vocab_size}


def batch_spec(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """See `data.speech.SpokenTokens`."""
  rows = config.batch_size
  return {
    "waves": jax.ShapeDtypeStruct((rows, samples(config)), jnp.int16),
    "wave_lengths": jax.ShapeDtypeStruct((rows,), jnp.int32),
    "tokens": jax.ShapeDtypeStruct((rows, config.data.seq_length), jnp.int32),
    "token_lengths": jax.ShapeDtypeStruct((rows,), jnp.int32),
    "weights": jax.ShapeDtypeStruct((rows,), jnp.float32),
  }


def dummy_inputs(config: TrainConfig) -> tuple:
  """A sound and a text that initialise the model."""
  spec = batch_spec(dataclasses.replace(config, batch_size=1, accumulation=1))
  names = ("waves", "wave_lengths", "tokens", "token_lengths")
  return tuple(jnp.zeros(spec[name].shape, spec[name].dtype) for name in names)


def counts(data: speech.SpeechData) -> dict[str, int]:
  """Utterances, those too long for that, and those whose text has characters without an id."""
  found = {"utterances": len(data.validation), "too_long": data.too_long[1]}
  return found | {"with_unknown_characters": data.unknown[1]}


# ---------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------


def inputs(batch: Batch) -> tuple[tuple, dict[str, Any]]:
  """The model's arguments: sounds and targets."""
  keywords = {"targets_BU": batch["tokens"], "target_lengths_B": batch["token_lengths"]}
  return (batch["waves"], batch["wave_lengths"]), keywords


def weigh(model: Recognizer, batch: Batch) -> Batch:
  """The batch with weights of symbols: how many of a text the model scores, 0 where it cannot."""
  given = batch["wave_lengths"], batch["tokens"], batch["token_lengths"]
  symbols_B = batch["token_lengths"] + isinstance(model, SpeechToText)
  counted_B = jnp.where(model.is_scored(*given), symbols_B, 0)
  return batch | {"weights": batch["weights"] * counted_B}


def score(nats_B: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Sum over utterances of -log p(text | sound) (nats) and the number of their symbols."""
  return jnp.sum(jnp.where(batch["weights"] > 0, nats_B, 0)), jnp.sum(batch["weights"])


def measure(model: Recognizer, variables, batch: Batch) -> dict[str, jax.Array]:
  """The loss's sums, and how many utterances the model cannot score, of how many."""
  args, kwargs = inputs(batch)
  weighed = weigh(model, batch)
  loss, weight = score(model.apply(variables, *args, **kwargs), weighed)
  return {
    "loss": loss,
    "weight": weight,
    "utterances": jnp.sum(batch["weights"]),
    "unscored": jnp.sum(jnp.where(weighed["weights"] > 0, 0, batch["weights"])),
  }


def metrics(totals: Totals, data: speech.SpeechData, *, whole: bool) -> dict[str, float]:
  """Nats a token, and the share of utterances that are left out of them, if there are any.

  A CTC has no alignment for a text that needs more vectors than its sound has; see
  `layers.is_alignable`.

  Raises:
    ConfigError: no utterance of a part of the set can be scored.
  """
  if not totals["weight"]:
    raise ConfigError(
      "none of the utterances that were measured has an alignment with its text: set"
      " config.eval_batches=0, to measure all"
    )
  found = mean_nats(totals, data, whole=whole)
  if totals["unscored"]:
    found["share_without_alignment"] = totals["unscored"] / totals["utterances"]
  return found


def unigram_nats(data: speech.SpeechData) -> float:
  """Nats a token of the validation texts, by how often each token is in training.

  Of the texts and tokens that a model is measured by: the marks that it adds, and no text that has
  no alignment.
  """
  size, counts = data.tokenizer.vocab_size, []
  for i, part in enumerate((data.train, data.validation)):
    texts = part.tokens
    if data.alignable is not None:
      texts = [ids for ids, has in zip(texts, data.alignable[i], strict=True) if has]
    marks = np.array(data.marks * len(texts), int)
    counts.append(np.bincount(np.concatenate([*texts, marks]), minlength=size))
  train, validation = counts
  log_p = np.log((1 + train) / np.sum(1 + train))
  return float(-validation @ log_p / validation.sum())


# ---------------------------------------------------------------------------------------------
# What it writes
# ---------------------------------------------------------------------------------------------


def transcriber(
  config: TrainConfig, model: nn.Module, variables, tokenizer: Tokenizer
) -> Transcriber:
  """What answers sounds as `config.beam` says, of at most as many seconds as the model learned."""
  search = dataclasses.asdict(config.beam)
  del search["judged"]
  sizes = {"longest": samples(config), "most": config.data.seq_length}
  return Transcriber(model, variables, tokenizer, **sizes, **search)


def answers(
  config: TrainConfig,
  model: nn.Module,
  variables,
  data: speech.SpeechData,
  indices: Sequence[int],
) -> list[str]:
  """What the model writes for some of the validation utterances."""
  chosen = data.validation.chosen
  write = transcriber(config, model, variables, data.tokenizer)
  waves = (data.validation.utterances[int(chosen[i])] for i in indices)
  found = []
  # Not all waves at once.
  while part := list(itertools.islice(waves, 16 * config.beam.rows)):
    found += [best.text for best, *_ in write(part)]
  return found


def judged(
  config: TrainConfig, model: nn.Module, variables, data: speech.SpeechData, mesh: Mesh | None
) -> tuple[list[str], list[str]]:
  """Answers and references of the validation utterances, or of the first `config.beam.judged`."""
  count = min(config.beam.judged or len(data.validation), len(data.validation))
  with sharding.use_mesh(mesh):
    found = answers(config, model, variables, data, range(count))
  return found, list(data.validation.texts[:count])


def sample(
  config: TrainConfig, model: nn.Module, variables, data: speech.SpeechData, key: jax.Array
) -> str | None:
  """Some of the validation set's references, and what the model writes for their sounds."""
  del key  # The best are written.
  if not config.sample_tokens:
    return None
  indices = common.evenly_apart(len(data.validation))[:_SHOWN]
  found = answers(config, model, variables, data, indices)
  return "\n".join(
    f"{text}\n  (reference: {data.validation.texts[i]})"
    for i, text in zip(indices, found, strict=True)
  )


def picture(config: TrainConfig, model: nn.Module, variables, data: speech.SpeechData) -> list[Row]:
  """Spectrograms of validation utterances as the model sees them, and what it makes of them.

  Time goes to the right, frequencies up, and what is louder than the bin's mean is bright.
  """
  indices, batch = common.shown(data.validation)
  found = answers(config, model, variables, data, indices)
  images = _spectrograms(config, batch)
  told = [
    data.validation.texts[i]
    if text == data.validation.texts[i]
    else f"{data.validation.texts[i]}; answered {text or 'nothing'}"
    for i, text in zip(indices, found, strict=True)
  ]
  titles = itertools.chain(["validation utterances: log-mel spectrograms"], itertools.repeat(""))
  parts = range(0, len(images), _IN_A_ROW)
  return [
    Row(title, images[i : i + _IN_A_ROW], told[i : i + _IN_A_ROW])
    for title, i in zip(titles, parts, strict=False)
  ]


def _spectrograms(config: TrainConfig, batch: Mapping[str, np.ndarray]) -> list[np.ndarray]:
  """uint8 [bins, T, 3] of each sound of a batch, white behind its end."""
  import matplotlib

  rate, bins = config.data.sample_rate, config.model.mel_bins

  @jax.jit
  def spectrogram(waves_BS, frames_B):
    mel_BTM = log_mel(waves_BS, sample_rate=rate, mel_bins=bins)
    return sharding.replicate(normalize_mel(mel_BTM, frames_B))

  frames_B = frame_counts(batch["wave_lengths"], sample_rate=rate)
  mel_BTM = np.asarray(spectrogram(batch["waves"], frames_B))[:, : max(frames_B)]
  # Of equal steps to the eye, with and without colour vision.
  colours = matplotlib.colormaps["viridis"]
  shade = lambda mel_TM: np.clip(0.5 + mel_TM.T[::-1] / (2 * _LOUDEST), 0, 1)
  images = [colours(shade(mel_TM), bytes=True)[..., :3] for mel_TM in mel_BTM]
  for image, frames in zip(images, frames_B, strict=True):
    image[:, frames:] = 255
  return images
