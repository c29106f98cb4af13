"""Documents from TFDS, read through ArrayRecord files: no TensorFlow, no network.

Whether a data set is there is decided by looking on disk, because asking TFDS to build one that
is not makes it search the network, for minutes where there is none.
"""

import bisect
import difflib
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from magneto_jax.data import documents, files


def tfds_text(
  name: str, *, split: str, text_key: str = "text", data_dir: str = ""
) -> documents.Documents:
  """Documents of one split of a prepared TFDS data set.

  Args:
    name: as in `tfds.load`: `lm1b`, `c4/en`, `wikipedia/20230601.en`, `lm1b:1.1.0`.
    split: a TFDS split, slices included: `train`, `train[:1%]`.
    text_key: the feature that holds the text.
    data_dir: where TFDS keeps its data; empty means TFDS's own default.

  Returns:
    The documents, one an example.

  Raises:
    FileNotFoundError: the data set exists in TFDS but is not prepared under `data_dir`.
    ValueError: no such data set, split or feature, it is not stored as ArrayRecord, or what TFDS
      noted of it is damaged.
  """
  examples = texts_of(name, split=split, keys={"text_key": text_key}, data_dir=data_dir)
  return documents.Documents(
    size=examples.size,
    read=lambda index: examples.read(index)[0],
    identity=examples.identity | {"text_key": text_key, "documents": examples.size},
  )


class Examples(NamedTuple):
  """Texts of the examples of a split.

  Attributes:
    size: number of examples.
    read: index -> the texts of one; BadRecord if it is damaged.
    place: index -> the file that holds it, and its index in there.
    identity: JSON-able values that name the split's content.
  """

  size: int
  read: Callable[[int], tuple[str, ...]]
  place: Callable[[int], tuple[str, int]]
  identity: dict[str, Any]


def texts_of(name: str, *, split: str, keys: Mapping[str, str], data_dir: str = "") -> Examples:
  """Several texts of each example of a split of a prepared TFDS data set; see `tfds_text`.

  Args:
    name, split, data_dir: see `tfds_text`.
    keys: the features that hold the texts, by what errors call the choice of each.
  """
  builder = _prepared_builder(name, data_dir)
  info = builder.info
  try:
    shards = info.splits[split].file_instructions
  except (KeyError, ValueError):
    raise ValueError(
      f"{info.full_name} has no split {split!r}; it has {sorted(info.splits)}"
    ) from None
  for choice, key in keys.items():
    if key not in (possible := _text_keys(info.features)):
      raise ValueError(f"{info.full_name} has no text feature {key!r}; {choice} can be {possible}")
  examples = builder.as_data_source(split, file_format="array_record")
  ends = list(itertools.accumulate(shard.take for shard in shards))

  def place(index: int) -> tuple[str, int]:
    shard = bisect.bisect_right(ends, index)
    return shards[shard].filename, shards[shard].skip + index - (ends[shard] - shards[shard].take)

  def read(index: int) -> tuple[str, ...]:
    try:
      example = examples[index]
      texts = (example[key] for key in keys.values())
      return tuple(text.decode() if isinstance(text, bytes) else str(text) for text in texts)
    except (MemoryError, OSError):  # Of the machine; another day the record can be read.
      raise
    except Exception as error:  # ArrayRecord, protocol buffers and TFDS have no common one.
      reason = " ".join(str(error).split())
      raise documents.BadRecord(*place(index), f"{type(error).__name__}: {reason:.120}") from error

  # One name and version can be prepared again from changed downloads. Of all splits, because TFDS
  # does not know the bytes of a slice.
  split_bytes = {key: int(value.num_bytes) for key, value in info.splits.items()}
  identity = {"source": "tfds", "name": info.full_name, "split": split, "split_bytes": split_bytes}
  return Examples(len(examples), read, place, identity)


def tfds_examples(
  name: str, *, split: str, data_dir: str = ""
) -> tuple[dict[str, Any], Sequence[Mapping[str, Any]]]:
  """The features, by name, and the examples of one split of a prepared data set; see `tfds_text`.

  Raises:
    FileNotFoundError: the data set exists in TFDS but is not prepared under `data_dir`.
    ValueError: no such data set or split, or it cannot be read.
  """
  builder = _prepared_builder(name, data_dir)
  info = builder.info
  try:
    examples = builder.as_data_source(split, file_format="array_record")
  except (KeyError, ValueError):
    raise ValueError(
      f"{info.full_name} has no split {split!r}; it has {sorted(info.splits)}"
    ) from None
  return dict(info.features.items()), examples


def _text_keys(features: Any) -> list[str]:
  """Names of the features that hold one text an example."""
  import tensorflow_datasets as tfds

  return sorted(k for k, feature in features.items() if isinstance(feature, tfds.features.Text))


def _prepared_builder(name: str, data_dir: str) -> Any:
  """Builder of a data set that is on disk as ArrayRecord."""
  import tensorflow_datasets as tfds

  # Without these two imports c4, wikipedia, wmt14_translate, ... are not registered.
  import tensorflow_datasets.text
  import tensorflow_datasets.translate
  from tensorflow_datasets.core import read_only_builder

  where = {"data_dir": os.path.expanduser(data_dir)} if data_dir else {}
  directory = data_dir or tfds.core.constants.DATA_DIR
  dataset = pathlib.Path(os.path.expanduser(directory), re.split("[/:]", name)[0])
  _refuse_foreign_features(dataset)
  try:
    # Not `tfds.builder`: it falls back on the data set's code, whose constructor asks a bucket.
    builder = read_only_builder.builder_from_files(name, **where)
  except tfds.core.DatasetNotFoundError:
    raise _not_prepared(name, directory) from None
  except Exception as error:  # Of damaged metadata: JSON's, protocol buffers' or TFDS's own.
    reason = " ".join(str(error).split())
    raise ValueError(
      f"{name} under {directory} cannot be read ({type(error).__name__}: {reason:.200}): prepare it"
      " anew"
    ) from error
  # Asked of all formats, since convert_format leaves its result beside the original.
  if tfds.core.FileFormat.ARRAY_RECORD in builder.info.available_file_formats():
    return builder
  raise ValueError(
    f"{builder.info.full_name} is stored as {builder.info.file_format.value}, which only "
    "TensorFlow reads. Convert it, once, where TensorFlow is installed: "
    "python -m tensorflow_datasets.scripts.convert_format "
    f"--dataset_version_dir={builder.data_dir} --out_file_format=array_record"
  )


def _refuse_foreign_features(folder: pathlib.Path) -> None:
  """TFDS imports whatever module a features.json names: only its own may be named."""

  def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, value in pairs:
      if key in ("type", "pythonClassName", "python_class_name"):
        if "." in str(value) and not str(value).startswith("tensorflow_datasets."):
          raise ValueError(f"it names the class {value}, which is not TFDS's own")
    return dict(pairs)

  for path in sorted(folder.rglob("features.json")):
    files.read_json(path, object_pairs_hook=check)


def _not_prepared(name: str, directory: str) -> Exception:
  """The error for a data set that is not on disk: unknown, or known and how to prepare it."""
  import tensorflow_datasets as tfds

  known = tfds.list_builders(with_community_datasets=False)
  dataset = name.split("/")[0].split(":")[0]
  if dataset not in known:
    nearest = difflib.get_close_matches(dataset, ["embedded", "text_files", *known], n=3)
    return ValueError(
      f"no data set is called {name!r}; nearest names: {nearest}. "
      "data.name=embedded needs no download"
    )
  return FileNotFoundError(
    f"{name} is not prepared under {directory}. Prepare it once, with a network: python -c "
    '"import tensorflow_datasets as tfds, tensorflow_datasets.text, tensorflow_datasets.translate; '
    f"tfds.builder('{name}', data_dir='{directory}', file_format='array_record')"
    '.download_and_prepare()". Or use data.name=embedded, which needs no download'
  )
