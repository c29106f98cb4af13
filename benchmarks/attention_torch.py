"""torch's side of `benchmarks.attention`: its fused attention and torchscale's."""

import ctypes
import dataclasses
import functools
import types
from importlib.metadata import version

import torch
import torch.nn.functional as F

from benchmarks.shapes import Attention


def _bias(case: Attention) -> torch.Tensor | None:
  """[B N, T, T] of torchscale's own RelativePositionBias, with this case's table."""
  if not case.bias:
    return None
  from torchscale.component.relative_position_bias import RelativePositionBias

  table = torch.from_numpy(case.bias_table())
  module = RelativePositionBias(not case.causal, *table.shape[:1], n_heads=case.heads)
  with torch.no_grad():
    module.relative_attention_bias.weight.copy_(table)
    dense = module(case.batch, case.length, case.length)
  return dense.to(getattr(torch, case.dtype))


def _hidden(case: Attention) -> torch.Tensor:
  """[T, T], -inf where a key is ahead of the query."""
  full = torch.full((case.length, case.length), -torch.inf)
  return full.triu(1).to(getattr(torch, case.dtype))


def _sdpa(case: Attention):
  """torch's scaled_dot_product_attention on [B, T, N, H], viewed as it asks."""
  bias = _bias(dataclasses.replace(case, batch=1))
  if bias is not None:
    bias = bias[None]
    if case.causal:  # It takes either a mask of its own or this one.
      bias = bias + _hidden(case)

  def attend(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
      q, k, v, attn_mask=bias, dropout_p=case.dropout, is_causal=case.causal and bias is None
    )
    return out.transpose(1, 2).flatten(2)

  return attend


class _Projected(torch.nn.Module):
  """Stands where a projection is, on what has been projected already.

  A copy, as torchscale scales the queries in place; a thousandth of the work at T = 1,024.
  """

  def forward(self, x):
    return x.clone()


def _torchscale(case: Attention):
  """torchscale's own MultiheadAttention, its projections taken out."""
  from torchscale.component.multihead_attention import MultiheadAttention

  options = types.SimpleNamespace(multiway=False, xpos_rel_pos=False)
  width = case.heads * case.head_dim
  module = MultiheadAttention(options, width, case.heads, dropout=case.dropout, self_attention=True)
  module.q_proj, module.k_proj, module.v_proj = (_Projected() for _ in range(3))
  module.out_proj = torch.nn.Identity()
  mask = _hidden(case) if case.causal else None
  bias = _bias(case)

  def attend(q, k, v):
    q, k, v = (x.flatten(2) for x in (q, k, v))
    return module(q, k, v, attn_mask=mask, rel_pos=bias)[0]

  return attend


ATTENTION = {"torch": _sdpa, "torchscale": _torchscale}


def _scores(variant: str, case: Attention) -> int:
  """How many arrays of T x T scores a forward and backward pass holds at once, at least."""
  if variant == "torchscale":
    return 4  # Probabilities, those kept after dropout, and the gradients of two.
  return 4 if case.dropout else int(case.bias)  # With dropout its fused kernel is not used on CPU.


class Library:
  """torch, ready to be timed, with the interface of `attention_jax.Library`."""

  def __init__(self, threads: int):
    torch.set_num_threads(threads)
    self.device = "cpu"
    self.versions = {name: version(name) for name in ("torch", "torchscale")}
    self._forward, self._gradient, self._products = {}, {}, {}

  def prepare(self, variant: str, case: Attention, memory_gib: float) -> dict:
    """Runs both calls once, and again for their memory.

    Returns {"refused": why} if it cannot be run, or the scores alone would exceed `memory_gib`.
    """
    self._forward.pop(variant, None), self._gradient.pop(variant, None)
    dtype = getattr(torch, case.dtype)
    count = _scores(variant, case)
    gib = count * case.scores_bytes(dtype.itemsize) / 2**30
    if gib > memory_gib:
      reason = (
        f"{count} arrays of T x T scores or more: {gib:.0f} GiB, more than {memory_gib:g} GiB"
      )
      return {"refused": reason}
    *arrays, dout = torch.from_numpy(case.inputs()).to(dtype)
    arrays = [x.requires_grad_() for x in arrays]
    torch.manual_seed(0)

    def forward():
      with torch.no_grad():
        return attend(*arrays)

    def gradient():
      out = attend(*arrays)
      return out, *torch.autograd.grad(out, arrays, dout.flatten(2))

    try:
      attend = ATTENTION[variant](case)
      self._forward[variant], self._gradient[variant] = forward, gradient
      self.forward(variant)
      norms = [float(x.detach().float().norm()) for x in gradient()]
    except (NotImplementedError, RuntimeError) as error:  # What torch cannot do, or hold.
      return {"refused": str(error).splitlines()[0]}
    calls = {"forward": self.forward, "gradient": self.gradient}
    memory = {name: self._memory(lambda c=call: c(variant)) for name, call in calls.items()}
    return {"peak_memory_mib": memory, "compile_s": None, "norms": norms}

  def _memory(self, call) -> float:
    """MiB more than before at the highest point of a call, its results included."""
    ctypes.CDLL(None).malloc_trim(0)  # Or what malloc has kept would be used again, uncounted.
    with open("/proc/self/clear_refs", "w") as file:
      file.write("5")  # VmHWM starts again from here.
    before = _status("VmRSS")
    call()
    return max(0.0, _status("VmHWM") - before)

  def forward(self, variant: str) -> float:
    """The output."""
    return self._run(self._forward[variant])

  def gradient(self, variant: str) -> float:
    """The output, and the gradients at queries, keys and values for a given one of the output."""
    return self._run(self._gradient[variant])

  def product(self, size: int, dtype: str) -> float:
    """A square matrix product."""
    if (size, dtype) not in self._products:
      x = torch.ones((size, size), dtype=getattr(torch, dtype))
      self._products[size, dtype] = functools.partial(torch.matmul, x, x)
    return self._run(self._products[size, dtype])

  def _run(self, function) -> float:
    function()
    return 0.0


def _status(field: str) -> float:
  """A field of /proc/self/status, in MiB."""
  with open("/proc/self/status") as file:
    fields = dict(line.split(":", 1) for line in file)
  return int(fields[field].split()[0]) / 1024
