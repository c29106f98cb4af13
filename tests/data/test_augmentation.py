"""Augmentation: each operation against a plain statement of what it means, on fixed parameters."""

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image

from magneto_jax.config import AugmentConfig, DataConfig
from magneto_jax.data import augmentation, images

RNG = np.random.default_rng


class Fixed:
  """A generator that draws what it is told, and notes what it was asked."""

  def __init__(self, **draws):
    self._draws = {name: list(values) for name, values in draws.items()}
    self.asked = []

  def __getattr__(self, name):
    def draw(*args, **kwargs):
      self.asked.append((name, *args))
      return self._draws[name].pop(0)

    return draw


def picture(height=12, width=20, seed=0):
  """Smooth colours: bicubic filters are exact on what is almost linear."""
  y, x = np.mgrid[:height, :width]
  planes = [20 + 8 * x + 2 * y, 200 - 5 * x - 3 * y, 60 + 3 * x + 9 * y]
  noise = RNG(seed).integers(0, 8, (height, width, 3))
  return (np.stack(planes, -1) + noise).clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------
# Crops
# ---------------------------------------------------------------------------------------------


def test_a_random_box_follows_its_draws():
  """Of 100 x 80: an area of half, twice as wide as high for 'ratio' up to 2; the first fits not."""
  draws = Fixed(uniform=[0.9, math.log(2), 0.5, math.log(1)], integers=[7, 11])
  box = augmentation.random_box(80, 100, 0.3, draws, ratio=(0.5, 2.0))
  side = round(math.sqrt(0.5 * 8000))
  assert box == (7, 11, 7 + side, 11 + side)
  assert draws.asked[0] == ("uniform", 0.3, 1)
  assert draws.asked[1] == ("uniform", math.log(0.5), math.log(2.0))
  assert draws.asked[-2:] == [("integers", 100 - side + 1), ("integers", 80 - side + 1)]


@pytest.mark.parametrize(
  "size, box",
  [((10, 100), (43, 0, 56, 10)), ((100, 10), (0, 43, 10, 56)), ((30, 33), (0, 0, 33, 30))],
)
def test_where_no_draw_fits_the_central_box_is_taken(size, box):
  draws = Fixed(uniform=[4.0, 0.0] * 10)
  assert augmentation.random_box(*size, 0.08, draws) == box
  assert len(draws.asked) == 20


def test_random_boxes_lie_in_the_image_and_have_the_areas_and_aspects():
  rng, boxes = RNG(0), []
  for _ in range(2000):
    left, top, right, bottom = augmentation.random_box(200, 200, 0.2, rng)
    assert 0 <= left < right <= 200 and 0 <= top < bottom <= 200
    boxes.append(((right - left) * (bottom - top) / 40_000, (right - left) / (bottom - top)))
  areas, aspects = np.array(boxes).T
  assert 0.19 < areas.min() < 0.21 and areas.max() > 0.97
  assert 0.74 < aspects.min() < 0.77 and 1.30 < aspects.max() < 1.35
  assert abs(np.mean(np.log(aspects))) < 0.01
  # Of an area a those aspects fit whose logarithm is at most -log(a), of a range of l = log(4/3):
  # E[a] = (int_.2^.75 a da - int_.75^1 a log(a) / l da) / (.55 - int_.75^1 log(a) / l da).
  assert abs(areas.mean() - 0.5385) < 0.015


def test_resizing_is_bicubic_and_antialiased():
  """As a sum over the cubic filter (a = -1/2), stretched where the image becomes smaller."""

  def weights(extent, size):
    scale = extent / size
    support = 2 * max(scale, 1)
    rows = np.zeros((size, extent))
    for i in range(size):
      centre = (i + 0.5) * scale
      t = np.abs((np.arange(extent) + 0.5 - centre) / max(scale, 1))
      near = 1.5 * t**3 - 2.5 * t**2 + 1
      far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
      rows[i] = np.where(t < 1, near, np.where(t < 2, far, 0)) * (t * max(scale, 1) < support)
    return rows / rows.sum(1, keepdims=True)

  image = picture(12, 20)
  for height, width in ((5, 9), (24, 31), (12, 20)):
    exact = np.einsum("hy,wx,yxc->hwc", weights(12, height), weights(20, width), image)
    ours = augmentation.resize(image, height, width).astype(float)
    assert np.abs(ours - exact.clip(0, 255)).max() <= 1.2  # Pillow rounds after each direction.


def test_the_central_square_is_that_of_the_middle():
  """256 of the short side at 224 / 0.875, then 224 of both; and nothing at its own size."""
  image = picture(300, 400)
  ours = augmentation.central_square(image, 224, 0.875)
  resized = np.asarray(Image.fromarray(image).resize((341, 256), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(ours, resized[16:240, 58:282])
  turned = augmentation.central_square(image.swapaxes(0, 1).copy(), 224, 0.875)
  np.testing.assert_array_equal(turned, ours.swapaxes(0, 1))
  square = picture(28, 28)
  np.testing.assert_array_equal(augmentation.central_square(square, 28, 1.0), square)
  assert augmentation.central_square(picture(1, 7), 5, 0.3).shape == (5, 5, 3)


@pytest.mark.parametrize("share", (1.0, 0.875, 0.9))
def test_what_the_central_square_leaves_out_is_not_computed(share):
  """It is none the less what is cut from the whole image, resized; also of a thread of pixels."""
  rng = RNG(0)
  for _ in range(40):
    height, width, size = map(int, rng.integers(1, 60, 3))
    image, short = picture(height, width), int(size / share)
    shape = [int(short * extent / min(height, width)) for extent in (width, height)]
    whole = np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC))
    top, left = (round((extent - size) / 2) for extent in whole.shape[:2])
    ours = augmentation.central_square(image, size, share)
    exact = whole[top : top + size, left : left + size]
    # Pillow's boxes are float32, and it rounds twice.
    assert np.abs(ours.astype(int) - exact).max() <= 2
  thread = np.zeros((1, 2_000_000, 3), np.uint8)
  assert augmentation.central_square(thread, 64, share).shape == (64, 64, 3)


def test_a_flip_and_a_crop():
  image = picture()
  np.testing.assert_array_equal(augmentation.flip(image), image[:, ::-1])
  np.testing.assert_array_equal(augmentation.crop(image, (3, 1, 9, 5)), image[1:5, 3:9])


# ---------------------------------------------------------------------------------------------
# Pixels and colours
# ---------------------------------------------------------------------------------------------


def test_normalisation_is_that_of_the_papers_and_is_undone():
  image = np.array([[[0, 255, 51]]], np.uint8)
  half = augmentation.normalize(image, "half")
  np.testing.assert_allclose(half, [[[-1, 1, -0.6]]], rtol=1e-6)
  of_imagenet = augmentation.normalize(image, "imagenet")
  expected = [[[-0.485 / 0.229, (1 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]]]
  np.testing.assert_allclose(of_imagenet, expected, rtol=1e-5)
  assert half.dtype == of_imagenet.dtype == np.float32
  for name in augmentation.NORMALIZATIONS:
    pixels = augmentation.normalize(picture(), name)
    np.testing.assert_array_equal(augmentation.denormalize(pixels, name), picture())


def grey(image):
  """ITU-R 601-2 luma."""
  return image @ np.array([0.299, 0.587, 0.114])


def enhanced(kind, image, factor):
  """A blend of the image with black, its mean grey or its grey values."""
  image = image.astype(float)
  other = {
    "brightness": 0.0,
    "contrast": np.floor(np.floor(grey(image) + 0.5).mean() + 0.5),
    "color": grey(image)[..., None],
  }[kind]
  return np.clip(other + factor * (image - other), 0, 255)


def test_colour_jitter_multiplies_in_the_order_that_is_drawn():
  image = picture()
  draws = Fixed(uniform=[np.array([1.39, 0.7, 0.6])], permutation=[np.array([2, 0, 1])])
  ours = augmentation.color_jitter(image, 0.4, draws).astype(float)
  exact = enhanced("color", image, 0.6)
  exact = enhanced("contrast", enhanced("brightness", exact, 1.39), 0.7)
  assert np.abs(ours - exact).max() <= 3  # Rounded down at each of three steps.
  assert draws.asked[0] == ("uniform", 0.6, 1.4, 3)
  other = Fixed(uniform=[np.array([1.39, 0.7, 0.6])], permutation=[np.array([1, 0, 2])])
  assert np.abs(ours - augmentation.color_jitter(image, 0.4, other)).max() > 5


def moved(image, fill, coefficients):
  """Each pixel is that of the image at (ax + by + c, dx + ey + f), by the nearest one.

  Of positions in the middle of pixels.
  """
  a, b, c, d, e, f = coefficients
  height, width = image.shape[:2]
  y, x = np.mgrid[:height, :width] + 0.5
  u, v = np.floor(a * x + b * y + c).astype(int), np.floor(d * x + e * y + f).astype(int)
  inside = (0 <= u) & (u < width) & (0 <= v) & (v < height)
  taken = image[v.clip(0, height - 1), u.clip(0, width - 1)]
  return np.where(inside[..., None], taken, fill)


FILL = (9, 8, 7)


def equalized(channel):
  """Each value becomes the share of pixels below it, in steps as Pillow's integers have them."""
  counts = np.bincount(channel.ravel(), minlength=256)
  used = counts[counts > 0]
  step = (used.sum() - used[-1]) // 255
  if len(used) < 2 or not step:
    return channel
  below = np.cumsum(counts) - counts
  return ((step // 2 + below) // step).clip(0, 255)[channel]


def stretched(channel):
  low, high = int(channel.min()), int(channel.max())
  return np.clip((channel.astype(float) - low) * 255 / (high - low), 0, 255)


def smoothed(image):
  """3 x 3 of weights 1 and 5 in the middle, over 13; the edge stays."""
  result = image.astype(float)
  near = sum(
    image.astype(float)[1 + dy : image.shape[0] - 1 + dy, 1 + dx : image.shape[1] - 1 + dx]
    for dy in (-1, 0, 1)
    for dx in (-1, 0, 1)
  )
  result[1:-1, 1:-1] = (near + 4 * result[1:-1, 1:-1]) / 13
  return result


# At a signed level, what each operation is, and how far rounding may take Pillow from it.
REFERENCES = {
  "identity": (lambda x, level: x, 0),
  "auto_contrast": (
    lambda x, level: np.stack([stretched(x[..., c]) for c in range(3)], -1),
    1.01,
  ),
  "equalize": (lambda x, level: np.stack([equalized(x[..., c]) for c in range(3)], -1), 0),
  "invert": (lambda x, level: 255 - x.astype(int), 0),
  # int(4 level) bits fewer than four, but one at least.
  "posterize": (
    lambda x, level: x & {0.5: 0b11000000, 0.9: 0b10000000, 1.0: 0b10000000}[abs(level)],
    0,
  ),
  "solarize": (
    lambda x, level: np.where(x < 256 - int(256 * abs(level)), x, 255 - x.astype(int)),
    0,
  ),
  "solarize_add": (
    lambda x, level: np.where(x < 128, np.minimum(255, x.astype(int) + int(110 * abs(level))), x),
    0,
  ),
  "color": (lambda x, level: enhanced("color", x, max(0.1, 1 + 0.9 * level)), 1.5),
  "contrast": (lambda x, level: enhanced("contrast", x, max(0.1, 1 + 0.9 * level)), 1.5),
  "brightness": (lambda x, level: enhanced("brightness", x, max(0.1, 1 + 0.9 * level)), 1.01),
  "sharpness": (
    lambda x, level: np.clip(smoothed(x) + max(0.1, 1 + 0.9 * level) * (x - smoothed(x)), 0, 255),
    1.5,
  ),
}


@pytest.mark.parametrize("level", (0.5, -0.5, 0.9, -0.9, 1.0))
@pytest.mark.parametrize("name", REFERENCES)
def test_operations_of_colours_are_their_references(name, level):
  image = picture(40, 30)
  reference, tolerance = REFERENCES[name]
  ours = np.asarray(augmentation.OPERATIONS[name](Image.fromarray(image), level, FILL))
  assert np.abs(ours.astype(float) - reference(image, level)).max() <= tolerance


@pytest.mark.parametrize("level", (0.5, -0.5, 1.0))
@pytest.mark.parametrize("name", ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"))
def test_operations_of_places_are_their_references(name, level):
  """On steps of colour far from which bicubic and nearest pixels agree."""
  image = np.kron(picture(4, 5), np.ones((20, 20, 1), np.uint8)).astype(np.uint8)
  height, width = image.shape[:2]
  angle = -math.radians(30 * level)
  cos, sin = math.cos(angle), math.sin(angle)
  y, x = height / 2, width / 2
  coefficients = {
    "rotate": (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y),
    "shear_x": (1, 0.3 * level, 0, 0, 1, 0),
    "shear_y": (1, 0, 0, 0.3 * level, 1, 0),
    "translate_x": (1, 0, 0.45 * level * width, 0, 1, 0),
    "translate_y": (1, 0, 0, 0, 1, 0.45 * level * height),
  }[name]
  ours = np.asarray(augmentation.OPERATIONS[name](Image.fromarray(image), level, FILL))
  far = np.abs(ours.astype(int) - moved(image, FILL, coefficients)).max(-1) <= 2
  assert far.mean() > 0.85
  assert (ours == FILL).all(-1).mean() > 0.01
  # What is far from all edges of the steps agrees everywhere: a wrong sign would not.
  wrong = tuple(np.negative(coefficients) + 2 * np.array([1, 0, 0, 0, 1, 0]))
  assert (np.abs(ours.astype(int) - moved(image, FILL, wrong)).max(-1) <= 2).mean() < 0.8


def test_rand_augment_does_half_of_what_it_draws_at_the_level_it_draws():
  image = picture(40, 30)
  names = augmentation.RAND_AUGMENT_SETS["full"]
  draws = Fixed(
    integers=[names.index("posterize"), names.index("translate_x"), names.index("invert")],
    normal=[9.4, 12.0, 5.0],
    # Of each: the sign, then whether it is done.
    random=[0.2, 0.4, 0.7, 0.4, 0.2, 0.6],
  )
  ours = augmentation.rand_augment(image, draws, operations=3, magnitude=9, std=0.5, fill=FILL)
  steps = Image.fromarray(image)
  for name, level in (("posterize", 0.94), ("translate_x", -1.0)):
    steps = augmentation.OPERATIONS[name](steps, level, FILL)
  np.testing.assert_array_equal(ours, np.asarray(steps))
  assert draws.asked.count(("normal", 9, 0.5)) == 3
  assert ("integers", 15) in draws.asked


def test_the_sets_of_rand_augment_are_those_of_the_papers():
  full, beit3 = (augmentation.RAND_AUGMENT_SETS[name] for name in ("full", "beit3"))
  assert len(full) == 15 and len(beit3) == 10 and set(beit3) - set(full) == {"identity"}
  assert {*full, *beit3} == augmentation.OPERATIONS.keys()


def test_erasing_puts_noise_into_one_box():
  pixels = np.full((40, 30, 3), 7, np.float32)
  draws = Fixed(
    uniform=[0.25, math.log(4)], integers=[2, 5], standard_normal=[np.zeros((35, 9, 3))]
  )
  # 300 pixels, four times as high as wide.
  h, w = round(math.sqrt(300 * 4)), round(math.sqrt(300 / 4))
  erased = augmentation.erase(pixels, draws)
  assert draws.asked[2:4] == [("integers", 40 - h + 1), ("integers", 30 - w + 1)]
  assert (erased[2 : 2 + h, 5 : 5 + w] == 0).all() and (erased == 0).sum() == 3 * h * w
  assert (pixels == 7).all()
  rng, noise, areas = RNG(0), [], []
  for _ in range(400):
    changed = augmentation.erase(pixels, rng)
    noise.append(changed[changed != 7])
    areas.append(len(noise[-1]) / pixels.size)
  noise = np.concatenate(noise)
  assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
  assert 0.01 < min(areas) < 0.03 and 0.32 < max(areas) < 0.35
  assert changed.dtype == np.float32


# ---------------------------------------------------------------------------------------------
# Two images in one
# ---------------------------------------------------------------------------------------------


def sample(value, label):
  image = np.full((10, 8, 3), value, np.float32)
  one = np.float32(1)
  of = {"image": image, "label": np.int32(label), "other_label": np.int32(label)}
  return of | {"share": one, "weights": one}


def test_mixup_is_a_weighted_sum():
  mix = augmentation.Mix(mixup=0.8)
  draws = Fixed(random=[0.3], beta=[0.7])
  mixed = mix(sample(1, 3), sample(-2, 5), draws)
  assert draws.asked == [("random",), ("beta", 0.8, 0.8)]
  np.testing.assert_allclose(mixed["image"], 0.7 * 1 - 0.3 * 2, rtol=1e-6)
  assert (mixed["label"], mixed["other_label"]) == (3, 5)
  assert mixed["share"] == np.float32(0.7) and mixed["weights"] == 1
  assert mixed["image"].dtype == mixed["share"].dtype == np.float32


@pytest.mark.parametrize(
  "centre, box", [((5, 4), (2, 3, 6, 8)), ((0, 0), (0, 0, 2, 3)), ((9, 7), (5, 7, 8, 10))]
)
def test_cutmix_pastes_a_box_and_its_share_is_the_area_that_is_left(centre, box):
  """lambda = 3/4: half of each side, cut off at the edge of the image."""
  mix = augmentation.Mix(mixup=0.8, cutmix=1.0, cutmix_share=0.4)
  draws = Fixed(random=[0.3, 0.39], beta=[0.75], integers=list(centre))
  first = sample(1, 3)
  mixed = mix(first, sample(-2, 5), draws)
  left, top, right, bottom = box
  expected = np.ones((10, 8, 3))
  expected[top:bottom, left:right] = -2
  np.testing.assert_array_equal(mixed["image"], expected)
  assert mixed["share"] == np.float32((expected == 1).mean())
  assert ("beta", 1.0, 1.0) in draws.asked and (first["image"] == 1).all()


def test_what_is_mixed_and_how_often():
  """`mix_rate` of the batches, `cutmix_share` of those by cutmix; one alone needs no draw."""
  mix = augmentation.Mix(mixup=0.5, cutmix=1.0, mix_rate=0.6, cutmix_share=0.25)
  kinds = {"none": 0, "mixup": 0, "cutmix": 0}
  for seed in range(2000):
    mixed = mix(sample(1, 3), sample(-2, 5), RNG(seed))
    values = set(np.unique(mixed["image"]))
    kind = "cutmix" if -2 in values or mixed["share"] == 1 else "mixup"
    kinds["none" if mixed["other_label"] == 3 else kind] += 1
  assert abs(kinds["none"] / 2000 - 0.4) < 0.04
  assert abs(kinds["cutmix"] / 2000 - 0.15) < 0.04
  assert augmentation.Mix(cutmix=1.0)(sample(1, 3), sample(-2, 5), RNG(1))["other_label"] == 5
  unmixed = sample(1, 3)
  assert augmentation.Mix(mixup=1.0, mix_rate=0.0)(unmixed, sample(-2, 5), RNG(0)) is unmixed


# ---------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------

ALL = AugmentConfig(
  crop_scale=0.5, flip=0.5, color_jitter=0.4, rand_augment=2, erase=0.5, mixup=0.8, cutmix=1.0
)


def view(augment, size=16, **values):
  options = {"normalization": "half", "eval_crop": 1.0} | values
  return images.Classification.of(image_size=size, augment=dataclasses.asdict(augment), **options)


def test_every_field_of_the_config_reaches_the_view():
  fields = dataclasses.asdict(AugmentConfig())
  own = {field.name for field in dataclasses.fields(images.Spatial)}
  assert fields.keys() == (
    own - {"image_size", "eval_crop", "fill"} | {"erase", *augmentation.Mix._fields}
  )
  made = view(ALL, normalization="imagenet", eval_crop=0.875)
  for name, value in dataclasses.asdict(ALL).items():
    holders = [part for part in (made.spatial, made, made.mix) if hasattr(part, name)]
    assert value in [getattr(part, name) for part in holders], name
  assert made.spatial.fill == (124, 116, 104) and made.spatial.eval_crop == 0.875
  assert view(AugmentConfig()).mix is None


def test_the_config_names_what_there_is():
  of = lambda record, name: record.__dataclass_fields__[name].metadata["choices"]
  assert of(AugmentConfig, "rand_augment_set") == tuple(augmentation.RAND_AUGMENT_SETS)
  assert of(DataConfig, "normalization") == tuple(augmentation.NORMALIZATIONS)


def test_without_augmentation_training_sees_what_an_evaluation_sees():
  raw = {"image": picture(30, 40), "label": np.int32(2)}
  plain = view(AugmentConfig(), eval_crop=0.8)
  trained, evaluated = plain.training(raw, RNG(0)), plain.evaluation(raw)
  assert trained.keys() == evaluated.keys()
  for key, value in trained.items():
    np.testing.assert_array_equal(value, evaluated[key])
    assert value.dtype == evaluated[key].dtype
  square = augmentation.central_square(raw["image"], 16, 0.8)
  np.testing.assert_array_equal(evaluated["image"], augmentation.normalize(square, "half"))
  assert (evaluated["label"], evaluated["other_label"], evaluated["share"]) == (2, 2, 1)


def test_an_evaluation_may_see_all_of_an_image():
  """Its left and right ends, which the central square leaves out; training, too, without a crop."""
  raw = {"image": np.zeros((20, 60, 3), np.uint8), "label": np.int32(2)}
  raw["image"][:, :10], raw["image"][:, 50:] = 250, 150
  view_of = lambda crop: view(AugmentConfig(), eval_crop=crop).spatial
  squeezed, square = (view_of(crop).evaluation(raw["image"]) for crop in (0.0, 1.0))
  assert squeezed.shape == square.shape == (16, 16, 3) and square.max() == 0
  np.testing.assert_array_equal(squeezed[:, [0, -1]].mean((0, 2)), [250, 150])
  assert squeezed[:, 6:10].max() == 0
  np.testing.assert_array_equal(view_of(0.0).training(raw["image"], RNG(0)), squeezed)


def test_training_draws_from_the_generator_alone():
  raw = {"image": picture(30, 40), "label": np.int32(2)}
  made = view(ALL)
  of = lambda seed: made.training(raw, RNG(seed))["image"]
  for seed in range(5):
    np.testing.assert_array_equal(of(seed), of(seed))
    assert of(seed).shape == (16, 16, 3) and of(seed).dtype == np.float32
  assert len({of(seed).tobytes() for seed in range(20)}) == 20


@pytest.mark.parametrize("name, value", [("flip", 1.0), ("crop_scale", 0.5), ("color_jitter", 0.4)])
def test_each_augmentation_changes_the_image(name, value):
  raw = {"image": picture(16, 16), "label": np.int32(0)}
  changed = view(AugmentConfig(**{name: value})).training(raw, RNG(0))["image"]
  plain = view(AugmentConfig()).training(raw, RNG(0))["image"]
  assert (changed != plain).any()
  if name == "flip":
    np.testing.assert_array_equal(changed, plain[:, ::-1])
