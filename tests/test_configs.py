"""The shipped configs against the papers they name."""

import dataclasses
import math

import jax
import pytest

from configs import (
  beit,
  beit3,
  bert,
  gpt,
  image_tokenizer,
  speech,
  text_classification,
  translation,
  vit,
)
from magneto_jax import sharding
from magneto_jax.config import ConfigError, flatten, from_config_dict
from magneto_jax.tasks import TASKS, masked_image

# Foundation Transformers (arXiv 2210.06423), section 4.1 and table 9.
TABLE_9 = {
  "recipe": "magneto",
  "batch_size": 256,
  "data.seq_length": 2048,
  "model.width": 1024,
  "model.ffn_width": 3072,
  "model.heads": 16,
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.98,
  "optimizer.clip_norm": 0.0,
  "optimizer.weight_decay": 0.01,
  "optimizer.schedule": "polynomial",
  "optimizer.power": 1.0,
  "optimizer.warmup_steps": 750,
  "optimizer.decay_steps": 0,
  "optimizer.end_factor": 0.0,
}


@pytest.mark.parametrize(
  "layers, learning_rate, steps, dropout",
  [(24, 1e-3, 500_000, 0.0), (48, 1.2e-3, 250_000, 0.1), (72, 1.2e-3, 250_000, 0.1)],
)
def test_magneto_is_as_in_table_9(layers, learning_rate, steps, dropout):
  expected = TABLE_9 | {
    "model.layers": layers,
    "model.dropout": dropout,
    "optimizer.learning_rate": learning_rate,
    "steps": steps,
  }
  config = flatten(from_config_dict(gpt.get_config(f"magneto_{layers}")))
  assert {name: config[name] for name in expected} == expected


# The same paper, section 4.2 and table 10.
TABLE_10 = {
  "recipe": "magneto",
  "steps": 125_000,
  "batch_size": 2048,
  "data.seq_length": 512,
  "data.mask_rate": 0.15,
  "model.layers": 12,
  "model.width": 768,
  "model.ffn_width": 3072,
  "model.heads": 12,
  "model.dropout": 0.1,
  "optimizer.learning_rate": 3e-3,
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.98,
  "optimizer.clip_norm": 2.0,
  "optimizer.weight_decay": 0.0,
  "optimizer.schedule": "polynomial",
  "optimizer.power": 1.0,
  "optimizer.warmup_steps": 10_000,
  "optimizer.decay_steps": 0,
  "optimizer.end_factor": 0.0,
}


def test_the_masked_model_is_as_in_table_10():
  """And its table of tokens, the mask's among them, is one that a mesh can cut."""
  config = from_config_dict(bert.get_config("base"))
  flat = flatten(config)
  assert {name: flat[name] for name in TABLE_10} == TABLE_10
  assert TASKS[config.task].planned_facts(config)["vocab_size"] == 64_000


def test_normformers_masked_model_has_the_layers_of_its_code():
  """Scales of both residuals, none of the heads."""
  config = from_config_dict(bert.get_config("normformer"))
  task = TASKS[config.task]
  (layer,) = set(task.build_model(config, task.planned_facts(config)).encoder.recipe.layers)
  assert layer.self_attention.head_scale is None
  assert layer.self_attention.skip is not None and layer.ffn.skip is not None


FILES = {
  "gpt": gpt,
  "bert": bert,
  "text_classification": text_classification,
  "translation": translation,
  "beit3": beit3,
  "image_tokenizer": image_tokenizer,
  "vit": vit,
  "beit": beit,
  "speech": speech,
}
VARIANTS = [(file, variant) for file, module in FILES.items() for variant in module.VARIANTS]


@pytest.mark.parametrize("file, variant", VARIANTS)
def test_every_variant_is_a_config(file, variant):
  from_config_dict(FILES[file].get_config(variant))
  assert f"\n{variant}" in FILES[file].__doc__ or f", {variant}" in FILES[file].__doc__


# BEiT v2 (arXiv 2208.06366), its code's TOKENIZER.md: the decoder of three layers.
VQ_KD = {
  "batch_size": 512,
  "steps": 100 * (1_281_167 // 512),
  "model.encoder_layers": 12,
  "model.layers": 3,
  "model.width": 768,
  "model.ffn_width": 3072,
  "model.heads": 12,
  "model.image_size": 224,
  "model.patch_size": 16,
  "model.image_vocab_size": 8192,
  "model.codebook_width": 32,
  "model.codebook_decay": 0.99,
  "model.codebook_redraw": 0.0,
  "optimizer.learning_rate": 2e-4,
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.99,
  "optimizer.weight_decay": 1e-4,
  "optimizer.schedule": "cosine",
  "optimizer.warmup_steps": 10 * (1_281_167 // 512),
  "optimizer.end_factor": 0.05,
  "data.augment.crop_scale": 0.08,
  "data.augment.flip": 0.5,
  "data.augment.color_jitter": 0.0,
  "data.normalization": "half",
}


def test_the_image_tokenizer_is_trained_as_beit_2_trains_its_own():
  config = flatten(from_config_dict(image_tokenizer.get_config("base")))
  assert {name: config[name] for name in VQ_KD} == VQ_KD


# RoBERTa's fine-tuning (arXiv 1907.11692, its code's configs): batch, rate, updates, warm-up.
ROBERTA = {
  "mnli": (32, 1e-5, 123_873, 7_432),
  "qnli": (32, 1e-5, 33_112, 1_986),
  "qqp": (32, 1e-5, 113_272, 28_318),
  "rte": (16, 2e-5, 2_036, 122),
  "sst2": (32, 1e-5, 20_935, 1_256),
  "mrpc": (16, 1e-5, 2_296, 137),
  "cola": (16, 1e-5, 5_336, 320),
  "stsb": (16, 2e-5, 3_598, 214),
}


@pytest.mark.parametrize("name", ROBERTA)
def test_glue_is_tuned_as_the_papers_do(name):
  """RoBERTa's figures; of Magneto's (arXiv 2210.06423, table 11) those that one run can have."""
  batch_size, learning_rate, steps, warmup_steps = ROBERTA[name]
  expected = {
    **{"batch_size": batch_size, "optimizer.learning_rate": learning_rate, "steps": steps},
    **{"optimizer.warmup_steps": warmup_steps, "optimizer.b2": 0.98, "optimizer.eps": 1e-6},
    **{"optimizer.weight_decay": 0.1, "optimizer.clip_norm": 0.0, "optimizer.end_factor": 0.0},
    **{"model.dropout": 0.1, "model.attention_dropout": 0.1, "data.name": f"glue/{name}"},
    "data.label_scale": 5.0 if name == "stsb" else 1.0,
  }
  config = flatten(from_config_dict(text_classification.get_config(name)))
  assert {field: config[field] for field in expected} == expected
  # Ten epochs, but for what the last batch of each leaves.
  assert config["steps"] / config["eval_every"] == pytest.approx(10, abs=0.15) or name == "rte"
  if name != "rte":
    config = flatten(from_config_dict(text_classification.get_config(f"magneto_{name}")))
    assert 1e-5 <= config["optimizer.learning_rate"] <= 4e-4
    assert config["steps"] // config["eval_every"] == (5 if name in ("cola", "mrpc", "stsb") else 3)
    assert config["optimizer.warmup_steps"] == config["steps"] // 10
    assert (config["batch_size"], config["optimizer.weight_decay"]) == (32, 0.01)


# DeiT (arXiv 2012.12877), table 9.
DEIT = {
  "batch_size": 1024,
  "label_smoothing": 0.1,
  "model.layers": 12,
  "model.width": 768,
  "model.ffn_width": 3072,
  "model.heads": 12,
  "model.dropout": 0.0,
  "model.drop_path": 0.1,
  "optimizer.learning_rate": 1e-3,
  "optimizer.weight_decay": 0.05,
  "optimizer.schedule": "cosine",
  "optimizer.clip_norm": 0.0,
  "data.augment.rand_augment": 2,
  "data.augment.rand_augment_magnitude": 9.0,
  "data.augment.rand_augment_std": 0.5,
  "data.augment.mixup": 0.8,
  "data.augment.cutmix": 1.0,
  "data.augment.erase": 0.25,
  "data.augment.crop_scale": 0.08,
  "data.augment.flip": 0.5,
  "data.eval_crop": 0.875,
  "data.normalization": "imagenet",
  "optimizer.b2": 0.999,
  "optimizer.decay_mask": "beit",
  "optimizer.end_factor": 0.01,
}


@pytest.mark.parametrize("variant", ("imagenet_base", "imagenet_base_deepscalelm"))
def test_a_vit_is_trained_as_deit_is(variant):
  """300 epochs, five of them to warm up; 86 million parameters, the head's among them."""
  config = from_config_dict(vit.get_config(variant))
  flat = flatten(config)
  assert {name: flat[name] for name in DEIT} == DEIT
  epoch = 1_281_167 / 1024
  assert config.steps / epoch == pytest.approx(300, rel=1e-3)
  assert config.optimizer.warmup_steps / epoch == pytest.approx(5, rel=1e-3)
  task = TASKS[config.task]
  model = task.build_model(config, task.planned_facts(config))
  params = jax.eval_shape(model.init, jax.random.key(0), *task.dummy_inputs(config))["params"]
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count / 1e6 == pytest.approx(86.6, abs=0.1)


# Made for 256 chips: parameters in billions, tokens of a step in thousands, and the papers' sizes.
# GPT-3 (arXiv 2005.14165), table 2.1; DeepNet (arXiv 2203.00555), whose count of
# the second is 3.2 with a vocabulary that it does not state; BEiT-3 (arXiv 2208.10442), table 11.
AT_SCALE = {
  ("gpt", "gpt_1b3"): (1.3, 1048, {"model.width": 2048, "model.layers": 24}),
  ("gpt", "gpt_6b7"): (6.7, 2097, {"model.width": 4096, "model.layers": 32}),
  ("translation", "deepnet_500_500"): (
    3.7,
    524,
    {"model.width": 512, "model.ffn_width": 2048, "model.heads": 8, "model.encoder_layers": 500},
  ),
  ("translation", "deepnet_100_100"): (
    3.1,
    524,
    {"model.width": 1024, "model.ffn_width": 4096, "model.heads": 16, "model.layers": 100},
  ),
  ("beit3", "giant"): (
    1.9,
    131,
    {"model.width": 1408, "model.ffn_width": 6144, "model.heads": 16, "model.layers": 40},
  ),
  ("beit3", "large"): (
    0.7,
    131,
    {"model.width": 1024, "model.ffn_width": 4096, "model.heads": 16, "model.layers": 24},
  ),
}


# DeepNet's base size and table 7; Foundation Transformers, section 4.3.
DEEP = {
  "task": "translation",
  "model.width": 512,
  "model.ffn_width": 2048,
  "model.heads": 8,
  "label_smoothing": 0.1,
  "optimizer.learning_rate": 5e-4,
  "optimizer.schedule": "inverse_sqrt",
  "optimizer.warmup_steps": 4000,
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.98,
  "optimizer.clip_norm": 0.0,
  "optimizer.weight_decay": 0.0,
}


@pytest.mark.parametrize(
  "variant, recipe, layers, tokens",
  [
    ("wmt17_6_6", "deepnet", 6, 64 * 4096),
    ("wmt17_18_18", "deepnet", 18, 64 * 4096),
    ("wmt17_100_100", "deepnet", 100, 64 * 4096),
    ("opus100_18_18", "magneto", 18, 128 * 4096),
    ("opus100_100_100", "deepnet", 100, 128 * 4096),
    ("deepnet_500_500", "deepnet", 500, 128 * 4096),
  ],
)
def test_translation_is_as_in_the_papers(variant, recipe, layers, tokens):
  config = flatten(from_config_dict(translation.get_config(variant)))
  expected = DEEP | {
    "recipe": recipe,
    "model.layers": layers,
    "model.encoder_layers": layers,
  }
  assert {name: config[name] for name in expected} == expected
  assert config["batch_size"] * config["data.seq_length"] == tokens


@pytest.mark.parametrize("file, variant", AT_SCALE)
def test_a_config_at_scale_has_its_papers_sizes_and_can_be_cut_for_256_chips(file, variant):
  """By the shapes of its parameters, without making any; no chip holds a whole matrix."""
  billions, thousands, sizes = AT_SCALE[file, variant]
  config = from_config_dict(FILES[file].get_config(variant))
  flat = flatten(config)
  assert {name: flat[name] for name in sizes} == sizes
  assert config.batch_size * config.data.seq_length // 1000 == thousands
  task = TASKS[config.task]
  model = task.build_model(config, task.planned_facts(config))
  params = jax.eval_shape(model.init, jax.random.key(0), *task.dummy_inputs(config))["params"]
  leaves = jax.tree.leaves(params)
  assert sum(leaf.size for leaf in leaves) / 1e9 == pytest.approx(billions, abs=0.05)
  mesh = sharding.resolve(config.mesh.sizes(), 256)
  rows = config.batch_size // config.accumulation
  assert rows % (mesh["slice"] * mesh["data"] * mesh["fsdp"]) == 0
  axes = (jax.sharding.AxisType.Auto,) * len(mesh)
  mesh = jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh), axis_types=axes)
  places = sharding.parameter_shardings(params, mesh)
  held = jax.tree_util.tree_map_with_path(
    lambda path, leaf, place: (
      math.prod(place.shard_shape(leaf.shape)) * (path[-1].key in ("kernel", "embedding"))
    ),
    params,
    places,
  )
  each = sum(leaf.size for leaf in leaves) / (mesh.size / mesh.shape["data"])
  assert sum(jax.tree.leaves(held)) < 1.1 * each


LARGE = {"model.layers": 24, "model.width": 1024, "model.heads": 16, "model.ffn_width": 4096}
# BEiT-3 (arXiv 2208.10442), table 11 and section 2.2.
BEIT_3 = {
  "task": "masked_data",
  "recipe": "magneto",
  "steps": 1_000_000,
  "batch_size": 2048,
  **{f"data.composition.{kind}": 1 for kind in ("pairs", "images", "texts")},
  "data.mask_rate": 0.4,
  "data.text_mask_rate": 0.15,
  "data.pair_text_mask_rate": 0.5,
  "data.augment.flip": 0.5,
  "data.augment.color_jitter": 0.4,
  "model.image_size": 224,
  "model.patch_size": 16,
  "model.image_vocab_size": 8192,
  "model.shared_attention": False,
  "model.fusion_layers": 0,
  "model.drop_path": 0.1,
  "model.dropout": 0.0,
  "optimizer.learning_rate": 1e-3,
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.98,
  "optimizer.eps": 1e-6,
  "optimizer.weight_decay": 0.05,
  "optimizer.clip_norm": 3.0,
  "optimizer.schedule": "cosine",
  "optimizer.warmup_steps": 10_000,
}
# Foundation Transformers, section 4.7.
MAGNETO = {"batch_size": 4096, "steps": 300_000, "optimizer.learning_rate": 2e-3}
MAGNETO |= {"model.layers": 24, "model.width": 544, "model.ffn_width": 2176}


@pytest.mark.parametrize(
  "variant, expected",
  [
    ("base", {"model.layers": 12, "model.width": 768, "model.heads": 12, "model.ffn_width": 3072}),
    ("large", LARGE),
    ("giant", {"model.patch_size": 14, "model.shared_attention": True, "model.fusion_layers": 3}),
    ("magneto", MAGNETO),
  ],
)
def test_beit_3_is_pre_trained_as_in_the_papers(variant, expected):
  """And the table of tokens, the mask's among them, is one that a mesh can cut."""
  typed = from_config_dict(beit3.get_config(variant))
  config, expected = flatten(typed), BEIT_3 | expected
  assert {name: config[name] for name in expected} == expected
  assert TASKS[typed.task].planned_facts(typed)["vocab_size"] == 64_000


# BEiT-3's released code (beit3/get_started): epochs in batches of its data.
TUNED = {
  "optimizer.eps": 1e-8,
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.999,
  "optimizer.clip_norm": 0.0,
  "optimizer.weight_decay": 0.05,
  "optimizer.decay_mask": "beit",
  "optimizer.schedule": "cosine",
  "optimizer.layer_decay": 1.0,
  "optimizer.head_rate": 1.0,
  "data.augment.crop_scale": 0.5,
  "data.augment.flip": 0.5,
  "data.augment.color_jitter": 0.0,
  "data.augment.rand_augment": 0,
  "data.eval_crop": 0.0,
  "data.seq_length": 64,
  "label_smoothing": 0.0,
}
RANDOM = {"data.augment.rand_augment": 2, "data.augment.rand_augment_magnitude": 7.0}
RANDOM |= {"data.augment.rand_augment_set": "beit3", "data.augment.rand_augment_std": 0.0}
# (samples of an epoch, batch, epochs, warm-up, pixels), what differs, and by size the peak and what
# else goes by it.
TUNINGS = {
  "retrieval": (
    (566_747, 3072, 15, 3, 384),
    {"model.drop_path": 0.2},
    {
      "base": (2e-4, {"optimizer.layer_decay": 0.65}),
      "large": (5e-5, {"optimizer.layer_decay": 0.85}),
    },
  ),
  "captioning": (
    (566_747, 256, 10, 1, 480),
    RANDOM
    | {"model.drop_path": 0.1, "label_smoothing": 0.1, "data.mask_rate": 0.7}
    | {"data.seq_length": 32, "beam.size": 3, "beam.length_penalty": 0.6}
    | {"beam.penalty": "with_bos"},
    {"base": (4e-5, {}), "large": (8e-6, {})},
  ),
  "vqa": (
    (658_111, 128, 10, 1, 480),
    RANDOM | {"optimizer.b2": 0.98, "optimizer.weight_decay": 0.01, "optimizer.head_rate": 20.0},
    {"base": (3e-5, {"model.drop_path": 0.1}), "large": (2e-5, {"model.drop_path": 0.15})},
  ),
  "reasoning": (
    (86_373, 256, 20, 5, 224),
    {"model.drop_path": 0.2, "optimizer.weight_decay": 0.2},
    {
      "base": (7e-4, {"optimizer.layer_decay": 0.65}),
      "large": (3e-4, {"optimizer.layer_decay": 0.85}),
    },
  ),
}


@pytest.mark.parametrize("size", ("base", "large"))
@pytest.mark.parametrize("name", TUNINGS)
def test_beit_3_is_fine_tuned_as_the_released_models_are(name, size):
  """And has the encoder's sizes of its pre-training, whose texts are as long at least."""
  (samples, batch, epochs, warmup, pixels), own, sizes = TUNINGS[name]
  peak, of_size = sizes[size]
  typed, before = (
    from_config_dict(beit3.get_config(variant)) for variant in (f"{name}_{size}", size)
  )
  config, expected = flatten(typed), TUNED | own | of_size
  assert {field: config[field] for field in expected} == expected
  assert config["optimizer.learning_rate"] == peak and config["model.image_size"] == pixels
  assert peak * config["optimizer.end_factor"] == pytest.approx(1e-6)
  epoch = samples / batch
  assert typed.batch_size == batch and typed.steps == pytest.approx(epochs * epoch, rel=3e-3)
  assert typed.optimizer.warmup_steps == pytest.approx(warmup * epoch, rel=3e-3)
  for field in ("layers", "width", "heads", "ffn_width", "patch_size", "shared_attention"):
    assert getattr(typed.model, field) == getattr(before.model, field)
  assert typed.data.seq_length <= before.data.seq_length
  assert typed.data.vocab_size == before.data.vocab_size


@pytest.mark.parametrize(
  "name", ("retrieval_tiny", "captioning_tiny", "vqa_tiny", "reasoning_tiny")
)
def test_the_small_tasks_have_the_encoder_of_the_small_pre_training(name):
  one, other = (flatten(from_config_dict(beit3.get_config(v))) for v in (name, "tiny"))
  differing = {n for n in one if n.startswith("model.") and one[n] != other[n]}
  assert differing == {"model.image_vocab_size", "model.dropout", "model.drop_path"}
  for field in ("data.tokenizer", "data.normalization"):
    assert one[field] == other[field]
  # Statements are longer than the texts that there are positions for: they are learnt from scratch.
  longer = one["data.seq_length"] > other["data.seq_length"]
  assert longer == (name == "reasoning_tiny")
  assert one["optimizer.layer_decay"] == (1.0 if longer else 0.8)


@pytest.mark.parametrize(
  "name", ("retrieval_tiny", "captioning_tiny", "vqa_tiny", "reasoning_tiny")
)
def test_the_small_tasks_texts_have_a_tokenizer_and_fit(name, tmp_path):
  """From scratch; none of a caption or a question is cut off."""
  config = from_config_dict(beit3.get_config(name))
  data = TASKS[config.task].load_data(config, tmp_path)
  cut = sum(data.too_long) / (len(data.train) + len(data.validation))
  assert cut < (0.02 if name == "retrieval_tiny" else 1e-9)


def test_the_small_beit_3_reads_what_the_small_tokenizer_does():
  one, other = (
    flatten(from_config_dict(config))
    for config in (beit3.get_config("tiny"), image_tokenizer.get_config("emoji"))
  )
  for name in ("model.image_size", "model.patch_size", "model.image_vocab_size"):
    assert one[name] == other[name]
  assert one["data.normalization"] == other["data.normalization"]


def test_no_other_variant():
  with pytest.raises(ConfigError, match="has no 'huge', only tiny, magneto_24"):
    gpt.get_config("huge")


@pytest.mark.parametrize(
  "variant, start", [("tiny", "tiny"), ("mrpc", "base"), ("magneto_cola", "base")]
)
def test_a_classifier_has_the_sizes_of_the_model_that_it_starts_with(variant, start):
  ours, theirs = (
    from_config_dict(module.get_config(name))
    for module, name in ((text_classification, variant), (bert, start))
  )
  for name in ("layers", "width", "ffn_width", "heads", "norm", "activation", "positions"):
    assert getattr(ours.model, name) == getattr(theirs.model, name), name
  assert (ours.recipe, ours.data.vocab_size) == (theirs.recipe, theirs.data.vocab_size)
  assert ours.data.seq_length <= theirs.data.seq_length


# BEiT v2 (arXiv 2208.06366), its code's PRETRAINING.md, 300 epochs; 75 of 196 patches.
BEIT_2 = {
  "recipe": "magneto",
  "batch_size": 2048,
  "steps": 300 * (1_281_167 // 2048),
  "model.ffn_width": 3072,
  "model.image_size": 224,
  "model.patch_size": 16,
  "model.image_vocab_size": 8192,
  "model.relative_patches": True,
  "model.positions": "none",
  "model.drop_path": 0.0,
  "data.mask_block": 16,
  "data.augment.crop_scale": 0.2,
  "data.augment.flip": 0.5,
  "data.augment.color_jitter": 0.4,
  "data.normalization": "half",
  "optimizer.learning_rate": 1.5e-3,
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.98,
  "optimizer.eps": 1e-8,
  "optimizer.weight_decay": 0.05,
  "optimizer.decay_mask": "beit",
  "optimizer.clip_norm": 3.0,
  "optimizer.schedule": "cosine",
  "optimizer.warmup_steps": 10 * (1_281_167 // 2048),
}
# BEiT (arXiv 2106.08254), table 12.
BEIT_1 = {
  "recipe": "layer_scale",
  "steps": 800 * (1_281_167 // 2048),
  "model.drop_path": 0.1,
  "data.augment.crop_scale": 0.08,
  "optimizer.b2": 0.999,
}
# BEiT v2's fine-tuning after 300 epochs; BEiT's mixing and erasing.
FINE = {
  "task": "image_classification",
  "batch_size": 1024,
  "steps": 100 * (1_281_167 // 1024),
  "label_smoothing": 0.1,
  "model.drop_path": 0.1,
  "model.pooling": "mean",
  "data.augment.mixup": 0.8,
  "data.augment.cutmix": 1.0,
  "data.augment.mix_rate": 1.0,
  "data.augment.cutmix_share": 0.5,
  "data.augment.rand_augment": 2,
  "data.augment.rand_augment_magnitude": 9.0,
  "data.augment.rand_augment_std": 0.5,
  "data.augment.erase": 0.25,
  "data.eval_crop": 0.875,
  "data.augment.crop_scale": 0.08,
  "data.augment.flip": 0.5,
  "model.positions": "none",
  "model.relative_patches": True,
  "optimizer.decay_mask": "beit",
  "optimizer.learning_rate": 5e-4,
  "optimizer.b2": 0.999,
  "optimizer.weight_decay": 0.05,
  "optimizer.layer_decay": 0.65,
  "optimizer.clip_norm": 0.0,
  "optimizer.warmup_steps": 20 * (1_281_167 // 1024),
}
FINE_LARGE = LARGE | {
  "steps": 50 * (1_281_167 // 1024),
  "model.drop_path": 0.2,
  "optimizer.layer_decay": 0.8,
  "optimizer.warmup_steps": 5 * (1_281_167 // 1024),
}


@pytest.mark.parametrize(
  "variant, expected, last",
  [
    ("base", BEIT_2, 1e-5),
    ("large", BEIT_2 | LARGE, 1e-5),
    ("beit_base", BEIT_2 | BEIT_1, 1e-5),
    ("finetune_base", FINE, 1e-6),
    ("finetune_large", FINE | FINE_LARGE, 1e-6),
  ],
)
def test_beit_is_as_in_the_papers(variant, expected, last):
  typed = from_config_dict(beit.get_config(variant))
  config = flatten(typed)
  assert {name: config[name] for name in expected} == expected
  assert typed.optimizer.learning_rate * typed.optimizer.end_factor == pytest.approx(last)
  if typed.task == "masked_image":
    masks = masked_image.masks(typed)
    assert (masks.grid, masks.count) == ((14, 14), 75)


def test_the_small_beit_reads_what_the_small_tokenizer_does():
  """And is fine-tuned with the encoder that it has."""
  one, other, fine = (
    flatten(from_config_dict(config))
    for config in (
      beit.get_config("tiny"),
      image_tokenizer.get_config("mnist"),
      beit.get_config("finetune_tiny"),
    )
  )
  for name in ("model.image_size", "model.patch_size", "model.image_vocab_size", "data.name"):
    assert one[name] == other[name]
  differing = {n for n in one if n.startswith("model.") and one[n] != fine[n]}
  assert differing == {"model.image_vocab_size", "model.drop_path"}


# Foundation Transformers (arXiv 2210.06423), section 4.6, and SpecAugment on Large Scale Datasets
# (arXiv 1912.05533), section 3.
HEARING = {
  "recipe": "magneto",
  "model.width": 512,
  "model.ffn_width": 2048,
  "model.speech_head": "transducer",
  "model.front_end": "vgg",
  "model.predictor": "lstm",
  "model.predictor_layers": 2,
  "model.mel_bins": 80,
  "data.vocab_size": 5000,
  "data.sample_rate": 16_000,
  "spec_augment.frequency_masks": 2,
  "spec_augment.frequency_width": 27,
  "spec_augment.time_masks": 20,
  "spec_augment.time_share": 0.04,
  "spec_augment.time_mask_share": 0.04,
}


@pytest.mark.parametrize(("layers", "learning_rate"), [(18, 5e-3), (36, 3e-3)])
def test_magnetos_transducers_are_as_in_the_paper(layers, learning_rate):
  """And 150 epochs of the 281,241 utterances."""
  config = flatten(from_config_dict(speech.get_config(f"magneto_{layers}")))
  expected = HEARING | {"model.layers": layers, "optimizer.learning_rate": learning_rate}
  assert {name: config[name] for name in expected} == expected
  assert config["steps"] * config["batch_size"] == pytest.approx(150 * 281_241, rel=1e-3)


# fairseq's examples/speech_to_text: s2t_transformer_s, and how it is trained.
S2T = {
  "label_smoothing": 0.1,
  "model.encoder_layers": 12,
  "model.layers": 6,
  "model.width": 256,
  "model.ffn_width": 2048,
  "model.heads": 4,
  "model.activation": "relu",
  "model.dropout": 0.1,
  "model.attention_dropout": 0.1,
  "model.activation_dropout": 0.1,
  "model.front_end": "conv",
  "optimizer.schedule": "inverse_sqrt",
  "optimizer.warmup_steps": 10_000,
  "optimizer.clip_norm": 10.0,
}


@pytest.mark.parametrize(
  ("variant", "recipe", "steps", "learning_rate", "masks", "tied"),
  [
    ("fairseq_s", "pre_ln", 300_000, 2e-3, 2, True),
    ("mustc_pretraining", "deepscalelm", 100_000, 1e-3, 1, False),
    ("mustc", "deepscalelm", 100_000, 2e-3, 1, False),
  ],
)
def test_small_encoder_decoders_of_sounds_are_fairseqs(
  variant, recipe, steps, learning_rate, masks, tied
):
  config = flatten(from_config_dict(speech.get_config(variant)))
  own = {"recipe": recipe, "steps": steps, "optimizer.learning_rate": learning_rate}
  own |= {"spec_augment.frequency_masks": masks, "spec_augment.time_masks": masks}
  own |= {"model.tied_embeddings": tied}
  assert {name: config[name] for name in S2T | own} == S2T | own


def test_the_encoder_decoder_of_espnet_is_its():
  """train_asr_transformer_specaug.yaml."""
  config = flatten(from_config_dict(speech.get_config("espnet_transformer")))
  expected = {
    "recipe": "pre_ln",
    "label_smoothing": 0.1,
    "model.encoder_layers": 12,
    "model.layers": 6,
    "model.width": 512,
    "model.ffn_width": 2048,
    "model.heads": 8,
    "model.activation": "relu",
    "model.dropout": 0.1,
    "model.attention_dropout": 0.0,
    "model.activation_dropout": 0.1,
    "model.tied_embeddings": False,
    "model.front_end": "conv2d",
    "model.ctc_weight": 0.3,
    "optimizer.learning_rate": 5e-3,
    "optimizer.schedule": "inverse_sqrt",
    "optimizer.warmup_steps": 25_000,
    "spec_augment.frequency_width": 30,
    "spec_augment.time_width": 40,
  }
  assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize(
  ("recognizer", "translator"), [("pretraining", "translation"), ("mustc_pretraining", "mustc")]
)
def test_a_translator_hears_as_the_recogniser_that_it_starts_with(recognizer, translator):
  """Encoders of the same shapes, of the same sounds."""
  trees = []
  for variant in (recognizer, translator):
    config = from_config_dict(speech.get_config(variant))
    task = TASKS[config.task]
    model = task.build_model(config, {"vocab_size": 99})
    init = jax.eval_shape(model.init, jax.random.key(0), *task.dummy_inputs(config))
    encoder = model.encoder
    heard = encoder.sample_rate, encoder.mel_bins, encoder.subsampling
    trees.append((heard, jax.tree.map(lambda leaf: leaf.shape, init["params"]["encoder"])))
  assert trees[0] == trees[1]


@pytest.mark.parametrize("variant", ["ctc", "pretraining", "translation"])
def test_the_prompts_fit_the_small_models_of_speech(variant, tmp_path):
  """All of them, in all three parts, as a run would otherwise end before its first step."""
  config = from_config_dict(speech.get_config(variant))
  splits = ("validation", "test")
  for split in splits:
    of_split = dataclasses.replace(config.data, validation_split=split)
    given = dataclasses.replace(config, data=of_split)
    data = TASKS[config.task].load_data(given, tmp_path / split, None)
    assert data.too_long == (0, 0)
