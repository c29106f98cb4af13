"""What a step needs of memory, estimated, and what is said when it does not fit."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from magneto_jax import hardware, memory, sharding
from magneto_jax.config import from_config_dict
from magneto_jax.tasks import TASKS

GIB = 2**30


def config_of(**changes):
  """A decoder of bytes, on 16 devices unless told otherwise."""
  sizes = {"layers": 3, "width": 64, "heads": 4, "ffn_width": 128}
  small = {
    "batch_size": 32,
    "model": sizes,
    "data": {"tokenizer": "byte", "seq_length": 64},
    "mesh": {"fsdp": 2, "tensor": 2},
  }
  config = from_config_dict(small)
  return memory.changed(config, changes)


@functools.cache
def sizes_of(config, devices=16):
  task = TASKS[config.task]
  model = task.build_model(config, {"vocab_size": 260, "token_correlation": 0.01})
  init = lambda key: model.init(key, *task.dummy_inputs(config))["params"]
  params = jax.eval_shape(init, jax.random.key(0))
  return memory.Sizes(params, task.batch_spec(config), devices)


def parameters_of_a_device(config, params) -> int:
  """Bytes, by the shardings that a step is compiled with."""
  sizes = sharding.resolve(config.mesh.sizes(), 16)
  types_ = (AxisType.Auto,) * len(sizes)
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types_)
  placed = sharding.parameter_shardings(params, mesh)
  place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  return memory.held(jax.tree.map(place, params, placed))


@pytest.mark.parametrize("mesh", [{}, {"mesh.fsdp": 8}, {"mesh.fsdp": 4, "mesh.tensor": 4}])
def test_the_state_is_estimated_as_it_lies(mesh):
  """What the average adds is the parameters of a device once more, and accumulation likewise."""
  config, sizes = config_of(**mesh), sizes_of(config_of())
  own = parameters_of_a_device(config, sizes.params)
  base = memory.estimate(config, sizes)
  assert memory.estimate(memory.changed(config, {"ema": 0.9}), sizes) - base == own
  # Twice the rows in twice the parts: the activations of a part are the same.
  twice = {name: jax.ShapeDtypeStruct((64, 64), x.dtype) for name, x in sizes.batch.items()}
  parts = memory.changed(config, {"accumulation": 2, "batch_size": 64})
  assert memory.estimate(parts, sizes._replace(batch=twice)) - base == own


def test_what_a_model_keeps_and_images_patches_are_estimated():
  """The former whole on every device; of a batch of images alone the tokens are those of a row."""
  config, sizes = config_of(), sizes_of(config_of())
  base = memory.estimate(config, sizes)
  kept = {"codes": jax.ShapeDtypeStruct((10, 32), jnp.float32)}
  assert memory.estimate(config, sizes._replace(variables=kept)) - base == 10 * 32 * 4
  images = {"image": jax.ShapeDtypeStruct((config.batch_size, 16, 16, 3), jnp.float32)}
  length = sizes.batch["inputs"].shape[1]
  assert memory.estimate(config, sizes._replace(batch=images, length=length)) == base
  # Samples of a sound are no tokens.
  sounds = images | {"waves": jax.ShapeDtypeStruct((config.batch_size, 32_000), jnp.int16)}
  assert memory.estimate(config, sizes._replace(batch=sounds, length=length)) == base


def test_what_is_held_is_counted_by_shards():
  mesh = AbstractMesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
  at = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
  tree = {
    "cut": jax.ShapeDtypeStruct((8, 12), jnp.float32, sharding=at("a", "b")),
    "whole": jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=at()),
    "both": jax.ShapeDtypeStruct((16,), jnp.int32, sharding=at(("a", "b"))),
    "none": None,
  }
  assert memory.held(tree) == 4 * 3 * 4 + 5 * 2 + 2 * 4


def test_stronger_remat_and_more_parts_need_less():
  config = config_of()
  sizes = sizes_of(config)
  at = lambda **changes: memory.estimate(
    memory.changed(config, {k.replace("__", "."): v for k, v in changes.items()}), sizes
  )
  remats = [at(model__remat=remat) for remat in ("none", "dots", "attention", "full")]
  assert remats == sorted(remats, reverse=True) and len(set(remats)) == 4
  assert at(vocab_chunk=64) < at()
  assert at(model__dtype="bfloat16") < at()
  assert at(mesh__fsdp=8) < at(mesh__fsdp=4) < at()


def test_what_a_row_takes_beside_its_tokens_is_counted_for_each_of_a_device():
  """Of 32 rows on 16 devices, 2 of which share a row: 4 each, and 2 at a time in two parts."""
  config, sizes = config_of(), sizes_of(config_of())
  beside = sizes._replace(row_bytes=1000)
  for changes, rows in (({}, 4), ({"accumulation": 2}, 2)):
    turned = memory.changed(config, changes)
    assert memory.estimate(turned, beside) - memory.estimate(turned, sizes) == 1000 * rows


def test_of_a_transducer_a_chunk_of_its_lattice_and_the_maps_of_its_front_end_are_counted():
  task = TASKS["speech_recognition"]

  def row_bytes(**model):
    fields = {"width": 64, "heads": 4, "layers": 1, "speech_head": "transducer"} | model
    config = from_config_dict(
      {"task": "speech_recognition", "model": fields, "data": {"seq_length": 20}}
    )
    facts = {"vocab_size": 100}
    return task.row_bytes(config, task.build_model(config, facts))

  cells = 4 * 21 * 100
  assert row_bytes() - row_bytes(joint_chunk=2) == pytest.approx(2.3 * 4 * cells / 2, abs=2)
  assert row_bytes(front_end="vgg") > row_bytes(front_end="conv2d") > row_bytes()
  # The first two of VGG's maps alone, of 398 frames and 80 bins.
  assert row_bytes(front_end="vgg") > 2 * 398 * 80 * 64 * 4


def test_every_knob_can_be_turned_and_saves_what_it_says():
  config, sizes = config_of(ema=0.99), sizes_of(config_of())
  found = memory.knobs(config, sizes)
  now = memory.estimate(config, sizes)
  for knob in found:
    turned = memory.changed(config, knob.changes)
    assert knob.saves == now - memory.estimate(turned, sizes) > 0
    # A valid run: on as many devices, with rows for each.
    mesh = sharding.resolve(turned.mesh.sizes(), 16)
    assert turned.batch_size % (mesh["data"] * mesh["fsdp"] * turned.accumulation) == 0
    assert 64 % mesh["tensor"] == 0
  value = [knob.saves / knob.cost for knob in found]
  assert value == sorted(value, reverse=True)
  named = {field for knob in found for field in knob.changes}
  assert named >= {
    "accumulation",
    "batch_size",
    "ema",
    "mesh.fsdp",
    "model.dtype",
    "model.remat",
  }


def test_what_a_task_refuses_is_not_named_and_a_table_that_is_read_alone_gives_no_logits():
  """A contrastive batch is not cut; its texts' tokens are not answered over their vocabulary."""
  small = {"task": "image_text_retrieval", "batch_size": 32, "mesh": {"fsdp": 2}}
  small["model"] = {"layers": 1, "width": 32, "positions": "learned", "image_size": 32}
  config = from_config_dict(small | {"data": {"tokenizer": "byte", "seq_length": 16}})
  task = TASKS[config.task]
  bytes_of = {}
  for vocabulary in (260, 5000):
    model = task.build_model(config, {"vocab_size": vocabulary, "token_correlation": 0.01})
    init = lambda key, model=model: model.init(key, *task.dummy_inputs(config))["params"]
    params = jax.eval_shape(init, jax.random.key(0))
    sizes = memory.Sizes(params, task.batch_spec(config), 16, length=task.length(config))
    bytes_of[vocabulary] = memory.estimate(config, sizes)
  # Weights, two moments and the gradient, a half on each device.
  assert bytes_of[5000] - bytes_of[260] == (5000 - 260) * 32 * 4 * 4 // 2
  named = {field for knob in memory.knobs(config, sizes) for field in knob.changes}
  assert {"model.remat", "batch_size"} <= named and not {"accumulation", "vocab_chunk"} & named


def test_the_last_row_of_a_device_is_shared():
  """Before that, parts of a batch save as much; and of 3 heads none can be given to two devices."""
  few = {"batch_size": 8, "mesh.data": 4, "mesh.tensor": 2}
  fields = lambda config: [set(knob.changes) for knob in memory.knobs(config, sizes_of(config))]
  named = set().union(*fields(config_of(**few)))
  assert {"mesh.tensor", "mesh.sequence"} <= named
  named = set().union(*fields(config_of()))
  assert "accumulation" in named and not {"mesh.tensor", "mesh.sequence"} & named
  odd = {"model.heads": 3, "model.width": 48, "mesh.tensor": 1, "mesh.data": 8}
  config = config_of(**few | odd | {"batch_size": 16})
  named = fields(config)
  assert named and not any("mesh.tensor" in each for each in named)
  assert all("mesh.sequence" in each for each in named if "accumulation" in each)


def test_those_that_are_enough_are_named_first_the_cheapest_before():
  knob = lambda name, saves, cost: memory.Knob({name: 1}, "", cost, saves)
  found = [knob("a", 9, 0.5), knob("b", 20, 0.3), knob("c", 15, 0.1), knob("c", 30, 0.2)]
  assert [x.saves for x in memory.best(found, 10)] == [15, 20, 9]
  assert [x.saves for x in memory.best(found, 25)][0] == 30
  assert [x.flags for x in memory.best(found, 10, 1)] == ["--config.c=1"]


# What XLA's compilers and allocators say, of several versions, and the bytes meant.
SAID = {
  "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries"
  " (772.00G) exceeds available HBM (15.75G).": (772 * GIB, int(15.75 * GIB)),
  "Ran out of memory on HBM, total HLO temporaries (31.94G) exceeds available HBM (15.75G)": (
    int(31.94 * GIB),
    int(15.75 * GIB),
  ),
  "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used"
  " 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.": (int(20.5 * GIB), int(15.75 * GIB)),
  "RESOURCE_EXHAUSTED: Attempting to reserve 4.00G at the bottom of memory. That was not possible."
  " There are 3.50G free, 0B reserved, and 3.50G reservable.": (4 * GIB, int(3.5 * GIB)),
  "RESOURCE_EXHAUSTED: Out of memory allocating 4398046511104 bytes.": (2**42, None),
  "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 85899345920 bytes.": (
    80 * GIB,
    None,
  ),
  "RESOURCE_EXHAUSTED: something new": (None, None),
}


@pytest.mark.parametrize("text", SAID)
def test_errors_of_memory_are_read(text):
  assert memory.exhausted(jax.errors.JaxRuntimeError(text)) == SAID[text]


def test_what_a_compiler_refuses_is_told_apart():
  """Of errors that speak of temporaries alone, and of those that speak of all."""
  at = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  array = jax.ShapeDtypeStruct((2**18,), jnp.float32, sharding=at)  # 1 MiB.
  counters = {"step": (), "skipped": (), "skipped_in_a_row": ()}
  counters |= {"ema_params": None, "variables": array}
  state = types.SimpleNamespace(params=array, opt_state=(array,) * 2, **counters)
  of = lambda text: memory.of_refused(jax.errors.JaxRuntimeError(text), state, {"x": array})
  said = "RESOURCE_EXHAUSTED: Ran out of memory"
  alone = of(f"{said} on HBM, total HLO temporaries (9.00M) exceeds available HBM (8.00M)")
  together = of(f"{said} in memory space hbm. Used 14.00M of 8.00M hbm.")
  expected = memory.Memory(*(m * 2**20 for m in (2, 0, 2, 1, 0, 0, 9, 0)))
  assert alone == together == expected and expected.peak == 14 * 2**20
  assert of(f"{said}, so much for that") is None


def test_other_errors_are_left_alone():
  assert memory.exhausted(ValueError("INVALID_ARGUMENT: no such axis")) is None
  config = config_of()
  assert memory.out_of_memory(KeyError("x"), config, None, None) is None


def test_the_message_is_a_few_lines_that_can_be_acted_on():
  config, sizes = config_of(ema=0.99), sizes_of(config_of())
  text = (
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.\n"
    + "a dump\n" * 500
  )
  device = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
  error = memory.out_of_memory(jax.errors.JaxRuntimeError(text), config, sizes, device)
  first, how, *knobs = str(error).splitlines()
  assert error.needed == int(20.5 * GIB)
  assert first == "out of memory on TPU v5 lite: 20.50 GiB needed, 15.75 GiB there"
  assert "magneto_jax.plan" in how and len(knobs) == 3
  fields = [line.split("--config.")[1].split("=")[0] for line in knobs]
  assert len(set(fields)) == 3
  for line in knobs:
    flags = [word for word in line.split() if word.startswith("--config.")]
    changes = dict(flag.removeprefix("--config.").split("=") for flag in flags)
    assert all(hasattr(config, name.split(".")[0]) for name in changes) and "saves" in line


def test_one_array_that_has_no_room_is_not_taken_for_all_that_is_needed():
  device = types.SimpleNamespace(
    platform="gpu", device_kind="NVIDIA H200", memory_stats=lambda: None
  )
  text = f"RESOURCE_EXHAUSTED: Out of memory while trying to allocate {7 * GIB} bytes."
  error = jax.errors.JaxRuntimeError(text)
  said = memory.out_of_memory(error, config_of(), sizes_of(config_of()), device)
  there = f"{hardware.CHIPS['h200'].memory / GIB:.2f} GiB there"
  first = f"out of memory on NVIDIA H200: 7.00 GiB asked for at once, {there}"
  assert str(said).splitlines()[0] == first


def test_where_an_allocator_says_nothing_the_knobs_are_named_all_the_same():
  unknown = types.SimpleNamespace(platform="gpu", device_kind="x", memory_stats=lambda: None)
  error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: something new")
  said = memory.out_of_memory(error, config_of(), sizes_of(config_of()), unknown)
  first, _, *knobs = str(said).splitlines()
  assert first == "out of memory on x" and said.needed is None and len(knobs) == 3


def test_what_there_is():
  """Of a CPU what its host has free, shared; of a chip that is not here the table's figure."""
  cpu = jax.devices("cpu")[0]
  whole, part = memory.available(cpu), memory.available(cpu, 4)
  assert 2**20 < part <= whole and part == pytest.approx(whole / 4, rel=0.5)

  def absent():
    raise NotImplementedError

  tpu = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite", memory_stats=absent)
  assert memory.available(tpu) == hardware.CHIPS["v5e"].memory
  here = types.SimpleNamespace(
    platform="gpu", device_kind="x", memory_stats=lambda: {"bytes_limit": 7}
  )
  assert memory.available(here) == 7
  unknown = types.SimpleNamespace(platform="gpu", device_kind="x", memory_stats=lambda: None)
  assert memory.available(unknown) is None


def test_changed_fields_are_those_named():
  config = config_of()
  turned = memory.changed(config, {"model.remat": "full", "mesh.fsdp": 4, "accumulation": 2})
  assert (turned.model.remat, turned.mesh.fsdp, turned.accumulation) == ("full", 4, 2)
  back = {"model.remat": "none", "mesh.fsdp": 2, "accumulation": 1}
  assert memory.changed(turned, back) == config
  assert dataclasses.asdict(turned.data) == dataclasses.asdict(config.data)


def test_the_peak_is_all_parts():
  parts = memory.Memory(*(2 ** np.arange(8)).tolist())
  assert parts.peak == 255
