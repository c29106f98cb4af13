"""FLOPs against the products of the very step, as they stand in its program."""

import math

import jax
import pytest

from magneto_jax.config import from_config_dict, tasks_reading
from magneto_jax.tasks import TASKS


def product_flops(program) -> int:
  """Of all matrix products and convolutions of a traced program, a loop's as often as it turns."""
  total = 0
  for equation in program.eqns:
    params = equation.params
    if equation.primitive.name in ("dot_general", "conv_general_dilated"):
      (left, right), (result,) = (
        [v.aval.shape for v in vs] for vs in (equation.invars, equation.outvars)
      )
      if equation.primitive.name == "dot_general":
        summed = [left[axis] for axis in params["dimension_numbers"][0][0]]
      else:
        outputs, *summed = (right[axis] for axis in params["dimension_numbers"].rhs_spec)
      total += 2 * math.prod(result) * math.prod(summed)
    for value in params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          total += params.get("length", 1) * product_flops(inner)
  return total


SIZES = {"layers": 3, "width": 32, "ffn_width": 48, "heads": 4}
PAIRS = {"positions": "learned", "image_size": 12, "patch_size": 4, "image_vocab_size": 24}

IMAGES = {"image_size": 12, "patch_size": 4}


@pytest.mark.parametrize(
  "task, fields",
  [
    ("causal_lm", {}),
    ("causal_lm", {"activation": "swiglu", "kv_heads": 2, "head_dim": 10}),
    ("masked_lm", {}),
    ("masked_lm", {"kv_heads": 2, "head_dim": 10}),
    ("translation", {"encoder_layers": 2}),
    ("translation", {"activation": "swiglu", "kv_heads": 2, "head_dim": 10}),
    ("beit3", PAIRS),
    ("image_classification", IMAGES),
    ("image_classification", IMAGES | {"pooling": "mean", "kv_heads": 2, "head_dim": 10}),
  ],
)
def test_flops_are_those_of_the_steps_products(task, fields):
  """To the last one: loss and gradient as they are traced, attention by full scores."""
  model = SIZES | {"attention_implementation": "xla"} | fields
  data = {"seq_length": 8, "vocab_size": 70}
  if task in tasks_reading("data.image_key"):
    data = {"name": "embedded/mnist5k"}
  config = from_config_dict({"task": task, "batch_size": 5, "model": model, "data": data})
  task = TASKS[task]
  facts = task.planned_facts(config)
  module = task.build_model(config, facts)
  params = jax.eval_shape(module.init, jax.random.key(0), *task.dummy_inputs(config))["params"]
  step = jax.value_and_grad(lambda params, batch: task.loss(module, {"params": params}, batch)[0])
  traced = jax.make_jaxpr(step)(params, task.batch_spec(config))
  assert task.flops(config, facts) == product_flops(traced.jaxpr)
