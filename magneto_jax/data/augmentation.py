"""What is done to images on the host: pure functions of arrays, and of a generator's draws.

Images are uint8 [H, W, 3], red, green and blue, and stay so until `normalize`. Pillow resamples and
recolours.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Box = tuple[int, int, int, int]

# Means and deviations of red, green and blue, of pixels in [0, 1].
NORMALIZATIONS: Mapping[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
  "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
  "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


# ---------------------------------------------------------------------------------------------
# Where an image is cut, and how large it becomes
# ---------------------------------------------------------------------------------------------


def random_box(
  height: int,
  width: int,
  scale: float,
  generator: np.random.Generator,
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
  """A random part of an image, as Inception was trained on (arXiv 1409.4842, section 6).

  Its area is uniform in [scale, 1] of the image's, the logarithm of its width over its height
  uniform between those of `ratio`, its place uniform. Of ten draws the first that fits into the
  image is taken; if none does, the largest central box whose ratio is allowed.

  Returns:
    (left, top, right, bottom), in pixels; the last two are outside.
  """
  low, high = ratio
  for _ in range(10):
    area = height * width * generator.uniform(scale, 1)
    aspect = math.exp(generator.uniform(math.log(low), math.log(high)))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      left, top = generator.integers(width - w + 1), generator.integers(height - h + 1)
      return int(left), int(top), int(left) + w, int(top) + h
  w, h = min(width, round(height * high)), min(height, round(width / low))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def crop(image: np.ndarray, box: Box) -> np.ndarray:
  """The pixels of a box."""
  left, top, right, bottom = box
  return image[top:bottom, left:right]


def resize(
  image: np.ndarray, height: int, width: int, box: Sequence[float] | None = None
) -> np.ndarray:
  """The image at another size: bicubic, and antialiased where it becomes smaller.

  Of a box, (left, top, right, bottom) in pixels, it is what a box of the whole result would be:
  pixels beside it are read too.
  """
  if box is None and image.shape[:2] == (height, width):
    return image
  resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box)
  return np.asarray(resized)


def central_square(image: np.ndarray, size: int, share: float) -> np.ndarray:
  """The central square of `share` of the short side, at `size` pixels.

  As if the short side became int(size / share) pixels, the other one in proportion, rounded down,
  and `size` of both were cut from the middle; what is cut off is not computed.
  """
  height, width = image.shape[:2]
  short, low, high = int(size / share), [], []
  for extent in (width, height):
    resized = int(short * extent / min(height, width))
    first = round((resized - size) / 2)
    low.append(first * extent / resized)
    high.append(min(extent, (first + size) * extent / resized))  # Not beyond it by rounding.
  return resize(image, size, size, (*low, *high))


def flip(image: np.ndarray) -> np.ndarray:
  """The image in a mirror: left is right."""
  return image[:, ::-1]


# ---------------------------------------------------------------------------------------------
# Pixels as the model reads them
# ---------------------------------------------------------------------------------------------


def normalize(image: np.ndarray, name: str) -> np.ndarray:
  """(x / 255 - mean) / deviation, float32."""
  mean, deviation = np.array(NORMALIZATIONS[name], np.float32)
  return (image.astype(np.float32) / 255 - mean) / deviation


def denormalize(pixels: np.ndarray, name: str) -> np.ndarray:
  """The image, uint8, of which `normalize` made the pixels; what lies outside is cut off."""
  mean, deviation = np.array(NORMALIZATIONS[name], np.float32)
  return np.clip(np.round((pixels * deviation + mean) * 255), 0, 255).astype(np.uint8)


def erase(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
  """Noise from N(0, 1), drawn for every pixel and channel, in one box of a normalised image.

  The box has an area uniform in [0.02, 1/3] of the image's, and the logarithm of its height over
  its width uniform between those of 0.3 and its inverse; of ten draws the first that is smaller
  than the image on both sides is taken.

  Reference: random erasing, arXiv 1708.04896; its mode `pixel`, with one box, in the timm library.
  """
  height, width, channels = pixels.shape
  for _ in range(10):
    area = height * width * generator.uniform(0.02, 1 / 3)
    aspect = math.exp(generator.uniform(math.log(0.3), -math.log(0.3)))
    h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < h < height and 0 < w < width:
      top, left = generator.integers(height - h + 1), generator.integers(width - w + 1)
      pixels = pixels.copy()
      noise = generator.standard_normal((h, w, channels), pixels.dtype)
      pixels[top : top + h, left : left + w] = noise
      break
  return pixels


# ---------------------------------------------------------------------------------------------
# Colours, and RandAugment
# ---------------------------------------------------------------------------------------------


def color_jitter(image: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
  """Brightness, contrast and saturation, in random order, times factors from 1 -+ strength."""
  kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
  factors = generator.uniform(1 - strength, 1 + strength, 3)
  changed = Image.fromarray(image)
  for which in generator.permutation(3):
    changed = kinds[which](changed).enhance(factors[which])
  return np.asarray(changed)


_Operation = Callable[[Image.Image, float, tuple[int, int, int]], Image.Image]


def _enhanced(kind: type) -> _Operation:
  return lambda image, level, fill: kind(image).enhance(max(0.1, 1 + 0.9 * level))


def _affine(coefficients: Callable[[float, int, int], tuple[float, ...]]) -> _Operation:
  """Of (a, b, c, d, e, f): the pixel (x, y) is that of the image at (ax + by + c, dx + ey + f)."""
  return lambda image, level, fill: image.transform(
    image.size,
    Image.Transform.AFFINE,
    coefficients(level, *image.size),
    Image.Resampling.BICUBIC,
    fillcolor=fill,
  )


def _solarize_add(image: Image.Image, level: float, fill) -> Image.Image:
  added = int(110 * abs(level))
  return image.point([min(255, x + added) if x < 128 else x for x in range(256)] * 3)


# Of an image, a signed level in [-1, 1], and the colour that comes into the image. The larger the
# level is, the more they change; what they take no sign of, they take the size of.
OPERATIONS: Mapping[str, _Operation] = {
  "identity": lambda image, level, fill: image,
  "auto_contrast": lambda image, level, fill: ImageOps.autocontrast(image),
  "equalize": lambda image, level, fill: ImageOps.equalize(image),
  "invert": lambda image, level, fill: ImageOps.invert(image),
  "rotate": lambda image, level, fill: image.rotate(
    30 * level, Image.Resampling.BICUBIC, fillcolor=fill
  ),
  "posterize": lambda image, level, fill: ImageOps.posterize(
    image, max(1, 4 - int(4 * abs(level)))
  ),
  "solarize": lambda image, level, fill: ImageOps.solarize(image, 256 - int(256 * abs(level))),
  "solarize_add": _solarize_add,
  "color": _enhanced(ImageEnhance.Color),
  "contrast": _enhanced(ImageEnhance.Contrast),
  "brightness": _enhanced(ImageEnhance.Brightness),
  "sharpness": _enhanced(ImageEnhance.Sharpness),
  "shear_x": _affine(lambda level, width, height: (1, 0.3 * level, 0, 0, 1, 0)),
  "shear_y": _affine(lambda level, width, height: (1, 0, 0, 0.3 * level, 1, 0)),
  "translate_x": _affine(lambda level, width, height: (1, 0, 0.45 * level * width, 0, 1, 0)),
  "translate_y": _affine(lambda level, width, height: (1, 0, 0, 0, 1, 0.45 * level * height)),
}

# What `rand_augment` draws among.
RAND_AUGMENT_SETS: Mapping[str, tuple[str, ...]] = {
  "full": tuple(name for name in OPERATIONS if name != "identity"),
  "beit3": (
    *("identity", "auto_contrast", "equalize", "brightness", "sharpness"),
    *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
  ),
}


def rand_augment(
  image: np.ndarray,
  generator: np.random.Generator,
  *,
  operations: int,
  among: str = "full",
  magnitude: float = 9.0,
  std: float = 0.5,
  fill: tuple[int, int, int] = (128, 128, 128),
) -> np.ndarray:
  """Random operations, one after the other: `rand-m9-mstd0.5-inc1`, as the timm library calls it.

  Each is drawn among those of the set, the same one perhaps twice, and done with probability 1/2,
  at a level of N(magnitude, std^2) / 10, cut off outside [0, 1], and a random sign.

  Args:
    image: uint8 [H, W, 3].
    generator: draws.
    operations: how many are drawn; two in the papers.
    among: a name in `RAND_AUGMENT_SETS`.
    magnitude, std: of the levels, times ten.
    fill: the colour that comes into an image that is moved.

  Reference: RandAugment, arXiv 1909.13719.
  Differs: that paper has a fixed magnitude, and does every operation it draws. At the highest level
    `posterize` leaves a bit, where timm leaves none. BEiT-3's code has strengths of its own.
  """
  changed, names = Image.fromarray(image), RAND_AUGMENT_SETS[among]
  for _ in range(operations):
    name = names[generator.integers(len(names))]
    level = min(10.0, max(0.0, generator.normal(magnitude, std))) / 10
    sign = 1 if generator.random() < 0.5 else -1
    if generator.random() < 0.5:
      changed = OPERATIONS[name](changed, sign * level, fill)
  return np.asarray(changed)


# ---------------------------------------------------------------------------------------------
# Two images in one
# ---------------------------------------------------------------------------------------------


def cutmix_box(height: int, width: int, share: float, generator: np.random.Generator) -> Box:
  """A box of 1 - share of an image's area around a uniform centre, cut off at the image's edge."""
  h, w = (int(extent * math.sqrt(1 - share)) for extent in (height, width))
  y, x = int(generator.integers(height)), int(generator.integers(width))
  left, top = max(0, x - w // 2), max(0, y - h // 2)
  return left, top, min(width, x - w // 2 + w), min(height, y - h // 2 + h)


class Mix(NamedTuple):
  """Mixup or cutmix of two samples of a batch, whose draws are those of the batch.

  With a share lambda of Beta(alpha, alpha), mixup gives lambda x + (1 - lambda) x', and cutmix x
  with a box of x' whose area is, if it lies within the image, 1 - lambda of all. Either way `share`
  is how much of the result is x: of cutmix, what the box leaves.

  Attributes:
    mixup, cutmix: alpha of each; 0: it is not done.
    mix_rate: share of batches that are mixed.
    cutmix_share: of those, that of cutmix where both are done.

  Reference: mixup, arXiv 1710.09412; CutMix, arXiv 1905.04899.
  """

  mixup: float = 0.0
  cutmix: float = 0.0
  mix_rate: float = 1.0
  cutmix_share: float = 0.5

  def __call__(
    self,
    sample: dict[str, np.ndarray],
    partner: dict[str, np.ndarray],
    generator: np.random.Generator,
  ) -> dict[str, np.ndarray]:
    """The sample with some of its partner, whose label becomes `other_label`."""
    if generator.random() >= self.mix_rate:
      return sample
    cuts = self.cutmix and (not self.mixup or generator.random() < self.cutmix_share)
    alpha = self.cutmix if cuts else self.mixup
    share = np.float32(generator.beta(alpha, alpha))
    image, other = sample["image"], partner["image"]
    if cuts:
      height, width = image.shape[:2]
      left, top, right, bottom = cutmix_box(height, width, float(share), generator)
      image = image.copy()
      image[top:bottom, left:right] = other[top:bottom, left:right]
      share = np.float32(1 - (bottom - top) * (right - left) / (height * width))
    else:
      image = share * image + (1 - share) * other
    return {**sample, "image": image, "other_label": partner["label"], "share": share}
