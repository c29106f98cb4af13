"""Translation: rows of pairs, of which none sees another, and what a run of it is given."""

import dataclasses
import itertools
import math
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.reliability import states
from magneto_jax import evaluate, evaluation, runs, sharding, training
from magneto_jax.config import OF_SOME_TASKS, from_config_dict
from magneto_jax.data import packing, pairs, scores
from magneto_jax.data.tokenizers import ByteTokenizer
from magneto_jax.decoding import Translation, Translator
from magneto_jax.layers.cross_entropy import cross_entropy
from magneto_jax.tasks import TASKS, translation
from tests import reference
from tests.models.common import compiled

TASK = TASKS["translation"]
FACTS = {"vocab_size": 20, "token_correlation": 0.02}
LENGTH, EOS = 12, 2
PAIRS = [([5, 6, 7], [8, 9]), ([10, 11], [12, 13, 14, 15]), ([16, 17, 18], [19, 5, 6])]


def config_of(**fields):
  model = {"layers": 1, "width": 16, "ffn_width": 16, "heads": 2} | fields.pop("model", {})
  data = {"seq_length": LENGTH} | fields.pop("data", {})
  return from_config_dict({"task": "translation", "model": model, "data": data} | fields)


def rows(*packed):
  """A batch of rows of pairs of token ids."""
  flat = [pair for row in packed for pair in row]
  texts = [[1, *side, EOS] for column in zip(*flat, strict=True) for side in column]
  order = iter(range(len(flat)))
  members = [[next(order) for _ in row] for row in packed]
  offsets = np.cumsum([0, *map(len, texts)])
  dataset = pairs.PackedPairs(np.concatenate(texts), offsets, members, LENGTH)
  samples = [dataset[i] for i in range(len(packed))]
  return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def built(dtype=jnp.float32, **fields):
  """The task's model and random parameters."""
  config = config_of(**fields)
  model = TASK.build_model(config, FACTS)
  stacks = {name: getattr(model, name).clone(dtype=dtype) for name in ("encoder", "decoder")}
  model = model.clone(**stacks)
  return model, reference.random_params(model, *TASK.dummy_inputs(config), dtype=dtype)


# ---------------------------------------------------------------------------------------------
# Packing does not change the objective
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ("sinusoidal", pytest.param("rotary", marks=pytest.mark.ci)))
def test_a_row_costs_what_its_pairs_cost_alone(positions):
  """Sums of nats and of tokens, whatever the rows, in float64 to 1e-12."""
  with jax.enable_x64(True):
    model, params = built(np.float64, model={"positions": positions})
    losses = compiled(lambda batch: TASK.loss(model, {"params": params}, batch))
    alone = losses(rows(*([pair] for pair in PAIRS)))
    for packed in ([PAIRS, [], []], [PAIRS[2:], PAIRS[:2], []], [[], PAIRS[::-1], []]):
      np.testing.assert_allclose(losses(rows(*packed)), alone, rtol=1e-12)
    assert float(alone[1]) == 3 + 5 + 4


@pytest.fixture(scope="module")
def small():
  """A model, its parameters, and the nats of every target of a batch."""
  model, params = built(model={"positions": "learned"})

  def nats(batch, params=params):
    args, keywords = TASK.inputs(batch)
    return model.apply({"params": params}, *args, **keywords)

  return model, params, compiled(nats)


def test_a_pair_sees_no_other_pair_of_its_row(small):
  """Whatever stands there instead, to the bit; its own source it sees, and its own past."""
  *_, nats = small
  batch = rows(PAIRS)
  first, second = (batch["segment_ids"] == segment for segment in (1, 2))
  before = np.asarray(nats(batch))

  def changed(name, segment):
    ids = batch[f"{'source_' * (name == 'source')}segment_ids"]
    other = dict(batch)
    other[name] = np.where(ids == segment, (batch[name] + 3) % 20, batch[name])
    return np.asarray(nats(other))

  for name in ("source", "inputs"):
    np.testing.assert_array_equal(changed(name, 2)[first], before[first])
    np.testing.assert_array_equal(changed(name, 1)[second], before[second])
    assert (np.abs(changed(name, 2) - before)[second] > 1e-5).all()


def test_nothing_of_padding_reaches_loss_or_gradient(small):
  """Tokens, positions and targets of padding may be anything."""
  model, params, _ = small
  batch = rows(PAIRS[:2], [])
  other = dict(batch)
  for ids, names in (
    ("source_segment_ids", ("source", "source_positions")),
    ("segment_ids", ("inputs", "targets", "positions")),
  ):
    for name in names:
      other[name] = np.where(batch[ids] == 0, 9, batch[name])
  assert any((other[name] != batch[name]).any() for name in batch)
  grad = compiled(
    jax.value_and_grad(lambda params, batch: TASK.loss(model, {"params": params}, batch)[0])
  )
  (loss, gradient), found = grad(params, batch), grad(params, other)
  assert found[0] == loss
  jax.tree.map(np.testing.assert_array_equal, found[1], gradient)
  # Rows of the tables that only padding reads: they get none.
  table = gradient["encoder"]["position_embedding"]["embedding"]
  assert np.any(table[:4]) and not np.any(table[4:])


# ---------------------------------------------------------------------------------------------
# Losses and metrics
# ---------------------------------------------------------------------------------------------


def test_smoothing_is_fairseqs():
  """p = (.7, .2, .1), target 0, e = .1: q = (.9, .05, .05), and p - q to the logits."""
  logits = jnp.log(jnp.array([[[0.7, 0.2, 0.1]]]))
  loss = lambda x: cross_entropy(x, jnp.eye(3), jnp.array([[0]]), smoothing=0.1)[0, 0]
  value, gradient = jax.value_and_grad(loss)(logits)
  assert float(value) == pytest.approx(0.5166086, abs=1e-6)
  np.testing.assert_allclose(gradient[0, 0], [-0.2, 0.15, 0.05], atol=1e-6)  # float32


@pytest.mark.parametrize("vocab_size, least", ((3, 0.3943977), (100, 0.7845950)))
def test_the_smoothed_loss_has_fairseqs_minimum(vocab_size, least):
  q = np.full(vocab_size, 0.1 / (vocab_size - 1), np.float32)
  q[0] = 0.9
  loss = cross_entropy(jnp.log(q)[None, None], jnp.eye(vocab_size), jnp.array([[0]]), smoothing=0.1)
  assert float(loss[0, 0]) == pytest.approx(least, abs=1e-6)


def test_perplexity_is_of_the_mean_nats():
  found = TASK.metrics({"loss": 6.0, "weight": 4.0}, None, whole=True)
  assert found == pytest.approx({"loss_nats_per_token": 1.5, "perplexity": math.exp(1.5)})
  assert TASK.metrics({"loss": 1e6, "weight": 1.0}, None, whole=False) == {
    "loss_nats_per_token": 1e6
  }


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(tmp_path):
  """Config and data of one's own pairs, some of them held out."""
  lines = [f"source number {i}\tZiel Nummer {i} von zwanzig" for i in range(20)]
  (tmp_path / "own.tsv").write_text("\n".join(lines))
  config = from_config_dict(
    {
      "task": "translation",
      "batch_size": 3,
      "data": {
        "name": "pair_files",
        "train_files": f" {tmp_path}/own.tsv ,",
        "validation_fraction": 0.25,
        "tokenizer": "byte",
        "seq_length": 40,
      },
    }
  )
  return config, TASK.load_data(config, tmp_path / "run")


def test_every_field_of_the_data_that_pairs_read_reaches_them(loaded, monkeypatch):
  config, data = loaded
  assert (len(data.train_pairs), len(data.validation_pairs)) == (15, 5)
  given = {}
  monkeypatch.setattr(translation.pairs, "load_pairs", lambda **options: given.update(options))
  TASK.load_data(config, "a folder", {"of": "an earlier run"})
  fields = {field.name for field in dataclasses.fields(config.data)}
  others = {n for n, tasks in OF_SOME_TASKS.items() if "translation" not in tasks}
  of_texts = {name.removeprefix("data.") for name in others}
  of_pipelines = {"workers", "prefetch"}
  assert given.keys() - {"workdir", "expected"} == fields - of_texts - of_pipelines
  assert given["train_files"] == (config.data.train_files.strip(" ,"),)
  for name in given.keys() - {
    "workdir",
    "expected",
    "train_files",
    "validation_files",
    "test_files",
  }:
    assert given[name] == getattr(config.data, name)


def test_planned_batches_are_those_of_the_data(loaded):
  config, data = loaded
  assert TASK.planned_facts(config).keys() == TASK.facts(data).keys()
  assert TASK.batch_spec(config) == {
    name: jax.ShapeDtypeStruct((3, *array.shape), array.dtype)
    for name, array in data.train[0].items()
  }


def test_the_baseline_is_of_how_often_each_token_was_seen(loaded):
  """By counting the rows' targets."""
  _, data = loaded

  def targets(rows):
    samples = [rows[i] for i in range(len(rows))]
    return np.concatenate([row["targets"][row["weights"] > 0] for row in samples]).tolist()

  seen = targets(data.train)
  p = {token: (1 + seen.count(token)) / (260 + len(seen)) for token in targets(data.validation)}
  expected = -np.mean([math.log(p[token]) for token in targets(data.validation)])
  assert TASK.baselines(data) == {"loss_nats_per_token": {"unigram": pytest.approx(expected)}}


def test_the_correlation_is_of_what_both_stacks_read(loaded):
  """By brute force over all pairs of the rows' tokens."""
  _, data = loaded
  read = []
  for row in map(data.train.__getitem__, range(len(data.train))):
    read += row["source"][row["source_segment_ids"] > 0].tolist()
    read += row["inputs"][row["segment_ids"] > 0].tolist()
  read = np.array(read)
  facts = TASK.facts(data)
  assert facts["vocab_size"] == 260
  assert facts["token_correlation"] == pytest.approx(np.mean(read[:, None] == read[None]))
  assert isinstance(data.train, packing.Mapped)


@pytest.mark.ci
def test_a_run_learns_to_translate_and_resumes_to_the_bit(tmp_path):
  """Words of a dictionary, of which each target word is known once its source is read."""
  words = {"cat": "K", "dog": "H", "house": "Z", "tree": "B", "red": "R"}
  lines = [
    f"{' '.join(chosen)}\t{' '.join(words[word] for word in chosen)}\n"
    for chosen in itertools.product(words, repeat=3)
  ]
  (tmp_path / "own.tsv").write_text("".join(np.random.default_rng(0).permutation(lines)))
  config = from_config_dict(
    {
      "task": "translation",
      "steps": 40,
      "batch_size": 2,
      "label_smoothing": 0.1,
      "eval_every": 40,
      "checkpoint_every": 20,
      "model": {"layers": 1, "width": 32, "heads": 2, "ffn_width": 32, "dropout": 0.1},
      "optimizer": {"learning_rate": 0.02, "schedule": "inverse_sqrt", "warmup_steps": 10},
      "data": {
        "name": "pair_files",
        "train_files": f"{tmp_path}/own.tsv",
        "tokenizer": "byte",
        "seq_length": 64,
      },
    }
  )
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  summary = training.train(config, whole)
  unigram = summary["baselines"]["loss_nats_per_token"]["unigram"]
  nats = summary["validation_loss_nats_per_token"]
  assert nats < 0.7 * unigram
  assert summary["validation_perplexity"] == pytest.approx(math.exp(nats))
  training.train(dataclasses.replace(config, steps=20), parts)
  training.train(config, parts)
  chex.assert_trees_all_equal(states.arrays(parts, 40), states.arrays(whole, 40))


# ---------------------------------------------------------------------------------------------
# What it writes
# ---------------------------------------------------------------------------------------------

JUDGED = from_config_dict(
  {
    "task": "translation",
    "data": {"seq_length": 12},
    "beam": {
      "size": 3,
      "length_penalty": 0.6,
      "penalty": "gnmt",
      "min_length": 2,
      "max_ratio": 1.5,
      "max_extra": 4,
      "rows": 7,
      "judged": 0,
    },
  }
)


def test_the_config_reaches_the_translator():
  found = TASK.translator(JUDGED, "model", "variables", "tokenizer")
  assert found == Translator(
    "model",
    "variables",
    "tokenizer",
    longest=12,
    size=3,
    length_penalty=0.6,
    penalty="gnmt",
    min_length=2,
    max_ratio=1.5,
    max_extra=4,
    rows=7,
  )


def loud(self, sources):
  """Each source in capitals, as a translation."""
  texts = [self.tokenizer.decode(source).upper() for source in sources]
  return [[Translation(text, -1.0), Translation("worse", -2.0)] for text in texts]


def test_the_judge_scores_the_best_of_each_source(monkeypatch):
  """Against the raw references; a source that is too long is cut, and counts."""
  monkeypatch.setattr(Translator, "translate", loud)
  pairs = [("a b c d e", "A B C D E"), ("f g h i j k l", "F G H I J K L"), ("m", "N")]
  references = [right for _, right in pairs]
  data = types.SimpleNamespace(validation_pairs=pairs, tokenizer=ByteTokenizer())
  found = translation.judge(JUDGED, None, {}, data, None)
  assert found == (scores.corpus_scores(["A B C D E", "F G H I J K", "M"], references), 3)
  assert found[0]["bleu"] < 100
  first = dataclasses.replace(JUDGED, beam=dataclasses.replace(JUDGED.beam, judged=2))
  expected = scores.corpus_scores(["A B C D E", "F G H I J K"], references[:2])
  assert translation.judge(first, None, {}, data, None) == (expected, 2)


def test_an_evaluation_says_what_it_is_of(tmp_path, monkeypatch, capsys):
  """The loss of the pairs that fit, the rest of all; the beam may be another than the run's."""
  monkeypatch.setattr(Translator, "translate", loud)
  for name, count in (("train", 9), ("validation", 5)):
    lines = [f"{name} {i}\t{name} {i}".upper() for i in range(count)]
    (tmp_path / f"{name}.tsv").write_text("\n".join([*lines, "X" * 40 + "\tx", "x\t" + "y" * 30]))
  data = {f"{name}_files": f"{tmp_path}/{name}.tsv" for name in ("train", "validation")}
  data |= {"name": "pair_files", "tokenizer": "byte", "seq_length": 20, "too_long": "skip"}
  config = config_of(data=data, batch_size=2, beam={"size": 3})
  loaded = TASK.load_data(config, runs.data_in(tmp_path / "run"))
  record = runs.Record(config, dict(loaded.identity), TASK.facts(loaded))
  runs.write_record(tmp_path / "run", record)
  model = TASK.build_model(config, record.facts)
  variables = jax.jit(model.init)(jax.random.key(0), *TASK.dummy_inputs(config))
  mesh, run = sharding.make_mesh(config.mesh.sizes()), runs.Run(model, variables)
  other = evaluation.changed(config, {"beam.size": 2, "beam.length_penalty": 0.5})
  held = record._replace(config=other)
  result = evaluation.evaluate(
    evaluation.Opened(str(tmp_path / "run"), held, 1, run, mesh, 2, "a digest")
  )
  assert result["counts"] == {"pairs": 5, "too_long": 2, "judged": 7}
  sources, references = zip(*loaded.validation_pairs, strict=True)
  assert len(sources[5]) == 40 and len(references[6]) == 30
  expected = scores.corpus_scores([source.upper()[:19] for source in sources], references)
  assert {name: result["metrics"][name] for name in expected} == expected
  assert (result["beam"]["size"], result["beam"]["length_penalty"]) == (2, 0.5)
  assert result["signatures"] == scores.signatures()
  evaluate.report(result)
  told = capsys.readouterr().out
  assert "on the split 'validation': 5 pairs, 2 too long, 7 judged, in" in told
  assert all(f"{name}: {signed}\n" in told for name, signed in scores.signatures().items())
