"""How models are cut over a mesh, and that cutting them changes nothing."""

import collections
import json
import math
import pathlib
import socket
import subprocess
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from magneto_jax import sharding
from magneto_jax.config import ConfigError, MeshConfig
from magneto_jax.layers import ConvSubsampling
from magneto_jax.models import (
  AnsweringBEiT3,
  BEiT3,
  CaptioningBEiT3,
  CausalLM,
  CTCRecognizer,
  Encoder,
  EncoderDecoder,
  ImageClassifier,
  MaskedBEiT3,
  MaskedLM,
  ReasoningBEiT3,
  RetrievalBEiT3,
  SpeechEncoder,
  SpeechToText,
  StatelessPredictor,
  TextClassifier,
  Transducer,
  VisionEncoder,
)
from magneto_jax.theory import recipes, records
from tests import sharded_steps, simulated

GOLDEN = pathlib.Path(__file__).parent / "testdata" / "sharding_2x4.txt"

WIDTH, HEADS, FFN = 32, 4, 64
SIZES = {"width": WIDTH, "num_heads": HEADS, "ffn_width": FFN}


def abstract_mesh(**sizes) -> AbstractMesh:
  shape = tuple(sizes.get(axis, 1) for axis in sharding.MESH_AXES)
  return AbstractMesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def parameters(model, *args):
  return jax.eval_shape(model.init, jax.random.key(0), *args)["params"]


def architecture(kind: str) -> records.Architecture:
  depth = {f"{side}_layers": 2 for side in ("encoder", "decoder") if side in kind}
  return records.Architecture(kind, width=WIDTH, ffn_width=FFN, heads=HEADS, **depth)


def hearing(encoder):
  return SpeechEncoder(encoder=encoder, sample_rate=1000, mel_bins=8)


def speech_to_text():
  both = recipes.RECIPES["magneto"](architecture("encoder_decoder"))
  write = CausalLM(recipe=both.decoder, vocab_size=64, **SIZES)
  encoder = hearing(Encoder(recipe=both.encoder, **SIZES))
  return SpeechToText(encoder=encoder, decoder=write, ctc_weight=0.3), SOUNDS


def transducer():
  predictor = StatelessPredictor(vocab_size=64, width=WIDTH)
  model = Transducer(encoder=hearing(encoder()), predictor=predictor, joint_width=WIDTH)
  return model, SOUNDS


TOKENS = jax.ShapeDtypeStruct((1, 8), jnp.int32)
IMAGES = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
ONE = jax.ShapeDtypeStruct((1,), jnp.int32)
SOUNDS = (jax.ShapeDtypeStruct((1, 650), jnp.int16), ONE, TOKENS, ONE)


def decoder(recipe: str = "magneto", **options):
  stack = recipes.RECIPES[recipe](architecture("decoder")).decoder
  if "qk_norm" in options:
    stack = records.with_qk_norm(stack, options.pop("qk_norm"))
  return CausalLM(recipe=stack, vocab_size=64, **SIZES, **options), (TOKENS,)


def encoder(recipe: str = "magneto", **options):
  return Encoder(
    recipe=recipes.RECIPES[recipe](architecture("encoder")).encoder, **SIZES, **options
  )


def encoder_decoder(recipe: str = "magneto"):
  both = recipes.RECIPES[recipe](architecture("encoder_decoder"))
  read = Encoder(recipe=both.encoder, vocab_size=64, relative_buckets=8, **SIZES)
  write = CausalLM(
    recipe=both.decoder, vocab_size=64, relative_buckets=8, relative_cross=True, **SIZES
  )
  return EncoderDecoder(encoder=read, decoder=write), (TOKENS, TOKENS)


def beit3(**options):
  return BEiT3(
    encoder=encoder(positions="none", experts=("vision", "text"), **options),
    vocab_size=64,
    num_patches=16,
    patch_size=4,
  )


MODELS = {
  **{f"CausalLM {name}": lambda name=name: decoder(name) for name in recipes.RECIPES},
  "CausalLM with all options": lambda: decoder(
    "normformer",
    qk_norm="head",
    activation="swiglu",
    positions=("learned", "sinusoidal"),
    relative_buckets=8,
    tied=False,
  ),
  "CausalLM, norms of all heads": lambda: decoder("deepscalelm", qk_norm="width"),
  "MaskedLM": lambda: (
    MaskedLM(
      encoder=encoder("normformer", vocab_size=64, positions="learned", max_length=8), tied=False
    ),
    (TOKENS,),
  ),
  "TextClassifier": lambda: (
    TextClassifier(encoder=encoder(vocab_size=64), classes=3),
    (TOKENS,),
  ),
  "EncoderDecoder": encoder_decoder,
  "EncoderDecoder normformer": lambda: encoder_decoder("normformer"),
  "VisionEncoder": lambda: (
    VisionEncoder(
      encoder=encoder(positions="learned", max_length=17), patch_size=4, mask_token=True
    ),
    (IMAGES,),
  ),
  "ImageClassifier": lambda: (
    ImageClassifier(
      encoder=VisionEncoder(encoder=encoder(), patch_size=4, relative_grid=(4, 4)),
      classes=3,
      pooling="mean",
    ),
    (IMAGES,),
  ),
  "BEiT3": lambda: (beit3(), (IMAGES, TOKENS)),
  "CTCRecognizer": lambda: (CTCRecognizer(encoder=hearing(encoder()), vocab_size=64), SOUNDS),
  "Transducer": transducer,
  "SpeechToText": speech_to_text,
  "MaskedBEiT3": lambda: (MaskedBEiT3(encoder=beit3(), image_vocab_size=32), (IMAGES, TOKENS)),
  "RetrievalBEiT3": lambda: (
    RetrievalBEiT3(encoder=beit3(shared_attention=True, fusion_layers=2)),
    (IMAGES, TOKENS),
  ),
  "CaptioningBEiT3": lambda: (CaptioningBEiT3(encoder=beit3(), mask_id=3), (IMAGES, TOKENS)),
  "AnsweringBEiT3": lambda: (AnsweringBEiT3(encoder=beit3(), answers=3), (IMAGES, TOKENS)),
  "ReasoningBEiT3": lambda: (
    ReasoningBEiT3(encoder=beit3()),
    (jax.ShapeDtypeStruct((1, 2, 16, 16, 3), jnp.float32), TOKENS),
  ),
}


# ---------------------------------------------------------------------------------------------
# The tables
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_matches_one_pattern_and_only_small_ones_are_whole_everywhere(name):
  model, args = MODELS[name]()
  params = parameters(model, *args)
  places = sharding.parameter_shardings(params, abstract_mesh(fsdp=2, tensor=4))
  leaves = jax.tree_util.tree_leaves_with_path(params)
  for (path, leaf), place in zip(leaves, jax.tree.leaves(places), strict=True):
    if place.is_fully_replicated:
      # A row of numbers a layer: its last dimension alone can be as wide as the model.
      hidden = ConvSubsampling.hidden if "front_end" in sharding.path_name(path) else 0
      # Of two pairs, each two tokens.
      joined = 4 * WIDTH if "pooler_norm" in sharding.path_name(path) else 0
      channels = max(WIDTH, FFN, hidden, joined)
      assert math.prod(leaf.shape[1:] if leaf.ndim > 1 else leaf.shape) <= channels, path


def golden_lines() -> list[str]:
  lines = []
  for name in ("CausalLM with all options", "MaskedLM", "EncoderDecoder", "VisionEncoder", "BEiT3"):
    model, args = MODELS[name]()
    params = parameters(model, *args)
    places = sharding.parameter_shardings(params, abstract_mesh(fsdp=2, tensor=4))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    lines += ["", f"# {name}"]
    for (path, leaf), place in zip(leaves, jax.tree.leaves(places), strict=True):
      spec = ", ".join(str(axis) for axis in place.spec)
      lines.append(f"{sharding.path_name(path)} {list(leaf.shape)} ({spec})")
  return lines[1:]


def test_golden_table_of_a_mesh_of_2_by_4():
  """fsdp 2 by tensor 4. On purpose: `python -m tests.test_sharding` writes the table anew."""
  assert golden_lines() == GOLDEN.read_text().splitlines()


def test_what_no_pattern_or_two_match_is_refused():
  tree = {"my_layer": {"weights": jnp.zeros((4, 4))}}
  with pytest.raises(ValueError, match="my_layer/weights must match one pattern"):
    sharding.parameter_shardings(tree, abstract_mesh(fsdp=2))
  with pytest.raises(ValueError, match=r"a/b must match .* a/b, \(a\|c\)/b"):
    sharding.parameter_axes("a/b", (("a/b", ()), ("(a|c)/b", ())))


def test_a_dimension_that_its_axis_does_not_divide_is_refused_by_name():
  params = parameters(*_flat(decoder()))
  with pytest.raises(ValueError, match=r"mesh.tensor=8 does not divide the 4 of .*\(heads\)"):
    sharding.parameter_shardings(params, abstract_mesh(tensor=8))


def _flat(model_and_args):
  model, args = model_and_args
  return (model, *args)


# ---------------------------------------------------------------------------------------------
# The mesh
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "sizes, devices, expected",
  [
    ({}, 1, {}),
    ({"data": -1}, 8, {"data": 8}),
    ({"data": -1, "tensor": 2}, 8, {"data": 4, "tensor": 2}),
    ({"slice": 2, "fsdp": -1}, 8, {"slice": 2, "fsdp": 4}),
    ({"data": 2, "sequence": 4}, 8, {"data": 2, "sequence": 4}),
  ],
)
def test_sizes_of_the_mesh_are_filled_in(sizes, devices, expected):
  assert sharding.resolve(sizes, devices) == dict.fromkeys(sharding.MESH_AXES, 1) | expected


@pytest.mark.parametrize(
  "sizes, message",
  [
    ({"data": 3}, "data=3 does not fit 8 devices: 3 must be their number; for these set mesh.d"),
    ({"data": -1, "tensor": 3}, "3 must divide them; for these set mesh.tensor=1$"),
    (
      {"slice": 2, "data": -1, "fsdp": 64, "tensor": 4},
      "set mesh.slices=1, mesh.data=1, mesh.fsdp=-1, mesh.tensor=1$",
    ),
    ({"data": -1, "fsdp": -1}, "only one may be -1"),
    ({}, "data=1 does not fit 8 devices: 1 must be their number; for these set mesh.data=-1$"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.resolve(sizes, 8)


def test_the_config_group_is_the_mesh_axes():
  assert tuple(MeshConfig().sizes()) == ("slice", "data", "fsdp", "sequence", "tensor")
  assert set(MeshConfig().sizes()) == set(sharding.MESH_AXES)
  with pytest.raises(ConfigError, match="mesh.tensor=0"):
    MeshConfig(tensor=0)
  with pytest.raises(ConfigError, match="one of them only"):
    MeshConfig(fsdp=-1)


def test_without_a_mesh_nothing_is_constrained():
  x = jnp.ones((2, 3, 4))
  assert sharding.constrain(x, "batch", "length", None) is x
  assert sharding.current() is None and sharding.parts("heads") == 1
  one = sharding.make_mesh({"data": 1}, jax.devices()[:1])
  with sharding.use_mesh(one):
    assert sharding.current() is None
    assert sharding.constrain_parameters({"a": x})["a"] is x


def test_what_is_not_cut_is_refused_where_it_would_be_done_twice():
  """On a mesh of devices that are not there: tracing needs none of them."""
  x = jax.ShapeDtypeStruct((4, 15, 8), jnp.float32)
  f = lambda x: sharding.constrain(x, "batch", "length", None)
  with sharding.use_mesh(abstract_mesh(), strict=True):
    jax.eval_shape(f, x)  # One device: nothing is done twice.
  with sharding.use_mesh(abstract_mesh(sequence=2), strict=True):
    with pytest.raises(ValueError, match=r"mesh.sequence: 2 parts do not divide the 15 of the len"):
      jax.eval_shape(f, x)
  with sharding.use_mesh(abstract_mesh(sequence=2)):
    assert sharding.activation_spec(x.shape, "batch", "length", None) == PartitionSpec(
      None, None, None
    )


def test_rows_that_processes_hold_in_part_are_refused():
  """Six devices of each of two processes, with tensor 4: the middle four hold rows of both."""
  Device = collections.namedtuple("Device", "id process_index")
  devices = [Device(i, i // 6) for i in range(12)]
  shape = tuple({"data": 3, "tensor": 4}.get(axis, 1) for axis in sharding.MESH_AXES)
  places = {d: (slice(4 * (i // 4), 4 * (i // 4) + 4),) for i, d in enumerate(devices)}
  mesh = types.SimpleNamespace(shape=dict(zip(sharding.MESH_AXES, shape, strict=True)))
  where = types.SimpleNamespace(devices_indices_map=lambda shape: places)
  with mock.patch.object(sharding, "batch_sharding", lambda mesh, rank: where):
    with pytest.raises(ValueError, match="cuts rows of a batch between processes"):
      sharding.rows_of_process(mesh, 12, 0)


def test_slices_of_a_torus_that_has_to_be_split_make_a_mesh():
  """Of two slices of 4 x 4 chips, axes of 8 and 2: no dimension of the torus is 8 long."""

  def device(i):
    x, y = divmod(i % 16, 4)
    return types.SimpleNamespace(
      id=i,
      platform="tpu",
      device_kind="TPU v5 lite",
      slice_index=i // 16,
      process_index=i // 4,
      coords=(x, y, 0),
      core_on_chip=0,
    )

  devices = [device(i) for i in range(32)]
  with mock.patch.object(sharding, "Mesh", lambda array, *_, **__: array):
    array = sharding.make_mesh({"slice": 2, "fsdp": 8, "tensor": 2}, devices)
  assert array.shape == (2, 1, 8, 1, 2)
  assert [{d.slice_index for d in part.ravel()} for part in array] == [{0}, {1}]


def test_slices_that_the_mesh_does_not_know_are_refused():
  devices = [types.SimpleNamespace(platform="tpu", slice_index=i // 2) for i in range(4)]
  with pytest.raises(ValueError, match="of 2 slices: set mesh.slices=2"):
    sharding.make_mesh({"data": -1}, devices)
  with pytest.raises(ValueError, match="of 2 slices: set mesh.slices=2"):
    sharding.make_mesh({"slice": 4}, devices)


# ---------------------------------------------------------------------------------------------
# Steps: every mesh takes those of one device
# ---------------------------------------------------------------------------------------------

SMALL = {"relative_buckets": 8, "kv_heads": 2}
MIXED = {"fsdp": 2, "sequence": 2, "tensor": 2}
MESHES = {
  "data": {"data": 8},
  "slices": {"slice": 2, "fsdp": 4},
  "fsdp": {"fsdp": 8},
  "tensor": {"fsdp": 4, "tensor": 2},
  "sequence": {"data": 2, "sequence": 4},
  "mixed": MIXED,
}


def run_steps(tmp_path, cases, *, processes=1, devices=8, dtype="float64"):
  """{case's name: arrays} of the cases, each a dict with `family`, `mesh` and `config`."""
  folder = tmp_path / f"{processes}x{devices}"
  folder.mkdir(parents=True)
  cases = {name: case | {"output": str(folder / f"{name}.npz")} for name, case in cases.items()}
  environment = {
    **simulated.devices(devices),
    "JAX_ENABLE_X64": "true" if dtype == "float64" else "false",
  }
  work = {"cases": list(cases.values()), "dtype": dtype}
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  running = []
  for i in range(processes):
    if processes > 1:
      where = {"coordinator_address": address, "num_processes": processes, "process_id": i}
      work["processes"] = where
    command = [sys.executable, "-W", "error", "-m", "tests.sharded_steps", json.dumps(work)]
    root = pathlib.Path(__file__).parents[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running.append(subprocess.Popen(command, env=environment, cwd=root, **pipes))
  try:
    outputs = [process.communicate(timeout=600)[0] for process in running]
  finally:
    for process in running:
      process.kill()
  assert [process.returncode for process in running] == [0] * processes, "\n".join(outputs)[-4000:]
  return {name: dict(np.load(case["output"])) for name, case in cases.items()}


def distance(a: dict, b: dict) -> float:
  """Norm of the difference of all parameters over their norm."""
  assert a.keys() == b.keys()
  names = a.keys() - {"losses", "other_loss"}
  # Flags of a model's state count as numbers.
  apart = sum(np.sum(np.subtract(a[n], b[n], dtype=np.float64) ** 2) for n in names)
  return math.sqrt(apart / sum(np.sum(np.square(b[n])) for n in names))


def causal(mesh, devices=None, **changes):
  model = SMALL | changes.pop("model", {})
  case = {"family": "causal_lm", "mesh": mesh, "config": {"model": model, **changes}}
  return case if devices is None else case | {"devices": devices}


def assert_equal_steps(found: dict, expected: dict, bound: float):
  np.testing.assert_allclose(found["losses"], expected["losses"], rtol=bound)
  assert distance(found, expected) < bound
  # The steps moved the parameters, and dropout was on: else there would be nothing to compare.
  assert np.ptp(expected["losses"]) > 1e-3
  assert abs(expected["other_loss"] / expected["losses"][0] - 1) > 1e-5
  np.testing.assert_allclose(found["other_loss"], expected["other_loss"], rtol=bound)


def test_a_mixed_mesh_takes_the_steps_of_one_device(tmp_path):
  """FSDP, tensor and sequence together, dropout everywhere, two parts a batch; float64, 1e-12.

  The loss by chunks of each part of the vocabulary, and on the one device all at once.
  """
  found = run_steps(
    tmp_path,
    {
      "one": causal({}, devices=1, accumulation=2, ema=0.9),
      "mixed": causal(MIXED, accumulation=2, ema=0.9, vocab_chunk=24),
    },
  )
  assert_equal_steps(found["mixed"], found["one"], 1e-12)


@pytest.mark.slow
def test_every_mesh_takes_the_steps_of_one_device(tmp_path):
  cases = {name: causal(mesh) for name, mesh in MESHES.items() if name != "mixed"}
  found = run_steps(tmp_path, {"one": causal({}, devices=1), **cases})
  for name in cases:
    assert_equal_steps(found[name], found["one"], 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in sharded_steps.FAMILIES if name != "causal_lm"])
def test_every_family_takes_the_steps_of_one_device(family, tmp_path):
  cases = {name: {"family": family, "mesh": mesh} for name, mesh in MESHES.items()}
  found = run_steps(tmp_path, {"one": {"family": family, "devices": 1}, **cases})
  for name in cases:
    assert_equal_steps(found[name], found["one"], 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("processes, devices", [(2, 4), (4, 2)])
def test_several_processes_take_the_steps_of_one(processes, devices, tmp_path):
  """Twice alike to the bit; as one process with one and with all devices in float64 to 1e-12."""
  cases = {name: causal(MESHES[name]) for name in ("fsdp", "mixed")}
  one = run_steps(tmp_path, {"one": causal({}, devices=1), **cases})
  several = [
    run_steps(tmp_path / str(i), cases, processes=processes, devices=devices) for i in range(2)
  ]
  for name in cases:
    assert_equal_steps(several[0][name], one["one"], 1e-12)
    assert_equal_steps(several[0][name], one[name], 1e-12)
    for array in several[0][name]:
      np.testing.assert_array_equal(several[0][name][array], several[1][name][array])


@pytest.mark.parametrize(
  "processes, devices",
  [
    pytest.param(1, 8, marks=pytest.mark.slow),
    pytest.param(2, 4, marks=pytest.mark.ci),
    pytest.param(4, 2, marks=pytest.mark.slow),
  ],
)
def test_the_steps_of_one_device_in_float32(processes, devices, tmp_path):
  """As users run: parameters to 1e-4 of their norm, losses to 1e-5."""
  cases, own = {"mixed": causal(MIXED)}, tmp_path / "one"
  (one,) = run_steps(own, {"one": causal({}, devices=1)}, dtype="float32").values()
  options = {"processes": processes, "devices": devices, "dtype": "float32"}
  (several,) = run_steps(tmp_path, cases, **options).values()
  np.testing.assert_allclose(several["losses"], one["losses"], rtol=1e-5)
  assert distance(several, one) < 1e-4


# ---------------------------------------------------------------------------------------------
# Programs: what a device holds and exchanges
# ---------------------------------------------------------------------------------------------

# Weights are most of what there is: 24 layers, and few tokens.
HEAVY = {"layers": 24, "width": 64, "heads": 8, "kv_heads": 8, "ffn_width": 256, "remat": "full"}
ACCUMULATION = 2
# Of every axis, what may be exchanged along it: weights are gathered along fsdp alone, and within
# the layers activations are summed along tensor, keys and values sent along sequence. All else are
# sums: of gradients, norms and losses.
KINDS = {
  "all-gather": {"fsdp"},
  "reduce-scatter": {"fsdp"},
  "collective-permute": {"sequence"},
  "all-reduce": {"slice", "data", "fsdp", "sequence", "tensor"},
}


def compiled_programs(tmp_path, meshes):
  config = {
    "model": HEAVY,
    "data": {"vocab_size": 512},
    "optimizer": {"clip_norm": 1.0},
    "accumulation": ACCUMULATION,
  }
  cases = {
    name: {"mesh": mesh, "config": config, "steps": False, "family": ""}
    for name, mesh in meshes.items()
  }
  return run_steps(tmp_path, cases, dtype="float32")


def check_program(found: dict, mesh: dict) -> None:
  cut = math.prod(mesh.get(axis, 1) for axis in ("fsdp", "tensor"))
  # What is no matrix, with both of Adam's moments, and the steps' counts alone may be whole.
  assert found["whole"] / cut <= found["state"] <= found["whole"] / cut + 3 * found["small"] + 100
  assert found["state"] <= found["arguments"] < 1.02 * found["state"] + 20_000
  # Where the state is made, a parameter at a time may be drawn whole.
  assert found["state"] <= found["initial"] < found["state"] + found["parameters"] / 3
  # Gradients as the parameters lie, their sum over parts, and a layer's weights at a time: never
  # all of them.
  assert found["temporaries"] < 2 * found["parameters"] / cut + found["parameters"] / 3
  exchanged = {tuple(row) for row in found["axes_and_kinds"].tolist()}
  for axes, kind in exchanged:
    assert set(axes.split()) <= KINDS[kind], (axes, kind)
  named = {axis for axes, _ in exchanged for axis in axes.split()}
  assert named == {axis for axis, size in mesh.items() if size > 1}
  # Each weight is gathered for the forward pass, for what is recomputed, and for the backward pass.
  gathered = found["axes_and_kinds"][:, 1] == "all-gather"
  gathered_bytes = np.sum(np.prod(found["bytes_and_times"][gathered], axis=1))
  limit = ACCUMULATION * 3 * found["parameters"] / mesh.get("tensor", 1)
  assert gathered_bytes <= limit and (gathered_bytes > limit / 2) == (mesh.get("fsdp", 1) > 1)


@pytest.mark.ci
def test_nothing_large_is_whole_everywhere_and_nothing_else_is_exchanged(tmp_path):
  for name, found in compiled_programs(tmp_path, MESHES).items():
    check_program(found, MESHES[name])


if __name__ == "__main__":
  GOLDEN.write_text("\n".join(golden_lines()) + "\n")
