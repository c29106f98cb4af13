"""Sizes, tables and helpers of the tests of whole models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax.layers import positions as position_layers
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import Architecture
from tests import reference

WIDTH, HEADS, FFN, VOCAB, LENGTH = 16, 2, 32, 17, 8
SIZES = {"width": WIDTH, "num_heads": HEADS, "ffn_width": FFN, "max_length": LENGTH}
RELATIVE = {"positions": "none", "relative_buckets": 8, "relative_max_distance": 10}
KINDS = {kind: {"positions": kind} for kind in position_layers.KINDS} | {"relative": RELATIVE}
STATIC = ("return_hidden_states", "deterministic", "lengths", "method")

# The layer of each recipe in reference.py, its cross-attention and its final norm.
PAPERS = {
  "pre_ln": (reference.pre_ln, reference.cross_pre_ln, reference.layer_norm),
  "post_ln": (reference.post_ln, reference.cross_post_ln, None),
  "magneto": (reference.magneto, reference.cross_pre_ln, reference.layer_norm),
  "deepnet": (reference.deepnet, reference.cross_deepnet, None),
  "normformer": (reference.normformer, reference.cross_pre_ln, reference.layer_norm),
  "magneto_torchscale": (reference.magneto, reference.cross_pre_ln, reference.layer_norm),
  "deepnet_torchscale": (reference.deepnet, reference.cross_deepnet, None),
  "pre_ln_scaled_init": (reference.pre_ln, reference.cross_pre_ln, reference.layer_norm),
  "sandwich_ln": (reference.sandwich_ln, reference.cross_sandwich_ln, reference.layer_norm),
  "peri_ln": (reference.sandwich_ln, reference.cross_sandwich_ln, reference.layer_norm),
  "out_norm": (reference.out_norm, reference.cross_out_norm, reference.layer_norm),
  "olmo2": (reference.olmo2, reference.cross_olmo2, reference.rms_norm),
  "layernorm_scaling": (
    reference.layernorm_scaling,
    reference.cross_layernorm_scaling,
    reference.layer_norm,
  ),
  "layer_scale": (reference.layer_scale, reference.cross_layer_scale, reference.layer_norm),
  "rezero": (reference.rezero, reference.cross_rezero, None),
  "depth_mup": (reference.depth_mup, reference.cross_depth_mup, reference.layer_norm),
  "completep": (reference.completep, reference.cross_completep, reference.layer_norm),
  "keel": (reference.keel, reference.cross_keel, None),
  "deepscalelm": (reference.deepscalelm, reference.cross_deepscalelm, reference.layer_norm),
  "deepscalelm_simple": (reference.deepscalelm, reference.cross_deepscalelm, reference.layer_norm),
}


def recipe(name="magneto", kind="encoder", layers=None):
  if layers is None:
    layers = 3 if name.startswith("deepscalelm") else 2  # Two layers of it have no skip.
  depths = {f"{stack}_layers": layers for stack in kind.split("_")}
  return RECIPES[name](Architecture(kind, **depths, width=WIDTH, ffn_width=FFN, heads=HEADS))


def embedding_of(name):
  """The scale of tokens and the norm of the embedding, for the reference."""
  unscaled = "torchscale" in name or name == "olmo2"
  norm = reference.layer_norm if name == "peri_ln" else None
  return {"scale": 1.0 if unscaled else WIDTH**0.5, "embedding_norm": norm}


def main_and_slow(names, main):
  """The names of a table, those that are not in `main` for `pytest -m slow`."""
  return [n if n in main else pytest.param(n, marks=pytest.mark.slow) for n in names]


def compiled(fn, **options):
  """`fn`, jitted without LLVM's optimisations, which take longer than so small models run."""
  return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0}, **options)


def run(model, params, *args, **inputs):
  call = compiled(model.apply, static_argnames=STATIC)
  return jax.tree.map(np.asarray, call({"params": params}, *args, **inputs))


def in_float64(module, *args, **inputs):
  """The module's output, and its parameters."""
  with jax.enable_x64(True):
    # JAX would pass NumPy's integers in 32 bits if it has done so before, without x64.
    given = lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x
    args, inputs = jax.tree.map(given, (args, inputs))
    params = reference.random_params(module, *args, dtype=np.float64, **inputs)
    return run(module, params, *args, **inputs), params
