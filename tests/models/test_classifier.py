"""The classifier of texts: its formula, and that padding and other rows are nothing to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.models.classifier import TextClassifier
from magneto_jax.models.encoder import Encoder
from tests import reference
from tests.models import common
from tests.models.common import LENGTH, SIZES, VOCAB, in_float64

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (3, LENGTH))
# Of 8, 5 and 2 tokens.
MASK = np.arange(LENGTH) < np.array([[8], [5], [2]])


def classifier(pooling="first", **options) -> TextClassifier:
  dtype = options.pop("dtype", jnp.float32)
  recipe = common.recipe("magneto").encoder
  encoder = Encoder(recipe=recipe, vocab_size=VOCAB, positions="learned", dtype=dtype, **SIZES)
  return TextClassifier(encoder=encoder, **{"classes": 3, "pooling": pooling} | options)


@pytest.mark.parametrize("pooling", ("first", "mean"))
def test_the_head_is_its_formula_in_float64(pooling):
  """On the encoder's own output; 1e-12."""
  model = classifier(pooling, dtype=jnp.float64)
  y, params = in_float64(model, TOKENS, mask_BT=MASK)
  with jax.enable_x64(True):
    h = common.run(model.encoder, params["encoder"], jnp.asarray(TOKENS), mask_BT=MASK)
  rows = [h[i, :1] if pooling == "first" else h[i, MASK[i]] for i in range(3)]
  p = np.stack([row.mean(0) for row in rows])
  dense, out = params["head_dense"], params["head_out"]
  expected = np.tanh(p @ dense["kernel"] + dense["bias"]) @ out["kernel"] + out["bias"]
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pooling", ("first", pytest.param("mean", marks=pytest.mark.ci)))
def test_padding_and_other_rows_are_nothing_to_a_row(pooling):
  """Alone, among others, with other tokens in the padding: 1e-5; and no gradient gets there."""
  model = classifier(pooling)
  params = reference.random_params(model, TOKENS)

  def total(table, x, mask):
    changed = {**params, "encoder": {**params["encoder"], "token_embedding": {"embedding": table}}}
    y = model.apply({"params": changed}, x, mask_BT=mask)
    return jnp.sum(y**2), y

  value = common.compiled(jax.value_and_grad(total, has_aux=True))
  table = params["encoder"]["token_embedding"]["embedding"]
  # A token that stands in the padding alone.
  marked = np.where(MASK, TOKENS % (VOCAB - 1), VOCAB - 1)
  (_, together), gradient = value(table, marked, MASK)
  used = np.abs(gradient).sum(1)
  assert used[VOCAB - 1] == 0 and (used[np.unique(marked[MASK])] > 0).all()
  other = np.where(MASK, marked, (marked + 5) % VOCAB)
  np.testing.assert_array_equal(value(table, other, MASK)[0][1], together)
  row = np.array([1])
  (_, moved), _ = value(table, np.concatenate([marked[row], marked[:2]]), MASK[[1, 0, 1]])
  np.testing.assert_allclose(moved[0], together[1], rtol=0, atol=1e-5)
  alone = common.run(model, params, marked[row, :5], mask_BT=MASK[row, :5])
  np.testing.assert_allclose(alone[0], together[1], rtol=0, atol=1e-5)


def test_dropout_is_drawn_twice_in_the_head_and_only_in_training():
  model = classifier(dropout_rate=0.5)
  params = reference.random_params(model, TOKENS)
  call = common.compiled(
    lambda key: model.apply({"params": params}, TOKENS, deterministic=False, rngs={"dropout": key})
  )
  one, again, other = (np.asarray(call(jax.random.key(seed))) for seed in (0, 0, 1))
  assert (one == again).all() and (one != other).any()


@pytest.mark.parametrize(
  "fields, message", [({"pooling": "last"}, "must be one of first, mean"), ({"classes": 0}, "at l")]
)
def test_what_it_cannot_be_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(classifier(**fields).init, jax.random.key(0), TOKENS)
