"""Connectionist temporal classification: a text's cost where each frame says one label or none."""

import jax
import jax.numpy as jnp
import optax

# The logarithm of 0 in the recursion: below the likelihood of any text, however long or unlikely.
_LOG_ZERO = -1e30


def ctc_loss(
  logits_BTV: jax.Array,
  frames_B: jax.Array,
  labels_BU: jax.Array,
  label_lengths_B: jax.Array,
  blank: int = 0,
) -> jax.Array:
  """-log P(labels) [B] in nats, float32 or wider, P the sum over all alignments.

  An alignment says a label or the blank in each frame. The text is what is left of it once
  repeated labels are taken together and blanks are then taken away.

  Beyond an utterance's frames and labels there may be any numbers, and the gradient is 0. An
  utterance of which `is_alignable` does not hold costs 0, with the gradient 0: nothing can be
  learned from it, and who adds up the losses has to count it.

  Args:
    logits_BTV: of each frame, all finite.
    frames_B: integers in [0, T], how many frames each utterance has.
    labels_BU: integers in [0, V), none of them the blank.
    label_lengths_B: integers in [0, U], how many labels.
    blank: the id of the blank.

  Raises:
    ValueError: shapes that do not belong together, or a blank that is none of V.

  Reference: Graves et al., Connectionist temporal classification, ICML 2006, section 3 and 4. The
  recursion is optax's.
  """
  batch, length, vocab_size = logits_BTV.shape
  if not frames_B.shape == label_lengths_B.shape == labels_BU.shape[:1] == (batch,) or not length:
    raise ValueError(
      f"logits {list(logits_BTV.shape)}, frames {list(frames_B.shape)}, labels"
      f" {list(labels_BU.shape)} and label lengths {list(label_lengths_B.shape)} must be"
      " [B, T, V], [B], [B, U] and [B], with at least one frame"
    )
  check_blank(blank, vocab_size)
  logits_BTV = logits_BTV.astype(jnp.promote_types(logits_BTV.dtype, jnp.float32))
  beyond = lambda x_BS, lengths_B: jnp.arange(x_BS.shape[1])[None] >= lengths_B[:, None]
  # Labels are looked up by a product, whose factors accelerators would round to bfloat16.
  with jax.default_matmul_precision("highest"):
    nats_B = optax.losses.ctc_loss(
      logits_BTV,
      beyond(logits_BTV, frames_B).astype(logits_BTV.dtype),
      labels_BU,
      beyond(labels_BU, label_lengths_B).astype(logits_BTV.dtype),
      blank_id=blank,
      log_epsilon=_LOG_ZERO,
    )
  return jnp.where(is_alignable(frames_B, labels_BU, label_lengths_B), nats_B, 0)


def check_blank(blank: int, vocab_size: int) -> None:
  """Raises ValueError unless the blank is one of the vocabulary's ids."""
  if not 0 <= blank < vocab_size:
    raise ValueError(f"{blank=} must be one of the {vocab_size} ids 0 .. {vocab_size - 1}")


def is_alignable(
  frames_B: jax.Array, labels_BU: jax.Array, label_lengths_B: jax.Array
) -> jax.Array:
  """[B]: whether there are frames enough for the text, and at least one.

  A text needs a frame for each label, and one for the blank between two that are equal.
  """
  within_BU = jnp.arange(1, labels_BU.shape[1])[None] < label_lengths_B[:, None]
  repeats_B = jnp.sum(within_BU & (labels_BU[:, 1:] == labels_BU[:, :-1]), axis=1)
  return frames_B >= jnp.maximum(1, label_lengths_B + repeats_B)
