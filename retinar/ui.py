"""What a person sees while work goes on: bars on a terminal, plain lines elsewhere; and the closing summary."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from retinar.engine.progress import Bar, Progress, plain

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


class TerminalBar:
    """One line of the live display, opened and closed as a context manager."""

    def __init__(self, screen: Terminal, label: str, total: int | None) -> None:
        self.screen, self.label, self.total = screen, label, total
        self.task: Any = None

    def __enter__(self) -> TerminalBar:
        self.task = self.screen.open(self.label, self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.screen.close(self.task)

    def advance(self, count: int = 1, note: str | None = None) -> None:
        if note is None:
            self.screen.live.advance(self.task, count)
        else:
            self.screen.live.update(self.task, advance=count, note=note)


class Terminal:
    """``Progress`` drawn by rich on stderr; bars may nest, the display lives while any bar is open."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.live: RichProgress = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}[/]"),
            console=Console(stderr=True),
            refresh_per_second=4,  # training shares its cores with this display
        )
        self.opened = 0

    def __call__(self, label: str, total: int | None = None) -> Bar:
        return TerminalBar(self, label, total)

    def open(self, label: str, total: int | None) -> Any:
        if self.opened == 0:
            self.live.start()
        self.opened += 1
        return self.live.add_task(label, total=total, note="")

    def close(self, task: Any) -> None:
        self.live.stop_task(task)
        self.opened -= 1
        if self.opened == 0:
            self.live.stop()
            for done in list(self.live.task_ids):
                self.live.remove_task(done)


def progress() -> Progress:
    """Bars where stderr is a terminal and rich is installed, plain lines otherwise."""
    if not sys.stderr.isatty():
        return plain
    try:
        return Terminal()
    except ImportError:
        return plain


def jsonable(value: Any) -> Any:
    """A summary as JSON can hold it: paths as text, NaN and infinities as null, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and not isinstance(value, str | bytes):  # a numpy or torch scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def lines(summary: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A summary for people: one ``name: value`` a line, nested parts indented, equal records as a table."""
    for key, value in summary.items():
        name = str(key).replace("_", " ")
        if isinstance(value, Mapping):
            yield f"{indent}{name}:"
            yield from lines(value, indent + "  ")
        elif isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
            yield f"{indent}{name}:"
            header = list(dict.fromkeys(str(column) for row in value for column in row))
            body = [[number(row.get(column, "")) for column in header] for row in value]
            yield from (indent + "  " + line for line in table(header, body))
        elif isinstance(value, list | tuple):
            yield f"{indent}{name}: {', '.join(number(item) for item in value) or '-'}"
        else:
            yield f"{indent}{name}: {number(value)}"


def number(value: Any) -> str:
    """A value as people write it: six significant figures, yes and no, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Columns padded to their widest cell."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
