"""The records' rules, and how they are read."""

import dataclasses
import math

import numpy as np
import pytest

from magneto_jax.theory import records
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import (
  Architecture,
  Attention,
  FeedForward,
  Init,
  Layer,
  Scale,
  Segment,
  Sublayer,
)

DECODER = Architecture("decoder", decoder_layers=6)
BOTH = Architecture("encoder_decoder", encoder_layers=6, decoder_layers=4)

# ---------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_mapping_numbers_keeps_the_structure(name):
  stack = RECIPES[name](BOTH).decoder
  assert records.map_numbers(lambda value: value, stack) == stack

  def times(factor, record):
    scaled = lambda value: tuple(np.multiply(value, factor).tolist())
    return records.map_numbers(
      lambda value: scaled(value) if isinstance(value, tuple) else factor * value, record
    )

  doubled = times(2, stack)
  assert times(0.5, doubled) == stack
  assert doubled != stack
  assert (doubled.segments[0].repeats, doubled.norm) == (stack.segments[0].repeats, stack.norm)


def test_mapping_reaches_every_number():
  """3 scales a sublayer, a gain and a bias gain an init (3 an attention, 2 a ffn, 4 the front
  end's), and the scale of tokens."""
  visited = []
  records.map_numbers(visited.append, RECIPES["deepnet"](BOTH).decoder)
  assert len(visited) == 2 * (3 + 3 * 2) + (3 + 2 * 2) + (4 * 2 + 1)
  assert all(isinstance(value, float) for value in visited)


def test_layers_are_in_order_with_numbers_of_their_own():
  """Two patterns: a, b, a, b, then c, c, each with the repeat's own value."""
  layer = lambda value: Layer(Attention(skip=Scale(value)), FeedForward(wi=Init(gain=value)))
  stack = dataclasses.replace(
    RECIPES["pre_ln"](DECODER).decoder,
    segments=(Segment((layer((1.0, 3.0)), layer((2.0, 4.0))), 2), Segment((layer(5.0),), 2)),
  )
  assert [float(l.ffn.wi.gain) for l in stack.layers] == [1.0, 2.0, 3.0, 4.0, 5.0, 5.0]
  assert [float(l.self_attention.skip.value) for l in stack.layers] == [1, 2, 3, 4, 5, 5]
  assert len(stack.layers) == stack.num_layers


def test_one_value_a_layer_stays_where_it_was():
  layer = Layer(Attention(skip=Scale((1.0, 2.0, 3.0))), FeedForward(wi=Init(gain=0.5)))
  (read,) = records.per_layer(Segment((layer,), 3))
  np.testing.assert_array_equal(read.self_attention.skip.value, [1.0, 2.0, 3.0])
  np.testing.assert_array_equal(read.ffn.wi.gain, [0.5, 0.5, 0.5])
  arrays = []
  records.map_numbers(arrays.append, (read,))
  assert all(array.shape == (3,) for array in arrays)


@pytest.mark.parametrize("value", (2.0, 2, (2.0, 2.0), np.float32(2), np.full(2, 2.0)))
def test_a_number_may_be_held_in_any_way(value):
  layer = Layer(Attention(branch=Scale(value)), FeedForward())
  (read,) = records.per_layer(Segment((layer,), 2))
  np.testing.assert_array_equal(read.self_attention.branch.value, [2.0, 2.0])


def test_numbers_keep_double_precision():
  """A float64 check of a whole model would otherwise end at 6e-8, the rounding of alpha."""
  layer = Layer(Attention(skip=Scale(1 / 3)), FeedForward(skip=Scale((1 / 3, 1 / 7))))
  (read,) = records.per_layer(Segment((layer,), 2))
  np.testing.assert_array_equal(read.self_attention.skip.value, [1 / 3, 1 / 3])
  np.testing.assert_array_equal(read.ffn.skip.value, [1 / 3, 1 / 7])


def test_reading_numbers_twice_changes_nothing():
  stack = RECIPES["deepnet"](DECODER).decoder
  once = records.as_arrays(stack)
  twice = records.as_arrays(once)
  first, second = [], []
  records.map_numbers(first.append, once)
  records.map_numbers(second.append, twice)
  assert len(first) == len(second) > 0
  for a, b in zip(first, second, strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_cut_stack_has_the_same_layers_and_a_segment_that_begins_there():
  """Two patterns, three and two times, cut at every layer; also between those of a pattern."""
  layer = lambda value: Layer(Attention(skip=Scale(value)), FeedForward(wi=Init(gain=2.0)))
  segments = (
    Segment((layer((1.0, 3.0, 5.0)), layer(np.array([2.0, 4.0, 6.0]))), 3),
    Segment((layer(7.0),), 2),
  )
  stack = dataclasses.replace(RECIPES["pre_ln"](DECODER).decoder, segments=segments)
  expected = [float(l.self_attention.skip.value) for l in stack.layers]
  counts = {0: [6, 2], 1: [1, 1, 4, 2], 2: [2, 4, 2], 5: [4, 1, 1, 2], 6: [6, 2], 7: [6, 1, 1]}
  for at in range(stack.num_layers + 1):
    found = records.cut(stack, at)
    depths = [len(segment.pattern) * segment.repeats for segment in found.segments]
    assert at in np.cumsum([0, *depths])
    assert depths == counts.get(at, depths)
    assert [float(l.self_attention.skip.value) for l in found.layers] == expected
    assert all(float(l.ffn.wi.gain) == 2.0 for l in found.layers)
  for at in (-1, 9):
    with pytest.raises(ValueError, match=f"layer={at} is none of a stack of 8 layers"):
      records.cut(stack, at)


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


SIX = {"kind": "decoder", "decoder_layers": 6}


@pytest.mark.parametrize(
  ("arguments", "message"),
  (
    ({"kind": "decoders", "decoder_layers": 2}, "kind='decoders' must be one of encoder, decoder"),
    ({"kind": "encoder"}, "kind='encoder' does not go with encoder_layers=0"),
    ({"kind": "encoder", "encoder_layers": 2, "decoder_layers": 2}, "decoder_layers=2"),
    ({"kind": "encoder_decoder", "encoder_layers": 2}, "decoder_layers=0"),
    ({"kind": "decoder", "decoder_layers": -2}, "decoder_layers=-2"),
    ({"kind": "decoder", "encoder_layers": -1, "decoder_layers": 2}, "encoder_layers=-1"),
    ({**SIX, "dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
    ({**SIX, "dropout": -0.1}, r"dropout=-0.1 must lie in \[0, 1\)"),
    ({**SIX, "token_correlation": 0.0}, r"token_correlation=0.0 must lie in \(0, 1\]"),
    ({**SIX, "token_correlation": 1.1}, r"token_correlation=1.1 must lie in \(0, 1\]"),
    ({**SIX, "token_correlation": math.nan}, r"token_correlation=nan must lie in \(0, 1\]"),
    ({**SIX, "embedding_tables": 0}, "embedding_tables=0 must be at least 1"),
  ),
)
def test_contradictory_architectures_raise(arguments, message):
  with pytest.raises(ValueError, match=message):
    Architecture(**arguments)


@pytest.mark.parametrize(
  ("make", "message"),
  (
    (lambda: Sublayer(frozenset({"pre"})), "norm site='pre' must be one of in, mid, out, post"),
    (lambda: FeedForward(frozenset({"before"})), "norm site='before'"),
    (lambda: Attention(head_scale="after"), "head_scale='after' must be one of None, pre_out"),
    (lambda: Attention(frozenset({"pre"})), "norm site='pre'"),
    (lambda: Attention(qk_norm="token"), "qk_norm='token' must be one of None, head, width"),
    (lambda: Init("xavier"), "family='xavier' must be one of xavier_normal"),
    (lambda: Init(bias="ones"), "bias='ones' must be one of zeros, torch_uniform"),
    (lambda: Scale(learned="matrix"), "learned='matrix' must be one of None, scalar, vector"),
    (
      lambda: dataclasses.replace(RECIPES["pre_ln"](DECODER).decoder, norm="batch_norm"),
      "norm='batch_norm' must be one of layer_norm, rms_norm",
    ),
    (
      lambda: records.per_layer(
        Segment((Layer(Attention(skip=Scale((1.0, 2.0))), FeedForward()),), 3)
      ),
      "2 values for a segment of 3 repeats",
    ),
    (lambda: Segment((), 3), "pattern"),
    (lambda: Segment((Layer(Attention(), FeedForward()),), 0), "repeats=0"),
  ),
)
def test_unknown_names_and_lengths_raise(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_bounds_of_an_architecture_are_allowed():
  assert Architecture(**SIX, dropout=0.0, token_correlation=1.0, embedding_tables=1)


def test_tokens_of_a_zipf_text_agree_as_often_as_the_default_says():
  """Within 2 % of pi^2 / (6 (ln V + gamma)^2), and exactly the sum."""
  harmonic = sum(1 / k for k in range(1, 32_001))
  exact = sum((1 / (k * harmonic)) ** 2 for k in range(1, 32_001))
  assert Architecture(**SIX).token_correlation == pytest.approx(exact, rel=1e-12)
  assert exact == pytest.approx(math.pi**2 / 6 / (math.log(32_000) + 0.5772) ** 2, rel=0.02)


@pytest.mark.parametrize("norms", ("in", {"in"}, ["in"]))
def test_norm_sites_are_a_frozenset(norms):
  """Records are hashable."""
  with pytest.raises(TypeError, match="must be a frozenset of in, mid, out, post"):
    Attention(norms)
