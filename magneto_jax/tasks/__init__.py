"""What can be learned: the table TASKS."""

from magneto_jax.tasks import causal_lm
from magneto_jax.tasks.task import Task

TASKS: dict[str, Task] = {"causal_lm": causal_lm.TASK}
