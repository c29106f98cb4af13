"""Hiding patches of an image by blocks, which a masked image model restores.

Reference: BEiT, arXiv 2106.08254, section 2.3 and algorithm 1, as its code has it; BEiT v2, arXiv
2208.06366, whose code makes the number exact.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from magneto_jax.data import images, masking

Sample = dict[str, np.ndarray]

# Of a block's height to its width: the least, and one over it the most.
_ASPECT = 0.3
# After so many blocks in a row that do not fit, no more are drawn.
_TRIES = 10


def blockwise_mask(
  rng: np.random.Generator, grid: tuple[int, int], count: int, *, smallest: int = 16
) -> np.ndarray:
  """Draws a mask of blocks that hides `count` patches or a few less, as BEiT's first version.

  While m > 0 patches are left to hide, a block is drawn: its area a uniform between `smallest` and
  m, whichever of them is more, its aspect r log-uniform in [0.3, 1 / 0.3], and its sides
  round(sqrt(a r)) and round(sqrt(a / r)), each of which must be shorter than the grid's; its place
  is uniform. A block that hides no new patch, or more than m, is drawn again, ten times at most;
  then the mask is done.

  Args:
    rng: all that the mask depends on.
    grid: rows and columns of patches.
    count: how many patches are hidden at most.
    smallest: a, at least, while so many are left.

  Returns:
    bool [rows, columns], True where a patch is hidden.
  """
  rows, columns = grid
  mask = np.zeros(grid, bool)
  left = count
  while left > 0:
    for _ in range(_TRIES):
      area = smallest + (left - smallest) * rng.random()
      aspect = math.exp((2 * rng.random() - 1) * math.log(_ASPECT))
      height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
      if height >= rows or width >= columns:
        continue
      top, first = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
      block = mask[top : top + height, first : first + width]
      new = block.size - np.count_nonzero(block)
      if 0 < new <= left:
        block[:] = True
        left -= new
        break
    else:
      break
  return mask


class PatchMasks(NamedTuple):
  """Draws masks that hide a number of patches exactly: blocks, and single patches for the rest.

  What `blockwise_mask` leaves of the number is drawn among the patches that can still be seen, each
  as likely: as BEiT v2's code does, and as arrays of one shape need it.

  Attributes:
    grid: rows and columns of patches.
    count: n, how many are hidden.
    smallest: see `blockwise_mask`.
  """

  grid: tuple[int, int]
  count: int
  smallest: int = 16

  def draw(self, rng: np.random.Generator) -> np.ndarray:
    """bool [P], of patches read row by row, n of them True; `rng` is all that it depends on."""
    mask = blockwise_mask(rng, self.grid, self.count, smallest=self.smallest).reshape(-1)
    seen = np.flatnonzero(~mask)
    mask[rng.choice(seen, self.count - np.count_nonzero(mask), replace=False)] = True
    return mask

  def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
    """The sample with a mask.

    Returns:
      The sample, and with it
      masked: bool [P], True for the patches, read row by row, that are hidden.
      places: int32 [n], where they are, in their order.
      weights: float32 [n], ones.
    """
    masked = self.draw(rng)
    places = np.flatnonzero(masked).astype(np.int32)
    return sample | {"masked": masked, "places": places, "weights": np.ones(self.count, np.float32)}


def count_of(rate: float, patches: int) -> int:
  """n, how many of P patches are hidden: the share `rate` of them, rounded.

  Raises:
    ValueError: it rounds to none or to all of them.
  """
  count = round(rate * patches)
  if not 0 < count < patches:
    raise ValueError(
      f"data.mask_rate={rate} hides {count} of an image's {patches} patches: set it so that some"
      " are hidden and some are seen"
    )
  return count


class MaskedView(NamedTuple):
  """An augmentation of whole images, and then a mask.

  Attributes:
    view: `(sample, generator) -> sample`.
    masks: the masks.
  """

  view: Callable[[Sample, np.random.Generator], Sample]
  masks: PatchMasks

  def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
    return self.masks(self.view(sample, rng), rng)


def masked(data: images.ImageData, masks: PatchMasks) -> images.ImageData:
  """Images with masks: in training anew each time, in validation of the index alone."""
  return dataclasses.replace(
    data,
    augment=MaskedView(data.augment, masks),
    validation=masking.FixedMasks(data.validation, masks),
    identity={**data.identity, "masks": masks._asdict()},
  )
