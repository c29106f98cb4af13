"""Foundation transformers in JAX: recipes as data, layers, models, training.

Importing this package is cheap: what reads data sets or checkpoints is imported when it is used.
"""

import importlib
import importlib.metadata

from magneto_jax import interop, kernels, layers, models
from magneto_jax.layers import initializers
from magneto_jax.models.language import CausalLM
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import Architecture, Recipe
from magneto_jax.theory.stability import recommend

__version__ = importlib.metadata.version("magneto_jax")

__all__ = [
  "RECIPES",
  "Architecture",
  "CausalLM",
  "Recipe",
  "convert",
  "diagnose",
  "evaluate",
  "initializers",
  "interop",
  "kernels",
  "layers",
  "load",
  "models",
  "recommend",
  "train",
]


def load(workdir, *, step=None):
  """The pair (model, variables) of a run or of a converted model; see `runs.load`."""
  from magneto_jax import runs  # Orbax takes seconds to import.

  return runs.load(workdir, step=step)


def __getattr__(name: str):
  if name in ("convert", "diagnose", "evaluate", "train"):  # What they import takes seconds.
    return importlib.import_module(f"magneto_jax.{name}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
