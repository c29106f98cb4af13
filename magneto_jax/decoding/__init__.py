"""Decoding: sampling, beam search, and texts in answer to texts."""

from magneto_jax.decoding.beam import PENALTIES, Hypothesis, beam_search
from magneto_jax.decoding.sampling import filter_logits, generate
from magneto_jax.decoding.translator import Translation, Translator

__all__ = (
  "PENALTIES",
  "Hypothesis",
  "Translation",
  "Translator",
  "beam_search",
  "filter_logits",
  "generate",
)
