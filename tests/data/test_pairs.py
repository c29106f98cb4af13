"""Sentence pairs: their sources, what is wrong with them, and the rows that they share."""

import codecs
import copy
import gzip
import json
import lzma

import numpy as np
import pytest
import tensorflow_datasets as tfds

from magneto_jax.data import documents, pair_sources, pairs, tokenizers

EOS = tokenizers.EOS_ID
WORDS = "the a cat dog house tree on under sees likes and or red old small".split()


def corpus(count, seed=0, longest=9):
  """Different pairs of words."""
  rng = np.random.default_rng(seed)
  side = lambda: " ".join(rng.choice(WORDS, rng.integers(1, longest)))
  return [(f"{side()} {i}", f"{side()} {seed}.{i}") for i in range(count)]


def write(path, lines, end="\n"):
  """A file of lines, of which pairs are joined by a tab; as text or bytes."""
  lines = ["\t".join(line) if isinstance(line, tuple) else line for line in lines]
  encoded = [line if isinstance(line, bytes) else line.encode() for line in lines]
  path.write_bytes(b"".join(line + end.encode() for line in encoded))
  return str(path)


@pytest.fixture
def own(tmp_path):
  """`own(train lines, validation lines, ...)`: byte tokens of one's own files."""

  def load(train, validation=None, workdir="run", end="\n", **options):
    validation = corpus(3, seed=9) if validation is None else validation
    files = {
      "train_files": (write(tmp_path / "train.tsv", train, end),),
      "validation_files": (write(tmp_path / "validation.tsv", validation, end),),
    }
    return pairs.load_pairs(
      **{"workdir": tmp_path / workdir, "name": "pair_files", "tokenizer": "byte"}
      | {"seq_length": 128}
      | files
      | options
    )

  return load


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """The embedded pairs with a joint tokenizer."""
  return pairs.load_pairs(
    workdir=tmp_path_factory.mktemp("run"), vocab_size=1000, seq_length=160, name="embedded"
  )


# ---------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------


def test_the_embedded_pairs_are_those_of_the_readme():
  parts = {split: list(pair_sources.embedded(split)) for split in ("train", "validation", "test")}
  assert {split: len(part) for split, part in parts.items()} == {
    "train": 5265,
    "validation": 300,
    "test": 300,
  }
  everything = [side for part in parts.values() for pair in part for side in pair]
  assert len(set(everything)) == len(everything)  # No side twice, across splits neither.
  assert max(map(len, everything)) <= 250
  assert parts["validation"][0][0].startswith("Even though creating an AppArmor profile")


def test_the_embedded_pairs_can_be_read_either_way():
  there, back = (pair_sources.embedded("test", *keys) for keys in (("en", "de"), ("de", "en")))
  assert [pair[::-1] for pair in back] == list(there)
  assert there.identity != back.identity
  with pytest.raises(ValueError, match="are of en and de: .*source_key='en' .*target_key='fr'"):
    pair_sources.embedded("test", "en", "fr")
  with pytest.raises(ValueError, match=r"no split 'dev'; they have \['test', 'train', 'valid"):
    pair_sources.embedded("dev")


@pytest.mark.parametrize("end", ("\n", "\r\n"))
@pytest.mark.parametrize("opened", (None, gzip.compress, lzma.compress))
def test_own_files_are_read_whatever_their_ends_and_compression(tmp_path, opened, end):
  """Without the last line's end, too; what a file holds names it, not where it lies."""
  train, validation = corpus(20), corpus(5, seed=1)
  plain = write(tmp_path / "plain.tsv", train, end), write(tmp_path / "v.tsv", validation, end)
  content = (tmp_path / "plain.tsv").read_bytes().removesuffix(end.encode())
  suffix = {None: "", gzip.compress: ".gz", lzma.compress: ".xz"}[opened]
  path = tmp_path / f"own.tsv{suffix}"
  path.write_bytes(opened(content) if opened else content)
  found = pair_sources.pair_files(train_files=(str(path),), validation_files=plain[1:])
  assert (list(found[0]), list(found[1])) == (train, validation)
  (tmp_path / "moved").mkdir()
  moved = path.rename(tmp_path / "moved" / path.name)
  again = pair_sources.pair_files(train_files=(str(moved),), validation_files=plain[1:])
  assert again[0].identity == found[0].identity != found[1].identity


@pytest.mark.parametrize("opened", (None, gzip.compress))
def test_a_mark_of_byte_order_is_no_text(tmp_path, opened):
  plain = write(tmp_path / "plain.tsv", corpus(20))
  content = codecs.BOM_UTF8 + (tmp_path / "plain.tsv").read_bytes()
  (path := tmp_path / f"marked.tsv{'.gz' * bool(opened)}").write_bytes(
    opened(content) if opened else content
  )
  parts = [pair_sources.pair_files(train_files=(str(file),)) for file in (plain, path)]
  assert [list(part) for part in parts[0]] == [list(part) for part in parts[1]]
  assert [part.identity for part in parts[0]] == [part.identity for part in parts[1]]
  (path := tmp_path / "mark.tsv").write_bytes(codecs.BOM_UTF8)
  with pytest.raises(ValueError, match="mark.tsv is empty"):
    pair_sources.pair_files(train_files=(str(path),))


def test_pairs_of_both_parts_are_told(tmp_path, caplog):
  """However often they occur, and whatever ends their lines."""
  train, validation = corpus(9), corpus(3, seed=1)
  files = {
    "train_files": (write(tmp_path / "t.tsv", [*train, train[0]]),),
    "validation_files": (write(tmp_path / "v.tsv", [train[0], *validation, *train[:2]], "\r\n"),),
  }
  pair_sources.pair_files(**files)
  assert "3 of the 6 validation pairs are in the training files too" in caplog.text
  caplog.clear()
  pair_sources.pair_files(train_files=files["train_files"], validation_fraction=0.4)
  assert "1 of the 4 validation pairs are in the training files too" in caplog.text
  caplog.clear()
  pair_sources.pair_files(**files, validation_split="train")
  pair_sources.pair_files(train_files=(write(tmp_path / "u.tsv", train),))
  assert not caplog.text


def test_the_last_lines_of_every_file_are_held_out(tmp_path):
  parts = corpus(10), corpus(30, seed=1)
  files = tuple(write(tmp_path / f"{i}.tsv", part) for i, part in enumerate(parts))
  train, validation = pair_sources.pair_files(train_files=files, validation_fraction=0.2)
  assert list(train) == parts[0][:8] + parts[1][:24]
  assert list(validation) == parts[0][8:] + parts[1][24:]
  assert validation.place(1) == (files[0], 10, "line")
  assert validation.place(2) == (files[1], 25, "line")
  with pytest.raises(ValueError, match="must not share files"):
    pair_sources.pair_files(train_files=files, validation_files=files[:1])
  with pytest.raises(ValueError, match="no train pair is left"):
    pair_sources.pair_files(train_files=files, validation_fraction=0.99)
  with pytest.raises(ValueError, match=r"validation_fraction=1.0 must lie in \(0, 1\)"):
    pair_sources.pair_files(train_files=files, validation_fraction=1.0)


class TinyPairs(tfds.core.GeneratorBasedBuilder):
  """Pairs as TFDS's wmt and opus sets hold them."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.Translation(languages=("de", "en"))
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(9), "validation": self._generate_examples(4)}

  def _generate_examples(self, size):
    for i in range(size):
      yield i, {"de": f"Sätz {i} von {size}", "en": f"sentence {i} of {size}" if i else " "}


def test_prepared_tfds_pairs_are_read_by_their_languages(tmp_path):
  TinyPairs(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  options = {"data_dir": str(tmp_path), "source_key": "de", "target_key": "en"}
  train, validation = pair_sources.read_pairs("tiny_pairs", **options)
  expected = {(f"Sätz {i} von 9", f"sentence {i} of 9") for i in range(1, 9)}
  found, failed = set(), []
  for i in range(9):
    try:
      found.add(train[i])
    except ValueError as error:
      failed.append(str(error))
  assert found == expected
  (shard,) = tmp_path.rglob("*-train.array_record-*")
  (error,) = failed
  assert error.startswith(f"{shard}: record ") and error.endswith("(its target is empty)")
  assert train.identity["languages"] == ["de", "en"]
  with pytest.raises(ValueError, match=r"no text feature 'fr'; target_key can be \['de', 'en'\]"):
    pair_sources.read_pairs("tiny_pairs", data_dir=str(tmp_path), target_key="fr")
  data = pairs.load_pairs(
    workdir=tmp_path / "run", name="tiny_pairs", tokenizer="byte", skip_bad=2, **options
  )
  assert set(data.train_pairs) == expected and len(data.validation_pairs) == 3


def test_a_set_that_is_not_there_says_how_to_prepare_it(tmp_path):
  with pytest.raises(FileNotFoundError, match="wmt14_translate/de-en is not prepared under"):
    pair_sources.read_pairs("wmt14_translate/de-en", data_dir=str(tmp_path))


# ---------------------------------------------------------------------------------------------
# What is wrong
# ---------------------------------------------------------------------------------------------

BAD = {
  "empty": ("", "it is empty"),
  "one column": ("only a source", "it has one column, not a source, a tab and its target"),
  "three columns": ("a\tb\tc", "it has 3 columns, not a source, a tab and its target"),
  "no source": (" \tb", "its source is empty"),
  "no target": ("a\t", "its target is empty"),
  "not UTF-8": (b"a\tgr\xfcn", "not UTF-8: its byte 4 is 0xfc; convert the file"),
}


@pytest.mark.parametrize("line, reason", BAD.values(), ids=BAD)
@pytest.mark.parametrize("end", ("\n", "\r\n"))
def test_a_bad_line_is_named_by_its_number(own, tmp_path, line, reason, end):
  """In either part; in one line; nothing is skipped unasked."""
  good = corpus(12)
  message = "{}: line {} cannot be read (" + reason
  for part, options in (
    ("train.tsv", {"train": [*good[:4], line, *good[4:]]}),
    ("validation.tsv", {"train": good, "validation": [*corpus(4, seed=3), line]}),
  ):
    with pytest.raises(ValueError) as error:
      own(**options, end=end)
    assert str(error.value).startswith(message.format(tmp_path / part, 5))
    assert "data.skip_bad" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("tokenizer", ("byte", "sentencepiece"))
def test_bad_lines_may_be_left_out_and_are_counted(own, tokenizer):
  """Once each, though both of a pair's texts are lost; the rest is as if they were not there."""
  good, bad = corpus(60), [line for line, _ in BAD.values()]
  lines = [*good[:9], *bad[:3], *good[9:40], *bad[3:], *good[40:]]
  options = {"tokenizer": tokenizer, "vocab_size": 300}
  with pytest.raises(ValueError, match=r"line 46 .*; 5 others were left out"):
    own(lines, skip_bad=5, workdir="strict", **options)
  data = own(lines, skip_bad=6, **options)
  assert len(data.bad_records) == 6 and list(data.train_pairs) == good
  assert data.identity["left_out"] == {"train": [9, 10, 11, 43, 44, 45], "validation": []}
  others = own(good, workdir="others", **options)
  assert "left_out" not in others.identity and not others.bad_records
  same_rows(data.train, others.train)
  again = own(lines, skip_bad=6, expected=json.loads(json.dumps(data.identity)), **options)
  assert again.bad_records == data.bad_records


def same_rows(rows, others):
  assert len(rows) == len(others)
  for row, other in zip(map(rows.__getitem__, range(len(rows))), others, strict=True):
    for name, values in row.items():
      np.testing.assert_array_equal(values, other[name])


@pytest.mark.parametrize("name", ("empty.tsv", "empty.tsv.gz", "cut.tsv.xz"))
def test_a_file_that_holds_nothing_or_is_damaged_is_one_line(tmp_path, name):
  path = tmp_path / name
  content = {"empty.tsv": b"", "empty.tsv.gz": gzip.compress(b"")}
  path.write_bytes(content.get(name, lzma.compress(b"a\tb\n" * 1000)[:-20]))
  reason = "cannot be decompressed: " if "cut" in name else "is empty: remove it from the list"
  with pytest.raises(ValueError, match=f"{name} {reason}") as error:
    pair_sources.pair_files(train_files=(str(path),))
  assert "\n" not in str(error.value)


def test_a_pair_longer_than_a_row_is_named_or_skipped_and_told(own, tmp_path):
  """Bytes and an eos on either side; the limit itself fits."""
  good = corpus(8)
  fits, long = ("a" * 127, "b" * 127), [("a" * 128, "b"), ("a", "ü" * 70)]
  lines = [*good[:3], long[0], "one column", *good[3:], long[1], fits]
  with pytest.raises(ValueError) as error:
    own(lines, skip_bad=1)
  assert str(error.value) == (
    f"{tmp_path / 'train.tsv'}: line 4 has 129 tokens on a side, more than seq_length=128, as 2 of"
    " 11 pairs do: set data.seq_length to at least 141, or data.too_long=skip"
  )
  readable = [line for line in lines if line != "one column"]
  data = own(lines, [*corpus(3, seed=9), *long], skip_bad=1, too_long="skip")
  assert len(data.train.pairs) == len(good) + 1 and data.too_long == (2, 2)
  # What is judged by its text has no length.
  assert list(data.train_pairs) == readable
  assert list(data.validation_pairs) == [*corpus(3, seed=9), *long]
  assert "; 4 pairs of more than 128 tokens skipped" in data.describe()
  same_rows(data.train, own([*good, fits], workdir="others").train)
  assert len(own(lines, seq_length=141, skip_bad=1).train.pairs) == len(readable)
  with pytest.raises(ValueError, match="all pairs have more than seq_length=4 tokens"):
    own(good, seq_length=4, too_long="skip")


def test_choices_that_are_none_are_refused(own):
  for options, message in (
    ({"tokenizer": "bpe"}, r"tokenizer='bpe' must be one of"),
    ({"too_long": "cut"}, "too_long='cut' must be refuse or skip"),
    ({"source_key": "de"}, "are not read with data.name='pair_files'"),
    ({"validation": corpus(4)}, "training and validation pairs are the same"),
  ):
    with pytest.raises(ValueError, match=message):
      own(corpus(4), **options)
  with pytest.raises(TypeError, match="train_file"):
    own(corpus(4), train_file=("a",))


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


def first_fit(lengths, room):
  """By the rule, in plain Python: the longest pair first, into the first row that has room."""
  rows = []
  for pair in sorted(range(len(lengths)), key=lambda pair: -max(lengths[pair])):
    for row in rows:
      if all(sum(lengths[p][side] for p in [*row, pair]) <= room for side in (0, 1)):
        row.append(pair)
        break
    else:
      rows.append([pair])
  return rows


@pytest.mark.parametrize("window", (1000, 40, 7))
def test_rows_are_filled_first_fit_within_windows(window):
  rng = np.random.default_rng(window)
  lengths = rng.integers(1, 33, (100, 2))
  rows = pairs.pack(lengths, 32, window)
  expected = [
    [start + pair for pair in row]
    for start in range(0, 100, window)
    for row in first_fit(lengths[start : start + window].tolist(), 32)
  ]
  assert rows == expected
  assert sorted(pair for row in rows for pair in row) == list(range(100))
  assert all((lengths[row].sum(axis=0) <= 32).all() for row in rows)


def test_every_pair_is_in_one_row_as_fairseq_gives_it(own):
  """The source ends in eos; the decoder's input begins with it, and its target ends in it."""
  lines = corpus(40)
  data = own(lines, seq_length=96)
  encode = lambda words: [*data.tokenizer.encode(words), EOS]
  expected = {tuple(encode(source)): encode(target) for source, target in lines}
  found = {}
  for row in map(data.train.__getitem__, range(len(data.train))):
    for segment in range(1, row["segment_ids"].max() + 1):
      (at,), (to,) = (np.nonzero(row[f"{s}segment_ids"] == segment) for s in ("source_", ""))
      assert at.tolist() == list(range(at[0], at[-1] + 1))
      assert row["source_positions"][at].tolist() == list(range(len(at)))
      assert row["positions"][to].tolist() == list(range(len(to)))
      assert row["inputs"][to].tolist() == [EOS, *row["targets"][to][:-1]]
      found[tuple(row["source"][at].tolist())] = row["targets"][to].tolist()
    for ids, names in (
      ("source_segment_ids", ("source", "source_positions")),
      ("segment_ids", ("inputs", "targets", "positions")),
    ):
      padding = row[ids] == 0
      assert not any(row[name][padding].any() for name in names)
    np.testing.assert_array_equal(row["weights"], row["segment_ids"] > 0)
    assert {values.shape for values in row.values()} == {(96,)}
  assert found == expected
  with pytest.raises(IndexError, match=f"sample {len(data.train)} of"):
    data.train[len(data.train)]


def test_little_of_the_embedded_rows_is_padding(loaded):
  """Below 15 %, by counting; and the run says how much."""
  for part, told in zip((loaded.train, loaded.validation), loaded.padding, strict=True):
    rows = [part[i] for i in range(len(part))]
    ids = np.stack([row[f"{side}segment_ids"] for row in rows for side in ("source_", "")])
    assert told == pytest.approx(np.mean(ids == 0)) and told < 0.15
    assert f"(padding {told:.1%} of tokens)" in loaded.describe()
  assert loaded.describe().startswith("5,265 training pairs in ")
  assert loaded.show(loaded.train[0]).startswith("starts with 'Decoding this long URL leads")


def test_the_tokenizer_is_of_both_sides_of_the_training_pairs_alone(own):
  """Pieces of both languages; none of what is in the validation pairs only."""
  train = [(f"kitten {'x' * i}", f"Kätzchen {'y' * i}") for i in range(1, 40)]
  data = own(train, [("ЖЖЖЖ " * 9, "ÞÞÞÞ " * 9)], tokenizer="sentencepiece", vocab_size=300)
  lengths = {word: len(data.tokenizer.encode(word)) for word in ("kitten", "Kätzchen", "ЖЖ")}
  assert lengths["kitten"] < 3 and lengths["Kätzchen"] < 3 and lengths["ЖЖ"] == 4


def test_a_large_corpus_is_sampled_from_both_sides(own, monkeypatch):
  """Where there are more texts than sentences are trained on: at equal distances."""
  texts = pair_sources.Pairs(
    size=50,
    read=lambda index: (f"source {index}", f"target {index}"),
    place=lambda index: ("a file", index, "line"),
    identity={},
  ).texts()
  sampled = list(tokenizers._sentences(texts, 20, documents.BadRecords()))
  assert sum("source" in words for words in sampled) == 10 == len(sampled) - 10


def test_loading_again_is_identical_and_other_pairs_are_refused(own, tmp_path):
  first = own(corpus(30))
  identity = json.loads(json.dumps(first.identity))
  again = own(corpus(30), expected=identity)
  same_rows(first.train, again.train)
  assert json.loads(json.dumps(again.identity)) == identity
  with pytest.raises(ValueError, match="the train text is not the one that this run was started"):
    own(corpus(31), workdir="elsewhere", expected=identity)
  assert not (tmp_path / "elsewhere").exists()
  others = (
    own(corpus(30), workdir="a", seq_length=100),
    own(corpus(30), corpus(4, seed=5), workdir="b"),
    own(corpus(30), workdir="c", tokenizer="sentencepiece", vocab_size=300),
  )
  assert all(other.identity != first.identity for other in others)


def test_rows_travel_to_workers_without_their_tokens(loaded):
  carried = loaded.train.__getstate__().values()
  assert sum(np.asarray(value).nbytes for value in carried if hasattr(value, "nbytes")) < 100_000
  assert loaded.train.tokens.nbytes > 500_000
  again = copy.deepcopy(loaded.train)
  assert len(again) == len(loaded.train)
  for name, values in loaded.train[7].items():
    np.testing.assert_array_equal(again[7][name], values)
