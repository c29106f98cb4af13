"""Scores of choices against a model's own probabilities, token by token, and what is chosen."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from scipy import special

from magneto_jax import evaluate, evaluation, multiple_choice, runs
from magneto_jax.config import ConfigError
from magneto_jax.data import choices
from magneto_jax.data.tokenizers import ByteTokenizer, SentencePieceTokenizer
from magneto_jax.multiple_choice import Scored
from tests.test_evaluation import TEXTS, T, write_run


def test_the_length_decides_what_is_chosen():
  """-6.0 for 3 tokens and 12 characters, -7.0 for 5 and 20: the sum picks the first."""
  options = [Scored(-6.0, 3, 12, 12), Scored(-7.0, 5, 20, 24)]
  values = {name: [f(o) for o in options] for name, f in multiple_choice.NORMALISED.items()}
  assert values == {
    "sum": [-6.0, -7.0],
    "per_token": [-2.0, -1.4],
    "per_character": [-0.5, -0.35],
    "per_byte": [-0.5, pytest.approx(-7 / 24)],
  }
  assert multiple_choice.choose(options) == {
    "sum": 0,
    "per_token": 1,
    "per_character": 1,
    "per_byte": 1,
  }
  # Of equals the first.
  assert set(multiple_choice.choose(options[:1] * 3).values()) == {0}


def test_accuracies_have_the_error_of_a_mean():
  """Against the sample's standard deviation."""
  rng = np.random.default_rng(0)
  asked, scored, right = [], [], []
  for i in range(40):
    likelihoods, label = rng.normal(size=2 + i % 2), int(rng.integers(2))
    options = (choices.Option("", "x"),) * len(likelihoods)
    asked.append(choices.Question(options, label, ""))
    scored.append([Scored(x, 1, 1, 1) for x in likelihoods])
    right.append(float(np.argmax(likelihoods) == label))
  found = multiple_choice.accuracies(asked, scored)
  for name in multiple_choice.NORMALISED:
    assert found[f"accuracy_{name}"] == pytest.approx(np.mean(right))
    error = np.std(right, ddof=1) / math.sqrt(len(right))
    assert found[f"standard_error_{name}"] == pytest.approx(error)
  assert found["accuracy_by_chance"] == pytest.approx((20 / 2 + 20 / 3) / 40)
  one = multiple_choice.accuracies(asked[:1], scored[:1])
  assert one["standard_error_sum"] == 0.0


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
  """A small untrained run over bytes that reads T tokens."""
  folder = tmp_path_factory.mktemp("choices") / "run"
  write_run(folder, TEXTS)
  return evaluation.open_run(folder, batch_size=3)


QUESTIONS = (
  choices.completions("To be", ["or not", "é", "ab"], 0, "a"),
  choices.completions("", ["x", "yz"], 1, "b"),
  choices.substitutions(["A cup", "The box "], " is red", 0, "c"),
  # Longer than the model reads: its context is cut.
  choices.completions("once upon a time in a land", ["far away", "no"], 0, "d"),
)


def by_hand(model, variables, question) -> list[float]:
  """log p of each continuation's bytes, of a forward pass for each, without padding."""
  tokenizer = ByteTokenizer()
  likelihoods = []
  for context, continuation in question.options:
    ids = [tokenizer.bos_id, *tokenizer.encode(context.rstrip())]
    total = 0.0
    for token in tokenizer.encode(context[len(context.rstrip()) :] + continuation):
      ids.append(token)
    scored = len(ids) - 1 - len(context.rstrip())
    # The bos stays, and the last T tokens.
    ids = [ids[0], *ids[1:][-T:]]
    padded = np.pad(ids[:-1], (0, T + 1 - len(ids)))[None]
    logits_TV = np.asarray(model(variables, padded)[0], np.float64)
    log_p_TV = special.log_softmax(logits_TV, axis=-1)
    for t in range(len(ids) - scored, len(ids)):
      total += log_p_TV[t - 1, ids[t]]
    likelihoods.append(total)
  return likelihoods


@pytest.fixture(scope="module")
def together(opened):
  """The scores of all questions, and the counts."""
  return multiple_choice.score(opened, QUESTIONS)


def test_scores_are_the_models_own(opened, together):
  """In batches of several lengths; sizes are those of the text, without the joining space."""
  model, variables = opened.run
  scored, counts = together
  apply = jax.jit(model.apply)
  for question, options in zip(QUESTIONS, scored, strict=True):
    found = [option.log_likelihood for option in options]
    np.testing.assert_allclose(found, by_hand(apply, variables, question), rtol=1e-5)  # float32
  sizes = [tuple(option[1:]) for options in scored for option in options]
  assert sizes[:3] == [(7, 6, 6), (3, 1, 2), (3, 2, 2)]
  assert sizes[3:5] == [(1, 1, 1), (2, 2, 2)]
  # White space at a context's end is the continuation's.
  assert sizes[5:7] == [(7, 6, 6), (8, 6, 6)]
  assert counts == {"questions": 4, "options": 9, "truncated": 2}


def test_others_in_the_batch_change_nothing(opened, together):
  """Of rows, and of lengths that are compiled for."""
  (alone,), _ = multiple_choice.score(dataclasses.replace(opened, rows=1), QUESTIONS[1:2])
  beside = together[0][1]
  np.testing.assert_allclose(
    [o.log_likelihood for o in alone],
    [o.log_likelihood for o in beside],
    rtol=1e-5,  # float32
  )


def test_a_token_across_the_border_is_the_continuations(tmp_path):
  """Tokens are those of the whole text, of which the context's number is left out."""
  texts = ["the cat sat on the mat, the cat ran to the mat. " * 50]
  tokenizer = SentencePieceTokenizer.train(texts, 300, tmp_path / "m.model")
  option = choices.Option("the c", "at sat")
  found = multiple_choice._sequence(option, tokenizer, 16, "here")
  whole = tokenizer.encode("the cat sat")
  assert len(whole) < len(tokenizer.encode("the c")) + len(tokenizer.encode("at sat"))
  np.testing.assert_array_equal(found.tokens[1:], whole)
  assert found.scored == max(len(whole) - len(tokenizer.encode("the c")), 1) and not found.cut


def test_what_cannot_be_scored_is_refused(opened, tmp_path):
  long = choices.completions("x", ["y" * (T + 1), "z"], 0, "q.jsonl:3")
  with pytest.raises(
    ConfigError, match="q.jsonl:3: a continuation has 18 tokens, more than the 16"
  ):
    multiple_choice.score(opened, [long])
  other = opened.run._replace(model=None)
  with pytest.raises(ConfigError, match="only a causal language model says how likely"):
    multiple_choice.score(dataclasses.replace(opened, run=other), QUESTIONS)
  nan = jax.tree.map(lambda x: x * math.nan, opened.run.variables)
  broken = dataclasses.replace(opened, run=runs.Run(opened.run.model, nan))
  with pytest.raises(FloatingPointError, match="a: the log-likelihood of a choice is nan with the"):
    multiple_choice.score(broken, QUESTIONS[:1])


def test_a_file_is_evaluated_and_told(opened, together, tmp_path, capsys):
  path = tmp_path / "q.jsonl"
  line = {"context": "once upon a time in a land", "choices": ["far away", "no"], "label": 0}
  path.write_text(json.dumps(line) + "\n")
  result = multiple_choice.evaluate(opened, str(path))
  chosen = multiple_choice.choose(together[0][3])
  for name, index in chosen.items():
    assert result["metrics"][f"accuracy_{name}"] == float(index == 0)
  assert result["counts"] == {"questions": 1, "options": 2, "truncated": 2} and result["step"] == 4
  assert result["split"] is None  # A file has none.
  json.dumps(result, allow_nan=False)
  evaluate.report(result)
  told = capsys.readouterr().out
  assert f"on {path}: 1 questions, 2 options, 2 truncated, in" in told
  assert "accuracy a byte" in told and "standard error" in told
