"""Images of a few pixels, and files of one's own that name them."""

import dataclasses
import io
import json

import numpy as np
from PIL import Image

from magneto_jax.config import AugmentConfig
from magneto_jax.data import captions


def view(size=8, **augment):
  return captions.PictureView.of(
    image_size=size,
    normalization="half",
    eval_crop=1.0,
    augment=dataclasses.asdict(AugmentConfig(**augment)),
  )


def png(seed):
  """The bytes of an image of its own."""
  pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
  written = io.BytesIO()
  Image.fromarray(pixels).save(written, "PNG")
  return written.getvalue()


def write(path, rows):
  """A file of rows, objects or lines as they are, and the images `0.png` ... `9.png` beside it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  for seed in range(10):
    (path.parent / f"{seed}.png").write_bytes(png(seed))
  lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
  path.write_bytes(b"\n".join(lines) + b"\n")
  return [str(path)]


def row(image, *texts, **others):
  return {"image": f"{image}.png", "text": texts[0] if len(texts) == 1 else list(texts), **others}
