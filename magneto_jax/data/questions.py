"""Questions on images with their answers, and statements on two images, each in one call.

Questions are answered by one of the answers that are common in training, as VQAv2's are; of a
statement it is asked whether it is true, as in NLVR2.

Reference: BEiT-3, arXiv 2208.10442, section 3.1; VQA, arXiv 1505.00468; NLVR2, arXiv 1811.00491.
"""

import collections
import dataclasses
import itertools
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from magneto_jax.data import (
  caption_sources,
  captions,
  documents,
  emoji_questions,
  images,
  masking,
  tokenizers,
)
from magneto_jax.data.caption_sources import EMOJI_LANGUAGES, Line, Options

Sample = dict[str, np.ndarray]

# By how many annotators gave an answer, at most four: the mean over all nine of ten of them of
# VQA's accuracy min(1, count / 3).
_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)
# Of statements, by their number.
_LABELS = ("false", "true")
# Of one's own questions, as VQAv2 is used.
_LEAST_ANSWERS = 9


def soft_scores(answers: Iterable[str]) -> dict[str, float]:
  """VQA's soft scores of annotators' answers: .3, .6, .9 and 1 for one, two, three and four.

  Those of ten annotators, however many there are: VQA's rule has no score for a single one, and
  BEiT-3 and others score VQAv2 by this table.
  """
  return {
    answer: _SCORES[min(times, len(_SCORES) - 1)]
    for answer, times in collections.Counter(answers).items()
  }


class Asked(NamedTuple):
  """A question or a statement.

  Attributes:
    words: what is asked or said.
    kind: what a majority is taken of.
    images: numbers of its images.
    answers: scores by answer; of a statement {"true": 1.0} or {"false": 1.0}.
    majority: the answer that counts for how common it is: the commonest, of several the first.
    where: where it lies, in words.
    shown: what its image is of, where that is known.
  """

  words: str
  kind: str
  images: tuple[int, ...]
  answers: Mapping[str, float]
  majority: str
  where: str
  shown: str = ""


class Part(NamedTuple):
  """Questions or statements of a part, its images, their digests, and what names it all."""

  asked: tuple[Asked, ...]
  pictures: images.Images
  digests: tuple[str, ...]
  identity: Mapping[str, Any]


# ---------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------


def _answer_of(value: Any) -> list[str] | str:
  """An answer, or those of annotators, in small letters; ValueError if it is neither."""
  if value == []:
    raise ValueError("its answer is an empty list")
  if isinstance(value, list):
    return [caption_sources.text_of(answer, "answer").lower() for answer in value]
  return caption_sources.text_of(value, "answer").lower()


def _question_of(values: Mapping[str, Any]) -> tuple[tuple[str, ...], list]:
  value_of, text_of = caption_sources.value_of, caption_sources.text_of
  path = caption_sources.path_of(value_of(values, "image"))
  kind = text_of(values["type"], "type") if "type" in values else ""
  question = text_of(value_of(values, "question"), "question")
  return (path,), [question, _answer_of(value_of(values, "answer")), kind]


def _statement_of(values: Mapping[str, Any]) -> tuple[tuple[str, ...], list]:
  value_of, text_of = caption_sources.value_of, caption_sources.text_of
  held = value_of(values, "images")
  if not isinstance(held, list) or len(held) != 2:
    raise ValueError(f"its images are {held!r:.40}, not a list of two paths")
  paths = tuple(caption_sources.path_of(path, "images") for path in held)
  label = value_of(values, "label")
  said = str(label).lower() if isinstance(label, (bool, str)) else ""
  if said not in ("true", "false"):
    raise ValueError(f"its label is {label!r:.40}, neither true nor false")
  return paths, [text_of(value_of(values, "text"), "text"), said, ""]


_QUESTION = caption_sources.Read(("image", "question", "answer", "type"), _question_of)
_STATEMENT = caption_sources.Read(("images", "text", "label"), _statement_of)


def _of_line(line: Line, numbers: Mapping[str, int]) -> Asked:
  words, answer, kind = line.content
  if isinstance(answer, str):
    answers, majority = {answer: 1.0}, answer
  else:
    answers, majority = soft_scores(answer), max(answer, key=answer.count)
  own = tuple(numbers[digest] for digest in line.digests)
  return Asked(words, kind, own, answers, majority, f"{line.path}: line {line.number}")


def _tell_few_annotators(lines: Sequence[Line]) -> None:
  """Warns where answers of annotators never agree as often as a score of 1 needs."""
  listed = [line for line in lines if isinstance(line.content[1], list)]
  most = max((max(map(line.content[1].count, line.content[1])) for line in listed), default=4)
  if most < len(_SCORES) - 1:
    logging.warning(
      "%s: line %d and all others with a list of answers have at most %d equal ones, which score"
      " %.1f, as of ten annotators: write an answer that is sure as a text, which scores 1",
      *(listed[0].path, listed[0].number, most, _SCORES[most]),
    )


def _of_lines(lines: Sequence[Line]) -> Part:
  _tell_few_annotators(lines)
  pictures, numbers, digests = caption_sources.images_of(lines)
  identity = {
    "source": "pairs_jsonl",
    "rows": len(lines),
    "sha256": caption_sources.lines_digest(lines),
  }
  return Part(tuple(_of_line(line, numbers) for line in lines), pictures, digests, identity)


def _of_emoji(
  name: str, split: str, generate: Callable[[str, str], list[emoji_questions.Generated]]
) -> Part:
  """Generated questions or statements on the embedded emoji."""
  held = caption_sources.emoji(name, split)
  generated = [made for language in EMOJI_LANGUAGES[name] for made in generate(split, language)]
  asked, table = [], caption_sources.emoji_table(split)
  for made in generated:
    answer = made.answer if isinstance(made.answer, str) else str(made.answer).lower()
    where = f"the question {made.text!r} generated of {name}/{split}"
    shown = " ".join(table[image].subgroup for image in made.images)
    asked.append(Asked(made.text, made.kind, made.images, {answer: 1.0}, answer, where, shown))
  identity = {
    "source": f"{name}, generated",
    "split": split,
    "images": dict(held.images.identity),
    "version": emoji_questions.VERSION,
    "rows": len(generated),
    "sha256": documents.texts_digest(repr(tuple(made)).encode() for made in generated),
  }
  return Part(tuple(asked), held.images, held.digests, identity)


def _read(
  name: str,
  options: Options,
  bad: documents.BadRecords,
  read: caption_sources.Read,
  generate: Callable[[str, str], list[emoji_questions.Generated]],
  *,
  apart: bool,
) -> tuple[Part, Part]:
  """Both parts of a source; see `caption_sources.read_captioned`."""
  other, _, split = options.validation_split.rpartition("/")
  for named in filter(None, (name, other)):
    if named not in (*EMOJI_LANGUAGES, "pairs_jsonl") or other == "pairs_jsonl":
      raise ValueError(
        f"there are no questions of {named!r}: set data.name to pairs_jsonl, for your own, or to"
        f" {', '.join(EMOJI_LANGUAGES)}, of which they are generated"
      )
  if name == "pairs_jsonl":
    lines = caption_sources.read_lines(options, bad, read, split="train" if other else split)
    train, validation = map(_of_lines, lines)
  else:
    train = _of_emoji(name, options.train_split, generate)
    validation = train if other else _of_emoji(name, split, generate)
  if other:
    validation = _of_emoji(other, split, generate)
  if apart and train.identity == validation.identity:
    raise ValueError(f"{name}: training and validation data are the same: {dict(train.identity)}")
  return train, validation


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SoftTargets:
  """The scores of all A answers of each row, kept as those of its few own ones.

  Attributes:
    numbers: int32 [rows, K], answers; scores: float32 [rows, K], theirs, 0 behind the last.
    size: A.
  """

  numbers: np.ndarray
  scores: np.ndarray
  size: int

  @classmethod
  def of(cls, asked: Sequence[Asked], answers: Sequence[str]) -> "SoftTargets":
    """Those of questions; what is none of the answers has no place."""
    number_of = {answer: number for number, answer in enumerate(answers)}
    most = max((len(row.answers) for row in asked), default=0)
    numbers = np.zeros((len(asked), most), np.int32)
    scores = np.zeros((len(asked), most), np.float32)
    for row, own in enumerate(asked):
      for place, (answer, score) in enumerate(own.answers.items()):
        if answer in number_of:
          numbers[row, place], scores[row, place] = number_of[answer], score
    return cls(numbers, scores, len(answers))

  def __len__(self) -> int:
    return len(self.numbers)

  def __getitem__(self, index: int) -> np.ndarray:
    """float32 [A]."""
    row = np.zeros(self.size, np.float32)
    np.add.at(row, self.numbers[index], self.scores[index])
    return row

  def take(self, rows: np.ndarray, axis: int = 0) -> "SoftTargets":
    """Those of some rows, as of an array's."""
    return SoftTargets(self.numbers.take(rows, axis), self.scores.take(rows, axis), self.size)


@dataclasses.dataclass(frozen=True)
class QuestionData:
  """Questions on images, ready for the pipelines; or statements on two.

  A sample has, beside what `captions.Rows` says, `targets`, float32 [A], the scores of all answers;
  or, of statements, `images`, float32 [2, S, S, 3], and `label`, int32 [], 1 where it is true.

  Attributes:
    train: raw rows, of which `augment` makes samples.
    validation: samples.
    tokenizer: of the questions.
    answers: all A that are known, in their order; of statements "false" and "true".
    kinds: of the training and of the validation rows what kind each is; see `majority`.
    shown: likewise what its images are of, the emoji's subgroups; "" where that is not known.
    generated: whether nobody asked them.
    unanswerable: how many training questions have none of the answers, and are left out; and how
      many validation questions, which stay and cannot be answered right.
    augment, too_long, cut, unknown, shared, bad_records, identity, mix: see `captions.CaptionData`.
  """

  train: captions.Rows
  validation: captions.Rows
  tokenizer: tokenizers.Tokenizer
  answers: tuple[str, ...]
  kinds: tuple[tuple[str, ...], tuple[str, ...]]
  shown: tuple[tuple[str, ...], tuple[str, ...]]
  generated: bool
  unanswerable: tuple[int, int]
  augment: Callable[[Sample, np.random.Generator], Sample]
  too_long: tuple[int, int]
  cut: bool
  unknown: int
  shared: int
  bad_records: tuple[str, ...]
  identity: Mapping[str, Any]
  mix: None = None

  @property
  def is_of_two(self) -> bool:
    """Whether these are statements on two images."""
    return self.train.image_of.ndim == 2

  def scores(self, rows: captions.Rows, index: int) -> np.ndarray:
    """[A], those of all answers of a row."""
    if self.is_of_two:
      return np.eye(2, dtype=np.float32)[rows.values["label"][index]]
    return rows.values["targets"][index]

  def majority(self) -> dict[str, float]:
    """What the majority answer of its kind scores: of each kind of validation questions, and all.

    That of a kind is the answer whose scores in training have the largest sum, of several the first
    in their order; of a kind that training has not, that of all training questions. "" names all,
    which are also a kind where questions have none.
    """
    return self._commonest(lambda part, row: (self.kinds[part][row], None))

  def majority_of_the_image(self) -> dict[str, float]:
    """What can be scored without reading the question, by who knows what the image is of.

    Likewise with the answer that has the largest sum in training among questions of the kind on
    images of the same subgroup; of a subgroup of which training has none, that of the kind. Nothing
    where subgroups are not known.
    """
    if not all(map(all, self.shown)):
      return {}
    kind_of = lambda part, row: self.kinds[part][row]
    return self._commonest(
      lambda part, row: ((kind_of(part, row), self.shown[part][row]), kind_of(part, row), None)
    )

  def _commonest(self, groups: Callable[[int, int], Sequence[Hashable]]) -> dict[str, float]:
    """Scores, by kind, of the best answer of the first of a row's groups that training has.

    Args:
      groups: of a part, 0 or 1, and a row of it: what it belongs to, the most particular first.
    """
    sums: dict[Hashable, np.ndarray] = {}
    for row in range(len(self.train)):
      scores = self.scores(self.train, row)
      for group in groups(0, row):
        sums[group] = sums.get(group, 0) + scores
    met: dict[str, list[float]] = collections.defaultdict(list)
    for row, kind in enumerate(self.kinds[1]):
      best = int(np.argmax(sums[next(group for group in groups(1, row) if group in sums)]))
      score = float(self.scores(self.validation, row)[best])
      for name in {kind, ""}:
        met[name].append(score)
    return {name: float(np.mean(found)) for name, found in sorted(met.items())}

  def describe(self) -> str:
    """Questions, answers, ids, and what a person may not expect of them."""
    what = "statements on two images" if self.is_of_two else "questions"
    parts = [f"{len(self.train):,} training", f"{len(self.validation):,} validation {what}"]
    words = " and ".join(parts)
    if self.generated:
      words += ", generated from groups and keywords"
    if not self.is_of_two:
      words += f", {len(self.answers):,} answers"
    words += f", {self.tokenizer.vocab_size:,} in the vocabulary"
    if any(self.unanswerable):
      left, kept = self.unanswerable
      words += (
        f"; {left:,} training questions have no answer of these and are left out, {kept:,}"
        " validation questions have none and stay"
      )
    return words + captions.told(self)

  def show(self, sample: Mapping[str, np.ndarray]) -> str:
    """A sample's question, and its best answer."""
    words = masking.words_of(self.tokenizer, sample["text"], specials=False)
    if self.is_of_two:
      return f"{words!r:.200}: {self.answers[int(sample['label'])]}"
    best = int(np.argmax(sample["targets"]))
    known = self.answers[best] if sample["targets"][best] else "no known answer"
    return f"{words!r:.200}: {known}"


def known_answers(asked: Sequence[Asked], least: int) -> tuple[str, ...]:
  """The answers that are the majority's of so many questions, at least, in alphabetical order.

  Raises:
    ValueError: there are fewer than two.
  """
  times = collections.Counter(question.majority for question in asked)
  answers = tuple(sorted(answer for answer, count in times.items() if count >= least))
  if len(answers) < 2:
    commonest = ", ".join(f"{answer!r:.40} of {count}" for answer, count in times.most_common(3))
    raise ValueError(
      f"{len(answers)} answers are those of at least {least} training questions (the commonest:"
      f" {commonest}): give more questions, or set data.least_answers to less"
    )
  return answers


def load_questions(
  *,
  workdir: str | os.PathLike[str],
  view: captions.PictureView,
  name: str = "embedded/emoji/en",
  least_answers: int = 0,
  skip_bad: int = 0,
  expected: Mapping[str, Any] | None = None,
  **options: Any,
) -> QuestionData:
  """Finds questions on images and the answers that a model may give.

  Args:
    workdir: where the tokenizer is kept.
    view: what is seen of images.
    name: a name in `caption_sources.EMOJI_LANGUAGES`, of which questions are generated
      (`emoji_questions`), or `pairs_jsonl`: lines of an `image`, a `question`, and an `answer`: a
      text, which scores 1, or a list of annotators' answers, which score as `soft_scores` says, a
      list of one answer 0.3 (a warning tells of lists without four equal ones); perhaps of a
      `type`, of which a majority is taken. Answers are in small letters.
    least_answers: of how many training questions an answer is that of the majority of annotators,
      so that it is known; 0: 9 of one's own, 1 of generated ones.
    skip_bad, expected: see `captions.load_captions`.
    **options: the fields of `captions.Tokens`, and of `caption_sources.Options` those of files and
      splits.

  Raises:
    FileNotFoundError: data or tokenizer are not on disk.
    ValueError: of one line: see `captions.encode` and `caption_sources.read_lines`; there are no
      questions of that name, or fewer than two answers.

  Example:
    >>> view = captions.PictureView(images.Spatial(32))
    >>> data = load_questions(workdir="/tmp/run", view=view, tokenizer="byte")
    >>> len(data.train), data.answers[-2:]
    (5240, ('no', 'yes'))
  """
  bad = documents.BadRecords(skip_bad)
  read, tokens = captions.chosen(options)
  parts = _read(name, read, bad, _QUESTION, emoji_questions.questions, apart=expected is None)
  captions.refuse_others([part.identity for part in parts], expected)
  generated = name in EMOJI_LANGUAGES
  least = least_answers or (1 if generated else _LEAST_ANSWERS)
  answers = known_answers(parts[0].asked, least)
  known = [[not {*answers}.isdisjoint(row.answers) for row in part.asked] for part in parts]
  without = tuple(part.count(False) for part in known)
  if without[0]:
    logging.warning(
      "left out: %d of %d training questions, of which no answer is that of %d questions",
      *(without[0], len(parts[0].asked), least),
    )
    kept = tuple(itertools.compress(parts[0].asked, known[0]))
    parts = parts[0]._replace(asked=kept), parts[1]
  values = [{"targets": SoftTargets.of(part.asked, answers)} for part in parts]
  data = _encoded(parts, values, view, tokens, workdir, bad, expected)
  return dataclasses.replace(
    data,
    answers=answers,
    generated=generated,
    unanswerable=without,
    identity={**data.identity, "least_answers": least},
  )


def load_statements(
  *,
  workdir: str | os.PathLike[str],
  view: captions.PictureView,
  name: str = "embedded/emoji/en",
  skip_bad: int = 0,
  expected: Mapping[str, Any] | None = None,
  **options: Any,
) -> QuestionData:
  """Finds statements on two images, and whether they are true.

  Args:
    name: a name in `caption_sources.EMOJI_LANGUAGES`, of which statements are generated
      (`emoji_questions`), or `pairs_jsonl`: lines of `images`, two paths, a `text`, and a `label`,
      true or false. Held out without validation_files are lines by their first images; the second
      may be in both parts, which is told.
    All others: see `load_questions`, which says what is raised, too.
  """
  bad = documents.BadRecords(skip_bad)
  read, tokens = captions.chosen(options)
  parts = _read(name, read, bad, _STATEMENT, emoji_questions.statements, apart=expected is None)
  values = [
    {"label": np.array([_LABELS.index(row.majority) for row in part.asked], np.int32)}
    for part in parts
  ]
  data = _encoded(parts, values, view, tokens, workdir, bad, expected)
  return dataclasses.replace(data, generated=name in EMOJI_LANGUAGES)


def _image_of(asked: Sequence[Asked]) -> np.ndarray:
  """[rows] of questions on one image, [rows, 2] of statements on two."""
  images_of_rows = np.array([row.images for row in asked], np.int32)
  return images_of_rows[:, 0] if images_of_rows.shape[1] == 1 else images_of_rows


def _encoded(
  parts: tuple[Part, Part],
  values: Sequence[Mapping[str, Any]],
  view: captions.PictureView,
  tokens: captions.Tokens,
  workdir: str | os.PathLike[str],
  bad: documents.BadRecords,
  expected: Mapping[str, Any] | None,
) -> QuestionData:
  """The data of both parts, as if they were statements of one's own."""
  held = [
    captions.Held(
      pictures=part.pictures,
      image_of=_image_of(part.asked),
      texts=tuple(row.words for row in part.asked),
      values=own,
      where=lambda index, asked=part.asked: asked[index].where,
      identity=part.identity,
    )
    for part, own in zip(parts, values, strict=True)
  ]
  encoded = captions.encode(held, view, tokens, workdir=workdir, bad=bad, expected=expected)
  of_rows = lambda name: tuple(
    tuple(getattr(part.asked[i], name) for i in kept)
    for part, kept in zip(parts, encoded.kept, strict=True)
  )
  return QuestionData(
    train=encoded.train,
    validation=encoded.validation,
    tokenizer=encoded.tokenizer,
    answers=_LABELS,
    kinds=of_rows("kind"),
    shown=of_rows("shown"),
    generated=False,
    unanswerable=(0, 0),
    augment=view.training,
    too_long=encoded.too_long,
    cut=tokens.too_long == "truncate",
    unknown=encoded.unknown,
    shared=caption_sources.shared_images(*(part.digests for part in parts)),
    bad_records=tuple(bad.found),
    identity={**encoded.identity, **({"left_out": len(bad.found)} if bad.found else {})},
  )
