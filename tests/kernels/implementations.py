"""Which implementations the tests run over, and what is known of each."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import pytest

from magneto_jax.kernels import Blocks, PallasGpu, PallasTpu, XlaChunked, attention_xla
from magneto_jax.kernels.attention import Implementation
from magneto_jax.kernels.attention_xla import Xla


@dataclasses.dataclass(frozen=True)
class Entry:
  """An implementation under test.

  Attributes:
    implementation: at lengths of hundreds, where several blocks are visited.
    small: the same at lengths below ten.
    refused_dtypes: dtype: what it says of it.
    is_slow: whether a call takes seconds, as a kernel does that is interpreted.
    compiled: for a kernel that is interpreted, itself: JAX's interpreter cannot do all it can.
  """

  implementation: Implementation
  small: Implementation
  refused_dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
  is_slow: bool = False
  compiled: Implementation | None = None


_INTERPRETED = PallasTpu(128, 128, 128, 128, interpret=True)


def _gpu(side: int, interpret: bool = True) -> PallasGpu:
  """All its kernels in square blocks, whatever the call."""
  return PallasGpu(*[Blocks(side, side)] * 4, interpret=interpret)


ENTRIES = {
  "xla": Entry(Xla(), Xla()),
  "xla_chunked": Entry(XlaChunked(128, 128), XlaChunked(2, 3)),
  "pallas_tpu": Entry(
    _INTERPRETED,
    _INTERPRETED,
    refused_dtypes=dict.fromkeys(("float16", "float64"), "is neither bfloat16 nor float32"),
    is_slow=True,
    compiled=PallasTpu(128, 128, 128, 128),
  ),
  "pallas_gpu": Entry(
    _gpu(64),
    _gpu(16),
    refused_dtypes={"float64": "is not bfloat16, float16 or float32"},
    is_slow=True,
    compiled=_gpu(64, interpret=False),
  ),
}


def _over(argument: str, values, slow=()):
  """Parametrizes over the entries; what is slow is so for all tests."""
  return pytest.mark.parametrize(
    argument,
    [
      pytest.param(values(name), id=name, marks=[pytest.mark.slow] * (x.is_slow or name in slow))
      for name, x in ENTRIES.items()
    ],
  )


# For tests of single properties, at lengths below ten.
ALL = _over("implementation", lambda name: ENTRIES[name].small)
# For transformations: to the reference, which is plain jax.numpy, JAX gives them.
TRANSFORMED = _over("implementation", lambda name: ENTRIES[name].small, slow=("xla",))
TRANSFORMED_NAMES = _over("name", lambda name: name, slow=("xla",))


@dataclasses.dataclass(frozen=True)
class Mistaken:
  """The reference with a mistake, as an implementation that is not differentiated by JAX.

  Attributes:
    mistake: of MISTAKES, or "" for none.
    platforms: as in `Implementation`.
  """

  mistake: str = ""
  platforms: tuple[str, ...] | None = ("cpu",)

  name = "mistaken"

  def fitted(self, call):
    if self.mistake == "refuses":
      raise NotImplementedError("it needs a head dim of 77")
    return self

  def is_worthwhile(self, call):
    return self.mistake != "is idle"

  def forward(self, call):
    if self.mistake == "does not compile":
      raise ValueError("unknown device\nand more")
    if self.mistake == "needs a GPU":
      raise RuntimeError("No supported GPU devices found, please specify one using AbstractDevice")
    if self.mistake == "is broken":
      raise RuntimeError("out of registers")
    out, lse = attention_xla.attention(MISTAKES.get(self.mistake, lambda call: call)(call))
    if self.mistake == "scales":
      out *= jnp.asarray(1.25, out.dtype)
    if self.mistake == "shifts lse":
      lse += 0.01
    return out, lse

  def backward(self, call, out, lse, dout, dlse):
    def attend(q, k, v, bias):
      return self.forward(dataclasses.replace(call, q_BTNH=q, k_BSKH=k, v_BSKH=v, bias=bias))

    _, pull = jax.vjp(attend, call.q_BTNH, call.k_BSKH, call.v_BSKH, call.bias)
    if self.mistake == "forgets lse":
      dlse = 0 * dlse
    dq, dk, dv, dbias = pull((dout, dlse))
    if self.mistake == "bias gradient":
      dbias = jax.tree.map(lambda x: x.at[1].mul(1.2), dbias)
    if self.mistake == "not a number":
      dk = dk.at[:, -1].set(jnp.nan)
    return dq, dk, dv, dbias


def _drop_segments(call):
  return dataclasses.replace(call, q_segment_ids=None, kv_segment_ids=None)


# name: what it makes of the call; the other mistakes are in `Mistaken` itself.
MISTAKES = {
  "one key too many": lambda call: dataclasses.replace(call, window=(None, 1)),
  "no segments": _drop_segments,
  "no bias": lambda call: dataclasses.replace(call, bias=jax.tree.map(jnp.zeros_like, call.bias)),
  "no dropout": lambda call: dataclasses.replace(call, dropout_rate=0.0),
  "other dropout": lambda call: dataclasses.replace(call, q_seeds=call.q_seeds + 1),
  "scale": lambda call: dataclasses.replace(call, scale=call.scale * 1.2),
  "scales": lambda call: call,
  "shifts lse": lambda call: call,
  "forgets lse": lambda call: call,
  "bias gradient": lambda call: call,
  "not a number": lambda call: call,
}
