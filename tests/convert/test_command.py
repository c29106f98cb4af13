"""The command: checkpoints to folders and back, and every mistake as one line, nothing written."""

import functools
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags

import magneto_jax
from magneto_jax import runs
from magneto_jax.checkpoints import Checkpointer
from magneto_jax.config import ConfigError, from_config_dict
from magneto_jax.convert import __main__ as command
from magneto_jax.convert import fairseq as fairseq_module
from magneto_jax.convert import (
  from_torchscale,
  read_state_dict,
  to_beit3,
  to_fairseq,
  to_torchscale,
  write_state_dict,
)
from magneto_jax.convert import torchscale as torchscale_module
from magneto_jax.data import pipelines
from magneto_jax.models import VisionEncoder
from magneto_jax.tasks import TASKS
from magneto_jax.theory.recipes import normformer
from tests.checkpoints import assert_same_tensors, beit3, decoder, masked_lm, weights

COMMAND = [sys.executable, "-m", "magneto_jax.convert"]


def run(**given) -> None:
  """The command, in this process: `run(from_="torchscale", input=..., output=...)`."""
  values = flags.FlagValues()
  for name in ("from", "to", "input", "output"):
    flags.DEFINE_string(name, None, name, flag_values=values)
  flags.DEFINE_string("model_config", "", "model_config", flag_values=values)
  for name in ("image_size", "step"):
    flags.DEFINE_integer(name, None, name, flag_values=values)
  flags.DEFINE_bool("vision", False, "vision", flag_values=values)
  values([sys.argv[0], *(f"--{name.rstrip('_')}={value}" for name, value in given.items())])
  command.run(values)


def legacy_lm():
  model = decoder(lambda a: normformer(a, residual_scale="vector"))
  return model, to_fairseq(model, weights(model), legacy=True)


def half(tensors):
  """Two tensors of three in half precision."""
  return {n: t.astype(np.float16) if i % 3 else t for i, (n, t) in enumerate(tensors.items())}


def checkpoints():
  """Of each library: its tensors and its configuration."""
  torchscale, lm, images = decoder(positions="xpos"), legacy_lm(), beit3()
  roberta = masked_lm("pre_ln", head="dense")
  version = {"decoder.version": np.full(1, np.nan, np.float32)}
  heads = {"head.weight": np.ones(2, np.float32), "logit_scale": np.ones((), np.float32)}
  return {
    "torchscale": (
      half(to_torchscale(torchscale, weights(torchscale))),
      torchscale_module.config_of(torchscale) | {"dropout": 0.1},
    ),
    "fairseq": (lm[1] | version, fairseq_module.config_of(lm[0])),
    "fairseq roberta": (to_fairseq(roberta, weights(roberta)), fairseq_module.config_of(roberta)),
    "beit3": (half(to_beit3(images, weights(images))) | heads, torchscale_module.config_of(images)),
  }


@pytest.mark.parametrize("name", ["torchscale", "fairseq", "fairseq roberta", "beit3"])
def test_a_file_comes_back_as_it_was(name, tmp_path, capsys):
  """Names, numbers, precision, what is no parameter, and the configuration."""
  tensors, config = checkpoints()[name]
  source = name.split()[0]
  write_state_dict(tmp_path / "in.npz", tensors, config)
  run(from_=source, input=tmp_path / "in.npz", output=tmp_path / "model")
  out = capsys.readouterr().out
  assert "layers, width 8, 2 heads, FFN 12" in out and "magneto_jax.load" in out
  assert ("kept beside the model: " in out) == (name != "fairseq roberta")
  run(to=source, input=tmp_path / "model", output=tmp_path / "out.npz")
  again, written_config = read_state_dict(tmp_path / "out.npz", finite=False)
  assert_same_tensors(again, tensors)
  assert written_config == config
  model, variables = magneto_jax.load(tmp_path / "model")
  run(to="safetensors", input=tmp_path / "model", output=tmp_path / "ours.safetensors")
  ours = read_state_dict(tmp_path / "ours.safetensors").tensors
  paths = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
  assert ours.keys() == {"/".join(key.key for key in path) for path, _ in paths}


def test_the_command_in_a_process_of_its_own(tmp_path):
  """There, back, and a mistake."""
  tensors, config = checkpoints()["torchscale"]
  write_state_dict(tmp_path / "in.safetensors", tensors)
  (tmp_path / "config.json").write_text(json.dumps({"resolved": config}))
  there = ["--from=torchscale", "--input=in.safetensors", "--model_config=config.json"]

  def call(*arguments):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, cwd=tmp_path, text=True)

  result = call(*there, "--output=model")
  assert result.returncode == 0 and not result.stderr, result.stderr
  assert "CausalLM: 3 layers, width 8, 2 heads, FFN 12;" in result.stdout
  result = call("--to=torchscale", "--input=model", "--output=out.safetensors")
  assert result.returncode == 0 and not result.stderr, result.stderr
  assert_same_tensors(read_state_dict(tmp_path / "out.safetensors").tensors, tensors)
  result = call(*there, "--output=model")
  assert result.returncode == 2 and not result.stdout
  assert result.stderr == "error: model is not an empty folder: give another --output\n"


def test_a_trained_run_is_exported(tmp_path):
  sizes = {"layers": 1, "width": 16, "ffn_width": 16, "heads": 2, "positions": "learned"}
  data = {"tokenizer": "byte", "seq_length": 8}
  config = from_config_dict({"recipe": "magneto", "model": sizes, "data": data})
  task, record = TASKS[config.task], runs.Record(config, {}, {"vocab_size": 260})
  model = task.build_model(config, record.facts)
  workdir = tmp_path / "run"
  workdir.mkdir()
  runs.write_record(workdir, record)
  drawn = {step: weights(model, seed=step) for step in (1, 2)}
  iterator = pipelines.train_iterator([{"x": np.zeros(1)}], batch_size=1, seed=0)
  with Checkpointer(runs.checkpoints_in(workdir)) as checkpointer:
    for step, variables in drawn.items():
      params = jax.tree.map(jax.numpy.asarray, variables["params"])
      checkpointer.save(step, {"params": params}, iterator, {})
  tokens = np.arange(8)[None]
  apply = functools.cache(lambda model: jax.jit(model.apply))
  for step, flag in ((2, {}), (1, {"step": 1})):
    file = tmp_path / f"{step}.safetensors"
    run(to="torchscale", input=workdir, output=file, **flag)
    again, read = from_torchscale(*read_state_dict(file))
    expected = apply(model)(drawn[step], tokens)
    np.testing.assert_allclose(apply(again)(read, tokens), expected, rtol=1e-4, atol=1e-4)
  with pytest.raises(ConfigError, match="mid_norm/bias has no counterpart"):
    run(to="fairseq", input=workdir, output=tmp_path / "x.npz")
  assert not (tmp_path / "x.npz").exists()


def test_positions_are_interpolated_on_request(tmp_path):
  tensors, config = checkpoints()["beit3"]
  write_state_dict(tmp_path / "in.npz", tensors, config)
  run(from_="beit3", input=tmp_path / "in.npz", output=tmp_path / "model", image_size=6)
  assert magneto_jax.load(tmp_path / "model")[0].num_patches == 9


def test_the_encoder_of_images_alone_on_request(tmp_path):
  tensors, config = checkpoints()["beit3"]
  write_state_dict(tmp_path / "in.npz", tensors, config)
  given = {"input": tmp_path / "in.npz", "output": tmp_path / "model", "vision": True}
  run(from_="beit3", image_size=6, **given)
  model, _ = magneto_jax.load(tmp_path / "model")
  assert isinstance(model, VisionEncoder) and model.encoder.max_length == 10
  with pytest.raises(ConfigError, match="--vision does not go with --from=torchscale"):
    run(from_="torchscale", **given)


MISTAKES = {
  "neither way": ({}, "give --from .* to read a checkpoint, or --to"),
  "both ways": ({"from_": "beit3", "to": "beit3"}, "give --from .* to read a checkpoint, or --to"),
  "no file": ({"from_": "torchscale", "input": "none.npz"}, "none.npz: does not exist"),
  "a folder": ({"from_": "torchscale", "input": "."}, "is a directory"),
  "truncated": ({"from_": "torchscale", "input": "short.npz"}, "cannot be read: is it whole"),
  "not a number": ({"from_": "torchscale", "input": "nan.npz"}, "NaN or infinity in 'layers"),
  "fairseq's": ({"from_": "torchscale", "input": "fairseq.npz"}, "no state dict of torchscale"),
  "torchscale's": ({"from_": "fairseq"}, "neither fairseq's decoder language model"),
  "no BEiT-3": ({"from_": "beit3"}, "this is no BEiT-3"),
  "no configuration": (
    {"from_": "torchscale", "model_config": "none.json"},
    "none.json cannot be read",
  ),
  "no JSON": ({"from_": "torchscale", "model_config": "in.npz"}, "cannot be read"),
  "a list": ({"from_": "torchscale", "model_config": "list.json"}, "must hold a JSON object"),
  "resolved to nothing": (
    {"from_": "torchscale", "model_config": "resolved.json"},
    "must hold a JSON object",
  ),
  "empty": ({"from_": "torchscale", "model_config": "empty.json"}, "must give .*attention_heads"),
  "image size": ({"from_": "torchscale", "image_size": 8}, "--image_size does not go with --from"),
  "step of a file": ({"from_": "torchscale", "step": 8}, "--step does not go with --from=torch"),
  "configuration back": (
    {"to": "torchscale", "input": "model", "model_config": "empty.json"},
    "--model_config does not go with --to=torchscale",
  ),
  "step of a folder": ({"to": "torchscale", "input": "model", "step": 2}, "it has no steps"),
  "no run": ({"to": "torchscale", "input": "nowhere"}, "nowhere holds no run"),
  "exists": ({"to": "torchscale", "input": "model", "output": "in.npz"}, "in.npz exists: give"),
  "suffix": ({"to": "safetensors", "input": "model"}, "must end in .safetensors"),
  "no such format": ({"to": "torchscale", "input": "model", "output": "out.h5"}, "is none of"),
  "not the library's": (
    {"to": "beit3", "input": "model", "output": "out.npz"},
    "files hold no CausalLM",
  ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """With good and bad files."""
  folder = tmp_path_factory.mktemp("command")
  (tensors, config), (fairseq, _) = (checkpoints()[name] for name in ("torchscale", "fairseq"))
  write_state_dict(folder / "in.npz", tensors, config)
  write_state_dict(folder / "fairseq.npz", fairseq)
  broken = tensors | {"layers.0.ffn.fc1.bias": np.full(12, np.nan, np.float32)}
  write_state_dict(folder / "nan.npz", broken, config)
  (folder / "short.npz").write_bytes((folder / "in.npz").read_bytes()[:-100])
  for name, value in (("list", []), ("empty", {}), ("resolved", {"resolved": 3})):
    (folder / f"{name}.json").write_text(json.dumps(value))
  run(from_="torchscale", input=folder / "in.npz", output=folder / "model")
  return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(name, folder, monkeypatch):
  monkeypatch.chdir(folder)
  flags, pattern = MISTAKES[name]
  before = {path: path.stat().st_mtime_ns for path in pathlib.Path().rglob("*")}
  with pytest.raises((ConfigError, FileNotFoundError), match=pattern) as caught:
    run(**{"input": "in.npz", "output": "out"} | flags)
  assert len(str(caught.value).splitlines()) == 1
  assert {path: path.stat().st_mtime_ns for path in pathlib.Path().rglob("*")} == before
