"""The record of a task."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from magneto_jax.config import DataConfig, TrainConfig
from magneto_jax.theory.records import Architecture

Batch = dict[str, jax.Array]
Facts = dict[str, int | float]


def weighted_sums(nats_BT: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Sum over tokens of -log p(target) (nats) and the number of tokens, both weighted."""
  return jnp.sum(nats_BT * batch["weights"]), jnp.sum(batch["weights"])


def mean_nats(loss_sum: float, weight_sum: float, data, *, whole: bool) -> dict[str, float]:
  """Nats a token."""
  return {"loss_nats_per_token": loss_sum / weight_sum}


class Task(NamedTuple):
  """What a batch is, its loss and its metrics.

  Attributes:
    load_data: `(config.data, directory for what is derived from it, identity that the data must
      have or None) -> data`.
    facts: `data -> {name: number}`: what a model must know of its data, kept beside its weights.
    describe: `(config, facts) -> lines` that say in words what the config's recipe does.
    build_model: `(config, facts) -> module`.
    dummy_inputs: `config -> positional arguments` that initialise the module.
    architecture: `(config, facts) -> Architecture`: what a recipe is given.
    inputs: `batch -> (positional arguments, keywords)` of the module's call.
    score: `(output, batch) -> (sum of losses, sum of weights)`.
    metrics: `(sum of losses, sum of weights, data, whole=) -> {name: value}` of a validation set,
      or of a part of it.
    baselines: `data -> {metric: {model: value}}`: what trivial models score on the validation set;
      empty where that would take long.
    flops: `(config, facts) -> FLOPs` of one optimizer step.
    planned_facts: `config -> facts` as they would be, without reading data.
    batch_spec: `config -> {name: jax.ShapeDtypeStruct}` of the global batch [batch_size, ...].
  """

  load_data: Callable[[DataConfig, pathlib.Path, Mapping[str, Any] | None], Any]
  facts: Callable[[Any], Facts]
  describe: Callable[[TrainConfig, Facts], list[str]]
  build_model: Callable[[TrainConfig, Facts], nn.Module]
  dummy_inputs: Callable[[TrainConfig], tuple]
  architecture: Callable[[TrainConfig, Facts], Architecture]
  inputs: Callable[[Batch], tuple[tuple, dict[str, Any]]]
  score: Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
  metrics: Callable[..., dict[str, float]]
  baselines: Callable[[Any], dict[str, dict[str, float]]]
  flops: Callable[[TrainConfig, Facts], int]
  planned_facts: Callable[[TrainConfig], Facts]
  batch_spec: Callable[[TrainConfig], dict[str, jax.ShapeDtypeStruct]]

  def loss(
    self, model: nn.Module, params, batch: Batch, dropout_key: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """(sum of losses, sum of weights); with a key in training mode."""
    args, kwargs = self.inputs(batch)
    output = model.apply(
      {"params": params},
      *args,
      deterministic=dropout_key is None,
      rngs=None if dropout_key is None else {"dropout": dropout_key},
      **kwargs,
    )
    return self.score(output, batch)
