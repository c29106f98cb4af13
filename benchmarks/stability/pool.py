"""Independent measurements, several at a time."""

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterable, Iterator


def completed(function: Callable, tasks: Iterable[tuple], processes: int) -> Iterator[tuple]:
  """Yields (task, function(*task)) in the order in which they are done.

  More than one process at a time means a new one for each task.
  """
  if processes == 1:
    for task in tasks:
      yield task, function(*task)
    return
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(processes, spawn, max_tasks_per_child=1) as pool:
    wanted = {pool.submit(function, *task): task for task in tasks}
    for done in concurrent.futures.as_completed(wanted):
      yield wanted[done], done.result()
