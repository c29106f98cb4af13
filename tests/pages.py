"""What pages of Markdown hold: fenced code, commands and links."""

import pathlib
import re
import shlex
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The pages that a reader of the documentation meets.
PAGES = [
  *sorted((ROOT / "docs").glob("*.md")),
  *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
]
_OURS = re.compile(r"(magneto_jax|benchmarks)(\.\w+)*")


def read(name: str) -> str:
  """The text of a page, by its path below the root."""
  return (ROOT / name).read_text(encoding="utf-8")


def fenced(language: str, text: str) -> list[str]:
  """The bodies of the fences of a language."""
  return [body.strip() for body in re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)]


def commands(text: str) -> Iterator[list[str]]:
  """Each `python -m MODULE FLAGS` of ours, fenced or inline, as the module and its flags.

  What a shell does around it (variables, pipes, loops, several lines) is left out; a command within
  another's quotes counts too. Variables are taken for 1, and `...` for nothing.
  """
  shells = [*fenced("sh", text), *fenced("bash", text)]
  without_fences = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
  inline = re.findall(r"`(python3? -m [^`]+)`", without_fences)
  for code in [*shells, *(re.sub(r"\s+", " ", line) for line in inline)]:
    for line in re.sub(r"\\\n\s*", " ", code).splitlines():
      yield from _in_line(line)


def _in_line(line: str) -> Iterator[list[str]]:
  lexer = shlex.shlex(re.sub(r"\$\{?\w+\}?", "1", line), posix=True, punctuation_chars=True)
  lexer.whitespace_split = True
  words = list(lexer)
  for i, word in enumerate(words):
    if " -m " in word:
      yield from _in_line(word)
    if word == "-m" and _OURS.fullmatch(words[i + 1]):
      found = words[i + 1 :]
      end = next((n for n, w in enumerate(found) if set(w) <= set(";&|<>()")), len(found))
      yield [word for word in found[:end] if word != "..."]


def anchors(text: str) -> set[str]:
  """The anchors of a page's headings, as GitHub and MkDocs both make them."""
  without_fences = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
  titles = re.findall(r"^#+ (.+?) *$", without_fences, re.M)
  return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower())) for title in titles}


def broken_links(page: pathlib.Path, text: str) -> list[str]:
  """The links of a page, pictures too, to files or headings that are not there."""
  broken = []
  without_code = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.M | re.S)
  for target in re.findall(r"\]\(([^)\s]+)\)", without_code):
    path, _, anchor = target.partition("#")
    if re.match(r"\w+:", target):
      continue
    file = (page.parent / path).resolve() if path else page
    if not file.exists() or not file.is_relative_to(ROOT):
      broken.append(target)
    elif anchor and not (file.is_relative_to(ROOT / "docs" / "api")):
      if anchor not in anchors(file.read_text(encoding="utf-8")):
        broken.append(target)
  return broken
