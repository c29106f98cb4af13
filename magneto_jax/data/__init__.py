"""Texts, images and sounds in, batches out: sources, tokenizers, augmentation, Grain pipelines.

Importing this package loads neither TensorFlow Datasets nor TensorFlow.
"""

from magneto_jax.data.documents import Documents
from magneto_jax.data.images import Classification, ImageData, Images, Spatial, View, load_images
from magneto_jax.data.packing import PackedDataset, TokenStream, tokenize
from magneto_jax.data.pairs import PackedPairs, PairData, load_pairs
from magneto_jax.data.pipelines import eval_batches, train_iterator
from magneto_jax.data.sources import SOURCES, SourceOptions, load_documents
from magneto_jax.data.speech import SpeechData, load_speech
from magneto_jax.data.text import TOKENIZERS, TextData, load_text
from magneto_jax.data.tokenizers import (
  ByteTokenizer,
  CharTokenizer,
  SentencePieceTokenizer,
  Tokenizer,
)

__all__ = (
  "SOURCES",
  "TOKENIZERS",
  "ByteTokenizer",
  "CharTokenizer",
  "Classification",
  "Documents",
  "ImageData",
  "Images",
  "PackedDataset",
  "PackedPairs",
  "PairData",
  "SentencePieceTokenizer",
  "SourceOptions",
  "Spatial",
  "SpeechData",
  "TextData",
  "TokenStream",
  "Tokenizer",
  "View",
  "eval_batches",
  "load_documents",
  "load_images",
  "load_pairs",
  "load_speech",
  "load_text",
  "tokenize",
  "train_iterator",
)
