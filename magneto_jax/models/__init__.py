"""Whole models, built from a recipe and sizes."""

from magneto_jax.models.beit3 import BEiT3, caption_mask
from magneto_jax.models.classifier import TextClassifier
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.encoder_decoder import EncoderDecoder
from magneto_jax.models.image_tokenizer import Frozen, ImageTokenizer, Reconstruction
from magneto_jax.models.language import CausalLM, DecodingState, MaskedLM
from magneto_jax.models.masked_image import MaskedImageModel
from magneto_jax.models.predictors import LSTMPredictor, StatelessPredictor
from magneto_jax.models.speech import CTCRecognizer, SpeechEncoder, SpeechToText, Transducer
from magneto_jax.models.transformer import Block, Context, Stack, StackOutput, init_caches
from magneto_jax.models.vision import ImageClassifier, VisionEncoder
from magneto_jax.models.vision_language import (
  AnsweringBEiT3,
  CaptioningBEiT3,
  Features,
  MaskedBEiT3,
  Parts,
  ReasoningBEiT3,
  RetrievalBEiT3,
)

__all__ = [
  "AnsweringBEiT3",
  "BEiT3",
  "Block",
  "CTCRecognizer",
  "CaptioningBEiT3",
  "CausalLM",
  "Context",
  "DecodingState",
  "Encoder",
  "EncoderDecoder",
  "Features",
  "Frozen",
  "ImageClassifier",
  "ImageTokenizer",
  "LSTMPredictor",
  "MaskedBEiT3",
  "MaskedImageModel",
  "MaskedLM",
  "Parts",
  "ReasoningBEiT3",
  "Reconstruction",
  "RetrievalBEiT3",
  "SpeechEncoder",
  "SpeechToText",
  "Stack",
  "StackOutput",
  "StatelessPredictor",
  "TextClassifier",
  "Transducer",
  "VisionEncoder",
  "caption_mask",
  "init_caches",
]
