"""Language models that are given targets: what the logits say of them, in place of the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from magneto_jax.models import BEiT3, MaskedBEiT3
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.encoder_decoder import EncoderDecoder
from magneto_jax.models.language import CausalLM, MaskedLM
from tests import reference
from tests.models.common import SIZES, VOCAB, compiled, recipe

RNG = np.random.default_rng(0)
TOKENS, SOURCE = RNG.integers(0, VOCAB, (2, 2, 6))
TARGETS = RNG.integers(0, VOCAB, (2, 6)).astype(np.int32)


def encoder(kind="encoder", **fields):
  both = {"kind": kind, "layers": 1}
  sizes = SIZES | {"vocab_size": VOCAB} | fields
  return Encoder(recipe=recipe("pre_ln", **both).encoder, **sizes)


def decoder(kind="decoder", **fields):
  both = {"kind": kind, "layers": 1}
  return CausalLM(recipe=recipe("pre_ln", **both).decoder, vocab_size=VOCAB, **SIZES, **fields)


def encoder_decoder(**fields):
  kind = "encoder_decoder"
  return EncoderDecoder(encoder=encoder(kind), decoder=decoder(kind, **fields))


MODELS = {
  "causal": (decoder, (TOKENS,)),
  "masked": (lambda **fields: MaskedLM(encoder=encoder(), **fields), (TOKENS,)),
  "encoder_decoder": (encoder_decoder, (SOURCE, TOKENS)),
}


@pytest.mark.parametrize("name", MODELS)
def test_targets_cost_what_their_logits_say(name):
  """To the bit all at once; by chunks to float32's rounding."""
  make, args = MODELS[name]
  params = reference.random_params(make(), *args)

  def of_logits(params):
    logits = make().apply({"params": params}, *args)
    return optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS)

  def of_targets(params, **fields):
    return make(**fields).apply({"params": params}, *args, targets_BT=TARGETS)

  by_chunks = lambda params: of_targets(params, vocab_chunk=5)
  costs = of_logits, of_targets, by_chunks
  # In one program: what they share is compiled once.
  expected, whole, found = compiled(lambda params: [f(params) for f in costs])(params)
  assert (found.shape, found.dtype) == (TARGETS.shape, jnp.float32)
  np.testing.assert_array_equal(whole, expected)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_gradient_is_that_of_the_logits():
  """To the bit all at once; by chunks to float32's rounding; the table is input and output."""
  params = reference.random_params(decoder(), TOKENS)

  def of_logits(params):
    logits = decoder().apply({"params": params}, TOKENS)
    return optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS).sum()

  def of_targets(params, **fields):
    return decoder(**fields).apply({"params": params}, TOKENS, targets_BT=TARGETS).sum()

  by_chunks = lambda params: of_targets(params, vocab_chunk=5)
  losses = of_logits, of_targets, by_chunks
  expected, whole, found = compiled(lambda params: [jax.grad(f)(params) for f in losses])(params)
  jax.tree.map(np.testing.assert_array_equal, whole, expected)
  scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * scale)
  jax.tree.map(close, found, expected)


def test_targets_with_a_state_and_the_stream():
  """Where tokens do not fit the state what they cost is NaN, as their logits are."""
  model = decoder(vocab_chunk=5)
  params = reference.random_params(model, TOKENS)
  apply = compiled(model.apply, static_argnames="return_hidden_states")
  call = lambda tokens, **more: apply({"params": params}, tokens, **more)
  nats, stream = call(TOKENS, targets_BT=TARGETS, return_hidden_states=True)
  assert stream.shape == (2, *TOKENS.shape, model.width)
  half = TOKENS[:, :3], TARGETS[:, :3]
  first, state = call(half[0], targets_BT=half[1], state=model.init_state(2, 5))
  np.testing.assert_allclose(first, nats[:, :3], rtol=0, atol=1e-5)
  second, _ = call(half[0], targets_BT=half[1], state=state)
  assert np.isnan(second).all()


def test_pairs_are_scored_by_the_states_of_their_patches_and_tokens():
  """Those behind the class token, patches first, each with its own table, patches with a bias."""
  experts = {"experts": ("vision", "text"), "positions": "none", "vocab_size": None}
  sizes = {"num_patches": 4, "patch_size": 2, "max_text_length": 6, "vocab_size": VOCAB}
  pairs = BEiT3(encoder=encoder(**experts), **sizes)
  model = MaskedBEiT3(encoder=pairs, image_vocab_size=11)
  images = RNG.normal(size=(2, 4, 4, 3)).astype(np.float32)
  given = {"masked_BP": RNG.integers(0, 2, (2, 4)).astype(bool)}
  params = reference.random_params(model, images, TOKENS)

  @compiled
  def run(params):
    both = model.apply({"params": params}, images, TOKENS, return_hidden_states=True, **given)
    return pairs.apply({"params": params["encoder"]}, images, TOKENS, **given), both

  states, ((patches, text), stream) = run(params)
  assert stream.shape == (2, 2, 1 + 4 + 6, states.shape[-1])
  tables = params["output_embedding"], params["encoder"]["text_embedding"]
  expected = np.split(np.asarray(states)[:, 1:], [4], axis=1)
  biases = params["head_bias"], 0.0
  for logits, part, table, bias in zip((patches, text), expected, tables, biases, strict=True):
    np.testing.assert_allclose(logits, part @ table["embedding"].T + bias, rtol=0, atol=1e-5)
