"""A run's step, compiled for devices that need not be there, and what can be said of it beforehand.

Memory is the compiler's own. Products, bytes and collectives are read from the compiled program
(`hlo`). Times are a roofline: the least that each would take at the data sheets' rates
(`hardware`). Nothing is run, and no data are read. `plan.py` is the command, docs/plan.md explains
what it prints.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import rich.console
import rich.table
import rich.text

from magneto_jax import hardware, hlo, memory, program, reporting, sharding
from magneto_jax.config import ConfigError, TrainConfig, config_errors
from magneto_jax.hardware import Topology
from magneto_jax.tasks import TASKS
from magneto_jax.tasks.task import Facts

# Combinations of knobs that are compiled before giving up.
_COMBINATIONS = 3


class Attempt(NamedTuple):
  """A config compiled for a topology, or refused by its compiler.

  Attributes:
    config: what was compiled.
    lowered: its step before that.
    compiled: its step; None if it does not fit.
    parts: memory by part; where it does not fit, as the compiler's error has it.
    available: bytes a device has; None where that is not known.
  """

  config: TrainConfig
  lowered: program.Program
  compiled: program.Program | None
  parts: memory.Memory
  available: int | None

  @property
  def peak(self) -> int:
    """Bytes of a device."""
    return self.parts.peak

  @property
  def fits(self) -> bool:
    """Whether it can run."""
    return self.compiled is not None and (self.available is None or self.peak <= self.available)


class Transfer(NamedTuple):
  """The collectives of a kind over the same axes, in a step of one device.

  Attributes:
    axes, kind, group: as of `hlo.Collective`; the largest group.
    instructions, times: how many the program has, and how often they run.
    bytes: all together.
    links: what they go over, in words; empty where that is not known.
    seconds: the least they take; None likewise.
  """

  axes: tuple[str, ...]
  kind: str
  group: int
  instructions: int
  times: int
  bytes: int
  links: str
  seconds: float | None


class Roofline(NamedTuple):
  """The least that a step takes, by what it uses.

  Attributes:
    seconds: {"compute" | "memory" | "network: axes": seconds}.
    bound: the largest of them.
    overlapped: a step's seconds if everything overlaps: the largest alone.
    exposed: if transfers between devices overlap with nothing.
    utilisation: share of the peak at which the model's FLOPs are done, of both, the best first.
  """

  seconds: dict[str, float]
  bound: str
  overlapped: float
  exposed: float
  utilisation: tuple[float, float]


class Remedy(NamedTuple):
  """A change that may make a step fit.

  Attributes:
    knob: the change, with its estimated saving.
    attempt: the changed config, compiled.
    saved: bytes that it saves in truth.
  """

  knob: memory.Knob
  attempt: Attempt
  saved: int


class Plan(NamedTuple):
  """All that is said of a run beforehand.

  Attributes:
    topology: the machine.
    attempt: the step compiled for it.
    model_flops: of a step of all devices, by the sizes of the model.
    kernel_flops: {kernel: (calls, FLOPs)} of a device's step.
    cost: of a device's step; None if it does not fit.
    transfers: its collectives, the most bytes first.
    roofline: None where rates are not known.
    remedies: what would make it fit, if it does not.
  """

  topology: Topology
  attempt: Attempt
  model_flops: int
  kernel_flops: dict[str, tuple[int, int]]
  cost: hlo.Cost | None
  transfers: tuple[Transfer, ...]
  roofline: Roofline | None
  remedies: tuple[Remedy, ...]


def make_plan(config: TrainConfig, name: str) -> Plan:
  """Plans a run for a topology, by its name; see `hardware.topology`.

  Raises:
    ConfigError: if there is no such topology, or the config cannot be run on it.
  """
  with config_errors():
    topology = hardware.topology(name, slices=config.mesh.slices)
  facts = TASKS[config.task].planned_facts(config)
  attempt = compile_for(config, facts, topology)
  remedies = () if attempt.fits else tuple(_remedies(attempt, facts, topology))
  if attempt.compiled is None:
    return Plan(topology, attempt, attempt.lowered.flops, {}, None, (), None, remedies)
  mesh = attempt.lowered.mesh
  cost = hlo.cost(attempt.compiled.step.as_text(), dict(mesh.shape))
  kernels = kernel_flops(cost)
  moved = tuple(transfers(cost, topology, mesh))
  roofline = _roofline(attempt, cost, kernels, moved, topology)
  return Plan(topology, attempt, attempt.lowered.flops, kernels, cost, moved, roofline, remedies)


def compile_for(config: TrainConfig, facts: Facts, topology: Topology) -> Attempt:
  """Compiles the config's step for a topology; that it does not fit is no error."""
  with config_errors():
    mesh = sharding.make_mesh(config.mesh.sizes(), topology.devices)
  lowered = program.lower_step(config, facts, mesh)
  device = topology.devices[0]
  there = memory.available(device, mesh.size)
  try:
    compiled = lowered.compile()
  except (jax.errors.JaxRuntimeError, MemoryError) as error:
    parts = memory.of_refused(error, lowered.state, lowered.batch)
    if parts is None:
      words = str(error).strip().splitlines() or [type(error).__name__]
      raise ConfigError(f"the step cannot be compiled for {topology}: {words[0]}") from error
    return Attempt(config, lowered, None, parts, there)
  parts = compiled.memory_by_part()
  return Attempt(config, lowered, compiled, parts, there)


# ---------------------------------------------------------------------------------------------
# What the program does
# ---------------------------------------------------------------------------------------------


def kernel_flops(cost: hlo.Cost) -> dict[str, tuple[int, int]]:
  """{kernel: (calls, FLOPs)} of a step: a kernel's FLOPs are not in the program for XLA to count.

  Attention forwards is two products of 2 B T S N H, backwards five; hidden pairs are counted, as
  they are in the model's FLOPs. A kernel that is not attention's counts none.
  """
  found: dict[str, tuple[int, int]] = {}
  products = {"attention_forward": 2, "attention_backward": 5}
  for call in cost.custom_calls:
    name = _kernel(call)
    # Queries and keys, [B, T, N H] and [B, S, K H], are the first floating arrays.
    arrays = [x for x in call.operands if "f" in x.dtype and len(x.sizes) >= 3]
    flops = 0
    if name in products:
      queries, keys = arrays[:2]
      flops = products[name] * 2 * queries.count * keys.sizes[1]
    calls, total = found.get(name, (0, 0))
    found[name] = calls + call.times, total + call.times * flops
  return found


def _kernel(call: hlo.CustomCall) -> str:
  """The name of a Pallas kernel; of another call its target."""
  *_, name, last = ["", "", *call.origin.split("/")]
  return name if last == "pallas_call" else call.target


def transfers(cost: hlo.Cost, topology: Topology, mesh: jax.sharding.Mesh) -> Iterator[Transfer]:
  """The collectives of a step by axes and kind, with the links that they go over."""
  for (axes, kind), found in hlo.by_axes(cost.collectives):
    seconds = [_seconds(each, topology, mesh) for each in found]
    yield Transfer(
      axes=axes,
      kind=kind,
      group=max(each.group for each in found),
      instructions=len(found),
      times=sum(each.times for each in found),
      bytes=sum(each.times * each.bytes for each in found),
      links=_links(axes, topology, mesh),
      seconds=None if None in seconds else sum(seconds),
    )


def _links(axes: Sequence[str], topology: Topology, mesh: jax.sharding.Mesh) -> str:
  within = [axis for axis in axes if axis != "slice"]
  way = hardware.path(topology, mesh, within) if within else None
  words = [f"{way.words}, {way.rate / 1e9:g} GB/s"] if way else []
  if "slice" in axes and (rate := topology.chip.network_rate):
    words.append(f"data centre, {rate / 1e9:g} GB/s")
  return " + ".join(words)


def _seconds(each: hlo.Collective, topology: Topology, mesh: jax.sharding.Mesh) -> float | None:
  """The least that all runs of a collective take.

  Between slices a device sends over the network what is its own share after its slice's part of
  the collective is done.
  """
  within = [axis for axis in each.axes if axis != "slice"]
  between = mesh.shape["slice"] if "slice" in each.axes else 1
  group, size, total = each.group // between, each.bytes, 0.0
  if within:
    way = hardware.path(topology, mesh, within)
    if way is None:
      return None
    total = hardware.seconds(each.kind, size, max(group, 2), way)
  if between > 1:
    if (rate := topology.chip.network_rate) is None:
      return None
    network = hardware.Path(rate, rate, rate, 1, "network")
    total += hardware.seconds(each.kind, size / max(group, 1), between, network)
  return total * each.times


def _roofline(attempt, cost, kernels, moved, topology) -> Roofline | None:
  chip = topology.chip
  if chip.flops is None or chip.memory_rate is None:
    return None
  flops = cost.matrix_flops + sum(total for _, total in kernels.values())
  seconds = {"compute": flops / chip.flops, "memory": cost.bytes / chip.memory_rate}
  for each in moved:
    name = _network(each.axes)
    seconds[name] = seconds.get(name, 0.0) + each.seconds
  bound = max(seconds, key=seconds.get)
  network = sum(each.seconds for each in moved)
  overlapped = seconds[bound]
  exposed = max(seconds["compute"], seconds["memory"]) + network
  ideal = attempt.lowered.flops / (attempt.lowered.mesh.size * chip.flops)
  return Roofline(seconds, bound, overlapped, exposed, (ideal / overlapped, ideal / exposed))


def _network(axes: Sequence[str]) -> str:
  return f"network: {', '.join(axes)}"


# ---------------------------------------------------------------------------------------------
# What would make it fit
# ---------------------------------------------------------------------------------------------


def _remedies(attempt: Attempt, facts: Facts, topology: Topology) -> Iterator[Remedy]:
  """Three knobs, compiled; and if none of them is enough, as many together as are."""
  sizes = attempt.lowered.sizes
  wanted = attempt.peak - attempt.available
  found = memory.knobs(attempt.config, sizes)
  tried = lambda knob: _tried(knob, attempt, facts, topology)
  alone = [remedy for knob in memory.best(found, wanted) if (remedy := tried(knob))]
  yield from alone
  if any(remedy.attempt.fits for remedy in alone):
    return
  knob = memory.Knob({}, "together", 0.0)
  compiled = 0
  while compiled < _COMBINATIONS:
    config = memory.changed(attempt.config, knob.changes)
    # What leaves the run as it is comes first.
    more = sorted(memory.knobs(config, sizes), key=lambda each: each.cost >= 0.3)
    if not more:
      return
    changes = knob.changes | more[0].changes
    knob = knob._replace(changes=changes, saves=knob.saves + more[0].saves)
    if knob.saves >= wanted and (remedy := tried(knob)):
      compiled += 1
      if remedy.attempt.fits:
        yield remedy
        return


def _tried(knob, attempt: Attempt, facts: Facts, topology: Topology) -> Remedy | None:
  """The change, compiled; None where the model refuses it."""
  try:
    other = compile_for(memory.changed(attempt.config, knob.changes), facts, topology)
  except ConfigError:
    return None
  return Remedy(knob, other, attempt.peak - other.peak)


# ---------------------------------------------------------------------------------------------
# As a person reads it
# ---------------------------------------------------------------------------------------------

_binary = functools.partial(reporting.in_units, unit="B", base=1024)


def _table(title: str, *columns: str) -> rich.table.Table:
  """Words on the left, numbers on the right: a column whose name starts with > is of numbers."""
  table = rich.table.Table(title=title, title_justify="left", box=None, pad_edge=False)
  for column in columns:
    table.add_column(
      column.removeprefix(">"), justify="right" if column.startswith(">") else "left"
    )
  return table


def show(plan: Plan, console: rich.console.Console) -> None:
  """Prints a plan."""
  attempt, lowered = plan.attempt, plan.attempt.lowered
  config, mesh = attempt.config, lowered.mesh
  line = lambda text="", style=None: console.print(
    rich.text.Text(text, style=style or ""), highlight=False, soft_wrap=True
  )
  axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
  parameters = reporting.count(lowered.state.params)
  line(f"{config.recipe}, {parameters:,} parameters, on {plan.topology}", "bold")
  length = lowered.task.length(config)
  rows = f"{config.batch_size:,} rows of {length:,} tokens a step"
  parts = f", in {config.accumulation} parts" if config.accumulation > 1 else ""
  line(
    f"mesh {axes or 'of one device'}; {rows}{parts}; {config.model.dtype}, remat"
    f" {config.model.remat}"
  )
  took = f"lowered in {lowered.lower_seconds:.1f} s"
  if attempt.compiled:
    took += f", compiled in {attempt.compiled.compile_seconds:.1f} s"
    line(f"attention: {attention(plan)}; {took}")
  else:
    line(f"{took}; refused by the compiler: it does not fit")
  line()
  for table in tables(plan):
    console.print(table)
    line()
  if plan.roofline:
    roofline = plan.roofline
    tokens = config.batch_size * length / mesh.size
    line(f"bound by {roofline.bound}", "bold")
    for seconds, share, case in (
      (roofline.overlapped, roofline.utilisation[0], "if everything overlaps"),
      (roofline.exposed, roofline.utilisation[1], "if no transfer overlaps with work"),
    ):
      rate = f"{tokens / seconds:,.0f} tokens a second a device, MFU {share:.1%}"
      line(f"  at least {_time(seconds)} a step {case}: at most {rate}")
  for assumption in assumptions(plan):
    line(f"- {assumption}")
  line()
  line(*verdict(plan))


def attention(plan: Plan) -> str:
  """What does attention in the program, in words."""
  kernels = [name for name in plan.kernel_flops if "attention" in name]
  return f"kernels {', '.join(sorted(kernels))}" if kernels else "XLA's own products, no kernel"


def verdict(plan: Plan) -> tuple[str, str]:
  """Whether it fits, in words, and their style."""
  attempt = plan.attempt
  have = f" of the {_binary(attempt.available)} that each device has" if attempt.available else ""
  if not attempt.fits and not any(remedy.attempt.fits for remedy in plan.remedies):
    more = "; nothing that was tried makes it fit: take more devices, or a smaller model"
    return f"does not fit: {_binary(attempt.peak)}{have}{more}", "bold red"
  if attempt.fits:
    return f"fits: {_binary(attempt.peak)}{have}", "bold green"
  return f"does not fit: {_binary(attempt.peak)}{have}", "bold red"


_PARTS = {
  "parameters": "parameters",
  "average": "averaged parameters",
  "optimizer": "optimizer state",
  "batch": "batch",
  "padding": "padding of these",
  "results": "results",
  "temporaries": "temporaries",
  "code": "program",
}


def tables(plan: Plan) -> Iterator[rich.table.Table]:
  """Memory, work, transfers, the roofline, and remedies."""
  attempt = plan.attempt
  share = lambda size: f"{size / attempt.available:.1%}" if attempt.available else ""
  table = _table("Memory of a device", "part", ">bytes", ">of it")
  for name, words in _PARTS.items():
    if size := getattr(attempt.parts, name):
      table.add_row(words, _binary(size), share(size))
  table.add_section()
  table.add_row("at once", _binary(attempt.peak), share(attempt.peak))
  if attempt.available:
    table.add_row("there is", _binary(attempt.available), "")
  yield table
  if plan.cost:
    yield from _work_tables(plan)
  if plan.remedies:
    yield _remedy_table(plan)


def _work_tables(plan: Plan) -> Iterator[rich.table.Table]:
  chip, cost = plan.topology.chip, plan.cost
  devices = plan.attempt.lowered.mesh.size
  count = lambda value: reporting.in_units(value, "FLOP")
  table = _table("A device's step", "", ">amount")
  table.add_row("the model's FLOPs, its share", count(plan.model_flops / devices))
  table.add_row("matrix products in the program", count(cost.matrix_flops))
  for name, (calls, flops) in plan.kernel_flops.items():
    table.add_row(f"{name}, {calls:,} calls", count(flops) if flops else "not known")
  table.add_row("to and from memory", reporting.in_units(cost.bytes, "B"))
  yield table
  table = _table(
    "Collectives of a device's step",
    "axes",
    "kind",
    ">devices",
    "links",
    ">runs",
    ">bytes",
    ">least time",
  )
  for each in plan.transfers:
    table.add_row(
      ", ".join(each.axes),
      each.kind,
      str(each.group),
      each.links,
      f"{each.times:,}",
      reporting.in_units(each.bytes, "B"),
      "" if each.seconds is None else _time(each.seconds),
    )
  if plan.transfers:
    yield table
  if plan.roofline:
    rates = {
      "compute": f"{chip.flops / 1e12:g} TFLOP/s",
      "memory": f"{chip.memory_rate / 1e9:g} GB/s",
    } | {_network(each.axes): each.links for each in plan.transfers}
    table = _table("Roofline", "what", "at", ">least time", "")
    for name, seconds in plan.roofline.seconds.items():
      mark = "<- the bound" if name == plan.roofline.bound else ""
      table.add_row(name, rates[name], _time(seconds), mark)
    yield table


def _remedy_table(plan: Plan) -> rich.table.Table:
  table = _table(
    "What would help",
    "change",
    ">saves, estimated",
    ">compiled",
    ">then needs",
    "fits",
    "at the cost of",
  )
  for remedy in plan.remedies:
    table.add_row(
      remedy.knob.flags.replace(" ", "\n"),
      _binary(remedy.knob.saves),
      _signed(remedy.saved),
      _binary(remedy.attempt.peak),
      "yes" if remedy.attempt.fits else "no",
      remedy.knob.why,
    )
  return table


def _time(seconds: float) -> str:
  """Three digits, in seconds or a part of them."""
  units = (("s", 1), ("ms", 1e3), ("µs", 1e6), ("ns", 1e9))
  unit, scale = next((u for u in units if seconds * u[1] >= 1), units[-1])
  return f"{seconds * scale:.3g} {unit}"


def _signed(size: int) -> str:
  return f"{'-' if size < 0 else ''}{_binary(abs(size))}"


def assumptions(plan: Plan) -> list[str]:
  """What the figures go by."""
  said = ["Nothing was run: memory is the compiler's, the rest is read from the program it made."]
  if plan.roofline:
    said += [
      "Times are the least at the data sheets' rates (bfloat16's for products of any type): no"
      " latency, no congestion, no stragglers, no input.",
      "A transfer has the links of its own axes to itself; a line has one direction, a ring two.",
    ]
  if plan.cost:
    said.append("FLOPs of attention are of all pairs, hidden ones too; branches count all.")
    if plan.cost.unknown_loops:
      said.append(
        f"{len(plan.cost.unknown_loops)} loops turn an unknown number of times, and count once."
      )
  return said


# ---------------------------------------------------------------------------------------------
# As a program reads it
# ---------------------------------------------------------------------------------------------


def as_json(plan: Plan) -> dict[str, Any]:
  """The same as JSON-able values."""
  attempt, lowered = plan.attempt, plan.attempt.lowered
  return {
    "topology": plan.topology.name,
    "slices": plan.topology.slices,
    "device": plan.topology.devices[0].device_kind,
    "devices": lowered.mesh.size,
    "mesh": dict(lowered.mesh.shape),
    "config": dataclasses.asdict(attempt.config),
    "parameters": reporting.count(lowered.state.params),
    "fits": attempt.fits,
    "peak_bytes_per_chip": attempt.peak,
    "available_bytes_per_chip": attempt.available,
    "memory": attempt.parts._asdict(),
    "model_flops": plan.model_flops,
    "matrix_flops_per_chip": plan.cost and plan.cost.matrix_flops,
    "memory_traffic_bytes_per_chip": plan.cost and plan.cost.bytes,
    "kernels": {
      name: {"calls": calls, "flops": flops} for name, (calls, flops) in plan.kernel_flops.items()
    },
    "attention": attention(plan),
    "collectives": [each._asdict() for each in plan.transfers],
    "roofline": plan.roofline and plan.roofline._asdict(),
    "remedies": [
      {
        "changes": remedy.knob.changes,
        "estimated_saving": remedy.knob.saves,
        "compiled_saving": remedy.saved,
        "peak_bytes_per_chip": remedy.attempt.peak,
        "fits": remedy.attempt.fits,
        "why": remedy.knob.why,
      }
      for remedy in plan.remedies
    ],
    "assumptions": assumptions(plan),
    "lower_seconds": lowered.lower_seconds,
    "compile_seconds": attempt.compiled and attempt.compiled.compile_seconds,
    "versions": reporting.versions(),
  }
