"""The tasks that BEiT-3 is for: batches, losses, metrics, baselines, and what is made of images."""

import collections
import functools
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import magneto_jax
from magneto_jax import convert, diagnostics, evaluation, optimizers, pretrained, runs, training
from magneto_jax.config import ConfigError, from_config_dict
from magneto_jax.convert import beit3, saved
from magneto_jax.data import image_files, scores, tokenizers
from magneto_jax.models import BEiT3, CaptioningBEiT3, Encoder
from magneto_jax.tasks import TASKS, image_captioning, image_text_retrieval, vision_language
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import Architecture
from tests import pieces, reference
from tests.models.common import compiled
from tests.tasks.test_masked_image import drawn

RETRIEVAL, CAPTIONING, QUESTIONS, REASONING = NAMES = (
  "image_text_retrieval",
  "image_captioning",
  "visual_question_answering",
  "visual_reasoning",
)
# Judged on all of a validation set.
WHOLE = (RETRIEVAL, QUESTIONS, REASONING)
ROWS, LENGTH = 5, 24
SMALL = {"layers": 1, "width": 16, "ffn_width": 16, "heads": 2, "positions": "learned"}
SMALL |= {"image_size": 16, "patch_size": 8}
DATA = {"name": "embedded/emoji/en", "tokenizer": "byte", "seq_length": LENGTH}
DATA |= {"too_long": "truncate"}


def config_of(name, *, model=None, data=None, **fields):
  own = {"mask_rate": 0.5} if name == CAPTIONING else {}
  given = {"task": name, "batch_size": ROWS, "data": DATA | own | (data or {})}
  return from_config_dict({**given, "model": SMALL | (model or {}), **fields})


@functools.cache
def loaded(name, tmp="/nowhere"):
  """The data: bytes need no tokenizer in a folder."""
  return TASKS[name].load_data(config_of(name), tmp)


@functools.cache
def built(name):
  """A task's model with random weights, and what it measures and costs, compiled."""
  config, task = config_of(name), TASKS[name]
  model = task.build_model(config, task.facts(loaded(name)))
  variables = drawn(task, config, model)
  both = lambda v, batch: (task.measured(model, v, batch), task.loss(model, v, batch))
  return config, model, variables, compiled(both)


def batch_of(name, indices=range(0, 5 * ROWS, 5), blank=0):
  """Validation samples, then rows that fill up."""
  samples = [loaded(name).validation[i] for i in indices]
  samples[len(samples) - blank :] = [jax.tree.map(np.zeros_like, samples[0])] * blank
  return {name: np.stack([x[name] for x in samples]) for name in samples[0]}


def plain(name, batch):
  """The model's scores of a batch, in float64."""
  _, model, variables, _ = built(name)
  args, kwargs = TASKS[name].inputs(batch)
  kwargs = {key: x for key, x in kwargs.items() if not key.startswith("targets")}
  call = jax.jit(lambda v: model.apply(v, *args, **kwargs))
  return jax.tree.map(lambda x: np.asarray(x, np.float64), call(variables))


def log_softmax(z):
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


# ---------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_those_of_the_spec(name):
  """In training and in validation; and the data have what a run tells and keeps of them."""
  config, task, data = config_of(name), TASKS[name], loaded(name)
  for sample in (data.augment(data.train[3], np.random.default_rng(0)), data.validation[3]):
    assert task.spec(config, task.facts(data)) == {
      key: jax.ShapeDtypeStruct((ROWS, *np.shape(x)), np.asarray(x).dtype)
      for key, x in sample.items()
    }
  assert json.dumps(data.identity) and "emoji" in json.dumps(data.identity)
  assert data.describe() and data.show(data.validation[0])


@pytest.mark.parametrize("name", NAMES)
def test_planned_facts_are_those_of_the_data(name):
  config, task = config_of(name), TASKS[name]
  facts, planned = task.facts(loaded(name)), task.planned_facts(config)
  assert facts.keys() == planned.keys()
  assert {n: facts[n] for n in task.fact_kinds} == {n: planned[n] for n in task.fact_kinds}
  assert facts["vocab_size"] == 261 and facts["token_correlation"] > 1 / 261


def test_the_correlation_of_captions_is_that_of_what_is_read_of_them():
  """Masks among it, and the marks: of drawn samples, counted; longer texts have fewer marks."""
  data, rng = loaded(CAPTIONING), np.random.default_rng(0)
  rows = (data.augment.masks(data.train[i], rng) for i in range(len(data.train)))
  read = np.concatenate([row["inputs"][row["mask"]] for row in rows])
  found = np.sum((np.bincount(read) / len(read)) ** 2)
  stated = TASKS[CAPTIONING].facts(data)["token_correlation"]
  assert stated == pytest.approx(found, rel=0.1)
  assert stated > 1.5 * TASKS[RETRIEVAL].facts(loaded(RETRIEVAL))["token_correlation"]


def test_questions_of_ones_own_are_planned_with_the_answers_of_vqa():
  config = config_of(QUESTIONS, data={"name": "pairs_jsonl", "train_files": "x.jsonl"})
  facts = TASKS[QUESTIONS].planned_facts(config)
  assert facts["answers"] == 3129
  assert TASKS[QUESTIONS].spec(config, facts)["targets"].shape == (ROWS, 3129)


# ---------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------


def test_the_contrastive_loss_is_of_all_pairs_but_those_that_fill_up():
  """Of three pairs in a batch of five, by hand; what is measured is of the same features."""
  _, _, variables, run = built(RETRIEVAL)
  batch = batch_of(RETRIEVAL, blank=2)
  found = plain(RETRIEVAL, batch)
  z = found.scale * found.images_BE[:3] @ found.texts_BE[:3].T
  expected = -(np.trace(log_softmax(z)) + np.trace(log_softmax(z.T))) / 2
  measured, loss = run(variables, batch)
  np.testing.assert_allclose(loss, (expected, 3), rtol=1e-4)
  np.testing.assert_allclose((measured["loss"], measured["weight"]), loss, rtol=1e-6)
  np.testing.assert_array_equal(measured["image_id"][:3], batch["image_id"][:3])
  assert 0 < expected / 3 < 20 and np.isfinite(measured["images"]).all()


def test_a_caption_costs_what_is_hidden_of_it():
  _, _, variables, run = built(CAPTIONING)
  batch = batch_of(CAPTIONING, blank=1)
  log_p = log_softmax(plain(CAPTIONING, batch))
  own = np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
  hidden = batch["weights"] > 0
  measured, loss = run(variables, batch)
  assert 8 < hidden.sum() == loss[1] and not hidden[:, 0].any()
  np.testing.assert_allclose(loss[0], -own[hidden].sum(), rtol=1e-5)
  np.testing.assert_allclose(measured["loss"], loss[0], rtol=1e-5)
  assert measured["correct"] == (log_p.argmax(-1) == batch["targets"])[hidden].sum()


def test_answers_cost_each_by_itself_and_the_first_is_judged():
  _, _, variables, run = built(QUESTIONS)
  batch = batch_of(QUESTIONS, blank=1)
  y, t = plain(QUESTIONS, batch), batch["targets"].astype(np.float64)
  nats = np.log1p(np.exp(y)) - t * y
  measured, loss = run(variables, batch)
  np.testing.assert_allclose(loss, (nats[:4].sum(), 4), rtol=1e-5)
  np.testing.assert_allclose(measured["loss"], loss[0], rtol=1e-5)
  first = t[np.arange(ROWS), y.argmax(-1)]
  np.testing.assert_array_equal(measured["right"], first.astype(np.float32))


def test_a_statement_is_judged_true_or_false():
  _, _, variables, run = built(REASONING)
  batch = batch_of(REASONING, blank=1)
  log_p = log_softmax(plain(REASONING, batch))
  own = np.take_along_axis(log_p, batch["label"][:, None], -1)[:4]
  measured, loss = run(variables, batch)
  np.testing.assert_allclose(loss, (-own.sum(), 4), rtol=1e-5)
  np.testing.assert_allclose(measured["loss"], loss[0], rtol=1e-5)
  np.testing.assert_array_equal(measured["answers"], log_p.argmax(-1))


# ---------------------------------------------------------------------------------------------
# Metrics and baselines
# ---------------------------------------------------------------------------------------------


def test_recalls_have_one_feature_an_image_and_all_texts():
  """Of 30 images with up to three texts, read in any order, by sorting each query's items."""
  rng = np.random.default_rng(0)
  features = rng.normal(size=(30, 4)).astype(np.float32)
  owners = np.concatenate([np.arange(30), rng.integers(0, 30, 25)])
  rng.shuffle(owners)
  texts = features[owners] + rng.normal(size=(55, 4), scale=2).astype(np.float32)
  totals = {"loss": 11.0, "weight": 55.0, "images": features[owners], "texts": texts}
  found = TASKS[RETRIEVAL].metrics(totals | {"image_id": 7 * owners}, None, whole=True)
  similarities = features @ texts.T
  expected = {"loss_nats_per_pair": 0.2}
  for k in (1, 5, 10):
    nearest_texts = np.argsort(-similarities, axis=1)[:, :k]
    nearest_images = np.argsort(-similarities, axis=0)[:k]
    expected[f"text_recall_at_{k}"] = 100 * np.mean(
      [any(owners[m] == n for m in nearest_texts[n]) for n in range(30)]
    )
    expected[f"image_recall_at_{k}"] = 100 * np.mean(
      [owners[m] in nearest_images[:, m] for m in range(55)]
    )
  expected["mean_recall"] = np.mean([x for name, x in expected.items() if "recall" in name])
  assert found == pytest.approx(expected)
  assert 10 < found["mean_recall"] < 90
  # Which way is which stands in the run's table.
  ways = TASKS[RETRIEVAL].signatures(None)
  assert ways["image_recall_at_k"].startswith("text to image: ")
  assert ways["text_recall_at_k"].startswith("image to text: ")


def test_chance_is_what_random_orders_recall():
  """Of images with one, two and three texts; the expectation of the metric itself."""
  owners = np.array([0, 1, 1, 2, 2, 2, 3, 3])
  images = np.arange(4)
  data = collections.namedtuple("Data", "rows")(collections.namedtuple("R", "image_of")(owners))
  found = TASKS[RETRIEVAL].baselines(data)
  rng = np.random.default_rng(0)
  drawn = [
    scores.retrieval_recalls(rng.random((4, 8)), owners, image_text_retrieval.TOP)
    for _ in range(4000)
  ]
  for name in drawn[0]:
    mean = np.mean([recalls[name] for recalls in drawn])
    assert found[name]["chance"] == pytest.approx(mean, abs=1.5), name
  assert found["image_recall_at_1"] == {"chance": 25.0} and len(images) == 4
  assert found["text_recall_at_10"] == {"chance": 100.0}
  means = [x["chance"] for name, x in found.items() if name != "mean_recall"]
  assert found["mean_recall"]["chance"] == pytest.approx(np.mean(means))


def test_questions_are_judged_by_type_beside_the_majority_of_the_type():
  data, task = loaded(QUESTIONS), TASKS[QUESTIONS]
  right = np.random.default_rng(0).random(len(data.validation)).astype(np.float32)
  found = task.metrics({"loss": 6.0, "weight": 3.0, "right": right}, data, whole=True)
  kinds = np.array(data.kinds[1])
  assert {"group en", "which en", "keyword en"} == {*kinds}
  assert found["accuracy_which_en"] == pytest.approx(right[kinds == "which en"].mean())
  assert found["accuracy"] == pytest.approx(right.mean())
  assert found["loss_nats_per_question"] == 2.0
  baselines = task.baselines(data)
  assert baselines.keys() == found.keys() - {"loss_nats_per_question"}
  names = ("majority_of_the_type", "subgroup_of_the_image")
  assert all(tuple(found) == names for found in baselines.values())
  assert baselines["accuracy_group_en"]["majority_of_the_type"] == 0.5
  assert baselines["accuracy_which_en"]["majority_of_the_type"] == 1 / 8
  assert baselines["accuracy_which_en"]["subgroup_of_the_image"] > 0.9
  assert baselines["accuracy_keyword_en"]["subgroup_of_the_image"] == pytest.approx(0.5, abs=0.02)
  # Of a part of the set the types that were read.
  part = task.metrics({"loss": 1.0, "weight": 1.0, "right": right[:5]}, data, whole=False)
  assert part.keys() == {"loss_nats_per_question", "accuracy", "accuracy_group_en"}


def test_statements_are_judged_by_kind_beside_either_answer():
  data, task = loaded(REASONING), TASKS[REASONING]
  kinds = np.array(data.kinds[1])
  labels, answers = np.random.default_rng(0).integers(0, 2, (2, len(kinds)))
  totals = {"loss": 2.0, "weight": 4.0, "labels": labels, "answers": answers}
  found = task.metrics(totals, data, whole=True)
  assert found["loss_nats_per_sample"] == 0.5
  assert found["accuracy"] == pytest.approx(np.mean(labels == answers))
  for kind in ("both en", "one en", "same en"):
    own = kinds == kind
    name = "accuracy_" + kind.replace(" ", "_")
    assert found[name] == pytest.approx(np.mean((labels == answers)[own])) and own.any()
  baselines = task.baselines(data)
  assert baselines.keys() == found.keys() - {"loss_nats_per_sample"}
  assert all(each == {"majority_of_the_type": 0.5} for each in baselines.values())


def test_captions_are_judged_by_the_words_of_each_image(monkeypatch):
  """Against its name and keywords, those of others, and all of its texts."""
  data, config = loaded(CAPTIONING), config_of(CAPTIONING, beam={"judged": 3})
  references = data.references()
  perfect = lambda *args: [references[i][0] for i in args[-1]]
  monkeypatch.setattr(image_captioning, "written", perfect)
  found, count = TASKS[CAPTIONING].judge(config, None, None, data, None)
  assert (
    count == 3
    and found["chrf"] == pytest.approx(100)
    and found.keys()
    == {
      "keyword_f1",
      "keyword_f1_of_other_images",
      "chrf",
      "bleu",
    }
  )
  expected = scores.keyword_f1([references[i][0] for i in range(3)], data.keywords[:3])
  assert found["keyword_f1"] == expected and 30 < expected < 100
  turned = [[data.keywords[i] for i in order] for order in ((2, 0, 1), (1, 2, 0))]
  names = [references[i][0] for i in range(3)]
  others = np.mean([scores.keyword_f1(names, held) for held in turned])
  assert found["keyword_f1_of_other_images"] == pytest.approx(others) and others < expected
  assert "nrefs:var" in TASKS[CAPTIONING].signatures(None)["chrf"]


def test_captions_that_are_the_same_for_all_images_are_the_baselines():
  """Chosen on the training data: with the embedded names those of the targets."""
  data = loaded(CAPTIONING)
  found = TASKS[CAPTIONING].baselines(data)
  # All names differ: the first is as common as any.
  first = [data.train.texts[0]] * len(data.keywords)
  assert found["keyword_f1"]["commonest_caption"] == scores.keyword_f1(first, data.keywords)
  best = {metric: max(of.values()) for metric, of in found.items()}
  assert (
    best["keyword_f1"] == found["keyword_f1"]["commonest_keywords"] == pytest.approx(6.88, abs=0.01)
  )
  assert best["chrf"] == found["chrf"]["best_caption_by_chrf"] == pytest.approx(14.79, abs=0.01)


# ---------------------------------------------------------------------------------------------
# What they make of images
# ---------------------------------------------------------------------------------------------


def test_features_are_the_models_whatever_is_beside_them():
  """Of images of any size, some at a time; and what is too long is told."""
  config, model, variables, _ = built(RETRIEVAL)
  data, task = loaded(RETRIEVAL), TASKS[RETRIEVAL]
  embedder = task.embedder(config, model, variables, data.tokenizer, rows=2)
  pixels = [data.rows.pictures[i]["image"] for i in (0, 5, 9)]
  found = embedder.images(iter(pixels))
  seen = np.stack([data.validation[i]["image"] for i in (0, 5, 9)])
  whole = jax.jit(lambda v: model.apply(v, seen))(variables)
  np.testing.assert_allclose(found, whole.images_BE, atol=1e-6)  # float32
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
  texts = embedder.texts([data.rows.texts[i] for i in (0, 5, 9)], cut=True)
  rows = [data.rows.encoded.row(i) for i in (0, 5, 9)]
  tokens, mask = (np.stack([row[name] for row in rows]) for name in ("text", "mask"))
  whole = jax.jit(lambda v: model.apply(v, None, tokens, mask_BT=mask))(variables)
  np.testing.assert_allclose(texts, whole.texts_BE, atol=1e-6)
  assert embedder.images([]).shape == embedder.texts([]).shape == (0, 16)
  with pytest.raises(ValueError, match="'x{23}' has 23 tokens, and the model reads 22: make it"):
    embedder.texts(["x" * 23])
  with pytest.raises(ValueError, match="names.txt:7 has 23 tokens"):
    embedder.texts(["x" * 22, "x" * 23], ["names.txt:6", "names.txt:7"])


# Of one text: other white space, and letters that Unicode writes in two ways.
SPELLINGS = ("a caf\u00e9?", "  a\tcafe\u0301?\n")


def test_texts_are_found_however_they_are_spelt():
  config, model, variables, _ = built(RETRIEVAL)
  embedder = TASKS[RETRIEVAL].embedder(
    config, model, variables, loaded(RETRIEVAL).tokenizer, rows=2
  )
  one, other = embedder.texts(SPELLINGS)
  np.testing.assert_array_equal(one, other)
  assert np.abs(one - embedder.texts(["a cafe?"])[0]).max() > 1e-3


def test_features_that_are_not_numbers_are_told():
  config, model, variables, _ = built(RETRIEVAL)
  spoilt = jax.tree.map(lambda x: np.full_like(x, np.nan), variables)
  embedder = TASKS[RETRIEVAL].embedder(config, model, spoilt, loaded(RETRIEVAL).tokenizer, rows=2)
  for features in (embedder.texts, lambda _: embedder.images([np.zeros((4, 4, 3), np.uint8)])):
    with pytest.raises(FloatingPointError, match="the model's features are not numbers"):
      features(["a face"])


@pytest.mark.parametrize("name", [QUESTIONS, pytest.param(REASONING, marks=pytest.mark.ci)])
def test_answers_are_the_models_with_their_probabilities(name):
  """Of three images, or pairs of them, two at a time; the likeliest answer first."""
  config, model, variables, _ = built(name)
  data, task = loaded(name), TASKS[name]
  answerer = task.answerer(config, model, variables, data.tokenizer, data.identity)
  pictures = [data.train.pictures[i]["image"] for i in range(6)]
  asked = (
    pictures[:3] if answerer.images == 1 else list(zip(pictures[:3], pictures[3:], strict=True))
  )
  see = vision_language.see(config)
  seen = np.stack([see(x) if answerer.images == 1 else np.stack([*map(see, x)]) for x in asked])
  ids = [1, *data.tokenizer.encode("a face?"), 2]
  tokens = np.zeros((3, LENGTH), np.int32)
  tokens[:, : len(ids)] = ids
  scored = jax.jit(lambda v: model.apply(v, seen, tokens, mask_BT=tokens > 0))(variables)
  y = np.asarray(scored, np.float64)
  p = 1 / (1 + np.exp(-y)) if name == QUESTIONS else np.exp(log_softmax(y))
  wide = answerer.__class__(**{**vars(answerer), "size": 2, "rows": 2})
  for of_image, p_A in zip(wide(asked, "a face?"), p, strict=True):
    first, second = np.argsort(-p_A)[:2]
    assert [x.text for x in of_image] == [data.answers[first], data.answers[second]]
    np.testing.assert_allclose([x.score for x in of_image], p_A[[first, second]], rtol=1e-4)
  assert len(answerer(asked, "a face?")[0]) == 1
  one, other = (wide(asked, spelling) for spelling in SPELLINGS)
  assert one == other != wide(asked, "a cafe?")
  with pytest.raises(ValueError, match="the question has 23 tokens, and the model reads 22"):
    answerer(asked, "x" * 23)


def test_the_captioner_searches_as_the_config_says():
  config = config_of(CAPTIONING, beam={"size": 2, "length_penalty": 0.6, "penalty": "with_bos"})
  _, model, variables, _ = built(CAPTIONING)
  made = TASKS[CAPTIONING].captioner(config, model, variables, loaded(CAPTIONING).tokenizer)
  assert (made.size, made.length_penalty, made.penalty) == (2, 0.6, "with_bos")
  # With the mark of a beginning, and room for a mask behind.
  assert made.most == LENGTH - 2 and made.most + 1 == model.longest


@pytest.mark.parametrize(
  "name", [RETRIEVAL, *(pytest.param(name, marks=pytest.mark.ci) for name in NAMES[2:])]
)
def test_examples_are_drawn_with_what_is_found_and_answered(name):
  config, model, variables, _ = built(name)
  rows = TASKS[name].picture(config, model, variables, loaded(name))
  for row in rows:
    assert len(row.captions) == len(row.images) > 0
    assert {(x.dtype.name, x.shape) for x in row.images} == {("uint8", (16, 16, 3))}
  words = " ".join(caption for row in rows for caption in row.captions)
  if name == RETRIEVAL:
    told = TASKS[name].sample(config, model, variables, loaded(name), None)
    assert told.count("(reference: ") == 4 and "157 texts" in told
    assert all(row.title.startswith("nearest to: ") for row in rows[:-1])
  else:
    assert any(answer in words for answer in loaded(name).answers)


# ---------------------------------------------------------------------------------------------
# What is refused, and what goes on to work
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    (CAPTIONING, {"model": {"positions": "rotary"}}, "set model.positions='learned', not 'rotary'"),
  ],
)
def test_what_a_model_cannot_have_is_refused(name, fields, message):
  config = config_of(name, **fields)
  with pytest.raises(ConfigError, match=message) as error:
    TASKS[name].build_model(config, TASKS[name].planned_facts(config))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    (RETRIEVAL, {"batch_size": 4, "accumulation": 2}, "=2 with .* cuts the batch whose pairs"),
    (RETRIEVAL, {"vocab_chunk": 2}, "config.vocab_chunk is not read with config.task='image_te"),
    (QUESTIONS, {"label_smoothing": 0.1}, "config.label_smoothing is not read with"),
    (REASONING, {"vocab_chunk": 2}, "config.vocab_chunk is not read with"),
    *((name, {"eval_batches": 2}, "=2 with .* a part .*: set eval_batches=0") for name in WHOLE),
    (QUESTIONS, {"beam": {"size": 2}}, "beam.size is not read with config.task='visual_question"),
    (CAPTIONING, {"beam": {"max_ratio": 2.0}}, "beam.max_ratio is not read with config.task='ima"),
    (REASONING, {"model": {"scale_max": 100.0}}, "model.scale_max is not read with config.task="),
    (RETRIEVAL, {"data": {"mask_rate": 0.2}}, "data.mask_rate is not read with config.task='ima"),
  ],
)
def test_what_a_task_does_not_read_or_do_is_refused(name, fields, message):
  with pytest.raises(ConfigError, match=message) as error:
    config_of(name, **fields)
  assert "\n" not in str(error.value)


def test_a_part_of_the_captions_may_be_read():
  """Their loss is a mean, and they are judged apart."""
  assert config_of(CAPTIONING, eval_batches=2).eval_batches == 2


def test_the_scale_may_have_a_largest_value():
  config = config_of(RETRIEVAL, model={"scale_max": 5.0})
  model = TASKS[RETRIEVAL].build_model(config, TASKS[RETRIEVAL].planned_facts(config))
  assert model.scale_max == 5.0 and built(RETRIEVAL)[1].scale_max is None


def test_of_questions_the_head_alone_has_its_rate():
  """The pooler has not, as its name begins otherwise in BEiT-3's code, too."""
  _, model, variables, _ = built(QUESTIONS)
  scales = optimizers.head_scales(variables["params"], 20.0)
  rates = {name: {float(x) for x in jax.tree.leaves(tree)} for name, tree in scales.items()}
  assert rates == {
    **dict.fromkeys(("head_dense", "head_norm", "head_out"), {20.0}),
    **dict.fromkeys(("encoder", "pooler_norm", "pooler_dense"), {1.0}),
  }
  assert not model.encoder.encoder.recipe.final_norm
  assert built(REASONING)[1].encoder.encoder.recipe.final_norm
  told = {
    name: TASKS[name].describe(built(name)[0], TASKS[name].facts(loaded(name)))[-1]
    for name in (QUESTIONS, REASONING)
  }
  assert told == {QUESTIONS: "final norm: none", REASONING: "final norm: LN"}


@pytest.mark.ci
@pytest.mark.parametrize("name", [RETRIEVAL, QUESTIONS])
def test_the_encoder_can_be_diagnosed(name):
  """Of retrieval on its images, each of which has a loss by itself."""
  config, model, variables, _ = built(name)
  task = TASKS[name]
  call = diagnostics.calls_of(task, model)(batch_of(name), jax.random.key(0))
  both = jax.jit(
    lambda v: (
      diagnostics.statistics(model, v["params"], call),
      diagnostics.first_update(model, v["params"], call),
    )
  )
  (stream, gradient), update = both(variables)
  profile = diagnostics.profiles_of(model, stream, gradient)["encoder"]
  patches = 1 + 4
  assert profile.tokens == (patches if name == RETRIEVAL else patches + LENGTH)
  assert profile.gradient.min() > 0 and update[0] > 0 and math.isfinite(update[0])


# ---------------------------------------------------------------------------------------------
# The chain
# ---------------------------------------------------------------------------------------------

OFTEN = {"eval_every": 2, "checkpoint_every": 2, "log_every": 1}


@pytest.fixture(scope="module")
def pretrained_run(tmp_path_factory):
  """The workdir of two steps of masked data modelling, on images of another size."""
  folder = tmp_path_factory.mktemp("pretrained")
  sizes = {"layers": 1, "width": 8, "image_size": 32, "patch_size": 8, "image_vocab_size": 12}
  tokens = {"task": "image_tokenizer", "data": {"name": "embedded/emoji"}, "model": sizes}
  training.train(from_config_dict({**tokens, "batch_size": 8, "steps": 1}), folder / "tokens")
  config = {
    "task": "masked_data",
    "batch_size": 4,
    "steps": 2,
    "image_tokenizer": str(folder / "tokens"),
    "model": SMALL | {"image_size": 32, "image_vocab_size": 12},
    "data": DATA | {"mask_rate": 0.4, "mask_block": 2},
    "eval_batches": 1,
  }
  training.train(from_config_dict(config), folder / "run")
  return folder / "run"


def tuned(name, start, steps, **fields):
  """The config of a run that starts with the pre-trained encoder."""
  own = {"beam": {"judged": 3, "size": 2}, "eval_batches": 2} if name == CAPTIONING else {}
  given = {"optimizer": {"learning_rate": 1e-2, "schedule": "constant"}} | own | fields
  return config_of(name, steps=steps, init_from=str(start), **OFTEN, **given)


@pytest.mark.ci
@pytest.mark.parametrize("name", [RETRIEVAL, CAPTIONING])
def test_a_released_model_is_fine_tuned_with_its_tokenizer(name, tmp_path):
  """Laid out as released: positions from the third row on, spare rows behind the mask's. The run
  has its rows, under its ids, and goes on with its own copy of the tokenizer."""
  spm = pieces.train(tmp_path / "released.spm")
  tokenizer = tokenizers.XLMRTokenizer.load(spm)
  architecture = Architecture("encoder", 1, 0, 16, 16, 2)
  stack = RECIPES["magneto_torchscale"](architecture).encoder
  sizes = {"width": 16, "num_heads": 2, "ffn_width": 16, "positions": "none"}
  encoder = BEiT3(
    encoder=Encoder(recipe=stack, experts=("vision", "text"), **sizes),
    vocab_size=tokenizer.vocab_size + 9,
    num_patches=9,
    patch_size=8,
    max_text_length=64,
    position_offset=2,
  )
  model = CaptioningBEiT3(encoder=encoder, mask_id=tokenizer.vocab_size)
  params = reference.random_params(model, np.zeros((1, 24, 24, 3)), np.zeros((1, 4), int))
  released = convert.to_beit3(model, {"params": params})
  saved.save(tmp_path / "model", *convert.from_beit3(released, beit3.config_of(model)))
  data = {"tokenizer": "xlmr", "tokenizer_file": str(spm)}
  config = lambda steps: config_of(
    name,
    steps=steps,
    recipe="magneto_torchscale",
    init_from=str(tmp_path / "model"),
    optimizer={"learning_rate": 1e-12, "schedule": "constant"},
    data=data,
    **OFTEN,
    **({"beam": {"judged": 3, "size": 2}} if name == CAPTIONING else {}),
  )
  training.train(config(2), tmp_path / "run")
  spm.unlink()
  summary = training.train(config(4), tmp_path / "run")
  assert summary["resumed_at_step"] == 2
  found, variables = magneto_jax.load(tmp_path / "run")
  assert found.encoder.vocab_size == tokenizer.vocab_size + 1
  assert name != CAPTIONING or found.mask_id == tokenizer.vocab_size
  held = variables["params"]["encoder"]
  rows = lambda tree, name: np.asarray(tree[name]["embedding"])
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-9)
  theirs = rows(params["encoder"], "text_embedding")
  close(rows(held, "text_embedding"), theirs[: tokenizer.vocab_size + 1])
  theirs = rows(params["encoder"], "position_embeddings_text")
  close(rows(held, "position_embeddings_text"), theirs[2 : LENGTH + 2])
  assert runs.load_tokenizer(tmp_path / "run").identity == tokenizer.identity


@pytest.mark.ci
@pytest.mark.parametrize("name", [RETRIEVAL, QUESTIONS])
def test_a_run_starts_with_the_pretrained_encoder(name, pretrained_run, tmp_path):
  """Positions of patches are interpolated; all else of it is taken as it is."""
  config = tuned(name, pretrained_run, 1, optimizer={"learning_rate": 1e-12})
  training.train(config, tmp_path)
  source, found = (
    magneto_jax.load(folder).variables["params"]["encoder"] for folder in (pretrained_run, tmp_path)
  )
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
  for table in ("text_embedding", "position_embeddings_text", "patch_embedding"):
    jax.tree.map(close, found[table], source[table])
  stacks = [tree["encoder"]["stack"]["segment_0"] for tree in (found, source)]
  jax.tree.map(close, *stacks)
  new, old = (tree["position_embeddings_vision"]["embedding"] for tree in (found, source))
  close(new[0], old[0])
  close(new[1:], pretrained.resized_positions(np.asarray(old[1:]), (4, 4), (2, 2)))


def features_by_hand(workdir, pixels, text):
  """What the model of a run makes of images, each seen by itself, and of a text in bytes."""
  model, variables = magneto_jax.load(workdir)
  see = vision_language.see(runs.read_record(workdir).config)
  tokens = np.zeros((1, LENGTH), np.int32)
  ids = [1, *(4 + byte for byte in text.encode()), 2]
  tokens[0, : len(ids)] = ids
  found = model.apply(variables, np.stack([*map(see, pixels)]), tokens, mask_BT=tokens > 0)
  return np.asarray(found.images_BE), np.asarray(found.texts_BE)[0]


@pytest.mark.ci
@pytest.mark.parametrize("name", NAMES)
def test_the_chain_from_masked_data_to_what_it_is_for(name, pretrained_run, tmp_path, monkeypatch):
  """A run that starts with the pre-trained encoder is resumed and evaluated on the test part; and
  writes, answers or searches by the command."""
  monkeypatch.chdir(tmp_path)
  training.train(tuned(name, pretrained_run, 2), "whole")
  whole = training.train(tuned(name, pretrained_run, 4), "whole")
  assert whole["resumed_at_step"] == 2 and (tmp_path / "whole" / "examples.png").exists()
  scored = {n.removeprefix("validation_") for n in whole if n.startswith("validation_")}
  found = evaluation.evaluate(evaluation.open_run("whole"), "test")
  assert scored <= found["metrics"].keys()
  assert ("beam" in found) == (name == CAPTIONING)

  pictures = loaded(RETRIEVAL).train.pictures
  for i in range(3):
    Image.fromarray(pictures[i]["image"]).save(f"{i}.png")
  run = lambda module, *flags: subprocess.run(
    [sys.executable, "-m", f"magneto_jax.{module}", "--workdir=whole", *flags],
    capture_output=True,
    text=True,
  )
  if name == RETRIEVAL:
    asked = ("  a\tface ", "--image=1.png", "--top=9", "--output=found.json")
    result = run("search", "--images=.", *asked)
    assert result.returncode == 0, result.stderr
    by_text, by_image = json.loads((tmp_path / "found.json").read_text())["found"]
    # Examples and learning curves of runs are images, too.
    places = {x["place"]: x["score"] for x in by_text["results"]}
    assert {str(tmp_path / f"{i}.png") for i in range(3)} < places.keys()
    assert [*places.values()] == sorted(places.values(), reverse=True)
    assert by_image["results"][0]["image"] == "1.png"
    features = features_by_hand("whole", [image_files.read(place) for place in places], "a face")
    np.testing.assert_allclose([*places.values()], features[0] @ features[1], atol=1e-5)
    example = [*places].index(str(tmp_path / "1.png"))
    ranked = {x["place"]: x["score"] for x in by_image["results"]}
    own = features[0] @ features[0][example]
    np.testing.assert_allclose([ranked[place] for place in places], own, atol=1e-5)
    return
  flags = ["--image=0.png", "--image=1.png", "--scores"]
  flags += [] if name == CAPTIONING else ["--question=is this a face?"]
  result = run("generate", *flags)
  assert result.returncode == 0, result.stderr
  lines = result.stdout.split("\n")[:-1]
  assert len(lines) == (1 if name == REASONING else 2)
  for line in lines:
    score, *paths, text = line.split("\t")
    assert paths == ["0.png", "1.png"] if name == REASONING else len(paths) == 1
    assert math.isfinite(float(score))
    assert name == CAPTIONING or text in loaded(name).answers
