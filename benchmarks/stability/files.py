"""What a part leaves: its results file, its picture, and the newest of its results."""

import importlib.metadata
import json
import math
import pathlib
import platform

from benchmarks import coordinator

DOCS = coordinator.ROOT / "docs"


def head(part: str) -> dict:
  """Where, when, how and with which versions."""
  names = ("magneto_jax", "jax", "jaxlib", "flax", "optax", "numpy")
  versions = {name: importlib.metadata.version(name) for name in names}
  versions["python"] = platform.python_version()
  return coordinator.provenance("stability", {}) | {"part": part, "versions": versions}


def save(results: dict, folder: pathlib.Path = coordinator.RESULTS) -> pathlib.Path:
  """Writes a part's results of its date; what is not finite is null."""
  path = folder / f"stability-{results['part']}-{results['date'][:10]}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(finite(results), indent=1, allow_nan=False) + "\n", encoding="utf-8")
  return path


def newest(part: str, folder: pathlib.Path = coordinator.RESULTS) -> dict | None:
  """The part's results of the latest date; None if there are none."""
  paths = sorted(folder.glob(f"stability-{part}-*.json"))
  return json.loads(paths[-1].read_text(encoding="utf-8")) if paths else None


def finite(value):
  """JSON-able values, None for what is not finite."""
  if isinstance(value, dict):
    return {str(name): finite(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [finite(item) for item in value]
  if isinstance(value, float):
    # Six digits are more than any of these figures is known to.
    return float(f"{value:.6g}") if math.isfinite(value) else None
  return value
