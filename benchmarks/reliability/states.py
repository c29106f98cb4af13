"""The whole state of a run at a checkpoint, read as a run that goes on reads it."""

import jax
import numpy as np

from magneto_jax import program, runs
from magneto_jax.checkpoints import Checkpointer, abstract_like
from magneto_jax.tasks import TASKS


def abstract(workdir):
  """The shapes of the parts of a run's state."""
  record = runs.read_record(workdir)
  task = TASKS[record.config.task]
  model = task.build_model(record.config, record.facts)
  optimizer, _ = program.make_optimizer(record.config.optimizer, record.config.steps)
  state = jax.eval_shape(
    lambda key: program.init_state(
      key,
      model=model,
      inputs=task.dummy_inputs(record.config),
      optimizer=optimizer,
      ema=record.config.ema,
    ),
    jax.random.key(0),
  )
  return state.parts()


def arrays(workdir, step):
  """Every array of a checkpoint, by path, as the run left it."""
  with Checkpointer(runs.checkpoints_in(workdir), read_only=True) as checkpointer:
    parts = checkpointer.restore(step, abstract_like(abstract(workdir)))
  return jax.tree.map(np.asarray, parts)
