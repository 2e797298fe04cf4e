"""Figures and tables as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def seconds(value: float) -> str:
    """A time in the unit that people read: 3.2 s, 41.0 ms, 7.5 us."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def percent(value: float | None) -> str:
    """25 %, or a dash for what has no limit."""
    return "-" if value is None else f"{100 * value:.0f} %"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """A markdown table that can also be read as it is."""
    cells = [list(head), *(list(line) for line in lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    cells.insert(1, ["-" * width for width in widths])
    for line in cells:
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
