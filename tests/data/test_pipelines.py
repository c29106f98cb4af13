"""Pipelines: one stream for any number of hosts and workers, exact resumption, exact evaluation."""

import json

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from magneto_jax.data import documents, packing, pipelines, tokenizers


def _dataset(size=37, length=4, keep_tail=False):
  """Samples told apart by their first input; `size` of them, or one more with the tail."""
  tokens = np.arange(4, 4 + size * length + 2, dtype=np.uint16)
  return packing.PackedDataset(tokens, np.array([0, len(tokens)]), length, keep_tail)


def _take(iterator, count):
  return [next(iterator) for _ in range(count)]


def _ids(batches):
  return np.concatenate([(batch["inputs"][:, 0] - 4) // 4 for batch in batches])


def _assert_equal(ours, theirs):
  assert len(ours) == len(theirs)
  for a, b in zip(ours, theirs, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_every_epoch_holds_each_sample_once_in_a_new_order():
  dataset = _dataset(36)
  ids = _ids(_take(pipelines.train_iterator(dataset, batch_size=9, seed=0), 12)).reshape(3, 36)
  for epoch in ids:
    assert sorted(epoch) == list(range(36))
  assert not any((a == b).all() for a, b in [(ids[0], ids[1]), (ids[1], ids[2]), (ids[0], ids[2])])
  assert (ids[0] != range(36)).any()


def test_no_sample_is_dropped_at_the_end_of_an_epoch():
  """37 samples in batches of 8: the fifth batch straddles two epochs."""
  ids = _ids(_take(pipelines.train_iterator(_dataset(37), batch_size=8, seed=0), 37))
  for epoch in ids.reshape(8, 37):
    assert sorted(epoch) == list(range(37))


def test_the_stream_is_a_pure_function_of_the_seed():
  def stream(seed):
    return _take(pipelines.train_iterator(_dataset(), batch_size=8, seed=seed), 10)

  _assert_equal(stream(3), stream(3))
  assert (_ids(stream(3)) != _ids(stream(4))).any()


def test_batches_are_rows_of_samples():
  dataset = _dataset()
  (batch,) = _take(pipelines.train_iterator(dataset, batch_size=8, seed=0), 1)
  for row, i in enumerate(_ids([batch])):
    for key, values in dataset[int(i)].items():
      np.testing.assert_array_equal(batch[key][row], values)
      assert batch[key].dtype == values.dtype


# Which rows of a batch of 8 each of some hosts reads; "overlapping" as where a tensor axis lies
# across hosts, "scattered" as on a torus.
HOSTS = {
  "contiguous": [range(0, 4), range(4, 8)],
  "interleaved": [range(0, 8, 2), range(1, 8, 2)],
  "overlapping": [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]],
  "scattered": [[0, 3, 5], [7, 1], [2], [6, 4]],
  "one row each": [[row] for row in range(8)],
}


def _joined(hosts, batches_of_hosts):
  """The one-host batches from those of the hosts, which must agree where they overlap."""
  joined = []
  for batches in zip(*batches_of_hosts, strict=True):
    whole = {}
    for rows, batch in zip(hosts, batches, strict=True):
      for key, values in batch.items():
        assert len(values) == len(rows)
        for row, value in zip(rows, values, strict=True):
          np.testing.assert_array_equal(whole.setdefault((key, row), value), value)
    keys = sorted({key for key, _ in whole})
    joined.append({key: np.stack([whole[key, row] for row in range(8)]) for key in keys})
  return joined


@pytest.mark.parametrize("hosts", HOSTS.values(), ids=HOSTS)
def test_hosts_together_see_the_stream_of_one(hosts):
  """Row for row, over the end of an epoch; so row r of batch k is the same whoever reads it."""
  options = dict(batch_size=8, seed=5)
  alone = _take(pipelines.train_iterator(_dataset(), **options), 12)
  each = [_take(pipelines.train_iterator(_dataset(), rows=rows, **options), 12) for rows in hosts]
  _assert_equal(alone, _joined(hosts, each))


def test_a_host_goes_on_from_the_state_of_any_other():
  """So a run may be resumed on more hosts, on fewer, or with its rows cut otherwise."""
  options = dict(batch_size=8, seed=5)
  states = []
  for rows in (None, [0, 3, 5], [7]):
    iterator = pipelines.train_iterator(_dataset(), rows=rows, **options)
    _take(iterator, 7)
    states.append(iterator.get_state())
  assert states[0] == states[1] == states[2]
  expected = _take(pipelines.train_iterator(_dataset(), rows=[6, 4], **options), 12)[7:]
  resumed = pipelines.train_iterator(_dataset(), rows=[6, 4], **options)
  resumed.set_state(states[0])
  _assert_equal(_take(resumed, 5), expected)


@pytest.mark.parametrize("step", [0, 1, 4, 5, 23])
def test_resuming_gives_the_same_batches(step):
  """Also across the end of an epoch, and through JSON, as a checkpoint stores it."""
  iterator = pipelines.train_iterator(_dataset(), batch_size=8, seed=0)
  _take(iterator, step)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = _take(iterator, 10)
  resumed = pipelines.train_iterator(_dataset(), batch_size=8, seed=0)
  resumed.set_state(state)
  _assert_equal(_take(resumed, 10), expected)
  iterator.set_state(state)
  _assert_equal(_take(iterator, 10), expected)


def test_orbax_saves_and_restores_the_iterator(tmp_path):
  iterator = pipelines.train_iterator(_dataset(), batch_size=8, seed=0)
  _take(iterator, 7)
  with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
    manager.save(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
    manager.wait_until_finished()
    expected = _take(iterator, 5)
    resumed = pipelines.train_iterator(_dataset(), batch_size=8, seed=0)
    manager.restore(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
  _assert_equal(_take(resumed, 5), expected)


SKIPS = [(), ((0, 2),), ((3, 4), (6, 9)), ((1, 30),)]


@pytest.mark.parametrize("skip", SKIPS)
def test_batches_that_are_left_out_change_no_other(skip):
  """Over the ends of epochs; and a run that is resumed takes what one from the start does."""
  options = dict(batch_size=8, seed=0)
  every = _take(pipelines.train_iterator(_dataset(), **options), 40)
  kept = [k for k in range(40) if not any(begin <= k < end for begin, end in skip)]
  assert [pipelines.batch_of_step(step, skip) for step in range(len(kept))] == kept
  iterator = pipelines.train_iterator(_dataset(), skip=skip, **options)
  _assert_equal(_take(iterator, len(kept)), [every[k] for k in kept])
  resumed = pipelines.train_iterator(_dataset(), skip=skip, **options)
  resumed.set_state({**iterator.get_state(), "next_index": 4})
  _assert_equal(_take(resumed, 3), [every[k] for k in kept[4:7]])


def test_ranges_that_leave_no_batch_are_refused():
  with pytest.raises(ValueError, match="leaves no batch"):
    pipelines.train_iterator(_dataset(), batch_size=8, seed=0, skip=((0, 10**12),))


@pytest.mark.slow
def test_workers_give_the_same_stream_and_resume_exactly(tmp_path):
  """Two spawned processes over memory-mapped tokens; takes seconds to start them."""
  texts = documents.Documents(3, lambda i: f"text {i} " * 50, {"name": "test"})
  stream = packing.tokenize(texts, tokenizers.ByteTokenizer(), tmp_path)
  dataset = packing.PackedDataset(stream.tokens, stream.offsets, 16)
  options = dict(batch_size=4, seed=0)
  alone = _take(pipelines.train_iterator(dataset, **options), 40)
  iterator = pipelines.train_iterator(dataset, num_workers=2, rows=[2, 0], **options)
  alone = [{key: values[[2, 0]] for key, values in batch.items()} for batch in alone]
  _assert_equal(_take(iterator, 15), alone[:15])
  state = json.loads(json.dumps(iterator.get_state()))
  iterator.close()
  resumed = pipelines.train_iterator(dataset, num_workers=2, rows=[2, 0], **options)
  resumed.set_state(state)
  _assert_equal(_take(resumed, 25), alone[15:])
  resumed.close()


@pytest.mark.parametrize("skip", [(), ((2, 5),)])
def test_a_stream_can_be_started_anywhere(skip):
  """Also where samples are changed at random."""
  options = dict(batch_size=4, seed=3, skip=skip, augment=_with_a_draw)
  whole = _take(pipelines.train_iterator(_dataset(), **options), 9)
  _assert_equal(_take(pipelines.train_iterator(_dataset(), **options, start=4), 5), whole[4:])


def _with_a_draw(sample, random):
  return {**sample, "draw": random.integers(2**31)}


def test_samples_are_changed_anew_in_every_epoch_and_alike_for_a_seed():
  """37 samples, 8 a batch: two epochs and more."""
  options = dict(batch_size=8, augment=_with_a_draw)
  batches = _take(pipelines.train_iterator(_dataset(), seed=0, **options), 12)
  draws, ids = np.concatenate([batch["draw"] for batch in batches]), _ids(batches)
  assert len(set(draws)) == 96 and len(set(ids)) == 37
  _assert_equal(_take(pipelines.train_iterator(_dataset(), seed=0, **options), 12), batches)
  (other,) = _take(pipelines.train_iterator(_dataset(), seed=1, **options), 1)
  assert not set(other["draw"]) & set(draws)
  rows = _take(pipelines.train_iterator(_dataset(), seed=0, rows=[5, 2], **options), 12)
  _assert_equal(rows, [{k: v[[5, 2]] for k, v in batch.items()} for batch in batches])


def _with_partner(sample, partner, random):
  return {**sample, "partner": partner["draw"], "shared": random.integers(2**31)}


MIXED = dict(batch_size=8, augment=_with_a_draw, mix=_with_partner)


@pytest.mark.parametrize("skip", SKIPS[:2])
def test_samples_are_mixed_with_those_across_the_batch(skip):
  """All rows of a batch draw alike, no two batches do, and without mixing samples are the same."""
  batches = _take(pipelines.train_iterator(_dataset(), seed=0, skip=skip, **MIXED), 12)
  for batch in batches:
    np.testing.assert_array_equal(batch["partner"], batch["draw"][::-1])
    assert len(set(batch["shared"])) == 1
  assert len({batch["shared"][0] for batch in batches}) == 12
  every = _take(pipelines.train_iterator(_dataset(), seed=0, **MIXED), 14)
  kept = [k for k in range(14) if not any(begin <= k < end for begin, end in skip)][:12]
  _assert_equal(batches, [every[k] for k in kept])
  (other,) = _take(pipelines.train_iterator(_dataset(), seed=1, **MIXED), 1)
  assert other["shared"][0] != batches[0]["shared"][0]
  unmixed = _take(pipelines.train_iterator(_dataset(), seed=0, **MIXED | {"mix": None}), 12)
  for a, b in zip([every[k] for k in range(12)], unmixed, strict=True):
    np.testing.assert_array_equal(a["draw"], b["draw"])


@pytest.mark.parametrize("hosts", (HOSTS["overlapping"], HOSTS["scattered"]))
def test_mixing_hosts_together_see_the_stream_of_one(hosts):
  """Also where the partner of a row is another host's; and from any state."""
  options = MIXED | {"seed": 5}
  alone = _take(pipelines.train_iterator(_dataset(), **options), 7)
  each = [_take(pipelines.train_iterator(_dataset(), rows=rows, **options), 7) for rows in hosts]
  _assert_equal(alone, _joined(hosts, each))
  iterator = pipelines.train_iterator(_dataset(), **options)
  _take(iterator, 3)
  resumed = pipelines.train_iterator(_dataset(), rows=hosts[0], **options)
  resumed.set_state(json.loads(json.dumps(iterator.get_state())))
  _assert_equal(_take(resumed, 4), each[0][3:])


def test_batches_of_one_row():
  ids = _ids(_take(pipelines.train_iterator(_dataset(5), batch_size=1, seed=0), 10))
  assert sorted(ids[:5]) == sorted(ids[5:]) == list(range(5))


def test_fewer_samples_than_a_batch_is_refused_with_the_figures():
  with pytest.raises(ValueError, match="has 37 samples, fewer than batch_size=38"):
    pipelines.train_iterator(_dataset(), batch_size=38, seed=0)


def test_negative_seed_is_refused():
  with pytest.raises(ValueError, match="seed=-1 must not be negative"):
    pipelines.train_iterator(_dataset(), batch_size=8, seed=-1)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(batch_size=0), "batch_size=0 must be at least 1"),
    (
      dict(batch_size=8, rows=[]),
      r"rows=\(\) must be some of the rows of a batch, \[0, batch_size=8",
    ),
    (dict(batch_size=8, rows=[0, 8]), r"rows=\(0, 8\) must be some"),
    (dict(batch_size=8, rows=[-1, 0]), r"rows=\(-1, 0\) must be some"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    pipelines.train_iterator(_dataset(), seed=0, **options)
  with pytest.raises(ValueError, match=message):
    pipelines.eval_batches(_dataset(), **options)


@pytest.mark.parametrize("batch_size", [1, 4, 19, 38, 64])
def test_evaluation_sees_every_sample_once_in_order_in_one_shape(batch_size):
  dataset = _dataset(keep_tail=True)
  batches = list(pipelines.eval_batches(dataset, batch_size))
  assert len(batches) == -(-38 // batch_size)
  assert {batch["inputs"].shape for batch in batches} == {(batch_size, 4)}
  joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
  for i in range(38):
    for key, values in dataset[i].items():
      np.testing.assert_array_equal(joined[key][i], values)
  for values in joined.values():
    assert not values[38:].any()


@pytest.mark.parametrize("hosts", HOSTS.values(), ids=HOSTS)
def test_evaluating_hosts_share_the_batches_of_one(hosts):
  """Every host has as many batches, the last of which may be padding only."""
  dataset = _dataset(33)
  alone = list(pipelines.eval_batches(dataset, 8))
  each = [list(pipelines.eval_batches(dataset, 8, rows=rows)) for rows in hosts]
  _assert_equal(alone, _joined(hosts, each))


def test_evaluating_nothing_is_refused():
  with pytest.raises(ValueError, match="no samples"):
    pipelines.eval_batches(_dataset(0), 8)
