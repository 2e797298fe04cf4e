"""Progress of long work, without a dependency: the command line passes one that draws, others get plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol


class Bar(Protocol):
    """A running piece of work; a context manager."""

    def __enter__(self) -> Bar: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count finished units; ``note`` is a short text shown beside the count (a loss, a speed)."""


Progress = Callable[[str, int | None], Bar]
"""``progress(label, total)`` opens a bar; total None means unknown."""


class PlainBar:
    """Lines on stderr: at most one every ``interval`` seconds, then a closing line."""

    def __init__(self, label: str, total: int | None, interval: float = 10.0) -> None:
        self.label, self.total, self.interval = label, total, interval
        self.done, self.note = 0, ""
        self.start = self.last = time.monotonic()

    def __enter__(self) -> PlainBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or self.done:  # a refusal before the first unit is told by its error alone
            self._print("stopped" if kind else "done")

    def advance(self, count: int = 1, note: str | None = None) -> None:
        self.done += count
        self.note = note or self.note
        if time.monotonic() - self.last >= self.interval:
            self._print("")

    def _print(self, state: str) -> None:
        self.last = time.monotonic()
        of = f"/{self.total}" if self.total is not None else ""
        parts = [f"{self.label}: {self.done}{of}", self.note, f"{self.last - self.start:.0f} s", state]
        print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)


class SilentBar(PlainBar):
    """Counts and prints nothing."""

    def _print(self, state: str) -> None:
        pass


def plain(label: str, total: int | None = None) -> Bar:
    """Progress as plain lines (no terminal, logs)."""
    return PlainBar(label, total)


def silent(label: str, total: int | None = None) -> Bar:
    """No output (library use, tests)."""
    return SilentBar(label, total)
