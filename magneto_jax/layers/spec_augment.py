"""SpecAugment: bands of frequencies and of time that are hidden in training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class SpecAugment:
  """How many bands of a spectrogram are hidden, and how wide they are.

  Of M bins, and of the tau frames of an utterance, with U{a, ..., b} each of the integers from a to
  b, both of them among these, as likely:

    f ~ U{0, ..., F-1},    f_0 ~ U{0, ..., M-f-1},      bins f_0 to f_0 + f - 1,      n_F times
    t ~ U{0, ..., T'-1},   t_0 ~ U{0, ..., tau-t-1},    frames t_0 to t_0 + t - 1,    n_T' times

    T' = min(T, floor(p tau)),   n_T' = n_T, or with r > 0 min(n_T, floor(r tau))

  So F and T' are never drawn themselves: a width of 1 hides nothing.

    | policy                    | F, n_F | T, n_T | p   | r   |
    |---------------------------|--------|--------|-----|-----|
    | LB                        | 27, 1  | 100, 1 | 1   | 0   |
    | LD                        | 27, 2  | 100, 2 | 1   | 0   |
    | SM                        | 15, 2  | 70, 2  | .2  | 0   |
    | SS                        | 27, 2  | 70, 2  | .2  | 0   |
    | adaptive (1912.05533)     | 27, 2  | 0, 20  | .04 | .04 |
    | adaptive (ESPnet's, 100 h)| 27, 2  | 0, 5   | .05 | 0   |

  Attributes:
    frequency_masks: n_F.
    frequency_width: F, at most M.
    time_masks: n_T.
    time_width: T; 0: no bound but that of the share.
    time_share: p.
    time_mask_share: r, by which longer utterances have more bands.

  Reference: SpecAugment, arXiv 1904.08779, section 2 and table 1; SpecAugment on Large Scale
  Datasets, arXiv 1912.05533 (adaptive).
  Differs: no time warping, which fairseq's recipes switch off too. fairseq fills with the mean of a
  spectrogram, which is 0 where it is normalised first, as here; ESPnet counts the padding of the
  batch in tau.
  """

  frequency_masks: int = 0
  frequency_width: int = 27
  time_masks: int = 0
  time_width: int = 100
  time_share: float = 1.0
  time_mask_share: float = 0.0

  def __post_init__(self):
    counts = self.frequency_masks, self.frequency_width, self.time_masks, self.time_width
    if any(not isinstance(count, int) for count in counts):
      raise ValueError(f"{self} must have counts and widths that are integers")
    if min(counts) < 0 or not (0 < self.time_share <= 1 and 0 <= self.time_mask_share <= 1):
      raise ValueError(f"{self} must have counts of at least 0, and shares of at most 1")


def spec_augment(
  key: jax.Array, mel_BTM: jax.Array, frames_B: jax.Array, policy: SpecAugment
) -> jax.Array:
  """Normalised spectrograms [B, T, M] with 0 in bands that the policy draws for each utterance.

  A function of the key, the policy, the frames of each utterance and its row in the batch: how far
  the batch is padded changes nothing.

  Args:
    key: of the draws.
    mel_BTM: spectrograms, whose mean is 0.
    frames_B: how many frames each has; it may be none.
    policy: see `SpecAugment`.

  Raises:
    ValueError: bands of more than M bins.
  """
  batch, length, bins = mel_BTM.shape
  if policy.frequency_masks and policy.frequency_width > bins:
    raise ValueError(f"frequency_width={policy.frequency_width} is more than the {bins} bins")
  # By table, as a device's float32 may round a product to below a whole number.
  share = lambda of: jnp.asarray(np.floor(of * np.arange(length + 1)), jnp.int32)[frames_B]
  all_B = lambda value: jnp.full((batch,), value, jnp.int32)
  widest_B, count_B = share(policy.time_share), all_B(policy.time_masks)
  if policy.time_width:
    widest_B = jnp.minimum(widest_B, policy.time_width)
  if policy.time_mask_share:
    count_B = jnp.minimum(count_B, share(policy.time_mask_share))
  of_frequency, of_time = jax.random.split(key)
  hidden_BM = _bands(
    of_frequency,
    size=bins,
    most=policy.frequency_masks,
    count_B=all_B(policy.frequency_masks),
    widest_B=all_B(policy.frequency_width),
    total_B=all_B(bins),
  )
  hidden_BT = _bands(
    of_time,
    size=length,
    most=policy.time_masks,
    count_B=count_B,
    widest_B=widest_B,
    total_B=jnp.asarray(frames_B, jnp.int32),
  )
  return jnp.where(hidden_BM[:, None] | hidden_BT[..., None], 0, mel_BTM)


def _bands(key, *, size: int, most: int, count_B, widest_B, total_B) -> jax.Array:
  """[B, size], True in the first `count` of K = `most` bands within the first `total` places."""
  of_width, of_start = jax.random.split(key)
  shape = len(total_B), most
  # Where nothing lies below the upper end, 0 is drawn: a band of no width.
  width_BK = jax.random.randint(of_width, shape, 0, widest_B[:, None])
  start_BK = jax.random.randint(of_start, shape, 0, total_B[:, None] - width_BK)
  width_BK = jnp.where(jnp.arange(most)[None] < count_B[:, None], width_BK, 0)
  place_11S = jnp.arange(size).reshape(1, 1, -1)
  first_BK1, end_BK1 = start_BK[..., None], (start_BK + width_BK)[..., None]
  return jnp.any((first_BK1 <= place_11S) & (place_11S < end_BK1), axis=1)
