"""A report as one folder that is whole or absent: the page, metrics.json, the plots, and the blinded reading."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from retinar import __version__, ui
from retinar.engine.folders import atomic_folder
from retinar.engine.images import sheet
from retinar.engine.metrics.evaluation import ALL
from retinar.engine.metrics.folders import open_folder
from retinar.engine.progress import Progress, silent
from retinar.report import pictures, plots
from retinar.report.folder import FIGURES, KEY, PAGE, PLOTS, READING, check_report_folder, replaceable
from retinar.report.page import Drawn, fidelity_rows, render_page
from retinar.report.reading import write_reading


def write_report(
    found: Mapping[str, Any],
    folder: Path | str,
    *,
    real: Path | str,
    fake: Path | str | None = None,
    train: Path | str | None = None,
    tokenizer: Any = None,
    runs: Sequence[Path | str] = (),
    reading: int = 0,
    seed: int = 0,
    command: str = "",
    date: datetime | None = None,
    progress: Progress = silent,
) -> Path:
    """Write FOLDER and return the path of its ``report.html``.

    ``found`` is what ``retinar evaluate --json`` prints; a part of the page whose key is absent is left out. ``real``
    and ``fake`` give the images to show, ``tokenizer`` (a loaded one) the reconstructions, ``runs`` are training runs
    whose losses to draw, ``reading`` is how many images the blinded reading holds (0 for none). ``command`` and
    ``date`` (now where None) are told on the page. The page needs no other file and no network.

    Raises InputError where ``folder`` holds anything but an untouched report, lies among the images, or where the
    images do not allow the reading.
    """
    folder = Path(folder)
    sources = [Path(path) for path in (real, fake, train) if path is not None]
    check_report_folder(folder, sources)
    whole = ui.jsonable(found)
    moment = (date or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M %Z").strip()
    made_by = {"version": __version__, "date": moment, "command": command, "seed": seed}
    labels = [row["label"] for row in whole.get("scores") or whole.get("reconstruction") or [] if row["label"] != ALL]
    left_out = {row["file"] for row in whole.get("skipped") or []}
    reals = pictures.by_class(open_folder(real), labels, left_out)
    fakes = pictures.by_class(open_folder(fake), labels, left_out) if fake is not None else {}
    with progress("report", 4) as bar, atomic_folder(folder, replaceable) as inside:
        drawn = Drawn(real=pictures.shelves(reals, "Photograph"), generated=pictures.shelves(fakes, "Generated image"))
        bar.advance()
        decoded = pictures.reconstructions(reals, tokenizer) if tokenizer is not None else []
        drawn.reconstructions = [(label, pictures.reconstruction_pairs(label, pairs)) for label, pairs in decoded]
        bar.advance()
        _draw(drawn, whole, [Path(run) for run in runs])
        bar.advance()
        _write_sheets(inside / PLOTS, drawn, decoded)
        warnings = list(whole.get("warnings") or [])
        if reading and fakes:
            drawn.reading = write_reading(inside, reals, fakes, count=reading, seed=seed)
            warnings += drawn.reading.warnings
        whole |= {"warnings": warnings, "made_by": made_by}
        page = render_page(
            whole,
            drawn,
            made_by,
            train=str(train) if train is not None else None,
            reading={"count": drawn.reading.count, "folder": READING, "key": KEY} if drawn.reading else None,
        )
        for plot in drawn.plots():
            (inside / PLOTS / f"{plot.name}.png").write_bytes(plot.light)
        _write(inside / FIGURES, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
        _write(inside / PAGE, page)
        bar.advance()
    return folder / PAGE


def _draw(drawn: Drawn, found: Mapping[str, Any], runs: Sequence[Path]) -> None:
    if found.get("scores"):
        drawn.scores = plots.scores_plot(found["scores"])
    memorisation = found.get("memorisation") or {}
    for measure in memorisation.get("measures") or []:
        generated, held_out = (distances(memorisation, measure, side) for side in ("generated", "held_out"))
        if generated and measure["threshold"] is not None:
            drawn.distances.append(plots.distances_plot(measure, generated, held_out))
    usefulness = found.get("usefulness") or {}
    if usefulness.get("rows"):
        drawn.usefulness = plots.usefulness_plot(usefulness)
        drawn.fidelity = plots.fidelity_plot(fidelity_rows(usefulness))
    drawn.pairs = pictures.closest_pairs(memorisation.get("pairs") or [])
    rows = memorisation.get("held_out_pairs") or []
    drawn.held_out_pairs = pictures.closest_pairs(rows, pictures.COMPARED, "Held out")
    curves = ((str(run), plots.run_plot(run, number)) for number, run in enumerate(runs, 1))
    drawn.runs = [(name, plot) for name, plot in curves if plot is not None]


def distances(memorisation: Mapping[str, Any], measure: Mapping[str, Any], side: str) -> list[float]:
    """The nearest distances of a side, where the dictionary has them; those of its pairs for generated images else."""
    name = measure["measure"]
    values = ((memorisation.get("distances") or {}).get(name) or {}).get(side)
    if values is None and side == "generated":
        values = [row.get(name) for row in memorisation.get("pairs") or []]
    return [value for value in values or [] if value is not None]


def _write_sheets(
    folder: Path,
    drawn: Drawn,
    decoded: Sequence[tuple[str, Sequence[tuple[Image.Image, Image.Image]]]],
) -> None:
    """The page's images as contact sheets, for slides and papers."""
    folder.mkdir()
    for name, shelves in (("real", drawn.real), ("generated", drawn.generated)):
        groups = [(shelf.label, shelf.total, shelf.images) for shelf in shelves if shelf.images]
        if groups:
            sheet(groups).save(folder / f"{name}.png")
    if decoded:
        columns = max(len(each) for _, each in decoded)
        sides = [
            (f"{label}: {title}", len(each), [pair[side] for pair in each])
            for label, each in decoded
            for side, title in ((0, "photographs"), (1, "reconstructions"))
        ]
        sheet(sides, columns=columns).save(folder / "reconstructed.png")
    if drawn.pairs:
        from retinar.engine.metrics.pairs import pairs_sheet

        rows, compared = ([row for row, _ in each] for each in (drawn.pairs, drawn.held_out_pairs))
        pairs_sheet(rows, folder / "closest-pairs.png", held_out=compared)


def _write(path: Path, text: str) -> None:
    # Names of files need not be UTF-8.
    path.write_bytes(text.encode("utf-8", "backslashreplace"))
