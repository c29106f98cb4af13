"""Beam search against its rule written out, against all sequences there are, and against greedy."""

import dataclasses
import functools
import itertools
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magneto_jax import RECIPES, Architecture, CausalLM
from magneto_jax.data.tokenizers import ByteTokenizer
from magneto_jax.decoding import Translator, beam, beam_search, generate
from magneto_jax.layers.attention import KVCache
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.encoder_decoder import EncoderDecoder
from magneto_jax.models.language import DecodingState
from magneto_jax.models.transformer import BlockCaches
from tests import simulated

PAD, BOS, EOS = 0, 1, 2

# ---------------------------------------------------------------------------------------------
# A model whose logits are rows of a table, by all tokens so far, which it keeps in its cache
# ---------------------------------------------------------------------------------------------


def row_of(prefix, rows: int) -> int:
  """Which row of the table a sequence reads."""
  return sum((int(token) + 1) * 7**i for i, token in enumerate(prefix)) % rows


@dataclasses.dataclass(frozen=True)
class Remembering:
  """Scores the next token by the table [rows, V] of its variables."""

  vocab_size: int
  longest = None

  def init_state(self, batch, length):
    cache = KVCache.empty(batch, length, 1, 1, dtype=jnp.int32)
    return DecodingState(((BlockCaches(cache),),), jnp.zeros((batch, length), jnp.int32))

  def apply(self, table, tokens_BT, *, state, mask_BT=None):
    own = state.caches[0][0].self_attention
    own = own.extend(tokens_BT[..., None, None], tokens_BT[..., None, None])
    tokens_BS = own.k_LBKSH[0, :, 0, :, 0]
    powers_S = jnp.array([7**i % len(table) for i in range(tokens_BS.shape[1])], jnp.int32)
    powers_S = jnp.where(jnp.arange(len(powers_S)) < own.length, powers_S, 0)
    rows_B = jnp.sum((tokens_BS + 1) * powers_S[None], axis=1)
    if state.memory_ids_BS is not None:
      rows_B += state.memory_ids_BS[:, 0]
    rows_B %= len(table)
    shape = (*tokens_BT.shape, self.vocab_size)
    logits = jnp.broadcast_to(table[rows_B][:, None], shape)
    return logits, state._replace(caches=((BlockCaches(own),),))


@dataclasses.dataclass(frozen=True)
class Answering:
  """The same of an encoder-decoder: which row, the sum of the source's tokens decides too."""

  vocab_size: int

  @property
  def decoder(self):
    return Remembering(self.vocab_size)

  encoder = decoder

  def init_state(self, batch, length, memory_length):
    del memory_length
    memory = jnp.zeros((batch, 1), jnp.int32)
    return self.decoder.init_state(batch, length)._replace(memory_ids_BS=memory)

  def apply(self, table, tokens_BT, lengths_B=None, *, method, memory_BSD=None, **options):
    if method == "memory":
      mask_BT = jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]
      return jnp.where(mask_BT, tokens_BT, 0)[..., None], mask_BT
    state = options["state"]
    if memory_BSD is not None:
      state = state._replace(memory_ids_BS=jnp.sum(memory_BSD, axis=1))
    return self.decoder.apply(table, tokens_BT, state=state)


def log_softmax(logits_V):
  logits_V = np.asarray(logits_V, np.float64)
  shifted = logits_V - logits_V.max()
  return shifted - np.log(np.exp(shifted).sum())


def reading(table, prompt):
  """`tokens -> log-probabilities of the next` of the model above."""
  return lambda tokens: log_softmax(table[row_of([*prompt, *tokens], len(table))])


def penalised(total, length, power, penalty):
  return total / (length**power if penalty == "length" else ((5 + length) / 6) ** power)


def by_the_rule(log_p, size, max_length, *, min_length=1, power=1.0, penalty="length"):
  """The search as its docstring says it, a sentence and a step at a time."""
  live, finished = [((), 0.0)], []
  for step in range(max_length + 1):
    candidates = []
    for tokens, total in live:
      for token, value in enumerate(log_p(tokens)):
        ends = token == EOS
        if token != PAD and (ends if step == max_length else step >= min_length or not ends):
          candidates.append(((*tokens, token), total + value))
    candidates.sort(key=lambda candidate: -candidate[1])
    for tokens, total in candidates[:size]:
      if tokens[-1] == EOS and total > -np.inf and len(finished) < size:
        finished.append((tokens, penalised(total, step + 1, power, penalty)))
    if len(finished) == size:
      break
    live = [c for c in candidates[: 2 * size] if c[0][-1] != EOS][:size]
  return sorted(finished, key=lambda pair: -pair[1])


def assert_same(found, expected, atol=1e-5):
  assert [tuple(y.tolist()) for y, _ in found] == [tokens for tokens, _ in expected]
  np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], rtol=0, atol=atol)


def tables(count, vocab_size=6, rows=997):
  return np.random.default_rng(3).normal(size=(count, rows, vocab_size)).astype(np.float32) * 1.5


PROMPTS = [[BOS], [3], [4], [5]]


@pytest.mark.parametrize(
  ("size", "options"),
  [
    (1, {}),
    (2, dict(min_length=0)),
    (3, dict(min_length=3, power=0.6)),
    (4, dict(power=0.6, penalty="gnmt")),
    (4, dict(power=0.0)),
  ],
)
def test_the_search_is_its_rule(size, options):
  """Of a model that sees all of a beam's own tokens, so that a mixed-up cache would show."""
  model = Remembering(6)
  renamed = {("length_penalty" if name == "power" else name): x for name, x in options.items()}
  for table in tables(3):
    found = beam_search(model, table, PROMPTS, size=size, max_length=6, eos_id=EOS, **renamed)
    for prompt, hypotheses in zip(PROMPTS, found, strict=True):
      expected = by_the_rule(reading(table, prompt), size, 6, **options)
      assert_same(hypotheses, expected)


@pytest.mark.parametrize("power, penalty", [(0.0, "length"), (1.0, "length"), (0.6, "gnmt")])
def test_a_beam_that_holds_everything_is_exhaustive_search(power, penalty):
  """k = V^max_length: the best of all sequences there are, and the k best in their order."""
  max_length, vocab_size = 3, 5
  size = vocab_size**max_length
  model = Remembering(vocab_size)
  for table in tables(3, vocab_size):
    (found,) = beam_search(
      model, table, [[BOS]], size=size, max_length=max_length, eos_id=EOS, min_length=0,
      length_penalty=power, penalty=penalty,
    )  # fmt: skip
    log_p = reading(table, [BOS])
    every = []
    for length in range(max_length + 1):
      for tokens in itertools.product((BOS, 3, 4), repeat=length):
        tokens = (*tokens, EOS)
        total = sum(log_p(tokens[:i])[token] for i, token in enumerate(tokens))
        every.append((tokens, penalised(total, length + 1, power, penalty)))
    assert_same(found, sorted(every, key=lambda pair: -pair[1]))


def by_last(**rows):
  """A table by the last token: the rows that are named, with what is left at the token `x`."""
  ids = {"eos": EOS, "a": 3, "b": 4, "c": 5, "d": 6, "x": 7, "start": BOS}
  p = np.zeros((8, 8))
  for name, odds in rows.items():
    for token, probability in odds.items():
      p[ids[name], ids[token]] = probability
    p[ids[name], ids["x"]] += 1 - sum(odds.values())
  with np.errstate(divide="ignore"):
    return np.log(p).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LastToken:
  """Scores the next token by the last."""

  vocab_size = 8
  longest = None

  def init_state(self, batch, length):
    return DecodingState((), jnp.zeros((batch, length), jnp.int32))

  def apply(self, table, tokens_BT, *, state, mask_BT=None):
    return table[tokens_BT], state


@pytest.mark.parametrize(
  "size, length_penalty, penalty, tokens, score",
  [
    (1, 1.0, "length", [3, EOS], -0.713558),
    (2, 1.0, "length", [4, EOS], -0.510826),
    (2, 0.0, "length", [4, EOS], -1.021651),
    (2, 0.6, "gnmt", [4, EOS], -0.931396),
  ],
)
def test_two_steps_by_hand(size, length_penalty, penalty, tokens, score):
  """p(a) = .6, p(b) = .4, p(eos | a) = .4, p(eos | b) = .9."""
  table = by_last(start=dict(a=0.6, b=0.4), a=dict(eos=0.4), b=dict(eos=0.9))
  ((best, *_),) = beam_search(
    LastToken(), table, [[BOS]], size=size, max_length=1, eos_id=EOS,
    length_penalty=length_penalty, penalty=penalty,
  )  # fmt: skip
  assert best.tokens.tolist() == tokens
  assert best.score == pytest.approx(score, abs=1e-6)


def test_what_is_finished_is_kept():
  """Two beams overtake the sequence that ended, and then end badly: it was the best."""
  table = by_last(
    start=dict(a=0.66, eos=0.3, b=0.04),
    a=dict(c=0.52, d=0.48),
    c=dict(eos=0.1),
    d=dict(eos=0.1),
  )
  assert 0.66 * 0.48 > 0.3 > 0.66 * 0.52 * 0.1
  ((best, second),) = beam_search(
    LastToken(), table, [[BOS]], size=2, max_length=2, min_length=0, eos_id=EOS, length_penalty=0
  )
  assert best.tokens.tolist() == [EOS] and second.tokens.tolist() == [3, 5, EOS]
  assert best.score == pytest.approx(np.log(0.3), abs=1e-6)


def test_an_end_that_is_not_among_the_first_beams_is_not_taken():
  """Of 2 k candidates the eos is the third: with k = 2 the sequence does not end there."""
  table = by_last(
    start=dict(a=0.4, b=0.35, eos=0.25), a=dict(eos=0.9), b=dict(eos=0.9), x=dict(eos=0.1)
  )
  options = dict(max_length=4, min_length=0, eos_id=EOS, length_penalty=0)
  (two,) = beam_search(LastToken(), table, [[BOS]], size=2, **options)
  (three,) = beam_search(LastToken(), table, [[BOS]], size=3, **options)
  assert [y.tolist() for y, _ in two] == [[3, EOS], [4, EOS]]
  assert [y.tolist() for y, _ in three] == [[3, EOS], [4, EOS], [EOS]]


def test_equal_scores_go_to_the_earlier_beam_and_the_smaller_id():
  table = np.full((8, 8), -np.inf, np.float32)
  table[:, [EOS, 3, 4, 5]] = np.log(0.25)
  (found,) = beam_search(
    LastToken(), table, [[BOS]], size=2, max_length=2, min_length=2, eos_id=EOS
  )
  assert [y.tolist() for y, _ in found] == [[3, 3, EOS], [3, 4, EOS]]


def test_each_sentence_ends_at_its_own_length():
  """Where the eos is all but impossible, and costs what it costs."""
  table = by_last(start=dict(eos=1e-6), x=dict(eos=1e-6))
  limits = [0, 3, 1, 6]
  found = beam_search(LastToken(), table, [[BOS]] * 4, size=1, max_length=limits, eos_id=EOS)
  for limit, (best,) in zip(limits, found, strict=True):
    assert best.tokens.tolist() == [7] * limit + [EOS]
    total = limit * np.log(1 - 1e-6) + np.log(1e-6)
    assert best.score == pytest.approx(total / (limit + 1), abs=1e-5)


def test_what_has_no_probability_takes_no_place():
  """One sequence only: with four beams, three of them and all other ends are of nothing."""
  table = by_last(start=dict(a=1.0), a=dict(b=1.0), b=dict(c=1.0), c=dict(d=1.0), d=dict(eos=1.0))
  ((only,),) = beam_search(LastToken(), table, [[BOS]], size=4, max_length=8, eos_id=EOS)
  assert only.tokens.tolist() == [3, 4, 5, 6, EOS]
  assert only.score == pytest.approx(0.0, abs=1e-6)


def test_scores_that_are_no_numbers_are_an_error():
  table = np.full((8, 8), np.nan, np.float32)
  with pytest.raises(FloatingPointError, match="prompt 0 has a finite score"):
    beam_search(LastToken(), table, [[BOS]], size=2, max_length=2, eos_id=EOS)


# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------

SIZES = dict(vocab_size=12, width=16, num_heads=2, ffn_width=32)
SOURCES = [[5, 6, 7, 9, 11, EOS], [9, EOS], [4, 4, 8, EOS]]
STARTS = [[EOS], [EOS], [EOS]]


def sharpened(model, *inputs):
  """Variables that are larger than at the start, so that noise does not turn the order."""
  variables = jax.jit(model.init)(jax.random.key(0), *inputs)
  return jax.tree.map(lambda leaf: 2.0 * leaf, variables)


def make_translating(**options):
  architecture = Architecture("encoder_decoder", encoder_layers=1, decoder_layers=2, width=16)
  recipe = RECIPES["magneto"](architecture)
  sizes = SIZES | options
  return EncoderDecoder(
    encoder=Encoder(recipe=recipe.encoder, **sizes),
    decoder=CausalLM(recipe=recipe.decoder, **sizes),
    shared_embedding=True,
  )


@pytest.fixture(scope="module")
def translating():
  model = make_translating()
  row = np.zeros((1, 4), np.int32)
  return model, sharpened(model, row, row)


@pytest.fixture(scope="module")
def language():
  recipe = RECIPES["magneto"](Architecture("decoder", decoder_layers=2, width=16)).decoder
  model = CausalLM(recipe=recipe, positions="rotary", **SIZES)
  return model, sharpened(model, np.zeros((1, 4), np.int32))


@functools.cache
def jitted(model):
  return jax.jit(model.apply)


def in_full(model, variables, prompt, source=None):
  """`tokens -> log-probabilities of the next`, with no cache: the whole is run each time."""

  def log_p(tokens):
    padded = np.zeros((1, 12), np.int32)
    row = [*prompt, *tokens]
    padded[0, : len(row)] = row
    inputs, masks = (padded,), {}
    if source is not None:
      padded_source = np.zeros((1, 6), np.int32)
      padded_source[0, : len(source)] = source
      inputs, masks = (padded_source, padded), {"source_mask_BS": np.arange(6)[None] < len(source)}
    return log_softmax(jitted(model)(variables, *inputs, **masks)[0, len(row) - 1])

  return log_p


LIMITS = [5, 7, 3]


def all_found(model, variables, **options):
  """Sources and results of several lengths in one batch."""
  options = dict(size=3, max_length=LIMITS, eos_id=EOS) | options
  return beam_search(model, variables, STARTS, sources=SOURCES, **options)


@pytest.mark.parametrize("size", [3, pytest.param(1, marks=pytest.mark.ci)])
def test_translations_are_those_of_the_model_without_a_cache(translating, size):
  for source, most, found in zip(SOURCES, LIMITS, all_found(*translating, size=size), strict=True):
    assert_same(found, by_the_rule(in_full(*translating, [EOS], source), size, most))


def test_continuations_are_those_of_the_model_without_a_cache(language):
  """Prompts of several lengths in one batch, which are padded on the left."""
  model, variables = language
  prompts = [[BOS, 7, 3, 9], [BOS, 10], [BOS]]
  found = beam_search(model, variables, prompts, size=3, max_length=6, eos_id=EOS)
  for prompt, hypotheses in zip(prompts, found, strict=True):
    assert_same(hypotheses, by_the_rule(in_full(model, variables, prompt), 3, 6))


def test_one_beam_is_greedy_decoding():
  """But for the eos, which ends what greedy decoding would break off."""
  model, (table,) = Remembering(6), tables(1)
  table[:, PAD] = -20.0  # What greedy decoding may write, and beam search not.
  prompts = [[BOS, token] for token in range(3, 6)] * 3
  prompts = [[i % 6, *prompt] for i, prompt in enumerate(prompts)]
  greedy = generate(model, table, prompts, max_new_tokens=4, temperature=0, eos_id=EOS)
  found = beam_search(model, table, prompts, size=1, max_length=4, min_length=0, eos_id=EOS)
  ended = 0
  for prompt, tokens, (best,) in zip(prompts, greedy, found, strict=True):
    written = []
    while len(written) < 4 and EOS not in written:
      written.append(int(np.argmax(reading(table, prompt)(written))))
    assert tokens.tolist() == written
    ended += EOS in written
    assert best.tokens.tolist() == written + [EOS] * (EOS not in written)
  assert 0 < ended < len(prompts)


def likelihood(model, variables, source, tokens):
  """The sum of the model's own log p of all tokens, at once."""
  inputs = np.array([EOS, *tokens[:-1]], np.int32)
  rows = (np.asarray(row, np.int32)[None] for row in (source, inputs, tokens))
  source, inputs, targets = rows
  return -float(jnp.sum(jitted(model)(variables, source, inputs, targets_BT=targets)))


def test_a_score_is_the_models_own_likelihood(translating):
  for source, found in zip(SOURCES, all_found(*translating, length_penalty=0.7), strict=True):
    for tokens, score in found:
      log_p = in_full(*translating, [EOS], source)
      total = sum(log_p(tokens[:i])[token] for i, token in enumerate(tokens))
      assert score == pytest.approx(total / len(tokens) ** 0.7, abs=1e-5)


@pytest.mark.ci
@pytest.mark.parametrize("dtype, atol", [("float64", 1e-12), ("float32", 1e-5)])
def test_a_score_is_the_loss_of_what_was_found(translating, dtype, atol):
  with jax.enable_x64(dtype == "float64"):
    model = make_translating(dtype=jnp.dtype(dtype))
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), translating[1])
    for source, found in zip(SOURCES, all_found(model, variables), strict=True):
      total = likelihood(model, variables, source, found[0].tokens)
      assert found[0].score == pytest.approx(total / len(found[0].tokens), abs=atol)


@pytest.mark.ci
def test_scores_of_a_bfloat16_model_are_float32(translating):
  model, variables = make_translating(dtype=jnp.bfloat16), translating[1]
  for source, ((tokens, score), *_) in zip(SOURCES, all_found(model, variables), strict=True):
    total = likelihood(model, variables, source, tokens)
    # Its stream is rounded to 8 bits; its scores are not.
    assert score == pytest.approx(total / len(tokens), abs=0.03)
    assert score != float(jnp.bfloat16(score))


def test_others_of_the_batch_and_padding_change_nothing(translating):
  for source, most, found in zip(SOURCES, LIMITS, all_found(*translating), strict=True):
    (alone,) = beam_search(
      *translating, [[EOS]], sources=[source], size=3, max_length=most, eos_id=EOS,
      compiled_for=(9, 8),
    )  # fmt: skip
    assert_same(found, [(tuple(y.tolist()), score) for y, score in alone])


def test_beams_share_what_is_of_the_source(translating):
  """No array of the compiled search holds a source's keys for each beam."""
  model, variables = translating
  size, length = 3, 37
  room = (np.full((2, length), 5, np.int32), np.full(2, length, np.int32))
  lowered = beam._search.lower(
    model, variables, np.full((2, 1), EOS, np.int32), np.ones(2, np.int32), room,
    np.full(2, 4, np.int32), 1, EOS, PAD, 1.0, width=size, room=4, penalty="length",
  )  # fmt: skip
  layers, heads, head_dim = 2, SIZES["num_heads"], SIZES["width"] // SIZES["num_heads"]
  text = lowered.as_text()
  shared = f"tensor<{layers}x2x{heads}x{length}x{head_dim}xf32>"
  assert shared in text
  assert f"{size}x{shared.removeprefix('tensor<')}" not in text


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(prompts=[[]]), "at least one token"),
    (dict(prompts=[]), "at least one token"),
    (dict(sources=None), "a EncoderDecoder needs sources"),
    (dict(sources=[]), "give each of 1 prompts a source"),
    (dict(sources=[[]]), "give each of 1 prompts a source"),
    (dict(sources=[[12]]), "sources lie outside of the vocabulary, 0 .. 11"),
    (dict(prompts=[[12]]), "prompts lie outside of the vocabulary, 0 .. 11"),
    (dict(eos_id=12), "eos_id, pad_id or prompts lie outside"),
    (dict(pad_id=EOS), "must not be the pad_id=2"),
    (dict(size=0), "size=0 must be at least 1"),
    (dict(max_length=-1), "max_length=-1"),
    (dict(min_length=-1), "min_length=-1"),
    (dict(length_penalty=-1.0), "length_penalty=-1.0 must be at least 0"),
    (dict(penalty="gnm"), "penalty='gnm' one of length, gnmt"),
    (dict(compiled_for=(1, 9)), r"= \(2, 4\) do not fit compiled_for=\(1, 9\)"),
    (dict(compiled_for=(9, 3)), r"= \(2, 4\) do not fit compiled_for=\(9, 3\)"),
  ],
)
def test_what_cannot_be_searched_is_refused(translating, options, message):
  good = dict(prompts=[[EOS]], sources=[[5, EOS]], size=2, max_length=4, eos_id=EOS)
  with pytest.raises(ValueError, match=message):
    beam_search(*translating, **good | options)


def test_more_tokens_than_positions_are_refused(language):
  model = language[0].clone(positions="learned", max_length=6)
  with pytest.raises(ValueError, match="3 tokens of prompt and 4 new ones .* model's 6"):
    beam_search(model, {}, [[BOS], [BOS, 3, 4]], size=2, max_length=4, eos_id=EOS)


# ---------------------------------------------------------------------------------------------
# Translators
# ---------------------------------------------------------------------------------------------


def make_translator(**options):
  """A quick one; bytes as tokens."""
  (table,) = tables(1, 260)
  options = dict(model=Answering(260), variables=table, longest=24, rows=2) | options
  return Translator(tokenizer=ByteTokenizer(), size=2, max_ratio=0.5, max_extra=2, **options)


def test_texts_keep_their_order_and_do_not_change_each_other():
  """Two widths, two programs; batches that are not full."""
  translator = make_translator()
  texts = ["a long text of 22 bytes", "ab", "another long one", "", "c", "in the middle"]
  before = beam._search._cache_size()
  together = translator(texts)
  assert beam._search._cache_size() == before + 2
  for text, found in zip(texts, together, strict=True):
    (alone,) = translator([text])
    assert [x.text for x in alone] == [x.text for x in found]
    np.testing.assert_allclose([x.score for x in alone], [x.score for x in found], atol=1e-5)
    assert len(found) == 2 and found[0].score >= found[1].score
  assert beam._search._cache_size() == before + 2
  assert translator([]) == []


def test_a_translation_is_at_most_as_long_as_its_source_allows(monkeypatch):
  asked = []

  def search(model, variables, prompts, *, sources, max_length, compiled_for, **options):
    asked.append((list(map(len, sources)), list(max_length), compiled_for))
    return [[(np.array([EOS]), -1.0)] for _ in prompts]

  monkeypatch.setattr("magneto_jax.decoding.translator.beam_search", search)
  translator = Translator(None, {}, ByteTokenizer(), 24, max_ratio=0.5, max_extra=3, rows=2)
  translator([" " * length for length in (3, 22, 7)])
  # Longest first, the eos included; a row that fills up ends at once.
  assert asked == [([23, 1], [14, 0], (24, 15)), ([8, 4], [7, 5], (16, 11))]
  asked.clear()
  dataclasses.replace(translator, max_ratio=9.0)(["x" * 20, "y"])
  assert asked == [([21, 1], [23, 0], (24, 23)), ([2, 1], [21, 0], (16, 23))]


def test_a_source_that_is_too_long_is_refused_or_cut():
  translator = Translator(None, {}, ByteTokenizer(), longest=4)
  fits, long = translator.encode(["abc", "abcd"])
  assert translator.cut(fits) is fits
  assert translator.cut(long).tolist() == fits.tolist()
  with pytest.raises(ValueError, match="source 1 has 5 tokens, the eos included, more than 4"):
    translator.translate([fits, long])


@pytest.mark.ci
def test_a_mesh_finds_what_one_device_finds(tmp_path):
  """Rows on two devices, and the vocabulary on two: rows that do not fit are filled up."""
  program = """
    import dataclasses, jax, numpy as np
    from magneto_jax import sharding
    from tests import test_beam
    model = test_beam.make_translating(vocab_size=260)
    variables = test_beam.sharpened(model, *[np.zeros((1, 4), np.int32)] * 2)
    translator = test_beam.make_translator(model=model, variables=variables, rows=3)
    texts = ["a text of its own", "ab", "c d e"]
    expected = translator(texts)
    mesh = sharding.make_mesh({"data": 2, "tensor": 2})
    placed = sharding.parameter_shardings(translator.variables["params"], mesh)
    params = jax.device_put(translator.variables["params"], placed)
    other = dataclasses.replace(translator, variables={"params": params})
    with sharding.use_mesh(mesh):
      found = other(texts)
    assert [[x.text for x in row] for row in found] == [[x.text for x in r] for r in expected]
    score = lambda rows: np.array([x.score for row in rows for x in row])
    np.testing.assert_allclose(score(found), score(expected), rtol=0, atol=1e-5)
  """
  subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program)], check=True, env=simulated.devices(4)
  )
