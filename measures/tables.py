"""Tables of numbers for the screen, the same for every report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def table(rows: Mapping[str, Sequence[str]], columns: Sequence[str]) -> str:
    """Cells as text, right below their headings. rows: name -> one cell per column."""
    first = max(map(len, rows)) + 2
    widths = [
        max(len(heading), *(len(cells[i]) for cells in rows.values())) + 2
        for i, heading in enumerate(columns)
    ]
    lines = [("", columns), *rows.items()]
    return "\n".join(
        f"{name:<{first}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))
        for name, cells in lines
    )


def number(value: float | None, digits: int = 3) -> str:
    """A cell; "-" for a number that is not there: None or nan."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"
