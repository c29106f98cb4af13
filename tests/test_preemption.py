"""A notice to stop: what it does to a run of one process, and what is left as it was.

Several processes are signalled in tests/reliability/test_preemption.py.
"""

import os
import signal
import threading

import pytest

from magneto_jax import preemption
from magneto_jax.preemption import Preempted


def terminate():
  os.kill(os.getpid(), signal.SIGTERM)


def test_a_check_after_the_signal_stops_the_run_and_none_before():
  with preemption.watched() as notice:
    notice.check(3)
    terminate()
    terminate()  # Launchers send several.
    with pytest.raises(Preempted, match="saved at step 1,234; the same command") as caught:
      notice.check(1234)
  assert caught.value.step == 1234
  assert "before the first step" in str(Preempted(0))


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN, lambda *_: None])
def test_the_handler_that_was_there_is_put_back(before):
  at_start = signal.signal(signal.SIGTERM, before)
  try:
    with pytest.raises(KeyError), preemption.watched():
      assert signal.getsignal(signal.SIGTERM) != before
      raise KeyError
    assert signal.getsignal(signal.SIGTERM) == before
  finally:
    signal.signal(signal.SIGTERM, at_start)


def test_a_handler_of_c_gives_way_to_the_default(monkeypatch):
  """As that of JAX's own service, where a program has started it."""
  at_start = signal.getsignal(signal.SIGTERM)
  real = signal.signal
  monkeypatch.setattr(signal, "signal", lambda *args: real(*args) and None)
  try:
    with preemption.watched():
      pass
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  finally:
    real(signal.SIGTERM, at_start)


def test_a_thread_that_is_not_the_main_one_trains_unwatched():
  seen = []

  def run():
    with preemption.watched() as notice:
      notice.check(0)
      seen.append(signal.getsignal(signal.SIGTERM))

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert seen == [signal.getsignal(signal.SIGTERM)]
