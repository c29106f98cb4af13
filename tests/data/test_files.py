"""Digests and durable writes."""

import os

import pytest

from magneto_jax.data import files


def test_digest_depends_on_values_and_not_on_the_order_of_keys():
  assert files.digest({"a": 1, "b": [2]}) == files.digest({"b": [2], "a": 1})
  assert files.digest({"a": 1}) != files.digest({"a": 2}) != files.digest({"a": "2"})


def test_a_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path):
  path = tmp_path / "new" / "file"
  for content in (b"a longer content", b"short"):
    files.write_durably(path, content)
    assert path.read_bytes() == content
  assert list(path.parent.iterdir()) == [path]


def test_a_write_makes_the_bytes_durable_and_then_the_name(tmp_path, monkeypatch):
  synced = []
  monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
  path = tmp_path / "file"
  files.write_durably(path, b"content")
  assert synced == [path.stat().st_ino, tmp_path.stat().st_ino]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "file"
  files.write_durably(path, b"old")

  def fail(handle):
    raise OSError("disk full")

  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(OSError, match="disk full"):
    files.write_durably(path, b"new")
  assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
  "content, error",
  [
    (b"[" * 100_000, "recursion"),
    (b"{", "Expecting property name"),
    (b"\xff", "can't decode byte"),
    (b"!!python/object/apply:os.mkdir [x]", "Expecting value"),
    (b"", "Expecting value"),
    (b"9" * 5000, "integer string conversion"),
  ],
)
def test_a_file_that_is_not_json_is_one_error_with_its_name(content, error, tmp_path):
  path = tmp_path / "x.json"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=rf"^{path} cannot be read: .*{error}"):
    files.read_json(path)


def test_json_is_read_from_regular_files_of_bounded_size(tmp_path, monkeypatch):
  path = tmp_path / "x.json"
  path.write_text('{"a": [1, null]}')
  assert files.read_json(path) == {"a": [1, None]}
  monkeypatch.setattr(files, "_MOST_JSON", 15)
  with pytest.raises(ValueError, match="16 bytes, more than 15"):
    files.read_json(path)
  os.mkfifo(tmp_path / "pipe")
  for name in ("pipe", "."):
    with pytest.raises(ValueError, match="not a regular file"):
      files.read_json(tmp_path / name)
  with pytest.raises(FileNotFoundError):
    files.read_json(tmp_path / "none")


def test_links_may_lead_anywhere_within_a_folder_and_to_it_but_not_out(tmp_path):
  folder = tmp_path / "run"
  (folder / "deep").mkdir(parents=True)
  (folder / "file").touch()
  (folder / "deep" / "inside").symlink_to("../file")
  (tmp_path / "alias").symlink_to(folder)
  for given in (folder, tmp_path / "alias", tmp_path / "none"):
    files.refuse_links_out(given)
  (tmp_path / "run_of_another").mkdir()
  for target in ("/dev/zero", tmp_path / "none", tmp_path / "run_of_another", "../.."):
    link = folder / "deep" / "link"
    link.symlink_to(target)
    with pytest.raises(ValueError, match=r"deep/link is a link that leads out of "):
      files.refuse_links_out(tmp_path / "alias")
    link.unlink()
