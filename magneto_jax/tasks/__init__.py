"""What can be learned: the table TASKS."""

from collections.abc import Sequence

from magneto_jax import sharding
from magneto_jax.config import TASK_NAMES
from magneto_jax.tasks import (
  causal_lm,
  image_captioning,
  image_classification,
  image_text_retrieval,
  image_tokenizer,
  masked_data,
  masked_image,
  masked_lm,
  speech_recognition,
  speech_translation,
  text_classification,
  translation,
  visual_question_answering,
  visual_reasoning,
)
from magneto_jax.tasks.task import Task

TASKS: dict[str, Task] = {
  "causal_lm": causal_lm.TASK,
  "masked_lm": masked_lm.TASK,
  "text_classification": text_classification.TASK,
  "translation": translation.TASK,
  "image_classification": image_classification.TASK,
  "image_tokenizer": image_tokenizer.TASK,
  "masked_image": masked_image.TASK,
  "masked_data": masked_data.TASK,
  "image_text_retrieval": image_text_retrieval.TASK,
  "image_captioning": image_captioning.TASK,
  "visual_question_answering": visual_question_answering.TASK,
  "visual_reasoning": visual_reasoning.TASK,
  "speech_recognition": speech_recognition.TASK,
  "speech_translation": speech_translation.TASK,
}
_OWN = frozenset(TASKS)


def register(
  name: str, task: Task, parameters: Sequence[tuple[str, tuple[str | None, ...]]] = ()
) -> None:
  """Adds a task of yours, so that `config.task` can name it; see docs/tasks.md.

  Args:
    name: of the task. One of your own that has it is replaced, as a file may be run twice.
    task: the task.
    parameters: rows for `sharding.PARAMETERS`, of layers that are not the library's.

  Raises:
    ValueError: if the library has a task of that name.
  """
  if name in _OWN:
    raise ValueError(f"the library has a task {name!r} already: give yours another name")
  TASKS[name] = task
  if name not in TASK_NAMES:
    TASK_NAMES.append(name)
  sharding.PARAMETERS.extend(row for row in parameters if row not in sharding.PARAMETERS)
