"""The check of an implementation on a device that nobody has recorded."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from magneto_jax.kernels import XlaChunked, attention, choose, dot_product_attention, self_check
from tests.kernels.implementations import ENTRIES, MISTAKES, Mistaken


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
  """Nothing is known from before, and nothing is known after."""
  monkeypatch.setattr(self_check, "_found", {})
  monkeypatch.setattr(self_check, "_BLOCK", 60)
  attention._warn_once.cache_clear()


def put_first(monkeypatch, *implementations):
  table = {f"number {i}": x for i, x in enumerate(implementations)}
  monkeypatch.setattr(attention, "IMPLEMENTATIONS", table | attention.IMPLEMENTATIONS)


@dataclasses.dataclass
class Device:
  """A device of a kind of our choosing, for what asks for no more."""

  device_kind: str


def sharded(f):
  mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
  return jax.shard_map(f, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))


TRANSFORMATIONS = {
  "shard_map": sharded,
  "scan": lambda f: lambda q: jax.lax.scan(lambda c, x: (c, f(x)), None, q[None]),
  "vmap of grad": lambda f: jax.vmap(jax.grad(lambda q: f(q[None]).sum())),
  "remat": lambda f: jax.jit(jax.grad(lambda q: jax.checkpoint(f)(q).sum())),
}


@pytest.mark.parametrize(
  "name, mistake",
  [("shard_map", ""), ("shard_map", "scales"), ("scan", ""), ("vmap of grad", ""), ("remat", "")],
)
def test_it_happens_within_any_transformation(monkeypatch, name, mistake):
  """And finds the same there: no trace and no mesh of the caller's reaches it."""
  put_first(monkeypatch, Mistaken(mistake))
  run = TRANSFORMATIONS[name](lambda q: dot_product_attention(q, q, q))
  jax.eval_shape(run, jnp.ones((2, 5, 2, 4)))
  (difference,) = self_check._found.values()
  assert (difference or "").startswith("differs from xla in out by" if mistake else "")
  assert bool(difference) == bool(mistake)


@pytest.mark.parametrize(
  "implementation",
  [
    Mistaken(),
    XlaChunked(32, 48),
    pytest.param(ENTRIES["pallas_tpu"].implementation, marks=pytest.mark.slow),
    pytest.param(ENTRIES["pallas_gpu"].implementation, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_what_is_right_does_not_differ(implementation):
  assert self_check.self_check(implementation, jax.devices()[0]) is None


DIFFERENCES = {
  "one key too many": "differs from xla in out by",
  "no segments": "differs from xla in out by",
  "no bias": "differs from xla in out by",
  "no dropout": "differs from xla in out by",
  "other dropout": "differs from xla in out by",
  "scale": "differs from xla in out by",
  "scales": "differs from xla in out by",
  "shifts lse": "differs from xla in lse by",
  "forgets lse": "differs from xla in dq by",
  "bias gradient": "differs from xla in dbias by",
  "not a number": "differs from xla in dk by inf%",
  "does not compile": "ValueError: unknown device",
  "refuses": "NotImplementedError: it does not serve the check: .*a head dim of 77",
}


def test_every_mistake_is_tried():
  assert set(MISTAKES) <= set(DIFFERENCES)


@pytest.mark.parametrize("mistake", DIFFERENCES)
def test_a_mistake_is_found(mistake):
  difference = self_check.self_check(Mistaken(mistake), jax.devices()[0])
  assert difference is not None
  assert re.match(DIFFERENCES[mistake], difference), difference
  assert "\n" not in difference


def test_one_wrong_block_is_found():
  """Not diluted by all that is right: a single row that is a tenth off."""
  b = np.random.default_rng(0).normal(size=(1, 1000, 2, 64))
  a = b.copy()
  assert self_check._difference(a, b) == 0
  a[0, 700, 1] *= 1.15
  assert self_check._difference(a, b) > self_check._LIMITS["out"]
  assert self_check._difference(b * np.nan, b) == np.inf
  assert self_check._difference(b, b * 0) == np.inf


def test_it_runs_once_for_a_kind_of_device_while_others_are_traced(monkeypatch, caplog):
  """Also in 64 bits; the next in the table computes, and what was found is said once."""
  put_first(monkeypatch, Mistaken("scales"))
  count = []
  compare = self_check._compare
  monkeypatch.setattr(self_check, "_compare", lambda *x: count.append(x) or compare(*x))
  q = jax.random.normal(jax.random.key(0), (1, 5, 2, 4))
  run = jax.jit(lambda q: dot_product_attention(q, q, q))
  expected = dot_product_attention(q, q, q, implementation="xla_chunked")
  np.testing.assert_allclose(run(q), expected, rtol=1e-6)
  with jax.enable_x64(True):
    jax.eval_shape(jax.grad(lambda q: run(q).sum()), np.ones((2, 9, 2, 4)))
  assert len(count) == 1
  (record,) = (r for r in caplog.records if r.levelno >= logging.WARNING)
  assert record.name == "magneto_jax.kernels.attention"
  message = record.getMessage()
  for part in (
    "Mistaken(mistake='scales'",
    "on 'cpu': differs from xla in out by",
    "xla_chunked is used instead",
    "python -m magneto_jax.kernels.check",
  ):
    assert part in message
  assert "\n" not in message


def test_the_next_in_the_table_is_taken(monkeypatch, caplog):
  """For this platform; and the choice says why, and the warning which it is."""
  wrong, right = Mistaken("scales", ("cpu", "tpu")), Mistaken("", ("cpu",))
  put_first(monkeypatch, wrong, right)
  q = jax.ShapeDtypeStruct((1, 5, 2, 4), jnp.float32)
  choice = choose(q, q, q)
  assert choice.on("cpu") == right
  assert "mistaken is used instead" in caplog.text
  # What this process does not have cannot be checked.
  assert choice.on("tpu") == wrong
  assert "differs from xla" in dict(choice.refusals)["number 0"]


def test_who_names_one_gets_it(monkeypatch):
  """Unchecked, so that it can be looked into."""
  monkeypatch.setattr(self_check, "_compare", None)
  q = jax.random.normal(jax.random.key(0), (1, 5, 2, 4))
  found = dot_product_attention(q, q, q, implementation=Mistaken("scales"))
  np.testing.assert_allclose(found, 1.25 * dot_product_attention(q, q, q), rtol=1e-5)


def test_a_recorded_kind_of_device_is_not_checked(monkeypatch):
  implementation = Mistaken("scales")
  recorded = self_check.Recorded("mistaken", "cpu", "0.0", "2026-01-01")
  assert self_check.doubt(implementation, "cpu") is not None
  monkeypatch.setattr(self_check, "RECORDED", (recorded,))
  assert self_check.doubt(implementation, "cpu") is None
  monkeypatch.setattr(self_check, "RECORDED", (dataclasses.replace(recorded, device_kind="TPU"),))
  assert self_check.doubt(implementation, "cpu") is not None


@pytest.mark.parametrize(
  "backend, platforms, checked",
  [
    ("tpu", ("tpu",), True),
    ("tpu", ("cuda", "rocm"), False),
    ("gpu", ("cuda",), True),
    ("gpu", ("rocm",), False),
    ("gpu", ("tpu",), False),
    ("cpu", ("tpu",), False),
  ],
)
def test_only_what_this_process_has_is_checked(monkeypatch, backend, platforms, checked):
  """With a backend that is not there: its kind of device is asked for, and nothing is computed."""
  kinds = []
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(jax, "local_devices", lambda: [Device("a new kind")])
  monkeypatch.setattr(
    self_check, "_compare", lambda x, device: kinds.append(device.device_kind) or "wrong"
  )
  implementation = Mistaken("", platforms)
  doubts = [self_check.doubt(implementation, p) for p in platforms]
  assert kinds == ["a new kind"] * checked
  assert all((d is not None) == checked for d in doubts)
  again = [self_check.doubt(implementation, p) for p in platforms]
  assert again == doubts and len(kinds) == checked
