"""The record of a task, and what its data are."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from magneto_jax import reporting
from magneto_jax.config import TrainConfig
from magneto_jax.decoding import Answerer, Captioner, Embedder, Transcriber, Translator
from magneto_jax.theory.records import Architecture

Batch = dict[str, jax.Array]
Sample = dict[str, np.ndarray]
Facts = Mapping[str, Any]
Totals = Mapping[str, float | np.ndarray]


class Data(Protocol):
  """What a run reads of a task's data.

  Attributes:
    train, validation: random-access samples, arrays of equal shapes.
    augment: `(sample, random generator) -> sample` for training, or None. The generator is a
      function of the run's seed and of how many samples came before, so that an epoch draws anew,
      and a run that is resumed goes on with what it would have drawn.
    mix: `(sample, partner, random generator) -> sample` for training, of two augmented samples of a
      batch, or None. All rows of a batch are given the same draws; see `pipelines.train_iterator`.
    bad_records: what was left out as damaged: file, index in it, and what is wrong.
    identity: JSON-able values that name all of this exactly.
  """

  train: Sequence[Sample]
  validation: Sequence[Sample]
  augment: Callable[[Sample, np.random.Generator], Sample] | None
  mix: Callable[[Sample, Sample, np.random.Generator], Sample] | None
  bad_records: tuple[str, ...]
  identity: Mapping[str, Any]

  def describe(self) -> str:
    """How much there is, in words."""

  def show(self, sample: Sample) -> str:
    """A sample of a batch, in words."""


def weighted_sums(nats_BT: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Sum over tokens of -log p(target) (nats) and the number of tokens, both weighted."""
  return jnp.sum(nats_BT * batch["weights"]), jnp.sum(batch["weights"])


def mean_nats(totals: Totals, data: Data, *, whole: bool) -> dict[str, float]:
  """Nats a token."""
  return {"loss_nats_per_token": totals["loss"] / totals["weight"]}


class Task(NamedTuple):
  """What a batch is, its loss and its metrics.

  Attributes:
    load_data: `(config, directory for what is derived from it, identity that the data must
      have or None) -> data`.
    facts: `data -> {name: number}`: what a model must know of its data, kept beside its weights; of
      a model within the model, which is no fact of the data, they have its config and facts.
    describe: `(config, facts) -> lines` that say in words what the config's recipe does.
    build_model: `(config, facts) -> module`.
    dummy_inputs: `config -> positional arguments` that initialise the module.
    architecture: `(config, facts) -> Architecture`: what a recipe is given.
    inputs: `batch -> (positional arguments, keywords)` of the module's call.
    score: `(output, batch) -> (sum of losses, sum of weights)`.
    parts: `(output, batch) -> {name: sum of losses}`, what that sum is the sum of, where it is of
      several kinds of targets: each is told while a run trains.
    weigh: `(model, batch) -> batch` whose `weights` say how much each target counts, where that
      depends on the model, or on the whole batch: before a training step and a measurement.
    metrics: `(totals, data, whole=) -> {name: value}` of a validation set, or of a part of it;
      `totals` are what `measured` gave for all of its batches.
    baselines: `data -> {metric: {model: value}}`: what trivial models score on the validation set;
      empty where that would take long.
    flops: `(config, facts) -> FLOPs` of one optimizer step.
    planned_facts: `config -> facts` as they would be, without reading data.
    batch_spec: `config -> {name: jax.ShapeDtypeStruct}` of the global batch [batch_size, ...].
    data_spec: `(config, facts) -> the same`, of arrays whose shapes the data decide; see `spec`.
    measure: `(model, variables, batch) -> {name: array}` of an evaluation: numbers, of which the
      sum over batches is taken, and arrays [batch, ...], which are joined in the samples' order;
      `loss` and `weight` are among the numbers. None: these two, of `score`.
    sample: `(config, model, variables, data, key) -> text` that shows what the model does, or None.
    observed: `batch -> batch`, what of it `diagnostics` measures, where a model reads samples of
      several kinds one after the other: one of them.
    picture: `(config, model, variables, data) -> rows of images` that are drawn at the end of a
      run; called on every host; None, or no rows: nothing is drawn.
    counts: `data -> {name: number}`: how much there is of the validation set, and what of it the
      metrics leave out or see changed.
    judge: `(config, model, variables, data, mesh) -> ({name: value}, number of texts)`: further
      metrics, of what the model writes by itself, at the end of a run; None: there are none.
    signatures: `config -> {name: text}`: how those of them that are computed in several ways are.
    translator: `(config, model, variables, tokenizer) -> decoding.Translator`: what answers texts
      with texts; None: the model does not.
    transcriber: the same, a `decoding.Transcriber`, of what answers sounds with texts.
    captioner: the same, a `decoding.Captioner`, of what writes what images show.
    answerer: `(config, model, variables, tokenizer, identity of the data) -> decoding.Answerer`, of
      what answers questions about images.
    embedder: `(config, model, variables, tokenizer, rows=) -> decoding.Embedder`, of what finds
      images and texts by each other.
    loss_name: the metric that is the mean loss; `loss_nats_per_token` is in nats a token.
    best: the metric by which a model is chosen, and whether more is better.
    unit: what a sample is counted in; `size`: `config -> how many of them a sample has`.
    length: `config -> how many tokens, or patches, a row of the stack has`.
    row_bytes: `(config, model) -> about what a step holds of a row beside its tokens`.
    fact_kinds: the facts without which there is no model, and their types.
    pretrained: the module, and so the part of the parameters, that `config.init_from` gives; empty
      for none.
  """

  load_data: Callable[[TrainConfig, pathlib.Path, Mapping[str, Any] | None], Data]
  facts: Callable[[Data], Facts]
  describe: Callable[[TrainConfig, Facts], list[str]]
  build_model: Callable[[TrainConfig, Facts], nn.Module]
  dummy_inputs: Callable[[TrainConfig], tuple]
  architecture: Callable[[TrainConfig, Facts], Architecture]
  inputs: Callable[[Batch], tuple[tuple, dict[str, Any]]]
  score: Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
  metrics: Callable[..., dict[str, float]]
  baselines: Callable[[Data], dict[str, dict[str, float]]]
  flops: Callable[[TrainConfig, Facts], int]
  planned_facts: Callable[[TrainConfig], Facts]
  batch_spec: Callable[[TrainConfig], dict[str, jax.ShapeDtypeStruct]]
  data_spec: Callable[[TrainConfig, Facts], dict[str, jax.ShapeDtypeStruct]] = (
    lambda config, facts: {}
  )
  parts: Callable[[Any, Batch], dict[str, jax.Array]] = lambda output, batch: {}
  weigh: Callable[[nn.Module, Batch], Batch] = lambda model, batch: batch
  observed: Callable[[Batch], Batch] = lambda batch: batch
  measure: Callable[[nn.Module, Any, Batch], dict[str, jax.Array]] | None = None
  sample: Callable[..., str | None] = lambda config, model, variables, data, key: None
  picture: Callable[..., list[reporting.Row]] | None = None
  counts: Callable[[Data], dict[str, int]] = lambda data: {"samples": len(data.validation)}
  judge: Callable[..., tuple[dict[str, float], int]] | None = None
  signatures: Callable[[TrainConfig], dict[str, str]] = lambda config: {}
  translator: Callable[..., Translator] | None = None
  transcriber: Callable[..., Transcriber] | None = None
  captioner: Callable[..., Captioner] | None = None
  answerer: Callable[..., Answerer] | None = None
  embedder: Callable[..., Embedder] | None = None
  loss_name: str = "loss_nats_per_token"
  best: tuple[str, bool] = ("loss_nats_per_token", False)
  unit: str = "tokens"
  size: Callable[[TrainConfig], int] = lambda config: config.data.seq_length
  length: Callable[[TrainConfig], int] = lambda config: config.data.seq_length
  row_bytes: Callable[[TrainConfig, nn.Module], int] = lambda config, model: 0
  fact_kinds: Mapping[str, type] = {"vocab_size": int}
  pretrained: str = ""

  def spec(self, config: TrainConfig, facts: Facts) -> dict[str, jax.ShapeDtypeStruct]:
    """All arrays of the global batch."""
    return {**self.batch_spec(config), **self.data_spec(config, facts)}

  def loss(
    self, model: nn.Module, variables, batch: Batch, dropout_key: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """(sum of losses, sum of weights); with a key in training mode."""
    return self.loss_and_state(model, variables, batch, dropout_key)[0]

  def loss_and_state(
    self, model: nn.Module, variables, batch: Batch, dropout_key: jax.Array | None = None
  ) -> tuple[tuple[jax.Array, jax.Array], Any, dict[str, jax.Array]]:
    """What `loss` is; the model's collection `state` after it, None if it is not training; `parts`.

    A model that keeps more than parameters has it in that collection, which can be changed
    (`is_mutable_collection`) in a step of training alone.
    """
    args, kwargs = self.inputs(batch)
    output, changed = model.apply(
      variables,
      *args,
      deterministic=dropout_key is None,
      rngs=None if dropout_key is None else {"dropout": dropout_key},
      mutable=[] if dropout_key is None else ["state"],
      **kwargs,
    )
    return self.score(output, batch), changed.get("state"), self.parts(output, batch)

  def measured(self, model: nn.Module, variables, batch: Batch) -> dict[str, jax.Array]:
    """What an evaluation keeps of a batch; see `measure`."""
    if self.measure is not None:
      return self.measure(model, variables, batch)
    loss, weight = self.loss(model, variables, self.weigh(model, batch))
    return {"loss": loss, "weight": weight}
