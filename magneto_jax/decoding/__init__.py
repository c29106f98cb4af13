"""Decoding: sampling, beam search, texts in answer to texts, and texts of sounds and images."""

from magneto_jax.decoding.answerer import Answerer
from magneto_jax.decoding.beam import PENALTIES, Hypothesis, beam_search
from magneto_jax.decoding.captioner import Captioner
from magneto_jax.decoding.ctc import Transcripts, ctc_beam_search, ctc_greedy
from magneto_jax.decoding.embedder import Embedder
from magneto_jax.decoding.sampling import filter_logits, generate
from magneto_jax.decoding.transcriber import Transcriber
from magneto_jax.decoding.transducer import transducer_beam_search, transducer_greedy
from magneto_jax.decoding.translator import Translation, Translator

__all__ = (
  "PENALTIES",
  "Answerer",
  "Embedder",
  "Captioner",
  "Hypothesis",
  "Transcriber",
  "Transcripts",
  "Translation",
  "Translator",
  "beam_search",
  "ctc_beam_search",
  "ctc_greedy",
  "filter_logits",
  "generate",
  "transducer_beam_search",
  "transducer_greedy",
)
