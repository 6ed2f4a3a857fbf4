"""How every benchmark shows its result: one table for people, one JSON line for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns, the first row the heads; the first column flush left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def figure_text(value: float | None, decimals: int = 1) -> str:
    """A figure in a table; a dash where none was measured."""
    return "–" if value is None else f"{value:,.{decimals}f}"


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of the values do not exceed, between neighbours.

    Raises: ValueError of no values.
    """
    if not values:
        raise ValueError("there is no percentile of no values")
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def percentiles(values: Sequence[float], shares: Sequence[float]) -> dict[str, float | None]:
    """Percentiles under the names "p50", "p99" and so on; nothing under each where there are no values."""
    return {f"p{share * 100:g}": percentile(values, share) if values else None for share in shares}


def print_report(rows: Sequence[Sequence[str]], result: Mapping[str, Any]) -> None:
    print(table(rows))
    print(json.dumps(result, ensure_ascii=False, allow_nan=False))
