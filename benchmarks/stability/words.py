"""Markdown of figures: tables, and what a claim comes to."""

from collections.abc import Sequence
from typing import NamedTuple


class Claim(NamedTuple):
  """What a paper says, what came out, and whether the one supports the other.

  Attributes:
    paper: the claim and its place.
    here: the figures.
    holds: by the criterion that the claim states; None if it could not be measured.
  """

  paper: str
  here: str
  holds: bool | None


def number(value: float | None) -> str:
  """Three digits; what was not finite, or not measured, is a dash."""
  if value is None:
    return "-"
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  """A table whose first column is text and whose others are numbers."""
  rule = ["---", *["---:"] * (len(columns) - 1)]
  return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]


def claims(entries: Sequence[Claim]) -> list[str]:
  """The claims as a table."""
  verdicts = {True: "supported", False: "**not supported**", None: "not measured"}
  rows = [f"| {c.paper} | {c.here} | {verdicts[c.holds]} |" for c in entries]
  return ["| the claim, and when it counts as supported | here | |", "|---|---|---|", *rows]


def origin(results: dict) -> str:
  """Command, date, commit, machine and versions of a part's results."""
  machine, versions = results["machine"], results["versions"]
  cores = f"{machine['cores']} core{'s' if machine['cores'] > 1 else ''}"
  return (
    f"`{results['command']}`, {results['date'][:10]}, commit {results['git_commit'][:12]},"
    f" {machine['processor']} ({cores} given to it), jax {versions['jax']}, flax"
    f" {versions['flax']}, Python {versions['python']}."
  )
