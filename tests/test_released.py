"""Checkpoints of every released version, as `tests.make_checkpoint_fixture` has kept them."""

import dataclasses
import importlib.metadata
import json
import shutil

import jax
import numpy as np
import pytest

from benchmarks.reliability import states
from magneto_jax import runs, training
from tests import make_checkpoint_fixture

VERSIONS = sorted(make_checkpoint_fixture.FOLDER.iterdir())


def test_this_version_has_left_one():
  """`python -m tests.make_checkpoint_fixture` makes it; those of earlier versions stay."""
  assert importlib.metadata.version("magneto_jax") in [folder.name for folder in VERSIONS]


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_a_released_versions_checkpoint_is_read_bit_for_bit(folder):
  step = runs.last_step(folder / "run")
  arrays = states.arrays(folder / "run", step)
  expected = json.loads((folder / "expected.json").read_text())
  assert make_checkpoint_fixture.hashes(arrays) == expected
  _, variables = runs.load(folder / "run")
  jax.tree.map(np.testing.assert_array_equal, variables["params"], arrays["params"])


@pytest.mark.ci
@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_a_released_versions_run_goes_on(folder, tmp_path):
  shutil.copytree(folder / "run", tmp_path / "run")
  config = runs.read_record(tmp_path / "run").config
  done = runs.last_step(tmp_path / "run")
  summary = training.train(dataclasses.replace(config, steps=done + 1), tmp_path / "run")
  assert (summary["resumed_at_step"], runs.last_step(tmp_path / "run")) == (done, done + 1)
