"""Weights of other libraries, in and out; the command is `python -m magneto_jax.convert`."""

from magneto_jax.convert.fairseq import from_fairseq, to_fairseq
from magneto_jax.convert.files import (
  ConversionError,
  StateDict,
  read_state_dict,
  write_state_dict,
)
from magneto_jax.convert.torchscale import from_torchscale, to_torchscale

__all__ = [
  "ConversionError",
  "StateDict",
  "from_fairseq",
  "from_torchscale",
  "read_state_dict",
  "to_fairseq",
  "to_torchscale",
  "write_state_dict",
]
