"""The vision encoder, and a classifier of images."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from magneto_jax.layers.initializers import dense_init
from magneto_jax.layers.norms import norm_factory
from magneto_jax.layers.patches import PatchEmbedding
from magneto_jax.models.classifier import POOLINGS
from magneto_jax.models.encoder import Encoder
from magneto_jax.theory import records


def relative_rows(height: int, width: int, *, class_token: bool) -> np.ndarray:
  """Which row of the table of relative position biases each pair of an image's tokens reads.

  Of the patches at (y, x) as query and (v, u) as key on a grid of h x w, read row by row,

    row = (y - v + h - 1)(2w - 1) + (x - u + w - 1),

  so that R = (2h - 1)(2w - 1) rows tell all offsets apart. A class token, the first, has three more
  behind them: R of its pairs with the patches as keys, R + 1 of those with patches as queries, and
  R + 2 of the pair with itself.

  Args:
    height, width: h and w, in patches.
    class_token: whether there is one.

  Returns:
    Integers [T, T], queries by keys, with T = hw, and one more for the class token.

  Example:
    >>> relative_rows(1, 2, class_token=True).tolist()
    [[5, 3, 3], [4, 1, 0], [4, 2, 1]]

  Reference: BEiT, arXiv 2106.08254, and its released code.
  """
  y, x = (axis.reshape(-1) for axis in np.indices((height, width)))
  down, right = y[:, None] - y + height - 1, x[:, None] - x + width - 1
  rows_PP = down * (2 * width - 1) + right
  if not class_token:
    return rows_PP
  offsets = (2 * height - 1) * (2 * width - 1)
  rows_TT = np.pad(rows_PP, ((1, 0), (1, 0)), constant_values=offsets)
  rows_TT[1:, 0] = offsets + 1
  rows_TT[0, 0] = offsets + 2
  return rows_TT


class VisionEncoder(nn.Module, kw_only=True):
  """h = encoder(patches(image)): a ViT without a head.

  Attributes:
    encoder: without a vocabulary. With learned positions its max_length is the number of patches,
      and one more for the class token.
    patch_size: p, pixels on a patch's side.
    class_token: whether a class token stands before the patches.
    mask_token: whether patches can be masked, as masked image modelling does.
    relative_grid: (h, w), patches on an image's sides, if all layers share a table of relative
      position biases of the two dimensions (`relative_rows`), which starts at 0; None: no such
      table. Images have these sides then. It goes with any of the encoder's positions, and with
      none of them.

  Reference: An Image is Worth 16x16 Words, arXiv 2010.11929, section 3.1; BEiT, arXiv 2106.08254.
  """

  encoder: Encoder
  patch_size: int = 16
  class_token: bool = True
  mask_token: bool = False
  relative_grid: tuple[int, int] | None = None

  @nn.compact
  def __call__(self, images_BHWC: jax.Array, *, masked_BP: jax.Array | None = None, **kwargs):
    """Encodes images.

    Args:
      images_BHWC: pixels, scaled as the model was trained.
      masked_BP: True for the patches, read row by row, that the mask token replaces.
      **kwargs: see `Encoder`; masks and positions count the class token as the first.

    Returns:
      [B, 1 + P, D] (without a class token [B, P, D]) and, if asked for, the stream.
    """
    patches = PatchEmbedding(
      self.encoder.width,
      self.patch_size,
      projection_init=dense_init(self.encoder.recipe.embedding.patches),
      class_token=self.class_token,
      mask_token=self.mask_token,
      dtype=self.encoder.dtype,
      name="patch_embedding",
    )
    x_BTD = patches(images_BHWC, masked_BP)
    if self.relative_grid is not None:
      grid = tuple(side // self.patch_size for side in images_BHWC.shape[1:3])
      if grid != tuple(self.relative_grid):
        raise ValueError(f"images of {grid} patches do not fit {self.relative_grid=}")
      rows_TT = relative_rows(*grid, class_token=self.class_token)
      shape = (rows_TT.max() + 1, self.encoder.num_heads)
      table_RN = self.param("patch_relative_bias", nn.initializers.zeros, shape)
      kwargs["bias_BNTT"] = table_RN[rows_TT].transpose(2, 0, 1)[None]
    return self.encoder(embeddings_BTD=x_BTD, **kwargs)


class ImageClassifier(nn.Module, kw_only=True):
  """y = W drop(p) + b, p = pool(h), h = encoder(image).

    | pooling | p                                     | of   |
    |---------|---------------------------------------|------|
    | `first` | h_0, of the class token               | ViT  |
    | `mean`  | norm(the mean of h_t over patches)    | BEiT |

  W is drawn from N(0, (0.001 x 0.02)^2), BEiT's, and b is 0: all classes start as good as equally
  likely (ViT has W = 0, which would send no gradient back at first).

  Attributes:
    encoder: with `first` it has a class token.
    classes: C.
    pooling: one of `classifier.POOLINGS`.
    dropout_rate: of the head.
    label_smoothing: e of the targets, in training alone.

  Reference: An Image is Worth 16x16 Words, arXiv 2010.11929, section 3.1; BEiT, arXiv 2106.08254,
  section 2.6.
  Differs: before the mean the recipe's final norm stays, where BEiT has the norm after it alone.
  """

  encoder: VisionEncoder
  classes: int
  pooling: str = "first"
  dropout_rate: float = 0.0
  label_smoothing: float = 0.0

  @nn.compact
  def __call__(
    self,
    images_BHWC: jax.Array,
    *,
    targets: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    recipe: records.Stack | None = None,
    return_hidden_states: bool = False,
    deterministic: bool = True,
  ):
    """Scores [B, C], or what targets cost [B], in float32 or wider; if asked for, the stream.

    Args:
      images_BHWC: see `VisionEncoder`.
      targets: classes [B], other classes [B], and the shares s [B] of the first, for images that
        may be mixed of two: then -sum_c q_c log p_c in nats, p = softmax(y), comes out, with

          q = (1 - e) (s onehot(class) + (1 - s) onehot(other)) + e / C.
      recipe, return_hidden_states: see `Encoder`.
      deterministic: False switches dropout and smoothing on, and needs an rng named `dropout`.
    """
    if self.pooling not in POOLINGS:
      raise ValueError(f"pooling={self.pooling!r} must be one of {', '.join(POOLINGS)}")
    if self.classes < 1:
      raise ValueError(f"classes={self.classes} must be at least 1")
    vision, encoder = self.encoder, self.encoder.encoder
    if self.pooling == "first" and not vision.class_token:
      raise ValueError("pooling='first' reads the class token: set class_token=True")
    out = vision(
      images_BHWC,
      recipe=recipe,
      return_hidden_states=return_hidden_states,
      deterministic=deterministic,
    )
    h_BTD, hidden_LBTD = out if return_hidden_states else (out, None)
    wide = jnp.promote_types(encoder.dtype, jnp.float32)
    if self.pooling == "first":
      p_BD = h_BTD[:, 0]
    else:
      norm = norm_factory(encoder.recipe.norm, epsilon=encoder.norm_epsilon, dtype=encoder.dtype)
      mean_BD = jnp.mean(h_BTD[:, int(vision.class_token) :].astype(wide), axis=1)
      p_BD = norm(name="head_norm")(mean_BD)
    p_BD = nn.Dropout(self.dropout_rate, deterministic=deterministic)(p_BD)
    head = nn.Dense(
      self.classes,
      kernel_init=nn.initializers.normal(0.001 * 0.02),
      dtype=encoder.dtype,
      name="head_out",
    )
    scores_BC = head(p_BD).astype(wide)
    if targets is not None:
      smoothing = 0.0 if deterministic else self.label_smoothing
      scores_BC = soft_cross_entropy(scores_BC, *targets, smoothing=smoothing)
    return (scores_BC, hidden_LBTD) if return_hidden_states else scores_BC


def soft_cross_entropy(
  scores_BC: jax.Array,
  labels_B: jax.Array,
  others_B: jax.Array,
  shares_B: jax.Array,
  *,
  smoothing: float = 0.0,
) -> jax.Array:
  """What the targets cost [B] in nats; see `ImageClassifier`.

  Reference: mixup, arXiv 1710.09412, section 2; Szegedy et al., arXiv 1512.00567, section 7.
  """
  costs_BC = -jax.nn.log_softmax(scores_BC)
  of = lambda classes_B: jnp.take_along_axis(costs_BC, classes_B[:, None], axis=-1)[:, 0]
  mixed_B = shares_B * of(labels_B) + (1 - shares_B) * of(others_B)
  return (1 - smoothing) * mixed_B + smoothing * jnp.mean(costs_BC, axis=-1)
