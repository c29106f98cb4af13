"""Searches images, or texts: `python -m magneto_jax.search --workdir=DIR --images=FOLDER "a text"`.

By a model of image_text_retrieval. Each text, and each `--image` that is an example, is answered
with what is nearest to it: images of the folder `--images`, at any depth, or with `--texts=FILE`
the lines of a file. The score is the cosine of both features, between -1 and 1.

Files that are no images, or are broken, are told by name and left out; a query that is one ends the
command.
"""

import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from magneto_jax import cli, decoding, reporting, runs
from magneto_jax.config import ConfigError, config_errors
from magneto_jax.data import documents, files, image_files
from magneto_jax.tasks import TASKS

# Of a picture: the longest side of an image, and how many it shows beside a query.
_SIDE, _IN_A_ROW = 160, 8
# A file of texts that is larger is no list that a person searches.
_MOST_BYTES = 2**30


class Found(NamedTuple):
  """What is near a query.

  Attributes:
    item: the path of an image, below its folder, or a text.
    place: where it is: the path of the image's file, or the number of the text's line.
    score: the cosine.
  """

  item: str
  place: str | int
  score: float


class Query(NamedTuple):
  """What is searched for.

  Attributes:
    kind: `text` or `image`.
    given: the text, or the path of the image.
  """

  kind: str
  given: str


class Items(NamedTuple):
  """What is searched.

  Attributes:
    kind: `images` or `texts`.
    names, places: see `Found`.
    features_NE: of each of them, of length 1.
  """

  kind: str
  names: list[str]
  places: list[str] | list[int]
  features_NE: np.ndarray

  def nearest(self, feature_E: np.ndarray, top: int) -> list[Found]:
    """The items with the largest cosines, the largest first; of equals the first."""
    scores_N = self.features_NE @ feature_E
    order = np.argsort(-scores_N, kind="stable")[:top]
    return [Found(self.names[i], self.places[i], float(scores_N[i])) for i in order]


def main() -> None:
  """Defines the flags and runs the command."""
  cli.define_workdir_flag("The workdir of a run of image_text_retrieval.")
  cli.define_step_flag()
  flags.DEFINE_string("images", "", "A folder, whose images are searched, at any depth.")
  flags.DEFINE_string("texts", "", "A file, whose lines are searched, UTF-8; empty ones are none.")
  flags.DEFINE_multi_string("image", [], "An image to search by; may be repeated.")
  flags.DEFINE_integer("top", 5, "How many are found for each query, at most.", lower_bound=1)
  flags.DEFINE_integer("batch_size", 32, "Images, or texts, at a time.", lower_bound=1)
  flags.DEFINE_string("output", "", "A file for what is found, as JSON.")
  flags.DEFINE_string("picture", "", "A PNG file: the queries, and what is found for each.")
  run_task_file = cli.define_task_file_flag()
  cli.run(lambda texts: run(flags.FLAGS, texts, run_task_file), words=True)


def run(args, texts: Sequence[str], run_task_file) -> list[dict[str, Any]]:
  """Prints, and writes, what the flags ask for; returns what `--output` holds."""
  run_task_file()
  queries = [Query("text", text) for text in texts] + [Query("image", path) for path in args.image]
  refuse(args, queries)
  embedder = open_embedder(args.workdir, args.step, args.batch_size)
  # Before a folder of images is read.
  features_QE = features_of(embedder, queries)
  items = read_images(embedder, args.images) if args.images else read_texts(embedder, args.texts)
  found = [items.nearest(feature_E, args.top) for feature_E in features_QE]
  results = [
    {
      "query": query._asdict(),
      "results": [{items.kind[:-1]: x.item, "place": x.place, "score": x.score} for x in of_query],
    }
    for query, of_query in zip(queries, found, strict=True)
  ]
  for query, of_query in zip(queries, found, strict=True):
    told = f"{query.given}\n" + "".join(f"  {x.score:7.4f}  {x.item}\n" for x in of_query)
    # Names of files are the bytes that they were.
    sys.stdout.buffer.write(told.encode(errors="surrogateescape"))
  sys.stdout.buffer.flush()
  if args.output:
    described = {"workdir": args.workdir, "searched": args.images or args.texts, "found": results}
    files.write_durably(args.output, (json.dumps(described, indent=2) + "\n").encode())
  if args.picture:
    path = pathlib.Path(args.picture)
    title = f"{args.workdir}: what is nearest in {args.images or args.texts}"
    reporting.draw_rows(path, contact_sheet(items.kind, queries, found), title=title)
  return results


def refuse(args, queries: Sequence[Query]) -> None:
  """Raises ConfigError for flags that make no search."""
  if bool(args.images) == bool(args.texts):
    raise ConfigError("give --images=FOLDER or --texts=FILE, one of the two: what is searched")
  if not queries:
    raise ConfigError('give what to search for: a text, "in quotes", or --image=FILE')
  if args.texts and any(query.kind == "text" for query in queries):
    raise ConfigError(
      "--texts=FILE is searched by --image=FILE, as texts are not learned to be near texts"
    )
  for text in (query.given for query in queries if query.kind == "text"):
    try:
      text.encode()
    except UnicodeEncodeError:
      raise ConfigError(f"{text!r} is not valid text") from None
    if not text.strip():
      raise ConfigError("a text to search for is empty")
  for name in ("output", "picture"):
    if not args[name].value:
      continue
    path = pathlib.Path(args[name].value)
    if path.is_dir():
      raise ConfigError(f"--{name}={path} is a folder: name a file")
    if not path.parent.is_dir():
      raise ConfigError(f"--{name}={path}: there is no folder {path.parent}: make it first")


def open_embedder(workdir: str, step: int | str | None, rows: int) -> decoding.Embedder:
  """What makes features with the model of a run.

  Raises:
    ConfigError: the model has none.
  """
  record = runs.held_record(workdir)
  task = TASKS[record.config.task]
  if task.embedder is None:
    raise ConfigError(
      f"{workdir} holds a run of task {record.config.task!r}, whose model does not search: give the"
      " workdir of one of image_text_retrieval"
    )
  tokenizer = runs.load_tokenizer(workdir)
  model, variables = runs.load(workdir, step=step)
  return task.embedder(record.config, model, variables, tokenizer, rows=rows)


def features_of(embedder: decoding.Embedder, queries: Sequence[Query]) -> np.ndarray:
  """[Q, E], the features of queries, texts before images."""
  texts = [query.given for query in queries if query.kind == "text"]
  paths = [query.given for query in queries if query.kind == "image"]
  parts = []
  with config_errors():
    if texts:
      parts.append(embedder.texts(texts))
    if paths:
      parts.append(embedder.images(map(cli.read_image, paths)))
  return np.concatenate(parts)


def read_images(embedder: decoding.Embedder, folder: str) -> Items:
  """The images of a folder; those that cannot be read are told and left out.

  Raises:
    ConfigError: there is no such folder, or no image in it.
  """
  root = pathlib.Path(folder)
  if not root.is_dir():
    raise ConfigError(f"--images={folder} is no folder that is there")
  names, places, left_out = [], [], 0

  def readable() -> Iterator[np.ndarray]:
    nonlocal left_out
    for name in image_files.names(folder):
      path = str(root / name)
      try:
        pixels = image_files.read(path)
      except (documents.BadRecord, OSError) as error:
        left_out += 1
        print(f"warning: left out: {_one_line(error)}", file=sys.stderr)
        continue
      names.append(name)
      places.append(os.path.abspath(path))
      yield pixels

  features_NE = embedder.images(readable())
  if not names:
    broken = f", and {left_out:,} that cannot be read" if left_out else ""
    raise ConfigError(f"--images={folder} holds no image ({image_files.ENDINGS_IN_WORDS}){broken}")
  return Items("images", names, places, features_NE)


def read_texts(embedder: decoding.Embedder, path: str) -> Items:
  """The lines of a file that hold a text.

  Raises:
    ConfigError: there is no such file or text, or a line is no UTF-8 or too long for the model.
  """
  if not pathlib.Path(path).is_file():
    raise ConfigError(f"--texts={path} is no file that is there")
  if pathlib.Path(path).stat().st_size > _MOST_BYTES:
    raise ConfigError(f"--texts={path} has more than {_MOST_BYTES:,} bytes: cut it into parts")
  texts, numbers = [], []
  for number, line in enumerate(pathlib.Path(path).read_bytes().split(b"\n"), 1):
    try:
      text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
      raise ConfigError(f"{path}:{number} is not UTF-8 ({error.reason})") from None
    if text:
      texts.append(text)
      numbers.append(number)
  if not texts:
    raise ConfigError(f"--texts={path} holds no text")
  with config_errors():
    return Items("texts", texts, numbers, embedder.texts(texts, [f"{path}:{n}" for n in numbers]))


def contact_sheet(
  kind: str, queries: Sequence[Query], found: Sequence[Sequence[Found]]
) -> list[reporting.Row]:
  """A row for each query: its image, if it is one, and what is found; of texts those words."""
  rows = []
  for query, of_query in zip(queries, found, strict=True):
    images, captions, title = [], [], query.given
    if query.kind == "image":
      images.append(_thumbnail(query.given))
      captions.append(
        "searched for"
        if kind == "images"
        else "; ".join(f"{x.item} {x.score:.3f}" for x in of_query)
      )
    if kind == "images":
      images += [_thumbnail(str(x.place)) for x in of_query[:_IN_A_ROW]]
      captions += [f"{x.score:.3f} {x.item}" for x in of_query[:_IN_A_ROW]]
    rows.append(reporting.Row(_drawable(title), images, [*map(_drawable, captions)]))
  return rows


def _drawable(words: str) -> str:
  """Words in which bytes of a file's name that are no text have a sign."""
  return words.encode(errors="surrogateescape").decode(errors="replace")


def _thumbnail(path: str) -> np.ndarray:
  """The pixels of a file, smaller where they are many."""
  image = image_files.read(path)
  step = max(1, -(-max(image.shape[:2]) // _SIDE))
  return image[::step, ::step]


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())


if __name__ == "__main__":
  main()
