"""The task between a config and a model: data, model, loss and metrics."""

import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax import layers
from magneto_jax.config import (
  ConfigError,
  ModelConfig,
  RecipeConfig,
  TrainConfig,
  from_config_dict,
  tasks_reading,
)
from magneto_jax.tasks import TASKS, causal_lm, common
from magneto_jax.theory import recipes
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import Init

TASK = TASKS["causal_lm"]
FACTS = {"vocab_size": 20, "token_correlation": 0.02}
OF_CORRELATION = ("deepscalelm", "deepscalelm_simple")

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
  tasks_of = {f.name: tasks_reading(f"model.{f.name}") for f in dataclasses.fields(ModelConfig)}
  read = {name for name, tasks in tasks_of.items() if tasks is None or "causal_lm" in tasks}
  assert REACHED.keys() == read
  config = from_config_dict(
    {
      "vocab_chunk": 9,
      "label_smoothing": 0.2,
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
  assert (model.vocab_size, model.max_length) == (77, 96)
  assert (model.vocab_chunk, model.label_smoothing) == (9, 0.2)


def test_options_reach_the_recipe():
  """Every one, with the recipes that have it; `none` is a choice, empty the recipe's own."""
  build = lambda recipe, **options: causal_lm.decoder_recipe(
    from_config_dict({"recipe": recipe, "recipe_options": options}), FACTS
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
  for recipe in OF_CORRELATION:
    config = from_config_dict({"recipe": recipe})
    architecture = causal_lm.architecture(config, FACTS)
    for options in (
      {"placement": "post"},
      {"depth_unit": "blocks"},
      {"placement": "pre", "depth_unit": "layers", "beta_squared": 0.01},
    ):
      expected = RECIPES[recipe](architecture, **options).decoder
      assert build(recipe, **options) == expected != build(recipe)
  reached = {name for recipe in RECIPES for name in recipes.options(recipe)}
  assert reached == {field.name for field in dataclasses.fields(RecipeConfig)}


def normformer(**options):
  architecture = causal_lm.architecture(TrainConfig(), FACTS)
  return RECIPES["normformer"](architecture, **options).decoder


def reading(recipe="deepscalelm", *, seq_length=24, **model):
  """A small config of a recipe that goes by the text's correlation."""
  sizes = {"layers": 3, "width": 32, "heads": 4, "dropout": 0.1} | model
  return from_config_dict({"recipe": recipe, "model": sizes, "data": {"seq_length": seq_length}})


def agreeing_pairs(tokens) -> float:
  """How often two tokens of a text are the same, over all pairs."""
  return float(np.mean(tokens[:, None] == tokens[None]))


@pytest.mark.parametrize("counted", (10**7, 50))
def test_the_correlation_is_counted_in_the_training_text(counted, tmp_path, monkeypatch):
  """By brute force over all pairs of it, document marks too; of a long text, of its start."""
  monkeypatch.setattr(common, "COUNTED_TOKENS", counted)
  (tmp_path / "a.txt").write_text("to be or not to be, that is the question. " * 5)
  (tmp_path / "b.txt").write_text("zzz " * 40)
  files = {"train_files": f"{tmp_path}/a.txt", "validation_files": f"{tmp_path}/b.txt"}
  files |= {"name": "text_files", "tokenizer": "byte", "seq_length": 16}
  data = TASK.load_data(from_config_dict({"data": files}), tmp_path / "run")
  found = TASK.facts(data)
  tokens = np.asarray(data.train.tokens)[:counted]
  assert len(tokens) == min(counted, 42 * 5 + 2)
  assert found["token_correlation"] == pytest.approx(agreeing_pairs(tokens), rel=1e-12)
  assert json.loads(json.dumps(found)) == found  # As a run keeps it.


@pytest.mark.parametrize("recipe", OF_CORRELATION)
def test_the_correlation_at_the_input_counts_what_is_added_to_the_tokens(recipe):
  """One table, or two of which positions never agree, or an encoding of its own correlation.

  Rotations and relative biases are not part of the stream.
  """
  for positions, tables in (("none", 1), ("rotary", 1), ("xpos", 1), ("learned", 2)):
    config = reading(recipe, positions=positions)
    architecture = causal_lm.architecture(config, FACTS)
    assert architecture.embedding_tables == tables
    assert architecture.token_correlation == pytest.approx(0.02 / tables)
    assert architecture == dataclasses.replace(
      causal_lm.architecture(dataclasses.replace(config, recipe="magneto"), FACTS),
      token_correlation=architecture.token_correlation,
    )


@pytest.mark.parametrize("width", (32, 33, 4))
@pytest.mark.parametrize("seq_length", (2, 24, 300))
@pytest.mark.parametrize("dropout", (0.0, 0.3))
def test_sinusoidal_positions_are_counted_as_the_layer_draws_them(dropout, seq_length, width):
  """By brute force over all pairs of different positions; the layer's float32."""
  config = reading(seq_length=seq_length, width=width, heads=1, dropout=dropout)
  encoding = np.asarray(layers.sinusoidal(jnp.arange(seq_length), width), np.float64)
  products = encoding @ encoding.T / width
  apart = ~np.eye(seq_length, dtype=bool)
  tokens = 1 - dropout
  covariance, variance = products[apart].mean(), np.diag(products).mean()
  expected = (tokens * 0.02 + covariance) / (tokens + variance)
  assert common.input_correlation(config, FACTS) == pytest.approx(expected, rel=1e-4)
  if width % 2 == 0:
    assert variance == pytest.approx(0.5, rel=1e-6)


def test_the_correlation_is_that_of_a_drawn_embedding():
  """Of 64 samples of tokens through 32 tables, before the dropout; the spread is 1 %."""
  config, rng = reading(width=64, dropout=0.3), np.random.default_rng(0)
  p = np.array([0.5, 0.3, 0.2])
  embedding = causal_lm.decoder_recipe(config, FACTS).embedding
  std = embedding.tokens.gain * embedding.scale
  encoding = np.asarray(layers.sinusoidal(jnp.arange(24), 64), np.float64)
  square, product = 0.0, 0.0
  for _ in range(64):
    drawn = rng.normal(0, std, (32, 3, 64))
    x = drawn[:, rng.choice(3, 24, p=p)] + encoding
    square += np.mean(x**2)
    total = x.sum(1)
    product += np.mean(np.sum(total**2, -1) - np.sum(x**2, (1, 2))) / (24 * 23 * 64)
  facts = FACTS | {"token_correlation": float(np.sum(p**2))}
  assert product / square == pytest.approx(common.input_correlation(config, facts), rel=0.05)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_whose_tokens_were_not_counted_is_read_unless_its_recipe_goes_by_them(recipe):
  """As runs of earlier versions are; a correlation that is not known is not made up."""
  config, old = reading(recipe, positions="rotary"), {"vocab_size": 20}
  if recipe not in OF_CORRELATION:
    assert TASK.build_model(config, old) == TASK.build_model(config, FACTS | old)
    assert TASK.describe(config, old) == TASK.describe(config, FACTS)
    return
  for make in (TASK.build_model, TASK.describe):
    with pytest.raises(ConfigError, match=f"this run has no token_correlation.*{recipe}") as error:
      make(config, old)
    assert "\n" not in str(error.value)


def test_the_description_is_of_the_runs_own_text():
  config = reading(positions="rotary")
  lines = [TASK.describe(config, FACTS | {"token_correlation": r}) for r in (0.02, 0.2)]
  assert "out lecun_normal x" in lines[0][1] and lines[0][1] != lines[1][1]
  assert TASK.build_model(config, FACTS).recipe == causal_lm.decoder_recipe(config, FACTS)


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
  return jax.jit(lambda batch, key=None: TASK.loss(model, {"params": params}, batch, key))


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
  whole = TASK.metrics({"loss": 36 * math.log(2), "weight": 6.0}, data, whole=True)
  assert whole == pytest.approx({"loss_nats_per_token": 6 * math.log(2), "bits_per_byte": 1.5})
  part = TASK.metrics({"loss": 36 * math.log(2), "weight": 6.0}, data, whole=False)
  assert part == pytest.approx({"loss_nats_per_token": 6 * math.log(2)})


def test_files_are_separated_by_commas(tmp_path):
  for name in ("a", "b", "c"):
    (tmp_path / f"{name}.txt").write_text(f"text of {name}, " * 9)
  files = {"train_files": f"{tmp_path}/a.txt , {tmp_path}/b.txt,", "tokenizer": "byte"}
  files |= {"name": "text_files", "validation_files": f"{tmp_path}/c.txt", "seq_length": 16}
  config = from_config_dict({"data": files})
  data = TASK.load_data(config, tmp_path / "run")
  assert (data.train_bytes, data.validation_bytes) == (2 * 9 * 11, 9 * 11)
  assert TASK.facts(data)["vocab_size"] == 260
