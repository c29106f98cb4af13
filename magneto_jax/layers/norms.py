"""The norms a recipe may name, as factories of Linen modules."""

import functools
from collections.abc import Callable

from flax import linen as nn

NormFactory = Callable[..., nn.Module]

# Statistics are taken in promote_types(dtype, float32); the two-pass variance does not cancel.
NORMS: dict[str, NormFactory] = {
  "layer_norm": functools.partial(nn.LayerNorm, use_fast_variance=False),
  "rms_norm": nn.RMSNorm,
}


def norm_factory(kind: str, *, epsilon: float = 1e-5, dtype=None) -> NormFactory:
  """A factory `(name=...) -> norm` with float32 parameters and the papers' epsilon.

  Args:
    kind: `layer_norm` or `rms_norm`.
    epsilon: added to the variance (or the mean square) before its square root.
    dtype: of the result; None promotes the input's with the parameters' float32.
  """
  if kind not in NORMS:
    raise ValueError(f"{kind=} must be one of {', '.join(NORMS)}")
  return functools.partial(NORMS[kind], epsilon=epsilon, dtype=dtype)
