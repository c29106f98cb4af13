"""What trivial translators write: the marks that a trained one is held against.

commonest
  The commonest target of the training pairs, whatever the source.
dictionary
  Each word of the source replaced by its likeliest translation, learnt from the training pairs by
  IBM model 1; a word that is in none of them stays as it is. No order, no grammar.
copy
  The source itself. Not a mark: technical English and German share names, commands and numbers.

  python -m benchmarks.translation_baselines

prints sacreBLEU and chrF of the three on the embedded validation pairs.

Reference: Brown et al., The Mathematics of Statistical Machine Translation, 1993, section 4 (IBM
model 1).
"""

import collections
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

Pair = tuple[str, str]

# A word is of letters, with hyphens, dots or apostrophes within (`apt-get`, `sources.list`).
_WORD = re.compile(r"\w+(?:[-.'’]\w+)*")
_NOTHING = ""  # IBM's empty word, from which target words without a source word come


def dictionary(pairs: Iterable[Pair], iterations: int = 10) -> dict[str, str]:
  """The likeliest translation argmax_g t(g | e) of every source word e, by IBM model 1.

  From a uniform start the steps of expectation maximisation are, with sums over sentence pairs and
  over the pairs of words (e, g) in them, e also the empty word,

    c(e, g) = sum t(g | e) / sum_e' t(g | e'),   t(g | e) = c(e, g) / sum_g' c(e, g')

  Args:
    pairs: sentences and their translations.
    iterations: how many steps are taken.

  Returns:
    {source word: target word}; of equally likely ones the first in the alphabet.
  """
  ids: tuple[dict[str, int], dict[str, int]] = {_NOTHING: 0}, {}
  links, places, place = [], [], 0
  for pair in pairs:
    source, target = (_WORD.findall(side) for side in pair)
    source = np.array([ids[0].setdefault(word, len(ids[0])) for word in (_NOTHING, *source)])
    target = np.array([ids[1].setdefault(word, len(ids[1])) for word in target], int)
    links.append(np.stack(np.meshgrid(source, target), -1).reshape(-1, 2))
    # Which target word of the corpus a link is of.
    places.append(place + np.repeat(np.arange(len(target)), len(source)))
    place += len(target)
  linked, place_of = np.concatenate(links), np.concatenate(places)
  words, link = np.unique(linked[:, 0] * len(ids[1]) + linked[:, 1], return_inverse=True)
  sources, targets = np.divmod(words, len(ids[1]))
  t = np.ones(len(words))
  for _ in range(iterations):
    share = t[link] / np.bincount(place_of, t[link])[place_of]
    count = np.bincount(link, share)
    t = count / np.bincount(sources, count)[sources]
  names = tuple(list(side) for side in ids)
  best: dict[str, tuple[float, str]] = {}
  for e, g, chance in zip(sources.tolist(), targets.tolist(), t.tolist(), strict=True):
    found = (-chance, names[1][g])
    best[names[0][e]] = min(best.get(names[0][e], found), found)
  return {e: g for e, (_, g) in best.items() if e != _NOTHING}


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
  import sacrebleu

  sources, references = map(list, zip(*validation, strict=True))
  return {
    name: {
      "bleu": sacrebleu.corpus_bleu(written, [references]).score,
      "chrf": sacrebleu.corpus_chrf(written, [references]).score,
    }
    for name, written in translations(train, sources).items()
  }


def main() -> None:
  """Prints the scores on the embedded pairs."""
  from magneto_jax.data import pairs

  train, validation = pairs.read_pairs("embedded")
  for name, values in scores(train, validation).items():
    print(f"{name:12}" + "".join(f"  {metric} {value:5.2f}" for metric, value in values.items()))


if __name__ == "__main__":
  main()
