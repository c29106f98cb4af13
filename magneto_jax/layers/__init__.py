"""Leaf layers and the residual rule, as plain Linen modules for any project."""

from magneto_jax.layers.attention import Attention, KVCache
from magneto_jax.layers.contrastive import contrastive_loss
from magneto_jax.layers.cross_entropy import (
  binary_cross_entropy,
  cross_entropy,
  vocabulary_logits,
)
from magneto_jax.layers.ctc import ctc_loss, is_alignable
from magneto_jax.layers.feed_forward import FeedForward
from magneto_jax.layers.initializers import DenseInit, bias_init, dense_init, kernel_init
from magneto_jax.layers.log_mel import frame_counts, log_mel, normalize_mel
from magneto_jax.layers.multiway import Multiway, multiway
from magneto_jax.layers.norms import norm_factory
from magneto_jax.layers.patches import PatchEmbedding
from magneto_jax.layers.positions import ROTATIONS, rotary, sinusoidal, xpos
from magneto_jax.layers.quantizer import Quantized, VectorQuantizer
from magneto_jax.layers.residual import Residual, drop_path
from magneto_jax.layers.spec_augment import SpecAugment, spec_augment
from magneto_jax.layers.subsampling import Conv2dSubsampling, ConvSubsampling, VGGSubsampling
from magneto_jax.layers.transducer import fused_transducer_loss, transducer_loss

__all__ = [
  "Attention",
  "Conv2dSubsampling",
  "ConvSubsampling",
  "DenseInit",
  "FeedForward",
  "KVCache",
  "Multiway",
  "PatchEmbedding",
  "Quantized",
  "ROTATIONS",
  "Residual",
  "SpecAugment",
  "VGGSubsampling",
  "VectorQuantizer",
  "bias_init",
  "binary_cross_entropy",
  "contrastive_loss",
  "cross_entropy",
  "ctc_loss",
  "dense_init",
  "drop_path",
  "frame_counts",
  "fused_transducer_loss",
  "is_alignable",
  "kernel_init",
  "log_mel",
  "multiway",
  "norm_factory",
  "normalize_mel",
  "rotary",
  "sinusoidal",
  "spec_augment",
  "transducer_loss",
  "vocabulary_logits",
  "xpos",
]
