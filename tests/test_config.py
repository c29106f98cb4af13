"""Everything wrong with a config is one line that says what to change."""

import copy
import dataclasses
import functools
import math
import random
import subprocess
import sys

import pytest

from benchmarks.reliability import inputs
from magneto_jax import config as config_lib
from magneto_jax import decoding, optimizers, tasks
from magneto_jax.config import ConfigError, TrainConfig, default_config, from_config_dict
from magneto_jax.layers import feed_forward, positions
from magneto_jax.models import classifier, speech, transformer


def changed(name, value):
  config = default_config().to_dict()
  *groups, leaf = name.split(".")
  inner = config
  for group in groups:
    inner = inner[group]
  inner[leaf] = value
  return config


def test_default_config_is_the_default_record():
  assert from_config_dict(default_config()) == TrainConfig()


def test_record_survives_json_like_values():
  record = dataclasses.replace(TrainConfig(), steps=7)
  assert from_config_dict(dataclasses.asdict(record)) == record


def test_a_misspelt_field_names_the_right_one():
  """Five typos of every field; only those of fields of two or three letters may mean another, or
  where a sibling differs in the last letter.

  In the wrong group, a field is as well another group's field of the same name.
  """
  wrong, draw = set(), random.Random(0)
  for name in config_lib.field_names():
    for kind, typo in inputs.typos(name, draw).items():
      nearest, leaf = config_lib.nearest_field(typo), name.rpartition(".")[2]
      if nearest != name and not (kind == "group" and nearest.rpartition(".")[2] == leaf):
        wrong.add(name)
  alike = {"data.augment.rand_augment_set", "data.augment.rand_augment_std"}
  assert wrong <= {"optimizer.b1", "optimizer.b2", "ema"} | alike


def test_every_number_has_a_range_on_both_sides():
  """And refuses what is of another type, not finite, or infinite in float32."""
  for name, field in inputs.number_fields().items():
    assert {"min", "above"} & field.metadata.keys(), name
    assert {"max", "below"} & field.metadata.keys(), name
    for value in inputs.impossible(field):
      with pytest.raises(ConfigError, match=rf"^config\.{name}=") as error:
        from_config_dict(changed(name, value))
      assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
  "name, value, message",
  [
    ("optimizer.learning_rate", math.nan, r"config.optimizer.learning_rate=nan must be finite"),
    ("optimizer.learning_rate", -1.0, r"learning_rate=-1.0 must be above 0.0"),
    ("optimizer.learning_rate", 0.0, r"learning_rate=0.0 must be above 0.0"),
    ("optimizer.end_factor", 1.5, r"end_factor=1.5 must be at most 1.0"),
    ("model.layers", -3, r"config.model.layers=-3 must be at least 1"),
    ("model.layers", 2.5, r"config.model.layers=2.5 must be of type int"),
    ("model.dropout", 1.0, r"config.model.dropout=1.0 must be below 1.0"),
    ("model.dropout", True, r"config.model.dropout=True must be of type float"),
    ("model.heads", 3, r"model.heads=3 must divide model.width=256"),
    ("model.kv_heads", 3, r"model.kv_heads=3 must divide model.heads=4"),
    ("model.width", 300, r"set model.heads: 64 does not divide model.width=300"),
    ("model.unroll", 4, r"model.unroll=4 must divide model.layers=6"),
    ("model.unroll", 0, r"model.unroll=0 must divide model.layers=6"),
    ("model", {"positions": "rotary", "heads": 4, "head_dim": 5}, r"an even head width, not 5"),
    ("recipe", "magnet", r"config.recipe='magnet' must be one of .*did you mean magneto\?"),
    ("accumulation", 3, r"accumulation=3 must divide batch_size=16"),
    ("lerning_rate", 1.0, r"did you mean config.optimizer.learning_rate\?"),
    ("model.layer", 2, r"config.model.layer does not exist; did you mean config.model.layers\?"),
    ("steps", True, r"config.steps=True must be of type int"),
    ("model", 3, r"config.model is a group of fields"),
    ("data.train_files", "a.txt", r"are not read with data.name='embedded': set data.name=text_fi"),
    ("data.mask_rate", 0.0, r"config.data.mask_rate=0.0 must be above 0.0"),
    ("data.mask_rate", 0.2, r"data.mask_rate is not read with config.task='causal_lm', only with"),
    ("data.mask_block", 0, r"config.data.mask_block=0 must be at least 1"),
    ("data.mask_block", 4, r"mask_block is not read with config.task='causal_lm', only with 'mask"),
    ("image_tokenizer", "runs/i", r"image_tokenizer is not read with config.task='causal_lm', onl"),
    ("data", {"mask_keep": 0.6, "mask_random": 0.5}, r"mask_random=0.5 are shares of the same"),
    (
      "data.keywords",
      True,
      r"data.keywords is not read with config.task='causal_lm', only with 'ma",
    ),
    ("data.least_answers", -1, r"config.data.least_answers=-1 must be at least 0"),
    ("data.text_mask_rate", 1.0, r"config.data.text_mask_rate=1.0 must be below 1.0"),
    (
      "data.composition",
      {"pairs": 0, "images": 0, "texts": 0},
      r"config.data.composition has neither pairs nor images nor texts: set one to 1",
    ),
    ("data.composition.texts", -1, r"config.data.composition.texts=-1 must be at least 0"),
    (
      "data.text_source",
      "text_files",
      r"text_source_files='' and data.text_source='text_files' do",
    ),
    (
      "data.image_source_files",
      "x",
      r"files='x' and data.image_source='' do not agree, as image_f",
    ),
    ("data.name", "pair_files", r"only with 'translation': set data.name=text_files$"),
    (
      "optimizer.power",
      2.0,
      r"config.optimizer.power is not read with config.optimizer.schedule='c",
    ),
    ("optimizer.schedule", "inverse_square", r"must be one of .*did you mean inverse_sqrt\?"),
    ("label_smoothing", 1.0, r"config.label_smoothing=1.0 must be below 1.0"),
    ("model.encoder_layers", -1, r"config.model.encoder_layers=-1 must be at least 0"),
    ("model.encoder_layers", 2, r"encoder_layers is not read with config.task='causal_lm', only w"),
    ("data.too_long", "skip", r"config.data.too_long is not read with config.task='causal_lm', o"),
    ("data.source_key", "fr", r"config.data.source_key is not read with config.task='causal_lm',"),
    ("data.too_long", "cut", r"config.data.too_long='cut' must be one of refuse, skip"),
    ("model", {"encoder_layers": 5, "unroll": 2}, r"unroll=2 must divide model.encoder_layers=5"),
    ("model.pooling", "last", r"pooling='last' must be one of first, mean"),
    ("model.pooling", "mean", r"pooling is not read with config.task='causal_lm', only with 'text"),
    ("model.relative_patches", True, r"relative_patches is not read with config.task='causal_lm'"),
    ("optimizer.layer_decay", 0.0, r"config.optimizer.layer_decay=0.0 must be above 0.0"),
    ("optimizer.head_rate", 0.0, r"config.optimizer.head_rate=0.0 must be above 0.0"),
    ("optimizer.layer_decay", 1.1, r"config.optimizer.layer_decay=1.1 must be at most 1.0"),
    (
      "optimizer.decay_mask",
      "bert",
      r"'bert' must be one of matrices, all, beit; did you",
    ),
    ("init_from", "runs/bert", r"init_from is not read with config.task='causal_lm', only with"),
    ("data.too_long", "truncate", r"data.too_long is not read with config.task='causal_lm', only"),
    ("data.too_long", "cut", r"data.too_long='cut' must be one of refuse, skip, trunc"),
    ("data.augment.crop_scale", 0.0, r"config.data.augment.crop_scale=0.0 must be above 0.0"),
    ("data.augment.flip", 1.5, r"config.data.augment.flip=1.5 must be at most 1.0"),
    ("data.augment.flip", 0.5, r"data.augment.flip is not read with config.task='causal_lm', only"),
    ("data.augment.rand_augment_std", 0.1, r"_std is not read without data.augment.rand_augment:"),
    ("data.augment.mix_rate", 0.5, r"mix_rate is not read without data.augment.mixup or data.augm"),
    ("data.augment.cutmix_share", 0.1, r"share is not read without data.augment.mixup and data.a"),
    ("data.eval_crop", -0.1, r"config.data.eval_crop=-0.1 must be at least 0.0"),
    ("data.normalization", "imagenette", r"must be one of half, imagenet; did you mean imagenet"),
    ("data.image_key", "x", r"data.image_key is not read with config.task='causal_lm', only with"),
    ("data.label_scale", 0.0, r"config.data.label_scale=0.0 must be above 0.0"),
    ("model.joint_chunk", 8, r"joint_chunk is not read without config.model.speech_head='transduc"),
    ("model.joint_width", 8, r"joint_width is not read without config.model.speech_head='transduc"),
    (
      "model.ctc_weight",
      0.3,
      r"ctc_weight is not read without config.model.speech_head='transduce",
    ),
    (
      "model",
      {"speech_head": "transducer", "predictor": "stateless", "predictor_layers": 2},
      r"predictor_layers is not read without config.model.predictor='lstm'",
    ),
    ("model.front_end", "conv3d", r"must be one of conv, vgg, conv2d; did you mean conv2d\?"),
    ("spec_augment.time_width", 9, r"time_width is not read without spec_augment.time_masks: set"),
    ("spec_augment.time_share", 0.0, r"config.spec_augment.time_share=0.0 must be above 0.0"),
    (
      "spec_augment",
      {"frequency_masks": 1, "frequency_width": 81},
      r"frequency_width=81 must be at most model.mel_bins=80",
    ),
    ("data.sample_rate", 999, r"config.data.sample_rate=999 must be at least 1000"),
    ("data.sample_rate", 16000, r"sample_rate is not read with config.task='causal_lm', only with"),
    ("data.max_seconds", 0.05, r"config.data.max_seconds=0.05 must be at least 0.1"),
    ("data.speed_change", 0.6, r"config.data.speed_change=0.6 must be at most 0.5"),
    ("data.text_case", "upper", r"text_case='upper' must be one of keep, lower"),
    (
      "data.tokenizer",
      "char",
      r"'char' is not read with config.task='causal_lm', only with 'speec",
    ),
    (
      "data.tokenizer",
      "xlmr",
      r"tokenizer='xlmr' is not read with config.task='causal_lm', only with 'masked_data'",
    ),
    (
      "data.name",
      "manifest",
      r"'manifest' is not read with config.task='causal_lm', only with 'sp",
    ),
    ("model.image_size", 32, r"image_size is not read with config.task='causal_lm', only with 'im"),
    ("model.patch_size", 15, r"patch_size=15 must divide model.image_size=224"),
    ("model.image_vocab_size", 0, r"config.model.image_vocab_size=0 must be at least 1"),
    ("task", "translate", r"'translate' must be one of .*did you mean translation\?"),
    ("vocab_chunk", -1, r"config.vocab_chunk=-1 must be at least 0"),
    ("seed", 2**32, r"config.seed=4294967296 must be at most 4294967295"),
    ("recipe_options.head_scale", "pre", r"head_scale='pre' must be one of '', none, pre_out_proj"),
    ("recipe_options.placement", "mid", r"placement='mid' must be one of '', pre, post"),
    ("recipe_options.depth_unit", "layer", r"must be one of '', layers, blocks; did you mean lay"),
    ("recipe_options.beta_squared", 1.0, r"recipe_options.beta_squared=1.0 must be below 1.0"),
    ("recipe_options.beta_squared", -0.1, r"beta_squared=-0.1 must be at least 0.0"),
    ("recipe_options.beta_squared", 0.1, r"'magneto' has no option beta_squared: it is of deepsc"),
    ("recipe_options.head_scale", "none", r"'magneto' has no option head_scale: it is of normform"),
    ("model", {"positions": "xpos", "xpos_scale_base": 1.0}, r"serves 70 positions, and config.da"),
    ("clip", 1.0, r"did you mean config.optimizer.clip_norm\?"),
    ("sample_prompt", "\udcff", r"is not valid text"),
    ("steps", 2**31, r"config.steps=2147483648 must be at most 2147483647"),
    ("data.seq_length", 2**25, r"config.data.seq_length=33554432 must be at most 16777216"),
    ("data.skip_bad", -1, r"config.data.skip_bad=-1 must be at least 0"),
    ("batch_size", 2**24, r"batch_size=16777216 times data.seq_length=256 is 4,294,967,296 tokens"),
    # To a device 1 - 1e-12 is 1, which would divide by zero, and 1e-50 is 0.
    ("optimizer.b1", 1 - 1e-12, r"b1=0.999999999999 must be below 1.0"),
    ("optimizer.eps", 1e-50, r"eps=1e-50 must be above 0.0"),
    ("optimizer.learning_rate", 10**400, r"learning_rate=1000.* must be of type float"),
    ("model.steps", 3, r"config.model.steps does not exist; did you mean config.steps\?"),
    ("mesh.dropout", 0.1, r"did you mean config.model.dropout\?"),
    ("x" * 10**6, 1, r"config.x{80} does not exist; groups: recipe_options, model"),
    ("max_skipped", 0, r"config.max_skipped=0 must be at least 1"),
    (
      "skip_batches",
      "200-400",
      r"skip_batches='200-400' must be ranges of batches",
    ),
    ("skip_batches", "5:5", r"skip_batches='5:5' must be ranges of batches"),
    ("spike.factor", -1.0, r"config.spike.factor=-1.0 must be at least 0.0"),
    ("spike.window", 1, r"config.spike.window=1 must be at least 8"),
    ("beam.size", 0, r"config.beam.size=0 must be at least 1"),
    (
      "beam.penalty",
      "gnm",
      r"penalty='gnm' must be one of length, gnmt, with_bos; did you mean gnmt\?",
    ),
    ("beam.size", 4, r"config.beam.size is not read with config.task='causal_lm', only with 'tra"),
    (
      "spike",
      {"factor": 9, "rewind_steps": 501},
      r"may reach back 500 steps only",
    ),
  ],
)
def test_an_impossible_value_is_refused(name, value, message):
  with pytest.raises(ConfigError, match=message) as error:
    from_config_dict(changed(name, value))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "fields, message",
  [
    (
      {"max_seconds": 3600.0, "sample_rate": 384_000},
      r"batch_size=16 times data.max_seconds=3600 times data.sample_rate=384000 is 22,118,400,000",
    ),
    ({"too_long": "truncate"}, r"too_long='truncate' is not read with config.task='speech_recogni"),
  ],
)
def test_sounds_fit_a_device_and_are_not_cut(fields, message):
  from_config_dict({"task": "speech_recognition", "data": {"max_seconds": 35.0}})
  with pytest.raises(ConfigError, match=message) as error:
    from_config_dict({"task": "speech_recognition", "data": fields})
  assert "\n" not in str(error.value)


def test_choices_are_the_tables_they_stand_for():
  """The config lies below the models and tasks, so it names their tables' keys once more."""
  choices = {
    field.name: field.metadata["choices"]
    for record in (
      config_lib.ModelConfig,
      config_lib.OptimizerConfig,
      config_lib.BeamConfig,
      TrainConfig,
    )
    for field in dataclasses.fields(record)
    if "choices" in field.metadata
  }
  assert set(choices["activation"]) == set(feed_forward.ACTIVATIONS)
  assert set(choices["positions"]) == set(positions.KINDS)
  assert set(choices["front_end"]) == set(speech.FRONT_ENDS)
  assert set(choices["pooling"]) == set(classifier.POOLINGS)
  assert set(choices["remat"]) == set(transformer.REMAT)
  assert set(choices["schedule"]) == set(optimizers.SCHEDULES)
  assert set(choices["decay_mask"]) == set(optimizers.DECAY_MASKS)
  assert set(choices["task"]) == set(tasks.TASKS)
  assert set(choices["penalty"]) == set(decoding.PENALTIES)


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
def test_a_schedule_reads_the_fields_that_it_is_said_to(name):
  """Others are refused: with another value the rates are the same, or the field is in the table."""
  given = {"peak": 1.0, "warmup_steps": 2, "decay_steps": 9, "power": 1.0, "end_factor": 0.0}
  rates = lambda **fields: [optimizers.schedule(name, **given | fields)(i).item() for i in (4, 8)]
  for field, value in {"decay_steps": 7, "power": 2.0, "end_factor": 0.5}.items():
    read = field in config_lib.SCHEDULES[name]
    assert read == (rates() != rates(**{field: value}))
    group = {"schedule": name, field: value}
    if read:
      from_config_dict({"optimizer": group})
    else:
      with pytest.raises(
        ConfigError, match=f"optimizer.{field} is not read with .*='{name}', only"
      ):
        from_config_dict({"optimizer": group})


@pytest.mark.parametrize("task", config_lib.TASK_NAMES)
def test_each_task_reads_files_of_its_kind_only(task):
  kinds = {name for name, tasks in config_lib.OWN_FILES.items() if task in tasks}
  for name in config_lib.OWN_FILES:
    group = {"task": task, "data": {"name": name}}
    if name in kinds:
      from_config_dict(group)
    else:
      right = "".join(f": set data.name={kind}" for kind in kinds)
      with pytest.raises(
        ConfigError, match=f"data.name='{name}' is not read with .*{task}.*{right}$"
      ):
        from_config_dict(group)


def test_a_classifier_has_no_table_to_tie():
  with pytest.raises(ConfigError, match="tied_embeddings is not read with config.task='text_class"):
    from_config_dict({"task": "text_classification", "model": {"tied_embeddings": False}})


@pytest.mark.parametrize("config", [[], ["model"], "model", 3, None])
def test_what_is_no_group_of_fields_is_no_config(config):
  with pytest.raises(ConfigError, match="a config is a group of fields, not"):
    from_config_dict(config)


def test_the_best_is_kept_only_where_every_evaluation_has_a_checkpoint():
  from_config_dict({"keep_best": True, "eval_every": 30, "checkpoint_every": 15})
  with pytest.raises(ConfigError, match="checkpoint_every=20 must divide eval_every=30"):
    from_config_dict({"keep_best": True, "eval_every": 30, "checkpoint_every": 20})


def test_a_record_made_directly_is_checked_too():
  with pytest.raises(ConfigError, match="config.steps=-3 must be at least 1"):
    TrainConfig(steps=-3)
  with pytest.raises(ConfigError, match="config.data.seq_length=1 must be at least 2"):
    config_lib.DataConfig(seq_length=1)


def test_bounds_that_are_allowed_are_allowed():
  for name, value in (("optimizer.end_factor", 1.0), ("model.dropout", 0.0), ("model.unroll", -1)):
    from_config_dict(changed(name, value))


@pytest.mark.parametrize(
  "text, ranges",
  [
    ("", ""),
    ("200:400", "200:400"),
    ("1000:1010, 200:400", "200:400,1000:1010"),
    ("3:5,5:6,9:10,0:4", "0:6,9:10"),
  ],
)
def test_ranges_of_batches_have_one_form(text, ranges):
  """In order, with no batch twice; what it stands for is unchanged."""
  found = from_config_dict({"skip_batches": text}).skip_batches
  assert found == ranges
  listed = lambda text: {
    k for part in text.split(",") if part for k in range(*map(int, part.split(":")))
  }
  assert listed(found) == listed(text)


# What changes neither the numbers of a run nor what it has learned so far.
MAY_DIFFER = {
  *("steps", "eval_every", "eval_batches", "log_every", "checkpoint_every", "keep_checkpoints"),
  *("keep_best", "on_damage"),
  "diagnostics_every",
  *("sample_prompt", "sample_tokens", "sample_temperature"),
  *("data.cache_dir", "data.data_dir", "data.workers", "data.train_files", "data.validation_files"),
  *("data.tokenizer_file", "data.test_files"),
  *("data.text_source_files", "data.image_source_files"),
  *("data.prefetch", "data.skip_bad"),
  *("max_skipped", "skip_batches"),
  *(f"spike.{name}" for name in ("factor", "window", "rewind_steps", "skip_batches", "limit")),
  *("mesh.slices", "mesh.data", "mesh.fsdp", "mesh.sequence", "mesh.tensor"),
  *(f"beam.{name}" for name in ("size", "length_penalty", "penalty", "min_length")),
  *("beam.max_ratio", "beam.max_extra", "beam.max_symbols", "beam.rows", "beam.judged"),
}


def test_differing_fields_leave_out_how_long_and_how_often():
  old = TrainConfig()
  model = dataclasses.replace(old.model, layers=7)
  new = dataclasses.replace(old, steps=9, log_every=1, seed=3, model=model)
  assert config_lib.differing_fields(old, new) == {"seed": (0, 3), "model.layers": (6, 7)}
  for name, value in config_lib.flatten(old).items():
    group, _, leaf = name.rpartition(".")
    # Past the checks: the new value need not be a sensible one.
    new = copy.deepcopy(old)
    owner = functools.reduce(getattr, group.split(".") if group else (), new)
    object.__setattr__(owner, leaf, 2 * value or 1)
    found = config_lib.differing_fields(old, new)
    assert set(found) == {name} - MAY_DIFFER


EARLY = [
  (["--config.lerning_rate=1"], "did you mean config.optimizer.learning_rate?"),
  (["--config.model.heads=5"], "model.heads=5 must divide model.width=192"),
  (["--config.steps=many"], "steps"),
  (["--confg.steps=3"], "did you mean --config.steps?"),
  (["steps=3"], "'steps=3' is not a flag"),
  (["--config=configs/gpt.py:huge"], "has no 'huge', only tiny, magneto_24"),
  (["--config", "configs/gpt.py:huge"], "has no 'huge', only tiny, magneto_24"),
  (["--config=configs/gtp.py"], "config file configs/gtp.py does not exist"),
  (["--config.data.name=embeded"], "no data set is called 'embeded'; nearest names: ['embedded'"),
  (["--config.data.name=text_files"], "train_files is empty"),
]
# Known only when the text has been tokenised, into the workdir.
LATE = [
  (["--config.batch_size=100000"], "fewer than batch_size=100000"),
  (["--config.model.attention_implementation=pallas"], "implementation='pallas' is not one of"),
]


QUICK = (EARLY[0], EARLY[2], LATE[0])


@pytest.mark.parametrize(
  "flags, message",
  [pytest.param(*case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in EARLY + LATE],
)
def test_the_command_ends_in_one_line(flags, message, tmp_path):
  """Exit code 2, one line, no traceback."""
  command = [sys.executable, "-m", "magneto_jax.train", f"--workdir={tmp_path / 'run'}"]
  if not any(flag.partition("=")[0] == "--config" for flag in flags):
    command.append("--config=configs/gpt.py:tiny")
  result = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=tmp_path)
  assert result.returncode == 2, result.stderr
  assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr
  assert not (tmp_path / "run").exists() or (flags, message) in LATE


@pytest.mark.parametrize(
  "body, message",
  [
    ("c.modle.layers = 2", "did you mean config.model"),
    ("c.optimizer.clip = 2.0", "did you mean config.optimizer.clip_norm?"),
    ("c.steps = 'many'", "steps"),
    ("return 5", "the config file must return a config, not 5"),
    ("c.steps = -1", "config.steps=-1 must be at least 1"),
    ("c.steps =", "the config file cannot be run: SyntaxError"),
    ("import nonsense", "ModuleNotFoundError: No module named 'nonsense' ("),
  ],
)
def test_a_config_file_with_a_mistake_ends_in_one_line(body, message, tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(
    "from magneto_jax.config import default_config\n"
    f"def get_config():\n  c = default_config()\n  {body}\n  return c\n"
  )
  command = [sys.executable, "-m", "magneto_jax.train", "--workdir=run", f"--config={file}"]
  result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  assert result.returncode == 2, result.stderr
  assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr
  assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--top_p=0"], "--top_p must be above 0"),
    (["--prompt=x"], "holds no run"),
  ],
)
def test_generation_ends_in_one_line(flags, message, tmp_path):
  command = [sys.executable, "-m", "magneto_jax.generate", f"--workdir={tmp_path / 'run'}"]
  result = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=tmp_path)
  assert result.returncode == 2, result.stderr
  assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize(
  ("given", "heads", "ffn_width"),
  [
    ({"width": 64}, 2, 256),
    ({"width": 16}, 1, 64),
    ({"width": 512}, 8, 2048),
    ({"width": 512, "heads": 4, "ffn_width": 100}, 4, 100),
    ({"width": 96, "head_dim": 16}, 6, 384),
  ],
)
def test_heads_and_ffn_width_follow_from_the_width(given, heads, ffn_width):
  """One head for each 64 of the width, or each 32 of a small one; and the record says so."""
  model = from_config_dict({"model": given}).model
  assert (model.heads, model.ffn_width) == (heads, ffn_width)
  assert dataclasses.asdict(model)["heads"] == heads


def test_they_follow_also_where_a_config_file_sets_the_width():
  """A file starts from the default config, whose own width they must not be of."""
  config = config_lib.default_config()
  config.model.width = 512
  model = from_config_dict(config).model
  assert (model.heads, model.ffn_width) == (8, 2048)
