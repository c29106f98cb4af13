"""Spikes against their definition."""

import math

import numpy as np
import pytest

from magneto_jax.config import TrainConfig, from_config_dict
from magneto_jax.spikes import Diverged, Watch, restart


def spiking(config) -> TrainConfig:
  """The config with a spike's rules, which ask for checkpoints as old."""
  rules = {"factor": 9, "window": 8, "rewind_steps": 100, "skip_batches": 200}
  return from_config_dict({"checkpoint_every": 50, "keep_checkpoints": 3, "spike": rules, **config})


def test_a_spike_is_far_above_the_median_of_the_last_values():
  """In NumPy, for both values, with outliers among them that are none."""
  rng = np.random.default_rng(0)
  series = rng.normal(size=(300, 2)) + np.linspace(5, 2, 300)[:, None]
  series[::37] += 3
  watch, found, expected = Watch(3.0, 16), [], []
  last = [[], []]
  for values in series:
    found.append(watch.spike(*values))
    over = []
    for i, value in enumerate(values):
      window = np.array(last[i][-16:])
      middle = np.median(window) if len(window) else math.nan
      over.append(len(window) == 16 and value > middle + 3 * np.median(np.abs(window - middle)))
      if over[-1]:
        break  # The run goes back, so that nothing is compared with it.
      last[i].append(value)
    expected.append(over)
  assert [bool(text) for text in found] == [any(over) for over in expected]
  assert 5 < sum(map(any, expected)) < 150
  assert any(text and text.startswith("gradient norm") for text in found)


def test_without_a_factor_nothing_is_a_spike():
  watch = Watch(0.0, 8)
  assert not any(watch.spike(loss, 1.0) for loss in [1.0] * 20 + [1e30])


@pytest.mark.parametrize(
  "step, checkpoints, skipped, found",
  [
    (312, [200, 250, 300], "", (200, "200:400")),
    (300, [200, 250, 300], "", (200, "200:400")),
    (299, [100, 150, 200, 250], "", (150, "150:350")),
    (90, [50], "", (0, "0:200")),
    (130, [50, 100], "", (0, "0:200")),
    # Step s is batch s + 99 by then: what is left out is counted in batches, up to the spike's.
    (312, [200, 250, 300], "100:200", (200, "300:500")),
    (700, [200, 650], "", (200, "200:700")),
  ],
)
def test_a_run_starts_anew_from_an_old_checkpoint_without_the_batches_since(
  step, checkpoints, skipped, found
):
  assert restart(step, checkpoints, spiking({"skip_batches": skipped})) == found


def test_without_an_old_checkpoint_the_run_ends():
  with pytest.raises(Diverged, match="no checkpoint from 100 steps before is kept, only 250, 300"):
    restart(312, [250, 300], spiking({}))
