"""Image-text retrieval: images and texts as vectors, found by each other's.

A model of two towers that are one encoder: images alone, and texts alone, become features of length
1 (`models.RetrievalBEiT3`). The loss is contrastive: of a batch's texts its own is an image's, and
of its images its own a text's; all other pairs of the global batch, whatever the mesh, are taken
not to match, also another text of the same image. It is measured by recall at 1, 5 and 10, both
ways, over the whole validation set: one feature an image, all of its texts.

A contrastive loss is of a batch as a whole, so that parts of one (`accumulation`) would have
another loss: they are refused (`config`), as are evaluations of a part of the validation set, which
would find more among fewer.

Reference: BEiT-3, arXiv 2208.10442, section 3.1.5, and its released code; CLIP, arXiv 2103.00020.
"""

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax.config import TrainConfig
from magneto_jax.data import captions, scores
from magneto_jax.data.tokenizers import Tokenizer
from magneto_jax.decoding import Embedder
from magneto_jax.layers import contrastive_loss
from magneto_jax.models import RetrievalBEiT3
from magneto_jax.models.vision_language import Features
from magneto_jax.reporting import Row
from magneto_jax.tasks import beit3, common, vision_language
from magneto_jax.tasks.task import Batch, Facts, Task, Totals

TOP = (1, 5, 10)
_WAYS = {
  "image_recall_at_k": "text to image: texts whose image is among the k nearest",
  "text_recall_at_k": "image to text: images of which a text is among the k nearest",
}
# Of a picture: how many queries, how many are found for each, and among how many images.
_QUERIES, _FOUND, _AMONG = 4, 8, 256


def load_data(
  config: TrainConfig, directory: str | os.PathLike, expected: Mapping[str, Any] | None = None
) -> captions.CaptionData:
  """Images with their texts."""
  given = vision_language.options(config)
  return captions.load_captions(workdir=directory, expected=expected, **given)


def build_model(config: TrainConfig, facts: Facts) -> RetrievalBEiT3:
  """The config's encoder with a projection a modality."""
  return RetrievalBEiT3(
    encoder=beit3.encoder(config, facts), scale_max=config.model.scale_max or None
  )


def inputs(batch: Batch) -> tuple[tuple, dict[str, Any]]:
  """The model's arguments: images and texts, of those that are there."""
  given = batch.get("image"), batch.get("text")
  return given, {"mask_BT": batch["mask"]} if "text" in batch else {}


def score(found: Features, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Sum over pairs of the mean of both directions' -log p (nats), and the number of pairs.

  Of images alone, which `observed` leaves, a loss that each has by itself, as a contrastive one is
  none: -log p of the first of its features.
  """
  weights_B = batch["weights"]
  if found.texts_BE is None:
    nats_B = -jax.nn.log_softmax(found.scale * found.images_BE)[:, 0]
  else:
    both = contrastive_loss(found.images_BE, found.texts_BE, found.scale, weights_B > 0)
    nats_B = sum(both) / 2
  return jnp.sum(nats_B * weights_B), jnp.sum(weights_B)


def observed(batch: Batch) -> Batch:
  """The images, as the encoder reads images and texts one after the other."""
  return {name: batch[name] for name in ("image", "weights")}


def measure(model: RetrievalBEiT3, variables, batch: Batch) -> dict[str, jax.Array]:
  """The loss's sums, of the batch's own pairs, and of every pair both features and its image."""
  args, kwargs = inputs(batch)
  found = model.apply(variables, *args, **kwargs)
  loss, weight = score(found, batch)
  return {
    "loss": loss,
    "weight": weight,
    "images": found.images_BE,
    "texts": found.texts_BE,
    "image_id": batch["image_id"],
  }


def metrics(totals: Totals, data: captions.CaptionData, *, whole: bool) -> dict[str, float]:
  """Recalls over all pairs that were read, and their mean.

  loss_nats_per_pair: of the batches' own pairs.
  image_recall_at_k: texts whose image is among the k nearest of all, in percent.
  text_recall_at_k: images of which a text is among the k nearest of all, in percent.
  mean_recall: of all of these, by which BEiT-3 chooses.
  """
  _, first, owners_M = np.unique(totals["image_id"], return_index=True, return_inverse=True)
  similarities_NM = totals["images"][first] @ totals["texts"].T
  found = scores.retrieval_recalls(similarities_NM, owners_M, TOP)
  mean = float(np.mean(list(found.values())))
  return {"loss_nats_per_pair": totals["loss"] / totals["weight"], **found, "mean_recall": mean}


def baselines(data: captions.CaptionData) -> dict[str, dict[str, float]]:
  """What a random order of all images, and of all texts, would recall, in percent.

  Of an image with n of M texts, 1 - C(M - n, k) / C(M, k).
  """
  texts_N = np.unique(data.rows.image_of, return_counts=True)[1]
  images, texts = len(texts_N), int(texts_N.sum())
  found = {f"image_recall_at_{k}": min(k / images, 1.0) for k in TOP}
  for k in TOP:
    # Of the first k all are others'.
    ways = math.comb(texts, min(k, texts))
    missed_N = [math.comb(texts - int(n), min(k, texts)) / ways for n in texts_N]
    found[f"text_recall_at_{k}"] = 1 - float(np.mean(missed_N))
  found["mean_recall"] = float(np.mean(list(found.values())))
  return {name: {"chance": 100 * value} for name, value in found.items()}


def embedder(
  config: TrainConfig, model: RetrievalBEiT3, variables, tokenizer: Tokenizer, *, rows: int = 32
) -> Embedder:
  """What makes features of any images and texts."""
  return Embedder(
    model, variables, tokenizer, vision_language.see(config), config.data.seq_length, rows
  )


# ---------------------------------------------------------------------------------------------
# What a person sees
# ---------------------------------------------------------------------------------------------


class _Found(NamedTuple):
  """Of the first validation images: their `image_id`s, the rows of their texts, and features."""

  images: np.ndarray
  rows: np.ndarray
  images_NE: np.ndarray
  texts_ME: np.ndarray


def _embedded(
  config: TrainConfig, model: RetrievalBEiT3, variables, data: captions.CaptionData
) -> _Found:
  images = np.unique(data.rows.image_of)[:_AMONG]
  rows = np.flatnonzero(np.isin(data.rows.image_of, images))
  embed = embedder(config, model, variables, data.tokenizer)
  pictures = (data.rows.pictures[int(i)]["image"] for i in images)
  texts = [data.rows.texts[i] for i in rows]
  # As the rows have them: a text that is too long for the model is cut off there.
  return _Found(images, rows, embed.images(pictures), embed.texts(texts, cut=data.cut))


def sample(
  config: TrainConfig, model: RetrievalBEiT3, variables, data: captions.CaptionData, key: jax.Array
) -> str:
  """For some of the validation images, which text is nearest, and a text of theirs."""
  del key
  found, references = _embedded(config, model, variables, data), data.references()
  lines = []
  for n in common.evenly_apart(len(found.images))[:_QUERIES]:
    scores_M = found.texts_ME @ found.images_NE[n]
    best = int(np.argmax(scores_M))
    text, own = data.rows.texts[found.rows[best]], references[found.images[n]]
    lines.append(f"{text} ({scores_M[best]:.2f})\n  (reference: {own[0]})")
  return f"the nearest of {len(found.rows):,} texts to images:\n" + "\n".join(lines)


def picture(
  config: TrainConfig, model: RetrievalBEiT3, variables, data: captions.CaptionData
) -> list[Row]:
  """Validation texts with the images that are nearest, and images with the text that is nearest."""
  found = _embedded(config, model, variables, data)
  show = lambda numbers: vision_language.as_shown(
    config, [data.rows.pictures[int(found.images[n])]["image"] for n in numbers]
  )
  rows = []
  for m in common.evenly_apart(len(found.rows))[:_QUERIES]:
    scores_N = found.images_NE @ found.texts_ME[m]
    nearest = np.argsort(-scores_N, kind="stable")[:_FOUND]
    own = data.rows.image_of[found.rows[m]]
    mark = lambda n, own=own: " (its own)" if found.images[n] == own else ""
    told = [f"{scores_N[n]:.2f}{mark(n)}" for n in nearest]
    title = f"nearest to: {data.rows.texts[found.rows[m]]}"
    rows.append(Row(title, show(nearest), told))
  asked = common.evenly_apart(len(found.images))
  best = np.argmax(found.images_NE[asked] @ found.texts_ME.T, axis=1)
  texts = [data.rows.texts[found.rows[m]] for m in best]
  return [*rows, Row("images, and the text that is nearest to each", show(asked), texts)]


def batch_spec(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """image: pixels. image_id: the number of the distinct image. Others: see the shared one."""
  own = {"image": vision_language.image_shape(config), "image_id": ((), jnp.int32)}
  return vision_language.batch_spec(config, **own)


def flops(config: TrainConfig, facts: Facts) -> int:
  """FLOPs of one step, padding included; see `theory.flops`."""
  width = config.model.width
  lengths = 1 + common.patches(config), config.data.seq_length
  towers = sum(vision_language.products(config, length) for length in lengths)
  similarities = config.batch_size * width
  return vision_language.step_flops(config, towers + 2 * width**2 + similarities)


TASK = Task(
  load_data=load_data,
  facts=vision_language.facts,
  describe=vision_language.describe,
  build_model=build_model,
  dummy_inputs=vision_language.dummy_inputs,
  architecture=beit3.architecture,
  inputs=inputs,
  score=score,
  observed=observed,
  metrics=metrics,
  baselines=baselines,
  flops=flops,
  planned_facts=vision_language.planned_facts,
  batch_spec=batch_spec,
  measure=measure,
  sample=sample,
  picture=picture,
  signatures=lambda config: dict(_WAYS),
  embedder=embedder,
  loss_name="loss_nats_per_pair",
  best=("mean_recall", True),
  unit="pairs",
  size=lambda config: 1,
  length=vision_language.length,
  pretrained="encoder",
)
