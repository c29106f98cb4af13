"""What can be learned: the table TASKS."""

from magneto_jax.config import TASK_NAMES
from magneto_jax.tasks import beit3, causal_lm, translation
from magneto_jax.tasks.task import Task

TASKS: dict[str, Task] = {
  "causal_lm": causal_lm.TASK,
  "translation": translation.TASK,
  "beit3": beit3.TASK,
}
_OWN = frozenset(TASKS)


def register(name: str, task: Task) -> None:
  """Adds a task of yours, so that `config.task` can name it; see docs/tasks.md.

  Raises:
    ValueError: if the library has one of that name. Your own is replaced, as a file may be run
      twice.
  """
  if name in _OWN:
    raise ValueError(f"the library has a task {name!r} already: give yours another name")
  TASKS[name] = task
  if name not in TASK_NAMES:
    TASK_NAMES.append(name)
