"""How many steps a given time pays for, measured on the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from retinar.train.loop import Task
from retinar.train.rng import preserved_rng


def affordable_steps(minutes: float, seconds: Sequence[tuple[float, float]], most: int | None = None) -> int:
    """Steps that ``minutes`` pay for, from 1 to ``most``; ``seconds``: (share of the steps, seconds a step)."""
    mean = sum(share * cost for share, cost in seconds)
    steps = max(1, int(60.0 * minutes / mean))
    return steps if most is None else min(most, steps)


def short_average(decay: float | None, steps: int) -> float | None:
    """``decay`` of an average of the weights, or a faster one, so that after ``steps`` little of the first weights is
    left in it (below 1 %)."""
    return None if decay is None else min(decay, max(0.5, 1 - 5 / steps))


def seconds_per_step(task: Task, steps: Sequence[int]) -> float:
    """Mean time of these steps of a task made for the purpose; two of them warm up. What it draws is taken back."""
    with preserved_rng():
        for step in steps[:2]:
            _settle(task.step(step))
        began = time.monotonic()
        for step in steps:
            _settle(task.step(step))
    return (time.monotonic() - began) / len(steps)


def _settle(values: Any) -> None:
    """Reading the loss waits for the GPU."""
    float(values["loss"])
