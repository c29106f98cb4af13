"""A function whose program is chosen when it is lowered, by the platform that is compiled for.

`jax.lax.platform_dependent` traces the programs of all platforms in any case and, in an export for
several of them, lowers each for all: a kernel for one platform alone cannot be a branch of it. Here
a program is traced when its platform asks for it.
"""

import dataclasses
import functools
import logging
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from magneto_jax.kernels import jax_names

_logger = logging.getLogger(__name__)

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def here() -> str:
  """The one of PLATFORMS that is this process's default."""
  backend = jax.default_backend()
  if backend != "gpu":
    return backend
  return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"


@dataclasses.dataclass(frozen=True)
class _Program:
  """What is static of a call.

  Attributes:
    choice: has `on(platform)`, the record of a platform, which raises NotImplementedError where
      there is none, and `default`, which runs everywhere that `on` allows. The `platforms` of a
      record are None where XLA compiles all of it, and can do so anywhere.
    method: of the record; a function of arrays.
    structure: of its arguments.
    results: (shape, dtype) of all its results.
    batches: (size, in_axes) of each enclosing vmap, the innermost first.
  """

  choice: Any
  method: str
  structure: jax.tree_util.PyTreeDef
  results: tuple[tuple[tuple[int, ...], jax.typing.DTypeLike], ...]
  batches: tuple[tuple[int, tuple[int | None, ...]], ...] = ()

  def function(self, record):
    """The program of one of the choice's records: arrays to arrays."""

    def run(*leaves):
      arguments = jax.tree.unflatten(self.structure, leaves)
      return jax.tree.leaves(getattr(record, self.method)(*arguments))

    for _, in_axes in self.batches:
      run = jax.vmap(run, in_axes)
    return run


def call(choice, method: str, arguments: tuple, results):
  """`getattr(choice.on(platform), method)(*arguments)` for the platform that is compiled for.

  Args:
    choice: hashable; see `_Program`.
    results: a pytree of what comes out, as arrays or `jax.ShapeDtypeStruct`s.
  """
  leaves, structure = jax.tree.flatten(arguments)
  outs, out_structure = jax.tree.flatten(results)
  shapes = tuple((out.shape, out.dtype) for out in outs)
  found = _call(*leaves, program=_Program(choice, method, structure, shapes))
  return jax.tree.unflatten(out_structure, found)


@functools.partial(jax.jit, static_argnames="program")
def _call(*leaves, program: _Program):
  return _call_p.bind(*leaves, program=program)


_call_p = core.Primitive("by_platform")
_call_p.multiple_results = True


@_call_p.def_abstract_eval
def _(*avals, program):
  axes = frozenset().union(*map(jax_names.varying, avals))
  sizes = tuple(size for size, _ in reversed(program.batches))

  def result(shape, dtype):
    spec = jax.sharding.PartitionSpec(*[None] * (len(sizes) + len(shape)))
    return jax.core.ShapedArray(
      (*sizes, *shape),
      dtype,
      sharding=jax.sharding.NamedSharding(avals[0].sharding.mesh, spec),
      **jax_names.varying_over(axes),
    )

  return [result(*each) for each in program.results]


def _batch(leaves, in_axes, *, program):
  sizes = (x.shape[axis] for x, axis in zip(leaves, in_axes, strict=True) if axis is not None)
  program = dataclasses.replace(program, batches=(*program.batches, (next(sizes), tuple(in_axes))))
  outs = _call(*leaves, program=program)
  return outs, [0] * len(outs)


batching.primitive_batchers[_call_p] = _batch


def _differentiate(primals, tangents, *, program):
  raise NotImplementedError(
    f"{program.choice}: differentiable once, in reverse mode. For more name implementation='xla',"
    " or use kernels.use_implementation('xla')"
  )


ad.primitive_jvps[_call_p] = _differentiate


def _lower(platform, context, *leaves, program):
  platform = platform or context.module_context.platforms[0]
  record, default = program.choice.on(platform), program.choice.default
  # The programs are of one device each, and know nothing of an enclosing shard_map's axes.
  avals = [aval.update(**jax_names.varying_over()) for aval in context.avals_in]
  context = context.replace(avals_in=avals)
  cause = None
  obstacle = None if record.platforms is None else _obstacle(record, context.module_context)
  if obstacle is None:
    try:
      return mlir.lower_fun(program.function(record))(context, *leaves)
    except RuntimeError as error:
      # From JAX 0.11 on; what is lowered by then is used by nobody, and XLA drops it.
      if "AbstractDevice" not in str(error):
        raise
      obstacle, cause = f"{record.name} is compiled for one kind of GPU: {_NAME_THE_GPU}", error
  if record == default:
    raise NotImplementedError(obstacle) from cause
  _warn_once(obstacle, default.name)
  return mlir.lower_fun(program.function(default))(context, *leaves)


_NAME_THE_GPU = (
  "to compile where there is none, trace and lower under jax.sharding.use_abstract_mesh of a mesh"
  " whose abstract_device names it"
)


def _obstacle(record, context: mlir.ModuleContext) -> str | None:
  """Why a kernel cannot be part of a module, or None."""
  if _is_divided(context.axis_context):
    return (
      f"XLA cannot divide {record.name} among several devices: to have the kernel call"
      " kernels.sharded_attention, or attention within a jax.shard_map of batch and heads"
    )
  if context.lowering_parameters.for_export and not getattr(record, "is_exportable", True):
    return f"JAX cannot export {record.name}"
  return None


def _is_divided(axes) -> bool:
  """Whether XLA is left to divide a program among several devices, at least in part."""
  if isinstance(axes, mlir.ShardingContext):
    return axes.num_devices > 1
  if isinstance(axes, mlir.SPMDAxisContext):
    manual = axes.manual_axes | set(axes.mesh.manual_axes)
    return bool(axes.manual_axes) and manual != set(axes.mesh.axis_names)
  return False


@functools.cache
def _warn_once(obstacle: str, instead: str) -> None:
  _logger.warning("%s; %s serves instead", obstacle, instead)


for _platform in PLATFORMS:
  mlir.register_lowering(_call_p, functools.partial(_lower, _platform), platform=_platform)
mlir.register_lowering(_call_p, functools.partial(_lower, None))
