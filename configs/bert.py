"""Masked language models: one to train in minutes on a CPU, and the papers' sizes.

tiny

base
"""

from magneto_jax.config import config_of_variant


def tiny(config):
  """Two million parameters, a few minutes on two CPU cores."""
  config.task = "masked_lm"
  config.steps = 800
  config.batch_size = 16
  config.eval_every = 100
  config.checkpoint_every = 400
  config.log_every = 25
  config.model.layers = 4
  config.model.width = 192
  config.model.positions = "rotary"
  config.data.seq_length = 128
  config.optimizer.learning_rate = 4e-3
  config.optimizer.warmup_steps = 60
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip_norm = 1.0


VARIANTS = {"tiny": tiny}


def get_config(variant: str = "tiny"):
  """The config of a variant."""
  return config_of_variant(VARIANTS, variant, "configs/bert.py")
