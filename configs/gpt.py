"""Causal language models: a tiny one on the text that ships, and the papers' sizes.

tiny
  TBD

Sizes after Foundation Transformers (arXiv 2210.06423), section 4.1 and table 9: ...
"""

from magneto_jax.config import default_config


def get_config(variant: str = "tiny"):
  """The config of a variant."""
  config = default_config()
  config.steps = 600
  config.batch_size = 16
  config.model.layers = 6
  config.model.width = 128
  config.model.ffn_width = 512
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 50
  return config
