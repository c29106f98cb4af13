"""Every notebook runs from its first cell to its last."""

import pathlib

import nbclient
import nbformat
import pytest

COLAB = pathlib.Path(__file__).resolve().parents[1] / "colab"
NOTEBOOKS = sorted(COLAB.glob("*.ipynb"))

# What makes a notebook short enough to test: each text must stand in it once.
SHORTER = {"config.steps = 750": "config.steps = 3\nconfig.eval_batches = 1"}


def test_notebooks_carry_no_output():
  """Outputs would name a machine and grow with each run."""
  assert NOTEBOOKS
  for path in NOTEBOOKS:
    for cell in nbformat.read(path, as_version=4).cells:
      assert not cell.get("outputs") and not cell.get("execution_count"), path


@pytest.mark.ci
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
  notebook = nbformat.read(path, as_version=4)
  for text, shorter in SHORTER.items():
    (cell,) = (cell for cell in notebook.cells if text in cell.source)
    cell.source = cell.source.replace(text, shorter)
  resources = {"metadata": {"path": str(tmp_path)}}
  nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
  assert (tmp_path / "runs" / "quickstart" / "summary.json").exists()
