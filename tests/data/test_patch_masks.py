"""Masks of patches: their number, their statistics, and the shapes of their blocks."""

import math

import numpy as np
import pytest

from magneto_jax.data import masking, patch_masks

GRID, COUNT = (14, 14), 75
DRAWS = 6000


@pytest.fixture(scope="module")
def drawn():
  """Masks of BEiT's own size, of blocks alone: [draws, 14, 14]."""
  rng = np.random.default_rng(0)
  return np.stack([patch_masks.blockwise_mask(rng, GRID, COUNT) for _ in range(DRAWS)])


def adjacency(masks):
  """P(right neighbour hidden | hidden)."""
  left, right = masks[:, :, :-1], masks[:, :, 1:]
  return (left & right).sum() / left.sum()


def test_blocks_hide_the_number_or_a_few_less(drawn):
  """Figures of 20,000 masks by BEiT's rule; here within four standard errors of fewer."""
  counts = drawn.sum((1, 2))
  assert counts.max() == COUNT and 60 <= counts.min()
  assert counts.mean() == pytest.approx(74.47, abs=4 * 0.99 / math.sqrt(DRAWS))
  assert counts.std() == pytest.approx(0.99, abs=0.1)
  assert np.mean(counts == COUNT) == pytest.approx(0.666, abs=4 * 0.47 / math.sqrt(DRAWS))


def test_where_patches_are_hidden(drawn):
  """Seldom in a corner, most often in the middle; and blocks are blocks."""
  share = drawn.mean(0)
  corners = share[[0, 0, -1, -1], [0, -1, 0, -1]]
  edges = np.concatenate([share[[0, -1], 6:8].ravel(), share[6:8, [0, -1]].ravel()])
  error = lambda p, cells: 4 * math.sqrt(p * (1 - p) / DRAWS / math.sqrt(cells))
  assert corners.mean() == pytest.approx(0.040, abs=error(0.04, 4))
  assert edges.mean() == pytest.approx(0.189, abs=error(0.189, 8))
  assert share[6:8, 6:8].mean() == pytest.approx(0.716, abs=error(0.716, 1))
  assert adjacency(drawn) == pytest.approx(0.862, abs=0.004)
  np.testing.assert_allclose(share, share.T, atol=0.04)


def test_a_larger_grid():
  rng = np.random.default_rng(1)
  counts = [patch_masks.blockwise_mask(rng, (16, 16), 102).sum() for _ in range(2000)]
  assert np.mean(counts) == pytest.approx(101.5, abs=0.1)


class Scripted:
  """A generator whose uniform numbers are given, and whose places are the first."""

  def __init__(self, *numbers):
    self.numbers = list(numbers)

  def random(self):
    return self.numbers.pop(0) if self.numbers else 0.5

  def integers(self, high):
    return 0


def _aspect(value):
  """The uniform number that gives this aspect."""
  return (math.log(value) / math.log(0.3) + 1) / 2


@pytest.mark.parametrize("aspect, expected", [(0.3, (2, 7)), (1.0, (4, 4)), (1 / 0.3, (7, 2))])
def test_shapes_of_the_smallest_block(aspect, expected):
  """Of area 16: 2 x 7, 4 x 4, 7 x 2. A number that no second block fits ends the mask."""
  count = expected[0] * expected[1]
  # The area is between 16 and what is left; the first number puts it at 16.
  mask = patch_masks.blockwise_mask(Scripted(0.0, _aspect(aspect)), GRID, count)
  found = mask.any(1).sum(), mask.any(0).sum()
  assert found == expected and mask.sum() == count


def test_a_block_as_wide_as_the_grid_is_refused():
  """Of area 75 at 0.3 it is 5 x 16: taken on 17 columns; on 16 another is drawn, here 4 x 4."""
  draws = ((75 - 16) / (80 - 16), _aspect(0.3), 0.0, _aspect(1.0))
  narrow, wide = (
    patch_masks.blockwise_mask(Scripted(*draws), (14, columns), 80) for columns in (16, 17)
  )
  assert wide[:5, :16].all() and wide.sum() == 80
  assert not narrow[:, 15].any() and narrow[:4, :4].all()


@pytest.mark.parametrize(
  "grid, count, smallest", [((14, 14), 75, 16), ((7, 7), 20, 4), ((4, 4), 6, 16), ((2, 3), 1, 1)]
)
def test_the_number_is_exact(grid, count, smallest):
  """Whatever the blocks come to, also where no block fits the grid."""
  drawing = patch_masks.PatchMasks(grid, count, smallest)
  rng = np.random.default_rng(2)
  masks = np.stack([drawing.draw(rng) for _ in range(300)])
  assert masks.shape == (300, grid[0] * grid[1]) and masks.dtype == bool
  assert (masks.sum(1) == count).all()
  assert len(np.unique(masks, axis=0)) > 1
  assert masks.any(0).all()


def test_blocks_stay_blocks_where_the_number_is_exact():
  drawing, rng = patch_masks.PatchMasks(GRID, COUNT), np.random.default_rng(3)
  masks = np.stack([drawing.draw(rng).reshape(GRID) for _ in range(2000)])
  assert adjacency(masks) == pytest.approx(0.857, abs=0.006)


def test_a_sample_says_where_it_is_hidden():
  """A pure function of the generator: the same again, another for another."""
  drawing, sample = patch_masks.PatchMasks((7, 7), 20, 4), {"image": np.zeros((7, 7, 3))}
  one, again, other = (drawing(sample, np.random.default_rng(seed)) for seed in (0, 0, 1))
  assert one.keys() == {"image", "masked", "places", "weights"} and set(sample) == {"image"}
  np.testing.assert_array_equal(np.flatnonzero(one["masked"]), one["places"])
  assert one["places"].dtype == np.int32 and one["weights"].tolist() == [1.0] * 20
  for name in one:
    np.testing.assert_array_equal(one[name], again[name])
  assert (one["masked"] != other["masked"]).any()


def test_masks_of_validation_are_functions_of_the_index():
  """In any order, and each another."""
  images = [{"image": np.full((2, 2, 3), i)} for i in range(5)]
  fixed = masking.FixedMasks(images, patch_masks.PatchMasks((7, 7), 20, 4))
  forwards = [fixed[i]["masked"] for i in range(5)]
  backwards = [fixed[i]["masked"] for i in reversed(range(5))][::-1]
  np.testing.assert_array_equal(forwards, backwards)
  assert len(np.unique(forwards, axis=0)) == 5


@pytest.mark.parametrize("rate, patches", [(0.001, 49), (0.999, 49)])
def test_a_share_that_hides_nothing_or_all_is_refused(rate, patches):
  with pytest.raises(ValueError, match=rf"data\.mask_rate={rate} hides (0|49) of .* 49 patches"):
    patch_masks.count_of(rate, patches)


def test_the_papers_number():
  assert patch_masks.count_of(0.383, 196) == 75
