"""Speech: three recognisers and a translator to train in minutes on a CPU, and the papers' models.

ctc, transducer, decoder
  What does this voice prompt say? The 388 English ones that ship with the package, of one voice, at
  most 4 seconds each; 49 others to validate on. Texts are read as small letters, one token each.
  With a CTC, a transducer and an encoder-decoder.

  Target: a character error rate of 60 % on the held-out utterances, and less than the best
  constant text has there (python -m benchmarks.speech_baselines): 90.5 %; and 5 % at most on those
  that were trained on:

  python -m magneto_jax.evaluate --workdir=runs/ctc --split=train

  Reached by `ctc`: 43.6 % and 3.4 %, after 6 min 22 s of training on two cores of an Intel Xeon,
  nearly idle; by `transducer`: 38.7 % and 0.4 %, after 10 min 30 s, and by `decoder`: 56.6 % and
  1.3 %, after 13 min 13 s, both beside other work; 28 November 2026, jax 0.10.2.

  Ten minutes of one voice prove that the pipeline works, from the sound to the text, and no
  recogniser: what it has not heard it spells, and often wrongly.

translation
  French prompts to English texts, 345 of them, 43 others to validate on, by an encoder-decoder. It
  may start with the encoder of `pretraining`, which hears what the French ones say:

  python -m magneto_jax.train --config=configs/speech.py:translation --workdir=runs/translation \\
    --config.init_from=runs/pretraining

  Target: 20 of chrF in small letters, and more than the best constant text has: 18.9. Reached:
  35.5 from scratch, and 41.0 from `pretraining`, after 30 and 17 min of training on two cores of an
  Intel Xeon, of which both had a part, 28 November 2026, jax 0.10.2.

pretraining
  A CTC on the French prompts; no target of its own. It reached a character error rate of 39.3 % on
  the held-out ones, after 7 min 17 s, in the same way.

magneto_18, magneto_36
  Foundation Transformers (arXiv 2210.06423), section 4.6, on LibriSpeech's 960 hours: a transducer
  with a VGG front end, 18 and 36 layers of width 512 and FFN 2048, an LSTM of two layers, 80 bins,
  5,000 subwords, 150 epochs, a learning rate of 5e-3 and 3e-3, adaptive SpecAugment, an auxiliary
  loss and no language model. WER there 2.99 and 2.72 on test-clean, 6.16 and 5.56 on test-other.
  Not stated: heads, dropout, widths of joiner and LSTM, the batch, the schedule, the figures of
  SpecAugment and which auxiliary loss. Here: 8 heads, dropout 0.1, 640 and 512 (ESPnet's), 256
  utterances, the inverse square root after 25,000 steps (ESPnet's), those of arXiv 1912.05533, and
  0.3 of a CTC; 72 and 128 million parameters, where the paper has 80 and 140.

espnet_transformer
  ESPnet's Transformer for the same data (train_asr_transformer_specaug.yaml): 12 + 6 layers of
  width 512, FFN 2048, 8 heads, 0.3 of a CTC, smoothing 0.1, a learning rate of 5e-3 after 25,000
  steps, 200 epochs. Its batches are of equal length and not of equal number: 256 utterances here.
  Without its warping of time, its language model, its frames of 32 ms, its search by decoder and
  CTC together, and its average of the ten best checkpoints.

fairseq_s
  fairseq's s2t_transformer_s for the same data (librispeech_example.md): 12 + 6 layers of width
  256, FFN 2048, 4 heads, two convolutions, a learning rate of 2e-3 after 10,000 steps, 300,000
  updates of 8 x 40,000 frames, clipped at 10. WER there 4.4 and 9.0, by the average of the last ten
  checkpoints, which is not built in. About 260 utterances are as many frames: 256 here.

mustc_pretraining, mustc
  fairseq's speech translation for MuST-C (mustc_example.md) with the recipe deepscalelm: a
  recogniser of 5,000 pieces and a learning rate of 1e-3, whose encoder a translator of 8,000 pieces
  and 2e-3 starts with; both of the sizes of fairseq_s, 100,000 updates. BLEU there, with Pre-LN
  and averages of the last ten checkpoints, the recogniser's too, 22.7 from English to German. Its
  WER is of words without punctuation and capitals; here punctuation counts. They read manifests
  (docs/speech.md):

  python -m magneto_jax.train --config=configs/speech.py:mustc --workdir=runs/mustc \\
    --config.init_from=runs/mustc_pretraining --config.data.train_files=train_st.tsv \\
    --config.data.validation_files=dev_st.tsv

Every sound is padded to data.max_seconds, as batches are not sorted by length: a step of
LibriSpeech costs what 35 seconds each do, and its mean is 12. The papers' models leave out what is
longer than data.max_seconds or data.seq_length, of held-out sets too, and say how many there are: a
rate is comparable where that is none. Of these only the small ones have been trained here.
LibriSpeech is read where TFDS has prepared it (--config.data.data_dir).
"""

from magneto_jax.config import config_of_variant


def _tiny(config):
  """What the small models share: some two million parameters, minutes on two CPU cores."""
  config.task = "speech_recognition"
  config.steps = 1500
  config.batch_size = 16
  config.eval_every = config.checkpoint_every = 250
  config.log_every = 25
  config.model.layers = 4
  config.model.width = 144
  config.model.heads = 4
  config.model.mel_bins = 40
  config.model.dropout = 0.1
  config.data.name = "embedded/en"
  config.data.tokenizer = "char"
  config.data.text_case = "lower"
  config.data.seq_length = 96
  config.data.speed_change = 0.1
  config.spec_augment.frequency_masks = 1
  config.spec_augment.frequency_width = 6
  config.spec_augment.time_masks = 2
  config.spec_augment.time_width = 0
  config.spec_augment.time_share = 0.05
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 100
  config.optimizer.clip_norm = 1.0


def ctc(config):
  """A CTC."""
  _tiny(config)
  config.beam.size = 1


def transducer(config):
  """A transducer, with a CTC of its encoder beside it in training."""
  _tiny(config)
  config.model.speech_head = "transducer"
  config.model.ctc_weight = 0.3
  config.model.joint_width = 128
  config.model.predictor_width = 128
  config.beam.size = 1


def _with_decoder(config):
  config.label_smoothing = 0.1
  config.model.encoder_layers = 4
  config.model.layers = 2


def decoder(config):
  """An encoder-decoder, with a CTC likewise."""
  _tiny(config)
  _with_decoder(config)
  config.model.speech_head = "decoder"
  config.model.ctc_weight = 0.3


def pretraining(config):
  """A CTC on the French prompts."""
  ctc(config)
  config.data.name = "embedded/fr"


def translation(config):
  """From the French prompts to English."""
  _tiny(config)
  _with_decoder(config)
  config.task = "speech_translation"
  config.data.name = "embedded/fr-en"
  config.data.seq_length = 160


LIBRISPEECH = 281_241  # Utterances of its 960 hours.


def _librispeech(config, *, batch_size: int):
  """What the papers' recognisers share."""
  config.task = "speech_recognition"
  config.batch_size = batch_size
  config.eval_every = config.checkpoint_every = 5 * (LIBRISPEECH // batch_size)
  config.log_every = 100
  config.model.width = 512
  config.model.ffn_width = 2048
  config.model.heads = 8
  config.model.activation = "relu"
  config.model.dropout = 0.1
  config.model.dtype = "bfloat16"
  config.data.name = "librispeech/default"
  config.data.train_split = "train_clean100+train_clean360+train_other500"
  config.data.validation_split = "dev_clean"
  config.data.text_case = "lower"
  config.data.sample_rate = 16_000
  config.data.max_seconds = 35.0
  config.data.seq_length = 256
  config.data.vocab_size = 5000
  config.data.too_long = "skip"
  config.data.workers = 16
  config.optimizer.schedule = "inverse_sqrt"
  config.optimizer.weight_decay = 0.0


def _magneto(config, *, layers: int, learning_rate: float):
  _librispeech(config, batch_size=256)
  config.steps = 150 * (LIBRISPEECH // 256)
  config.model.layers = layers
  config.model.activation = "gelu"
  config.model.speech_head = "transducer"
  config.model.front_end = "vgg"
  config.model.predictor_layers = 2
  config.model.ctc_weight = 0.3
  config.model.remat = "full"
  config.data.speed_change = 0.1
  config.spec_augment.frequency_masks = 2
  config.spec_augment.frequency_width = 27
  config.spec_augment.time_masks = 20
  config.spec_augment.time_width = 0
  config.spec_augment.time_share = 0.04
  config.spec_augment.time_mask_share = 0.04
  config.optimizer.learning_rate = learning_rate
  config.optimizer.warmup_steps = 25_000


def magneto_18(config):
  """80 million parameters in the paper."""
  _magneto(config, layers=18, learning_rate=5e-3)


def magneto_36(config):
  """140 million parameters in the paper."""
  _magneto(config, layers=36, learning_rate=3e-3)


def espnet_transformer(config):
  """ESPnet's encoder-decoder."""
  _librispeech(config, batch_size=256)
  config.recipe = "pre_ln"
  config.steps = 200 * (LIBRISPEECH // 256)
  config.label_smoothing = 0.1
  config.model.speech_head = "decoder"
  config.model.front_end = "conv2d"
  config.model.encoder_layers = 12
  config.model.layers = 6
  config.model.ctc_weight = 0.3
  config.model.activation_dropout = 0.1
  config.model.tied_embeddings = False
  config.spec_augment.frequency_masks = 2
  config.spec_augment.frequency_width = 30
  config.spec_augment.time_masks = 2
  config.spec_augment.time_width = 40
  config.optimizer.learning_rate = 5e-3
  config.optimizer.warmup_steps = 25_000
  config.beam.size = 20


def _s2t_small(config):
  """s2t_transformer_s, and how fairseq trains it."""
  config.recipe = "pre_ln"
  config.label_smoothing = 0.1
  config.model.encoder_layers = 12
  config.model.layers = 6
  config.model.width = 256
  config.model.heads = 4
  config.model.attention_dropout = 0.1
  config.model.activation_dropout = 0.1
  config.spec_augment.frequency_masks = 2
  config.spec_augment.frequency_width = 27
  config.spec_augment.time_masks = 2
  config.spec_augment.time_width = 100
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 10_000
  config.optimizer.clip_norm = 10.0


def fairseq_s(config):
  """fairseq's recogniser."""
  _librispeech(config, batch_size=256)
  _s2t_small(config)
  config.steps = 300_000
  config.model.speech_head = "decoder"
  config.data.vocab_size = 10_000


def _mustc(config, *, vocab_size: int, learning_rate: float):
  """What both of its models share; data are manifests."""
  _librispeech(config, batch_size=256)
  _s2t_small(config)
  config.recipe = "deepscalelm"
  config.model.tied_embeddings = False
  config.steps = 100_000
  config.data.name = "manifest"
  config.data.train_split, config.data.validation_split = "train", "validation"
  config.data.max_seconds = 30.0
  config.data.vocab_size = vocab_size
  config.spec_augment.frequency_masks = config.spec_augment.time_masks = 1
  config.optimizer.learning_rate = learning_rate


def mustc_pretraining(config):
  """English sounds to what is said."""
  _mustc(config, vocab_size=5000, learning_rate=1e-3)
  config.model.speech_head = "decoder"


def mustc(config):
  """English sounds to German texts."""
  _mustc(config, vocab_size=8000, learning_rate=2e-3)
  config.task = "speech_translation"
  config.data.text_case = "keep"


VARIANTS = {
  "ctc": ctc,
  "transducer": transducer,
  "decoder": decoder,
  "translation": translation,
  "pretraining": pretraining,
  "magneto_18": magneto_18,
  "magneto_36": magneto_36,
  "espnet_transformer": espnet_transformer,
  "fairseq_s": fairseq_s,
  "mustc_pretraining": mustc_pretraining,
  "mustc": mustc,
}


def get_config(variant: str = "ctc"):
  """The config of a variant."""
  return config_of_variant(VARIANTS, variant, "configs/speech.py")
