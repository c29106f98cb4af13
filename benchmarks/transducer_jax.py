"""The ways of `benchmarks.transducer` to compute a transducer's loss and its gradient."""

import functools
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp

from benchmarks.shapes import Transducer
from magneto_jax.layers import fused_transducer_loss, transducer_loss

_LOG_ZERO = -1e30


def _logits(e_BTJ, g_BXJ, kernel_JV, bias_V):
  hidden_BTXJ = jnp.tanh(e_BTJ[:, :, None] + g_BXJ[:, None])
  return jnp.einsum("btxj,jv->btxv", hidden_BTXJ, kernel_JV) + bias_V[None, None, None]


def plain_loss(logits_BTXV, frames_B, labels_BU, label_lengths_B):
  """As one would write it: log-softmax, and the recursion by diagonals, left to autodiff."""
  log_p_BTXV = jax.nn.log_softmax(logits_BTXV)
  batch, length, columns, _ = log_p_BTXV.shape
  labels_BX = jnp.pad(labels_BU, ((0, 0), (0, 1)))
  label_BTX = jnp.take_along_axis(log_p_BTXV, labels_BX[:, None, :, None], axis=-1)[..., 0]
  blank_BTX = log_p_BTXV[..., 0]
  u_1X = jnp.arange(columns)[None]
  t_NX = jnp.arange(length + columns - 1)[:, None] - u_1X
  within_N1X = ((t_NX >= 0) & (t_NX < length))[:, None]

  def diagonals(plane_BTX):
    plane_BNX = plane_BTX[:, jnp.clip(t_NX, 0, length - 1), jnp.broadcast_to(u_1X, t_NX.shape)]
    return jnp.where(within_N1X, jnp.moveaxis(plane_BNX, 1, 0), _LOG_ZERO)

  def step(alpha_BX, planes):
    blank_BX, label_BX = planes
    said_BX = jnp.pad((alpha_BX + label_BX)[:, :-1], ((0, 0), (1, 0)), constant_values=_LOG_ZERO)
    return jnp.logaddexp(alpha_BX + blank_BX, said_BX), alpha_BX

  start_BX = jnp.full((batch, columns), _LOG_ZERO).at[:, 0].set(0)
  _, alpha_NBX = jax.lax.scan(step, start_BX, (diagonals(blank_BTX), diagonals(label_BTX)))
  rows_B, last_B = jnp.arange(batch), frames_B - 1
  ended_B = alpha_NBX[last_B + label_lengths_B, rows_B, label_lengths_B]
  return -(ended_B + blank_BTX[rows_B, last_B, label_lengths_B])


def _of_logits(loss):
  return lambda *given: loss(_logits(*given[:4]), *given[4:])


VARIANTS = {
  "autodiff": _of_logits(plain_loss),
  "logits": _of_logits(transducer_loss),
  "fused": fused_transducer_loss,
}


def loss_of(variant: str):
  """`fused:16` is `fused` with chunks of 16 frames."""
  name, _, chunk = variant.partition(":")
  return functools.partial(VARIANTS[name], chunk=int(chunk)) if chunk else VARIANTS[name]


class Library:
  """JAX, ready to be timed."""

  def __init__(self):
    self.versions = {name: version(name) for name in ("jax", "jaxlib")}

  def prepare(self, variant: str, case: dict, memory_gib: float) -> dict:
    """Compiles value and gradient, and calls it once.

    Without a call, {"refused": why, ...} if the case is not to be timed or needs too much memory.
    """
    case = Transducer(**case)
    given = case.inputs()
    step = jax.value_and_grad(lambda *given: loss_of(variant)(*given).sum(), (0, 1, 2, 3))
    begin = time.perf_counter()
    compiled = jax.jit(step).lower(*given).compile()
    answer = {"compile_s": time.perf_counter() - begin}
    answer["peak_memory_mib"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    if not case.timed or answer["peak_memory_mib"] > 1024 * memory_gib:
      return answer | {"refused": "compiled alone"}
    self._call = functools.partial(compiled, *map(jnp.asarray, given))
    value, gradient = self._call()
    norms = [float(value), *(float(jnp.linalg.norm(x)) for x in gradient)]
    return answer | {"norms": norms}

  def gradient(self) -> float:
    """The loss and the gradients at projections, kernel and bias."""
    return float(jax.block_until_ready(self._call())[0])
