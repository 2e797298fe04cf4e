"""Copies of training images: equal ones, and ones made on purpose to see whether a search finds them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from retinar.engine.metrics.folders import read_image
from retinar.engine.metrics.reconstruction import fit


def mirror(pixels: np.ndarray) -> np.ndarray:
    """[H, W, 3] with left and right swapped, contiguous."""
    return np.ascontiguousarray(pixels[:, ::-1])


def compress(pixels: np.ndarray, quality: int = 75) -> np.ndarray:
    """uint8 [H, W, 3] through JPEG (Pillow's default subsampling) and back."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return np.array(image.convert("RGB"))


KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "jpeg-75": compress,
    "mirrored-jpeg-75": lambda pixels: compress(mirror(pixels)),
}
"""How training images are changed before they are searched for."""


def changed(files: Sequence[Path], kind: str, size: int | None = None) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] of each file, changed; before that made ``size`` pixels wide where that is smaller, as generated
    images are.
    """
    for path in files:
        pixels = read_image(path)
        if size is not None and size < min(pixels.shape[:2]):
            pixels = fit(pixels, size)
        yield KINDS[kind](pixels)


def exact_copies(files: Sequence[Path], train: Sequence[Path]) -> dict[Path, tuple[int, bool]]:
    """Files whose decoded pixels are those of a training image: its index, and whether it had to be mirrored.

    A certain answer, whatever the file format; it knows nothing of copies in another size or with one pixel changed.
    """
    plain: dict[bytes, tuple[int, bool]] = {}
    turned: dict[bytes, tuple[int, bool]] = {}
    for index, path in enumerate(train):
        pixels = read_image(path)
        plain.setdefault(_digest(pixels), (index, False))
        turned.setdefault(_digest(mirror(pixels)), (index, True))
    known = turned | plain
    found = ((path, known.get(_digest(read_image(path)))) for path in files)
    return {path: where for path, where in found if where is not None}


def _digest(pixels: np.ndarray) -> bytes:
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).digest()
