"""What a compiled program does, read from its optimized HLO: products, bytes, collectives.

`compiled.cost_analysis()` counts a loop's body once, knows no collectives, and is silent on what
a TPU's program keeps on the chip; here loops count as often as they run. The text is XLA's own
(`compiled.as_text()`), of one device's part of the program, for CPUs, TPUs and GPUs.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
  """An array: XLA's name of its dtype, its sizes, and the memory it lies in (0: the main one)."""

  dtype: str
  sizes: tuple[int, ...]
  space: int = 0

  @property
  def count(self) -> int:
    """How many numbers."""
    return math.prod(self.sizes)

  @property
  def bytes(self) -> int:
    """Without the padding of a layout."""
    bits = re.match(r"[a-z]+(\d+)", self.dtype)  # bf16, s32, f8e4m3fn; token and opaque have none.
    return -(-self.count * (8 if self.dtype == "pred" else int(bits[1]) if bits else 0) // 8)


class Instruction(NamedTuple):
  """One line: `%name = shapes opcode(%operands), attributes`."""

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  arguments: str
  attributes: str

  def called(self, *keys: str) -> list[str]:
    """The computations that the attributes of these names call."""
    found = []
    for key in keys:
      for one, several in re.findall(rf"\b{key}=(?:%([\w.-]+)|\{{([^}}]*)\}})", self.attributes):
        found += [one] if one else re.findall(r"%([\w.-]+)", several)
    return found


class Computation(NamedTuple):
  """Instructions by name, and the one whose value is returned."""

  instructions: dict[str, Instruction]
  root: Instruction

  def inputs(self, instruction: Instruction) -> list[Instruction]:
    """The instructions that compute its operands."""
    return [self.instructions[name] for name in instruction.operands]

  def users(self, name: str) -> list[Instruction]:
    """The instructions that read it."""
    return [x for x in self.instructions.values() if name in x.operands]


class Module(NamedTuple):
  """Computations by name, and the name of the one that runs."""

  computations: dict[str, Computation]
  entry: str


class Collective(NamedTuple):
  """A transfer between devices.

  Attributes:
    kind: all-gather, all-reduce, reduce-scatter, all-to-all, ragged-all-to-all, collective-permute
      or collective-broadcast.
    bytes: the larger of a device's operands and results.
    times: how often a step.
    axes: those of the mesh over which a group's members differ.
    group: devices that exchange with each other.
    origin: where in the traced program it comes from, as JAX names it.
  """

  kind: str
  bytes: int
  times: int
  axes: tuple[str, ...]
  group: int
  origin: str


class CustomCall(NamedTuple):
  """A kernel: XLA knows its operands and results alone.

  Attributes:
    target: what is called.
    origin: as of a collective.
    times: how often a step.
    operands, results: their shapes.
  """

  target: str
  origin: str
  times: int
  operands: tuple[Shape, ...]
  results: tuple[Shape, ...]


class Cost(NamedTuple):
  """What one device does in a run of the program.

  Attributes:
    matrix_flops: of products and convolutions, 2 for each multiplication that meets data.
    bytes: read from and written to main memory by instructions, fusions as one.
    collectives: those of groups of two and more.
    custom_calls: kernels, whose FLOPs are not in `matrix_flops`; their bytes are in `bytes`.
    unknown_loops: loops whose number of turns the program does not show; they count once.
  """

  matrix_flops: int
  bytes: int
  collectives: tuple[Collective, ...]
  custom_calls: tuple[CustomCall, ...]
  unknown_loops: tuple[str, ...]


def cost(text: str, sizes: Mapping[str, int]) -> Cost:
  """Adds up a program.

  A conditional counts all its branches: an upper bound.

  Args:
    text: the optimized module, `compiled.as_text()`.
    sizes: of the mesh's axes, in the mesh's order: the program numbers devices as they stand in
      `mesh.devices.flat`.
  """
  return _Reader(parse(text), dict(sizes)).read()


# ---------------------------------------------------------------------------------------------
# Parsing
# ---------------------------------------------------------------------------------------------

_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\(([^)]*)\)?(.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")


def parse(text: str) -> Module:
  """Reads the text of a module.

  Raises:
    ValueError: if it is none.
  """
  computations, entry, name = {}, None, None
  for line in text.splitlines():
    if name is None:
      if header := _HEADER.match(line):
        name, instructions, root = header[2], {}, None
        entry = name if header[1] else entry
    elif line == "}" or line.startswith("}, execution_thread"):
      computations[name] = Computation(instructions, instructions[root])
      name = None
    elif found := _LINE.match(line):
      is_root, own, shapes, opcode, arguments, attributes = found.groups()
      operands = () if opcode == "constant" else tuple(re.findall(r"%([\w.-]+)", arguments))
      shapes = _shapes(shapes)
      instructions[own] = Instruction(own, opcode, shapes, operands, arguments, attributes)
      root = own if is_root else root
    else:  # An attribute of the line before holds a newline.
      instructions[own] = instructions[own]._replace(
        attributes=f"{instructions[own].attributes} {line}"
      )
  if entry is None:
    raise ValueError("this is not the text of an HLO module: it has no ENTRY")
  return Module(computations, entry)


@functools.lru_cache(maxsize=4096)
def _shapes(text: str) -> tuple[Shape, ...]:
  found = []
  for dtype, sizes, layout in _SHAPE.findall(text):
    space = re.search(r"S\((\d+)\)", layout)
    dims = tuple(int(size.removeprefix("<=")) for size in sizes.split(",") if size)
    found.append(Shape(dtype, dims, int(space[1]) if space else 0))
  return tuple(found)


def replica_groups(attributes: str, devices: int) -> list[list[int]]:
  """The groups of devices of a collective, in any of XLA's notations.

  `{{0,1},{2,3}}`: listed; `{}`: all. `[2,2]<=[2,2]T(1,0)`: the numbers from 0 on in the array
  [2, 2], transposed by T and cut into 2 groups of 2. `mesh['a'=2,'b'=2] {'b'}`: those along b; an
  axis `'b':(2)4` is the part of b with 2 before it and the size 4, and `device_ids=([2,4]T(1,0))`
  what stands in the mesh. A collective-permute's
  `source_target_pairs` are groups of two.
  """
  if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
    return [list(map(int, pair)) for pair in re.findall(r"(\d+),(\d+)", pairs[1])]
  if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
    groups = [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    return groups or [list(range(devices))]
  iota = r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
  if iota := re.search(iota, attributes):
    shape, *source = iota.groups()
    return _transposed(*source).reshape(_numbers(shape)).tolist()
  mesh = re.search(
    r"replica_groups=@?mesh\[([^\]]*)\](?:, ?device_ids=\((.*?)\))? \{([^}]*)\}", attributes
  )
  if mesh is None:
    raise ValueError(f"no groups of devices in {attributes[:200]!r}")
  axes, ids, along = mesh.groups()
  found = re.findall(r"'(\w+)'=(\d+)", axes)
  names, sizes = [name for name, _ in found], [int(size) for _, size in found]
  order = np.arange(math.prod(sizes))
  if ids and ids.startswith("["):
    order = _transposed(*re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", ids).groups())
  elif ids:
    order = np.array(_numbers(ids))
  # Every axis as three: what is before the part along which groups lie, the part, and the rest.
  found = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)
  parts = {name: (int(before or 1), int(size or 0)) for name, before, size in found}
  cut, grouped = [], []
  for name, size in zip(names, sizes, strict=True):
    before, part = parts.get(name, (1, 1))
    part = part or size
    cut += [before, part, size // (before * part)]
    grouped.append(len(cut) - 2)
  rest = [i for i in range(len(cut)) if i not in grouped]
  group = math.prod(cut[i] for i in grouped)
  return order.reshape(cut).transpose(*rest, *grouped).reshape(-1, group).tolist()


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",") if number]


def _transposed(sizes: str, order: str | None) -> np.ndarray:
  """0, 1, 2, ... as an array of these sizes, transposed."""
  numbers = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
  return numbers.transpose(_numbers(order) if order else None)


def axes_of(groups: Sequence[Sequence[int]], sizes: Mapping[str, int]) -> tuple[str, ...]:
  """The axes of a mesh along which the members of a group differ, in the mesh's order."""
  coordinates = [np.array(np.unravel_index(group, tuple(sizes.values()))) for group in groups]
  return tuple(
    name for i, name in enumerate(sizes) if any(np.ptp(places[i]) > 0 for places in coordinates)
  )


# ---------------------------------------------------------------------------------------------
# Adding up
# ---------------------------------------------------------------------------------------------

_COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
# Custom calls of the TPU compiler's own that compute nothing.
_MARKERS = {
  "AllocateBuffer",
  "AssumeGatherIndicesInBound",
  "AsyncCollectiveDone",
  "AsyncCollectiveStart",
  "ConcatBitcast",
  "GatherScatterIndicesBitpacked",
  "ZeroCrop",
}
# Views and markers: nothing moves. Loops and calls are gone into instead.
_FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "after-all",
  "partition-id",
  "replica-id",
  "opt-barrier",
  "add-dependency",
  "while",
  "conditional",
  "call",
}
_SLICES = {"slice", "dynamic-slice", "gather"}
# Written in place: the operand that holds the update.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
_VIEWS = {
  "bitcast",
  "reshape",
  "copy",
  "convert",
  "copy-start",
  "copy-done",
  "opt-barrier",
}


class _Reader:
  def __init__(self, module: Module, sizes: dict[str, int]):
    self._module, self._sizes = module, sizes
    self._flops = self._bytes = 0
    self._collectives, self._calls, self._unknown = [], [], []

  def read(self) -> Cost:
    self._visit(self._module.entry, 1)
    return Cost(
      self._flops,
      self._bytes,
      tuple(self._collectives),
      tuple(self._calls),
      tuple(self._unknown),
    )

  def _visit(self, name: str, times: int) -> None:
    """Adds a computation whose instructions run one after the other."""
    computation = self._module.computations[name]
    seen = set()
    for instruction in computation.instructions.values():
      self._bytes += times * self._traffic(computation, instruction)
      self._compute(computation, instruction, times, seen)
      if instruction.opcode == "while":
        (body,) = instruction.called("body")
        self._visit(body, times * self._turns(computation, instruction))
      elif instruction.opcode == "conditional":
        branches = "branch_computations", "true_computation", "false_computation"
        for branch in instruction.called(*branches):
          self._visit(branch, times)
      elif instruction.opcode == "call":
        for called in instruction.called("to_apply", "calls"):
          self._visit(called, times)
      elif instruction.opcode == "async-start":
        for called in instruction.called("calls"):
          self._visit(called, times)

  def _compute(self, computation, instruction, times: int, seen: set) -> None:
    """Adds products, kernels and collectives, also those within a fusion."""
    opcode = instruction.opcode
    kind = opcode.removesuffix("-start")
    if opcode == "dot":
      self._flops += times * _dot_flops(computation, instruction)
    elif opcode == "convolution":
      self._flops += times * _convolution_flops(computation, instruction)
    elif opcode == "fusion":
      for called in instruction.called("calls"):
        inner = self._module.computations[called]
        for each in inner.instructions.values():
          self._compute(inner, each, times, seen)
    elif opcode == "custom-call":
      target = _target(instruction)
      if target not in _MARKERS:
        shapes = tuple(shape for x in computation.inputs(instruction) for shape in x.shapes)
        call = CustomCall(target, _origin(instruction), times, shapes, instruction.shapes)
        self._calls.append(call)
    elif opcode == "send" and "_xla_megascale_target" in instruction.attributes:
      self._between_slices(computation, instruction, times)
    elif kind in _COLLECTIVES:
      # A TPU's program cuts a collective that runs beside others into a start, a middle and an
      # end, fusions of which each holds it.
      chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
      if chain is None or chain[1] not in seen:
        self._collective(computation, instruction, kind, times)
      if chain:
        seen.add(chain[1])

  def _collective(self, computation, instruction, kind: str, times: int) -> None:
    groups = replica_groups(instruction.attributes, math.prod(self._sizes.values()))
    size = max(map(len, groups), default=1)
    axes = axes_of(groups, self._sizes)
    if not axes:
      return
    results = instruction
    if instruction.opcode.endswith("-start"):
      done = (x for x in computation.users(instruction.name) if x.opcode.endswith("-done"))
      results = next(done, instruction)
    elif kind == "all-reduce" and self._is_scattered(computation, instruction):
      kind = "reduce-scatter"
    operands = sum(shape.bytes for x in computation.inputs(instruction) for shape in x.shapes)
    result = sum(shape.bytes for shape in results.shapes)
    found = Collective(kind, max(operands, result), times, axes, size, _origin(instruction))
    self._collectives.append(found)

  def _between_slices(self, computation, send, times: int) -> None:
    """A collective over the data centre's network, which a TPU's hosts carry out.

    `target="{1,2}x{0:3}"`: the same one of devices 0 to 3 of slices 1 and 2, slices being the
    slowest to vary in the numbers of devices.
    """
    attribute = lambda instruction, name: (
      re.search(rf'_xla_{name}="([^"]*)"', instruction.attributes) or ["", ""]
    )[1]
    kind = attribute(send, "megascale_transfer_type").lower().replace("_", "-")
    kind = {"one-to-one": "collective-permute"}.get(kind, kind)
    _, of_slice = attribute(send, "megascale_target").split("x")
    devices, own = math.prod(self._sizes.values()), _span(of_slice)
    groups = np.arange(devices).reshape(-1, own).T.tolist()
    rendezvous = attribute(send, "host_transfer_rendezvous")
    received = (
      x.shapes[:-2]  # Without its context and token.
      for x in computation.instructions.values()
      if x.opcode == "recv" and attribute(x, "host_transfer_rendezvous") == rendezvous
    )
    size = max(_bytes(send.shapes[:-2]), _bytes(next(received, ())))
    axes = axes_of(groups, self._sizes)
    found = Collective(kind, size, times, axes, devices // own, rendezvous)
    self._collectives.append(found)

  def _is_scattered(self, computation, instruction) -> bool:
    """Whether every device keeps its own part of a sum alone, as a TPU's fusions say it."""
    pending, found = computation.users(instruction.name), False
    while pending:
      user = pending.pop()
      if user.opcode in ("get-tuple-element", "bitcast"):
        pending += computation.users(user.name)
      elif user.opcode != "dynamic-slice":
        return False
      found = found or user.opcode == "dynamic-slice"
    is_by_device = any(x.opcode == "partition-id" for x in computation.instructions.values())
    return found and is_by_device

  # ------------------------------------------------------------------------------------- Bytes

  def _traffic(self, computation, instruction) -> int:
    """Bytes that an instruction reads from and writes to main memory."""
    opcode, shapes = instruction.opcode, instruction.shapes
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or opcode == "async-start":
      return 0
    if opcode == "custom-call" and _target(instruction) in _MARKERS:
      return 0
    inputs = computation.inputs(instruction)
    if opcode == "fusion":
      (called,) = instruction.called("calls")
      inner = self._module.computations[called]
      read = sum(
        min(self._read(inner, i), _main(x.shapes)) for i, x in enumerate(inputs) if _main(x.shapes)
      )
      return read + self._written(inner, inner.root, shapes)
    base = opcode.removesuffix("-start")
    if base == "slice" and opcode != base:  # (operand), result, context.
      shapes = shapes[1:2]
    elif base == "copy":  # With -start: result, operand, context.
      shapes = shapes[:1]
    if base in _SLICES:
      moved = sum(shape.bytes for shape in shapes)
      return (moved if _main(inputs[0].shapes) else 0) + _main(shapes)
    if base in _UPDATES:
      update = inputs[_UPDATES[base]].shapes
      return _main(update) + (_bytes(update) if _main(shapes) else 0)
    if base in _COLLECTIVES and opcode != base:
      done = (x for x in computation.users(instruction.name) if x.opcode.endswith("-done"))
      shapes = next(done, instruction).shapes
    return sum(_main(x.shapes) for x in inputs) + _main(shapes)

  def _read(self, inner, index: int) -> float:
    """Bytes that a fusion reads of its operand `index`, if it lies in main memory."""
    parameter = next(
      x
      for x in inner.instructions.values()
      if x.opcode == "parameter" and x.arguments.strip() == str(index)
    )
    pending, total = [(parameter, user) for user in inner.users(parameter.name)], 0
    while pending:
      value, user = pending.pop()
      if user.opcode in ("bitcast", "reshape"):
        pending += [(user, each) for each in inner.users(user.name)]
      elif user.opcode in _SLICES and user.operands[0] == value.name:
        total += _bytes(user.shapes)
      elif user.opcode in _UPDATES and user.operands[0] == value.name:
        continue  # Its other parts stay as they are.
      elif user.opcode == "fusion":
        (called,) = user.called("calls")
        nested = self._module.computations[called]
        total += sum(self._read(nested, i) for i, x in enumerate(user.operands) if x == value.name)
      else:
        return math.inf  # All of it.
    return total

  def _written(self, inner, root, shapes: Sequence[Shape]) -> int:
    """Bytes that a fusion writes to main memory."""
    if root.opcode == "tuple":
      parts = zip(inner.inputs(root), shapes, strict=True)
      return sum(self._written(inner, part, (shape,)) for part, shape in parts)
    while root.opcode in ("bitcast", "reshape"):
      (root,) = inner.inputs(root)
    if root.opcode in _UPDATES and _main(shapes):
      return _bytes(inner.inputs(root)[_UPDATES[root.opcode]].shapes)
    return _main(shapes)

  # ------------------------------------------------------------------------------------- Loops

  def _turns(self, computation, loop) -> int:
    """How often a loop turns; 1 where that cannot be seen."""
    known = re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', loop.attributes)
    turns = int(known[1]) if known else self._counted(computation, loop)
    if turns is None:
      self._unknown.append(loop.name)
    return 1 if turns is None else turns

  def _counted(self, computation, loop) -> int | None:
    """For a loop that counts by a constant up to a constant, as JAX's and XLA's own do."""
    (name,) = loop.called("condition")
    condition = self._module.computations[name]
    compare = condition.root
    if compare.opcode == "fusion":
      (called,) = compare.called("calls")
      inner = self._module.computations[called]
      outer, compare = condition.inputs(compare), inner.root
      sides = [_source(inner, x) for x in inner.inputs(compare)]
      sides = [outer[int(x.arguments)] if x.opcode == "parameter" else x for x in sides]
    else:
      sides = condition.inputs(compare)
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
      return None
    counter, bound = (_source(condition, x) for x in sides)
    if counter.opcode != "get-tuple-element":
      return None
    (initial,) = computation.inputs(loop)
    begin = self._constant(computation, initial, counter)
    end = _number(bound)
    if end is None and bound.opcode == "get-tuple-element":
      end = self._constant(computation, initial, bound)
    (name,) = loop.called("body")
    body, index = self._module.computations[name], _index(counter)
    if begin is None or end is None or body.root.opcode != "tuple":
      return None
    step = self._increment(body, body.inputs(body.root)[index], index)
    return None if not step or step < 0 else max(-((begin - end) // step), 0)

  def _increment(self, body, value, index: int) -> int | None:
    """By how much a value is more than what a loop's state held at `index` before the turn."""
    value = _source(body, value)
    if value.opcode == "get-tuple-element":
      return 0 if _index(value) == index else None
    if value.opcode == "fusion":
      (called,) = value.called("calls")
      inner, outer = self._module.computations[called], body.inputs(value)
      pair = [_source(inner, x) for x in inner.inputs(inner.root)]
      pair = [outer[int(x.arguments)] if x.opcode == "parameter" else x for x in pair]
      value = inner.root
    else:
      pair = body.inputs(value)
    if value.opcode != "add":
      return None
    for one, other in (pair, pair[::-1]):
      added = _number(_source(body, other))
      if added is not None and (before := self._increment(body, one, index)) is not None:
        return before + added
    return None

  def _constant(self, computation, initial, element) -> int | None:
    """What a loop's state holds at an element before the first turn, if it is a constant."""
    if initial.opcode != "tuple":
      return None
    return _number(_source(computation, computation.inputs(initial)[_index(element)]))


def _source(computation: Computation, instruction: Instruction) -> Instruction:
  """Where a value comes from, before copies of it."""
  while instruction.opcode in _VIEWS:
    instruction = computation.inputs(instruction)[0]
  return instruction


def _index(element: Instruction) -> int:
  return int(re.search(r"index=(\d+)", element.attributes)[1])


def _number(instruction: Instruction) -> int | None:
  is_number = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments)
  return int(instruction.arguments) if is_number else None


def _bytes(shapes: Sequence[Shape]) -> int:
  return sum(shape.bytes for shape in shapes)


def _main(shapes: Sequence[Shape]) -> int:
  """Bytes of what lies in main memory."""
  return sum(shape.bytes for shape in shapes if shape.space == 0)


def _span(text: str) -> int:
  """How many numbers there are in `{1,2}` or `{0:3}`."""
  parts = (part.split(":") for part in text.strip("{}").split(","))
  return sum(int(part[-1]) - int(part[0]) + 1 for part in parts)


def _target(custom_call: Instruction) -> str:
  return re.search(r'custom_call_target="([^"]*)"', custom_call.attributes)[1]


def _origin(instruction: Instruction) -> str:
  found = re.search(r'op_name="([^"]*)"', instruction.attributes)
  return found[1] if found else ""


def _dot_flops(computation: Computation, dot: Instruction) -> int:
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
  (left,) = computation.inputs(dot)[0].shapes
  sizes = (left.sizes[int(i)] for i in (contracted[1].split(",") if contracted else ()) if i)
  return 2 * dot.shapes[0].count * math.prod(sizes)


def _convolution_flops(computation: Computation, convolution: Instruction) -> int:
  """A TPU's products are convolutions, whose windows may reach over the edge, where nothing is."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
  (left,), (right,) = (x.shapes for x in computation.inputs(convolution))
  left, right, out = (
    dict(zip(names, shape.sizes, strict=True))
    for names, shape in zip(labels.groups(), (left, right, convolution.shapes[0]), strict=True)
  )
  window = dict(re.findall(r"(\w+)=([\dx_-]+)", _within(convolution.attributes, "window")))
  flops = 2 * out["b"] * out["f"] * right["i"]
  for i, name in enumerate(sorted(name for name in out if name.isdigit())):
    stride, left_dilation, right_dilation = (
      int(window[key].split("x")[i]) if key in window else 1
      for key in ("stride", "lhs_dilate", "rhs_dilate")
    )
    low = int(window["pad"].split("x")[i].split("_")[0]) if "pad" in window else 0
    # The places that the window of every output reads, in the (dilated) input.
    outputs, taps = np.arange(out[name])[:, None], np.arange(right[name])[None, :]
    places = outputs * stride + taps * right_dilation - low
    inside = (places >= 0) & (places <= (left[name] - 1) * left_dilation)
    flops *= int(np.count_nonzero(inside & (places % left_dilation == 0)))
  return flops


def _within(attributes: str, key: str) -> str:
  """The text between the braces of an attribute; empty if there is none."""
  found = re.search(rf"\b{key}=\{{([^}}]*)\}}", attributes)
  return found[1] if found else ""


def by_axes(collectives: Sequence[Collective]) -> Iterator[tuple[tuple, list[Collective]]]:
  """Groups collectives by (axes, kind), the most bytes first."""
  groups: dict[tuple, list[Collective]] = {}
  for collective in collectives:
    groups.setdefault((collective.axes, collective.kind), []).append(collective)
  moved = lambda item: -sum(each.bytes * each.times for each in item[1])
  yield from sorted(groups.items(), key=moved)
