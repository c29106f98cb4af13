"""AdamW, its decay mask and its learning-rate schedules (all optax)."""

import jax
import jax.numpy as jnp
import optax

# Leaves of the parameter tree that are matrices: what "weight decay" means where the papers do
# not say. Biases, norm gains, head scales and residual scales are left alone.
DECAYED = ("kernel", "embedding")
SCHEDULES = ("cosine", "linear", "polynomial", "inverse_sqrt", "constant")


def decay_mask(params) -> dict:
  """True for kernels and embedding tables, False for every other parameter.

  It goes by name: a scanned layer's norm gains are of rank 2, so the rank cannot tell them.
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def schedule(
  kind: str,
  *,
  peak: float,
  warmup_steps: int,
  decay_steps: int,
  power: float = 1.0,
  end_factor: float = 0.0,
) -> optax.Schedule:
  """Learning rate by step: linear warm-up from 0, then one of SCHEDULES.

  With p = (step - warmup) / (decay - warmup), clipped to [0, 1], and e = end_factor:

    cosine      peak (e + (1 - e) (1 + cos(pi p)) / 2)
    linear      peak (e + (1 - e) (1 - p))
    polynomial  peak (e + (1 - e) (1 - p)^power)
    constant    peak

  and, with the number of the update n = step + 1, which has no end:

    inverse_sqrt  peak sqrt(w / n), w = warmup or, without one, 1

  Args:
    kind: one of the five.
    peak: the highest learning rate.
    warmup_steps: steps of the warm-up; step 0 has the rate of 1 / warmup of the peak.
    decay_steps: the step at which the decay ends, warm-up included.
    power: of the polynomial.
    end_factor: the last rate over the peak.

  Reference: Attention Is All You Need, arXiv 1706.03762, equation 3 (inverse_sqrt).
  """
  first = max(warmup_steps, 1)
  span = max(decay_steps - warmup_steps, 1)
  tails = {
    "cosine": lambda: optax.cosine_decay_schedule(peak, span, alpha=end_factor),
    "linear": lambda: optax.linear_schedule(peak, peak * end_factor, span),
    "polynomial": lambda: optax.polynomial_schedule(peak, peak * end_factor, power, span),
    "inverse_sqrt": lambda: lambda step: peak * jnp.sqrt(first / (warmup_steps + step + 1)),
    "constant": lambda: optax.constant_schedule(peak),
  }
  if kind not in tails:
    raise ValueError(f"{kind=} must be one of {', '.join(tails)}")
  if not warmup_steps:
    return tails[kind]()
  # The first step is step 1 of the warm-up: a rate of 0 would waste its batch.
  ramp = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
  return optax.join_schedules([ramp, tails[kind]()], [warmup_steps])


def adamw(
  learning_rate: optax.Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.98,
  eps: float = 1e-8,
  weight_decay: float = 0.01,
  clip_norm: float = 0.0,
  decay: str = "matrices",
) -> optax.GradientTransformation:
  """AdamW behind a clip of the global gradient norm.

  Args:
    learning_rate: a schedule.
    b1, b2, eps: see arXiv 1412.6980.
    weight_decay: decoupled (arXiv 1711.05101), multiplied by the learning rate.
    clip_norm: the largest global norm; 0 for no clipping.
    decay: `matrices` (`decay_mask`) or `all`, as fairseq does.
  """
  mask = {"matrices": decay_mask, "all": None}[decay]
  transform = optax.adamw(
    learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask
  )
  return optax.chain(optax.clip_by_global_norm(clip_norm), transform) if clip_norm else transform
