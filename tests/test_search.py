"""The command that searches images and texts: what it finds, tells, leaves out and refuses."""

import json
import os
import types

import numpy as np
import pytest
from PIL import Image

from magneto_jax import search
from magneto_jax.config import ConfigError

COLOURS = {"red": (250, 10, 0), "green": (0, 240, 20), "blue": (5, 0, 230), "purple": (200, 0, 210)}


class ByColour:
  """Features that are the mean colour of an image, or the one that a text names."""

  def __init__(self):
    self.read = 0

  def images(self, images):
    found = [self._unit(image.reshape(-1, 3).mean(0)) for image in images]
    self.read += len(found)
    return np.array(found, np.float32).reshape(-1, 3)

  def texts(self, texts, places=()):
    for text, place in zip(texts, places or texts, strict=True):
      if len(text) > 20:
        raise ValueError(f"{place} has 21 tokens, and the model reads 20: make it shorter")
    named = [next(c for name, c in COLOURS.items() if name in text) for text in texts]
    return np.array([self._unit(np.array(c, float)) for c in named], np.float32)

  def _unit(self, colour):
    return colour / np.linalg.norm(colour)


class Args(types.SimpleNamespace):
  """Flags, as absl has them."""

  def __getitem__(self, name):
    return types.SimpleNamespace(value=getattr(self, name))


@pytest.fixture
def folder(tmp_path):
  """Images at several depths, one of them broken, beside what is none."""
  root = tmp_path / "images"
  places = {"red": "a.png", "green": "deep/er/b.JPG", "blue": "deep/c.gif", "purple": "d.webp"}
  for name, place in places.items():
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (300, 40), COLOURS[name]).save(root / place)
  (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
  (root / "notes.txt").write_text("no image")
  (root / ".hidden.png").write_bytes(b"")
  return root


@pytest.fixture
def searched(monkeypatch):
  """Runs a search by colours: flags and texts -> what is found."""

  def run(asked, /, **flags):
    monkeypatch.setattr(search, "open_embedder", lambda *args: ByColour())
    given = {"images": "", "texts": "", "image": [], "top": 5, "batch_size": 2}
    given |= {"output": "", "picture": "", "workdir": "run", "step": None}
    return search.run(Args(**given | flags), asked, lambda: None)

  return run


def test_texts_and_examples_find_the_nearest_images(folder, searched, capsys, tmp_path):
  """The cosines of both, largest first; broken files are told by name, and others are no images."""
  output, picture = tmp_path / "found.json", tmp_path / "found.png"
  example = folder / "deep" / "c.gif"
  found = searched(
    ["something red"],
    images=str(folder),
    image=[str(example)],
    top=2,
    output=str(output),
    picture=str(picture),
  )
  by_text, by_image = found
  assert by_text["query"] == {"kind": "text", "given": "something red"}
  assert [x["image"] for x in by_text["results"]] == ["a.png", "d.webp"]
  assert by_text["results"][0]["score"] == pytest.approx(1, abs=1e-4)
  red, purple = (np.array(COLOURS[name], float) for name in ("red", "purple"))
  cosine = red @ purple / np.linalg.norm(red) / np.linalg.norm(purple)
  assert by_text["results"][1]["score"] == pytest.approx(cosine, abs=5e-3)  # As WebP has it.
  assert [x["image"] for x in by_image["results"]] == ["deep/c.gif", "d.webp"]
  assert by_image["results"][0]["place"] == str(example)
  told = capsys.readouterr()
  assert told.err.count("\n") == 1 and "warning: left out" in told.err
  assert "broken.png" in told.err and "notes" not in told.err
  lines = told.out.splitlines()
  assert [lines[0], lines[3]] == ["something red", str(example)]
  assert lines[1].split() == ["1.0000", "a.png"]
  assert json.loads(output.read_text())["found"] == found
  with Image.open(picture) as drawn:
    assert drawn.format == "PNG" and drawn.width > 300


def test_names_of_files_are_whatever_bytes_they_are(folder, searched, tmp_path, capfdbinary):
  """Found and searched by, printed as they are, and in JSON and in the picture."""
  name = os.fsdecode(b"\xff.png")
  os.rename(folder / "a.png", folder / name)
  output, picture = tmp_path / "found.json", tmp_path / "found.png"
  asked = {"images": str(folder), "image": [str(folder / name)], "top": 1}
  (found,) = searched([], output=str(output), picture=str(picture), **asked)
  assert [x["image"] for x in found["results"]] == [name]
  query, result = capfdbinary.readouterr().out.splitlines()
  assert query.endswith(b"/\xff.png") and result.split() == [b"1.0000", b"\xff.png"]
  assert json.loads(output.read_text())["found"] == [found] and picture.exists()


def test_an_image_finds_texts_of_a_file(folder, searched, tmp_path, capsys):
  lines = tmp_path / "texts.txt"
  lines.write_text("\ufeffa green one\n\n  red things \r\nblue\n", encoding="utf-8")
  (found,) = searched([], texts=str(lines), image=[str(folder / "a.png")], top=2)
  assert [x["text"] for x in found["results"]] == ["red things", "a green one"]
  assert [x["place"] for x in found["results"]] == [3, 1]
  assert capsys.readouterr().err == ""


def test_equal_scores_keep_their_order():
  features = np.array([[1, 0], [0, 1], [1, 0], [1, 0]], np.float32)
  items = search.Items("texts", list("abcd"), [1, 2, 3, 4], features)
  assert [x.item for x in items.nearest(np.array([1, 0], np.float32), 3)] == ["a", "c", "d"]


@pytest.mark.parametrize(
  ("asked", "flags", "message"),
  [
    (["x"], {}, "give --images=FOLDER or --texts=FILE, one of the two"),
    (["x"], {"images": "F", "texts": "T"}, "give --images=FOLDER or --texts=FILE, one of the"),
    ([], {"images": "F"}, "give what to search for"),
    (["red"], {"texts": "T"}, "is searched by --image=FILE, as texts are not learned"),
    ([" "], {"images": "F"}, "a text to search for is empty"),
    (["\udcff"], {"images": "F"}, "is not valid text"),
    (["red"], {"images": "nowhere"}, "--images=nowhere is no folder that is there"),
    (["red"], {"images": "F", "output": "."}, "--output=. is a folder: name a file"),
    (["red"], {"images": "F", "output": "no/x"}, "--output=no/x: there is no folder no: make it"),
    (["red"], {"images": "F", "picture": "no/x"}, "--picture=no/x: there is no folder no: make"),
    (["red"], {"images": "F", "image": ["none.png"]}, "none.png: there is no such file"),
    (["red"], {"images": "F", "image": ["."]}, ". is a folder: name a file"),
    (["red"], {"images": "F", "image": ["F/broken.png"]}, "broken.png cannot be read"),
    (["red " * 9], {"images": "F"}, "has 21 tokens, and the model reads 20: make it shorter"),
    ([], {"texts": "nowhere", "image": ["F/a.png"]}, "--texts=nowhere is no file that is there"),
    ([], {"texts": "T", "image": ["F/a.png"]}, "T:2 is not UTF-8"),
  ],
)
def test_what_cannot_be_searched_is_told_in_a_line(
  asked, flags, message, folder, searched, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  folder.rename("F")
  (tmp_path / "T").write_bytes(b"red\n\xff\n")
  with pytest.raises(ConfigError, match=message) as error:
    searched(asked, **flags)
  assert "\n" not in str(error.value)


def test_a_folder_without_a_good_image_is_told(tmp_path, searched, capsys):
  (tmp_path / "bad.png").write_bytes(b"none")
  with pytest.raises(ConfigError, match=r"holds no image \(\.jpg, .*\), and 1 that cannot be read"):
    searched(["red"], images=str(tmp_path))
  assert "bad.png" in capsys.readouterr().err


def test_a_line_of_a_file_that_is_too_long_is_named(tmp_path, folder, searched):
  lines = tmp_path / "texts.txt"
  lines.write_text("red\n" + "green " * 9)
  with pytest.raises(ConfigError, match=r"texts.txt:2 has 21 tokens"):
    searched([], texts=str(lines), image=[str(folder / "a.png")])
