"""A run that starts with the encoder of another model: its weights, and what must agree."""

import dataclasses
import functools
import math
import re
import subprocess
import sys
import textwrap
import types

import jax
import numpy as np
import optax
import pytest

from magneto_jax import cli, distributed, pretrained, program, runs, sharding
from magneto_jax.checkpoints import Checkpointer
from magneto_jax.config import ConfigError, TrainConfig, flatten, from_config_dict
from magneto_jax.convert import beit3, saved
from magneto_jax.data.tokenizers import ByteTokenizer
from magneto_jax.models import (
  AnsweringBEiT3,
  BEiT3,
  CaptioningBEiT3,
  Encoder,
  MaskedLM,
  ReasoningBEiT3,
  RetrievalBEiT3,
)
from magneto_jax.tasks import TASKS, text_classification
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import Architecture
from tests import reference, simulated
from tests.models import common

MODEL = {"layers": 2, "width": 8, "ffn_width": 16, "heads": 2, "positions": "learned"}
BYTES = ByteTokenizer.identity
FACTS = {"vocab_size": 260, "token_correlation": 0.05, "classes": 3}
TOKENS = np.random.default_rng(0).integers(4, 260, (2, 5))


def config_of(init_from, *, model=None, length=6, task="text_classification", **fields):
  data = {"tokenizer": "byte", "seq_length": length}
  given = {"task": task, "init_from": str(init_from), "batch_size": 4, "data": data}
  return from_config_dict({**given, "model": MODEL | (model or {}), **fields})


def causal_run(folder, *, length=9, ema=0.0, **fields):
  """A run of a language model with random weights at its step 7; returns these."""
  config = config_of("", task="causal_lm", length=length, ema=ema, **fields)
  model = TASKS["causal_lm"].build_model(config, FACTS)
  params = reference.random_params(model, TOKENS)
  record = runs.Record(config, {"tokenizer": dict(BYTES)}, FACTS)
  runs.write_record(folder, record)
  trees = {"params": params} | (
    {"ema_params": jax.tree.map(lambda x: 2 * x, params)} if ema else {}
  )
  with Checkpointer(runs.checkpoints_in(folder)) as checkpointer:
    nowhere = types.SimpleNamespace(get_state=lambda: {})
    checkpointer.save(7, jax.tree.map(jax.numpy.asarray, trees), nowhere, runs.as_json(record))
  return model, params


def masked_model(folder, *, rows=261, length=9, position_offset=0, **fields):
  """A converted masked model, whose table has a row for the mask behind the bytes."""
  config = config_of("", length=length, **fields)
  encoder = text_classification.build_model(config, FACTS | {"vocab_size": rows}).encoder
  model = MaskedLM(encoder=encoder.clone(position_offset=position_offset))
  params = reference.random_params(model, TOKENS)
  saved.save(folder, model, {"params": params})
  return model, params


def bare(config):
  """What a start reads of a program, without lowering one; and the state before the first step."""
  task = TASKS[config.task]
  model = task.build_model(config, FACTS)
  init = functools.partial(
    program.init_state, model=model, inputs=(TOKENS,), optimizer=optax.sgd(1.0), ema=config.ema
  )
  state = jax.jit(init)(jax.random.key(0))
  return types.SimpleNamespace(
    config=config,
    model=model,
    task=task,
    mesh=sharding.make_mesh({}, jax.devices()[:1]),
    state=state,
  )


def started(config):
  """The start of a run of the config, and what the run then has."""
  start, run = pretrained.find(config), bare(config)
  start.refuse_others(run, BYTES)
  return start, run, start.into(run.state, run)


def test_the_encoder_is_the_pretrained_one_and_the_head_is_drawn(tmp_path):
  """Its outputs are; tables are cut to vocabulary and length, from its first position on."""
  model, params = masked_model(tmp_path / "masked", position_offset=2)
  _, run, state = started(config_of(tmp_path / "masked"))
  fresh = run.state
  jax.tree.map(
    np.testing.assert_array_equal, state.params["head_dense"], fresh.params["head_dense"]
  )
  apply = lambda encoder, params: common.run(encoder, params, TOKENS)
  found = apply(run.model.encoder, state.params["encoder"])
  expected = apply(model.encoder, params["encoder"])
  np.testing.assert_array_equal(found, expected)
  shape = lambda name: state.params["encoder"][name]["embedding"].shape
  assert (shape("token_embedding"), shape("position_embedding")) == ((260, 8), (6, 8))
  jax.tree.map(np.testing.assert_array_equal, state.opt_state, fresh.opt_state)


@pytest.mark.parametrize(
  "name, variant",
  [("beit.py:tiny", "mnist"), ("beit3.py:tiny", "emoji"), ("beit3.py:base", "base")],
)
def test_without_an_image_tokenizer_the_command_that_trains_one_is_named(name, variant):
  """Of the same images, whose tokens the config then takes."""
  needs = cli.config_of(f"configs/{name}")
  with pytest.raises(ConfigError, match="image_tokenizer='' holds no run with a check") as caught:
    pretrained.find(needs)
  config, workdir, flag = re.findall(r"--[\w.]+=[^\s,]+", str(caught.value))
  assert config == f"--config=configs/image_tokenizer.py:{variant}"
  assert flag.replace("config.image_tokenizer", "workdir") == workdir
  own, other = flatten(needs), flatten(cli.config_of(config.partition("=")[2]))
  fields = ("model.image_size", "model.patch_size", "model.image_vocab_size")
  assert all(f"{field}={own[field]}" in str(caught.value) for field in fields)
  assert [own[field] for field in fields] == [other[field] for field in fields]


def test_processes_that_see_other_checkpoints_are_refused(monkeypatch, tmp_path):
  """One of them may see a step that another does not see yet."""
  masked_model(tmp_path / "masked")
  asked = []
  monkeypatch.setattr(distributed, "agree", lambda name, value: asked.append((name, value)))
  started(config_of(tmp_path / "masked"))
  causal_run(tmp_path / "run", model={"tied_embeddings": False})
  started(config_of(tmp_path / "run"))
  assert [value for _, value in asked] == [None, runs.last_step(tmp_path / "run")]
  assert asked[1][1] > 0 and asked[1][0] == f"the newest checkpoint of {tmp_path / 'run'}"


@pytest.mark.ci
def test_a_language_models_stack_is_an_encoder_too(tmp_path):
  """All its weights but the head's; of a run that averages them the average."""
  for name, ema in (("run", 0.0), ("averaged", 0.9)):
    _, params = causal_run(tmp_path / name, ema=ema, model={"tied_embeddings": False})
    config = config_of(tmp_path / name, ema=ema)
    start, _, state = started(config)
    assert start.tokenizer == BYTES
    factor = 2 if ema else 1
    expected = jax.tree.map(lambda x, factor=factor: factor * np.asarray(x), params)
    del expected["output_embedding"]
    expected["position_embedding"]["embedding"] = expected["position_embedding"]["embedding"][:6]
    jax.tree.map(np.testing.assert_array_equal, state.params["encoder"], expected)
    if ema:
      jax.tree.map(np.testing.assert_array_equal, state.ema_params, state.params)
      mine = zip(*map(jax.tree.leaves, (state.ema_params, state.params)), strict=True)
      assert all(a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer() for a, b in mine)


DISAGREEING = {
  "layers": ({"model": {"layers": 3}}, "config.model.layers does not agree .* must be 2, not 3"),
  "width": ({"model": {"width": 16}}, "config.model.width does not agree .* must be 8, not 16"),
  "heads": ({"model": {"heads": 4}}, "config.model.heads does not agree .* must be 2, not 4"),
  "ffn": ({"model": {"ffn_width": 8}}, "config.model.ffn_width does not .* must be 16, not 8"),
  "activation": ({"model": {"activation": "relu"}}, "config.model.activation does not agree"),
  "positions": ({"model": {"positions": "rotary"}}, "config.model.positions does not agree"),
  "norm": ({"model": {"norm": "rms_norm"}}, "config.model.norm does not agree"),
  "recipe": ({"recipe": "deepnet"}, "config.recipe does not agree with .*layer 0 .* it must be"),
  "qk": ({"model": {"qk_norm": "head"}}, "config.recipe does not agree .*qk_norm: it must be None"),
  "length": ({"length": 10}, "config.data.seq_length=10 is more than the 9 learned positions"),
}


@pytest.mark.parametrize("case", DISAGREEING)
def test_what_does_not_agree_is_refused_with_its_field(case, tmp_path):
  fields, message = DISAGREEING[case]
  masked_model(tmp_path / "masked")
  config = config_of(tmp_path / "masked", **fields)
  task = TASKS[config.task]
  run = types.SimpleNamespace(config=config, model=task.build_model(config, FACTS), task=task)
  with pytest.raises(ConfigError, match=message) as error:
    pretrained.find(config).refuse_others(run, BYTES)
  assert "\n" not in str(error.value)


def test_a_parameter_that_is_not_there_is_refused(tmp_path):
  """Where only the weights tell two recipes apart: a norm of the embedding."""
  masked_model(tmp_path / "masked", recipe="sandwich_ln")
  with pytest.raises(ConfigError, match="encoder has no embedding_norm/bias"):
    started(config_of(tmp_path / "masked", recipe="peri_ln"))


@pytest.mark.parametrize("rows", (259, 262))
def test_another_vocabulary_is_refused(rows, tmp_path):
  masked_model(tmp_path / "masked", rows=rows)
  config = config_of(tmp_path / "masked")
  task = TASKS[config.task]
  run = types.SimpleNamespace(config=config, model=task.build_model(config, FACTS), task=task)
  with pytest.raises(
    ConfigError, match=f"has {rows} tokens, and the run's 260: set config.data.to"
  ):
    pretrained.find(config).refuse_others(run, BYTES)


def test_the_tokenizer_is_the_runs(tmp_path):
  config = config_of(tmp_path / "run")
  with pytest.raises(
    ConfigError, match="holds neither a run with a checkpoint nor a converted mod"
  ):
    pretrained.find(config)
  causal_run(tmp_path / "run")
  pieces = {"tokenizer": "sentencepiece"}
  with pytest.raises(
    ConfigError, match=r"tokenizer='sentencepiece' is not that of .* set data.tok"
  ):
    pretrained.find(dataclasses.replace(config, data=dataclasses.replace(config.data, **pieces)))
  start = pretrained.find(config)
  task = TASKS[config.task]
  run = types.SimpleNamespace(config=config, model=task.build_model(config, FACTS), task=task)
  with pytest.raises(ConfigError, match="is not the tokenizer of .*: leave it empty to have that"):
    start.refuse_others(run, {"kind": "byte", "vocab_size": 259})
  record = runs.read_record(tmp_path / "run")
  of_pieces = dataclasses.replace(record.config.data, tokenizer="sentencepiece", vocab_size=300)
  runs.write_record(
    tmp_path / "run",
    record._replace(config=dataclasses.replace(record.config, data=of_pieces)),
  )
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, **pieces))
  assert pretrained.find(config).tokenizer_file == str(tmp_path / "run/data/tokenizer.model")


@pytest.mark.ci
def test_a_mesh_holds_the_same_weights_and_a_run_starts_with_them_once(tmp_path):
  """On four devices, cut; then a whole run, resumed when what it started with is gone."""
  masked_model(tmp_path / "masked", length=32, rows=261)
  (tmp_path / "x.tsv").write_text(
    "text\tlabel\n" + "\n".join(f"line {i}\t{i % 3}" for i in range(40))
  )
  code = f"""
    import shutil
    import jax, numpy as np
    from magneto_jax import distributed, pretrained, program, runs, sharding, training
    from tests import test_pretrained as tests

    folder = {str(tmp_path)!r}
    config = tests.config_of(folder + "/masked", mesh={{"fsdp": 2, "tensor": 2}})
    mesh = sharding.make_mesh(config.mesh.sizes())
    step = program.lower_step(config, tests.FACTS, mesh)
    start = pretrained.find(config)
    start.refuse_others(step, tests.BYTES)
    state = start.into(step.init(jax.random.key(0)), step)
    _, variables = runs.load(folder + "/masked")
    wanted = variables["params"]["encoder"]
    wanted["token_embedding"]["embedding"] = wanted["token_embedding"]["embedding"][:260]
    wanted["position_embedding"]["embedding"] = wanted["position_embedding"]["embedding"][:6]
    jax.tree.map(np.testing.assert_array_equal, state.params["encoder"], wanted)
    places = jax.tree.map(lambda x: x.sharding, state.params)
    assert places == jax.tree.map(lambda x: x.sharding, step.state.params)
    assert not state.params["encoder"]["token_embedding"]["embedding"].is_fully_replicated
    data = {{"name": "text_files", "tokenizer": "byte", "seq_length": 16}}
    data |= {{"train_files": folder + "/x.tsv", "validation_fraction": 0.3}}
    fields = {{"data": data, "mesh": {{"fsdp": 2, "tensor": 2}}, "checkpoint_every": 1}}
    fields |= {{"optimizer": {{"learning_rate": 1e-6}}, "steps": 1, "eval_every": 1}}
    training.train(tests.config_of(folder + "/masked", **fields), folder + "/run")
    run = runs.load(folder + "/run").variables["params"]["encoder"]
    np.testing.assert_allclose(
      run["token_embedding"]["embedding"], wanted["token_embedding"]["embedding"], atol=1e-4
    )
    shutil.rmtree(folder + "/masked")
    more = tests.config_of(folder + "/masked", **fields | {{"steps": 2}})
    assert training.train(more, folder + "/run")["resumed_at_step"] == 1
  """
  command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
  result = subprocess.run(command, env=simulated.devices(4), capture_output=True, text=True)
  assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------------------------------------
# Encoders of images
# ---------------------------------------------------------------------------------------------

IMAGE_FACTS = {"classes": 3, "token_correlation": 0.3}


def image_config(init_from, *, size=8, model=None, **fields):
  sizes = {"image_size": size, "patch_size": 2, "relative_patches": True, "pooling": "mean"}
  given = {"task": "image_classification", "init_from": str(init_from), "batch_size": 4}
  return from_config_dict({**given, "model": MODEL | sizes | (model or {}), **fields})


def image_model(folder, *, size=8, class_token=True, **model):
  """A converted encoder of images with a mask token, and random weights."""
  config = image_config("", size=size, model={"pooling": "first"} | model)
  vision = TASKS[config.task].build_model(config, IMAGE_FACTS).encoder
  vision = vision.clone(class_token=class_token, mask_token=True)
  params = reference.random_params(vision, np.zeros((1, size, size, 3), np.float32))
  saved.save(folder, vision, {"params": params})
  return params


def bare_of_images(config):
  task = TASKS[config.task]
  model = task.build_model(config, IMAGE_FACTS)
  return types.SimpleNamespace(config=config, model=model, task=task)


def started_on_images(config):
  """The state of a run of the config that has started, and its fresh one; nothing is lowered."""
  task = TASKS[config.task]
  model = task.build_model(config, IMAGE_FACTS)
  init = functools.partial(
    program.init_state,
    model=model,
    inputs=task.dummy_inputs(config),
    optimizer=optax.sgd(1.0),
    ema=config.ema,
  )
  fresh = common.compiled(init)(jax.random.key(0))
  mesh = sharding.make_mesh({}, jax.devices()[:1])
  run = types.SimpleNamespace(config=config, model=model, task=task, mesh=mesh, state=fresh)
  start = pretrained.find(config)
  start.refuse_others(run, {})
  return start.into(fresh, run), fresh


@pytest.mark.ci
def test_an_encoder_of_images_is_the_pretrained_one_and_the_head_is_drawn(tmp_path):
  """Of the same grid every array is; what it holds of a class token is left out without one."""
  params = image_model(tmp_path / "model")
  state, fresh = started_on_images(image_config(tmp_path / "model"))
  found, drawn = state.params, fresh.params
  jax.tree.map(np.testing.assert_array_equal, found["head_out"], drawn["head_out"])
  jax.tree.map(np.testing.assert_array_equal, found["head_norm"], drawn["head_norm"])
  expected = {**params, "patch_embedding": {"projection": params["patch_embedding"]["projection"]}}
  expected["patch_relative_bias"] = params["patch_relative_bias"][:-3]
  table = params["encoder"]["position_embedding"]["embedding"][1:]
  expected["encoder"] = {**params["encoder"], "position_embedding": {"embedding": table}}
  jax.tree.map(np.testing.assert_array_equal, found["encoder"], expected)


def test_tables_of_another_grid_are_interpolated(tmp_path):
  """4 x 4 patches to 6 x 6: what is of the class token is kept, all else as the functions say."""
  params = image_model(tmp_path / "model")
  config = image_config(tmp_path / "model", size=12, model={"pooling": "first"})
  found = started_on_images(config)[0].params["encoder"]
  biases, old = found["patch_relative_bias"], params["patch_relative_bias"]
  assert biases.shape == (11 * 11 + 3, 2)
  np.testing.assert_array_equal(biases[-3:], old[-3:])
  wanted = pretrained.resized_biases(old[:-3], (4, 4), (6, 6))
  np.testing.assert_array_equal(biases[:-3], wanted)
  table = params["encoder"]["position_embedding"]["embedding"]
  resized = found["encoder"]["position_embedding"]["embedding"]
  assert resized.shape == (37, 8)
  np.testing.assert_array_equal(resized[0], table[0])
  wanted = pretrained.resized_positions(table[1:], (4, 4), (6, 6))
  np.testing.assert_array_equal(resized[1:], wanted)


@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (2, 5), (5, 2), (3, 4)])
def test_biases_of_another_grid_are_beits(old, new):
  """Offsets stretch by a geometric series: a plane over what they become stays one."""
  places = pretrained._spread(old, new)
  assert places[-1] == pytest.approx(max(new, old) - 1) and places[old - 1] == 0
  steps = np.diff(places[old - 1 :])
  if len(steps) > 2:
    np.testing.assert_allclose(steps[1:] / steps[:-1], steps[1] / steps[0], rtol=1e-6)
  plane = places[:, None] + 2 * places + 3
  table = np.stack([plane, -plane], axis=-1).reshape(-1, 2)
  np.testing.assert_array_equal(pretrained.resized_biases(table, (old, old), (old, old)), table)
  found = pretrained.resized_biases(table, (old, old), (new, new)).reshape(2 * new - 1, -1, 2)
  offsets = np.arange(1 - new, new)
  wanted = offsets[:, None] + 2 * offsets + 3
  np.testing.assert_allclose(found, np.stack([wanted, -wanted], axis=-1), atol=1e-6)
  with pytest.raises(ConfigError, match=r"biases of \(1, 1\) patches cannot be .*: sides need two"):
    pretrained.resized_biases(table[:1], (1, 1), (new, new))


def test_pixels_are_scaled_as_those_that_the_encoder_has_read(tmp_path, monkeypatch):
  runs.write_record(tmp_path, runs.Record(image_config(""), {}, IMAGE_FACTS))
  monkeypatch.setattr(runs, "last_step", lambda folder: 3)
  pretrained.find(image_config(tmp_path))
  with pytest.raises(ConfigError, match="='imagenet' is not that of .*: set data.normalization='h"):
    pretrained.find(image_config(tmp_path, data={"normalization": "imagenet"}))


@pytest.mark.parametrize(
  ("model", "of_start", "message"),
  (
    ({"patch_size": 4}, {}, "config.model.patch_size does not agree .* must be 2, not 4"),
    ({"relative_patches": False}, {}, "relative_patches does not agree .* must be True, not False"),
    ({"width": 16}, {}, "config.model.width does not agree .* must be 8, not 16"),
    ({"positions": "none"}, {}, "config.model.positions does not agree"),
    ({"pooling": "first"}, {"class_token": False}, "has not: set model.pooling='mean'"),
  ),
)
def test_another_encoder_of_images_is_refused_with_its_field(model, of_start, message, tmp_path):
  image_model(tmp_path / "model", **of_start)
  config = image_config(tmp_path / "model", model=model)
  run = bare_of_images(config)
  with pytest.raises(ConfigError, match=message) as error:
    pretrained.find(config).refuse_others(run, {})
  assert "\n" not in str(error.value)


def test_images_and_texts_do_not_start_with_each_other(tmp_path):
  causal_run(tmp_path / "run")
  config = image_config(tmp_path / "run")
  run = bare_of_images(config)
  with pytest.raises(ConfigError, match="has no encoder that reads images"):
    pretrained.find(config).refuse_others(run, {})
  image_model(tmp_path / "model")
  config = config_of(tmp_path / "model")
  task = TASKS[config.task]
  run = types.SimpleNamespace(config=config, model=task.build_model(config, FACTS), task=task)
  with pytest.raises(ConfigError, match="has no encoder that reads tokens"):
    pretrained.find(config).refuse_others(run, BYTES)


# ---------------------------------------------------------------------------------------------
# Encoders of sounds
# ---------------------------------------------------------------------------------------------


def sound_config(init_from, task="speech_translation", *, model=None, data=None, **fields):
  """By default a translation, which has a decoder."""
  sizes = {"mel_bins": 8, "encoder_layers": 2}
  if task == "speech_recognition":
    del sizes["encoder_layers"]
  given = {"name": "embedded/fr-en", "tokenizer": "byte", "seq_length": 5, "max_seconds": 1.0}
  return from_config_dict(
    {
      "task": task,
      "init_from": str(init_from),
      "batch_size": 4,
      "model": MODEL | sizes | (model or {}),
      "data": given | (data or {}),
      **fields,
    }
  )


def recognizer(folder):
  """A run of a CTC that hears sounds of two seconds: its record, and random weights."""
  config = sound_config("", "speech_recognition", data={"max_seconds": 2.0, "tokenizer": "char"})
  task, facts = TASKS[config.task], {"vocab_size": 7}
  model = task.build_model(config, facts)
  params = reference.random_params(model, *task.dummy_inputs(config))
  runs.write_record(folder, runs.Record(config, {}, facts))
  with Checkpointer(runs.checkpoints_in(folder)) as checkpointer:
    nowhere = types.SimpleNamespace(get_state=lambda: {})
    checkpointer.save(1, {"params": jax.tree.map(jax.numpy.asarray, params)}, nowhere, {})
  return params


def hearing(config):
  """A run of the config as far as `refuse_others` goes by it."""
  task = TASKS[config.task]
  model = task.build_model(config, {"vocab_size": 260})
  return types.SimpleNamespace(config=config, model=model, task=task)


@pytest.mark.ci
def test_a_translator_starts_with_a_recognisers_encoder(tmp_path):
  """Front end and layers, with the first of its learned positions; whatever its tokens were."""
  params = recognizer(tmp_path / "run")
  config = sound_config(tmp_path / "run", ema=0.9)
  run = hearing(config)
  init = functools.partial(
    program.init_state,
    model=run.model,
    inputs=run.task.dummy_inputs(config),
    optimizer=optax.sgd(1.0),
    ema=config.ema,
  )
  run.state = common.compiled(init)(jax.random.key(0))
  run.mesh = sharding.make_mesh({}, jax.devices()[:1])
  start = pretrained.find(config)
  assert start.tokenizer_file == ""
  start.refuse_others(run, BYTES)
  state = start.into(run.state, run)
  jax.tree.map(np.testing.assert_array_equal, state.params["decoder"], run.state.params["decoder"])
  wanted = dict(params["encoder"])
  table = wanted["encoder"]["position_embedding"]["embedding"]
  own = state.params["encoder"]["encoder"]["position_embedding"]["embedding"]
  assert len(table) == 50 and len(own) == 25
  wanted["encoder"] = {**wanted["encoder"], "position_embedding": {"embedding": table[:25]}}
  jax.tree.map(np.testing.assert_array_equal, state.params["encoder"], wanted)
  jax.tree.map(np.testing.assert_array_equal, state.ema_params, state.params)


@pytest.mark.parametrize(
  ("fields", "message"),
  (
    ({"data": {"sample_rate": 16_000}}, "data.sample_rate does not .* must be 8000, not 16000"),
    ({"model": {"mel_bins": 9}}, "config.model.mel_bins does not agree .* must be 8, not 9"),
    ({"model": {"front_end": "vgg"}}, "model.front_end does not agree .* be 'conv', not 'vgg'"),
    ({"model": {"encoder_layers": 1}}, "config.model.layers does not agree .* must be 2, not 1"),
    ({"data": {"max_seconds": 3.0}}, "max_seconds=3 makes 75 vectors, more than the 50 learned"),
    ({"recipe": "pre_ln"}, "config.recipe does not agree"),
  ),
)
def test_another_encoder_of_sounds_is_refused_with_its_field(fields, message, tmp_path):
  recognizer(tmp_path / "run")
  config = sound_config(tmp_path / "run", **fields)
  with pytest.raises(ConfigError, match=message) as error:
    pretrained.find(config).refuse_others(hearing(config), BYTES)
  assert "\n" not in str(error.value)


def test_sounds_and_texts_do_not_start_with_each_other(tmp_path):
  causal_run(tmp_path / "run")
  config = sound_config(tmp_path / "run")
  with pytest.raises(ConfigError, match="has no encoder that reads sounds"):
    pretrained.find(config).refuse_others(hearing(config), BYTES)


# ---------------------------------------------------------------------------------------------
# Images and texts
# ---------------------------------------------------------------------------------------------


def pairs_encoder(*, side=2, patch_size=2, vocab_size=11, length=5, offset=0, **fields) -> BEiT3:
  sizes = {"width": 8, "num_heads": 2, "ffn_width": 16} | fields
  recipe = RECIPES["magneto_torchscale"](Architecture("encoder", 2, 0, sizes["width"], 16, 2))
  experts = {"positions": "none", "experts": ("vision", "text")}
  return BEiT3(
    encoder=Encoder(recipe=recipe.encoder, **experts, **sizes),
    vocab_size=vocab_size,
    num_patches=side**2,
    patch_size=patch_size,
    max_text_length=length,
    position_offset=offset,
  )


def pairs_of(encoder):
  side = encoder.patch_size * math.isqrt(encoder.num_patches)
  return np.zeros((1, side, side, 3), np.float32), np.zeros((1, encoder.max_text_length), np.int32)


def captioner(folder, **fields):
  """A converted captioning model, and its encoder's random weights."""
  model = CaptioningBEiT3(encoder=pairs_encoder(**fields), mask_id=3)
  params = reference.random_params(model, *pairs_of(model.encoder))
  saved.save(folder, model, {"params": params})
  return params["encoder"]


def run_of_pairs(**fields):
  """What a start reads of a retrieval run."""
  model = RetrievalBEiT3(encoder=pairs_encoder(**fields))
  return types.SimpleNamespace(
    config=TrainConfig(), model=model, task=types.SimpleNamespace(pretrained="encoder")
  )


def begun(run):
  """The same with its state before the first step, which nothing is lowered for."""
  init = functools.partial(
    program.init_state,
    model=run.model,
    inputs=pairs_of(run.model.encoder),
    optimizer=optax.sgd(1.0),
    ema=0.0,
  )
  run.state = common.compiled(init)(jax.random.key(0))
  run.mesh = sharding.make_mesh({}, jax.devices()[:1])
  return run


def test_of_the_same_task_a_head_is_taken_as_far_as_it_fits(tmp_path):
  """Of a question answerer with other answers all but the last matrix; and it is said."""
  model = AnsweringBEiT3(encoder=pairs_encoder(), answers=3)
  params = reference.random_params(model, *pairs_of(model.encoder))
  saved.save(tmp_path / "model", model, {"params": params})
  start = pretrained.Start(str(tmp_path / "model"), model, None, "")
  run = run_of_pairs()
  run.model = model.clone(answers=2)
  found = start.into(begun(run).state, run).params
  for name in ("encoder", "pooler_norm", "pooler_dense", "head_dense", "head_norm"):
    jax.tree.map(np.testing.assert_array_equal, found[name], params[name])
  jax.tree.map(np.testing.assert_array_equal, found["head_out"], run.state.params["head_out"])
  taken, drawn = start.in_words(run).split("; drawn are ")
  assert drawn == "head_out" and taken.startswith(f"its encoder starts with {start.folder}, and so")
  assert {*taken.rpartition("so do ")[2].split(", ")} == found.keys() - {"encoder", "head_out"}


def test_of_retrieval_projections_and_temperature_are_taken_and_of_another_task_nothing():
  run = run_of_pairs(side=3)
  params = reference.random_params(run.model, *pairs_of(run.model.encoder))
  run.state = types.SimpleNamespace(params=params)
  source = RetrievalBEiT3(encoder=pairs_encoder())
  start = pretrained.Start("there", source, None, "")
  assert {path[0] for path in start.heads(run)} == params.keys() - {"encoder"}
  assert "drawn" not in start.in_words(run)
  other = start._replace(model=ReasoningBEiT3(encoder=source.encoder))
  assert other.heads(run) == []
  assert "; drawn are " in other.in_words(run) and "logit_scale" in other.in_words(run)
  # Of two images the head reads both.
  run.model = other.model.clone(encoder=run.model.encoder)
  images, tokens = pairs_of(run.model.encoder)
  run.state.params = reference.random_params(run.model, np.stack([images] * 2, 1), tokens)
  assert {path[0] for path in other.heads(run)} == run.state.params.keys() - {"encoder"}
  # A question answerer's has arrays of the same names and shapes, and another task.
  answering = AnsweringBEiT3(encoder=source.encoder, answers=2)
  assert start._replace(model=answering).heads(run) == []


def test_an_encoder_of_images_and_texts_is_taken_on_another_grid(tmp_path):
  """Of a released model's layout: two rows before positions, a larger vocabulary, longer texts."""
  params = captioner(tmp_path / "model", vocab_size=19, length=7, offset=2)
  run = begun(run_of_pairs(side=3))
  start = pretrained.Start(str(tmp_path / "model"), runs.load(tmp_path / "model").model, None, "")
  start.refuse_others(run, {})
  state = start.into(run.state, run)
  for head in ("image_head", "text_head", "logit_scale"):
    jax.tree.map(np.testing.assert_array_equal, state.params[head], run.state.params[head])
  table = params["position_embeddings_vision"]["embedding"]
  # What a conversion to this size has.
  released = beit3.to_beit3(start.encoder, {"params": params})
  given = beit3.config_of(start.encoder)
  converted = beit3.from_beit3(released, given, image_size=6)[1]["params"]
  resized = converted["position_embeddings_vision"]["embedding"][3:]
  expected = params | {
    "text_embedding": {"embedding": params["text_embedding"]["embedding"][:11]},
    "position_embeddings_text": {"embedding": params["position_embeddings_text"]["embedding"][2:7]},
    "position_embeddings_vision": {"embedding": np.concatenate([table[2:3], resized])},
  }
  jax.tree.map(np.testing.assert_array_equal, state.params["encoder"], expected)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"tokenizer": "sentencepiece"}, "'sentencepiece' has other tokens .* set data.tokenizer='xl"),
    ({"tokenizer": "byte"}, "data.tokenizer='byte' has other tokens than the converted BEiT-3 of"),
    ({"normalization": "imagenet"}, "='imagenet' is not that of .*: set data.normalization='half"),
    ({}, None),
  ],
)
@pytest.mark.parametrize("task", ["image_text_retrieval", "image_captioning"])
def test_a_released_model_reads_its_own_tokens_and_pixels(task, fields, message, tmp_path):
  captioner(tmp_path / "model")
  config = from_config_dict(
    {
      "task": task,
      "init_from": str(tmp_path / "model"),
      "data": {"name": "embedded/emoji/en", "tokenizer": "xlmr"} | fields,
      "model": {"image_size": 32, "patch_size": 8},
    }
  )
  if message is None:
    assert pretrained.find(config).tokenizer is None
    return
  with pytest.raises(ConfigError, match=message) as error:
    pretrained.find(config)
  assert "\n" not in str(error.value)


def test_positions_that_nothing_reads_may_begin_anywhere():
  """As in a converted BEiT-3, whose stack counts from 2 and has no positions; sinusoids have."""
  run, theirs = run_of_pairs(), pairs_encoder()
  moved = theirs.clone(encoder=theirs.encoder.clone(position_offset=2))
  pretrained.Start("there", moved, None, "").refuse_others(run, {})
  sinusoids = theirs.encoder.clone(positions="sinusoidal")
  run.model = RetrievalBEiT3(encoder=theirs.clone(encoder=sinusoids))
  moved = theirs.clone(encoder=sinusoids.clone(position_offset=2))
  with pytest.raises(ConfigError, match="positions of init_from=there begin at another number"):
    pretrained.Start("there", moved, None, "").refuse_others(run, {})


OTHER_PAIRS = {
  "patches": ({"patch_size": 4}, "model.patch_size does not agree .* it must be 4, not 2"),
  "vocabulary": ({"vocab_size": 20}, "has 20 tokens, and the run's 11: set .*tokenizer_file"),
  "fewer tokens": ({"vocab_size": 10}, "has 10 tokens, and the run's 11"),
  "length": ({"length": 4}, "data.seq_length=5 is more than the 4 learned positions"),
  "form": ({"shared_attention": True}, "model.shared_attention does not agree .* must be True"),
  "width": ({"width": 16}, "model.width does not agree .* must be 16, not 8"),
}


@pytest.mark.parametrize("case", OTHER_PAIRS)
def test_another_encoder_of_images_and_texts_is_refused_with_its_field(case):
  fields, message = OTHER_PAIRS[case]
  start = pretrained.Start("there", pairs_encoder(**fields), None, "")
  with pytest.raises(ConfigError, match=message) as error:
    start.refuse_others(run_of_pairs(), {})
  assert "init_from=there" in str(error.value) and "\n" not in str(error.value)


def test_an_encoder_without_the_final_norm_starts_none_with_it():
  """A question answerer's; the other way round the norm is left out."""
  whole = pairs_encoder()
  bare = dataclasses.replace(whole.encoder.recipe, final_norm=False)
  answering = AnsweringBEiT3(
    encoder=whole.clone(encoder=whole.encoder.clone(recipe=bare)), answers=2
  )
  run = run_of_pairs()
  with pytest.raises(ConfigError, match=r"init_from=there has no norm .*\(final_norm\).* masked_d"):
    pretrained.Start("there", answering, None, "").refuse_others(run, {})
  run.model = answering
  for source in (answering, RetrievalBEiT3(encoder=whole)):
    pretrained.Start("there", source, None, "").refuse_others(run, {})


def test_a_run_of_images_and_texts_starts_with_no_other_encoder():
  alone = pairs_encoder().encoder
  start = pretrained.Start("there", MaskedLM(encoder=alone.clone(vocab_size=11)), None, "")
  with pytest.raises(ConfigError, match="has no encoder that reads images and texts"):
    start.refuse_others(run_of_pairs(), {})
