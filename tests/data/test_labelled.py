"""Labelled texts as they are read: what lies in a file is a row, or is named with its line."""

import json
import re

import pytest
from tensorflow_datasets.text import glue

from magneto_jax.data import documents, labelled, sources

SINGLE = labelled.Table(("text",), "label", False)
PAIR = labelled.Table(("a", "b"), "y", False)


def read(path, table=SINGLE, skip=0):
  bad = documents.BadRecords(skip)
  rows = labelled.labelled_files([str(path)], [], table, bad, fraction=0.0)[0]
  return [(*row.texts, row.label) for row in rows], tuple(bad.found)


def letters(line):
  return re.sub("[^a-z]", "", line.lower())


def test_the_embedded_lines_leave_nothing_of_one_part_in_another():
  parts = {split: labelled.embedded_lines(split) for split in ("train", "validation", "test")}
  lines = [letters(row.texts[0]) for rows in parts.values() for row in rows]
  assert len(lines) == len(set(lines))
  assert {name: len(rows) for name, rows in parts.items()} == {
    "train": 15_904,
    "validation": 1_697,
    "test": 2_068,
  }
  plays = {play.partition("\n")[0]: play for play in sources.embedded("train")}
  for rows in parts.values():
    assert {row.label for row in rows} == plays.keys()
    for row in rows:
      (line,) = row.texts
      assert len(line.split()) >= 5 and "[" not in line and "\n" not in line
  with pytest.raises(ValueError, match=r"no split 'tset'; they have \['test', 'train', 'valid"):
    labelled.embedded_lines("tset")


def test_the_embedded_lines_do_not_name_who_speaks():
  """No line is a first one of a paragraph, where the speakers stand, nor of a list of persons."""
  lines = labelled.embedded_lines("train")
  for play in sources.embedded("train"):
    title = play.partition("\n")[0]
    body = re.sub(r"\[[^\]]*\]", " ", play)
    firsts = {p.strip().split("\n")[0].strip() for p in re.split(r"\n\s*\n", body)}
    rest = {x.strip() for p in re.split(r"\n\s*\n", body) for x in p.strip().split("\n")[1:]}
    kept = {row.texts[0] for row in lines if row.label == title}
    assert kept <= rest and not kept & (firsts - rest)
    persons = play[: re.search("^act", play, re.M | re.I).start()]
    assert not kept & {line.strip() for line in persons.split("\n")}


def test_the_same_rows_are_read_from_each_kind_of_file(tmp_path):
  """Also with a mark of byte order, Windows' ends of lines, and no end of the last one."""
  rows = [("ä b", "c, d", "yes"), ('say "no"', "e", "no")]
  (tmp_path / "x.tsv").write_text("a\tid\tb\ty\r\nä b\t1\tc, d\tyes\r\n" + 'say "no"\t2\te\tno')
  quoted = '\ufeffy,b,a\nyes,"c, d",ä b\nno,e,"say ""no"""\n'
  (tmp_path / "x.csv").write_text(quoted, encoding="utf-8")
  (tmp_path / "x.jsonl").write_text(
    "\n".join(json.dumps({"b": b, "y": y, "a": a, "z": None}) for a, b, y in rows)
  )
  for kind in ("tsv", "csv", "jsonl"):
    assert read(tmp_path / f"x.{kind}", PAIR) == (rows, ())


def test_labels_are_names_or_numbers(tmp_path):
  """As classes, numbers that are equal have one name."""
  labels = ("1", '"1"', "1.0", "1.5", '"1.0"')
  lines = (f'{{"text": "p", "label": {label}}}\n' for label in labels)
  (tmp_path / "x.jsonl").write_text("".join(lines))
  assert [label for _, label in read(tmp_path / "x.jsonl")[0]] == ["1", "1", "1", "1.5", "1.0"]
  table = labelled.Table(("text",), "label", True)
  (tmp_path / "y.tsv").write_text("text\tlabel\np\t2.5\nq\t-1e1\n")
  assert read(tmp_path / "y.tsv", table)[0] == [("p", 2.5), ("q", -10.0)]


# How many good rows there are, the file, the line of the bad one, and what is said of it.
BAD = {
  "empty line": (2, "tsv", b"text\tlabel\np\t1\n\nq\t2\n", 3, "the line is empty"),
  "empty line of csv": (2, "csv", b"text,label\np,1\n\nq,2\n", 3, "the line is empty"),
  "empty line of json": (1, "jsonl", b'{"text":"p","label":1}\n\n', 2, "the line is empty"),
  "empty text": (1, "tsv", b"text\tlabel\n \t1\nq\t2\n", 2, "text is empty"),
  "empty label": (1, "tsv", b"text\tlabel\np\t\nq\t2\n", 2, "label is empty"),
  "one field": (1, "tsv", b"text\tlabel\np\nq\t2\n", 2, "it has 1 fields, the header 2"),
  "three fields": (1, "csv", b"text,label\np,1\nq,2,3\n", 3, "it has 3 fields, the header 2"),
  "utf-8": (1, "tsv", b"text\tlabel\np\t1\nq\xff\t2\n", 3, "not UTF-8: byte 0xff at its offset 1"),
  # The row begins where its first line does, though it has three.
  "utf-8 in csv": (1, "csv", b'text,label\n"p\n\xff\n",1\nq,2\n', 2, "not UTF-8: byte 0xff"),
  "json": (1, "jsonl", b'{"text":"p","label":1}\n{"text":\n', 2, "not JSON: Expecting value"),
  "no object": (1, "jsonl", b'{"text":"p","label":1}\n[1]\n', 2, "[1] is not a JSON object"),
  "no label": (0, "jsonl", b'{"text":"p"}\n', 1, "it has no 'label', only 'text'"),
  "no text": (0, "jsonl", b'{"text":3,"label":1}\n', 1, "text is 3, not a text"),
  "a label of lists": (
    0,
    "jsonl",
    b'{"text":"p","label":[1]}\n',
    1,
    "label is [1], neither a name",
  ),
  "deep json": (0, "jsonl", b"[" * 100_000 + b"\n", 1, "not JSON: maximum recursion"),
  "half a text": (0, "jsonl", rb'{"text":"p\ud800","label":1}', 1, r"not text: it holds '\ud800'"),
  "half a label": (0, "jsonl", rb'{"text":"p","label":"\udfff"}', 1, r"not text: it holds '\udff"),
  "no number": (0, "jsonl", b'{"text":"p","label":NaN}', 1, "label is nan, neither a name nor a"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_refused_with_its_line_or_counted(case, tmp_path):
  good, kind, content, line, message = BAD[case]
  (path := tmp_path / f"x.{kind}").write_bytes(content)
  with pytest.raises(ValueError, match=re.escape(f"{path}:{line}: {message}")) as error:
    read(path)
  assert "\n" not in str(error.value) and "data.skip_bad" in str(error.value)
  rows, found = read(path, skip=1)
  (text,) = found
  assert text.startswith(f"{path}:{line}: {message}")
  assert len(rows) == good


HOPELESS = {
  "empty": ("tsv", b" \n", ": is empty|is empty: remove it"),
  "header alone": ("csv", b"text,label\n", "has a header and no rows"),
  "no column": (
    "tsv",
    b"a\tlabel\np\t1\n",
    ":1: there is no column 'text' in the header, only 'a'",
  ),
  "twice": ("tsv", b"text\tlabel\ttext\np\t1\tq\n", ":1: the header has the column 'text' twice"),
  "quotes": ("csv", b'text,label\np,1\n"q,2\n', ":3: not CSV from here on"),
  "kind": ("txt", b"p", "is not one of .tsv, .csv, .jsonl"),
}


@pytest.mark.parametrize("case", HOPELESS)
def test_a_file_that_is_none_is_refused_whatever_may_be_skipped(case, tmp_path):
  kind, content, message = HOPELESS[case]
  (path := tmp_path / f"x.{kind}").write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    read(path, skip=9)
  assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_numbers_must_be_numbers(tmp_path):
  table = labelled.Table(("text",), "label", True)
  (path := tmp_path / "x.tsv").write_text("text\tlabel\np\tone\nq\tnan\nr\t2\ns\t1e39\n")
  rows, found = read(path, table, skip=3)
  assert rows == [("r", 2.0)]
  said = "not a number that float32 holds"
  assert found == tuple(
    f"{path}:{n}: label is {x!r}, {said}" for n, x in ((2, "one"), (3, "nan"), (5, "1e39"))
  )
  (path := tmp_path / "x.jsonl").write_text(f'{{"text": "p", "label": 1{"0" * 400}}}')
  assert read(path, table, skip=1)[1] == (f"{path}:1: label is 1{'0' * 39}, {said}",)


def test_what_is_held_out_is_decided_by_the_texts(tmp_path):
  """Equal rows are in one part, wherever they stand."""
  lines = [f"line {i % 100}\t{i % 2}" for i in range(300)]
  (path := tmp_path / "x.tsv").write_text("text\tlabel\n" + "\n".join(lines))
  bad = documents.BadRecords()
  train, validation = labelled.labelled_files([str(path)], [], SINGLE, bad, fraction=0.2)
  assert len(train) + len(validation) == 300 and 30 <= len(validation) <= 90
  assert not {row.texts for row in train} & {row.texts for row in validation}
  (path).write_text("text\tlabel\n" + "\n".join(reversed(lines)))
  again = labelled.labelled_files([str(path)], [], SINGLE, bad, fraction=0.2)[1]
  assert {row.texts for row in again} == {row.texts for row in validation}
  with pytest.raises(ValueError, match="must not share files"):
    labelled.labelled_files([str(path)], [str(path)], SINGLE, bad, fraction=0.2)
  (other := tmp_path / "test.tsv").write_text("text\tlabel\nanother text\tx\n")
  options = {"fraction": 0.2, "test_files": [str(other)], "split": "test"}
  again, test = labelled.labelled_files([str(path)], [], SINGLE, bad, **options)
  assert [row.texts for row in test] == [("another text",)]
  assert {row.texts for row in again} == {row.texts for row in train}


def test_glue_is_known_by_name():
  """Texts and classes as TFDS has them, in its order."""
  assert labelled.glue_task("glue/rte:2.0.0") == labelled.glue_task("glue/rte")
  assert labelled.glue_task("glue") is labelled.glue_task("imdb_reviews") is None
  theirs = {config.name: config for config in glue.Glue.BUILDER_CONFIGS}
  for name, task in labelled.GLUE.items():
    assert task.columns == tuple(theirs[name].text_features)
    assert task.classes == tuple(theirs[name].label_classes or ())
