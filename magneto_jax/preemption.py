"""A notice to stop (SIGTERM), and that all processes act on it at one place of the run."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class Preempted(Exception):
  """A run that has been told to stop, and has saved what it had.

  Attributes:
    step: the newest that is saved; 0 for none.
  """

  def __init__(self, step: int):
    super().__init__(
      f"preempted: saved at step {step:,}; the same command goes on from it"
      if step
      else "preempted before the first step; the same command begins again"
    )
    self.step = step


class Notice:
  """Whether any process of the run has been told to stop.

  Each process knows of its own signal only. At every `check` the devices take the maximum of what
  they know, and its result is read at the next one: so nothing waits for the step in flight, and
  all processes stop at the same check, which is at most the second after the signal. With one
  process there is nothing to ask the devices.

  JAX's own preemption service agrees upon a number instead, with calls that Orbax makes as well,
  with other numbers; and it looks for the signal once a second.
  """

  def __init__(self):
    self._given = False
    self._ask = _asker() if jax.process_count() > 1 else None
    self._asked: jax.Array | None = None

  def give(self, signum=None, frame=None) -> None:
    """Takes notice: a handler of signals. To be told again changes nothing."""
    del signum, frame
    self._given = True

  def check(self, saved: int) -> None:
    """To be called by all processes at the same places of the run, such as after every step.

    Args:
      saved: the newest step that is saved.

    Raises:
      Preempted: at one call, the same on all processes, after one of them was given notice.
    """
    if self._ask is None:
      reached = self._given
    else:
      asked = self._ask(self._given)
      # At the first check there is no earlier answer, and no step to wait for.
      reached = bool(asked if self._asked is None else self._asked)
      self._asked = asked
    if reached:
      raise Preempted(saved)


@contextlib.contextmanager
def watched() -> Iterator[Notice]:
  """Catches SIGTERM, which SLURM, Kubernetes and spot machines send before they kill.

  Outside the main thread, where Python handles no signals, nothing is caught there, but notice is
  taken of what other processes are told.

  Yields:
    The notice that is given then.
  """
  notice = Notice()
  if threading.current_thread() is not threading.main_thread():
    yield notice
    return
  before = signal.signal(signal.SIGTERM, notice.give)
  try:
    yield notice
  finally:
    # None: one that is not Python's, which cannot be put back.
    signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _asker() -> Callable[[bool], jax.Array]:
  """What asks the devices of all processes whether any of them is given True.

  All processes call it together. The answer is there when the devices come to it.
  """
  mesh = Mesh(np.array(jax.devices()), "devices")
  each, whole = NamedSharding(mesh, P("devices")), NamedSharding(mesh, P())

  def place(value: bool) -> jax.Array:
    return jax.make_array_from_callback((mesh.size,), each, lambda _: np.array([value]))

  known = {value: place(value) for value in (False, True)}
  any_of = jax.jit(jnp.any, out_shardings=whole)
  return lambda value: any_of(known[value])
