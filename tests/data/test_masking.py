"""Masks: how many tokens and which, what is read in their place, and when a mask is drawn anew."""

import json

import numpy as np
import pytest

from magneto_jax.data import masking, packing, pipelines, text

V = 1000
MASKING = masking.Masking(rate=0.15, keep=0.1, random=0.1, vocab_size=V)


def sample_of(length, total=None, seed=0):
  """A sample of so many tokens, special ones among them, and padding behind."""
  total = length if total is None else total
  tokens = np.zeros(total, np.int32)
  tokens[:length] = np.random.default_rng(seed).integers(1, V, length)
  tokens[0] = 1
  ids = (np.arange(total) < length).astype(np.int32)
  return {"inputs": tokens, "segment_ids": ids, "positions": np.arange(total, dtype=np.int32)}


def masks(sample, count, drawing=MASKING):
  return [drawing(sample, np.random.default_rng(seed)) for seed in range(count)]


# ---------------------------------------------------------------------------------------------
# One mask
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "length, counts, mean", [(10, {1, 2}, 1.5), (128, {19, 20}, 19.2), (512, {76, 77}, 76.8)]
)
def test_the_number_of_hidden_tokens_is_rounded_without_a_bias(length, counts, mean):
  """The mean of 2,000 numbers that differ by 1 at most is within 5 standard errors, 0.056."""
  found = [int(x["weights"].sum()) for x in masks(sample_of(length), 2000)]
  assert set(found) == counts
  assert np.mean(found) == pytest.approx(mean, abs=0.056)


def test_what_is_read_is_the_mask_a_random_token_or_the_token_itself():
  """Of all tokens .12, .015 and .015, within 5 standard errors; random ones are of [4, V) alike."""
  sample, read = sample_of(128), []
  for x in masks(sample, 2000):
    places = x["places"][x["weights"] > 0]
    read.append(np.stack([x["inputs"][places], x["targets"][x["weights"] > 0], places]))
    untouched = np.delete(np.arange(128), places)
    np.testing.assert_array_equal(x["inputs"][untouched], sample["inputs"][untouched])
  inputs, targets, places = np.concatenate(read, axis=1)
  np.testing.assert_array_equal(targets, sample["inputs"][places])
  total = 2000 * 128
  drawn = inputs[(inputs != V) & (inputs != targets)]
  # One random token in 996 is the true one.
  kept = np.sum(inputs == targets) - len(drawn) / 996
  for share, count in ((0.12, np.sum(inputs == V)), (0.015, len(drawn)), (0.015, kept)):
    assert count / total == pytest.approx(share, abs=5 * np.sqrt(share / total))
  assert drawn.min() == 4 and drawn.max() == V - 1
  assert np.mean(drawn) == pytest.approx((V + 3) / 2, abs=5 * V / np.sqrt(12 * len(drawn)))


def test_every_token_is_as_likely_and_none_is_spared_but_padding():
  """The bos in front like any other; of 2,000 masks each place is in 0.15, 5 standard errors."""
  found = np.zeros(40)
  for x in masks(sample_of(30, 40), 2000):
    places = x["places"][x["weights"] > 0]
    assert len(set(places)) == len(places) and (np.diff(places) > 0).all()
    found[places] += 1
  np.testing.assert_allclose(found[:30] / 2000, 0.15, atol=5 * np.sqrt(0.15 * 0.85 / 2000))
  assert not found[30:].any()


def test_a_mask_has_one_shape_and_no_weight_where_it_is_filled_up():
  for length in (1, 2, 5, 64):
    for x in masks(sample_of(length, 64), 50):
      shapes = {name: (values.shape, values.dtype) for name, values in x.items()}
      assert shapes == {
        **dict.fromkeys(("inputs", "segment_ids", "positions"), ((64,), np.int32)),
        **dict.fromkeys(("places", "targets"), ((16,), np.int32)),
        "weights": ((16,), np.float32),
      }
      count = int(x["weights"].sum())
      assert count <= length and x["weights"][:count].all()
      assert not x["places"][count:].any() and not x["targets"][count:].any()


@pytest.mark.parametrize("rate", (0.01, 0.15, 0.4, 0.99))
@pytest.mark.parametrize("length", (2, 3, 20, 128, 512))
def test_the_places_hold_the_largest_mask(rate, length):
  """Also where rate T is a whole number and r next to 1, so that their sum is rounded up."""
  drawing = MASKING._replace(rate=rate)
  places = masking.places_of(rate, length)
  assert places >= int(rate * length + np.nextafter(1.0, 0.0)) and places % 8 == 0
  for x in masks(sample_of(length), 20, drawing):
    assert len(x["places"]) == places


@pytest.mark.parametrize("keep, random", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_shares_of_all_or_none(keep, random):
  for x in masks(sample_of(64), 20, MASKING._replace(keep=keep, random=random)):
    chosen = x["weights"] > 0
    read, targets = x["inputs"][x["places"]][chosen], x["targets"][chosen]
    assert (read == V).all() == (keep + random == 0)
    if keep == 1:
      np.testing.assert_array_equal(read, targets)
    if random == 1:
      assert (read != targets).any() and ((4 <= read) & (read < V)).all()


def test_frequencies_of_what_is_read_are_those_of_masked_tokens():
  """Of 2,000 masks of a text of few words: within 5 standard errors, 0.003."""
  small = masking.Masking(rate=0.3, keep=0.2, random=0.3, vocab_size=12)
  tokens = np.random.default_rng(0).choice([1, 4, 5, 11], 128, p=[0.1, 0.4, 0.3, 0.2])
  sample = sample_of(128) | {"inputs": tokens.astype(np.int32)}
  read = np.concatenate([x["inputs"] for x in masks(sample, 2000, small)])
  expected = small.frequencies(np.bincount(tokens, minlength=12) / 128)
  assert expected.sum() == pytest.approx(1) and expected.shape == (13,)
  np.testing.assert_allclose(np.bincount(read, minlength=13) / read.size, expected, atol=0.003)


# ---------------------------------------------------------------------------------------------
# When a mask is drawn anew
# ---------------------------------------------------------------------------------------------


def windows(size=11, length=16, keep_tail=False):
  """Windows of one document, told apart by their tokens."""
  tokens = np.arange(4, 4 + size * (length - 1), dtype=np.uint16)
  tokens[0] = 1
  return packing.MarkedDataset(tokens, np.array([0, len(tokens)]), length, keep_tail)


def stream(**options):
  options = {"batch_size": 4, "seed": 3, "augment": MASKING} | options
  return pipelines.train_iterator(windows(), **options)


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def assert_equal(ours, theirs):
  for a, b in zip(ours, theirs, strict=True):
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_each_epoch_masks_the_same_windows_anew():
  """11 windows in batches of 4: each is read four times in 11 batches, and never masked alike."""
  rows = [
    (whole["inputs"][i].tobytes(), masked["places"][i].tobytes() + masked["inputs"][i].tobytes())
    for whole, masked in zip(take(stream(augment=None), 11), take(stream(), 11), strict=True)
    for i in range(4)
  ]
  assert len({whole for whole, _ in rows}) == 11
  assert len(set(rows)) == 44


def test_the_masks_of_a_stream_are_a_function_of_the_seed():
  assert_equal(take(stream(), 8), take(stream(), 8))
  pairs = zip(take(stream(), 8), take(stream(seed=4), 8), strict=True)
  assert any((a["places"] != b["places"]).any() for a, b in pairs)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_masks_go_on_after_a_stop(step):
  """Within an epoch and over its end, after 2.75 batches; through JSON, as in a checkpoint."""
  iterator = stream()
  take(iterator, step)
  state = json.loads(json.dumps(iterator.get_state()))
  resumed = stream()
  resumed.set_state(state)
  assert_equal(take(resumed, 6), take(stream(), step + 6)[step:])


@pytest.mark.ci
def test_workers_draw_the_same_masks_and_go_on_after_a_stop():
  """Two spawned processes, over the end of an epoch."""
  alone = take(stream(), 12)
  iterator = stream(num_workers=2)
  assert_equal(take(iterator, 5), alone[:5])
  state = json.loads(json.dumps(iterator.get_state()))
  iterator.close()
  resumed = stream(num_workers=2)
  resumed.set_state(state)
  assert_equal(take(resumed, 7), alone[5:])
  resumed.close()


def test_fixed_masks_are_a_function_of_the_index_alone():
  fixed, again = (masking.FixedMasks(windows(length=128, keep_tail=True), MASKING) for _ in "ab")
  backwards = [again[i] for i in reversed(range(len(again)))]
  assert_equal(list(fixed), backwards[::-1])
  assert_equal([fixed[np.int64(2)]], [fixed[2]])
  hidden = {x["places"].tobytes() for x in fixed}
  assert len(hidden) == len(fixed)  # Not one mask for all.


# ---------------------------------------------------------------------------------------------
# A text
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  directory = tmp_path_factory.mktemp("text")
  (directory / "a.txt").write_text("to be or not to be, that is the question.\n" * 40)
  (directory / "b.txt").write_text(
    "a rose by any other name would smell as sweet \u2014 \u00e9t\u00e9"
  )
  files = {
    f"{s}_files": (f"{directory}/{n}.txt",) for s, n in (("train", "a"), ("validation", "b"))
  }
  return text.load_text(
    workdir=directory / "run", name="text_files", tokenizer="byte", seq_length=16, **files
  )


def masked(data, rate=0.15):
  return masking.MaskedText.of(data, rate=rate, keep=0.1, random=0.1)


def test_every_token_of_the_validation_text_is_in_exactly_one_window(loaded):
  data = masked(loaded)
  whole = [sample["inputs"][sample["segment_ids"] > 0] for sample in data.validation.samples]
  # Each behind a bos, of which the first is the document's own.
  joined = np.concatenate([whole[0], *(x[1:] for x in whole[1:])])
  np.testing.assert_array_equal(joined, loaded.validation.tokens)
  assert all(x[0] == 1 for x in whole)
  restored = []
  for sample in data.validation:
    tokens, chosen = sample["inputs"].copy(), sample["weights"] > 0
    tokens[sample["places"][chosen]] = sample["targets"][chosen]
    restored.append(tokens)
  np.testing.assert_array_equal(restored, [x["inputs"] for x in data.validation.samples])


def test_masking_is_part_of_what_the_data_are(loaded):
  data, other = masked(loaded), masked(loaded, rate=0.2)
  assert json.loads(json.dumps(data.identity)) == data.identity != other.identity
  assert data.describe() == (
    f"{len(data.train)} training and {len(data.validation)} validation samples of 16 tokens, 260 in"
    " the vocabulary"
  )


def test_words_of_masked_tokens(loaded):
  """Letters of several bytes stay whole; special ids, and what is given for a place, are marks."""
  data = masked(loaded)
  ids = [1, *loaded.tokenizer.encode("\u00e9t\u00e9"), 260, *loaded.tokenizer.encode("x"), 2, 0]
  assert data.words(np.array(ids)) == "[bos]\u00e9t\u00e9[mask]x[eos][pad]"
  assert data.words(ids, {0: "", 6: "<a|b>"}) == "\u00e9t\u00e9<a|b>x[eos][pad]"
  bare = masking.words_of(data.tokenizer, np.array(ids), specials=False)
  assert bare == "\u00e9t\u00e9[mask]x"
  sample = data.augment(data.train[0], np.random.default_rng(0))
  assert data.show(sample).startswith("starts with '") and "[mask]" in data.show(sample)


def test_a_validation_text_of_which_nothing_is_hidden_is_refused(loaded):
  with pytest.raises(ValueError, match="tokens is hidden with data.mask_rate=1e-06: give a longer"):
    masked(loaded, rate=1e-6)
