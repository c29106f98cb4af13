"""The environment of every test, set before jax is imported, and inherited by subprocesses."""

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
# Programs of tests are compiled more often than they are run, and LLVM's optimization is a third of
# all of a test run. What XLA makes of a program (fusions, memory, collectives) comes before it.
if os.environ["JAX_PLATFORMS"] == "cpu":
  os.environ["XLA_FLAGS"] = (
    f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".strip()
  )
# pyplot must not look for a screen.
os.environ.setdefault("MPLBACKEND", "agg")
# No persistent compilation cache: a test of compilation counts or of donation must not pass because
# an earlier run left something behind.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"


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
