"""Probes of the stream and of its gradient, beside sums over all pairs and a model taken apart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from magneto_jax import diagnostics
from magneto_jax.layers import probes
from magneto_jax.layers.residual import Residual
from magneto_jax.models import BEiT3, CausalLM, Encoder, EncoderDecoder
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import Architecture, Scale, Segment, Stack, Sublayer
from tests.models import common
from tests.models.common import SIZES, VOCAB, WIDTH, compiled

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 5)).astype(np.int32)


def brute_force(x):
  """The definition, pair by pair, in float64."""
  x = np.asarray(x, np.float64).reshape(len(x), -1, x.shape[-1])
  batch, tokens, _ = x.shape
  pairs = [
    np.mean(x[b, i] * x[b, j])
    for b in range(batch)
    for i in range(tokens)
    for j in range(tokens)
    if i != j
  ]
  covariance = np.mean(pairs) if pairs else 0.0
  return np.array([np.mean(x**2), covariance, np.max(np.abs(x)), tokens])


# ---------------------------------------------------------------------------------------------
# The statistics
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "shape", [(3, 4, 5), (1, 7, 2), (2, 3, 4, 5), (2, 1, 6), (4, 6), (1, 2, 1)]
)
def test_statistics_are_sums_over_all_pairs(shape):
  """Of tokens on one axis or several, or of a single one, whose covariance is 0; float32: 1e-5."""
  x = np.random.default_rng(1).standard_normal(shape).astype(np.float32) + 0.5
  s = np.asarray(jax.jit(probes.statistics)(x))
  assert (s.shape, s.dtype) == ((len(probes.FIELDS),), np.float32)
  np.testing.assert_allclose(s, brute_force(x), rtol=1e-5, atol=1e-6)


def test_means_are_not_removed():
  """Equal tokens are fully correlated, whatever their mean; opposite ones inversely."""
  x = np.full((2, 4, 3), 2.0, np.float32)
  np.testing.assert_allclose(probes.statistics(x), [4, 4, 2, 4])
  x[:, ::2] *= -1
  np.testing.assert_allclose(probes.statistics(x), [4, -4 / 3, 2, 4], rtol=1e-6)


@pytest.mark.parametrize("dtype", (jnp.float16, jnp.bfloat16))
def test_statistics_of_half_precision_are_of_float32(dtype):
  """The square of 1000 is not a float16, the sum of 512 ones is not a bfloat16's."""
  x = jnp.full((1, 512, 2), 1000.0, dtype)
  s = probes.statistics(x)
  assert s.dtype == jnp.float32
  np.testing.assert_allclose(s, [1e6, 1e6, 1000, 512], rtol=1e-6)


@pytest.mark.parametrize("value", (np.nan, np.inf))
def test_what_is_not_finite_is_seen(value):
  x = np.ones((1, 3, 2), np.float32)
  x[0, 1, 1] = value
  s = np.asarray(probes.statistics(x))
  assert not np.isfinite(s[0]) and not np.isfinite(s[2])


# ---------------------------------------------------------------------------------------------
# One residual
# ---------------------------------------------------------------------------------------------

X = np.random.default_rng(2).standard_normal((2, 3, 4)).astype(np.float32)


def f(h):
  return jnp.tanh(h), None


def test_the_sum_is_taken_before_the_norm_and_the_gradient_behind_it():
  sublayer = Sublayer(frozenset({"post"}), skip=Scale(3.0), branch=Scale(0.5))
  module = Residual()
  params = module.init(jax.random.key(0), X, f, sublayer)["params"]
  c = np.random.default_rng(3).standard_normal(X.shape).astype(np.float32)

  def loss(probe):
    variables = {"params": params, probes.GRADIENT: {"out": probe}}
    (y, _), taken = module.apply(variables, X, f, sublayer, mutable=[probes.STREAM])
    return jnp.sum(c * y**2), (y, taken)

  gradient, (y, taken) = jax.grad(loss, has_aux=True)(jnp.zeros(len(probes.FIELDS)))
  np.testing.assert_allclose(
    taken[probes.STREAM]["sum"], brute_force(3 * X + 0.5 * np.tanh(X)), rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(gradient, brute_force(2 * c * np.asarray(y)), rtol=1e-5, atol=1e-6)


def test_a_probe_does_not_change_what_it_reads():
  """Its value is ignored, and the gradient passes through it bit by bit."""
  module, sublayer = Residual(), Sublayer(frozenset({"in"}))
  params = module.init(jax.random.key(0), X, f, sublayer)["params"]

  def output(x, variables):
    return module.apply({"params": params, **variables}, x, f, sublayer)[0]

  @compiled
  def both(x, variables):
    y, back = jax.vjp(lambda x: output(x, variables), x)
    return y, back(jnp.cos(y))[0]

  probed = {probes.GRADIENT: {"out": jnp.full(len(probes.FIELDS), 7.0)}}
  for bare, seen in zip(both(X, {}), both(X, probed), strict=True):
    np.testing.assert_array_equal(bare, seen)


class Loop(nn.Module):
  """A scan of somebody else's, which knows nothing of the collections."""

  @nn.compact
  def __call__(self, x):
    class Step(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        return Residual(name="residual")(x, f, Sublayer(frozenset({"in"})))[0], None

    scan = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return scan(name="steps")(x, None)[0]


def test_a_scan_that_does_not_know_the_probes_works_with_and_without_them():
  module = Loop()
  variables = module.init(jax.random.key(0), X)
  assert set(variables) == {"params"}
  bare = module.apply(variables, X)
  seen, taken = module.apply(variables, X, mutable=list(probes.COLLECTIONS))
  np.testing.assert_array_equal(bare, seen)
  assert not jax.tree.leaves(taken)


# ---------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------


def two_by_three(name="magneto", kind="encoder") -> Stack:
  """Two different layers, three times: six layers, each with a number of its own."""
  (segment,) = getattr(common.recipe(name, kind, layers=6), kind).segments
  (layer,) = segment.pattern

  def scaled(first):
    values = tuple(first + 0.5 * i for i in range(3))
    ffn = dataclasses.replace(layer.ffn, branch=Scale(values), skip=Scale(1 + 0.1 * first))
    return dataclasses.replace(layer, ffn=ffn)

  stack = getattr(common.recipe(name, kind, layers=6), kind)
  return dataclasses.replace(stack, segments=(Segment((scaled(0.5), scaled(2.0)), 3),))


@functools.cache
def encoder(unroll=1, remat="none", dtype=jnp.float32, name="magneto") -> Encoder:
  return Encoder(
    recipe=two_by_three(name),
    vocab_size=VOCAB,
    positions="rotary",
    unroll=unroll,
    remat=remat,
    dtype=dtype,
    **SIZES,
  )


def weighted(y):
  """A loss whose gradient differs from token to token."""
  y = y.astype(jnp.float32)
  return jnp.sum(jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape) * y**2)


@functools.cache
def params_of(name="magneto"):
  return compiled(encoder(name=name).init)(jax.random.key(0), TOKENS)["params"]


@functools.cache
def plain():
  return taken(encoder(), params_of(), TOKENS)


def taken(model, params, *args, loss=weighted, **kwargs):
  """The collections of probes of one pass without dropout."""
  call = diagnostics.Call(args, kwargs, loss, jax.random.key(0))
  return compiled(lambda params: diagnostics.statistics(model, params, call))(params)


def true_gradients(model, params, loss=weighted):
  """The loss's gradient with respect to the stream [L + 1, B, T, D], layer by layer.

  The model is cut at each layer: the rest of it, a stack of the layers that are left, takes the
  stream as its embeddings.
  """
  stack = model.recipe
  layers = stack.layers
  blocks = len(stack.segments[0].pattern)
  tree = params["stack"]
  hidden = model.apply({"params": params}, TOKENS, return_hidden_states=True)[1]

  def rest(x, start):
    own = {"final_norm": tree["final_norm"]} if "final_norm" in tree else {}
    for i in range(start, len(layers)):
      take = lambda leaf, i=i: leaf[i // blocks][None]
      block = jax.tree.map(take, tree["segment_0"][f"block_{i % blocks}"])
      own[f"segment_{i - start}"] = {"block_0": block}
    segments = tuple(Segment((layer,), 1) for layer in layers[start:])
    # Without embedding norm or positions added, embeddings are the stream.
    part = Encoder(
      recipe=dataclasses.replace(stack, segments=segments),
      positions="rotary",
      dtype=model.dtype,
      **SIZES,
    )
    return part.apply({"params": {"stack": own}}, embeddings_BTD=x)

  gradients = [jax.grad(lambda x, i=i: loss(rest(x, i)))(hidden[i]) for i in range(len(layers))]
  last = lambda x: loss(common_norm(tree["final_norm"], x) if "final_norm" in tree else x)
  return [*gradients, jax.grad(last)(hidden[-1])]


def common_norm(p, x):
  return nn.LayerNorm(epsilon=1e-5).apply({"params": p}, x)


def test_each_layer_has_the_statistics_of_its_own_gradient(monkeypatch):
  """Beside gradients with respect to numbers that are added to the stream; 1e-4."""
  model, params = encoder(), params_of()
  _, gradient = plain()
  measured = diagnostics.layers_of(gradient["stack"], model.recipe, "out")
  monkeypatch.setattr(probes, "_probed", lambda x, added: x + added)
  full = jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape[:-1], *TOKENS.shape, WIDTH)), gradient)
  loss = lambda added: weighted(model.apply({"params": params, probes.GRADIENT: added}, TOKENS))
  true = compiled(jax.grad(loss))(full)["stack"]
  blocks = [true["segment_0"][f"block_{i}"]["ffn_residual"]["out"] for i in range(2)]
  in_order = [true["input"], *(blocks[i % 2][i // 2] for i in range(6))]
  expected = np.stack([brute_force(g) for g in in_order])
  np.testing.assert_allclose(measured, expected, rtol=1e-4, atol=1e-4 * expected[:, :1].min())
  assert len(set(measured[:, 0])) == 7


def test_each_layer_has_the_statistics_of_its_own_stream():
  """Six layers of a pattern of two, in their order; without a norm post the sum is the stream."""
  model, params = encoder(), params_of()
  stream, _ = plain()
  run = lambda params: model.apply({"params": params}, TOKENS, return_hidden_states=True)[1]
  expected = np.stack([brute_force(x) for x in compiled(run)(params)])
  measured = diagnostics.layers_of(stream["stack"], model.recipe, "sum")
  np.testing.assert_allclose(measured, expected, rtol=1e-4, atol=1e-5)
  assert len(set(measured[:, 0])) == 7


@pytest.mark.slow
@pytest.mark.parametrize("name", ("magneto", "deepnet"))
def test_gradients_are_those_of_a_model_cut_at_each_layer(name):
  model, params = encoder(name=name), params_of(name)
  _, gradient = taken(model, params, TOKENS)
  measured = diagnostics.layers_of(gradient["stack"], model.recipe, "out")
  expected = np.stack([brute_force(g) for g in true_gradients(model, params)])
  np.testing.assert_allclose(measured, expected, rtol=1e-4, atol=1e-4 * expected[:, :1].min())


@pytest.mark.parametrize(
  "options",
  [
    pytest.param({"remat": "full"}, marks=pytest.mark.slow),
    pytest.param({"remat": "full", "unroll": -1}, marks=pytest.mark.slow),
    pytest.param({"unroll": -1}, marks=pytest.mark.slow),
    pytest.param({"remat": "dots", "unroll": 2}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_scan_and_recomputation_give_the_same_statistics(options):
  other = taken(encoder(**options), params_of(), TOKENS)
  assert jax.tree.structure(plain()) == jax.tree.structure(other)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, plain(), other)


@pytest.mark.slow
def test_bfloat16_is_measured_in_float32_and_near_it():
  """3 % of a second moment: bfloat16's own rounding, through six layers."""
  other = taken(encoder(dtype=jnp.bfloat16), params_of(), TOKENS)
  for a, b in zip(jax.tree.leaves(plain()), jax.tree.leaves(other), strict=True):
    assert b.dtype == jnp.float32
    np.testing.assert_allclose(a[..., 0], b[..., 0], rtol=0.03)


def test_probes_leave_no_trace_in_init_output_and_gradient():
  """Bit by bit, dropout too."""
  model = encoder()
  assert set(jax.eval_shape(model.init, jax.random.key(0), TOKENS)) == {"params"}
  params = params_of()
  shapes = jax.eval_shape(
    lambda: model.apply({"params": params}, TOKENS, mutable=[probes.GRADIENT])[1]
  )
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

  @functools.partial(compiled, static_argnames="mutable")
  def run(params, variables, mutable=False):
    def loss(params):
      y = model.apply({"params": params, **variables}, TOKENS, mutable=mutable)
      y = y[0] if mutable else y
      return weighted(y), y

    return jax.grad(loss, has_aux=True)(params)

  bare = run(params, {})
  seen = run(params, zeros, mutable=probes.STREAM)
  jax.tree.map(np.testing.assert_array_equal, bare, seen)


@pytest.mark.slow
def test_an_encoder_decoder_is_probed_in_both_stacks():
  """The encoder's gradient is what arrives through the memory: moving its stream moves the loss."""
  architecture = Architecture("encoder_decoder", 2, 3, width=WIDTH, ffn_width=32, heads=2)
  recipe = RECIPES["pre_ln"](architecture)
  own = {"vocab_size": VOCAB, "positions": "rotary"} | SIZES
  model = EncoderDecoder(
    encoder=Encoder(recipe=recipe.encoder, **own), decoder=CausalLM(recipe=recipe.decoder, **own)
  )
  source = TOKENS[:, ::-1].copy()
  params = compiled(model.init)(jax.random.key(0), source, TOKENS)["params"]
  stream, gradient = taken(model, params, source, TOKENS)
  encode = functools.partial(model.apply, return_hidden_states=True, method="encode")
  _, hidden = compiled(encode)({"params": params}, source)
  np.testing.assert_allclose(
    diagnostics.layers_of(stream["encoder"]["stack"], recipe.encoder, "sum"),
    [brute_force(x) for x in hidden],
    rtol=1e-4,
    atol=1e-5,
  )

  def loss(x):
    memory = common_norm(params["encoder"]["stack"]["final_norm"], x)
    logits = model.apply({"params": params}, TOKENS, memory_BSD=memory, method="decode")
    return weighted(logits)

  expected = brute_force(compiled(jax.grad(loss))(hidden[-1]))
  last = diagnostics.layers_of(gradient["encoder"]["stack"], recipe.encoder, "out")[-1]
  np.testing.assert_allclose(last, expected, rtol=1e-4, atol=1e-4 * expected[0])
  decoder = diagnostics.layers_of(gradient["decoder"]["stack"], recipe.decoder, "out")
  assert decoder.shape == (4, 4) and np.all(decoder[:, 0] > 0)


@pytest.mark.slow
def test_a_multiway_encoder_is_probed_over_all_its_tokens():
  """BEiT-3: the class token, the patches and the text together."""
  experts = {"experts": ("vision", "text"), "positions": "none"}
  model = BEiT3(
    encoder=Encoder(recipe=common.recipe().encoder, **SIZES, **experts),
    vocab_size=VOCAB,
    num_patches=4,
    patch_size=2,
    max_text_length=5,
  )
  images = np.random.default_rng(4).standard_normal((2, 4, 4, 3)).astype(np.float32)
  params = compiled(model.init)(jax.random.key(0), images, TOKENS)["params"]
  stream, gradient = taken(model, params, images, TOKENS)
  _, hidden = compiled(
    lambda params: model.apply({"params": params}, images, TOKENS, return_hidden_states=True)
  )(params)
  measured = diagnostics.layers_of(stream["encoder"]["stack"], model.encoder.recipe, "sum")
  np.testing.assert_allclose(measured, [brute_force(x) for x in hidden], rtol=1e-4, atol=1e-5)
  assert measured[0, 3] == 1 + 4 + 5
  out = diagnostics.layers_of(gradient["encoder"]["stack"], model.encoder.recipe, "out")
  assert np.all(out[:, 0] > 0)
