"""Autoregressive generation: one compiled loop over a key/value cache."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax import sharding
from magneto_jax.models.language import CausalLM


def filter_logits(logits_BV: jax.Array, *, top_k: int = 0, top_p: jax.Array | float | None = None):
  """Sets to -inf the logits outside the `top_k` best and outside the nucleus of mass `top_p`.

  The nucleus is the smallest set of best tokens whose probabilities, after top-k, sum to at least
  top_p (The Curious Case of Neural Text Degeneration, arXiv 1904.09751); it is never empty. Tokens
  that tie with the last one kept are kept too.

  Args:
    logits_BV: unnormalised log-probabilities.
    top_k: how many to keep; 0 for all.
    top_p: a mass in (0, 1]; None for all.
  """
  if top_k:
    kth_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
    logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
  if top_p is not None:
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    p_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token is kept if the mass before it is short of top_p.
    kept_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < top_p
    least_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  return logits_BV


@functools.partial(jax.jit, static_argnames=("model", "steps", "greedy", "top_k", "nucleus"))
def _decode(
  model, variables, prompt_BT, lengths_B, key, temperature, top_p, eos_id, pad_id,
  *, steps, greedy, top_k, nucleus,
):  # fmt: skip
  """The loop behind `generate`: left-padded prompts in, [B, steps] tokens out."""
  batch, width = prompt_BT.shape
  padding_B = width - lengths_B
  mask_BT = jnp.arange(width)[None] >= padding_B[:, None]

  def choose(logits_BV, step):
    if greedy:
      return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = filter_logits(
      logits_BV / temperature, top_k=top_k, top_p=top_p if nucleus else None
    )
    return jax.random.categorical(jax.random.fold_in(key, step), logits_BV).astype(jnp.int32)

  def advance(carry):
    step, state, logits_BV, tokens_BS, done_B = carry
    token_B = jnp.where(done_B, pad_id, choose(logits_BV, step))
    tokens_BS = jax.lax.dynamic_update_slice(tokens_BS, token_B[:, None], (0, step))
    logits_B1V, state = model.apply(variables, token_B[:, None], state=state)
    return step + 1, state, logits_B1V[:, 0], tokens_BS, done_B | (token_B == eos_id)

  logits_BTV, state = model.apply(
    variables,
    prompt_BT,
    mask_BT=mask_BT,
    state=model.init_state(batch, width + steps),
  )
  empty_BS = jnp.full((batch, steps), pad_id, jnp.int32)
  carry = (jnp.int32(0), state, logits_BTV[:, -1], empty_BS, jnp.zeros((batch,), bool))
  carry = jax.lax.while_loop(lambda c: (c[0] < steps) & ~jnp.all(c[4]), advance, carry)
  return sharding.replicate(carry[3])


def generate(
  model: CausalLM,
  variables,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  key: jax.Array | None = None,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  eos_id: int = -1,
  pad_id: int = 0,
) -> list[np.ndarray]:
  """Continues token sequences.

  Prompts of different lengths run as one batch, padded on the left; the cache holds exactly the
  longest prompt and the new tokens. Compiled once for each batch size, prompt length and number
  of new tokens (and for greedy or not, top_k, nucleus or not).

  Args:
    model: a causal language model.
    variables: its variables.
    prompts: token ids, at least one each (begin with the tokenizer's bos_id).
    max_new_tokens: how many tokens to add at most.
    key: a typed key; needed unless the temperature is 0.
    temperature: divides the logits; 0 takes the best token each time.
    top_k: sample among the best k; 0 for all.
    top_p: sample in the nucleus of this mass; 1 for all.
    eos_id: the token that ends a sequence; -1 for none.
    pad_id: fills the batch; never seen by the model.

  Returns:
    The new tokens of each prompt, without the prompt; an eos_id, if reached, is the last.

  Example:
    >>> (new,) = generate(model, variables, [[1, 17]], max_new_tokens=8, temperature=0)
  """
  if not prompts or not all(len(prompt) for prompt in prompts):
    raise ValueError("every prompt needs at least one token: begin it with the bos_id")
  if max_new_tokens < 1:
    raise ValueError(f"{max_new_tokens=} must be at least 1")
  if not 0 <= temperature < float("inf") or top_k < 0 or not 0 < top_p <= 1:
    raise ValueError(f"{temperature=} and {top_k=} must be at least 0 and {top_p=} in (0, 1]")
  if temperature and key is None:
    raise ValueError("give a key to sample with, or temperature=0 for the best token each time")
  if not all(0 <= token < model.vocab_size for prompt in prompts for token in prompt):
    raise ValueError(f"prompts hold tokens outside of the vocabulary, 0 .. {model.vocab_size - 1}")
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  if (longest := model.longest) is not None and lengths.max() + max_new_tokens > longest:
    raise ValueError(
      f"{lengths.max()} tokens of prompt and {max_new_tokens=} are more than the model's {longest}"
    )
  width = int(lengths.max())
  padded = np.full((len(prompts), width), pad_id, np.int32)
  for row, prompt in zip(padded, prompts, strict=True):
    row[width - len(prompt) :] = prompt
  tokens = _decode(
    model,
    variables,
    padded,
    lengths,
    jax.random.key(0) if key is None else key,
    jnp.float32(temperature or 1.0),
    jnp.float32(top_p),
    jnp.int32(eos_id),
    jnp.int32(pad_id),
    steps=max_new_tokens,
    greedy=temperature == 0,
    top_k=top_k,
    nucleus=top_p < 1,
  )
  return [_until(row, eos_id) for row in np.asarray(tokens)]


def _until(row: np.ndarray, eos_id: int) -> np.ndarray:
  ends = np.flatnonzero(row == eos_id)
  return row[: ends[0] + 1] if len(ends) else row
