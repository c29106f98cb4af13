"""What MkDocs is told beside mkdocs.yml: links out of docs/, and formulae as MathML."""

import html
import re

import latex2mathml.converter

# What stands between pymdownx.arithmatex's generic marks.
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)
_OUT_OF_DOCS = re.compile(r"\]\(\.\./([\w./-]+)(#[\w-]+)?\)")


def on_page_markdown(markdown: str, page, config, files) -> str:
  """Links to other parts of the repository, which is what a page on GitHub has beside it."""
  if page.file.src_uri.startswith("api/"):
    return markdown
  return _OUT_OF_DOCS.sub(rf"]({config.extra['repository']}/blob/main/\1\2)", markdown)


def on_page_content(html_text: str, page, config, files) -> str:
  """Formulae become MathML, which browsers draw without a script."""
  convert = latex2mathml.converter.convert
  inline = lambda match: convert(html.unescape(match[1]))
  display = lambda match: (
    f'<div class="formula">{convert(html.unescape(match[1]), display="block")}</div>'
  )
  return _DISPLAY.sub(display, _INLINE.sub(inline, html_text))
