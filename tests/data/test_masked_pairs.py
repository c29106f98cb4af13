"""Images, texts and pairs to restore: what a row is of, and what of it is hidden."""

import copy
import hashlib
import inspect
import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

from magneto_jax.config import DataConfig, tasks_reading
from magneto_jax.data import (
  caption_sources,
  captions,
  images,
  masked_pairs,
  packing,
  patch_masks,
  pipelines,
  text_files,
  tokenizers,
)
from tests import pieces
from tests.pictures import row, view, write

MASKS = patch_masks.PatchMasks((4, 4), 6, 2)


@pytest.fixture
def own(tmp_path):
  """(options) -> data of five training and three validation pairs, of four and two images."""
  files = {
    "train_files": write(
      tmp_path / "train.jsonl",
      [row(0, "the first", "number one"), row(1, "second one"), row(2, "third"), row(3, "fourth")],
    ),
    "validation_files": write(
      tmp_path / "validation.jsonl", [row(5, "of the fifth", "five"), row(6, "sixth one")]
    ),
  }

  def made(**options):
    given = {"view": view(), "masks": MASKS, "tokenizer": "byte", "seq_length": 16, **files}
    return masked_pairs.load_masked_pairs(
      workdir=tmp_path / "run", name="pairs_jsonl", **given | options
    )

  return made


def drawn(data, index, seed=0):
  return data.augment(data.train[index], np.random.default_rng(seed))


def test_a_row_has_what_the_composition_says(own):
  shapes = {
    "pair_image": (2, 8, 8, 3),
    "pair_masked": (2, 16),
    **dict.fromkeys(("pair_text", "pair_mask", "pair_targets"), (2, 16)),
    **dict.fromkeys(("pair_image_places", "pair_image_weights"), (2, 6)),
    **dict.fromkeys(("pair_text_places", "pair_text_weights"), (2, 8)),
    "image": (3, 8, 8, 3),
    "image_masked": (3, 16),
    **dict.fromkeys(("image_places", "image_weights"), (3, 6)),
    **dict.fromkeys(("text", "text_mask", "text_targets"), (1, 16)),
    **dict.fromkeys(("text_places", "text_weights"), (1, 2)),
  }
  kinds = {"masked": bool, "mask": bool, "image": np.float32, "weights": np.float32}
  for left_out in ((), ("pairs",), ("images",), ("texts",), ("pairs", "texts")):
    data = own(composition={"pairs": 2, "images": 3, "texts": 1} | dict.fromkeys(left_out, 0))
    names = {
      name
      for name in shapes
      if {"pair": "pairs", "imag": "images", "text": "texts"}[name[:4]] not in left_out
    }
    for sample in (drawn(data, 0), data.validation[0]):
      assert {name: sample[name].shape for name in sample} == {n: shapes[n] for n in names}
      for name, values in sample.items():
        assert values.dtype == kinds.get(name.split("_")[-1], np.int32), name
  with pytest.raises(ValueError, match="must have a pair, an image or a text"):
    own(composition=dict.fromkeys(("pairs", "images", "texts"), 0))


def test_an_epoch_has_everything_and_a_validation_has_it_once(own):
  composition = {"pairs": 1, "images": 2, "texts": 2}
  data = own(composition=composition)
  raw = [data.train[i] for i in range(len(data.train))]
  assert len(raw) == 5
  of = lambda name, key: [member[key] for sample in raw for member in sample[name]]
  assert {x.tobytes() for x in of("texts", "text")} == {x.tobytes() for x in of("pairs", "text")}
  assert len({x.tobytes() for x in of("pairs", "text")}) == 5
  assert len({x.tobytes() for x in of("images", "image")}) == 4
  # Each text comes as often as another.
  times = np.unique(np.stack(of("texts", "text")), axis=0, return_counts=True)[1]
  assert times.tolist() == [2] * 5
  rows = [data.validation[i] for i in range(len(data.validation))]
  assert len(rows) == 3
  assert sum(sample["pair_masked"].any() for sample in rows) == 3
  assert sum(sample["image_masked"].any(axis=1).sum() for sample in rows) == 2
  found = [ids for sample in rows for ids in restored(sample, "text")]
  assert sorted(map(data.tokenizer.decode, found))[-3:] == ["five", "of the fifth", "sixth one"]
  last = rows[-1]
  for name in last:
    if "pair" not in name:
      assert not last[name][1].any(), name
  assert last["pair_text_weights"].any() and len({*map(str, sorted(last))}) == len(last)


def restored(sample, prefix):
  """The whole texts of a row."""
  name = "pair_text" if prefix == "pair" else "text"
  return np.where(sample[f"{prefix}_targets"] > 0, sample[f"{prefix}_targets"], sample[name])


def test_images_and_texts_alone_are_not_those_of_the_rows_pair(own):
  """Else a row would be of one thing."""
  data = own()
  raw = [data.train[i] for i in range(5)]
  same = [(x["pairs"][0]["text"] == x["texts"][0]["text"]).all() for x in raw]
  assert sum(same) < 4
  assert [x["pairs"][0]["image_id"] for x in raw] == [0, 0, 1, 2, 3]


def test_a_small_part_begins_anew_in_another_order(own):
  """Each time with everything once; and a row is the same whenever it is read."""
  data = own(composition={"texts": 4})
  times = [[x["text"].tobytes() for x in data.train[i]["texts"]] for i in range(5)]
  assert times == [[x["text"].tobytes() for x in data.train[i]["texts"]] for i in range(5)]
  passes = np.reshape(times, (4, 5)).tolist()
  assert all(len({*once}) == 5 for once in passes)
  assert len({*map(tuple, passes)}) > 1


@pytest.mark.parametrize("rates", ((0.15, 0.5), (0.4, 0.9)))
def test_as_much_is_hidden_as_the_rates_say(own, rates):
  """In pairs and alone, and of a text what `TextMasks` says; everything else can be read."""
  alone, paired = rates
  data = own(text_mask_rate=alone, pair_text_mask_rate=paired, mask_keep=0.0, mask_random=0.0)
  count = lambda n, rate: min(max(math.floor(n * rate + 0.5), 1), n - 1)
  texts = {*data.pairs.train.texts}
  for index in range(5):
    raw, sample = data.train[index], drawn(data, index, index)
    assert sample["pair_masked"].sum() == sample["image_masked"].sum() == 6
    for prefix, rate in (("pair", paired), ("text", alone)):
      (ids,), (targets,) = restored(sample, prefix), sample[f"{prefix}_targets"]
      assert data.tokenizer.decode(ids) in texts
      hidden = np.count_nonzero(targets)
      assert hidden == count(sample[f"{prefix}_mask"].sum(), rate)
      read = sample["pair_text" if prefix == "pair" else "text"][0]
      assert ((read == 260) == (targets > 0)).all() and not targets[0]
    whole = data.augment.view.evaluation({"image": raw["pairs"][0]["image"]})["image"]
    np.testing.assert_array_equal(sample["pair_image"][0], whole)


@pytest.mark.parametrize("rates", ((0.15, 0.5), (0.4, 0.9)))
def test_places_are_those_of_what_is_hidden(own, rates):
  """In their order, each once, and filled up with zeros that have no weight."""
  data = own(composition={"pairs": 2}, text_mask_rate=rates[0], pair_text_mask_rate=rates[1])
  hidden = {"pair_image": "pair_masked", "image": "image_masked"}
  hidden |= {"pair_text": "pair_targets", "text": "text_targets"}
  for sample in [drawn(data, i, i) for i in range(3)] + [data.validation[1]]:
    for part, name in hidden.items():
      for places, weights, values in zip(
        sample[f"{part}_places"], sample[f"{part}_weights"], sample[name], strict=True
      ):
        found = np.flatnonzero(values)
        assert places.tolist() == [*found, *[0] * (len(places) - len(found))], part
        assert weights.tolist() == [1.0] * len(found) + [0.0] * (len(places) - len(found))


def test_masks_are_anew_in_training_and_fixed_in_validation(own):
  data = own(view=view(crop_scale=0.3, flip=0.5), composition={"pairs": 4})
  same = lambda a, b: all((a[name] == b[name]).all() for name in a)
  assert same(data.validation[0], data.validation[0]) and same(drawn(data, 1), drawn(data, 1))
  first, second = drawn(data, 1, 1), drawn(data, 1, 2)
  for name in ("pair_masked", "pair_text", "pair_image", "image_masked", "image"):
    assert (first[name] != second[name]).any(), name
  plain = own(view=view(), composition={"pairs": 4})
  assert same(plain.validation[0], data.validation[0])
  masks = {x.tobytes() for x in first["pair_masked"]}
  assert len(masks) > 2, "each image has a mask of its own"


def test_texts_and_images_alone_may_be_of_other_sources(own, tmp_path):
  (tmp_path / "words.txt").write_text("Ünd so weiter, und so fort. " * 40)
  folder = tmp_path / "photos" / "any"
  folder.mkdir(parents=True)
  for shade in range(8):
    Image.new("RGB", (9, 7), (shade, 200, 100)).save(folder / f"{shade}.png")
  options = {
    "text_source": "text_files",
    "text_source_files": [str(tmp_path / "words.txt")],
    "image_source": "image_folder",
    "image_source_files": [str(tmp_path / "photos")],
    "validation_fraction": 0.25,
  }
  data = own(**options)
  assert {name: len(part) for name, part in data.train.parts.items()} == {
    "pairs": 5,
    "images": 6,
    "texts": len(data.train),
  }
  assert len(data.validation.samples.parts["images"]) == 2
  texts = [data.tokenizer.decode(data.train[i]["texts"][0]["text"]) for i in range(len(data.train))]
  assert sum(map(len, texts)) > 600 and texts[0] in "Ünd so weiter, und so fort. " * 3
  assert data.train[3]["images"][0]["image"][0, 0].tolist()[1:] == [200, 100]
  assert len(data.train.parts["texts"].tokens) > 500
  before = json.loads(json.dumps(data.identity))
  assert own(**options, expected=before).identity == before
  Image.new("RGB", (9, 7), (77, 200, 100)).save(folder / "9.png")
  with pytest.raises(ValueError, match="the (train|validation) images alone are not those that th"):
    own(**options, expected=before)
  (folder / "9.png").unlink()
  (tmp_path / "words.txt").write_text("Und so weiter, und so fort. " * 40)
  with pytest.raises(ValueError, match="the train texts alone are not those that this run was st"):
    own(**options, expected=before)
  with pytest.raises(ValueError, match="the train texts alone are not those"):
    own(expected=before)
  before.pop("validation")
  (tmp_path / "words.txt").write_text("Ünd so weiter, und so fort. " * 40)
  files = write(tmp_path / "other.jsonl", [row(8, "eighth")])
  assert own(**options, expected=before, validation_files=files).pairs.rows.texts == ("eighth",)


def test_a_window_is_of_one_document_and_the_shortest_makes_one(tmp_path):
  """Of each the windows together are the document, once, in pieces that differ by one at most."""
  texts = ["a", "bc", "d" * 14, "e" * 15, "f" * 29, "g" * 31, "h" * 100]
  for part in ("train", "validation"):
    (tmp_path / f"{part}.txt").write_text("\n\n".join(texts))
  stream = packing.tokenize(
    text_files.text_files(
      train_files=[str(tmp_path / "train.txt")],
      validation_files=[str(tmp_path / "validation.txt")],
      document_separator="\n\n",
    )[0],
    tokenizers.ByteTokenizer(),
    tmp_path / "cache",
  )
  windows = masked_pairs.TextWindows(stream, 16, tokenizers.ByteTokenizer())
  bos, eos = tokenizers.BOS_ID, tokenizers.EOS_ID
  found = []
  for i in range(len(windows)):
    ids, mask = windows[i]["text"], windows[i]["mask"]
    length = np.count_nonzero(mask)
    assert len(ids) == 16 and mask[:length].all() and not ids[length:].any() and ids[0] == bos
    found.append(ids[1:length].tolist())
  ids_of = lambda words: tokenizers.ByteTokenizer().encode(words).tolist()
  expected = iter(found)
  for words in texts:
    whole = [*ids_of(words), eos]
    pieces = [next(expected) for _ in range(-(-len(whole) // 15))]
    assert sum(pieces, []) == whole
    lengths = {len(piece) for piece in pieces}
    assert max(lengths) - min(lengths) <= 1
  assert next(expected, None) is None
  # Workers are sent the name of the file, not what is in it.
  again = copy.copy(windows)
  assert not isinstance(windows.__getstate__()["tokens"], np.ndarray)
  assert (again[3]["text"] == windows[3]["text"]).all()
  with pytest.raises(IndexError, match=f"window {len(windows)} of {len(windows)}"):
    windows[len(windows)]


def test_a_text_source_of_a_few_words_can_be_read(own, tmp_path):
  (tmp_path / "words.txt").write_text("few words")
  data = own(text_source="text_files", text_source_files=[str(tmp_path / "words.txt")])
  assert len(data.train.parts["texts"]) == 1 and drawn(data, 4)["text_mask"].sum() == 10


def test_validation_pairs_among_images_and_texts_alone_are_told(own, tmp_path, monkeypatch):
  """By an image's bytes and by whole lines; where neither is known, that is told."""
  (tmp_path / "words.txt").write_text("five\nof  the fifth \nnot the sixth one\n" + "end\n" * 20)
  folder = tmp_path / "photos"
  folder.mkdir()
  own()
  for name in range(4, 7):
    shutil.copy(tmp_path / f"{name}.png", folder / f"copy_{name}.png")
  others = {
    "text_source": "text_files",
    "text_source_files": [str(tmp_path / "words.txt")],
    "image_source": "image_folder",
    "image_source_files": [str(folder)],
    "validation_fraction": 0.3,
  }
  data = own(**others)
  digest = lambda i: hashlib.sha256((tmp_path / f"{i}.png").read_bytes()).hexdigest()
  held_out = min(range(4, 7), key=digest)
  met = len({5, 6} - {held_out})
  assert data.leaked == {"texts": 2, "images": met}
  assert data.describe().endswith(
    f"; 2 of the validation texts of pairs are among the texts alone; {met} of the validation"
    " images of pairs are among the images alone"
  )
  monkeypatch.setattr(masked_pairs, "_COMPARED", 0)
  unknown = own(**others)
  assert unknown.leaked["texts"] is None
  assert "whether validation texts of pairs are among the texts alone is not known" in (
    unknown.describe()
  )
  assert own().leaked == {} and "alone" not in own().describe()


@pytest.mark.parametrize("composition", [{"pairs": 2}, {"pairs": 0, "texts": 3}, {"texts": 0}])
def test_frequencies_are_those_of_what_is_read(composition, own, tmp_path):
  """Counted in rows as they are drawn, texts alone being of another source."""
  (tmp_path / "words.txt").write_text("and so on. " * 40)
  data = own(
    composition=composition,
    tokenizer="char",
    text_mask_rate=0.375,
    # Of these texts 20 of 50 tokens.
    pair_text_mask_rate=0.4,
    text_source="text_files",
    text_source_files=[str(tmp_path / "words.txt")],
    mask_random=0.3,
  )
  size, rng = data.tokenizer.vocab_size + 1, np.random.default_rng(0)
  counts = np.zeros(size)
  masks = {"pairs": data.augment.pair_texts, "texts": data.augment.texts}
  for index in range(len(data.train)):
    members = [(masks[n], x) for n, xs in data.train[index].items() if n in masks for x in xs]
    for own_masks, member in members * (4000 // len(data.train) // len(members)):
      counts += np.bincount(own_masks.draw(member["text"], member["mask"], rng)[0], minlength=size)
  counts[tokenizers.PAD_ID] = 0
  found = data.frequencies()
  assert found.sum() == pytest.approx(1) and found[-1] > 0.1
  np.testing.assert_allclose(found, counts / counts.sum(), rtol=0, atol=0.012)


def test_without_texts_nothing_is_read(own):
  assert not own(composition={"pairs": 0, "texts": 0}).frequencies().any()


def test_what_no_row_has_is_not_read(own, tmp_path):
  """Neither sources that are not there, nor the pairs where images and texts are of others."""
  (tmp_path / "words.txt").write_text("@ and so on. " * 40)
  texts = {"text_source": "text_files", "text_source_files": [str(tmp_path / "words.txt")]}
  pictures, absent = {"image_source": "embedded/mnist5k"}, {"train_files": ["nowhere.jsonl"]}
  alone = own(composition={"pairs": 0}, tokenizer="char", **texts, **pictures, **absent)
  assert {name: len(part) for name, part in alone.train.parts.items()} == {
    "images": 4000,
    "texts": len(alone.train.parts["texts"]),
  }
  assert drawn(alone, 0).keys() == alone.validation[0].keys() and "pair_text" not in drawn(alone, 0)
  assert {*alone.tokenizer.characters} == {*"@ andso."} and "alone" not in alone.describe()
  before = json.loads(json.dumps(alone.identity))
  options = {"composition": {"pairs": 0}, "tokenizer": "char", **texts, **pictures, **absent}
  assert own(**options, expected=before).identity == before
  assert own(composition={"pairs": 0, "images": 0}, **texts, **absent).train.counts == {"texts": 1}
  # Each of these is read of the pairs: images, texts, or what a tokenizer is trained on.
  for others in (pictures, texts, pictures | texts | {"composition": {"pairs": 0, "texts": 0}}):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
      own(**{"composition": {"pairs": 0}} | others, **absent)
  absent = {"image_source": "nothing", "text_source": "nothing"}
  assert own(composition={"images": 0, "texts": 0}, **absent).leaked == {}


def test_one_tokenizer_is_of_pairs_and_texts(own, tmp_path):
  (tmp_path / "words.txt").write_text("@ and so on. " * 40)
  options = {"text_source": "text_files", "text_source_files": [str(tmp_path / "words.txt")]}
  data = own(tokenizer="char", **options)
  assert {*"@efh"} < {*data.tokenizer.characters}


def test_marks_are_those_of_the_tokenizer(own, tmp_path):
  """XLM-R's, of pairs and of windows of texts."""
  (tmp_path / "words.txt").write_text("the face of a dog. " * 40)
  options = {"text_source": "text_files", "text_source_files": [str(tmp_path / "words.txt")]}
  spm = str(pieces.train(tmp_path / "released.spm"))
  data = own(tokenizer="xlmr", tokenizer_file=spm, **options)
  for part in ("pairs", "texts"):
    rows = [row for i in range(len(data.train)) for row in data.train[i][part]]
    assert all(row["text"][0] == 0 for row in rows)
    marks = np.concatenate([row["text"][~row["mask"]] for row in rows])
    assert set(marks.tolist()) <= {1} and len(marks) + (part == "texts") > 0
  assert data.augment.texts.mask_id == data.tokenizer.vocab_size


def test_a_run_goes_on_and_hosts_read_their_rows(own):
  data = own(view=view(crop_scale=0.5))

  def feed(**options):
    return pipelines.train_iterator(
      data.train, batch_size=2, seed=1, augment=data.augment, **options
    )

  def same(got, expected, rows=(0, 1)):
    for name in expected:
      np.testing.assert_array_equal(got[name], expected[name][list(rows)])

  whole = feed()
  batches = [next(whole) for _ in range(4)]
  part = feed(rows=[1])
  for batch in batches:
    same(next(part), batch, [1])
  iterator = feed()
  next(iterator)
  resumed = feed()
  resumed.set_state(json.loads(json.dumps(iterator.get_state())))
  same(next(resumed), batches[1])
  (first, second) = pipelines.eval_batches(data.validation, 2)
  assert first["pair_text_weights"].any(axis=(1, 2)).all()
  assert second["pair_text_weights"].any(axis=(1, 2)).tolist() == [True, False]


def test_the_data_say_what_they_are(own, tmp_path):
  data = own(composition={"pairs": 2, "texts": 0})
  assert data.describe().startswith(
    "4 training rows (5 pairs, 4 images) and 2 validation rows (3 pairs, 2 images), 2 pairs,"
    " 1 image a row, 260 in the vocabulary"
  )
  assert "pair_text '" in data.show(data.validation[0])
  assert own(composition={"pairs": 0, "texts": 0}).show(drawn(own(), 0)).startswith("pair_text")
  with pytest.raises(IndexError, match="row 4 of 4"):
    data.train[4]
  with pytest.raises(ValueError, match="line 1: its text has 10 tokens, more than the 9 between"):
    own(seq_length=11)


def test_a_config_has_what_is_read_and_nothing_else():
  read = {
    name: field.default
    for name, field in DataConfig.__dataclass_fields__.items()
    if "masked_data" in (tasks_reading(f"data.{name}") or ("masked_data",))
  }
  parameters = inspect.signature(masked_pairs.load_masked_pairs).parameters.values()
  given = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
  given |= caption_sources.Options._field_defaults | captions.Tokens._field_defaults
  of_view = {"normalization", "eval_crop", "augment"} | {"mask_rate", "mask_block"}
  assert read.keys() - of_view - {"workers", "prefetch"} == given.keys() - {
    *("workdir", "expected", "view", "masks")
  }
  different = {name for name in read.keys() & given.keys() if read[name] != given[name]}
  files = {name for name in read if name.endswith("_files")}
  assert different == {"name", "seq_length", "composition", *files}
  composition = DataConfig().composition
  assert masked_pairs.Composition(**vars(composition)) == masked_pairs.Composition()


def test_the_embedded_emoji_can_be_restored(tmp_path):
  data = masked_pairs.load_masked_pairs(
    workdir=tmp_path,
    view=view(32),
    masks=patch_masks.PatchMasks((8, 8), 26, 4),
    tokenizer="byte",
    image_source="embedded/mnist5k",
  )
  assert "4,000 training rows (1,265 pairs, 4,000 images, 1,265 texts)" in data.describe()
  sample = data.validation[499]
  assert sample["image"].shape == (1, 32, 32, 3) and sample["image_masked"].sum() == 26
  assert not sample["pair_masked"].any() and not sample["text_mask"].any()
  assert isinstance(data.train.parts["images"], images.Images)
  assert data.leaked == {"images": 0}
