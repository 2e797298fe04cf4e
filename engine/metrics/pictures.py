"""Photographs by class as a classifier takes them: read once, resized once, checked for what would spoil a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from retinar.engine.errors import InputError
from retinar.engine.metrics.folders import ImageFolder, read_image
from retinar.engine.metrics.screening import Look, screen
from retinar.engine.progress import Progress, silent


@dataclass
class Pictures:
    """uint8 [n, 3, size, size] with class numbers int64 [n] and their files; ``skipped``: (file, reason)."""

    images_NCHW: Tensor
    classes_N: np.ndarray
    files: tuple[Path, ...]
    skipped: tuple[tuple[Path, str], ...] = ()

    def __len__(self) -> int:
        return len(self.files)


def read_pictures(
    files: Sequence[Sequence[Path]], size: int, folder: Path | str = "", progress: Progress = silent
) -> Pictures:
    """Read the files of class 0, 1, ... of a folder: the largest centred square, resized once (bilinear, antialiased).

    What cannot be read, and what ``screening`` leaves out of every other figure too, is told in ``skipped``.
    """
    listed = [(path, number) for number, paths in enumerate(files) for path in paths]
    images_NCHW = torch.empty(len(listed), 3, size, size, dtype=torch.uint8)
    looks: dict[Path, Look] = {}
    skipped: dict[Path, str] = {}
    with progress(f"images of {folder}", len(listed)) as bar, ThreadPoolExecutor(4) as pool:
        for row, found in enumerate(pool.map(lambda each: _read(each[0], size), listed)):
            if isinstance(found, str):
                skipped[listed[row][0]] = found
            else:
                looks[listed[row][0]], pixels = found
                images_NCHW[row] = torch.from_numpy(pixels)
            bar.advance()
    skipped |= screen(looks, folder).left_out
    kept = [row for row, (path, _) in enumerate(listed) if path not in skipped]
    return Pictures(
        images_NCHW[kept],
        np.array([listed[row][1] for row in kept], np.int64),
        tuple(listed[row][0] for row in kept),
        tuple(sorted(skipped.items())),
    )


def _read(path: Path, size: int) -> tuple[Look, np.ndarray] | str:
    """What a file looks like and its pixels, uint8 [3, size, size]; or why it cannot be read."""
    try:
        pixels = read_image(path)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
        return str(error) or type(error).__name__
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = Image.fromarray(pixels[top : top + side, left : left + side])
    if side != size:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return Look.of(pixels), np.asarray(image).transpose(2, 0, 1).copy()


def common_labels(folders: Mapping[str, ImageFolder], warned: list[str]) -> list[str]:
    """The classes of the training folder, which all others must hold."""
    for folder in folders.values():
        if not folder.classes:
            raise InputError(f"Expected a subfolder for each class in {folder.root}, found none: add them.")
    labels = sorted(folders["training"].classes)
    if len(labels) < 2:
        raise InputError(
            f"Expected two or more class subfolders in {folders['training'].root}, found only {labels[0]}: add one."
        )
    for folder in folders.values():
        if missing := sorted(set(labels) - set(folder.classes)):
            raise InputError(
                f"Expected the classes {', '.join(labels)} in {folder.root}, found no images of "
                f"{', '.join(missing)}: add them."
            )
        if rest := sorted(set(folder.classes) - set(labels)):
            warned.append(f"{folder.root} holds classes that are not for training, left out: {', '.join(rest)}")
    return labels


def check_read(found: Pictures, labels: Sequence[str], root: Path) -> None:
    for number, label in enumerate(labels):
        if not (found.classes_N == number).any():
            bad = next((f" ({path.name}: {why})" for path, why in found.skipped), "")
            raise InputError(f"Expected readable images in {root / label}, found none{bad}: add images.")


def check_apart(pictures: Mapping[str, Pictures]) -> None:
    """A test photograph that was trained on, or chosen by, would make every figure worthless."""
    test = {path.resolve() for path in pictures["test"].files}
    for name in ("training", "validation", "generated"):
        shared = [path for path in pictures[name].files if path.resolve() in test] if name in pictures else []
        if shared:
            raise InputError(
                f"Expected test photographs apart from the {name} images, found {len(shared)} in both, such as "
                f"{shared[0]}: give another folder."
            )


def join(a: Pictures, b: Pictures) -> Pictures:
    return Pictures(
        torch.cat([a.images_NCHW, b.images_NCHW]), np.concatenate([a.classes_N, b.classes_N]), a.files + b.files
    )
