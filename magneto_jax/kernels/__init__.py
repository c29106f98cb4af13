"""Attention kernels: one function, one reference, any number of implementations."""

from magneto_jax.kernels.attention import (
  CHECKPOINT_NAMES,
  Choice,
  choose,
  dot_product_attention,
  use_implementation,
)
from magneto_jax.kernels.attention_chunked import XlaChunked
from magneto_jax.kernels.attention_cudnn import Cudnn
from magneto_jax.kernels.attention_gpu import Blocks, PallasGpu
from magneto_jax.kernels.attention_tpu import PallasTpu
from magneto_jax.kernels.bias import RelativeBias, relative_buckets
from magneto_jax.kernels.sharded import sharded_attention

__all__ = [
  "CHECKPOINT_NAMES",
  "Blocks",
  "Choice",
  "Cudnn",
  "PallasGpu",
  "PallasTpu",
  "RelativeBias",
  "XlaChunked",
  "choose",
  "dot_product_attention",
  "relative_buckets",
  "sharded_attention",
  "use_implementation",
]
