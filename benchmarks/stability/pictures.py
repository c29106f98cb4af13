"""What the parts' pictures share: panels, labels, and one legend below."""

import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D


def panels(rows: int, columns: int, *, title: str, width: float = 5.0, height: float = 4.0):
  """A figure and its axes [rows, columns]."""
  figure = Figure(figsize=(width * columns, height * rows + 0.9), dpi=120, layout="constrained")
  figure.suptitle(title)
  return figure, figure.subplots(rows, columns, squeeze=False)


def tidy(axes, **labels) -> None:
  """Labels, a light grid and no box."""
  axes.set(**labels)
  axes.grid(alpha=0.25)
  axes.spines[["top", "right"]].set_visible(False)


def depth_axis(axes, depths: Sequence[int]) -> None:
  """Depth on a logarithmic axis, marked where it was measured."""
  axes.set_xscale("log")
  axes.set_xticks(depths, [str(depth) for depth in depths])
  axes.minorticks_off()


def handles(styles: dict, **kinds: dict) -> list:
  """A legend's entries: the names' styles, then grey ones for what lines and marks mean."""
  named = [Line2D([], [], label=name, ms=5, lw=1.4, **style) for name, style in styles.items()]
  grey = [Line2D([], [], color="#666666", label=label, **kind) for label, kind in kinds.items()]
  return named + grey


def save(figure, path: pathlib.Path, entries: list | None = None, columns: int = 6) -> None:
  """Writes the picture, with a legend below it."""
  if entries:
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, frameon=False)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)
