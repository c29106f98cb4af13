"""Recipes as data: the papers' numbers, the records' rules, and how they are read."""

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest

from magneto_jax.theory import recipes, records
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import (
  Architecture,
  Attention,
  FeedForward,
  Init,
  Layer,
  Scale,
  Segment,
  Stack,
)

PRE, POST, SUB_LN = frozenset({"in"}), frozenset({"post"}), frozenset({"in", "mid"})

ENCODER = Architecture("encoder", encoder_layers=6)
DECODER = Architecture("decoder", decoder_layers=6)
BOTH = Architecture("encoder_decoder", encoder_layers=6, decoder_layers=4)


def only_layer(stack: Stack) -> Layer:
  (segment,) = stack.segments
  (layer,) = segment.pattern
  return layer


# ---------------------------------------------------------------------------------------------
# What the papers say
# ---------------------------------------------------------------------------------------------

SITES = {
  "pre_ln": (PRE, PRE, PRE, True),
  "post_ln": (POST, POST, POST, False),
  "magneto": (SUB_LN, PRE, SUB_LN, True),
  "deepnet": (POST, POST, POST, False),
  "normformer": (PRE | {"out"}, PRE, SUB_LN, True),
  "magneto_torchscale": (SUB_LN, PRE, SUB_LN, True),
  "deepnet_torchscale": (POST, POST, POST, False),
  "pre_ln_scaled_init": (PRE, PRE, PRE, True),
  "sandwich_ln": (PRE | {"out"}, PRE | {"out"}, PRE | {"out"}, True),
  "peri_ln": (PRE | {"out"}, PRE | {"out"}, PRE | {"out"}, True),
  "out_norm": ({"out"}, {"out"}, {"out"}, True),
  "olmo2": ({"out"}, {"out"}, {"out"}, True),
  "layernorm_scaling": (PRE, PRE, PRE, True),
  "layer_scale": (PRE, PRE, PRE, True),
  "rezero": (frozenset(), frozenset(), frozenset(), False),
  "depth_mup": (PRE, PRE, PRE, True),
  "completep": (PRE, PRE, PRE, True),
  "keel": (PRE | POST, PRE | POST, PRE | POST, False),
  "deepscalelm": (PRE, PRE, PRE, True),
  "deepscalelm_simple": (PRE, PRE, PRE, True),
}


@pytest.mark.parametrize("name", RECIPES)
def test_norm_sites_are_the_papers(name):
  for stack in (RECIPES[name](BOTH).encoder, RECIPES[name](BOTH).decoder):
    self_attention, cross_attention, ffn, final_norm = SITES[name]
    layer = only_layer(stack)
    assert layer.self_attention.norms == self_attention
    assert layer.ffn.norms == ffn
    assert stack.final_norm == final_norm
    assert stack.norm == ("rms_norm" if name == "olmo2" else "layer_norm")
    assert stack.embedding.norm == (name == "peri_ln")
  assert only_layer(RECIPES[name](BOTH).decoder).cross_attention.norms == cross_attention


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fills_the_stacks_of_its_architecture(name):
  recipe = RECIPES[name]
  assert recipe(ENCODER).name == name
  assert (recipe(ENCODER).decoder, recipe(DECODER).encoder) == (None, None)
  for stack, depth in (
    (recipe(ENCODER).encoder, 6),
    (recipe(DECODER).decoder, 6),
    (recipe(BOTH).encoder, 6),
    (recipe(BOTH).decoder, 4),
  ):
    assert stack.num_layers == depth
    has_cross = stack == recipe(BOTH).decoder
    assert (only_layer(stack).cross_attention is not None) == has_cross


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_hashable_and_reproducible(name):
  assert hash(RECIPES[name](BOTH)) == hash(RECIPES[name](BOTH))
  assert RECIPES[name](BOTH) == RECIPES[name](BOTH)


OWN_EMBEDDING = (
  *("magneto_torchscale", "deepnet_torchscale", "olmo2"),
  *("deepscalelm", "deepscalelm_simple"),
)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in OWN_EMBEDDING])
def test_tokens_and_positions_start_with_unit_variance(name):
  embedding = RECIPES[name](Architecture("decoder", decoder_layers=2, width=256)).decoder.embedding
  tables = (embedding.tokens, embedding.positions, embedding.relative)
  assert tables == (Init("normal", gain=1 / 16),) * 3
  assert embedding.scale == 16.0
  assert embedding.patches == Init("xavier_normal")


def test_embeddings_of_code_are_not_scaled():
  """torchscale: tokens N(0, 1/D), positions and relative biases N(0, 1); OLMo 2: all 0.02."""
  architecture, table = (
    Architecture("encoder", 2, width=256),
    lambda gain: Init("normal", gain=gain),
  )
  for name, tokens, positions in (
    ("magneto_torchscale", 1 / 16, 1.0),
    ("deepnet_torchscale", 1 / 16, 1.0),
    ("olmo2", 0.02, 0.02),
  ):
    embedding = RECIPES[name](architecture).encoder.embedding
    assert embedding.tokens == table(tokens)
    assert embedding.positions == embedding.relative == table(positions)
    assert embedding.scale == 1.0
    if "torchscale" in name:
      assert embedding.patches == Init("torch_uniform", bias="torch_uniform")


TESTDATA = pathlib.Path(__file__).resolve().parents[1] / "testdata"
TORCHSCALE = json.loads((TESTDATA / "torchscale_init_stats.json").read_text())
GROUPS = {
  "q_proj": "qk",
  "k_proj": "qk",
  "v_proj": "v",
  "out_proj": "out",
  "fc1": "wi",
  "fc2": "wo",
}
SUBLAYERS = {"self_attn": "self_attention", "encoder_attn": "cross_attention", "ffn": "ffn"}


@pytest.mark.parametrize("case", TORCHSCALE["stats"])
def test_torchscale_recipes_have_the_deviations_of_its_code(case):
  """Every parameter that torchscale draws, measured right after it was built.

  A deviation of n uniform or normal numbers is off by 1 / sqrt(2n) at most: 5 of those, and 1e-3
  for the mean that is subtracted from the few.
  """
  kind, paper, *rest = case.split("_")
  depths = [word for word in rest if word.isdigit()]
  bert_init = "bertinit" in rest
  kind = {"encdec": "encoder_decoder"}.get(kind, kind)
  stacks = kind.split("_")
  layers = {f"{stack}_layers": int(n) for stack, n in zip(stacks, depths, strict=True)}
  sizes = {"width": TORCHSCALE["width"], "ffn_width": TORCHSCALE["ffn_width"]}
  name = {"subln": "magneto_torchscale", "deepnorm": "deepnet_torchscale"}[paper]
  recipe = RECIPES[name](Architecture(kind, **layers, **sizes), bert_init=bert_init)
  checked = 0
  for path, measured in TORCHSCALE["stats"][case].items():
    # Both experts of a multiway encoder are drawn alike.
    *_, module, leaf = parts = [part for part in path.split(".") if part not in ("A", "B")]
    stack = getattr(recipe, parts[0] if parts[0] in stacks else stacks[0])
    if module in ("embed_tokens", "output_projection"):
      std = stack.embedding.tokens.gain
    elif module == "embed_positions":
      std = stack.embedding.positions.gain
    elif module == "relative_attention_bias":
      std = stack.embedding.relative.gain
    elif module in GROUPS:
      sublayer = getattr(only_layer(stack), SUBLAYERS[parts[-3]])
      init = getattr(sublayer, GROUPS[module])
      fan_in = sizes["ffn_width" if module == "fc2" else "width"]
      fan_out = sizes["ffn_width" if module == "fc1" else "width"]
      std = init.std(fan_in, fan_out) if leaf == "weight" else init.bias_std(fan_in)
    else:
      assert "norm" in module or module.endswith("_ln")
      std = 0.0
    rel = 1e-3 + 5 / math.sqrt(2 * measured["count"])
    assert measured["std"] == pytest.approx(std, rel=rel, abs=1e-12), path
    checked += 1
  assert checked == len(TORCHSCALE["stats"][case]) > 15


def scaled_gains(layer: Layer):
  attention, ffn = layer.self_attention, layer.ffn
  return attention.v, attention.out, ffn.wi, ffn.wo


def assert_magneto(layer: Layer, gamma: float):
  assert all(init == Init("xavier_normal", pytest.approx(gamma)) for init in scaled_gains(layer))
  assert layer.self_attention.qk == Init("xavier_normal", 1.0)


@pytest.mark.parametrize("depth", (1, 6, 24, 1000))
@pytest.mark.parametrize("kind", ("encoder", "decoder"))
def test_magneto_gain_of_one_stack(kind, depth):
  recipe = RECIPES["magneto"](Architecture(kind, **{f"{kind}_layers": depth}))
  assert_magneto(only_layer(getattr(recipe, kind)), math.sqrt(math.log(2 * depth)))


def test_magneto_gains_of_an_encoder_decoder():
  recipe = RECIPES["magneto"](BOTH)
  assert_magneto(only_layer(recipe.encoder), math.sqrt(math.log(12) * math.log(12) / 3))
  assert_magneto(only_layer(recipe.decoder), math.sqrt(math.log(12)))
  wide = RECIPES["magneto"](Architecture("encoder_decoder", encoder_layers=18, decoder_layers=2))
  assert_magneto(only_layer(wide.encoder), math.sqrt(math.log(36) * math.log(6) / 3))
  assert_magneto(only_layer(wide.decoder), math.sqrt(math.log(6)))


def test_magneto_leaves_cross_attention_unscaled():
  assert only_layer(RECIPES["magneto"](BOTH).decoder).cross_attention == Attention(PRE)


def assert_deepnet(layer: Layer, alpha: float, beta: float, rel: float):
  for sublayer in (layer.self_attention, layer.ffn, layer.cross_attention):
    if sublayer is not None:
      assert sublayer.skip == Scale(pytest.approx(alpha, rel=rel))
      assert sublayer.branch == sublayer.in_scale == Scale(1.0)
  gains = scaled_gains(layer)
  if layer.cross_attention is not None:
    gains += (layer.cross_attention.v, layer.cross_attention.out)
    assert layer.cross_attention.qk == Init("xavier_normal", 1.0)
  assert all(init == Init("xavier_normal", pytest.approx(beta, rel=rel)) for init in gains)
  assert layer.self_attention.qk == Init("xavier_normal", 1.0)


@pytest.mark.parametrize(
  ("depth", "alpha", "beta"),
  (
    (6, 1.8612, 0.3799),
    (12, 2.2134, 0.3195),
    (18, 2.4495, 0.2887),
    (24, 2.6321, 0.2686),
    (100, 3.7606, 0.1880),
    (1000, 6.6874, 0.1057),
  ),
)
@pytest.mark.parametrize("kind", ("encoder", "decoder"))
def test_deepnet_numbers_of_one_stack(kind, depth, alpha, beta):
  """The numbers are (2N)^1/4 and (8N)^-1/4 to four decimals: a beta of 0.1057 to 5e-4."""
  recipe = RECIPES["deepnet"](Architecture(kind, **{f"{kind}_layers": depth}))
  assert_deepnet(only_layer(getattr(recipe, kind)), alpha, beta, rel=5e-4)
  assert_deepnet(
    only_layer(getattr(recipe, kind)), (2 * depth) ** 0.25, (8 * depth) ** -0.25, 1e-12
  )


@pytest.mark.parametrize(
  ("depth", "alpha_encoder", "beta_encoder", "alpha_decoder", "beta_decoder"),
  (
    (6, 1.418, 0.497, 2.060, 0.343),
    (18, 1.999, 0.353, 2.711, 0.261),
    (100, 3.416, 0.206, 4.162, 0.170),
    (500, 5.648, 0.125, 6.223, 0.114),
  ),
)
def test_deepnet_numbers_of_an_encoder_decoder(
  depth, alpha_encoder, beta_encoder, alpha_decoder, beta_decoder
):
  recipe = RECIPES["deepnet"](Architecture("encoder_decoder", depth, depth))
  assert_deepnet(only_layer(recipe.encoder), alpha_encoder, beta_encoder, rel=5e-3)
  assert_deepnet(only_layer(recipe.decoder), alpha_decoder, beta_decoder, rel=5e-3)


def test_deepnet_tells_the_encoders_depth_from_the_decoders():
  recipe = RECIPES["deepnet"](Architecture("encoder_decoder", encoder_layers=6, decoder_layers=24))
  depth = (6**4 * 24) ** (1 / 16)
  assert_deepnet(only_layer(recipe.encoder), 0.81 * depth, 0.87 / depth, rel=1e-12)
  assert_deepnet(only_layer(recipe.decoder), 72**0.25, 288**-0.25, rel=1e-12)


def test_normformer_learns_head_scales_outside_cross_attention():
  layer = only_layer(RECIPES["normformer"](BOTH).decoder)
  assert layer.self_attention.head_scale == "pre_out_proj"
  assert layer.cross_attention.head_scale is None
  assert layer.ffn.skip == Scale(1.0)


@pytest.mark.parametrize("learned", (None, "vector", "scalar"))
def test_normformer_residual_scales_are_each_on_its_own_sublayer(learned):
  """lambda on the FFN, mu on self-attention; cross-attention has neither."""
  for option, scaled in (
    ("residual_scale", "ffn"),
    ("attention_residual_scale", "self_attention"),
  ):
    layer = only_layer(recipes.normformer(BOTH, **{option: learned}).decoder)
    for name, sublayer in layer.sublayers.items():
      assert sublayer.skip == Scale(1.0, learned if name == scaled else None)
      assert sublayer.branch == sublayer.in_scale == Scale()


@pytest.mark.parametrize("placement", (None, *records.HEAD_SCALES))
def test_normformer_head_scale_is_where_it_is_asked_for(placement):
  layer = only_layer(recipes.normformer(BOTH, head_scale=placement).decoder)
  assert layer.self_attention.head_scale == placement
  assert layer.cross_attention.head_scale is None


@pytest.mark.parametrize("option", ("residual_scale", "attention_residual_scale"))
def test_normformer_options_are_checked(option):
  with pytest.raises(ValueError, match="learned='matrix' must be one of None, scalar, vector"):
    recipes.normformer(DECODER, **{option: "matrix"})
  with pytest.raises(ValueError, match="head_scale='after' must be one of None, pre_out_proj"):
    recipes.normformer(DECODER, head_scale="after")


def test_peri_ln_is_sandwich_ln_behind_an_embedding_norm():
  peri, sandwich = (RECIPES[name](BOTH) for name in ("peri_ln", "sandwich_ln"))
  for stack, other in ((peri.encoder, sandwich.encoder), (peri.decoder, sandwich.decoder)):
    assert dataclasses.replace(stack.embedding, norm=False) == other.embedding
    assert stack.embedding.norm and not other.embedding.norm
    assert dataclasses.replace(stack, embedding=other.embedding) == other


def test_olmo2_draws_everything_alike_and_normalises_queries_and_keys():
  layer = only_layer(RECIPES["olmo2"](BOTH).decoder)
  for name, sublayer in layer.sublayers.items():
    groups = ("wi", "wo") if name == "ffn" else ("qk", "v", "out")
    assert {getattr(sublayer, group) for group in groups} == {Init("normal", gain=0.02)}
    assert sublayer.skip == sublayer.branch == sublayer.in_scale == Scale()
  assert layer.self_attention.qk_norm == layer.cross_attention.qk_norm == "width"


@pytest.mark.parametrize("name", RECIPES)
def test_qk_norm_changes_attentions_alone(name):
  for stack in (RECIPES[name](BOTH).encoder, RECIPES[name](BOTH).decoder):
    own = only_layer(stack).self_attention.qk_norm
    changed = records.with_qk_norm(stack, "head")
    for which, sublayer in only_layer(changed).sublayers.items():
      assert which == "ffn" or sublayer.qk_norm == "head"
    assert records.with_qk_norm(changed, own) == stack


@pytest.mark.parametrize("name", RECIPES)
def test_cross_attention_is_only_in_the_decoder_of_both(name):
  recipe = RECIPES[name]
  assert records.has_cross_attention(recipe(BOTH).decoder)
  for stack in (recipe(BOTH).encoder, recipe(ENCODER).encoder, recipe(DECODER).decoder):
    assert not records.has_cross_attention(stack)
  layer = only_layer(recipe(BOTH).decoder)
  assert list(layer.sublayers) == ["self_attention", "cross_attention", "ffn"]


def scales(name, architecture, stack):
  """(in_scale, skip, branch) of the feed-forward network, which are those of every sublayer."""
  layer = only_layer(getattr(RECIPES[name](architecture), stack))
  found = {(s.in_scale, s.skip, s.branch) for s in (layer.self_attention, layer.ffn)}
  if layer.cross_attention is not None:
    cross = layer.cross_attention
    found.add((cross.in_scale, cross.skip, cross.branch))
  (only,) = found
  return only


def test_layernorm_scaling_counts_layers_from_one():
  scale, skip, branch = scales("layernorm_scaling", BOTH, "decoder")
  assert scale.value == pytest.approx([1, 1 / math.sqrt(2), 1 / math.sqrt(3), 1 / 2])
  assert (skip, branch, scale.learned) == (Scale(), Scale(), None)


@pytest.mark.parametrize(
  "depth, start", ((1, 0.1), (18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6), (1000, 1e-6))
)
def test_layer_scale_starts_smaller_in_deeper_stacks(depth, start):
  architecture = Architecture("encoder", encoder_layers=depth)
  assert scales("layer_scale", architecture, "encoder")[2] == Scale(start, "vector")


def test_rezero_starts_as_the_identity():
  assert scales("rezero", DECODER, "decoder") == (Scale(), Scale(), Scale(0.0, "scalar"))


@pytest.mark.parametrize("stack, depth", (("encoder", 6), ("decoder", 4)))
def test_residual_multipliers_follow_the_stacks_depth(stack, depth):
  assert scales("depth_mup", BOTH, stack)[2].value == pytest.approx(depth**-0.5)
  assert scales("completep", BOTH, stack)[2].value == pytest.approx(1 / depth)


def test_keel_weighs_the_stream_by_its_sublayers():
  """Two a layer, three in the decoder of an encoder-decoder."""
  for architecture, stack, alpha in (
    (DECODER, "decoder", 12.0),
    (ENCODER, "encoder", 12.0),
    (BOTH, "encoder", 12.0),
    (BOTH, "decoder", 12.0),
  ):
    assert scales("keel", architecture, stack) == (Scale(), Scale(alpha), Scale())


def test_scaled_init_shrinks_the_last_product_of_each_branch():
  for architecture, stack, branches in (
    (DECODER, "decoder", 12),
    (BOTH, "encoder", 12),
    (Architecture("encoder_decoder", 6, 8), "decoder", 24),
  ):
    layer = only_layer(getattr(RECIPES["pre_ln_scaled_init"](architecture), stack))
    last = Init("normal", pytest.approx(0.02 / math.sqrt(branches)))
    assert (layer.self_attention.out, layer.ffn.wo) == (last, last)
    plain = (layer.self_attention.qk, layer.self_attention.v, layer.ffn.wi)
    assert plain == (Init("normal", 0.02),) * 3
    if layer.cross_attention is not None:
      assert layer.cross_attention == layer.self_attention


# ---------------------------------------------------------------------------------------------
# DeepScaleLM
# ---------------------------------------------------------------------------------------------

GOLDEN = json.loads((TESTDATA / "moments_reference.json").read_text())["dslm_golden"]
DEEPSCALELM = ("deepscalelm", "deepscalelm_simple")
BERT = Architecture(
  *("encoder", 12, 0, 768, 3072, 12),
  dropout=0.1,
  token_correlation=0.221,
  embedding_tables=3,
)


def changed(architecture, **fields):
  return dataclasses.replace(architecture, **fields)


def relu_moment(r):
  """E[relu(a) relu(b)] / E[relu(a)^2] of standard normal a and b correlated by r, by quadrature.

  In polar coordinates, with t = acos r: (2 / pi) int_0^(pi - t) sin u sin(u + t) du.
  """
  t = math.acos(r)
  nodes, weights = np.polynomial.legendre.leggauss(40)
  u = (math.pi - t) * (nodes + 1) / 2
  return float((math.pi - t) / math.pi * np.sum(weights * np.sin(u) * np.sin(u + t)))


def schedule(r0, dropout, beta2, layers, attentions=1):
  """The authors' loop with the stream's variance S in it: r before each layer, and behind all."""
  r, s, seen, lambda2 = r0 * (1 - dropout), 1.0, [], 1 - beta2
  for _ in range(layers):
    seen.append(r)
    for correlation in [lambda r: 1.0] * attentions + [relu_moment]:
      total = lambda2 * s + beta2
      r = (lambda2 * s * r + beta2 * (1 - dropout) * correlation(r)) / total
      s = total
  return seen, r


def v_stds(stack: Stack, sublayer="self_attention") -> list[float]:
  """The deviations of v in every layer, which are those of out."""
  found = [getattr(layer, sublayer) for layer in stack.layers]
  stds = [float(attention.v.std(stack.width, stack.width)) for attention in found]
  assert stds == [float(attention.out.std(stack.width, stack.width)) for attention in found]
  return stds


def of_correlations(correlations, dropout, width):
  """sqrt(sqrt((1 - p) / r) / D)."""
  return [math.sqrt(math.sqrt((1 - dropout) / r) / width) for r in correlations]


@pytest.mark.parametrize("name", DEEPSCALELM)
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['params']['n_layers']}_layers")
def test_deepscalelm_has_the_reference_numbers(case, name):
  """Every one, to 1e-12."""
  given, expected = case["params"], case["theory"]
  width = given["d"]
  architecture = changed(
    BERT,
    encoder_layers=given["n_layers"],
    width=width,
    ffn_width=given["d_ff"],
    dropout=given["p"],
    token_correlation=given["r0"],
  )
  stack = RECIPES[name](architecture, beta_squared=given.get("bet2")).encoder
  exactly = lambda value: pytest.approx(value, rel=1e-12)
  for sublayer in only_layer(stack).sublayers.values():
    assert sublayer.skip == Scale(exactly(expected["lam"]))
    assert sublayer.branch == Scale(exactly(expected["beta"]))
    assert sublayer.in_scale == Scale()
  layer = stack.layers[0]
  assert layer.self_attention.qk.std(width, width) == exactly(expected["std_qk"])
  assert layer.ffn.wi.std(width, given["d_ff"]) == exactly(expected["std_ffn"])
  assert layer.ffn.wo.std(given["d_ff"], width) == exactly(expected["std_ffn"])
  embedding = stack.embedding
  assert embedding.scale * embedding.tokens.gain == exactly(expected["std_embed"])
  assert embedding.positions.gain == exactly(expected["std_embed"])
  stds = v_stds(stack)
  if name == "deepscalelm_simple":
    assert stds == [exactly(expected["std_v_o_simple"])] * given["n_layers"]
  else:
    for which, std in expected["std_v_o"].items():
      assert stds[int(which)] == exactly(std)
      r = (1 - given["p"]) / (width * stds[int(which)] ** 2) ** 2
      assert r == exactly(expected["r"][which])


@pytest.mark.parametrize("dropout", (0.0, 0.1, 0.4))
@pytest.mark.parametrize("r0", (1e-3, 0.221, 1.0))
def test_deepscalelm_follows_the_correlation_through_the_stack(r0, dropout):
  """In every layer, by the r that enters it; kappa keeps the means of ReLU's outputs."""
  architecture = changed(BERT, token_correlation=r0, dropout=dropout)
  seen, _ = schedule(r0, dropout, 2 / 12, 12)
  stds = v_stds(recipes.deepscalelm(architecture).encoder)
  assert stds == pytest.approx(of_correlations(seen, dropout, 768), rel=1e-10)  # The quadrature.


def test_deepscalelms_kappa_is_of_second_moments():
  """1 / pi of independent inputs, whose outputs are correlated by 0 about their means.

  With beta^2 near 1 a layer's r is (1 - p) kappa of the r behind attention, which is near 1 - p.
  """
  for dropout in (0.1, 0.5, 0.9):
    architecture = changed(BERT, dropout=dropout)
    stds = v_stds(recipes.deepscalelm(architecture, beta_squared=1 - 1e-9).encoder)
    r = (1 - dropout) / (768 * stds[1] ** 2) ** 2
    assert r == pytest.approx((1 - dropout) * relu_moment(1 - dropout), rel=1e-6)


@pytest.mark.parametrize("r0", (1.0, 1e-9))
def test_deepscalelm_does_not_leave_correlations_by_rounding(r0):
  """Without dropout r goes to 1, where an r above it has no kappa."""
  for layers in (1, 3, 200, 3000):
    stack = recipes.deepscalelm(changed(BERT, encoder_layers=layers, token_correlation=r0)).encoder
    assert all(np.isfinite(v_stds(stack)))
    clean = changed(BERT, encoder_layers=layers, token_correlation=r0, dropout=0.0)
    assert min(v_stds(recipes.deepscalelm(clean).encoder)) >= 768**-0.5


def test_deepscalelms_ffn_is_not_the_misread_one():
  """sqrt((1 - p) / 2) / D at F = 4 D, not sqrt(1 - p) / (2 D); sqrt(2 (1 - p) / (D F)) else."""
  ffn = recipes.deepscalelm(BERT).encoder.layers[0].ffn
  assert ffn.wi == ffn.wo == Init("normal", pytest.approx(math.sqrt(math.sqrt(0.9 / 2) / 768)))
  assert ffn.wi.gain != pytest.approx(math.sqrt(math.sqrt(0.9) / 2 / 768), rel=0.1)
  narrow = recipes.deepscalelm(changed(BERT, ffn_width=768)).encoder.layers[0].ffn
  assert narrow.wi == narrow.wo == Init("normal", pytest.approx((2 * 0.9) ** 0.25 / 768**0.5))


@pytest.mark.parametrize("name", DEEPSCALELM)
def test_deepscalelm_is_the_same_for_any_heads(name):
  assert RECIPES[name](BERT) == RECIPES[name](changed(BERT, heads=3))


@pytest.mark.parametrize("name", DEEPSCALELM)
@pytest.mark.parametrize("dropout", (0.0, 0.1, 0.5))
def test_deepscalelms_blocks_have_unit_variance_in_training(dropout, name):
  """Behind its dropout: attention's is (D s_v^2) (D s_o^2) r / (1 - p), with `simple` r / 2, the
  FFN's D F s^4 / 2 / (1 - p), and the embedding's the sum of its tables'."""
  architecture = changed(BERT, dropout=dropout, embedding_tables=2)
  stack, keep = RECIPES[name](architecture).encoder, 1 - dropout
  seen, _ = schedule(0.221, dropout, 2 / 12, 12)
  for std, r in zip(v_stds(stack), seen, strict=True):
    variance = (768 * std**2) ** 2 * r / keep
    assert variance == pytest.approx(1.0 if name == "deepscalelm" else r / 2)
  wi, wo = stack.layers[0].ffn.wi.std(768, 3072), stack.layers[0].ffn.wo.std(3072, 768)
  assert 768 * 3072 * wi**2 * wo**2 / 2 / keep == pytest.approx(1)
  embedding = stack.embedding
  tables = (embedding.scale * embedding.tokens.gain, embedding.positions.gain)
  assert sum(std**2 for std in tables) / keep == pytest.approx(1)
  # Patches stand in the tokens' place, beside positions.
  assert 2 * 48 * embedding.patches.std(48, 768) ** 2 / keep == pytest.approx(1)
  # As everywhere in the house: logits of unit variance with a tied table.
  assert embedding.tokens == embedding.relative == Init("normal", 768**-0.5)


@pytest.mark.parametrize("name", DEEPSCALELM)
def test_deepscalelm_draws_tables_by_their_number(name):
  for tables in (1, 2, 3):
    embedding = RECIPES[name](changed(BERT, embedding_tables=tables)).encoder.embedding
    assert embedding.positions == Init("normal", pytest.approx(math.sqrt(0.9 / tables)))
    assert embedding.scale == pytest.approx(math.sqrt(768 * 0.9 / tables))


def betas(stack: Stack) -> float:
  """beta^2 of a stack, the same in all its sublayers, whose lambda^2 is 1 - beta^2."""
  subs = only_layer(stack).sublayers.values()
  found = {(sub.skip.value, sub.branch.value) for sub in subs}
  ((lam, beta),) = found
  assert lam**2 + beta**2 == pytest.approx(1, abs=1e-15)
  return beta**2


@pytest.mark.parametrize("name", DEEPSCALELM)
def test_deepscalelms_beta_is_by_layers_or_by_blocks_or_as_given(name):
  """Two blocks a layer, three with cross-attention, each stack by its own depth."""
  make = RECIPES[name]
  for unit, encoder, decoder in (("layers", 2 / 6, 2 / 4), ("blocks", 2 / 12, 2 / 12)):
    assert betas(make(BOTH, depth_unit=unit).encoder) == pytest.approx(encoder)
    assert betas(make(BOTH, depth_unit=unit).decoder) == pytest.approx(decoder)
    both = make(changed(BOTH, decoder_layers=8), depth_unit=unit)
    assert betas(both.decoder) == pytest.approx(2 / (8 if unit == "layers" else 24))
    for architecture, stack in ((ENCODER, "encoder"), (DECODER, "decoder")):
      assert betas(getattr(make(architecture, depth_unit=unit), stack)) == pytest.approx(encoder)
      given = make(architecture, depth_unit=unit, beta_squared=0.005)
      assert betas(getattr(given, stack)) == pytest.approx(0.005)
  assert make(BOTH) == make(BOTH, depth_unit="layers", placement="pre", beta_squared=None)
  # The authors' figures have 192 layers and lambda^2 = 0.995: 2 / 400, nearly 2 / 384.
  figures = make(changed(BERT, encoder_layers=192), depth_unit="blocks").encoder
  assert betas(figures) == pytest.approx(0.005, rel=0.05)


@pytest.mark.parametrize("name", DEEPSCALELM)
def test_deepscalelm_of_one_or_two_layers_has_no_skip(name):
  for layers, beta2 in ((1, 1.0), (2, 1.0), (3, 2 / 3)):
    stack = RECIPES[name](changed(BERT, encoder_layers=layers)).encoder
    assert betas(stack) == pytest.approx(beta2)
    assert (only_layer(stack).ffn.skip.value == 0.0) == (layers < 3)
    assert all(np.isfinite(v_stds(stack)))
  for layers, beta2 in ((1, 1.0), (2, 1 / 2)):
    stack = RECIPES[name](changed(BERT, encoder_layers=layers), depth_unit="blocks").encoder
    assert betas(stack) == pytest.approx(beta2)


def test_deepscalelms_decoder_alone_is_its_encoder():
  decoder = Architecture("decoder", 0, 12, **SIZES_OF_BERT)
  for name in DEEPSCALELM:
    assert RECIPES[name](decoder).decoder == RECIPES[name](BERT).encoder


SIZES_OF_BERT = {
  field.name: getattr(BERT, field.name)
  for field in dataclasses.fields(Architecture)
  if field.name not in ("kind", "encoder_layers", "decoder_layers")
}


@pytest.mark.parametrize(
  "unit, betas_of", (("layers", (2 / 6, 2 / 9)), ("blocks", (1 / 6, 2 / 27)))
)
def test_deepscalelms_stacks_have_schedules_of_their_own(unit, betas_of):
  """Cross-attention moves the decoder's r, and is drawn for the r that leaves the encoder."""
  architecture = Architecture("encoder_decoder", 6, 9, **SIZES_OF_BERT)
  recipe = recipes.deepscalelm(architecture, depth_unit=unit)
  of_encoder, memory = schedule(0.221, 0.1, betas_of[0], 6)
  of_decoder, _ = schedule(0.221, 0.1, betas_of[1], 9, attentions=2)
  exactly = lambda rs: pytest.approx(of_correlations(rs, 0.1, 768), rel=1e-10)
  assert v_stds(recipe.encoder) == exactly(of_encoder)
  assert v_stds(recipe.decoder) == exactly(of_decoder)
  assert v_stds(recipe.decoder, "cross_attention") == exactly([memory] * 9)
  simple = recipes.deepscalelm_simple(architecture, depth_unit=unit)
  layer = only_layer(simple.decoder)
  assert layer.cross_attention == layer.self_attention
  assert set(scaled_gains(layer)) == {layer.ffn.wi}


@pytest.mark.parametrize("name", DEEPSCALELM)
def test_deepscalelms_placement_moves_norms_alone(name):
  pre, post = (RECIPES[name](BOTH, placement=placement) for placement in ("pre", "post"))
  assert RECIPES[name](BOTH) == pre
  for before, after in ((pre.encoder, post.encoder), (pre.decoder, post.decoder)):
    assert (before.final_norm, before.embedding.norm) == (True, False)
    assert (after.final_norm, after.embedding.norm) == (False, True)
    for which, sublayer in only_layer(after).sublayers.items():
      own = only_layer(before).sublayers[which]
      assert (own.norms, sublayer.norms) == (PRE, POST)
      assert dataclasses.replace(sublayer, norms=PRE) == own
    assert dataclasses.replace(after.embedding, norm=False) == before.embedding


def test_only_deepscalelm_reads_the_correlation_and_the_tables():
  for name, recipe in RECIPES.items():
    reads = lambda **fields: recipe(changed(BOTH, **fields)) != recipe(BOTH)  # noqa: B023
    assert reads(token_correlation=0.5) == (name == "deepscalelm")
    assert reads(embedding_tables=2) == (name in DEEPSCALELM)
    assert reads(dropout=0.1) == (name in DEEPSCALELM)


@pytest.mark.parametrize("name", DEEPSCALELM)
@pytest.mark.parametrize(
  "options, message",
  (
    ({"placement": "mid"}, "placement='mid' must be one of pre, post"),
    ({"depth_unit": "layer"}, "depth_unit='layer' must be one of layers, blocks"),
    ({"depth_unit": "layer", "beta_squared": 0.5}, "depth_unit='layer' must be one of"),
    ({"beta_squared": 0.0}, r"beta_squared=0.0 must lie in \(0, 1\)"),
    ({"beta_squared": 1.0}, r"beta_squared=1.0 must lie in \(0, 1\)"),
    ({"beta_squared": -0.1}, r"beta_squared=-0.1 must lie in \(0, 1\)"),
    ({"beta_squared": math.nan}, r"beta_squared=nan must lie in \(0, 1\)"),
  ),
)
def test_deepscalelms_options_are_checked(name, options, message):
  with pytest.raises(ValueError, match=message):
    RECIPES[name](BOTH, **options)


@pytest.mark.parametrize(
  ("init", "std"),
  (
    (Init("xavier_normal"), math.sqrt(2 / 400)),
    (Init("xavier_uniform", 0.5), 0.5 * math.sqrt(2 / 400)),
    (Init("torch_uniform", 2.0), 2 / math.sqrt(300)),
    (Init("lecun_normal", 0.5), 0.5 / math.sqrt(100)),
    (Init("normal", 0.02), 0.02),
  ),
)
def test_std_of_a_family(init, std):
  assert init.std(100, 300) == pytest.approx(std)


def test_std_of_a_gain_a_layer_is_one_a_layer():
  np.testing.assert_allclose(Init("normal", (0.5, 2.0)).std(8, 8), [0.5, 2.0])


# ---------------------------------------------------------------------------------------------
# In words
# ---------------------------------------------------------------------------------------------

XAVIER_ATTENTION = "  init: qk xavier_normal x 1, v xavier_normal x {0}, out xavier_normal x {0}"
XAVIER_FFN = "  init: wi xavier_normal x {0}, wo xavier_normal x {0}"


def xavier(rule: str, final_norm: str) -> tuple[str, ...]:
  """One rule for both sublayers, drawn with gain 1."""
  attention, ffn = rule.format("self_attention"), rule.format("ffn")
  return attention, XAVIER_ATTENTION.format("1"), ffn, XAVIER_FFN.format("1"), final_norm


IN_WORDS = {
  "pre_ln": (
    "x <- x + self_attention(LN(x))",
    XAVIER_ATTENTION.format("1"),
    "x <- x + ffn(LN(x))",
    XAVIER_FFN.format("1"),
    "final norm: LN",
  ),
  "post_ln": (
    "x <- LN(x + self_attention(x))",
    XAVIER_ATTENTION.format("1"),
    "x <- LN(x + ffn(x))",
    XAVIER_FFN.format("1"),
    "final norm: none",
  ),
  "magneto": (
    "x <- x + self_attention(LN(x)); inner LN before its output projection",
    XAVIER_ATTENTION.format("1.576"),
    "x <- x + ffn(LN(x)); inner LN before its output projection",
    XAVIER_FFN.format("1.576"),
    "final norm: LN",
  ),
  "deepnet": (
    "x <- LN(1.861 x + self_attention(x))",
    XAVIER_ATTENTION.format("0.3799"),
    "x <- LN(1.861 x + ffn(x))",
    XAVIER_FFN.format("0.3799"),
    "final norm: none",
  ),
  "normformer": (
    "x <- x + LN(self_attention(LN(x))); learned head scale (pre_out_proj)",
    "  init: qk xavier_uniform x 0.7071, v xavier_uniform x 0.7071, out xavier_uniform x 1",
    "x <- x + ffn(LN(x)); inner LN before its output projection",
    "  init: wi torch_uniform x 1, wo torch_uniform x 1",
    "final norm: LN",
  ),
  "magneto_torchscale": (
    "x <- x + self_attention(LN(x)); inner LN before its output projection",
    "  init: qk torch_uniform x 1, v torch_uniform x 1.576, out torch_uniform x 1.576",
    "x <- x + ffn(LN(x)); inner LN before its output projection",
    "  init: wi torch_uniform x 1.576, wo torch_uniform x 1.576",
    "final norm: LN",
  ),
  "deepnet_torchscale": (
    "x <- LN(1.861 x + self_attention(x))",
    "  init: qk torch_uniform x 1, v torch_uniform x 0.3799, out torch_uniform x 0.3799",
    "x <- LN(1.861 x + ffn(x))",
    "  init: wi torch_uniform x 0.3799, wo torch_uniform x 0.3799",
    "final norm: none",
  ),
  "pre_ln_scaled_init": (
    "x <- x + self_attention(LN(x))",
    "  init: qk normal x 0.02, v normal x 0.02, out normal x 0.005774",
    "x <- x + ffn(LN(x))",
    "  init: wi normal x 0.02, wo normal x 0.005774",
    "final norm: LN",
  ),
  "sandwich_ln": xavier("x <- x + LN({}(LN(x)))", "final norm: LN"),
  "peri_ln": (*xavier("x <- x + LN({}(LN(x)))", "embedding norm: LN"), "final norm: LN"),
  "out_norm": xavier("x <- x + LN({}(x))", "final norm: LN"),
  "olmo2": (
    "x <- x + RMSNorm(self_attention(x)); RMSNorm of queries and keys (each width)",
    "  init: qk normal x 0.02, v normal x 0.02, out normal x 0.02",
    "x <- x + RMSNorm(ffn(x))",
    "  init: wi normal x 0.02, wo normal x 0.02",
    "final norm: RMSNorm",
  ),
  "layernorm_scaling": xavier("x <- x + {}(0.4082..1 LN(x))", "final norm: LN"),
  "layer_scale": xavier("x <- x + learned[0.1] {}(LN(x))", "final norm: LN"),
  "rezero": xavier("x <- x + learned[0] {}(x)", "final norm: none"),
  "depth_mup": xavier("x <- x + 0.4082 {}(LN(x))", "final norm: LN"),
  "completep": xavier("x <- x + 0.1667 {}(LN(x))", "final norm: LN"),
  "keel": xavier("x <- LN(12 x + {}(LN(x)))", "final norm: none"),
  # Of a Zipf text without dropout: (1 / 0.01372)^(1/4) = 2.922 at first; sqrt(1/3) = 0.5774.
  "deepscalelm": (
    "x <- 0.8165 x + 0.5774 self_attention(LN(x))",
    "  init: qk lecun_normal x 1, v lecun_normal x 1.026..2.922, out lecun_normal x 1.026..2.922",
    "x <- 0.8165 x + 0.5774 ffn(LN(x))",
    "  init: wi normal x 0.03716, wo normal x 0.03716",
    "final norm: LN",
  ),
  "deepscalelm_simple": (
    "x <- 0.8165 x + 0.5774 self_attention(LN(x))",
    "  init: qk lecun_normal x 1, v normal x 0.03716, out normal x 0.03716",
    "x <- 0.8165 x + 0.5774 ffn(LN(x))",
    "  init: wi normal x 0.03716, wo normal x 0.03716",
    "final norm: LN",
  ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_description_reads_as_the_paper(name):
  assert records.describe(RECIPES[name](DECODER).decoder) == list(IN_WORDS[name])


@pytest.mark.parametrize("name", RECIPES)
def test_description_does_not_depend_on_how_numbers_are_held(name):
  stack = RECIPES[name](DECODER).decoder
  assert records.describe(records.as_arrays(stack)) == list(IN_WORDS[name])


def test_description_of_scales_ranges_and_cross_attention():
  layer = Layer(
    Attention(PRE, in_scale=Scale((1.0, 0.5)), branch=Scale(0.1, "vector"), skip=Scale(0.0)),
    FeedForward(frozenset(), branch=Scale((0.25, 0.25))),
    cross_attention=Attention(frozenset({"out", "post"})),
  )
  embedding = RECIPES["pre_ln"](DECODER).decoder.embedding
  stack = Stack((Segment((layer,), 2),), embedding, final_norm=True, norm="rms_norm")
  assert records.describe(stack)[::2] == [
    "x <- 0 x + learned[0.1] self_attention(0.5..1 RMSNorm(x))",
    "x <- RMSNorm(x + RMSNorm(cross_attention(x)))",
    "x <- x + 0.25 ffn(x)",
    "final norm: RMSNorm",
  ]


def test_description_says_each_different_sublayer_once():
  pre, post = (only_layer(RECIPES[name](DECODER).decoder) for name in ("pre_ln", "post_ln"))
  embedding = RECIPES["pre_ln"](DECODER).decoder.embedding
  stack = Stack((Segment((post, pre), 2), Segment((pre,), 3)), embedding, final_norm=True)
  assert stack.num_layers == 7
  names = [(name, sublayer.norms) for name, sublayer in records.sublayers(stack)]
  assert names == [
    ("self_attention", POST),
    ("ffn", POST),
    ("self_attention", PRE),
    ("ffn", PRE),
  ]
