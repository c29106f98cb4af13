"""The benchmarks run, on our side alone and at toy sizes, and write what their readers expect.

Nothing is said about speed here: that needs a machine of its own.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import (
  attention,
  attention_gpu,
  breakdown,
  coordinator,
  plans,
  speech_baselines,
  text_baselines,
  tpu_static_cost,
  train_step_gpu,
  transducer,
)
from benchmarks.shapes import Attention
from magneto_jax.data.labelled import Row
from tests.kernels import elsewhere

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


def test_transducer(tmp_path):
  """All three ways, which agree, with figures of each."""
  written = results("transducer", tmp_path, "--smoke", shape=None)
  assert {"date", "machine", "environment", "git_commit", "command"} <= set(written)
  cells = {cell["variant"]: cell for cell in written["summary"]}
  assert list(cells) == ["autodiff", "logits", "fused"]
  for name, cell in cells.items():
    assert cell["wall_ms"] > 0 and cell["peak_memory_mib"] > 0
    assert ("over_baseline" in cell) == (name != "autodiff")


def test_a_transducer_s_marks_are_of_what_load_does_not_change():
  """Memory and CPU time; those on record are of the figures beside them."""
  path = ROOT / "benchmarks" / "results" / "transducer-cpu-2026-11-28.json"
  recorded = json.loads(path.read_text())
  assert transducer.marks(recorded["summary"]) == recorded["marks"]
  assert len(recorded["marks"]) == 2 and "CPU time" in recorded["marks"][1]["name"]


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


def options(tmp_path: pathlib.Path, **changed) -> argparse.Namespace:
  """The command lines of a GPU's benchmarks, short; `platform="cpu"` then runs them here."""
  given = dict(output=tmp_path / "results.json", rounds=2, threads=1, variants=None)
  attend = dict(cases="", quick=False, memory_gib=1.0, seconds=None)
  train = dict(shape="smoke", steps=2, batch=None, torch_batch=None, remat="dots", unroll=1)
  train |= dict(segments=False, implementation=None)
  return argparse.Namespace(**given | attend | train | changed)


def test_attention_gpu(tmp_path, monkeypatch):
  """Figures of what runs, the reason of what does not; all that compute the same agree."""
  monkeypatch.setattr(attention_gpu, "TURN_MS", 1)
  plain = Attention(batch=2, length=32, heads=2, head_dim=8, causal=False, dtype="bfloat16")
  features = dict(bias=True, bias_gradient=True, padding=True)
  cases = [plain, dataclasses.replace(plain, causal=True, **features)]
  variants = "magneto_jax,magneto_jax:dense,jax.nn-xla,magneto_jax-pallas_tpu"
  arguments = options(tmp_path, variants=variants)
  written = json.loads(attention_gpu.run(arguments, cases, platform="cpu").read_text())
  assert {"date", "driver", "versions", "git_commit", "device", "environment"} <= set(written)
  assert {cell["case"] for cell in written["summary"]} == {
    "T32 H8 B2 full plain",
    "T32 H8 B2 causal bias+gradient+padding",
  }
  for cell in written["summary"]:
    assert "failed" not in cell
    assert ("refused" in cell) == (cell["variant"] == "magneto_jax-pallas_tpu")
    for call in () if "refused" in cell else ("forward", "gradient"):
      assert 0 < cell[call]["min_ms"] <= cell[call]["ms"] <= cell[call]["max_ms"]
      assert cell[call]["share_of_peak"] > 0 and cell[call]["memory_mib"] > 0
  assert (tmp_path / "results.png").stat().st_size > 0


class _Fragile:
  """A process that answers until it is asked for one call of one variant."""

  def __init__(self, fatal: str = ""):
    self.fatal, self.starts = fatal, 1

  def ask(self, method, variants=(), variant="", call="", **_):
    if variant and variant == self.fatal and (method, call) == ("turn", "gradient"):
      raise RuntimeError("Traceback\nlost")
    if method == "compile":
      return {name: {"memory_mib": {"forward": 1.0, "gradient": 1.0}} for name in variants}
    answer = {"norms": [1.0] * 4, "ms": {"forward": 1.0, "gradient": 1.0}}
    return answer if method == "check" else {"wall_ms": 1.0, "queue_ms": 0.1}

  def restart(self):
    self.starts += 1


def test_attention_gpu_outlives_a_lost_process():
  """A variant that fails in its turn says why and drops out, and all others take all theirs."""
  case = Attention(batch=1, length=4, heads=1, head_dim=8)
  devices = {"a": _Fragile(fatal="a:dense"), "b": _Fragile()}
  names = ["a", "a:dense", "b"]
  found = attention_gpu.Measurement(devices, case, names, memory_gib=1.0).run(rounds=3)
  assert found["a:dense"]["failed"] == "lost"
  assert [len(found[name]["rounds"]) for name in ("a", "b")] == [3, 3]
  assert (devices["a"].starts, devices["b"].starts) == (2, 1)
  cells = attention_gpu.summary(case, found, peak=1.0)
  assert [("failed" in cell, "gradient" in cell) for cell in cells] == [
    (False, True),
    (True, False),
    (False, True),
  ]


def test_attention_gpu_drops_another_computation():
  case = Attention(batch=1, length=4, heads=1, head_dim=8)
  results = {name: {"norms": [1.0, x]} for name, x in (("a", 2.0), ("b", 2.0), ("c", 2.2))}
  attention_gpu.check_agreement(results, case)
  assert [name for name, result in results.items() if "failed" in result] == ["c"]


def test_attention_gpu_marks():
  """Each mark is of the fastest of the others, in the cases that it names."""

  def cell(case, variant, ms):
    return {"case": case, "variant": variant} | {
      call: {"ms": ms} for call in ("forward", "gradient")
    }

  cells = [
    cell("T8 H8 B1 full plain", "magneto_jax", 10.0),
    cell("T8 H8 B1 full plain", "jax.nn-cudnn", 8.0),
    cell("T8 H8 B1 full bias", "magneto_jax", 1.0),
    cell("T8 H8 B1 full bias", "jax.nn-cudnn", 1.0),
    cell("T8 H8 B1 full bias+gradient", "magneto_jax", 1.0),
    cell("T8 H8 B1 full bias+gradient", "tokamax-mosaic", 1.5),
    cell("T8 H8 B1 full bias+gradient", "tokamax-triton", 1.1),
  ]
  found = [(entry["value"], entry["bound"], entry["met"]) for entry in attention_gpu.marks(cells)]
  assert found == [(0.8, 0.9, False), (0.8, 0.9, False), (1.1, 1.2, False)]


def test_attention_counts_what_is_visible():
  """Of 4 x 4 pairs a causal mask leaves 10; rows of 4 and 2 keys leave 16 and 8, or 10 and 7."""
  case = Attention(batch=2, length=4, heads=1, head_dim=8, causal=False)
  shares = {
    (causal, padding): dataclasses.replace(case, causal=causal, padding=padding).visible_share * 32
    for causal in (False, True)
    for padding in (False, True)
  }
  assert shares == {
    (False, False): 32,
    (False, True): 16 + 8,
    (True, False): 2 * 10,
    (True, True): 10 + 7,
  }


@pytest.mark.parametrize("segments", [False, True])
def test_train_step_gpu(tmp_path, segments):
  """Sub-LN and Pre-LN in turns in one process, both training, with figures of both."""
  variants = "magneto_jax,magneto_jax-pre_ln"
  arguments = options(tmp_path, variants=variants, segments=segments)
  written = json.loads(train_step_gpu.run(arguments, platform="cpu").read_text())
  assert {"date", "driver", "versions", "git_commit", "device", "options"} <= set(written)
  for name, result in written["variants"].items():
    losses = [loss for turns in result["rounds"] for loss in turns["step"]["value"]]
    assert losses[-1] < result["first"]["value"][0]
    figures = written["summary"][name]
    assert figures["tokens_per_second"] > 0 and figures["memory_gib"] > 0
    assert 0 < figures["mfu_visible"] < figures["mfu"]
  assert len(written["summary"]["magneto_jax"]["over_pre_ln"]["rounds"]) == 2
  assert {entry["bound"] for entry in written["marks"]} == {0.45, 1.03}


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


@elsewhere.ONE_AT_A_TIME
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


def test_results_tell_the_command_and_not_where_it_ran(monkeypatch):
  monkeypatch.setattr("sys.argv", ["-m", "--run=/srv/a b/c", "--only=x,y", "/srv/d", "a/b=c"])
  told = coordinator.provenance("decode")["command"]
  assert told == "python -m benchmarks.decode --run=c --only=x,y d a/b=c"
  for path in coordinator.RESULTS.glob("*.json"):
    assert not re.search(r'"command": ".*[= ]/', path.read_text(encoding="utf-8")), path


def test_the_plans_of_the_docs_are_those_that_were_measured():
  page = (ROOT / "docs" / "plans.md").read_text(encoding="utf-8")
  found = plans.newest()
  assert list(found) == list(plans.CASES)
  assert plans.table(found) in page
  for each in found.values():
    assert each["fits"] and each["peak_bytes_per_chip"] < each["available_bytes_per_chip"]


def test_baselines_of_labelled_texts_are_counted():
  """Words that tell all, a commonest class of two thirds, three classes."""
  rows = lambda *labels: [Row((f"the {label} thing",), label, "") for label in labels]
  train = rows(*["red"] * 6, *["blue"] * 2, "green")
  found = text_baselines.accuracies(train, rows("red", "red", "blue"))
  assert found == {"majority_class": pytest.approx(2 / 3), "chance": 1 / 3, "bag_of_words": 1.0}


def test_a_constant_text_is_the_best_of_all_there_are():
  """Of three letters and of two, in as few edits as may be; equal ones in their order."""
  texts, references = ["dd", "ab", "abc", "ab", "ac"], ["abc", "ab"]
  least = lambda found, references: sum(a != b for a, b in zip(found, references, strict=True))
  options = {"score": least, "higher_is_better": False}
  assert speech_baselines.best_constant(texts, references, **options) == ("ab", 1)
  options["higher_is_better"] = True
  assert speech_baselines.best_constant(texts, references, **options) == ("dd", 2)
