"""What a run reports: one JSON line a logged step, and the same for TensorBoard where it is installed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from retinar.engine.files import write_text


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
    """Appends to ``path``; a context manager. ``tensorboard`` is the event folder, None for none."""

    def __init__(self, path: Path, tensorboard: Path | None = None, *, first_step: int = 0) -> None:
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

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line: the step and its values. Handed to the system at once, so that a killed process loses none."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def sync(self) -> None:
        """Flush to the disk, so that what a checkpoint counts as logged survives a power cut too."""
        os.fsync(self._file.fileno())


def _tensorboard_writer(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("tensorboard is not installed: curves go to metrics.jsonl only.", file=sys.stderr)
        return None
    return SummaryWriter(folder, purge_step=first_step + 1)
