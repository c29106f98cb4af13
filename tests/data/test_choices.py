"""Questions from lines and from data sets: what is read, what is scored, and what is refused."""

import codecs
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from magneto_jax.data import choices
from magneto_jax.data.choices import Option

LINE = {"context": "To be or not to", "choices": ["be", " fly\taway"], "label": 1}
PARTIAL = {"contexts": ["The cup", "The box"], "continuation": ", which is red.", "label": 0}


def write(path, *lines):
  texts = (line if isinstance(line, str | bytes) else json.dumps(line) for line in lines)
  path.write_bytes(b"\n".join(t.encode() if isinstance(t, str) else t for t in texts))
  return path


def test_both_forms_are_read_in_order(tmp_path):
  """One space joins a choice, unless there is one; partial evaluation takes texts as they are.

  The file's mark of byte order is not of the first line.
  """
  ends = {"context": "Once. ", "choices": ["A", "B", "C"], "label": 2, "id": 7}
  empty = {"context": "", "choices": ["A", "B"], "label": 0}
  path = write(tmp_path / "q.jsonl", LINE, PARTIAL, ends, empty, "", "")
  path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
  first, second, third, fourth = choices.read(str(path))
  assert first.options == (Option(LINE["context"], " be"), Option(LINE["context"], " fly\taway"))
  assert (first.label, first.where) == (1, f"{path}:1")
  assert second.options == tuple(Option(c, PARTIAL["continuation"]) for c in PARTIAL["contexts"])
  assert third.options == tuple(Option("Once. ", letter) for letter in "ABC")
  assert fourth.options == (Option("", "A"), Option("", "B"))


@pytest.mark.parametrize(
  "line, message",
  [
    ("", "the line is empty; it must be {"),
    ("{'context'", "not JSON: Expecting property name"),
    (b'{"context": "\xff"}', "not UTF-8: byte 0xff, the line's 14th"),
    ("[1]", r"\[1\] is not a JSON object; it must be {"),
    (
      LINE | {"context": "\ud800"},
      r"not text: it holds '\\ud800', which is half a character; it m",
    ),
    (LINE | {"label": 2}, "label=2 must be the index of the right choice, from 0 to 1$"),
    (LINE | {"label": -1}, r"label=-1 must .* \(a split without labels cannot be scored\)"),
    (LINE | {"label": "1"}, "label='1' must be of type int"),
    (LINE | {"label": True}, "label=True must be of type int"),
    (LINE | {"choices": "be"}, "choices='be' must be of type list"),
    (LINE | {"choices": ["be", 3]}, "choices must be a list of texts"),
    (LINE | {"choices": ["be"]}, "there must be two choices or more, not 1"),
    (LINE | {"choices": ["be", "  "]}, "what is scored is empty"),
    (LINE | {"context": None}, "context=None must be of type str"),
    (PARTIAL | {"continuation": ""}, "what is scored is empty"),
    ({"question": "?", "label": 0}, "its fields are question, label; they must be {"),
    ("[" * 100_000, "not JSON: maximum recursion"),
  ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
  path = write(tmp_path / "q.jsonl", LINE, line, LINE)
  with pytest.raises(ValueError, match=message) as error:
    choices.read_jsonl(path)
  assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_what_holds_no_question_is_refused(tmp_path):
  with pytest.raises(ValueError, match="q.jsonl is empty: it must hold a question a line"):
    choices.read(str(write(tmp_path / "q.jsonl", "\n")))
  with pytest.raises(FileNotFoundError, match="none.jsonl"):
    choices.read(str(tmp_path / "none.jsonl"))
  with pytest.raises(ValueError, match="'glue/rte' is neither a file nor a data set .*hellaswag"):
    choices.read("glue/rte")


# What TFDS gives of each data set, and what becomes of it.
EXAMPLES = {
  "hellaswag": (
    {
      "activity_label": b"Baking",
      "context": b"A man bakes. he then [header] How to bake [title] Begin  now. he",
      "endings": [b"eats [substeps] it.", b"runs [title] Fast."],
      "label": np.int32(1),
    },
    [
      ("Baking: A man bakes. he then How to bake. Begin now. he", " eats it."),
      ("Baking: A man bakes. he then How to bake. Begin now. he", " runs. Fast."),
    ],
    1,
  ),
  "story_cloze": (
    {"context": b"One. Two. Three. Four.", "endings": [b"Five.", b"Six."], "label": np.int32(2)},
    [("One. Two. Three. Four.", " Five."), ("One. Two. Three. Four.", " Six.")],
    1,
  ),
  "winogrande": (
    {
      "sentence": b"The cup is not in the box as the _ is, say, small.",
      "option1": b"cup",
      "option2": b"box",
      "label": np.int64(1),
    },
    [
      (f"The cup is not in the box as the {option}", " is, say, small.")
      for option in ("cup", "box")
    ],
    1,
  ),
  "wsc273": (
    {
      "text": b"Ann met  Joan. The dog saw his cat.",
      "pronoun_start": np.int32(27),
      "pronoun_end": np.int32(30),
      "pronoun_text": b"his",
      "option1": b"The dog",
      "option2": b"Joan",
      "label": np.int32(0),
    },
    [
      ("Ann met Joan. The dog saw the dog's", " cat."),
      ("Ann met Joan. The dog saw Joan's", " cat."),
    ],
    0,
  ),
}


@pytest.mark.parametrize("name", choices.FORMATTERS)
def test_a_data_sets_examples_become_questions(name):
  example, options, label = EXAMPLES[name]
  found = choices.FORMATTERS[name](example, "here")
  assert [tuple(option) for option in found.options] == options
  assert (found.label, found.where) == (label, "here")


@pytest.mark.parametrize("before, kept", [("It was late. ", "The"), ("", "The"), ("as ", "the")])
def test_an_option_begins_a_sentence_where_the_pronoun_does(before, kept):
  example = EXAMPLES["wsc273"][0] | {
    "text": f"{before}He ran.".encode(),
    "pronoun_start": len(before),
    "pronoun_end": len(before) + 2,
    "pronoun_text": b"He",
  }
  found = choices.FORMATTERS["wsc273"](example, "here")
  assert found.options[0] == Option(f"{before}{kept} dog", " ran.")


def test_a_split_without_labels_is_refused():
  for name, (example, _, _) in EXAMPLES.items():
    with pytest.raises(ValueError, match=r"here: label=-1 .*a split without labels"):
      choices.FORMATTERS[name](example | {"label": -1}, "here")
  with pytest.raises(ValueError, match="here: its sentence has no blank"):
    choices.FORMATTERS["winogrande"](EXAMPLES["winogrande"][0] | {"sentence": b"None."}, "here")


class Winogrande(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Three schemas by the name and the features of the real ones."""

  VERSION = tfds.core.Version("1.2.0")

  def _info(self):
    features = {name: tfds.features.Text() for name in ("sentence", "option1", "option2")}
    features["label"] = tfds.features.ClassLabel(names=["1", "2"])
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"validation": self._generate_examples()}

  def _generate_examples(self):
    for i in range(3):
      yield i, {"sentence": f"{i}: the _ ran.", "option1": "a", "option2": "b", "label": "2"}


def test_prepared_data_are_read_by_name(tmp_path):
  Winogrande(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  found = choices.read("winogrande", data_dir=str(tmp_path))
  texts = {question.options for question in found}
  assert texts == {tuple(Option(f"{i}: the {o}", " ran.") for o in "ab") for i in range(3)}
  assert {question.label for question in found} == {1}
  assert found[2].where == "winogrande, validation, example 2"
  with pytest.raises(ValueError, match=r"winogrande/1.2.0 has no split 'test'; it has \['valid"):
    choices.read("winogrande", split="test", data_dir=str(tmp_path))
  (shard,) = tmp_path.rglob("*.array_record*")
  shard.write_bytes(shard.read_bytes()[:-100])
  with pytest.raises(ValueError, match="winogrande, validation, example 0 cannot be read"):
    choices.read("winogrande", data_dir=str(tmp_path))
