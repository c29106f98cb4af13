"""Batches on the devices before the step asks for them."""

import collections
import concurrent.futures
import copy
import time
from collections.abc import Callable
from typing import Any

import grain


class Feed(grain.DatasetIterator):
  """A Grain iterator whose batches a thread reads and places ahead of the step.

  `get_state` is the place of the last batch handed out, not of those read ahead: what is saved with
  step k goes on with batch k + 1, whatever `ahead`. As an iterator of Grain's it goes into a
  checkpoint like the one that it covers.
  """

  def __init__(
    self,
    iterator: grain.DatasetIterator,
    put: Callable[[Any], Any],
    ahead: int = 2,
    *,
    clock: Callable[[], float] = time.perf_counter,
  ):
    """Covers an iterator, which must not be used otherwise from then on.

    Args:
      iterator: gives this host's rows of every batch.
      put: places them: the host's rows to global arrays. It is called in the feed's thread, in the
        batches' order; it must not communicate with other hosts, nor depend on a context such as a
        mesh that is set.
      ahead: how many batches are kept placed, beside the one that was handed out; 0: none, a batch
        is read and placed when it is asked for.
      clock: what the waiting is measured with, in seconds.
    """
    super().__init__(iterator)
    self._iterator, self._put, self._ahead, self._clock = iterator, put, ahead, clock
    self._state = copy.deepcopy(iterator.get_state())
    self._waited = 0.0
    # One thread: batches come in their order, and the iterator is never used by two.
    self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="feed")
    self._coming: collections.deque[concurrent.futures.Future] = collections.deque()

  def __next__(self):
    begin = self._clock()
    self._ask(1)
    batch, state = self._coming.popleft().result()
    self._waited += self._clock() - begin
    self._state = state
    self._ask(self._ahead)
    return batch

  def waited(self) -> float:
    """Seconds that the consumer has waited for batches since this was last asked."""
    waited, self._waited = self._waited, 0.0
    return waited

  def get_state(self) -> dict[str, Any]:
    """The place after the last batch that was handed out."""
    return self._state

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on from a place; what was read ahead is dropped."""
    self._drop()
    self._iterator.set_state(state)
    self._state = copy.deepcopy(self._iterator.get_state())

  def start_prefetch(self) -> None:
    """Begins to read ahead before the first batch is asked for."""
    self._ask(self._ahead)

  def close(self) -> None:
    """Stops the thread and closes the iterator."""
    self._drop()
    self._thread.shutdown()
    super().close()

  def _read(self):
    batch = self._put(next(self._iterator))
    # Some of Grain's iterators change the state that they gave.
    return batch, copy.deepcopy(self._iterator.get_state())

  def _ask(self, count: int) -> None:
    while len(self._coming) < count:
      self._coming.append(self._thread.submit(self._read))

  def _drop(self) -> None:
    for coming in self._coming:
      coming.cancel()
    concurrent.futures.wait(self._coming)
    self._coming.clear()
