"""What can be learned: the table TASKS."""

from magneto_jax.tasks import beit3, causal_lm, masked_lm, translation
from magneto_jax.tasks.task import Task

TASKS: dict[str, Task] = {
  "causal_lm": causal_lm.TASK,
  "masked_lm": masked_lm.TASK,
  "translation": translation.TASK,
  "beit3": beit3.TASK,
}
