"""What a call hides, pair by pair and block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.kernels.call import FULL, PARTIAL, SKIP, Call


def random_call(seed: int) -> tuple[Call, np.ndarray]:
  """A call with random masks, and what is visible [B, T, S], by a loop over pairs."""
  rng = np.random.default_rng(seed)
  B, T, S = 2, *[(13, 11), (7, 12)][seed % 2]
  left, right = (None if rng.random() < 0.4 else int(rng.integers(0, 8)) for _ in range(2))
  offset = int(rng.integers(-6, 10)) if rng.random() < 0.6 else 0
  lengths = q_ids = kv_ids = None
  if rng.random() < 0.4:
    lengths = rng.integers(0, S + 3, B)
  if rng.random() < 0.6:
    q_ids, kv_ids = rng.integers(0, 3, (B, T)), rng.integers(0, 3, (B, S))
    if rng.random() < 0.7:
      q_ids, kv_ids = np.sort(q_ids), np.sort(kv_ids)
  visible = np.ones((B, T, S), bool)
  for b, t, s in np.ndindex(B, T, S):
    distance = s - (t + offset)
    visible[b, t, s] = (
      (left is None or distance >= -left)
      and (right is None or distance <= right)
      and (lengths is None or s < lengths[b])
      and (q_ids is None or q_ids[b, t] == kv_ids[b, s])
    )
  is_traced = rng.random() < 0.5
  array = lambda x: None if x is None else jnp.asarray(x, jnp.int32)
  call = Call(
    q_BTNH=jnp.zeros((B, T, 1, 1)),
    k_BSKH=jnp.zeros((B, S, 1, 1)),
    v_BSKH=jnp.zeros((B, S, 1, 1)),
    q_segment_ids=array(q_ids),
    kv_segment_ids=array(kv_ids),
    kv_lengths=array(lengths),
    static_offset=0 if is_traced else offset,
    traced_offset=jnp.int32(offset) if is_traced else None,
    window=(left, right),
  )
  return call, visible


@pytest.mark.parametrize(
  "seeds", [range(30), pytest.param(range(30, 100), marks=pytest.mark.slow)], ids=str
)
def test_block_states_agree_with_every_pair(seeds):
  """A block that is skipped holds nothing visible, a full one nothing hidden."""
  met = set()
  for seed in seeds:
    call, visible = random_call(seed)
    B, T, S = visible.shape
    for block_q, block_kv in [(2, 3), (5, 2), (4, 16)]:
      states = np.asarray(call.block_states(block_q, block_kv))
      assert states.shape[1:] == (-(-T // block_q), -(-S // block_kv))
      assert states.dtype == np.int32
      states = np.broadcast_to(states, (B, *states.shape[1:]))
      for b, i, j in np.ndindex(states.shape):
        pairs = visible[b, i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
        state = int(states[b, i, j])
        met.add(state)
        assert state in (SKIP, PARTIAL, FULL)
        assert not (state == SKIP and pairs.any()), (seed, block_q, block_kv, b, i, j)
        assert not (state == FULL and not pairs.all()), (seed, block_q, block_kv, b, i, j)
        # Without segments, whose numbers are compared by their range, it is exact both ways; but
        # the padding of a block counts as keys past the length.
        if call.q_segment_ids is None:
          assert state == SKIP or seen_in_principle(call, b, i, j, block_q, block_kv)
          if call.kv_lengths is None:
            assert (state == FULL) == pairs.all()
  assert met == {SKIP, PARTIAL, FULL}


def seen_in_principle(call, b, i, j, block_q, block_kv):
  """Whether a window over a whole rectangle, and a length, each leave some pair of it."""
  B, T, S, _, _, _ = call.sizes
  queries = np.arange(i * block_q, min(T, (i + 1) * block_q))[:, None] + int(call.q_offset)
  keys = np.arange(j * block_kv, min(S, (j + 1) * block_kv))
  left, right = call.window
  inside = np.ones((len(queries), len(keys)), bool)
  if left is not None:
    inside &= keys - queries >= -left
  if right is not None:
    inside &= keys - queries <= right
  within = call.kv_lengths is None or keys[0] < int(call.kv_lengths[b])
  return inside.any() and within


def test_block_states_are_known_while_tracing_if_nothing_is_traced():
  """So that a kernel can leave hidden blocks out of its grid."""
  x = jnp.zeros((1, 8, 1, 1))
  call = Call(q_BTNH=x, k_BSKH=x, v_BSKH=x, window=(None, 0), static_offset=0)
  states = call.block_states(4, 4)
  assert isinstance(states, np.ndarray)
  assert states.tolist() == [[[PARTIAL, SKIP], [FULL, PARTIAL]]]


def test_the_padding_of_a_block_has_no_segment():
  """So that a cut block is compared by the documents that it holds, and others are skipped."""
  x, ids = jnp.zeros((1, 5, 1, 1)), jnp.array([[1, 1, 1, 1, 3]])
  call = Call(q_BTNH=x, k_BSKH=x, v_BSKH=x, q_segment_ids=ids, kv_segment_ids=ids)
  assert call.block_states(4, 4).tolist() == [[[FULL, SKIP], [SKIP, FULL]]]


@pytest.mark.parametrize("seed", range(6))
def test_visible_agrees_with_every_pair(seed):
  """Of any rectangle of queries and keys."""
  call, visible = random_call(3 * seed)
  B, T, S = visible.shape
  if call.hides_nothing:
    assert visible.all()
    return
  rng = np.random.default_rng(seed)
  (t0, t1), (s0, s1) = (np.sort(rng.choice(n + 1, 2, replace=False)) for n in (T, S))
  found = call.visible(jnp.arange(t0, t1), jnp.arange(s0, s1))
  expected = visible[:, None, t0:t1, s0:s1]
  np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)


def test_a_call_is_a_pytree_of_its_arrays():
  x = jnp.zeros((1, 8, 2, 4))
  call = Call(q_BTNH=x, k_BSKH=x, v_BSKH=x, window=(None, 0), scale=0.5, static_offset=3)
  assert len(jax.tree.leaves(call)) == 3
  again = jax.jit(lambda call: call)(call)
  assert (again.window, again.scale, again.q_offset) == ((None, 0), 0.5, 3)
  assert again.sizes == (1, 8, 8, 2, 2, 4)
