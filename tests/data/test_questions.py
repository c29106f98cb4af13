"""Questions on images: generated ones are true and balanced; own ones score as VQA has it."""

import collections
import csv
import dataclasses
import inspect
import json
import pathlib

import numpy as np
import pytest

from magneto_jax.config import DataConfig, tasks_reading
from magneto_jax.data import (
  caption_sources,
  captions,
  emoji_questions,
  images,
  pipelines,
  questions,
)
from tests.pictures import view, write

TABLE = pathlib.Path(images.__file__).parent / "embedded" / "emoji" / "emoji.tsv"
SPLITS, LANGUAGES = ("train", "validation", "test"), ("en", "de")
YES = {"en": "yes", "de": "ja"}


@pytest.fixture(scope="module")
def table():
  """By split, the lines of the table."""
  with open(TABLE, encoding="utf-8") as file:
    rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
  return {split: [row for row in rows if row["split"] == split] for split in SPLITS}


def load(folder, kind=questions.load_questions, **options):
  given = {"view": view(), "tokenizer": "byte", "name": "pairs_jsonl"} | options
  return kind(workdir=folder / "run", **given)


@pytest.fixture
def own(tmp_path):
  """(training rows, validation rows, options) -> data of files in `tmp_path`."""

  def made(train, validation, **options):
    files = {
      "train_files": write(tmp_path / "train.jsonl", train),
      "validation_files": write(tmp_path / "validation.jsonl", validation),
    }
    return load(tmp_path, **files | options)

  return made


# ---------------------------------------------------------------------------------------------
# Generated
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("split", SPLITS)
def test_generated_questions_are_answered_by_the_table(split, language, table):
  rows, groups = table[split], emoji_questions.GROUPS
  group_of = {words[language]: group for group, words in groups.items()}
  templates = {
    "en": {"group": ("is this ", "?"), "keyword": ("does it show this: ", "?")},
    "de": {"group": ("ist das ", "?"), "keyword": ("zeigt es dies: ", "?")},
  }[language]
  seen = set()
  for made in emoji_questions.questions(split, language):
    kind, own = made.kind.split()
    (image,) = made.images
    assert own == language and (made.text, image) not in seen
    seen.add((made.text, image))
    if kind == "which":
      assert group_of[made.answer] == rows[image]["group"]
      continue
    begin, end = templates[kind]
    asked = made.text.removeprefix(begin).removesuffix(end)
    if kind == "group":
      truth = rows[image]["group"] == group_of[asked]
    else:
      truth = asked in rows[image][f"keywords_{language}"].split(" | ")
      assert truth or asked.lower() not in rows[image][f"name_{language}"].lower()
    assert (made.answer == YES[language]) == truth


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("split", SPLITS)
def test_a_question_tells_nothing_of_its_answer(split, language):
  """Of each text both answers, or all, are as frequent: and so of each kind."""
  for generate in (emoji_questions.questions, emoji_questions.statements):
    answers = collections.defaultdict(collections.Counter)
    for made in generate(split, language):
      answers[made.text][made.answer] += 1
    assert len(answers) > 15
    for text, times in answers.items():
      assert len(times) == (8 if text in ("what is this?", "was ist das?") else 2), text
      assert len({*times.values()}) == 1, text


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("split", SPLITS)
def test_an_image_tells_nothing_of_yes_or_no(split, language):
  """Of each emoji yes and no are as frequent: exactly of keywords, nearly of groups."""
  made = emoji_questions.questions(split, language)
  for kind, most in (("keyword", 0), ("group", 0.05)):
    own = [question for question in made if question.kind.startswith(kind)]
    surplus = collections.Counter()
    for question in own:
      surplus[question.images[0]] += 1 if question.answer == YES[language] else -1
    assert sum(map(abs, surplus.values())) <= most * len(own)


def test_what_an_image_is_of_answers_no_question_by_itself(own, tmp_path):
  """But what it is; of one's own images it is not known."""
  for split in ("validation", "test"):
    data = load(tmp_path, name="embedded/emoji/en", validation_split=split)
    found = data.majority_of_the_image()
    assert found.keys() == data.majority().keys() and found["which en"] > 0.9
    assert found["group en"] == pytest.approx(0.5, abs=0.01)
    assert found["keyword en"] == pytest.approx(0.5, abs=0.02)
  data = own([ask(0, "?", "a"), ask(1, "?", "b")], [ask(2, "?", "a")], least_answers=1)
  assert data.majority_of_the_image() == {}


def test_the_commonest_answer_of_like_images_is_by_kind_and_subgroup(own):
  """Where training has no such images, that of the kind."""
  train = [ask(i, "?", a, type="x") for i, a in enumerate(["no", "yes", "no", "no"])]
  validation = [ask(5 + i, "?", a, type="x") for i, a in enumerate(["yes", "no", "no"])]
  data = own(train, validation, least_answers=1)
  data = dataclasses.replace(data, shown=(("a", "b", "a", "c"), ("b", "a", "d")))
  assert data.majority_of_the_image() == {"": 1.0, "x": 1.0}
  data = dataclasses.replace(data, shown=(("a", "b", "a", "c"), ("a", "b", "b")))
  assert data.majority_of_the_image() == {"": 0.0, "x": 0.0}


@pytest.mark.parametrize("split", SPLITS)
def test_every_emoji_is_asked_of_and_only_of_its_split(split, table):
  made = emoji_questions.questions(split, "en")
  assert {q.images[0] for q in made} == {*range(len(table[split]))}
  assert made == emoji_questions.questions(split, "en")
  kinds = collections.Counter(q.kind for q in made)
  smallest = min(collections.Counter(row["group"] for row in table[split]).values())
  assert kinds["group en"] == 2 * len(table[split]) and kinds["which en"] == 8 * smallest


@pytest.mark.parametrize("language", LANGUAGES)
def test_statements_are_true_of_the_table(language, table):
  for split in SPLITS:
    groups = [row["group"] for row in table[split]]
    group_of = {words[language]: group for group, words in emoji_questions.GROUPS.items()}
    for made in emoji_questions.statements(split, language):
      first, second = (groups[i] for i in made.images)
      assert made.images[0] != made.images[1]
      if made.kind.startswith("same"):
        truth = first == second
      else:
        asked = next(group for words, group in group_of.items() if made.text.endswith(words))
        times = (first, second).count(asked)
        truth = times == 2 if made.kind.startswith("both") else times == 1
      assert made.answer == truth


def test_both_images_of_a_statement_are_needed(table):
  """The best answer by one image's group and the text is far from right."""
  groups = [row["group"] for row in table["train"]]
  for place in (0, 1):
    met = collections.defaultdict(collections.Counter)
    for made in emoji_questions.statements("train", "en"):
      met[made.text, groups[made.images[place]]][made.answer] += 1
    right = sum(max(times.values()) for times in met.values())
    assert right / sum(times.total() for times in met.values()) < 0.75
  # Where just one is of the group, it is as often the first as the second.
  of_group = collections.defaultdict(list)
  for made in emoji_questions.statements("train", "en"):
    if made.kind == "one en" and made.answer:
      asked = next(g for g, words in emoji_questions.GROUPS.items() if words["en"] in made.text)
      of_group[asked].append(groups[made.images[0]] == asked)
  assert len(of_group) == 8
  for firsts in of_group.values():
    assert abs(sum(firsts) - len(firsts) / 2) <= 0.5


def test_the_generated_data_say_what_they_are(tmp_path):
  data = load(tmp_path, name="embedded/emoji/en")
  assert data.describe() == (
    "5,240 training and 588 validation questions, generated from groups and keywords, 10 answers,"
    " 260 in the vocabulary"
  )
  majority = data.majority()
  assert majority.pop("") == pytest.approx((0.5 * 524 + 8) / 588)
  assert majority == {"group en": 0.5, "keyword en": 0.5, "which en": 0.125}
  both = load(tmp_path, name="embedded/emoji/en+de", validation_split="test", seq_length=80)
  assert len(both.answers) == 20 and {"ja", "nein", "yes"} < {*both.answers}
  two = load(tmp_path, questions.load_statements, name="embedded/emoji/de", seq_length=80)
  assert two.describe() == (
    "3,312 training and 384 validation statements on two images, generated from groups and"
    " keywords, 260 in the vocabulary"
  )
  assert {*two.majority().values()} == {0.5} and two.show(two.validation[0]).endswith(": true")
  for data in (both, two):
    before = json.loads(json.dumps(data.identity))
    assert before == data.identity and before["train"]["version"] == emoji_questions.VERSION
  with pytest.raises(
    ValueError, match="no questions of 'vqa': set data.name to pairs_jsonl, for y"
  ):
    load(tmp_path, name="vqa")
  with pytest.raises(ValueError, match="training and validation data are the same"):
    load(tmp_path, name="embedded/emoji/en", validation_split="train")


# ---------------------------------------------------------------------------------------------
# One's own
# ---------------------------------------------------------------------------------------------


def test_soft_scores_are_the_mean_accuracy_over_all_but_one_annotator():
  """As VQA's official code has it, with ten annotators."""
  for count in range(1, 11):
    annotators = ["a"] * count + [f"other {i}" for i in range(10 - count)]
    accuracies = [
      min(1, (annotators[:left] + annotators[left + 1 :]).count("a") / 3) for left in range(10)
    ]
    assert questions.soft_scores(annotators)["a"] == pytest.approx(np.mean(accuracies))


def ask(image, question, answer, **others):
  return {"image": f"{image}.png", "question": question, "answer": answer, **others}


def test_answers_that_are_common_in_training_are_known(own):
  """By the majority of annotators; targets are theirs, of all known answers."""
  train = [
    ask(0, "what?", "Cat"),
    ask(1, "what?", ["cat", "cat", "dog", "dog", "dog", "a  fox"]),
    ask(2, "what?", ["dog", "cat", "cow", "cow"]),
    ask(3, "what?", "cat"),
    ask(4, "what?", ["fox", "fox"]),
    ask(5, "why?", "dog"),
  ]
  validation = [ask(6, "what?", ["cat"] * 3 + ["dog"]), ask(7, "what?", "cow"), ask(8, "?", "dog")]
  data = own(train, validation, least_answers=2)
  # A cow is the majority's of one question, and a fox of one.
  assert data.answers == ("cat", "dog") and data.unanswerable == (1, 1)
  targets = np.stack([data.train[i]["targets"] for i in range(len(data.train))])
  np.testing.assert_allclose(targets, [[1, 0], [0.6, 0.9], [0.3, 0.3], [1, 0], [0, 1]])
  assert targets.dtype == np.float32
  targets = np.stack([data.validation[i]["targets"] for i in range(3)])
  np.testing.assert_allclose(targets, [[0.9, 0.3], [0, 0], [0, 1]])
  assert data.show(data.validation[0]) == "'what?': cat"
  assert data.show(data.validation[1]) == "'what?': no known answer"
  assert "2 answers" in data.describe() and "generated" not in data.describe()
  assert "1 training questions have no answer of these and are left out, 1 vali" in data.describe()
  # Cat's scores in training have the larger sum, 2.9 to 2.2.
  assert data.majority() == {"": pytest.approx(0.9 / 3)}
  everyone = own(train, validation, least_answers=1)
  assert everyone.answers == ("cat", "cow", "dog", "fox")
  with pytest.raises(
    ValueError, match="0 answers are those of at least 9 training questions .the "
  ):
    own(train, validation)


@pytest.mark.parametrize("most", [1, 3, 4])
def test_lists_that_can_never_be_right_are_told(most, own, caplog):
  """A text scores 1, and a list of it 0.3, as of one of ten annotators."""
  train = [ask(0, "?", "no"), ask(1, "?", ["yes"]), ask(2, "?", ["no"] * most + ["yes"])]
  data = own(train, [ask(6, "?", "no")], least_answers=1)
  scores = [float(data.train[i]["targets"].max()) for i in range(3)]
  assert scores == pytest.approx([1, 0.3, {1: 0.3, 3: 0.9, 4: 1.0}[most]])
  told = [text for text in caplog.messages if "equal ones" in text]
  assert len(told) == (most < 4)
  assert not told or (
    "train.jsonl: line 2 and all others" in told[0] and f"{most} equal" in told[0]
  )


def test_the_majority_is_of_the_kind(own):
  train = [ask(i, "?", a, type="x") for i, a in enumerate(["no", "yes", "no"])]
  train += [ask(i, "?", "two", type="y") for i in range(4)]
  validation = [ask(6, "a", "yes", type="x"), ask(7, "b", "no", type="x")]
  validation += [ask(8, "c", "two", type="y"), ask(9, "d", "two", type="z")]
  data = own(train, validation, least_answers=1)
  assert data.kinds == (("x",) * 3 + ("y",) * 4, ("x", "x", "y", "z"))
  assert data.majority() == {"": 0.75, "x": 0.5, "y": 1.0, "z": 1.0}


LINES = {
  "no question": ({"image": "0.png", "answer": "a"}, "it has no 'question', only 'image', 'ans"),
  "no answer": ({"image": "0.png", "question": "a"}, "it has no 'answer', only"),
  "no answers": (ask(0, "?", []), "its answer is an empty list"),
  "an empty answer": (ask(0, "?", " "), "its answer is empty"),
  "a number": (ask(0, "?", 3), "its answer is 3, not a text"),
  "a number of many": (ask(0, "?", ["a", 3]), "its answer is 3, not a text"),
  "an empty question": (ask(0, "", "a"), "its question is empty"),
  "an odd type": (ask(0, "?", "a", type=1), "its type is 1, not a text"),
}


@pytest.mark.parametrize("kind", LINES)
def test_a_bad_question_is_named_or_left_out(kind, own, tmp_path):
  line, message = LINES[kind]
  rows = [ask(1, "?", "a"), line, ask(2, "?", "b")]
  options = {"least_answers": 1}
  where = f"^{tmp_path}/train.jsonl: line 2 cannot be read ."
  with pytest.raises(ValueError, match=where + message) as error:
    own(rows, [ask(3, "?", "a")], **options)
  assert "\n" not in str(error.value)
  data = own(rows, [ask(3, "?", "a")], **options, skip_bad=1)
  assert len(data.train) == 2 and len(data.bad_records) == data.identity["left_out"] == 1


def state(images, text, label):
  return {"images": [f"{i}.png" for i in images], "text": text, "label": label}


STATEMENTS = {
  "no label": ({"images": ["0.png", "1.png"], "text": "a"}, "it has no 'label', only"),
  "a label": (state("01", "a", "maybe"), "its label is 'maybe', neither true nor false"),
  "a number": (state("01", "a", 1), "its label is 1, neither true nor false"),
  "one image": (state("0", "a", True), "its images are \\['0.png'\\], not a list of two paths"),
  "a path": ({"images": "0.png", "text": "a", "label": True}, "its images are '0.png', not a li"),
  "no path": ({"images": ["0.png", 4], "text": "a", "label": True}, "its images is 4, not the pa"),
  "a missing image": (state("0x", "a", True), ".*x.png: it is missing"),
  "no text": ({"images": ["0.png", "1.png"], "label": True}, "it has no 'text', only"),
}


@pytest.mark.parametrize("kind", STATEMENTS)
def test_a_bad_statement_is_named(kind, own, tmp_path):
  line, message = STATEMENTS[kind]
  rows, options = [state("12", "a", True), line], {"kind": questions.load_statements}
  where = f"^{tmp_path}/train.jsonl: line 2 cannot be read ."
  with pytest.raises(ValueError, match=where + message) as error:
    own(rows, [state("34", "b", False)], **options)
  assert "\n" not in str(error.value)
  assert len(own(rows, [state("34", "b", False)], **options, skip_bad=1).train) == 1


def test_a_statement_has_its_two_images_in_order(own):
  train = [state("12", "a", True), state("21", "b", "False"), state("11", "c", "true")]
  data = own(train, [state("34", "d", False)], kind=questions.load_statements, view=view(5))
  assert [int(data.train[i]["label"]) for i in range(3)] == [1, 0, 1]
  assert data.train.image_of.tolist() == [[0, 1], [1, 0], [0, 0]]
  sample = data.validation[0]
  assert sample["images"].shape == (2, 5, 5, 3) and sample["label"] == 0
  for number, image in enumerate(sample["images"]):
    raw = data.validation.pictures[number]["image"]
    seen = data.validation.evaluation({"image": raw})["image"]
    np.testing.assert_array_equal(image, seen)
  batch = next(pipelines.train_iterator(data.train, batch_size=2, seed=0, augment=data.augment))
  assert batch["images"].shape == (2, 2, 5, 5, 3) and batch["label"].dtype == np.int32
  assert data.majority() == {"": 0.0} and data.show(sample) == "'d': false"
  assert "image_id" not in sample and "3 training and 1 validation statements" in data.describe()


def test_two_images_are_augmented_each_by_itself(own):
  options = {"kind": questions.load_statements, "view": view(5, crop_scale=0.2, flip=0.5)}
  data = own([state("11", "a", True)], [state("34", "b", False)], **options)
  seen = data.augment(data.train[0], np.random.default_rng(0))["images"]
  assert (seen[0] != seen[1]).any()


def test_questions_that_have_changed_are_refused(own):
  train, validation = [ask(i, "?", "ab"[i % 2]) for i in range(4)], [ask(5, "?", "a")]
  options = {"least_answers": 1}
  before = json.loads(json.dumps(own(train, validation, **options).identity))
  assert own(train, validation, **options, expected=before).identity == before
  with pytest.raises(ValueError, match="the train data are not those that this run was started w"):
    own([*train[:3], ask(3, "?", "a")], validation, **options, expected=before)
  before.pop("validation")
  assert len(own(train, [ask(6, "!", "a")], **options, expected=before).validation) == 1


@pytest.mark.parametrize(
  "task, kind",
  [
    ("visual_question_answering", questions.load_questions),
    ("visual_reasoning", questions.load_statements),
  ],
)
def test_a_config_has_what_is_read_and_nothing_else(task, kind):
  read = {
    name
    for name in DataConfig.__dataclass_fields__
    if task in (tasks_reading(f"data.{name}") or (task,))
  }
  parameters = inspect.signature(kind).parameters.values()
  given = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
  given |= {*caption_sources.Options._fields, *captions.Tokens._fields}
  of_view, of_pipelines = {"normalization", "eval_crop", "augment"}, {"workers", "prefetch"}
  of_captions = {"keywords", "image_key", "text_key"}
  assert read - of_view - of_pipelines == given - of_captions - {"workdir", "expected", "view"}
