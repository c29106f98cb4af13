"""Questions with several answers, of which one is right: a user's own, and TFDS data sets.

A question is a list of options, each a context and the continuation that is scored after it. In
most sets the context is the question's and the continuations differ. In partial evaluation (the
Winograd schemas) it is the other way about: each option is put into the text, and the rest of the
text, the same for all, is scored after it.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from magneto_jax.data import text_files, tfds_text


class Option(NamedTuple):
  """What is read, and what is scored after it; together they are the text as it stands."""

  context: str
  continuation: str


class Question(NamedTuple):
  """Options, and the index of the right one; `where` says where it stands."""

  options: tuple[Option, ...]
  label: int
  where: str


def completions(context: str, choices: Sequence[str], label: int, where: str) -> Question:
  """A question whose choices follow its context, after one space unless there is one already."""
  apart = "" if not context or context[-1].isspace() else " "
  options = (Option(context, c if c[:1].isspace() else apart + c) for c in choices)
  return _checked(Question(tuple(options), label, where))


def substitutions(contexts: Sequence[str], continuation: str, label: int, where: str) -> Question:
  """Partial evaluation: one continuation, exactly as it is given, after each of the contexts."""
  options = tuple(Option(context, continuation) for context in contexts)
  return _checked(Question(options, label, where))


def _checked(question: Question) -> Question:
  """The question, if it can be asked; else ValueError that says where it stands."""
  options, label, where = question
  if len(options) < 2:
    raise ValueError(f"{where}: there must be two choices or more, not {len(options)}")
  if not 0 <= label < len(options):
    raise ValueError(
      f"{where}: label={label} must be the index of the right choice, from 0 to {len(options) - 1}"
      + (" (a split without labels cannot be scored)" if label == -1 else "")
    )
  if not all(option.continuation.strip() for option in options):
    raise ValueError(f"{where}: what is scored is empty")
  return question


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------

_FORMS = (
  '{"context": "...", "choices": ["...", "..."], "label": 0} or, for partial evaluation,'
  ' {"contexts": ["...", "..."], "continuation": "...", "label": 0}'
)
_KINDS = {
  "context": str,
  "choices": list,
  "contexts": list,
  "continuation": str,
  "label": int,
}


def read_jsonl(path: str | os.PathLike[str]) -> list[Question]:
  """The questions of a JSONL file, one a line: `completions`, or `substitutions`.

  A line is `{"context": str, "choices": [str, ...], "label": int}` or `{"contexts": [str, ...],
  "continuation": str, "label": int}`; other fields are not read. Every line must be a question, but
  empty ones, which are passed over at the file's end alone.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: with the file and the line's number, what is wrong with it.
  """
  with open(path, "rb") as file:
    content = file.read()
  lines = content[text_files.text_begin(content) :].rstrip().split(b"\n")
  if lines == [b""]:
    raise ValueError(f"{path} is empty: it must hold a question a line, {_FORMS}")
  return [_of_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _of_line(line: bytes, where: str) -> Question:
  try:
    values = text_files.json_object(line.decode())
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{where}: not UTF-8: byte {line[error.start]:#04x}, the line's {error.start + 1}th"
    ) from None
  except ValueError as error:
    raise ValueError(f"{where}: {error}; it must be {_FORMS}") from None
  for name, kind in _KINDS.items():
    value = values.get(name)
    if name not in values:
      continue
    if not isinstance(value, kind) or isinstance(value, bool):
      raise ValueError(f"{where}: {name}={value!r:.40} must be of type {kind.__name__}")
    if kind is list and not all(isinstance(text, str) for text in value):
      raise ValueError(f"{where}: {name} must be a list of texts, not {value!r:.40}")
  for make, names in (
    (completions, ("context", "choices", "label")),
    (substitutions, ("contexts", "continuation", "label")),
  ):
    if values.keys() >= set(names):
      return make(*(values[name] for name in names), where)
  raise ValueError(f"{where}: its fields are {', '.join(values)[:80]}; they must be {_FORMS}")


# ---------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)


def _cleaned(text: str) -> str:
  """WikiHow's marks taken out: a title begins a sentence, other brackets go, spaces are single."""
  text = re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))
  return text.replace("  ", " ").strip()


def _hellaswag(example: Mapping[str, Any], where: str) -> Question:
  """`activity: context`.

  Differs: the context's second sentence, which others begin with a capital, is not set apart in
  TFDS, and stays in lower case.
  """
  context = f"{_text(example['activity_label'])}: {_text(example['context'])}"
  endings = [_cleaned(_text(ending)) for ending in example["endings"]]
  return completions(_cleaned(context), endings, int(example["label"]), where)


def _story_cloze(example: Mapping[str, Any], where: str) -> Question:
  """Four sentences, and two endings, which are counted from 1."""
  endings = [_text(ending) for ending in example["endings"]]
  label = int(example["label"])
  return completions(_text(example["context"]), endings, label if label < 0 else label - 1, where)


def _winogrande(example: Mapping[str, Any], where: str) -> Question:
  """Each option in place of the blank, `_`."""
  before, blank, after = _text(example["sentence"]).partition("_")
  if not blank:
    raise ValueError(f"{where}: its sentence has no blank (_)")
  options = [before + _text(example[name]) for name in ("option1", "option2")]
  return substitutions(options, after, int(example["label"]), where)


_POSSESSIVE = frozenset(("my", "his", "her", "our", "their"))
_LOWERED = frozenset(("A", "An", "The", "She", "He", "It", "They", "My", "His", "Her", "Their"))


def _wsc273(example: Mapping[str, Any], where: str) -> Question:
  """Each option in place of the pronoun, as a possessive or within a sentence if that is one."""
  text, start = _text(example["text"]), int(example["pronoun_start"])
  before, after = text[:start], text[int(example["pronoun_end"]) :]
  ends_one = not before.strip() or before.rstrip().endswith((".", "!", "?"))

  def put(option: str) -> str:
    first, *rest = option.split(" ")
    first = first.lower() if first in _LOWERED and not ends_one else first
    own = "'s" if _text(example["pronoun_text"]).lower() in _POSSESSIVE else ""
    return _single(before + " ".join([first, *rest]) + own)

  options = [put(_text(example[name])) for name in ("option1", "option2")]
  return substitutions(options, _single(after), int(example["label"]), where)


def _single(text: str) -> str:
  return re.sub(" {2,}", " ", text)


# By the name of the data set in TFDS.
FORMATTERS: Mapping[str, Callable[[Mapping[str, Any], str], Question]] = {
  "hellaswag": _hellaswag,
  "story_cloze": _story_cloze,
  "winogrande": _winogrande,
  "wsc273": _wsc273,
}


def read_tfds(name: str, *, split: str, data_dir: str = "") -> list[Question]:
  """The questions of a split of a prepared TFDS data set, one of FORMATTERS.

  Raises:
    FileNotFoundError: it is not prepared under `data_dir`.
    ValueError: there is no formatter for it, no such split, or an example that is no question.
  """
  dataset = re.split("[/:]", name)[0]
  if dataset not in FORMATTERS:
    raise ValueError(
      f"{name!r} is neither a file nor a data set that is known to ask questions:"
      f" {', '.join(FORMATTERS)}; others can be written as JSONL, {_FORMS}"
    )
  _, examples = tfds_text.tfds_examples(name, split=split, data_dir=data_dir)

  def question(index: int) -> Question:
    where = f"{name}, {split}, example {index}"
    try:
      example = examples[index]
    except Exception as error:  # ArrayRecord, protocol buffers and TFDS have no common one.
      reason = " ".join(str(error).split())
      raise ValueError(
        f"{where} cannot be read ({type(error).__name__}: {reason:.120}): prepare the data anew"
      ) from error
    return FORMATTERS[dataset](example, where)

  return list(map(question, range(len(examples))))


def is_file(name: str) -> bool:
  """Whether a name is a file's, which need not be there, and not a data set's."""
  return os.path.exists(name) or name.endswith((".jsonl", ".json"))


def read(name: str, *, split: str = "validation", data_dir: str = "") -> list[Question]:
  """The questions of a file, or of a data set of that name; see `read_jsonl` and `read_tfds`."""
  if is_file(name):
    return read_jsonl(name)
  return read_tfds(name, split=split, data_dir=data_dir)
