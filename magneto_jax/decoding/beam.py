"""Beam search: one compiled loop, in which beams share what is the same for all of them.

The model is mapped over the beams of a sentence: each has keys and values of its own tokens, and
all read one copy of the source's. Arrays are named with W, the width of the beam, and C = 2 W, the
candidates of a step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax import sharding
from magneto_jax.models.encoder_decoder import EncoderDecoder
from magneto_jax.models.language import CausalLM, DecodingState
from magneto_jax.models.speech import SpeechToText
from magneto_jax.models.vision_language import CaptioningBEiT3

# What the sum of log-probabilities is divided by, of the number of tokens, the eos among them, and
# a power. `gnmt`: arXiv 1609.08144, equation 14, without its coverage; fairseq's and T5's figures
# of the same power are not comparable, as fairseq's are of `length`. `with_bos` is BEiT-3's, whose
# captions have their bos counted too.
PENALTIES: dict[str, Callable] = {
  "length": lambda length, power: length**power,
  "gnmt": lambda length, power: ((5 + length) / 6) ** power,
  "with_bos": lambda length, power: (1 + length) ** power,
}


class Hypothesis(NamedTuple):
  """A finished sequence.

  Attributes:
    tokens: the new ones, of which the last is the eos.
    score: the sum of their log-probabilities over its penalty.
  """

  tokens: np.ndarray
  score: float


class _Beams(NamedTuple):
  """The search of a sentence, or of a batch of them.

  Attributes:
    tokens_WT: the new tokens of the sequences that go on; scores_W: sums of their
      log-probabilities, -inf where there are fewer; parents_W: the beams of the step before that
      they go on from.
    finished_WT: the finished sequences, in the order in which they were; finished_scores_W: what
      they are ranked by, -inf where there is none yet; count: how many there are.
  """

  tokens_WT: jax.Array
  scores_W: jax.Array
  parents_W: jax.Array
  finished_WT: jax.Array
  finished_scores_W: jax.Array
  count: jax.Array

  @classmethod
  def empty(cls, batch: int, width: int, length: int, dtype) -> "_Beams":
    """Of a batch, before the first step: one beam, as all of them would find the same."""
    tokens = jnp.zeros((batch, width, length), jnp.int32)
    none = jnp.full((batch, width), -jnp.inf, dtype)
    parents = jnp.zeros((batch, width), jnp.int32)
    count = jnp.zeros((batch,), jnp.int32)
    return cls(tokens, none.at[:, 0].set(0.0), parents, tokens, none, count)


def _select(
  beams: _Beams, logits_WV, step, longest, min_length, eos_id, pad_id, power, *, penalty
) -> _Beams:
  """A step of one sentence: what finishes, and what goes on."""
  width, vocab_size = logits_WV.shape
  log_p_WV = jax.nn.log_softmax(logits_WV)
  log_p_WV = jnp.where(jnp.isnan(log_p_WV), -jnp.inf, log_p_WV)
  ids_V = jnp.arange(vocab_size)
  is_open_V = jnp.where(step < longest, (ids_V != eos_id) | (step >= min_length), ids_V == eos_id)
  total_WV = beams.scores_W[:, None] + log_p_WV
  total_WV = jnp.where((is_open_V & (ids_V != pad_id))[None], total_WV, -jnp.inf)
  # No beam has two candidates that end, so that at least W of 2 W do not.
  total_C, index_C = jax.lax.top_k(total_WV.reshape(-1), 2 * width)
  parents_C, ids_C = index_C // vocab_size, index_C % vocab_size
  tokens_CT = beams.tokens_WT[parents_C].at[:, step].set(ids_C)
  ends_C = ids_C == eos_id

  finishes_C = ends_C & (jnp.arange(2 * width) < width) & (total_C > -jnp.inf)
  # Of those behind the last slot nothing is kept.
  slots_C = jnp.where(finishes_C, beams.count + jnp.cumsum(finishes_C) - 1, width)
  scores_C = total_C / PENALTIES[penalty](jnp.asarray(step + 1, total_C.dtype), power)
  goes_on_W = jnp.argsort(ends_C, stable=True)[:width]
  return _Beams(
    tokens_CT[goes_on_W],
    total_C[goes_on_W],
    parents_C[goes_on_W],
    beams.finished_WT.at[slots_C].set(tokens_CT, mode="drop"),
    beams.finished_scores_W.at[slots_C].set(scores_C, mode="drop"),
    jnp.minimum(beams.count + jnp.sum(finishes_C, dtype=jnp.int32), width),
  )


def _of_beams(state: DecodingState, f: Callable) -> DecodingState:
  """The state with f of what each beam has for itself: keys and values of its tokens."""

  def changed(block):
    own = block.self_attention
    own = own._replace(k_LBKSH=f(own.k_LBKSH), v_LBKSH=f(own.v_LBKSH))
    return block._replace(self_attention=own)

  return state._replace(caches=tuple(tuple(map(changed, blocks)) for blocks in state.caches))


def _taken(cache_WLBKSH: jax.Array, parents_BW: jax.Array) -> jax.Array:
  """Each sentence's beams, put where their successors stand."""
  return jax.vmap(lambda cache, parents: cache[parents], (2, 0), 2)(cache_WLBKSH, parents_BW)


@functools.partial(jax.jit, static_argnames=("model", "width", "room", "penalty"))
def _search(
  model, variables, prompt_BT, lengths_B, sources, longest_B, min_length, eos_id, pad_id, power,
  *, width, room, penalty,
):  # fmt: skip
  """The loop behind `beam_search`: [B, W, room + 1] tokens and [B, W] scores."""
  batch, prompt_length = prompt_BT.shape
  prompt_BT = sharding.constrain(prompt_BT, "batch", None)
  mask_BT = jnp.arange(prompt_length)[None] >= prompt_length - lengths_B[:, None]
  memory = {}
  if sources is None:
    score = functools.partial(model.apply, variables)
    state = model.init_state(batch, prompt_length + room)
  elif isinstance(model, CaptioningBEiT3):
    (images_BHWC,) = sources
    images_BHWC = sharding.constrain(images_BHWC, "batch", None, None, None)
    state = model.apply(variables, images_BHWC, prompt_length + room, method="see")
    score = functools.partial(model.apply, variables, method="decode")
  else:
    source_BS, source_lengths_B = sources
    source_BS = sharding.constrain(source_BS, "batch", None)
    memory_BSD, mask_BS = model.apply(variables, source_BS, source_lengths_B, method="memory")
    score = functools.partial(model.apply, variables, method="decode")
    memory = {"memory_BSD": memory_BSD, "memory_mask_BS": mask_BS}
    state = model.init_state(batch, prompt_length + room, memory_BSD.shape[1])

  def select(beams, logits_BWV, step):
    one = functools.partial(_select, penalty=penalty)
    over = (0, 0, None, 0, None, None, None, None)
    return jax.vmap(one, over)(
      beams, logits_BWV, step, longest_B, min_length, eos_id, pad_id, power
    )

  def one_beam(token_B, state):
    logits_B1V, state = score(token_B[:, None], state=state)
    return logits_B1V[:, 0], state

  def advance(carry):
    step, beams, state = carry
    state = _of_beams(state, lambda cache: _taken(cache, beams.parents_W))
    axes = _of_beams(jax.tree.map(lambda _: None, state), lambda _: 0)
    tokens_BW = beams.tokens_WT[:, :, step - 1]
    logits_BWV, state = jax.vmap(one_beam, (1, axes), (1, axes))(tokens_BW, state)
    return step + 1, select(beams, logits_BWV, step), state

  def goes_on(carry):
    step, beams, _ = carry
    return jnp.any((beams.count < width) & (step <= longest_B))

  logits_BTV, state = score(prompt_BT, mask_BT=mask_BT, state=state, **memory)
  logits_B1V = logits_BTV[:, -1:]
  beams = _Beams.empty(batch, width, room + 1, logits_BTV.dtype)
  logits_BWV = jnp.broadcast_to(logits_B1V, (batch, width, logits_B1V.shape[2]))
  beams = select(beams, logits_BWV, jnp.int32(0))
  state = _of_beams(state, lambda cache: jnp.broadcast_to(cache, (width, *cache.shape)))
  _, beams, _ = jax.lax.while_loop(goes_on, advance, (jnp.int32(1), beams, state))
  return sharding.replicate((beams.finished_WT, beams.finished_scores_W))


def beam_search(
  model: CausalLM | EncoderDecoder | SpeechToText | CaptioningBEiT3,
  variables,
  prompts: Sequence[Sequence[int]],
  *,
  sources: Sequence[Sequence[int]] | Sequence[np.ndarray] | None = None,
  size: int,
  max_length: int | Sequence[int],
  eos_id: int,
  pad_id: int = 0,
  min_length: int = 1,
  length_penalty: float = 1.0,
  penalty: str = "length",
  compiled_for: tuple[int, int] | None = None,
) -> list[list[Hypothesis]]:
  """The sequences that a beam search finds the most probable.

    score(y) = sum_t log p(y_t | y_<t, prompt, source) / |y|^length_penalty,  y ending in the eos

  Each step takes the 2 k best of the k V ways to extend the k beams by a token. Those of the first
  k that end are finished, and stay so whatever is found later; the k best that do not end go on. A
  sentence is done once k sequences are finished, or after `max_length` tokens, behind which each
  beam is ended. Equal scores go to the earlier beam, then to the smaller id. Scores are float32 or
  wider, whatever the model computes in; those that are not finite count as -inf.

  Args:
    model: a causal language model, an encoder-decoder of texts or of sounds, or what captions
      images.
    variables: its variables.
    prompts: what the decoder begins with, at least one token each.
    sources: what is answered, one for each prompt: tokens; a sound's samples, an array of int16 or
      of floats in [-1, 1], of one type for all; or an image [H, W, C], of one size for all. None
      for a language model.
    size: k, the number of beams.
    max_length: the most new tokens before the eos, of all or of each; it comes before min_length.
    eos_id: the token that ends a sequence.
    pad_id: fills the batch, and is never written.
    min_length: the fewest new tokens before the eos.
    length_penalty: the power of the penalty; 0 for sums of log-probabilities.
    penalty: `length`, |y|^p, `gnmt`, ((5 + |y|) / 6)^p, or `with_bos`, (1 + |y|)^p: one of
      PENALTIES.
    compiled_for: (length of a source, new tokens) to pad to, so that batches of several lengths run
      as one program; by default those of the longest. An image's length is that of its side.

  Returns:
    The finished sequences of each prompt, at most k, the best first.

  Raises:
    ValueError: if arguments contradict each other or the model.
    FloatingPointError: if a prompt has no sequence of finite score.

  Reference: Google's Neural Machine Translation System, arXiv 1609.08144, section 7. The rule of
  what finishes, and of when the search ends, is fairseq's.

  Example:
    >>> ((best, *others),) = beam_search(
    ...   model, variables, [[2]], sources=[[17, 5, 2]], size=4, max_length=20, eos_id=2
    ... )
  """
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  source_lengths = np.array(
    [len(source) for source in (() if sources is None else sources)], np.int32
  )
  if not prompts or not lengths.all():
    raise ValueError("every prompt needs at least one token")
  if sources is not None and (len(sources) != len(prompts) or not source_lengths.all()):
    raise ValueError(f"give each of {len(prompts)} prompts a source of at least one token")
  longest = np.broadcast_to(np.asarray(max_length, np.int32), lengths.shape)
  needed = int(source_lengths.max(initial=0)), int(longest.max())
  source_room, room = needed if compiled_for is None else compiled_for
  if needed[0] > source_room or needed[1] > room:
    raise ValueError(f"(tokens of a source, new tokens) = {needed} do not fit {compiled_for=}")
  if size < 1 or longest.min() < 0 or min_length < 0:
    raise ValueError(f"{size=} must be at least 1, and {max_length=} and {min_length=} 0 or more")
  if not 0 <= length_penalty < float("inf") or penalty not in PENALTIES:
    raise ValueError(
      f"{length_penalty=} must be at least 0, and {penalty=} one of {', '.join(PENALTIES)}"
    )
  is_spoken = isinstance(model, SpeechToText)
  if (sources is None) == hasattr(model, "encoder"):
    needs = "needs" if sources is None else "has no encoder for"
    raise ValueError(f"a {type(model).__name__} {needs} sources")
  is_seen = isinstance(model, CaptioningBEiT3)
  kind = np.dtype(np.int32)
  if is_spoken:
    kind, *others = {np.asarray(source).dtype for source in sources}
    if others or (kind != np.int16 and not np.issubdtype(kind, np.floating)):
      raise ValueError("sounds must be arrays of one type, int16 or floats in [-1, 1]")
  if is_seen and len(sizes := {np.shape(source) for source in sources}) > 1:
    raise ValueError(f"images must be of one size, not of {sorted(sizes)}")
  decoder = model if sources is None or is_seen else model.decoder
  _check_ids(decoder, [[eos_id], [pad_id], *prompts], "eos_id, pad_id or prompts")
  if eos_id == pad_id:
    raise ValueError(f"{eos_id=} must not be the {pad_id=}, which is never written")
  if isinstance(model, EncoderDecoder):
    _check_ids(model.encoder, sources, "sources")
  if (most := decoder.longest) is not None and lengths.max() + room > most:
    raise ValueError(
      f"{lengths.max()} tokens of prompt and {room} new ones are more than the model's {most}"
    )
  prompt_BT = np.full((len(prompts), lengths.max()), pad_id, np.int32)
  for row, prompt in zip(prompt_BT, prompts, strict=True):
    row[len(row) - len(prompt) :] = prompt
  if is_seen:
    read = (np.stack(sources),)
  elif sources is not None:
    source_BS = np.full((len(prompts), source_room), 0 if is_spoken else pad_id, kind)
    for row, source in zip(source_BS, sources, strict=True):
      row[: len(source)] = source
    read = (source_BS, source_lengths)
  tokens, scores = _search(
    model,
    variables,
    prompt_BT,
    lengths,
    None if sources is None else read,
    longest,
    jnp.int32(min_length),
    jnp.int32(eos_id),
    jnp.int32(pad_id),
    float(length_penalty),
    width=size,
    room=room,
    penalty=penalty,
  )
  rows = zip(np.asarray(tokens), np.asarray(scores), strict=True)
  found = [_ranked(*row, eos_id) for row in rows]
  if [] in found:
    raise FloatingPointError(
      f"no sequence for prompt {found.index([])} has a finite score: the model's are not numbers"
    )
  return found


def _check_ids(stack, rows, name: str) -> None:
  if not all(0 <= token < stack.vocab_size for row in rows for token in row):
    raise ValueError(f"{name} lie outside of the vocabulary, 0 .. {stack.vocab_size - 1}")


def _ranked(tokens_WT: np.ndarray, scores_W: np.ndarray, eos_id: int) -> list[Hypothesis]:
  """The finished sequences, the best first."""
  order = [i for i in np.argsort(-scores_W, kind="stable") if np.isfinite(scores_W[i])]
  ends = np.argmax(tokens_WT == eos_id, axis=1)
  return [Hypothesis(tokens_WT[i, : ends[i] + 1], float(scores_W[i])) for i in order]
