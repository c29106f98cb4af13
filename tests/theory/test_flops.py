"""FLOPs against the model's own parameters."""

import math

import jax
import jax.numpy as jnp
import pytest

from magneto_jax.config import from_config_dict
from magneto_jax.tasks import TASKS
from magneto_jax.theory import flops


@pytest.mark.parametrize("changes", [{}, {"activation": "swiglu", "kv_heads": 2, "head_dim": 10}])
def test_flops_are_six_a_weight_and_token_and_attention(changes):
  """6 for every weight of a matrix (forward 2, backward 4), and 12 L N H T for the scores."""
  sizes = {"layers": 3, "width": 32, "ffn_width": 48, "heads": 4, **changes}
  data = {"seq_length": 8}
  config = from_config_dict({"batch_size": 5, "model": sizes, "data": data})
  task = TASKS[config.task]
  model = task.build_model(config, {"vocab_size": 70})
  inputs = jnp.zeros((1, 8), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
  matrices = sum(
    math.prod(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if path[-1].key in ("kernel", "embedding")  # The table is tied: it is the output projection.
  )
  head_dim = sizes.get("head_dim", 8)
  got = flops.train_step_flops(
    layers=3,
    width=32,
    ffn_width=48,
    heads=4,
    kv_heads=sizes.get("kv_heads", 4),
    head_dim=head_dim,
    vocab_size=70,
    seq_length=8,
    batch_size=5,
    gated="activation" in changes,
  )
  assert got == 5 * 8 * (6 * matrices + 12 * 3 * 4 * head_dim * 8)
  tokenizer = type("Tokenizer", (), {"vocab_size": 70})
  assert task.flops(config, type("Data", (), {"tokenizer": tokenizer})) == got
