"""torchscale's checkpoints: there and back, and every way in which they can be wrong."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from magneto_jax import convert
from magneto_jax.convert import torchscale
from magneto_jax.models.vision import VisionEncoder
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import Scale
from tests.checkpoints import (
  assert_each_is_accounted_for,
  assert_round_trip,
  assert_same_tensors,
  beit3,
  decoder,
  encoder,
  encoder_decoder,
  masked_lm,
  message,
  weights,
  with_norms,
)

HELD = (
  *("pre_ln", "post_ln", "magneto", "deepnet", "magneto_torchscale", "deepnet_torchscale"),
  "pre_ln_scaled_init",
)
RELATIVE = {"relative_buckets": 6, "relative_max_distance": 5, "relative_bidirectional": True}
XPOS = {"positions": ("learned", "xpos"), "xpos_scale_base": 64.0}
MODELS = {
  **{f"decoder {recipe}": decoder(recipe) for recipe in HELD},
  **{f"encoder decoder {recipe}": encoder_decoder(recipe) for recipe in HELD[1:4]},
  "decoder tied": decoder(tied=True),
  "decoder relative and xpos": decoder("deepnet", **RELATIVE, **XPOS),
  "decoder without positions": decoder(positions="none", activation="relu", norm_epsilon=1e-6),
  "decoder pre-norm with deepnorm": decoder(
    with_norms("pre_ln", skip=Scale(2**0.5)), depths=(2, 2)
  ),
  "encoder": encoder("post_ln", activation="silu", **RELATIVE),
  "encoder of embeddings": encoder(vocab_size=None, positions="xpos"),
  "multiway": encoder("deepnet", vocab_size=None, experts=("vision", "text")),
  "masked lm": masked_lm(tied=False),
  "masked lm tied": masked_lm("pre_ln", positions="xpos"),
  "encoder decoder tied": encoder_decoder(tied=True, **XPOS),
  "encoder decoder shared": encoder_decoder("deepnet", shared=True),
  "encoder decoder all tied": encoder_decoder("post_ln", shared=True, tied=True),
  "encoder decoder relative": encoder_decoder(relative_cross=True, **RELATIVE),
  "beit3": beit3(),
  "beit3 with xpos": beit3("deepnet_torchscale", positions="xpos", **RELATIVE),
}


def bidirectional(model):
  """The encoder of an encoder-decoder has no cross-attention, whatever its fields say."""
  if hasattr(model, "decoder"):
    return model.clone(encoder=model.encoder.clone(relative_cross=False))
  return model


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact(name):
  model = bidirectional(MODELS[name])
  if name == "decoder pre-norm with deepnorm":  # (2 L)^1/4 of two layers.
    assert float(model.recipe.layers[0].ffn.skip.value) == pytest.approx(4**0.25)
  config = torchscale.config_of(model)
  assert_round_trip(model, convert.from_torchscale, convert.to_torchscale, config)


def test_names_and_layouts_are_torchscales():
  """One tensor of each kind, by hand: names, transposes, heads, layers."""
  model = encoder_decoder(relative_cross=True, **RELATIVE, positions=("learned", "xpos"))
  model = bidirectional(model)
  variables = weights(model)
  tensors = convert.to_torchscale(model, variables)
  params = variables["params"]
  block = params["decoder"]["stack"]["segment_0"]["block_0"]
  ours = {
    "decoder.layers.2.self_attn.k_proj.weight": block["self_attention"]["key"]["kernel"][2]
    .reshape(8, 8)
    .T,
    "decoder.layers.1.self_attn.out_proj.weight": block["self_attention"]["out"]["kernel"][1]
    .reshape(8, 8)
    .T,
    "decoder.layers.0.encoder_attn.v_proj.bias": block["cross_attention"]["value"]["bias"][
      0
    ].ravel(),
    "decoder.layers.0.ffn.fc1.weight": block["ffn"]["wi"]["kernel"][0].T,
    "decoder.layers.0.ffn.ffn_layernorm.bias": block["ffn"]["mid_norm"]["bias"][0],
    "decoder.cross_attn_relative_position.relative_attention_bias.weight": params["decoder"][
      "cross_relative_bias"
    ],
    "encoder.embed_positions.weight": params["encoder"]["position_embedding"]["embedding"],
    "encoder.layers.1.self_attn.xpos.scale": (np.arange(0, 4, 2) + 1.6) / 5.6,
  }
  for name, expected in ours.items():
    np.testing.assert_allclose(tensors[name], expected, rtol=1e-6, err_msg=name)


def triple(architecture):
  """Pre-LN with its embedding scaled by 3."""
  recipe = RECIPES["pre_ln"](architecture)
  embedding = dataclasses.replace(recipe.decoder.embedding, scale=3.0)
  return dataclasses.replace(
    recipe, decoder=dataclasses.replace(recipe.decoder, embedding=embedding)
  )


REFUSED = {
  "rotary positions": (decoder(positions="rotary"), "positions would be (), not ('rotary',)"),
  "sinusoids": (decoder(positions="sinusoidal"), "positions would be (), not ('sinusoidal',)"),
  "gated FFN": (decoder(activation="swiglu"), "ffn/wi_gate/bias has no counterpart"),
  "another activation": (decoder(activation="gelu_tanh"), "activation_fn='gelu_tanh' must be one"),
  "grouped queries": (decoder(num_kv_heads=1), "num_kv_heads would be 2, not 1"),
  "head width": (decoder(head_dim=2), "head_dim would be 4, not 2"),
  "a window": (decoder(window=(2, 0)), "window would be None, not (2, 0)"),
  "soft cap": (decoder(logits_soft_cap=3.0), "logits_soft_cap would be None, not 3.0"),
  "causal buckets": (
    decoder(relative_buckets=6),
    "relative_bidirectional would be True, not False",
  ),
  "no biases": (decoder(use_bias=False), "use_bias would be True, not False"),
  "a late table": (decoder(position_offset=3), "position_offset=3, but positions begin at 2"),
  "embedding scale": (decoder(triple), "embedding scale would be 2.8284271247461903, not 3.0"),
  "branch scale": (
    decoder(with_norms("pre_ln", branch=Scale(0.5))),
    "layer 2 self_attention branch would be 1.0, not 0.5",
  ),
  "RMSNorm": (
    decoder(
      lambda a: dataclasses.replace(
        r := RECIPES["pre_ln"](a), decoder=dataclasses.replace(r.decoder, norm="rms_norm")
      )
    ),
    "norm would be 'layer_norm', not 'rms_norm'",
  ),
  "learned head scale": (decoder("normformer"), "head_scale has no counterpart"),
  "other experts": (encoder(vocab_size=None, experts=("a", "b")), "has no counterpart"),
  "BERT's head": (masked_lm(head="dense"), 'no head but head="linear"'),
  "images": (VisionEncoder(encoder=encoder()), "no class for a VisionEncoder"),
  "stacks that differ": (
    encoder_decoder().clone(decoder=decoder(of="encoder_decoder", activation="relu")),
    "encoder.activation would be 'relu', not 'gelu'",
  ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torchscale_has_not_is_one_line(name):
  model, fragment = REFUSED[name]
  variables = {"params": {}} if name == "images" else weights(model)
  assert fragment in message(convert.to_torchscale, model, variables)


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - set(HELD)))
def test_other_recipes_are_refused(recipe):
  model = decoder(recipe)
  text = message(convert.to_torchscale, model, weights(model))
  assert "has no counterpart" in text or "torchscale has no such model" in text


@pytest.mark.parametrize("model", [decoder(position_offset=0), beit3().clone(position_offset=0)])
def test_tables_that_begin_at_zero_compute_the_same_behind_two_rows(model):
  variables = weights(model)
  config = torchscale.config_of(model)
  again, moved = convert.from_torchscale(convert.to_torchscale(model, variables), config)
  tokens = jnp.arange(5)[None]
  inputs = (tokens,) if hasattr(model, "tied") else (jnp.ones((1, 4, 4, 3)), tokens)
  out = jax.jit(model.apply)(variables, *inputs)
  np.testing.assert_allclose(jax.jit(again.apply)(moved, *inputs), out, atol=1e-6)


@pytest.mark.parametrize(
  "model",
  [
    encoder_decoder(**RELATIVE, relative_cross=True, depths=(1, 1)),
    beit3(depths=(1, 0)),
  ],
  ids=["encoder decoder", "beit3"],
)
def test_each_tensor_is_accounted_for(model):
  model = bidirectional(model)
  tensors = convert.to_torchscale(model, weights(model))
  # Whoever builds a model gives the table or not: nothing says that it is missing.
  optional = [name for name in tensors if name.endswith("embed_positions.weight")]
  config = torchscale.config_of(model) | {"rel_pos_buckets": model_buckets(model)}
  config.pop("share_all_embeddings", None)
  assert_each_is_accounted_for(convert.from_torchscale, tensors, config, optional)


def model_buckets(model) -> int:
  return getattr(model, "encoder", model).relative_buckets


ASKED = {
  "the heads": (decoder(), ["decoder_attention_heads"], "give encoder_attention_heads or decoder_"),
  "one of the heads": (encoder_decoder(), ["decoder_attention_heads"], "decoder_attention_heads"),
  "distance": (decoder(**RELATIVE), ["max_rel_pos"], "must give max_rel_pos"),
  "post or deepnorm": (decoder("post_ln"), ["subln", "deepnorm"], "must give deepnorm"),
  "pre or deepnorm": (encoder("pre_ln"), ["subln", "deepnorm"], "must give deepnorm"),
  "post or pre": (encoder("post_ln"), ["encoder_normalize_before"], "encoder_normalize_before"),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_no_tensor_shows_is_asked_for_by_name(name):
  model, keys, fragment = ASKED[name]
  config = {k: v for k, v in torchscale.config_of(model).items() if k not in keys}
  tensors = convert.to_torchscale(model, weights(model))
  assert fragment in message(convert.from_torchscale, tensors, config)
  # None is absent, as argparse has it.
  nones = dict.fromkeys(keys)
  assert fragment in message(convert.from_torchscale, tensors, config | nones)


def unfinished(architecture):
  """Magneto's encoder without its final norm."""
  recipe = RECIPES["magneto"](architecture)
  return dataclasses.replace(recipe, encoder=dataclasses.replace(recipe.encoder, final_norm=False))


@functools.cache
def written(name):
  """A model and its state dict."""
  model = {
    "sub": decoder(),
    "pre": decoder("pre_ln"),
    "post": encoder("post_ln"),
    "pre encoder": encoder("pre_ln"),
    "no output": encoder(unfinished),
    "no final": decoder(with_norms("post_ln", norms=frozenset({"post", "mid"}))),
    "relative": decoder(**RELATIVE),
    "masked": masked_lm(tied=False),
    "beit3": beit3(),
  }[name]
  return model, convert.to_torchscale(model, weights(model))


CONTRADICTIONS = {
  **{
    f"{key}={value!r}": ("sub", {key: value}, f"{key}")
    for key, value in {
      "decoder_layers": 4,
      "decoder_embed_dim": 16,
      "decoder_ffn_embed_dim": 99,
      "vocab_size": 8,
      "deepnorm": True,
      "subln": False,
      "multiway": True,
      "layernorm_embedding": True,
      "xpos_rel_pos": True,
      "share_decoder_input_output_embed": True,
      "share_all_embeddings": True,
      "moe_freq": 2,
      # And what is no value of the kind.
      "decoder_attention_heads": 3,
      "activation_fn": "geglu",
      "layernorm_eps": "1e-5",
      "xpos_scale_base": float("nan"),
      "no_scale_embedding": "no",
    }.items()
  },
  "no heads": ("sub", {"decoder_attention_heads": 0}, "must divide the width 8"),
  "true heads": ("sub", {"decoder_attention_heads": True}, "must be of the type of 1"),
  "list": ("sub", {"activation_fn": ["gelu"]}, "must be of the type of 'gelu'"),
  "post": ("pre", {"decoder_normalize_before": False}, "decoder_normalize_before is False in"),
  "subln": ("pre", {"subln": True}, "subln is True in the configuration and False"),
  "final norm": ("pre encoder", {"deepnorm": True}, "the tensors have a final norm"),
  "final norm of an encoder": ("no output", {"normalize_output": True}, "normalize_output is True"),
  "final norm of a decoder": (
    "no final",
    {"decoder_normalize_before": True},
    "decoder_normalize_b",
  ),
  "heads": ("relative", {"decoder_attention_heads": 4}, "decoder_attention_heads is 4 in"),
  "buckets": ("relative", {"rel_pos_buckets": 8}, "rel_pos_buckets is 8 in"),
  "distance": ("relative", {"max_rel_pos": 1}, "max_rel_pos=1 must exceed"),
  "relative": ("sub", {"rel_pos_buckets": 8, "max_rel_pos": 9}, "missing: self_attn_relative"),
  "tied encoder": (
    "masked",
    {"share_encoder_input_output_embed": True},
    "sets share_encoder_input",
  ),
  "patches": ("beit3", {"patch_size": 16}, "patch_size is 16 in the configuration and 2"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_named(name):
  of, changes, fragment = CONTRADICTIONS[name]
  model, tensors = written(of)
  text = message(convert.from_torchscale, tensors, torchscale.config_of(model) | changes)
  assert fragment.replace("moe_freq", "mixture of experts") in text


def test_tables_are_tied_if_their_numbers_are_the_same():
  """With a configuration that does not say so: torchscale's encoders cannot be configured."""
  model = decoder(tied=True)
  tensors = convert.to_torchscale(model, weights(model))
  config = torchscale.config_of(model) | {"share_decoder_input_output_embed": False}
  assert convert.from_torchscale(tensors, config)[0].tied
  other = tensors | {"output_projection.weight": tensors["output_projection.weight"] + 1}
  assert not convert.from_torchscale(other, config)[0].tied
  # Left out by a format that keeps shared tensors once.
  del tensors["output_projection.weight"]
  text = message(convert.from_torchscale, tensors, config)
  assert "missing: output_projection.weight; if it is embed_tokens.weight, the config" in text
  config["share_decoder_input_output_embed"] = True
  assert convert.from_torchscale(tensors, config)[0].tied


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_what_is_written_does_not_depend_on_the_numbers(value):
  """Gradients have the same names, too; and equal tables need not be tied."""
  for model in (decoder(tied=True), decoder(), encoder_decoder(shared=True, tied=True)):
    tree = jax.tree.map(lambda leaf: np.full_like(leaf, value), weights(model))
    tensors = convert.to_torchscale(model, tree)
    assert all(np.array_equal(t, np.full_like(t, value), equal_nan=True) for t in tensors.values())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(dtype):
  model, tensors = written("sub")
  cast = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
  again, variables = convert.from_torchscale(cast, torchscale.config_of(model))
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
  expected = {name: tensor.astype(np.float32) for name, tensor in cast.items()}
  assert_same_tensors(convert.to_torchscale(again, variables), expected)


BROKEN = {
  "NaN": (np.float32(np.nan), "NaN or infinity in 'layers.1.ffn.fc2.bias'"),
  "infinity": (np.float32(np.inf), "NaN or infinity in 'layers.1.ffn.fc2.bias'"),
  "too large": (np.float64(1e300), "NaN or infinity in 'layers.1.ffn.fc2.bias'"),
  "integers": (np.int8(3), "no floats: layers.1.ffn.fc2.bias"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_numbers_that_are_no_weights_are_named(name):
  value, fragment = BROKEN[name]
  model, tensors = written("sub")
  tensors = tensors | {"layers.1.ffn.fc2.bias": np.full(8, value)}
  assert fragment in message(convert.from_torchscale, tensors, torchscale.config_of(model))


OTHERS = {
  "nothing": ({}, "no state dict of torchscale"),
  "fairseq": ({"decoder.layers.0.fc1.weight": np.zeros((2, 2))}, "no state dict of torchscale"),
  "released": ({"beit3.encoder.layers.0.x": np.zeros(2)}, "--from=beit3"),
  "a layer left out": (
    {"layers.0.x": np.zeros(2), "layers.2.x": np.zeros(2)},
    "missing: layers.1.*, but there are layers beyond it",
  ),
  "endless layers": ({f"layers.{'9' * 5000}.x": np.zeros(2)}, "no state dict of torchscale"),
  "experts": ({"layers.0.moe_layer.gate.wg.weight": np.zeros(2)}, "mixture of experts"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_models_file_is_one_line(name):
  tensors, fragment = OTHERS[name]
  assert fragment in message(convert.from_torchscale, tensors, {"decoder_attention_heads": 2})


def test_a_multiway_decoder_is_refused():
  model, tensors = written("relative")
  tensors = {name.replace("q_proj.", "q_proj.A."): tensor for name, tensor in tensors.items()}
  assert "multiway decoders" in message(
    convert.from_torchscale, tensors, torchscale.config_of(model)
  )


@pytest.mark.parametrize("scale", [np.ones(2, np.float32), np.ones(3, np.float32)])
def test_another_position_encoding_is_found(scale):
  model = decoder(positions="xpos")
  tensors = convert.to_torchscale(model, weights(model))
  tensors["layers.1.self_attn.xpos.scale"] = scale
  assert "layers.1.self_attn.xpos.scale has not xPos's values" in message(
    convert.from_torchscale, tensors, torchscale.config_of(model)
  )


def test_defaults_are_torchscales():
  model, tensors = written("sub")
  read, _ = convert.from_torchscale(tensors, {"decoder_attention_heads": 2})
  assert (read.activation, read.norm_epsilon, read.position_offset) == ("gelu", 1e-5, 2)
  assert read.recipe.embedding.scale == 1.0 and read.relative_bidirectional


def test_a_pre_norm_encoder_may_lack_the_final_norm():
  """With normalize_output=False, as BEiT-3's classifiers have it."""
  model, tensors = written("post")
  config = {"encoder_attention_heads": 2, "subln": False, "normalize_output": False}
  read, _ = convert.from_torchscale(tensors, config)
  assert read.recipe.layers[0].ffn.norms == {"in"} and not read.recipe.final_norm
