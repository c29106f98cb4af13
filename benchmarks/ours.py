"""This library's side: its real train step, loss and decoding."""

import dataclasses
import functools
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.shapes import Shape
from magneto_jax import decoding, kernels, program
from magneto_jax.config import OptimizerConfig
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.language import CausalLM, MaskedLM
from magneto_jax.tasks import causal_lm
from magneto_jax.theory import recipes, records

# What a variant changes: `recipe`, or a field of the model.
VARIANTS = {
  "magneto_jax": {},
  "magneto_jax-unrolled": {"unroll": -1},
  "magneto_jax-pre_ln": {"recipe": "pre_ln"},
}


# Attention knows no documents.
_WHOLE = causal_lm.TASK._replace(
  inputs=lambda batch: (
    (batch["inputs"],),
    {"positions_BT": batch["positions"], "targets_BT": batch["targets"]},
  )
)


def build_model(shape: Shape, *, recipe: str = "magneto", **options) -> nn.Module:
  """The shape's model; options are fields of the model (unroll, remat, dtype by its name)."""
  kind = "decoder" if shape.causal else "encoder"
  record = recipes.RECIPES[recipe](
    records.Architecture(kind=kind, **{f"{kind}_layers": shape.layers}, width=shape.width)
  )
  sizes = {
    "recipe": getattr(record, kind),
    "vocab_size": shape.vocab_size,
    "width": shape.width,
    "num_heads": shape.heads,
    "ffn_width": shape.ffn_width,
    "positions": "learned",
    "max_length": shape.max_length,
  }
  if "dtype" in options:
    sizes["dtype"] = jnp.dtype(options.pop("dtype"))
  if shape.causal:
    return CausalLM(**sizes, **options)
  return MaskedLM(encoder=Encoder(**sizes, **options), head="linear")


def _batch(shape: Shape) -> dict[str, np.ndarray]:
  """The shape's batch as a task's loss takes it; padding is a segment of its own."""
  batch = shape.batch()
  positions = np.broadcast_to(np.arange(shape.seq_length, dtype=np.int32), batch["inputs"].shape)
  return {
    "inputs": batch["inputs"],
    "targets": batch["targets"],
    "positions": positions,
    "segment_ids": (positions < batch["lengths"][:, None]).astype(np.int32),
    "weights": np.ones(positions.shape, np.float32),
  }


class Library:
  """A variant of this library, ready to be timed; the methods return when the work is done.

  Args:
    variant, shape: what is built.
    segments: whether attention is told the documents, as in training; if not, a row is one.
    options: fields of the model.
  """

  def __init__(self, variant: str, shape: Shape, *, segments: bool = True, **options):
    self._shape, self._compiled = shape, {}
    self._model = build_model(shape, **VARIANTS[variant] | options)
    self._batch = jax.tree.map(jnp.asarray, _batch(shape))
    init, step = _init_and_step(self._model, self._batch, causal_lm.TASK if segments else _WHOLE)
    self._state = jax.jit(init)(jax.random.key(0))
    self._key = jax.random.key(1)
    self._step = jax.jit(step, donate_argnums=0)
    self._forward = jax.jit(functools.partial(causal_lm.TASK.loss, self._model))
    self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self._state.params))
    self.versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")}

  def compile(self) -> dict[str, float]:
    """Compiles the step; seconds, and what it needs of the device, its state included."""
    begin = time.perf_counter()
    self._step = self._step.lower(self._state, self._batch, self._key).compile()
    seconds = time.perf_counter() - begin
    memory = self._step.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {"compile_s": seconds, "memory_gib": needed / 2**30}

  def step(self) -> float:
    """One train step; returns the mean loss before it."""
    self._state, metrics = self._step(self._state, self._batch, self._key)
    return float(jax.block_until_ready(metrics)["loss"])

  def forward(self) -> float:
    """The mean loss alone."""
    loss_sum, weight_sum = self._forward(self._state.live_variables, self._batch)
    return float(loss_sum) / float(weight_sum)

  def gradient(self) -> float:
    """Loss and gradient, without the optimizer."""
    gradient = _gradient(self._model, self._batch)
    return self._timed("gradient", gradient, self._state.params)

  def layers_gradient(self) -> float:
    """The same for two tokens in the vocabulary: next to nothing but the layers."""
    model = build_model(dataclasses.replace(self._shape, vocab_size=2))
    batch = {**self._batch, **{k: self._batch[k] % 2 for k in ("inputs", "targets")}}
    is_table = lambda path: "token_embedding" in jax.tree_util.keystr(path)
    params = jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf[:2] if is_table(path) else leaf, self._state.params
    )
    return self._timed("layers", _gradient(model, batch), params)

  def attention_gradient(self) -> float:
    """The gradient of one layer's attention between its projections."""
    shape, ids_BT = self._shape, self._batch["segment_ids"]
    heads = (shape.batch_size, shape.seq_length, shape.heads, shape.width // shape.heads)
    q, k, v = jax.random.normal(jax.random.key(3), (3, *heads), jnp.float32)

    def mean_square(q, k, v):
      attend = functools.partial(kernels.dot_product_attention, is_causal=shape.causal)
      return jnp.mean(attend(q, k, v, q_segment_ids=ids_BT, kv_segment_ids=ids_BT) ** 2)

    return self._timed("attention", jax.value_and_grad(mean_square, argnums=(0, 1, 2)), q, k, v)

  def optimizer(self) -> float:
    """The update and its application, with the parameters for gradients."""

    def update(params, opt_state):
      updates, opt_state = _optimizer().update(params, opt_state, params)
      return optax.apply_updates(params, updates), opt_state

    return self._timed("optimizer", update, self._state.params, self._state.opt_state)

  def _timed(self, name: str, function, *args) -> float:
    """Runs a function that is compiled once."""
    if name not in self._compiled:
      self._compiled[name] = jax.jit(function)
    jax.block_until_ready(self._compiled[name](*args))
    return 0.0

  def decode(self, *, batch_size: int, prompt_length: int, new_tokens: int) -> int:
    """Continues prompts greedily; returns how many tokens are new."""
    prompts = np.asarray(self._batch["inputs"])[:batch_size, :prompt_length]
    tokens = decoding.generate(
      self._model,
      {"params": self._state.params},
      list(prompts),
      max_new_tokens=new_tokens,
      temperature=0,
    )
    return sum(map(len, tokens))


def compile_step(variant: str, shape: Shape, **options) -> dict[str, float]:
  """Seconds to trace and compile a train step, and the size of what it compiles to."""
  batch = jax.tree.map(jnp.asarray, _batch(shape))
  init, step = _init_and_step(build_model(shape, **VARIANTS[variant] | options), batch)
  state = jax.eval_shape(init, jax.random.key(0))
  begin = time.perf_counter()
  lowered = jax.jit(step, donate_argnums=0).lower(state, batch, jax.random.key(1))
  traced = time.perf_counter()
  compiled = lowered.compile()
  end = time.perf_counter()
  return {
    "trace_s": traced - begin,
    "compile_s": end - traced,
    "temporaries_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    "hlo_lines": compiled.as_text().count("\n"),
  }


def _init_and_step(model, batch, task=causal_lm.TASK):
  """The functions `key -> state` and `(state, batch, key) -> (state, metrics)` of training."""
  optimizer = _optimizer()
  inputs = (batch["inputs"][:1],)
  init = functools.partial(
    program.init_state, model=model, inputs=inputs, optimizer=optimizer, ema=0.0
  )
  step = functools.partial(program.train_step, model=model, task=task, optimizer=optimizer)
  return init, step


def _optimizer():
  return program.make_optimizer(OptimizerConfig(schedule="constant"), steps=1)[0]


def _gradient(model, batch):
  """`params -> (mean loss, gradient)`."""

  def mean_loss(params):
    loss_sum, weight_sum = causal_lm.TASK.loss(model, {"params": params}, batch)
    return loss_sum / weight_sum

  return jax.value_and_grad(mean_loss)
