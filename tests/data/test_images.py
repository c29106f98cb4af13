"""Images: what is read of files, whichever they are, and what becomes of bad ones."""

import csv
import dataclasses
import errno
import io
import json
import os
import pathlib
import re
import shutil
import struct

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from magneto_jax.config import AugmentConfig
from magneto_jax.data import augmentation, documents, image_files, images, pipelines

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def view(size=8, augment=None, **values):
  options = {"normalization": "half", "eval_crop": 1.0} | values
  augment = dataclasses.asdict(augment or AugmentConfig())
  return images.Classification.of(image_size=size, augment=augment, **options)


def load(name="image_folder", **options):
  return images.load_images(name=name, **{"view": view(), "label_key": "label"} | options)


def encoded(image, kind="PNG", **options):
  written = io.BytesIO()
  image.save(written, kind, **options)
  return written.getvalue()


def of_colours(*rows):
  """An image whose pixels are these."""
  return Image.fromarray(np.array(rows, np.uint8))


# ---------------------------------------------------------------------------------------------
# The embedded images
# ---------------------------------------------------------------------------------------------

SIZES = {
  "embedded/mnist5k": {"train": 4000, "validation": 500, "test": 500},
  "embedded/emoji": {"train": 1265, "validation": 157, "test": 157},
}
FOLDER = pathlib.Path(images.__file__).parent / "embedded"


@pytest.mark.parametrize("name", SIZES)
def test_the_embedded_images_are_in_one_part_each(name):
  parts = {split: images.embedded(name, split) for split in SIZES[name]}
  assert {split: len(part) for split, part in parts.items()} == SIZES[name]
  assert len({json.dumps(part.identity) for part in parts.values()}) == 3
  seen = [part[i]["image"].tobytes() for part in parts.values() for i in range(len(part))]
  assert len(set(seen)) == len(seen)
  with pytest.raises(ValueError, match=f"{name} has no split 'tset'; it has train, validation, te"):
    images.embedded(name, "tset")


def test_the_embedded_digits_are_those_of_the_file():
  with np.load(FOLDER / "images" / "mnist5k.npz", allow_pickle=False) as arrays:
    chosen = arrays["split"] == 1
    pixels, labels = arrays["images"][chosen], arrays["labels"][chosen]
  part = images.embedded("embedded/mnist5k", "validation")
  for i in range(0, 500, 50):
    sample = part[i]
    assert sample["image"].shape == (28, 28, 3) and sample["label"] == labels[i]
    for channel in range(3):
      np.testing.assert_array_equal(sample["image"][..., channel], pixels[i])
  assert (np.bincount(part.labels) == 50).all() and (part.labels == labels).all()
  data = load("embedded/mnist5k", view=view(28))
  assert data.classes == tuple("0123456789")
  assert data.describe() == "4,000 training and 500 validation images, 10 classes"
  sample = data.validation[3]
  np.testing.assert_allclose(sample["image"][..., 0], pixels[3] / 127.5 - 1, atol=1e-6)
  assert data.show(sample) == f"28 x 28 pixels: {labels[3]}"


def test_the_embedded_emoji_are_those_of_the_table():
  with open(FOLDER / "emoji" / "emoji.tsv", encoding="utf-8") as file:
    rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
  classes = load("embedded/emoji", view=view(32)).classes
  for split in SIZES["embedded/emoji"]:
    part = images.embedded("embedded/emoji", split)
    groups = [row["group"] for row in rows if row["split"] == split]
    assert [classes[label] for label in part.labels] == groups
  # The first is a yellow face on white.
  face = images.embedded("embedded/emoji", "train")[0]["image"]
  assert (face[0, 0] == 255).all() and face[16, 4, 0] > 200 > 120 > face[16, 4, 2]


def test_images_without_labels():
  data = load("embedded/emoji", label_key="")
  assert data.classes == () and "classes" not in data.describe()


def test_other_names_are_refused():
  for name in ("embedded", "embedded/mnist"):
    with pytest.raises(ValueError, match="images are embedded/mnist5k and embedded/emoji: set"):
      load(name)
  with pytest.raises(ValueError, match="nearest names: .*image_folder"):
    load("image_folders")
  with pytest.raises(ValueError, match="training and validation images are the same"):
    load("embedded/emoji", validation_split="train")


# ---------------------------------------------------------------------------------------------
# From bytes to pixels
# ---------------------------------------------------------------------------------------------


def _with_alpha():
  return of_colours([(*RED, 255), (*RED, 0), (0, 0, 0, 51)])


def _of_palette(**options):
  image = Image.new("P", (3, 1))
  image.putpalette([*RED, *GREEN, *BLUE])
  image.putdata([2, 0, 1])
  return encoded(image, **options)


def _png_of_16_bits_in_colour():
  """By hand, as Pillow writes none: one row of one pixel."""

  def chunk(kind, content):
    import zlib

    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

  import zlib

  header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
  row = zlib.compress(b"\0" + struct.pack(">HHH", 0xFFFF, 0x8000, 0x0100))
  parts = chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + parts


# Bytes, the pixels that they should become, and how far a lossy format may be from them.
CONVERSIONS = {
  "rgb": (encoded(of_colours([RED, GREEN, BLUE])), [RED, GREEN, BLUE], 0),
  "bmp": (encoded(of_colours([RED, GREEN, BLUE]), "BMP"), [RED, GREEN, BLUE], 0),
  "webp": (encoded(of_colours([RED, GREEN]), "WEBP", lossless=True), [RED, GREEN], 0),
  "jpeg": (encoded(of_colours([RED] * 8), "JPEG", quality=95), [RED] * 8, 3),
  "grey": (encoded(Image.new("L", (2, 1), 77)), [(77,) * 3] * 2, 0),
  "grey jpeg": (encoded(Image.new("L", (2, 1), 77), "JPEG"), [(77,) * 3] * 2, 1),
  "black and white": (encoded(Image.new("1", (1, 1), 1)), [WHITE], 0),
  "grey of 16 bits": (
    encoded(Image.fromarray(np.array([[0, 257, 258, 386, 65535]], np.uint16))),
    [(0,) * 3, (1,) * 3, (1,) * 3, (2,) * 3, WHITE],
    0,
  ),
  "colours of 16 bits": (_png_of_16_bits_in_colour(), [(255, 128, 1)], 0),
  "palette": (_of_palette(), [BLUE, RED, GREEN], 0),
  "palette, one colour transparent": (_of_palette(transparency=0), [BLUE, WHITE, GREEN], 0),
  "palette, some of each transparent": (
    _of_palette(transparency=bytes([0, 255, 51])),
    [(204, 204, 255), WHITE, GREEN],
    0,
  ),
  "colours, one transparent": (
    encoded(of_colours([RED, GREEN]), transparency=GREEN),
    [RED, WHITE],
    0,
  ),
  # Black of which a fifth is seen on white.
  "alpha": (encoded(_with_alpha()), [RED, WHITE, (204,) * 3], 0),
  "alpha webp": (encoded(_with_alpha(), "WEBP", lossless=True), [RED, WHITE, (204,) * 3], 0),
  "grey with alpha": (encoded(Image.new("LA", (1, 1), (0, 51))), [(204,) * 3], 0),
  # No cyan, all magenta and yellow, no black: red; and half black.
  "cmyk": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), [RED] * 8, 3),
  "cmyk, dark": (encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 128)), "JPEG"), [(127,) * 3] * 8, 3),
  "gif": (
    encoded(
      of_colours([RED, BLUE]).convert("P"),
      "GIF",
      save_all=True,
      append_images=[of_colours([GREEN, GREEN]).convert("P")],
    ),
    [RED, BLUE],
    0,
  ),
}


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_every_kind_of_image_becomes_red_green_and_blue(kind):
  content, expected, tolerance = CONVERSIONS[kind]
  image_files.verify(content)
  pixels = image_files.decode(content)
  assert pixels.dtype == np.uint8 and pixels.shape[1:] == (len(expected), 3)
  assert np.abs(pixels[0].astype(int) - expected).max() <= tolerance, pixels[0]


# What stands above, for the pixels [[red, green], [blue, white]] as they are stored.
TURNED = {
  1: [[RED, GREEN], [BLUE, WHITE]],
  2: [[GREEN, RED], [WHITE, BLUE]],
  3: [[WHITE, BLUE], [GREEN, RED]],
  4: [[BLUE, WHITE], [RED, GREEN]],
  5: [[RED, BLUE], [GREEN, WHITE]],
  6: [[BLUE, RED], [WHITE, GREEN]],
  7: [[WHITE, GREEN], [BLUE, RED]],
  8: [[GREEN, WHITE], [RED, BLUE]],
}


@pytest.mark.parametrize("orientation", TURNED)
def test_images_are_turned_as_their_exif_data_say(orientation):
  stored = of_colours([RED, GREEN], [BLUE, WHITE])
  exif = Image.Exif()
  exif[0x0112] = orientation
  pixels = image_files.decode(encoded(stored, exif=exif))
  np.testing.assert_array_equal(pixels, TURNED[orientation])
  large = stored.resize((32, 32), Image.Resampling.NEAREST)
  pixels = image_files.decode(encoded(large, "JPEG", quality=95, subsampling=0, exif=exif))
  assert np.abs(pixels[8::16, 8::16].astype(int) - TURNED[orientation]).max() <= 3


def noise(height=40, width=40, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
  return Image.fromarray(pixels)


WHOLE = {kind: encoded(noise(), kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF")}
BROKEN = {
  **{f"truncated {kind}": content[: len(content) * 2 // 3] for kind, content in WHOLE.items()},
  **{f"header of {kind}": content[:20] for kind, content in WHOLE.items()},
  "empty": b"",
  "text": b"not an image",
  "TIFF": encoded(noise(), "TIFF"),
  "damaged PNG": WHOLE["PNG"][:200] + b"\0\0\0\0" + WHOLE["PNG"][204:],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_decoded_is_one_line(kind):
  for read in (image_files.decode, image_files.verify):
    with pytest.raises(ValueError) as caught:
      read(BROKEN[kind])
    assert str(caught.value) and "\n" not in str(caught.value)


def test_an_image_of_too_many_pixels_is_refused_with_its_size(monkeypatch):
  """Before it is decoded; Pillow warns above its limit, and raises above twice that."""
  content = encoded(Image.new("1", (50, 30)))
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
  with pytest.raises(ValueError, match=r"1,?500.* pixels.*: more than 1,000 pixels, make it small"):
    image_files.decode(content)
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
  with pytest.raises(ValueError, match=r"1,?500.* pixels.*: more than 700 pixels, make it smaller"):
    image_files.verify(content)
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
  assert image_files.decode(content).shape == (30, 50, 3)


# ---------------------------------------------------------------------------------------------
# A folder of one's own
# ---------------------------------------------------------------------------------------------


def fill(folder, classes, first=0):
  """PNG files of noise, as many of each class as are asked for."""
  for number, (name, count) in enumerate(classes.items()):
    (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
      seed = first + 1000 * number + i
      (folder / name / f"{i:02d}.png").write_bytes(encoded(noise(6 + i % 3, 9, seed)))
  return folder


@pytest.fixture
def folder(tmp_path):
  return fill(tmp_path / "own", {"zebra": 10, "ant": 20})


def names(part):
  return [
    "/".join(pathlib.Path(path).parts[-2:])
    for path in (part.images if isinstance(part, images.Viewed) else part).read.args[0]
  ]


def test_folders_are_classes_in_the_order_of_their_names(folder):
  data = load(train_files=[str(folder)])
  assert data.classes == ("ant", "zebra")
  assert data.describe() == "27 training and 3 validation images, 2 classes"
  for part in (data.train, data.validation):
    for i, name in enumerate(names(part)):
      assert data.classes[int(part[i]["label"])] == name.split("/")[0]
  for i, name in enumerate(names(data.train)):
    with Image.open(folder / name) as image:
      np.testing.assert_array_equal(data.train[i]["image"], np.asarray(image))
  assert data.validation[0]["image"].shape == (8, 8, 3)


def test_a_share_of_every_class_is_held_out_whatever_its_files_are_called(folder, tmp_path):
  data = load(train_files=[str(folder)], validation_fraction=0.2)
  out = names(data.validation)
  assert sorted(name.split("/")[0] for name in out) == ["ant"] * 4 + ["zebra"] * 2
  assert not {*out} & {*names(data.train)} and len(data.train) == 24
  moved = tmp_path / "moved"
  for path in folder.rglob("*.png"):
    (moved / path.parent.name).mkdir(parents=True, exist_ok=True)
    shutil.copy(path, moved / path.parent.name / f"{99 - int(path.stem):02d}.png")
  again = load(train_files=[str(moved)], validation_fraction=0.2)
  pixels = lambda data: {data.validation.images[i]["image"].tobytes() for i in range(6)}
  assert pixels(again) == pixels(data)


def test_equal_files_are_in_one_part_and_small_classes_keep_one_to_train(tmp_path):
  folder = fill(tmp_path / "own", {"a": 3, "b": 1, "c": 2})
  for i in range(20):
    shutil.copy(folder / "a" / "00.png", folder / "a" / f"copy{i}.png")
  data = load(train_files=[str(folder)], validation_fraction=0.9)
  assert data.shared == 0
  assert {name[0] for name in names(data.train)} == {"a", "b", "c"}
  assert [name for name in names(data.validation) if name[0] == "b"] == []


def test_folders_of_the_other_splits(folder, tmp_path):
  other = fill(tmp_path / "other", {"ant": 2}, 500)
  test = fill(tmp_path / "test", {"zebra": 3}, 900)
  shutil.copy(folder / "ant" / "00.png", other / "ant" / "99.png")
  files = {"train_files": [str(folder)], "validation_files": [str(other)]}
  data = load(**files)
  assert len(data.train) == 30 and len(data.validation) == 3
  assert data.describe().endswith("; 1 of the validation images are in the training set too")
  data = load(**files, test_files=[str(test)], validation_split="test")
  assert len(data.train) == 30 and names(data.validation)[0] == "zebra/00.png"
  assert int(data.validation[0]["label"]) == 1
  data = load(train_files=[str(folder)], test_files=[str(test)], validation_split="test")
  assert len(data.train) == 27 and len(data.validation) == 3
  identity = load(**files).identity
  expected = {"train": identity["train"]}
  data = load(**files, validation_split="train", expected=expected)
  assert len(data.validation) == 30


def test_without_labels_images_may_lie_anywhere(folder):
  shutil.copy(folder / "ant" / "00.png", folder / "loose.png")
  (folder / "ant" / "deep").mkdir()
  shutil.move(folder / "ant" / "01.png", folder / "ant" / "deep" / "01.png")
  data = load(train_files=[str(folder)], label_key="")
  assert data.classes == () and len(data.train) + len(data.validation) == 31
  (folder / "loose.png").unlink()
  data = load(train_files=[str(folder)])
  assert len(data.train) + len(data.validation) == 30


def test_hidden_files_are_no_part_and_links_are_followed(folder, tmp_path):
  (folder / ".cache").mkdir()
  (folder / ".cache" / "x.png").write_bytes(b"")
  (folder / "ant" / ".DS_Store").write_bytes(b"")
  (folder / "README.txt").write_text("of the whole folder")
  os.rename(folder / "zebra", tmp_path / "elsewhere")
  os.symlink(tmp_path / "elsewhere", folder / "zebra")
  os.rename(folder / "ant" / "00.png", tmp_path / "00.png")
  os.symlink(tmp_path / "00.png", folder / "ant" / "00.PNG")
  data = load(train_files=[str(folder)])
  assert len(data.train) + len(data.validation) == 30
  os.symlink(folder, folder / "ant" / "circle")
  with pytest.raises(ValueError, match="ant/circle cannot be read .its name does not end in .jpg"):
    load(train_files=[str(folder)])


BAD_FILES = {
  "broken.png": (BROKEN["truncated PNG"], r"OSError: image file is truncated"),
  "broken.jpg": (BROKEN["truncated JPEG"], r"OSError: image file is truncated"),
  "text.jpg": (b"text", r"it is no JPEG, PNG, WEBP, BMP or GIF image"),
  "empty.webp": (b"", r"it is no JPEG, PNG, WEBP, BMP or GIF image"),
  "labels.csv": (b"a,b", r"its name does not end in .jpg, .jpeg, .png, .webp, .bmp, .gif"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_and_left_out_up_to_the_limit(folder, name):
  content, reason = BAD_FILES[name]
  whole = load(train_files=[str(folder)])
  path = folder / "ant" / name
  path.write_bytes(content)
  told = rf"^{re.escape(str(path))} cannot be read \({reason}"
  with pytest.raises(ValueError, match=rf"{told}.*\): repair it, or set data.skip_bad") as caught:
    load(train_files=[str(folder)])
  assert "\n" not in str(caught.value)
  data = load(train_files=[str(folder)], skip_bad=1)
  (record,) = data.bad_records
  assert re.match(told, record)
  assert data.identity == whole.identity | {"left_out": 1}
  (folder / "ant" / "second.png").write_bytes(b"")
  with pytest.raises(ValueError, match="1 others were left out"):
    load(train_files=[str(folder)], skip_bad=1)


def test_a_link_to_nothing_is_a_bad_file(folder):
  os.symlink(folder / "nowhere", folder / "ant" / "x.png")
  with pytest.raises(
    ValueError, match="ant/x.png cannot be read .it is missing, a link to nothing"
  ):
    load(train_files=[str(folder)])


@pytest.mark.parametrize("name", ("stat", "open"))
def test_a_fault_of_the_machine_ends_the_run(folder, monkeypatch, name):
  """It is no bad file: with another one left out, the run would be another."""
  real = {"stat": os.stat, "open": open}[name]

  def fail(path, *args, **kwargs):
    if str(path).endswith(".png"):
      raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    return real(path, *args, **kwargs)

  monkeypatch.setattr(*(("os.stat", fail) if name == "stat" else ("builtins.open", fail)))
  with pytest.raises(OSError, match="Stale file handle"):
    load(train_files=[str(folder)], skip_bad=99)


def test_a_gigantic_file_is_named_with_its_size(folder, monkeypatch):
  (folder / "ant" / "large.png").write_bytes(encoded(Image.new("1", (400, 300))))
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
  with pytest.raises(ValueError, match="ant/large.png cannot be read .*120000 pixels.*more than"):
    load(train_files=[str(folder)])


def test_a_file_of_too_many_bytes_is_not_read(folder, monkeypatch):
  monkeypatch.setattr(image_files, "_MOST_BYTES", 1000)
  (folder / "ant" / "large.png").write_bytes(bytes(1001))
  with pytest.raises(ValueError, match="ant/large.png cannot be read .it has 1,001 bytes, more th"):
    load(train_files=[str(folder)])


def test_a_file_that_becomes_bad_later_is_named(folder):
  data = load(train_files=[str(folder)])
  path = folder / names(data.train)[0]
  path.write_bytes(BROKEN["truncated PNG"])
  with pytest.raises(documents.BadRecord, match=f"^{path} cannot be read .OSError: image file is"):
    data.train[0]
  iterator = pipelines.train_iterator(data.train, batch_size=27, seed=0, augment=data.augment)
  with pytest.raises(documents.BadRecord, match="cannot be read"):
    next(iterator)


def _refused(tmp_path, change, **options):
  folder = fill(tmp_path / "own", {"ant": 3, "zebra": 3})
  change(folder)
  return load(train_files=[str(folder)], **options)


REFUSED = {
  "no class": (
    lambda folder: [shutil.rmtree(folder / name) for name in ("ant", "zebra")],
    "own has no folders of classes: put the images of each into one",
  ),
  "a class without images": (
    lambda folder: (folder / "bee").mkdir(),
    "own/bee has no images: fill it or remove it",
  ),
  "parts of a data set": (
    lambda folder: [
      (folder / a).rename(folder / b) for a, b in (("ant", "Train"), ("zebra", "val"))
    ],
    "own holds Train, val, which are parts and no classes: name these folders",
  ),
  "one class": (
    lambda folder: shutil.rmtree(folder / "ant"),
    "own has the class 'zebra' only: there is nothing to tell apart",
  ),
  "an image beside the classes": (
    lambda folder: shutil.copy(folder / "ant" / "00.png", folder / "x.jpg"),
    "own/x.jpg is in no folder of a class: name the folder that holds a folder for each class",
  ),
  "one image a class": (
    lambda folder: [(folder / c / f"0{i}.png").unlink() for c in ("ant", "zebra") for i in (1, 2)],
    "own has no class of two different images, .*: name validation_files",
  ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_folders_that_cannot_be_learned_from_are_refused(tmp_path, kind):
  change, message = REFUSED[kind]
  with pytest.raises(ValueError, match=message) as caught:
    _refused(tmp_path, change)
  assert "\n" not in str(caught.value)


def test_what_is_no_folder_is_refused(folder, tmp_path):
  one = str(folder)
  for files, message in (
    ([], "train_files must be one folder of images, not 0"),
    ([one, one], "train_files must be one folder of images, not 2"),
    ([f"{one}/ant/00.png"], "'.*00.png' is a file: name the folder that holds the images"),
  ):
    with pytest.raises(ValueError, match=message):
      load(train_files=files)
  with pytest.raises(TypeError, match="train_files must be a sequence of paths"):
    load(train_files=one)
  with pytest.raises(FileNotFoundError, match="train_files: there is no folder '.*nowhere'"):
    load(train_files=[f"{one}/nowhere"])
  with pytest.raises(ValueError, match="train_files and validation_files must not be the same fo"):
    load(train_files=[one], validation_files=[f"{one}/../own"])
  with pytest.raises(ValueError, match="must not be the same folder, nor one in the other: .*ant$"):
    load(train_files=[one], validation_files=[f"{one}/ant"])
  with pytest.raises(ValueError, match="no split 'tset', only train, validation, test"):
    load(train_files=[one], validation_split="tset")
  with pytest.raises(ValueError, match="test_files must be one folder"):
    load(train_files=[one], validation_split="test")
  other = fill(tmp_path / "other", {"bee": 2})
  with pytest.raises(ValueError, match="no training image is of the class 'bee', only of 'ant'"):
    load(train_files=[one], validation_files=[str(other)])
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match=r"empty has no images \(.jpg"):
    load(train_files=[str(tmp_path / "empty")], label_key="")


def test_images_that_have_changed_are_refused(folder, tmp_path):
  """Those of the run may lie elsewhere; an evaluation may be of others."""
  before = load(train_files=[str(folder)]).identity
  assert json.loads(json.dumps(before)) == before
  moved = tmp_path / "moved"
  shutil.move(folder, moved)
  assert load(train_files=[str(moved)], expected=before).identity == before
  train = names(load(train_files=[str(moved)]).train)
  (moved / train[0]).write_bytes(encoded(noise(9, 9, 77)))
  with pytest.raises(ValueError, match="the train images are not those that this run was started"):
    load(train_files=[str(moved)], expected=before)
  other = fill(tmp_path / "other", {"ant": 1}, 600)
  for expected in (before, {"train": before["train"]}):
    files = {"train_files": [str(moved)], "validation_files": [str(other)]}
    with pytest.raises(ValueError, match="the train images are not those"):
      load(**files, expected=expected)


# ---------------------------------------------------------------------------------------------
# TFDS
# ---------------------------------------------------------------------------------------------

with tfds.core.registered.skip_registration():

  class TinyImages(tfds.core.GeneratorBasedBuilder):
    """Twelve images to train on, three to validate on, two without labels."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = {
        "image": tfds.features.Image(encoding_format="png"),
        "grey": tfds.features.Image(shape=(4, 4, 1), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        "name": tfds.features.Text(),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      sizes = {"train": range(12), "validation": range(12, 15), "test": range(15, 17)}
      return {split: self._generate_examples(split, rows) for split, rows in sizes.items()}

    def _generate_examples(self, split, rows):
      for i in rows:
        grey = io.BytesIO(encoded(Image.new("L", (4, 4), i)))
        label = -1 if split == "test" else i % 2
        image = io.BytesIO(encoded(noise(5, 7, i)))
        yield i, {"image": image, "grey": grey, "label": label, "name": str(i)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp("tfds")
  TinyImages(data_dir=data_dir, file_format="array_record").download_and_prepare()
  return str(data_dir)


def test_prepared_images_are_read_by_name(prepared):
  data = load("tiny_images", data_dir=prepared)
  assert data.classes == ("cat", "dog") and len(data.train) == 12 and len(data.validation) == 3
  expected = {np.asarray(noise(5, 7, i)).tobytes(): i % 2 for i in range(12)}
  read = {sample["image"].tobytes(): int(sample["label"]) for sample in data.train}
  assert read == expected
  assert data.validation[0]["image"].shape == (8, 8, 3)
  assert json.loads(json.dumps(data.identity)) == data.identity
  assert load("tiny_images", data_dir=prepared, expected=data.identity).identity == data.identity
  greys = load("tiny_images", data_dir=prepared, image_key="grey", label_key="")
  assert {int(sample["image"].max()) for sample in greys.train} == set(range(12))
  assert greys.train[0]["image"].shape == (4, 4, 3) and greys.classes == ()
  sliced = load("tiny_images:1.0.0", data_dir=prepared, train_split="train[:50%]")
  assert len(sliced.train) == 6


def test_prepared_images_that_do_not_fit_are_one_line(prepared, tmp_path):
  for options, message in (
    ({"image_key": "name"}, r"no Image 'name'; data.image_key can be one of \['grey', 'image'\]"),
    ({"label_key": "name"}, r"no ClassLabel 'name'; data.label_key can be one of \['label'\]"),
    ({"validation_split": "tset"}, r"has no split 'tset'; it has \['test', 'train', 'valid"),
    ({"validation_split": "test"}, r"ValueError: it has no label \(-1\)"),
    ({"skip_bad": 3}, r"skip_bad=3 is not read with tiny_images, whose images are not decoded"),
    ({"validation_split": "train"}, r"training and validation images are the same"),
  ):
    with pytest.raises(ValueError, match=message):
      load("tiny_images", **{"data_dir": prepared} | options)
  for name in ("imagenet2012", "cifar10", "cifar100", "imagenet_a", "imagenet_v2", "mnist"):
    with pytest.raises(FileNotFoundError, match=f"{name} is not prepared under .*embedded/mnist5k"):
      load(name, data_dir=str(tmp_path))


def test_a_damaged_prepared_image_is_named(prepared, tmp_path):
  """Its record too, whose own checksum finds the damage; the others are read."""
  shutil.copytree(pathlib.Path(prepared, "tiny_images"), tmp_path / "tiny_images")
  (shard,) = tmp_path.rglob("*-train.array_record-*")
  whole, lost = shard.read_bytes(), 0
  for at in range(100, 3000, 200):
    content = bytearray(whole)
    content[at] ^= 1
    shard.write_bytes(content)
    wrong = []
    try:  # The first is read, to see whether it has a label.
      train = load("tiny_images", data_dir=str(tmp_path)).train
    except documents.BadRecord as error:
      wrong.append(str(error))
    for i in range(0 if wrong else 12):
      try:
        assert train[i]["image"].shape == (5, 7, 3)
      except documents.BadRecord as error:
        wrong.append(str(error))
    assert len(wrong) <= 1
    for record in wrong:
      assert re.match(rf"{re.escape(str(shard))}: record \d+ cannot be read \(", record)
    lost += len(wrong)
  assert lost


# ---------------------------------------------------------------------------------------------
# Streams
# ---------------------------------------------------------------------------------------------

ALL = AugmentConfig(
  crop_scale=0.5, flip=0.5, color_jitter=0.4, rand_augment=2, erase=0.5, mixup=0.8, cutmix=1.0
)
OPTIONS = {"batch_size": 8, "seed": 3}


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def assert_equal(ours, theirs):
  assert len(ours) == len(theirs)
  for a, b in zip(ours, theirs, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def stream(data, **options):
  return pipelines.train_iterator(
    data.train, augment=data.augment, mix=data.mix, **OPTIONS | options
  )


def test_augmented_and_mixed_batches_are_a_function_of_the_seed_and_resume(folder):
  """27 images, 8 a batch: three batches are an epoch, and the fourth straddles two."""
  data = load(train_files=[str(folder)], view=view(8, ALL))
  whole = take(stream(data), 8)
  assert_equal(take(stream(data), 8), whole)
  iterator = stream(data)
  take(iterator, 3)
  state = json.loads(json.dumps(iterator.get_state()))
  resumed = stream(data)
  resumed.set_state(state)
  assert_equal(take(resumed, 5), whole[3:])
  assert_equal(take(stream(data, start=5), 3), whole[5:])
  rows = [5, 1]
  assert_equal(
    take(stream(data, rows=rows), 8), [{k: v[rows] for k, v in batch.items()} for batch in whole]
  )
  (other,) = take(stream(data, seed=4), 1)
  assert (other["image"] != whole[0]["image"]).any()
  shapes = {key: (value.shape, value.dtype.name) for key, value in whole[0].items()}
  assert shapes == {
    "image": ((8, 8, 8, 3), "float32"),
    "label": ((8,), "int32"),
    "other_label": ((8,), "int32"),
    "share": ((8,), "float32"),
    "weights": ((8,), "float32"),
  }
  for batch in whole:  # All rows draw alike.
    assert len(set(batch["share"])) == 1
    np.testing.assert_array_equal(batch["other_label"], batch["label"][::-1])


def test_evaluation_batches_are_filled_up_with_weights_of_nothing(folder):
  data = load(train_files=[str(folder)])
  (batch,) = pipelines.eval_batches(data.validation, 8)
  assert list(batch["weights"]) == [1] * 3 + [0] * 5


def test_a_mixed_sample_tells_both_labels():
  data = load("embedded/mnist5k")
  sample = data.validation[0] | {"label": np.int32(3), "other_label": np.int32(5)}
  assert data.show(sample | {"share": np.float32(0.75)}) == "8 x 8 pixels: 75% 3, 25% 5"
  assert data.show({"image": sample["image"]}) == "8 x 8 pixels"


@pytest.mark.slow
@pytest.mark.parametrize("source", ("folder", "tfds", "embedded"))
def test_workers_give_the_same_batches_and_resume(source, folder, prepared):
  given = {
    "folder": {"train_files": [str(folder)]},
    "tfds": {"name": "tiny_images", "data_dir": prepared},
    "embedded": {"name": "embedded/emoji"},
  }[source]
  data = load(**given, view=view(8, ALL))
  whole = take(stream(data), 9)
  iterator = stream(data, num_workers=2)
  assert_equal(take(iterator, 5), whole[:5])
  state = json.loads(json.dumps(iterator.get_state()))
  iterator.close()
  resumed = stream(data, num_workers=2)
  resumed.set_state(state)
  assert_equal(take(resumed, 4), whole[5:])
  resumed.close()


def test_a_view_of_ones_own_is_all_that_a_task_needs():
  class Mirrored:
    mix = None

    def training(self, sample, generator):
      return {"image": sample["image"][:, ::-1], "draw": generator.integers(9)}

    def evaluation(self, sample):
      return {"image": augmentation.normalize(sample["image"], "half")}

  data = load("embedded/emoji", view=Mirrored(), label_key="")
  sample = data.augment(data.train[0], np.random.default_rng(0))
  np.testing.assert_array_equal(sample["image"][:, ::-1], data.train[0]["image"])
  assert data.validation[0].keys() == {"image"} and data.mix is None
