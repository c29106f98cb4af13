"""The README's picture, from the results of two parts: what fails at depth, and what does not."""

import pathlib
from collections.abc import Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.stability import pictures, update

PARTS = ("update", "propagation")

# Of GitHub's pages, and colours of equal contrast on them, for any colour vision: warm for what
# fails in some panel.
THEMES = {
  "light": {"page": "#ffffff", "ink": "#1f2328", "grid": "#d1d9e0", "pale": "#59636e"},
  "dark": {"page": "#0d1117", "ink": "#f0f6fc", "grid": "#3d444d", "pale": "#9198a1"},
}
_COLOURS = {
  "light": ("#c2410c", "#b7791f", "#0072b2", "#8250df", "#00805f"),
  "dark": ("#ff8a5c", "#f2c14e", "#58a6ff", "#c297ff", "#3fd0a4"),
}
# Names, marks, and the lines of the results of `propagation`; those of `update` are the keys.
_NAMES = {
  "post_ln": ("Post-LN", "s", "post_ln, dropout 0.1"),
  "pre_ln": ("Pre-LN", "^", "pre_ln, dropout 0.1"),
  "magneto": ("Magneto", "o", None),
  "deepnet": ("DeepNet", "D", None),
  "deepscalelm": ("DeepScaleLM", "v", "deepscalelm"),
}


def draw(found: Mapping[str, dict], path: pathlib.Path, theme: str) -> None:
  """Three panels: the first update against depth; stream and gradient through a deep encoder."""
  colours = THEMES[theme]
  ink = {"text.color": colours["ink"], "axes.labelcolor": colours["ink"]}
  ink |= {f"{axis}tick.color": colours["pale"] for axis in "xy"}
  ink |= {"axes.edgecolor": colours["pale"], "grid.color": colours["grid"], "font.size": 10.5}
  ink |= {"axes.facecolor": colours["page"], "savefig.facecolor": colours["page"]}
  with rc_context(ink):
    figure = Figure(figsize=(12.6, 4.5), dpi=144, layout="constrained")
    first, second, third = figure.subplots(1, 3)
    styles = {
      recipe: {"color": colour, "marker": mark, "label": name}
      for (recipe, (name, mark, _)), colour in zip(_NAMES.items(), _COLOURS[theme], strict=True)
    }
    _update(first, found["update"], styles)
    _through_layers(second, found["propagation"], "variance", styles)
    _through_layers(third, found["propagation"], "gradient", styles)
    layers = found["propagation"]["setup"]["layers"]
    titles = (
      ("Post-LN's first update explodes", "layers", "first update / learning rate"),
      ("Pre-LN's stream grows", f"layer of {layers}", "variance of the stream"),
      ("Post-LN's gradient vanishes", f"layer of {layers}", "squared gradient / last layer's"),
    )
    for axes, (title, x, y) in zip((first, second, third), titles, strict=True):
      axes.set_yscale("log")
      pictures.tidy(axes, xlabel=x, ylabel=y)
      axes.set_title(title, fontsize=12.5, fontweight="bold", pad=10)
      axes.grid(alpha=0.6, lw=0.7)
    entries = [Line2D([], [], lw=1.6, ms=5.5, **style) for style in styles.values()]
    pale = {"color": colours["pale"], "ms": 5.5}
    entries += [Line2D([], [], lw=1.6, label="line: predicted", **pale)]
    entries += [Line2D([], [], lw=0, marker="o", label="marks: measured", **pale)]
    pictures.save(figure, path, entries, columns=len(entries))


def _update(axes, results: dict, styles: Mapping[str, dict]) -> None:
  """Of the layers' matrices, as the papers' theorems have it; 0 and what is not finite left out."""
  depths = results["depths"]
  for recipe, style in styles.items():
    entry = results["lines"][recipe]
    measured = [value or np.nan for value in entry["measured"]["matrices"]]
    look = {"color": style["color"]}
    axes.plot(depths, measured, lw=0, ms=5.5, marker=style["marker"], **look)
    predicted = update.scaled(entry["predicted"]["matrices"], entry["measured"]["matrices"])
    axes.plot(depths, predicted, lw=1.6, **look)
  pictures.depth_axis(axes, depths)


def _through_layers(axes, results: dict, figure: str, styles: Mapping[str, dict]) -> None:
  for recipe, style in styles.items():
    line = _NAMES[recipe][2]
    if line is None:
      continue
    entry = results["lines"][line]
    measured = np.array(entry["measured"][figure], np.float64)
    axes.plot(entry["predicted"][figure], lw=1.6, color=style["color"])
    at = np.unique(np.linspace(0, len(measured) - 1, 13).round().astype(int))
    axes.plot(at, measured[at], lw=0, ms=5.5, color=style["color"], marker=style["marker"])
