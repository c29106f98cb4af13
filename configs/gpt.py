"""Causal language models: one to train in minutes on a CPU, and the Magneto paper's sizes.

tiny
  Ten plays of Shakespeare that ship with the package: eight to train on, one (The Tempest) to
  validate on. The command at the top of the README. 3.708 nats a token and 2.456 bits a byte after
  4 min 15 s of training on two cores of an AMD EPYC (AVX-512), otherwise idle, 25 November 2026,
  jax 0.10.2.

magneto_24, magneto_48, magneto_72
  Foundation Transformers (arXiv 2210.06423), section 4.1 and table 9: width 1024, FFN 3072 (as
  printed there), 16 heads, 2048 tokens a sample, 256 samples a step, Adam (0.9, 0.98), polynomial
  decay, 750 steps of warm-up, no clipping, weight decay 0.01 (of all parameters, as fairseq, which
  they were trained with, decays them). Peak learning rate 1e-3 (24 layers)
  and 1.2e-3 (48 and 72), 500,000 steps (24) and 250,000 (48 and 72), dropout 0 (24) and 0.1.
  The paper scores the models by zero-shot accuracy (61.4, 64.1 and 65.8 on average over four sets)
  and trains on a corpus that is not public with GPT-2's vocabulary; here: C4 (TFDS) and as many
  pieces trained on it, so the scores are not to be expected digit by digit. The paper does not
  state positions or activation: sinusoidal and GELU here, as in its code's language models. Not
  yet trained here.
  Prepare the data as the first run's message says; then, on an accelerator:

  python -m magneto_jax.train --config=configs/gpt.py:magneto_24 --workdir=runs/magneto_24
"""

from magneto_jax.config import ConfigError, default_config


def tiny(config):
  """Two million parameters, a few minutes on two CPU cores."""
  config.steps = 750
  config.batch_size = 8
  config.eval_every = 125
  config.checkpoint_every = 250
  config.log_every = 25
  config.model.layers = 4
  config.model.width = 192
  config.model.positions = "rotary"
  config.optimizer.learning_rate = 4e-3
  config.optimizer.warmup_steps = 60
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip_norm = 1.0


def _magneto(config, *, layers: int, learning_rate: float, steps: int, dropout: float):
  config.steps = steps
  config.batch_size = 256
  config.accumulation = 16
  config.eval_every = config.checkpoint_every = 5000
  config.eval_batches = 20
  config.log_every = 100
  config.model.layers = layers
  config.model.width = 1024
  config.model.ffn_width = 3072
  config.model.heads = 16
  config.model.dropout = config.model.attention_dropout = dropout
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.data.name = "c4/en:3.1.0"
  config.data.vocab_size = 50_257
  config.data.seq_length = 2048
  config.optimizer.learning_rate = learning_rate
  config.optimizer.schedule = "polynomial"
  config.optimizer.decay_mask = "all"
  config.optimizer.warmup_steps = 750


def magneto_24(config):
  """24 layers: about 300 million parameters."""
  _magneto(config, layers=24, learning_rate=1e-3, steps=500_000, dropout=0.0)


def magneto_48(config):
  """48 layers."""
  _magneto(config, layers=48, learning_rate=1.2e-3, steps=250_000, dropout=0.1)


def magneto_72(config):
  """72 layers."""
  _magneto(config, layers=72, learning_rate=1.2e-3, steps=250_000, dropout=0.1)


VARIANTS = {
  "tiny": tiny,
  "magneto_24": magneto_24,
  "magneto_48": magneto_48,
  "magneto_72": magneto_72,
}


def get_config(variant: str = "tiny"):
  """The config of a variant."""
  if variant not in VARIANTS:
    raise ConfigError(f"configs/gpt.py has no {variant!r}, only {', '.join(VARIANTS)}")
  config = default_config()
  VARIANTS[variant](config)
  return config
