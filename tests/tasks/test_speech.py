"""Speech: what an utterance costs through the task, what is written, and what a run is given."""

import dataclasses
import functools
import json
import subprocess
import sys
import textwrap
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from benchmarks.reliability import states
from magneto_jax import diagnostics, evaluation, jobs, program, runs, training
from magneto_jax.config import ConfigError, from_config_dict
from magneto_jax.data import pipelines, scores, sounds
from magneto_jax.decoding import (
  Transcriber,
  Translation,
  beam_search,
  ctc_beam_search,
  ctc_greedy,
)
from magneto_jax.layers import SpecAugment, frame_counts, is_alignable, log_mel, normalize_mel
from magneto_jax.models import CTCRecognizer, SpeechToText, StatelessPredictor, Transducer
from magneto_jax.tasks import TASKS, speech
from tests import reference, simulated
from tests.models.common import compiled

TASK, TRANSLATION = TASKS["speech_recognition"], TASKS["speech_translation"]
HEADS = ("ctc", "transducer", "decoder")
SMALL = {"layers": 1, "width": 16, "ffn_width": 16, "heads": 2, "mel_bins": 8}
VOCAB = 10
FACTS = {"vocab_size": VOCAB}


def config_of(head="ctc", task="speech_recognition", **fields):
  model = SMALL | fields.pop("model", {})
  if task == "speech_recognition":
    model["speech_head"] = head
  if head == "transducer":
    model = {"joint_width": 8, "predictor_width": 8} | model
  data = {"name": "embedded/en", "tokenizer": "char", "seq_length": 80} | fields.pop("data", {})
  return from_config_dict({"task": task, "model": model, "data": data} | fields)


def sounds_of(lengths, length=None, seed=0):
  """Noise of several lengths, and silence behind it."""
  rng = np.random.default_rng(seed)
  waves = np.zeros((len(lengths), length or max(lengths)), np.int16)
  for row, samples in zip(waves, lengths, strict=True):
    row[:samples] = rng.integers(-9000, 9000, samples)
  return waves


# Vectors: 2, 5, 10; the first text needs 3 of a CTC, and has no alignment.
SAMPLES, TEXTS = (800, 1700, 3300), ([4, 4], [5, 6, 5], [7])


def batch_of(length=None, labels=4, rows=3):
  """Three utterances, and rows that fill up."""
  waves = np.zeros((rows, length or max(SAMPLES)), np.int16)
  waves[:3] = sounds_of(SAMPLES, length)
  tokens = np.zeros((rows, labels), np.int32)
  for row, ids in zip(tokens, TEXTS, strict=False):
    row[: len(ids)] = ids
  fill = [0] * (rows - 3)
  return {
    "waves": waves,
    "wave_lengths": np.array([*SAMPLES, *fill], np.int32),
    "tokens": tokens,
    "token_lengths": np.array([*map(len, TEXTS), *fill], np.int32),
    "weights": np.array([1, 1, 1, *fill], np.float32),
  }


def built(head, **fields):
  """A small model and random parameters."""
  config = config_of(head, **fields)
  model = TASK.build_model(config, FACTS)
  return model, {"params": reference.random_params(model, *TASK.dummy_inputs(config))}


# ---------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_a_loss_is_of_the_symbols_that_are_scored_and_of_no_padding(head):
  """From the model's own costs; more padding, and rows that fill up, change no sum."""
  model, variables = built(head)
  tight, wide = batch_of(), batch_of(length=4100, labels=6, rows=4)

  @compiled
  def run(tight, wide):
    args, kwargs = TASK.inputs(tight)
    nats_B = model.apply(variables, *args, **kwargs)
    return nats_B, [TASK.measured(model, variables, batch) for batch in (tight, wide)]

  nats_B, found = run(tight, wide)
  scored = np.array([head != "ctc", True, True])
  assert ((nats_B > 0) == scored).all()
  symbols = sum(np.array(list(map(len, TEXTS)))[scored] + (head == "decoder"))
  for measured in found:
    assert float(measured["weight"]) == symbols
    np.testing.assert_allclose(measured["loss"], nats_B.sum(), rtol=1e-5)  # float32
    assert (measured["utterances"], measured["unscored"]) == (3, head == "ctc")
  told = TASK.metrics({n: float(x) for n, x in measured.items()}, None, whole=True)
  assert told["loss_nats_per_token"] == pytest.approx(float(nats_B.sum()) / symbols, rel=1e-5)
  assert told.get("share_without_alignment") == (pytest.approx(1 / 3) if head == "ctc" else None)


def test_a_step_is_of_the_mean_over_symbols():
  """Of a batch in two parts, whose symbols differ, and with a row that fills up."""
  config = config_of("ctc")
  model, variables = built("ctc")
  batch = batch_of(rows=4)
  optimizer, _ = program.make_optimizer(config.optimizer, 3)
  state = program.TrainState(
    step=jnp.int32(0),
    params=variables["params"],
    opt_state=optimizer.init(variables["params"]),
    ema_params=None,
    variables={},
    skipped=jnp.int32(0),
    skipped_in_a_row=jnp.int32(0),
  )
  step = lambda state, batch: program.train_step(
    state,
    batch,
    jax.random.key(0),
    model=model,
    task=TASK,
    optimizer=optimizer,
    accumulation=2,
  )[1]["loss"]

  @compiled
  def run(state, batch):
    return step(state, batch), TASK.loss(model, variables, TASK.weigh(model, batch))

  found, (loss, weight) = run(state, batch)
  assert float(weight) == 4
  np.testing.assert_allclose(found, loss / weight, rtol=1e-5)  # float32


def test_a_set_without_any_alignment_is_told():
  totals = {"loss": 0.0, "weight": 0.0, "utterances": 2.0, "unscored": 2.0}
  with pytest.raises(ConfigError, match="none of the utterances that were measured has an align"):
    TASK.metrics(totals, None, whole=True)


# ---------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("head", "fields", "message"),
  [
    ("ctc", {"label_smoothing": 0.1}, "config.label_smoothing is not read without .*='decoder'"),
    ("ctc", {"beam": {"max_ratio": 2.0}}, "config.beam.max_ratio is not read without .*='decoder'"),
    ("transducer", {"model": {"encoder_layers": 2}}, "model.encoder_layers is not read without"),
    ("transducer", {"vocab_chunk": 3}, "config.vocab_chunk is not read without .*='decoder'"),
    ("decoder", {"model": {"joint_width": 9}}, "joint_width is not read without .*='transducer'"),
    ("ctc", {"beam": {"max_symbols": 3}}, "max_symbols is not read without .*='transducer'"),
  ],
)
def test_what_a_head_does_not_read_is_refused(head, fields, message):
  with pytest.raises(ConfigError, match=message) as error:
    config_of(head, **fields)
  assert "\n" not in str(error.value)


def test_a_translation_has_a_decoder():
  config = config_of(
    task="speech_translation", data={"name": "embedded/fr-en"}, model={"ctc_weight": 0.3}
  )
  model = TRANSLATION.build_model(config, FACTS)
  assert isinstance(model, SpeechToText) and model.ctc_weight == 0.3
  with pytest.raises(ConfigError, match="speech_head is not read with config.task='speech_transl"):
    config_of(task="speech_translation", model={"speech_head": "decoder"})


def test_fields_reach_the_model():
  config = config_of(
    "transducer",
    model={
      "predictor": "stateless",
      "predictor_width": 6,
      "joint_width": 10,
      "joint_chunk": 7,
      "ctc_weight": 0.2,
      "front_end": "vgg",
      "dropout": 0.1,
    },
    data={"sample_rate": 16_000, "max_seconds": 2.0},
    spec_augment={"frequency_masks": 2, "frequency_width": 5},
  )
  model = TASK.build_model(config, FACTS)
  assert isinstance(model, Transducer) and (model.joint_width, model.ctc_weight) == (10, 0.2)
  assert model.chunk == 7
  assert model.predictor == StatelessPredictor(vocab_size=VOCAB, width=6, dropout_rate=0.1)
  encoder = model.encoder
  assert (encoder.sample_rate, encoder.mel_bins, encoder.subsampling) == (16_000, 8, "vgg")
  assert encoder.augment == SpecAugment(frequency_masks=2, frequency_width=5)
  assert encoder.encoder.max_length == TASK.length(config) == encoder.lengths(32_000) == 49
  plain = TASK.build_model(config_of("ctc"), FACTS)
  assert isinstance(plain, CTCRecognizer) and plain.encoder.augment is None
  decoder = TASK.build_model(
    config_of(
      "decoder",
      model={"encoder_layers": 3, "tied_embeddings": False},
      label_smoothing=0.1,
      vocab_chunk=4,
    ),
    FACTS,
  )
  stacks = decoder.encoder.encoder.recipe, decoder.decoder.recipe
  assert [stack.num_layers for stack in stacks] == [3, 1]
  own = decoder.decoder
  assert (own.max_length, own.tied, own.label_smoothing, own.vocab_chunk) == (81, False, 0.1, 4)
  assert decoder.end_id == 2
  with pytest.raises(ConfigError, match="model.window=3 is of earlier tokens"):
    TASK.build_model(config_of("ctc", model={"window": 3}), FACTS)


def test_the_recipe_that_asks_is_given_the_correlation_of_frames():
  none = {"positions": "none"}
  of = lambda **fields: TASK.architecture(config_of(**fields), FACTS).token_correlation
  for front_end, expected in speech.FRAME_CORRELATION.items():
    model = {"front_end": front_end} | none
    assert of(recipe="deepscalelm", model=model) == expected
  assert of(recipe="magneto", model=none) == of(recipe="pre_ln", model=none)


@pytest.mark.parametrize("front_end", speech.FRAME_CORRELATION)
def test_the_correlation_of_frames_is_that_of_their_vectors(front_end, tmp_path):
  """At a stack's input, of a real sound as long as it is there: of one draw, so to a third."""
  config = config_of("ctc", model={"front_end": front_end, "positions": "none", "width": 128})
  data = TASK.load_data(config, tmp_path)
  longest = np.argsort(data.validation.samples)[-4:]
  samples = [data.validation[int(i)] for i in longest]
  shortest = min(int(sample["wave_lengths"]) for sample in samples)
  waves = np.stack([sample["waves"][:shortest] for sample in samples])
  model = TASK.build_model(config, TASK.facts(data))
  found = diagnostics.input_correlation(model, waves, np.full(4, shortest, np.int32))
  assert found["encoder"] == pytest.approx(speech.FRAME_CORRELATION[front_end], rel=0.3, abs=0.04)


@pytest.mark.parametrize("head", HEADS)
def test_the_stacks_of_a_model_are_found_and_its_targets_left_out(head):
  """What diagnoses go by: outputs that can be moved, and no nats."""
  model, variables = built(head)
  parts = diagnostics.parts_of(model)
  assert parts["encoder"].path == ("encoder", "encoder")
  assert ("decoder" in parts) == (head == "decoder")
  of_targets = diagnostics.calls_of(TASK, model)(batch_of(), jax.random.key(0))
  # Nats a symbol that is scored, as in training.
  mean = {"ctc": (20 + 40) / 4, "transducer": 70 / 6, "decoder": 70 / 9}[head]
  assert float(of_targets.loss(jnp.array([10.0, 20.0, 40.0]))) == pytest.approx(mean)
  call = of_targets.without_targets()
  output = jax.eval_shape(lambda: call.apply(model, variables))
  shapes = {"ctc": (3, 10, VOCAB), "transducer": (3, 10, 8), "decoder": (3, 1, VOCAB)}
  assert output.shape == shapes[head]


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  config = config_of("ctc", batch_size=3, data={"text_case": "lower", "speed_change": 0.1})
  return config, TASK.load_data(config, tmp_path_factory.mktemp("data"))


def test_planned_facts_and_batches_are_those_of_the_data(loaded, tmp_path):
  config, data = loaded
  assert TASK.planned_facts(config) == TASK.facts(data) == {"vocab_size": 46}
  batch = next(pipelines.train_iterator(data.train, batch_size=3, seed=0, augment=data.augment))
  assert TASK.batch_spec(config) == {
    name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()
  }
  assert TASK.counts(data) == {"utterances": 49, "too_long": 0, "with_unknown_characters": 3}
  by = lambda **fields: TASK.planned_facts(config_of(data=fields))["vocab_size"]
  assert by(tokenizer="byte") == 260 and by(tokenizer="sentencepiece", vocab_size=300) == 300
  part = {"train_split": "validation", "validation_split": "test", "text_case": "lower"}
  assert by(**part) == TASK.facts(TASK.load_data(config_of(data=part), tmp_path))["vocab_size"]
  with pytest.raises(ConfigError, match="characters of data.name='own' are not known without"):
    by(name="own")


def test_the_baseline_is_of_how_often_each_token_was_seen(loaded):
  _, data = loaded
  seen, others = (
    [i for row in map(part.__getitem__, range(len(part))) for i in row["tokens"] if i]
    for part in (data.train, data.validation)
  )
  p = {token: (1 + seen.count(token)) / (46 + len(seen)) for token in set(others)}
  expected = -np.mean([np.log(p[token]) for token in others])
  assert TASK.baselines(data) == {"loss_nats_per_token": {"unigram": pytest.approx(expected)}}
  # Of a decoder with the end of each text, and of a CTC without texts that have no alignment.
  ends = [2] * len(data.validation)
  p[2] = (1 + len(data.train)) / (46 + len(seen) + len(data.train))
  others_p = {token: (1 + seen.count(token)) / (46 + len(seen) + len(data.train)) for token in p}
  marked = dataclasses.replace(data, marks=(2,), alignable=None)
  expected = -np.mean([np.log((others_p | {2: p[2]})[token]) for token in others + ends])
  assert speech.unigram_nats(marked) == pytest.approx(expected)
  one = np.arange(len(data.validation)) == 3
  first = dataclasses.replace(data, alignable=(data.alignable[0], one))
  ids = [i for i in data.validation[3]["tokens"] if i]
  expected = -np.mean([np.log((1 + seen.count(i)) / (46 + len(seen))) for i in ids])
  assert speech.unigram_nats(first) == pytest.approx(expected)


@pytest.mark.parametrize("front_end", ["conv", "vgg", "conv2d"])
def test_utterances_without_an_alignment_are_those_of_the_loss(front_end):
  """Sounds of none to some vectors, each with every text."""
  texts = ([], [4], [4, 4], [4, 4, 4], [5, 6, 5], [5, 5, 6, 6])
  lengths = range(0, 4000, 180)
  samples, tokens = zip(*((n, np.array(text, int)) for n in lengths for text in texts), strict=True)
  part = types.SimpleNamespace(samples=np.array(samples), tokens=tokens)
  found = speech._alignable(config_of("ctc", model={"front_end": front_end}), part)
  vectors = speech.FRONT_ENDS[front_end].lengths(frame_counts(part.samples, sample_rate=8000))
  padded = np.stack([np.pad(ids, (0, 4 - len(ids))) for ids in tokens])
  expected = is_alignable(vectors, padded, np.array(list(map(len, tokens))))
  np.testing.assert_array_equal(found, expected)
  assert 0 < found.sum() < len(found)


def test_utterances_without_an_alignment_are_told(loaded, tmp_path):
  config, data = loaded
  assert data.alignable[0].all() and "vectors" not in data.describe()
  masks = tuple(np.arange(len(part)) > 2 for part in (data.train, data.validation))
  told = dataclasses.replace(data, alignable=masks).describe()
  assert "; 6 have more to say than a CTC has vectors for, and are left out" in told
  transducer = config_of("transducer", data={"text_case": "lower"})
  assert TASK.load_data(transducer, tmp_path).alignable is None


def test_data_of_which_nothing_has_an_alignment_are_refused(tmp_path):
  files = {}
  for seed, which in enumerate(("train", "validation")):
    soundfile.write(tmp_path / f"{which}.wav", sounds_of([900], seed=seed)[0], 8000)
    (tmp_path / f"{which}.tsv").write_text(f"{which}.wav\tfar more than two letters\n")
    files[f"{which}_files"] = str(tmp_path / f"{which}.tsv")
  config = config_of("ctc", data={"name": "manifest", **files})
  with pytest.raises(
    ConfigError, match="^no training utterance has an alignment with its text: ea"
  ):
    TASK.load_data(config, tmp_path / "run")


def test_positions_that_would_overflow_are_refused():
  """Of vectors of a sound, not of tokens."""
  config = config_of(model={"positions": "xpos", "xpos_scale_base": 1.2}, data={"seq_length": 64})
  with pytest.raises(
    ConfigError, match="serves 84 positions, and vectors of .*max_seconds=100: xP"
  ):
    TASK.build_model(config, FACTS)


# ---------------------------------------------------------------------------------------------
# What it writes
# ---------------------------------------------------------------------------------------------


class Letters:
  """Ids as letters."""

  pad_id, eos_id = 0, 2

  def decode(self, ids):
    return "".join(chr(97 + int(i)) for i in ids if i > 2)


@functools.lru_cache
def ready(head):
  return built(head)


def transcriber(head, size, **options):
  return Transcriber(*ready(head), Letters(), size=size, **{"longest": 3300, "most": 4} | options)


def cost(write, wave, text):
  """-log p(text | sound) by the model's own loss."""
  ids = np.array([[ord(letter) - 97 for letter in text]], np.int32).reshape(1, -1)
  given = wave[None], np.array([len(wave)]), ids, np.array([ids.size])
  return float(compiled(write.model.apply)(write.variables, *given)[0])


@pytest.mark.parametrize(
  "head", ("ctc", "transducer", pytest.param("decoder", marks=pytest.mark.ci))
)
def test_what_a_sound_becomes_does_not_depend_on_the_others(head):
  """Several lengths, and more than are searched at once, in their order; each as it is alone."""
  waves = [sounds_of([n], seed=n)[0] for n in (1700, 900, 2500)]
  write = transcriber(head, 2, rows=2, longest=2500)
  together = write(waves)
  for wave, found in zip(waves, together, strict=True):
    (alone,) = dataclasses.replace(write, rows=1, longest=3300)([wave])
    assert [text for text, _ in alone] == [text for text, _ in found]
    np.testing.assert_allclose([x for _, x in alone], [x for _, x in found], rtol=1e-4)


def test_sounds_of_no_vector_or_of_several_types_are_refused():
  write = transcriber("decoder", 1)
  with pytest.raises(ValueError, match="sound 1 has 199 samples: more than 3300, or too few for"):
    write([np.zeros(800, np.int16), np.zeros(199, np.int16)])
  waves = [np.zeros(800, np.int16), np.zeros(800, np.float32)]
  search = functools.partial(beam_search, *ready("decoder"), size=1, max_length=1, eos_id=2)
  with pytest.raises(ValueError, match="sounds must be arrays of one type, int16 or floats"):
    search([[2], [2]], sources=waves)
  with pytest.raises(ValueError, match="a SpeechToText needs sources"):
    search([[2]])


def test_sounds_are_padded_to_few_lengths():
  write = dataclasses.replace(transcriber("ctc", 1), longest=20_000)
  lengths = (1, 8000, 8001, 16_000, 16_001, 20_000)
  assert list(map(write._width, lengths)) == [8000, 8000, 16_000, 16_000, 20_000, 20_000]


@pytest.mark.parametrize("head", HEADS)
def test_a_score_is_the_models_own_cost(head):
  """With as many beams as there are texts of one label, and ends of them."""
  wave, limits = sounds_of([900])[0], {"longest": 900, "most": 1, "max_extra": 1, "rows": 1}
  ((best, *_),) = transcriber(head, 2 * VOCAB, length_penalty=0.0, **limits)([wave])
  expected = -cost(transcriber(head, 1), wave, best.text)
  assert best.score == pytest.approx(expected, rel=1e-4)  # float32


def test_one_beam_of_a_ctc_is_greedy_and_more_are_a_search():
  wave = sounds_of([3300])[0]
  write = transcriber("ctc", 1, rows=1)
  of = lambda *args, method: write.model.apply(write.variables, *args, method=method)
  h, frames = of(wave[None], np.array([len(wave)]), method="encode")
  log_p = of(h, method="log_probs")
  for size, found in (
    (1, ctc_greedy(log_p, frames, max_length=4)),
    (3, ctc_beam_search(log_p, frames, width=3, max_length=4)),
  ):
    ids = found.tokens_BWU[0, 0, : found.lengths_BW[0, 0]]
    ((best, *others),) = dataclasses.replace(write, size=size)([wave])
    assert best.text == Letters().decode(ids) and len(others) < size
    assert best.score == pytest.approx(float(found.scores_BW[0, 0]), rel=1e-5)


@pytest.mark.ci
@pytest.mark.parametrize("head", HEADS)
def test_a_mesh_hears_what_one_device_hears(head):
  """Rows on two devices, channels and vocabulary on two; rows that do not fit are filled up."""
  program = f"""
    import dataclasses, jax, numpy as np
    from magneto_jax import sharding
    from tests.tasks import test_speech
    write = test_speech.transcriber({head!r}, 2, rows=3)
    waves = [test_speech.sounds_of([n], seed=n)[0] for n in (900, 3300, 1700, 2100)]
    expected = write(waves)
    mesh = sharding.make_mesh({{"data": 2, "tensor": 2}})
    placed = sharding.parameter_shardings(write.variables["params"], mesh)
    params = jax.device_put(write.variables["params"], placed)
    with sharding.use_mesh(mesh):
      found = dataclasses.replace(write, variables={{"params": params}})(waves)
    assert [[x.text for x in row] for row in found] == [[x.text for x in r] for r in expected]
    score = lambda rows: np.array([x.score for row in rows for x in row])
    np.testing.assert_allclose(score(found), score(expected), rtol=0, atol=1e-4)
  """
  command = [sys.executable, "-c", textwrap.dedent(program)]
  subprocess.run(command, check=True, env=simulated.devices(4))


def test_sounds_that_do_not_fit_are_refused():
  write = transcriber("ctc", 1)
  for samples in (0, 100, 3301):
    with pytest.raises(ValueError, match=f"1 has {samples} samples: more than 3300, or too few"):
      write([np.ones(900, np.int16), np.ones(samples, np.int16)])
  broken = jax.tree.map(lambda x: x * np.nan, write.variables)
  with pytest.raises(FloatingPointError, match="no text of a sound has a finite score"):
    dataclasses.replace(write, variables=broken)([np.ones(900, np.int16)])


def test_the_config_reaches_the_transcriber():
  config = config_of(
    "decoder",
    data={"max_seconds": 2.0},
    beam={"size": 3, "length_penalty": 0.6, "penalty": "gnmt", "min_length": 2, "max_ratio": 0.5}
    | {"max_extra": 4, "rows": 7, "judged": 9},
  )
  assert TASK.transcriber(config, "model", "variables", "tokenizer") == Transcriber(
    "model",
    "variables",
    "tokenizer",
    longest=16_000,
    most=80,
    size=3,
    length_penalty=0.6,
    penalty="gnmt",
    min_length=2,
    max_ratio=0.5,
    max_extra=4,
    rows=7,
  )


@pytest.fixture
def rigged(loaded, monkeypatch):
  """Data, and a model that hears each sound's length."""
  config, data = loaded

  def told(self, waves):
    return [[Translation(f"{len(wave)} Samples", -1.0)] for wave in waves]

  monkeypatch.setattr(Transcriber, "__call__", told)
  texts = [f"{int(data.validation[i]['wave_lengths'])} Samples" for i in range(49)]
  return config, data, texts


def test_the_judge_compares_the_best_of_each_sound(rigged):
  """Of all, or of the first; the whole set's rates, by the raw texts."""
  config, data, texts = rigged
  references = list(data.validation.texts)
  for judged, count in ((0, 49), (5, 5), (99, 49)):
    asked = dataclasses.replace(config, beam=dataclasses.replace(config.beam, judged=judged))
    rates = {
      "word_error_rate": scores.word_error_rate(texts[:count], references[:count]),
      "character_error_rate": scores.character_error_rate(texts[:count], references[:count]),
    }
    assert TASK.judge(asked, None, {}, data, None) == (rates, count)
    # Small letters are judged as such, and told.
    found = scores.corpus_scores(texts[:count], references[:count], lowercase=True)
    assert TRANSLATION.judge(asked, None, {}, data, None) == (found, count)
  assert TRANSLATION.signatures(config) == scores.signatures(lowercase=True)
  assert "case:lc" in TRANSLATION.signatures(config)["chrf"] and TASK.signatures(config) == {}
  assert TRANSLATION.signatures(config_of()) == scores.signatures()


def test_a_person_sees_spectrograms_and_answers(rigged):
  """Low frequencies at the bottom, one scale of time, white behind the end."""
  config, data, texts = rigged
  picture = TASK.picture(config, None, {}, data)
  indices = np.linspace(0, 48, 8).astype(int)
  images = [image for row in picture for image in row.images]
  captions = [caption for row in picture for caption in row.captions]
  assert [row.title != "" for row in picture] == [True, False, False, False]
  assert captions == [f"{data.validation.texts[i]}; answered {texts[i]}" for i in indices]
  assert len({image.shape for image in images}) == 1 and images[0].dtype == np.uint8
  for i, image in zip(indices, images, strict=True):
    sample = data.validation[int(i)]
    frames = frame_counts(int(sample["wave_lengths"]), sample_rate=8000)
    assert (image[:, frames:] == 255).all() and (image[:, :frames] != 255).any(-1).all()
    mel = log_mel(sample["waves"][None], sample_rate=8000, mel_bins=8)
    mel = np.asarray(normalize_mel(mel, jnp.array([frames])))[0, :frames]
    # The colour map's green rises with the number; the lowest bin is the last row.
    order = np.argsort(mel[:, 0])
    assert (np.diff(image[-1, :frames, 1][order].astype(int)) >= 0).all()
  told = TASK.sample(config, None, {}, data, None)
  assert told.splitlines()[:2] == [texts[0], f"  (reference: {data.validation.texts[0]})"]
  assert TASK.sample(dataclasses.replace(config, sample_tokens=0), None, {}, data, None) is None


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


@pytest.mark.ci
def test_a_run_learns_resumes_is_evaluated_and_writes_down_a_file(tmp_path):
  """A recogniser of four beeps, by the commands."""
  rng, rows = np.random.default_rng(0), []
  for i in range(48):
    pitches = rng.integers(0, 4, 2)
    times = np.arange(1600) / 8000
    tones = [np.sin(2 * np.pi * (300 + 500 * pitch) * times) for pitch in pitches]
    wave = np.concatenate(tones) * 0.3 + rng.normal(0, 1e-3, 3200)
    soundfile.write(tmp_path / f"{i}.wav", wave, 8000)
    rows.append(f"{i}.wav\t{''.join('abcd'[pitch] for pitch in pitches)}")
  (tmp_path / "train.tsv").write_text("\n".join(rows[:40]) + "\n")
  (tmp_path / "validation.tsv").write_text("\n".join(rows[40:]) + "\n")
  files = {f"{name}_files": f"{tmp_path}/{name}.tsv" for name in ("train", "validation")}
  config = config_of(
    "transducer",
    model={"width": 32, "ffn_width": 32, "ctc_weight": 0.3},
    data=files | {"name": "manifest", "max_seconds": 0.5, "seq_length": 4},
    spec_augment={"frequency_masks": 1, "frequency_width": 2},
    steps=120,
    batch_size=8,
    eval_every=120,
    checkpoint_every=60,
    beam={"size": 1},
    optimizer={"learning_rate": 5e-3, "warmup_steps": 10, "decay_steps": 120, "clip_norm": 1.0},
  )
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  summary = training.train(config, whole)
  unigram = summary["baselines"]["loss_nats_per_token"]["unigram"]
  assert summary["validation_loss_nats_per_token"] < 0.7 * unigram
  assert summary["validation_character_error_rate"] < 60 and summary["judged"] == 8
  assert (whole / "examples.png").exists() and "(reference: " in summary["sample"]
  training.train(dataclasses.replace(config, steps=60), parts)
  training.train(config, parts)
  chex.assert_trees_all_equal(states.arrays(parts, 120), states.arrays(whole, 120))

  opened = evaluation.open_run(whole, changes={"beam.size": 2})
  found = evaluation.evaluate(opened, "train")
  json.dumps(found)
  assert found["counts"] == {"utterances": 40, "judged": 40} | {
    "too_long": 0,
    "with_unknown_characters": 0,
  }
  assert found["beam"]["size"] == 2 and found["metrics"]["character_error_rate"] < 60

  # At another rate, in two channels; then one that is too long, and one that is no sound.
  wave = soundfile.read(tmp_path / "40.wav", dtype="float32")[0]
  soundfile.write(tmp_path / "other.flac", np.stack([wave, wave], axis=1).repeat(2, 0), 16_000)
  soundfile.write(tmp_path / "long.wav", np.tile(wave, 2), 8000)
  (tmp_path / "bad.wav").write_bytes(b"none")
  command = [sys.executable, "-m", "magneto_jax.generate", f"--workdir={whole}"]
  names = ("40.wav", "other.flac", "long.wav")
  asked = [f"--sound={tmp_path / name}" for name in names]
  result = subprocess.run([*command, *asked], capture_output=True, text=True, cwd=tmp_path)
  assert result.returncode == 2
  assert result.stderr == (
    f"error: {tmp_path}/long.wav: it has 0.8 seconds, more than 0.5: cut it into parts, or set"
    " --too_long=cut\n"
  )
  model, variables = runs.load(whole)
  tokenizer = runs.load_tokenizer(whole)
  write = TASK.transcriber(config, model, variables, tokenizer)
  waves = [sounds.read(tmp_path / name, sample_rate=8000, longest=8000)[:4000] for name in names]
  expected = [best.text for best, *_ in write(waves)]
  lines = [f"{tmp_path / name}\t{text}" for name, text in zip(names, expected, strict=True)]
  assert result.stdout.splitlines() == lines[:2]
  more = [*command, *asked, "--too_long=cut", "--scores", f"--sound={tmp_path / 'bad.wav'}"]
  result = subprocess.run(more, capture_output=True, text=True, cwd=tmp_path)
  assert [line.split("\t", 1)[1] for line in result.stdout.splitlines()] == lines
  cut, error = result.stderr.splitlines()
  assert cut.endswith("long.wav has 0.80 seconds, and the model hears the first 0.5 of them")
  assert result.returncode == 2 and "bad.wav: it is no WAV, FLAC, Ogg" in error


def test_a_run_of_it_is_described(loaded):
  config, data = loaded
  assert jobs.title(config) == "magneto, 1 layers of width 16, speech_recognition on embedded/en"
  assert len(data.train) == 388 and TASK.unit == "utterances" and TASK.size(config) == 1
  decoder = TASK.describe(config_of("decoder"), FACTS)
  assert {line.split(":")[0] for line in decoder} == {"encoder", "decoder"}
