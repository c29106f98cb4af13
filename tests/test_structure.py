"""What holds for the source as a whole: its layers, its safety, and that it fits any machine.

Every check is a function of text, so that each is also shown to fail on a text that breaks it.
"""

import ast
import pathlib
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# A module imports only lower levels, or files of its own package (never in a circle).
LEVELS = {
  "theory": 0,
  "sharding": 0,
  "kernels": 0,
  "layers": 1,
  "interop": 1,
  "optimizers": 1,
  "data": 1,
  "digest": 1,
  "distributed": 1,
  "preemption": 1,
  "config": 1,
  "hardware": 1,
  "hlo": 1,
  "reporting": 1,
  "models": 2,
  "seals": 2,
  "decoding": 3,
  "checkpoints": 3,
  "convert": 3,
  "tasks": 4,
  "diagnostics": 4,
  "memory": 4,
  # What the commands share.
  "cli": 5,
  "program": 5,
  "spikes": 5,
  "monitor": 5,
  "runs": 5,
  "jobs": 6,
  "pretrained": 6,
  "planning": 6,
  "evaluation": 6,
  "training": 7,
  "multiple_choice": 7,
  # The public names.
  "__init__": 7,
  "train": 8,
  "generate": 8,
  "diagnose": 8,
  "plan": 8,
  "evaluate": 8,
  "search": 8,
  "__main__": 8,
  "convert.__main__": 8,
}

# Rooms that stay free of everything else, so that they can be read and reused without it.
THIRD_PARTY = {"theory": {"numpy"}, "kernels": {"jax", "numpy"}, "sharding": {"jax", "numpy"}}

UNSAFE_MODULES = {
  *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "hickle", "joblib", "jsonpickle"),
  *(
    "marshal",
    "shelve",
    "multiprocessing.connection",
    "runpy",
    "torch.package",
    "pandas.io.pickle",
  ),
}
UNSAFE_CALLS = {
  *("builtins.compile", "builtins.eval", "builtins.exec", "compile", "eval", "exec", "__import__"),
  *("os.popen", "os.system", "subprocess.getoutput", "subprocess.getstatusoutput"),
  *(f"os.exec{how}" for how in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
  *("pandas.read_pickle", "pandas.eval", "shutil.unpack_archive", "torch.hub.load"),
  *("torch.jit.load", "ruamel.yaml.YAML"),
  *(f"yaml.{how}{all_}" for how in ("full_load", "load", "unsafe_load") for all_ in ("", "_all")),
}
# Methods of whatever has them.
UNSAFE_METHODS = {"exec_module", "read_pickle", "to_pickle"}
# What a person names on the command line is theirs to run, as a config file is.
ALLOWED = {("magneto_jax/cli.py", "calls spec.loader.exec_module")}
# A keyword that must have one value wherever a call that ends in the name is made ...
REQUIRED = {
  "torch.load": ("weights_only", True),
  "torch.serialization.load": ("weights_only", True),
  "extract": ("filter", "data"),
  "extractall": ("filter", "data"),
}
# ... and keywords that must be absent or have it, in any call.
FORBIDDEN = {"allow_pickle": False, "shell": False, "trust_remote_code": False}

# The homes of people and of build machines. /tmp and Colab's /content are the same for everyone.
MACHINE_PATH = re.compile(
  r"(?<![\w./~:-])/(?:home|root|Users|work|workspace|mnt|opt|scratch)/\w"
  r"|file:///\w|\b[A-Z]:\\+Users\b"
)


def repository_files() -> Iterator[pathlib.Path]:
  """Every file of the source tree, also where there is no git: not what tools leave behind."""
  left_behind = {".git", "__pycache__", "build", "dist", "runs"}
  caches = (".venv", ".pytest", ".ruff", ".hypothesis", ".ipynb", ".idea", ".vscode")
  pending = [ROOT]
  while pending:
    for path in sorted(pending.pop().iterdir()):
      skipped = path.name in left_behind or path.name.startswith(caches)
      if skipped or path.name.endswith(".egg-info") or (path / "pyvenv.cfg").exists():
        continue
      if path.is_dir():
        pending.append(path)
      else:
        yield path


def package_sources() -> dict[str, str]:
  """Maps `magneto_jax.layers.norms`, `magneto_jax.layers.__init__`, ... to their text."""
  sources = {}
  for path in sorted((ROOT / "magneto_jax").rglob("*.py")):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    sources[name] = path.read_text(encoding="utf-8")
  return sources


def imports(module: str, source: str, modules: Mapping[str, str]) -> Iterator[tuple[int, str]]:
  """Yields (line, absolute name) of what `module` imports; ours end in a file of `modules`."""

  def resolve(name: str) -> str:
    return f"{name}.__init__" if f"{name}.__init__" in modules else name

  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, resolve(alias.name)) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = ".".join(module.split(".")[: -node.level]) if node.level else ""
      base = ".".join(filter(None, [base, node.module]))
      for alias in node.names:
        # `from package import name`: a file of the package, or a name of its __init__.
        inner = resolve(f"{base}.{alias.name}")
        yield node.lineno, inner if inner in modules else resolve(base)


def layering_errors(modules: Mapping[str, str]) -> list[str]:
  """Checks {module: source} against LEVELS and THIRD_PARTY, and for circles within a package."""
  errors = []
  within: dict[str, set[str]] = {}
  for module, source in modules.items():
    room = room_of(module)
    if room not in LEVELS:
      errors.append(f"{module}: {room!r} has no level; give it one in LEVELS of {__name__}")
      continue
    for line, name in imports(module, source, modules):
      top, *rest = name.split(".")
      where = f"{module}:{line} imports {name}"
      if top != "magneto_jax":
        allowed = THIRD_PARTY.get(room)
        if allowed is not None and top not in sys.stdlib_module_names | allowed:
          errors.append(f"{where}, but {room} may import only {sorted(allowed)}")
      elif not rest or rest[0] not in LEVELS:
        errors.append(f"{where}, which has no level; is it misspelt?")
      elif rest[0] == room:
        within.setdefault(module, set()).add(name)
      elif LEVELS[rest[0]] >= LEVELS[room]:
        errors.append(f"{where}: level {LEVELS[room]} may not import level {LEVELS[rest[0]]}")
  return errors + [f"circle: {' -> '.join(circle)}" for circle in circles(within)]


def room_of(module: str) -> str:
  """The part of the package that has a level; a package's own command is above its library."""
  _, *parts = module.split(".")
  return ".".join(parts[:2]) if parts[1:] == ["__main__"] else parts[0]


def circles(edges: Mapping[str, set[str]]) -> Iterator[list[str]]:
  """Yields one circle for every edge that closes one in a depth-first walk."""
  done: set[str] = set()

  def walk(node: str, trail: list[str]) -> Iterator[list[str]]:
    if node in trail:
      yield [*trail[trail.index(node) :], node]
    elif node not in done:
      for target in sorted(edges.get(node, ())):
        yield from walk(target, [*trail, node])
      done.add(node)

  for node in sorted(edges):
    yield from walk(node, [])


def dotted(node: ast.expr, names: Mapping[str, str]) -> str:
  """`np.load` -> "numpy.load" under `import numpy as np`; "" and the attributes for the rest."""
  if isinstance(node, ast.Attribute):
    return f"{dotted(node.value, names)}.{node.attr}"
  return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def unsafe(source: str) -> list[str]:
  """What in `source` could run code that somebody hid in data, as "line: what"."""
  tree = ast.parse(source)
  found = []
  names = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import | ast.ImportFrom):
      base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
      for alias in node.names:
        name = base + alias.name
        if alias.asname or base:
          names[alias.asname or alias.name] = name
        parts = name.split(".")
        if UNSAFE_MODULES & {*parts, *(".".join(parts[: i + 1]) for i in range(len(parts)))}:
          found.append(f"{node.lineno}: imports {name}")
        if alias.name == "*":
          found.append(f"{node.lineno}: imports {name}, which hides what is called")
  called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
  for node in ast.walk(tree):
    if not isinstance(node, ast.Attribute | ast.Name) or isinstance(node.ctx, ast.Store):
      continue
    # Called or handed on: `map(eval, texts)`, `load = torch.load`.
    name, call = dotted(node, names), called.get(id(node))
    method = name.rpartition(".")[2] if isinstance(node, ast.Attribute) else ""
    if name in UNSAFE_CALLS or method in UNSAFE_METHODS:
      found.append(f"{node.lineno}: calls {name}")
    for unsafe_call, (keyword, value) in REQUIRED.items():
      if name == unsafe_call or name.endswith(f".{unsafe_call}"):
        if call is None or constants(call).get(keyword) != value:
          found.append(f"{node.lineno}: {name} without {keyword}={value!r}")
    if call is None:
      continue
    if name == "numpy.load" and len(call.args) > 2:
      found.append(f"{node.lineno}: allow_pickle by its place")
    if name == "importlib.import_module" and UNSAFE_MODULES & set(texts_of(call)):
      found.append(f"{node.lineno}: imports {texts_of(call)}")
    for keyword in call.keywords:
      if (
        keyword.arg in FORBIDDEN and constants(call).get(keyword.arg) is not FORBIDDEN[keyword.arg]
      ):
        found.append(f"{node.lineno}: {keyword.arg} is not {FORBIDDEN[keyword.arg]}")
      if keyword.arg is None and set(FORBIDDEN) & set(texts_of(keyword.value)):
        found.append(f"{node.lineno}: {texts_of(keyword.value)} among keywords")
  return sorted(found, key=lambda text: int(text.split(":")[0]))


def constants(call: ast.Call) -> dict[str, object]:
  """The keywords of a call that are given as constants."""
  return {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}


def texts_of(node: ast.AST) -> list[str]:
  """The constant texts below a node."""
  below = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
  return [value for value in below if isinstance(value, str)]


def test_imports_follow_the_levels():
  assert layering_errors(package_sources()) == []


def test_levels_and_contributing_name_the_rooms_that_exist():
  assert set(LEVELS) == {room_of(name) for name in package_sources()}
  text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
  listed = {}
  for level, names in re.findall(r"^\| (\d) \| (.*?) \|", text, re.M):
    for name in re.findall(r"`(\w+)(?:/|\.py)`", names):
      listed[name] = int(level)
  assert listed == {room: level for room, level in LEVELS.items() if "." not in room}
  for folder in re.findall(r"`(\w+)/` \(", text.split("Beside it:")[1]):
    assert (ROOT / folder).is_dir(), folder


def test_commands_import_together():
  """In a program that has flags of its own, too: a command defines its flags when it is run."""
  commands = sorted(name for name, level in LEVELS.items() if level == max(LEVELS.values()))
  code = "from absl import flags\nflags.DEFINE_string('workdir', '', '')\n"
  code += "".join(f"import magneto_jax.{name}\n" for name in commands)
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_folder_with_code_is_a_package():
  """Without __init__.py it is missing from the wheel or, like configs, from an editable install."""
  paths = [*(ROOT / "magneto_jax").rglob("*.py"), *(ROOT / "configs").rglob("*.py")]
  missing = {path.parent for path in paths if not (path.parent / "__init__.py").exists()}
  assert {str(folder.relative_to(ROOT)) for folder in missing} == set()


def test_nothing_runs_code_hidden_in_data():
  texts = {p: p.read_text(encoding="utf-8") for p in repository_files() if p.suffix == ".py"}
  found = {
    (path.relative_to(ROOT).as_posix(), line.split(": ", 1)[1])
    for path, text in texts.items()
    for line in unsafe(text)
  }
  assert found == ALLOWED


def test_no_text_names_a_machine():
  found = []
  for path in repository_files():
    try:
      lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
      continue
    where = path.relative_to(ROOT)
    found += [f"{where}:{n}" for n, x in enumerate(lines, 1) if MACHINE_PATH.search(x)]
  assert found == []


def test_import_is_light():
  """`import magneto_jax` stays quick: what only some users need is imported where it is used."""
  heavy = ["tensorflow_datasets", "orbax", "tensorflow", "torch", "matplotlib", "flax.nnx"]
  heavy += ["sacrebleu", "jiwer", "soundfile", "soxr"]
  code = f"import sys, magneto_jax; print([m for m in {heavy} if m in sys.modules])"
  result = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
  )
  assert result.stdout.strip() == "[]"


GOOD = {
  "magneto_jax.__init__": "from magneto_jax.models import language",
  "magneto_jax.theory.__init__": "",
  "magneto_jax.theory.moments": "import math\nimport numpy as np",
  "magneto_jax.theory.recipes": "from magneto_jax.theory import moments",
  "magneto_jax.layers.__init__": "from magneto_jax.layers.norms import RMSNorm",
  "magneto_jax.layers.norms": "import jax, flax.linen as nn",
  "magneto_jax.layers.residual": "from . import norms\nfrom ..theory import recipes",
  "magneto_jax.models.__init__": "",
  "magneto_jax.models.language": "from magneto_jax.layers import RMSNorm",
}


@pytest.mark.parametrize(
  "module, source, error",
  [
    ("magneto_jax.theory.moments", "import jax", "theory may import only"),
    ("magneto_jax.kernels.attention", "import flax.linen", "kernels may import only"),
    ("magneto_jax.theory.moments", "from magneto_jax.layers import norms", "level 0 may not"),
    ("magneto_jax.kernels.__init__", "from magneto_jax import theory", "level 0 may not"),
    ("magneto_jax.layers.norms", "from ..models.language import LM", "level 1 may not"),
    ("magneto_jax.layers.norms", "def f():\n  import magneto_jax.train", "level 1 may not"),
    ("magneto_jax.train", "from magneto_jax import generate", "level 8 may not"),
    ("magneto_jax.layers.norms", "import magneto_jax", "level 1 may not import level 7"),
    ("magneto_jax.layers.norms", "from magneto_jax.layers import RMSNorm", "circle: "),
    ("magneto_jax.layers.norms", "from . import residual", "circle: "),
    ("magneto_jax.layers.norms", "import magneto_jax.thoery.moments", "misspelt"),
    ("magneto_jax.utils", "", "'utils' has no level"),
  ],
)
def test_layering_errors_are_found(module, source, error):
  files = {"magneto_jax.train": "import magneto_jax", "magneto_jax.generate": ""}
  assert layering_errors(GOOD | files) == []
  errors = layering_errors(GOOD | files | {module: source})
  assert any(error in e for e in errors), errors


@pytest.mark.parametrize(
  "line",
  [
    "import pickle",
    "from pickle import loads",
    "import cloudpickle as c",
    "from multiprocessing.reduction import pickle",
    "eval(x)",
    "exec(x)",
    "import builtins as b; b.eval(x)",
    "import yaml; yaml.load(f)",
    "from yaml import load; load(f, Loader=L)",
    "import yaml as y; y.unsafe_load_all(f)",
    "import marshal; marshal.loads(x)",
    "from shelve import open",
    "import dill",
    "from joblib import load",
    "compile(x, 'a', 'exec')",
    "import os; os.system(x)",
    "from os import popen; popen(x)",
    "import subprocess; subprocess.run(x, shell=True)",
    "from subprocess import Popen; Popen(x, shell=flag)",
    "subprocess.getoutput(x)",
    "import pandas as pd; pd.read_pickle(f)",
    "import shutil; shutil.unpack_archive(f)",
    "np.load(f, mmap_mode='r', allow_pickle=1)",
    "import numpy as np; np.load(f, allow_pickle=True)",
    "np.load(f, allow_pickle=flag)",
    "import torch; torch.load(f)",
    "import torch as t; t.load(f, weights_only=False)",
    "from torch import load; load(f)",
    "tar.extractall(path)",
    "tar.extract(member)",
    "zipfile.ZipFile(f).extractall()",
    "tarfile.open(p).extractall(path, filter='fully_trusted')",
    "AutoModel.from_pretrained(n, trust_remote_code=True)",
    "import numpy as np; np.load(f, None, True)",
    "np.load(f, **{'allow_pickle': True})",
    "list(map(eval, xs))",
    "e = eval",
    "import torch; l = torch.load",
    "from torch import *",
    "import torch; torch.serialization.load(p)",
    "__import__('pickle')",
    "import importlib; importlib.import_module('pickle')",
    "from six.moves import cPickle",
    "import runpy",
    "spec.loader.exec_module(m)",
    "import os; os.execv(p, a)",
    "from ruamel.yaml import YAML; YAML(typ='unsafe')",
    "import pandas; pandas.eval(x)",
    "import pandas; pandas.io.pickle.read_pickle(p)",
    "from multiprocessing.connection import Listener",
    "from torch.package import PackageImporter",
  ],
)
def test_unsafe_constructs_are_found(line):
  assert unsafe(f"x = 1\n{line}\n")[0].startswith("2: ")


def test_safe_constructs_pass():
  assert not unsafe(
    textwrap.dedent("""
      import json, torch, yaml
      model.eval()
      yaml.safe_load(f)
      np.load(f, allow_pickle=False)
      torch.load(f, map_location="cpu", weights_only=True)
      json.load(f)
      tar.extractall(p, filter="data")
      subprocess.run(["ls", x], shell=False)
      step.lower(x).compile()
      re.compile("a")
    """)
  )


@pytest.mark.parametrize("folder", ["home", "root", "Users", "work", "opt"])
def test_machine_paths_are_found(folder):
  assert MACHINE_PATH.search(f"see /{folder}/someone/file")
  assert not MACHINE_PATH.search(f"see docs/{folder}/someone and https://example.org/{folder}/x")
