"""The picture at the end of a run: losses, what validation says, and the learning rate over the steps."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinar.engine.files import atomic_write
from retinar.train.metrics_log import loss_curve

NAME = "loss.png"
INK, BLUE, ORANGE = "#222222", "#1f5fa8", "#d1601a"
WIDTH = 0.01
"""Standard deviation of the smoothing, as a share of the points."""


def loss_plot(run_folder: Path | str) -> Path | None:
    """Draw RUN/metrics.jsonl as RUN/loss.png (1,200 pixels wide) and return its path.

    The training loss as it was logged (thin) and smoothed; on the same axes the validation loss where there is one,
    on its own the validation PSNR of a tokenizer; below, the learning rate. None, with a line on stderr, where nothing
    was logged yet or matplotlib is not installed: a picture is no reason for a run to fail.
    """
    folder = Path(run_folder)
    curves = {key: loss_curve(folder / "metrics.jsonl", key) for key in ("loss", "valid_loss", "valid_psnr", "lr")}
    if not curves["loss"][0]:
        print(f"nothing to plot in {folder / 'metrics.jsonl'} yet.", file=sys.stderr)
        return None
    try:
        # The objects, not pyplot: no window system, no state of the whole process.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no loss plot; the curves are in metrics.jsonl.", file=sys.stderr)
        return None
    panels = ["loss", *(key for key in ("valid_psnr", "lr") if curves[key][0])]
    figure = Figure(figsize=(8, 3.2 + 1.4 * len(panels)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    found = figure.subplots(
        len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": [3.2] + [1] * (len(panels) - 1)}
    )
    axes = dict(zip(panels, found[:, 0], strict=True))
    _losses(axes["loss"], curves["loss"], curves["valid_loss"])
    if "valid_psnr" in axes:
        axes["valid_psnr"].plot(*curves["valid_psnr"], color=ORANGE, marker="o", markersize=3, linewidth=1.2)
        axes["valid_psnr"].set_ylabel("validation\nPSNR (dB)")
    if "lr" in axes:
        axes["lr"].plot(*curves["lr"], color=INK, linewidth=1.2)
        axes["lr"].set_ylabel("learning rate")
        axes["lr"].set_ylim(bottom=0.0)
        axes["lr"].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for each in axes.values():
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        each.set_axisbelow(True)
    found[-1, 0].set_xlabel("step")
    found[-1, 0].xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    figure.suptitle(_title(folder, curves), fontsize=11)
    with atomic_write(folder / NAME) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": "retinar"})
    return folder / NAME


def _losses(axes: Any, train: tuple[list[int], list[float]], valid: tuple[list[int], list[float]]) -> None:
    axes.plot(*train, color=BLUE, alpha=0.35, linewidth=0.8, label="training, as logged")
    axes.plot(train[0], smoothed(train[1]), color=BLUE, linewidth=1.8, label="training, smoothed")
    if valid[0]:
        axes.plot(*valid, color=ORANGE, marker="o", markersize=3.5, linewidth=1.4, label="validation")
    axes.set_ylim(*limits(train[1], valid[1]))
    axes.set_ylabel("loss")
    axes.legend(frameon=False, loc="best")


def smoothed(values: Sequence[float]) -> NDArray[np.float64]:
    """Weighted means of each value and its neighbours on both sides (a Gaussian; fewer neighbours at the ends)."""
    sigma = max(1.0, WIDTH * len(values))
    half = int(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-half, half + 1) / sigma) ** 2)
    inside = slice(half, half + len(values))
    return np.convolve(values, kernel)[inside] / np.convolve(np.ones(len(values)), kernel)[inside]


def limits(train: Sequence[float], valid: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest loss to show: every validation, and of the logged losses the first and all but the hundredth
    at either end, so that one spike does not press the rest flat."""
    shown = np.concatenate([train[:1], np.quantile(train, [0.01, 0.99]), np.asarray(valid, dtype=np.float64)])
    low, high = float(shown.min()), float(shown.max())
    margin = 0.05 * (high - low) or 0.05 * max(abs(high), 1e-3)
    return low - margin, high + margin


def _title(folder: Path, curves: dict[str, tuple[list[int], list[float]]]) -> str:
    """The run, and where it stands: the last of each curve."""
    try:
        recipe = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        recipe = None
    last = {key: values[-1] for key, (_, values) in curves.items() if values}
    parts = [f"loss {last['loss']:.4g}"]
    if "valid_loss" in last:
        parts.append(f"validation {last['valid_loss']:.4g}")
    if "valid_psnr" in last:
        parts.append(f"validation PSNR {last['valid_psnr']:.4g} dB")
    name = folder.resolve().name + (f" ({recipe})" if recipe else "")
    return f"{name}: {', '.join(parts)} at step {curves['loss'][0][-1]:,}"
