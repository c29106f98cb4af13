"""How arrays are laid out over a mesh of devices: two tables, and the functions that read them.

Layers hold plain arrays and know no mesh. A parameter is placed by its path: PARAMETERS gives its
dimensions logical names, and WEIGHT_AXES says which axes of the mesh cut a dimension of that name.
Activations are placed where a layer calls `constrain` with logical names (ACTIVATION_AXES), which
does nothing outside `use_mesh`. All else is left to XLA; where a collective is written by hand, it
is written with `jax.shard_map` (`kernels.sharded_attention`).
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# From the slowest network to the fastest, as neighbours in the last axis are the nearest devices:
# slices are joined by the data centre's network, and tensor parallelism moves the most.
MESH_AXES = ("slice", "data", "fsdp", "sequence", "tensor")

# What cuts the dimensions of activations.
ACTIVATION_AXES: dict[str, tuple[str, ...]] = {
  "batch": ("slice", "data", "fsdp"),
  "length": ("sequence",),
  "heads": ("tensor",),
  "ffn": ("tensor",),
  "vocab": ("tensor",),
}

# What cuts those of parameters, and of all that is kept for each of them.
WEIGHT_AXES: dict[str, tuple[str, ...]] = {
  "embed": ("fsdp",),
  "heads": ("tensor",),
  "ffn": ("tensor",),
  "vocab": ("tensor",),
}

# The last dimensions of every parameter of every model, by the end of its path; what stands before
# them (a scan's layers) is cut by nothing, as is what is called None. Between a module and its
# parameter there may be the name of an expert. Exactly one entry matches each path. Layers that
# are not the library's have rows of their own (`tasks.register`).
PARAMETERS: list[tuple[str, tuple[str | None, ...]]] = [
  ("(self|cross)_attention/(query|key|value)/kernel", ("embed", "heads", None)),
  ("(self|cross)_attention/(query|key|value)/bias", ("heads", None)),
  ("(self|cross)_attention/out/kernel", ("heads", None, "embed")),
  ("(self|cross)_attention/out/bias", (None,)),
  ("(self|cross)_attention/mid_norm/(scale|bias)", ("heads",)),
  ("(self|cross)_attention/(query|key)_norm/(scale|bias)", (None,)),
  ("(self|cross)_attention/head_scale", ("heads",)),
  ("ffn/(wi|wi_gate)/kernel", ("embed", "ffn")),
  ("ffn/(wi|wi_gate)/bias", ("ffn",)),
  ("ffn/wo/kernel", ("ffn", "embed")),
  ("ffn/wo/bias", (None,)),
  ("ffn/mid_norm/(scale|bias)", ("ffn",)),
  # Of a few numbers a channel or fewer: whole on every device.
  (r"\w+_residual/(in|out|post)_norm/(scale|bias)", (None,)),
  (r"\w+_residual/(in_scale|skip|branch)", ()),
  ("(embedding|final|head|pooler)_norm/(scale|bias)", (None,)),
  ("(token|text|output)_embedding/embedding", ("vocab", "embed")),
  (r"position_embedding(s_\w+)?/embedding", (None, "embed")),
  ("(cross_|patch_)?relative_bias", (None, "heads")),
  ("patch_embedding/projection/kernel", (None, None, None, "embed")),
  ("patch_embedding/projection/bias", (None,)),
  ("patch_embedding/(class|mask)_token", (None,)),
  (r"front_end/(conv_\d|projection)/kernel", (None, "embed")),
  # Of few channels, which need not divide by anything.
  (r"front_end/vgg_\d/kernel", (None,)),
  (r"front_end/(conv_\d|vgg_\d|projection)/bias", (None,)),
  # Read anew at every step of a loop, where exchanging them takes longer than the step.
  (r"predictor/lstm_\d+/[ih][ifgo]/(kernel|bias)", (None,)),
  ("joiner_(encoder|predictor)/kernel", ("embed", None)),
  ("joiner_encoder/bias", (None,)),
  ("joiner_out/kernel", ("embed", "vocab")),
  ("joiner_out/bias", ("vocab",)),
  ("ctc_head/kernel", ("embed", None)),
  ("ctc_head/bias", (None,)),
  ("quantizer/(hidden|projection)/kernel", ("embed", None)),
  ("quantizer/(hidden|projection)/bias", (None,)),
  ("code_embedding/kernel", (None, "embed")),
  ("code_embedding/bias", (None,)),
  ("(head|pooler)_dense/kernel", (None, "embed")),
  ("(head|pooler)_dense/bias", (None,)),
  ("head_bias", ("vocab",)),
  # Of a few classes, which need not divide by anything.
  ("head_out/kernel", ("embed", None)),
  ("head_out/bias", (None,)),
  ("(image|text)_head/kernel", (None, "embed")),
  ("logit_scale", ()),
]


# ---------------------------------------------------------------------------------------------
# The mesh
# ---------------------------------------------------------------------------------------------


def resolve(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
  """The sizes of all MESH_AXES, those left out 1 and the one of -1 what is left of the devices.

  Raises:
    ValueError: if they do not make up the number of devices.
  """
  full = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
  open_axes = [axis for axis, size in full.items() if size == -1]
  known = math.prod(size for size in full.values() if size != -1)
  written = " x ".join(f"{axis}={size}" for axis, size in full.items() if size != 1) or "data=1"
  if len(open_axes) > 1:
    raise ValueError(f"the mesh {written} leaves more than one axis open: only one may be -1")
  if open_axes and devices % known == 0:
    full[open_axes[0]] = devices // known
  elif open_axes or known != devices:
    raise ValueError(
      f"the mesh {written} does not fit {devices} devices: {known} must"
      f" {'divide them' if open_axes else 'be their number'}; for these set {_all_of_one(full)}"
    )
  return full


def _all_of_one(full: Mapping[str, int]) -> str:
  """The fields of the config that change sizes to those of one axis that has all devices."""
  whole = "fsdp" if full["fsdp"] != 1 else "data"
  sizes = {axis: -1 if axis == whole else 1 for axis in MESH_AXES}
  fields = {axis: "slices" if axis == "slice" else axis for axis in MESH_AXES}
  changed = [axis for axis in MESH_AXES if full[axis] != sizes[axis]]
  return ", ".join(f"mesh.{fields[axis]}={sizes[axis]}" for axis in changed)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of these sizes (see `resolve`) over the devices, all there are by default.

  On TPUs neighbours in the mesh are neighbours in the torus (`jax.experimental.mesh_utils`);
  elsewhere devices keep their order, a process's being consecutive. With several slices the axis
  `slice` alone crosses the data centre's network, where the devices say which slice they are of.
  """
  devices = jax.devices() if devices is None else list(devices)
  shape = tuple(resolve(sizes, len(devices)).values())
  if devices[0].platform != "tpu":
    # Their `slice_index`, where they have one, counts hosts, which a mesh may cut as it likes.
    array = np.array(devices, dtype=object).reshape(shape)
  else:
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices != shape[0]:
      raise ValueError(f"the devices are of {slices} slices: set mesh.slices={slices}")
    if slices > 1:
      within, between = (1, *shape[1:]), (slices, *(1,) * (len(shape) - 1))
      array = mesh_utils.create_hybrid_device_mesh(
        within, between, devices, allow_split_physical_axes=True
      )
    else:
      array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


# Part of the key of jit's caches: what was traced for one mesh is traced again for another.
_context = jax.make_user_context((None, False))


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None, *, strict: bool = False) -> Iterator[None]:
  """What is traced within the `with` is laid out over the mesh; on one device nothing changes.

  Args:
    mesh: of `make_mesh`.
    strict: whether `constrain` refuses a dimension that its axes do not divide, so that no device
      does what others do too; else the dimension is not cut.
  """
  with _context((None, False) if mesh is None or mesh.size == 1 else (mesh, strict)):
    yield


def current() -> Mesh | None:
  """The mesh of the enclosing `use_mesh`; None outside, and on one device."""
  return _context.value[0]


def parts(name: str) -> int:
  """Into how many parts a dimension of activations is cut by the present mesh; 1 without one."""
  mesh = current()
  return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ACTIVATION_AXES[name])


# ---------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """x, laid out as the names of its dimensions say; x itself without a mesh.

  A dimension that its axes do not divide (a batch of one, one new token) is not cut.

  Raises:
    ValueError: if the mesh is used strictly, for such a dimension.
  """
  mesh, strict = _context.value
  if mesh is None:
    return x
  for name, size in zip(names, x.shape, strict=True) if strict else ():
    if name and size % parts(name):
      raise ValueError(
        f"mesh.{ACTIVATION_AXES[name][-1]}: {parts(name)} parts do not divide the {size} of the"
        f" {name} {list(x.shape)}: change the mesh, or the sizes"
      )
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, activation_spec(x.shape, *names)))


def replicate(tree):
  """The arrays of a tree, whole on every device, so that any host can read them."""
  return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), tree)


def activation_spec(shape: tuple[int, ...], *names: str | None) -> PartitionSpec:
  """The spec that `constrain` gives an array of this shape on the present mesh."""
  if len(names) != len(shape):
    raise ValueError(f"{names} do not name the dimensions of {list(shape)}")
  fits = (name and size % parts(name) == 0 for name, size in zip(names, shape, strict=True))
  cut = (ACTIVATION_AXES[n] if fit else () for n, fit in zip(names, fits, strict=True))
  return _spec(current(), cut)


def batch_sharding(mesh: Mesh, rank: int) -> NamedSharding:
  """Of an array [batch, ...] that a step is given: each device holds its rows, whole."""
  cut = (ACTIVATION_AXES["batch"], *((),) * (rank - 1))
  return NamedSharding(mesh, _spec(mesh, cut))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, PartitionSpec())


def rows_of_process(mesh: Mesh, batch_size: int, process: int | None = None) -> list[int]:
  """The rows of a global batch that the devices of a process hold; of this one by default.

  With a tensor or sequence axis across processes some hold the same rows.

  Raises:
    ValueError: if the batch cannot be cut as the mesh asks, or not so that any two processes hold
      the same rows or none in common, and all equally many.
  """
  process = jax.process_index() if process is None else process
  cuts = math.prod(mesh.shape[axis] for axis in ACTIVATION_AXES["batch"])
  if batch_size % cuts:
    axes = " x ".join(f"{a}={mesh.shape[a]}" for a in ACTIVATION_AXES["batch"] if mesh.shape[a] > 1)
    raise ValueError(f"a batch of {batch_size} rows cannot be cut {cuts} times (mesh: {axes})")
  places = batch_sharding(mesh, 1).devices_indices_map((batch_size,))
  held: dict[int, set[int]] = {}
  for device, (rows,) in places.items():
    held.setdefault(device.process_index, set()).update(range(batch_size)[rows])
  apart = {tuple(sorted(rows)) for rows in held.values()}
  if len({len(rows) for rows in apart}) > 1 or sum(map(len, apart)) != batch_size:
    raise ValueError(
      "the mesh cuts rows of a batch between processes: make mesh.tensor x mesh.sequence divide the"
      " devices of a process, or be a multiple of them"
    )
  return sorted(held.get(process, ()))


# ---------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------


def parameter_axes(path: str, patterns=PARAMETERS) -> tuple[str | None, ...]:
  """The names of the last dimensions of the parameter at a path (`stack/.../wi/kernel`).

  Raises:
    ValueError: unless exactly one pattern matches.
  """
  found = [entry for entry in patterns if re.fullmatch(_regex(entry[0]), path)]
  if len(found) != 1:
    matching = ", ".join(pattern for pattern, _ in found) or "none"
    raise ValueError(f"{path} must match one pattern of sharding.PARAMETERS; it does {matching}")
  return found[0][1]


def _regex(pattern: str) -> str:
  *module, leaf = pattern.rsplit("/", 1)
  return r"(.*/)?" + (rf"{module[0]}(/\w+)?/{leaf}" if module else leaf)


def path_name(path) -> str:
  """`stack/segment_0/...` of a key path of `jax.tree_util`."""
  return "/".join(str(getattr(key, "key", key)) for key in path)


def parameter_shardings(params, mesh: Mesh, patterns=PARAMETERS):
  """A NamedSharding for each parameter of a tree (arrays or shapes), by the tables.

  Raises:
    ValueError: if a pattern is missing, or an axis does not divide what it cuts.
  """

  def place(path, leaf):
    name = path_name(path)
    axes = parameter_axes(name, patterns)
    names = (None,) * (len(leaf.shape) - len(axes)) + axes
    cut = [WEIGHT_AXES[axis] if axis else () for axis in names]
    for size, axis, by in zip(leaf.shape, names, cut, strict=True):
      into = math.prod(mesh.shape[a] for a in by)
      if size % into:
        raise ValueError(
          f"mesh.{by[0]}={into} does not divide the {size} of {name} {list(leaf.shape)} ({axis}):"
          " change the mesh or the model's sizes"
        )
    return NamedSharding(mesh, _spec(mesh, cut))

  return jax.tree_util.tree_map_with_path(place, params)


def variable_shardings(variables: Mapping, mesh: Mesh) -> dict:
  """Of all collections: of `params` see `parameter_shardings`; others are whole on every device."""
  whole = replicated(mesh)
  others = {name: jax.tree.map(lambda _: whole, tree) for name, tree in variables.items()}
  return others | {"params": parameter_shardings(variables["params"], mesh)}


def constrain_parameters(params, patterns=PARAMETERS):
  """Parameters, or their gradients, laid out as `parameter_shardings` says; see `constrain`."""
  mesh = current()
  if mesh is None:
    return params
  return jax.lax.with_sharding_constraint(params, parameter_shardings(params, mesh, patterns))


def of(tree):
  """The shardings of a tree's arrays, or of shapes that have one."""
  return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _spec(mesh: Mesh | None, cut) -> PartitionSpec:
  """Axes of size 1 left out, so that what is not cut looks so."""
  entries = []
  for axes in cut:
    axes = tuple(axis for axis in axes if mesh is not None and mesh.shape[axis] > 1)
    entries.append(axes[0] if len(axes) == 1 else axes or None)
  return PartitionSpec(*entries)
