"""Models of speech: their costs against all alignments, their steps, and what padding changes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax import sharding
from magneto_jax.layers import SpecAugment
from magneto_jax.layers.log_mel import frame_mask
from magneto_jax.models import (
  CausalLM,
  CTCRecognizer,
  Encoder,
  LSTMPredictor,
  SpeechEncoder,
  SpeechToText,
  StatelessPredictor,
  Transducer,
)
from tests import reference
from tests.models import common
from tests.models.common import SIZES, WIDTH, compiled, run

VOCAB, RATE, BINS = 5, 8000, 9
# Vectors: 4, 3, none; labels: as many as there is an alignment for.
SAMPLES, LABELS = np.array([1240, 1000, 150]), np.array([2, 1, 0])
TEXTS = np.array([[3, 4], [2, 0], [0, 0]])
VECTORS = [4, 3, 0]
AUGMENT = SpecAugment(1, 5, time_masks=1, time_width=6)
HEADS = ("ctc", "transducer", "decoder")


def sounds(length=1240):
  waves = np.random.default_rng(0).integers(-9000, 9000, (3, length)).astype(np.int16)
  return np.where(np.arange(length)[None] < SAMPLES[:, None], waves, 0).astype(np.int16)


def predictor(kind="lstm", **options):
  if kind == "lstm":
    return LSTMPredictor(vocab_size=VOCAB, width=6, layers=2, **options)
  return StatelessPredictor(vocab_size=VOCAB, width=6, **options)


def built(head, name="magneto", *, predicts="lstm", subsampling="conv", augment=None, **options):
  """A small model of a recipe."""
  dtype = options.pop("dtype", jnp.float32)
  sizes = SIZES | {"max_length": 64, "dtype": dtype}
  sizes["dropout_rate"] = options.pop("dropout_rate", 0.0)
  recipe = common.recipe(name, "encoder_decoder" if head == "decoder" else "encoder")
  encoder = SpeechEncoder(
    encoder=Encoder(recipe=recipe.encoder, **sizes),
    sample_rate=RATE,
    mel_bins=BINS,
    subsampling=subsampling,
    augment=augment,
  )
  if head == "ctc":
    return CTCRecognizer(encoder=encoder, vocab_size=VOCAB)
  if head == "transducer":
    return Transducer(
      encoder=encoder, predictor=predictor(predicts, dtype=dtype), joint_width=8, **options
    )
  decoder = CausalLM(recipe=recipe.decoder, vocab_size=VOCAB, **sizes)
  return SpeechToText(encoder=encoder, decoder=decoder, end_id=1, **options)


BATCH = (sounds(), SAMPLES, TEXTS, LABELS)


@functools.lru_cache
def ready(head, **options):
  """A model and random parameters."""
  model = built(head, **options)
  return model, reference.random_params(model, *BATCH)


def wide(tree):
  """As float64, and integers as they are; within `enable_x64` alone."""
  is_float = lambda x: np.issubdtype(x.dtype, np.floating)
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64 if is_float(x) else None), tree)


def methods(head, **options):
  """Costs, and `call(method, *args)`, of a model in float64; within `enable_x64` alone."""
  model, params = ready(head, **options)
  model, params = built(head, dtype=jnp.float64, **options), wide(params)
  call = lambda method, *args, **kwargs: run(model, params, *args, method=method, **kwargs)
  waves, *others = BATCH
  batch = jnp.asarray(waves / 2**15), *map(jnp.asarray, others)
  nats = call(None, *batch)
  assert nats.dtype == np.float64
  return nats, call, batch


# ---------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------


def test_a_ctc_costs_the_sum_over_its_alignments():
  """Of all V^T paths of log_probs, those that the text is left of; float64, 1e-10."""
  with jax.enable_x64(True):
    nats, call, batch = methods("ctc")
    h, frames = call("encode", *batch[:2])
    log_p = call("log_probs", h)
  assert frames.tolist() == VECTORS
  for row in range(2):
    total = 0.0
    for path in itertools.product(range(VOCAB), repeat=frames[row]):
      said = [a for a, before in zip(path, (0, *path), strict=False) if a and a != before]
      if said == TEXTS[row, : LABELS[row]].tolist():
        total += np.exp(sum(log_p[row, t, a] for t, a in enumerate(path)))
    assert nats[row] == pytest.approx(-np.log(total), rel=1e-10)


@pytest.mark.parametrize("predicts", ["lstm", "stateless"])
def test_a_transducer_costs_the_sum_over_its_alignments(predicts):
  """By the predictor step by step and the joiner cell by cell, as decoders call them; 1e-10."""
  with jax.enable_x64(True):
    nats, call, batch = methods("transducer", predicts=predicts)
    h, frames = call("encode", *batch[:2])
    e = call("project", h)
    state, steps = ready("transducer", predicts=predicts)[0].init_predictor(3), []
    for labels in (np.zeros(3, np.int32), *TEXTS.T):
      p, state = call("predict", wide(state), jnp.asarray(labels))
      steps.append(p)
    logits = call("join", jnp.asarray(e)[:, :, None], jnp.asarray(np.stack(steps, 1))[:, None])
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  for row in range(2):
    text = TEXTS[row, : LABELS[row]]

    def probability(t, u, row=row, text=text):
      """Of all that may follow vector t after u labels."""
      if t == frames[row]:
        return float(u == len(text))
      p = np.exp(log_p[row, t, u])
      label = p[text[u]] * probability(t, u + 1) if u < len(text) else 0
      return label + p[0] * probability(t + 1, u)

    assert nats[row] == pytest.approx(-np.log(probability(0, 0)), rel=1e-10)


def test_a_decoder_costs_its_targets_and_the_end():
  """-log p of each, by the logits that decoding gives with a state, in two parts; 1e-10."""
  inputs = np.array([[1, 3, 4], [1, 2, 0], [1, 0, 0]])
  targets = np.array([[3, 4, 1], [2, 1, 0], [1, 0, 0]])
  with jax.enable_x64(True):
    nats, call, batch = methods("decoder")
    h, frames = map(jnp.asarray, call("encode", *batch[:2]))
    memory = {"memory_BSD": h, "memory_mask_BS": frame_mask(frames, h.shape[1])}
    state = built("decoder", dtype=jnp.float64).init_state(3, 3, h.shape[1])
    first, state = call("decode", jnp.asarray(inputs[:, :1]), **memory, state=state)
    others, _ = call("decode", jnp.asarray(inputs[:, 1:]), state=jax.tree.map(jnp.asarray, state))
  logits = np.concatenate([first, others], axis=1)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  for row in range(2):
    places = range(LABELS[row] + 1)
    expected = -sum(log_p[row, u, targets[row, u]] for u in places)
    assert nats[row] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("head", common.main_and_slow(HEADS, ("ctc",)))
def test_what_cannot_be_scored_costs_nothing_and_sends_no_gradient(head):
  """A sound too short for a vector; for a CTC a text too long, too: its own part is the rest's."""
  model, params = ready(head)
  texts = np.array([[3, 3], [2, 0], [4, 0]])
  lengths = np.array([2, 1, 1])
  samples = SAMPLES.copy()
  samples[0] = 520  # Two vectors, of the three that a label twice needs.
  scored = model.is_scored(samples, texts, lengths)
  assert scored.tolist() == [head != "ctc", True, False]

  @compiled
  def of(params, waves):
    cost = lambda params: model.apply({"params": params}, waves, samples, texts, lengths)
    nats, back = jax.vjp(cost, params)
    return nats, back(jnp.ones(3))[0]

  nats, gradient = of(params, BATCH[0])
  assert (np.asarray(nats) > 0).tolist() == np.asarray(scored).tolist()
  assert nats[~np.asarray(scored)].tolist() == [0.0] * int((~np.asarray(scored)).sum())
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
  other = BATCH[0].copy()
  other[2] = 77
  again, same = of(params, other)
  np.testing.assert_array_equal(again, nats)
  jax.tree.map(np.testing.assert_array_equal, same, gradient)


# ---------------------------------------------------------------------------------------------
# Padding, gradients, recipes
# ---------------------------------------------------------------------------------------------

MAIN = {("transducer", "magneto")}
FRONT_ENDS = {"ctc": "conv", "transducer": "vgg", "decoder": "conv2d"}
CASES = [
  pytest.param(head, name, marks=() if (head, name) in MAIN else pytest.mark.slow)
  for head in HEADS
  for name in common.PAPERS
]


@pytest.mark.parametrize(("head", "name"), CASES)
def test_padding_changes_neither_a_cost_nor_a_gradient(head, name):
  """Of sounds by noise, and of texts by any numbers; float32. And no parameter is without one."""
  options = {} if head == "ctc" else {"ctc_weight": 0.3}
  model = built(head, name, subsampling=FRONT_ENDS[head], **options)
  params = reference.random_params(model, *BATCH)

  @compiled
  def of(params, waves, texts):
    training = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}
    cost = lambda params: model.apply({"params": params}, waves, SAMPLES, texts, LABELS, **training)
    nats, back = jax.vjp(cost, params)
    return nats, back(jnp.array([1.0, -0.5, 1.0]))[0]

  nats, gradient = of(params, *BATCH[::2])
  waves = np.random.default_rng(1).integers(-9000, 9000, (3, 1700)).astype(np.int16)
  for row, samples in enumerate(SAMPLES):
    waves[row, :samples] = BATCH[0][row, :samples]
  texts = np.array([[3, 4, 2, 99], [2, 3, -1, 1], [4, 99, 4, 4]])
  again, same = of(params, waves, texts)
  np.testing.assert_allclose(again, nats, rtol=1e-5, atol=1e-5)
  assert nats[2] == again[2] == 0
  scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale), same, gradient
  )
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    path = sharding.path_name(path)
    # Keys' biases cancel in the softmax.
    assert np.abs(leaf).max() > 1e-6 * scale or path.endswith("key/bias"), path


WAYS = (
  ("ctc", {}),
  ("transducer", {"ctc_weight": 0.3}),
  ("transducer", {"predicts": "stateless", "subsampling": "vgg"}),
  ("decoder", {"ctc_weight": 0.3, "subsampling": "conv2d"}),
)


@pytest.mark.parametrize(("head", "options"), WAYS)
def test_every_parameter_has_a_place_on_a_mesh(head, options):
  """By exactly one row of the table."""
  params = jax.eval_shape(built(head, **options).init, jax.random.key(0), *BATCH)["params"]
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    assert len(sharding.parameter_axes(sharding.path_name(path))) <= leaf.ndim


# ---------------------------------------------------------------------------------------------
# Training and evaluation
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", common.main_and_slow(HEADS[1:], ("transducer",)))
def test_a_ctc_is_added_in_training_alone(head):
  """(1 - w) of the head's and w of the CTC's, where that has an alignment."""
  model, params = ready(head, ctc_weight=0.3)
  texts, lengths = np.array([[3, 4], [2, 2], [0, 0]]), np.array([2, 2, 0])
  samples = np.array([1240, 520, 150])  # Of the second, two vectors: too few for 2, blank, 2.
  batch = BATCH[0], samples, texts, lengths
  without = {name: tree for name, tree in params.items() if name != "ctc_head"}
  of_ctc = {name: params[name] for name in ("encoder", "ctc_head")}

  @compiled
  def costs():
    training = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}
    return (
      model.apply({"params": params}, *batch),
      model.apply({"params": params}, *batch, **training),
      built(head).apply({"params": without}, *batch),
      built("ctc").apply({"params": of_ctc}, *batch),
    )

  evaluated, trained, own, ctc = map(np.asarray, costs())
  np.testing.assert_allclose(evaluated, own, rtol=1e-6)
  assert trained[0] == pytest.approx(0.7 * own[0] + 0.3 * ctc[0], rel=1e-5)
  assert trained[1] == pytest.approx(own[1], rel=1e-5) and ctc[1] == 0


def test_spectrograms_are_hidden_in_training_alone_by_the_key():
  model, params = ready("ctc", augment=AUGMENT)
  apply = compiled(
    lambda key, deterministic: model.apply(
      {"params": params}, *BATCH, deterministic=deterministic, rngs={"dropout": key}
    ),
    static_argnums=1,
  )
  plain = apply(jax.random.key(0), True)
  np.testing.assert_allclose(plain, run(*ready("ctc"), *BATCH), rtol=1e-6)
  drawn = lambda seed: apply(jax.random.key(seed), False)
  np.testing.assert_array_equal(drawn(0), drawn(0))
  assert any(np.abs(drawn(seed)[:2] - plain[:2]).max() > 1e-3 for seed in range(3))


def test_dropout_is_drawn_in_predictors_too():
  for kind in ("lstm", "stateless"):
    module = predictor(kind, dropout_rate=0.5)
    labels = np.array([[0, 3, 4]])
    params = reference.random_params(module, labels)
    drop = compiled(
      lambda key, m=module, p=params, x=labels: m.apply(
        {"params": p}, x, deterministic=False, rngs={"dropout": key}
      )
    )
    first = drop(jax.random.key(0))
    np.testing.assert_array_equal(drop(jax.random.key(0)), first)
    assert np.abs(drop(jax.random.key(1)) - first).max() > 1e-3


# ---------------------------------------------------------------------------------------------
# Predictors and the encoder
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lstm", "stateless"])
def test_a_predictor_by_steps_is_the_whole_at_once(kind):
  """In float64, 1e-12; and a label changes nothing before it."""
  module = predictor(kind, dtype=jnp.float64)
  labels = np.array([[0, 3, 4, 1, 2], [0, 0, 2, 2, 4]])
  whole, params = common.in_float64(module, labels)
  with jax.enable_x64(True):
    state = module.init_state(2)
    step = jax.jit(lambda *a: module.apply({"params": params}, *a, method="step"))
    for u in range(5):
      state, g = step(state, jnp.asarray(labels[:, u]))
      np.testing.assert_allclose(g, whole[:, u], rtol=0, atol=1e-12)
    other = labels.copy()
    other[:, 3] = 3
    changed = run(module, params, jnp.asarray(other))
  np.testing.assert_array_equal(changed[:, :3], whole[:, :3])
  assert np.abs(changed[:, 3] - whole[:, 3]).max() > 1e-3
  assert np.abs(changed[:, 4] - whole[:, 4]).max() > 1e-3


def test_a_stateless_predictor_reads_two_labels_and_blanks_before_them():
  module = predictor("stateless")
  labels = np.array([[0, 3, 4]])
  params = reference.random_params(module, labels)
  table = params["token_embedding"]["embedding"]
  expected = [np.concatenate([table[a], table[b]]) for a, b in ((0, 0), (0, 3), (3, 4))]
  np.testing.assert_allclose(run(module, params, labels)[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("subsampling", "samples", "vectors"),
  [("conv", 16000, 25), ("vgg", 16000, 24), ("conv2d", 16000, 23), ("conv", 399, 0)],
)
def test_an_encoder_says_how_many_vectors_a_sound_becomes(subsampling, samples, vectors):
  """Of a second at 16 kHz, as published; of an integer and of integers."""
  encoder = built("ctc", subsampling=subsampling).encoder.clone(sample_rate=16000)
  assert encoder.lengths(samples) == vectors
  assert encoder.lengths(np.array([samples, 0])).tolist() == [vectors, 0]


@pytest.mark.parametrize("subsampling", common.main_and_slow(FRONT_ENDS.values(), ("vgg",)))
def test_the_stack_starts_at_order_one_of_a_recipes_projection(subsampling):
  """Of real sizes and white noise; so the recipe's first numbers are of the sizes they are for."""
  encoder = Encoder(recipe=common.recipe("deepscalelm").encoder, positions="none", **SIZES)
  model = SpeechEncoder(encoder=encoder, sample_rate=RATE, subsampling=subsampling)
  waves = np.random.default_rng(0).integers(-9000, 9000, (1, 4000)).astype(np.int16)
  start = lambda waves: model.init_with_output(
    jax.random.key(0), waves, jnp.array([4000]), return_hidden_states=True
  )[0]
  _, frames, hidden = compiled(start)(waves)
  assert 0.3 < np.mean(np.square(hidden[0, 0, : frames[0]])) < 4


def test_streams_come_along():
  model, params = ready("decoder")
  nats, *streams = run(model, params, *BATCH, return_hidden_states=True)
  assert nats.shape == (3,)
  assert [s.shape for s in streams] == [(3, 3, 4, WIDTH), (3, 3, 3, WIDTH)]
  for head in HEADS[:2]:
    model, params = ready(head)
    apply = lambda m=model, p=params: m.apply({"params": p}, *BATCH, return_hidden_states=True)
    nats, stream = jax.eval_shape(apply)
    assert nats.shape == (3,) and stream.shape == (3, 3, 4, WIDTH)


def test_without_targets_comes_what_is_scored():
  for head, width in (("ctc", VOCAB), ("transducer", 8)):
    model, params = ready(head)
    shapes = jax.eval_shape(lambda m=model, p=params: m.apply({"params": p}, *BATCH[:2]))
    assert (shapes.shape, shapes.dtype) == ((3, 4, width), jnp.float32)


def test_costs_of_half_precision_are_in_full():
  for head in HEADS:
    half = built(head, dtype=jnp.bfloat16)
    init = lambda m=half: m.init_with_output(jax.random.key(0), *BATCH)[0]
    assert jax.eval_shape(init).dtype == jnp.float32


TOO_FAST = built("ctc", subsampling="vgg").encoder.clone(sample_rate=48000)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: built("ctc", subsampling="vg"), "subsampling='vg' must be one of conv, vgg, conv2d"),
    (lambda: CTCRecognizer(encoder=TOO_FAST, vocab_size=9), "1240 samples at 48000 .* too short"),
    (lambda: built("transducer").clone(predictor=predictor().clone(layers=0)), "layers=0 must be"),
    (
      lambda: built("transducer").clone(predictor=predictor("stateless").clone(context=0)),
      "context=0 must be at least 1",
    ),
  ],
)
def test_a_model_that_cannot_be_raises(make, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: make().init(jax.random.key(0), *BATCH))
