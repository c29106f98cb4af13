"""Texts, images and sounds in, batches out: sources, tokenizers, augmentation, Grain pipelines.

Importing this package loads neither TensorFlow Datasets nor TensorFlow.
"""

from magneto_jax.data.caption_sources import Emoji, emoji_table
from magneto_jax.data.captions import CaptionData, PictureView, load_captions
from magneto_jax.data.documents import Documents
from magneto_jax.data.images import Classification, ImageData, Images, Spatial, View, load_images
from magneto_jax.data.masked_pairs import Composition, MaskedPairData, load_masked_pairs
from magneto_jax.data.packing import PackedDataset, TokenStream, tokenize
from magneto_jax.data.pairs import PackedPairs, PairData, load_pairs
from magneto_jax.data.pipelines import eval_batches, train_iterator
from magneto_jax.data.questions import QuestionData, load_questions, load_statements
from magneto_jax.data.sources import SOURCES, SourceOptions, load_documents
from magneto_jax.data.speech import SpeechData, load_speech
from magneto_jax.data.text import TOKENIZERS, TextData, load_text
from magneto_jax.data.tokenizers import (
  ByteTokenizer,
  CharTokenizer,
  SentencePieceTokenizer,
  Tokenizer,
  XLMRTokenizer,
)

__all__ = (
  "SOURCES",
  "TOKENIZERS",
  "ByteTokenizer",
  "CaptionData",
  "CharTokenizer",
  "Classification",
  "Composition",
  "Documents",
  "Emoji",
  "ImageData",
  "Images",
  "MaskedPairData",
  "PackedDataset",
  "PackedPairs",
  "PairData",
  "PictureView",
  "QuestionData",
  "SentencePieceTokenizer",
  "SourceOptions",
  "Spatial",
  "SpeechData",
  "TextData",
  "TokenStream",
  "Tokenizer",
  "View",
  "XLMRTokenizer",
  "emoji_table",
  "eval_batches",
  "load_captions",
  "load_documents",
  "load_images",
  "load_masked_pairs",
  "load_pairs",
  "load_questions",
  "load_speech",
  "load_statements",
  "load_text",
  "tokenize",
  "train_iterator",
)
