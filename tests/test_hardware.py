"""The table of chips, the topologies, and how fast the axes of a mesh are."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pytest

from magneto_jax import hardware
from tests.kernels import elsewhere

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
  "kind, peak",
  [
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA A100-SXM4-40GB", 312e12),
    ("cpu", None),
    ("something else", None),
  ],
)
def test_the_chip_of_a_device_gives_its_peak(kind, peak):
  assert hardware.peak_flops(kind) == peak


def test_every_kind_of_device_is_one_chip():
  kinds = ["TPU v2", "TPU v5", "TPU v5p", "TPU v5 lite", "TPU7x", "NVIDIA H100 80GB HBM3", "cpu"]
  for kind in kinds:
    found = [c for c in hardware.CHIPS.values() if re.fullmatch(c.kind, kind)]
    assert len(found) == 1, kind


def test_what_can_be_planned_for_has_all_figures():
  for name in hardware.TPUS:
    chip = hardware.CHIPS[name]
    figures = (chip.flops, chip.memory, chip.memory_rate, chip.link_rate, chip.network_rate)
    # In the order that these rates have on every machine: the nearer, the faster.
    assert None not in figures and chip.memory_rate > chip.link_rate > chip.network_rate


@pytest.mark.parametrize(
  "name, said",
  [
    ("v5e", "not one of v5e:16x16"),
    ("v5e:", "not one of"),
    ("v9:2x2", "not one of"),
    ("v5e:2x2x2", "lie in 2 dimensions"),
    ("v5p:2x2", "lie in 3 dimensions"),
    ("cpu:2x2", "counted, as cpu:8"),
    ("cpu:0", "counted, as cpu:8"),
  ],
)
def test_a_topology_that_is_none_is_refused_in_one_line(name, said):
  with pytest.raises(ValueError, match=said) as caught:
    hardware.topology(name)
  assert "\n" not in str(caught.value) and name in str(caught.value)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"pip install 'magneto_jax\[plan\]'"):
    hardware.topology("v5e:2x2")


def test_devices_that_are_there_already_are_not_made_again():
  import jax

  here = len(jax.devices("cpu"))
  assert len(hardware.topology(f"cpu:{here}").devices) == here
  with pytest.raises(ValueError, match=f"JAX has made {here} CPU devices already, not {here + 1}"):
    hardware.topology(f"cpu:{here + 1}")


# ---------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------


def described(name: str, axes: dict[str, int], order=None):
  """A topology and a mesh of it, of devices that have coordinates alone, in the torus' order."""
  kind, sizes = name.split(":")
  chip, sizes = hardware.CHIPS[kind], tuple(map(int, sizes.split("x")))
  places = [(*place, core) for place in np.ndindex(sizes) for core in range(chip.cores)]
  devices = np.empty(len(places), object)
  devices[:] = [types.SimpleNamespace(coords=place[:-1]) for place in places]
  topology = hardware.Topology(name, chip, devices, sizes, 1)
  array = devices.reshape(order or tuple(axes.values()))
  return topology, types.SimpleNamespace(devices=array, axis_names=tuple(axes))


ONE = 4.5e10  # A link of v5e, one way.


@pytest.mark.parametrize(
  "name, sizes, axes, rate, words",
  [
    # Whole dimensions of the torus, which close to rings.
    ("v5e:16x16", (16, 16), ("a",), 2 * ONE, "ring of 16"),
    ("v5e:16x16", (16, 16), ("b",), 2 * ONE, "ring of 16"),
    ("v5e:16x16", (16, 16), ("a", "b"), 4 * ONE, "ring of 16 x ring of 16"),
    # A quarter of one, and one with a quarter of the other.
    ("v5e:16x16", (64, 4), ("b",), ONE, "line of 4"),
    ("v5e:16x16", (64, 4), ("a",), 3 * ONE, "ring of 16 x line of 4"),
    # A small slice has no wraparound.
    ("v5e:2x4", (2, 4), ("b",), ONE, "line of 4"),
    ("v5p:4x4x4", (16, 4), ("b",), 2 * 9e10, "ring of 4"),
    # Of cubes alone.
    ("v5p:2x2x4", (4, 4), ("b",), 9e10, "line of 4"),
    # Half of the chip's links; and its two cores.
    ("tpu7x:2x2x1", (4, 2), ("a",), 2 * 1e11 / 2, "line of 2 x line of 2"),
    ("tpu7x:2x2x1", (4, 2), ("b",), 6 * 1e11, "within the chip"),
    ("tpu7x:2x2x1", (4, 2), ("a", "b"), 2 * 1e11, "line of 2 x line of 2"),
  ],
)
def test_an_axis_has_the_links_that_its_devices_differ_along(name, sizes, axes, rate, words):
  topology, mesh = described(name, dict(zip("ab", sizes, strict=True)))
  path = hardware.path(topology, mesh, axes)
  assert path.rate == pytest.approx(rate) and path.words == words


def test_where_links_are_not_known_there_is_no_path():
  topology, mesh = described("cpu:8", {"a": 8})
  assert hardware.path(topology, mesh, ("a",)) is None


@pytest.mark.parametrize("n", [2, 4, 16])
def test_collectives_take_what_their_algorithms_move(n):
  """Against a ring simulated hop by hop."""
  size, rate = 1000 * n, 10.0
  ring = hardware.Path(2 * rate, rate, 2 * rate, n, "")
  # Blocks travel around the ring both ways, n / 2 each way at most; in every turn each link of a
  # device carries half of a block.
  turns = n - 1
  gather = turns * (size / n) / (2 * rate)
  assert hardware.seconds("all-gather", size, n, ring) == pytest.approx(gather)
  assert hardware.seconds("reduce-scatter", size, n, ring) == pytest.approx(gather)
  assert hardware.seconds("all-reduce", size, n, ring) == pytest.approx(2 * gather)
  assert hardware.seconds("collective-permute", size, n, ring) == pytest.approx(size / rate)
  # Of two cores a chip, one fetches for both: n chips take what n devices take.
  cores = ring._replace(cores=2)
  assert hardware.seconds("all-gather", size, 2 * n, cores) == pytest.approx(gather)
  # Block j of device i goes the shorter way to device j: how much does a link carry?
  load = sum(min(d, n - d) for d in range(n)) * (size / n)  # Of a device's links, both ways.
  assert hardware.seconds("all-to-all", size, n, ring) == pytest.approx(load / (2 * rate))


def test_an_all_to_all_of_a_torus_crosses_its_middle():
  """A quarter of all bytes goes each way over the cut, of two links a row of the torus."""
  n, m, rate, size = 16, 4, 10.0, 6400
  torus = hardware.Path(4 * rate, rate, 2 * rate, n, "")
  crossing = n * m * size / 4
  assert hardware.seconds("all-to-all", size, n * m, torus) == crossing / (2 * m * rate)


@pytest.mark.ci
@elsewhere.ONE_AT_A_TIME
def test_the_compilers_devices_are_those_of_the_table():
  """Of each TPU, on its smallest topologies; and its words where there is no such shape."""
  assert importlib.util.find_spec("libtpu"), "no TPU compiler: pip install -e '.[plan]'"
  script = """
import json, jax
from magneto_jax import hardware
for name, slices in (("v5e:2x2", 1), ("v5e:1x1", 1), ("v5p:2x2x1", 1), ("v6e:2x2", 1),
                     ("tpu7x:2x2x1", 1), ("v5e:2x4", 2)):
  t = hardware.topology(name, slices=slices)
  print(json.dumps([name, len(t.devices), hardware.chip_of(t.devices[0].device_kind) is t.chip,
                    list(t.devices[-1].coords), str(t)]))
try:
  hardware.topology("v5e:3x5")
except ValueError as error:
  print(json.dumps(["error", str(error)]))
# There is no public way to see this.
assert not jax._src.xla_bridge._backends, "a backend was started"
"""
  command = [sys.executable, "-c", script]
  env = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-2000:]
  *lines, (_, error) = map(json.loads, done.stdout.splitlines())
  assert [line[1] for line in lines] == [4, 1, 4, 4, 8, 16]
  assert all(line[2] for line in lines)
  assert lines[-1][3:] == [[1, 3, 0], "2 slices of v5e:2x4 (16 x TPU v5 lite)"]
  assert "v5e:3x5 is none that the TPU compiler knows" in error and "\n" not in error
