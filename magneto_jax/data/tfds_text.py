"""Texts, images and sounds from TFDS, read through ArrayRecord files: no TensorFlow, no network.

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
from typing import Any, NamedTuple, TypeVar

import numpy as np

from magneto_jax.data import documents, files

T = TypeVar("T")

# Where TFDS notes a data set's features, and what it calls a plain one.
_FEATURES = "features.json"
_TENSOR = "tensorflow_datasets.core.features.tensor_feature.Tensor"


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
  prepared = _Split(name, split, data_dir)
  info = prepared.info
  for choice, key in keys.items():
    if key not in (possible := _text_keys(info.features)):
      raise ValueError(f"{info.full_name} has no text feature {key!r}; {choice} can be {possible}")
  read = prepared.reader(lambda example: tuple(_as_text(example[key]) for key in keys.values()))
  return Examples(prepared.size, read, prepared.place, prepared.identity)


def tfds_examples(
  name: str, *, split: str, data_dir: str = ""
) -> tuple[dict[str, Any], Sequence[Mapping[str, Any]]]:
  """The features, by name, and the examples of one split of a prepared data set; see `tfds_text`.

  Raises:
    FileNotFoundError: the data set exists in TFDS but is not prepared under `data_dir`.
    ValueError: no such data set or split, or it cannot be read.
  """
  prepared = _Split(name, split, data_dir)
  return dict(prepared.info.features.items()), prepared.examples


class Pictures(NamedTuple):
  """Encoded images, perhaps with a label each.

  Attributes:
    size: number of examples.
    read: index -> `decode` of the bytes of the image's file, and the class's number, -1 where there
      is none; BadRecord if the example is damaged.
    classes: their names.
    identity: JSON-able values that name the split's content.
  """

  size: int
  read: Callable[[int], tuple[np.ndarray, int]]
  classes: tuple[str, ...]
  identity: dict[str, Any]


def tfds_pictures(
  name: str,
  *,
  split: str,
  image_key: str,
  label_key: str,
  decode: Callable[[bytes], np.ndarray],
  data_dir: str = "",
) -> Pictures:
  """Images of one split of a prepared TFDS data set; see `tfds_text`.

  Args:
    name, split, data_dir: see `tfds_text`.
    image_key: the feature that holds the image.
    label_key: that of the label, a ClassLabel; empty: none is read.
    decode: bytes of a JPEG or PNG file -> pixels.
  """
  import tensorflow_datasets as tfds

  prepared = _Split(name, split, data_dir, undecoded=image_key)
  features, full_name = prepared.info.features, prepared.info.full_name
  for choice, key, kind in (
    ("image_key", image_key, tfds.features.Image),
    ("label_key", label_key, tfds.features.ClassLabel),
  ):
    held = sorted(k for k, feature in features.items() if isinstance(feature, kind))
    if key and key not in held:
      raise ValueError(
        f"{full_name} has no {kind.__name__} {key!r}; data.{choice} can be one of {held}"
      )

  def convert(example: Mapping[str, Any]) -> tuple[np.ndarray, int]:
    label = int(example[label_key]) if label_key else -1
    if label_key and label < 0:  # TFDS's way to say that there is none.
      raise ValueError(f"it has no label ({label})")
    return decode(example[image_key]), label

  return Pictures(
    prepared.size,
    prepared.reader(convert),
    tuple(features[label_key].names) if label_key else (),
    prepared.identity | {"image_key": image_key, "label_key": label_key},
  )


class CaptionedPictures(NamedTuple):
  """Encoded images with their texts.

  Attributes:
    size: number of examples.
    image: index -> `decode` of the bytes of the image's file; BadRecord if the example is damaged.
    texts: index -> the texts; BadRecord likewise.
    place: index -> the file that holds an example, and its index in there.
    identity: JSON-able values that name the split's content.
  """

  size: int
  image: Callable[[int], np.ndarray]
  texts: Callable[[int], tuple[str, ...]]
  place: Callable[[int], tuple[str, int]]
  identity: dict[str, Any]


def tfds_captions(
  name: str,
  *,
  split: str,
  image_key: str,
  text_key: str,
  decode: Callable[[bytes], np.ndarray],
  data_dir: str = "",
) -> CaptionedPictures:
  """Images of one split of a prepared TFDS data set, and the texts of each; see `tfds_text`.

  Args:
    name, split, data_dir: see `tfds_text`.
    image_key: the feature that holds the image.
    text_key: that of its text, or of its texts, which is a sequence; `captions/text` is the part
      `text` of the feature `captions`.
    decode: bytes of a JPEG or PNG file -> pixels.
  """
  import tensorflow_datasets as tfds

  prepared = _Split(name, split, data_dir, undecoded=image_key)
  features, full_name = prepared.info.features, prepared.info.full_name
  pictures = sorted(k for k, f in features.items() if isinstance(f, tfds.features.Image))
  if image_key not in pictures:
    raise ValueError(
      f"{full_name} has no Image {image_key!r}; data.image_key can be one of {pictures}"
    )
  keys = dict(_all_text_keys(features))
  if text_key not in keys:
    raise ValueError(
      f"{full_name} has no text feature {text_key!r}; data.text_key can be {sorted(keys)}"
    )

  def texts(example: Mapping[str, Any]) -> tuple[str, ...]:
    held: Any = example
    for key in keys[text_key]:
      held = held[key]
    return tuple(map(_as_text, [held] if isinstance(held, (bytes, str)) else held))

  return CaptionedPictures(
    prepared.size,
    prepared.reader(lambda example: decode(example[image_key])),
    prepared.reader(texts),
    prepared.place,
    prepared.identity | {"image_key": image_key, "text_key": text_key},
  )


def _all_text_keys(features: Any) -> list[tuple[str, tuple[str, ...]]]:
  """Names of the features of one or of several texts an example, and the way to each."""
  import tensorflow_datasets as tfds

  def is_text(feature: Any) -> bool:
    is_one = isinstance(feature, tfds.features.Tensor) and feature.shape == ()
    return is_one and np.dtype(feature.np_dtype).kind == "O"

  found = []
  for key, feature in features.items():
    if isinstance(feature, tfds.features.Sequence):
      feature = feature.feature
    if isinstance(feature, tfds.features.FeaturesDict):
      found += [(f"{key}/{k}", (key, k)) for k, part in feature.items() if is_text(part)]
    elif is_text(feature):
      found.append((key, (key,)))
  return found


class Spoken(NamedTuple):
  """Sounds with a text each.

  Attributes:
    size: number of examples.
    read: index -> what `convert` made of the sound, and the text; BadRecord if the example is
      damaged.
    place: index -> the file that holds it, and its index in there.
    shards: -> name, bytes and time of the last change of each file that holds some: other ones may
      hold others, under the same identity.
    identity: JSON-able values that name the split's content.
  """

  size: int
  read: Callable[[int], tuple[Any, str]]
  place: Callable[[int], tuple[str, int]]
  shards: Callable[[], list[tuple[str, int, int]]]
  identity: dict[str, Any]


def tfds_sounds(
  name: str,
  *,
  split: str,
  audio_key: str,
  text_key: str,
  convert: Callable[[np.ndarray | bytes, int], Any],
  data_dir: str = "",
) -> Spoken:
  """Sounds and texts of one split of a prepared TFDS data set; see `tfds_text`.

  Args:
    name, split, data_dir: see `tfds_text`.
    audio_key: the feature that holds the sound, of TFDS's Audio.
    text_key: that of the text.
    convert: `(samples, their rate) -> anything`; samples are integers [S] or [S, channels], or, of
      a data set that keeps sounds as they were, the bytes of their files.
  """
  prepared = _Split(name, split, data_dir)
  info = prepared.info
  if text_key not in (possible := _text_keys(info.features)):
    raise ValueError(
      f"{info.full_name} has no text feature {text_key!r}; data.text_key can be {possible}"
    )
  audio = _audio_features(pathlib.Path(prepared.directory))
  if audio_key not in audio:
    raise ValueError(
      f"{info.full_name} has no Audio {audio_key!r}; data.audio_key can be one of {sorted(audio)}"
    )
  noted = audio[audio_key]["audio"]
  rate = int(noted.get("sampleRate", 0))
  if not rate and not noted.get("lazyDecode"):
    raise ValueError(f"{info.full_name} does not say how many samples a second {audio_key!r} has")
  read = prepared.reader(
    lambda example: (convert(example[audio_key], rate), _as_text(example[text_key]))
  )
  identity = prepared.identity | {"audio_key": audio_key, "text_key": text_key}
  return Spoken(prepared.size, read, prepared.place, prepared.shards, identity)


class Columns(NamedTuple):
  """Texts with a label each.

  Attributes:
    name: the data set's, and the split's.
    size: number of examples.
    read: index in [0, size) -> the texts, then the label: a class's number, -1 where it is not
      known, or a float; BadRecord if the example is damaged.
    classes: their names; none where labels are numbers.
  """

  name: str
  size: int
  read: Callable[[int], tuple]
  classes: tuple[str, ...]


def tfds_columns(
  name: str, *, split: str, text_keys: Sequence[str], label_key: str, data_dir: str = ""
) -> Columns:
  """Labelled texts of one split of a prepared TFDS data set; see `tfds_text`.

  Args:
    name, split, data_dir: see `tfds_text`.
    text_keys: the features that hold texts.
    label_key: the feature that holds the label: of TFDS's ClassLabel, or a number.
  """
  import tensorflow_datasets as tfds

  prepared = _Split(name, split, data_dir)
  features, full_name = prepared.info.features, prepared.info.full_name
  for key in text_keys:
    if key not in (keys := _text_keys(features)):
      raise ValueError(f"{full_name} has no text feature {key!r}; data.text_key can be {keys}")
  if label_key not in (held := sorted(key for key in features if _is_number(features[key]))):
    raise ValueError(f"{full_name} has no label {label_key!r}; data.label_key can be one of {held}")
  label = features[label_key]
  classes = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
  number = int if classes else float
  read = prepared.reader(
    lambda example: (*(_as_text(example[key]) for key in text_keys), number(example[label_key]))
  )
  return Columns(f"{full_name}, {split}", prepared.size, read, classes)


class _Split:
  """One split of a data set that is on disk: its info, its size, and how an example is read.

  The feature that is left undecoded is given as the bytes that are stored.
  """

  def __init__(self, name: str, split: str, data_dir: str, undecoded: str = ""):
    import tensorflow_datasets as tfds

    self._arguments = name, split, data_dir, undecoded
    builder = _prepared_builder(name, data_dir)
    self.info = info = builder.info
    self.directory = str(builder.data_path)
    try:
      self._shards = info.splits[split].file_instructions
    except (KeyError, ValueError):
      raise ValueError(
        f"{info.full_name} has no split {split!r}; it has {sorted(info.splits)}"
      ) from None
    decoders = {undecoded: tfds.decode.SkipDecoding()} if undecoded in info.features else None
    self.examples = builder.as_data_source(split, decoders=decoders, file_format="array_record")
    self.size = len(self.examples)
    # One name and version can be prepared again from changed downloads. Of all splits, because TFDS
    # does not know the bytes of a slice.
    split_bytes = {key: int(value.num_bytes) for key, value in info.splits.items()}
    self.identity = {
      "source": "tfds",
      "name": info.full_name,
      "split": split,
      "split_bytes": split_bytes,
    }
    self._ends = list(itertools.accumulate(shard.take for shard in self._shards))

  def __reduce__(self) -> tuple:
    """In a worker it is opened anew: TFDS's own would be asked for TensorFlow there by sounds."""
    return _Split, self._arguments

  def place(self, index: int) -> tuple[str, int]:
    """The file that holds an example, and its index in there."""
    shard = bisect.bisect_right(self._ends, index)
    held = self._shards[shard]
    return held.filename, held.skip + index - (self._ends[shard] - held.take)

  def shards(self) -> list[tuple[str, int, int]]:
    """Name, bytes and time of the last change of the files that hold the examples."""
    found = ((shard.filename, os.stat(shard.filename)) for shard in self._shards)
    return [(os.path.basename(name), held.st_size, held.st_mtime_ns) for name, held in found]

  def reader(self, convert: Callable[[dict[str, Any]], T]) -> Callable[[int], T]:
    """`index -> convert(example)`; where that fails BadRecord, with the file and the place."""

    def read(index: int) -> T:
      try:
        return convert(self.examples[index])
      except (MemoryError, OSError, ImportError):  # Of the machine; another day it can be read.
        raise
      except Exception as error:  # ArrayRecord, protocol buffers and TFDS have no common one.
        reason = " ".join(str(error).split())
        what = f"{type(error).__name__}: {reason:.120}"
        raise documents.BadRecord(*self.place(index), what) from error

    return read


def _as_text(value: bytes | str) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)


def _text_keys(features: Any) -> list[str]:
  """Names of the features that hold one text an example."""
  import tensorflow_datasets as tfds

  return sorted(k for k, feature in features.items() if isinstance(feature, tfds.features.Text))


def _is_number(feature: Any) -> bool:
  """Whether a feature holds one number an example, or a class."""
  return feature.shape == () and np.issubdtype(feature.np_dtype, np.number)


def _prepared_builder(name: str, data_dir: str) -> Any:
  """Builder of a data set that is on disk as ArrayRecord."""
  import tensorflow_datasets as tfds

  # Without these two imports c4, wikipedia, wmt14_translate, ... are not registered.
  import tensorflow_datasets.text
  import tensorflow_datasets.translate

  where = {"data_dir": os.path.expanduser(data_dir)} if data_dir else {}
  directory = data_dir or tfds.core.constants.DATA_DIR
  dataset = pathlib.Path(os.path.expanduser(directory), re.split("[/:]", name)[0])
  _refuse_foreign_features(dataset)
  try:
    # Not `tfds.builder`: it falls back on the data set's code, whose constructor asks a bucket.
    builder = _builder(name, where)
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


def _builder(name: str, where: Mapping[str, str]) -> Any:
  """TFDS's builder of what it finds on disk; sounds are features that need no TensorFlow."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import dataset_info, read_only_builder
  from tensorflow_datasets.core.utils import error_utils

  with error_utils.reraise_with_context(tfds.core.DatasetNotFoundError):
    found = read_only_builder._find_builder_dir(name, **where)
  audio = _audio_features(pathlib.Path(found)) if found else {}
  if not audio:
    return read_only_builder.builder_from_files(name, **where)
  # TFDS's Audio imports TensorFlow when it is made; what is stored is a tensor, or a file's bytes.
  noted = files.read_json(pathlib.Path(found, _FEATURES))
  held = noted["featuresDict"]["features"]
  for key, feature in audio.items():
    kept = {k: v for k, v in feature["audio"].items() if k in ("shape", "dtype", "encoding")}
    if feature["audio"].get("lazyDecode"):
      kept |= {"shape": {}, "dtype": "string"}
    held[key] = {"pythonClassName": _TENSOR, "tensor": kept}
  proto = dataset_info.read_proto_from_builder_dir(found)
  proto.features.CopyFrom(tfds.features.FeatureConnector.from_json(noted).to_proto())
  return read_only_builder.ReadOnlyBuilder(found, info_proto=proto)


def _audio_features(folder: pathlib.Path) -> dict[str, Mapping[str, Any]]:
  """The features that hold sounds, by name, as TFDS noted them; none of what is from long ago."""
  if not (folder / _FEATURES).exists():
    return {}
  held = files.read_json(folder / _FEATURES).get("featuresDict", {}).get("features", {})
  return {key: feature for key, feature in held.items() if "audio" in feature}


def _refuse_foreign_features(folder: pathlib.Path) -> None:
  """TFDS imports whatever module a features.json names: only its own may be named."""

  def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, value in pairs:
      if key in ("type", "pythonClassName", "python_class_name"):
        if "." in str(value) and not str(value).startswith("tensorflow_datasets."):
          raise ValueError(f"it names the class {value}, which is not TFDS's own")
    return dict(pairs)

  for path in sorted(folder.rglob(_FEATURES)):
    files.read_json(path, object_pairs_hook=check)


def _not_prepared(name: str, directory: str) -> Exception:
  """The error for a data set that is not on disk: unknown, or known and how to prepare it."""
  import tensorflow_datasets as tfds

  known = tfds.list_builders(with_community_datasets=False)
  dataset = name.split("/")[0].split(":")[0]
  if dataset not in known:
    own = {"embedded", "text_files", "pair_files", "image_folder", "manifest", "pairs_jsonl"}
    others = {*own, *known} - {dataset}
    nearest = difflib.get_close_matches(dataset, others, n=3)
    return ValueError(
      f"no data set is called {name!r}; nearest names: {nearest}. "
      "data.name=embedded (of images embedded/mnist5k, of speech embedded/en, of images with texts"
      " embedded/emoji/en) needs no download"
    )
  return FileNotFoundError(
    f"{name} is not prepared under {directory}. Prepare it once, with a network: python -c "
    '"import tensorflow_datasets as tfds, tensorflow_datasets.text, tensorflow_datasets.translate; '
    f"tfds.builder('{name}', data_dir='{directory}', file_format='array_record')"
    '.download_and_prepare()". Or use data.name=embedded (of images embedded/mnist5k, of speech'
    " embedded/en), which needs no download"
  )
