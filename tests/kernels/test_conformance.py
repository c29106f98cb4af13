"""The conformance suite over every implementation, and what the suite itself is held to."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest

from magneto_jax.kernels import XlaChunked, conformance
from magneto_jax.kernels.conformance import Case
from tests.kernels.brute_force import brute_bucket, brute_force
from tests.kernels.implementations import ENTRIES, Mistaken

SMALL = dict(T=5, S=5, N=2, K=2, H=4, dtype="float64", num_buckets=8, max_distance=6)
EVERYTHING = dict(
  is_causal=True,
  window=(2, None),
  q_offset=1,
  segments="packed",
  kv_lengths=(4, 5),
  logits_soft_cap=2.0,
  scale=0.9,
  bias="relative",
)
# Small enough for the loops of the brute force, in float64, where a single step done in float32
# would show by a factor of 1e5.
SMALL_CASES = [
  Case(f"small, {name}", **SMALL | fields)
  for name, fields in {
    "plain": {},
    "one query": dict(T=1, S=6),
    "cross": dict(T=3, S=7),
    "scale": dict(scale=1.7),
    "soft cap": dict(logits_soft_cap=0.7),
    "soft cap and bias": dict(logits_soft_cap=0.7, bias="full"),
    "grouped": dict(S=6, N=6, K=3),
    "one kv head, causal": dict(N=4, K=1, is_causal=True),
    "causal": dict(is_causal=True),
    "causal, more keys": dict(T=3, S=6, is_causal=True),
    "causal, more queries": dict(T=6, S=3, is_causal=True),
    "offset": dict(T=3, S=8, is_causal=True, q_offset=4),
    "offset, traced": dict(T=3, S=8, is_causal=True, q_offset=4, traced_offset=True),
    "offset, negative": dict(S=4, is_causal=True, q_offset=-2),
    "window": dict(T=6, S=6, window=(2, 1)),
    "window to the left": dict(T=6, S=6, window=(1, None)),
    "window to the right": dict(T=6, S=6, window=(None, 0)),
    "window on itself": dict(T=6, S=6, window=(0, 0)),
    "window and causal": dict(T=6, S=6, window=(2, 3), is_causal=True),
    "window and offset": dict(T=4, S=7, window=(1, 1), q_offset=2),
    "packed": dict(T=9, S=9, segments="packed"),
    "packed, causal": dict(T=9, S=9, segments="packed", is_causal=True),
    "hidden": dict(T=9, S=9, segments="hidden"),
    "lengths": dict(T=4, S=6, kv_lengths=(6, 2)),
    "lengths with a zero": dict(T=4, S=6, kv_lengths=(0, 3)),
    **{f"bias {name}": dict(T=4, N=4, bias=name) for name in conformance.DENSE_BIASES},
    "relative": dict(T=9, S=9, bias="relative"),
    "relative causal": dict(T=9, S=9, bias="relative causal", is_causal=True),
    "relative, keys ahead": dict(T=6, S=6, bias="relative causal"),
    "relative, cross": dict(T=3, S=12, N=4, bias="relative"),
    "relative, offset": dict(T=3, S=9, bias="relative", q_offset=5),
    "dropout": dict(dropout_rate=0.3),
    "everything": dict(N=4) | EVERYTHING,
    "everything, dropout": dict(N=4, dropout_rate=0.3, traced_offset=True) | EVERYTHING,
  }.items()
]


def by_name(cases):
  return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def passes(case, implementation):
  """That it passes; or, if it must refuse the dtype, that it does so and says why."""
  outcome = conformance.run(case, implementation)
  name = implementation if isinstance(implementation, str) else implementation.name
  refused = ENTRIES[name].refused_dtypes.get(case.dtype)
  if refused is None:
    assert outcome.passed, str(outcome)
  else:
    assert refused in outcome.refused, str(outcome)


@by_name(conformance.EACH)
@pytest.mark.parametrize(
  "implementation",
  [pytest.param("xla", marks=pytest.mark.slow), XlaChunked(128, 128)],
  ids=str,
)
def test_every_feature(implementation, case):
  passes(case, implementation)


@by_name([case for case in conformance.EACH if case.dropout_rate])
def test_a_single_block(case):
  passes(case, "xla_chunked")


@pytest.mark.parametrize(
  "name, index",
  [*[("pallas_tpu", index) for index in (0, 2, 6)], ("pallas_gpu", 1)],
)
def test_every_feature_interpreted(name, index):
  """A representative few; the others are slow."""
  passes(conformance.EACH[index], ENTRIES[name].implementation)


@pytest.mark.slow
@by_name(conformance.SUITE)
@pytest.mark.parametrize("name", ENTRIES)
def test_every_pair_of_features(name, case):
  passes(case, ENTRIES[name].implementation)


@by_name(SMALL_CASES)
def test_small_in_float64(case):
  passes(case, "xla")


FEW = [
  f"small, {name}" for name in ("relative, cross", "bias per key", "hidden", "everything, dropout")
]


@by_name([case for case in SMALL_CASES if case.name in FEW])
@pytest.mark.parametrize(
  "implementation",
  [pytest.param("xla_chunked", marks=pytest.mark.slow), XlaChunked(2, 3)],
  ids=str,
)
def test_small_blocks_in_float64(implementation, case):
  passes(case, implementation)


@pytest.mark.slow
@by_name(SMALL_CASES)
@pytest.mark.parametrize("block_q, block_kv", [(2, 3), (3, 2), (1, 4), (9, 1)])
def test_blocks_of_any_size_in_float64(block_q, block_kv, case):
  passes(case, XlaChunked(block_q, block_kv))


def loops(case, arrays=None) -> tuple[np.ndarray, np.ndarray]:
  """(out, lse) of a case by the brute force."""
  static, traced = case.options()
  options = static | traced
  key = options.pop("dropout_key", None)
  if key is not None:
    sizes = case.B, case.N, case.T, case.S
    options["keep"] = conformance.dropout_mask(key, *sizes, case.dropout_rate)
  return brute_force(*(case.arrays() if arrays is None else arrays), **options)


@by_name(SMALL_CASES)
def test_reference_matches_loops(case):
  """float64 to 1e-13: the vectorised equation against a loop a logit."""
  with jax.enable_x64(True):
    static, traced = case.options()
    results, _ = conformance.reference(*case.arrays(), **static, **traced)
    out, lse = loops(case)
  np.testing.assert_allclose(results["out"].value, out, rtol=1e-13, atol=1e-13)
  np.testing.assert_allclose(results["lse"].value, lse, rtol=1e-13, atol=1e-13)


@by_name(SMALL_CASES)
def test_reference_gradients_match_differences_of_loops(case):
  """Along a random direction of each array; the differences are good to 1e-8."""
  with jax.enable_x64(True):
    static, traced = case.options()
    arrays, cotangents = case.arrays(), case.cotangents()
    results, _ = conformance.reference(*arrays, cotangents=cotangents, **static, **traced)
    leaves, treedef = jax.tree.flatten(arrays)
    rng = np.random.default_rng(0)
    for i, leaf in enumerate(leaves):
      direction = rng.normal(size=leaf.shape)
      values = []
      for step in (1e-5, -1e-5):
        moved = treedef.unflatten([*leaves[:i], leaf + step * direction, *leaves[i + 1 :]])
        out, lse = loops(case, moved)
        lse = np.where(np.isneginf(lse), 0, lse)
        values.append((cotangents[0] * out).sum() + (cotangents[1] * lse).sum())
      found = (results[conformance.RESULTS[2 + i]].value * direction).sum()
      np.testing.assert_allclose(found, (values[0] - values[1]) / 2e-5, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("n, D", [(8, 16), (32, 128), (6, 100), (10, 20)])
def test_reference_buckets_match_loops(n, D, bidirectional):
  r = np.arange(-D - 9, D + 10)
  expected = [brute_bucket(int(i), n, bidirectional, D) for i in r]
  np.testing.assert_array_equal(conformance.buckets(r, n, bidirectional, D), expected)


def test_sizes_bound_the_results():
  """A sum is at most the sum of its absolute terms, and 0 where there are none."""
  for case in SMALL_CASES:
    with jax.enable_x64(True):
      static, traced = case.options()
      arguments = dict(cotangents=case.cotangents(), **static, **traced)
      results, _ = conformance.reference(*case.arrays(), **arguments)
    for name in ("out", "dq", "dk", "dv", *(["dbias"] if case.bias else [])):
      assert (abs(results[name].value) <= results[name].size * (1 + 1e-12)).all(), (case, name)


def test_every_pair_of_levels_occurs():
  levels = {feature: list(names) for feature, names in conformance.FEATURES.items()}
  rows = conformance.covering([len(names) for names in levels.values()], 2)
  assert len(rows) == len(conformance.PAIRWISE)
  for (i, a), (j, b) in itertools.combinations(enumerate(levels.values()), 2):
    met = {(row[i], row[j]) for row in rows}
    assert met == set(itertools.product(range(len(a)), range(len(b)))), (
      list(levels)[i],
      list(levels)[j],
    )
  # The two features with most levels need 49; a suite much larger than that would waste time.
  assert 49 <= len(rows) <= 60


def test_covering_is_smaller_than_everything_and_deterministic():
  rows = conformance.covering([3, 3, 3, 3], 2)
  assert rows == conformance.covering([3, 3, 3, 3], 2)
  assert 9 <= len(rows) <= 12
  assert len(conformance.covering([3, 2, 4], 1)) == 4


def test_cases_are_what_their_levels_say():
  """The name of a case tells its levels, and a level's fields are the case's."""
  for case in conformance.PAIRWISE:
    levels = dict(
      next((f, name) for name in names if f"{f} {name}" in case.name.split(", "))
      if any(f"{f} {name}" in case.name.split(", ") for name in names)
      else (f, next(iter(names)))
      for f, names in conformance.FEATURES.items()
    )
    assert conformance.combine(levels) == case


def test_names_are_unique():
  names = [case.name for case in [*conformance.SUITE, *SMALL_CASES]]
  assert len(set(names)) == len(names)


def test_cases_hold_what_they_are_for():
  """Rows that see nothing and several blocks of 128: drawn at random, but surely there."""
  for case in conformance.PAIRWISE:
    static, traced = case.options()
    with jax.enable_x64(False):
      lse = conformance.reference(*case.arrays(), **static, **traced)[0]["lse"].value
    blind = np.isneginf(lse)
    hides_rows = case.segments == "hidden" or 0 in case.kv_lengths or case.bias == "forbidding"
    assert blind.any() or not hides_rows, case.name
    assert not blind.all(), case.name
    assert case.T > 128 or case.S > 128


@pytest.mark.parametrize(
  "mistake", ["", "one key too many", "forgets lse", "bias gradient", "not a number"]
)
def test_a_mistake_fails(mistake):
  """Those of the self-check's tests that are of one gradient or row; without any, it passes."""
  case = Case("mistakes", **SMALL | EVERYTHING | dict(T=9, S=9, dropout_rate=0.3, window=None))
  outcome = conformance.run(case, Mistaken(mistake))
  assert outcome.passed == (not mistake)
  assert str(outcome).startswith("FAILED: out" if mistake else "passed: out")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_error_of_some_percent_fails(dtype):
  """In every result and dtype, if it is everywhere: the tolerance is no more than needed."""
  case = dataclasses.replace(conformance.SPECIAL[0], T=64, S=64, dtype=dtype, bias="full")
  arrays, cotangents, options = case.arrays(), case.cotangents(), case.options()
  with jax.enable_x64(False):
    expected, logit_size = conformance.reference(
      *arrays, cotangents=cotangents, **options[0], **options[1]
    )
  dtypes = [case.dtype, "float32", *[x.dtype for x in arrays]]
  found = [
    expected[name].value.astype(t) for name, t in zip(conformance.RESULTS, dtypes, strict=True)
  ]
  assert all(
    e <= 1 for e in conformance._errors(case, arrays, found, expected, logit_size).values()
  )
  for i, name in enumerate(conformance.RESULTS):
    for wrong in (found[i] * 1.05, found[i][:1], found[i].astype(np.float64), found[i] * np.nan):
      changed = [*found[:i], np.asarray(wrong, wrong.dtype), *found[i + 1 :]]
      errors = conformance._errors(case, arrays, changed, expected, logit_size)
      assert [n for n, e in errors.items() if not e <= 1] == [name]


def test_what_is_zero_must_be_zero():
  """Where a query sees nothing any number but 0 is infinitely wrong, and NaN everywhere."""
  case = Case("blind", **SMALL | dict(kv_lengths=(0, 5)))
  with jax.enable_x64(True):
    arrays, cotangents, (static, traced) = case.arrays(), case.cotangents(), case.options()
    expected, size = conformance.reference(*arrays, cotangents=cotangents, **static, **traced)
    found = [expected[name].value for name in conformance.RESULTS[:5]] + [None]
    found[1] = np.where(np.isneginf(found[1]), np.finfo(np.float64).min, found[1])
    errors = conformance._errors(case, arrays, found, expected, size)
    assert errors == dict.fromkeys(conformance.RESULTS[:5], 0.0)
    for i in (0, 1, 2, 3, 4):
      changed = found.copy()
      changed[i] = changed[i].copy()
      changed[i][0, 0, 0] += 1e-300 if i != 1 else 1e300
      errors = conformance._errors(case, arrays, changed, expected, size)
      assert errors[conformance.RESULTS[i]] == math.inf


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(bias="heavy"), "'heavy' is not one of"),
    (dict(segments="some"), "'some' is neither"),
    (dict(kv_lengths=(1,)), r"\(1,\) are not self.B=2"),
  ],
)
def test_errors_show_the_values(fields, message):
  with pytest.raises(ValueError, match=message):
    Case("wrong", **fields)
