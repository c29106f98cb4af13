"""Checkpoints with Orbax: the state, the data iterator and the run's config.

<directory>/<step>/<part>/       what Orbax writes of a part
<directory>/<step>/sealed.json   see `seals`: nothing is read without it
<directory>/damaged/<step>/      what was found damaged, for whoever wants to look at it
<directory>/.trash/              old steps, while they are deleted
"""

import concurrent.futures
import contextlib
import copy
import errno
import math
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from magneto_jax import digest, distributed, seals
from magneto_jax.data import files

T = TypeVar("T")

_DAMAGED, _TRASH = "damaged", ".trash"
# What Orbax adds to a step's name while it writes it.
_UNFINISHED = ".orbax-checkpoint-tmp"


class CheckpointError(OSError):
  """A checkpoint that cannot be read or written."""


class DamagedError(CheckpointError):
  """A checkpoint that is not as it was written.

  Attributes:
    step: which.
    what: is wrong with it: the file, or the part and the array.
    good: the newest older step whose files are whole, as far as they tell; None if there is none.
  """

  def __init__(self, folder: pathlib.Path, what: str, good: int | None):
    older = "no older step is whole"
    if good is not None:
      older = f"move it away to go on from step {good}, the newest good one before it"
    super().__init__(f"the checkpoint {folder} is damaged: {what}; {older}")
    self.step, self.what, self.good = int(folder.name), what, good


class Checkpointer:
  """Saves and restores the parts of a run under `<directory>/<step>/`.

  A part is one Orbax item: `params`, `ema_params` (if the run averages its weights),
  `optimizer`, `data` (the iterator's place) and `config` (both JSON). Parts are separate so that a
  reader of the weights needs to know nothing of the optimizer. All hosts save and restore together;
  the place counts batches and is the same on all, however many there are.

  Saving is asynchronous: `save` asks the devices for copies in the hosts' memory, and returns. In
  the background their files are written and made durable, the step is sealed and then gets its
  name; only then are old steps deleted. So a step is there if and only if all of it has reached the
  disk, whatever happens when. The next `save` and `close` wait for it, and raise what has gone
  wrong.
  """

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    keep: int | None = None,
    best: Callable[[list[int]], int | None] = lambda steps: None,
    read_only: bool = False,
  ):
    """Opens a directory.

    Args:
      directory: need not exist, unless `read_only`.
      keep: how many steps are kept, the newest; None for all.
      best: of the steps that are there, the one that is kept beside these, if any.
      read_only: whether nothing is ever written, not even a clean-up of what a crash left; each
        process then reads for itself.
    """
    self._directory = pathlib.Path(directory).absolute()
    self._keep, self._best, self._read_only = keep, best, read_only
    if read_only:
      return
    _on_first(self._tidy)
    self._orbax = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(),
      async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
      # Named, so that they do not wait for each other on their devices, as they do by default: a
      # thread's programs would come between the steps' in another order on each.
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        active_processes=set(range(jax.process_count()))
      ),
    )
    self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    self._saving: tuple[int, concurrent.futures.Future] | None = None
    self._failed = False

  @property
  def steps(self) -> list[int]:
    """The steps that were finished, oldest first."""
    if not self._directory.is_dir():
      return []
    return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())

  def parts(self, step: int) -> set[str]:
    """The names of a step's parts."""
    return seals.parts(self._together(step, lambda: seals.read(self._folder(step), step)))

  # ------------------------------------------------------------------------------------ Saving

  def save(self, step: int, trees: dict[str, Any], data, config: dict[str, Any]) -> None:
    """Starts to save trees of jax.Arrays by part name, a Grain iterator's place and a JSON config.

    Raises:
      CheckpointError: if it cannot, or could not save the step before.
    """
    if self._read_only:
      raise ValueError(f"{self._directory} was opened to be read only")
    self.wait()
    self._bytes = size_of(trees)
    # Before the arrays are donated; their values are read in the background.
    self._unsealed = step, {name: digest.dispatch(tree) for name, tree in trees.items()}
    in_host_memory = jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), trees)
    copies = jax.device_put(trees, in_host_memory)
    json_parts = copy.deepcopy({"data": data.get_state(), "config": config})
    self._saving = step, self._thread.submit(self._write, step, copies, json_parts)

  def prepare(self, trees: dict[str, Any]) -> None:
    """Compiles what the first `save` of these parts would else stand still for.

    All processes call this together, as they do `save`.
    """
    for tree in trees.values():
      digest.dispatch(tree)

  def wait(self) -> None:
    """Waits until what was saved is on the disk.

    Raises:
      CheckpointError: if it is not.
    """
    if self._saving is None:
      return
    (step, finishing), self._saving = self._saving, None
    try:
      finishing.result()
    except Exception as error:  # As above.
      raise self._not_saved(step, error) from error

  def _seal(self) -> None:
    """Called by Orbax on process 0: all files are written, and the step has not got its name."""
    step, digests = self._unsealed
    (folder,) = self._directory.glob(f"{step}{_UNFINISHED}*")
    seals.write(folder, step, {part: digest.read(of_part) for part, of_part in digests.items()})

  def _write(self, step: int, trees: dict[str, Any], json_parts: dict[str, Any]) -> None:
    """Writes a step, then deletes what is not to be kept."""
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    items |= {name: ocp.args.JsonSave(values) for name, values in json_parts.items()}
    self._orbax.save(self._folder(step), args=ocp.args.Composite(**items))
    self._orbax.wait_until_finished()
    if distributed.is_first():
      files.sync(self._directory)  # Its name is on the disk before another is taken away.
      steps = self.steps
      best = self._best(steps)
      for old in steps[: -self._keep] if self._keep else []:
        if old != best:
          self._move(self._folder(old), self._directory / _TRASH)
      self._empty_trash()

  def _not_saved(self, step: int, error: Exception) -> CheckpointError:
    self._failed = True
    if distributed.is_first():
      self._remove_unfinished()
    free = shutil.disk_usage(self._directory).free
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
      words in str(error) for words in ("No space left", "RESOURCE_EXHAUSTED", "quota exceeded")
    )
    why = f"{type(error).__name__}: {str(error):.200}"
    if is_full:
      why = f"the disk is full: up to {self._bytes:,} bytes are needed and {free:,} are free"
    return CheckpointError(
      f"step {step} could not be saved in {self._directory}: {why}; what was saved before is whole,"
      " and the same command goes on from it"
    )

  # --------------------------------------------------------------------------------- Restoring

  def restore(self, step: int, abstract: dict[str, Any], data=None) -> dict[str, Any]:
    """The pytrees of the named parts, placed as `abstract` says (jax.ShapeDtypeStruct leaves).

    With `data`, a Grain iterator, that iterator is moved to its place at the step.

    Raises:
      DamagedError: if files are missing, or are not as they were written.
      CheckpointError: if the parts hold other arrays.
    """
    folder = self._folder(step)
    # A run that goes on takes nothing of a step that is damaged anywhere.
    parts = list(abstract) if data is None else None

    def read():
      return {
        part: _read(part, ocp.StandardCheckpointHandler(), folder, ocp.args.StandardRestore(tree))
        for part, tree in abstract.items()
      }

    def compare() -> None:
      for part, tree in found.items():
        for path, value in digest.read(digest.dispatch(tree)).items():
          if value != seal["arrays"][part][path]:
            raise seals.Damaged(f"{part}: {path} is not what was written")

    # One after the other on all hosts: none may wait for one that has stopped.
    seal = self._together(step, lambda: self._checked(step, parts))
    self._refuse_others(step, seal, abstract)
    found = self._together(step, read)
    self._together(step, compare)
    if data is not None:
      place = self._json(step, "data")
      try:
        data.set_state(place)
      except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{folder} holds no place in the data: {error}") from None
    return found

  def restore_newest(
    self, abstract: dict[str, Any], data, *, fall_back: bool, say: Callable[[str], None]
  ) -> tuple[int, dict[str, Any]]:
    """The newest step and its parts; see `restore`.

    Args:
      abstract, data: as for `restore`.
      fall_back: whether damaged steps are moved aside, for the newest good one before them.
      say: is given a line for each such step.

    Raises:
      DamagedError: if the newest is damaged, and it may not or cannot fall back; nothing is moved.
    """
    damaged: list[DamagedError] = []
    for step in reversed(distributed.everywhere(self.steps)[0]):
      try:
        found = self.restore(step, abstract, data)
        break
      except DamagedError as error:
        damaged.append(error)
        if not fall_back:
          break
    else:
      found = None
    if damaged and (not fall_back or found is None):
      raise damaged[0]
    for error in damaged:
      moved = self.move_aside(error.step)
      say(
        f"step {error.step} is damaged ({error.what}): going on from step {step}; the damaged one"
        f" lies in {moved}"
      )
    return step, found

  def config(self, step: int) -> dict[str, Any]:
    """The config that was saved with the step."""
    self._together(step, lambda: self._checked(step, ["config"]))
    return self._json(step, "config")

  def _json(self, step: int, part: str):
    """Of files that have been checked."""
    read = lambda: _read(
      part, ocp.JsonCheckpointHandler(), self._folder(step), ocp.args.JsonRestore()
    )
    return self._together(step, read)

  def _checked(self, step: int, parts: Collection[str] | None = None) -> dict[str, Any]:
    """The seal of a step, with which the files of these parts agree; of all by default."""
    seal = seals.read(self._folder(step), step)
    seals.check_files(self._folder(step), seal, seals.parts(seal) if parts is None else parts)
    return seal

  def _refuse_others(self, step: int, seal: dict[str, Any], abstract: dict[str, Any]) -> None:
    for part, tree in abstract.items():
      held = {path: text.split(" ")[0] for path, text in seal["arrays"].get(part, {}).items()}
      wanted = digest.kinds(tree)
      for path in sorted(held.keys() | wanted.keys()):
        if held.get(path) != wanted.get(path):
          raise CheckpointError(
            f"the checkpoint {self._folder(step)} holds other arrays: {part}: {path} is"
            f" {held.get(path, 'absent')}, not {wanted.get(path, 'absent')}:"
            " the config.json beside it is another run's, or of another version"
          )

  def _together(self, step: int, f: Callable[[], T]) -> T:
    """What `f` returns; where it fails on one host, it fails on all alike."""
    result = damage = failure = None
    try:
      result = f()
    except seals.Damaged as error:
      damage = str(error)
    except Exception as error:
      failure = error
    told = [(damage, failure and str(failure))]
    if not self._read_only:
      told = distributed.everywhere(told[0])
    if failure is not None:
      raise failure
    for damage, other in told:
      if other is not None:
        raise CheckpointError(other)
      if damage is not None:
        raise DamagedError(self._folder(step), damage, self._good_before(step))
    return result

  def _good_before(self, step: int) -> int | None:
    for older in reversed([older for older in self.steps if older < step]):
      with contextlib.suppress(seals.Damaged):
        self._checked(older)
        return older
    return None

  # ----------------------------------------------------------------------------------- Folders

  def _folder(self, step: int) -> pathlib.Path:
    return self._directory / str(step)

  def _tidy(self) -> None:
    """Removes what a crash has left."""
    made = [path for path in (self._directory, *self._directory.parents) if not path.exists()]
    self._directory.mkdir(parents=True, exist_ok=True)
    for path in made:
      files.sync(path.parent)
    self._remove_unfinished()
    self._empty_trash()

  def _remove_unfinished(self) -> None:
    for path in self._directory.glob(f"*{_UNFINISHED}*"):
      shutil.rmtree(path, ignore_errors=True)

  def _empty_trash(self) -> None:
    shutil.rmtree(self._directory / _TRASH, ignore_errors=True)

  def move_aside(self, step: int) -> pathlib.Path:
    """Takes a step out of the list, on all hosts together; the folder where it then lies."""
    target = self._directory / _DAMAGED
    _on_first(lambda: self._move(self._folder(step), target))
    return target

  @staticmethod
  def _move(folder: pathlib.Path, target: pathlib.Path) -> None:
    """At once, as a rename is, into a folder; never over what lies there."""
    target.mkdir(exist_ok=True)
    name = folder.name
    if (target / name).exists():
      name = f"{name}-{uuid.uuid4().hex[:8]}"
    os.replace(folder, target / name)

  def close(self) -> None:
    """Waits, then releases the directory."""
    if self._read_only:
      return
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      try:
        self._orbax.close()
      except Exception:
        if not self._failed:  # Else it has been told.
          raise
      if self._failed and distributed.is_first():
        self._remove_unfinished()

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()


def _on_first(f: Callable[[], None]) -> None:
  """Calls `f` on process 0 alone, and when that is done all go on."""
  try:
    distributed.on_first(lambda: f() if distributed.is_first() else None)
  except ValueError as error:  # Of another process.
    raise CheckpointError(str(error)) from None


def _read(part: str, handler, folder: pathlib.Path, args):
  """What Orbax's handler restores of a part."""
  try:
    return handler.restore(folder / part, args=args)
  except (MemoryError, PermissionError):
    raise
  except Exception as error:  # Orbax and TensorStore have no common one.
    if "RESOURCE_EXHAUSTED" in str(error):  # Memory, which says nothing of the files.
      raise
    why = f"{type(error).__name__}: {error!s:.200}"
    raise seals.Damaged(f"{part} cannot be read ({why})") from error


def size_of(tree) -> int:
  """Bytes of a tree's arrays or shapes, which a checkpoint of it has at most, but for a few."""
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def refuse_if_no_room(directory: str | pathlib.Path, state, keep: int) -> None:
  """Raises unless the disk has room for one checkpoint more than are kept.

  The oldest is deleted only when the newest is whole, so for a while there is one more.

  Args:
    directory: of the checkpoints; it need not exist. Those that lie there count.
    state: what is saved: arrays or shapes.
    keep: how many are kept.

  Raises:
    CheckpointError: of one line, with the bytes that are needed and free.
  """
  directory = pathlib.Path(directory).absolute()
  there = [path for path in directory.glob("*/**/*") if path.is_file()]
  held = sum(path.stat().st_size for path in there if _DAMAGED not in path.parts)
  existing = next(path for path in (directory, *directory.parents) if path.exists())
  free, each = shutil.disk_usage(existing).free, size_of(state)
  # Old ones go when the next is whole, however many there are.
  if (needed := max((keep + 1) * each - held, each)) > free:
    raise CheckpointError(
      f"{directory} has no room for checkpoints: {keep} are kept and one more is written, of"
      f" {each:,} bytes each, so {needed:,} bytes are needed and {free:,} are free: free some,"
      " lower keep_checkpoints or use another workdir"
    )


def abstract_like(tree):
  """The tree's shapes, dtypes and the default device's sharding: what `restore` needs."""
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
  )
