"""Released BEiT-3 files: the prefix, the heads beside the model, and positions of another size."""

import functools

import numpy as np
import pytest

from magneto_jax import convert
from magneto_jax.convert import beit3 as released
from magneto_jax.convert import torchscale
from magneto_jax.models import (
  AnsweringBEiT3,
  CaptioningBEiT3,
  MaskedBEiT3,
  ReasoningBEiT3,
  RetrievalBEiT3,
  caption_mask,
)
from magneto_jax.theory import records
from tests import reference
from tests.checkpoints import (
  assert_round_trip,
  assert_same_tensors,
  beit3,
  encoder,
  message,
  weights,
)
from tests.models import common

MODEL = beit3()
CONFIG = torchscale.config_of(MODEL)
# Of image classification, and what is no whole head.
HEADS = {
  name: np.arange(3, dtype=np.float32)
  for name in ("fc_norm.weight", "head.bias", "head.weight", "mlm_head.dense.weight")
}
# By model: its tensors beside the encoder, of width 8 and 7 tokens.
MODELS = {
  "pre-training": (
    MaskedBEiT3(encoder=MODEL, image_vocab_size=5),
    {"mim_head.weight": (5, 8), "mim_head.bias": (5,)},
  ),
  "retrieval": (
    RetrievalBEiT3(encoder=MODEL),
    {"vision_head.weight": (8, 8), "language_head.weight": (8, 8), "logit_scale": ()},
  ),
  "narrow retrieval": (
    RetrievalBEiT3(encoder=MODEL, features=3),
    {"vision_head.weight": (3, 8), "language_head.weight": (3, 8), "logit_scale": ()},
  ),
  "captioning": (
    CaptioningBEiT3(encoder=MODEL, mask_id=6),
    {"mlm_head.weight": (7, 8), "mlm_head.bias": (7,)},
  ),
  "vqa": (
    AnsweringBEiT3(encoder=MODEL, answers=4),
    {
      **{"pooler.norm.weight": (8,), "pooler.norm.bias": (8,)},
      **{"pooler.dense.weight": (8, 8), "pooler.dense.bias": (8,)},
      **{"head.0.weight": (16, 8), "head.0.bias": (16,)},
      **{"head.1.weight": (16,), "head.1.bias": (16,)},
      **{"head.3.weight": (4, 16), "head.3.bias": (4,)},
    },
  ),
  "nlvr2": (
    ReasoningBEiT3(encoder=MODEL),
    {
      **{"head.norm1.weight": (32,), "head.norm1.bias": (32,)},
      **{"head.dense1.weight": (16, 32), "head.dense1.bias": (16,)},
      **{"head.norm2.weight": (16,), "head.norm2.bias": (16,)},
      **{"head.dense2.weight": (2, 16), "head.dense2.bias": (2,)},
    },
  ),
}
POSITIONS = "beit3.encoder.embed_positions.A.weight"


def checkpoint(**changes):
  return convert.to_beit3(MODEL, weights(MODEL)) | changes


def test_round_trip_is_exact_with_the_prefix():
  tensors = assert_round_trip(MODEL, convert.from_beit3, convert.to_beit3, CONFIG)
  assert all(name.startswith("beit3.") for name in tensors)
  plain = {name.removeprefix("beit3."): tensor for name, tensor in tensors.items()}
  assert_same_tensors(convert.to_torchscale(*convert.from_torchscale(plain, CONFIG)), plain)
  # Without it, too.
  assert_same_tensors(convert.to_beit3(*convert.from_beit3(plain, CONFIG)), tensors)


def test_images_are_experts_a_and_texts_b():
  params = weights(MODEL)["params"]
  block = params["encoder"]["stack"]["segment_0"]["block_0"]
  patches = params["patch_embedding"]
  ours = {
    "encoder.layers.1.ffn.A.fc1.weight": block["ffn"]["wi"]["vision"]["kernel"][1].T,
    "encoder.layers.0.self_attn.v_proj.B.bias": block["self_attention"]["value"]["text"]["bias"][
      0
    ].ravel(),
    "encoder.layer_norm.B.weight": params["encoder"]["stack"]["final_norm"]["text"]["scale"],
    "encoder.embed_positions.A.weight": params["position_embeddings_vision"]["embedding"],
    "vision_embed.proj.weight": patches["projection"]["kernel"].transpose(3, 2, 0, 1),
    "vision_embed.cls_token": patches["class_token"].reshape(1, 1, 8),
  }
  for name, expected in ours.items():
    np.testing.assert_array_equal(checkpoint()[f"beit3.{name}"], expected, err_msg=name)


def test_heads_are_kept_beside_the_model():
  model, variables, kept = released.read(checkpoint(**HEADS), CONFIG)
  assert_same_tensors(kept, HEADS)
  assert_same_tensors(convert.to_beit3(model, variables) | kept, checkpoint(**HEADS))


def with_head(name, **changes):
  """A file of one of MODELS, and its configuration."""
  model, shapes = MODELS[name]
  rng = np.random.default_rng(1)
  head = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
  return checkpoint(**head | changes), released.config_of(model)


@pytest.mark.parametrize("name", MODELS)
def test_a_head_is_read_and_written(name):
  """Every tensor, number for number; each that is missing or of another shape is named."""
  tensors, config = with_head(name)
  model, variables, kept = released.read(tensors, config)
  assert model == MODELS[name][0].clone(encoder=model.encoder) and not kept
  assert_same_tensors(convert.to_beit3(model, variables), tensors)
  assert released.config_of(model) == config
  for tensor in MODELS[name][1]:
    rest = {n: t for n, t in tensors.items() if n != tensor}
    if any(head.marker == tensor for head in released.TASKS):
      assert isinstance(released.read(rest, config)[0], type(MODEL))
    else:
      assert f"missing: {tensor}" in message(convert.from_beit3, rest, config)
  # Tensors of another task beside it are kept.
  model, variables, kept = released.read(tensors | HEADS, config)
  assert_same_tensors(kept, HEADS)
  assert_same_tensors(convert.to_beit3(model, variables) | kept, tensors | HEADS)


def test_heads_compute_what_the_released_code_does():
  """Its modules in NumPy, on what the encoder puts out: a transposed matrix or a swapped norm would
  show; float32."""
  images = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
  tokens = np.array([[0, 3, 2], [0, 4, 2]])

  def outputs(name, *inputs, **encoder_inputs):
    tensors, config = with_head(name)
    model, variables = convert.from_beit3(tensors, config)
    params = variables["params"]
    h = common.run(model.encoder, params["encoder"], *inputs, **encoder_inputs)
    return functools.partial(common.run, model, params), tensors, h.astype(np.float64)

  linear = lambda t, name, x: x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0.0)
  norm = lambda t, name, x: reference.layer_norm(
    {"scale": t[f"{name}.weight"], "bias": t[f"{name}.bias"]}, x
  )
  run, t, h = outputs("vqa", images, tokens)
  x = np.tanh(linear(t, "pooler.dense", norm(t, "pooler.norm", h[:, 0])))
  expected = linear(t, "head.3", reference.gelu(norm(t, "head.1", linear(t, "head.0", x))))
  np.testing.assert_allclose(run(images, tokens), expected, rtol=2e-4)

  pairs = np.stack([images, images[::-1]], axis=1)
  run, t, first = outputs("nlvr2", images, tokens)
  second = outputs("nlvr2", images[::-1], tokens)[2]
  x = np.concatenate([h[:, place] for h in (first, second) for place in (0, 5)], axis=1)
  x = linear(t, "head.dense1", norm(t, "head.norm1", x))
  expected = linear(t, "head.dense2", reference.gelu(norm(t, "head.norm2", x)))
  np.testing.assert_allclose(run(pairs, tokens), expected, rtol=2e-4)

  run, t, h = outputs("retrieval", images)
  found = run(images)
  x = linear(t, "vision_head", h[:, 0])
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  np.testing.assert_allclose(found.images_BE, x, rtol=0, atol=1e-5)
  assert float(found.scale) == pytest.approx(float(np.exp(t["logit_scale"])), rel=1e-6)

  run, t, h = outputs("captioning", images, tokens, visible_BTT=caption_mask(5, tokens.shape[1]))
  found = run(images, tokens)
  np.testing.assert_allclose(found, linear(t, "mlm_head", h[:, 5:]), rtol=0, atol=1e-4)


def test_the_encoder_of_images_is_the_model_without_texts():
  """Of a model with a head; the paper's form too; float32."""
  images = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
  stack = MODEL.encoder
  paper = MODEL.clone(
    encoder=stack.clone(recipe=records.cut(stack.recipe, 1), shared_attention=True, fusion_layers=1)
  )
  for model in (MODELS["vqa"][0], paper):
    args = released.inputs_of(model) if model is not paper else torchscale.inputs_of(model)[0]
    params = reference.random_params(model, *args)
    vision, variables = released.vision_of(model, {"params": params})
    whole, inner = (model, params) if model is paper else (model.encoder, params["encoder"])
    np.testing.assert_allclose(
      common.run(vision, variables["params"], images),
      common.run(whole, inner, images),
      rtol=0,
      atol=1e-5,
    )


def test_the_mask_of_a_captioning_model_is_known_or_asked_for():
  tensors, config = with_head("captioning")
  own = {key: value for key, value in config.items() if key != "mask_token_id"}
  assert "must give mask_token_id" in message(convert.from_beit3, tensors, own)
  too_large = own | {"mask_token_id": 7}
  assert "mask_token_id=7 is not in a vocabulary of 7" in message(
    convert.from_beit3, tensors, too_large
  )


def test_a_model_that_no_file_holds_is_one_line():
  assert "hold no Encoder" in message(convert.to_beit3, encoder(), {"params": {}})
  paper = MODEL.clone(encoder=MODEL.encoder.clone(shared_attention=True))
  assert "neither shared attention nor fusion layers" in message(
    convert.to_beit3, paper, {"params": {}}
  )


def test_the_released_sizes_need_no_configuration():
  for width, heads in ((768, 12), (1024, 16)):
    model = MODEL.clone(encoder=encoder(**{
      "recipe": "magneto_torchscale", "depths": (1, 0), "vocab_size": None, "positions": "none",
      "experts": ("vision", "text"),
    }))  # fmt: skip
    tensors = {
      f"beit3.{name}": np.zeros([width if n == 8 else n for n in tensor.shape], np.float32)
      for name, tensor in convert.to_torchscale(model, weights(model)).items()
    }
    read, _ = convert.from_beit3(tensors)
    assert (read.encoder.width, read.encoder.num_heads) == (width, heads)
  with_other_heads, _ = convert.from_beit3(tensors, {"encoder_attention_heads": 8})
  assert with_other_heads.encoder.num_heads == 8


# torch 2.13.0: interpolate(arange(9) ** 2 as [1, 1, 3, 3], mode="bicubic", align_corners=False).
TORCH = {
  2: [[1.43076, 6.52237], [32.39737, 53.18076]],
  4: [
    [-0.68686, -0.5641, 0.91175, 2.6771],
    [2.49059, 4.78462, 9.65483, 13.59144],
    [19.01332, 24.70171, 34.87837, 42.20934],
    [36.97397, 44.83363, 58.40466, 67.90689],
  ],
  5: [
    [-0.9047, -0.87401, -0.44, 1.07402, 2.21671],
    [1.26999, 2.31915, 4.44401, 7.64888, 9.81003],
    [8.328, 11.068, 16.0, 22.012, 25.864],
    [25.10602, 29.53687, 37.276, 46.09514, 51.63799],
    [37.28871, 42.73803, 52.16801, 62.678, 69.23932],
  ],
}


def table(side: int, width: int = 8) -> np.ndarray:
  return np.random.default_rng(0).standard_normal((3 + side * side, width)).astype(np.float32)


def resized(table, image_size):
  tensors = checkpoint(**{POSITIONS: table})
  model, variables = convert.from_beit3(tensors, CONFIG, image_size=image_size)
  found = np.asarray(variables["params"]["position_embeddings_vision"]["embedding"])
  assert model.num_patches == len(found) - 3 == (image_size // model.patch_size) ** 2
  return found


@pytest.mark.parametrize("side", TORCH)
def test_positions_are_interpolated_as_torch_does(side):
  positions = np.repeat(np.concatenate([[-1, -2, -3], np.arange(9.0) ** 2])[:, None], 8, axis=1)
  found = resized(positions.astype(np.float32), 2 * side)
  np.testing.assert_array_equal(found[:3, 0], [-1, -2, -3])
  np.testing.assert_allclose(found[3:, 5].reshape(side, side), TORCH[side], rtol=1e-6, atol=2e-5)


def test_the_same_size_changes_nothing():
  np.testing.assert_array_equal(resized(table(3), 6), table(3))


@pytest.mark.parametrize("side", [1, 2, 5, 8])
def test_a_constant_stays_constant(side):
  np.testing.assert_allclose(resized(np.full((12, 8), 0.7, np.float32), 2 * side), 0.7, atol=1e-6)


def test_interpolation_is_the_same_along_both_axes():
  positions = table(4)
  turned = positions.copy()
  turned[3:] = positions[3:].reshape(4, 4, 8).swapaxes(0, 1).reshape(16, 8)
  found = resized(turned, 10)[3:].reshape(5, 5, 8).swapaxes(0, 1)
  np.testing.assert_allclose(resized(positions, 10)[3:].reshape(5, 5, 8), found, atol=1e-6)
  # Away from the edges, twice the size has every step of a ramp in two.
  ramp = np.concatenate([np.zeros(3), np.tile(np.arange(8.0), 8)])[:, None].repeat(8, axis=1)
  rows = resized(ramp.astype(np.float32), 32)[3:, 0].reshape(16, 16)
  np.testing.assert_allclose((rows[:, 2:] - rows[:, :-2])[:, 4:10], 1.0, atol=1e-5)


WRONG = {
  "no square": ({POSITIONS: table(3)[:-1]}, 8, "8 patches are no square"),
  "no patches": ({POSITIONS: table(3)[:3]}, 8, "0 patches are no square"),
  "no multiple": ({}, 9, "image_size=9 must be a multiple of the patch size 2"),
  "too small": ({}, 1, "image_size=1 must be a multiple"),
  "flat positions": ({POSITIONS: np.ones(9, np.float32)}, 8, f"wrong shape: {POSITIONS[6:]} [9]"),
  "no projection": (
    {"beit3.vision_embed.proj.weight": None},
    8,
    "missing: vision_embed.proj.weight",
  ),
  "endless patches": (
    {"beit3.vision_embed.proj.weight": np.ones((1, 1, 1, 10**6), np.float32)},
    None,
    "wrong shape: vision_embed.proj.weight [1, 1, 1, 1000000], expected [8, 3, 1000000, 1000000]",
  ),
  "no positions": ({POSITIONS: None}, 8, "this is no BEiT-3"),
  "no text": ({"beit3.text_embed.weight": None}, None, "this is no BEiT-3"),
  "flat text": (
    {"beit3.text_embed.weight": np.ones(3)},
    None,
    "wrong shape: text_embed.weight [3]",
  ),
  "without prefix": ({"text_embed.weight": np.ones((7, 8))}, None, "unknown, as all others begin"),
  "unknown": ({"beit3.head.weight": np.ones(2)}, None, "unknown: head.weight"),
  "unknown head": ({"header.weight": np.ones(2)}, None, "begin with beit3.: header.weight"),
  "NaN": (
    {"beit3.text_embed.weight": np.full((7, 8), np.nan)},
    None,
    "NaN or infinity in 'text_em",
  ),
  "NaN in a head": ({"head.bias": np.float32([np.nan])}, None, "NaN or infinity in 'head.bias'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line(name):
  changes, image_size, fragment = WRONG[name]
  tensors = {k: v for k, v in checkpoint(**changes).items() if v is not None}
  assert fragment in message(convert.from_beit3, tensors, CONFIG, image_size=image_size)


def test_another_models_file_is_one_line():
  assert "this is no BEiT-3" in message(convert.from_beit3, {"decoder.version": np.ones(1)})
  assert "must give encoder_attention_heads" in message(convert.from_beit3, checkpoint())


def test_patches_are_scaled_as_the_text_is():
  """torchscale's no_scale_embedding=False."""
  config = CONFIG | {"no_scale_embedding": False}
  model, variables = convert.from_beit3(checkpoint(), config)
  assert model.scale_patches and model.encoder.recipe.embedding.scale == 8**0.5
  assert torchscale.config_of(model)["no_scale_embedding"] is False
  assert_same_tensors(convert.to_beit3(model, variables), checkpoint())
