"""Checkpoints: sealed, kept, refused where they are damaged, and what then is gone on from.

What processes that are killed leave, and every kind of damage: tests/reliability/.
"""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax import checkpoints, seals
from magneto_jax.checkpoints import (
  Checkpointer,
  CheckpointError,
  DamagedError,
  abstract_like,
  refuse_if_no_room,
)
from magneto_jax.data import pipelines


def parts(step):
  random = np.random.default_rng(step)
  params = {"kernel": jnp.asarray(random.normal(size=(4, 6)).astype(np.float32))}
  return {"params": params, "optimizer": {"step": jnp.int32(step)}}


def batches():
  return pipelines.train_iterator([{"id": np.int32(i)} for i in range(9)], batch_size=2, seed=0)


def filled(directory, steps, keep=None):
  """A directory of steps, each of which has read that many batches."""
  data = batches()
  with Checkpointer(directory, keep=keep) as checkpointer:
    for step in range(1, steps + 1):
      next(data)
      checkpointer.save(step, parts(step), data, {"step": step})
  return directory


def assert_is(found, step):
  jax.tree.map(np.testing.assert_array_equal, found, parts(step))


def test_what_is_restored_is_what_was_saved(tmp_path):
  data, whole = batches(), batches()
  with Checkpointer(filled(tmp_path, 3)) as checkpointer:
    assert checkpointer.steps == [1, 2, 3]
    assert checkpointer.parts(2) == {"params", "optimizer", "data", "config"}
    assert checkpointer.config(2) == {"step": 2}
    assert_is(checkpointer.restore(2, abstract_like(parts(0)), data), 2)
  for _ in range(2):
    next(whole)
  np.testing.assert_array_equal(next(data)["id"], next(whole)["id"])


def test_the_newest_are_kept_and_a_reader_changes_nothing(tmp_path):
  filled(tmp_path, 4, keep=2)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]
  (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
  (tmp_path / ".trash").mkdir()
  with Checkpointer(tmp_path, keep=1, read_only=True) as checkpointer:
    assert checkpointer.steps == [3, 4]
    assert_is(checkpointer.restore(3, abstract_like(parts(0))), 3)
    with pytest.raises(ValueError, match="read only"):
      checkpointer.save(5, parts(5), batches(), {})
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    *(".trash", "3", "4", "5.orbax-checkpoint-tmp")
  ]
  Checkpointer(tmp_path).close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]
  with Checkpointer(tmp_path / "none", read_only=True) as checkpointer:
    assert checkpointer.steps == []
  assert not (tmp_path / "none").exists()


def test_arrays_that_are_donated_are_saved_as_they_were(tmp_path):
  step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
  with Checkpointer(tmp_path) as checkpointer:
    state = parts(1)
    checkpointer.save(1, state, batches(), {})
    jax.block_until_ready(step(state))
    checkpointer.wait()
    assert_is(checkpointer.restore(1, abstract_like(parts(0))), 1)


def test_an_older_step_is_gone_only_when_the_newer_is_sealed_and_named(tmp_path, monkeypatch):
  seen = []
  write, empty = seals.write, Checkpointer._empty_trash

  def sealing(folder, step, arrays):
    seen.append(("sealing", step, sorted(path.name for path in tmp_path.iterdir())))
    write(folder, step, arrays)

  def deleting(self):
    trash = tmp_path / ".trash"
    gone = [path.name for path in trash.iterdir()] if trash.exists() else []
    seen.append(("deleting", gone, self.steps))
    empty(self)

  monkeypatch.setattr(seals, "write", sealing)
  monkeypatch.setattr(Checkpointer, "_empty_trash", deleting)
  filled(tmp_path, 2, keep=1)
  assert seen == [
    ("deleting", [], []),
    ("sealing", 1, ["1.orbax-checkpoint-tmp"]),
    ("deleting", [], [1]),
    ("sealing", 2, ["1", "2.orbax-checkpoint-tmp"]),
    ("deleting", ["1"], [2]),
  ]


def test_a_step_whose_seal_cannot_be_written_is_not_there_and_is_told(tmp_path, monkeypatch):
  """At the next save; what failed is not in the way afterwards."""
  filled(tmp_path, 1)

  def refuse(*_):
    raise OSError(28, "No space left on device")

  checkpointer = Checkpointer(tmp_path, keep=1)
  monkeypatch.setattr(seals, "write", refuse)
  checkpointer.save(2, parts(2), batches(), {})
  with pytest.raises(CheckpointError, match="step 2 could not be saved .* the disk is full: up to"):
    checkpointer.save(3, parts(3), batches(), {})
  checkpointer.close()
  monkeypatch.undo()
  assert [path.name for path in tmp_path.iterdir()] == ["1"]
  with Checkpointer(tmp_path, keep=1) as checkpointer:
    assert_is(checkpointer.restore(1, abstract_like(parts(0))), 1)
    checkpointer.save(2, parts(2), batches(), {})
  assert [path.name for path in tmp_path.iterdir()] == ["2"]


def damage_array(folder):
  """Other bits, in files that agree with the seal: what the digest alone can tell."""
  (tmp := folder.parent / "other").mkdir()
  other = jax.tree.map(lambda x: x.at[1, 2].add(1), parts(int(folder.name))["params"])
  with Checkpointer(tmp) as checkpointer:
    checkpointer.save(1, {"params": other}, batches(), {})
  shutil.rmtree(folder / "params")
  (tmp / "1" / "params").rename(folder / "params")
  seal = json.loads((folder / seals.NAME).read_text())
  new = json.loads((tmp / "1" / seals.NAME).read_text())
  params = {k: v for k, v in new["files"].items() if k.startswith("params/")}
  rest = {k: v for k, v in seal["files"].items() if not k.startswith("params/")}
  values = {**seal, "files": rest | params}
  del values["seal"]
  values["seal"] = seals.files.digest(values)
  (folder / seals.NAME).write_text(json.dumps(values))
  shutil.rmtree(tmp)


def append(name):
  return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"x")


DAMAGE = {
  "no seal": (lambda folder: (folder / seals.NAME).unlink(), "sealed.json is missing"),
  "seal": (append(seals.NAME), "sealed.json is not what was written"),
  "array": (damage_array, "params: kernel is not what was written"),
  "file": (lambda folder: (folder / "params/_METADATA").unlink(), "params/_METADATA is missing"),
  "size": (append("data/metadata"), "data/metadata has 18 bytes, not 17"),
}


@pytest.mark.parametrize("damage, what", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_refused_by_name_and_an_older_step_gone_on_from(damage, what, tmp_path):
  directory, abstract, said = filled(tmp_path, 3), abstract_like(parts(0)), []
  damage(directory / "3")
  with Checkpointer(directory) as checkpointer:
    for call in (
      lambda: checkpointer.restore(3, abstract, batches()),
      lambda: checkpointer.restore_newest(abstract, batches(), fall_back=False, say=said.append),
    ):
      with pytest.raises(DamagedError) as caught:
        call()
      older = "move it away to go on from step 2, the newest good one before it"
      assert str(caught.value) == f"the checkpoint {directory / '3'} is damaged: {what}; {older}"
    assert not said
    data = batches()
    step, found = checkpointer.restore_newest(abstract, data, fall_back=True, say=said.append)
    assert_is(found, 2)
    assert (step, checkpointer.steps, data.get_state()) == (2, [1, 2], checkpointer_place(2))
    moved = directory / "damaged"
    assert said == [
      f"step 3 is damaged ({what}): going on from step 2; the damaged one lies in {moved}"
    ]
    assert (moved / "3" / "optimizer").is_dir()
    # The step is taken again, and is damaged again: nothing is written over.
    checkpointer.save(3, parts(3), data, {})
    checkpointer.wait()
    damage(directory / "3")
    checkpointer.restore_newest(abstract, data, fall_back=True, say=said.append)
    assert len(list(moved.iterdir())) == 2 == len(said)


def checkpointer_place(step):
  data = batches()
  for _ in range(step):
    next(data)
  return data.get_state()


def test_steps_that_are_damaged_too_are_not_named_as_good(tmp_path):
  directory, said = filled(tmp_path, 3), []
  for step in (2, 3):
    (directory / str(step) / "params" / "manifest.ocdbt").write_bytes(b"")
  abstract = abstract_like(parts(0))
  with Checkpointer(directory) as checkpointer:
    with pytest.raises(DamagedError, match="go on from step 1, the newest good one"):
      checkpointer.restore(3, abstract)
    step, found = checkpointer.restore_newest(abstract, batches(), fall_back=True, say=said.append)
    assert_is(found, 1)
    assert (step, len(said)) == (1, 2)
    (directory / "1" / seals.NAME).write_text("{}")
    with pytest.raises(DamagedError, match="no older step is whole"):
      checkpointer.restore_newest(abstract, batches(), fall_back=True, say=said.append)
    assert checkpointer.steps == [1]


def test_nothing_is_moved_before_a_good_step_is_found(tmp_path):
  """Also where only the digests of arrays can tell that an older one is damaged."""
  directory, said = filled(tmp_path, 3), []
  for step in (2, 3):
    damage_array(directory / str(step))
  with Checkpointer(directory) as checkpointer:
    restore = lambda: checkpointer.restore_newest(
      abstract_like(parts(0)), batches(), fall_back=True, say=said.append
    )
    step, found = restore()
    assert_is(found, 1)
    assert (step, checkpointer.steps) == (1, [1])
    assert [line.count("going on from step 1; ") for line in said] == [1, 1]
    for step in (2, 3):
      (directory / "damaged" / str(step)).rename(directory / str(step))
    damage_array(directory / "1")
    with pytest.raises(DamagedError, match="3 is damaged: params: kernel is not what was written"):
      restore()
    assert (checkpointer.steps, len(said)) == ([1, 2, 3], 2)


def test_what_the_disk_cannot_read_is_damage(tmp_path, monkeypatch):
  directory, said = filled(tmp_path, 2), []
  read_bytes = type(tmp_path).read_bytes

  def failing(self):
    if self.name == "_METADATA" and self.parts[-3] == "2":
      raise OSError(5, "Input/output error")
    return read_bytes(self)

  monkeypatch.setattr(type(tmp_path), "read_bytes", failing)
  with Checkpointer(directory) as checkpointer:
    step, _ = checkpointer.restore_newest(
      abstract_like(parts(0)), batches(), fall_back=True, say=said.append
    )
  assert step == 1
  assert "_METADATA cannot be read (Input/output error)): going on from step 1" in said[0]


def of_pipe(folder):
  (folder / "data" / "metadata").unlink()
  os.mkfifo(folder / "data" / "metadata")


def resealed(change):
  """Another seal, whose own digest is right: that anyone can make."""

  def damage(folder):
    values = json.loads((folder / seals.NAME).read_text())
    del values["seal"]
    change(values)
    values["seal"] = seals.files.digest(values)
    (folder / seals.NAME).write_text(json.dumps(values))

  return damage


HOSTILE = {
  "no format": resealed(lambda values: values.pop("format")),
  "format": resealed(lambda values: values.update(format="1")),
  "list of files": resealed(lambda values: values.update(files=[])),
  "list of arrays": resealed(lambda values: values.update(arrays=[])),
  "array": resealed(lambda values: values["arrays"]["params"].update(kernel=3)),
  "file": resealed(lambda values: values["files"].update({"params/x": 3})),
  "file outside": resealed(lambda values: values["files"].update({"params/../../x": {"bytes": 1}})),
  "file of the system": resealed(
    lambda values: values["files"].update({"/dev/zero": {"bytes": 1}})
  ),
  "pipe": of_pipe,
  "folder": lambda folder: ((folder / seals.NAME).unlink(), (folder / seals.NAME).mkdir()),
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_checkpoint_is_a_damaged_one(damage, tmp_path):
  directory = filled(tmp_path, 1)
  damage(directory / "1")
  with Checkpointer(directory, read_only=True) as checkpointer:
    for call in (
      lambda: checkpointer.restore(1, abstract_like(parts(0)), batches()),
      lambda: (
        checkpointer.config(1) and checkpointer.parts(1) and checkpointer.restore(1, {}, batches())
      ),
    ):
      with pytest.raises(DamagedError, match="(sealed.json|data/metadata) (is not|cannot be read)"):
        call()


def test_other_arrays_are_no_damage(tmp_path):
  """A model of another size moves nothing aside."""
  wanted = {"params": {"kernel": jax.ShapeDtypeStruct((4, 7), jnp.float32)}}
  with Checkpointer(filled(tmp_path, 2)) as checkpointer:
    message = r"holds other arrays: params: kernel is float32\[4,6\], not float32\[4,7\]"
    with pytest.raises(CheckpointError, match=message) as caught:
      checkpointer.restore_newest(wanted, batches(), fall_back=True, say=pytest.fail)
    assert not isinstance(caught.value, DamagedError)
    with pytest.raises(CheckpointError, match="bias is absent, not float32"):
      extra = {"params": {**parts(0)["params"], "bias": jnp.zeros(3)}}
      checkpointer.restore(2, abstract_like(extra))
    assert checkpointer.steps == [1, 2]


def test_a_seal_of_a_later_format_asks_for_an_update(tmp_path, monkeypatch):
  monkeypatch.setattr(seals, "FORMAT", 2)
  filled(tmp_path, 1)
  monkeypatch.undo()
  with Checkpointer(tmp_path) as checkpointer:
    with pytest.raises(OSError, match="written by a newer magneto_jax: update"):
      checkpointer.restore_newest(
        abstract_like(parts(0)), batches(), fall_back=True, say=pytest.fail
      )
    assert checkpointer.steps == [1]


def test_room_for_one_more_than_is_kept_is_asked_for_at_the_start(tmp_path, monkeypatch):
  state = {"kernel": jax.ShapeDtypeStruct((1000, 250), jnp.float32)}  # 1,000,000 bytes.

  def free(count):
    usage = shutil._ntuple_diskusage(10**9, 0, count)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)

  directory = tmp_path / "run" / "checkpoints"
  free(4_000_000)
  refuse_if_no_room(directory, state, 3)
  free(3_999_999)
  with pytest.raises(CheckpointError, match="so 4,000,000 bytes are needed and 3,999,999 are free"):
    refuse_if_no_room(directory, state, 3)
  assert not directory.exists()
  for name in ("2/params/x", "damaged/1/params/x"):  # What was moved aside makes no room.
    (directory / name).parent.mkdir(parents=True)
    (directory / name).write_bytes(bytes(1000))
  free(3_999_000)
  refuse_if_no_room(directory, state, 3)
  free(3_998_999)
  with pytest.raises(CheckpointError, match="3,999,000 bytes are needed"):
    refuse_if_no_room(directory, state, 3)
