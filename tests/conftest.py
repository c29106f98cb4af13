"""The environment of every test, set before jax is imported, and inherited by subprocesses."""

import importlib.metadata
import os

# Tests pass without an accelerator; JAX_PLATFORMS=cuda (or tpu) runs the same ones on it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Accelerators round the factors of float32 products unless told otherwise.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# A missing axis must not be filled in by silent broadcasting.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# XLA's pool (NPROC) and the BLAS of numpy take a thread a core by default: with pytest-xdist that
# would be cores x workers of them, and other sums on other machines.
os.environ.setdefault("NPROC", "2")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Programs of tests are compiled more often than they are run, and most of a test run is that: so
# LLVM optimizes nothing, and jax 0.10 takes its older emitters of fusions, which are compiled in
# half the time (later ones have none). What XLA makes of a program (fusions, memory, collectives)
# comes before all this.
if os.environ["JAX_PLATFORMS"] == "cpu":
  _flags = ["--xla_backend_optimization_level=0"]
  if importlib.metadata.version("jaxlib").startswith("0.10."):
    _flags.append("--xla_cpu_use_fusion_emitters=false")
  os.environ["XLA_FLAGS"] = " ".join([*_flags, os.environ.get("XLA_FLAGS", "")]).strip()
# pyplot must not look for a screen.
os.environ.setdefault("MPLBACKEND", "agg")
# No persistent compilation cache: a test of compilation counts or of donation must not pass because
# an earlier run left something behind.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# Tests say `jax.enable_x64`, which jax 0.7 has among its experiments.
if importlib.metadata.version("jax").startswith("0.7."):
  import jax
  import jax.experimental

  jax.enable_x64 = jax.experimental.enable_x64


def pytest_addoption(parser):
  parser.addoption(
    "--reference",
    default=os.path.join(os.path.dirname(__file__), "testdata"),
    help="folder of reference files for parity_test.py",
  )
  parser.addoption(
    "--moments",
    default=os.path.join(os.path.dirname(__file__), "testdata", "moments_reference.json"),
    help="file of settings, closed forms and simulations for theory/moments_test.py",
  )
