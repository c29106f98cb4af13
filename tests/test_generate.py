"""The command that continues a prompt, against the library."""

import re
import subprocess
import sys

import jax
import numpy as np

from magneto_jax import decoding, runs
from magneto_jax.checkpoints import Checkpointer
from magneto_jax.config import from_config_dict
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
