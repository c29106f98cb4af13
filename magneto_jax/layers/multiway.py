"""Multiway layers: one expert a modality, chosen by where a token stands in the sequence."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn


class Multiway(nn.Module):
  """y[:, part e] = f_e(x[:, part e]): each modality's tokens pass through an expert of their own.

  The sequence is a concatenation of parts, one a modality. f_e are modules of one kind that act on
  tokens one by one (a projection, a norm); attention between them stays joint.

  Attributes:
    make: factory `(name=...) -> module` of an expert.
    experts: the modalities' names, in the order of their parts.
    lengths: how many tokens each part holds; 0 for a modality that is not there.

  Reference: BEiT-3 (Image as a Foreign Language), arXiv 2208.10442, section 2.1.
  """

  make: Callable[..., nn.Module]
  experts: tuple[str, ...]
  lengths: tuple[int, ...]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, T, ...] to [B, T, ...], where T is the sum of `lengths`."""
    if (
      len(self.lengths) != len(self.experts)
      or min(self.lengths) < 0
      or sum(self.lengths) != x.shape[1]
    ):
      raise ValueError(f"{self.lengths=} of {self.experts=} do not add up to {x.shape[1]} tokens")
    parts, start = [], 0
    for name, length in zip(self.experts, self.lengths, strict=True):
      # Every expert has its parameters, also where the initialising call lacks its modality.
      if length or self.is_initializing():
        y = self.make(name=name)(x[:, start : start + length] if length else x[:, :1])
        if length:
          parts.append(y)
      start += length
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def multiway(
  factory: Callable[..., nn.Module], experts: tuple[str, ...], lengths: tuple[int, ...]
) -> Callable[..., nn.Module]:
  """The factory of layers that hold one of the factory's modules for each expert."""

  def make(*args, name: str | None = None, **kwargs):
    return Multiway(functools.partial(factory, *args, **kwargs), experts, lengths, name=name)

  return make
