"""What a train step needs of a device's memory, what there is, and what would make it fit.

Two kinds of figures. Those of a compiled step are the compiler's own (`of_program`). Those of a
change to the config are estimates (`estimate`): closed forms of sizes alone, which need no
compiler, and whose differences say which changes are worth compiling (`knobs`).
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from magneto_jax import hardware, sharding
from magneto_jax.config import ConfigError, TrainConfig, reads


class Memory(NamedTuple):
  """Bytes of one device.

  Attributes:
    parameters, average, optimizer, batch: the step's arguments, by their shardings.
    padding: what the device's layout adds to them.
    results: what a step returns beside the state, which takes the old one's place.
    temporaries: what lives within a step: activations, gradients, gathered weights.
    code: the program itself.
  """

  parameters: int
  average: int
  optimizer: int
  batch: int
  padding: int
  results: int
  temporaries: int
  code: int

  @property
  def peak(self) -> int:
    """All of it: what must be there while a step runs."""
    return sum(self)


def of_program(compiled, state, batch) -> Memory:
  """What a compiled step needs.

  Args:
    compiled: the step.
    state: its state, shapes with shardings: a `TrainState`.
    batch: likewise.
  """
  found, parts = compiled.memory_analysis(), _arguments(state, batch)
  return Memory(
    **parts,
    # CPUs drop an argument that nothing reads.
    padding=max(found.argument_size_in_bytes - sum(parts.values()), 0),
    results=found.output_size_in_bytes - found.alias_size_in_bytes,
    temporaries=found.temp_size_in_bytes,
    code=found.generated_code_size_in_bytes,
  )


def of_refused(error: BaseException, state, batch) -> Memory | None:
  """What a step needs that its compiler refuses: beside its arguments all is temporaries.

  None of an error that does not say how much is needed.
  """
  needed, _ = exhausted(error) or (None, None)
  if needed is None:
    return None
  parts = _arguments(state, batch)
  if "temporaries" not in str(error):  # Of all that is needed does it speak.
    needed = max(needed - sum(parts.values()), 0)
  return Memory(**parts, padding=0, results=0, temporaries=needed, code=0)


def _arguments(state, batch) -> dict[str, int]:
  return {
    "parameters": held((state.params, state.variables)),
    "average": held(state.ema_params),
    "optimizer": held((state.opt_state, state.step, state.skipped, state.skipped_in_a_row)),
    "batch": held(batch),
  }


def held(tree) -> int:
  """Bytes that a device holds of arrays, or of shapes with shardings; without their padding."""
  sizes = (
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  )
  return sum(sizes)


def available(device: jax.Device, devices: int = 1) -> int | None:
  """Bytes that a program may have of a device, there or described; None where that is not known.

  CPU devices share their host's memory: what is free of it now, in `devices` equal parts.
  """
  if device.platform == "cpu":
    return _host_memory() // devices
  try:
    stats = device.memory_stats()
  except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
    stats = None  # A device that is not there.
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"]
  chip = hardware.chip_of(device.device_kind)
  return chip and chip.memory


def _host_memory() -> int:
  """Free memory of this host, or of the container that it is."""
  free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  info = pathlib.Path("/proc/meminfo")
  if info.exists() and (found := re.search(r"MemAvailable:\s+(\d+) kB", info.read_text())):
    free = int(found[1]) * 1024
  for folder, limit, used, cached in _CGROUPS:
    root = pathlib.Path(folder)
    try:
      most = int((root / limit).read_text())
      in_use = int((root / used).read_text())
      caches = int(re.search(rf"^{cached} (\d+)$", (root / "memory.stat").read_text(), re.M)[1])
    except (OSError, ValueError, TypeError):
      continue  # No such container, or one without a limit ("max").
    free = min(free, most - in_use + caches)
  return free


# Of containers, both versions: the limit, what is in use, and what of it is a cache of files.
_CGROUPS = (
  ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
  (
    "/sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
  ),
)


# ---------------------------------------------------------------------------------------------
# Estimates
# ---------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
  """What an estimate goes by; none of it changes with a knob.

  Attributes:
    params: shapes of the parameters, a tree.
    batch: shapes of a global batch.
    devices: how many there are.
    variables: shapes of what the model keeps beside them, whole on every device.
    length: tokens of a row of the stack, which a batch of images or sounds does not show; 0: as
      many as its arrays [B, T] have.
    row_bytes: what a row takes beside its tokens, as a sound's maps do before the stack.
  """

  params: Any
  batch: Mapping[str, jax.ShapeDtypeStruct]
  devices: int
  variables: Any = None
  length: int = 0
  row_bytes: int = 0


def estimate(config: TrainConfig, sizes: Sizes) -> int:
  """Bytes that the config's step needs of a device, about.

  State: parameters, the optimizer's two moments, the average, and the gradients, each cut as its
  parameter is. Activations, for each token that a device has at a time: what `remat` keeps of every
  layer; of one layer, all; and of the loss the logits and their gradient; and for each row its
  `row_bytes`.

  Raises:
    ValueError: if the mesh does not fit the devices, or does not divide what it cuts.
  """
  mesh = sharding.resolve(config.mesh.sizes(), sizes.devices)
  parts = lambda axes: math.prod(mesh[axis] for axis in axes)
  rows = parts(sharding.ACTIVATION_AXES["batch"]) * config.accumulation
  if config.batch_size % rows:
    raise ValueError(f"a batch of {config.batch_size} rows cannot be cut {rows} times")
  length = parts(sharding.ACTIVATION_AXES["length"])
  # Tokens of a device at a time; a batch's arrays [B, T] are of the same ones, but for samples.
  lengths = (
    shape.shape[1]
    for shape in sizes.batch.values()
    if len(shape.shape) == 2 and shape.dtype != jnp.int16
  )
  tokens = config.batch_size // rows * -(-max(sizes.length, *lengths, 0) // length)
  number = jnp.dtype(config.model.dtype).itemsize
  weights, layers = 0, {"carry": 0, "products": 0, "attention": 0, "widest": 0, "logits": 0}
  for path, leaf in jax.tree_util.tree_flatten_with_path(sizes.params)[0]:
    names = sharding.parameter_axes(sharding.path_name(path))
    by = [parts(sharding.WEIGHT_AXES[name]) if name else 1 for name in names]
    shape = leaf.shape[len(leaf.shape) - len(names) :]
    for size, into in zip(shape, by, strict=True):
      if size % into:
        raise ValueError(f"{into} parts do not divide {size} of {sharding.path_name(path)}")
    weights += leaf.size * leaf.dtype.itemsize // math.prod(by)
    _count(layers, names, shape, math.prod(leaf.shape) // math.prod(shape), by)
  moments, average, sums = 2, bool(config.ema), 1 + (config.accumulation > 1)
  state = weights * (1 + moments + average + sums)
  state += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(sizes.variables))
  if config.cast_weights:
    state += weights * number // 4
  carry, products, attention = (layers[name] for name in ("carry", "products", "attention"))
  kept = {
    "none": carry + 2 * products + 2 * attention,
    "dots": carry + products + attention,
    "attention": carry + attention,
    "full": carry,
  }
  # A table of tokens that are read alone gives none.
  logits = layers["logits"] if reads(config.task, "vocab_chunk") else 0
  if config.vocab_chunk:
    logits = min(logits, config.vocab_chunk)
  working = kept[config.model.remat] + 2 * layers["widest"]
  beside = config.batch_size // rows * sizes.row_bytes
  return int(state + tokens * number * (working + 2 * logits) + beside)


def _count(layers: dict, names, shape, repeats: int, by) -> None:
  """Adds what the product with a parameter leaves, in numbers a token, to the sums by kind."""
  outputs = {
    ("embed", "heads", None): lambda: shape[1] * shape[2] // by[1],
    ("embed", "ffn"): lambda: shape[1] // by[1],
    ("heads", None, "embed"): lambda: shape[2],
    ("ffn", "embed"): lambda: shape[1],
  }
  if names == ("vocab", "embed"):
    layers["logits"] = max(layers["logits"], shape[0] // by[0])
  if names not in outputs:
    return
  out = outputs[names]()
  layers["products"] += repeats * out
  layers["widest"] = max(layers["widest"], out)
  if names[-1] == "embed":  # The end of a sublayer, which adds to the stream.
    layers["carry"] += repeats * out / 2
  if names == ("heads", None, "embed"):  # What attention gives its last projection.
    layers["attention"] += repeats * shape[0] * shape[1] // by[0]


# ---------------------------------------------------------------------------------------------
# Knobs
# ---------------------------------------------------------------------------------------------


class Knob(NamedTuple):
  """A change to a config.

  Attributes:
    changes: {field: value}.
    why: what it costs, in words.
    cost: the same as a share of a step's time, or more where the run becomes another one; roughly:
      knobs are sorted by it.
    saves: estimated bytes a device.
  """

  changes: dict[str, Any]
  why: str
  cost: float
  saves: int = 0

  @property
  def flags(self) -> str:
    """As the command line takes it."""
    return " ".join(f"--config.{name}={value}" for name, value in self.changes.items())


def changed(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
  """The config with other values, by field names as `model.remat`."""
  groups: dict[str, dict] = {}
  for name, value in changes.items():
    *group, field = name.split(".")
    groups.setdefault(group[0] if group else "", {})[field] = value
  own = groups.pop("", {})
  nested = {
    group: dataclasses.replace(getattr(config, group), **values) for group, values in groups.items()
  }
  return dataclasses.replace(config, **own, **nested)


def knobs(config: TrainConfig, sizes: Sizes) -> list[Knob]:
  """The changes that are valid for a config and save something, the most for their cost first."""
  try:
    mesh = sharding.resolve(config.mesh.sizes(), sizes.devices)
    now = estimate(config, sizes)
  except ValueError:
    return []  # The config itself cannot be run so: there is nothing to save from.
  found = []
  for turn in KNOBS:
    for knob in turn(config, mesh):
      try:
        saves = now - estimate(changed(config, knob.changes), sizes)
      except (ConfigError, ValueError):
        continue  # It does not divide, or the task refuses it.
      if saves > 0:
        found.append(knob._replace(saves=saves))
  return sorted(found, key=lambda knob: -knob.saves / knob.cost)


def _remat(config: TrainConfig, mesh) -> Iterator[Knob]:
  costs = {"none": 0.0, "dots": 0.05, "attention": 0.25, "full": 0.33}
  words = {
    "dots": "recomputes what lies between products",
    "attention": "recomputes all of a layer but attention",
    "full": "recomputes every layer: a third more compute",
  }
  now = costs[config.model.remat]
  for remat, why in words.items():
    if costs[remat] > now:
      yield Knob({"model.remat": remat}, why, costs[remat] - now)


def _accumulation(config: TrainConfig, mesh) -> Iterator[Knob]:
  for times in (2, 4, 8, 16, 32, 64):
    why = f"{times} parts of a batch one after the other: smaller products, gathers in each"
    yield Knob({"accumulation": config.accumulation * times}, why, 0.04 * math.log2(times))


def _vocab_chunk(config: TrainConfig, mesh) -> Iterator[Knob]:
  if not config.vocab_chunk:
    yield Knob({"vocab_chunk": 2048}, "computes the logits twice, some at a time", 0.05)


def _fsdp(config: TrainConfig, mesh) -> Iterator[Knob]:
  for times in (2, 4, 8, 16, 32, 64, 128, 256):
    if mesh["data"] % times == 0:
      changes = {"mesh.fsdp": mesh["fsdp"] * times, "mesh.data": mesh["data"] // times}
      yield Knob(changes, "weights are gathered for every layer", 0.04 * math.log2(times))


def _tensor(config: TrainConfig, mesh) -> Iterator[Knob]:
  for changes in _shared_rows(config, mesh, "tensor"):
    yield Knob(changes, "activations are summed in every layer", 0.15)


def _sequence(config: TrainConfig, mesh) -> Iterator[Knob]:
  if config.data.seq_length % (2 * mesh["sequence"]) == 0:
    for changes in _shared_rows(config, mesh, "sequence"):
      yield Knob(changes, "keys and values go around a ring in every layer", 0.2)


def _shared_rows(config: TrainConfig, mesh, axis: str) -> Iterator[dict[str, Any]]:
  """Twice as many devices share a row, and half as many have rows of their own, as many as before.

  Only where every device has its last row: before that, more parts of a batch save as much.
  """
  rows = math.prod(mesh[name] for name in sharding.ACTIVATION_AXES["batch"])
  if config.batch_size % (2 * rows * config.accumulation) == 0:
    return
  for taken in ("data", "fsdp"):
    if mesh[taken] % 2 == 0:
      sizes = {"data": mesh["data"], axis: mesh[axis] * 2} | {taken: mesh[taken] // 2}
      changes = {f"mesh.{name}": size for name, size in sizes.items()}
      yield changes | {"accumulation": config.accumulation * 2}


def _dtype(config: TrainConfig, mesh) -> Iterator[Knob]:
  if config.model.dtype == "float32":
    yield Knob({"model.dtype": "bfloat16"}, "other numbers, of 8 bits", 0.3)


def _ema(config: TrainConfig, mesh) -> Iterator[Knob]:
  if config.ema:
    yield Knob({"ema": 0.0}, "no averaged weights to evaluate", 0.5)


def _batch(config: TrainConfig, mesh) -> Iterator[Knob]:
  for times in (2, 4):
    if config.batch_size % times == 0:
      why = "another run: fewer tokens a step"
      yield Knob({"batch_size": config.batch_size // times}, why, float(times))


KNOBS: tuple[Callable[[TrainConfig, Mapping[str, int]], Iterator[Knob]], ...] = (
  _remat,
  _accumulation,
  _vocab_chunk,
  _fsdp,
  _tensor,
  _sequence,
  _dtype,
  _ema,
  _batch,
)


def best(found: list[Knob], wanted: int | None = None, count: int = 3) -> list[Knob]:
  """The knobs to name, one of each kind: those that save what is wanted first, then what most does.

  Args:
    found: of `knobs`.
    wanted: bytes a device that have to be saved; None where that is not known.
    count: how many to name.
  """
  kinds: dict[frozenset, list[Knob]] = {}
  for knob in found:
    kinds.setdefault(frozenset(knob.changes), []).append(knob)
  enough = lambda knob: knob.saves >= (wanted or 0)
  # Of those that are enough the cheapest, else the largest.
  rank = lambda knob: (0, knob.cost) if enough(knob) else (1, -knob.saves)
  return sorted((min(turns, key=rank) for turns in kinds.values()), key=rank)[:count]


# ---------------------------------------------------------------------------------------------
# What is said when it does not fit
# ---------------------------------------------------------------------------------------------


class OutOfMemory(MemoryError):
  """A step does not fit; its text says what was needed, what there is, and what would help.

  Attributes:
    needed: bytes a device, or None where the allocator did not say.
  """

  def __init__(self, text: str, needed: int | None):
    super().__init__(text)
    self.needed = needed


_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)\s?([KMGT]?)(?:i?B)?"
# Of the compilers and allocators of XLA: what is needed, then what there is where they say so.
_EXHAUSTED = (
  rf"Used {_SIZE} of {_SIZE} hbm",
  rf"total memory required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)",
  rf"total HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)",
  rf"Attempting to (?:allocate|reserve) {_SIZE}[^.]*\. That was not possible\. There are {_SIZE}",
  r"Out of memory (?:while trying to allocate|allocating) (\d+)() bytes",
)


def exhausted(error: BaseException) -> tuple[int | None, int | None] | None:
  """(bytes needed, bytes there are) of an error that says memory ran out; None of any other.

  What an allocator says was needed is one allocation, not all of the step's.
  """
  text = str(error)
  if not isinstance(error, MemoryError) and not re.search(
    r"RESOURCE_EXHAUSTED|[Oo]ut of memory|Ran out of memory", text
  ):
    return None
  for pattern in _EXHAUSTED:
    if found := re.search(pattern, text):
      numbers = [
        float(n) * _UNITS[unit] for n, unit in zip(*[iter(found.groups())] * 2, strict=True)
      ]
      return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else None
  return None, None


def out_of_memory(
  error: BaseException, config: TrainConfig, sizes: Sizes, device: jax.Device
) -> OutOfMemory | None:
  """What to raise in place of an error of compiling or running a step; None if it is another."""
  found = exhausted(error)
  if found is None:
    return None
  needed, there = found
  there = there or available(device, sizes.devices if device.platform == "cpu" else 1)
  return _too_large(needed, there, config, sizes, device)


@contextlib.contextmanager
def in_words(config: TrainConfig, sizes: Sizes, device: jax.Device) -> Iterator[None]:
  """Where a step is compiled or run: that memory runs out is said as an `OutOfMemory`."""
  try:
    yield
  except OutOfMemory:
    raise
  except (jax.errors.JaxRuntimeError, MemoryError) as error:
    said = out_of_memory(error, config, sizes, device)
    if said is None:
      raise
    raise said from None


def refuse_if_too_large(
  needed: int, there: float, config: TrainConfig, sizes: Sizes, device: jax.Device
) -> None:
  """Raises OutOfMemory before a step is run for which a device has not the bytes; inf: unknown.

  A CPU says nothing when memory runs out: its process is ended.
  """
  if needed > there:
    raise _too_large(needed, there, config, sizes, device)


def _too_large(
  needed: int | None, there: int | None, config: TrainConfig, sizes: Sizes, device: jax.Device
) -> OutOfMemory:
  # What an allocator names may be one array of many.
  all_of_it = not needed or not there or needed > there
  figures = {"needed" if all_of_it else "asked for at once": needed, "there": there}
  said = ", ".join(f"{_gib(size)} {word}" for word, size in figures.items() if size)
  lines = [f"out of memory on {device.device_kind}" + (f": {said}" if said else "")]
  wanted = needed - there if needed and there and needed > there else None
  named = best(knobs(config, sizes), wanted)
  if named:
    lines.append("what would help (bytes a device, estimated; magneto_jax.plan compiles them):")
    width = max(len(knob.flags) for knob in named)
    lines += [f"  {x.flags:<{width}}  saves {_gib(x.saves)}: {x.why}" for x in named]
  return OutOfMemory("\n".join(lines), needed)


def _gib(size: int) -> str:
  return (
    f"{size / hardware.GIB:.2f} GiB" if size >= hardware.GIB / 10 else f"{size / 2**20:.1f} MiB"
  )
