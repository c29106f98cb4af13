"""Whole models, built from a recipe and sizes."""

from magneto_jax.models.classifier import TextClassifier
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.encoder_decoder import EncoderDecoder
from magneto_jax.models.image_tokenizer import ImageTokenizer, Reconstruction
from magneto_jax.models.language import CausalLM, DecodingState, MaskedLM
from magneto_jax.models.masked_image import Frozen, MaskedImageModel
from magneto_jax.models.multimodal import BEiT3, MaskedBEiT3
from magneto_jax.models.predictors import LSTMPredictor, StatelessPredictor
from magneto_jax.models.speech import CTCRecognizer, SpeechEncoder, SpeechToText, Transducer
from magneto_jax.models.transformer import Block, Context, Stack, StackOutput, init_caches
from magneto_jax.models.vision import ImageClassifier, VisionEncoder

__all__ = [
  "BEiT3",
  "Block",
  "CTCRecognizer",
  "CausalLM",
  "Context",
  "DecodingState",
  "Encoder",
  "EncoderDecoder",
  "Frozen",
  "ImageClassifier",
  "ImageTokenizer",
  "LSTMPredictor",
  "MaskedBEiT3",
  "MaskedImageModel",
  "MaskedLM",
  "Reconstruction",
  "SpeechEncoder",
  "SpeechToText",
  "Stack",
  "StackOutput",
  "StatelessPredictor",
  "TextClassifier",
  "Transducer",
  "VisionEncoder",
  "init_caches",
]
