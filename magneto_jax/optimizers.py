"""AdamW, its decay masks, its learning-rate schedules, and rates by layer (all optax)."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Leaves of the parameter tree that are matrices: what "weight decay" means where the papers do
# not say. Biases, norm gains, head scales and residual scales are left alone.
DECAYED = ("kernel", "embedding")
SCHEDULES = ("cosine", "linear", "polynomial", "inverse_sqrt", "constant")
# Of BEiT's fine-tuning: also what a masked patch is replaced by, and biases by relative position.
_BEIT_DECAYED = (*DECAYED, "mask_token", "relative_bias", "patch_relative_bias")
# What the stream is made of before the first layer.
_BEFORE_LAYERS = re.compile(
  r"(.*/)?(front_end|patch_embedding|(token|text|position)_embedding(s_\w+)?|embedding_norm)/.*"
)
# What stands on an encoder: modules and parameters of that name. Layers have scales of heads, too.
_HEADS = re.compile(r"(?!.*segment_\d)(.*/)?head_\w+(/.*)?")


def decay_mask(params) -> dict:
  """True for kernels and embedding tables, False for every other parameter.

  It goes by name: a scanned layer's norm gains are of rank 2, so the rank cannot tell them.
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def beit_decay_mask(params) -> dict:
  """True for kernels, tables of tokens and of relative biases, and the mask token, as in BEiT.

  So tables of positions, the class token, biases and norms do not decay.
  """

  def decays(path, _) -> bool:
    of_positions = any(key.key.startswith("position_embedding") for key in path)
    return path[-1].key in _BEIT_DECAYED and not of_positions

  return jax.tree_util.tree_map_with_path(decays, params)


DECAY_MASKS = {"matrices": decay_mask, "all": None, "beit": beit_decay_mask}


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
  layer_decay: float = 1.0,
  head_rate: float = 1.0,
) -> optax.GradientTransformation:
  """AdamW behind a clip of the global gradient norm.

  Args:
    learning_rate: a schedule.
    b1, b2, eps: see arXiv 1412.6980.
    weight_decay: decoupled (arXiv 1711.05101), multiplied by the learning rate.
    clip_norm: the largest global norm; 0 for no clipping.
    decay: what decays, one of DECAY_MASKS: `matrices` (`decay_mask`), `all`, as fairseq does, or
      `beit` (`beit_decay_mask`).
    layer_decay: see `layer_scales`; 1 for the same rate everywhere.
    head_rate: see `head_scales`; likewise.
  """
  transforms = [
    optax.adamw(
      learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=DECAY_MASKS[decay]
    )
  ]
  if clip_norm:
    transforms.insert(0, optax.clip_by_global_norm(clip_norm))
  if layer_decay != 1:
    transforms.append(_scale_by(lambda updates: layer_scales(updates, layer_decay)))
  if head_rate != 1:
    transforms.append(_scale_by(lambda updates: head_scales(updates, head_rate)))
  return optax.chain(*transforms) if len(transforms) > 1 else transforms[0]


def _scale_by(scales: Callable) -> optax.GradientTransformation:
  """The updates, whatever they are made of, times the factors that a function gives for them."""

  def scale(updates, params):
    del params
    return jax.tree.map(lambda u, s: u * s.astype(u.dtype), updates, scales(updates))

  return optax.stateless(scale)


def head_scales(params, rate: float) -> dict:
  """What a rate of the head's own multiplies each parameter's update by.

  `rate` for modules and parameters whose names begin with `head_`, which models have on their
  encoders; 1 for all else.

  Raises:
    ValueError: the model has none.

  Reference: BEiT-3, arXiv 2208.10442, its released code (20 for visual question answering).
  """
  heads = jax.tree_util.tree_map_with_path(
    lambda path, _: _HEADS.fullmatch("/".join(key.key for key in path)) is not None, params
  )
  if not any(jax.tree.leaves(heads)):
    raise ValueError(
      f"config.optimizer.head_rate={rate:g} is of a head, and this model has none: set"
      " optimizer.head_rate=1"
    )
  return jax.tree.map(lambda is_head: jnp.float32(rate if is_head else 1), heads)


def layer_scales(params, decay: float) -> dict:
  """What layer-wise decay multiplies each parameter's update by: decay^(L + 1 - i).

    i = 0        front end, patches, class and mask token, tables of tokens and positions, the
                 embedding's norm
    i = 1 .. L   layer i, from the bottom
    i = L + 1    all else: heads, final norm, tables of relative biases

  Args:
    params: a model's, of one stack; arrays or shapes.
    decay: in (0, 1].

  Returns:
    float32 of rank of the parameter, [layers, 1, ...] where layers lie along its first axis and of
    one number elsewhere.

  Raises:
    ValueError: the model has several stacks.

  Reference: BEiT, arXiv 2106.08254, appendix H, and its released code; ELECTRA, arXiv 2003.10555.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  names = ["/".join(key.key for key in path) for path, _ in leaves]
  found = [re.fullmatch(r"(.*?)segment_(\d+)/block_(\d+)/.*", name) for name in names]
  if len({match[1] for match in found if match}) > 1:
    raise ValueError(
      "config.optimizer.layer_decay counts the layers of one stack, and this model has several: set"
      " optimizer.layer_decay=1"
    )
  # By segment: its repeats, and how many layers its pattern has.
  repeats, patterns = {}, {}
  for match, (_, leaf) in zip(found, leaves, strict=True):
    if match:
      segment, block = int(match[2]), int(match[3])
      repeats[segment] = leaf.shape[0]
      patterns[segment] = max(patterns.get(segment, 0), block + 1)
  depth = sum(repeats[segment] * patterns[segment] for segment in repeats)
  scales = []
  for name, match, (_, leaf) in zip(names, found, leaves, strict=True):
    if match:
      segment, block = int(match[2]), int(match[3])
      below = sum(repeats[s] * patterns[s] for s in repeats if s < segment)
      number = below + block + 1 + patterns[segment] * np.arange(repeats[segment])
    else:
      number = np.array(0 if _BEFORE_LAYERS.fullmatch(name) else depth + 1)
    scale = np.asarray(decay ** (depth + 1.0 - number), np.float32)
    shape = (*scale.shape, *(1,) * (leaf.ndim - scale.ndim))
    scales.append(jnp.asarray(scale.reshape(shape)))
  return jax.tree.unflatten(jax.tree.structure(params), scales)
