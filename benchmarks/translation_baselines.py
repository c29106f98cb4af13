"""What trivial translators write: the marks that a trained one is held against.

commonest
  The commonest target of the training pairs, whatever the source.
dictionary
  Each word of the source replaced by its likeliest translation, learnt from the training pairs by
  IBM model 1; a word that is in none of them stays as it is. No order, no grammar.
copy
  The source itself. Not a mark: technical English and German share names, commands and numbers.

  python -m benchmarks.translation_baselines

prints sacreBLEU and chrF of the three on the embedded validation pairs, and what the tokens of the
targets cost by IBM model 1's own likelihood, in nats: that compares it with a model of the same
tokens.

Reference: Brown et al., The Mathematics of Statistical Machine Translation, 1993, section 4 (IBM
model 1).
"""

import collections
import pathlib
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import sacrebleu

from configs import translation
from magneto_jax.config import from_config_dict
from magneto_jax.data import pairs, tokenizers
from magneto_jax.tasks import TASKS

Pair = tuple[str, str]
Ids = tuple[Sequence[int], Sequence[int]]

# A word is of letters, with hyphens, dots or apostrophes within (`apt-get`, `sources.list`).
_WORD = re.compile(r"\w+(?:[-.'’]\w+)*")
_NOTHING = 0  # IBM's empty word, from which target words without a source word come
_MIX = 0.1  # share of the unigram in the dictionary's likelihood: a word may be new to the source


class Model1(NamedTuple):
  """t(g | e) of the pairs of words that were seen in one sentence pair; of the others it is 0."""

  sources: np.ndarray
  targets: np.ndarray
  chances: np.ndarray

  @classmethod
  def learn(cls, pairs: Iterable[Ids], size: int, iterations: int = 10) -> "Model1":
    """IBM model 1.

    From a uniform start the steps of expectation maximisation are, with sums over sentence pairs
    and over the pairs of words (e, g) in them, e also the empty word,

      c(e, g) = sum t(g | e) / sum_e' t(g | e'),   t(g | e) = c(e, g) / sum_g' c(e, g')

    Args:
      pairs: sentences and their translations as integers in [0, size), of which the empty word's is
        _NOTHING.
      size: of both vocabularies.
      iterations: how many steps are taken.
    """
    links, places, place = [], [], 0
    for source, target in pairs:
      grid = np.meshgrid([_NOTHING, *source], target)
      links.append(np.stack(grid, -1).reshape(-1, 2).astype(np.int64))
      # Which target word of the corpus a link is of.
      places.append(place + np.repeat(np.arange(len(target)), 1 + len(source)))
      place += len(target)
    linked, place_of = np.concatenate(links), np.concatenate(places)
    words, link = np.unique(linked[:, 0] * size + linked[:, 1], return_inverse=True)
    sources, targets = np.divmod(words, size)
    t = np.ones(len(words))
    for _ in range(iterations):
      share = t[link] / np.bincount(place_of, t[link])[place_of]
      count = np.bincount(link, share)
      t = count / np.bincount(sources, count)[sources]
    return cls(sources, targets, t)


def dictionary(pairs: Sequence[Pair]) -> dict[str, str]:
  """The likeliest translation argmax_g t(g | e) of every source word e, by IBM model 1.

  Of equally likely ones it is the one that was seen first.
  """
  ids = {"": _NOTHING}
  numbered = [
    tuple([ids.setdefault(word, len(ids)) for word in _WORD.findall(side)] for side in pair)
    for pair in pairs
  ]
  learnt = Model1.learn(numbered, len(ids))
  # The likeliest of each source word comes last, and stays.
  order = np.lexsort((-learnt.targets, learnt.chances))
  best = dict(zip(learnt.sources[order].tolist(), learnt.targets[order].tolist(), strict=True))
  names = list(ids)
  return {names[e]: names[g] for e, g in best.items() if e != _NOTHING}


def translations(train: Sequence[Pair], sources: Sequence[str]) -> dict[str, list[str]]:
  """What each trivial translator makes of sources: {`commonest`, `dictionary`, `copy`}."""
  counts = collections.Counter(target for _, target in train)
  # Of equally common ones the first.
  (commonest, _), *_ = counts.most_common(1)
  words = dictionary(train)
  # The first word of a sentence is capitalised.
  lower = {e.lower(): g for e, g in reversed(words.items())}
  return {
    "commonest": [commonest] * len(sources),
    "dictionary": [_word_for_word(source, words, lower) for source in sources],
    "copy": list(sources),
  }


def _word_for_word(source: str, words: Mapping[str, str], lower: Mapping[str, str]) -> str:
  def found(match: re.Match) -> str:
    word = match[0]
    return words.get(word) or lower.get(word.lower()) or word

  return _WORD.sub(found, source)


def scores(train: Sequence[Pair], validation: Sequence[Pair]) -> dict[str, dict[str, float]]:
  """{`bleu`, `chrf`} of each trivial translator: sacreBLEU and chrF of the corpus, 0 to 100."""
  sources, references = map(list, zip(*validation, strict=True))
  return {
    name: {
      "bleu": sacrebleu.corpus_bleu(written, [references]).score,
      "chrf": sacrebleu.corpus_chrf(written, [references]).score,
    }
    for name, written in translations(train, sources).items()
  }


def nats_per_token(
  train: Sequence[Pair], validation: Sequence[Pair], tokenizer: tokenizers.Tokenizer
) -> dict[str, float]:
  """What the validation targets' tokens, their ends included, cost trivial models of the training.

    unigram     -mean log u(g),  u(g) = (1 + n(g)) / sum_g' (1 + n(g'))
    dictionary  -mean log (0.9 sum_e t(g | e) / (1 + |source|) + 0.1 u(g)), e also the empty word

  Args:
    train, validation: the pairs.
    tokenizer: of the model that is compared; nats a token are of its tokens.
  """
  size = tokenizer.vocab_size
  # No text holds a padding id, which is the empty word's.
  encode = lambda words: np.append(tokenizer.encode(words), tokenizer.eos_id)
  seen, held_out = ([tuple(map(encode, pair)) for pair in part] for part in (train, validation))
  counts = np.bincount(np.concatenate([target for _, target in seen]), minlength=size)
  unigram = (1 + counts) / np.sum(1 + counts)
  learnt = Model1.learn(seen, size)
  t = np.zeros((size, size), np.float32)
  t[learnt.sources, learnt.targets] = learnt.chances
  costs = {"unigram": 0.0, "dictionary": 0.0}
  for source, target in held_out:
    explained = t[[_NOTHING, *source]][:, target].mean(axis=0)
    costs["unigram"] -= np.log(unigram[target]).sum()
    costs["dictionary"] -= np.log((1 - _MIX) * explained + _MIX * unigram[target]).sum()
  tokens = sum(len(target) for _, target in held_out)
  return {name: float(cost / tokens) for name, cost in costs.items()}


def tiny_data(folder: pathlib.Path) -> pairs.PairData:
  """The tiny config's data, from a run's folder of data or a new one."""
  config = from_config_dict(translation.get_config("tiny"))
  return TASKS[config.task].load_data(config, folder)


def main() -> None:
  """Prints all of them for the embedded pairs and the tiny config's tokens."""
  with tempfile.TemporaryDirectory() as folder:
    data = tiny_data(pathlib.Path(folder))
  train, validation = data.train_pairs, data.validation_pairs
  for name, values in scores(train, validation).items():
    print(f"{name:12}" + "".join(f"  {metric} {value:5.2f}" for metric, value in values.items()))
  for name, value in nats_per_token(train, validation, data.tokenizer).items():
    print(f"{name:12}  {value:.3f} nats a token")


if __name__ == "__main__":
  main()
