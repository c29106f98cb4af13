"""The command that times block sizes: what it tries, prints and refuses, but no times."""

import dataclasses
import functools
import json

import jax.numpy as jnp
import pytest

from magneto_jax import kernels
from magneto_jax.kernels import attention_gpu, tune, tune_gpu

TINY = ["--length=48", "--heads=2", "--head-dim=8", "--rounds=2"]


def test_fastest_record_is_an_expression_that_serves_the_call(tmp_path, capsys):
  path = tmp_path / "new" / "tuned.json"
  flags = ["--sides=16,64,128", "--kv-heads=1", "--causal", "--relative", "--dropout=0.1"]
  tune.main([*TINY, *flags, "--implementation=xla_chunked", f"--output={path}"])
  *_, last = capsys.readouterr().out.splitlines()
  results = json.loads(path.read_text(encoding="utf-8"))
  assert last == f"implementation={results['fastest']}"
  # 128 covers the length as 64 does, and is not tried again.
  tried = {f"kernels.{kernels.XlaChunked(q, kv)!r}" for q in (16, 64) for kv in (16, 64)}
  assert tried == set(results["milliseconds"])
  assert all(
    len(times[name]) == 2 and min(times[name]) > 0
    for times in results["milliseconds"].values()
    for name in ("forward", "both")
  )


def test_device_decides_what_is_tuned(capsys):
  tune.main([*TINY, "--sides=16"])
  x = jnp.ones((1, 48, 2, 8))
  serving = kernels.choose(x, x, x).default
  assert f"implementation=kernels.{type(serving).__name__}(" in capsys.readouterr().out


@pytest.mark.parametrize(
  "flags, error",
  [
    (["--heads=3", "--kv-heads=2"], "N=3 query heads must be a multiple of K=2"),
    (["--length=0"], "'0' is not a positive integer"),
    (["--dropout=1"], "must lie in [0, 1)"),
    (["--sides=16,x"], "'x' is not a positive integer"),
    (["--dtype=int8"], "invalid choice: 'int8'"),
    (["--lenght=8"], "unrecognized arguments: --lenght=8"),
    (["--write"], "--write needs an NVIDIA GPU, and this is a cpu"),
    (["--output=/dev/null/x.json"], "--output=/dev/null/x.json: File exists"),
    (["--implementation=pallas_gpu"], "pallas_gpu runs on cuda, and this is compiled for cpu"),
  ],
)
def test_bad_flags_get_one_line(flags, error, capsys):
  with pytest.raises(SystemExit) as stop:
    tune.main(flags)
  said = capsys.readouterr().err
  assert stop.value.code == 2 and error in said and said.count("\n") == 1


SHAPE = tune_gpu.Shape(batch=1, length=96, heads=2, kv_heads=1, head_dim=16, is_causal=True)


@pytest.mark.parametrize("feature", ["none", "relative", "dense"])
def test_what_is_tried_of_a_kernel_can_be(feature):
  """Every candidate serves the standard calls as it is, and there is a choice of each."""
  for shape in tune_gpu.STANDARD:
    if shape.feature != feature:
      continue
    for name in attention_gpu.KERNELS:
      tried = list(tune_gpu.candidates(name, shape))
      assert len(set(tried)) == len(tried) > 0
      for blocks in tried:
        sides = {"q": blocks.q, "kv": blocks.kv}
        assert max(sides.values()) <= 128 and min(sides.values()) >= 32
        if name == "dbias" and feature == "relative":
          assert blocks.q == blocks.kv


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["none", "relative", "dense"])
def test_each_kernel_is_timed_by_itself(feature, monkeypatch, tmp_path):
  """Interpreted: that the kernels get what they need, and every round has its time."""
  interpreted = functools.partial(kernels.PallasGpu, interpret=True)
  monkeypatch.setattr(tune_gpu, "PallasGpu", interpreted)
  shape = dataclasses.replace(SHAPE, feature=feature, dropout_rate=0.1)
  for name in attention_gpu.KERNELS:
    if name == "dbias" and feature == "none":
      continue
    blocks = kernels.Blocks(32, 32)
    times = tune_gpu.measure(shape, name, blocks, rounds=2, lock=str(tmp_path / "lock"))
    assert len(times) == 2 and min(times) > 0


def test_the_fastest_of_each_kernel_are_written(tmp_path):
  """Into a table that others are in as well; what did not run is not taken."""
  path = tmp_path / "table.json"
  path.write_text('{"": {}, "8.0": {"64": {"none": {"out": [16, 16, 1, 1]}}}}', encoding="utf-8")
  slow, fast, wrong = (kernels.Blocks(64, 64, 4, n) for n in (1, 2, 3))
  found = {slow: [2.0, 2.0, 9.0], fast: [8.0, 1.0, 1.0], wrong: "XlaRuntimeError: too large"}
  tune_gpu.write({SHAPE: {"out": found, "dkv": {wrong: "no"}}}, "9.0", path)
  assert json.loads(path.read_text(encoding="utf-8")) == {
    "": {},
    "8.0": {"64": {"none": {"out": [16, 16, 1, 1]}}},
    "9.0": {"64": {"none": {"out": [64, 64, 4, 2]}}},
  }


def test_the_table_is_as_it_would_be_written(tmp_path):
  """So that `--write` changes the lines of its device alone."""
  path = tmp_path / "table.json"
  path.write_bytes(attention_gpu.TABLE.read_bytes())
  tune_gpu.write({}, "9.0", path)
  assert path.read_bytes() == attention_gpu.TABLE.read_bytes()
