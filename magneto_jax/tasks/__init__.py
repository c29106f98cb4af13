"""What can be learned: the table TASKS."""

from magneto_jax.tasks import beit3, causal_lm, translation
from magneto_jax.tasks.task import Task

TASKS: dict[str, Task] = {
  "causal_lm": causal_lm.TASK,
  "translation": translation.TASK,
  "beit3": beit3.TASK,
}
