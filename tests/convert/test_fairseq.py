"""fairseq's checkpoints: there and back, and every way in which they can be wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax import convert
from magneto_jax.convert import fairseq
from magneto_jax.theory.recipes import RECIPES, normformer
from magneto_jax.theory.records import HEAD_SCALES
from tests.checkpoints import (
  assert_each_is_accounted_for,
  assert_round_trip,
  decoder,
  encoder_decoder,
  masked_lm,
  message,
  weights,
)

HELD = ("pre_ln", "post_ln", "pre_ln_scaled_init", "normformer")


def scaled(**scales):
  return functools.partial(normformer, **scales)


roberta = functools.partial(masked_lm, head="dense")
MODELS = {
  **{f"decoder {recipe}": decoder(recipe) for recipe in HELD},
  **{f"head scale {place}": decoder(scaled(head_scale=place)) for place in HEAD_SCALES},
  "decoder tied": decoder("normformer", tied=True, positions="sinusoidal"),
  "decoder with residual scales": decoder(scaled(residual_scale="vector"), positions="none"),
  "decoder with a scalar": decoder(scaled(residual_scale="scalar"), activation="relu_squared"),
  "roberta": roberta(scaled(head_scale=None)),
  "roberta with residual scales": roberta(
    scaled(head_scale=None, residual_scale="vector", attention_residual_scale="vector"),
    activation="gelu_tanh",
  ),
  "roberta post": roberta("post_ln", tied=False, activation="relu"),
}


@pytest.mark.parametrize(
  "name, legacy",
  [(name, False) for name in MODELS] + [(name, True) for name in MODELS if "scale" in name],
)
def test_round_trip_is_exact(name, legacy):
  model = MODELS[name]
  write = functools.partial(convert.to_fairseq, legacy=legacy)
  tensors = assert_round_trip(model, convert.from_fairseq, write, fairseq.config_of(model))
  names = {part for tensor in tensors for part in tensor.split(".")}
  if "residual scales" in name:
    assert names & {"w_resid", "alpha1", "alpha2"} == (
      {"alpha1", "alpha2"} if "roberta" in name else {"alpha2" if legacy else "w_resid"}
    )


def test_names_and_layouts_are_fairseqs():
  model = decoder(scaled(residual_scale="vector"))
  variables = weights(model)
  tensors = convert.to_fairseq(model, variables)
  block = variables["params"]["stack"]["segment_0"]["block_0"]
  ours = {
    "decoder.layers.2.self_attn.q_proj.weight": block["self_attention"]["query"]["kernel"][2]
    .reshape(8, 8)
    .T,
    "decoder.layers.1.c_attn": block["self_attention"]["head_scale"][1],
    "decoder.layers.0.attn_ln.bias": block["self_attention_residual"]["out_norm"]["bias"][0],
    "decoder.layers.0.fc2.weight": block["ffn"]["wo"]["kernel"][0].T,
    "decoder.layers.0.final_layer_norm.weight": block["ffn_residual"]["in_norm"]["scale"][0],
    "decoder.layers.1.w_resid": block["ffn_residual"]["skip"][1],
    "decoder.layer_norm.weight": variables["params"]["stack"]["final_norm"]["scale"],
  }
  for name, expected in ours.items():
    np.testing.assert_array_equal(tensors[name], expected, err_msg=name)


REFUSED = {
  "rotary positions": (decoder("pre_ln", positions="rotary"), "positions would be ('sinusoidal',)"),
  "angles from 0": (
    decoder("pre_ln", positions="sinusoidal", position_offset=0),
    "position_offset would be 2, not 0",
  ),
  "no biases": (decoder("pre_ln", use_bias=False), "use_bias would be True, not False"),
  "relative positions": (decoder("pre_ln", relative_buckets=4), "relative_bias has no counterpart"),
  "gated FFN": (decoder("pre_ln", activation="swiglu"), "ffn/wi_gate/bias has no counterpart"),
  "another activation": (decoder("pre_ln", activation="silu"), "activation_fn='silu' must be one"),
  "epsilon": (decoder("pre_ln", norm_epsilon=1e-6), "norm_epsilon would be 1e-05, not 1e-06"),
  "grouped queries": (decoder("pre_ln", num_kv_heads=1), "num_kv_heads would be 2, not 1"),
  "torchscale's head": (masked_lm("pre_ln"), "no counterpart for this MaskedLM"),
  "encoder-decoder": (encoder_decoder("pre_ln"), "no counterpart for this EncoderDecoder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fairseq_has_not_is_one_line(name):
  model, fragment = REFUSED[name]
  assert fragment in message(convert.to_fairseq, model, weights(model))


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - set(HELD)))
def test_other_recipes_are_refused(recipe):
  model = decoder(recipe)
  text = message(convert.to_fairseq, model, weights(model))
  assert "has no counterpart" in text or "fairseq has no such model" in text


def test_a_table_that_begins_at_zero_computes_the_same_behind_two_rows():
  model = decoder("normformer", position_offset=0)
  variables = weights(model)
  tensors = convert.to_fairseq(model, variables)
  again, moved = convert.from_fairseq(tensors, fairseq.config_of(model))
  out = jax.jit(model.apply)(variables, jnp.arange(5)[None])
  np.testing.assert_allclose(jax.jit(again.apply)(moved, jnp.arange(5)[None]), out, atol=1e-6)


@functools.cache
def written(name):
  """A model and its state dict."""
  model = {
    "lm": decoder("normformer"),
    "scaled": decoder(scaled(residual_scale="vector"), depths=(0, 2)),
    "plain": decoder("pre_ln"),
    "post": decoder("post_ln"),
    "roberta": roberta(scaled(head_scale=None), depths=(2, 0)),
  }[name]
  return model, convert.to_fairseq(model, weights(model))


@pytest.mark.parametrize("name", ["scaled", "roberta"])
def test_each_tensor_is_accounted_for(name):
  model, tensors = written(name)
  kind = "decoder" if name == "scaled" else "encoder"
  config = fairseq.config_of(model) | {f"{kind}_learned_pos": True}
  # By its table of tokens a model is known; the configuration says that RoBERTa's output is tied.
  others = [n for n in tensors if n.endswith(("embed_tokens.weight", "lm_head.weight"))]
  assert_each_is_accounted_for(convert.from_fairseq, tensors, config, others)


ASKED = {
  "decoder_attention_heads": "plain",
  "encoder_attention_heads": "roberta",
  "activation_fn": "lm",
  "head_scale": "lm",
  "decoder_normalize_before": "post",
}


@pytest.mark.parametrize("key", ASKED)
def test_what_no_tensor_shows_is_asked_for_by_name(key):
  model, tensors = written(ASKED[key])
  config = {k: v for k, v in fairseq.config_of(model).items() if k != key}
  text = message(convert.from_fairseq, tensors, config)
  assert f"the configuration must give {key}" in text
  if key == "head_scale":
    assert all(place in text for place in HEAD_SCALES)


CONTRADICTIONS = {
  **{
    key: ("lm", {key: value}, key)
    for key, value in {
      "decoder_layers": 4,
      "decoder_embed_dim": 16,
      "decoder_ffn_embed_dim": 99,
      "decoder_attention_heads": 4,
      "decoder_normalize_before": False,
      "layernorm_embedding": True,
      "share_decoder_input_output_embed": True,
      "activation_fn": "geglu",
      "head_scale": "before",
      "no_scale_embedding": 2,
    }.items()
  },
  "heads that do not divide": ("plain", {"decoder_attention_heads": 3}, "must divide the width 8"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_named(name):
  of, changes, fragment = CONTRADICTIONS[name]
  model, tensors = written(of)
  config = fairseq.config_of(model) | changes
  assert fragment in message(convert.from_fairseq, tensors, config)


def test_tables_are_tied_if_their_numbers_are_the_same():
  for model, key, value in (
    (decoder("pre_ln", tied=True), "share_decoder_input_output_embed", True),
    (roberta("pre_ln"), "untie_weights_roberta", False),
  ):
    tensors = convert.to_fairseq(model, weights(model))
    config = fairseq.config_of(model)
    assert config.pop(key) is value
    read = lambda tensors, config=config: convert.from_fairseq(tensors, config)[0]
    assert read(tensors).tied
    output = next(n for n in tensors if n.endswith(("output_projection.weight", "lm_head.weight")))
    assert not read(tensors | {output: tensors[output] + 1}).tied
    del tensors[output]
    assert f"missing: {output}" in message(read, tensors)
    assert read(tensors, config | {key: value}).tied


@pytest.mark.parametrize("version", [np.full(1, 3.0), np.full(1, np.nan)])
def test_buffers_are_kept_whatever_they_hold(version):
  """fairseq saves one that was never set."""
  model, tensors = written("lm")
  buffers = {"decoder.version": version, "decoder.embed_positions._float_tensor": version}
  _, _, rest = fairseq.read(tensors | buffers, fairseq.config_of(model))
  assert rest.keys() == buffers.keys()
  assert "unknown: x.version" in message(
    convert.from_fairseq, tensors | {"x.version": version}, fairseq.config_of(model)
  )


def test_not_a_number_is_named():
  model, tensors = written("lm")
  tensors = tensors | {"decoder.layers.1.c_attn": np.float32([1, np.nan])}
  text = message(convert.from_fairseq, tensors, fairseq.config_of(model))
  assert "NaN or infinity in 'decoder.layers.1.c_attn'" in text


OTHERS = {
  "nothing": ({}, "neither fairseq's decoder language model"),
  "torchscale": ({"embed_tokens.weight": np.ones((2, 2))}, "neither fairseq's decoder"),
  "encoder-decoder": (
    {f"{kind}.embed_tokens.weight": np.ones((2, 2)) for kind in ("encoder", "decoder")},
    "neither fairseq's decoder language model",
  ),
  "cross-attention": (
    dict.fromkeys(
      ("decoder.embed_tokens.weight", "decoder.layers.0.encoder_attn.q_proj.weight"),
      np.ones((2, 2)),
    ),
    "decoders with cross-attention are not supported",
  ),
  "layers without numbers": (
    {"decoder.embed_tokens.weight": np.ones((2, 2)), "decoder.layers.x.fc1.weight": np.ones(2)},
    "missing: decoder.",
  ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_models_file_is_one_line(name):
  tensors, fragment = OTHERS[name]
  assert fragment in message(
    convert.from_fairseq, tensors, {"share_decoder_input_output_embed": 1 > 0}
  )


def test_defaults_are_fairseqs():
  """Embeddings are scaled but for RoBERTa's; without a table, positions are sinusoids from 2."""
  model, tensors = written("plain")
  config = {"decoder_attention_heads": 2, "activation_fn": "gelu"}
  read, _ = convert.from_fairseq(tensors, config)
  assert read.recipe.embedding.scale == 8**0.5 and read.max_length == 6
  tensors = {name: t for name, t in tensors.items() if "embed_positions" not in name}
  read, _ = convert.from_fairseq(tensors, config)
  assert (read.positions, read.position_offset) == ("sinusoidal", 2)
  _, tensors = written("roberta")
  read, _ = convert.from_fairseq(tensors, {"encoder_attention_heads": 2, "activation_fn": "gelu"})
  assert read.encoder.recipe.embedding.scale == 1.0
