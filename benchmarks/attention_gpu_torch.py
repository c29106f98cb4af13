"""torch's side of `benchmarks.attention` on a GPU: one fused kernel or another, by name."""

import math
import time
import warnings
from importlib.metadata import version

import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.shapes import Attention, normals
from magneto_jax import kernels

SETS = 2  # As in `attention_gpu_jax`, and of the same arrays.
BACKENDS = {
  "torch-flash": SDPBackend.FLASH_ATTENTION,
  "torch-cudnn": SDPBackend.CUDNN_ATTENTION,
  "torch-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class Library:
  """torch on a device, ready to be timed, with the interface of `attention_gpu_jax.Library`."""

  def __init__(self):
    # Which kernels it has passed over; the results say what was refused.
    warnings.simplefilter("ignore", UserWarning)
    self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_cuda = self._device.type == "cuda"
    self.device = torch.cuda.get_device_name() if is_cuda else "cpu"
    self.versions = {"torch": version("torch")}
    if is_cuda:
      self.versions |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    self._normals = torch.from_numpy(normals()).to(self._device)
    self._case, self._sets, self._mask, self._running = None, [], None, {}

  def compile(self, variants: list[str], case: dict, memory_gib: float) -> dict:
    """{variant: MiB of its calls, or why it is not run}; nothing is compiled."""
    self._case, self._sets, self._mask, self._running = Attention(**case), [], None, {}
    self._make_inputs()
    return {variant: self._prepared(variant, memory_gib) for variant in variants}

  def _prepared(self, variant: str, memory_gib: float) -> dict:
    self._running[variant] = {"forward": self._forward, "gradient": self._gradient}
    memory = {}
    for call in self._running[variant]:
      try:
        memory[call] = self._memory(variant, call)
      except RuntimeError as error:  # What torch cannot do, or hold.
        del self._running[variant]
        if "illegal" in str(error) or "launch" in str(error):
          raise  # The device is lost to this process.
        return {"refused": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    if max(memory.values()) > 1024 * memory_gib:
      gib = max(memory.values()) / 1024
      return {"refused": f"{gib:.1f} GiB beside the inputs; the limit is {memory_gib:g}"}
    return {"memory_mib": memory}

  def check(self, variant: str) -> dict:
    """Norms of the output and of three gradients, about how long each call takes."""
    results = self._call(variant, "gradient", 0)[:4]
    norms = [float(x.detach().float().norm()) for x in results]
    calls = self._running[variant]
    return {
      "norms": norms,
      "ms": {call: self.turn(variant, call, 3)["wall_ms"] for call in calls},
    }

  def turn(self, variant: str, call: str, count: int) -> dict:
    """Milliseconds a call, of `count` queued behind each other; and of those, to queue it."""
    return self._timed(lambda i: self._call(variant, call, i), count)

  def product(self, size: int, dtype: str, count: int) -> dict:
    """Milliseconds of a square matrix product, as in `turn`."""
    arrays = [self._random(i, (size, size), getattr(torch, dtype)) for i in range(2 * SETS)]
    return self._timed(lambda i: arrays[i % SETS] @ arrays[SETS + i % SETS], count)

  def _timed(self, call, count: int) -> dict:
    call(0)
    self._wait()
    begin = time.perf_counter()
    for i in range(count):
      call(i)
    queued = time.perf_counter()
    self._wait()
    end = time.perf_counter()
    return {"wall_ms": 1e3 * (end - begin) / count, "queue_ms": 1e3 * (queued - begin) / count}

  def _wait(self) -> None:
    if self._device.type == "cuda":
      torch.cuda.synchronize()

  def _call(self, variant: str, call: str, index: int):
    return self._running[variant][call](BACKENDS[variant], *self._sets[index % SETS])

  def _forward(self, backend, q, k, v, bias, dout):
    with torch.no_grad():
      return self._attend(backend, q, k, v, bias)

  def _gradient(self, backend, q, k, v, bias, dout):
    out = self._attend(backend, q, k, v, bias)
    learned = (q, k, v, bias) if self._case.bias_gradient else (q, k, v)
    return out, *torch.autograd.grad(out, learned, dout)

  def _attend(self, backend, q, k, v, bias):
    mask = self._mask
    if bias is not None:
      mask = bias if mask is None else bias + mask
    with sdpa_kernel(backend):
      return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=self._case.dropout,
        is_causal=self._case.causal and mask is None,
      )

  def _make_inputs(self) -> None:
    """Heads before places, as views of what lies as projections leave it."""
    case, dtype = self._case, getattr(torch, self._case.dtype)
    shape = (case.batch, case.length, case.heads, case.head_dim)
    hides = []
    if case.padding:
      places = torch.arange(case.length, device=self._device)
      lengths = torch.from_numpy(case.lengths()).to(self._device)
      hides.append((places >= lengths[:, None])[:, None, None])
    if case.causal and (case.bias or hides):  # torch takes one mask, or its own causal one.
      hides.append(torch.ones(case.length, case.length, device=self._device).triu(1).bool())
    if hides:
      hidden = hides[0] if len(hides) == 1 else hides[0] | hides[1]
      self._mask = torch.zeros(hidden.shape, dtype=dtype, device=self._device)
      self._mask.masked_fill_(hidden, -torch.inf)
      shape_of_mask = (case.batch if case.padding else 1, 1, case.length, case.length)
      self._mask = self._mask.expand(shape_of_mask)
    for index in range(SETS):
      arrays = [self._random(4 * index + i, shape, dtype).transpose(1, 2) for i in range(4)]
      q, k, v, dout = arrays
      for x in (q, k, v):
        x.requires_grad_()
      self._sets.append((q, k, v, self._bias(dtype), dout))

  def _bias(self, dtype) -> torch.Tensor | None:
    """[1, N, T, T], of the table that this library's variants are given."""
    case = self._case
    if not case.bias:
      return None
    bias = kernels.RelativeBias(jnp.asarray(case.bias_table()), bidirectional=not case.causal)
    strip = torch.from_numpy(np.array(bias.strip(1 - case.length, 2 * case.length - 1)))
    places = torch.arange(case.length, device=self._device)
    distance = places[None, :] - places[:, None]
    dense = strip.to(self._device, dtype)[:, distance + case.length - 1][None]
    return dense.requires_grad_(case.bias_gradient)

  def _random(self, index: int, shape, dtype) -> torch.Tensor:
    """The index-th array: the normals from another place on."""
    places = torch.arange(math.prod(shape), dtype=torch.int32, device=self._device)
    places = (places + index * 65_537) % len(self._normals)
    return self._normals[places].reshape(shape).to(dtype)

  def _memory(self, variant: str, call: str) -> float:
    """MiB more than before at the highest point of a call, its results included."""
    if self._device.type != "cuda":
      self._call(variant, call, 0)
      return 0.0
    self._wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    self._call(variant, call, 0)
    self._wait()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
