"""The names of the figures, how many digits people want of them, and how to read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup  # of Jinja, which torch brings

NOTHING = "–"


@dataclass(frozen=True)
class Figure:
    """One figure: what it is called, its decimals, which way is better, and what it says in plain words."""

    title: str
    digits: int
    better: str
    meaning: str


SCORES = {
    "fid": Figure(
        "FID",
        2,
        "lower",
        "How far the two sets of images lie apart in the features of the Inception network: their centres and their "
        "spread at once. It grows when there are few images, so it is read against the floor beside it, which real "
        "photographs reach at the same count.",
    ),
    "kid": Figure(
        "KID",
        5,
        "lower",
        "The same question without the bias of small samples: around 0 for two sets from one source, and sometimes a "
        "little below. Fit for fewer images than FID.",
    ),
    "precision": Figure(
        "Precision",
        3,
        "higher",
        "The share of generated images that lie among the real ones: how believable they are, one by one.",
    ),
    "recall": Figure(
        "Recall",
        3,
        "higher",
        "The share of real photographs that lie among the generated ones: how much of the real variety is there.",
    ),
    "density": Figure(
        "Density",
        3,
        "higher",
        "As precision, but counting how many real neighbours a generated image has, so that one odd photograph does "
        "not vouch for many images. Around 1 for real against real, and it may exceed 1.",
    ),
    "coverage": Figure(
        "Coverage",
        3,
        "higher",
        "The share of real photographs with a generated image among their near neighbours: as recall, but not "
        "flattered by odd generated images.",
    ),
}
RATES = {
    "auroc": "AUROC",
    "accuracy": "Accuracy",
    "sensitivity_at_95_specificity": "Sensitivity at 95 % specificity",
}
"""Figures of a classifier, as in the plots; the tables have these too."""
MORE_RATES = {"within_sources": "AUROC within sources", "balanced_accuracy": "Balanced accuracy"}
RECONSTRUCTION = {
    "psnr": ("PSNR (dB)", 2),
    "ssim": ("SSIM", 3),
    "lpips": ("LPIPS", 3),
    "l1": ("Mean error", 4),
    "perplexity": ("Perplexity of the codes", 0),
}
"""Name -> title and decimals."""
MEASURES = {
    "inception": "Inception distance",
    "lpips": "LPIPS distance",
    "structure": "Vessel structure (1 - correlation, aligned)",
    "any": "All of these (the nearest, in multiples of its threshold)",
}
CHANGES = {"jpeg-75": "training, compressed", "mirrored-jpeg-75": "training, mirrored and compressed"}
"""Ways in which training photographs are changed to see whether they are found."""
TRAINED_ON = {"real": "real photographs", "synthetic": "generated images", "both": "both together"}


def score_figure(name: str) -> Figure:
    """The figure of a metric, also of one that is not known here."""
    return SCORES.get(name, Figure(name.upper(), 4, "", ""))


def text(value: float | None, digits: int = 3) -> str:
    """A figure as people write it; a dash for none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """A share in per cent, with a decimal below ten."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{100 * value:.{1 if value < 0.1 else 0}f} %"


def between(bounds: Sequence[float] | None, digits: int = 3) -> str:
    """An interval."""
    return f"{text(bounds[0], digits)} to {text(bounds[1], digits)}" if bounds else NOTHING


def html_number(value: Any, digits: int = 3) -> Markup:
    """``<data>``: the rounded figure for people, the whole one for programs."""
    return _data(value, text(value, digits).replace("-", "−"))


def html_percent(value: Any) -> Markup:
    return _data(value, percent(value))


def html_interval(bounds: Sequence[float] | None, digits: int = 3) -> Markup:
    if not bounds:
        return Markup(NOTHING)
    return Markup("{} to {}").format(*(html_number(bound, digits) for bound in bounds))


def html_share_interval(bounds: Sequence[float] | None) -> Markup:
    if not bounds:
        return Markup(NOTHING)
    return Markup("{} to {}").format(*(html_percent(bound) for bound in bounds))


def _data(value: Any, shown: str) -> Markup:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return Markup(NOTHING)
    return Markup('<data value="{}">{}</data>').format(repr(value), shown)
