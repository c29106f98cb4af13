"""The one Block and Stack: every recipe against its paper, and what holds for all of them."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax import kernels
from magneto_jax.layers.attention import Attention
from magneto_jax.layers.feed_forward import FeedForward
from magneto_jax.layers.norms import norm_factory
from magneto_jax.models.language import CausalLM
from magneto_jax.models.transformer import REMAT, Block, Context, Stack
from magneto_jax.theory import records
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import Architecture, Init, Scale, Segment
from tests import reference

WIDTH, HEADS, FFN = 32, 4, 64
TOKENS = np.random.default_rng(0).integers(0, 17, (2, 8))
STREAM = np.random.default_rng(1).standard_normal((2, 8, WIDTH)).astype(np.float32)


def decoder(name, layers=2, **options) -> records.Stack:
  architecture = Architecture("decoder", 0, layers, WIDTH, FFN, HEADS)
  return RECIPES[name](architecture, **options).decoder


def language_model(recipe, **options) -> CausalLM:
  return CausalLM(
    recipe=recipe, vocab_size=17, width=WIDTH, num_heads=HEADS, ffn_width=FFN, **options
  )


def stack(*, dtype=jnp.float32, dropout_rate=0.0, norm="layer_norm", **options) -> Stack:
  """A causal stack, without embedding or output."""
  norm = norm_factory(norm, dtype=dtype)
  attention = functools.partial(Attention, num_heads=HEADS, is_causal=True, dtype=dtype)
  feed_forward = functools.partial(FeedForward, ffn_width=FFN, dtype=dtype)
  return Stack(
    functools.partial(Block, attention, feed_forward, norm=norm, dropout_rate=dropout_rate),
    norm,
    **options,
  )


def replace_layer(record: records.Stack, **changes) -> records.Stack:
  """The stack with fields of its only layer replaced, e.g. `ffn={"skip": Scale(2.0)}`."""
  (segment,) = record.segments
  (layer,) = segment.pattern
  for name, fields in changes.items():
    layer = dataclasses.replace(
      layer, **{name: dataclasses.replace(getattr(layer, name), **fields)}
    )
  return dataclasses.replace(record, segments=(Segment((layer,), segment.repeats),))


def with_head_scale(placement) -> records.Stack:
  return replace_layer(decoder("normformer"), self_attention={"head_scale": placement})


def layer_of(name) -> records.Layer:
  return decoder(name).segments[0].pattern[0]


def one_and_slow(name, table):
  """The names of a table, all but one of them for `pytest -m slow`."""
  slow = [pytest.param(other, marks=pytest.mark.slow) for other in table if other != name]
  return [name, *slow]


def of_segments(*segments: Segment) -> records.Stack:
  return dataclasses.replace(decoder("pre_ln"), segments=segments)


# ---------------------------------------------------------------------------------------------
# The papers
# ---------------------------------------------------------------------------------------------

# The record, its layers in reference.py, and its final norm.
PAPERS = {
  "pre_ln": (decoder("pre_ln"), [(reference.pre_ln,)], reference.layer_norm),
  "post_ln": (decoder("post_ln"), [(reference.post_ln,)], None),
  "magneto": (decoder("magneto"), [(reference.magneto,)], reference.layer_norm),
  "deepnet": (decoder("deepnet"), [(reference.deepnet,)], None),
  "normformer": (decoder("normformer"), [(reference.normformer,)], reference.layer_norm),
  "magneto_torchscale": (
    decoder("magneto_torchscale"),
    [(reference.magneto,)],
    reference.layer_norm,
  ),
  "deepnet_torchscale": (decoder("deepnet_torchscale"), [(reference.deepnet,)], None),
  "pre_ln_scaled_init": (
    decoder("pre_ln_scaled_init"),
    [(reference.pre_ln,)],
    reference.layer_norm,
  ),
  "sandwich_ln": (decoder("sandwich_ln"), [(reference.sandwich_ln,)], reference.layer_norm),
  "peri_ln": (decoder("peri_ln"), [(reference.sandwich_ln,)], reference.layer_norm),
  "out_norm": (decoder("out_norm"), [(reference.out_norm,)], reference.layer_norm),
  "olmo2": (decoder("olmo2"), [(reference.olmo2,)], reference.rms_norm),
  "layernorm_scaling": (
    decoder("layernorm_scaling", 3),
    [(reference.layernorm_scaling,)],
    reference.layer_norm,
  ),
  "layer_scale": (decoder("layer_scale"), [(reference.layer_scale,)], reference.layer_norm),
  "rezero": (decoder("rezero"), [(reference.rezero,)], None),
  "depth_mup": (decoder("depth_mup"), [(reference.depth_mup,)], reference.layer_norm),
  "completep": (decoder("completep"), [(reference.completep,)], reference.layer_norm),
  "keel": (decoder("keel"), [(reference.keel,)], None),
  # Two layers of it have no skip.
  "deepscalelm": (decoder("deepscalelm", 3), [(reference.deepscalelm,)], reference.layer_norm),
  "deepscalelm_simple": (
    decoder("deepscalelm_simple", 3),
    [(reference.deepscalelm,)],
    reference.layer_norm,
  ),
  "deepscalelm, Post-LN": (
    decoder("deepscalelm", 3, placement="post"),
    [(reference.deepscalelm_post,)],
    None,
  ),
  "normformer with residual scale": (
    decoder("normformer", residual_scale="vector"),
    [(reference.normformer_residual_scale,)],
    reference.layer_norm,
  ),
  "normformer with a number on the residual": (
    decoder("normformer", residual_scale="scalar"),
    [(reference.normformer_residual_scale,)],
    reference.layer_norm,
  ),
  "normformer, masked language model": (
    decoder(
      "normformer",
      head_scale=None,
      residual_scale="vector",
      attention_residual_scale="vector",
    ),
    [(reference.normformer_two_residual_scales,)],
    reference.layer_norm,
  ),
  "pre_ln with QK-norm": (
    records.with_qk_norm(decoder("pre_ln"), "head"),
    [(reference.pre_ln_qk_norm,)],
    reference.layer_norm,
  ),
  "normformer, fairseq": (
    with_head_scale("post_out_proj_contiguous"),
    [(reference.normformer_contiguous,)],
    reference.layer_norm,
  ),
  "normformer, fairseq until November 2021": (
    with_head_scale("post_out_proj_interleaved"),
    [(reference.normformer_interleaved,)],
    reference.layer_norm,
  ),
  "pre_ln with RMSNorm": (
    dataclasses.replace(decoder("pre_ln"), norm="rms_norm"),
    [(reference.pre_rms_norm,)],
    reference.rms_norm,
  ),
  "mix_ln": (
    of_segments(Segment((layer_of("post_ln"),), 1), Segment((layer_of("pre_ln"),), 3)),
    [(reference.post_ln,), (reference.pre_ln,)],
    reference.layer_norm,
  ),
  "a pattern of two": (
    of_segments(Segment((layer_of("magneto"), layer_of("normformer")), 2)),
    [(reference.magneto, reference.normformer)],
    reference.layer_norm,
  ),
}


EMBEDDING_NORMS = ("peri_ln", "deepscalelm, Post-LN")


def test_every_recipe_is_held_against_its_paper():
  assert set(RECIPES) <= set(PAPERS)


# The rest of a table that `pytest -m slow` runs where one of each structure is enough.
MAIN = ("pre_ln", "post_ln", "magneto", "deepnet", "normformer")


def main_and_slow(table):
  """The names of a table, the recipes but for MAIN for `pytest -m slow`."""
  others = set(RECIPES) - set(MAIN)
  return [pytest.param(n, marks=pytest.mark.slow) if n in others else n for n in table]


def expected_logits(name, params):
  """The paper's; torchscale, unless told to, and OLMo 2 do not scale their tokens."""
  _, layers, final_norm = PAPERS[name]
  return reference.causal_lm(
    params,
    TOKENS,
    layers,
    final_norm=final_norm,
    scale=1.0 if "torchscale" in name or name == "olmo2" else math.sqrt(WIDTH),
    embedding_norm=reference.layer_norm if name in EMBEDDING_NORMS else None,
  )


@pytest.mark.parametrize("name", main_and_slow(PAPERS))
def test_model_is_its_papers_in_float64(name):
  """float64, so that what differs is the formula: 1e-11 of logits of order 1 to 10.

  Norm gains and biases, learned scales and projection biases are random: a misplaced one shows.
  """
  record, *_ = PAPERS[name]
  with jax.enable_x64(True):
    model = language_model(record, positions="learned", max_length=8, dtype=jnp.float64)
    params = reference.random_params(model, TOKENS, dtype=np.float64)
    logits = jax.jit(model.apply)({"params": params}, TOKENS)
    assert logits.dtype == jnp.float64
  expected = expected_logits(name, params)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", one_and_slow("normformer", RECIPES))
def test_model_is_its_papers_in_float32(name):
  """float32: 2e-5 absolute is some hundred roundings of logits of order 1 to 10."""
  record, *_ = PAPERS[name]
  model = language_model(record, positions="learned", max_length=8)
  params = reference.random_params(model, TOKENS)
  logits = jax.jit(model.apply)({"params": params}, TOKENS)
  wide = jax.tree.map(np.float64, params)
  expected = expected_logits(name, wide)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


def test_the_references_differ_from_each_other():
  """Else agreeing with one of them would say nothing: each moves the stream by more than 0.1."""
  record = decoder("normformer", residual_scale="vector", attention_residual_scale="vector")
  record = records.with_qk_norm(record, "width")
  everything = replace_layer(
    record,
    self_attention={"norms": frozenset(records.SITES), "branch": Scale(0.5, "vector")},
    ffn={"norms": frozenset(records.SITES), "branch": Scale(0.5, "vector")},
  )
  params = reference.random_params(stack(), STREAM, everything, dtype=np.float64)
  run = functools.partial(reference.stack, params, STREAM.astype(np.float64), final_norm=None)
  streams = [
    run([(layer,)])
    for layer in (
      reference.pre_ln,
      reference.post_ln,
      reference.magneto,
      reference.deepnet,
      reference.normformer,
      reference.normformer_residual_scale,
      reference.normformer_contiguous,
      reference.normformer_interleaved,
      reference.sandwich_ln,
      reference.out_norm,
      reference.layer_scale,
      reference.rezero,
      reference.depth_mup,
      reference.completep,
      reference.keel,
      reference.olmo2,
      reference.normformer_two_residual_scales,
    )
  ]
  for i, first in enumerate(streams):
    for second in streams[:i]:
      assert np.abs(first - second).max() > 0.1


# ---------------------------------------------------------------------------------------------
# Initialisation
# ---------------------------------------------------------------------------------------------

WIDE, WIDE_FFN, DEPTH = 256, 512, 4


@functools.cache
def initial(name):
  architecture = Architecture("decoder", 0, DEPTH, WIDE, WIDE_FFN, HEADS)
  model = CausalLM(
    recipe=RECIPES[name](architecture).decoder,
    vocab_size=300,
    width=WIDE,
    num_heads=HEADS,
    ffn_width=WIDE_FFN,
    tied=False,
    positions="learned",
  )
  params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
  return jax.tree.map(np.asarray, params)


def assert_std(array, std, rel=0.03):
  """Samples of 2^16 numbers and more: their deviation is off by 0.3 %, ten times below `rel`."""
  assert array.std() == pytest.approx(std, rel=rel)
  assert abs(array.mean()) < 0.02 * std


# Each paper's formula for the kernels of qk, v, out, wi and wo, in a stack of DEPTH layers.
SQUARE, TO_FFN = math.sqrt(2 / (WIDE + WIDE)), math.sqrt(2 / (WIDE + WIDE_FFN))
GAMMA, BETA = math.sqrt(math.log(2 * DEPTH)), (8 * DEPTH) ** -0.25
LAST = 0.02 / math.sqrt(2 * DEPTH)
TORCH, TORCH_WO = 1 / math.sqrt(3 * WIDE), 1 / math.sqrt(3 * WIDE_FFN)
# DeepScaleLM without dropout: r of a Zipf text as it enters each layer; beta^2 = 2 / DEPTH = 1 / 2.
RS = [np.sum(np.arange(1, 32_001) ** -2.0) / np.sum(np.arange(1, 32_001) ** -1.0) ** 2]
for _ in range(DEPTH - 1):
  r = (RS[-1] + 1) / 2
  RS.append((r + r + (math.sqrt(1 - r**2) - r * math.acos(r)) / math.pi) / 2)
CORRELATED = np.power(RS, -0.25) / math.sqrt(WIDE)
RELU = (2 / (WIDE * WIDE_FFN)) ** 0.25
# A number for all layers, or one for each.
STDS = dict.fromkeys(RECIPES, (SQUARE, SQUARE, SQUARE, TO_FFN, TO_FFN)) | {
  "deepscalelm": (WIDE**-0.5, CORRELATED, CORRELATED, RELU, RELU),
  "deepscalelm_simple": (WIDE**-0.5, *4 * (RELU,)),
  "pre_ln_scaled_init": (0.02, 0.02, LAST, 0.02, LAST),
  "olmo2": (0.02,) * 5,
  "magneto_torchscale": (TORCH, *3 * (GAMMA * TORCH,), GAMMA * TORCH_WO),
  "deepnet_torchscale": (TORCH, *3 * (BETA * TORCH,), BETA * TORCH_WO),
  "magneto": (SQUARE, GAMMA * SQUARE, GAMMA * SQUARE, GAMMA * TO_FFN, GAMMA * TO_FFN),
  "deepnet": (SQUARE, BETA * SQUARE, BETA * SQUARE, BETA * TO_FFN, BETA * TO_FFN),
  "normformer": (
    math.sqrt(1 / (2 * WIDE)),
    math.sqrt(1 / (2 * WIDE)),
    math.sqrt(1 / WIDE),
    1 / math.sqrt(3 * WIDE),
    1 / math.sqrt(3 * WIDE_FFN),
  ),
}


@pytest.mark.parametrize("name", main_and_slow(RECIPES))
def test_initial_kernels_have_the_papers_deviations(name):
  block = initial(name)["stack"]["segment_0"]["block_0"]
  attention, ffn = block["self_attention"], block["ffn"]
  qk, v, out, wi, wo = STDS[name]
  for kernel, std in (
    (attention["query"], qk),
    (attention["key"], qk),
    (attention["value"], v),
    (attention["out"], out),
    (ffn["wi"], wi),
    (ffn["wo"], wo),
  ):
    for layer, own in zip(kernel["kernel"], np.broadcast_to(std, DEPTH), strict=True):
      assert_std(layer, own)


@pytest.mark.parametrize("name", main_and_slow(RECIPES))
def test_initial_embeddings_have_the_papers_deviations(name):
  params = initial(name)
  for table in ("token_embedding", "output_embedding"):
    assert_std(params[table]["embedding"], 0.02 if name == "olmo2" else WIDE**-0.5)
  unit = "torchscale" in name or "deepscalelm" in name
  positions = 1.0 if unit else 0.02 if name == "olmo2" else WIDE**-0.5
  assert_std(params["position_embedding"]["embedding"], positions)


@pytest.mark.parametrize("name", main_and_slow(RECIPES))
def test_initial_biases_are_the_papers(name):
  """Zero in the papers; of torch's uniform default, times the kernel's gain, in some code.

  fairseq's NormFormer has the default but for W_o, torchscale everywhere.
  """
  block = initial(name)["stack"]["segment_0"]["block_0"]
  attention, ffn = block["self_attention"], block["ffn"]
  gain = {"magneto_torchscale": GAMMA, "deepnet_torchscale": BETA}.get(name, 1.0)
  for projection, fan_in, times in (
    (attention["query"], WIDE, 1.0),
    (attention["key"], WIDE, 1.0),
    (attention["value"], WIDE, gain),
    (attention["out"], WIDE, 0.0 if name == "normformer" else gain),
    (ffn["wi"], WIDE, gain),
    (ffn["wo"], WIDE_FFN, gain),
  ):
    if times and (name == "normformer" or "torchscale" in name):
      bound = times / math.sqrt(fan_in)
      # 4 layers of 256 numbers and more: 5 % is 3.5 deviations of the deviation.
      assert projection["bias"].std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
      assert 0.98 * bound < np.abs(projection["bias"]).max() <= bound
    else:
      assert not projection["bias"].any()


@pytest.mark.parametrize("name", main_and_slow(RECIPES))
def test_norms_and_learned_scales_start_at_identity(name):
  block = initial(name)["stack"]["segment_0"]["block_0"]

  def check(path, leaf):
    if "norm" in path[-2].key:
      np.testing.assert_array_equal(leaf, float(path[-1].key == "scale"))
    if path[-1].key in ("head_scale", "skip"):
      np.testing.assert_array_equal(leaf, 1.0)

  jax.tree_util.tree_map_with_path(check, block)


@pytest.mark.parametrize("name", main_and_slow(RECIPES))
def test_layers_and_projections_are_drawn_independently(name):
  """Two kernels of one shape, or two layers of one kernel, have a correlation of 1 / 256."""
  attention = initial(name)["stack"]["segment_0"]["block_0"]["self_attention"]
  kernels = [attention[which]["kernel"].reshape(DEPTH, -1) for which in ("query", "key", "value")]
  correlations = np.corrcoef(np.concatenate(kernels))
  assert np.abs(correlations - np.eye(len(correlations))).max() < 0.02


def test_each_init_group_draws_its_own_projections():
  """No paper above tells wi from wo; GPT-2's 1 / sqrt(2L) does. All groups differ here."""
  groups = {"qk": 0.1, "v": 0.2, "out": 0.3, "wi": 0.4, "wo": 0.5}
  init = {name: Init("normal", std, "torch_uniform", std) for name, std in groups.items()}
  record = replace_layer(
    decoder("pre_ln", 1),
    self_attention={name: init[name] for name in ("qk", "v", "out")},
    ffn={name: init[name] for name in ("wi", "wo")},
  )
  model = language_model(record, activation="swiglu")
  params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
  block = params["stack"]["segment_0"]["block_0"]
  projections = dict(query="qk", key="qk", value="v", out="out", wi="wi", wi_gate="wi", wo="wo")
  for name, group in projections.items():
    projection = (block["self_attention"] | block["ffn"])[name]
    # 1024 numbers and more: their deviation is off by 2.2 %.
    assert projection["kernel"].std() == pytest.approx(groups[group], rel=0.08)
    bound = groups[group] / math.sqrt(FFN if name == "wo" else WIDTH)
    assert 0.8 * bound < np.abs(projection["bias"]).max() <= bound * (1 + 1e-6)


def test_values_a_layer_reach_their_layer():
  """Under the scan, in a pattern of two: gains, scales and learned scales, each to its repeat."""
  first, second = layer_of("pre_ln"), layer_of("pre_ln")
  gains = {"wi": Init("normal", (0.1, 0.2, 0.3))}
  first = dataclasses.replace(first, ffn=dataclasses.replace(first.ffn, **gains))
  learned = {"skip": Scale((1.0, 2.0, 3.0), "vector"), "branch": Scale((4.0, 5.0, 6.0), "scalar")}
  second = dataclasses.replace(second, ffn=dataclasses.replace(second.ffn, **learned))
  record = of_segments(Segment((first, second), 3))
  init = jax.jit(lambda: stack().init(jax.random.key(0), STREAM, record))
  blocks = init()["params"]["segment_0"]
  deviations = blocks["block_0"]["ffn"]["wi"]["kernel"].std((1, 2))
  # 2048 numbers a layer: their deviation is off by 1.6 %.
  np.testing.assert_allclose(deviations, [0.1, 0.2, 0.3], rtol=0.06)
  scales = blocks["block_1"]["ffn_residual"]
  np.testing.assert_array_equal(scales["skip"], np.ones(WIDTH) * [[1.0], [2.0], [3.0]])
  np.testing.assert_array_equal(scales["branch"], [4.0, 5.0, 6.0])


def test_scales_a_layer_run_in_their_layer():
  """A branch scale of 0 removes its layer: what is left is the paper's stack of the others."""
  record = decoder("pre_ln", 3)
  off = {"branch": Scale((1.0, 0.0, 1.0))}
  params = reference.random_params(stack(), STREAM, record)
  without = replace_layer(record, self_attention=off, ffn=off)
  without_second = jax.jit(lambda: stack().apply({"params": params}, STREAM, without)[0])()
  rest = jax.tree.map(lambda leaf: leaf[::2], params["segment_0"])
  expected = reference.stack(
    {"segment_0": rest, "final_norm": params["final_norm"]},
    STREAM,
    [(reference.pre_ln,)],
    final_norm=reference.layer_norm,
  )
  np.testing.assert_allclose(without_second, expected, rtol=0, atol=2e-5)  # float32


# ---------------------------------------------------------------------------------------------
# Structure and numbers
# ---------------------------------------------------------------------------------------------


def counting(fn):
  """`fn`, jitted, and the list that grows by one at each trace of it."""
  traces = []

  def traced(*args):
    traces.append(1)
    return fn(*args)

  return jax.jit(traced), traces


def test_recipes_of_one_structure_compile_once():
  """DeepNet is Post-LN with other numbers: one init and one apply serve both, at any gains."""
  model = language_model(decoder("post_ln"))
  init, init_traces = counting(lambda record: model.init(jax.random.key(0), TOKENS, recipe=record))
  apply, apply_traces = counting(lambda v, record: model.apply(v, TOKENS, recipe=record))
  for name, times in (("post_ln", 1.0), ("deepnet", 1.0), ("deepnet", 1.5)):
    record = records.map_numbers(lambda value, times=times: value * times, decoder(name))
    variables = init(records.as_arrays(record))
    logits = apply(variables, records.as_arrays(record))
    if times == 1.0:
      continue
    own = language_model(record)
    expected_variables = jax.jit(own.init)(jax.random.key(0), TOKENS)
    expected = jax.jit(own.apply)(expected_variables, TOKENS)
    # float32: a constant that is folded may round otherwise than the same number traced.
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7),
      variables,
      expected_variables,
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
  assert (len(init_traces), len(apply_traces)) == (1, 1)
  assert (init._cache_size(), apply._cache_size()) == (1, 1)


def test_recipes_of_different_structure_compile_anew():
  def outline(record):
    return jax.eval_shape(language_model(record).init, jax.random.key(0), TOKENS)

  stacks = [decoder(name) for name in ("pre_ln", "post_ln", "magneto", "normformer")]
  stacks.append(replace_layer(decoder("pre_ln"), ffn={"skip": Scale(1.0, "vector")}))
  stacks.append(dataclasses.replace(decoder("pre_ln"), norm="rms_norm"))
  structures = {jax.tree.structure(records.as_arrays(record)) for record in stacks}
  assert len(structures) == len(stacks)
  trees = [jax.tree.structure(outline(record)) for record in stacks]
  assert len(set(trees)) == len(stacks)


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_do_not_change_the_structure(name):
  record = decoder(name)
  scaled = records.map_numbers(lambda value: 3 * np.asarray(value), record)
  one, other = records.as_arrays(record), records.as_arrays(scaled)
  assert jax.tree.structure(one) == jax.tree.structure(other)
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(one))
  visited = []
  records.map_numbers(visited.append, record)
  assert len(jax.tree.leaves(one)) == len(visited)  # What jax takes for a number is one.


def test_gradients_reach_the_numbers():
  """A sweep may differentiate by them: the residual's alpha is as good a variable as a weight."""
  record = records.as_arrays(decoder("deepnet"))
  params = reference.random_params(stack(), STREAM, record)
  loss = lambda record: jnp.sum(stack().apply({"params": params}, STREAM, record)[0] ** 3)
  slope = jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, record))
  assert jnp.all(slope.segments[0].pattern[0].ffn.skip.value != 0)
  assert jnp.all(slope.segments[0].pattern[0].ffn.wi.gain == 0)  # An init gain acts at init only.


# ---------------------------------------------------------------------------------------------
# Scan, remat, depth
# ---------------------------------------------------------------------------------------------


def forward_and_backward(module, record):
  """Stream and gradients of a fixed function of it, jitted as one."""

  def loss(params, x):
    y, *_ = module.apply({"params": params}, x, record)
    return jnp.sum(jnp.sin(y)), y

  grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  params = reference.random_params(module, STREAM, record)
  (_, y), gradients = grad(params, STREAM)
  return jax.tree.map(np.asarray, (y, gradients))


@pytest.mark.parametrize("name", one_and_slow("magneto", RECIPES))
def test_scan_matches_loop(name):
  """One parameter tree, drawn bit for bit, and the same numbers, in float64 to its last bits.

  The stream is not bit-equal: XLA fuses across unrolled layers, and then rounds sums otherwise.
  """
  record = records.as_arrays(decoder(name))
  with jax.enable_x64(True):
    module, loop = stack(dtype=jnp.float64), stack(dtype=jnp.float64, unroll=-1)
    params = reference.random_params(module, STREAM, record, dtype=np.float64)
    drawn = [jax.jit(m.init)(jax.random.key(0), STREAM, record) for m in (module, loop)]
    jax.tree.map(np.testing.assert_array_equal, *drawn)
    x = STREAM.astype(np.float64)
    y, y_loop = (jax.jit(m.apply)({"params": params}, x, record)[0] for m in (module, loop))
  np.testing.assert_allclose(y, y_loop, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", one_and_slow("magneto", RECIPES))
def test_gradients_through_scan_match_loop(name):
  """float32, relative to the largest of each array; without norms, errors grow along the stack."""
  record, rel = records.as_arrays(decoder(name)), 1e-5 if name == "rezero" else 2e-6
  y, gradients = forward_and_backward(stack(), record)
  y_loop, gradients_loop = forward_and_backward(stack(unroll=-1), record)
  close = functools.partial(assert_close_to_largest, rel=rel)
  jax.tree.map(close, (y, gradients), (y_loop, gradients_loop))


def assert_close_to_largest(actual, expected, rel=2e-6):
  np.testing.assert_allclose(actual, expected, rtol=0, atol=rel * max(1.0, np.abs(expected).max()))


def test_remat_changes_nothing():
  record = decoder("magneto")
  y, gradients = forward_and_backward(stack(), record)
  for remat in REMAT.keys() - {"none"}:
    y_remat, gradients_remat = forward_and_backward(stack(remat=remat), record)
    np.testing.assert_array_equal(y, y_remat)
    jax.tree.map(assert_close_to_largest, gradients, gradients_remat)


@pytest.mark.parametrize("remat, times", [("none", 1), ("dots", 1), ("attention", 1), ("full", 2)])
def test_only_full_remat_attends_again(remat, times):
  """A product of the backward pass that is not kept is in the program twice."""
  record = decoder("magneto", 1)
  model = stack(remat=remat, unroll=-1)
  params = reference.random_params(model, STREAM, record)
  loss = lambda params: model.apply({"params": params}, STREAM, record)[0].sum()
  with kernels.use_implementation("xla_chunked"):
    program = jax.make_jaxpr(jax.grad(loss))(params)
  assert len(_programs(program.jaxpr, "forward")) == times
  assert len(_programs(program.jaxpr, "backward")) == 1


def _programs(jaxpr, method):
  """The calls of one method of an implementation of attention, wherever they are."""
  found = []
  for equation in jaxpr.eqns:
    program = equation.params.get("program")
    if equation.primitive.name == "by_platform" and program.method == method:
      found.append(equation)
    for value in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr)
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        found += _programs(inner, method)
  return found


def test_remat_saves_memory():
  """Under the scan: XLA on CPU undoes the rematerialisation of unrolled layers."""
  record, x = decoder("magneto", 12), jnp.zeros((4, 64, WIDTH))

  def temporary_bytes(remat):
    module = stack(remat=remat)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), x, record))
    grad = jax.grad(lambda params, x: module.apply(params, x, record)[0].sum())
    return jax.jit(grad).lower(params, x).compile().memory_analysis().temp_size_in_bytes

  none, dots, full = (temporary_bytes(remat) for remat in ("none", "dots", "full"))
  assert full < dots < none
  assert full < 0.4 * none


def test_program_does_not_grow_with_depth():
  def size(layers):
    record = decoder("magneto", layers)
    params = jax.eval_shape(lambda: stack().init(jax.random.key(0), STREAM, record))
    grad = jax.grad(lambda params: stack().apply(params, STREAM, record)[0].sum())
    return len(jax.jit(grad).lower(params).as_text().splitlines())

  assert size(48) == size(12)


def test_layers_of_a_pattern_share_one_scan():
  """Memory and compile time follow the pattern, not the depth: one scan a segment."""
  pattern = Segment((layer_of("magneto"), layer_of("post_ln")), 5)
  record = of_segments(Segment((layer_of("post_ln"),), 3), pattern)
  params = jax.eval_shape(lambda: stack().init(jax.random.key(0), STREAM, record))["params"]
  assert set(params) == {"segment_0", "segment_1", "final_norm"}
  assert set(params["segment_1"]) == {"block_0", "block_1"}
  assert all(leaf.shape[0] == 5 for leaf in jax.tree.leaves(params["segment_1"]))
  assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(params["segment_0"]))


# ---------------------------------------------------------------------------------------------
# Dropout of whole branches
# ---------------------------------------------------------------------------------------------


def drop_path_kept(record, rate, samples):
  """Whether each layer's ffn branch was kept, [layers, samples], by a stack that adds powers of 4.

  Without norms, and with all parameters 0 but W_o's bias, layer l adds its bias 4^l to each sample
  that keeps the branch: the stream's digits in base 4 tell which layers were kept.
  """
  module = stack(drop_path_rate=rate)
  x = jnp.zeros((samples, 1, WIDTH))
  params = jax.tree.map(np.zeros_like, reference.random_params(module, x, record))
  depth, layer = record.num_layers, 0
  for i, segment in enumerate(record.segments):
    for repeat, j in itertools.product(range(segment.repeats), range(len(segment.pattern))):
      # What is kept is divided by its probability to be kept.
      value = 4.0**layer * (1 - rate * layer / (depth - 1))
      params[f"segment_{i}"][f"block_{j}"]["ffn"]["wo"]["bias"][repeat] = value
      layer += 1
  rngs = {"dropout": jax.random.key(3)}
  run = jax.jit(lambda: module.apply({"params": params}, x, record, deterministic=False, rngs=rngs))
  total = np.asarray(run()[0])[:, 0, 0]
  np.testing.assert_allclose(total, total.round(), rtol=1e-6)
  return np.stack([total.round() // 4**l % 4 for l in range(depth)])


BARE = replace_layer(
  dataclasses.replace(decoder("pre_ln", 4), final_norm=False),
  self_attention={"norms": frozenset()},
  ffn={"norms": frozenset()},
)
BARE_PATTERN = dataclasses.replace(
  BARE,
  segments=(Segment(BARE.segments[0].pattern, 1), Segment(BARE.segments[0].pattern * 2, 2)),
)


@pytest.mark.parametrize("record", (BARE, BARE_PATTERN), ids=("one segment", "pattern of two"))
def test_drop_path_is_linear_in_depth_and_a_sample(record):
  """Rates from 0 to 0.6, of 4096 samples: a frequency is off by less than 0.03."""
  kept = drop_path_kept(record, 0.6, 4096)
  assert set(np.unique(kept)) == {0, 1}
  np.testing.assert_allclose(kept.mean(1), np.linspace(1, 0.4, len(kept)), atol=0.03)
  # Layers are dropped independently: 1 / sqrt(4096) is 0.016.
  correlations = np.corrcoef(kept[1:])
  assert np.abs(correlations - np.eye(len(correlations))).max() < 0.07


def test_drop_path_drops_whole_samples():
  """The last layer has rate 1, is dropped in each sample, and the others keep the stream finite."""
  record = decoder("pre_ln", 2)
  module = stack(drop_path_rate=1.0)
  params = reference.random_params(module, STREAM, record)
  apply = jax.jit(
    lambda key: module.apply(
      {"params": params}, STREAM, record, deterministic=False, rngs={"dropout": key}
    )[0]
  )
  first = jax.tree.map(lambda leaf: leaf[:1], params["segment_0"])
  expected = reference.stack(
    {"segment_0": first, "final_norm": params["final_norm"]},
    STREAM,
    [(reference.pre_ln,)],
    final_norm=reference.layer_norm,
  )
  np.testing.assert_allclose(apply(jax.random.key(0)), expected, rtol=0, atol=1e-5)  # float32


@pytest.mark.parametrize("unroll", (1, -1))
def test_layers_drop_differently(unroll):
  """Dropout's keys are split over the scan: two equal layers do not drop the same channels."""
  bare = replace_layer(
    dataclasses.replace(decoder("pre_ln", 2), final_norm=False),
    self_attention={"norms": frozenset(), "branch": Scale(0.0)},
    ffn={"norms": frozenset()},
  )
  module = stack(dropout_rate=0.5, unroll=unroll)
  params = jax.tree.map(jnp.zeros_like, reference.random_params(module, STREAM, bare))
  ones = jnp.ones((2, WIDTH)) * jnp.asarray([[1.0], [3.0]])
  params["segment_0"]["block_0"]["ffn"]["wo"]["bias"] = ones
  rngs = {"dropout": jax.random.key(0)}
  x = jnp.zeros_like(STREAM)
  run = jax.jit(lambda: module.apply({"params": params}, x, bare, deterministic=False, rngs=rngs))
  y, *_ = run()
  # 2 [kept in the first] + 6 [kept in the second]: all four cases occur, each in about a quarter.
  values, counts = np.unique(np.asarray(y), return_counts=True)
  np.testing.assert_array_equal(values, [0.0, 2.0, 6.0, 8.0])
  assert counts.min() > 0.15 * y.size


# ---------------------------------------------------------------------------------------------
# Precision and errors
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPERS)
def test_bfloat16_stream_stays_bfloat16(name):
  """The scan's carry is the stream: between layers it is bfloat16, whatever the scales' dtype."""
  record = PAPERS[name][0]
  module = stack(dtype=jnp.bfloat16)
  x = STREAM.astype(jnp.bfloat16)
  params = jax.eval_shape(lambda: module.init(jax.random.key(0), x, record))
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
  program = jax.make_jaxpr(lambda params: module.apply(params, x, records.as_arrays(record)))(
    params
  )
  scans = [equation for equation in program.eqns if equation.primitive.name == "scan"]
  assert len(scans) == len(record.segments)
  for scan in scans:
    streams = [var.aval for var in scan.outvars if var.aval.shape == x.shape]
    assert [aval.dtype for aval in streams] == [jnp.bfloat16]
  assert program.out_avals[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", main_and_slow(RECIPES))
def test_bfloat16_is_near_float32(name):
  """bfloat16 has 8 bits, 0.4 %; through 2 layers of 2 sublayers an RMS error below 3 %."""
  record, layers, final_norm = PAPERS[name]
  record = records.as_arrays(record)
  module = stack(dtype=jnp.bfloat16, norm=record.norm)
  params = reference.random_params(module, STREAM, record)
  rounded, *_ = jax.jit(module.apply)({"params": params}, STREAM.astype(jnp.bfloat16), record)
  exact = reference.stack(params, STREAM, layers, final_norm=final_norm)
  error = np.asarray(rounded, np.float32) - exact
  assert np.sqrt(np.mean(error**2)) < 0.03 * exact.std()


def test_unknown_remat_raises():
  with pytest.raises(
    ValueError, match="remat='everything' must be one of none, dots, attention, full"
  ):
    jax.eval_shape(stack(remat="everything").init, jax.random.key(0), STREAM, decoder("pre_ln"))


def test_values_for_other_layers_raise():
  record = replace_layer(decoder("pre_ln", 3), ffn={"skip": Scale((1.0, 2.0))})
  with pytest.raises(ValueError, match="2 values for a segment of 3 repeats"):
    jax.eval_shape(lambda: stack().init(jax.random.key(0), STREAM, record))


def test_a_block_without_what_its_record_has_raises():
  recipe = RECIPES["magneto"](Architecture("encoder_decoder", 2, 2, WIDTH, FFN, HEADS))
  with pytest.raises(ValueError, match="this block has no cross_attention: the record is of an"):
    jax.eval_shape(stack().init, jax.random.key(0), STREAM, recipe.decoder)


def test_context_reaches_every_layer():
  """Segment ids of a token apart cut all attention: each token is then its own sequence."""
  record = decoder("magneto", 2)
  params = reference.random_params(stack(), STREAM, record)
  ids = jnp.arange(8)[None] * jnp.ones((2, 1), jnp.int32)
  apply = jax.jit(stack().apply)
  apart, *_ = apply({"params": params}, STREAM, record, Context(segment_ids=(ids, ids)))
  alone, *_ = apply({"params": params}, STREAM.reshape(16, 1, WIDTH), record)
  np.testing.assert_allclose(apart, alone.reshape(apart.shape), rtol=0, atol=1e-5)  # float32
