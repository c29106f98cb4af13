"""Every notebook runs from its first cell to its last."""

import ast
import contextlib
import importlib
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


def test_notebooks_use_names_that_exist():
  """What they import of this package, and the attributes of what they imported, without running."""
  for path in NOTEBOOKS:
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    code = "\n".join(line for cell in cells for line in cell.splitlines() if "%pip" not in line)
    tree = ast.parse(code.replace('if importlib.util.find_spec("magneto_jax") is None:', ""))
    names = {}
    for node in ast.walk(tree):
      if isinstance(node, ast.ImportFrom) and node.module.startswith("magneto_jax"):
        package = importlib.import_module(node.module)
        for alias in node.names:
          with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(f"{node.module}.{alias.name}")
          names[alias.name] = getattr(package, alias.name)
      elif isinstance(node, ast.Import):
        ours = [alias.name for alias in node.names if alias.name == "magneto_jax"]
        names |= {name: importlib.import_module(name) for name in ours}
    used = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and dotted(n.value) in names]
    assert used
    for node in used:
      assert hasattr(names[node.value.id], node.attr), f"{path}: {ast.unparse(node)}"


def dotted(node) -> str:
  return node.id if isinstance(node, ast.Name) else ""


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
