"""Faults of numbers, in a short form; `benchmarks/reliability/numbers.py` has what is done."""

import pytest

from benchmarks.reliability import numbers


@pytest.mark.ci
@pytest.mark.parametrize(
  "trial, size", [(numbers.skipped, 5), (numbers.ended, 12), (numbers.rewound, 100)]
)
def test_numbers_that_go_wrong(trial, size, tmp_path):
  row = trial(size, 0, tmp_path)
  assert row.held, row


@pytest.mark.slow
def test_every_step_of_fifty_may_go_wrong(tmp_path):
  row = numbers.skipped(50, 1, tmp_path)
  assert row.held, row
