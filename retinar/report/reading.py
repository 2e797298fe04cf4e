"""A blinded reading: shuffled real and generated images for a person to tell apart, with the key kept elsewhere.

All images are made alike, so that nothing but the picture tells: the largest centred square, reduced to the smallest
side among them, enlarged by the same filter, RGB, written without metadata under running numbers, with one time stamp
and in files of one length.
"""

from __future__ import annotations

import csv
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from retinar.engine.errors import InputError
from retinar.report.folder import FORM, KEY, READING
from retinar.report.pictures import readable

REAL, GENERATED = "real", "generated"
QUESTIONS = ("number", "real or generated", "confidence (1 to 5)", "grade", "remarks")
KEY_COLUMNS = ("number", "source", "label", "file")
SHOWN = 384
"""Side of the written images where they are smaller: a reader should not have to enlarge them."""
CELL, GAP, CAPTION, COLUMNS = 240, 12, 26, 5
PAPER, INK = (18, 20, 24), (230, 233, 238)
TIME = 946_684_800
"""Of every file: 1 January 2000."""
DOMAIN = 0x52454144
"""Keeps the draw apart from others with the same seed."""
HOWTO = """How to read these {count} images

Each is either a photograph of a retina or an image made by a computer; there are {half} of each, in random order.
Look at them one by one (the files 001.png and so on; sheet.png shows all of them) and fill in form.csv, one line an
image, with any spreadsheet:

  real or generated     write: real, or: generated
  confidence (1 to 5)   1 = a guess, 5 = sure
  grade                 {grades}
  remarks               what told you, if anything did

Leave a line empty rather than skip its number. Please read alone, without the report that came with these images: it
shows which is which. Whoever gave you this folder scores the form with

  retinar evaluate --score-reading form.csv {key}
"""


@dataclass(frozen=True)
class Reading:
    """What was written: how many images of each side, of each class, and what to warn of."""

    count: int
    per_class: dict[str, int]
    side: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Item:
    source: str
    label: str
    path: Path
    image: Image.Image


def write_reading(
    folder: Path,
    real: Mapping[str, Sequence[Path]],
    fake: Mapping[str, Sequence[Path]],
    *,
    count: int = 40,
    seed: int = 0,
) -> Reading:
    """Write FOLDER/reading (numbered images, sheet, form, instructions) and FOLDER/reading-key.csv.

    ``real`` and ``fake`` map the same classes to files. Every class gives as many real images as generated ones, and
    as many as the other classes: at most ``count`` in all. The same files and seed give the same reading. Raises
    InputError where ``count`` or the readable files do not allow one image of each kind.
    """
    each = check_count(count, len(real)) // (2 * len(real))
    rng = np.random.default_rng([seed, DOMAIN])
    drawn: dict[tuple[str, str], list[_Item]] = {}
    for label in real:
        for source, files in ((REAL, real[label]), (GENERATED, fake[label])):
            order = [files[index] for index in rng.permutation(len(files))]
            drawn[source, label] = list(_take(source, label, order, each))
    fewest = min(len(items) for items in drawn.values())
    if fewest < 1:
        bare = next(key for key, items in drawn.items() if not items)
        raise InputError(f"Expected a readable image of {' '.join(bare)}, found none: add images, or --reading 0.")
    warnings = []
    if 2 * len(real) * fewest < count:
        warnings.append(
            f"the reading has {2 * len(real) * fewest} images instead of {count}: every class gives as many real as "
            "generated ones, and as many as the other classes"
        )
    items = [item for each_side in drawn.values() for item in each_side[:fewest]]
    items = [items[index] for index in rng.permutation(len(items))]
    side = min(min(item.image.size) for item in items)
    _write(folder, items, side, sorted(real))
    return Reading(len(items), dict.fromkeys(real, fewest), side, tuple(warnings))


def check_count(count: int, classes: int) -> int:
    """``count``, where it allows a real and a generated image of every class, or is 0. InputError else."""
    if count < 0 or 0 < count < 2 * classes:
        raise InputError(
            f"Expected --reading of at least {2 * classes} (a real and a generated image of every class), "
            f"found {count}: ask for more, or --reading 0 for none."
        )
    return count


def _take(source: str, label: str, files: Sequence[Path], count: int) -> Iterator[_Item]:
    """The first ``count`` readable ones."""
    for path, image in itertools.islice(readable(files), count):
        yield _Item(source, label, path, image)


def alike(image: Image.Image, side: int, shown: int) -> Image.Image:
    """RGB [shown, shown]: the largest centred square, reduced to ``side`` and enlarged; metadata stays behind."""
    pixels = np.asarray(image.convert("RGB"))
    short = min(pixels.shape[:2])
    top, left = ((length - short) // 2 for length in pixels.shape[:2])
    square = Image.fromarray(np.ascontiguousarray(pixels[top : top + short, left : left + short]))
    reduced = square.resize((side, side), Image.Resampling.BICUBIC)
    return reduced.resize((shown, shown), Image.Resampling.BICUBIC)


def _write(folder: Path, items: Sequence[_Item], side: int, labels: Sequence[str]) -> None:
    inside = folder / READING
    inside.mkdir()
    shown, digits = max(side, SHOWN), max(3, len(str(len(items))))
    images = [alike(item.image, side, shown) for item in items]
    numbers = [f"{number:0{digits}}" for number in range(1, len(items) + 1)]
    for number, image in zip(numbers, images, strict=True):
        image.save(inside / f"{number}.png", compress_level=0)  # smooth pictures would make small files
    numbered_sheet(images, numbers).save(inside / "sheet.png", compress_level=6)
    grades = "your own grading" if len(labels) < 2 else f"one of: {', '.join(labels)}"
    howto = HOWTO.format(count=len(items), half=len(items) // 2, grades=grades, key=KEY)
    (inside / "README.txt").write_text(howto, encoding="utf-8", errors="backslashreplace")
    _rows(inside / FORM, QUESTIONS, [(number, "", "", "", "") for number in numbers])
    _rows(folder / KEY, KEY_COLUMNS, [(n, i.source, i.label, str(i.path)) for n, i in zip(numbers, items, strict=True)])
    for path in inside.iterdir():
        os.utime(path, (TIME, TIME))


def _rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def numbered_sheet(images: Sequence[Image.Image], numbers: Sequence[str]) -> Image.Image:
    """All images with their numbers, five a row."""
    columns = min(COLUMNS, len(images))
    rows = math.ceil(len(images) / columns)
    size = (GAP + columns * (CELL + GAP), GAP + rows * (CELL + CAPTION + GAP))
    canvas, font = Image.new("RGB", size, PAPER), ImageFont.load_default(17)
    draw = ImageDraw.Draw(canvas)
    for index, (image, number) in enumerate(zip(images, numbers, strict=True)):
        row, column = divmod(index, columns)
        left, top = GAP + column * (CELL + GAP), GAP + row * (CELL + CAPTION + GAP)
        draw.text((left + CELL // 2, top + CAPTION // 2), number, INK, font, anchor="mm")
        canvas.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top + CAPTION))
    return canvas
