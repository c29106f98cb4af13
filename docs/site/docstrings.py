"""The library's docstrings as Markdown: what is set off by its indentation is code or a table."""

import re

import griffe

# Sections whose indented lines griffe itself reads.
_SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")
_EXAMPLE = "Example:"
# Several names that a section explains as one.
_TOGETHER = re.compile(r"^  (\w+(?:, \w+)+): (.*(?:\n    .*)*)", re.M)


def is_row(line: str) -> bool:
  """Whether a line is one of a table."""
  return line.lstrip().startswith("|")


def as_markdown(text: str) -> str:
  """A docstring whose equations, tables and examples are fenced, or dedented, for Markdown.

  An equation stands indented between paragraphs, an example below `Example:`; both are code. Lines
  of a table begin with a bar. What is below `Args:` and its like stays as it is, but that names
  which are explained together stand each by itself, and all others behind them.
  """
  result, block, section = [], [], ""

  def end_block() -> None:
    while block and not block[-1]:
      block.pop()
    if not block:
      return
    margin = min(len(line) - len(line.lstrip()) for line in block if line)
    lines = [line[margin:] for line in block]
    if not is_row(lines[0]):
      lines = ["```python" if section == _EXAMPLE else "```text", *lines, "```"]
    result.extend(["", *lines, ""])
    block.clear()

  apart = lambda match: "\n".join(f"  {name}: {match[2]}" for name in match[1].split(", "))
  for line in _TOGETHER.sub(apart, text).splitlines():
    if re.fullmatch(r"\S.*", line):
      end_block()
      section = line if line in (*_SECTIONS, _EXAMPLE) else ""
      result.append("**Example**" if line == _EXAMPLE else line)
    elif section in _SECTIONS and line.startswith("  All others:"):
      result.extend(["", f"All other attributes:{line.partition(':')[2]}"])
    elif section in _SECTIONS or not (line or block):
      result.append(line)
    else:
      if line and block and is_row(line) != is_row(block[0]):
        end_block()
      block.append(line)
  end_block()
  return "\n".join(result)


class Docstrings(griffe.Extension):
  """Rewrites each docstring once it is read."""

  def on_instance(self, *, obj: griffe.Object, **_) -> None:
    if obj.docstring:
      obj.docstring.value = as_markdown(obj.docstring.value)
