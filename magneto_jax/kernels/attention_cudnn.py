"""cuDNN's fused attention, as JAX binds it: NVIDIA GPUs, few features, nothing of T x S in memory.

Letters: B batch, T query length, S key and value length, N heads, K key/value heads, H head dim.
"""

import dataclasses
import functools
import importlib
import inspect
import types

import jax
import jax.numpy as jnp

from magneto_jax.kernels import platforms
from magneto_jax.kernels.call import Call


@dataclasses.dataclass(frozen=True)
class Cudnn:
  """The implementation `cudnn`: bfloat16 and float16 without bias, segments, soft cap or dropout.

  It serves lengths, grouped heads, causality, and a window of a causal query. lse is kept for the
  backward pass alone: cuDNN takes no cotangent of it, so it does not serve calls that return lse.

  JAX binds it by private functions. The public `jax.nn.dot_product_attention` has no way to be
  differentiated from an output that was kept: it would compute that again.

  Reference: cuDNN Frontend's documentation, "Scaled Dot Product Attention".
  """

  name = "cudnn"
  platforms = ("cuda",)
  # JAX promises of cuDNN's calls no more than that it can compile them itself.
  is_exportable = False

  def fitted(self, call: Call) -> "Cudnn":
    """Itself; NotImplementedError if the call, JAX's version or the device is none for it."""
    _check_features(call)
    _check_device(call)
    return self

  def is_worthwhile(self, call: Call) -> bool:
    """Where there are several blocks, of more than a few queries or keys."""
    _, T, S, _, _, _ = call.sizes
    return T * S >= 128 * 128 and min(T, S) >= 64

  def forward(self, call: Call) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN)."""
    # Without "training" it returns no lse.
    out_BTNH, lse_BNT = _run(_FORWARD, call, {}, is_training=True)
    lse_BTN = lse_BNT.swapaxes(1, 2)
    if call.kv_lengths is not None:
      is_empty_B11 = _is_empty(call)[:, :, :, 0]
      out_BTNH = jnp.where(is_empty_B11[..., None], 0, out_BTNH)
      lse_BTN = jnp.where(is_empty_B11, jnp.finfo(call.dtype).min, lse_BTN)
    return out_BTNH, lse_BTN

  def backward(self, call: Call, out_BTNH, lse_BTN, dout_BTNH, dlse_BTN) -> tuple:
    """(dq_BTNH, dk_BSKH, dv_BSKH, None); dlse is zero, as `fitted` refuses to return lse."""
    del dlse_BTN
    kept = {
      "activation": lse_BTN.swapaxes(1, 2),
      "fwd_output": out_BTNH,
      "grad_output": dout_BTNH,
    }
    dq_BTNH, dk_BSKH, dv_BSKH = _run(_BACKWARD, call, kept)
    if call.kv_lengths is not None:
      _, _, S, _, _, _ = call.sizes
      is_padding_BS11 = jnp.arange(S)[None, :, None, None] >= call.kv_lengths[:, None, None, None]
      dq_BTNH = jnp.where(_is_empty(call), 0, dq_BTNH)
      dk_BSKH = jnp.where(is_padding_BS11, 0, dk_BSKH)
      dv_BSKH = jnp.where(is_padding_BS11, 0, dv_BSKH)
    return dq_BTNH, dk_BSKH, dv_BSKH, None


def _check_features(call: Call) -> None:
  """Raises NotImplementedError unless cuDNN computes what is asked for."""
  _, T, S, _, _, H = call.sizes
  left, right = call.window
  dtype, is_windowed = call.q_BTNH.dtype, call.window != (None, None)
  is_offset = call.traced_offset is not None or call.static_offset != 0
  for holds, reason in (
    (dtype not in (jnp.bfloat16, jnp.float16), f"{dtype} is neither bfloat16 nor float16"),
    (H % 8 != 0, f"head dim {H} is not a multiple of 8"),
    (call.bias is not None, "it is slow with a bias"),
    (call.dropout_rate > 0, "it would drop other probabilities"),
    (call.logits_soft_cap is not None, "it has no soft cap"),
    (call.q_segment_ids is not None, "it has no segments"),
    (is_windowed and is_offset, "it has no offset of the queries"),
    (is_windowed and right != 0, f"window {call.window} ends elsewhere than at the query itself"),
    # What it gives to a query that sees no key is not documented. Rows without keys are mended
    # here; a window beyond the last key would ask for more.
    (
      left is not None and (T > S or call.kv_lengths is not None),
      f"window {call.window} may end behind the last key",
    ),
    (not call.scale > 0, f"scale {call.scale} is not positive"),
    (call.return_lse, "it takes no gradient of lse"),
  ):
    if holds:
      raise NotImplementedError(reason)


def _check_device(call: Call) -> None:
  """Raises NotImplementedError unless this process has cuDNN and a GPU for the head dim."""
  if platforms.here() != "cuda":
    raise NotImplementedError("only a process with an NVIDIA GPU can ask for it")
  bindings = _bindings()
  try:
    version = bindings.check_cudnn_version()
  except RuntimeError as error:
    raise NotImplementedError(str(error)) from error
  (device, *_) = jax.local_devices()
  major, _ = map(int, device.compute_capability.split("."))
  if major < 8:
    raise NotImplementedError(f"compute capability {device.compute_capability} is below 8.0")
  if device.compute_capability == "10.3" and version < 91100:
    raise NotImplementedError(f"compute capability 10.3 needs cuDNN 9.11, and this is {version}")
  _, _, _, _, _, H = call.sizes
  # Forwards also later ones than Hopper go to 256, backwards not all of them.
  largest = 256 if major == 9 else 128
  if H > largest:
    raise NotImplementedError(
      f"head dim {H} is over {largest}, at compute capability {device.compute_capability}"
    )


def _is_empty(call: Call) -> jax.Array:
  """Which rows of the batch have no keys, bool [B, 1, 1, 1]: no others hide all from a query."""
  return (call.kv_lengths == 0)[:, None, None, None]


_ARRAYS = (
  "query key value bias q_seqlen kv_seqlen q_offsets kv_offsets page_table_k page_table_v".split()
)
_STATIC = "scale seed dropout_rate variadic_args mask_type layout sliding_window_length".split()
_FORWARD, _BACKWARD = "_dot_product_attention_fwd_impl", "_dot_product_attention_bwd_impl"
# The arguments of each. These functions bind the custom call alone, without the partitioning and
# the vmap of the public one: a program here is of one device, and `_run` has a vmap.
_ARGUMENTS = {
  _FORWARD: {*_ARRAYS, *_STATIC, "is_training"},
  _BACKWARD: {*_ARRAYS, *_STATIC, "activation", "fwd_output", "grad_output"},
}
# A function of the scores, from JAX 0.12 on.
_LATER = {"score_mod_args": (), "score_mod": None}


@functools.cache
def _bindings() -> types.ModuleType:
  """JAX's private module; NotImplementedError where it is not as in JAX 0.7.2 and 0.10 to 0.12."""
  try:
    module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    found = {name: _parameters(getattr(module, name)) - _LATER.keys() for name in _ARGUMENTS}
    is_known = found == _ARGUMENTS and {"PADDING", "CAUSAL"} <= module.MaskType.__members__.keys()
    is_known &= hasattr(module, "check_cudnn_version") and hasattr(module.AttentionLayout, "BTNH")
  except (ImportError, AttributeError):
    is_known = False
  if not is_known:
    raise NotImplementedError(f"jax {jax.__version__} has another interface to cuDNN")
  return module


def _parameters(function) -> set[str]:
  return set(inspect.signature(function).parameters)


def _run(name: str, call: Call, kept: dict[str, jax.Array], **static):
  """What one of JAX's functions returns for a call: lse and the like are [B, N, T]."""
  bindings = _bindings()
  function = getattr(bindings, name)
  B, T, _, _, _, _ = call.sizes
  arrays = {"query": call.q_BTNH, "key": call.k_BSKH, "value": call.v_BSKH, **kept}
  left, right = call.window
  mask = ["PADDING"] * (call.kv_lengths is not None) + ["CAUSAL"] * (right == 0)
  if call.kv_lengths is not None:
    arrays["q_seqlen"] = jnp.full(B, T, jnp.int32)
    # Rows without keys get one, lest cuDNN divides by a sum over nothing.
    arrays["kv_seqlen"] = jnp.maximum(call.kv_lengths, 1)
  static |= {
    "scale": call.scale,
    "seed": 0,
    "dropout_rate": 0.0,
    "variadic_args": (False, False),  # Neither a bias nor its gradient.
    "mask_type": bindings.MaskType["_".join(mask) or "NO_MASK"],
    "layout": bindings.AttentionLayout.BTNH.value,
    # Itself and what lies to the left.
    "sliding_window_length": None if left is None else left + 1,
  }
  static |= {name: _LATER[name] for name in _LATER.keys() & _parameters(function)}

  @jax.custom_batching.custom_vmap
  def run(*values):
    unused = dict.fromkeys(_ARRAYS, jnp.zeros(0, call.q_BTNH.dtype))
    return tuple(function(**unused | dict(zip(arrays, values, strict=True)), **static))

  @run.def_vmap
  def _(size, is_batched, *values):
    """All arrays have rows of the batch, and a vmap gives them more."""

    def rows(x, is_batched):
      x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
      return x.reshape(-1, *x.shape[2:])

    outs = run(*map(rows, values, is_batched))
    return tuple(x.reshape(size, -1, *x.shape[1:]) for x in outs), (True,) * len(outs)

  return run(*arrays.values())
