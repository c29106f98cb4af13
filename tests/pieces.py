"""A sentencepiece model as XLM-R and the released BEiT-3 have one, of a few words."""

import pathlib

import sentencepiece

WORDS = ("a black cat on a lawn", "the face of a dog", "red heart, grinning face", "Zwei Köpfe")


def train(path: pathlib.Path, words=WORDS) -> pathlib.Path:
  """Writes one: unigram pieces behind <unk>, <s> and </s>, as sentencepiece has it by default."""
  with path.open("wb") as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(words),
      model_writer=file,
      model_type="unigram",
      vocab_size=60,
      hard_vocab_limit=False,
      num_threads=1,
      minloglevel=2,
    )
  return path
