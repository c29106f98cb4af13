"""`python -m magneto_jax.kernels.check`."""

import re
import subprocess
import sys

import jax
import pytest

from magneto_jax.kernels import attention, check, command_line, conformance
from tests.kernels.implementations import Mistaken

SMALL = dict(T=4, S=4, N=2, K=2, H=4)
TWO = (
  conformance.Case("first", **SMALL),
  conformance.Case("second", **SMALL, is_causal=True, dtype="bfloat16"),
)


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setattr(conformance, "SUITE", TWO)
  monkeypatch.setattr(conformance, "QUICK", TWO[:1])


def test_one_line_a_case_and_a_summary(small, capsys):
  """Of all that run on this platform, if none is named."""
  assert check.main([]) == 0
  lines = capsys.readouterr().out.splitlines()
  names = ["xla_chunked", "xla"] if jax.default_backend() == "cpu" else []
  for name, block in zip(names, (lines[:5], lines[5:]), strict=True):
    assert block[0] == f"{name} on {jax.devices()[0].device_kind}: 2 cases"
    assert re.fullmatch(r"  first: passed: out \S+ lse \S+ dq \S+ dk \S+ dv \S+", block[1])
    assert block[2].startswith("  second: passed: ")
    assert f"jax {jax.__version__}: 2 passed, " in block[3] and block[3].endswith(" s")
    assert block[4].startswith(f"to record it: ('{name}', 'cpu', '{jax.__version__}', '20")


def test_quick_is_a_part_and_records_nothing(small, capsys):
  assert check.main(["--quick", "--implementation=xla"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 3 and "1 passed" in lines[-1]


@pytest.mark.parametrize(
  "flag, error",
  [
    ("--jobs=0", "--jobs=0 must be at least 1"),
    ("--jobs=x", "argument --jobs: invalid int value: 'x'"),
    ("--implementaton=xla", "--implementaton=xla; did you mean --implementation?"),
    ("--fast", "unrecognized arguments: --fast; python -m magneto_jax.kernels.check --help lists"),
    ("--implementation=cudnn", "--implementation='cudnn' does not run on a cpu"),
  ],
)
def test_bad_flags_get_one_line(flag, error, capsys):
  try:
    status = check.main([flag])
  except SystemExit as stop:
    status = stop.code
  said = capsys.readouterr()
  assert (status, said.out) == (2, "") and error in said.err
  assert said.err.startswith("error: ") and said.err.count("\n") == 1


@pytest.mark.parametrize(
  "error, status, line",
  [
    (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(28, "No space left on device", "t.json"), 2, "No space left on device: 't.json'"),
    (MemoryError("17 TiB"), 2, "17 TiB; measure a smaller call, of a smaller batch or length"),
  ],
)
def test_what_ends_a_command_is_told_in_a_line(error, status, line, capsys, monkeypatch):
  """With `--debug` after its traceback."""

  def main():
    raise error

  assert command_line.run(main) == status
  said = capsys.readouterr().err
  assert line in said and said.startswith("error: ") and said.count("\n") == 1
  monkeypatch.setattr(sys, "argv", ["check", "--debug"])
  assert command_line.run(main) == status
  loud = capsys.readouterr().err
  assert loud.startswith("Traceback") and loud.endswith(said)
  assert command_line.run(lambda: None) == 0


def test_what_refuses_every_case_is_not_recorded(small, monkeypatch, capsys):
  monkeypatch.setitem(attention.IMPLEMENTATIONS, "picky", Mistaken("refuses", None))
  assert check.main(["--implementation=picky"]) == 0
  assert "to record it" not in capsys.readouterr().out


@pytest.mark.slow
def test_processes_share_the_cases():
  command = [sys.executable, "-m", "magneto_jax.kernels.check", "--quick", "--implementation=xla"]
  result = subprocess.run([*command, "--jobs=2"], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  names = [case.name for case in conformance.QUICK]
  assert [line.strip().rsplit(": passed: ", 1)[0] for line in lines[1:-1]] == names


@pytest.mark.parametrize(
  "mistake, line, count",
  [
    ("scales", "first: FAILED: out", "2 FAILED"),
    ("does not compile", "first: FAILED: ValueError: unknown device", "2 FAILED"),
  ],
)
def test_a_failure_is_the_exit_status(small, monkeypatch, capsys, mistake, line, count):
  """Also if it raises; the other cases run all the same."""
  monkeypatch.setitem(attention.IMPLEMENTATIONS, "wrong", Mistaken(mistake, None))
  assert check.main(["--implementation=xla", "--implementation=wrong"]) == 1
  out = capsys.readouterr().out
  assert line in out and count in out and "jax" in out
  assert "to record it: ('xla'" in out and "('wrong'" not in out


def test_refusals_are_no_failures(small, monkeypatch, capsys):
  monkeypatch.setitem(attention.IMPLEMENTATIONS, "picky", Mistaken("refuses", None))
  assert check.main(["--implementation=picky"]) == 0
  out = capsys.readouterr().out
  assert "first: refused: mistaken cannot serve this call: it needs a head dim of 77" in out
  assert "2 refused" in out


def test_an_unknown_name_is_one_line():
  command = [sys.executable, "-m", "magneto_jax.kernels.check", "--implementation=cudda"]
  result = subprocess.run(command, capture_output=True, text=True)
  assert result.returncode == 2
  assert result.stdout == ""
  expected = f"error: --implementation='cudda' is not one of {list(attention.IMPLEMENTATIONS)}\n"
  assert result.stderr == expected
