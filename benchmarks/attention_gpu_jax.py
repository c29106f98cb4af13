"""JAX's side of `benchmarks.attention` on a GPU: this library's attention, jax.nn's, tokamax's."""

import concurrent.futures
import contextlib
import dataclasses
import math
import time
from importlib.metadata import PackageNotFoundError, version

import jax
import jax.numpy as jnp

from benchmarks.shapes import Attention, normals
from magneto_jax import kernels

# As many sets of inputs take turns, so that none lies in the cache when it is read: the smallest
# has 75 MiB of queries, keys and values, and caches hold 50.
SETS = 2


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
    self.versions = {"platform": jax.devices()[0].client.platform_version}
    for name in ("jax", "jaxlib", "tokamax"):
      with contextlib.suppress(PackageNotFoundError):
        self.versions[name] = version(name)
    self._calls, self._case, self._arrays, self._biases = {}, None, [], {}
    self._normals = jnp.asarray(normals())
    self._draw = jax.jit(_draw, static_argnames=("shape", "dtype"))

  def compile(self, variants: list[str], case: dict, memory_gib: float) -> dict:
    """{variant: what it is, seconds and MiB of its calls, or why it is not run}.

    Programs are traced one after the other, and compiled at the same time.
    """
    self._case, self._calls, self._arrays, self._biases = Attention(**case), {}, [], {}
    answers, running = {}, {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
      for variant in variants:
        try:
          answers[variant], lowered = self._lower(variant)
        except Exception as error:
          answers[variant] = {"refused": first_line(error)}
        else:
          running[variant] = {call: pool.submit(_compiled, x) for call, x in lowered.items()}
      if running:
        self._make_inputs({self._program(variant)[2] for variant in running})
      for variant, futures in running.items():
        try:
          answers[variant] |= self._finish(variant, futures, memory_gib)
        except Exception as error:
          answers[variant] = {"refused": first_line(error)}
    return answers

  def _program(self, variant: str):
    """(attend, case, whether it takes the relative bias as a table) of a variant."""
    name, _, how = variant.partition(":")
    family, _, implementation = name.partition("-")
    case = dataclasses.replace(self._case, dropout=0.0) if how == "no_dropout" else self._case
    if case.dropout and family != "magneto_jax":
      raise NotImplementedError(f"{family} has no dropout")
    is_table = family == "magneto_jax" and how != "dense"
    return ATTENTION[family](case, implementation), case, is_table

  def _lower(self, variant: str) -> tuple[dict, dict]:
    attend, case, is_table = self._program(variant)
    shape = jax.ShapeDtypeStruct(_shape(case), jnp.dtype(case.dtype))
    bias = jax.eval_shape(lambda: _bias(case, is_table))
    arguments = self._arguments(case, (shape,) * 4, bias)
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
      norms = [float(x) for x in _norms(results)]
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
    draw = lambda i: self._draw(self._normals, i, (size, size), dtype)
    sets = [(draw(2 * i), draw(2 * i + 1)) for i in range(SETS)]
    return _timed(jax.jit(jnp.matmul).lower(*sets[0]).compile(), sets, count)

  def _make_inputs(self, kinds: set[bool]) -> None:
    """Of the case: arrays in sets, and the bias as a table or dense or both, as `kinds` asks."""
    case = self._case
    for index in range(4 * SETS):
      if index % 4 == 0:
        self._arrays.append([])
      array = self._draw(self._normals, index, _shape(case), case.dtype)
      self._arrays[-1].append(array)
    for is_table in kinds:
      make = jax.jit(lambda is_table=is_table: _bias(case, is_table))
      self._biases[is_table] = [make() for _ in range(SETS)]

  def _sets(self, variant: str) -> list[tuple]:
    """A variant's arguments; the arrays are shared by all."""
    _, case, is_table = self._program(variant)
    pairs = zip(self._arrays, self._biases[is_table], strict=True)
    return [self._arguments(case, arrays, bias) for arrays, bias in pairs]

  def _arguments(self, case: Attention, arrays, bias) -> tuple:
    """(q, k, v, bias, lengths, key, dout)."""
    q, k, v, dout = arrays
    lengths = jnp.asarray(case.lengths()) if case.padding else None
    key = jax.random.key(0) if case.dropout else None
    return q, k, v, bias, lengths, key, dout


def _shape(case: Attention) -> tuple[int, ...]:
  return case.batch, case.length, case.heads, case.head_dim


def _bias(case: Attention, is_table: bool):
  if not case.bias:
    return None
  bias = kernels.RelativeBias(jnp.asarray(case.bias_table()), bidirectional=not case.causal)
  if is_table:
    return bias
  # Gathered, as that needs no more than what comes out; many processes do it at once.
  strip = bias.strip(1 - case.length, 2 * case.length - 1).astype(case.dtype)
  places = jnp.arange(case.length)
  return strip[:, places[None, :] - places[:, None] + case.length - 1][None]


def _draw(normals, index, shape: tuple[int, ...], dtype: str):
  """The index-th array: the normals from another place on, round and round."""
  places = (jnp.arange(math.prod(shape)) + index * 65_537) % len(normals)
  return normals[places].reshape(shape).astype(dtype)


@jax.jit
def _norms(arrays):
  return [jnp.linalg.norm(x.astype(jnp.float32)) for x in arrays]


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
