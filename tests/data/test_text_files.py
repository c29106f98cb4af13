"""Text files: splitting into documents, holding out, and errors that name the file."""

import codecs
import pathlib

import pytest

from magneto_jax.data import documents, text_files


def _write(path, text, encoding="utf-8"):
  path.write_bytes(text.encode(encoding))
  return str(path)


def test_without_a_separator_a_file_is_a_document(tmp_path):
  train = [_write(tmp_path / "a.txt", "α\r\nβ\n"), _write(tmp_path / "b.txt", "b")]
  held_out = _write(tmp_path / "v.txt", "v")
  parts = text_files.text_files(train_files=train, validation_files=[held_out])
  assert [list(part) for part in parts] == [["α\r\nβ\n", "b"], ["v"]]


def test_separator_splits_and_empty_documents_are_left_out(tmp_path):
  path = _write(tmp_path / "a.txt", "<|end|>one<|end|>two\n<|end|> \n<|end|>three")
  held_out = _write(tmp_path / "v.txt", "v")
  train, _ = text_files.text_files(
    train_files=[path], validation_files=[held_out], document_separator="<|end|>"
  )
  assert list(train) == ["one", "two\n", "three"]


def test_globs_are_sorted_and_overlapping_patterns_count_once(tmp_path):
  for name in "cab":
    _write(tmp_path / f"{name}.txt", name)
  held_out = _write(tmp_path / "v.text", "v")
  train, _ = text_files.text_files(
    train_files=[str(tmp_path / "b.txt"), str(tmp_path / "*.txt")], validation_files=[held_out]
  )
  assert list(train) == ["b", "a", "c"]


def test_a_path_with_glob_characters_is_meant_literally(tmp_path):
  path = _write(tmp_path / "a[1].txt", "first\nsecond\n")
  train, validation = text_files.text_files(train_files=[path], validation_fraction=0.5)
  assert (list(train), list(validation)) == (["first\n"], ["second\n"])


@pytest.mark.parametrize("separator", ["", "\n\n", "|"])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize(
  "text",
  ["".join(f"line {i} é😀\n" + "\n" * (i % 3 == 0) for i in range(50)), "ü" * 99, "a|b|c" * 20],
  ids=["lines", "no_boundary", "no_newline"],
)
def test_held_out_tail_and_training_text_make_up_the_file(tmp_path, text, fraction, separator):
  """No text is in both parts, none but separators is lost, and no character is cut in two."""
  path = _write(tmp_path / "a.txt", text)
  train, validation = text_files.text_files(
    train_files=[path], validation_fraction=fraction, document_separator=separator
  )
  joined = "".join(train) + "".join(validation)
  assert joined == (text.replace(separator, "") if separator else text)


def test_the_cut_prefers_a_document_boundary_then_a_line_then_a_character(tmp_path):
  path = _write(tmp_path / "a.txt", "aaaa\nbb--cc\ndddd\neee")  # 20 bytes, half is 10

  def cut(separator, fraction):
    train, validation = text_files.text_files(
      train_files=[path], validation_fraction=fraction, document_separator=separator
    )
    return list(train)[-1], validation[0]

  assert cut("--", 0.7) == ("aaaa\nbb", "cc\ndddd\neee")
  assert cut("", 0.7) == ("aaaa\nbb--cc\n", "dddd\neee")
  assert cut("--", 0.5) == ("cc\n", "dddd\neee")  # no separator after the target
  assert cut("", 0.1) == ("aaaa\nbb--cc\ndddd\ne", "ee")


def test_every_file_is_in_both_parts(tmp_path):
  paths = [_write(tmp_path / f"{i}.txt", f"{i} first\n{i} last\n") for i in range(3)]
  train, validation = text_files.text_files(train_files=paths, validation_fraction=0.5)
  assert list(train) == [f"{i} first\n" for i in range(3)]
  assert list(validation) == [f"{i} last\n" for i in range(3)]


def test_identity_names_the_content_not_the_place(tmp_path):
  def identities(folder, text):
    folder.mkdir()
    path = _write(folder / "a.txt", text)
    return [part.identity for part in text_files.text_files(train_files=[path])]

  text = "one\ntwo\nthree\n" * 20
  assert identities(tmp_path / "1", text) == identities(tmp_path / "2", text)
  changed = identities(tmp_path / "3", text.replace("one", "two", 1))
  assert changed[0] != identities(tmp_path / "4", text)[0]


def test_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"train_files: no file matches '.*/no\*\.txt'"):
    text_files.text_files(train_files=[str(tmp_path / "no*.txt")])


def test_no_files_says_what_to_set():
  with pytest.raises(ValueError, match="train_files is empty: name at least one"):
    text_files.text_files(train_files=())


def test_one_string_is_not_taken_for_many_patterns():
  with pytest.raises(TypeError, match="train_files must be a sequence of paths, .* 'a.txt'"):
    text_files.text_files(train_files="a.txt")


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_empty_file_is_named(tmp_path, text):
  with pytest.raises(ValueError, match=r"empty\.txt holds no text"):
    text_files.text_files(train_files=[_write(tmp_path / "empty.txt", text)])


def test_a_document_that_is_not_utf8_is_named_with_its_line_when_it_is_read(tmp_path):
  """The others, before it and behind it, can be read."""
  path = _write(tmp_path / "latin.txt", "caf\xe9|noir|\nth\xe9|s", "latin1")
  parts = text_files.text_files(train_files=[path], document_separator="|", validation_fraction=0.3)
  bad = documents.BadRecords(2)
  assert [list(bad.readable(part)) for part in parts] == [["noir"], ["s"]]
  for record, (index, line, offset) in zip(bad.found, [(0, 1, 3), (2, 2, 13)], strict=True):
    reason = f"not UTF-8: byte 0xe9 in line {line}, at offset {offset}; convert it, for example"
    assert record.startswith(f"{path}: record {index} cannot be read ({reason}")


def test_a_file_that_has_become_shorter_is_a_bad_record(tmp_path):
  path = _write(tmp_path / "a.txt", "one|two|three")
  train, _ = text_files.text_files(train_files=[path], document_separator="|")
  pathlib.Path(path).write_text("one|t")
  assert train[0] == "one"
  with pytest.raises(documents.BadRecord, match="record 1 cannot be read .*has become shorter"):
    train[1]


def test_a_file_in_two_parts_is_refused(tmp_path):
  path, other = (_write(tmp_path / f"{name}.txt", "a") for name in "ab")
  parts = text_files.of_parts([path], [other], [path], "validation")
  assert parts == {"train": [path], "validation": [other]}
  for validation, test, first, second in (
    (path, other, "train", "validation"),
    (other, path, "train", "test"),
    (other, other, "validation", "test"),
  ):
    with pytest.raises(
      ValueError, match=rf"{first}_files and {second}_files must not share files: \['.*\.txt'\]"
    ):
      text_files.of_parts([path], [validation], [test], "test")
  with pytest.raises(
    ValueError, match="files of one's own have no split 'dev', only train, validation and t"
  ):
    text_files.of_parts([path], [], [], "dev")


@pytest.mark.parametrize("separator", ["", "|"])
def test_a_mark_of_byte_order_is_no_text(tmp_path, separator):
  """Nor is a file that holds nothing else; the documents are those of a file without it."""
  text, mark = "one|two\nthree|four\n", codecs.BOM_UTF8.decode()
  parts = [
    text_files.text_files(
      train_files=[_write(tmp_path / f"{len(begin)}.txt", begin + text)],
      document_separator=separator,
      validation_fraction=0.4,
    )
    for begin in ("", mark)
  ]
  assert [list(part) for part in parts[0]] == [list(part) for part in parts[1]]
  assert [part.identity for part in parts[0]] == [part.identity for part in parts[1]]
  with pytest.raises(ValueError, match="holds no text"):
    text_files.text_files(train_files=[_write(tmp_path / "mark.txt", mark + "\n")])


def test_nothing_left_to_train_on_is_refused(tmp_path):
  path = _write(tmp_path / "a.txt", "a")
  with pytest.raises(ValueError, match="no train document is left"):
    text_files.text_files(train_files=[path], validation_fraction=0.5)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_fraction_out_of_range_is_refused(tmp_path, fraction):
  path = _write(tmp_path / "a.txt", "a\nb\n")
  with pytest.raises(ValueError, match=r"validation_fraction=.* must lie in \(0, 1\)"):
    text_files.text_files(train_files=[path], validation_fraction=fraction)
