"""Calls of attention, forwards and backwards, compiled for a platform that is not here."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from magneto_jax import kernels

# From JAX 0.11 on, Triton's kernels are lowered for one kind of GPU, which has to be named where
# there is none; JAX 0.10 lets it be named, and 0.7 has no words for it. Those of other platforms
# need no name.
DEVICES = (
  {}
  if jax.__version__.startswith("0.7.")
  else {"cuda": jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu")}
)
# Tests that load libtpu, which belongs to one process at a time: with `--dist=loadgroup` they are
# given to one worker.
ONE_AT_A_TIME = pytest.mark.xdist_group("libtpu")
# The environment in which libtpu compiles.
LIBTPU = {
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "",  # Those of other tests are for the CPU's compiler.
  # Nothing is run, so that nobody needs the chip for himself, nor a cloud's metadata.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A call, forwards and backwards. What it is not given are shapes is static.

  Attributes:
    sizes: B, T, S, N, K, H.
    bias: a shape, or the arguments of a RelativeBias with its number of buckets, or None.
    masks: which arrays hide something: segments, lengths, offset.
    options: of `dot_product_attention`.
    bias_gradient: whether it is asked for.
  """

  sizes: tuple[int, int, int, int, int, int]
  bias: tuple | None = None
  masks: tuple[str, ...] = ()
  options: dict = dataclasses.field(default_factory=dict)
  dtype: str = "bfloat16"
  bias_gradient: bool = True

  @property
  def implementation(self):
    """A record or a name; None for the table's own choice."""
    return None

  def arguments(self, sharding=None) -> dict:
    """The shapes of all arrays of the call; q, k and v as projections leave them, [B, T, N H].

    As arguments of a program, arrays of [B, T, N, 64] may be laid out otherwise, and copied.
    """
    B, T, S, N, K, H = self.sizes
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    dtype = jnp.dtype(self.dtype)
    arrays = {"q": array((B, T, N * H), dtype)}
    arrays |= {name: array((B, S, K * H), dtype) for name in "kv"}
    if self.bias is not None and len(self.bias) == 4:
      arrays["bias"] = array(self.bias, jnp.float32)
    elif self.bias is not None:
      buckets, *rest = self.bias
      arrays["bias"] = kernels.RelativeBias(array((buckets, N), jnp.float32), *rest)
    if "segments" in self.masks:
      arrays["q_segment_ids"] = array((B, T), jnp.int32)
      arrays["kv_segment_ids"] = array((B, S), jnp.int32)
    if "lengths" in self.masks:
      arrays["kv_lengths"] = array((B,), jnp.int32)
    if "offset" in self.masks:
      arrays["q_offset"] = array((), jnp.int32)
    if "dropout_rate" in self.options:
      arrays["dropout_key"] = array((), jax.random.key(0).dtype)
    return arrays

  def passes(self, arrays: dict) -> tuple:
    """The results and, given themselves as cotangents, the gradients that the case asks for."""
    asked = ("q", "k", "v", *["bias"] * (self.bias is not None and self.bias_gradient))

    def attend(of):
      rest = {name: x for name, x in (arrays | of).items() if name not in "qkv"}
      B, T, _, _, _, H = self.sizes
      q, k, v = (of[name].reshape(*of[name].shape[:2], -1, H) for name in "qkv")
      options = self.options | {"implementation": self.implementation}
      results = kernels.dot_product_attention(q, k, v, **rest, **options)
      out, *lse = results if self.options.get("return_lse") else (results,)
      return out.reshape(B, T, -1), *lse

    results, vjp = jax.vjp(attend, {name: arrays[name] for name in asked})
    return results, vjp(results)


def mesh(platform: str, sides=(), names=()) -> jax.sharding.AbstractMesh:
  """Of devices of a platform; without sides, of one."""
  auto = (jax.sharding.AxisType.Auto,) * len(names)
  return jax.sharding.AbstractMesh(sides, names, auto, abstract_device=DEVICES.get(platform))


def lowered(platform: str, function, *arguments) -> str:
  """The module of a function on one device of a platform."""
  with jax.sharding.use_abstract_mesh(mesh(platform)):
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def compiled_apart(module: str, argument: object, variables: dict, timeout: int) -> dict[str, dict]:
  """What a test module prints of each case, run as a program: a line of JSON with its name."""
  result = subprocess.run(
    [sys.executable, "-m", module, str(argument)],
    cwd=pathlib.Path(__file__).parents[2],
    env=os.environ | variables,
    capture_output=True,
    text=True,
    timeout=timeout,
  )
  assert result.returncode == 0, result.stderr
  lines = [json.loads(line) for line in result.stdout.splitlines()]
  return {line.pop("name"): line for line in lines}
