"""Every notebook opens in Colab, runs from its first cell to its last, and shows what came out."""

import ast
import configparser
import contextlib
import importlib
import importlib.metadata
import pathlib
import re
import socket
import subprocess
import sys

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from benchmarks import notebooks
from tests import pages

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = notebooks.paths([])
NAMED = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# What makes a notebook short enough to test: each text must stand in it once.
SHORTER = {
  "quickstart": {
    "STEPS = 120": "STEPS = 6",
    'assert bits < baselines["unigram"]': "",
  },
  "signal_propagation": {
    "LAYERS = 200": "LAYERS = 12",
    "(12, 40, 120, 400, 1000)": "(12, 1000)",
    'RECIPE, "deepnet", "deepscalelm"]': "RECIPE]",
  },
  "use_in_your_flax_project": {"STEPS = 100": "STEPS = 40"},
  "tasks": {
    "STEPS = 500": "STEPS = 4",
    "STEPS = 250": "STEPS = 3",
    "STEPS = 600": "STEPS = 3",
    "config.steps = 200": "config.steps = 3",
    "config.eval_every = config.checkpoint_every = 200": "config.eval_every = 3",
    "assert nats < unigram": "",
    'assert losses[-1] < losses[0] and right > summary["validation_commonest_token"]': "",
    "assert found > other": "",
  },
  "tpu_and_multi_gpu": {"config.steps = 20": "config.steps = 4"},
}
# Of any machine: the top of a path that begins at its root.
PATH = re.compile(r"(?<![\w.:/])/(home|root|tmp|work|usr|opt|mnt|var|Users|content)/")


def read(path: pathlib.Path) -> nbformat.NotebookNode:
  return nbformat.read(path, as_version=4)


def code_cells(path: pathlib.Path) -> list[nbformat.NotebookNode]:
  return [cell for cell in read(path).cells if cell.cell_type == "code"]


def words(output: nbformat.NotebookNode) -> str:
  """All that can be read of an output."""
  data = {kind: x for kind, x in output.get("data", {}).items() if not kind.startswith("image/")}
  return "\n".join([output.get("text", ""), *map(str, data.values())])


def url() -> str:
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg", encoding="utf-8")
  return config["metadata"]["url"]


def test_all_are_tested():
  assert {path.stem for path in NOTEBOOKS} == set(SHORTER)


@NAMED
def test_opens_in_colab(path):
  """Its first cell holds Colab's badge, linked to this notebook, and says what it is."""
  first = read(path).cells[0]
  assert first.cell_type == "markdown"
  badge, _, title, *_ = first.source.splitlines()
  place = url().removeprefix("https://github.com/")
  opened = f"https://colab.research.google.com/github/{place}/blob/main/colab/{path.name}"
  image = "https://colab.research.google.com/assets/colab-badge.svg"
  assert badge == f"[![Open in Colab]({image})]({opened})"
  assert title.startswith("# ")


def test_the_documentation_lists_all():
  """Each with its link to Colab."""
  page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
  row = r"^\| \[(\w+)\]\(\.\./colab/(\w+)\.ipynb\) .* \[open\]\((.*)\) \|$"
  badges = {path.stem: read(path).cells[0].source.splitlines()[0] for path in NOTEBOOKS}
  links = {(name, name, badge.rpartition("](")[2][:-1]) for name, badge in badges.items()}
  assert links == set(re.findall(row, page, re.M))


@NAMED
def test_installs_beside_the_jax_that_is_there(path):
  """The same lines in all: the package, and no other jax; then the devices."""
  first = code_cells(path)[0].source
  assert first.startswith(code_cells(NOTEBOOKS[0])[0].source.split("\nimport jax\n")[0])
  assert f'SOURCE = "git+{url()}"' in first
  assert "%pip install --quiet {SOURCE} {kept}" in first and '("jax", "jaxlib")' in first
  assert "jax.devices()" in first and "jax[" not in first


def test_the_jax_that_is_there_is_named():
  """What the first cell hands to pip beside the package is the installed jax, to the version."""
  first = code_cells(NOTEBOOKS[0])[0].source
  lines = [re.search(rf"^  ({name} = .*)$", first, re.M)[1] for name in ("there", "kept")]
  code = "\n".join(["import importlib.metadata", *lines, "print(kept)"])
  said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
  versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
  assert said.stdout == f"jax=={versions['jax']} jaxlib=={versions['jaxlib']}\n"


@pytest.mark.parametrize("installed", [True, False])
def test_an_install_that_failed_stops_the_first_cell(installed):
  """With one line: the jax that is there, the oldest that serves, the page. %pip raises nothing."""
  code = f"found = iter([None, {installed or None}])"
  code += """
import importlib.util, types
importlib.util.find_spec = lambda name: next(found, None)
magic = lambda name, line: print(name, line.format_map(globals()))
get_ipython = lambda: types.SimpleNamespace(run_line_magic=magic)
"""
  code += plain(code_cells(NOTEBOOKS[0])[0])
  ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
  kept = f"jax=={versions['jax']} jaxlib=={versions['jaxlib']}"
  assert ran.stdout.splitlines()[0] == f"pip install --quiet git+{url()} {kept}"
  if installed:
    assert ran.returncode == 0 and "\njax " in ran.stdout, ran.stderr
    return
  *_, said = ran.stderr.splitlines()
  oldest = re.search(r"^  jax>=(\S+)$", (ROOT / "setup.cfg").read_text(encoding="utf-8"), re.M)[1]
  assert said.startswith(f"RuntimeError: pip could not install magneto_jax beside {kept}: ")
  assert f" needs jax {oldest} or newer. " in said
  page, _, anchor = said.split()[-1].partition("#")
  assert page.startswith(f"{url()}/blob/main/")
  page = page.removeprefix(f"{url()}/blob/main/")
  assert anchor in pages.anchors(pages.read(page))


@NAMED
def test_shows_what_came_out(path):
  """Outputs are stored, with a picture, and say nothing of the machine that made them."""
  cells = code_cells(path)
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  outputs = [output for cell in cells for output in cell.outputs]
  assert any("image/png" in output.get("data", {}) for output in outputs)
  assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
  notebooks.refuse_noise(read(path), path.name)
  text = "\n".join(map(words, outputs))
  assert not PATH.search(text), PATH.search(text)
  assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)
  assert "Warning" not in text and "Traceback" not in text
  assert read(path).metadata.language_info == {"name": "python"}
  assert not any("execution" in cell.metadata for cell in cells)  # The times of day.
  assert path.stat().st_size < 1_000_000


@NAMED
def test_asserts_something(path):
  tree = ast.parse("\n".join(map(plain, code_cells(path))))
  assert any(isinstance(node, ast.Assert) for node in ast.walk(tree))


def plain(cell: nbformat.NotebookNode) -> str:
  """A cell as Python, its magics as calls."""
  return TransformerManager().transform_cell(cell.source)


@NAMED
def test_uses_names_that_exist(path):
  """What it imports of this package, and the attributes of what it imported, without running."""
  tree = ast.parse("\n".join(map(plain, code_cells(path))))
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


@NAMED
def test_can_be_made_shorter(path):
  source = "\n".join(cell.source for cell in read(path).cells)
  assert {text: source.count(text) for text in SHORTER[path.stem]} == dict.fromkeys(
    SHORTER[path.stem], 1
  )


@pytest.mark.ci
@NAMED
def test_notebook_runs(path, tmp_path):
  notebook = notebooks.execute(path, tmp_path, SHORTER[path.stem])
  notebooks.refuse_noise(notebook, path.name)


@pytest.mark.slow
@NAMED
def test_notebook_runs_as_it_is(path, tmp_path):
  notebook = notebooks.execute(path, tmp_path)
  notebooks.refuse_noise(notebook, path.name)


# ---------------------------------------------------------------------------------------------
# What runs and stores them
# ---------------------------------------------------------------------------------------------


def test_notebooks_are_named():
  assert [path.stem for path in notebooks.paths(["tasks", "quickstart"])] == ["tasks", "quickstart"]
  with pytest.raises(FileNotFoundError, match="no notebook 'task': name some of quickstart, "):
    notebooks.paths(["task"])


@pytest.mark.parametrize("text", ["nowhere", "a"])
def test_a_change_must_have_one_place(tmp_path, text):
  """Nothing is run otherwise."""
  path = tmp_path / "one.ipynb"
  cells = [nbformat.v4.new_code_cell(source) for source in ("a = b", "a")]
  nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
  with pytest.raises(ValueError, match=f"one.ipynb: '{text}' must stand in it once"):
    notebooks.execute(path, tmp_path, {text: "b"})


def test_noise_is_refused():
  cell = nbformat.v4.new_code_cell()
  cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="well")]
  notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("#"), cell])
  notebooks.refuse_noise(notebook, "one")
  cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="UserWarning: no\n"))
  with pytest.raises(ValueError, match="one: a cell says on its standard error: UserWarning: no"):
    notebooks.refuse_noise(notebook, "one")
