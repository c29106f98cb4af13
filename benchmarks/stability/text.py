"""Small language models on the bytes of the embedded text, trained by Adam without warm-up."""

import dataclasses
import math
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from magneto_jax import data, optimizers
from magneto_jax.models.language import CausalLM
from magneto_jax.theory import recipes, records


@dataclasses.dataclass(frozen=True)
class Setup:
  """Sizes of model and batch, and how many steps."""

  width: int = 32
  ffn_width: int = 128
  heads: int = 2
  length: int = 32
  batch: int = 8
  steps: int = 200


def batches(setup: Setup, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Inputs and targets [steps, B, T] of the library's own pipeline: bytes, shuffled."""
  with tempfile.TemporaryDirectory() as folder:
    loaded = data.load_text(workdir=folder, tokenizer="byte", seq_length=setup.length)
    iterator = data.train_iterator(loaded.train, batch_size=setup.batch, seed=seed)
    drawn = [next(iterator) for _ in range(setup.steps)]
  return tuple(np.stack([batch[name] for batch in drawn]) for name in ("inputs", "targets"))


def model_of(setup: Setup, recipe: str, layers: int, vocab_size: int, correlation: float):
  """The decoder; `correlation` is how often two of the text's bytes are the same."""
  architecture = records.Architecture(
    "decoder",
    decoder_layers=layers,
    width=setup.width,
    ffn_width=setup.ffn_width,
    heads=setup.heads,
    token_correlation=correlation,
  )
  return CausalLM(
    recipe=recipes.RECIPES[recipe](architecture).decoder,
    vocab_size=vocab_size,
    width=setup.width,
    num_heads=setup.heads,
    ffn_width=setup.ffn_width,
    activation="relu",
    positions="rotary",
  )


def frequencies(targets: np.ndarray) -> np.ndarray:
  """Of each byte among the targets."""
  counts = np.bincount(targets.ravel())
  return counts / counts.sum()


def unigram(targets: np.ndarray) -> float:
  """Nats a token of the best model that knows these targets' frequencies alone."""
  p = frequencies(targets)
  return float(-np.sum(p * np.log(p, out=np.zeros_like(p), where=p > 0)))


def trainer(model: CausalLM, observe: Callable[[dict], jax.Array]) -> Callable:
  """`(params, inputs, targets, rate) -> (losses [steps], observed [steps, ...])`, to be jitted.

  `observe` is given each step's gradients. Adam is the library's, without weight decay; its rate is
  an argument, so that all rates share one compilation.
  """
  optimizer = optimizers.adamw(optax.constant_schedule(1.0), weight_decay=0.0)

  def train(params, inputs_SBT, targets_SBT, rate):
    def mean_loss(params, inputs_BT, targets_BT):
      logits_BTV = model.apply({"params": params}, inputs_BT)
      return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT))

    def step(state, batch):
      params, moments = state
      loss, gradients = jax.value_and_grad(mean_loss)(params, *batch)
      updates, moments = optimizer.update(gradients, moments, params)
      params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
      return (params, moments), (loss, observe(gradients))

    state = params, optimizer.init(params)
    return jax.lax.scan(step, state, (inputs_SBT, targets_SBT))[1]

  return train


def last_tenth(losses: np.ndarray) -> float:
  """The mean of the last tenth of the steps; infinite if any loss is not finite."""
  losses = np.asarray(losses, np.float64)
  if not np.all(np.isfinite(losses)):
    return math.inf
  return float(np.mean(losses[-max(len(losses) // 10, 1) :]))
