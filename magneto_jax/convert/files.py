"""State dicts in files: `.safetensors`, `.npz` and PyTorch's own, as NumPy arrays by name.

Nothing that a file holds is ever run. PyTorch is needed only for PyTorch's files.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from numpy.typing import ArrayLike

from magneto_jax.data import files

_BFLOAT16 = np.dtype(jnp.bfloat16)
# What every format can hold.
_DTYPES = {
  np.dtype(name)
  for name in (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", _BFLOAT16),
  )
}
# In an `.npz`: where the tensors are if other arrays lie beside them, and the configuration.
_PREFIXES = ("param/", "sd/")
_CONFIGS = ("config", "meta")
# In PyTorch's files: where the state dict is if it is not the whole object. fairseq, BEiT-3 and
# others write "model", Lightning "state_dict", DeepSpeed "module".
_NESTED = ("model", "state_dict", "module")


# No weights can be packed so well; a file that claims it is made to fill the memory.
_MOST_UNPACKED, _MOST_RATIO = 2**30, 100


class ConversionError(ValueError):
  """A checkpoint that cannot be converted; its text is one line that says what to do."""


class StateDict(NamedTuple):
  """A checkpoint: arrays by name, in the names' order, and the model's configuration if known."""

  tensors: dict[str, np.ndarray]
  config: dict[str, Any] | None = None


def read_state_dict(path: str | os.PathLike[str], *, finite: bool = True) -> StateDict:
  """Reads a checkpoint; bfloat16 stays bfloat16, and memory holds each tensor once.

  | suffix | tensors | configuration, a JSON object |
  |---|---|---|
  | `.safetensors` | all | `config` of the metadata |
  | `.npz` | under `param/` or `sd/` if there are such names, else all | string `config` or `meta` |
  | `.pt`, `.pth`, `.bin`, `.ckpt` | `model`, `state_dict` or `module`, else all | `config` beside |

  What else lies beside the tensors (gradients, an optimizer, `argparse` arguments) is ignored.

  Args:
    path: the file; its suffix says the format.
    finite: whether NaN and infinity are errors. Where only some of the tensors are of use, leave
      them to `check_finite`: fairseq saves a buffer that was never set.

  Raises:
    ConversionError: if there is no such file, or it is damaged, or holds anything else.
  """
  path = pathlib.Path(path)
  with _errors_of(path, "read: is it whole, and of plain tensors?"):
    if not path.is_file():
      raise ConversionError("is a directory, not a file" if path.is_dir() else "does not exist")
    if not path.stat().st_size:
      raise ConversionError("is empty: fetch it again")
    read, _ = _format(path)
    _refuse_archives(path)
    tensors, text = read(path)
    config = _parsed(text)
    tensors = _checked(tensors)
    if finite:
      check_finite(tensors)
  return StateDict(tensors, config)


def write_state_dict(
  path: str | os.PathLike[str],
  tensors: Mapping[str, ArrayLike],
  config: Mapping[str, Any] | None = None,
) -> None:
  """Writes a checkpoint that `read_state_dict` returns as it was, with the same bytes each time.

  Args:
    path: where to write; its suffix says the format. Missing parent directories are made. After a
      failure or a crash an old file is still there, and no part of a new one.
    tensors: arrays by name, of booleans, integers or floats.
    config: JSON-able.

  Raises:
    ConversionError: if the format cannot hold them, or the file cannot be written.
  """
  path = pathlib.Path(path)
  with _errors_of(path, "written"):
    _, write = _format(path)
    tensors = _checked({name: np.asarray(value) for name, value in tensors.items()})
    text = None if config is None else json.dumps(config, sort_keys=True)
    with files.durable_path(path) as temporary:
      write(temporary, tensors, text)


def check_finite(tensors: Mapping[str, np.ndarray]) -> None:
  """Raises ConversionError with the names of the arrays that hold a NaN or an infinity."""
  found = [name for name, array in tensors.items() if not np.isfinite(array).all()]
  if found:
    raise ConversionError(f"NaN or infinity in {_listed(found)}: take an earlier checkpoint")


def _format(path: pathlib.Path):
  """The reader and the writer of the path's suffix."""
  try:
    return _FORMATS[path.suffix.lower()]
  except KeyError:
    raise ConversionError(f"{path.suffix!r} is none of {', '.join(_FORMATS)}") from None


@contextlib.contextmanager
def _errors_of(path: pathlib.Path, doing: str) -> Iterator[None]:
  """Whatever fails is a ConversionError of one line that begins with the path."""
  try:
    yield
  except ConversionError as error:
    raise ConversionError(f"{path}: {error}") from error
  except Exception as error:  # NumPy, safetensors and PyTorch have no common one.
    # The first sentence only: PyTorch's next ones tell how to run what is in the file.
    reason = " ".join(str(error).split()).split(". ")[0]
    raise ConversionError(
      f"{path}: cannot be {doing} ({type(error).__name__}: {reason:.200})"
    ) from error


def _refuse_archives(path: pathlib.Path) -> None:
  """Refuses tar files, and zip files with odd names or that would unpack to far more than they are.

  Both are what `.npz` and PyTorch's files may be inside. Only what the zip's directory claims is
  read, which its readers do not go beyond.
  """
  with open(path, "rb") as file:
    head = file.read(512)
    if head[257:262] == b"ustar":
      raise ConversionError("is a tar file: save it anew with PyTorch 1.6 or later")
    if not head.startswith(b"PK"):
      return
    with zipfile.ZipFile(file) as archive:
      members = archive.infolist()
  for member in members:
    parts = re.split(r"[/\\]", member.filename)
    if ".." in parts or (parts[0] == "" and len(parts) > 1):
      raise ConversionError(f"holds a file that would lie elsewhere, {member.filename!r:.80}")
  names = [member.filename for member in members]
  if len(names) != len(set(names)):
    raise ConversionError("holds several files of one name")
  unpacked = sum(member.file_size for member in members)
  if unpacked > max(_MOST_UNPACKED, _MOST_RATIO * path.stat().st_size):
    raise ConversionError(f"would unpack to {unpacked:,} bytes: save it anew, uncompressed")


def _checked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The same by sorted name, if there are any and all are what every format can hold."""
  if not tensors:
    raise ConversionError("there are no tensors: give the file that holds the weights")
  unnamed = [name for name in tensors if not isinstance(name, str)]
  if unnamed:
    raise ConversionError(f"names must be strings: rename {_listed(unnamed)}")
  wrong = [name for name, array in tensors.items() if array.dtype not in _DTYPES]
  if wrong:
    dtype = tensors[wrong[0]].dtype.str
    raise ConversionError(f"not of plain numbers: leave out or cast {_listed(wrong)} ({dtype})")
  return dict(sorted(tensors.items()))


def _listed(names: Iterable[Any], most: int = 5) -> str:
  """The first of the names, and how many more there are."""
  names = [repr(name) for name in names]
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(names[:most]) + more


def _parsed(text: str | None) -> dict[str, Any] | None:
  try:
    config = None if text is None else json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ConversionError(f"its configuration is not JSON ({error}): write it anew") from error
  if not isinstance(config, dict | None):
    raise ConversionError(f"its configuration is not a JSON object: {config!r:.80}")
  return config


def _read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], str | None]:
  with safetensors.safe_open(path, framework="numpy") as file:
    tensors = {name: file.get_tensor(name) for name in file.keys()}
    return tensors, (file.metadata() or {}).get("config")


def _write_safetensors(path: pathlib.Path, tensors: dict[str, np.ndarray], text: str | None):
  # It writes an array's memory as it lies there, whatever the strides are.
  tensors = {name: np.asarray(array, order="C") for name, array in tensors.items()}
  metadata = None if text is None else {"config": text}
  # It makes files that only their owner can read.
  path.touch()
  mode = path.stat().st_mode
  safetensors.numpy.save_file(tensors, path, metadata=metadata)
  path.chmod(mode)


def _read_npz(path: pathlib.Path) -> tuple[dict[str, np.ndarray], str | None]:
  # Opened here, because of a damaged file NumPy itself leaves a handle open.
  with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
    names = archive.files
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in names)), "")
    wanted = [name for name in names if name.startswith(prefix) or name in _CONFIGS]
    # asarray: what is no array in the archive is bytes here.
    arrays = {name: np.asarray(archive[name]) for name in wanted}
  configs = [name for name in _CONFIGS if name in arrays and arrays[name].dtype.kind == "U"]
  texts = [str(arrays.pop(name)) for name in configs]
  tensors = {
    # NumPy does not know the name of bfloat16 and writes two bytes of no type.
    name.removeprefix(prefix): array.view(_BFLOAT16) if array.dtype == np.dtype("V2") else array
    for name, array in arrays.items()
    if name.startswith(prefix)
  }
  return tensors, next(iter(texts), None)


def _write_npz(path: pathlib.Path, tensors: dict[str, np.ndarray], text: str | None):
  arrays = {_PREFIXES[0] + name: array for name, array in tensors.items()}
  if text is not None:
    arrays[_CONFIGS[0]] = np.array(text)
  with open(path, "wb") as file:
    np.savez(file, **arrays)


def _torch():
  """PyTorch, which is not among the dependencies."""
  try:
    import torch
  except ImportError as error:
    raise ConversionError("needs PyTorch: pip install torch, or use .safetensors") from error
  return torch


def _read_torch(path: pathlib.Path) -> tuple[dict[str, np.ndarray], str | None]:
  torch = _torch()
  try:
    # fairseq and BEiT-3 keep their arguments in a Namespace, which only holds values.
    with torch.serialization.safe_globals([argparse.Namespace]):
      loaded = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # Whatever the bytes of a damaged file mean.
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused is None:
      raise
    raise ConversionError(
      f'would have to run {refused[1]}: if you trust it, re-save only its "model" entry'
    ) from error
  if not isinstance(loaded, dict):
    raise ConversionError(f"holds a {type(loaded).__name__}: save model.state_dict() instead")
  nested = [loaded[key] for key in _NESTED if isinstance(loaded.get(key), dict)]
  state = nested[0] if nested else loaded
  others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
  if others:
    raise ConversionError(f"not all are tensors: save it without {_listed(others)}")

  def to_numpy(tensor):
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
      return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()

  text = loaded.get("config")
  tensors = {name: to_numpy(tensor) for name, tensor in state.items()}
  return tensors, text if isinstance(text, str) else None


def _write_torch(path: pathlib.Path, tensors: dict[str, np.ndarray], text: str | None):
  torch = _torch()

  def to_torch(array):
    # Tensors cannot be read-only, which arrays of JAX are: those are copied.
    array = np.require(array, requirements=["C", "W"])
    if array.dtype == _BFLOAT16:
      return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)

  saved = {_NESTED[0]: {name: to_torch(array) for name, array in tensors.items()}}
  if text is not None:
    saved["config"] = text
  # Not the path: PyTorch would write its name into the file.
  with open(path, "wb") as file:
    torch.save(saved, file)


_FORMATS = {
  ".safetensors": (_read_safetensors, _write_safetensors),
  ".npz": (_read_npz, _write_npz),
  **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), (_read_torch, _write_torch)),
}
