"""Digests against plain integers, on every mesh, and what they see."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax import digest

MASK = 2**32 - 1


def of(tree):
  return digest.read(digest.dispatch(tree))


def by_definition(bits: np.ndarray) -> str:
  """Both lanes of words of 32 bits, an element at a time, in Python's integers."""

  def mix(x):
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK
    return x ^ (x >> 16)

  flat = [int(np.prod(bits.shape[axis + 1 :], dtype=np.int64)) for axis in range(bits.ndim)]
  powers = [0x85EBCA6B ** (axis + 1) for axis in range(bits.ndim)]
  lanes = []
  for seed, factors in ((0x9E3779B9, flat), (0x85EBCA6B, powers)):
    total = 0
    for index in np.ndindex(bits.shape):
      place = seed + sum(i * factor for i, factor in zip(index, factors, strict=True))
      total += mix(int(bits[index]) ^ mix(place & MASK))
    lanes.append(f"{total & MASK:08x}")
  return "".join(lanes)


def draw(*shape, dtype=np.float32):
  return np.random.default_rng(0).normal(size=shape).astype(dtype)


WORDS = {
  "float32": (draw(3, 5, 2), lambda x: x.view(np.uint32)),
  "scalar": (draw(), lambda x: np.asarray(x).view(np.uint32)),
  "empty": (draw(0, 3), lambda x: x.view(np.uint32)),
  "bfloat16": (draw(4, 3, dtype=jnp.bfloat16), lambda x: x.view(np.uint16)),
  "bool": (draw(7) > 0, lambda x: x.astype(np.uint32)),
  "int8": (np.arange(-5, 5, dtype=np.int8), lambda x: x.view(np.uint8)),
  "int32": (np.arange(-5, 5, dtype=np.int32), lambda x: x.view(np.uint32)),
  "complex64": (draw(3) + 1j * draw(3), lambda x: x.view(np.float32).view(np.uint32).reshape(3, 2)),
  "not finite": (np.array([np.nan, np.inf, -0.0], np.float32), lambda x: x.view(np.uint32)),
}


@pytest.mark.parametrize("array, words", WORDS.values(), ids=WORDS)
def test_it_is_that_of_its_definition(array, words):
  found = of({"a": jnp.asarray(array)})["a"]
  kind = f"{array.dtype}[{','.join(map(str, array.shape))}]"
  assert found == f"{kind} {by_definition(words(array))}"
  assert digest.kinds({"a": jax.ShapeDtypeStruct(array.shape, array.dtype)}) == {"a": kind}


def test_doubles_and_keys_have_all_their_bits_digested():
  with jax.enable_x64(True):
    x = draw(2, 3, dtype=np.float64)
    words = x.view(np.uint32).reshape(2, 3, 2)
    assert of({"x": jnp.asarray(x)})["x"] == f"float64[2,3] {by_definition(words)}"
  keys = jax.random.split(jax.random.key(3), 4)
  data = np.asarray(jax.random.key_data(keys))
  assert of({"k": keys})["k"].split(" ")[1] == by_definition(data)


def test_paths_are_named_by_keys_fields_and_places():
  state = {"a": [jnp.ones(2), (jnp.ones(3),)], "b": {"c": jnp.ones(())}}
  assert list(of(state)) == ["a/0", "a/1/0", "b/c"]


def test_every_change_of_an_element_and_every_exchange_is_seen():
  x = np.random.default_rng(1).integers(0, 4, (4, 6)).astype(np.int32)
  seen = {of([x])["0"]}
  changes = 0
  for index in np.ndindex(x.shape):
    for bit in (0, 1, 15, 31):
      changed = x.copy()
      changed[index] ^= np.int32(-(2**31)) if bit == 31 else np.int32(1 << bit)
      seen.add(of([changed])["0"])
      changes += 1
  pairs = [(a, b) for a in range(24) for b in range(a) if x.flat[a] != x.flat[b]]
  for a, b in pairs:
    changed = x.copy()
    changed.flat[[a, b]] = changed.flat[[b, a]]
    seen.add(of([changed])["0"])
  assert len(seen) == 1 + changes + len(pairs)
  y = draw(4, 6)
  negated = y * np.where(np.arange(24).reshape(4, 6) % 5, 1, -1).astype(np.float32)
  assert of([y]) != of([negated])
  assert of([x.reshape(6, 4)])["0"].split(" ")[1] != of([x.T])["0"].split(" ")[1]


ON_MESHES = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from magneto_jax import digest

x = np.random.default_rng(0).normal(size=(16, 8, 24)).astype(np.float32)
for spec in (("a", "b"), (None, "b", "a"), (("a", "b"),), ()):
  for shape in ((8, 1), (4, 2), (2, 4), (1, 1)):
    mesh = Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("a", "b"))
    y = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    lanes = digest.dispatch([y]).lanes
    assert lanes.is_fully_replicated
    text = digest._lanes.lower([y]).compile().as_text()
    sent = [line.split("=")[1] for line in text.splitlines() if " all-gather(" in line]
    print(digest.read(digest.dispatch([y]))["0"], *(shape.split("{")[0] for shape in sent))
"""


def test_it_is_the_same_on_every_mesh_and_no_array_is_gathered():
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-c", ON_MESHES]
  result = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  lines = [line.split(" ") for line in result.stdout.splitlines()]
  assert len(lines) == 16
  expected = f"float32[16,8,24] {by_definition(draw(16, 8, 24).view(np.uint32))}"
  assert {" ".join(line[:2]) for line in lines} == {expected}
  # A sum of each device, and no more.
  sent = [shape for line in lines for shape in line[2:] if shape]
  counts = [np.prod([int(n) for n in re.findall(r"[\d]+", shape[3:])]) for shape in sent]
  assert counts and max(counts) <= 8
