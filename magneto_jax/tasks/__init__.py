"""What can be learned: the table TASKS."""

from magneto_jax.tasks import beit3, causal_lm, text_classification, translation
from magneto_jax.tasks.task import Task

TASKS: dict[str, Task] = {
  "causal_lm": causal_lm.TASK,
  "text_classification": text_classification.TASK,
  "translation": translation.TASK,
  "beit3": beit3.TASK,
}
