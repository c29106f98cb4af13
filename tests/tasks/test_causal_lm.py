"""The task between a config and a model: data, model, loss and metrics."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.config import ModelConfig, RecipeConfig, TrainConfig, from_config_dict
from magneto_jax.tasks import TASKS, causal_lm
from magneto_jax.theory import recipes
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import Init

TASK = TASKS["causal_lm"]

# Every field: a value that is not the default, the model's attribute, and what that is then.
REACHED = {
  "layers": (8, "recipe.num_layers", 8),
  "width": (48, "width", 48),
  "ffn_width": (80, "ffn_width", 80),
  "heads": (2, "num_heads", 2),
  "kv_heads": (1, "num_kv_heads", 1),
  "head_dim": (10, "head_dim", 10),
  "norm": ("rms_norm", "recipe.norm", "rms_norm"),
  "activation": ("swiglu", "activation", "swiglu"),
  "positions": ("rotary", "positions", "rotary"),
  "xpos_scale_base": (64.0, "xpos_scale_base", 64.0),
  "relative_buckets": (8, "relative_buckets", 8),
  "relative_max_distance": (32, "relative_max_distance", 32),
  "qk_norm": ("head", "recipe.layers.0.self_attention.qk_norm", "head"),
  "use_bias": (False, "use_bias", False),
  "tied_embeddings": (False, "tied", False),
  "window": (7, "window", (7, 0)),
  "logits_soft_cap": (30.0, "logits_soft_cap", 30.0),
  "dropout": (0.1, "dropout_rate", 0.1),
  "attention_dropout": (0.2, "attention_dropout_rate", 0.2),
  "activation_dropout": (0.3, "activation_dropout_rate", 0.3),
  "drop_path": (0.4, "drop_path_rate", 0.4),
  "dtype": ("bfloat16", "dtype", jnp.bfloat16),
  "remat": ("full", "remat", "full"),
  "unroll": (2, "unroll", 2),
  "attention_implementation": ("xla", "attention_implementation", "xla"),
}


def test_every_field_of_the_model_reaches_it():
  assert REACHED.keys() == {field.name for field in dataclasses.fields(ModelConfig)}
  config = from_config_dict(
    {
      "model": {name: value for name, (value, _, _) in REACHED.items()},
      "data": {"seq_length": 96},
    }
  )
  model = TASK.build_model(config, {"vocab_size": 77})
  for name, (value, attribute, expected) in REACHED.items():
    assert value != getattr(ModelConfig(), name)
    got = model
    for part in attribute.split("."):
      got = got[int(part)] if part.isdigit() else getattr(got, part)
    assert got == expected, name
  assert model.vocab_size == 77 and model.max_length == 96


def test_options_reach_the_recipe():
  """Every one, with the recipes that have it; `none` is a choice, empty the recipe's own."""
  build = lambda recipe, **options: causal_lm.decoder_recipe(
    from_config_dict({"recipe": recipe, "recipe_options": options})
  )
  for options in (
    {"head_scale": "post_out_proj_contiguous"},
    {"residual_scale": "vector", "attention_residual_scale": "scalar"},
  ):
    assert build("normformer", **options) == normformer(**options)
  assert build("normformer", head_scale="none") == normformer(head_scale=None)
  assert build("normformer") == normformer()
  assert build("magneto_torchscale", bert_init=True).layers[0].self_attention.qk == Init(
    "normal", gain=0.02
  )
  reached = {name for recipe in RECIPES for name in recipes.options(recipe)}
  assert reached == {field.name for field in dataclasses.fields(RecipeConfig)}


def normformer(**options):
  return RECIPES["normformer"](causal_lm.architecture(ModelConfig()), **options).decoder


def test_what_is_left_open_is_the_models_choice():
  model = TASK.build_model(TrainConfig(), {"vocab_size": 77})
  assert (model.num_kv_heads, model.head_dim, model.window) == (None, None, None)
  assert model.logits_soft_cap is model.attention_implementation is None
  assert model.recipe.norm == "layer_norm"


@pytest.fixture(scope="module")
def losses():
  """The jitted losses, without and with a dropout key, of a small model."""
  sizes = {"layers": 1, "width": 16, "ffn_width": 16, "heads": 2, "dropout": 0.5}
  config = from_config_dict({"model": sizes, "data": {"seq_length": 8}})
  model = TASK.build_model(config, {"vocab_size": 20})
  params = model.init(jax.random.key(0), *TASK.dummy_inputs(config))["params"]
  return jax.jit(lambda batch, key=None: TASK.loss(model, params, batch, key))


def packed(*rows):
  """A batch of rows of documents, each filled up with padding of weight 0."""
  batch = {name: np.zeros((len(rows), 8), np.int32) for name in ("inputs", "targets")}
  batch |= {name: np.zeros((len(rows), 8), np.int32) for name in ("positions", "segment_ids")}
  batch["weights"] = np.zeros((len(rows), 8), np.float32)
  for r, documents in enumerate(rows):
    start = 0
    for segment, tokens in enumerate(documents, 1):
      where = r, slice(start, start + len(tokens) - 1)
      start = where[1].stop
      batch["inputs"][where], batch["targets"][where] = tokens[:-1], tokens[1:]
      batch["positions"][where] = range(len(tokens) - 1)
      batch["segment_ids"][where], batch["weights"][where] = segment, 1.0
  return batch


def test_documents_cost_packed_what_they_cost_alone(losses):
  """No attention between them, positions of their own, and nothing for padding."""
  a, b = [1, 7, 3, 9, 11], [1, 5, 2, 19]
  together = losses(packed([a, b], []))
  alone = losses(packed([a], [b]))
  np.testing.assert_allclose(together, alone, rtol=1e-5)  # float32
  assert float(together[1]) == 4 + 3
  half = packed([a, b], [])
  half["weights"] *= 0.5
  np.testing.assert_allclose(losses(half), np.asarray(together) / 2, rtol=1e-5)  # float32


def test_only_a_key_drops(losses):
  batch = packed([[1, 7, 3, 9, 11]], [])
  dropped = [float(losses(batch, jax.random.key(seed))[0]) for seed in (0, 0, 1)]
  assert dropped[0] == dropped[1] != dropped[2]
  assert float(losses(batch)[0]) not in dropped


def test_bits_a_byte_are_of_the_whole_text_only():
  data = types.SimpleNamespace(validation_bytes=24)
  whole = TASK.metrics(36 * math.log(2), 6.0, data, whole=True)
  assert whole == pytest.approx({"loss_nats_per_token": 6 * math.log(2), "bits_per_byte": 1.5})
  part = TASK.metrics(36 * math.log(2), 6.0, data, whole=False)
  assert part == pytest.approx({"loss_nats_per_token": 6 * math.log(2)})


def test_files_are_separated_by_commas(tmp_path):
  for name in ("a", "b", "c"):
    (tmp_path / f"{name}.txt").write_text(f"text of {name}, " * 9)
  files = {"train_files": f"{tmp_path}/a.txt , {tmp_path}/b.txt,", "tokenizer": "byte"}
  files |= {"name": "text_files", "validation_files": f"{tmp_path}/c.txt", "seq_length": 16}
  config = from_config_dict({"data": files})
  data = TASK.load_data(config.data, tmp_path / "run")
  assert (data.train_bytes, data.validation_bytes) == (2 * 9 * 11, 9 * 11)
  assert TASK.facts(data) == {"vocab_size": 260}
