"""A folder of ``{index:06d}.png`` and the ``.npz`` beside it, as LlamaGen's evaluation reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from retinar.engine.images import save_npz


def png(folder: Path, index: int) -> Path:
    """The file of one image."""
    return folder / f"{index:06d}.png"


def remove_leftovers(folder: Path) -> None:
    """Half-written files of a killed process; to be called before others begin to write."""
    for leftover in folder.glob(".*.partial"):
        leftover.unlink()


def write_npz(folder: Path, count: int, size: int) -> Path:
    """FOLDER.npz with ``arr_0`` uint8 [count, size, size, 3], read image by image from the folder's files."""
    path = folder.with_name(f"{folder.name}.npz")
    save_npz(path, _pixels(png(folder, index) for index in range(count)), count, size, size)
    return path


def _pixels(files: Iterable[Path]) -> Iterator[np.ndarray]:
    for file in files:
        with Image.open(file) as image:
            yield np.asarray(image.convert("RGB"))


def resized(images_BCHW: Tensor, size: int) -> Tensor:
    """Images as the evaluation takes them, [B, C, size, size]: bicubic, without antialiasing, as upstream's."""
    if images_BCHW.shape[-1] == size:
        return images_BCHW
    return F.interpolate(images_BCHW, size=(size, size), mode="bicubic")
