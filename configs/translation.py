"""Translation: one to train in minutes on a CPU, and the papers' deep encoder-decoders.

tiny
  The 5,265 English-German pairs that ship with the package (Debian Administrator's Handbook), 300
  others to validate on. Target: 2.8 nats a token. Reached: 2.648, a perplexity of 14.1, after
  26 min 48 s of training on two cores of an Intel Xeon (2.8 GHz) that had other work too, 28
  November 2026, jax 0.10.2 (left alone they take 15 min 10 s for 2,500 of the 3,000 steps). With a
  beam of 5 it writes validation sources at BLEU 9.2, chrF 33.2. Baselines, of `python -m
  benchmarks.translation_baselines`: 6.372 nats a token by the counts of the training targets'
  tokens, 5.245 by a dictionary learnt with IBM model 1 from the same pairs. What that dictionary
  writes word for word scores BLEU 15.4 and chrF 49.7 (copying the source 8.8 and 26.6), more than
  this model does: 5,265 pairs are few to learn two languages from, and names and commands, which
  the dictionary leaves as they are, are many. Longer training comes nearer and does not reach it:
  4,000 steps on an NVIDIA H200 (28 November 2026, jax 0.11.2) end at 2.368 nats, BLEU 12.4 and chrF
  38.1, and a width of 256 at 2.509, 10.8 and 38.4. So the mark is the loss.

wmt17_6_6, wmt17_18_18, wmt17_100_100
  DeepNet: Scaling Transformers to 1,000 Layers (arXiv 2203.00555), section 5, on WMT-17
  English-German: width 512, FFN 2048, 8 heads, learning rate 5e-4 after 4,000 steps of warm-up,
  64 x 4,096 tokens a step, one vocabulary of both languages. BLEU there 27.8, 28.8 and 28.9. Adam
  (0.9, 0.98), label smoothing 0.1 and the inverse square root are fairseq's usual. Not known:
  dropout, steps and the vocabulary; 0.1, 100,000 and 40,000 pieces here. Pairs of more than 256
  tokens on a side are skipped (as fairseq's script does with 250). Prepare the data as the first
  run's message says; then, on accelerators:

  python -m magneto_jax.train --config=configs/translation.py:wmt17_18_18 --workdir=runs/wmt17

opus100_18_18
  Foundation Transformers (arXiv 2210.06423), section 4.3, on OPUS-100 (100 languages to and from
  English): Magneto, 18 + 18 layers of width 512, 500,000 tokens a step, 100,000 steps. BLEU there
  31.0 on average, with a beam of 5. Its other numbers are not known: those of the next here.

opus100_100_100, deepnet_500_500
  DeepNet (arXiv 2203.00555), section 6, on OPUS-100: 100 + 100 and 500 + 500 layers of width 512,
  FFN 2048, 8 heads; table 7: learning rate 5e-4, 4,000 steps of warm-up, 128 x 4,096 tokens a step,
  dropout 0.1, no weight decay, four epochs. Adam (0.9, 0.98), label smoothing 0.1 and the inverse
  square root are fairseq's usual; steps are those of Foundation Transformers on the same data. Not
  known: the vocabulary; 64,000 pieces here.

deepnet_100_100
  The same paper, its model of 100 languages into each other: 100 + 100 layers of width 1024, FFN
  4096, 16 heads, 3.2 billion parameters. Not known: the vocabulary (the 128,000 pieces of M2M-100,
  arXiv 2010.11125, with which it is compared, make 3.07 billion), and how it was trained: all else
  as above.

Those of many languages read your own files (data.train_files, data.validation_files): a source, a
tab and its target a line, before each source a mark of the language to translate into, such as
`<2de> `. The two of `deepnet_` are made for 256 chips that share all weights (mesh.fsdp); any
number of chips that divides the width does. Of all of these only `tiny` has been trained here.
"""

from magneto_jax.config import config_of_variant


def tiny(config):
  """1.2 million parameters, some twenty minutes on two CPU cores."""
  config.task = "translation"
  config.steps = 3000
  config.batch_size = 16
  config.label_smoothing = 0.1
  config.eval_every = config.checkpoint_every = 250
  config.log_every = 25
  config.model.layers = config.model.encoder_layers = 2
  config.model.width = 128
  config.model.positions = "rotary"
  config.model.dropout = 0.3
  config.data.vocab_size = 2000
  config.data.seq_length = 128
  config.optimizer.learning_rate = 4e-3
  config.optimizer.warmup_steps = 100
  config.optimizer.clip_norm = 1.0


def _deep(config, *, layers: int, rows: int, vocab_size: int, width: int = 512, heads: int = 8):
  """What the papers' models have in common, the first of which is DeepNet's."""
  config.task = "translation"
  config.recipe = "deepnet"
  config.steps = 100_000
  config.batch_size = rows
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
  config.data.too_long = "skip"
  config.optimizer.learning_rate = 5e-4
  config.optimizer.schedule = "inverse_sqrt"
  config.optimizer.weight_decay = 0.0
  config.optimizer.warmup_steps = 4000


def _wmt17(config, *, layers: int):
  _deep(config, layers=layers, rows=1024, vocab_size=40_000)
  config.data.name = "wmt17_translate/de-en"


def _opus100(config, *, layers: int):
  _deep(config, layers=layers, rows=2048, vocab_size=64_000)
  config.data.name = "pair_files"


def _shared(config):
  """Weights lie on all devices together."""
  config.mesh.data = 1
  config.mesh.fsdp = -1


def wmt17_6_6(config):
  """12 layers: 65 million parameters."""
  _wmt17(config, layers=6)


def wmt17_18_18(config):
  """36 layers: 150 million parameters."""
  _wmt17(config, layers=18)


def wmt17_100_100(config):
  """200 layers: 760 million parameters."""
  _wmt17(config, layers=100)
  _shared(config)


def opus100_18_18(config):
  """Magneto: 165 million parameters."""
  _opus100(config, layers=18)
  config.recipe = "magneto"


def opus100_100_100(config):
  """200 layers: 770 million parameters."""
  _opus100(config, layers=100)
  _shared(config)


def deepnet_500_500(config):
  """1,000 layers of width 512: 3.7 billion parameters."""
  _opus100(config, layers=500)
  _shared(config)


def deepnet_100_100(config):
  """200 layers of width 1024: 3.1 billion parameters."""
  _deep(config, layers=100, rows=2048, vocab_size=128_000, width=1024, heads=16)
  config.data.name = "pair_files"
  _shared(config)


VARIANTS = {
  "tiny": tiny,
  "wmt17_6_6": wmt17_6_6,
  "wmt17_18_18": wmt17_18_18,
  "wmt17_100_100": wmt17_100_100,
  "opus100_18_18": opus100_18_18,
  "opus100_100_100": opus100_100_100,
  "deepnet_500_500": deepnet_500_500,
  "deepnet_100_100": deepnet_100_100,
}


def get_config(variant: str = "tiny"):
  """The config of a variant."""
  return config_of_variant(VARIANTS, variant, "configs/translation.py")
