"""Captions by beam search: against greedy and all captions there are, scores, rows, beginnings."""

import functools
import itertools

import jax
import numpy as np
import pytest

from magneto_jax.data.tokenizers import ByteTokenizer
from magneto_jax.decoding import Captioner, beam_search
from magneto_jax.models import BEiT3, CaptioningBEiT3, Encoder
from magneto_jax.theory import records
from tests import reference
from tests.models import common
from tests.models.common import SIZES, compiled

PAD, BOS, EOS, MASK = 0, 1, 2, 3
VOCAB, LONGEST = 5, 3
IMAGES = np.random.default_rng(0).standard_normal((3, 2, 4, 3)).astype(np.float32)


def captioning(vocab_size=VOCAB, mask_id=MASK, length=LONGEST + 2) -> CaptioningBEiT3:
  """Of the paper's form, with room for a bos, the longest caption and a mask."""
  encoder = Encoder(
    recipe=records.cut(common.recipe().encoder, 1),
    experts=("vision", "text"),
    positions="none",
    shared_attention=True,
    fusion_layers=1,
    **SIZES,
  )
  sizes = {"num_patches": 2, "patch_size": 2, "max_text_length": length}
  return CaptioningBEiT3(
    encoder=BEiT3(encoder=encoder, vocab_size=vocab_size, **sizes), mask_id=mask_id
  )


@functools.cache
def model_and_variables():
  model = captioning()
  params = reference.random_params(model, IMAGES, np.zeros((3, 1), np.int32))
  # Far from uniform, so that rounding decides nothing.
  params["output_embedding"]["embedding"] *= 4
  return model, {"params": params}


@functools.cache
def log_p(prefix: tuple[int, ...]):
  """log p of the token behind a beginning [images, V], all anew."""
  model, variables = model_and_variables()
  tokens = np.tile(np.array([*prefix, MASK], np.int32), (len(IMAGES), 1))
  logits = compiled(model.apply)(variables, IMAGES, tokens)[:, -1]
  return np.asarray(jax.nn.log_softmax(logits), np.float64)


def score(image: int, tokens, power=0.6) -> float:
  """The model's log-likelihood, place by place, over its penalty."""
  total = sum(log_p((BOS, *tokens[:i]))[image, token] for i, token in enumerate(tokens))
  return total / (1 + len(tokens)) ** power


def search(prompts=((BOS,),) * 3, images=IMAGES, **options):
  model, variables = model_and_variables()
  given = {"max_length": LONGEST, "eos_id": EOS, "pad_id": PAD, "min_length": 0}
  given |= {"length_penalty": 0.6, "penalty": "with_bos"}
  return beam_search(model, variables, prompts, sources=images, **given | options)


def test_one_beam_is_greedy():
  """The likeliest token at each place, by a call anew; its score is the model's."""
  for image, (found,) in enumerate(search(size=1)):
    tokens = []
    while not tokens or tokens[-1] != EOS:
      choices = log_p((BOS, *tokens))[image].copy()
      choices[PAD] = -np.inf
      tokens.append(int(np.argmax(choices)) if len(tokens) < LONGEST else EOS)
    assert found.tokens.tolist() == tokens
    assert found.score == pytest.approx(score(image, tokens), abs=1e-5)


@pytest.mark.slow
def test_enough_beams_find_the_best_of_all_captions_of_two_tokens():
  letters = [v for v in range(VOCAB) if v not in (PAD, EOS)]
  every = [(*body, EOS) for n in range(3) for body in itertools.product(letters, repeat=n)]
  found = search(size=len(every), max_length=2)
  for image, ranked in enumerate(found):
    scores = {caption: score(image, caption) for caption in every}
    assert {tuple(h.tokens.tolist()) for h in ranked} == set(every)
    for hypothesis in ranked:
      assert hypothesis.score == pytest.approx(scores[tuple(hypothesis.tokens.tolist())], abs=1e-5)
    assert [h.score for h in ranked] == sorted((h.score for h in ranked), reverse=True)


def test_beginnings_of_several_lengths_are_gone_on_from():
  """As each does alone; the score is of what is written behind it."""
  prompts = [[BOS], [BOS, 4], [BOS]]
  together = search(prompts, size=2, max_length=2)
  (alone,) = search(prompts[1:2], IMAGES[1:2], size=2, max_length=2)
  for one, other in zip(together[1], alone, strict=True):
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.score == pytest.approx(other.score, abs=1e-5)
  own = [log_p((BOS, 4, *alone[0].tokens[:i]))[1, t] for i, t in enumerate(alone[0].tokens)]
  assert alone[0].score == pytest.approx(sum(own) / (1 + len(own)) ** 0.6, abs=1e-5)


def test_a_captioner_writes_texts_whatever_the_rows():
  """Images in any number, with and without a beginning; rows that fill up are not among them."""
  model = captioning(ByteTokenizer.vocab_size + 1, ByteTokenizer.vocab_size, length=8)
  params = reference.random_params(model, IMAGES, np.zeros((3, 1), np.int32))
  caption = Captioner(model, {"params": params}, ByteTokenizer(), most=LONGEST, size=2, rows=2)
  found = caption(list(IMAGES))
  assert len(found) == 3 and all(len(ranked) == 2 for ranked in found)
  assert caption([]) == []
  (last,) = caption([IMAGES[2]])
  assert [t.text for t in last] == [t.text for t in found[2]]
  for ranked in (last, found[2]):
    assert [t.score for t in ranked] == sorted((t.score for t in ranked), reverse=True)
  ((best, _),) = caption([IMAGES[0]], prefix="ab")
  assert best.text.startswith("ab")
  ((other, _),) = caption([IMAGES[0]], prefix=" ab\n")
  assert other == best


def test_a_mask_is_no_text():
  model = captioning(ByteTokenizer.vocab_size + 1, ByteTokenizer.vocab_size)
  read = Captioner(model, None, ByteTokenizer(), most=2)._read
  tokens = ByteTokenizer().encode("xy")
  written = np.array([tokens[0], ByteTokenizer.vocab_size, tokens[1], EOS])
  assert read([BOS], written, -1.0) == ("xy", -1.0)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"images": IMAGES[:2]}, "give each of 3 prompts a source"),
    ({"images": [IMAGES[0], IMAGES[1], IMAGES[2][:1]]}, "images must be of one size"),
    ({"images": None}, "a CaptioningBEiT3 needs sources"),
    ({"max_length": LONGEST + 1}, "1 tokens of prompt and 4 new ones are more than the model's 4"),
    ({"prompts": [[BOS], [BOS], [VOCAB]]}, "lie outside of the vocabulary"),
  ],
)
def test_wrong_arguments_raise(options, message):
  with pytest.raises(ValueError, match=message):
    search(size=2, **options)
