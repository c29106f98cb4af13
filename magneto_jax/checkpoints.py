"""Checkpoints with Orbax: the state, the data iterator and the run's config."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp


class CheckpointError(OSError):
  """A checkpoint that cannot be read."""


class Checkpointer:
  """Saves and restores the parts of a run under `<directory>/<step>/`.

  A part is one Orbax item: `params`, `ema_params` (if the run averages its weights),
  `optimizer`, `data` (the iterator's place) and `config` (both JSON). Parts are separate so that a
  reader of the weights needs to know nothing of the optimizer. All hosts save and restore together;
  the place counts batches and is the same on all, however many there are.

  Saving is asynchronous: `save` returns when the arrays are copied; the next `save` and `close`
  wait for the files. A step whose files are incomplete is never listed.
  """

  def __init__(
    self, directory: str | pathlib.Path, *, keep: int | None = None, read_only: bool = False
  ):
    """Opens a directory.

    Args:
      directory: need not exist, unless `read_only`.
      keep: how many steps are kept; None for all.
      read_only: whether nothing is ever written, not even a clean-up of what a crash left.
    """
    # Not Orbax's own `read_only`, which warns each time; without saves it adds nothing.
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if read_only else keep,
      cleanup_tmp_directories=not read_only,
      create=not read_only,
    )
    self._read_only = read_only
    self._manager = ocp.CheckpointManager(pathlib.Path(directory).absolute(), options=options)

  @property
  def steps(self) -> list[int]:
    """The complete steps, oldest first."""
    return sorted(self._manager.all_steps())

  def parts(self, step: int) -> set[str]:
    """The names of a step's parts: its folders."""
    folder = pathlib.Path(self._manager.directory) / str(step)
    return {path.name for path in folder.iterdir() if path.is_dir()}

  def save(self, step: int, trees: dict[str, Any], data, config: dict[str, Any]) -> None:
    """Starts to save pytrees by part name, a Grain iterator's place and a JSON-able config."""
    if self._read_only:
      raise ValueError(f"{self._manager.directory} was opened to be read only")
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    items["data"] = ocp.args.JsonSave(data.get_state())
    items["config"] = ocp.args.JsonSave(config)
    self._manager.save(step, args=ocp.args.Composite(**items), force=True)

  def restore(self, step: int, abstract: dict[str, Any], data=None) -> dict[str, Any]:
    """The pytrees of the named parts, placed as `abstract` says (jax.ShapeDtypeStruct leaves).

    With `data`, a Grain iterator, that iterator is moved to its place at the step.

    Raises:
      CheckpointError: if files are missing or damaged, or hold other arrays.
    """
    items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    if data is not None:
      items["data"] = ocp.args.JsonRestore()
    restored = self._restore(step, items)
    if data is not None:
      data.set_state(restored["data"])
    return {name: restored[name] for name in abstract}

  def config(self, step: int) -> dict[str, Any]:
    """The config that was saved with the step."""
    return self._restore(step, {"config": ocp.args.JsonRestore()})["config"]

  def _restore(self, step: int, items: dict[str, Any]):
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax and TensorStore have no common one.
      folder = pathlib.Path(self._manager.directory) / str(step)
      others = [other for other in self.steps if other != step]
      then = f"to go on from step {max(others)}" if others else "to begin anew"
      raise CheckpointError(
        f"the checkpoint {folder} cannot be read: delete it {then}"
        f" ({type(error).__name__}: {str(error):.200})"
      ) from error

  def close(self) -> None:
    """Waits, then releases the directory."""
    self._manager.close()

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()


def abstract_like(tree):
  """The tree's shapes, dtypes and the default device's sharding: what `restore` needs."""
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
  )
