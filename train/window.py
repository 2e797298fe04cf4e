"""What the loop keeps between two lines of its log: the values of the steps, and their time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from retinar.engine.errors import InputError
from retinar.train.world import World

Values = Mapping[str, float | Tensor]
"""What a step reports. Zero-dimensional tensors may stay on their device: they are read when they are logged."""


class Window:
    """The values of the steps since the last reported line, their means over the processes once they are read. Saved
    with a checkpoint, so that means survive a resume."""

    def __init__(self, world: World, state: Mapping[str, Any] | None = None) -> None:
        self._world = world
        self._read: list[tuple[int, dict[str, float]]] = [
            (step, values) for step, values in (state or {}).get("window", [])
        ]
        self._unread: list[tuple[int, Values]] = []

    def state_dict(self) -> dict[str, Any]:
        """JSON values, of what was read."""
        return {"window": [[step, values] for step, values in self._read]}

    def add(self, step: int, values: Values) -> None:
        self._unread.append((step, values))

    def check(self, saved: int, describe: Callable[[int], str]) -> None:
        """Read what is unread, in all processes at once. InputError naming the first step with a value that is not
        finite, its images, and the step of the last checkpoint."""
        own = torch.tensor(
            [float(value) for _, values in self._unread for value in values.values()], dtype=torch.float64
        )
        means = iter(self._world.mean(own).tolist())
        self._read += [(step, {name: next(means) for name in values}) for step, values in self._unread]
        self._unread = []
        for step, values in self._read:
            for name, value in values.items():
                if not math.isfinite(value):
                    raise InputError(
                        f"Expected finite numbers in training, found {name} {value} at step {step}, "
                        f"{describe(step - 1)}: start a new run with a lower optim.lr or precision=fp32, or go on with "
                        f"guard=skip (last good checkpoint: step {saved})."
                    )

    def drain(self, saved: int, describe: Callable[[int], str]) -> dict[str, float]:
        """The mean of every value, checked; the window is empty afterwards."""
        self.check(saved, describe)
        columns: dict[str, list[float]] = {}
        for _, values in self._read:
            for name, value in values.items():
                columns.setdefault(name, []).append(value)
        self._read = []
        return {name: math.fsum(column) / len(column) for name, column in columns.items()}


class Clock:
    """The time of the steps between two lines of the log, without what happens between steps."""

    def __init__(self) -> None:
        self.steps, self._began, self._away = 0, time.monotonic(), 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no step."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._away += time.monotonic() - began

    def lap(self) -> tuple[float, int]:
        """(seconds, steps) since the last lap; values of the steps must have been read, for GPUs run behind."""
        now = time.monotonic()
        found = now - self._began - self._away, self.steps
        self.steps, self._began, self._away = 0, now, 0.0
        return found
