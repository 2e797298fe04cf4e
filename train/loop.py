"""The training loop: one for every task. It resumes, steps, reports, evaluates, saves, and stops cleanly."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Protocol

from torch import Tensor

from retinar.engine.errors import InputError
from retinar.engine.progress import Progress, plain
from retinar.train.config import TrainConfig
from retinar.train.metrics_log import MetricsLog, truncate_metrics
from retinar.train.rng import preserved_rng
from retinar.train.state import RunFolder

Values = Mapping[str, float | Tensor]
"""What a step reports. Zero-dimensional tensors may stay on their device: they are read when they are logged."""


class Task(Protocol):
    """What is being trained. The loop knows nothing else about it."""

    name: str
    done: int
    """Optimizer steps done so far, earlier sessions' included; the loop keeps it."""

    def step(self, step: int) -> Values:
        """One whole optimizer step, accumulation included. ``step`` counts from 0; "loss" is among the values, and any
        value that is not finite stops the run."""

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of tensors: all that later steps depend on but (config, step, random states). The tensors
        themselves rather than copies, so that a checkpoint can be read into them in place."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state as :meth:`state_dict` gave it (often the very tensors, already overwritten)."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Validation figures after ``step`` steps, {} without data for it. The random states are restored."""

    def export(self, folder: Path) -> None:
        """Write the model as a checkpoint folder of ours, atomically, in place of an older one."""


@dataclass(frozen=True)
class RunResult:
    """How a call of :func:`run` ended: ``step`` of ``steps`` are done."""

    step: int
    steps: int
    reason: Literal["finished", "interrupted", "time"]
    values: dict[str, float]
    """The last reported line."""
    model: Path | None
    """The exported folder; None after an interruption."""


def run(
    task: Task,
    folder: RunFolder,
    *,
    steps: int,
    checkpoint_every: int,
    log_every: int,
    eval_every: int,
    keep_last: int,
    max_minutes: float | None = None,
    tensorboard: bool = False,
    progress: Progress = plain,
) -> RunResult:
    """Train ``task`` until ``steps`` optimizer steps are done, from the folder's newest whole checkpoint if it has one.

    A run that is killed and started again does the same steps with the same numbers as one that is not: the checkpoint
    holds the task's state, the random states and the unreported part of the log. Ctrl-C or SIGTERM saves after the
    step in progress and returns; a second Ctrl-C stops at once. ``max_minutes`` limits this call; then, too, the run
    is saved, and the model exported. InputError when a reported value is not finite (nothing is saved then).
    """
    began = time.monotonic()
    step, window = _resume(task, folder)
    task.done = saved = step
    last: dict[str, float] = {}
    reason: Literal["finished", "interrupted", "time"] = "finished"
    events = folder.tensorboard if tensorboard else None
    with (
        StopSignals() as stop,
        MetricsLog(folder.metrics, events, first_step=step) as log,
        progress(f"train {task.name}", steps) as bar,
    ):
        bar.advance(step)
        while step < steps:
            started = time.monotonic()
            values = task.step(step)
            step += 1
            task.done = step
            window.add(step, {**values, "seconds": time.monotonic() - started})

            line: dict[str, float] = {}
            if step % log_every == 0 or step == steps:
                line |= window.drain(saved)
            if step % eval_every == 0 or step == steps:
                with preserved_rng():
                    line |= task.evaluate(step)
            if line:
                log.write(step, line)
                last = {"step": step, **line}
            bar.advance(1, f"loss {line['loss']:.4f}" if "loss" in line else None)

            if step < steps and stop.requested:
                reason = "interrupted"
            elif step < steps and max_minutes is not None and time.monotonic() - began >= 60 * max_minutes:
                reason = "time"
            if step % checkpoint_every == 0 or step == steps or reason != "finished":
                window.check(saved)
                log.sync()
                folder.save(step, task.state_dict(), window.state_dict(), keep_last=keep_last)
                saved = step
            if reason != "finished":
                break
    if reason != "interrupted":
        task.export(folder.model)
    if reason != "finished":
        why = "stopped" if reason == "interrupted" else f"stopped after {max_minutes:g} minutes"
        say(f"{why}: saved at step {step} of {steps} in {folder.path}; the same command with --resume goes on.")
    return RunResult(step, steps, reason, last, None if reason == "interrupted" else folder.model)


def run_as(
    config: TrainConfig, task: Task, folder: RunFolder, *, steps: int, max_minutes: float | None, progress: Progress
) -> RunResult:
    """:func:`run` with the intervals that a config names."""
    return run(
        task,
        folder,
        steps=steps,
        checkpoint_every=config.checkpoint_every,
        log_every=config.log_every,
        eval_every=config.eval_every,
        keep_last=config.keep_last,
        max_minutes=max_minutes,
        tensorboard=config.tensorboard,
        progress=progress,
    )


def _resume(task: Task, folder: RunFolder) -> tuple[int, Window]:
    """Bring task and random states to the newest whole checkpoint; its step (0: none) and the unreported values."""
    checkpoint = folder.newest()
    if checkpoint is None:
        truncate_metrics(folder.metrics, 0)
        return 0, Window()
    state = task.state_dict()
    folder.load(checkpoint, state)
    task.load_state_dict(state)
    truncate_metrics(folder.metrics, checkpoint.step)
    say(f"resuming {folder.path} at step {checkpoint.step}.")
    return checkpoint.step, Window(checkpoint.loop)


class Window:
    """The values of the steps since the last reported line. Saved with a checkpoint, so that means survive a resume."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._steps: list[tuple[int, Values]] = [(step, values) for step, values in (state or {}).get("window", [])]

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"window": [[step, _floats(values)] for step, values in self._steps]}

    def add(self, step: int, values: Values) -> None:
        self._steps.append((step, values))

    def check(self, saved: int) -> None:
        """InputError naming the first step with a value that is not finite, and the step of the last checkpoint."""
        self._steps = [(step, _floats(values)) for step, values in self._steps]
        for step, values in self._steps:
            for name, value in values.items():
                if not math.isfinite(value):
                    raise InputError(
                        f"Expected finite numbers in training, found {name} {value} at step {step}: "
                        f"start a new run with a lower optim.lr or precision=fp32 (last good checkpoint: step {saved})."
                    )

    def drain(self, saved: int) -> dict[str, float]:
        """The mean of every value, checked; the window is empty afterwards."""
        self.check(saved)
        columns: dict[str, list[float]] = {}
        for _, values in self._steps:
            for name, value in values.items():
                columns.setdefault(name, []).append(float(value))
        self._steps = []
        return {name: math.fsum(column) / len(column) for name, column in columns.items()}


def say(line: str) -> None:
    """A plain line on stderr."""
    print(line, file=sys.stderr, flush=True)


def _floats(values: Values) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


class StopSignals:
    """While active, the first SIGINT or SIGTERM sets ``requested``; another SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        # os.write: print is not safe inside a signal handler.
        os.write(2, b"\nstopping: the step in progress is finished and saved; Ctrl-C again stops at once.\n")
