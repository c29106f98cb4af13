"""Runs the notebooks of colab/ and stores them with what they show.

`python -m benchmarks.notebooks` runs all, `python -m benchmarks.notebooks quickstart` those that
are named. Each starts in an empty folder of its own, and is stored only if all of its cells have
run and none has said a word on its standard error.
"""

import argparse
import pathlib
import tempfile
import time
from collections.abc import Mapping

import nbclient
import nbformat

COLAB = pathlib.Path(__file__).resolve().parents[1] / "colab"
# Seconds that a cell may take on a machine that does other work too.
LONGEST = 3000


def paths(names: list[str]) -> list[pathlib.Path]:
  """The notebooks of these names, or all of them.

  Raises:
    FileNotFoundError: there is none of that name.
  """
  there = {path.stem: path for path in sorted(COLAB.glob("*.ipynb"))}
  for name in names:
    if name not in there:
      raise FileNotFoundError(f"there is no notebook {name!r}: name some of {', '.join(there)}")
  return [there[name] for name in names or there]


def execute(
  path: pathlib.Path, folder: str | pathlib.Path, changes: Mapping[str, str] | None = None
) -> nbformat.NotebookNode:
  """The notebook with the outputs of a run.

  Args:
    path: of the notebook, which stays as it is.
    folder: where it runs.
    changes: {text: other text} of its cells; each text must stand in the notebook once.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell has failed.
    ValueError: a text to change does not stand there once.
  """
  notebook = nbformat.read(path, as_version=4)
  for text, other in (changes or {}).items():
    cells = [cell for cell in notebook.cells if text in cell.source]
    if len(cells) != 1 or cells[0].source.count(text) != 1:
      raise ValueError(f"{path.name}: {text!r} must stand in it once")
    cells[0].source = cells[0].source.replace(text, other)
  client = nbclient.NotebookClient(
    notebook, timeout=LONGEST, resources={"metadata": {"path": str(folder)}}, record_timing=False
  )
  return client.execute()


def refuse_noise(notebook: nbformat.NotebookNode, name: str) -> None:
  """Raises ValueError if a cell has written on its standard error: warnings, logs."""
  for cell in notebook.cells:
    for output in cell.get("outputs", ()):
      if output.output_type == "stream" and output.name == "stderr":
        raise ValueError(f"{name}: a cell says on its standard error: {output.text.strip()}")


def store(notebook: nbformat.NotebookNode, path: pathlib.Path) -> None:
  """Writes a notebook without what only says where it was run."""
  notebook.metadata.language_info = {"name": "python"}
  nbformat.validate(notebook)
  nbformat.write(notebook, path)


def main() -> None:
  """Runs and stores the notebooks that the command line names."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("names", nargs="*", help="of notebooks; all by default")
  for path in paths(parser.parse_args().names):
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
      notebook = execute(path, folder)
    refuse_noise(notebook, path.name)
    store(notebook, path)
    seconds, size = time.perf_counter() - started, path.stat().st_size
    print(f"{path.name}: {seconds:.0f} s, {size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
  main()
