"""A run's stream and gradient, layer by layer, while it trains.

Every `diagnostics_every` steps the model of the moment is measured on one fixed batch, with one
fixed dropout, so that what changes is the model's. <workdir>/diagnostics.jsonl holds all figures,
a line a measurement; metrics.jsonl and TensorBoard get those of the last layer; diagnostics.png
shows the first and the last measurement beside what the theory predicted of the start. Without
measurements a run compiles and computes nothing of this.
"""

import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from magneto_jax import diagnostics, reporting
from magneto_jax.theory import stability

FILE = "diagnostics.jsonl"


class Monitor:
  """Measures a run's model and keeps the figures."""

  def __init__(
    self,
    workdir: pathlib.Path,
    model: nn.Module,
    calls,
    batch,
    *,
    after_step: int,
    writes: bool = True,
  ):
    """Compiles nothing yet; lines after `after_step`, of a run cut short, are dropped.

    Args:
      workdir: of the run.
      model, calls, batch: see `diagnostics.examine`.
      after_step: the step from which the run goes on.
      writes: whether this is the host that keeps the figures; all hosts measure together.
    """
    self._workdir, self._model = workdir, model
    self._measure = diagnostics.measurer(model, calls, batch, jax.random.key(0))
    self._rows = [row for row in read(workdir) if row["step"] <= after_step]
    self._writes = writes
    if not writes:
      return
    path, lines = workdir / FILE, "".join(json.dumps(row) + "\n" for row in self._rows)
    temporary = path.with_suffix(".tmp")  # So that a crash loses no row.
    temporary.write_text(lines)
    temporary.replace(path)

  @property
  def steps(self) -> list[int]:
    """At which steps the run was measured."""
    return [row["step"] for row in self._rows]

  def record(self, step: int, variables) -> dict[str, float]:
    """Measures; returns the figures of the last layer for the metrics."""
    measured, update = self._measure(variables)
    stacks = {kind: m._asdict() for kind, m in measured.items()}
    row = diagnostics.jsonable({"step": step, "stacks": stacks, "first_update": update._asdict()})
    self._rows.append(row)
    if self._writes:
      with (self._workdir / FILE).open("a") as file:
        file.write(json.dumps(row) + "\n")
    metrics = {}
    for kind, m in measured.items():
      figures = {
        "variance": m.variance[-1],
        "correlation": m.correlation[-1],
        "largest": m.largest.max(),
        "gradient_norm_first_over_last": stability.first_over_last(m.gradient),
      }
      metrics |= {f"diagnostics/{kind}/{name}": float(value) for name, value in figures.items()}
    metrics["diagnostics/first_update"] = update.matrices
    return {name: value for name, value in metrics.items() if math.isfinite(value)}

  def report(self) -> tuple[dict[str, Any], list[str]]:
    """Draws diagnostics.png; what the summary and the terminal say of the run.

    The prediction is of the start: a run whose first steps were not measured is shown without it.
    """
    first, last = (_measured(self._rows[i]["stacks"]) for i in (0, -1))
    begin, end = (f"step {self.steps[i]:,}" for i in (0, -1))
    predicted = diagnostics.predict(self._model, first)[0] if self.steps[0] == 0 else {}
    diagnostics.draw_run(
      {begin: first, end: last},
      predicted,
      self._workdir / "diagnostics.png",
      title=f"stream and gradient by layer, {begin} and {end}",
    )
    summary, lines = {"steps": [self.steps[0], self.steps[-1]]}, []
    for kind, was in first.items():
      now, theory = last[kind], predicted.get(kind)
      for name, read in {
        "stream variance": lambda m: float(m.variance[-1]),
        "token correlation": lambda m: float(m.correlation[-1]),
        "gradient norm, first layer / last": lambda m: stability.first_over_last(m.gradient),
      }.items():
        expected = None if theory is None else read(theory)
        figures = {"first": read(was), "predicted": expected, "last": read(now)}
        summary[f"{kind}: {name}"] = figures
        said = "" if theory is None else f" (predicted {expected:.3g})"
        lines.append(f"{kind}: {name} {read(was):.3g} at {begin}{said}, {read(now):.3g} at {end}")
      lines += [f"{kind}: {f.text}" for f in diagnostics.findings_of({kind: now})]
    return diagnostics.jsonable(summary), lines


def read(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
  """The measurements of a run, oldest first; a last line cut short by a crash is left out."""
  return reporting.read_lines(pathlib.Path(workdir) / FILE)


def _measured(stacks: dict[str, Any]) -> dict[str, diagnostics.Measured]:
  # What was not finite was written as null.
  array = lambda value: np.array(value, np.float64) if isinstance(value, list) else value
  return {
    kind: diagnostics.Measured(**{name: array(value) for name, value in m.items()})
    for kind, m in stacks.items()
  }
