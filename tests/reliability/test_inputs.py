"""Damaged, hostile and misspelt inputs: R10, R11 and R12, in short and in full."""

import random

import pytest

from benchmarks.reliability import inputs


def held(row):
  assert row.held, row.details


@pytest.mark.ci
def test_damaged_shards_token_files_and_texts(tmp_path):
  held(inputs.mutated_shards(20, 0, tmp_path))


@pytest.mark.ci
def test_hostile_files(tmp_path):
  held(inputs.hostile_files(1, 0, tmp_path))


@pytest.mark.ci
def test_misspelt_fields(tmp_path):
  held(inputs.misspelt_fields(1, 0, tmp_path))


@pytest.mark.slow
def test_records_that_are_left_out(tmp_path):
  held(inputs.skipped_records(300, 0, tmp_path))


@pytest.mark.slow
def test_all_in_full(tmp_path):
  for trial, size in {
    inputs.mutated_shards: 300,
    inputs.misspelt_fields: 20,
    inputs.hostile_files: 20,
  }.items():
    folder = tmp_path / trial.__name__
    folder.mkdir()
    held(trial(size, 1, folder))


def crash():
  import os

  os.abort()


def sleep():
  import time

  time.sleep(60)


def fail():
  raise KeyError("what no command expects")


@pytest.mark.ci
def test_a_reader_outlives_what_it_calls(monkeypatch):
  """A crash, a hang and an unexpected error are told apart; the next call is answered."""
  with inputs.Reader() as read:
    assert read(len, "abc") == ("read", 3)
    monkeypatch.setattr(inputs, "_PATIENCE", 0.5)
    assert read(sleep).kind == "hang"
    monkeypatch.setattr(inputs, "_PATIENCE", 60)
    assert read(crash).kind == "crash"
    assert read(fail) == ("traceback", "KeyError: 'what no command expects'")
    assert read(int, "x").kind == "refused"


def test_mutations_change_files(tmp_path):
  path, draw = tmp_path / "file", random.Random(0)
  for kind in inputs.MUTATIONS:
    path.write_bytes(bytes(range(1, 200)))
    inputs.mutate(path, kind, draw)
    assert not path.exists() or path.read_bytes() != bytes(range(1, 200)), kind
