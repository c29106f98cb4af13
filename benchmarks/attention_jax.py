"""JAX's side of `benchmarks.attention`: this library's attention and jax.nn's."""

import functools
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp

from benchmarks.shapes import Attention
from magneto_jax import kernels


def _ours(case: Attention, implementation: str):
  """(attend, bias): this library's, by its default choice or a named implementation."""
  options = {"is_causal": case.causal, "dropout_rate": case.dropout}

  def attend(q, k, v, bias, key):
    return kernels.dot_product_attention(
      q, k, v, bias, dropout_key=key, implementation=implementation or None, **options
    )

  return attend, lambda: _relative(case)


def _theirs(case: Attention, implementation: str):
  """(attend, bias): jax.nn's, which is given the bias dense."""
  if case.dropout:
    raise NotImplementedError("jax.nn.dot_product_attention has no dropout")
  platform = jax.default_backend()
  if implementation == "cudnn" and platform != "gpu":
    raise NotImplementedError(f"cudnn needs a GPU, and this is a {platform}")

  def attend(q, k, v, bias, key):
    del key
    return jax.nn.dot_product_attention(
      q, k, v, bias, is_causal=case.causal, implementation=implementation
    )

  def dense():
    return _relative(case).materialize(case.length, case.length).astype(case.dtype)

  return attend, dense


def _relative(case: Attention) -> kernels.RelativeBias:
  return kernels.RelativeBias(jnp.asarray(case.bias_table()), bidirectional=not case.causal)


class Library:
  """JAX, ready to be timed; the methods return when the work is done."""

  def __init__(self):
    self.versions = {name: version(name) for name in ("jax", "jaxlib")}
    self.device = jax.devices()[0].device_kind
    self._calls, self._products = {}, {}

  def prepare(self, variant: str, case: Attention, memory_gib: float) -> dict:
    """Compiles both calls and runs each once.

    Returns {"refused": why} if it cannot be run, or temporaries would exceed `memory_gib`.
    """
    family, _, implementation = variant.partition("-")
    self._calls = {key: call for key, call in self._calls.items() if key[0] != variant}
    try:
      make = _ours if family == "magneto_jax" else _theirs
      return self._prepare(variant, case, *make(case, implementation), memory_gib)
    except (NotImplementedError, ValueError, RuntimeError) as error:  # jax.nn's, and XLA's.
      if family == "magneto_jax":
        raise
      return {"refused": str(error).splitlines()[0]}

  def _prepare(self, variant: str, case: Attention, attend, make_bias, memory_gib: float) -> dict:
    def gradient(q, k, v, bias, key, dout):
      out, backward = jax.vjp(lambda *qkv: attend(*qkv, bias, key), q, k, v)
      return out, *backward(dout)

    *arrays, dout = jnp.asarray(case.inputs(), case.dtype)
    make_bias = jax.jit(make_bias) if case.bias else lambda: None
    key = jax.random.key(0) if case.dropout else None
    compiled, memory, seconds = {}, {}, {}
    for call, function, more in (("forward", attend, ()), ("gradient", gradient, (dout,))):
      begin = time.perf_counter()
      # The bias is only a shape as yet: at some lengths it is what does not fit.
      lowered = jax.jit(function).lower(*arrays, jax.eval_shape(make_bias), key, *more)
      compiled[call] = lowered.compile()
      seconds[call] = time.perf_counter() - begin
      memory[call] = compiled[call].memory_analysis().temp_size_in_bytes / 2**20
      if memory[call] > 1024 * memory_gib:
        return {
          "refused": f"{memory[call] / 1024:.1f} GiB of temporaries; the limit is {memory_gib:g}"
        }
    arguments = (*arrays, make_bias(), key)
    self._calls[variant, "forward"] = functools.partial(compiled["forward"], *arguments)
    self._calls[variant, "gradient"] = functools.partial(compiled["gradient"], *arguments, dout)
    self.forward(variant)
    results = jax.block_until_ready(self._calls[variant, "gradient"]())
    norms = [float(jnp.linalg.norm(x.astype(jnp.float32))) for x in results]
    return {"peak_memory_mib": memory, "compile_s": seconds, "norms": norms}

  def forward(self, variant: str) -> float:
    """The output."""
    jax.block_until_ready(self._calls[variant, "forward"]())
    return 0.0

  def gradient(self, variant: str) -> float:
    """The output, and the gradients at queries, keys and values for a given one of the output."""
    jax.block_until_ready(self._calls[variant, "gradient"]())
    return 0.0

  def product(self, size: int, dtype: str) -> float:
    """A square matrix product."""
    if (size, dtype) not in self._products:
      x = jnp.ones((size, size), dtype)
      self._products[size, dtype] = jax.jit(jnp.matmul).lower(x, x).compile(), x
    compiled, x = self._products[size, dtype]
    jax.block_until_ready(compiled(x, x))
    return 0.0
