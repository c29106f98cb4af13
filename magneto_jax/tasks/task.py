"""The record of a task."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from magneto_jax.config import DataConfig, TrainConfig
from magneto_jax.theory.records import Architecture

Batch = dict[str, jax.Array]
Facts = dict[str, int | float]


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
    flops: `(config, data) -> FLOPs` of one optimizer step.
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
  flops: Callable[[TrainConfig, Any], int]
  batch_spec: Callable[[TrainConfig], Any] = None

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
