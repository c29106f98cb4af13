"""What a translating model writes, and how it is scored."""

import types

from magneto_jax.config import from_config_dict
from magneto_jax.data import scores
from magneto_jax.data.tokenizers import ByteTokenizer
from magneto_jax.decoding import Translation, Translator
from magneto_jax.tasks import TASKS, translations

CONFIG = from_config_dict(
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
    },
  }
)


def test_the_config_reaches_the_translator():
  found = TASKS["translation"].translator(CONFIG, "model", "variables", "tokenizer")
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


def test_the_judge_scores_the_best_of_each_source(monkeypatch):
  """Against the raw references; a source that is too long is cut, and counts."""

  def translate(self, sources):
    texts = [self.tokenizer.decode(source).upper() for source in sources]
    return [[Translation(text, -1.0), Translation("worse", -2.0)] for text in texts]

  monkeypatch.setattr(Translator, "translate", translate)
  pairs = [("a b c d e", "A B C D E"), ("f g h i j k l", "F G H I J K L")]
  data = types.SimpleNamespace(validation_pairs=pairs, tokenizer=ByteTokenizer())
  found = translations.judge(CONFIG, None, {}, data, None)
  assert found == scores.corpus_scores(["A B C D E", "F G H I J K"], [right for _, right in pairs])
  assert found["bleu"] < 100
