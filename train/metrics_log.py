"""What a run reports: one JSON line a logged step; the same for TensorBoard where it is installed, and for W&B (Weights
& Biases) where it is asked for."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from retinar.engine.errors import InputError
from retinar.engine.files import write_json, write_text

WANDB_RUN = "wandb.json"
"""Beside the log: which run of W&B is this folder's, so that a resumed session goes on with it."""
WITHOUT = "or train without it: --set wandb=none"


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl in order (a last one cut off by a crash is left out); [] without a file."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "step" in value:
            lines.append(value)
    return lines


def loss_curve(path: Path | str, key: str = "loss") -> tuple[list[int], list[float]]:
    """Steps and values of one quantity, ready to plot."""
    points = [(line["step"], line[key]) for line in read_metrics(path) if key in line]
    return [step for step, _ in points], [value for _, value in points]


def truncate_metrics(path: Path | str, step: int) -> None:
    """Forget what was logged after ``step`` (the checkpoint a run goes on from): those steps will be done again."""
    if Path(path).exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


class MetricsLog:
    """Appends to ``path``; a context manager. ``tensorboard`` is the event folder, None for none.

    ``wandb`` is a project of W&B: the folder of ``path`` becomes a run of it, with ``config`` beside the curves.
    InputError where wandb is not installed or does not start (no login, no network), before anything is written.
    """

    def __init__(
        self,
        path: Path,
        tensorboard: Path | None = None,
        *,
        first_step: int = 0,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._run = _wandb_run(path.parent, wandb, config or {}) if wandb is not None else None
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
        self._writer = _tensorboard_writer(tensorboard, first_step) if tensorboard is not None else None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()
        if self._run is not None:
            self._run.finish(exit_code=0 if kind is None else 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line: the step and its values. Handed to the system at once, so that a killed process loses none."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._run is not None:
            # W&B ignores steps that it has: those that a resumed run does again come out the same.
            self._run.log(dict(values), step=step)

    def sync(self) -> None:
        """Flush to the disk, so that what a checkpoint counts as logged survives a power cut too."""
        os.fsync(self._file.fileno())


class NoLog:
    """What a process that does not report has in place of a MetricsLog."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        return None

    def sync(self) -> None:
        return None


def _tensorboard_writer(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("tensorboard is not installed: curves go to metrics.jsonl only.", file=sys.stderr)
        return None
    return SummaryWriter(folder, purge_step=first_step + 1)


def check_wandb(project: str | None) -> Any:
    """The package wandb where a run is to report to W&B, else None. InputError where it is not installed: a run asks
    this first, before it loads anything."""
    if project is None:
        return None
    try:
        import wandb
    except ImportError as error:
        raise InputError(
            f"Expected the package wandb to report to the project {project}, found none ({error}): "
            f"pip install wandb, {WITHOUT}."
        ) from None
    return wandb


def _wandb_run(folder: Path, project: str, config: Mapping[str, Any]) -> Any:
    """The run of a folder: a new one, or the one that its earlier sessions reported to."""
    wandb = check_wandb(project)
    try:
        known = json.loads((folder / WANDB_RUN).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        known = {}
    same = isinstance(known, dict) and known.get("project") == project and known.get("id")
    identity = str(known["id"]) if same else uuid.uuid4().hex[:12]
    try:
        run = wandb.init(
            project=project,
            name=folder.resolve().name,
            id=identity,
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(
            f"Expected W&B to take the project {project}, found {reason}: "
            f"run `wandb login`, set WANDB_MODE=offline, {WITHOUT}."
        ) from error
    write_json(folder / WANDB_RUN, {"project": project, "id": identity})
    return run
