"""Grain pipelines over random-access samples: an endless shuffled one, and a finite exact one."""

import signal
from collections.abc import Callable, Iterator, Sequence

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
  augment: Callable[[Batch, np.random.Generator], Batch] | None = None,
  mix: Callable[[Batch, Batch, np.random.Generator], Batch] | None = None,
  num_workers: int = 0,
  rows: Sequence[int] | None = None,
  skip: Sequence[tuple[int, int]] = (),
  start: int = 0,
) -> grain.DatasetIterator:
  """Returns an endless iterator of shuffled batches, with a new order in every epoch.

  Row r of batch k is a pure function of (seed, k, r): it depends on neither the workers nor the
  hosts. A host reads only its rows; those of all hosts together are the one-host batch. A batch may
  straddle two epochs, so no sample is ever dropped.

  Args:
    dataset: random-access samples, of equal shapes once they are augmented and mixed.
    batch_size: rows of a batch over all hosts together.
    seed: of the shuffle, not negative.
    augment: `(sample, generator) -> sample`. The generator is a function of the seed and of the
      sample's place in the stream, so every epoch draws anew. With workers it is pickled: a
      module's function, a record or a partial of one.
    mix: `(sample, partner, generator) -> sample`, of what `augment` gave. The partner of row r is
      row batch_size - 1 - r, also on a host that does not read it; the generator is a function of
      the seed and of k, so that all rows of a batch draw the same. With workers as `augment`.
    num_workers: processes that prepare batches; 0 is right for packed text, because starting
      workers takes seconds and slices of a memory map are cheap. Workers are spawned, so a
      script needs `if __name__ == "__main__":`.
    rows: the rows of a batch that this host reads, in this order: any of [0, batch_size), also such
      as another host reads. None: all.
    skip: ranges [a, b) of batches k that are left out; see `batch_of_step`.
    start: how many batches that are not left out are passed over: such as were taken before.

  Returns:
    A Grain iterator of batches with one row for each of `rows`. `get_state` and `set_state`
    resume it exactly, with the same `num_workers`, and `grain.checkpoint.CheckpointSave(iterator)`
    puts it into an Orbax checkpoint. Its state is the same on every host, whatever its rows, and
    says nothing of `skip` and `start`.

  Raises:
    ValueError: sizes do not fit, or the dataset has fewer samples than one batch.
  """
  rows = _checked_rows(rows, batch_size)
  if seed < 0:
    raise ValueError(f"{seed=} must not be negative")
  if len(dataset) < batch_size:
    raise ValueError(
      f"the training set has {len(dataset)} samples, fewer than {batch_size=}: use more data, "
      "a smaller batch or, of text, shorter sequences"
    )
  samples = grain.MapDataset.source(dataset).seed(seed).shuffle().repeat(_EPOCHS)
  if augment is not None:
    samples = samples.random_map(augment)
  left = len(samples) // batch_size - sum(end - begin for begin, end in skip)
  if left < 1:
    raise ValueError(f"{skip=} leaves no batch")
  batches = grain.MapDataset.range(start, left).map(lambda step: batch_of_step(step, skip))

  def batch(k: int) -> Batch:
    if mix is None:
      return _stack([samples[k * batch_size + row] for row in rows])
    partners = [batch_size - 1 - row for row in rows]
    whole = {row: samples[k * batch_size + row] for row in {*rows, *partners}}
    pairs = zip(rows, partners, strict=True)
    return _stack([mix(whole[a], whole[b], np.random.default_rng((seed, k))) for a, b in pairs])

  batches = batches.map(batch)
  iterable = batches.to_iter_dataset(grain.ReadOptions(**_READ_OPTIONS))
  if num_workers > 0:
    # Grain reads an absl flag here, which fails in notebooks and scripts that parse none.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=num_workers)
    iterable = iterable.mp_prefetch(options, worker_init_fn=_outlive_sigterm)
  return iter(iterable)


def batch_of_step(step: int, skip: Sequence[tuple[int, int]]) -> int:
  """The index of the batch that is the step-th, from 0, of those in none of the ranges [a, b).

  Ranges are in their order and do not touch, as `config.batch_ranges` gives them.
  """
  k = step
  for begin, end in skip:
    if k < begin:
      break
    k += end - begin
  return k


def eval_batches(
  dataset: Sequence[Batch], batch_size: int, *, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
  """Returns every sample once, in order, in batches of one shape.

  The last batch is filled up with rows of zeros, whose weights are therefore 0. Every host gets
  the same number of batches, so that collective evaluation steps stay in line.

  Args:
    dataset: random-access samples of equal shapes.
    batch_size: rows of a batch over all hosts together.
    rows: the rows of a batch that this host reads, as in `train_iterator`.

  Returns:
    A finite iterator of batches with one row for each of `rows`.

  Raises:
    ValueError: sizes do not fit, or the dataset is empty.
  """
  rows = _checked_rows(rows, batch_size)
  if not len(dataset):
    raise ValueError("the evaluation set has no samples")
  blank = {name: np.zeros_like(values) for name, values in dataset[0].items()}

  def sample(i: int) -> Batch:
    return dataset[i] if i < len(dataset) else blank

  starts = range(0, len(dataset), batch_size)
  return (_stack([sample(start + row) for row in rows]) for start in starts)


def _outlive_sigterm(worker: int, workers: int) -> None:
  """A launcher may signal every process of a host; the run still needs batches, and then ends us.

  Grain ends its workers by other means.
  """
  del worker, workers
  signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _checked_rows(rows: Sequence[int] | None, batch_size: int) -> tuple[int, ...]:
  if batch_size < 1:
    raise ValueError(f"{batch_size=} must be at least 1")
  rows = tuple(range(batch_size) if rows is None else map(int, rows))
  if not rows or not 0 <= min(rows) <= max(rows) < batch_size:
    raise ValueError(f"{rows=} must be some of the rows of a batch, [0, {batch_size=})")
  return rows


def _stack(samples: Sequence[Batch]) -> Batch:
  return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
