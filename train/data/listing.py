"""Photographs with their grades, before anything is decoded; and their classes.

A photograph's *class* is what training sees ("healthy"); its *grade* is what the source calls it ("0").
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from retinar.engine.errors import InputError
from retinar.train.data.classes import DEFAULT_CLASSES, GRADES, class_name, parse_classes

SPLITS = ("train", "valid", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "val", "validation"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".ppm", ".gif")


@dataclass(frozen=True)
class Photograph:
    """One listed photograph. ``split`` is None where the source has none, ``label`` where the grade is of no class."""

    path: Path
    source: str  # POSIX path relative to the source folder, or to the table's folder
    grade: str
    split: str | None
    patient: str
    label: str | None = None


@dataclass(frozen=True)
class Listing:
    """What a source holds: the photographs of a class, and counts of the rest, so that nothing vanishes silently."""

    layout: str
    classes: dict[str, tuple[str, ...]]
    photographs: list[Photograph]
    missing: list[Photograph] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)  # grade -> photographs of no class
    unlisted: int = 0  # photographs beside the grade files that no line names


def with_classes(
    layout: str, photographs: list[Photograph], missing: list[Photograph], spec: str | None, unlisted: int, src: Path
) -> Listing:
    """Give every photograph its class; InputError for a mapping that does not fit what was found."""
    labels = sorted({photograph.grade for photograph in photographs})
    graded = all(label in GRADES for label in labels)
    if layout == "ddr" and not graded:
        wrong = next(p for p in photographs if p.grade not in GRADES)
        raise InputError(f"expected a grade of 0 to 5, got {wrong.grade!r} for {wrong.source}: correct the grade file")
    if spec is not None:
        classes = parse_classes(spec)
    elif graded:
        classes = parse_classes(DEFAULT_CLASSES)
    else:
        classes = {class_name(label): (label,) for label in labels}
    if spec is not None or not graded:
        known = set(labels) | (set(GRADES) if graded else set())
        unknown = sorted({grade for grades in classes.values() for grade in grades} - known)
        if unknown:
            raise InputError(
                f"--classes names {', '.join(map(repr, unknown))}, but the labels under {src} are "
                f"{', '.join(labels)}: correct the mapping"
            )
    label_of = {grade: name for name, grades in classes.items() for grade in grades}
    absent = {photograph.source for photograph in missing}
    chosen: list[Photograph] = []
    left_out: Counter[str] = Counter()
    for photograph in sorted(photographs, key=lambda p: p.source):
        if photograph.source in absent:
            continue
        label = label_of.get(photograph.grade)
        if label is None:
            left_out[photograph.grade] += 1
        else:
            chosen.append(replace(photograph, label=label))
    for name, grades in classes.items():
        if all(photograph.label != name for photograph in chosen):
            raise InputError(
                f"expected photographs of class {name} (label {', '.join(grades)}) under {src}, found none among "
                f"the labels {', '.join(labels)}: correct --classes or the source"
            )
    return Listing(layout, classes, chosen, missing, dict(sorted(left_out.items())), unlisted)
