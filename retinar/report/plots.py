"""The pictures of the figures, each drawn for a light and for a dark page."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retinar.report.figures import MEASURES, RATES, TRAINED_ON, between, percent, score_figure, text
from retinar.report.run_curves import curve_panels

DPI, WIDTH = 180, 5.2
CLASSES = 12
"""Classes in a plot; every class is in the tables."""


@dataclass(frozen=True)
class Theme:
    """Colours of a page; ``face`` is what lies behind the plot."""

    face: str
    ink: str
    grid: str
    colours: tuple[str, str, str]


LIGHT = Theme("#ffffff", "#1d2129", "#e3e6eb", ("#1f5fa8", "#c8551a", "#3f7d4e"))
DARK = Theme("#191c22", "#e6e9ef", "#343a45", ("#79b0f0", "#f09a63", "#85c796"))


@dataclass(frozen=True)
class Plot:
    """A picture as PNG, light and dark; ``alt`` says in words what it shows."""

    name: str
    alt: str
    light: bytes
    dark: bytes
    width: int
    height: int


def _plot(name: str, alt: str, height: float, draw: Callable[[Any, Theme], None]) -> Plot:
    """Both versions of a figure that ``draw(figure, theme)`` fills."""
    # The objects, not pyplot: no window system, no state of the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = []
    for theme in (LIGHT, DARK):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor=theme.face)
        FigureCanvasAgg(figure)
        draw(figure, theme)
        for axes in figure.axes:
            _dress(axes, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": "retinar"})
        made.append(buffer.getvalue())
    return Plot(name, alt, made[0], made[1], round(WIDTH * DPI), round(height * DPI))


def _dress(axes: Any, theme: Theme) -> None:
    axes.set_facecolor(theme.face)
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.grid)
    axes.tick_params(colors=theme.ink, labelsize=9)
    for label in (axes.title, axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.ink)
    axes.grid(axis="both" if axes.get_gid() == "both" else axes.get_gid() or "x", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    legend = axes.get_legend()
    if legend is not None:
        legend.get_frame().set_alpha(0)
        for each in legend.get_texts():
            each.set_color(theme.ink)


def scores_plot(scores: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Every metric of every class with its interval, and the floor as a bar across; the first mode only."""
    shown = [score for score in scores if score["mode"] == scores[0]["mode"]]
    shown = shown[: CLASSES - 1] + shown[-1:] if len(shown) > CLASSES else shown
    names = list(shown[0]["metrics"]) if shown else []
    if not names:
        return None
    rows = math.ceil(len(names) / 2)
    columns = min(2, len(names))

    def draw(figure: Any, theme: Theme) -> None:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        for axes, name in zip(grid.flat, names, strict=False):
            known = score_figure(name)
            for place, score in enumerate(shown):
                value, floor = score["metrics"][name], (score.get("floor") or {}).get(name)
                if floor and floor["mean"] is not None:
                    axes.plot([floor["mean"]] * 2, [place - 0.3, place + 0.3], color=theme.colours[2], linewidth=2.5)
                if value is not None:
                    bounds = (score.get("intervals") or {}).get(name) or (value, value)
                    axes.plot(bounds, [place, place], color=theme.colours[0], linewidth=1.8)
                    axes.plot(value, place, "o", color=theme.colours[0], markersize=5.5)
            axes.set_yticks(range(len(shown)), [clip(score["label"]) for score in shown])
            axes.set_ylim(len(shown) - 0.5, -0.5)
            axes.set_title(f"{known.title} ({known.better} is better)" if known.better else known.title, fontsize=9.5)
            axes.margins(x=0.12)
            axes.xaxis.set_major_locator(_few_ticks())

    said = []
    for name in names:
        for score in shown:
            floor = (score.get("floor") or {}).get(name)
            beside = f" (floor {text(floor['mean'], score_figure(name).digits)})" if floor else ""
            said.append(f"{name} {score['label']} {text(score['metrics'][name], score_figure(name).digits)}{beside}")
    height = rows * (0.75 + 0.28 * len(shown))
    return _plot("scores", "Figures by class, generated against real: " + "; ".join(said), height, draw)


def distances_plot(measure: Mapping[str, Any], generated: Sequence[float], held_out: Sequence[float]) -> Plot:
    """Distances to the nearest training photograph: generated images, held-out photographs, and the threshold."""
    name = MEASURES.get(measure["measure"], measure["measure"])
    sides = [(values, label) for values, label in ((generated, "generated"), (held_out, "held out")) if values]

    def draw(figure: Any, theme: Theme) -> None:
        import numpy as np

        axes = figure.subplots()
        every = np.concatenate([np.asarray(values, np.float64) for values, _ in sides])
        edges = np.histogram_bin_edges(np.append(every, measure["threshold"]), bins=30)
        for (values, label), colour in zip(sides, (theme.colours[1], theme.colours[0]), strict=False):
            heights = np.histogram(values, edges)[0] / len(values)
            axes.stairs(heights, edges, fill=True, color=colour, alpha=0.35)
            axes.stairs(heights, edges, color=colour, linewidth=1.6, label=f"{label} ({len(values):,})")
        axes.axvline(measure["threshold"], color=theme.ink, linewidth=1.4, linestyle="--", label="threshold")
        axes.set_xlabel(name)
        axes.set_ylabel("share of images")
        axes.set_gid("y")
        _legend_above(figure, axes, theme, columns=3)

    shares = ", ".join(
        f"{percent(measure[side]['share'])} of the {words} below it"
        for side, words in (("generated", "generated images"), ("held_out", "held-out photographs"))
    )
    alt = f"{name} to the nearest training photograph; threshold {text(measure['threshold'])}: {shares}"
    return _plot(f"nearest-{measure['measure']}", alt, 3.1, draw)


def usefulness_plot(found: Mapping[str, Any]) -> Plot | None:
    """AUROC, accuracy and sensitivity by what the classifier was trained on, with intervals."""
    rates = [name for name in RATES if any((row.get(name) or {}).get("mean") is not None for row in found["rows"])]
    if not rates:
        return None
    sources = [row["trained_on"] for row in found["rows"]]

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.subplots()
        thick = 0.8 / len(sources)
        for index, row in enumerate(found["rows"]):
            colour = theme.colours[index % 3]
            for place, name in enumerate(rates):
                rate = row.get(name) or {}
                if rate.get("mean") is None:
                    continue
                here = place + (index - (len(sources) - 1) / 2) * thick
                label = f"trained on {TRAINED_ON.get(row['trained_on'], row['trained_on'])}"
                axes.barh(here, rate["mean"], 0.86 * thick, color=colour, alpha=0.75, label=None if place else label)
                if rate.get("interval"):
                    axes.plot(rate["interval"], [here, here], color=theme.ink, linewidth=1.5)
        axes.set_yticks(range(len(rates)), [RATES[name].replace(" at ", "\nat ") for name in rates])
        axes.set_ylim(len(rates) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        _legend_above(figure, axes, theme)

    said = [
        f"trained on {TRAINED_ON.get(row['trained_on'], row['trained_on'])}: "
        + ", ".join(
            f"{RATES[name]} {text(row[name]['mean'])} ({between(row[name].get('interval'))})"
            for name in rates
            if row.get(name)
        )
        for row in found["rows"]
    ]
    alt = "Classifiers tested on real photographs. " + "; ".join(said)
    return _plot("usefulness", alt, 1.1 + 0.75 * len(rates), draw)


def fidelity_plot(rows: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Share of images, by class, that a classifier of real photographs takes for their label."""
    rows = rows[: 2 * CLASSES]
    if not rows:
        return None

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.subplots()
        for place, row in enumerate(rows):
            axes.barh(place, row["agreement"], 0.6, color=theme.colours[row["side"] == "generated"], alpha=0.75)
            if row.get("interval"):
                axes.plot(row["interval"], [place, place], color=theme.ink, linewidth=1.5)
        axes.set_yticks(range(len(rows)), [f"{clip(row['label'])}, {row['side']}" for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.set_xlabel("share taken for their label")

    said = "; ".join(
        f"{row['label']}, {row['side']}: {text(row['agreement'])} ({between(row.get('interval'))})" for row in rows
    )
    alt = f"Share of images that a classifier of real photographs takes for their label. {said}"
    return _plot("class-fidelity", alt, 0.7 + 0.34 * len(rows), draw)


def run_plot(folder: Path, number: int) -> Plot | None:
    """Losses of a training run, and the validation PSNR of a tokenizer; None where nothing was logged."""
    panels, title, alt = curve_panels(folder)
    if not panels:
        return None

    def draw(figure: Any, theme: Theme) -> None:
        ratios = [2.6] + [1.0] * (len(panels) - 1)
        found = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios})
        for axes, panel in zip(found[:, 0], panels, strict=True):
            for curve in panel.curves:
                axes.plot(
                    *curve.points,
                    color=theme.colours[curve.colour],
                    alpha=curve.alpha,
                    linewidth=curve.width,
                    marker="o" if curve.dots else None,
                    markersize=3.5,
                    label=curve.label,
                )
            axes.set_ylabel(panel.title)
            axes.set_gid("y")
            if panel.limits:
                axes.set_ylim(*panel.limits)
            if len(panel.curves) > 1:
                axes.legend(frameon=False, fontsize=9)
        found[-1, 0].set_xlabel("step")
        found[-1, 0].xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        figure.suptitle(clip(title, 48), fontsize=10, color=theme.ink)

    return _plot(f"run-{number}", alt, 2.0 + 1.2 * len(panels), draw)


def _legend_above(figure: Any, axes: Any, theme: Theme, columns: int = 1) -> None:
    """Outside the axes, where it hides nothing."""
    entries = axes.get_legend_handles_labels()
    figure.legend(*entries, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, labelcolor=theme.ink)


def clip(name: str, length: int = 18) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4)
