"""Generation against the full forward pass, and the filters against their definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax import RECIPES, Architecture, CausalLM
from magneto_jax.decoding import filter_logits, generate


@pytest.fixture(scope="module")
def model_and_variables():
  recipe = RECIPES["magneto"](Architecture("decoder", decoder_layers=2, width=32)).decoder
  model = CausalLM(
    recipe=recipe, vocab_size=50, width=32, num_heads=4, ffn_width=64, positions="rotary"
  )
  variables = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
  # Sharper than at the start, so that float32 noise cannot turn the best token.
  return model, jax.tree.map(lambda leaf: 2.0 * leaf, variables)


def greedy_by_full_forward(model, variables, prompt, steps):
  """Rows of one length, so that one compilation serves; what comes later is not seen."""
  tokens, score = list(prompt), jax.jit(model.apply)
  for _ in range(steps):
    row = np.pad(tokens, (0, 16 - len(tokens)))
    tokens.append(int(np.argmax(score(variables, row[None])[0, len(tokens) - 1])))
  return tokens[len(prompt) :]


def test_greedy_decoding_equals_the_full_forward(model_and_variables):
  """Also for prompts of different lengths in one batch, which are padded on the left."""
  model, variables = model_and_variables
  prompts = [[1, 7, 3, 9, 22], [1, 30], [1]]
  got = generate(model, variables, prompts, max_new_tokens=8, temperature=0)
  for prompt, tokens in zip(prompts, got, strict=True):
    assert tokens.tolist() == greedy_by_full_forward(model, variables, prompt, 8)


def test_generation_stops_at_the_end_token(model_and_variables):
  model, variables = model_and_variables
  (free,) = generate(model, variables, [[1, 7]], max_new_tokens=8, temperature=0)
  (stopped,) = generate(
    model, variables, [[1, 7]], max_new_tokens=8, temperature=0, eos_id=int(free[3])
  )
  end = free.tolist().index(free[3])
  assert stopped.tolist() == free.tolist()[: end + 1]


def test_sampling_is_a_function_of_the_key(model_and_variables):
  model, variables = model_and_variables
  sample = lambda seed: generate(
    model, variables, [[1]], max_new_tokens=12, key=jax.random.key(seed), temperature=2.0
  )[0].tolist()
  assert sample(0) == sample(0)
  assert sample(0) != sample(1)


def test_top_k_one_is_greedy(model_and_variables):
  model, variables = model_and_variables
  options = dict(max_new_tokens=6)
  (best,) = generate(model, variables, [[1, 5]], temperature=0, **options)
  (top,) = generate(
    model, variables, [[1, 5]], key=jax.random.key(3), temperature=3.0, top_k=1, **options
  )
  assert best.tolist() == top.tolist()


def test_more_tokens_than_positions_are_refused(model_and_variables):
  model = model_and_variables[0].clone(positions="learned", max_length=6)
  with pytest.raises(ValueError, match="3 tokens of prompt and max_new_tokens=4 .* model's 6"):
    generate(model, {}, [[1], [1, 2, 3]], max_new_tokens=4, temperature=0)


@pytest.mark.parametrize(
  "top_k, top_p",
  [(0, None), (3, None), (20, None), (0, 0.6), (0, 1e-6), (0, 1.0), (4, 0.9)],
)
def test_filters_keep_what_their_definition_keeps(top_k, top_p):
  logits = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32) * 2
  logits[0, 3] = 200.0  # The mass of this token is all there is.
  got = np.isfinite(np.asarray(filter_logits(jnp.asarray(logits), top_k=top_k, top_p=top_p)))
  for row, kept in zip(logits.astype(np.float64), got, strict=True):
    order = np.argsort(-row)[: top_k or None]
    p = np.exp(row[order]) / np.exp(row[order]).sum()
    count = len(order) if top_p is None else int(np.searchsorted(np.cumsum(p), top_p) + 1)
    assert set(np.flatnonzero(kept)) == set(order[:count])


@dataclasses.dataclass(frozen=True)
class SameEachStep:
  """Scores every next token alike, whatever came before."""

  logits: tuple[float, ...]
  longest = None

  @property
  def vocab_size(self):
    return len(self.logits)

  def init_state(self, batch, length):
    del batch, length
    return ()

  def apply(self, variables, tokens_BT, *, state, **options):
    del variables, options
    return jnp.broadcast_to(jnp.array(self.logits), (*tokens_BT.shape, len(self.logits))), state


@pytest.mark.parametrize(
  "options, kept", [({}, 4), (dict(top_k=3), 3), (dict(top_p=0.9), 2), (dict(top_k=9), 4)]
)
def test_samples_have_the_tempered_and_filtered_probabilities(options, kept):
  """At temperature 1/2 the odds are squared; every row and every step draws for itself."""
  odds = np.array([8.0, 4.0, 2.0, 1.0])
  model = SameEachStep(tuple(np.log(odds).tolist()))
  got = generate(
    model, {}, [[1]] * 256, max_new_tokens=16, key=jax.random.key(0), temperature=0.5, **options
  )
  expected = np.where(np.arange(4) < kept, odds**2, 0.0)
  share = np.bincount(np.ravel(got), minlength=4) / (256 * 16)
  # Four standard deviations of 4,096 draws.
  np.testing.assert_allclose(share, expected / expected.sum(), rtol=0, atol=0.03)
  assert len({tuple(row.tolist()) for row in got}) > 64
  assert len({tuple(column) for column in np.transpose(got).tolist()}) == 16


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(prompts=[[]]), "at least one token"),
    (dict(prompts=[[1], [7, 50]]), "tokens outside of the vocabulary, 0 .. 49"),
    (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(top_p=0.0), "top_p=0.0"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(temperature=1.0), "give a key"),
  ],
)
def test_bad_arguments_are_refused(model_and_variables, options, message):
  model, variables = model_and_variables
  options = dict(prompts=[[1]], max_new_tokens=2, temperature=0) | options
  with pytest.raises(ValueError, match=message):
    generate(model, variables, **options)
