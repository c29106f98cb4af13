"""SIGTERM and dead hosts: the short forms of benchmarks.reliability's trials."""

import pytest

from benchmarks.reliability import preemption


@pytest.mark.ci
def test_a_run_of_two_hosts_of_which_one_is_told_to_stop_saves_and_goes_on(tmp_path):
  """One host: tests/test_training.py."""
  row = preemption.preempted(2, 1, 0, tmp_path)
  assert row.held, row


@pytest.mark.slow
@pytest.mark.parametrize("processes, signals", [(1, 12), (2, 9), (4, 6)])
def test_a_run_that_is_told_to_stop_often_saves_and_goes_on(processes, signals, tmp_path):
  row = preemption.preempted(processes, signals, 1, tmp_path)
  assert row.held, row


@pytest.mark.slow
@pytest.mark.parametrize("processes, kills", [(2, 4), (4, 2)])
def test_a_dead_host_ends_the_others_and_the_run_goes_on(processes, kills, tmp_path):
  row = preemption.dead_hosts(processes, kills, 0, tmp_path)
  assert row.held, row
