"""BEiT-3: images, texts and pairs of both in one model. Pre-training by masked data modelling.

The chain is an image tokenizer, this, and what it is for; docs/vision_language.md says more.

tiny
  The emoji that ship with the package, with their English and German names and keywords: pairs,
  images alone and texts alone, 32 of each a step. 32 pixels, 4 x 4 patches, of which 6 are hidden;
  of a pair's text half of the tokens, of a text alone 15 %. 37 of the 618 validation texts,
  lists of keywords, are training texts of other emoji, too.

  python -m magneto_jax.train --config=configs/image_tokenizer.py:emoji --workdir=runs/tokens
  python -m magneto_jax.train --config=configs/beit3.py:tiny --workdir=runs/beit3 \\
    --config.image_tokenizer=runs/tokens

  Target: an accuracy of 0.25 at the hidden tokens of pairs' texts, their ends not counted
  (pair_text_accuracy), more than the commonest token has and more than the same texts with another
  pair's image give (pair_text_accuracy_with_another_image); and of the pairs' hidden patches more
  answered than the commonest tokens, each place its own, would get right. Came out: 0.246, which is
  just short of it (commonest token 0.094, another image 0.241, none 0.236: what an image is worth
  to its text is little), and 0.318 of the patches (0.134), after 19 min 17 s of training on two
  cores of an Intel Xeon that had other work too, 28 November 2026, jax 0.10.2. With patches of 4,
  33 tokens a text and 1,500 steps it was 0.193 (0.185) in 10 min 41 s.

base, large
  The sizes of the released models (arXiv 2208.10442, and the code beside it): 12 layers of width
  768 and 24 of width 1024, patches of 16 in images of 224, attention, too, with experts of its own
  for each modality, Magneto's layers. Their pre-training was not published. Here it is the paper's
  of its giant model, table 11: 2,048 pairs, 2,048 images and 2,048 texts a step, a million steps,
  AdamW (0.9, 0.98) with epsilon 1e-6, peak learning rate 1e-3, 10,000 steps of warm-up, cosine
  decay, weight decay 0.05, clipping at 3.0, drop path 0.1, no dropout; crops, flips and colour
  jitter of 0.4; 40 % of the patches, 15 % of a text's and 50 % of a pair's text's tokens hidden.
  Not stated, and so chosen: how much of an image a crop keeps (at least half, as in fine-tuning),
  the longest text (64 tokens, likewise), what is read in place of a hidden token (as in BERT), how
  the parts of the loss are weighed (alike), and the heads (linear).
  Differs: data. The paper's are 14 million images (ImageNet-22k), 160 GB of text and 21 million
  pairs (CC12M, CC3M, SBU, COCO, Visual Genome), the released models' pairs those of LAION, COYO and
  others; here pairs are COCO's and images ImageNet-1k's, to be exchanged for yours; images' tokens
  are those of our own tokenizer, whose target is pixels. Not yet trained here.

  python -m magneto_jax.train --config=configs/image_tokenizer.py:base --workdir=runs/tokens
  python -m magneto_jax.train --config=configs/beit3.py:base --workdir=runs/beit3 \\
    --config.image_tokenizer=runs/tokens

giant
  The paper's model: 40 layers of width 1408, FFN 6144, 16 heads, patches of 14, attention shared
  between the modalities, and in the top three layers an expert more for both parts of a pair; 1.9
  billion parameters. All else as base. Differs: Magneto's recipe, as of the released models, not
  BEiT's init. Made for 256 chips: 4 copies, of 64 chips each (mesh.fsdp). It needs a tokenizer with
  patches of 14. Not yet trained here.

magneto
  Foundation Transformers (arXiv 2210.06423), section 4.7: BEiT-3's pre-training with Magneto's
  layers, 24 of width 544, FFN 2176, peak learning rate 2e-3, 300,000 steps of 12,288 samples, 4,096
  of each kind. After fine-tuning the paper has 79.00 on VQAv2's test-dev (Pre-LN 78.37) and 83.35
  on NLVR2's dev part (82.57). Its tables 16 and 17 of further hyper-parameters were not at hand:
  they are base's. Not stated: heads (8, of 68 numbers) and whether attention was shared (as in
  base). Not yet trained here.

retrieval_tiny, captioning_tiny, vqa_tiny, reasoning_tiny
  What `tiny` is for, on the same emoji, from its encoder or from scratch, two minutes to half an
  hour on two CPU cores (reasoning_tiny from scratch, as its texts are longer):

  python -m magneto_jax.train --config=configs/beit3.py:retrieval_tiny --workdir=runs/retrieval \\
    --config.init_from=runs/beit3

  Emoji found by their English names and by lists of their keywords, and the reverse; English names
  as captions; questions and statements that are generated from groups and keywords
  (docs/vision_language.md). From scratch set optimizer.layer_decay=1. Judged by the emoji that are
  held out. All targets were set before the first run.

  retrieval_tiny: recall at 10 of at least three times chance, which is 6.4 % of 157 emoji, both
  ways. Target: an image recall of 19.2 %, and as much of texts. Reached: 33.1 %, and 26.8 % of
  texts, in 2 min 5 s of training.
  captioning_tiny: more than any caption has that is the same for all images, chosen on the training
  names: 6.9 % keyword F1 (five common keywords) and a chrF of 14.8 (one of the names).
  Target: 8 % keyword F1, and a chrF of 16. These are not the first ones, and were set anew before
  any run: they were of the commonest name, with 3.5 % and 9.4; as all names differ, that is only
  the first of the file, and captions that see no image reached both. Came out: 7.5 % (beside other
  images 1.0 %), more than any constant and short of the target, and a chrF of 13.5, more than the
  commonest name's and less than the best name's; 18 min 26 s beside other work. 600 steps at half
  the rate had 5.4 % and 9.9.
  vqa_tiny: more than the majority answer of each type of question, 0.46, and than the commonest
  answer of the type and of the image's subgroup, 0.55, which no question is read for.
  Target: an accuracy of 0.55. Reached: 0.711 (0.774 of the groups, 0.686 of the keywords, 0.484 of
  what it is, where the subgroup tells 0.938), 32 min 58 s beside other work; after 1,000 of the
  3,000 steps it was 0.660. Of 392 of the 5,828 questions the end is cut off, mostly the question
  mark.
  reasoning_tiny: more than one half, which either answer scores. Target: 0.6.
  Not yet trained here.

retrieval_base, captioning_base, vqa_base, reasoning_base, retrieval_large, captioning_large,
vqa_large, reasoning_large
  Fine-tuning with the hyper-parameters of the released code (beit3/get_started): AdamW with epsilon
  1e-8, cosine to 1e-6, no clipping, crops of at least half of an image, flips.

  | | COCO retrieval | COCO captioning | VQAv2 | NLVR2 |
  |-|-|-|-|-|
  | learning rate, base (large) | 2e-4 (5e-5) | 4e-5 (8e-6) | 3e-5 (2e-5) | 7e-4 (3e-4) |
  | batch, epochs, warm-up | 3072, 15, 3 | 256, 10, 1 | 128, 10, 1 | 256, 20, 5 |
  | layer decay, base (large) | 0.65 (0.85) | 1 | 1; head 20 times | 0.65 (0.85) |
  | drop path | 0.2 | 0.1 | 0.1 (0.15) | 0.2 |
  | weight decay, pixels | 0.05, 384 | 0.05, 480 | 0.01, 480 | 0.2, 224 |

  Captioning and VQAv2 with RandAugment (two operations of strength 7 of BEiT-3's ten), VQAv2 with
  AdamW (0.9, 0.98), the others with (0.9, 0.999); captions of 32 tokens, of which 70 % are hidden,
  smoothed by 0.1; other texts of 64.

  python -m magneto_jax.train --config=configs/beit3.py:retrieval_base --workdir=runs/retrieval \\
    --config.init_from=runs/beit3

  VQAv2 and NLVR2 are read from JSONL of one's own (docs/vision_language.md), COCO from TFDS:
  retrieval and captioning count an epoch as the 566,747 captions of Karpathy's training part, to
  which train_split and train_files are to be set (TFDS's `train` alone has 414,113), VQAv2's as the
  443,757 training questions and the 214,354 of validation, NLVR2's as 86,373 statements.
  Evaluations see all of an image, squeezed into a square (data.eval_crop=0).
  Differs: the last batch of an epoch is not dropped, as batches go on over epochs; warm-up starts
  from 0 and not from 1e-6; and captioning leaves no costly tokens out. Not yet trained here.
"""

from magneto_jax.config import config_of_variant, default_config


def tiny(config):
  """Some twenty minutes on two CPU cores."""
  config.task = "masked_data"
  config.steps = 4000
  config.batch_size = 32
  config.eval_every = config.checkpoint_every = 500
  config.log_every = 25
  config.model.layers = 4
  config.model.width = 96
  config.model.positions = "learned"
  config.model.image_size = 32
  config.model.patch_size = 8
  config.model.image_vocab_size = 128
  config.data.name = "embedded/emoji/en+de"
  config.data.keywords = True
  config.data.vocab_size = 1024
  config.data.seq_length = 24
  config.data.too_long = "truncate"
  config.data.mask_rate = 0.4
  config.data.mask_block = 2
  config.data.augment.crop_scale = 0.6
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 100
  config.optimizer.end_factor = 0.01
  config.optimizer.weight_decay = 0.05
  config.optimizer.clip_norm = 3.0


def _paper(config):
  """What the paper's table 11 says, and the data."""
  config.task = "masked_data"
  config.steps = 1_000_000
  config.batch_size = 2048
  config.cast_weights = True
  config.eval_every = config.checkpoint_every = 5000
  config.log_every = 100
  config.vocab_chunk = 8192
  config.model.positions = "learned"
  config.model.image_size = 224
  config.model.patch_size = 16
  config.model.image_vocab_size = 8192
  config.model.drop_path = 0.1
  config.model.dtype = "bfloat16"
  config.model.remat = "full"
  config.data.name = "coco_captions/2014"
  config.data.text_key = "captions/text"
  config.data.validation_split = "val"
  config.data.image_source = "imagenet2012"
  config.data.vocab_size = 63_999  # The mask is the 64,000th.
  config.data.seq_length = 64
  config.data.too_long = "truncate"
  config.data.mask_rate = 0.4
  config.data.augment.crop_scale = 0.5
  config.data.augment.flip = 0.5
  config.data.augment.color_jitter = 0.4
  config.optimizer.learning_rate = 1e-3
  config.optimizer.eps = 1e-6
  config.optimizer.weight_decay = 0.05
  config.optimizer.clip_norm = 3.0
  config.optimizer.warmup_steps = 10_000


def base(config):
  """12 layers of width 768."""
  _paper(config)
  config.model.layers = 12
  config.model.width = 768
  config.model.heads = 12
  config.model.ffn_width = 3072


def large(config):
  """24 layers of width 1024."""
  _paper(config)
  config.model.layers = 24
  config.model.width = 1024
  config.model.heads = 16
  config.model.ffn_width = 4096
  config.mesh.fsdp = 16


def giant(config):
  """40 layers of width 1408, shared attention, three fusion layers."""
  _paper(config)
  config.model.layers = 40
  config.model.width = 1408
  config.model.ffn_width = 6144
  config.model.heads = 16
  config.model.patch_size = 14
  config.model.shared_attention = True
  config.model.fusion_layers = 3
  config.mesh.fsdp = 64


def magneto(config):
  """24 layers of width 544."""
  _paper(config)
  config.steps = 300_000
  config.batch_size = 4096
  config.model.layers = 24
  config.model.width = 544
  config.model.ffn_width = 2176
  config.model.heads = 8
  config.optimizer.learning_rate = 2e-3


# ---------------------------------------------------------------------------------------------
# What it is for
# ---------------------------------------------------------------------------------------------


def _tuned(config, task: str, steps: int):
  """What the small downstream runs share: sizes of `tiny`, with whose encoder they may start."""
  tiny(config)
  defaults = default_config()
  config.task = task
  config.steps = steps
  config.batch_size = 64
  config.eval_every = config.checkpoint_every = steps // 6
  # Of no task but the first.
  config.model.image_vocab_size = defaults.model.image_vocab_size
  config.data.mask_rate = defaults.data.mask_rate
  config.data.mask_block = defaults.data.mask_block
  config.data.keywords = False
  config.data.name = "embedded/emoji/en"
  config.data.augment.flip = 0.5
  config.data.augment.color_jitter = 0.2
  config.model.dropout = 0.1
  config.model.drop_path = 0.1
  config.ema = 0.99
  config.optimizer.learning_rate = 1e-3
  config.optimizer.layer_decay = 0.8


def retrieval_tiny(config):
  """Emoji by their names and keywords, and the reverse."""
  _tuned(config, "image_text_retrieval", 600)
  config.data.keywords = True


def captioning_tiny(config):
  """Names of emoji."""
  _tuned(config, "image_captioning", 2000)
  config.optimizer.learning_rate = 2e-3
  config.data.mask_rate = 0.7
  config.label_smoothing = 0.1
  _searched(config)


def vqa_tiny(config):
  """Questions on emoji that are generated."""
  _tuned(config, "visual_question_answering", 3000)
  config.optimizer.learning_rate = 2e-3
  config.data.vocab_size = 512  # From scratch: questions have few words.


def reasoning_tiny(config):
  """Statements on two emoji that are generated."""
  _tuned(config, "visual_reasoning", 1500)
  config.optimizer.learning_rate = 2e-3
  config.optimizer.layer_decay = 1.0
  config.data.seq_length = 33
  config.data.vocab_size = 400
  config.batch_size = 32


def _searched(config):
  """As BEiT-3 writes captions."""
  config.beam.size = 3
  config.beam.length_penalty = 0.6
  config.beam.penalty = "with_bos"


def _released(config, size, task: str, *, samples: int, batch_size: int, epochs: int, warmup: int):
  """What the released fine-tunings share, on a model of a size."""
  size(config)
  defaults = default_config()
  epoch = round(samples / batch_size)
  config.task = task
  config.steps = epochs * epoch
  config.batch_size = batch_size
  config.eval_every = config.checkpoint_every = epoch
  config.vocab_chunk = 0
  config.model.image_vocab_size = defaults.model.image_vocab_size
  config.data.image_source = ""
  config.data.mask_rate = defaults.data.mask_rate
  config.data.augment.color_jitter = 0.0
  config.data.eval_crop = 0.0
  config.optimizer.eps = 1e-8
  config.optimizer.b2 = 0.999
  config.optimizer.clip_norm = 0.0
  config.optimizer.decay_mask = "beit"
  config.optimizer.warmup_steps = warmup * epoch


def _peak(config, learning_rate: float):
  config.optimizer.learning_rate = learning_rate
  config.optimizer.end_factor = 1e-6 / learning_rate


def _rand_augment(config):
  config.data.augment.rand_augment = 2
  config.data.augment.rand_augment_set = "beit3"
  config.data.augment.rand_augment_magnitude = 7.0
  config.data.augment.rand_augment_std = 0.0


# Captions of COCO's training part after Karpathy; questions of VQAv2; statements of NLVR2.
_COCO, _VQA, _NLVR = 566_747, 443_757 + 214_354, 86_373


def _retrieval(config, size, *, learning_rate: float, layer_decay: float):
  """COCO's images by their captions, and the reverse."""
  _released(
    config, size, "image_text_retrieval", samples=_COCO, batch_size=3072, epochs=15, warmup=3
  )
  _peak(config, learning_rate)
  config.model.image_size = 384
  config.model.drop_path = 0.2
  config.optimizer.layer_decay = layer_decay


def _captioning(config, size, *, learning_rate: float):
  """Captions of COCO."""
  _released(config, size, "image_captioning", samples=_COCO, batch_size=256, epochs=10, warmup=1)
  _peak(config, learning_rate)
  _rand_augment(config)
  _searched(config)
  config.label_smoothing = 0.1
  config.model.image_size = 480
  config.data.seq_length = 32
  config.data.mask_rate = 0.7


def _own_lines(config):
  """JSONL of one's own in place of COCO."""
  defaults = default_config()
  config.data.name = "pairs_jsonl"
  config.data.text_key = defaults.data.text_key
  config.data.validation_split = defaults.data.validation_split


def _vqa(config, size, *, learning_rate: float, drop_path: float):
  """VQAv2, from JSONL of one's own."""
  _released(
    config, size, "visual_question_answering", samples=_VQA, batch_size=128, epochs=10, warmup=1
  )
  _peak(config, learning_rate)
  _rand_augment(config)
  config.model.image_size = 480
  config.model.drop_path = drop_path
  _own_lines(config)
  config.optimizer.b2 = 0.98
  config.optimizer.weight_decay = 0.01
  config.optimizer.head_rate = 20.0


def _reasoning(config, size, *, learning_rate: float, layer_decay: float):
  """NLVR2, from JSONL of one's own."""
  _released(config, size, "visual_reasoning", samples=_NLVR, batch_size=256, epochs=20, warmup=5)
  _peak(config, learning_rate)
  config.model.drop_path = 0.2
  _own_lines(config)
  config.optimizer.weight_decay = 0.2
  config.optimizer.layer_decay = layer_decay


VARIANTS = {
  "tiny": tiny,
  "base": base,
  "large": large,
  "giant": giant,
  "magneto": magneto,
  "retrieval_tiny": retrieval_tiny,
  "captioning_tiny": captioning_tiny,
  "vqa_tiny": vqa_tiny,
  "reasoning_tiny": reasoning_tiny,
  "retrieval_base": lambda c: _retrieval(c, base, learning_rate=2e-4, layer_decay=0.65),
  "retrieval_large": lambda c: _retrieval(c, large, learning_rate=5e-5, layer_decay=0.85),
  "captioning_base": lambda c: _captioning(c, base, learning_rate=4e-5),
  "captioning_large": lambda c: _captioning(c, large, learning_rate=8e-6),
  "vqa_base": lambda c: _vqa(c, base, learning_rate=3e-5, drop_path=0.1),
  "vqa_large": lambda c: _vqa(c, large, learning_rate=2e-5, drop_path=0.15),
  "reasoning_base": lambda c: _reasoning(c, base, learning_rate=7e-4, layer_decay=0.65),
  "reasoning_large": lambda c: _reasoning(c, large, learning_rate=3e-4, layer_decay=0.85),
}


def get_config(variant: str = "tiny"):
  """The config of a variant: one of VARIANTS."""
  return config_of_variant(VARIANTS, variant, "configs/beit3.py")
