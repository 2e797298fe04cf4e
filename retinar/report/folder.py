"""Where a report may be written, and which folders are reports of ours."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path

from retinar.engine.errors import InputError
from retinar.engine.metrics.folders import open_folder

PAGE, FIGURES, PLOTS = "report.html", "metrics.json", "plots"
READING, KEY, FORM = "reading", "reading-key.csv", "form.csv"
MARK = '<meta name="generator" content="retinar'


def check_report_folder(folder: Path, sources: Iterable[Path] = ()) -> None:
    """Raise InputError unless a report may be written to ``folder``.

    It must be free, empty, or an earlier report with nothing added to it; and not lie among the images of ``sources``
    (where the next evaluation would take it for a class), nor hold them.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"Expected a folder for the report at {folder}, found a file: choose another name.")
    if not replaceable(folder):
        why = _refusal(folder)
        raise InputError(
            f"Expected {folder} to be free or to hold an earlier report, found {why}: choose another name."
        )
    for source in sources:
        images = Path(os.path.realpath(open_folder(source).root))
        if folder == images or images in folder.parents or folder in images.parents:
            raise InputError(f"Expected a folder for the report beside {images}, found {folder}: choose another name.")


def replaceable(folder: Path) -> bool:
    """Whether a report may take the place of ``folder``."""
    return not folder.exists() or not any(folder.iterdir()) or not _refusal(folder)


def _refusal(folder: Path) -> str:
    """What stands against replacing a folder; empty for an untouched report of ours."""
    try:
        with open(folder / PAGE, encoding="utf-8", errors="replace") as page:
            ours = MARK in page.read(1000)
    except OSError:
        ours = False
    if not ours:
        return "other files"
    ours_alone = {PAGE, FIGURES, PLOTS, READING, KEY}
    added = sorted(path.name for path in folder.iterdir() if path.name not in ours_alone)
    if added:
        return f"{added[0]}, which is no part of it,"
    if filled(folder / READING / FORM):
        return f"the form {READING}/{FORM} filled in"
    return ""


def filled(form: Path) -> bool:
    """Whether a grader has written anything into a form."""
    try:
        with open(form, encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = list(csv.reader(file, delimiter=";" if ";" in file.readline() else ","))
    except OSError:
        return False
    return any(cell.strip() for row in rows for cell in row[1:])
