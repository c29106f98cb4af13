"""The process of one variant: reads a request a line, answers with a line of JSON.

Requests are `{"do": NAME, ...}`; the answer to one that fails is `{"error": TEXT}`.
"""

import contextlib
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable

from benchmarks.shapes import Attention, Shape


class Worker:
  """What can be asked for: each method is a request, its keywords the request's fields."""

  def __init__(self):
    self._loaded = {}

  def load(self, *, variant: str, shape: dict, threads: int, options: dict | None = None) -> dict:
    """Builds the variant; everything after it is timed. What was loaded before stays loaded."""
    if variant.startswith("magneto_jax"):
      from benchmarks import ours

      subject = ours.Library(variant, Shape(**shape), **(options or {}))
    else:
      from benchmarks import peers

      subject = peers.VARIANTS[variant](Shape(**shape), threads)
    self._subject = self._loaded[variant] = subject
    return {"parameters": subject.parameters, "versions": subject.versions} | peak_memory()

  def load_attention(self, *, variant: str, threads: int) -> dict:
    """The library whose attention is asked for; one process may serve several of its variants."""
    if variant.startswith("torch"):
      from benchmarks import attention_torch

      self._subject = attention_torch.Library(threads)
    else:
      from benchmarks import attention_jax

      self._subject = attention_jax.Library()
    return {"versions": self._subject.versions, "device": self._subject.device}

  def load_device(self, *, library: str) -> dict:
    """A library whose attention on a GPU is asked for: `jax` for all that build on it, or torch."""
    if library == "torch":
      from benchmarks import attention_gpu_torch

      self._subject = attention_gpu_torch.Library()
    else:
      from benchmarks import attention_gpu_jax

      self._subject = attention_gpu_jax.Library()
    return {"versions": self._subject.versions, "device": self._subject.device}

  def load_transducer(self) -> dict:
    """The ways to compute a transducer's loss."""
    from benchmarks import transducer_jax

    self._subject = transducer_jax.Library()
    return {"versions": self._subject.versions}

  def tell(self, *, method: str, options: dict, variant: str | None = None) -> dict:
    """What a method of a variant answers, or of what was loaded last."""
    return getattr(self._loaded.get(variant, self._subject), method)(**options)

  def prepare(self, *, variant: str, case: dict, memory_gib: float) -> dict:
    """Compiles and calls once; the answer says what that took, or why the case is not run."""
    return self._subject.prepare(variant, Attention(**case), memory_gib)

  def turn(self, *, call: str, count: int, options: dict, variant: str | None = None) -> dict:
    """`count` timed calls of a method, as in `tell`; the first call ever is reported as such."""
    method = getattr(self._loaded.get(variant, self._subject), call)
    return measured(lambda: method(**options), count) | peak_memory()

  def compile(self, *, variant: str, shape: dict, options: dict) -> dict:
    """Traces and compiles a train step without running it."""
    from benchmarks import ours

    return ours.compile_step(variant, Shape(**shape), **options) | peak_memory()


def measured(call: Callable[[], float], count: int) -> dict[str, list[float]]:
  """Times each call: wall and processor time of all threads, page faults, and what it returned."""
  rows = {"wall_ms": [], "cpu_ms": [], "page_faults": [], "value": []}
  for _ in range(count):
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    value = call()
    end, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rows["wall_ms"].append(1e3 * (end - begin))
    rows["cpu_ms"].append(1e3 * cpu)
    rows["page_faults"].append(after.ru_minflt - before.ru_minflt)
    rows["value"].append(value)
  return rows


def peak_memory() -> dict[str, float]:
  """The largest resident size so far. Not ru_maxrss, which a child inherits from its parent."""
  with open("/proc/self/status") as file:
    fields = dict(line.split(":", 1) for line in file)
  return {"peak_rss_mib": int(fields["VmHWM"].split()[0]) / 1024}


def main() -> None:
  """Answers requests until the input ends."""
  # What libraries print must not get between the answers.
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  worker = Worker()
  for line in sys.stdin:
    request = json.loads(line)
    answer = {}
    try:
      answer = getattr(worker, request.pop("do"))(**request)
    except Exception:  # The coordinator raises it.
      answer = {"error": traceback.format_exc()}
    with contextlib.suppress(BrokenPipeError):
      print(json.dumps(answer), file=answers)


if __name__ == "__main__":
  main()
