"""Speech recognition: the text that is said, by a CTC, a transducer or a decoder.

An utterance costs -log p(text | sound) of its head, and the loss is nats a token. What the model
writes is judged by word and character error rates, over all utterances together.

Reference: Foundation Transformers, arXiv 2210.06423, section 4.6.
"""

from flax import linen as nn
from jax.sharding import Mesh

from magneto_jax.config import TrainConfig
from magneto_jax.data import scores
from magneto_jax.data.speech import SpeechData
from magneto_jax.tasks import speech
from magneto_jax.tasks.task import Task


def baselines(data: SpeechData) -> dict[str, dict[str, float]]:
  """Nats a token of the texts without their sounds: by how often each token is in training."""
  return {"loss_nats_per_token": {"unigram": speech.unigram_nats(data)}}


def judge(
  config: TrainConfig, model: nn.Module, variables, data: SpeechData, mesh: Mesh | None
) -> tuple[dict[str, float], int]:
  """Word and character error rates (%) of what the model hears, and of how many utterances."""
  found, references = speech.judged(config, model, variables, data, mesh)
  rates = {
    "word_error_rate": scores.word_error_rate(found, references),
    "character_error_rate": scores.character_error_rate(found, references),
  }
  return rates, len(found)


TASK = Task(
  load_data=speech.load_data,
  facts=speech.facts,
  describe=speech.describe,
  build_model=speech.build_model,
  dummy_inputs=speech.dummy_inputs,
  architecture=speech.architecture,
  inputs=speech.inputs,
  score=speech.score,
  weigh=speech.weigh,
  metrics=speech.metrics,
  baselines=baselines,
  flops=speech.flops,
  planned_facts=speech.planned_facts,
  batch_spec=speech.batch_spec,
  measure=speech.measure,
  sample=speech.sample,
  picture=speech.picture,
  counts=speech.counts,
  judge=judge,
  transcriber=speech.transcriber,
  unit="utterances",
  size=lambda config: 1,
  length=speech.length,
  row_bytes=speech.row_bytes,
  pretrained="encoder",
)
