"""Images in one call: sources, the views that training and evaluation have of them, and labels."""

import dataclasses
import functools
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, Protocol

import numpy as np

from magneto_jax.data import augmentation, documents, image_files, text, tfds_text

Sample = dict[str, np.ndarray]

# The embedded images: the folder, the file, and the names of the classes.
_EMBEDDED: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
  "embedded/mnist5k": ("images", "mnist5k.npz", tuple(map(str, range(10)))),
  "embedded/emoji": (
    "emoji",
    "emoji32.npz",
    (
      "Smileys & Emotion",
      "People & Body",
      "Animals & Nature",
      "Food & Drink",
      "Travel & Places",
      "Activities",
      "Objects",
      "Symbols",
    ),
  ),
}
_SPLITS = ("train", "validation", "test")


# ---------------------------------------------------------------------------------------------
# What is read of images
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Images(Sequence):
  """Images of any sizes, read one at a time: a random-access data source for Grain.

  Attributes:
    size: how many there are.
    read: index in [0, size) -> uint8 [H, W, 3], red, green and blue, and the class, -1 where there
      is none; BadRecord if it cannot be read.
    identity: JSON-able values that name the content exactly.
    labels: [size], the classes, where they are known without reading; else None.
    digests: of each image one of its content, or none where that is not known without reading.
  """

  size: int
  read: Callable[[int], tuple[np.ndarray, int]]
  identity: Mapping[str, Any]
  labels: np.ndarray | None = None
  digests: tuple[str, ...] = ()

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> Sample:
    """image: uint8 [H, W, 3]; label: int32 []."""
    if not 0 <= index < self.size:
      raise IndexError(f"image {index} of {self.size}")
    image, label = self.read(index)
    return {"image": image, "label": np.int32(label)}


class View(Protocol):
  """What a task sees of a raw sample; in worker processes it is pickled.

  Attributes:
    training: `(sample, random generator) -> sample` of one shape.
    evaluation: `sample -> sample` of the same shapes.
    mix: `(sample, partner, random generator) -> sample` of two training samples, or None.
  """

  training: Callable[[Sample, np.random.Generator], Sample]
  evaluation: Callable[[Sample], Sample]
  mix: Callable[[Sample, Sample, np.random.Generator], Sample] | None


class Viewed(Sequence):
  """Images as an evaluation sees them."""

  def __init__(self, images: Images, evaluation: Callable[[Sample], Sample]):
    self.images, self._evaluation = images, evaluation

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> Sample:
    return self._evaluation(self.images[index])


@dataclasses.dataclass(frozen=True)
class ImageData:
  """Images, ready for the pipelines.

  Attributes:
    train: the raw training images, of which `augment` makes samples.
    validation: the samples of the evaluation.
    classes: their names, by number; none where labels are not read.
    augment, mix: those of the view, `training` and `mix`.
    shared: how many validation images are, byte by byte, in the training set too; None: not known.
    bad_records: the images that were left out: file, and what is wrong.
    identity: JSON-able values that name all of this exactly.
  """

  train: Images
  validation: Viewed
  classes: tuple[str, ...]
  augment: Callable[[Sample, np.random.Generator], Sample]
  mix: Callable[[Sample, Sample, np.random.Generator], Sample] | None
  shared: int | None
  bad_records: tuple[str, ...]
  identity: Mapping[str, Any]

  def describe(self) -> str:
    """Images and classes, and what a person may not expect of them."""
    words = f"{len(self.train):,} training and {len(self.validation):,} validation images"
    if self.classes:
      words += f", {len(self.classes):,} classes"
    if self.shared:
      words += f"; {self.shared:,} of the validation images are in the training set too"
    return words

  def caption(self, sample: Mapping[str, np.ndarray]) -> str:
    """A sample's class, or those that it is mixed of; empty without labels."""
    if "label" not in sample:
      return ""
    share, name = float(sample["share"]), self.classes[int(sample["label"])]
    if share == 1:
      return name
    return f"{share:.0%} {name}, {1 - share:.0%} {self.classes[int(sample['other_label'])]}"

  def show(self, sample: Mapping[str, np.ndarray]) -> str:
    """A sample's size and its label."""
    height, width, _ = sample["image"].shape
    return ": ".join(filter(None, (f"{height} x {width} pixels", self.caption(sample))))


# ---------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spatial:
  """What training and evaluation see of an image: uint8 [S, S, 3] of one of any size.

  Attributes:
    image_size: S.
    eval_crop: the evaluation's central square has this share of the short side; 0: the evaluation
      sees all of the image, squeezed into a square.
    crop_scale, flip, color_jitter, rand_augment...: see `config.AugmentConfig`.
    fill: what comes into the image where RandAugment moves it.
  """

  image_size: int
  eval_crop: float = 1.0
  crop_scale: float = 1.0
  flip: float = 0.0
  color_jitter: float = 0.0
  rand_augment: int = 0
  rand_augment_set: str = "full"
  rand_augment_magnitude: float = 9.0
  rand_augment_std: float = 0.5
  fill: tuple[int, int, int] = (128, 128, 128)

  @classmethod
  def of(
    cls, *, image_size: int, normalization: str, eval_crop: float, augment: Mapping[str, Any]
  ) -> "Spatial":
    """That of a config's values; `augment` are the fields of `config.AugmentConfig`."""
    names = {field.name for field in dataclasses.fields(cls)}
    mean, _ = augmentation.NORMALIZATIONS[normalization]
    fill = tuple(round(255 * value) for value in mean)
    own = {name: value for name, value in augment.items() if name in names}
    return cls(image_size=image_size, eval_crop=eval_crop, fill=fill, **own)

  def training(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A random crop, mirrored and recoloured as the attributes say."""
    if self.crop_scale < 1:
      box = augmentation.random_box(*image.shape[:2], self.crop_scale, generator)
      image = augmentation.resize(augmentation.crop(image, box), self.image_size, self.image_size)
    else:
      image = self.evaluation(image)
    if generator.random() < self.flip:
      image = augmentation.flip(image)
    if self.color_jitter:
      image = augmentation.color_jitter(image, self.color_jitter, generator)
    if self.rand_augment:
      image = augmentation.rand_augment(
        image,
        generator,
        operations=self.rand_augment,
        among=self.rand_augment_set,
        magnitude=self.rand_augment_magnitude,
        std=self.rand_augment_std,
        fill=self.fill,
      )
    return image

  def evaluation(self, image: np.ndarray) -> np.ndarray:
    """The central square, or all of it."""
    if not self.eval_crop:
      return augmentation.resize(image, self.image_size, self.image_size)
    return augmentation.central_square(image, self.image_size, self.eval_crop)


@dataclasses.dataclass(frozen=True)
class Classification:
  """The view of a classifier: a `View`.

  A sample that reaches a batch is
    image: float32 [S, S, 3], normalised.
    label, other_label: int32 [].
    share: float32 []: the target is share * onehot(label) + (1 - share) * onehot(other_label).
    weights: float32 [], 1.

  Attributes:
    spatial: the pixels that are seen.
    normalization: a name in `augmentation.NORMALIZATIONS`.
    erase: share of training images in which a box becomes noise.
    mix: of pairs of training samples; None: they are not mixed.
  """

  spatial: Spatial
  normalization: str = "half"
  erase: float = 0.0
  mix: augmentation.Mix | None = None

  @classmethod
  def of(
    cls, *, image_size: int, normalization: str, eval_crop: float, augment: Mapping[str, Any]
  ) -> "Classification":
    """The view of a config's values; `augment` are the fields of `config.AugmentConfig`."""
    spatial = Spatial.of(
      image_size=image_size, normalization=normalization, eval_crop=eval_crop, augment=augment
    )
    mix = augmentation.Mix(**{name: augment[name] for name in augmentation.Mix._fields})
    return cls(spatial, normalization, augment["erase"], mix if mix.mixup or mix.cutmix else None)

  def training(self, sample: Sample, generator: np.random.Generator) -> Sample:
    """The augmented image, not mixed yet."""
    image = self.spatial.training(sample["image"], generator)
    image = augmentation.normalize(image, self.normalization)
    if generator.random() < self.erase:
      image = augmentation.erase(image, generator)
    return self._labelled(image, sample["label"])

  def evaluation(self, sample: Sample) -> Sample:
    """The central square."""
    image = self.spatial.evaluation(sample["image"])
    return self._labelled(augmentation.normalize(image, self.normalization), sample["label"])

  def _labelled(self, image: np.ndarray, label: np.ndarray) -> Sample:
    one = np.float32(1)
    return {"image": image, "label": label, "other_label": label, "share": one, "weights": one}


@dataclasses.dataclass(frozen=True)
class Pixels:
  """The view of a task that reads no labels: a `View`.

  A sample that reaches a batch is
    image: float32 [S, S, 3], normalised.
    weights: float32 [], 1.

  Attributes:
    spatial: the pixels that are seen.
    normalization: a name in `augmentation.NORMALIZATIONS`.
  """

  spatial: Spatial
  normalization: str = "half"
  mix: None = None

  def training(self, sample: Sample, generator: np.random.Generator) -> Sample:
    """The augmented image."""
    return self._normalized(self.spatial.training(sample["image"], generator))

  def evaluation(self, sample: Sample) -> Sample:
    """The central square."""
    return self._normalized(self.spatial.evaluation(sample["image"]))

  def _normalized(self, image: np.ndarray) -> Sample:
    pixels = augmentation.normalize(image, self.normalization)
    return {"image": pixels, "weights": np.float32(1)}


# ---------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------


def load_images(
  *,
  name: str,
  view: View,
  label_key: str = "",
  image_key: str = "image",
  train_files: Sequence[str] = (),
  validation_files: Sequence[str] = (),
  test_files: Sequence[str] = (),
  validation_fraction: float = 0.1,
  data_dir: str = "",
  train_split: str = "train",
  validation_split: str = "validation",
  skip_bad: int = 0,
  expected: Mapping[str, Any] | None = None,
) -> ImageData:
  """Finds the images of a source and shows them through a view.

  A run reads and checks all files of an `image_folder` once, whenever it starts or goes on.

  Args:
    name: `embedded/mnist5k`, `embedded/emoji`, `image_folder` (see `image_files.find`), or a TFDS
      data set on disk, such as `cifar10`.
    view: what a task sees of them.
    label_key: the TFDS feature that holds the label; empty: images alone are read, and of no
      source the classes.
    image_key: the TFDS feature that holds the image.
    train_files, validation_files, test_files: a folder each (`image_folder`), of which the last is
      the split `test`.
    validation_fraction: without validation_files, about which part of every class is held out, by
      digests of the files (`image_folder`).
    data_dir, train_split, validation_split: of TFDS; the others have the splits train, validation
      and test. As validation_split also `set/split`, such as imagenet_r/test: of another set that
      has the same classes, TFDS's or an embedded one.
    skip_bad: how many bad files may be left out, of training and validation together; not of TFDS,
      whose images are decoded when they are read.
    expected: the `identity` of an earlier call, whose images these must be. Without its
      `validation` any images may be evaluated on, those of the training too.

  Raises:
    FileNotFoundError: folders or the data set are not on disk.
    ValueError: of one line: no such source or split, files that cannot be read, fewer than two
      classes, the same images to train and to evaluate on, or others than expected.
  """
  bad, shared = documents.BadRecords(skip_bad), None
  other, _, split = validation_split.rpartition("/")
  splits = train_split, train_split if other else split
  if name in _EMBEDDED:
    train, validation = (embedded(name, split) for split in splits)
    classes = _EMBEDDED[name][2]
  elif name.split("/")[0] == "embedded":
    raise ValueError(f"the embedded images are {' and '.join(_EMBEDDED)}: set data.name to one")
  elif name == "image_folder":
    folders = image_files.find(
      train_files,
      validation_files,
      test_files,
      bad,
      labelled=bool(label_key),
      fraction=validation_fraction,
      split=splits[1],
    )
    classes = folders.classes
    train, validation = (_of_files(part, classes) for part in (folders.train, folders.validation))
    seen = {file.digest for file in folders.train}
    shared = sum(file.digest in seen for file in folders.validation)
  else:
    train, validation, classes = _of_tfds(name, splits, image_key, label_key, data_dir, skip_bad)
  if other:
    validation, theirs = _another(other, split, image_key, label_key, data_dir)
    if label_key and theirs != classes:
      raise ValueError(
        f"{other} does not name the classes of {name} in their order: evaluate on a split of it, or"
        " of a data set that does"
      )
  if expected is None and train.identity == validation.identity:
    raise ValueError(f"{name}: training and validation images are the same: {train.identity}")
  identities = {"train": dict(train.identity), "validation": dict(validation.identity)}
  if part := text.changed_part(identities, expected):
    raise ValueError(
      f"the {part} images are not those that this run was started with: bring them back, or use"
      " another workdir"
    )
  return ImageData(
    train=train,
    validation=Viewed(validation, view.evaluation),
    classes=classes if label_key else (),
    augment=view.training,
    mix=view.mix,
    shared=shared,
    bad_records=tuple(bad.found),
    identity={**identities, **({"left_out": len(bad.found)} if bad.found else {})},
  )


def _another(
  name: str, split: str, image_key: str, label_key: str, data_dir: str
) -> tuple[Images, tuple[str, ...]]:
  """A split of a data set that is not the run's own, and its classes."""
  if name in _EMBEDDED:
    return embedded(name, split), _EMBEDDED[name][2]
  images, _, classes = _of_tfds(name, (split, split), image_key, label_key, data_dir, 0)
  return images, classes


def embedded(name: str, split: str) -> Images:
  """One split of the images that come with the package: `embedded/mnist5k` or `embedded/emoji`."""
  if split not in _SPLITS:
    raise ValueError(f"{name} has no split {split!r}; it has {', '.join(_SPLITS)}")
  folder, file, _ = _EMBEDDED[name]
  content = (resources.files("magneto_jax.data") / "embedded" / folder / file).read_bytes()
  with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
    chosen = arrays["split"] == _SPLITS.index(split)
    labels = arrays["labels"][chosen].astype(np.int32)
    if "images" in arrays:
      images = np.repeat(arrays["images"][chosen][..., None], 3, axis=-1)
    else:
      rows = np.arange(len(chosen))[:, None, None]
      images = arrays["palette"][rows, arrays["index"]][chosen]
  identity = {
    "source": name,
    "split": split,
    "images": len(images),
    "sha256": hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
  }
  digests = tuple(f"{name}/{split}:{number}" for number in range(len(images)))
  read = functools.partial(_of_arrays, images, labels)
  return Images(len(images), read, identity, labels, digests)


def _of_arrays(images: np.ndarray, labels: np.ndarray, index: int) -> tuple[np.ndarray, int]:
  return images[index], labels[index]


def _of_files(files: Sequence[image_files.File], classes: Sequence[str]) -> Images:
  """Named by the files' names below their folder and their bytes, wherever that lies."""
  numbers = {name: number for number, name in enumerate(classes)}
  labels = np.array([numbers[file.label] for file in files], np.int32)
  hashed = hashlib.sha256()
  for file in files:
    hashed.update(f"{file.name}\n{file.digest}\n".encode(errors="surrogateescape"))
  identity = {
    "source": "image_folder",
    "images": len(files),
    "classes": list(classes),
    "sha256": hashed.hexdigest(),
  }
  paths, digests = [file.path for file in files], tuple(file.digest for file in files)
  return Images(len(files), functools.partial(_of_paths, paths, labels), identity, labels, digests)


def _of_paths(paths: Sequence[str], labels: np.ndarray, index: int) -> tuple[np.ndarray, int]:
  return image_files.read(paths[index]), labels[index]


def _of_tfds(
  name: str,
  splits: Sequence[str],
  image_key: str,
  label_key: str,
  data_dir: str,
  skip_bad: int,
) -> tuple[Images, Images, tuple[str, ...]]:
  """Training and validation images, and the classes; images are decoded when they are read."""
  if skip_bad:
    raise ValueError(
      f"{skip_bad=} is not read with {name}, whose images are not decoded before they are used: set"
      " data.skip_bad=0"
    )
  parts = []
  for split in splits:
    pictures = tfds_text.tfds_pictures(
      name,
      split=split,
      image_key=image_key,
      label_key=label_key,
      decode=image_files.decode,
      data_dir=data_dir,
    )
    if not pictures.size:
      raise ValueError(f"{name} has no images in {split}")
    if label_key and len(pictures.classes) < 2:
      raise ValueError(f"{name} has the class {pictures.classes[0]!r} only: nothing to tell apart")
    pictures.read(0)  # A split without labels has none here.
    parts.append(Images(pictures.size, pictures.read, pictures.identity))
  return *parts, pictures.classes
