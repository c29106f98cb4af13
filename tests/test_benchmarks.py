"""The benchmarks run, on our side alone and at toy sizes, and write what their readers expect.

Nothing is said about speed here: that needs a machine of its own.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import attention, breakdown, tpu_static_cost
from benchmarks.shapes import Attention

ROOT = pathlib.Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.ci


def results(
  name: str, tmp_path: pathlib.Path, *arguments: str, shape: str | None = "smoke"
) -> dict:
  """Runs `python -m benchmarks.NAME` as a person does; returns the JSON it wrote."""
  path = tmp_path / "results.json"
  command = [sys.executable, "-m", f"benchmarks.{name}", f"--output={path}", "--rounds=2"]
  command += [f"--shape={shape}"] * (shape is not None) + [*arguments]
  subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=240)

  def refuse(constant):
    raise ValueError(f"{constant} is no JSON")

  return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.mark.parametrize("shape", ["smoke", "smoke-encoder"])
def test_train_step(tmp_path, shape):
  arguments = ("--variants=magneto_jax", "--steps=2", f"--shape={shape}")
  written = results("train_step", tmp_path, *arguments)
  assert {"date", "machine", "environment", "git_commit", "command", "shape"} <= set(written)
  (ours,) = written["variants"].values()
  assert len(ours["rounds"]) == 2
  assert all(len(turns["step"]["wall_ms"]) == 2 for turns in ours["rounds"])
  # The same batch each time: the loss falls, so the step does train.
  losses = [loss for turns in ours["rounds"] for loss in turns["step"]["value"]]
  assert losses[-1] < ours["first"]["step"]["value"][0]
  assert written["summary"]["magneto_jax"]["tokens_per_second"] > 0


def test_decode(tmp_path):
  arguments = ("--variants=magneto_jax", "--batch_sizes=1,2", "--prompt_length=4")
  written = results("decode", tmp_path, *arguments, "--new_tokens=3")
  (ours,) = written["variants"].values()
  assert [ours["first"][call]["value"] for call in ("batch 1", "batch 2")] == [[3], [6]]


def test_compile_time(tmp_path):
  written = results("compile_time", tmp_path, "--depths=2,4")
  assert set(written["time"]) == {"2", "4"}
  assert set(written["remat"]["4"]) == {"none", "dots", "full"}
  assert written["summary"]["deepest_over_shallowest"]["median"] > 0


@pytest.mark.parametrize("shape", ["smoke", "smoke-encoder"])
def test_breakdown(tmp_path, shape):
  written = results("breakdown", tmp_path, f"--shape={shape}", "--calls=1")
  assert set(written["summary"]) >= {"step", "of which forward", "optimizer"}
  assert all(len(turns) == 2 for turns in written["parts"].values())


def test_attention(tmp_path):
  """This library beside jax.nn, which needs no torch: figures, or why there are none."""
  arguments = ("--variants=magneto_jax,jax.nn-xla", "--lengths=32", "--head-dim=8")
  written = results("attention", tmp_path, *arguments, shape=None)
  assert {"date", "machine", "environment", "git_commit", "command", "shape"} <= set(written)
  assert (tmp_path / "results.png").stat().st_size > 0
  cells = {(c["variant"], c["length"], c["bias"], c["dropout"] > 0): c for c in written["summary"]}
  assert len(cells) == len(written["summary"]) == 2 * 2 * 2
  for (variant, length, _, has_dropout), cell in cells.items():
    if variant == "jax.nn-xla" and has_dropout:
      assert "no dropout" in cell["refused"] and "forward" not in cell
      continue
    for call in ("forward", "gradient"):
      assert cell[call]["wall_ms"] > 0 and cell[call]["share_of_peak"] > 0
    assert cell["gradient"]["peak_memory_mib"] * 2**20 > 4 * length * 8  # One head's queries.
    assert ("ours_over" in cell["gradient"]) == (variant == "jax.nn-xla")


def test_attention_counts_its_products():
  """Two products of T x T x H a head, and twice as many backward."""
  flops = Attention(batch=3, length=5, heads=2, head_dim=7).flops
  assert flops == {
    "forward": 3 * 2 * 2 * (2 * 5 * 5 * 7),
    "gradient": 3 * 3 * 2 * 2 * (2 * 5 * 5 * 7),
  }


def test_attention_refuses_another_computation():
  """A variant that computes something else is not compared; dropout may differ."""
  case = Attention(batch=1, length=4, heads=1, head_dim=8)
  pair = {"ours": {"norms": [1.0, 2.0]}, "theirs": {"norms": [1.0, 2.01]}}
  with pytest.raises(RuntimeError, match="theirs computes something else"):
    attention.check_agreement(pair, case)
  attention.check_agreement(pair, dataclasses.replace(case, dropout=0.1))
  attention.check_agreement({**pair, "theirs": pair["ours"]}, case)


def test_breakdown_adds_up():
  """Of a step of 100 ms with 4 layers; the rest is not accounted for."""
  times = dict(step=100, gradient=80, forward=30, layers_gradient=50, attention_gradient=3)
  turns = {part: [{"wall_ms": [ms, ms]}] for part, ms in {**times, "optimizer": 7}.items()}
  rows = {name: row["ms"] for name, row in breakdown.summary(turns, layers=4).items()}
  assert rows == {
    "step": 100,
    "of which forward": 30,
    "embedding, output and loss": 80 - 50,
    "attention, without its projections": 4 * 3,
    "the other parts of the layers": 50 - 4 * 3,
    "optimizer": 7,
    "not accounted for": 100 - 80 - 7,
  }


def test_tpu_static_cost(tmp_path):
  """Our kernels beside splash's, from the compiler's own dump."""
  path = tmp_path / "cost.json"
  command = [sys.executable, "-m", "benchmarks.tpu_static_cost", f"--output={path}"]
  command += ["--head-dim=64", "--features=base,causal", "--blocks=128x128"]
  command += ["--libraries=magneto_jax,splash"]
  # Splash attention neither compiles at the tests' precision of products, nor traces without adding
  # a row to a matrix, which they forbid.
  environment = {name: x for name, x in os.environ.items() if not name.startswith("JAX_")}
  said = subprocess.run(
    command, check=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
  )
  assert tpu_static_cost.BOUND in said.stdout
  written = json.loads(path.read_text(encoding="utf-8"))
  assert {"git_commit", "versions", "topology", "shape", "meaning"} <= set(written)
  found = {(x["library"], x["feature"], x["kernel"]): x for x in written["kernels"]}
  for kernel in ("attention_forward", "attention_backward"):
    base = found["magneto_jax", "base", kernel]
    causal = found["magneto_jax", "causal", kernel]
    (full,), (same, masked) = base["bodies"], causal["bodies"]
    # A block that is seen whole costs the same with a mask or without; one seen in part costs more.
    assert abs(full["bundles"] - same["bundles"]) < 0.1 * full["bundles"]
    assert masked["slots"]["VALU"] > same["slots"]["VALU"]
    assert base["bundles"] > full["bundles"] > full["mxu_span"] > 0
    assert full["milli_bundles_per_pair"] == 1000 * full["bundles"] / (2 * 128 * 128)
  assert sum(library == "splash" for library, _, _ in found) == 4


def test_tpu_static_cost_finds_straight_runs():
  """As the compiler writes them: a bundle a line, its address in hexadecimal, a mark, a colon."""
  text = "LH: loop header\n= control\n 0   :  { nop }\n 0x1   : > { x }\n 0x2 PF: > { sbr.rel }\n"
  text += " 0x3   :  { y }\n 0x4   : > { sbr.rel (!%p) }\n 0x5   :  { z }\n"
  assert tpu_static_cost.straight_runs(text, 6) == [(0, 2), (2, 4), (4, 6)]
  columns, rows = tpu_static_cost.utilization(
    "== A\nMXU, VSTORE:SPILL\n 4 1\n== B\n0 1\n2 0\n0 1\n"
  )
  assert (columns, rows) == (["MXU", "VSTORE:SPILL"], [[0, 1], [2, 0], [0, 1]])
  assert tpu_static_cost.body(columns, rows) == {
    "bundles": 3,
    "mxu_span": 1,
    "spills": 2,
    "slots": {"MXU": 2, "VSTORE:SPILL": 2},
  }
