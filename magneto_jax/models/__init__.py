"""Whole models, built from a recipe and sizes."""

from magneto_jax.models.classifier import TextClassifier
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.encoder_decoder import EncoderDecoder
from magneto_jax.models.image_tokenizer import ImageTokenizer, Reconstruction
from magneto_jax.models.language import CausalLM, DecodingState, MaskedLM
from magneto_jax.models.masked_image import Frozen, MaskedImageModel
from magneto_jax.models.multimodal import BEiT3, MaskedBEiT3
from magneto_jax.models.transformer import Block, Context, Stack, StackOutput, init_caches
from magneto_jax.models.vision import ImageClassifier, VisionEncoder

__all__ = [
  "BEiT3",
  "Block",
  "CausalLM",
  "Context",
  "DecodingState",
  "Encoder",
  "EncoderDecoder",
  "Frozen",
  "ImageClassifier",
  "ImageTokenizer",
  "MaskedBEiT3",
  "MaskedImageModel",
  "MaskedLM",
  "Reconstruction",
  "Stack",
  "StackOutput",
  "TextClassifier",
  "VisionEncoder",
  "init_caches",
]
