"""Spikes of the loss: how they are noticed, and from where a run starts anew."""

import collections
import statistics
from collections.abc import Mapping, Sequence

from magneto_jax.config import TrainConfig, batch_ranges
from magneto_jax.data import pipelines


class Diverged(FloatingPointError):
  """Numbers gone wrong, and a run that does not mend them by itself; its checkpoints are kept."""


class Watch:
  """Notices a loss or a gradient norm that is far above the last ones.

  With m the median of the last `window` values, x is a spike if

    x > m + factor * median_i |x_i - m|

  Median and median deviation are not moved by what is far off itself. There is none before
  `window` steps have been taken, and none of steps that were skipped, whose values are not finite.
  A run that goes on takes the values along (`values`): it notices what it would have noticed.
  """

  def __init__(self, factor: float, window: int):
    self._factor, self._window = factor, window
    self._last = {name: collections.deque(maxlen=window) for name in ("loss", "gradient norm")}

  @property
  def values(self) -> dict[str, list[float]]:
    """The last ones, by name."""
    return {name: list(last) for name, last in self._last.items()}

  def restore(self, values: Mapping[str, Sequence[float]]) -> None:
    """Goes on from the values of an earlier watch, or as many of the last as it looks at."""
    for name, last in self._last.items():
      last.clear()
      last.extend(map(float, values.get(name, ())))

  def spike(self, loss: float, gradient_norm: float) -> str | None:
    """Takes the next step's values; if they are a spike, what is, in words."""
    if not self._factor:
      return None
    for (name, last), value in zip(self._last.items(), (loss, gradient_norm), strict=True):
      if len(last) == self._window:
        median = statistics.median(last)
        deviation = statistics.median(abs(x - median) for x in last)
        if value > median + self._factor * deviation:
          return f"{name} {value:.4g}, after {median:.4g} +- {deviation:.2g}"
      last.append(value)
    return None


def restart(step: int, checkpoints: Sequence[int], config: TrainConfig) -> tuple[int, str]:
  """From where to go on after a spike, and without which batches.

  As PaLM did (arXiv 2204.02311, section 5.1): from some 100 steps before, without 200 to 500
  batches, those before and during the spike.

  Args:
    step: of the spike.
    checkpoints: the steps that are kept.
    config: of the run, with all batches that it leaves out already.

  Returns:
    The newest checkpoint that is at least `spike.rewind_steps` older, 0 for the run's start; and a
    range of batches: `spike.skip_batches` from the first one after the checkpoint, and as many more
    as there are up to the spike's own.

  Raises:
    Diverged: if no checkpoint as old is kept.
  """
  latest = step - config.spike.rewind_steps
  start = max((kept for kept in checkpoints if kept <= latest), default=0)
  if not start and latest >= config.checkpoint_every:
    raise Diverged(
      f"a spike at step {step}, and no checkpoint from {config.spike.rewind_steps} steps before is"
      f" kept, only {', '.join(map(str, checkpoints))}: set keep_checkpoints to more"
    )
  ranges = batch_ranges(config.skip_batches)
  first = pipelines.batch_of_step(start, ranges)
  spikes = pipelines.batch_of_step(step - 1, ranges)
  return start, f"{first}:{max(first + config.spike.skip_batches, spikes + 1)}"
