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
