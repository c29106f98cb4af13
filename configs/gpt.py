"""Causal language models: one to train in minutes on a CPU, and the Magneto paper's sizes.

tiny
  Ten plays of Shakespeare that ship with the package: eight to train on, one (The Tempest) to
  validate on. The command at the top of the README. Target: 2.456 bits a byte.
  Reached: that, and 3.708 nats a token, after 4 min 15 s of training on two cores of an AMD EPYC
  (AVX-512), otherwise idle, 25 November 2026, jax 0.10.2.

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

gpt_1b3, gpt_6b7
  The sizes of Language Models are Few-Shot Learners (GPT-3, arXiv 2005.14165), table 2.1: 24 x 2048
  and 32 x 4096, FFN 4 x the width, 2048 tokens a sample, a million and two million tokens a step
  for 300 billion tokens, peak learning rate 2e-4 and 1.2e-4; appendix B: Adam (0.9, 0.95), clipping
  at 1.0, weight decay 0.1, warm-up over 375 million tokens, cosine decay to 10 % over 260 billion.
  Differs: Magneto's recipe (--config.recipe=pre_ln_scaled_init for GPT-2's and -3's); heads of 128,
  which fill a TPU's lanes (the table's 24 heads of 128 do not make 2048); no layer of sparse
  attention; C4 in place of a corpus that is not public, with 50,257 pieces rounded up to 50,304,
  which a mesh can cut. Made for 256 chips, cut as fsdp 64 x tensor 4, which leaves room for smaller
  batches and more chips; with these rows and chips fsdp alone is bound by less (docs/plans.md:
  --config.mesh.fsdp=256 --config.mesh.tensor=1). Not yet trained here.
"""

from magneto_jax.config import config_of_variant


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


def _gpt(config, *, layers: int, width: int, batch_size: int, learning_rate: float):
  tokens = batch_size * 2048
  config.steps = 300_000_000_000 // tokens
  config.batch_size = batch_size
  config.vocab_chunk = 4096
  config.cast_weights = True
  config.eval_every = config.checkpoint_every = 5000
  config.eval_batches = 20
  config.log_every = 100
  config.model.layers = layers
  config.model.width = width
  config.model.heads = width // 128
  config.model.positions = "learned"
  config.model.dtype = "bfloat16"
  config.model.remat = "dots"
  config.data.name = "c4/en:3.1.0"
  config.data.vocab_size = 50_304
  config.data.seq_length = 2048
  config.optimizer.learning_rate = learning_rate
  config.optimizer.b2 = 0.95
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip_norm = 1.0
  config.optimizer.warmup_steps = 375_000_000 // tokens
  config.optimizer.decay_steps = 260_000_000_000 // tokens
  config.optimizer.end_factor = 0.1
  config.mesh.fsdp = 64
  config.mesh.tensor = 4


def gpt_1b3(config):
  """24 layers of width 2048: 1.3 billion parameters, a million tokens a step."""
  _gpt(config, layers=24, width=2048, batch_size=512, learning_rate=2e-4)


def gpt_6b7(config):
  """32 layers of width 4096: 6.7 billion parameters, two million tokens a step."""
  _gpt(config, layers=32, width=4096, batch_size=1024, learning_rate=1.2e-4)
  config.accumulation = 4


VARIANTS = {
  "tiny": tiny,
  "magneto_24": magneto_24,
  "magneto_48": magneto_48,
  "magneto_72": magneto_72,
  "gpt_1b3": gpt_1b3,
  "gpt_6b7": gpt_6b7,
}


def get_config(variant: str = "tiny"):
  """The config of a variant."""
  return config_of_variant(VARIANTS, variant, "configs/gpt.py")
