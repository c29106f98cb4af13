"""Visual question answering as classification among the answers that are known in training.

An image and a question go through the encoder together, and a head on the class token scores each
answer (`models.AnsweringBEiT3`). An answer is right to a degree, by how many annotators gave it:
VQA's official scores. The loss is the binary cross-entropy of each answer, summed over the answers,
a mean over questions; the accuracy is the mean score of the answers that the model puts first.

Reference: BEiT-3, arXiv 2208.10442, section 3.1.1, and its released code; VQA, arXiv 1505.00468.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax.config import TrainConfig
from magneto_jax.data import augmentation, masking, questions
from magneto_jax.data.tokenizers import Tokenizer
from magneto_jax.decoding import Answerer
from magneto_jax.decoding.answerer import probabilities
from magneto_jax.layers.cross_entropy import binary_cross_entropy
from magneto_jax.models import AnsweringBEiT3
from magneto_jax.reporting import Row
from magneto_jax.tasks import beit3, common, vision_language
from magneto_jax.tasks.task import Batch, Facts, Task, Totals, weighted_sums
from magneto_jax.theory import records

# Of the generated questions, by the name of the data; and VQAv2's.
ANSWERS = {"embedded/emoji/en": 10, "embedded/emoji/de": 10, "embedded/emoji/en+de": 20}
VQA_ANSWERS = 3129


def load_data(
  config: TrainConfig, directory: str | os.PathLike, expected: Mapping[str, Any] | None = None
) -> questions.QuestionData:
  """Images, questions about them, and the answers that are known, which the identity names."""
  given = vision_language.options(config)
  data = questions.load_questions(workdir=directory, expected=expected, **given)
  return dataclasses.replace(data, identity={**data.identity, "answers": list(data.answers)})


def facts(data: questions.QuestionData) -> Facts:
  """What the model must know of its data: with what tasks share, A, the answers."""
  return {**vision_language.facts(data), "answers": len(data.answers)}


def planned_facts(config: TrainConfig) -> Facts:
  """Likewise without the data; of one's own questions as many answers as VQAv2 has."""
  answers = ANSWERS.get(config.data.name, VQA_ANSWERS)
  return {**vision_language.planned_facts(config), "answers": answers}


def build_model(config: TrainConfig, facts: Facts) -> AnsweringBEiT3:
  """The config's encoder, without its final norm, with a head over the known answers."""
  pairs = beit3.encoder(config, facts)
  bare = dataclasses.replace(pairs.encoder.recipe, final_norm=False)
  encoder = pairs.clone(encoder=pairs.encoder.clone(recipe=bare))
  return AnsweringBEiT3(encoder=encoder, answers=facts["answers"])


def describe(config: TrainConfig, facts: Facts) -> list[str]:
  """The recipe of the encoder, as it is here."""
  return records.describe(build_model(config, facts).encoder.encoder.recipe)


def inputs(batch: Batch) -> tuple[tuple, dict[str, Any]]:
  """The model's arguments: images, questions, padding, and how right each answer is."""
  args, kwargs = vision_language.pair_inputs(batch)
  return args, kwargs | {"targets": batch["targets"]}


def measure(model: AnsweringBEiT3, variables, batch: Batch) -> dict[str, jax.Array]:
  """The loss's sums, and of every question how right the answer is that the model puts first."""
  args, kwargs = vision_language.pair_inputs(batch)
  scores_BA, targets_BA = model.apply(variables, *args, **kwargs), batch["targets"]
  loss, weight = weighted_sums(binary_cross_entropy(scores_BA, targets_BA), batch)
  best_B1 = jnp.argmax(scores_BA, axis=-1, keepdims=True)
  right_B = jnp.take_along_axis(targets_BA, best_B1, axis=-1)[:, 0]
  return {"loss": loss, "weight": weight, "right": right_B}


def metrics(totals: Totals, data: questions.QuestionData, *, whole: bool) -> dict[str, float]:
  """The mean loss, the accuracy, and that of each type of question."""
  loss = totals["loss"] / totals["weight"]
  return {"loss_nats_per_question": loss, **vision_language.by_kind(totals["right"], data)}


def answerer(
  config: TrainConfig, model: AnsweringBEiT3, variables, tokenizer: Tokenizer, data: Mapping
) -> Answerer:
  """What answers questions about an image; `data` is the identity of the run's data."""
  see, longest = vision_language.see(config), config.data.seq_length
  return Answerer(model, variables, tokenizer, tuple(data["answers"]), see, longest)


def picture(
  config: TrainConfig, model: AnsweringBEiT3, variables, data: questions.QuestionData
) -> list[Row]:
  """Validation images with their questions, what the model answers, and what is right."""
  _, batch = common.shown(data.validation)
  p_BA = probabilities(model, variables, batch["image"], batch["text"], batch["mask"])
  answers_B = np.argmax(p_BA, axis=-1)
  told = []
  for b, found in enumerate(answers_B):
    question = masking.words_of(data.tokenizer, batch["text"][b], specials=False)
    right = data.answers[int(batch["targets"][b].argmax())]
    wrong = "" if batch["targets"][b, found] > 0 else f", which is wrong: {right}"
    told.append(f"{question} {data.answers[int(found)]}{wrong}")
  shown = augmentation.denormalize(batch["image"], config.data.normalization)
  return [Row("questions on validation images, and the model's answers", shown, told)]


def batch_spec(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """image: pixels. image_id: the number of the distinct image. Others: see the shared one."""
  own = {"image": vision_language.image_shape(config), "image_id": ((), jnp.int32)}
  return vision_language.batch_spec(config, **own)


def data_spec(config: TrainConfig, facts: Facts) -> dict[str, jax.ShapeDtypeStruct]:
  """targets: how right each answer is."""
  shape = config.batch_size, facts["answers"]
  return {"targets": jax.ShapeDtypeStruct(shape, jnp.float32)}


def flops(config: TrainConfig, facts: Facts) -> int:
  """FLOPs of one step, padding included; see `theory.flops`."""
  width = config.model.width
  head = width * width + width * 2 * width + 2 * width * facts["answers"]
  row = vision_language.products(config, vision_language.length(config)) + head
  return vision_language.step_flops(config, row)


TASK = Task(
  load_data=load_data,
  facts=facts,
  describe=describe,
  build_model=build_model,
  dummy_inputs=vision_language.dummy_inputs,
  architecture=beit3.architecture,
  inputs=inputs,
  score=weighted_sums,
  metrics=metrics,
  baselines=vision_language.trivial_answers,
  flops=flops,
  planned_facts=planned_facts,
  batch_spec=batch_spec,
  data_spec=data_spec,
  measure=measure,
  picture=picture,
  answerer=answerer,
  loss_name="loss_nats_per_question",
  best=("accuracy", True),
  unit="questions",
  size=lambda config: 1,
  length=vision_language.length,
  fact_kinds={"vocab_size": int, "answers": int},
  pretrained="encoder",
)
