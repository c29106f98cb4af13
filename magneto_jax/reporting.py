"""What a person sees of a run: tables, progress, metrics files and the learning curve."""

import contextlib
import importlib.metadata
import json
import math
import pathlib
import platform
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console
import rich.progress
import rich.table

from magneto_jax import sharding


def in_units(value: float, unit: str, *, base: int = 1000) -> str:
  """`3.21 GFLOP`, `45.0 MiB`: three digits and a prefix."""
  prefixes = ["", "k", "M", "G", "T", "P", "E"] if base == 1000 else ["", "Ki", "Mi", "Gi", "Ti"]
  power = 0
  while abs(value) >= base and power < len(prefixes) - 1:
    value, power = value / base, power + 1
  return (
    f"{value:.3g} {prefixes[power]}{unit}"
    if value < 100
    else (f"{value:.0f} {prefixes[power]}{unit}")
  )


def duration(seconds: float) -> str:
  """`45 s`, `3 min 20 s`, `2 h 05 min`."""
  seconds = round(seconds)
  if seconds < 60:
    return f"{seconds} s"
  minutes = seconds / 60
  if minutes < 60:
    return f"{int(minutes)} min {int(seconds % 60):02d} s"
  return f"{int(minutes / 60)} h {int(minutes % 60):02d} min"


def make_console(*, quiet: bool = False) -> rich.console.Console:
  """The terminal or the notebook, or else a page wide enough for tables; a quiet one is mute."""
  console = rich.console.Console(quiet=quiet)
  if console.is_terminal or console.is_jupyter:
    return console
  return rich.console.Console(width=120, quiet=quiet)


def say(console: rich.console.Console, lines: Sequence[str]) -> None:
  """Prints plain lines, in a notebook as one output: none is read as markup, cut or coloured."""
  console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


def parameter_table(params) -> rich.table.Table:
  """Path, shape, count and standard deviation of every parameter (no deviation if abstract)."""
  table = rich.table.Table(title="Parameters", title_justify="left", box=None, pad_edge=False)
  table.add_column("path", overflow="fold")
  for column in ("shape", "count", "std"):
    table.add_column(column, justify="right")
  total = 0
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  deviations = [None] * len(leaves)
  if not any(isinstance(leaf, jax.ShapeDtypeStruct) for _, leaf in leaves):
    # Compiled: no host may be able to read all of a parameter.
    deviations = jax.jit(lambda arrays: sharding.replicate([x.std() for x in arrays]))(
      [leaf for _, leaf in leaves]
    )
  for (path, leaf), deviation in zip(leaves, deviations, strict=True):
    name = sharding.path_name(path)
    std = "" if deviation is None else f"{float(deviation):.3g}"
    shape = " x ".join(map(str, leaf.shape))
    table.add_row(name, shape, f"{math.prod(leaf.shape):,}", std)
    total += math.prod(leaf.shape)
  table.add_section()
  table.add_row("total", "", f"{total:,}", "")
  return table


def versions() -> dict[str, str]:
  """Of what decides a figure."""
  return {
    "magneto_jax": importlib.metadata.version("magneto_jax"),
    "jax": jax.__version__,
    "python": platform.python_version(),
  }


def count(params) -> int:
  """How many numbers the parameters hold."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


class Stopwatch:
  """Seconds of running time, without the pauses."""

  def __init__(self):
    self._before, self._since = 0.0, time.perf_counter()

  @property
  def seconds(self) -> float:
    return self._before + time.perf_counter() - self._since

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    self._before = self.seconds
    try:
      yield
    finally:
      self._since = time.perf_counter()


# Seconds between two pictures of the bar in a notebook, which each are a message.
_REDRAWN = 0.5


class Progress:
  """A live bar on a terminal or in a notebook, plain lines elsewhere."""

  def __init__(self, console: rich.console.Console, *, start: int, total: int):
    self._console, self._total, self._task = console, total, None
    self._live = (console.is_terminal or console.is_jupyter) and not console.quiet
    self._output, self._drawn = None, 0.0  # In a notebook: where the bar stands, and since when.
    if self._live:
      columns = rich.progress
      self._bar = columns.Progress(
        columns.TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
        columns.BarColumn(),
        columns.TextColumn("{task.fields[status]}"),
        columns.TextColumn("time left"),
        columns.TimeRemainingColumn(),
        console=console,
        auto_refresh=not console.is_jupyter,
      )
      self._task = self._bar.add_task("", total=total, completed=start, status="compiling")

  def __enter__(self) -> "Progress":
    if self._live and self._console.is_jupyter:
      import IPython.display

      self._output = IPython.display.display(self._table(), display_id=True)
    elif self._live:
      self._bar.start()
    return self

  def __exit__(self, *exc_info) -> None:
    if self._output is not None:
      self._output.update(self._table())
    elif self._live:
      self._bar.stop()

  def _table(self) -> rich.table.Table:
    """The bar as a notebook shows and stores it, which needs no widgets."""
    return self._bar.make_tasks_table(self._bar.tasks)

  def step(self, step: int, status: str) -> None:
    """One step has been taken."""
    if self._live:
      self._bar.update(self._task, completed=step, status=status)
    if self._output is not None and time.perf_counter() - self._drawn > _REDRAWN:
      self._drawn = time.perf_counter()
      self._output.update(self._table())

  def line(self, text: str, *, terminal: bool = True) -> None:
    """A line above the bar; `terminal=False` for what the bar shows anyway."""
    if terminal or not self._live:
      say(self._console, [text])
      if not self._live:
        sys.stdout.flush()


class MetricWriter:
  """Metrics by step in `metrics.jsonl` (a JSON object a line) and for TensorBoard."""

  def __init__(self, workdir: pathlib.Path | None, *, after_step: int):
    """Opens the files; lines after `after_step`, left by a run cut short, are dropped.

    Without a workdir nothing is written: of several hosts one keeps the metrics.
    """
    self._file = self._board = None
    if workdir is None:
      return
    import tensorboardX  # Slow to import, and needed by nobody who only reads this module.

    self._path = workdir / "metrics.jsonl"
    kept = [row for row in read_metrics(workdir) if row["step"] <= after_step]
    temporary = self._path.with_suffix(".tmp")  # So that a crash loses no row.
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    temporary.replace(self._path)
    self._file = self._path.open("a", buffering=1)
    board = str(workdir / "tensorboard")
    self._board = tensorboardX.SummaryWriter(board, purge_step=after_step + 1)

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Adds one line."""
    if self._file is None:
      return
    self._file.write(json.dumps({"step": step, **metrics}) + "\n")
    for name, value in metrics.items():
      self._board.add_scalar(name, value, step)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._board.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
  """The rows of a run's metrics.jsonl."""
  return read_lines(pathlib.Path(workdir) / "metrics.jsonl")


def has_validation(workdir: pathlib.Path, step: int) -> bool:
  """Whether a run's metrics.jsonl tells what an evaluation at a step has found."""
  rows = (row for row in read_metrics(workdir) if row["step"] == step)
  return any(name.startswith("validation/") for row in rows for name in row)


def read_lines(path: pathlib.Path) -> list[dict]:
  """The JSON objects of a file, one a line; no file has none, and a line cut short is left out."""
  rows = []
  for line in path.read_text().splitlines() if path.exists() else []:
    with contextlib.suppress(json.JSONDecodeError):
      rows.append(json.loads(line))
  return rows


def in_words(scores: Mapping[str, float]) -> str:
  """`3.7076 nats a token, 2.4560 bits a byte`: values before their names."""
  return ", ".join(f"{value:.4f} {words_of(name)}" for name, value in scores.items())


def spread(summaries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
  """What the metrics of several runs come to.

  Args:
    summaries: of the runs; metrics are what all of them call `validation_...` and `best_...`, but
      for `best_step`.

  Returns:
    {metric: {"mean", "std", "median", "values"}}; std is that of a sample, its square a sum over
    n - 1, and None for one run.
  """
  found = {}
  for name in summaries[0]:
    is_metric = name.startswith(("validation_", "best_")) and name != "best_step"
    if not is_metric or not all(name in summary for summary in summaries):
      continue
    values = [summary[name] for summary in summaries]
    found[name] = {
      "mean": statistics.fmean(values),
      "std": statistics.stdev(values) if len(values) > 1 else None,
      "median": statistics.median(values),
      "values": values,
    }
  return found


def spread_table(metrics: Mapping[str, Mapping[str, Any]], *, title: str) -> rich.table.Table:
  """`spread` as a table."""
  table = rich.table.Table(title=title, title_justify="left", box=None, pad_edge=False)
  table.add_column("metric")
  for column in ("mean", "std (n - 1)", "median", "values"):
    table.add_column(column, justify="right")
  number = lambda value: "" if value is None else f"{value:.4f}"
  for name, found in metrics.items():
    figures = (found["mean"], found["std"], found["median"])
    table.add_row(name, *map(number, figures), ", ".join(map(number, found["values"])))
  return table


def words_of(name: str) -> str:
  """A metric's name as a person says it: `nats a token` for `loss_nats_per_token`."""
  return name.removeprefix("loss_").replace("_per_", " a ").replace("_", " ")


def draw_learning_curve(workdir: pathlib.Path, *, title: str, loss_name: str) -> pathlib.Path:
  """Draws loss by step, training and validation, into `learning_curve.png`.

  Args:
    workdir: where metrics.jsonl lies.
    title: the title of the picture.
    loss_name: the metric that is the mean loss, named with its unit: `loss_nats_per_token`.
  """
  from matplotlib.figure import Figure

  rows, validated = read_metrics(workdir), f"validation/{loss_name}"
  unit = words_of(loss_name)
  figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
  axes = figure.subplots()
  for name, label, style in (
    ("train/loss", "training", dict(color="#9ab7d3", linewidth=1.2)),
    (validated, "validation", dict(color="#1f4e79", marker="o", ms=4)),
  ):
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
      axes.plot(*zip(*points, strict=True), label=label, **style)
  validation = [(row["step"], row[validated]) for row in rows if validated in row]
  if validation:
    step, value = validation[-1]
    axes.annotate(
      f"{value:.3f}", (step, value), textcoords="offset points", xytext=(0, 8), ha="center"
    )
  axes.set(xlabel="optimizer step", ylabel=f"loss ({unit})", title=title)
  axes.grid(alpha=0.25)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False)
  path = pathlib.Path(workdir) / "learning_curve.png"
  figure.savefig(path)
  return path


class Row(NamedTuple):
  """A row of a picture of examples.

  Attributes:
    title: stands above its first image.
    images: uint8 [H, W, 3] each.
    captions: what stands below each; none: nothing.
  """

  title: str
  images: Sequence[np.ndarray]
  captions: Sequence[str] = ()


# What is drawn at the end of a run whose task has examples to look at.
EXAMPLES = "examples.png"


def draw_examples(workdir: pathlib.Path, rows: Sequence[Row], *, title: str) -> pathlib.Path:
  """Draws rows of images into a workdir's `examples.png`; returns its path. See `draw_rows`."""
  return draw_rows(workdir / EXAMPLES, rows, title=title)


def draw_rows(path: pathlib.Path, rows: Sequence[Row], *, title: str) -> pathlib.Path:
  """Draws rows of images into a PNG file, each pixel with sharp edges; returns its path.

  All of a row are scaled alike, to the room that the longest row's images have.
  """
  from matplotlib.figure import Figure

  columns = max(len(row.images) for row in rows)
  width = max(1.5, 6.0 / columns)
  aspects = [max(image.shape[0] / image.shape[1] for image in row.images) for row in rows]
  words = [0.55 if any(row.captions) else 0.3 for row in rows]
  heights = [width * aspect + text for aspect, text in zip(aspects, words, strict=True)]
  size = (width * columns, sum(heights) + 0.5)
  figure = Figure(figsize=size, dpi=120, layout="constrained")
  grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
  for row, of_row in zip(rows, grid, strict=True):
    for axes in of_row:
      axes.set(xticks=[], yticks=[])
      axes.spines[:].set_visible(False)
    of_row[0].set_title(row.title, loc="left", fontsize=8, parse_math=False)
    for axes, image in zip(of_row, row.images, strict=False):
      axes.imshow(image, interpolation="nearest")
    for axes, caption in zip(of_row, row.captions, strict=False):
      # As many letters as there is room for; they may hold what TeX takes for formulae.
      lines = textwrap.wrap(caption, int(17 * width), max_lines=3, placeholder="...")
      axes.set_xlabel("\n".join(lines), fontsize=7, parse_math=False)
  figure.suptitle(title, fontsize=10, parse_math=False)
  with warnings.catch_warnings():
    # Captions may hold what the font has not: a box stands for it.
    warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
    figure.savefig(path, format="png")
  return path


# Okabe and Ito's colours, which people with any colour vision tell apart; beyond them lines are
# told apart by their dashes and marks.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":")


def line_styles(names: Sequence[str]) -> dict[str, dict[str, str]]:
  """Colour, dashes and mark of each name: no two alike, for any colour vision."""
  return {
    name: {
      "color": COLOURS[i % len(COLOURS)],
      "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
      "marker": MARKS[(i + i // len(COLOURS)) % len(MARKS)],
    }
    for i, name in enumerate(names)
  }


class Curve(NamedTuple):
  """One line of a panel, by layer: `predicted` is drawn as a line, `measured` as marks.

  Attributes:
    measured, predicted: [L + 1]; None for what there is not.
    band: the factor by which the prediction is known to err, 1 for none; a number, or one a layer.
  """

  measured: np.ndarray | None
  predicted: np.ndarray | None
  band: float | np.ndarray = 1.0


class Panel(NamedTuple):
  """A panel: its title, the label of its y axis, and a curve for each name."""

  title: str
  label: str
  curves: Mapping[str, Curve]
  log: bool = True


class Bars(NamedTuple):
  """A panel by name: (measured, predicted) of each."""

  title: str
  label: str
  values: Mapping[str, tuple[float, float]]


def draw_by_layer(
  path: pathlib.Path, panels: Sequence[Panel], bars: Bars | None = None, *, title: str
) -> pathlib.Path:
  """Draws panels over the layers: predictions as lines, measurements as marks, names as colours."""
  from matplotlib.figure import Figure
  from matplotlib.lines import Line2D
  from matplotlib.ticker import MaxNLocator

  names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
  styles = line_styles(names)
  count = len(panels) + (bars is not None)
  columns = 2 if count == 4 else min(count, 3)
  rows = -(-count // columns)
  figure = Figure(figsize=(5.4 * columns, 4.0 * rows + 0.9), dpi=120, layout="constrained")
  grid = list(figure.subplots(rows, columns, squeeze=False).flat)
  for axes, panel in zip(grid, panels, strict=False):
    for name, curve in panel.curves.items():
      _draw_curve(axes, curve, styles[name])
    axes.set(title=panel.title, xlabel="layer (0: the stack's input)", ylabel=panel.label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.log:
      axes.set_yscale("log")
    else:  # A share: small differences must not fill the panel.
      low, high = axes.get_ylim()
      axes.set_ylim(min(low, 0.0), max(high, 1.02))
  if bars is not None:
    _draw_bars(grid[len(panels)], bars, styles)
  for axes in grid[:count]:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
  for axes in grid[count:]:
    axes.set_visible(False)
  handles = [Line2D([], [], label=name, ms=5, lw=1.4, **styles[name]) for name in names]
  grey = {"color": "#666666", "lw": 1.4}
  curves = [curve for panel in panels for curve in panel.curves.values()]
  has_bands = any(np.any(np.asarray(curve.band) != 1.0) for curve in curves)
  shade = " (shade: its known error)" if has_bands else ""
  handles += [
    Line2D([], [], label=f"line: predicted{shade}", **grey),
    Line2D([], [], label="marks: measured", marker="o", ms=5, **{**grey, "lw": 0}),
  ]
  # Ten letters an inch, with the sample of the line.
  longest = max(len(handle.get_label()) for handle in handles)
  fit = int(10 * figure.get_figwidth() / (longest + 8))
  figure.legend(
    handles=handles,
    loc="outside lower center",
    ncols=max(1, min(8, fit, len(handles))),
    frameon=False,
  )
  figure.suptitle(title)
  figure.savefig(path)
  return path


def _draw_bars(axes, bars: Bars, styles: Mapping[str, Mapping[str, str]]) -> None:
  for i, (name, (measured, predicted)) in enumerate(bars.values.items()):
    style = {"color": styles[name]["color"], "lw": 0}
    axes.plot([i], [measured], marker=styles[name]["marker"], ms=7, **style)
    axes.plot([i], [predicted], marker="_", ms=16, mew=2, **style)
  axes.set_xticks(range(len(bars.values)), bars.values, rotation=40, ha="right")
  axes.set_xlim(-0.7, len(bars.values) - 0.3)
  is_positive = any(value > 0 for pair in bars.values.values() for value in pair)
  scale = "log" if is_positive else "linear"
  axes.set(title=bars.title, ylabel=bars.label, yscale=scale)


def _draw_curve(axes, curve: Curve, style: Mapping[str, str]) -> None:
  colour = style["color"]
  if curve.predicted is not None:
    layers = np.arange(len(curve.predicted))
    axes.plot(layers, curve.predicted, lw=1.4, color=colour, linestyle=style["linestyle"])
    if np.any(np.asarray(curve.band) != 1.0):
      low, high = curve.predicted / curve.band, curve.predicted * curve.band
      axes.fill_between(layers, low, high, color=colour, alpha=0.12, lw=0)
  if curve.measured is not None:
    # As many marks as can be told apart, the first and the last layer among them.
    last = len(curve.measured) - 1
    at = np.unique(np.round(np.linspace(0, last, min(last, 14) + 1)).astype(int))
    axes.plot(at, curve.measured[at], lw=0, ms=4.5, color=colour, marker=style["marker"])
