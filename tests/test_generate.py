"""The command that continues a prompt or translates lines, against the library."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable

import jax
import numpy as np
import pytest
import soundfile
from PIL import Image

from magneto_jax import decoding, generate, runs
from magneto_jax.checkpoints import Checkpointer
from magneto_jax.config import ConfigError, from_config_dict
from magneto_jax.data import pipelines, tokenizers
from magneto_jax.tasks import TASKS


def test_the_command_samples_as_its_flags_say(tmp_path):
  """Every flag other than its default, from the older of two checkpoints."""
  sizes = {"layers": 1, "width": 16, "ffn_width": 16, "heads": 2}
  config = from_config_dict({"model": sizes, "data": {"tokenizer": "byte", "seq_length": 32}})
  task, record = TASKS[config.task], runs.Record(config, {}, {"vocab_size": 260})
  model = task.build_model(config, record.facts)
  runs.write_record(tmp_path, record)
  checkpointer = Checkpointer(runs.checkpoints_in(tmp_path))
  iterator = pipelines.train_iterator([{"x": np.zeros(1)}], batch_size=1, seed=0)
  init = jax.jit(model.init)
  older, newer = (init(jax.random.key(i), *task.dummy_inputs(config)) for i in range(2))
  for step, variables in ((4, older), (5, newer)):
    checkpointer.save(step, {"params": variables["params"]}, iterator, {})
  checkpointer.close()
  jax.tree.map(np.testing.assert_array_equal, runs.load(tmp_path).variables, newer)

  command = [sys.executable, "-m", "magneto_jax.generate", f"--workdir={tmp_path}", "--step=4"]
  command += ["--prompt=PROSPERO", "--tokens=6", "--samples=2", "--seed=5", "--temperature=2"]
  command += ["--top_k=200", "--top_p=0.8"]
  result = subprocess.run(command, capture_output=True, cwd=tmp_path)
  assert result.returncode == 0 and not result.stderr, result.stderr
  tokenizer = tokenizers.ByteTokenizer()
  prompt = [tokenizer.bos_id, *tokenizer.encode("PROSPERO")]
  continued = decoding.generate(
    model,
    older,
    [prompt] * 2,
    max_new_tokens=6,
    key=jax.random.key(5),
    temperature=2.0,
    top_k=200,
    top_p=0.8,
    eos_id=tokenizer.eos_id,
  )
  first, second = ("PROSPERO" + tokenizer.decode(tokens) for tokens in continued)
  assert first != second
  assert result.stdout.decode() == f"--- 1 of 2\n{first}\n--- 2 of 2\n{second}\n"

  # A damaged checkpoint.
  (runs.checkpoints_in(tmp_path) / "5" / "params" / "manifest.ocdbt").write_bytes(b"damaged")
  command = [sys.executable, "-m", "magneto_jax.generate", f"--workdir={tmp_path}"]
  result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  assert result.returncode == 2
  message = r"error: the checkpoint .*/5 is damaged: params/manifest.ocdbt has .* from step 4, the"
  assert re.match(message, result.stderr) and result.stderr.count("\n") == 1, result.stderr


def leave_run(workdir, values):
  """A run of a config, with weights as at the start: its config, model and variables."""
  config = from_config_dict(values)
  task, record = TASKS[config.task], runs.Record(config, {}, {"vocab_size": 260})
  model = task.build_model(config, record.facts)
  runs.write_record(workdir, record)
  iterator = pipelines.train_iterator([{"x": np.zeros(1)}], batch_size=1, seed=0)
  variables = jax.jit(model.init)(jax.random.key(0), *task.dummy_inputs(config))
  with Checkpointer(runs.checkpoints_in(workdir)) as checkpointer:
    checkpointer.save(1, {"params": variables["params"]}, iterator, {})
  return config, model, variables


TRANSLATING = {
  "task": "translation",
  "model": {"layers": 1, "width": 16, "ffn_width": 16, "heads": 2},
  "data": {"tokenizer": "byte", "seq_length": 16},
  "beam": {"size": 3, "max_ratio": 1.0, "max_extra": 3, "rows": 2},
}


HEARING = {
  "task": "speech_recognition",
  "model": TRANSLATING["model"],
  "data": {"name": "embedded/en", "tokenizer": "byte"},
}


@pytest.mark.ci
def test_the_command_translates_lines_up_to_a_bad_one(tmp_path):
  """In their order; of two lines that follow the bad one nothing is read."""
  config, model, variables = leave_run(tmp_path, TRANSLATING)
  command = [sys.executable, "-m", "magneto_jax.generate", f"--workdir={tmp_path}", "--scores"]
  command += ["--beam_size=2", "--length_penalty=0.5", "--max_ratio=0.5"]
  lines = "One line.\n\nä \u2028 ü\r\nthe third\n".encode() + b"\xff\nmore\nlines\n"
  result = subprocess.run(command, input=lines, capture_output=True, cwd=tmp_path)
  assert result.returncode == 2, result.stderr
  assert result.stderr.startswith(b"error: line 5 of the input is not UTF-8 (invalid start byte)")
  translator = decoding.Translator(
    model, variables, tokenizers.ByteTokenizer(), config.data.seq_length,
    size=2, length_penalty=0.5, max_ratio=0.5, max_extra=3, rows=2,
  )  # fmt: skip
  written = [line.split("\t", 1) for line in result.stdout.decode().split("\n")]
  assert written[1] == ["", ""] and written[4:] == [[""]]
  found = translator(["One line.", "ä \u2028 ü", "the third"])
  for (score, text), (best, *_) in zip([written[0], *written[2:4]], found, strict=True):
    assert text == best.text.replace("\n", " ").replace("\r", " ")
    assert float(score) == np.float64(f"{best.score:.4f}")


@pytest.mark.ci
def test_a_task_of_ones_own_translates_and_the_best_can_be_asked_for(tmp_path):
  """A run names its task, and the file that registers it is a flag."""
  name = "of_this_test"
  file = tmp_path / "own.py"
  file.write_text(
    "from magneto_jax import tasks\n"
    f"tasks.register({name!r}, tasks.TASKS['translation']._replace(unit='words'))\n"
  )
  values = {name: value for name, value in TRANSLATING.items() if name != "beam"}
  config, model, variables = leave_run(tmp_path / "run", values)
  config = dataclasses.replace(config, keep_best=True)
  held = runs.as_json(runs.Record(config, {}, {"vocab_size": 260}))
  held["config"]["task"] = name
  runs.write_json(tmp_path / "run" / "config.json", held)
  row = {"step": 1, f"validation/{TASKS['translation'].best[0]}": 3.0}
  (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
  command = [sys.executable, "-m", "magneto_jax.generate", f"--workdir={tmp_path / 'run'}"]
  command += ["--beam_size=2", f"--task_file={file}", "--step=best"]
  result = subprocess.run(command, input=b"a line\n", capture_output=True, cwd=tmp_path)
  assert result.returncode == 0 and not result.stderr, result.stderr
  ((best, _),) = decoding.Translator(
    model, variables, tokenizers.ByteTokenizer(), config.data.seq_length, size=2
  )(["a line"])
  assert result.stdout.decode() == best.text.replace("\n", " ").replace("\r", " ") + "\n"


@pytest.mark.ci
@pytest.mark.parametrize(
  "values, flags, message",
  [
    (TRANSLATING, ["--prompt=x"], "--prompt is not read with a model of config.task='translation'"),
    (TRANSLATING, ["--beam_size=0"], "config.beam.size=0 must be at least 1"),
    (TRANSLATING, ["--sound=x"], "--sound is not read with a model of config.task='translation'"),
    (HEARING, [], "give --sound=FILE, of a WAV, FLAC, Ogg or MP3 file"),
    (HEARING, ["--sound=x", "--prompt=x"], "--prompt is not read with a model of config.task='spe"),
    (HEARING, ["--sound=x", "--max_ratio=2"], "config.beam.max_ratio is not read without config"),
    (
      {"model": TRANSLATING["model"], "data": TRANSLATING["data"]},
      ["--scores"],
      "--scores is not read with a model of config.task='causal_lm'",
    ),
  ],
)
def test_flags_of_another_kind_of_model_are_refused(values, flags, message, tmp_path):
  config = from_config_dict(values)
  runs.write_record(tmp_path, runs.Record(config, {}, {"vocab_size": 260}))
  command = [sys.executable, "-m", "magneto_jax.generate", f"--workdir={tmp_path}", *flags]
  result = subprocess.run(command, capture_output=True, text=True, input="", cwd=tmp_path)
  assert result.returncode == 2, result.stderr
  assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr


class Spelling:
  """A translator that spells backwards, and remembers how many lines it was given at once."""

  rows, longest = 1, 8

  def __init__(self):
    self.given = []
    self.tokenizer = tokenizers.ByteTokenizer()

  encode, cut = decoding.Translator.encode, decoding.Translator.cut

  def translate(self, sources):
    self.given.append(len(sources))
    texts = [self.tokenizer.decode(source)[::-1] for source in sources]
    return [[decoding.Translation(text, -0.25), decoding.Translation("", -9)] for text in texts]


def translated(monkeypatch, lines: bytes, translator=None, **args) -> bytes:
  """What is written for lines; where one is refused, after its message."""
  out = io.TextIOWrapper(io.BytesIO())
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
  monkeypatch.setattr(sys, "stdout", out)
  args = types.SimpleNamespace(**{"scores": False, "too_long": "refuse"} | args)
  refused = b""
  try:
    generate._translate_lines(args, translator or Spelling())
  except ConfigError as error:
    refused = f"{error}\n".encode()
  return refused + out.buffer.getvalue()


@pytest.mark.parametrize(
  "lines, expected",
  [
    (b"", b""),
    (b"\n", b"\n"),
    (b"ab\n", b"ba\n"),
    (b"ab", b"ba\n"),
    (b"ab\r\n  \n\ncd\n", b"ba\n\n\ndc\n"),
    ("ä€\n".encode(), "€ä\n".encode()),
    # A line in is a line out.
    (b"a\rb\n", b"b a\n"),
    (b"ab\n1234567\ncd\n", b"ba\n7654321\ndc\n"),
  ],
)
def test_a_line_in_is_a_line_out(lines, expected, monkeypatch):
  assert translated(monkeypatch, lines) == expected


def test_lines_are_translated_a_part_at_a_time(monkeypatch):
  translator = Spelling()
  lines = b"".join(b"%d\n" % i for i in range(10, 10 + 2 * generate._SEARCHES + 3))
  expected = b"".join(line[:2][::-1] + b"\n" for line in lines.splitlines())
  assert translated(monkeypatch, lines, translator) == expected
  assert translator.given == [generate._SEARCHES, generate._SEARCHES, 3]


def test_scores_stand_before_a_tab(monkeypatch):
  assert translated(monkeypatch, b"ab\n\n", scores=True) == b"-0.2500\tba\n\t\n"


def test_a_line_that_is_too_long_is_refused_or_cut(monkeypatch, capsys):
  lines = b"ab\n12345678\ncd\n"
  message = b"line 2 of the input has 9 tokens, and the model reads 8: split it, or set "
  assert translated(monkeypatch, lines) == message + b"--too_long=cut\nba\n"
  assert translated(monkeypatch, lines, too_long="cut") == b"ba\n7654321\ndc\n"
  said = "warning: line 2 of the input has 9 tokens, and the model reads the first 8 of them\n"
  assert capsys.readouterr().err == said


class Hearing:
  """A transcriber that tells how long a sound is, and remembers how many it was given at once."""

  rows, longest = 1, 4000
  model = types.SimpleNamespace(encoder=types.SimpleNamespace(sample_rate=8000))

  def __init__(self):
    self.given = []

  def __call__(self, waves):
    self.given.append(len(waves))
    return [[decoding.Translation(f"{len(wave)}\nsamples", -0.5)] for wave in waves]


def heard(monkeypatch, paths, transcriber=None, **args):
  """What is written for sounds; where one is refused, and its message."""
  out = io.TextIOWrapper(io.BytesIO())
  monkeypatch.setattr(sys, "stdout", out)
  args = {"scores": False, "too_long": "refuse", "sound": list(map(str, paths))} | args
  try:
    args = types.SimpleNamespace(**args)
    paths = generate._paths("sound", args.sound)
    generate._write_down_sounds(args, paths, transcriber or Hearing())
  except ConfigError as error:
    return out.buffer.getvalue().decode(), str(error)
  return out.buffer.getvalue().decode(), ""


@pytest.fixture
def recorded(tmp_path):
  """Sounds of 0.2, 0.4 and 0.8 seconds."""
  for name, seconds in (("a", 0.2), ("b", 0.4), ("long", 0.8)):
    wave = np.random.default_rng(0).integers(-900, 900, round(16_000 * seconds)).astype(np.int16)
    soundfile.write(tmp_path / f"{name}.wav", wave, 16_000)
  return tmp_path


def test_a_sound_in_is_a_line_out(recorded, monkeypatch, capsys):
  """At the model's rate; cut if that is asked for."""
  paths = [recorded / f"{name}.wav" for name in ("b", "a")]
  lines = f"{paths[0]}\t3200 samples\n{paths[1]}\t1600 samples\n"
  assert heard(monkeypatch, paths) == (lines, "")
  assert heard(monkeypatch, paths[:1], scores=True) == (f"-0.5000\t{paths[0]}\t3200 samples\n", "")
  long = recorded / "long.wav"
  assert heard(monkeypatch, [long], too_long="cut") == (f"{long}\t4000 samples\n", "")
  said = "long.wav has 0.80 seconds, and the model hears the first 0.5 of them\n"
  assert capsys.readouterr().err.endswith(said)


def test_of_sounds_before_a_bad_one_nothing_is_lost(recorded, monkeypatch):
  (recorded / "bad.wav").write_bytes(b"none")
  for name, message in (
    ("bad", "bad.wav: it is no WAV, FLAC, Ogg"),
    ("gone", "gone.wav: there is no such file"),
    ("long", "long.wav: it has 0.8 seconds, more than 0.5: cut it into parts, or set --too_long"),
  ):
    told, error = heard(monkeypatch, [recorded / f"{n}.wav" for n in ("a", name, "b")])
    assert told == f"{recorded}/a.wav\t1600 samples\n"
    assert message in error and "\n" not in error


def test_sounds_may_be_named_on_the_standard_input(recorded, monkeypatch):
  """A line each, in whatever bytes; empty ones are none, and no line at all is an error."""
  paths = [os.fsencode(recorded) + name for name in (b"/\xff.wav", b"/b.wav")]
  os.link(recorded / "a.wav", paths[0])
  out = io.TextIOWrapper(io.BytesIO())
  monkeypatch.setattr(sys, "stdout", out)
  args = types.SimpleNamespace(scores=False, too_long="refuse")
  given = lambda lines: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
  given(paths[0] + b"\n\r\n" + paths[1])
  generate._write_down_sounds(args, generate._paths("sound", []), Hearing())
  assert [line.split(b"\t")[0] for line in out.buffer.getvalue().splitlines()] == paths
  given(b"\n")
  with pytest.raises(ConfigError, match="or paths of such on the standard input, one a line$"):
    generate._paths("sound", [])


def test_sounds_are_heard_a_part_at_a_time(recorded, monkeypatch):
  hearing = Hearing()
  heard(monkeypatch, [recorded / "a.wav"] * (generate._SEARCHES + 2), hearing)
  assert hearing.given == [generate._SEARCHES, 2]


class Looking:
  """A captioner that tells how bright an image is, and remembers how many it was given at once."""

  rows = 1

  def __init__(self):
    self.given = []

  def __call__(self, images):
    self.given.append(len(images))
    return [[decoding.Translation(f"{image.mean():.0f}\nbright", -0.5)] for image in images]


@dataclasses.dataclass(frozen=True)
class Judging:
  """An answerer that tells the question, and of what it was asked."""

  images: int = 1
  see: Callable = lambda image: image[:2]
  rows: int = 1

  def __call__(self, asked, question):
    # Large images are not held.
    assert len(asked) == 1
    sizes = [[y.shape[0] for y in x] if self.images > 1 else x.shape for x in asked]
    return [[decoding.Translation(f"{question} {size}", 0.25)] for size in sizes]


@pytest.fixture
def drawn(tmp_path):
  """Images of 4 x 6 pixels, and a broken one."""
  for name, value in (("a", 100), ("b", 200), ("c", 50)):
    Image.new("RGB", (6, 4), (value,) * 3).save(tmp_path / f"{name}.png")
  (tmp_path / "bad.png").write_bytes(b"none")
  return tmp_path


def looked_at(monkeypatch, write, paths, *given, **args):
  """What is written of images; where one is refused, and its message."""
  out = io.TextIOWrapper(io.BytesIO())
  monkeypatch.setattr(sys, "stdout", out)
  try:
    write(types.SimpleNamespace(**{"scores": False} | args), iter(paths), *given)
  except ConfigError as error:
    return out.buffer.getvalue().decode(), str(error)
  return out.buffer.getvalue().decode(), ""


def test_an_image_in_is_a_line_out(drawn, monkeypatch):
  """As the model sees it; of those before a bad one nothing is lost."""
  see = lambda image: image[:, :2] / 2
  paths = [str(drawn / f"{name}.png") for name in ("b", "a")]
  looking = Looking()
  write = generate._describe_images
  told = looked_at(monkeypatch, write, paths, looking, see, scores=True)
  b, a = paths
  assert told == (f"-0.5000\t{b}\t100 bright\n-0.5000\t{a}\t50 bright\n", "")
  # Each is let go before the next is read.
  assert looking.given == [1, 1]
  for name, message in (("bad", "bad.png cannot be read"), ("gone", "gone.png: there is no such")):
    given = [paths[0], str(drawn / f"{name}.png"), paths[1]]
    told, error = looked_at(monkeypatch, write, given, Looking(), see)
    assert told == f"{paths[0]}\t100 bright\n" and message in error and "\n" not in error


def test_a_question_is_answered_about_each_image_or_each_two(drawn, monkeypatch):
  paths = [str(drawn / f"{name}.png") for name in "abc"]
  write, judging = generate._answer_about_images, Judging()
  told = looked_at(monkeypatch, write, paths, judging, question="what?", scores=True)
  assert told == ("".join(f"0.2500\t{path}\twhat? (2, 6, 3)\n" for path in paths), "")
  judging = Judging(images=2)
  a, b, c = paths
  told = looked_at(monkeypatch, write, [a, b, c, a], judging, question="both?")
  assert told == (f"{a}\t{b}\tboth? [2, 2]\n{c}\t{a}\tboth? [2, 2]\n", "")
  told = looked_at(monkeypatch, write, paths, judging, question="both?")
  assert told == ("", told[1]) and "3 images are given, and the model compares two" in told[1]


SEEING = {
  "model": TRANSLATING["model"] | {"positions": "learned", "image_size": 32},
  "data": {"name": "embedded/emoji/en", "tokenizer": "byte", "seq_length": 16},
}


@pytest.mark.ci
@pytest.mark.parametrize(
  ("task", "flags", "message"),
  [
    ("image_captioning", [], "give --image=FILE, of a JPEG, PNG, WebP, BMP or GIF file"),
    ("image_captioning", ["--image=x", "--question=y"], "--question is not read with a model of"),
    ("image_captioning", ["--image=x", "--max_ratio=2"], "--max_ratio is not read with a model of"),
    ("visual_question_answering", ["--image=x"], "give --question="),
    ("visual_reasoning", ["--image=x", "--prompt=y"], "--prompt is not read with a model of"),
    ("image_text_retrieval", [], "a model of config.task='image_text_retrieval' writes no text"),
  ],
)
def test_flags_of_another_kind_of_model_of_images_are_refused(task, flags, message, tmp_path):
  config = from_config_dict({"task": task, **SEEING})
  task = TASKS[task]
  record = runs.Record(config, {"answers": ["no", "yes"]}, task.planned_facts(config))
  runs.write_record(tmp_path, record)
  model = task.build_model(config, record.facts)
  variables = jax.jit(model.init)(jax.random.key(0), *task.dummy_inputs(config))
  iterator = pipelines.train_iterator([{"x": np.zeros(1)}], batch_size=1, seed=0)
  with Checkpointer(runs.checkpoints_in(tmp_path)) as checkpointer:
    checkpointer.save(1, {"params": variables["params"]}, iterator, {})
  command = [sys.executable, "-m", "magneto_jax.generate", f"--workdir={tmp_path}", *flags]
  result = subprocess.run(command, capture_output=True, text=True, input="", cwd=tmp_path)
  assert result.returncode == 2, result.stderr
  assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr
