"""The feed: the same batches, its place whatever it has read ahead, and what it waits."""

import json
import threading

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from magneto_jax.data import feed

AHEAD = [0, 1, 2, 5]


class Counting(grain.DatasetIterator):
  """What starts iterators over k, k + 1, ... below `size`, each of them itself."""

  def __init__(self, size=100):
    super().__init__()
    self.size, self.next, self.threads = size, 0, set()

  def __call__(self, start):
    self.next = start
    return self

  def __next__(self):
    self.threads.add(threading.get_ident())
    if self.next == self.size:
      raise StopIteration
    self.next += 1
    return np.array([self.next - 1])

  def get_state(self):
    raise AssertionError("the feed counts")

  def set_state(self, state):
    raise AssertionError("the feed starts another")


@pytest.fixture
def make():
  """Feeds that are closed in the end."""
  made = []

  def make(*args, **options):
    made.append(feed.Feed(*args, **options))
    return made[-1]

  yield make
  for each in made:
    each.close()


def place(batch):
  return jax.device_put(batch, jax.devices()[0])


@pytest.mark.parametrize("ahead", AHEAD)
def test_batches_are_those_of_the_iterator_placed_and_end_with_them(make, ahead):
  batches = list(make(Counting(7), place, ahead))
  assert all(isinstance(batch, jax.Array) for batch in batches)
  assert [int(batch[0]) for batch in batches] == list(range(7))


@pytest.mark.parametrize("ahead", AHEAD)
@pytest.mark.parametrize("taken", [0, 1, 4])
def test_a_state_goes_on_behind_the_last_batch_handed_out(make, ahead, taken):
  iterator = make(Counting(), place, ahead)
  assert [int(next(iterator)[0]) for _ in range(taken)] == list(range(taken))
  state = json.loads(json.dumps(iterator.get_state()))
  assert state == {"next_index": taken}
  following = [int(next(iterator)[0]) for _ in range(4)]
  assert following == list(range(taken, taken + 4))
  for resumed in (make(Counting(), place, ahead), iterator):
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert [int(next(resumed)[0]) for _ in range(4)] == following


def test_a_place_is_set_behind_the_read_that_is_under_way(make):
  going_on = threading.Event()

  class Slow(Counting):
    def __next__(self):
      assert going_on.wait(timeout=60)
      return super().__next__()

  iterator = make(Slow(), place)
  iterator.start_prefetch()
  threading.Timer(0.2, going_on.set).start()
  iterator.set_state({"next_index": 50})
  assert int(next(iterator)[0]) == 50


def test_a_checkpoint_of_grains_saves_and_restores_it(make, tmp_path):
  iterator = make(Counting(), place)
  for _ in range(3):
    next(iterator)
  with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
    manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
    resumed = make(Counting(), place, ahead=4)
    manager.restore(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
  assert int(next(resumed)[0]) == 3


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_so_many_batches_are_placed_ahead_and_no_more(make, ahead):
  """Before the first is asked for, where it is told to begin, and after each."""
  placed = threading.Semaphore(0)
  source = Counting()
  iterator = make(source, lambda batch: placed.release() or batch, ahead)
  iterator.start_prefetch()
  for handed_out in range(4):
    for _ in range(ahead if handed_out == 0 else 1):
      assert placed.acquire(timeout=60)
    iterator._thread.submit(int).result()  # Whatever the thread was given has been done.
    assert source.next == handed_out + ahead
    assert not placed.acquire(blocking=False)
    next(iterator)


def test_nothing_is_read_before_it_is_asked_for_with_none_ahead(make):
  source = Counting()
  iterator = make(source, place, ahead=0)
  iterator.start_prefetch()
  for handed_out in range(3):
    assert source.next == handed_out
    next(iterator)


def test_one_thread_reads_and_it_is_not_the_consumers(make):
  source = Counting()
  iterator = make(source, place)
  for _ in range(20):
    next(iterator)
  iterator.set_state({"next_index": 3})
  next(iterator)
  assert len(source.threads) == 1 and threading.get_ident() not in source.threads


class Clock:
  """A clock that stands until it is moved, and lets a source go on when it is first looked at."""

  def __init__(self):
    self.now, self.looks, self.waiting = 0.0, 0, threading.Semaphore(0)

  def __call__(self):
    self.looks += 1
    if self.looks % 2:
      self.waiting.release()
    return self.now


@pytest.mark.parametrize("ahead", [0, 2])
def test_the_time_that_a_slow_source_takes_is_waited(make, ahead):
  """Every batch takes 3 seconds, from when the consumer has begun to wait for it."""
  clock = Clock()

  def slow(batch):
    assert clock.waiting.acquire(timeout=60)
    clock.now += 3
    return batch

  iterator = make(Counting(4), slow, ahead, clock=clock)
  assert iterator.waited() == 0
  next(iterator)
  assert iterator.waited() == 3
  assert iterator.waited() == 0
  for _ in range(3):
    next(iterator)
    clock.now += 100  # The consumer's own work.
  assert iterator.waited() == 9


def test_what_is_there_in_time_is_not_waited_for(make):
  """The source is as slow as above, while the consumer works."""
  clock = Clock()
  worked = threading.Semaphore(0)

  def slow(batch):
    assert worked.acquire(timeout=60)
    clock.now += 3
    return batch

  iterator = make(Counting(4), slow, clock=clock)
  iterator.start_prefetch()
  for _ in range(4):
    worked.release()
    iterator._coming[0].result()
    next(iterator)
  assert clock.now == 12 and iterator.waited() == 0


def test_an_error_of_the_source_or_of_placing_reaches_the_consumer(make):
  def refuse(batch):
    if batch[0] == 2:
      raise OSError("the disk is gone")
    return batch

  iterator = make(Counting(), refuse)
  assert [int(next(iterator)[0]) for _ in range(2)] == [0, 1]
  with pytest.raises(OSError, match="the disk is gone"):
    next(iterator)
  assert iterator.get_state() == {"next_index": 2}


def test_a_closed_feed_has_no_thread_and_its_iterator_is_closed():
  source = Counting()
  iterator = feed.Feed(source, place)
  next(iterator)
  iterator.close()
  assert not [t for t in threading.enumerate() if t.ident in source.threads]
  assert source._closed
  with pytest.raises(RuntimeError, match="shutdown"):
    next(iterator)


@pytest.mark.parametrize("state", [{}, {"next_index": -1}, {"next_index": "3"}, [3], None])
def test_what_is_no_place_is_refused_and_changes_nothing(make, state):
  iterator = make(Counting(), place)
  next(iterator)
  with pytest.raises(ValueError, match="is no place among the batches"):
    iterator.set_state(state)
  assert int(next(iterator)[0]) == 1
