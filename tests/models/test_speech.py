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
from tests.models.common import SIZES, compiled, run

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


# ---------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------


def test_a_ctc_costs_the_sum_over_its_alignments():
  """Of all V^T paths of log_probs, those that the text is left of; float32."""
  model, params = ready("ctc")
  nats = run(model, params, *BATCH)
  assert nats.dtype == np.float32
  h, frames = run(model, params, *BATCH[:2], method="encode")
  assert frames.tolist() == VECTORS
  log_p = run(model, params, h, method="log_probs").astype(np.float64)
  for row in range(2):
    total = 0.0
    for path in itertools.product(range(VOCAB), repeat=frames[row]):
      said = [a for a, before in zip(path, (0, *path), strict=False) if a and a != before]
      if said == TEXTS[row, : LABELS[row]].tolist():
        total += np.exp(sum(log_p[row, t, a] for t, a in enumerate(path)))
    assert nats[row] == pytest.approx(-np.log(total), rel=1e-5)


@pytest.mark.parametrize("predicts", ["lstm", "stateless"])
def test_a_transducer_costs_the_sum_over_its_alignments(predicts):
  """By the predictor step by step and the joiner cell by cell, as decoders call them; float32."""
  model, params = ready("transducer", predicts=predicts)
  call = lambda method, *args: run(model, params, *args, method=method)
  nats = run(model, params, *BATCH)
  h, frames = call("encode", *BATCH[:2])
  e = call("project", h)
  np.testing.assert_allclose(run(model, params, *BATCH[:2]), e, rtol=0, atol=1e-5)
  state = model.init_predictor(3)
  steps = []
  for labels in (np.zeros(3, np.int32), *TEXTS.T):
    state, p = call("step", state, labels)
    steps.append(p)
  grid = e[:, :, None], np.stack(steps, 1)[:, None]
  log_p = call("join", *grid).astype(np.float64)
  np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-5)
  for row in range(2):
    text = TEXTS[row, : LABELS[row]]

    def probability(t, u, row=row, text=text):
      """Of all that may follow frame t after u labels."""
      if t == frames[row]:
        return float(u == len(text))
      p = np.exp(log_p[row, t, u])
      label = p[text[u]] * probability(t, u + 1) if u < len(text) else 0
      return label + p[0] * probability(t + 1, u)

    assert nats[row] == pytest.approx(-np.log(probability(0, 0)), rel=1e-5)


def test_a_decoder_costs_its_targets_and_the_end():
  """-log p of each, by logits of all at once and token by token with a state; float32."""
  model, params = ready("decoder")
  nats = run(model, params, *BATCH)
  h, frames = run(model, params, *BATCH[:2], method="encode")
  inputs = np.array([[1, 3, 4], [1, 2, 0], [1, 0, 0]])
  targets = np.array([[3, 4, 1], [2, 1, 0], [1, 0, 0]])
  memory = {"memory_BSD": h, "memory_mask_BS": np.asarray(frame_mask(frames, h.shape[1]))}
  logits = run(model, params, inputs, **memory, method="decode").astype(np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  for row in range(2):
    count = LABELS[row] + 1
    expected = -sum(log_p[row, u, targets[row, u]] for u in range(count))
    assert nats[row] == pytest.approx(expected, rel=1e-5)
  state = model.init_state(3, 3, h.shape[1])
  for u in range(3):
    given = memory if u == 0 else {}
    found, state = run(model, params, inputs[:, u : u + 1], state=state, **given, method="decode")
    np.testing.assert_allclose(found[:2, 0], logits[:2, u], rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
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

FRONT_ENDS = {"ctc": "conv", "transducer": "vgg", "decoder": "conv2d"}
CASES = [
  pytest.param(head, name, marks=() if name == "magneto" else pytest.mark.slow)
  for head in HEADS
  for name in common.PAPERS
]


@pytest.mark.parametrize(("head", "name"), CASES)
def test_padding_changes_neither_a_cost_nor_a_gradient(head, name):
  """Of sounds by noise, and of texts by any labels; float32. Each head with a front end."""
  model = built(head, name, subsampling=FRONT_ENDS[head])
  params = reference.random_params(model, *BATCH)

  @compiled
  def of(params, waves, texts):
    cost = lambda params: model.apply({"params": params}, waves, SAMPLES, texts, LABELS)
    nats, back = jax.vjp(cost, params)
    return nats, back(jnp.array([1.0, -0.5, 1.0]))[0]

  nats, gradient = of(params, *BATCH[::2])
  waves = np.random.default_rng(1).integers(-9000, 9000, (3, 1700)).astype(np.int16)
  for row, samples in enumerate(SAMPLES):
    waves[row, :samples] = BATCH[0][row, :samples]
  texts = np.array([[3, 4, 2, 2], [2, 3, 3, 1], [4, 4, 4, 4]])
  again, same = of(params, waves, texts)
  np.testing.assert_allclose(again, nats, rtol=1e-5, atol=1e-5)
  scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale), same, gradient
  )


@pytest.mark.parametrize(
  ("head", "name", "options"),
  [
    ("ctc", "magneto", {}),
    ("transducer", "magneto", {"ctc_weight": 0.3}),
    ("transducer", "magneto", {"predicts": "stateless", "subsampling": "vgg"}),
    ("decoder", "magneto", {"ctc_weight": 0.3, "subsampling": "conv2d"}),
    *(
      pytest.param(head, name, {}, marks=pytest.mark.slow)
      for head in HEADS
      for name in common.PAPERS
    ),
  ],
)
def test_every_parameter_has_a_gradient_at_the_start(head, name, options):
  """And a place on a mesh, by exactly one row of the table."""
  model = built(head, name, **options)
  params = compiled(model.init)(jax.random.key(0), *BATCH)["params"]

  @compiled
  def gradient(params):
    cost = lambda params: model.apply(
      {"params": params}, *BATCH, deterministic=False, rngs={"dropout": jax.random.key(0)}
    )
    return jax.grad(lambda params: jnp.sum(cost(params)))(params)

  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
    path = sharding.path_name(path)
    assert np.isfinite(leaf).all(), path
    sharding.parameter_axes(path)
    # A branch of ReZero starts at 0; keys' biases cancel in the softmax.
    if name != "rezero" and not path.endswith("key/bias"):
      assert np.abs(leaf).max() > 0, path


# ---------------------------------------------------------------------------------------------
# Training and evaluation
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS[1:])
def test_a_ctc_is_added_in_training_alone(head):
  """(1 - w) of the head's and w of the CTC's, where that has an alignment."""
  model, params = ready(head, ctc_weight=0.3)
  texts, lengths = np.array([[3, 4], [2, 2], [0, 0]]), np.array([2, 2, 0])
  samples = np.array([1240, 520, 150])  # Of the second, two vectors: too few for 2, blank, 2.
  batch = BATCH[0], samples, texts, lengths
  own = run(model, params, *batch)
  rngs = {"dropout": jax.random.key(0)}
  mixed = run(model, params, *batch, deterministic=False, rngs=rngs)
  ctc = built("ctc")
  params_of = {"encoder": params["encoder"], "ctc_head": params["ctc_head"]}
  of_ctc = run(ctc, params_of, *batch)
  assert mixed[0] == pytest.approx(0.7 * own[0] + 0.3 * of_ctc[0], rel=1e-5)
  assert mixed[1] == pytest.approx(own[1], rel=1e-6)
  without = {name: tree for name, tree in params.items() if name != "ctc_head"}
  np.testing.assert_array_equal(run(built(head), without, *batch), own)


def test_spectrograms_are_hidden_in_training_alone_by_the_key():
  model, params = ready("ctc", augment=AUGMENT)
  plain = run(built("ctc"), params, *BATCH)
  np.testing.assert_array_equal(run(model, params, *BATCH), plain)
  drawn = lambda seed: run(
    model, params, *BATCH, deterministic=False, rngs={"dropout": jax.random.key(seed)}
  )
  np.testing.assert_array_equal(drawn(0), drawn(0))
  assert any(np.abs(drawn(seed)[:2] - plain[:2]).max() > 1e-3 for seed in range(3))


def test_dropout_is_drawn_in_predictors_too():
  for kind in ("lstm", "stateless"):
    module = predictor(kind, dropout_rate=0.5)
    labels = np.array([[0, 3, 4]])
    params = reference.random_params(module, labels)
    plain = run(module, params, labels)
    drop = lambda seed, m=module, p=params, x=labels: run(
      m, p, x, deterministic=False, rngs={"dropout": jax.random.key(seed)}
    )
    np.testing.assert_array_equal(drop(0), drop(0))
    assert np.abs(drop(0) - plain).max() > 1e-3


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


def test_the_stack_starts_at_order_one_of_a_recipes_projection():
  """Of real sizes and white noise; so the recipe's first numbers are of the sizes they are for."""
  for subsampling in ("conv", "vgg", "conv2d"):
    recipe = common.recipe("deepscalelm").encoder
    encoder = Encoder(recipe=recipe, positions="none", **SIZES)
    model = SpeechEncoder(encoder=encoder, sample_rate=RATE, subsampling=subsampling)
    waves = np.random.default_rng(0).integers(-9000, 9000, (1, 4000)).astype(np.int16)
    init = compiled(
      lambda w, m=model: m.init_with_output(
        jax.random.key(0), w, jnp.array([4000]), return_hidden_states=True
      )[0]
    )
    _, frames, hidden = init(waves)
    assert 0.3 < np.mean(np.square(hidden[0, 0, : frames[0]])) < 4, subsampling


def test_streams_come_along():
  for head in HEADS:
    model, params = ready(head)
    nats, *streams = run(model, params, *BATCH, return_hidden_states=True)
    np.testing.assert_allclose(nats, run(model, params, *BATCH), rtol=1e-6)
    assert [s.shape[2] for s in streams] == ([4, 3] if head == "decoder" else [4])


def test_precisions():
  """float64 is kept, and half of a model's costs are float32."""
  for head in HEADS:
    model, params = ready(head)
    expected = run(model, params, *BATCH)
    with jax.enable_x64(True):
      waves = jnp.asarray(BATCH[0] / 2**15)
      wide = built(head, dtype=jnp.float64)
      of = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
      nats = run(wide, of, waves, *map(jnp.asarray, BATCH[1:]))
    assert nats.dtype == np.float64
    np.testing.assert_allclose(nats, expected, rtol=1e-4, atol=1e-4)
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
