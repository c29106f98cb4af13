"""Grain pipelines over random-access samples: an endless shuffled one, and a finite exact one."""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

Batch = dict[str, np.ndarray]

# Samples are slices of a memory map, so more threads than this only contend for the interpreter.
_READ_OPTIONS = dict(num_threads=2, prefetch_buffer_size=4)

# Endless in practice. Grain's own endless is 2^63 - 1 samples, whose length overflows in batches
# of one row.
_EPOCHS = 2**24


def train_iterator(
  dataset: Sequence[Batch],
  *,
  batch_size: int,
  seed: int,
  num_workers: int = 0,
  host_index: int = 0,
  host_count: int = 1,
) -> grain.DatasetIterator:
  """Returns an endless iterator of shuffled batches, with a new order in every epoch.

  Row r of batch k is a pure function of (seed, k, r): it depends on neither the workers nor the
  hosts. The rows of all hosts, one host after the other, are the rows of the one-host batch. A
  batch may straddle two epochs, so no sample is ever dropped.

  Args:
    dataset: random-access samples of equal shapes.
    batch_size: rows of a batch over all hosts together.
    seed: of the shuffle, not negative.
    num_workers: processes that prepare batches; 0 is right for packed text, because starting
      workers takes seconds and slices of a memory map are cheap. Workers are spawned, so a
      script needs `if __name__ == "__main__":`.
    host_index: which host this is.
    host_count: number of hosts; must divide `batch_size`.

  Returns:
    A Grain iterator of batches with `batch_size / host_count` rows. `get_state` and `set_state`
    resume it exactly, and `grain.checkpoint.CheckpointSave(iterator)` puts it into an Orbax
    checkpoint.

  Raises:
    ValueError: sizes do not fit, or the dataset has fewer samples than one batch.
  """
  rows = _rows_per_host(batch_size, host_index, host_count)
  if seed < 0:
    raise ValueError(f"{seed=} must not be negative")
  if len(dataset) < batch_size:
    raise ValueError(
      f"the training set has {len(dataset)} samples, fewer than {batch_size=}: use more text, "
      "a smaller batch or shorter sequences"
    )
  pipeline = grain.MapDataset.source(dataset).seed(seed).shuffle().repeat(_EPOCHS)
  pipeline = pipeline.batch(rows)[host_index::host_count]
  iterable = pipeline.to_iter_dataset(grain.ReadOptions(**_READ_OPTIONS))
  if num_workers > 0:
    # Grain reads an absl flag here, which fails in notebooks and scripts that parse none.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    iterable = iterable.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
  return iter(iterable)


def eval_batches(
  dataset: Sequence[Batch], batch_size: int, *, host_index: int = 0, host_count: int = 1
) -> Iterator[Batch]:
  """Returns every sample once, in order, in batches of one shape.

  The last batch is filled up with rows of zeros, whose weights are therefore 0. Every host gets
  the same number of batches, so that collective evaluation steps stay in line.

  Args:
    dataset: random-access samples of equal shapes.
    batch_size: rows of a batch over all hosts together.
    host_index: which host this is.
    host_count: number of hosts; must divide `batch_size`.

  Returns:
    A finite iterator of batches with `batch_size / host_count` rows.

  Raises:
    ValueError: sizes do not fit, or the dataset is empty.
  """
  rows = _rows_per_host(batch_size, host_index, host_count)
  if not len(dataset):
    raise ValueError("the evaluation set has no samples")
  first = range(host_index * rows, host_index * rows + len(dataset), batch_size)
  return (_stack(dataset, start, rows) for start in first)


def _rows_per_host(batch_size: int, host_index: int, host_count: int) -> int:
  if not 0 <= host_index < host_count:
    raise ValueError(f"{host_index=} must lie in [0, {host_count=})")
  if batch_size < 1 or batch_size % host_count:
    raise ValueError(f"{host_count=} must divide {batch_size=}")
  return batch_size // host_count


def _stack(dataset: Sequence[Any], start: int, rows: int) -> Batch:
  """Samples `start, ..., start + rows - 1` as one batch; those past the end are zeros."""
  blank = {name: np.zeros_like(values) for name, values in dataset[0].items()}
  indices = range(start, start + rows)
  samples = [dataset[i] if i < len(dataset) else blank for i in indices]
  return {name: np.stack([sample[name] for sample in samples]) for name in blank}
