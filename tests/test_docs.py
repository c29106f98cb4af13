"""The pages of docs/: their code runs, their commands parse, their links lead somewhere."""

import argparse
import ast
import configparser
import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from absl import flags
from IPython.core.inputtransformer2 import TransformerManager

import magneto_jax
from benchmarks import notebooks
from magneto_jax import cli, config
from magneto_jax.theory.recipes import RECIPES
from tests.pages import PAGES, ROOT, anchors, broken_links, commands, fenced, read

# Whose Python is run here, as it is written ...
RUN = ("choosing", "classify", "config", "convert", "data", "extending", "troubleshooting")
# ... by a test of CI, as it trains, and by tests/test_readme.py.
TRAINS = ("getting_started",)
ELSEWHERE = ("attention", "sharding", "tasks")


def name_of(page) -> str:
  return page.relative_to(ROOT).as_posix()


# ---------------------------------------------------------------------------------------------
# Python
# ---------------------------------------------------------------------------------------------


def run_pages(names, directory) -> str:
  """Runs the blocks of each page as one module, in an empty folder; what they print."""
  for name in names:
    code = "\n\n".join(fenced("python", read(f"docs/{name}.md")))
    (directory / f"page_{name}.py").write_text(code + "\n", encoding="utf-8")
  line = [sys.executable, "-W", "error", "-c", "".join(f"import page_{n}\n" for n in names)]
  result = subprocess.run(line, cwd=directory, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  return result.stdout


def test_all_code_of_the_pages_is_run_by_a_test():
  with_code = {page.stem for page in PAGES if fenced("python", page.read_text(encoding="utf-8"))}
  assert with_code - {"README"} == {*RUN, *TRAINS, *ELSEWHERE}
  assert not [name_of(page) for page in PAGES if re.search("^```py$", page.read_text(), re.M)]


def test_code_runs_as_written(tmp_path):
  said = run_pages(RUN, tmp_path)
  assert "not post_ln: tokens collapse into one" in said
  assert "documents; " in said and "xla_chunked" in said.replace("XlaChunked", "xla_chunked")


@pytest.mark.ci
def test_a_first_run_goes_as_written(tmp_path):
  run_pages(TRAINS, tmp_path)
  summary = json.loads((tmp_path / "runs/bytes/summary.json").read_text())
  assert summary["steps"] == 4 and summary["validation_loss_nats_per_token"] > 0


# ---------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------


# As ml_collections loads a config file.
LOADS = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


STANDING = {"--config": "configs/gpt.py:tiny", "--topology": "v5e:2x2"}


class _Parsed(Exception):
  """A command has read its flags."""


@pytest.fixture
def parse(monkeypatch):
  """`parse(words)`: has the module read the flags as its command does, and go no further."""
  read_arguments = argparse.ArgumentParser.parse_args

  def parse_args(self, *args, **kwargs):
    read_arguments(self, *args, **kwargs)
    raise _Parsed

  def read_flags(main, **_):
    cli._parse(sys.argv)
    if "config" in flags.FLAGS and flags.FLAGS["config"].present:
      config.from_config_dict(flags.FLAGS["config"].value)
    raise _Parsed

  def fail(message, code=2):
    raise AssertionError(message)

  def leave(self, status=0, message=""):
    raise AssertionError(message)

  def in_place(match) -> str:
    """A value for what stands for one of the reader's: `--config=CONFIG`, `--workdir=...`."""
    return f"{match[1]}={STANDING.get(match[1], 'x')}"

  monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
  monkeypatch.setattr(argparse.ArgumentParser, "exit", leave)
  monkeypatch.setattr(cli, "run", read_flags)
  monkeypatch.setattr(cli, "fail", fail)

  def parsed(words) -> None:
    module, *given = words
    if importlib.util.find_spec(f"{module}.__main__" if is_package(module) else module) is None:
      raise AssertionError(f"there is no {module}")
    given = [re.sub(r"^(--[\w.]+)=(\.\.\.|[A-Z_./]+)$", in_place, word) for word in given]
    if not given or given == ["--helpfull"]:
      return
    known = set(flags.FLAGS)
    monkeypatch.setattr(sys, "argv", [module, *given])
    try:
      main = importlib.import_module(f"{module}.__main__" if is_package(module) else module).main
      with pytest.raises(_Parsed):
        main()
    finally:
      for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)
      flags.FLAGS.unparse_flags()

  return parsed


def is_package(module: str) -> bool:
  found = importlib.util.find_spec(module)
  return found is not None and found.submodule_search_locations is not None


@LOADS
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page, parse, tmp_path, monkeypatch):
  """By the flags of the command itself: names, types, config files, fields and their bounds."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  for words in commands(page.read_text(encoding="utf-8")):
    # A task of one's own, which tests/test_readme.py runs.
    if not any("counting.py" in word for word in words):
      try:
        parse(words)
      except AssertionError as problem:
        raise AssertionError(f"python -m {' '.join(words)}: {problem}") from problem


def test_shells_hold_whole_commands():
  """No flags without their command, which nothing would parse; and no code without its language."""
  for page in PAGES:
    text = page.read_text(encoding="utf-8")
    shells = [*fenced("sh", text), *fenced("bash", text)]
    lines = [line for code in shells for line in re.sub(r"\\\n", "", code).splitlines()]
    assert [line for line in lines if line.startswith("-")] == [], page
    assert not re.search(r"^    (?:python|pip|from|import) ", text, re.M), page


def test_extras_exist():
  """Those that a reader is told to install."""
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  named = set()
  for page in PAGES:
    installs = re.findall(r"pip install .*", page.read_text(encoding="utf-8"))
    named |= {extra for line in installs for extra in re.findall(r"[.x]\[(\w+)\]", line)}
  assert {"cuda", "docs", "plan", "test", "tpu"} <= named <= set(setup["options.extras_require"])


@pytest.mark.parametrize(
  "text, found",
  [
    ("```sh\nA=b python -m magneto_jax.train --x=1 && ls\n```\n", [["magneto_jax.train", "--x=1"]]),
    (
      "```sh\npython -m magneto_jax.plan \\\n  --a=$B | cat\n```\n",
      [["magneto_jax.plan", "--a=1"]],
    ),
    (
      '```sh\nssh x --command="python3 -m magneto_jax.train --x"\n```\n',
      [["magneto_jax.train", "--x"]],
    ),
    (
      "say `python -m benchmarks.stability\n--parts=a` here",
      [["benchmarks.stability", "--parts=a"]],
    ),
    ("```sh\npython -m magneto_jax.generate <in.txt >out.txt\n```\n", [["magneto_jax.generate"]]),
    ("```sh\npython -m pytest -q\n```\n", []),
  ],
)
def test_commands_are_found(text, found):
  assert list(commands(text)) == found


TRAIN = "magneto_jax.train --workdir=x --config=configs/gpt.py:tiny"


@LOADS
@pytest.mark.parametrize(
  "line, problem",
  [
    (f"{TRAIN} --config.lerning_rate=1", "did you mean"),
    (TRAIN.replace("tiny", "small"), "has no 'small'"),
    (f"{TRAIN} --config.model.layers=0", "at least"),
    ("magneto_jax.train --config=configs/gpt.py:tiny", "workdir"),
    ("magneto_jax.evaluate --workdir=x --splt=test", "unknown flag"),
    ("magneto_jax.kernels.tune --lenght=8", "unrecognized"),
    ("magneto_jax.trian --workdir=x", "there is no"),
  ],
)
def test_wrong_commands_are_found(line, problem, parse):
  with pytest.raises((AssertionError, config.ConfigError), match=problem):
    parse(line.split())


# ---------------------------------------------------------------------------------------------
# Links and what the pages say
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
  assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_broken_links_are_found(tmp_path):
  page = ROOT / "docs" / "index.md"
  text = "[a](no.md) [b](theory.md#no) [c](#no) [d](https://x.y/z) `[e](no.md)` ![f](no.png)"
  assert broken_links(page, text) == ["no.md", "theory.md#no", "#no", "no.png"]
  assert anchors("# A `b.c`, and d's\n```\n# no\n```\n") == {"a-bc-and-ds"}


def test_the_site_has_every_page():
  listed = re.findall(r"[\w/]+\.md$", read("mkdocs.yml").split("\nnav:")[1], re.M)
  pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
  assert sorted(listed) == sorted(pages)


def test_config_reference_is_that_of_the_code(monkeypatch):
  """To the letter; and every field stands in it, with its default and who reads it."""
  monkeypatch.syspath_prepend(ROOT / "docs" / "site")
  config_page = importlib.import_module("config_page")
  text = read("docs/config.md")
  assert text == config_page.page(), "run: python docs/site/config_page.py"
  rows = {
    row[0]: row for row in re.findall(r"^\| `([\w.]+)` \| `(.*?)` \| .* \| (.*) \|$", text, re.M)
  }
  defaults = config.defaults_by_name()
  assert sorted(rows) == sorted(defaults)
  for name, (_, default, reading) in rows.items():
    assert default == (str(defaults[name]) or "''"), name
    tasks = config.tasks_reading(name)
    assert re.findall(r"\w+", reading) == (["all"] if tasks is None else list(tasks)), name


def test_config_reference_has_the_bounds():
  rows = {line.split("`")[1]: line for line in read("docs/config.md").splitlines() if "| `" in line}
  assert "| ≥ 0.0, < 1.0 |" in rows["model.dropout"]
  assert "| `matrices`, `all`, `beit` |" in rows["optimizer.decay_mask"]
  assert "| ≥ 1 |" in rows["steps"] and "| > 0.0 |" in rows["optimizer.learning_rate"]
  assert "| true, false |" in rows["keep_best"] and "| text |" in rows["data.train_files"]


def tables(text: str) -> list[list[list[str]]]:
  """The cells of each table, without the row of dashes."""
  found = re.findall(r"(?:^\|.*\n)+", text, re.M)
  split = lambda line: [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]
  return [[split(line) for i, line in enumerate(t.splitlines()) if i != 1] for t in found]


def column(table: list[list[str]], title: str) -> dict[str, str]:
  at = table[0].index(title)
  return {row[0]: row[at] for row in table[1:]}


def test_evidence_is_that_of_the_measurements():
  """Every figure of the table stands in docs/stability.md, which is written from the results."""
  stability = read("docs/stability.md")
  table = next(t for t in tables(read("docs/choosing.md")) if t[0][0] == "recipe" and len(t[0]) > 5)
  under = lambda title: tables(stability.split(title)[1])[0]
  matrices = column(under("**Only the layers' matrices move**"), "last / first")
  everything = column(under("**All of the layers' parameters move**"), "last / first")
  rate = under("**The largest rate** that trains")
  trained = {(row[0], row[1]): row[2] for row in under("Not run, for want of time")[1:]}
  for name, *figures in table[1:]:
    assert figures == [
      matrices[name],
      everything[name],
      column(rate, "6")[name],
      column(rate, "24")[name],
      trained.get((name, "0.001"), "-"),
      trained.get((name, "0.004"), "-"),
    ], name


def test_decisions_follow_from_the_measurements():
  """Each number of the table of decisions is one of them, and so is each order that it states."""
  stability, page = read("docs/stability.md"), read("docs/choosing.md")
  under = lambda title: tables(stability.split(title)[1])[0]
  rate, lowest = under("**The largest rate** that trains"), under("**The lowest final loss**")
  number = lambda text: float(text.replace(",", "")) if re.match(r"[\d.]+", text) else 0.0
  of = lambda table, depth: {k: number(v) for k, v in column(table, depth).items()}
  six, deeper = of(rate, "6"), of(rate, "24")
  assert len(six) == 7 and min(six.values()) > 0
  for rates, losses in ((six, of(lowest, "6")), (deeper, of(lowest, "24"))):
    assert max(rates, key=rates.get) == "peri_ln" and min(losses, key=losses.get) == "pre_ln"
  assert deeper["pre_ln"] == deeper["deepscalelm"] and deeper["post_ln"] == 0
  assert deeper["magneto"] == six["magneto"] / 2
  ended = {name: loss for name, loss in of(lowest, "24").items() if deeper[name]}
  ended = sorted(ended, key=ended.get)
  assert len(ended) == 6 and ended[:3] == ["pre_ln", "peri_ln", "magneto"]
  assert ended[-1] == "deepscalelm"
  trained = {(row[0], row[1]): number(row[2]) for row in under("Not run, for want of time")[1:]}
  at = {rate: {k: v for (k, r), v in trained.items() if r == rate} for rate in ("0.001", "0.004")}
  assert sorted(at["0.004"], key=at["0.004"].get) == ["deepscalelm", "magneto", "deepnet"]
  order = ["deepscalelm", "pre_ln", "magneto", "deepnet", "post_ln"]
  assert sorted(at["0.001"], key=at["0.001"].get) == order
  decisions = page.split("## The evidence")[0].split("| your model")[1]
  for figure in re.findall(r"\d+\.\d+", decisions):
    assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]*\d)", stability), figure


def test_recipes_are_all_told():
  page = read("docs/choosing.md").split("the rule, after which paper")[1]
  rows = re.findall(r"^\| (`.*?) \|", page, re.M)
  assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(RECIPES)


@pytest.mark.parametrize(
  "words",
  [
    *("holds another run", "is not prepared", "did you mean", "in a row were skipped"),
    *("is skipped", "a spike at step", "waiting for input", "for comparison", "is damaged ("),
    *(
      "tokens collapse into one",
      "towards the input: from layer",
      "the first update is",
      "What would help",
    ),
  ],
)
def test_messages_of_the_troubles_are_said_by_the_code(words):
  said = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "magneto_jax").rglob("*.py"))
  assert words in said
  if words != "in a row were skipped":
    assert words.lower() in " ".join(read("docs/troubleshooting.md").lower().split())


# ---------------------------------------------------------------------------------------------
# The reference
# ---------------------------------------------------------------------------------------------

_LISTED = r"^::: ([\w.]+)(?:\n    options: \{.*?members: \[(.*?)\].*)?"


def listed() -> set[str]:
  """What the reference has: whole modules, and single names."""
  pages = "\n".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md")))
  found = re.findall(_LISTED, pages, re.M)
  return {f"{name}.{x}".rstrip(".") for name, members in found for x in members.split(", ")}


def chain(node) -> list[str]:
  """The words of `a.b.c`."""
  if isinstance(node, ast.Attribute):
    return [*found, node.attr] if (found := chain(node.value)) else []
  return [node.id] if isinstance(node, ast.Name) else []


def used(code: str) -> set[tuple[str, ...]]:
  """What a program imports of this package, and reads of what it has imported, word by word."""
  tree, given = ast.parse(code), {}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "magneto_jax":
      given |= {alias.name: [*node.module.split("."), alias.name] for alias in node.names}
    elif isinstance(node, ast.Import):
      given |= {alias.name: [alias.name] for alias in node.names if alias.name == "magneto_jax"}
  chains = [*map(chain, ast.walk(tree)), *([name] for name in given)]
  return {(*given[first], *rest) for first, *rest in filter(None, chains) if first in given}


def unlisted(code: str) -> list[str]:
  """The names of a program that the reference does not have; the config files aside."""
  there, missing = listed(), set()
  for words in used(code):
    module, rest = "magneto_jax", list(words[1:])
    while rest:
      with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module(f"{module}.{rest[0]}")
      value = getattr(importlib.import_module(module), rest.pop(0))
      if not inspect.ismodule(value):
        break
      module = value.__name__
    else:
      continue
    own = f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else ""
    name = f"{module}.{words[-1 - len(rest)]}"
    if not {module, name, own} & there and not module.startswith("magneto_jax.configs"):
      missing.add(name)
  return sorted(missing)


def test_the_reference_has_the_names_that_pages_and_notebooks_use():
  transform = TransformerManager().transform_cell
  programs = {page.stem: fenced("python", page.read_text(encoding="utf-8")) for page in PAGES}
  for path in notebooks.paths([]):
    cells = nbformat.read(path, as_version=4).cells
    programs[path.stem] = [transform(c.source) for c in cells if c.cell_type == "code"]
  found = {name: unlisted("\n".join(parts)) for name, parts in programs.items() if parts}
  assert found == dict.fromkeys(found, [])


def test_names_that_are_not_listed_are_found():
  code = "import magneto_jax\nfrom magneto_jax import runs, layers\nruns.best\nlayers.Attention"
  assert unlisted(f"{code}\nruns.load\nmagneto_jax.RECIPES['x'].y") == ["magneto_jax.runs.best"]


# ---------------------------------------------------------------------------------------------
# The site
# ---------------------------------------------------------------------------------------------


def test_docstrings_become_markdown(monkeypatch):
  pytest.importorskip("griffe")
  monkeypatch.syspath_prepend(ROOT / "docs" / "site")
  as_markdown = importlib.import_module("docstrings").as_markdown
  lines = [
    "A claim.",
    "",
    "  x <- y",
    "",
    "  | a | b |",
    "  |---|---|",
    "",
    "Args:",
    "  x, z: of y.",
  ]
  lines += [
    "    More.",
    "  All others: see `B`.",
    "",
    "Example:",
    "  >>> f(1)",
    "  2",
    "",
    "Reference: a paper.",
  ]
  told = as_markdown("\n".join(lines))
  assert "\n```text\nx <- y\n```\n\n\n| a | b |\n|---|---|\n\n" in told
  assert (
    "Args:\n  x: of y.\n    More.\n  z: of y.\n    More.\n\nAll other attributes: see `B`.\n"
    in told
  )
  assert "**Example**\n\n```python\n>>> f(1)\n2\n```\n" in told
  assert told.endswith("Reference: a paper.")


@pytest.mark.ci
def test_site_builds_without_a_warning(tmp_path):
  """Strictly, its formulae without a script, every public name in it, nothing from elsewhere."""
  pytest.importorskip("mkdocs")
  pytest.importorskip("mkdocstrings")
  line = [
    sys.executable,
    "-m",
    "mkdocs",
    "build",
    "--strict",
    "--quiet",
    "--site-dir",
    str(tmp_path),
  ]
  # Without the theme's own notice of what is to follow it.
  environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
  result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
  assert result.returncode == 0, result.stderr
  assert "WARNING" not in result.stdout + result.stderr
  theory = (tmp_path / "theory.html").read_text(encoding="utf-8")
  assert theory.count("<math") > 30 and "arithmatex" not in theory and "$" not in visible(theory)
  # The theme would ask GitHub about a repository of its own field.
  assert 'data-md-component="source"' not in theory
  assert "/blob/main/benchmarks/results/prediction-" in theory
  for page in tmp_path.rglob("*.html"):
    assert not re.findall(r'<(?:script|img)[^>]*src="(?:https?:)?//', page.read_text()), page
    assert not re.findall(r'<link[^>]*rel="stylesheet"[^>]*href="(?:https?:)?//', page.read_text())
  assert missing_names("".join(p.read_text() for p in (tmp_path / "api").glob("*.html"))) == []


def visible(page: str) -> str:
  return re.sub(r"<script.*?</script>|<[^>]+>", "", page.split("<article")[1], flags=re.S)


def missing_names(html: str) -> list[str]:
  """The public classes and functions that have no heading."""
  modules = ["layers", "layers.initializers", "models", "kernels", "decoding", "data", "convert"]
  missing = []
  for module in (importlib.import_module(f"magneto_jax.{name}") for name in modules):
    for name in getattr(module, "__all__", ()):
      value = getattr(module, name)
      documented = inspect.isclass(value) or inspect.isfunction(value)
      # Of a module of the same name, which it hides, it is told by its full path.
      ids = (f'id="{module.__name__}.{name}{end}"' for end in ("", f".{name}"))
      if documented and not any(id in html for id in ids):
        missing.append(f"{module.__name__}.{name}")
  for name in (n for n in magneto_jax.__all__ if inspect.isfunction(getattr(magneto_jax, n))):
    if f'id="magneto_jax.{name}"' not in html:
      missing.append(name)
  return missing
