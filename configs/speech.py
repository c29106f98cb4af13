"""Placeholder."""

from magneto_jax.config import config_of_variant


def _tiny(config):
  """What the small runs share."""
  config.task = "speech_recognition"
  config.batch_size = 16
  config.log_every = 25
  config.model.layers = 4
  config.model.width = 144
  config.model.heads = 4
  config.model.ffn_width = 576
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
  """CTC."""
  _tiny(config)
  config.steps = 1500
  config.eval_every = config.checkpoint_every = 250
  config.beam.size = 1


VARIANTS = {"ctc": ctc}


def get_config(variant: str = "ctc"):
  """The config of a variant."""
  return config_of_variant(VARIANTS, variant, "configs/speech.py")
