"""Masked data modelling on images, texts and pairs of both, as BEiT-3 is pre-trained.

A row of a batch has some pairs, images alone and texts alone (`data.composition`). Of each some
patches and tokens are hidden, and what they were is answered from all that is left: of a pair from
both its image and its text. A patch's target is the token that a trained image tokenizer gives it
in the whole image; the tokenizer is part of the model and rests, and `config.image_tokenizer` names
the run that trained it. All three kinds go through one multiway encoder, in a call each.

The loss is the sum of four means, each over what is hidden of a part in the whole batch: patches
and tokens of pairs, patches of images alone, tokens of texts alone.

Reference: BEiT-3 (Image as a Foreign Language), arXiv 2208.10442, section 2.2; BEiT v2, arXiv
2208.06366; Foundation Transformers, arXiv 2210.06423, section 4.7.
Differs: how the losses are weighed, what is read in place of a hidden token, and how the heads are
made is not stated there. Here the parts count alike, hidden tokens are read as BERT reads them, and
the heads are linear.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from magneto_jax import sharding
from magneto_jax.config import ConfigError, TrainConfig
from magneto_jax.data import augmentation, captions, masked_pairs, masking, tokenizers
from magneto_jax.models.image_tokenizer import Frozen
from magneto_jax.models.vision_language import MaskedBEiT3, Parts
from magneto_jax.reporting import Row
from magneto_jax.tasks import beit3, common, image_tokenizer, masked_image, masked_lm
from magneto_jax.tasks.task import Batch, Facts, Task, Totals
from magneto_jax.theory import flops as theory_flops
from magneto_jax.theory import records


class _Names(NamedTuple):
  """Of a part of the loss: how arrays of a batch are called.

  Attributes:
    read: pixels, or tokens, as they are read.
    mask: of an image, True for what is hidden; of a text, True for what is no padding.
    places: which patches, or tokens, are to be answered.
    weights: 1 for each of these places, 0 for what fills them up.
    targets: of a text, what stood there.
  """

  read: str
  mask: str
  places: str
  weights: str
  targets: str = ""

  @property
  def is_image(self) -> bool:
    return not self.targets


def _names(part: str, mask: str, targets: str = "") -> _Names:
  return _Names(part, mask, f"{part}_places", f"{part}_weights", targets)


PARTS = {
  "pair_image": _names("pair_image", "pair_masked"),
  "pair_text": _names("pair_text", "pair_mask", "pair_targets"),
  "image": _names("image", "image_masked"),
  "text": _names("text", "text_mask", "text_targets"),
}
# What goes through the model together.
_KINDS = (("pair_image", "pair_text"), ("image",), ("text",))
_PAIR = _KINDS[0]
# In place of a target, where nothing is asked for.
_NOTHING = -1


def _kinds(batch: Batch) -> list[tuple[str, ...]]:
  """Those that a batch has samples of."""
  return [kind for kind in _KINDS if PARTS[kind[0]].read in batch]


def _parts(batch: Batch) -> list[str]:
  return [part for kind in _kinds(batch) for part in kind]


def _rows(array: jax.Array) -> jax.Array:
  """The samples of all rows, one after the other."""
  return array.reshape(-1, *array.shape[2:])


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


def load_data(
  config: TrainConfig, directory: str | os.PathLike, expected: Mapping[str, Any] | None = None
) -> masked_pairs.MaskedPairData:
  """Pairs, images and texts with what of them is hidden; what is derived is kept in `directory`.

  Raises:
    ConfigError: no block of patches can be hidden.
  """
  values = common.data_options(config.data, config.task)
  for name in ("augment", "normalization", "eval_crop", "mask_rate", "mask_block"):  # The view's.
    del values[name]
  return masked_pairs.load_masked_pairs(
    workdir=directory,
    view=captions.PictureView.of(**common.image_options(config)),
    masks=masked_image.masks_of_blocks(config),
    composition=dataclasses.asdict(values.pop("composition")),
    expected=expected,
    **values,
  )


# ---------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------


def facts(data: masked_pairs.MaskedPairData) -> Facts:
  """What the model must know of its data.

  vocab_size: V + 1, the tokenizer's ids and the mask's.
  token_correlation: sum_k p_k^2 of the frequencies of what is read in a row's texts, masks among
    it; without texts 1 / V, as if all were as frequent.
  """
  read_V = data.frequencies()
  return {
    "vocab_size": len(read_V),
    "token_correlation": float(np.sum(read_V**2)) or 1 / data.tokenizer.vocab_size,
  }


def build_model(config: TrainConfig, facts: Facts) -> MaskedBEiT3:
  """The config's multiway encoder with heads for patches and texts, and the tokenizer."""
  if not config.model.tied_embeddings:
    raise ConfigError(
      f"config.task={config.task!r} writes texts with the table that reads them: set"
      " model.tied_embeddings=True"
    )
  return MaskedBEiT3(
    encoder=beit3.encoder(config, facts),
    tokenizer=Frozen(image_tokenizer.TASK.build_model(*masked_image.tokenizer(config, facts))),
    image_vocab_size=config.model.image_vocab_size,
    **common.scoring(config),
  )


def _call(kind: Iterable[str], batch: Batch, *, everywhere: bool = False) -> dict[str, jax.Array]:
  """The keywords of the model's call on the parts of a kind, which scores places or everything."""
  call = {}
  for names in map(PARTS.get, kind):
    read, mask, places = (_rows(batch[name]) for name in (names.read, names.mask, names.places))
    if names.is_image:
      call |= {"images_BHWC": read, "masked_BP": mask}
    else:
      call |= {"tokens_BT": read, "mask_BT": mask}
    if not everywhere:
      call["image_places_BK" if names.is_image else "text_places_BK"] = places
  return call


def inputs(batch: Batch) -> tuple[tuple, dict[str, Any]]:
  """The arguments of `MaskedBEiT3.each`: a call for each kind of samples, and its targets."""

  def targets(kind: Iterable[str]) -> dict[str, jax.Array | bool]:
    found = {}
    for names in map(PARTS.get, kind):
      # Of patches the tokenizer's.
      own = {"targets_BP": True} if names.is_image else {"targets_BT": _rows(batch[names.targets])}
      found |= own
    return found

  kinds = _kinds(batch)
  calls = tuple(_call(kind, batch) for kind in kinds)
  return calls, {"method": "each", "targets": tuple(map(targets, kinds))}


def _by_part(batch: Batch, outputs: Iterable[Parts]) -> dict[str, jax.Array]:
  """What the model's calls on a batch gave, by part of the loss: [B, n, K, ...], n a row."""
  found = {}
  for kind, output in zip(_kinds(batch), outputs, strict=True):
    for part in kind:
      value = output.image if PARTS[part].is_image else output.text
      found[part] = value.reshape(*batch[PARTS[part].weights].shape, *value.shape[2:])
  return found


# ---------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------


def weigh(model: MaskedBEiT3, batch: Batch) -> Batch:
  """The batch with what a hidden patch or token counts: one over how many the part has of them.

  Of every part a name `<part>_share` [B] more. As a part's sum then is its mean in the batch, the
  `weights` [B] of the rows are one together.
  """
  del model
  hidden = {part: batch[PARTS[part].weights] for part in _parts(batch)}
  rows = len(next(iter(hidden.values())))
  shares = {f"{part}_share": 1 / jnp.maximum(jnp.sum(x), 1) for part, x in hidden.items()}
  spread = lambda value: jnp.full(rows, value, jnp.float32)
  return batch | {name: spread(x) for name, x in {**shares, "weights": 1 / rows}.items()}


def parts(outputs: Iterable[Parts], batch: Batch) -> dict[str, jax.Array]:
  """Each part's sum, of a batch that has been weighed."""
  return {
    part: jnp.sum(nats * batch[PARTS[part].weights] * batch[f"{part}_share"][:, None, None])
    for part, nats in _by_part(batch, outputs).items()
  }


def score(outputs: Iterable[Parts], batch: Batch) -> tuple[jax.Array, jax.Array]:
  """The sum of the parts' sums, and of the weights."""
  return sum(parts(outputs, batch).values()), jnp.sum(batch["weights"])


def observed(batch: Batch) -> Batch:
  """Samples of one kind: pairs, where there are any."""
  kind = _kinds(batch)[0]
  return {name: batch[name] for part in kind for name in filter(None, PARTS[part])}


# ---------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------


def measure(model: MaskedBEiT3, variables, batch: Batch) -> dict[str, jax.Array]:
  """Of each part sums over what is hidden, and what it was.

  Sums are `<part>_nats` and `<part>_weight`; and, of what is hidden without the ends of texts,
  `<part>_asked`, how much that is, and `<part>_correct`, how much of it the model puts first. Of
  pairs also `<part>_correct_alone`, where the model is not given the other part, and
  `<part>_correct_beside_another`, where it is given another pair's. `<part>_targets` [B, n, K] is
  what was asked for, -1 where nothing was, at `<part>_places`.
  """
  kinds, found = _kinds(batch), {}
  asked = [_call(kind, batch) for kind in kinds]
  if _PAIR in kinds:
    others = _beside_another(batch)
    asked += [*(_call((part,), batch) for part in _PAIR), _call(_PAIR, others)]
  outputs = model.apply(variables, *asked, method="each")
  for part, logits in _by_part(batch, outputs[: len(kinds)]).items():
    names = PARTS[part]
    targets, is_asked = _asked(model, variables, part, batch)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    answers = {"correct": (logits, targets, is_asked)}
    if part in _PAIR:
      of = lambda output, names=names: output.image if names.is_image else output.text
      alone, beside = outputs[len(kinds) + _PAIR.index(part)], outputs[-1]
      answers["correct_alone"] = (of(alone), targets, is_asked)
      answers["correct_beside_another"] = (of(beside), *_asked(model, variables, part, others))
    # A row that fills up the last batch has a text without tokens, which costs nothing finite.
    hidden = batch[names.weights] > 0
    found |= {
      f"{part}_nats": jnp.sum(jnp.where(hidden, nats, 0)),
      f"{part}_weight": jnp.sum(hidden),
      f"{part}_asked": jnp.sum(is_asked),
      f"{part}_targets": jnp.where(is_asked, targets, _NOTHING),
      names.places: batch[names.places],
      **{f"{part}_{name}": _count_right(*answer) for name, answer in answers.items()},
    }
  total = lambda name: sum(found[f"{part}_{name}"] for part in _parts(batch))
  return found | {"loss": total("nats"), "weight": total("weight")}


def _asked(model: MaskedBEiT3, variables, part: str, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """[B, n, K] what stood at a part's places, and which of them accuracies are of.

  Where a text ends can be seen by its padding, so that its end is no question.
  """
  names = PARTS[part]
  places, hidden = batch[names.places], batch[names.weights] > 0
  if names.is_image:
    tokens = model.apply(variables, _rows(batch[names.read]), method="tokens")
    tokens = tokens.reshape(*places.shape[:2], -1)
    return jnp.take_along_axis(tokens, places, axis=-1), hidden
  targets = jnp.take_along_axis(batch[names.targets], places, axis=-1)
  return targets, hidden & (targets != tokenizers.EOS_ID)


def _beside_another(batch: Batch) -> Batch:
  """The batch's pairs, each text with the image of another one.

  The image of the pair that lies half of the batch's pairs ahead, with what of it is hidden: what
  follows a pair often is of the same image. What fills up the last rows stays where it is.
  """
  is_pair = jnp.any(batch["pair_mask"], axis=-1).reshape(-1)
  count, places = jnp.maximum(jnp.sum(is_pair), 1), jnp.arange(is_pair.size)
  ahead = jnp.where(is_pair, (places + count // 2) % count, places)
  of_images = PARTS["pair_image"]
  moved = (of_images.read, of_images.mask, of_images.places, of_images.weights)
  turned = lambda x: jnp.take(_rows(x), ahead, axis=0).reshape(x.shape)
  return batch | {name: turned(batch[name]) for name in moved}


def _count_right(logits: jax.Array, targets: jax.Array, is_asked: jax.Array) -> jax.Array:
  """How many of the targets that are asked for come first of all tokens."""
  answers = jnp.argmax(logits, axis=-1).reshape(targets.shape)
  return jnp.sum((answers == targets) & is_asked)


# The other part of a pair.
_OTHER = {"pair_image": "text", "pair_text": "image"}


def metrics(totals: Totals, data: masked_pairs.MaskedPairData, *, whole: bool) -> dict[str, float]:
  """What the hidden patches and tokens of the validation set cost, beside what trivial answers do.

  Of each part that the batches have:

  loss_nats_of_all_parts: the sum of the parts' means.
  <part>_nats: mean -log p of its hidden patches or tokens.
  <part>_accuracy: share of them that the model puts first; of tokens without the ends of texts,
    which padding gives away, here and in all that follows.
  <part>_accuracy_without_text, .._without_image: of pairs, the same of the very same patches or
    tokens where the model is not given the other part.
  <part>_accuracy_with_another_text, .._with_another_image: likewise where it is given that of
    another pair: an input like those it was trained on, so that the difference is what text or
    image tell.
  <part>_commonest_token: share of them that are the commonest of them: what always answering that
    one scores.
  <part>_commonest_token_of_the_place: of patches, the same, of each place of the grid its own.
  codebook_perplexity: exp of the entropy of the hidden patches' tokens; see `masked_image.metrics`.

  Of both baselines the commonest is that of the very targets that are scored: more than can be
  known before.
  """
  means, found, patches = [], {}, []
  for part, names in PARTS.items():
    if not totals.get(f"{part}_weight"):
      continue
    targets = totals[f"{part}_targets"]
    means.append(float(totals[f"{part}_nats"] / totals[f"{part}_weight"]))
    found[f"{part}_nats"] = means[-1]
    asked = targets[targets != _NOTHING]
    if not asked.size:
      continue
    share = lambda name, part=part: float(totals[f"{part}_{name}"] / totals[f"{part}_asked"])
    found[f"{part}_accuracy"] = share("correct")
    if part in _PAIR:
      other = _OTHER[part]
      found[f"{part}_accuracy_without_{other}"] = share("correct_alone")
      found[f"{part}_accuracy_with_another_{other}"] = share("correct_beside_another")
    found[f"{part}_commonest_token"] = float(image_tokenizer.shares_of(asked).max())
    if names.is_image:
      patches.append(asked)
      places = totals[names.places][targets != _NOTHING]
      found[f"{part}_commonest_token_of_the_place"] = _of_the_place(asked, places)
  if patches:
    shares = image_tokenizer.shares_of(np.concatenate(patches))
    found["codebook_perplexity"] = image_tokenizer.perplexity(shares)
  return {"loss_nats_of_all_parts": sum(means), **found}


def _of_the_place(targets: np.ndarray, places: np.ndarray) -> float:
  """Share of hidden patches that are the commonest of those at their place of the grid."""
  times = np.zeros((places.max() + 1, targets.max() + 1), np.int64)
  np.add.at(times, (places, targets), 1)
  return float(times.max(axis=1).sum() / targets.size)


# ---------------------------------------------------------------------------------------------
# What a person sees
# ---------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="model")
def answered(model: MaskedBEiT3, variables, batch: Batch) -> dict[str, jax.Array]:
  """The model's answers to the first pair of each row, from both of its parts and from each alone.

  Returns:
    tokens: [B, P], the tokenizer's of the whole images.
    filled, filled_alone: [B, P], the same, where patches are hidden the model's.
    text, text_alone: [B, T], the tokens that the model puts first, at every place.
    pictures, pictures_alone, restored: [B, H, W, C], the tokenizer's of `filled`, `filled_alone`
      and `tokens`.
  """
  batch = {name: x[:, :1] for name, x in observed(batch).items()}
  calls = [_call(kind, batch, everywhere=True) for kind in (_PAIR, *((part,) for part in _PAIR))]
  both, image, text = model.apply(variables, *calls, method="each")
  pair = calls[0]
  tokens_BP = model.apply(variables, pair["images_BHWC"], method="tokens")
  first = lambda logits: jnp.argmax(logits, axis=-1)
  fill = lambda answers: jnp.where(pair["masked_BP"], first(answers.image), tokens_BP)
  found = {"tokens": tokens_BP, "filled": fill(both), "filled_alone": fill(image)}
  draw = {"pictures": "filled", "pictures_alone": "filled_alone", "restored": "tokens"}
  found |= {name: model.apply(variables, found[of], method="pixels") for name, of in draw.items()}
  return sharding.replicate({**found, "text": first(both.text), "text_alone": first(text.text)})


class _Pairs(NamedTuple):
  """The first pairs of some rows as a person is shown them; the texts are strings.

  Attributes:
    indices: of the rows in the validation set.
    images_BHWC, masked_BP: what was given.
    found: what `answered` gave.
    whole, read: the texts, and what is read of them.
    both, alone: with the model's answers in brackets, and the truth beside where they differ.
  """

  indices: np.ndarray
  images_BHWC: np.ndarray
  masked_BP: np.ndarray
  found: Mapping[str, np.ndarray]
  whole: list[str]
  read: list[str]
  both: list[str]
  alone: list[str]


def _shown(model: MaskedBEiT3, variables, data: masked_pairs.MaskedPairData) -> _Pairs | None:
  """Pairs of the validation set; None if its rows have none."""
  indices, batch = common.shown(data.validation)
  if _PAIR not in _kinds(batch):
    return None
  found = jax.tree.map(np.asarray, answered(model, variables, batch))
  names, texts = PARTS["pair_text"], {"whole": [], "read": [], "both": [], "alone": []}
  words = functools.partial(masking.words_of, data.tokenizer)
  for i in range(len(indices)):
    length = np.count_nonzero(batch[names.mask][i, 0])
    read, targets = (batch[name][i, 0, :length] for name in (names.read, names.targets))
    places = batch[names.places][i, 0][batch[names.weights][i, 0] > 0]
    whole = read.copy()
    whole[places] = targets[places]
    # Marks that everybody can see are not told.
    marks = dict.fromkeys({0, length - 1}, "")
    seen = {place: "" for place in marks if place not in places}
    texts["whole"].append(words(whole, marks))
    texts["read"].append(words(read, seen))
    for name, answers in (("both", found["text"][i]), ("alone", found["text_alone"][i])):
      brackets = masked_lm.in_brackets(words, places, answers[places], targets[places])
      texts[name].append(words(read, seen | brackets))
  return _Pairs(indices, batch["pair_image"][:, 0], batch["pair_masked"][:, 0], found, **texts)


def sample(
  config: TrainConfig,
  model: MaskedBEiT3,
  variables,
  data: masked_pairs.MaskedPairData,
  key: jax.Array,
) -> str | None:
  """The texts of the picture's pairs, as they are read and as they are answered."""
  del key
  pairs = _shown(model, variables, data)
  if pairs is None:
    return None
  lines = ["texts of validation pairs: as they are read; answered, [right] or [wrong|right]; and"]
  lines[0] += " answered without the image"
  for texts in zip(pairs.read, pairs.both, pairs.alone, strict=True):
    lines.append("  ".join(texts))
  return "\n".join(lines)


def picture(
  config: TrainConfig, model: MaskedBEiT3, variables, data: masked_pairs.MaskedPairData
) -> list[Row]:
  """Validation pairs; what is seen of them; and what is answered, from both and from each alone."""
  pairs = _shown(model, variables, data)
  if pairs is None:
    return []
  as_image = lambda pixels: augmentation.denormalize(np.asarray(pixels), config.data.normalization)
  size, grid = config.model.patch_size, common.patch_grid(config)
  hidden = pairs.masked_BP.reshape(-1, *grid, 1).repeat(size, 1).repeat(size, 2)
  whole = as_image(pairs.images_BHWC)
  answers = lambda name: np.where(hidden, as_image(pairs.found[name]), whole)
  return [
    Row("validation pairs", whole, pairs.whole),
    Row("what is seen of them", np.where(hidden, np.uint8(masked_image.GREY), whole), pairs.read),
    Row("hidden patches and tokens answered from both", answers("pictures"), pairs.both),
    Row("from the image alone, and from the text alone", answers("pictures_alone"), pairs.alone),
    Row("all patches from tokens, nothing hidden", as_image(pairs.found["restored"])),
  ]


# ---------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------


def flops(config: TrainConfig, facts: Facts) -> int:
  """FLOPs of one step, with the places that hold no target; see `theory.flops`."""
  model, rows = config.model, config.batch_size
  composition = dataclasses.asdict(config.data.composition)
  return theory_flops.masked_data_step_flops(
    **{kind: rows * count for kind, count in composition.items()},
    vocab_size=facts["vocab_size"],
    image_vocab_size=model.image_vocab_size,
    image_places=_places(config, "image"),
    text_places=_places(config, "text"),
    pair_text_places=_places(config, "pair_text"),
    patches=common.patches(config),
    patch_pixels=common.CHANNELS * model.patch_size**2,
    seq_length=config.data.seq_length,
    encoding=image_tokenizer.encoding_products(masked_image.tokenizer(config, facts)[0]),
    **common.sizes(model),
  )


def _places(config: TrainConfig, part: str) -> int:
  """How many patches, or tokens at most, are hidden of a sample's part."""
  if PARTS[part].is_image:
    return masked_image.masks(config).count
  data = config.data
  rate = data.pair_text_mask_rate if part == "pair_text" else data.text_mask_rate
  return captions.hidden_of(rate, data.seq_length)


def length(config: TrainConfig) -> int:
  """How many patches, class tokens and tokens of texts a row of a batch has."""
  composition, patches = config.data.composition, 1 + common.patches(config)
  images, texts = composition.pairs + composition.images, composition.pairs + composition.texts
  return images * patches + texts * config.data.seq_length


def samples(config: TrainConfig) -> int:
  """Pairs, images and texts of a row."""
  return sum(dataclasses.asdict(config.data.composition).values())


def batch_spec(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """Of each kind of samples n a row; see `data.masked_pairs`.

  pair_image, image: pixels [n, H, W, C]. pair_masked, image_masked: True for hidden patches [n, P].
  pair_text, text: tokens as they are read [n, T]. pair_mask, text_mask: True for what is no
  padding. pair_targets, text_targets: what stood there. <part>_places [n, K]: what is to be
  answered; <part>_weights: 1 for each, 0 for what fills them up.
  """
  pixels, tokens = common.image_spec(config).shape[1:], (config.data.seq_length,)
  kinds = {"pair": "pairs", "image": "images", "text": "texts"}
  spec = {}
  for part, names in PARTS.items():
    count = getattr(config.data.composition, kinds[part.partition("_")[0]])
    places = (_places(config, part),)
    shapes = {names.places: (places, jnp.int32), names.weights: (places, jnp.float32)}
    if names.is_image:
      shapes |= {names.read: (pixels, jnp.float32), names.mask: ((common.patches(config),), bool)}
    else:
      shapes |= {names.read: (tokens, jnp.int32), names.mask: (tokens, bool)}
      shapes |= {names.targets: (tokens, jnp.int32)}
    for name, (shape, dtype) in shapes.items() if count else ():
      spec[name] = jax.ShapeDtypeStruct((config.batch_size, count, *shape), dtype)
  return spec


def dummy_inputs(config: TrainConfig) -> tuple:
  """An image and a text that initialise the model."""
  return (*common.dummy_images(config), jnp.zeros((1, config.data.seq_length), jnp.int32))


def describe(config: TrainConfig, facts: Facts) -> list[str]:
  """The recipe, and what is hidden and answered."""
  data, drawing = config.data, masked_image.masks(config)
  counts = dataclasses.asdict(data.composition)
  kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
  return [
    *records.describe(beit3.recipe(config, facts)),
    f"a row has {kinds}; hides {drawing.count} of {drawing.grid[0]} x {drawing.grid[1]} patches,"
    f" {data.text_mask_rate:.0%} of a text's tokens and {data.pair_text_mask_rate:.0%} of a pair's",
  ]


TASK = Task(
  load_data=load_data,
  facts=facts,
  describe=describe,
  build_model=build_model,
  dummy_inputs=dummy_inputs,
  architecture=beit3.architecture,
  inputs=inputs,
  score=score,
  parts=parts,
  weigh=weigh,
  observed=observed,
  metrics=metrics,
  # Of tokens, which the model knows, and of the very targets: they are among the metrics.
  baselines=lambda data: {},
  flops=flops,
  planned_facts=beit3.planned_facts,
  batch_spec=batch_spec,
  measure=measure,
  sample=sample,
  picture=picture,
  counts=lambda data: {kind: len(part) for kind, part in data.validation.samples.parts.items()},
  loss_name="loss_nats_of_all_parts",
  best=("loss_nats_of_all_parts", False),
  unit="samples",
  size=samples,
  length=length,
  fact_kinds={"vocab_size": int, "image_tokenizer": dict},
)
