"""Reasoning about two images: whether a statement is true of them, as in NLVR2.

Each image goes through the encoder with the statement, and a head reads both
(`models.ReasoningBEiT3`). The loss is the cross-entropy of true and false, a mean over samples.

Reference: BEiT-3, arXiv 2208.10442, section 3.1.3, and its released code; NLVR2, arXiv 1811.00491.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax.config import TrainConfig
from magneto_jax.data import augmentation, questions
from magneto_jax.data.tokenizers import Tokenizer
from magneto_jax.decoding import Answerer
from magneto_jax.decoding.answerer import probabilities
from magneto_jax.models import ReasoningBEiT3
from magneto_jax.reporting import Row
from magneto_jax.tasks import beit3, common, vision_language
from magneto_jax.tasks.task import Batch, Facts, Task, Totals, weighted_sums

# By label.
ANSWERS = ("false", "true")


def load_data(
  config: TrainConfig, directory: str | os.PathLike, expected: Mapping[str, Any] | None = None
) -> questions.QuestionData:
  """Pairs of images with statements about them."""
  given = vision_language.options(config)
  return questions.load_statements(workdir=directory, expected=expected, **given)


def build_model(config: TrainConfig, facts: Facts) -> ReasoningBEiT3:
  """The config's encoder with a head on two pairs."""
  return ReasoningBEiT3(encoder=beit3.encoder(config, facts), classes=len(ANSWERS))


def inputs(batch: Batch) -> tuple[tuple, dict[str, Any]]:
  """The model's arguments: pairs of images, statements, padding, and what is right."""
  keywords = {"mask_BT": batch["mask"], "targets": batch["label"]}
  return (batch["images"], batch["text"]), keywords


def measure(model: ReasoningBEiT3, variables, batch: Batch) -> dict[str, jax.Array]:
  """The loss's sums, and of every sample its label and the model's."""
  args, kwargs = inputs(batch)
  labels_B = kwargs.pop("targets")
  scores_BC = model.apply(variables, *args, **kwargs)
  nats_BC = -jax.nn.log_softmax(scores_BC)
  loss, weight = weighted_sums(jnp.take_along_axis(nats_BC, labels_B[:, None], 1)[:, 0], batch)
  answers_B = jnp.argmax(scores_BC, axis=-1)
  return {"loss": loss, "weight": weight, "labels": labels_B, "answers": answers_B}


def metrics(totals: Totals, data: questions.QuestionData, *, whole: bool) -> dict[str, float]:
  """The mean loss, and the share of statements that are judged right, of all and by kind."""
  right_N = totals["answers"] == totals["labels"]
  loss = totals["loss"] / totals["weight"]
  return {"loss_nats_per_sample": loss, **vision_language.by_kind(right_N, data)}


def answerer(
  config: TrainConfig, model: ReasoningBEiT3, variables, tokenizer: Tokenizer, data: Mapping
) -> Answerer:
  """What says whether a statement is true of two images; nothing is read of `data`."""
  see, longest = vision_language.see(config), config.data.seq_length
  return Answerer(model, variables, tokenizer, ANSWERS, see, longest)


def picture(
  config: TrainConfig, model: ReasoningBEiT3, variables, data: questions.QuestionData
) -> list[Row]:
  """Validation samples: both images, the statement, and what the model says of it."""
  _, batch = common.shown(data.validation)
  p_BC = probabilities(model, variables, batch["images"], batch["text"], batch["mask"])
  answers_B = np.argmax(p_BC, axis=-1)
  rows = []
  for b, answer in enumerate(answers_B):
    label = int(batch["label"][b])
    told = ANSWERS[answer] + ("" if answer == label else f", which is wrong: {ANSWERS[label]}")
    shown = augmentation.denormalize(batch["images"][b], config.data.normalization)
    statement = data.show({name: batch[name][b] for name in batch})
    rows.append(Row(statement, shown, [f"answered {told}", ""]))
  return rows


def batch_spec(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """images: pixels of two. label: whether the text is true of them. Others: see the shared one."""
  shape, dtype = vision_language.image_shape(config)
  own = {"images": ((2, *shape), dtype), "label": ((), jnp.int32)}
  return vision_language.batch_spec(config, **own)


def dummy_inputs(config: TrainConfig) -> tuple:
  """Two images and a text that initialise the model."""
  image_BHWC, tokens_BT = vision_language.dummy_inputs(config)
  return jnp.stack([image_BHWC] * 2, axis=1), tokens_BT


def flops(config: TrainConfig, facts: Facts) -> int:
  """FLOPs of one step, padding included; see `theory.flops`."""
  width = config.model.width
  head = 4 * width * 2 * width + 2 * width * len(ANSWERS)
  pair = vision_language.products(config, vision_language.length(config))
  return vision_language.step_flops(config, 2 * pair + head, images=2)


TASK = Task(
  load_data=load_data,
  facts=vision_language.facts,
  describe=vision_language.describe,
  build_model=build_model,
  dummy_inputs=dummy_inputs,
  architecture=beit3.architecture,
  inputs=inputs,
  score=weighted_sums,
  metrics=metrics,
  baselines=vision_language.trivial_answers,
  flops=flops,
  planned_facts=vision_language.planned_facts,
  batch_spec=batch_spec,
  measure=measure,
  picture=picture,
  answerer=answerer,
  loss_name="loss_nats_per_sample",
  best=("accuracy", True),
  unit="statements",
  size=lambda config: 1,
  length=lambda config: 2 * vision_language.length(config),
  pretrained="encoder",
)
