"""Weights of other libraries, in and out; the command is `python -m magneto_jax.convert`."""

from magneto_jax.convert.beit3 import from_beit3, to_beit3
from magneto_jax.convert.fairseq import from_fairseq, to_fairseq
from magneto_jax.convert.files import (
  ConversionError,
  StateDict,
  read_state_dict,
  write_state_dict,
)
from magneto_jax.convert.saved import load, save
from magneto_jax.convert.torchscale import from_torchscale, to_torchscale

__all__ = [
  "ConversionError",
  "StateDict",
  "from_beit3",
  "from_fairseq",
  "from_torchscale",
  "load",
  "read_state_dict",
  "save",
  "to_beit3",
  "to_fairseq",
  "to_torchscale",
  "write_state_dict",
]
