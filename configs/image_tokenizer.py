"""Image tokenizers: images as a few words each, for masked image modelling (configs/beit.py).

mnist
  The 5,000 digits that ship with the package, each as 7 x 7 words of 64.

  python -m magneto_jax.train --config=configs/image_tokenizer.py:mnist --workdir=runs/tokens

  Target: a squared error of 0.08 on the validation images, less than half of what patches of one
  colour each have, and a codebook perplexity of at least 16, a quarter of the codes. Reached:
  0.0388 of 0.165, and 35.3 with all 64 codes in use, after 1 min 14 s of training on two cores of
  an Intel Xeon, otherwise nearly idle, 28 November 2026, jax 0.10.2.

emoji
  The emoji that ship with the package, each as 4 x 4 words of 128. Target: the same, a perplexity
  of 32. Reached: 0.0719 of 0.169, and 104.9 with all 128 codes in use, after 42 s of training on
  two cores of an Intel Xeon that had other work too, 28 November 2026, jax 0.10.2.

base
  BEiT v2's tokenizer (arXiv 2208.06366, section 2.1 and appendix, and its code): a ViT-B/16 of 12
  layers as encoder and three as decoder, 8,192 codes of 32 numbers with a decay of 0.99, images of
  224 pixels of ImageNet-1k, 100 epochs of batches of 512, AdamW (0.9, 0.99), weight decay 1e-4, a
  learning rate of 2e-4 after ten epochs, cosine to 1e-5. Crops keep 8 to 100 % of an image, half
  are mirrored. Differs: its target is the pixels and not the features of CLIP; its layers are
  Magneto's. Not yet trained here.

The small ones draw codes that hardly anything chooses anew (model.codebook_redraw), and let codes
follow faster: with BEiT v2's decay of 0.99 and few steps a code stays what it was. BEiT v2 does
neither.
"""

from magneto_jax.config import config_of_variant


def _tiny(config):
  """What the two small ones share: one layer each side; some minutes on two CPU cores."""
  config.task = "image_tokenizer"
  config.steps = 1000
  config.batch_size = 64
  config.eval_every = config.checkpoint_every = 250
  config.log_every = 25
  config.model.layers = 1
  config.model.width = 64
  config.model.patch_size = 4
  config.model.positions = "learned"
  config.model.codebook_decay = 0.9
  config.model.codebook_redraw = 0.2
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 50
  config.optimizer.end_factor = 0.05
  config.optimizer.b2 = 0.99
  config.optimizer.weight_decay = 1e-4
  config.optimizer.clip_norm = 1.0


def mnist(config):
  """0.1 million parameters and 64 codes."""
  _tiny(config)
  config.data.name = "embedded/mnist5k"
  config.model.image_size = 28
  config.model.image_vocab_size = 64


def emoji(config):
  """0.1 million parameters and 128 codes."""
  _tiny(config)
  config.steps = 3000
  config.batch_size = 32
  config.eval_every = config.checkpoint_every = 500
  config.data.name = "embedded/emoji"
  config.data.augment.flip = 0.5
  config.model.image_size = 32
  config.model.patch_size = 8
  config.model.image_vocab_size = 128


# Of a batch of 512 of ImageNet-1k's 1,281,167 training images.
_EPOCH = 2502


def base(config):
  """ViT-B/16 and 8,192 codes; see above."""
  config.task = "image_tokenizer"
  config.data.name = "imagenet2012"
  config.data.augment.crop_scale = 0.08
  config.data.augment.flip = 0.5
  config.steps = 100 * _EPOCH
  config.batch_size = 512
  config.eval_every = config.checkpoint_every = _EPOCH
  config.model.encoder_layers = 12
  config.model.layers = 3
  config.model.width = 768
  config.model.heads = 12
  config.model.ffn_width = 3072
  config.model.positions = "learned"
  config.model.dtype = "bfloat16"
  config.model.image_size = 224
  config.model.patch_size = 16
  config.model.image_vocab_size = 8192
  config.optimizer.learning_rate = 2e-4
  config.optimizer.warmup_steps = 10 * _EPOCH
  config.optimizer.end_factor = 1e-5 / 2e-4
  config.optimizer.b2 = 0.99
  config.optimizer.weight_decay = 1e-4


VARIANTS = {"mnist": mnist, "emoji": emoji, "base": base}


def get_config(variant: str = "mnist"):
  """The config of a variant: one of VARIANTS."""
  return config_of_variant(VARIANTS, variant, "configs/image_tokenizer.py")
