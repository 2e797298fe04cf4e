"""An evaluation as lines of text: what ``retinar evaluate`` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from retinar import ui
from retinar.report.figures import CHANGES, MEASURES, NOTHING, RATES, TRAINED_ON, between, percent, score_figure, text
from retinar.report.page import diversity_rows, every_skipped, fidelity_rows


def report_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Tables of an evaluation's dictionary (what ``--json`` prints), and below them what limits the figures."""
    if found.get("scores"):
        yield from _scores(found)
    if diversity := diversity_rows(found.get("diversity") or {}):
        yield "LPIPS distance of random pairs within a class"
        yield from ui.table(
            ["class", "images of", "distance", "95 %", "pairs"],
            [
                [row["label"], side, text(row["mean"]), between(row.get("interval")), str(row["pairs"])]
                for side, row in diversity
            ],
        )
    if found.get("reconstruction"):
        yield from _reconstruction(found)
    if found.get("memorisation"):
        yield from _memorisation(found["memorisation"])
    if found.get("usefulness"):
        yield from _usefulness(found["usefulness"])
    if found.get("inception"):
        yield f"Inception: {found['inception']['source']}, SHA-256 {found['inception']['sha256'][:12]}"
    for part in (found, found.get("memorisation") or {}, found.get("usefulness") or {}):
        for warning in part.get("warnings") or ():
            yield f"note: {warning}"
    skipped = every_skipped(found)
    for row in skipped[:10]:
        yield f"left out: {row['file']}: {row['reason']}"
    if len(skipped) > 10:
        yield f"left out: {len(skipped) - 10} more (--json lists them)"
    if found.get("report"):
        yield f"report: {found['report']}"


def _scores(found: Mapping[str, Any]) -> Iterator[str]:
    """A line a class, mode and metric; columns without anything are left out."""
    yield f"real {found['real']}, scored {found['fake']}"
    spans = any(score.get("intervals") for score in found["scores"])
    floors = any(score.get("floor") for score in found["scores"])
    header = ["class", "mode", "real", "scored", "metric", "value"]
    header += ["95 %"] * spans + ["floor (real against real)"] * floors
    rows = []
    for score in found["scores"]:
        for name, value in score["metrics"].items():
            known = score_figure(name)
            row = [score["label"], score["mode"], str(score["n_real"]), str(score["n_fake"])]
            row += [known.title, text(value, known.digits)]
            if spans:
                row.append(between((score.get("intervals") or {}).get(name), known.digits))
            if floors:
                row.append(floor_text((score.get("floor") or {}).get(name), known.digits))
            rows.append(row)
    yield from ui.table(header, rows)


def floor_text(floor: Mapping[str, Any] | None, digits: int = 2) -> str:
    """Mean and deviation of a floor, with its counts."""
    if not floor:
        return NOTHING
    spread = f" ± {text(floor['sd'], digits)}" if floor["sd"] is not None else ""
    counts = f"({floor['draws']} x {floor['n_sample']} against {floor['n_reference']})"
    return f"{text(floor['mean'], digits)}{spread} {counts}"


def _reconstruction(found: Mapping[str, Any]) -> Iterator[str]:
    rows = found["reconstruction"]
    modes = list(rows[0]["rfid"])
    extra = [name for name in ("ssim", "lpips") if any(row.get(name) is not None for row in rows)]
    yield f"{found['real']} through the tokenizer {found['tokenizer']['path']}"
    yield from ui.table(
        [
            *("class", "images", "PSNR dB"),
            *(name.upper() for name in extra),
            *("L1", "codes used", "perplexity"),
            *(f"rFID {mode}" for mode in modes),
        ],
        [
            [
                *(row["label"], str(row["images"]), text(row["psnr"], 2)),
                *(text(row.get(name)) for name in extra),
                *(text(row["l1"], 4), f"{row['codes_used']} of {row['codebook_size']}", text(row["perplexity"], 0)),
                *(text(row["rfid"][mode], 2) for mode in modes),
            ]
            for row in rows
        ],
    )


def _memorisation(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"images nearer to a training photograph than {percent(1 - found['quantile'])} of held-out photographs are"
    rows = []
    for measure in found["measures"]:
        for side, words in (("generated", "generated"), ("held_out", "held out")):
            row = measure[side]
            shown = [MEASURES.get(measure["measure"], measure["measure"]), words, text(measure["threshold"])]
            span = row.get("interval")
            limits = f"{percent(span[0])} to {percent(span[1])}" if span else NOTHING
            rows.append([*shown, f"{row['flagged']} of {row['n']}", percent(row["share"]), limits])
        for row in measure.get("copies") or ():
            shown = [MEASURES.get(measure["measure"], measure["measure"]), CHANGES.get(row["kind"], row["kind"]), ""]
            rows.append([*shown, f"{row['flagged']} of {row['n']}", percent(row["share"]), ""])
    yield from ui.table(["measure", "images", "threshold", "flagged", "share", "95 %"], rows)


def _usefulness(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"a classifier ({found['network']}) tested on real photographs"
    rates = {name: title for name, title in RATES.items() if any(row.get(name) for row in found["rows"])}
    rows = []
    for row in found["rows"]:
        cells = [TRAINED_ON.get(row["trained_on"], row["trained_on"])]
        for name in rates:
            rate = row.get(name) or {}
            cells.append(f"{text(rate.get('mean'))} ({between(rate.get('interval'))})")
        rows.append(cells)
    yield from ui.table(["trained on", *(f"{title} (95 %)" for title in rates.values())], rows)
    if fidelity := fidelity_rows(found):
        yield "images that a classifier of real photographs takes for their label"
        yield from ui.table(
            ["class", "images", "count", "agreement", "95 %"],
            [
                [row["label"], row["side"], str(row["images"]), text(row["agreement"]), between(row.get("interval"))]
                for row in fidelity
            ],
        )


def reading_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """A scored reading (``score_reading``)."""
    yield f"{found['images']} images, {found['unanswered']} without an answer; 0.5 of right answers is guessing"
    named = {
        "right answers": found["accuracy"],
        "generated images seen through (sensitivity)": found["sensitivity"],
        "photographs recognised (specificity)": found["specificity"],
        **{f"right answers, {label}": row for label, row in found["by_class"].items()},
        **{f"grades that agree, {source}": row for source, row in (found.get("grading") or {}).items()},
    }
    rows = [
        [name, f"{row['right']} of {row['n']}", text(row["share"]), between(row["interval"])]
        for name, row in named.items()
    ]
    yield from ui.table(["", "count", "share", "95 % (Wilson)"], rows)
    for name, value in (found.get("confidence") or {}).items():
        yield f"mean confidence {name}: {text(value, 1)}"
