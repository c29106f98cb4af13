"""Makes a tiny run's workdir, as this version leaves it, for later versions to read.

`python -m tests.make_checkpoint_fixture` writes tests/testdata/checkpoints/<version>/, once a
release: `run/` is the workdir, `expected.json` says what its checkpoint holds.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import shutil
import tempfile

import jax
import numpy as np

from benchmarks.reliability import states
from magneto_jax import runs, training
from magneto_jax.config import from_config_dict

FOLDER = pathlib.Path(__file__).parent / "testdata" / "checkpoints"

CONFIG = {
  "steps": 3,
  "batch_size": 4,
  "eval_every": 100,
  "eval_batches": 1,
  "checkpoint_every": 100,
  "sample_tokens": 0,
  "model": {"layers": 1, "width": 8, "ffn_width": 8, "heads": 1},
  "data": {"tokenizer": "byte", "seq_length": 16},
  "optimizer": {"warmup_steps": 1, "schedule": "constant"},
}


def main() -> None:
  """Trains, and keeps of the workdir what is read of it."""
  folder = FOLDER / importlib.metadata.version("magneto_jax")
  shutil.rmtree(folder, ignore_errors=True)
  with tempfile.TemporaryDirectory() as scratch:
    workdir = pathlib.Path(scratch)
    training.train(from_config_dict(CONFIG), workdir)
    # Nor the data: the package has them.
    shutil.copytree(runs.checkpoints_in(workdir), runs.checkpoints_in(folder / "run"))
    shutil.copy(workdir / "config.json", folder / "run")
    arrays = states.arrays(workdir, CONFIG["steps"])
  (folder / "expected.json").write_text(json.dumps(hashes(arrays), indent=1) + "\n")


def hashes(arrays) -> dict[str, str]:
  """Dtype, shape and SHA-256 of the bytes of arrays, by their paths."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
    bits = hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
    found[jax.tree_util.keystr(path)] = f"{leaf.dtype} {list(leaf.shape)} {bits}"
  return found


if __name__ == "__main__":
  main()
