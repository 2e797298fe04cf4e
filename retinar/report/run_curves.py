"""The curves of a training run, ready to draw: read from RUN/metrics.jsonl."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from retinar.engine.errors import InputError
from retinar.train.loss_plot import limits, smoothed
from retinar.train.metrics_log import loss_curve

LOG = "metrics.jsonl"
MOST = 4000
"""Points of a curve that are drawn; longer ones are thinned evenly."""


@dataclass(frozen=True)
class Curve:
    points: tuple[list[int], list[float]]
    label: str
    colour: int
    width: float = 1.6
    alpha: float = 1.0
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    curves: tuple[Curve, ...]
    limits: tuple[float, float] | None = None


def check_run(folder: Path) -> None:
    """Raise InputError unless ``folder`` is a training run with something logged."""
    if not _finite(folder, "loss")[0]:
        found = "no losses in it" if (folder / LOG).is_file() else "none"
        raise InputError(
            f"Expected a training run's {LOG} in {folder}, found {found}: give the --out of `retinar train`."
        )


def curve_panels(folder: Path) -> tuple[list[Panel], str, str]:
    """(panels, title, description in words); no panels where no loss was logged."""
    train, valid, psnr = (_thin(_finite(folder, key)) for key in ("loss", "valid_loss", "valid_psnr"))
    if not train[0]:
        return [], "", ""
    curves = [
        Curve(train, "training, as logged", 0, 0.7, 0.35),
        Curve((train[0], [float(value) for value in smoothed(train[1])]), "training, smoothed", 0, 1.7),
    ]
    said = [f"training loss from {train[1][0]:.4g} to {train[1][-1]:.4g} over {train[0][-1]:,} steps"]
    if valid[0]:
        curves.append(Curve(valid, "validation", 1, 1.3, dots=True))
        said.append(f"validation loss {valid[1][-1]:.4g} at the end, lowest {min(valid[1]):.4g}")
    panels = [Panel("loss", tuple(curves), limits(train[1], valid[1]))]
    if psnr[0]:
        panels.append(Panel("PSNR (dB)", (Curve(psnr, "validation", 1, 1.3, dots=True),)))
        said.append(f"validation PSNR {psnr[1][-1]:.4g} dB at the end")
    title = run_title(folder)
    return panels, title, f"{title}: {', '.join(said)}"


def run_title(folder: Path) -> str:
    """The run's name, and its recipe where it says one."""
    try:
        recipe = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        recipe = None
    return folder.resolve().name + (f" ({recipe})" if recipe else "")


def _finite(folder: Path, key: str) -> tuple[list[int], list[float]]:
    """The curve without the steps at which the run had diverged: no axis holds NaN."""
    steps, values = loss_curve(folder / LOG, key)
    kept = [
        pair for pair in zip(steps, values, strict=True) if isinstance(pair[1], int | float) and math.isfinite(pair[1])
    ]
    return [step for step, _ in kept], [value for _, value in kept]


def _thin(points: tuple[list[int], list[float]]) -> tuple[list[int], list[float]]:
    step = -(-len(points[0]) // MOST)
    return points if step <= 1 else (points[0][::step], points[1][::step])
