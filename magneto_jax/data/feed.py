"""Batches on the devices before the step asks for them."""

import collections
import concurrent.futures
import time
from collections.abc import Callable
from typing import Any

import grain


class Feed(grain.DatasetIterator):
  """An iterator of Grain's whose batches a thread reads and places ahead of the step.

  Its state counts the batches that were handed out, not those read ahead: what is saved with step k
  goes on with batch k, counted from 0, whatever `ahead`, and however the batches are read.
  """

  def __init__(
    self,
    start: Callable[[int], grain.DatasetIterator],
    put: Callable[[Any], Any],
    ahead: int = 2,
    *,
    clock: Callable[[], float] = time.perf_counter,
  ):
    """Starts at the first batch.

    Args:
      start: `k -> iterator` of this host's rows of the batches from the k-th on.
      put: places them: the host's rows to global arrays. It is called in the feed's thread, in the
        batches' order; it must not communicate with other hosts, nor depend on a context such as a
        mesh that is set.
      ahead: how many batches are kept placed, beside the one that was handed out; 0: none, a batch
        is read and placed when it is asked for.
      clock: what the waiting is measured with, in seconds.
    """
    super().__init__()
    self._start, self._put, self._ahead, self._clock = start, put, ahead, clock
    self._iterator, self._next = start(0), 0
    self._waited = 0.0
    # One thread: batches come in their order, and the iterator is never used by two.
    self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="feed")
    self._coming: collections.deque[concurrent.futures.Future] = collections.deque()

  def __next__(self):
    begin = self._clock()
    self._ask(1)
    batch = self._coming.popleft().result()
    self._waited += self._clock() - begin
    self._next += 1
    self._ask(self._ahead)
    return batch

  def waited(self) -> float:
    """Seconds that the consumer has waited for batches since this was last asked."""
    waited, self._waited = self._waited, 0.0
    return waited

  def get_state(self) -> dict[str, int]:
    """How many batches were handed out."""
    return {"next_index": self._next}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes on from a place; what was read ahead is dropped.

    Raises:
      ValueError: it is none.
    """
    place = state.get("next_index") if isinstance(state, dict) else None
    if not isinstance(place, int) or place < 0:
      raise ValueError(f"{state!r:.80} is no place among the batches")
    self._drop()
    self._iterator.close()
    self._iterator, self._next = self._start(place), place

  def start_prefetch(self) -> None:
    """Begins to read ahead before the first batch is asked for."""
    self._ask(self._ahead)

  def close(self) -> None:
    """Stops the thread and closes the iterator."""
    self._drop()
    self._thread.shutdown()
    self._iterator.close()
    super().close()

  def __del__(self) -> None:
    """Not as Grain's, which close themselves: at Python's end there is nothing to do it with."""

  def _read(self):
    return self._put(next(self._iterator))

  def _ask(self, count: int) -> None:
    while len(self._coming) < count:
      self._coming.append(self._thread.submit(self._read))

  def _drop(self) -> None:
    for coming in self._coming:
      coming.cancel()
    concurrent.futures.wait(self._coming)
    self._coming.clear()
