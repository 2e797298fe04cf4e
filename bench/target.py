"""A line of the table of targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[Mapping[str, Any]]
Limits = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Target:
    """``value``: (rows, limits) -> the figure, or None where a row that it needs was not measured.

    ``least``: whether the threshold is a lower bound. ``unit``: as people read the figure, "x", "%" or "s".
    """

    op: str
    what: str
    threshold: float
    least: bool
    value: Callable[[Rows, Limits], float | None]
    unit: str = "x"

    def met(self, value: float) -> bool:
        return value >= self.threshold if self.least else value <= self.threshold

    def wanted(self) -> str:
        """The threshold in words."""
        return f"{'at least' if self.least else 'at most'} {self.show(self.threshold)}"

    def show(self, value: float) -> str:
        return f"{100 * value:.0f} %" if self.unit == "%" else f"{value:.2f}{' ' * (self.unit == 's')}{self.unit}"
