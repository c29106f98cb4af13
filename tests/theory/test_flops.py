"""FLOPs against the products of the very step, as they stand in its program."""

import math

import jax
import jax.numpy as jnp
import pytest

from magneto_jax import kernels
from magneto_jax.config import from_config_dict
from magneto_jax.models import (
  CausalLM,
  Encoder,
  LSTMPredictor,
  SpeechEncoder,
  SpeechToText,
  StatelessPredictor,
  Transducer,
)
from magneto_jax.tasks import TASKS
from magneto_jax.theory import flops
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import Architecture


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
PAIRED = IMAGES | {"positions": "learned"}


@pytest.mark.parametrize(
  "task, fields",
  [
    ("causal_lm", {}),
    ("causal_lm", {"activation": "swiglu", "kv_heads": 2, "head_dim": 10}),
    ("masked_lm", {}),
    ("masked_lm", {"kv_heads": 2, "head_dim": 10}),
    ("translation", {"encoder_layers": 2}),
    ("translation", {"activation": "swiglu", "kv_heads": 2, "head_dim": 10}),
    ("masked_data", PAIRS),
    ("masked_data", PAIRS | {"shared_attention": True, "fusion_layers": 1}),
    *((task, PAIRED) for task in ("image_text_retrieval", "image_captioning")),
    *((task, PAIRED) for task in ("visual_question_answering", "visual_reasoning")),
    ("image_classification", IMAGES),
    ("image_classification", IMAGES | {"pooling": "mean", "kv_heads": 2, "head_dim": 10}),
  ],
)
def test_flops_are_those_of_the_steps_products(task, fields):
  """To the last one: loss and gradient as they are traced, attention by full scores."""
  model = SIZES | {"attention_implementation": "xla"} | fields
  data = {"seq_length": 8, "vocab_size": 70}
  if task == "image_classification":
    data = {"name": "embedded/mnist5k"}
  config = from_config_dict({"task": task, "batch_size": 5, "model": model, "data": data})
  task = TASKS[task]
  facts = task.planned_facts(config)
  module = task.build_model(config, facts)
  variables = jax.eval_shape(module.init, jax.random.key(0), *task.dummy_inputs(config))

  def step(variables, batch):
    batch = task.weigh(module, batch)
    loss = lambda params: task.loss(module, {**variables, "params": params}, batch)[0]
    return jax.value_and_grad(loss)(variables["params"])

  with kernels.use_implementation("xla"):  # Of a model within the model, too.
    traced = jax.make_jaxpr(step)(variables, task.spec(config, facts))
  assert task.flops(config, facts) == product_flops(traced.jaxpr)


@pytest.mark.parametrize(
  ("head", "front_end"), [("transducer", "conv"), ("stateless", "vgg"), ("decoder", "conv2d")]
)
def test_flops_of_speech_are_those_of_the_steps_products(head, front_end):
  """But for zeros that strides put into gradients, and the logits that are computed again.

  By the gradient of its input a convolution of stride 2 is counted as if it had none.
  """
  rate, samples, labels, vocab, batch, bins, joint, width = 8000, 1640, 3, 7, 2, 20, 24, 32
  kind = "encoder_decoder" if head == "decoder" else "encoder"
  depths = {f"{stack}_layers": 2 for stack in kind.split("_")}
  recipe = RECIPES["magneto"](Architecture(kind, **depths, width=width, ffn_width=48, heads=4))
  sizes = {"width": width, "ffn_width": 48, "num_heads": 4, "attention_implementation": "xla"}
  encoder = SpeechEncoder(
    encoder=Encoder(recipe=recipe.encoder, **sizes),
    sample_rate=rate,
    mel_bins=bins,
    subsampling=front_end,
  )
  options = {}
  if head == "decoder":
    decoder = CausalLM(recipe=recipe.decoder, vocab_size=vocab, **sizes)
    model = SpeechToText(encoder=encoder, decoder=decoder)
  else:
    predictor = StatelessPredictor(vocab_size=vocab, width=12)
    if head == "transducer":
      predictor = LSTMPredictor(vocab_size=vocab, width=12, layers=2)
      options["predictor_layers"] = 2
    options |= {"joint_width": joint, "predictor_width": 12}
    model = Transducer(encoder=encoder, predictor=predictor, joint_width=joint, chunk=99)
  counted = flops.speech_step_flops(
    head="decoder" if head == "decoder" else "transducer",
    vocab_size=vocab,
    samples=samples,
    seq_length=labels,
    batch_size=batch,
    encoder_layers=2,
    layers=2,
    sample_rate=rate,
    mel_bins=bins,
    front_end=front_end,
    width=width,
    ffn_width=48,
    heads=4,
    kv_heads=4,
    head_dim=8,
    **options,
  )
  inputs = (
    jax.ShapeDtypeStruct((batch, samples), jnp.int16),
    jax.ShapeDtypeStruct((batch,), jnp.int32),
    jax.ShapeDtypeStruct((batch, labels), jnp.int32),
    jax.ShapeDtypeStruct((batch,), jnp.int32),
  )
  params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
  cost = lambda params, *inputs: jnp.sum(model.apply({"params": params}, *inputs))
  traced = jax.make_jaxpr(jax.grad(cost))(params, *inputs)
  frames, length = 19, encoder.lengths(samples)
  zeros = {
    "conv": (10 - length) * 5 * 512 * 2 * width,
    "vgg": 0,
    "conv2d": (9 * 9 - length * 4) * 9 * width**2,
  }
  assert frames == 1 + (samples - 200) // 80
  again = 0 if head == "decoder" else length * (labels + 1) * joint * vocab
  assert product_flops(traced.jaxpr) == counted + 2 * batch * (zeros[front_end] + again)
