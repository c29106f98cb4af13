"""Chips and how they are joined: what a plan sets a program's needs against.

All figures are those of one JAX device, the makers' and dense. A device of TPU v2, v3 and 7x is one
of a chip's two cores: it has half of the chip.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """A kind of device; None for what is not known.

  Attributes:
    kind: a pattern of the whole `device_kind`.
    flops: multiplications and additions of bfloat16 products a second.
    memory: bytes that a program may have.
    memory_rate: bytes a second, to and from that memory.
    link_rate: bytes a second of one link, one way.
    torus: dimensions of the torus that the links make, two of a device to each.
    ring: lengths of the torus' dimensions that close to a ring are multiples of this.
    network_rate: bytes a second of a device's share of its host's network, one way.
    cores: devices that share the chip and its links.
  """

  kind: str
  flops: float | None = None
  memory: int | None = None
  memory_rate: float | None = None
  link_rate: float | None = None
  torus: int = 0
  ring: int = 1
  network_rate: float | None = None
  cores: int = 1


# By the name that a topology gives. Sources:
# [D] Google Cloud's pages of each TPU (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x):
#     peaks, memory's rate, the network's share of a chip (v5e: 6.4 Tbit/s of a pod, by 256), and of
#     tpu7x the links: 1200 GB/s of a chip, both ways over 6. Half of the chip's for a core.
# [B] The scaling book (jax-ml.github.io/scaling-book/tpus): a link's rate one way, which is 9 / 10
#     of what [D] says; which dimensions close to rings.
# [X] What XLA says it has when a program does not fit ("exceeds available HBM").
# [N] NVIDIA's data sheets (H100, H200).
CHIPS: dict[str, Chip] = {
  "v5e": Chip(  # [D] [B] [X]
    "TPU v5 lite", 197e12, int(15.75 * GIB), 819e9, 4.5e10, 2, 16, 25e9 / 8
  ),
  "v5p": Chip("TPU v5p?", 459e12, int(95.74 * GIB), 2765e9, 9e10, 3, 4, 50e9 / 8),  # [D] [B] [X]
  "v6e": Chip("TPU v6 lite", 918e12, int(31.25 * GIB), 1638e9, 9e10, 2, 16, 100e9 / 8),
  "tpu7x": Chip(  # [D] [X]
    "TPU7x", 1153.5e12, int(94.75 * GIB), 3690e9, 1e11, 3, 4, 50e9 / 8, cores=2
  ),
  "h100": Chip(  # [N]
    "NVIDIA H100 80GB HBM3", 989e12, 80 * 10**9
  ),
  "h200": Chip("NVIDIA H200.*", 989e12, 141 * 10**9),  # [N]
  "cpu": Chip("cpu"),
  # Of these a run says its share of the peak; they are not planned for.
  "v2": Chip("TPU v2", 22.5e12, cores=2),
  "v3": Chip("TPU v3", 61.5e12, cores=2),
  "v4": Chip("TPU v4", 275e12),
  "a100": Chip("NVIDIA A100.*", 312e12),
  "h100_pcie": Chip("NVIDIA H100 PCIe", 756e12),
  "l4": Chip("NVIDIA L4", 121e12),
}
# The two cores of a chip of 7x are joined by six times a link ([D], "dual-chiplet architecture").
_BETWEEN_CORES = 6


def chip_of(device_kind: str) -> Chip | None:
  """The chip of a device, or None where it is not in the table."""
  return next((chip for chip in CHIPS.values() if re.fullmatch(chip.kind, device_kind)), None)


def peak_flops(device_kind: str) -> float | None:
  """The device's bfloat16 peak, or None where it is not known."""
  chip = chip_of(device_kind)
  return chip and chip.flops


class Topology(NamedTuple):
  """Devices that need not be there.

  Attributes:
    name: as asked for, `v5e:16x16`.
    chip: their kind.
    devices: to make a mesh of.
    sizes: of the torus of a slice, in chips; empty where there is none.
    slices: tori, joined by the data centre's network alone.
  """

  name: str
  chip: Chip
  devices: Sequence[jax.Device]
  sizes: tuple[int, ...]
  slices: int

  def __str__(self):
    slices = f"{self.slices} slices of " if self.slices > 1 else ""
    return f"{slices}{self.name} ({len(self.devices)} x {self.devices[0].device_kind})"


# Of a torus per kind of TPU, where there is an end to it; and the names that libtpu has for them.
TPUS = ("v5e", "v5p", "v6e", "tpu7x")


def topology(name: str, *, slices: int = 1) -> Topology:
  """Describes `v5e:16x16`, `v5p:8x8x8`, `v6e:2x2`, `tpu7x:2x2x1`: chips by chips; or `cpu:8`.

  The first call for a TPU loads libtpu; `cpu:N` must come before JAX's devices are used.

  Args:
    name: a chip, and how many there are of it in each dimension of the torus.
    slices: of TPUs, how many such tori.

  Raises:
    ValueError: if there is no such topology, or its compiler is not installed; one line.
  """
  found = re.fullmatch(r"([a-z]\w*):(\d+(?:x\d+)*)", name)
  if not found or (found[1] not in TPUS and found[1] != "cpu"):
    raise ValueError(
      f"--topology={name} is not one of v5e:16x16, v5p:8x8x8, v6e:2x2, tpu7x:2x2x1 or cpu:8 (with"
      " any number of chips in each dimension)"
    )
  kind, sizes = found[1], tuple(map(int, found[2].split("x")))
  if kind == "cpu":
    return Topology(name, CHIPS[kind], _cpus(name, sizes, slices), (), slices)
  chip = CHIPS[kind]
  if len(sizes) != chip.torus:
    example = "x".join("2" * chip.torus if chip.torus == 2 else "221")
    raise ValueError(
      f"--topology={name}: chips of {kind} lie in {chip.torus} dimensions, as {kind}:{example}"
    )
  return Topology(name, chip, _tpus(name, sizes, slices), sizes, slices)


_MOST_CPUS = 512


def _cpus(name: str, sizes: tuple[int, ...], slices: int) -> list[jax.Device]:
  """Simulated devices; the host's, if they have been made already."""
  if len(sizes) != 1 or not sizes[0]:
    raise ValueError(f"--topology={name}: CPUs are counted, as cpu:8")
  wanted = sizes[0] * slices
  if wanted > _MOST_CPUS:
    raise ValueError(f"--topology={name}: at most {_MOST_CPUS} devices can be simulated")
  try:
    jax.config.update("jax_num_cpu_devices", wanted)
  except RuntimeError:
    pass  # There are devices already: perhaps as many.
  devices = jax.devices("cpu")
  if len(devices) != wanted:
    raise ValueError(
      f"--topology={name}: JAX has made {len(devices)} CPU devices already, not {wanted}; plan in"
      " a process of its own, without --xla_force_host_platform_device_count in XLA_FLAGS"
    )
  return devices


# Nothing is run: no cloud's metadata are needed, nor the chip itself if there is one.
_LIBTPU = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}


def _tpus(name: str, sizes: tuple[int, ...], slices: int) -> list[jax.Device]:
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      f"--topology={name} needs the TPU compiler, which is made for Linux on x86-64: pip install"
      " 'magneto_jax[plan]'"
    )
  for variable, value in _LIBTPU.items():
    os.environ.setdefault(variable, value)
  options = {"num_slices": slices} if slices > 1 else {}
  if math.prod(sizes) == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)  # libtpu's own is 2 x 2.
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
  except Exception as error:  # Whatever the compiler says: it is of the name that was given.
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(f"--topology={name} is none that the TPU compiler knows: {said}") from error


# ---------------------------------------------------------------------------------------------
# How fast a mesh's axes are
# ---------------------------------------------------------------------------------------------


class Path(NamedTuple):
  """What a group of devices exchanges data over.

  Attributes:
    rate: bytes a second that a device can send to others of its group, over all links at once.
    one_way: over one link, one way.
    across: bytes a second along the longest dimension alone, both of its directions if it closes.
    hops: devices of the group along that dimension; 1 for what is no torus.
    words: which links, and how many.
    cores: devices of the group that share a chip.
  """

  rate: float
  one_way: float
  across: float
  hops: int
  words: str
  cores: int = 1


def path(topology: Topology, mesh: jax.sharding.Mesh, axes: Sequence[str]) -> Path | None:
  """The links that join the devices along these axes within a slice; None if they are not known.

  A dimension of the torus counts if the devices of a group differ in it: with both of its
  directions where they fill it and it closes to a ring, else with one. That other groups may use
  the same links is not counted.
  """
  chip = topology.chip
  if chip.link_rate is None:
    return None
  group = np.moveaxis(
    mesh.devices, [mesh.axis_names.index(axis) for axis in axes], range(len(axes))
  )
  group = group.reshape(*group.shape[: len(axes)], -1)[..., 0].ravel()
  # A group with both cores of a chip has all of its links, else those of its core.
  cores = len(group) // len({tuple(device.coords) for device in group})
  one_way = chip.link_rate * cores / chip.cores
  links = []
  closes = all(size % chip.ring == 0 for size in topology.sizes) or chip.torus == 2
  for dimension, size in enumerate(topology.sizes):
    extent = len({device.coords[dimension] for device in group})
    if extent > 1:
      is_ring = extent == size and size % chip.ring == 0 and closes
      links.append((extent, 2 if is_ring else 1))
  if not links:  # The cores of a chip.
    rate = chip.link_rate * _BETWEEN_CORES
    return Path(rate, rate, rate, 1, "within the chip")
  words = " x ".join(f"{'ring' if ways == 2 else 'line'} of {extent}" for extent, ways in links)
  hops, ways = max(links)
  total = one_way * sum(ways for _, ways in links)
  return Path(total, one_way, one_way * ways, hops, words, cores)


def seconds(kind: str, size: int, group: int, way: Path) -> float:
  """The least that a collective takes, at the full rate of its links and without latency.

  With V bytes, the larger of a device's operand and result, in a group of n: (n - 1) / n V pass
  every device to gather or to scatter sums of V, twice as many for their all-reduce. An all-to-all
  crosses the middle of its longest dimension of n: n / 4 V along that. A permute takes one
  direction of one link. Of devices that share a chip n counts one, with the links of all. See the
  scaling book, "sharded matmuls".
  """
  if kind == "collective-permute":
    return size / way.one_way
  group = max(group // way.cores, 2)
  share = (group - 1) / group
  if kind.endswith("all-to-all") and way.hops > 1:
    return size * way.hops / 4 / way.across
  passing = {"all-reduce": 2 * share, "collective-broadcast": 1.0}
  return size * passing.get(kind, share) / way.rate
