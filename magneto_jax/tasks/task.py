"""The record of a task."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from magneto_jax.config import DataConfig, TrainConfig

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
    loss: `(module, params, batch, dropout key or None) -> (sum of losses, sum of weights)`.
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
  loss: Callable[[nn.Module, Any, Batch, jax.Array | None], tuple[jax.Array, jax.Array]]
  metrics: Callable[..., dict[str, float]]
  baselines: Callable[[Any], dict[str, dict[str, float]]]
  flops: Callable[[TrainConfig, Any], int]
