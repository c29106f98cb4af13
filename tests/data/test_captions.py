"""Images with texts: whatever they are read of, what becomes of bad ones, and what is hidden."""

import collections
import csv
import dataclasses
import hashlib
import inspect
import io
import json
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from configs import beit3
from magneto_jax.config import DataConfig, from_config_dict, tasks_reading
from magneto_jax.data import caption_sources, captions, documents, images, masking, pipelines
from tests import pieces
from tests.pictures import png, row, view, write

FOLDER = pathlib.Path(images.__file__).parent / "embedded" / "emoji"


def load(folder, name="pairs_jsonl", **options):
  given = {"view": view(), "tokenizer": "byte"} | options
  return captions.load_captions(workdir=folder / "run", name=name, **given)


@pytest.fixture
def own(tmp_path):
  """(training rows, validation rows, options) -> data of files in `tmp_path`."""

  def made(train, validation=(), **options):
    files = {"train_files": write(tmp_path / "train.jsonl", train)}
    if validation:
      files["validation_files"] = write(tmp_path / "validation.jsonl", validation)
    return load(tmp_path, **files | options)

  return made


@pytest.fixture(scope="module")
def table():
  with open(FOLDER / "emoji.tsv", encoding="utf-8") as file:
    return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


# ---------------------------------------------------------------------------------------------
# Emoji
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("languages", ("en", "de", "en+de"))
@pytest.mark.parametrize("keywords", (False, True))
def test_emoji_have_the_texts_of_the_table(languages, keywords, table, tmp_path):
  data = load(tmp_path, f"embedded/emoji/{languages}", keywords=keywords, seq_length=128)
  for rows, split in ((data.train, "train"), (data.rows, "validation")):
    own = [line for line in table if line["split"] == split]
    expected = []
    for number, line in enumerate(own):
      for language in languages.split("+"):
        name = line[f"name_{language}"]
        others = [x for x in line[f"keywords_{language}"].split(" | ") if x != name]
        expected += [(number, text) for text in (name, ", ".join(others) if keywords else "")]
    assert [*zip(rows.image_of, rows.texts, strict=True)] == [x for x in expected if x[1]]
    pixels = images.embedded("embedded/emoji", split)
    assert all((rows.pictures[i]["image"] == pixels[i]["image"]).all() for i in (0, 50, 156))
  first = next(line for line in table if line["split"] == "validation")
  assert len(data.keywords) == 157 and len(data.keywords[0]) == len(languages.split("+"))
  words = data.keywords[0][0]
  assert all(
    part in words
    for language in languages[:2].split("+")
    for part in first[f"keywords_{language}"].split(" | ")
  )


def test_emoji_of_no_split_are_refused():
  assert len(caption_sources.emoji_table("test")) == 157
  with pytest.raises(ValueError, match="split='valid' is not one of train, validation, test"):
    caption_sources.emoji_table("valid")


def test_a_sample_is_an_image_and_its_text_between_marks(tmp_path):
  data = load(tmp_path, "embedded/emoji/en", view=view(32), seq_length=42)
  assert data.describe() == (
    "1,265 training texts of 1,265 images and 157 validation texts of 157 images, 260 in the"
    " vocabulary; 2 validation texts have characters that no training text has"
  )
  for index in (0, 50, 156):
    sample = data.validation[index]
    length = np.count_nonzero(sample["mask"])
    assert (sample["text"][0], sample["text"][length - 1]) == (1, 2)
    assert sample["mask"][:length].all() and not sample["text"][length:].any()
    assert data.tokenizer.decode(sample["text"]) == data.rows.texts[index]
    assert sample["image_id"] == index and sample["weights"] == 1
    pixels = images.embedded("embedded/emoji", "validation")[index]["image"]
    np.testing.assert_allclose(sample["image"], pixels / 127.5 - 1, atol=1e-6)
  assert data.show(sample) == f"32 x 32 pixels: {data.rows.texts[156]!r}"
  (batch,) = list(pipelines.eval_batches(data.validation, 200))
  assert batch["weights"].sum() == 157 and not batch["mask"][157:].any()
  assert data.references() == [[text] for text in data.rows.texts]


def test_another_split_or_language_can_be_evaluated_on(tmp_path):
  test = load(tmp_path, "embedded/emoji/en", validation_split="test")
  german = load(tmp_path, "embedded/emoji/en", validation_split="embedded/emoji/de/test")
  assert "monkey face" in test.rows.texts or len(test.rows) == 157
  assert test.train.texts == german.train.texts and test.rows.texts != german.rows.texts
  for options, message in (
    ({"validation_split": "tset"}, "embedded/emoji has no split 'tset'; it has train, validation"),
    ({"validation_split": "train"}, "training and validation data are the same"),
    ({"name": "embedded/emoji/fr"}, "with texts are embedded/emoji/en, embedded/emoji/de, embedd"),
    ({"name": "pairs_json"}, "nearest names: .*pairs_jsonl"),
  ):
    with pytest.raises(ValueError, match=message) as error:
      load(tmp_path, **{"name": "embedded/emoji/en"} | options)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------
# Files of one's own
# ---------------------------------------------------------------------------------------------


def test_an_image_may_have_several_texts_and_names(own, tmp_path):
  """Images are known by their bytes: two files that are equal are one image."""
  (tmp_path / "copy.png").write_bytes(png(0))
  data = own(
    [row(0, "a cat", "a  black cat "), row(1, "a dog"), row("copy", "my cat")],
    [row(2, "cafe\u0301"), row(1, "a hund"), row(2, "café")],
  )
  assert data.train.texts == ("a cat", "a black cat", "a dog", "my cat")
  assert data.train.image_of.tolist() == [0, 0, 1, 0] and len(data.train.pictures) == 2
  assert data.rows.texts == ("café", "a hund", "café")
  assert data.rows.image_of.tolist() == [0, 1, 0]
  assert data.references() == [["café", "café"], ["a hund"]]
  assert data.keywords == (("café", "café"), ("a hund",)) and data.shared == 1
  assert "4 training texts of 2 images and 3 validation texts of 2 images" in data.describe()
  assert "1 of the validation images are training images too" in data.describe()
  assert data.rows.first_rows().tolist() == [0, 1]


def test_without_other_files_images_are_held_out_by_their_bytes(own, tmp_path):
  rows = [row(i % 10, f"text {i}") for i in range(40)]
  digest = lambda i: int(hashlib.sha256((tmp_path / f"{i}.png").read_bytes()).hexdigest(), 16)
  numbers = lambda texts: {int(text.split()[1]) % 10 for text in texts}
  for fraction in (0.3, 0.6):
    data = own(rows, validation_fraction=fraction)
    assert sorted(data.train.texts + data.rows.texts) == sorted(x["text"] for x in rows)
    out = {i for i in range(10) if digest(i) / 2**256 < fraction}
    assert 0 < len(out) < 10
    assert numbers(data.rows.texts) == out and not numbers(data.train.texts) & out
    # Whatever else a file holds.
    part = own(rows[3:9], validation_fraction=fraction)
    assert numbers(part.rows.texts) == out & {*range(3, 9)} != out
  # A part that would be empty has one image.
  for fraction, held in ((1e-9, 1), (1 - 1e-9, 9)):
    assert len(own(rows, validation_fraction=fraction).rows.pictures) == held


def test_validation_texts_that_are_training_texts_are_told(own):
  """Counted as often as they come, also where their spaces differ."""
  others = [row(1, "a  cat"), row(2, "a cat", "a cow"), row(3, "A dog")]
  data = own([row(0, "a cat", "a dog")], others)
  assert data.repeated == 2
  assert data.describe().endswith("; 2 of the validation texts are training texts too")
  assert "texts are" not in own([row(0, "a cat")], [row(1, "a cow")]).describe()


@pytest.mark.parametrize("split, repeated", [("validation", 37), ("test", 44)])
def test_of_the_emoji_lists_of_keywords_are_met_again_and_no_names(split, repeated, tmp_path):
  """As docs/vision_language.md has it."""
  name = "embedded/emoji/en+de"
  options = {"seq_length": 400, "validation_split": split}
  data = load(tmp_path, name, keywords=True, **options)
  assert (data.repeated, len(data.rows)) == (repeated, 618)
  assert load(tmp_path, name, **options).repeated == 0


LINES = {
  "no text": (b'{"image": "0.png"}', "it has no 'text', only 'image'"),
  "no image": (b'{"text": "a", "id": 3}', "it has no 'image', only 'text', 'id'"),
  "an empty text": (b'{"image": "0.png", "text": " "}', "its text is empty"),
  "an empty text of two": (b'{"image": "0.png", "text": ["a", ""]}', "its text is empty"),
  "no texts": (b'{"image": "0.png", "text": []}', "its text is an empty list"),
  "a number": (b'{"image": "0.png", "text": 5}', "its text is 5, not a text"),
  "an image that is none": (b'{"image": ["0.png"], "text": "a"}', "is \\['0.png'\\], not the path"),
  "a missing image": (b'{"image": "x.png", "text": "a"}', "x.png: it is missing, a link to noth"),
  "a broken image": (b'{"image": "broken.png", "text": "a"}', "broken.png: OSError: image file is"),
  "an id of another": (
    b'{"image": "0.png", "text": "a", "id": "7"}',
    "its id '7' is that of .*: li",
  ),
  "an odd id": (b'{"image": "0.png", "text": "a", "id": [7]}', "its id is \\[7\\], neither a text"),
  "no object": (b'["0.png", "a"]', "is not a JSON object"),
  "no JSON": (b"0.png\ta", "not JSON"),
  "nothing": (b"", "the line is empty"),
  "no UTF-8": (b'{"image": "0.png", "text": "\xe4"}', "not UTF-8: its byte 28 is 0xe4"),
  "half a character": (b'{"image": "0.png", "text": "\\ud800"}', "half a character"),
}


@pytest.mark.parametrize("kind", LINES)
def test_a_bad_line_is_named_or_left_out(kind, own, tmp_path):
  line, message = LINES[kind]
  (tmp_path / "broken.png").write_bytes(png(3)[:-30])
  rows = [row(1, "a", id=7), line, row(2, "b", id="eight")]
  where = f"^{tmp_path}/train.jsonl: line 2 cannot be read .*"
  with pytest.raises(ValueError, match=where + message) as error:
    own(rows, [row(3, "c")])
  assert "\n" not in str(error.value)
  data = own(rows, [row(3, "c")], skip_bad=1)
  assert data.train.texts == ("a", "b") and len(data.bad_records) == 1
  assert data.identity["left_out"] == 1
  with pytest.raises(ValueError, match="line [23] cannot be read .*; 1 others were left out"):
    own([*rows[:2], row(2, " ")], [row(3, "c")], skip_bad=1)


def test_ids_are_of_one_line_of_all_parts(own):
  with pytest.raises(
    ValueError, match="validation.jsonl: line 1 .*its id '7' is that of .*train.j"
  ):
    own([row(1, "a", id=7)], [row(2, "b", id=7)])


def test_keys_that_are_not_read_are_told(own, caplog):
  own([row(1, "a", caption="b"), row(2, "c", caption="d", licence="CC0")], [row(3, "e")])
  assert (
    "keys that are not read: 'caption' (2 lines), 'licence' (1 lines); those that are: ima"
    in (caplog.text)
  )


def test_files_that_cannot_be_learned_from_are_refused(own, tmp_path):
  for text in (b"", b"\n \n"):
    (tmp_path / "empty.jsonl").write_bytes(text)
    with pytest.raises(ValueError, match="empty.jsonl is empty: remove it"):
      load(tmp_path, train_files=[str(tmp_path / "empty.jsonl")])
  with pytest.raises(FileNotFoundError, match="train_files: no file matches"):
    load(tmp_path, train_files=[str(tmp_path / "x*.jsonl")])
  with pytest.raises(ValueError, match="train_files is empty"):
    load(tmp_path)
  with pytest.raises(ValueError, match="the files have no validation line that is left: name more"):
    own([row(1, "a"), row(1, "b")])


def test_data_that_have_changed_are_refused(own, tmp_path):
  """Those of the run may lie elsewhere; an evaluation may be of others."""
  train, validation = [row(i, f"text {i}") for i in range(5)], [row(7, "seven")]
  before = json.loads(json.dumps(own(train, validation).identity))
  shutil.move(tmp_path, tmp_path.parent / "moved")
  assert own(train, validation, expected=before).identity == before
  for rows, part in (([*train[:4], row(4, "other")], "train"), (train[::-1], "train")):
    with pytest.raises(ValueError, match=f"the {part} data are not those that this run was start"):
      own(rows, validation, expected=before)
  with pytest.raises(ValueError, match="the validation data are not those"):
    own(train, [row(8, "seven")], expected=before)
  before.pop("validation")
  assert own(train, [row(8, "eight")], expected=before).rows.texts == ("eight",)


@pytest.mark.parametrize("which", ("refuse", "skip", "truncate"))
def test_a_text_over_the_limit(which, own, tmp_path):
  rows = [row(0, "abcd"), row(1, "abcde"), row(2, "abcdefg")]
  options = {"seq_length": 6, "too_long": which}
  if which == "refuse":
    message = f"^{tmp_path}/train.jsonl: line 2: its text has 5 tokens, more than the 4 between .*"
    message += "=6, as 2 of 3 texts do: set data.seq_length to at least 9, or data.too_long to skip"
    with pytest.raises(ValueError, match=message):
      own(rows, [row(3, "a")], **options)
    return
  data = own(rows, [row(3, "a")], **options)
  read = [data.tokenizer.decode(data.train[i]["text"]) for i in range(len(data.train))]
  assert read == ["abcd"] * (1 if which == "skip" else 3)
  assert (data.train[len(read) - 1]["text"] == [1, *(4 + np.array([*b"abcd"])), 2]).all()
  assert data.too_long == (2, 0)
  assert (
    f"2 texts are too long and are {'skipped' if which == 'skip' else 'cut'}" in data.describe()
  )
  if which == "skip":
    with pytest.raises(ValueError, match="all validation texts have more than 4 tokens"):
      own(rows, [row(3, "abcdef")], **options)


@pytest.mark.parametrize("tokenizer", ("byte", "char", "sentencepiece"))
def test_a_validation_text_in_another_script_is_told(tokenizer, own, caplog, tmp_path):
  train = [row(i % 10, f"some text of number {i} {'abcdefghijklm'[i % 13]}") for i in range(60)]
  validation = [row(1, "some text"), row(2, "некий текст"), row(3, "some нет")]
  data = own(train, validation, tokenizer=tokenizer, vocab_size=300, seq_length=64)
  assert data.unknown == 2 and "2 validation texts have characters that no t" in data.describe()
  assert "'е'" in caplog.text and f"first {tmp_path}/validation.jsonl: line 2" in caplog.text
  assert ("as unknown" in caplog.text) == (tokenizer == "char")
  read = [data.tokenizer.decode(data.validation[i]["text"]) for i in range(3)]
  assert read == (["some text", " ", "some "] if tokenizer == "char" else [*data.rows.texts])
  if tokenizer == "char":
    assert (data.validation[1]["text"] == 3).sum() == 10


def test_a_released_tokenizer_gives_its_marks_and_is_kept(own, tmp_path):
  """XLM-R's: bos 0, padding 1, eos 2. A run goes on with its copy; none is trained."""
  rows = [row(i, "a black cat") for i in range(3)]
  options = {"tokenizer": "xlmr", "seq_length": 24}
  with pytest.raises(ValueError, match="'xlmr' is not trained here: set data.tokenizer_file to"):
    own(rows, rows[:1], **options)
  spm = pieces.train(tmp_path / "released.spm")
  data = own(rows, rows[:1], **options, tokenizer_file=str(spm))
  sample, count = data.validation[0], len(data.tokenizer.encode("a black cat"))
  assert sample["text"][0] == 0 and sample["text"][count + 1] == 2
  assert sample["mask"].sum() == count + 2 and set(sample["text"][count + 2 :].tolist()) == {1}
  assert "'a black cat'" in data.show(sample)
  spm.unlink()
  again = own(rows, rows[:1], **options, expected=json.loads(json.dumps(data.identity)))
  assert again.identity == data.identity and again.identity["tokenizer"]["kind"] == "xlmr"


def test_values_out_of_range_are_refused(own):
  rows = [row(0, "a")], [row(1, "b")]
  for options, message in (
    ({"tokenizer": "words"}, "tokenizer='words' must be one of"),
    ({"too_long": "cut"}, "too_long='cut' must be one of refuse, skip, truncate"),
    ({"seq_length": 2}, "seq_length=2 has no room for a token"),
  ):
    with pytest.raises(ValueError, match=message):
      own(*rows, **options)
  with pytest.raises(TypeError, match="unexpected keyword argument 'tokeniser'"):
    own(*rows, tokeniser="byte")


# ---------------------------------------------------------------------------------------------
# TFDS
# ---------------------------------------------------------------------------------------------

with tfds.core.registered.skip_registration():

  class TinyCaptions(tfds.core.GeneratorBasedBuilder):
    """Laid out as coco_captions: three and two images with two texts, an empty one in `bad`."""

    VERSION = tfds.core.Version("1.1.0")

    def _info(self):
      features = {
        "image": tfds.features.Image(encoding_format="png"),
        "image/filename": tfds.features.Text(),
        "image/id": np.int64,
        "objects": tfds.features.Sequence(
          {"bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=["cat"])}
        ),
        "captions": tfds.features.Sequence({"text": np.str_, "id": np.int64}),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {
        name: self._generate_examples(name, seeds)
        for name, seeds in (("train", (0, 1, 2)), ("val", (3, 4)), ("bad", (5, 6, 7)))
      }

    def _generate_examples(self, name, seeds):
      for seed in seeds:
        texts = [f"ä {seed}", f" b  {seed}"]
        if name == "bad" and seed < 7:
          texts = ["a", " "] if seed == 5 else []
        yield (
          seed,
          {
            "image": io.BytesIO(png(seed)),
            "image/filename": f"{seed}.png",
            "image/id": seed,
            "objects": [{"bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0), "label": 0}],
            "captions": [{"text": text, "id": i} for i, text in enumerate(texts)],
          },
        )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp("tfds")
  TinyCaptions(data_dir=data_dir, file_format="array_record").download_and_prepare()
  return {"data_dir": str(data_dir), "text_key": "captions/text", "validation_split": "val"}


def test_tfds_captions_are_read_without_tensorflow(prepared, tmp_path):
  data = load(tmp_path, "tiny_captions", **prepared)
  assert (len(data.train), len(data.rows), data.shared) == (6, 4, None)
  pixels = {np.asarray(Image.open(io.BytesIO(png(seed)))).tobytes(): seed for seed in range(5)}
  for rows in (data.train, data.rows):
    for text, image in zip(rows.texts, rows.image_of, strict=True):
      assert text[-1] == str(pixels[rows.pictures[int(image)]["image"].tobytes()])
      assert text[:2] in ("ä ", "b ")
  assert data.keywords == tuple(map(tuple, data.references()))
  before = json.loads(json.dumps(data.identity))
  assert load(tmp_path, "tiny_captions", **prepared, expected=before).identity == before
  both = load(tmp_path, "tiny_captions", **prepared, train_split="train+bad[2:]")
  assert len(both.train) == 8
  single = load(tmp_path, "tiny_captions", **prepared | {"text_key": "image/filename"})
  assert sorted(single.train.texts) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("variant", sorted(beit3.VARIANTS))
def test_each_config_reads_what_its_data_set_holds(variant, prepared):
  """Of coco_captions, by its layout; what is one's own has its usual splits, and what is embedded
  is there."""
  config = from_config_dict(beit3.get_config(variant))
  fields = caption_sources.Options._fields
  given = {name: getattr(config.data, name) for name in fields if not name.endswith("_files")}
  if config.data.name == "pairs_jsonl":
    assert given["validation_split"] == "validation"
    return
  is_coco = config.data.name == "coco_captions/2014"
  assert is_coco or config.data.name.startswith("embedded/emoji/")
  options = caption_sources.Options(**given | {"data_dir": prepared["data_dir"]})
  name = "tiny_captions" if is_coco else config.data.name
  parts = caption_sources.read_captioned(name, options, documents.BadRecords())
  assert [len(part.texts) for part in parts] == [6, 4] or not is_coco


def test_bad_tfds_captions_are_named(prepared, tmp_path):
  options = prepared | {"train_split": "bad"}
  with pytest.raises(
    ValueError, match=r"tiny_captions-bad.array_record.*: record \d cannot be rea"
  ):
    load(tmp_path, "tiny_captions", **options, skip_bad=1)
  data = load(tmp_path, "tiny_captions", **options, skip_bad=2)
  assert data.train.texts == ("ä 7", "b 7")
  found = " ".join(data.bad_records)
  assert "one of its texts is empty" in found and "it has no text" in found
  for change, message in (
    (
      {"text_key": "text"},
      "no text feature 'text'; data.text_key can be .'captions/text', 'image/f",
    ),
    ({"image_key": "captions"}, "no Image 'captions'; data.image_key can be one of .'image'."),
    ({"validation_split": "test"}, "has no split 'test'; it has"),
  ):
    with pytest.raises(ValueError, match=message):
      load(tmp_path, "tiny_captions", **prepared | change)


# ---------------------------------------------------------------------------------------------
# Pipelines
# ---------------------------------------------------------------------------------------------


def same(got, expected):
  for a, b in zip(got, expected, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture
def feed(own):
  rows = [row(i, f"text {i}", f"other {i}") for i in range(6)]
  data = own(rows, [row(9, "nine")], view=view(crop_scale=0.5, flip=0.5))
  masked = captions.masked(data, rate=0.7, keep=0.1, random=0.1)

  def made(**options):
    return pipelines.train_iterator(
      masked.train, batch_size=4, seed=3, augment=masked.augment, **options
    )

  return made


def test_a_run_goes_on_and_hosts_read_their_rows(feed):
  whole = feed()
  batches = [next(whole) for _ in range(5)]
  for rows in ((0, 2), (3, 1)):
    part = feed(rows=rows)
    for batch in batches:
      same([next(part)], [{name: values[list(rows)] for name, values in batch.items()}])
  iterator = feed()
  same([next(iterator) for _ in range(2)], batches[:2])
  state = json.loads(json.dumps(iterator.get_state()))
  resumed = feed()
  resumed.set_state(state)
  same([next(resumed) for _ in range(3)], batches[2:])
  # An epoch has every row once; the next one has other masks.
  seen = np.concatenate([batch["text"] for batch in batches[:3]])
  assert len({text.tobytes() for text in seen}) == 12


@pytest.mark.slow
def test_worker_processes_read_the_same(feed):
  whole, iterator = feed(), feed(num_workers=2)
  same([next(iterator) for _ in range(4)], [next(whole) for _ in range(4)])
  iterator.close()


def test_training_is_augmented_and_an_evaluation_is_not(own):
  data = own([row(0, "a")], [row(0, "b")], view=view(5, crop_scale=0.3, flip=0.5))
  seen = [data.augment(data.train[0], np.random.default_rng(i))["image"] for i in range(5)]
  assert len({image.tobytes() for image in seen}) == 5
  same([data.validation[0]], [data.validation[0]])
  assert data.train[0]["image"].shape == (5, 6, 3) and data.train[0]["image"].dtype == np.uint8
  assert seen[0].shape == data.validation[0]["image"].shape == (5, 5, 3)
  with pytest.raises(IndexError, match="row 1 of 1"):
    data.train[1]


def test_a_config_has_what_is_read_and_nothing_else():
  """By name and by default, but for those that a task's config sets anyway."""
  task, of_view = "image_text_retrieval", {"normalization", "eval_crop", "augment"}
  read = {
    field.name: field.default
    for field in dataclasses.fields(DataConfig)
    if task in (tasks_reading(f"data.{field.name}") or (task,))
  }
  parameters = inspect.signature(captions.load_captions).parameters.values()
  given = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
  given |= caption_sources.Options._field_defaults | captions.Tokens._field_defaults
  assert read.keys() - {"workers", "prefetch"} - of_view == given.keys() - {
    *("workdir", "expected", "view")
  }
  different = {name for name in read.keys() & given.keys() if read[name] != given[name]}
  assert different == {"name", "seq_length", "train_files", "validation_files", "test_files"}
  assert DataConfig.__dataclass_fields__["too_long"].metadata["choices"] == captions.TOO_LONG


# ---------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------


def test_how_many_tokens_are_hidden():
  """The numbers of BEiT-3's code."""
  counts = lambda rate, *lengths: [captions.TextMasks(rate, 0, 0, 9).count(n) for n in lengths]
  assert counts(0.7, 2, 3, 10, 32) == [1, 2, 7, 22]
  assert counts(0.6, 2, 3, 10, 32) == [1, 2, 6, 19]
  assert counts(0.01, 0, 1, 2, 40) == [0, 0, 1, 1]


def test_what_is_hidden_of_a_text():
  """Never the start, every other place as often; 80, 10 and 10 percent; nothing else changes."""
  masks = captions.TextMasks(0.5, keep=0.1, random=0.1, vocab_size=50)
  text = np.array([1, *range(4, 22), 2, 0, 0, 0], np.int32)
  mask = np.arange(len(text)) < 20
  chosen, fates, randoms = np.zeros(len(text)), collections.Counter(), collections.Counter()
  rng = np.random.default_rng(0)
  for _ in range(4000):
    inputs, targets, weights = masks.draw(text, mask, rng)
    places = weights > 0
    assert places.sum() == 10 and (weights[places] == 1).all()
    assert (inputs[~places] == text[~places]).all() and (targets == text * places).all()
    chosen += places
    for token, target in zip(inputs[places], targets[places], strict=True):
      if token != target:
        fates["hidden" if token == 50 else "random"] += 1
        randoms[int(token)] += token != 50
  assert not chosen[0] and not chosen[20:].any()
  np.testing.assert_allclose(chosen[1:20] / 4000, 10 / 19, atol=0.03)
  assert abs(fates["hidden"] / 40_000 - 0.8) < 0.01
  # Of 47 one is the target itself.
  assert abs(fates["random"] / 40_000 - 0.1 * 46 / 47) < 0.01
  assert {token for token, times in randoms.items() if times} == {*range(3, 50)}


def test_masks_are_drawn_anew_in_training_and_fixed_in_validation(tmp_path):
  plain = load(tmp_path, "embedded/emoji/en", seq_length=48)
  data = captions.masked(plain, rate=0.7, keep=0.1, random=0.1)
  same([data.validation[5]], [data.validation[5]])
  drawn = [data.augment(data.train[5], np.random.default_rng(i))["inputs"] for i in range(4)]
  assert len({inputs.tobytes() for inputs in drawn}) == 4
  sample = data.validation[5]
  assert (sample["text"] == plain.validation[5]["text"]).all()
  assert sample["weights"].shape == sample["targets"].shape == sample["inputs"].shape == (48,)
  assert masking.words_of(data.tokenizer, sample["inputs"]).count("[mask]") >= 10
  assert data.identity != plain.identity and data.rows is plain.validation
  assert data.references() == plain.references() and data.describe() == plain.describe()
  (batch,) = pipelines.eval_batches(data.validation, 200)
  assert not batch["weights"][157:].any()
