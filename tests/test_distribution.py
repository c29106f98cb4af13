"""What is shipped: the wheel, the sdist and the editable install, each used from an empty folder.

The `ci` tests install without dependencies and borrow those of the running environment, so they
show that our files arrive and are found, not that the declared dependencies suffice. The `slow`
tests install the dependencies from the index, newest and oldest, and show that too.
"""

import configparser
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = pathlib.Path(__file__).resolve().parents[1]

LEFT_BEHIND = shutil.ignore_patterns(
  ".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "venv*"
)
TRAIN = [
  "-m",
  "magneto_jax.train",
  "--config=configs/gpt.py:tiny",
  "--config.steps=2",
  "--config.eval_every=2",
]


def run(*command: object, cwd: pathlib.Path) -> str:
  """Runs `command` from `cwd`, alone: nothing of the clone or of the caller's paths is seen."""
  environment = {
    name: value
    for name, value in os.environ.items()
    if name not in ("PYTHONPATH", "VIRTUAL_ENV", "JAX_NUMPY_RANK_PROMOTION")
  }
  result = subprocess.run(
    [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True
  )
  assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
  return result.stdout


def metadata() -> configparser.ConfigParser:
  parser = configparser.ConfigParser()
  parser.read(ROOT / "setup.cfg", encoding="utf-8")
  return parser


def sources(*folders: str) -> set[str]:
  """The files of `folders` in the clone, as the wheel should name them."""
  paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
  names = {p.relative_to(ROOT).as_posix() for p in paths if p.is_file() and p.suffix != ".pyc"}
  return {re.sub("^configs/", "magneto_jax/configs/", name) for name in names}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> pathlib.Path:
  """A copy of the clone: building leaves files in the folder it builds."""
  path = tmp_path_factory.mktemp("tree") / "magneto_jax"
  shutil.copytree(ROOT, path, ignore=LEFT_BEHIND)
  return path


@pytest.fixture(scope="module")
def distributions(tree, tmp_path_factory) -> dict[str, pathlib.Path]:
  """The sdist, and the wheel that is built from the sdist, as for a release."""
  out = tmp_path_factory.mktemp("dist")
  run(sys.executable, "-m", "build", "--outdir", out, tree, cwd=out)
  (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
  return {"sdist": sdist, "wheel": wheel, "editable": tree}


def new_environment(folder: pathlib.Path, *install: object) -> pathlib.Path:
  """Makes an environment in `folder`, runs pip install there, and returns its python."""
  python = folder / "venv" / "bin" / "python"
  run(sys.executable, "-m", "venv", "--without-pip", python.parents[1], cwd=folder)
  run(sys.executable, "-m", "pip", "--python", python, "install", *install, cwd=folder)
  return python


def borrow_dependencies(python: pathlib.Path) -> None:
  """Lets `python` see the running environment's packages, after its own.

  The running environment's own .pth files, and so its editable install of this clone, are not read.
  """
  ours = sysconfig.get_path("purelib")
  query = "import sysconfig; print(sysconfig.get_path('purelib'))"
  theirs = run(python, "-c", query, cwd=python.parent).strip()
  (pathlib.Path(theirs) / "borrowed.pth").write_text(ours + "\n")


def check_installed(python: pathlib.Path, home: pathlib.Path, folder: pathlib.Path) -> None:
  """Imports, finds the data and the licence, and trains two steps, from the empty `folder`."""
  code = f"""
import importlib.metadata, importlib.resources, pathlib
import magneto_jax
print(pathlib.Path(magneto_jax.__file__).parent)
assert magneto_jax.__version__ == {metadata()["metadata"]["version"]!r}
data = importlib.resources.files("magneto_jax") / "data" / "embedded"
assert any(path.is_dir() and (path / "LICENSE").is_file() for path in data.iterdir())
files = [str(path) for path in importlib.metadata.files("magneto_jax")]
assert any(name.endswith("dist-info/licenses/LICENSE") for name in files), files
"""
  folder.mkdir()
  assert home in pathlib.Path(run(python, "-c", code, cwd=folder).strip()).parents
  assert list(folder.iterdir()) == []
  run(python, *TRAIN, "--workdir=out", cwd=folder)
  assert any((folder / "out").iterdir())


def test_versions_agree():
  """setup.cfg is the single source; what people cite and read must say the same."""
  version = metadata()["metadata"]["version"]
  assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
  changes = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
  assert version in changes[:2]


def requirements() -> list[str]:
  lines = metadata()["options"]["install_requires"].splitlines()
  return [line for line in lines if line and not line.startswith("#")]


def test_nothing_holds_back_jax_or_flax():
  assert all("<" not in r and "==" not in r for r in requirements() if re.match("jax|flax", r))


@pytest.mark.parametrize("column", [1, 2], ids=["cpu and gpu", "tpu"])
def test_colab_keeps_what_it_has(column):
  """What pip replaces there may be loaded already, or fit the machine: nothing is, but flax."""
  (record,) = (ROOT / "tests" / "testdata").glob("colab_*.txt")
  lines = record.read_text(encoding="utf-8").splitlines()
  rows = [line.split() for line in lines if not line.startswith("#")]
  there = {row[0]: row[column] for row in rows if row[column] != "-"}
  assert there.pop("python") in SpecifierSet(metadata()["options"]["python_requires"])
  needed = {needs.name: needs.specifier for needs in map(Requirement, requirements())}
  assert {"jax", "flax", "numpy", "optax"} <= there.keys() <= needed.keys()
  assert [name for name in there if there[name] not in needed[name]] == ["flax"]


@pytest.mark.ci
def test_wheel_has_every_source_and_nothing_else(distributions):
  names = set(zipfile.ZipFile(distributions["wheel"]).namelist())
  shipped = {name for name in names if name.startswith("magneto_jax/")}
  assert shipped == sources("magneto_jax", "configs")
  (folder,) = {name.split("/")[0] for name in names - shipped}
  assert folder.endswith(".dist-info")
  assert f"{folder}/licenses/LICENSE" in names
  ours = {n for n in shipped if n.startswith("magneto_jax/data/embedded/")}
  licenses = {f"{folder}/licenses/{name}" for name in ours if name.endswith("/LICENSE")}
  assert licenses and licenses <= names


@pytest.mark.ci
def test_sdist_can_be_tested(distributions):
  with tarfile.open(distributions["sdist"]) as archive:
    names = {name.partition("/")[2] for name in archive.getnames()}
  tests = sources("tests", "benchmarks")
  assert tests | {"LICENSE", "README.md", "configs/gpt.py", "setup.cfg"} <= names


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_installs_and_trains_from_anywhere(kind, distributions, tmp_path):
  editable = ["--editable"] if kind == "editable" else []
  python = new_environment(tmp_path, "--no-deps", *editable, distributions[kind])
  borrow_dependencies(python)
  home = distributions[kind] if kind == "editable" else tmp_path / "venv"
  check_installed(python, home, tmp_path / "empty")


@pytest.mark.slow
@pytest.mark.parametrize("oldest", [False, True], ids=["newest", "oldest"])
def test_declared_dependencies_suffice(oldest, tree, tmp_path):
  """The bounds of setup.cfg are true: with the newest and with the oldest releases it trains."""
  if oldest and sys.version_info[:2] != (3, 11):
    pytest.skip("the oldest releases have no wheels for this Python")
  constraints = tmp_path / "constraints.txt"
  constraints.write_text("\n".join(requirements()).replace(">=", "==" if oldest else ">="))
  python = new_environment(tmp_path, "--constraint", constraints, tree)
  run(sys.executable, "-m", "pip", "--python", python, "check", cwd=tmp_path)
  check_installed(python, tmp_path / "venv", tmp_path / "empty")
