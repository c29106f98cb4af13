"""Masked image modelling as in BEiT: one to train in minutes on a CPU, and the papers' sizes.

The chain is an image tokenizer, this, and fine-tuning; docs/vision.md says more.

tiny
  Handwritten digits that ship with the package (MNIST-5k), 28 pixels, 7 x 7 patches, of which 20
  are hidden by blocks of at least 4.

  python -m magneto_jax.train --config=configs/image_tokenizer.py:mnist --workdir=runs/tokens
  python -m magneto_jax.train --config=configs/beit.py:tiny --workdir=runs/beit \\
    --config.image_tokenizer=runs/tokens

  Target: a masked accuracy of 0.3, more than the commonest of the hidden patches' tokens has, also
  where each place has its own, and a codebook perplexity of at least 16, a quarter of the codes.
  Reached: 0.412 (the commonest token 0.100, that of each place 0.323) with a perplexity of 42.8,
  after 5 min 33 s of training on two cores of an Intel Xeon, otherwise nearly idle, 28 November
  2026, jax 0.10.2.

finetune_tiny
  Classes of the same digits, from tiny's encoder; `benchmarks.masked_image_finetuning` compares it
  with training from scratch. It is judged on the validation part.

  python -m magneto_jax.train --config=configs/beit.py:finetune_tiny --workdir=runs/digits \\
    --config.init_from=runs/beit

base, large
  Foundation Transformers (arXiv 2210.06423), section 4.5: ViT-B/16 and ViT-L/16 with Magneto's
  layers, pre-trained as BEiT v2 is, on ImageNet-1k for 300 epochs. The paper's own tables 13 and 14
  of hyper-parameters were not at hand; these are BEiT v2's (arXiv 2208.06366) for 300 epochs:
  batches of 2,048, AdamW (0.9, 0.98), weight decay 0.05 (also of the table of biases and the mask
  token), peak learning rate 1.5e-3, ten epochs of warm-up, cosine to 1e-5, clipping at 3.0, no
  drop-path; 75 of 196 patches hidden, random crops of 0.2 at least, flips, colour jitter 0.4; a
  shared table of two-dimensional relative position biases and no absolute positions. After
  fine-tuning the paper has 84.9 % (base) and 86.8 % (large) on ImageNet-1k, and the Pre-LN ViT that
  was trained in the same way 84.5 % and 86.2 %.
  Differs: tokens of our own tokenizer, whose target is pixels and not CLIP's features; no class
  token, and no second path from an earlier layer; whether Magneto kept LayerScale and the biases is
  not stated. Not yet trained here.

  python -m magneto_jax.train --config=configs/image_tokenizer.py:base --workdir=runs/tokens
  python -m magneto_jax.train --config=configs/beit.py:base --workdir=runs/beit \\
    --config.image_tokenizer=runs/tokens

beit_base
  BEiT (arXiv 2106.08254), table 12: 800 epochs, AdamW (0.9, 0.999), drop-path 0.1, crops of 0.08 at
  least; Pre-LN with LayerScale from 0.1.
  Differs: as base; our tokens, not DALL-E's; norms have an epsilon of 1e-5 and not 1e-6, the mask
  token starts at zero, and weights are drawn as the recipe says, without BEiT's division of each
  layer's last matrices by sqrt(2 l). Not yet trained here.

finetune_base, finetune_large
  BEiT v2's fine-tuning after 300 epochs: batches of 1,024, AdamW (0.9, 0.999), weight decay 0.05,
  learning rate 5e-4 with a decay by layers of 0.65 (large 0.8), cosine to 1e-6, 100 epochs with 20
  of warm-up (large 50 with 5), drop-path 0.1 (0.2), mixup 0.8, cutmix 1.0, label smoothing 0.1,
  RandAugment of two operations of strength 9 -+ 0.5, random erasing 0.25; the mean of the patches
  is read, evaluation cuts 0.875 of the short side.
  Differs: the table of biases stays shared, where BEiT gives each layer a copy; pixels are in
  [-1, 1], as in pre-training here, where BEiT has ImageNet's means and deviations. Not yet trained
  here.

  python -m magneto_jax.train --config=configs/beit.py:finetune_base --workdir=runs/imagenet \\
    --config.init_from=runs/beit
"""

from magneto_jax.config import config_of_variant

# ImageNet-1k's.
_TRAIN_IMAGES = 1_281_167


def _tiny_encoder(config):
  """What pre-training and fine-tuning share."""
  config.log_every = 25
  config.model.layers = 4
  config.model.width = 96
  config.model.image_size = 28
  config.model.patch_size = 4
  config.model.positions = "learned"
  config.model.relative_patches = True
  config.model.pooling = "mean"
  config.data.name = "embedded/mnist5k"
  config.data.augment.crop_scale = 0.6
  config.optimizer.decay_mask = "beit"
  config.optimizer.weight_decay = 0.05
  config.optimizer.clip_norm = 3.0


def tiny(config):
  """Half a million parameters; some minutes on two CPU cores."""
  _tiny_encoder(config)
  config.task = "masked_image"
  config.steps = 2000
  config.batch_size = 64
  config.eval_every = config.checkpoint_every = 200
  config.model.image_vocab_size = 64
  config.data.mask_rate = 0.4
  config.data.mask_block = 4
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 100
  config.optimizer.end_factor = 0.01


def finetune_tiny(config):
  """The same encoder with a head on the mean of its patches."""
  _tiny_encoder(config)
  config.task = "image_classification"
  config.steps = 1000
  config.batch_size = 32
  config.eval_every = config.checkpoint_every = 250
  config.label_smoothing = 0.1
  config.model.drop_path = 0.1
  config.optimizer.learning_rate = 1.5e-3
  config.optimizer.layer_decay = 0.75
  config.optimizer.warmup_steps = 100
  config.optimizer.end_factor = 0.01


def _encoder(config, *, batch_size: int):
  """ViT-B/16 at 224 pixels on ImageNet-1k."""
  config.batch_size = batch_size
  config.log_every = 100
  config.model.layers = 12
  config.model.width = 768
  config.model.heads = 12
  config.model.positions = "none"
  config.model.relative_patches = True
  config.model.pooling = "mean"
  config.model.dtype = "bfloat16"
  config.data.name = "imagenet2012"
  config.data.workers = 16
  config.optimizer.decay_mask = "beit"
  config.optimizer.weight_decay = 0.05


def _large(config):
  config.model.layers = 24
  config.model.width = 1024
  config.model.heads = 16


def _epochs(config, count: int, *, warmup: int):
  """As many epochs, an evaluation and a checkpoint every fifth."""
  epoch = _TRAIN_IMAGES // config.batch_size
  config.steps = count * epoch
  config.optimizer.warmup_steps = warmup * epoch
  config.eval_every = config.checkpoint_every = 5 * epoch


def base(config):
  """ViT-B/16, 86 million parameters without the tokenizer's; 300 epochs."""
  _encoder(config, batch_size=2048)
  _epochs(config, 300, warmup=10)
  config.task = "masked_image"
  config.data.mask_rate = 0.383
  config.data.augment.crop_scale = 0.2
  config.data.augment.flip = 0.5
  config.data.augment.color_jitter = 0.4
  config.optimizer.learning_rate = 1.5e-3
  config.optimizer.clip_norm = 3.0
  config.optimizer.end_factor = 1e-5 / 1.5e-3


def large(config):
  """The same with ViT-L/16."""
  base(config)
  _large(config)


def beit_base(config):
  """BEiT's own recipe."""
  base(config)
  _epochs(config, 800, warmup=10)
  config.recipe = "layer_scale"
  config.model.drop_path = 0.1
  config.data.augment.crop_scale = 0.08
  config.optimizer.b2 = 0.999


def finetune_base(config):
  """Classes of ImageNet-1k."""
  _encoder(config, batch_size=1024)
  _epochs(config, 100, warmup=20)
  config.task = "image_classification"
  config.keep_best = True
  config.label_smoothing = 0.1
  config.model.drop_path = 0.1
  config.data.eval_crop = 0.875
  augment = config.data.augment
  augment.crop_scale = 0.08
  augment.flip = 0.5
  augment.rand_augment = 2
  augment.erase = 0.25
  augment.mixup = 0.8
  augment.cutmix = 1.0
  config.optimizer.learning_rate = 5e-4
  config.optimizer.b2 = 0.999
  config.optimizer.layer_decay = 0.65
  config.optimizer.end_factor = 1e-6 / 5e-4


def finetune_large(config):
  """The same of ViT-L/16."""
  finetune_base(config)
  _large(config)
  _epochs(config, 50, warmup=5)
  config.model.drop_path = 0.2
  config.optimizer.layer_decay = 0.8


VARIANTS = {
  "tiny": tiny,
  "finetune_tiny": finetune_tiny,
  "base": base,
  "large": large,
  "beit_base": beit_base,
  "finetune_base": finetune_base,
  "finetune_large": finetune_large,
}


def get_config(variant: str = "tiny"):
  """The config of a variant."""
  return config_of_variant(VARIANTS, variant, "configs/beit.py")
