"""Questions on the embedded emoji, and statements on two of them, generated from their table.

Nobody wrote them: templates are filled with Unicode's groups and keywords. They are balanced, so
that what is asked tells nothing of the answer: to every question that yes or no answers, and to
every statement, both answers are as frequent, and so are all answers to the others. Questions on a
split's images are of that split alone, and a function of the split and the language.
"""

import collections
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from magneto_jax.data.caption_sources import Emoji, emoji_table

VERSION = 2  # of the templates and the drawing; raise it when others are generated
# Of a keyword that is asked for: so many training images have it, at least.
_LEAST_IMAGES = 8

# Unicode's groups in words, by language.
GROUPS: Mapping[str, Mapping[str, str]] = {
  "Smileys & Emotion": {"en": "a smiley or a feeling", "de": "ein Smiley oder ein Gefühl"},
  "People & Body": {"en": "a person or a part of one", "de": "ein Mensch oder ein Teil von einem"},
  "Animals & Nature": {"en": "an animal or a plant", "de": "ein Tier oder eine Pflanze"},
  "Food & Drink": {"en": "food or drink", "de": "etwas zu essen oder zu trinken"},
  "Travel & Places": {
    "en": "a place, a vehicle or the sky",
    "de": "ein Ort, ein Fahrzeug oder der Himmel",
  },
  "Activities": {"en": "a feast, a game or a sport", "de": "ein Fest, ein Spiel oder ein Sport"},
  "Objects": {"en": "an object", "de": "ein Gegenstand"},
  "Symbols": {"en": "a sign or a symbol", "de": "ein Zeichen oder ein Symbol"},
}
_ANSWERS = {"en": ("no", "yes"), "de": ("nein", "ja")}
_QUESTIONS = {
  "en": {"group": "is this {}?", "which": "what is this?", "keyword": "does it show this: {}?"},
  "de": {"group": "ist das {}?", "which": "was ist das?", "keyword": "zeigt es dies: {}?"},
}
_STATEMENTS = {
  "en": {
    "both": "each of the two is {}",
    "one": "just one of the two is {}",
    "same": "the two are of one kind",
  },
  "de": {
    "both": "jedes der beiden ist {}",
    "one": "genau eines der beiden ist {}",
    "same": "die beiden sind von einer Art",
  },
}


class Generated(NamedTuple):
  """A question, or a statement.

  Attributes:
    text: what is asked or said.
    kind: of question, and its language: what a majority is taken of.
    images: the emoji that it is on, by their places in the split.
    answer: a word, or whether the statement is true.
  """

  text: str
  kind: str
  images: tuple[int, ...]
  answer: str | bool


def questions(split: str, language: str) -> list[Generated]:
  """Questions on single emoji.

  group: "is this an animal or a plant?", of every emoji's own group, and as often of each group
    with an emoji of another, of every emoji once as far as that can be.
  which: "what is this?", of as many emoji of each group as the smallest has.
  keyword: "does it show this: heart?", of every keyword that at least eight training emoji have,
    for every emoji that has it, and as many that have not, nor have it in their names: of every
    emoji as many as it has of the first kind, as far as that can be. Else what an emoji shows would
    tell how many keywords it has, and so the answer.
  """
  rows = emoji_table(split)
  of_groups = _by_group(rows)
  no, yes = _ANSWERS[language]
  asked = _QUESTIONS[language]
  found = []

  def ask(kind: str, filled: str, images: Sequence[int], answer: str) -> None:
    question = asked[kind].format(filled)
    found.extend(Generated(question, f"{kind} {language}", (int(i),), answer) for i in images)

  everyone = range(len(rows))
  of_group = {
    group: (own, [i for i in everyone if rows[i].group != group])
    for group, own in of_groups.items()
  }
  draw = _generator(split, language, "group")
  for group, images in _matched(of_group, draw).items():
    ask("group", GROUPS[group][language], of_groups[group], yes)
    ask("group", GROUPS[group][language], images, no)
  least = min(map(len, of_groups.values()))
  for group, own in of_groups.items():
    draw = _generator(split, language, "which", group)
    ask("which", "", draw.choice(own, least, replace=False), GROUPS[group][language])
  of_word = {
    word: (
      [i for i in everyone if word in rows[i].keywords[language]],
      [i for i in everyone if not _has(rows[i], word, language)],
    )
    for word in _keywords(language)
  }
  draw = _generator(split, language, "keyword")
  for word, images in _matched(of_word, draw).items():
    ask("keyword", word, of_word[word][0], yes)
    ask("keyword", word, images, no)
  return found


def statements(split: str, language: str) -> list[Generated]:
  """Statements on two emoji, as many of each kind and group as the smallest group has.

  both: "each of the two is food or drink": true of two of the group, false of one and another.
  one: "just one of the two is food or drink": true of one and another, false of two of the group
    and of two others.
  same: "the two are of one kind": true of two of a group, false of one and another.

  The other emoji are of the other groups in turn, first and second as often.
  """
  rows = emoji_table(split)
  of_groups = _by_group(rows)
  least = min(map(len, of_groups.values()))
  names = list(of_groups)
  found = []
  for kind, template in _STATEMENTS[language].items():
    for place, group in enumerate(names):
      draw = _generator(split, language, kind, group)
      own = draw.permutation(of_groups[group])
      others = [draw.permutation(of_groups[name]) for name in names[place + 1 :] + names[:place]]
      other = lambda i, others=others: others[i % len(others)][i % least]
      two = lambda i, own=own: (own[i % least], own[(i + 1) % least])
      mixed = lambda i, own=own, other=other: (own[i % least], other(i))[:: 1 if i % 2 else -1]
      neither = lambda i, other=other: (other(i), other(i + 1))
      told: Mapping[str, tuple[Callable, Callable]] = {
        "both": (two, mixed),
        "one": (mixed, lambda i, a=two, b=neither: (a if i % 2 else b)(i)),
        "same": (two, mixed),
      }
      for answer, pair in zip((True, False), told[kind], strict=True):
        for i in range(least):
          images = tuple(map(int, pair(i)))
          statement = template.format(GROUPS[group][language])
          found.append(Generated(statement, f"{kind} {language}", images, answer))
  return found


def _matched(
  asked: Mapping[str, tuple[Sequence[int], Sequence[int]]], draw: np.random.Generator
) -> dict[str, list[int]]:
  """Of which images each question is asked that no answers, so that an image tells no answer.

  As many a question as yes answers; and each image as often as it has a yes, as far as there are
  such. The questions that need most choose first, of the images that are most wanting.

  Args:
    asked: by question the images that yes is right of, and those that no is right of.
    draw: of images that are as wanting.
  """
  wanting = collections.Counter(image for of, _ in asked.values() for image in of)
  found: dict[str, list[int]] = {}
  for question in sorted(asked, key=lambda question: (-len(asked[question][0]), question)):
    of, others = asked[question]
    order = sorted(draw.permutation(others).tolist(), key=lambda image: -wanting[image])
    found[question] = order[: len(of)]
    wanting.subtract(found[question])
  return {question: found[question] for question in asked}


def _by_group(rows: Sequence[Emoji]) -> dict[str, list[int]]:
  of_groups: dict[str, list[int]] = {group: [] for group in GROUPS}
  for i, row in enumerate(rows):
    of_groups[row.group].append(i)
  return of_groups


def _keywords(language: str) -> Iterator[str]:
  """Those that are asked for, in their order."""
  times = collections.Counter(
    word for row in emoji_table("train") for word in {*row.keywords[language]}
  )
  return (word for word in sorted(times) if times[word] >= _LEAST_IMAGES)


def _has(row: Emoji, word: str, language: str) -> bool:
  """Whether a keyword is an emoji's, or stands in its name or in one of its keywords."""
  texts = (row.names[language], *row.keywords[language])
  return any(word.casefold() in text.casefold() for text in texts)


def _generator(*what: str) -> np.random.Generator:
  """Of its own for everything that is drawn."""
  return np.random.default_rng([VERSION, zlib.crc32("\n".join(what).encode())])
