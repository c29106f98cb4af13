"""Zero-shot multiple choice: the continuation that a language model holds to be the likeliest.

With x_t the tokens of a continuation, its score is log p = sum_t log p(x_t | context, x_<t): as it
is, or over its number of tokens, characters or bytes, so that long ones are not at a disadvantage.
All four are given, each under its own name, as papers differ in which they report.

Reference: Language Models are Few-Shot Learners, arXiv 2005.14165, section 2.4.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from magneto_jax import runs, sharding
from magneto_jax.config import ConfigError, config_errors
from magneto_jax.data import choices
from magneto_jax.data.tokenizers import Tokenizer
from magneto_jax.evaluation import Evaluator, Opened, refuse_unless_finite
from magneto_jax.models.language import CausalLM

# How many lengths of sequences are compiled for at most: the longest, its half, and so on.
_LENGTHS = 4


class Scored(NamedTuple):
  """A continuation's log-likelihood (nats) and its sizes, without the space that joins it."""

  log_likelihood: float
  tokens: int
  characters: int
  bytes: int


NORMALISED: Mapping[str, Callable[[Scored], float]] = {
  "sum": lambda scored: scored.log_likelihood,
  "per_token": lambda scored: scored.log_likelihood / scored.tokens,
  "per_character": lambda scored: scored.log_likelihood / scored.characters,
  "per_byte": lambda scored: scored.log_likelihood / scored.bytes,
}


def choose(options: Sequence[Scored]) -> dict[str, int]:
  """The index of the best option by each of NORMALISED; of equals the first."""
  return {name: int(np.argmax([f(o) for o in options])) for name, f in NORMALISED.items()}


def accuracies(
  asked: Sequence[choices.Question], scored: Sequence[Sequence[Scored]]
) -> dict[str, float]:
  """Of each of NORMALISED the accuracy a and its standard error, sqrt(a (1 - a) / (n - 1)).

  Last comes `accuracy_by_chance`, the mean over questions of 1 / options.
  """
  chosen = [choose(options) for options in scored]
  values = {}
  for name in NORMALISED:
    right = [c[name] == question.label for c, question in zip(chosen, asked, strict=True)]
    accuracy = float(np.mean(right))
    values[f"accuracy_{name}"] = accuracy
    values[f"standard_error_{name}"] = math.sqrt(accuracy * (1 - accuracy) / max(len(right) - 1, 1))
  values["accuracy_by_chance"] = float(np.mean([1 / len(q.options) for q in asked]))
  return values


class _Sequence(NamedTuple):
  """Tokens of a context, which begins with the bos, and of the continuation behind it."""

  tokens: np.ndarray
  scored: int
  cut: bool


def _sequence(option: choices.Option, tokenizer: Tokenizer, longest: int, where: str) -> _Sequence:
  """The option in tokens, its context cut on the left where it is longer than the model reads.

  The continuation's tokens are those of the whole text without as many as its context has, so that
  a token which joins both is counted once. White space at the context's end belongs to the
  continuation, as tokens begin with their space.
  """
  text, context = "".join(option), option.context.rstrip()
  whole = tokenizer.encode(text)
  # At least one, where a token holds the context's end and all of the continuation.
  scored = max(len(whole) - len(tokenizer.encode(context)), 1)
  if scored > longest:
    raise ConfigError(
      f"{where}: a continuation has {scored} tokens, more than the {longest} that the model reads:"
      " leave the question out"
    )
  kept = whole[-longest:]
  tokens = np.concatenate([[tokenizer.bos_id], kept]).astype(np.int32)
  return _Sequence(tokens, scored, len(kept) < len(whole))


def _samples(sequences: Sequence[_Sequence], length: int) -> list[dict[str, np.ndarray]]:
  """As `data.packing` makes them: a sequence a row, a weight of 1 for what is scored."""
  samples = []
  for tokens, scored, _ in sequences:
    count = len(tokens) - 1
    sample = {
      "inputs": tokens[:-1],
      "targets": tokens[1:],
      "segment_ids": np.ones(count, np.int32),
      "positions": np.arange(count, dtype=np.int32),
      "weights": (np.arange(count) >= count - scored).astype(np.float32),
    }
    samples.append({name: np.pad(x, (0, length - count)) for name, x in sample.items()})
  return samples


def _lengths(longest: int) -> list[int]:
  """The lengths that are compiled for, in ascending order."""
  return sorted({-(-longest // 2**i) for i in range(_LENGTHS)})


def log_likelihoods(
  model: CausalLM,
  params,
  sequences: Sequence[_Sequence],
  *,
  longest: int,
  mesh,
  rows: int,
) -> np.ndarray:
  """log p of what is scored of each sequence, in batches of a few shapes."""

  def measure(params, batch) -> dict[str, Any]:
    nats_BT = model.apply(
      {"params": params},
      batch["inputs"],
      positions_BT=batch["positions"],
      segment_ids_BT=batch["segment_ids"],
      targets_BT=batch["targets"],
    )
    return {"nats": jnp.sum(nats_BT * batch["weights"], axis=1)}

  evaluator = Evaluator(measure, mesh, rows)
  found = np.zeros(len(sequences))
  lengths = _lengths(longest)
  sizes = np.searchsorted(lengths, [len(s.tokens) - 1 for s in sequences])
  for size in np.unique(sizes):
    (where,) = np.nonzero(sizes == size)
    samples = _samples([sequences[i] for i in where], lengths[size])
    found[where] = -evaluator.totals(params, samples)["nats"]
  return found


def score(
  opened: Opened, asked: Sequence[choices.Question]
) -> tuple[list[tuple[Scored, ...]], dict[str, int]]:
  """Every option of every question, and counts of what was asked, cut and run.

  A text longer than `data.seq_length`, which is what the model was trained to read, loses the start
  of its context; `truncated` counts the options of which that is so.

  Raises:
    ConfigError: if the run is not of a causal language model, or a continuation is too long.
    FloatingPointError: if a score is not finite.
  """
  config, (model, variables) = opened.record.config, opened.run
  if not isinstance(model, CausalLM):
    raise ConfigError(
      f"{opened.workdir} is a run of config.task={config.task!r}: only a causal language model says"
      " how likely a continuation is"
    )
  tokenizer, longest = runs.load_tokenizer(opened.workdir), config.data.seq_length
  flat = [(option, question.where) for question in asked for option in question.options]
  sequences = [_sequence(option, tokenizer, longest, where) for option, where in flat]
  # Partial evaluation of equal texts, say: each is run once.
  keys = [(s.tokens.tobytes(), s.scored) for s in sequences]
  distinct = dict(zip(keys, sequences, strict=True))
  with config_errors(), sharding.use_mesh(opened.mesh):
    found = log_likelihoods(
      model,
      variables["params"],
      list(distinct.values()),
      longest=longest,
      mesh=opened.mesh,
      rows=opened.rows,
    )
  likelihoods = dict(zip(distinct, found, strict=True))
  scored = []
  for (option, where), sequence, key in zip(flat, sequences, keys, strict=True):
    likelihood = float(likelihoods[key])
    refuse_unless_finite(likelihood, f"{where}: the log-likelihood of a choice", opened)
    text = option.continuation.strip()
    scored.append(Scored(likelihood, sequence.scored, len(text), len(text.encode())))
  rest = iter(scored)
  by_question = [tuple(next(rest) for _ in question.options) for question in asked]
  counts = {
    "questions": len(asked),
    "options": len(flat),
    "truncated": sum(sequence.cut for sequence in sequences),
  }
  return by_question, counts


def evaluate(opened: Opened, name: str, split: str = "validation") -> dict[str, Any]:
  """A run's accuracies on the questions of a file or a data set; see `evaluation.evaluate`.

  Args:
    opened: the run.
    name: a JSONL file, or one of `data.choices.FORMATTERS`, prepared by TFDS.
    split: of the data set; a file has none, and its result says None.

  Raises:
    ConfigError, FileNotFoundError, FloatingPointError: see `score` and `data.choices.read`.
  """
  started = time.perf_counter()
  with config_errors():
    asked = choices.read(name, split=split, data_dir=opened.record.config.data.data_dir)
  scored, counts = score(opened, asked)
  return opened.result(
    started,
    choices=name,
    split=None if choices.is_file(name) else split,
    metrics=accuracies(asked, scored),
    counts=counts,
  )
