"""Plans against the runs that they are of, and on machines that are not here."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from magneto_jax import hardware, hlo, memory, planning
from magneto_jax.config import ConfigError, from_config_dict
from magneto_jax.plan import DOES_NOT_FIT
from magneto_jax.tasks import TASKS
from tests import simulated
from tests.kernels import elsewhere

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = f"--config={ROOT / 'configs' / 'gpt.py'}:tiny"
SMALL = [
  "--config.data.tokenizer=byte",
  "--config.data.seq_length=64",
  "--config.model.layers=2",
  "--config.model.width=64",
  "--config.model.heads=2",
  "--config.mesh.fsdp=2",
  "--config.mesh.tensor=2",
]


def run(arguments, environment=os.environ):
  """A process of its own: devices are made once."""
  command = [sys.executable, *arguments]
  # The command's own, not the tests'.
  precision = {"JAX_DEFAULT_MATMUL_PRECISION": "default"}
  options = dict(env=environment | precision, cwd=ROOT, capture_output=True, text=True, timeout=900)
  return subprocess.run(command, **options)


def plan(path, *arguments, config=CONFIG):
  """(the process, what it wrote as JSON)."""
  done = run(["-m", "magneto_jax.plan", config, f"--json={path}", *arguments])
  assert done.returncode in (0, DOES_NOT_FIT), done.stderr[-3000:]
  return done, json.loads(path.read_text())


REAL = """
import json, sys, tempfile
from absl import app, flags
from magneto_jax import cli, jobs
import jax

holder = cli.define_config_flag()

def main(_):
  config = cli.typed_config(holder)
  with tempfile.TemporaryDirectory() as directory:
    job = jobs.prepare(config, directory)
    state = job.program.init(jax.random.key(0))
    key = jax.device_put(jax.random.key(1), job.program.key.sharding)
    batch = next(job.batches)
    held = [sum(shard.data.nbytes for shard in array.addressable_shards if shard.device.id == 3)
            for array in jax.tree.leaves((state.params, batch))]
    _, metrics = job.program.step(state, batch, key)
  found = job.program.step.memory_analysis()
  print(json.dumps({
    "loss": float(metrics["loss"]),
    "held": sum(held),
    "temporaries": found.temp_size_in_bytes,
    "peak": found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    + found.temp_size_in_bytes + found.generated_code_size_in_bytes,
  }))

app.run(main, flags_parser=flags.FLAGS)
"""


@pytest.fixture(scope="module")
def on_cpus(tmp_path_factory):
  """A plan for 8 simulated devices: (what was printed, the JSON)."""
  path = tmp_path_factory.mktemp("plan") / "plan.json"
  # Data that are not here: a plan reads none.
  done, found = plan(path, "--topology=cpu:8", "--config.data.name=c4/en:3.1.0", *SMALL)
  assert done.returncode == 0 and not done.stderr, done.stderr
  return done.stdout, found


def test_a_plan_is_what_the_run_needs(on_cpus):
  """Data, state and the step itself, made and run on 8 simulated devices."""
  _, planned = on_cpus
  done = run(["-c", REAL, CONFIG, *SMALL], simulated.devices(8))
  assert done.returncode == 0, done.stderr[-3000:]
  real = json.loads(done.stdout.splitlines()[-1])
  assert 0 < real["loss"] < 10
  assert planned["peak_bytes_per_chip"] == pytest.approx(real["peak"], rel=0.1)
  assert planned["memory"]["temporaries"] == pytest.approx(real["temporaries"], rel=0.1)
  # What a device holds, of arrays that are there.
  assert planned["memory"]["parameters"] + planned["memory"]["batch"] == real["held"]


def test_a_plan_names_what_the_program_does(on_cpus):
  printed, found = on_cpus
  assert found["devices"] == 8 and found["mesh"]["data"] == 2 and found["fits"]
  parts = found["memory"]
  assert found["peak_bytes_per_chip"] == sum(parts.values())
  assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=0.01)
  # Nothing is recomputed but attention's scores, in the backward pass.
  share = found["model_flops"] / 8
  assert 0.9 * share < found["matrix_flops_per_chip"] < 1.5 * share
  moved = {(tuple(each["axes"]), each["kind"]) for each in found["collectives"]}
  assert (("fsdp",), "all-gather") in moved and (("tensor",), "all-reduce") in moved
  # Nothing goes across data and tensor together: gradients of each are summed over their own.
  assert not any({"data", "tensor"} <= set(axes) and "gather" in kind for axes, kind in moved)
  assert found["roofline"] is None  # A CPU's rates are not in the table.
  for word in ("parameters", "optimizer state", "temporaries", "all-gather", "fits", "tensor"):
    assert word in printed


def test_what_cannot_be_planned_is_refused_in_one_line():
  done = run(["-m", "magneto_jax.plan", CONFIG, "--topology=cpu:3", "--config.mesh.tensor=2"])
  assert done.returncode == 2 and not done.stdout
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: the mesh ") and "does not fit 3 devices" in line


# ---------------------------------------------------------------------------------------------
# What does not fit
# ---------------------------------------------------------------------------------------------


class Machine:
  """Stands for a compiler: what a config needs is what is estimated, and 100 bytes more."""

  def __init__(self, config, room: float):
    task = TASKS[config.task]
    model = task.build_model(config, {"vocab_size": 260, "token_correlation": 0.01})
    init = lambda key: model.init(key, *task.dummy_inputs(config))["params"]
    params = jax.eval_shape(init, jax.random.key(0))
    self.sizes = memory.Sizes(params, task.batch_spec(config), 8)
    self.available = int(room * memory.estimate(config, self.sizes))
    self.compiled = []

  def compile_for(self, config, facts, topology):
    self.compiled.append(config)
    lowered = types.SimpleNamespace(sizes=self.sizes)
    parts = memory.Memory(*[0] * 7, code=memory.estimate(config, self.sizes) + 100)
    compiled = object() if parts.peak <= self.available else None
    return planning.Attempt(config, lowered, compiled, parts, self.available)


@pytest.fixture(scope="module")
def machine():
  sizes = {"layers": 3, "width": 64, "heads": 4, "ffn_width": 128}
  data = {"tokenizer": "byte", "seq_length": 64}
  config = from_config_dict({"batch_size": 32, "model": sizes, "data": data, "ema": 0.9})
  return functools.partial(Machine, config), config


@pytest.mark.parametrize("room, together", [(0.9, False), (0.25, True)])
def test_what_does_not_fit_is_told_what_would(machine, monkeypatch, room, together):
  make, config = machine
  made = make(room)
  monkeypatch.setattr(planning, "compile_for", made.compile_for)
  topology = hardware.Topology("cpu:8", hardware.CHIPS["cpu"], [None] * 8, (), 1)
  attempt = made.compile_for(config, {}, topology)
  assert not attempt.fits
  remedies = list(planning._remedies(attempt, {}, topology))
  assert len(remedies) == 3 + together
  for remedy in remedies:
    # Each was compiled, as the knob changes the config.
    assert remedy.attempt.config in made.compiled
    assert remedy.attempt.config == memory.changed(config, remedy.knob.changes)
    assert remedy.saved == attempt.peak - remedy.attempt.peak
  # Alone where that is enough; else the last is all together, and is enough.
  assert [x.attempt.fits for x in remedies] == ([False] * 3 + [True] if together else [True] * 3)
  assert len({frozenset(remedy.knob.changes) for remedy in remedies}) == len(remedies)


def test_a_machine_that_is_none_is_an_error_of_the_config():
  config = from_config_dict({"model": {"layers": 1, "width": 16}, "data": {"tokenizer": "byte"}})
  with pytest.raises(ConfigError, match="not one of"):
    planning.make_plan(config, "v5e:big")


# ---------------------------------------------------------------------------------------------
# Kernels and times
# ---------------------------------------------------------------------------------------------


def test_kernels_count_their_products():
  """B T S N H = 2 x 8 x 16 x 6, forwards two products and backwards five."""
  ids = hlo.Shape("s32", (2, 1, 8))
  q, k = hlo.Shape("bf16", (2, 8, 6)), hlo.Shape("bf16", (2, 16, 6))
  call = lambda name, times: hlo.CustomCall(
    "tpu_custom_call", f"jit(f)/while/{name}/pallas_call", times, (ids, q, k, k), ()
  )
  other = hlo.CustomCall("TopK", "jit(f)/top_k", 3, (q,), ())
  calls = (
    call("attention_forward", 4),
    call("attention_forward", 4),
    call("attention_backward", 4),
  )
  cost = hlo.Cost(0, 0, (), (*calls, other), ())
  one = 2 * 2 * 8 * 16 * 6
  assert planning.kernel_flops(cost) == {
    "attention_forward": (8, 8 * 2 * one),
    "attention_backward": (4, 4 * 5 * one),
    "TopK": (3, 0),
  }


def test_between_slices_a_device_sends_its_own_share():
  """Of 3 slices of 4 chips: a sum of V over all is one of V within, and of V / 4 between."""
  chip = hardware.CHIPS["v5e"]
  topology = hardware.Topology("v5e:2x2", chip, [None] * 12, (2, 2), 3)
  devices = np.empty(12, object)
  devices[:] = [types.SimpleNamespace(coords=(i // 2 % 2, i % 2, 0)) for i in range(12)]
  names = ("slice", "fsdp")
  shape = {"slice": 3, "fsdp": 4}
  mesh = types.SimpleNamespace(devices=devices.reshape(3, 4), axis_names=names, shape=shape)
  size = 12_000_000
  both = hlo.Collective("all-reduce", size, 5, names, 12, "")
  within, between = both._replace(axes=("fsdp",), group=4), both._replace(axes=names[:1], group=3)
  cost = hlo.Cost(0, 0, (both, within, between), (), ())
  found = {each.axes: each for each in planning.transfers(cost, topology, mesh)}
  inner = 5 * 2 * size * 3 / 4 / (2 * 4.5e10)  # Both of a chip's lines of two.
  outer = 5 * 2 * size * 2 / 3 / (25e9 / 8)
  assert found["fsdp",].seconds == pytest.approx(inner)
  assert found["slice",].seconds == pytest.approx(outer)
  assert found[names].seconds == pytest.approx(inner + outer / 4)
  assert found[names].links == "line of 2 x line of 2, 90 GB/s + data centre, 3.125 GB/s"
  assert found[names].bytes == 5 * size and found[names].times == 5
  elsewhere = topology._replace(chip=hardware.CHIPS["cpu"])
  unknown = list(planning.transfers(cost, elsewhere, mesh))
  assert [(each.seconds, each.links) for each in unknown] == [(None, "")] * 3


# ---------------------------------------------------------------------------------------------
# TPUs
# ---------------------------------------------------------------------------------------------

TPU = [
  "--config.model.dtype=bfloat16",
  "--config.model.remat=full",
  "--config.model.layers=3",
  "--config.model.width=256",  # Two heads a device: one alone would be padded to the lanes of two.
  "--config.data.tokenizer=byte",
  "--config.mesh.fsdp=2",
  "--config.mesh.tensor=2",
]


@elsewhere.ONE_AT_A_TIME
@pytest.mark.parametrize(
  "name",
  [
    pytest.param("v5e:2x2", marks=pytest.mark.ci),
    pytest.param("v6e:2x2", marks=pytest.mark.slow),
    pytest.param("v5p:2x2x1", marks=pytest.mark.slow),
  ],
)
def test_a_tpus_plan(name, tmp_path):
  """Its attention is the TPU's kernel, and its collectives are those of the mesh, no others."""
  assert importlib.util.find_spec("libtpu"), "no TPU compiler: pip install -e '.[plan]'"
  done, found = plan(tmp_path / "plan.json", f"--topology={name}", *TPU)
  assert done.returncode == 0, done.stderr
  assert found["attention"] == "kernels attention_backward, attention_forward"
  # A layer is recomputed: forwards twice.
  assert found["kernels"]["attention_forward"]["calls"] == 2 * 3
  assert found["kernels"]["attention_backward"]["calls"] == 3
  chip = hardware.CHIPS[name.split(":")[0]]
  assert found["available_bytes_per_chip"] == chip.memory
  assert 2**20 < found["peak_bytes_per_chip"] < 2**28
  # A device's share of the products, and a forward pass more but for what nothing waits for.
  done_flops = found["matrix_flops_per_chip"] + sum(x["flops"] for x in found["kernels"].values())
  assert 1.1 < done_flops / (found["model_flops"] / 4) < 4 / 3 + 0.1
  moved = {(tuple(each["axes"]), each["kind"]): each["bytes"] for each in found["collectives"]}
  small = {key: size for key, size in moved.items() if size < 10_000}  # Losses and norms.
  assert set(moved) - set(small) <= {
    (("fsdp",), "all-gather"),
    (("fsdp",), "reduce-scatter"),
    (("fsdp",), "all-reduce"),
    (("tensor",), "all-reduce"),
    (("tensor",), "reduce-scatter"),
    (("tensor",), "all-gather"),
  }
  assert (("fsdp",), "all-gather") in moved and (("tensor",), "all-reduce") in moved
  roofline = found["roofline"]
  assert roofline["overlapped"] == max(roofline["seconds"].values()) <= roofline["exposed"]
  assert 0 < roofline["utilisation"][1] <= roofline["utilisation"][0] < 1


@pytest.mark.slow
def test_a_pods_plan(tmp_path):
  """A decoder of 1.3 billion parameters on 256 chips; minutes of compiling."""
  sizes = {"width": 2048, "ffn_width": 8192, "heads": 16, "remat": "full"}
  changes = [f"--config.model.{name}={value}" for name, value in sizes.items()]
  changes += ["--config.accumulation=1", "--config.cast_weights", "--config.data.vocab_size=50304"]
  changes += ["--config.mesh.fsdp=64", "--config.mesh.tensor=4"]
  config = f"--config={ROOT / 'configs' / 'gpt.py'}:magneto_24"
  done, found = plan(tmp_path / "plan.json", "--topology=v5e:16x16", *changes, config=config)
  assert done.returncode == 0, done.stderr
  assert found["devices"] == 256 and found["parameters"] > 1.3e9
  # Nothing large is on every device: a 256th of the state, and vectors.
  state = found["memory"]["parameters"] + found["memory"]["optimizer"]
  assert state == pytest.approx(12 * found["parameters"] / 256, rel=0.1)
  assert found["kernels"]["attention_forward"]["calls"] == 2 * 24
  links = {tuple(each["axes"]): each["links"] for each in found["collectives"]}
  assert links["tensor",].startswith("line of 4") and "ring of 16" in links["fsdp",]


@pytest.mark.slow
def test_what_does_not_fit_a_tpu_is_mended_by_compiling(tmp_path):
  """Logits of 50,304 words, of 32 rows a chip, which the compiler refuses."""
  large = ["--config.batch_size=128", "--config.data.seq_length=2048", "--config.model.layers=2"]
  large += ["--config.model.width=512", "--config.model.dtype=bfloat16", "--config.mesh.fsdp=2"]
  large += ["--config.data.vocab_size=50304"]
  done, found = plan(tmp_path / "plan.json", "--topology=v5e:2x2", *large)
  assert done.returncode == DOES_NOT_FIT and not found["fits"]
  assert found["peak_bytes_per_chip"] > found["available_bytes_per_chip"]
  assert len(found["remedies"]) == 3
  for remedy in found["remedies"]:
    assert remedy["fits"], remedy
    # An estimate is good for choosing: within a factor of 2.
    assert 0.5 < remedy["estimated_saving"] / remedy["compiled_saving"] < 2
  assert "does not fit" in done.stdout and "--config.vocab_chunk" in done.stdout
