"""The command that times block sizes: what it tries, prints and refuses, but no times."""

import json

import jax.numpy as jnp
import pytest

from magneto_jax import kernels
from magneto_jax.kernels import tune

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
  ],
)
def test_bad_flags_get_one_line(flags, error, capsys):
  with pytest.raises(SystemExit) as stop:
    tune.main(flags)
  said = capsys.readouterr().err
  assert stop.value.code == 2 and error in said and said.count("\n") == 1
