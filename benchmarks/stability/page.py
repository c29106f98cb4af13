"""Writes docs/stability.md and its pictures from the newest results of each part."""

import pathlib
from collections.abc import Mapping

from benchmarks import coordinator
from benchmarks.stability import (
  files,
  glance,
  gradients,
  propagation,
  rate,
  training,
  update,
  words,
)

PARTS = {
  "update": (update, "The first update against depth"),
  "rate": (rate, "The largest learning rate"),
  "gradients": (gradients, "Gradients by layer, early in training"),
  "propagation": (propagation, "The stream and its gradient through a deep encoder"),
  "training": (training, "Training a very deep decoder"),
}

HEAD = (
  "# Stability: the papers' claims beside what this library measures",
  "",
  "`python -m benchmarks.stability` measures, on a CPU and at toy sizes, what the papers claim of"
  " depth: DeepNet (arXiv 2203.00555), Foundation Transformers, or Magneto (arXiv 2210.06423),"
  " NormFormer (arXiv 2110.09456) and DeepScaleLM (arXiv 2403.09635). Each verdict follows from the"
  " figures by the criterion that stands with the claim; the criteria are ours. What is not"
  " supported at these sizes may hold at the papers'. Tables and verdicts are written from the"
  " files in [benchmarks/results](../benchmarks/results).",
  "",
  "Machine: two cores of an AMD EPYC, shared with other work while this ran. `--parts` chooses what"
  " is measured; with `--parts=` only this page and its pictures are written anew.",
)


def results_of(folder: pathlib.Path = coordinator.RESULTS) -> dict[str, dict]:
  """The newest results of each part that has any."""
  found = {part: files.newest(part, folder) for part in PARTS}
  return {part: results for part, results in found.items() if results is not None}


def text(found: Mapping[str, dict]) -> str:
  """The page; a pure function of the results."""
  lines = list(HEAD)
  for part, results in found.items():
    module, title = PARTS[part]
    lines += ["", f"## {title}", "", f"![{title}](stability-{part}.png)", ""]
    lines += [*module.section(results), "", words.origin(results)]
  return "\n".join(lines) + "\n"


def write(found: Mapping[str, dict], folder: pathlib.Path = files.DOCS) -> pathlib.Path:
  """Draws the pictures, the README's among them, and writes the page."""
  path = folder / "stability.md"
  path.parent.mkdir(parents=True, exist_ok=True)
  for part, results in found.items():
    PARTS[part][0].draw(results, folder / f"stability-{part}.png")
  if all(part in found for part in glance.PARTS):
    for theme in glance.THEMES:
      glance.draw(found, folder / f"depth-{theme}.png", theme)
  path.write_text(text(found), encoding="utf-8")
  return path
