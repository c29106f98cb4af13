"""The shipped configs against the papers they name."""

import pytest

from configs import gpt
from magneto_jax.config import ConfigError, flatten, from_config_dict

# Foundation Transformers (arXiv 2210.06423), section 4.1 and table 9.
TABLE_9 = {
  "recipe": "magneto",
  "batch_size": 256,
  "data.seq_length": 2048,
  "model.width": 1024,
  "model.ffn_width": 3072,
  "model.heads": 16,
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.98,
  "optimizer.clip_norm": 0.0,
  "optimizer.weight_decay": 0.01,
  "optimizer.schedule": "polynomial",
  "optimizer.power": 1.0,
  "optimizer.warmup_steps": 750,
  "optimizer.decay_steps": 0,
  "optimizer.end_factor": 0.0,
}


@pytest.mark.parametrize(
  "layers, learning_rate, steps, dropout",
  [(24, 1e-3, 500_000, 0.0), (48, 1.2e-3, 250_000, 0.1), (72, 1.2e-3, 250_000, 0.1)],
)
def test_magneto_is_as_in_table_9(layers, learning_rate, steps, dropout):
  expected = TABLE_9 | {
    "model.layers": layers,
    "model.dropout": dropout,
    "optimizer.learning_rate": learning_rate,
    "steps": steps,
  }
  config = flatten(from_config_dict(gpt.get_config(f"magneto_{layers}")))
  assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize("variant", list(gpt.VARIANTS))
def test_every_variant_is_a_config(variant):
  from_config_dict(gpt.get_config(variant))


def test_no_other_variant():
  with pytest.raises(ConfigError, match="has no 'huge', only tiny, magneto_24"):
    gpt.get_config("huge")
