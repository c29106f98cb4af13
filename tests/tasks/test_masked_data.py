"""Masked data modelling: its four losses, its metrics, its experts, and the chain from tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import magneto_jax
from magneto_jax import diagnose, diagnostics, evaluation, program, reporting, training
from magneto_jax.config import ConfigError, from_config_dict
from magneto_jax.tasks import TASKS, masked_data, masked_image
from tests.models.common import compiled
from tests.tasks.test_masked_image import drawn

TASK = TASKS["masked_data"]
V_IMAGE, V_TEXT, SIDE, PATCH, LENGTH = 12, 40, 8, 2, 6
PATCHES = (SIDE // PATCH) ** 2
SMALL = {"layers": 2, "width": 16, "ffn_width": 24, "heads": 2, "positions": "learned"}
SMALL |= {"image_size": SIDE, "patch_size": PATCH, "image_vocab_size": V_IMAGE}
PAPER = {"shared_attention": True, "fusion_layers": 1}
DATA = {"name": "embedded/emoji/en", "seq_length": LENGTH, "vocab_size": V_TEXT - 1}
DATA |= {"mask_rate": 0.4, "mask_block": 2}
PARTS = ("pair_image", "pair_text", "image", "text")
ROWS = 4


def config_of(*, model=None, data=None, **fields):
  given = {"task": "masked_data", "batch_size": ROWS, "data": DATA | (data or {})}
  return from_config_dict({**given, "model": SMALL | (model or {}), **fields})


def batch_of(config, seed=0):
  """Random pixels and tokens; texts of several lengths, some of their tokens hidden."""
  rng, batch = np.random.default_rng(seed), {}
  for name, spec in TASK.batch_spec(config).items():
    if name.endswith("mask"):
      lengths = rng.integers(3, LENGTH + 1, spec.shape[:-1])
      batch[name] = np.arange(LENGTH) < lengths[..., None]
    elif name.endswith("places"):
      size = PATCHES if "image" in name else LENGTH
      keys = rng.random((*spec.shape[:-1], size))
      batch[name] = np.sort(keys.argsort(-1)[..., : spec.shape[-1]]).astype(np.int32)
    elif name.endswith(("masked", "weights")):
      batch[name] = (rng.random(spec.shape) < 0.6).astype(spec.dtype)
    elif spec.dtype == jnp.float32:
      batch[name] = rng.normal(size=spec.shape).astype(np.float32)
    else:
      batch[name] = rng.integers(4, V_TEXT, spec.shape).astype(np.int32)
  for part, mask in (("pair_text", "pair_mask"), ("text", "text_mask")):
    if f"{part}_weights" in batch:
      batch[f"{part}_weights"] *= at(batch[mask], batch[f"{part}_places"])
  return batch


def at(values, places):
  """What stands at places of the last axis."""
  return np.take_along_axis(np.asarray(values), places, axis=-1)


@functools.cache
def built(**model):
  config = config_of(model=model, data={"composition": {"pairs": 2}})
  model = TASK.build_model(config, TASK.planned_facts(config))
  return config, model, drawn(TASK, config, model)


@functools.cache
def scored(**model):
  """`(variables, batch) -> (loss, weight), state, parts` of a batch as a training step has it."""
  _, module, _ = built(**model)
  return compiled(
    lambda variables, batch: TASK.loss_and_state(
      module, variables, TASK.weigh(module, batch), jax.random.key(0)
    )
  )


@functools.cache
def measured():
  _, module, _ = built()
  return compiled(lambda variables, batch: TASK.measured(module, variables, batch))


def floats(tree):
  return jax.tree.map(float, tree)


def nats_by_hand(model, variables, batch):
  """{part: [B, n, K]} by one plain call of the model for each kind, in float64."""
  flat = lambda name: batch[name].reshape(-1, *batch[name].shape[2:])
  call = jax.jit(lambda v, *args, **kwargs: model.apply(v, *args, **kwargs))
  pair = call(
    variables,
    flat("pair_image"),
    flat("pair_text"),
    masked_BP=flat("pair_masked"),
    mask_BT=flat("pair_mask"),
  )
  image = call(variables, flat("image"), masked_BP=flat("image_masked"))
  text = call(variables, None, flat("text"), mask_BT=flat("text_mask"))
  tokens = jax.jit(lambda v, x: model.apply(v, x, method="tokens"))
  found = {
    "pair_image": (pair.image, tokens(variables, flat("pair_image"))),
    "pair_text": (pair.text, flat("pair_targets")),
    "image": (image.image, tokens(variables, flat("image"))),
    "text": (text.text, flat("text_targets")),
  }
  nats, answers, targets = {}, {}, {}
  for part, (logits, of_part) in found.items():
    z, places = np.asarray(logits, np.float64), batch[f"{part}_places"]
    of_part = np.asarray(of_part)
    costs = np.log(np.exp(z).sum(-1)) - at(z, of_part[..., None])[..., 0]
    wanted = lambda values, places=places: at(values.reshape(*places.shape[:2], -1), places)
    nats[part], answers[part], targets[part] = map(wanted, (costs, z.argmax(-1), of_part))
  return nats, answers, targets


def hidden_of(batch, part):
  return batch[masked_data.PARTS[part].weights] > 0


# ---------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [{}, PAPER])
def test_the_loss_is_the_sum_of_the_means_of_four_parts(model):
  """Each over what is hidden of it in the whole batch, by a plain call for each kind of samples."""
  config, module, variables = built(**model)
  batch = batch_of(config)
  nats, _, _ = nats_by_hand(module, variables, batch)
  means = {part: nats[part][hidden_of(batch, part)].mean() for part in PARTS}
  (loss, weight), state, parts = scored(**model)(variables, batch)
  assert floats(parts) == pytest.approx(means, rel=1e-5) and float(weight) == pytest.approx(1)
  assert float(loss) == pytest.approx(sum(means.values()), rel=1e-5)
  # The tokenizer rests.
  jax.tree.map(np.testing.assert_array_equal, state, variables["state"])


@pytest.mark.parametrize("left_out", ["pairs", "images", "texts", ("pairs", "images")])
def test_a_kind_that_is_left_out_is_in_no_batch_and_no_loss(left_out):
  _, _, variables = built()
  gone = (left_out,) if isinstance(left_out, str) else left_out
  config = config_of(data={"composition": dict.fromkeys(gone, 0)})
  kept = [part for part in PARTS if part.partition("_")[0] + "s" not in gone]
  whole = batch_of(config_of())
  batch = {name: whole[name] for name in TASK.batch_spec(config)}
  assert {part for part in PARTS if masked_data.PARTS[part].read in batch} == set(kept)
  (loss, _), _, parts = scored()(variables, batch)
  _, _, all_parts = scored()(variables, whole)
  assert floats(parts) == pytest.approx({part: float(all_parts[part]) for part in kept}, rel=1e-5)
  assert float(loss) == pytest.approx(sum(floats(parts).values()), rel=1e-6)
  totals = measured()(variables, batch)
  found = TASK.metrics(jax.tree.map(np.asarray, totals), None, whole=True)
  assert {name for name in found if name.endswith("_nats")} == {f"{part}_nats" for part in kept}
  assert ("codebook_perplexity" in found) == any("image" in part for part in kept)


def test_nothing_changes_where_a_batch_is_split():
  """Losses, each part's, and the gradient: however the hidden tokens fall on the parts."""
  config, model, variables = built()
  batch = batch_of(config)
  batch["text_weights"][::2] = 0  # All that is hidden of texts alone is in one of two parts.
  optimizer = optax.sgd(1.0)
  zero = jnp.int32(0)
  state = program.TrainState(
    zero, variables["params"], optimizer.init(variables["params"]), None, zero, zero
  ).replace(variables=variables["state"])
  found = []
  for accumulation in (1, 2):
    step = functools.partial(
      program.train_step, model=model, task=TASK, optimizer=optimizer, accumulation=accumulation
    )
    found.append(jax.jit(step)(state, batch, jax.random.key(0)))
  names = {"loss", "gradient_norm", *(f"loss_{part}" for part in PARTS)}
  (one, whole), (other, split) = found
  assert names <= split.keys()
  for name in names:
    assert float(split[name]) == pytest.approx(float(whole[name]), rel=1e-5), name
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), one.params, other.params
  )


@pytest.mark.parametrize("model", [{}, PAPER])
def test_one_kind_alone_moves_no_expert_of_another(model):
  """Gradients of the other modality's experts, and of the pairs', are zero to the last bit."""
  config, module, variables = built(**model)
  batch = batch_of(config)
  given = lambda params: {**variables, "params": params}
  loss = lambda params, batch: TASK.loss(module, given(params), TASK.weigh(module, batch))[0]
  gradient = compiled(jax.grad(loss))
  for kind, own, other in (("text", "text", "vision"), ("image", "vision", "text")):
    alone = {name: x for name, x in batch.items() if name.partition("_")[0] == kind}
    moved, rested = set(), set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(variables["params"], alone)):
      names = {key.key for key in path}
      if names & {other, "fusion"}:
        assert not np.any(leaf), path
        rested |= names & {other, "fusion"}
      elif own in names and np.any(leaf):
        moved |= names & {own, "ffn", "self_attention"}
    assert rested == ({other, "fusion"} if model else {other})
    assert moved == ({own, "ffn"} if model else {own, "ffn", "self_attention"})


# ---------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------


def test_what_is_measured_is_what_is_hidden():
  """From the logits of plain calls, by hand; of pairs also with each part alone, and with another.

  The end of a text costs nats, and is no question.
  """
  config, model, variables = built()
  batch = batch_of(config)
  flat = lambda name: batch[name].reshape(-1, *batch[name].shape[2:])
  count = len(flat("pair_text"))
  ahead = (np.arange(count) + count // 2) % count
  given = {"pair_image": flat("pair_image"), "pair_masked": flat("pair_masked")}
  image, text, beside = jax.jit(
    lambda v: (
      model.apply(v, given["pair_image"], masked_BP=given["pair_masked"]).image,
      model.apply(v, None, flat("pair_text"), mask_BT=flat("pair_mask")).text,
      model.apply(
        v,
        given["pair_image"][ahead],
        flat("pair_text"),
        masked_BP=given["pair_masked"][ahead],
        mask_BT=flat("pair_mask"),
      ),
    )
  )(variables)
  shaped = lambda part, x: np.asarray(x).argmax(-1).reshape(ROWS, -1, x.shape[1])
  pick = lambda part, x: at(shaped(part, x), batch[f"{part}_places"])
  back = np.argsort(ahead)
  without = {"pair_image": pick("pair_image", image), "pair_text": pick("pair_text", text)}
  another = {
    "pair_image": pick("pair_image", np.asarray(beside.image)[back]),
    "pair_text": pick("pair_text", beside.text),
  }
  # What the text alone is answered by is right: fewer answers are where the image is given.
  batch["pair_targets"] = shaped("pair_text", text).astype(np.int32)
  batch["text_weights"][:] = 1
  batch["pair_targets"][0], batch["text_targets"][0] = 2, 2  # The end's.
  nats, answers, targets = nats_by_hand(model, variables, batch)
  found = jax.tree.map(np.asarray, measured()(variables, batch))
  for part in PARTS:
    hidden = hidden_of(batch, part)
    asked = hidden & ("image" in part or targets[part] != 2)
    assert found[f"{part}_weight"] == hidden.sum() >= found[f"{part}_asked"] == asked.sum() > 0
    assert found[f"{part}_nats"] == pytest.approx(nats[part][hidden].sum(), rel=1e-5)
    right = lambda of, asked=asked, part=part: ((of == targets[part]) & asked).sum()
    assert found[f"{part}_correct"] == right(answers[part])
    np.testing.assert_array_equal(found[f"{part}_targets"], np.where(asked, targets[part], -1))
    np.testing.assert_array_equal(found[f"{part}_places"], batch[f"{part}_places"])
    if part in without:
      assert found[f"{part}_correct_alone"] == right(without[part])
      assert found[f"{part}_correct_beside_another"] == right(another[part])
  assert found["pair_text_weight"] > found["pair_text_asked"]
  assert found["pair_text_asked"] == found["pair_text_correct_alone"] > found["pair_text_correct"]
  assert found["loss"] == pytest.approx(sum(found[f"{part}_nats"] for part in PARTS), rel=1e-6)


def test_rows_that_fill_up_the_last_batch_count_nothing():
  config, _, variables = built()
  batch = batch_of(config)
  blank = {name: np.concatenate([x, np.zeros_like(x)]) for name, x in batch.items()}
  one, other = (jax.tree.map(np.asarray, measured()(variables, x)) for x in (batch, blank))
  for name, value in one.items():
    np.testing.assert_allclose(other[name][: len(value)] if value.ndim else other[name], value)


def test_metrics_are_what_their_names_say():
  """Patches: of place 3 token 5 three times, of place 1 token 2 twice. Tokens: 7, 7, 9."""
  patches, places = np.array([[[5, -1]], [[5, 2]], [[5, 2]]]), np.array([[[3, 0]]] + [[[3, 1]]] * 2)
  tokens = np.array([[[7, -1]], [[-1, 7]], [[9, -1]]])
  right = {"correct": 3.0, "correct_alone": 1.0, "correct_beside_another": 2.0}
  sums = {"nats": 6.0, "weight": 5.0, "asked": 5.0, **right}
  totals = {f"pair_image_{name}": value for name, value in sums.items()}
  # Of six hidden tokens three are the end of a text.
  sums = {"nats": 12.0, "weight": 6.0, "asked": 3.0, **right, "correct": 2.0}
  totals |= {f"pair_text_{name}": value for name, value in sums.items()}
  totals |= {"pair_image_targets": patches, "pair_text_targets": tokens}
  totals |= {"pair_image_places": places, "pair_text_places": np.zeros_like(tokens)}
  assert TASK.metrics(totals, None, whole=True) == pytest.approx(
    {
      "loss_nats_of_all_parts": 3.2,
      "pair_image_nats": 1.2,
      "pair_image_accuracy": 0.6,
      "pair_image_accuracy_without_text": 0.2,
      "pair_image_accuracy_with_another_text": 0.4,
      "pair_image_commonest_token": 0.6,
      "pair_image_commonest_token_of_the_place": 1.0,
      "pair_text_nats": 2.0,
      "pair_text_accuracy": 2 / 3,
      "pair_text_accuracy_without_image": 1 / 3,
      "pair_text_accuracy_with_another_image": 2 / 3,
      "pair_text_commonest_token": 2 / 3,
      "codebook_perplexity": 0.6**-0.6 * 0.4**-0.4,
    }
  )


def test_each_part_of_a_pair_is_seen_by_the_other_and_what_is_hidden_by_nothing():
  config, _, variables = built()
  batch = batch_of(config)
  batch["pair_masked"][:] = np.arange(PATCHES) % 2 == 0
  pixels = lambda change: {"pair_image": batch["pair_image"] + change}
  of_patch = lambda k: np.kron((np.arange(PATCHES) == k).reshape(4, 4), np.ones((PATCH, PATCH)))[
    ..., None
  ].astype(np.float32)
  run = lambda variables, batch: scored()(variables, batch)[2]
  before = run(variables, batch)["pair_text"]
  assert run(variables, batch | pixels(5 * of_patch(4)))["pair_text"] == before
  assert abs(run(variables, batch | pixels(5 * of_patch(5)))["pair_text"] - before) > 1e-4
  others = batch["pair_text"].copy()
  others[..., 0] += 1
  images = [run(variables, batch | x)["pair_image"] for x in ({}, {"pair_text": others})]
  assert abs(images[0] - images[1]) > 1e-4


def test_pairs_are_what_is_diagnosed():
  """And, without any, one of the other kinds; the stack is found, its output are logits."""
  config, model, variables = built()
  parts = diagnostics.parts_of(model)
  assert tuple(parts) == ("encoder",) and parts["encoder"].path == ("encoder", "encoder")
  batch = batch_of(config)
  assert TASK.observed(batch).keys() == {name for name in batch if name.startswith("pair_")}
  alone = {name: x for name, x in batch.items() if not name.startswith("pair_")}
  assert TASK.observed(alone).keys() == {name for name in batch if name.startswith("image")}
  call = diagnostics.calls_of(TASK, model)(batch, jax.random.key(0))
  (output,) = jax.eval_shape(lambda: call.without_targets().apply(model, variables))
  assert output.image.shape == (2 * ROWS, batch["image_places"].shape[-1], V_IMAGE)
  loss = jax.jit(lambda: call.loss(call.apply(model, variables)))()
  found = measured()(variables, batch)
  means = [found[f"{part}_nats"] / found[f"{part}_weight"] for part in PARTS[:2]]
  assert float(loss) == pytest.approx(float(sum(means)), rel=1e-5)


# ---------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"model": {"window": 3}}, "model.window=3 is of earlier tokens"),
    ({"model": {"positions": "rotary"}}, "set model.positions='learned', not 'rotary'"),
    ({"model": {"tied_embeddings": False}}, "set model.tied_embeddings=True"),
    ({"model": {"fusion_layers": 3}}, "fusion_layers=3 are the top ones of model.layers=2: set it"),
    ({"mesh": {"sequence": 2}}, "mesh.sequence=2 cannot cut an image's patches, its class token"),
  ],
)
def test_what_a_model_cannot_have_is_refused(fields, message):
  config = config_of(**fields)
  with pytest.raises(ConfigError, match=message) as error:
    TASK.build_model(config, TASK.planned_facts(config))
  assert "\n" not in str(error.value)


def test_the_model_is_of_the_configs_sizes():
  config = config_of(model=PAPER, vocab_chunk=9, label_smoothing=0.1)
  model = TASK.build_model(config, TASK.planned_facts(config))
  assert (model.image_vocab_size, model.vocab_chunk, model.label_smoothing) == (V_IMAGE, 9, 0.1)
  inner = model.encoder
  assert (inner.num_patches, inner.patch_size, inner.max_text_length) == (PATCHES, PATCH, LENGTH)
  assert inner.vocab_size == V_TEXT  # The mask's token is one of them.
  assert (inner.encoder.shared_attention, inner.encoder.fusion_layers) == (True, 1)
  assert [segment.repeats for segment in inner.encoder.recipe.segments] == [1, 1]


def test_a_planned_tokenizer_is_at_most_a_vit_base():
  """As BEiT v2's is, also where the model is larger."""
  sizes = lambda **model: dataclasses.asdict(
    masked_image.tokenizer(config_of(model=model), {})[0].model
  )
  wide = sizes(layers=40, width=1408, heads=16, ffn_width=6144)
  assert [wide[name] for name in ("layers", "width", "heads", "ffn_width")] == [12, 768, 12, 3072]
  small = sizes()
  assert [small[name] for name in ("layers", "width", "heads", "ffn_width")] == [2, 16, 2, 24]


# ---------------------------------------------------------------------------------------------
# Data, and what a person sees
# ---------------------------------------------------------------------------------------------

BYTES = {"tokenizer": "byte", "seq_length": 12, "too_long": "truncate", "vocab_size": 1024}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  config = config_of(data=BYTES)
  return config, TASK.load_data(config, tmp_path_factory.mktemp("data"))


def test_samples_are_those_of_the_spec(loaded):
  """In training and in validation; and the facts are those that were planned."""
  config, data = loaded
  for sample in (data.augment(data.train[0], np.random.default_rng(0)), data.validation[0]):
    assert TASK.batch_spec(config) == {
      name: jax.ShapeDtypeStruct((ROWS, *np.shape(x)), np.asarray(x).dtype)
      for name, x in sample.items()
    }
    assert sample["pair_masked"].sum() == sample["image_masked"].sum() == 6
  facts, planned = TASK.facts(data), TASK.planned_facts(config)
  assert facts["vocab_size"] == planned["vocab_size"] == data.tokenizer.vocab_size + 1
  assert planned["token_correlation"] < facts["token_correlation"] < 1
  # The mask is the commonest of what is read.
  assert facts["token_correlation"] == pytest.approx(np.sum(data.frequencies() ** 2))
  assert data.frequencies().argmax() == data.tokenizer.vocab_size
  words = TASK.describe(config, facts)[-1]
  assert words.startswith("a row has 1 pairs, 1 images, 1 texts; hides 6 of 4 x 4 patches, 15% of")


def test_a_block_that_cannot_be_hidden_is_refused(tmp_path):
  with pytest.raises(ConfigError, match="mask_block=9 is more than the 6 patches that a block"):
    TASK.load_data(config_of(data=BYTES | {"mask_block": 9}), tmp_path)


def test_pairs_are_shown_as_they_are_read_and_as_they_are_answered(loaded):
  """With a head whose bias answers one patch token whatever is seen."""
  config, data = loaded
  model = TASK.build_model(config, TASK.facts(data))
  variables = drawn(TASK, config, model)
  variables["params"]["head_bias"] = jnp.where(jnp.arange(V_IMAGE) == 3, 1e4, 0.0)
  rows = TASK.picture(config, model, variables, data)
  whole, seen, both, alone, restored = rows
  assert {(x.dtype.name, x.shape) for x in (row.images for row in rows)} == {
    ("uint8", (8, SIDE, SIDE, 3))
  }
  samples = [data.validation[i] for i in np.linspace(0, len(data.validation) - 1, 8).astype(int)]
  hidden = np.stack([x["pair_masked"][0] for x in samples])
  pixels = hidden.reshape(8, 4, 4).repeat(PATCH, 1).repeat(PATCH, 2)
  assert (seen.images[pixels] == masked_image.GREY).all()
  for row in (seen, both, alone):
    np.testing.assert_array_equal(row.images[~pixels], whole.images[~pixels])
  # Both answers are the same token everywhere.
  np.testing.assert_array_equal(both.images, alone.images)
  assert (restored.images != whole.images).any()
  for i, sample in enumerate(samples):
    hidden = int(sample["pair_text_weights"].sum())
    for row in (both, alone):
      assert row.captions[i].replace("[eos]", "").count("[") == hidden
    masks = np.count_nonzero(sample["pair_text"][0] == data.tokenizer.vocab_size)
    assert seen.captions[i].count("[mask]") == masks <= hidden
    assert "[" not in whole.captions[i]
  assert list(both.captions) != list(alone.captions)
  lines = TASK.sample(config, model, variables, data, None).splitlines()
  assert len(lines) == 9 and all(seen.captions[i] in lines[i + 1] for i in range(8))


def test_without_pairs_nothing_is_drawn(loaded):
  config, data = loaded
  rows = [{n: x for n, x in data.validation[i].items() if "pair" not in n} for i in range(2)]
  without = dataclasses.replace(data, validation=rows)
  assert TASK.picture(config, None, None, without) == []
  assert TASK.sample(config, None, None, without, None) is None


# ---------------------------------------------------------------------------------------------
# The chain
# ---------------------------------------------------------------------------------------------


@pytest.mark.ci
def test_the_chain_from_tokens_to_masked_data(tmp_path, monkeypatch):
  """Image tokenizer, then pre-training; a run that is resumed ends as one that was not, also where
  the tokenizer's folder is gone. Each part of the loss is in the metrics, and they add up."""
  monkeypatch.chdir(tmp_path)
  often = {"eval_every": 2, "checkpoint_every": 2, "log_every": 1, "eval_batches": 2}
  sizes = {name: SMALL[name] for name in ("image_size", "patch_size", "image_vocab_size")}
  tokens = {"task": "image_tokenizer", "data": {"name": "embedded/emoji"}, "steps": 2, **often}
  training.train(
    from_config_dict({**tokens, "batch_size": 8, "model": {"layers": 1, "width": 8, **sizes}}),
    "tokens",
  )
  config = lambda steps: config_of(
    steps=steps,
    image_tokenizer="tokens",
    accumulation=2,
    model=PAPER | {"dropout": 0.1},
    data=BYTES | {"name": "embedded/emoji/en+de", "composition": {"texts": 2}},
    optimizer={"learning_rate": 1e-2, "schedule": "constant"},
    **often,
  )
  whole = training.train(config(4), "whole")
  training.train(config(2), "parts")
  held = magneto_jax.load("tokens").variables
  (tmp_path / "tokens").rename("moved")
  parts = training.train(config(4), "parts")
  assert parts["resumed_at_step"] == 2
  assert {k: v for k, v in parts.items() if k.startswith("validation")} == {
    k: v for k, v in whole.items() if k.startswith("validation")
  }
  one, other = (magneto_jax.load(name).variables for name in ("whole", "parts"))
  jax.tree.map(np.testing.assert_array_equal, one, other)
  jax.tree.map(np.testing.assert_array_equal, one["state"]["image_tokenizer"], dict(held))
  rows = [row for row in reporting.read_metrics("whole") if "train/loss" in row]
  assert len(rows) == 4
  for row in rows:
    found = [row[f"train/loss_{part}"] for part in PARTS]
    assert min(found) > 0 and row["train/loss"] == pytest.approx(sum(found), rel=1e-5)
  with pytest.raises(ConfigError, match="image_tokenizer='tokens' holds no run with a checkpoint"):
    training.train(config(4), "late")
  evaluated = evaluation.evaluate(evaluation.open_run("whole"), "test")
  assert {f"{part}_accuracy" for part in PARTS} <= evaluated["metrics"].keys()
  assert evaluated["counts"] == {"pairs": 2 * 157, "images": 157, "texts": 2 * 157}
  found = diagnose.diagnose(config(4), recipes=("magneto", "pre_ln"))
  assert len(found.diagnoses) == 2
