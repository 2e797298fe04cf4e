"""Time as a budget: what does not fit is left out and named, and nothing is killed half way."""

from __future__ import annotations

import time
from collections.abc import Callable


class Deadline:
    """``seconds`` from now. ``clock`` gives seconds from any origin."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock, self.began = seconds, clock, clock()

    @property
    def spent(self) -> float:
        return self.clock() - self.began

    @property
    def left(self) -> float:
        """Seconds, never below zero."""
        return max(0.0, self.seconds - self.spent)

    def fits(self, seconds: float = 0.0) -> bool:
        """Whether something that takes so long still fits."""
        return self.left > seconds

    def part(self, share: float, keep: float = 0.0) -> Deadline:
        """A deadline for the next phase: a share of what is left after ``keep`` seconds, which are for later ones."""
        return Deadline(max(0.0, self.left - keep) * share, self.clock)
