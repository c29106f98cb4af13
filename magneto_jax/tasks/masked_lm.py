"""Masked language modelling: restore the tokens of a text that are hidden, from all around them.

A sample is a window of a text behind a bos, of which some tokens are hidden: anew each time that it
is read in training, and always the same in validation (`data.masking`). Documents of a window do
not see each other. Only the chosen tokens go through the model's head.

Reference: BERT, arXiv 1810.04805; RoBERTa, arXiv 1907.11692; Foundation Transformers, arXiv
2210.06423, section 4.2; NormFormer, arXiv 2110.09456.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax import sharding
from magneto_jax.config import DataConfig, TrainConfig
from magneto_jax.data import masking
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.language import MaskedLM
from magneto_jax.tasks import common
from magneto_jax.tasks.task import Batch, Facts, Task, Totals, mean_nats, weighted_sums
from magneto_jax.theory import flops as theory_flops
from magneto_jax.theory import records

# Above so many tokens of validation its baselines are left out: they take a second for a million.
_BASELINE_TOKENS = 10_000_000
# Its exponential still is a number, a float64.
_MOST_NATS = 700.0


def architecture(config: TrainConfig, facts: Facts) -> records.Architecture:
  """What the recipe needs to know of the encoder."""
  return common.architecture(config, facts, "encoder", encoder_layers=config.model.layers)


def recipe(config: TrainConfig, facts: Facts) -> records.Stack:
  """The encoder stack's record of the config's recipe."""
  return common.recipe(config, architecture(config, facts)).encoder


def load_data(
  config: TrainConfig, directory: str | os.PathLike, expected: Mapping[str, Any] | None = None
) -> masking.MaskedText:
  """Documents, tokenizer and windows to mask; what is derived is kept in `directory`."""
  return masking.MaskedText.of(common.load_text(config, directory, expected), **_rates(config.data))


def _rates(config: DataConfig) -> dict[str, float]:
  return {"rate": config.mask_rate, "keep": config.mask_keep, "random": config.mask_random}


def facts(data: masking.MaskedText) -> Facts:
  """What the model must know of its data.

  vocab_size: V + 1, the tokenizer's ids and the mask's.
  token_correlation: sum_k p_k^2 of the frequencies of what is read, masks among it; see
    `causal_lm.facts`.
  """
  counts = common.token_counts(data)
  return _facts(data.augment, counts / counts.sum())


def planned_facts(config: TrainConfig) -> Facts:
  """Likewise without the data, as if all tokens were as frequent; see `common.planned_facts`."""
  vocab_size = common.planned_facts(config)["vocab_size"]
  drawing = masking.Masking(**_rates(config.data), vocab_size=vocab_size)
  return _facts(drawing, np.full(vocab_size, 1 / vocab_size))


def _facts(drawing: masking.Masking, frequencies_V: np.ndarray) -> Facts:
  read = drawing.frequencies(frequencies_V)
  return {"vocab_size": len(read), "token_correlation": float(np.sum(read**2))}


def build_model(config: TrainConfig, facts: Facts) -> MaskedLM:
  """The config's encoder over the data's vocabulary and the mask, with the papers' head."""
  common.refuse_window(config)
  encoder = Encoder(
    recipe=recipe(config, facts), vocab_size=facts["vocab_size"], **common.backbone(config)
  )
  return MaskedLM(
    encoder=encoder, head="dense", tied=config.model.tied_embeddings, **common.scoring(config)
  )


def inputs(batch: Batch) -> tuple[tuple, dict[str, Any]]:
  """The model's arguments: masked tokens, positions by document, and what to score."""
  keywords = {"positions_BT": "positions", "segment_ids_BT": "segment_ids"}
  keywords |= {"places_BK": "places", "targets_BT": "targets"}
  return (batch["inputs"],), {keyword: batch[name] for keyword, name in keywords.items()}


def measure(model: MaskedLM, variables, batch: Batch) -> dict[str, jax.Array]:
  """Sums over the chosen tokens: -log p, their number, and how many of them come first of all ids.

  Holds K V logits of each row at a time, whatever `vocab_chunk`.
  """
  args, keywords = inputs(batch)
  targets_BK, weights_BK = keywords.pop("targets_BT"), batch["weights"]
  logits_BKV = model.apply(variables, *args, **keywords)
  return common.answered(logits_BKV, targets_BK, weights_BK)


def metrics(totals: Totals, data: masking.MaskedText, *, whole: bool) -> dict[str, float]:
  """What the chosen tokens of the validation text cost.

  loss_nats_per_token: mean -log p of them.
  masked_accuracy: share of them that the model puts first.
  pseudo_perplexity: exp(mean nats), as RoBERTa and NormFormer give it: of tokens of which others
    are hidden, too, and a tenth can be read. It depends on the tokenizer and on how much is hidden,
    and cannot be compared with a causal model's perplexity. Left out where it is past a float64.
    That of one hidden token at a time is exp(-`pseudo_log_likelihood` / tokens).
  """
  values = mean_nats(totals, data, whole=whole)
  values["masked_accuracy"] = totals["correct"] / totals["weight"]
  if (nats := values["loss_nats_per_token"]) < _MOST_NATS:
    values["pseudo_perplexity"] = math.exp(nats)
  return values


def pseudo_log_likelihood(model: MaskedLM, variables, tokens: Sequence[int]) -> float:
  """sum_t log p(x_t | all other tokens) of a text, in nats: each of its tokens is hidden in turn.

  Compiles anew for each length; T - 1 rows of T tokens are held at a time.

  Args:
    model: whose last id is the mask's.
    variables: the model's.
    tokens: [T], the text behind a bos, which is not scored.

  Reference: Salazar et al., arXiv 1910.14659, section 2.
  """
  tokens_T = np.asarray(tokens, np.int32)
  hidden = 1 + np.arange(len(tokens_T) - 1)[:, None]
  rows = np.where(np.arange(len(tokens_T)) == hidden, model.encoder.vocab_size - 1, tokens_T)
  score = jax.jit(
    lambda variables, rows: model.apply(
      variables, rows, places_BK=hidden, targets_BT=tokens_T[hidden]
    )
  )
  return -float(jnp.sum(score(variables, rows)))


def sample(
  config: TrainConfig, model: MaskedLM, variables, data: masking.MaskedText, key: jax.Array
) -> str | None:
  """The start of a validation window: as it is read, and as the model answers it.

  It is the window in the middle, with its mask, `config.sample_tokens` of it. An answer stands in
  brackets, and the truth beside it where the two differ.
  """
  del key
  if not config.sample_tokens:
    return None
  window = data.validation[len(data.validation) // 2]
  read = window["inputs"][: config.sample_tokens]

  @jax.jit
  def answers(variables, batch):
    args, keywords = inputs(batch)
    del keywords["targets_BT"]
    return sharding.replicate(jnp.argmax(model.apply(variables, *args, **keywords), -1))

  (found,) = np.asarray(answers(variables, {name: x[None] for name, x in window.items()}))
  hidden = window["weights"] > 0
  shown = in_brackets(
    data.words, window["places"][hidden], found[hidden], window["targets"][hidden]
  )
  return (
    f"as it is read:\n{data.words(read)}\n\nas it is answered, [right] or [wrong|right]:\n"
    f"{data.words(read, shown)}"
  )


def in_brackets(
  words: Callable[[Sequence[int]], str],
  places: Iterable[int],
  answers: Iterable[int],
  truths: Iterable[int],
) -> dict[int, str]:
  """By place, an answer in brackets, and the truth beside it where the two differ."""
  shown = {}
  for place, answer, truth in zip(places, answers, truths, strict=True):
    both = dict.fromkeys(words([token]) for token in (answer, truth))
    shown[int(place)] = f"[{'|'.join(both)}]".replace("\n", r"\n")
  return shown


def baselines(data: masking.MaskedText) -> dict[str, dict[str, float]]:
  """What counts of the training text's tokens make of the same hidden ones.

  commonest_token: always the commonest of them.
  unigram: p(x) = (1 + n(x)) / sum_x (1 + n(x)), n their counts.
  """
  if len(data.validation.samples.tokens) > _BASELINE_TOKENS:
    return {}
  targets = np.concatenate([x["targets"][x["weights"] > 0] for x in data.validation])
  counts = 1.0 + common.token_counts(data)
  nats = -np.mean(np.log(counts[targets] / counts.sum()))
  return {
    "masked_accuracy": {"commonest_token": float(np.mean(targets == np.argmax(counts)))},
    "loss_nats_per_token": {"unigram": float(nats)},
  }


def flops(config: TrainConfig, facts: Facts) -> int:
  """FLOPs of one step, with the places that hold no target; see `theory.flops`."""
  return theory_flops.masked_step_flops(
    vocab_size=facts["vocab_size"],
    seq_length=config.data.seq_length,
    places=_places(config),
    batch_size=config.batch_size,
    **common.sizes(config.model),
  )


def _places(config: TrainConfig) -> int:
  return masking.places_of(config.data.mask_rate, config.data.seq_length)


def batch_spec(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """inputs, positions, segment_ids [T]: what is read; see `data.packing`.
  places, targets, weights [K]: what is scored; see `data.masking`.
  """
  rows, length, places = config.batch_size, config.data.seq_length, _places(config)
  shapes = dict.fromkeys(("inputs", "positions", "segment_ids"), ((rows, length), jnp.int32))
  shapes |= dict.fromkeys(("places", "targets"), ((rows, places), jnp.int32))
  shapes["weights"] = (rows, places), jnp.float32
  return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


TASK = Task(
  load_data=load_data,
  facts=facts,
  describe=lambda config, facts: records.describe(recipe(config, facts)),
  build_model=build_model,
  dummy_inputs=lambda config: (jnp.zeros((1, config.data.seq_length), jnp.int32),),
  architecture=architecture,
  inputs=inputs,
  score=weighted_sums,
  metrics=metrics,
  baselines=baselines,
  flops=flops,
  planned_facts=planned_facts,
  batch_spec=batch_spec,
  measure=measure,
  sample=sample,
)
