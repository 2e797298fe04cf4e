"""The training loop: one for every task. It resumes, steps, reports, evaluates, saves, and stops cleanly."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from retinar.engine.progress import Progress, plain, silent
from retinar.train.checkpoints import Checkpoint
from retinar.train.config import TrainConfig, to_dict
from retinar.train.loss_plot import loss_plot
from retinar.train.meters import Meters
from retinar.train.metrics_log import MetricsLog, NoLog, truncate_metrics
from retinar.train.rng import preserved_rng
from retinar.train.signals import StopSignals
from retinar.train.window import Clock, Values, Window
from retinar.train.world import World

__all__ = ["Reason", "RunResult", "Store", "Task", "Values", "run", "run_as", "say"]

Reason = Literal["finished", "time", "terminated", "interrupted"]
"""Why a call ended: all steps done; its minutes over; SIGTERM (the machine is wanted back); Ctrl-C."""


class Task(Protocol):
    """What is being trained. The loop knows nothing else about it."""

    name: str
    criterion: str
    """The validation figure whose lowest value is the best checkpoint's."""
    world: World
    done: int
    """Optimizer steps done so far, earlier sessions' included; the loop keeps it."""

    def step(self, step: int) -> Values:
        """One whole optimizer step, accumulation included. ``step`` counts from 0; "loss" is among the values of a
        step that was applied, and any value that is not finite stops the run. Each process has the values of its part
        of the batch; the same names in all."""

    def describe(self, step: int) -> str:
        """The images of a step in words."""

    def meters(self) -> Meters | None:
        """Begin to meter what follows; None where nothing is to be metered."""

    def notes(self) -> dict[str, Any]:
        """JSON values that later steps depend on, beside the tensors of :meth:`state_dict`."""

    def take_notes(self, notes: dict[str, Any]) -> None:
        """Take up what :meth:`notes` gave."""

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of tensors: all that later steps depend on but (config, step, random states). The tensors
        themselves rather than copies, so that a checkpoint can be read into them in place."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state as :meth:`state_dict` gave it (often the very tensors, already overwritten)."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Validation figures after ``step`` steps, {} without data for it. The random states are restored."""

    def export(self, folder: Path) -> None:
        """Write the model as a checkpoint folder of ours, atomically, in place of an older one."""


class Store(Protocol):
    """Where a run keeps what it has: a RunFolder, or the files of another program. All processes call it alike."""

    path: Path
    metrics: Path
    tensorboard: Path
    model: Path
    again: str | None
    """What goes on with a stopped run, in words; None where the caller says it."""

    def newest(self) -> Checkpoint | None:
        """The checkpoint to go on from, if any."""

    def load(self, checkpoint: Checkpoint, task: Task) -> None:
        """Bring the task's tensors and the random states to it."""

    def save(
        self,
        step: int,
        task: Task,
        loop: Mapping[str, Any],
        *,
        keep_last: int,
        value: float | None = None,
        keep_best: bool = False,
    ) -> None:
        """Begin to write a checkpoint; see Checkpoints.save."""

    def wait(self) -> None:
        """Until it is written."""


@dataclass(frozen=True)
class RunResult:
    """How a call of :func:`run` ended: ``step`` of ``steps`` are done."""

    step: int
    steps: int
    reason: Reason
    values: dict[str, float]
    """The last reported line."""
    model: Path | None
    """The exported folder; None after an interruption or a termination."""


def run(
    task: Task,
    store: Store,
    *,
    steps: int,
    checkpoint_every: int,
    log_every: int,
    eval_every: int,
    keep_last: int,
    keep_best: bool = False,
    max_minutes: float | None = None,
    tensorboard: bool = False,
    wandb: str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = plain,
) -> RunResult:
    """Train ``task`` until ``steps`` optimizer steps are done, from the store's newest whole checkpoint if it has one.

    A run that is killed and started again does the same steps with the same numbers as one that is not: the checkpoint
    holds the task's state, the random states and the unreported part of the log. Ctrl-C or SIGTERM saves after the
    step in progress and returns; a second Ctrl-C stops at once. ``max_minutes`` limits this call; then, too, the run
    is saved, and the model exported. All processes of a parallel run stop after the same step. ``wandb``,
    ``settings``: see MetricsLog. InputError when a reported value is not finite (nothing is saved then).
    """
    world = task.world
    step, window = _resume(task, store)
    task.done = saved = step
    last: dict[str, float] = {}
    reason: Reason = "finished"
    meters = task.meters()
    clock, began = Clock(), time.monotonic()
    with (
        StopSignals() as stop,
        _log(store, world, step, tensorboard, wandb, settings) as log,
        (progress if world.main else silent)(f"train {task.name}", steps) as bar,
    ):
        bar.advance(step)
        while step < steps:
            started = time.monotonic()
            values = task.step(step)
            step += 1
            task.done = step
            clock.steps += 1
            window.add(step, {**values, "seconds": time.monotonic() - started})

            line: dict[str, float] = {}
            value = None
            if step % log_every == 0 or step == steps:
                line |= window.drain(saved, task.describe)
                if meters is not None:
                    line |= meters.line(*clock.lap())
            if step % eval_every == 0 or step == steps:
                with preserved_rng(), clock.paused():
                    figures = task.evaluate(step)
                line |= figures
                value = figures.get(task.criterion)
            if line:
                log.write(step, line)
                last = {"step": step, **line}
            bar.advance(1, f"loss {line['loss']:.4f}" if "loss" in line else None)

            if step < steps:
                over = max_minutes is not None and time.monotonic() - began >= 60 * max_minutes
                reason = _ENDS[world.largest(_ENDS.index(stop.reason or ("time" if over else "finished")))]
            if step % checkpoint_every == 0 or step == steps or reason != "finished":
                window.check(saved, task.describe)
                with clock.paused():
                    log.sync()
                    notes = {**window.state_dict(), "task": task.notes()}
                    store.save(step, task, notes, keep_last=keep_last, value=value, keep_best=keep_best)
                saved = step
            if reason != "finished":
                break
        store.wait()
    exported = reason in ("finished", "time")
    if exported:
        task.export(store.model)
    if reason != "finished" and world.main and store.again is not None:
        why = f"stopped after {max_minutes:g} minutes" if reason == "time" else "stopped"
        say(f"{why}: saved at step {step} of {steps} in {store.path}; {store.again} goes on.")
    return RunResult(step, steps, reason, last, store.model if exported else None)


_ENDS: tuple[Reason, ...] = ("finished", "time", "terminated", "interrupted")


def run_as(
    config: TrainConfig, task: Task, store: Store, *, steps: int, max_minutes: float | None, progress: Progress
) -> RunResult:
    """:func:`run` with the intervals that a config names, and the curves drawn at its end."""
    result = run(
        task,
        store,
        steps=steps,
        checkpoint_every=config.checkpoint_every,
        log_every=config.log_every,
        eval_every=config.eval_every,
        keep_last=config.keep_last,
        keep_best=config.keep_best,
        max_minutes=max_minutes,
        tensorboard=config.tensorboard,
        wandb=config.wandb,
        settings=to_dict(config),
        progress=progress,
    )
    if config.meters and task.world.main:
        loss_plot(store.path)
    return result


def _log(
    store: Store, world: World, step: int, tensorboard: bool, wandb: str | None, settings: Mapping[str, Any] | None
) -> MetricsLog | NoLog:
    """The main process's log; an InputError in opening it is one in all processes."""
    made: list[MetricsLog] = []
    events = store.tensorboard if tensorboard else None

    def make() -> None:
        made.append(MetricsLog(store.metrics, events, first_step=step, wandb=wandb, config=settings))

    world.on_main(make)
    return made[0] if made else NoLog()


def _resume(task: Task, store: Store) -> tuple[int, Window]:
    """Bring task and random states to the newest whole checkpoint; its step (0: none) and the unreported values."""
    checkpoint = store.newest()
    if checkpoint is None:
        task.world.on_main(lambda: truncate_metrics(store.metrics, 0))
        return 0, Window(task.world)
    store.load(checkpoint, task)
    task.take_notes(checkpoint.loop.get("task", {}))
    task.world.on_main(lambda: truncate_metrics(store.metrics, checkpoint.step))
    if task.world.main:
        say(f"resuming {store.path} at step {checkpoint.step}.")
    return checkpoint.step, Window(task.world, checkpoint.loop)


def say(line: str) -> None:
    """A plain line on stderr."""
    print(line, file=sys.stderr, flush=True)
