"""Faults of numbers, in a short form; `benchmarks/reliability/numbers.py` has what is done."""

import pytest

from benchmarks.reliability import numbers


@pytest.mark.parametrize(
  "trial, size",
  [
    pytest.param(numbers.skipped, 5, marks=pytest.mark.ci),
    pytest.param(numbers.skipped, 50, marks=pytest.mark.slow),
    pytest.param(numbers.ended, 12, marks=pytest.mark.ci),
    pytest.param(numbers.rewound, 100, marks=pytest.mark.slow),
  ],
)
def test_numbers_that_go_wrong(trial, size, tmp_path):
  row = trial(size, 0, tmp_path)
  assert row.held, row
