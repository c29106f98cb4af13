"""A model in a folder: it comes back as it was, and what is no such folder is one line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import magneto_jax
from magneto_jax.config import ConfigError
from magneto_jax.convert import layout, load, save, saved
from magneto_jax.models import CaptioningBEiT3, RetrievalBEiT3, VisionEncoder
from magneto_jax.theory.recipes import RECIPES
from tests.checkpoints import (
  assert_same_tensors,
  beit3,
  decoder,
  encoder,
  encoder_decoder,
  masked_lm,
  message,
  weights,
)

MODELS = {
  **{recipe: decoder(recipe) for recipe in RECIPES},
  "choices": decoder(
    positions=("learned", "xpos"), window=(2, 0), dtype=jnp.dtype(jnp.bfloat16), drop_path_rate=0.5
  ),
  "encoder": encoder("normformer", dtype=jnp.bfloat16),
  "masked lm": masked_lm(head="dense"),
  "encoder decoder": encoder_decoder(shared=True),
  "beit3": beit3(),
  "beit3 with a head": CaptioningBEiT3(encoder=beit3(), mask_id=6),
  "beit3 with one number": RetrievalBEiT3(encoder=beit3(shared_attention=True)),
}
KEPT = {"decoder.version": np.full(1, np.nan, np.float16), "kept:x/y": np.arange(2)}
ORIGIN = {"from": "fairseq", "config": {"dropout": 0.1, "none": None}}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_loaded(name, tmp_path):
  model, folder = MODELS[name], tmp_path / "new/model"
  variables = weights(model)
  save(folder, model, variables, origin=ORIGIN, kept=KEPT)
  again, loaded, origin, kept = saved.read(folder)
  assert again == model and origin == ORIGIN
  jax.tree.map(np.testing.assert_array_equal, loaded, variables)
  assert_same_tensors(kept, KEPT)
  assert {path.name for path in folder.iterdir()} == {"model.json", "model.safetensors"}
  assert saved.describe(again, loaded).startswith(type(model).__name__)


def test_images_have_no_weights_of_tokens(tmp_path):
  vision = {"vocab_size": None, "positions": "learned", "max_length": 5}
  model = VisionEncoder(encoder=encoder(**vision), patch_size=2, mask_token=True)
  shapes = layout.shapes_of(model, jnp.ones((1, 4, 4, 3)))
  variables = {"params": jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)}
  save(tmp_path / "new", model, variables)
  again, loaded = load(tmp_path / "new")
  assert again == model
  jax.tree.map(np.testing.assert_array_equal, loaded, variables)


@pytest.fixture
def folder(tmp_path):
  """Of a saved model."""
  save(tmp_path / "saved", decoder(), weights(decoder()))
  return tmp_path / "saved"


def test_the_package_loads_it(folder):
  model, variables = magneto_jax.load(folder)
  assert model == decoder()
  jax.tree.map(np.testing.assert_array_equal, variables, weights(decoder()))
  with pytest.raises(FileNotFoundError, match="is a converted model, it has no steps"):
    magneto_jax.load(folder, step=1)
  (folder / "model.json").write_text("{")
  with pytest.raises(ConfigError, match="is damaged"):
    magneto_jax.load(folder)


def test_nothing_is_overwritten(folder, tmp_path):
  before = {path: path.read_bytes() for path in folder.iterdir()}
  for taken in (folder, folder / "model.json"):
    assert "is not an empty folder" in message(save, taken, decoder(), weights(decoder()))
  assert {path: path.read_bytes() for path in folder.iterdir()} == before
  (tmp_path / "empty").mkdir()
  save(tmp_path / "empty", decoder(), weights(decoder()))
  assert saved.holds_model(tmp_path / "empty")


def test_what_cannot_be_read_back_is_not_written(tmp_path):
  model = decoder().clone(recipe=jnp.ones(3))
  assert "cannot be written" in message(save, tmp_path / "a", model, weights(decoder()))
  odd = {"x": np.array(["text"])}
  assert "'kept:x'" in message(save, tmp_path / "b", decoder(), weights(decoder()), kept=odd)
  assert list(tmp_path.iterdir()) == []


DAMAGED = {
  "no JSON": lambda d: "{",
  "endless": lambda d: "[" * 10**5,
  "a list": lambda d: "[]",
  "no model": lambda d: {"origin": {}},
  "no origin": lambda d: {"model": d["model"]},
  "no module": lambda d: d | {"model": {"class": "Init"}},
  "a number": lambda d: d | {"model": 3},
  "another class": lambda d: d | {"model": d["model"] | {"class": "Popen"}},
  "a class of classes": lambda d: d | {"model": d["model"] | {"class": ["CausalLM"]}},
  "another field": lambda d: d | {"model": d["model"] | {"extra": 1}},
  "another family": lambda d: json.loads(json.dumps(d).replace("torch_uniform", "cauchy")),
  "another dtype": lambda d: json.loads(json.dumps(d).replace('"float32"', '"object_"')),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_description_is_one_line(name, tmp_path):
  model = decoder("magneto_torchscale")
  save(tmp_path / "saved", model, weights(model))
  path = tmp_path / "saved/model.json"
  changed = DAMAGED[name](json.loads(path.read_text()))
  path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
  assert "model.json is damaged" in message(load, tmp_path / "saved")


def test_damaged_and_exchanged_weights_are_one_line(folder, tmp_path):
  other = decoder("post_ln")
  save(tmp_path / "other", other, weights(other))
  weights_of = lambda name: tmp_path / name / "model.safetensors"
  weights_of("saved").write_bytes(weights_of("other").read_bytes())
  assert "was not written with the model.json beside it" in message(load, folder)
  weights_of("saved").write_bytes(weights_of("other").read_bytes()[:-9])
  assert "cannot be read: is it whole" in message(load, folder)
  weights_of("saved").unlink()
  assert "does not exist" in message(load, folder)
  assert "holds no converted model" in message(load, tmp_path)
