"""State dicts in files: what is written comes back, and what cannot be read is one line."""

import argparse
import importlib.util
import io
import json
import os
import pathlib
import sys
import tarfile
import warnings
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from magneto_jax.convert import files
from magneto_jax.convert.files import (
  ConversionError,
  check_finite,
  read_state_dict,
  write_state_dict,
)

needs_torch = pytest.mark.skipif(
  importlib.util.find_spec("torch") is None, reason="needs PyTorch: the extra `peers`"
)
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
every_format = pytest.mark.parametrize(
  "suffix",
  [".safetensors", ".npz", *(pytest.param(suffix, marks=needs_torch) for suffix in TORCH_SUFFIXES)],
)
BFLOAT16 = np.dtype(jnp.bfloat16)
DTYPES = (
  *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
  *("float16", "float32", "float64", BFLOAT16),
)
CONFIG = {"layers": 2, "name": "ü", "nested": {"rate": 0.1, "sizes": [1, None, True]}}


def some_tensors() -> dict[str, np.ndarray]:
  """Every dtype, and all that could get lost: scalars, empty arrays, strides, odd names."""
  matrix = np.arange(12, dtype=np.float32).reshape(3, 4) - 5
  read_only = matrix * 2
  read_only.flags.writeable = False
  return {
    **{f"of.{np.dtype(d)}": np.array([[0, 1], [2, 3]]).astype(d) for d in DTYPES},
    "transposed": matrix.T,
    "strided": matrix[::-1, 1::2],
    "bfloat16 transposed": matrix.astype(BFLOAT16).T,
    "bfloat16 scalar": np.array(1.5, BFLOAT16),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float16),
    "read only": read_only,
    "tied": matrix.T,
    # Where a format has its own entries, too.
    **dict.fromkeys(("", "config", "meta", "file", "param/sd/x", "model", "ü/ö.npy"), matrix),
  }


def assert_same(found, expected):
  assert list(found) == sorted(expected)
  for name, array in expected.items():
    assert type(found[name]) is np.ndarray, name
    assert found[name].dtype == array.dtype, name
    np.testing.assert_array_equal(found[name], array, strict=True, err_msg=name)


def error_of(path, **kwargs) -> str:
  """The text of the error, which is one line and begins with the path."""
  with pytest.raises(ConversionError) as caught:
    read_state_dict(path, **kwargs)
  text = str(caught.value)
  assert text.startswith(f"{path}: ") and len(text.splitlines()) == 1, text
  assert "\x1b" not in text and "weights_only" not in text, text
  return text.removeprefix(f"{path}: ")


@every_format
@pytest.mark.parametrize("config", [None, {}, CONFIG], ids=["none", "empty", "config"])
def test_what_is_written_is_read(suffix, config, tmp_path):
  path = tmp_path / f"new/model{suffix}"
  write_state_dict(path, some_tensors(), config)
  tensors, found = read_state_dict(path)
  assert_same(tensors, some_tensors())
  assert found == config
  assert list(path.parent.iterdir()) == [path]
  # And by whoever may read any new file.
  (tmp_path / "any").touch()
  assert path.stat().st_mode == (tmp_path / "any").stat().st_mode


@every_format
def test_arrays_of_jax_are_written(suffix, tmp_path):
  path = tmp_path / f"model{suffix.upper()}"
  write_state_dict(path, {"w": jnp.ones((2, 3), jnp.bfloat16)})
  assert_same(read_state_dict(str(path)).tensors, {"w": np.ones((2, 3), BFLOAT16)})


@every_format
def test_bytes_depend_on_nothing_but_the_content(suffix, tmp_path):
  tensors = some_tensors()
  orders = [(tensors, CONFIG), (dict(reversed(tensors.items())), dict(reversed(CONFIG.items())))]
  for number, order in enumerate(orders):
    write_state_dict(tmp_path / f"{number}{suffix}", *order)
  first, second = sorted(tmp_path.iterdir())
  assert first.read_bytes() == second.read_bytes()


@every_format
def test_a_failed_write_keeps_the_old_file(suffix, tmp_path, monkeypatch):
  path = tmp_path / f"model{suffix}"
  write_state_dict(path, {"w": np.zeros(2)})
  old = path.read_bytes()

  def fail(handle):
    raise OSError("disk full")

  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(ConversionError, match="model.*cannot be written .*disk full"):
    write_state_dict(path, {"w": np.ones(2)})
  assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


@every_format
@pytest.mark.parametrize(
  "tensors, config, error",
  [
    ({}, None, "there are no tensors"),
    ({1: np.zeros(2)}, None, "must be strings: rename 1"),
    ({"a": np.zeros(2), "b": np.array([None])}, None, r"leave out or cast 'b' \(\|O\)"),
    ({"a": np.array(["text"])}, None, r"'a' \(<U4\)"),
    ({"a": np.zeros(2, ">f4")}, None, r"'a' \(>f4\)"),
    ({"a": np.zeros(2, "V2")}, None, r"'a' \(\|V2\)"),
    ({"a": np.zeros(2)}, {"x": {1, 2}}, "written .*set is not JSON"),
  ],
)
def test_what_cannot_be_read_back_is_not_written(suffix, tensors, config, error, tmp_path):
  with pytest.raises(ConversionError, match=error):
    write_state_dict(tmp_path / f"new/model{suffix}", tensors, config)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["", ".h5", ".safetensors.index.json"])
def test_an_unknown_suffix_names_the_known_ones(suffix, tmp_path):
  path = tmp_path / f"model{suffix}"
  path.write_bytes(b"anything")
  formats = "none of .safetensors, .npz, .pt, .pth, .bin, .ckpt"
  assert formats in error_of(path)
  with pytest.raises(ConversionError, match=formats):
    write_state_dict(path, {"w": np.zeros(2)})


@every_format
def test_files_that_are_none(suffix, tmp_path):
  path = tmp_path / f"model{suffix}"
  assert error_of(path) == "does not exist"
  path.mkdir()
  assert error_of(path) == "is a directory, not a file"
  assert error_of(tmp_path) == "is a directory, not a file"
  path.rmdir()
  path.touch()
  assert error_of(path) == "is empty: fetch it again"


@every_format
@pytest.mark.parametrize("kept", [1, 7, 9, 20, 64, 200, 0.3, 0.6, 0.9, 0.99, -30, -1])
def test_a_truncated_file_is_found(suffix, kept, tmp_path):
  path = tmp_path / f"model{suffix}"
  write_state_dict(path, some_tensors(), CONFIG)
  content = path.read_bytes()
  path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
  assert "cannot be read: is it whole" in error_of(path)


@every_format
@pytest.mark.parametrize("content", [b"<html>Not found</html>\n", b"\x80\x02}.", b"\0" * 100])
def test_other_content_is_found(suffix, content, tmp_path):
  path = tmp_path / f"model{suffix}"
  path.write_bytes(content)
  assert "cannot be read: is it whole" in error_of(path)


@every_format
def test_a_zip_that_is_no_checkpoint_is_found(suffix, tmp_path):
  path = tmp_path / f"model{suffix}"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("readme.txt", "hello")
  named = "leave out or cast 'readme.txt' (|S5)"
  assert (named if suffix == ".npz" else "cannot be read: is it whole") in error_of(path)


def hidden_call(sentinel: pathlib.Path) -> bytes:
  """A pickle that makes a folder when it is loaded without care."""
  return b"cos\nmkdir\n(V" + str(sentinel).encode() + b"\ntR."


@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
@pytest.mark.parametrize("suffix", TORCH_SUFFIXES)
@needs_torch
def test_code_in_a_pickle_is_not_run(suffix, zipped, tmp_path):
  path, sentinel = tmp_path / f"model{suffix}", tmp_path / "sentinel"
  path.write_bytes(hidden_call(sentinel))
  if zipped:
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr("archive/version", "3\n")
      archive.writestr("archive/data.pkl", hidden_call(sentinel))
  assert "would have to run os.mkdir" in error_of(path)
  assert not sentinel.exists()


class Hidden:
  """Makes a folder when it is unpickled without care."""

  def __init__(self, sentinel: pathlib.Path):
    self.sentinel = str(sentinel)

  def __reduce__(self):
    return os.mkdir, (self.sentinel,)


@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
@needs_torch
def test_code_beside_the_tensors_is_not_run(zipped, tmp_path):
  import torch

  path, sentinel = tmp_path / "model.pt", tmp_path / "sentinel"
  saved = {"model": {"w": torch.zeros(2)}, "args": Hidden(sentinel)}
  torch.save(saved, path, _use_new_zipfile_serialization=zipped)
  assert 're-save only its "model" entry' in error_of(path)
  assert not sentinel.exists()


def test_code_in_an_npz_is_not_run(tmp_path):
  path, sentinel = tmp_path / "model.npz", tmp_path / "sentinel"
  np.savez(path, w=np.zeros(2), x=np.array([Hidden(sentinel)], dtype=object))
  assert "Object arrays cannot be loaded" in error_of(path)
  np.savez(path, **{"param/w": np.zeros(2)}, x=np.array([Hidden(sentinel)], dtype=object))
  assert_same(read_state_dict(path).tensors, {"w": np.zeros(2)})
  assert not sentinel.exists()


@every_format
def test_tensors_that_are_not_finite_are_named(suffix, tmp_path):
  path = tmp_path / f"model{suffix}"
  tensors = {
    "nan": np.array([1, np.nan], np.float16),
    "inf": np.array(-np.inf, BFLOAT16),
    "good": np.ones(2),
    "int": np.ones(2, np.int8),
  }
  write_state_dict(path, tensors)
  assert "NaN or infinity in 'inf', 'nan': " in error_of(path)
  assert_same(read_state_dict(path, finite=False).tensors, tensors)


def test_long_lists_of_names_are_cut():
  bad = {f"layers.{i}": np.array(np.nan) for i in range(7)}
  with pytest.raises(ConversionError, match="'layers.3', 'layers.4' and 2 more: "):
    check_finite(bad)
  check_finite({"a": np.ones(2)})


@pytest.mark.parametrize("prefix, name", [("param/", "config"), ("sd/", "meta"), ("", "config")])
def test_npz_with_a_configuration(prefix, name, tmp_path):
  """As reference arrays are kept: gradients and inputs beside the parameters are not read."""
  path = tmp_path / "model.npz"
  beside = {"grad/w": np.array(np.nan), "x": np.array([None])} if prefix else {}
  if name == "meta":
    beside["config"] = np.zeros(3)
  configuration = {name: np.array(json.dumps(CONFIG))}
  np.savez(path, **{f"{prefix}w": np.ones(2), f"{prefix}b": np.zeros(2)}, **beside, **configuration)
  tensors, config = read_state_dict(path)
  assert_same(tensors, {"w": np.ones(2), "b": np.zeros(2)})
  assert config == CONFIG


def test_npz_of_numpy_itself(tmp_path):
  """`numpy.savez(path, **state_dict)`, also with names like those of a configuration."""
  path = tmp_path / "model.npz"
  tensors = {"w": np.ones((2, 2), BFLOAT16).T, "config": np.ones(2), "meta": np.zeros(())}
  np.savez(path, **tensors)
  state = read_state_dict(path)
  assert_same(state.tensors, tensors)
  assert state.config is None


def test_safetensors_of_its_own_library(tmp_path):
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file({"w": np.ones(2, BFLOAT16)}, path, metadata={"format": "pt"})
  state = read_state_dict(path)
  assert_same(state.tensors, {"w": np.ones(2, BFLOAT16)})
  assert state.config is None


@pytest.mark.parametrize(
  "text, error",
  [
    ("{", "is not JSON"),
    ("", "is not JSON"),
    ("[1]", r"is not a JSON object: \[1\]"),
    ("null", ""),
  ],
)
def test_a_configuration_is_a_json_object(text, error, tmp_path):
  npz, safe = tmp_path / "model.npz", tmp_path / "model.safetensors"
  np.savez(npz, **{"param/w": np.ones(2), "config": np.array(text)})
  safetensors.numpy.save_file({"w": np.ones(2)}, safe, metadata={"config": text})
  for path in (npz, safe):
    if error:
      with pytest.raises(ConversionError, match=f"its configuration {error}"):
        read_state_dict(path)
    else:
      assert read_state_dict(path).config is None


@pytest.mark.parametrize("suffix", TORCH_SUFFIXES)
def test_without_torch_the_error_says_what_to_do(suffix, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  path = tmp_path / f"model{suffix}"
  with pytest.raises(ConversionError, match="pip install torch, or use .safetensors"):
    write_state_dict(path, {"w": np.ones(2)})
  assert list(tmp_path.iterdir()) == []
  path.write_bytes(b"anything")
  assert "pip install torch, or use .safetensors" in error_of(path)


@pytest.mark.parametrize("zipped", [False, True], ids=["legacy", "zip"])
@pytest.mark.parametrize("nested", [None, "model", "state_dict", "module"])
@needs_torch
def test_checkpoints_of_torch(nested, zipped, tmp_path):
  """Tied, strided and trained tensors, and fairseq's arguments beside them."""
  import torch

  weight = torch.arange(12.0).reshape(3, 4)
  half = weight.bfloat16()
  state = {
    "w": torch.nn.Parameter(weight),
    "tied": weight,
    "strided": weight.t()[1:],
    "half": weight.half().t(),
    "bfloat16": half.t()[::2],
    "bfloat16 tied": half,
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "model": torch.ones(1, dtype=torch.bool),
  }
  beside = {"args": argparse.Namespace(lr=[0.1]), "epoch": 3, "config": {"not": "JSON"}}
  path = tmp_path / "model.pt"
  saved = {nested: state, **beside} if nested else state
  torch.save(saved, path, _use_new_zipfile_serialization=zipped)
  tensors, config = read_state_dict(path)
  w = np.arange(12, dtype=np.float32).reshape(3, 4)
  expected = {
    "w": w,
    "tied": w,
    "strided": w.T[1:],
    "half": w.T.astype(np.float16),
    "bfloat16": w.T[::2].astype(BFLOAT16),
    "bfloat16 tied": w.astype(BFLOAT16),
    "scalar": np.array(2.5, BFLOAT16),
    "model": np.array([True]),
  }
  assert_same(tensors, expected)
  assert config is None
  # In memory tied tensors stay one.
  assert np.shares_memory(tensors["w"], tensors["tied"])
  assert np.shares_memory(tensors["bfloat16"], tensors["bfloat16 tied"])
  # And what was read can be written in any format.
  for suffix in (".safetensors", ".npz", ".pt"):
    write_state_dict(tmp_path / f"copy{suffix}", tensors)
    assert_same(read_state_dict(tmp_path / f"copy{suffix}").tensors, expected)


def _npy(shape: tuple[int, ...], content: bytes = b"") -> bytes:
  handle = io.BytesIO()
  header = {"descr": "<f4", "fortran_order": False, "shape": shape}
  np.lib.format.write_array_header_1_0(handle, header)
  return handle.getvalue() + content


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
@pytest.mark.parametrize(
  "name", ["../w.npy", "/w.npy", "a/../../w.npy", "..\\w.npy", "\\w.npy", "a/.."]
)
def test_archives_whose_members_would_lie_elsewhere_are_refused(name, suffix, tmp_path):
  path = tmp_path / f"model{suffix}"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr(name, _npy((2,), bytes(8)))
  assert error_of(path).startswith(f"holds a file that would lie elsewhere, {name!r}")


def test_archives_that_would_fill_the_memory_are_refused_by_what_they_claim(tmp_path, monkeypatch):
  """Before anything is unpacked; one that is only well packed is read."""
  path = tmp_path / "model.npz"
  zeros = np.zeros(10**6, np.float32)
  np.savez_compressed(path, w=zeros)
  assert_same(read_state_dict(path).tensors, {"w": zeros})
  monkeypatch.setattr(files, "_MOST_UNPACKED", 10**6)
  assert "would unpack to 4,000,128 bytes: save it anew, uncompressed" in error_of(path)
  monkeypatch.setattr(files, "_MOST_RATIO", 10**6)
  assert_same(read_state_dict(path).tensors, {"w": zeros})


@pytest.mark.parametrize("shape", [(2**45,), (2**31, 2**31), (10**18,), (-1,), (3,)])
def test_shapes_beyond_their_bytes_are_refused(shape, tmp_path):
  npz, safe = tmp_path / "model.npz", tmp_path / "model.safetensors"
  with zipfile.ZipFile(npz, "w") as archive:
    archive.writestr("w.npy", _npy(shape, bytes(8)))
  header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}).encode()
  safe.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
  for path in (npz, safe):
    assert "cannot be read: is it whole" in error_of(path)


def test_two_members_of_one_name_and_tar_files_are_refused(tmp_path):
  path = tmp_path / "model.npz"
  with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for value in (0, 1):
      archive.writestr("w.npy", _npy((2,), bytes([value]) * 8))
  assert error_of(path) == "holds several files of one name"
  for suffix in (".npz", ".pt", ".safetensors"):
    path = tmp_path / f"tar{suffix}"
    with tarfile.open(path, "w") as archive:
      archive.addfile(tarfile.TarInfo("../storages"))
    assert error_of(path).startswith("is a tar file")
  assert not (tmp_path.parent / "storages").exists()


def test_a_configuration_that_is_nested_too_deeply_is_one_line(tmp_path):
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file({"w": np.ones(2)}, path, metadata={"config": "[" * 100_000})
  assert "its configuration is not JSON" in error_of(path)


@needs_torch
def test_torch_files_that_hold_something_else(tmp_path):
  import torch

  w = torch.zeros(2)
  table = [
    ([w], "holds a list: save model.state_dict()"),
    (w, "holds a Tensor: "),
    ({"w": w, "epoch": 3, "name": "x"}, "without 'epoch', 'name'"),
    ({"model": {"w": w, "extra": None}}, "without 'extra'"),
    ({"model": {}, "w": w}, "there are no tensors"),
    ({}, "there are no tensors"),
    ({0: w}, "names must be strings: rename 0"),
    ({"w": w.to(torch.complex64)}, "leave out or cast 'w' (<c8)"),
    ({"w": torch.eye(2).to_sparse()}, "cannot be read: is it whole, and of plain tensors? (TypeE"),
    ({"model": {"w": w}, "config": "[]"}, "its configuration is not a JSON object"),
    ({"model": {"w": w}, "args": pathlib.PurePosixPath("x")}, "would have to run pathlib"),
  ]
  path = tmp_path / "model.pt"
  for saved, error in table:
    torch.save(saved, path)
    assert error in error_of(path)


@needs_torch
def test_allowing_namespaces_ends_with_the_reading(tmp_path):
  import torch

  path = tmp_path / "model.pt"
  torch.save({"model": {"w": torch.zeros(2)}, "args": argparse.Namespace()}, path)
  read_state_dict(path)
  assert argparse.Namespace not in torch.serialization.get_safe_globals()


@needs_torch
@pytest.mark.parametrize("config", [None, CONFIG], ids=["none", "config"])
def test_torch_reads_what_is_written(config, tmp_path):
  import safetensors.torch
  import torch

  tensors = {"w": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.ones(2, BFLOAT16)}
  write_state_dict(tmp_path / "model.pt", tensors, config)
  write_state_dict(tmp_path / "model.safetensors", tensors, config)
  loaded = torch.load(tmp_path / "model.pt", weights_only=True)["model"]
  for state in (loaded, safetensors.torch.load_file(tmp_path / "model.safetensors")):
    assert state["b"].dtype == torch.bfloat16
    torch.testing.assert_close(state["w"], torch.arange(6.0).reshape(2, 3).t())
