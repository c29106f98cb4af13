"""A task of one's own: named by a config once it is registered, with layers of its own."""

import pytest

from magneto_jax import sharding, tasks
from magneto_jax.config import TASK_NAMES, ConfigError, TrainConfig, from_config_dict


@pytest.fixture
def clean(monkeypatch):
  """The tables, which a test may change."""
  monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
  names, parameters = list(TASK_NAMES), list(sharding.PARAMETERS)
  yield
  TASK_NAMES[:], sharding.PARAMETERS[:] = names, parameters


def test_a_registered_task_can_be_named(clean):
  task = tasks.TASKS["causal_lm"]
  with pytest.raises(
    ConfigError, match=r"'mine' must be one of .*; a task of your own is first re"
  ):
    from_config_dict({"task": "mine"})
  rows = [("my_layer/kernel", ("embed", None))]
  with pytest.raises(ValueError, match="my_layer/kernel must match one pattern"):
    sharding.parameter_axes("model/my_layer/kernel")
  # A config file may be run twice.
  for replaced in (task, task._replace(unit="letters")):
    tasks.register("mine", replaced, rows)
  assert from_config_dict({"task": "mine"}).task == "mine"
  assert tasks.TASKS["mine"].unit == "letters"
  assert sharding.parameter_axes("model/my_layer/kernel") == ("embed", None)
  assert TASK_NAMES.count("mine") == 1


def test_the_librarys_own_tasks_stay(clean):
  with pytest.raises(ValueError, match="the library has a task 'causal_lm' already: give yours an"):
    tasks.register("causal_lm", tasks.TASKS["masked_data"])
  assert TrainConfig().task == "causal_lm"
