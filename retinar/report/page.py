"""report.html: the dictionary of an evaluation and its pictures, through the templates beside this file."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined  # a dependency of torch
from markupsafe import Markup

from retinar.report import figures
from retinar.report.pictures import CLASSES, Pair, Shelf, data_uri
from retinar.report.plots import Plot
from retinar.report.reading import Reading

TEMPLATES = Path(__file__).parent / "templates"
SKIPPED = 200
"""Skipped files named on the page; metrics.json names all."""
TITLES = {
    "compared": "What was compared",
    "scores": "Distance from the photographs",
    "diversity": "Diversity",
    "memorisation": "Memorisation",
    "usefulness": "Usefulness to a classifier",
    "samples": "Images",
    "reconstruction": "What the tokenizer loses",
    "runs": "Training",
    "reading": "Reading by people",
    "limits": "Limits, and what was left out",
}


@dataclass
class Drawn:
    """What was made from the dictionary and its files, for the page to show; everything may be absent."""

    scores: Plot | None = None
    distances: list[Plot] = field(default_factory=list)
    usefulness: Plot | None = None
    fidelity: Plot | None = None
    runs: list[tuple[str, Plot]] = field(default_factory=list)
    real: list[Shelf] = field(default_factory=list)
    generated: list[Shelf] = field(default_factory=list)
    reconstructions: list[tuple[str, list[Pair]]] = field(default_factory=list)
    pairs: list[tuple[Mapping[str, Any], Pair]] = field(default_factory=list)
    held_out_pairs: list[tuple[Mapping[str, Any], Pair]] = field(default_factory=list)
    reading: Reading | None = None

    def plots(self) -> list[Plot]:
        own = [self.scores, *self.distances, self.usefulness, self.fidelity, *(plot for _, plot in self.runs)]
        return [plot for plot in own if plot is not None]


def render_page(
    found: Mapping[str, Any], drawn: Drawn, made_by: Mapping[str, Any], *, train: str | None = None, reading: Any = None
) -> str:
    """The page as one text. ``found`` holds plain values (no NaN); sections whose key is absent are left out."""
    lists = ("scores", "diversity", "reconstruction", "warnings", "skipped")
    # Templates may ask for every key; absent ones are empty.
    whole = {**dict.fromkeys(("fake", "tokenizer", "inception", "lpips", "memorisation", "usefulness")), **found}
    whole |= {key: found.get(key) or [] for key in lists}
    scores = whole["scores"]
    usefulness = whole["usefulness"] or {}
    fidelity = fidelity_rows(usefulness)
    shown = {
        "compared": True,
        "scores": scores,
        "diversity": diversity_rows(whole["diversity"]),
        "memorisation": whole["memorisation"],
        "usefulness": usefulness.get("rows"),
        "samples": drawn.real or drawn.generated,
        "reconstruction": whole["reconstruction"],
        "runs": drawn.runs,
        "reading": reading,
        "limits": True,
    }
    skipped = every_skipped(whole)
    page = (
        _environment()
        .get_template("page.html")
        .render(
            title=title_of(whole),
            style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
            sections=[{"name": name, "title": TITLES[name]} for name, part in shown.items() if part],
            found=whole,
            made_by=made_by,
            train=train,
            counts=[score for score in scores if scores and score["mode"] == scores[0]["mode"]],
            modes=list(dict.fromkeys(score["mode"] for score in scores)),
            floors=any(score.get("floor") for score in scores),
            plot_of=drawn,
            distance_plots=drawn.distances,
            diversity_rows=shown["diversity"],
            rates=_rates(usefulness.get("rows") or []),
            by_source=_by_source(usefulness.get("rows") or []),
            fidelity=fidelity,
            shelves=_paired_shelves(drawn),
            hidden_classes=max(0, len({score["label"] for score in scores} - {"all"}) - CLASSES),
            reconstructions=drawn.reconstructions,
            pairs=[pair for _, pair in drawn.pairs],
            held_out_pairs=[pair for _, pair in drawn.held_out_pairs],
            runs=[{"path": path, "plot": plot} for path, plot in drawn.runs],
            reading=reading,
            skipped=skipped[:SKIPPED],
            skipped_count=len(skipped),
        )
    )
    return re.sub(r"\n\s*\n+", "\n", page)


def title_of(found: Mapping[str, Any]) -> str:
    """The page's heading: the folders' own names."""
    if not found.get("fake"):
        return f"{_short(found['real'])} through a tokenizer"
    return f"{_short(found['fake'])} against {_short(found['real'])}"


def _short(path: str) -> str:
    """The last two parts of a path: ``test`` alone says little."""
    return "/".join(Path(path).parts[-2:]).lstrip("/")


def fidelity_rows(usefulness: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Class fidelity of generated images, each class above the same of real photographs."""
    generated = [{"side": "generated", **row} for row in usefulness.get("class_fidelity") or []]
    real = [{"side": "real, held out", **row} for row in usefulness.get("real_agreement") or []]
    labels = list(dict.fromkeys(row["label"] for row in generated + real))
    return [row for label in labels for row in generated + real if row["label"] == label]


def diversity_rows(found: Mapping[str, Any] | Sequence[Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(side, row) of ``diversity`` = {"real": rows, "fake": rows}, class by class."""
    if not found or not isinstance(found, Mapping):
        return []
    words = {"fake": "generated"}
    rows = [(words.get(side, side), row) for side, each in found.items() for row in each]
    labels = list(dict.fromkeys(row["label"] for _, row in rows))
    return [pair for label in labels for pair in rows if pair[1]["label"] == label]


def _rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Name -> title of the figures that any row has."""
    titles = {**figures.RATES, **figures.MORE_RATES}
    return {name: title for name, title in titles.items() if any(row.get(name) for row in rows)}


def _by_source(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"trained_on": row["trained_on"], **each} for row in rows for each in row.get("by_source") or []]


def reconstruction_figures(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures of one class that are there, in the order to read them."""
    spans = row.get("intervals") or {}
    found = [
        {"title": title, "digits": digits, "value": row[name], "interval": spans.get(name)}
        for name, (title, digits) in figures.RECONSTRUCTION.items()
        if row.get(name) is not None
    ]
    for mode, value in (row.get("rfid") or {}).items():
        title = "rFID" if len(row["rfid"]) == 1 else f"rFID {mode}"
        found.append({"title": title, "digits": 2, "value": value, "interval": spans.get(f"rfid {mode}")})
    return found


def every_skipped(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Files that were left out anywhere, each once."""
    parts = [found, *(found.get(name) or {} for name in ("memorisation", "usefulness"))]
    rows = [row for part in parts for row in part.get("skipped") or []]
    return list({row["file"]: row for row in rows}.values())


def _paired_shelves(drawn: Drawn) -> list[dict[str, Any]]:
    """Real and generated images of a class after each other."""
    both = itertools.zip_longest(drawn.real, drawn.generated)
    sides = (("Real", "Generated"),) * max(len(drawn.real), len(drawn.generated))
    return [
        {"kind": kind, "label": shelf.label, "pictures": shelf.pictures, "total": shelf.total}
        for shelves, kinds in zip(both, sides, strict=True)
        for kind, shelf in zip(kinds, shelves, strict=True)
        if shelf is not None and shelf.pictures
    ]


def _floor_lines(score: Mapping[str, Any]) -> list[str]:
    """What a class's floors rest on, each once."""
    lines = [
        f"{floor['draws']:,} × {floor['n_sample']:,} real images"
        + (f" of {floor['source']}" if floor.get("source") else "")
        + f" against {floor['n_reference']:,}"
        for floor in (score.get("floor") or {}).values()
    ]
    return list(dict.fromkeys(lines))


def _counts(counts: Mapping[str, Any] | int) -> str:
    if not isinstance(counts, Mapping):
        return figures.text(counts)
    return ", ".join(f"{value:,} {label}" for label, value in counts.items())


def _searched(counts: Mapping[str, Any]) -> str:
    """What memorisation looked at."""
    words = {"train": "training photographs", "generated": "generated images", "held_out": "held-out photographs"}
    return _counts({words.get(side, side): count for side, count in counts.items()})


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": figures.html_number,
        "percent": figures.html_percent,
        "interval": figures.html_interval,
        "share_interval": figures.html_share_interval,
        "score_figure": figures.score_figure,
        "measure_name": lambda name: figures.MEASURES.get(name, name),
        "change_name": lambda name: figures.CHANGES.get(name, name),
        "trained_on": lambda name: figures.TRAINED_ON.get(name, name),
        "floor_lines": _floor_lines,
        "reconstruction_figures": reconstruction_figures,
        "counts": _counts,
        "searched": _searched,
        "data_uri": lambda data: data_uri("png", data),
    }
    return environment
