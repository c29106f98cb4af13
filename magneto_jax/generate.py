"""Writes with a trained model: `python -m magneto_jax.generate --workdir=DIR`.

A language model continues `--prompt`. A model that translates does so with the lines of the
standard input, UTF-8, one text a line; an empty line stays one. Lines are read and written in
parts, so that a file of any size passes. A model of speech writes what it hears in each `--sound`,
or in each file that a line of the standard input names, as lines of a manifest: path, tab, text.
A model of captions does so with what each `--image` shows, one that answers questions with its
answer to `--question` about each; one that compares two images says whether what `--question`
states is true of the first two, of the next two, and so on.
"""

import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from magneto_jax import cli, decoding, runs
from magneto_jax.config import BeamConfig, ConfigError, config_errors
from magneto_jax.data import sounds
from magneto_jax.models.language import CausalLM
from magneto_jax.tasks import TASKS, Task, vision_language

# The flags that only some kinds of model read; those of searches with their field of `beam`.
_OF_PROMPTS = ("prompt", "tokens", "samples", "temperature", "top_k", "top_p", "seed")
_OF_BEAMS = {
  "beam_size": "size",
  "length_penalty": "length_penalty",
  "penalty": "penalty",
  "max_ratio": "max_ratio",
  "max_extra": "max_extra",
}
_OF_LINES = (*_OF_BEAMS, "scores", "too_long")
_OF_SOUNDS = (*_OF_LINES, "sound")
_OF_IMAGES = ("beam_size", "length_penalty", "penalty", "scores", "image")
_OF_QUESTIONS = ("scores", "image", "question")
_OF_SOME = dict.fromkeys((*_OF_PROMPTS, *_OF_SOUNDS, *_OF_IMAGES, *_OF_QUESTIONS))
# Lines or sounds that are read at once, in searches together: sorted, they waste less.
_SEARCHES = 16
_OF_KIND = {"sound": "WAV, FLAC, Ogg or MP3", "image": "JPEG, PNG, WebP, BMP or GIF"}
_OR_LINES = "Without it paths are read, one a line."
# Seconds of a sound that is read to be cut.
_LONGEST = 3600


def main() -> None:
  """Defines the flags and runs the command."""
  cli.define_workdir_flag("A workdir that train has filled.")
  cli.define_step_flag()
  flags.DEFINE_string("prompt", "", "The text to continue.")
  flags.DEFINE_integer(
    "tokens", 128, "How many tokens to add at most.", lower_bound=1, upper_bound=2**31 - 2
  )
  flags.DEFINE_integer("samples", 1, "How many continuations.", lower_bound=1)
  flags.DEFINE_float(
    "temperature", 0.8, "Divides the logits; 0 takes the best token each time.", lower_bound=0.0
  )
  flags.DEFINE_integer("top_k", 0, "Sample among the k best; 0: all.", lower_bound=0)
  flags.DEFINE_float(
    "top_p", 1.0, "Sample in the nucleus of this mass.", lower_bound=0.0, upper_bound=1.0
  )
  flags.DEFINE_integer("seed", 0, "The seed of the sampling.", lower_bound=0, upper_bound=2**32 - 1)
  define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
  fields = {field.name: field for field in dataclasses.fields(BeamConfig)}
  for flag, name in _OF_BEAMS.items():
    meaning = fields[name].metadata["doc"]
    define[fields[name].type](flag, None, f"Of searches: {meaning}; by default the run's.")
  flags.DEFINE_bool("scores", False, "Whether a line has its score and a tab before it.")
  flags.DEFINE_enum(
    "too_long", "refuse", ["refuse", "cut"], "What to do with what the model cannot hold."
  )
  flags.DEFINE_multi_string(
    "sound", [], f"A {_OF_KIND['sound']} file to hear; may be repeated. {_OR_LINES}"
  )
  flags.DEFINE_multi_string(
    "image", [], f"A {_OF_KIND['image']} file to look at; may be repeated. {_OR_LINES}"
  )
  flags.DEFINE_string("question", "", "What is asked about it, or stated about two of them.")
  run_task_file = cli.define_task_file_flag()
  cli.run(lambda: run(flags.FLAGS, run_task_file))


def run(args, run_task_file: Callable[[], None]) -> None:
  """Prints what the flags ask for."""
  run_task_file()
  if args.top_p == 0:
    raise ConfigError("--top_p must be above 0; for the best token each time set --temperature=0")
  tokenizer = runs.load_tokenizer(args.workdir)
  config = runs.read_record(args.workdir).config
  task = TASKS[config.task]
  read = _read_with(task)
  for name in _OF_SOME:
    if args[name].present and name not in read:
      raise ConfigError(f"--{name} is not read with a model of config.task={config.task!r}")
  if task.answerer and not args.question.strip():
    raise ConfigError('give --question="...", what is asked about the image, or stated')
  kind = "sound" if task.transcriber else "image" if task.captioner or task.answerer else ""
  paths = _paths(kind, args[kind].value) if kind else iter(())
  given = {name: args[flag].value for flag, name in _OF_BEAMS.items() if args[flag].present}
  config = dataclasses.replace(config, beam=dataclasses.replace(config.beam, **given))
  model, variables = runs.load(args.workdir, step=args.step)
  if task.transcriber:
    _write_down_sounds(args, paths, task.transcriber(config, model, variables, tokenizer))
  elif task.captioner:
    see = vision_language.see(config)
    _describe_images(args, paths, task.captioner(config, model, variables, tokenizer), see)
  elif task.answerer:
    held = runs.held_record(args.workdir).data
    _answer_about_images(args, paths, task.answerer(config, model, variables, tokenizer, held))
  elif task.translator:
    _translate_lines(args, task.translator(config, model, variables, tokenizer))
  elif isinstance(model, CausalLM):
    _continue_prompt(args, model, variables, tokenizer)
  else:
    raise ConfigError(f"a model of config.task={config.task!r} writes no text")


def _read_with(task: Task) -> Sequence[str]:
  """The flags that a task's models read, of those that only some do."""
  for writer, names in (
    (task.transcriber, _OF_SOUNDS),
    (task.captioner, _OF_IMAGES),
    (task.answerer, _OF_QUESTIONS),
    (task.translator, _OF_LINES),
  ):
    if writer:
      return names
  return _OF_PROMPTS


def _continue_prompt(args, model: CausalLM, variables, tokenizer) -> None:
  """Prints continuations."""
  with config_errors():
    prompt = [tokenizer.bos_id, *tokenizer.encode(args.prompt)]
    continuations = decoding.generate(
      model,
      variables,
      [prompt] * args.samples,
      max_new_tokens=args.tokens,
      key=jax.random.key(args.seed),
      temperature=args.temperature,
      top_k=args.top_k,
      top_p=args.top_p,
      eos_id=tokenizer.eos_id,
      pad_id=tokenizer.pad_id,
    )
  for i, tokens in enumerate(continuations):
    if args.samples > 1:
      print(f"--- {i + 1} of {args.samples}")
    print(args.prompt + tokenizer.decode(tokens))


def _translate_lines(args, translator: decoding.Translator) -> None:
  """Writes the translation of each line that comes in, in their order."""
  together = translator.rows * _SEARCHES
  if sys.stdin.isatty():  # Somebody waits for each.
    translator, together = dataclasses.replace(translator, rows=1), 1
  lines = enumerate(sys.stdin.buffer, 1)
  read = lambda numbered: _source(args, translator, *numbered)
  _answer(args, lines, together, read, translator.translate)


def _write_down_sounds(args, paths: Iterator[str], transcriber: decoding.Transcriber) -> None:
  """Writes a line for each sound, in their order."""
  read = lambda path: _wave(args, transcriber, path)
  _answer(args, paths, transcriber.rows * _SEARCHES, read, transcriber, name=lambda path: path)


def _describe_images(
  args,
  paths: Iterator[str],
  captioner: decoding.Captioner,
  see: Callable[[np.ndarray], np.ndarray],
) -> None:
  """Writes a line for each image, in their order."""
  read = lambda path: see(cli.read_image(path))
  _answer(args, paths, captioner.rows, read, captioner, name=lambda path: path)


def _answer_about_images(args, paths: Iterator[str], answerer: decoding.Answerer) -> None:
  """Writes a line for each image, or for each two, in their order."""
  paths, each = list(paths), answerer.images
  if len(paths) % each:
    raise ConfigError(
      f"{len(paths)} images are given, and the model compares two: give two, or several times two"
    )
  asked = zip(*[iter(paths)] * each, strict=True)

  def read(paths: Sequence[str]):
    seen = tuple(answerer.see(cli.read_image(path)) for path in paths)
    return seen if each > 1 else seen[0]

  with config_errors():
    # Images are seen as they are read: they may be much larger than what the model reads.
    of_seen = dataclasses.replace(answerer, see=lambda image: image)
    answer = functools.partial(of_seen, question=args.question)
    _answer(args, asked, answerer.rows, read, answer, name="\t".join)


def _paths(kind: str, given: Sequence[str]) -> Iterator[str]:
  """The files that flags name, or else lines of the standard input, in whatever bytes names are.

  Raises:
    ConfigError: there is none.
  """
  if given:
    return iter(given)
  lines = () if sys.stdin.isatty() else sys.stdin.buffer
  paths = filter(None, (os.fsdecode(line).rstrip("\r\n") for line in lines))
  for first in paths:
    return itertools.chain([first], paths)
  raise ConfigError(
    f"give --{kind}=FILE, of a {_OF_KIND[kind]} file, or paths of such on the standard input, one a"
    " line"
  )


def _answer(
  args,
  asked: Iterator,
  together: int,
  read: Callable[[Any], np.ndarray | None],
  answer: Callable[[list[np.ndarray]], list[list[decoding.Translation]]],
  name: Callable[[Any], str] | None = None,
) -> None:
  """Writes a line in answer to each, in their order, some of them at once.

  Args:
    args: the flags.
    asked: what is answered.
    together: how many are read at once.
    read: from one of them to what is searched for; None for an empty answer, or ConfigError.
    answer: from some of these to their texts.
    name: what of one stands before its text, with a tab between; None: nothing.
  """
  while part := list(itertools.islice(asked, together)):
    sources, refused = [], None
    for one in part:
      try:
        sources.append(read(one))
      except ConfigError as error:
        refused = error
        break
    # Of those before one that is refused nothing is lost.
    found = iter(answer([source for source in sources if source is not None]))
    for one, source in zip(part, sources, strict=False):
      text, score = ("", None) if source is None else next(found)[0]
      # One in is a line out.
      text = text.replace("\r", " ").replace("\n", " ")
      scored = ("" if score is None else f"{score:.4f}") + "\t" if args.scores else ""
      named = "" if name is None else name(one) + "\t"
      # Names are the bytes that they were.
      sys.stdout.buffer.write(f"{scored}{named}{text}\n".encode(errors="surrogateescape"))
    sys.stdout.buffer.flush()
    if refused is not None:
      raise refused


def _source(args, translator: decoding.Translator, number: int, line: bytes) -> np.ndarray | None:
  """A line's tokens; None for an empty one."""
  try:
    text = line.decode().rstrip("\r\n")
  except UnicodeDecodeError as error:
    raise ConfigError(f"line {number} of the input is not UTF-8 ({error.reason})") from None
  if not text.strip():
    return None
  (source,) = translator.encode([text])
  if len(source) <= translator.longest:
    return source
  said = f"line {number} of the input has {len(source)} tokens, and the model reads"
  if args.too_long == "refuse":
    raise ConfigError(f"{said} {translator.longest}: split it, or set --too_long=cut")
  print(f"warning: {said} the first {translator.longest} of them", file=sys.stderr)
  return translator.cut(source)


def _wave(args, transcriber: decoding.Transcriber, path: str) -> np.ndarray:
  """A sound at the model's rate."""
  rate = transcriber.model.encoder.sample_rate
  longest = transcriber.longest if args.too_long == "refuse" else _LONGEST * rate
  try:
    wave_S = sounds.read(path, sample_rate=rate, longest=longest)
  except sounds.TooLong as error:
    more = ", or set --too_long=cut" if args.too_long == "refuse" else ""
    raise ConfigError(f"{error}{more}") from None
  except (OSError, ValueError) as error:
    raise ConfigError(str(error)) from None
  if len(wave_S) > transcriber.longest:
    said = f"{path} has {len(wave_S) / rate:.2f} seconds"
    heard = f"the model hears the first {transcriber.longest / rate:g} of them"
    print(f"warning: {said}, and {heard}", file=sys.stderr)
  return wave_S[: transcriber.longest]


if __name__ == "__main__":
  main()
