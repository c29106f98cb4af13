"""JAX's side of `benchmarks.attention` on a GPU: this library's attention, jax.nn's, tokamax's."""

import concurrent.futures
import dataclasses
import functools
import math
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp

from benchmarks.shapes import Attention, normals
from magneto_jax import kernels

# As many sets of inputs take turns, so that none lies in the cache when it is read.
SETS = 3


def _ours(case: Attention, implementation: str):
  """This library's attention, by its default choice or a named implementation."""

  def attend(q, k, v, bias, lengths, key):
    return kernels.dot_product_attention(
      q,
      k,
      v,
      bias,
      kv_lengths=lengths,
      is_causal=case.causal,
      dropout_rate=case.dropout,
      dropout_key=key,
      implementation=implementation or None,
    )

  return attend


def _jax_nn(case: Attention, implementation: str):
  """jax.nn's attention."""

  def attend(q, k, v, bias, lengths, key):
    del key
    return jax.nn.dot_product_attention(
      q,
      k,
      v,
      bias,
      key_value_seq_lengths=lengths,
      is_causal=case.causal,
      implementation=implementation,
    )

  return attend


def _tokamax(case: Attention, implementation: str):
  """tokamax's attention, by its default choice or a named implementation."""
  import tokamax

  def attend(q, k, v, bias, lengths, key):
    del key
    return tokamax.dot_product_attention(
      q,
      k,
      v,
      bias,
      key_value_seq_lengths=lengths,
      is_causal=case.causal,
      implementation=implementation or None,
    )

  return attend


ATTENTION = {"magneto_jax": _ours, "jax.nn": _jax_nn, "tokamax": _tokamax}


def _program(variant: str, case: Attention):
  """(attend, whether it takes the relative bias as a table) of a variant."""
  name, _, how = variant.partition(":")
  family, _, implementation = name.partition("-")
  if case.dropout and family != "magneto_jax":
    raise NotImplementedError(f"{family} has no dropout")
  return ATTENTION[family](case, implementation), family == "magneto_jax" and how != "dense"


def _gradient(attend, case: Attention):
  """The output, and the gradients at queries, keys, values and, where it is learned, the bias."""

  def gradient(q, k, v, bias, lengths, key, dout):
    learned = (q, k, v, bias) if case.bias_gradient else (q, k, v)
    out, backward = jax.vjp(
      lambda q, k, v, bias=bias: attend(q, k, v, bias, lengths, key), *learned
    )
    return out, *backward(dout)

  return gradient


class Library:
  """JAX on a device, ready to be timed."""

  def __init__(self):
    self.device = jax.devices()[0].device_kind
    self.versions = {name: version(name) for name in ("jax", "jaxlib")}
    self._calls, self._case, self._inputs = {}, None, {}
    self._normals = jnp.asarray(normals())

  def compile(self, variants: list[str], case: dict, memory_gib: float) -> dict:
    """{variant: what it is, seconds and MiB of its calls, or why it is not run}.

    Programs are traced one after the other, and compiled on all cores.
    """
    case = Attention(**case)
    if case != self._case:
      self._case, self._inputs = case, {}
    self._calls = {}
    answers, running = {}, {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
      for variant in variants:
        try:
          answers[variant], lowered = self._lower(variant)
        except Exception as error:
          answers[variant] = {"refused": first_line(error)}
        else:
          running[variant] = {call: pool.submit(_compiled, x) for call, x in lowered.items()}
      for variant, futures in running.items():
        try:
          answers[variant] |= self._finish(variant, futures, memory_gib)
        except Exception as error:
          answers[variant] = {"refused": first_line(error)}
    return answers

  def _lower(self, variant: str) -> tuple[dict, dict]:
    case = self._case_of(variant)
    attend, is_table = _program(variant, case)
    arguments = jax.eval_shape(functools.partial(self._set, case, is_table), 0)
    lowered = {
      "forward": jax.jit(attend).lower(*arguments[:-1]),
      "gradient": jax.jit(_gradient(attend, case)).lower(*arguments),
    }
    if not variant.startswith("magneto_jax"):
      return {}, lowered
    q, k, v, bias, lengths, key, _ = arguments
    choice = kernels.choose(
      q,
      k,
      v,
      bias,
      kv_lengths=lengths,
      is_causal=case.causal,
      dropout_rate=case.dropout,
      dropout_key=key,
      implementation=variant.partition(":")[0].partition("-")[2] or None,
    )
    platform = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
    return {"implementation": str(choice.on(platform))}, lowered

  def _finish(self, variant: str, futures: dict, memory_gib: float) -> dict:
    compiled, memory, seconds = {}, {}, {}
    for call, future in futures.items():
      compiled[call], seconds[call] = future.result()
      found = compiled[call].memory_analysis()
      memory[call] = (found.temp_size_in_bytes + found.output_size_in_bytes) / 2**20
    if max(memory.values()) > 1024 * memory_gib:
      gib = max(memory.values()) / 1024
      return {"refused": f"{gib:.1f} GiB beside the inputs; the limit is {memory_gib:g}"}
    self._calls[variant] = compiled
    return {"memory_mib": memory, "compile_s": seconds}

  def check(self, variant: str) -> dict:
    """Runs both calls: norms of the output and of three gradients, about how long each call takes.

    A call that does not fit is refused here; whatever else happens is raised.
    """
    try:
      results = self._calls[variant]["gradient"](*self._sets(variant)[0])[:4]
      norms = [float(jnp.linalg.norm(x.astype(jnp.float32))) for x in results]
      milliseconds = {call: self.turn(variant, call, 3)["wall_ms"] for call in self._calls[variant]}
    except Exception as error:
      if "RESOURCE_EXHAUSTED" in str(error):
        return {"refused": first_line(error)}
      raise
    return {"norms": norms, "ms": milliseconds}

  def turn(self, variant: str, call: str, count: int) -> dict:
    """Milliseconds a call, of `count` queued behind each other; and of those, to queue it.

    Not a loop within one program: that would copy each set out of an array of all of them.
    """
    sets = self._sets(variant)
    if call == "forward":
      sets = [arguments[:-1] for arguments in sets]
    return _timed(self._calls[variant][call], sets, count)

  def product(self, size: int, dtype: str, count: int) -> dict:
    """Milliseconds of a square matrix product, as in `turn`."""
    draw = jax.jit(lambda i: self._random(i, (size, size), dtype))
    sets = [(draw(2 * i), draw(2 * i + 1)) for i in range(SETS)]
    return _timed(jax.jit(jnp.matmul).lower(*sets[0]).compile(), sets, count)

  def _case_of(self, variant: str) -> Attention:
    is_without = variant.endswith(":no_dropout")
    return dataclasses.replace(self._case, dropout=0.0) if is_without else self._case

  def _sets(self, variant: str) -> list[tuple]:
    """The sets of arguments, shared by the variants that take the same ones."""
    case = self._case_of(variant)
    is_table = _program(variant, case)[1]
    if (case.dropout, is_table) not in self._inputs:
      make = jax.jit(functools.partial(self._set, case, is_table))
      self._inputs[case.dropout, is_table] = [make(i) for i in range(SETS)]
    return self._inputs[case.dropout, is_table]

  def _set(self, case: Attention, is_table: bool, index) -> tuple:
    """(q, k, v, bias, lengths, key, dout) of one set."""
    shape = (case.batch, case.length, case.heads, case.head_dim)
    q, k, v, dout = (self._random(4 * index + i, shape, case.dtype) for i in range(4))
    bias = None
    if case.bias:
      bias = kernels.RelativeBias(jnp.asarray(case.bias_table()), bidirectional=not case.causal)
      if not is_table:
        bias = bias.materialize(case.length, case.length).astype(case.dtype)
    lengths = jnp.asarray(case.lengths()) if case.padding else None
    key = jax.random.key(0) if case.dropout else None
    return q, k, v, bias, lengths, key, dout

  def _random(self, index, shape, dtype):
    """The index-th array: the normals from another place on."""
    start = jnp.asarray(index, jnp.int32) * 65_537
    places = (jnp.arange(math.prod(shape)) + start) % len(self._normals)
    return self._normals[places].reshape(shape).astype(dtype)


def _timed(function, sets: list[tuple], count: int) -> dict:
  jax.block_until_ready(function(*sets[0]))
  begin = time.perf_counter()
  for i in range(count):
    last = function(*sets[i % len(sets)])
  queued = time.perf_counter()
  jax.block_until_ready(last)
  end = time.perf_counter()
  return {"wall_ms": 1e3 * (end - begin) / count, "queue_ms": 1e3 * (queued - begin) / count}


def _compiled(lowered):
  begin = time.perf_counter()
  return lowered.compile(), time.perf_counter() - begin


def first_line(error: Exception) -> str:
  """What an error says, short."""
  return f"{type(error).__name__}: {error}".splitlines()[0][:300]
