"""A short check of an implementation on a kind of device on which nobody has run the whole suite.

It is below the table of implementations, which asks it before it takes one by default.

Letters: B batch, T query length, S key length, N heads, K key/value heads, H head dim.
"""

import concurrent.futures
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax.kernels import attention_xla, jax_names, platforms
from magneto_jax.kernels.bias import RelativeBias
from magneto_jax.kernels.call import Call

COMMAND = "python -m magneto_jax.kernels.check"


@dataclasses.dataclass(frozen=True)
class Recorded:
  """A run of the whole conformance suite in which nothing failed.

  Attributes:
    implementation: its name.
    device_kind: `jax.Device.device_kind`.
    jax: the version.
    date: year-month-day.
  """

  implementation: str
  device_kind: str
  jax: str
  date: str


# To add an entry, run the command on the device; its last line says what to write here. No TPU has
# one so far: there, the first use checks itself. (What runs everywhere is never checked.)
RECORDED: tuple[Recorded, ...] = (
  Recorded("pallas_gpu", "NVIDIA H200", "0.11.2", "2026-11-28"),
  Recorded("cudnn", "NVIDIA H200", "0.11.2", "2026-11-28"),
)


def doubt(implementation, platform: str) -> str | None:
  """Why an implementation should not be taken by default for a platform, or None.

  No reason is found where conformance is recorded for this process's kind of device, or where
  `self_check` finds no difference. On a platform that this process does not have nothing can be
  checked.
  """
  if platform != platforms.here():
    return None
  (device, *_) = jax.local_devices()
  recorded = {(entry.implementation, entry.device_kind) for entry in RECORDED}
  if (implementation.name, device.device_kind) in recorded:
    return None
  difference = self_check(implementation, device)
  return difference and f"{implementation} on {device.device_kind!r}: {difference}"


_found: dict[tuple, str | None] = {}


def self_check(implementation, device: jax.Device) -> str | None:
  """How an implementation differs from `xla` on a device, or None; once for each kind of device.

  One call with its gradients, of more than one block (its attributes block_q and block_kv, if it
  has them): causal, in documents, some of whose queries see nothing, with a relative bias, dropout
  and grouped heads; or, if it does not serve that, causal with grouped heads alone. It may happen
  while another function is traced. What the implementation raises counts as a difference.
  """
  key = implementation, device.device_kind
  if key not in _found:
    # In a thread of its own nothing of the caller's holds: a trace, a mesh, 64 bits, a guard.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
      _found[key] = thread.submit(_compare, implementation, device).result()
  return _found[key]


def _compare(implementation, device) -> str | None:
  with (
    jax.default_device(device),
    jax.default_matmul_precision("highest"),
    jax_names.enable_x64(False),
  ):
    try:
      implementation = _small(implementation)
      call, dout, dlse = _example(implementation)
      found = jax.tree.map(np.asarray, jax.jit(_of(implementation))(call, dout, dlse))
      expected = jax.tree.map(np.asarray, jax.jit(_of_xla)(call, dout, dlse))
    except Exception as error:  # A compiler that does not know the device raises what it likes.
      return one_line(error)
  # Without a bias the last, its gradient, is missing.
  worst = dict(zip(_LIMITS, map(_difference, found, expected), strict=False))
  wrong = [f"{name} by {x:.1%}" for name, x in worst.items() if not x <= _LIMITS[name]]
  return f"differs from xla in {', '.join(wrong)}" if wrong else None


def one_line(error: Exception) -> str:
  """What an error says first."""
  first, *_ = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {first}"


# Of a row of numbers, in units of its norm and the root mean square of all of them together. The
# products are of bfloat16, so that each device rounds them alike: two results, each wrong by a few
# roundings to it, differ by a few times 0.4 %; a wrong mask or bias, by tens of percent.
_LIMITS = {"out": 0.05, "lse": 1e-4, "dq": 0.05, "dk": 0.05, "dv": 0.05, "dbias": 0.05}


def _difference(a: np.ndarray, b: np.ndarray) -> float:
  """The largest distance of two rows in units of their size; infinite if a number is none."""
  a, b = a.astype(np.float64), b.astype(np.float64)
  error, size = np.linalg.norm(a - b, axis=-1), np.linalg.norm(b, axis=-1)
  size = size + np.sqrt(np.mean(size**2))
  ratio = np.divide(error, size, out=np.where(error == 0, 0.0, np.inf), where=size > 0)
  return float(np.nan_to_num(ratio, nan=np.inf, posinf=np.inf).max())


_BLOCK = 128


def _small(implementation):
  """The implementation in small blocks, where it leaves them to the call: they compile sooner."""
  fields = [field.name for field in dataclasses.fields(implementation)]
  unset = [name for name in fields if "block" in name and getattr(implementation, name) is None]
  return dataclasses.replace(implementation, **dict.fromkeys(unset, _BLOCK))


def _example(implementation) -> tuple[Call, np.ndarray, np.ndarray]:
  """A call that the implementation serves, and cotangents of (out, lse)."""
  T, S = (getattr(implementation, side, _BLOCK) + 44 for side in ("block_q", "block_kv"))
  B, N, K, H = 1, 2, 1, 64
  rng = np.random.default_rng(0)
  ids = np.minimum(np.arange(max(T, S)) // 100, 2).astype(np.int32)[None]
  q_ids = np.where(np.arange(T) % 7 == 0, -1, ids[:, :T])
  q, dout = rng.normal(size=(2, B, T, N, H))
  k, v = rng.normal(size=(2, B, S, K, H))
  q_seeds, kv_seeds = rng.integers(0, 2**32, (2, B, N), dtype=np.uint32)
  features = dict(
    bias=RelativeBias(rng.normal(size=(32, N)).astype(np.float32), False, 100),
    q_segment_ids=q_ids,
    kv_segment_ids=ids[:, :S],
    q_seeds=q_seeds,
    kv_seeds=kv_seeds,
    dropout_rate=0.1,
    return_lse=True,
  )
  dlse = rng.normal(size=(B, T, N)).astype(np.float32)
  refusals = []
  for dtype, rest in ((jnp.bfloat16, features), (jnp.float32, features), (jnp.bfloat16, {})):
    arrays = dict(q_BTNH=q.astype(dtype), k_BSKH=k.astype(dtype), v_BSKH=v.astype(dtype))
    call = Call(**arrays, **rest, window=(None, 0), scale=H**-0.5)
    try:
      implementation.fitted(call)
    except NotImplementedError as error:
      refusals.append(str(error))
    else:
      return call, dout.astype(dtype), dlse * call.return_lse
  raise NotImplementedError(f"it does not serve the check: {'; '.join(refusals)}")


def _of(implementation):
  def compute(call, dout, dlse):
    out, lse = implementation.forward(call)
    dq, dk, dv, dbias = implementation.backward(call, out, lse, dout, dlse)
    return out, jnp.maximum(lse, -20), dq, dk, dv, *jax.tree.leaves(dbias)

  return compute


def _of_xla(call, dout, dlse):
  def attend(q, k, v, bias):
    replaced = dataclasses.replace(call, q_BTNH=q, k_BSKH=k, v_BSKH=v, bias=bias)
    return attention_xla.attention(replaced)

  (out, lse), pull = jax.vjp(attend, call.q_BTNH, call.k_BSKH, call.v_BSKH, call.bias)
  dq, dk, dv, dbias = pull((dout, dlse))
  return out, jnp.maximum(lse, -20), dq, dk, dv, *jax.tree.leaves(dbias)
