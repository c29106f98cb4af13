"""What tasks share: from a config's fields to recipes, modules and facts."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from magneto_jax.config import ConfigError, DataConfig, ModelConfig, TrainConfig, tasks_reading
from magneto_jax.data import images, text
from magneto_jax.data.tokenizers import ByteTokenizer
from magneto_jax.layers.feed_forward import GATED
from magneto_jax.tasks.task import Facts
from magneto_jax.theory import recipes, records

# So many are counted in a tenth of a second, and settle the frequencies.
COUNTED_TOKENS = 10_000_000

# The recipes whose formulae are of the input's correlation; no other is given it, so that a run
# whose tokens were never counted can still be read.
OF_CORRELATION = ("deepscalelm", "deepscalelm_simple")

# Of an image: red, green and blue.
CHANNELS = 3
# So many samples are shown to a person.
_SHOWN = 8


def architecture(
  config: TrainConfig, facts: Facts, kind: str, *, length: int | None = None, **layers: int
) -> records.Architecture:
  """What the recipe needs to know of a model of this kind; its rows have `length` tokens.

  By default that is `data.seq_length`, a text's.
  """
  model = config.model
  of_input = {}
  if config.recipe in OF_CORRELATION:
    of_input["token_correlation"] = input_correlation(config, facts, length)
  return records.Architecture(
    kind=kind,
    width=model.width,
    ffn_width=model.ffn_width,
    heads=model.heads,
    dropout=model.dropout,
    embedding_tables=_tables(model),
    **layers,
    **of_input,
  )


def _tables(model: ModelConfig) -> int:
  """How many learned tables are summed at the stack's input."""
  return 2 if model.positions == "learned" else 1


def input_correlation(config: TrainConfig, facts: Facts, length: int | None = None) -> float:
  """r_0, the correlation of two tokens of a sample at DeepScaleLM's input, before its dropout.

  Two rows of a table agree if they are the same row: in s = sum_k p_k^2 of the text's pairs of
  tokens, and in none of a sample's pairs of positions. So r_0 = s, and s / 2 with learned
  positions. With sinusoidal ones, of the variance v = 1/2 and the covariance c between two
  positions, r_0 = ((1 - p) s + c) / ((1 - p) + v): tokens have the variance 1 - p. Samples count
  as one document each.

  Raises:
    ConfigError: if the facts are of a run that did not count its tokens.
  """
  if "token_correlation" not in facts:
    raise ConfigError(
      f"this run has no token_correlation, which config.recipe={config.recipe!r} goes by: it was"
      " not started with that recipe; start another in a new workdir"
    )
  same, model = facts["token_correlation"], config.model
  if model.positions != "sinusoidal":
    return same / _tables(model)
  variance, covariance = _sinusoidal_moments(length or config.data.seq_length, model.width)
  tokens = 1 - model.dropout
  return (tokens * same + covariance) / (tokens + variance)


def _sinusoidal_moments(length: int, width: int) -> tuple[float, float]:
  """Mean square of a channel of `layers.sinusoidal`, and mean product over pairs of positions.

  With e_t the encoding of t < T: |e_t|^2 = h = width // 2, and the products of all pairs t != u sum
  to |sum_t e_t|^2 - T h.
  """
  half = width // 2
  frequencies = 10_000.0 ** (-np.arange(half) / max(half - 1, 1))
  turns = np.exp(1j * np.arange(length)[:, None] * frequencies).sum(0)
  pairs = np.sum(np.abs(turns) ** 2) - length * half
  return half / width, float(pairs) / (length * (length - 1) * width)


def recipe(config: TrainConfig, architecture: records.Architecture) -> records.Recipe:
  """The config's recipe for an architecture, with the norms that the config sets."""
  model = config.model
  made = recipes.RECIPES[config.recipe](architecture, **config.recipe_options.chosen())

  def changed(stack: records.Stack | None) -> records.Stack | None:
    if stack is not None and model.qk_norm:
      stack = records.with_qk_norm(stack, None if model.qk_norm == "none" else model.qk_norm)
    return dataclasses.replace(stack, norm=model.norm) if stack and model.norm else stack

  return dataclasses.replace(made, encoder=changed(made.encoder), decoder=changed(made.decoder))


def backbone(config: TrainConfig) -> dict[str, Any]:
  """The keywords of a `Backbone` that the config's model sets, all but its recipe."""
  model = config.model
  return {
    "width": model.width,
    "num_heads": model.heads,
    "ffn_width": model.ffn_width,
    "num_kv_heads": model.kv_heads or None,
    "head_dim": model.head_dim or None,
    "activation": model.activation,
    "use_bias": model.use_bias,
    "positions": model.positions,
    "max_length": config.data.seq_length,
    "xpos_scale_base": model.xpos_scale_base,
    "relative_buckets": model.relative_buckets,
    "relative_max_distance": model.relative_max_distance,
    "window": (model.window, 0) if model.window else None,
    "logits_soft_cap": model.logits_soft_cap or None,
    "dropout_rate": model.dropout,
    "attention_dropout_rate": model.attention_dropout,
    "activation_dropout_rate": model.activation_dropout,
    "drop_path_rate": model.drop_path,
    "remat": model.remat,
    "unroll": model.unroll,
    "dtype": jnp.dtype(model.dtype),
    "attention_implementation": model.attention_implementation or None,
  }


def data_options(config: DataConfig, task: str) -> dict[str, Any]:
  """The fields of the data that a task reads, without the pipeline's; files as their patterns."""
  values = {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if field.name not in ("workers", "prefetch")
    and task in (tasks_reading(f"data.{field.name}") or (task,))
  }
  return {name: paths(x) if name.endswith("_files") else x for name, x in values.items()}


def scoring(config: TrainConfig) -> dict[str, Any]:
  """The keywords of a model that say how targets are scored."""
  return {"vocab_chunk": config.vocab_chunk, "label_smoothing": config.label_smoothing}


def sizes(model: ModelConfig) -> dict[str, Any]:
  """Those of `theory.flops`."""
  return {
    "layers": model.layers,
    "width": model.width,
    "ffn_width": model.ffn_width,
    "heads": model.heads,
    "kv_heads": model.kv_heads or model.heads,
    "head_dim": model.head_dim or model.width // model.heads,
    "gated": model.activation in GATED,
  }


def load_text(
  config: TrainConfig, directory: str | os.PathLike, expected: Mapping[str, Any] | None = None
) -> text.TextData:
  """Documents, tokenizer and token windows; what is derived is kept in `directory`."""
  # What language models alone read, masked or not.
  values = data_options(config.data, "causal_lm")
  return text.load_text(workdir=directory, expected=expected, **values)


def image_options(config: TrainConfig) -> dict[str, Any]:
  """The keywords of `images.Spatial.of`, or `Classification.of`, that the config sets."""
  data = config.data
  return {
    "image_size": config.model.image_size,
    "normalization": data.normalization,
    "eval_crop": data.eval_crop,
    "augment": dataclasses.asdict(data.augment),
  }


def load_images(
  config: TrainConfig, task: str, view: images.View, expected: Mapping[str, Any] | None = None
) -> images.ImageData:
  """The images of the config's source, as the task's view has them."""
  values = data_options(config.data, task)
  for name in ("augment", "normalization", "eval_crop"):  # The view's.
    del values[name]
  return images.load_images(view=view, expected=expected, **values)


def patch_grid(config: TrainConfig) -> tuple[int, int]:
  """(h, w), how many patches an image's sides have."""
  side = config.model.image_size // config.model.patch_size
  return side, side


def patches(config: TrainConfig) -> int:
  """P, how many patches an image has."""
  return math.prod(patch_grid(config))


def image_spec(config: TrainConfig) -> jax.ShapeDtypeStruct:
  """A batch's images."""
  side = config.model.image_size
  return jax.ShapeDtypeStruct((config.batch_size, side, side, CHANNELS), jnp.float32)


def dummy_images(config: TrainConfig) -> tuple:
  """An image that initialises a model."""
  return (jnp.zeros((1, *image_spec(config).shape[1:])),)


def evenly_apart(count: int) -> np.ndarray:
  """Indices of the first, the last, and some between them, of as many as a person is shown."""
  return np.linspace(0, count - 1, min(_SHOWN, count)).astype(int)


def shown(samples: Sequence[Mapping[str, np.ndarray]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """The samples that a person is shown: their indices, and a batch of them."""
  indices = evenly_apart(len(samples))
  found = [samples[i] for i in indices]
  return indices, {name: np.stack([x[name] for x in found]) for name in found[0]}


def correlation_of_noise(config: TrainConfig) -> float:
  """The correlation of two patches that the pixels of noise have; any image's is larger.

  It changes the numbers of DeepScaleLM's recipes, and no shape.
  """
  return 1 / config.model.image_size**2


def token_counts(data: text.TextData) -> np.ndarray:
  """[V], how often each id occurs in the training text's first ten million tokens."""
  return np.bincount(data.train.tokens[:COUNTED_TOKENS], minlength=data.tokenizer.vocab_size)


def answered(
  logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> dict[str, jax.Array]:
  """Sums over tokens by weight: -log p, their number, and how many come first of all."""
  nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
  return {
    "loss": jnp.sum(nats_BT * weights_BT),
    "weight": jnp.sum(weights_BT),
    "correct": jnp.sum((jnp.argmax(logits_BTV, -1) == targets_BT) * weights_BT),
  }


def paths(files: str) -> tuple[str, ...]:
  """The parts of a field that lists files, separated by commas."""
  return tuple(part.strip() for part in files.split(",") if part.strip())


def planned_facts(config: TrainConfig) -> Facts:
  """The facts that a run of the config would have, as far as they are known without its data.

  vocab_size: what the tokenizer will have.
  token_correlation: 1 / V, as if all tokens were as frequent; a text's is larger. It changes the
    numbers of DeepScaleLM's recipes, and no shape.

  Raises:
    ConfigError: the tokenizer is a file, which would have to be read.
  """
  data = config.data
  if data.tokenizer == "byte":
    vocab_size = ByteTokenizer.vocab_size
  elif data.tokenizer_file:
    raise ConfigError(
      f"the vocabulary of data.tokenizer_file={data.tokenizer_file!r} is not known without reading"
      " it: to plan, set data.tokenizer_file='' and data.vocab_size to its size"
    )
  else:
    vocab_size = data.vocab_size
  return {"vocab_size": vocab_size, "token_correlation": 1 / vocab_size}


def refuse_window(config: TrainConfig) -> None:
  """Raises where the config asks for a window: of tokens before, which only a decoder has."""
  if config.model.window:
    raise ConfigError(
      f"model.window={config.model.window} is of earlier tokens, and the encoder of"
      f" config.task={config.task!r} has no order: set model.window=0"
    )
