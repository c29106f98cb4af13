"""What a trial of faults reports."""

from typing import Any, NamedTuple


class Row(NamedTuple):
  """A promise, and what was seen of it.

  Attributes:
    id: of the promise: R1, R2, ...; some have several rows.
    promise: what must hold, with its figure.
    figure: what was seen.
    held: whether the promise was kept.
    details: JSON-able values: counts, and what failed.
  """

  id: str
  promise: str
  figure: str
  held: bool
  details: dict[str, Any]
