"""Images beside their nearest training photographs, as a list for JSON and as a sheet to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from retinar.engine.errors import InputError
from retinar.engine.files import atomic_write
from retinar.engine.images import BACKGROUND, NOTE, TITLE
from retinar.engine.metrics.folders import read_image
from retinar.engine.metrics.reconstruction import fit

GAP, MARGIN, LINE, HEADING = 6, 24, 18, 40
COLUMNS = 3
FLAG = (240, 120, 100)
KEYS = ("Inception", "inception"), ("LPIPS", "lpips"), ("structure", "structure")
Pair = Mapping[str, Any]
"""A pair of ``Memorisation.pairs``: generated, train (files), mirrored, inception, lpips, structure, flagged."""


def pairs_sheet(
    pairs: Sequence[Pair],
    path: Path | str,
    *,
    rows: int = 12,
    size: int = 192,
    held_out: Sequence[Pair] = (),
) -> Path:
    """Write a PNG of the first ``rows`` pairs: the generated image, its nearest training photograph beside it.

    A training photograph that was met mirrored is mirrored back, so that both show the same. Distances stand below, in
    red where the image was flagged. With ``held_out`` (``Memorisation.held_out_pairs``) the closest three of those
    follow, which shows how much alike two photographs are that are no copies. Raises InputError without pairs, and
    where a file cannot be read.
    """
    if not pairs:
        raise InputError("Expected at least one pair of images for the sheet, found none: give generated images.")
    if rows < 1 or size < 16:
        raise InputError(f"Expected rows >= 1 and size >= 16, found {rows} and {size}: give larger ones.")
    groups = [("generated images, closest first, each beside its nearest training photograph", pairs[:rows])]
    if held_out:
        shown = held_out[: max(1, min(rows, COLUMNS))]
        groups.append(("for comparison: the closest held-out photographs, beside theirs", shown))
    columns = min(COLUMNS, max(len(group) for _, group in groups))
    cell_width, cell_height = 2 * size + GAP, size + 3 * LINE + 2 * GAP
    note, title = ImageFont.load_default(max(9, size // 15)), ImageFont.load_default(max(12, size // 11))
    lines = [math.ceil(len(group) / columns) for _, group in groups]
    width = 2 * MARGIN + columns * cell_width + (columns - 1) * 4 * GAP
    width = max(width, 2 * MARGIN + math.ceil(max(title.getlength(text) for text, _ in groups)))
    canvas = Image.new("RGB", (width, 2 * MARGIN + sum(HEADING + count * cell_height for count in lines)), BACKGROUND)
    draw, top = ImageDraw.Draw(canvas), MARGIN
    for (heading, group), count in zip(groups, lines, strict=True):
        draw.text((MARGIN, top), heading, TITLE, title)
        for number, pair in enumerate(group):
            line, column = divmod(number, columns)
            left, upper = MARGIN + column * (cell_width + 4 * GAP), top + HEADING + line * cell_height
            canvas.paste(_picture(pair["generated"], size), (left, upper))
            canvas.paste(_picture(pair["train"], size, bool(pair["mirrored"])), (left + size + GAP, upper))
            for row, text in enumerate(caption(pair)):
                colour = FLAG if row == 0 and pair["flagged"] else NOTE
                draw.text((left, upper + size + GAP + row * LINE), _shorten(text, note, cell_width), colour, note)
        top += HEADING + count * cell_height
    with atomic_write(path) as temporary:
        canvas.save(temporary, format="PNG", compress_level=6)
    return Path(path)


def caption(pair: Pair) -> list[str]:
    """The lines under a pair."""
    parts = [f"{name} {_short(pair[key])}" for name, key in KEYS if _has(pair, key)]
    flag = "flagged: " if pair["flagged"] else ""
    seen = " (mirrored)" if pair["mirrored"] else ""
    generated, train = Path(pair["generated"]), Path(pair["train"])
    return [
        flag + ", ".join(parts),
        f"{generated.parent.name}/{generated.name}",
        f"{train.parent.name}/{train.name}{seen}",
    ]


def _short(distance: float) -> str:
    return f"{distance:.3g}" if distance >= 1e-4 else "0"


def _has(pair: Pair, key: str) -> bool:
    return pair.get(key) is not None


def _picture(path: Path | str, size: int, mirrored: bool = False) -> Image.Image:
    try:
        pixels = fit(read_image(path), size)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
        raise InputError(f"Expected the image {path}, found {error}: evaluate again where the files lie.") from error
    return Image.fromarray(np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels)


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text's tail where it is too long: names differ at their ends."""
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength("..." + text) > width:
        text = text[1:]
    return "..." + text
