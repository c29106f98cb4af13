"""What needs no neural network: counts of bytes and a compressor that predict a text, and captions
that say the same of every image."""

import collections
import functools
import itertools
import lzma
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import sparse

from magneto_jax.data import scores

# Of how many texts and images, evenly apart, constant captions are chosen.
_CHOSEN_OF = 4000
# The longest n-grams of chrF, and how much more its recall counts.
_CHRF_ORDER, _CHRF_BETA = 6, 2
# Keywords of which a caption is made, at most.
_MOST_WORDS = 20


def bits_per_byte(train: Iterable[str], validation: Iterable[str]) -> dict[str, float]:
  """Bits a byte of the validation text for three models of the training text.

    unigram   -mean log2 p(y_t),          p(y) = (1 + n(y)) / sum_y (1 + n(y))
    bigram    -mean log2 p(y_t | y_t-1),  likewise with the counts of pairs
    xz        8 (|xz(train validation)| - |xz(train)|) / |validation|, at `xz -9e`

  Counts n are of the training text's bytes; a bigram's mean leaves out the first byte. Texts are
  joined by a blank line and held in memory, which xz needs ten times over: for megabytes.

  Args:
    train: the training documents.
    validation: the validation documents.

  Returns:
    {"unigram", "bigram", "xz"}: bits a byte; nothing for a validation text of one byte or none.
  """
  train, validation = ("\n\n".join(texts).encode() for texts in (train, validation))
  if len(validation) < 2:
    return {}
  x, y = (np.frombuffer(text, np.uint8).astype(np.int64) for text in (train, validation))
  single = 1.0 + np.bincount(x, minlength=256)
  pairs = 1.0 + np.bincount(256 * x[:-1] + x[1:], minlength=256 * 256).reshape(256, 256)
  log2_single = np.log2(single / single.sum())
  log2_pairs = np.log2(pairs / pairs.sum(axis=1, keepdims=True))
  return {
    "unigram": float(-np.mean(log2_single[y])),
    "bigram": float(-np.mean(log2_pairs[y[:-1], y[1:]])),
    "xz": 8 * (_xz_bytes(train + validation) - _xz_bytes(train)) / len(validation),
  }


def _xz_bytes(text: bytes) -> int:
  return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def constant_captions(texts: Sequence[str], keywords: Sequence[Sequence[str]]) -> dict[str, str]:
  """Captions that are the same for every image, chosen on training data alone.

  They see no image, and what a model writes is to be better than the best of them.

  Args:
    texts: of training.
    keywords: of each training image, what a caption's words are held against; see
      `scores.keyword_f1`. Of more than 4,000 texts or images as many evenly apart are read.

  Returns:
    commonest_caption: of several the first.
    best_caption_by_keyword_f1: the text with the largest keyword F1 as the caption of all images.
    best_caption_by_chrf: likewise with the largest corpus chrF, all texts being the references.
    commonest_keywords: the k commonest words of all keywords, with the k of the largest F1.
  """
  ((commonest, _),) = collections.Counter(texts).most_common(1)
  texts, keywords = _evenly(texts), _evenly([held for held in keywords if held])
  words = collections.Counter()
  for of_image in keywords:
    words.update(frozenset().union(*map(scores.words_of, of_image)))
  ranked = sorted(words, key=lambda word: (-words[word], word))[:_MOST_WORDS]
  listed = [", ".join(ranked[:k]) for k in range(1, len(ranked) + 1)]
  best = lambda captions, values: captions[int(np.argmax(values))]
  return {
    "commonest_caption": commonest,
    "best_caption_by_keyword_f1": best(texts, keyword_f1_of_constants(texts, keywords)),
    "best_caption_by_chrf": best(texts, chrf_of_constants(texts, texts)),
    "commonest_keywords": best(listed, keyword_f1_of_constants(listed, keywords)),
  }


def keyword_f1_of_constants(
  captions: Sequence[str], keywords: Sequence[Sequence[str]]
) -> np.ndarray:
  """What each caption would score by `scores.keyword_f1` if all images had it, [captions]."""
  owners = np.repeat(np.arange(len(keywords)), [len(of_image) for of_image in keywords])
  own = [scores.words_of(text) for text in captions]
  theirs = [scores.words_of(text) for text in itertools.chain.from_iterable(keywords)]
  numbers = {word: n for n, word in enumerate(sorted(frozenset().union(*own, *theirs)))}
  own_CV, theirs_RV = (_incidence(sets, numbers) for sets in (own, theirs))
  sizes_R = np.array([len(words) for words in theirs])
  found = np.empty(len(captions))
  firsts = np.searchsorted(owners, np.arange(len(keywords)))
  for index, words in enumerate(own):
    common_R = (theirs_RV @ own_CV[index].T).toarray()[:, 0]
    found[index] = 100 * np.mean(
      np.maximum.reduceat(2 * common_R / np.maximum(len(words) + sizes_R, 1), firsts)
    )
  return found


def chrf_of_constants(captions: Sequence[str], references: Sequence[str]) -> np.ndarray:
  """What each caption would score by corpus chrF if all references had it, [captions].

    chrF = (1 + b^2) P R / (b^2 P + R), P and R the means over n = 1 ... 6 of the n-grams of
    characters, without spaces, that are common, over those of all captions, and of all references

  with b = 2. The common ones of n-grams with their number (the second "a" of a text) add up over
  the references, so that this takes no longer than reading both.

  Reference: chrF, doi 10.18653/v1/W15-3049; sacreBLEU, arXiv 1804.08771.
  """
  precisions, recalls = [], []
  for order in range(1, _CHRF_ORDER + 1):
    numbered = functools.partial(_numbered, order=order)
    held = collections.Counter(itertools.chain.from_iterable(map(numbered, references)))
    own = [numbered(text) for text in captions]
    common_C = np.array([sum(held[gram] for gram in grams) for grams in own], float)
    # A reference that is shorter than this counts no caption's n-grams, as in sacreBLEU.
    having = sum(1 for text in references if numbered(text))
    sizes_C = having * np.array([len(grams) for grams in own], float)
    counts = (sizes_C > 0) & (held.total() > 0)
    precisions.append(np.divide(common_C, sizes_C, out=np.full(len(own), np.nan), where=counts))
    recalls.append(np.where(counts, common_C / max(held.total(), 1), np.nan))
  has_C = np.isfinite(precisions).any(axis=0)
  p_C, r_C = (np.nansum(x, 0) / np.maximum(np.isfinite(x).sum(0), 1) for x in (precisions, recalls))
  weight = _CHRF_BETA**2
  below_C = weight * p_C + r_C
  return np.where(
    has_C & (below_C > 0), 100 * (1 + weight) * p_C * r_C / np.where(below_C > 0, below_C, 1), 0
  )


def _numbered(text: str, order: int) -> list[tuple[str, int]]:
  """A text's n-grams of characters without spaces, each with how often it came before."""
  letters, seen = "".join(text.split()), collections.Counter()
  found = []
  for begin in range(len(letters) - order + 1):
    gram = letters[begin : begin + order]
    found.append((gram, seen[gram]))
    seen[gram] += 1
  return found


def _incidence(sets: Sequence[frozenset[str]], numbers: dict[str, int]) -> sparse.csr_matrix:
  """[sets, words], 1 where a set has a word."""
  ends = np.cumsum([0, *map(len, sets)])
  columns = [numbers[word] for words in sets for word in words]
  return sparse.csr_matrix((np.ones(len(columns)), columns, ends), (len(sets), len(numbers)))


def _evenly(held: Sequence) -> list:
  """At most `_CHOSEN_OF` of some, evenly apart."""
  chosen = np.linspace(0, len(held) - 1, min(len(held), _CHOSEN_OF)).astype(int)
  return [held[i] for i in chosen]
