"""Where PyTorch's tensors lie in our parameter trees: one table a model, read in both directions.

PyTorch keeps one tensor a layer, its linear weights as [out, in] and convolutions as [out, in, h,
w]; we keep one array a segment, with a leading axis of its repeats, and kernels as [in, out], both
perhaps split into heads. A `Place` pairs the two. The list of places is made by walking over our
own tree, so no parameter of ours can be forgotten, and what a state dict holds beside them is an
error.
"""

import collections
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from magneto_jax.convert.files import ConversionError, check_finite

# Our name of a parameter -> PyTorch's, inside one module.
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

Path = tuple[str, ...]


class Place(NamedTuple):
  """One tensor: its name in the state dict, and where it lies in our tree.

  Attributes:
    name: in the state dict.
    path: of the array in our parameters.
    layer: the slice of its leading axis; None for the whole array.
    shape: of the tensor in the state dict.
    to_torch: from the array, or its slice, to the tensor.
    to_ours: from the tensor to the array, or its slice.
  """

  name: str
  path: Path
  layer: int | None
  shape: tuple[int, ...]
  to_torch: Callable[[np.ndarray], np.ndarray]
  to_ours: Callable[[np.ndarray], np.ndarray]


def _reshaped(ours: tuple[int, ...], theirs: tuple[int, ...]):
  return theirs, lambda array: array.reshape(theirs), lambda tensor: tensor.reshape(ours)


def _linear(ours: tuple[int, ...], axes_in: int):
  """A kernel [in..., out...] whose first `axes_in` axes are the input's."""
  fan_in = int(np.prod(ours[:axes_in]))
  theirs = (int(np.prod(ours)) // fan_in, fan_in)
  return (
    theirs,
    lambda array: array.reshape(fan_in, -1).T,
    lambda tensor: tensor.T.reshape(ours),
  )


def _convolution(ours: tuple[int, ...]):
  """A kernel [h, w, in, out]."""
  height, width, fan_in, fan_out = ours
  swap = lambda array: array.transpose(3, 2, 0, 1)
  back = lambda tensor: tensor.transpose(2, 3, 1, 0)
  return (fan_out, fan_in, height, width), swap, back


def _forms(path: Path, shape: tuple[int, ...]):
  """(their shape, to_torch, to_ours) of one parameter of one layer."""
  leaf = path[-1]
  if leaf == "logit_scale":  # Without an axis, which fairseq's scalars have.
    return _reshaped((), ())
  if leaf == "kernel" and "projection" in path:
    return _convolution(shape)
  if leaf == "kernel":
    return _linear(shape, 2 if "out" in path[-3:] else 1)
  if leaf.endswith("_token"):
    return _reshaped(shape, (1, 1, *shape))
  if leaf == "embedding" or len(shape) == 2 and leaf != "bias":
    return _reshaped(shape, shape)
  return _reshaped(shape, (int(np.prod(shape)),))


def places(params_shapes: Mapping, name_of: Callable[[Path, int | None], str]) -> list[Place]:
  """All places of a model.

  Args:
    params_shapes: the tree of parameters, of arrays or of their shapes.
    name_of: from the path of a parameter, without segments and blocks, and its layer (None outside
      of layers) to its name in the state dict. Raises KeyError for what it does not know.
  """
  flat = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params_shapes).items()}
  found = []
  for path, shape in flat.items():
    for short, layer, index in _layers(path, flat):
      form = _forms(path, shape if index is None else shape[1:])
      try:
        found.append(Place(name_of(short, layer), path, index, *form))
      except KeyError:
        raise ConversionError(f"{'/'.join(path)} has no counterpart there") from None
  return found


def _layers(path: Path, flat: Mapping[Path, Any]) -> Iterator[tuple[Path, int | None, int | None]]:
  """(path without segment and block, layer, slice of the leading axis) of each tensor in an array.

  The layers of a stack are counted through its segments, and in each through its patterns.
  """
  if not any(part.startswith("segment_") for part in path):
    yield path, None, None
    return
  at = next(i for i, part in enumerate(path) if part.startswith("segment_"))
  blocks, repeats = collections.defaultdict(set), {}
  for other, shape in flat.items():
    if other[:at] == path[:at] and other[at].startswith("segment_"):
      blocks[other[at]].add(other[at + 1])
      repeats[other[at]] = shape[0]
  segment, block = path[at : at + 2]
  number = lambda name: int(name.rsplit("_", 1)[1])
  earlier = [s for s in blocks if number(s) < number(segment)]
  first = sum(len(blocks[s]) * repeats[s] for s in earlier) + number(block)
  for repeat in range(repeats[segment]):
    layer = first + repeat * len(blocks[segment])
    yield path[:at] + path[at + 2 :], layer, repeat


def shapes_of(model, *inputs, **kwargs) -> dict:
  """The shapes of a model's parameters; nothing is computed."""
  return jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **kwargs))["params"]


def read(
  found: list[Place],
  tensors: Mapping[str, np.ndarray],
  *,
  copies: Container[str] = (),
  known: Callable[[str], bool] = lambda name: False,
) -> tuple[dict, dict[str, np.ndarray]]:
  """Our parameters, and the tensors that are known but no parameter.

  Args:
    found: the places of the model.
    tensors: the state dict.
    copies: names that may be there, of tensors that are another of the places (tied weights).
    known: whether a name is no parameter but may be there.

  Raises:
    ConversionError: naming every tensor that is missing, unknown, of another shape, of integers or
      not finite.
  """
  places_of = {place.name: place for place in found}
  rest = {name: tensor for name, tensor in tensors.items() if name not in places_of}
  held = {name: tensor for name, tensor in tensors.items() if name in places_of}
  groups = {
    "missing": [name for name in places_of if name not in held],
    "unknown": [name for name in rest if name not in copies and not known(name)],
    "wrong shape": [
      f"{name} {list(tensor.shape)}, expected {list(places_of[name].shape)}"
      for name, tensor in held.items()
      if tensor.shape != places_of[name].shape
    ],
    "no floats": [n for n, t in held.items() if not jnp.issubdtype(t.dtype, jnp.floating)],
  }
  listed = {what: ", ".join(map(_printable, sorted(names))) for what, names in groups.items()}
  complaints = [f"{what}: {names}" for what, names in listed.items() if names]
  if complaints:
    raise ConversionError("the tensors do not fit the model: " + "; ".join(complaints))
  with np.errstate(over="ignore"):  # Of float64; what becomes infinite is found.
    held = {name: np.asarray(tensor, np.float32) for name, tensor in held.items()}
  check_finite(held)

  flat = {}
  slices = collections.defaultdict(dict)
  for place in found:
    array = place.to_ours(held[place.name])
    if place.layer is None:
      flat[place.path] = jnp.asarray(array)
    else:
      slices[place.path][place.layer] = array
  for path, layers in slices.items():
    flat[path] = jnp.asarray(np.stack([layers[i] for i in range(len(layers))]))
  kept = {name: tensor for name, tensor in rest.items() if name not in copies}
  return traverse_util.unflatten_dict(flat), kept


def _printable(text: str) -> str:
  """Names come from files, and might hold what a terminal obeys."""
  return text if text.isprintable() else repr(text)


def write(
  found: list[Place], params: Mapping, *, copies: Mapping[str, str] = {}
) -> dict[str, np.ndarray]:
  """The state dict of our parameters; also of any tree like them, such as gradients."""
  flat = {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params).items()}
  tensors = {}
  for place in found:
    array = flat[place.path] if place.layer is None else flat[place.path][place.layer]
    tensors[place.name] = np.asarray(place.to_torch(array), order="C")
  return tensors | {copy: tensors[original] for copy, original in copies.items()}


def begin_positions_at(tensors: dict[str, np.ndarray], prefix: str, ours: int, theirs: int) -> None:
  """Puts rows that are never read before tables of positions that begin too early for a library.

  Args:
    tensors: a state dict, changed in place.
    prefix: of the tables' names.
    ours: the row of position 0 in the model.
    theirs: the row of position 0 in the library.
  """
  for name in [name for name in tensors if name.startswith(prefix)]:
    if ours > theirs:
      raise ConversionError(f"position_offset={ours}, but positions begin at {theirs} there")
    tensors[name] = np.pad(tensors[name], ((theirs - ours, 0), (0, 0)))
