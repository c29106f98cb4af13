"""Costs read from compiled programs, against what the programs do by hand."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from magneto_jax import hlo
from tests import simulated
from tests.hlo_programs import PROGRAMS
from tests.kernels import elsewhere

ROOT = pathlib.Path(__file__).resolve().parents[1]


@functools.cache
def found(topology: str | None = None) -> dict[str, dict]:
  """What `tests.hlo_programs` prints, by program."""
  environment = os.environ | elsewhere.LIBTPU if topology else simulated.devices(8)
  command = [sys.executable, "-m", "tests.hlo_programs", *([topology] if topology else [])]
  options = dict(cwd=ROOT, env=environment, capture_output=True, text=True)
  done = subprocess.run(command, timeout=300, **options)
  assert done.returncode == 0, done.stderr[-2000:]
  return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_cost_what_they_do(name):
  program, cost = PROGRAMS[name], found()[name]
  assert cost["flops"] == program.flops
  moved = {(tuple(axes), kind): (times, size) for axes, kind, times, size in cost["moved"]}
  assert moved == program.moved
  assert cost["unknown"] == program.unknown
  if program.bytes:
    least, most = program.bytes
    assert least <= cost["bytes"] <= most


@pytest.mark.ci
@elsewhere.ONE_AT_A_TIME
def test_a_tpus_program_costs_the_same():
  """Loops without a stated count, products as convolutions, collectives cut into three."""
  assert importlib.util.find_spec("libtpu"), "no TPU compiler: pip install -e '.[plan]'"
  costs = found("v5e:2x2")
  assert costs["nested"]["flops"] == PROGRAMS["nested"].flops
  turns = PROGRAMS["in loops"].moved[("tensor",), "collective-permute"]
  # The other axis has one device.
  assert costs["in loops"]["moved"] == [[["tensor"], "collective-permute", *turns]]
  # On 4 devices, not 8.
  assert costs["fsdp"]["flops"] == 2 * PROGRAMS["fsdp"].flops
  turns = PROGRAMS["fsdp"].moved[("tensor",), "all-gather"]
  assert costs["fsdp"]["moved"] == [[["tensor"], "all-gather", *turns]]
  assert all(cost["unknown"] == 0 for cost in costs.values())


# Every notation, and the groups it means.
GROUPS = {
  "replica_groups={{0,2},{1,3}}, x=1": [[0, 2], [1, 3]],
  "replica_groups={}, x=1": [[0, 1, 2, 3]],
  "replica_groups=[2,2]<=[4], x=1": [[0, 1], [2, 3]],
  "replica_groups=[2,2]<=[2,2]T(1,0), x=1": [[0, 2], [1, 3]],
  "replica_groups=[4,2]<=[2,2,2]T(0,2,1), x=1": [[0, 2], [1, 3], [4, 6], [5, 7]],
  "replica_groups=mesh['a'=2,'b'=2] {'b'}, x=1": [[0, 1], [2, 3]],
  "replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a','b'}, x=1": [[0, 2], [1, 3]],
  "replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x=1": [[0, 1, 2, 3]],
  "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, x=1": [
    [0, 1, 2, 3],
    [4, 5, 6, 7],
  ],
  "replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}, x=1": [[0, 2], [1, 3]],
  # The middle one of three parts of 2 each.
  "replica_groups=mesh['a'=8] {'a':(2)2}, x=1": [[0, 2], [1, 3], [4, 6], [5, 7]],
  "source_target_pairs={{0,1},{1,2},{3,3}}, x=1": [[0, 1], [1, 2], [3, 3]],
}


@pytest.mark.parametrize("text", GROUPS)
def test_groups_of_every_notation(text):
  assert hlo.replica_groups(text, 4) == GROUPS[text]


def test_no_groups_are_refused():
  with pytest.raises(ValueError, match="no groups of devices"):
    hlo.replica_groups("replica_groups=others", 4)


def test_axes_are_those_that_a_group_varies_over():
  sizes = {"data": 2, "fsdp": 1, "tensor": 4}
  assert hlo.axes_of([[0, 4], [1, 5]], sizes) == ("data",)
  assert hlo.axes_of([[0, 1], [4, 5]], sizes) == ("tensor",)  # Part of the axis.
  assert hlo.axes_of([[3, 4]], sizes) == ("data", "tensor")
  assert hlo.axes_of([[0], [1]], sizes) == ()


ASYNC = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%p), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[2] {
  %x = f32[8]{0} parameter(0), metadata={op_name="x"}, frontend_attributes={note="{
}},"}
  %gather = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), channel_id=1, replica_groups=[1,4]<=[4]
  %gathered = f32[32]{0} all-gather-done(%gather)
  %cast = f32[8]{0:S(1)} collective-broadcast(%x), channel_id=3, replica_groups={{0,1},{2,3}}
  %start = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%x), calls=%wrapped
  ROOT %done = f32[2]{0} async-done(%start)
}
"""


def test_a_start_and_its_done_are_one_transfer():
  cost = hlo.cost(ASYNC, {"a": 2, "b": 2})
  assert [(x.kind, x.bytes, x.axes, x.group) for x in cost.collectives] == [
    ("all-gather", 128, ("a", "b"), 4),
    ("collective-broadcast", 32, ("b",), 2),
    ("reduce-scatter", 32, ("a", "b"), 4),
  ]
  # Reads of 8, 8 and 8 numbers; 32 and 2 written, and 8 to memory on the chip.
  assert cost.bytes == 4 * (8 + 32 + 8 + 8 + 2)


# What a TPU's compiler makes of a gather that runs beside other work, and of a reduce-scatter.
TPU = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%begin (p: f32[8]) -> (f32[8], f32[32]) {
  %p = f32[8]{0:T(8,128)} parameter(0)
  %g = f32[32]{0} all-gather(%p), replica_groups=[1,4]<=[4], frontend_attributes={chain_id="5"}
  ROOT %s = (f32[8]{0}, f32[32]{0:S(1)}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%middle (p: f32[8], q: f32[8,4]) -> f32[8,8] {
  %p = f32[8]{0} parameter(0)
  %q = f32[8,4]{1,0} parameter(1)
  %g = f32[32]{0} all-gather(%p), replica_groups=[1,4]<=[4], frontend_attributes={chain_id="5"}
  ROOT %c = f32[8,8]{1,0} convolution(%q, %q), dim_labels=bf_oi->bf
}

%end (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  %g = f32[32]{0} all-gather(%p), replica_groups=[1,4]<=[4], frontend_attributes={chain_id="5"}
  ROOT %d = f32[32]{0:S(1)} custom-call(%p, %g), custom_call_target="AsyncCollectiveDone"
}

%scattered (p: f32[8]) -> (f32[2], f32[2]) {
  %p = f32[8]{0} parameter(0)
  %r = (f32[8]{0}, f32[8]{0}) all-reduce(%p, %p), replica_groups={{0,1,2,3}}, to_apply=%add
  %i = u32[] partition-id()
  %r0 = f32[8]{0} get-tuple-element(%r), index=0
  %r1 = f32[8]{0} get-tuple-element(%r), index=1
  %own0 = f32[2]{0} dynamic-slice(%r0, %i), dynamic_slice_sizes={2}
  %own1 = f32[2]{0} dynamic-slice(%r1, %i), dynamic_slice_sizes={2}
  ROOT %own = (f32[2]{0}, f32[2]{0}) tuple(%own0, %own1)
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  %q = f32[8,4]{1,0} broadcast(%x), dimensions={0}
  %f1 = (f32[8]{0}, f32[32]{0:S(1)}) fusion(%x), kind=kCustom, calls=%begin
  %f2 = f32[8,8]{1,0} fusion(%x, %q), kind=kOutput, calls=%middle
  %f3 = f32[32]{0:S(1)} fusion(%x), kind=kCustom, calls=%end
  %f4 = (f32[2]{0}, f32[2]{0}) fusion(%x), kind=kCustom, calls=%scattered
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %x)
}

%condition (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %end.1 = s32[] constant(9)
  ROOT %lt = pred[] compare(%n, %end.1), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %zero = s32[] constant(2)
  %begin.1 = s32[] copy(%zero)
  %t = (s32[], f32[8]{0}) tuple(%begin.1, %x)
  %w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%w), index=1
}
"""


def test_what_a_tpus_compiler_takes_apart_is_one():
  """In a loop from 2 to 9: a gather in three parts, a sum of which each keeps its own part."""
  cost = hlo.cost(TPU, {"a": 4})
  assert [(x.kind, x.bytes, x.times) for x in cost.collectives] == [
    ("all-gather", 128, 7),
    ("reduce-scatter", 64, 7),
  ]
  assert cost.matrix_flops == 7 * 2 * 8 * 8 * 4
  assert cost.custom_calls == () and cost.unknown_loops == ()


def test_loops_count_by_their_step_or_are_said_to_be_unknown():
  """By twos from 2 to 9 in 4 turns; by a number that is not in the program, nobody knows."""
  loop = lambda step: hlo.cost(TPU.replace("%one = s32[] constant(1)", step), {"a": 4})
  assert {x.times for x in loop("%one = s32[] constant(2)").collectives} == {4}
  unknown = loop("%one = s32[] multiply(%n, %n)")
  assert {x.times for x in unknown.collectives} == {1} and unknown.unknown_loops == ("w",)


# Of the gradients of two slices of four chips, each sums its own share over the network.
SLICES = """HloModule m

ENTRY %main (x: bf16[64]) -> bf16[64] {
  %x = bf16[64]{0} parameter(0)
  %token = token[] after-all()
  %send = (bf16[64]{0}, u32[], token[]) send(%x, %token), channel_id=3, is_host_transfer=true, NAMES
  %recv = (bf16[64]{0}, u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true, NAMES
  %sent = token[] send-done(%send), channel_id=3, is_host_transfer=true
  %got = (bf16[64]{0}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true
  ROOT %y = bf16[64]{0} get-tuple-element(%got), index=0
}
"""
NAMES = (
  'frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",'
  '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
)


def test_what_slices_exchange_through_their_hosts_is_a_collective():
  cost = hlo.cost(SLICES.replace("NAMES", NAMES), {"slice": 2, "fsdp": 4})
  (found,) = cost.collectives
  assert found[:5] == ("all-reduce", 2 * 64, 1, ("slice",), 2)


def test_a_text_that_is_none_is_refused():
  with pytest.raises(ValueError, match="not the text of an HLO module"):
    hlo.parse("something else")
