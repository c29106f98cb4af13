"""What a person reads of a run: units, the clock and the metrics file."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from magneto_jax import reporting


@pytest.mark.parametrize(
  "words, expected",
  [
    (reporting.in_units(3.21e9, "FLOP"), "3.21 GFLOP"),
    (reporting.in_units(999, "B"), "999 B"),
    (reporting.in_units(1000, "B"), "1 kB"),
    (reporting.in_units(45 * 2**20, "B", base=1024), "45 MiB"),
    (reporting.in_units(1024, "B", base=1024), "1 KiB"),
    (reporting.duration(45), "45 s"),
    (reporting.duration(200), "3 min 20 s"),
    (reporting.duration(2 * 3600 + 5 * 60 + 59), "2 h 05 min"),
  ],
)
def test_figures_in_words(words, expected):
  assert words == expected


def test_count_is_of_numbers():
  assert (
    reporting.count({"a": jnp.zeros((2, 3)), "b": {"c": jnp.zeros(4), "d": jnp.zeros(())}}) == 11
  )


def test_pauses_do_not_count(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(reporting.time, "perf_counter", lambda: now[0])
  stopwatch = reporting.Stopwatch()
  for running, pause in ((2.0, 50.0), (3.0, 70.0)):
    now[0] += running
    with stopwatch.paused():
      now[0] += pause
  now[0] += 4.0
  assert stopwatch.seconds == 2.0 + 3.0 + 4.0


def test_a_resumed_run_drops_what_lies_after_its_checkpoint(tmp_path):
  """Rows of later steps and a row that a crash cut short; no step is there twice."""
  rows = [{"step": step, "train/loss": 1.0 / step} for step in (1, 2, 3, 4)]
  lines = [json.dumps(row) for row in rows]
  (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, lines[0][:9]]))
  assert reporting.read_metrics(tmp_path) == rows
  writer = reporting.MetricWriter(tmp_path, after_step=2)
  writer.write(3, {"train/loss": 5.0})
  writer.close()
  assert reporting.read_metrics(tmp_path) == [*rows[:2], {"step": 3, "train/loss": 5.0}]


def test_examples_hold_all_images_and_words(monkeypatch, tmp_path):
  """Every image once, at one scale, in rows of any length, whatever the words are."""
  colours = ((250, 10, 10), (10, 200, 10), (10, 10, 220))
  images = [np.full((4, 4, 3), colour, np.uint8) for colour in colours]
  texts = []
  set_text = Text.set_text
  monkeypatch.setattr(Text, "set_text", lambda self, s: texts.append(s) or set_text(self, s))
  # The last caption is of a letter that the font has not, and of none.
  rows = [reporting.Row("first", images[:2], ["a", "$x$ " * 60])]
  rows.append(reporting.Row("$", images[2:], ["\u4e2d\x13"]))
  path = reporting.draw_examples(tmp_path, rows, title="$t")
  assert path == tmp_path / "examples.png"
  with Image.open(path) as picture:
    pixels = np.asarray(picture.convert("RGB"))
  places = [np.argwhere((pixels == colour).all(-1)) for colour in colours]
  assert len({len(place) for place in places}) == 1 and len(places[0]) > 10_000
  top = [place.min(0) for place in places]
  assert top[0][0] == top[1][0] < top[2][0] and top[0][1] == top[2][1] < top[1][1]
  assert {"first", "$", "a", "$t"} <= set(texts)
  assert any(text.startswith("$x$ $x$") and text.endswith("...") for text in texts)
