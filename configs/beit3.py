"""BEiT-3 on pairs of images and texts. Can be planned; no source of its data is built in yet.

giant
  Image as a Foreign Language: BEiT Pretraining for All Vision and Vision-Language Tasks (arXiv
  2208.10442), table 11: 40 layers of width 1408, FFN 6144, 16 heads, patches of 14 in images of
  224, a SentencePiece vocabulary of 64k, images' tokens those of BEiT v2 (8192), AdamW (0.9, 0.98)
  with epsilon 1e-6, peak learning rate 1e-3, 10,000 steps of warm-up, cosine decay, a million
  steps, weight decay 0.05, clipping at 3.0, drop path 0.1, no dropout.
  Differs: a step has the paper's 2,048 pairs, not the 2,048 images and 2,048 texts beside them;
  Magneto's recipe, as of the released models, not BEiT's init; and the layers of this library's
  multiway encoder, in which attention has an expert a modality too and nothing has one of both, so
  that it has 2.1 billion parameters and not 1.9. Not known: the longest text (64 tokens here, as in
  fine-tuning) and how the losses of both parts are weighed, which a batch's weights decide.
  Made for 256 chips: 4 copies, of 64 chips each (mesh.fsdp). Not yet trained here.
"""

from magneto_jax.config import config_of_variant


def giant(config):
  """40 layers of width 1408, an expert each for images and for texts."""
  config.task = "beit3"
  config.steps = 1_000_000
  config.batch_size = 2048
  config.cast_weights = True
  config.eval_every = config.checkpoint_every = 5000
  config.log_every = 100
  config.vocab_chunk = 8192
  config.model.layers = 40
  config.model.width = 1408
  config.model.ffn_width = 6144
  config.model.heads = 16
  config.model.positions = "learned"
  config.model.image_size = 224
  config.model.patch_size = 14
  config.model.image_vocab_size = 8192
  config.model.drop_path = 0.1
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.data.vocab_size = 64_000
  config.data.seq_length = 64
  config.optimizer.learning_rate = 1e-3
  config.optimizer.eps = 1e-6
  config.optimizer.weight_decay = 0.05
  config.optimizer.clip_norm = 3.0
  config.optimizer.warmup_steps = 10_000
  config.mesh.fsdp = 64


VARIANTS = {"giant": giant}


def get_config(variant: str = "giant"):
  """The config of a variant."""
  return config_of_variant(VARIANTS, variant, "configs/beit3.py")
