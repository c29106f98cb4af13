"""Steps of small models on a mesh of simulated devices, in one process of perhaps several.

`python -m tests.sharded_steps '{"cases": [...], ...}'` takes some train steps for each case and
leaves the parameters and losses in an .npz a case; `tests/test_sharding.py` compares them.
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from magneto_jax import config as config_lib
from magneto_jax import distributed, hlo, memory, program, sharding
from magneto_jax.config import from_config_dict
from magneto_jax.models import Encoder, MaskedLM, VisionEncoder
from magneto_jax.tasks import TASKS
from magneto_jax.theory import recipes, records

STEPS = 5
VOCAB, LENGTH, BATCH = 64, 16, 16

SIZES = {"layers": 2, "width": 32, "heads": 4, "ffn_width": 64}
DROPOUT = {
  "dropout": 0.1,
  "attention_dropout": 0.1,
  "activation_dropout": 0.1,
  "drop_path": 0.1,
}


def config(**changes):
  model = {**SIZES, **DROPOUT, **changes.pop("model", {})}
  data = {"seq_length": LENGTH, "vocab_size": VOCAB, **changes.pop("data", {})}
  optimizer = {"clip_norm": 0.1, "learning_rate": 1e-2}
  return from_config_dict(
    {"batch_size": BATCH, "model": model, "data": data, "optimizer": optimizer, **changes}
  )


# ---------------------------------------------------------------------------------------------
# A family: what `program.train_step` needs, and a batch
# ---------------------------------------------------------------------------------------------


def causal_lm(rng, config):
  """Packed documents, with relative biases and grouped heads."""
  task = TASKS["causal_lm"]
  shape = BATCH, LENGTH
  segments = np.sort(rng.integers(1, 4, shape), axis=1)
  batch = {
    "inputs": rng.integers(0, VOCAB, shape),
    "targets": rng.integers(0, VOCAB, shape),
    "positions": np.broadcast_to(np.arange(LENGTH), shape),
    "segment_ids": segments,
    "weights": rng.integers(0, 2, shape).astype(np.float32),
  }
  return task, task.build_model(config, {"vocab_size": VOCAB}), batch


def _encoder(recipe: str, **options):
  architecture = records.Architecture(
    "encoder",
    encoder_layers=SIZES["layers"],
    width=SIZES["width"],
    ffn_width=SIZES["ffn_width"],
    heads=SIZES["heads"],
  )
  return Encoder(
    recipe=recipes.RECIPES[recipe](architecture).encoder,
    width=SIZES["width"],
    num_heads=SIZES["heads"],
    ffn_width=SIZES["ffn_width"],
    dropout_rate=0.1,
    attention_dropout_rate=0.1,
    **options,
  )


def masked_lm(rng, config):
  """NormFormer's head scales, padding behind, an untied dense head at some places."""
  encoder = _encoder(
    "normformer", vocab_size=VOCAB, positions="learned", max_length=LENGTH, relative_buckets=8
  )
  shape, places = (BATCH, LENGTH), (BATCH, 8)
  batch = {
    "inputs": rng.integers(0, VOCAB, shape),
    "positions": np.broadcast_to(np.arange(LENGTH), shape),
    "segment_ids": (np.arange(LENGTH) < rng.integers(1, LENGTH, (BATCH, 1))).astype(np.int32),
    "places": rng.integers(0, LENGTH, places),
    "targets": rng.integers(0, VOCAB, places),
    "weights": rng.integers(0, 2, places).astype(np.float32),
  }
  return TASKS["masked_lm"], MaskedLM(encoder=encoder, tied=False), batch


def vision(rng, config):
  """Images of 4 x 4 patches and a class token: 17 positions, which nothing divides."""
  model = VisionEncoder(
    encoder=_encoder("magneto", positions="learned", max_length=17), patch_size=4, mask_token=True
  )

  def score(out_BTD, batch):
    return jnp.sum(jnp.square(out_BTD - batch["targets"])), jnp.sum(batch["weights"])

  task = TASKS["causal_lm"]._replace(
    inputs=lambda batch: ((batch["inputs"],), {"masked_BP": batch["masked"]}),
    score=score,
    dummy_inputs=lambda config: (jnp.zeros((1, 16, 16, 3)),),
  )
  batch = {
    "inputs": rng.normal(size=(BATCH, 16, 16, 3)).astype(np.float32),
    "masked": rng.integers(0, 2, (BATCH, 16)).astype(bool),
    "targets": rng.normal(size=(BATCH, 17, SIZES["width"])).astype(np.float32),
    "weights": np.ones((BATCH,), np.float32),
  }
  return task, model, batch


def of_task(name: str, data: config_lib.DataConfig | None = None, **fields):
  """A family whose task is in the table: random integers for what is of integers.

  Its config has other data, if they are given, and other fields of the model.
  """

  def family(rng, config):
    model = dataclasses.replace(config.model, **fields)
    config = dataclasses.replace(config, task=name, model=model, data=data or config.data)
    task = TASKS[name]
    task = task._replace(dummy_inputs=lambda _, make=task.dummy_inputs: make(config))
    facts = task.planned_facts(config)
    batch = {}
    for key, spec in task.spec(config, facts).items():
      high = 2 if "mask" in key or spec.dtype == bool else VOCAB
      highest = {"segment_ids": 3, "positions": LENGTH, "label": 10, "other_label": 10}
      highest |= {"places": 16, "wave_lengths": 651, "token_lengths": 4}
      highest |= dict.fromkeys(("image_places", "pair_image_places"), 16)
      highest |= dict.fromkeys(("text_places", "pair_text_places"), 6)
      highest |= {"label": 2} if name == "visual_reasoning" else {}
      high = highest.get(key.removeprefix("source_"), high)
      values = rng.integers(0, high, spec.shape)
      if jnp.issubdtype(spec.dtype, jnp.floating):
        is_pixels = "image" in key and not key.endswith("weights")
        values = rng.normal(size=spec.shape) if is_pixels else rng.integers(0, 2, spec.shape)
      batch[key] = values.astype(spec.dtype)
      if key == "waves":  # Not of 16 bits, of which a spectrogram is in float32.
        batch[key] = rng.normal(0, 0.1, spec.shape)
    return task, task.build_model(config, facts), batch

  return family


# 16 vectors, and texts of at most 3 of 64 tokens.
SOUNDS = config_lib.DataConfig(
  name="embedded/en", vocab_size=VOCAB, seq_length=3, sample_rate=1000, max_seconds=0.65
)
# 16 vectors of each front end: of `conv` from 63 frames, of the others from 67.
LONGER = dataclasses.replace(SOUNDS, max_seconds=0.69)
HEARING = {"mel_bins": 8}

PAIRS = config_lib.DataConfig(
  name="embedded/emoji/en",
  vocab_size=VOCAB - 1,
  seq_length=6,
  composition=config_lib.CompositionConfig(pairs=2),
)
LOOKING = {"positions": "learned", "image_size": 16, "patch_size": 4}
SEEING = LOOKING | {"image_vocab_size": 16}
# Of one pair a row.
SINGLE = dataclasses.replace(PAIRS, composition=config_lib.CompositionConfig())

FAMILIES = {
  "causal_lm": causal_lm,
  "masked_lm": masked_lm,
  "vision": vision,
  "translation": of_task("translation"),
  # 16 patches without a class token.
  "image_classification": of_task(
    "image_classification",
    config_lib.DataConfig(name="embedded/mnist5k"),
    image_size=16,
    patch_size=4,
    pooling="mean",
    relative_patches=True,
  ),
  "image_tokenizer": of_task(
    "image_tokenizer",
    config_lib.DataConfig(name="embedded/mnist5k"),
    positions="learned",
    image_size=16,
    patch_size=4,
    image_vocab_size=8,
    codebook_decay=0.5,
    codebook_redraw=0.9,
  ),
  "masked_image": of_task(
    "masked_image",
    config_lib.DataConfig(name="embedded/mnist5k", mask_rate=0.4),
    image_size=16,
    patch_size=4,
    image_vocab_size=16,
    relative_patches=True,
  ),
  # Two pairs a row, one image and one text; attention of each modality, or shared by both.
  "masked_data": of_task("masked_data", PAIRS, **SEEING),
  "masked_data_fusion": of_task(
    "masked_data", PAIRS, shared_attention=True, fusion_layers=1, **SEEING
  ),
  # Whose loss compares all pairs of a batch, wherever they lie.
  "image_text_retrieval": of_task("image_text_retrieval", SINGLE, **LOOKING),
  "image_captioning": of_task("image_captioning", SINGLE, **LOOKING),
  "visual_question_answering": of_task("visual_question_answering", SINGLE, **LOOKING),
  "visual_reasoning": of_task("visual_reasoning", SINGLE, **LOOKING),
  "speech_recognition": of_task("speech_recognition", SOUNDS, **HEARING),
  "speech_transducer": of_task(
    "speech_recognition",
    LONGER,
    front_end="vgg",
    speech_head="transducer",
    joint_width=16,
    predictor_width=16,
    ctc_weight=0.3,
    **HEARING,
  ),
  "speech_translation": of_task(
    "speech_translation", LONGER, front_end="conv2d", ctc_weight=0.3, **HEARING
  ),
}


# Of lengths that no sequence axis divides: a run refuses them (`program.lower_step`).
UNEVEN = ("vision", "masked_image", "masked_data", "masked_data_fusion", "image_text_retrieval")
UNEVEN += ("image_captioning", "visual_question_answering", "visual_reasoning")

# ---------------------------------------------------------------------------------------------
# The steps
# ---------------------------------------------------------------------------------------------


def take_steps(case: dict, dtype) -> dict[str, np.ndarray]:
  """Parameters and the model's own state by path, and losses, after some steps of a case."""
  changes = {**case.get("config", {})}
  conf = config(**changes)
  task, model, batch = FAMILIES[case["family"]](np.random.default_rng(0), conf)
  model = _in_dtype(model, dtype)
  devices = jax.devices()[: case.get("devices")]
  mesh = sharding.make_mesh(case.get("mesh", {}), devices)
  optimizer, _ = program.make_optimizer(conf.optimizer, conf.steps)
  init = functools.partial(
    program.init_state,
    model=model,
    inputs=task.dummy_inputs(conf),
    optimizer=optimizer,
    ema=conf.ema,
  )

  def wide_init(key):
    narrow = init(key)
    widen = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(widen, narrow)

  whole = sharding.replicated(mesh)
  rows = sharding.rows_of_process(mesh, BATCH)
  with sharding.use_mesh(mesh):
    where = program.state_shardings(jax.eval_shape(wide_init, jax.random.key(0)), optimizer, mesh)
    state = jax.jit(wide_init, out_shardings=where)(jax.random.key(1))
  with sharding.use_mesh(mesh, strict=case["family"] not in UNEVEN):
    step = functools.partial(
      program.train_step,
      model=model,
      task=task,
      optimizer=optimizer,
      accumulation=conf.accumulation,
      ema=conf.ema,
    )
    step = jax.jit(step, donate_argnums=0, out_shardings=(where, whole))
    key = jax.jit(lambda: jax.random.key(2), out_shardings=whole)()
    # Each process gives its rows alone.
    batch = {
      name: jax.make_array_from_process_local_data(
        sharding.batch_sharding(mesh, values.ndim), values[rows], values.shape
      )
      for name, values in batch.items()
    }
    # Another key drops others: else no dropout is compared.
    other = jax.jit(lambda: jax.random.key(3), out_shardings=whole)()
    metrics = step(jax.tree.map(jnp.copy, state), batch, other)[1]
    losses, other_loss = [], float(metrics["loss"])
    for _ in range(STEPS):
      state, metrics = step(state, batch, key)
      losses.append(float(metrics["loss"]))
    variables = jax.jit(sharding.replicate)(state.eval_variables)
  leaves = jax.tree_util.tree_leaves_with_path(variables.pop("params"))
  leaves += jax.tree_util.tree_leaves_with_path(variables)
  found = {sharding.path_name(path): np.asarray(leaf) for path, leaf in leaves}
  return {**found, "losses": np.array(losses), "other_loss": np.array(other_loss)}


def _in_dtype(model, dtype):
  """The model, and those in it, computing in a dtype."""
  changes = {"dtype": dtype} if hasattr(model, "dtype") else {}
  for part in ("encoder", "decoder", "predictor"):
    if hasattr(model, part):
      changes[part] = _in_dtype(getattr(model, part), dtype)
  return model.clone(**changes)


def compile_case(case: dict) -> dict[str, np.ndarray]:
  """Bytes of a device, and what it exchanges in a step: rows of axes, kind and bytes."""
  conf = config(**case["config"])
  mesh = sharding.make_mesh(case["mesh"], jax.devices())
  compiled = program.compile_step(conf, TASKS[conf.task].planned_facts(conf), mesh)
  parts = memory.of_program(compiled.step, compiled.state, compiled.batch)
  cost = hlo.cost(compiled.step.as_text(), dict(mesh.shape))
  # What makes the state holds none of it whole.
  optimizer, _ = program.make_optimizer(conf.optimizer, conf.steps)
  inputs = compiled.task.dummy_inputs(conf)
  options = {"model": compiled.model, "inputs": inputs, "optimizer": optimizer, "ema": conf.ema}
  init = functools.partial(program.init_state, **options)
  with sharding.use_mesh(mesh):
    init = jax.jit(init, out_shardings=sharding.of(compiled.state)).lower(jax.random.key(0))
  init = init.compile().memory_analysis()
  exchanged = [
    (" ".join(each.axes), each.kind, each.bytes, each.times) for each in cost.collectives
  ]
  return {
    "whole": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(compiled.state)),
    "parameters": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(compiled.state.params)),
    "small": sum(
      leaf.size * leaf.dtype.itemsize
      for path, leaf in jax.tree_util.tree_leaves_with_path(compiled.state.params)
      if path[-1].key not in ("kernel", "embedding")
    ),
    "state": parts.parameters + parts.average + parts.optimizer,
    "arguments": compiled.step.memory_analysis().argument_size_in_bytes,
    "temporaries": parts.temporaries,
    "initial": init.output_size_in_bytes + init.temp_size_in_bytes,
    "axes_and_kinds": np.array([row[:2] for row in exchanged]).reshape(-1, 2),
    "bytes_and_times": np.array([row[2:] for row in exchanged]).reshape(-1, 2),
  }


def main() -> None:
  """Takes the steps of all cases, or compiles them; of several processes the first writes."""
  work = json.loads(sys.argv[1])
  if "processes" in work:
    distributed.initialize(**work["processes"])
  for case in work["cases"]:
    is_run = case.get("steps", True)
    found = take_steps(case, jnp.dtype(work["dtype"])) if is_run else compile_case(case)
    if jax.process_index() == 0:
      np.savez(case["output"], **found)


if __name__ == "__main__":
  main()
