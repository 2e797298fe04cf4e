"""Pixels into files: PNG with text chunks, the contact sheet, upstream's npz. The same input gives the same bytes."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from retinar.engine.files import atomic_write
from retinar.engine.provenance import FIELDS

SHEET_COLUMNS, SHEET_PER_CLASS, SHEET_GROUPS, SHEET_CELL = 8, 64, 32, 192
BACKGROUND, TITLE, NOTE = (22, 24, 29), (236, 238, 242), (140, 146, 158)


def to_bytes(images_CHW: Tensor) -> np.ndarray:
    """Decoded images [..., C, H, W] in [-1, 1] as uint8 [..., H, W, C] on the host: clamp(127.5 x + 128, 0, 255), the
    fraction cut off (upstream's rule).
    """
    levels_CHW = (127.5 * images_CHW.float() + 128.0).clamp(0, 255)
    return levels_CHW.to(torch.uint8).movedim(-3, -1).contiguous().cpu().numpy()


def to_pil(pixels_HWC: np.ndarray, fields: dict[str, str]) -> Image.Image:
    """A PIL image with its provenance in ``.info``."""
    image = Image.fromarray(pixels_HWC)
    image.info.update(fields)
    return image


def save_png(image: Image.Image, path: Path | str) -> None:
    """Write a PNG whose text chunks are the provenance in ``image.info``; atomic, no time stamp, fixed compression."""
    chunks = PngInfo()
    for name in FIELDS:
        if name in image.info:
            chunks.add_text(name, image.info[name])
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks, compress_level=6)


def save_npz(path: Path | str, pixels: Iterable[np.ndarray], count: int, height: int, width: int) -> None:
    """``arr_0`` uint8 [count, height, width, 3], as upstream's evaluation reads it, written image by image (no large
    array).
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, 3)}
    with (
        atomic_write(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        # ZipInfo's default date is 1980-01-01: no time stamp, equal bytes
        archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for pixels_HWC in pixels:
            member.write(np.ascontiguousarray(pixels_HWC).tobytes())


def sheet(
    groups: Sequence[tuple[str, int, Sequence[Image.Image]]], footer: str = "", columns: int | None = None
) -> Image.Image:
    """A contact sheet: for each (title, how many there are, images) a title line and a grid, and ``footer`` at the
    bottom.

    At most 8 images a row and 64 a group (8 where there are more than 8 groups; 32 groups); the grid is as square as
    that allows, or has so many ``columns``. Images above 192 pixels are scaled down.
    """
    limit = sheet_limit(len(groups))
    shown = [(title, total, list(images)[:limit]) for title, total, images in groups[:SHEET_GROUPS]]
    most = max((len(images) for _, _, images in shown), default=0)
    if columns is None:
        columns = max(1, min(SHEET_COLUMNS, math.ceil(math.sqrt(most))))
    cell = min(SHEET_CELL, max((max(image.size) for _, _, images in shown for image in images), default=SHEET_CELL))
    gap, margin, title_font, note_font = 6, 24, _font(20), _font(13)
    title_height, footer_height = 44, 30 if footer else 0

    heights = [title_height + math.ceil(len(images) / columns) * (cell + gap) + gap for _, _, images in shown]
    texts = [title_font.getlength(_heading(*group)) for group in shown] + [note_font.getlength(footer)]
    width = 2 * margin + math.ceil(max(columns * (cell + gap) - gap, *texts))
    canvas = Image.new("RGB", (width, 2 * margin + sum(heights) + footer_height - title_height // 3), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    top = margin - title_height // 3
    for group, height in zip(shown, heights, strict=True):
        draw.text((margin, top + title_height // 2), _heading(*group), TITLE, title_font, anchor="lm")
        for i, image in enumerate(group[2]):
            row, column = divmod(i, columns)
            corner = (margin + column * (cell + gap), top + title_height + row * (cell + gap))
            canvas.paste(_fit(image, cell), corner)
        top += height
    if footer:
        draw.text((margin, canvas.height - margin), footer, NOTE, note_font, anchor="ls")
    return canvas


def sheet_limit(groups: int) -> int:
    """Images that a sheet shows of each of ``groups`` groups."""
    return SHEET_PER_CLASS if groups <= 8 else SHEET_COLUMNS


def _heading(title: str, total: int, images: Sequence[Image.Image]) -> str:
    return f"{title}   {total}" if len(images) == total else f"{title}   {len(images)} of {total}"


def _fit(image: Image.Image, cell: int) -> Image.Image:
    if max(image.size) <= cell:
        return image.convert("RGB")
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
