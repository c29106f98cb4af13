"""Translation by deep encoder-decoders. Can be planned; no source of their data is built in yet.

deepnet_500_500
  DeepNet: Scaling Transformers to 1,000 Layers (arXiv 2203.00555), on OPUS-100 (100 languages to
  and from English): 500 encoder and 500 decoder layers of width 512, FFN 2048, 8 heads; table 7:
  learning rate 5e-4, 4,000 steps of warm-up, 128 x 4,096 tokens a step, dropout 0.1, no
  weight decay, four epochs. Adam (0.9, 0.98) and label smoothing 0.1 are fairseq's usual, and so is
  the inverse-square-root schedule, in place of which the rate falls linearly here; steps are those
  of Foundation Transformers (arXiv 2210.06423) on the same data. Not known: the vocabulary; 64,000
  pieces here. Rows are padded to 256 tokens.

deepnet_100_100
  The same paper, its model of 100 languages into each other: 100 + 100 layers of width 1024, FFN
  4096, 16 heads, 3.2 billion parameters. Not known: the vocabulary (the 128,000 pieces of M2M-100,
  arXiv 2010.11125, with which it is compared, make 3.07 billion), and how it was trained: all else
  as above.

Both are made for 256 chips that share all weights (mesh.fsdp); any number of chips that divides the
width does. Not yet trained here.
"""

from magneto_jax.config import config_of_variant


def tiny(config):
  """1.7 million parameters, some minutes on two CPU cores."""
  config.task = "translation"
  config.steps = 700
  config.batch_size = 16
  config.label_smoothing = 0.1
  config.eval_every = config.checkpoint_every = 100
  config.log_every = 20
  config.model.layers = config.model.encoder_layers = 2
  config.model.width = 160
  config.model.positions = "rotary"
  config.model.dropout = 0.1
  config.data.vocab_size = 2000
  config.data.seq_length = 128
  config.optimizer.learning_rate = 4e-3
  config.optimizer.warmup_steps = 100
  config.optimizer.clip_norm = 1.0


def _deepnet(config, *, layers: int, width: int, heads: int, vocab_size: int):
  config.task = "translation"
  config.recipe = "deepnet"
  config.steps = 100_000
  config.batch_size = 2048
  config.vocab_chunk = 16_000
  config.label_smoothing = 0.1
  config.cast_weights = True
  config.eval_every = config.checkpoint_every = 5000
  config.log_every = 100
  config.model.layers = config.model.encoder_layers = layers
  config.model.width = width
  config.model.heads = heads
  config.model.activation = "relu"
  config.model.dropout = 0.1
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.data.vocab_size = vocab_size
  config.data.seq_length = 256
  config.optimizer.learning_rate = 5e-4
  config.optimizer.schedule = "linear"
  config.optimizer.weight_decay = 0.0
  config.optimizer.warmup_steps = 4000
  config.mesh.data = 1
  config.mesh.fsdp = -1


def deepnet_500_500(config):
  """1,000 layers of width 512: 3.7 billion parameters."""
  _deepnet(config, layers=500, width=512, heads=8, vocab_size=64_000)


def deepnet_100_100(config):
  """200 layers of width 1024: 3.1 billion parameters."""
  _deepnet(config, layers=100, width=1024, heads=16, vocab_size=128_000)


VARIANTS = {"tiny": tiny, "deepnet_100_100": deepnet_100_100, "deepnet_500_500": deepnet_500_500}


def get_config(variant: str = "tiny"):
  """The config of a variant."""
  return config_of_variant(VARIANTS, variant, "configs/translation.py")
