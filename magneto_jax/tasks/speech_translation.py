"""Speech translation: a text in another language than the sound's, by an encoder-decoder.

The model is that of `speech_recognition` with a decoder; it may start with the encoder of one
(`init_from`). What it writes is judged by BLEU and chrF.

Reference: fairseq S2T, arXiv 2010.05171; DeepScaleLM, arXiv 2403.09635, section 5.
"""

from flax import linen as nn
from jax.sharding import Mesh

from magneto_jax.config import TrainConfig
from magneto_jax.data import scores
from magneto_jax.data.speech import SpeechData
from magneto_jax.tasks import speech, speech_recognition
from magneto_jax.tasks.task import Task


def judge(
  config: TrainConfig, model: nn.Module, variables, data: SpeechData, mesh: Mesh | None
) -> tuple[dict[str, float], int]:
  """BLEU and chrF of translations of the validation set, and of how many utterances they are.

  Texts that are learned in small letters are judged so; see `signatures`.
  """
  found, references = speech.judged(config, model, variables, data, mesh)
  return scores.corpus_scores(found, references, lowercase=_is_lower(config)), len(found)


def signatures(config: TrainConfig) -> dict[str, str]:
  """How these are computed."""
  return scores.signatures(lowercase=_is_lower(config))


def _is_lower(config: TrainConfig) -> bool:
  return config.data.text_case == "lower"


TASK: Task = speech_recognition.TASK._replace(judge=judge, signatures=signatures)
