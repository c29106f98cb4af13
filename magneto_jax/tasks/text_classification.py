"""Classification and regression of texts and of pairs of texts: fine-tuning, or from scratch.

The model is an encoder with a head on one vector (`models.TextClassifier`). The loss is the
cross-entropy of the classes, or the squared error of a number, each a mean over samples.

Reference: GLUE, arXiv 1804.07461; RoBERTa, arXiv 1907.11692, section 5.1.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from magneto_jax.config import ConfigError, TrainConfig
from magneto_jax.data import labelled, sentences
from magneto_jax.models.classifier import TextClassifier
from magneto_jax.models.encoder import Encoder
from magneto_jax.tasks import common
from magneto_jax.tasks.task import Batch, Facts, Task, Totals
from magneto_jax.theory import flops as theory_flops
from magneto_jax.theory import records

# The training plays of the embedded text.
_EMBEDDED_CLASSES = 8


def architecture(config: TrainConfig, facts: Facts) -> records.Architecture:
  """What the recipe needs to know of the encoder."""
  return common.architecture(config, facts, "encoder", encoder_layers=config.model.layers)


def recipe(config: TrainConfig, facts: Facts) -> records.Stack:
  """The encoder stack's record of the config's recipe."""
  return common.recipe(config, architecture(config, facts)).encoder


def facts(data: sentences.SentenceData) -> Facts:
  """What the model must know of its data.

  vocab_size: V.
  token_correlation: sum_k p_k^2 of the frequencies of the training rows' tokens, marks included.
  classes: C; 1 for a number.
  """
  frequencies = np.bincount(data.train.tokens) / len(data.train.tokens)
  return {
    "vocab_size": data.tokenizer.vocab_size,
    "token_correlation": float(np.sum(frequencies**2)),
    "classes": max(1, len(data.classes)),
  }


def planned_facts(config: TrainConfig) -> Facts:
  """The facts that a run of the config would have; see `common.planned_facts`.

  Raises:
    ConfigError: the classes are not known without reading the data.
  """
  data = config.data
  glue = labelled.glue_task(data.name)
  if glue is not None:
    classes = max(1, len(glue.classes))
  elif data.regression:
    classes = 1
  elif data.name == "embedded":
    classes = _EMBEDDED_CLASSES
  else:
    raise ConfigError(
      f"the classes of data.name={data.name!r} are not known without reading it: to plan, set"
      " data.name to embedded or to a task of GLUE with as many"
    )
  return {**common.planned_facts(config), "classes": classes}


def build_model(config: TrainConfig, facts: Facts) -> TextClassifier:
  """The config's encoder over the data's vocabulary, with the head; dropout is the encoder's."""
  common.refuse_window(config)
  return TextClassifier(
    encoder=Encoder(
      recipe=recipe(config, facts), vocab_size=facts["vocab_size"], **common.backbone(config)
    ),
    classes=facts["classes"],
    pooling=config.model.pooling,
    dropout_rate=config.model.dropout,
  )


def inputs(batch: Batch) -> tuple[tuple, dict[str, Any]]:
  """The model's arguments: tokens, and which of them are not padding."""
  return (batch["inputs"],), {"mask_BT": batch["mask"]}


def score(scores_BC: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Sum over samples of -log p(class) (nats), or of (y - target)^2, and the number of samples."""
  targets_B, weights_B = batch["targets"], batch["weights"]
  if jnp.issubdtype(targets_B.dtype, jnp.floating):
    losses_B = (scores_BC[:, 0] - targets_B) ** 2
  else:
    losses_B = optax.softmax_cross_entropy_with_integer_labels(scores_BC, targets_B)
  return jnp.sum(losses_B * weights_B), jnp.sum(weights_B)


def measure(model: TextClassifier, variables, batch: Batch) -> dict[str, jax.Array]:
  """The loss's sums, and of every sample the target and the prediction."""
  args, kwargs = inputs(batch)
  scores_BC = model.apply(variables, *args, **kwargs)
  loss, weight = score(scores_BC, batch)
  predicted = scores_BC[:, 0] if model.classes == 1 else jnp.argmax(scores_BC, axis=-1)
  return {"loss": loss, "weight": weight, "targets": batch["targets"], "predictions": predicted}


# ---------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------


def _accuracy(targets: np.ndarray, predictions: np.ndarray, classes: int) -> float:
  del classes
  return np.mean(targets == predictions)


def _f1(targets: np.ndarray, predictions: np.ndarray, classes: int) -> float:
  """Of two classes that of the second; of more the mean of each class's, 0 for one without rows."""
  from sklearn import metrics  # Takes a second, and is needed at an evaluation alone.

  labels = [1] if classes == 2 else range(classes)
  return metrics.f1_score(targets, predictions, labels=labels, average="macro", zero_division=0.0)


def _matthews_correlation(targets: np.ndarray, predictions: np.ndarray, classes: int) -> float:
  """0 where all predictions are the same."""
  from sklearn import metrics

  del classes
  return metrics.matthews_corrcoef(targets, predictions)


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray, int], float]:
  def correlation(targets: np.ndarray, predictions: np.ndarray, classes: int) -> float:
    """0 where all predictions, or all targets, are the same: there it is not defined."""
    from scipy import stats

    del classes
    if np.ptp(targets) == 0 or np.ptp(predictions) == 0:
      return 0.0
    return getattr(stats, name)(targets.astype(np.float64), predictions.astype(np.float64))[0]

  return correlation


# Of targets, predictions, and how many classes the data have.
METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray, int], float]] = {
  "accuracy": _accuracy,
  "f1": _f1,
  "matthews_correlation": _matthews_correlation,
  "pearson": _correlation("pearsonr"),
  "spearman": _correlation("spearmanr"),
}


def metrics(totals: Totals, data: sentences.SentenceData, *, whole: bool) -> dict[str, float]:
  """The mean loss, the metrics that the data ask for, and as `score` their mean, as GLUE has it."""
  given = totals["targets"], totals["predictions"], len(data.classes)
  found = {name: float(METRICS[name](*given)) for name in data.metrics}
  loss = totals["loss"] / totals["weight"]
  return {"loss_per_sample": loss, **found, "score": float(np.mean(list(found.values())))}


def baselines(data: sentences.SentenceData) -> dict[str, dict[str, float]]:
  """Of classes: the accuracy of the commonest one in training, and of a draw among all."""
  if "accuracy" not in data.metrics:
    return {}
  commonest = np.bincount(data.train.targets).argmax()
  majority = float(np.mean(data.validation.targets == commonest))
  return {"accuracy": {"majority_class": majority, "chance": 1 / len(data.classes)}}


# ---------------------------------------------------------------------------------------------


def flops(config: TrainConfig, facts: Facts) -> int:
  """FLOPs of one step, padding included; see `theory.flops`."""
  sizes = common.sizes(config.model)
  stack = theory_flops.stack_products(length=config.data.seq_length, **sizes)
  width = config.model.width
  return 6 * config.batch_size * (stack + width * (width + facts["classes"]))


def batch_spec(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """inputs, mask: tokens, True for those that are not padding; targets, weights: one a row."""
  rows, length = config.batch_size, config.data.seq_length
  glue = labelled.glue_task(config.data.name)
  regression = config.data.regression if glue is None else not glue.classes
  return {
    "inputs": jax.ShapeDtypeStruct((rows, length), jnp.int32),
    "mask": jax.ShapeDtypeStruct((rows, length), bool),
    "targets": jax.ShapeDtypeStruct((rows,), jnp.float32 if regression else jnp.int32),
    "weights": jax.ShapeDtypeStruct((rows,), jnp.float32),
  }


def load_data(
  config: TrainConfig, directory: str | os.PathLike, expected: Mapping[str, Any] | None = None
) -> sentences.SentenceData:
  """Rows of tokens and labels; the tokenizer is kept in `directory`."""
  values = common.data_options(config.data, "text_classification")
  return sentences.load_sentences(workdir=directory, expected=expected, **values)


TASK = Task(
  load_data=load_data,
  facts=facts,
  describe=lambda config, facts: records.describe(recipe(config, facts)),
  build_model=build_model,
  dummy_inputs=lambda config: (jnp.zeros((1, config.data.seq_length), jnp.int32),),
  architecture=architecture,
  inputs=inputs,
  score=score,
  metrics=metrics,
  baselines=baselines,
  flops=flops,
  planned_facts=planned_facts,
  batch_spec=batch_spec,
  measure=measure,
  loss_name="loss_per_sample",
  best=("score", True),
  unit="sentences",
  size=lambda config: 1,
  fact_kinds={"vocab_size": int, "classes": int},
  pretrained="encoder",
  counts=lambda data: {"samples": len(data.validation), "truncated": data.truncated[1]},
)
