"""Image captioning: a text that says what an image shows.

An image and a caption go through the encoder together; the image sees itself, the caption the image
and what lies before (`models.CaptioningBEiT3`). In training some of a caption's tokens are hidden,
anew each time that it is read, and are answered from the image and from what lies before them. The
loss is nats a hidden token. Captions are written token by token, each in place of a mask behind the
last, and are judged by their words (keyword F1), by chrF and by BLEU.

Reference: BEiT-3, arXiv 2208.10442, section 3.1.2, and its released code.
Differs: the released code leaves the costliest fifth of the tokens out after 12,000 steps, and this
does not.
"""

import collections
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from magneto_jax import sharding
from magneto_jax.config import TrainConfig
from magneto_jax.data import baselines as trivial
from magneto_jax.data import captions, scores
from magneto_jax.data.tokenizers import Tokenizer
from magneto_jax.decoding import Captioner
from magneto_jax.models import CaptioningBEiT3
from magneto_jax.reporting import Row
from magneto_jax.tasks import beit3, common, vision_language
from magneto_jax.tasks.task import Batch, Facts, Task, Totals, mean_nats, weighted_sums

# Images whose captions a sample shows.
_SHOWN = 4
# About how many other images a caption is held against.
_TURNS = 16


def load_data(
  config: TrainConfig, directory: str | os.PathLike, expected: Mapping[str, Any] | None = None
) -> captions.CaptionData:
  """Images with their texts, some of whose tokens are hidden."""
  given, rates = vision_language.options(config), config.data
  whole = captions.load_captions(workdir=directory, expected=expected, **given)
  return captions.masked(
    whole, rate=rates.mask_rate, keep=rates.mask_keep, random=rates.mask_random
  )


def facts(data: captions.CaptionData) -> Facts:
  """What the model must know of its data: see `vision_language.facts`, of what is read, with masks.

  token_correlation: sum_k p_k^2 of the frequencies of what is read of the training captions.
  """
  return _with_masks(data.augment.masks, vision_language.frequencies(data))


def planned_facts(config: TrainConfig) -> Facts:
  """Likewise without the data, as if all tokens were as frequent; see `common.planned_facts`."""
  size, rates = common.planned_facts(config)["vocab_size"], config.data
  masks = captions.TextMasks(rates.mask_rate, rates.mask_keep, rates.mask_random, size)
  return _with_masks(masks, np.full(size, 1 / size))


def _with_masks(masks: captions.TextMasks, plain_V: np.ndarray) -> Facts:
  read = masks.frequencies(plain_V)
  return {"vocab_size": len(read), "token_correlation": float(np.sum(read**2))}


def build_model(config: TrainConfig, facts: Facts) -> CaptioningBEiT3:
  """The config's encoder with a head over the texts' vocabulary, whose last token is the mask."""
  return CaptioningBEiT3(
    encoder=beit3.encoder(config, facts),
    mask_id=facts["vocab_size"] - 1,
    **common.scoring(config),
  )


def inputs(batch: Batch) -> tuple[tuple, dict[str, Any]]:
  """The model's arguments: images, captions with hidden tokens, padding, and what was there."""
  keywords = {"mask_BT": batch["mask"], "targets_BT": batch["targets"]}
  return (batch["image"], batch["inputs"]), keywords


def measure(model: CaptioningBEiT3, variables, batch: Batch) -> dict[str, jax.Array]:
  """Sums over the hidden tokens: -log p, their number, and how many of them come first of all."""
  args, kwargs = inputs(batch)
  targets_BT, weights_BT = kwargs.pop("targets_BT"), batch["weights"]
  logits_BTV = model.apply(variables, *args, **kwargs)
  return common.answered(logits_BTV, targets_BT, weights_BT)


def metrics(totals: Totals, data: captions.CaptionData, *, whole: bool) -> dict[str, float]:
  """Nats a hidden token of the validation captions, and the share that the model puts first."""
  values = mean_nats(totals, data, whole=whole)
  return values | {"masked_accuracy": totals["correct"] / totals["weight"]}


# ---------------------------------------------------------------------------------------------
# What it writes
# ---------------------------------------------------------------------------------------------


def captioner(
  config: TrainConfig, model: CaptioningBEiT3, variables, tokenizer: Tokenizer
) -> Captioner:
  """What writes what images show as `config.beam` says, in as many tokens as a text may have."""
  names = ("size", "length_penalty", "penalty", "min_length", "rows")
  search = {name: getattr(config.beam, name) for name in names}
  return Captioner(model, variables, tokenizer, most=config.data.seq_length - 2, **search)


def written(
  config: TrainConfig,
  model: CaptioningBEiT3,
  variables,
  data: captions.CaptionData,
  images: Sequence[int],
) -> list[str]:
  """The best caption of some of the validation images, which are given by their `image_id`."""
  write = captioner(config, model, variables, data.tokenizer)
  see = vision_language.see(config)
  found = []
  # Not all images at once.
  for begin in range(0, len(images), write.rows):
    part = [see(data.rows.pictures[int(i)]["image"]) for i in images[begin : begin + write.rows]]
    found += [best.text for best, *_ in write(part)]
  return found


def with_texts(data: captions.CaptionData) -> np.ndarray:
  """The `image_id`s of the validation images that have a text, in their order."""
  return np.unique(data.rows.image_of)


def judge(
  config: TrainConfig,
  model: CaptioningBEiT3,
  variables,
  data: captions.CaptionData,
  mesh: Mesh | None,
) -> tuple[dict[str, float], int]:
  """Keyword F1, chrF and BLEU of captions of the validation images, and of how many images.

  Of all, or of the first `config.beam.judged`. `keyword_f1_of_other_images` is what the same
  captions score against the keywords of images that they are not of: what they say of any.
  """
  images = with_texts(data)[: config.beam.judged or None]
  with sharding.use_mesh(mesh):
    found = written(config, model, variables, data, images)
  others = [scores.keyword_f1(found, held) for held in _of_others(data, images)]
  mean = {"keyword_f1_of_other_images": float(np.mean(others))} if others else {}
  return scores_of(found, data, images) | mean, len(images)


def _of_others(data: captions.CaptionData, images: Sequence[int]) -> list[list[tuple[str, ...]]]:
  """Keywords of other images in place of each image's, in some ways: none is ever its own."""
  step = max(1, len(images) // _TURNS)
  turned = (np.roll(images, by) for by in range(1, len(images), step))
  return [[data.keywords[i] for i in turn] for turn in turned]


def scores_of(
  found: Sequence[str], data: captions.CaptionData, images: Sequence[int]
) -> dict[str, float]:
  """What captions of some of the validation images score."""
  references = data.references()
  f1 = scores.keyword_f1(found, [data.keywords[i] for i in images])
  return {"keyword_f1": f1, **scores.corpus_scores(found, [references[i] for i in images])}


def baselines(data: captions.CaptionData) -> dict[str, dict[str, float]]:
  """What constant captions, chosen on the training data, score of every validation image.

  See `data.baselines.constant_captions`.
  """
  images, scored = with_texts(data), collections.defaultdict(dict)
  chosen = trivial.constant_captions(data.train.texts, data.train_keywords)
  for name, caption in chosen.items():
    for metric, value in scores_of([caption] * len(images), data, images).items():
      scored[metric][name] = value
  return dict(scored)


def sample(
  config: TrainConfig, model: CaptioningBEiT3, variables, data: captions.CaptionData, key: jax.Array
) -> str | None:
  """Captions of some of the validation images, and what these are called."""
  del key  # The best are written.
  if not config.sample_tokens:
    return None
  images = _shown(data)[:_SHOWN]
  found, references = written(config, model, variables, data, images), data.references()
  return "\n".join(
    f"{text}\n  (reference: {references[i][0]})" for text, i in zip(found, images, strict=True)
  )


def picture(
  config: TrainConfig, model: CaptioningBEiT3, variables, data: captions.CaptionData
) -> list[Row]:
  """Validation images with what is written of them, and below what they are called."""
  images = _shown(data)
  found, references = written(config, model, variables, data, images), data.references()
  shown = vision_language.as_shown(config, [data.rows.pictures[int(i)]["image"] for i in images])
  return [
    Row("validation images: captions that the model writes", shown, found),
    Row("what they are called", shown, [references[i][0] for i in images]),
  ]


def _shown(data: captions.CaptionData) -> np.ndarray:
  """The images that a person is shown."""
  images = with_texts(data)
  return images[common.evenly_apart(len(images))]


# ---------------------------------------------------------------------------------------------


def batch_spec(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """image, image_id, text, mask: see `data.captions.Rows`. inputs, targets, weights: the text with
  hidden tokens, what these are, and how much each token counts; see `data.captions.TextMasks`.
  """
  length = (config.data.seq_length,)
  return vision_language.batch_spec(
    config,
    image=vision_language.image_shape(config),
    image_id=((), jnp.int32),
    inputs=(length, jnp.int32),
    targets=(length, jnp.int32),
    weights=(length, jnp.float32),
  )


def flops(config: TrainConfig, facts: Facts) -> int:
  """FLOPs of one step, padding included, every token of a text scored; see `theory.flops`."""
  head = config.data.seq_length * config.model.width * facts["vocab_size"]
  row = vision_language.products(config, vision_language.length(config)) + head
  return vision_language.step_flops(config, row)


TASK = Task(
  load_data=load_data,
  facts=facts,
  describe=vision_language.describe,
  build_model=build_model,
  dummy_inputs=vision_language.dummy_inputs,
  architecture=beit3.architecture,
  inputs=inputs,
  score=weighted_sums,
  metrics=metrics,
  baselines=baselines,
  flops=flops,
  planned_facts=planned_facts,
  batch_spec=batch_spec,
  measure=measure,
  sample=sample,
  picture=picture,
  judge=judge,
  signatures=lambda config: scores.signatures(several=True),
  captioner=captioner,
  unit="captions",
  size=lambda config: 1,
  length=vision_language.length,
  pretrained="encoder",
)
